"""Air-quality archives: what was analysed, what stations observed, and windows of it that a forecast may see.

    archive.yaml      step_h: 6, history: 2, leads: 20, coarsen: 2, splits: {train: {from, to, every_h}, ...}, regions: {id: name}
    analysis.zarr     pm2p5, pm10 (time, y, x); or analysis.nc, or a folder analysis/ of NetCDF files, CF or IOAPI
    forcing.zarr      optional: any maps (time, y, x) with units; attribute role = analysis (the default) or forecast
    static.nc         optional: maps (y, x), land, region, lat, lon
    obs.zarr          optional: pm2p5, pm10 (time, station) or (time, y, x); or stations.csv, stations.parquet (and sites.csv)
    model.zarr        optional: pm2p5, pm10 (time = init, prediction_timedelta, y, x), the analysis model's own forecasts

A folder of the published FAKER-Air files is an archive too (data/faker_air.py). Keys of archive.yaml: step_h, history and
leads count hours, frames and steps; coarsen k means k x k cells; `from` and `to` are both included; further keys are names
({ours: theirs} of variables), stations (options of data.stations.read_stations), like and normals (`request_rows`).

Missing is NaN. A window reads nothing after its init but what is known then: the calendar and forcing of role=forecast.
Asking for another forcing ahead is a LeakError. Forcing is standardised with statistics of the training split alone.
Layouts, sources and licences: data/README.md. `data.synthetic.air_quality.write` makes an archive. Nothing is downloaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from .air_archive import Archive, open_archive

SEASONS = ("DJF", "MAM", "JJA", "SON")


class LeakError(ValueError):
    """Something was asked for that is not known at the init time."""


@dataclass(frozen=True)
class Window:
    """A forecast's place in an archive: light, compared by value, read when asked. Concentrations are in ug m-3.

    H history frames, L leads, V variables, y rows from south to north, x columns. `init` is the time of the last frame
    of history; lead l (from 0) is valid at init + (l + 1) step_h hours.
    """

    path: str  # of the archive folder, or of a store of analyses in one
    init: np.datetime64
    leads: int
    variables: tuple[str, ...]
    step_h: int

    def __repr__(self) -> str:
        return (
            f"Window({Path(self.path).name}, {np.datetime_as_string(self.init, 'h')}, {self.leads} x {self.step_h} h)"
        )

    def history(self) -> np.ndarray:
        """(H, V, y, x) float32, oldest first: what stations report in a cell, the analysis elsewhere; never NaN."""
        archive, start, stop = self._known()
        observed, analysed = archive.observed(start, stop), archive.analysis.between(start, stop)
        frames = np.where(np.isfinite(observed), observed, analysed)
        if np.isnan(frames).any():
            raise ValueError(
                f"{self!r}: the analysis misses {int(np.isnan(frames).sum())} values up to the init, and no station has them; "
                "a forecast needs whole maps to begin with"
            )
        return frames

    def seen(self) -> np.ndarray:
        """(H, V, y, x) float32: 1 where `history` is an observation, 0 where it is the analysis."""
        archive, start, stop = self._known()
        return np.isfinite(archive.observed(start, stop)).astype(np.float32)

    def given(self) -> np.ndarray:
        """(C, y, x) float32 maps known at the init, standardised: static ones, then each forcing at each frame of history.

        Static maps have mean 0 and standard deviation 1 over the cells; forcing is standardised with the training split's
        mean and standard deviation. What is missing is 0, the mean. `given_names` says which map is which.
        """
        archive, start, stop = self._known()
        ground = archive.ground[1]
        if archive.forcing is None:
            return ground.copy()
        if start < archive.forcing.first or stop > archive.forcing.first + archive.forcing.length:
            raise ValueError(f"{self!r}: the forcing does not cover the {stop - start} times up to the init; add them")
        scaled = _standardised(archive, archive.forcing.between(start, stop), tuple(archive.roles))
        return np.concatenate([ground, scaled.swapaxes(0, 1).reshape(-1, *ground.shape[1:])])

    @property
    def given_names(self) -> tuple[str, ...]:
        """Names of the maps of `given`: "land", ..., "u10 -6 h", "u10 0 h", ..."""
        archive = self._archive
        hours = [-self.step_h * back for back in range(archive.settings.history - 1, -1, -1)]
        return (*archive.ground[0], *(f"{name} {hour} h" for name in archive.roles for hour in hours))

    def ahead(self) -> np.ndarray:
        """(L, 7) float32, known of each valid time (UTC): sine and cosine of hour, day of the year and weekday; lead / 20."""
        steps = np.arange(1, self.leads + 1)
        times = self.init + steps * np.timedelta64(self.step_h, "h")
        days = times.astype("datetime64[D]")
        hour = (times - days) / np.timedelta64(24, "h")
        day = (days - times.astype("datetime64[Y]").astype("datetime64[D]")).astype(int)
        parts = [hour, (day + hour) / 365.25, (days.astype(int) + 3) % 7 / 7]  # 1970 began on a Thursday
        waves = [wave(2 * np.pi * part) for part in parts for wave in (np.sin, np.cos)]
        return np.stack([*waves, steps / 20], axis=1).astype(np.float32)

    def maps_ahead(self, names: Sequence[str] | None = None) -> np.ndarray | None:
        """(L, F, y, x) float32: forcing of role=forecast at the valid times, standardised as in `given`; None without any.

        names: which forcing, in this order; by default all of role=forecast.
        Raises LeakError for a forcing of role=analysis: after the init it is not known.
        """
        archive = self._archive
        names = [name for name, role in archive.roles.items() if role == "forecast"] if names is None else list(names)
        for name in names:
            if name not in archive.roles:
                raise ValueError(f"{self.path} has no forcing {name!r}; it has {', '.join(archive.roles) or 'none'}")
            if archive.roles[name] != "forecast":
                raise LeakError(
                    f"forcing {name} of {self.path} has role={archive.roles[name]}: it is not known before it happens; "
                    f"after {self.init} only a forcing of role=forecast may be read"
                )
        if not names:
            return None
        start = archive.index(self.init) + 1
        if start + self.leads > archive.forcing.first + archive.forcing.length:
            raise ValueError(f"{self!r}: the forcing of role=forecast ends before the last lead; add its times")
        places = [list(archive.roles).index(name) for name in names]
        return _standardised(archive, archive.forcing.between(start, start + self.leads)[:, places], tuple(names))

    def observed(self) -> np.ndarray:
        """(L, V, y, x) float32: the truth at the valid times, NaN where nothing is observed (in a request: everywhere)."""
        start = self._archive.index(self.init) + 1
        return self._archive.observed(start, start + self.leads)

    def analysis(self) -> np.ndarray:
        """(L, V, y, x) float32: the analysis at the valid times, for training only; NaN where it is missing."""
        start = self._archive.index(self.init) + 1
        return self._archive.analysis.between(start, start + self.leads)

    def model(self) -> np.ndarray | None:
        """(L, V, y, x) float32: the analysis model's own forecast from this init; None where the archive holds none."""
        archive = self._archive
        if archive.model is None or (number := archive.model_inits.get(self.init)) is None:
            return None
        return archive.model.between(number, number + 1)[0].swapaxes(0, 1)[: self.leads].copy()

    def region(self) -> np.ndarray:
        """(y, x) int16: number of the region of each cell, 0 = none."""
        return self._archive.region

    @property
    def region_names(self) -> dict[int, str]:
        return self._archive.region_names

    def lat(self) -> np.ndarray:
        """(y, x) float32 degrees of the cells' centres, row 0 in the south."""
        return self._archive.lat

    def lon(self) -> np.ndarray:
        """(y, x) float32 degrees of the cells' centres, -180 to 180."""
        return self._archive.lon

    def land(self) -> np.ndarray:
        """(y, x) float32 share of land, NaN where the archive does not say."""
        return self._archive.land

    @property
    def _archive(self) -> Archive:
        return open_archive(self.path)

    def _known(self) -> tuple[Archive, int, int]:
        """The archive, and the range of the frames of history."""
        archive = self._archive
        stop = archive.index(self.init) + 1
        return archive, stop - archive.settings.history, stop


def load(folder: str | Path) -> dict[str, list[dict]]:
    """{split: rows} of an archive folder, in time order.

    A row: id ("2023-01-05T06", the init), window (Window), week ("2023-W01", ISO year and week of the init), season ("DJF",
    "MAM", "JJA", "SON") and month (1 to 12) of the init. A window lies in its split from the first frame of history to the
    last lead. Left out, and counted by `describe`, are inits before which the analysis misses a cell and inits after which
    nothing is observed (if the archive has observations at all).

    Raises FileNotFoundError for a missing folder, ValueError for anything else; both name file, value, limit and fix.
    """
    archive = open_archive(folder, again=True)
    settings = archive.settings
    if "train" not in settings.splits:
        raise ValueError(
            f"{archive.folder / 'archive.yaml'} has splits {list(settings.splits)}; one must be train (and validation, test)"
        )
    rows = {}
    for split in settings.splits:
        inits, _, _ = _inits(archive, split)
        if not len(inits):
            one = settings.splits[split]
            raise ValueError(
                f"{archive.folder}: split {split}, {one.start} to {one.end}, has no window of {settings.history} whole analyses "
                f"and {settings.leads} leads of {settings.step_h} h with anything observed; widen it, or fill gaps"
            )
        _check_forcing(archive, split, inits)
        rows[split] = _rows(archive, archive.times[inits])
    return rows


def describe(folder: str | Path) -> dict:
    """What is in an archive: grid, forcing, stations, and for each split its windows and those left out, counted.

    {"cells": [y, x], "forcing": {name: role}, "stations": in the grid, "stations_outside": left out,
    "splits": {split: {"windows", "incomplete": left out since the analysis has gaps, "unobserved": since no truth is there}}}
    """
    archive = open_archive(folder)
    splits = {}
    for split in archive.settings.splits:
        inits, incomplete, unobserved = _inits(archive, split)
        splits[split] = {"windows": len(inits), "incomplete": incomplete, "unobserved": unobserved}
    return {
        "cells": list(archive.lat.shape),
        "forcing": dict(archive.roles),
        "stations": archive.stations,
        "stations_outside": archive.stations_outside,
        "splits": splits,
    }


def normals(folder: str | Path) -> dict[str, tuple[float, float]]:
    """{forcing: (mean, standard deviation)} of the training split, which `normals:` of another archive.yaml may hold."""
    return open_archive(folder).normals


def request_rows(path: str | Path) -> list[dict]:
    """One row, as `load` gives it but without truth: the forecast from the last time of `path`.

    path: a store of analyses (.nc, .zarr) that lies in the folder of the archive trained on, of whose times only the last
    H are needed, with the forcing of these times in it or in the folder; or a folder with an archive.yaml of its own. Where
    such a folder does not hold the training split, its archive.yaml says where the settings, static.nc and the statistics
    of the forcing come from: like: <folder of the archive trained on>; or it holds static.nc and normals:.

    Raises ValueError where history, forcing or grid do not serve, naming what is missing.
    """
    archive = open_archive(path, again=True)
    if len(archive.times) < archive.settings.history:
        raise ValueError(f"{path} holds {len(archive.times)} times; a forecast begins with {archive.settings.history}")
    if archive.like is not None:
        mine, theirs = dict(archive.roles), dict(archive.like.roles)
        if mine != theirs:
            raise ValueError(f"{path} has the forcing {mine} and the archive trained on {theirs}; give it the same")
        if not np.array_equal(archive.lat, archive.like.lat) or not np.array_equal(archive.lon, archive.like.lon):
            raise ValueError(f"{path} has another grid than the archive trained on, {archive.like.folder}; regrid it")
    rows = _rows(archive, archive.times[-1:])
    rows[0]["window"].history(), rows[0]["window"].given(), rows[0]["window"].maps_ahead()  # what is missing, say now
    return rows


def _inits(archive: Archive, split: str) -> tuple[np.ndarray, int, int]:
    """Time indices of the inits of a split, and how many were left out: incomplete history, nothing observed."""
    settings, one, times = archive.settings, archive.settings.splits[split], archive.times
    inits = np.arange(settings.history - 1, len(times) - settings.leads)
    inside = (times[inits - settings.history + 1] >= one.start) & (times[inits + settings.leads] <= one.end)
    inits = inits[inside & ((times[inits] - one.start) % np.timedelta64(one.every_h, "h") == np.timedelta64(0))]
    whole = np.all([archive.is_complete[inits - back] for back in range(settings.history)], axis=0)
    seen = np.any([archive.is_observed[inits + lead] for lead in range(1, settings.leads + 1)], axis=0)
    seen |= not archive.has_observations
    return inits[whole & seen], int((~whole).sum()), int((whole & ~seen).sum())


def _check_forcing(archive: Archive, split: str, inits: np.ndarray) -> None:
    if archive.forcing is None:
        return
    ahead = archive.settings.leads if "forecast" in archive.roles.values() else 0
    first, last = inits[0] - archive.settings.history + 1, inits[-1] + ahead
    begin, end = archive.forcing.first, archive.forcing.first + archive.forcing.length - 1
    if first < begin or last > end:
        start = archive.times[0]
        step = np.timedelta64(archive.step_h, "h")
        raise ValueError(
            f"{archive.folder}: the forcing has times {start + begin * step} to {start + end * step}; split {split} reads "
            f"it from {start + first * step} to {start + last * step}: add the times or shorten the split"
        )


def _rows(archive: Archive, inits: np.ndarray) -> list[dict]:
    dates = pd.DatetimeIndex(inits)
    calendar = dates.isocalendar()
    names = np.datetime_as_string(inits, "h" if (inits == inits.astype("datetime64[h]")).all() else "m")
    settings = archive.settings
    return [
        {
            "id": str(name),
            "window": Window(str(archive.path), init, settings.leads, archive.variables, settings.step_h),
            "week": f"{year}-W{week:02d}",
            "season": SEASONS[month % 12 // 3],
            "month": int(month),
        }
        for name, init, year, week, month in zip(
            names, inits, calendar["year"], calendar["week"], dates.month, strict=True
        )
    ]


def _standardised(archive: Archive, frames: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """(n, F, y, x) with the training split's mean taken off, over its standard deviation; 0 where missing."""
    mean, spread = np.array([archive.normals[name] for name in names], np.float32).T[..., None, None]
    return np.nan_to_num((frames - mean) / spread)
