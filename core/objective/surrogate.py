"""The policy term: ratios of new to old probability, and what is clipped. Per decision, to be minimised.

    clipped:  -min(rho * A, clip(rho, 1 - low, 1 + high) * A)        gradient stops where a step would go further away
    capped:   -min(rho, cap).detach() * A * logp                     no gradient stops; large ratios count for less
    masked:   -M(rho) * w(rho).detach() * A * logp                   REINFORCE on the decisions that M lets through

At rho = 1 these have the gradient of REINFORCE, -A * grad logp. A sequence's ratio shares it evenly among the sequence's
decisions, whichever of them the advantage was for.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from core.objective.rows import Metrics, Rows

Clip = Literal["none", "one_side", "two_side", "ring"]


def clip_loss(
    ratio: Tensor, advantage: Tensor, epsilon_low: float, epsilon_high: float | None = None, delta: float | None = None
) -> Tensor:
    """-min(min(ratio, delta) * A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) * A).

    ratio: (B, T) or (B, 1); advantage: (B, 1) or (B, T); returns their broadcast. epsilon_high=None means epsilon_low;
    epsilon_low=1 and epsilon_high=inf switch the clip off. delta also bounds the ratio where A < 0, which the plain
    clip leaves unbounded.
    Source: arXiv 1707.06347 (clip), 2503.14476 (two epsilons), 2505.07291 (delta); read in TRL 1.16's code.
    """
    epsilon_high = epsilon_low if epsilon_high is None else epsilon_high
    bounded = torch.clamp(ratio, 1 - epsilon_low, 1 + epsilon_high)
    if delta is not None:
        ratio = torch.clamp(ratio, max=delta)
    return -torch.min(ratio * advantage, bounded * advantage)


def cap_loss(ratio: Tensor, advantage: Tensor, logps: Tensor, cap: float) -> Tensor:
    """-min(ratio, cap).detach() * A * logps: REINFORCE with a capped importance weight; no decision loses its gradient.

    ratio, logps: (B, T); advantage: (B, 1) or (B, T). cap is a ratio (5.0), not a distance from 1.
    Source: arXiv 2506.13585; the one-sided cap and its value 2510.13786; read in TRL 1.16's code (loss_type="cispo").
    """
    return -torch.clamp(ratio, max=cap).detach() * advantage * logps


def clip_mask(
    ratio: Tensor, advantage: Tensor, clip: Clip, low: float, high: float, ring_low: float, ring_high: float
) -> Tensor:
    """Which decisions a step may use: bool, the broadcast of ratio (B, T) and advantage (B, 1) or (B, T).

    one_side: A >= 0 and ratio <= 1 + high, or A <= 0 and ratio >= 1 - low (where the clipped loss has a gradient).
    two_side: 1 - low <= ratio <= 1 + high. ring: two_side, or ratios so far off that the step brings them back: A >= 0 and
    ratio <= 1 - ring_low, or A <= 0 and ratio >= 1 + ring_high. none: all.
    Source: arXiv 2509.24203; read in the authors' code.
    """
    if clip == "none":
        return torch.ones_like(ratio * advantage, dtype=torch.bool)
    good, bad = advantage >= 0, advantage <= 0  # a decision with A = 0 is both: or, not +
    if clip == "one_side":
        return (good & (ratio <= 1 + high)) | (bad & (ratio >= 1 - low))
    near = (ratio >= 1 - low) & (ratio <= 1 + high)
    if clip == "two_side":
        return near.expand_as(ratio * advantage)
    return near | (good & (ratio <= 1 - ring_low)) | (bad & (ratio >= 1 + ring_high))


def clipped_token_ratio(
    rows: Rows, *, epsilon_low: float = 0.2, epsilon_high: float | None = None, delta: float | None = None
) -> tuple[Tensor, Metrics]:
    """`clip_loss` of the token ratio. Returns (B, T) and metrics.

    epsilon_low, epsilon_high: how far the ratio may fall below 1 and rise above it before the clip; epsilon_high=None
    means as far. delta: cap of the ratio where A < 0; None = none.
    """
    return _clipped(rows, rows.token_ratio, epsilon_low, epsilon_high, delta)


def clipped_sequence_ratio(
    rows: Rows, *, epsilon_low: float = 0.2, epsilon_high: float | None = None, delta: float | None = None
) -> tuple[Tensor, Metrics]:
    """`clip_loss` of the sequence ratio; needs whole rollouts. Returns (B, 1), or (B, T) as the advantage; metrics.

    epsilon_low, epsilon_high: how far the ratio may fall below 1 and rise above it before the clip; epsilon_high=None
    means as far. delta: cap of the ratio where A < 0; None = none.
    """
    return _clipped(rows, rows.sequence_ratio, epsilon_low, epsilon_high, delta)


def clipped_normalised_ratio(
    rows: Rows, *, epsilon_low: float = 2e-6, epsilon_high: float | None = None, delta: float | None = None
) -> tuple[Tensor, Metrics]:
    """`clip_loss` of exp((log ratio + drift) * std), over dt: a ratio of Gaussians that is centred and alike at every step.

    The log ratio of a Gaussian whose mean has moved is negative on average, by drift = mean((mu - mu_old)^2) / (2 std^2),
    and its spread grows as 1 / std: without both factors positives are hardly ever clipped and late steps always are.
    Wants `drift` with gradient, `std` and `dt` > 0 (the step's length), each (B, T), in the extras. Returns (B, T), metrics.
    epsilon_low, epsilon_high: how far the ratio may fall below 1 and rise above it before the clip, which std makes
    narrower than a plain ratio's; epsilon_high=None means as far. delta: cap of the ratio where A < 0; None = none.
    Source: arXiv 2510.22319; known through third parties, who agree on the formula; ranges of 2e-6 to 2e-5 are in use.
    """
    drift = rows.per_decision("drift")
    ratio = torch.exp((rows.log_ratio + drift) * rows.per_decision("std"))
    loss, metrics = _clipped(rows, ratio, epsilon_low, epsilon_high, delta)
    return loss / rows.per_decision("dt", elsewhere=1.0), metrics | {"drift": rows.masked_mean(drift)}


def capped_token_ratio(rows: Rows, *, epsilon_high: float = 5.0) -> tuple[Tensor, Metrics]:
    """`cap_loss` of the token ratio; epsilon_high is the cap itself, as in TRL. Returns (B, T) and metrics.

    epsilon_high: the cap itself, not its distance from 1, as in TRL.
    """
    ratio, metrics = rows.token_ratio, _ratio_metrics(rows, rows.token_ratio)
    metrics["clip_high"] = rows.masked_mean(((ratio > epsilon_high) & (rows.advantages > 0)).float())
    return cap_loss(ratio, rows.advantages, rows.logps, epsilon_high), metrics


def masked_reinforce(
    rows: Rows,
    *,
    clip: Clip = "one_side",
    weight: Literal["ratio", "none"] = "ratio",
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    ring_low: float = 0.6,
    ring_high: float = 2.0,
) -> tuple[Tensor, Metrics]:
    """-mask * weight * A * logp, the token ratio detached; masked decisions stay in the counts. Returns (B, T), metrics.

    clip: see `clip_mask`. weight: the ratio (importance sampling) or 1. one_side with the ratio has the gradient of the
    clipped loss. Source: arXiv 2509.24203; read in the authors' code.
    epsilon_low, epsilon_high: the clip's distances from 1. ring_low, ring_high: distances from 1 beyond which clip=ring
    lets decisions through again.
    """
    ratio, metrics = rows.token_ratio.detach(), _ratio_metrics(rows, rows.token_ratio)
    allowed = clip_mask(ratio, rows.advantages, clip, epsilon_low, epsilon_high, ring_low, ring_high)
    metrics["clip_masked"] = rows.masked_mean((~allowed).float())
    weighted = rows.advantages * ratio if weight == "ratio" else rows.advantages
    return -(allowed * weighted * rows.logps), metrics


def mixed_ratio(
    rows: Rows,
    *,
    mix: Literal["even", "entropy"] = "even",
    pessimism: Literal["each", "mixed", "none"] = "each",
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    sequence_epsilon_low: float = 3e-4,
    sequence_epsilon_high: float = 4e-4,
) -> tuple[Tensor, Metrics]:
    """The token's and the sequence's clipped ratio, mixed decision by decision; needs whole rollouts. (B, T), metrics.

    mix: the token's share; even = 1/2, entropy = the decision's entropy between the rollout's least and greatest, detached
    (1/2 where they are equal). pessimism: where the minimum of clipped and unclipped is taken: in each branch before the
    mix, of the mixed ratios, or nowhere (a clipped branch then has no gradient on either side).
    epsilon_low, epsilon_high: how far the token's ratio may fall below 1 and rise above it before the clip.
    sequence_epsilon_low, sequence_epsilon_high: the same of the sequence's.
    Raises ValueError for mix=entropy without entropies.
    Source: arXiv 2601.05607 through third parties (structure); the three forms and the ranges are ours.
    """
    token, sequence, advantage = rows.token_ratio, rows.sequence_ratio, rows.advantages
    share = torch.full_like(token, 0.5) if mix == "even" else _entropy_share(rows)
    bounded = torch.clamp(token, 1 - epsilon_low, 1 + epsilon_high)
    sequence_bounded = torch.clamp(sequence, 1 - sequence_epsilon_low, 1 + sequence_epsilon_high)
    if pessimism == "each":
        token_term = torch.min(token * advantage, bounded * advantage)
        value = share * token_term + (1 - share) * torch.min(sequence * advantage, sequence_bounded * advantage)
    else:
        value = (share * bounded + (1 - share) * sequence_bounded) * advantage
        if pessimism == "mixed":
            value = torch.min((share * token + (1 - share) * sequence) * advantage, value)
    return -value, _ratio_metrics(rows, token) | {"sequence_ratio": rows.masked_mean(sequence)}


def taught_or_clipped(
    rows: Rows, *, epsilon_low: float = 0.2, epsilon_high: float | None = None, delta: float | None = None
) -> tuple[Tensor, Metrics]:
    """The weighted distance to the teacher where there is a distillation weight, `clip_loss` of the token ratio elsewhere.

    Wants `distillation_weight` and `distillation`, both (B, T), in the rows' extras. Returns (B, T), metrics.
    epsilon_low, epsilon_high: how far the ratio may fall below 1 and rise above it before the clip; epsilon_high=None
    means as far. delta: cap of the ratio where A < 0; None = none.
    Source: arXiv 2604.02288; read in the text.
    """
    clipped, metrics = _clipped(rows, rows.token_ratio, epsilon_low, epsilon_high, delta)
    weight = rows.extra("distillation_weight")
    taught = (weight > 0) & rows.loss_mask.bool()
    distance = torch.where(taught, rows.extra("distillation"), 0.0)
    metrics["taught"] = rows.masked_mean(taught.float())
    metrics["distillation"] = (distance.detach().sum().float(), taught.sum().float())
    return torch.where(taught, weight * distance, clipped), metrics


def _entropy_share(rows: Rows) -> Tensor:
    """(B, T), detached: where a decision's entropy lies between its rollout's least and greatest; 1/2 if they are equal."""
    if rows.entropy is None:
        raise ValueError("mix=entropy needs entropies, and the trainer gave none; use mix=even")
    entropy, used = rows.entropy.detach(), rows.loss_mask.bool()
    low = entropy.masked_fill(~used, torch.inf).amin(dim=1, keepdim=True)
    span = entropy.masked_fill(~used, -torch.inf).amax(dim=1, keepdim=True) - low
    return torch.where(used & (span > 0), (entropy - low) / (span + 1e-8), 0.5)


def _clipped(
    rows: Rows, ratio: Tensor, epsilon_low: float, epsilon_high: float | None, delta: float | None
) -> tuple[Tensor, Metrics]:
    metrics = _ratio_metrics(rows, ratio)
    high = epsilon_low if epsilon_high is None else epsilon_high
    metrics["clip_low"] = rows.masked_mean(((ratio < 1 - epsilon_low) & (rows.advantages < 0)).float())
    metrics["clip_high"] = rows.masked_mean(((ratio > 1 + high) & (rows.advantages > 0)).float())
    return clip_loss(ratio, rows.advantages, epsilon_low, epsilon_high, delta), metrics


def _ratio_metrics(rows: Rows, ratio: Tensor) -> Metrics:
    """`ratio` and `ratio_deviation` (mean of |ratio - 1|); `ratio_deviation_max`, whose mean is over micro-batches."""
    deviation = (ratio.detach() - 1).abs()
    # Settled rows have ratio 1 where no loss is carried.
    largest = deviation.max() if deviation.numel() else deviation.sum()
    return {
        "ratio": rows.masked_mean(ratio),
        "ratio_deviation": rows.masked_mean(deviation),
        "ratio_deviation_max": (largest, torch.ones_like(largest)),
    }
