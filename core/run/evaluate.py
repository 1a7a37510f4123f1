"""Evaluation of a policy on held-out rows: the benchmark's own scorers on its one answer a row, and on sampled ones.

The metrics run in the same workers as the rewards. The headline metric is another function than the outcome (other
metrics may be the rewards): a reward that is wrong does not grade itself. A row that could not be judged is NaN, is
counted, and is left out of means and of paired comparisons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from core import ranks
from core.app import App, Completion, Row
from core.cache import Cache
from core.config import Config
from core.pool import Limits, Pool
from core.run.actor import Actor
from core.run.statistics import bootstrap_mean, paired_bootstrap
from core.scoring import Scorer


@dataclass(frozen=True)
class Evaluation:
    """Completions of N rows and what the scorers said.

    scores: {metric: (N,)} of the completions; sampled: {metric: (N,)}, the mean over the samples of a row; empty if none
    were drawn. rewards: {component: (N,)} of the completions. reasons: per row {metric: reason code}.
    """

    completions: list[Completion]
    truncated: list[bool]
    scores: dict[str, np.ndarray]
    reasons: list[dict[str, str]]
    sampled: dict[str, np.ndarray]
    rewards: dict[str, np.ndarray]

    def mean(self, name: str) -> float:
        return float(np.nanmean(self.scores[name]))

    @property
    def unscored(self) -> int:
        return int(np.isnan(next(iter(self.scores.values()))).sum())


class Judge:
    """The app's metrics and rewards behind one pool of workers and one cache, for they share functions; a context manager."""

    def __init__(self, app: App, config: Config, composite: dict[str, tuple[float, Any]]):
        settings = config.rewards
        limits = Limits(
            workers=max(1, settings.workers // ranks.local_count()),
            timeout_s=settings.timeout_s,
            memory_mb=settings.memory_mb,
            max_concurrent=settings.max_concurrent,
        )
        shared = {"pool": Pool(limits), "cache": Cache(settings.cache_mb)}
        shared["max_failure_share"] = settings.max_failure_share
        self.metrics = Scorer(dict(app.metrics), **shared)
        self.rewards = Scorer({name: reward for name, (_, reward) in composite.items()}, **shared)
        self.weights = [weight for weight, _ in composite.values()]

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.metrics.close()
        self.rewards.close()


def grade(
    judge: Judge, rows: Sequence[Row], completions: Sequence[Completion]
) -> tuple[dict[str, np.ndarray], list[dict[str, str]]]:
    """{metric: (N,)} and the reasons, in the order of the rows."""
    scores = judge.metrics.score(list(completions), list(rows))
    return {name: scores.values[:, k] for k, name in enumerate(judge.metrics.names)}, scores.reasons


def yes_or_no(values: np.ndarray) -> bool:
    """Whether a metric's values are all 0 or 1 (or could not be judged): then 1 is right, and a mean is a share."""
    return bool((np.isnan(values) | (values == 0) | (values == 1)).all())


def evaluate(
    actor: Actor, judge: Judge, rows: Sequence[Row], *, samples: int = 0, with_rewards: bool = False
) -> Evaluation:
    """The completion of every row, graded; and `samples` sampled ones a row.

    The ranks of a run share the rows; each comes back with the whole evaluation.
    """
    total, places = len(rows), ranks.share(len(rows))
    rows = [rows[i] for i in places]

    def whole(part) -> list:
        return ranks.gather(part)[:total]

    sampled: dict[str, np.ndarray] = {}
    rewards: dict[str, np.ndarray] = {}
    with ranks.together():
        completions, truncated = actor.complete(rows, places)
        scores, reasons = grade(judge, rows, completions)
        if samples:
            drawn = [grade(judge, rows, draw)[0] for draw in actor.draws(rows, places, samples)]
            sampled = {name: np.mean([d[name] for d in drawn], axis=0) for name in scores}
        if with_rewards:
            values = judge.rewards.score(completions, list(rows)).values
            rewards = {name: values[:, k] for k, name in enumerate(judge.rewards.names)}
    arrays = ({name: np.array(whole(values)) for name, values in part.items()} for part in (scores, sampled, rewards))
    scores, sampled, rewards = arrays
    return Evaluation(whole(completions), whole(truncated), scores, whole(reasons), sampled, rewards)


def best_of(actor: Actor, judge: Judge, rows: Sequence[Row], count: int, headline: str) -> dict[str, float]:
    """ "Just sample more": of `count` texts a row, the share with a right one (an oracle picks), and the most common one's."""
    drawn = actor.draws(rows, range(len(rows)), count)
    graded = np.array([grade(judge, rows, draw)[0][headline] for draw in drawn])  # (count, N)
    common = [Counter(d[i] for d in drawn).most_common(1)[0][0] for i in range(len(rows))]
    voted = grade(judge, rows, common)[0][headline]
    return {"oracle": float(np.nanmean(np.nanmax(graded, axis=0))), "most_common": float(np.nanmean(voted))}


def clusters(app: App, rows: Sequence[Row]) -> list[str] | None:
    return [str(row[app.cluster]) for row in rows] if app.cluster else None


def interval(app: App, rows: Sequence[Row], values: np.ndarray) -> tuple[float, float, float]:
    """Mean with its 95 % interval, resampling the app's clusters."""
    return bootstrap_mean(values, clusters(app, rows))


def change(app: App, rows: Sequence[Row], before: np.ndarray, after: np.ndarray) -> tuple[float, float, float]:
    """Mean change with its 95 % paired interval, resampling the app's clusters."""
    return paired_bootstrap(before, after, clusters(app, rows))
