"""Worked examples of nineteen papers (oracles.json), each through the recipe or the slot function that claims to be it.

A solver takes a case's inputs and params and returns the values that the case names. What the package does not return is
read off what it does: a gradient, the difference of two advantages, the option at which a rollout falls silent.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from core.objective.advantage import group_advantages
from core.objective.group import Group
from core.objective.modulation import token_influence
from core.objective.recipes import (
    a_grae,
    asymre,
    dagrpo,
    dhpo,
    diffusion_nft,
    distribution_centric,
    dr_grpo,
    faker_air,
    flow_grpo,
    gaussian_rank,
    gdpo,
    group_preference,
    grpo,
    grpo_guard,
    gspo,
    llds,
    mc_grpo,
    ngrpo,
    opmd,
    rec,
    red_weight,
    safety_gated,
    sample_routed,
    seed_grpo,
    token_hidden_reward,
    unlikeliness,
    value_anchored,
)
from core.objective.rows import Counts, Rows
from rewards.text import length_within

CASES = {(c["paper"], c["case"]): c for c in json.loads(Path(__file__).with_name("oracles.json").read_text())}
ONES = {"baseline": "mean", "ddof": 0, "eps": 0.0}  # rewards [1, 0] get advantages [1, -1]


def doubles(values):
    return torch.as_tensor(values, dtype=torch.float64)


def group(rewards, **fields):
    """rewards: (G,), (G, K) of one group, or (P, G, K)."""
    rewards = doubles(rewards)
    rewards = rewards.view(*[1] * (rewards.dim() < 3), *rewards.shape, *[1] * (rewards.dim() == 1))
    rows = (rewards.shape[0] * rewards.shape[1], 1)
    given = {"weights": torch.ones(rewards.shape[2]), "mask": torch.ones(rows), "old_logps": -torch.ones(rows)}
    return Group(rewards=rewards, **given | {"outcome": 0} | fields)


def advantage(recipe, rewards, **fields):
    return recipe.credit(group(rewards, **fields)).advantage


class Says:
    """A model with fixed answers: group.model is asked through its protocol alone."""

    def __init__(self, **answers):
        self.__dict__ = answers

    def tempered_logps(self, temperature):
        return self.tempered(temperature)

    def influence(self, right):
        return self.scores, torch.zeros_like(self.scores)

    def teach(self, taught, right):
        return self.entropy


def rows(logps, advantage, old_logps, **fields):
    logps = doubles(logps).clone().requires_grad_()
    given = {"mask": torch.ones(logps.shape)} | fields
    counts = Counts(rows=len(logps), tokens=given["mask"].sum(), max_length=logps.shape[1])
    return Rows(logps=logps, advantage=doubles(advantage), old_logps=doubles(old_logps), **{"counts": counts} | given)


def mean_loss(recipe, given):
    loss = recipe.loss(given)
    return (loss.sum / loss.count).detach()


def pull(recipe, given):
    """(B, T): what each log-probability's gradient is multiplied by in a step up."""
    return -torch.autograd.grad(recipe.loss(given).sum, given.logps)[0]


def edge(holds, low, high):
    """The number up to which `holds` is true."""
    for _ in range(28):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def mean_of(values):
    return values - group_advantages(values.unsqueeze(0), scale="none")[0]


def std_of(values, ddof):
    """values: (G, ...), positive where they are looked at."""
    return values / group_advantages(values.unsqueeze(0), baseline="none", ddof=ddof, eps=1.0)[0] - 1


# -- arXiv 2509.24203 ---------------------------------------------------------------------------------------------------


def rec_advantages(inputs, params):
    if "std_normalize" in params:
        return advantage(rec, inputs["rewards"])
    return advantage(grpo(**params), inputs["rewards"])


def rec_shifted_baseline(inputs, params):
    recipe, zeros = asymre(penalty=-params["baseline_shift"]), torch.zeros(len(inputs["rewards"]), 1)
    return pull(recipe, rows(zeros, advantage(recipe, inputs["rewards"]), zeros)).squeeze(1)


def rec_log_mean_exp(inputs, params):
    return doubles(inputs["rewards"]) - advantage(opmd(baseline="log_mean_exp", **params), inputs["rewards"])


def rec_exponential(inputs, params):
    return advantage(red_weight(temperature=params["temp"]), inputs["rewards"])


def rec_clips(inputs, params):
    names = {
        "eps_low": "epsilon_low",
        "eps_high": "epsilon_high",
        "eps_low_ring": "ring_low",
        "eps_high_ring": "ring_high",
    }
    options = {names[name]: value for name, value in params.items()}
    given = rows([doubles(inputs["ratio"]).log().tolist()], [inputs["advantage"]], torch.zeros(1, 6))
    clips = {"one": "one_side", "two": "two_side", "ring": "ring"}
    return {
        name: pull(rec(clip=clip, weight="none", **options), given)[0] / inputs["advantage"]
        for name, clip in clips.items()
    }


def rec_losses(inputs, params):
    new, old = (doubles(inputs[name]).log().unsqueeze(1) for name in ("p", "p_old"))
    given = rows(new, inputs["advantages"], old)
    clip = {"epsilon_low": params["eps_low"], "epsilon_high": params["eps_high"]}
    return {
        "one_side_is": mean_loss(rec(**clip), given),
        "one_side_nois": mean_loss(rec(weight="none", **clip), given),
        "k2": mean_loss(opmd(penalty=params["coef"]), given),
        "forward_kl": mean_loss(asymre(penalty=params["coef"]), given),
    }


# -- baselines and scales -----------------------------------------------------------------------------------------------


def median(inputs, params):
    recipe = mc_grpo(mad_floor=0.0, eps=params["mad_eps"])

    def dropped(values):
        return recipe.credit(group(values)).keep.argmin()

    reward = doubles(inputs["rewards"])
    pivot = dropped(reward)
    deviation = (reward - reward[pivot]).abs()
    return {
        "median": reward[pivot],
        "mad": deviation[dropped(deviation)],
        "advantage_before_multiplier": advantage(recipe(rebalance=False), reward),
        "advantage": advantage(recipe, reward),
        "pivot_index": pivot,
    }


def virtual(inputs, params):
    options = {"highest": params["r_max"], "virtual": params["n_virtual"], "ddof": params["ddof"], "eps": params["eps"]}
    among = torch.cat([doubles(inputs["rewards"]), torch.full((params["n_virtual"],), params["r_max"]).double()])
    got = advantage(ngrpo(**options), inputs["rewards"])
    return {"mean": mean_of(among), "std": std_of(among, params["ddof"])[-1], "advantage": got, "sum": got.sum()}


def quantiles(inputs, params):
    got = advantage(gaussian_rank, inputs["rewards"])
    return {"advantage": got, "variance_population": got.var(correction=0)}


def lengths(inputs, params):
    band = [params[name] for name in ("l_min", "l_low", "l_high", "l_max")]
    return doubles([length_within(" ".join(["word"] * n), length_band=band).value for n in inputs["lengths"]])


def entropy_bands(inputs, params):
    """Three tasks of two rollouts with two tokens in one update, each task read off a micro-batch of its own."""
    recipe = gaussian_rank(entropy_low=params["h_min"], entropy_high=params["h_max"], band_coef=1.0)
    old, counts = -doubles(inputs["entropy"]).repeat_interleave(2).view(6, 1).expand(6, 2), Counts(6, 12, 2)
    credit = recipe.credit(group(torch.zeros(3, 2, 1), mask=torch.ones(6, 2), old_logps=old, task=torch.arange(3)))
    tasks = [slice(2 * t, 2 * t + 2) for t in range(3)]
    parts = [{name: value[task] for name, value in credit.extras.items()} for task in tasks]
    return torch.stack([
        mean_loss(recipe, rows(old[task], credit.advantage[task], old[task], counts=counts, extras=part))
        for task, part in zip(tasks, parts, strict=True)
    ])  # fmt: skip


def values_along(inputs, params):
    rewards = doubles(inputs["rewards"]).view(1, 2, 1, 3)

    def at(**options):
        recipe = value_anchored(gamma=params["gamma"], ddof=0, eps=0.0, **options)
        return advantage(recipe, rewards, aligned=True, mask=None, old_logps=None)

    if "ddof" not in params:
        return at(anchor=params["k"])
    q = at(anchor=1.0, limit=math.inf) - at(anchor=0.0, limit=math.inf)
    relative = group_advantages(q.unsqueeze(0), ddof=0, eps=0.0)[0]
    own = {"Q": q, "w": at(anchor=0.0) / relative, "std": std_of(q, ddof=0), "relative": relative}
    return own | {"advantage": at(anchor=params["k"])}


# -- flow policies ------------------------------------------------------------------------------------------------------

UNCLIPPED = {"epsilon_low": 1.0, "epsilon_high": math.inf}


def step(inputs, params, other):
    """A step of the Flow-GRPO kernel: its deviation, log-probabilities under v and under another, KL or drift between them."""
    x, after = doubles(inputs["x"]), doubles(inputs["x_next"])
    sigma, dt = inputs["sigma"], inputs["sigma_next"] - inputs["sigma"]
    sd = params["a"] * math.sqrt(sigma / (1 - sigma))
    std = sd * math.sqrt(-dt)

    def mean(v):
        return x * (1 + sd**2 * dt / (2 * sigma)) + doubles(v) * (1 + sd**2 * (1 - sigma) / (2 * sigma)) * dt

    def logp(v):
        return torch.distributions.Normal(mean(v), std).log_prob(after).mean().view(1, 1)

    between = ((mean(inputs["v"]) - mean(inputs[other])) ** 2).mean() / (2 * std**2)
    extras = {"drift": between, "divergence": between, "std": doubles(std), "dt": doubles(-dt)}
    return logp(inputs["v"]), logp(inputs[other]), {name: value.view(1, 1) for name, value in extras.items()}


def clip_and_kl(inputs, params):
    new, old, extras = step(inputs, params, "v_ref")

    def at(extras, **options):
        return mean_loss(flow_grpo(**UNCLIPPED, **options), rows(new, [1.0], old, extras=extras))

    as_released = extras | {"divergence": extras["divergence"] * extras["dt"]}
    ratio = -at(extras)
    return {
        "ratio_mean": ratio,
        "kl_exact": at(extras, beta=1.0) + ratio,
        "kl_repo": at(as_released, beta=1.0) + ratio,
    }


def guard(inputs, params):
    new, old, extras = step(inputs, params, "v_old")

    def at(extras, recipe=grpo_guard):
        return -mean_loss(recipe(**UNCLIPPED), rows(new, [1.0], old, extras=extras))

    whole, ratio = at(extras), at(extras | {"dt": torch.ones(1, 1)})
    plain, scaled = at(extras, flow_grpo).log(), ratio.log() / extras["std"].squeeze()
    return {"log_ratio": plain, "bias": scaled - plain, "ratio": ratio, "loss_divisor": ratio / whole}


def flow_advantages(inputs, params):
    rewards = doubles(inputs["groups"]).unsqueeze(2)
    got = advantage(flow_grpo, rewards).view(2, 4)
    centred = advantage(flow_grpo(scale="none"), rewards).view(2, 4)
    return {
        "per_prompt": advantage(flow_grpo(scale="group"), rewards).view(2, 4),
        "global_std": (centred / got)[0, 0] - params["eps"],
        "with_global_std": got,
    }


def forward_process(inputs, params):
    clean, noise, t = doubles(inputs["x0"]), doubles(inputs["eps"]), inputs["t"]
    extras = {"clean": clean, "noised": (1 - t) * clean + t * noise, "sigma": doubles(t)}
    extras |= {"velocity": doubles(inputs["v"]), "old_velocity": doubles(inputs["v_old"])}
    shapes = {"clean": (1, 2), "sigma": (1, 1)}
    extras = {name: value.view(shapes.get(name, (1, 1, 2))) for name, value in extras.items()}
    recipe = diffusion_nft(mix=params["b"], limit=params["adv_max"], anchor_coef=params["velocity_mse_weight"])

    def at(advantage):
        return mean_loss(recipe, rows(torch.zeros(1, 1), [advantage], torch.zeros(1, 1), extras=extras))

    good, bad, loss = at(params["adv_max"]), at(-params["adv_max"]), at(inputs["advantage"])
    scale = params["b"] / params["adv_max"]
    return {"r": (loss - bad) / (good - bad), "positive": good * scale, "negative": bad * scale, "loss": loss}


def preferred(inputs, params):
    components = doubles([inputs[name] for name in ("psnr", "maniqa", "musiq")]).T
    weights = doubles([params["f"], params["d"] / 2, params["d"] / 2])
    given = group(components, weights=weights)
    credit = group_preference(ddof=params["ddof"], eps=params["eps"]).credit(given)
    at = torch.zeros(3, 1, 1).double()
    extras = {"clean": at[:, 0], "noised": at, "sigma": torch.ones(3, 1).double()}
    extras |= {
        name: doubles(inputs[which]).sqrt().view(3, 1, 1)
        for name, which in (("velocity", "losses"), ("ref_velocity", "ref_losses"))
    }
    zeros, one = torch.zeros(3, 1), torch.zeros(3, dtype=torch.long)
    loss = mean_loss(
        group_preference(beta=float(params["beta"])), rows(zeros, credit.advantage, zeros, extras=extras, group_id=one)
    )
    return {
        "reward": group_preference.aggregate(given.rewards, given)[0],
        "advantage": credit.advantage,
        "inside": -loss.expm1().log(),
        "loss": loss,
    }


def ranked(inputs, params):
    """The running statistics of a first step, which the recipe does not keep, are its options here."""
    reward, alpha = doubles(inputs["rewards"]), params["ema_alpha"]
    mean = (1 - alpha) * params["ema_mean0"] + alpha * reward.mean().item()
    std = ((1 - alpha) * params["ema_var0"] + alpha * (reward.mean().item() - mean) ** 2) ** 0.5
    recipe = faker_air(z_weight=params["c"], mean=mean, std=std)
    return {"A": advantage(recipe, reward), "ema_mean": doubles(mean), "ema_std": doubles(std + recipe.options["eps"])}


# -- several rewards ----------------------------------------------------------------------------------------------------


def decoupled(inputs, params):
    rewards, ddof = inputs["rewards"], params["ddof"]
    before = gdpo(baseline="none", scale="none", ddof=ddof, eps=params["eps_group"])
    own = [advantage(before, rewards, weights=one).view(2, 4) for one in torch.eye(2)]
    return {
        "z": torch.stack(own, dim=2),
        "pre_whitening": advantage(before, rewards).view(2, 4),
        "advantage": advantage(gdpo(ddof=ddof, eps=params["eps_batch"]), rewards).view(2, 4),
        "grpo_on_sums": advantage(grpo(ddof=ddof, eps=params["eps_group"]), rewards).view(2, 4),
    }


def collapse(inputs, params):
    options = {"ddof": params["ddof"], "eps": params["eps_group"]}
    recipes = {"grpo": grpo(**options), "gdpo_pre_whitening": gdpo(baseline="none", scale="none", **options)}
    return {
        f"{name}_{count}": advantage(recipe, inputs[f"group_{count}"])
        for name, recipe in recipes.items()
        for count in ("one_reward", "two_rewards")
    }


def axes(inputs, params):
    fields = {
        "weights": doubles(params["weights"]),
        "names": ("politeness", "meaningfulness", "actionability", "safety"),
    }
    given = group(inputs["scores"], **fields)
    if "tau" in params:
        return safety_gated(passing=params["tau"]).aggregate(given.rewards, given)[0]
    options = {"ddof": params["ddof"], "eps": params["eps"]}
    return {"reward": grpo.aggregate(given.rewards, given)[0], "advantage": grpo(**options).credit(given).advantage}


def unlikely(inputs, params):
    fields = {"old_logps": doubles(inputs["mean_logp"]).unsqueeze(1)}
    given, flat = group(inputs["rewards"], **fields), group(torch.ones(5), **fields)
    kept = {} if 0 in inputs["rewards"] else {"filter": "none"}
    code = unlikeliness(rank_weight=params["beta_rank"], ddof=params["ddof"], eps=params["eps"], **kept)
    text = code(rank_offset=1)
    return {
        "ranks": (1 - code.shape(flat.rewards, flat)).flatten() * 5 / params["beta_rank"],
        "shaped_code": code.shape(given.rewards, given).flatten(),
        "advantage_code": code.credit(given).advantage,
        "shaped_text": text.shape(given.rewards, given).flatten(),
        "advantage_text": text.credit(given).advantage,
    }


# -- weights on advantages ----------------------------------------------------------------------------------------------


def asymmetric(inputs, params):
    """Groups of right and wrong rollouts beside the case's make the batch's success rate omega."""
    reward, omega = doubles(inputs["rewards"]), params["omega"]
    for groups in range(2, 9):
        right = round(omega * groups * 5 - reward.sum().item(), 9)
        if right.is_integer() and 0 <= right <= 5 * (groups - 1):
            break
    beside = (torch.arange(5 * (groups - 1)) < right).double()
    recipe = a_grae(alpha=params["alpha"], ddof=params["ddof"], eps=params["eps"])
    return lambda **option: advantage(recipe(**option), torch.cat([reward, beside]).view(groups, 5, 1))[:5]


def answer_entropy(inputs, params):
    labels = [label for label, size in enumerate(inputs["cluster_sizes"]) for _ in range(size)]
    fields = {"names": ("right", "answer"), "weights": torch.tensor([1.0, 0.0])}

    def at(answers, **options):
        return advantage(seed_grpo(**options), list(zip(inputs["rewards"], answers, strict=True)), **fields)

    centred, alpha = advantage(dr_grpo, inputs["rewards"]), params["alpha"]
    forms = {"shannon": (labels, "shannon"), "eq5": (labels, "mean_log"), "max": (range(8), "shannon")}
    got = {"advantage_shannon": at(labels, alpha=alpha, entropy="shannon")}
    for name, (answers, entropy) in forms.items():
        got[f"weight_{name}"] = at(answers, alpha=alpha, entropy=entropy) / centred
        got[f"se_{name}"] = (1 - at(answers, alpha=1.0, entropy=entropy, decay="linear") / centred) * math.log(8)
    return got


def distinct(inputs, params):
    both = torch.stack([doubles(inputs["rewards"]), doubles(inputs["quality"])], dim=1)
    fields = {"names": ("right", "quality"), "weights": torch.tensor([1.0, 0.0])}
    options = {"ddof": params["ddof"], "eps": params["eps"]}

    def audible(pair, margin):
        return bool(advantage(dagrpo(margin=margin), both[pair], **fields).any())

    masked = advantage(dagrpo(margin=params["tau"], **options), both, **fields)
    right, wrong = ((both[:, 0] == kind).nonzero().flatten().tolist() for kind in (1, 0))
    return {
        "gaps": doubles([[edge(lambda m, p=[i, j]: audible(p, m), -1.0, 1.0) for j in wrong] for i in right]),
        "sample_keep": (masked != 0).double(),
        "advantage_full": advantage(grpo(**options), inputs["rewards"]),
        "advantage_masked": masked,
    }


def hidden_reward_at(scores, **options):
    """Advantages [[1, 1], [-1, -1]] weighted by scores (2, 2)."""
    fields = {"mask": torch.ones(2, 2), "old_logps": -torch.ones(2, 2), "model": Says(scores=scores)}
    return advantage(token_hidden_reward(**ONES | options), [1.0, 0.0], **fields).flatten()


def hidden_reward_scores(inputs, params):
    """Six tokens of unit vectors in three more wrong rollouts read off the matrix."""
    chosen = [torch.eye(3, dtype=torch.float64)[inputs[f"y_{kind}"]] - doubles(inputs[f"p_{kind}"]) for kind in KINDS]
    gradient = torch.cat([torch.stack(chosen), torch.eye(3).double().unsqueeze(1).expand(3, 2, 3)])
    hidden = torch.cat([doubles([inputs[f"h_{kind}"] for kind in KINDS]), torch.eye(2).double().expand(3, 2, 2)])
    scores, _ = token_influence(hidden, gradient, torch.ones(5, 2), torch.arange(5) == 0)
    sign = (hidden_reward_at(scores[:2], exploit=0.5, threshold=0.0).abs() - 1) / 0.5
    size = [edge(lambda tau, t=t: bool(hidden_reward_at(scores[:2], threshold=tau)[t]), 0.0, 1.0) for t in range(4)]
    scale = edge(lambda scale: bool(hidden_reward_at(scores[:2], tau_scale=scale * params["beta"])[0]), 0.0, 9.0)
    own = {"M_plus": scores[2:], "s_pos": scores[0], "s_neg": scores[1]}
    return own | {"thr": sign * doubles(size), "tau": doubles(size[0] / scale)}


KINDS = ("pos", "neg")


def hidden_reward_weights(inputs, params):
    scores = (doubles(inputs["thr"]) * doubles(inputs["advantages"]).sign()).view(2, 2)
    raised, lowered = (hidden_reward_at(scores, exploit=p, threshold=0.0) for p in params["p"])
    masked = hidden_reward_at(scores, threshold=params["mask_threshold"])
    return {"p_pos_unmasked": raised, "p_neg_unmasked": lowered, "mask_at_0_2": (masked != 0).double()}


def imitation_share(inputs, params):
    """Read off wrong rollouts, whose advantages a second component makes: (1 - alpha) A."""
    got = []
    for entropy, target, right in zip(inputs["H"], inputs["H0"], inputs["fraction_correct"], strict=True):
        both = [[float(i < 10 * right), float(i % 2)] for i in range(10)]
        old = torch.full((10, 1), -entropy, dtype=torch.float64)
        fields = {"weights": torch.tensor([0.0, 1.0]), "old_logps": old, "model": Says(tempered=lambda _, old=old: old)}
        recipe = distribution_centric(target=target, most=params["cap"])
        got.append(1 - advantage(recipe, both, **fields)[-1, 0] / advantage(grpo, both, **fields)[-1])
    return torch.stack(got)


def tempered(logits):
    """old_logps of the tokens in turn, and a model that knows them at other temperatures; a fourth token stays put."""

    def at(temperature):
        return torch.cat([(doubles(logits) / temperature).log_softmax(0), doubles([-1.0])]).unsqueeze(0)

    return at


def imitation_ratio(inputs, params):
    """All rollouts right: A = 0, and what is left is alpha * rho; the fourth token has rho = 1."""
    at, got = tempered(inputs["logits"]), {}
    fields = {
        "mask": torch.ones(2, 4),
        "old_logps": at(1.0).expand(2, 4),
        "model": Says(tempered=lambda t: at(t).expand(2, 4)),
    }
    for name, target in (("rho_1_2", 9.0), ("rho_0_8", 0.0)):
        recipe = distribution_centric(target=target, hot=params["T"][0], cold=params["T"][1])
        left = advantage(recipe, [1.0, 1.0], **fields)
        got[name] = left[:, :3] / left[:, 3:]
    return got | {"p": at(1.0)[0, :3].exp()}


def imitation(inputs, params):
    at, alpha = tempered(inputs["logits"]), params["alpha"]
    fields = {"mask": torch.ones(5, 3), "old_logps": at(1.0)[:, :3].expand(5, 3)}
    fields |= {"model": Says(tempered=lambda t: at(t)[:, :3].expand(5, 3))}
    options = {"target": 9.0, "hot": params["T"], "most": alpha / (1 - alpha) * 0.4, "eps": params["eps"]}
    got = advantage(distribution_centric(**options), inputs["rewards"], **fields)
    z = advantage(grpo(ddof=params["ddof"], eps=params["eps"]), inputs["rewards"])
    return {"group_z": z, "correct_by_token_id": got[[0, 4]], "wrong": got[1:4]}


# -- ratios, clips and what is added ------------------------------------------------------------------------------------


def mixed(inputs, params):
    given = rows(
        [doubles(inputs["token_ratio"]).log().tolist()],
        [inputs["advantage"]],
        torch.zeros(1, 3),
        entropy=doubles([inputs.get("entropy_weight", [0.0] * 3)]),
    )
    token = dict(zip(("epsilon_low", "epsilon_high"), params["token_clip"], strict=True))
    sequence = dict(zip(("epsilon_low", "epsilon_high"), params["sequence_clip"], strict=True))
    hybrid = dhpo(**token, **{f"sequence_{name}": value for name, value in sequence.items()})

    def value(recipe):
        return -recipe.surrogate(given)[0][0].detach()

    return {
        "sequence_ratio": given.sequence_ratio.detach(),
        "token_min": value(grpo(**token)),
        "sequence_min": value(gspo(**sequence)),
        "R1_avg": value(hybrid),
        "R1_avg_mean": -mean_loss(hybrid, given),
        "R1_entropy": value(hybrid(mix="entropy")),
        "R2_avg": value(hybrid(pessimism="mixed")),
        "R2_avg_mean": -mean_loss(hybrid(pessimism="mixed"), given),
        "R3_avg": value(hybrid(pessimism="none")),
    }


def routed(inputs, params):
    """A right rollout of four tokens and a wrong one of three, which is taught."""
    mask, entropy = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]), torch.zeros(2, 4).double()
    entropy[1, :3] = doubles(inputs["teacher_entropy"])
    recipe = sample_routed(sharpness=params["beta"])
    fields = {"mask": mask, "old_logps": -torch.ones(2, 4), "model": Says(entropy=entropy)}
    extras = recipe.credit(group([1.0, 0.0], **fields)).extras
    if "sdpo_token_losses" not in inputs:
        return extras["distillation_weight"][1, :3]
    distance = torch.zeros(2, 4).double()
    distance[1, :3] = doubles(inputs["sdpo_token_losses"])
    worth = torch.stack([-doubles(inputs["grpo_token_losses"]), torch.zeros(4).double()])
    extras |= {"distillation": distance}

    def given(keep):
        return rows(torch.zeros(2, 4), worth, torch.zeros(2, 4), mask=mask, extras=extras, keep=torch.tensor(keep))

    return {
        "grpo_sum": recipe.loss(given([1, 0])).sum.detach(),
        "sdpo_weighted_sum": recipe.loss(given([0, 1])).sum.detach(),
        "loss": mean_loss(recipe, given([1, 1])),
    }


def routes(inputs, params):
    """Four groups of two: a rollout, and a sibling that is right where the case has a teacher."""
    pairs = doubles([inputs["correct"], inputs["teacher_available"]]).T.unsqueeze(2)
    credit = sample_routed.credit(group(pairs, model=Says(entropy=torch.zeros(8, 1))))
    return (credit.extras["distillation_weight"].view(4, 2)[:, 0] > 0).double()


def guarded(inputs, params):
    """Actions are runs of the mask: an observation is put between those of a case that names them."""
    level = "turn" if "segments_sample_0" in params else "rollout"

    def wide(values):
        values = doubles(values)
        return torch.cat([values[:, :2], torch.zeros(2, 1), values[:, 2:]], dim=1) if level == "turn" else values

    new, old, mask = (wide(inputs[name]) for name in ("logp", "logp_old", "mask"))

    def given(penalty, protected):
        recipe = llds(penalty=penalty, protected=protected, level=level, scale="none")
        credit = recipe.credit(group(inputs["advantages"], mask=mask, old_logps=old))
        return recipe, rows(new, credit.advantage, old, mask=mask, extras=credit.extras)

    def added(penalty, protected):
        return mean_loss(*given(penalty, protected)) - mean_loss(*given(0.0, protected))

    recipe, seen = given(1.0, "mean")
    fall = torch.autograd.grad(recipe.penalty(seen)[0].sum(), seen.logps)[0]
    delta = -seen.log_ratio.detach()
    parts = [slice(0, 2), slice(3, 5)]
    seen.extras = {"protected": (doubles(inputs["advantages"]) >= 0).double()}
    return {
        "delta": delta,
        "response_gate": fall.any(dim=1).double(),
        "segment_sums": torch.stack([delta[0, part].sum() for part in parts]),
        "gates": torch.stack([fall[0, part].any() for part in parts]).double(),
        "numerator": recipe.penalty(seen)[0].sum().detach(),
        "loss_paper_normaliser": added(1.0, "mean"),
        "loss_code_normaliser": added(1.0, "all"),
        "weighted_paper": added(params.get("lambda", 0.2), "mean"),
        "weighted_code": added(params.get("lambda", 0.2), "all"),
    }


SOLVERS = {  # (paper, start of the case's name); the longest that fits
    ("rec-opmd-asymre", "advantage_"): rec_advantages,
    ("rec-opmd-asymre", "asymre_advantage"): rec_shifted_baseline,
    ("rec-opmd-asymre", "opmd_logavgexp_baseline"): rec_log_mean_exp,
    ("rec-opmd-asymre", "red_weight"): rec_exponential,
    ("rec-opmd-asymre", "clip_masks_"): rec_clips,
    ("rec-opmd-asymre", "losses_one_token"): rec_losses,
    ("mc-grpo", ""): median,
    ("mc-grpo", "mean_centred_contrast"): lambda inputs, params: advantage(dr_grpo, inputs["rewards"]),
    ("srpo", ""): routed,
    ("srpo", "routing"): routes,
    ("dagrpo", "pair_masking"): distinct,
    ("ngrpo", ""): virtual,
    ("thr", "scores_two_samples"): hidden_reward_scores,
    ("thr", "reweighted_advantages"): hidden_reward_weights,
    ("dhpo", ""): mixed,
    ("a-grae", "paper_"): lambda inputs, params: asymmetric(inputs, params)(),
    ("a-grae", "snapshot_"): lambda inputs, params: asymmetric(inputs, params)(easy_term="released"),
    ("gdpo", "two_groups_two_rewards"): decoupled,
    ("gdpo", "collapse"): collapse,
    ("g2rpo", ""): quantiles,
    ("g2rpo", "length_reward"): lengths,
    ("g2rpo", "entropy_band"): entropy_bands,
    ("dcpo", "alpha"): imitation_share,
    ("dcpo", "temperature_ratio"): imitation_ratio,
    ("dcpo", "mixed_advantage"): imitation,
    ("seed-grpo", "entropy_and_weight"): answer_entropy,
    ("llds", ""): guarded,
    ("unlikeliness", ""): unlikely,
    ("multi-objective-safety", ""): axes,
    ("vgpo", ""): values_along,
    ("flow-grpo", "clip_and_kl"): clip_and_kl,
    ("flow-grpo", "grpo_guard"): guard,
    ("flow-grpo", "advantages"): flow_advantages,
    ("flow-grpo", "diffusion_nft"): forward_process,
    ("gdpo-sr", "reward_and_loss"): preferred,
    ("air-quality-grpo", "centred_rank"): lambda inputs, params: advantage(faker_air(z_weight=0.0), inputs["rewards"]),
    ("air-quality-grpo", "advantage_first_step"): ranked,
}


def solver(paper, case):
    return max(key for key in SOLVERS if key[0] == paper and case.startswith(key[1]))


def test_every_case_has_a_solver_and_every_solver_a_case():
    assert len(CASES) == 67
    assert {solver(*name) for name in CASES} == set(SOLVERS)


@pytest.mark.parametrize("name", CASES, ids=" ".join)
def test_worked_example(name):
    case = CASES[name]
    got, expected = SOLVERS[solver(*name)](case["inputs"], case["params"]), case["expected"]
    got, expected = (value if isinstance(value, dict) else {"value": value} for value in (got, expected))
    assert expected.keys() <= got.keys()
    for key, value in expected.items():
        assert got[key].dtype == torch.float64 or not got[key].is_floating_point()
        # A number that several rollouts share stands once in the file.
        wanted = doubles(value).expand_as(got[key])
        torch.testing.assert_close(
            got[key].double(), wanted, **case["tolerance"], msg=lambda why, key=key: f"{key}: {why}"
        )


# -- numbers that stand in the text alone, or their formula: (what, computed, printed) ---------------------------------------

SUCCESSES = [1.0, 0.0, 0.0, 0.0, 1.0]


def z(**options):
    return advantage(grpo(**options), SUCCESSES)[0]


def effort(right, size):
    """Sum of |A| over a group with so many right rollouts, population std."""
    return advantage(grpo(ddof=0, eps=0.0), [1.0] * right + [0.0] * (size - right)).abs().sum()


def least_weight(alpha):
    """The factor of seed_grpo where all eight answers differ."""
    rewards = [[float(i < 4), float(i)] for i in range(8)]
    fields = {"names": ("right", "answer"), "weights": torch.tensor([1.0, 0.0])}
    return advantage(seed_grpo(alpha=alpha), rewards, **fields)[0] / 0.5


PRINTED = [
    ("ngrpo, one wrong rollout", lambda: advantage(ngrpo, [0.0])[0], "-0.7071"),
    ("three conventions, unbiased + 1e-4", lambda: z(), "1.0952"),
    ("three conventions, unbiased + 1e-6", lambda: z(eps=1e-6), "1.0954"),
    ("three conventions, population", lambda: z(ddof=0, eps=1e-6), "1.2247"),
    ("gdpo, sums 0 and 1", lambda: advantage(grpo, [0.0, 1.0])[1], "0.707"),
    ("gdpo, sums 0 and 2", lambda: advantage(grpo, [0.0, 2.0])[1], "0.707"),
    ("a-grae, effort 2 G sqrt(p (1 - p)) at p = 1/2", lambda: effort(4, 8), "8.0"),
    ("a-grae, effort at p = 1/8", lambda: effort(1, 8), f"{16 * (7 / 64) ** 0.5:.6f}"),
    ("thr, weight of a right rollout (1 - p) / sqrt(p (1 - p))", lambda: z(ddof=0, eps=0.0), f"{0.6 / 0.24**0.5:.6f}"),
    ("seed-grpo, least factor at the trainer's alpha", lambda: least_weight(0.0417), "0.960"),
    ("seed-grpo, least factor at the text's alpha", lambda: least_weight(0.02), f"{1 / 1.02:.6f}"),
]


@pytest.mark.parametrize(("what", "computed", "printed"), PRINTED, ids=[row[0] for row in PRINTED])
def test_printed_number_to_half_a_unit_of_its_last_digit(what, computed, printed):
    assert abs(computed().item() - float(printed)) <= 0.5 * 10.0 ** -len(printed.split(".")[1])


def test_scores_of_tokens_are_the_double_sum_over_right_tokens():
    """The bilinear form is the sum of <g, g'> <h, h'> over the tokens of right rollouts."""
    case = CASES["thr", "scores_two_samples"]["inputs"]
    hidden = doubles([case["h_pos"], case["h_neg"]])
    gradient = torch.eye(3).double()[torch.tensor([case["y_pos"], case["y_neg"]])] - doubles(
        [case["p_pos"], case["p_neg"]]
    )
    scores, own = token_influence(hidden, gradient, torch.ones(2, 2), torch.tensor([True, False]))
    slow = torch.zeros(2, 2).double()
    for i, t, k in [(i, t, k) for i in range(2) for t in range(2) for k in range(2)]:
        slow[i, t] += gradient[i, t].dot(gradient[0, k]) * hidden[i, t].dot(hidden[0, k])
    torch.testing.assert_close(scores, slow)
    assert own[1].tolist() == [0, 0]


def test_group_gate_of_the_guard_is_open_where_masked_sums_fell():
    """Both sums fell (.3 and .4): it is the sign of the advantage that closes the second."""
    case = CASES["llds", "response_gate"]["inputs"]
    fields = {"mask": doubles(case["mask"]), "extras": {"protected": torch.ones(2)}}
    given = rows(case["logp"], case["advantages"], case["logp_old"], **fields)
    fall = -(given.log_ratio * given.mask).sum(1).detach()
    torch.testing.assert_close(fall, doubles([0.3, 0.4]))
    pushed = torch.autograd.grad(llds(level="rollout").penalty(given)[0].sum(), given.logps)[0]
    assert pushed.any(dim=1).tolist() == [True, True]
