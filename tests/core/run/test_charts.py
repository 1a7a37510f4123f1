import math
import re

import numpy as np
import pytest

from core.run.charts import Series, line_chart, nice_ticks, running_mean


def numbers(path: str) -> list[float]:
    return [float(v) for v in re.findall(r"-?\d+(?:\.\d+)?", path)]


def test_points_land_where_the_axes_say():
    chart = line_chart("t", [Series("a", [0, 10], [0.0, 1.0])], unit_interval=True)
    x0, y0, x1, y1 = numbers(chart.lines[0]["path"])
    assert {label: at for at, label in chart.y_ticks}["0"] == y0 > y1 == {label: at for at, label in chart.y_ticks}["1"]
    assert (
        {label: at for at, label in chart.x_ticks}["0"] == x0 < x1 == {label: at for at, label in chart.x_ticks}["10"]
    )
    assert chart.now == "0 → 1"


def test_gap_in_the_data_is_a_gap_in_the_line():
    chart = line_chart("t", [Series("a", range(5), [0, 1, math.nan, 1, 0])])
    assert chart.lines[0]["path"].count("M") == 2


@pytest.mark.parametrize("y", [[], [math.nan], [math.inf, math.nan]])
def test_nothing_finite_is_no_chart(y):
    assert line_chart("t", [Series("a", range(len(y)), y)]) is None


@pytest.mark.parametrize("y", [[0.0], [5.0, 5.0], [1e-9, -1e-9], [1e12, 0], [-3, math.inf, 2]])
def test_any_range_gives_finite_coordinates_within_the_picture(y):
    chart = line_chart("t", [Series("a", range(len(y)), y, lo=[v - 1 for v in y], hi=[v + 1 for v in y], points=True)])
    coordinates = numbers(chart.lines[0]["path"]) + [v for at, _ in chart.x_ticks + chart.y_ticks for v in [at]]
    assert all(0 <= v <= chart.width for v in coordinates)


def test_long_series_is_thinned_and_smoothed():
    chart = line_chart("t", [Series("a", range(50_000), np.random.default_rng(0).random(50_000))])
    assert len(chart.lines[0]["path"]) < 8_000
    assert chart.note.startswith("mean of ")


def test_a_chart_over_no_count_has_broken_ticks_and_is_not_smoothed():
    x = np.linspace(0, 1, 60)
    chart = line_chart("t", [Series("a", x, x)], x_label="rate", whole=False)
    assert [label for _, label in chart.x_ticks] == ["0", "0.5", "1"]
    assert (chart.x_label, chart.lines[0]["raw"], chart.note) == ("rate", "", "")
    steps = line_chart("t", [Series("a", x, x)])
    assert [label for _, label in steps.x_ticks] == ["0", "1"]
    assert (steps.x_label, steps.lines[0]["raw"] != "") == ("step", True)
    assert line_chart("t", [Series("a", x, x), Series("b", x, x)]).now == "", "of which line would it be?"


def test_ticks_are_round_and_at_least_three():
    assert nice_ticks(0, 1) == [0, 0.5, 1]
    assert nice_ticks(0.08, 0.87) == [0.2, 0.4, 0.6, 0.8]
    assert nice_ticks(1, 150) == [50, 100, 150]


def test_running_mean_is_centred_and_ignores_missing_values():
    assert running_mean(np.array([1.0, 2.0, 6.0, math.nan]), 3).tolist() == [1.5, 3.0, 4.0, 6.0]
