"""From rewards to advantages: components into one reward, reward minus baseline, divided by a scale.

    z = (r - baseline) / (std + eps)        baseline and std over the G rollouts of a prompt, or over the whole batch

All functions skip NaN (unscored, or not applicable) and treat further dimensions, the T decisions of an aligned policy,
one by one. In float32 they follow TRL 1.16's order of operations and give its bits, with one exception: a group without
spread gets exactly 0, where TRL leaves the rounding error of its mean, divided by eps (eight rewards of 0.7: 6e-4
each, which Adam would turn into full-size steps if every group were like that).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from core.objective.group import Group

Baseline = Literal["mean", "leave_one_out", "batch", "none"]
Scale = Literal["group", "batch", "none"]
Filter = Literal["none", "outcome"]


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
    Raises ValueError if G < 2. Source: arXiv 2601.05242; read in TRL 1.16's code (normalize_then_sum).
    """
    return _total(group_advantages(rewards, ddof=ddof, eps=eps), group.weights, rewards.isnan())


def group_advantages(
    reward: Tensor,
    group: Group | None = None,
    *,
    baseline: Baseline = "mean",
    scale: Scale = "group",
    ddof: Literal[0, 1] = 1,
    eps: float = 1e-4,
) -> Tensor:
    """Rewards minus a baseline, divided by a standard deviation.

    reward: (P, G) or (P, G, ...); NaN = unscored, out of all statistics. group: not looked at, given to every slot.
    baseline: mean of the group; mean of the *other* rollouts of the group; mean of the batch; none.
    scale: standard deviation (divisor n - ddof) of the group or of the batch, plus eps; none.
    Returns the shape of `reward`, finite: 0 for unscored rollouts and, with a baseline of the group, for groups
    without spread and for a group's only scored rollout.
    Raises ValueError if G < 2 and a statistic of the group is asked for.
    Source: arXiv 2402.03300 (mean, group), 2402.14740 (leave one out), 2503.20783 (no scale); read in TRL 1.16's code.
    """
    within_group = baseline in ("mean", "leave_one_out")
    if reward.shape[1] < 2 and (within_group or scale == "group"):
        raise ValueError(
            f"group_size={reward.shape[1]} has no group statistics (baseline={baseline}, scale={scale}); use 2 or more"
        )
    batch = reward.flatten(0, 1)
    if baseline == "mean":
        centred = reward - torch.nanmean(reward, dim=1, keepdim=True)
    elif baseline == "leave_one_out":
        scored = (~reward.isnan()).sum(dim=1, keepdim=True)
        centred = reward - (torch.nansum(reward, dim=1, keepdim=True) - reward) / (scored - 1)
    elif baseline == "batch":
        centred = reward - torch.nanmean(batch, dim=0)
    else:
        centred = reward
    if within_group:
        centred = torch.where(no_spread(reward), 0.0, centred)
    if scale == "group":
        centred = centred / (_nanstd(reward, 1, ddof) + eps)
    elif scale == "batch":
        centred = centred / (_nanstd(batch, 0, ddof) + eps)
    return torch.nan_to_num(centred, nan=0.0)


def keep_groups(group: Group, *, filter: Filter = "none") -> Tensor:
    """Which rollouts stay in the loss: all of them, or those of groups whose *outcome* has spread.

    Returns (P, 1) or (P, G) bool. The outcome decides alone, by exact equality: spread in other components does not
    save a group. A dropped row leaves the counts, so the step does not shrink (the effect of dynamic sampling in
    arXiv 2503.14476, read in its text, without sampling again).
    Raises ValueError if filter is "outcome" and the group names no outcome.
    """
    if filter == "none":
        return torch.ones_like(group.scored[:, :1])
    if group.outcome is None:
        raise ValueError("filter=outcome needs the index of the outcome component, and this group names none")
    return ~_whole_group(no_spread(group.rewards[:, :, group.outcome]))


def no_spread(reward: Tensor) -> Tensor:
    """True where all scored rollouts of a group have exactly one reward, or there are fewer than two.

    reward: (P, G, ...) with NaN = unscored. Returns (P, 1, ...) bool.
    """
    unscored = reward.isnan()
    low = reward.masked_fill(unscored, torch.inf).amin(dim=1, keepdim=True)
    high = reward.masked_fill(unscored, -torch.inf).amax(dim=1, keepdim=True)
    return high <= low


def credit_metrics(group: Group, advantage: Tensor, keep: Tensor) -> dict[str, float]:
    """The metrics of `Credit`: how much of the batch can teach. advantage: (P, G) or (P, G, T); keep: (P, G) bool."""
    kept = advantage[keep]
    if kept.dim() == 2 and group.mask is not None:
        kept = kept[group.mask.view(*keep.shape, -1)[keep].bool()]
    shares = {
        "zero_spread": _whole_group(no_spread(weighted_sum(group.rewards, group))).float().mean(),
        "unscored": 1 - group.scored.float().mean(),
        "dropped": 1 - keep.float().mean(),
        "advantage_std": kept.std(correction=0) if kept.numel() else kept.sum(),
    }
    if group.outcome is not None:
        shares["zero_spread_outcome"] = _whole_group(no_spread(group.rewards[:, :, group.outcome])).float().mean()
    return dict(zip(shares, torch.stack([value.float() for value in shares.values()]).tolist(), strict=True))


def _total(values: Tensor, weights: Tensor, missing: Tensor) -> Tensor:
    """(P, G, K, ...) -> (P, G, ...): weighted nansum over K; NaN where all K are missing."""
    total = (values * weights.view(-1, *[1] * (values.dim() - 3))).nansum(dim=2)
    return total.masked_fill(missing.all(dim=2), torch.nan)


def _nanstd(values: Tensor, dim: int, ddof: int) -> Tensor:
    """Standard deviation that skips NaN, with divisor n - ddof, keepdim; NaN if n <= ddof. TRL's nanstd for ddof=1."""
    mean = torch.nanmean(values, dim=dim, keepdim=True)
    variance = torch.nanmean((values - mean) ** 2, dim=dim, keepdim=True)
    count = (~values.isnan()).sum(dim=dim, keepdim=True).to(values.dtype)  # TRL's int / int is float32 even for float64
    correction = torch.where(count > ddof, count / (count - ddof), torch.nan)
    return torch.sqrt(variance * correction)


def _whole_group(flags: Tensor) -> Tensor:
    """(P, 1) or (P, 1, T) bool -> (P, 1): true of every decision."""
    return flags if flags.dim() == 2 else flags.all(dim=2)
