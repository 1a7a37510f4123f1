"""Weights that follow validation metrics: closed forms, the paper's numbers, and that a resumed run replays them."""

import math

import pytest

from core.config import Constraint
from core.train.constraints import constrained, violation

FLOOR = Constraint("probability_of_detection", at_least=0.6)
CEILING = Constraint("false_alarm_rate", at_most=0.18)


def weights(constraint, values, configured=0.0):
    """After each of the validations that gave these values."""
    lines = [{f"eval/{constraint.metric}": value} for value in values]
    found = [constrained({"a": configured, "b": 1.0}, {"a": constraint}, lines[:n]) for n in range(len(lines) + 1)]
    assert all(now["b"] == 1.0 for now, _ in found)
    return [now["a"] for now, _ in found]


def test_violations_are_positive_on_the_wrong_side():
    assert violation(FLOOR, 0.5) == pytest.approx(0.1)
    assert violation(CEILING, 0.3) == pytest.approx(0.12)
    assert violation(FLOOR, 0.7) < 0 < violation(CEILING, 0.2)


def test_the_papers_constraint_terms_are_multipliers_times_violations():
    """arXiv 2511.22169: POD .5 and FAR .3 at multipliers of .2 add -.044; ours are .2 POD + .2 (1 - FAR) and a constant."""
    assert 0.2 * (violation(FLOOR, 0.5) + violation(CEILING, 0.3)) == pytest.approx(0.044)
    terms = 0.2 * 0.5 + 0.2 * (1 - 0.3)
    assert terms - 0.2 * 0.6 - 0.2 * (1 - 0.18) == pytest.approx(-0.044)


def test_the_weight_is_proportional_and_integral_by_hand():
    """e = .1, .1, -.05: integral .1, .2, .15; weight kp e + ki I."""
    gains = Constraint("m", at_least=0.6, kp=0.5, ki=0.1)
    assert weights(gains, [0.5, 0.5, 0.65], configured=0.2) == pytest.approx([0.2, 0.26, 0.27, 0.2])
    assert weights(gains, [0.5, 0.5, 0.59]) == pytest.approx([0, 0.06, 0.07, 0.005 + 0.021])
    only = Constraint("m", at_most=1.0, kp=0.0, ki=0.1)
    assert weights(only, [2, 3, 1, 0]) == pytest.approx([0, 0.1, 0.3, 0.3, 0.2])
    assert weights(Constraint("m", at_most=1.0, kp=0.1, ki=0.0), [2, 3, 1]) == pytest.approx([0, 0.1, 0.2, 0])


def test_a_constraint_that_holds_adds_nothing_and_saves_nothing_up():
    easy = Constraint("m", at_least=0.6, kp=0.5, ki=0.1)
    assert weights(easy, [0.9] * 50 + [0.5], configured=0.3) == pytest.approx([0.3] * 51 + [0.36])


def test_the_cap_bounds_weight_and_integral():
    hard = Constraint("m", at_least=1.0, kp=0.0, ki=0.1, cap=0.5)
    assert max(weights(hard, [0.0] * 100, configured=1.0)) == 1.5
    assert weights(hard, [0.0] * 100 + [2.0] * 5)[-1] == pytest.approx(
        0
    )  # as many steps down as up, however long it was up


def test_validations_without_a_value_change_nothing():
    assert weights(FLOOR, [math.nan, 0.5, math.nan])[1:] == pytest.approx([0, 0.006, 0.006])
    now, logged = constrained({"a": 0.2}, {"a": FLOOR}, [{"loss": 1.0}, {"eval/other": 0.0}])
    assert (now, logged) == ({"a": 0.2}, {"constraint/a/weight": 0.2})


def test_what_is_logged_is_the_weight_and_the_latest_violation():
    lines = [
        {"eval/probability_of_detection": 0.5, "eval/false_alarm_rate": 0.1},
        {"eval/probability_of_detection": 0.4},
    ]
    now, logged = constrained({"hits": 0.0, "calm": 0.1}, {"hits": FLOOR, "calm": CEILING}, lines)
    assert now == pytest.approx({"hits": 0.05 * 0.2 + 0.01 * 0.3, "calm": 0.1})
    assert logged == pytest.approx(
        {
            "constraint/hits/weight": 0.013,
            "constraint/hits/violation": 0.2,
            "constraint/calm/weight": 0.1,
            "constraint/calm/violation": -0.08,
        }
    )


def test_a_metric_held_by_its_weight_comes_to_its_limit():
    """A plant whose metric rises with the weight: .3 + .2 weight; the floor .6 is held at weight 1.5."""
    gains, lines = Constraint("m", at_least=0.6, kp=0.5, ki=0.5), []
    for _ in range(200):
        weight = constrained({"a": 0.0}, {"a": gains}, lines)[0]["a"]
        lines.append({"eval/m": 0.3 + 0.2 * weight})
    assert weight == pytest.approx(1.5, abs=1e-3)
