import json
import time
from dataclasses import asdict

import numpy as np
import pytest

from apps.air_quality import counts, verification
from rewards.forecast import fields
from rewards.forecast.schemes import SCHEMES

EDGES = np.array(SCHEMES["korea"].of(("pm2p5", "pm10")))


@pytest.fixture
def shown(air):
    """60 rows over six weeks and two seasons; four arms, of which "noisy" is the best baseline and "worst" is not."""
    rows = air.rows(60, first="2023-02-06T00")

    def reduced(skill, plain=False):
        made = [air.forecast(row, i, skill) for i, row in enumerate(rows)]
        return counts.reduce(rows, [one["value"] for one in made] if plain else made)

    return rows, {
        "before": reduced(0.5),
        "after": reduced(0.3),
        "noisy": reduced(0.6, True),
        "worst": reduced(1.5, True),
    }


def named(tables, part):
    (found,) = [table for table in tables if part in table.title]
    return found


def column(table, name, where):
    """The cell of the line that begins with `where`, under a column whose title begins with `name`."""
    place = next(i for i, title in enumerate(table.columns) if title.startswith(name))
    (line,) = [line for line in table.rows if line[: len(where)] == where]
    return line[place]


def test_every_arm_is_in_the_first_table_with_its_pooled_numbers(shown):
    rows, arms = shown
    first = verification.tables(rows, arms)[0]
    assert [line[0] for line in first.rows] == list(arms)
    assert "PM2.5 bad or worse" in first.title
    assert "PM2.5 1, PM10 0.3" in first.note
    task = counts.Task.of(rows)
    for name, arm in arms.items():
        found = counts.measures(arm.confusion.sum((0, 1)), arm.sums.sum((0, 1)), 0, task)
        for key in ("expected cost", "false alarm rate", "false alarm ratio", "POD", "RMSE"):
            assert column(first, key, (name,)) == found[key]


def test_false_alarms_are_named_with_their_formulas(shown):
    rows, arms = shown
    for table in verification.tables(rows, arms):
        assert "false alarm rate" not in table.columns
        assert "false alarm ratio" not in table.columns
    first = verification.tables(rows, arms)[0]
    assert {"false alarm rate FP/(FP+TN)", "false alarm ratio FP/(TP+FP)"} <= set(first.columns)


def test_the_best_baseline_is_that_of_least_cost_and_stands_beside_the_policies(shown):
    rows, arms = shown
    assert verification.headline(rows, arms) == {"before": "before", "after": "after", "noisy": "noisy (best baseline)"}
    intervals = named(verification.tables(rows, arms), "intervals by week")
    assert intervals.columns[1:] == (
        *("before", "after", "noisy (best baseline)", "after - before", "after - noisy (best baseline)"),
    )
    values, differences = counts.compare(
        rows, {name: arms[name] for name in ("before", "after")}, [("after", "before")]
    )
    told = column(intervals, "after - before", ("expected cost",))
    assert told == "{:.3f} [{:.3f}, {:.3f}]".format(*differences["after", "before"]["expected cost"])
    assert differences["after", "before"]["expected cost"][2] < 0
    assert column(intervals, "before", ("RMSE",)).startswith(f"{values['before']['RMSE'][0]:.3f} [")


@pytest.mark.parametrize("names", [("before", "after"), ("model", "noisy"), ("model",), ("noisy", "worst")])
def test_any_arms_will_do(shown, names):
    rows, arms = shown
    arms = {name: arms[name if name != "model" else "after"] for name in names}
    assert verification.plots(rows, arms)
    intervals = named(verification.tables(rows, arms), "intervals by week")
    pairs = [title for title in intervals.columns if " - " in title]
    assert (
        pairs
        == {
            ("before", "after"): ["after - before"],
            ("model", "noisy"): ["model - noisy (best baseline)"],
            ("model",): [],
            ("noisy", "worst"): [],
        }[names]
    )


def test_leads_seasons_regions_and_classes_share_out_the_cases(shown):
    rows, arms = shown
    tables = verification.tables(rows, arms)
    cases = column(named(tables, "PM2.5 bad or worse, every arm, further"), "cases", ("after",))
    by_lead, by_season, by_region, by_class = (
        named(tables, f"by {name}") for name in ("lead", "season", "region", "observed")
    )
    of = {
        "lead": sum(column(by_lead, "cases", (f"{hours} h", "after")) for hours in (6, 12, 18, 24)),
        "season": sum(column(by_season, "cases", (name, "after")) for name in ("DJF", "MAM")),
        "class": sum(column(by_class, "cases", (name, "after")) for name in SCHEMES["korea"].classes),
    }
    assert set(of.values()) == {cases}
    cold = [i for i, row in enumerate(rows) if row["month"] <= 2]
    assert column(by_season, "cases", ("DJF", "after")) == arms["after"].confusion[cold][:, :, 0].sum()
    outside = arms["after"].confusion[:, :, 0].sum() - arms["after"].regional[:, :, 0].sum()
    assert sum(column(by_region, "cases", (name, "after")) for name in ("north", "south")) == cases - outside
    assert column(by_region, "POD", ("sea", "after")) is None
    assert column(by_region, "cases", ("sea", "after")) == 0


def test_the_share_alerted_of_an_observed_class_is_what_was_announced(shown):
    rows, arms = shown
    table = named(verification.tables(rows, arms), "by observed class")
    confusion = arms["after"].confusion.sum((0, 1))[0]
    assert column(table, "alerted", ("bad", "after")) == confusion[2, 2:].sum() / confusion[2].sum()
    assert column(table, "announced exactly", ("good", "after")) == confusion[0, 0] / confusion[0].sum()
    task = counts.Task.of(rows)
    assert column(table, "cost", ("very bad", "after")) == confusion[3] @ task.costs[3] / confusion[3].sum()


def test_tables_and_plots_can_be_written_as_json_without_nan_in_tables(shown):
    rows, arms = shown
    json.dumps([asdict(table) for table in verification.tables(rows, arms)], allow_nan=False)
    json.dumps([asdict(plot) for plot in verification.plots(rows, arms)])
    for table in verification.tables(rows, arms):
        assert {len(line) for line in table.rows} == {len(table.columns)}


def test_roc_has_a_curve_for_probabilities_and_a_point_for_every_arm(shown):
    rows, arms = shown
    roc = verification.plots(rows, arms)[0]
    assert list(roc.lines) == ["before, probabilities", "after, probabilities", *arms]
    for name in arms:
        assert [len(part) for part in roc.lines[name]] == [1, 1]
    x, y = roc.lines["after, probabilities"]
    assert (x[0], y[0], x[-1], y[-1]) == (1, 1, 0, 0)
    assert (np.diff(x) <= 0).all()


def test_no_line_of_a_plot_is_empty(shown):
    rows, arms = shown
    wrong = [np.where(row["window"].observed() >= EDGES[:, 1, None, None], 3, 500).astype(np.float32) for row in rows]
    plots = verification.plots(rows, {"before": arms["before"], "after": counts.reduce(rows, wrong)})
    for plot in plots:
        assert all(np.isfinite(y).any() and len(x) == len(y) for x, y in plot.lines.values()), plot.title
    assert not any("after" in plot.lines for plot in plots if plot.title.startswith("Relative economic value"))


def test_value_is_drawn_where_there_is_some_and_peaks_at_the_base_rate(shown):
    rows, arms = shown
    (plot,) = [plot for plot in verification.plots(rows, arms) if "value" in plot.title]
    x, y = map(np.array, plot.lines["after"])
    counted = arms["after"].confusion[:, :, 0].sum((0, 1))
    base = counted[2:].sum() / counted.sum()
    assert abs(x[np.nanargmax(y)] - base) < 0.03
    best = np.array(plot.lines["after, best threshold"][1])
    assert (best[np.isfinite(y)] >= y[np.isfinite(y)] - 0.05).all()
    assert np.nanmin(y) >= 0


def test_arms_that_were_judged_on_other_cases_are_said_not_to_compare(shown):
    rows, arms = shown
    short = counts.reduce(rows, [row["window"].model()[:2] for row in rows])
    assert "differ in their cases" in verification.tables(rows, arms | {"short": short})[0].note
    assert "differ" not in verification.tables(rows, arms)[0].note


def test_an_archive_without_regions_has_no_table_of_them(shown):
    rows, arms = shown
    before = len(verification.tables(rows, arms))
    for row in rows:
        row["window"].region_names = {}
    forecasts = [row["window"].model() for row in rows]
    found = verification.tables(rows, {"model": counts.reduce(rows, forecasts)})
    assert len(found) == before - 1
    assert not any("region" in table.title for table in found)


def test_the_pooled_cost_weighs_the_costs_of_the_variables(shown):
    rows, arms = shown
    pm2p5, pm10 = (
        named(verification.tables(rows, arms), f"{name} bad or worse, every arm, further") for name in ("PM2.5", "PM10")
    )
    pooled = column(verification.tables(rows, arms)[0], "expected cost", ("after",))
    cases = [column(table, "cases", ("after",)) * weight for table, weight in ((pm2p5, 1), (pm10, 0.3))]
    costs = [column(table, "cost, this variable", ("after",)) for table in (pm2p5, pm10)]
    assert pooled == pytest.approx(np.average(costs, weights=cases))


def test_perfect_forecasts_cost_nothing_and_are_worth_all(air):
    rows = air.rows(20)
    gold = [np.nan_to_num(row["window"].observed(), nan=1.0) for row in rows]
    gold = [fields.deterministic(value, fields.levels(value, EDGES), EDGES) for value in gold]
    arms = {"model": counts.reduce(rows, gold)}
    first, further = verification.tables(rows, arms)[:2]
    for key, value in {
        "expected cost": 0,
        "false alarm rate": 0,
        "POD": 1,
        "F1": 1,
        "RMSE": 0,
        "class accuracy": 1,
    }.items():
        assert column(first, key, ("model",)) == value
    assert column(first, "CRPS", ("model",)) < 0.02
    assert column(further, "ROC area", ("model",)) == 1
    (plot,) = [plot for plot in verification.plots(rows, arms) if "value" in plot.title]
    np.testing.assert_allclose(plot.lines["model"][1], 1)


def test_a_dozen_arms_take_seconds(shown):
    rows, arms = shown
    arms = arms | {f"arm {i}": arms["noisy"] for i in range(10)}
    began = time.process_time()
    verification.tables(rows, arms)
    verification.plots(rows, arms)
    assert time.process_time() - began < 3
