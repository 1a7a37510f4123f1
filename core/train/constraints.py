"""Component weights that follow metrics of the validation rows: a floor or a ceiling held by a PI controller.

At each validation the violation e = at_least - value, or value - at_most, moves a component's multiplier:

    I <- clip(I + e, 0, cap / ki)        weight = configured weight + clip(kp * e + ki * I, 0, cap)

The Lagrangian of "best reward, such that the metric holds", its multiplier by dual ascent (ki) with a proportional term, which
damps the swings of the integral one (kp). The multiplier is added: 0 while the metric holds leaves the reward as configured.
The component must reward what the metric asks for (hits for a floor of the detection rate, no false alarms for a ceiling of
their rate); nothing here can know.

Source: arXiv 2007.03964 (Stooke et al.), algorithm of the PID Lagrangian without its derivative term, integral kept at or above
0; its form as known from the literature, not read in its code (b*). The cap of the integral, so that it does not go on growing
while the multiplier is at its cap, and validations without a value, which change nothing, are ours (c).

Nothing is remembered but what was logged: a resumed run replays its validations and has the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from core.config import Constraint


def violation(constraint: Constraint, value: float) -> float:
    """How far a metric is on the wrong side of its limit, in the metric's unit; negative where the constraint holds."""
    return constraint.at_least - value if constraint.at_least is not None else value - constraint.at_most


def constrained(
    weights: Mapping[str, float], constraints: Mapping[str, Constraint], validations: Iterable[Mapping[str, float]]
) -> tuple[dict[str, float], dict[str, float]]:
    """The weights of all components after these validations, and what to log of them.

    weights: as configured, one for each component. constraints: {component: constraint}. validations: of the run so far, oldest
    first, each {"eval/<metric>": value, ...} as logged; a metric that is missing or NaN moves nothing.
    Returns {component: weight} and {"constraint/<component>/weight", "constraint/<component>/violation"}, the violation as of
    the latest validation with a value; before there is one, weights are as configured and there is no violation to log.
    """
    now, logged, validations = dict(weights), {}, list(validations)
    for component, constraint in constraints.items():
        values = (line.get(f"eval/{constraint.metric}", math.nan) for line in validations)
        multiplier, integral, error = 0.0, 0.0, None
        for value in values:
            if not math.isnan(value):
                error = violation(constraint, value)
                most = constraint.cap / constraint.ki if constraint.ki else math.inf
                integral = min(max(integral + error, 0.0), most)
                multiplier = min(max(constraint.kp * error + constraint.ki * integral, 0.0), constraint.cap)
        now[component] += multiplier
        logged[f"constraint/{component}/weight"] = now[component]
        if error is not None:
            logged[f"constraint/{component}/violation"] = error
    return now, logged
