"""Line charts as numbers ready for inline SVG: paths, ticks and labels; core/run/report.html draws them.

Drawn by hand instead of by matplotlib so that the report's colours follow the reader's light or dark theme, text stays
text, and a chart costs a few kB. A long or noisy series is shown as a running mean over its raw points, thinned to at
most 400 points, so the page stays small however long the run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

MAX_POINTS = 400


@dataclass(frozen=True)
class Series:
    """One line. x, y: equally long; NaN leaves a gap. lo, hi: a band (or error bars, if `points`) around it."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    lo: Sequence[float] | None = None
    hi: Sequence[float] | None = None
    points: bool = False


@dataclass
class Chart:
    """Geometry of one chart in a width x height view box; every number is rounded to 0.1."""

    title: str
    alt: str
    now: str
    width: int
    height: int
    note: str = ""
    x_label: str = "step"
    left: float = 46
    lines: list[dict] = field(default_factory=list)  # index, label, path, raw, band, marks
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    y_ticks: list[tuple[float, str]] = field(default_factory=list)
    rules: list[tuple[float, str]] = field(default_factory=list)  # horizontal lines: y, label


def line_chart(
    title: str,
    series: Sequence[Series],
    rules: Sequence[tuple[str, float]] = (),
    unit_interval: bool = False,
    wide: bool = False,
    x_label: str = "step",
    whole: bool = True,
) -> Chart | None:
    """A chart of the series, or None when no point is finite.

    rules: named horizontal lines (baselines).  unit_interval: the y axis is [0, 1] whatever the data.
    whole: x counts something, such as steps: its ticks are whole numbers, and long series are smoothed.
    """
    series = [s for s in series if np.isfinite(np.asarray(s.y, float)).any()]
    if not series:
        return None
    width, height = (480, 250) if wide else (340, 185)
    values = [v for s in series for ys in (s.y, s.lo, s.hi) if ys is not None for v in ys] + [v for _, v in rules]
    y_lo, y_hi = (0.0, 1.0) if unit_interval else _range(values)
    x_lo, x_hi = _range([x for s in series for x in s.x], pad=0)
    chart = Chart(title, "", "", width, height, x_label=x_label)
    right, top, bottom = width - 12, 12, height - 34

    def at_x(x: float) -> float:
        return round(chart.left + (x - x_lo) / (x_hi - x_lo) * (right - chart.left), 1)

    def at_y(y: float) -> float:
        return round(bottom - (min(max(y, y_lo), y_hi) - y_lo) / (y_hi - y_lo) * (bottom - top), 1)

    told = []
    for index, s in enumerate(series):
        x, y, lo, hi = (None if v is None else np.asarray(v, float) for v in (s.x, s.y, s.lo, s.hi))
        window = 1 if s.points or not whole or len(y) < 30 else 2 * (len(y) // 40) + 1
        mean = running_mean(y, window)
        known = mean[np.isfinite(mean)]
        told.append(f"{s.label} from {known[0]:.3g} to {known[-1]:.3g}")
        if len(series) == 1:
            chart.now = f"{known[0]:.3g} → {known[-1]:.3g}" if known.size > 1 else f"{known[0]:.3g}"
        line = {"index": index, "label": s.label, "marks": [], "band": "", "raw": ""}
        line["path"] = _path(x, mean, at_x, at_y)
        if window > 1:
            chart.note = f"mean of {window} steps"
            line["raw"] = _path(x, y, at_x, at_y)
        if s.points:
            for i in np.flatnonzero(np.isfinite(y)):
                bar = None if lo is None or not math.isfinite(lo[i]) else (at_y(lo[i]), at_y(hi[i]))
                tip = f"{f'{s.label}, ' if len(series) > 1 else ''}{x_label} {x[i]:g}: {y[i]:.3f}" + (
                    "" if bar is None else f" [{lo[i]:.3f}, {hi[i]:.3f}]"
                )
                line["marks"].append({"x": at_x(x[i]), "y": at_y(y[i]), "bar": bar, "tip": tip})
        elif lo is not None:
            line["band"] = _band(x, running_mean(lo, window), running_mean(hi, window), at_x, at_y)
        chart.lines.append(line)
    chart.alt = f"{title}, {x_label} {x_lo:g} to {x_hi:g}: {'; '.join(told)}"
    chart.x_ticks = [(at_x(v), f"{v:g}") for v in nice_ticks(x_lo, x_hi) if not whole or v == int(v)]
    chart.y_ticks = [(at_y(v), f"{v:.6g}") for v in nice_ticks(y_lo, y_hi)]
    chart.rules = [(at_y(v), f"{name} {v:.3g}") for name, v in rules if math.isfinite(v)]
    return chart


def nice_ticks(lo: float, hi: float, least: int = 3) -> list[float]:
    """Multiples within [lo, hi] of the largest 1, 2 or 5 times a power of ten that gives at least that many."""
    power = 10.0 ** math.ceil(math.log10(hi - lo))
    for step in (power * share for share in (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)):
        ticks = range(math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9) + 1)
        if len(ticks) >= least:
            break
    return [float(f"{i * step:.12g}") for i in ticks]


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` (odd) neighbours, shorter at the ends, NaN left out; NaN where all are."""
    known = np.isfinite(values)
    kernel = np.ones(min(window, 2 * len(values) - 1))
    half = len(kernel) // 2
    total = np.convolve(np.where(known, values, 0.0), kernel)[half : half + len(values)]
    count = np.convolve(known.astype(float), kernel)[half : half + len(values)]
    return np.divide(total, count, out=np.full(len(values), math.nan), where=count > 0.5)


def _range(values: Sequence[float], pad: float = 0.05) -> tuple[float, float]:
    known = [v for v in values if math.isfinite(v)]
    lo, hi = min(known), max(known)
    if hi - lo <= 1e-9 * max(1.0, abs(lo)):
        half = max(0.5, abs(lo) / 2) if pad == 0 else max(abs(lo) / 10, 1e-6)
        return lo - half, hi + half
    return lo - pad * (hi - lo), hi + pad * (hi - lo)


def _thin(length: int) -> np.ndarray:
    return np.unique(np.linspace(0, length - 1, min(length, MAX_POINTS)).astype(int))


def _path(x: np.ndarray, y: np.ndarray, at_x, at_y) -> str:
    parts, pen_down = [], False
    for i in _thin(len(y)):
        if math.isfinite(y[i]):
            parts.append(f"{'L' if pen_down else 'M'}{at_x(x[i])} {at_y(y[i])}")
        pen_down = math.isfinite(y[i])
    return "".join(parts)


def _band(x: np.ndarray, lo: np.ndarray, hi: np.ndarray, at_x, at_y) -> str:
    kept = [i for i in _thin(len(x)) if math.isfinite(lo[i]) and math.isfinite(hi[i])]
    upper = [f"{at_x(x[i])} {at_y(hi[i])}" for i in kept]
    lower = [f"{at_x(x[i])} {at_y(lo[i])}" for i in reversed(kept)]
    return f"M{'L'.join(upper + lower)}Z" if len(kept) > 1 else ""
