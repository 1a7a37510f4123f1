"""A forecast app for tests: two waves that travel over 3 x 4 cells, in numpy alone. A run takes a few seconds.

The truth is seen at four cells in five. `.zarr` is here a folder of arrays, `.nc` a file of them.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.app import App, Forecast, Plot, Quantity, Table, Verification
from core.policy.step_nets import UNet
from rewards.score import Score, batched

LEADS, VARIABLES, CELLS = 6, ("level", "swell"), (3, 4)
EDGES = ((20.0, 40.0), (10.0, 60.0))
ALERT = 2  # the highest class


@dataclass(frozen=True)
class Options:
    """The `task:` section. weighting: of the supervised loss."""

    weighting: str = "equal"


@dataclass(frozen=True)
class Window:
    """The frames of a file from `first` on: two of history, then what is to come, if it is there."""

    path: str
    first: int

    def frames(self) -> np.ndarray:
        return np.load(self.path)[self.first : self.first + 2 + LEADS]

    def observed(self) -> np.ndarray:
        """(L, V, Y, X), NaN = not observed."""
        ahead = self.frames()[2:]
        chance = np.random.default_rng(self.first)
        return np.where(chance.random(ahead.shape) < 0.8, ahead, np.nan).astype(np.float32)


def waves(times: int, seed: int) -> np.ndarray:
    """(time, V, Y, X) float32, at least 0."""
    chance = np.random.default_rng(seed)
    time, y, x = np.ogrid[:times, : CELLS[0], : CELLS[1]]
    turn = 2 * np.pi * (time / 9 + x / 4) + y
    fields = np.stack([30 + 28 * np.sin(turn), 40 + 38 * np.cos(turn)], axis=1)
    return np.maximum(fields + chance.normal(0, 2, fields.shape), 0).astype(np.float32)


def write_offline(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True)
    for k, (split, rows) in enumerate((("train", 24), ("held", 8), ("test", 12))):
        np.save(folder / f"{split}.npy", waves(rows + 1 + LEADS, 3 * seed + k))


def load(folder: Path):
    splits = {}
    for path in sorted(Path(folder).glob("*.npy")):
        count = len(np.load(path, mmap_mode="r")) - 1 - LEADS
        splits[path.stem] = [
            {"id": f"{path.stem}-{i:02d}", "window": Window(str(path), i), "week": i // 4} for i in range(count)
        ]
    return splits


def condition(row):
    frames = row["window"].frames()
    ahead = np.stack([np.linspace(1, LEADS, LEADS) / LEADS, np.ones(LEADS)], axis=1).astype(np.float32)
    known = np.isfinite(row["window"].observed()) if len(frames) == 2 + LEADS else np.zeros((LEADS, 2, *CELLS))
    return {
        "history": frames[:2],
        "seen": np.ones_like(frames[:2]),
        "given": np.linspace(-1, 1, CELLS[0] * CELLS[1], dtype=np.float32).reshape(1, *CELLS),
        "ahead": ahead,
        "valid": known.astype(np.float32),
    }


def truth(row):
    return row["window"].frames()[2:]


def values(completion):
    return completion["value"] if completion.dtype.names else completion


def levels(completion):
    """The announced classes, (L, V, Y, X)."""
    if completion.dtype.names:
        return completion["level"].astype(int)
    return np.stack([np.digitize(completion[:, v], EDGES[v]) for v in range(len(VARIABLES))], axis=1)


def observed_levels(window, leads):
    """The observed classes, -1 = not observed."""
    observed = window.observed()[:leads]
    return np.where(np.isfinite(observed), levels(np.nan_to_num(observed)), -1)


@batched
def hit(completions, *, window):
    """1 where the announced class is the observed one."""
    found = []
    for made, at in zip(completions, window, strict=True):
        seen = observed_levels(at, len(made))
        found.append(Score(np.where(seen < 0, np.nan, levels(made) == seen).astype(np.float32)))
    return found


@batched
def alerted(completions, *, window):
    """1 where an observed alert is announced; no other cell counts."""
    found = []
    for made, at in zip(completions, window, strict=True):
        event = observed_levels(at, len(made)) == ALERT
        found.append(Score(np.where(event, levels(made) == ALERT, np.nan).astype(np.float32)))
    return found


@batched
def wrong(completions, *, window):
    """The metric: the share of observed cells whose class is another than announced."""
    found = []
    for made, at in zip(completions, window, strict=True):
        seen = observed_levels(at, len(made))
        cases = int((seen >= 0).sum())
        found.append(Score(float((levels(made) != seen)[seen >= 0].mean()), weight=cases))
    return found


@batched
def detected(completions, *, window):
    """The share of observed alerts that were announced."""
    found = []
    for made, at in zip(completions, window, strict=True):
        event = observed_levels(at, len(made)) == ALERT
        cases = int(event.sum())
        found.append(Score(float((levels(made) == ALERT)[event].mean()) if cases else None, weight=cases))
    return found


def importance(row, label):
    weights = np.isfinite(label).astype(np.float32)
    return weights * (1 + 4 * (levels(label) == ALERT)) if row["weighting"] == "alerts" else weights


def write(rows, completions, path: Path) -> None:
    made = {row["id"]: completion for row, completion in zip(rows, completions, strict=True)}
    if path.suffix == ".nc":
        with path.open("wb") as file:
            np.savez(file, **made)
    else:
        path.mkdir()
        for name, completion in made.items():
            np.save(path / f"{name}.npy", completion)


def read(path: Path, rows):
    found = np.load(path) if path.suffix == ".nc" else {file.stem: np.load(file) for file in path.glob("*.npy")}
    if missing := [row["id"] for row in rows if row["id"] not in found]:
        raise ValueError(f"{path} holds no forecast of {missing[0]} and of {len(missing) - 1} more")
    return [found[row["id"]] for row in rows]


def requests(path: Path):
    if np.load(path).shape[1:] != (2, *CELLS):
        raise ValueError(f"an analysis has the shape (time, 2, {CELLS[0]}, {CELLS[1]})")
    return [{"id": path.stem, "window": Window(str(path), 0), "week": 0}]


def persistence(train, test):
    return [np.repeat(row["window"].frames()[1:2], LEADS, axis=0) for row in test]


def mean_of_all(train, test):
    mean = np.mean([truth(row) for row in train], axis=0)
    return [mean for _ in test]


def gaussian(rivals):
    """The start of another distribution."""
    return rivals.fit(rollout__distribution="gaussian").complete(rivals.test, range(len(rivals.test)))[0]


def shifted(rivals):
    """The start, with the bias that it has on the validation rows taken off."""
    made, _ = rivals.start.complete(rivals.validation, range(len(rivals.validation)))
    bias = np.mean([values(m) - truth(row)[: len(m)] for m, row in zip(made, rivals.validation, strict=True)])
    return [values(m) - bias for m in rivals.start.complete(rivals.test, range(len(rivals.test)))[0]]


def reduce(rows, completions):
    """(L, 2): right and all observed cells of each lead."""
    counts = np.zeros((LEADS, 2))
    for row, made in zip(rows, completions, strict=True):
        seen = observed_levels(row["window"], len(made))
        right = (levels(made) == seen).sum(axis=(1, 2, 3)), (seen >= 0).sum(axis=(1, 2, 3))
        counts[: len(made)] += np.stack(right, axis=1)
    return counts


def tables(rows, arms):
    lines = [
        (name, float(counts[:, 0].sum() / counts[:, 1].sum()), int(counts[:, 1].sum()), None)
        for name, counts in arms.items()
    ]
    by_lead = [(f"{lead + 1}", *(float(c[lead, 0]) for c in arms.values())) for lead in range(LEADS)]
    return [
        Table("right classes", ("arm", "share", "cells", "nothing"), tuple(lines), "Of the observed cells."),
        Table("right cells by lead", ("lead", *arms), tuple(by_lead)),
    ]


def plots(rows, arms):
    at = [6 * (lead + 1) for lead in range(LEADS)]
    lines = {name: (at, [r / n if n else float("nan") for r, n in counts]) for name, counts in arms.items()}
    return [Plot("right by lead", lines, "hours ahead", unit=True)]


def show(row, completion):
    """Lead by lead beside each other, the first variable, dark to bright; (Y, L * X, 3)."""
    maps = np.concatenate(list(values(completion)[:, 0]), axis=1) / 70
    return np.repeat(maps[:, :, None].clip(0, 1), 3, axis=2).astype(np.float32)


APP = App(
    name="tides",
    acts=Forecast(
        prompt=lambda row: f"from {row['id']}",
        condition=condition,
        quantity=lambda options: Quantity(VARIABLES, EDGES, scale=10.0, top=150.0),
        build=lambda model, shape: UNet(shape.inputs, shape.outputs, width=model.width, levels=1),
        importance=importance,
        write=write,
        read=read,
        requests=requests,
    ),
    load=load,
    write_offline=write_offline,
    gold=truth,
    demonstrations=lambda rows, seed: [truth(row) for row in rows],
    rewards={"hit": (1.0, hit), "alerted": (0.0, alerted)},
    outcome="hit",
    metrics={"wrong": wrong, "detected": detected},
    lower=frozenset({"wrong"}),
    options=Options,
    part=lambda row: "early" if row["week"] == 0 else "late",
    cluster="week",
    baselines={"persistence": persistence, "mean of all": mean_of_all},
    learned={"gaussian": gaussian, "shifted": shifted},
    verify=Verification(reduce, tables, plots),
    show=show,
    given=lambda row: show(row, row["window"].frames()[:2]),
)
