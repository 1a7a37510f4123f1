"""Rewards and metrics for forecasts of particulate matter: what wrong classes cost, for cells, regions and episodes.

A forecast is an array (leads, variables, y, x), see rewards/forecast/fields.py; rows name a `window` that knows what was
observed, a `scheme` of classes and the `costs` of wrong ones. numpy only.
"""

from rewards.forecast.canaries import alert_canaries, broken_canaries, cost_canaries, gold
from rewards.forecast.costs import (
    PRESETS,
    VARIABLE_WEIGHTS,
    cost_matrix,
    detected,
    no_false_alarm,
    pm2p5_cost,
    pm10_cost,
)
from rewards.forecast.decisions import bayes_levels, class_probabilities, expected_costs, tune_thresholds
from rewards.forecast.joint import event_duration, regional_alert
from rewards.forecast.metrics import (
    critical_success_index,
    crps,
    duration_error,
    expected_cost,
    f1,
    false_alarm_rate,
    false_alarm_ratio,
    frequency_bias,
    probability_of_detection,
    regional_cost,
    squared_error,
)
from rewards.forecast.schemes import SCHEMES, Scheme, classes, scheme_named

__all__ = [
    "PRESETS",
    "SCHEMES",
    "VARIABLE_WEIGHTS",
    "Scheme",
    "alert_canaries",
    "bayes_levels",
    "broken_canaries",
    "class_probabilities",
    "classes",
    "cost_canaries",
    "cost_matrix",
    "critical_success_index",
    "crps",
    "detected",
    "duration_error",
    "event_duration",
    "expected_cost",
    "expected_costs",
    "f1",
    "false_alarm_rate",
    "false_alarm_ratio",
    "frequency_bias",
    "gold",
    "no_false_alarm",
    "pm2p5_cost",
    "pm10_cost",
    "probability_of_detection",
    "regional_alert",
    "regional_cost",
    "scheme_named",
    "squared_error",
    "tune_thresholds",
]
