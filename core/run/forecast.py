"""Runs of forecast policies: completions are fields, made lead after lead from the mean of the lead before.

A run of them takes more memory than most machines have: forecasts lie in a temporary file until they are graded and kept
(core/run/sequences.py), and beside the JSON in one Zarr folder an evaluation, samples/<name>.zarr.

MODEL= may also be the Zarr folder or NetCDF file of any forecaster's output. Such forecasts can be evaluated, not trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from transformers import set_seed

from core.app import App, Completion, Quantity, Row, Shape
from core.batch import Batch
from core.config import Config, ConfigError
from core.objective.recipes import Recipe
from core.policy.forecast import ForecastPolicy
from core.policy.step_nets import load_step_net
from core.policy.trajectory import slices
from core.run.actor import Requests
from core.run.folder import RunFolder
from core.run.sequences import Lazy, Spool
from core.run.trajectory import TrajectoryActor
from core.train.forecasting import imitate

FORMATS = (".zarr", ".nc")
DRAWN = 4  # rollouts of a group that rollouts.parquet has a picture of


@dataclass(frozen=True)
class ForecastActor(TrajectoryActor):
    """model: a ForecastPolicy. Completions are arrays (L, V, Y, X), see core.app.Forecast."""

    policy = ForecastPolicy
    model: ForecastPolicy

    @classmethod
    def refuse(cls, app: App, config: Config, batch: Batch, recipe: Recipe, weights: Mapping[str, float]) -> None:
        quantity = _quantity(app, config)
        if is_stored(config.model.path):
            raise ConfigError(
                f"MODEL={config.model.path} holds forecasts and no policy: make eval APP={app.name} MODEL={config.model.path} "
                f"scores them, and nothing can be trained"
            )
        ForecastPolicy(torch.nn.Identity(), config.rollout, quantity)  # for its refusals
        super().refuse(app, config, batch, recipe, weights)

    @classmethod
    def refuse_rows(cls, app: App, config: Config, rows: Sequence[Row]) -> None:
        rollout, there = config.rollout, len(app.acts.condition(rows[0])["ahead"])
        for key in ("start_leads", "leads", "eval_leads"):
            if getattr(rollout, key) > there:
                raise ConfigError(
                    f"rollout.{key}={getattr(rollout, key)} reaches beyond the {there} leads that the data know of (row "
                    f"{rows[0]['id']}); lower it to {there} or less, or give data with more"
                )

    @classmethod
    def _of(cls, app: App, config: Config, path: str | Path, build: Callable) -> Self:
        set_seed(config.run.seed)  # of a new net, or a new adapter
        net = load_step_net(config.model, path, build)
        half = config.model.dtype == "bfloat16"
        return cls(app, config, ForecastPolicy(net, config.rollout, _quantity(app, config), half=half))

    @classmethod
    def load(cls, app: App, config: Config, path: str | Path | None = None) -> Self:
        path = path or config.model.path
        if is_stored(path):
            if not Path(path).exists():
                raise ConfigError(f"MODEL={path} is not there; give a Zarr folder or a NetCDF file of forecasts")
            return StoredForecasts(app, config, torch.nn.Identity(), Path(path))
        if str(path) == "tiny":
            raise ConfigError("model.path=tiny is no model yet: its shape is that of the data; make train makes one")
        return cls._of(app, config, path, app.acts.build)

    @classmethod
    def build(cls, app: App, config: Config, rows: Sequence[Row], labels: Sequence[np.ndarray]) -> Self:
        shape: Shape = ForecastPolicy.shape(app.acts.condition(rows[0]), config.rollout, _quantity(app, config))
        return cls._of(app, config, "tiny", lambda settings: app.acts.build(settings, shape))

    @classmethod
    def start_needs(cls, config: Config) -> list[Any]:
        rollout = config.rollout
        of = {"categorical": ("bins",), "gaussian": ("sigma",), "low_rank": ("sigma", "rank")}[rollout.distribution]
        head = ["head"] * (rollout.decide == "head")  # more outputs of the net
        return [rollout.distribution, rollout.start_leads, *(getattr(rollout, name) for name in of), *head]

    def imitate(
        self,
        rows: Sequence[Row],
        labels: Sequence[np.ndarray],
        output: Path,
        on_log: Callable[[int, dict[str, float]], None],
    ) -> None:
        """Over 1, 2, 4, ... leads, up to `rollout.start_leads`."""
        warmup, acts, leads = self.config.warmup, self.app.acts, [1]
        while leads[-1] < self.config.rollout.start_leads:
            leads.append(min(2 * leads[-1], self.config.rollout.start_leads))
        try:
            imitate(
                self.model,
                Lazy(acts.condition, rows),
                labels,
                Lazy(lambda i: acts.importance(rows[i], labels[i]), range(len(rows))),
                steps=warmup.steps,
                batch_size=warmup.batch_size,
                lr=warmup.lr,
                seed=self.config.run.seed,
                leads=leads,
                on_log=on_log,
            )
        except FloatingPointError as error:
            raise ConfigError(str(error)) from error

    @property
    def how(self) -> str:
        return f"over {self.config.rollout.eval_leads} leads"

    def _made(self, rows: Sequence[Row], make: Callable[[slice, list[dict[str, np.ndarray]]], list]) -> Spool:
        """What `make` makes of the conditions of a few rows at a time."""
        spool = Spool()
        for part in slices(len(rows), self.config.evaluate.batch_size):
            spool.extend(make(part, [self.app.acts.condition(row) for row in rows[part]]))
        return spool

    def complete(self, rows: Sequence[Row], places: Sequence[int]) -> tuple[Sequence[Completion], list[bool]]:
        leads, size = self.config.rollout.eval_leads, self.config.evaluate.batch_size
        made = self._made(rows, lambda part, conditions: self.model.forecast(conditions, leads, size))
        return made, [False] * len(rows)

    def draws(self, rows: Sequence[Row], places: Sequence[int], count: int) -> list[Sequence[Completion]]:
        return [self._draw(rows, self.seeds(places, draw)) for draw in range(1, count + 1)]

    def _draw(self, rows: Sequence[Row], seeds: Sequence[int]) -> Spool:
        sample, leads = self.model.sample_forecasts, self.config.rollout.eval_leads
        return self._made(rows, lambda part, conditions: sample(conditions, seeds[part], leads))

    def drawn(self, rows: Sequence[Row], outputs: Sequence[np.ndarray]) -> list[Completion]:
        """As the app shows them."""
        return [self.app.show(row, output) for row, output in zip(rows[:DRAWN], outputs[:DRAWN], strict=True)]

    def keep(self, folder: RunFolder, name: str, rows: Sequence[Row], completions: Sequence[Completion]) -> list[str]:
        """One Zarr folder; its name and the row's id."""
        place = f"samples/{name}.zarr"
        folder.write_made(place, lambda path: self.app.acts.write(rows, completions, path))
        return [f"{place}/{row['id']}" for row in rows]

    def kept(self, folder: RunFolder, rows: Sequence[Row], texts: Sequence[str]) -> Sequence[Completion]:
        return self._read(folder.path / f"{texts[0].partition('.zarr/')[0]}.zarr", rows)

    def _read(self, path: Path, rows: Sequence[Row]) -> Spool:
        spool = Spool()
        for part in slices(len(rows), self.config.evaluate.batch_size):
            spool.extend(self.app.acts.read(path, rows[part]))
        return spool

    def form(self) -> dict[str, Any]:
        rollout, quantity = self.config.rollout, self.model.quantity
        return {
            "leads": rollout.eval_leads,
            "distribution": rollout.distribution,
            "bins": rollout.bins,
            "sigma": rollout.sigma,
            "rank": rollout.rank,
            "decide": rollout.decide,
            "variables": quantity.variables,
            "edges": quantity.edges,
        }

    @property
    def card(self) -> str:
        name, settings, form = self.app.name, self.config.model, self.form()
        chosen = repr(name) + (f", {self.app.variant!r}" if self.app.variant else "")
        rollout = {key: form[key] for key in ("distribution", "bins", "sigma", "rank", "decide")}
        task = f" TASK={self.app.variant}" if self.app.variant else ""
        return f"""\
    from core import app, config
    from core.policy.forecast import ForecastPolicy
    from core.policy.step_nets import load_step_net
    found = app.find({chosen})
    model = config.Model(path={settings.path!r}, lora_rank={settings.lora_rank}, lora_alpha={settings.lora_alpha})
    quantity = found.acts.quantity(found.options(**{self.config.as_dict()["task"]}))
    net = load_step_net(model, ".", found.acts.build)
    policy = ForecastPolicy(net, config.ForecastRollout(**{rollout}), quantity)
    forecasts = policy.forecast([found.acts.condition(row)], {form["leads"]}, 1)

Without Python: `make predict APP={name}{task} MODEL=<this folder> INPUT=<analysis file or folder> OUTPUT=<name>.zarr`.
"""

    @classmethod
    def requests(cls, app: App, source: Path, target: Path) -> tuple[Requests, list[Row]]:
        """An analysis file or folder, as the app reads it."""
        if not source.exists():
            raise ConfigError(f"INPUT={source} is not there; give a file or folder with the analysis to start from")
        if target.suffix not in FORMATS:
            raise ConfigError(f"OUTPUT={target} must end in {' or '.join(FORMATS)}")
        if target.exists():
            raise ConfigError(f"OUTPUT={target} is there already; give the name of a new one")
        try:
            rows = app.acts.requests(source)
        except (ValueError, OSError) as error:
            raise ConfigError(f"INPUT={source}: {error}") from error
        if not rows:
            raise ConfigError(f"INPUT={source} holds no time that a forecast could start from")
        return [{"id": row["id"]} for row in rows], rows

    def answer(self, requests: Requests, rows: Sequence[Row], completions: Sequence[Completion], target: Path) -> None:
        """One Zarr folder or NetCDF file."""
        RunFolder(target.parent).write_made(target.name, lambda path: self.app.acts.write(rows, completions, path))


@dataclass(frozen=True)
class StoredForecasts(ForecastActor):
    """Any forecaster's output, at `path`. It answers the rows that it holds, and learns nothing."""

    model: torch.nn.Module
    path: Path
    how = "as stored"

    def complete(self, rows: Sequence[Row], places: Sequence[int]) -> tuple[Sequence[Completion], list[bool]]:
        return self._read(self.path, rows), [False] * len(rows)

    def refuse_requests(self) -> None:
        raise ConfigError(f"MODEL={self.path} holds forecasts and no policy: make eval scores them, it cannot predict")


def is_stored(path: str | Path) -> bool:
    """Whether MODEL= names forecasts rather than a policy."""
    return Path(path).suffix in FORMATS


def _quantity(app: App, config: Config) -> Quantity:
    try:
        return app.acts.quantity(config.task)
    except ValueError as error:
        raise ConfigError(f"task: {error}") from error
