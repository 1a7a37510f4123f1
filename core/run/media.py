"""Pictures that a run leaves, as PNG files, and how the report holds them: data URIs of bounded size.

A picture is an array (H, W, 3) of numbers in [0, 1]; a file holds it in 8 bits. What is written is whole or absent
(RunFolder.write_bytes). Pillow comes with the extra `flow`; a report of small pictures needs none.
"""

from __future__ import annotations

import base64
import io
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.run.folder import RunFolder

SMALL = 128  # pixels: up to here a picture is shown as it is, each pixel a square
LARGEST = 320  # pixels: of the longer side of what is shown of a larger one
OURS = re.compile(r"samples/[\w-]+/[\w-]+\.png")  # where `write_picture` is told to write, within a run folder
PNG = b"\x89PNG\r\n\x1a\n"


def is_picture(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 3 and value.shape[2] == 3


def write_picture(folder: RunFolder, name: str, picture: np.ndarray) -> str:
    """Write `name`, a PNG file below the folder; returns the name. Raises ValueError if it is no picture."""
    from PIL import Image

    if not is_picture(picture):
        shape = getattr(picture, "shape", type(picture).__name__)
        raise ValueError(f"{name}: {shape} is no picture; it must be an array (height, width, 3) of numbers in [0, 1]")
    levels = np.nan_to_num(np.asarray(picture, dtype=np.float32)).clip(0, 1) * 255
    file = io.BytesIO()
    Image.fromarray(levels.round().astype(np.uint8)).save(file, "PNG")
    folder.write_bytes(name, file.getvalue())
    return name


def entry(folder: RunFolder, name: str, value: Any) -> str:
    """What a table of text holds of a value: the name of the file that a picture is written to, or the value as text."""
    return write_picture(folder, name, value) if is_picture(value) else str(value)


def read_picture(path: Path) -> np.ndarray:
    """float32 (H, W, 3) in [0, 1]."""
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255


class Shown(NamedTuple):
    """uri: data:image/..., letters that need no escaping. small: to be enlarged with its pixels as squares."""

    uri: str
    small: bool


def shown(folder: RunFolder, name: Any) -> Shown | None:
    """What the report holds of a picture that this run wrote; None for any other name, and for a file that is gone."""
    path = folder.path / str(name)
    if not isinstance(name, str) or not OURS.fullmatch(name) or not path.is_file():
        return None
    data = path.read_bytes()
    if data[:8] != PNG or len(data) < 24:
        return None
    width, height = struct.unpack(">II", data[16:24])
    if max(width, height) <= SMALL:
        return Shown(_uri("png", data), True)
    from PIL import Image

    file = io.BytesIO()
    with Image.open(path) as picture:
        picture.thumbnail((LARGEST, LARGEST))
        picture.convert("RGB").save(file, "JPEG", quality=85)
    return Shown(_uri("jpeg", file.getvalue()), False)


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
