"""The trajectory trainer against the public flow loop on the same net, and active steps against all steps.

    python -P benchmarks/bench_flow_loop.py [--quick] [--output FOLDER]      writes results/flow_loop.json

The public loop is benchmarks/public_flow_loop.py, which lists its operations. The reference is a frozen copy on both sides
(theirs turns an adapter off, which costs the same pass). Its grid of sigmas is ours, since diffusers' default one differs;
float32 on both sides.

Ours is core.train.trajectory.TrajectoryTrainer as an app runs it: recipe flow_grpo, kernel flow, the KL in the unit of
their code, two updates a generation batch, EMA every update. "packed" trains all steps of a batch in one pass, "step by
step" (optim.micro_steps=1) one step a pass as they do, in no more memory.

Before anything is timed both learn from the same rollouts in float64, and the change of every weight over an iteration's
two updates must agree to 1e-5, or nothing is written. Then the arms take turns, iteration by iteration.

Read "ratio" (seconds ours / baseline; wanted: an interval that ends below 0.77, which is 1.3 times the iterations). "profile"
says why: rows through the net an iteration without and with gradient, and the share of the time that is spent in them.
`selection` compares noise in the first steps and a shortcut afterwards with noise in all of them; what the reward does then
is not measured here.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from bench_trainer import SEED, Stepper, quiet
from public_flow_loop import (
    CLIP,
    CLIP_NORM,
    EMA,
    LR,
    NOISE_LEVEL,
    UPDATES,
    WEIGHT_DECAY,
    PublicLoop,
    Setting,
    Size,
    condition,
)
from side_by_side import Disagreement, case, measure, write
from trainer_rewards import left_brighter

from core.batch import Batch
from core.config import Config, FlowRollout, Optim, Run
from core.objective.recipes import build
from core.policy.flow import FlowPolicy
from core.policy.tiny_flow import TinyFlow
from core.scoring import Scorer
from core.train.trajectory import TrajectoryTrainer

TOLERANCE = 1e-5


FULL = Size(width=32, levels=2, pixels=32, prompts=2, group=8, steps=10, rounds=6)
QUICK = Size(width=8, levels=1, pixels=8, prompts=1, group=2, steps=6, rounds=2)
SMALL = replace(QUICK, prompts=2, group=4)  # to compare gradients: more than one group in a batch
SETTINGS = (Setting("guidance 4.5 and KL, as published", 4.5, 0.04), Setting("no guidance, no KL", 1.0, 0.0))
ACTIVE = {"window": "first", "window_size": 4, "shortcut": 2}


def main(arguments: Sequence[str] | None = None) -> Path:
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--quick", action="store_true", help="three rounds of a tiny net: does it run, not how fast")
    parse.add_argument("--output", type=Path, default=Path("results"), help="folder of flow_loop.json")
    options = parse.parse_args(arguments)
    torch.set_num_threads(1)
    size = QUICK if options.quick else FULL
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for setting in SETTINGS:
            cases += loops(size, setting, Path(folder))
        cases.append(selection(size, ACTIVE, Path(folder)))
    command = "python -P benchmarks/bench_flow_loop.py" + " --quick" * options.quick
    return write(options.output, "flow_loop", cases, command)


def loops(size: Size, setting: Setting, folder: Path) -> list[dict[str, Any]]:
    """Ours, packed and step by step, against the public loop."""
    error = difference(SMALL, setting, folder)
    with (
        ThreadPoolExecutor(max_workers=8) as pool,
        Ours(size, setting, folder) as packed,
        Ours(size, setting, folder, micro_steps=1) as stepwise,
    ):
        public = PublicLoop(size, setting, size.net(), pool)
        arms = {"public": public.iteration, "packed": packed.iteration, "step by step": stepwise.iteration}
        seconds = measure(arms, range(size.rounds + 1))
        profiles = {name: profile(arm) for name, arm in arms.items()}
    return [
        {
            **case(f"{setting.name}: {name}", seconds[name], seconds["public"], "s/iteration"),
            "profile": {"ours": profiles[name], "baseline": profiles["public"]},
            "difference": float(f"{error:.2g}"),
        }
        for name in ("packed", "step by step")
    ]


def selection(size: Size, window: dict[str, Any], folder: Path, setting: Setting = SETTINGS[-1]) -> dict[str, Any]:
    """Noise and training in the first `window_size` steps, then `shortcut` ODE steps, against all steps; both ours."""
    with Ours(size, setting, folder, **window) as active, Ours(size, setting, folder) as full:
        arms = {"active": active.iteration, "full": full.iteration}
        seconds = measure(arms, range(size.rounds + 1))
        profiles = {name: profile(arm) for name, arm in arms.items()}
    name = f"first {window['window_size']} steps and a shortcut of {window['shortcut']}, against {size.steps} steps"
    return {
        **case(name, seconds["active"], seconds["full"], "s/iteration"),
        "profile": {"ours": profiles["active"], "baseline": profiles["full"]},
    }


# -- ours --------------------------------------------------------------------------------------------------------------


class Ours(Stepper):
    """Our trainer, an iteration at a time: a generation batch and its updates."""

    def __init__(self, size: Size, setting: Setting, folder: Path, micro_steps: int | None = None, **window: Any):
        self._open = contextlib.ExitStack()
        scorer = self._open.enter_context(Scorer({"bright": left_brighter}, workers=1))
        super().__init__(trainer(size, setting, folder, scorer, micro_steps=micro_steps, **window))

    def __enter__(self) -> Ours:
        self._open.enter_context(quiet())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        with self._open:
            super().__exit__(*error)

    def iteration(self, _: Any = None) -> int:
        for _ in range(UPDATES):
            self._advance()
        return UPDATES


def trainer(
    size: Size,
    setting: Setting,
    folder: Path,
    scorer: Scorer,
    net: nn.Module | None = None,
    micro_steps: int | None = None,
    optim: str = "adamw_torch",
    **window: Any,
) -> TrajectoryTrainer:
    rollout = FlowRollout(
        prompts_per_step=size.prompts,
        group_size=size.group,
        steps_per_batch=UPDATES,
        steps=size.steps,
        noise_level=NOISE_LEVEL,
        shared_noise=False,
        guidance=setting.guidance,
        divergence="code",
        **window,
    )
    plain = optim == "sgd"
    config = Config(
        task=None,
        rollout=rollout,
        optim=Optim(
            steps=10**6 if not plain else UPDATES,
            lr=1.0 if plain else LR,
            weight_decay=0.0 if plain else WEIGHT_DECAY,
            max_grad_norm=0.0 if plain else CLIP_NORM,
            ema=EMA,
            micro_steps=micro_steps,
        ),
        run=Run(seed=SEED),
        trainer={"optim": optim, "save_strategy": "no"},
    )
    recipe = build({"recipe": "flow_grpo", "beta": setting.beta, "epsilon_low": CLIP})
    return TrajectoryTrainer(
        policy=FlowPolicy(net or size.net(), rollout),
        condition=condition,
        rows=size.rows,
        scorer=scorer,
        weights=[1.0],
        outcome="bright",
        recipe=recipe,
        config=config,
        batch=Batch.of(config),
        output=folder,
    )


# -- the same mathematics ----------------------------------------------------------------------------------------------


def difference(size: Size, setting: Setting, folder: Path) -> float:
    """Between the changes of all weights that both sides make from the same rollouts, as a share of the change.

    Both do an iteration's two updates in float64, by bare gradient descent. Raises Disagreement above TOLERANCE.
    """
    nets = {"ours": size.net(double=True), "public": size.net(double=True)}
    before = {name: p.detach().clone() for name, p in nets["ours"].named_parameters()}
    sampled: list[Any] = []
    with quiet(), Scorer({"bright": left_brighter}, workers=1) as scorer:
        made = trainer(size, setting, folder, scorer, net=nets["ours"], optim="sgd")
        rollout = made.policy.rollout
        made.policy.rollout = lambda *args, **options: kept(rollout(*args, **options), sampled)
        made.train()
    public = PublicLoop(size, setting, nets["public"], plain=True)
    public.learn(public.credited(as_samples(size, public, *sampled)), shuffle=False)
    changes = {
        side: torch.cat([(p.detach() - before[name]).flatten() for name, p in net.named_parameters()])
        for side, net in nets.items()
    }
    error = float((changes["ours"] - changes["public"]).norm() / changes["public"].norm())
    if not error < TOLERANCE:
        raise Disagreement(
            f"{setting.name}: the weights' changes differ by {error:.2g} of their norm, more than {TOLERANCE}"
        )
    return error


def kept(trajectory: Any, sampled: list[Any]) -> Any:
    sampled.append(replace(trajectory, outputs=list(trajectory.outputs)))  # the trainer forgets them once it has scored
    return trajectory


def as_samples(size: Size, public: PublicLoop, trajectory: Any) -> dict[str, Any]:
    """Our rollouts in their layout. Their last step is sampled and not trained; here it is an ODE step, so it is left blank."""
    x, logps = trajectory.state["x"], trajectory.logps
    count = len(logps)
    return {
        "prompts": [f"group {i // size.group}" for i in range(count)],
        "given": {
            name.removeprefix("condition/"): part
            for name, part in trajectory.state.items()
            if name.startswith("condition/")
        },
        "timesteps": public.scheduler.timesteps.repeat(count, 1),
        "latents": x,
        "next_latents": torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1),
        "logps": torch.cat([logps, torch.zeros_like(logps[:, :1])], dim=1),
        "rewards": torch.tensor(left_brighter(trajectory.outputs)),
    }


# -- why: where the time goes ------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """What passes through nets while it is watched. Rows are counted once for each pass."""

    rows: dict[str, int] = field(default_factory=lambda: {"without_gradient": 0, "with_gradient": 0})
    seconds: float = 0.0

    def __call__(self, work: Callable, counts: bool) -> Callable:
        def watched(net: Any, x: Any = None, *rest: Any, **options: Any) -> Any:
            if counts:
                self.rows["with_gradient" if torch.is_grad_enabled() else "without_gradient"] += len(x)
            began = time.perf_counter()
            try:
                return work(net, x, *rest, **options)
            finally:
                self.seconds += time.perf_counter() - began

        return watched


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Counts and times TinyFlow's forward passes and all backward passes."""
    watch, forward, backward = Watch(), TinyFlow.velocity, Tensor.backward
    TinyFlow.velocity, Tensor.backward = watch(forward, counts=True), watch(backward, counts=False)
    try:
        yield watch
    finally:
        TinyFlow.velocity, Tensor.backward = forward, backward


def profile(iteration: Callable[[], int]) -> dict[str, Any]:
    """Of one more iteration: rows through the net, and the share of time in its forward and backward passes."""
    with watching() as watch:
        began = time.perf_counter()
        iteration()
        whole = time.perf_counter() - began
    return {"rows": watch.rows, "share_in_net": round(watch.seconds / whole, 3)}


if __name__ == "__main__":
    main()
