"""The supervised start of a forecast policy: likelihood of what came, over roll-outs that grow.

    sum_l sum_i w_li error(frame_l, label_l)_i / sum_l sum_i w_li,   frame_l from the policy's own means of leads before l

error is the negative log-likelihood of a categorical, the squared error in s of a Gaussian. Frames are detached between leads,
so the net learns to go on from its own errors and no gradient flows through time (the "temporal accumulation" of arXiv
2511.22169, read in the authors' code, with equal weights of the leads).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.policy.forecast import ForecastPolicy
from core.train.descent import descend


def imitate(
    policy: ForecastPolicy,
    conditions: Sequence[Mapping[str, Any]],
    labels: Sequence[np.ndarray],
    importance: Sequence[np.ndarray],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    leads: Sequence[int],
    on_log: Callable[[int, dict[str, float]], None] | None = None,
) -> ForecastPolicy:
    """Train `policy` in place to forecast each condition's label.

    conditions, labels, importance: read batch by batch, so that lazy sequences fit in memory. labels: (L, V, Y, X) values, or
    completions with a field "value"; NaN = not known. importance: (L, V, Y, X) weights, 0 = no label there.
    steps: optimizer steps (core/train/descent.py). leads: the curriculum: equal parts of the steps with so many leads each.
    Raises ValueError on sequences of unequal length, for leads beyond the labels, and for a label that is NaN and has weight;
    FloatingPointError on the first loss that is not finite.
    """
    if not len(conditions) == len(labels) == len(importance) or not len(labels):
        raise ValueError(
            f"{len(conditions)} conditions, {len(labels)} labels and {len(importance)} importances; all must be equal and not 0"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)

    def loss(step: int) -> Tensor:
        nonlocal order
        horizon = leads[(step - 1) * len(leads) // steps]
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(labels), generator=generator)])
        rows, order = order[:batch_size].tolist(), order[batch_size:]
        given = policy.encode([conditions[row] for row in rows])
        target, weight = _labels([labels[row] for row in rows], [importance[row] for row in rows], horizon)
        target, weight = target.to(given["frames"]), weight.to(given["frames"])
        total = torch.zeros((), device=target.device)
        for lead, frames in enumerate(policy.unroll(given, horizon)):
            total = total + (weight[:, lead] * frames.error(target[:, lead])).sum()
        return total / weight.sum().clamp(min=1e-8)

    descend(policy, loss, steps=steps, lr=lr, on_log=on_log)
    return policy


def _labels(labels: Sequence[np.ndarray], importance: Sequence[np.ndarray], leads: int) -> tuple[Tensor, Tensor]:
    """Values and weights of the first leads, (N, leads, V, Y, X); a value that has no weight is 0."""
    plain = [label["value"] if label.dtype.names else label for label in labels]
    if leads > (known := len(plain[0])):
        raise ValueError(f"leads={leads} of the curriculum are more than the {known} that labels have; use fewer")
    target, weight = (torch.from_numpy(np.stack([one[:leads] for one in many])).float() for many in (plain, importance))
    missing = target.isnan()
    if bad := int((missing & (weight != 0)).sum()):
        raise ValueError(f"{bad} labels are NaN and have a weight above 0; give them importance 0")
    return target.masked_fill(missing, 0.0), weight
