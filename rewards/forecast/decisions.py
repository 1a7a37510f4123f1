"""Which class to announce: the one of least expected cost given probabilities, or that of thresholds tuned on data.

Both are optimal for costs of single cells (rewards/forecast/costs.py): the first if the probabilities are right, the second
among all ascending thresholds on the data that it is given (validation data, never test data). A policy that is trained on the
same costs must beat both to show that training found more than an operating point. Not covered: costs that join cells
(rewards/forecast/joint.py).
"""

import numpy as np


def class_probabilities(exceed: np.ndarray) -> np.ndarray:
    """(..., E) probabilities of being at or above each edge -> (..., E + 1) of the classes, float64, at least 0, sum 1.

    Differences of neighbours; negative ones (exceedances that do not descend) become 0 and the rest is scaled to sum 1.
    """
    exceed = np.asarray(exceed, dtype=np.float64)
    edge = (*exceed.shape[:-1], 1)
    parts = -np.diff(np.concatenate([np.ones(edge), exceed, np.zeros(edge)], axis=-1), axis=-1)
    parts = np.maximum(parts, 0)
    return parts / parts.sum(axis=-1, keepdims=True)


def expected_costs(probabilities: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """(..., K): cost to be expected of announcing each class, from the probabilities (..., K) and C[observed, announced]."""
    return np.asarray(probabilities) @ np.asarray(matrix)


def bayes_levels(exceed: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """int8 (...): the class of least expected cost, from exceedance probabilities (..., E); the lowest of equal ones."""
    return expected_costs(class_probabilities(exceed), matrix).argmin(axis=-1).astype(np.int8)


def tune_thresholds(
    values: np.ndarray, observed: np.ndarray, matrix: np.ndarray, axis: int | None = None
) -> np.ndarray:
    """(E,) ascending thresholds t of least mean cost, if class k is announced where k of them are <= the value.

    values: concentrations or probabilities of one variable, or whatever grows with severity; NaN = missing. observed: classes
    of the same shape; negative = missing. matrix: (K, K), C[observed, announced], K = E + 1. axis: along which each place (each
    lead) has its own thresholds; then (length, E). -inf = always, inf = never. Apply them with `schemes.classes`.

    Exact, in O(n log n + E n): a threshold matters only by how many of the sorted values lie below it, and the cost is a sum with
    one term for each threshold, so the best ascending cuts come from one running minimum after another. Derived.
    Raises ValueError if nothing is observed.
    """
    if axis is not None:
        places = range(np.shape(values)[axis])
        return np.stack([tune_thresholds(np.take(values, i, axis), np.take(observed, i, axis), matrix) for i in places])
    values, observed, matrix = np.ravel(values), np.ravel(observed), np.asarray(matrix, dtype=np.float64)
    values = values.astype(np.result_type(values, np.float32))
    known = (observed >= 0) & ~np.isnan(values)
    if not known.any():
        raise ValueError(f"none of {values.size} values has an observation; thresholds need some to be tuned on")
    order = np.argsort(values[known], kind="stable")
    values, observed = values[known][order], observed[known][order]
    # Moving threshold e up past a value turns the class announced there from e into e - 1.
    moved = np.cumsum(matrix[observed, :-1] - matrix[observed, 1:], axis=0)  # (n, E)
    moved = np.concatenate([np.zeros_like(moved[:1]), moved])  # [c, e]: with the c lowest values below threshold e
    cuts = np.flatnonzero(np.concatenate([[True], values[1:] > values[:-1], [True]]))  # equal values are not parted
    total, back = np.zeros(len(cuts)), []
    for e in range(moved.shape[1]):
        total = moved[cuts, e] + total
        best = np.minimum.accumulate(total)
        back.append(np.maximum.accumulate(np.where(total == best, np.arange(len(cuts)), 0)))
        total = best
    chosen = [len(cuts) - 1]
    for last in reversed(back):
        chosen.append(int(last[chosen[-1]]))
    return _between(values, cuts[chosen[:0:-1]])


def _between(values: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """Thresholds that leave so many of the ascending values below them, halfway to the next where their precision allows."""
    inf = np.array([np.inf], dtype=values.dtype)
    padded = np.concatenate([-inf, values, inf])
    below, above = padded[cuts], padded[cuts + 1]
    with np.errstate(invalid="ignore"):  # at the ends, which are not used
        middle = below + (above - below) / 2
    inner = np.where(middle > below, middle, above)
    return np.where(cuts == 0, -inf, np.where(cuts == len(values), inf, inner))
