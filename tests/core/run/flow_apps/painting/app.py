"""A flow app for tests: paint pictures of 8x8 as bright as told. A run takes about two seconds.

Its variant paints them as bright as they were, without being told.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from core.app import App, Flow
from core.policy.tiny_flow import TinyFlow
from rewards.score import batched

SIZE, LEVELS = 8, {"dark": 0.2, "middle": 0.5, "bright": 0.8}


def picture(path):
    return np.asarray(Image.open(path).convert("RGB"), np.float32) / 255


def gold(row):
    return np.full((SIZE, SIZE, 3), LEVELS[row["told"]], np.float32)


def write_offline(folder: Path, seed: int) -> None:
    chance = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for split, count in (("train", 24), ("test", 16)):
        rows = []
        for i in range(count):
            name = f"{split}-{i}.png"
            Image.fromarray(chance.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(folder / name)
            rows.append({"id": f"{split}-{i}", "source": name, "told": [*LEVELS][i % 3], "scene": i % 12})
        (folder / f"{split}.json").write_text(json.dumps(rows))


def load(folder: Path):
    splits = {path.stem: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))}
    return {split: [{**row, "source": f"{folder}/{row['source']}"} for row in rows] for split, rows in splits.items()}


@batched
def nearness(completions, *, told):
    """1 for the level that was told, everywhere."""
    return [1 - float(abs(made - LEVELS[word]).mean()) for made, word in zip(completions, told, strict=True)]


@batched
def decibels(completions, *, told):
    """The metric; 60 at best."""
    errors = [((made - LEVELS[word]) ** 2).mean() for made, word in zip(completions, told, strict=True)]
    return [float(min(60.0, -10 * np.log10(max(error, 1e-12)))) for error in errors]


def build(model):
    return TinyFlow(text=True, width=8, levels=1, words=2, buckets=64)


APP = App(
    name="painting",
    acts=Flow(
        prompt=lambda row: f"paint it {row['told']}",
        condition=lambda row: {"image": picture(row["source"]), "text": row["told"]},
        build=build,
    ),
    load=load,
    write_offline=write_offline,
    gold=gold,
    demonstrations=lambda rows, seed: [gold(row) for row in rows],
    rewards={"nearness": (1.0, nearness)},
    outcome="nearness",
    metrics={"decibels": decibels},
    best={"decibels": 60.0},
    cluster="scene",
    baselines={"as it was": lambda train, test: [picture(row["source"]) for row in test]},
    given=lambda row: picture(row["source"]),
    predict=lambda request: {"source": request["source"], "told": request["instruction"]},
    extras=("flow",),
)
UNTOLD = replace(
    APP,
    acts=Flow(
        prompt=lambda row: "paint it",
        condition=lambda row: {"image": picture(row["source"])},
        build=lambda model: TinyFlow(text=False, width=8, levels=1),
    ),
)
APP = replace(APP, variants={"untold": UNTOLD})
