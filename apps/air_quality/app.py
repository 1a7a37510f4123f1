"""Air quality: five days of PM2.5 and PM10, six hours a step, and the classes that are announced from them.

    make train APP=air_quality                                fine-tuned for what alerts cost, beside every free rival
    make train APP=air_quality TASK=paper                     from a start that warns too often, with the reward of 2511.22169
    make train APP=air_quality SET=rewards.preset=regional    alerts of whole regions; duration: how long an episode lasts

One decision is the class of one cell at one lead. The reward is what the decision saves: 1 - C[observed, announced], a matrix
that an agency may state (`task.costs`). The paper's reward is a special case (rewards/forecast/costs.py); its classes of 24 h
means are applied to instantaneous values, there as here. What a threshold or a Bayes decision on the unchanged forecast would
have cost stands in every table, tuned on the validation year alone (baselines.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from apps.air_quality import baselines, counts, maps, verification
from core.app import App, Completion, Forecast, Quantity, Row, Rows, Shape, Verification
from core.config import Model
from core.policy.step_nets import ConvLSTM, StepNet, UNet, ViT
from data import air_quality as archive
from data import weatherbench
from data.synthetic import air_quality as world
from rewards import forecast as rewards
from rewards.forecast import classes, scheme_named

VARIABLES = ("pm2p5", "pm10")
PAPER_WEIGHTS = (0.2, 0.2, 1.0, 0.5)  # of the classes in the supervised loss of PM2.5 (arXiv 2511.22169)
SHOWN_LEAD = 4  # of the maps: 24 h ahead


@dataclass(frozen=True)
class Options:
    """The `task:` section."""

    scheme: Literal["korea", "us", "who", "china"] = "korea"  # classes, and from which on an alert is due
    costs: Any = "agency"  # C[observed, announced]: a preset of rewards/forecast/costs.py, or a list of lists in [0, 1]
    alert_share: float = 0.2  # of a region's observed cells that make a regional alert
    weighting: Literal["none", "class"] = (
        "none"  # of the supervised loss: every observation alike, or the paper's classes
    )
    analysis_weight: float = 0.2  # in the supervised loss, of cells without an observation


def prompt(row: Row) -> str:
    return f"PM2.5 and PM10 from {row['id']} UTC on, {row['window'].leads * row['window'].step_h} h ahead"


def condition(row: Row) -> dict[str, np.ndarray]:
    """What is known at the init; `valid`, where a station will report, is no input: only there a decision is judged."""
    window = row["window"]
    known = {"history": window.history(), "seen": window.seen(), "given": window.given(), "ahead": window.ahead()}
    if (maps_ahead := window.maps_ahead()) is not None:
        known["maps_ahead"] = maps_ahead
    return known | {"valid": np.isfinite(window.observed()).astype(np.float32)}


def quantity(options: Options) -> Quantity:
    scheme = scheme_named(options.scheme)
    if options.weighting == "class" and len(scheme.classes) != len(PAPER_WEIGHTS):
        raise ValueError(
            f"weighting=class has weights for {len(PAPER_WEIGHTS)} classes and scheme={options.scheme} has "
            f"{len(scheme.classes)}; use scheme=korea or weighting=none"
        )
    costs = rewards.cost_matrix(options.costs, scheme)
    return Quantity(VARIABLES, scheme.of(VARIABLES), costs=tuple(map(tuple, costs.tolist())))


def gold(row: Row) -> np.ndarray:
    """What was observed; the analysis where nothing was."""
    observed = row["window"].observed()
    return np.where(np.isfinite(observed), observed, row["window"].analysis())


def importance(row: Row, label: np.ndarray) -> np.ndarray:
    """Weights of the supervised loss. weighting=class: each class of observed PM2.5 counts as the paper weighs it."""
    observed = np.isfinite(row["window"].observed())
    weights = np.where(observed, 1.0, row["analysis_weight"]).astype(np.float32)
    if row["weighting"] == "class":
        seen = observed[:, 0]
        level = classes(label[:, 0], scheme_named(row["scheme"]).edges["pm2p5"])
        there = np.bincount(level[seen], minlength=len(PAPER_WEIGHTS))
        each = np.where(there > 0, PAPER_WEIGHTS, 0.0) / there.clip(1)
        total = each @ there  # so that the mean weight of an observation stays 1
        weights[:, 0] = np.where(seen, each[level] * there.sum() / total if total else 0.0, 0.0)
    return weights * np.isfinite(label)


def build(model: Model, shape: Shape) -> StepNet:
    """The small step net of model.path=tiny; `model.net` says which."""
    if model.net == "vit":
        return ViT(shape.inputs, shape.outputs, width=model.width, layers=model.layers, heads=model.heads)
    if model.net == "convlstm":
        return ConvLSTM(shape.inputs, shape.outputs, width=model.width)
    return UNet(shape.inputs, shape.outputs, width=model.width, levels=model.layers)


def write(rows: Rows, completions: list[Completion], path: Path) -> None:
    """Forecasts as one Zarr or NetCDF in the WeatherBench layout."""
    window = rows[0]["window"]
    weatherbench.write_forecasts(
        path, [row["window"].init for row in rows], completions, **_layout(rows[0]), step_h=window.step_h
    )


def read(path: Path, rows: Rows) -> list[Completion]:
    """The forecasts of these inits, of any forecaster."""
    window = rows[0]["window"]
    found = weatherbench.read_forecasts(path, **_layout(rows[0]), step_h=window.step_h, leads=window.leads)
    return found.of(row["window"].init for row in rows)


def _layout(row: Row) -> dict[str, Any]:
    window = row["window"]
    edges = scheme_named(row["scheme"]).of(window.variables)
    return {"variables": window.variables, "edges": edges, "lat": window.lat(), "lon": window.lon()}


def show(row: Row, completion: Completion) -> np.ndarray:
    """A map of the classes announced for a day ahead, or the last lead there is, and of what stations then reported."""
    return maps.class_map(row["window"], completion, min(SHOWN_LEAD, len(completion)) - 1, row["scheme"])


def persisting(row: Row) -> np.ndarray:
    """The picture of what was known at the init."""
    window = row["window"]
    return show(row, np.repeat(window.history()[-1:], window.leads, axis=0))


SEPARABLE = {"pm2p5_cost": (1.0, rewards.pm2p5_cost), "pm10_cost": (0.3, rewards.pm10_cost)}

APP = App(
    name="air_quality",
    acts=Forecast(
        prompt=prompt,
        condition=condition,
        quantity=quantity,
        build=build,
        importance=importance,
        write=write,
        read=read,
        requests=archive.request_rows,
    ),
    options=Options,
    load=archive.load,
    write_offline=world.write,
    gold=gold,
    demonstrations=lambda rows, seed: [gold(row) for row in rows],
    rewards=SEPARABLE,
    presets={
        "constrained": SEPARABLE
        | {"detected": (0.2, rewards.detected), "no_false_alarm": (0.2, rewards.no_false_alarm)},
        "regional": {"regional_alert": (1.0, rewards.regional_alert), "pm2p5_cost": (0.0, rewards.pm2p5_cost)},
        "duration": {"event_duration": (1.0, rewards.event_duration), "pm2p5_cost": (0.0, rewards.pm2p5_cost)},
    },
    outcome="pm2p5_cost",
    metrics={
        "expected_cost": rewards.expected_cost,
        "false_alarm_rate": rewards.false_alarm_rate,
        "probability_of_detection": rewards.probability_of_detection,
        "f1": rewards.f1,
        "crps": rewards.crps,
    },
    lower=frozenset({"expected_cost", "false_alarm_rate", "crps"}),
    canaries=(
        *rewards.cost_canaries(),
        *rewards.cost_canaries("pm10_cost", "pm10"),
        *rewards.alert_canaries(),
        *(canary for name in ("regional_alert", "event_duration") for canary in rewards.broken_canaries(name)),
    ),
    cluster="week",
    part=lambda row: row["season"],
    baselines={
        "persistence": baselines.persistence,
        "climatology": baselines.climatology,
        "analysis model": baselines.analysis_model,
    },
    learned={
        "mean square": baselines.plain_mse,
        "class-weighted": baselines.class_weighted,
        "tuned threshold": baselines.tuned_threshold,
        "threshold per lead": baselines.tuned_threshold_per_lead,
        "quantile mapping": baselines.quantile_mapping,
        "Bayes decision": baselines.bayes_decision,
        "tuned probability": baselines.bayes_per_lead,
    },
    verify=Verification(counts.reduce, verification.tables, verification.plots),
    show=show,
    given=persisting,
    tasks={
        "paper": {
            "task.weighting": "class",
            "task.costs": "paper",
            "rollout.decide": "class",
            "rollout.leads": 8,
            "rollout.first_leads": 3,
            "rollout.leads_every": 10,
            "rewards.preset": "constrained",
            "rewards.constraints": {
                "detected": {"metric": "probability_of_detection", "at_least": 0.6},
                "no_false_alarm": {"metric": "false_alarm_rate", "at_most": 0.18},
            },
        },
    },
    extras=("air",),
)
