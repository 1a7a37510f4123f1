"""IOAPI files written as the convention says, and the published 27 km grid of arXiv 2511.22169."""

import netCDF4
import numpy as np
import pytest

from data import ioapi
from data.air_frames import open_store
from data.faker_air import GRID

SMALL = {**GRID, "NCOLS": 4, "NROWS": 3, "XORIG": -54000.0, "YORIG": -40500.0}


def put(path, values, *, attrs=SMALL, flags="steps", date=2020060, clock=0, step=60000, units="micrograms/m**3"):
    """An IOAPI file (classic NetCDF) of {name: (T, LAY, ROW, COL)}; flags: TFLAG as given by the steps, zeros, or none."""
    count, layers = next(iter(values.values())).shape[:2]
    with netCDF4.Dataset(path, "w", format="NETCDF3_64BIT_OFFSET") as file:
        sizes = {
            "TSTEP": None,
            "DATE-TIME": 2,
            "LAY": layers,
            "VAR": len(values),
            "ROW": attrs["NROWS"],
            "COL": attrs["NCOLS"],
        }
        for name, size in sizes.items():
            file.createDimension(name, size)
        for name, value in {**attrs, "SDATE": date, "STIME": clock, "TSTEP": step, "NLAYS": layers}.items():
            file.setncattr(name, np.int32(value) if isinstance(value, int) else np.float64(value))
        if flags != "none":
            tflag = file.createVariable("TFLAG", "i4", ("TSTEP", "VAR", "DATE-TIME"))
            tflag.units = "<YYYYDDD,HHMMSS>"
            for t in range(count):
                hours = clock // 10000 + t * (step // 10000)
                day, hour = date + hours // 24, hours % 24 * 10000
                tflag[t] = np.broadcast_to((0, 0) if flags == "zeros" else (day, hour), (len(values), 2))
        for name, value in values.items():
            variable = file.createVariable(name, "f4", ("TSTEP", "LAY", "ROW", "COL"))
            variable.units, variable.long_name = units.ljust(16), name.ljust(16)
            variable[:] = value
    return path


def field(count, layers=2, seed=0):
    return np.random.default_rng(seed).gamma(2, 10, (count, layers, 3, 4)).astype(np.float32)


def test_the_published_grid_follows_from_its_attributes_alone():
    """Corners, a middle cell and ranges of LAT and LON of the grid file, as stored (float32), to its 4e-5 degrees."""
    lat, lon = ioapi.lat_lon(GRID)
    assert lat.shape == (128, 174)
    published = {
        (0, 0): (19.915092, 104.64258),
        (0, -1): (19.915092, 147.35742),
        (-1, 0): (49.21643, 91.723175),
        (-1, -1): (49.21643, 160.27686),
        (63, 86): (37.875237, 125.8421),
    }
    for cell, (north, east) in published.items():
        assert lat[cell] == pytest.approx(north, abs=5e-5)
        assert lon[cell] == pytest.approx(east, abs=5e-5)
    assert (lat.min(), lat.max()) == (pytest.approx(19.915092, abs=5e-5), pytest.approx(53.91769, abs=5e-5))
    assert (lon.min(), lon.max()) == (pytest.approx(91.723175, abs=5e-5), pytest.approx(160.27686, abs=5e-5))
    assert (np.diff(lat, axis=0) > 0).all()  # ROW grows northward
    assert (np.diff(lon, axis=1) > 0).all()


def test_the_projection_centre_lies_on_the_corner_that_the_attributes_say():
    lat, lon = ioapi.lat_lon({**SMALL, "NROWS": 1, "NCOLS": 1, "XORIG": -13500.0, "YORIG": -13500.0})
    assert (lat[0, 0], lon[0, 0]) == (pytest.approx(38), pytest.approx(126))


def test_latitude_longitude_grids_are_read_in_degrees():
    attrs = {**SMALL, "GDTYP": 1, "XORIG": 179.0, "YORIG": 10.0, "XCELL": 1.0, "YCELL": 0.5}
    lat, lon = ioapi.lat_lon(attrs)
    np.testing.assert_allclose(lat[:, 0], [10.25, 10.75, 11.25])
    np.testing.assert_allclose(lon[0], [179.5, -179.5, -178.5, -177.5])


def test_a_polar_grid_has_its_pole_where_the_attributes_say():
    attrs = {**SMALL, "GDTYP": 6, "P_ALP": 1.0, "P_BET": 60.0, "P_GAM": -98.0, "XCENT": -98.0, "YCENT": 90.0}
    lat, lon = ioapi.lat_lon({**attrs, "NCOLS": 3, "XORIG": -40500.0})
    assert lat[1, 1] == pytest.approx(90)
    assert (
        lat[0, 1] == pytest.approx(lat[1, 0]) == pytest.approx(90 - 0.2427 / (1 + np.sin(np.radians(60))) * 2, abs=1e-3)
    )
    assert lon[0, 1] == pytest.approx(-98)


@pytest.mark.parametrize("flags", ["steps", "none"])
def test_times_come_from_tflag_or_from_the_attributes(tmp_path, flags):
    ds = ioapi.open_ioapi(put(tmp_path / "a", {"PM25": field(6)}, flags=flags, clock=180000))
    expected = np.datetime64("2020-02-29T18") + np.arange(6) * np.timedelta64(6, "h")  # day 60 of a leap year
    np.testing.assert_array_equal(ds["time"], expected.astype("datetime64[ns]"))


def test_steps_longer_than_a_day_count_hours_without_limit():
    np.testing.assert_array_equal(ioapi._duration(7440000), np.timedelta64(31, "D"))
    np.testing.assert_array_equal(ioapi._duration(13015), np.timedelta64(5415, "s"))


def test_values_are_the_lowest_layer_from_south_to_north_with_missing_as_nan(tmp_path):
    values = field(3)
    values[1, 0, 2, 3] = -9.999e36
    ds = ioapi.open_ioapi(put(tmp_path / "a", {"PM25": values}))
    expected = values[:, 0].copy()
    expected[1, 2, 3] = np.nan
    np.testing.assert_array_equal(ds["PM25"], expected)
    assert ds["PM25"].dims == ("time", "y", "x")
    assert ds["PM25"].attrs["units"] == "micrograms/m**3"
    assert (np.diff(ds["lat"], axis=0) > 0).all()


@pytest.mark.parametrize("how", [{"flags": "zeros"}, {"flags": "none", "step": 0}])
def test_a_file_that_does_not_depend_on_time_has_no_time(tmp_path, how):
    ds = ioapi.open_ioapi(put(tmp_path / "a", {"HT": field(1)}, **how))
    assert ds["HT"].dims == ("y", "x")


def test_daily_files_follow_each_other_and_the_25th_hour_is_read_once(tmp_path):
    first, second = field(5, seed=1), field(5, seed=2)
    put(tmp_path / "day1", {"PM25": first}, date=2020001)
    put(tmp_path / "day2", {"PM25": second}, date=2020002)
    ds = open_store(tmp_path)
    assert ds.sizes["time"] == 9
    np.testing.assert_array_equal(ds["PM25"][:5], first[:, 0])
    np.testing.assert_array_equal(ds["PM25"][5:], second[1:, 0])


def test_only_the_variables_asked_for_are_kept(tmp_path):
    ds = ioapi.open_ioapi(put(tmp_path / "a", {"PM25": field(2), "O3": field(2)}), variables=["PM25"])
    assert list(ds.data_vars) == ["PM25"]
    assert ds.sizes["time"] == 2


@pytest.mark.parametrize(
    ("attrs", "says"),
    [
        ({"GDTYP": 5}, "GDTYP 5; known are"),
        ({"NROWS": 3, "P_ALP": None}, "has no attribute P_ALP"),
    ],
)
def test_other_grids_are_refused(attrs, says):
    given = {name: value for name, value in {**SMALL, **attrs}.items() if value is not None}
    with pytest.raises(ValueError, match=says):
        ioapi.lat_lon(given, "f")


def test_files_that_do_not_fit_together_are_refused(tmp_path):
    put(tmp_path / "a", {"PM25": field(2)})
    put(tmp_path / "b", {"PM25": field(2)}, attrs={**SMALL, "YORIG": 0.0}, date=2020062)
    with pytest.raises(ValueError, match=r"b and .*a are on different grids"):
        open_store(tmp_path)


def test_a_file_that_says_no_times_is_refused(tmp_path):
    put(tmp_path / "a", {"PM25": field(2)}, flags="none")
    with netCDF4.Dataset(tmp_path / "a", "a") as file:
        file.delncattr("SDATE")
    with pytest.raises(ValueError, match="neither TFLAG nor the attribute SDATE"):
        ioapi.open_ioapi(tmp_path / "a")


def test_a_grid_that_contradicts_its_attributes_is_refused(tmp_path):
    put(tmp_path / "a", {"PM25": field(2)})
    with netCDF4.Dataset(tmp_path / "a", "a") as file:
        file.setncattr("NROWS", np.int32(5))
    with pytest.raises(ValueError, match=r"NROWS, NCOLS say \(5, 4\), but ROW, COL are \(3, 4\)"):
        ioapi.open_ioapi(tmp_path / "a")
