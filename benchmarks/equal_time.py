"""What the wall seconds of reinforcement buy without it, from the same warm start: the rivals of `make results`.

more imitation of the same demonstrations
imitation of own samples that the reward accepts (of text: the right ones; of pictures: of each group the best, if good)
imitation of gold on the prompts of RL (the upper rival)
sampling more without training (of text: best by an oracle, and the most common; of pictures: the best by the reward)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from core.app import App, Row
from core.config import Config
from core.run import evaluate as ev
from core.run.actor import Actor, actor_of
from core.run.progress import Progress
from core.run.start import distance, start
from core.run.train import Setup, Split
from core.train import warmup

GOOD = 0.5  # least reward of a picture that is imitated
SCRATCH = Path("runs") / "warmup" / "sft"


@dataclass
class Bench:
    """One seed's warm start, what it is judged with, and what was found so far."""

    app: App
    config: Config
    data: Split
    judge: ev.Judge
    warm: dict[str, Any]
    start: Actor
    before: ev.Evaluation
    seconds: float
    found: dict[str, dict[str, Any]]
    progress: Progress

    @property
    def headline(self) -> str:
        return next(iter(self.app.metrics))

    def again(self) -> Actor:
        """The warm start, as it was."""
        return actor_of(self.app).load(self.app, self.config, self.warm["path"])

    def note(self, name: str, **facts: Any) -> None:
        before = self.before.mean(self.headline)
        seed = self.config.run.seed
        self.found[name] = {"name": name, "seed": seed, "before": before, "n": len(self.data.test), **facts}
        self.progress.note(f"{name}: {before:.3f} -> {facts['after']:.3f}")

    def measured(self, name: str, actor: Actor, moved: Callable, **facts: Any) -> None:
        """Takes down what an actor does on the held-out rows."""
        headline, samples = self.headline, self.config.evaluate.samples
        after = ev.evaluate(actor, self.judge, self.data.test, samples=samples)
        diff, lo, hi = ev.change(self.app, self.data.test, self.before.scores[headline], after.scores[headline])
        if samples:
            facts["sampled_before"] = float(np.nanmean(self.before.sampled[headline]))
            facts["sampled_after"] = float(np.nanmean(after.sampled[headline]))
        self.note(name, after=after.mean(headline), change=diff, ci95=[lo, hi], update_size=moved(actor.model), **facts)


@contextmanager
def bench(app: App, config: Config, seconds: float, name: str) -> Iterator[Bench]:
    """seconds: what reinforcement took."""
    with Progress(0, name) as progress, warmup.quiet():
        setup = Setup(app, config)
        data = Split(app, config, progress)
        with ev.Judge(app, config, setup.composite) as judge:
            actor, warm = start(app, config, data, judge, progress)
            before = ev.evaluate(actor, judge, data.test, samples=config.evaluate.samples)
            yield Bench(app, config, data, judge, warm, actor, before, seconds, {}, progress)


def rivals(app: App, config: Config, seconds: float, name: str) -> dict[str, dict[str, Any]]:
    """{name: summary} of everything that the module's docstring lists."""
    with bench(app, config, seconds, name) as made:
        moved = distance(made.start.model)
        text = isinstance(app.gold(made.data.test[0]), str)
        (sample_text if text else sample_pictures)(made)
        imitate = imitate_text if text else imitate_pictures
        shown = made.data.train[: config.warmup.rows]
        labels = app.demonstrations(shown, config.run.seed)
        actor = made.start
        imitate(made, actor, shown, labels, seconds)
        made.measured("more imitation of the same demonstrations", actor, moved)

        asked = made.data.train[: config.optim.steps * config.rollout.prompts_per_step]  # the prompts that RL saw
        actor, began = made.again(), time.monotonic()
        rows, completions = (accepted_text if text else accepted_pictures)(made, actor, asked)
        left = max(1.0, seconds - (time.monotonic() - began))
        if rows:
            imitate(made, actor, rows, completions, left)
        made.measured("imitation of own samples that the reward accepts", actor, moved, kept=len(rows))

        actor = made.again()
        imitate(made, actor, asked, [app.gold(row) for row in asked], seconds)
        made.measured("imitation of gold on the prompts of RL", actor, moved)
        return made.found


# -- text -----------------------------------------------------------------------------------------------------------------


def imitate_text(made: Bench, actor: Actor, rows: list[Row], labels: list[str], seconds: float) -> None:
    settings = made.config.warmup
    warmup.imitate(
        actor.model,
        actor.tokenizer,
        [row["prompt"] for row in rows],
        labels,
        batch_size=settings.batch_size,
        lr=settings.lr / 4,
        seed=made.config.run.seed + 1,
        steps=10**6,
        output=SCRATCH,
        prompt_loss=False,
        seconds=seconds,
    )


def accepted_text(made: Bench, actor: Actor, asked: list[Row]) -> tuple[list[Row], list[str]]:
    rows, completions = [], []
    k = made.judge.rewards.names.index(made.app.outcome)
    for draw in actor.draws(asked, range(len(asked)), 2):
        right = made.judge.rewards.score(draw, asked).values[:, k] >= 1
        rows += [row for row, ok in zip(asked, right, strict=True) if ok]
        completions += [text for text, ok in zip(draw, right, strict=True) if ok]
    return rows, completions


def sample_text(made: Bench) -> None:
    group = made.config.rollout.group_size
    for how, value in ev.best_of(made.start, made.judge, made.data.test, group, made.headline).items():
        made.note(f"best of {group}, {how}", after=value)


# -- pictures -------------------------------------------------------------------------------------------------------------


def imitate_pictures(made: Bench, actor: Actor, rows: list[Row], labels: list[np.ndarray], seconds: float) -> None:
    """As many steps as fit into the seconds, at the pace of the warm start and a quarter of its rate."""
    settings = made.config.warmup
    steps = max(1, round(seconds * settings.steps / made.warm["seconds"]))
    again = replace(made.config, warmup=replace(settings, steps=steps, lr=settings.lr / 4))
    replace(actor, config=again).imitate(rows, labels, SCRATCH, lambda step, metrics: None)


def rewarded(made: Bench, drawn: list[list[np.ndarray]], rows: list[Row]) -> np.ndarray:
    """(draws, rows): the weighted reward of every picture; NaN is as bad as it gets."""
    weights = np.array(made.judge.weights)
    scores = [made.judge.rewards.score(draw, rows).values[:, weights != 0] @ weights[weights != 0] for draw in drawn]
    return np.nan_to_num(np.array(scores), nan=-np.inf)


def accepted_pictures(made: Bench, actor: Actor, asked: list[Row]) -> tuple[list[Row], list[np.ndarray]]:
    drawn = actor.draws(asked, range(len(asked)), 4)
    reward = rewarded(made, drawn, asked)
    best = reward.argmax(0)
    total = sum(made.judge.weights)
    kept = [i for i in range(len(asked)) if reward[best[i], i] >= GOOD * total]
    return [asked[i] for i in kept], [drawn[best[i]][i] for i in kept]


def sample_pictures(made: Bench) -> None:
    rows, group = made.data.test, made.config.rollout.group_size
    drawn = made.start.draws(rows, range(len(rows)), group)
    best = rewarded(made, drawn, rows).argmax(0)
    chosen = [drawn[best[i]][i] for i in range(len(rows))]
    scores = ev.grade(made.judge, rows, chosen)[0][made.headline]
    diff, lo, hi = ev.change(made.app, rows, made.before.scores[made.headline], scores)
    made.note(f"best of {group} by the reward", after=float(np.nanmean(scores)), change=diff, ci95=[lo, hi])
