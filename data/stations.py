"""Station tables (CSV or Parquet, long or wide), and stations on the cells of a grid.

Long form, one measurement a row: time, station, species, value, unit, flag, and lat, lon (alt) in every row or in a table of
the sites beside it. Tables of other services are read by a mapping of their columns; `COLUMNS` holds those of OpenAQ (v2
and v3 downloads), AirNow (API, `format=text/csv` with header) and AirKorea (the yearly files, wide, Korean time, hours
01-24). Missing is NaN: an empty value, a flag that is not good, or -999 as AirNow writes it; 0 is a value.
Not covered: means over hours (a value counts at its time stamp), units that are no mass per volume.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from . import cf

LONG = ("time", "station", "species", "value", "unit", "flag", "lat", "lon", "alt")
# service: ours -> theirs; a species as a key makes the table wide
COLUMNS = {
    "long": {name: name for name in LONG},
    "openaq": {
        "time": "datetime",
        "station": "location_id",
        "species": "parameter",
        "value": "value",
        "unit": "units",
        "lat": "lat",
        "lon": "lon",
    },
    "openaq-v2": {
        "time": "utc",
        "station": "locationId",
        "species": "parameter",
        "value": "value",
        "unit": "unit",
        "lat": "latitude",
        "lon": "longitude",
    },
    "airnow": {
        "time": "UTC",
        "station": "FullAQSCode",
        "species": "Parameter",
        "value": "Concentration",
        "unit": "Unit",
        "lat": "Latitude",
        "lon": "Longitude",
    },
    "airkorea": {"time": "측정일시", "station": "측정소코드", "pm2p5": "PM25", "pm10": "PM10"},
}
OFFSETS_H = {"airkorea": 9.0}  # hours ahead of UTC of time stamps that do not say
GOOD_FLAGS = ("", "0", "valid")
MISSING = (-999.0, -9999.0)
ROWS_AT_ONCE = 500_000
EARTH_KM = 6370.0


def read_stations(
    path: Path,
    columns: str | Mapping[str, str] | None = None,
    *,
    sites: Path | None = None,
    unit: str | None = None,
    utc_offset_h: float | None = None,
    good_flags: Collection[str] = GOOD_FLAGS,
    times: np.ndarray | None = None,
) -> xr.Dataset:
    """pm2p5 and pm10 (time, station) in ug m-3, float32, NaN = missing; coordinates lat, lon, alt, station_id.

    columns: a name of COLUMNS or {ours: theirs}; by default the first of COLUMNS that fits the header.
    sites: a CSV table of station, lat, lon (alt), where the measurements do not have them.
    unit: of all values, where no column says one (AirKorea: ug m-3).
    utc_offset_h: of time stamps that do not say their zone; by default 0 (AirKorea: 9).
    good_flags: flags (as text) of values that count; a whole number may be written 0 or 0.0.
    times: keep these alone (datetime64, UTC); tables are then read in parts and need not fit in memory.

    Several values of one station, species and time are averaged. Raises ValueError naming file, column, value and fix.
    """
    path = Path(path)
    chosen, columns = _columns(path, columns)
    offset = OFFSETS_H.get(chosen, 0.0) if utc_offset_h is None else utc_offset_h
    unit = "ug m-3" if unit is None and chosen == "airkorea" else unit
    wanted = None if times is None else pd.DatetimeIndex(np.asarray(times, "datetime64[ns]"))
    parts, places = [], []
    for table in _tables(path, list(columns.values())):
        table = table.rename(columns={theirs: mine for mine, theirs in columns.items()})
        table["time"] = _utc(table["time"], offset, path)
        table["station"] = table["station"].astype(str)
        if {"lat", "lon"} <= set(table):
            places.append(table.groupby("station")[[c for c in ("lat", "lon", "alt") if c in table]].first())
        if wanted is not None:
            table = table[table["time"].isin(wanted)]
        parts.append(_measurements(table, unit, good_flags, path))
    long = pd.concat(parts) if parts else pd.DataFrame(columns=["time", "station", "species", "value"])
    if long.empty:
        raise ValueError(
            f"{path} holds no value of pm2p5 or pm10 at the times asked for; check species, flags and times"
        )
    where = _sites(path, sites, places, long["station"].unique())
    wide = long.groupby(["time", "station", "species"])["value"].mean().unstack("species")
    index = pd.MultiIndex.from_product([np.sort(long["time"].unique()), where.index], names=["time", "station"])
    wide = wide.reindex(index)
    shape = (index.levshape[0], len(where))
    values = {
        name: (("time", "station"), wide[name].to_numpy(np.float32).reshape(shape), {"units": "ug m-3"})
        for name in cf.VARIABLES
        if name in wide
    }
    return xr.Dataset(
        values,
        coords={
            "time": index.levels[0].to_numpy("datetime64[ns]"),
            "station_id": ("station", where.index.to_numpy(str)),
            **{name: ("station", where[name].to_numpy(float)) for name in ("lat", "lon", "alt") if name in where},
        },
        attrs={"featureType": "timeSeries"},
    )


def write_stations(path: Path, stations: xr.Dataset) -> None:
    """The long form of a Dataset as `read_stations` gives it; missing values have no row."""
    parts = [
        stations[name].to_dataframe("value").dropna(subset="value").assign(species=name, unit="ug m-3", flag=0)
        for name in cf.VARIABLES
        if name in stations
    ]
    table = pd.concat(parts).reset_index().drop(columns="station").rename(columns={"station_id": "station"})
    table = table[[name for name in LONG if name in table]]
    table.to_parquet(path, index=False) if Path(path).suffix == ".parquet" else table.to_csv(path, index=False)


def nearest_cell(lat, lon, grid_lat: np.ndarray, grid_lon: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each of N points the flat number of the grid cell whose centre is nearest on the sphere, and how far it is, km.

    lat, lon: (N,) degrees; grid_lat, grid_lon: (y, x).
    """
    centres = _vectors(grid_lat.ravel(), grid_lon.ravel())
    points = _vectors(np.asarray(lat, float), np.asarray(lon, float))
    parts = np.array_split(
        points, len(points) * len(centres) // 4_000_000 + 1
    )  # all distances at once may be gigabytes
    cell = np.concatenate([np.argmax(part @ centres.T, axis=1) for part in parts])
    chord = np.linalg.norm(points - _vectors(grid_lat.ravel()[cell], grid_lon.ravel()[cell]), axis=1)
    return cell, 2 * EARTH_KM * np.arcsin(np.clip(chord / 2, 0, 1))


def station_cells(lat, lon, grid_lat: np.ndarray, grid_lon: np.ndarray) -> np.ndarray:
    """The flat number of the grid cell that each station lies in, -1 outside the grid: (S,).

    The nearest centre is the station's cell if the station is within half a cell of it, along the rows and along the
    columns as they run there. Grids of less than 2 x 2 cells have no such directions and are refused.
    """
    if min(grid_lat.shape) < 2:
        raise ValueError(f"a grid of {grid_lat.shape} cells has no cell size; it needs at least 2 x 2")
    cell, _ = nearest_cell(lat, lon, grid_lat, grid_lon)
    row, column = np.unravel_index(cell, grid_lat.shape)
    centres = _vectors(grid_lat, grid_lon)
    north, east = (np.gradient(centres, axis=axis)[row, column] for axis in (0, 1))
    offset = _vectors(np.asarray(lat, float), np.asarray(lon, float)) - centres[row, column]
    basis = np.stack([north, east], axis=-1)
    steps = (
        np.linalg.pinv(basis) @ offset[..., None]
    )  # offset in cells, least squares in the plane of the two directions
    inside = np.abs(steps[..., 0]).max(-1) <= 0.5 + 1e-3
    return np.where(inside, cell, -1)


def cell_means(values: np.ndarray, cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of the stations of each cell: values (..., S), cell (S,) -> (..., K), and the K cells that have a station.

    NaN is left out, a cell where nothing is observed is NaN; stations of cell -1 are left out.
    """
    order = np.argsort(cell, kind="stable")
    order = order[cell[order] >= 0]
    cells, first = np.unique(cell[order], return_index=True)
    if not len(cells):
        return np.empty((*values.shape[:-1], 0), np.float32), cells
    values = values[..., order]
    there = np.isfinite(values)
    counts = np.add.reduceat(there, first, axis=-1, dtype=np.int64)
    sums = np.add.reduceat(np.where(there, values, 0), first, axis=-1, dtype=np.float64)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).astype(np.float32), cells


def _columns(path: Path, columns: str | Mapping[str, str] | None) -> tuple[str, dict[str, str]]:
    """The name of the mapping, and those of its columns that the table has."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        header = pyarrow.parquet.read_schema(path).names
    else:
        header = list(pd.read_csv(path, nrows=0).columns)
    if columns is None:
        columns = next((name for name, known in COLUMNS.items() if _complete(known, header)), "long")
    if isinstance(columns, str):
        if columns not in COLUMNS:
            raise ValueError(f"{path}: columns is {columns!r}{cf.unknown(columns, list(COLUMNS))}")
        chosen, known = columns, COLUMNS[columns]
    else:
        chosen, known = "given", dict(columns)
        for mine, theirs in known.items():
            if mine not in (*LONG, *cf.VARIABLES):
                raise ValueError(f"{path}: columns maps {mine!r}{cf.unknown(mine, (*LONG, *cf.VARIABLES))}")
            if theirs not in header:
                raise ValueError(f"{path} has no column {theirs!r}, which columns maps to {mine}; it has {header}")
    if not _complete(known, header):
        raise ValueError(
            f"{path} has columns {header}; a station table needs time, station, species, value (or time, station and a column "
            f"for each species); say which they are: columns = {{time: ..., station: ..., ...}} or one of {list(COLUMNS)}"
        )
    return chosen, {mine: theirs for mine, theirs in known.items() if theirs in header}


def _complete(known: Mapping[str, str], header: Collection[str]) -> bool:
    here = {mine for mine, theirs in known.items() if theirs in header}
    return {"time", "station"} <= here and ({"species", "value"} <= here or bool(here & set(cf.VARIABLES)))


def _tables(path: Path, columns: list[str]) -> Iterator[pd.DataFrame]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        for part in pyarrow.parquet.ParquetFile(path).iter_batches(ROWS_AT_ONCE, columns=columns):
            yield part.to_pandas()
    else:
        yield from pd.read_csv(path, usecols=columns, dtype=str, keep_default_na=True, chunksize=ROWS_AT_ONCE)


def _measurements(table: pd.DataFrame, unit: str | None, good_flags: Collection[str], path: Path) -> pd.DataFrame:
    """time, station, species, value in ug m-3: one row a value that counts."""
    wide = [name for name in cf.VARIABLES if name in table]
    if wide:
        table = table.melt([c for c in table if c not in wide], wide, var_name="species", value_name="value")
    else:
        table = table.assign(species=table["species"].map(lambda name: cf.ours(name)))
        table = table[table["species"].isin(cf.VARIABLES)]
    if "flag" in table:
        flags = table["flag"].fillna("").astype(str).str.strip().str.lower().str.removesuffix(".0")
        table = table[flags.isin([str(flag).lower() for flag in good_flags])]
    value = pd.to_numeric(table["value"], errors="coerce")
    text = table["value"][value.isna() & table["value"].notna()]
    if len(text):
        raise ValueError(f"{path} holds the value {text.iloc[0]!r}, which is no number; leave a missing value empty")
    value = value.mask(value.isin(MISSING))
    units = table["unit"] if "unit" in table else pd.Series(unit, index=table.index, dtype=object)
    named = units[value.notna()].unique()
    factors = {one: cf.micrograms(one if isinstance(one, str) else None, f"{path}: the value") for one in named}
    table = table.assign(value=value * units.map(factors).astype(float))
    return table.loc[table["value"].notna(), ["time", "station", "species", "value"]]


def _utc(stamps: pd.Series, offset_h: float, path: Path) -> pd.Series:
    """Time stamps as UTC without a zone; those that say no zone are `offset_h` ahead of it."""
    if pd.api.types.is_datetime64_any_dtype(stamps):
        times = stamps if stamps.dt.tz is not None else stamps - pd.Timedelta(hours=offset_h)
        return pd.to_datetime(times, utc=True).dt.tz_localize(None).astype("datetime64[ns]")
    text = stamps.astype(str).str.strip()
    digits = text.str.fullmatch(r"\d{10}")
    try:
        if digits.all():  # YYYYMMDDHH, hours 01 to 24: hour 24 is the next day's 00
            times = pd.to_datetime(text.str[:8], format="%Y%m%d") + pd.to_timedelta(text.str[8:].astype(int), unit="h")
            zoned = pd.Series(False, index=text.index)
        else:
            zoned = text.str.contains(r":\d{2}.*(?:Z|[+-]\d{2}(?::?\d{2})?)$")
            times = pd.to_datetime(text, utc=True, format="ISO8601").dt.tz_localize(None)
    except ValueError as error:
        raise ValueError(
            f"{path}: a time stamp cannot be read ({error}); write 2023-01-05T06:00Z or 2023010506"
        ) from None
    return (times - pd.to_timedelta(np.where(zoned, 0.0, offset_h), unit="h")).astype("datetime64[ns]")


def _sites(path: Path, sites: Path | None, places: list[pd.DataFrame], stations) -> pd.DataFrame:
    """lat, lon (alt) by station, for exactly these stations, sorted by name."""
    if sites is not None:
        table = pd.read_csv(sites, dtype={"station": str})
        if not {"station", "lat", "lon"} <= set(table):
            raise ValueError(f"{sites} has columns {list(table)}; a table of sites needs station, lat, lon (and alt)")
        where = table.drop_duplicates("station").set_index("station")
    elif places:
        where = pd.concat(places).groupby(level=0).first()
    else:
        raise ValueError(f"{path} has no lat and lon; add them, or a table sites.csv of station, lat, lon beside it")
    absent = sorted(set(stations) - set(where.dropna(subset=["lat", "lon"]).index))
    if absent:
        raise ValueError(
            f"{sites or path} has no lat and lon of station {absent[0]!r} ({len(absent)} such); add them or remove its rows"
        )
    where = where.loc[sorted(set(stations)), [c for c in ("lat", "lon", "alt") if c in where]].astype(float)
    bad = where[(where["lat"].abs() > 90) | (where["lon"].abs() > 360)]
    if len(bad):
        raise ValueError(
            f"{sites or path}: station {bad.index[0]!r} lies at {tuple(bad.iloc[0])}; lat, lon are degrees"
        )
    return where


def _vectors(lat, lon) -> np.ndarray:
    """Unit vectors (..., 3) of points in degrees."""
    lat, lon = np.radians(lat), np.radians(lon)
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=-1)
