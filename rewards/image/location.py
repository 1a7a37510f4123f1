"""Where the named object is in an image: by its colour among the scene's palette, or by a detector.

By colour, a pixel shows the object if the object's colour is the nearest of the palette and near enough. Distance counts
little along a colour's own direction, so that texture and shading, which change brightness, do not hide the object.
The object is the largest connected component. Not covered: two objects of one colour.

By a detector (rewards/image/detectors.py), the object is the inside of the best box.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from rewards.image.detectors import detect
from rewards.score import BrokenRow, Score

PALETTE = "palette"
ALONG = 0.25  # what a difference in brightness counts, as a share of one in colour (squared distances)
NEAR = 0.3  # farther than this from the object's colour is no object, whatever the palette
EIGHT = np.ones((3, 3), dtype=bool)

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Found:
    """mask: (H, W) bool, the object. rest: (H, W) bool, whatever else looks like it. box: pixels, x2 and y2 exclusive."""

    mask: np.ndarray
    rest: np.ndarray
    box: Box


def locate(
    images: Sequence[np.ndarray],
    phrases: Sequence[str | None],
    colours: Sequence[Sequence[float] | None],
    palettes: Sequence[Sequence[Sequence[float]] | None],
    detectors: Sequence[str],
) -> list[Found | Score]:
    """The object of each image, or a score of 0 with the reason object_not_found.

    colours, palettes: 0..255; used where the detector is "palette". phrases: used by the others, whose name is the path of
    a model's folder. A detector that fails raises.
    """
    found: list[Found | Score] = [Score(0.0, "object_not_found")] * len(images)
    asked: dict[str, list[int]] = {}
    for i, detector in enumerate(detectors):
        if detector == PALETTE:
            found[i] = by_colour(images[i], colours[i], palettes[i]) or found[i]
        else:
            asked.setdefault(detector, []).append(i)
    for detector, places in asked.items():
        boxes = detect(detector, [images[i] for i in places], [phrases[i] for i in places])
        for i, seen in zip(places, boxes, strict=True):
            found[i] = by_boxes(seen, images[i].shape[:2]) or found[i]
    return found


def by_colour(
    image: np.ndarray,
    colour: Sequence[float] | None,
    palette: Sequence[Sequence[float]] | None,
    near: Box | None = None,
) -> Found | None:
    """The largest connected region in the object's colour, or, given a box, the one that fills most of it.

    image: (H, W, 3) in [0, 1]. colour: of the object, 0..255. palette: the other colours of the scene, with the
    background's. Raises BrokenRow without a colour.
    """
    looks = shows(image, colour, palette)
    labels, n = ndimage.label(looks, EIGHT)
    if not n:
        return None
    counted = labels if near is None else labels[rectangle(near, looks.shape)]
    sizes = np.bincount(counted.ravel(), minlength=n + 1)
    sizes[0] = 0
    if not sizes.any():
        return None
    mask = labels == sizes.argmax()
    return Found(mask, looks & ~mask, bounds(mask))


def shows(image: np.ndarray, colour: Sequence[float] | None, palette: Sequence[Sequence[float]] | None) -> np.ndarray:
    """(H, W) bool: the pixels that have the object's colour rather than any other of the palette."""
    if colour is None:
        raise BrokenRow(
            'the object is located by its colour, and the row has none; give one, or set detector="<folder>"'
        )
    colours = np.array([colour, *(palette or [])], dtype=np.float32) / np.float32(255)
    if colours.ndim != 2 or colours.shape[1] != 3 or not (np.abs(colours - 0.5) <= 0.5).all():
        raise BrokenRow(f"colour={colour!r}, palette={palette!r} are not colours [r, g, b] in 0..255")
    length = np.linalg.norm(colours, axis=1, keepdims=True)
    direction = colours / np.maximum(length, 1e-6)
    pixels = image.reshape(-1, 3)
    # |p - q|^2 without |p|^2, which is the same for all colours; then less of what lies along q
    along = direction @ pixels.T
    distance = length**2 - 2 * length * along - np.float32(1 - ALONG) * (length > 0) * (along - length) ** 2
    mine = distance[0]
    looks = mine + np.einsum("nc,nc->n", pixels, pixels) <= NEAR**2
    for other in distance[1:]:
        looks &= mine < other
    return looks.reshape(image.shape[:2])


def by_boxes(boxes: Sequence[tuple[Box, float]], shape: tuple[int, int]) -> Found | None:
    """The inside of the best box (boxes come best first); boxes that hardly cover it are what else looks like it."""
    masks = [(rectangle(box, shape), box) for box, _ in boxes]
    masks = [entry for entry in masks if entry[0].any()]
    if not masks:
        return None
    mask, box = masks[0]
    rest = np.zeros(shape, dtype=bool)
    for other, _ in masks[1:]:
        if (other & mask).sum() < 0.5 * min(other.sum(), mask.sum()):  # otherwise the same object, seen twice
            rest |= other
    return Found(mask, rest & ~mask, box)


def rectangle(box: Sequence[float], shape: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: the pixels whose centre lies in the box."""
    x, y = np.arange(shape[1]) + 0.5, np.arange(shape[0]) + 0.5
    x1, y1, x2, y2 = box
    return ((y1 < y) & (y < y2))[:, None] & ((x1 < x) & (x < x2))[None]


def bounds(mask: np.ndarray) -> Box:
    """The smallest box around a mask that is not empty: x1, y1, x2, y2 in pixels, x2 and y2 exclusive."""
    x, y = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return float(x[0]), float(y[0]), float(x[-1] + 1), float(y[-1] + 1)
