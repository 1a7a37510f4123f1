"""What a run notes of its rollouts: a row each, with the same columns for every kind of policy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def per_rollout(advantage: Tensor, mask: Tensor) -> Tensor:
    """(B,): advantages as they are, or the mean of (B, T) over the decisions that carry loss."""
    return advantage if advantage.dim() == 1 else (advantage * mask).sum(1) / mask.sum(1).clamp(min=1)


def total_rewards(rewards: Tensor, failed: Tensor, weights: Tensor) -> Tensor:
    """(B,): weighted sums of (B, K) rewards; NaN where a check could not judge or no component with a weight applies."""
    unscored = failed | rewards[:, weights != 0].isnan().all(1)
    return (rewards * weights).nansum(1).masked_fill(unscored, math.nan)


def columns(
    judged: Mapping[str, Any], weights: Tensor, names: Sequence[str], advantage: Tensor, keep: Tensor
) -> dict[str, list]:
    """Lists of B, by column.

    judged: of all ranks: "ids", "prompts" and "completions" (B each), "rewards" (B, K), "failed" (B,), "reasons" (B dicts).
    weights: (K,), on the CPU. names: of the K components. advantage: (B,). keep: (B,).
    """
    rewards = judged["rewards"].cpu()
    made = {
        "prompt_id": [str(i) for i in judged["ids"]],
        "prompt": judged["prompts"],
        "completion": judged["completions"],
        "advantage": advantage.tolist(),
        "keep": keep.tolist(),
        "reward": total_rewards(rewards, judged["failed"].cpu(), weights).tolist(),
    }
    for k, name in enumerate(names):
        made[f"reward/{name}"] = rewards[:, k].tolist()
        made[f"reason/{name}"] = [reasons.get(name, "") for reasons in judged["reasons"]]
    return made
