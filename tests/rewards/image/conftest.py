"""Small scenes drawn by hand: a striped red L and a green square on a shaded ground, and the exact picture of each edit."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

RED, GREEN, GROUND = (200, 30, 40), (40, 170, 60), (60, 62, 75)
L = np.zeros((9, 6), dtype=bool)
L[:, :3] = L[6:] = True


def save(path, image):
    Image.fromarray(np.rint(np.asarray(image) * 255).astype(np.uint8)).save(path)
    return str(path)


def draw(shape, corner, size=48, green=(36, 6)):
    """(size, size, 3): `shape` (bool, with its own stripes) at the corner (x, y), over the square and the ground."""
    y, x = np.mgrid[:size, :size]
    image = np.array(GROUND) * (1 + 0.1 * (x + y) / size)[..., None]
    image[green[1] : green[1] + 7, green[0] : green[0] + 7] = GREEN
    if shape is not None:
        h, w = shape.shape
        stripes = 1 + 0.15 * ((np.arange(h) // 2) % 2 * 2 - 1)
        place = image[corner[1] : corner[1] + h, corner[0] : corner[0] + w]
        place[shape] = (np.array(RED) * stripes[:, None, None] * np.ones((1, w, 1)))[shape]
    return (np.rint(image) / 255).astype(np.float32)


def box_of(shape, corner):
    return [corner[0], corner[1], corner[0] + shape.shape[1], corner[1] + shape.shape[0]]


@pytest.fixture
def scene():
    """The parts that scenes are drawn from."""
    return SimpleNamespace(draw=draw, L=L, RED=RED, GREEN=GREEN, GROUND=GROUND)


@pytest.fixture
def make(tmp_path):
    """make(operation, **amounts) -> (row, exact target)."""
    count = iter(range(1000))

    def made(operation, corner=(8, 20), dx=0, dy=0, angle=None, factor=None, size=48):
        shape, at = L, (corner[0] + dx, corner[1] + dy)
        row = {"direction": None, "distance": None, "angle": angle, "factor": factor}
        if operation == "translate":
            row["direction"] = "right" if dx > 0 else "left" if dx < 0 else "down" if dy > 0 else "up"
            row["distance"] = abs(dx + dy)
        if operation == "rotate":
            shape = np.rot90(L, -angle // 90)
        if operation == "resize":
            shape = np.kron(L, np.ones((factor, factor))) > 0
            at = (corner[0] - 3 * (factor - 1), corner[1] - 4)
        number = next(count)
        source, target = draw(L, corner, size), draw(shape, at, size)
        if operation != "translate":
            target[at[1] : at[1] + shape.shape[0], at[0] : at[0] + shape.shape[1]][shape] = np.float32(RED) / 255
            source[corner[1] : corner[1] + 9, corner[0] : corner[0] + 6][L] = np.float32(RED) / 255
        row |= {
            "id": f"row-{number}",
            "source": save(tmp_path / f"source{number}.png", source),
            "target": save(tmp_path / f"target{number}.png", target),
            "operation": operation,
            "object": "red L",
            "box": box_of(L, corner),
            "target_box": box_of(shape, at),
            "mask": None,
            "target_mask": None,
            "colour": list(RED),
            "palette": [list(GROUND), list(GREEN)],
            "detector": "palette",
        }
        return row, target

    return made


@pytest.fixture
def score():
    """score(reward, images, rows) -> scores, with the columns that the reward names."""
    from core.reward import Reward

    def scored(reward, images, rows):
        known = Reward.of(reward.__name__, reward)
        rows = [rows] * len(images) if isinstance(rows, dict) else rows
        columns = [known.columns(row) for row in rows]
        return reward(list(images), **{name: [row[name] for row in columns] for name in columns[0]})

    return scored
