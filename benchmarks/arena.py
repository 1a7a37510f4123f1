"""The recipe arena: one task with a known optimum, every recipe of core.objective.recipes at equal rollouts and updates.

    python -P benchmarks/arena.py [--jobs 2] [--seeds 0 1 2 3 4] [--recipes dapo gspo] [--quick] [--output FOLDER]

Writes results/arena.json and results/arena.svg. The task and its exact measure are in arena_task.py. All recipes get the same
warm start of a seed, prompts in the same order, rewards, batch, number of updates and learning rate; one that samples more
than it trains on shows so in `rollouts`. A generation batch serves two updates, so that in the second one ratios leave 1 and
what acts off-policy can act. A recipe that the trainer refuses is listed with the refusal.

The rate was chosen once, on plain grpo with seed 100, which is not reported (end .735 at 5e-4, .783 at 1e-3, .737 at 2e-3); two
seeds at half and twice the rate tell a recipe's effect from the rate's. What the figures mean is in arena_report.py.

A finished run is one JSON file in runs/arena/<hash of settings>/. A stopped call goes on there; other settings or other
options of a recipe start its runs anew. A change of code does not: delete a recipe's files after one.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import contextlib
import gc
import json
import math
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

sys.path.insert(0, str(Path(__file__).parent))  # `-P` leaves it out

import arena_task as task
from arena_report import CONTROL, GROUP, REFERENCE, draw, show, summarise

from core import config as configs
from core.batch import Batch
from core.config import Config, ConfigError, LanguageRollout, Model, Optim
from core.objective.composition import Recipe
from core.objective.recipes import RECIPES
from core.policy import language
from core.policy.tiny import build_model
from core.run.folder import RunFolder, make_folder
from core.run.summary import git_revision
from core.scoring import Scorer
from core.train.language import LanguageTrainer
from core.train.warmup import cache_key, imitate, quiet

REWARDS = {"exact": task.exact, "digits": task.digits, "answer": task.identity}
OPTIONS: dict[str, dict[str, Any]] = {  # what a recipe must be told of this task
    "safety_gated": {"gate": "digits"},
    "dagrpo": {"quality": "digits"},
    "seed_grpo": {"answers": "answer"},
}
SEEDS = [0, 1, 2, 3, 4]
SMALL_GROUPS = ("grpo", "mc_grpo", "ngrpo")  # grpo, and those that claim to do well with few rollouts a prompt


@dataclass(frozen=True)
class Settings:
    """What decides a run beside recipe, group size, seed and rate. rollouts: prompts x group size of one update."""

    width: int = 48
    layers: int = 2
    heads: int = 4
    warm_steps: int = 1000
    warm_batch: int = 128
    warm_lr: float = 5e-3
    labels: int = 8  # a training prompt
    rollouts: int = 128
    steps_per_batch: int = 2
    steps: int = 120
    lr: float = 1e-3
    weights: tuple[float, ...] = (1.0, 0.2, 0.0)  # of REWARDS
    evaluations: int = 5
    right_labels: tuple[float, ...] = task.RIGHT
    forgotten_carries: float = task.FORGETS


QUICK = Settings(width=16, labels=1, warm_steps=20, rollouts=16, steps=4, evaluations=2)


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
    parse.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parse.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES), metavar="RECIPE")
    parse.add_argument("--quick", action="store_true", help="a few steps of two recipes: does it run, not who wins")
    parse.add_argument("--output", type=Path, default=Path("results"), help="folder of arena.json and arena.svg")
    parse.add_argument("--work", type=Path, default=Path("runs/arena"), help="folder of warm starts and finished runs")
    options = parse.parse_args(arguments)
    settings, sizes, rates = Settings(), (2, 4, 16), (0.5, 2.0)
    if options.quick:
        settings, sizes, rates = QUICK, (2,), ()
        options.seeds, options.recipes = [0, 1], ["grpo", "dapo"]
    if len(set(options.seeds)) < 2:
        parse.error("an interval needs two seeds or more")
    recipes = list(dict.fromkeys([REFERENCE, *options.recipes]))
    runs = planned(recipes, options.seeds, sizes, rates)
    results, refused = perform(runs, settings, options.work, options.jobs)
    summary = summarise(results, refused) | {
        "settings": asdict(settings),
        "cpu_seconds": cpu_seconds(results, settings, options.work),
        "command": command(options),
        "git": git_revision(),
    }
    path = RunFolder(options.output).write_json("arena.json", summary)
    draw(summary, options.output / "arena.svg")
    show(summary)
    return path


def command(options: argparse.Namespace) -> str:
    """What makes the same numbers again: without the folders and the number of processes, which decide none of them."""
    words = ["python -P benchmarks/arena.py"] + ["--quick"] * options.quick
    if not options.quick:
        words += [f"--seeds {' '.join(map(str, options.seeds))}"] * (options.seeds != SEEDS)
        words += [f"--recipes {' '.join(options.recipes)}"] * (options.recipes != list(RECIPES))
    return " ".join(words)


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
    return Batch.of(config, extra_rollouts=recipe.extra_rollouts)


def warm_start(seed: int, settings: Settings, work: Path) -> Path:
    """The folder of the policy that all runs of a seed start from; made once."""
    wanted = asdict(settings)
    kept = {name: wanted[name] for name in ("width", "layers", "heads", "labels", "right_labels", "forgotten_carries")}
    kept |= {name: wanted[name] for name in wanted if name.startswith("warm_")}

    @quiet()
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


def cpu_seconds(results: Sequence[dict], settings: Settings, work: Path) -> float:
    """Of all runs and their warm starts, whenever they were made."""
    starts = [warm_start(seed, settings, work) / "warmup.json" for seed in {result["seed"] for result in results}]
    return sum(one["cpu_seconds"] for one in [*results, *(json.loads(path.read_text()) for path in starts)])


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


@quiet()
def train(run: Run, settings: Settings, work: Path) -> dict[str, Any]:
    """Trains and measures; {"refused": why} if the trainer refuses the recipe."""
    wall, cpu = time.monotonic(), time.process_time()
    recipe, rows = composed(run.recipe), task.problems()
    model, tokenizer = language.load(Model(), warm_start(run.seed, settings, work))
    held_out = torch.tensor([row["held_out"] for row in rows], device=model.device)

    def measure() -> dict[str, float]:
        answers = task.right_answers(model, tokenizer, rows)
        p, greedy = answers.logps.exp(), answers.greedy.float()
        values = {"accuracy": p, "held_out": p[held_out], "greedy": greedy, "greedy_held_out": greedy[held_out]}
        return {name: float(value.mean()) for name, value in (values | {"entropy": answers.entropy}).items()}

    config = Config(
        task=None,
        rollout=LanguageRollout(
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
    scorer = CountingScorer(REWARDS)
    with tempfile.TemporaryDirectory() as scratch, scorer:
        try:
            trainer = LanguageTrainer(
                model=model,
                tokenizer=tokenizer,
                rows=[row for row in rows if not row["held_out"]],
                scorer=scorer,
                weights=settings.weights,
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


def written(recipe: Recipe) -> dict[str, Any]:
    """The recipe's options as JSON has them."""
    return {name: str(value) if value in (math.inf, -math.inf) else value for name, value in recipe.options.items()}


def perform(runs: Sequence[Run], settings: Settings, work: Path, jobs: int) -> tuple[list[dict], dict[str, str]]:
    """What `train` says of all runs, those that are on disk from there; and {recipe: why the trainer refuses it}."""
    folder = RunFolder(work / cache_key(asdict(settings)))
    options = {run.recipe: written(composed(run.recipe)) for run in runs}
    found: dict[Run, dict] = {}
    for run in runs:
        path = folder.path / f"{run.name}.json"
        if path.exists() and (result := json.loads(path.read_text()))["options"] == options[run.recipe]:
            found[run] = result
    refused: dict[str, str] = {}
    failed: dict[str, Exception] = {}
    todo = [run for run in runs if run not in found]
    with workers(jobs) as each:
        for call, made in each(warm_start, [(seed, settings, work) for seed in sorted({run.seed for run in todo})]):
            made()
            print(f"warm start of seed {call[0]}", flush=True)
        for (run, *_), trained in each(train, [(run, settings, work) for run in todo]):
            try:
                result = trained()
            except Exception as error:  # the other runs are worth keeping
                failed[run.name] = error
                print(f"{run.name} failed: {error}", flush=True)
                continue
            if "refused" in result:
                refused[run.recipe] = result["refused"]
                continue
            folder.write_json(f"{run.name}.json", result)
            found[run] = result
            first, last = result["start"]["accuracy"], result["points"][-1]["accuracy"]
            print(
                f"{len(found)}/{len(runs)} {run.name}: {first:.3f} -> {last:.3f}, {result['seconds']:.1f} s", flush=True
            )
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}; the other runs are kept") from next(iter(failed.values()))
    return [found[run] for run in runs if run in found], refused


Each = Callable[[Callable, Sequence[tuple]], Iterator[tuple[tuple, Callable[[], Any]]]]


@contextlib.contextmanager
def workers(jobs: int) -> Iterator[Each]:
    """Gives each(function, calls) -> (call, its answer as a function that may raise), as they are done.

    One job is done in this process.
    """
    if jobs == 1:
        one_thread()
        yield lambda function, calls: ((call, partial(function, *call)) for call in calls)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), one_thread) as pool:

        def each(function: Callable, calls: Sequence[tuple]) -> Iterator[tuple[tuple, Callable[[], Any]]]:
            futures = {pool.submit(function, *call): call for call in calls}
            return ((futures[future], future.result) for future in as_completed(futures))

        yield each


def one_thread() -> None:
    torch.set_num_threads(1)
    gc.freeze()  # Trainer.train collects garbage twice, which takes 0.2 s over everything that was imported
    if parent := multiprocessing.parent_process():  # a killed parent cannot tell its workers to end
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


if __name__ == "__main__":
    main()
