"""How good forecasts are, in numbers: from fields to counts, and from counts to rates, curves and intervals.

`reduce` turns one arm's forecasts into counts and sums by row, lead, region, variable and observed class; the fields can be
dropped after it. Every number is a ratio of pooled counts, never a mean of ratios, and equals that of the package `scores`.
"FAR" is the rate FP/(FP+TN), here `false alarm rate`; FP/(TP+FP) is the `false alarm ratio`. An empty class has no rate (NaN),
never 0.

A case is one cell, lead and variable that has an observation and a forecast; an event is a class at or above the scheme's
first alert class. Intervals are 95 % percentile intervals of 2000 resamples of whole weeks (the rows' column `week`), for
initial times a few hours apart see the same weather. All arms share the resamples, so differences are paired.

Not covered: significance over several seeds (resamples know of the weather alone), and spread of an ensemble beyond CRPS.
Sources: relative economic value, Richardson 2000 (doi 10.1002/qj.49712656313), by `scores`; bootstrap of clusters, Field and
Welsh 2007, from the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np

from core.app import Completion, Row
from rewards.forecast.costs import VARIABLE_WEIGHTS, cost_matrix
from rewards.forecast.events import alerts, confusion, ratio
from rewards.forecast.fields import exceedance, form_fault, levels, members, values
from rewards.forecast.joint import regions
from rewards.forecast.metrics import crps_ensemble
from rewards.forecast.schemes import scheme_named
from rewards.forecast.truth import Truth

THRESHOLDS = np.linspace(0, 1, 101)  # of the probability of an event; bin i is [THRESHOLDS[i], THRESHOLDS[i + 1])
RATIOS = np.linspace(0.02, 0.98, 49)  # cost of an alert over the loss that it prevents
RESAMPLES = 2000
NAMES = {"pm2p5": "PM2.5", "pm10": "PM10"}
COMPARED = (
    *("expected cost", "false alarm rate", "false alarm ratio", "POD", "CSI", "F1", "frequency bias", "RMSE", "CRPS"),
    *("class accuracy", "POD, top class", "false alarm rate, top class", "POD above the first ROC"),
)

# -- from fields to counts ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reduced:
    """One arm's forecasts of N rows: L leads, R regions, V variables, K classes, B = len(THRESHOLDS) bins.

    confusion: (N, L, V, K, K) int64, cases by observed and announced class; regional: (N, R, V, K, K), the same by region.
    sums: (N, L, V, K, 4) float64 by observed class, of forecast - observed, its square, CRPS, and the square of the forecast
    probability of the event - whether it came; regional_sums: (N, R, V, K, 4).
    chances: (N, V, B, 2) int64, cases by bin of the probability of the event and by whether it came; chance_sums: (N, V, B)
    float64, these probabilities summed.
    """

    confusion: np.ndarray
    regional: np.ndarray
    sums: np.ndarray
    regional_sums: np.ndarray
    chances: np.ndarray
    chance_sums: np.ndarray


def reduce(rows: Sequence[Row], completions: Sequence[Completion]) -> Reduced:
    """Counts and sums of the rows' forecasts (L', V, Y, X), plain or structured; one row is in memory at a time.

    Cases without an observation or with a NaN forecast are left out; the tables say how many are left. Raises ValueError for
    what is no forecast of the row's window.
    """
    return _stacked([_of_row(row, completion) for row, completion in zip(rows, completions, strict=True)], np.stack)


def reduce_blocks(
    rows: Sequence[Row],
    forecast: Callable[[Sequence[Row]], Sequence[Completion]],
    *,
    block: int = 8,
    client: Any = None,
) -> Reduced:
    """`reduce` of forecasts that are made `block` rows at a time and dropped: memory does not grow with the number of rows.

    forecast: rows -> their completions. client: a dask.distributed.Client whose workers take the blocks; rows and `forecast`
    must pickle, and workers see the archive under the same path. None: this process. The numbers are the same.
    """
    blocks = [rows[first : first + block] for first in range(0, len(rows), block)]
    work = partial(_of_block, forecast)
    parts = client.gather(client.map(work, blocks, pure=False)) if client else map(work, blocks)
    return _stacked(list(parts), np.concatenate)


def _of_block(forecast: Callable, rows: Sequence[Row]) -> Reduced:
    return reduce(rows, forecast(rows))


def _stacked(parts: Sequence[Reduced], how: Callable) -> Reduced:
    return Reduced(*(how([getattr(part, one.name) for part in parts]) for one in fields(Reduced)))


def _of_row(row: Row, completion: np.ndarray) -> Reduced:
    window, scheme, observed = row["window"], scheme_named(row["scheme"]), row["window"].observed()
    leads, variables = observed.shape[:2]
    edges = scheme.of(window.variables)
    if fault := form_fault(completion, observed.shape, edges):
        raise ValueError(f"row {row['id']}: {fault[0]}: {fault[1]}")
    truth = Truth(window, scheme, edges, observed[: len(completion)])
    value, count, region = values(completion), len(scheme.classes), regions(truth)
    seen = np.isfinite(truth.observed) & np.isfinite(value)
    lead, variable, y, x = np.nonzero(seen)

    observed, true = truth.observed[seen].astype(np.float64), truth.levels[seen]
    announced, event = levels(completion, edges)[seen], true >= scheme.alert
    error = value[seen] - observed
    chance = exceedance(completion, edges)[..., scheme.alert - 1][seen].astype(np.float64)
    measured = error, error**2, crps_ensemble(members(completion[seen]), observed), (chance - event) ** 2

    def counted(place: np.ndarray, shape: tuple[int, ...], weights: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(place, weights, minlength=np.prod(shape)).reshape(shape)

    def grouped(group: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
        """Confusion and sums by group, variable and class. group: negative = in none."""
        by = np.where(group < 0, -1, group * variables + variable)
        place, shape = (by * count + true)[by >= 0], (groups, variables, count)
        sums = [counted(place, shape, part[by >= 0]) for part in measured]
        table = confusion(true, announced, count, by, groups * variables)
        return table.reshape(*shape, count), np.stack(sums, axis=-1)

    by_lead, by_region = grouped(lead, leads), grouped(region[y, x], len(window.region_names))
    bins = len(THRESHOLDS)
    place = variable * bins + np.searchsorted(THRESHOLDS, chance, side="right") - 1
    chances = counted(place * 2 + event, (variables, bins, 2))
    return Reduced(
        by_lead[0], by_region[0], by_lead[1], by_region[1], chances, counted(place, (variables, bins), chance)
    )


# -- from counts to numbers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What all rows share. costs: (K, K), [observed, announced]; weights: (V,) of the variables in the expected cost."""

    variables: tuple[str, ...]
    classes: tuple[str, ...]
    alert: int
    costs: np.ndarray
    weights: np.ndarray
    regions: Mapping[int, str]
    step_h: int

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Task:
        window, scheme = rows[0]["window"], scheme_named(rows[0]["scheme"])
        return cls(
            tuple(window.variables),
            scheme.classes,
            scheme.alert,
            cost_matrix(rows[0]["costs"], scheme),
            np.array([VARIABLE_WEIGHTS[name] for name in window.variables]),
            window.region_names,
            window.step_h,
        )

    def event(self, variable: int) -> str:
        """ "PM2.5 bad or worse"."""
        name, last = self.classes[self.alert], self.alert == len(self.classes) - 1
        return f"{self.called(variable)} {name}{'' if last else ' or worse'}"

    def called(self, variable: int) -> str:
        return NAMES.get(self.variables[variable], self.variables[variable])


def measures(confusion: np.ndarray, sums: np.ndarray, variable: int, task: Task) -> dict[str, np.ndarray]:
    """{name: (...)} of one variable from pooled (..., V, K, K) counts and (..., V, K, 4) sums; `expected cost` is of all.

    Mean error, RMSE and CRPS are in ug m-3; the rest has no unit.
    """
    one, total = confusion[..., variable, :, :], sums[..., variable, :, :].sum(-2)
    cost, cases = (confusion * task.costs).sum((-1, -2)), one.sum((-1, -2))
    event, top = alerts(one, task.alert), alerts(one, len(task.classes) - 1)
    return {
        "expected cost": ratio(cost @ task.weights, confusion.sum((-1, -2)) @ task.weights),
        "cost, this variable": ratio(cost[..., variable], cases),
        "false alarm rate": event.false_alarm_rate(),
        "false alarm ratio": event.false_alarm_ratio(),
        "POD": event.probability_of_detection(),
        "CSI": event.critical_success_index(),
        "F1": event.f1_score(),
        "frequency bias": event.frequency_bias(),
        "mean error": ratio(total[..., 0], cases),
        "RMSE": np.sqrt(ratio(total[..., 1], cases)),
        "CRPS": ratio(total[..., 2], cases),
        "Brier score": ratio(total[..., 3], cases),
        "class accuracy": ratio(np.trace(one, axis1=-2, axis2=-1), cases),
        "POD, top class": top.probability_of_detection(),
        "false alarm rate, top class": top.false_alarm_rate(),
        "events": event.tp + event.fn,
        "cases": cases,
    }


def roc(chances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(false alarm rate, POD), each (..., B + 1), of an alert where the probability is >= each of THRESHOLDS, and never.

    chances: (..., B, 2) as in Reduced.
    """
    reached = np.flip(np.cumsum(np.flip(chances, -2), axis=-2), -2)
    reached = np.concatenate([reached, np.zeros_like(reached[..., :1, :])], axis=-2)
    share = ratio(reached, reached[..., :1, :])
    return share[..., 0], share[..., 1]


def roc_area(chances: np.ndarray) -> np.ndarray:
    """(...) area under the trapezia of `roc`."""
    alarms, hits = roc(chances)
    return -np.trapezoid(hits, alarms, axis=-1)


def above_roc(alarms: np.ndarray, hits: np.ndarray, chances: np.ndarray) -> np.ndarray:
    """(S,) POD minus what the ROC of (S, B, 2) `chances` has at the same false alarm rate, along straight lines between
    thresholds (what alerts drawn by lot between two thresholds give)."""
    x, y = roc(chances)
    curve = [np.interp(at, x[i, ::-1], y[i, ::-1]) for i, at in enumerate(alarms)]
    return hits - np.array(curve)


def economic_value(alarms: np.ndarray, hits: np.ndarray, base_rate: float) -> np.ndarray:
    """(len(RATIOS), ...) value of decisions with these rates, relative to knowing the base rate alone (0) and all (1)."""
    import xarray as xr
    from scores.plotdata import relative_economic_value_from_rates

    dims = [f"axis_{i}" for i in range(np.ndim(hits))]
    rates = (xr.DataArray(rate, dims=dims) for rate in (hits, alarms))
    value = relative_economic_value_from_rates(*rates, xr.DataArray(base_rate), RATIOS)
    return value.transpose("cost_loss_ratio", *dims).values


def reliability(chances: np.ndarray, chance_sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean forecast probability and observed frequency in ten bins [0, .1), ..., [.9, 1]; NaN where a bin is empty.

    chances: (B, 2), chance_sums: (B,).
    """
    tenth = np.minimum(np.arange(len(THRESHOLDS)) // 10, 9)
    cases = np.bincount(tenth, chances.sum(-1))
    return ratio(np.bincount(tenth, chance_sums), cases), ratio(np.bincount(tenth, chances[:, 1]), cases)


def draws(weeks: Sequence[str], count: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """(1 + count, N) times that each row counts: once, then in resamples of as many whole weeks as there are."""
    _, week = np.unique(np.asarray(weeks), return_inverse=True)
    number = week.max() + 1
    times = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=count)
    return np.concatenate([np.ones((1, len(week))), times[:, week]])


def pooled(times: np.ndarray, array: np.ndarray) -> np.ndarray:
    """(S, ...) sums over rows of (N, ...), each row as often as (S, N) `times` says."""
    return (times @ array.reshape(len(array), -1)).reshape(len(times), *array.shape[1:])


Interval = tuple[float, float, float]  # value, and 95 % interval


def compare(
    rows: Sequence[Row], arms: Mapping[str, Reduced], pairs: Sequence[tuple[str, str]], variable: int = 0
) -> tuple[dict[str, dict[str, Interval]], dict[tuple[str, str], dict[str, Interval]]]:
    """{arm: {measure: (value, lo, hi)}} and {(a, b): {measure: (a - b, lo, hi)}}, with intervals by week.

    "POD above the first ROC" is by how much an arm's point lies above the ROC of the first arm, see `above_roc`. Bounds are of
    the resamples in which the measure exists; NaN if there is one week only, for it says nothing about another.
    """
    task, times = Task.of(rows), draws([row["week"] for row in rows])
    found = {}
    first = pooled(times, next(iter(arms.values())).chances[:, variable])
    for name, arm in arms.items():
        found[name] = measures(
            pooled(times, arm.confusion.sum(axis=1)), pooled(times, arm.sums.sum(axis=1)), variable, task
        )
        rates = found[name]["false alarm rate"], found[name]["POD"]
        found[name]["POD above the first ROC"] = above_roc(*rates, first)
    alone = len({row["week"] for row in rows}) < 2

    def interval(values: np.ndarray) -> Interval:
        sampled = values[1:][np.isfinite(values[1:])]
        lo, hi = (np.nan, np.nan) if alone or not sampled.size else np.percentile(sampled, [2.5, 97.5])
        return float(values[0]), float(lo), float(hi)

    values = {name: {key: interval(of[key]) for key in COMPARED} for name, of in found.items()}
    return values, {(a, b): {key: interval(found[a][key] - found[b][key]) for key in COMPARED} for a, b in pairs}
