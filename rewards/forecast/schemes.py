"""Class schemes of particulate matter: which concentrations an agency calls good, bad or an alert.

One edge rule everywhere: class k is [lo, hi), so the class of a value is the number of edges <= it, and an alert is every
class from `Scheme.alert` on. Edges in ug m-3. A US class ends at a value after truncation (9.0, to 0.1), so the next one begins
at the next value there is (9.1).

Not covered: averages. These schemes are defined on 24 h means (the US index on NowCast ones) and the WHO's with a number of
days a year on which they may be exceeded; here they are applied to whatever the values are, as arXiv 2511.22169 does to
6-hourly ones, so that a class says nothing of whether a legal limit was kept. Sub-indices of other pollutants are not there.

Sources: Korea as in arXiv 2511.22169, read in the paper's code. The others are public tables: US EPA 2024 (40 CFR 58 appendix G),
WHO global air quality guidelines 2021, China HJ 633-2012.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Scheme:
    """classes: their names, from clean to polluted. alert: the first that is an alert. edges: of each variable, ascending."""

    name: str
    classes: tuple[str, ...]
    alert: int
    edges: Mapping[str, tuple[float, ...]]

    def of(self, variables: Sequence[str]) -> tuple[tuple[float, ...], ...]:
        """The edges of these variables, equally many each. Raises ValueError for a variable that the scheme does not know."""
        for variable in variables:
            if variable not in self.edges:
                raise ValueError(f"scheme {self.name} has no edges for {variable!r}; it has: {', '.join(self.edges)}")
        return tuple(self.edges[variable] for variable in variables)


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "korea",
            ("good", "moderate", "bad", "very bad"),
            alert=2,
            edges={"pm2p5": (15.0, 35.0, 75.0), "pm10": (30.0, 80.0, 150.0)},
        ),
        Scheme(
            "us",
            ("good", "moderate", "unhealthy for sensitive groups", "unhealthy", "very unhealthy", "hazardous"),
            alert=2,
            edges={"pm2p5": (9.1, 35.5, 55.5, 125.5, 225.5), "pm10": (55.0, 155.0, 255.0, 355.0, 425.0)},
        ),
        Scheme(  # the WHO names no alert; missing interim target 3 comes closest to the alerts of the others
            "who",
            (
                *("guideline met", "interim target 4 met", "interim target 3 met", "interim target 2 met"),
                *("interim target 1 met", "no target met"),
            ),
            alert=3,
            edges={"pm2p5": (15.0, 25.0, 37.5, 50.0, 75.0), "pm10": (45.0, 50.0, 75.0, 100.0, 150.0)},
        ),
        Scheme(  # the severe class in three, at the breakpoints 400 and 500 of the index
            "china",
            (
                *("excellent", "good", "lightly polluted", "moderately polluted", "heavily polluted", "severe"),
                *("severe, index over 400", "severe, index over 500"),
            ),
            alert=2,
            edges={
                "pm2p5": (35.0, 75.0, 115.0, 150.0, 250.0, 350.0, 500.0),
                "pm10": (50.0, 150.0, 250.0, 350.0, 420.0, 500.0, 600.0),
            },
        ),
    )
}


def scheme_named(name: str) -> Scheme:
    """Raises ValueError for a name that is not in SCHEMES."""
    return named("scheme", name, SCHEMES)


def named(what: str, name: str, known: Mapping[str, Any]) -> Any:
    """known[name]; raises ValueError with the nearest name that there is."""
    if name not in known:
        near = get_close_matches(str(name), known, n=1)
        raise ValueError(
            f"unknown {what} {name!r}{f'; did you mean {near[0]!r}?' if near else ''} (known: {', '.join(known)})"
        )
    return known[name]


def classes(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """int8 of the shape of `values`: the number of edges <= each value, -1 where the value is NaN.

    edges: (..., E) ascending, edges[..., k] broadcasts with `values`: (E,) for one variable, (V, 1, 1, E) for (..., V, Y, X).
    They are compared in the precision of `values`, so that a value read as float32 0.7 reaches an edge written as 0.7.
    """
    values = np.asarray(values)
    edges = np.asarray(edges, dtype=values.dtype)
    found = np.zeros(values.shape, dtype=np.int8)
    for k in range(edges.shape[-1]):
        found += values >= edges[..., k]
    found[np.isnan(values)] = -1
    return found
