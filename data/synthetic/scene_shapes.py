"""Small pictures of coloured, textured shapes on a textured ground, drawn without anti-aliasing.

A thing is a formula over the plane (its shape) and a brightness over its own pixels (its texture), so the same thing
can be drawn again elsewhere, larger or turned, and the ground under it is known. A texture changes only the brightness
of one hue, by a factor of 1 +- CONTRAST, so that each pixel's nearest colour of the scene (Euclidean, RGB) is the colour
of what it belongs to: COLOURS and GROUNDS are at least 50 levels from every confusion.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

CONTRAST = 0.15
GROUND_CONTRAST = 0.10
COLOURS = {
    "red": (205, 25, 35),
    "yellow": (205, 210, 45),
    "green": (25, 160, 50),
    "cyan": (50, 205, 210),
    "blue": (40, 70, 215),
    "purple": (115, 25, 160),
    "pink": (216, 115, 185),
}
GROUNDS = ((44, 44, 50), (24, 32, 76), (80, 60, 42), (62, 74, 58), (92, 94, 98))
SHAPES = ("square", "disc", "triangle", "cross", "diamond", "ring", "bar", "arrow")
TEXTURES = ("plain", "striped", "checked", "dotted", "speckled")


@dataclass(frozen=True)
class Thing:
    """A shape of width x height pixels about a centre (pixel k covers k..k+1), then turned clockwise by `angle` degrees.

    zoom: how much larger than usual its texture is; grain: which speckle.
    """

    shape: str
    colour: str
    texture: str
    width: int
    height: int
    centre: tuple[float, float]
    angle: int = 0
    zoom: float = 1.0
    grain: int = 0

    def local(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Points of the canvas, in pixels, as the upright thing sees them from its centre."""
        dx, dy = x - self.centre[0], y - self.centre[1]
        if self.angle % 90 == 0:  # exact, so that a quarter turn moves whole pixels
            cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[self.angle // 90 % 4]
        else:
            cos, sin = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        return cos * dx + sin * dy, cos * dy - sin * dx

    def covers(self, size: int) -> np.ndarray:
        """(size + 2, size + 2) bool: the pixels it covers of a canvas and of one pixel around it."""
        at = np.arange(-1, size + 1) + 0.5
        return inside(self.shape, *self.local(at[None, :], at[:, None]), self.width, self.height)

    def mask(self, size: int) -> np.ndarray | None:
        """(size, size) bool, read only: the pixels it covers; None if it does not lie inside the canvas whole."""
        return _mask(self, size)

    def box(self, size: int) -> list[int]:
        """[x1, y1, x2, y2] of its mask."""
        return list(_box(self, size))

    def paint(self, canvas: np.ndarray, mask: np.ndarray, contrast: float = CONTRAST) -> None:
        """Its textured colour into the pixels of a float canvas that a mask names."""
        rows, columns = np.nonzero(mask)
        x, y = self.local(columns + 0.5, rows + 0.5)
        brightness = 1 + contrast * pattern(self.texture, x / self.zoom, y / self.zoom, self.grain, len(canvas))
        canvas[rows, columns] = brightness[:, None] * np.array(COLOURS[self.colour], float)

    @property
    def name(self) -> str:
        """As instructions call it: "red square", "blue striped disc"."""
        return " ".join([self.colour, *[self.texture] * (self.texture != "plain"), self.shape])


@dataclass(frozen=True)
class Scene:
    """A canvas of size x size pixels: a textured ground and things that do not overlap."""

    size: int
    ground: tuple[int, int, int]
    texture: str
    grain: int
    things: tuple[Thing, ...]

    def draw(self) -> np.ndarray:
        """(size, size, 3) uint8."""
        canvas = _backdrop(self.size, self.ground, self.texture, self.grain).copy()
        for thing in self.things:
            thing.paint(canvas, thing.mask(self.size))
        return np.rint(canvas).astype(np.uint8)

    def with_thing(self, number: int, thing: Thing) -> "Scene":
        things = (*self.things[:number], thing, *self.things[number + 1 :])
        return replace(self, things=things)

    @property
    def palette(self) -> list[tuple[int, int, int]]:
        """The colours of ground and things."""
        return [self.ground, *(COLOURS[thing.colour] for thing in self.things)]


def inside(shape: str, x: np.ndarray, y: np.ndarray, width: int, height: int) -> np.ndarray:
    """Whether points (pixels from the centre) lie in an upright shape; each touches all four sides of its box."""
    u, v = x / (width / 2), y / (height / 2)
    edge = 1 + 1e-9
    box = (abs(u) <= edge) & (abs(v) <= edge)
    radius = u * u + v * v
    if shape in ("square", "bar"):
        return box
    if shape == "disc":
        return radius <= edge
    if shape == "ring":
        return (radius <= edge) & (radius >= 0.25)
    if shape == "triangle":  # blunt by a pixel, else an even width has no tip
        return box & (abs(u) <= (v + 1) / 2 + 1 / width)
    if shape == "diamond":
        return abs(u) + abs(v) <= edge
    if shape == "cross":
        return box & ((abs(u) <= 0.4) | (abs(v) <= 0.4))
    if shape == "arrow":
        return box & np.where(v <= 0, abs(u) <= v + 1 + 1 / width, abs(u) <= 0.4)
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def pattern(texture: str, x: np.ndarray, y: np.ndarray, grain: int, size: int) -> np.ndarray:
    """Brightness in [-1, 1] at points in pixels; stripes and squares are 2 pixels wide on a canvas of 32."""
    unit = size / 32
    column, row = (np.floor(part / (2 * unit)).astype(int) for part in (x, y))
    if texture == "plain":
        return np.zeros_like(x)
    if texture == "striped":
        return 1.0 - 2 * (row % 2)
    if texture == "checked":
        return 1.0 - 2 * ((row + column) % 2)
    if texture == "dotted":
        return 2.0 * ((row % 2 == 0) & (column % 2 == 0)) - 1
    if texture == "speckled":
        return _speckle(grain)[np.floor(y / unit).astype(int) % 64, np.floor(x / unit).astype(int) % 64]
    if texture == "shaded":  # brighter towards a side
        turn = 2 * math.pi * (grain % 360) / 360
        slope = math.cos(turn) * x + math.sin(turn) * y
        return 2 * (slope - slope.min()) / (slope.max() - slope.min()) - 1
    raise ValueError(f"unknown texture {texture!r}; known: {', '.join(TEXTURES)}, shaded")


@lru_cache(maxsize=512)  # making a scene asks for the mask of a thing many times
def _mask(thing: Thing, size: int) -> np.ndarray | None:
    covered = thing.covers(size)
    inner = covered[1:-1, 1:-1]
    inner.flags.writeable = False
    return inner if inner.any() and inner.sum() == covered.sum() else None


@lru_cache(maxsize=512)
def _box(thing: Thing, size: int) -> tuple[int, ...]:
    return tuple(box_of(_mask(thing, size)))


@lru_cache(maxsize=16)
def _backdrop(size: int, ground: tuple[int, int, int], texture: str, grain: int) -> np.ndarray:
    at = np.arange(size) + 0.5
    brightness = 1 + GROUND_CONTRAST * pattern(texture, *np.meshgrid(at, at), grain, size)
    return brightness[..., None] * np.array(ground, float)


@lru_cache(maxsize=64)
def _speckle(grain: int) -> np.ndarray:
    return np.random.default_rng(grain).uniform(-1, 1, (64, 64))


def box_of(mask: np.ndarray) -> list[int]:
    """[x1, y1, x2, y2] of the pixels that are set; x2 and y2 exclusive."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
