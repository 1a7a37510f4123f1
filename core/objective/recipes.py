"""The GRPO family, side by side. Each recipe names only what it changes; the rest is plain GRPO, the first entry.

`dapo(epsilon_high=0.3)` is a recipe with another option, `dapo.options` are all it has, `build` makes one from a config
section. A new method is a new entry here; a new piece is a function in the module of its slot. Grades: see `Recipe`.
In equations r is the reward, A the advantage, rho the ratio of new to old probability, l and l_old log-probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from core.objective.advantage import (
    anchored_values,
    balanced_advantages,
    group_advantages,
    keep_groups,
    median_advantages,
    quantile_advantages,
    ranked_advantages,
    virtual_maximum,
)
from core.objective.aggregation import decoupled_sum, favour_unlikely, gated_mean, group_range_sum, share_credit
from core.objective.composition import Recipe, combine, unknown
from core.objective.forward_process import mirrored_regression, signed_preference
from core.objective.modulation import (
    add_tempered_imitation,
    gate_entropy,
    mask_indistinct,
    route_to_teacher,
    share_of_protected,
    weight_by_answer_entropy,
    weight_by_difficulty,
    weight_by_exponential,
    weight_by_influence,
)
from core.objective.reduction import reduce_loss
from core.objective.regularizer import closed_form_kl, distance_to_sampler, entropy_band, guard_likelihood
from core.objective.surrogate import (
    capped_token_ratio,
    clipped_normalised_ratio,
    clipped_sequence_ratio,
    clipped_token_ratio,
    masked_reinforce,
    mixed_ratio,
    taught_or_clipped,
)

centred = partial(group_advantages, scale="none")
token_mean = partial(reduce_loss, reduction="token_mean")
fixed_length = partial(reduce_loss, reduction="fixed_length")
reinforce = partial(masked_reinforce, clip="none", weight="none")
batch_scaled = partial(group_advantages, scale="batch", ddof=0, limit=5.0)
narrow_clip = partial(clipped_token_ratio, epsilon_low=1e-4)

# -- the base and its reductions ----------------------------------------------------------------------------------------

grpo = Recipe(
    "grpo",
    source="arXiv 2402.03300; TRL loss_type=grpo (to the bit with reduction=sequence_mean_local)",
    grade="a",
    summary="reward minus the group's mean, over its standard deviation; clipped token ratio; mean per rollout",
    equation="A = (r - mean r) / (std r + eps);  L = -min(rho A, clip(rho, 1 - low, 1 + high) A)",
)

dr_grpo = Recipe(
    "dr_grpo",
    source="arXiv 2503.20783; TRL loss_type=dr_grpo, scale_rewards=none",
    grade="a",
    summary="divides neither by spread nor by length, which favour very easy or hard prompts and long wrong answers",
    equation="A = r - mean r;  L = sum over tokens / (rollouts * longest length)",
    advantage=centred,
    reduce=fixed_length,
)

dapo = Recipe(
    "dapo",
    source="arXiv 2503.14476; TRL loss_type=dapo, epsilon_high=0.28",
    grade="a",
    summary="a higher upper clip, so that rare tokens can grow; every token weighs the same; see also filter=outcome",
    equation="clip(rho, 0.8, 1.28);  L = mean over tokens",
    surrogate=partial(clipped_token_ratio, epsilon_high=0.28),
    reduce=token_mean,
)

bnpo = Recipe(
    "bnpo",
    source="TRL loss_type=bnpo (not the Beta normalisation of the same letters)",
    grade="a",
    summary="token mean within each micro-batch",
    equation="L = mean over the micro-batch's tokens",
    reduce=partial(reduce_loss, reduction="token_mean_local"),
)

gspo = Recipe(
    "gspo",
    source="arXiv 2507.18071; TRL importance_sampling_level=sequence",
    grade="a",
    summary="one ratio per rollout, the geometric mean of its tokens', with a very narrow clip; no credit by token survives it",
    equation="s = exp(mean over tokens of (l - l_old));  L = -min(s A, clip(s, 1 - 3e-4, 1 + 4e-4) A)",
    surrogate=partial(clipped_sequence_ratio, epsilon_low=3e-4, epsilon_high=4e-4),
    needs=frozenset({"whole_rollouts"}),
)

cispo = Recipe(
    "cispo",
    source="arXiv 2506.13585, cap 5 of 2510.13786; TRL loss_type=cispo",
    grade="a",
    summary="caps the importance weight instead of the objective: no token loses its gradient",
    equation="L = -min(rho, 5).detach() A l, mean over tokens",
    surrogate=capped_token_ratio,
    reduce=token_mean,
)

# -- baselines and scales -----------------------------------------------------------------------------------------------

rloo = Recipe(
    "rloo",
    source="arXiv 2402.14740; TRL RLOOTrainer (there with one ratio per rollout: the same gradient at ratio 1)",
    grade="a",
    summary="baseline from the other rollouts alone, no scale; log-probabilities summed over the rollout",
    equation="A_i = r_i - mean of r_j, j != i",
    advantage=partial(group_advantages, baseline="leave_one_out", scale="none"),
    reduce=fixed_length,
)

mc_grpo = Recipe(
    "mc_grpo",
    source="arXiv 2601.22582 (released code: mad_floor=0)",
    grade="a",
    summary="median instead of mean, from one rollout more: an outlier turns fewer signs; for small groups of graded rewards",
    equation="A = (r - median r) / (MAD + 1e-3) * n / n(A != 0);  the median itself is dropped",
    advantage=median_advantages,
    needs=frozenset({"extra_rollout"}),
)

ngrpo = Recipe(
    "ngrpo",
    source="arXiv 2509.18851",
    grade="a",
    summary="adds a virtual perfect rollout, so that groups that are all wrong push away from what they did",
    equation="A = (r - mean r~) / (std r~ + 1e-6), r~ = r and r_max;  clip(rho, 0.84, 1.24);  all-right groups are dropped",
    advantage=virtual_maximum,
    filter=partial(keep_groups, filter="all_right"),
    surrogate=partial(clipped_token_ratio, epsilon_low=0.16, epsilon_high=0.24),
    reduce=token_mean,
)

gaussian_rank = Recipe(
    "gaussian_rank",
    source="arXiv 2604.08539 (G2RPO of OpenVLThinkerV2; its length reward is rewards.text.length_within)",
    grade="b",
    summary="advantages are the normal quantiles of ranks, deaf to outliers and scales; each task's entropy kept in a band",
    equation="A = Phi^-1((rank - 1/2) / G), ties share;  + c * (max(0, H_task - high) + max(0, low - H_task))",
    advantage=quantile_advantages,
    annotate=gate_entropy,
    penalty=entropy_band,
    needs=frozenset({"old_logps", "task", "whole_batch"}),
)

red_drop = Recipe(
    "red_drop",
    source="arXiv 2509.24203 (RED-Drop)",
    grade="a",
    summary="drops negatives at random until they are no more than the positives",
    equation="A = r - mean over what is left;  L = -A l",
    advantage=balanced_advantages,
    surrogate=reinforce,
    reduce=token_mean,
)

# -- several rewards ----------------------------------------------------------------------------------------------------

gdpo = Recipe(
    "gdpo",
    source="arXiv 2601.05242; TRL multi_objective_aggregation=normalize_then_sum",
    grade="a",
    summary="each component is normalised in its group before the sum, then the whole batch: none drowns another",
    equation="A = whiten over the batch(sum_k w_k (R_k - mean R_k) / (std R_k + eps))",
    aggregate=decoupled_sum,
    advantage=partial(group_advantages, baseline="batch", scale="batch"),
    needs=frozenset({"whole_batch"}),
)

safety_gated = Recipe(
    "safety_gated",
    source="arXiv 2503.21819",
    grade="c",
    summary="what fails the gate ranks below all that passes it, however good the rest; for the others the weighted mean",
    equation="r = sum_k w_k R_k if R_gate >= 0.5, else R_gate - 1",
    aggregate=gated_mean,
)

unlikeliness = Recipe(
    "unlikeliness",
    source="arXiv 2506.02355 (text: rank_offset=1)",
    grade="a",
    summary="right rollouts that were likely anyway earn less, so that rare ones grow; two passes over a batch or more",
    equation="r' = r (1 - 0.25 rank(mean l_old) / G), 0 = least likely;  groups without contrast are dropped",
    shape=favour_unlikely,
    filter=partial(keep_groups, filter="outcome"),
    needs=frozenset({"old_logps", "several_updates"}),
)

# -- weights on advantages ----------------------------------------------------------------------------------------------

red_weight = Recipe(
    "red_weight",
    source="arXiv 2509.24203 (RED-Weight)",
    grade="a",
    summary="good rollouts count exponentially more than bad ones",
    equation="A = (r - mean r) exp(r - mean r);  L = -A l",
    advantage=centred,
    modulate=weight_by_exponential,
    surrogate=reinforce,
    reduce=token_mean,
)

a_grae = Recipe(
    "a_grae",
    source="arXiv 2602.05548 (released code: easy_term=released)",
    grade="b",
    summary="easy prompts first, hard ones later; pushes up only as far as the batch succeeds, so that it explores early",
    equation="A (omega / sqrt p + (1 - omega) / sqrt(1 - p)) / 2, times min(1, omega / alpha) where A > 0",
    modulate=weight_by_difficulty,
    needs=frozenset({"whole_batch"}),
)

seed_grpo = Recipe(
    "seed_grpo",
    source="arXiv 2505.12346 (its trainer: alpha=0.0417)",
    grade="b*",
    summary="smaller steps on prompts whose answers disagree; at the published scale by 4 % at most",
    equation="A = (r - mean r) / (1 + alpha SE / log G)",
    advantage=centred,
    modulate=weight_by_answer_entropy,
    reduce=fixed_length,
)

dagrpo = Recipe(
    "dagrpo",
    source="after the abstract of arXiv 2512.06337; the rule is ours, without its expert anchors",
    grade="c",
    summary="silences rollouts that no rollout of the other kind differs from in quality",
    equation="A_i = 0 unless f(right) - f(wrong) > 0.2 for a pair with i in it",
    modulate=mask_indistinct,
)

token_hidden_reward = Recipe(
    "token_hidden_reward",
    source="arXiv 2510.03669 through its reviews, 2505.18830",
    grade="c/b*",
    summary="only tokens that move the likelihood of right rollouts count; more (exploit) or less (explore) if they raise it",
    equation="A_t = A (1 + p sign THR_t) [|THR_t| > tau], THR_t = sign(A) g_t' M h_t",
    modulate=weight_by_influence,
    needs=frozenset({"influence"}),
)

distribution_centric = Recipe(
    "distribution_centric",
    source="arXiv 2601.12730 (DCPO; not the dynamic clipping of the same letters)",
    grade="a",
    summary="pulls entropy to a target by imitating right rollouts as a hotter or cooler policy would have sampled them",
    equation="A_t = (1 - a) A + a [right] exp(l_old at temperature T - l_old);  T = 1.2 up to the target entropy, else 0.8",
    modulate=add_tempered_imitation,
    surrogate=partial(clipped_token_ratio, delta=3.0),
    reduce=token_mean,
    needs=frozenset({"old_logps", "tempered_logps", "whole_batch"}),
)

# -- ratios, clips and what is added ------------------------------------------------------------------------------------

rec = Recipe(
    "rec",
    source="arXiv 2509.24203 (REC; clip: one_side, two_side, ring, none; weight: ratio, none)",
    grade="a",
    summary="REINFORCE on the tokens a clip lets through; on data many updates old it was safer here with weight=none",
    equation="L = -M(rho, A) rho.detach() A l, A = r - mean r",
    advantage=centred,
    surrogate=masked_reinforce,
    reduce=token_mean,
)

opmd = Recipe(
    "opmd",
    source="arXiv 2509.24203 (OPMD; the older form, but for a factor: baseline=log_mean_exp, penalty=0)",
    grade="a",
    summary="no ratio and no clip: a squared distance to the policy that sampled instead; lower its penalty on old data",
    equation="L = -A l + 0.1 (l - l_old)^2, A = r - mean r",
    advantage=centred,
    surrogate=reinforce,
    penalty=distance_to_sampler,
    reduce=token_mean,
)

asymre = Recipe(
    "asymre",
    source="arXiv 2509.24203 (AsymRE)",
    grade="a",
    summary="no ratio and no clip: a baseline lowered by 0.1, that is some imitation of whatever was sampled",
    equation="L = -A l - 0.1 l, A = r - mean r",
    advantage=centred,
    surrogate=reinforce,
    penalty=partial(distance_to_sampler, toward="forward_kl"),
    reduce=token_mean,
)

dhpo = Recipe(
    "dhpo",
    source="arXiv 2601.05607 (pessimism, mix: its possible readings)",
    grade="c/b*",
    summary="token ratios and the sequence ratio, each clipped in its own range, mixed",
    equation="L = -(w min(rho A, clip(rho) A) + (1 - w) min(s A, clip(s) A)), w = 1/2",
    surrogate=mixed_ratio,
    needs=frozenset({"whole_rollouts", "several_updates"}),
)

llds = Recipe(
    "llds",
    source="arXiv 2512.04220 (released code: protected=all)",
    grade="a/b",
    summary="keeps turns of rollouts that were not bad from losing likelihood, as they do before a collapse; wants filter=none",
    equation="+ 0.2 * mean over tokens with A >= 0 of [turn fell] max(0, l_old - l)",
    annotate=share_of_protected,
    penalty=guard_likelihood,
    needs=frozenset({"whole_rollouts", "several_updates"}),
)

sample_routed = Recipe(
    "sample_routed",
    source="arXiv 2604.02288 (SRPO, one of several of that name)",
    grade="b",
    summary="wrong rollouts with a right sibling learn from a teacher that sees it, token by token; the others as in GRPO",
    equation="L = w KL(policy || teacher), w = exp(-H) over its mean, where wrong and taught;  else GRPO;  mean over tokens",
    annotate=route_to_teacher,
    surrogate=taught_or_clipped,
    reduce=token_mean,
    needs=frozenset({"teacher", "whole_batch"}),
)

# -- flow policies: a decision is a noisy denoising step, its log-probability a mean over elements -----------------------

flow_grpo = Recipe(
    "flow_grpo",
    source="arXiv 2505.05470 (its KL: beta=0.04 with rollout.divergence=code); Talk2Move of 2601.02356: epsilon_low=2e-4 with"
    " rollout.window=first",
    grade="a",
    summary="GRPO on denoising steps: the batch's spread for all groups, a clip as narrow as log-probabilities per element ask",
    equation="A = clip((r - group mean) / (batch std + 1e-4), -5, 5);  clip(rho, 1 - 1e-4, 1 + 1e-4);"
    "  + beta * mean((mu - mu_ref)^2) / (2 std^2)",
    advantage=batch_scaled,
    surrogate=narrow_clip,
    regularize=closed_form_kl,
    needs=frozenset({"whole_batch"}),
)

dance_grpo = Recipe(
    "dance_grpo",
    source="arXiv 2505.07818; mix_grpo of 2507.21802: with rollout.window=sliding, window_size=4, kernel=flow",
    grade="a",
    summary="each group's own spread, no KL; mix_grpo is the same objective on a sliding window of noisy steps",
    equation="A = clip((r - group mean) / (group std + 1e-8), -5, 5);  clip(rho, 1 - 1e-4, 1 + 1e-4)",
    advantage=partial(group_advantages, eps=1e-8, limit=5.0),
    surrogate=narrow_clip,
    regularize=closed_form_kl,
)

grpo_guard = Recipe(
    "grpo_guard",
    source="arXiv 2510.22319",
    grade="b*",
    summary="ratios that are centred and spread alike at every step, so that the clip holds positives too; steps weigh alike",
    equation="rho = exp((l - l_old + mean((mu - mu_old)^2) / (2 std^2)) std);  L = -min(rho A, clip(rho) A) / dt",
    advantage=batch_scaled,
    surrogate=clipped_normalised_ratio,
    regularize=closed_form_kl,
    needs=frozenset({"drift", "whole_batch"}),
)

value_anchored = Recipe(
    "value_anchored",
    source="arXiv 2512.12387 (VGPO of flow models)",
    grade="b*/c",
    summary="values along a trajectory instead of one reward, and a push that is left when all rollouts score the same",
    equation="Q_j = sum_k>=j gamma^(k-j) r_k;  A_j = Q_j / mean Q * (Q_j - group mean) / group std + 0.1 Q_j",
    advantage=anchored_values,
    surrogate=narrow_clip,
    regularize=closed_form_kl,
    needs=frozenset({"aligned"}),
)

diffusion_nft = Recipe(
    "diffusion_nft",
    source="arXiv 2509.16117 (mix=0.1 for several rewards); Edit-R1 of 2510.16888",
    grade="a",
    summary="no noisy steps, no ratio: velocities regress on good samples, and their mirror images at the old ones on bad ones;"
    " wants rollout.shared_noise=false",
    equation="r = clip(A / 10 + 1/2, 0, 1);  v+ = v_old + b (v - v_old), v- = v_old - b (v - v_old), x = noised - sigma v;"
    "  L = 5 / b (r |x+ - clean|^2 / w+ + (1 - r) |x- - clean|^2 / w-) + 1e-4 |v - v_ref|^2, w = mean |x - clean|",
    advantage=batch_scaled,
    loss_fn=mirrored_regression,
    needs=frozenset({"renoised", "whole_batch"}),
)

group_preference = Recipe(
    "group_preference",
    source="arXiv 2603.16769 (GDPO-SR; not the GDPO of several rewards)",
    grade="a",
    summary="a group is one signed preference against the reference; no noisy steps, no ratio: for one-step generators too;"
    " wants rollout.shared_noise=false",
    equation="r = sum_k w_k (R_k - min R_k) / (max R_k - min R_k);  L = -log sigmoid(-beta / 2 * sum_j A_j (l_j - l_ref_j)),"
    " l = |v - (noise - clean)|^2",
    aggregate=group_range_sum,
    advantage=partial(group_advantages, eps=1e-8),
    loss_fn=signed_preference,
    needs=frozenset({"renoised", "whole_groups", "whole_rollouts"}),
)

# -- forecasts: a decision is the class of one cell at one lead, and costs are what rewards differ by ---------------------

forecast_grpo = Recipe(
    "forecast_grpo",
    source="ours, after arXiv 2511.22169 (its credit by field: credit=rollout)",
    grade="c",
    summary="each decision against the same one in the group; one scale for all, so that what costs more pushes more",
    equation="A_t = (r_t - group mean r_t) / (root mean square of all that is left over the batch + eps);"
    "  L = -min(rho A, clip(rho, 1 - low, 1 + high) A) + beta * KL_t, mean over decisions",
    shape=share_credit,
    advantage=partial(group_advantages, scale="pooled"),
    regularize=closed_form_kl,
    reduce=token_mean,
    needs=frozenset({"aligned", "whole_batch"}),
)

faker_air = Recipe(
    "faker_air",
    source="arXiv 2511.22169, without its running statistics, weights of variables and leads, and controlled beta",
    grade="a",
    summary="one reward per rollout; ranks with some of the score; log-probabilities averaged over the rollout, no ratio",
    equation="A = 0.9 rank(r) + 0.1 (r - batch mean) / batch std, rank in [-1, 1], ties share;"
    "  L = mean over decisions of (-A l + 5e-4 KL)",
    advantage=ranked_advantages,
    surrogate=reinforce,
    regularize=partial(closed_form_kl, beta=5e-4),
    needs=frozenset({"whole_batch"}),
)

RECIPES = {recipe.name: recipe for recipe in list(globals().values()) if isinstance(recipe, Recipe)}


def build(options: Mapping[str, Any]) -> Recipe:
    """The recipe of a config section: {recipe: dapo, epsilon_high: 0.3}, or {recipe: [gdpo, gspo], beta: 0.01}.

    Raises ValueError: an unknown recipe, option or value (with the nearest one that exists), two recipes for one slot.
    """
    options = {str(name): value for name, value in options.items()}
    names = options.pop("recipe", "grpo")
    names = names if isinstance(names, list | tuple) and names else [names]
    for name in names:
        if str(name) not in RECIPES:
            raise ValueError(unknown("recipe", name, RECIPES))
    return combine([RECIPES[name] for name in names])(**options)
