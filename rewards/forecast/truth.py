"""What a forecast is judged against, and the loop over rows that every reward and metric of forecasts runs through.

Neighbours with an equal window, scheme and further columns are the rollouts of a group: what is the same for all of them (the
observed values, their classes, the regions) is made once, and they are judged in one numpy call. A window is any object with
`variables`, `observed()` (L, V, Y, X) with NaN where nothing was observed and, where a reward says so, `region()`,
`region_names` and `step_h`. A forecast of fewer leads than the window is judged on the first ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from rewards.forecast.fields import Edges, content_faults, form_fault, levels
from rewards.forecast.schemes import Scheme, classes, scheme_named
from rewards.score import Score


@dataclass(frozen=True, eq=False)
class Truth:
    """observed: (L', V, Y, X) float32, NaN = not observed, over the leads of a forecast. edges: (V, E) of the scheme."""

    window: Any
    scheme: Scheme
    edges: Edges
    observed: np.ndarray

    @cached_property
    def levels(self) -> np.ndarray:
        """int8 (L', V, Y, X): observed classes, -1 = not observed."""
        return classes(self.observed, np.asarray(self.edges)[:, None, None, :])

    def only(self, variable: str) -> slice:
        """The place of one variable on the axis V; empty if the window does not have it."""
        variables = list(self.window.variables)
        start = variables.index(variable) if variable in variables else len(variables)
        return slice(start, start + 1)

    def announced(self, forecasts: np.ndarray, part: slice = slice(None)) -> np.ndarray:
        """int8 (n, L', V, Y, X): the classes that forecasts announce, of all variables or of a part of them."""
        if not self.edges[part]:
            return np.zeros(forecasts[:, :, part].shape, dtype=np.int8)
        return levels(forecasts[:, :, part], self.edges[part])


def judged(
    completions: Sequence,
    judge: Callable[..., list[Score]],
    lowest: Callable[..., Score],
    window: Sequence,
    scheme: Sequence[str],
    *columns: Sequence,
    part: str = "level",
) -> list[Score]:
    """One score a completion: those of judge(truth, forecasts (n, L', V, Y, X), *values of the columns), or for a bad one
    lowest(truth, *values) with the reason. part: what of a structured forecast is judged, and so what is checked.

    Raises ValueError for an unknown scheme, or a variable that it does not know.
    """
    scores: list[Score | None] = [None] * len(completions)
    malformed: list[tuple[int, Truth, tuple[str, str]]] = []
    usual = None  # leads of the batch: so many has a completion of no shape, for all scores of a batch have one length
    for rows in _neighbours(len(completions), window, scheme, *columns):
        first, values = rows[0], [column[rows[0]] for column in columns]
        known = scheme_named(scheme[first])
        observed = np.asarray(window[first].observed(), dtype=np.float32)
        truth = Truth(window[first], known, known.of(window[first].variables), observed)
        alike: dict[tuple, list[int]] = {}
        for i in rows:
            fault = form_fault(completions[i], observed.shape, truth.edges)
            if fault:
                malformed.append((i, truth, fault))
            else:
                alike.setdefault((len(completions[i]), completions[i].dtype), []).append(i)
        for (leads, _), places in alike.items():
            usual = usual or leads
            short = _cut(truth, leads)
            stack = np.stack([completions[i] for i in places])
            faults = content_faults(stack, truth.edges, part)
            if any(faults):
                stack = stack[[fault is None for fault in faults]]
            good = iter(judge(short, stack, *values) if len(stack) else ())
            for i, fault in zip(places, faults, strict=True):
                scores[i] = _refused(lowest(short, *values), fault) if fault else next(good)
    for i, truth, fault in malformed:
        scores[i] = _refused(lowest(_cut(truth, usual), *(column[i] for column in columns)), fault)
    return scores


def _neighbours(count: int, *columns: Sequence) -> list[range]:
    """Runs of rows with equal values in every column."""
    starts = [i for i in range(count) if i == 0 or any(c[i] is not c[i - 1] and c[i] != c[i - 1] for c in columns)]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], count], strict=True)]


def _cut(truth: Truth, leads: int | None) -> Truth:
    return Truth(truth.window, truth.scheme, truth.edges, truth.observed[:leads])


def _refused(score: Score, fault: tuple[str, str]) -> Score:
    return Score(score.value, *fault, weight=score.weight)


def rewarded(
    completions: Sequence, judge: Callable[..., np.ndarray], window: Sequence, scheme: Sequence[str], *columns: Sequence
) -> list[Score]:
    """Scores over decisions from judge(...) -> (n, L', V, Y, X) in [0, 1], NaN where it does not apply; a bad one has 0 there."""

    def lowest(truth: Truth, *values: Any) -> Score:
        clean = np.zeros((1, *truth.observed.shape), dtype=np.float32)
        return Score(np.where(np.isnan(judge(truth, clean, *values)[0]), np.float32(np.nan), np.float32(0)))

    return judged(completions, lambda *seen: [Score(value) for value in judge(*seen)], lowest, window, scheme, *columns)


def measured(
    completions: Sequence,
    judge: Callable[..., tuple[np.ndarray, np.ndarray]],
    worst: Callable[..., tuple[float, float]],
    window: Sequence,
    scheme: Sequence[str],
    *columns: Sequence,
    part: str = "level",
) -> list[Score]:
    """Means from judge(...) -> sums (n,) and numbers of cases (n,), which are their weights; a bad one has those of worst(...).

    None where there are no cases.
    """

    def mean(total: float, cases: float) -> Score:
        return Score(float(total / cases), weight=float(cases)) if cases else Score(None)

    return judged(
        completions,
        lambda *seen: [mean(*pair) for pair in zip(*judge(*seen), strict=True)],
        lambda *seen: mean(*worst(*seen)),
        window,
        scheme,
        *columns,
        part=part,
    )
