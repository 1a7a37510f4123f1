"""Runs of flow policies: completions are pictures, made by the ODE from one fixed noise a row."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from transformers import set_seed

from core.app import App, Row
from core.batch import Batch
from core.config import Config, ConfigError
from core.objective.recipes import Recipe
from core.policy.flow import FlowPolicy, load_net
from core.run import media
from core.run.actor import Requests
from core.run.folder import RunFolder
from core.run.requests import read_pictures
from core.run.sequences import Lazy
from core.run.trajectory import TrajectoryActor
from core.train.flow_matching import imitate, straighten

UNSAID = 0.1  # share of a warm start's rows without their instruction, if the policy will be guided (arXiv 2207.12598)


@dataclass(frozen=True)
class FlowActor(TrajectoryActor):
    """model: a FlowPolicy. Completions are pictures, float32 (H, W, 3) in [0, 1]."""

    policy = FlowPolicy
    model: FlowPolicy

    @classmethod
    def refuse(cls, app: App, config: Config, batch: Batch, recipe: Recipe, weights: Mapping[str, float]) -> None:
        rollout = config.rollout
        if rollout.steps == 1 and "renoised" not in recipe.needs:
            raise ConfigError(
                f"rollout.steps=1 leaves recipe {recipe.name} no decision: the last step is never noisy. Use 2 or more, or a "
                f"recipe without noisy steps (make recipes; those that need 'renoised')"
            )
        try:
            policy = FlowPolicy(torch.nn.Identity(), rollout)
            noisy = rollout.window_size if rollout.window == "first" else rollout.steps - 1
            for sigma, after in pairwise(policy.schedule.sigmas[: noisy + 1]):
                policy.kernel.std(sigma, after)
        except ValueError as error:
            raise ConfigError(f"rollout: {error}") from error
        super().refuse(app, config, batch, recipe, weights)

    @classmethod
    def _of(cls, app: App, config: Config, path: str | Path) -> Self:
        set_seed(config.run.seed)  # of a new net, or a new adapter
        net = load_net(config.model, path, app.acts.build)
        return cls(app, config, FlowPolicy(net, config.rollout, half=config.model.dtype == "bfloat16"))

    @classmethod
    def load(cls, app: App, config: Config, path: str | Path | None = None) -> Self:
        return cls._of(app, config, path or config.model.path)

    @classmethod
    def build(cls, app: App, config: Config, rows: Sequence[Row], labels: Sequence[np.ndarray]) -> Self:
        return cls._of(app, config, "tiny")

    @classmethod
    def _unsaid(cls, config: Config) -> float:
        return UNSAID if config.rollout.guidance != 1 else 0.0

    @classmethod
    def start_needs(cls, config: Config) -> list[Any]:
        return [cls._unsaid(config)]

    def imitate(
        self,
        rows: Sequence[Row],
        labels: Sequence[np.ndarray],
        output: Path,
        on_log: Callable[[int, dict[str, float]], None],
    ) -> None:
        warmup = self.config.warmup
        conditions = Lazy(self.app.acts.condition, rows)
        common = {"batch_size": warmup.batch_size, "seed": self.config.run.seed}
        try:
            imitate(
                self.model.net,
                conditions,
                labels,
                steps=warmup.steps,
                lr=warmup.lr,
                on_log=on_log,
                drop_text=self._unsaid(self.config),
                **common,
            )
            if warmup.straighten:
                straighten(
                    self.model.net,
                    conditions,
                    steps=warmup.straighten,
                    lr=warmup.lr / 2,
                    on_log=lambda step, metrics: on_log(warmup.steps + step, metrics),
                    **common,
                )
        except FloatingPointError as error:
            raise ConfigError(str(error)) from error

    @property
    def how(self) -> str:
        return f"in {self.config.rollout.eval_steps} ODE steps"

    def _generate(self, rows: Sequence[Row], places: Sequence[int], draw: int) -> list[np.ndarray]:
        """Answer number `draw` to each row; it depends on no other row of a batch."""
        size, made = self.config.evaluate.batch_size, {}
        for first in range(0, len(rows), size):  # conditions are read when needed: pictures take memory
            alike = defaultdict(list)  # a net takes pictures of one size at a time
            for i in range(first, min(first + size, len(rows))):
                condition = self.app.acts.condition(rows[i])
                alike[tuple(np.shape(value) for value in condition.values())].append((i, condition))
            for batch in alike.values():
                outputs = self.model.generate(
                    [condition for _, condition in batch],
                    seeds=self.seeds([places[i] for i, _ in batch], draw),
                    steps=self.config.rollout.eval_steps,
                    batch_size=size,
                )
                made |= zip((i for i, _ in batch), outputs, strict=True)
        return [made[i] for i in range(len(rows))]

    def complete(self, rows: Sequence[Row], places: Sequence[int]) -> tuple[list[np.ndarray], list[bool]]:
        return self._generate(rows, places, 0), [False] * len(rows)

    def draws(self, rows: Sequence[Row], places: Sequence[int], count: int) -> list[list[np.ndarray]]:
        """From other noise."""
        return [self._generate(rows, places, draw) for draw in range(1, count + 1)]

    def drawn(self, rows: Sequence[Row], outputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        return list(outputs)

    def keep(self, folder: RunFolder, name: str, rows: Sequence[Row], completions: Sequence[np.ndarray]) -> list[str]:
        return [
            media.write_picture(folder, f"samples/{name}/{i:05d}.png", completion)
            for i, completion in enumerate(completions)
        ]

    def kept(self, folder: RunFolder, rows: Sequence[Row], texts: Sequence[str]) -> list[np.ndarray]:
        return [media.read_picture(folder.path / text) for text in texts]

    def form(self) -> dict[str, Any]:
        rollout = self.config.rollout
        return {
            "steps": rollout.eval_steps,
            "shift": rollout.shift,
            "guidance": rollout.guidance,
            "guidance_rescale": rollout.guidance_rescale,
        }

    @property
    def card(self) -> str:
        name, settings = self.app.name, self.config.model
        chosen = repr(name) + (f", {self.app.variant!r}" if self.app.variant else "")
        asked = {key: value for key, value in self.form().items() if key != "steps"}
        task = f" TASK={self.app.variant}" if self.app.variant else ""
        return f"""\
    from core import app, config
    from core.policy.flow import FlowPolicy, load_net
    acts = app.find({chosen}).acts
    model = config.Model(path={settings.path!r}, lora_rank={settings.lora_rank}, lora_alpha={settings.lora_alpha})
    policy = FlowPolicy(load_net(model, ".", acts.build), config.FlowRollout(**{asked}))
    pictures = policy.generate([acts.condition(row)], seeds=[0], steps={self.config.rollout.eval_steps})

Without Python: `make predict APP={name}{task} MODEL=<this folder> INPUT=<folder of pictures> OUTPUT=<folder>`.
"""

    @classmethod
    def requests(cls, app: App, source: Path, target: Path) -> tuple[Requests, list[Row]]:
        """A folder of pictures, see core/run/requests.py."""
        if not source.is_dir():
            raise ConfigError(f"INPUT={source} is no folder; give one with pictures and their instructions")
        if target.exists() and (not target.is_dir() or target.samefile(source)):
            raise ConfigError(f"OUTPUT={target} is a file, or INPUT= itself; give the name of another folder")
        return read_pictures(app, source)

    def answer(self, requests: Requests, rows: Sequence[Row], completions: Sequence[np.ndarray], target: Path) -> None:
        """<id>.png each, and predictions.jsonl."""
        folder = RunFolder(target)
        lines = [
            json.dumps(
                request | {"prediction": media.write_picture(folder, f"{request['id']}.png", picture)},
                ensure_ascii=False,
            )
            for request, picture in zip(requests, completions, strict=True)
        ]
        folder.write_text("predictions.jsonl", "\n".join(lines) + "\n")
