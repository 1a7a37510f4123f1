"""What multiplies, masks or spreads an advantage over decisions, and what the loss must know of whole groups.

modulate(advantage, group): (P, G) or (P, G, T) in, the same or (P, G, T) out; what is constant in a group must come here,
after the baseline, which would cancel it. annotate(group, advantage, keep): tensors with one row a rollout, for the loss,
which sees neither neighbours nor the rest of the batch.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from core.objective.advantage import group_advantages
from core.objective.group import Group


def unmodulated(advantage: Tensor, group: Group) -> Tensor:
    """Advantages as they are."""
    return advantage


def weight_by_exponential(advantage: Tensor, group: Group, *, temperature: float = 1.0) -> Tensor:
    """A * exp(A / temperature): good rollouts count for more, bad ones for less.

    advantage: (P, G) or (P, G, T); returns the shape.
    temperature: the smaller, the more the best ones count.
    Source: arXiv 2509.24203 (RED-Weight); read in the authors' code.
    """
    return advantage * torch.exp(advantage / temperature)


def weight_by_difficulty(
    advantage: Tensor,
    group: Group,
    *,
    alpha: float = 1.0,
    least_progress: float = 0.0,
    easy_term: Literal["text", "released"] = "text",
    success: float = 1.0,
) -> Tensor:
    """Easy groups while the batch is mostly wrong, hard ones later; and positive advantages grow with the batch's success.

        A / 2 * (omega / sqrt(p) + (1 - omega) / sqrt(1 - p)), times min(1, omega / alpha) where A > 0

    advantage: (P, G) or (P, G, T); returns the shape. p: share of a group's scored rollouts that are right; omega: of the
    batch's, at least `least_progress`. Groups with p = 0 or 1 keep the first factor 1.
    easy_term: the text divides by sqrt(1 - p), the released code by 1 - sqrt(p) + 1e-6 (and by sqrt(p) + 1e-6).
    alpha: the batch's success from which positive advantages are whole. least_progress: omega is never less. success:
    the outcome from which a rollout is right.
    Source: arXiv 2602.05548; read in the text, the deviation in the code. Rewards that are not 0 or 1: `success` is ours.
    """
    right, scored = group.right(success) & group.scored, group.scored
    share = right.sum(dim=1, keepdim=True) / scored.sum(dim=1, keepdim=True).to(advantage.dtype)
    progress = (right.sum() / scored.sum().clamp(min=1).to(advantage.dtype)).clamp(min=least_progress)
    if easy_term == "text":
        hard, easy = share.sqrt(), (1 - share).sqrt()
    else:
        hard, easy = share.sqrt() + 1e-6, 1 - share.sqrt() + 1e-6
    factor = torch.where((share > 0) & (share < 1), (progress / hard + (1 - progress) / easy) / 2, 1.0)
    advantage = advantage * _like(factor, advantage)
    return torch.where(advantage > 0, advantage * (progress / alpha).clamp(max=1.0), advantage)


def add_tempered_imitation(
    advantage: Tensor,
    group: Group,
    *,
    target: float = 0.25,
    hot: float = 1.2,
    cold: float = 0.8,
    most: float = 0.1,
    cap: float | None = None,
    correct: float = 0.05,
) -> Tensor:
    """(1 - a) * A, plus a * rho on right rollouts: imitation of them as a hotter or cooler policy would have sampled them.

        rho_t = exp(logp of the policy at temperature T - old logp)        a = s / (1 + s), s = min(|target - H|, most) / f

    advantage: (P, G) or (P, G, T); returns (P, G, T). H: mean of -old_logps over the batch's decisions, nats; T: `hot` up
    to the target entropy, `cold` above it; f: share of scored rollouts that are right (outcome >= correct); a = 0 if none
    is. cap: of rho; None = none. Right rollouts keep their push in groups without spread.
    The authors take H from the update before, here it is that of the batch at hand: the same number, one step fresher.
    target: the entropy to hold, nats. hot, cold: temperature of the imitated policy below and above the target. most:
    distance from the target beyond which imitation grows no more, nats. correct: the outcome from which a rollout is
    right.
    Source: arXiv 2601.12730; read in the authors' code, which gives NaN where nothing is right.
    """
    mask = _decisions(group).flatten(0, 1)
    entropy = -torch.where(mask, group.old_logps, 0.0).sum() / mask.sum().clamp(min=1)
    right, scored = group.right(correct) & group.scored, group.scored
    share = right.sum() / scored.sum().clamp(min=1)
    strength = (target - entropy).abs().clamp(max=most) / share
    mixed = torch.where(share > 0, strength / (1 + strength), 0.0).to(advantage.dtype)
    tempered = group.model.tempered_logps(hot if entropy <= target else cold)
    imitated = mask & right.view(-1, 1)
    ratio = torch.where(imitated, (tempered - group.old_logps).exp(), 0.0).view(*right.shape, -1).to(advantage.dtype)
    if cap is not None:
        ratio = ratio.clamp(max=cap)
    return (1 - mixed) * _per_decision(advantage, ratio) + mixed * ratio


def weight_by_answer_entropy(
    advantage: Tensor,
    group: Group,
    *,
    answers: str = "answer",
    alpha: float = 0.02,
    entropy: Literal["mean_log", "shannon"] = "mean_log",
    mass: Literal["count", "probability"] = "count",
    decay: Literal["reciprocal", "linear", "exponential", "focal"] = "reciprocal",
    focus: float = 2.0,
) -> Tensor:
    """Smaller steps on prompts whose answers disagree: A * f(alpha * SE / log G).

    advantage: (P, G) or (P, G, T); returns the shape. answers: the component (weight 0) whose equal values in a group mean
    equal answers; rollouts it does not apply to share one cluster. entropy: mean_log is -(1 / K) * sum of log P over K
    clusters (the text's), shannon -sum of P log P; SE / log G is kept in [0, 1]. mass: P from counts, or from sequence
    probabilities under the old policy. decay: f = 1 / (1 + x), 1 - x, exp(-x), (1 - x)^focus.
    alpha: .02 in the text, .0417 in the trainer. The effect is small: at .0417 the factor lies in [.96, 1]. mean_log counts a
    small cluster like a large one: one odd answer out of eight (1.11) is more disagreement than four against four (.69).
    focus: exponent of decay=focal.
    Raises ValueError for an unknown component, or probability masses without old log-probabilities.
    Source: arXiv 2505.12346 through third parties; counts and the one cluster of unreadable answers are ours.
    """
    value = group.rewards[:, :, group.index(answers)]
    value = value if value.dim() == 2 else value.nanmean(dim=2)
    value = torch.where(value.isnan(), -torch.inf, value)
    scored, size = group.scored, group.scored.sum(dim=1, keepdim=True).clamp(min=1)
    weight = scored / size
    if mass == "probability":
        if group.old_logps is None:
            raise ValueError("mass=probability needs old log-probabilities; use mass=count")
        total = torch.where(_decisions(group).flatten(0, 1), group.old_logps, 0.0).sum(1).view(scored.shape)
        weight = torch.nan_to_num(total.masked_fill(~scored, -torch.inf).softmax(dim=1), nan=0.0)
    same = (value.unsqueeze(1) == value.unsqueeze(2)) & scored.unsqueeze(1) & scored.unsqueeze(2)
    log_mass = (same * weight.unsqueeze(1)).sum(dim=2).clamp(min=1e-45).log()
    members = same.sum(dim=2).clamp(min=1)
    if entropy == "shannon":
        spread = -torch.where(scored, weight * log_mass, 0.0).sum(dim=1, keepdim=True)
    else:
        each = torch.where(scored, 1 / members, 0.0)
        spread = -(each * log_mass).sum(dim=1, keepdim=True) / each.sum(dim=1, keepdim=True).clamp(min=1)
    x = alpha * torch.where(size > 1, spread / size.log(), 0.0).clamp(0.0, 1.0)
    factor = {
        "reciprocal": lambda: 1 / (1 + x),
        "linear": lambda: 1 - x,
        "exponential": lambda: (-x).exp(),
        "focal": lambda: (1 - x) ** focus,
    }[decay]()
    return advantage * _like(factor.to(advantage.dtype), advantage)


def mask_indistinct(
    advantage: Tensor,
    group: Group,
    *,
    quality: str = "quality",
    margin: float = 0.2,
    renormalize: bool = False,
    success: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """0 for rollouts that no rollout of the other kind differs from by more than `margin` in quality; and keep.

    advantage: (P, G) or (P, G, T); returns the shape, and (P, G) bool: False for groups that have right and wrong rollouts
    but no distinct pair. A right one should stand above a wrong one.
    quality: a finer component than the outcome, which may have weight 0; where it does not apply to a rollout, all pairs
    with it count as distinct. renormalize: centre and scale anew over what is left.
    margin: a right and a wrong rollout must differ by more to be a pair. success: the outcome from which a rollout is
    right.
    Raises ValueError for an unknown component. Source: the rule is ours, after the abstract of arXiv 2512.06337; its
    expert anchors for hard prompts are not here.
    """
    fine = group.rewards[:, :, group.index(quality)]
    fine = fine if fine.dim() == 2 else fine.nanmean(dim=2)
    right, wrong = group.right(success) & group.scored, ~group.right(success) & group.scored
    high = torch.where(right, torch.nan_to_num(fine, nan=torch.inf), -torch.inf)
    low = torch.where(wrong, torch.nan_to_num(fine, nan=-torch.inf), torch.inf)
    distinct = torch.where(
        right, high - low.amin(dim=1, keepdim=True) > margin, high.amax(dim=1, keepdim=True) - low > margin
    )
    contrast = right.any(dim=1, keepdim=True) & wrong.any(dim=1, keepdim=True)
    masked = contrast & ~distinct & group.scored
    keep = (~contrast | distinct.any(dim=1, keepdim=True)).expand_as(masked)
    if renormalize:
        return group_advantages(advantage.masked_fill(_like(masked | ~group.scored, advantage), torch.nan)), keep
    return advantage.masked_fill(_like(masked, advantage), 0.0), keep


def token_influence(hidden: Tensor, logit_gradient: Tensor, mask: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """How much a step on each token would move the likelihood of a group's right rollouts, to first order.

        s_t = g_t' M h_t        M = sum over the tokens of right rollouts of g h'        (V x d: never tokens x tokens)

    hidden: (G, T, d), the last hidden state that predicts the token. logit_gradient: (G, T, V), onehot - softmax over the
    vocabulary's columns that occur in the group (not renormalised). mask: (G, T). right: (G,) bool.
    Returns (G, T) twice, float32 or wider: s, and the part of it that a right rollout owes to itself.
    Source: built from arXiv 2505.18830 and the reviews of 2510.03669; scale and sign are ours.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    used = mask.bool().unsqueeze(2)
    hidden, gradient = (torch.where(used, part.to(wide), 0.0) for part in (hidden, logit_gradient))
    each = torch.einsum("gtv,gtd->gvd", gradient * right.view(-1, 1, 1), hidden)
    own = torch.einsum("gtv,gvd,gtd->gt", gradient, each, hidden)
    return torch.einsum("gtv,vd,gtd->gt", gradient, each.sum(dim=0), hidden), own


def weight_by_influence(
    advantage: Tensor,
    group: Group,
    *,
    exploit: float = 0.1,
    tau_scale: float = 1.0,
    threshold: float | None = None,
    self_pairs: bool = True,
    success: float = 1.0,
) -> Tensor:
    """Advantages of the tokens that move the right rollouts' likelihood, times 1 + exploit * sign; 0 for the others.

        A_t = A * (1 + exploit * sign(THR_t)) where |THR_t| > tau        THR_t = sign(A) * s_t (`token_influence`)

    advantage: (P, G) or (P, G, T); returns (P, G, T). exploit > 0 sharpens what is right already, < 0 explores.
    threshold: tau; None = tau_scale * the least mean of s over a right rollout of the group, at least 0. self_pairs: s counts
    what a right rollout owes to itself. Groups that are all right or all wrong are left alone.
    exploit: how much more a token counts whose own step makes the right rollouts likelier, and less one that makes them
    less likely; below 0 the reverse. tau_scale: see threshold. success: the outcome from which a rollout is right.
    Source: see `token_influence`.
    """
    right = group.right(success) & group.scored
    total, own = (part.view(*right.shape, -1).to(advantage.dtype) for part in group.model.influence(right))
    influence = total if self_pairs else total - own
    mask = _decisions(group)
    advantage = _per_decision(advantage, influence)
    mean = (influence * mask).sum(dim=2) / mask.sum(dim=2).clamp(min=1.0)
    least = mean.masked_fill(~right, torch.inf).amin(dim=1).clamp(min=0.0)
    tau = tau_scale * least.view(-1, 1, 1) if threshold is None else threshold
    hidden_reward = advantage.sign() * influence
    weighted = advantage * (1 + exploit * hidden_reward.sign()) * (hidden_reward.abs() > tau)
    contrast = right.any(dim=1) & (~right & group.scored).any(dim=1)
    return torch.where(contrast.view(-1, 1, 1), weighted, advantage)


# -- what the loss must know of whole groups ---------------------------------------------------------------------------


def nothing(group: Group, advantage: Tensor, keep: Tensor) -> dict[str, Tensor]:
    """The loss needs nothing else."""
    return {}


def share_of_protected(
    group: Group, advantage: Tensor, keep: Tensor, *, protected: Literal["mean", "all"] = "mean"
) -> dict[str, Tensor]:
    """`protected` (B,): 0 for rollouts with a negative advantage; so scaled that their tokens' mean is the rows' mean.

    protected: mean of the protected rollouts' tokens (the text), or of all tokens (the released code).
    Source: arXiv 2512.04220; read in text and code.
    """
    mask = _decisions(group) & keep.unsqueeze(2)
    good = (_per_decision(advantage, mask) * mask).sum(dim=2) >= 0
    tokens = (mask * good.unsqueeze(2)).sum() if protected == "mean" else mask.sum()
    return {"protected": (good & keep).flatten() * keep.sum() / tokens.clamp(min=1)}


def gate_entropy(
    group: Group, advantage: Tensor, keep: Tensor, *, entropy_low: float = 0.2, entropy_high: float = 0.8
) -> dict[str, Tensor]:
    """`entropy_gate` and `entropy_bound` (B,): which way a task's entropy must go, 0 inside the band, and the bound.

    A task's entropy: the mean of -old_logps over its kept tokens, nats. The gate is so scaled that the mean over a task's
    tokens is the mean over the update's rows. A task without a kept token has gate 0.
    entropy_low, entropy_high: the band, nats.
    Raises ValueError for a band whose lower bound is the higher one.
    Source: arXiv 2604.08539; read in the text. The bounds' values are ours.
    """
    if entropy_low > entropy_high:
        raise ValueError(
            f"entropy_low={entropy_low} is above entropy_high={entropy_high}; there is no band between them"
        )
    mask = (_decisions(group) & keep.unsqueeze(2)).flatten(0, 1)
    task = torch.zeros_like(keep[:, 0], dtype=torch.long) if group.task is None else group.task
    row_task = task.repeat_interleave(keep.shape[1])
    surprise = torch.where(mask, -group.old_logps, 0.0)
    tasks = int(task.max()) + 1
    tokens = surprise.new_zeros(tasks).index_add(0, row_task, mask.sum(1).to(surprise.dtype))
    entropy = surprise.new_zeros(tasks).index_add(0, row_task, surprise.sum(1)) / tokens.clamp(min=1)
    way = (entropy > entropy_high).to(surprise.dtype) - (entropy < entropy_low).to(surprise.dtype)
    bound = torch.full_like(way, entropy_low).masked_fill(way > 0, entropy_high)
    gate = torch.where(tokens > 0, way * keep.sum() / tokens, 0.0)
    return {"entropy_gate": gate[row_task], "entropy_bound": bound[row_task]}


def route_to_teacher(
    group: Group, advantage: Tensor, keep: Tensor, *, sharpness: float = 1.0, success: float = 1.0
) -> dict[str, Tensor]:
    """`distillation_weight` (B, T): exp(-sharpness * H) over its mean, for wrong rollouts that have a right sibling; else 0.

    H: the teacher's entropy at the decision, nats. The mean goes over all such tokens of the batch.
    sharpness: how much less a token counts where the teacher is unsure. success: the outcome from which a rollout is
    right.
    Source: arXiv 2604.02288; read in the text.
    """
    right = group.right(success) & group.scored
    taught = ~right & keep & right.any(dim=1, keepdim=True)
    mask = (_decisions(group) & taught.unsqueeze(2)).flatten(0, 1)
    if not mask.any():
        return {"distillation_weight": torch.zeros(mask.shape, dtype=advantage.dtype, device=mask.device)}
    unsure = sharpness * group.model.teach(taught, right)
    share = (-unsure).masked_fill(~mask, -torch.inf).flatten().softmax(dim=0).view_as(unsure)
    return {"distillation_weight": share * mask.sum()}


def _decisions(group: Group) -> Tensor:
    """(P, G, T) bool: the decisions that carry loss. Raises ValueError if the group does not say."""
    if group.mask is None:
        raise ValueError("this objective looks at single decisions, and the group has no mask of those that carry loss")
    return group.mask.bool().view(*group.rewards.shape[:2], -1)


def _like(values: Tensor, advantage: Tensor) -> Tensor:
    """(P, ...) seen with as many dimensions as the advantage."""
    return values.view(*values.shape, *[1] * (advantage.dim() - values.dim()))


def _per_decision(advantage: Tensor, like: Tensor) -> Tensor:
    """(P, G) or (P, G, T) -> (P, G, T)."""
    return (advantage.unsqueeze(2) if advantage.dim() == 2 else advantage).expand_as(like)
