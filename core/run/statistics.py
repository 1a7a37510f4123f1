"""Intervals for the numbers a run reports: bootstrap over clusters, and Wilson's for a plain share.

Items that share a database (a speaker, a station, a clip) are not independent, so a bootstrap over items is too
narrow; give the database as `clusters` and whole clusters are resampled. The mean of a resample is the sum of its
items over their number, so large clusters weigh more, exactly as in the reported mean. An item that is itself the mean
of some cases (a rate) has their number as its weight: then all means are sum(weight * value) / sum(weight), of the items
as of each resample, and a change is the difference of two such ratios within the resample.

Sources: percentile bootstrap, Efron & Tibshirani 1993, chapter 13; cluster form, Field & Welsh 2007; score interval,
Wilson 1927. All three written from the textbook formula; Wilson's is tested against published-form numbers.
"""

import math
from collections.abc import Iterator

import numpy as np

Z95 = 1.959963984540054


def mean(values, weights=None) -> float:
    """Of what could be scored; NaN if nothing could. weights: (N,), see the module docstring."""
    values = _numbers(values)
    if weights is None:
        return math.nan if np.isnan(values).all() else float(np.nanmean(values))
    total, weight = _cases(values, _numbers(weights))
    return float(total.sum() / weight.sum()) if weight.sum() else math.nan


def paired_bootstrap(
    before, after, clusters=None, n: int = 10_000, seed: int = 0, weights=None
) -> tuple[float, float, float]:
    """Mean change after - before over the same items, with its 95 % percentile interval.

    before, after: (N,) numbers, item i of one is item i of the other; a pair with a NaN (not scored) is left out.
    clusters: (N,) labels, or None when every item is its own cluster.  n: number of resamples.
    weights: (of before, of after), (N,) each, or None when every item weighs the same. With weights a value that is NaN at
    weight 0 has no cases and its partner stays; a pair in which a weight is NaN is left out.
    Returns (change, lo, hi). All NaN when no pair was scored; lo and hi NaN when fewer than two clusters are left,
    since one cluster says nothing about another. Raises ValueError when the lengths differ.
    """
    before, after = _numbers(before), _numbers(after)
    if before.shape != after.shape:
        raise ValueError(
            f"before has {before.size} items and after {after.size}; a paired interval needs the same items"
        )
    if weights is None:
        return bootstrap_mean(after - before, clusters, n, seed)
    return _weighted([before, after], [_numbers(w) for w in weights], clusters, n, seed)


def bootstrap_mean(values, clusters=None, n: int = 10_000, seed: int = 0, weights=None) -> tuple[float, float, float]:
    """Mean of the scored values with its 95 % percentile interval; the rest as in `paired_bootstrap`. weights: (N,)."""
    values = _numbers(values)
    if weights is not None:
        _, lo, hi = _weighted([values], [_numbers(weights)], clusters, n, seed)
        return mean(values, weights), lo, hi  # to the last digit what is said elsewhere
    labels = _labels(values, clusters)
    scored = ~np.isnan(values)
    values = values[scored]
    if values.size == 0:
        return math.nan, math.nan, math.nan
    _, index = np.unique(labels[scored], return_inverse=True)
    sums, counts = np.bincount(index, weights=values), np.bincount(index)
    value = float(values.mean())
    if counts.size < 2:
        return value, math.nan, math.nan
    means = [sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1) for drawn in _resamples(counts.size, n, seed)]
    lo, hi = np.percentile(np.concatenate(means), [2.5, 97.5])
    return value, float(lo), float(hi)


def _weighted(arms, weights, clusters, n: int, seed: int) -> tuple[float, float, float]:
    """Of one arm its mean, of two the change of the mean, as ratios of sums over clusters; and the interval."""
    labels = _labels(arms[0], clusters)
    if any(w.shape != arms[0].shape for w in weights):
        raise ValueError(f"{arms[0].size} values but {[w.size for w in weights]} weights; give one weight per value")
    kept = ~np.isnan(np.sum(weights, axis=0))
    _, index = np.unique(labels[kept], return_inverse=True)
    cases = [_cases(values[kept], w[kept]) for values, w in zip(arms, weights, strict=True)]
    sums = [[np.bincount(index, weights=part) for part in pair] for pair in cases]  # [arm][total, weight]: (clusters,)

    def found(take) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # a resample without cases has no mean
            ratios = [take(total) / take(weight) for total, weight in sums]
        return ratios[-1] - ratios[0] if len(ratios) > 1 else ratios[0]

    value = float(found(np.sum)) if index.size else math.nan
    if min((np.count_nonzero(weight) for _, weight in sums), default=0) < 2:
        return value, math.nan, math.nan
    made = [found(lambda part, drawn=drawn: part[drawn].sum(axis=1)) for drawn in _resamples(len(sums[0][0]), n, seed)]
    lo, hi = np.nanpercentile(np.concatenate(made), [2.5, 97.5])
    return value, float(lo), float(hi)


def _cases(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """weight * value and weight of each item; 0 of an item without cases, or that was not scored."""
    weights = np.where(np.isnan(values) | np.isnan(weights), 0.0, weights)
    return np.where(weights > 0, weights * values, 0.0), weights


def _labels(values: np.ndarray, clusters) -> np.ndarray:
    labels = np.arange(values.size) if clusters is None else np.asarray(clusters)
    if labels.shape != values.shape:
        raise ValueError(f"{values.size} values but {labels.size} cluster labels; give one label per value")
    return labels


def _resamples(clusters: int, n: int, seed: int) -> Iterator[np.ndarray]:
    """n draws of as many clusters as there are, with replacement: (some, clusters) indices at a time."""
    rng = np.random.default_rng(seed)
    chunk = max(1, 200_000 // clusters)  # resamples at a time: a few MB, whatever the number of clusters
    for start in range(0, n, chunk):
        yield rng.integers(0, clusters, size=(min(chunk, n - start), clusters))


def wilson(k: int, n: int) -> tuple[float, float]:
    """95 % score interval of a share, k successes in n independent trials; (0, 1) when n is 0."""
    if not 0 <= k <= n:
        raise ValueError(f"k={k} successes in n={n} trials; k must lie between 0 and n")
    if n == 0:
        return 0.0, 1.0
    share, spread = k / n, Z95 * Z95 / n
    half = Z95 * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return (share + spread / 2 - half) / (1 + spread), (share + spread / 2 + half) / (1 + spread)


def _numbers(values) -> np.ndarray:
    return np.asarray([math.nan if v is None else v for v in values], dtype=float)
