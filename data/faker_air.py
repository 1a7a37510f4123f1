"""The FAKER-Air archive (CMAQ-OBS, Kang et al. 2025, arXiv 2511.22169) as it is published, read lazily.

    obs_npz_27km/**/2016010100_obs.npz          obs_channels (6, H, W): pm2p5, pm10, so2, no2, o3, co; 0 = no station
    cmaq_only_npy/2016/01/01/NIER_27_01/
        20160101_x_conc.npy                     (4 or 5 times, 24 species, [level,] H, W): 00, 06, 12, 18 (, 24) UTC
        20160101_x_metcro2d.npy                 (4 or 5 times, 33 variables, [1,] H, W); optional
        20160101_x_metcro3d.npy                 not read

Read in the authors' loader (github kaist-cvml/FAKER-Air, MIT): file names, keys, orders of species and variables, that rows
are those of the CMAQ grid (ROW, growing northward), and ug m-3. The grid is that of its grid file, 128x174 cells of 27 km;
the loader's own straight axes (13-52 N, 97-170 E) are not the cells' coordinates and are not used. Derived: the arrays name
no units of the meteorology, and MCIP's are assumed (m, K, m s-1, degrees, cm in an hour).
Observations become maps with NaN where no station is; a 0 is read as missing, since the format has nothing else to say so.
Not read: gases, the other species, meteorology above the ground.
"""

from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from pathlib import Path

import dask.array as da
import numpy as np
import xarray as xr

from . import ioapi

GRID = {
    "GDTYP": 2,
    "P_ALP": 30.0,
    "P_BET": 60.0,
    "P_GAM": 126.0,
    "XCENT": 126.0,
    "YCENT": 38.0,
    "XORIG": -2349000.0,
    "YORIG": -1728000.0,
    "XCELL": 27000.0,
    "YCELL": 27000.0,
    "NCOLS": 174,
    "NROWS": 128,
}
OBSERVED = {"pm2p5": 0, "pm10": 1}  # places in obs_channels
SPECIES = {"pm2p5": 6, "pm10": 19}  # places in x_conc
WEATHER = {"speed": 4, "pblh": 8, "rn": 11, "rc": 12, "direction": 16, "t2m": 17}  # places in x_metcro2d
STEP_H, BLOCK = 6, 28  # hours between times; times read together
# Of the authors, 2023 is both validation and test; here they are different years.
SETTINGS = {
    "step_h": STEP_H,
    "splits": {
        "train": {"from": "2016-01-01", "to": "2021-12-26", "every_h": 6},
        "validation": {"from": "2022-01-01", "to": "2022-12-26", "every_h": 24},
        "test": {"from": "2023-01-01", "to": "2023-12-31", "every_h": 6},
    },
}


def is_faker_air(folder: Path) -> bool:
    """Whether the folder holds the published files (obs* and cmaq*, or both in its folder data/)."""
    return _parts(folder) is not None


def open_archive(folder: Path) -> dict[str, xr.Dataset]:
    """{"analysis", "obs", "static" and, where there is meteorology, "forcing"} in the form of data/cf.py.

    analysis, obs, forcing: (time, y, x) over dask on every 6 h from the first file to the last; a time without a file is
    NaN, and `available` (time) tells. Forcing has role=analysis: it is CMAQ's at its own time.
    Raises ValueError naming file and shape for a file of another shape than the grid.
    """
    observed, modelled = _parts(Path(folder))
    days = {_day(path.name, "%Y%m%d"): path for path in modelled.glob("*/*/*/*/*_x_conc.npy")}
    hours = {_day(path.name, "%Y%m%d%H"): path for path in observed.rglob("*_obs.npz")}
    first = min([*days, *hours]).astype("datetime64[D]")
    last = max([*days, *hours]).astype("datetime64[D]")
    times = np.arange(first, last + 1, np.timedelta64(STEP_H, "h"), dtype="datetime64[ns]")
    dates = times.astype("datetime64[D]")
    paths = [days.get(np.datetime64(date, "ns")) for date in dates]
    weather = [path and path.with_name(path.name.replace("x_conc", "x_metcro2d")) for path in paths]
    weather = [path if path and path.exists() else None for path in weather]
    lat, lon = ioapi.lat_lon(GRID)
    coords = {"lat": (("y", "x"), lat), "lon": (("y", "x"), lon)}
    moments = ((times - dates) // np.timedelta64(STEP_H, "h")).astype(int)

    def species(number: int) -> np.ndarray:
        return _ground(paths[number], moments[number], list(SPECIES.values()), lat.shape)

    def observations(number: int) -> np.ndarray:
        path = hours[times[number]]
        with np.load(path) as file:
            values = _checked(file["obs_channels"], path, lat.shape)[list(OBSERVED.values())]
        return np.where(values > 0, values, np.nan)

    def meteorology(number: int) -> np.ndarray:
        speed, pblh, rn, rc, direction, t2m = _ground(
            weather[number], moments[number], list(WEATHER.values()), lat.shape
        )
        angle = np.radians(direction)  # where the wind comes from, clockwise from north
        return np.stack([-speed * np.sin(angle), -speed * np.cos(angle), pblh, (rn + rc) * 10, t2m])

    concentrations = dict.fromkeys(SPECIES, "ug m-3")
    units = {"u10": "m s-1", "v10": "m s-1", "pblh": "m", "precip": "mm h-1", "t2m": "K"}
    reported = np.array([time in hours for time in times])
    groups = {
        "analysis": _lazy(species, np.array([path is not None for path in paths]), times, concentrations, lat.shape),
        "obs": _lazy(observations, reported, times, concentrations, lat.shape),
        "static": xr.Dataset(),
    }
    if any(weather):
        there = np.array([path is not None for path in weather])
        groups["forcing"] = _lazy(meteorology, there, times, units, lat.shape, role="analysis")
    return {name: ds.assign_coords(coords) for name, ds in groups.items()}


def _parts(folder: Path) -> tuple[Path, Path] | None:
    """The folders of observations and of CMAQ."""
    for base in (Path(folder), Path(folder) / "data"):
        observed = [path for path in base.glob("obs*") if path.is_dir() and next(path.rglob("*_obs.npz"), None)]
        modelled = [path for path in base.glob("cmaq*") if next(path.glob("*/*/*/*/*_x_conc.npy"), None)]
        if observed and modelled:
            return observed[0], modelled[0]
    return None


def _day(name: str, form: str) -> np.datetime64:
    return np.datetime64(datetime.strptime(name.split("_")[0], form), "ns")


def _ground(path: Path, moment: int, places: list[int], shape: tuple[int, int]) -> np.ndarray:
    """Variables (len(places), H, W) at the lowest level, of one of the day's times."""
    values = _checked(np.load(path, mmap_mode="r"), path, shape)[moment, places]
    return np.array(values if values.ndim == 3 else values[:, 0], np.float32)


def _checked(values: np.ndarray, path: Path, shape: tuple[int, int]) -> np.ndarray:
    if values.shape[-2:] != shape:
        raise ValueError(f"{path} holds maps of {values.shape[-2:]} cells; the published grid has {shape}")
    return values


def _lazy(
    read: Callable[[int], np.ndarray],
    available: np.ndarray,
    times: np.ndarray,
    units: dict[str, str],
    shape: tuple[int, int],
    **attrs,
) -> xr.Dataset:
    """Variables (time, y, x) that call `read(index of the time) -> (variable, y, x)` when they are computed."""

    @lru_cache(maxsize=2)  # variables are read one after the other, and each file holds all of them
    def frames(start: int, stop: int) -> np.ndarray:
        out = np.full((stop - start, len(units), *shape), np.nan, np.float32)
        for number in range(start, stop):
            if available[number]:
                out[number - start] = read(number)
        return out

    def block(block_info=None) -> np.ndarray:
        return frames(*block_info[None]["array-location"][0])

    lengths = np.diff([*range(0, len(times), BLOCK), len(times)]).tolist()
    chunks = (tuple(lengths), (len(units),), (shape[0],), (shape[1],))
    values = da.map_blocks(block, chunks=chunks, dtype=np.float32, meta=np.empty((0, 0, 0, 0), np.float32))
    return xr.Dataset(
        {
            name: (("time", "y", "x"), values[:, number], {"units": unit, **attrs})
            for number, (name, unit) in enumerate(units.items())
        },
        coords={"time": times, "available": ("time", available)},
    )
