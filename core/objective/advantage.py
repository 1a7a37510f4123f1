"""From rewards to advantages: reward minus baseline, divided by a scale; and which groups stay.

    z = (r - baseline) / (std + eps)        baseline and std over the G rollouts of a prompt, or over the whole batch

A group's own standard deviation makes its advantages alike whatever its rewards differ by. Where a decision has few outcomes,
as a cell of a forecast that is right or wrong, that cancels what each costs: scale=pooled divides all alike.

All functions skip NaN (unscored, or not applicable) and treat further dimensions, the T decisions of an aligned policy,
one by one; but medians are refused there, and `anchored_values` sums along them. In float32 `group_advantages` follows TRL
1.16's order of operations and gives its bits, with one exception: a group (baseline=batch: a batch) without spread gets
exactly 0, where TRL leaves the rounding error of its mean, divided by eps (eight rewards of 0.7: 6e-4 each, which Adam
would turn into full-size steps if every group were like that).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from core.objective.group import Group

Baseline = Literal["mean", "leave_one_out", "log_mean_exp", "batch", "none"]
Scale = Literal["group", "batch", "pooled", "none"]
Filter = Literal["none", "outcome", "all_right"]


def group_advantages(
    reward: Tensor,
    group: Group | None = None,
    *,
    baseline: Baseline = "mean",
    scale: Scale = "group",
    ddof: Literal[0, 1] = 1,
    eps: float = 1e-4,
    tau: float = 1.0,
    limit: float | None = None,
) -> Tensor:
    """Rewards minus a baseline, divided by a standard deviation.

    reward: (P, G) or (P, G, ...); NaN = unscored, out of all statistics. group: looked at by scale=pooled alone, which
    leaves out the decisions that its mask leaves out.
    baseline: mean of the group; mean of the *other* rollouts of the group; tau * log(mean(exp(r / tau))) of the group,
    which leans towards the best; mean of the batch; none.
    scale: standard deviation (divisor n - ddof) of the group, or of the batch at the same decision; pooled, one number for
    all, the root mean square of the batch's centred rewards, so that what costs twice as much pushes twice as much; none.
    ddof: the variance is divided by n - ddof. eps: added to the scale. tau: of log_mean_exp; small is near
    the greatest reward of the group, large near its mean. limit: greatest size of an advantage; None = none.
    Returns the shape of `reward`, finite: 0 for unscored rollouts and, with a baseline, where the group (baseline=batch:
    the batch) has no spread or only one scored rollout.
    Raises ValueError if G < 2 and a statistic of the group is asked for.
    Source: arXiv 2402.03300 (mean, group), 2402.14740 (leave one out), 2503.20783 (no scale); read in TRL 1.16's code;
    2509.24203 (log_mean_exp) and 2505.05470 (limit), read in the authors' code. pooled is ours.
    """
    within_group = baseline in ("mean", "leave_one_out", "log_mean_exp")
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
    elif baseline == "log_mean_exp":
        scored = (~reward.isnan()).sum(dim=1, keepdim=True)
        total = (reward / tau).masked_fill(reward.isnan(), -torch.inf).logsumexp(dim=1, keepdim=True)
        centred = reward - tau * (total - scored.to(reward.dtype).log())
    elif baseline == "batch":
        centred = reward - torch.nanmean(batch, dim=0)
    else:
        centred = reward
    if within_group:
        centred = torch.where(no_spread(reward), 0.0, centred)
    elif baseline == "batch":
        centred = torch.where(no_spread(batch.unsqueeze(0))[0], 0.0, centred)
    if scale == "group":
        centred = centred / (_nanstd(reward, 1, ddof) + eps)
    elif scale == "batch":
        centred = centred / (_nanstd(batch, 0, ddof) + eps)
    elif scale == "pooled":
        centred = centred / (_root_mean_square(centred, ~reward.isnan(), group) + eps)
    centred = torch.nan_to_num(centred, nan=0.0)
    return centred if limit is None else centred.clamp(-limit, limit)


def virtual_maximum(
    reward: Tensor,
    group: Group,
    *,
    highest: float | None = None,
    virtual: int = 1,
    ddof: Literal[0, 1] = 1,
    eps: float = 1e-6,
) -> Tensor:
    """Group advantages as if `virtual` more rollouts had reached the highest reward there can be.

    reward: (P, G) or (P, G, T), G >= 1; returns the shape. highest: None = the sum of the positive weights, which
    components in [0, 1] cannot exceed; rewards within rounding error of it (1e-6, relative above 1) are at it. A group
    that is all wrong is pushed away, one at the highest gets exactly 0. Advantages do not sum to 0: the virtual rollouts
    take the rest.
    virtual: how many are added. ddof: the variance is divided by n - ddof, the virtual ones counted. eps: added to the
    standard deviation.
    Raises ValueError for a reward above the highest. Source: arXiv 2509.18851; read in the authors' code, which leaves
    the virtual rollout out at G = 1.
    """
    top = group.weights.clamp(min=0).sum().to(reward) if highest is None else reward.new_tensor(highest)
    rounding = 1e-6 * top.abs().clamp(min=1.0)
    if (reward > top + rounding).any():
        raise ValueError(f"reward {reward[reward > top].max():g} is above highest={top:g}; set objective.highest")
    reward = torch.where(reward >= top - rounding, top, reward)
    scored = (~reward.isnan()).sum(dim=1, keepdim=True)
    count = scored + virtual
    mean = (reward.nansum(dim=1, keepdim=True) + virtual * top) / count
    squares = ((reward - mean) ** 2).nansum(dim=1, keepdim=True) + virtual * (top - mean) ** 2
    z = (reward - mean) / (torch.sqrt(squares / (count - ddof)) + eps)
    at_top = (reward >= top) | reward.isnan()
    return torch.nan_to_num(z, nan=0.0).masked_fill(at_top.all(dim=1, keepdim=True), 0.0)


def median_advantages(
    reward: Tensor, group: Group, *, mad_floor: float | None = None, rebalance: bool = True, eps: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Rewards minus the group's median, divided by the median absolute deviation; and keep, which drops the median.

    reward: (P, n), n odd: one rollout more than are trained on, so that the median is a rollout (the first one that has
    it), which is dropped. Returns (P, n) and (P, n) bool. Where an unscored rollout leaves an even number, the median is
    the lower of the two in the middle.
    mad_floor: least deviation to divide by; 0 is the released code. None = where it is 0 but for rounding (below 1e-5 of
    the group's standard deviation), that deviation instead: of right-or-wrong rewards it always is 0, and eps alone would
    make advantages of 1000. Graded rewards that nearly agree have a small MAD, and an advantage of 50 beside it: set a floor.
    rebalance: times n / (rollouts whose advantage is not 0), n and rollouts being the scored ones.
    eps: added to the deviation.
    Raises ValueError for even n and for rewards per decision, whose medians are different rollouts.
    Source: arXiv 2601.22582; read in the authors' code. The fallback and the first of ties are ours.
    """
    if reward.dim() > 2:
        raise ValueError("the median of a group is one rollout, so it needs one reward per rollout, not per decision")
    if reward.shape[1] % 2 == 0:
        raise ValueError(
            f"{reward.shape[1]} rollouts have no median among them; one is sampled beside the group, so use an even group_size"
        )
    median = reward.nanmedian(dim=1, keepdim=True).values
    scale = (reward - median).abs().nanmedian(dim=1, keepdim=True).values
    if mad_floor is None:
        deviation = _nanstd(reward, 1, ddof=1)
        scale = torch.where(scale > 1e-5 * deviation, scale, deviation)
    else:
        scale = scale.clamp(min=mad_floor)
    advantage = torch.nan_to_num((reward - median) / (scale + eps), nan=0.0)
    if rebalance:
        active = (advantage.abs() > 1e-6).sum(dim=1, keepdim=True).clamp(min=1)
        advantage = advantage * (~reward.isnan()).sum(dim=1, keepdim=True) / active
    pivot = (reward == median).int().argmax(dim=1, keepdim=True)
    return advantage, torch.ones_like(reward, dtype=torch.bool).scatter(1, pivot, False)


def quantile_advantages(reward: Tensor, group: Group, *, resolution: float = 1e-6) -> Tensor:
    """The standard normal's quantiles at (rank - 1/2) / G; equal rewards share the mean of theirs.

    reward: (P, G) or (P, G, T); returns the shape. Only the order matters: no outlier and no scale gets through, and a
    difference of .001 counts as much as one of 1. resolution: rewards are rounded to multiples of it first; the default
    only undoes the rounding errors of sums, which would count as much; 0 = not.
    Without ties the variance comes near 1 as G grows (.77 at G = 5); ties shrink it (.34 for one success in eight).
    Source: arXiv 2604.08539; read in the text. The rounding is ours.
    """
    if resolution:
        reward = torch.round(reward / resolution) * resolution
    scored = ~reward.isnan()
    count = scored.sum(dim=1, keepdim=True)
    place = torch.arange(1, reward.shape[1] + 1, dtype=reward.dtype, device=reward.device)
    place = place.view(1, -1, *[1] * (reward.dim() - 2))
    share = (place - 0.5) / count.clamp(min=1)
    quantiles = torch.special.ndtri(torch.where(place <= count, share, 0.5))
    upto = torch.cat([torch.zeros_like(quantiles[:, :1]), quantiles.cumsum(dim=1)], dim=1)
    below = (reward.unsqueeze(1) < reward.unsqueeze(2)).sum(dim=2)
    ties = (reward.unsqueeze(1) == reward.unsqueeze(2)).sum(dim=2)
    mean = (upto.gather(1, below + ties) - upto.gather(1, below)) / ties.clamp(min=1)
    return torch.where(no_spread(reward) | ~scored, 0.0, mean)


def ranked_advantages(
    reward: Tensor,
    group: Group,
    *,
    z_weight: float = 0.1,
    mean: float | None = None,
    std: float | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """(1 - z_weight) * rank + z_weight * (r - mean) / std: the rank in the group, 2 * place / (G - 1) - 1 in [-1, 1], 0 = least.

    reward: (P, G) or (P, G, T), G >= 2; returns the shape. Equal rewards share their mean rank, and a group without spread
    gets 0, or the order of its rollouts would be their advantage. Unscored rollouts have no rank. A group's advantages do
    not sum to 0: the batch's mean is no baseline of it.
    z_weight: share of the score; 0 = ranks alone. mean, std: of the score, in units of the reward; None = those of the
    batch's scored rewards. eps: added to the standard deviation.
    Raises ValueError if G < 2.
    Source: arXiv 2511.22169; read in the authors' code. There mean and deviation are running ones of groups' mean rewards,
    which a function without memory cannot have, equal rewards get different ranks, and the score moves groups without
    spread too.
    """
    if reward.shape[1] < 2:
        raise ValueError(f"group_size={reward.shape[1]} has no ranks; use 2 or more")
    scored, batch = ~reward.isnan(), reward.flatten(0, 1)
    below = (reward.unsqueeze(1) < reward.unsqueeze(2)).sum(dim=2)
    ties = (reward.unsqueeze(1) == reward.unsqueeze(2)).sum(dim=2)
    others = (scored.sum(dim=1, keepdim=True) - 1).clamp(min=1)
    rank = (2 * below + ties - 1).to(reward.dtype) / others - 1
    middle = torch.nanmean(batch, dim=0) if mean is None else mean
    score = (reward - middle) / ((_nanstd(batch, 0, ddof=0) if std is None else std) + eps)
    return torch.where(no_spread(reward) | ~scored, 0.0, (1 - z_weight) * rank + z_weight * score)


def balanced_advantages(reward: Tensor, group: Group) -> Tensor:
    """Rewards minus the mean, after negatives were dropped at random until they are no more than the positives.

    reward: (P, G) or (P, G, T); returns the shape, 0 for dropped rollouts, which stay in the counts. Positive: not below
    the group's mean; the mean is then taken again over what is left. Draws from group.seed.
    Source: arXiv 2509.24203 (RED-Drop); read in the authors' code.
    """
    positive = reward >= torch.nanmean(reward, dim=1, keepdim=True)
    negative = ~positive & ~reward.isnan()
    draw = torch.rand(reward.shape, generator=torch.Generator().manual_seed(group.seed)).to(reward.device)
    draw = draw.masked_fill(~negative, torch.inf)
    order = draw.argsort(dim=1).argsort(dim=1)
    kept = positive | (negative & (order < positive.sum(dim=1, keepdim=True)))
    return group_advantages(torch.where(kept, reward, torch.nan), scale="none")


def anchored_values(
    reward: Tensor,
    group: Group,
    *,
    gamma: float = 0.9,
    anchor: float = 0.1,
    anchored: int | None = None,
    limit: float = 5.0,
    ddof: Literal[0, 1] = 0,
    eps: float = 1e-4,
) -> Tensor:
    """Advantages of discounted sums of rewards to the end, decision by decision, plus a share of the sums themselves.

        Q_j = sum over k >= j of gamma^(k - j) r_k        A_j = Q_j / mean(Q) * (Q_j - group mean) / group std + anchor * Q_j

    reward: (P, G, T), not negative; returns the shape, in [-limit, limit]. Where a group has no spread only the second
    term is left, an equal push on all of it, right or wrong: keep `anchor` small. anchored: how many decisions, from
    the first, have that term; None = all. A decision without a reward adds 0 to the sums before it, and gets 0.
    gamma: discount of later rewards. anchor: share of the sums themselves. limit: greatest size of an advantage. ddof:
    the group's variance is divided by n - ddof. eps: added to the group's standard deviation.
    Raises ValueError for one reward per rollout, for negative rewards, whose step weights mean nothing, and if G < 2.
    Source: arXiv 2512.12387 through third parties (structure); the exact mixture is ours.
    """
    if reward.dim() != 3:
        raise ValueError(
            "values along a trajectory need one reward per decision, (P, G, T), and this is one per rollout"
        )
    if (reward < 0).any():
        raise ValueError(f"reward {reward[reward < 0].min():g} is negative; shift rewards to [0, 1]")
    value, shift = torch.nan_to_num(reward, nan=0.0), 1
    while shift < value.shape[2]:  # doubles: log2(T) passes
        value = value + gamma**shift * torch.nn.functional.pad(value[:, :, shift:], (0, shift))
        shift *= 2
    mean = value.masked_fill(reward.isnan(), torch.nan).nanmean(dim=2, keepdim=True)
    weight = torch.where(mean > 0, value / mean, 1.0)
    value = value.masked_fill(reward.isnan(), torch.nan)
    advantage = weight * group_advantages(value, ddof=ddof, eps=eps)
    push = anchor * torch.nan_to_num(value, nan=0.0)
    if anchored is not None:
        push[:, :, anchored:] = 0.0
    return (advantage + push).clamp(-limit, limit)


def keep_groups(group: Group, *, filter: Filter = "none", success: float = 1.0) -> Tensor:
    """Which rollouts stay in the loss: all; those of groups whose *outcome* has spread; all but groups that are all right.

    filter: none keeps all, outcome those with spread, all_right all but those that are right throughout. success: the
    outcome from which a rollout is right.
    Returns (P, 1) bool. all_right leaves groups out in which every scored rollout reached `success`. The outcome decides
    alone, by exact equality: spread in other components does not save a group. A dropped row leaves the counts, so the
    step does not shrink (the effect of dynamic sampling in arXiv 2503.14476, read in its text, without sampling again).
    Raises ValueError if there is a filter and the group names no outcome.
    """
    if filter == "none":
        return torch.ones_like(group.scored[:, :1])
    if filter == "all_right":
        return ~(group.right(success) | ~group.scored).all(dim=1, keepdim=True)
    return ~whole_group(no_spread(group.rewards[:, :, group.outcome_index]))


def no_spread(reward: Tensor) -> Tensor:
    """True where all scored rollouts of a group have exactly one reward, or there are fewer than two.

    reward: (P, G, ...) with NaN = unscored. Returns (P, 1, ...) bool.
    """
    unscored = reward.isnan()
    low = reward.masked_fill(unscored, torch.inf).amin(dim=1, keepdim=True)
    high = reward.masked_fill(unscored, -torch.inf).amax(dim=1, keepdim=True)
    return high <= low


def _nanstd(values: Tensor, dim: int, ddof: int) -> Tensor:
    """Standard deviation that skips NaN, with divisor n - ddof, keepdim; NaN if n <= ddof. TRL's nanstd for ddof=1."""
    mean = torch.nanmean(values, dim=dim, keepdim=True)
    variance = torch.nanmean((values - mean) ** 2, dim=dim, keepdim=True)
    count = (~values.isnan()).sum(dim=dim, keepdim=True).to(values.dtype)  # TRL's int / int is float32 even for float64
    correction = torch.where(count > ddof, count / (count - ddof), torch.nan)
    return torch.sqrt(variance * correction)


def _root_mean_square(centred: Tensor, scored: Tensor, group: Group | None) -> Tensor:
    """One number: over all that was scored, and of single decisions over those with mask 1; 0 of nothing."""
    if group is not None and group.mask is not None and centred.dim() == 3:
        scored = scored & group.mask.bool().view(centred.shape)
    return (torch.where(scored, centred, 0.0).square().sum() / scored.sum().clamp(min=1)).sqrt()


def whole_group(flags: Tensor) -> Tensor:
    """(P, 1) or (P, 1, T) bool -> (P, 1): true of every decision."""
    return flags if flags.dim() == 2 else flags.all(dim=2)
