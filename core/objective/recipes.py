"""The GRPO family, side by side. Each recipe names only what it changes; the rest is plain GRPO, the first entry.

`dapo(epsilon_high=0.3)` is a recipe with another option, `dapo.options` are all it has, `build` makes one from a config
section. A new method is a new entry here; a new piece is a function in the module of its slot. Grades: see `Recipe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from core.objective.advantage import decoupled_sum, group_advantages
from core.objective.composition import Recipe, combine, unknown
from core.objective.reduction import reduce_loss
from core.objective.surrogate import capped_token_ratio, clipped_sequence_ratio, clipped_token_ratio

grpo = Recipe(
    "grpo",
    source="arXiv 2402.03300; TRL loss_type=grpo",
    grade="a",
    summary="reward minus the group's mean, over its standard deviation; clipped token ratio; mean per rollout",
)

dr_grpo = Recipe(
    "dr_grpo",
    source="arXiv 2503.20783; TRL loss_type=dr_grpo, scale_rewards=none",
    grade="a",
    summary="divides neither by spread nor by length, which favour very easy or hard prompts and long wrong answers",
    advantage=partial(group_advantages, scale="none"),
    reduce=partial(reduce_loss, reduction="fixed_length"),
)

dapo = Recipe(
    "dapo",
    source="arXiv 2503.14476; TRL loss_type=dapo, epsilon_high=0.28",
    grade="a",
    summary="a higher upper clip, so that rare tokens can grow; every token weighs the same; see also filter=outcome",
    surrogate=partial(clipped_token_ratio, epsilon_high=0.28),
    reduce=partial(reduce_loss, reduction="token_mean"),
)

bnpo = Recipe(
    "bnpo",
    source="TRL loss_type=bnpo (not the Beta normalisation of the same letters)",
    grade="a",
    summary="token mean within each micro-batch",
    reduce=partial(reduce_loss, reduction="token_mean_local"),
)

gspo = Recipe(
    "gspo",
    source="arXiv 2507.18071; TRL importance_sampling_level=sequence",
    grade="a",
    summary="one ratio per rollout, the geometric mean of its tokens', with a very narrow clip",
    surrogate=partial(clipped_sequence_ratio, epsilon_low=3e-4, epsilon_high=4e-4),
    needs=frozenset({"whole_rollouts"}),
)

cispo = Recipe(
    "cispo",
    source="arXiv 2506.13585, cap 5 of 2510.13786; TRL loss_type=cispo",
    grade="a",
    summary="caps the importance weight instead of the objective: no token loses its gradient",
    surrogate=capped_token_ratio,
    reduce=partial(reduce_loss, reduction="token_mean"),
)

rloo = Recipe(
    "rloo",
    source="arXiv 2402.14740; TRL RLOOTrainer (there with one ratio per rollout: the same gradient at ratio 1)",
    grade="a",
    summary="baseline from the other rollouts alone, no scale; log-probabilities summed over the rollout",
    advantage=partial(group_advantages, baseline="leave_one_out", scale="none"),
    reduce=partial(reduce_loss, reduction="fixed_length"),
)

gdpo = Recipe(
    "gdpo",
    source="arXiv 2601.05242; TRL multi_objective_aggregation=normalize_then_sum",
    grade="a",
    summary="each component is normalised in its group before the sum, then the whole batch: none drowns another",
    aggregate=decoupled_sum,
    advantage=partial(group_advantages, baseline="batch", scale="batch"),
)

RECIPES = {recipe.name: recipe for recipe in (grpo, dr_grpo, dapo, bnpo, gspo, cispo, rloo, gdpo)}


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
