"""What a wrong class costs: matrices C[observed, announced] in [0, 1], and the rewards of single cells that follow from them.

Presets, for K classes of which those from `alert` on are alerts:

    agency      asymmetric: a missed alert costs most, a false alarm less, a wrong class on the right side least
    paper       the reward of arXiv 2511.22169 as published, turned into costs: only exact classes pay, false alarms cost 0.1 more
    paper_miss  the same with 1.5 off for a missed alert, which the published reward does not punish
    exact       1 for every wrong class

or a list of lists. A reward is 1 - C, so the exact class earns 1. Each cell is judged by itself, so the decisions of
rewards/forecast/decisions.py are optimal if the probabilities are right; rewards/forecast/joint.py holds two rewards for which
they need not be. Not covered: costs that depend on place, season or how many live there.
"""

from collections.abc import Sequence

import numpy as np

from rewards.forecast.schemes import Scheme, named
from rewards.forecast.truth import Truth, rewarded
from rewards.score import Score, batched

# Of a case, where both variables are pooled. Source: arXiv 2511.22169; read in the paper's code.
VARIABLE_WEIGHTS = {"pm2p5": 1.0, "pm10": 0.3}

Costs = str | Sequence[Sequence[float]]


def agency(classes: int, alert: int) -> np.ndarray:
    """(K, K) float64. Of 4 classes, alert 2: [0 .1 .4 .6], [.1 0 .3 .5], [.8 .7 0 .2], [1 .9 .4 0].

    For other numbers, with c and s in [0, 1] the place of a class among the clean and among the alert ones (0 = next to the
    edge of alert, 1 = farthest from it):

        clean for clean   0.1 |c - c'|                 miss            0.7 + 0.1 c announced + 0.2 s observed
        false alarm       0.3 + 0.1 c + 0.2 s          too high, low   0.2 or 0.4 times |s - s'|
    """
    clean = np.arange(alert)[::-1] / max(alert - 1, 1)
    severe = np.arange(classes - alert) / max(classes - alert - 1, 1)
    more = severe[None, :] - severe[:, None]
    return np.block(
        [
            [0.1 * np.abs(clean[:, None] - clean[None, :]), 0.3 + 0.1 * clean[:, None] + 0.2 * severe[None, :]],
            [0.7 + 0.1 * clean[None, :] + 0.2 * severe[:, None], np.where(more > 0, 0.2 * more, -0.4 * more)],
        ]
    )


def class_reward(
    classes: int, alert: int, alpha: float = 0.0, beta: float = 1.0, gamma: float = 0.1, miss: float = 0.0
) -> np.ndarray:
    """(K, K): alpha [same side of the alert] + beta [same class] - gamma [false alarm] - miss [missed alert].

    The defaults are the published ones; `miss` is ours. The paper's multipliers and bonuses of single observed classes, off in
    its published run, make another matrix of this kind: give that as a list, after `as_costs`.
    Source: Kang et al. 2025 (arXiv 2511.22169); read in the paper's code (kaist-cvml/FAKER-Air).
    """
    high = np.arange(classes) >= alert
    observed, announced = high[:, None], high[None, :]
    sides = alpha * (observed == announced) - gamma * (announced & ~observed) - miss * (observed & ~announced)
    return sides + beta * np.eye(classes)


def as_costs(rewards: np.ndarray) -> np.ndarray:
    """(max r - r) / (max r - min r): the same wishes as costs in [0, 1]; r = max r - (max r - min r) C."""
    top = rewards.max()
    return (top - rewards) / (top - rewards.min())


PRESETS = {
    "agency": agency,
    "paper": lambda classes, alert: as_costs(class_reward(classes, alert)),
    "paper_miss": lambda classes, alert: as_costs(class_reward(classes, alert, miss=1.5)),
    "exact": lambda classes, alert: 1.0 - np.eye(classes),
}


def cost_matrix(costs: Costs, scheme: Scheme) -> np.ndarray:
    """(K, K) float64 in [0, 1], of a preset or of nested lists, for the K classes of a scheme; 0 for the exact class.

    Raises ValueError for an unknown preset, another shape, values outside of [0, 1] or a diagonal that is not 0.
    """
    classes = len(scheme.classes)
    if isinstance(costs, str):
        return named("costs", costs, PRESETS)(classes, scheme.alert)
    try:
        matrix = np.array(costs, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"costs {costs!r} are no matrix: {error}") from error
    if matrix.shape != (classes, classes):
        raise ValueError(
            f"costs are {matrix.shape}; {classes} classes need ({classes}, {classes}), rows observed, columns announced"
        )
    if not ((matrix >= 0) & (matrix <= 1)).all():
        raise ValueError(
            f"costs lie in {matrix.min():g}..{matrix.max():g}; divide them by the greatest, so that they lie in 0..1"
        )
    if matrix.diagonal().any():
        raise ValueError(
            f"the exact class costs {matrix.diagonal().tolist()}; take each row's own from it, which changes no decision"
        )
    return matrix


def variable_weights(truth: Truth) -> np.ndarray:
    """(V,) of VARIABLE_WEIGHTS."""
    return np.array([VARIABLE_WEIGHTS[variable] for variable in truth.window.variables])


def _looked_up(truth: Truth, forecasts: np.ndarray, variable: str, table: np.ndarray) -> np.ndarray:
    """(n, L', V, Y, X) float32: table[observed, announced] at the observed cells of one variable, else NaN."""
    one = truth.only(variable)
    unobserved = np.full((1, table.shape[1]), np.nan)  # the last row, and so that of class -1
    table = np.concatenate([table, unobserved]).astype(np.float32)
    found = np.full(forecasts.shape, np.nan, dtype=np.float32)
    start = truth.levels[:, one].astype(np.intp) * table.shape[1]
    found[:, :, one] = table.ravel()[start + truth.announced(forecasts, one)]
    return found


def _cost_reward(completions, variable: str, window, scheme, costs) -> list[Score]:
    def judge(truth: Truth, forecasts: np.ndarray, costs: Costs) -> np.ndarray:
        return _looked_up(truth, forecasts, variable, 1 - cost_matrix(costs, truth.scheme))

    return rewarded(completions, judge, window, scheme, costs)


@batched
def pm2p5_cost(completions, *, window, scheme, costs) -> list[Score]:
    """1 - C[observed, announced] at each observed cell of PM2.5, (L', V, Y, X) in [0, 1]; NaN elsewhere."""
    return _cost_reward(completions, "pm2p5", window, scheme, costs)


@batched
def pm10_cost(completions, *, window, scheme, costs) -> list[Score]:
    """1 - C[observed, announced] at each observed cell of PM10, (L', V, Y, X) in [0, 1]; NaN elsewhere."""
    return _cost_reward(completions, "pm10", window, scheme, costs)


def _alert_reward(completions, window, scheme, event: bool) -> list[Score]:
    def judge(truth: Truth, forecasts: np.ndarray) -> np.ndarray:
        high = np.arange(len(truth.scheme.classes)) >= truth.scheme.alert
        right = (high[None, :] == event).astype(float)
        return _looked_up(truth, forecasts, "pm2p5", np.where(high[:, None] == event, right, np.nan))

    return rewarded(completions, judge, window, scheme)


@batched
def detected(completions, *, window, scheme) -> list[Score]:
    """1 where an observed PM2.5 alert was announced, 0 where it was missed; NaN elsewhere. Its mean is the rate of detection.

    By itself it pays for alerts everywhere: its weight is for a constraint (a floor of probability_of_detection) to set.
    """
    return _alert_reward(completions, window, scheme, event=True)


@batched
def no_false_alarm(completions, *, window, scheme) -> list[Score]:
    """1 where no PM2.5 alert was observed and none announced, 0 where one was; NaN elsewhere. Its mean is 1 - false_alarm_rate.

    By itself it pays for never an alert: its weight is for a constraint (a ceiling of false_alarm_rate) to set.
    """
    return _alert_reward(completions, window, scheme, event=False)
