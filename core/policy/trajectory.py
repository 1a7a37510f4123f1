"""What a trajectory is, and what the trainer asks of a policy that makes them (core/train/trajectory.py).

The policy of a trajectory is aligned: decision t is the same question in every rollout of a group (a denoising step, the
class of a cell). A policy is an nn.Module with two calls: `rollout` acts, without gradient; `forward` says how likely
some of the decisions are under the weights of now. The gradient path *is* `forward`, because DDP and FSDP hook only that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor


@dataclass
class Trajectory:
    """B rollouts of T decisions; every tensor has first dimension B.

    logps: (B, T) nats, under the policy that sampled. mask: (B, T), 1 on decisions that carry loss.
    state: what `forward` needs of each rollout. outputs: what a reward sees, B arrays.
    estimates: T lists of B arrays, what each decision promises the output to be; None if not asked for.
    """

    logps: Tensor
    mask: Tensor
    state: dict[str, Tensor]
    outputs: list[np.ndarray] = field(default_factory=list)
    estimates: list[list[np.ndarray]] | None = None

    def rows(self, rows: slice) -> Trajectory:
        """Some of the rollouts, without their outputs."""
        return Trajectory(self.logps[rows], self.mask[rows], {name: part[rows] for name, part in self.state.items()})


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


class TrajectoryPolicy(Protocol):
    """An nn.Module whose rollouts are trajectories. `asks`: names of core.objective needs that change what is kept."""

    def rollout(
        self,
        conditions: Sequence[Any],
        group_size: int,
        seeds: Sequence[int],
        *,
        batch: int,
        batch_size: int | None = None,
        asks: frozenset[str] = frozenset(),
    ) -> Trajectory:
        """group_size rollouts of each condition, row p * group_size + g; no gradient.

        seeds: one a condition, all that its rollouts' chance depends on, so that ranks need not agree on a generator.
        batch: which generation batch of the run this is (a window may move). batch_size: rollouts in one forward pass.
        """

    def forward(self, trajectory: Trajectory, steps: slice) -> Decisions:
        """The decisions `steps` of every row under the weights of now."""
