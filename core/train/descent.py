"""The descent of the supervised starts of flows and forecasts: AdamW, a short warm-up, a cosine to 0, gradients clipped to 1."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def descend(
    net: nn.Module,
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    warm_up: bool = True,
    on_log: Callable[[int, dict[str, float]], None] | None = None,
) -> None:
    """Train in place the parameters of `net` that require a gradient.

    loss: of a step (1 .. steps), a scalar; it draws its own batch. lr: the highest rate. warm_up: for the first 5 % of the
    steps the rate rises to it. on_log: called about 20 times with a step and {"loss": its mean since the last call}.
    Raises FloatingPointError on the first loss that is not finite.
    """
    weights = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    report = max(1, steps // 20)
    rise = report if warm_up else 1
    total = 0.0
    for step in range(1, steps + 1):
        rate = min(step / rise, 0.5 * (1 + math.cos(math.pi * max(0, step - rise) / (steps - rise + 1))))
        optimizer.param_groups[0]["lr"] = lr * rate
        now = loss(step)
        value = now.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"warm-up: the loss is {value} at step {step} of {steps}; lower warmup.lr={lr}")
        optimizer.zero_grad(set_to_none=True)
        now.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        total += value
        if step % report == 0 or step == steps:
            if on_log:
                on_log(step, {"loss": total / (step % report or report)})
            total = 0.0
