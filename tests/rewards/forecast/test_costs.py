import re

import numpy as np
import pytest

from rewards.forecast.costs import (
    PRESETS,
    agency,
    as_costs,
    class_reward,
    cost_matrix,
    detected,
    no_false_alarm,
    pm2p5_cost,
    pm10_cost,
)
from rewards.forecast.fields import deterministic, dtype
from rewards.forecast.schemes import SCHEMES, classes

KOREA = SCHEMES["korea"]
EDGES = KOREA.of(("pm2p5", "pm10"))
# arXiv 2511.22169: pairs of PM2.5 that are hit, hit, hit, right side but wrong class, miss, false alarm
ANNOUNCED, OBSERVED = (10.0, 15.0, 40.0, 80.0, 20.0, 50.0), (12.0, 20.0, 60.0, 50.0, 40.0, 30.0)


def papers_cell(announced, observed, alpha, beta, gamma, alert):
    """The released reward of one cell, in its own terms."""
    high, was_high = announced >= alert, observed >= alert
    reward = alpha * (high == was_high) + beta * (announced == observed)
    return reward - gamma * (high and not was_high)


def test_agency_is_the_table():
    table = [[0, 0.1, 0.4, 0.6], [0.1, 0, 0.3, 0.5], [0.8, 0.7, 0, 0.2], [1, 0.9, 0.4, 0]]
    np.testing.assert_allclose(cost_matrix("agency", KOREA), table, atol=1e-15)


@pytest.mark.parametrize("alert", range(1, 8))
@pytest.mark.parametrize("count", range(2, 9))
def test_agency_of_other_numbers_of_classes_keeps_the_order_of_mistakes(count, alert):
    if alert >= count:
        return
    matrix = agency(count, alert)
    miss, alarm = matrix[alert:, :alert], matrix[:alert, alert:]
    right = np.concatenate([matrix[:alert, :alert].ravel(), matrix[alert:, alert:].ravel()])
    assert not matrix.diagonal().any()
    assert right.max() < miss.min()
    assert alarm.max() < miss.min()
    assert matrix.min() == 0
    assert matrix.max() <= 1
    for row, observed in zip(matrix, range(count), strict=True):  # the farther from the truth the dearer
        assert (np.diff(row[observed:]) > 0).all()
        assert (np.diff(row[: observed + 1]) < 0).all()


@pytest.mark.parametrize(
    ("alpha", "beta", "gamma", "cells", "mean"),
    [
        (0.0, 1.0, 0.1, [1.0, 1.0, 1.0, 0.0, 0.0, -0.1], 0.483333333333),
        (0.5, 0.5, 0.0, [1.0, 1.0, 1.0, 0.5, 0.0, 0.0], 0.583333333333),
    ],
)
def test_the_papers_worked_cells(alpha, beta, gamma, cells, mean):
    announced, observed = (classes(np.array(pair), EDGES[0]) for pair in (ANNOUNCED, OBSERVED))
    np.testing.assert_array_equal(announced, [0, 1, 2, 3, 1, 2])
    np.testing.assert_array_equal(observed, [0, 1, 2, 2, 2, 1])
    found = class_reward(4, 2, alpha, beta, gamma)[observed, announced]
    np.testing.assert_allclose(found, cells, atol=1e-12)
    assert found.mean() == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize("weights", [(0.0, 1.0, 0.1), (0.5, 0.5, 0.0), (0.2, 0.7, 0.4)])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_papers_form_is_a_cost_matrix_cell_by_cell(rng, make, score, name, weights):
    scheme = SCHEMES[name]
    rewards = class_reward(len(scheme.classes), scheme.alert, *weights)
    costs = as_costs(rewards)
    assert (costs.min(), costs.max()) == (0, 1)
    window = make(seed=3)
    forecast = rng.gamma(0.9, 60.0, window.frames.shape).astype(np.float32)
    value = score(pm2p5_cost, [forecast], window, scheme=name, costs=costs.tolist())[0].value
    span = sum(weights)  # best alpha + beta, worst -gamma
    for lead, y, x in np.ndindex(4, 5, 6):
        if np.isnan(window.frames[lead, 0, y, x]):
            assert np.isnan(value[lead, 0, y, x])
            continue
        pair = (int(classes(field[lead, 0, y, x], scheme.edges["pm2p5"])) for field in (forecast, window.frames))
        expected = papers_cell(*pair, *weights, scheme.alert)
        assert value[lead, 0, y, x] * span - weights[2] == pytest.approx(expected, abs=1e-6)


def test_the_presets_of_the_paper():
    published, with_miss = cost_matrix("paper", KOREA), cost_matrix("paper_miss", KOREA)
    np.testing.assert_allclose(published[1], [1 / 1.1, 0, 1, 1])
    np.testing.assert_allclose(published[2], [1 / 1.1, 1 / 1.1, 0, 1 / 1.1])
    np.testing.assert_allclose(with_miss[1], [0.4, 0, 0.44, 0.44])
    np.testing.assert_allclose(with_miss[2], [1, 1, 0, 0.4])
    np.testing.assert_array_equal(cost_matrix("exact", KOREA), 1 - np.eye(4))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
def test_every_preset_fits_every_scheme_and_is_itself_as_a_list(preset, scheme):
    matrix = cost_matrix(preset, scheme)
    assert matrix.shape == (len(scheme.classes),) * 2
    np.testing.assert_array_equal(cost_matrix(matrix.tolist(), scheme), matrix)


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ("agencey", "unknown costs 'agencey'; did you mean 'agency'? (known: agency, paper"),
        ([[0, 1], [1, 0]], "costs are (2, 2); 4 classes need (4, 4)"),
        ([[0, 1], [1]], "are no matrix"),
        (None, "costs are ()"),
        ((2 * (1 - np.eye(4))).tolist(), "costs lie in 0..2; divide them by the greatest"),
        ((np.nan * np.ones((4, 4))).tolist(), "costs lie in nan..nan"),
        (np.full((4, 4), 0.5).tolist(), "the exact class costs [0.5, 0.5, 0.5, 0.5]"),
    ],
)
def test_costs_that_cannot_be_are_refused_in_words(costs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        cost_matrix(costs, KOREA)


def cells(pairs, variables=2):
    """Window frames and forecast (1, V, 1, n) with these values in every variable."""
    return (np.tile(np.array(part, dtype=np.float32), (1, variables, 1, 1)) for part in zip(*pairs, strict=True))


def test_rewards_of_single_cells(make, score):
    # observed, announced: hit, miss, false alarm, not observed
    observed, forecast = cells([(60, 40), (60, 20), (20, 60), (np.nan, 60)])
    window = make(observed)
    pm2p5 = score(pm2p5_cost, [forecast], window)[0].value
    np.testing.assert_allclose(pm2p5[0, 0, 0], [1, 1 - 0.7, 1 - 0.3, np.nan], rtol=1e-6)
    assert np.isnan(pm2p5[0, 1]).all()
    pm10 = score(pm10_cost, [forecast], window)[0].value  # 60 and 40 are moderate, 20 is good
    np.testing.assert_allclose(pm10[0, 1, 0], [1, 0.9, 0.9, np.nan], rtol=1e-6)
    assert np.isnan(pm10[0, 0]).all()
    nan = np.nan
    np.testing.assert_array_equal(score(detected, [forecast], window)[0].value[0, :, 0], [[1, 0, nan, nan], [nan] * 4])
    np.testing.assert_array_equal(
        score(no_false_alarm, [forecast], window)[0].value[0, :, 0], [[nan, nan, 0, nan], [nan] * 4]
    )
    assert pm2p5.dtype == np.float32
    assert pm2p5.shape == forecast.shape


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("costs", [*PRESETS, "list"])
def test_the_reward_tensor_equals_a_loop_over_cells(rng, make, score, name, costs):
    scheme = SCHEMES[name]
    count = len(scheme.classes)
    if costs == "list":
        costs = (rng.random((count, count)) * (1 - np.eye(count))).tolist()
    matrix = cost_matrix(costs, scheme)
    window = make(seed=5)
    forecasts = rng.gamma(0.9, 60.0, (3, 4, 2, 5, 6)).astype(np.float32)
    for v, (variable, reward) in enumerate((("pm2p5", pm2p5_cost), ("pm10", pm10_cost))):
        values = np.stack([s.value for s in score(reward, forecasts, window, scheme=name, costs=costs)])
        expected = np.full(forecasts.shape, np.nan)
        for i, lead, y, x in np.ndindex(3, 4, 5, 6):
            truth = window.frames[lead, v, y, x]
            if truth == truth:
                pair = [
                    sum(edge <= value for edge in scheme.edges[variable])
                    for value in (truth, forecasts[i, lead, v, y, x])
                ]
                expected[i, lead, v, y, x] = 1 - matrix[pair[0], pair[1]]
        np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-7)


def test_means_of_the_alert_rewards_are_the_rates(rng, make, score):
    from rewards.forecast.metrics import false_alarm_rate, probability_of_detection

    window = make(seed=8)
    forecast = [rng.gamma(0.9, 60.0, window.frames.shape).astype(np.float32)]
    for reward, metric, sign in ((detected, probability_of_detection, 1), (no_false_alarm, false_alarm_rate, -1)):
        mean = np.nanmean(score(reward, forecast, window)[0].value, dtype=float)
        rate = score(metric, forecast, window)[0].value
        assert 0.1 < rate < 0.9
        assert mean == pytest.approx(rate if sign > 0 else 1 - rate)


def test_rows_of_several_windows_and_columns_are_judged_as_if_alone(rng, make, score):
    windows = [make(seed=seed) for seed in (1, 1, 2, 1)]  # equal by value, not the same object
    columns = {"scheme": ["korea", "korea", "us", "us"], "costs": ["agency", "exact", "exact", "paper"]}
    forecasts = [rng.gamma(0.9, 60.0, (4, 2, 5, 6)).astype(np.float32) for _ in windows]
    together = pm2p5_cost(forecasts, window=windows, **columns)
    for i, one in enumerate(together):
        alone = score(
            pm2p5_cost, forecasts[i : i + 1], windows[i], **{name: column[i] for name, column in columns.items()}
        )
        np.testing.assert_array_equal(one.value, alone[0].value)


def test_the_truth_is_read_once_for_neighbours_of_one_window(make, score, monkeypatch):
    reads = []
    windows = [make(seed=seed) for seed in (1, 1, 2)]
    monkeypatch.setattr(type(windows[0]), "observed", lambda window: reads.append(window.name) or window.frames)
    score(pm2p5_cost, [window.frames * 0 + 1 for window in windows], windows)
    assert len(reads) == 2


def test_a_forecast_of_fewer_leads_is_judged_on_the_first_ones(rng, make, score):
    window = make()
    forecast = rng.gamma(0.9, 60.0, window.frames.shape).astype(np.float32)
    short, whole = score(pm2p5_cost, [forecast[:2], forecast], window)
    assert short.value.shape == (2, 2, 5, 6)
    np.testing.assert_array_equal(short.value, whole.value[:2])


def test_a_structured_forecast_is_judged_by_what_it_announces(rng, make, score):
    window = make()
    announced = rng.integers(0, 4, window.frames.shape)
    middles = np.array([[5, 20, 50, 100], [10, 50, 100, 200]], dtype=np.float32)
    plain = middles[np.arange(2)[:, None, None], announced]
    structured = deterministic(np.zeros_like(plain), announced, EDGES)
    for reward in (pm2p5_cost, pm10_cost, detected, no_false_alarm):
        a, b = (score(reward, [forecast], window)[0].value for forecast in (plain, structured))
        np.testing.assert_array_equal(a, b)


def test_a_bad_completion_has_zero_where_the_reward_applies_and_a_reason(make, score):
    window = make()
    good = np.where(np.isnan(window.frames), 0, window.frames)[:2]
    wrong = [np.full_like(good, np.nan), good - 1e6, "text", good[..., :-1, :], np.zeros(good.shape, dtype(5)), None]
    reasons = ["not_finite", "negative", "not_a_field", "wrong_shape", "wrong_dtype", "not_a_field"]
    for reward in (pm2p5_cost, pm10_cost, detected, no_false_alarm):
        scores = score(reward, [good, *wrong, good], window)
        assert [s.reason for s in scores] == ["", *reasons, ""]
        np.testing.assert_array_equal(scores[0].value, scores[-1].value)
        assert set(scores[0].value[~np.isnan(scores[0].value)]) == {1}
        for bad in scores[1:-1]:  # as many decisions as the others of the batch
            np.testing.assert_array_equal(bad.value, scores[0].value * 0)
            assert bad.detail


def test_a_variable_that_the_window_lacks_is_nowhere_judged(make, score):
    window = make(shape=(2, 1, 3, 3), variables=("pm10",))
    forecast = np.full((2, 1, 3, 3), 50, dtype=np.float32)
    assert np.isnan(score(pm2p5_cost, [forecast], window)[0].value).all()
    assert not np.isnan(score(pm10_cost, [forecast], window)[0].value).all()


def test_64_rollouts_are_judged_in_numpy(rng, make, score):
    """A loop over cells would take seconds; the measured time is 2 ms on one core, and the bound leaves room for a busy one."""
    import time

    windows = [window for seed in range(8) for window in [make(seed=seed, shape=(4, 2, 16, 24))] * 8]
    forecasts = list(rng.gamma(0.9, 60.0, (64, 4, 2, 16, 24)).astype(np.float32))
    seconds = []
    for _ in range(5):
        start = time.process_time()
        score(pm2p5_cost, forecasts, windows)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.05
