"""Air of the synthetic air-quality world: advection, diffusion, emission, chemistry and loss, hour by hour.

    dC/dt = -div(uC) + K lap C + E(t)/h - (k_dep + k_rain R + k_vent h) C + chemistry

for four tracers on a Grid: primary fine particles, a precursor gas, coarse dust and secondary fine particles (YIELD x
oxidised gas), in ug m-3. PM2.5 = primary + secondary + 0.12 dust; PM10 = 1.25 PM2.5 + dust. First-order upwind fluxes,
forward in time with as many sub-steps as keep the Courant number at most 1, so that no concentration falls below 0;
sources and losses are integrated exactly over the hour, in the weather of its beginning. Derived here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .air_quality_grid import GOBI, Grid
from .air_quality_weather import Weather, flat, winter

TRACERS = ("primary", "gas", "dust", "secondary")  # the first three are emitted
BACKGROUND = (3.0, 3.0, 6.0, 3.0)  # ug m-3, on the ring around the grid
YIELD = 1.25  # ug of secondary particles per ug of oxidised gas
LOSS = ((0.010, 0.15), (0.020, 0.12), (0.040, 0.20))  # of the first three: by deposition, h-1, and per mm of rain
VENT = 0.025  # loss to the air above, h-1 per km of mixed layer
GAS = 1.2  # ug of gas emitted per ug of primary particles
DUST_WIND = 7.5  # m s-1, above which dust rises from the Gobi
DUST = 8000.0  # ug m-2 h-1 per (m s-1)^2 above it, at the height of spring
DIFFUSION = 1.0e4  # K, m2 s-1
HOUR_S = 3600.0


@dataclass(frozen=True)
class World:
    """What may differ under one weather: emission (Y + 2, X + 2) of primary particles, ug m-2 h-1; wind: factors of u, v."""

    emission: np.ndarray
    wind: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True)
class Hours:
    """What N hours do to the tracers of W worlds on the P = (Y + 2)(X + 2) flat cells of a grid and its ring.

    stencil: five of (N, W, P): in one of `substeps` equal parts of an hour, what a cell keeps, what its eastern neighbour
    gets from it and what it gets from there, and the same two with its northern neighbour, `columns` = X + 2 cells on.
    decay (N, 1 or W, 3, P): what is left of a tracer (secondary particles go as primary ones do); source (N, W, 3, P):
    what emission adds; formed (N, 1 or W, P): secondary particles from a unit of gas.
    """

    stencil: tuple[np.ndarray, ...]
    columns: int
    substeps: int
    decay: np.ndarray
    source: np.ndarray
    formed: np.ndarray

    def regrouped(self, worlds: int) -> "Hours":
        """Of N hours in one world: N / worlds hours in `worlds` worlds, taken in the C order of (hour, world)."""

        def regroup(part: np.ndarray) -> np.ndarray:
            return part.reshape(len(part) // worlds, worlds, *part.shape[2:])

        stencil = tuple(regroup(part) for part in self.stencil)
        parts = (regroup(self.decay), regroup(self.source), regroup(self.formed))
        return Hours(stencil, self.columns, self.substeps, *parts)

    def run(self, state: np.ndarray) -> np.ndarray:
        """States (N + 1, W, 4, P) before and after each hour; state (W, 4, P)."""
        states = np.empty((len(self.source) + 1, *state.shape), np.float32)
        states[0] = state
        product = np.zeros_like(states[0])  # its first and last cells, of the ring, get nothing from anywhere
        keeps, *neighbours = (part[:, :, None] for part in self.stencil)
        for hour, after in enumerate(states[1:]):
            before = states[hour]
            for part in range(self.substeps):
                if part:
                    before = after.copy()
                np.multiply(before, keeps[hour], out=after)
                for gives, takes, step in ((*neighbours[:2], 1), (*neighbours[2:], self.columns)):
                    np.multiply(before[..., :-step], gives[hour, ..., :-step], out=product[..., step:])
                    after += product
                    np.multiply(before[..., step:], takes[hour, ..., :-step], out=product[..., :-step])
                    after += product
            after[:, 3] += self.formed[hour] * after[:, 1]
            after[:, :3] *= self.decay[hour]
            after[:, 3] *= self.decay[hour, :, 0]
            after[:, :3] += self.source[hour]
        return states


class Air:
    """What weather and emission do to the tracers on a grid."""

    def __init__(self, grid: Grid, diffusion: float = DIFFUSION):
        self.inner = flat([grid.inner])[0]
        self.heating = flat([1 / (1 + np.exp(-(grid.lat - 33) / 1.5))])[0]  # share of houses that heat in winter
        south, north, west, east = GOBI
        gobi = (grid.lat > south) & (grid.lat < north) & (grid.lon > west) & (grid.lon < east)
        self.gobi = np.flatnonzero(gobi & (grid.land * grid.inner >= 0.5))
        self.columns = grid.lat.shape[1]
        wide, depth = np.broadcast_to(grid.width, grid.lat.shape), np.full(grid.lat.shape, grid.depth)
        northern = np.vstack([(wide[:-1] + wide[1:]) / 2, wide[-1:]])
        gain = (HOUR_S * grid.inner / grid.area).reshape(-1)  # per metre of a cell's edge; the ring gains nothing
        self.kept, self.faces = np.ones(grid.lat.size), []
        for length, apart, step in ((depth, wide, 1), (northern, depth, self.columns)):
            shares = [length.reshape(-1) * np.roll(gain, -shift) for shift in (0, step)]  # of a cell and its neighbour
            mixing = [share * diffusion / apart.reshape(-1) for share in shares]
            self.kept -= mixing[0] + np.roll(mixing[1], step)
            halves = [share / 2 for share in shares]  # a face's wind is the mean of two cells
            self.faces.append((step, *(part.astype(np.float32) for part in halves + mixing)))

    def hours(self, weather: Weather, hours: np.ndarray, activity: np.ndarray, worlds: Sequence[World]) -> Hours:
        """What the hours since 1970 (N,) do in W worlds under one weather; activity (N,): that driver."""
        winds = np.array([world.wind for world in worlds], np.float32)[..., None]
        keeps, *parts = self.stencil(weather.u[:, None] * winds[:, 0], weather.v[:, None] * winds[:, 1])
        substeps = max(1, math.ceil(1 - keeps.min()))
        if substeps > 1:
            keeps, parts = 1 + (keeps - 1) / substeps, [part / substeps for part in parts]
        change = -self.loss(weather)
        lost = np.expm1(change)
        spread = lost / change  # of what enters during the hour: (1 - exp(-k)) / k, so that E/(hk) is the exact balance
        source = self.emission(weather, hours, activity, worlds)
        source *= spread[:, None]
        formed = YIELD * self.inner * weather.oxidation * spread[:, 1]
        decay = 1 + self.inner * lost
        return Hours((keeps, *parts), self.columns, substeps, decay[:, None], source, formed[:, None])

    def loss(self, weather: Weather) -> np.ndarray:
        """(N, 3, P) h-1, above 0: deposition, rain, exchange with the air above, and for the gas its oxidation."""
        k = np.empty((len(weather.u), 3, weather.u.shape[1]), np.float32)
        vent = VENT / 1000 * weather.pblh
        for tracer, (dry, wash) in enumerate(LOSS):
            np.multiply(weather.precip, wash, out=k[:, tracer])
            k[:, tracer] += vent
            k[:, tracer] += dry
        k[:, 1] += weather.oxidation
        return k

    def emission(
        self, weather: Weather, hours: np.ndarray, activity: np.ndarray, worlds: Sequence[World]
    ) -> np.ndarray:
        """(N, W, 3, P) ug m-3 h-1 put into the mixed layer: primary particles, gas and dust."""
        local = (hours + 8) % 24
        rush = 1 + 0.3 * np.exp(-((local - 8) ** 2) / 4.5) + 0.3 * np.exp(-((local - 19) ** 2) / 4.5)
        weekend = (hours // 24 + 4) % 7 % 6 == 0  # 1970-01-01 was a Thursday
        now = rush * np.where(weekend, 0.85, 1) * np.exp(0.15 * activity)
        heat = np.maximum(winter(hours) + 0.1, 0)
        pace = np.column_stack([now, now * heat]).astype(np.float32)
        source = np.zeros((len(hours), len(worlds), 3, self.inner.size), np.float32)
        for number, world in enumerate(worlds):
            flat = world.emission.astype(np.float32).reshape(-1)
            np.divide(pace @ np.stack([flat, flat * self.heating]), weather.pblh, out=source[:, number, 0])
            np.multiply(source[:, number, 0], GAS, out=source[:, number, 1])
        day = hours / 24 % 365.2425
        spring = DUST * np.exp(-(((day - 105) / 32) ** 2)).astype(np.float32)
        u, v, pblh = (field[:, self.gobi] for field in (weather.u, weather.v, weather.pblh))
        gale = np.maximum(np.hypot(u, v) - DUST_WIND, 0)
        source[:, :, 2, self.gobi] = (spring[:, None] * gale**2 / pblh)[:, None]
        return source

    def stencil(self, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, ...]:
        """An hour's upwind transport, as in Hours: what a cell keeps, gives east, gets from there, gives north, gets from there.

        u, v (N, W, P): wind in the cells, m s-1; a face takes the mean of its two cells. 1 minus the first is the share
        of a cell's air that leaves it, the Courant number of an hour. The ring keeps what it holds.
        """
        keeps = np.empty_like(u)
        keeps[:] = self.kept
        parts = []
        for wind, (step, here, beyond, mix_here, mix_beyond) in zip((u, v), self.faces, strict=True):
            face = np.zeros_like(wind)
            np.add(wind[..., :-step], wind[..., step:], out=face[..., :-step])
            forth, back = np.maximum(face, 0), np.minimum(face, 0)
            keeps -= forth * here
            keeps[..., step:] += (back * beyond)[..., :-step]
            parts += [forth * beyond + mix_beyond, mix_here - back * here]
        return keeps, *parts


def particles(tracers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """PM2.5 and PM10 (..., P) of tracers (..., 4, P), ug m-3."""
    fine = tracers[..., 0, :] + tracers[..., 3, :] + 0.12 * tracers[..., 2, :]
    return fine, 1.25 * fine + tracers[..., 2, :]
