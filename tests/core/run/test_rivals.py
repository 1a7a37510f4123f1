"""The best baseline and the distance to it, in closed form; runs with baselines are in test_forecast.py."""

from types import SimpleNamespace

import numpy as np
import pytest

from core.run.evaluate import Evaluation, Graded
from core.run.rivals import best_baseline, difference, verified

ROWS = [{"id": i, "week": i // 2} for i in range(4)]


def app(better="higher"):
    return SimpleNamespace(metrics={"rate": None}, better=lambda name: better, cluster="week", verify=None)


def graded(values, weights=(1, 1, 1, 1)):
    return Graded({"rate": np.array(values, float)}, [], {"rate": np.array(weights, float)})


def evaluation(values, weights):
    scores, _, weights = graded(values, weights)
    return Evaluation([], [], scores, [], {}, {}, {"scores": weights})


def test_the_best_is_the_highest_or_the_lowest_mean_of_those_that_have_one():
    nan = float("nan")
    found = {"a": graded([0, 0, 0, 1]), "b": graded([1, 0, 0, 1]), "none": graded([nan] * 4, [0] * 4)}
    found["weighty"] = graded([0, 0, 0, 1], [1, 0, 0, 3])
    assert best_baseline(app(), found) == ("weighty", 0.75)
    assert best_baseline(app("lower"), found) == ("a", 0.25)
    assert best_baseline(app(), {}) is None
    assert best_baseline(app(), {"none": found["none"]}) is None


def test_the_distance_is_of_two_rates_with_weights_of_their_own():
    rival = graded([1.0, 0.0, 1.0, 0.0], [1, 3, 1, 3])
    own = evaluation([1.0, 0.0, 1.0, 0.0], [3, 1, 3, 1])
    assert difference(app(), ROWS, own, rival) == pytest.approx((0.5, 0.5, 0.5))


def test_an_app_without_a_verification_has_nothing_to_show():
    assert verified(app(), ROWS, {}) == {"tables": [], "plots": []}
