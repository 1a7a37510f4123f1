"""The baselines, counts, tables and maps on a small archive of the synthetic world, read as any archive is."""

import numpy as np
import pytest

from apps.air_quality import baselines, counts, maps, verification
from data.air_quality import load
from data.synthetic import air_quality as world
from rewards.forecast import metrics

SPLITS = {
    "train": {"from": "2022-01-01T00", "to": "2022-01-20T18", "every_h": 12},
    "test": {"from": "2022-01-26T00", "to": "2022-02-12T18", "every_h": 24},
}


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "archive"
    world.write(folder, 0, grid=(12, 16, 200.0), stations=60, splits=SPLITS)
    return {name: [row | {"scheme": "korea", "costs": "agency"} for row in rows] for name, rows in load(folder).items()}


@pytest.fixture(scope="module")
def arms(splits):
    free = (baselines.persistence, baselines.climatology, baselines.analysis_model)
    return {baseline.__name__: list(baseline(splits["train"], splits["test"])) for baseline in free}


def test_tables_of_an_archive_say_what_the_metrics_say(splits, arms):
    rows = splits["test"]
    reduced = {name: counts.reduce(rows, completions) for name, completions in arms.items()}
    first = verification.tables(rows, reduced)[0]
    columns = {name: [row[name] for row in rows] for name in ("window", "scheme", "costs")}
    for line, completions in zip(first.rows, arms.values(), strict=True):
        scored = metrics.expected_cost(completions, **columns)
        cost = np.average([one.value for one in scored], weights=[one.weight for one in scored])
        assert line[1] == pytest.approx(cost, rel=1e-9)
    assert verification.plots(rows, reduced)


def test_the_model_knows_more_than_persistence_and_climatology_at_long_leads(splits, arms):
    rows = splits["test"]
    task = counts.Task.of(rows)
    by_lead = {}
    for name, completions in arms.items():
        reduced = counts.reduce(rows, completions)
        by_lead[name] = counts.measures(reduced.confusion.sum(0), reduced.sums.sum(0), 0, task)["RMSE"]
    assert by_lead["persistence"][0] < by_lead["climatology"][0]
    assert by_lead["analysis_model"][4:12].mean() < by_lead["persistence"][4:12].mean()


def test_persistence_begins_with_what_stations_reported(splits, arms):
    row, forecast = splits["test"][3], arms["persistence"][3]
    window = row["window"]
    seen = window.seen()[-1] > 0
    before = next(r["window"] for r in splits["test"] if r["window"].init == window.init - np.timedelta64(24, "h"))
    assert seen.any()
    np.testing.assert_array_equal(forecast["value"][7][seen], before.observed()[3][seen])


@pytest.mark.parametrize("draw", [maps.class_map, maps.chance_map])
def test_maps_of_an_archive_are_drawn(splits, arms, draw):
    picture = draw(splits["test"][0]["window"], arms["climatology"][0], 19)
    assert picture.shape == (420, 640, 3)
    assert picture.std() > 0.1
