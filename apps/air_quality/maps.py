"""Maps of forecasts as pictures: the class announced at every cell, the probability of an alert, and what stations observed.

All that is drawn comes from the archive: the coast is where half of a cell is land, the graticule is that of the cells' own
latitudes and longitudes. Lambert conformal, with standard parallels a sixth of the height from the southern and the northern
border; a map across the equator has plain latitudes and longitudes. Nothing is downloaded; pyplot and its state are not used.

Not covered: maps over a pole or across 180 degrees of longitude.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from apps.air_quality.counts import NAMES
from core.app import Completion
from rewards.forecast.fields import exceedance, levels, values
from rewards.forecast.schemes import classes, scheme_named

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE, DPI = (6.4, 4.2), 100  # inches, pixels an inch
# Lightness falls from class to class, so that their order is seen without seeing colours.
ANCHORS = ("#d9ebf7", "#f2cf4a", "#e07a35", "#9c2a6b", "#240a38")
COAST, GRATICULE, RING, MISSING = "#3a3a3a", "#9a9a9a", "#7f7f7f", "#b8b8b8"


def colours(count: int) -> np.ndarray:
    """(count, 3) float64 in [0, 1]: pale blue, yellow, orange, and on to dark purple the more classes there are."""
    anchors = np.array([[int(anchor[i : i + 2], 16) / 255 for i in (1, 3, 5)] for anchor in ANCHORS])
    places = np.linspace(0, min(count, len(anchors)) - 1, count)
    return np.stack([np.interp(places, range(len(anchors)), channel) for channel in anchors.T], axis=-1)


def class_map(window: Any, completion: Completion, lead: int, scheme: str = "korea", variable: int = 0) -> np.ndarray:
    """float32 (420, 640, 3) in [0, 1]: classes announced at lead `lead` (from 0), and as dots those that stations observed.

    window: with the methods of data.air_quality.Window; without a truth there are no dots. Cells without a forecast are grey.
    Raises IndexError for a lead or a variable that the forecast does not have.
    """
    known = scheme_named(scheme)
    edges = known.of(window.variables)
    bounds = edges[variable]
    palette = colours(len(known.classes))
    figure, axes = _figure(window, f"{_called(window, variable)} announced", lead)
    _cells(axes, window, palette, levels(completion, edges)[lead, variable])
    _dots(axes, window, palette, classes(window.observed()[lead, variable], np.array(bounds)))
    ranges = [f"below {bounds[0]:g}", *(f"from {bound:g}" for bound in bounds)]
    labels = [f"{name}, {span}" for name, span in zip(known.classes, ranges, strict=True)]
    return _finished(figure, palette, labels, "class (µg/m³)", "dot: class observed")


def chance_map(window: Any, completion: Completion, lead: int, scheme: str = "korea", variable: int = 0) -> np.ndarray:
    """float32 (420, 640, 3) in [0, 1]: the probability of an alert at lead `lead`, and as dots whether stations observed one.

    The rest as in `class_map`. Of a forecast without probabilities it is 0 or 1 everywhere.
    """
    known = scheme_named(scheme)
    edges = known.of(window.variables)
    bound, name = edges[variable][known.alert - 1], known.classes[known.alert]
    steps = np.linspace(0, 1, 6)
    palette = colours(len(steps) - 1)
    figure, axes = _figure(window, f"Chance of {_called(window, variable)} {name} or worse", lead)
    chance = exceedance(completion, edges)[lead, variable, ..., known.alert - 1]
    chance = np.where(np.isnan(values(completion)[lead, variable]), np.nan, chance)
    _cells(axes, window, palette, np.minimum(classes(chance, steps[1:]), len(palette) - 1))
    event = classes(window.observed()[lead, variable], np.array([bound]))
    _dots(axes, window, palette[[0, -1]], event)
    labels = [f"{low:.0%} to {high:.0%}" for low, high in pairwise(steps)]
    return _finished(
        figure, palette, labels, f"chance of {bound:g} µg/m³ or more", "dark dot: it came; pale dot: it did not"
    )


def _called(window: Any, variable: int) -> str:
    return NAMES.get(window.variables[variable], window.variables[variable])


def _figure(window: Any, title: str, lead: int) -> tuple[Figure, Axes]:
    """With the coast and the graticule."""
    from matplotlib.figure import Figure

    hours = np.timedelta64((lead + 1) * window.step_h, "h")
    valid = np.datetime_as_string(window.init.astype("datetime64[h]") + hours, "m").replace("T", " ")
    figure = Figure(figsize=SIZE, dpi=DPI, facecolor="white")
    figure.text(0.02, 0.95, title, size=11, weight="bold")
    figure.text(0.02, 0.905, f"for {valid} UTC, {hours.astype(int)} hours ahead", size=9)
    axes = figure.add_axes((0.02, 0.02, 0.66, 0.87), aspect="equal", xticks=[], yticks=[])
    x, y = _projected(window)
    axes.contour(x, y, window.land(), levels=[0.5], colors=COAST, linewidths=1.1, zorder=3)
    for degrees in (window.lat(), window.lon()):
        step = 10 if np.ptp(degrees) > 25 else 5 if np.ptp(degrees) > 10 else 2
        lines = np.arange(np.ceil(degrees.min() / step), degrees.max() / step) * step
        if len(lines):
            drawn = axes.contour(
                x, y, degrees, levels=lines, colors=GRATICULE, linewidths=0.5, linestyles=":", zorder=2
            )
            axes.clabel(drawn, fmt="%g°", fontsize=6)
    return figure, axes


def _projected(window: Any) -> tuple[np.ndarray, np.ndarray]:
    """x and y (Y, X) of the cells' centres, in km."""
    lat, lon = window.lat().astype(float), window.lon().astype(float)
    south, north, middle = lat.min(), lat.max(), (lon.min() + lon.max()) / 2
    margin = (north - south) / 6
    kind = "+proj=lcc" if south * north > 0 else "+proj=eqc"
    x, y = _projection(
        f"{kind} +lat_1={south + margin} +lat_2={north - margin} +lat_0={(south + north) / 2} +lon_0={middle}"
    )(lon, lat)
    return x / 1000, y / 1000


@lru_cache(maxsize=8)
def _projection(name: str):
    from pyproj import Proj

    return Proj(f"{name} +R=6370000")  # a sphere: there is no grid of corrections to look for


def _cells(axes: Axes, window: Any, palette: np.ndarray, shade: np.ndarray) -> None:
    """shade: (Y, X) places in the palette; negative = missing."""
    from matplotlib.colors import to_rgb

    x, y = _projected(window)
    axes.pcolormesh(x, y, np.vstack([palette, to_rgb(MISSING)])[shade], shading="nearest", zorder=1)


def _dots(axes: Axes, window: Any, palette: np.ndarray, shade: np.ndarray) -> None:
    """At the cells whose shade is not negative."""
    seen = shade >= 0
    x, y = _projected(window)
    size = np.clip(140 / max(shade.shape), 2.5, 8)  # points; about half a cell
    axes.scatter(x[seen], y[seen], s=size**2, c=palette[shade[seen]], edgecolors=RING, linewidths=0.8, zorder=4)


def _finished(figure: Figure, palette: np.ndarray, labels: Sequence[str], title: str, dots: str) -> np.ndarray:
    """The picture, with its legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=shade, edgecolor=RING, linewidth=0.5) for shade in palette]
    handles += [
        Line2D([], [], marker="o", color="none", markerfacecolor="white", markeredgecolor=RING, markersize=6),
        Line2D([], [], color=COAST, linewidth=1.1),
    ]
    names = [fill(label, 24) for label in (*labels, dots, "coast")]
    legend = figure.legend(
        handles, names, title=fill(title, 26), loc="upper left", bbox_to_anchor=(0.69, 0.92), frameon=False
    )
    for text in legend.get_texts():
        text.set_fontsize(8)
    legend.get_title().set_fontsize(9)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(np.float32) / 255
