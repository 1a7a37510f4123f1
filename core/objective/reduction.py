"""From one loss per decision to one number, as (sum, count), so that micro-batches and ranks merge.

    token_mean      every decision of the update weighs the same             count = kept decisions of the update
    sequence_mean   every rollout weighs the same, long or short             count = kept rows of the update
    fixed_length    a constant divisor: long rollouts weigh more             count = kept rows x longest length allowed

These three do not depend on how the update was split. The two `_local` ones do: they divide by what the micro-batch at
hand holds and average over micro-batches. They are TRL's own (grpo, bnpo), kept to give its numbers bit for bit. Chunks
of the decisions of the same rows, told by `Rows.lengths`, add up to the whole under all five.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from core.objective.rows import Loss, Rows

Reduction = Literal["token_mean", "sequence_mean", "fixed_length", "token_mean_local", "sequence_mean_local"]


def reduce_loss(per_decision: Tensor, rows: Rows, *, reduction: Reduction = "sequence_mean") -> Loss:
    """The reduced loss of (B, T), or of (B, 1) standing for every decision of its row; dropped ones leave no trace.

    A count of 0 becomes 1, so an empty micro-batch or update gives 0. Shares of a count may be less than 1 (`Counts`).
    reduction: what weighs the same: every decision (token_mean), every rollout (sequence_mean), every decision at a
    constant length (fixed_length); the local ones: see the module.
    Source: token_mean arXiv 2503.14476, sequence_mean 2402.03300, fixed_length 2503.20783; all read in TRL 1.16's code.
    """
    mask, counts = rows.loss_mask, rows.counts
    local = reduction.endswith("_local")
    lengths = mask.sum(-1) if rows.lengths is None else rows.lengths if rows.keep is None else rows.lengths * rows.keep
    if reduction.startswith("sequence_mean"):
        total = ((per_decision * mask).sum(-1) / lengths.clamp(min=1.0)).sum()
        kept = counts.rows if not local else len(mask) if rows.keep is None else rows.keep.sum()
    else:
        total = (per_decision * mask).sum()
        fixed = counts.rows * counts.max_length
        kept = fixed if reduction == "fixed_length" else lengths.sum() if local else counts.tokens
    # A tensor, because CUDA divides by a Python number through its reciprocal, which costs the last bit.
    count = torch.as_tensor(kept, dtype=torch.promote_types(total.dtype, torch.float32), device=total.device)
    return Loss(sum=total, count=_or_one(count), local=local)


def add_row_mean(loss: Loss, per_row: Tensor, rows: Rows) -> Loss:
    """The loss plus the mean of (B,) over kept rows: of the update, or of the micro-batch if the loss is local."""
    if rows.keep is not None:
        per_row = torch.where(rows.keep.bool(), per_row, 0.0)
    kept = rows.counts.rows if not loss.local else len(per_row) if rows.keep is None else rows.keep.sum()
    count = torch.as_tensor(kept, dtype=loss.count.dtype, device=per_row.device)
    return replace(loss, sum=loss.sum + per_row.sum() * loss.count / _or_one(count))


def _or_one(count: Tensor) -> Tensor:
    return torch.where(count > 0, count, 1.0)
