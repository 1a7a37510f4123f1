"""What the runs of the arena say: paired statistics, the table, the forest plot.

Differences to the reference recipe are paired by seed, which fixes start and prompts. Intervals are Student's t: a bootstrap
over five seeds is much too narrow. They hold one at a time; `holm` is the verdict that holds for all recipes together.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

REFERENCE, CONTROL, GROUP = "grpo", "shuffled_advantages", 8  # recipe, control and group size of the main comparison

# -- statistics --------------------------------------------------------------------------------------------------------


def two_sided_p(t: float, df: int) -> float:
    """P(|T| >= t) of Student's t with `df` >= 1 degrees of freedom: the finite series of Abramowitz & Stegun 26.7.3-4."""
    theta = math.atan2(abs(t), math.sqrt(df))
    odd, square = df % 2, math.cos(theta) ** 2
    term, total = math.cos(theta) if odd else 1.0, 0.0
    for k in range(df // 2):
        total += term
        term *= square * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    inside = math.sin(theta) * total
    return max(0.0, 1 - (2 / math.pi * (theta + inside) if odd else inside))


def critical_t(p: float, df: int) -> float:
    """The t that |T| reaches with probability p in (0, 1)."""
    low, high = 0.0, 1.0
    while two_sided_p(high, df) > p:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, df) > p else (low, middle)
    return high


def estimate(values: Sequence[float]) -> dict[str, Any]:
    """Mean of 2 or more values, one a seed; 95 % t interval, standard deviation, two-sided p of a mean of 0."""
    mean, n = float(np.mean(values)), len(values)
    sd = float(np.std(values, ddof=1))
    error = sd / math.sqrt(n)
    half = critical_t(0.05, n - 1) * error
    p = two_sided_p(mean / error, n - 1) if error else float(mean == 0)
    return {"mean": mean, "ci95": [mean - half, mean + half], "sd": sd, "p": p}


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p values: below 0.05 for all at once, with a 5 % chance that any of them is wrong."""
    adjusted, least = [math.nan] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        least = max(least, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = least
    return adjusted


def detectable(sd: float, n: int) -> float:
    """The paired difference that n seeds find with 80 % power: (t.975 + t.80) sd / sqrt(n).

    An approximation of the noncentral t: the power is 77 % at n = 3, 79 % at n = 5 and 80 % from n = 10 on.
    """
    return (critical_t(0.05, n - 1) + critical_t(0.40, n - 1)) * sd / math.sqrt(n)


def verdict(mean: float, p: float) -> str:
    return ("better" if mean > 0 else "worse") if p < 0.05 else "tie"


# -- the summary -------------------------------------------------------------------------------------------------------

Runs = dict[int, dict[str, Any]]  # by seed


def end(run: dict) -> float:
    return run["points"][-1]["accuracy"]


def held_out(run: dict) -> float:
    return run["points"][-1]["held_out"]


def curve(run: dict) -> float:
    """Mean accuracy of the evaluations during training: speed counts."""
    return float(np.mean([point["accuracy"] for point in run["points"]]))


COMPARED = {"": end, "curve_": curve, "held_out_": held_out}


def summarise(results: Sequence[dict], refused: dict[str, str]) -> dict[str, Any]:
    """The figures of results/arena.json. refused: {recipe: why}."""

    def chosen(recipe: str = REFERENCE, group: int = GROUP, control: str = "none", rate: float = 1.0) -> Runs:
        wanted = {"recipe": recipe, "group": group, "control": control, "rate": rate}
        return {run["seed"]: run for run in results if wanted.items() <= run.items()}

    def against(runs: Runs, **others: Any) -> dict[str, Any]:
        return summary_of(runs) | differences(runs, chosen(**others))

    recipes = dict.fromkeys(run["recipe"] for run in results)
    lines = [
        {"recipe": recipe, "options": next(iter(chosen(recipe).values()))["options"], **against(chosen(recipe))}
        for recipe in recipes
    ]
    others = [line for line in lines if line["recipe"] != REFERENCE]
    for name in COMPARED:
        for line, p in zip(others, holm([line[f"{name}p"] for line in others]), strict=True):
            line |= {f"{name}holm_p": p, f"{name}holm": verdict(line[f"{name}diff"], p)}
    swept = [recipe for recipe in recipes if any(run["recipe"] == recipe and run["group"] != GROUP for run in results)]
    groups = sorted({run["group"] for run in results})
    rates = sorted({run["rate"] for run in results} - {1.0})
    untrained = {seed: run | {"points": [run["start"]], "rollouts": 0, "seconds": 0} for seed, run in chosen().items()}
    typical = {name: float(np.median([line[f"{name}sd"] for line in others] or [math.nan])) for name in COMPARED}
    seeds = sorted({5, 10, 20, len(untrained)})
    return {
        "recipes": lines + [{"recipe": recipe, "refused": why} for recipe, why in refused.items()],
        "small_groups": [
            {"recipe": recipe, "group": group} | against(chosen(recipe, group), group=group)
            for recipe in swept
            for group in groups
        ],
        "rates": [
            {"recipe": recipe, "rate": rate} | against(chosen(recipe, rate=rate), rate=rate)
            for recipe in recipes
            for rate in rates
        ],
        "controls": [
            {"name": "shuffled advantages"} | against(chosen(control=CONTROL)),
            {"name": "warm start, no training"} | against(untrained),
        ],
        "smallest_detectable": {
            f"{name}diff": {"median_sd": sd, "seeds": {str(n): detectable(sd, n) for n in seeds}}
            for name, sd in typical.items()
        },
        "false_alarms_expected": 0.05 * len(others),  # verdicts other than a tie, before Holm, were all recipes equal
        "runs": [one_line(run) for run in results],
    }


def summary_of(runs: Runs) -> dict[str, Any]:
    """Means over seeds; the interval of the end, and of the gain over the start."""

    def mean(value: Callable[[dict], float]) -> float:
        return float(np.mean([value(run) for run in runs.values()]))

    ends = estimate([end(run) for run in runs.values()])
    gain = estimate([end(run) - run["start"]["accuracy"] for run in runs.values()])
    return {
        "n": len(runs),
        "start": mean(lambda run: run["start"]["accuracy"]),
        "end": ends["mean"],
        "ci95": ends["ci95"],
        "gain": gain["mean"],
        "gain_ci95": gain["ci95"],
        "held_out": mean(held_out),
        "greedy": mean(lambda run: run["points"][-1]["greedy"]),
        "curve": mean(curve),
        "entropy": mean(lambda run: run["points"][-1]["entropy"]),
        "rollouts": mean(lambda run: run["rollouts"]),
        "seconds": mean(lambda run: run["seconds"]),
    }


def differences(runs: Runs, reference: Runs) -> dict[str, Any]:
    """Paired by seed, with their verdicts; nothing if the runs are the reference themselves."""
    if runs == reference:
        return {}
    line = {}
    for name, value in COMPARED.items():
        found = estimate([value(run) - value(reference[seed]) for seed, run in runs.items()])
        line |= {f"{name}diff": found["mean"], f"{name}diff_ci95": found["ci95"], f"{name}sd": found["sd"]}
        line |= {f"{name}p": found["p"], f"{name}verdict": verdict(found["mean"], found["p"])}
    return line


def one_line(run: dict) -> dict[str, Any]:
    """A run for the file of results; its accuracies to four digits."""
    return {
        **{name: run[name] for name in ("recipe", "seed", "group", "control", "rate", "rollouts", "git")},
        "start": round(run["start"]["accuracy"], 4),
        "points": [round(point["accuracy"], 4) for point in run["points"]],
        **{f"end_{name}": round(run["points"][-1][name], 4) for name in ("held_out", "greedy", "entropy")},
        "seconds": round(run["seconds"], 2),
        "cpu_seconds": round(run["cpu_seconds"], 2),
    }


# -- table and plot ----------------------------------------------------------------------------------------------------


def show(summary: dict[str, Any]) -> None:
    """Prints the table, best end first; the last columns are differences to the reference at other rates."""
    from rich.console import Console
    from rich.table import Table

    rates = sorted({line["rate"] for line in summary["rates"]})
    elsewhere = {(line["recipe"], line["rate"]): line for line in summary["rates"]}
    ran = sorted((line for line in summary["recipes"] if "refused" not in line), key=lambda line: -line["end"])
    figures = (
        "n",
        "end",
        "held out",
        "greedy",
        "curve",
        "end, paired",
        "",
        "curve, paired",
        "",
        "entropy",
        "rollouts",
        "s",
    )
    table = Table("", *figures, *[f"rate x {rate:g}" for rate in rates])
    for line in ran:
        others = [elsewhere[line["recipe"], rate] for rate in rates]
        table.add_row(
            line["recipe"],
            *_cells(line),
            *[f"{one['diff']:+.3f}" if "diff" in one else f"{one['end']:.3f}" for one in others],
        )
    table.add_section()
    for line in summary["controls"]:
        table.add_row(line["name"], *_cells(line))
    table.add_section()
    for line in summary["small_groups"]:
        table.add_row(f"{line['recipe']}, G = {line['group']}", *_cells(line))
    console = Console(width=None if sys.stdout.isatty() else 190)
    console.print(table)
    for line in summary["recipes"]:
        if "refused" in line:
            console.print(line["refused"], markup=False)
    least = summary["smallest_detectable"]["diff"]["seeds"].items()
    console.print(
        f"paired: to {REFERENCE} on the same seeds, 95 % interval. *: holds for all recipes together (Holm); without a star, "
        f"{summary['false_alarms_expected']:.1f} verdicts would not be a tie if all were equal. Found with 80 % power: "
        f"{', '.join(f'{value:.3f} with {n} seeds' for n, value in least)}. {summary['cpu_seconds']:.0f} CPU seconds.",
        markup=False,
    )


def _cells(line: dict[str, Any]) -> list[str]:
    cells = [str(line["n"]), *[f"{line[name]:.3f}" for name in ("end", "held_out", "greedy", "curve")]]
    for name in ("", "curve_"):
        if "diff" in line:
            low, high = line[f"{name}diff_ci95"]
            star = "*" if line.get(f"{name}holm", "tie") != "tie" else ""
            cells += [f"{line[f'{name}diff']:+.3f} [{low:+.3f}, {high:+.3f}]", line[f"{name}verdict"] + star]
        else:
            cells += ["", ""]
    return [*cells, f"{line['entropy']:.2f}", f"{line['rollouts']:.0f}", f"{line['seconds']:.1f}"]


def draw(summary: dict[str, Any], path: Path) -> None:
    """Differences to the reference with their intervals, sorted; and accuracy against group size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    lines = sorted((line for line in summary["recipes"] if "diff" in line), key=lambda line: -line["diff"])
    rows = [(line["recipe"], line) for line in lines] + [(line["name"], line) for line in summary["controls"]]
    low = min([line["diff_ci95"][0] for line in lines], default=-0.01)
    high = max([line["diff_ci95"][1] for line in lines], default=0.01)
    room = 0.05 * (high - low)
    figure = Figure(figsize=(11, 0.25 * len(rows) + 1.8), layout="constrained")
    forest, sweep = figure.subplots(1, 2, width_ratios=[2, 1])
    for y, (_, line) in enumerate(rows):
        colour = "#8a8a8a" if "name" in line else "#1c6ea4" if line["verdict"] != "tie" else "#8fb8d6"
        if line["diff"] < low - room:  # in words, so that the recipes keep their scale
            forest.text(low - room, y, f"\u2190 {line['diff']:+.2f}", color=colour, va="center", fontsize=8)
            continue
        forest.plot(line["diff_ci95"], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
        forest.plot(line["diff"], y, "*" if line.get("holm", "tie") != "tie" else "o", color=colour, markersize=6)
        forest.plot(line["curve_diff"], y, "|", color="black", markersize=7)
    forest.axvline(0, color="black", linewidth=0.8)
    forest.set_xlim(low - room, high + room)
    forest.set_yticks(range(len(rows)), [name for name, _ in rows])
    forest.set_ylim(len(rows) - 0.3, -0.7)
    reference = next(line for line in summary["recipes"] if line["recipe"] == REFERENCE)
    forest.set_xlabel(
        f"accuracy at the end minus {REFERENCE}'s ({reference['end']:.3f}), paired over {reference['n']} seeds, 95 % interval\n"
        "dark: excludes 0; star: Holm over all recipes; black bar: mean over the curve"
    )
    for k, recipe in enumerate(dict.fromkeys(line["recipe"] for line in summary["small_groups"])):
        points = [line for line in summary["small_groups"] if line["recipe"] == recipe]
        ends = np.array([line["end"] for line in points])
        spread = np.abs(np.array([line["ci95"] for line in points]).T - ends)
        beside = [line["group"] * 1.04**k for line in points]
        sweep.errorbar(beside, ends, spread, marker="o", capsize=3, label=recipe)
    sizes = sorted({line["group"] for line in summary["small_groups"]})
    sweep.set_xscale("log", base=2)
    sweep.set_xticks(sizes, [str(size) for size in sizes])
    sweep.set_xlabel("group size, at equal rollouts trained on")
    sweep.set_ylabel("accuracy at the end (optimum 1)")
    sweep.legend(frameon=False)
    for axes, grid in ((forest, "x"), (sweep, "y")):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis=grid, alpha=0.3)
    forest.spines["left"].set_visible(False)
    forest.tick_params(axis="y", length=0)
    with matplotlib.rc_context({"svg.hashsalt": "arena"}):  # the same figure has the same bytes
        figure.savefig(path, metadata={"Date": None})
