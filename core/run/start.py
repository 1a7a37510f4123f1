"""The policy that GRPO starts from: a model as it is, or after a supervised start that is made once and cached.

The cache key is a hash of everything the start depends on, so runs that differ only in reinforcement share one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from core import ranks
from core.app import App
from core.config import Config, ConfigError
from core.run import evaluate as ev
from core.run.actor import Actor, actor_of
from core.run.folder import make_folder
from core.run.progress import Progress
from core.run.sequences import Lazy
from core.run.splits import Split
from core.train.warmup import cache_key

GRADED = 256  # labels that are made when needed: so many are graded, spread evenly over the rows


class NotMade(ConfigError):
    """A supervised start is not in the cache, and must not be made here and now."""


def start(
    app: App, config: Config, data: Split, judge: ev.Judge, progress: Progress, make: bool = True
) -> tuple[Actor, dict[str, Any]]:
    """The policy that GRPO starts from, and how it came to be ({curve, seconds, path, distance}).

    make: False raises NotMade instead of making a start that is not there yet.
    """
    kind = actor_of(app)
    if config.model.path != "tiny" and config.warmup.labels == "none":
        actor = kind.load(app, config)
        refuse_infinite(actor.model, f"MODEL={config.model.path} cannot be trained")
        return actor, {"curve": [], "seconds": 0.0, "path": config.model.path, "distance": distance(actor.model)}
    key = cache_key(
        app.label,
        asdict(config.model),
        asdict(config.warmup),
        asdict(config.data),
        config.as_dict()["task"],
        config.run.seed,
        *kind.start_needs(config),
    )
    cache = Path("runs") / "warmup" / f"{app.label}-{key}"
    if not make and not cache.exists():
        raise NotMade(f"the supervised start {cache} is not there")
    if ranks.count() > 1 and not cache.exists():
        raise NotMade(
            f"the warm start {cache} is not there yet and is made by one process; GPUS=n does that before it starts the ranks, "
            f"under another launcher run the same command once without it"
        )
    make_folder(cache, lambda part: build_start(app, config, data, part, judge, progress), progress.note)
    actor = kind.load(app, config, cache)
    note = json.loads((cache / "warmup.json").read_text())
    return actor, {**note, "path": str(cache), "distance": distance(actor.model)}


def build_start(app: App, config: Config, data: Split, folder: Path, judge: ev.Judge, progress: Progress) -> None:
    """Train the warm start and write it to `folder`. Raises ConfigError if it diverged."""
    warmup, seed, began = config.warmup, config.run.seed, time.monotonic()
    rows = data.train[: warmup.rows]
    labels = app.demonstrations(rows, seed) if warmup.labels == "demonstrations" else Lazy(app.gold, rows)
    if config.model.path == "tiny":
        actor = actor_of(app).build(app, config, rows, labels)
    else:
        actor = actor_of(app).load(app, config)
        refuse_infinite(actor.model, f"MODEL={config.model.path} cannot be trained")
    headline, step = next(iter(app.metrics)), 1 if isinstance(labels, list) else -(-len(rows) // GRADED)
    graded = ev.grade(judge, rows[::step], labels[::step])
    scores, worth = graded.scores[headline], ev.mean(graded.scores[headline], graded.weights[headline])
    facts = {"labels": warmup.labels, "rows": len(rows), "label_accuracy": worth}
    curve: list[dict[str, Any]] = []

    def on_log(step: int, metrics: dict[str, Any]) -> None:
        point = {"step": step, "loss": metrics["loss"]}
        if data.validation and len(curve) % 5 == 4:
            point["metric"] = ev.evaluate(actor, judge, data.validation).mean(headline)
        curve.append(point)
        progress.update(step, metrics | ({f"eval/{headline}": point["metric"]} if "metric" in point else {}))

    if warmup.steps:  # else it is only built
        right = f"{headline} {worth:.3f} on average"
        if ev.yes_or_no(scores) and app.better(headline) == "higher":
            right = f"of which {worth:.1%} are right"
        progress.note(f"demonstrations: {len(rows)}, {right}; none is filtered")
        progress.phase("warm start", warmup.steps)
        actor.imitate(rows, labels, folder, on_log)
    refuse_infinite(actor.model, f"the warm start diverged; lower warmup.lr={warmup.lr:g}")
    actor.save(folder)
    facts |= {"curve": curve, "seconds": round(time.monotonic() - began, 2)}
    (folder / "warmup.json").write_text(json.dumps(facts))


def refuse_infinite(model: torch.nn.Module, why: str) -> None:
    """Raise ConfigError if a weight is NaN or infinite: nothing can be sampled from such a model, and nothing learned."""
    broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if broken:
        raise ConfigError(f"{why} ({len(broken)} tensors hold NaN or infinite weights, first {broken[0]})")


MEASURED = 50_000_000  # parameters; a copy of a larger model is not kept


def distance(model) -> Callable[[torch.nn.Module], float | None]:
    """A function that says how far another model's weights are from this one's now: |change| / |weights|.

    It gives None for models of over MEASURED parameters, and for adapters, which leave these weights as they are.
    """
    small = sum(p.numel() for p in model.parameters()) <= MEASURED
    origin = {name: p.detach().cpu().clone() for name, p in model.named_parameters()} if small else {}

    def measure(other: torch.nn.Module) -> float | None:
        now = {name: p.detach().cpu() for name, p in other.named_parameters() if name in origin}
        if not now:
            return None
        moved = sum((p - origin[name]).square().sum() for name, p in now.items())
        return float((moved / sum(p.square().sum() for p in origin.values())).sqrt())

    return measure
