"""Evaluation of a policy on held-out rows: the benchmark's own scorers on its one answer a row, and on sampled ones.

The metrics run in the same workers as the rewards. The headline metric is another function than the outcome (other
metrics may be the rewards): a reward that is wrong does not grade itself. A row that could not be judged is NaN, is
counted, and is left out of means and of paired comparisons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from core import ranks
from core.app import App, Completion, Row
from core.cache import Cache
from core.config import Config
from core.policy.trajectory import slices
from core.pool import Limits, Pool
from core.run import statistics
from core.run.actor import Actor
from core.scoring import Scorer

Weights = dict[str, np.ndarray]  # {name: (N,)}, how many cases a value is the mean of: 0 = none, NaN = not scored


class Graded(NamedTuple):
    """scores: {metric: (N,)}. reasons: per row {metric: reason code}. weights: of the scores."""

    scores: dict[str, np.ndarray]
    reasons: list[dict[str, str]]
    weights: Weights


@dataclass(frozen=True)
class Evaluation:
    """Completions of N rows and what the scorers said.

    scores: {metric: (N,)} of the completions; sampled: {metric: (N,)}, the mean over the samples of a row; empty if none
    were drawn. rewards: {component: (N,)} of the completions. reasons: per row {metric: reason code}.
    weights: {"scores", "sampled", "rewards": Weights}.
    """

    completions: Sequence[Completion]
    truncated: list[bool]
    scores: dict[str, np.ndarray]
    reasons: list[dict[str, str]]
    sampled: dict[str, np.ndarray]
    rewards: dict[str, np.ndarray]
    weights: dict[str, Weights]

    def mean(self, name: str) -> float:
        return mean(self.scores[name], self.weights["scores"][name])

    @property
    def unscored(self) -> int:
        return int(np.isnan(next(iter(self.weights["scores"].values()))).sum())


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
        self.at_once = config.evaluate.batch_size

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.metrics.close()
        self.rewards.close()


def grade(judge: Judge, rows: Sequence[Row], completions: Sequence[Completion]) -> Graded:
    """What the metrics say, in the order of the rows."""
    return score(judge, judge.metrics, rows, completions)


def score(judge: Judge, scorer: Scorer, rows: Sequence[Row], completions: Sequence[Completion]) -> Graded:
    """Completions that are no list do not fit in memory together: a few are scored at a time."""
    size = len(rows) if isinstance(completions, list) else judge.at_once
    made = [scorer.score(list(completions[part]), list(rows[part])) for part in slices(len(rows), size)]
    failed = np.concatenate([part.failed for part in made])
    values = np.concatenate([part.values for part in made])
    weights = np.where(failed[:, None], np.nan, np.concatenate([part.weights for part in made]))
    names = dict(enumerate(scorer.names))
    return Graded(
        {name: values[:, k] for k, name in names.items()},
        [reasons for part in made for reasons in part.reasons],
        {name: weights[:, k] for k, name in names.items()},
    )


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

    with ranks.together():
        completions, truncated = actor.complete(rows, places)
        scores, reasons, weights = grade(judge, rows, completions)
        sampled = _over_draws([grade(judge, rows, draw) for draw in actor.draws(rows, places, samples)])
        rewards = score(judge, judge.rewards, rows, completions) if with_rewards else Graded({}, [], {})
    found = (scores, sampled.scores, rewards.scores, weights, sampled.weights, rewards.weights)
    scores, sampled, rewards, *weights = ({name: np.array(whole(v)) for name, v in part.items()} for part in found)
    return Evaluation(
        completions if ranks.count() == 1 else whole(completions),
        whole(truncated),
        scores,
        whole(reasons),
        sampled,
        rewards,
        dict(zip(("scores", "sampled", "rewards"), weights, strict=True)),
    )


def _over_draws(drawn: Sequence[Graded]) -> Graded:
    """Of each row the mean over its draws, by their weights, and the mean of these."""
    values, weights = {}, {}
    for name in drawn[0].scores if drawn else ():
        value, weight = (np.array([getattr(one, part)[name] for one in drawn]) for part in ("scores", "weights"))
        weights[name] = weight.mean(axis=0)
        if unweighted(value, weight):
            values[name] = np.mean(value, axis=0)
        else:
            with np.errstate(invalid="ignore"):
                values[name] = np.where(weight > 0, weight * value, 0).sum(axis=0) / weight.sum(axis=0)
    return Graded(values, [], weights)


def best_of(actor: Actor, judge: Judge, rows: Sequence[Row], count: int, headline: str) -> dict[str, float]:
    """ "Just sample more": of `count` texts a row, the share with a right one (an oracle picks), and the most common one's."""
    drawn = actor.draws(rows, range(len(rows)), count)
    graded = np.array([grade(judge, rows, draw)[0][headline] for draw in drawn])  # (count, N)
    common = [Counter(d[i] for d in drawn).most_common(1)[0][0] for i in range(len(rows))]
    voted = grade(judge, rows, common)[0][headline]
    best = np.nanmin if actor.app.better(headline) == "lower" else np.nanmax
    return {"oracle": float(np.nanmean(best(graded, axis=0))), "most_common": float(np.nanmean(voted))}


def clusters(app: App, rows: Sequence[Row]) -> list[str] | None:
    return [str(row[app.cluster]) for row in rows] if app.cluster else None


def unweighted(values: np.ndarray, weights: np.ndarray) -> bool:
    """Whether every scored value weighs 1: then plain means say the same, and NaN is NaN."""
    return bool((weights[~np.isnan(values)] == 1).all())


def mean(values: np.ndarray, weights: np.ndarray) -> float:
    """Of what could be scored, by its weights; NaN if nothing could."""
    return statistics.mean(values, None if unweighted(values, weights) else weights)


def interval(
    app: App, rows: Sequence[Row], values: np.ndarray, weights: np.ndarray | None = None
) -> tuple[float, float, float]:
    """Mean with its 95 % interval, resampling the app's clusters."""
    weights = None if weights is None or unweighted(values, weights) else weights
    return statistics.bootstrap_mean(values, clusters(app, rows), weights=weights)


def change(
    app: App,
    rows: Sequence[Row],
    before: np.ndarray,
    after: np.ndarray,
    weights: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[float, float, float]:
    """Mean change with its 95 % paired interval, resampling the app's clusters. weights: of before, of after."""
    if weights is None or (unweighted(before, weights[0]) and unweighted(after, weights[1])):
        weights = None
    return statistics.paired_bootstrap(before, after, clusters(app, rows), weights=weights)
