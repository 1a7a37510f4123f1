"""Recipe: how the pieces of core.objective become one objective, and how several recipes become one.

Two moments. `credit` runs once per generation batch, on whole groups, without gradient:

    rewards (P, G, K) -> shape -> aggregate -> (P, G) -> advantage -> modulate -> (P, G) or (P, G, T), and keep
    annotate: what the loss must know of whole groups, a row for each rollout

`loss` runs per micro-batch, on rows: surrogate + regularize + penalty -> (B, T) -> reduce -> (sum, count).

A slot is a function of this package, or a `functools.partial` of one. Its keyword-only arguments *are* the recipe's
options: their names, defaults and annotations are all that config keys, printing and checking need, so nothing is
declared twice.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from core.objective.advantage import group_advantages, keep_groups, no_spread, whole_group
from core.objective.aggregation import unshaped, weighted_sum
from core.objective.group import Credit, Group
from core.objective.modulation import nothing, unmodulated
from core.objective.reduction import add_row_mean, reduce_loss
from core.objective.regularizer import closed_form_kl, kl_and_entropy, unpenalized
from core.objective.rows import Loss, Rows
from core.objective.surrogate import clipped_token_ratio

SLOTS = (
    "shape", "aggregate", "advantage", "filter", "modulate", "annotate",
    "surrogate", "regularize", "penalty", "reduce", "loss_fn",
)  # fmt: skip
LOSS_SLOTS = ("surrogate", "regularize", "penalty", "reduce")  # what a loss_fn replaces
# What a trainer must provide, or refuse in these words.
NEEDS = {
    "whole_rollouts": "whole rollouts: no micro-batch may hold a part of one",
    "whole_batch": "the groups of all ranks at once",
    "extra_rollout": "one rollout more than are trained on",
    "old_logps": "log-probabilities of the policy that sampled, before the advantage",
    "several_updates": "several updates per generation batch, without which it changes nothing or little",
    "tempered_logps": "log-probabilities at another temperature",
    "influence": "last hidden states, and what the output layer makes of them",
    "teacher": "a teacher: averaged weights that see a right rollout beside the prompt",
    "task": "which task a prompt belongs to",
    "aligned": "a reward per decision of an aligned policy (flow, forecast)",
    "drift": "how far each step's mean has moved since it was sampled, its noise and its length (flow)",
    "renoised": "final samples that are noised again, and velocities there (flow)",
    "whole_groups": "whole groups: no micro-batch may hold a part of one",
    "divergence": "the KL to a reference policy in closed form, because beta is above 0 (flow, forecast)",
    "ref_logps": "log-probabilities of a reference policy, because beta is above 0",
    "entropy": "entropies with gradient, because entropy_coef is above 0",
}
ASKED = ("tempered_logps", "influence", "teacher")  # what Group.model answers
_TRAJECTORY = frozenset(NEEDS) - {*ASKED, "ref_logps", "entropy"}
# What each kind of policy can give, with its trainer. Only a language model has what is ASKED: logits, and a prompt that can
# be added to.
GIVES = {
    "language": frozenset(NEEDS) - {"aligned", "drift", "renoised", "whole_groups", "divergence"},
    "flow": _TRAJECTORY,
    "forecast": (_TRAJECTORY | {"entropy"}) - {"drift", "renoised"},
}
# {slot: {option: what the slot needs while that option is not 0}}
BECAUSE = {
    kl_and_entropy: {"beta": "ref_logps", "entropy_coef": "entropy"},
    closed_form_kl: {"beta": "divergence"},
}
COMPONENTS = ("gate", "quality", "answers")  # options that name a reward component
# Closed intervals outside of which an option has no meaning, whichever slot it belongs to.
RANGES = {
    "epsilon_low": (0, 1), "epsilon_high": (0, math.inf), "delta": (1, math.inf), "beta": (0, math.inf),
    "entropy_coef": (0, math.inf), "eps": (0, math.inf), "tau": (1e-6, math.inf), "temperature": (1e-6, math.inf),
    "sequence_epsilon_low": (0, 1), "sequence_epsilon_high": (0, math.inf), "penalty": (0, math.inf),
    "ring_low": (0, 1), "ring_high": (0, math.inf), "mad_floor": (0, math.inf), "virtual": (1, math.inf),
    "rank_weight": (0, 1), "gamma": (0, 1), "alpha": (1e-6, 1), "least_progress": (0, 1), "exploit": (-1, 1),
    "hot": (1, math.inf), "cold": (1e-6, 1), "most": (0, math.inf), "resolution": (0, math.inf), "anchored": (0, math.inf),
    "limit": (1e-6, math.inf), "band_coef": (0, math.inf), "sharpness": (0, math.inf), "anchor": (0, math.inf),
    "cap": (0, math.inf), "focus": (0, math.inf), "tau_scale": (0, math.inf), "threshold": (0, math.inf),
    "z_weight": (0, 1), "std": (1e-6, math.inf),
    "entropy_low": (0, math.inf), "entropy_high": (0, math.inf), "mix": (1e-6, math.inf), "anchor_coef": (0, math.inf),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A named composition; every slot not given is plain GRPO's.

    grade: how well the formulas are known. a = read in the authors' or TRL's code, b = read in the text, b* = through third
    parties, c = derived. equation: what it changes.
    shape(rewards, group) and aggregate(rewards, group): (P, G, K[, T]) -> the same; -> (P, G[, T]).
    advantage(reward, group) and modulate(advantage, group): -> (P, G) or (P, G, T), alone or with keep (P, G) bool.
    filter(group) -> keep (P, G) or (P, 1) bool.
    annotate(group, advantage, keep) -> dict of per-row extras (B, ...) for the loss.
    surrogate(rows) -> (B, T) or (B, 1), metrics. regularize(rows) -> the same, or None, metrics.
    penalty(rows) -> (B, T), (B,) or None, metrics (core/objective/regularizer.py). reduce(per_decision, rows) -> Loss.
    loss_fn(rows) -> Loss replaces these four.
    needs: names of NEEDS, which a trainer must provide or refuse; see also `all_needs`.

    `recipe(epsilon_high=0.3)` is the same recipe with other options.
    """

    name: str
    source: str
    grade: str
    summary: str
    equation: str = ""
    shape: Callable = unshaped
    aggregate: Callable = weighted_sum
    advantage: Callable = group_advantages
    filter: Callable = keep_groups
    modulate: Callable = unmodulated
    annotate: Callable = nothing
    surrogate: Callable = clipped_token_ratio
    regularize: Callable = kl_and_entropy
    penalty: Callable = unpenalized
    reduce: Callable = reduce_loss
    needs: frozenset[str] = frozenset()
    loss_fn: Callable | None = None

    @torch.no_grad()
    def credit(self, group: Group) -> Credit:
        """The advantage of every row; 0, and keep 0, for unscored rollouts and for those a slot dropped.

        Raises ValueError if the group lacks what the recipe needs.
        """
        for need, field in (("old_logps", "old_logps"), *((need, "model") for need in ASKED)):
            if need in self.needs and getattr(group, field) is None:
                raise ValueError(f"recipe {self.name} needs {NEEDS[need]}, and the group has no {field}")
        reward = self.aggregate(self.shape(group.rewards, group), group)
        advantage, keep = _with_keep(self.advantage(reward, group))
        advantage, kept = _with_keep(self.modulate(advantage, group))
        keep = group.scored & keep & kept & self.filter(group)
        if advantage.shape[:2] != keep.shape or advantage.dim() > 3:
            raise ValueError(
                f"{self.name} gave advantages of shape {tuple(advantage.shape)} for {tuple(keep.shape)} rollouts"
            )
        dropped = ~keep.view(*keep.shape, *[1] * (advantage.dim() - 2))
        advantage = advantage.masked_fill(dropped | advantage.isnan(), 0.0)
        if advantage.isinf().any():
            raise ValueError(f"recipe {self.name} gave an infinite advantage; bound the rewards or soften its options")
        return Credit(
            advantage=advantage.flatten(0, 1),
            keep=keep.flatten().to(advantage.dtype),
            extras=self.annotate(group, advantage, keep),
            metrics=_credit_metrics(group, advantage, keep),
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
        penalty, also = self.penalty(rows)
        per_row = penalty is not None and penalty.dim() == 1
        loss = self.reduce(per_decision if penalty is None or per_row else per_decision + penalty, rows)
        if per_row:
            loss = add_row_mean(loss, penalty, rows)
        more = more | also
        if rows.entropy is not None:
            more = more | {"entropy": rows.masked_mean(rows.entropy)}
        return replace(loss, metrics=loss.metrics | metrics | more)

    @property
    def slots(self) -> tuple[str, ...]:
        """The slots that are used: those of the loss, or loss_fn."""
        unused = LOSS_SLOTS if self.loss_fn else ("loss_fn",)
        return tuple(slot for slot in SLOTS if slot not in unused)

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
        for slot in self.slots:
            for name, value in _options(getattr(self, slot)).items():
                found.setdefault(name, value)
        return found

    def __call__(self, **options: Any) -> Recipe:
        """This recipe with other options. Raises ValueError for an option it does not have or a value it refuses."""
        known, changed = self.options, {}
        for name, value in options.items():
            if name not in known:
                raise ValueError(unknown(f"option of recipe {self.name}", name, known))
            for slot in self.slots:
                current = changed.get(slot, getattr(self, slot))
                if name in _options(current):
                    changed[slot] = partial(current, **{name: _checked(self.name, name, value, current)})
        return replace(self, **changed)

    @property
    def all_needs(self) -> frozenset[str]:
        """`needs`, and what its options ask for: a KL wants a reference only while its weight is not 0."""
        slots = (getattr(self, slot) for slot in self.slots)
        asked = {slot: BECAUSE.get(_function(slot), {}) for slot in slots}
        return self.needs | {
            need for slot, options in asked.items() for option, need in options.items() if _options(slot)[option]
        }

    @property
    def extra_rollouts(self) -> int:
        """Rollouts to sample beside each group, which are not trained on."""
        return int("extra_rollout" in self.needs)

    def refuse(self, provides: Collection[str], components: Collection[str], who: str) -> None:
        """Raise ValueError if the recipe needs what `who` does not provide, or names a component that is not there."""
        if missing := [NEEDS[need] for need in NEEDS if need in self.all_needs - set(provides)]:
            raise ValueError(f"recipe {self.name} needs {'; and '.join(missing)}: {who} cannot give that")
        for option in COMPONENTS:
            if (name := self.options.get(option, None)) is not None and name not in components:
                raise ValueError(unknown(f"reward component in {option}= of recipe {self.name}", name, components))

    def rehearse(self, weights: Mapping[str, float], outcome: str) -> None:
        """Gives credit to a made-up group with these components, so that options at odds are refused before work starts.

        Raises ValueError as `credit` does.
        """
        size, aligned = 2 + self.extra_rollouts, "aligned" in self.needs
        self.credit(
            Group(
                rewards=torch.zeros(1, size, len(weights), *[1] * aligned),
                aligned=aligned,
                weights=torch.tensor(list(weights.values())),
                mask=torch.ones(size, 1),
                segments=torch.zeros(size, 1, dtype=torch.long),
                old_logps=torch.zeros(size, 1),
                names=tuple(weights),
                outcome=list(weights).index(outcome),
                model=_Silent(torch.zeros(size, 1)),
            )
        )


class _Silent:
    """A model for rehearsals: zeros, whatever it is asked."""

    def __init__(self, zeros: Tensor):
        self.tempered_logps = lambda temperature: zeros
        self.influence = lambda right: (zeros, zeros)
        self.teach = lambda taught, right: zeros


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
            for name, mark in (("name", "+"), ("source", "; "), ("grade", "/"), ("summary", "; "), ("equation", ";  "))
        }
        combined = replace(combined, **texts, **slots, needs=combined.needs | added.needs)
    return combined


def _with_keep(result: Any) -> tuple[Tensor, Tensor]:
    """A slot's advantage with its keep, all True if it gave none."""
    if isinstance(result, tuple):
        return result
    return result, result.new_ones(result.shape[:2], dtype=torch.bool)


def _credit_metrics(group: Group, advantage: Tensor, keep: Tensor) -> dict[str, float]:
    """The metrics of `Credit`: how much of the batch can teach. advantage: (P, G) or (P, G, T); keep: (P, G) bool."""
    kept = advantage[keep]
    if kept.dim() == 2 and group.mask is not None:
        kept = kept[group.mask.view(*keep.shape, -1)[keep].bool()]
    shares = {
        "zero_spread": whole_group(no_spread(weighted_sum(group.rewards, group))).float().mean(),
        "unscored": 1 - group.scored.float().mean(),
        "dropped": 1 - keep.float().mean(),
        "advantage_std": kept.std(correction=0) if kept.numel() else kept.sum(),
    }
    if group.outcome is not None:
        shares["zero_spread_outcome"] = whole_group(no_spread(group.rewards[:, :, group.outcome])).float().mean()
    return dict(zip(shares, torch.stack([value.float() for value in shares.values()]).tolist(), strict=True))


def _function(slot: Callable) -> Callable:
    """What a slot is a partial of."""
    while isinstance(slot, partial):
        slot = slot.func
    return slot


def _options(slot: Callable) -> dict[str, Any]:
    """Names and values of a slot's keyword-only arguments."""
    parameters = inspect.signature(slot).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _checked(recipe: str, name: str, value: Any, slot: Callable) -> Any:
    """The value as the slot's annotation wants it. Raises ValueError saying what would do."""
    hint = get_type_hints(_function(slot))[name]
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
            low, high = RANGES.get(name, (-math.inf, math.inf)) if kind is int else (0, 0)
            if kind is not int or low <= value <= high:
                return value
            raise ValueError(f"{name}={value} in recipe {recipe} is outside [{low:g}, {high:g}]")
    wanted = " or ".join("null" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise ValueError(f"{name}={value!r} in recipe {recipe} is not {wanted}")


def unknown(what: str, got: Any, known: Any) -> str:
    """One sentence for a name that is not known, with the nearest one that is."""
    names = [str(name) for name in known]
    near = get_close_matches(str(got), names, n=1)
    return f"unknown {what}: {got!r}{f'; did you mean {near[0]!r}?' if near else ''} (known: {', '.join(names)})"
