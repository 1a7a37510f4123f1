import warnings
from itertools import combinations_with_replacement

import numpy as np
import pytest

from apps.air_quality import baselines, counts
from rewards.forecast import fields
from rewards.forecast.costs import cost_matrix, pm2p5_cost
from rewards.forecast.decisions import bayes_levels
from rewards.forecast.joint import regional_alert
from rewards.forecast.metrics import expected_cost
from rewards.forecast.schemes import SCHEMES

KOREA = SCHEMES["korea"]
EDGES = np.array(KOREA.of(("pm2p5", "pm10")))
COSTS = cost_matrix("agency", KOREA)
LEARNED = (
    *(baselines.plain_mse, baselines.class_weighted, baselines.tuned_threshold, baselines.tuned_threshold_per_lead),
    *(baselines.quantile_mapping, baselines.bayes_decision, baselines.bayes_per_lead),
)
FREE = (baselines.persistence, baselines.climatology, baselines.analysis_model)


@pytest.fixture
def rivals(air):
    train, validation = air.rows(40, first="2021-01-01T00"), air.rows(40, first="2022-01-01T00")
    return air.Rivals(train, validation, air.rows(12, first="2023-01-01T00"))


def cost(rows, forecasts):
    return counts.measures(*total(rows, forecasts), 0, counts.Task.of(rows))["expected cost"]


def total(rows, forecasts):
    reduced = counts.reduce(rows, forecasts)
    return reduced.confusion.sum((0, 1)), reduced.sums.sum((0, 1))


# -- free -----------------------------------------------------------------------------------------------------------------


def test_persistence_is_the_last_known_field_at_every_lead(air):
    rows = air.rows(3)
    for row, forecast in zip(rows, baselines.persistence([], rows), strict=True):
        last = row["window"].history()[-1]
        assert forecast.shape == (4, 2, 5, 6)
        for lead in forecast:
            np.testing.assert_array_equal(lead["value"], last)
            np.testing.assert_array_equal(lead["level"][1], np.digitize(last[1], [30, 80, 150]))


def test_the_analysis_models_forecast_is_taken_as_it_is(air):
    rows = air.rows(3)
    for row, forecast in zip(rows, baselines.analysis_model([], rows), strict=True):
        np.testing.assert_array_equal(forecast["value"], row["window"].model())
        np.testing.assert_array_equal(forecast["level"][:, 0], np.digitize(row["window"].model()[:, 0], [15, 35, 75]))


def test_gaps_of_the_analysis_model_are_filled_and_counted_aloud(air):
    train, rows = air.rows(20, first="2021-01-01T00"), air.rows(3)
    rows[1]["window"]._model = None
    rows[2]["window"]._model[1, 0, 2, 3] = np.nan
    with pytest.warns(UserWarning, match="from 2 of 3 initial times"):
        made = baselines.analysis_model(train, rows)
    np.testing.assert_array_equal(made[1]["value"], baselines.persistence(train, rows)[1]["value"])
    assert made[2]["value"][1, 0, 2, 3] == baselines.climatology(train, rows)[2]["value"][1, 0, 2, 3]
    np.testing.assert_array_equal(made[2]["value"][0], rows[2]["window"].model()[0])


def test_an_archive_without_model_forecasts_has_no_such_baseline(air):
    rows = air.rows(2)
    for row in rows:
        row["window"]._model = None
    assert baselines.analysis_model([], rows) is None


# -- learned --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", [*FREE, *LEARNED], ids=lambda baseline: baseline.__name__)
def test_a_baseline_gives_a_whole_structured_forecast_a_row_and_sees_no_truth_of_the_test_rows(air, rivals, baseline):
    def made():
        found = baseline(rivals) if baseline in LEARNED else baseline(rivals.train, rivals.test)
        return [np.array(forecast) for forecast in found]

    first = made()
    assert len(first) == len(rivals.test)
    for forecast in first:
        assert fields.form_fault(forecast, (4, 2, 5, 6), EDGES) is None
        assert forecast.dtype == fields.dtype(3)
    assert fields.content_faults(np.stack(first), EDGES) == [None] * len(first)
    for row in rivals.test:
        row["window"]._observed = row["window"]._observed[::-1, ::-1, ::-1] * 3
    rivals.kept.clear()
    for forecast, again in zip(first, made(), strict=True):
        assert forecast.tobytes() == again.tobytes()


def test_plain_and_weighted_starts_announce_the_class_of_their_mean(rivals):
    for baseline, name in (
        (baselines.plain_mse, "gaussian mean none"),
        (baselines.class_weighted, "gaussian mean class"),
    ):
        for row, forecast in zip(rivals.test, baseline(rivals), strict=True):
            value = rivals.actors[name].forecast(row)["value"]
            np.testing.assert_array_equal(forecast["value"], value)
            np.testing.assert_array_equal(forecast["level"], fields.levels(value, EDGES))
            np.testing.assert_array_equal(forecast["exceed"][..., 2], forecast["level"] == 3)


def on_validation(rivals, baseline):
    """Cost of a baseline on the rows that it was tuned on."""
    rivals.test = rivals.validation
    rivals.kept.clear()
    return cost(rivals.validation, baseline(rivals))


def test_tuned_thresholds_are_the_best_there_are_on_validation(rivals):
    rows, actor = rivals.validation, rivals.actors["gaussian mean none"]
    forecasts = [actor.forecast(row)["value"] for row in rows]
    observed = np.stack([row["window"].observed() for row in rows])
    value = np.stack(forecasts)
    seen = np.isfinite(observed[:, :, 0])
    true = np.digitize(observed[:, :, 0][seen], EDGES[0])
    least = min(
        COSTS[true, np.digitize(value[:, :, 0][seen], chosen)].mean()
        for chosen in combinations_with_replacement(np.arange(2.0, 90, 3), 3)
    )
    costs = {name: on_validation(rivals, getattr(baselines, name)) for name in ("plain_mse", "tuned_threshold")}
    confusion = total(rows, baselines.tuned_threshold(rivals))[0][0]
    assert (confusion * COSTS).sum() / confusion.sum() <= least
    assert on_validation(rivals, baselines.tuned_threshold_per_lead) < costs["tuned_threshold"] < costs["plain_mse"]


def test_quantile_mapping_gives_the_validation_rows_the_distribution_that_was_observed(rivals):
    for row in rivals.validation:
        row["window"]._observed[:] = np.where(
            np.isnan(row["window"]._observed), row["window"]._analysis, row["window"]._observed
        )
    rivals.test = rivals.validation
    made = np.stack(list(baselines.quantile_mapping(rivals)))["value"]
    observed = np.stack([row["window"].observed() for row in rivals.validation])
    for lead, variable in np.ndindex(4, 2):
        got, wanted = (np.quantile(part[:, lead, variable], [0.1, 0.5, 0.9]) for part in (made, observed))
        np.testing.assert_allclose(got, wanted, rtol=0.05)


def test_quantile_mapping_shifts_what_lies_beyond_and_stays_above_zero(air, rivals):
    actor = rivals.actors["gaussian mean none"]
    actor.bias = 3.0  # so that the lowest values are shifted down
    forecasts = baselines.quantile_mapping(rivals)
    largest = max(actor.forecast(row)["value"][0, 0].max() for row in rivals.validation)
    far = air.forecast(rivals.test[0], 0)
    far["value"] = np.linspace(0, 10 * largest, far["value"].size).reshape(far["value"].shape)
    actor.forecast = lambda row: far
    rivals.kept = {key: value for key, value in rivals.kept.items() if key[0] == "validation"}
    mapped = baselines.quantile_mapping(rivals)[0]["value"]
    assert len(forecasts) == len(rivals.test)
    assert mapped.min() >= 0
    beyond = far["value"][3, 1]
    assert (beyond > largest * 2).all()
    np.testing.assert_allclose(mapped[3, 1] - beyond, (mapped[3, 1] - beyond)[0, 0], rtol=1e-3)


def test_bayes_decision_changes_what_is_announced_and_nothing_else(rivals):
    for row, forecast in zip(rivals.test, baselines.bayes_decision(rivals), strict=True):
        start = rivals.start.forecast(row)
        np.testing.assert_array_equal(forecast["level"], bayes_levels(start["exceed"], COSTS))
        for name in ("value", "exceed", "members"):
            np.testing.assert_array_equal(forecast[name], start[name])


def test_bayes_decision_costs_least_where_the_probabilities_are_right(rivals):
    rivals.test = rows = rivals.train
    start, rng = [rivals.start.forecast(row) for row in rows], np.random.default_rng(0)
    for row, forecast in zip(rows, start, strict=True):
        one = np.take_along_axis(forecast["members"], rng.integers(0, 8, (4, 2, 5, 6, 1)), -1)[..., 0].astype(
            np.float32
        )
        row["window"]._observed = np.where(np.isnan(row["window"]._observed), np.nan, one)
    least = cost(rows, baselines.bayes_decision(rivals))
    assert least < 0.95 * cost(rows, start)
    for chance in (0.2, 0.3, 0.4, 0.5):
        numbers = np.full(4, chance)
        rival = [baselines.at_probability(f, row, numbers) for f, row in zip(start, rows, strict=True)]
        assert least < cost(rows, rival)


def test_thresholds_on_probabilities_are_tuned_at_each_lead(rivals):
    blunt = rivals.start.forecast

    def forecast(row):
        made = blunt(row)
        made["exceed"][1] *= 0.5  # at the second lead the probabilities are half of what they should be
        return made

    rivals.start.forecast = forecast
    announced = [(one["level"][1, 0] >= 2).mean() for one in baselines.bayes_per_lead(rivals)]
    naive = [(one["level"][1, 0] >= 2).mean() for one in baselines.bayes_decision(rivals)]
    assert np.mean(announced) > 1.3 * np.mean(naive)
    assert on_validation(rivals, baselines.bayes_per_lead) < on_validation(rivals, baselines.bayes_decision)


def test_a_threshold_on_one_probability_is_the_best_of_all(air):
    rng = np.random.default_rng(0)
    for _ in range(20):
        exceed = rng.integers(0, 8, (30, 1)).astype(np.float32) / 8
        observed, costs = rng.integers(0, 2, 30), np.array([[0, 0.3], [0.8, 0]])
        found = baselines.tune_probabilities(exceed, observed, costs)
        least = min(costs[observed, (exceed[:, 0] >= t).astype(int)].sum() for t in [*np.arange(9) / 8, np.inf])
        assert costs[observed, baselines.reached(exceed, found)].sum() == pytest.approx(least)


def test_thresholds_on_several_probabilities_never_cost_more_than_halves(air):
    rng = np.random.default_rng(1)
    for _ in range(20):
        exceed = np.sort(rng.random((200, 3)), axis=1)[:, ::-1].astype(np.float16).astype(np.float32)
        observed = (rng.random((200, 1)) < exceed).sum(axis=1)

        def mean(thresholds, exceed=exceed, observed=observed):
            return COSTS[observed, baselines.reached(exceed, np.asarray(thresholds))].mean()

        found = baselines.tune_probabilities(exceed, observed, COSTS)
        assert mean(found) <= mean([0.5, 0.5, 0.5])
        for e in range(3):
            moves = [[*found[:e], t, *found[e + 1 :]] for t in (*np.linspace(0, 1, 41), np.inf)]
            assert mean(found) <= min(map(mean, moves)) + 1e-12


def test_announcing_other_classes_leaves_the_forecast_itself_alone(rivals):
    start = rivals.start.forecast(rivals.test[0])
    before = start.copy()
    assert (baselines.with_levels(start, 3)["level"] == 3).all()
    assert start.tobytes() == before.tobytes()


def test_the_highest_class_that_reaches_its_threshold_is_announced():
    exceed = np.array([[0.9, 0.5, 0.1], [0.2, 0.1, 0.0], [0.9, 0.2, 0.2]])
    np.testing.assert_array_equal(baselines.reached(exceed, np.array([0.5, 0.5, 0.2])), [2, 0, 3])


def test_a_start_forecasts_the_rows_once_for_all_that_use_it(rivals):
    for baseline in LEARNED:
        list(baseline(rivals))
    both = len(rivals.validation) + len(rivals.test)
    assert rivals.actors["gaussian mean none"].asked == rivals.start.asked == both
    assert rivals.actors["gaussian mean class"].asked == len(rivals.test)


@pytest.mark.parametrize("baseline", LEARNED, ids=lambda baseline: baseline.__name__)
def test_a_variable_without_observations_keeps_its_untuned_decisions(rivals, baseline):
    usual = [forecast["level"][:, 0] for forecast in baseline(rivals)]
    for row in rivals.validation:
        row["window"]._observed[:, 1] = np.nan
    rivals.kept.clear()
    made = list(baseline(rivals))
    np.testing.assert_array_equal([forecast["level"][:, 0] for forecast in made], usual)
    if baseline in (baselines.tuned_threshold, baselines.tuned_threshold_per_lead, baselines.quantile_mapping):
        plain = np.stack([forecast["level"][:, 1] for forecast in baselines.plain_mse(rivals)])
        np.testing.assert_array_equal([forecast["level"][:, 1] for forecast in made], plain)


def test_a_policy_that_forecasts_fewer_leads_than_the_data_is_tuned_at_these(rivals):
    for actor in (rivals.start, *rivals.actors.values()):
        actor.forecast = lambda row, whole=actor.forecast: whole(row)[:3]
    for baseline in LEARNED:
        assert [len(forecast) for forecast in baseline(rivals)] == [3] * len(rivals.test)


@pytest.mark.parametrize("rows", [0, 5])
def test_no_validation_cases_is_an_error_that_says_what_to_set(rivals, rows):
    rivals.validation = rivals.validation[:rows]
    for row in rivals.validation:
        row["window"]._observed[:] = np.nan
    with pytest.raises(ValueError, match=rf"the {rows} validation rows.*data\.validation"):
        baselines.tuned_threshold(rivals)


# -- any reward -----------------------------------------------------------------------------------------------------------


def mean_reward(reward, rows, forecasts, **columns):
    names = {name: [row[name] for row in rows] for name in ("window", "scheme", "costs")} | columns
    values = np.stack([score.value for score in reward(list(forecasts), **names)])
    return np.nanmean(values)


def test_tuning_for_a_reward_of_single_cells_finds_the_best_of_the_grid(rivals):
    rows = rivals.validation
    forecasts = [rivals.start.forecast(row) for row in rows]
    grid = np.linspace(0.1, 0.9, 9)
    for decide in (baselines.at_probability, baselines.scaled):
        numbers = baselines.tune_for(pm2p5_cost, rows, forecasts, decide, grid)
        assert (numbers == numbers[0]).all()
        values = [
            mean_reward(
                pm2p5_cost, rows, [decide(f, row, np.full(4, t)) for f, row in zip(forecasts, rows, strict=True)]
            )
            for t in grid
        ]
        assert numbers[0] == grid[np.argmax(values)]
        (one, *_) = (decide(f, row, numbers) for f, row in zip(forecasts, rows, strict=True))
        np.testing.assert_array_equal(one["exceed"], forecasts[0]["exceed"])


def test_each_stretch_of_leads_has_a_number_of_its_own(rivals):
    rows = rivals.validation
    forecasts = [rivals.start.forecast(row) for row in rows]
    for forecast in forecasts:
        forecast["value"][:2] *= 2  # too high by half of the leads
    grid = [0.5, 0.7, 1.0, 1.4, 2.0, 2.8]
    one = baselines.tune_for(pm2p5_cost, rows, forecasts, baselines.scaled, grid)
    two = baselines.tune_for(pm2p5_cost, rows, forecasts, baselines.scaled, grid, groups=2)
    assert two[0] == two[1] > 1.9 * two[2] == 1.9 * two[3]

    def mean(numbers):
        made = [baselines.scaled(f, row, numbers) for f, row in zip(forecasts, rows, strict=True)]
        return mean_reward(pm2p5_cost, rows, made)

    assert mean(two) > mean(one)


def test_tuning_for_a_region_beats_tuning_for_cells_at_the_regions_reward(rivals):
    rows = [row | {"alert_share": 0.6} for row in rivals.validation]
    forecasts = [rivals.start.forecast(row) for row in rows]
    grid = np.linspace(0.05, 0.95, 19)

    def mean(numbers):
        made = [baselines.at_probability(f, row, numbers) for f, row in zip(forecasts, rows, strict=True)]
        return mean_reward(regional_alert, rows, made, alert_share=[0.6] * len(rows))

    cells = baselines.tune_for(pm2p5_cost, rows, forecasts, baselines.at_probability, grid)
    region = baselines.tune_for(regional_alert, rows, forecasts, baselines.at_probability, grid)
    assert mean(region) == max(mean(np.full(4, t)) for t in grid)
    assert mean(region) > mean(cells)


def test_a_metric_of_which_less_is_better_is_tuned_downward(rivals):
    rows = rivals.validation
    forecasts = [rivals.start.forecast(row) for row in rows]
    grid = np.linspace(0.1, 0.9, 9)
    numbers = baselines.tune_for(expected_cost, rows, forecasts, baselines.at_probability, grid, lower=True)
    costs = [
        cost(rows, [baselines.at_probability(f, row, np.full(4, t)) for f, row in zip(forecasts, rows, strict=True)])
        for t in grid
    ]
    assert numbers[0] == grid[np.argmin(costs)]


def test_nothing_is_said_where_the_archive_is_whole(air):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        baselines.analysis_model([], air.rows(2))
