"""The policy term: ratios of new to old probability, and what is clipped. Per decision, to be minimised.

    clipped:  -min(rho * A, clip(rho, 1 - low, 1 + high) * A)        gradient stops where a step would go further away
    capped:   -min(rho, cap).detach() * A * logp                     no gradient stops; large ratios count for less

At rho = 1 both have the gradient of REINFORCE, -A * grad logp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core.objective.rows import Metrics, Rows


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


def clipped_token_ratio(
    rows: Rows, *, epsilon_low: float = 0.2, epsilon_high: float | None = None, delta: float | None = None
) -> tuple[Tensor, Metrics]:
    """`clip_loss` of the token ratio. Returns (B, T) and metrics."""
    return _clipped(rows, rows.token_ratio, epsilon_low, epsilon_high, delta)


def clipped_sequence_ratio(
    rows: Rows, *, epsilon_low: float = 0.2, epsilon_high: float | None = None, delta: float | None = None
) -> tuple[Tensor, Metrics]:
    """`clip_loss` of the sequence ratio; needs whole rollouts. Returns (B, 1), or (B, T) as the advantage; metrics."""
    return _clipped(rows, rows.sequence_ratio, epsilon_low, epsilon_high, delta)


def capped_token_ratio(rows: Rows, *, epsilon_high: float = 5.0) -> tuple[Tensor, Metrics]:
    """`cap_loss` of the token ratio; epsilon_high is the cap itself, as in TRL. Returns (B, T) and metrics."""
    ratio, metrics = rows.token_ratio, _ratio_metrics(rows, rows.token_ratio)
    metrics["clip_high"] = rows.masked_mean(((ratio > epsilon_high) & (rows.advantages > 0)).float())
    return cap_loss(ratio, rows.advantages, rows.logps, epsilon_high), metrics


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
    largest = deviation.max()  # settled rows have ratio 1 where no loss is carried
    return {
        "ratio": rows.masked_mean(ratio),
        "ratio_deviation": rows.masked_mean(deviation),
        "ratio_deviation_max": (largest, torch.ones_like(largest)),
    }
