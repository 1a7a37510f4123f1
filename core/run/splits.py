"""The rows of a run: training, validation and test, from DATA= or from the offline folder, which is made if it is not there."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

from core import app as apps
from core.app import App, Row, Rows
from core.config import Config, ConfigError
from core.policy.trajectory import slices
from core.run import evaluate as ev
from core.run.actor import actor_of
from core.run.folder import make_folder
from core.run.progress import Progress


class Split:
    """Training, validation and test rows; test is never touched.

    Validation is a split of its own (data.validation), or clusters that are taken out of the training ones.
    """

    def __init__(self, app: App, config: Config, progress: Progress):
        source, splits = read(app, config, progress)
        for key in (config.data.train, config.data.test, config.data.validation):
            if key is not None and key not in splits:
                raise ConfigError(apps.unknown(f"split in {source}:", key, splits))
        options = config.task
        shuffle = random.Random(config.run.seed).shuffle
        train = list(splits[config.data.train])
        test = list(splits[config.data.test])
        shuffle(train)
        if config.data.test_rows:
            shuffle(test)
        if config.data.validation:
            validation = list(splits[config.data.validation])
            shuffle(validation)
        else:
            keys = sorted({str(row[app.cluster]) for row in train}) if app.cluster else []
            shuffle(keys)
            held = set(keys[: round(len(keys) * config.data.validation_share)])
            validation = [row for row in train if held and str(row[app.cluster]) in held]
            train = [row for row in train if not (held and str(row[app.cluster]) in held)]
        self.train: list[Row] = apps.prepare(app, train[: config.data.train_rows], options)
        self.validation: list[Row] = apps.prepare(app, validation[: config.evaluate.validation_rows], options)
        self.test: list[Row] = apps.prepare(app, test[: config.data.test_rows], options)
        if not self.train or not self.test:
            raise ConfigError(
                f"{source}: split {config.data.train} has {len(self.train)} rows and {config.data.test} "
                f"{len(self.test)}; both need some"
            )
        for rows in (self.train, self.test):
            actor_of(app).refuse_rows(app, config, rows)
        self._app, self._options, self._splits = app, options, splits
        progress.note(
            f"data: {source}: {len(self.train)} training, {len(self.validation)} validation, {len(self.test)} test rows"
        )

    def whole(self, split: str) -> list[Row]:
        """All rows of a split by its name. Raises ConfigError with the nearest name."""
        if split not in self._splits:
            raise ConfigError(apps.unknown("SPLIT", split, self._splits))
        return apps.prepare(self._app, self._splits[split], self._options)


def read(app: App, config: Config, progress: Progress) -> tuple[Path, Mapping[str, Rows]]:
    """The folder that was read, and its splits as the app loads them. Raises ConfigError with the loader's own words."""
    source = data_folder(app, config, progress)
    try:
        return source, app.load(source)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error


def data_folder(app: App, config: Config, progress: Progress) -> Path:
    """DATA as given, or the offline folder of this seed, written if it is not there yet."""
    refuse_missing_data(config)
    if config.data.folder:
        return Path(config.data.folder)
    folder = offline_folder(app, config.run.seed)

    def make(part: Path) -> None:
        progress.phase(f"writing the offline data to {folder}")
        app.write_offline(part, config.run.seed)

    make_folder(folder, make, progress.note)
    return folder


def refuse_missing_data(config: Config) -> None:
    """Raise ConfigError if DATA= is given and is no folder."""
    if config.data.folder and not Path(config.data.folder).is_dir():
        raise ConfigError(f"DATA={config.data.folder} is not a folder; see data/README.md for the layout")


def offline_folder(app: App, seed: int) -> Path:
    return Path("runs") / "data" / f"{app.label}-{seed}"


def check_gold(app: App, judge: ev.Judge, data: Split, progress: Progress, rows: int | None = 64) -> None:
    """Gold must score its best on the outcome before training starts: a reward that fails gold would teach the wrong thing.

    rows: how many of each part are tried; None: all, as `make check` does.
    """
    command = f"APP={app.name}" + (f" TASK={app.variant}" if app.variant else "")
    best = app.best.get(app.outcome, 1)
    chosen = [part[:rows] for part in (data.train, data.validation, data.test) if part]
    for part in chosen:
        judge.rewards.check_columns(part[0])
        judge.metrics.check_columns(part[0])
        for few in (part[at] for at in slices(len(part), apps.AT_ONCE)):
            scores = judge.rewards.score([app.gold(row) for row in few], few)
            k = judge.rewards.names.index(app.outcome)
            wrong = [i for i, value in enumerate(scores.values[:, k]) if not value >= best]
            if wrong:
                i = wrong[0]
                got = "cannot be judged" if scores.failed[i] else f"scores {scores.values[i, k]:g}"
                why = ": ".join(text for at in (scores.reasons, scores.details) if (text := at[i].get(app.outcome)))
                raise ConfigError(
                    f"the gold answer of row {few[i]['id']} {got} on {app.outcome} ({why}), one of {len(wrong)} such rows "
                    f"in {len(few)}; mend the data or the reward (make check {command} shows every component)"
                )
    progress.note(
        f"gold scores {best:g} on {app.outcome} for {sum(map(len, chosen))} of {sum(map(len, chosen))} rows tried"
    )
