"""Is it learning? Watches the metrics of every step and says in plain words what is wrong and what to do.

A warning is given once when its condition begins and again only after the condition was gone for a whole window. The
thresholds are working values of practice (derived, no paper): each names in its sentence what was measured.

`Guard` is the one check that acts: no update with a loss or gradient that is not finite reaches the weights.

Not covered: rewards that are hacked while the metric is not measured, and slow drift within normal ranges.
"""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

WINDOW = 20
RATIO_TOLERANCE = 1e-3
MAX_TRUNCATED = 0.5
MAX_UNSCORED = 0.1
MIN_ENTROPY_SHARE = 0.1
STOP_AFTER = 5  # updates skipped in a row


class NotFinite(ValueError):
    """The numbers of a run are not finite and it cannot go on; the message says since when and what to change."""


@contextlib.contextmanager
def finite_sampling(when: str) -> Iterator[None]:
    """NotFinite in place of torch's own words where a model whose probabilities are not finite is sampled. when: "step 3"."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor contains" in str(error) or "device-side assert" in str(error):  # on a CPU; on a GPU
            raise NotFinite(
                f"{when}: nothing can be sampled, because the model's probabilities are not finite: an earlier update was "
                "too large, or the model was broken before. Lower optim.lr, in a new run (RUN=<another name>)"
            ) from error
        raise


class Guard:
    """Decides on every update whether it may be made; one that is not finite is skipped, counted, and its rows are kept.

    A skipped update leaves weights and optimizer as they were, so that one bad batch costs one step. Raises NotFinite
    after STOP_AFTER in a row: then it is not the batch.
    keep: keep(step, rows) is told the offending rows of a skipped update, once.
    """

    def __init__(self, keep: Callable[[int, list[dict[str, Any]]], Any] | None = None):
        self.skipped = self.in_a_row = 0
        self._keep, self._rows = keep, []

    def note(self, rows: Sequence[dict[str, Any]]) -> None:
        """Rows of a micro-batch of the coming update whose log-probabilities or loss are not finite; may be empty."""
        self._rows += rows

    def allows(self, step: int, grad_norm: float) -> bool:
        """Whether the update of `step` may be made. grad_norm: over all ranks, so that all of them decide alike."""
        rows, self._rows = self._rows, []
        if math.isfinite(grad_norm):
            self.in_a_row = 0
            return True
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if rows and self._keep:
            self._keep(step, rows)
        if self.in_a_row == STOP_AFTER:
            raise NotFinite(
                f"the last {STOP_AFTER} updates, to step {step}, had a gradient norm of {grad_norm} and were skipped; the "
                f"weights are those of step {step - STOP_AFTER}. Lower optim.lr or use model.dtype=float32, in a new run (RUN="
                f"<another name>); the rows that were not finite, if it was rows, are in samples/ of this one"
            )
        return False


class Finding(NamedTuple):
    """One line of the report's health block. verdict: ok, note, warning or not measured."""

    name: str
    value: str
    verdict: str
    sentence: str


class Health:
    """Fed the metrics of each step; returns new warnings, and the state of all checks for the report.

    metric: headline metric, read from `eval/<metric>`; None takes the first evaluation seen.  better: higher or lower.
    updates_per_batch: optimizer updates made on one batch of rollouts; the ratio is only known to be 1 when it is 1.
    """

    def __init__(self, metric: str | None = None, better: str = "higher", updates_per_batch: int = 1):
        self.metric, self.sign, self.updates_per_batch = metric, 1 if better == "higher" else -1, updates_per_batch
        self.recent: deque[dict[str, float]] = deque(maxlen=WINDOW)  # the last steps' metrics
        self.evaluations: list[list[float]] = []  # [step, metric, lo, hi, mean reward of the recent steps]
        self.entropy_start: list[float] = []  # of the first five steps, as is reward_start
        self.reward_start: list[float] = []
        self.first_loss: float | None = None
        self.worst_ratio: list[float] | None = None  # [step, deviation]
        self.nonfinite: list[int] = []  # steps
        self.cleared: dict[str, int] = {}  # condition -> steps since it last held

    def update(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Take in one line of metrics (a training step, an evaluation, or both); returns the warnings that are new."""
        metrics = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
        if "reward" in metrics or "loss" in metrics:
            self.recent.append(metrics)
            for name, start in (("entropy", self.entropy_start), ("reward", self.reward_start)):
                if len(start) < 5 and _finite(metrics.get(name)):
                    start.append(metrics[name])
            if self.first_loss is None and _finite(metrics.get("loss")):
                self.first_loss = metrics["loss"]
            deviation = metrics.get("ratio_deviation", math.nan)
            if not math.isnan(deviation) and (self.worst_ratio is None or deviation > self.worst_ratio[1]):
                self.worst_ratio = [step, deviation]
            if any(name in metrics and not _finite(metrics[name]) for name in ("loss", "grad_norm")):
                self.nonfinite.append(step)
        self._take_evaluation(step, metrics)
        return self._new_warnings(step)

    def block(self) -> list[Finding]:
        """The health block of the report: every check, also those that are well or could not be measured."""
        warnings = self._warnings()

        def line(check: str, name: str, value: str, well: str) -> Finding:
            if check in warnings:
                return Finding(name, value, "warning", warnings[check])
            return Finding(name, value or "–", "ok", well) if value else Finding(name, "–", "not measured", "")

        several = self.updates_per_batch > 1
        ratio = "" if several or self.worst_ratio is None else f"1 ± {self.worst_ratio[1]:.2g}"
        entropy, now = _mean(self.entropy_start), self._recent("entropy")
        seen = bool(self.recent)
        found = [
            line("nonfinite", "Numbers", f"{len(self.nonfinite)} steps not finite" if seen else "",
                 "Loss and gradient norm were finite at every step."),
            line("ratio", "First ratio", ratio, "The policy that learns is the one that sampled: ratios start at 1."),
            line("zero_spread", "Groups with spread", _share(1 - self._recent("zero_spread")),
                 "Share of groups, over the last 20 steps, whose rewards differ; only these teach anything."),
            line("truncated", "Truncated completions", _share(self._recent("truncated")),
                 "Share of completions cut at the length limit, over the last 20 steps."),
            line("unscored", "Unscored rollouts", _share(self._recent("unscored")),
                 "Share of rollouts that no check could judge, over the last 20 steps; they carry no weight."),
            line("entropy", "Entropy", f"{entropy:.3g} → {now:.3g} nats" if _finite(entropy) and _finite(now) else "",
                 "The policy still explores: mean entropy per decision, first five steps against the last 20."),
            line("hacking", "Reward against metric",
                 f"{len(self.evaluations)} evaluations" if len(self.evaluations) > 1 else "",
                 "The metric has not fallen while the reward rose."),
        ]  # fmt: skip
        if several:
            found[1] = Finding(
                "First ratio", "–", "not measured", "Several updates per batch: the ratio leaves 1 by design."
            )
        if self.first_loss is not None and abs(self.first_loss) < 1e-2:
            found.append(
                Finding("Loss at the start", f"{self.first_loss:.1e}", "note",
                        "A loss near 0 is normal: advantages sum to 0 within a group, so at ratio 1 the loss is near 0 "
                        "whatever its gradient. Watch reward and metric instead.")
            )  # fmt: skip
        return found

    # ---------------------------------------------------------------- inside

    def _take_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        names = [k[5:] for k in metrics if k.startswith("eval/") and k.count("/") == 1]
        self.metric = self.metric or next(iter(names), None)
        if self.metric in names and _finite(metrics[f"eval/{self.metric}"]):
            value, nan = metrics[f"eval/{self.metric}"], math.nan
            lo, hi = metrics.get(f"eval/{self.metric}/lo", nan), metrics.get(f"eval/{self.metric}/hi", nan)
            self.evaluations.append([step, value, lo, hi, self._recent("reward")])

    def _new_warnings(self, step: int) -> list[str]:
        now = self._warnings()
        new = [text for check, text in now.items() if self.cleared.get(check, WINDOW) >= WINDOW]
        self.cleared = {
            check: 0 if check in now else since + 1
            for check, since in {**self.cleared, **dict.fromkeys(now, 0)}.items()
        }
        return [f"step {step}: {text}" for text in new]

    def _warnings(self) -> dict[str, str]:
        """check -> sentence, for every condition that holds now."""
        found = {}
        if self.nonfinite:
            found["nonfinite"] = (
                f"loss or gradient norm was not finite at {len(self.nonfinite)} of the steps, first at step "
                f"{self.nonfinite[0]}; such updates are skipped: lower the learning rate, or use model.dtype=float32"
            )
        if self.updates_per_batch == 1 and self.worst_ratio is not None and self.worst_ratio[1] > RATIO_TOLERANCE:
            step, deviation = self.worst_ratio
            found["ratio"] = (
                f"the first ratio on fresh rollouts is off 1 by {deviation:.2g} at step {step:.0f}: sampler "
                "and trainer disagree on the probabilities; compare temperature, dtype, dropout and padding of the two"
            )
        if len(self.recent) == WINDOW and all(m.get("zero_spread", 0) > 1 - 1e-9 for m in self.recent):
            found["zero_spread"] = f"no group in the last {WINDOW} steps had different rewards: {self._why_no_spread()}"
        truncated, unscored = self._recent("truncated"), self._recent("unscored")
        if truncated > MAX_TRUNCATED:
            found["truncated"] = (
                f"{truncated:.0%} of completions are cut at the length limit: allow longer completions, or warm-start "
                "on demonstrations that end"
            )
        if unscored > MAX_UNSCORED:
            found["unscored"] = (
                f"{unscored:.0%} of rollouts could not be scored: see reward_failures/<name> and timeouts in "
                "metrics.jsonl; they carry no weight, so the batch is smaller than configured"
            )
        start, entropy = _mean(self.entropy_start), self._recent("entropy", last=5)
        if len(self.entropy_start) == 5 and start > 0 and entropy < MIN_ENTROPY_SHARE * start:
            found["entropy"] = (
                f"entropy fell from {start:.3g} to {entropy:.3g} nats, under {MIN_ENTROPY_SHARE:.0%} of the start: the "
                "policy has stopped exploring; lower the learning rate, raise epsilon_high, or add an entropy bonus"
            )
        if (fall := self._reward_against_metric()) is not None:
            found["hacking"] = fall
        return found

    def _why_no_spread(self) -> str:
        components = [self._recent(k) for k in self.recent[-1] if k.startswith("rewards/") and k.endswith("/mean")]
        components = [value for value in components if _finite(value)]
        reward = self._recent("reward")
        if self._recent("unscored") > 1 - 1e-9:
            return "no rollout could be judged, so nothing is learned; see reason/<name> in rollouts.parquet"
        if self._recent("truncated") > MAX_TRUNCATED:
            return "most completions are cut at the length limit and fail alike; allow longer completions"
        if components and min(components) >= 0.98:
            return f"every completion already gets full reward ({reward:.2f}); use harder prompts or stop here"
        if components and max(components) <= 0.02:
            return (
                f"every completion fails (reward {reward:.2f}); warm-start longer, use easier prompts or larger groups"
            )
        return (
            f"all completions of a prompt are judged alike (reward {reward:.2f}), so every advantage is 0; raise the "
            "temperature or group_size, use prompts of mixed difficulty, or add a graded component"
        )

    def _reward_against_metric(self) -> str | None:
        """The metric is below the interval of its best evaluation (without intervals: fell twice) and reward rose."""
        if len(self.evaluations) < 2:
            return None
        best = max(self.evaluations, key=lambda e: self.sign * e[1])
        step, value, _, _, reward = self.evaluations[-1]
        bound = best[2] if self.sign > 0 else best[3]
        if _finite(bound):
            fell = self.sign * value < self.sign * bound
        else:
            last = [self.sign * e[1] for e in self.evaluations[-3:]]
            fell = len(last) == 3 and last[0] > last[1] > last[2]
        then = best[4] if _finite(best[4]) else _mean(self.reward_start)  # nothing was rewarded before step 1
        if not (fell and reward > then):
            return None
        return (
            f"the metric went from {best[1]:.3f} (step {best[0]:.0f}) to {value:.3f} (step {step:.0f}) while the "
            f"reward rose from {then:.3f} to {reward:.3f}: the reward is being gamed; read the report's best groups"
        )

    def _recent(self, name: str, last: int = WINDOW) -> float:
        return _mean([m[name] for m in list(self.recent)[-last:] if name in m])


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _mean(values: list[float]) -> float:
    values = [v for v in values if math.isfinite(v)]
    return sum(values) / len(values) if values else math.nan


def _share(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.0%}"
