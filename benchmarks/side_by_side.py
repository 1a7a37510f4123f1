"""Times two or more ways of doing the same work in alternation, and reports ratios of what was measured side by side.

Every round each arm does the same work once; the order is reversed from round to round, so that a machine that speeds up
or slows down favours nobody. A ratio is the median over rounds of ours / baseline within one round, with a bootstrap 95 %
interval over rounds. Arms whose answers differ are not compared: that raises.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

RESAMPLES = 10_000


class Disagreement(AssertionError):
    """Two arms answered differently, so their times are not those of the same work."""


def measure(arms: Mapping[str, Callable[[Any], Any]], works: Iterable[Any], warm: int = 1) -> dict[str, np.ndarray]:
    """Wall seconds {arm: (rounds,)} of each arm on each work; the first `warm` works are done but not counted.

    arms: {name: f(work) -> answer}. Raises Disagreement unless all answers to a work are equal.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn, work in enumerate(works):
        answers = {}
        for name in list(arms) if turn % 2 else reversed(arms):
            start = time.perf_counter()
            answers[name] = arms[name](work)
            seconds[name].append(time.perf_counter() - start)
        first = next(iter(arms))
        for name, answer in answers.items():
            if answer != answers[first]:
                raise Disagreement(f"round {turn}: {name} answers {answer}, {first} {answers[first]}"[:2000])
    return {name: np.array(values[warm:]) for name, values in seconds.items()}


def median(values: np.ndarray) -> tuple[float, list[float]]:
    """The median of (N,) numbers and its 95 % percentile bootstrap interval."""
    drawn = np.random.default_rng(0).choice(values, size=(RESAMPLES, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return _short(np.median(values)), [_short(low), _short(high)]


def case(name: str, ours: np.ndarray, baseline: np.ndarray | float, unit: str) -> dict[str, Any]:
    """One line of the results. ours, baseline: (rounds,) in `unit`, entry i of both from the same round."""
    ratio, interval = median(ours / baseline)
    return {
        "case": name,
        "ours": _short(np.median(ours)),
        "baseline": _short(np.median(baseline)),
        "ratio": ratio,
        "ci95": interval,
        "unit": unit,
        "pairs": len(ours),
    }


def write(folder: Path, name: str, cases: list[dict[str, Any]], command: str) -> Path:
    """Writes <folder>/<name>.json and prints its table; returns the path."""
    from core.run.summary import git_revision  # brings torch: a process that forks should not have it while it measures

    result = {
        "cases": cases,
        "machine": {
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": importlib.metadata.version("torch"),
            "sqlite": sqlite3.sqlite_version,
        },
        "command": command,
        "git": git_revision(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    _show(cases)
    return path


def _show(cases: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    added = any("added" in one for one in cases)
    table = Table("case", "ours", "baseline", "unit", "ours / baseline", *["added"] * added, "pairs")
    for one in cases:
        figures = [f"{one['ours']:g}", f"{one['baseline']:g}", one["unit"], _with_interval(one["ratio"], one["ci95"])]
        figures += [_with_interval(one["added"], one["added_ci95"])] if "added" in one else []
        table.add_row(one["case"], *figures, str(one["pairs"]))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _with_interval(value: float, interval: list[float]) -> str:
    return f"{value:g} [{interval[0]:g}, {interval[1]:g}]"


def _short(value: float) -> float:
    return float(f"{value:.4g}")
