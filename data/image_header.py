"""The size of an image from its header; no pixel is read."""

from pathlib import Path


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels. Raises ValueError if the file is no image."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise ModuleNotFoundError("image folders need pillow; install it with pip install '.[flow]'") from None
    try:
        with Image.open(path) as image:
            return image.size
    except OSError as error:
        raise ValueError(f"{path} does not open as an image ({error}); copy it again from its source") from None
