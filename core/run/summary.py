"""What a run says at its end: summary.json, eval.json, the sample predictions of the report, and the last table."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.app import App, Completion, Row
from core.run import evaluate as ev
from core.run import media
from core.run.folder import RunFolder
from core.run.progress import Progress

SHOWN = 12  # sample predictions in the report


def mean(values: np.ndarray) -> float:
    """Of what could be judged; NaN if nothing could."""
    return float("nan") if np.isnan(values).all() else float(np.nanmean(values))


def evaluation_json(
    app: App, rows: Sequence[Row], result: ev.Evaluation, completions: Sequence[str], headline: str
) -> dict[str, Any]:
    """eval.json. completions: of the rows, as Actor.keep gives them."""
    metrics = {}
    for name, values in result.scores.items():
        mean, lo, hi = ev.interval(app, rows, values)
        metrics[name] = {"mean": mean, "ci95": [lo, hi]}
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
            }
            for i, (row, completion, cut, reasons) in enumerate(
                zip(rows, completions, result.truncated, result.reasons, strict=True)
            )
        ],
    }


def summarise(setup, data, folder: RunFolder, before, after, judge, task: str | None) -> dict[str, Any]:
    """summary.json: see the run folder in CONTRIBUTING.md."""
    app, config, rows, headline = setup.app, setup.config, data.test, setup.headline
    table: list[dict[str, Any]] = []

    def add(name: str, a: np.ndarray, b: np.ndarray, items: Sequence[Row] = rows) -> None:
        diff, lo, hi = ev.change(app, items, a, b)
        table.append(
            {
                "name": name,
                "before": mean(a),
                "after": mean(b),
                "change": diff,
                "lo": lo,
                "hi": hi,
            }
        )

    for name in before.scores:
        add(name, before.scores[name], after.scores[name])
    for name in before.sampled:
        add(f"{name}, sampled", before.sampled[name], after.sampled[name])
    for name in (name for name in before.rewards if setup.composite[name][0]):
        add(f"reward {name}", before.rewards[name], after.rewards[name])
    parts = [app.part(row) if app.part else "" for row in rows]
    for name in sorted(set(parts) - {""}):
        chosen = [i for i, part in enumerate(parts) if part == name]
        add(
            f"{headline}: {name} ({len(chosen)} rows)",
            before.scores[headline][chosen],
            after.scores[headline][chosen],
            [rows[i] for i in chosen],
        )
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
    baselines = {}
    for name, baseline in app.baselines.items():
        scores, _ = ev.grade(judge, rows, baseline(data.train, rows))
        baselines[name] = float(np.nanmean(scores[headline]))
    _, lo, hi = ev.change(app, rows, before.scores[headline], after.scores[headline])
    return {
        "app": app.name,
        "task": task,
        "recipe": setup.recipe.name,
        "seed": config.run.seed,
        "config": config.as_dict(),
        "git": git_revision(),
        "metric": headline,
        "better": "higher",
        "before": before.mean(headline),
        "after": after.mean(headline),
        "n": len(rows),
        "n_clusters": len(set(ev.clusters(app, rows) or range(len(rows)))),
        "unscored": before.unscored + after.unscored,
        "ci95": [lo, hi],
        "baselines": baselines,
        "table": table,
        **memory(),
    }


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
    """Held-out rows for the report: mended ones first (the largest gains), then broken ones, then the rest.

    Each is {question, gold, before, after, and given if the app has it}, text or {"picture": file of the run}; with
    before_ok and after_ok, or with before_score and after_score if the metric is more than right or wrong.
    """
    a, b = before.scores[headline], after.scores[headline]
    graded = not (ev.yes_or_no(a) and ev.yes_or_no(b))
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
            verdict = {"before_score": float(a[i]), "after_score": float(b[i])}
        else:
            verdict = {"before_ok": bool(a[i] >= 1), "after_ok": bool(b[i] >= 1)}
        question = {"question": row.get("question", str(row["prompt"]))}
        found.append(question | {name: block(place, name, value) for name, value in values.items()} | verdict)
    return found


def final_table(progress: Progress, summary: dict[str, Any]) -> None:
    """The last lines of a run: before, after, change, 95 % interval, and the free baselines."""
    show = lambda v, sign="": "" if v is None or v != v else f"{v:{sign}.3f}"  # noqa: E731
    rows = [
        (
            row["name"],
            show(row["before"]),
            show(row["after"]),
            show(row["change"], "+"),
            f"[{show(row['lo'], '+')}, {show(row['hi'], '+')}]" if row["lo"] is not None else "",
        )
        for row in summary["table"]
    ]
    rows += [(f"free baseline: {name}", show(value), "", "", "") for name, value in summary["baselines"].items()]
    size = f"{summary['n']} held-out rows in {summary['n_clusters']} clusters"
    title = f"{summary['app']}, {summary['recipe']}, seed {summary['seed']}: {size}"
    progress.table(title, ["", "before", "after", "change", "95 % interval"], rows)
