"""The published FAKER-Air layout, written as its loader reads it, and what becomes of it."""

import numpy as np
import pytest
import yaml

from data import faker_air
from data.air_quality import describe, load

DAYS = np.arange("2016-01-01", "2016-01-13", dtype="datetime64[D]")
SHAPE = (128, 174)
CELLS = [(3, 5), (40, 60), (127, 173)]  # with a station
SETTINGS = {
    "leads": 2,
    "coarsen": 2,
    "splits": {
        "train": {"from": "2016-01-01", "to": "2016-01-05", "every_h": 6},
        "test": {"from": "2016-01-08", "to": "2016-01-12", "every_h": 6},
    },
}


def value(species: int, day: int, moment: int) -> float:
    """What every cell of a map holds, plus its row / 100."""
    return 1 + species + 10 * day + 100 * moment


def put(folder, observed="obs_npz_27km", modelled="cmaq_only_npy", weather=False, level=True):
    """Twelve days: species 6 and 19 of 24 are pm2p5 and pm10, and a day has five times."""
    (folder / observed).mkdir(parents=True)
    rows = np.arange(SHAPE[0], dtype=np.float32)[:, None] / 100
    for number, day in enumerate(DAYS):
        stamp = str(day).replace("-", "")
        place = folder / modelled / str(day).replace("-", "/") / "NIER_27_01"
        place.mkdir(parents=True)
        if number != 6:  # a day without model files
            shape = (5, 24, *((1,) if level else ()), *SHAPE)
            conc = np.lib.format.open_memmap(place / f"{stamp}_x_conc.npy", "w+", np.float32, shape)
            for moment in range(5):
                for species in (6, 19):
                    conc[moment, species] = value(species, number, moment) + rows
            del conc
        if weather:
            met = np.lib.format.open_memmap(place / f"{stamp}_x_metcro2d.npy", "w+", np.float32, (4, 33, 1, *SHAPE))
            speed = 5.0 + number  # from the north, then from the west
            for moment in range(4):
                for place2d, one in (
                    (4, speed),
                    (8, 700 + number),
                    (11, 0.1 * (1 + moment)),
                    (12, 0.2),
                    (16, 270.0 if number % 2 else 0.0),
                    (17, 280 + number),
                ):
                    met[moment, place2d] = one
            del met
        for moment in range(4):
            if (number, moment) != (9, 2):  # a time without observations
                channels = np.zeros((6, *SHAPE), np.float32)
                for cell, pm in zip(CELLS, (12.0, 40.0, 80.0), strict=True):
                    channels[:2, *cell] = pm + number, 2 * pm + moment
                np.savez_compressed(folder / observed / f"{stamp}{6 * moment:02d}_obs.npz", obs_channels=channels)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return put(tmp_path_factory.mktemp("published"), weather=True)


def test_the_folder_is_recognised_by_its_files(published, tmp_path):
    assert faker_air.is_faker_air(published)
    assert not faker_air.is_faker_air(tmp_path)
    put_one = tmp_path / "data"
    (put_one / "obs").mkdir(parents=True)
    (put_one / "obs" / "2016010100_obs.npz").touch()
    assert not faker_air.is_faker_air(tmp_path)
    place = put_one / "cmaq" / "2016" / "01" / "01" / "NIER_27_01"
    place.mkdir(parents=True)
    (place / "20160101_x_conc.npy").touch()
    assert faker_air.is_faker_air(tmp_path)  # the README's other layout, data/obs and data/cmaq


def test_maps_are_those_of_their_species_and_time(published):
    groups = faker_air.open_archive(published)
    analysis = groups["analysis"].isel(time=[0, 7])
    np.testing.assert_array_equal(analysis["time"], np.array(["2016-01-01T00", "2016-01-02T18"], "datetime64[ns]"))
    rows = np.arange(128, dtype=np.float32) / 100
    np.testing.assert_allclose(analysis["pm2p5"][:, :, 9], [value(6, 0, 0) + rows, value(6, 1, 3) + rows], rtol=1e-6)
    np.testing.assert_allclose(analysis["pm10"][:, :, 9], [value(19, 0, 0) + rows, value(19, 1, 3) + rows], rtol=1e-6)
    assert analysis["pm2p5"].attrs["units"] == "ug m-3"
    lat = groups["analysis"]["lat"].values
    assert (lat.min().round(1), lat.max().round(1)) == (19.9, 53.9)
    assert lat[0].mean() < lat[-1].mean()


def test_zero_is_no_station(published):
    obs = faker_air.open_archive(published)["obs"].isel(time=6)  # 2016-01-02T12
    assert int(np.isfinite(obs["pm2p5"]).sum()) == 3
    assert [float(obs["pm2p5"][cell]) for cell in CELLS] == [13, 41, 81]
    assert [float(obs["pm10"][cell]) for cell in CELLS] == [26, 82, 162]


def test_times_without_a_file_are_missing_and_known_to_be(published):
    groups = faker_air.open_archive(published)
    assert groups["analysis"].sizes["time"] == groups["obs"].sizes["time"] == 48
    np.testing.assert_array_equal(np.flatnonzero(~groups["analysis"]["available"].values), [24, 25, 26, 27])
    np.testing.assert_array_equal(np.flatnonzero(~groups["obs"]["available"].values), [38])
    for name, cell in (("analysis", (9, 9)), ("obs", CELLS[0])):
        there = np.isfinite(groups[name]["pm10"][:, *cell].values)
        np.testing.assert_array_equal(there, groups[name]["available"])


def test_wind_comes_from_its_direction(published):
    forcing = faker_air.open_archive(published)["forcing"].isel(time=[0, 4], y=0, x=0)
    np.testing.assert_allclose(forcing["u10"], [0.0, 6.0], atol=1e-5)  # 5 m/s from the north, then 6 from the west
    np.testing.assert_allclose(forcing["v10"], [-5.0, 0.0], atol=1e-5)
    np.testing.assert_allclose(forcing["precip"], [3.0, 3.0], rtol=1e-5)  # 0.1 + 0.2 cm in an hour, at 00 UTC
    np.testing.assert_allclose(forcing["t2m"], [280.0, 281.0])
    np.testing.assert_allclose(forcing["pblh"], [700.0, 701.0])
    assert {one.attrs["role"] for one in forcing.data_vars.values()} == {"analysis"}


@pytest.mark.parametrize("level", [True, False])
def test_windows_are_those_of_any_archive(tmp_path, level):
    folder = put(tmp_path, "data/obs", "data/cmaq", level=level)
    (folder / "archive.yaml").write_text(yaml.safe_dump(SETTINGS))
    rows = load(folder)
    # train: 20 times, 1 before and 2 after the inits; test begins the day after the missing one
    assert {split: len(one) for split, one in rows.items()} == {"train": 17, "test": 17}
    window = next(row["window"] for row in rows["test"] if row["id"] == "2016-01-09T06")  # day 8, time 33
    rows = np.arange(128, dtype=np.float32).reshape(64, 2).mean(1) / 100
    np.testing.assert_allclose(window.analysis()[0, 0, :, 7], value(6, 8, 2) + rows, rtol=1e-5)
    np.testing.assert_allclose(window.analysis()[1, 1, :, 7], value(19, 8, 3) + rows, rtol=1e-5)
    assert window.observed().shape == (2, 2, 64, 87)
    assert np.isfinite(window.observed()).sum() == 2 * 2 * 3
    assert window.observed()[0, 0, 1, 2] == 12 + 8
    assert window.history()[1, 1, 1, 2] == 24 + 1
    assert window.given_names == ("lat", "lon")


def test_gaps_are_left_out_and_counted(published):
    (published / "archive.yaml").write_text(
        yaml.safe_dump(
            {**SETTINGS, "splits": {**SETTINGS["splits"], "test": {"from": "2016-01-07", "to": "2016-01-12"}}}
        )
    )
    rows = load(published)["test"]
    assert describe(published)["splits"]["test"] == {"windows": 17, "incomplete": 4, "unobserved": 0}
    assert rows[0]["id"] == "2016-01-08T06"
    assert rows[0]["window"].given().shape == (2 + 5 * 2, 64, 87)


def test_a_map_of_another_size_is_refused(tmp_path):
    folder = put(tmp_path)
    path = folder / "obs_npz_27km" / "2016010106_obs.npz"
    np.savez(path, obs_channels=np.zeros((6, 69, 138)))
    with pytest.raises(ValueError, match=r"2016010106_obs.npz holds maps of \(69, 138\) cells; the published grid"):
        faker_air.open_archive(folder)["obs"]["pm2p5"][1].values.sum()


def test_the_authors_periods_are_the_default_with_validation_and_test_apart():
    splits = faker_air.SETTINGS["splits"]
    assert splits["train"]["from"] == "2016-01-01"
    assert splits["test"] == {"from": "2023-01-01", "to": "2023-12-31", "every_h": 6}
    assert splits["train"]["to"] < splits["validation"]["from"] < splits["validation"]["to"] < splits["test"]["from"]
