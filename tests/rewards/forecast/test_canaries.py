import subprocess
import sys

import numpy as np
import pytest

from core.scoring import Scorer
from rewards import forecast
from rewards.forecast import canaries

COSTS = {"pm2p5_cost": forecast.pm2p5_cost, "pm10_cost": forecast.pm10_cost}
REWARDS = COSTS | {
    "detected": forecast.detected,
    "no_false_alarm": forecast.no_false_alarm,
    "regional_alert": forecast.regional_alert,
    "event_duration": forecast.event_duration,
}
ALL = [
    *(canary for component in REWARDS for canary in forecast.broken_canaries(component)),
    *forecast.alert_canaries(),
    *forecast.cost_canaries(),
    *forecast.cost_canaries("pm10_cost", "pm10"),
]


def rows(make, scheme="korea", costs="agency"):
    """Windows with every class in each half of the map; and a quiet one, of clean air but for one cell."""
    windows = [make(seed=seed, shape=(4, 2, 6, 6), missing=0.3) for seed in (1, 2)]
    quiet = np.full((4, 2, 6, 6), 5, dtype=np.float32)
    quiet[:, :, 2] = np.nan
    quiet[1, :, 0, 0] = 500
    return [
        {"id": str(i), "window": window, "scheme": scheme, "costs": costs, "alert_share": 0.3}
        for i, window in enumerate([*windows, make(quiet, places=windows[0].places)])
    ]


@pytest.fixture(scope="module")
def scorer():
    with Scorer(REWARDS) as scorer:
        yield scorer


@pytest.mark.parametrize("scheme", forecast.SCHEMES)
@pytest.mark.parametrize("costs", forecast.PRESETS)
def test_gold_reaches_the_best_of_every_reward(make, scorer, scheme, costs):
    data = rows(make, scheme, costs)
    scores = scorer.score([forecast.gold(row) for row in data], data)
    np.testing.assert_array_equal(scores.values, np.ones((3, len(REWARDS))))
    assert scores.decisions.shape == (3, len(REWARDS), 4 * 2 * 6 * 6)


@pytest.mark.parametrize("canary", ALL, ids=lambda canary: f"{canary.component}-{canary.name}")
def test_no_canary_pays_and_none_is_a_failed_check(make, scorer, canary):
    data = rows(make)
    scores = scorer.score([canary.completion(row) for row in data], data)
    values = scores.values[:, scorer.names.index(canary.component)]
    assert not scores.failed.any()
    assert (canary.at_least <= values).all()
    assert (values <= canary.at_most).all()


def test_where_nothing_ever_happens_the_cost_canaries_are_wrong_all_the_same(make, scorer):
    window = make(np.full((4, 2, 6, 6), 5.0))
    window.past[:] = 5
    row = rows(make)[0] | {"window": window}
    for canary in forecast.cost_canaries():
        assert scorer.score([canary.completion(row)], [row]).values[0, 0] < 0.5, canary.name


@pytest.mark.parametrize("name", canaries.BROKEN)
def test_what_is_broken_is_refused_with_a_reason(make, scorer, name):
    data = rows(make)
    scores = scorer.score([canaries.BROKEN[name](forecast.gold(row)) for row in data], data)
    assert all(set(reasons) == set(REWARDS) for reasons in scores.reasons)
    assert (scores.values == 0).all()


@pytest.mark.parametrize("name", canaries.MISPLACED)
def test_the_truth_in_the_wrong_place_costs_much_where_the_air_is_not_clean(make, scorer, name):
    data = rows(make)[:2]
    hack = canaries.MISPLACED[name]
    values = scorer.score([hack(row) for row in data], data).values
    assert (values[:, :2] < 0.9).all()
    assert (values[:, 2:4].sum(axis=1) < 1.8).all()  # detected and no_false_alarm


def test_silence_and_alarm_pay_at_one_end_only(make, scorer):
    data = rows(make)
    detected, quiet = scorer.names.index("detected"), scorer.names.index("no_false_alarm")
    for hacks, loses, wins in ((canaries.SILENT, detected, quiet), (canaries.ALARMING, quiet, detected)):
        for hack in hacks.values():
            values = scorer.score([hack(row) for row in data], data).values
            np.testing.assert_array_equal(values[:, [loses, wins]], [[0, 1]] * 3)


def test_gold_is_the_truth_where_there_is_one(make):
    window = make()
    gold = forecast.gold({"window": window})
    seen = ~np.isnan(window.frames)
    np.testing.assert_array_equal(gold[seen], window.frames[seen])
    np.testing.assert_allclose(gold[1, 0][~seen[1, 0]], window.frames[1, 0][seen[1, 0]].mean(), rtol=1e-5)
    assert gold.dtype == np.float32
    assert (forecast.gold({"window": make(window.frames * np.nan)}) == 0).all()


def test_forecast_rewards_need_numpy_alone():
    code = (
        "import sys\n"
        "for name in ('torch', 'xarray', 'scores', 'scipy', 'pandas', 'core', 'data'): sys.modules[name] = None\n"
        "import numpy as np, rewards.forecast as forecast\n"
        "print(forecast.bayes_levels(np.array([0.9, 0.2, 0.1]), forecast.cost_matrix('exact', forecast.SCHEMES['korea'])))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "1"
