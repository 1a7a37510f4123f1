"""Recipe: how the pieces of core.objective become one objective, and how several recipes become one.

Two moments. `credit` runs once per generation batch, on whole groups, without gradient:

    rewards (P, G, K) -> shape -> aggregate -> (P, G) -> advantage -> modulate -> (P, G) or (P, G, T), and keep

`loss` runs per micro-batch, on rows: surrogate + regularize -> (B, T) -> reduce -> (sum, count).

A slot is a function of this package, or a `functools.partial` of one. Its keyword-only arguments *are* the recipe's
options: their names, defaults and annotations are all that config keys, printing and checking need, so nothing is
declared twice.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from core.objective.advantage import credit_metrics, group_advantages, keep_groups, weighted_sum
from core.objective.group import Credit, Group
from core.objective.reduction import reduce_loss
from core.objective.regularizer import kl_and_entropy
from core.objective.rows import Loss, Rows
from core.objective.surrogate import clipped_token_ratio

SLOTS = ("shape", "aggregate", "advantage", "filter", "modulate", "surrogate", "regularize", "reduce", "loss_fn")
LOSS_SLOTS = ("surrogate", "regularize", "reduce")  # what a loss_fn replaces
# Closed intervals outside of which an option has no meaning, whichever slot it belongs to.
RANGES = {
    "epsilon_low": (0, 1), "epsilon_high": (0, math.inf), "delta": (1, math.inf), "beta": (0, math.inf),
    "entropy_coef": (0, math.inf), "eps": (0, math.inf),
}  # fmt: skip


def unshaped(rewards: Tensor, group: Group) -> Tensor:
    """Rewards as they are."""
    return rewards


def unmodulated(advantage: Tensor, group: Group) -> Tensor:
    """Advantages as they are."""
    return advantage


@dataclass(frozen=True)
class Recipe:
    """A named composition; every slot not given is plain GRPO's.

    grade: how well the formulas are known. a = read in the authors' or TRL's code, b = read in the text, c = derived.
    shape(rewards, group) and aggregate(rewards, group): (P, G, K[, T]) -> the same; -> (P, G[, T]).
    advantage(reward, group) and modulate(advantage, group): -> (P, G) or (P, G, T), alone or followed by keep (P, G)
    bool and by a dict of per-row extras (B, ...) for the loss.
    filter(group) -> keep (P, G) or (P, 1) bool.
    surrogate(rows) -> (B, T) or (B, 1), metrics. regularize(rows) -> the same, or None, metrics.
    reduce(per_decision, rows) -> Loss. loss_fn(rows) -> Loss replaces these three.
    needs: what a trainer must provide or refuse, by name (`whole_rollouts`: no micro-batch holds a part of a rollout).

    `recipe(epsilon_high=0.3)` is the same recipe with other options.
    """

    name: str
    source: str
    grade: str
    summary: str
    shape: Callable = unshaped
    aggregate: Callable = weighted_sum
    advantage: Callable = group_advantages
    filter: Callable = keep_groups
    modulate: Callable = unmodulated
    surrogate: Callable = clipped_token_ratio
    regularize: Callable = kl_and_entropy
    reduce: Callable = reduce_loss
    needs: frozenset[str] = frozenset()
    loss_fn: Callable | None = None

    @torch.no_grad()
    def credit(self, group: Group) -> Credit:
        """The advantage of every row; 0, and keep 0, for unscored rollouts and for those a slot dropped."""
        reward = self.aggregate(self.shape(group.rewards, group), group)
        advantage, keep, extras = _parts(self.advantage(reward, group))
        advantage, kept, more = _parts(self.modulate(advantage, group))
        keep = group.scored & keep & kept & self.filter(group)
        if advantage.shape[:2] != keep.shape or advantage.dim() > 3:
            raise ValueError(
                f"{self.name} gave advantages of shape {tuple(advantage.shape)} for {tuple(keep.shape)} rollouts"
            )
        dropped = ~keep.view(*keep.shape, *[1] * (advantage.dim() - 2))
        advantage = torch.nan_to_num(advantage, nan=0.0).masked_fill(dropped, 0.0)
        return Credit(
            advantage=advantage.flatten(0, 1),
            keep=keep.flatten().to(advantage.dtype),
            extras=extras | more,
            metrics=credit_metrics(group, advantage, keep),
        )

    def loss(self, rows: Rows) -> Loss:
        """The loss of a micro-batch, before division; `rows.weight` multiplies the surrogate alone."""
        rows = rows.settled()
        if self.loss_fn is not None:
            return self.loss_fn(rows)
        term, more = self.regularize(rows)  # first, as in TRL: gradients add up in this order, to the last bit
        per_decision, metrics = self.surrogate(rows)
        if rows.weight is not None:
            per_decision = per_decision * rows.weight
        if term is not None:
            per_decision = per_decision + term
        loss = self.reduce(per_decision, rows)
        if rows.entropy is not None:
            more = more | {"entropy": rows.masked_mean(rows.entropy)}
        return replace(loss, metrics=loss.metrics | metrics | more)

    @property
    def sets(self) -> tuple[str, ...]:
        """The slots in which this recipe is not plain GRPO."""
        plain = {field.name: field.default for field in fields(self)}
        changed = [slot for slot in SLOTS if getattr(self, slot) is not plain[slot]]
        return tuple(dict.fromkeys(changed + list(LOSS_SLOTS))) if self.loss_fn else tuple(changed)

    @property
    def options(self) -> dict[str, Any]:
        """Every option with its value. One that several slots share (eps of two scales) stands once and sets all."""
        found: dict[str, Any] = {}
        for slot in self._slots():
            for name, value in _options(getattr(self, slot)).items():
                found.setdefault(name, value)
        return found

    def __call__(self, **options: Any) -> Recipe:
        """This recipe with other options. Raises ValueError for an option it does not have or a value it refuses."""
        known, changed = self.options, {}
        for name, value in options.items():
            if name not in known:
                raise ValueError(unknown(f"option of recipe {self.name}", name, known))
            for slot in self._slots():
                current = changed.get(slot, getattr(self, slot))
                if name in _options(current):
                    changed[slot] = partial(current, **{name: _checked(self.name, name, value, current)})
        return replace(self, **changed)

    def _slots(self) -> list[str]:
        unused = LOSS_SLOTS if self.loss_fn else ("loss_fn",)
        return [slot for slot in SLOTS if slot not in unused]


def combine(recipes: Sequence[Recipe]) -> Recipe:
    """One recipe that takes each slot from the one recipe that sets it, and from plain GRPO if none does.

    Raises ValueError naming the slot and both recipes if two set the same one.
    """
    combined = recipes[0]
    for i, added in enumerate(recipes[1:], start=1):
        for earlier in recipes[:i]:
            if clash := [slot for slot in earlier.sets if slot in added.sets]:
                raise ValueError(
                    f"recipes {earlier.name} and {added.name} both set {', '.join(clash)}; keep one of the two"
                    " and reach the other's effect through options"
                )
        slots = {slot: getattr(added, slot) for slot in added.sets if slot not in LOSS_SLOTS or not added.loss_fn}
        texts = {
            name: mark.join(dict.fromkeys([getattr(combined, name), getattr(added, name)]))
            for name, mark in (("name", "+"), ("source", "; "), ("grade", "/"), ("summary", "; "))
        }
        combined = replace(combined, **texts, **slots, needs=combined.needs | added.needs)
    return combined


def _parts(result: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A slot's (advantage[, keep[, extras]]) with what it left out filled in."""
    advantage, *rest = result if isinstance(result, tuple) else (result,)
    keep = rest[0] if rest else advantage.new_ones(advantage.shape[:2], dtype=torch.bool)
    return advantage, keep, rest[1] if len(rest) > 1 else {}


def _options(slot: Callable) -> dict[str, Any]:
    """Names and values of a slot's keyword-only arguments."""
    parameters = inspect.signature(slot).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _checked(recipe: str, name: str, value: Any, slot: Callable) -> Any:
    """The value as the slot's annotation wants it. Raises ValueError saying what would do."""
    while isinstance(slot, partial):
        slot = slot.func
    hint = get_type_hints(slot)[name]
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for kind in kinds:
        if kind is type(None) and value is None:
            return None
        if get_origin(kind) is Literal:
            if any(type(value) is type(choice) and value == choice for choice in get_args(kind)):
                return value
            raise ValueError(unknown(f"value of {name} in recipe {recipe}", value, get_args(kind)))
        if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                number = float(value)  # YAML reads 1e-4 as text
            except ValueError:
                continue
            low, high = RANGES.get(name, (-math.inf, math.inf))
            if low <= number <= high:
                return number
            raise ValueError(f"{name}={value} in recipe {recipe} is outside [{low:g}, {high:g}]")
        if kind in (bool, int, str) and type(value) is kind:
            return value
    wanted = " or ".join("null" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise ValueError(f"{name}={value!r} in recipe {recipe} is not {wanted}")


def unknown(what: str, got: Any, known: Any) -> str:
    """One sentence for a name that is not known, with the nearest one that is."""
    names = [str(name) for name in known]
    near = get_close_matches(str(got), names, n=1)
    return f"unknown {what}: {got!r}{f'; did you mean {near[0]!r}?' if near else ''} (known: {', '.join(names)})"
