"""Forecasts in and out: the array that a policy or a baseline gives, and how each part of it is read.

A forecast is (L, V, Y, X): leads, variables, rows from south to north, columns. Either plain floating concentrations in
ug m-3 (what a rollout samples; the class of each cell follows from the edges), or structured, see `dtype`:

    value    expected concentration (bias, RMSE)
    level    the class that is announced (costs, contingency); a decision, which need not be the class of `value`
    exceed   (E,) probability that the concentration is at or above each edge
    members  (8,) equally likely concentrations, ascending: quantiles at (i + 1/2) / 8 (CRPS)

`edges` below are those of each variable, (V, E), as Scheme.of gives them. What is no forecast is a bad completion with a
reason code. Not covered: units. A field in kg m-3 is a forecast of very clean air.
"""

from collections.abc import Sequence

import numpy as np

from rewards.forecast.schemes import classes

MEMBERS = 8
HALF_MAX = float(np.finfo(np.float16).max)

Edges = Sequence[Sequence[float]]


def dtype(edges: int) -> np.dtype:
    """Of a structured forecast of edges + 1 classes."""
    return np.dtype([("value", "f4"), ("level", "i1"), ("exceed", "f2", (edges,)), ("members", "f2", (MEMBERS,))])


def values(completion: np.ndarray) -> np.ndarray:
    """float32 (..., V, Y, X): expected concentrations."""
    return (completion["value"] if completion.dtype.names else completion).astype(np.float32, copy=False)


def levels(completion: np.ndarray, edges: Edges) -> np.ndarray:
    """int8 (..., V, Y, X): the classes announced."""
    if completion.dtype.names:
        return completion["level"]
    return classes(values(completion), np.asarray(edges)[:, None, None, :])


def exceedance(completion: np.ndarray, edges: Edges) -> np.ndarray:
    """float32 (..., V, Y, X, E): probability of each edge to be reached; 0 or 1 of a plain forecast."""
    if completion.dtype.names:
        return completion["exceed"].astype(np.float32)
    bounds = np.asarray(edges, dtype=np.float32)[:, None, None, :]
    return (values(completion)[..., None] >= bounds).astype(np.float32)


def members(completion: np.ndarray) -> np.ndarray:
    """float32 (..., V, Y, X, M), ascending: 8 members, or the one of a plain forecast."""
    if completion.dtype.names:
        return completion["members"].astype(np.float32)
    return values(completion)[..., None]


def deterministic(value: np.ndarray, level: np.ndarray, edges: Edges) -> np.ndarray:
    """Structured forecast of the shape of `value` that is sure of itself: members all `value`, edges up to `level` exceeded."""
    count = np.shape(edges)[-1]
    made = np.empty(np.shape(value), dtype=dtype(count))
    made["value"], made["level"] = value, level
    made["exceed"] = np.asarray(level)[..., None] > np.arange(count)
    made["members"] = np.minimum(value, HALF_MAX)[..., None]
    return made


def form_fault(completion: object, shape: tuple[int, ...], edges: Edges) -> tuple[str, str] | None:
    """(reason, detail) of what is no forecast of up to shape[0] leads of (L, V, Y, X); else None.

    Reasons: not_a_field (no array), wrong_dtype, wrong_shape.
    """
    if not isinstance(completion, np.ndarray):
        return "not_a_field", f"a {type(completion).__name__}; it must be a numpy array (leads, variables, y, x)"
    structured = dtype(np.shape(edges)[-1])
    if not (np.issubdtype(completion.dtype, np.floating) or completion.dtype == structured):
        return "wrong_dtype", f"{completion.dtype}; it must be floating or {structured}"
    if completion.shape[1:] != shape[1:] or not 1 <= len(completion) <= shape[0]:
        return "wrong_shape", f"{completion.shape}; it must be {shape}, or with fewer leads"
    return None


def content_faults(stack: np.ndarray, edges: Edges, part: str = "value") -> list[tuple[str, str] | None]:
    """(reason, detail) of each of n forecasts (n, L, V, Y, X) whose part (a field of `dtype`) holds what cannot be, else None.

    A plain forecast has one part, its concentrations. Reasons: not_finite, negative, bad_level (beyond 0..E), bad_probability
    (above 1), bad_members (not ascending).
    """
    found: list[tuple[str, str] | None] = [None] * len(stack)

    def refuse(wrong: np.ndarray, reason: str, detail: str) -> None:
        for i in np.flatnonzero(wrong):
            found[i] = found[i] or (reason, detail)

    read = stack[part] if stack.dtype.names else stack
    flat = read.reshape(len(stack), -1)
    low, high = flat.min(axis=1), flat.max(axis=1)  # of an array with NaN both are NaN
    if stack.dtype.names and part == "level":
        top = np.shape(edges)[-1]
        refuse((low < 0) | (high > top), "bad_level", f"classes beyond 0..{top}")
        return found
    refuse(~(np.isfinite(low) & np.isfinite(high)), "not_finite", "NaN or infinite values; forecast every cell")
    refuse(low < 0, "negative", "values below 0; the lowest there is is 0")
    if stack.dtype.names and part == "exceed":
        refuse(high > 1, "bad_probability", "probabilities above 1")
    if stack.dtype.names and part == "members":
        descend = (read[..., 1:] < read[..., :-1]).reshape(len(stack), -1).any(axis=1)
        refuse(descend, "bad_members", "members that do not ascend")
    return found
