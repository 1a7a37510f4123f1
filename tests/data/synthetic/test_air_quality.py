"""The synthetic archive: its files and attributes, determinism, stations, forecasts without leaks, a year's statistics."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import yaml

from data import air_quality as reader
from data.synthetic import air_quality
from data.synthetic.air_quality import forecasts, run, worlds, write
from data.synthetic.air_quality_grid import REGIONS, lambert, lat_lon
from data.synthetic.air_quality_stations import Network
from data.synthetic.air_quality_weather import ACTIVITY, drivers
from data.synthetic.air_quality_world import particles

SMALL = {
    "grid": (12, 16, 110.0),
    "splits": {
        "train": {"from": "2022-12-01T00", "to": "2022-12-20T18", "every_h": 6},
        "validation": {"from": "2022-12-26T00", "to": "2023-01-04T18", "every_h": 24},
        "test": {"from": "2023-01-10T00", "to": "2023-01-20T18", "every_h": 48},
    },
    "stations": 40,
}
STORES = ("analysis", "forcing", "obs", "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("air") / "archive"
    write(path, 3, **SMALL)
    return path


@pytest.fixture(scope="module")
def stores(folder):
    return {name: xr.open_zarr(folder / f"{name}.zarr", decode_timedelta=True).load() for name in STORES}


def plain(data):
    """With station names of one type, whatever the format reads them as."""
    return data.assign_coords(station_id=data.station_id.astype("<U5")) if "station_id" in data.coords else data


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "static.nc")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_folder_holds_what_the_contract_names(folder):
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["analysis.zarr", "archive.yaml", "forcing.zarr", "model.zarr", "obs.zarr", "static.nc"]
    about = yaml.safe_load((folder / "archive.yaml").read_text())
    assert about == {
        "step_h": 6,
        "history": 2,
        "leads": 20,
        "coarsen": 2,
        "splits": SMALL["splits"],
        "regions": dict(enumerate(REGIONS, start=1)),
    }


def test_maps_are_cf_and_whole_on_every_step(stores, folder):
    every = np.arange("2022-12-01T00", "2023-01-21T00", 6, dtype="datetime64[h]").astype("datetime64[ns]")
    for name in ("analysis", "forcing"):
        data = stores[name]
        assert np.array_equal(data.time, every)
        assert data.attrs["Conventions"].startswith("CF-1")
        for field in data.data_vars.values():
            if field.dims:
                assert field.dims == ("time", "y", "x")
                assert field.dtype == np.float32
                assert field.attrs["grid_mapping"] == "crs"
                assert np.isfinite(field).all()
        assert data.crs.attrs["grid_mapping_name"] == "lambert_conformal_conic"
        assert data.lat.dims == data.lon.dims == ("y", "x")
        assert (data.lat.diff("y") > 0).all()
    units = {
        name: one.attrs["units"] for store in ("analysis", "forcing") for name, one in stores[store].items() if one.dims
    }
    assert units == {
        "pm2p5": "ug m-3",
        "pm10": "ug m-3",
        "u10": "m s-1",
        "v10": "m s-1",
        "pblh": "m",
        "precip": "mm h-1",
        "t2m": "K",
    }
    assert (stores["analysis"].pm10 > stores["analysis"].pm2p5).all()
    assert stores["analysis"].pm2p5.min() > 0
    ground = xr.open_dataset(folder / "static.nc")
    assert set(ground.data_vars) == {"emission", "land", "height", "region", "crs"}
    assert ground.region.dtype.kind == "i"
    assert ground.emission.max() > 0


def test_every_forcing_is_of_the_analysis(stores):
    """True weather is not known ahead, so that none of it may be read after an init."""
    roles = {field.attrs.get("role") for field in stores["forcing"].data_vars.values() if field.dims}
    assert roles == {"analysis"}


def test_stations_are_a_cf_time_series_inside_their_cells(stores):
    obs, analysis = stores["obs"], stores["analysis"]
    assert obs.attrs["featureType"] == "timeSeries"
    assert obs.station_id.attrs["cf_role"] == "timeseries_id"
    assert obs.sizes["station"] == 40 == len(set(obs.station_id.values))
    assert np.array_equal(obs.time, analysis.time)
    apart = (obs.lat.values[:, None] - analysis.lat.values.ravel()) ** 2
    apart += ((obs.lon.values[:, None] - analysis.lon.values.ravel()) * np.cos(np.radians(38))) ** 2
    assert len(set(apart.argmin(1))) == 40  # one in a cell
    assert (np.sqrt(apart.min(1)) > 0.01).any()  # not all at its centre
    assert np.nanmin(obs.pm2p5) > 0


def test_model_starts_from_each_midnight_init_with_history(stores):
    model = stores["model"]
    assert model.pm2p5.dims == ("time", "prediction_timedelta", "y", "x")
    assert np.array_equal(
        model.prediction_timedelta, np.arange(6, 121, 6).astype("timedelta64[h]").astype("timedelta64[ns]")
    )
    days = [*(f"2022-12-{day}" for day in range(27, 31)), "2023-01-12", "2023-01-14"]
    assert [str(time)[:13] for time in model.time.values] == [f"{day}T00" for day in days]
    assert model.pm2p5.dtype == np.float32
    first = model.isel(prediction_timedelta=0)
    after = stores["analysis"].sel(time=first.time + np.timedelta64(6, "h"))
    assert np.corrcoef(first.pm2p5.values.ravel(), after.pm2p5.values.ravel())[0, 1] > 0.97


def test_the_reader_of_archives_reads_it(folder, stores):
    rows = reader.load(folder)
    assert {name: len(split) for name, split in rows.items()} == {"train": 59, "validation": 4, "test": 2}
    window = rows["test"][0]["window"]
    assert window.history().shape == (2, 2, 6, 8)
    assert window.model().shape == window.analysis().shape == (20, 2, 6, 8)
    assert np.isfinite(window.observed()).any()
    init = stores["model"].pm2p5.sel(time=window.init)
    np.testing.assert_allclose(window.model()[3, 0, 0, 0], init[3, :2, :2].mean(), rtol=1e-5)


def test_same_seed_same_bytes_another_seed_other_air(folder, stores, tmp_path):
    write(tmp_path / "again", 3, **SMALL)
    assert digest(tmp_path / "again") == digest(folder)
    write(tmp_path / "other", 4, **SMALL)
    for store, name in (("analysis", "pm2p5"), ("forcing", "u10"), ("obs", "lat"), ("model", "pm10")):
        other = xr.open_zarr(tmp_path / "other" / f"{store}.zarr", decode_timedelta=True)
        assert not np.allclose(other[name], stores[store][name], rtol=1e-3), store


def test_analysis_is_the_erring_models_and_reports_are_of_the_truth(stores):
    grid, begin = lambert(*SMALL["grid"]), air_quality._hour("2022-12-01T00") - air_quality.SPIN_UP_H
    series = drivers(air_quality.SPIN_UP_H + 48, np.random.default_rng([3, 0]))  # the archive's, which go on
    *_, (now, weather, states) = run(grid, worlds(grid, 3), series, begin)
    times = now[::6].astype("datetime64[h]").astype("datetime64[ns]")
    truth, analysis = (grid.without_ring(particles(states[::6, world])[0]) for world in (0, 1))
    np.testing.assert_allclose(stores["analysis"].pm2p5.sel(time=times), analysis, rtol=1e-5)
    np.testing.assert_allclose(stores["forcing"].pblh.sel(time=times), grid.without_ring(weather.pblh[::6]), rtol=1e-5)
    cells = Network(grid, 40, np.random.default_rng([3, 2])).cells
    reports = stores["obs"].pm2p5.sel(time=times).values
    error = {
        name: np.log(reports / np.pad(field, ((0, 0), (1, 1), (1, 1))).reshape(4, -1)[:, cells])
        for name, field in (("truth", truth), ("analysis", analysis))
    }
    assert np.nanstd(error["truth"]) < 0.2 < np.nanstd(error["analysis"])


def test_netcdf_holds_what_zarr_holds(folder, stores, tmp_path, monkeypatch):
    monkeypatch.setattr(air_quality, "FRAMES", 80)  # so that files are appended to
    write(tmp_path / "netcdf", 3, **SMALL, format="netcdf")
    assert {path.name for path in (tmp_path / "netcdf").iterdir()} == {
        *(f"{name}.nc" for name in STORES),
        "archive.yaml",
        "static.nc",
    }
    for name in STORES:
        with xr.open_dataset(tmp_path / "netcdf" / f"{name}.nc", decode_timedelta=True) as file:
            xr.testing.assert_equal(plain(file.load()), plain(stores[name]))
            for key, one in stores[name].drop_vars("crs", errors="ignore").variables.items():
                assert file[key].attrs == one.attrs
    assert {name: len(split) for name, split in reader.load(tmp_path / "netcdf").items()} == {
        "train": 59,
        "validation": 4,
        "test": 2,
    }


def test_zarr_appended_in_parts_is_the_same(stores, tmp_path, monkeypatch):
    monkeypatch.setattr(air_quality, "FRAMES", 80)
    write(tmp_path / "parts", 3, **SMALL)
    for name in STORES:
        xr.testing.assert_identical(
            xr.open_zarr(tmp_path / "parts" / f"{name}.zarr", decode_timedelta=True).load(), stores[name]
        )


def test_a_folder_that_exists_is_left_alone_and_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(FileExistsError, match="exists already"):
        write(tmp_path, 0, **SMALL)
    with pytest.raises(ValueError, match="format='grib'"):
        write(tmp_path / "new", 0, **SMALL, format="grib")
    with pytest.raises(KeyError):
        write(tmp_path / "new", 0, splits={"train": {"from": "2022-01-01T00"}})
    assert not list(tmp_path.iterdir())


def test_reports_err_by_site_and_by_report_and_miss_as_declared():
    network = Network(lat_lon(), 220, np.random.default_rng(0))
    assert len(set(network.cells)) == 220
    truth = {"pm2p5": np.full((8000, 220), 20.0), "pm10": np.full((8000, 220), 50.0)}
    reports = network.report(truth, np.random.default_rng(1))
    gaps = {name: np.isnan(values) for name, values in reports.items()}
    log = np.log(reports["pm2p5"] / 20)
    assert np.nanmean(log, 0).std() == pytest.approx(0.12, rel=0.15)  # of 220 sites
    assert np.nanstd(log - np.nanmean(log, 0)) == pytest.approx(0.12, rel=0.01)
    for gap in gaps.values():
        assert gap.mean() == pytest.approx(0.077, abs=0.003)
    both = gaps["pm2p5"] & gaps["pm10"]
    assert both.mean() == pytest.approx(0.0385 + 0.0016, abs=0.003)  # outages, and chance
    lasting = (both[1:] & both[:-1]).mean() / both.mean()
    assert lasting == pytest.approx(1 - 1 / 12, abs=0.06)
    site = np.nanmean(log, 0) - np.nanmean(np.log(reports["pm10"] / 50), 0)
    assert abs(site).max() < 0.02  # one bias for all that a station measures


def test_outages_are_under_way_when_the_series_begins():
    network = Network(lat_lon(), 220, np.random.default_rng(0))
    report = network.report({"pm2p5": np.ones((5, 20000))}, np.random.default_rng(1))["pm2p5"]
    assert np.isnan(report).mean() == pytest.approx(0.077, abs=0.006)


def test_stations_are_fewer_where_land_is_short():
    grid = lat_lon(34, 38, 124, 130)
    network = Network(grid, 220, np.random.default_rng(0))
    assert len(network.cells) == (grid.without_ring(grid.land) >= 0.5).sum() < 35


@pytest.fixture(scope="module")
def started():
    """A run of 20 days on a part of the grid, its drivers, and the model's states at two inits."""
    grid, begin = lat_lon(30, 42, 112, 130), 24 * 19000
    series = drivers(20 * 24, np.random.default_rng(8))
    series[:, ACTIVITY] = 0  # its future is not forecast but faded
    model = worlds(grid, 0)[1]
    inits = begin + np.array([10 * 24, 14 * 24])
    states = np.concatenate([states[:, 0] for _, _, states in run(grid, (model,), series, begin)])
    return grid, model, inits, series, begin, states


def make(started, series=None, skill_h=air_quality.SKILL_H, seed=0):
    grid, model, inits, true, begin, states = started
    some = forecasts(
        grid, model, inits, states[inits - begin], true if series is None else series, begin, seed, skill_h
    )
    return np.concatenate([values for _, values in some])


def test_a_forecast_in_the_true_weather_is_the_models_own_run(started):
    _, _, inits, _, begin, states = started
    values = make(started, skill_h=1e12)
    for number, init in enumerate(inits):
        at = init - begin + 6 * np.arange(1, 20)
        np.testing.assert_allclose(values[number, :19], states[at], rtol=1e-3)


def test_forecasts_drift_from_the_truth_as_leads_grow(started):
    grid, _, inits, _, begin, states = started
    values = particles(make(started))[0]
    true = np.stack([particles(states[init - begin + 6 * np.arange(1, 20)])[0] for init in inits])
    error = [
        np.sqrt(np.mean((values[:, lead] - true[:, lead])[:, grid.inner.reshape(-1) > 0] ** 2)) for lead in (0, 3, 11)
    ]
    assert error[0] < error[1] < error[2]


def test_nothing_after_the_init_enters_a_forecast_but_the_degraded_weather(started):
    _, _, inits, series, begin, _ = started
    later = series.copy()
    later[inits[-1] + 1 - begin :] = np.random.default_rng(1).standard_normal(later[inits[-1] + 1 - begin :].shape)
    last = (slice(1, 2),)
    unskilled = make(started, skill_h=1e-3)[last]
    assert np.array_equal(make(started, later, skill_h=1e-3)[last], unskilled)
    assert not np.allclose(make(started, later)[last], make(started)[last], rtol=0.01)
    busy, idle = series.copy(), series.copy()
    busy[:, ACTIVITY] = idle[: inits[-1] + 1 - begin, ACTIVITY] = 2
    assert np.array_equal(make(started, busy)[last], make(started, idle)[last])
    assert not np.allclose(make(started, busy)[last], make(started)[last], rtol=0.01)


def test_weather_forecasts_correlate_with_the_truth_as_declared(monkeypatch):
    """What reaches the weather is r truth + sqrt(1 - r^2) another realisation, of variance 1 at every lead."""
    grid, seen = lat_lon(30, 32, 112, 114), []
    series, inits = drivers(6000 * 4, np.random.default_rng(0)), np.arange(0, 23000, 72)
    original = air_quality.Climate.weather
    monkeypatch.setattr(
        air_quality.Climate, "weather", lambda self, now, flat: (seen.append((now, flat)), original(self, now, flat))[1]
    )
    starts = np.ones((len(inits), 4, grid.lat.size), np.float32)
    list(forecasts(grid, worlds(grid, 0)[1], inits, starts, series, 0, 0))
    now, flat = (np.concatenate(part) for part in zip(*seen, strict=True))
    lead = np.concatenate([np.repeat(np.arange(6) + 6 * (k % 20), len(now_) // 6) for k, (now_, _) in enumerate(seen)])
    for hours in (0, 24, 96, 119):
        pairs = flat[lead == hours][:, :ACTIVITY], series[now[lead == hours]][:, :ACTIVITY]
        correlation = (pairs[0] * pairs[1]).mean() / np.sqrt((pairs[0] ** 2).mean() * (pairs[1] ** 2).mean())
        assert correlation == pytest.approx(np.exp(-hours / 96), abs=0.05)
        assert (pairs[0] ** 2).mean() == pytest.approx(1, abs=0.1)


@pytest.fixture(scope="module")
def years():
    """Two years of the default world: times, reports {name: (time, station)} and the analysis at the stations."""
    grid, first = lat_lon(), air_quality._hour("2022-01-01T00")
    begin, last = first - air_quality.SPIN_UP_H, air_quality._hour("2024-01-01T00")
    network = Network(grid, 220, np.random.default_rng([0, 2]))
    times, truth, analysis = [], [], []
    for now, _, states in run(grid, worlds(grid, 0), drivers(last - begin, np.random.default_rng([0, 0])), begin):
        frames = np.flatnonzero((now % 6 == 0) & (now >= first))
        times.append(now[frames])
        truth.append(np.stack(particles(states[frames, 0]))[..., network.cells])
        analysis.append(np.stack(particles(states[frames, 1]))[..., network.cells])
    names, times = ("pm2p5", "pm10"), np.concatenate(times).astype("datetime64[h]")
    reports = network.report(dict(zip(names, np.concatenate(truth, 1), strict=True)), np.random.default_rng([0, 3]))
    return times, reports, dict(zip(names, np.concatenate(analysis, 1), strict=True))


def correlation(x, y):
    whole = np.isfinite(x) & np.isfinite(y)
    return np.corrcoef(x[whole], y[whole])[0, 1]


def test_concentrations_of_two_years_are_near_the_target(years):
    """Targets of the design note: PM2.5 mean 23.5, 19.5 % >= 35, 5.0 % >= 75; PM10 9.2 % >= 80, 2.4 % >= 150.

    Five years of each of three seeds gave 23.3, 19.5 %, 5.4 %, 8.3 % and 2.3 %; single years have means of 20 to 27.
    """
    _, reports, _ = years
    fine, coarse = (values[np.isfinite(values)] for values in reports.values())
    assert fine.mean() == pytest.approx(23.5, abs=4)
    assert (fine >= 35).mean() == pytest.approx(0.195, abs=0.04)
    assert (fine >= 75).mean() == pytest.approx(0.050, abs=0.02)
    assert (coarse >= 80).mean() == pytest.approx(0.092, abs=0.03)
    assert (coarse >= 150).mean() == pytest.approx(0.024, abs=0.012)


def test_winter_is_foul_and_summer_clean(years):
    """Target: 47 in December, 12 in August. Here a single month of a year may be another, so seasons are compared."""
    times, reports, _ = years
    month = times.astype("datetime64[M]").astype(int) % 12 + 1
    winter, summer = (np.nanmean(reports["pm2p5"][np.isin(month, months)]) for months in ((12, 1), (7, 8)))
    assert winter == pytest.approx(47, abs=10)
    assert summer == pytest.approx(12, abs=3)


@pytest.mark.parametrize(("hours", "target", "within"), [(6, 0.92, 0.03), (24, 0.61, 0.08), (48, 0.40, 0.08)])
def test_persistence_decays_as_targeted(years, hours, target, within):
    """Mean over stations of the correlation in time; at 120 h the target of .21 is not met (.32, seasonal)."""
    fine, steps = years[1]["pm2p5"], hours // 6
    found = np.mean([correlation(series[:-steps], series[steps:]) for series in fine.T])
    assert found == pytest.approx(target, abs=within)


def test_the_analysis_errs_as_a_model_does(years):
    """Target: r .97. (An RMSE of 12.3 beside it belongs to a world of heavier tails; here it is 7 to 9.)"""
    _, reports, analysis = years
    fine, coarse = ((analysis[name], reports[name]) for name in ("pm2p5", "pm10"))
    assert correlation(*fine) == pytest.approx(0.97, abs=0.012)
    assert 5 < np.sqrt(np.nanmean((fine[0] - fine[1]) ** 2)) < 13
    assert abs(np.nanmean(fine[0] - fine[1])) < 4
    assert correlation(*coarse) > 0.94


@pytest.mark.slow
def test_the_default_archive_is_made_in_time(tmp_path):
    """Processor time, because the core may be shared: 20 to 25 s on a busy one."""
    import time

    began = time.process_time()
    write(tmp_path / "archive", 0)
    assert time.process_time() - began < 40
    rows = reader.load(tmp_path / "archive")
    assert {name: len(split) for name, split in rows.items()} == {"train": 4343, "validation": 354, "test": 359}
