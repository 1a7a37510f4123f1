"""What stands beside a run in its tables: baselines that cost nothing, and other uses of supervised starts.

A learned baseline (`App.learned`) gets a `Rivals`: the rows, the policy that RL starts from, and further starts by a change of
the config, cached in runs/warmup like any start. All baselines are graded as the policy is, and verified where the app does
that; one arm's completions are gone before the next one's are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from core.app import App, Completion, Row
from core.config import Config, changed
from core.run import evaluate as ev
from core.run.actor import Actor
from core.run.folder import plain
from core.run.progress import Progress
from core.run.splits import Split
from core.run.start import NotMade, start


@dataclass
class Rivals:
    """What a learned baseline is made from.

    test: the rows that it answers. make: False leaves out starts that are not there yet (they raise NotMade).
    """

    app: App
    config: Config
    data: Split
    test: Sequence[Row]
    judge: ev.Judge
    progress: Progress
    make: bool = True
    _shared: dict[Any, Any] = field(default_factory=dict)

    @property
    def train(self) -> list[Row]:
        return self.data.train

    @property
    def validation(self) -> list[Row]:
        return self.data.validation

    def shared(self, key: Any, make: Callable[[], Any]) -> Any:
        """What several baselines need, made once; it is gone with the rivals."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    @property
    def start(self) -> Actor:
        """The policy that RL starts from, as it was before."""
        return self.shared("start", lambda: self._made(self.config, self.data))

    def fit(self, **changes: Any) -> Actor:
        """Another supervised start: section__key=value, as in fit(rollout__distribution="gaussian"). The same one each time."""

        def make() -> Actor:
            config = changed(self.app, self.config, **changes)
            data = Split(self.app, config, Progress(0, "", quiet=True))  # task options are columns of the rows
            return self._made(config, data)

        return self.shared(("fit", repr(sorted(changes.items()))), make)

    def _made(self, config: Config, data: Split) -> Actor:
        return start(self.app, config, data, self.judge, self.progress, self.make)[0]


@dataclass(frozen=True)
class Compared:
    """baselines: {name: what the metrics say of it}. arms: {arm: what the app's verification keeps of it}."""

    baselines: dict[str, ev.Graded]
    arms: dict[str, Any]


def compare(rivals: Rivals, arms: Mapping[str, Sequence[Completion]]) -> Compared:
    """Makes and grades every baseline; arms: completions of the policy itself on the same rows, by their names."""
    app, rows, baselines = rivals.app, rivals.test, {}
    reduced = {name: app.verify.reduce(rows, completions) for name, completions in arms.items()} if app.verify else {}
    for name, completions in _baselines(rivals):
        baselines[name] = ev.grade(rivals.judge, rows, completions)
        if app.verify:
            reduced[name] = app.verify.reduce(rows, completions)
    return Compared(baselines, reduced)


def _baselines(rivals: Rivals) -> Iterator[tuple[str, Sequence[Completion]]]:
    for name, baseline in rivals.app.baselines.items():
        if (completions := baseline(rivals.train, rivals.test)) is None:
            rivals.progress.note(f"left out: the data have nothing that the baseline {name} could be made of")
            continue
        yield name, completions
    for name, baseline in rivals.app.learned.items():
        rivals.progress.note(f"baseline: {name}")
        try:
            completions = baseline(rivals)
        except NotMade as error:
            rivals.progress.note(f"left out: {error}; make train APP={rivals.app.name} makes it, in one process")
            continue
        yield name, completions


def best_baseline(app: App, baselines: Mapping[str, ev.Graded]) -> tuple[str, float] | None:
    """The baseline with the best mean of the headline, and that mean; None without baselines."""
    headline = next(iter(app.metrics))
    means = {name: ev.mean(graded.scores[headline], graded.weights[headline]) for name, graded in baselines.items()}
    known = {name: value for name, value in means.items() if not np.isnan(value)}
    if not known:
        return None
    return (min if app.better(headline) == "lower" else max)(known.items(), key=lambda item: item[1])


def difference(app: App, rows: Sequence[Row], own: ev.Evaluation, rival: ev.Graded) -> tuple[float, float, float]:
    """The headline minus that of a baseline, with its paired 95 % interval."""
    headline = next(iter(app.metrics))
    weights = rival.weights[headline], own.weights["scores"][headline]
    return ev.change(app, rows, rival.scores[headline], own.scores[headline], weights)


def verified(app: App, rows: Sequence[Row], arms: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """{"tables", "plots"} of the app's verification, as JSON can hold them; empty without one."""
    if app.verify is None:
        return {"tables": [], "plots": []}
    return plain(
        {
            "tables": [asdict(table) for table in app.verify.tables(rows, arms)],
            "plots": [asdict(plot) for plot in app.verify.plots(rows, arms)],
        }
    )
