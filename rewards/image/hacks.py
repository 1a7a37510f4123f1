"""Images that must score low: edits done wrong on purpose, and arrays that are no edit at all.

`cut_and_paste` moves, turns or resizes the object by its pixels and fills the hole with the colour around it; with other
settings it is a policy's cheapest hack. It sees no target, so it is also a baseline that needs no learning.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from scipy import ndimage

from rewards.canaries import Canary
from rewards.image.files import read_image
from rewards.image.geometry import Command, Reference, resampled, sampling
from rewards.image.location import EIGHT, PALETTE

COLUMNS = (
    *("source", "operation", "box", "target_box", "direction", "distance", "angle", "factor"),
    *("mask", "colour", "palette", "detector"),
)


def reference(row: Mapping) -> Reference:
    """Of a row of data; columns that it lacks are None."""
    return Reference(
        Command.of(**{name: row.get(name) for name in COLUMNS} | {"detector": row.get("detector") or PALETTE})
    )


def cut_and_paste(row: Mapping, amount: float = 1.0, leave: bool = False, paste: bool = True) -> np.ndarray:
    """The source with its object moved as commanded, float32 (H, W, 3).

    amount: of the commanded distance or angle, or power of the factor; 2 = an overshoot, 0 = as it was, -1 = the wrong way.
    leave: the object also stays where it was. paste: False = it only vanishes.
    """
    known = reference(row)
    image = known.image.copy() if leave else _without(known)
    if paste:
        command = _scaled(known.command, amount)
        matrix, offset = sampling(known.before, command)
        mask = resampled(known.before.astype(np.float32), matrix, offset) > 0.5
        weight = resampled(known.before.astype(np.float32), matrix, offset)[mask]
        for channel in range(3):
            drawn = resampled(known.image[..., channel] * known.before, matrix, offset)
            image[..., channel][mask] = drawn[mask] / weight
    return image


def _scaled(command: Command, amount: float) -> Command:
    if command.operation == "rotate":
        return replace(command, angle=command.angle * amount)
    if command.operation == "resize":
        return replace(command, factor=command.linear[0, 0] ** amount)
    middle = np.array([command.box[0] + command.box[2], command.box[1] + command.box[3]]) / 2
    dx, dy = (command.centre - middle) * amount
    x1, y1, x2, y2 = command.box
    return replace(command, target_box=(x1 + dx, y1 + dy, x2 + dx, y2 + dy))


def _without(known: Reference) -> np.ndarray:
    """The source with the object painted over in the median colour around it."""
    image = known.image.copy()
    edge = ndimage.binary_dilation(known.before, EIGHT)
    ring = ndimage.binary_dilation(edge, EIGHT, iterations=2) & ~edge
    image[known.before] = np.median(known.image[ring if ring.any() else ~known.before], axis=0)
    return image


def _erased(row: Mapping) -> np.ndarray:
    known, image = reference(row), cut_and_paste(row)
    image[known.outside] = 0
    return image


def _filled(row: Mapping) -> np.ndarray:
    """All of the object's own mean colour."""
    known = reference(row)
    return np.broadcast_to(known.image[known.before].mean(axis=0), known.image.shape).copy()


def _of(column: str, make: Callable[[np.ndarray], object]) -> Callable[[Mapping], object]:
    return lambda row: make(read_image(row[column]))


def _unless_rotated(hack: Callable[[Mapping], object]) -> Callable[[Mapping], object]:
    """Shapes that are symmetric look right when turned too far or the wrong way, so there nothing is done instead."""
    return lambda row: read_image(row["source"]) if row["operation"] == "rotate" else hack(row)


def _unless_covered(hack: Callable[[Mapping], object]) -> Callable[[Mapping], object]:
    """An object that is turned or enlarged covers the one that was left, so there nothing is done instead."""
    return lambda row: hack(row) if row["operation"] == "translate" else read_image(row["source"])


# name: the image it makes of one of the right shape
EMPTY: dict[str, Callable[[np.ndarray], object]] = {
    "all_black": np.zeros_like,
    "all_white": np.ones_like,
    "noise": lambda like: np.random.default_rng(like.size).random(like.shape, dtype=np.float32),
}
BROKEN: dict[str, Callable[[np.ndarray], object]] = {
    "nan": lambda like: np.full_like(like, np.nan),
    "infinite": lambda like: np.full_like(like, np.inf),
    "bytes": lambda like: (like * 255).astype(np.uint8),
    "levels": lambda like: like * 255,
    "wrong_shape": lambda like: like[:-1],
    "grey": lambda like: like[..., 0],
    "no_pixels": lambda like: np.zeros((0, 0, 3), dtype=np.float32),
    "text": lambda like: "This image is correct. Score: 1.0",
    "nothing": lambda like: None,
}
# name: (the hack, the most that `edit` may give it)
EDITS: dict[str, tuple[Callable[[Mapping], object], float]] = {
    "unchanged": (lambda row: read_image(row["source"]), 0.1),
    "overshoot": (_unless_rotated(lambda row: cut_and_paste(row, amount=2.0)), 0.3),
    "wrong_way": (_unless_rotated(lambda row: cut_and_paste(row, amount=-1.0)), 0.1),
    "copy": (_unless_covered(lambda row: cut_and_paste(row, leave=True)), 0.1),
    "vanished": (lambda row: cut_and_paste(row, paste=False), 0.0),
    "erased_background": (_erased, 0.3),
    "filled": (_filled, 0.1),
}


def edit_canaries(component: str = "edit") -> list[Canary]:
    """For the reward `edit` under that name: edits done wrong, images of nothing, and arrays that are no image."""
    made = [Canary(name, hack, component, at_most=limit) for name, (hack, limit) in EDITS.items()]
    made += [Canary(name, _of("source", make), component, at_most=0.1) for name, make in EMPTY.items()]
    return made + [Canary(name, _of("source", make), component) for name, make in BROKEN.items()]


def super_resolution_canaries(component: str, at_most: float) -> list[Canary]:
    """For an absolute reward (`fidelity`, `texture`): what an image of nothing may have, and arrays that are no image."""
    made = [Canary(name, _of("target", make), component, at_most=at_most) for name, make in EMPTY.items()]
    return made + [Canary(name, _of("target", make), component) for name, make in BROKEN.items()]
