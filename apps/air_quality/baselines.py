"""What a trained forecaster has to beat: forecasts that cost nothing, and better uses of supervised starts.

Free, (train rows, test rows) -> forecasts: persistence, climatology, the analysis model's own forecast. Learned, (rivals) ->
forecasts of the rivals' test rows: plain and class-weighted supervised starts, and decisions on top of a start: thresholds of
least cost (one for all leads, or one a lead), quantile mapping, the Bayes decision under the same costs, thresholds on its
probabilities. Whatever is tuned is tuned on the validation rows alone; test rows are only forecast.

Forecasts are structured arrays (rewards/forecast/fields.py) that are made when asked for: no arm is in memory whole, and of
validation forecasts only the observed cells are kept. `tune_for` tunes decisions under any reward, also one that joins cells,
for which a threshold on each cell need not be optimal.

Not covered: recalibrated probabilities, and post-processing that looks at more than the forecast (model output statistics).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from apps.air_quality.climate import Climate
from core.app import Row, Rows
from core.run.sequences import Lazy
from rewards.forecast.costs import cost_matrix
from rewards.forecast.decisions import bayes_levels, tune_thresholds
from rewards.forecast.fields import Edges, deterministic, exceedance, levels, values
from rewards.forecast.schemes import classes, scheme_named
from rewards.score import Score

if TYPE_CHECKING:
    from core.run.rivals import Rivals

QUANTILES = np.linspace(0, 1, 101)  # nodes of the quantile mapping

Forecasts = Sequence[np.ndarray]


def edges_of(row: Row) -> Edges:
    """(V, E) class edges of the row's scheme."""
    return scheme_named(row["scheme"]).of(row["window"].variables)


def announce(value: np.ndarray, row: Row) -> np.ndarray:
    """Structured forecast of concentrations (L, V, Y, X) that announces the class of each."""
    edges = edges_of(row)
    return deterministic(value, levels(value, edges), edges)


# -- free -----------------------------------------------------------------------------------------------------------------


def persistence(train: Rows, test: Rows) -> Forecasts:
    """What was known at the initial time, at every lead."""
    del train
    return Lazy(lambda row: announce(_persistent(row), row), test)


def _persistent(row: Row) -> np.ndarray:
    window = row["window"]
    return np.repeat(window.history()[-1:], window.leads, axis=0)


def climatology(train: Rows, test: Rows) -> Forecasts:
    """What the training period observed at the cell in that month at that hour (climate.py); its mean's class is announced."""
    return Lazy(Climate(train).forecast, test)


def analysis_model(train: Rows, test: Rows) -> Forecasts | None:
    """The analysis model's own forecast from the same initial time; None if the archive holds none of them.

    A row without one has persistence instead, with a warning that counts them; a cell without one has climatology.
    """
    there = sum(row["window"].model() is not None for row in test)
    if not there:
        return None
    if there < len(test):
        warnings.warn(
            f"the archive holds a model forecast from {there} of {len(test)} initial times; persistence stands in elsewhere",
            stacklevel=2,
        )
    climate = cache(lambda: Climate(train))

    def forecast(row: Row) -> np.ndarray:
        value = row["window"].model()
        if value is None:
            return announce(_persistent(row), row)
        missing = ~np.isfinite(value)
        if missing.any():
            value = np.where(missing, climate().forecast(row)["value"], value)
        return announce(value, row)

    return Lazy(forecast, test)


# -- learned --------------------------------------------------------------------------------------------------------------

# Squared error in s = log(1 + x / scale): every observation alike, or rare classes more (arXiv 2511.22169).
PLAIN = {"rollout__distribution": "gaussian", "rollout__decide": "mean", "task__weighting": "none"}
WEIGHTED = PLAIN | {"task__weighting": "class"}
# Probabilities that are not bent towards rare classes; mostly the start of RL itself.
PROBABLE = {"task__weighting": "none"}


@dataclass(frozen=True)
class Cases:
    """The observed cells of some rows: n cases.

    lead, variable: (n,) int16. observed: (n,) ug m-3; level: (n,) int8, its class. value: (n,) and exceed: (n, E), float32, were
    forecast.
    """

    lead: np.ndarray
    variable: np.ndarray
    observed: np.ndarray
    level: np.ndarray
    value: np.ndarray
    exceed: np.ndarray

    @classmethod
    def of(cls, rows: Rows, forecasts: Forecasts) -> Cases:
        """Raises ValueError without any."""
        parts = []
        for row, forecast in zip(rows, forecasts, strict=True):
            observed, edges = row["window"].observed()[: len(forecast)], edges_of(row)
            seen = np.isfinite(observed)
            lead, variable, _, _ = np.nonzero(seen)
            level = levels(observed, edges)[seen]
            lead, variable = lead.astype(np.int16), variable.astype(np.int16)
            parts.append(
                (lead, variable, observed[seen], level, values(forecast)[seen], exceedance(forecast, edges)[seen])
            )
        if not sum(len(part[0]) for part in parts):
            raise ValueError(
                f"nothing is observed in the {len(rows)} validation rows, and decisions are tuned on them; set data.validation "
                f"to a split with observations, or data.validation_share"
            )
        return cls(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    def where(self, variable: int, lead: int | None = None) -> Cases:
        """Those of one variable, and of one lead."""
        kept = (self.variable == variable) & (True if lead is None else self.lead == lead)
        return Cases(*(part[kept] for part in vars(self).values()))


def _forecasts(rivals: Rivals, start: dict[str, str], rows: Rows) -> Forecasts:
    """Of a supervised start with these changes; kept for the test rows."""
    actor = rivals.fit(**start)

    def complete() -> Forecasts:
        return actor.complete(rows, range(len(rows)))[0]

    return rivals.shared(("test", repr(start)), complete) if rows is rivals.test else complete()


def _validation(rivals: Rivals, start: dict[str, str]) -> Cases:
    rows = rivals.validation
    return rivals.shared(("validation", repr(start)), lambda: Cases.of(rows, _forecasts(rivals, start, rows)))


def _costs(rivals: Rivals) -> np.ndarray:
    row = rivals.test[0]
    return cost_matrix(row["costs"], scheme_named(row["scheme"]))


def _changed(rivals: Rivals, start: dict[str, str], change: Callable[[np.ndarray, Row], np.ndarray]) -> Forecasts:
    """change(forecast, row) of a start's forecasts of the test rows."""
    made = _forecasts(rivals, start, rivals.test)
    return Lazy(lambda i: change(made[i], rivals.test[i]), range(len(rivals.test)))


def plain_mse(rivals: Rivals) -> Forecasts:
    """A start trained on squared error, every observation alike; the class of its mean is announced."""
    return _changed(rivals, PLAIN, lambda forecast, row: announce(values(forecast), row))


def class_weighted(rivals: Rivals) -> Forecasts:
    """A start trained on squared error in which rare classes weigh more; the class of its mean is announced."""
    return _changed(rivals, WEIGHTED, lambda forecast, row: announce(values(forecast), row))


def tuned_threshold(rivals: Rivals) -> Forecasts:
    """`plain_mse` with other class edges: those of least cost on validation, the same at all leads."""
    return _thresholds(rivals, by_lead=False)


def tuned_threshold_per_lead(rivals: Rivals) -> Forecasts:
    """`plain_mse` with other class edges at each lead: those of least cost on validation."""
    return _thresholds(rivals, by_lead=True)


def _thresholds(rivals: Rivals, by_lead: bool) -> Forecasts:
    costs = _costs(rivals)

    def tune(cases: Cases) -> np.ndarray:
        return tune_thresholds(cases.value, cases.level, costs)

    thresholds = _tuned(rivals, PLAIN, by_lead, tune, edges_of(rivals.test[0]))

    def change(forecast: np.ndarray, row: Row) -> np.ndarray:
        value = values(forecast)
        return deterministic(value, classes(value, thresholds[: len(value), :, None, None]), edges_of(row))

    return _changed(rivals, PLAIN, change)


def quantile_mapping(rivals: Rivals) -> Forecasts:
    """`plain_mse` with its distribution at each lead mapped on the observed one, by 101 quantiles of the validation rows.

    Beyond the outermost quantiles a value is shifted as they are. The textbook's empirical form.
    """

    def tune(cases: Cases) -> tuple[np.ndarray, np.ndarray]:
        return np.quantile(cases.value, QUANTILES), np.quantile(cases.observed, QUANTILES)

    same = [(QUANTILES, QUANTILES)] * len(edges_of(rivals.test[0]))
    nodes = _tuned(rivals, PLAIN, True, tune, same)  # (L, V, 2, quantiles)

    def change(forecast: np.ndarray, row: Row) -> np.ndarray:
        value = values(forecast).copy()
        for lead, variable in np.ndindex(value.shape[:2]):
            x, y = nodes[lead, variable]
            inside = np.clip(value[lead, variable], x[0], x[-1])
            value[lead, variable] += np.interp(inside, x, y) - inside
        return announce(np.maximum(value, 0), row)

    return _changed(rivals, PLAIN, change)


def bayes_decision(rivals: Rivals) -> Forecasts:
    """The start of RL (unweighted), announcing the class of least cost by its own probabilities."""
    costs = _costs(rivals)

    def change(forecast: np.ndarray, row: Row) -> np.ndarray:
        return with_levels(forecast, bayes_levels(exceedance(forecast, edges_of(row)), costs))

    return _changed(rivals, PROBABLE, change)


def bayes_per_lead(rivals: Rivals) -> Forecasts:
    """The start of RL (unweighted), announcing the highest class whose probability reaches its threshold, the one of least
    cost at that lead on validation (`tune_probabilities`)."""
    costs = _costs(rivals)

    def tune(cases: Cases) -> np.ndarray:
        return tune_probabilities(cases.exceed, cases.level, costs)

    halves = np.full_like(edges_of(rivals.test[0]), 0.5)
    thresholds = _tuned(rivals, PROBABLE, True, tune, halves)[:, :, None, None]

    def change(forecast: np.ndarray, row: Row) -> np.ndarray:
        return with_levels(forecast, reached(exceedance(forecast, edges_of(row)), thresholds[: len(forecast)]))

    return _changed(rivals, PROBABLE, change)


def _tuned(
    rivals: Rivals, start: dict[str, str], by_lead: bool, tune: Callable[[Cases], Any], untuned: Sequence[Any]
) -> np.ndarray:
    """(L or 1, V, ...): what `tune` makes of a start's validation cases of each lead and variable; without any, untuned[v]."""
    cases = _validation(rivals, start)

    def one(variable: int, lead: int | None) -> Any:
        part = cases.where(variable, lead)
        return tune(part) if len(part.level) else untuned[variable]

    leads = range(rivals.test[0]["window"].leads) if by_lead else [None]
    return np.array([[one(variable, lead) for variable in range(len(untuned))] for lead in leads])


def with_levels(forecast: np.ndarray, level: np.ndarray) -> np.ndarray:
    """A structured forecast that announces other classes."""
    made = forecast.copy()
    made["level"] = level
    return made


def reached(exceed: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """int8 (...): the highest class whose probability (..., E) is at or above its threshold; 0 if none is."""
    rank = np.arange(1, exceed.shape[-1] + 1, dtype=np.int8)
    return np.where(exceed >= thresholds, rank, np.int8(0)).max(axis=-1)


def tune_probabilities(exceed: np.ndarray, observed: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """(E,) thresholds of `reached` of little cost: one after another the best given the others, until none moves.

    exceed: (n, E) probabilities of one variable; observed: (n,) classes; costs: (K, K). Each step is exact, and none raises the
    cost; the end need not be the best of all. It begins with a half everywhere. Raises ValueError without cases.
    """
    count = exceed.shape[1]
    thresholds, least = np.full(count, 0.5), np.inf
    while True:
        for e in range(count):
            without = reached(exceed, np.where(np.arange(count) == e, np.inf, thresholds))
            moved = costs[observed, np.maximum(without, e + 1)] - costs[observed, without]
            thresholds[e] = _best_threshold(exceed[:, e], moved)
        cost = costs[observed, reached(exceed, thresholds)].sum()
        if not cost < least - 1e-9:
            return thresholds
        least = cost


def _best_threshold(chance: np.ndarray, moved: np.ndarray) -> float:
    """That of the least sum of `moved` over the cases at or above it; halfway to the next case below; inf = none of them."""
    order = np.argsort(-chance, kind="stable")
    chance = np.concatenate([[np.inf], chance[order], [-np.inf]])
    ends = np.flatnonzero(chance[:-1] > chance[1:])  # so many cases reach a threshold just below chance[end]
    best = ends[np.concatenate([[0.0], np.cumsum(moved[order])])[ends].argmin()]
    above, below = chance[best], chance[best + 1]
    return float((above + below) / 2 if np.isfinite(above) and np.isfinite(below) else above)


# -- any reward -----------------------------------------------------------------------------------------------------------

Decide = Callable[[np.ndarray, Row, np.ndarray], np.ndarray]


def scaled(forecast: np.ndarray, row: Row, factors: np.ndarray) -> np.ndarray:
    """Announces classes whose edges are all multiplied by a factor of each lead, (L,), as if the forecast were divided by it."""
    edges = np.asarray(edges_of(row))[:, None, None, :] * factors[: len(forecast), None, None, None, None]
    return with_levels(forecast, classes(values(forecast), edges))


def at_probability(forecast: np.ndarray, row: Row, chances: np.ndarray) -> np.ndarray:
    """Announces the highest class whose probability to be reached is at or above that of the lead, (L,)."""
    exceed = exceedance(forecast, edges_of(row))
    return with_levels(forecast, reached(exceed, chances[: len(forecast), None, None, None, None]))


def tune_for(
    reward: Callable[..., list[Score]],
    rows: Rows,
    forecasts: Forecasts,
    decide: Decide,
    grid: Sequence[float],
    groups: int = 1,
    lower: bool = False,
) -> np.ndarray:
    """(L,) numbers for which the forecasts, decided by `decide` with them, have the best mean reward; for any batched reward.

    rows, forecasts: validation rows and structured forecasts of them. decide: `scaled` or `at_probability`. grid: the numbers to
    choose from. groups: how many stretches of leads have a number of their own. lower: less is better, as of a metric.

    First the best number for all leads; then the best of each stretch given the others, again and again until none moves. With
    one stretch that is the best on the grid; with several a reward that joins leads may have a better one. Cost: about
    groups x len(grid) evaluations of all rows a round.
    """
    leads = rows[0]["window"].leads
    parts = np.array_split(np.arange(leads), groups)
    names = [name for name in list(inspect.signature(reward).parameters)[1:] if name in rows[0]]

    def mean(numbers: np.ndarray) -> float:
        total = cases = 0.0
        for row, forecast in zip(rows, forecasts, strict=True):
            (score,) = reward([decide(forecast, row, numbers)], **{name: [row[name]] for name in names})
            if score.value is not None:
                weight = np.isfinite(score.value).sum() if np.ndim(score.value) else score.weight
                total, cases = total + np.nanmean(score.value) * weight, cases + weight
        return (-total if lower else total) / cases

    def best(numbers: np.ndarray, part: np.ndarray) -> tuple[float, np.ndarray]:
        tried = [np.where(np.isin(np.arange(leads), part), number, numbers) for number in grid]
        return max(((mean(one), one) for one in tried), key=lambda pair: pair[0])

    value, numbers = best(np.empty(leads), np.arange(leads))
    while groups > 1:
        before = value
        for part in parts:
            found, tried = best(numbers, part)
            if found > value:
                value, numbers = found, tried
        if value == before:
            break
    return numbers
