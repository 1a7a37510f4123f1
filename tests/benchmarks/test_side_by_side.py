"""Ratios of what was measured side by side, in closed form."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from side_by_side import Disagreement, case, measure, median


def test_the_ratio_is_the_median_of_the_ratios_of_rounds_and_not_the_ratio_of_medians():
    ours, baseline = np.array([1.0, 2.0, 9.0]), np.array([2.0, 8.0, 3.0])
    line = case("name", ours, baseline, "s")
    assert (line["ours"], line["baseline"], line["ratio"], line["pairs"]) == (2.0, 3.0, 0.5, 3)


def test_a_machine_that_slows_down_tenfold_leaves_a_constant_ratio_exact():
    baseline = np.array([1.0, 10.0, 100.0, 3.0])
    line = case("name", baseline / 4, baseline, "s")
    assert (line["ratio"], line["ci95"]) == (0.25, [0.25, 0.25])


def test_the_interval_holds_the_median_and_lies_within_the_values():
    values = np.random.default_rng(1).normal(10.0, 1.0, 200)
    middle, (low, high) = median(values)
    assert middle == pytest.approx(np.median(values), rel=1e-3)
    # The sample median's standard error is 1.2533 sigma / sqrt(n): 0.0886 here.
    assert high - low == pytest.approx(2 * 1.96 * 0.0886, rel=0.35)
    assert low < middle < high


def test_each_arm_does_every_work_once_in_turns_and_the_warm_round_does_not_count():
    order = []

    def arm(name, seconds):
        def run(work):
            order.append((work, name))
            time.sleep(seconds * work)
            return work * 2

        return run

    seconds = measure({"a": arm("a", 0.01), "b": arm("b", 0.0)}, [1, 2, 3])
    assert order == [(1, "b"), (1, "a"), (2, "a"), (2, "b"), (3, "b"), (3, "a")]
    assert {name: values.shape for name, values in seconds.items()} == {"a": (2,), "b": (2,)}
    assert (seconds["a"] >= [0.02, 0.03]).all()
    assert (seconds["b"] < 0.01).all()


def test_arms_that_answer_differently_are_not_compared():
    with pytest.raises(Disagreement, match="round 1: b answers 2, a 1"):
        measure({"a": lambda work: 1, "b": lambda work: work}, [1, 2])
