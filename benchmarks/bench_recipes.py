"""What the objective itself costs: its share of a training step, for every recipe that trains language models.

    python -P benchmarks/bench_recipes.py [--quick] [--output FOLDER]      writes results/recipe_cost.json

The offline default's policy (0.5M parameters, 8 prompts x 8 completions of at most 48 tokens, two passes over a batch) and
two rewards in this process. Of every step are timed: `credit` on the whole batch, without what it asks of the model, and
`loss` with its backward pass down to the log-probabilities, on a copy of each micro-batch whose time is taken off the step.
"ratio" is their sum over the rest of the step: the wanted interval ends below 0.02. "asked" is the share of a step that
passes through the model take which only this recipe wants.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parent))

from bench_trainer import PROMPTS, quiet
from side_by_side import case, median, write
from trainer_rewards import fine_of_batch, right_of_batch

from core.batch import Batch
from core.config import Config, LanguageRollout, Optim, Run
from core.objective.recipes import RECIPES
from core.policy.tiny import build_model, build_tokenizer
from core.scoring import Scorer
from core.train.arguments import PROVIDES
from core.train.language import LanguageTrainer

COMPONENTS = {"gate": "fine", "quality": "fine", "answers": "fine"}


@dataclass
class Clock:
    """Seconds of the step at hand: in the objective, asked of the model, and spent on measuring."""

    objective: float = 0.0
    asked: float = 0.0
    measuring: float = 0.0
    steps: list[tuple[float, float, float]] = field(default_factory=list)

    @contextlib.contextmanager
    def adds(self, to: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, to, getattr(self, to) + time.perf_counter() - start)


class Timed:
    """A recipe whose credit and loss are timed; everything else is the recipe's."""

    def __init__(self, recipe: Any, clock: Clock):
        self.recipe, self.clock = recipe, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self.recipe, name)

    def credit(self, group: Any) -> Any:
        before = self.clock.asked
        group.model = TimedModel(group.model, self.clock)
        with self.clock.adds("objective"):
            credit = self.recipe.credit(group)
        self.clock.objective -= self.clock.asked - before
        return credit

    def loss(self, rows: Any) -> Any:
        with self.clock.adds("measuring"):
            copy = replace(
                rows,
                logps=rows.logps.detach().requires_grad_(),
                extras={name: value.detach() for name, value in rows.extras.items()},
            )
            with self.clock.adds("objective"):
                loss = self.recipe.loss(copy)
                (loss.sum / loss.count).backward()
        return self.recipe.loss(rows)


class TimedModel:
    """What a recipe asks of the model, timed."""

    def __init__(self, model: Any, clock: Clock):
        self.model, self.clock = model, clock

    def __getattr__(self, name: str) -> Callable:
        def ask(*arguments: Any) -> Any:
            with self.clock.adds("asked"):
                return getattr(self.model, name)(*arguments)

        return ask


class EachStep(TrainerCallback):
    def __init__(self, clock: Clock):
        self.clock, self.began = clock, 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()
        self.clock.objective = self.clock.asked = self.clock.measuring = 0.0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        clock = self.clock
        clock.steps.append((clock.objective, clock.asked, time.perf_counter() - self.began - clock.measuring))


def main(arguments: Sequence[str] | None = None) -> Path:
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--quick", action="store_true", help="two recipes, a few steps: does it run, not what it costs")
    parse.add_argument("--output", type=Path, default=Path("results"), help="folder of recipe_cost.json")
    options = parse.parse_args(arguments)
    torch.set_num_threads(1)
    names = [name for name, recipe in RECIPES.items() if recipe.all_needs <= PROVIDES]
    cases = [cost(name, 6 if options.quick else 24) for name in (names[:2] if options.quick else names)]
    command = "python -P benchmarks/bench_recipes.py" + " --quick" * options.quick
    return write(options.output, "recipe_cost", cases, command)


def cost(name: str, steps: int) -> dict[str, Any]:
    """The case of one recipe. The first two steps are warm-up; steps come in pairs, of which the first samples."""
    recipe = RECIPES[name]
    recipe = recipe(**{option: part for option, part in COMPONENTS.items() if option in recipe.options})
    config = Config(
        task=None,
        rollout=LanguageRollout(prompts_per_step=8, group_size=8, max_completion_length=48, iterations=2),
        optim=Optim(steps=steps, lr=1e-4),
        run=Run(seed=0),
        trainer={"gradient_checkpointing": False, "save_strategy": "no"},
    )
    tokenizer, clock = build_tokenizer(PROMPTS, vocabulary=1024), Clock()
    with (
        quiet(),
        tempfile.TemporaryDirectory() as folder,
        Scorer({"right": right_of_batch, "fine": fine_of_batch}) as scorer,
    ):
        trainer = LanguageTrainer(
            model=build_model(tokenizer, width=128, layers=2, heads=4, context=256, seed=0),
            tokenizer=tokenizer,
            rows=[{"id": str(at), "prompt": prompt} for at, prompt in enumerate(PROMPTS)],
            scorer=scorer,
            weights=[1.0, 0.5],
            outcome="right",
            recipe=recipe,
            config=config,
            batch=Batch.of(config, extra_rollouts=recipe.extra_rollouts),
            output=Path(folder),
            callbacks=[EachStep(clock)],
        )
        trainer.recipe = Timed(recipe, clock)
        trainer.train()
    objective, asked, step = np.array(clock.steps[2:]).reshape(-1, 2, 3).sum(axis=1).T
    share, interval = median(asked / step)
    return {**case(name, objective * 500, step * 500, "ms/step"), "asked": share, "asked_ci95": interval}


if __name__ == "__main__":
    main()
