"""report.html: one self-contained page on a run, for somebody who was not there.

No script, nothing fetched (a Content-Security-Policy says so to the browser), charts as inline SVG, light and dark.
Completions are hostile to the reader too: Jinja2 escapes every value, `clean_text` takes control characters out of
it, and long texts are cut, so that the page stays valid and small whatever the model wrote.

Pictures are data URIs of bounded size (core/run/media.py), and only of PNG files that the run wrote below its samples/.

Not covered: what a text says. A completion can still lie to its reader in plain letters.
"""

import math
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from core.run import media
from core.run.charts import Chart, Series, line_chart
from core.run.folder import RunFolder
from core.run.progress import clean_text, duration
from core.train.health import Health

VALUE_LIMIT = 20_000  # characters of any value on the page; model text is cut much earlier
TEXT_LIMIT = 3_000
LATE_STEPS = 10  # at most this many of the last logged steps give the shown groups
SHOWN_ROLLOUTS = 8
SHOWN_SAMPLES = 30
MOST_RULES = 4  # baselines drawn across the chart of the metric
DIAGNOSTICS = (
    ("zero_spread", "Groups without spread", True),
    ("truncated", "Truncated completions", True),
    ("unscored", "Unscored rollouts", True),
    ("completion_length", "Completion length", False),
    ("entropy", "Entropy", False),
    ("kl", "KL to the reference", False),
    ("loss", "Loss", False),
    ("grad_norm", "Gradient norm", False),
    ("step_s", "Seconds a step", False),
)


def write_report(folder: RunFolder | str | os.PathLike, summary: Mapping[str, Any], extra: Mapping[str, Any]) -> Path:
    """Write report.html of a run, finished or not, and return its path.

    summary: as in summary.json; every field may be missing.
    extra, all optional: `table` [{name, before, after, change, lo, hi}] the other metrics; `health` as Health.block()
    gives it (otherwise replayed from metrics.jsonl with `updates_per_batch`, default 1); `warmup` [{step, loss,
    metric}]; `batch` the derived batch line; `command`; `plots` of the verification, fields as in core.app.Plot;
    `samples` [{question, gold, before, after, given, before_ok, after_ok}], see core.run.summary.samples.
    """
    from jinja2 import Environment
    from markupsafe import Markup

    run = folder if isinstance(folder, RunFolder) else RunFolder(folder)
    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda v: v if not isinstance(v, str) or isinstance(v, Markup) else clean_text(v, VALUE_LIMIT),
    )
    environment.filters |= {
        "num": number,
        "signed": lambda v: number(v, sign="+"),
        "interval": interval,
        "cut": lambda text: clean_text(text, TEXT_LIMIT),
        "duration": duration,
        "markup": Markup,
    }
    template = environment.from_string((files("core.run") / "report.html").read_text("utf-8"))
    lines = run.read_metrics()
    config_file = run.path / "config.yaml"
    page = template.render(
        summary=summary,
        extra=extra,
        rows=_result_rows(summary, extra),
        best=_best_baseline(summary),
        plots=_drawn(*map(_plot, extra.get("plots") or [])),
        headline=_drawn(_metric_chart(lines, summary), _reward_chart(lines, "reward", "reward_std", "Reward")),
        components=_component_charts(lines),
        diagnostics=_drawn(
            *(line_chart(title, [_series(lines, key)], unit_interval=unit) for key, title, unit in DIAGNOSTICS)
        ),
        warmup=_warmup_charts(extra.get("warmup") or []),
        health=extra["health"] if "health" in extra else _replayed_health(lines, summary, extra),
        groups=_shown_groups(run),
        samples=[_sample(run, sample) for sample in (extra.get("samples") or [])[:SHOWN_SAMPLES]],
        steps=max((line["step"] for line in lines), default=0),
        config=config_file.read_text("utf-8") if config_file.exists() else "",
    )
    return run.write_text("report.html", page)


def number(value: Any, sign: str = "") -> str:
    """A number as the page shows it; a dash for None and NaN; other values as text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, int) and not sign:
        return f"{value:,}"
    if isinstance(value, int | float):
        return f"{value:{sign}.3f}" if abs(value) < 1000 else f"{value:{sign},.0f}"
    return clean_text(value, 200)


def interval(row: Mapping[str, Any]) -> str:
    if not (_known(row["lo"]) and _known(row["hi"])):
        return "–"
    return f"[{number(row['lo'], '+')}, {number(row['hi'], '+')}]"


# -------------------------------------------------------------------- result


def _result_rows(summary: Mapping, extra: Mapping) -> list[dict]:
    """Rows of the before/after table, the headline metric first, each with a verdict on its interval."""
    rows = []
    if _known(summary.get("before")) or _known(summary.get("after")):
        before, after = summary.get("before"), summary.get("after")
        lo, hi = summary.get("ci95") or (None, None)
        change = after - before if _known(before) and _known(after) else None
        name = summary.get("metric", "metric")
        better = summary.get("better")
        rows.append(
            {"name": name, "before": before, "after": after, "change": change, "lo": lo, "hi": hi, "better": better}
        )
    columns = ("name", "before", "after", "change", "lo", "hi", "better")
    rows += [
        {k: row.get(k) for k in columns}
        for row in extra.get("table") or []
        if not rows or row["name"] != rows[0]["name"]
    ]
    for i, row in enumerate(rows):
        row["verdict"] = "" if i else _verdict(summary, row["lo"], row["hi"])
    return rows


def _verdict(summary: Mapping, lo: Any, hi: Any) -> str:
    """Of an interval of a difference in the headline: good, bad or open; empty where there is none."""
    sign = -1 if summary.get("better") == "lower" else 1
    bounds = sorted(sign * b for b in (lo, hi) if _known(b))
    return "" if len(bounds) < 2 else "good" if bounds[0] > 0 else "bad" if bounds[1] < 0 else "open"


def _best_baseline(summary: Mapping) -> dict[str, Any] | None:
    best = summary.get("best_baseline")
    if not best:
        return None
    lo, hi = best["ci95"]
    return {**best, "lo": lo, "hi": hi, "verdict": _verdict(summary, lo, hi)}


def _replayed_health(lines: Sequence[Mapping], summary: Mapping, extra: Mapping) -> list:
    health = Health(summary.get("metric"), summary.get("better", "higher"), extra.get("updates_per_batch", 1))
    for line in lines:
        health.update(line["step"], line)
    return health.block()


# -------------------------------------------------------------------- charts


def _series(lines: Sequence[Mapping], name: str, label: str = "", **more: Any) -> Series:
    kept = [line for line in lines if isinstance(line.get(name), int | float)]
    bounds = {side: [line.get(key, math.nan) for line in kept] for side, key in more.pop("bounds", {}).items()}
    return Series(label or name, [line["step"] for line in kept], [line[name] for line in kept], **bounds, **more)


def _metric_chart(lines: Sequence[Mapping], summary: Mapping) -> Chart | None:
    metric = summary.get("metric") or next((k[5:] for line in lines for k in line if k.startswith("eval/")), "metric")
    key = f"eval/{metric}"
    series = _series(lines, key, metric, points=True, bounds={"lo": f"{key}/lo", "hi": f"{key}/hi"})
    rules = [(name, value) for name, value in (summary.get("baselines") or {}).items() if _known(value)]
    if len(rules) > MOST_RULES:  # their names would cover each other: the best one
        rules = [(min if summary.get("better") == "lower" else max)(rules, key=lambda rule: rule[1])]
    return line_chart(f"{metric}, held out", [series], rules, wide=True)


def _reward_chart(lines: Sequence[Mapping], mean: str, std: str, title: str, unit: bool = False) -> Chart | None:
    series = _series(lines, mean, title)
    spread = [line.get(std, math.nan) for line in lines if isinstance(line.get(mean), int | float)]
    lo, hi = ([y + side * s for y, s in zip(series.y, spread, strict=True)] for side in (-1, 1))
    chart = line_chart(title, [Series(title, series.x, series.y, lo, hi)], unit_interval=unit, wide=not unit)
    if chart and any(map(math.isfinite, spread)):
        chart.note = "; ".join(part for part in (chart.note, "band ±1 std") if part)
    return chart


def _component_charts(lines: Sequence[Mapping]) -> list[Chart]:
    """One chart a component, [0, 1] unless the component leaves it."""
    keys = dict.fromkeys(k for line in lines for k in line if k.startswith("rewards/") and k.endswith("/mean"))
    charts = []
    for key in keys:
        name = key[len("rewards/") : -len("/mean")]
        inside = all(0 <= line[key] <= 1 for line in lines if _known(line.get(key)))
        charts.append(_reward_chart(lines, key, f"rewards/{name}/std", name, unit=inside))
    return _drawn(*charts)


def _warmup_charts(curve: Sequence[Mapping]) -> list[Chart]:
    metric = _series(curve, "metric", points=True)
    return _drawn(line_chart("Loss", [_series(curve, "loss")]), line_chart("Metric, held out", [metric]))


def _plot(plot: Mapping[str, Any]) -> Chart | None:
    """One of the verification."""
    lines = [
        Series(label, *map(_numbers, line), points=len(line[0]) == 1)  # a line of one point would not be seen
        for label, line in plot["lines"].items()
    ]
    chart = line_chart(
        plot["title"], lines, unit_interval=plot["unit"], wide=True, x_label=plot["x_label"], whole=False
    )
    if chart:
        chart.note = plot["note"]
    return chart


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _drawn(*charts: Chart | None) -> list[Chart]:
    return [chart for chart in charts if chart is not None]


# -------------------------------------------------------------------- rollouts


def _sample(run: RunFolder, sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample with its pictures in place of the names of their files."""
    return {
        name: media.shown(run, value.get("picture")) or str(value) if isinstance(value, Mapping) else value
        for name, value in sample.items()
    }


def _shown_groups(run: RunFolder) -> list[dict]:
    """Up to two best, most divided and worst groups of the last tenth of the steps, rollouts by reward.

    Where completions were kept of some rollouts only (pictures), of these groups, and these rollouts.
    """
    parts = len(list((run.path / "rollouts.parquet").glob("step-*.parquet")))
    table = run.read_rollouts(last=min(LATE_STEPS, max(1, math.ceil(parts / 10))))
    if table is None or table.num_rows == 0 or not {"prompt_id", "reward"} <= set(table.column_names):
        return []
    members: dict[tuple, list[int]] = {}
    for i, key in enumerate(zip(table["step"].to_pylist(), table["prompt_id"].to_pylist(), strict=True)):
        members.setdefault(key, []).append(i)
    kept = [True] * table.num_rows
    if "completion" in table.column_names and table["completion"].null_count < table.num_rows:
        kept = table["completion"].is_valid().to_pylist()
        members = {key: rows for key, rows in members.items() if any(kept[i] for i in rows)}
    rewards = table["reward"].to_numpy()
    judged = {key: rewards[rows][np.isfinite(rewards[rows])] for key, rows in members.items()}
    scored = [key for key in members if judged[key].size]
    orders = {
        "best": sorted(scored, key=lambda key: -judged[key].mean()),
        "most divided": sorted((k for k in scored if np.ptp(judged[k]) > 0), key=lambda key: -judged[key].std()),
        "worst": sorted(scored, key=lambda key: judged[key].mean()),
    }
    shown, used = [], set()
    for kind, order in orders.items():
        fresh = [key for key in order if key[1] not in used]
        for key in list({key[1]: key for key in reversed(fresh)}.values())[::-1][:2]:
            used.add(key[1])
            rows = sorted(members[key], key=lambda i: -np.nan_to_num(rewards[i], nan=-math.inf))
            first = [i for i in rows if kept[i]][:SHOWN_ROLLOUTS]
            rollouts = [_rollout(run, row) for row in table.take(first).to_pylist()]
            shown.append(
                {
                    "kind": kind,
                    "step": key[0],
                    "prompt_id": key[1],
                    "prompt": table["prompt"][rows[0]].as_py() if "prompt" in table.column_names else "",
                    "mean": float(judged[key].mean()),
                    "size": len(rows),
                    "rollouts": rollouts,
                    "pictures": any(isinstance(rollout["completion"], media.Shown) for rollout in rollouts),
                }
            )
    return shown


def _rollout(run: RunFolder, row: Mapping[str, Any]) -> dict[str, Any]:
    names = [name[len("reward/") :] for name in row if name.startswith("reward/")]
    completion = row.get("completion") or ""
    return {
        "completion": media.shown(run, completion) or completion,
        "reward": row["reward"],
        "advantage": row.get("advantage"),
        "dropped": row.get("keep") == 0,
        "parts": [{"name": n, "value": row[f"reward/{n}"], "reason": row.get(f"reason/{n}") or ""} for n in names],
    }


def _known(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
