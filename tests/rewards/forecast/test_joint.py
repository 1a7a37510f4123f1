import re

import numpy as np
import pytest

from rewards.forecast.costs import cost_matrix
from rewards.forecast.decisions import bayes_levels
from rewards.forecast.joint import event_duration, regional_alert
from rewards.forecast.schemes import SCHEMES, classes

KOREA = SCHEMES["korea"]
NAN = np.nan


def row(*leads):
    """(L, 1, 1, X) from one row of cells a lead."""
    return np.array(leads, dtype=np.float32)[:, None, None, :]


def only_pm2p5(make, frames, **fields):
    return make(frames, variables=("pm2p5",), **fields)


def test_a_region_is_on_alert_by_the_share_of_its_observed_cells(make, score):
    places = [[1, 1, 1, 2, 2, 0]]
    window = only_pm2p5(make, row([60, 60, 10, 10, NAN, 10]), places=places, region_names={1: "a", 2: "b"})
    say = {
        "two of three": row([60, 10, 60, 10, 10, 10]),  # another cell than the truth's, and the region is right
        "one of three": row([60, 10, 10, 10, 60, 10]),  # missed in a; the alert in b is at a cell that nobody observed
        "false in b": row([60, 60, 60, 60, 10, 60]),
    }
    found = [s.value[0, 0, 0] for s in score(regional_alert, say.values(), window, alert_share=0.5)]
    np.testing.assert_allclose(found[0], [1, 1, 1, 1, NAN, NAN], rtol=1e-6)
    np.testing.assert_allclose(found[1], [0.3, 0.3, 0.3, 1, NAN, NAN], rtol=1e-6)
    np.testing.assert_allclose(found[2], [1, 1, 1, 0.7, NAN, NAN], rtol=1e-6)


@pytest.mark.parametrize(("count", "share"), [(7, 0.7), (3, 0.3), (6, np.float64(0.6)), (7, np.float64(0.7))])
def test_exactly_the_share_is_an_alert(make, score, count, share):
    truth = [60] * count + [10] * (10 - count)
    window = only_pm2p5(make, row(truth), places=[[1] * 10], region_names={1: "a"})
    assert score(regional_alert, [row(truth[::-1])], window, alert_share=share)[0].value.min() == 1
    less = row([60] * (count - 1) + [10] * (11 - count))
    assert score(regional_alert, [less], window, alert_share=share)[0].value.max() == pytest.approx(0.3)


@pytest.mark.parametrize("name", SCHEMES)
def test_regional_alerts_equal_a_loop(rng, make, score, name):
    scheme, window = SCHEMES[name], make(seed=4, missing=0.6)
    forecasts = rng.gamma(0.9, 60.0, (2, 4, 2, 5, 6)).astype(np.float32)
    values = np.stack([s.value for s in score(regional_alert, forecasts, window, scheme=name, alert_share=0.4)])
    matrix, expected, kinds = cost_matrix("agency", scheme), np.full(forecasts.shape, NAN), set()
    for i, lead, v, number in ((i, j, v, r) for i in range(2) for j in range(4) for v in range(2) for r in (3, 7)):
        edge = scheme.edges[window.variables[v]][scheme.alert - 1]
        inside = [
            (y, x) for y, x in np.ndindex(5, 6) if window.places[y, x] == number and window.frames[lead, v, y, x] >= 0
        ]
        if not inside:
            continue
        announced, observed = (
            sum(field[place] >= edge for place in inside) / len(inside) >= 0.4
            for field in (forecasts[i, lead, v], window.frames[lead, v])
        )
        kinds.add((announced, observed))
        cost = matrix[scheme.alert - 1 + observed, scheme.alert - 1 + announced] if announced != observed else 0
        for y, x in inside:
            expected[i, lead, v, y, x] = 1 - cost
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert len(kinds) == 4


@pytest.mark.parametrize("share", [0, -0.1, 1.5, NAN])
def test_a_share_that_cannot_be_is_refused(make, score, share):
    with pytest.raises(ValueError, match=re.escape(f"alert_share={share}; it is the share")):
        score(regional_alert, [np.ones((4, 2, 5, 6), dtype=np.float32)], make(), alert_share=share)


def test_duration_is_that_of_the_observed_leads(make, score):
    # alert observed at 2 of 4 leads; at 2 of 3 observed ones; never; nothing observed
    window = only_pm2p5(make, row([60, 60, 10, NAN], [60, 60, 10, NAN], [10, NAN, 10, NAN], [10, 10, 10, NAN]))
    one_late = row([10, 60, 10, 60], [60, 60, 10, 60], [60, 10, 10, 60], [10, 10, 10, 60])
    one_long = row([60, 60, 60, 60], [60, 60, 60, 60], [60, 60, 60, 60], [60, 60, 10, 60])
    late, long = (s.value for s in score(event_duration, [one_late, one_long], window))
    np.testing.assert_array_equal(late[:, 0, 0, 0], np.ones(4))  # when it was is not asked
    np.testing.assert_allclose(long[:, 0, 0, 0], np.full(4, 1 - 2 / 4))
    np.testing.assert_allclose(long[:, 0, 0, 1], [1 - 1 / 3, 1 - 1 / 3, NAN, 1 - 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(long[:, 0, 0, 2], np.full(4, 1 - 3 / 4))
    assert np.isnan(long[:, 0, 0, 3]).all()


def test_duration_equals_a_loop(rng, make, score):
    window = make(seed=6)
    forecast = rng.gamma(0.9, 60.0, window.frames.shape).astype(np.float32)
    value = score(event_duration, [forecast], window)[0].value
    for v, y, x in np.ndindex(2, 5, 6):
        edge = KOREA.edges[window.variables[v]][1]
        leads = [lead for lead in range(4) if window.frames[lead, v, y, x] >= 0]
        hours = [sum(field[lead, v, y, x] >= edge for lead in leads) for field in (forecast, window.frames)]
        for lead in range(4):
            expected = 1 - abs(hours[0] - hours[1]) / len(leads) if lead in leads else NAN
            np.testing.assert_allclose(value[lead, v, y, x], expected, rtol=1e-6)


def test_a_bad_completion_has_zero_where_a_cell_is_observed(make, score):
    window = make(missing=0.7)
    good = np.where(np.isnan(window.frames), 1, window.frames)
    for reward, inside in ((regional_alert, window.places > 0), (event_duration, window.places >= 0)):
        fine, bad = score(reward, [good, good * NAN], window)
        expected = np.where(~np.isnan(window.frames) & inside, 0, NAN)
        np.testing.assert_array_equal(bad.value, expected)
        np.testing.assert_array_equal(fine.value, expected + 1)
        assert bad.reason == "not_finite"


def test_the_best_forecast_of_a_region_is_not_that_of_its_cells(make, score):
    """Exactly one of three cells is in the plume, each as likely; an alert is asked for when one is. Equal costs."""
    worlds = [row([60 if x == hit else 10 for x in range(3)]) for hit in range(3)]
    exceed = np.array([0.5, 1 / 3, 0.0])  # a third for each cell's alert
    cell = bayes_levels(exceed, 1 - np.eye(4))
    assert cell < KOREA.alert
    middle = np.array([10, 20, 60, 100])[cell]

    def mean(forecast):
        windows = [only_pm2p5(make, w, places=[[1, 1, 1]], region_names={1: "a"}, seed=i) for i, w in enumerate(worlds)]
        scores = score(regional_alert, [forecast] * 3, windows, costs="exact", alert_share=0.3)
        return np.mean([s.value for s in scores])

    assert mean(row([middle] * 3)) == 0
    assert mean(row([60, 10, 10])) == 1  # no threshold on equal probabilities gives this field


def test_the_best_duration_is_not_that_of_its_leads(make, score):
    """An episode of one lead of three, each as likely: pointwise the best is none, for the duration it is one."""
    worlds = [row(*[[60 if lead == hit else 10] for lead in range(3)]) for hit in range(3)]
    assert classes(np.float32(10), KOREA.edges["pm2p5"]) == bayes_levels(np.array([1 / 3, 1 / 3, 0.0]), 1 - np.eye(4))

    def mean(forecast):
        windows = [only_pm2p5(make, w, seed=i) for i, w in enumerate(worlds)]
        return np.mean([s.value for s in score(event_duration, [forecast] * 3, windows)])

    assert mean(row([10], [10], [10])) == pytest.approx(2 / 3)
    assert mean(row([60], [10], [10])) == 1
