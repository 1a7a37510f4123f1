"""The recipe arena: one task with a known optimum, every recipe of core.objective.recipes at equal rollouts and updates.

    python -P benchmarks/arena.py [--jobs 2] [--seeds 0 1 2 3 4] [--recipes dapo gspo] [--quick] [--output FOLDER]

Writes results/arena.json and results/arena.svg. The task and its exact measure are in arena_task.py. All recipes get the same
warm start of a seed, prompts in the same order, rewards, batch, number of updates and learning rate; one that samples more
than it trains on shows so in `rollouts`. A generation batch serves two updates, so that in the second one ratios leave 1 and
what acts off-policy can act. A recipe that the trainer refuses is listed with the refusal.

The rate was chosen once, on plain grpo with a seed that is not reported; the same runs at other rates tell a recipe's effect
from the rate's. Differences to grpo are paired by seed, which fixes start and prompts. Intervals are Student's t: a bootstrap
over five seeds is much too narrow. They are one at a time; `holm` is the verdict that holds for all recipes together.

A finished run is one JSON file in runs/arena/<hash of settings>/. A stopped call goes on there; other settings or other
options of a recipe start its runs anew. A change of code does not: delete a recipe's files after one.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import gc
import json
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback

sys.path.insert(0, str(Path(__file__).parent))  # `-P` leaves it out

import arena_task as task

from core import config as configs
from core.config import Batch, Config, ConfigError, Model, Optim, Rollout
from core.objective.composition import Recipe
from core.objective.recipes import RECIPES
from core.policy import language
from core.policy.tiny import build_model
from core.run.folder import RunFolder, make_folder
from core.run.summary import git_revision
from core.scoring import Scorer
from core.train.language import LanguageTrainer
from core.train.warmup import cache_key, imitate, quiet

REFERENCE, CONTROL = "grpo", "shuffled_advantages"
REWARDS = {"exact": (1.0, task.exact), "digits": (0.2, task.digits), "answer": (0.0, task.identity)}
OPTIONS: dict[str, dict[str, Any]] = {  # what a recipe must be told of this task
    "safety_gated": {"gate": "digits"},
    "dagrpo": {"quality": "digits"},
    "seed_grpo": {"answers": "answer"},
}
SMALL_GROUPS = ("grpo", "mc_grpo", "ngrpo")  # grpo, and those that claim to do well with few rollouts a prompt
GROUP = 8


@dataclass(frozen=True)
class Settings:
    """What decides a run beside recipe, group size, seed and rate. rollouts: prompts x group size of one update."""

    width: int = 48
    layers: int = 2
    heads: int = 4
    warm_steps: int = 600
    warm_batch: int = 128
    warm_lr: float = 5e-3
    labels: int = 8  # a training prompt
    rollouts: int = 64
    steps_per_batch: int = 2
    steps: int = 100
    lr: float = 1e-3
    evaluations: int = 5
    right_labels: tuple[float, ...] = task.RIGHT
    forgotten_carries: float = task.FORGETS


@dataclass(frozen=True)
class Run:
    """One training; rate multiplies the learning rate."""

    recipe: str
    seed: int
    group: int = GROUP
    control: str = "none"
    rate: float = 1.0

    @property
    def name(self) -> str:
        control = "" if self.control == "none" else f"-{self.control}"
        rate = "" if self.rate == 1 else f"-rate{self.rate:g}"
        return f"{self.recipe}{control}-G{self.group}{rate}-s{self.seed}"


def main(arguments: Sequence[str] | None = None) -> Path:
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--jobs", type=int, default=2, help="processes, one torch thread each")
    parse.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parse.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES), metavar="RECIPE")
    parse.add_argument("--quick", action="store_true", help="a few steps of two recipes: does it run, not who wins")
    parse.add_argument("--output", type=Path, default=Path("results"), help="folder of arena.json and arena.svg")
    parse.add_argument("--work", type=Path, default=Path("runs/arena"), help="folder of warm starts and finished runs")
    options = parse.parse_args(arguments)
    settings, sizes, rates = Settings(), (2, 4, 16), (0.5, 2.0)
    if options.quick:
        settings, sizes, rates = Settings(warm_steps=10, rollouts=16, steps=4, evaluations=2), (2,), (2.0,)
        options.seeds, options.recipes = [0, 1], ["grpo", "dapo"]
    recipes = list(dict.fromkeys([REFERENCE, *options.recipes]))
    runs = planned(recipes, options.seeds, sizes, rates)
    results = perform(runs, settings, options.work, options.jobs)
    command = "python -P benchmarks/arena.py " + " ".join(sys.argv[1:] if arguments is None else arguments)
    return write(options.output, summarise(results, recipes, settings, options.work), command)


def planned(recipes: Sequence[str], seeds: Sequence[int], sizes: Sequence[int], rates: Sequence[float]) -> list[Run]:
    """Every run, seed by seed; other rates on the first two seeds only."""
    runs = []
    for i, seed in enumerate(seeds):
        runs += [Run(recipe, seed) for recipe in recipes]
        runs += [Run(REFERENCE, seed, control=CONTROL)]
        runs += [Run(recipe, seed, group=size) for recipe in recipes if recipe in SMALL_GROUPS for size in sizes]
        runs += [Run(recipe, seed, rate=rate) for recipe in recipes for rate in rates if i < 2]
    return runs


# -- one run -----------------------------------------------------------------------------------------------------------


def composed(name: str) -> Recipe:
    return RECIPES[name](**OPTIONS.get(name, {}))


def derived(config: Config, recipe: Recipe) -> Batch:
    return configs.batch(config, extra_rollouts=recipe.extra_rollouts)


def warm_start(seed: int, settings: Settings, work: Path) -> Path:
    """The folder of the policy that all runs of a seed start from; made once."""
    wanted = asdict(settings)
    kept = {name: wanted[name] for name in ("width", "layers", "heads", "labels", "right_labels", "forgotten_carries")}
    kept |= {name: wanted[name] for name in wanted if name.startswith("warm_")}

    def make(folder: Path) -> None:
        began, tokenizer = time.process_time(), task.build_tokenizer()
        model = build_model(
            tokenizer, width=settings.width, layers=settings.layers, heads=settings.heads, context=32, seed=seed
        )
        prompts, completions = task.demonstrations(seed, settings.labels)
        with tempfile.TemporaryDirectory() as scratch:
            imitate(
                model,
                tokenizer,
                prompts,
                completions,
                steps=settings.warm_steps,
                batch_size=settings.warm_batch,
                lr=settings.warm_lr,
                seed=seed,
                output=Path(scratch),
            )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        RunFolder(folder).write_json("warmup.json", {"cpu_seconds": time.process_time() - began})

    folder = work / f"warm-{cache_key(kept, seed)}-s{seed}"
    make_folder(folder, make, print)
    return folder


class CountingScorer(Scorer):
    """Counts the rollouts that were sampled, those that a recipe does not train on included."""

    sampled = 0

    def score(self, completions, rows, group_size=1):
        self.sampled += len(completions)
        return super().score(completions, rows, group_size)


class Curve(TrainerCallback):
    """Measures the policy at equal distances; the last one is the end."""

    def __init__(self, steps: int, evaluations: int, measure: Callable[[], dict[str, float]]):
        self.at = {round(steps * (i + 1) / evaluations) for i in range(evaluations)}
        self.measure, self.points = measure, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.at:
            self.points.append(self.measure())


def train(run: Run, settings: Settings, work: Path) -> dict[str, Any]:
    """Trains and measures; {"refused": why} if the trainer refuses the recipe."""
    wall, cpu = time.monotonic(), time.process_time()
    recipe, rows = composed(run.recipe), task.problems()
    model, tokenizer = language.load(Model(), warm_start(run.seed, settings, work))
    held_out = torch.tensor([row["held_out"] for row in rows])

    def measure() -> dict[str, float]:
        answers = task.right_answers(model, tokenizer, rows)
        p, greedy = answers.logps.exp(), answers.greedy.float()
        values = {"accuracy": p, "held_out": p[held_out], "greedy": greedy, "greedy_held_out": greedy[held_out]}
        return {name: float(value.mean()) for name, value in (values | {"entropy": answers.entropy}).items()}

    config = Config(
        task=None,
        rollout=Rollout(
            prompts_per_step=settings.rollouts // run.group,
            group_size=run.group,
            steps_per_batch=settings.steps_per_batch,
            max_completion_length=task.LONGEST,
        ),
        optim=Optim(steps=settings.steps, lr=settings.lr * run.rate),
        run=configs.Run(seed=run.seed, control=run.control),
        trainer={"gradient_checkpointing": False, "save_strategy": "no"},
    )
    batch, curve = derived(config, recipe), Curve(settings.steps, settings.evaluations, measure)
    scorer = CountingScorer({name: reward for name, (_, reward) in REWARDS.items()})
    with tempfile.TemporaryDirectory() as scratch, scorer, quiet():
        try:
            trainer = LanguageTrainer(
                model=model,
                tokenizer=tokenizer,
                rows=[row for row in rows if not row["held_out"]],
                scorer=scorer,
                weights=[weight for weight, _ in REWARDS.values()],
                outcome="exact",
                recipe=recipe,
                config=config,
                batch=batch,
                output=Path(scratch),
                callbacks=[curve],
            )
        except ConfigError as error:
            return {"refused": str(error)}
        trainer.remove_callback(PrinterCallback)
        start = measure()
        torch.manual_seed(run.seed)
        trainer.train()
    return {
        **asdict(run),
        "options": written(recipe),
        "start": start,
        "points": curve.points,
        "rollouts": scorer.sampled,
        "seconds": time.monotonic() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "git": git_revision(),
    }
