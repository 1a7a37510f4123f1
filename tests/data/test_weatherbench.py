"""Forecast files: round trips of our own, and what other forecasters write brought to the same arrays."""

import numpy as np
import pytest
import xarray as xr

from data.weatherbench import read_forecasts, write_forecasts

EDGES = ((15.0, 35.0, 75.0), (30.0, 80.0, 150.0))
INITS = (np.datetime64("2023-01-05T06") + np.arange(5) * np.timedelta64(24, "h")).astype("datetime64[ns]")
LAT, LON = np.meshgrid(30.0 + np.arange(4), 120.0 + np.arange(6), indexing="ij")
LEADS = np.arange(1, 4) * np.timedelta64(6, "h").astype("timedelta64[ns]")
CELL = np.dtype([("value", "f4"), ("level", "i1"), ("exceed", "f2", (3,)), ("members", "f2", (8,))])


def plain(seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).gamma(2, 15, (5, 3, 2, 4, 6)).astype(np.float32))


def structured(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    out = np.empty((5, 3, 2, 4, 6), CELL)
    out["value"] = rng.gamma(2, 15, out.shape)
    out["level"] = rng.integers(0, 4, out.shape)
    out["exceed"] = -np.sort(-rng.random((*out.shape, 3)), axis=-1)
    out["members"] = np.sort(rng.gamma(2, 15, (*out.shape, 8)), axis=-1)
    return list(out)


def write(path, completions, **changes):
    write_forecasts(path, INITS, completions, **{"edges": EDGES, "lat": LAT, "lon": LON, **changes})
    return path


def grid(**changes):
    return {"lat": LAT, "lon": LON, "edges": EDGES, **changes}


@pytest.mark.parametrize("ending", [".zarr", ".nc"])
@pytest.mark.parametrize("make", [plain, structured])
def test_what_is_written_is_read_again_bit_for_bit(tmp_path, ending, make):
    completions = make()
    found = read_forecasts(write(tmp_path / f"f{ending}", completions), **grid())
    assert list(found) == list(INITS)
    for init, completion in zip(INITS, completions, strict=True):
        assert found[init].dtype == completion.dtype
        np.testing.assert_array_equal(found[init], completion)


def test_the_file_is_in_the_layout_of_weatherbench(tmp_path):
    completions = structured()
    ds = xr.open_zarr(write(tmp_path / "f.zarr", completions), consolidated=False, decode_timedelta=True)
    assert ds["pm2p5"].dims == ("time", "prediction_timedelta", "y", "x")
    assert ds["prediction_timedelta"].dtype == np.dtype("timedelta64[ns]")
    np.testing.assert_array_equal(ds["prediction_timedelta"], LEADS)
    np.testing.assert_array_equal(ds["time"], INITS)
    assert ds["pm2p5"].attrs["units"] == "ug m-3"
    assert ds["pm2p5"].attrs["standard_name"] == "mass_concentration_of_pm2p5_ambient_aerosol_particles_in_air"
    np.testing.assert_array_equal(ds["pm10_threshold"], EDGES[1])
    np.testing.assert_array_equal(ds["pm10_class"][2, 1], completions[2]["level"][1, 1])
    np.testing.assert_array_equal(ds["pm10_exceedance"][2, 1, 2], completions[2]["exceed"][1, 1, ..., 2])
    np.testing.assert_array_equal(ds["pm2p5_members"][2, 1, 7], completions[2]["members"][1, 0, ..., 7])
    assert ds["pm2p5_members"].dims == ("time", "prediction_timedelta", "number", "y", "x")


def test_writing_takes_a_generator_in_parts_and_replaces_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr("data.weatherbench.BATCH", 2)
    path = write(tmp_path / "f.zarr", iter(structured(seed=1)))
    write(path, iter(structured()))
    found = read_forecasts(path, **grid())
    assert len(found) == 5
    np.testing.assert_array_equal(found[INITS[4]], structured()[4])
    np.testing.assert_array_equal(found[INITS[1]], structured()[1])


def test_forecasts_are_had_in_the_order_asked_for(tmp_path):
    found = read_forecasts(write(tmp_path / "f.nc", plain()), **grid())
    asked = [INITS[3], INITS[0].astype("datetime64[h]")]
    for completion, number in zip(found.of(asked), (3, 0), strict=True):
        np.testing.assert_array_equal(completion, plain()[number])
    with pytest.raises(ValueError, match=r"no forecast from 2024-01-01T00:00 \(1 of 2 are missing\); it has 5"):
        found.of([INITS[0], np.datetime64("2024-01-01")])


def foreign() -> xr.Dataset:
    """A deterministic forecast as our own file has it, to be changed."""
    dims = ("time", "prediction_timedelta", "y", "x")
    stacked = np.stack(plain())
    return xr.Dataset(
        {name: (dims, stacked[:, :, v].copy(), {"units": "ug m-3"}) for v, name in enumerate(("pm2p5", "pm10"))},
        coords={"time": INITS, "prediction_timedelta": LEADS, "lat": (("y", "x"), LAT), "lon": (("y", "x"), LON)},
    )


def scores_names(ds):
    return ds.rename(time="init", prediction_timedelta="lead")


def cds_names(ds):
    valid = ds["time"] + ds["prediction_timedelta"]
    ds = ds.assign_coords(valid_time=valid)
    return ds.rename(
        time="forecast_reference_time", prediction_timedelta="forecast_period", pm2p5="PM2.5", pm10="PM_10"
    )


def leads_in_hours(ds):
    hours = np.arange(1, 4) * 6
    return ds.assign_coords(prediction_timedelta=("prediction_timedelta", hours, {"units": "hours"})).rename(
        prediction_timedelta="lead_time"
    )


def kilograms(ds):
    for name in ("pm2p5", "pm10"):
        ds[name] = ds[name].astype(float) * 1e-9
        ds[name].attrs["units"] = "kg m**-3"
    return ds


def straight_axes_from_the_north(ds):
    ds = ds.isel(y=slice(None, None, -1)).rename(y="latitude", x="longitude")
    north, east = ds["lat"].values[:, 0], ds["lon"].values[0]
    return (
        ds.drop_vars(["lat", "lon"])
        .assign_coords(latitude=north, longitude=east - 360)
        .transpose(..., "longitude", "latitude")
    )


def a_larger_area(ds):
    lat, lon = np.meshgrid(28.0 + np.arange(9), np.arange(115.0, 130), indexing="ij")
    wide = np.full((5, 3, 9, 15), -1.0)
    out = {}
    for name in ("pm2p5", "pm10"):
        wide[..., 2:6, 5:11] = ds[name]
        out[name] = (("time", "prediction_timedelta", "y", "x"), wide.copy(), {"units": "ug m-3"})
    coords = {"time": INITS, "prediction_timedelta": LEADS, "lat": (("y", "x"), lat), "lon": (("y", "x"), lon)}
    return xr.Dataset(out, coords=coords)


def twice_as_fine(ds):
    lat, lon = np.meshgrid(29.75 + np.arange(8) / 2, 119.75 + np.arange(12) / 2, indexing="ij")
    spread = np.tile([[-1.0, 1.0], [2.0, -2.0]], (4, 6))
    out = {
        name: (ds[name].dims, np.repeat(np.repeat(ds[name].values, 2, -2), 2, -1) + spread, {"units": "ug m-3"})
        for name in ("pm2p5", "pm10")
    }
    coords = {"time": INITS, "prediction_timedelta": LEADS, "lat": (("y", "x"), lat), "lon": (("y", "x"), lon)}
    return xr.Dataset(out, coords=coords)


def hourly_from_lead_zero(ds):
    hours = np.arange(0, 19) * np.timedelta64(1, "h").astype("timedelta64[ns]")
    return ds.reindex(prediction_timedelta=hours)


def in_another_order(ds):
    return ds.isel(time=[3, 1, 4, 0, 2]).transpose("y", "x", "prediction_timedelta", "time")


@pytest.mark.parametrize("ending", [".zarr", ".nc"])
@pytest.mark.parametrize(
    "change",
    [
        lambda ds: ds,
        scores_names,
        cds_names,
        leads_in_hours,
        kilograms,
        straight_axes_from_the_north,
        a_larger_area,
        twice_as_fine,
        hourly_from_lead_zero,
        in_another_order,
    ],
)
def test_files_of_other_forecasters_give_the_same_completions(tmp_path, change, ending):
    ds = change(foreign())
    ds.to_netcdf(tmp_path / "f.nc") if ending == ".nc" else ds.to_zarr(tmp_path / "f.zarr", consolidated=False)
    found = read_forecasts(tmp_path / f"f{ending}", **grid())
    assert set(found) == set(INITS)
    for init, expected in zip(INITS, plain(), strict=True):
        assert found[init].dtype == np.float32
        np.testing.assert_allclose(found[init], expected, rtol=1e-5, atol=2e-6)


def test_one_init_with_valid_times_is_a_file_of_one_forecast(tmp_path):
    ds = foreign().isel(time=2, drop=True)
    ds = ds.assign_coords(prediction_timedelta=INITS[2] + LEADS, init_time=INITS[2]).rename(
        prediction_timedelta="valid_time"
    )
    ds.to_netcdf(tmp_path / "f.nc")
    found = read_forecasts(tmp_path / "f.nc", **grid())
    assert list(found) == [INITS[2]]
    np.testing.assert_array_equal(found[INITS[2]], plain()[2])


def test_one_init_with_leads_is_a_file_of_one_forecast(tmp_path):
    ds = foreign().isel(time=2)
    ds.rename(time="init").to_netcdf(tmp_path / "f.nc")
    found = read_forecasts(tmp_path / "f.nc", **grid())
    np.testing.assert_array_equal(found[INITS[2]], plain()[2])


def test_members_make_probabilities_quantiles_and_the_class_of_their_mean(tmp_path):
    rng = np.random.default_rng(0)
    members = rng.gamma(2, 20, (5, 3, 8, 4, 6)).astype(np.float32)
    ds = foreign()
    for v, name in enumerate(("pm2p5", "pm10")):
        ds[name] = (("time", "prediction_timedelta", "member", "y", "x"), members * (v + 1), {"units": "ug m-3"})
    ds.to_zarr(tmp_path / "f.zarr", consolidated=False)
    one = read_forecasts(tmp_path / "f.zarr", **grid())[INITS[1]]
    mean = members[1].mean(1)
    np.testing.assert_allclose(one["value"][:, 0], mean, rtol=1e-5)
    np.testing.assert_array_equal(one["level"][:, 0], np.digitize(mean, EDGES[0]))
    expected = np.stack([(members[1] >= edge).mean(1) for edge in EDGES[0]], axis=-1)
    np.testing.assert_allclose(one["exceed"][:, 0], expected, atol=1e-3)
    np.testing.assert_allclose(one["members"][:, 0], np.sort(np.moveaxis(members[1], 1, -1)), rtol=1e-3)  # 8 stay 8
    np.testing.assert_allclose(one["members"][:, 1], 2 * one["members"][:, 0], rtol=2e-3)
    with pytest.raises(ValueError, match="pass edges"):
        read_forecasts(tmp_path / "f.zarr", **grid(edges=None))


def test_what_a_file_does_not_say_follows_from_its_values(tmp_path):
    ds = foreign()
    ds["pm2p5_class"] = ds["pm2p5"].copy(data=np.full(ds["pm2p5"].shape, 3))
    ds.to_netcdf(tmp_path / "f.nc")
    one = read_forecasts(tmp_path / "f.nc", **grid())[INITS[0]]
    value = plain()[0]
    np.testing.assert_array_equal(one["value"], value)
    assert (one["level"][:, 0] == 3).all()  # what is announced
    np.testing.assert_array_equal(one["level"][:, 1], np.digitize(value[:, 1], EDGES[1]))
    np.testing.assert_array_equal(one["exceed"][:, 1], value[:, 1, ..., None] >= np.array(EDGES[1]))
    np.testing.assert_array_equal(one["members"], np.repeat(value[..., None].astype(np.float16), 8, -1))


def test_a_value_on_an_edge_belongs_to_the_class_above(tmp_path):
    ds = foreign()
    ds["pm2p5"].values[0, 0, 0, :3] = EDGES[0]
    ds["pm10_class"] = (ds["pm10"] * 0).astype("i1")
    ds.to_netcdf(tmp_path / "f.nc")
    one = read_forecasts(tmp_path / "f.nc", **grid())[INITS[0]]
    np.testing.assert_array_equal(one["level"][0, 0, 0, :3], [1, 2, 3])
    np.testing.assert_array_equal(one["exceed"][0, 0, 0, :3], np.tri(3))


def test_only_so_many_leads_are_read_as_asked_for(tmp_path):
    path = write(tmp_path / "f.nc", plain())
    assert read_forecasts(path, **grid(), leads=2)[INITS[0]].shape == (2, 2, 4, 6)
    assert read_forecasts(path, **grid(), leads=20)[INITS[0]].shape == (3, 2, 4, 6)


def test_names_say_what_is_not_recognised(tmp_path):
    ds = foreign().rename(pm2p5="fine_dust", time="begin")
    ds.to_netcdf(tmp_path / "f.nc")
    found = read_forecasts(tmp_path / "f.nc", **grid(), names={"pm2p5": "fine_dust", "time": "begin"})
    np.testing.assert_array_equal(found[INITS[2]], plain()[2])


def change(**changes):
    return lambda ds: ds.assign_coords(**changes)


def no_units(ds):
    del ds["pm10"].attrs["units"]
    return ds


def shifted(ds):
    return ds.assign_coords(lat=ds["lat"] + 0.3)


def bad_class(ds):
    ds["pm2p5_class"] = ds["pm2p5"].copy(data=np.full(ds["pm2p5"].shape, 4))
    return ds


def other_thresholds(ds):
    ds = bad_class(ds)
    return ds.assign_coords(pm2p5_threshold=("threshold", [9.0, 35, 55]), pm10_threshold=("threshold", [30.0, 80, 150]))


def fine_classes(ds):
    return bad_class(twice_as_fine(ds))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (no_units, ["pm10 has no units", "ug m-3"]),
        (lambda ds: ds.drop_vars("pm10"), ["has no pm10", "pm2p5", "names={'pm10': ...}"]),
        (lambda ds: ds.isel(prediction_timedelta=[0, 2]), ["lacks the lead 12 h"]),
        (lambda ds: ds.isel(prediction_timedelta=[1, 2]), ["lacks the lead 6 h"]),
        (shifted, ["has no cell at", "33 km away", "regrid"]),
        (lambda ds: ds.isel(y=slice(1, None)), ["has no cell at 30.00 N"]),
        (lambda ds: ds.drop_vars(["lat", "lon"]), ["has no lat and lon"]),
        (lambda ds: ds.isel(time=[0, 1, 1]), ["has an init twice"]),
        (change(prediction_timedelta=[6, 12, 18]), ["the leads (prediction_timedelta) are int64 without units"]),
        (change(time=np.arange(5)), ["the inits (time) are no dates"]),
        (lambda ds: ds.isel(prediction_timedelta=0, drop=True), ["no init", "with leads"]),
        (lambda ds: ds.rename(prediction_timedelta="hours_ahead"), ["no init", "prediction_timedelta"]),
        (lambda ds: ds.expand_dims(level=2), ["pm2p5 has dims", "init, lead, y, x"]),
        (bad_class, ["pm2p5_class goes from 4 to 4", "0 to 3"]),
        (other_thresholds, ["has thresholds [[9.0, 35.0, 55.0]", "they must agree"]),
        (fine_classes, ["2 times finer"]),
    ],
)
def test_files_that_cannot_be_read_are_refused_in_words(tmp_path, harm, says):
    harm(foreign()).to_netcdf(tmp_path / "f.nc")
    with pytest.raises(ValueError) as raised:
        read_forecasts(tmp_path / "f.nc", **grid())[INITS[0]]
    for word in ["f.nc", *says]:
        assert word in str(raised.value), raised.value


def test_writing_refuses_what_is_no_set_of_forecasts(tmp_path):
    with pytest.raises(ValueError, match=r"ends in '.csv'"):
        write(tmp_path / "f.csv", plain())
    with pytest.raises(ValueError, match="5 forecasts have 1 inits"):
        write_forecasts(tmp_path / "f.nc", [INITS[0]] * 5, plain(), edges=EDGES, lat=LAT, lon=LON)
    with pytest.raises(ValueError, match=r"is \(2, 2, 4, 6\) float32 and the first \(3, 2, 4, 6\)"):
        write(tmp_path / "f.nc", [*plain()[:4], plain()[4][:2]])
    with pytest.raises(ValueError, match="they must be"):
        write(tmp_path / "f.nc", plain(), lat=LAT[1:], lon=LON[1:])
    with pytest.raises(ValueError, match="no forecast to write"):
        write_forecasts(tmp_path / "f.nc", [], [], edges=EDGES, lat=LAT, lon=LON)
    (tmp_path / "mine.zarr").mkdir()
    (tmp_path / "mine.zarr" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is a folder of something else"):
        write(tmp_path / "mine.zarr", plain())
    assert (tmp_path / "mine.zarr" / "thesis.txt").exists()
    with pytest.raises(FileNotFoundError, match="give a Zarr store or a NetCDF file"):
        read_forecasts(tmp_path / "absent.nc")
