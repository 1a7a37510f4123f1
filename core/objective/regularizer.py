"""What is added to the policy term, per decision: distance to a reference policy, entropy.

A KL estimate with the right value need not have the right gradient (arXiv 2506.09477). On-policy and unweighted, k1 has
expected gradient 0, k2 that of KL(policy || reference), k3 that of KL(reference || policy). Multiplied by the ratio
(kl_weight="token"), k1 and k3 both have the gradient of KL(policy || reference). Derived here for one decision; what a
token's KL owes to earlier tokens is in none of them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from core.objective.rows import Metrics, Rows

Estimator = Literal["k1", "k2", "k3"]
KLWeight = Literal["token", "sequence", "none"]


def kl_estimate(logps: Tensor, ref_logps: Tensor, estimator: Estimator = "k3") -> Tensor:
    """Per-decision estimate of KL(policy || reference) from sampled decisions, in nats; the shape of `logps`.

    With d = ref_logps - logps: k1 = -d (unbiased, any sign), k2 = d^2 / 2 (biased, >= 0), k3 = exp(d) - d - 1
    (unbiased, >= 0).
    Source: Schulman 2020, "Approximating KL divergence"; k3 also arXiv 2402.03300, read in TRL 1.16's code.
    """
    if estimator == "k1":
        return logps - ref_logps
    if estimator == "k2":
        return 0.5 * (logps - ref_logps) ** 2
    return torch.exp(ref_logps - logps) - (ref_logps - logps) - 1


def kl_and_entropy(
    rows: Rows, *, beta: float = 0.0, kl: Estimator = "k3", kl_weight: KLWeight = "token", entropy_coef: float = 0.0
) -> tuple[Tensor | None, Metrics]:
    """beta * KL - entropy_coef * entropy, (B, T), and metrics; None instead of the term if both weights are 0.

    kl_weight: the unclipped ratio that multiplies the estimate, with gradient. "token" is TRL's default
    (use_bias_correction_kl, from the DeepSeek-V3.2 report); under a sequence ratio TRL uses "sequence"; "none" is arXiv
    2402.03300. The `kl` metric is the estimate without weight.
    The entropy term goes through the recipe's reduction, like the KL; rows.entropy must carry a gradient.
    Raises ValueError if rows lack ref_logps with beta > 0, or an entropy with gradient with entropy_coef > 0.
    """
    term, metrics = None, {}
    if beta != 0.0:
        if rows.ref_logps is None:
            raise ValueError(f"beta={beta} needs the reference policy's ref_logps, and the trainer gave none")
        # Before the estimate, as in TRL: gradients add up in the order of the graph, to the last bit.
        ratio = rows.sequence_ratio if kl_weight == "sequence" else rows.token_ratio
        estimate = kl_estimate(rows.logps, rows.ref_logps, kl)
        metrics["kl"] = rows.masked_mean(estimate)
        if kl_weight != "none":
            estimate = estimate * ratio
        term = beta * estimate
    if entropy_coef != 0.0:
        if rows.entropy is None or (rows.logps.requires_grad and not rows.entropy.requires_grad):
            raise ValueError(f"entropy_coef={entropy_coef} needs an entropy with gradient, and the trainer gave none")
        bonus = entropy_coef * rows.entropy
        term = -bonus if term is None else term - bonus
    return term, metrics
