"""A language task small enough to enumerate: learners whose probabilities, rewards and gradients are exact.

Each learner has its own problem, weights and samples; arms that are compared share problems. See `Toy`.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from core.objective.composition import Recipe
from core.objective.group import Credit, Group
from core.objective.rows import Counts, Rows


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
