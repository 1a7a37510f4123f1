"""Names, units and axes: each spelling by hand, and coarsening against a slow loop."""

import numpy as np
import pytest
import xarray as xr

from data import cf


@pytest.mark.parametrize(
    ("units", "factor"),
    [
        ("ug m-3", 1.0),
        ("µg/m³", 1.0),
        ("μg m**-3", 1.0),
        ("micrograms/m**3  ", 1.0),
        ("UG/M3", 1.0),
        ("kg m-3", 1e9),
        ("kg m**-3", 1e9),
        ("mg/m3", 1e3),
        ("ng m^-3", 1e-3),
    ],
)
def test_units_of_a_concentration_give_their_factor(units, factor):
    assert cf.micrograms(units, "here") == factor


@pytest.mark.parametrize("units", [None, "", "ppb", "kg m-2", "ug", "1"])
def test_other_units_are_refused_with_their_place(units):
    with pytest.raises(ValueError, match=r"here.*ug m-3"):
        cf.micrograms(units, "here")


@pytest.mark.parametrize(
    ("name", "units"), [("u10", "m/s"), ("u10", "METERS/SEC"), ("t2m", "K"), ("precip", "mm/hr"), ("snow", "anything")]
)
def test_units_of_forcing_pass(name, units):
    cf.check_units(name, units, "here")


@pytest.mark.parametrize(("name", "units"), [("u10", "km h-1"), ("t2m", "degC"), ("precip", None), ("snow", None)])
def test_wrong_units_of_forcing_are_refused(name, units):
    with pytest.raises(ValueError, match="here has"):
        cf.check_units(name, units, "here")


def test_spellings_are_ours():
    assert [cf.ours(name) for name in ("PM2.5", "PM25_TOT", "pm10", "HT", "ozone")] == [
        "pm2p5",
        "pm2p5",
        "pm10",
        "height",
        None,
    ]


def maps(**variables) -> xr.Dataset:
    return xr.Dataset({name: (("time", "y", "x"), np.zeros((1, 2, 3))) for name in variables or {"pm2p5": 0}})


def test_a_variable_is_found_by_names_then_standard_name_then_spelling():
    ds = maps(PM25_TOT=0, dust=0)
    assert cf.find(ds, "pm2p5", "f", {}) == "PM25_TOT"
    ds["dust"].attrs["standard_name"] = cf.STANDARD.format("pm2p5")
    assert cf.find(ds, "pm2p5", "f", {}) == "dust"
    assert cf.find(ds, "pm2p5", "f", {"pm2p5": "PM25_TOT"}) == "PM25_TOT"
    assert cf.find(ds, "pm10", "f", {}) is None


def test_two_spellings_of_one_variable_are_not_guessed_between():
    with pytest.raises(ValueError, match="PM25 and PM2_5 could both be pm2p5"):
        cf.find(maps(PM25=0, PM2_5=0), "pm2p5", "f", {})
    assert cf.find(maps(PM25=0, pm2p5=0), "pm2p5", "f", {}) == "pm2p5"


def test_latitudes_from_the_north_and_longitudes_to_360_are_turned():
    values = np.arange(6.0).reshape(1, 2, 3)
    ds = xr.Dataset(
        {"pm2p5": (("time", "latitude", "longitude"), values)},
        coords={"latitude": [31.0, 30.0], "longitude": [359.0, 0.0, 1.0]},
    )
    out = cf.gridded(ds, "f")
    assert out["pm2p5"].dims == ("time", "y", "x")
    np.testing.assert_array_equal(out["pm2p5"][0], [[3, 4, 5], [0, 1, 2]])
    np.testing.assert_array_equal(out["lat"], [[30] * 3, [31] * 3])
    np.testing.assert_array_equal(out["lon"], [[-1, 0, 1]] * 2)


def test_two_dimensional_coordinates_with_other_dims_are_turned_too():
    lat, lon = np.meshgrid([31.0, 30.0], [100.0, 101.0, 102.0], indexing="ij")
    ds = xr.Dataset(
        {"pm2p5": (("Time", "south_north", "west_east"), np.arange(6.0).reshape(1, 2, 3))},
        coords={"XLAT": (("south_north", "west_east"), lat), "XLONG": (("south_north", "west_east"), lon)},
    )
    out = cf.gridded(ds, "f")
    assert out["pm2p5"].dims == ("time", "y", "x")
    np.testing.assert_array_equal(out["pm2p5"][0, 0], [3, 4, 5])


def test_a_file_without_coordinates_follows_the_grid_it_lies_beside():
    ds = xr.Dataset({"pm2p5": (("time", "y", "x"), np.arange(6.0).reshape(1, 2, 3))})
    np.testing.assert_array_equal(cf.gridded(ds, "f")["pm2p5"][0, 0], [0, 1, 2])
    np.testing.assert_array_equal(cf.gridded(ds, "f", upside_down=True)["pm2p5"][0, 0], [3, 4, 5])


@pytest.mark.parametrize(
    ("coords", "says"),
    [
        ({"lat": [30.0, 31.0]}, "f has lat and not the other"),
        ({"lat": [30.0, np.nan], "lon": [1.0, 2.0, 3.0]}, "missing or no degree in 3 of 6"),
        ({"lat": [30.0, 95.0], "lon": [1.0, 2.0, 3.0]}, "missing or no degree in 3 of 6"),
        ({}, r"dims \('time', 'lat', 'lon'\) and no lat and lon"),
    ],
)
def test_coordinates_that_cannot_be_are_refused(coords, says):
    ds = xr.Dataset({"pm2p5": (("time", "lat", "lon"), np.zeros((1, 2, 3)))}, coords=coords)
    with pytest.raises(ValueError, match=says):
        cf.gridded(ds, "f")


def test_coarse_is_the_mean_of_what_is_there():
    rng = np.random.default_rng(0)
    values = rng.random((2, 4, 6)).astype(np.float32)
    values[rng.random(values.shape) < 0.4] = np.nan
    values[0, :2, :2] = np.nan
    out = cf.coarse(values, 2)
    for n, i, j in np.ndindex(out.shape):
        block = values[n, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        there = block[np.isfinite(block)]
        np.testing.assert_allclose(out[n, i, j], there.mean() if len(there) else np.nan, rtol=1e-6)
    assert np.isnan(out[0, 0, 0])
    assert out.dtype == np.float32


def test_a_coarse_cell_across_180_degrees_lies_there():
    np.testing.assert_allclose(cf.coarse_lon(np.array([[179.5, -179.5], [179.5, -179.5]]), 2), [[-180.0]])
    np.testing.assert_allclose(cf.coarse_lon(np.array([[10.0, 11.0], [10.0, 11.0]]), 2), [[10.5]])


def test_a_coarse_cell_has_the_region_of_most_of_its_cells():
    region = np.array([[1, 1, 0, 2], [2, 1, 2, 0]], np.int16)
    np.testing.assert_array_equal(cf.coarse_region(region, 2), [[1, 0]])  # a tie goes to the smaller number
