"""What is added to the policy term: distance to a reference policy or to the one that sampled, entropy, guards.

A `regularize` slot gives a term per decision. A `penalty` slot gives one per decision, (B, T), which goes through the
recipe's reduction too, or one per rollout, (B,), of which the mean over the update's kept rows is added.

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
    beta: weight of the KL. kl: its estimator, see `kl_estimate`. entropy_coef: weight of the entropy, which is to grow.
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


def closed_form_kl(rows: Rows, *, beta: float = 0.0) -> tuple[Tensor | None, Metrics]:
    """beta * KL(policy || reference) of each decision in closed form, (B, T), and metrics; None instead of the term if beta=0.

    Wants `divergence`, (B, T), in the extras: of a denoising step mean((mu - mu_ref)^2) / (2 std^2), nats per element; of a
    cell of a forecast its distribution's own, nats. No ratio multiplies it: it is the KL itself, not an estimate.
    beta: weight of the KL. Published for images: 0.04 (GenEval, OCR), 0.01 (PickScore), in the unit of the released code,
    whose KL leaves the step's length out of the variance (rollout.divergence=code); of the exact KL the same pull takes
    beta * dt, 0.004 at ten even steps.
    Source: arXiv 2505.05470; read in the authors' code.
    """
    if beta == 0.0:
        return None, {}
    divergence = rows.per_decision("divergence")
    return beta * divergence, {"kl": rows.masked_mean(divergence)}


def unpenalized(rows: Rows) -> tuple[None, Metrics]:
    """No further term."""
    return None, {}


def distance_to_sampler(
    rows: Rows, *, toward: Literal["k2", "forward_kl"] = "k2", penalty: float = 0.1
) -> tuple[Tensor, Metrics]:
    """penalty * (logp - old_logp)^2, or -penalty * logp, whose mean is KL(sampler || policy) but for a constant; (B, T).

    Not clipped and not weighted. k2 is 0 on fresh data. forward_kl imitates whatever was sampled, right or wrong: beside
    REINFORCE without a ratio the same as a baseline lowered by the penalty; on fresh data its expected gradient is 0.
    toward: the square (k2) or the imitation (forward_kl). penalty: weight of the term.
    Source: arXiv 2509.24203 (OPMD's and AsymRE's regularizers); read in the authors' code.
    """
    term = rows.log_ratio**2 if toward == "k2" else -rows.logps
    return penalty * term, {f"sampler_{toward}": rows.masked_mean(term)}


def guard_likelihood(
    rows: Rows, *, penalty: float = 0.2, level: Literal["turn", "rollout", "token"] = "turn"
) -> tuple[Tensor, Metrics]:
    """penalty * max(0, old_logp - logp) on the tokens of protected rollouts, where the likelihood of their turn fell; (B,).

    level: what must have become less likely as a whole, strictly, before its tokens count: a turn (a run of decisions with
    loss, which observations interrupt), the rollout, or the token alone. Wants `protected` in the extras. 0, and without
    gradient, where logps equal old_logps.
    penalty: weight of the term.
    Source: arXiv 2512.04220; read in text and code.
    """
    mask = rows.loss_mask.bool()
    fall = torch.where(mask, -rows.log_ratio, 0.0)
    if level == "token":
        gate = fall > 0
    else:
        starts = mask & ~torch.nn.functional.pad(mask[:, :-1], (1, 0))
        turn = starts.long().cumsum(dim=1) if level == "turn" else torch.zeros_like(mask, dtype=torch.long)
        sums = fall.new_zeros(len(fall), fall.shape[1] + 1).scatter_add(1, turn, fall.detach())
        gate = sums.gather(1, turn) > 0
    guarded = (gate & mask).to(fall.dtype) * torch.relu(fall)
    weight = rows.extra("protected").to(fall.dtype)
    return penalty * weight * guarded.sum(dim=1), {"guarded": rows.masked_mean(gate.float())}


def entropy_band(rows: Rows, *, band_coef: float = 0.01) -> tuple[Tensor, Metrics]:
    """band_coef * (max(0, H - high) + max(0, low - H)) of every task, H being the mean of -logp; (B,).

    Wants `entropy_gate` and `entropy_bound` in the extras: which side a task is on was decided once for the batch. The
    gradient is that of -logp of what was sampled, not of the entropy: on fresh data its expectation is 0, like that of k1.
    band_coef: weight of the term.
    Source: arXiv 2604.08539; read in the text, which does not give the coefficient.
    """
    bound = rows.extra("entropy_bound").to(rows.logps.dtype).unsqueeze(1)
    beyond = ((-rows.logps - bound) * rows.loss_mask).sum(dim=1)
    return band_coef * rows.extra("entropy_gate").to(rows.logps.dtype) * beyond, {}
