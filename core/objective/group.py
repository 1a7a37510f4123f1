"""Whole groups, as they exist once per generation batch, and the credit that is given to their rollouts.

P prompts, G rollouts per prompt, B = P * G rows (row p * G + g is rollout g of prompt p), T decisions, K components.
NaN in `rewards` means "this component does not apply here". A rollout of which every component is NaN, or whose check
failed, is *unscored*: it is out of every baseline, and gets advantage 0 and keep 0. Components of weight 0 do not count
in this: recipes may look at them by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Model(Protocol):
    """What only the policy's model can say of the rollouts; asked during credit, by the recipes that need it."""

    def tempered_logps(self, temperature: float) -> Tensor:
        """(B, T) nats: of the sampled decisions, had logits been divided by `temperature` times the sampler's own."""

    def influence(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """core.objective.modulation.token_influence of every group; right: (P, G) bool. Returns (B, T) twice."""

    def teach(self, taught: Tensor, right: Tensor) -> Tensor:
        """(B, T) nats: the entropy of the teacher, who has seen a right rollout, at each decision of `taught` rollouts.

        taught, right: (P, G) bool. The loss of these rows then finds `distillation`, (B, T), in its extras: KL(policy ||
        teacher) over all that could have been decided, with gradient.
        """


@dataclass
class Group:
    """What `Recipe.credit` sees: all groups of a generation batch, gathered over ranks; nothing of the new policy.

    rewards: (P, G, K) float, or (P, G, K, T) if `aligned`; NaN = not applicable. Failed rollouts become all NaN.
    weights: (K,) float, one weight per component.
    mask: (B, T), 1 on decisions that carry loss. old_logps: (B, T), nats.
    aligned: decision t is the same question in every rollout of a group (flow, forecast), so each may have a reward.
    failed: (P, G) bool, True where a check could not judge the rollout.
    names: K component names. outcome: index of the component that is the task's own success.
    task: (P,) int, which task a prompt belongs to; None = all the same.
    segments: (B, T) int, 0 <= number < T; decisions of one block have one number within their row. None = no blocks.
    model: answers what rewards and log-probabilities do not hold. seed: of what a recipe draws; the same on all ranks.
    Raises ValueError for shapes that do not fit, old_logps without a mask, segments that are no such numbers, infinite
    rewards or weights, and (P, G, K, T) on an unaligned group.
    """

    rewards: Tensor
    weights: Tensor
    mask: Tensor | None = None
    old_logps: Tensor | None = None
    aligned: bool = False
    failed: Tensor | None = None
    names: tuple[str, ...] = ()
    outcome: int | None = None
    task: Tensor | None = None
    segments: Tensor | None = None
    model: Model | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        shape = tuple(self.rewards.shape)
        if self.rewards.dim() not in (3, 4) or not self.rewards.is_floating_point():
            raise ValueError(f"rewards are {self.rewards.dtype} {shape}; they must be float (P, G, K) or (P, G, K, T)")
        if self.rewards.dim() == 4 and not self.aligned:
            raise ValueError(
                f"rewards of shape {shape} hold one value per decision, but the policy is not aligned: decision t is a "
                "different question in each rollout, so it has no group baseline; give one reward per rollout"
            )
        prompts, size, components = shape[:3]
        self.weights = self.weights.to(self.rewards)
        if self.weights.shape != (components,):
            raise ValueError(f"{tuple(self.weights.shape)} weights for {components} reward components; give one each")
        if self.names and len(self.names) != components:
            raise ValueError(f"{len(self.names)} names for {components} reward components: {', '.join(self.names)}")
        if self.outcome is not None and not 0 <= self.outcome < components:
            raise ValueError(f"outcome={self.outcome} is not the index of one of {components} reward components")
        if self.failed is not None:
            if self.failed.shape != (prompts, size):
                raise ValueError(f"failed has shape {tuple(self.failed.shape)}; expected {(prompts, size)}")
            where = self.failed.bool().view(prompts, size, *[1] * (self.rewards.dim() - 2))
            self.rewards = self.rewards.masked_fill(where, torch.nan)
        for name, rows in (("mask", self.mask), ("old_logps", self.old_logps), ("segments", self.segments)):
            if rows is not None and (
                rows.dim() != 2 or len(rows) != prompts * size or rows.shape[1:] != (shape[3:] or rows.shape[1:])
            ):
                decisions = shape[3] if len(shape) == 4 else "T"
                raise ValueError(f"{name} has shape {tuple(rows.shape)}; expected ({prompts * size}, {decisions})")
        if self.old_logps is not None and (self.mask is None or self.mask.shape != self.old_logps.shape):
            mask = None if self.mask is None else tuple(self.mask.shape)
            raise ValueError(f"old_logps of shape {tuple(self.old_logps.shape)} need a mask of that shape, not {mask}")
        if self.segments is not None:
            self._check_segments()
        if self.task is not None and self.task.shape != (prompts,):
            raise ValueError(f"task has shape {tuple(self.task.shape)}; expected {(prompts,)}")
        for k in range(components):
            if self.rewards[:, :, k].isinf().any() or not self.weights[k].isfinite():
                what = "weight" if not self.weights[k].isfinite() else "reward"
                raise ValueError(f"reward component {self._name(k)} has a {what} that is not finite; bound it")

    @property
    def scored(self) -> Tensor:
        """(P, G) bool: rollouts to which at least one component applies that has a weight."""
        counted = self.rewards[:, :, self.weights != 0]
        return ~counted.isnan().flatten(2).all(dim=2)

    @property
    def outcome_index(self) -> int:
        """Which component is the task's own success. Raises ValueError if none is."""
        if self.outcome is None:
            raise ValueError("this objective looks at the outcome component, and the group names none; set outcome=")
        return self.outcome

    def index(self, name: str) -> int:
        """Which component has this name. Raises ValueError if none has."""
        if name not in self.names:
            raise ValueError(f"no reward component is called {name!r}; there are: {', '.join(self.names)}")
        return self.names.index(name)

    def right(self, success: float) -> Tensor:
        """(P, G) bool: rollouts whose outcome is at least `success`; of several decisions, their mean."""
        outcome = self.rewards[:, :, self.outcome_index]
        return (outcome if outcome.dim() == 2 else outcome.nanmean(dim=2)) >= success

    def sequence_logps(self) -> Tensor:
        """(P, G): the mean old log-probability of a rollout's decisions, nats; 0 of an empty one."""
        mask = self.mask.to(self.old_logps.dtype)
        total = torch.where(self.mask.bool(), self.old_logps, 0.0).sum(1)
        return (total / mask.sum(1).clamp(min=1.0)).view(self.rewards.shape[:2])

    def _check_segments(self) -> None:
        numbers = self.segments
        if self.mask is not None and numbers.shape != self.mask.shape:
            raise ValueError(f"segments of shape {tuple(numbers.shape)} do not fit a mask of {tuple(self.mask.shape)}")
        if numbers.is_floating_point() or numbers.dtype == torch.bool:
            raise ValueError(f"segments are {numbers.dtype}; they must be whole numbers, one for each block of a row")
        if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < numbers.shape[1]:
            raise ValueError(
                f"segments go from {numbers.min()} to {numbers.max()}; a row of {numbers.shape[1]} decisions has at most as "
                f"many blocks: number them from 0 to {numbers.shape[1] - 1}"
            )

    def _name(self, k: int) -> str:
        return repr(self.names[k]) if self.names else f"{k}"


@dataclass
class Credit:
    """What a group's rollouts are worth, row by row.

    advantage: (B,) or (B, T) float, finite; 0 where keep is 0. keep: (B,) in {0, 1}, the advantage's dtype.
    extras: per-row tensors, first dimension B, that the recipe's loss will need.
    metrics: shares in [0, 1] `zero_spread` (groups whose total reward has no spread), `zero_spread_outcome` (the same
    of the outcome component, if there is one), `unscored` and `dropped` (rows with keep 0, the unscored included); and
    `advantage_std` over kept rows.
    """

    advantage: Tensor
    keep: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
