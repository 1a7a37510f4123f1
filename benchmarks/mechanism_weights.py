"""Mechanisms of weights on advantages. How to read an entry: mechanisms.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mechanism_entries import (
    Budget,
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
from toy import Toy, gradient, sampled, training

from core.objective.composition import Recipe
from core.objective.group import Group
from core.objective.modulation import token_influence
from core.objective.recipes import RECIPES


def asymmetry(budget: Budget, panels: Panels) -> list[dict]:
    """A-GRAE: groups of 16 at each pass rate, in a batch whose own rate omega is set by groups that are all right or wrong."""
    size, progress, recipe = 16, (0.1, 0.3, 0.5, 0.7, 0.9), RECIPES["a_grae"]
    mixed = ladder(size)[1:-1]
    share = mixed.mean(1)

    def totals(recipe: Recipe, omega: float) -> tuple[Tensor, Tensor]:
        """Total |A| on right and on wrong rollouts, (15,) each, by pass rate."""
        filling = round(len(mixed) * (0.5 / min(omega, 1 - omega) - 1))
        batch = torch.cat([mixed, torch.full((filling, size), float(omega > 0.5))])
        assert math.isclose(batch.mean().item(), omega)
        given = advantages(recipe, batch)[: len(mixed)].abs()
        return (given * mixed).sum(1), (given * (1 - mixed)).sum(1)

    def ratio(right: Tensor, wrong: Tensor) -> float:
        return (right / wrong).mean().item()

    def favoured(right: Tensor, wrong: Tensor) -> float:
        return share[(right + wrong).argmax()].item()

    found = {omega: totals(recipe, omega) for omega in progress}
    plain = totals(grpo, 0.5)
    lines = {f"omega {omega}": sum(found[omega]) / size for omega in (0.1, 0.5, 0.9)} | {"grpo": sum(plain) / size}
    panels["A-GRAE: total |A| of a group"] = panel(share.tolist(), "share of right rollouts", "per rollout", lines)
    wanted = all(math.isclose(ratio(*found[omega]), omega, rel_tol=1e-9) for omega in progress)
    slides = all(favoured(*found[a]) > favoured(*found[b]) for a, b in itertools.pairwise(progress))
    return [
        entry(
            "a_grae",
            "right rollouts are pushed up only as far as the batch succeeds, and the favoured pass rate goes from easy to hard",
            "total |A| of right over that of wrong rollouts at omega = 0.1; exact",
            exactly(ratio(*found[0.1])),
            wanted and slides,
            "The ratio is min(1, omega / alpha) at every pass rate. The cost: while omega is small the push is almost all "
            "downwards. With the released code's easy term the easiest groups are favoured whatever omega is.",
            ratio={omega: ratio(*pair) for omega, pair in found.items()},
            favoured_pass_rate={omega: favoured(*pair) for omega, pair in found.items()},
            ratio_at_alpha_half={omega: ratio(*totals(recipe(alpha=0.5), omega)) for omega in progress},
            favoured_by_released_easy_term={omega: favoured(*totals(recipe(easy_term="released"), omega)) for omega in progress},
            grpo={"ratio": ratio(*plain), "favoured": favoured(*plain)},
        )
    ]  # fmt: skip


def answer_entropy(budget: Budget, panels: Panels) -> list[dict]:
    """SEED-GRPO: every way in which 8 rollouts can fall into clusters of equal answers."""
    size = 8

    def partitions(total: int, largest: int) -> Iterator[list[int]]:
        if total == 0:
            yield []
        for part in range(min(total, largest), 0, -1):
            yield from ([part, *rest] for rest in partitions(total - part, part))

    clusters = [[i for i, part in enumerate(sizes) for _ in range(part)] for sizes in partitions(size, size)]
    answers = torch.tensor(clusters, dtype=torch.float64)
    outcome = torch.zeros_like(answers)
    outcome[:, 0] = 1.0
    rewards = torch.stack([outcome, answers], dim=2)

    def change(**options: Any) -> float:
        given = advantages(
            RECIPES["seed_grpo"](**options), rewards, names=("outcome", "answer"), weights=torch.tensor([1.0, 0.0])
        )
        return (1 - given / (outcome - 1 / size)).max().item()

    published = change(alpha=0.0417)
    return [
        entry(
            "seed_grpo",
            "prompts whose answers disagree get smaller steps",
            f"greatest share by which an advantage shrinks at alpha = 0.0417, over all {len(clusters)} partitions of {size} "
            "answers; exact",
            exactly(published),
            graded(published > 0, published > 0.1),
            "It does what it says, and next to nothing: 4 % at the trainer's scale, 2 % at the text's, half at alpha = 1.",
            greatest_change={
                f"alpha={alpha}": {form: change(alpha=alpha, entropy=form) for form in ("mean_log", "shannon")}
                for alpha in (0.02, 0.0417, 1.0)
            },
        )
    ]  # fmt: skip


def indistinct(budget: Budget, panels: Panels) -> list[dict]:
    """DaGRPO's mask (our rule). Quality: 1 minus the share of tokens in which a rollout differs from the nearest right one."""
    size, length = 8, 6
    toy = Toy(budget.draws * 4, prompts=1, vocabulary=4, places=(1,) * length, modulus=4, spread=4.0)
    batch = sampled(toy, toy.start, size)
    tokens, right = batch.completions[:, 0], batch.outcome[:, 0] > 0
    apart = (tokens.unsqueeze(1) != tokens.unsqueeze(2)).sum(-1).double()
    nearest = apart.masked_fill(~right.unsqueeze(1), torch.inf).amin(2)
    rewards = torch.stack([right.double(), torch.where(nearest.isfinite(), 1 - nearest / length, 0.0)], dim=2)
    fields = {"names": ("outcome", "quality"), "weights": torch.tensor([1.0, 0.0])}
    plain, masked = advantages(grpo, rewards, **fields), advantages(RECIPES["dagrpo"], rewards, **fields)
    mixed, close = right.any(1) & ~right.all(1), ~right & (nearest <= 1)
    lost = (plain != 0) & (masked == 0)
    groups = {"near": mixed & (close | right).all(1), "distinct": mixed & ~close.any(1)}
    groups["both"] = mixed & ~groups["near"] & ~groups["distinct"]
    share = {kind: interval(lost[which].double().mean(1)) for kind, which in groups.items()}

    def conflict(advantage: Tensor) -> np.ndarray:
        """Cosine between what right rollouts push up and wrong ones push down, in groups with wrong ones of both kinds."""
        up, down = (gradient(grpo, batch, (advantage * which).abs().flatten()).flatten(1) for which in (right, ~right))
        return torch.cosine_similarity(up, down)[groups["both"]].numpy()

    order = torch.rand(right.shape, generator=toy.draw).masked_fill(right, torch.inf).argsort(1).argsort(1)
    chance = plain.masked_fill(~right & (order < (lost & ~right).sum(1, keepdim=True)), 0.0)
    cosine = {"before": conflict(plain), "after": conflict(masked), "after a random mask": conflict(chance)}
    change, luck = (
        interval(cosine["after"] - cosine["before"]),
        interval(cosine["after"] - cosine["after a random mask"]),
    )
    return [
        entry(
            "dagrpo",
            "rollouts that barely differ from one of the other kind are silenced, and others are not",
            "share of a group's rollouts silenced where every wrong one is a token away from a right one (6 tokens, margin "
            "0.2, G=8); bootstrap over groups",
            share["near"],
            share["near"][0] == 1.0 and share["distinct"][0] == 0.0,
            "The rule is ours, after the abstract; this checks the rule and not the paper.",
            groups_without_close_ones=share["distinct"], groups_with_close_and_distant_ones=share["both"],
            groups={kind: int(which.sum()) for kind, which in groups.items()},
        ),
        entry(
            "dagrpo",
            "the mask lessens the conflict between the gradients of right and wrong rollouts",
            "change of the cosine between what right rollouts push up and wrong ones push down, in groups with close and "
            "distant ones; bootstrap over groups",
            change,
            graded(below(change), below(luck)),
            "Conflict is a cosine above 0, and even before there is none on average. A random mask of as many wrong rollouts "
            "is the control.",
            against_random_mask=luck, cosine={name: interval(values) for name, values in cosine.items()},
            share_of_groups_in_conflict={name: (values > 0).mean() for name, values in cosine.items()},
        ),
    ]  # fmt: skip


class Influence:
    """A model that has been asked already."""

    def __init__(self, found: tuple[Tensor, Tensor]):
        self.found = found

    def influence(self, right: Tensor) -> tuple[Tensor, Tensor]:
        return self.found


def hidden_rewards(budget: Budget, panels: Panels) -> list[dict]:
    """THR: six completions of two tokens from a net with one hidden layer, and a small step on one token at a time."""
    size, vocabulary, width, rate = 6, 16, 8, 1e-4
    recipe, draw = RECIPES["token_hidden_reward"](threshold=0.0), torch.Generator().manual_seed(0)
    arms = ("head", "head, columns that occur", "all weights")
    agree: dict[str, list[float]] = {arm: [] for arm in arms}
    predicted, measured = {arm: [] for arm in arms}, {arm: [] for arm in arms}
    while len(agree["head"]) < budget.draws:
        embed = torch.randn(vocabulary + 1, width, generator=draw)
        inner = torch.randn(width, width, generator=draw) / width**0.5
        head = torch.randn(vocabulary, width, generator=draw) / width**0.5
        tokens = torch.zeros(size, 2, dtype=torch.long)

        def forward(
            inner: Tensor, head: Tensor, tokens: Tensor = tokens, embed: Tensor = embed
        ) -> tuple[Tensor, Tensor]:
            """Hidden states (G, 2, d), and log-probabilities (G, 2, V)."""
            before = torch.stack([torch.full((size,), vocabulary), tokens[:, 0]], dim=1)
            hidden = torch.tanh(embed[before] @ inner)
            return hidden, (hidden @ head.T).log_softmax(-1)

        for t in range(2):
            tokens[:, t] = torch.multinomial(forward(inner, head)[1][:, t].exp(), 1, generator=draw).squeeze(1)
        right = tokens.sum(1) % 2 == 0
        if right.all() or not right.any():
            continue
        weights = [inner.requires_grad_(), head.requires_grad_()]
        hidden, table = forward(*weights)
        logps = table.gather(2, tokens.unsqueeze(2)).squeeze(2)
        side = torch.where(right, 1.0, -1.0)
        error = (torch.nn.functional.one_hot(tokens, vocabulary) - table.exp()).detach()
        occur, mask = torch.zeros(vocabulary).scatter(0, tokens.flatten(), 1.0), torch.ones(size, 2)
        for arm in arms:
            columns, trained = occur if "occur" in arm else torch.ones(vocabulary), (arm == "all weights", True)
            influence = token_influence(hidden.detach(), error * columns, mask, right)
            group = Group(
                right.double().view(1, size, 1), weights=torch.ones(1), mask=mask, outcome=0, model=Influence(influence)
            )
            sign = (recipe.credit(group).advantage / grpo.credit(group).advantage.unsqueeze(1) - 1).sign()
            hits = 0
            for i, t in itertools.product(range(size), range(2)):
                step = torch.autograd.grad(logps[i, t] * side[i], weights, retain_graph=True)
                moved = [w.detach() + rate * g * used for w, g, used in zip(weights, step, trained, strict=True)]
                after = forward(*moved)[1].gather(2, tokens.unsqueeze(2)).squeeze(2)
                change = ((after - logps.detach())[right].sum() / rate).item()
                hits += math.copysign(1, change) == sign[i, t].item()
                predicted[arm].append((side[i] * influence[0][i, t]).item())
                measured[arm].append(change)
            agree[arm].append(hits / (2 * size))
    rates = {arm: interval(values) for arm, values in agree.items()}
    return [
        entry(
            "token_hidden_reward",
            "a token's score has the sign of what a step on it does to the likelihood of the group's right rollouts",
            f"share of tokens whose sign agrees with the change measured after a step of {rate:g} on the output layer; "
            f"{budget.draws} random nets (V={vocabulary}, {width} hidden units, G={size}, two tokens), bootstrap over nets",
            rates["head"],
            graded(above(rates["head"], 0.99), above(rates["all weights"], 0.99)),
            "Exact to first order for the output layer, which is all that the score knows. Where the layer below is trained "
            "too, or only columns of tokens that occur in the group are looked at, it is an estimate.",
            all_weights_trained=rates["all weights"], columns_that_occur=rates["head, columns that occur"], by_chance=0.5,
            correlation={arm: np.corrcoef(predicted[arm], measured[arm])[0, 1] for arm in arms},
        )
    ]  # fmt: skip


def entropy_at_target(budget: Budget, panels: Panels) -> list[dict]:
    """Distribution-centric (DCPO), where one completion in 8 is right, and where all are, so that grpo is silent."""
    recipe, targets, updates = RECIPES["distribution_centric"], (0.25, 0.5), budget.steps(400)
    ticks = [round(i * updates / 20) for i in range(21)]

    def run(recipe: Recipe, modulus: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
        """(21, S) entropies and pass rates."""
        toy = Toy(budget.learners, modulus=modulus, width=128, spread=spread)
        kept = [toy.start, *(batch.weights for batch in training(toy, recipe, updates, lr=10.0, group=16))]
        nats = [toy.nats(kept[at]).numpy() for at in ticks]
        return np.array(nats), np.array([toy.pass_rate(kept[at]).mean(1).numpy() for at in ticks])

    arms = {"grpo": grpo, **{f"target {target}": recipe(target=target) for target in targets}}
    arms |= {"target 0.5, most=1": recipe(target=0.5, most=1.0), "grpo, entropy_coef=0.1": grpo(entropy_coef=0.1)}
    learned = {arm: run(of, 8, 2.0) for arm, of in arms.items()}
    sunk = {target: run(recipe(target=target), 1, 4.0)[0] for target in targets}
    risen = run(recipe(target=0.5), 1, 8.0)[0]
    main = ("grpo", "target 0.25", "target 0.5")
    lines = {arm: learned[arm][0] for arm in main} | {
        f"all right, target {target}": nats for target, nats in sunk.items()
    }
    panels["DCPO: entropy"] = panel(ticks, "updates", "nats per decision", lines)
    panels["DCPO: what it costs"] = panel(ticks, "updates", "P(right), exact", {arm: learned[arm][1] for arm in main})
    end = {arm: interval(nats[-1]) for arm, (nats, _) in learned.items()}
    held = all(abs(end[f"target {target}"][0] - target) < 0.1 for target in targets)
    quiet = {f"target {target}": (nats, target) for target, nats in sunk.items()} | {
        "target 0.5, from below": (risen, 0.5)
    }
    nearer = {arm: interval(abs(nats[-1] - target) - abs(nats[0] - target)) for arm, (nats, target) in quiet.items()}
    early = len(ticks) // 4
    cost = interval(learned["target 0.5"][1][early] - learned["grpo"][1][early])
    return [
        entry(
            "distribution_centric",
            "entropy stays at its target while grpo's decays",
            f"nats per decision after {updates} updates at target 0.5, where 1 completion in 8 is right (right policies of up "
            "to 1.04 nats exist); bootstrap over learners",
            end["target 0.5"],
            held,
            "The imitation weighs at most 0.1 / (0.1 + share right); as long as sharper is also safer, grpo's part outweighs "
            "it, and entropy once lost comes back very slowly. `most` lifts the bound.",
            entropy_at_the_end=end,
        ),
        entry(
            "distribution_centric",
            "where nothing else pulls, entropy moves to its target",
            f"change of the distance to target 0.5 in {updates} updates, nats per decision, where all completions are right; "
            "bootstrap over learners",
            nearer["target 0.5"],
            all(below(change) for change in nearer.values()),
            "From both sides. grpo has no gradient here and stays where it is.",
            change_of_distance=nearer,
            nats_at_start={arm: interval(nats[0]) for arm, (nats, _) in quiet.items()},
            nats_at_the_end={arm: interval(nats[-1]) for arm, (nats, _) in quiet.items()},
        ),
        entry(
            "distribution_centric",
            "the imitation term costs little reward",
            f"P(right) at target 0.5 minus grpo's after {ticks[early]} updates, exact; bootstrap over learners",
            cost,
            above(cost, -0.02),
            "What it costs is speed. Entropy was not held, so this is the price of the term and not of the entropy.",
            p_right_at_that_time={arm: interval(rate[early]) for arm, (_, rate) in learned.items()},
            p_right_at_the_end={arm: interval(rate[-1]) for arm, (_, rate) in learned.items()},
        ),
    ]  # fmt: skip
