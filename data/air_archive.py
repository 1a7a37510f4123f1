"""An air-quality archive, opened: its grid, and its stores by time index, in memory if they are small.

An archive that fits into MEMORY_MB after coarsening is read once, when it is first asked for. Of a larger one no more than
CACHE_MB of decoded, coarsened blocks are held (data/air_frames.py); stations are always held, as the cells that they lie in.
"""

import os
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from . import cf, faker_air, stations
from .air_frames import Cache, Frames, is_zarr, open_store
from .air_settings import read_settings

MEMORY_MB, CACHE_MB = 512, 128
NORMAL_FRAMES = 512  # of the training period, evenly spaced, that the statistics of the forcing are taken from
ROLES = ("analysis", "forecast")


class Archive:
    """What windows read, by index of the archive's times.

    times (T,) datetime64[ns]; step_h; lat, lon, land (y, x); region (y, x) int16 and region_names {id: name}; static
    {name: (y, x)}; analysis, forcing: Frames (variable, y, x); model: Frames (variable, lead, y, x) by `model_inits`.
    roles: {forcing: "analysis" | "forecast"}. stations, stations_outside: how many lie in the grid, and how many do not.
    """

    variables = cf.VARIABLES

    def __init__(self, path: str | Path):
        """path: an archive folder; or a store of analyses (.nc, .zarr) in one, whose times are then the archive's.

        Raises ValueError for whatever is missing or wrong, naming file, variable, value and fix.
        """
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(
                f"{self.path} is not there; give an archive folder (data/README.md shows the layout; "
                "data.synthetic.air_quality.write makes one offline)"
            )
        self.alone = self.path.is_file() or is_zarr(self.path)
        self.folder = self.path.parent if self.alone else self.path
        self.settings = read_settings(self.folder)
        self.step_h = self.settings.step_h
        self._published = faker_air.open_archive(self.folder) if faker_air.is_faker_air(self.folder) else {}
        self._room, self._cache = MEMORY_MB * 2**20, Cache(CACHE_MB * 2**20)
        self._lay_out()
        analysis, place = self._analysis()
        analysis = self._on_steps(analysis, place)
        self.times = analysis["time"].values.astype("datetime64[ns]")
        self.analysis = self._frames(analysis, self.variables, place, blocks=2)
        self._whole = analysis.get("available")
        self._open_observations()
        self._open_forcing()
        self._open_model()

    def index(self, time: np.datetime64) -> int:
        """Where a time lies on the archive's axis; ValueError if it lies beside it."""
        index, rest = divmod(np.datetime64(time, "ns") - self.times[0], self._step)
        if rest or not 0 <= index < len(self.times):
            raise ValueError(
                f"{self.path} has no time {time}; it has {self.times[0]} to {self.times[-1]}, every {self.step_h} h"
            )
        return int(index)

    def observed(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, V, y, x) float32: means of the stations of each cell, NaN where none reports."""
        if self._maps is not None:
            return self._maps.between(start, stop)
        out = np.full((stop - start, len(self.variables), self.lat.size), np.nan, np.float32)
        low, high = max(start, 0), min(stop, len(self.times))
        out[low - start : high - start, :, self._cells] = self._reports[low:high]
        return out.reshape(*out.shape[:2], *self.lat.shape)

    @property
    def has_observations(self) -> bool:
        return self._maps is not None or self.stations > 0

    @cached_property
    def is_complete(self) -> np.ndarray:
        """(T,) bool: times whose analysis has no missing cell, which a window can begin with."""
        if self._whole is not None:
            return self._whole.values
        return np.concatenate([np.isfinite(block).all(axis=(1, 2, 3)) for block in self.analysis.blocks()])

    @cached_property
    def is_observed(self) -> np.ndarray:
        """(T,) bool: times at which anything is observed."""
        if self._maps is None:
            return np.isfinite(self._reports).any(axis=(1, 2))
        if self._mapped is not None:
            seen = self._mapped.values
        else:
            seen = np.concatenate([np.isfinite(block).any(axis=(1, 2, 3)) for block in self._maps.blocks()])
        return np.isin(np.arange(len(self.times)), self._maps.first + np.flatnonzero(seen))

    @cached_property
    def like(self) -> "Archive | None":
        """The archive trained on: that of `like` in archive.yaml, or the folder of a store that was opened alone."""
        if self.settings.like is not None:
            return open_archive(self.settings.like)
        return open_archive(self.folder) if self.alone and self._path("analysis", self.folder) else None

    @cached_property
    def normals(self) -> dict[str, tuple[float, float]]:
        """{forcing: (mean, standard deviation)} over cells and NORMAL_FRAMES evenly spaced times of the training period.

        Those of archive.yaml if it has `normals`, else those of the archive that this one is like.
        """
        if not self.roles:
            return {}
        if self.settings.normals:
            if absent := set(self.roles) - set(self.settings.normals):
                raise ValueError(
                    f"{self.folder / 'archive.yaml'}: normals lack {sorted(absent)}; they need every forcing"
                )
            return dict(self.settings.normals)
        if self.like is not None:
            return self.like.normals
        train = self.settings.splits.get("train")
        inside = [] if train is None else np.flatnonzero((self.times >= train.start) & (self.times <= train.end))
        if not len(inside):
            raise ValueError(
                f"{self.folder} holds no time of a split train, whose statistics the forcing is standardised with; write to its "
                "archive.yaml like: <the folder of the archive trained on>, or normals: (data.air_quality.normals gives them)"
            )
        chosen = inside[np.unique(np.linspace(0, len(inside) - 1, NORMAL_FRAMES).round().astype(int))]
        counts, sums, squares = np.zeros((3, len(self.roles)))
        for index in chosen:
            frame = self.forcing.between(index, index + 1)[0].astype(np.float64).reshape(len(self.roles), -1)
            there = np.isfinite(frame)
            counts += there.sum(1)
            sums += np.where(there, frame, 0).sum(1)
            squares += np.where(there, frame**2, 0).sum(1)
        mean = sums / np.maximum(counts, 1)
        spread = np.sqrt(np.maximum(squares / np.maximum(counts, 1) - mean**2, 0))
        for name, count, one in zip(self.roles, counts, spread, strict=True):
            if not count or one <= 1e-6 * max(1.0, abs(mean[list(self.roles).index(name)])):
                raise ValueError(
                    f"{self.folder}: forcing {name} is {'missing' if not count else 'constant'} in train; drop it"
                )
        return {name: (float(m), float(s)) for name, m, s in zip(self.roles, mean, spread, strict=True)}

    @cached_property
    def ground(self) -> tuple[tuple[str, ...], np.ndarray]:
        """Names and maps (C, y, x) of what does not change, each with mean 0 and standard deviation 1 over the cells."""
        maps = {**self.static, "lat": self.lat, "lon": self.lon}
        names = tuple(name for name, one in maps.items() if np.nanstd(one) > 0)
        scaled = [(maps[name] - np.nanmean(maps[name])) / np.nanstd(maps[name]) for name in names]
        return names, np.nan_to_num(np.stack(scaled).astype(np.float32))

    # Opening

    @property
    def _step(self) -> np.timedelta64:
        return np.timedelta64(self.step_h, "h").astype("timedelta64[ns]")

    def _path(self, name: str, folder: Path) -> Path | None:
        """Where the store of that name lies in a folder."""
        endings = (".zarr", ".nc", "") if name in ("analysis", "forcing") else (".zarr", ".nc")
        paths = [folder / f"{name}{ending}" for ending in endings]
        return next((path for path in paths if path.exists()), None)

    def _slot(self, name: str) -> tuple[xr.Dataset | None, str]:
        """The store of that name, and what to call it in a message; None if there is none."""
        alone = name == "analysis" and self.alone
        if name in self._published and not alone:
            return self._published[name], str(self.folder)
        path = self.path if alone else self._path(name, self.folder)
        if path is None:
            return None, str(self.folder)
        ds = open_store(path, self._concentrations if name == "analysis" else None)
        return (ds if "station" in ds.dims else cf.gridded(ds, str(path), self._upside_down)), str(path)

    def _concentrations(self, ds: xr.Dataset) -> list[str]:
        """What a file calls our variables; all it has where one is not found, for the message to name."""
        found = [cf.find(ds, name, "", self.settings.names) for name in self.variables]
        return list(ds.data_vars) if None in found else found

    def _analysis(self) -> tuple[xr.Dataset, str]:
        analysis, place = self._slot("analysis")
        if analysis is None:
            raise ValueError(
                f"{self.folder} has no analysis.zarr, analysis.nc or folder analysis/; one must hold the analysis"
            )
        return analysis, place

    def _lay_out(self) -> None:
        """Grid, static maps and regions, coarsened."""
        static, place = self._published.get("static"), str(self.folder)
        paths = [self._path("static", folder) for folder in (self.folder, self.settings.like) if folder is not None]
        self._upside_down = False  # whether row 0 of stores without coordinates is in the north: as in static.nc
        if path := next(filter(None, paths), None):
            static, place = open_store(path), str(path)
            self._upside_down = cf.is_upside_down(static)
            static = cf.gridded(static, place)
        if static is None or "lat" not in static.coords:
            analysis, place = self._analysis()
            if "lat" not in analysis.coords:
                raise ValueError(
                    f"{place} has no lat and lon, nor has a static.nc beside it; one must have them, (y, x) in degrees"
                )
            static = (
                analysis[["lat", "lon"]]
                if static is None
                else static.assign_coords(lat=analysis["lat"], lon=analysis["lon"])
            )
        self._fine = static["lat"].values, static["lon"].values
        rows, columns = self._fine[0].shape
        k = self.settings.coarsen
        if rows % k or columns % k:
            raise ValueError(
                f"{self.folder / 'archive.yaml'}: coarsen {k} does not divide the {rows}x{columns} cells of {place}"
            )
        self.lat = cf.coarse(self._fine[0], k).astype(np.float32)
        self.lon = cf.coarse_lon(self._fine[1], k).astype(np.float32)
        self.static = {
            cf.ours(name) or str(name): cf.coarse(static[name].values.astype(np.float32), k)
            for name in sorted(static.data_vars, key=_order)
            if static[name].dims == ("y", "x")
            and name != "region"
            and cf.plain(name) not in (*cf.LATITUDES, *cf.LONGITUDES)
        }
        region = static["region"].values if "region" in static else np.ones((rows, columns))
        names = self.settings.regions if "region" in static else {1: "all"}
        self.region = cf.coarse_region(np.nan_to_num(region).astype(np.int16), k)
        self.region_names = {int(one): str(names.get(int(one), one)) for one in np.unique(self.region) if one > 0}
        self.land = self.static.get("land", np.full(self.lat.shape, np.nan, np.float32))

    def _same_grid(self, ds: xr.Dataset, place: str) -> None:
        shape = ds.sizes["y"], ds.sizes["x"]
        if shape != self._fine[0].shape:
            raise ValueError(f"{place} has {shape[0]}x{shape[1]} cells and the grid {self._fine[0].shape}; regrid one")
        if "lat" in ds.coords and not cf.same_grid((ds["lat"].values, ds["lon"].values), self._fine):
            raise ValueError(
                f"{place} has other lat and lon than the grid of the archive (more than 0.01 degrees); regrid it"
            )

    def _on_steps(self, ds: xr.Dataset, place: str, anchor: np.datetime64 | None = None) -> xr.Dataset:
        """A store at the times of the archive's steps alone. anchor: one of them; else finer times count from midnight."""
        self._same_grid(ds, place)
        times = _regular(ds, self.step_h, place)
        every = 1 if len(times) < 2 else int(self._step / (times[1] - times[0]))
        if anchor is None:
            anchor = times[0] if every == 1 else times[0].astype("datetime64[D]").astype(times.dtype)
        on_step = np.flatnonzero((times - anchor) % self._step == np.timedelta64(0))
        if not len(on_step):
            raise ValueError(
                f"{place} has no time on the steps of the analysis ({anchor}, every {self.step_h} h); shift it"
            )
        return ds.isel(time=slice(int(on_step[0]), None, every))

    def _frames(
        self, ds: xr.Dataset, names: Sequence[str], place: str, lead: int = 0, optional: bool = False, blocks: int = 1
    ) -> Frames:
        """Frames of the variables that are ours by these names, in memory if there is room.

        lead: how many leads a frame has, if it has any. blocks: how many blocks a window reads at once.
        """
        found, factors = [], []
        for name in names:
            theirs = cf.find(ds, name, place, self.settings.names)
            if theirs is None and not optional:
                raise ValueError(
                    f"{place} has no {name}; it has {', '.join(map(str, ds.data_vars))}: say which it is in archive.yaml, "
                    f"names: {{{name}: ...}}"
                )
            variable = None if theirs is None else ds[theirs]
            dims = ("time", *(("prediction_timedelta",) if lead else ()), "y", "x")
            if variable is not None:
                if set(variable.dims) != set(dims):
                    raise ValueError(f"{place}: {theirs} has dims {variable.dims}; it must have {dims}")
                variable = variable.transpose(*dims)
                if name in cf.VARIABLES:
                    factors.append(cf.micrograms(variable.attrs.get("units"), f"{place}: {theirs}"))
                else:
                    cf.check_units(name, variable.attrs.get("units"), f"{place}: {theirs}")
                    factors.append(1.0)
            else:
                factors.append(1.0)
            found.append(variable)
        if all(one is None for one in found):
            raise ValueError(f"{place} has none of {', '.join(names)}; it has {', '.join(map(str, ds.data_vars))}")
        first = 0 if lead else int((ds["time"].values[0] - self.times[0]) / self._step)
        shape = (*((lead,) if lead else ()), *self.lat.shape)
        frames = Frames(found, factors, self.settings.coarsen, shape, first, place)
        if frames.nbytes > self._room:
            frames.through(self._cache, blocks)
        else:
            self._room -= frames.nbytes
        return frames

    def _open_observations(self) -> None:
        """Stations as the cells that hold them, or maps with gaps; without either nothing is observed."""
        self._maps, self._mapped = None, None
        self._cells, self._reports = np.zeros(0, int), np.zeros((len(self.times), len(self.variables), 0), np.float32)
        self.stations = self.stations_outside = 0
        ds, place = self._slot("obs")
        tables = [self.folder / f"stations{ending}" for ending in (".csv", ".parquet")]
        table = next((path for path in tables if path.exists()), None)
        if ds is None and table is not None:
            options = {**self.settings.stations, "times": self.times}
            if "sites" in options or (self.folder / "sites.csv").exists():
                options["sites"] = self.folder / options.get("sites", "sites.csv")
            try:
                ds, place = stations.read_stations(table, **options), str(table)
            except TypeError as error:
                raise ValueError(f"{self.folder / 'archive.yaml'}: stations: {error}") from None
        if ds is None:
            return
        if "station" not in ds.dims:
            ds = self._on_steps(ds, place, self.times[0])
            self._maps, self._mapped = (
                self._frames(ds, self.variables, place, optional=True, blocks=2),
                ds.get("available"),
            )
            return
        lat, lon = cf.coordinates(ds, place)
        if lat is None:
            raise ValueError(f"{place} has no lat and lon of its stations; add them as coordinates (station)")
        cell = stations.station_cells(ds[lat].values, ds[lon].values, self.lat, self.lon)
        self.stations, self.stations_outside = int((cell >= 0).sum()), int((cell < 0).sum())
        if not self.stations:
            raise ValueError(f"{place}: none of its {len(cell)} stations lies in the grid; check lat and lon")
        if self.stations_outside:
            warnings.warn(
                f"{place}: {self.stations_outside} of {len(cell)} stations lie outside the grid", stacklevel=2
            )
        when = pd.DatetimeIndex(ds["time"].values)
        if when.has_duplicates:
            raise ValueError(f"{place} has the time {when[when.duplicated()][0]} twice; keep one")
        there = when.get_indexer(self.times)
        ds = ds.isel(time=there[there >= 0])
        values = []
        for name in self.variables:
            theirs = cf.find(ds, name, place, self.settings.names)
            if theirs is None:
                values.append(np.full((ds.sizes["time"], len(cell)), np.nan, np.float32))
                continue
            factor = cf.micrograms(ds[theirs].attrs.get("units"), f"{place}: {theirs}")
            values.append(ds[theirs].transpose("time", "station").values.astype(np.float32) * np.float32(factor))
        if not any(np.isfinite(one).any() for one in values):
            raise ValueError(f"{place} holds no value of {' or '.join(self.variables)} at the times of the analysis")
        means, self._cells = stations.cell_means(np.stack(values, axis=1), cell)
        self._reports = np.full((len(self.times), *means.shape[1:]), np.nan, np.float32)
        self._reports[there >= 0] = means

    def _open_forcing(self) -> None:
        self.forcing, self.roles = None, {}
        ds, place = self._slot("forcing")
        if self.alone and self.like is not None and self.like.roles:
            # a store with the last frames may bring its forcing with it
            own, own_place = self._slot("analysis")
            if all(cf.find(own, name, own_place, self.settings.names) for name in self.like.roles):
                ds, place = own, own_place
        if ds is None:
            return
        roles = {}
        for theirs, variable in ds.data_vars.items():
            name = cf.ours(theirs) or str(theirs)
            if not {"time", "y", "x"} <= set(variable.dims) or name in self.variables:
                continue
            roles[name] = variable.attrs.get("role", "analysis")
            if roles[name] not in ROLES:
                raise ValueError(
                    f"{place}: {theirs} has role {roles[name]!r}; it must be analysis (unknown after the init) or forecast"
                )
        self.roles = {name: roles[name] for name in sorted(roles, key=_order)}
        if not roles:
            raise ValueError(f"{place} holds no forcing (time, y, x); it has {list(ds.data_vars)}")
        ds, blocks = self._on_steps(ds, place, self.times[0]), 2 if "forecast" in roles.values() else 1
        self.forcing = self._frames(ds, list(self.roles), place, blocks=blocks)

    def _open_model(self) -> None:
        self.model, self.model_inits = None, {}
        ds, place = self._slot("model")
        if ds is None:
            return
        self._same_grid(ds, place)
        if "prediction_timedelta" not in ds.dims or ds["prediction_timedelta"].dtype.kind != "m":
            raise ValueError(
                f"{place} has no dim prediction_timedelta that says a duration; a forecast is (time, prediction_timedelta, y, x)"
            )
        leads = pd.TimedeltaIndex(ds["prediction_timedelta"].values)
        where = leads.get_indexer(pd.TimedeltaIndex(np.arange(1, self.settings.leads + 1) * self._step))
        if (where < 0).any():
            raise ValueError(
                f"{place} has leads to {leads[-1]}; it must have {self.settings.leads} of {self.step_h} h from {self.step_h} h on"
            )
        self.model = self._frames(ds.isel(prediction_timedelta=where), self.variables, place, lead=len(where))
        self.model_inits = {time: number for number, time in enumerate(ds["time"].values.astype("datetime64[ns]"))}


def _regular(ds: xr.Dataset, step_h: int, place: str) -> np.ndarray:
    """The times of a store as datetime64[ns]; refused unless they are evenly spaced and the step is a multiple of that."""
    if "time" not in ds.variables or ds["time"].dtype.kind != "M":
        raise ValueError(
            f"{place} has no coordinate time of dates; write time with units such as hours since 2019-01-01"
        )
    times = ds["time"].values.astype("datetime64[ns]")
    if not len(times):
        raise ValueError(f"{place} holds no time")
    gaps = np.diff(times)
    if len(gaps) and (gaps != gaps[0]).any():
        where = int(np.flatnonzero(gaps != gaps[0])[0])
        raise ValueError(
            f"{place}: time is not regular, {_span(gaps[0])} apart at first and {_span(gaps[where])} from {times[where]} to "
            f"{times[where + 1]}; sort it, drop doubles, and fill missing times with NaN"
        )
    step = np.timedelta64(step_h, "h")
    if len(gaps) and (gaps[0] <= np.timedelta64(0) or step % gaps[0]):
        raise ValueError(
            f"{place}: times are {_span(gaps[0])} apart, which does not divide step_h={step_h}; resample it"
        )
    return times


def _span(gap: np.timedelta64) -> str:
    return f"{gap / np.timedelta64(1, 'h'):g} h"


def _order(name: str) -> tuple:
    """A fixed order of forcing and static maps, for files list them as they please."""
    known = ("u10", "v10", "pblh", "precip", "t2m", "emission", "land", "height")
    name = cf.ours(name) or str(name)
    return (known.index(name) if name in known else len(known), name)


_OPEN: dict[str, Archive] = {}


def open_archive(path: str | Path, again: bool = False) -> Archive:
    """The archive of that path, opened once a process; again: opened anew, since its files may have changed."""
    path = os.path.abspath(path)
    if again:
        _OPEN.pop(path, None)
    if path not in _OPEN:
        _OPEN[path] = Archive(path)
    return _OPEN[path]
