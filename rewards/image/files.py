"""Images in and out: files that a row names, and arrays that a policy gives. An image is float32 (H, W, 3) in [0, 1].

A file that cannot be read is a broken row. An array that is no image is a bad completion with a reason code.
Needs pillow (`pip install ".[flow]"`).
"""

import os
from collections import OrderedDict

import numpy as np
from PIL import Image, UnidentifiedImageError

from rewards.score import BrokenRow, Score

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr")  # 8 bits a channel; others would be clipped, not scaled
MAX_PIXELS = 2**24
CACHE_BYTES = 128 * 2**20

_cache: OrderedDict[tuple, np.ndarray] = OrderedDict()  # by path and state of the file, latest use last


def read_image(path: str | os.PathLike) -> np.ndarray:
    """The image in a file, float32 (H, W, 3) in [0, 1], not writable; alpha and EXIF rotation are ignored.

    Kept in memory (the latest CACHE_BYTES) until the file changes. Raises BrokenRow if there is no file, if it holds more
    than MAX_PIXELS, is in none of FORMATS, or has other than 8 bits a channel.
    """
    try:
        state = os.stat(path)
    except (OSError, ValueError, TypeError) as error:
        raise BrokenRow(f"image {path!r} cannot be opened: {error}") from error
    key = os.fspath(path), state.st_mtime_ns, state.st_size, state.st_ino
    if (image := _cache.get(key)) is not None:
        _cache.move_to_end(key)
        return image
    image = _cache[key] = _decode(path)
    while len(_cache) > 1 and sum(kept.nbytes for kept in _cache.values()) > CACHE_BYTES:
        _cache.popitem(last=False)
    return image


def _decode(path: str | os.PathLike) -> np.ndarray:
    try:
        with Image.open(path, formats=FORMATS) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:  # known from the header, before anything is decompressed
                raise BrokenRow(f"image {path!r} has {width} x {height} pixels; at most {MAX_PIXELS} are read")
            if opened.mode not in MODES:
                raise BrokenRow(f"image {path!r} has mode {opened.mode}; save it with 8 bits a channel")
            pixels = np.asarray(opened.convert("RGB"))
    except UnidentifiedImageError as error:
        raise BrokenRow(f"image {path!r} is none of {', '.join(FORMATS)}") from error
    except (
        OSError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:  # pillow reports broken PNG chunks as SyntaxError
        raise BrokenRow(f"image {path!r} cannot be read: {error}") from error
    image = pixels.astype(np.float32) / np.float32(255)
    image.flags.writeable = False
    return image


def read_mask(path: str | os.PathLike, shape: tuple[int, int]) -> np.ndarray:
    """The mask in a file, bool (H, W): True where it is brighter than half. Raises BrokenRow if it has another shape."""
    mask = read_image(path).mean(axis=2) > 0.5
    if mask.shape != shape:
        raise BrokenRow(
            f"mask {path!r} has {mask.shape[1]} x {mask.shape[0]} pixels, its image {shape[1]} x {shape[0]}"
        )
    return mask


def as_image(completion: object, shape: tuple[int, ...]) -> np.ndarray | Score:
    """The completion clipped to [0, 1] if it is an image of this shape, otherwise the score of a bad completion.

    Reasons: not_an_image (no array), wrong_dtype (not floating), wrong_shape, not_finite, out_of_range (beyond [0, 1] by
    more than 0.01).
    """
    if not isinstance(completion, np.ndarray):
        return Score(0.0, "not_an_image", f"a {type(completion).__name__}; it must be a numpy array (H, W, 3)")
    if not np.issubdtype(completion.dtype, np.floating):
        return Score(0.0, "wrong_dtype", f"{completion.dtype}; it must be floating")
    if completion.shape != tuple(shape):
        return Score(0.0, "wrong_shape", f"{completion.shape}; it must be {tuple(shape)}")
    low, high = completion.min(), completion.max()  # of an array with NaN both are NaN
    if not (np.isfinite(low) and np.isfinite(high)):
        return Score(0.0, "not_finite", f"{int((~np.isfinite(completion)).sum())} values")
    if low < -0.01 or high > 1.01:
        return Score(0.0, "out_of_range", f"{low:.3g}..{high:.3g}; it must lie in [0, 1]")
    return np.clip(completion, 0, 1).astype(np.float32, copy=False)
