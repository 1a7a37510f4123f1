from itertools import combinations_with_replacement

import numpy as np
import pytest

from rewards.forecast.costs import cost_matrix
from rewards.forecast.decisions import bayes_levels, class_probabilities, expected_costs, tune_thresholds
from rewards.forecast.schemes import SCHEMES, classes

KOREA, US = SCHEMES["korea"], SCHEMES["us"]


def mean_cost(values, observed, matrix, thresholds):
    announced = classes(values, thresholds)
    seen = (observed >= 0) & (announced >= 0)
    return matrix[observed[seen], announced[seen]].mean()


def brute_force(values, observed, matrix):
    """Least mean cost over all ascending thresholds that can differ on these values."""
    cuts = [-np.inf, *np.unique(values[~np.isnan(values)]), np.inf]
    return min(mean_cost(values, observed, matrix, t) for t in combinations_with_replacement(cuts, len(matrix) - 1))


def noisy(rng, n, count, steps=None):
    """(values, classes) that go together loosely; steps: values rounded to so many places, to have ties."""
    observed = rng.integers(0, count, n)
    values = observed + rng.normal(0, 1.2, n)
    observed[rng.random(n) < 0.1] = -1
    values[rng.random(n) < 0.1] = np.nan
    return (values if steps is None else np.round(values * steps) / steps).astype(np.float32), observed


def test_probabilities_of_classes_are_differences():
    np.testing.assert_allclose(class_probabilities(np.array([0.75, 0.5, 0.125])), [0.25, 0.25, 0.375, 0.125])
    np.testing.assert_allclose(class_probabilities(np.array([[1.0, 1.0], [0.0, 0.0]])), [[0, 0, 1], [1, 0, 0]])


def test_exceedances_that_do_not_descend_are_clipped_and_rescaled():
    found = class_probabilities(np.array([0.5, 0.7, 0.2], dtype=np.float16))
    np.testing.assert_allclose(found, np.array([0.5, 0, 0.5, 0.2]) / 1.2, atol=1e-3)
    assert found.sum() == pytest.approx(1)


def test_expected_costs_by_hand():
    matrix = np.array([[0, 0.3], [0.7, 0]])
    np.testing.assert_allclose(expected_costs([0.8, 0.2], matrix), [0.14, 0.24])


@pytest.mark.parametrize("miss", [0.5, 0.7, 0.9])
def test_bayes_announces_above_the_ratio_of_costs(miss):
    alarm = 1 - miss
    matrix = np.array([[0, alarm], [miss, 0]])  # announce if p miss > (1 - p) alarm
    chances = np.array([alarm - 0.01, alarm + 0.01])
    np.testing.assert_array_equal(bayes_levels(chances[:, None], matrix), [0, 1])


@pytest.mark.parametrize("costs", ["agency", "paper", "paper_miss", "exact"])
def test_bayes_equals_a_loop_over_classes(rng, costs):
    matrix = cost_matrix(costs, US)
    exceed = -np.sort(-rng.random((2, 3, 4, 5)), axis=-1)
    found = bayes_levels(exceed, matrix)
    assert (found.shape, found.dtype) == ((2, 3, 4), np.int8)
    for place in np.ndindex(2, 3, 4):
        bounds = [1.0, *exceed[place], 0.0]
        chances = [bounds[k] - bounds[k + 1] for k in range(6)]
        expected = [sum(chances[o] * matrix[o, a] for o in range(6)) for a in range(6)]
        assert found[place] == min(range(6), key=expected.__getitem__)


def test_sure_probabilities_are_announced_as_they_are():
    exceed = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
    np.testing.assert_array_equal(bayes_levels(exceed, cost_matrix("agency", KOREA)), [0, 1, 2, 3])


@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize("costs", ["agency", "paper", "paper_miss", "exact", "random"])
@pytest.mark.parametrize(("count", "n"), [(2, 60), (3, 40), (4, 16)])
def test_tuned_thresholds_cost_no_more_than_any_others(rng, count, n, costs, steps):
    if costs == "random":
        matrix = rng.random((count, count)) * (1 - np.eye(count))
    else:
        matrix = cost_matrix(costs, KOREA)[-count:, -count:]
    for _ in range(3):
        values, observed = noisy(rng, n, count, steps)
        thresholds = tune_thresholds(values, observed, matrix)
        assert thresholds.shape == (count - 1,)
        assert (thresholds[1:] >= thresholds[:-1]).all()
        least = brute_force(values, observed, matrix)
        assert mean_cost(values, observed, matrix, thresholds) == pytest.approx(least, abs=1e-12)


def test_a_threshold_lies_halfway_between_the_values_that_it_parts():
    found = tune_thresholds(np.array([1.0, 2.0, 4.0, 5.0]), np.array([0, 0, 1, 1]), 1 - np.eye(2))
    np.testing.assert_array_equal(found, [3.0])


def test_neighbouring_floats_are_still_parted():
    low = np.float32(0.1)
    for _ in range(2):  # the middle is rounded to the lower one, then to the upper one
        high = np.nextafter(low, np.float32(1))
        values = np.array([low, high])
        found = tune_thresholds(values, np.array([0, 1]), 1 - np.eye(2))
        np.testing.assert_array_equal(classes(values, found), [0, 1])
        low = high


def test_thresholds_may_be_never_and_always():
    matrix = 1 - np.eye(3)
    values = np.array([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(tune_thresholds(values, np.array([1, 1, 1]), matrix), [-np.inf, np.inf])
    np.testing.assert_array_equal(classes(np.array([-9.0, 9.0]), [-np.inf, np.inf]), [1, 1])


def test_each_lead_has_its_own_thresholds(rng):
    matrix = cost_matrix("agency", KOREA)
    values, observed = (part.reshape(5, 3, 20) for part in noisy(rng, 300, 4))
    values = values + np.arange(3)[:, None]  # a bias that grows with the lead
    by_lead, one = tune_thresholds(values, observed, matrix, axis=1), tune_thresholds(values, observed, matrix)
    assert by_lead.shape == (3, 3)
    for lead in range(3):
        np.testing.assert_array_equal(by_lead[lead], tune_thresholds(values[:, lead], observed[:, lead], matrix))
    seen = (observed >= 0) & ~np.isnan(values)
    announced = classes(values, by_lead[:, None, :])
    assert matrix[observed[seen], announced[seen]].mean() < mean_cost(values, observed, matrix, one)


def test_tuned_thresholds_beat_the_edges_of_the_scheme_on_a_biased_forecast(rng):
    matrix = cost_matrix("agency", KOREA)
    truth = rng.gamma(0.9, 40.0, 5000).astype(np.float32)
    observed = classes(truth, KOREA.edges["pm2p5"])
    values = truth * rng.lognormal(-0.7, 0.5, 5000).astype(np.float32)
    tuned = mean_cost(values, observed, matrix, tune_thresholds(values, observed, matrix))
    assert tuned < 0.7 * mean_cost(values, observed, matrix, KOREA.edges["pm2p5"])


def test_without_observations_there_is_nothing_to_tune_on():
    with pytest.raises(ValueError, match="none of 3 values has an observation"):
        tune_thresholds(np.ones(3), np.full(3, -1), 1 - np.eye(2))
