"""What each paper says its objective does, tested alone through the public recipes: a number, its interval, and a control.

    python -P benchmarks/mechanisms.py [--quick] [--output FOLDER]      writes results/mechanisms.json and mechanisms.svg

Toys, so a mechanism can show or fail in isolation: that it shows says nothing of a language model's scores. Everything is
float64 on one thread, from fixed seeds. Sizes and step sizes were found in trial runs, mostly so that the plain arm shows
what the paper complains of, which favours the paper; seeds were never chosen.

`Toy`: learners of exact problems, small enough to enumerate all completions. Intervals are 95 % percentile bootstraps of the
mean over learners (each has its own problem, weights and samples; arms share problems), or over blocks of groups; a
number that is computed without sampling has the interval [value, value]. `holds` is decided by rules below, from the numbers:
true, false, or "partly" where a control takes away a part of the claim.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import copy
import io
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.objective.composition import Recipe
from core.objective.group import Credit, Group
from core.objective.modulation import token_influence
from core.objective.recipes import RECIPES
from core.objective.rows import Counts, Rows
from core.run.folder import RunFolder
from core.run.summary import git_revision

RESAMPLES = 10_000


@dataclass(frozen=True)
class Budget:
    """How much is sampled. updates: share of the full number of updates; draws: small problems, or blocks of groups."""

    learners: int = 24
    updates: float = 1.0
    draws: int = 200
    block: int = 100

    def steps(self, full: int) -> int:
        return max(4, round(full * self.updates))


QUICK = Budget(learners=3, updates=0.05, draws=8, block=50)

# -- the toy -------------------------------------------------------------------------------------------------------------


class Toy:
    """S learners of exact problems, side by side; each has features, targets and weights of its own.

    A completion is T tokens out of V, one for each of `places`. Logits are features(prompt, position, token before) @
    weights, with `width` random features for all prompts and positions, so that teaching one completion moves others. A
    completion is right if the sum of its tokens times `places`, modulo `modulus`, is the prompt's target: one in
    `modulus` is. A place of 0 is an observation, drawn evenly, that carries no loss.
    """

    def __init__(
        self,
        learners: int,
        prompts: int = 4,
        vocabulary: int = 8,
        places: tuple[int, ...] = (1, 1, 1, 1),
        modulus: int = 8,
        width: int = 16,
        spread: float = 2.0,
        seed: int = 0,
    ):
        self.draw = torch.Generator().manual_seed(seed)
        self.learners, self.prompts, self.vocabulary, self.modulus = learners, prompts, vocabulary, modulus
        self.places = torch.tensor(places)
        contexts = prompts * len(places) * vocabulary
        self.features = self._normal(learners, contexts, width) / width**0.5
        self.start = spread * self._normal(learners, width, vocabulary)
        self.target = torch.randint(modulus, (learners, prompts), generator=self.draw)

    def one(self, at: slice, copies: int = 1) -> Toy:
        """The problem of learner `at`, slice(i, i + 1), `copies` times: each copy samples by itself."""
        toy = copy.copy(self)
        toy.learners, toy.target = copies, self.target[at].expand(copies, -1)
        toy.features, toy.start = self.features[at].expand(copies, -1, -1), self.start[at].expand(copies, -1, -1)
        return toy

    def table(self, weights: Tensor, temperature: float = 1.0) -> Tensor:
        """(S, P, T, V, V): log-probability of a token after another; before the first stands token 0."""
        shape = (self.learners, self.prompts, len(self.places), self.vocabulary, self.vocabulary)
        return ((self.features @ weights).view(shape) / temperature).log_softmax(-1)

    def logps(self, table: Tensor, completions: Tensor) -> Tensor:
        """(S, P, G, T) token log-probabilities of completions (S, P, G, T)."""
        return table.flatten(2).gather(2, self._cells(completions).flatten(2)).view(completions.shape)

    def entropy(self, table: Tensor, completions: Tensor) -> Tensor:
        """(S, P, G, T) nats: of the distributions that the tokens were drawn from."""
        cells = self._cells(completions).flatten(2) // self.vocabulary
        return -(table.exp() * table).sum(-1).flatten(2).gather(2, cells).view(completions.shape)

    def sample(self, table: Tensor, group: int) -> Tensor:
        before = torch.zeros(self.learners, self.prompts, group, dtype=torch.long)
        tokens = []
        for t, place in enumerate(self.places.tolist()):
            where = before.unsqueeze(-1).expand(-1, -1, -1, self.vocabulary)
            upto = table[:, :, t].gather(2, where).exp().cumsum(-1)[..., :-1]
            if place == 0:
                upto = torch.arange(1, self.vocabulary) / self.vocabulary
            before = (torch.rand((*before.shape, 1), generator=self.draw) > upto).sum(-1)
            tokens.append(before)
        return torch.stack(tokens, -1)

    def outcome(self, completions: Tensor) -> Tensor:
        """(S, P, G): 1 for right ones, else 0."""
        return ((completions * self.places).sum(-1) % self.modulus == self.target.unsqueeze(-1)).double()

    @cached_property
    def everything(self) -> Tensor:
        """(V^T, T): all completions there are."""
        return torch.cartesian_prod(*[torch.arange(self.vocabulary)] * len(self.places))

    @cached_property
    def right(self) -> Tensor:
        """(S, P, V^T): which of them are."""
        return self.outcome(self.everything) > 0

    def masses(self, weights: Tensor) -> Tensor:
        """(S, P, V^T): the probability of every completion there is."""
        table, cells = self.table(weights).flatten(2), self._cells(self.everything)
        return sum(table[:, :, cells[:, t]] for t in range(len(self.places))).exp()

    def pass_rate(self, weights: Tensor) -> Tensor:
        """(S, P): the probability of a right completion, exactly; 0 of weights that are not finite."""
        return torch.nan_to_num((self.masses(weights) * self.right).sum(-1), nan=0.0)

    def nats(self, weights: Tensor) -> Tensor:
        """(S,): entropy per decision, exactly."""
        masses = self.masses(weights)
        return -(masses * masses.clamp(min=1e-300).log()).sum(-1).mean(1) / len(self.places)

    def mask(self, group: int) -> Tensor:
        """(P * G, T) of one learner."""
        return (self.places != 0).double().repeat(self.prompts * group, 1)

    def _cells(self, completions: Tensor) -> Tensor:
        """Where in a flattened (T, V, V) table a token after its predecessor stands."""
        before = torch.nn.functional.pad(completions[..., :-1], (1, 0))
        return (torch.arange(len(self.places)) * self.vocabulary + before) * self.vocabulary + completions

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.draw)


@dataclass
class Sampled:
    """A generation batch. completions, old: (S, P, G, T); outcome: (S, P, G); weights: (S, d, V), the learners'."""

    toy: Toy
    sampler: Tensor
    completions: Tensor
    old: Tensor
    outcome: Tensor
    weights: Tensor
    advantage: Tensor | None = None  # (S, P, G) or (S, P, G, T)


def sampled(toy: Toy, sampler: Tensor, group: int, weights: Tensor | None = None) -> Sampled:
    table = toy.table(sampler)
    completions = toy.sample(table, group)
    old = toy.logps(table, completions)
    return Sampled(toy, sampler, completions, old, toy.outcome(completions), sampler if weights is None else weights)


class Learner:
    """What a recipe may ask of the model of one learner, batch.toy.one(i)."""

    def __init__(self, batch: Sampled, at: slice):
        self.toy, self.sampler, self.completions = batch.toy.one(at), batch.sampler[at], batch.completions[at]

    def tempered_logps(self, temperature: float) -> Tensor:
        return self.toy.logps(self.toy.table(self.sampler, temperature), self.completions).flatten(0, 2)


def credit(recipe: Recipe, batch: Sampled, ranked: Tensor | None = None) -> Credit:
    """The credit of all learners' rollouts; learner by learner where a recipe looks beyond a group.

    ranked: (S, P, G, T), shown to the recipe as old log-probabilities instead of the true ones.
    """
    toy, (learners, prompts, size) = batch.toy, batch.outcome.shape
    old = (batch.old if ranked is None else ranked).flatten(1, 2)
    rewards = batch.outcome.unsqueeze(-1)
    alone = "annotate" in recipe.sets or "whole_batch" in recipe.needs
    parts = [slice(i, i + 1) for i in range(learners)] if alone else [slice(None)]
    found = []
    for part in parts:
        rows = old[part].flatten(0, 1)
        fields = {"mask": toy.mask(size).repeat(len(rows) // (prompts * size), 1), "old_logps": rows, "outcome": 0}
        model = Learner(batch, part) if alone else None
        found.append(recipe.credit(Group(rewards[part].flatten(0, 1), weights=torch.ones(1), model=model, **fields)))
    return Credit(
        advantage=torch.cat([one.advantage for one in found]),
        keep=torch.cat([one.keep for one in found]),
        extras={name: torch.cat([one.extras[name] for one in found]) for name in found[0].extras},
    )


def gradient(recipe: Recipe, batch: Sampled, advantage: Tensor, extras: dict[str, Tensor] | None = None) -> Tensor:
    """(S, d, V): of each learner's loss, at batch.weights. A dropped rollout has advantage 0 and stays in the counts."""
    toy, (learners, prompts, size) = batch.toy, batch.outcome.shape
    mask, weights = toy.mask(size), batch.weights.detach().requires_grad_()
    table = toy.table(weights)
    entropy = None
    if recipe.options.get("entropy_coef"):
        entropy = toy.entropy(table, batch.completions).flatten(0, 2)
    loss = recipe.loss(
        Rows(
            logps=toy.logps(table, batch.completions).flatten(0, 2),
            old_logps=batch.old.flatten(0, 2),
            mask=mask.repeat(learners, 1),
            advantage=advantage,
            counts=Counts(rows=prompts * size, tokens=mask.sum(), max_length=mask.shape[1]),
            entropy=entropy,
            extras=extras or {},
        )
    )
    return torch.autograd.grad(loss.sum / loss.count, weights)[0]


def training(
    toy: Toy,
    recipe: Recipe,
    batches: int,
    *,
    lr: float,
    group: int = 8,
    passes: int = 1,
    stale: int = 0,
    adam: bool = False,
    strangers: bool = False,
) -> Iterator[Sampled]:
    """Trains from toy.start and yields each generation batch after its updates, with the weights they led to.

    passes: updates per batch, each on all of it. stale: batches are sampled by the weights of so many batches ago.
    adam: betas .9, .99; else plain gradient descent. strangers: ranks likelihoods that were shuffled within groups.
    """
    toy.draw.manual_seed(1)
    weights, past = toy.start, deque([toy.start], maxlen=stale + 1)
    first, second, count = torch.zeros_like(weights), torch.zeros_like(weights), 0
    for _ in range(batches):
        batch = sampled(toy, past[0], group, weights)
        ranked = None
        if strangers:
            order = torch.rand(batch.outcome.shape, generator=toy.draw).argsort(-1).unsqueeze(-1)
            ranked = batch.old.gather(2, order.expand_as(batch.old))
        given = credit(recipe, batch, ranked)
        for _ in range(passes):
            slope = gradient(recipe, batch, given.advantage, given.extras)
            if adam:
                count += 1
                first, second = 0.9 * first + 0.1 * slope, 0.99 * second + 0.01 * slope**2
                slope = first / (1 - 0.9**count) / ((second / (1 - 0.99**count)).sqrt() + 1e-8)
            batch.weights = batch.weights - lr * slope
        weights = batch.weights
        past.append(weights)
        batch.advantage = given.advantage.view(*batch.outcome.shape, *given.advantage.shape[1:])
        yield batch


# -- numbers -------------------------------------------------------------------------------------------------------------

Found = tuple[float, list[float]]  # a number and its 95 % interval
Panels = dict[str, dict[str, Any]]


def interval(values: Any) -> Found:
    """The mean of (N,) numbers, NaN left out, and its 95 % percentile bootstrap interval."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, [math.nan, math.nan]
    drawn = values[np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return short(values.mean()), [short(low), short(high)]


def exactly(value: float) -> Found:
    return short(value), [short(value)] * 2


def short(value: float) -> float:
    return float(f"{float(value):.4g}")


def below(found: Found, bound: float = 0.0) -> bool:
    return found[1][1] < bound


def above(found: Found, bound: float = 0.0) -> bool:
    return found[1][0] > bound


def graded(shows: bool, wholly: bool) -> bool | str:
    """True, "partly" if it shows but not wholly, False."""
    return shows and (wholly or "partly")


def entry(recipe: str, claim: str, measure: str, found: Found, holds: bool | str, note: str, **control: Any) -> dict:
    value, ci95 = found
    head = {"recipe": recipe, "claim": claim, "measure": measure, "value": value, "ci95": ci95}
    return head | {"control": _written(control), "holds": holds, "note": note}


def _written(control: Any) -> Any:
    """With every Found as {value, ci95}, and every other float short."""
    if isinstance(control, tuple):
        return {"value": control[0], "ci95": control[1]}
    if isinstance(control, dict):
        return {str(name): _written(value) for name, value in control.items()}
    if isinstance(control, list):
        return [_written(value) for value in control]
    return short(control) if isinstance(control, float | Tensor | np.floating) else control


def panel(x: Any, xlabel: str, ylabel: str, lines: dict[str, Any], log: bool = False) -> dict[str, Any]:
    """A small plot. lines: {name: (X, N) samples of the mean at each x, or (X,) exact numbers}; x of text is evenly spaced."""
    curves = {}
    for name, rows in lines.items():
        found = [exactly(row) if np.ndim(row) == 0 else interval(row) for row in rows]
        curves[name] = {
            "y": [y for y, _ in found],
            "low": [ci[0] for _, ci in found],
            "high": [ci[1] for _, ci in found],
        }
    return {"x": list(x), "xlabel": xlabel, "ylabel": ylabel, "log": log, "lines": curves}


def advantages(recipe: Recipe, rewards: Tensor, **fields: Any) -> Tensor:
    """(P, G): of rewards (P, G) or (P, G, K), weights 1, the first component being the outcome."""
    rewards = rewards if rewards.dim() == 3 else rewards.unsqueeze(-1)
    rows = rewards.shape[:2].numel()
    given = {"weights": torch.ones(rewards.shape[2]), "mask": torch.ones(rows, 1), "old_logps": torch.zeros(rows, 1)}
    return recipe.credit(Group(rewards, outcome=0, **{**given, **fields})).advantage.view(rewards.shape[:2])


def ladder(size: int) -> Tensor:
    """(size + 1, size): groups of 0 and 1 with 0, 1, ..., all right."""
    return torch.tril(torch.ones(size + 1, size), -1)


grpo = RECIPES["grpo"]

# -- baselines and scales ------------------------------------------------------------------------------------------------


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


# -- weights on advantages -----------------------------------------------------------------------------------------------


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


# -- ratios, clips and what is added -------------------------------------------------------------------------------------


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


# -- all of them ---------------------------------------------------------------------------------------------------------

MECHANISMS: list[Callable[[Budget, Panels], list[dict]]] = [
    median_against_outliers, virtual_rollout, combinations_apart, stale_data, rare_ones, falling_likelihood,
    normal_quantiles, asymmetry, mixed_variance, entropy_at_target, answer_entropy, indistinct, routes,
    hidden_rewards, anchored,
]  # fmt: skip


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--quick", action="store_true", help="few learners and updates: shows that it runs, no more")
    parse.add_argument("--output", type=Path, default=Path("results"))
    options = parse.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    panels: Panels = {}
    found = []
    for mechanism in MECHANISMS:
        began = time.monotonic()
        found += mechanism(QUICK if options.quick else Budget(), panels)
        print(f"{mechanism.__name__}: {time.monotonic() - began:.0f} s", flush=True)
    result = {"mechanisms": found, "panels": panels}
    command = f"python -P benchmarks/mechanisms.py{' --quick' if options.quick else ''}"
    folder = RunFolder(options.output)
    folder.write_json("mechanisms.json", {**result, "command": command, "git": git_revision()})
    folder.write_bytes("mechanisms.svg", draw(panels))
    show(found)


def draw(panels: Panels) -> bytes:
    """The figure: a small plot for each mechanism that has a curve; bands are the 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    across = 3
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(12.5, 3.1 * down), layout="constrained")
    cells = figure.subplots(down, across, squeeze=False).flat
    for axes, (title, one) in zip(cells, panels.items(), strict=False):
        named = isinstance(one["x"][0], str)
        x = range(len(one["x"])) if named else one["x"]
        for i, (name, line) in enumerate(one["lines"].items()):
            dash = "--" if name.startswith("grpo") else "-"
            axes.plot(x, line["y"], dash, color=f"C{i}", label=name, linewidth=1.5, marker="o", markersize=2.5)
            axes.fill_between(x, line["low"], line["high"], color=f"C{i}", alpha=0.18, linewidth=0)
        if one["log"]:
            axes.set_xscale("log", base=2)
        if one["log"] or named:
            axes.set_xticks(x, list(map(str, one["x"])))
            axes.minorticks_off()
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(one["xlabel"], fontsize=9)
        axes.set_ylabel(one["ylabel"], fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.margins(y=0.15)
        axes.legend(fontsize=7, frameon=False)
    for axes in list(cells):
        axes.set_axis_off()
    picture = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "mechanisms"}):
        figure.savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue()


def show(found: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "claim", "value", "95 %", "holds")
    for one in found:
        low, high = one["ci95"]
        numbers = f"{one['value']:g}", f"{low:g} .. {high:g}"
        table.add_row(one["recipe"], one["claim"], *numbers, str(one["holds"]).lower())
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
