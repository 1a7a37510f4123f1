"""The supervised start of a flow policy: ordinary flow matching (Lipman et al. 2023, arXiv 2210.02747) on pairs.

    E || v(x_sigma, sigma, c) - (x1 - x0) ||^2,   x_sigma = (1 - sigma) x0 + sigma x1,   x1 from the net's own prior.

What is imitated is gold, or what the app's annotator would have made, mistakes included (`App.demonstrations`).

`straighten` then makes a one-step policy of it (reflow, Liu et al. 2022, arXiv 2209.03003, at sigma = 1 alone): from each
noise it draws at once what the ODE draws from it in several steps. Plain flow matching in one step would draw the mean of
all that may be there, the same from every noise, and leave a group nothing to compare.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from core.policy.kernel import Schedule
from core.train.descent import descend


def imitate(
    net: nn.Module,
    conditions: Sequence[Mapping[str, Any]],
    targets: Sequence[np.ndarray],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    on_log: Callable[[int, dict[str, float]], None] | None = None,
    drop_text: float = 0.0,
    sigmas: Literal["uniform", "logit_normal"] = "uniform",
) -> nn.Module:
    """Train `net` (a flow net) in place to draw each condition's target.

    conditions, targets: read and encoded batch by batch, so that a lazy sequence and a large encoder's output fit in memory.
    steps: optimizer steps (AdamW, 5 % warm-up, then a cosine to 0; gradients clipped to norm 1).
    drop_text: share of rows that get `net.unconditional` (guidance needs it).
    sigmas: where on the path the net is asked; logit_normal is the sigmoid of N(0, 1) (arXiv 2403.03206, section 3.1).
    Raises ValueError on lists of unequal length, FloatingPointError on the first loss that is not finite.
    """
    if len(conditions) != len(targets) or not len(targets):
        raise ValueError(f"{len(conditions)} conditions and {len(targets)} targets; both must be equal and not 0")
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)

    def loss(step: int) -> Tensor:
        nonlocal order
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(targets), generator=generator)])
        rows, order = order[:batch_size].tolist(), order[batch_size:]
        batch = net.encode([conditions[row] for row in rows])
        x0 = net.encode_target([targets[row] for row in rows], batch)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        sigma = torch.rand(batch_size, generator=generator)
        if sigmas == "logit_normal":
            sigma = torch.randn(batch_size, generator=generator).sigmoid()
        sigma = sigma.to(x0.device)
        if drop_text:
            dropped = (torch.rand(batch_size, generator=generator) < drop_text).to(x0.device)
            batch = {
                name: torch.where(dropped.view(-1, *[1] * (tensor.dim() - 1)), without, tensor)
                for (name, tensor), without in zip(batch.items(), net.unconditional(batch).values(), strict=True)
            }
        prior = net.prior(batch)
        velocity = net.velocity(prior.noised(x0, noise, sigma), sigma, batch)
        return (velocity.float() - (prior.start(noise) - x0).float()).square().mean()

    net.train()
    descend(net, loss, steps=steps, lr=lr, on_log=on_log)
    return net.eval()


def straighten(
    net: nn.Module,
    conditions: Sequence[Mapping[str, Any]],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    ode_steps: int = 4,
    on_log: Callable[[int, dict[str, float]], None] | None = None,
) -> nn.Module:
    """Train `net` (a flow net) in place to draw in one step what it draws now in `ode_steps`.

    steps: optimizer steps (AdamW, a cosine to 0; gradients clipped to norm 1).
    Raises ValueError without conditions, FloatingPointError on the first loss that is not finite.
    """
    if not len(conditions):
        raise ValueError("there are no conditions to draw for; give at least one row")
    teacher = copy.deepcopy(net).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed)
    path = Schedule.uniform(ode_steps).sigmas

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(conditions), (batch_size,), generator=generator).tolist()
        batch = net.encode([conditions[i] for i in rows])
        shape, device = net.noise_shape(batch), next(iter(batch.values())).device
        start = net.prior(batch).start(torch.randn(batch_size, *shape, generator=generator).to(device))
        x, ones = start, start.new_ones(batch_size)
        with torch.no_grad():
            for sigma, after in pairwise(path):
                x = x + (after - sigma) * teacher.velocity(x, sigma * ones, batch).float()
        return (net.velocity(start, ones, batch).float() - (start - x)).square().mean()

    descend(net, loss, steps=steps, lr=lr, warm_up=False, on_log=on_log)
    return net.eval()
