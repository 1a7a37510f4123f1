"""What an entry of results/mechanisms.json is made of: numbers with intervals, verdicts, small plots; and how much is sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.objective.composition import Recipe
from core.objective.group import Group
from core.objective.recipes import RECIPES

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
