"""Losses of flow policies that look at no step and no log-probability: final samples are noised again and learnt from.

    noised = (1 - sigma) * clean + sigma * noise        the velocity to predict there is noise - clean = (noised - clean) / sigma

A row is a generated sample, T the noise levels at which it was noised again, D its elements. The extras hold `velocity`
(B, T, D) with gradient, `old_velocity` of the policy that sampled and `ref_velocity` of the reference, both (B, T, D), and
`noised` (B, T, D), `clean` (B, D) or (B, T, D), `sigma` (B, T) in (0, 1]. Any solver may have made the samples, in one
step too. `rows.logps` and `rows.weight` are not looked at.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from core.objective.reduction import reduce_loss
from core.objective.rows import Loss, Rows


def signed_preference(rows: Rows, *, beta: float = 5000.0) -> Loss:
    """-log sigmoid(-beta / 2 * sum over a group of A * (l - l_ref)): prefers, against the reference, what has A > 0.

    l is the mean over T and D of the squared error of the velocity. A preference loss whose pair has become a group with
    signed weights: of two rollouts with A = 1, -1 it is Diffusion-DPO. A group counts as often as it has rows with loss,
    and one with fewer than two carries none; so sums merge, but only whole groups and all their T do.
    beta: sharpness of the preference; the weight of the implied KL to the reference, per unit of squared error. `inside`,
    the sigmoid's argument, is logged: at 5 and more a group is hardly learnt from.
    Raises ValueError without group_id.
    Source: arXiv 2603.16769; read in the authors' code. Weights by kept rows are ours.
    """
    if rows.group_id is None:
        raise ValueError("a preference between rollouts of a group needs group_id, and the trainer gave none")
    mask = rows.loss_mask
    error, reference = (
        ((rows.per_decision(name) - _target(rows)) ** 2).mean(2) for name in ("velocity", "ref_velocity")
    )
    lengths = mask.sum(1)
    signed = (rows.advantages * (error - reference) * mask).sum(1) / lengths.clamp(min=1.0)
    together = (rows.group_id.unsqueeze(1) == rows.group_id) & (lengths > 0)
    compared = (together.sum(1) > 1) & (lengths > 0)
    inside = -0.5 * beta * torch.where(compared, (together.to(signed.dtype) @ signed), 0.0)
    loss = torch.where(compared, torch.nn.functional.softplus(-inside), 0.0)
    metrics = {
        "inside": (inside.detach().sum().float(), compared.sum().float()),
        "error": rows.masked_mean(error),
        "ref_error": rows.masked_mean(reference),
    }
    return replace(reduce_loss(loss.unsqueeze(1), rows), metrics=metrics)


def mirrored_regression(rows: Rows, *, mix: float = 1.0, limit: float = 5.0, anchor_coef: float = 1e-4) -> Loss:
    """Regression on samples: by the velocity on good ones, by its mirror image at the old velocity on bad ones.

        v+ = v_old + b (v - v_old)    v- = v_old - b (v - v_old)    x = noised - sigma v    r = clip(A / (2 limit) + 1/2, 0, 1)
        L = limit / b * (r * mean((x+ - clean)^2) / w+ + (1 - r) * mean((x- - clean)^2) / w-) + c * mean((v - v_ref)^2)

    w = mean |x - clean|, at least 1e-5, without gradient: every noise level then weighs alike. At v = v_old the gradient is
    A times that of the weighted error; at A = 0 what is left pulls back to v_old. Mean over T per row; noise levels do not
    see each other.
    mix: how much of the velocity's change is tried (b); smaller is bolder. limit: the advantage at which a sample is wholly
    good or bad. anchor_coef: weight of the distance to the reference's velocity (c); 0 = none.
    Source: arXiv 2509.16117; read in the authors' code.
    """
    velocity, old, noised = (rows.per_decision(name) for name in ("velocity", "old_velocity", "noised"))
    sigma, clean = rows.per_decision("sigma").unsqueeze(2), _clean(rows)

    def weighted_error(v: Tensor) -> Tensor:
        off = noised - sigma * v - clean
        return (off**2).mean(2) / off.detach().abs().mean(2).clamp(min=1e-5)

    change, good = mix * (velocity - old), (rows.advantages / (2 * limit) + 0.5).clamp(0, 1)
    positive, negative = weighted_error(old + change), weighted_error(old - change)
    loss = limit / mix * (good * positive + (1 - good) * negative)
    metrics = {"positive": rows.masked_mean(positive), "negative": rows.masked_mean(negative)}
    if anchor_coef != 0.0:
        anchor = ((velocity - rows.per_decision("ref_velocity")) ** 2).mean(2)
        loss, metrics["anchor"] = loss + anchor_coef * anchor, rows.masked_mean(anchor)
    return replace(reduce_loss(loss, rows), metrics=metrics)


def _clean(rows: Rows) -> Tensor:
    """(B, T, D), 0 where no loss is carried."""
    clean, used = rows.extra("clean"), rows.loss_mask.bool().unsqueeze(2)
    return torch.where(used, clean if clean.dim() == 3 else clean.unsqueeze(1), 0.0)


def _target(rows: Rows) -> Tensor:
    """(B, T, D): the velocity that leads back to the sample."""
    return (rows.per_decision("noised") - _clean(rows)) / rows.per_decision("sigma", elsewhere=1.0).unsqueeze(2)
