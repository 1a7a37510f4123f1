"""How the SQL components are weighed, and when partial credit can never beat being right.

REASONING_SQL: 3 R_exec + 2 (1 - R_exec) R_judge + R_syntax + R_schema + R_ngram + R_format with the judge's slot filled
by its deterministic form. Weights: Reasoning-SQL style (arXiv 2503.23157), from two independent re-implementations, no
code by the authors. With them a wrong query can earn 6 and a correct one as little as 3: it is the published recipe,
not a safe one. ORDERED: the same idea with the outcome worth more than everything else together, so that every correct
completion outscores every wrong one whatever the other components say.

The order holds for the weighted sum, hence for every advantage that shifts a group by one number and divides it by one
positive number (mean or leave-one-out baseline, scale by group or batch standard deviation or none): for leave-one-out,
r - mean of the others = G/(G-1) (r - mean). It does not survive a decoupled normalisation (gdpo: each component is
scaled by its own spread first, so a component with little spread weighs as much as the outcome), rank or z-score per
component, or a negative clip of the total. Components that do not apply (None) count as 0 here, which the bound covers.
"""

from collections.abc import Mapping

REASONING_SQL = {
    "execution_match": 3.0,
    "structure_match_if_wrong": 2.0,
    "executes": 1.0,
    "schema_overlap": 1.0,
    "ngram_overlap": 1.0,
    "format_ok": 1.0,
}
ORDERED = {
    "execution_match": 3.0,
    "structure_match": 0.5,
    "executes": 0.5,
    "schema_overlap": 0.5,
    "ngram_overlap": 0.5,
    "format_ok": 0.5,
}


def is_ordered(weights: Mapping[str, float], outcome: str) -> bool:
    """Whether weights[outcome] exceeds the sum of all other weights (absolute): for components in [0, 1] and an outcome
    that is 0 or 1, the condition under which no wrong completion can equal or outscore a correct one."""
    return weights[outcome] > sum(abs(weight) for name, weight in weights.items() if name != outcome)
