"""What of a run depends on the kind of policy: one interface, and a class for each kind (language.py, flow.py, forecast.py).

An actor is a policy of one app under one config, loaded. All other files of core/run read the same for every kind: where
kinds differ, they ask the actor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from transformers import Trainer

from core.app import App, Completion, Flow, Forecast, Row
from core.batch import Batch
from core.config import Config
from core.objective.recipes import Recipe
from core.run.folder import RunFolder
from core.run.progress import Progress
from core.train.arguments import refuse_few_prompts

if TYPE_CHECKING:
    from core.run.evaluate import Judge

Requests = list[dict[str, Any]]


@dataclass(frozen=True)
class Actor(ABC):
    """model: the module that learns."""

    app: App
    config: Config
    model: torch.nn.Module

    # -- before any work ------------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def refuse(cls, app: App, config: Config, batch: Batch, recipe: Recipe, weights: Mapping[str, float]) -> None:
        """Raise ConfigError for what this kind's policy or trainer cannot do. weights: {component: weight}."""

    @classmethod
    def refuse_few(cls, rows: int, batch: Batch) -> None:
        """Raise ConfigError if so many training rows do not fill one generation batch."""
        refuse_few_prompts(rows, batch)

    @classmethod  # noqa: B027
    def refuse_rows(cls, app: App, config: Config, rows: Sequence[Row]) -> None:
        """Raise ConfigError for rows that this config does not fit."""

    @classmethod
    def warnings(cls, config: Config) -> list[str]:
        """Sentences on a config that runs, but hardly as it was meant."""
        return []

    # -- where a policy comes from ----------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def load(cls, app: App, config: Config, path: str | Path | None = None) -> Self:
        """The policy of `path` (default model.path): what `save` wrote, or somebody else's. Raises ConfigError."""

    @classmethod
    @abstractmethod
    def build(cls, app: App, config: Config, rows: Sequence[Row], labels: Sequence[Completion]) -> Self:
        """A small one from nothing (model.path=tiny), for these rows and what will be imitated."""

    @classmethod
    @abstractmethod
    def start_needs(cls, config: Config) -> list[Any]:
        """What a warm start depends on beside app, model, warmup, data, task options and seed."""

    @abstractmethod
    def imitate(
        self,
        rows: Sequence[Row],
        labels: Sequence[Completion],
        output: Path,
        on_log: Callable[[int, dict[str, float]], None],
    ) -> None:
        """Supervised steps on the model, in place. on_log: (step, metrics with `loss`). Raises ConfigError if it diverges."""

    @abstractmethod
    def save(self, folder: Path, weights: Any = None) -> None:
        """All that `load` needs. weights: of a model that is spread over ranks."""

    def having(self, model: torch.nn.Module) -> Self:
        """The same with another model: the one that a trainer holds."""
        return replace(self, model=model)

    # -- acting -----------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def how(self) -> str:
        """The way `complete` answers, in a word or two."""

    @abstractmethod
    def complete(self, rows: Sequence[Row], places: Sequence[int]) -> tuple[Sequence[Completion], list[bool]]:
        """The answer to each row, the same on every call, and whether it was cut off. places: the rows' numbers among all."""

    @abstractmethod
    def draws(self, rows: Sequence[Row], places: Sequence[int], count: int) -> list[Sequence[Completion]]:
        """`count` answers by chance to every row: so many sequences in the order of the rows."""

    @abstractmethod
    def fitting(self, rows: Sequence[Row], progress: Progress) -> list[Row]:
        """The training rows that the policy has room for; others are counted aloud. Raises ConfigError if none is left."""

    # -- learning ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def trainer(
        self,
        rows: Sequence[Row],
        judge: Judge,
        recipe: Recipe,
        batch: Batch,
        folder: RunFolder,
        callbacks: Sequence[Any],
    ) -> Trainer:
        """GRPO on the model; checkpoints, rollouts and what was not finite go to `folder`."""

    # -- what is left of it -------------------------------------------------------------------------------------------------

    @abstractmethod
    def keep(self, folder: RunFolder, name: str, rows: Sequence[Row], completions: Sequence[Completion]) -> list[str]:
        """The rows' completions as JSON can hold them; what is no text is written below samples/, under this name."""

    @abstractmethod
    def kept(self, folder: RunFolder, rows: Sequence[Row], texts: Sequence[str]) -> Sequence[Completion]:
        """What `keep` kept of the same rows."""

    @abstractmethod
    def form(self) -> dict[str, Any]:
        """How the model wants to be asked, for prompt.json."""

    @property
    @abstractmethod
    def card(self) -> str:
        """What the model card says on loading model/, indented as code."""

    # -- answering requests (make predict) ----------------------------------------------------------------------------------

    def refuse_requests(self) -> None:  # noqa: B027
        """Raise ConfigError if this policy answers no requests."""

    @classmethod
    @abstractmethod
    def requests(cls, app: App, source: Path, target: Path) -> tuple[Requests, list[Row]]:
        """What INPUT= asks, and the rows that the app makes of it. Raises ConfigError for paths or requests that will not do."""

    @abstractmethod
    def answer(self, requests: Requests, rows: Sequence[Row], completions: Sequence[Completion], target: Path) -> None:
        """Writes each request with its prediction to OUTPUT=. rows: prepared ones, of the requests."""


def actor_of(app: App) -> type[Actor]:
    """The class of the app's kind of policy."""
    if isinstance(app.acts, Flow):
        from core.run.flow import FlowActor  # with diffusers, which other apps do without

        return FlowActor
    if isinstance(app.acts, Forecast):
        from core.run.forecast import ForecastActor

        return ForecastActor
    from core.run.language import LanguageActor

    return LanguageActor
