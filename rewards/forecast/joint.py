"""Rewards that no cell earns alone: an alert of a region, and how long an episode lasts.

What one cell should announce depends here on what the others announce, so a threshold on each cell's own probability need not be
optimal, however good the probabilities are. The value of a region or an episode stands at each of the cells that made it:
credit is shared, not divided.

Not covered: alerts that look at several variables at once (each has its own), and where in a region the alert was.
"""

import numpy as np

from rewards.forecast.costs import Costs, cost_matrix
from rewards.forecast.truth import Truth, rewarded
from rewards.score import Score, batched


def regions(truth: Truth) -> np.ndarray:
    """(Y, X): the place of each cell's region in `window.region_names` ({number: name}), -1 where it is in none."""
    numbers = np.asarray(truth.window.region())
    found = np.full(numbers.shape, -1)
    for place, number in enumerate(truth.window.region_names):
        found[numbers == number] = place
    return found


def counted(truth: Truth, cells: np.ndarray) -> np.ndarray:
    """float64 (..., R): how many cells of (..., Y, X) bool are True in each region."""
    inside = (regions(truth).ravel()[:, None] == np.arange(len(truth.window.region_names))).astype(np.float32)
    flat = cells.reshape(*cells.shape[:-2], cells.shape[-2] * cells.shape[-1]).astype(np.float32)
    return (flat @ inside).astype(np.float64)  # in float32 7 of 10 would be less than 0.7


def regional_alerts(truth: Truth, forecasts: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """announced (n, L', V, R), observed (L', V, R), seen (L', V, R): bool for each lead, variable and region.

    There is an alert if at least this share of the region's cells that are observed then have the alert class or a higher one;
    the same cells count on both sides. seen: False where none of them is observed. Raises ValueError if not 0 < share <= 1.
    """
    if not 0 < share <= 1:
        raise ValueError(
            f"alert_share={share}; it is the share of a region's cells that makes an alert, above 0 and up to 1"
        )
    seen, alert = truth.levels >= 0, truth.scheme.alert
    there = counted(truth, seen)
    announced = counted(truth, (truth.announced(forecasts) >= alert) & seen)
    observed = counted(truth, truth.levels >= alert)
    cells = np.maximum(there, 1)
    return announced / cells >= share, observed / cells >= share, there > 0


def regional_costs(truth: Truth, forecasts: np.ndarray, costs: Costs, share: float) -> tuple[np.ndarray, np.ndarray]:
    """(n, L', V, R) in [0, 1] and seen (L', V, R). Wrong alerts and missed ones cost what they do next to the edge of alert."""
    matrix, alert = cost_matrix(costs, truth.scheme), truth.scheme.alert
    announced, observed, seen = regional_alerts(truth, forecasts, share)
    return matrix[alert - 1, alert] * (announced & ~observed) + matrix[alert, alert - 1] * (~announced & observed), seen


def durations(truth: Truth, forecasts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, V, Y, X): leads with an alert announced less those with one observed; (V, Y, X): leads observed, which alone count."""
    seen, alert = truth.levels >= 0, truth.scheme.alert
    announced = ((truth.announced(forecasts) >= alert) & seen).sum(axis=1)
    return announced - (truth.levels >= alert).sum(axis=0), seen.sum(axis=0)


@batched
def regional_alert(completions, *, window, scheme, costs, alert_share) -> list[Score]:
    """1 - the cost of the alert of the cell's region, lead and variable, at each observed cell; NaN elsewhere.

    See `regional_alerts` and `regional_costs`. alert_share: column, in (0, 1].
    """

    def judge(truth: Truth, forecasts: np.ndarray, costs: Costs, share: float) -> np.ndarray:
        cost, _ = regional_costs(truth, forecasts, costs, share)
        nowhere = np.full((*cost.shape[:-1], 1), np.nan)  # the last place, and so that of region -1
        value = np.concatenate([1 - cost, nowhere], axis=-1).astype(np.float32)[..., regions(truth)]
        return np.where(truth.levels >= 0, value, np.float32(np.nan))

    return rewarded(completions, judge, window, scheme, costs, alert_share)


@batched
def event_duration(completions, *, window, scheme) -> list[Score]:
    """1 - |leads announced - leads observed| / leads, of the alerts of one cell and variable; NaN where not observed.

    leads: those at which the cell was observed, the only ones counted; the value stands at each of them.
    """

    def judge(truth: Truth, forecasts: np.ndarray) -> np.ndarray:
        difference, leads = durations(truth, forecasts)
        value = (1 - np.abs(difference) / np.maximum(leads, 1)).astype(np.float32)
        return np.where(truth.levels >= 0, value[:, None], np.float32(np.nan))

    return rewarded(completions, judge, window, scheme)
