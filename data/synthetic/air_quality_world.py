"""Weather and air of the synthetic air-quality world: advection, diffusion, emission, chemistry and loss, hour by hour.

    dC/dt = -div(uC) + K lap C + E(t)/h - (k_dep + k_rain R + k_vent h) C + chemistry

for four tracers on a Grid: primary fine particles, a precursor gas, coarse dust and secondary fine particles (YIELD x
oxidised gas), in ug m-3. PM2.5 = primary + secondary + 0.12 dust; PM10 = 1.25 PM2.5 + dust. First-order upwind fluxes,
forward in time with as many sub-steps as keep the Courant number at most 1, so that no concentration falls below 0;
sources and losses are integrated exactly over the hour. The weather is a sum of fixed patterns times a few AR(1)
series ("drivers"), so that a forecast of it is a matter of these series alone. Derived here; no real data in it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .air_quality_grid import EARTH_M, GOBI, Grid

TRACERS = ("primary", "gas", "dust", "secondary")  # the first three are emitted
BACKGROUND = (3.0, 3.0, 6.0, 3.0)  # ug m-3, on the ring around the grid
YIELD = 1.25  # ug of secondary particles per ug of oxidised gas
HOUR_S = 3600.0
LOSS = ((0.010, 0.15), (0.020, 0.12), (0.040, 0.20))  # of each tracer: h-1, and per mm of rain
VENT = 0.025  # h-1 per km of mixed layer
GAS = 1.2  # ug of gas emitted per ug of primary particles
DUST_WIND = 7.5  # m s-1, above which dust rises
DUST = 8000.0  # ug m-2 h-1 per (m s-1)^2
CALM, LOW = 0.3, 0.2  # how much a stagnation index of 1 lowers wind and mixed layer, in log
LIFT = 0.5  # a cyclone deepens the mixed layer, a high makes it shallow, in log per standard deviation of vorticity
DIFFUSION = 1.0e4  # K, m2 s-1
WIND_MAX = 15.0  # m s-1

# wave length east-west and north-south (km; the sign tilts the wave), eastward phase speed and wind amplitude (m s-1)
WAVES = (
    (6200, 5200, 8.5, 2.4),
    (5200, -4300, 10.0, 2.4),
    (4400, 6100, 12.0, 2.4),
    (3700, -3400, 11.0, 2.2),
    (3100, 3900, 13.0, 2.1),
    (2600, -5600, 14.0, 1.9),
)
STAGNATION, RAIN, ACTIVITY = range(2 * len(WAVES), 2 * len(WAVES) + 3)
MEMORY_H = np.array([60.0] * (2 * len(WAVES)) + [90.0, 48.0, 120.0])  # of the drivers
DRIVERS = len(MEMORY_H)


@dataclass(frozen=True)
class Weather:
    """(N, P) float32 at N times on the flat cells of a grid and its ring: u, v (m s-1, along rows and columns), pblh (m), precip (mm h-1), t2m (K).

    oxidation: rate at which the gas turns into particles, h-1.
    """

    u: np.ndarray
    v: np.ndarray
    pblh: np.ndarray
    precip: np.ndarray
    t2m: np.ndarray
    oxidation: np.ndarray

    def shown(self) -> tuple[np.ndarray, ...]:
        """u, v, pblh, precip, t2m: what an archive of weather holds."""
        return self.u, self.v, self.pblh, self.precip, self.t2m


@dataclass(frozen=True)
class Hours:
    """What N hours do to the tracers of W worlds on the P = (Y + 2)(X + 2) flat cells of a grid and its ring.

    stencil: weights of a cell itself (N, W, P) and of its west, east (N, W, P - 1), south and north neighbours
    (N, W, P - columns) in one of `substeps` equal parts of an hour; columns: X + 2. decay (N, 1 or W, 3, P): what is left
    of a tracer (secondary particles go as primary ones do); source (N, W, 3, P): what emission adds; formed
    (N, 1 or W, P): secondary particles from a unit of gas.
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
        product = np.empty_like(states[0])
        centre, west, east, south, north = (part[:, :, None] for part in self.stencil)
        for hour, after in enumerate(states[1:]):
            before = states[hour]
            for part in range(self.substeps):
                if part:
                    before = after.copy()
                np.multiply(before, centre[hour], out=after)
                for weight, step in ((west, 1), (south, self.columns)):
                    np.multiply(before[..., :-step], weight[hour], out=product[..., step:])
                    after[..., step:] += product[..., step:]
                for weight, step in ((east, 1), (north, self.columns)):
                    np.multiply(before[..., step:], weight[hour], out=product[..., :-step])
                    after[..., :-step] += product[..., :-step]
            after[:, 3] += self.formed[hour] * after[:, 1]
            after[:, :3] *= self.decay[hour]
            after[:, 3] *= self.decay[hour, :, 0]
            after[:, :3] += self.source[hour]
        return states


@dataclass(frozen=True)
class World:
    """One set of emissions and errors under a common weather: emission (Y + 2, X + 2) in ug m-2 h-1 of primary
    particles; wind: factors of u and v."""

    emission: np.ndarray
    wind: tuple[float, float] = (1.0, 1.0)


def drivers(hours: int, generator: np.random.Generator) -> np.ndarray:
    """(hours, DRIVERS) float64: independent AR(1) series of variance 1 with memories of MEMORY_H hours."""
    return ar1(generator.standard_normal((hours, DRIVERS)))


def ar1(noise: np.ndarray) -> np.ndarray:
    """AR(1) series of variance 1 along the first axis from white noise (T, ..., DRIVERS)."""
    keep = np.exp(-1 / MEMORY_H)
    fresh = np.sqrt(1 - keep**2)
    series = np.empty_like(noise)
    series[0] = noise[0]
    for hour in range(1, len(noise)):
        series[hour] = keep * series[hour - 1] + fresh * noise[hour]
    return series


def winter(hours: np.ndarray) -> np.ndarray:
    """1 in the middle of January, -1 half a year later; hours since 1970."""
    return np.cos(2 * np.pi * (hours / 24 / 365.2425 - 15 / 365.2425))


class Climate:
    """Fixed patterns of weather and emission on a grid; each is a matrix product with the drivers away from fields."""

    def __init__(self, grid: Grid, diffusion: float = DIFFUSION):
        self.grid = grid
        lat, lon, land, height = grid.lat, grid.lon, grid.land, grid.height
        shelter = 1 - 0.4 * np.clip(height / 3000, 0, 1)
        north = np.radians(lat - 36) * EARTH_M
        east = np.radians(lon - 110) * EARTH_M * np.cos(np.radians(36))
        inland = 1 / (1 + np.exp(-(lat - 30) / 4))
        turn = np.radians(4) * EARTH_M * np.log1p(np.exp((lat - 30) / 4))  # its integral northward
        streams = [  # of winter (from the north-west, south of 30 N from the north-east) and summer (from the south)
            -2.2 * east + 2.0 * north - 5.0 * turn,
            (2.5 - 1.5 * inland) * east - 1.0 * north,
        ]
        vorticity = []
        for length_x, length_y, _, speed in WAVES:
            k, m = 2e-3 * np.pi / length_x, 2e-3 * np.pi / length_y  # per metre
            for shift in (0, np.pi / 2):  # the wave of the driver and the one a quarter of a wave before it
                streams.append(speed / np.hypot(k, m) * np.cos(k * east + m * north + shift))
                vorticity.append(-speed * np.hypot(k, m) * np.cos(k * east + m * north + shift))
        # high ground weakens the stream function, not the wind: air flows around it, without divergence to heap it up
        slopes = [np.gradient(stream * shelter) for stream in streams]
        self.u = self._flat([-northward / grid.depth for northward, _ in slopes])
        self.v = self._flat([eastward / grid.width for _, eastward in slopes])
        self.vorticity = self._flat(vorticity) / np.sqrt((np.array(vorticity) ** 2).mean((1, 2)).sum())
        angle = 2 * np.pi * (lon / 360 - 13.5 / 24)
        self.noon = self._flat([np.cos(angle), -np.sin(angle)])  # highest at 13.5 h of local time
        self.warmth = self._flat([299 - 0.55 * (lat - 20) - 0.005 * height, -(3 + 0.45 * (lat - 20)) * (0.5 + 0.5 * land)])
        self.monsoon = self._flat([0.25 * np.exp(-(((lat - 30) / 8) ** 2)), 0.1 - 0.02 * (lat - 20)])
        self.land, self.inner = self._flat([land])[0], self._flat([grid.inner])[0]
        wide = np.broadcast_to(grid.width, lat.shape)
        face = np.vstack([(wide[:-1] + wide[1:]) / 2, wide[-1:]])  # length of the northern face
        lengths = [np.full_like(face, grid.depth), np.roll(face, 1, 0), face]  # of the faces across x, south, north
        apart = [wide, grid.depth, grid.depth]
        # shares of a cell per m s-1, half of it because a face's wind is the mean of two cells
        self.shares = self._flat([HOUR_S / 2 * grid.inner * length / grid.area for length in lengths])
        self.mixing = self._flat(
            [HOUR_S * diffusion * grid.inner * length / grid.area / d for length, d in zip(lengths, apart, strict=True)]
        )
        self.columns = lat.shape[1]
        south, north, west, east = GOBI
        gobi = grid.inner * (land >= 0.5) * (lat > south) * (lat < north) * (lon > west) * (lon < east)
        self.gobi = np.flatnonzero(gobi)
        self.heating = self._flat([1 / (1 + np.exp(-(lat - 33) / 1.5))])[0]

    def _flat(self, fields: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([np.asarray(field, np.float32).reshape(-1) for field in fields])

    def weather(self, hours: np.ndarray, series: np.ndarray) -> Weather:
        """Weather at N hours since 1970 from drivers (N, DRIVERS); all fields (N, P)."""
        cold = winter(hours)
        waves = np.empty((len(hours), 2 * len(WAVES)))
        for number, (length_x, _, speed, _) in enumerate(WAVES):
            turn = 2 * np.pi * speed * 3.6 / length_x * hours  # travels eastward
            real, imaginary = series[:, 2 * number], series[:, 2 * number + 1]
            waves[:, 2 * number] = real * np.cos(turn) + imaginary * np.sin(turn)
            waves[:, 2 * number + 1] = imaginary * np.cos(turn) - real * np.sin(turn)
        waves *= (0.9 + 0.15 * cold)[:, None]
        calm = series[:, STAGNATION]
        blows = np.column_stack([(1 + cold) / 2, (1 - cold) / 2, waves]) * np.exp(-CALM * calm)[:, None]
        u, v = (blows.astype(np.float32) @ pattern for pattern in (self.u, self.v))
        cap = WIND_MAX / np.sqrt(np.maximum(u * u + v * v, WIND_MAX**2))
        u *= cap
        v *= cap
        day = 2 * np.pi * hours / 24
        noon = np.column_stack([np.cos(day), np.sin(day)]).astype(np.float32) @ self.noon
        lift = waves.astype(np.float32) @ self.vorticity
        season = np.column_stack([-cold, np.ones_like(cold)]).astype(np.float32) @ self.monsoon
        wet = lift + season
        wet += (0.35 * series[:, RAIN] - 1.35).astype(np.float32)[:, None]
        precip = 1.6 * np.maximum(wet, 0, out=wet)
        rise = np.square(0.5 + 0.5 * noon)
        deep = ((650 - 300 * cold) * np.exp(-LOW * calm)).astype(np.float32)[:, None]
        shallow = ((330 - 90 * cold) * np.exp(-LOW * calm)).astype(np.float32)[:, None]
        pblh = self.land * (shallow - 550 + deep * rise) + 550
        pblh *= np.exp(LIFT * lift)
        np.maximum(pblh, 120, out=pblh)
        t2m = np.column_stack([np.ones_like(cold), cold]).astype(np.float32) @ self.warmth
        t2m += 4 * self.land * noon + 0.4 * v
        oxidation = 0.012 * np.exp(0.03 * (t2m - 285)) * (0.4 + np.maximum(noon, 0)) * (1 + np.minimum(precip, 1))
        oxidation *= np.exp(0.3 * calm).astype(np.float32)[:, None]
        return Weather(u, v, pblh, precip, t2m, oxidation)

    def hours(self, weather: Weather, hours: np.ndarray, activity: np.ndarray, worlds: Sequence[World]) -> Hours:
        """What the hours since 1970 (N,) do in W worlds under one weather; activity (N,): that driver."""
        winds = np.array([world.wind for world in worlds], np.float32)[..., None]
        centre, *others = self.stencil(weather.u[:, None] * winds[:, 0], weather.v[:, None] * winds[:, 1])
        substeps = max(1, math.ceil(1 - centre.min()))
        if substeps > 1:
            centre, others = 1 + (centre - 1) / substeps, [part / substeps for part in others]
        change = -self.loss(weather)
        lost = np.expm1(change)
        spread = lost / change  # of what enters during the hour: (1 - exp(-k)) / k, so that E/(hk) is the exact balance
        source = self.emission(weather, hours, activity, worlds)
        source *= spread[:, None]
        formed = YIELD * self.inner * weather.oxidation * spread[:, 1]
        decay = 1 + self.inner * lost
        return Hours((centre, *others), self.columns, substeps, decay[:, None], source, formed[:, None])

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

    def emission(self, weather: Weather, hours: np.ndarray, activity: np.ndarray, worlds: Sequence[World]) -> np.ndarray:
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
        """Weights of an hour's upwind transport, as in Hours: of the cell, of its west, east, south and north neighbours.

        u, v (N, W, P): wind in the cells, m s-1; a face takes the mean of its two cells. 1 minus the first weight is the
        share of a cell's air that leaves it, the Courant number of an hour. The ring keeps what it holds.
        """
        x, south, north = self.shares
        mix_x, mix_south, mix_north = self.mixing
        centre = np.empty_like(u)
        centre[:] = 1 - 2 * mix_x - mix_south - mix_north
        weights = []
        for wind, step, behind, ahead, mixed in (
            (u, 1, x, x, (mix_x, mix_x)),
            (v, self.columns, south, north, (mix_south, mix_north)),
        ):
            face = wind[..., :-step] + wind[..., step:]
            forth, back = np.maximum(face, 0), np.minimum(face, 0)
            centre[..., :-step] -= forth * ahead[:-step]
            centre[..., step:] += back * behind[step:]
            forth *= behind[step:]
            forth += mixed[0][step:]
            back *= -ahead[:-step]
            back += mixed[1][:-step]
            weights += [forth, back]
        return centre, *weights


def particles(tracers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """PM2.5 and PM10 (..., P) of tracers (..., 4, P), ug m-3."""
    fine = tracers[..., 0, :] + tracers[..., 3, :] + 0.12 * tracers[..., 2, :]
    return fine, 1.25 * fine + tracers[..., 2, :]
