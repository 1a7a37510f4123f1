"""A network of stations in the synthetic air-quality world: where they stand and what they make of the truth."""

from collections.abc import Mapping

import numpy as np

from .air_quality_grid import Grid

BIAS = 0.12  # of a station, in log
SPREAD = 0.12  # of the air around a station within its cell, in log, new at each report
MISSING = 0.04  # of reports, at random
OUTAGE_FRAMES = 12  # mean length of a station's outage
OUTAGES = 0.04  # of a station's time


class Network:
    """At most `stations` stations, one in a land cell, likelier where emissions are; fewer where land is short.

    cells (S,): flat cells of the grid and its ring. A station stands up to 0.3 of a cell from the centre of its own.
    """

    def __init__(self, grid: Grid, stations: int, generator: np.random.Generator):
        self.grid = grid
        land = np.flatnonzero(grid.land * grid.inner >= 0.5)
        chance = grid.emission.reshape(-1)[land]
        count = min(stations, len(land))
        self.cells = np.sort(generator.choice(land, count, replace=False, p=chance / chance.sum()))
        self.shift = generator.uniform(-0.3, 0.3, (2, count))

    def places(self) -> dict[str, np.ndarray]:
        """lat, lon (degrees), alt (m) and station_id, (S,) each."""

        def place(field: np.ndarray) -> np.ndarray:
            slopes = [slope.reshape(-1)[self.cells] for slope in np.gradient(field)]
            return field.reshape(-1)[self.cells] + self.shift[0] * slopes[0] + self.shift[1] * slopes[1]

        return {
            "lat": place(self.grid.lat),
            "lon": place(self.grid.lon),
            "alt": self.grid.height.reshape(-1)[self.cells],
            "station_id": np.array([f"S{number:04d}" for number in range(len(self.cells))], dtype=object),
        }

    def report(self, truth: Mapping[str, np.ndarray], generator: np.random.Generator) -> dict[str, np.ndarray]:
        """float32 (N, S) from the true values of the cells (N, S), ug m-3; NaN where missing.

        A report is the truth times exp(BIAS z) of the station times exp(SPREAD z) of this report. 4 % are missing at
        random and 4 % of the time a station is out for days, with all it measures: 7.7 % in all.
        """
        shape = next(iter(truth.values())).shape
        bias = np.exp(BIAS * generator.standard_normal(shape[1]))
        starts = generator.random((shape[0] + OUTAGE_FRAMES * 10, shape[1])) < OUTAGES / OUTAGE_FRAMES
        lengths = generator.geometric(1 / OUTAGE_FRAMES, starts.shape)
        out = np.zeros(starts.shape, bool)
        for frame, station in np.argwhere(starts):
            out[frame : frame + lengths[frame, station], station] = True
        out = out[-shape[0] :]  # the frames before let outages be under way when the series begins
        reports = {}
        for name, values in truth.items():
            report = values * bias * np.exp(SPREAD * generator.standard_normal(shape))
            report[out | (generator.random(shape) < MISSING)] = np.nan
            reports[name] = report.astype(np.float32)
        return reports
