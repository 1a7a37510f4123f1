"""Rewards for super-resolution that weigh fidelity against texture by what each image holds.

An image's tiles are complex or smooth by the entropy of their gradients. `attribute_preference` weighs PSNR by the smooth
share and texture by the complex share, each normalised within the group of one row. Source: GDPO-SR (arXiv 2603.16769);
read in the paper's code (Joyies/GDPO). There texture is the mean of MANIQA and MUSIQ, two networks that see no reference;
here it is the gradient magnitude similarity of Xue et al. 2014 (arXiv 1308.3052) on the complex tiles, which needs none.

Columns: id, target (path of the high-resolution image), tile (pixels of a tile's side).
"""

from collections.abc import Callable, Sequence
from functools import wraps

import numpy as np
from scipy import ndimage

from rewards.image.files import as_image, read_image
from rewards.image.similarity import PSNR_CAP, decibels, luma
from rewards.score import BrokenRow, Score, batched

TILE = 60
COMPLEX = 50.0  # entropy in bits x pixels of a tile
FULL = 64  # pixels of a side to which a tile is resized before its gradients are taken
BINS, LIMIT = 512, 5.5  # histogram of Sobel magnitudes over -LIMIT..LIMIT, as released
GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
CONTRAST = 170 / 255**2  # constant of the gradient similarity, for values in [0, 1]


def complexity(grey: np.ndarray, tile: int = TILE) -> np.ndarray:
    """(H, W) in [0, 1] -> (H, W): entropy in bits of each tile's Sobel magnitudes, times tile^2.

    As released, but for tiles at the right and lower edge that are not whole: they too are resized to 64 x 64 and, unlike
    the released ones, not counted as smoother for being smaller.
    """
    if tile < 1:
        raise ValueError(f"tile={tile} pixels; it must be at least 1")
    height, width = grey.shape
    out = np.empty((height, width), dtype=np.float64)
    for y, n_rows in _spans(height, tile):
        for x, n_columns in _spans(width, tile):
            block = grey[y : y + n_rows * tile, x : x + n_columns * tile]
            h, w = min(tile, block.shape[0]), min(tile, block.shape[1])
            tiles = block.reshape(n_rows, h, n_columns, w).transpose(0, 2, 1, 3)
            bits = _entropy(_sobel(_stretch(h) @ tiles @ _stretch(w).T))
            out[y : y + n_rows * h, x : x + n_columns * w] = np.kron(bits, np.ones((h, w))) * tile**2
    return out


def _spans(length: int, tile: int) -> list[tuple[int, int]]:
    """(start, number of tiles) of the whole tiles, and of the rest as one smaller tile."""
    whole, rest = divmod(length, tile)
    return [(0, whole)] * (whole > 0) + [(whole * tile, 1)] * (rest > 0)


def _stretch(n: int) -> np.ndarray:
    """(64, n): bilinear interpolation with pixel centres at halves and repeated edges."""
    place = np.clip((np.arange(FULL) + 0.5) * n / FULL - 0.5, 0, n - 1)
    low = np.minimum(place.astype(int), max(n - 2, 0))
    weights = np.zeros((FULL, n))
    weights[np.arange(FULL), low] = 1 - (place - low)
    weights[np.arange(FULL), np.minimum(low + 1, n - 1)] += place - low
    return weights


def _sobel(tiles: np.ndarray) -> np.ndarray:
    """Magnitude of the 3 x 3 Sobel gradients of (..., H, W), edges repeated."""
    p = np.pad(tiles, [(0, 0)] * (tiles.ndim - 2) + [(1, 1)] * 2, mode="edge")
    across, down = p[..., :, 2:] - p[..., :, :-2], p[..., 2:, :] - p[..., :-2, :]
    gx = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    gy = down[..., :, :-2] + 2 * down[..., :, 1:-1] + down[..., :, 2:]
    return np.hypot(gx, gy)


def _entropy(magnitudes: np.ndarray) -> np.ndarray:
    """(R, C, h, w) -> (R, C): entropy in bits of the histogram of each tile."""
    rows, columns = magnitudes.shape[:2]
    bins = ((magnitudes + LIMIT) * (BINS / (2 * LIMIT))).astype(int).clip(0, BINS - 1).reshape(rows * columns, -1)
    counts = np.bincount((bins + BINS * np.arange(rows * columns)[:, None]).ravel(), minlength=BINS * rows * columns)
    share = counts.reshape(rows, columns, BINS) / bins.shape[1]
    return -(share * np.log2(np.where(share > 0, share, 1))).sum(axis=2)


def detail_map(image: np.ndarray, tile: int = TILE, threshold: float = COMPLEX) -> np.ndarray:
    """(H, W, 3) -> (H, W) bool: the pixels of complex tiles. Their share is d, the weight of texture; f = 1 - d."""
    return complexity(image @ GREY, tile) > threshold


def gradient_similarity(image: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(H, W), (H, W) in [0, 1] -> (H, W) in (0, 1]: (2 a b + c) / (a^2 + b^2 + c) of the Prewitt magnitudes a and b.

    The source halves the images before; here that would drop the very detail that is asked for.
    """
    a, b = (
        np.hypot(ndimage.prewitt(v, axis=0, mode="nearest"), ndimage.prewitt(v, axis=1, mode="nearest")) / 3
        for v in (image, reference)
    )
    return (2 * a * b + CONTRAST) / (a * a + b * b + CONTRAST)


def attribute_reward(fidelity: Sequence[float], textures: Sequence[Sequence[float]], detail: float) -> np.ndarray:
    """(G,) in [0, 1]: (1 - detail) n(fidelity) + detail * mean over k of n(textures[k]), n: min-max within the group.

    fidelity: (G,), as PSNR. textures: (K, G). detail: share of complex area. n is 0.5 where all are equal (the released
    code divides by zero there).
    """
    return (1 - detail) * _normalised(fidelity) + detail * np.mean([_normalised(t) for t in textures], axis=0)


def _normalised(values: Sequence[float]) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.full(values.shape, 0.5)


class Original:
    """The high-resolution image of a row: its luma, complex tiles, and how well an image without any gradient does there."""

    def __init__(self, path: str | None, tile: int | None):
        """Raises BrokenRow if it cannot be read."""
        if path is None:
            raise BrokenRow("target is missing; super-resolution is judged by the high-resolution image")
        self.image = read_image(path)
        self.luma = luma(self.image)
        self.detail = detail_map(self.image, tile or TILE)
        self.share = float(self.detail.mean())
        self.flat = self._similarity(np.zeros_like(self.luma))

    def _similarity(self, grey: np.ndarray) -> float:
        return float(gradient_similarity(grey, self.luma)[self.detail].mean()) if self.share else 1.0

    def texture(self, image: np.ndarray) -> float:
        """Gradient similarity on complex tiles, in [0, 1]: 0 = no better than an image without gradients, 1 = exact."""
        same = self._similarity(luma(image))
        return float(np.clip((same - self.flat) / (1 - self.flat), 0, 1)) if self.flat < 1 else 1.0


def over_originals(judge: Callable[[list[np.ndarray], Original], list[Score]]) -> Callable:
    """Make a batched reward from `judge(images of one row, original) -> scores`; neighbours with one id are one group."""

    @batched
    @wraps(judge)
    def reward(completions, *, id: Sequence, target: Sequence[str], tile=None) -> list[Score]:
        scores: list[Score] = []
        while len(scores) < len(completions):
            first = last = len(scores)
            while last < len(completions) and id[last] == id[first] and target[last] == target[first]:
                last += 1
            original = Original(target[first], tile[first] if tile else None)
            images = [as_image(completion, original.image.shape) for completion in completions[first:last]]
            judged = iter(judge([image for image in images if not isinstance(image, Score)], original))
            scores += [image if isinstance(image, Score) else next(judged) for image in images]
        return scores

    del reward.__wrapped__  # its signature is not the reward's
    return reward


@over_originals
def attribute_preference(images: list[np.ndarray], original: Original) -> list[Score]:
    """f n(PSNR_Y) + d n(texture) within the group of a row: its best can be anything up to 1, a group of one gets 0.5.

    Neighbours with the same id are a group; bad completions score 0 and are left out of the normalisation. f and d: shares
    of smooth and complex area. Says who is better in the group and not how good anyone is, so report `fidelity` and
    `texture` beside it. Derived from GDPO-SR; see the module.
    """
    if not images:
        return []
    fidelities = [decibels(luma(image), original.luma) for image in images]
    textures = [original.texture(image) for image in images]
    return [Score(float(value)) for value in attribute_reward(fidelities, [textures], original.share)]


@over_originals
def fidelity(images: list[np.ndarray], original: Original) -> list[Score]:
    """PSNR_Y in dB, capped at 60, over 60: 1 for the exact image, 0.5 at 30 dB."""
    return [Score(max(0.0, decibels(luma(image), original.luma)) / PSNR_CAP) for image in images]


@over_originals
def texture(images: list[np.ndarray], original: Original) -> list[Score]:
    """Gradient similarity on the complex tiles: 1 for the exact image, 0 for one without gradients.

    None for an image without complex tiles.
    """
    return [Score(original.texture(image) if original.share else None) for image in images]
