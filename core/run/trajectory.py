"""What runs of trajectory policies (flows, forecasts) have in common: one trainer, and completions that are arrays."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from core.app import App, Completion, Row
from core.batch import Batch
from core.config import Config
from core.objective.recipes import Recipe
from core.policy.trajectory import TrajectoryModule
from core.run import media
from core.run.actor import Actor
from core.run.folder import RunFolder
from core.run.progress import Progress
from core.train.trajectory import TrajectoryTrainer
from core.train.trajectory_arguments import check
from core.train.warmup import quiet

if TYPE_CHECKING:
    from core.run.evaluate import Judge


@dataclass(frozen=True)
class TrajectoryActor(Actor):
    """policy: the class of `model`."""

    policy: ClassVar[type[TrajectoryModule]]
    model: TrajectoryModule

    @classmethod
    def refuse(cls, app: App, config: Config, batch: Batch, recipe: Recipe, weights: Mapping[str, float]) -> None:
        with quiet():
            check(config, batch, recipe, weights, app.outcome, cls.policy)

    @classmethod
    def warnings(cls, config: Config) -> list[str]:
        model = config.model
        if model.dtype == "bfloat16" and model.path != "tiny" and not model.lora_rank and config.optim.lr < 1e-4:
            return [
                f"model.dtype=bfloat16 trains all weights in bfloat16, whose steps are 1/256 of a weight: at optim.lr="
                f"{config.optim.lr:g} most updates round to nothing. Use model.dtype=float32 or model.lora_rank=32"
            ]
        return []

    def save(self, folder: Path, weights: Any = None) -> None:
        self.model.save(folder)

    def fitting(self, rows: Sequence[Row], progress: Progress) -> list[Row]:
        return list(rows)

    def seeds(self, places: Sequence[int], draw: int) -> list[int]:
        """Of answer number `draw` to the rows of these places: of the run's seed, the place and `draw` alone."""
        return [(self.config.run.seed * 1009 + draw) * 1_000_003 + place for place in places]

    @abstractmethod
    def drawn(self, rows: Sequence[Row], outputs: Sequence[np.ndarray]) -> list[Completion]:
        """What rollouts.parquet holds of one group's rollouts, or of its first ones: pictures, or text."""

    def trainer(
        self,
        rows: Sequence[Row],
        judge: Judge,
        recipe: Recipe,
        batch: Batch,
        folder: RunFolder,
        callbacks: Sequence[Any],
    ) -> TrajectoryTrainer:
        by_id = {str(row["id"]): row for row in rows}

        def on_rollouts(step: int, columns: dict[str, list]) -> None:
            outputs = [output for output in columns.pop("output") if output is not None]
            shown = self.drawn([by_id[name] for name in columns["prompt_id"][: len(outputs)]], outputs)
            columns["completion"][: len(shown)] = [
                media.entry(folder, f"samples/rollouts/step-{step:06d}-{i:02d}.png", one) for i, one in enumerate(shown)
            ]
            folder.log_rollouts(step, columns)

        return TrajectoryTrainer(
            policy=self.model,
            condition=self.app.acts.condition,
            rows=rows,
            scorer=judge.rewards,
            weights=judge.weights,
            outcome=self.app.outcome,
            recipe=recipe,
            config=self.config,
            batch=batch,
            output=folder.path / "checkpoints",
            on_rollouts=on_rollouts,
            on_not_finite=lambda step, rows: folder.write_json(f"samples/not-finite-{step:06d}.json", rows),
            callbacks=callbacks,
        )
