"""From reward components to one reward: what is done to components first (shape), and how they become one (aggregate).

All functions skip NaN (unscored, or not applicable) and treat further dimensions, the T decisions of an aligned policy,
one by one.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from core.objective.advantage import group_advantages
from core.objective.group import Group


def unshaped(rewards: Tensor, group: Group) -> Tensor:
    """Rewards as they are."""
    return rewards


def favour_unlikely(
    rewards: Tensor, group: Group, *, rank_weight: float = 0.25, rank_offset: Literal[0, 1] = 0
) -> Tensor:
    """The outcome of positive rollouts times 1 - rank_weight * (rank + rank_offset) / G; likely ones lose the most.

    rewards: (P, G, K) or (P, G, K, T), and returned so. rank: of a rollout's mean old log-probability in its group, 0 =
    least likely, G - 1 = most; ties share their mean rank. Unscored rollouts have no rank and leave G. rank_offset: 0 is
    the released code, 1 the text.
    In a group that is all right the ranks alone make spread: filter=outcome leaves such groups out.
    rank_weight: share that the likeliest rollout of a large group loses.
    Source: arXiv 2506.02355; read in the authors' code, the text's form through third parties.
    """
    likely = group.sequence_logps().masked_fill(~group.scored, torch.nan)
    below = (likely.unsqueeze(1) < likely.unsqueeze(2)).sum(2)
    ties = (likely.unsqueeze(1) == likely.unsqueeze(2)).sum(2)
    rank = (below + (ties - 1) / 2).to(rewards.dtype)
    factor = 1 - rank_weight * (rank + rank_offset) / group.scored.sum(dim=1, keepdim=True).clamp(min=1)
    outcome = rewards[:, :, group.outcome_index]
    factor = factor.view(*factor.shape, *[1] * (outcome.dim() - 2))
    shaped = rewards.clone()
    shaped[:, :, group.outcome_index] = torch.where(outcome > 0, outcome * factor, outcome)
    return shaped


def share_credit(
    rewards: Tensor, group: Group, *, credit: Literal["decision", "segment", "rollout"] = "decision"
) -> Tensor:
    """Rewards of single decisions, as they are, or as means over blocks of decisions or over whole rollouts.

    rewards: (P, G, K, T), and returned so. Means are over the decisions with mask 1 that the component applies to, and stand
    at every decision of the block; NaN where there are none. Of wide blocks the noise is less and so is the contrast.
    credit: what a decision is credited with: its own reward (decision), the mean of its block of group.segments (segment),
    the mean of all of the rollout (rollout), for which one reward per rollout, (P, G, K), will do as well.
    Raises ValueError for one reward per rollout with any other credit, and for credit=segment without segments.
    """
    if rewards.dim() == 3 and credit != "rollout":
        raise ValueError(
            f"credit={credit} needs one reward per decision, (P, G, K, T), and these are one per rollout; use credit=rollout"
        )
    if rewards.dim() == 3 or credit == "decision":
        return rewards
    if credit == "segment" and group.segments is None:
        raise ValueError(
            "credit=segment needs blocks of decisions, and the group has no segments; use decision or rollout"
        )
    counted = ~rewards.isnan()
    if group.mask is not None:
        counted = counted & group.mask.bool().view(*rewards.shape[:2], 1, -1)
    # In float64 a sum of rewards does not depend on their order, so that equal blocks have equal means to the bit.
    total, count = torch.where(counted, rewards, 0.0).double(), counted.double()
    if credit == "rollout":
        return (total.sum(3, keepdim=True) / count.sum(3, keepdim=True)).to(rewards.dtype).expand_as(rewards)
    block = group.segments.long().view(*rewards.shape[:2], 1, -1).expand_as(rewards)
    total, count = (torch.zeros_like(part).scatter_add(3, block, part) for part in (total, count))
    return (total / count).gather(3, block).to(rewards.dtype)


def weighted_sum(rewards: Tensor, group: Group) -> Tensor:
    """The plain total reward: the weighted sum of components, in which one that does not apply counts as 0.

    rewards: (P, G, K) or (P, G, K, T). Returns (P, G) or (P, G, T); NaN where no component applies.
    The weights are not renormalised over the components that apply.
    Source: TRL 1.16, sum_then_normalize; read in its code.
    """
    return _total(rewards, group.weights, rewards.isnan())


def decoupled_sum(rewards: Tensor, group: Group, *, ddof: Literal[0, 1] = 1, eps: float = 1e-4) -> Tensor:
    """The weighted sum of components that were each centred and scaled within their group.

    rewards: (P, G, K) or (P, G, K, T). Returns (P, G) or (P, G, T); NaN where no component applies. Keeps combinations
    apart that have the same total, and erases each component's own scale: a wrong answer may outscore a right one.
    ddof: a component's variance is divided by n - ddof. eps: added to its standard deviation.
    Raises ValueError if G < 2. Source: arXiv 2601.05242; read in TRL 1.16's code (normalize_then_sum).
    """
    return _total(group_advantages(rewards, ddof=ddof, eps=eps), group.weights, rewards.isnan())


def group_range_sum(rewards: Tensor, group: Group) -> Tensor:
    """The weighted sum of components, each stretched within its group: 0 = the worst there, 1 = the best, 1/2 if all agree.

    rewards: (P, G, K) or (P, G, K, T). Returns (P, G) or (P, G, T); NaN where no component applies. Units do not matter
    (decibels beside shares), nor do outliers of other groups; a small spread counts as much as a large one.
    Source: arXiv 2603.16769; read in the authors' code, whose weights differ by image and whose groups without spread are
    NaN.
    """
    missing = rewards.isnan()
    low = rewards.masked_fill(missing, torch.inf).amin(dim=1, keepdim=True)
    span = rewards.masked_fill(missing, -torch.inf).amax(dim=1, keepdim=True) - low
    ranged = torch.where(span > 0, (rewards - low) / span, 0.5)
    return _total(ranged.masked_fill(missing, torch.nan), group.weights, missing)


def gated_mean(rewards: Tensor, group: Group, *, gate: str = "safety", passing: float = 0.5) -> Tensor:
    """The weighted mean of the components that apply, times the sum of weights; where the gate is below `passing`, gate - 1.

    rewards: (P, G, K) or (P, G, K, T) in [0, 1]. Returns (P, G) or (P, G, T); NaN where no component with a weight applies.
    gate: the component that decides. What it stops ranks below all it lets through, whatever the others say; where it
    does not apply it stops nothing.
    passing: least value of the gate that lets through.
    Raises ValueError if no component has that name, or if a weight is negative.
    Source: arXiv 2503.21819 names the axes; the formula is ours.
    """
    if (group.weights < 0).any():
        raise ValueError(f"a gate needs weights >= 0, and one is {group.weights.min():g}; reward the opposite instead")
    missing = rewards.isnan()
    weights = group.weights.view(-1, *[1] * (rewards.dim() - 3))
    present = torch.where(missing, 0.0, weights).sum(dim=2)
    mean = _total(rewards, group.weights, missing) * group.weights.sum() / present
    decides = rewards[:, :, group.index(gate)]
    return torch.where((decides < passing) & ~mean.isnan(), decides - 1, mean)


def _total(values: Tensor, weights: Tensor, missing: Tensor) -> Tensor:
    """(P, G, K, ...) -> (P, G, ...): weighted nansum over K; NaN where all that have a weight are missing."""
    weights = weights.view(-1, *[1] * (values.dim() - 3))
    return (values * weights).nansum(dim=2).masked_fill((missing | (weights == 0)).all(dim=2), torch.nan)
