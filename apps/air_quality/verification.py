"""What a run says of held-out forecasts beside its metrics: tables and plots of every arm, from the counts of counts.py.

Arms are the policies ("before" and "after", or "model") and the baselines. Intervals and breakdowns are of the policies and of
the baseline of least expected cost, whichever that is. Numbers that do not exist are shown as nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from apps.air_quality.counts import (
    COMPARED,
    RATIOS,
    RESAMPLES,
    Interval,
    Reduced,
    Task,
    compare,
    economic_value,
    measures,
    reliability,
    roc,
    roc_area,
)
from core.app import Plot, Row, Table
from rewards.forecast.events import ratio

Arms = Mapping[str, Reduced]

POLICIES = ("before", "after", "model")  # arms that are no baselines
LABELS = {"false alarm rate": "false alarm rate FP/(FP+TN)", "false alarm ratio": "false alarm ratio FP/(TP+FP)"}
MAIN = (
    *("expected cost", "false alarm rate", "false alarm ratio", "POD", "CSI", "F1", "frequency bias", "RMSE", "CRPS"),
    "class accuracy",
)
FURTHER = (
    *("cost, this variable", "POD, top class", "false alarm rate, top class", "mean error", "Brier score", "ROC area"),
    *("events", "cases"),
)
GROUPED = (*MAIN[:-1], "events", "cases")
SHORT = 4  # leads that a table shows before it goes on day by day; the plots show all


def headline(rows: Sequence[Row], arms: Arms) -> dict[str, str]:
    """{arm: how it is called} of the policies and of the baseline of least expected cost."""
    task = Task.of(rows)
    costs = {name: _measured(arm, 0, task)["expected cost"] for name, arm in arms.items() if name not in POLICIES}
    best = {name: f"{name} (best baseline)" for name in (min(costs, key=costs.__getitem__),)} if costs else {}
    return {name: name for name in POLICIES if name in arms} | best


def tables(rows: Sequence[Row], arms: Arms) -> list[Table]:
    """Every arm, for each variable; intervals of the headline arms and of their differences; these arms by lead, season,
    region and observed class."""
    task, shown = Task.of(rows), headline(rows, arms)
    found = []
    for variable in range(len(task.variables)):
        measured = {name: _measured(arm, variable, task) for name, arm in arms.items()}
        found.append(_arms_table(f"{task.event(variable)}, every arm", measured, MAIN, _note(rows, task, measured)))
        found.append(_arms_table(f"{task.event(variable)}, every arm, further", measured, FURTHER))
    return [*found, _interval_table(rows, arms, shown, task), *_breakdowns(rows, arms, shown, task)]


def _measured(arm: Reduced, variable: int, task: Task) -> dict[str, np.ndarray]:
    """Of all rows and leads."""
    found = measures(arm.confusion.sum((0, 1)), arm.sums.sum((0, 1)), variable, task)
    return found | {"ROC area": roc_area(arm.chances[:, variable].sum(0))}


def _note(rows: Sequence[Row], task: Task, measured: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    names = [task.called(variable) for variable in range(len(task.weights))]
    weights = ", ".join(f"{name} {weight:g}" for name, weight in zip(names, task.weights, strict=True))
    alike = len({int(found["cases"]) for found in measured.values()}) == 1
    return (
        f"{len(rows)} initial times, all leads. Weights of a case in the expected cost: {weights}. RMSE and CRPS in ug m-3; "
        f"frequency bias is alerts announced / observed.{'' if alike else ' Arms differ in their cases: do not compare them.'}"
    )


def _arms_table(title: str, measured: Mapping[str, Mapping], keys: Sequence[str], note: str = "") -> Table:
    lines = tuple((name, *(_cell(found[key]) for key in keys)) for name, found in measured.items())
    return Table(title, ("", *(LABELS.get(key, key) for key in keys)), lines, note)


def _interval_table(rows: Sequence[Row], arms: Arms, shown: Mapping[str, str], task: Task) -> Table:
    policies = [name for name in shown if name in POLICIES]
    pairs = [("after", "before")] if {"after", "before"} <= set(policies) else []
    pairs += [(policies[-1], name) for name in shown if name not in POLICIES and policies]
    values, differences = compare(rows, {name: arms[name] for name in shown}, pairs)
    columns = ("", *shown.values(), *(f"{a} - {shown[b]}" for a, b in pairs))
    lines = tuple(
        (LABELS.get(key, key), *(_told(of[key]) for of in (*values.values(), *differences.values())))
        for key in COMPARED
    )
    note = (
        f"{RESAMPLES} resamples of whole weeks; differences are paired. The first ROC is that of {next(iter(shown))}."
    )
    return Table(f"{task.event(0)}, 95 % intervals by week", columns, lines, note)


def _breakdowns(rows: Sequence[Row], arms: Arms, shown: Mapping[str, str], task: Task) -> list[Table]:
    def table(title: str, groups: Mapping[str, Callable[[Reduced], tuple[np.ndarray, np.ndarray]]]) -> Table:
        lines = []
        for group, pooled in groups.items():
            for name, called in shown.items():
                found = measures(*pooled(arms[name]), 0, task)
                lines.append((group, called, *(_cell(found[key]) for key in GROUPED)))
        columns = ("", "arm", *(LABELS.get(key, key) for key in GROUPED))
        return Table(f"{task.event(0)}, by {title}", columns, tuple(lines))

    def of_lead(i: int):
        return lambda arm: (arm.confusion[:, i].sum(0), arm.sums[:, i].sum(0))

    def of_season(name: str):
        which = [row["season"] == name for row in rows]
        return lambda arm: (arm.confusion[which].sum((0, 1)), arm.sums[which].sum((0, 1)))

    def of_region(i: int):
        return lambda arm: (arm.regional[:, i].sum(0), arm.regional_sums[:, i].sum(0))

    hours = _hours(arms, task)
    leads = {f"{hour:g} h": of_lead(i) for i, hour in enumerate(hours) if i < SHORT or hour % 24 == 0}
    seasons = {name: of_season(name) for name in dict.fromkeys(row["season"] for row in rows)}
    regions = {name: of_region(i) for i, name in enumerate(task.regions.values())}
    by_class = _class_table({called: arms[name] for name, called in shown.items()}, task)
    by_group = [
        table(name, groups) for name, groups in (("lead", leads), ("season", seasons), ("region", regions)) if groups
    ]
    return [*by_group, by_class]


def _class_table(arms: Arms, task: Task) -> Table:
    lines = []
    for k, observed in enumerate(task.classes):
        for name, arm in arms.items():
            announced, sums = arm.confusion[:, :, 0, k].sum((0, 1)), arm.sums[:, :, 0, k].sum((0, 1))
            cases = announced.sum()
            shares = ratio([announced @ task.costs[k], announced[k], announced[task.alert :].sum(), *sums[:3]], cases)
            shares[4] = np.sqrt(shares[4])
            lines.append((observed, name, *map(_cell, shares), _cell(cases)))
    columns = ("observed", "arm", "cost", "announced exactly", "alerted", "mean error", "RMSE", "CRPS", "cases")
    return Table(f"{task.called(0)}, by observed class", columns, tuple(lines))


def plots(rows: Sequence[Row], arms: Arms) -> list[Plot]:
    """ROC, reliability and relative economic value of the first variable's alerts; cost, false alarm rate and POD by lead."""
    task, shown = Task.of(rows), headline(rows, arms)
    event = task.event(0)
    total = {name: _measured(arm, 0, task) for name, arm in arms.items()}
    chances = {name: arm.chances[:, 0].sum(0) for name, arm in arms.items()}
    graded = [name for name in shown if chances[name][1:-1].any()]  # those with probabilities other than 0 and 1

    lines = {f"{shown[name]}, probabilities": _line(*roc(chances[name])) for name in graded}
    lines |= {name: _line(found["false alarm rate"], found["POD"]) for name, found in total.items()}
    note = "Lines: POD of alerts by probability. Points: POD of what each arm announced."
    made = [Plot(f"ROC, {event}", lines, "false alarm rate FP/(FP+TN)", note, unit=True)]

    lines = {shown[name]: _line(*reliability(chances[name], arms[name].chance_sums[:, 0].sum(0))) for name in graded}
    note = "How often the event came, by the probability that it was given."
    lines["perfect"] = [0.0, 1.0], [0.0, 1.0]
    made.append(Plot(f"Reliability, {event}", lines, "forecast probability", note, unit=True))

    lines = {}
    for name, called in shown.items():
        found, base = total[name], float(ratio(total[name]["events"], total[name]["cases"]))
        lines[called] = _value_line(economic_value(found["false alarm rate"], found["POD"], base))
        if name in graded:
            best = economic_value(*roc(chances[name]), base).max(axis=1)
            lines[f"{called}, best threshold"] = _value_line(best)
    note = "1: as good as knowing; 0: as the base rate alone. Not drawn below 0."
    made.append(
        Plot(f"Relative economic value, {event}", lines, "cost of an alert / loss it prevents", note, unit=True)
    )

    hours = _hours(arms, task)
    by_lead = {
        called: measures(arms[name].confusion.sum(0), arms[name].sums.sum(0), 0, task) for name, called in shown.items()
    }
    for key in ("expected cost", "false alarm rate", "POD"):
        title = f"{LABELS.get(key, key)} by lead{'' if key == 'expected cost' else f', {event}'}"
        made.append(Plot(title, {name: _line(hours, of[key]) for name, of in by_lead.items()}, "hours ahead"))
    known = [
        replace(plot, lines={name: line for name, line in plot.lines.items() if np.isfinite(line[1]).any()})
        for plot in made
    ]
    return [plot for plot in known if plot.lines]


def _hours(arms: Arms, task: Task) -> list[float]:
    leads = next(iter(arms.values())).confusion.shape[1]
    return [float((i + 1) * task.step_h) for i in range(leads)]


def _line(x: np.ndarray | Sequence[float], y: np.ndarray) -> tuple[list[float], list[float]]:
    return np.atleast_1d(x).tolist(), np.atleast_1d(y).tolist()


def _value_line(value: np.ndarray) -> tuple[list[float], list[float]]:
    return _line(RATIOS, np.where(value < 0, np.nan, value))


def _cell(value: np.ndarray) -> float | int | None:
    return np.asarray(value).item() if np.isfinite(value) else None


def _told(interval: Interval) -> str | None:
    value, lo, hi = interval
    if not np.isfinite(value):
        return None
    return f"{value:.3f} [{lo:.3f}, {hi:.3f}]" if np.isfinite(lo) else f"{value:.3f}"
