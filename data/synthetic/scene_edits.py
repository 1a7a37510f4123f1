"""Which edits a random scene allows: an object moved, resized or turned stays whole and apart from the others."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from data.edit_folder import DIRECTIONS, moved, resized

from .scene_shapes import COLOURS, GROUNDS, SHAPES, TEXTURES, Scene, Thing

GAP = 1  # free pixels between the boxes of any two things
TRIES = 2000  # scenes drawn before giving up on one that allows the edits asked for


@dataclass(frozen=True)
class Edit:
    """Thing `number` of a scene becomes `thing`; amounts: direction and distance, angle, or factor."""

    operation: str
    number: int
    thing: Thing
    amounts: dict

    @property
    def said(self) -> tuple:
        return tuple(self.amounts.values())

    def mask(self, size: int) -> bytes:
        return self.thing.mask(size).tobytes()


def random_scene(size: int, random: Random) -> Scene:
    """Up to four things of different colours and shapes on a ground, GAP pixels apart and inside the canvas."""
    ground, texture = random.choice(GROUNDS), random.choice((*TEXTURES, "shaded"))
    wanted = random.choice((2, 3, 3, 4))
    colours, shapes = random.sample(list(COLOURS), wanted), random.sample(SHAPES, wanted)
    scene = Scene(size, ground, texture, random.randrange(2**32), ())
    for colour, shape in zip(colours, shapes, strict=True):
        for _ in range(20):
            thing = random_thing(shape, colour, size, random)
            if _free(thing.box(size), scene, None):
                scene = replace(scene, things=(*scene.things, thing))
                break
    return scene


def random_thing(shape: str, colour: str, size: int, random: Random) -> Thing:
    """A thing of about a fifth to a third of the canvas, somewhere on it, upright or turned by quarters."""
    smallest = 8 if shape in ("triangle", "arrow") else 6  # their form is lost below
    width = height = random.randint(round(smallest * size / 32), round(10 * size / 32))
    if shape == "bar":
        width += round(2 * size / 32)
        height = max(3, round(width * 0.4))
        height += (width - height) % 2  # of one parity, so that a quarter turn falls on whole pixels
    angle = random.choice((0, 90, 180, 270))
    wide, high = (width, height) if angle % 180 == 0 else (height, width)
    x, y = random.randint(0, size - wide), random.randint(0, size - high)
    centre = (x + wide / 2, y + high / 2)
    return Thing(shape, colour, random.choice(TEXTURES), width, height, centre, angle, grain=random.randrange(2**32))


def possible_edits(scene: Scene, distances: Sequence[int], factors: Sequence[float], angles: Sequence[int]):
    """{operation: edits} of a scene whose object stays on the canvas, GAP pixels from every other one."""
    found: dict[str, list[Edit]] = {"translate": [], "resize": [], "rotate": []}
    smallest = round(4 * scene.size / 32)
    for number, thing in enumerate(scene.things):
        source = thing.mask(scene.size)
        box = thing.box(scene.size)
        for direction in DIRECTIONS:
            for distance in distances:
                target = moved(box, direction, distance)
                if _free(target, scene, number):
                    dx, dy = target[0] - box[0], target[1] - box[1]
                    there = replace(thing, centre=(thing.centre[0] + dx, thing.centre[1] + dy))
                    amounts = {"direction": direction, "distance": distance}
                    found["translate"].append(Edit("translate", number, there, amounts))
        for factor in factors:
            target = resized(box, factor)
            wide, high = target[2] - target[0], target[3] - target[1]
            if min(wide, high) >= min(smallest, box[2] - box[0], box[3] - box[1]) and _free(target, scene, number):
                width, height = (wide, high) if thing.angle % 180 == 0 else (high, wide)
                centre = ((target[0] + target[2]) / 2, (target[1] + target[3]) / 2)
                there = replace(thing, width=width, height=height, centre=centre, zoom=factor)
                found["resize"].append(Edit("resize", number, there, {"factor": factor}))
        for angle in angles:
            there = replace(thing, angle=thing.angle + angle)
            mask = there.mask(scene.size)
            if mask is None or not _free(there.box(scene.size), scene, number):
                continue
            hidden = (mask & source).sum() >= 0.75 * (mask | source).sum()  # by the symmetry of the shape
            coarse = abs(int(mask.sum()) - int(source.sum())) > 0.15 * source.sum()  # small shapes change their area
            if not hidden and not coarse:
                found["rotate"].append(Edit("rotate", number, there, {"angle": angle}))
    return found


def scene_with(
    operations: Sequence[str],
    size: int,
    distances: Sequence[int],
    factors: Sequence[float],
    angles: Sequence[int],
    random: Random,
    given: Counter,
) -> tuple[Scene, list[Edit]]:
    """A scene and edits of it, one for each operation, on at least two objects if there are several, no two with one target mask.

    given: how often each amount was asked for in the scenes before; the answer's are added.
    Raises ValueError if no scene of TRIES allows them.
    """
    for _ in range(TRIES):
        scene = random_scene(size, random)
        if len(scene.things) < 2:
            continue
        possible = possible_edits(scene, distances, factors, angles)
        used = dict.fromkeys(range(len(scene.things)), 0)
        edits, seen = [], set()
        for operation in operations:
            choices = [edit for edit in possible[operation] if (edit.number, edit.mask(size)) not in seen]
            if not choices:
                break
            # the amount asked for least often so far comes first, else what fits anywhere would prevail
            least = min(
                choices, key=lambda edit: (given[edit.operation, *edit.said], used[edit.number], random.random())
            )
            seen.add((least.number, least.mask(size)))
            used[least.number] += 1
            edits.append(least)
        else:
            if len(edits) == 1 or max(used.values()) < len(edits):
                given.update((edit.operation, *edit.said) for edit in edits)
                return scene, edits
    raise ValueError(
        f"no scene of {size}x{size} pixels in {TRIES} allows {', '.join(operations)} with distances={list(distances)}, "
        f"factors={list(factors)}, angles={list(angles)}; take a larger size, smaller amounts or fewer edits_per_scene"
    )


def _free(box: Sequence[int], scene: Scene, number: int | None) -> bool:
    """Whether a box lies on the canvas and GAP pixels from the boxes of all things but `number`."""
    if min(box) < 0 or max(box) > scene.size:
        return False
    for other, thing in enumerate(scene.things):
        if other == number:
            continue
        x1, y1, x2, y2 = thing.box(scene.size)
        if box[0] < x2 + GAP and x1 < box[2] + GAP and box[1] < y2 + GAP and y1 < box[3] + GAP:
            return False
    return True
