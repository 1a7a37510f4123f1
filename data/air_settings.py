"""archive.yaml of an air-quality archive: its keys, their defaults, and what is refused (data/air_quality.py shows it)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from . import cf, faker_air


@dataclass(frozen=True)
class Split:
    """Times from .. to, both included; inits every `every_h` hours counted from `start`."""

    start: np.datetime64
    end: np.datetime64
    every_h: int


@dataclass(frozen=True)
class Settings:
    """archive.yaml; see data/air_quality.py for what the keys mean."""

    step_h: int = 6
    history: int = 2
    leads: int = 20
    coarsen: int = 1
    splits: Mapping[str, Split] = field(default_factory=dict)
    regions: Mapping[int, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    stations: Mapping[str, Any] = field(default_factory=dict)
    normals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    like: Path | None = None


def read_settings(folder: Path) -> Settings:
    """archive.yaml of the folder, with what it leaves out taken from the archive that its `like` names.

    A FAKER-Air folder needs none. Raises ValueError naming file, key, value and fix.
    """
    path = folder / "archive.yaml"
    if not path.is_file():
        if faker_air.is_faker_air(folder):
            return _settings(faker_air.SETTINGS, path)
        raise ValueError(
            f"{path} is not there; it names the splits: splits: {{train: {{from: 2019-01-01, to: 2021-12-26, every_h: 6}}, ...}}"
        )
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path} holds a {type(given).__name__}; write keys and values (step_h: 6)")
    if faker_air.is_faker_air(folder):
        given = {**faker_air.SETTINGS, **given}
    return _settings(given, path)


def _settings(given: dict, path: Path) -> Settings:
    known = [one.name for one in fields(Settings)]
    for key in given:
        if key not in known:
            raise ValueError(f"{path}: {key!r} is no key{cf.unknown(key, known)}")
    if given.get("like") is not None:
        like = (path.parent / given["like"]).resolve()
        if not like.is_dir():
            raise ValueError(f"{path}: like is {given['like']!r}, which is no folder; name the archive trained on")
        base = read_settings(like)
        for key in ("step_h", "history", "leads", "coarsen"):
            if key in given and given[key] != getattr(base, key):
                raise ValueError(
                    f"{path}: {key} is {given[key]} and {getattr(base, key)} in {like}, which it is like; leave it out"
                )
        given = {one.name: getattr(base, one.name) for one in fields(Settings)} | given | {"like": like}
    for key in ("step_h", "history", "leads", "coarsen"):
        value = given.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{path}: {key} is {value!r}; it must be a whole number of at least 1")
    for key in ("splits", "regions", "names", "stations", "normals"):
        if not isinstance(given.setdefault(key, {}) or {}, Mapping):
            raise ValueError(f"{path}: {key} is {given[key]!r}; it must be a mapping")
        given[key] = dict(given[key] or {})
    given["splits"] = {
        name: one if isinstance(one, Split) else _split(name, one, path) for name, one in given["splits"].items()
    }
    for name, normal in given["normals"].items():
        if not (isinstance(normal, list | tuple) and len(normal) == 2 and normal[1] > 0):
            raise ValueError(
                f"{path}: normals of {name} are {normal!r}; they must be [mean, standard deviation above 0]"
            )
    settings = Settings(**given)
    _check_splits(settings, path)
    return settings


def _split(name: str, given: Any, path: Path) -> Split:
    if not isinstance(given, dict) or set(given) - {"from", "to", "every_h"} or not {"from", "to"} <= set(given):
        raise ValueError(f"{path}: split {name} is {given!r}; it must be {{from: a time, to: a time, every_h: hours}}")
    try:
        start, end = (np.datetime64(str(given[key]).replace(" ", "T")) for key in ("from", "to"))
    except ValueError:
        raise ValueError(
            f"{path}: split {name} is from {given['from']!r} to {given['to']!r}; write times as 2019-01-01 or 2019-01-01T06"
        ) from None
    if np.datetime_data(end.dtype)[0] == "D":  # a day, with all its hours
        end = end + np.timedelta64(86399, "s")
    start, end = start.astype("datetime64[ns]"), end.astype("datetime64[ns]")
    every = given.get("every_h", 6)
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"{path}: every_h of split {name} is {every!r}; it must be a whole number of hours")
    if not end > start:
        raise ValueError(f"{path}: split {name} ends at {end} and begins at {start}; it must end later")
    return Split(start, end, every)


def _check_splits(settings: Settings, path: Path) -> None:
    """Refuses splits that overlap, that follow training too soon, or whose inits fall between the steps."""
    splits = sorted(settings.splits.items(), key=lambda item: item[1].start)
    for (one, a), (other, b) in pairwise(splits):
        if b.start <= a.end:
            raise ValueError(
                f"{path}: splits {one} and {other} overlap ({one} ends {a.end}, {other} begins {b.start}); move one"
            )
    lead = np.timedelta64(settings.leads * settings.step_h, "h")
    train = settings.splits.get("train")
    for name, split in splits:
        if split.every_h % settings.step_h:
            raise ValueError(
                f"{path}: every_h of split {name} is {split.every_h}; it must be a multiple of step_h={settings.step_h}"
            )
        if train is not None and name != "train" and split.start - train.end < lead:
            raise ValueError(
                f"{path}: split {name} begins {split.start}; it must begin at least the lead time ({lead}) after train ends, "
                f"{train.end}, that is from {train.end + lead} on"
            )
