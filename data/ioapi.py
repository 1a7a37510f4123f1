"""CMAQ's files: the IOAPI (Models-3) convention of NetCDF, brought into the form of `data/cf.py`.

    dims       TSTEP, LAY, ROW, COL (and VAR, DATE-TIME of TFLAG)
    times      TFLAG (TSTEP, VAR, DATE-TIME) = YYYYDDD, HHMMSS, UTC; else the attributes SDATE, STIME and TSTEP (HHMMSS)
    grid       attributes alone: GDTYP, P_ALP, P_BET, P_GAM, XCENT, YCENT, XORIG, YORIG, XCELL, YCELL, NCOLS, NROWS

The centre of cell (row, col) lies at XORIG + (col + 1/2) XCELL, YORIG + (row + 1/2) YCELL from (XCENT, YCENT) on the map;
ROW grows northward. The earth is a sphere of 6370 km, which is what CMAQ's preprocessor assumes: with another radius cells
shift by kilometres. The convention is the public description of the I/O API; its header was read in the grid file that
arXiv 2511.22169 publishes, whose LAT and LON these attributes give to 5e-5 degrees.
Not covered: other map projections than latitude-longitude, Lambert and polar stereographic; layers above the lowest.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xarray as xr

EARTH_M = 6_370_000.0
MISSING = -1e30  # the convention's BADVAL3 is -9.999e36; nothing physical is below this
ATTRIBUTES = (
    "GDTYP",
    "P_ALP",
    "P_BET",
    "P_GAM",
    "XCENT",
    "YCENT",
    "XORIG",
    "YORIG",
    "XCELL",
    "YCELL",
    "NCOLS",
    "NROWS",
)


def is_ioapi(ds: xr.Dataset) -> bool:
    """Whether the Dataset, opened without decoding, follows the convention."""
    return {"TSTEP", "LAY", "ROW", "COL"} <= set(ds.dims) and "GDTYP" in ds.attrs


def lat_lon(attrs: Mapping, place: str = "the grid") -> tuple[np.ndarray, np.ndarray]:
    """Latitude and longitude (NROWS, NCOLS) of the cell centres, degrees, row 0 in the south, from attributes alone.

    Raises ValueError naming `place` for an attribute that is missing and for other projections.
    """
    import pyproj

    for name in ATTRIBUTES:
        if name not in attrs:
            raise ValueError(f"{place} has no attribute {name}; an IOAPI grid needs {', '.join(ATTRIBUTES)}")
    kind, *rest = (float(np.squeeze(attrs[name])) for name in ATTRIBUTES)
    alp, bet, gam, xcent, ycent, xorig, yorig, xcell, ycell, ncols, nrows = rest
    x = xorig + (np.arange(int(ncols)) + 0.5) * xcell
    y = yorig + (np.arange(int(nrows)) + 0.5) * ycell
    if kind == 1:  # latitude-longitude: the grid is in degrees
        lon, lat = np.meshgrid(x, y)
        return lat, (lon + 180) % 360 - 180
    if kind == 2:
        proj = pyproj.Proj(proj="lcc", lat_1=alp, lat_2=bet, lat_0=ycent, lon_0=gam, R=EARTH_M)
    elif kind == 6:  # P_ALP: 1 north pole, -1 south pole; P_BET: the latitude of true scale
        proj = pyproj.Proj(proj="stere", lat_0=90 * alp, lat_ts=bet, lon_0=gam, R=EARTH_M)
    else:
        raise ValueError(
            f"{place} has GDTYP {kind:.0f}; known are 1 (latitude-longitude), 2 (Lambert) and 6 (polar stereographic)"
        )
    east, north = proj(xcent, ycent)
    lon, lat = proj(*np.meshgrid(x + east, y + north), inverse=True)
    return lat, lon


def times(ds: xr.Dataset, place: str = "the file") -> np.ndarray | None:
    """Valid times (TSTEP,) as datetime64[ns], UTC, or None for a file that does not depend on time (TSTEP = 0)."""
    if "TFLAG" in ds:
        flags = ds["TFLAG"].values.astype(np.int64)[:, 0]
        if not flags.any():
            return None
        date, clock = flags[:, 0], flags[:, 1]
    else:
        for name in ("SDATE", "STIME", "TSTEP"):
            if name not in ds.attrs:
                raise ValueError(f"{place} has neither TFLAG nor the attribute {name}; one of them must say the times")
        date, clock, step = (int(np.squeeze(ds.attrs[name])) for name in ("SDATE", "STIME", "TSTEP"))
        if step == 0:
            return None
        return _instant(date, clock) + np.arange(ds.sizes["TSTEP"]) * _duration(step)
    return _instant(date, clock)


def decode(ds: xr.Dataset, place: str = "the file") -> xr.Dataset:
    """One opened file in the form of `data/cf.py`: dims time (if there is one), y, x; lat, lon; the lowest layer.

    ds: opened with decode_times=False. Values that the convention calls missing are NaN; attributes lose their padding.
    """
    lat, lon = lat_lon(ds.attrs, place)
    if lat.shape != (ds.sizes["ROW"], ds.sizes["COL"]):
        raise ValueError(f"{place}: NROWS, NCOLS say {lat.shape}, but ROW, COL are {ds.sizes['ROW'], ds.sizes['COL']}")
    when = times(ds, place)
    grid = ds.drop_vars("TFLAG", errors="ignore").isel(LAY=0).rename(TSTEP="time", ROW="y", COL="x")
    for variable in grid.data_vars.values():
        variable.attrs = {key: text.strip() if isinstance(text, str) else text for key, text in variable.attrs.items()}
    grid = grid.map(lambda variable: variable.where(variable > MISSING), keep_attrs=True)
    grid = grid.isel(time=0) if when is None else grid.assign_coords(time=when)
    return grid.assign_coords(lat=(("y", "x"), lat), lon=(("y", "x"), lon))


def open_ioapi(paths: Path | Sequence[Path], variables: Sequence[str] | None = None) -> xr.Dataset:
    """One file, or several that follow each other in time, lazily; a time that two files hold is read from the first.

    variables: what to keep, by the file's own names; everything by default (a CMAQ file holds hundreds).
    Raises ValueError for a file that is not IOAPI, and for files on different grids.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    parts = []
    for path in paths:
        ds = xr.open_dataset(path, engine="netcdf4", decode_times=False, chunks={})
        if not is_ioapi(ds):
            raise ValueError(f"{path} is no IOAPI file; it needs dims TSTEP, LAY, ROW, COL and the attribute GDTYP")
        if variables is not None:
            ds = ds[[name for name in ds.data_vars if name in (*variables, "TFLAG")]]
        parts.append(decode(ds, str(path)))
    for path, part in zip(paths, parts, strict=True):
        if part["lat"].shape != parts[0]["lat"].shape or not np.allclose(part["lat"], parts[0]["lat"], atol=1e-4):
            raise ValueError(f"{path} and {paths[0]} are on different grids; keep the files of one grid in a folder")
    if len(parts) == 1:
        return parts[0]
    if any("time" not in part.dims for part in parts):
        raise ValueError(f"{paths[0].parent} holds files that do not depend on time (TSTEP = 0); move them elsewhere")
    whole = xr.concat(parts, "time", data_vars="minimal", coords="minimal", compat="override", join="override")
    _, first = np.unique(whole["time"].values, return_index=True)
    return whole.isel(time=first)


def _instant(date, clock) -> np.ndarray:
    """YYYYDDD and HHMMSS as datetime64[ns]."""
    date = np.asarray(date)
    years = (date // 1000 - 1970).astype("datetime64[Y]").astype("datetime64[D]")
    return (years + (date % 1000 - 1).astype("timedelta64[D]")).astype("datetime64[ns]") + _duration(clock)


def _duration(clock) -> np.ndarray:
    """HHMMSS, hours without limit (7440000 is 31 days), as timedelta64[ns]."""
    clock = np.asarray(clock)
    seconds = clock // 10000 * 3600 + clock // 100 % 100 * 60 + clock % 100
    return seconds.astype("timedelta64[s]").astype("timedelta64[ns]")
