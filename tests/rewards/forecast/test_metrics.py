import numpy as np
import pytest
import xarray
from scores.categorical import ThresholdEventOperator
from scores.continuous import mse
from scores.probability import crps_for_ensemble

from rewards.forecast import metrics
from rewards.forecast.costs import VARIABLE_WEIGHTS, cost_matrix
from rewards.forecast.fields import dtype
from rewards.forecast.joint import event_duration, regional_alert
from rewards.forecast.schemes import SCHEMES, classes

DIMS = ("init", "lead", "y", "x")
KOREA = SCHEMES["korea"]
RATES = {
    metrics.false_alarm_rate: "false_alarm_rate",
    metrics.false_alarm_ratio: "false_alarm_ratio",
    metrics.probability_of_detection: "probability_of_detection",
    metrics.f1: "f1_score",
    metrics.critical_success_index: "critical_success_index",
    metrics.frequency_bias: "frequency_bias",
}
OTHERS = (*(metrics.expected_cost, metrics.regional_cost, metrics.duration_error, metrics.squared_error, metrics.crps),)


@pytest.fixture
def windows(make):
    return [make(seed=seed, missing=missing) for seed, missing in ((1, 0.3), (2, 0.7), (3, 0.6))]


@pytest.fixture
def forecasts(rng):
    return list(rng.gamma(0.9, 60.0, (3, 4, 2, 5, 6)).astype(np.float32))


def pooled(scores):
    """The mean over rows, as a table shows it."""
    kept = [s for s in scores if s.value is not None]
    return sum(s.value * s.weight for s in kept) / sum(s.weight for s in kept)


def labelled(fields, variable=0):
    return xarray.DataArray(np.stack(fields)[:, :, variable].astype(float), dims=DIMS)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("metric", RATES, ids=RATES.get)
def test_rates_over_rows_equal_those_of_scores_over_all_cells(windows, forecasts, score, metric, scheme):
    threshold = scheme.edges["pm2p5"][scheme.alert - 1]
    forecasts[0][0, 0, 0], windows[0].frames[0, 0, 1] = threshold, threshold
    operator = ThresholdEventOperator(default_event_threshold=threshold)
    theirs = operator.make_contingency_manager(labelled(forecasts), labelled([w.frames for w in windows])).transform()
    ours = score(metric, forecasts, windows, scheme=scheme.name)
    assert pooled(ours) == pytest.approx(float(getattr(theirs, RATES[metric])()), rel=1e-9)
    assert len({s.value for s in ours}) == 3


def test_squared_error_and_crps_over_rows_equal_those_of_scores(windows, forecasts, score, rng):
    observed = labelled([w.frames for w in windows])
    ours = pooled(score(metrics.squared_error, forecasts, windows))
    assert ours == pytest.approx(float(mse(labelled(forecasts), observed)), rel=1e-6)
    ensembles = np.zeros((3, 4, 2, 5, 6), dtype=dtype(3))
    ensembles["members"] = np.sort(rng.gamma(0.9, 60.0, (*ensembles.shape, 8)))
    theirs = crps_for_ensemble(
        xarray.DataArray(ensembles["members"][:, :, 0].astype(float), dims=(*DIMS, "member")),
        observed,
        "member",
        method="ecdf",
    )
    assert pooled(score(metrics.crps, list(ensembles), windows)) == pytest.approx(float(theirs), rel=1e-6)


@pytest.mark.parametrize("members", [1, 2, 8, 51])
def test_crps_of_any_ensemble_equals_that_of_scores(rng, members):
    ensemble, observed = np.sort(rng.gamma(1.0, 30.0, (40, members))), rng.gamma(1.0, 30.0, 40)
    theirs = crps_for_ensemble(
        xarray.DataArray(ensemble, dims=("cell", "member")), xarray.DataArray(observed, dims="cell"), "member",
        method="ecdf", preserve_dims="cell",
    )  # fmt: skip
    np.testing.assert_allclose(metrics.crps_ensemble(ensemble, observed), theirs, rtol=1e-9)


def test_crps_by_hand():
    found = metrics.crps_ensemble(np.array([[1.0, 3.0]]), np.array([2.0]))
    np.testing.assert_allclose(found, [1 - 2 * 2 / (2 * 4)])


def test_crps_of_a_plain_forecast_is_its_absolute_error(windows, forecasts, score):
    differences = np.abs(np.stack(forecasts).astype(float) - np.stack([w.frames for w in windows]))[:, :, 0]
    assert pooled(score(metrics.crps, forecasts, windows)) == pytest.approx(np.nanmean(differences), rel=1e-9)


def test_expected_cost_is_the_weighted_mean_over_observed_cells(windows, forecasts, score):
    for costs in ("agency", "paper"):
        matrix, total, cases = cost_matrix(costs, KOREA), 0.0, 0.0
        for window, forecast in zip(windows, forecasts, strict=True):
            for v, variable in enumerate(window.variables):
                observed = classes(window.frames[:, v], KOREA.edges[variable])
                announced = classes(forecast[:, v], KOREA.edges[variable])
                seen = observed >= 0
                total += VARIABLE_WEIGHTS[variable] * matrix[observed[seen], announced[seen]].sum()
                cases += VARIABLE_WEIGHTS[variable] * seen.sum()
        scores = score(metrics.expected_cost, forecasts, windows, costs=costs)
        assert pooled(scores) == pytest.approx(total / cases)
        assert sum(s.weight for s in scores) == pytest.approx(cases)


def test_joint_metrics_by_hand(make, score):
    frames = np.full((3, 2, 1, 4), 10, dtype=np.float32)
    frames[:2, 0, 0, :2], frames[:, :, 0, 3] = (
        60,
        np.nan,
    )  # an episode of two leads in the west; nothing known in the far east
    window = make(frames, places=[[3, 3, 7, 7]])
    forecast = np.full_like(frames, 10)
    forecast[0, 0, 0, 0] = forecast[2, 1, 0, 2] = 200  # one cell and lead of it, and dust in the east
    cost = score(metrics.regional_cost, [forecast], window, alert_share=0.6)[0]
    # 3 leads x 2 regions a variable; PM2.5: two alerts missed (.7); PM10: one false alarm (.3), weight .3
    assert cost.value == pytest.approx((2 * 0.7 + 0.3 * 0.3) / (6 + 0.3 * 6))
    assert cost.weight == pytest.approx(7.8)
    hours = score(metrics.duration_error, [forecast], window)[0]
    assert hours.value == pytest.approx(6 * (1 + 2 + 0.3 * 1) / (3 + 0.3 * 3))
    assert hours.weight == pytest.approx(3.9)


def test_joint_metrics_say_what_their_rewards_say(forecasts, score, make):
    """With one variable and one cell a region, so that both weigh alike."""
    window = make(
        seed=2,
        shape=(4, 1, 1, 6),
        missing=0.3,
        variables=("pm2p5",),
        places=[range(6)],
        region_names=dict.fromkeys(range(6)),
    )
    for forecast in (f[:, :1, :1] for f in forecasts):
        reward = np.nanmean(score(regional_alert, [forecast], window)[0].value, dtype=float)
        assert score(metrics.regional_cost, [forecast], window)[0].value == pytest.approx(1 - reward, rel=1e-6)
    whole = make(seed=2, shape=(4, 1, 1, 6), missing=0.0, variables=("pm2p5",))
    reward = np.nanmean(score(event_duration, [forecast], whole)[0].value, dtype=float)
    assert 0 < reward < 1
    assert score(metrics.duration_error, [forecast], whole)[0].value == pytest.approx((1 - reward) * 4 * 6, rel=1e-6)


def test_gold_is_best_and_a_bad_completion_worst(windows, forecasts, score):
    gold = [np.where(np.isnan(w.frames), 1, w.frames) for w in windows]
    for metric in (*RATES, *OTHERS):
        right, said, bad = (score(metric, c, windows) for c in (gold, forecasts, [None, gold[1] * np.nan, "text"]))
        best = (
            1.0
            if metric
            in (metrics.probability_of_detection, metrics.f1, metrics.critical_success_index, metrics.frequency_bias)
            else 0.0
        )
        assert {s.value for s in right} == {best}
        assert [s.reason for s in bad] == ["not_a_field", "not_finite", "not_a_field"]
        for one, middle in zip(bad, said, strict=True):
            assert np.isfinite(one.value)
            assert one.weight > 0
            assert abs(one.value - best) >= abs(middle.value - best) > 0
    for metric in OTHERS:  # as many cases as if it had been good
        right, bad = (score(metric, completions, windows) for completions in (gold, [None] * 3))
        assert [s.weight for s in bad] == [s.weight for s in right]
        assert len({s.weight for s in bad}) > 1
    assert {s.value for s in score(metrics.expected_cost, [None] * 3, windows)} == {1.0}
    assert {s.value for s in score(metrics.false_alarm_rate, [None] * 3, windows)} == {1.0}
    assert {s.value for s in score(metrics.probability_of_detection, [None] * 3, windows)} == {0.0}


def test_a_row_without_cases_has_no_value(make, score):
    quiet, blind = make(np.full((1, 2, 2, 2), 5.0)), make(np.full((1, 2, 2, 2), np.nan))
    low = np.full((1, 2, 2, 2), 5, dtype=np.float32)
    for metric in (metrics.probability_of_detection, metrics.false_alarm_ratio, metrics.f1):
        assert score(metric, [low], quiet)[0].value is None
    assert score(metrics.false_alarm_rate, [low], quiet)[0].value == 0
    for metric in (*RATES, *OTHERS):
        for completion in (low, None):
            assert score(metric, [completion], blind)[0].value is None


def test_parts_of_a_structured_forecast_are_judged_apart(windows, score):
    made = np.zeros(windows[0].frames.shape, dtype=dtype(3))
    made["value"], made["level"], made["members"] = 1.0, 3, np.linspace(2, 9, 8)
    assert score(metrics.false_alarm_rate, [made], windows[0])[0].value == 1
    observed = windows[0].frames[:, 0].astype(float)
    assert score(metrics.squared_error, [made], windows[0])[0].value == pytest.approx(np.nanmean((observed - 1) ** 2))
    made["members"] = 9.0
    assert score(metrics.crps, [made], windows[0])[0].value == pytest.approx(np.nanmean(np.abs(observed - 9)))
    made["members"][0, 0, 0, 0, 3] = np.nan
    assert [score(m, [made], windows[0])[0].reason for m in (metrics.crps, metrics.expected_cost)] == ["not_finite", ""]
