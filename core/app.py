"""What an app is, how one is found, and the self-check that every app must pass before it trains.

An app is one object, `APP`, in `apps/<name>/app.py`; the folder's name is the app's name and there is no registry to edit.
The core calls what the object holds and knows nothing else about the domain. Rows are dicts; before anything sees them,
`prepare` adds the options of the config's `task:` section as columns and the rendered `prompt`, so prompts, rewards and
metrics all read the same row.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch

    from core.config import Model
    from core.run.rivals import Rivals

Row = dict[str, Any]
Rows = Sequence[Row]
Completion = (
    Any  # what a policy made: text, or an array: a picture (H, W, 3) in [0, 1], fields (L, V, Y, X) of a forecast
)


AT_ONCE = 128  # gold answers in memory together


class AppError(ValueError):
    """An app, or a row of its data, is not what the core can work with; the message says what and how to mend it."""


@dataclass(frozen=True)
class NoOptions:
    """The `task:` section of an app that has no options."""


@dataclass(frozen=True)
class Language:
    """The policy is a language model: one decision is one token.

    prompt(row) -> str, or a list of chat messages ({"role", "content"}); the row holds the task options as columns.
    tiny_prompt: True if the prompt of the default options is plain text that a from-scratch model can start from.
    """

    prompt: Callable[[Row], str | list[dict[str, str]]]


@dataclass(frozen=True)
class Flow:
    """The policy is a flow-matching model: one decision is one noisy denoising step, and it makes arrays.

    prompt(row) -> the question that a reader of the report sees (the instruction).
    condition(row) -> what the net gets, {"text": str, "image": (H, W, 3) float32, ...}; called when needed, it may read files.
    build(model section) -> the small net of model.path=tiny, its weights drawn from torch's generator.
    """

    prompt: Callable[[Row], str]
    condition: Callable[[Row], dict[str, Any]]
    build: Callable[[Model], torch.nn.Module]


@dataclass(frozen=True)
class Quantity:
    """What a forecast policy is told of what it forecasts. Raises ValueError for edges that are no classes.

    edges: class edges of each variable, ascending, equally many, above 0 and below `top`; class k of a value is the number
    of edges <= it, so that classes are [lo, hi). scale: nets see s = log(1 + x / scale). top: the greatest value there is.
    scale, top and edges have the unit of the variables. costs: C[observed, announced] of every two classes, in [0, 1], for a
    head that decides (`rollout.decide: head`); None: 1 for every wrong class.
    """

    variables: tuple[str, ...]
    edges: tuple[tuple[float, ...], ...]
    scale: float = 10.0
    top: float = 1000.0
    costs: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        if len(self.edges) != len(self.variables) or len(set(map(len, self.edges))) != 1 or not self.edges[0]:
            raise ValueError(
                f"{len(self.variables)} variables have class edges {self.edges}; give each equally many, at least one"
            )
        if self.costs is not None and {len(self.costs), *map(len, self.costs)} != {len(self.edges[0]) + 1}:
            raise ValueError(
                f"costs={self.costs} are no square of {len(self.edges[0]) + 1} classes; give C[observed, announced]"
            )
        if not self.scale > 0:
            raise ValueError(f"scale={self.scale} must be above 0")
        for name, edges in zip(self.variables, self.edges, strict=True):
            bounds = (0.0, *edges, self.top)
            if any(low >= high for low, high in pairwise(bounds)):
                raise ValueError(f"class edges {edges} of {name} must ascend, above 0 and below top={self.top:g}")


class Shape(NamedTuple):
    """Of a step net: channels in and out, and cells (rows x columns)."""

    inputs: int
    outputs: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Forecast:
    """The policy forecasts fields of V variables on Y x X cells at L leads; one decision is the class (or value) of one cell.

    A completion is an array (L', V, Y, X), L' <= L: plain float32, the value of each cell; or with the fields value, level
    (the announced class), exceed (probability of each class edge to be reached) and members (8 equally likely values).

    prompt(row) -> the question that a reader of the report sees (where and when the forecast starts).
    condition(row) -> float32 arrays: history, seen (H, V, Y, X), given (C, Y, X), ahead (L, D), maybe maps_ahead (L, F, Y, X);
        and valid (L, V, Y, X), 1 where a decision carries loss: never an input.
    quantity(task options) -> variables and their classes.
    build(model section, shape) -> the small step net of model.path=tiny, its weights drawn from torch's generator.
    importance(row, label (L, V, Y, X)) -> weights of the supervised loss, of the same shape; 0 = there is no label.
    write(rows, completions, path): forecasts as Zarr or NetCDF, by the path's ending.
    read(path, rows) -> the completions of these rows, of any forecaster; raises ValueError that names what is missing.
    requests(path) -> rows without truth, from an analysis file or folder (make predict).
    """

    prompt: Callable[[Row], str]
    condition: Callable[[Row], dict[str, np.ndarray]]
    quantity: Callable[[Any], Quantity]
    build: Callable[[Model, Shape], torch.nn.Module]
    importance: Callable[[Row, np.ndarray], np.ndarray]
    write: Callable[[Rows, Sequence[Completion], Path], None]
    read: Callable[[Path, Rows], list[Completion]]
    requests: Callable[[Path], list[Row]]


@dataclass(frozen=True)
class Table:
    """One table of a verification. rows: text, numbers, or None where there is nothing to say; each as long as columns."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Plot:
    """One line chart of a verification. lines: {label: (x, y)}, y may hold NaN. unit: the y axis is [0, 1]."""

    title: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    x_label: str
    note: str = ""
    unit: bool = False


@dataclass(frozen=True)
class Verification:
    """What an app says of its held-out forecasts beside the metrics, arm by arm.

    The arms are "before" and "after" ("model" in make eval), then every baseline. reduce(rows, completions) -> what is kept
    of an arm (counts, sums): its completions are dropped then. tables, plots: (rows, {arm: reduced}) -> what is shown.
    """

    reduce: Callable[[Rows, Sequence[Completion]], Any]
    tables: Callable[[Rows, Mapping[str, Any]], list[Table]]
    plots: Callable[[Rows, Mapping[str, Any]], list[Plot]] = lambda rows, arms: []


@dataclass(frozen=True)
class App:
    """One application of the core. See design notes in CONTRIBUTING.md, "How to add an app".

    name: the folder's name under apps/.
    acts: which policy acts, and how a row becomes its input.
    load: load(folder) -> {split: rows}; local files only.
    write_offline: write_offline(folder, seed) writes the offline folder in the real on-disk format, so `load` reads both.
    rewards: {component: (weight, reward)}; the default composite.
    outcome: the component that is the task's own success; must be one of `rewards`.
    metrics: {name: scorer} on held-out rows, the benchmark's own scorer first (the headline); more is better.
    lower: the metrics of which less is better.
    best: {reward or metric: what gold scores at least (of a lower metric: at most)}, where that is not 1 (of a lower one: 0).
    gold: gold(row) -> the completion that deserves the best score, in the row's own answer format.
    demonstrations: demonstrations(rows, seed) -> one completion a row: what the app's annotator wrote, mistakes included;
        what a warm start with `warmup.labels: demonstrations` imitates.
    presets: further composites by name, {preset: {component: (weight, reward)}}; "default" is `rewards`.
    warnings: warnings(weights, outcome, recipe_names) -> sentences about a composite that breaks a promise of the app.
    canaries: attacks and degenerate answers with their expected scores (rewards.canaries.Canary or the like).
    options: the dataclass of the `task:` section.
    part: part(row) -> the name of the share of the held-out rows that a row belongs to; each is also shown apart.
    cluster: the column whose values are resampled together in intervals (a database, a speaker).
    baselines: {name: f(train_rows, test_rows) -> completions, None where the data do not allow it}; rivals that cost nothing.
    learned: {name: f(core.run.rivals.Rivals) -> completions of its test rows}; rivals that need the policy RL starts from, or
        other supervised starts. They stand beside the baselines.
    verify: further tables and plots of the held-out completions.
    show: show(row, completion) -> what the report shows of it: text, or a picture, (H, W, 3) in [0, 1].
    given: given(row) -> what the policy was given beside the prompt, for the report: text, or a picture.
    predict: predict(request) -> a row without gold, from one line (or picture) of `make predict`'s input.
    extract: extract(completion) -> the answer in it, or None; for `make predict`.
    extras: the optional dependencies of pyproject.toml that the app needs.
    tasks: {TASK: {"section.key": value}}, named changes of the config.
    variants: {TASK: another App of this folder}, with its own data, rewards and configs (<TASK>-tiny.yaml, ...).
    variant: the TASK that this one is, if it is a variant; `find` sets it.
    """

    name: str
    acts: Language | Flow | Forecast
    load: Callable[[Path], Mapping[str, Rows]]
    write_offline: Callable[[Path, int], None]
    rewards: Mapping[str, tuple[float, Callable]]
    outcome: str
    metrics: Mapping[str, Callable]
    gold: Callable[[Row], Completion]
    demonstrations: Callable[[Rows, int], list[Completion]]
    presets: Mapping[str, Mapping[str, tuple[float, Callable]]] = field(default_factory=dict)
    warnings: Callable[[Mapping[str, float], str, Sequence[str]], list[str]] = lambda weights, outcome, recipes: []
    canaries: Sequence[Any] = ()
    options: type = NoOptions
    part: Callable[[Row], str] | None = None
    cluster: str | None = None
    lower: frozenset[str] = frozenset()
    best: Mapping[str, float] = field(default_factory=dict)
    baselines: Mapping[str, Callable[[Rows, Rows], Sequence[Completion] | None]] = field(default_factory=dict)
    learned: Mapping[str, Callable[[Rivals], Sequence[Completion]]] = field(default_factory=dict)
    verify: Verification | None = None
    show: Callable[[Row, Completion], Completion] = lambda row, completion: completion
    given: Callable[[Row], Completion] | None = None
    predict: Callable[[Row], Row] | None = None
    extract: Callable[[str], str | None] | None = None
    extras: tuple[str, ...] = ()
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    variants: Mapping[str, App] = field(default_factory=dict)
    variant: str = ""

    def better(self, metric: str) -> str:
        """ "lower" or "higher"."""
        return "lower" if metric in self.lower else "higher"

    @property
    def label(self) -> str:
        """The name, and the variant if it is one: what shared folders (data, warm starts) are called by."""
        return f"{self.name}-{self.variant}" if self.variant else self.name

    def composite(self, preset: str = "default", weights: Mapping[str, float] | None = None):
        """{component: (weight, reward)} of a preset, with single weights replaced. Raises AppError on unknown names."""
        presets = {"default": self.rewards, **self.presets}
        if preset not in presets:
            raise AppError(unknown("rewards.preset", preset, presets))
        composite = dict(presets[preset])
        for component, weight in (weights or {}).items():
            if component not in composite:
                raise AppError(unknown("component in rewards.weights", component, composite))
            composite[component] = (float(weight), composite[component][1])
        if self.outcome not in composite:
            raise AppError(f"preset {preset!r} of app {self.name} lacks the outcome component {self.outcome!r}")
        return composite


def unknown(what: str, got: str, known) -> str:
    """One sentence for a name that is not known, with the nearest one that is, and the list of them unless it is long."""
    known = sorted(map(str, known))
    near = get_close_matches(str(got), known, n=1)
    there = f" (known: {', '.join(known)})" if len(known) <= 30 else ""
    return f"unknown {what} {got!r}{f'; did you mean {near[0]!r}?' if near else ''}{there}"


def names() -> list[str]:
    """Every app there is: the folders of apps/ that hold an app.py."""
    spec = importlib.util.find_spec("apps")
    folders = spec.submodule_search_locations if spec else []
    return sorted(path.parent.name for folder in folders for path in Path(folder).glob("*/app.py"))


def folder(name: str) -> Path:
    """The folder of an app, where its configs lie."""
    return Path(importlib.util.find_spec(f"apps.{name}").submodule_search_locations[0])


def find(name: str, task: str | None = None) -> App:
    """The app of that name, or its variant `task` if it has one.

    Raises AppError with the nearest name, or with the extra to install.
    """
    if name not in names():
        raise AppError(unknown("app", name, names()))
    try:
        app = importlib.import_module(f"apps.{name}.app").APP
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in ("apps", "core", "rewards", "data"):
            raise
        raise AppError(
            f"app {name} needs the package {error.name!r}, which is not installed; `make train APP={name}` installs it "
            f'(or: pip install -e ".[train,<extras of the app>]")'
        ) from error
    if app.name != name:
        raise AppError(f"apps/{name}/app.py calls itself {app.name!r}; its name must be the folder's")
    if task not in app.variants:
        return app
    if app.variants[task].name != name or task in app.tasks:
        raise AppError(
            f"variant {task!r} of apps/{name}/app.py must have the folder's name, and TASK={task} no other sense"
        )
    return replace(app.variants[task], variant=task)


def prepare(app: App, rows: Rows, options: Any) -> list[Row]:
    """Rows with the task options as columns and the rendered prompt; a row's own columns win over nothing: a clash is refused."""
    columns = asdict(options)
    prepared = []
    for index, row in enumerate(rows):
        if "id" not in row:
            raise AppError(f"row {index} of app {app.name} has no 'id'; `load` must give every row one")
        if clash := set(columns) & set(row):
            raise AppError(f"task option {sorted(clash)[0]!r} is also a column of the data; rename the option")
        full = {**row, **columns}
        try:
            full["prompt"] = app.acts.prompt(full)
        except KeyError as error:
            raise AppError(
                f"row {row['id']}: the prompt needs the column {error.args[0]!r}; the row has: {', '.join(sorted(row))}"
            ) from error
        if not isinstance(full["prompt"], str | list):
            raise AppError(f"row {row['id']}: the prompt is {full['prompt']!r}; it must be text or a list of messages")
        prepared.append(full)
    return prepared


@dataclass(frozen=True)
class Finding:
    """One line of the self-check: what was checked, whether it held, and the evidence."""

    what: str
    ok: bool
    detail: str = ""


def self_check(app: App, rows: Rows, scorer, metrics_scorer, canary_rows: int = 4) -> list[Finding]:
    """Gold scores its best (`App.best`) on every row, metrics agree, canaries score as they should. Loads no model.

    scorer, metrics_scorer: core.scoring.Scorer over the rewards and over the metrics.
    Raises BrokenRowError (from the scorer) if a row's gold does not run; that names the row.
    """
    findings = []
    judged = ([], [])  # [reward, metric]: (values, failed, reasons) of a few rows at a time
    for part in (rows[first : first + AT_ONCE] for first in range(0, len(rows), AT_ONCE)):
        gold = [app.gold(row) for row in part]
        for scores, kept in zip((scorer.score(gold, part), metrics_scorer.score(gold, part)), judged, strict=True):
            kept.append((scores.values, scores.failed, scores.reasons))
    for title, judge, scores in (("reward", scorer, judged[0]), ("metric", metrics_scorer, judged[1])):
        unscored = sum(int(failed.sum()) for _, failed, _ in scores)
        for k, name in enumerate(judge.names):
            lower = title == "metric" and name in app.lower
            best = app.best.get(name, 0 if lower else 1)
            values = [float(value) for part, _, _ in scores for value in part[:, k]]
            low = [i for i, v in enumerate(values) if v == v and (v > best if lower else v < best)]
            detail = f"{len(rows)} rows" if len(rows) else "there are no rows"
            if low:
                i, side = low[0], "above" if lower else "below"
                reason = [said for _, _, part in scores for said in part][i].get(name, "")
                detail = (
                    f"{len(low)} of {len(rows)} rows {side} {best:g}; row {rows[i]['id']}: {values[i]:.3f} {reason}"
                )
            if unscored:
                detail += f"; {unscored} rows could not be judged"
            findings.append(
                Finding(f"gold scores {best:g} on {title} {name}", bool(rows) and not low and not unscored, detail)
            )
    sample = list(rows[:: max(1, len(rows) // max(1, canary_rows))])[:canary_rows]
    for canary in app.canaries if sample else ():
        if canary.component not in scorer.names:
            continue
        k = scorer.names.index(canary.component)
        scores = scorer.score([canary.completion(row) for row in sample], sample)
        values = [v for v, failed in zip(scores.values[:, k], scores.failed, strict=True) if v == v or failed]
        bad = [v for v in values if not (canary.at_least <= v <= canary.at_most)]  # where it applies
        got = f"{min(values, default=0):.2f}..{max(values, default=0):.2f}"
        detail = f"{canary.component} {got}, allowed {canary.at_least:g}..{canary.at_most:g}"
        findings.append(Finding(f"canary {canary.name}", not bad, detail))
    return findings
