"""Forecasts that must score low: no forecasts at all, constant ones, and the truth in the wrong place, time or unit.

`gold` is the forecast that no reward can fault. A canary of alerts says nothing of a row where its component does not apply
(no alert observed). What costs nothing in some row because the air was clean all the time (an old field, the map upside down)
gives way there to the forecast that is wrong everywhere.
"""

from collections.abc import Callable, Mapping

import numpy as np

from rewards.canaries import Canary
from rewards.forecast.costs import cost_matrix
from rewards.forecast.schemes import classes, scheme_named

TOP = 1000.0  # ug m-3


def gold(row: Mapping) -> np.ndarray:
    """float32 (L, V, Y, X): what was observed; elsewhere the mean of what was observed of that variable at that lead, or 0."""
    observed = np.array(row["window"].observed(), dtype=np.float32)
    known = ~np.isnan(observed)
    cases = np.maximum(known.sum((2, 3), keepdims=True), 1)
    return np.where(known, observed, np.where(known, observed, 0).sum((2, 3), keepdims=True) / cases).astype(np.float32)


def opposite(row: Mapping) -> np.ndarray:
    """1000 ug m-3 where there is no alert, 0 where there is one."""
    return np.where(gold(row) >= _alert_edges(row), 0, TOP).astype(np.float32)


def _alert_edges(row: Mapping) -> np.ndarray:
    """float32 (V, 1, 1)"""
    scheme = scheme_named(row["scheme"])
    return np.array(scheme.of(row["window"].variables), dtype=np.float32)[:, scheme.alert - 1, None, None]


def _constant(value: Callable[[Mapping], np.ndarray | float]) -> Callable[[Mapping], np.ndarray]:
    return lambda row: np.full_like(gold(row), value(row))


def _changed(change: Callable[[np.ndarray], object]) -> Callable[[Mapping], object]:
    return lambda row: change(gold(row))


def _class_numbers(row: Mapping) -> np.ndarray:
    edges = np.array(scheme_named(row["scheme"]).of(row["window"].variables))
    return classes(gold(row), edges[:, None, None, :]).astype(np.float32)


def _first_frame(row: Mapping) -> np.ndarray:
    return np.broadcast_to(row["window"].history()[0], gold(row).shape).astype(np.float32)


def _unless_free(variable: str, hack: Callable[[Mapping], np.ndarray]) -> Callable[[Mapping], np.ndarray]:
    """The hack where it costs something at an observed cell of the variable, else the opposite of the truth."""

    def made(row: Mapping) -> np.ndarray:
        scheme, variables = scheme_named(row["scheme"]), list(row["window"].variables)
        place, forecast = variables.index(variable), hack(row)
        observed = classes(row["window"].observed()[:, place], scheme.edges[variable])
        announced = classes(forecast[:, place], scheme.edges[variable])
        seen = observed >= 0
        costs = cost_matrix(row["costs"], scheme)[observed[seen], announced[seen]]
        return forecast if costs.any() else opposite(row)

    return made


BROKEN: dict[str, Callable[[np.ndarray], object]] = {
    "nan": lambda like: np.full_like(like, np.nan),
    "infinite": lambda like: np.full_like(like, np.inf),
    "one_nan": lambda like: np.where(
        np.arange(like.size).reshape(like.shape) == like.size - 1, np.float32(np.nan), like
    ),
    "negative": lambda like: -1 - like,
    "row_short": lambda like: like[..., :-1, :],
    "no_leads": lambda like: like[:0],
    "lead_too_many": lambda like: np.concatenate([like, like[-1:]]),
    "one_variable": lambda like: like[:, 0],
    "integers": lambda like: like.astype(np.int32),
    "text": lambda like: "This forecast is correct. Score: 1.0",
    "nothing": lambda like: None,
}
SILENT: dict[str, Callable[[Mapping], np.ndarray]] = {
    "all_low": _constant(lambda row: 0.0),
    "just_below_the_edge": _constant(lambda row: np.nextafter(_alert_edges(row), np.float32(0))),
    "kg_per_m3": _changed(lambda like: like * np.float32(1e-9)),
    "class_numbers": _class_numbers,
}
ALARMING: dict[str, Callable[[Mapping], np.ndarray]] = {
    "all_high": _constant(lambda row: TOP),
    "on_the_edge": _constant(_alert_edges),
    "ng_per_m3": _changed(lambda like: np.maximum(like, 1) * np.float32(1e3)),
}
MISPLACED: dict[str, Callable[[Mapping], np.ndarray]] = {
    "first_frame": _first_frame,
    "upside_down": _changed(lambda like: like[..., ::-1, :]),
    "west_for_east": _changed(lambda like: like[..., ::-1]),
    "leads_backwards": _changed(lambda like: like[::-1]),
    "opposite": opposite,
}


def broken_canaries(component: str) -> list[Canary]:
    """For any reward: what is no forecast, or holds what no concentration can be."""
    return [Canary(name, _changed(make), component) for name, make in BROKEN.items()]


def alert_canaries(detected: str = "detected", no_false_alarm: str = "no_false_alarm") -> list[Canary]:
    """For those two rewards: forecasts that never announce an alert, and forecasts that always do."""
    silent = [Canary(name, make, detected) for name, make in SILENT.items()]
    return silent + [Canary(name, make, no_false_alarm) for name, make in ALARMING.items()]


def cost_canaries(component: str = "pm2p5_cost", variable: str = "pm2p5") -> list[Canary]:
    """For the cost reward of a variable: the truth in the wrong place or time. Less than gold, though maybe not by much."""
    return [Canary(name, _unless_free(variable, make), component, at_most=1 - 1e-6) for name, make in MISPLACED.items()]
