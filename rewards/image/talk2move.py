"""The rewards that Talk2Move released, for comparison; rewards/image/editing.py says how their holes are closed.

Source: Tan et al. 2026 (arXiv 2601.02356); read in the paper's code (amazon-science/talk2move). They look at two boxes and
pay for direction, not for distance, and nothing for what becomes of the rest: an overshoot, a copy and an erased
background score as high as the edit. Left out: LPIPS in the resize reward, and rotation by Orient-Anything (networks).
"""

import math

import numpy as np

from rewards.image.editing import over_edits
from rewards.image.geometry import Reference
from rewards.image.location import Box, Found
from rewards.score import Score

DEAD_ZONE = 0.1  # of the two boxes' sides together


def relative_position(before: Box, after: Box, dead_zone: float = DEAD_ZONE) -> tuple[float, float]:
    """(dx, dy) in [-1, 1]: where `before` lies from `after`, beyond a dead zone, over the distance of the centres.

    Negative dx: it moved right. Negative dy: it moved down. (0, 0) within the dead zone.
    """
    offset, reduced = [], []
    for i in (0, 1):
        off = (before[i] + before[i + 2] - after[i] - after[i + 2]) / 2
        sides = abs(before[i + 2] - before[i]) + abs(after[i + 2] - after[i])
        offset.append(off)
        reduced.append(math.copysign(max(abs(off) - dead_zone * sides, 0.0), off))
    if all(abs(part) < 1e-3 for part in reduced):
        return 0.0, 0.0
    norm = math.hypot(*offset)
    return reduced[0] / norm, reduced[1] / norm


def translation(before: Box, after: Box, relation: str) -> float:
    """|dx| or |dy| in [0, 1] of the first direction in `relation` that the object moved in, else 0.

    As released, directions are looked for as substrings: "cup" holds "up".
    """
    dx, dy = relative_position(before, after)
    if (dx < -0.01 and "right" in relation) or (dx > 0.01 and "left" in relation):
        return abs(dx)
    if (dy < -0.01 and "down" in relation) or (dy > 0.01 and "up" in relation):
        return abs(dy)
    return 0.0


def position(before: Box, after: Box) -> float:
    """1 - (|dx| + |dy|) / 2, in [0, 1]: the object should stay where it is."""
    dx, dy = relative_position(before, after)
    return 1 - (abs(dx) + abs(dy)) / 2


def resize(width_ratio: float, height_ratio: float, ratio: float) -> float:
    """1 - (|width_ratio - ratio| + |height_ratio - ratio|) / 4; below 0 for large errors.

    Ratios are after / before for "bigger" and before / after for "smaller".
    """
    return 1 - (abs(width_ratio - ratio) + abs(height_ratio - ratio)) / 4


@over_edits()
def talk2move_translation(reference: Reference, image: np.ndarray, found: Found | Score) -> Score:
    """`translation` of the row's box and the box found; None for another operation. 0 where nothing is found."""
    command = reference.command
    if command.operation != "translate":
        return Score(None)
    return found if isinstance(found, Score) else Score(translation(command.box, found.box, command.direction))


@over_edits()
def talk2move_position(reference: Reference, image: np.ndarray, found: Found | Score) -> Score:
    """`position` of the row's box and the box found; None for a translation. 0 where nothing is found."""
    if reference.command.operation == "translate":
        return Score(None)
    return found if isinstance(found, Score) else Score(position(reference.command.box, found.box))


@over_edits()
def talk2move_resize(reference: Reference, image: np.ndarray, found: Found | Score) -> Score:
    """`resize` of the row's box and the box found, negative values as 0; None for another operation."""
    command = reference.command
    if command.operation != "resize":
        return Score(None)
    if isinstance(found, Score):
        return found
    small, large, factor = command.box, found.box, command.factor
    if factor < 1:
        small, large, factor = large, small, 1 / factor
    ratios = ((large[i + 2] - large[i]) / (small[i + 2] - small[i]) for i in (0, 1))
    return Score(max(0.0, resize(*ratios, factor)))
