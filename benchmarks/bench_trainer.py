"""What core.train.language.LanguageTrainer costs over stock trl.GRPOTrainer at equal arithmetic.

    python -P benchmarks/bench_trainer.py [--quick] [--output FOLDER]      writes results/trainer_overhead.json

Same model, prompts, seed and reward; loss type and recipe "grpo"; float32, one torch thread. Three trainers stand in one
process, each in a thread of its own that runs its own `train()`, and take turns step by step: stock with the reward as a
plain function, ours with it as a @batched reward (in this process too), ours with it in a warm worker process. So all three
meet the same machine second by second, with the caches and the optimizer state of a long run; separate `train()` calls on
fresh trainers would time set-up as well, and separate processes the machine's mood. Only one thread runs at a time.

A step is what lies between two `on_step_begin`: sampling, reward, loss, backward, optimizer, metrics, the log line (every
step, printed to nowhere) and the fetch of the next batch. Both sides have the same callbacks and save nothing.
Torch's, numpy's and Python's random states are each trainer's own, so all sample the same completions: after every step the
logged losses, gradient norms, rewards and lengths must agree bit for bit, and at the end the weights, or nothing is written.

Read "ratio" on the slow model (wanted: an interval that ends at 1.05 or lower) and "added" on the fast one (5 ms or less).
The slow model is meant to take 1 s or more a stock step (column "baseline"); in a shorter one the same cost weighs more.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # each thread would take its own number from here
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import contextlib
import random
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).parent))  # `-P` leaves it out; workers get the path of this process

from side_by_side import Disagreement, case, measure, median, write
from trainer_rewards import spread, spread_of_batch

from core.batch import Batch
from core.config import Config, LanguageRollout, Optim, Run
from core.objective.recipes import RECIPES
from core.policy.tiny import build_model, build_tokenizer
from core.scoring import Scorer
from core.train.language import LanguageTrainer

SEED = 0
PROMPTS = [
    f"{count} {color} {animal}s" for count in range(2, 6) for color in ("red", "blue") for animal in ("cat", "dog")
]
COMPARED = ("loss", "grad_norm", "reward", "reward_std", "completions/mean_length")


@dataclass(frozen=True)
class Size:
    """A model, a batch and how many rounds of steps are timed."""

    name: str
    width: int
    layers: int
    prompts: int
    group: int
    tokens: int
    rounds: int
    unit: str
    per_second: float


SLOW = Size("slow model", 256, 8, prompts=4, group=8, tokens=48, rounds=20, unit="s/step", per_second=1.0)
FAST = Size("fast model", 32, 2, prompts=2, group=8, tokens=12, rounds=200, unit="ms/step", per_second=1000.0)
QUICK = Size("tiny model", 16, 1, prompts=1, group=4, tokens=4, rounds=3, unit="ms/step", per_second=1000.0)


def main(arguments: Sequence[str] | None = None) -> Path:
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--quick", action="store_true", help="three steps of a tiny model: does it run, not how fast")
    parse.add_argument("--output", type=Path, default=Path("results"), help="folder of trainer_overhead.json")
    options = parse.parse_args(arguments)
    torch.set_num_threads(1)
    cases = []
    for size in (QUICK,) if options.quick else (SLOW, FAST):
        with tempfile.TemporaryDirectory() as folder:
            cases += overhead(size, Path(folder))
    command = "python -P benchmarks/bench_trainer.py" + " --quick" * options.quick
    return write(options.output, "trainer_overhead", cases, command)


def overhead(size: Size, folder: Path) -> list[dict[str, Any]]:
    """One case for the reward in this process and one for it in a worker."""
    steps = size.rounds + 2  # the first is warm-up, the last is not timed: it ends the training
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        here = stack.enter_context(Scorer({"spread": spread_of_batch}))
        there = stack.enter_context(Scorer({"spread": spread}, workers=1))
        arms = {
            "stock": Stepper(stock(size, steps, folder)),
            "in this process": Stepper(ours(size, steps, folder, here)),
            "in a worker process": Stepper(ours(size, steps, folder, there)),
        }
        for arm in arms.values():
            stack.enter_context(arm)
        seconds = measure({name: arm.step for name, arm in arms.items()}, range(size.rounds + 1))
        weights = [arm.trainer.model.state_dict() for arm in arms.values()]
        refuse_other_weights(weights)
    cases = []
    for name in list(arms)[1:]:
        mine, theirs = seconds[name] * size.per_second, seconds["stock"] * size.per_second
        title = f"{size.name} ({size.width} wide, {size.layers} layers), reward {name}"
        added, interval = median(mine - theirs)
        cases.append({**case(title, mine, theirs, size.unit), "added": added, "added_ci95": interval})
    return cases


def refuse_other_weights(states: Sequence[dict[str, torch.Tensor]]) -> None:
    """Raises Disagreement unless all weights are equal bit for bit."""
    for state in states[1:]:
        for name, value in state.items():
            if not torch.equal(value, states[0][name]):
                raise Disagreement(f"the trainers end with other weights: {name}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The trainers format and print their log lines, but nobody sees them."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


# -- one step at a time ------------------------------------------------------------------------------------------------


class Stepper(TrainerCallback):
    """Holds a trainer at the beginning of a step and lets it do one more whenever asked to.

    Entering starts its training, in a thread, and brings it to its first step; leaving ends it after one more.
    """

    def __init__(self, trainer: GRPOTrainer):
        self.trainer, self.error, self.ended = trainer, None, False
        self._turn, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._random: tuple | None = None
        trainer.add_callback(self)

    def __enter__(self) -> Stepper:
        random.seed(SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        self._random = random_states()
        self._thread.start()
        self._advance()
        return self

    def __exit__(self, *_: Any) -> None:
        self.trainer.control.should_training_stop = True
        while not self.ended:
            self._advance()

    def step(self, _: int) -> list[float]:
        """One step; returns what it logged. Raises what the trainer raised."""
        self._advance()
        line = self.trainer.state.log_history[-1]
        return [line[name] for name in COMPARED]

    def _advance(self) -> None:
        set_random_states(self._random)
        self._turn.release()
        self._done.acquire()
        self._random = random_states()
        if self.error:
            raise self.error

    def _train(self) -> None:
        self._turn.acquire()
        try:
            self.trainer.train()
        except BaseException as error:
            self.error = error
        self.ended = True
        self._done.release()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._done.release()
        self._turn.acquire()


def random_states() -> tuple:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def set_random_states(states: tuple) -> None:
    for put, state in zip((random.setstate, np.random.set_state, torch.set_rng_state), states, strict=True):
        put(state)


# -- the trainers ------------------------------------------------------------------------------------------------------


def policy(size: Size) -> tuple[Any, Any]:
    tokenizer = build_tokenizer(PROMPTS, vocabulary=300)
    heads = max(1, size.width // 64)
    return build_model(tokenizer, width=size.width, layers=size.layers, heads=heads, context=256, seed=SEED), tokenizer


def stock(size: Size, steps: int, folder: Path, reward: Callable[[str], float] = spread) -> GRPOTrainer:
    """trl.GRPOTrainer as anyone would write it."""

    def spread(completions: list[str], **_: Any) -> list[float]:
        return [reward(completion) for completion in completions]

    model, tokenizer = policy(size)
    arguments = GRPOConfig(
        output_dir=str(folder / "stock"),
        max_steps=steps,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=size.prompts * size.group,
        gradient_accumulation_steps=1,
        num_generations=size.group,
        max_completion_length=size.tokens,
        loss_type="grpo",
        top_k=0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=SEED,
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=[spread],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
    )


def ours(size: Size, steps: int, folder: Path, scorer: Scorer) -> LanguageTrainer:
    model, tokenizer = policy(size)
    config = Config(
        task=None,
        rollout=LanguageRollout(
            prompts_per_step=size.prompts, group_size=size.group, max_completion_length=size.tokens
        ),
        optim=Optim(steps=steps, lr=1e-3),
        run=Run(seed=SEED),
        trainer={"gradient_checkpointing": False, "save_strategy": "no"},
    )
    return LanguageTrainer(
        model=model,
        tokenizer=tokenizer,
        rows=[{"id": str(at), "prompt": prompt} for at, prompt in enumerate(PROMPTS)],
        scorer=scorer,
        weights=[1.0],
        outcome="spread",
        recipe=RECIPES["grpo"],
        config=config,
        batch=Batch.of(config),
        output=folder / "ours",
    )


if __name__ == "__main__":
    main()
