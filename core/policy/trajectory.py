"""What a trajectory is, and what the policies that make them share (core/train/trajectory.py trains them).

The policy of a trajectory is aligned: decision t is the same question in every rollout of a group (a denoising step, the
class of a cell). A policy has two calls: `rollout` acts, without gradient; `forward` says how likely some of the decisions
are under the weights of now. The gradient path *is* `forward`, because DDP and FSDP hook only that.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from core.config import ConfigError, Rollout

if TYPE_CHECKING:
    from core.objective.recipes import Recipe


@dataclass
class Trajectory:
    """B rollouts of T decisions; every tensor has first dimension B.

    logps: (B, T) nats, under the policy that sampled. mask: (B, T), 1 on decisions that carry loss.
    state: what `forward` needs of each rollout. outputs: what a reward sees, B arrays.
    estimates: T lists of B arrays, what each decision promises the output to be; None if not asked for, or if rewards say
    themselves what each decision is worth.
    unit: how many decisions, from the first, one pass of the net makes together; it divides T. segments: (B, T) int, decisions
    of one block have one number; None if there are no blocks.
    """

    logps: Tensor
    mask: Tensor
    state: dict[str, Tensor]
    outputs: list[np.ndarray] = field(default_factory=list)
    estimates: list[list[np.ndarray]] | None = None
    unit: int = 1
    segments: Tensor | None = None

    def rows(self, rows: slice) -> Trajectory:
        """Some of the rollouts, without their outputs."""
        segments = None if self.segments is None else self.segments[rows]
        state = {name: part[rows] for name, part in self.state.items()}
        return Trajectory(self.logps[rows], self.mask[rows], state, unit=self.unit, segments=segments)


@dataclass
class Decisions:
    """Of t decisions of B rollouts, with gradient.

    logps: (B, t) nats. entropy: (B, t) nats. weight: (B, t), multiplies the surrogate and no regularizer.
    extras: per-row tensors that the recipe's loss asked for in `needs` (first dimension B, second t). One that also stands in
    the trajectory's `state` is what was so when it was sampled.
    """

    logps: Tensor
    entropy: Tensor | None = None
    weight: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Those that may carry gradient, by name; (B, t, ...) each."""
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "extras"}
        return {name: value for name, value in {**named, **self.extras}.items() if value is not None}

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> tuple[Self, dict[str, Tensor]]:
        """The decisions of all parts of the same rollouts as one, and its tensors as leaves of a graph."""
        named = [part.tensors() for part in parts]
        leaves = {name: torch.cat([part[name] for part in named], dim=1).requires_grad_() for name in named[0]}
        extras = {name: leaves[name] for name in parts[0].extras}
        return cls(leaves["logps"], leaves.get("entropy"), leaves.get("weight"), extras), leaves


class TrajectoryModule(nn.Module):
    """A net with the way it acts. `asks`: names of core.objective needs that change what is kept.

    net: its parameters with gradient are what learns. It has `save(folder)` and `restore(folder)`, and `reference()`, a context
    in which it is as it was before training, which raises ValueError if it has no adapter to turn off.
    half: compute in bfloat16, in rollouts and in `forward` alike.
    """

    provides: ClassVar[frozenset[str]]  # what it can give a recipe, see core.objective.composition.GIVES

    def __init__(self, net: nn.Module, settings: Rollout, half: bool = False):
        super().__init__()
        self.net, self.settings, self.half = net, settings, half
        self._averaged: dict[str, Tensor] = {}
        self._reference: list[nn.Module] = []  # a list hides the copy from parameters() and state_dict()
        self.eval()  # no dropout, also while training: a decision must weigh the same twice

    @classmethod
    def refuse(cls, recipe: Recipe, settings: Rollout) -> None:
        """Raise ConfigError for settings that are at odds with a recipe, or with its training."""

    # -- acting, which each kind does in its own way --------------------------------------------------------------------

    def rollout(
        self,
        conditions: Sequence[Any],
        group_size: int,
        seeds: Sequence[int],
        *,
        batch: int = 0,
        batch_size: int | None = None,
        asks: frozenset[str] = frozenset(),
    ) -> Trajectory:
        """group_size rollouts of each condition, row p * group_size + g; no gradient.

        seeds: one a condition, all that its rollouts' chance depends on, so that ranks need not agree on a generator.
        batch: which generation batch of the run this is (a window may move, T may grow). batch_size: rollouts in one forward
        pass.
        """
        raise NotImplementedError

    def forward(self, trajectory: Trajectory, steps: slice = slice(None)) -> Decisions:
        """The decisions `steps` of every row under the weights of now; steps start and end at multiples of the unit."""
        raise NotImplementedError

    @property
    def units(self) -> int:
        """Units of decisions in a rollout, at most."""
        raise NotImplementedError

    unmeasured = False  # True: `measure` must be called before the first rollout

    def measure(
        self,
        conditions: Sequence[Any],
        group_size: int,
        seeds: Sequence[int],
        *,
        batch_size: int | None = None,
        judge: Callable[[list[np.ndarray]], Tensor],
    ) -> dict[str, float]:
        """Settles what is left open until there are rollouts to look at; returns what to log of it.

        judge: outputs -> (P, G) total rewards of the groups of all ranks that could be judged.
        """
        raise NotImplementedError

    # -- training -------------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode: dropout would make the first ratio differ from 1."""
        return super().train(False)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """What trainer.gradient_checkpointing calls. Raises ConfigError if the net cannot."""
        if not hasattr(self.net, "gradient_checkpointing_enable"):
            raise ConfigError(
                f"trainer.gradient_checkpointing=true: a {type(self.net).__name__} cannot compute its blocks again; remove it"
            )
        self.net.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    # -- other weights than those of now ----------------------------------------------------------------------------------

    def keep_reference(self) -> None:
        """From now on the reference is the policy of now: an adapter that can be turned off, or a frozen copy."""
        try:
            with self.net.reference():
                pass
        except ValueError:
            self._reference[:] = [copy.deepcopy(self.net).requires_grad_(False)]

    @contextlib.contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The net as it was when it was kept, while the block runs."""
        if self._reference:
            yield self._reference[0]
        else:
            with self.net.reference():
                yield self.net

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.net.named_parameters() if p.requires_grad}

    def average(self, decay: float) -> None:
        """Moves the averaged weights towards those of now by 1 - decay; the first call copies them.

        They are float32 at least: in bfloat16 a thousandth of the way rounds to none.
        """
        for name, p in self.trained().items():
            now = p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            self._averaged[name] = self._averaged[name].lerp_(now, 1 - decay) if name in self._averaged else now

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place of those of now, if there are any."""
        trained = self.trained() if self._averaged else {}
        now = {name: p.detach().clone() for name, p in trained.items()}
        try:
            with torch.no_grad():
                for name, p in trained.items():
                    p.copy_(self._averaged[name])
            yield
        finally:
            with torch.no_grad():
                for name, p in trained.items():
                    p.copy_(now[name])

    def memory(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the net's weights."""
        return {"averaged": self._averaged}

    def remember(self, memory: Mapping[str, Any]) -> None:
        self._averaged = dict(memory["averaged"])

    def save(self, folder: Path) -> None:
        """The net as evaluations see it."""
        with self.averaged():
            self.net.save(Path(folder))


def slices(count: int, size: int | None) -> list[slice]:
    """0..count in parts of at most `size`."""
    size = size or max(count, 1)
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def joined(parts: Sequence[Trajectory]) -> Trajectory:
    """The rollouts of several trajectories of equally many decisions, one after the other."""
    estimates = segments = None
    if parts[0].estimates is not None:
        steps = zip(*(part.estimates for part in parts), strict=True)
        estimates = [[output for part in step for output in part] for step in steps]
    if parts[0].segments is not None:
        segments = torch.cat([part.segments for part in parts])
    return Trajectory(
        torch.cat([part.logps for part in parts]),
        torch.cat([part.mask for part in parts]),
        {name: torch.cat([part.state[name] for part in parts]) for name in parts[0].state},
        [output for part in parts for output in part.outputs],
        estimates,
        parts[0].unit,
        segments,
    )
