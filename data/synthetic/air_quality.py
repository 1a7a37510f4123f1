"""Writes an archive of a synthetic air-quality world, in the layout that data/air_quality.py reads.

The truth is the world of air_quality_world.py; stations report it with errors and gaps. What the folder holds as the
analysis is another run in the same weather with wrong emissions and winds, as a chemistry model's would be, and model.zarr
holds that model's own forecasts, made in a weather forecast. The same numbers for a seed; every one of them is synthetic.

    archive.yaml  analysis.zarr  forcing.zarr  static.nc  obs.zarr  model.zarr
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import yaml

from .air_quality_files import PM, Fields, Format, gridded, save_stations
from .air_quality_grid import REGIONS, Grid, lambert, lat_lon
from .air_quality_stations import Network
from .air_quality_weather import ACTIVITY, DRIVERS, MEMORY_H, Climate, ar1, drivers
from .air_quality_world import BACKGROUND, Air, World, particles
from .folder import whole

STEP_H = 6
HISTORY = 2
LEADS = 20
SPIN_UP_H = 15 * 24
BLOCK_H, BATCH = (
    24,
    12,
)  # hours of the run and forecasts taken at once, so that the arrays stay in the processor's cache
FRAMES = 240  # of a chunk of the archive
SKILL_H = 96.0  # of the weather forecast, see forecasts
EMISSION = 615.0  # ug m-2 h-1 of primary particles at a hot spot's peak
SPLITS = {
    "train": {"from": "2019-01-01T00", "to": "2021-12-26T18", "every_h": 6},
    "validation": {"from": "2022-01-01T00", "to": "2022-12-26T18", "every_h": 24},
    "test": {"from": "2023-01-01T00", "to": "2023-12-31T18", "every_h": 24},
}


def write(
    folder: str | Path,
    seed: int = 0,
    *,
    grid: tuple[int, int, float] | None = None,
    splits: Mapping[str, Mapping] = SPLITS,
    stations: int = 220,
    coarsen: int = 2,
    skill_h: float = SKILL_H,
    format: Format = "zarr",
) -> None:
    """Writes the archive folder, whole or not at all.

    grid: rows, columns and kilometres of a Lambert conformal map, as of air_quality_grid.lambert; None: 32 x 48 cells of
    1 degree, 20..51 N, 100..147 E. splits: {name: {from, to, every_h}}; the world runs from the first to the last time
    of all. stations: see Network. coarsen: for the reader, it changes no file. skill_h: see forecasts; they start from
    every 00 UTC init of the splits other than train. format: zarr or netcdf, of all but static.nc.
    Raises FileExistsError if the folder exists, ValueError for another format.
    """
    if format not in ("zarr", "netcdf"):
        raise ValueError(f"format={format!r} is not known; give zarr or netcdf")
    with whole(folder, "archive") as partial:
        plane = lat_lon() if grid is None else lambert(*grid)
        first = min(_hour(split["from"]) for split in splits.values())
        last = max(_hour(split["to"]) for split in splits.values())
        inits = np.unique([hour for name, split in splits.items() if name != "train" for hour in _inits(split)])
        begin = first - SPIN_UP_H
        series = drivers(last + STEP_H - begin, np.random.default_rng([seed, 0]))
        truth, twin = worlds(plane, seed)
        network = Network(plane, stations, np.random.default_rng([seed, 2]))
        analysis, forcing = (Fields(partial / name, format, plane, FRAMES) for name in ("analysis", "forcing"))
        times, samples, starts = [], [], []
        for now, weather, states in run(plane, (truth, twin), series, begin):
            starts += [states[hour - now[0], 1].copy() for hour in inits if hour in now]
            frames = np.flatnonzero((now % STEP_H == 0) & (now >= first))
            if len(frames):
                times.append(now[frames])
                samples.append([values[:, network.cells] for values in particles(states[frames, 0])])
                analysis.add(times[-1], dict(zip(PM, particles(states[frames, 1]), strict=True)))
                fields = zip(("u10", "v10", "pblh", "precip", "t2m"), weather.shown(), strict=True)
                forcing.add(times[-1], {name: field[frames] for name, field in fields})
        analysis.close()
        forcing.close()
        true = {name: np.concatenate(parts) for name, parts in zip(PM, zip(*samples, strict=True), strict=True)}
        reports = network.report(true, np.random.default_rng([seed, 3]))
        save_stations(partial / "obs", format, np.concatenate(times), reports, network.places(), FRAMES)
        if len(inits):
            leads = (STEP_H * np.arange(1, LEADS + 1)).astype("timedelta64[h]")
            model = Fields(partial / "model", format, plane, 2 * BATCH, leads)
            for some, values in forecasts(plane, twin, inits, np.stack(starts), series, begin, seed, skill_h):
                model.add(some, dict(zip(PM, particles(values), strict=True)))
            model.close()
        _save_ground(partial / "static.nc", plane, twin)
        about = {"step_h": STEP_H, "history": HISTORY, "leads": LEADS, "coarsen": coarsen}
        about |= {"splits": {name: dict(split) for name, split in splits.items()}}
        about |= {"regions": dict(enumerate(REGIONS, start=1))}
        (partial / "archive.yaml").write_text(yaml.safe_dump(about, sort_keys=False), encoding="utf-8")


def worlds(grid: Grid, seed: int) -> tuple[World, World]:
    """The truth and the model that errs: emissions off by a smooth log-normal field (0.25), winds by +6 and -3 %."""
    emission = EMISSION * grid.emission
    error = np.exp(0.25 * grid.smooth_field(np.random.default_rng([seed, 1]), 400))
    return World(emission), World(emission * error, (1.06, 0.97))


def run(grid: Grid, chosen: tuple[World, ...], series: np.ndarray, begin: int) -> Iterator[tuple]:
    """Blocks of (hours since 1970 (N,), their Weather, states (N, W, 4, P) of the tracers) from background air on.

    series (T, DRIVERS): from hour `begin` on, to the end of the run.
    """
    climate, air = Climate(grid), Air(grid)
    state = np.tile(np.array(BACKGROUND, np.float32)[:, None], (len(chosen), 1, grid.lat.size))
    for at in range(0, len(series), BLOCK_H):
        block = series[at : at + BLOCK_H]
        now = begin + at + np.arange(len(block))
        weather = climate.weather(now, block)
        states = air.hours(weather, now, block[:, ACTIVITY], chosen).run(state)
        state = states[-1]
        yield now, weather, states[:-1]


def forecasts(
    grid: Grid,
    model: World,
    inits: np.ndarray,
    starts: np.ndarray,
    series: np.ndarray,
    begin: int,
    seed: int,
    skill_h: float = SKILL_H,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of (inits (N,), tracers (N, LEADS, 4, P)) of a model's forecasts from its states `starts` at the inits.

    inits: hours since 1970; series, begin: the drivers of the true weather, from hour `begin` on. The weather forecast
    is exact at the init and drifts towards a weather of its own: each driver is r * truth + sqrt(1 - r^2) * another
    realisation of the same process, r = exp(-lead / skill_h). The activity of emissions is the init's and fades to its
    mean as it is expected to. Nothing else that is valid after an init enters.
    """
    climate, air = Climate(grid), Air(grid)
    lead = np.arange(LEADS * STEP_H)[:, None]
    skill = np.exp(-lead / skill_h)[:, :, None]
    for first in range(0, len(inits), BATCH):
        some = inits[first : first + BATCH]
        # each init has a stream of its own, whichever others are made beside it
        noise = [np.random.default_rng([seed, 4, hour]).standard_normal((len(lead), DRIVERS)) for hour in some]
        expected = skill * series[some - begin + lead] + np.sqrt(1 - skill**2) * ar1(np.stack(noise, 1))
        expected[:, :, ACTIVITY] = series[some - begin, ACTIVITY] * np.exp(-lead / MEMORY_H[ACTIVITY])
        state, values = starts[first : first + BATCH], []
        for step in range(LEADS):
            part = slice(step * STEP_H, (step + 1) * STEP_H)
            now, flat = (some + lead[part]).reshape(-1), expected[part].reshape(-1, DRIVERS)
            hours = air.hours(climate.weather(now, flat), now, flat[:, ACTIVITY], (model,))
            state = hours.regrouped(len(some)).run(state)[-1]
            values.append(state)
        yield some, np.stack(values, 1)


def _inits(split: Mapping) -> list[int]:
    """Hours since 1970 of the inits at 00 UTC whose history and leads lie in a split."""
    first, last = _hour(split["from"]), _hour(split["to"])
    hours = range(first, last - LEADS * STEP_H + 1, split["every_h"])
    return [hour for hour in hours if hour % 24 == 0 and hour - (HISTORY - 1) * STEP_H >= first]


def _save_ground(path: Path, grid: Grid, model: World) -> None:
    maps = {"emission": model.emission / 3600, "land": grid.land, "height": grid.height}
    fields = {name: (("y", "x"), grid.without_ring(field).astype(np.float32)) for name, field in maps.items()}
    gridded(grid, fields | {"region": (("y", "x"), grid.region)}).to_netcdf(path, engine="netcdf4")


def _hour(time: str) -> int:
    """Hours since 1970."""
    return int(np.datetime64(time, "h").astype(int))
