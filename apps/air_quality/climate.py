"""Climatology: what was observed at a place in a month at an hour of the day, over the training period."""

from __future__ import annotations

from functools import cache

import numpy as np

from core.app import Row, Rows
from rewards.forecast.fields import MEMBERS, dtype
from rewards.forecast.schemes import classes, scheme_named

TOP = 1000.0  # ug m-3; what lies above it counts as this


class Climate:
    """Observations of the training period by month, hour, variable and cell, as sums and histograms.

    A cell that was never observed in a month at an hour has what its region was then, else what all cells were, else what all
    were in any month. A variable that was never observed is forecast as 0: there is nothing to say, and nothing to judge it by.
    A valid time counts once, however many windows hold it: they are read end to end, not one by one.
    """

    def __init__(self, train: Rows):
        rows = sorted(train, key=lambda row: row["window"].init)
        window = rows[0]["window"]
        self.edges = np.array(scheme_named(rows[0]["scheme"]).of(window.variables), dtype=np.float32)
        self.step_h, self.slots = window.step_h, max(1, 24 // window.step_h)
        self.bins = np.unique(np.concatenate([[0.0], self.edges.ravel(), np.geomspace(1, TOP, 25)])).astype(np.float32)
        self.region = window.region()
        shape = 12, self.slots, len(self.edges), *self.region.shape
        self.sums, self.counts = np.zeros(shape, np.float32), np.zeros((*shape, len(self.bins)), np.uint16)
        last = np.datetime64(rows[0]["window"].init, "h")
        for row in rows:
            times = self._times(row)
            if times[0] > last or row is rows[-1]:
                self._add(row["window"].observed()[times > last], times[times > last])
                last = times[-1]
        self.at = cache(self._at)

    def _times(self, row: Row) -> np.ndarray:
        """Valid times of the leads, in hours."""
        window = row["window"]
        return np.datetime64(window.init, "h") + self.step_h * np.arange(1, window.leads + 1)

    def _place(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return times.astype("datetime64[M]").astype(int) % 12, times.astype(int) % 24 * self.slots // 24

    def _add(self, observed: np.ndarray, times: np.ndarray) -> None:
        lead, variable, y, x = np.nonzero(np.isfinite(observed))
        value = np.minimum(observed[lead, variable, y, x], np.float32(TOP))
        month, slot = self._place(times)
        place = month[lead], slot[lead], variable, y, x
        np.add.at(self.sums, place, value)
        np.add.at(self.counts, (*place, np.searchsorted(self.bins, value, side="right") - 1), 1)

    def forecast(self, row: Row) -> np.ndarray:
        """(L, V, Y, X) structured."""
        places = zip(*self._place(self._times(row)), strict=True)
        return np.stack([self.at(int(month), int(slot)) for month, slot in places])

    def _at(self, month: int, slot: int) -> np.ndarray:
        """(V, Y, X) structured, of one month and hour."""
        then = self.sums[month, slot], self.counts[month, slot].astype(np.int64)
        sums, counts = then[0].astype(np.float64), then[1].copy()

        def fill(cells: np.ndarray, total: np.ndarray, count: np.ndarray) -> None:
            """Of these cells (Y, X) the empty ones get (V,) sums and (V, B) counts."""
            for v in range(len(sums)):
                empty = cells & ~counts[v].any(axis=-1)
                sums[v][empty], counts[v][empty] = total[v], count[v]

        everywhere = np.ones_like(self.region, dtype=bool)
        for cells in (*(self.region == number for number in np.unique(self.region)), everywhere):
            fill(cells, then[0][:, cells].sum(axis=1), then[1][:, cells].sum(axis=1))
        fill(everywhere, self.sums.sum((0, 1, 3, 4)), self.counts.sum((0, 1, 3, 4), dtype=np.int64))

        counts[~counts.any(axis=-1), 0] = 1
        number = counts.sum(axis=-1, keepdims=True)
        below = counts.cumsum(axis=-1) / number  # share of cases in the bin or a lower one
        edge = np.searchsorted(self.bins, self.edges) - 1  # the last bin below each edge
        made = np.empty(sums.shape, dtype(self.edges.shape[1]))
        made["value"] = sums / number[..., 0]
        made["level"] = classes(made["value"], self.edges[:, None, None, :])
        made["exceed"] = 1 - np.take_along_axis(
            below, np.broadcast_to(edge[:, None, None, :], made["exceed"].shape), -1
        )
        made["members"] = self._quantiles(below, counts / number)
        return made

    def _quantiles(self, below: np.ndarray, share: np.ndarray) -> np.ndarray:
        """(..., M) concentrations: straight lines within a bin."""
        levels = (np.arange(MEMBERS) + 0.5) / MEMBERS
        place = (below[..., None, :] < levels[:, None]).sum(axis=-1)
        upper, width = np.take_along_axis(below, place, -1), np.take_along_axis(share, place, -1)
        top = np.append(self.bins[1:], np.float32(TOP))[place]
        return top - (upper - levels) / width * (top - self.bins[place])
