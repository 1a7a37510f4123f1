import time

import numpy as np
import pytest
import scores.categorical
import scores.continuous
import scores.plotdata
import scores.probability
import xarray as xr

from apps.air_quality import counts
from core.run.sequences import Lazy
from rewards.forecast import fields, metrics
from rewards.forecast.costs import cost_matrix
from rewards.forecast.schemes import SCHEMES

EDGES = np.array(SCHEMES["korea"].of(("pm2p5", "pm10")))


@pytest.fixture
def case(air):
    """30 rows over four weeks with structured forecasts, a few of whose values are NaN."""
    rows = air.rows(30)
    completions = [air.forecast(row, 100 + i) for i, row in enumerate(rows)]
    for i, completion in enumerate(completions):
        completion["value"][i % 4, 0, 3] = np.nan
    return rows, completions


def total(reduced):
    return reduced.confusion.sum((0, 1)), reduced.sums.sum((0, 1))


def arrays(rows, completions, variable=0):
    """Forecast values, classes, event probabilities, members and observed values as DataArrays; NaN where one is missing."""
    dims = ("row", "lead", "y", "x")
    observed = xr.DataArray(np.stack([row["window"].observed()[:, variable] for row in rows]).astype(float), dims=dims)
    stack = np.stack(completions)[:, :, variable]
    value = xr.DataArray(stack["value"].astype(float), dims=dims)
    both = np.isfinite(observed) & np.isfinite(value)
    level = xr.DataArray(stack["level"].astype(float), dims=dims).where(both)
    chance = xr.DataArray(stack["exceed"][..., 1].astype(float), dims=dims).where(both)
    members = xr.DataArray(stack["members"].astype(float), dims=(*dims, "member"))
    return observed.where(both), value, level, chance, members.where(both)


@pytest.mark.parametrize("variable", [0, 1])
def test_every_metric_equals_that_of_scores_on_random_fields_with_nan(case, variable):
    rows, completions = case
    task = counts.Task.of(rows)
    found = counts.measures(*total(counts.reduce(rows, completions)), variable, task)
    observed, value, level, chance, members = arrays(rows, completions, variable)
    true = xr.where(np.isnan(observed), np.nan, np.digitize(observed, EDGES[variable]))
    for alert, names in (
        (2, {name: name for name in ("false alarm rate", "false alarm ratio", "frequency bias")}),
        (2, {"POD": "probability of detection", "CSI": "critical success index", "F1": "f1 score"}),
        (3, {"POD, top class": "probability of detection", "false alarm rate, top class": "false alarm rate"}),
    ):
        operator = scores.categorical.ThresholdEventOperator(default_event_threshold=alert)
        table = operator.make_contingency_manager(level, true)
        for ours, theirs in names.items():
            assert found[ours] == pytest.approx(float(getattr(table, theirs.replace(" ", "_"))()), rel=1e-12), ours
    assert found["RMSE"] == pytest.approx(float(scores.continuous.rmse(value, observed)), rel=1e-12)
    assert found["mean error"] == pytest.approx(float(scores.continuous.mean_error(value, observed)), rel=1e-9)
    crps = scores.probability.crps_for_ensemble(members, observed, "member")
    assert found["CRPS"] == pytest.approx(float(crps), rel=1e-12)
    event = (true >= 2).where(~np.isnan(true))
    assert found["Brier score"] == pytest.approx(float(scores.probability.brier_score(chance, event)), rel=1e-12)
    assert found["cases"] == int(np.isfinite(observed).sum()) < np.isfinite(rows[0]["window"].observed()).sum() * 30


def test_roc_and_economic_value_equal_those_of_scores(case):
    rows, completions = case
    reduced = counts.reduce(rows, completions)
    observed, _, level, chance, _ = arrays(rows, completions)
    event = (observed >= 35).where(~np.isnan(observed)).astype(float)
    chances = reduced.chances[:, 0].sum(0)
    alarms, hits = counts.roc(chances)
    theirs = scores.plotdata.roc(chance, event, thresholds=counts.THRESHOLDS)
    np.testing.assert_allclose(alarms, theirs.POFD, rtol=1e-12)
    np.testing.assert_allclose(hits, theirs.POD, rtol=1e-12)
    assert counts.roc_area(chances) == pytest.approx(float(theirs.AUC), rel=1e-12)

    base = float(event.mean())
    value = scores.plotdata.relative_economic_value
    options = {"probability_thresholds": counts.THRESHOLDS, "generate_maximum_rev": True}
    best = value(chance, event, cost_loss_ratios=counts.RATIOS, **options).maximum
    np.testing.assert_allclose(counts.economic_value(alarms[:-1], hits[:-1], base).max(axis=1), best, rtol=1e-9)
    found = counts.measures(*total(reduced), 0, counts.Task.of(rows))
    announced = (level >= 2).where(~np.isnan(level)).astype(float)
    ours = counts.economic_value(found["false alarm rate"], found["POD"], base)
    np.testing.assert_allclose(ours, value(announced, event, cost_loss_ratios=counts.RATIOS), rtol=1e-9)


def test_reliability_is_the_mean_probability_and_the_frequency_of_each_tenth(case):
    rows, completions = case
    reduced = counts.reduce(rows, completions)
    observed, _, _, chance, _ = arrays(rows, completions)
    known = np.isfinite(observed.values)
    p, event = chance.values[known], observed.values[known] >= 35
    mean, frequency = counts.reliability(reduced.chances[:, 0].sum(0), reduced.chance_sums[:, 0].sum(0))
    for i in range(10):
        inside = (p >= counts.THRESHOLDS[10 * i]) & (p < counts.THRESHOLDS[10 * i + 10] if i < 9 else p <= 1)
        if not inside.any():
            assert np.isnan(mean[i])
            continue
        assert mean[i] == pytest.approx(p[inside].mean())
        assert frequency[i] == pytest.approx(event[inside].mean())


def test_published_table_in_closed_form():
    """Numbers of arXiv 2511.22169's metrics for TP 30, FP 10, FN 20, TN 140."""
    confusion = np.zeros((1, 4, 4), int)
    confusion[0, 2, 2], confusion[0, 1, 2], confusion[0, 2, 1], confusion[0, 0, 0] = 30, 10, 20, 140
    task = counts.Task(
        ("pm2p5",), SCHEMES["korea"].classes, 2, cost_matrix("agency", SCHEMES["korea"]), np.ones(1), {}, 6
    )
    found = counts.measures(confusion, np.zeros((1, 4, 4)), 0, task)
    for name, value in {"false alarm rate": 1 / 15, "POD": 0.6, "F1": 2 / 3, "CSI": 0.5, "frequency bias": 0.8}.items():
        assert found[name] == pytest.approx(value)
    assert found["false alarm ratio"] == 0.25
    assert found["class accuracy"] == 0.85
    assert found["expected cost"] == pytest.approx((10 * 0.3 + 20 * 0.7) / 200)


def test_expected_cost_and_rates_are_those_of_the_metrics(case):
    rows, completions = case
    completions = [np.nan_to_num(completion["value"], nan=20.0) for completion in completions]
    found = counts.measures(*total(counts.reduce(rows, completions)), 0, counts.Task.of(rows))
    columns = {name: [row[name] for row in rows] for name in ("window", "scheme", "costs")}

    def pooled(metric, *names):
        scored = metric(completions, **{name: columns[name] for name in ("window", "scheme", *names)})
        weights = [score.weight for score in scored if score.value is not None]
        return np.average([score.value for score in scored if score.value is not None], weights=weights)

    assert found["expected cost"] == pytest.approx(pooled(metrics.expected_cost, "costs"), rel=1e-12)
    assert found["false alarm rate"] == pytest.approx(pooled(metrics.false_alarm_rate), rel=1e-12)
    assert found["false alarm ratio"] == pytest.approx(pooled(metrics.false_alarm_ratio), rel=1e-12)
    assert found["POD"] == pytest.approx(pooled(metrics.probability_of_detection), rel=1e-12)
    assert found["F1"] == pytest.approx(pooled(metrics.f1), rel=1e-12)
    assert found["CSI"] == pytest.approx(pooled(metrics.critical_success_index), rel=1e-12)
    assert found["RMSE"] == pytest.approx(np.sqrt(pooled(metrics.squared_error)), rel=1e-12)
    assert found["CRPS"] == pytest.approx(pooled(metrics.crps), rel=1e-12)


def test_rates_by_lead_and_region_are_of_their_own_cases(case):
    rows, completions = case
    task, reduced = counts.Task.of(rows), counts.reduce(rows, completions)
    observed, value, level, _, _ = arrays(rows, completions)
    operator = scores.categorical.ThresholdEventOperator(default_event_threshold=2)
    true = xr.where(np.isnan(observed), np.nan, np.digitize(observed, EDGES[0]))
    by_lead = counts.measures(reduced.confusion.sum(0), reduced.sums.sum(0), 0, task)
    table = operator.make_contingency_manager(level, true).transform(preserve_dims="lead")
    np.testing.assert_allclose(by_lead["POD"], table.probability_of_detection())
    np.testing.assert_allclose(by_lead["false alarm rate"], table.false_alarm_rate())
    np.testing.assert_allclose(by_lead["RMSE"], scores.continuous.rmse(value, observed, preserve_dims="lead"))
    by_region = counts.measures(reduced.regional.sum(0), reduced.regional_sums.sum(0), 0, task)
    for place, number in enumerate(task.regions):
        inside = xr.DataArray(rows[0]["window"].region() == number, dims=("y", "x"))
        table = operator.make_contingency_manager(level.where(inside), true.where(inside))
        assert by_region["POD"][place] == pytest.approx(float(table.probability_of_detection()), nan_ok=True)
        assert by_region["cases"][place] == int(np.isfinite(observed.where(inside)).sum())
    assert by_region["cases"].sum() == by_lead["cases"].sum() - int(np.isfinite(observed[..., 0, 0]).sum())


def test_an_empty_class_has_no_rate(air):
    rows = air.rows(3)
    quiet = [np.full_like(row["window"].observed(), 3.0) for row in rows]
    for row in rows:
        row["window"]._observed = np.where(np.isnan(row["window"].observed()), np.nan, np.float32(5.0))
    task, reduced = counts.Task.of(rows), counts.reduce(rows, quiet)
    found = counts.measures(*total(reduced), 0, task)
    for name in ("POD", "false alarm ratio", "F1", "CSI", "frequency bias", "POD, top class"):
        assert np.isnan(found[name]), name
    assert found["false alarm rate"] == found["expected cost"] == 0
    assert np.isnan(counts.roc(reduced.chances[:, 0].sum(0))[1]).all()
    empty = counts.measures(reduced.regional.sum(0), reduced.regional_sums.sum(0), 0, task)
    assert np.isnan(empty["false alarm rate"][2])
    assert np.isnan(empty["RMSE"][2])
    assert np.isnan(empty["expected cost"][2])


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_a_value_on_an_edge_belongs_to_the_class_above_it(air, scheme):
    (row,) = air.rows(1, scheme=scheme, stations=1.0)
    edges = np.array(SCHEMES[scheme].of(("pm2p5", "pm10")), dtype=np.float32)
    row["window"]._observed = np.broadcast_to(edges[:, :1, None], row["window"].observed().shape).astype(np.float32)
    below = np.nextafter(row["window"].observed(), np.float32(0))
    on, under = (counts.reduce([row], [field]).confusion.sum((0, 1)) for field in (row["window"].observed(), below))
    cases = below[:, 0].size
    assert on[0, 1, 1] == on[1, 1, 1] == under[0, 1, 0] == under[1, 1, 0] == cases


def test_a_plain_forecast_counts_like_its_deterministic_form(case):
    rows, completions = case
    plain = [
        completion["value"].astype(np.float16).astype(np.float32) for completion in completions
    ]  # as members are kept
    made = [fields.deterministic(value, fields.levels(value, EDGES), EDGES) for value in plain]
    a, b = counts.reduce(rows, plain), counts.reduce(rows, made)
    for name in ("confusion", "regional", "sums", "regional_sums", "chances", "chance_sums"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), err_msg=name)


def test_a_short_forecast_is_counted_at_its_leads_alone(air):
    rows = air.rows(3)
    whole = [air.forecast(row, i) for i, row in enumerate(rows)]
    a, b = counts.reduce(rows, whole), counts.reduce(rows, [completion[:2] for completion in whole])
    np.testing.assert_array_equal(a.confusion[:, :2], b.confusion[:, :2])
    assert b.confusion.shape == a.confusion.shape
    assert not b.confusion[:, 2:].any()


def test_what_is_no_forecast_of_the_window_is_refused_by_the_row(air):
    (row,) = air.rows(1)
    for bad in (np.zeros((4, 2, 6, 5), np.float32), np.zeros((5, 2, 5, 6), np.float32), "high"):
        with pytest.raises(ValueError, match=row["id"]):
            counts.reduce([row], [bad])


def test_a_forecast_may_be_dropped_as_soon_as_it_is_counted(air):
    rows, alive = air.rows(6), []

    def make(i):
        alive.append(i)
        assert len(alive) <= 2
        forecast = air.forecast(rows[i], i)
        alive.pop()
        return forecast

    lazy = counts.reduce(rows, Lazy(make, range(6)))
    eager = counts.reduce(rows, [air.forecast(row, i) for i, row in enumerate(rows)])
    np.testing.assert_array_equal(lazy.confusion, eager.confusion)


def test_blocks_give_the_same_counts(air):
    rows = air.rows(7)
    whole = counts.reduce(rows, [air.forecast(row, 1) for row in rows])
    for block in (1, 3, 7, 50):
        parts = counts.reduce_blocks(rows, lambda rows: [air.forecast(row, 1) for row in rows], block=block)
        for name in ("confusion", "regional", "sums", "regional_sums", "chances", "chance_sums"):
            np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))


# -- intervals ------------------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_a_slow_bootstrap_over_weeks(case):
    rows, completions = case
    task, reduced = counts.Task.of(rows), counts.reduce(rows, completions)
    weeks = sorted({row["week"] for row in rows})
    members = {week: [i for i, row in enumerate(rows) if row["week"] == week] for week in weeks}
    drawn = np.random.default_rng(0).multinomial(len(weeks), np.full(len(weeks), 1 / len(weeks)), size=2000)
    slow = []
    for times in drawn:
        chosen = [i for week, n in zip(weeks, times, strict=True) for _ in range(n) for i in members[week]]
        part = reduced.confusion[chosen].sum((0, 1)), reduced.sums[chosen].sum((0, 1))
        found = counts.measures(*part, 0, task)
        slow.append([found["expected cost"], found["F1"]])
    values, _ = counts.compare(rows, {"after": reduced}, [])
    for name, column in zip(("expected cost", "F1"), np.array(slow).T, strict=True):
        np.testing.assert_allclose(values["after"][name][1:], np.percentile(column, [2.5, 97.5]), rtol=1e-12)
    assert values["after"]["F1"][0] == counts.measures(*total(reduced), 0, task)["F1"]


def test_differences_are_paired(air):
    rows = air.rows(40)
    forecasts = [air.forecast(row, i) for i, row in enumerate(rows)]
    one = counts.reduce(rows, forecasts)
    two = counts.reduce(rows, [forecast["value"] * np.float32(1.02) for forecast in forecasts])
    values, differences = counts.compare(rows, {"a": one, "b": two, "c": one}, [("b", "a"), ("c", "a")])
    assert differences["c", "a"]["expected cost"] == (0, 0, 0)
    assert differences["c", "a"]["RMSE"] == (0, 0, 0)
    value, lo, hi = differences["b", "a"]["expected cost"]
    assert value == pytest.approx(values["b"]["expected cost"][0] - values["a"]["expected cost"][0])
    assert hi - lo < 0.5 * (values["a"]["expected cost"][2] - values["a"]["expected cost"][1])


def test_one_week_gives_no_interval(air):
    rows = air.rows(4)
    values, _ = counts.compare(rows, {"a": counts.reduce(rows, [air.forecast(row, 1) for row in rows])}, [])
    value, lo, hi = values["a"]["expected cost"]
    assert np.isfinite(value)
    assert np.isnan(lo)
    assert np.isnan(hi)


def test_weeks_are_drawn_whole_and_as_many_as_there_are():
    times = counts.draws(["b", "a", "b", "c"], count=500)
    assert (times[0] == 1).all()
    np.testing.assert_array_equal(times[:, 0], times[:, 2])
    assert (times[:, 0] + times[:, 1] + times[:, 3] == 3).all()
    assert times[1:].mean(axis=0) == pytest.approx(np.ones(4), abs=0.15)


def test_a_threshold_lies_on_its_own_roc_and_a_sharper_forecast_above_it(case):
    rows, completions = case
    completions = [completion.copy() for completion in completions]
    for completion in completions:
        completion["level"] = 2 * (completion["exceed"][..., 1] >= 0.3)
    weak = [completion.copy() for completion in completions]
    for completion in weak:
        noise = np.random.default_rng(1).normal(0, 0.3, completion.shape)
        completion["exceed"] = np.clip(completion["exceed"] + noise[..., None], 0, 1)
        completion["level"] = 0
    arms = {"own": counts.reduce(rows, completions)}
    values, _ = counts.compare(rows, arms, [])
    assert values["own"]["POD above the first ROC"] == pytest.approx((0, 0, 0), abs=1e-12)
    values, _ = counts.compare(rows, {"weak": counts.reduce(rows, weak)} | arms, [])
    assert values["own"]["POD above the first ROC"][1] > 0
    assert values["weak"]["POD above the first ROC"] == pytest.approx((0, 0, 0), abs=1e-12)


def test_a_year_of_forecasts_is_counted_in_about_a_second(air):
    rows = air.rows(120, leads=20, shape=(16, 24), stations=0.27)
    forecast = air.forecast(rows[0], 0)
    began = time.process_time()
    counts.reduce(rows, [forecast] * len(rows))
    assert time.process_time() - began < 3
