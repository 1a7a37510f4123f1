"""Contingency tables of classes and of events, and every rate that comes from their counts.

An event is a value >= the threshold, or a class >= the first alert. Rates are functions of counts, never means of rates: counts
of cells, leads, regions or seasons add up, and the rate of the sum is the pooled one. A rate of nothing (0 / 0) is NaN, never
0. Names and values are those of the package `scores`, whose default event is >= too.

"FAR" is two things in this field. `false_alarm_rate` is FP / (FP + TN) (that of arXiv 2511.22169); `false_alarm_ratio` is
FP / (TP + FP). Either is lowest for who never warns: read them beside `probability_of_detection`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Counts:
    """Hits, false alarms, misses and correct negatives: numbers, or arrays of one shape for many tables at once."""

    tp: np.ndarray | float
    fp: np.ndarray | float
    fn: np.ndarray | float
    tn: np.ndarray | float

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn, self.tn + other.tn)

    def sum(self, axis: int | tuple[int, ...] | None = None) -> Counts:
        """The tables along an axis, pooled."""
        return Counts(*(np.sum(count, axis=axis) for count in (self.tp, self.fp, self.fn, self.tn)))

    @property
    def total(self) -> np.ndarray | float:
        return self.tp + self.fp + self.fn + self.tn

    def accuracy(self):
        """(TP + TN) / N."""
        return ratio(self.tp + self.tn, self.total)

    def base_rate(self):
        """(TP + FN) / N: how often the event is observed."""
        return ratio(self.tp + self.fn, self.total)

    def forecast_rate(self):
        """(TP + FP) / N: how often it is announced."""
        return ratio(self.tp + self.fp, self.total)

    def frequency_bias(self):
        """(TP + FP) / (TP + FN): announced over observed; 1 = as often."""
        return ratio(self.tp + self.fp, self.tp + self.fn)

    def probability_of_detection(self):
        """TP / (TP + FN); also hit rate, recall, DR."""
        return ratio(self.tp, self.tp + self.fn)

    def false_alarm_rate(self):
        """FP / (FP + TN); also POFD."""
        return ratio(self.fp, self.fp + self.tn)

    def false_alarm_ratio(self):
        """FP / (TP + FP)."""
        return ratio(self.fp, self.tp + self.fp)

    def success_ratio(self):
        """TP / (TP + FP); also precision."""
        return ratio(self.tp, self.tp + self.fp)

    def specificity(self):
        """TN / (FP + TN)."""
        return ratio(self.tn, self.fp + self.tn)

    def negative_predictive_value(self):
        """TN / (TN + FN)."""
        return ratio(self.tn, self.tn + self.fn)

    def critical_success_index(self):
        """TP / (TP + FP + FN); also threat score."""
        return ratio(self.tp, self.tp + self.fp + self.fn)

    def f1_score(self):
        """2 TP / (2 TP + FP + FN)."""
        return ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    def equitable_threat_score(self):
        """(TP - H) / (TP + FP + FN - H), H = (TP + FP)(TP + FN) / N the hits by chance; also Gilbert's."""
        chance = ratio((self.tp + self.fp) * (self.tp + self.fn), self.total)
        return ratio(self.tp - chance, self.tp + self.fp + self.fn - chance)

    def peirce_skill_score(self):
        """probability_of_detection - false_alarm_rate; also TSS."""
        return self.probability_of_detection() - self.false_alarm_rate()

    def heidke_skill_score(self):
        """(TP + TN - C) / (N - C), C the number correct by chance; also Cohen's kappa."""
        both = (self.tp + self.fp) * (self.tp + self.fn) + (self.tn + self.fn) * (self.tn + self.fp)
        chance = ratio(both, self.total)
        return ratio(self.tp + self.tn - chance, self.total - chance)

    def odds_ratio(self):
        """TP TN / (FP FN); infinite where nothing is missed or nothing is a false alarm."""
        return ratio(ratio(self.tp, self.fn), ratio(self.fp, self.tn))

    def odds_ratio_skill_score(self):
        """(TP TN - FP FN) / (TP TN + FP FN); also Yule's Q."""
        right, wrong = self.tp * self.tn, self.fp * self.fn
        return ratio(right - wrong, right + wrong)

    def symmetric_extremal_dependence_index(self):
        """(ln F - ln H + ln(1 - H) - ln(1 - F)) / (ln F + ln H + ln(1 - H) + ln(1 - F)), H: detection, F: false alarm rate."""
        with np.errstate(divide="ignore", invalid="ignore"):
            hit, miss = np.log(self.probability_of_detection()), np.log(ratio(self.fn, self.tp + self.fn))
            alarm, quiet = np.log(self.false_alarm_rate()), np.log(self.specificity())
            return (alarm - hit + miss - quiet) / (alarm + hit + miss + quiet)


def ratio(part: np.ndarray | float, whole: np.ndarray | float) -> np.ndarray:
    """part / whole in float64; 0 / 0 is NaN."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.true_divide(part, whole, dtype=np.float64)


def contingency(
    announced: np.ndarray, observed: np.ndarray, where: np.ndarray, axis: int | tuple[int, ...] | None = None
) -> Counts:
    """Counts of bool arrays that broadcast together, over `axis` (all of them by default); only cells `where` True count."""

    def count(cells: np.ndarray) -> np.ndarray:
        return np.count_nonzero(cells & where, axis=axis)

    return Counts(
        count(announced & observed),
        count(announced & ~observed),
        count(~announced & observed),
        count(~announced & ~observed),
    )


def confusion(
    observed: np.ndarray, announced: np.ndarray, classes: int, by: np.ndarray | int = 0, groups: int = 1
) -> np.ndarray:
    """(groups, K, K) int64: how often class [g, o, a] was observed as o and announced as a.

    observed, announced: integer classes that broadcast together; negative = missing, and not counted. by: the number of the
    group (lead, region, rollout) that each cell belongs to, in 0..groups-1, negative = none.
    """
    observed, announced, by = np.broadcast_arrays(observed, announced, by)
    kept = (observed >= 0) & (announced >= 0) & (by >= 0)
    place = (by[kept].astype(np.int64) * classes + observed[kept]) * classes + announced[kept]
    return np.bincount(place, minlength=groups * classes**2).reshape(groups, classes, classes)


def alerts(table: np.ndarray, alert: int) -> Counts:
    """Counts of the event "class >= alert" from a confusion table (..., K, K) [observed, announced]."""
    return Counts(
        table[..., alert:, alert:].sum((-1, -2)),
        table[..., :alert, alert:].sum((-1, -2)),
        table[..., alert:, :alert].sum((-1, -2)),
        table[..., :alert, :alert].sum((-1, -2)),
    )
