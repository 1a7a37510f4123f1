"""Object edits (move, rotate, resize one object of a picture by instruction), from a local folder of triplets.

    <folder>/<split>.jsonl      one JSON object a line; images anywhere below the folder, paths relative to it
    {"source": "a/in.png", "instruction": "move the cup 40 pixels to the left", "target": "a/out.png",
     "geometry": {"operation": "translate", "object": "cup", "box": [80, 60, 120, 110], "direction": "left", "distance": 40}}

The task, its operations and its spatial rewards are those of Talk2Move (Tan et al. 2026, arXiv 2601.02356). Its code
(amazon-science/talk2move) brings no pictures: it reads `<split>_metadata.jsonl` of its own. Keys of both formats, and
the licence of the parts: data/README.md. `data.synthetic.scenes.write_edits` writes this format. Loading downloads
nothing; it reads the headers of images and no pixels. Not read: the content of masks, and what an instruction says.
"""

import json
import math
import os
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path

from .image_header import image_size

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# operation: the keys of `geometry` that say how far; no other operation may have them
AMOUNTS = {"translate": ("direction", "distance"), "rotate": ("angle",), "resize": ("factor",)}
LINE = ("id", "source", "instruction", "target", "geometry", "scene", "novel")
GEOMETRY = ("operation", "object", "box", "target_box", *sum(AMOUNTS.values(), ()))
GEOMETRY += ("mask", "target_mask", "colour", "palette")
SLACK = 1.0  # pixels by which two boxes may miss the stated distance or factor: boxes are rounded


def load(folder: str | Path) -> dict[str, list[dict]]:
    """{split: rows}, a split for every .jsonl file of the folder.

    A row: id ("train-00012" unless the line names one), source, target, mask, target_mask (absolute paths),
    instruction, operation ("translate" | "rotate" | "resize"), object (phrase: "red disc"), box, target_box
    ([x1, y1, x2, y2] pixels, x2 and y2 exclusive; before and after the edit), direction ("left" | "right" | "up" |
    "down"), distance (pixels), angle (degrees, positive is clockwise), factor (of both sides, 1.5 = larger), colour
    ([r, g, b] 0..255 of the object), palette (the other colours of the picture, background first), scene (rows of one
    scene are one cluster; the source's path unless the line names one), novel (True: worded as train never is).
    None where the line says nothing and nothing follows. What follows: the target_box of a translation or a resize, and
    direction, distance and factor from two boxes.

    Raises FileNotFoundError for a missing folder or image, ValueError for anything else; both name file, line and fix.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder; give the folder that holds train.jsonl, test.jsonl and their images "
            "(data/README.md shows the format; data.synthetic.scenes.write_edits makes one offline)"
        )
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no .jsonl file; an edit folder has one for each split (data/README.md shows the format)"
        )
    sizes: dict[Path, tuple[int, int]] = {}
    splits, seen = {}, {}
    for path in files:
        rows = splits[path.stem] = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            row = _row(line, folder, place, f"{path.stem}-{len(rows):05d}", sizes)
            if row["id"] in seen:
                raise ValueError(f'{place}: "id" is {row["id"]!r}, which {seen[row["id"]]} has too; ids must differ')
            seen[row["id"]] = place
            rows.append(row)
        if not rows:
            raise ValueError(f"{path} holds no line; write one JSON object a line or remove the file")
    return splits


def moved(box: list, direction: str, distance: float) -> list:
    """The box after a translation by `distance` pixels."""
    dx, dy = (distance * sign for sign in DIRECTIONS[direction])
    x1, y1, x2, y2 = box
    return [x1 + dx, y1 + dy, x2 + dx, y2 + dy]


def resized(box: list, factor: float) -> list[int]:
    """The box after a resize of both sides about its centre: sides rounded to whole pixels (half up, at least 1).

    Where the new side cannot have the old centre (it changes by an odd number), the first corner is rounded down.
    """
    corner, sides = [], []
    for low, high in ((box[0], box[2]), (box[1], box[3])):
        side = max(1, math.floor((high - low) * factor + 0.5))
        corner.append(math.floor((low + high - side) / 2))
        sides.append(side)
    return [*corner, corner[0] + sides[0], corner[1] + sides[1]]


def _row(line: str, folder: Path, place: str, default_id: str, sizes: dict) -> dict:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}; write one JSON object a line") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{place} holds a {type(entry).__name__}; write one JSON object a line")
    _known(entry, LINE, place, "key")
    for key in ("source", "instruction", "geometry"):
        if entry.get(key) is None:
            raise ValueError(f'{place} has no "{key}"; every line needs source, instruction and geometry')
    given = entry["geometry"]
    if not isinstance(given, dict):
        raise ValueError(f'{place}: "geometry" is {given!r}; it must be an object with operation, object, box, ...')
    _known(given, GEOMETRY, place, "key of geometry")
    for key in ("operation", "object"):
        if given.get(key) is None:
            raise ValueError(f'{place} has no "geometry.{key}"; every geometry needs operation and object')
    for key, value in (("instruction", entry["instruction"]), ("geometry.object", given["object"])):
        _text(value, key, place)
    for key in ("id", "scene"):
        if entry.get(key) is not None:
            _text(entry[key], key, place)
    if not isinstance(entry.get("novel", False), bool):
        raise ValueError(f'{place}: "novel" is {entry["novel"]!r}; it must be true or false')
    images = {
        "source": entry["source"],
        "target": entry.get("target"),
        "mask": given.get("mask"),
        "target_mask": given.get("target_mask"),
    }
    paths = {key: None if value is None else _image(value, folder, place, key) for key, value in images.items()}
    width, height = _size(paths["source"], place, "source", sizes)
    for key in ("target", "mask", "target_mask"):
        if paths[key] and (size := _size(paths[key], place, key, sizes)) != (width, height):
            raise ValueError(
                f'{place}: "{key}" {images[key]} has {size[0]}x{size[1]} pixels and the source {width}x{height}; '
                "resize it to the source, whose pixels the boxes count"
            )
    geometry = {key: given.get(key) for key in GEOMETRY} | {key: paths[key] for key in ("mask", "target_mask")}
    for key in ("box", "target_box"):
        if geometry[key] is not None:
            _box(geometry[key], key, width, height, place)
    _colours(geometry, place)
    _amounts(geometry, place)
    _complete(geometry, width, height, place)
    return {
        "id": entry.get("id") or default_id,
        "source": str(paths["source"]),
        "target": paths["target"] and str(paths["target"]),
        "instruction": entry["instruction"],
        **geometry,
        "mask": geometry["mask"] and str(geometry["mask"]),
        "target_mask": geometry["target_mask"] and str(geometry["target_mask"]),
        "scene": entry.get("scene") or os.path.normpath(entry["source"]),
        "novel": entry.get("novel", False),
    }


def _amounts(geometry: dict, place: str) -> None:
    """Refuses an operation, direction, distance, angle or factor that is none, or belongs to another operation."""
    operation = geometry["operation"]
    if operation not in list(AMOUNTS):
        raise ValueError(_unknown(place, '"geometry.operation"', operation, AMOUNTS))
    for owner, keys in AMOUNTS.items():
        for key in keys:
            if owner != operation and geometry[key] is not None:
                raise ValueError(
                    f'{place}: "geometry.{key}" is {geometry[key]!r}, but the operation is {operation!r}; '
                    f"remove it or say operation {owner!r}"
                )
    direction = geometry["direction"]
    if direction is not None and direction not in list(DIRECTIONS):
        raise ValueError(_unknown(place, '"geometry.direction"', direction, DIRECTIONS))
    for key, rule, fits in (
        ("distance", "a number of pixels above 0", lambda n: n > 0),
        ("angle", "degrees between -360 and 360, clockwise, and not 0", lambda n: 0 < abs(n) < 360),
        ("factor", "a ratio of sides above 0 and not 1", lambda n: n > 0 and n != 1),
    ):
        value = geometry[key]
        if value is not None and not (_number(value) and fits(value)):
            raise ValueError(f'{place}: "geometry.{key}" is {value!r}; it must be {rule}')


def _complete(geometry: dict, width: int, height: int, place: str) -> None:
    """Fills in what follows from the rest; refuses boxes that say something else than the amounts do."""
    box, target = geometry["box"], geometry["target_box"]
    operation = geometry["operation"]
    if operation == "rotate":
        if geometry["angle"] is None:
            raise ValueError(f'{place} has no "geometry.angle"; a rotation needs it, for no two boxes tell an angle')
        return
    if box and target:
        (_from_move if operation == "translate" else _from_resize)(geometry, place)
    key = AMOUNTS[operation][0]
    if geometry[key] is None:
        raise ValueError(f'{place} has no "geometry.{key}"; name it, or give both box and target_box, which tell it')
    if box and not target and geometry[AMOUNTS[operation][-1]] is not None:
        if operation == "translate":
            target, cause = moved(box, geometry["direction"], geometry["distance"]), "distance"
        else:
            target, cause = resized(box, geometry["factor"]), "factor"
        if not (target[0] >= 0 and target[1] >= 0 and target[2] <= width and target[3] <= height):
            raise ValueError(
                f'{place}: "geometry.{cause}" {geometry[cause]} takes box {box} to {target}, out of the image of '
                f"{width}x{height} pixels; correct it, or give the target_box that is meant"
            )
        geometry["target_box"] = target


def _from_move(geometry: dict, place: str) -> None:
    box, target = geometry["box"], geometry["target_box"]
    dx, dy = ((target[i] + target[i + 2] - box[i] - box[i + 2]) / 2 for i in (0, 1))
    along = {name: dx * sx + dy * sy for name, (sx, sy) in DIRECTIONS.items()}
    nearest = max(along, key=along.get)
    if along[nearest] == 0:
        raise ValueError(f'{place}: "geometry.target_box" {target} has the centre of box {box}; a translation moves it')
    direction = geometry["direction"] or nearest
    if along[direction] < along[nearest]:
        raise ValueError(
            f'{place}: "geometry.direction" is {direction!r}, but target_box {target} lies {nearest} of box {box}; '
            "correct the direction or a box"
        )
    distance = along[nearest]
    if geometry["distance"] is not None and abs(distance - geometry["distance"]) > SLACK:
        raise ValueError(
            f'{place}: "geometry.distance" is {geometry["distance"]}, but from box {box} to target_box {target} it is '
            f"{distance:g} pixels {direction}; correct the distance or a box"
        )
    geometry["direction"] = direction
    if geometry["distance"] is None:
        geometry["distance"] = distance


def _from_resize(geometry: dict, place: str) -> None:
    box, target = geometry["box"], geometry["target_box"]
    before, after = ([b[2] - b[0], b[3] - b[1]] for b in (box, target))
    factor = geometry["factor"]
    told = math.sqrt(after[0] * after[1] / (before[0] * before[1])) if factor is None else factor
    if any(abs(new - told * old) > SLACK for old, new in zip(before, after, strict=True)):
        ratios = " and ".join(f"{new / old:.3g}" for old, new in zip(before, after, strict=True))
        stated = "needs one factor" if factor is None else f'states "geometry.factor" {factor}'
        raise ValueError(
            f"{place} {stated}, but from box {box} to target_box {target} the sides change by {ratios}; "
            "correct the factor or a box"
        )
    if told == 1:
        raise ValueError(f'{place}: "geometry.target_box" {target} is as large as box {box}; a resize changes it')
    geometry["factor"] = told


def _image(value, folder: Path, place: str, key: str) -> Path:
    _text(value, key, place)
    relative = Path(os.path.normpath(value))
    if relative.is_absolute() or relative.parts[:1] == ("..",):
        raise ValueError(f'{place}: "{key}" is {value!r}, which leaves the folder; put the image below {folder}')
    if not (folder / relative).is_file():
        raise FileNotFoundError(f'{place}: "{key}" is {value!r}, but there is no file {folder / relative}')
    return folder / relative


def _size(path: Path, place: str, key: str, sizes: dict) -> tuple[int, int]:
    """(width, height) from the header of an image, read once a file."""
    if path not in sizes:
        try:
            sizes[path] = image_size(path)
        except ValueError as error:
            raise ValueError(f'{place}: "{key}" {error}') from None
    return sizes[path]


def _box(box, key: str, width: int, height: int, place: str) -> None:
    if not (isinstance(box, list) and len(box) == 4 and all(map(_number, box))):
        raise ValueError(f'{place}: "geometry.{key}" is {box!r}; it must be [x1, y1, x2, y2] in pixels')
    x1, y1, x2, y2 = box
    if not (x1 < x2 and y1 < y2):
        raise ValueError(f'{place}: "geometry.{key}" is {box}; it must be [x1, y1, x2, y2] with x1 < x2 and y1 < y2')
    if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
        raise ValueError(f'{place}: "geometry.{key}" is {box}, not inside the image of {width}x{height} pixels')


def _colours(geometry: dict, place: str) -> None:
    colour, palette = geometry["colour"], geometry["palette"]
    if palette is not None and not (isinstance(palette, list) and palette):
        raise ValueError(
            f'{place}: "geometry.palette" is {palette!r}; it must be a list of [r, g, b], background first'
        )
    named = [("colour", colour)] * (colour is not None) + [("palette", other) for other in palette or []]
    for key, value in named:
        whole = isinstance(value, list) and len(value) == 3 and all(type(part) is int for part in value)
        if not (whole and all(0 <= part <= 255 for part in value)):
            raise ValueError(f'{place}: "geometry.{key}" holds {value!r}; a colour is [r, g, b], whole, 0 to 255')
    if any(a == b for a, b in pairwise(sorted(value for _, value in named))):
        raise ValueError(
            f'{place}: "geometry.palette" {palette} with the object\'s colour {colour} names a colour twice; '
            "the palette holds the other colours of the picture, each once"
        )


def _text(value, key: str, place: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'{place}: "{key}" is {value!r}; it must be text')


def _number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _known(entry: dict, keys: tuple, place: str, what: str) -> None:
    for key in entry:
        if key not in keys:
            raise ValueError(_unknown(place, f"a {what}", key, keys))


def _unknown(place: str, what: str, got, known) -> str:
    near = get_close_matches(str(got).lower(), known, n=1)
    asked = f"; did you mean {near[0]!r}?" if near else ""
    return f"{place}: {what} is {got!r}, which is unknown{asked} (known: {', '.join(known)})"
