"""Intervals for the numbers a run reports: bootstrap over clusters, and Wilson's for a plain share.

Items that share a database (a speaker, a station, a clip) are not independent, so a bootstrap over items is too
narrow; give the database as `clusters` and whole clusters are resampled. The mean of a resample is the sum of its
items over their number, so large clusters weigh more, exactly as in the reported mean.

Sources: percentile bootstrap, Efron & Tibshirani 1993, chapter 13; cluster form, Field & Welsh 2007; score interval,
Wilson 1927. All three written from the textbook formula; Wilson's is tested against published-form numbers.
"""

import math

import numpy as np

Z95 = 1.959963984540054


def paired_bootstrap(before, after, clusters=None, n: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """Mean change after - before over the same items, with its 95 % percentile interval.

    before, after: (N,) numbers, item i of one is item i of the other; a pair with a NaN (not scored) is left out.
    clusters: (N,) labels, or None when every item is its own cluster.  n: number of resamples.
    Returns (change, lo, hi). All NaN when no pair was scored; lo and hi NaN when fewer than two clusters are left,
    since one cluster says nothing about another. Raises ValueError when the lengths differ.
    """
    before, after = _numbers(before), _numbers(after)
    if before.shape != after.shape:
        raise ValueError(
            f"before has {before.size} items and after {after.size}; a paired interval needs the same items"
        )
    return bootstrap_mean(after - before, clusters, n, seed)


def bootstrap_mean(values, clusters=None, n: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of the scored values with its 95 % percentile interval; the rest as in `paired_bootstrap`."""
    values = _numbers(values)
    labels = np.arange(values.size) if clusters is None else np.asarray(clusters)
    if labels.shape != values.shape:
        raise ValueError(f"{values.size} values but {labels.size} cluster labels; give one label per value")
    scored = ~np.isnan(values)
    values = values[scored]
    if values.size == 0:
        return math.nan, math.nan, math.nan
    _, index = np.unique(labels[scored], return_inverse=True)
    sums, counts = np.bincount(index, weights=values), np.bincount(index)
    mean = float(values.mean())
    if counts.size < 2:
        return mean, math.nan, math.nan
    rng = np.random.default_rng(seed)
    chunk = max(1, 200_000 // counts.size)  # resamples at a time: a few MB, whatever the number of clusters
    means = []
    for start in range(0, n, chunk):
        drawn = rng.integers(0, counts.size, size=(min(chunk, n - start), counts.size))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    lo, hi = np.percentile(np.concatenate(means), [2.5, 97.5])
    return mean, float(lo), float(hi)


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
