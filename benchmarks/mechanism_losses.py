"""Mechanisms of ratios, clips and what is added to the loss. How to read an entry: mechanisms.py."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from mechanism_entries import Budget, Found, Panels, above, below, entry, exactly, graded, grpo, interval, panel
from torch import Tensor
from toy import Toy, credit, gradient, sampled, training

from core.objective.composition import Recipe
from core.objective.group import Group
from core.objective.recipes import RECIPES
from core.objective.rows import Counts, Rows


def stale_data(budget: Budget, panels: Panels) -> list[dict]:
    """REC, OPMD, AsymRE against plain REINFORCE, on batches sampled by the weights of 0, 1, 4 or 16 updates ago."""
    rec, opmd, asymre = (RECIPES[name] for name in ("rec", "opmd", "asymre"))
    plain, bare = "reinforce", "rec, weight=none"
    arms = {
        plain: rec(clip="none", weight="none"),
        "rec": rec,
        bare: rec(weight="none"),
        "opmd": opmd,
        "asymre": asymre,
    }
    updates, ages, (small, large) = budget.steps(200), (0, 1, 4, 16), (0.3, 1.0)

    def run(recipe: Recipe, stale: int, lr: float, adam: bool = True, width: int = 16) -> tuple[np.ndarray, np.ndarray]:
        """(S,) P(right) at the end, and how far below the best P(right) on the way that is."""
        toy = Toy(budget.learners, width=width)
        batches = enumerate(training(toy, recipe, updates, lr=lr, stale=stale, adam=adam), start=1)
        kept = [batch.weights for at, batch in batches if at % 25 == 0 or at == updates]
        seen = np.array([toy.pass_rate(weights).mean(1).numpy() for weights in (toy.start, *kept)])
        return seen[-1], seen.max(0) - seen[-1]

    found: dict[tuple[str, float, int], tuple[np.ndarray, np.ndarray]] = {}
    for lr, (arm, recipe), age in itertools.product((small, large), arms.items(), ages):
        same = age == 0 and arm in ("rec", bare, "opmd")  # fresh ratios are 1: REINFORCE's own updates
        found[arm, lr, age] = found[plain, lr, 0] if same else run(recipe, age, lr)
    descent = {(arm, lr): run(recipe, 16, lr, adam=False)[0] for arm, recipe in arms.items() for lr in (30, 300)}
    for lr in (small, large):
        panels[f"Stale data, Adam at {lr:g}: P(right)"] = panel(
            list(map(str, ages)), "updates between sampler and learner", "exact, at the end",
            {arm: [found[arm, lr, age][0] for age in ages] for arm in arms},
        )  # fmt: skip

    def p_right(arm: str) -> dict[str, Found]:
        adam = {f"adam {lr:g}, stale {age}": interval(found[arm, lr, age][0]) for lr in (small, large) for age in ages}
        return adam | {f"descent {lr}, stale 16": interval(descent[arm, lr]) for lr in (30, 300)}

    fall = {lr: interval(found[plain, lr, 16][0] - found[plain, lr, 0][0]) for lr in (small, large)}
    wide = interval(run(arms[plain], 16, large, width=64)[0] - run(arms[plain], 0, large, width=64)[0])
    gentle = interval(run(arms[plain], 0, 30, adam=False)[0])
    how = f"P(right) after {updates} Adam updates at {large:g} on data 16 updates old"
    entries = [
        entry(
            "rec",
            "plain REINFORCE (no clip, no weight) degrades on stale data",
            f"{how}, minus the same on fresh data; exact, bootstrap over learners",
            fall[large],
            graded(below(fall[large]), below(interval(found[plain, small, 4][0] - found[plain, small, 0][0]))),
            "Staleness and step size multiply: on data up to 4 updates old it is near what fresh data give, and in small steps "
            "(descent at 30) on older data too. The more prompts and positions share features, the more is lost.",
            at_adam_0_3=fall[small], with_64_features_instead_of_16=wide, fresh_at_descent_30=gentle, p_right=p_right(plain),
        )
    ]  # fmt: skip
    notes = {
        "rec": ("the clip keeps stale data safe (weight=ratio, the default)",
                "At Adam 0.3 yes; at 1.0 it is better than no clip and far from fresh data; with plain descent it is behind "
                "no clip. A likely reason: the ratio is near 0 on right rollouts that the learner has moved away from, so "
                "they cannot come back."),
        bare: ("the clip keeps stale data safe, and the ratio is not needed (weight=none)",
               "Close to fresh data with Adam. With small steps of plain descent it is slower than no clip: it stops a "
               "learner that runs ahead of its data, harmful or not."),
        "opmd": ("a squared distance to the sampler keeps stale data safe (penalty=0.1)",
                 "Harmless up to 4 updates. On older data and with large steps the distance does the harm: its gradient "
                 "grows with staleness and outweighs the reward's. A tenth of the penalty does help."),
        "asymre": ("a lowered baseline keeps stale data safe",
                   "Some imitation of whatever was sampled, most of which is right once the policy is good."),
    }  # fmt: skip
    for arm, (claim, note) in notes.items():
        gain, fresh = (interval(found[arm, large, 16][0] - found[plain, large, age][0]) for age in (16, 0))
        straight = {f"descent {lr}": interval(descent[arm, lr] - descent[plain, lr]) for lr in (30, 300)}
        control = {
            "against_fresh_reinforce": fresh,
            "against_reinforce": straight,
            "lost_from_best": interval(found[arm, large, 16][1]),
        }
        if arm == "opmd":
            control["p_right_at_penalty_0_01"] = interval(run(opmd(penalty=0.01), 16, large)[0])
        entries.append(entry(
            arm.split(",")[0],
            claim,
            f"{how}, minus plain REINFORCE's; exact, bootstrap over learners",
            gain,
            graded(above(gain), above(fresh, -0.05) and all(above(value, -0.05) for value in straight.values())),
            note,
            **control, p_right=p_right(arm),
        ))  # fmt: skip
    return entries


def mixed_variance(budget: Budget, panels: Panels) -> list[dict]:
    """DHPO: variance of the gradient over batches from a policy four updates older; 4 prompts, G=8, V=8 (4 at T=8)."""
    token, sequence, mixed = "token (grpo)", "sequence (gspo)", "mixed (dhpo)"
    gspo, dhpo, copies, lengths = RECIPES["gspo"], RECIPES["dhpo"], budget.draws, (2, 4, 8)
    wide = {"epsilon_low": 1.0, "epsilon_high": math.inf}
    both = {"sequence_epsilon_low": 1.0, "sequence_epsilon_high": math.inf}
    families = {
        "published": {token: grpo, sequence: gspo, mixed: dhpo},
        "no clip": {token: grpo(**wide), sequence: gspo(**wide), mixed: dhpo(**wide, **both)},
    }
    noise: dict[tuple[str, int, str], list[float]] = {}
    signal: dict[tuple[str, int, str], list[float]] = {}
    drift = []
    for length, problem in itertools.product(lengths, range(budget.learners)):
        single = Toy(1, places=(1,) * length, vocabulary=8 if length < 8 else 4, modulus=4, seed=problem)
        *_, last = training(single, grpo, 4, lr=10.0)
        toy = single.one(slice(0, 1), copies)
        batch = sampled(toy, toy.start, 8, last.weights.expand(copies, -1, -1))
        given = credit(grpo, batch).advantage
        if length == 4:
            drift.append(
                ((toy.logps(toy.table(batch.weights), batch.completions) - batch.old).exp() - 1).abs().mean().item()
            )
        for family, (arm, recipe) in ((name, one) for name, of in families.items() for one in of.items()):
            slope = gradient(recipe, batch, given).flatten(1)
            trace = slope.var(0).sum().item()
            noise.setdefault((family, length, arm), []).append(trace)
            signal.setdefault((family, length, arm), []).append(slope.mean(0).square().sum().item() - trace / copies)

    def over(values: dict, family: str, length: int, arm: str) -> np.ndarray:
        return np.divide(values[family, length, arm], values[family, length, token])

    def between(family: str, length: int) -> np.ndarray:
        ends = [noise[family, length, arm] for arm in (token, sequence)]
        middle = np.array(noise[family, length, mixed])
        return (np.minimum(*ends) <= middle) & (middle <= np.maximum(*ends))

    def table(family: str) -> dict[str, Any]:
        return {
            f"T={length}": {"share between": interval(between(family, length)), token: interval(noise[family, length, token])}
            | {f"{arm} over token": interval(over(noise, family, length, arm)) for arm in (sequence, mixed)} for length in lengths
        }  # fmt: skip

    free = {arm: [over(noise, "no clip", length, arm) for length in lengths] for arm in (token, sequence, mixed)}
    panels["DHPO: variance of the gradient, no clip"] = panel(
        list(map(str, lengths)), "tokens of a completion", "over that of token ratios", free
    )
    always = {family: all(between(family, length).all() for length in lengths) for family in families}
    mostly = all(between(family, length).mean() > 0.5 for family in families for length in lengths)
    return [
        entry(
            "dhpo",
            "mixing token and sequence ratios gives a variance between the two",
            f"trace of the gradient's covariance over that of token ratios, published ranges, T=4; {copies} batches for each "
            f"of {budget.learners} problems, bootstrap over problems",
            interval(over(noise, "published", 4, mixed)),
            graded(mostly, all(always.values())),
            "Published ranges clip most of the sequence branch away, and with the variance some of the mean gradient. "
            "Without clips all three are nearly one as completions grow, and the mix is not always between.",
            published_ranges=table("published"), no_clip=table("no clip"), mean_distance_of_token_ratios_from_1=interval(drift),
            squared_mean_gradient_over_that_of_token_ratios={
                family: {arm: np.median(over(signal, family, 4, arm)) for arm in (sequence, mixed)} for family in families
            },
        )
    ]  # fmt: skip


def falling_likelihood(budget: Budget, panels: Panels) -> list[dict]:
    """LLDS: two turns of two tokens around an observation; features are shared, so wrong rollouts drag right ones along."""
    updates, passes, llds = budget.steps(60), (1, 2, 4, 8), RECIPES["llds"]

    def run(recipe: Recipe, passes: int, lr: float = 10.0) -> dict[str, np.ndarray]:
        """Of right rollouts with A > 0, over a batch's updates: share that fell, mean fall and mean rise, nats; and more."""
        toy = Toy(budget.learners, 8, vocabulary=6, places=(1, 1, 0, 1, 1), modulus=6, width=24, spread=1.0)
        sums, rates = torch.zeros(4, toy.learners), []
        for batch in training(toy, recipe, updates, lr=lr, passes=passes):
            moved = toy.logps(toy.table(batch.weights), batch.completions) - batch.old
            change = (moved * (toy.places != 0)).sum(-1)
            right = ((batch.outcome > 0) & (batch.advantage > 0)).double()
            parts = torch.stack([(change < 0).double(), (-change).relu(), change.relu(), torch.ones_like(change)])
            sums += (parts * right).sum((2, 3))
            rates.append(batch.outcome.mean((1, 2)))
        fell, fall, rise = (sums[:3] / sums[3].clamp(min=1)).numpy()
        rate = torch.stack(rates[-5:]).mean(0).numpy()
        return {
            "share that fell": fell,
            "fall": fall,
            "rise": rise,
            "pass rate": rate,
            "weights": batch.weights.numpy(),
        }

    plain, guarded = {n: run(grpo, n) for n in passes}, {n: run(llds, n) for n in passes}
    arms = {
        "grpo": plain[4],
        "llds": guarded[4],
        **{f"level={level}": run(llds(level=level), 4) for level in ("rollout", "token")},
    }
    arms |= {"penalty=1": run(llds(penalty=1.0), 4), **{f"grpo, lr {lr:g}": run(grpo, 4, lr) for lr in (7.0, 5.0)}}
    panels["LLDS: right rollouts that became less likely"] = panel(
        list(map(str, passes)), "updates per batch", "mean fall, nats",
        {"grpo": [plain[n]["fall"] for n in passes], "llds": [guarded[n]["fall"] for n in passes]},
    )  # fmt: skip
    ratio = {n: interval(guarded[n]["fall"] / plain[n]["fall"].clip(1e-12)) for n in passes}
    apart = {n: float(np.abs(guarded[n]["weights"] - plain[n]["weights"]).max()) for n in passes}
    shown = ("share that fell", "fall", "rise", "pass rate")
    return [
        entry(
            "llds",
            "right rollouts no longer lose likelihood",
            f"mean fall of right rollouts' log-likelihood over a batch of 4 updates, llds over grpo, {updates} batches; "
            "bootstrap over learners",
            ratio[4],
            graded(below(ratio[4], 1.0), below(ratio[4], 0.1)),
            "It lessens the fall and does not stop it: at 0.2 the guard is soft; at 1 little is left. The three levels do "
            "not differ. Smaller steps of grpo lessen the fall as well, and unlike llds what is learned with it.",
            by_updates_per_batch=ratio, change_of_pass_rate=interval(guarded[4]["pass rate"] - plain[4]["pass rate"]),
            arms={arm: {name: interval(found[name]) for name in shown} for arm, found in arms.items()},
        ),
        entry(
            "llds",
            "with one update per batch it changes nothing",
            f"greatest difference between weights of llds and of grpo after {updates} batches of one update; exact",
            exactly(apart[1]),
            apart[1] == 0.0,
            "Old and new likelihoods are equal then, and the guard has neither value nor gradient.",
            by_updates_per_batch=apart,
        ),
    ]  # fmt: skip


class Teacher:
    """A teacher of whom only the entropies are known, (B, T) nats."""

    def __init__(self, entropy: Tensor):
        self.entropy = entropy

    def teach(self, taught: Tensor, right: Tensor) -> Tensor:
        return self.entropy


def routes(budget: Budget, panels: Panels) -> list[dict]:
    """Sample-routed (SRPO): which rows learn from what, by the gradients that reach them; groups at pass rates 0 to 1."""
    recipe, prompts, size, length, draw = RECIPES["sample_routed"], budget.draws, 8, 5, torch.Generator().manual_seed(0)
    teacher, mask = (
        Teacher(2.5 * torch.rand(prompts * size, length, generator=draw)),
        torch.ones(prompts * size, length),
    )
    outcome = (torch.rand(prompts, size, generator=draw) < torch.linspace(0, 1, prompts).unsqueeze(1)).double()
    group = Group(outcome.unsqueeze(-1), weights=torch.ones(1), mask=mask, outcome=0, model=teacher)
    given = recipe.credit(group)
    logps = (-torch.rand(mask.shape, generator=draw)).requires_grad_()
    distance = torch.rand(mask.shape, generator=draw).requires_grad_()
    extras = given.extras | {"distillation": distance}
    loss = recipe.loss(Rows(logps, mask, given.advantage, Counts(len(mask), mask.sum(), length), extras=extras))
    reached = [(slope != 0).all(1) for slope in torch.autograd.grad(loss.sum, (logps, distance))]
    right = outcome.flatten() > 0
    some, every = (of.repeat_interleave(size) for of in (outcome.any(1), outcome.all(1)))
    kinds = {
        "right, with a wrong sibling": (right & ~every, "grpo"), "wrong, with a right sibling": (~right & some, "teacher"),
        "right, all are": (every, "nothing"), "wrong, all are": (~some, "nothing"),
    }  # fmt: skip
    correct, table = torch.zeros_like(right), {}
    for kind, (which, route) in kinds.items():
        correct |= which & (reached[0] == (route == "grpo")) & (reached[1] == (route == "teacher"))
        shares = {way: hit[which].double().mean() for way, hit in zip(("grpo", "teacher"), reached, strict=True)}
        table[kind] = {"rows": int(which.sum()), "specified": route} | shares
    weight = given.extras["distillation_weight"]
    on = weight > 0
    mean = weight[on].mean().item()
    single = [part[part > 0].mean().item() for part in weight.split(size) if (part > 0).any()]
    flat = recipe(sharpness=0.0).credit(group).extras["distillation_weight"][on]
    share = interval(correct.view(prompts, size).double().mean(1))
    slope = np.corrcoef(weight[on], teacher.entropy[on])[0, 1]
    return [
        entry(
            "sample_routed",
            "wrong rollouts with a right sibling learn from the teacher, right ones from grpo, the others from nothing",
            f"share of rows whose gradient comes from where it should and from nowhere else; {prompts} groups of {size}, "
            "bootstrap over groups",
            share,
            share[0] == 1.0,
            "All-wrong groups have neither teacher nor advantage: as in grpo, nothing is learned there.",
            table=table,
        ),
        entry(
            "sample_routed",
            "entropy weights have mean 1 and favour what the teacher is sure of",
            "mean weight of the batch's taught tokens; exact",
            exactly(mean),
            abs(mean - 1) < 1e-12 and bool(slope < 0),
            "Over the batch, not over a micro-batch: least and greatest mean of a single group are in the control.",
            means_of_single_groups=[min(single), max(single)], correlation_with_teacher_entropy=slope,
            weights_at_sharpness_0=[flat.min(), flat.max()],
        ),
    ]  # fmt: skip
