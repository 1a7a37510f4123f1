"""What forecasts are compared by. A metric of a row is a mean over its cases and says how many these were (Score.weight), so
that means over rows are those of all cases: counts are pooled, never rates.

Rates, squared error and CRPS are of PM2.5 and its alerts; expected_cost, regional_cost and duration_error pool both variables,
a case of PM10 counting 0.3. None where a row has no case. A bad completion is taken to be wrong in every case, and for errors
of concentration as 1000 ug m-3 everywhere: it is in the mean, as a forecast that nobody can use.

Not covered: bias by region, reliability, ROC and value curves, which need more than one number a row.
"""

from collections.abc import Callable

import numpy as np

from rewards.forecast.costs import cost_matrix, variable_weights
from rewards.forecast.events import Counts, alerts, confusion
from rewards.forecast.fields import members, values
from rewards.forecast.joint import counted, durations, regional_costs
from rewards.forecast.truth import Truth, measured
from rewards.score import Score, batched

TOP = 1000.0  # ug m-3, what a bad completion is taken to say


@batched
def expected_cost(completions, *, window, scheme, costs) -> list[Score]:
    """Mean of C[observed, announced] in [0, 1], lower is better; 1 for a bad completion."""

    def judge(truth: Truth, forecasts: np.ndarray, costs) -> tuple[np.ndarray, np.ndarray]:
        n, variables = len(forecasts), len(truth.edges)
        by = np.arange(n * variables).reshape(n, 1, variables, 1, 1)
        classes = len(truth.scheme.classes)
        table = confusion(truth.levels, truth.announced(forecasts), classes, by, n * variables)
        table = np.einsum("nvoa,v->noa", table.reshape(n, variables, classes, classes), variable_weights(truth))
        return (table * cost_matrix(costs, truth.scheme)).sum((1, 2)), table.sum((1, 2))

    def worst(truth: Truth, costs) -> tuple[float, float]:
        cases = (truth.levels >= 0).sum((0, 2, 3)) @ variable_weights(truth)
        return cases, cases

    return measured(completions, judge, worst, window, scheme, costs)


@batched
def regional_cost(completions, *, window, scheme, costs, alert_share) -> list[Score]:
    """Mean cost in [0, 1] of the alerts of regions (`joint.regional_costs`), lower is better; 1 for a bad completion."""

    def judge(truth: Truth, forecasts: np.ndarray, costs, share: float) -> tuple[np.ndarray, np.ndarray]:
        cost, seen = regional_costs(truth, forecasts, costs, share)
        weights = seen * variable_weights(truth)[:, None]
        return (cost * weights).sum((1, 2, 3)), np.full(len(cost), weights.sum())

    def worst(truth: Truth, costs, share: float) -> tuple[float, float]:
        cases = ((counted(truth, truth.levels >= 0) > 0) * variable_weights(truth)[:, None]).sum()
        return cases, cases

    return measured(completions, judge, worst, window, scheme, costs, alert_share)


@batched
def duration_error(completions, *, window, scheme) -> list[Score]:
    """Mean over cells of |hours announced - hours observed| of alerts, lower is better; for a bad completion all hours."""

    def judge(truth: Truth, forecasts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        difference, leads = durations(truth, forecasts)
        weights = variable_weights(truth)
        hours = np.abs(difference).sum((2, 3)) @ weights * truth.window.step_h
        return hours, np.full(len(forecasts), (leads > 0).sum((1, 2)) @ weights)

    def worst(truth: Truth) -> tuple[float, float]:
        leads, weights = (truth.levels >= 0).sum(axis=0), variable_weights(truth)
        return leads.sum((1, 2)) @ weights * truth.window.step_h, (leads > 0).sum((1, 2)) @ weights

    return measured(completions, judge, worst, window, scheme)


def _rate(completions, window, scheme, parts: Callable[[Counts], tuple], silent: bool = False) -> list[Score]:
    """parts: numerator and denominator of a rate of PM2.5 alerts. silent: a bad completion raises no false alarms either."""

    def judge(truth: Truth, forecasts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        one, n = truth.only("pm2p5"), len(forecasts)
        by = np.arange(n).reshape(n, 1, 1, 1, 1)
        table = confusion(truth.levels[:, one], truth.announced(forecasts, one), len(truth.scheme.classes), by, n)
        return parts(alerts(table, truth.scheme.alert))

    def worst(truth: Truth) -> tuple[float, float]:
        seen = truth.levels[:, truth.only("pm2p5")]
        observed, quiet = (
            int((seen >= truth.scheme.alert).sum()),
            int(((seen >= 0) & (seen < truth.scheme.alert)).sum()),
        )
        return parts(Counts(tp=0, fp=0 if silent else quiet, fn=observed, tn=quiet if silent else 0))

    return measured(completions, judge, worst, window, scheme)


@batched
def false_alarm_rate(completions, *, window, scheme) -> list[Score]:
    """FP / (FP + TN) in [0, 1], lower is better. Not the ratio; see rewards/forecast/events.py."""
    return _rate(completions, window, scheme, lambda c: (c.fp, c.fp + c.tn))


@batched
def false_alarm_ratio(completions, *, window, scheme) -> list[Score]:
    """FP / (TP + FP) in [0, 1], lower is better; None where nothing is announced."""
    return _rate(completions, window, scheme, lambda c: (c.fp, c.tp + c.fp))


@batched
def probability_of_detection(completions, *, window, scheme) -> list[Score]:
    """TP / (TP + FN) in [0, 1]."""
    return _rate(completions, window, scheme, lambda c: (c.tp, c.tp + c.fn))


@batched
def f1(completions, *, window, scheme) -> list[Score]:
    """2 TP / (2 TP + FP + FN) in [0, 1]."""
    return _rate(completions, window, scheme, lambda c: (2 * c.tp, 2 * c.tp + c.fp + c.fn))


@batched
def critical_success_index(completions, *, window, scheme) -> list[Score]:
    """TP / (TP + FP + FN) in [0, 1]."""
    return _rate(completions, window, scheme, lambda c: (c.tp, c.tp + c.fp + c.fn))


@batched
def frequency_bias(completions, *, window, scheme) -> list[Score]:
    """(TP + FP) / (TP + FN), alerts announced over alerts observed: 0 or more, best is 1; 0 for a bad completion."""
    return _rate(completions, window, scheme, lambda c: (c.tp + c.fp, c.tp + c.fn), silent=True)


def _error(
    completions, window, scheme, part: str, error: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> list[Score]:
    """error(forecasts (n, cells, ...), observed (cells,)) -> (n, cells), over the observed cells of PM2.5."""

    def judge(truth: Truth, forecasts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        one = truth.only("pm2p5")
        seen = ~np.isnan(truth.observed[:, one])
        observed = truth.observed[:, one][seen].astype(np.float64)
        errors = error(forecasts[:, :, one][:, seen], observed)
        return errors.sum(axis=1), np.full(len(forecasts), len(observed))

    def worst(truth: Truth) -> tuple[float, float]:
        sums, cases = judge(truth, np.full((1, *truth.observed.shape), TOP, dtype=np.float32))
        return sums[0], cases[0]

    return measured(completions, judge, worst, window, scheme, part=part)


@batched
def squared_error(completions, *, window, scheme) -> list[Score]:
    """Mean squared error of the expected concentration, (ug m-3)^2, lower is better; RMSE is the root of its mean over rows."""

    def error(forecasts: np.ndarray, observed: np.ndarray) -> np.ndarray:
        return np.square(values(forecasts) - observed)

    return _error(completions, window, scheme, "value", error)


@batched
def crps(completions, *, window, scheme) -> list[Score]:
    """Mean CRPS of the members, ug m-3, lower is better; the absolute error of a plain forecast. See `crps_ensemble`."""
    return _error(completions, window, scheme, "members", lambda f, observed: crps_ensemble(members(f), observed))


def crps_ensemble(members: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """(...): mean over i of |x_i - y| - sum over i, j of |x_i - x_j| / (2 M^2), for members (..., M) ascending, observed (...).

    The form "ecdf" of `scores`: the members are the distribution, not a sample of it. The double sum over sorted members is
    2 sum (2 i - M + 1) x_i. Source: Gneiting and Raftery 2007 (doi 10.1198/016214506000001437), eq. 21; derived.
    """
    count = members.shape[-1]
    x = members.astype(np.float64)
    spread = x @ (2.0 * np.arange(count) - count + 1) / count**2
    return np.abs(x - observed[..., None]).mean(axis=-1) - spread
