"""At equal costs, does any GRPO arm beat the best decision that is free? A study in results/air_quality.json.

    python -P benchmarks/air_quality_arms.py [--seeds 0 1 2 3 4]

For each seed, a world of its own: the supervised starts of the offline config; what thresholds and Bayes decisions make of
their forecasts, tuned on the validation year; and arms of GRPO, which differ in credit (cell, field), scale (pooled, batch,
group), distribution, what announces the class (the forecast, or a head of its own), and reward. Each is judged on the test year
by the cost that it was trained for, against the best free decision *for that cost*, paired by week; and by its point above the
ROC of the start's probabilities. Its start is the categorical's; the Gaussian arm has a regression's.

Besides cells, a cost in which a pointwise threshold need not be optimal: alerts of whole regions. Its free rivals are thresholds
tuned for that very cost, and the mean probability over a region's cells.

Arms that are done are kept in runs/, so a stopped call goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from apps.air_quality import baselines, counts
from core import app as apps
from core import config as configs
from core.app import Completion, Row
from core.config import Config
from core.run import evaluate as ev
from core.run.actor import Actor
from core.run.folder import RunFolder
from core.run.progress import Progress
from core.run.rivals import Rivals
from core.run.sequences import Lazy
from core.run.splits import Split
from core.run.start import start
from core.run.stopping import StopRequest
from core.run.train import Clock, Setup, reinforce
from core.train.forecasting import imitate
from core.train.warmup import quiet
from rewards.forecast import metrics
from rewards.forecast.fields import exceedance
from rewards.forecast.schemes import scheme_named

sys.path.insert(0, str(Path(__file__).parent))  # started with -P

import readme

SUPERVISED = "supervised for as long, over the same leads"
CELL = {"recipe": "forecast_grpo", "beta": 0.1}
FIELD = CELL | {"credit": "rollout"}  # one reward per forecast, as in the paper
# {cost: {arm: changes of the config}}
ARMS = {
    "expected_cost": {
        "cell, pooled scale": {"objective": CELL},
        "cell, group scale": {"objective": CELL | {"scale": "group"}},
        "cell, batch scale": {"objective": CELL | {"scale": "batch"}},
        "field, pooled scale": {"objective": FIELD},
        "field, group scale": {"objective": FIELD | {"scale": "group"}},
        "field, batch scale": {"objective": FIELD | {"scale": "batch"}},
        "a head of its own, from the Bayes decision": {"rollout.decide": "head"},
        "Gaussian, cell, pooled scale": {"rollout.distribution": "gaussian", "rollout.decide": "mean"},
        "cell, pooled scale, shuffled advantages": {"run.control": "shuffled_advantages"},
        SUPERVISED: {},
    },
    "regional_cost": {
        "regions, by cell": {"rewards.preset": "regional"},
        "regions, by cell, a head of its own": {"rewards.preset": "regional", "rollout.decide": "head"},
        "regions, by field": {"rewards.preset": "regional", "objective": FIELD},
        "regions, shuffled advantages": {"rewards.preset": "regional", "run.control": "shuffled_advantages"},
    },
}
TINY = apps.folder("air_quality") / "tiny.yaml"
CHANCES = tuple(np.round(np.arange(0.08, 0.72, 0.04), 2))  # thresholds of a probability that are tried
FACTORS = tuple(np.round(np.arange(0.6, 1.45, 0.05), 2))  # of class edges


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parse.add_argument("--only-run", action="store_true", help="write no results: other seeds run elsewhere")
    options = parse.parse_args()
    seeds = {seed: one_seed(seed) for seed in options.seeds}
    if options.only_run:
        return
    study = {
        "question": __doc__.splitlines()[0],
        "steps": configs.load(apps.find("air_quality"), TINY).optim.steps,
        "command": "python -P benchmarks/air_quality_arms.py",
        "arms": [summary(seeds, cost, name) for cost, arms in ARMS.items() for name in arms],
        "free": {
            cost: {
                name: [mean(seed["free"][name][cost]) for seed in seeds.values()] for name in free_names(seeds, cost)
            }
            for cost in ARMS
        },
        "start": {cost: [mean(seed["free"]["the start itself"][cost]) for seed in seeds.values()] for cost in ARMS},
        "seeds": list(seeds),
    }
    path = Path("results/air_quality.json")
    results = json.loads(path.read_text()) if path.exists() else {"runs": [], "controls": {}, "studies": {}}
    results["studies"]["grpo_against_free_decisions"] = study
    RunFolder(path.parent).write_json(path.name, results)
    draw(study)
    readme.rewrite("air_quality", "arms", table(study))
    print(table(study))


# -- one seed ---------------------------------------------------------------------------------------------------------------


def one_seed(seed: int) -> dict:
    """{"weeks", "free": {name: judged}, "arms": {name: judged}}, see `judge_forecasts`."""
    app = apps.find("air_quality")
    config = configs.load(app, TINY, run__seed=seed, rollout__decide="class")
    place = Path("runs") / app.name / f"arms-s{seed}"
    kept, found = place / "judged.json", {"free": {}, "arms": {}}
    if kept.exists():
        found = json.loads(kept.read_text())
    names = [name for arms in ARMS.values() for name in arms]
    if set(names) <= set(found["arms"]):
        return found
    with quiet(), StopRequest() as stop, Progress(config.optim.steps, place.name) as progress:
        with ev.Judge(app, config, app.composite()) as judge:
            data = Split(app, config, progress)
            found["weeks"] = [row["week"] for row in data.test]
            if not found["free"]:
                rivals = Rivals(app, config, data, data.test, judge, progress)
                found["roc"] = (
                    counts.reduce(data.test, rivals.start.complete(data.test, range(len(data.test)))[0])
                    .chances[:, 0]
                    .tolist()
                )
                for name, completions in free(rivals):
                    progress.note(f"free: {name}")
                    found["free"][name] = judge_forecasts(data.test, completions)
                RunFolder(place).write_json(kept.name, found)
        for arms in ARMS.values():
            for name, changes in arms.items():
                if name not in found["arms"]:
                    settings = {key.replace(".", "__"): value for key, value in changes.items() if "." in key}
                    one = configs.changed(app, config, **settings)
                    one = replace(one, objective=changes.get("objective", config.objective))
                    found["arms"][name] = one_arm(app, one, place / slug(name), progress, stop)
                    RunFolder(place).write_json(kept.name, found)
    return found


def one_arm(app, config: Config, place: Path, progress: Progress, stop: StopRequest) -> dict:
    """Trains one arm from its start, or goes on with it, and judges its forecasts of the test rows."""
    progress.note(f"arm: {place.name}")
    setup = Setup(app, config)
    with RunFolder.open(place, config.as_dict()) as folder, ev.Judge(app, config, setup.composite) as judge:
        data = Split(app, config, progress)
        actor, _ = start(app, config, data, judge, progress)
        if place.name == slug(SUPERVISED):
            trained = supervised(actor, data.train)
        else:
            trained, _ = reinforce(setup, data, data.train, folder, judge, progress, stop, Clock(folder), actor)
    return judge_forecasts(data.test, trained.complete(data.test, range(len(data.test)))[0])


def slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "_")


def supervised(actor: Actor, rows: Sequence[Row]) -> Actor:
    """The start, trained on by imitation for as many steps with as many initial times, at a rate as low as the start's last."""
    config, acts = actor.config, actor.app.acts
    labels = Lazy(actor.app.gold, rows)
    imitate(
        actor.model,
        Lazy(acts.condition, rows),
        labels,
        Lazy(lambda i: acts.importance(rows[i], labels[i]), range(len(rows))),
        steps=config.optim.steps,
        batch_size=config.rollout.prompts_per_step,
        lr=config.warmup.lr / 2,
        seed=config.run.seed + 1,
        leads=(config.rollout.leads,),
        on_log=lambda step, metrics: None,
    )
    return actor


def free(rivals: Rivals):
    """(name, forecasts of the test rows) of every decision that needs no reinforcement."""
    yield "the start itself", rivals.start.complete(rivals.test, range(len(rivals.test)))[0]
    for name, baseline in {**rivals.app.baselines, **rivals.app.learned}.items():
        if name == "class-weighted":  # a start that warns too often is no rival, and takes a minute
            continue
        yield name, baseline(rivals) if name in rivals.app.learned else baseline(rivals.train, rivals.test)
    known = {"probability": rivals.start, "threshold": rivals.fit(**baselines.PLAIN)}
    own = {name: actor.complete(rivals.validation, range(len(rivals.validation)))[0] for name, actor in known.items()}
    there = {name: actor.complete(rivals.test, range(len(rivals.test)))[0] for name, actor in known.items()}
    ways = {
        "probability": (baselines.at_probability, CHANCES),
        "threshold": (baselines.scaled, FACTORS),
        "mean probability of the region": (by_region, CHANCES),
    }
    for name, (decide, grid) in ways.items():
        source = "threshold" if name == "threshold" else "probability"
        tuned = baselines.tune_for(metrics.regional_cost, rivals.validation, own[source], decide, grid, lower=True)
        yield (
            f"{name}, tuned for regional_cost",
            [decide(f, row, tuned) for f, row in zip(there[source], rivals.test, strict=True)],
        )


def by_region(forecast: np.ndarray, row: Row, chances: np.ndarray) -> np.ndarray:
    """An alert in all cells of a region where their mean probability of one is at or above that of the lead, else in none."""
    scheme, window = scheme_named(row["scheme"]), row["window"]
    chance = exceedance(forecast, scheme.of(window.variables))[..., scheme.alert - 1].astype(np.float32)
    seen = np.isfinite(window.history()[-1])  # every cell; which ones will report is not known
    level, region = forecast["level"].copy(), window.region()
    for number in window.region_names:
        inside = (region == number) & (window.seen().max(axis=(0, 1)) > 0) & seen.any(axis=0)
        if inside.any():
            alert = chance[..., inside].mean(-1) >= chances[: len(forecast), None]
            level[..., inside] = np.where(
                alert[..., None],
                np.maximum(level[..., inside], scheme.alert),
                np.minimum(level[..., inside], scheme.alert - 1),
            )
    return baselines.with_levels(forecast, level)


def judge_forecasts(rows: Sequence[Row], completions: Sequence[Completion]) -> dict:
    """{cost: [[value, cases] of each row]}, and "alerts": [[TP, FP, FN, TN] of each row] of PM2.5."""
    columns = {name: [row[name] for row in rows] for name in ("window", "scheme", "costs", "alert_share")}
    judged = {}
    for cost, needed in (
        ("expected_cost", ("window", "scheme", "costs")),
        ("regional_cost", ("window", "scheme", "costs", "alert_share")),
    ):
        scores = getattr(metrics, cost)(list(completions), **{name: columns[name] for name in needed})
        judged[cost] = [
            [float(score.value or 0.0), float(score.weight if score.value is not None else 0)] for score in scores
        ]
    table = counts.reduce(rows, completions).confusion[:, :, 0].sum(1)
    found = counts.alerts(table, counts.Task.of(rows).alert)
    judged["alerts"] = np.stack([found.tp, found.fp, found.fn, found.tn], axis=-1).tolist()
    return judged


# -- all seeds --------------------------------------------------------------------------------------------------------------


def mean(values: Sequence[Sequence[float]]) -> float:
    value, weight = np.array(values).T
    return float(value @ weight / weight.sum())


def free_names(seeds: Mapping[int, dict], cost: str) -> list[str]:
    """Free decisions that count against an arm of this cost: all but the analysis model's, which had a weather forecast."""
    every = next(iter(seeds.values()))["free"]
    return [name for name in every if ", tuned for " not in name or name.endswith(cost)]


def summary(seeds: Mapping[int, dict], cost: str, arm: str) -> dict:
    """An arm over all seeds: its cost, less that of the best free decision, and its POD above the start's ROC.

    difference: mean over seeds, ci95 by Student's t over them (each seed is a world and a start of its own). by_seed: each with
    its interval by week. The best free decision is chosen on the test year, in its own favour.
    """
    by_seed = []
    for seed, found in seeds.items():
        own = found["arms"][arm]
        rivals = [name for name in free_names(seeds, cost) if name not in NOT_RIVALS]
        best = min(rivals, key=lambda name: mean(found["free"][name][cost]))
        times = counts.draws(found["weeks"])
        costs = [
            times @ np.array(part).prod(1) / (times @ np.array(part)[:, 1])
            for part in (own[cost], found["free"][best][cost])
        ]
        alerts = times @ np.array(own["alerts"])
        rates = alerts[:, 1] / (alerts[:, 1] + alerts[:, 3]), alerts[:, 0] / (alerts[:, 0] + alerts[:, 2])
        above = counts.above_roc(*rates, counts.pooled(times, np.array(found["roc"])))
        by_seed.append(
            {
                "seed": seed,
                "cost": float(costs[0][0]),
                "best_free": best,
                "best_free_cost": float(costs[1][0]),
                **interval("difference", costs[0] - costs[1]),
                "false_alarm_rate": float(rates[0][0]),
                "pod": float(rates[1][0]),
                **interval("pod_above_roc", above),
            }
        )
    entry = {"arm": arm, "cost": cost, "mean": float(np.mean([one["cost"] for one in by_seed])), "by_seed": by_seed}
    for key, name in (("difference", "ci95"), ("pod_above_roc", "pod_above_roc_ci95")):
        values = [one[key] for one in by_seed]
        entry[key] = float(np.mean(values))
        half = student(len(values)) * np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        entry[name] = [entry[key] - half, entry[key] + half]
    return entry


NOT_RIVALS = ("analysis model",)  # it had a weather forecast; shown, not counted as a decision


def table(study: Mapping) -> str:
    """What the README shows of a study."""
    lines = [
        "| arm | cost | start | after | best free | after less best free | POD above the start's ROC |",
        "|---" * 7 + "|",
    ]
    for arm in study["arms"]:
        free = np.mean([seed["best_free_cost"] for seed in arm["by_seed"]])
        start = np.mean(study["start"][arm["cost"]])
        told = [f"{arm[key]:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
                for key, (low, high), digits in (("difference", arm["ci95"], 4),
                                                 ("pod_above_roc", arm["pod_above_roc_ci95"], 3))]  # fmt: skip
        cells = [arm["arm"], arm["cost"], *(f"{value:.4f}" for value in (start, arm["mean"], free)), *told]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(study: Mapping) -> None:
    """results/air_quality_arms.svg: the cost of each arm less that of the best free decision, a dot a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    arms = study["arms"]
    figure = Figure(figsize=(9, 0.4 * len(arms) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    for y, arm in enumerate(arms):
        colour = "#1c6ea4" if arm["cost"] == "expected_cost" else "#b5541c"
        axes.plot(arm["ci95"], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
        axes.plot(
            [seed["difference"] for seed in arm["by_seed"]], [y] * len(arm["by_seed"]), "o", color=colour, markersize=3
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(arms)), [arm["arm"] for arm in arms])
    axes.invert_yaxis()
    axes.set_xlabel(
        "cost less that of the best free decision, test year; less is better\n"
        "95 % interval over seeds, one dot a seed\nblue: expected cost by cell; brown: of regional alerts"
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig("results/air_quality_arms.svg", metadata={"Date": None})


def interval(name: str, values: np.ndarray) -> dict:
    return {name: float(values[0]), f"{name}_ci95": [float(v) for v in np.nanpercentile(values[1:], [2.5, 97.5])]}


def student(count: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, count - 1))


if __name__ == "__main__":
    main()
