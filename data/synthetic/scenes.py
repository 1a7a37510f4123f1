"""Makes folders of synthetic pictures in the formats of data/edit_folder.py and data/super_resolution.py.

`write_edits` draws scenes of a few coloured shapes and edits one shape by an instruction, with the exact picture after
the edit; `write_super_resolution` draws detailed and smooth pictures and shrinks them. Both are the same byte for byte
for a seed (and a version of pillow), and train and test share no scene. An edit is checked before it is written: each
object is found by its colour alone, exactly, in the source and in the target.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np

from .folder import whole
from .scene_edits import random_thing, scene_with
from .scene_phrases import instruction
from .scene_shapes import COLOURS, SHAPES, TEXTURES, Scene, Thing

WEIGHTS = {"translate": 0.60, "resize": 0.25, "rotate": 0.15}


def write_edits(
    folder: str | Path,
    seed: int = 0,
    *,
    size: int = 32,
    train_rows: int = 1200,
    test_rows: int = 240,
    edits_per_scene: int = 4,
    weights: Mapping[str, float] = WEIGHTS,
    distances: Sequence[int] | None = None,
    factors: Sequence[float] = (0.6, 1.5),
    angles: Sequence[int] = (-90, -45, 45, 90),
    novel_share: float = 0.3,
) -> None:
    """Writes an edit folder with train.jsonl and test.jsonl, whole or not at all.

    size: pixels of a side; weights: share of the rows by operation; distances: pixels, by default 4, 6 and 8 on a
    canvas of 32 and in proportion on others; angles: degrees, clockwise; novel_share: test rows worded as no train row.
    The edits of a scene differ in their targets and fall on different objects where they can.
    Raises FileExistsError if the folder exists, ValueError for settings that no scene can meet.
    """
    if unknown := set(weights) - set(WEIGHTS):
        raise ValueError(f"weights names {sorted(unknown)}; the operations are {', '.join(WEIGHTS)}")
    if distances is None:
        distances = [round(pixels * size / 32) for pixels in (4, 6, 8)]
    with whole(folder, "pictures") as partial:
        for split, rows, share in (("train", train_rows, 0.0), ("test", test_rows, novel_share)):
            random = Random(f"edits/{seed}/{split}")
            deck, wordings = _deck(weights, rows, random), _deck({True: share, False: 1 - share}, rows, random)
            lines, given = [], Counter()
            while len(lines) < rows:
                at = len(lines)
                operations = deck[at : at + edits_per_scene]
                name = f"{split}-{at // edits_per_scene:05d}"
                scene, edits = scene_with(operations, size, distances, factors, angles, random, given)
                lines += _write_scene(partial, name, scene, edits, wordings[at : at + edits_per_scene], random)
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (partial / f"{split}.jsonl").write_text(text, encoding="utf-8")


def write_super_resolution(
    folder: str | Path,
    seed: int = 0,
    *,
    size: int = 32,
    train: int = 600,
    test: int = 120,
    scales: Sequence[int] = (4,),
) -> None:
    """Writes DIV2K_train_HR, DIV2K_train_LR_bicubic/X4, DIV2K_valid_HR, ... with pictures of size x size pixels.

    scales: each low-resolution folder; a scale must divide size. Low resolution is pillow's bicubic, which smooths
    before it shrinks. Raises FileExistsError if the folder exists, ValueError for a scale that does not divide.
    """
    from PIL import Image

    for scale in scales:
        if scale < 2 or size % scale:
            raise ValueError(f"scale {scale} does not shrink size={size} to whole pixels; take a divisor from 2 up")
    with whole(folder, "pictures") as partial:
        number = 0
        for split, pictures in (("train", train), ("valid", test)):
            random = Random(f"super-resolution/{seed}/{split}")
            high = partial / f"DIV2K_{split}_HR"
            high.mkdir()
            low = {scale: partial / f"DIV2K_{split}_LR_bicubic" / f"X{scale}" for scale in scales}
            for place in low.values():
                place.mkdir(parents=True)
            for _ in range(pictures):
                number += 1
                picture = Image.fromarray(detailed_picture(size, random))
                picture.save(high / f"{number:04d}.png")
                for scale, place in low.items():
                    small = picture.resize((size // scale, size // scale), Image.Resampling.BICUBIC)
                    small.save(place / f"{number:04d}x{scale}.png")


def detailed_picture(size: int, random: Random) -> np.ndarray:
    """(size, size, 3) uint8: the middle of a larger picture of overlapping things, most of them smooth.

    Drawn at twice the size and averaged, so edges are soft. Textures are of 2 to 6 pixels: some survive shrinking.
    """
    wide = 3 * size  # twice the size and half as much again
    things = [Thing("square", "blue", "plain", 2 * wide, 2 * wide, (wide / 2, wide / 2))]  # the ground
    things += [random_thing(shape, "blue", wide, random) for shape in random.choices(SHAPES, k=random.randint(2, 5))]
    canvas = np.zeros((wide, wide, 3))
    for thing in things:
        grow = random.uniform(0.8, 2.0)
        thing = replace(
            thing,
            colour=random.choice(list(COLOURS)),
            texture=random.choice(("plain", "shaded") if random.random() < 0.6 else TEXTURES[1:]),
            width=thing.width * grow,
            height=thing.height * grow,
            angle=random.randrange(360),
            zoom=random.uniform(0.7, 2.0),
            grain=random.randrange(2**32),
        )
        thing.paint(canvas, thing.covers(wide)[1:-1, 1:-1], contrast=0.3)
    half = size // 2
    middle = canvas[half : half + 2 * size, half : half + 2 * size].reshape(size, 2, size, 2, 3).mean((1, 3))
    return np.rint(middle.clip(0, 255)).astype(np.uint8)


def mistaken_targets(rows: Sequence[Mapping], seed: int, share: float) -> list[str]:
    """A target for each row, as a careless annotator gives them: for a share of the rows that of another instruction.

    The other instruction is one about the same scene, so a mistake is a picture that is there already. share: 0..1 of
    the rows whose scene has another target among `rows`; the rest keep their own. Raises ValueError for a share outside
    0..1 or a row without target.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} is not a share; give a number from 0 to 1")
    by_scene: dict[str, list[str]] = {}
    for row in rows:
        if row["target"] is None:
            raise ValueError(f"row {row['id']} has no target; mistaken_targets needs one in every row")
        by_scene.setdefault(row["scene"], []).append(row["target"])
    others = [[target for target in by_scene[row["scene"]] if target != row["target"]] for row in rows]
    random = Random(f"mistaken/{seed}")
    able = [at for at, choice in enumerate(others) if choice]
    wrong = set(random.sample(able, round(share * len(able))))
    return [random.choice(others[at]) if at in wrong else row["target"] for at, row in enumerate(rows)]


def _write_scene(partial: Path, name: str, scene: Scene, edits, wordings: Sequence[bool], random: Random) -> list[dict]:
    folder = partial / name.split("-")[0] / name.split("-")[1]
    folder.mkdir(parents=True)
    relative = folder.relative_to(partial).as_posix()
    before = scene.draw()
    _check(scene, before)
    _save(folder / "source.png", before)
    for number in {edit.number for edit in edits}:
        _save(folder / f"mask{number}.png", scene.things[number].mask(scene.size))
    lines = []
    for at, (edit, novel) in enumerate(zip(edits, wordings, strict=True)):
        after = scene.with_thing(edit.number, edit.thing)
        picture = after.draw()
        _check(after, picture)
        mask = edit.thing.mask(scene.size)
        _save(folder / f"target{at}.png", picture)
        _save(folder / f"target_mask{at}.png", mask)
        thing = scene.things[edit.number]
        names = [thing.name, f"{thing.colour} {thing.shape}"]
        others = [colour for colour in scene.palette if colour != COLOURS[thing.colour]]
        lines.append(
            {
                "source": f"{relative}/source.png",
                "instruction": instruction(edit.operation, names, edit.amounts, random, novel),
                "target": f"{relative}/target{at}.png",
                "geometry": {
                    "operation": edit.operation,
                    "object": thing.name,
                    "box": thing.box(scene.size),
                    "target_box": edit.thing.box(scene.size),
                    **edit.amounts,
                    "mask": f"{relative}/mask{edit.number}.png",
                    "target_mask": f"{relative}/target_mask{at}.png",
                    "colour": COLOURS[thing.colour],
                    "palette": others,
                },
                "scene": name,
                "novel": novel,
            }
        )
    return lines


def _check(scene: Scene, picture: np.ndarray) -> None:
    """Raises AssertionError unless the nearest colour of the palette finds every thing, pixel for pixel."""
    distance = ((picture[:, :, None] - np.array(scene.palette, float)) ** 2).sum(-1)
    found = distance.argmin(-1)
    for number, thing in enumerate(scene.things, start=1):
        if not np.array_equal(found == number, thing.mask(scene.size)):
            raise AssertionError(f"the {thing.name} of a scene is not what its colour finds; COLOURS are too near")


def _deck(weights: Mapping, rows: int, random: Random) -> list:
    """`rows` keys in random order, in shares as near to the weights as whole numbers are (largest remainder)."""
    total = sum(weights.values())
    if not weights or total <= 0 or min(weights.values()) < 0:
        raise ValueError(f"weights={dict(weights)} are no shares; give numbers of at least 0, not all 0")
    exact = {key: rows * weight / total for key, weight in weights.items()}
    counts = {key: math.floor(share) for key, share in exact.items()}
    short = rows - sum(counts.values())
    for key in sorted(exact, key=lambda key: counts[key] - exact[key])[:short]:
        counts[key] += 1
    deck = [key for key, count in counts.items() for _ in range(count)]
    random.shuffle(deck)
    return deck


def _save(path: Path, pixels: np.ndarray) -> None:
    from PIL import Image

    Image.fromarray(pixels.astype(np.uint8) * 255 if pixels.dtype == bool else pixels).save(path, compress_level=1)
