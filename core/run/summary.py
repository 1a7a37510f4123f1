"""What a run says at its end: summary.json, eval.json, the sample predictions of the report, and the last table."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.app import App, Completion, Row
from core.run import evaluate as ev
from core.run import media
from core.run.folder import RunFolder
from core.run.progress import Progress
from core.run.rivals import Compared, best_baseline, difference

SHOWN = 12  # sample predictions in the report


def evaluation_json(
    app: App, rows: Sequence[Row], result: ev.Evaluation, completions: Sequence[str], headline: str
) -> dict[str, Any]:
    """eval.json. completions: of the rows, as Actor.keep gives them."""
    metrics = {}
    weights = result.weights["scores"]
    for name, values in result.scores.items():
        mean, lo, hi = ev.interval(app, rows, values, weights[name])
        metrics[name] = {"mean": mean, "ci95": [lo, hi]}
    weighty = [name for name, values in result.scores.items() if not ev.unweighted(values, weights[name])]
    return {
        "metric": headline,
        "n": len(rows),
        "unscored": result.unscored,
        "metrics": metrics,
        "items": [
            {
                "id": row["id"],
                "completion": completion,
                "truncated": cut,
                "reasons": reasons,
                **{name: values[i] for name, values in result.scores.items()},
                **({"weights": {name: weights[name][i] for name in weighty}} if weighty else {}),
            }
            for i, (row, completion, cut, reasons) in enumerate(
                zip(rows, completions, result.truncated, result.reasons, strict=True)
            )
        ],
    }


def summarise(setup, data, folder: RunFolder, before, after, compared: Compared, task: str | None) -> dict[str, Any]:
    """summary.json: see the run folder in CONTRIBUTING.md."""
    app, config, rows, headline = setup.app, setup.config, data.test, setup.headline
    table: list[dict[str, Any]] = []

    def add(name: str, part: str, key: str, places: Sequence[int] = range(len(rows))) -> None:
        places = list(places)
        a, b = (getattr(one, part)[key][places] for one in (before, after))
        weights = before.weights[part][key][places], after.weights[part][key][places]
        diff, lo, hi = ev.change(app, [rows[i] for i in places], a, b, weights)
        means = {"before": ev.mean(a, weights[0]), "after": ev.mean(b, weights[1])}
        lower = {"better": "lower"} if part != "rewards" and app.better(key) == "lower" else {}
        table.append({"name": name, **means, "change": diff, "lo": lo, "hi": hi, **lower})

    for name in before.scores:
        add(name, "scores", name)
    for name in before.sampled:
        add(f"{name}, sampled", "sampled", name)
    for name in (name for name in before.rewards if setup.composite[name][0]):
        add(f"reward {name}", "rewards", name)
    parts = [app.part(row) if app.part else "" for row in rows]
    for name in sorted(set(parts) - {""}):
        chosen = [i for i, part in enumerate(parts) if part == name]
        add(f"{headline}: {name} ({len(chosen)} rows)", "scores", headline, chosen)
    steps = [line for line in folder.read_metrics() if "zero_spread" in line]
    if steps:
        edge = max(1, len(steps) // 10)
        first, last = (
            float(np.nanmean([line["zero_spread"] for line in part])) for part in (steps[:edge], steps[-edge:])
        )
        table.append(
            {
                "name": f"groups without spread (first and last {edge} steps)",
                "before": first,
                "after": last,
                "change": last - first,
                "lo": None,
                "hi": None,
            }
        )
    return {
        "app": app.name,
        "task": task,
        "recipe": setup.recipe.name,
        "seed": config.run.seed,
        "config": config.as_dict(),
        "git": git_revision(),
        "metric": headline,
        "better": app.better(headline),
        "before": before.mean(headline),
        "after": after.mean(headline),
        "n": len(rows),
        "n_clusters": len(set(ev.clusters(app, rows) or range(len(rows)))),
        "unscored": before.unscored + after.unscored,
        "ci95": [table[0]["lo"], table[0]["hi"]],
        "baselines": {
            name: ev.mean(graded.scores[headline], graded.weights[headline])
            for name, graded in compared.baselines.items()
        },
        "best_baseline": against_best(app, rows, compared, before, after),
        "table": table,
        **memory(),
    }


def against_best(app: App, rows: Sequence[Row], compared: Compared, before, after) -> dict[str, Any] | None:
    """How far the headline is from that of the best baseline, before and after; None without baselines."""
    if (best := best_baseline(app, compared.baselines)) is None:
        return None
    rival = compared.baselines[best[0]]
    (was, *ci_before), (now, *ci) = (difference(app, rows, own, rival) for own in (before, after))
    return {"name": best[0], "value": best[1], "before": was, "after": now, "ci95_before": ci_before, "ci95": ci}


def memory() -> dict[str, int]:
    """What this process took at most so far, in MB; on the GPU, if there is one."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)
    found = {"peak_rss_mb": round(resident)}
    if torch.cuda.is_available():
        found["peak_gpu_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return found


def git_revision() -> str | None:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def samples(
    app: App, folder: RunFolder, rows: Sequence[Row], before: ev.Evaluation, after: ev.Evaluation, headline: str
) -> list[dict[str, Any]]:
    """Held-out rows for the report: mended ones first (the largest gains, whichever way is better), then broken ones, then
    the rest.

    Each is {question, gold, before, after, and given if the app has it}, text or {"picture": file of the run}; with
    before_ok and after_ok, or with before_score and after_score if the metric is more than right or wrong.
    """
    sign = -1 if app.better(headline) == "lower" else 1
    a, b = sign * before.scores[headline], sign * after.scores[headline]
    graded = not (ev.yes_or_no(before.scores[headline]) and ev.yes_or_no(after.scores[headline]))
    right = 1 if sign > 0 else 0
    order = sorted(range(len(rows)), key=lambda i: ((0, a[i] - b[i]) if a[i] < b[i] else (1, b[i] - a[i]), i))
    mended = [i for i in order if a[i] < b[i]][: SHOWN // 2]
    broken = [i for i in order if a[i] > b[i]][: SHOWN // 4]
    shown = {*mended, *broken}
    rest = [i for i in range(len(rows)) if a[i] == b[i] or (graded and i not in shown)]

    def block(place: int, name: str, value: Completion) -> Any:
        if not media.is_picture(value):
            return value
        return {"picture": media.write_picture(folder, f"samples/report/{place:02d}-{name}.png", value)}

    found = []
    for place, i in enumerate([*mended, *broken, *rest][:SHOWN]):
        row = rows[i]
        values = {"given": app.given(row)} if app.given else {}
        values |= {"gold": app.show(row, app.gold(row))}
        values |= {"before": app.show(row, before.completions[i]), "after": app.show(row, after.completions[i])}
        if graded:
            verdict = {"before_score": float(sign * a[i]), "after_score": float(sign * b[i])}
        else:
            verdict = {"before_ok": bool(a[i] >= right), "after_ok": bool(b[i] >= right)}
        question = {"question": row.get("question", str(row["prompt"]))}
        found.append(question | {name: block(place, name, value) for name, value in values.items()} | verdict)
    return found


def final_table(progress: Progress, summary: dict[str, Any]) -> None:
    """The last lines of a run: before, after, change, 95 % interval, the baselines, and the first table of a verification."""
    rows = [
        (
            row["name"] + (" ↓" if row.get("better") == "lower" else ""),
            number(row["before"]),
            number(row["after"]),
            number(row["change"], "+"),
            span(row["lo"], row["hi"]),
        )
        for row in summary["table"]
    ]
    rows += [(f"free baseline: {name}", number(value), "", "", "") for name, value in summary["baselines"].items()]
    if best := summary["best_baseline"]:
        against = f"{summary['metric']} minus that of {best['name']}"
        rows.append((against, number(best["before"], "+"), number(best["after"], "+"), "", span(*best["ci95"])))
    size = f"{summary['n']} held-out rows in {summary['n_clusters']} clusters"
    title = f"{summary['app']}, {summary['recipe']}, seed {summary['seed']}: {size}"
    title += "; ↓ lower is better" if any(row.get("better") == "lower" for row in summary["table"]) else ""
    progress.table(title, ["", "before", "after", "change", "95 % interval"], rows)
    for table in summary["tables"][:1]:
        verification_table(progress, table)


def verification_table(progress: Progress, table: Mapping[str, Any]) -> None:
    """One of a verification, in the terminal."""
    cells = [
        [f"{v:,}" if isinstance(v, int) else v if isinstance(v, str) else number(v) for v in row]
        for row in table["rows"]
    ]
    progress.table(table["title"], table["columns"], cells)
    if table["note"]:
        progress.note(table["note"])


def number(value: float | None, sign: str = "") -> str:
    return "" if value is None or value != value else f"{value:{sign}.3f}"


def span(lo: float | None, hi: float | None) -> str:
    return "" if lo is None or lo != lo else f"[{number(lo, '+')}, {number(hi, '+')}]"
