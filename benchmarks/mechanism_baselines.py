"""Mechanisms of baselines, scales and several rewards. How to read an entry: mechanisms.py."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from mechanism_entries import (
    Budget,
    Found,
    Panels,
    above,
    advantages,
    below,
    entry,
    exactly,
    graded,
    grpo,
    interval,
    ladder,
    panel,
)
from torch import Tensor
from toy import Sampled, Toy, credit, gradient, sampled, training

from core.objective.composition import Recipe
from core.objective.group import Group
from core.objective.recipes import RECIPES
from core.objective.rows import Counts, Rows


def median_against_outliers(budget: Budget, panels: Panels) -> list[dict]:
    """MC-GRPO. The law: standard normal, and one reward in ten 10 higher; its median is .14 and its mean 1."""
    share, sizes, groups, mc_grpo = 0.1, (2, 4, 8), budget.draws * budget.block, RECIPES["mc_grpo"]
    draw = torch.Generator().manual_seed(0)
    median, mean = float(torch.special.ndtri(torch.tensor(0.5 / (1 - share)))), 10 * share

    def rates(rewards: Tensor, centre: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """{arm: (blocks,) shares of its rollouts whose advantage has the wrong sign, and of those that have none}."""
        given = mc_grpo.credit(Group(rewards.unsqueeze(-1), weights=torch.ones(1)))
        kept = given.keep.view_as(rewards) > 0
        fewer, all_kept = rewards[:, 1:], torch.ones_like(kept)
        more = advantages(grpo, rewards)
        arms = {
            "mc_grpo": (given.advantage.view_as(rewards), rewards, kept),
            "grpo, G": (advantages(grpo, fewer), fewer, all_kept[:, 1:]),
            "grpo, G + 1": (more, rewards, all_kept),
            "grpo, G + 1, median dropped": (more, rewards, kept),
        }
        found = {}
        for arm, (advantage, reward, kept) in arms.items():
            product, count = advantage * (reward - centre), kept.reshape(budget.draws, -1).sum(1)
            wrong, none = (
                (which & kept).reshape(budget.draws, -1).sum(1) / count for which in (product < 0, product == 0)
            )
            found[arm] = wrong.numpy(), none.numpy()
        return found

    flips: dict[str, list[dict[str, np.ndarray]]] = {"median": [], "mean": [], "calm": [], "silent": []}
    for size in sizes:
        calm = torch.randn(groups, size + 1, generator=draw)
        wild = calm + 10 * (torch.rand(groups, size + 1, generator=draw) < share)
        marks = (torch.rand(groups, size + 1, generator=draw) < 0.5).double()
        for law, rewards, centre in (("median", wild, median), ("mean", wild, mean), ("calm", calm, 0.0)):
            flips[law].append({arm: wrong for arm, (wrong, _) in rates(rewards, centre).items()})
        flips["silent"].append({arm: none for arm, (_, none) in rates(marks, 0.5).items()})
    lines = {arm: [found[arm] for found in flips["median"]] for arm in flips["median"][0]}
    panels["MC-GRPO: advantages of the wrong sign"] = panel(sizes, "rollouts trained on, G", "share", lines, True)
    entries = []
    for i, size in enumerate(sizes[:2]):
        rate = {law: {arm: interval(values) for arm, values in found[i].items()} for law, found in flips.items()}
        fair, same = "grpo, G + 1", "grpo, G + 1, median dropped"
        gap = {
            (law, arm): interval(found[i]["mc_grpo"] - found[i][arm])
            for law, found in flips.items()
            for arm in (fair, same)
        }
        entries.append(entry(
            "mc_grpo",
            f"a median baseline turns fewer signs than a mean at G={size} where one reward in ten is an outlier",
            f"share of rollouts trained on, G={size}, whose advantage and reward minus the median of the reward's law differ "
            f"in sign: mc_grpo minus grpo, both on {size + 1} sampled; {groups} groups, bootstrap over {budget.draws} blocks",
            gap["median", fair],
            graded(below(gap["median", fair]), below(gap["median", same]) and below(gap["mean", same])),
            "The rollout that mc_grpo drops is the one whose sign is least sure; grpo on the same rollouts is the fairer "
            "control. Against it nothing is left at G=2 (of three, mean and median lie between the same two), nor without "
            "outliers at G=4. Rewards of 0 and 1 have no outliers: the mean turns no sign there, and the median leaves most "
            "rollouts without advantage.",
            difference_on_the_same_rollouts=gap["median", same], rates=rate["median"],
            from_the_mean_of_the_law={"difference": gap["mean", fair], "on the same rollouts": gap["mean", same]} | rate["mean"],
            without_outliers={"difference": gap["calm", fair], "on the same rollouts": gap["calm", same]} | rate["calm"],
            share_without_advantage_at_right_or_wrong=rate["silent"],
        ))  # fmt: skip
    return entries


def virtual_rollout(budget: Budget, panels: Panels) -> list[dict]:
    """NGRPO."""
    size, ngrpo = 8, RECIPES["ngrpo"]
    rewards = ladder(size)
    given, plain = advantages(ngrpo, rewards), advantages(grpo, rewards)
    kept = ngrpo.credit(Group(rewards.unsqueeze(-1), weights=torch.ones(1), outcome=0)).keep.view_as(rewards)
    panels["NGRPO: sum of a group's advantages"] = panel(
        [k / size for k in range(size + 1)], "share of right rollouts, G = 8", "sum",
        {"ngrpo": given.sum(1), "grpo": plain.sum(1)},
    )  # fmt: skip
    wrong = given[0, 0].item()
    exact = given[0].eq(wrong).all() and math.isclose(wrong, -1 / math.sqrt(size + 1), rel_tol=1e-5)
    exact = exact and (given[-1] == 0).all() and (kept[-1] == 0).all() and (kept[:-1] == 1).all()

    # Does the push lead uphill? One completion in 64 is right, and the right rollouts that occur are left out.
    toy = Toy(budget.learners * 4, modulus=64, places=(1, 3, 9, 27))
    weights = toy.start.detach().requires_grad_()
    uphill = torch.autograd.grad((toy.masses(weights) * toy.right).sum(-1).log().sum(), weights)[0].flatten(1)

    def climb(recipe: Recipe, batch: Sampled, advantage: Tensor) -> Found:
        step = -gradient(recipe, batch, advantage.flatten()).flatten(1)
        return interval(torch.cosine_similarity(step, uphill).numpy())

    batch = sampled(toy, toy.start, size)
    seen = climb(grpo, batch, credit(grpo, batch).advantage)
    wrong_ones, batch.outcome = 1 - batch.outcome, torch.zeros_like(batch.outcome)
    push = credit(ngrpo, batch).advantage.view_as(wrong_ones) * wrong_ones
    signs = torch.randint(2, push.shape, generator=toy.draw) * 2.0 - 1
    aligned, chance = climb(ngrpo, batch, push), climb(ngrpo, batch, push * signs)
    return [
        entry(
            "ngrpo",
            "a virtual perfect rollout gives all-wrong groups a gradient, and all-right groups none",
            "advantage of each of 8 wrong rollouts in an all-wrong group; exact",
            exactly(wrong),
            bool(exact),
            "It is -1 / sqrt(G + 1). The cost: advantages sum to -(1 - mean) / std and not to 0, a push down on whatever was "
            "sampled in every group that is not all right.",
            grpo_all_wrong=plain[0, 0], ngrpo_all_right=given[-1].abs().max(), all_right_rollouts_kept=int(kept[-1].sum()),
            sum_of_advantages={f"{k} of {size} right": given[k].sum() for k in range(size + 1)},
        ),
        entry(
            "ngrpo",
            "the push away from wrong rollouts leads towards right ones",
            "cosine between an update on wrong rollouts alone (4 prompts, G=8, 1 completion in 64 right) and the exact "
            f"gradient of log P(right); bootstrap over {toy.learners} learners",
            aligned,
            graded(above(aligned), aligned[0] > seen[0] / 2),
            "Uphill on average, but weakly: what was not sampled is mostly wrong too. grpo's update on the same batch, with "
            "the few right rollouts in it, is in the control; without them it is 0.",
            random_signs=chance, grpo_with_the_right_ones=seen,
        ),
    ]  # fmt: skip


def normal_quantiles(budget: Budget, panels: Panels) -> list[dict]:
    """Gaussian ranks (G2RPO)."""
    recipe, sizes, rates = RECIPES["gaussian_rank"], (4, 8, 16, 64), (0.5, 0.1)

    def variance(recipe: Recipe, rewards: Tensor) -> Tensor:
        return (advantages(recipe, rewards) ** 2).mean(1)

    untied, tied, miss = [], {rate: [] for rate in rates}, 0.0
    for size in sizes:
        steps = torch.arange(size, dtype=torch.float64).unsqueeze(0)
        miss = max(miss, (advantages(recipe, steps) - torch.special.ndtri((steps + 0.5) / size)).abs().max().item())
        untied.append(variance(recipe, steps).item())
        spread = variance(recipe, ladder(size)[1:-1])
        for rate, values in tied.items():
            ways = torch.tensor([math.comb(size, k) * rate**k * (1 - rate) ** (size - k) for k in range(1, size)])
            values.append(((ways * spread).sum() / ways.sum()).item())
    lines = {"no ties": untied, "0 or 1, half right": tied[0.5], "0 or 1, 1 in 10 right": tied[0.1]}
    panels["Gaussian ranks: variance of advantages"] = panel(sizes, "group size G", "variance", lines, True)
    calm = torch.arange(8, dtype=torch.float64).unsqueeze(0) / 10
    wild, close = calm.clone(), 0.5 + 1e-4 * calm
    wild[0, -1] = 1e6
    deaf = (advantages(recipe, wild) - advantages(recipe, calm)).abs().max().item()
    amplified = variance(recipe, close).item()
    return [
        entry(
            "gaussian_rank",
            "advantages follow N(0, 1) whatever the rewards' law",
            "variance of advantages at G=8 and rewards of 0 and 1, one in ten right, over groups with spread; exact (N(0, "
            "1): 1)",
            exactly(tied[0.1][1]),
            graded(miss < 1e-12, tied[0.1][1] > 0.9),
            "Without ties they are the quantiles to the last bits, and the variance nears 1 from below as G grows. Rewards "
            "of 0 and 1 are almost all ties, and their variance still depends on the pass rate.",
            greatest_miss_of_quantiles_without_ties=miss, variance_without_ties=dict(zip(sizes, untied, strict=True)),
            variance_with_ties={f"{rate} right": dict(zip(sizes, values, strict=True)) for rate, values in tied.items()},
        ),
        entry(
            "gaussian_rank",
            "an outlier moves no advantage",
            "greatest change of 8 advantages when the best reward goes from 0.7 to 1e6; exact",
            exactly(deaf),
            graded(deaf == 0, amplified < 0.5),
            "The other side: rewards 1e-5 apart get the same advantages as rewards 0.1 apart, unless `resolution` rounds them.",
            grpo_std_of_the_seven_others=[advantages(grpo, rewards)[0, :-1].std() for rewards in (calm, wild)],
            variance_at_rewards_1e_5_apart={
                "gaussian_rank": amplified, "grpo": variance(grpo, close),
                "gaussian_rank(resolution=0.01)": variance(recipe(resolution=0.01), close),
            },
        ),
    ]  # fmt: skip


def anchored(budget: Budget, panels: Panels) -> list[dict]:
    """Value-anchored advantages (VGPO of flow models): 10 decisions, reward 1 at each, the same in all rollouts."""
    recipe, (length, choices, size), learners = RECIPES["value_anchored"], (10, 8, 8), budget.learners * 4
    draw = torch.Generator().manual_seed(0)
    mask = torch.ones(learners * size, length)

    def given(reward: Tensor) -> Tensor:
        rows = mask[: reward.shape[:2].numel()]
        return recipe.credit(Group(reward, weights=torch.ones(1), mask=rows, aligned=True)).advantage

    def rms(advantage: Tensor) -> float:
        return advantage.square().mean().sqrt().item()

    equal, push = given(torch.ones(1, size, 1, length)), given(torch.ones(learners, size, 1, length))
    state, entropy, slopes = torch.zeros(learners, length, choices), [], []
    for _ in range(budget.steps(300)):
        logits = state.clone().requires_grad_()
        table = logits.log_softmax(-1)
        entropy.append(-(table.exp() * table).sum(-1).mean(1).detach().numpy())
        taken = torch.multinomial(table.exp().flatten(0, 1), size, replacement=True, generator=draw)
        logps = table.gather(2, taken.view(learners, length, size)).transpose(1, 2).flatten(0, 1)
        loss = recipe.loss(Rows(logps=logps, mask=mask, advantage=push, counts=Counts(size, size * length, length)))
        slopes.append(torch.autograd.grad(loss.sum / loss.count, logits)[0])
        state = state - length * slopes[-1]
    common = slopes[0].mean(0).norm() / slopes[0].flatten(1).norm(dim=1).mean()
    lost = interval(entropy[0] - entropy[-1])
    ticks = sorted({round(i * (len(entropy) - 1) / 10) for i in range(11)})
    lines = {"value_anchored": [entropy[i] for i in ticks], "grpo": [math.log(choices)] * len(ticks)}
    panels["Value anchor: entropy under constant rewards"] = panel(ticks, "updates", "nats per decision", lines)
    return [
        entry(
            "value_anchored",
            "a signal is left where all rollouts of a group score the same",
            "root mean square of the advantages of a group whose rewards are 1 at each of 10 decisions; exact",
            exactly(rms(equal)),
            rms(equal) > 0,
            "0.1 of the discounted sum, largest at the first decision; 0 for groups that scored 0.",
            at_first_and_last_decision=[equal[0, 0], equal[0, -1]], grpo=0.0,
            at_reward_0=rms(given(torch.zeros(1, size, 1, length))),
            of_a_group_with_spread=rms(given(torch.rand(1, size, 1, length, generator=draw))),
        ),
        entry(
            "value_anchored",
            "that signal is something to learn from",
            f"entropy lost in {len(entropy) - 1} updates on rewards that are 1 whatever is done, nats per decision of "
            f"{choices} choices; bootstrap over {learners} learners",
            lost,
            not above(lost),
            "An equal push on all rollouts of a group has expected gradient 0. What is left is noise that feeds on itself: "
            "the policy settles on what it happened to sample.",
            grpo=0.0, norm_of_mean_gradient_over_mean_norm=common, the_same_of_pure_noise=1 / math.sqrt(learners),
        ),
    ]  # fmt: skip


# -- several rewards -----------------------------------------------------------------------------------------------------


def combinations_apart(budget: Budget, panels: Panels) -> list[dict]:
    """GDPO: all groups of 4 rollouts with 2 or 3 rewards of 0 or 1, as one batch; eps 0, so that only rewards speak."""
    gdpo, counts = RECIPES["gdpo"](eps=0.0), {}
    for components in (2, 3):
        options = torch.tensor(list(itertools.product((0.0, 1.0), repeat=components)))
        rewards = options[torch.cartesian_prod(*[torch.arange(len(options))] * 4)]
        arms = {
            "gdpo": advantages(gdpo, rewards),
            "sum, then normalise": advantages(grpo(eps=0.0), rewards),
            "sum with weights 1, 1.01, ..": advantages(
                grpo(eps=0.0), rewards, weights=1.01 ** torch.arange(components)
            ),
        }
        distinct = {arm: len((given * 1e8).round().long().unique(dim=0)) for arm, given in arms.items()}
        counts[f"{components}_rewards"] = {"groups": len(rewards)} | distinct
    gain = counts["2_rewards"]["gdpo"] / counts["2_rewards"]["sum, then normalise"]
    tilt = counts["2_rewards"]["gdpo"] >= counts["2_rewards"]["sum with weights 1, 1.01, .."]
    rare = torch.tensor([[1.0, 1, 0], [0, 0, 1], *[[1, 1, 0]] * 7, *[[0, 0, 0]] * 7]).unsqueeze(0)
    return [
        entry(
            "gdpo",
            "normalising each reward before the sum keeps combinations apart that the sum merges",
            "distinct advantages of a group over those of sum-then-normalise, all 256 groups of 4 rollouts and two rewards "
            "of 0 or 1; exact",
            exactly(gain),
            graded(gain > 1, tilt),
            "As said. But weights of 1 and 1.01 keep more apart, if by small margins, and a rare reward may outweigh two "
            "common ones: in the group of 16 of the control (0, 0, 1) gets more than (1, 1, 0).",
            **counts,
            advantages_of_110_and_001={name: list(advantages(RECIPES[name], rare)[0, :2]) for name in ("gdpo", "grpo")},
        )
    ]  # fmt: skip


def rare_ones(budget: Budget, panels: Panels) -> list[dict]:
    """Unlikeliness. Rare: the less likely half of a group; or, of all right completions, those that hold half their mass."""
    recipe, passes, size, batches, level = RECIPES["unlikeliness"], (1, 2, 3), 16, budget.steps(60), 0.2
    recipes = {"grpo": (grpo, False), "unlikeliness": (recipe, False), "ranks of others": (recipe, True)}

    def run(recipe: Recipe, strangers: bool, passes: int, modulus: int) -> dict[str, np.ndarray]:
        toy = Toy(budget.learners, 8, places=(1, 1, 1, 1) if modulus == 8 else (1, 3, 9, 27), modulus=modulus, width=32)
        start = toy.masses(toy.start) * toy.right
        order = start.sort(-1)
        held = order.values.cumsum(-1)
        rare = torch.zeros_like(start).scatter(-1, order.indices, (held <= held[..., -1:] / 2).double())
        rose, count, track = torch.zeros(2, toy.learners), torch.zeros(2, toy.learners), []
        run = training(toy, recipe, batches, lr=3.0, group=size, passes=passes, strangers=strangers)
        for at, batch in enumerate(run, start=1):
            old, new = batch.old.sum(-1), toy.logps(toy.table(batch.weights), batch.completions).sum(-1)
            right = (batch.outcome > 0) & (batch.outcome == 0).any(-1, keepdim=True)
            rank = (old.unsqueeze(-1) > old.unsqueeze(-2)).sum(-1)
            for half, which in enumerate((right & (rank < size // 2), right & (rank >= size // 2))):
                rose[half] += ((new > old) & which).sum((1, 2))
                count[half] += which.sum((1, 2))
            if at % 5 == 0 or at == batches:
                mass = toy.masses(batch.weights) * toy.right
                rate, kept = mass.sum(-1), (mass * rare).sum(-1).mean(1)
                track.append((rate.mean(1), kept))
        uplift = (rose / count).numpy()  # NaN of a learner that never met one
        reached = [
            np.interp(level, [p[i] for p, _ in track], [m[i] for _, m in track], math.nan, math.nan)
            for i in range(toy.learners)
        ]
        return {
            "uplift of rare": uplift[0], "uplift of likely": uplift[1], "mass of rare": kept.numpy(),
            "at equal pass@1": np.array(reached),
            "pass@1": rate.mean(1).numpy(), **{f"pass@{k}": (1 - (1 - rate) ** k).mean(1).numpy() for k in (16, 256)},
        }  # fmt: skip

    often = {arm: [run(*how, n, 8) for n in passes] for arm, how in recipes.items()}
    seldom = {arm: run(*how, 2, 64) for arm, how in recipes.items()}
    panels["Unlikeliness: right rollouts that gained"] = panel(
        list(map(str, passes)), "passes over a batch", "share of the less likely ones",
        {arm: [one["uplift of rare"] for one in found] for arm, found in often.items()},
    )  # fmt: skip

    def more(name: str, n: int = 2, than: str = "grpo") -> Found:
        return interval(often["unlikeliness"][n - 1][name] - often[than][n - 1][name])

    def more_seldom(name: str) -> Found:
        return interval(seldom["unlikeliness"][name] - seldom["grpo"][name])

    gain, mass, wide, none = (
        more("uplift of rare"),
        more("mass of rare"),
        more("pass@16"),
        more_seldom("uplift of rare"),
    )
    equal = more("at equal pass@1")
    how = f"unlikeliness minus grpo; 1 completion in 8 right, 2 passes, G={size}, {batches} batches; bootstrap over learners"
    shown = ("uplift of rare", "uplift of likely", "mass of rare", "pass@1", "pass@16")
    return [
        entry(
            "unlikeliness",
            "right rollouts that were unlikely gain likelihood more often",
            "share of right rollouts, less likely than half of their group, that became more likely by the batch's updates; "
            f"{how}",
            gain,
            graded(above(gain), above(none)),
            "The likely ones pay. Nothing is left of it where a group has one right rollout at most (1 completion in 64): a "
            "rank needs company.",
            likely_half=more("uplift of likely"), against_ranks_of_others=more("uplift of rare", than="ranks of others"),
            one_pass=more("uplift of rare", 1), three_passes=more("uplift of rare", 3), one_right_in_64=none,
            arms={
                f"{arm}, passes {n}": {name: interval(found[n - 1][name]) for name in shown}
                for arm, found in often.items() for n in passes
            },
        ),
        entry(
            "unlikeliness",
            "the mass of rare right completions is kept",
            f"mass, after training, of those right completions that held the lesser half of it at first; {how}",
            mass,
            graded(above(mass), above(equal)),
            f"Training is slower too, so it is also compared where both have reached pass@1 = {level} (learners that do).",
            at_equal_pass_rate=equal, pass_1=more("pass@1"), against_ranks_of_others=more("mass of rare", than="ranks of others"),
            grpo=interval(often["grpo"][1]["mass of rare"]),
        ),
        entry(
            "unlikeliness",
            "pass@k is higher at large k",
            f"pass@16; {how}",
            wide,
            above(wide),
            "On this toy pass@k follows pass@1, and learning is a little slower.",
            pass_256=more("pass@256"), one_right_in_64={f"pass@{k}": more_seldom(f"pass@{k}") for k in (1, 16, 256)},
        ),
    ]  # fmt: skip
