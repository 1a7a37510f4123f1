"""Archives of 8x10 cells written in each format, their windows against raw arrays, and what a window may not see."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
import yaml

from data import air_archive, air_frames, cf, faker_air, ioapi, stations
from data.air_quality import LeakError, Window, _rows, describe, load, normals, request_rows
from data.air_settings import read_settings

STEP = np.timedelta64(6, "h")
TIMES = (np.datetime64("2020-01-01T00") + np.arange(240) * STEP).astype("datetime64[ns]")  # 60 days
SETTINGS = {
    "step_h": 6,
    "history": 2,
    "leads": 4,
    "coarsen": 1,
    "splits": {
        "train": {"from": "2020-01-01", "to": "2020-01-20", "every_h": 6},
        "validation": {"from": "2020-01-22", "to": "2020-02-04T18", "every_h": 12},
        "test": {"from": "2020-02-06", "to": "2020-02-29", "every_h": 24},
    },
    "regions": {1: "west", 2: "east"},
}
UNITS = {"u10": "m s-1", "pblh": "m"}


class World:
    """The raw arrays of an archive: analysis (V, T, 8, 10), forcing, 12 stations (T, V, S), model forecasts."""

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.lat, self.lon = np.meshgrid(30.0 + np.arange(8), 120.0 + np.arange(10), indexing="ij")
        self.analysis = rng.gamma(2, 10, (2, len(TIMES), 8, 10)).astype(np.float32)
        self.forcing = {name: rng.normal(3, 2, (len(TIMES), 8, 10)).astype(np.float32) for name in UNITS}
        self.place = rng.permutation(80)[:12]  # cells with a station; two stations in the first
        self.place[1] = self.place[0]
        self.reports = rng.gamma(2, 12, (len(TIMES), 2, 12)).astype(np.float32)
        self.reports[rng.random(self.reports.shape) < 0.3] = np.nan
        self.static = {"emission": rng.random((8, 10)), "land": np.tile(np.arange(10) < 7, (8, 1)).astype(float)}
        self.region = np.where(np.arange(10) < 5, 1, 2) * np.ones((8, 1), int)
        self.inits = TIMES[152:170:4]
        self.model = rng.gamma(2, 10, (2, len(self.inits), 4, 8, 10)).astype(np.float32)

    def observed(self, first: int, last: int) -> np.ndarray:
        """(n, V, 8, 10) by a slow loop: the mean of the reports of each cell."""
        out = np.full((last - first, 2, 80), np.nan)
        for t, v, cell in np.ndindex(out.shape):
            there = [
                r for r, p in zip(self.reports[first + t, v], self.place, strict=True) if p == cell and np.isfinite(r)
            ]
            if there:
                out[t, v, cell] = np.mean(there)
        return out.reshape(-1, 2, 8, 10)

    def maps(self, values, units="ug m-3", names=cf.VARIABLES, **attrs) -> xr.Dataset:
        return xr.Dataset(
            {
                name: (("time", "y", "x"), one, {"units": units, **attrs})
                for name, one in zip(names, values, strict=True)
            },
            coords={"time": TIMES, "lat": (("y", "x"), self.lat), "lon": (("y", "x"), self.lon)},
        )

    def groups(self) -> dict[str, xr.Dataset]:
        grid = {"lat": (("y", "x"), self.lat), "lon": (("y", "x"), self.lon)}
        static = {**self.static, "region": self.region}
        forcing = self.maps(self.forcing.values(), names=self.forcing, role="analysis")
        for name, unit in UNITS.items():
            forcing[name].attrs["units"] = unit
        obs = {
            name: (("time", "station"), self.reports[:, v], {"units": "ug m-3"}) for v, name in enumerate(cf.VARIABLES)
        }
        dims = ("time", "prediction_timedelta", "y", "x")
        groups = {
            "analysis": self.maps(self.analysis),
            "forcing": forcing,
            "static": xr.Dataset({name: (("y", "x"), one) for name, one in static.items()}, coords=grid),
            "obs": xr.Dataset(
                obs,
                coords={
                    "time": TIMES,
                    "lat": ("station", self.lat.ravel()[self.place] + 0.1),
                    "lon": ("station", self.lon.ravel()[self.place] - 0.2),
                    "station_id": ("station", np.array([f"s{number:02d}" for number in range(12)], object)),
                },
            ),
            "model": xr.Dataset(
                {name: (dims, self.model[v], {"units": "ug m-3"}) for v, name in enumerate(cf.VARIABLES)},
                coords={"time": self.inits, "prediction_timedelta": np.arange(1, 5) * STEP, **grid},
            ),
        }
        return {name: ds.copy(deep=True) for name, ds in groups.items()}


def put(folder: Path, groups: dict[str, xr.Dataset], ending: str = ".nc", **settings) -> Path:
    """Writes an archive; its stores as NetCDF or Zarr, in chunks of 25 times."""
    folder.mkdir(exist_ok=True)
    for name, ds in groups.items():
        chunks = {one: (min(25, v.shape[0]), *v.shape[1:]) for one, v in ds.data_vars.items()}
        if ending == ".nc" or name == "static":
            ds.to_netcdf(folder / f"{name}.nc", encoding={one: {"chunksizes": c} for one, c in chunks.items()})
        else:
            encoding = {one: {"chunks": c} for one, c in chunks.items()}
            ds.to_zarr(folder / f"{name}.zarr", mode="w", consolidated=False, encoding=encoding)
    (folder / "archive.yaml").write_text(yaml.safe_dump({**SETTINGS, **settings}))
    return folder


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory) -> Path:
    return put(tmp_path_factory.mktemp("archive"), world.groups(), ".zarr")


def everything(window: Window) -> dict[str, np.ndarray]:
    names = ("history", "seen", "given", "ahead", "observed", "analysis", "region", "lat", "lon", "land")
    return {name: getattr(window, name)() for name in names}


def same(one: Window, other: Window) -> None:
    for (name, a), b in zip(everything(one).items(), everything(other).values(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def at(rows: list[dict], init: str) -> Window:
    return next(row["window"] for row in rows if row["id"] == init)


# Rows


def test_rows_name_the_calendar_of_their_init(folder):
    splits = load(folder)
    row = splits["test"][0]
    assert {key: row[key] for key in row if key != "window"} == {
        "id": "2020-02-07T00",
        "week": "2020-W06",
        "season": "DJF",
        "month": 2,
    }
    assert row["window"].init == np.datetime64("2020-02-07T00")
    assert [row["week"] for row in splits["train"] if row["id"] in ("2020-01-05T18", "2020-01-06T00")] == [
        "2020-W01",
        "2020-W02",
    ]


def test_seasons_begin_in_december(folder):
    months = np.arange("2019-12", "2020-12", dtype="datetime64[M]").astype("datetime64[ns]")
    rows = _rows(air_archive.open_archive(folder), months)
    assert [row["season"] for row in rows] == ["DJF"] * 3 + ["MAM"] * 3 + ["JJA"] * 3 + ["SON"] * 3
    assert [row["month"] for row in rows] == [12, *range(1, 12)]


def test_windows_lie_in_their_split_from_history_to_the_last_lead(folder):
    splits = load(folder)
    # train has 80 frames: 1 before the first init and 4 after the last
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 75, "validation": 25, "test": 22}
    for split, rows in splits.items():
        inits = np.array([row["window"].init for row in rows])
        assert inits[0] - STEP >= np.datetime64(SETTINGS["splits"][split]["from"])
        assert inits[-1] + 4 * STEP < np.datetime64(SETTINGS["splits"][split]["to"][:10]) + np.timedelta64(1, "D")
        assert set(np.diff(inits)) == {np.timedelta64(SETTINGS["splits"][split]["every_h"], "h")}


def test_a_window_is_a_light_handle(folder):
    one, other = (load(folder)["test"][3]["window"] for _ in range(2))
    assert one == other
    assert one != load(folder)["test"][4]["window"]
    assert hash(one) == hash(other)
    assert repr(one) == f"Window({folder.name}, 2020-02-10T00, 4 x 6 h)"
    assert len(pickle.dumps(one)) < 1000
    same(pickle.loads(pickle.dumps(one)), one)


# What a window holds, against the raw arrays


def test_observed_is_the_mean_of_the_stations_of_a_cell(folder, world):
    window = at(load(folder)["test"], "2020-02-10T00")
    index = int((window.init - TIMES[0]) / STEP)
    assert window.observed().dtype == np.float32
    np.testing.assert_allclose(window.observed(), world.observed(index + 1, index + 5), rtol=1e-6)


def test_history_is_observed_where_a_station_reports_and_analysed_elsewhere(folder, world):
    window = at(load(folder)["validation"], "2020-01-25T12")
    index = int((window.init - TIMES[0]) / STEP)
    observed = world.observed(index - 1, index + 1)
    analysed = world.analysis[:, index - 1 : index + 1].swapaxes(0, 1)
    np.testing.assert_allclose(window.history(), np.where(np.isfinite(observed), observed, analysed), rtol=1e-6)
    np.testing.assert_array_equal(window.seen(), np.isfinite(observed))
    assert 0 < window.seen().mean() < 1
    assert {window.history().dtype, window.seen().dtype} == {np.dtype("float32")}


def test_analysis_and_model_are_those_of_the_valid_times(folder, world):
    rows = load(folder)["test"]
    window = at(rows, "2020-02-08T00")
    index = int((window.init - TIMES[0]) / STEP)
    np.testing.assert_array_equal(window.analysis(), world.analysis[:, index + 1 : index + 5].swapaxes(0, 1))
    number = list(world.inits).index(window.init)
    np.testing.assert_array_equal(window.model(), world.model[:, number].swapaxes(0, 1))
    assert at(rows, "2020-02-14T00").model() is None  # not among the model's inits


def test_what_a_window_gives_may_be_changed(folder):
    window = load(folder)["test"][0]["window"]
    before = everything(window)
    for name in ("history", "given", "observed", "analysis"):
        getattr(window, name)()[...] = -1
    for name, values in everything(window).items():
        np.testing.assert_array_equal(values, before[name])


def test_ahead_is_the_calendar_of_each_valid_time(folder):
    ahead = at(load(folder)["test"], "2020-02-09T00").ahead()  # a Sunday, day 40
    assert ahead.shape == (4, 7)
    angle = 2 * np.pi * np.array([6 / 24, (39 + 0.25) / 365.25, 6 / 7])
    expected = [f(one) for one in angle for f in (np.sin, np.cos)]
    np.testing.assert_allclose(ahead[0], [*expected, 1 / 20], atol=1e-6)
    np.testing.assert_allclose(ahead[:, 6], np.arange(1, 5) / 20)


def test_given_is_static_maps_then_forcing_of_the_history_standardised_by_the_training_period(folder, world):
    window = at(load(folder)["test"], "2020-02-10T00")
    assert window.given_names == (
        "emission",
        "land",
        "lat",
        "lon",
        "u10 -6 h",
        "u10 0 h",
        "pblh -6 h",
        "pblh 0 h",
    )
    given = window.given()
    assert given.shape == (8, 8, 10)
    np.testing.assert_allclose(given[:4].mean((1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(given[:4].std((1, 2)), 1, atol=1e-5)
    np.testing.assert_allclose(given[2, :, 0] * np.std(world.lat) + world.lat.mean(), world.lat[:, 0], rtol=1e-5)
    index = int((window.init - TIMES[0]) / STEP)
    for place, name in ((4, "u10"), (6, "pblh")):
        train = world.forcing[name][:80].astype(float)
        expected = (world.forcing[name][index - 1 : index + 1] - train.mean()) / train.std()
        np.testing.assert_allclose(given[place : place + 2], expected, atol=1e-5)
        np.testing.assert_allclose(normals(folder)[name], (train.mean(), train.std()), rtol=1e-6)


def test_missing_forcing_is_the_mean(tmp_path, world):
    groups = world.groups()
    groups["forcing"]["u10"][160, 2, 3] = np.nan
    window = at(load(put(tmp_path / "a", groups))["test"], "2020-02-10T00")
    assert window.given()[5, 2, 3] == 0


def test_regions_and_land_come_from_the_static_maps(folder, world):
    window = load(folder)["test"][0]["window"]
    np.testing.assert_array_equal(window.region(), world.region)
    assert window.region().dtype == np.int16
    assert window.region_names == {1: "west", 2: "east"}
    np.testing.assert_array_equal(window.land(), world.static["land"])


def test_an_archive_of_analyses_alone_is_one(tmp_path, world):
    rows = load(put(tmp_path / "a", {"analysis": world.groups()["analysis"]}))
    window = rows["test"][0]["window"]
    assert len(rows["train"]) == 75
    assert np.isnan(window.observed()).all()
    assert not window.seen().any()
    assert window.given_names == ("lat", "lon")
    assert window.region_names == {1: "all"}
    assert np.isnan(window.land()).all()
    assert window.maps_ahead() is None
    assert window.model() is None


def test_coarsening_averages_what_is_there(tmp_path, world):
    window = at(load(put(tmp_path / "a", world.groups(), coarsen=2))["test"], "2020-02-10T00")
    index = int((window.init - TIMES[0]) / STEP)
    blocks = world.analysis[:, index + 1 : index + 5].reshape(2, 4, 4, 2, 5, 2).mean((3, 5)).swapaxes(0, 1)
    np.testing.assert_allclose(window.analysis(), blocks, rtol=1e-6)
    np.testing.assert_allclose(window.lat()[:, 0], [30.5, 32.5, 34.5, 36.5])
    np.testing.assert_allclose(window.lon()[0], [120.5, 122.5, 124.5, 126.5, 128.5])
    np.testing.assert_array_equal(window.region()[0], [1, 1, 1, 2, 2])  # cells 4 and 5 are a tie
    cell = world.place // 10 // 2 * 5 + world.place % 10 // 2
    for t, v, one in np.ndindex(4, 2, 20):
        there = world.reports[index + 1 + t, v][cell == one]
        there = there[np.isfinite(there)]
        got = window.observed()[t, v].ravel()[one]
        np.testing.assert_allclose(got, there.mean() if len(there) else np.nan, rtol=1e-6)


# What a window may not see


def poisoned(groups: dict[str, xr.Dataset], after: np.datetime64, how: str) -> dict[str, xr.Dataset]:
    """Everything after a time NaN, or shuffled in time."""
    out = {}
    for name, ds in groups.items():
        if "time" in ds.dims:
            late = np.flatnonzero(ds["time"].values > after)
            order = np.arange(ds.sizes["time"])
            order[late] = np.random.default_rng(1).permutation(late)
            shuffled = ds.isel(time=order).assign_coords(time=ds["time"])
            ds = shuffled if how == "shuffled" else ds.where(ds["time"] <= after)
            for variable in ds.data_vars:
                ds[variable].attrs = groups[name][variable].attrs
        out[name] = ds
    return out


@pytest.mark.parametrize("how", ["missing", "shuffled"])
@pytest.mark.parametrize("held", [True, False])
def test_nothing_after_the_init_is_in_what_a_forecast_sees(tmp_path, world, folder, how, held, monkeypatch):
    window = at(load(folder)["test"], "2020-02-10T00")
    before = everything(window)
    if not held:
        monkeypatch.setattr(air_archive, "MEMORY_MB", 0)
    groups = world.groups()
    put(tmp_path / "a", {**poisoned(groups, window.init, how), "static": groups["static"]})
    archive = air_archive.open_archive(tmp_path / "a", again=True)
    assert (archive.analysis._cache is None) == held
    after = everything(Window(str(tmp_path / "a"), window.init, 4, window.variables, 6))
    for name in ("history", "seen", "given", "ahead"):
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    assert not np.array_equal(after["analysis"], before["analysis"])  # the poison is there
    assert not np.array_equal(after["observed"], before["observed"])


def test_a_forcing_that_is_not_known_at_the_init_is_a_leak(folder):
    window = load(folder)["test"][0]["window"]
    assert window.maps_ahead() is None
    with pytest.raises(LeakError, match=r"u10 of .* has role=analysis.*only a forcing of role=forecast"):
        window.maps_ahead(["u10"])
    with pytest.raises(ValueError, match="no forcing 'snow'"):
        window.maps_ahead(["snow"])


def test_a_forcing_that_does_not_say_is_not_known_ahead(tmp_path, world):
    groups = world.groups()
    del groups["forcing"]["u10"].attrs["role"]
    window = load(put(tmp_path / "a", groups))["test"][0]["window"]
    assert window.maps_ahead() is None
    with pytest.raises(LeakError, match="u10"):
        window.maps_ahead(["u10"])


def test_forcing_that_was_forecast_is_read_ahead(tmp_path, world):
    groups = world.groups()
    groups["forcing"]["pblh"].attrs["role"] = "forecast"
    window = at(load(put(tmp_path / "a", groups))["test"], "2020-02-10T00")
    ahead = window.maps_ahead()
    index = int((window.init - TIMES[0]) / STEP)
    train = world.forcing["pblh"][:80].astype(float)
    expected = (world.forcing["pblh"][index + 1 : index + 5] - train.mean()) / train.std()
    assert ahead.shape == (4, 1, 8, 10)
    np.testing.assert_allclose(ahead[:, 0], expected, atol=1e-5)
    with pytest.raises(LeakError, match="u10"):
        window.maps_ahead(["pblh", "u10"])


def test_statistics_are_those_of_the_training_period_alone(tmp_path, world, folder):
    groups = poisoned(world.groups(), np.datetime64("2020-01-20T18"), "missing")
    put(tmp_path / "a", {"analysis": world.groups()["analysis"], "forcing": groups["forcing"]})
    assert normals(tmp_path / "a") == normals(folder)


# In memory and not


def test_archives_out_of_memory_give_the_same_windows(folder, monkeypatch):
    held = {row["id"]: row["window"] for rows in load(folder).values() for row in rows}
    before = {name: everything(window) for name, window in held.items()}
    models = {name: window.model() for name, window in held.items()}
    monkeypatch.setattr(air_archive, "MEMORY_MB", 0)
    monkeypatch.setattr(air_frames, "BLOCK_MB", 0.01)
    monkeypatch.setattr(air_archive, "CACHE_MB", 0.05)
    rows = [row for rows in load(folder).values() for row in rows]
    archive = air_archive.open_archive(folder)
    assert [row["id"] for row in rows] == list(held)
    for row in rows[::7] + rows[-1:]:
        for name, values in everything(row["window"]).items():
            np.testing.assert_array_equal(values, before[row["id"]][name])
        np.testing.assert_equal(row["window"].model(), models[row["id"]])
        assert archive._cache.size <= 0.06 * 2**20
    assert archive._cache.size > 0


def test_reading_in_order_decodes_each_block_once(folder, monkeypatch):
    monkeypatch.setattr(air_archive, "MEMORY_MB", 0)
    monkeypatch.setattr(air_frames, "BLOCK_MB", 0.01)
    rows = load(folder)["train"]
    archive = air_archive.open_archive(folder)
    read, made = archive.analysis._read, []
    archive._cache = air_frames.Cache(2**20)
    archive.analysis.through(archive._cache)
    monkeypatch.setattr(archive.analysis, "_read", lambda a, b: made.append((a, b)) or read(a, b))
    for row in rows:
        row["window"].analysis()
    assert made == [(0, 25), (25, 50), (50, 75), (75, 100)]


def test_a_cache_keeps_to_its_limit_and_drops_the_oldest():
    cache, made = air_frames.Cache(3 * 800), []

    def block(key):
        return cache.get(key, 800, lambda: made.append(key) or np.zeros(100))

    for key in (1, 2, 3, 1, 4, 1, 2):
        block(key)
        assert cache.size <= 3 * 800
    assert made == [1, 2, 3, 4, 2]


def test_chunks_that_no_window_can_afford_are_refused(tmp_path, world, monkeypatch):
    monkeypatch.setattr(air_frames, "CHUNK_MB", 0.005)
    monkeypatch.setattr(air_frames, "BLOCK_MB", 0.001)
    with pytest.raises(ValueError, match=r"analysis.nc is stored in chunks of 25 times.*write it again in chunks of"):
        load(put(tmp_path / "a", world.groups()))


# Gaps


def test_times_at_which_no_station_reports_are_missing(tmp_path, world):
    groups = world.groups()
    groups["obs"] = groups["obs"].isel(time=[*range(10, 161), *range(163, 240)])
    window = at(load(put(tmp_path / "a", groups))["test"], "2020-02-10T00")  # 160: 161 and 162 are its first two leads
    expected = world.observed(161, 165)
    expected[:2] = np.nan
    np.testing.assert_allclose(window.observed(), expected, rtol=1e-6)


def test_inits_without_truth_or_with_gaps_before_them_are_left_out_and_counted(tmp_path, world):
    groups = world.groups()
    groups["obs"]["pm2p5"][170:178] = np.nan
    groups["obs"]["pm10"][170:178] = np.nan
    groups["analysis"]["pm10"][151, 0, 0] = np.nan  # 2020-02-07T18
    folder = put(tmp_path / "a", groups)
    rows = load(folder)["test"]
    assert len(rows) == 20
    ids = {row["id"] for row in rows}
    assert "2020-02-08T00" not in ids  # its history is 151 and 152
    assert "2020-02-07T00" in ids
    assert "2020-02-13T00" not in ids  # 172: nothing is observed from 173 to 176
    assert {"2020-02-12T00", "2020-02-14T00"} <= ids
    assert describe(folder)["splits"]["test"] == {"windows": 20, "incomplete": 1, "unobserved": 1}


def test_history_without_a_whole_map_is_refused(tmp_path, world):
    groups = world.groups()
    groups["analysis"]["pm10"][151, 0, 0] = np.nan
    put(tmp_path / "a", groups)
    with pytest.raises(ValueError, match="misses 1 values up to the init"):
        Window(str(tmp_path / "a"), TIMES[152], 4, cf.VARIABLES, 6).history()


def test_stations_outside_the_grid_are_left_out_and_counted(tmp_path, world, folder):
    groups = world.groups()
    groups["obs"]["lat"][[3, 4]] = [28.9, 60.0]
    with pytest.warns(UserWarning, match="2 of 12 stations lie outside"):
        load(put(tmp_path / "a", groups))
    found = describe(tmp_path / "a")
    assert (found["stations"], found["stations_outside"]) == (10, 2)
    assert describe(folder)["stations_outside"] == 0
    assert describe(folder)["cells"] == [8, 10]
    assert describe(folder)["forcing"] == {"u10": "analysis", "pblh": "analysis"}


# One archive in every format


def as_monthly_files(groups, folder):
    (folder / "analysis").mkdir()
    for month, part in groups["analysis"].groupby("time.month"):
        part.to_netcdf(folder / "analysis" / f"{month:02d}.nc")


def as_station_table(ending):
    def change(groups, folder):
        stations.write_stations(folder / f"stations.{ending}", groups.pop("obs"))

    return change


def from_the_north(groups, folder):
    for name in ("analysis", "static"):
        groups[name] = groups[name].isel(y=slice(None, None, -1))
    # without coordinates of its own, a store lies as static.nc does
    groups["forcing"] = groups["forcing"].isel(y=slice(None, None, -1)).drop_vars(["lat", "lon"])
    groups["analysis"] = groups["analysis"].drop_vars(["lat", "lon"])


def in_other_words(groups, folder):
    """1-D axes from the north and to 360 degrees, kg m-3, Aurora's names, three-hourly."""
    ds = (
        groups["analysis"].isel(y=slice(None, None, -1)).rename(pm2p5="PM2.5", pm10="PM10", y="latitude", x="longitude")
    )
    north, east = ds["lat"].values[:, 0], ds["lon"].values[0] + 360
    ds = ds.drop_vars(["lat", "lon"]).assign_coords(latitude=north, longitude=east)
    kilograms = ds * 1e-9
    for variable in kilograms.data_vars.values():
        variable.attrs["units"] = "kg m**-3"
    between = kilograms.assign_coords(time=TIMES - np.timedelta64(3, "h")) * np.nan
    groups["analysis"] = xr.concat([kilograms, between], "time", combine_attrs="override").sortby("time")


def stations_by_hour(groups, folder):
    """Reports at other hours too: those do not count."""
    other = groups["obs"].assign_coords(time=TIMES + np.timedelta64(2, "h")) * 0 + 999
    for name in cf.VARIABLES:
        other[name].attrs["units"] = "ug m-3"
    groups["obs"] = xr.concat([groups["obs"], other], "time").sortby("time").transpose("station", "time")


@pytest.mark.parametrize(
    "change",
    [
        lambda groups, folder: None,  # NetCDF; the other is Zarr
        as_monthly_files,
        as_station_table("csv"),
        as_station_table("parquet"),
        from_the_north,
        in_other_words,
        stations_by_hour,
    ],
)
def test_the_same_archive_in_another_format_gives_the_same_windows(tmp_path, world, folder, change):
    groups, other = world.groups(), tmp_path / "a"
    other.mkdir()
    written = dict(groups)
    change(written, other)
    if (other / "analysis").exists():
        del written["analysis"]
    rows, expected = load(put(other, written)), load(folder)
    assert {split: len(one) for split, one in rows.items()} == {split: len(one) for split, one in expected.items()}
    for split, number in (("train", 5), ("test", 10)):
        for name, values in everything(rows[split][number]["window"]).items():
            expected_values = everything(expected[split][number]["window"])[name]
            np.testing.assert_allclose(values, expected_values, rtol=2e-6, atol=1e-6, err_msg=name)


def test_daily_ioapi_files_and_a_station_table_are_an_archive(tmp_path, world):
    attrs = {**faker_air.GRID, "NCOLS": 10, "NROWS": 8, "XORIG": -135000.0, "YORIG": -108000.0}
    lat, lon = ioapi.lat_lon(attrs)
    (tmp_path / "analysis").mkdir()
    for day in range(0, 60, 12):
        frames = slice(4 * day, min(4 * day + 49, 240))  # the last time of a file is the first of the next
        count = len(TIMES[frames])
        flags = np.zeros((count, 2, 2), np.int32)
        flags[..., 0] = [[2020001 + day + t // 4] * 2 for t in range(count)]
        flags[..., 1] = [[t % 4 * 60000] * 2 for t in range(count)]
        dims = ("TSTEP", "LAY", "ROW", "COL")
        data = {
            name: (dims, world.analysis[v, frames, None], {"units": "micrograms/m**3 "})
            for v, name in enumerate(("PM25_TOT", "PM10_TOT"))
        }
        data["TFLAG"] = (("TSTEP", "VAR", "DATE-TIME"), flags)
        xr.Dataset(data, attrs=attrs).to_netcdf(tmp_path / "analysis" / f"ACONC_{day:02d}", format="NETCDF3_64BIT")
    obs = world.groups()["obs"]
    obs = obs.assign_coords(lat=("station", lat.ravel()[world.place]), lon=("station", lon.ravel()[world.place]))
    stations.write_stations(tmp_path / "stations.csv", obs)
    window = at(load(put(tmp_path, {}))["test"], "2020-02-10T00")
    index = int((window.init - TIMES[0]) / STEP)
    np.testing.assert_array_equal(window.analysis(), world.analysis[:, index + 1 : index + 5].swapaxes(0, 1))
    np.testing.assert_allclose(window.observed(), world.observed(index + 1, index + 5), rtol=1e-6)
    np.testing.assert_allclose(window.lat(), lat, rtol=1e-6)


def test_an_ioapi_grid_file_is_the_static_maps(tmp_path, world):
    attrs = {**faker_air.GRID, "NCOLS": 10, "NROWS": 8, "XORIG": -135000.0, "YORIG": -108000.0}
    attrs |= {"SDATE": 2020001, "STIME": 0, "TSTEP": 0}
    lat, lon = ioapi.lat_lon(attrs)
    maps = {"LAT": lat, "LON": lon, "HT": 100 * lat, "LWMASK": world.static["land"]}
    grid = {name: (("TSTEP", "LAY", "ROW", "COL"), one[None, None].astype("f4")) for name, one in maps.items()}
    xr.Dataset(grid, attrs=attrs).to_netcdf(tmp_path / "static.nc", format="NETCDF3_64BIT")
    window = load(put(tmp_path, {"analysis": world.groups()["analysis"].drop_vars(["lat", "lon"])}))["test"][0][
        "window"
    ]
    assert window.given_names == ("land", "height", "lat", "lon")
    np.testing.assert_array_equal(window.land(), world.static["land"])
    np.testing.assert_allclose(window.lon(), lon, rtol=1e-6)


def test_archive_yaml_says_how_files_call_things(tmp_path, world):
    groups = world.groups()
    obs = groups.pop("obs")
    groups["analysis"] = groups["analysis"].rename(pm2p5="fine", pm10="coarse")
    when = (pd.DatetimeIndex(TIMES) + pd.Timedelta(hours=9)).strftime("%Y%m%d%H")
    table = pd.DataFrame({"t": when.repeat(12), "id": np.tile(obs["station_id"].values, 240)})
    for name in cf.VARIABLES:
        table[name.upper()] = obs[name].values.ravel()
    table.to_csv(tmp_path / "stations.csv", index=False)
    sites = pd.DataFrame({"station": obs["station_id"].values, "lat": obs["lat"].values, "lon": obs["lon"].values})
    sites.to_csv(tmp_path / "places.csv", index=False)
    columns = {"time": "t", "station": "id", "pm2p5": "PM2P5", "pm10": "PM10"}
    options = {"columns": columns, "unit": "ug m-3", "utc_offset_h": 9, "sites": "places.csv"}
    put(tmp_path, groups, names={"pm2p5": "fine", "pm10": "coarse"}, stations=options)
    window = at(load(tmp_path)["test"], "2020-02-10T00")
    index = int((window.init - TIMES[0]) / STEP)
    np.testing.assert_allclose(window.observed(), world.observed(index + 1, index + 5), rtol=1e-6)
    np.testing.assert_array_equal(window.analysis()[:, 1], world.analysis[1, index + 1 : index + 5])
    put(tmp_path, {}, names={"pm2p5": "fine", "pm10": "coarse"}, stations={**options, "unitt": "ug m-3"})
    with pytest.raises(ValueError, match=r"archive.yaml: stations: .*unitt"):
        load(tmp_path)


def test_times_of_splits_are_written_as_yaml_writes_them(folder, tmp_path):
    text = (folder / "archive.yaml").read_text().replace("'", "")  # dates of YAML, not text
    (tmp_path / "archive.yaml").write_text(text.replace("2020-02-29", "2020-02-29 12:00:00"))
    splits = read_settings(tmp_path).splits
    expected = read_settings(folder).splits
    assert splits["train"] == expected["train"]
    assert expected["train"].end == np.datetime64("2020-01-20T23:59:59")
    assert splits["test"].end == np.datetime64("2020-02-29T12")


def test_observations_may_be_maps(tmp_path, world):
    groups = world.groups()
    maps = world.observed(0, len(TIMES)).astype(np.float32)
    groups["obs"] = world.maps(maps.swapaxes(0, 1))
    groups["obs"]["pm2p5"][170:178] = np.nan
    groups["obs"]["pm10"][170:178] = np.nan
    rows = load(put(tmp_path / "a", groups))["test"]
    window = at(rows, "2020-02-10T00")
    index = int((window.init - TIMES[0]) / STEP)
    np.testing.assert_array_equal(window.observed(), maps[index + 1 : index + 5])
    assert window.seen().any()
    assert "2020-02-13T00" not in {row["id"] for row in rows}


# What is refused


def rename(old, new, **variables):
    def change(groups, settings):
        groups[old] = groups[old].rename(variables or {old: new})

    return change


def attr(group, name, **attrs):
    def change(groups, settings):
        groups[group][name].attrs.update(attrs)
        for key, value in attrs.items():
            if value is None:
                del groups[group][name].attrs[key]

    return change


def setting(**changes):
    return lambda groups, settings: settings.update(changes)


def split(name, **changes):
    def change(groups, settings):
        settings["splits"] = {**SETTINGS["splits"], name: {**SETTINGS["splits"][name], **changes}}

    return change


def part(group, **selection):
    def change(groups, settings):
        groups[group] = groups[group].isel(**selection)

    return change


def without(group, *names):
    def change(groups, settings):
        groups[group] = groups[group].drop_vars(names)

    return change


def no_coordinates(groups, settings):
    for name in ("analysis", "static"):
        groups[name] = groups[name].drop_vars(["lat", "lon"])


def moved(group):
    def change(groups, settings):
        groups[group] = groups[group].assign_coords(lat=groups[group]["lat"] + 0.5)

    return change


def values(group, name, index, value):
    def change(groups, settings):
        groups[group][name][index] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (attr("analysis", "pm10", units=None), ["analysis.nc: pm10 has no units", "ug m-3"]),
        (attr("analysis", "pm10", units="ppb"), ["analysis.nc: pm10 has units 'ppb'", "kg m-3"]),
        (attr("obs", "pm10", units="ppb"), ["obs.nc: pm10 has units 'ppb'"]),
        (attr("forcing", "u10", units="km/h"), ["forcing.nc: u10 has units 'km/h'", "m s-1"]),
        (attr("forcing", "u10", units=None), ["forcing.nc: u10 has no units"]),
        (attr("forcing", "u10", role="hindcast"), ["forcing.nc: u10 has role 'hindcast'", "forecast"]),
        (values("forcing", "u10", slice(None), 3.0), ["forcing u10 is constant in train"]),
        (rename("analysis", "", pm10="dust"), ["analysis.nc has no pm10", "dust", "names: {pm10: ...}"]),
        (
            part("analysis", time=[0, 1, 2, 4, 5]),
            ["analysis.nc: time is not regular", "6 h", "12 h", "2020-01-01T12"],
        ),
        (part("analysis", time=slice(None, None, 2)), ["analysis.nc: times are 12 h apart", "step_h=6"]),
        (part("analysis", time=slice(None, None, -1)), ["times are -6 h apart"]),
        (part("obs", time=[*range(240), 239]), ["obs.nc has the time 2020-02-29 18:00:00 twice"]),
        (part("forcing", time=slice(20, None)), ["the forcing has times 2020-01-06", "split train", "2020-01-01T00"]),
        (part("forcing", x=slice(1, None)), ["forcing.nc has 8x9 cells", "(8, 10)"]),
        (part("model", prediction_timedelta=slice(0, 3)), ["model.nc has leads to 0 days 18:00:00", "4 of 6 h"]),
        (moved("forcing"), ["forcing.nc has other lat and lon", "0.01 degrees"]),
        (moved("analysis"), ["analysis.nc has other lat and lon"]),
        (no_coordinates, ["analysis.nc has no lat and lon", "static.nc"]),
        (without("obs", "lat", "lon"), ["obs.nc has no lat and lon of its stations"]),
        (without("analysis", "lat"), ["analysis.nc has lon and not the other"]),
        (lambda groups, settings: groups.pop("analysis"), ["no analysis.zarr, analysis.nc or folder analysis/"]),
        (setting(coarsen=3), ["archive.yaml: coarsen 3 does not divide the 8x10 cells"]),
        (setting(coarsen=0), ["archive.yaml: coarsen is 0", "at least 1"]),
        (setting(leeds=4), ["'leeds' is no key; did you mean 'leads'"]),
        (setting(splits={}), ["archive.yaml has splits []", "train"]),
        (setting(like="elsewhere"), ["like is 'elsewhere', which is no folder"]),
        (setting(normals={"u10": 3}), ["normals of u10 are 3"]),
        (setting(normals={"u10": [1.0, 2.0]}), ["normals lack ['pblh']"]),
        (split("test", every_h=9), ["every_h of split test is 9", "multiple of step_h=6"]),
        (split("test", to="soon"), ["split test", "'soon'", "2019-01-01T06"]),
        (split("test", to="2020-02-01"), ["split test ends at 2020-02-01"]),
        (split("validation", to="2020-02-08"), ["splits validation and test overlap", "2020-02-06T00"]),
        (
            split("train", to="2020-01-21T06"),
            ["split validation begins 2020-01-22T00", "at least the lead time (24 hours)"],
        ),
        (split("test", **{"from": "2020-02-29"}), ["split test", "has no window", "4 leads of 6 h"]),
    ],
)
def test_a_damaged_archive_is_refused_in_words(tmp_path, world, change, says):
    groups, settings = world.groups(), {}
    change(groups, settings)
    with pytest.raises(ValueError) as raised:
        load(put(tmp_path / "a", groups, **settings))["test"][0]["window"].given()
    for word in says:
        assert word in str(raised.value), raised.value


def test_stations_elsewhere_are_refused(tmp_path, world):
    groups = world.groups()
    groups["obs"]["lat"][:] = -30.0
    with pytest.raises(ValueError, match="none of its 12 stations lies in the grid"):
        load(put(tmp_path / "a", groups))


def test_a_missing_folder_says_what_belongs_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="give an archive folder"):
        load(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"archive.yaml is not there; it names the splits"):
        load(tmp_path)
    (tmp_path / "archive.yaml").write_text("[1, 2]")
    with pytest.raises(ValueError, match="holds a list"):
        load(tmp_path)


def test_a_file_of_something_else_is_refused(tmp_path):
    put(tmp_path, {})
    (tmp_path / "analysis.nc").write_text("no")
    with pytest.raises(ValueError, match=r"analysis.nc does not open as NetCDF"):
        load(tmp_path)


def test_a_window_beside_the_archive_is_refused(folder):
    with pytest.raises(ValueError, match=r"has no time 2020-01-01T03.*every 6 h"):
        Window(str(folder), np.datetime64("2020-01-01T03", "ns"), 4, cf.VARIABLES, 6).observed()


# Requests: rows without truth


def last_frames(world, init, frames=2, groups=("analysis", "forcing")):
    stop = int((np.datetime64(init) - TIMES[0]) / STEP) + 1
    return {name: world.groups()[name].isel(time=slice(stop - frames, stop)) for name in groups}


def same_inputs(request: Window, window: Window) -> None:
    for name in ("history", "seen", "given", "ahead", "region", "lat", "lon", "land"):
        np.testing.assert_array_equal(getattr(request, name)(), getattr(window, name)(), err_msg=name)
    assert request.given_names == window.given_names


def test_a_store_in_the_archive_gives_the_row_of_its_last_time(tmp_path, world):
    folder = put(tmp_path / "a", world.groups())
    window = at(load(folder)["test"], "2020-02-10T00")
    frames = last_frames(world, "2020-02-10T00")
    for name, ending in (("now", ".nc"), ("later", ".zarr")):
        ds = frames["analysis"]
        ds.to_netcdf(folder / "now.nc") if ending == ".nc" else ds.to_zarr(folder / "later.zarr", consolidated=False)
        rows = request_rows(folder / f"{name}{ending}")
        assert [row["id"] for row in rows] == ["2020-02-10T00"]
        assert {key: rows[0][key] for key in ("week", "season", "month")} == {
            "week": "2020-W07",
            "season": "DJF",
            "month": 2,
        }
        same_inputs(rows[0]["window"], window)
        assert np.isnan(rows[0]["window"].observed()).all()
        assert np.isnan(rows[0]["window"].analysis()).all()


def test_a_store_brings_the_forcing_that_the_archive_does_not_have_yet(tmp_path, world):
    groups = world.groups()
    short = {
        name: ds.isel(time=slice(0, 150)) if name in ("analysis", "forcing") else ds for name, ds in groups.items()
    }
    del short["model"]
    folder = put(tmp_path / "a", short, splits={"train": SETTINGS["splits"]["train"]})
    frames = last_frames(world, "2020-02-20T00")
    frames["analysis"].assign(frames["forcing"].data_vars).to_netcdf(folder / "now.nc")
    complete = at(load(put(tmp_path / "b", groups))["test"], "2020-02-20T00")
    same_inputs(request_rows(folder / "now.nc")[0]["window"], complete)
    frames["analysis"].to_netcdf(folder / "bare.nc")
    with pytest.raises(ValueError, match="the forcing does not cover the 2 times up to the init"):
        request_rows(folder / "bare.nc")


def test_a_folder_of_its_own_is_like_the_archive_trained_on(tmp_path, world, folder):
    frames = last_frames(world, "2020-02-10T00", groups=("analysis", "forcing", "obs"))
    today = tmp_path / "today"
    put(today, frames)
    (today / "archive.yaml").write_text(yaml.safe_dump({"like": str(folder)}))
    same_inputs(request_rows(today)[0]["window"], at(load(folder)["test"], "2020-02-10T00"))


def test_a_folder_may_hold_the_statistics_instead(tmp_path, world, folder):
    frames = last_frames(world, "2020-02-10T00", groups=("analysis", "forcing", "obs"))
    today = put(tmp_path / "today", {**frames, "static": world.groups()["static"]})
    with pytest.raises(ValueError, match=r"holds no time of a split train.*like: <the folder"):
        request_rows(today)
    known = {name: list(normal) for name, normal in normals(folder).items()}
    put(today, {}, normals=known)
    same_inputs(request_rows(today)[0]["window"], at(load(folder)["test"], "2020-02-10T00"))


def test_requests_that_do_not_serve_are_refused(tmp_path, world, folder):
    today = tmp_path / "today"
    put(today, last_frames(world, "2020-02-10T00", frames=1))
    (today / "archive.yaml").write_text(yaml.safe_dump({"like": str(folder)}))
    with pytest.raises(ValueError, match="holds 1 times; a forecast begins with 2"):
        request_rows(today)
    put(
        tmp_path / "poor",
        {"analysis": last_frames(world, "2020-02-10T00")["analysis"], "forcing": world.groups()["forcing"][["u10"]]},
    )
    (tmp_path / "poor" / "archive.yaml").write_text(yaml.safe_dump({"like": str(folder)}))
    with pytest.raises(ValueError, match=r"has the forcing {'u10': 'analysis'} and the archive trained on"):
        request_rows(tmp_path / "poor")
    (today / "archive.yaml").write_text(yaml.safe_dump({"like": str(folder), "leads": 8}))
    with pytest.raises(ValueError, match="leads is 8 and 4 in"):
        request_rows(today)


# Sizes


def test_reading_a_small_archive_is_fast(folder):
    """Training reads thousands of windows: each part is well below a millisecond; the bound allows for a busy machine."""
    from time import perf_counter

    rows = load(folder)["train"]
    rows[0]["window"].given()
    for name in ("history", "seen", "given", "observed", "analysis"):
        times = []
        for row in rows:
            start = perf_counter()
            getattr(row["window"], name)()
            times.append(perf_counter() - start)
        assert np.median(times) < 1e-3, name


LARGE = {"rows": 128, "columns": 174, "frames": 3900}  # 9 maps of float32: 3.1 GB

MAKE = """
import sys
import numpy as np, xarray as xr, yaml
folder, rows, columns, frames = sys.argv[1], *map(int, sys.argv[2:])
times = (np.datetime64("2020-01-01") + np.arange(frames) * np.timedelta64(6, "h")).astype("datetime64[ns]")
lat, lon = np.meshgrid(np.linspace(20, 50, rows), np.linspace(100, 145, columns), indexing="ij")
grid = {"lat": (("y", "x"), lat), "lon": (("y", "x"), lon)}
noise = np.random.default_rng(0).gamma(2, 10, (240, rows, columns)).astype("f4")
def store(name, units, **attrs):
    for start in range(0, frames, 240):
        part = times[start : start + 240]
        data = {
            v: (("time", "y", "x"), noise[: len(part)] + n + start / 24, {"units": u, **attrs})
            for n, (v, u) in enumerate(units.items())
        }
        ds = xr.Dataset(data, coords={"time": part} if start else {"time": part, **grid})
        raw = {v: {"chunks": (240, rows, columns), "compressors": None} for v in units}
        how = {"append_dim": "time"} if start else {"encoding": raw}
        ds.to_zarr(f"{folder}/{name}.zarr", consolidated=False, **how)
store("analysis", {"pm2p5": "ug m-3", "pm10": "ug m-3"})
forcing = {"u10": "m s-1", "v10": "m s-1", "pblh": "m", "precip": "mm h-1", "t2m": "K", "humidity": "1", "cloud": "1"}
store("forcing", forcing, role="analysis")
rng = np.random.default_rng(1)
cells = rng.permutation(lat.size)[:400]
reports = rng.gamma(2, 12, (frames, 400)).astype("f4")
xr.Dataset(
    {v: (("time", "station"), reports, {"units": "ug m-3"}) for v in ("pm2p5", "pm10")},
    coords={"time": times, "lat": ("station", lat.ravel()[cells]), "lon": ("station", lon.ravel()[cells])},
).to_zarr(f"{folder}/obs.zarr", consolidated=False)
half = frames // 2
splits = {
    name: {"from": str(times[first])[:13], "to": str(times[last])[:13], "every_h": 6}
    for name, first, last in (("train", 0, half), ("test", half + 30, frames - 1))
}
yaml.safe_dump({"step_h": 6, "history": 2, "leads": 20, "splits": splits}, open(f"{folder}/archive.yaml", "w"))
"""

READ = """
import resource, sys
import numpy as np
from data.air_archive import open_archive
from data.air_quality import load
splits = load(sys.argv[1])
total = np.zeros(2)
for rows in splits.values():
    for row in rows:
        window = row["window"]
        window.history(), window.given()
        total += [np.nansum(window.observed(), dtype=float), window.analysis().sum(dtype=float)]
archive = open_archive(sys.argv[1])
assert archive.analysis._cache is not None, "the archive was held in memory"
print(sum(map(len, splits.values())), *total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    import shutil

    folder = tmp_path_factory.mktemp("large")
    subprocess.run([sys.executable, "-c", MAKE, str(folder), *map(str, LARGE.values())], check=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size > 3e9
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
def test_windows_of_a_3_gb_archive_are_read_below_1_gb_of_memory(large):
    read = subprocess.run([sys.executable, "-c", READ, str(large)], check=True, capture_output=True, text=True)
    windows, observed, analysed, peak_mb = map(float, read.stdout.split())
    assert windows > 3000
    assert observed > 0
    assert analysed > 0
    assert peak_mb < 750, f"peak resident memory {peak_mb:.0f} MB"  # of 1000: a net and its library need the rest


@pytest.mark.slow
def test_two_workers_of_a_cluster_read_what_one_process_reads(large):
    distributed = pytest.importorskip("distributed")

    def sums(
        window: Window,
    ) -> tuple[float, float]:  # in here, so that it travels by value: workers cannot import tests
        return float(np.nansum(window.observed(), dtype=float)), float(window.analysis().sum(dtype=float))

    windows = [row["window"] for row in load(large)["test"][:400:50]]
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        there = client.gather(client.map(sums, windows))
    assert there == [sums(window) for window in windows]
