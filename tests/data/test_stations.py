"""Station tables of several services, and stations on cells; every expected number by hand."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from data import stations

LONG = """time,station,species,value,unit,flag,lat,lon
2023-01-01T00:00Z,A,pm2p5,12,ug m-3,0,37.5,127
2023-01-01T00:00Z,A,pm10,0,ug m-3,,37.5,127
2023-01-01T06:00Z,A,pm2p5,,ug m-3,0,37.5,127
2023-01-01T06:00Z,A,pm10,30,ug m-3,3,37.5,127
2023-01-01T06:00Z,B,pm2p5,2e-8,kg m-3,valid,35.1,129
2023-01-01T06:00Z,B,o3,0.04,ppm,0,35.1,129
"""


def put(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


def test_long_tables_become_time_by_station_with_gaps_as_nan(tmp_path):
    ds = stations.read_stations(put(tmp_path / "s.csv", LONG))
    np.testing.assert_array_equal(ds["station_id"], ["A", "B"])
    np.testing.assert_array_equal(ds["time"], np.array(["2023-01-01T00", "2023-01-01T06"], "datetime64[ns]"))
    np.testing.assert_allclose(ds["pm2p5"], [[12, np.nan], [np.nan, 20]], rtol=1e-6)
    np.testing.assert_array_equal(ds["pm10"], [[0, np.nan], [np.nan, np.nan]])  # 0 is a value; flag 3 is not good
    np.testing.assert_array_equal(ds["lat"], [37.5, 35.1])
    assert ds["pm2p5"].attrs["units"] == "ug m-3"


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_what_is_written_is_read_again(tmp_path, ending):
    values = np.array([[1.5, np.nan, 0.0], [np.nan, np.nan, 7.25]], np.float32)
    ds = xr.Dataset(
        {"pm2p5": (("time", "station"), values), "pm10": (("time", "station"), 2 * values)},
        coords={
            "time": np.array(["2023-01-01T00", "2023-01-01T06"], "datetime64[ns]"),
            "station_id": ("station", ["a", "b", "c"]),
            "lat": ("station", [30.0, 31.0, 32.0]),
            "lon": ("station", [100.0, 101.0, 102.0]),
            "alt": ("station", [0.0, 5.0, 9.0]),
        },
    )
    stations.write_stations(tmp_path / f"s.{ending}", ds)
    again = stations.read_stations(tmp_path / f"s.{ending}")
    there = ds.isel(station=[0, 2])  # a station that never reports leaves no row
    for name in ("pm2p5", "pm10", "station_id", "lat", "lon", "alt", "time"):
        np.testing.assert_array_equal(again[name], there[name])


def test_parts_of_a_table_are_one_table(tmp_path, monkeypatch):
    path = put(tmp_path / "s.csv", LONG)
    whole = stations.read_stations(path)
    monkeypatch.setattr(stations, "ROWS_AT_ONCE", 2)
    xr.testing.assert_identical(stations.read_stations(path), whole)


def test_only_the_times_asked_for_are_kept(tmp_path):
    ds = stations.read_stations(put(tmp_path / "s.csv", LONG), times=np.array(["2023-01-01T06"], "datetime64[ns]"))
    np.testing.assert_array_equal(ds["station_id"], ["B"])
    np.testing.assert_allclose(ds["pm2p5"], [[20]])


def test_several_values_at_once_are_averaged(tmp_path):
    text = "time,station,species,value,unit,lat,lon\n" + "2023-01-01 00:00,A,PM2.5,{},ug/m3,1,1\n" * 3
    ds = stations.read_stations(put(tmp_path / "s.csv", text.format(1, 2, 6)))
    np.testing.assert_allclose(ds["pm2p5"], [[3]])


def test_openaq_columns_are_known(tmp_path):
    text = """location_id,sensors_id,location,datetime,lat,lon,parameter,units,value
2178,3916,"Del Norte",2023-01-01T09:00:00+09:00,35.1353,-106.584702,pm25,µg/m³,17.0
2178,3917,"Del Norte",2023-01-01T09:00:00+09:00,35.1353,-106.584702,o3,ppm,0.03
"""
    ds = stations.read_stations(put(tmp_path / "s.csv", text))
    assert (str(ds["station_id"].values[0]), float(ds["pm2p5"][0, 0])) == ("2178", 17.0)
    np.testing.assert_array_equal(ds["time"], np.array(["2023-01-01T00"], "datetime64[ns]"))


def test_airnow_columns_are_known_and_its_999_is_missing(tmp_path):
    text = """Latitude,Longitude,UTC,Parameter,Concentration,Unit,FullAQSCode
40.1,-75.1,2023-01-01T00:00,PM2.5,-999,UG/M3,840420170012
40.1,-75.1,2023-01-01T01:00,PM2.5,8.4,UG/M3,840420170012
"""
    ds = stations.read_stations(put(tmp_path / "s.csv", text))
    np.testing.assert_allclose(ds["pm2p5"], [[8.4]], rtol=1e-6)
    np.testing.assert_array_equal(ds["time"], np.array(["2023-01-01T01"], "datetime64[ns]"))


def test_airkorea_is_wide_in_korean_time_with_hours_to_24(tmp_path):
    text = """지역,망,측정소코드,측정소명,측정일시,SO2,CO,O3,NO2,PM10,PM25,주소
서울,도시대기,111121,중구,2023010109,0.003,0.5,0.02,0.02,41,18,서울
서울,도시대기,111121,중구,2023010124,0.003,0.5,0.02,0.02,55,,서울
"""
    sites = put(tmp_path / "sites.csv", "station,lat,lon,alt\n111121,37.56,126.97,20\n9,0,0,0\n")
    ds = stations.read_stations(put(tmp_path / "s.csv", text), sites=sites)
    # 09 in Korea is 00 UTC; hour 24 of the first is 00 of the second, 15 UTC of the first
    np.testing.assert_array_equal(ds["time"], np.array(["2023-01-01T00", "2023-01-01T15"], "datetime64[ns]"))
    np.testing.assert_allclose(ds["pm2p5"][:, 0], [18, np.nan])
    np.testing.assert_allclose(ds["pm10"][:, 0], [41, 55])
    assert float(ds["alt"][0]) == 20


def test_own_columns_are_read_by_a_mapping(tmp_path):
    path = put(tmp_path / "s.csv", "when;x".replace(";", ",") + ",id,la,lo\n2023-01-01 09:00,5,s1,37,127\n")
    columns = {"time": "when", "pm2p5": "x", "station": "id", "lat": "la", "lon": "lo"}
    ds = stations.read_stations(path, columns, unit="ug m-3", utc_offset_h=9)
    np.testing.assert_array_equal(ds["time"], np.array(["2023-01-01T00"], "datetime64[ns]"))
    assert float(ds["pm2p5"][0, 0]) == 5


def test_stamps_that_say_their_zone_need_no_offset(tmp_path):
    ds = stations.read_stations(put(tmp_path / "s.csv", LONG), utc_offset_h=9)
    np.testing.assert_array_equal(ds["time"], np.array(["2023-01-01T00", "2023-01-01T06"], "datetime64[ns]"))
    naive = stations.read_stations(put(tmp_path / "n.csv", LONG.replace("Z,", ",")), utc_offset_h=9)
    np.testing.assert_array_equal(naive["time"], np.array(["2022-12-31T15", "2022-12-31T21"], "datetime64[ns]"))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("time,", "clock,", ["columns", "'clock'", "say which they are"]),
        ("12,ug m-3", "12,ppb", ["units 'ppb'", "ug m-3"]),
        ("12,ug m-3", "12,", ["has", "ug m-3"]),
        ("12,ug", "twelve,ug", ["'twelve', which is no number"]),
        ("2023-01-01T00:00Z,A,pm2p5", "yesterday,A,pm2p5", ["a time stamp cannot be read"]),
        (
            ",37.5,127\n2023-01-01T00:00Z,A,pm10",
            ",375,127\n2023-01-01T00:00Z,A,pm10",
            ["station 'A'", "375", "degrees"],
        ),
        ("lat,lon", "lat,length", ["has no lat and lon", "sites.csv"]),
    ],
)
def test_a_damaged_table_is_refused_in_words(tmp_path, old, new, says):
    assert old in LONG
    with pytest.raises(ValueError) as raised:
        stations.read_stations(put(tmp_path / "s.csv", LONG.replace(old, new, 1)))
    for word in ["s.csv", *says]:
        assert word in str(raised.value)


def test_a_table_without_our_species_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no value of pm2p5 or pm10"):
        stations.read_stations(put(tmp_path / "s.csv", LONG.replace("pm2p5", "no2").replace("pm10", "o3")))


def test_unknown_mappings_are_refused_with_the_nearest(tmp_path):
    path = put(tmp_path / "s.csv", LONG)
    with pytest.raises(ValueError, match="did you mean 'openaq'"):
        stations.read_stations(path, "opanaq")
    with pytest.raises(ValueError, match="maps 'specis'; did you mean 'species'"):
        stations.read_stations(path, {"specis": "species"})
    with pytest.raises(ValueError, match="no column 'sp'"):
        stations.read_stations(path, {"species": "sp"})


def test_a_station_without_a_site_is_refused(tmp_path):
    sites = put(tmp_path / "sites.csv", "station,lat,lon\nA,37,127\n")
    with pytest.raises(ValueError, match=r"sites.csv has no lat and lon of station 'B' \(1 such\)"):
        stations.read_stations(put(tmp_path / "s.csv", LONG), sites=sites)


def lattice(south=30.0, west=120.0, rows=4, columns=5, step=1.0):
    return np.meshgrid(south + step * np.arange(rows), west + step * np.arange(columns), indexing="ij")


def test_a_station_lies_in_the_cell_whose_centre_is_nearest():
    lat, lon = lattice()
    rng = np.random.default_rng(0)
    north, east = rng.uniform(29.6, 33.4, 50), rng.uniform(119.6, 124.4, 50)
    expected = np.round(north - 30) * 5 + np.round(east - 120)
    np.testing.assert_array_equal(stations.station_cells(north, east, lat, lon), expected)


def test_stations_beyond_the_outer_cells_are_outside():
    lat, lon = lattice()
    north = [29.4, 29.6, 33.6, 31.0, 31.0, -31.0]
    east = [122.0, 122.0, 122.0, 119.4, 124.6, -58.0]
    np.testing.assert_array_equal(stations.station_cells(north, east, lat, lon), [-1, 2, -1, -1, -1, -1])


def test_longitudes_to_360_and_the_date_line_make_no_difference():
    lat, lon = lattice(west=178.0)
    wrapped = (lon + 180) % 360 - 180
    for east in (181.2, -178.8):
        assert stations.station_cells([31.1], [east], lat, wrapped)[0] == 1 * 5 + 3


def test_distances_are_those_of_the_sphere():
    cell, far = stations.nearest_cell([0.0], [0.5], np.array([[0.0, 0.0]]), np.array([[0.0, 2.0]]))
    assert cell[0] == 0
    assert far[0] == pytest.approx(6370 * np.radians(0.5), rel=1e-9)


def test_cell_means_leave_out_what_is_missing_or_outside():
    values = np.array([[1.0, 3.0, np.nan, 9.0], [np.nan, np.nan, 5.0, 9.0]])
    means, cells = stations.cell_means(values, np.array([7, 7, 2, -1]))
    np.testing.assert_array_equal(cells, [2, 7])
    np.testing.assert_array_equal(means, [[np.nan, 2], [5, np.nan]])


def test_cell_means_equal_a_slow_loop():
    rng = np.random.default_rng(1)
    values = rng.random((3, 2, 40)).astype(np.float32)
    values[rng.random(values.shape) < 0.3] = np.nan
    cell = rng.integers(-1, 9, 40)
    means, cells = stations.cell_means(values, cell)
    for *at, place in np.ndindex(means.shape):
        there = [v for v, c in zip(values[tuple(at)], cell, strict=True) if c == cells[place] and np.isfinite(v)]
        np.testing.assert_allclose(means[(*at, place)], np.mean(there) if there else np.nan, rtol=1e-6)


def test_large_grids_are_searched_in_parts():
    lat, lon = lattice(rows=300, columns=300, step=0.1)
    north, east = np.full(200, 42.31), np.full(200, 131.07)
    cell, _ = stations.nearest_cell(north, east, lat, lon)
    np.testing.assert_array_equal(cell, 123 * 300 + 111)


def test_flags_may_be_numbers_and_chosen(tmp_path):
    table = pd.DataFrame(
        {
            "time": ["2023-01-01T00:00Z"] * 2,
            "station": ["A", "B"],
            "species": "pm10",
            "value": [1.0, 2.0],
            "unit": "ug m-3",
            "flag": [0.0, 2.0],
            "lat": 1.0,
            "lon": 1.0,
        }
    )
    table.to_parquet(tmp_path / "s.parquet")
    np.testing.assert_array_equal(stations.read_stations(tmp_path / "s.parquet")["station_id"], ["A"])
    ds = stations.read_stations(tmp_path / "s.parquet", good_flags=["2"])
    np.testing.assert_array_equal(ds["station_id"], ["B"])
