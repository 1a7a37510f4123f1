"""Forecasts as Zarr or NetCDF in the layout of WeatherBench, written from completions and read from any forecaster.

    time (init), prediction_timedelta (lead)            datetime64[ns], timedelta64[ns]
    pm2p5, pm10          (time, prediction_timedelta, y, x), ug m-3; lat, lon (y, x) or one-dimensional
    pm2p5_class          int8, the class announced
    pm2p5_exceedance     (..., threshold, y, x): probability of a value of at least pm2p5_threshold (threshold)
    pm2p5_members        (..., number, y, x): equally likely values, ascending; or pm2p5 itself with a dim `number`

Only the values are needed of a forecaster. Other names of init, lead, latitude, longitude, members and variables are mapped,
as are a file of one init with valid times, kg m-3, latitudes from the north, longitudes from 0 to 360, a larger area, and
a grid that is a whole number of times finer. Nothing is interpolated: other cells or leads are refused in words.
The layout is that of WeatherBench 2 (Rasp et al. 2024, arXiv 2308.15560), from its public documentation.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from . import cf
from .air_frames import is_zarr, open_one
from .stations import nearest_cell

INITS = ("init", "init_time", "initialization_time", "initial_time", "forecast_reference_time", "reference_time")
LEADS = ("prediction_timedelta", "lead", "lead_time", "leadtime", "step", "forecast_period", "lead_timedelta")
VALID = ("time", "valid_time", "valid")
NUMBERS = ("number", "member", "ensemble", "realization", "sample")
MEMBERS = 8  # of a completion
BATCH_MB, BATCH = 64, 16  # written and read together: so many MB, and so many inits at most
FINEST = 8  # a file may have this many times the cells, along rows and along columns
FIELD = ("time", "prediction_timedelta")


def write_forecasts(
    path: str | Path,
    inits: Sequence[np.datetime64],
    completions: Iterable[np.ndarray],
    *,
    variables: Sequence[str] = cf.VARIABLES,
    edges: Sequence[Sequence[float]],
    lat: np.ndarray,
    lon: np.ndarray,
    step_h: int = 6,
) -> None:
    """Writes one forecast an init, as Zarr or NetCDF by the ending of `path`; what lies there is replaced.

    completions: (L, V, y, x) each, all of one shape and dtype: plain float32 in ug m-3, or structured with fields value,
        level, exceed (E,) and members (8,). A Zarr store is written a few inits at a time, so they may be a generator.
    edges: (V, E) thresholds of the classes, ascending. lat, lon: (y, x) degrees, row 0 in the south.
    Raises ValueError for other endings, shapes and numbers of completions, and for an init that is there twice.
    """
    path, inits = Path(path), np.asarray(inits, "datetime64[ns]")
    if path.suffix not in (".zarr", ".nc"):
        raise ValueError(f"{path} ends in {path.suffix!r}; forecasts are written as .zarr or .nc")
    if len(np.unique(inits)) < len(inits):
        raise ValueError(f"{len(inits)} forecasts have {len(np.unique(inits))} inits; write one forecast an init")
    if path.is_dir() and any(path.iterdir()) and not is_zarr(path):
        raise ValueError(f"{path} is a folder of something else; name a path that does not exist")
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    parts, chunk = [], 0
    for batch in _batches(inits, completions):
        ds = _dataset(batch, list(variables), edges, lat, lon, step_h)
        if path.suffix == ".nc":
            parts.append(ds)
        elif chunk:
            ds.to_zarr(path, append_dim="time", consolidated=False)
        else:
            chunks = {name: {"chunks": (len(batch), *one.shape[1:])} for name, one in ds.data_vars.items()}
            ds.to_zarr(path, mode="w", consolidated=False, encoding=chunks)
        chunk = chunk or len(batch)
    if not chunk:
        raise ValueError(f"{path}: there is no forecast to write")
    if parts:
        whole = xr.concat(parts, "time", data_vars="minimal", coords="minimal", compat="override", join="override")
        whole.to_netcdf(
            path, engine="netcdf4", encoding={name: {"zlib": True, "complevel": 1} for name in whole.data_vars}
        )


def read_forecasts(
    path: str | Path,
    *,
    variables: Sequence[str] = cf.VARIABLES,
    edges: Sequence[Sequence[float]] | None = None,
    lat: np.ndarray | None = None,
    lon: np.ndarray | None = None,
    step_h: int = 6,
    leads: int | None = None,
    names: Mapping[str, str] | None = None,
) -> "Forecasts":
    """{init: completion} of any forecaster's file, read when asked; `.of(inits)` gives a list of them.

    edges: (V, E) of the task; needed for a file with members, and compared with the thresholds of a file that has them.
    lat, lon: (y, x) cells wanted, row 0 in the south; by default those of the file, from south to north.
    step_h, leads: a completion has the leads step_h, 2 step_h, ... that the file has, `leads` of them at most.
    names: {ours: the file's} where a variable, or time, prediction_timedelta, number, lat or lon, is not recognised.

    A file of values alone gives plain float32 (L, V, y, x); one with classes, probabilities or members gives structured
    completions, what it lacks following from its values. Raises ValueError naming file, variable, value and fix.
    """
    return Forecasts(Path(path), list(variables), edges, lat, lon, step_h, leads, names or {})


class Forecasts(Mapping):
    """Forecasts of one file by init; see `read_forecasts`."""

    def __init__(self, path, variables, edges, lat, lon, step_h, leads, names):
        self.path, self._variables = path, variables
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there; give a Zarr store or a NetCDF file of forecasts")
        renamed = {theirs: mine for mine, theirs in names.items() if mine not in variables}
        ds = open_one(path)
        if absent := set(names.values()) - set(ds.variables) - set(ds.dims):
            raise ValueError(f"{path} has no {sorted(absent)[0]!r}, which names says; it has {list(ds.variables)}")
        ds = cf.gridded(_timed(ds.rename(renamed), str(path)), str(path))
        if number := next((name for name in NUMBERS if name in ds.dims), None):
            ds = ds.rename({number: "number"}) if number != "number" else ds
        self._names = [cf.find(ds, name, str(path), names) for name in variables]
        for name, theirs in zip(variables, self._names, strict=True):
            if theirs is None:
                raise ValueError(
                    f"{path} has no {name}; it has {', '.join(map(str, ds.data_vars))}: names={{{name!r}: ...}} says which"
                )
            if not {*FIELD, "y", "x"} <= set(ds[theirs].dims) <= {*FIELD, "y", "x", "number"}:
                raise ValueError(
                    f"{path}: {theirs} has dims {ds[theirs].dims}; it must have init, lead, y, x (and number)"
                )
        units = [ds[name].attrs.get("units") for name in self._names]
        places = [f"{path}: {name}" for name in self._names]
        self._factors = np.float32([cf.micrograms(*one) for one in zip(units, places, strict=True)])
        self._ds = ds.isel(prediction_timedelta=_leads(ds, step_h, leads, path))
        self._inits = ds["time"].values.astype("datetime64[ns]")
        self._where = {init: number for number, init in enumerate(self._inits)}
        if len(self._where) < len(self._inits):
            raise ValueError(f"{path} has an init twice; write one forecast an init")
        self._cells, self._finer, self._shape = _cells(ds, lat, lon, path)
        self._structured = "number" in ds[self._names[0]].dims or any(
            f"{name}_{part}" in ds for name in variables for part in ("class", "exceedance", "members")
        )
        self._edges = self._thresholds(edges) if self._structured else None
        if self._structured and self._finer > 1 and "number" not in ds[self._names[0]].dims:
            raise ValueError(
                f"{path} has classes or probabilities on cells {self._finer} times finer than asked for, and means of them mean "
                "nothing; write them on the coarse cells, or values alone"
            )
        stored = ds[self._names[0]].encoding.get("preferred_chunks", {}).get("time", 1)
        self._block, self._read = min(stored, BATCH), (-1, [])

    def __getitem__(self, init: np.datetime64) -> np.ndarray:
        number, at = divmod(self._where[np.datetime64(init, "ns")], self._block)
        if self._read[0] != number:
            self._read = (number, self._completions(slice(number * self._block, (number + 1) * self._block)))
        return self._read[1][at].copy()

    def __iter__(self) -> Iterator[np.datetime64]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def of(self, inits: Iterable[np.datetime64]) -> list[np.ndarray]:
        """The forecasts of these inits, in their order. Raises ValueError naming the first that the file lacks."""
        inits = [np.datetime64(init, "ns") for init in inits]
        if absent := [init for init in inits if init not in self._where]:
            raise ValueError(
                f"{self.path} has no forecast from {np.datetime_as_string(absent[0], 'm')} ({len(absent)} of {len(inits)} are "
                f"missing); it has {len(self)}, from {self._inits.min()} to {self._inits.max()}"
            )
        return [self[init] for init in inits]

    def _thresholds(self, edges) -> np.ndarray:
        """(V, E) of the file or of the task; refused if they differ."""
        coords = [f"{name}_threshold" for name in self._variables]
        there = np.stack([self._ds[name].values for name in coords]) if all(c in self._ds for c in coords) else None
        if edges is None and there is None:
            raise ValueError(f"{self.path} has members or classes and no pm2p5_threshold (threshold); pass edges")
        if edges is None or there is None:
            return np.asarray(there if edges is None else edges, np.float64)
        if there.shape != np.shape(edges) or not np.allclose(there, edges):
            raise ValueError(
                f"{self.path} has thresholds {there.tolist()} and the task {np.asarray(edges).tolist()}; they must agree"
            )
        return np.asarray(edges, np.float64)

    def _field(self, name: str, at: slice, extra: str | None = None) -> np.ndarray:
        """(n, L, y, x) or (n, L, y, x, extra) on the cells wanted."""
        dims = (*FIELD, *((extra,) if extra else ()), "y", "x")
        values = self._ds[name].isel(time=at).transpose(*dims).values
        if self._finer > 1:
            values = cf.coarse(values.astype(np.float32), self._finer)
        elif self._cells is not None:
            values = values.reshape(*values.shape[:-2], -1)[..., self._cells].reshape(*values.shape[:-2], *self._shape)
        return np.moveaxis(values, 2, -1) if extra else values

    def _completions(self, at: slice) -> list[np.ndarray]:
        stacked = []
        for number, (name, theirs) in enumerate(zip(self._variables, self._names, strict=True)):
            extra = "number" if "number" in self._ds[theirs].dims else None
            values = self._field(theirs, at, extra).astype(np.float32) * self._factors[number]
            stacked.append(self._structure(name, number, values, at) if self._structured else values)
        return list(np.stack(stacked, axis=2))

    def _structure(self, name: str, number: int, values: np.ndarray, at: slice) -> np.ndarray:
        """One variable's values (n, L, y, x) or members (n, L, y, x, number) as structured cells."""
        edges = self._edges[number]
        everyone = values if values.ndim == 5 else values[..., None]
        mean = everyone.mean(-1) if values.ndim == 5 else values
        out = np.empty(
            mean.shape,
            [("value", "f4"), ("level", "i1"), ("exceed", "f2", (len(edges),)), ("members", "f2", (MEMBERS,))],
        )
        out["value"] = mean
        out["level"] = np.digitize(mean, edges)
        out["exceed"] = (everyone[..., None] >= edges).mean(-2)
        ranks = (np.arange(MEMBERS) + 0.5) / MEMBERS
        out["members"] = np.moveaxis(np.quantile(everyone, ranks, axis=-1, method="hazen"), 0, -1)
        if f"{name}_class" in self._ds:
            levels = self._field(f"{name}_class", at)
            if levels.min() < 0 or levels.max() > len(edges):
                raise ValueError(
                    f"{self.path}: {name}_class goes from {levels.min()} to {levels.max()}; classes are 0 to {len(edges)}"
                )
            out["level"] = levels
        if f"{name}_exceedance" in self._ds:
            out["exceed"] = self._field(f"{name}_exceedance", at, "threshold")
        if f"{name}_members" in self._ds:
            out["members"] = np.sort(self._field(f"{name}_members", at, "number"), axis=-1)
        return out


def _batches(inits: np.ndarray, completions: Iterable[np.ndarray]) -> Iterator[list[tuple]]:
    batch, size = [], 0
    for pair in zip(inits, completions, strict=True):
        size = size or max(1, min(BATCH, BATCH_MB * 2**20 // max(1, pair[1].nbytes)))
        batch.append(pair)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _dataset(batch, variables, edges, lat, lon, step_h) -> xr.Dataset:
    inits, completions = zip(*batch, strict=True)
    shape, dtype = completions[0].shape, completions[0].dtype
    for init, one in batch:
        if one.shape != shape or one.dtype != dtype:
            raise ValueError(
                f"the forecast of {init} is {one.shape} {one.dtype} and the first {shape} {dtype}; write equal ones"
            )
    if shape[1:] != (len(variables), *np.shape(lat)) or np.shape(edges)[0] != len(variables):
        raise ValueError(
            f"forecasts are {shape}, variables {variables}, edges {np.shape(edges)}, cells {np.shape(lat)}; they must be "
            "(L, V, y, x), V names, (V, E) and (y, x)"
        )
    stacked = np.stack(completions)
    data = {}
    for number, name in enumerate(variables):
        cells = stacked[:, :, number]
        value = cells["value"] if dtype.names else cells
        attrs = {"units": "ug m-3", "standard_name": cf.STANDARD.format(name)}
        data[name] = ((*FIELD, "y", "x"), value.astype(np.float32), attrs)
        if dtype.names:
            meaning = {"long_name": f"class announced of {name}", "units": "1"}
            data[f"{name}_class"] = ((*FIELD, "y", "x"), cells["level"], meaning)
            meaning = {"long_name": f"probability of {name} at or above {name}_threshold", "units": "1"}
            exceed = np.moveaxis(cells["exceed"], -1, 2).astype(np.float32)
            data[f"{name}_exceedance"] = ((*FIELD, "threshold", "y", "x"), exceed, meaning)
            members = np.moveaxis(cells["members"], -1, 2).astype(np.float32)
            meaning = {"long_name": f"equally likely values of {name}, ascending", "units": "ug m-3"}
            data[f"{name}_members"] = ((*FIELD, "number", "y", "x"), members, meaning)
    steps = np.arange(1, shape[0] + 1) * np.timedelta64(step_h, "h").astype("timedelta64[ns]")
    coords = {
        "time": ("time", np.array(inits, "datetime64[ns]"), {"standard_name": "forecast_reference_time"}),
        "prediction_timedelta": ("prediction_timedelta", steps, {"standard_name": "forecast_period"}),
        "lat": (("y", "x"), np.asarray(lat), {"units": "degrees_north", "standard_name": "latitude"}),
        "lon": (("y", "x"), np.asarray(lon), {"units": "degrees_east", "standard_name": "longitude"}),
    }
    if dtype.names:
        for name, thresholds in zip(variables, edges, strict=True):
            coords[f"{name}_threshold"] = ("threshold", np.asarray(thresholds, np.float64), {"units": "ug m-3"})
    return xr.Dataset(data, coords=coords, attrs={"Conventions": "CF-1.11"})


def _timed(ds: xr.Dataset, place: str) -> xr.Dataset:
    """The Dataset with dims time = init and prediction_timedelta = lead, both decoded."""
    lead = next((name for name in LEADS if name in ds.dims), None)
    init = next((name for name in INITS if name in ds.variables), None)
    if init is None and lead is not None:
        init = next((name for name in VALID if name in ds.dims), None)
    if init is None:
        raise ValueError(
            f"{place} has dims {tuple(ds.dims)}: no init ({', '.join(('time', *INITS))}) with leads ({', '.join(LEADS)})"
        )
    if lead is None:  # one init with valid times
        valid = next((name for name in VALID if name in ds.dims and name != init), None)
        if valid is None or ds[init].size != 1:
            raise ValueError(
                f"{place} has dims {tuple(ds.dims)}; beside inits ({init}) it needs leads: {', '.join(LEADS)}"
            )
        start = ds[init].values.reshape(())
        ds = ds.squeeze(init, drop=True) if init in ds.dims else ds.drop_vars(init)
        ds = (
            ds.assign_coords({valid: ds[valid].values - start})
            .rename({valid: "prediction_timedelta"})
            .expand_dims(time=[start])
        )
    else:
        if init not in ds.dims:
            start = ds[init].values.reshape(())
            ds = ds.drop_vars(init)
            ds = ds.drop_vars([name for name in VALID if name in ds.variables]).expand_dims(time=[start])
            init = "time"
        drop = [name for name in VALID if name in ds.variables and name != init]
        ds = ds.drop_vars(drop).rename(
            {mine: yours for mine, yours in ((lead, FIELD[1]), (init, "time")) if mine != yours}
        )
    if ds["time"].dtype.kind != "M":
        raise ValueError(
            f"{place}: the inits ({init}) are no dates; write them with units such as hours since 2019-01-01"
        )
    if ds["prediction_timedelta"].dtype.kind != "m":
        raise ValueError(
            f"{place}: the leads ({lead}) are {ds['prediction_timedelta'].dtype} without units; write units: hours"
        )
    return ds


def _leads(ds: xr.Dataset, step_h: int, leads: int | None, path: Path) -> np.ndarray:
    """Where the leads step_h, 2 step_h, ... are."""
    there = pd.TimedeltaIndex(ds["prediction_timedelta"].values)
    step = pd.Timedelta(hours=step_h)
    wanted = int(there.max() // step) if leads is None else leads
    where = there.get_indexer(pd.TimedeltaIndex([step * (lead + 1) for lead in range(wanted)]))
    missing = np.flatnonzero(where < 0)
    many = len(where) if not len(missing) else int(missing[0])
    if many == 0 or (where[many:] >= 0).any():
        raise ValueError(
            f"{path} lacks the lead {(many + 1) * step_h} h; it has {there.min()} to {there.max()}, and needs every {step_h} h"
        )
    return where[:many]


def _cells(ds: xr.Dataset, lat, lon, path: Path) -> tuple[np.ndarray | None, int, tuple[int, int]]:
    """Which cells of the file are the cells wanted: their flat numbers (None: as they lie), or how much finer the file is."""
    if lat is None:
        return None, 1, (ds.sizes["y"], ds.sizes["x"])
    shape = np.shape(lat)
    if "lat" not in ds.coords:
        raise ValueError(f"{path} has no lat and lon; add them, so that its cells can be found")
    theirs = ds["lat"].values, ds["lon"].values
    if cf.same_grid(theirs, (lat, lon)):
        return None, 1, shape
    for k in range(2, FINEST + 1):
        fits = theirs[0].shape == (shape[0] * k, shape[1] * k)
        if fits and cf.same_grid((cf.coarse(theirs[0], k), cf.coarse_lon(theirs[1], k)), (lat, lon)):
            return None, k, shape
    cell, far = nearest_cell(np.ravel(lat), np.ravel(lon), *theirs)
    _, size = nearest_cell(lat[:1, 0], lon[:1, 0], lat[1:2, :1], lon[1:2, :1])
    worst = int(far.argmax())
    if far[worst] > 0.1 * size[0]:
        where = f"{np.ravel(lat)[worst]:.2f} N, {np.ravel(lon)[worst]:.2f} E"
        raise ValueError(
            f"{path} has no cell at {where}, the nearest is {far[worst]:.0f} km away; regrid it to the archive's cells"
        )
    return cell, 1, shape
