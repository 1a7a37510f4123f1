"""What each paper says its objective does, tested alone through the public recipes: a number, its interval, and a control.

    python -P benchmarks/mechanisms.py [--quick] [--output FOLDER]      writes results/mechanisms.json and mechanisms.svg

Toys, so a mechanism can show or fail in isolation: that it shows says nothing of a language model's scores. Everything is
float64 on one thread, from fixed seeds. Sizes and step sizes were found in trial runs, mostly so that the plain arm shows
what the paper complains of, which favours the paper; seeds were never chosen.

`Toy`: learners of exact problems, small enough to enumerate all completions. Intervals are 95 % percentile bootstraps of the
mean over learners (each has its own problem, weights and samples; arms share problems), or over blocks of groups; a
number that is computed without sampling has the interval [value, value]. `holds` is decided by rules in code, from the numbers:
true, false, or "partly" where a control takes away a part of the claim.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import io
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # `-P` leaves it out

from mechanism_baselines import (
    anchored,
    combinations_apart,
    median_against_outliers,
    normal_quantiles,
    rare_ones,
    virtual_rollout,
)
from mechanism_entries import QUICK, Budget, Panels
from mechanism_losses import falling_likelihood, mixed_variance, routes, stale_data
from mechanism_weights import answer_entropy, asymmetry, entropy_at_target, hidden_rewards, indistinct

from core.run.folder import RunFolder
from core.run.summary import git_revision

MECHANISMS: list[Callable[[Budget, Panels], list[dict]]] = [
    median_against_outliers, virtual_rollout, combinations_apart, stale_data, rare_ones, falling_likelihood,
    normal_quantiles, asymmetry, mixed_variance, entropy_at_target, answer_entropy, indistinct, routes,
    hidden_rewards, anchored,
]  # fmt: skip


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--quick", action="store_true", help="few learners and updates: shows that it runs, no more")
    parse.add_argument("--output", type=Path, default=Path("results"))
    options = parse.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    panels: Panels = {}
    found = []
    for mechanism in MECHANISMS:
        began = time.monotonic()
        found += mechanism(QUICK if options.quick else Budget(), panels)
        print(f"{mechanism.__name__}: {time.monotonic() - began:.0f} s", flush=True)
    result = {"mechanisms": found, "panels": panels}
    command = f"python -P benchmarks/mechanisms.py{' --quick' if options.quick else ''}"
    folder = RunFolder(options.output)
    folder.write_json("mechanisms.json", {**result, "command": command, "git": git_revision()})
    folder.write_bytes("mechanisms.svg", draw(panels))
    show(found)


def draw(panels: Panels) -> bytes:
    """The figure: a small plot for each mechanism that has a curve; bands are the 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    across = 3
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(12.5, 3.1 * down), layout="constrained")
    cells = figure.subplots(down, across, squeeze=False).flat
    for axes, (title, one) in zip(cells, panels.items(), strict=False):
        named = isinstance(one["x"][0], str)
        x = range(len(one["x"])) if named else one["x"]
        for i, (name, line) in enumerate(one["lines"].items()):
            dash = "--" if name.startswith("grpo") else "-"
            axes.plot(x, line["y"], dash, color=f"C{i}", label=name, linewidth=1.5, marker="o", markersize=2.5)
            axes.fill_between(x, line["low"], line["high"], color=f"C{i}", alpha=0.18, linewidth=0)
        if one["log"]:
            axes.set_xscale("log", base=2)
        if one["log"] or named:
            axes.set_xticks(x, list(map(str, one["x"])))
            axes.minorticks_off()
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(one["xlabel"], fontsize=9)
        axes.set_ylabel(one["ylabel"], fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.margins(y=0.15)
        axes.legend(fontsize=7, frameon=False)
    for axes in list(cells):
        axes.set_axis_off()
    picture = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "mechanisms"}):
        figure.savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue()


def show(found: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "claim", "value", "95 %", "holds")
    for one in found:
        low, high = one["ci95"]
        numbers = f"{one['value']:g}", f"{low:g} .. {high:g}"
        table.add_row(one["recipe"], one["claim"], *numbers, str(one["holds"]).lower())
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
