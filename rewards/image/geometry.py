"""What a commanded edit asks for, worked out from the source image and the command alone, never from a target image.

A command is a linear map (a rotation, a factor, or neither) and the place that the object's box must have afterwards.
Angles are degrees, positive is clockwise as seen. Boxes are [x1, y1, x2, y2] in pixels, x2 and y2 exclusive.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from rewards.image.files import read_image, read_mask
from rewards.image.location import EIGHT, PALETTE, Box, bounds, by_colour, rectangle
from rewards.score import BrokenRow

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
FOUR = ndimage.generate_binary_structure(2, 1)
STRAY = 0.05  # share of an object's pixels that may be off for reasons of drawing
BOX_NOISE = 0.05  # of the object's size: how far detectors' boxes may be off


@dataclass(frozen=True)
class Command:
    """Of one row: what is to be done to which object of which image, and how the object is found."""

    source: str
    operation: str
    box: Box
    target_box: Box | None
    direction: str | None
    distance: float | None
    angle: float | None
    factor: float | None
    mask: str | None
    colour: tuple[float, ...] | None
    palette: tuple[tuple[float, ...], ...] | None
    detector: str

    @classmethod
    def of(cls, **columns) -> "Command":
        """From the columns of a row. Raises BrokenRow if they do not say what is to be done."""
        for name in ("box", "target_box"):
            columns[name] = _box(name, columns[name])
        if columns["box"] is None:
            raise BrokenRow("box is missing; an edit is judged by where its object was")
        for name in ("colour", "palette"):
            value = columns[name]
            columns[name] = value if value is None else tuple(tuple(v) if name == "palette" else v for v in value)
        command = cls(**columns)
        needed = {"translate": ("direction", "distance"), "rotate": ("angle",), "resize": ("factor",)}
        if command.operation not in needed:
            raise BrokenRow(f"operation={command.operation!r} is unknown; use translate, rotate or resize")
        if command.operation == "rotate" or command.target_box is None:
            for name in needed[command.operation]:
                if getattr(command, name) is None:
                    raise BrokenRow(f"{name} is missing; {command.operation} without a target_box needs it")
        if command.direction not in (None, *DIRECTIONS):
            raise BrokenRow(f"direction={command.direction!r} is unknown; use {', '.join(DIRECTIONS)}")
        return command

    @property
    def linear(self) -> np.ndarray:
        """(2, 2) map of (x, y) offsets from the object's centre."""
        if self.operation == "rotate":
            turn = math.radians(self.angle)
            cos, sin = round(math.cos(turn), 12), round(math.sin(turn), 12)  # so that a quarter turn moves whole pixels
            return np.array([[cos, -sin], [sin, cos]])  # y points down, so this turns clockwise
        if self.operation == "resize":
            return np.eye(2) * (self.factor or math.sqrt(_area(self.target_box) / _area(self.box)))
        return np.eye(2)

    @property
    def centre(self) -> np.ndarray:
        """(x, y) that the middle of the object's box must have, in pixels."""
        if self.target_box is not None:
            return _middle(self.target_box)
        moved = DIRECTIONS[self.direction] if self.operation == "translate" else (0, 0)
        return _middle(self.box) + np.array(moved) * (self.distance or 0.0)


class Reference:
    """What a command's outputs are compared with.

    image: the source. before, after: (H, W) bool, the object in the source and where it must be.
    slack: pixels by which an outline may be off: 1 if the edit draws the object anew, 0 if it moves whole pixels (a
    translation, quarter turns). vacated: pixels that must no longer show it.
    """

    def __init__(self, command: Command):
        """Raises BrokenRow if the source cannot be read, does not show the object, or the edit leads out of the image."""
        self.command = command
        self.image = read_image(command.source)
        shape = self.image.shape[:2]
        self.by_box = command.detector != PALETTE
        if self.by_box:
            self.before = rectangle(command.box, shape)
            known = read_mask(command.mask, shape) if command.mask else self.before
            self.stray = 0
        else:  # by the means by which it will be looked for, so that both have the same edge
            found = by_colour(self.image, command.colour, command.palette, near=command.box)
            known = self.before = np.zeros(shape, dtype=bool) if found is None else found.mask
            self.stray = 0 if found is None else int(found.rest.sum())
        if not (self.before.any() and known.any()):
            raise BrokenRow(f"{command.source} does not show the object in box {list(command.box)}")
        self.after = transformed(known, command)
        if self.by_box and self.after.any():
            self.after = rectangle(command.target_box or bounds(self.after), shape)
        if not self.after.any():
            raise BrokenRow(f"the edit moves box {list(command.box)} of {command.source} out of the image")
        self.area = int(self.after.sum())
        self.size = math.sqrt(self.area)
        self.centroid = centroid(self.after)
        middle = _middle(command.box)
        self.reach = max(float(np.hypot(*(command.centre - middle))), self.size / 2)
        self.redrawn = command.operation != "translate" and not _whole(command.linear)
        self.slack = max(int(self.redrawn), round(BOX_NOISE * self.size) if self.by_box else 0)
        self.vacated, self.refill = self._vacated()
        self.near, self.outside = self._surroundings()
        outline = self.area - int(ndimage.binary_erosion(self.after, FOUR).sum())
        self.area_slack = -math.log2(1 - min(0.5, self.slack * outline / self.area))
        # what an untouched object loses; of a turned disc that is nothing, so do not blow up its outline's noise
        self.untouched = 1.0, 1.0
        if command.operation != "translate":
            self.untouched = max(self._lost(self.before), 0.1), max(1 - overlap(self.before, self.after), 0.1)

    def _vacated(self) -> tuple[np.ndarray, np.ndarray]:
        """Pixels that must no longer show the object, and those of them whose new colour is not mixed with its edge."""
        wide = ndimage.binary_dilation(self.after, EIGHT)
        inner = self.before & ~wide
        return (self.before & ~self.after if self.command.operation == "translate" else inner), inner

    def _surroundings(self) -> tuple[tuple[np.ndarray, np.ndarray] | None, np.ndarray]:
        """Colours just around the object in the source (low, high), and the pixels that the edit must not touch."""
        edge = ndimage.binary_dilation(self.before, EIGHT)
        ring = ndimage.binary_dilation(edge, EIGHT, iterations=3) & ~edge
        pixels = self.image[ring]
        near = tuple(np.percentile(pixels, (5, 95), axis=0).astype(np.float32)) if len(pixels) else None
        return near, ~self.widened(self.before | self.after)

    def widened(self, mask: np.ndarray) -> np.ndarray:
        """The mask and what may be mixed with it: two pixels around it, or 1 % of the image's side."""
        pixels = max(2, round(0.01 * max(mask.shape)))
        return ndimage.maximum_filter(mask, 2 * pixels + 1)

    def misfit(self, mask: np.ndarray) -> float:
        """How far a shape is from the commanded one: 0 = it has it, 1 = as far as the object that was not edited.

        1 - IoU with the source's mask, turned and resized as commanded, wherever it lies. Where the edit draws the object
        anew, outlines are uncertain: pixels within `slack` are free and the sides of the target_box count; but it must not
        fit the untouched shape better than the commanded one.
        """
        lost, apart = self.untouched
        if not self.redrawn:
            return self._lost(mask) / lost
        nearer = overlap(mask, self.before) - overlap(mask, self.after)
        return max(self._lost(mask) / lost, nearer / apart)

    def _lost(self, mask: np.ndarray) -> float:
        lost = 1 - overlap(mask, self.after, self.slack)
        if not self.redrawn:
            return lost
        lost = max(0.0, lost - STRAY)
        if self.command.target_box is None:
            return lost
        (x1, y1, x2, y2), (u1, v1, u2, v2) = bounds(mask), self.command.target_box
        sides = (abs(math.log2((x2 - x1) / (u2 - u1))) + abs(math.log2((y2 - y1) / (v2 - v1)))) / 2
        return lost + max(0.0, sides - (2 * BOX_NOISE if self.by_box else 0.0))


def transformed(mask: np.ndarray, command: Command) -> np.ndarray:
    """(H, W) bool: the object's mask after the command, with the middle of its box where the command wants it."""
    return resampled(mask.astype(np.float32), *sampling(mask, command)) > 0.5


def sampling(mask: np.ndarray, command: Command) -> tuple[np.ndarray, np.ndarray]:
    """(matrix, offset): the pixel (row, column) p of the output comes from matrix @ p + offset of the source."""
    linear = command.linear
    rows, columns = np.nonzero(mask)
    points = np.stack([columns, rows]) + 0.5
    start = _middle(bounds(mask))
    moved = linear @ (points - start[:, None])
    spread = (moved.min(axis=1) + moved.max(axis=1)) / 2  # middle of the new box, were `start` kept
    inverse = np.linalg.inv(linear)
    origin = start - inverse @ (command.centre - spread)
    matrix = inverse[::-1, ::-1]  # scipy counts (row, column)
    return matrix, origin[::-1] + matrix @ np.array([0.5, 0.5]) - 0.5


def resampled(values: np.ndarray, matrix: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """(H, W) bilinear; what comes from outside the image is 0."""
    return ndimage.affine_transform(values, matrix, offset, order=1, mode="grid-constant")


def centroid(mask: np.ndarray) -> np.ndarray:
    """(x, y) of the mean pixel centre of a mask that is not empty."""
    columns, rows = mask.sum(axis=0), mask.sum(axis=1)
    total = columns.sum()
    return np.array([columns @ np.arange(columns.size), rows @ np.arange(rows.size)]) / total + 0.5


def overlap(mask: np.ndarray, other: np.ndarray, slack: int = 0) -> float:
    """IoU in [0, 1] of two shapes, wherever they lie: the centroids are made to agree to a pixel.

    slack: pixels by which an outline may be off; within it of the other shape, a pixel is no mistake.
    """
    shift = np.rint(centroid(other) - centroid(mask)).astype(int)
    corners = []  # both shapes and their first pixel, where they lie together
    for shape, (dx, dy) in ((mask, shift), (other, (0, 0))):
        x1, y1, x2, y2 = map(int, bounds(shape))
        corners.append((shape[y1:y2, x1:x2], x1 + dx, y1 + dy))
    left, top = (min(corner[i] for corner in corners) - slack for i in (1, 2))
    right = max(x + shape.shape[1] for shape, x, _ in corners) + slack
    bottom = max(y + shape.shape[0] for shape, _, y in corners) + slack
    seen, wanted = framed = np.zeros((2, bottom - top, right - left), dtype=bool)
    for place, (shape, x, y) in zip(framed, corners, strict=True):
        place[y - top : y - top + shape.shape[0], x - left : x - left + shape.shape[1]] = shape
    wrong = int((seen & ~_widened(wanted, slack)).sum() + (wanted & ~_widened(seen, slack)).sum())
    return 1 - wrong / int((seen | wanted).sum())


def iou(mask: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two masks; 0 if both are empty."""
    union = int((mask | other).sum())
    return int((mask & other).sum()) / union if union else 0.0


def _whole(linear: np.ndarray) -> bool:
    """Whether the map takes pixels to pixels: a turn by quarters, or nothing."""
    return np.allclose(np.sort(np.abs(linear).ravel()), (0, 0, 1, 1))


def _widened(mask: np.ndarray, pixels: int) -> np.ndarray:
    return ndimage.binary_dilation(mask, FOUR, iterations=pixels) if pixels else mask


def _box(name: str, box: Sequence[float] | None) -> Box | None:
    if box is None:
        return None
    values = tuple(float(v) for v in box)
    if len(values) != 4 or not all(map(math.isfinite, values)) or values[0] >= values[2] or values[1] >= values[3]:
        raise BrokenRow(f"{name}={list(box)!r} is no box [x1, y1, x2, y2] with x1 < x2 and y1 < y2")
    return values


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _middle(box: Box) -> np.ndarray:
    return np.array([box[0] + box[2], box[1] + box[3]]) / 2
