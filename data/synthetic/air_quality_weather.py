"""Weather of the synthetic air-quality world: fixed patterns times a few AR(1) series, its drivers.

Wind = a seasonal monsoon and six travelling waves, bent around high ground, times a stagnation index; rain where the waves
turn cyclonically and in the season; a mixed layer that follows the sun, the season and the waves. Since all fields are
products of patterns and drivers, forecasting this weather is forecasting its drivers. Derived here; no real data in it.
"""

from dataclasses import dataclass

import numpy as np

from .air_quality_grid import EARTH_M, Grid

WIND_MAX = 15.0  # m s-1
PBLH_MIN = 120.0  # m
CALM, LOW = 0.3, 0.2  # how much a stagnation index of 1 lowers wind and mixed layer, in log
LIFT = 0.5  # how much a standard deviation of cyclonic vorticity deepens the mixed layer, in log

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
    """(N, P) float32 at N times on the P = (Y + 2)(X + 2) flat cells of a grid and its ring.

    u, v: wind along the rows and along the columns, m s-1; pblh: depth of the mixed layer, m; precip: mm h-1; t2m: K;
    oxidation: rate at which the precursor gas turns into particles, h-1.
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
    """The patterns of a grid's weather."""

    def __init__(self, grid: Grid):
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
        self.u = flat([-northward / grid.depth for northward, _ in slopes])
        self.v = flat([eastward / grid.width for _, eastward in slopes])
        self.vorticity = flat(np.array(vorticity) / np.sqrt(np.square(vorticity).mean((1, 2)).sum()))  # of variance 1
        angle = 2 * np.pi * (lon / 360 - 13.5 / 24)
        self.noon = flat([np.cos(angle), -np.sin(angle)])  # highest at 13.5 h of local time
        self.warmth = flat([299 - 0.55 * (lat - 20) - 0.005 * height, -(3 + 0.45 * (lat - 20)) * (0.5 + 0.5 * land)])
        self.monsoon = flat([0.25 * np.exp(-(((lat - 30) / 8) ** 2)), 0.1 - 0.02 * (lat - 20)])
        self.land = flat([land])[0]

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
        np.maximum(pblh, PBLH_MIN, out=pblh)
        t2m = np.column_stack([np.ones_like(cold), cold]).astype(np.float32) @ self.warmth
        t2m += 4 * self.land * noon + 0.4 * v
        oxidation = 0.012 * np.exp(0.03 * (t2m - 285)) * (0.4 + np.maximum(noon, 0)) * (1 + np.minimum(precip, 1))
        oxidation *= np.exp(0.3 * calm).astype(np.float32)[:, None]
        return Weather(u, v, pblh, precip, t2m, oxidation)


def flat(fields) -> np.ndarray:
    """(K, P) float32 of K fields (Y + 2, X + 2)."""
    return np.stack([np.asarray(field, np.float32).reshape(-1) for field in fields])
