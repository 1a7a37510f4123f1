import numpy as np
import pytest
import xarray
from scores.categorical import ThresholdEventOperator

from rewards.forecast.events import Counts, alerts, confusion, contingency

RATES = (
    *("accuracy", "base_rate", "forecast_rate", "frequency_bias", "probability_of_detection", "false_alarm_rate"),
    *("false_alarm_ratio", "success_ratio", "specificity", "negative_predictive_value", "critical_success_index"),
    *("f1_score", "equitable_threat_score", "peirce_skill_score", "heidke_skill_score", "odds_ratio"),
    *("odds_ratio_skill_score", "symmetric_extremal_dependence_index"),
)


def random_pair(rng, shape=(6, 7, 8)):
    forecast, observed = rng.gamma(1.0, 30.0, shape), rng.gamma(1.0, 30.0, shape)
    forecast[rng.random(shape) < 0.2] = np.nan
    observed[rng.random(shape) < 0.3] = np.nan
    return forecast, observed


def counted(forecast, observed, threshold, axis=None):
    return contingency(forecast >= threshold, observed >= threshold, ~np.isnan(forecast) & ~np.isnan(observed), axis)


def test_every_rate_is_listed_here():
    methods = {name for name in vars(Counts) if not name.startswith("_")} - {"sum", "total", "tp", "fp", "fn", "tn"}
    assert methods == set(RATES)


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # of scores, in the index of extremes
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("threshold", [5.0, 35.0, 200.0])  # 200: rare enough for tables with empty cells
def test_rates_equal_those_of_scores_on_random_fields_with_nan(rng, rate, threshold):
    forecast, observed = random_pair(rng)
    forecast[0, 0, :2], observed[0, 0, 1:3] = threshold, threshold  # on the edge is an event
    dims = ("lead", "y", "x")
    manager = ThresholdEventOperator(default_event_threshold=threshold).make_contingency_manager(
        xarray.DataArray(forecast, dims=dims), xarray.DataArray(observed, dims=dims)
    )
    whole, by_lead = manager.transform(), manager.transform(preserve_dims="lead")
    np.testing.assert_allclose(
        getattr(counted(forecast, observed, threshold), rate)(), getattr(whole, rate)(), rtol=1e-9
    )
    ours = getattr(counted(forecast, observed, threshold, axis=(1, 2)), rate)()
    np.testing.assert_allclose(ours, getattr(by_lead, rate)(), rtol=1e-9)


def test_rates_of_the_worked_table():
    table = Counts(tp=30, fp=10, fn=20, tn=140)  # arXiv 2511.22169: FAR, POD, precision, F1, CSI, ETS, TSS, bias
    names = ("false_alarm_rate", "probability_of_detection", "success_ratio", "f1_score", "critical_success_index")
    found = [
        getattr(table, name)() for name in (*names, "equitable_threat_score", "peirce_skill_score", "frequency_bias")
    ]
    np.testing.assert_allclose(
        found, [0.0666666666667, 0.6, 0.75, 0.666666666667, 0.5, 0.4, 0.533333333333, 0.8], rtol=1e-9
    )
    assert table.false_alarm_ratio() == 0.25
    assert table.total == 200


def test_the_rate_of_nothing_is_nan_and_not_zero():
    quiet = Counts(tp=0, fp=0, fn=0, tn=9)
    assert np.isnan([quiet.probability_of_detection(), quiet.false_alarm_ratio(), quiet.f1_score()]).all()
    assert quiet.false_alarm_rate() == 0
    assert Counts(tp=3, fp=2, fn=0, tn=4).odds_ratio() == np.inf


def test_pooled_counts_give_the_rate_of_all_cases(rng):
    forecast, observed = random_pair(rng)
    by_lead = counted(forecast, observed, 35.0, axis=(1, 2))
    halves = [Counts(*(count[part].sum() for count in (by_lead.tp, by_lead.fp, by_lead.fn, by_lead.tn)))
              for part in (slice(0, 2), slice(2, None))]  # fmt: skip
    whole = counted(forecast, observed, 35.0)
    for table in (by_lead.sum(), halves[0] + halves[1]):
        assert table.f1_score() == whole.f1_score()
        assert table.total == whole.total == np.count_nonzero(~np.isnan(forecast + observed))


def test_confusion_counts_pairs_by_group_and_leaves_missing_out(rng):
    observed, announced = rng.integers(-1, 4, (3, 5, 6)), rng.integers(-1, 4, (3, 5, 6))
    region = rng.integers(-1, 2, (5, 6))
    expected = np.zeros((2, 4, 4), dtype=int)
    for lead, y, x in np.ndindex(3, 5, 6):
        o, a, g = observed[lead, y, x], announced[lead, y, x], region[y, x]
        if min(o, a, g) >= 0:
            expected[g, o, a] += 1
    np.testing.assert_array_equal(confusion(observed, announced, 4, region, 2), expected)
    assert confusion(observed, announced, 4).shape == (1, 4, 4)


def test_alerts_of_a_confusion_table_are_the_contingency_of_its_classes(rng):
    observed, announced = rng.integers(0, 4, 500), rng.integers(0, 4, 500)
    found = alerts(confusion(observed, announced, 4), 2)
    expected = contingency(announced >= 2, observed >= 2, np.ones(500, dtype=bool))
    for name in ("tp", "fp", "fn", "tn"):
        assert getattr(found, name)[0] == getattr(expected, name) > 0
