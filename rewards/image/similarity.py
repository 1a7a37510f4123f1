"""How like a reference image an image is: PSNR, SSIM; and where it differs from the source. Metrics, not rewards: they
see the true target.

`psnr` and `psnr_y` are in decibels, capped at PSNR_CAP, which is what the exact target scores. The luma Y is that of ITU-R
BT.601 in studio range (65.481 R + 128.553 G + 24.966 B + 16) / 255, as in super-resolution benchmarks.
"""

from collections.abc import Callable, Sequence
from functools import wraps

import numpy as np
from scipy import ndimage

from rewards.image.editing import over_edits
from rewards.image.files import as_image, read_image, read_mask
from rewards.image.geometry import Reference, iou
from rewards.image.location import PALETTE, Found, bounds, locate, rectangle
from rewards.score import BrokenRow, Score, batched

PSNR_CAP = 60.0
BT601 = np.array([65.481, 128.553, 24.966], dtype=np.float32) / 255


def luma(image: np.ndarray) -> np.ndarray:
    """(..., 3) RGB in [0, 1] -> (...) Y in [16 / 255, 235 / 255]."""
    return image @ BT601 + np.float32(16 / 255)


def decibels(image: np.ndarray, reference: np.ndarray) -> float:
    """PSNR = -10 log10 of the mean squared difference, for values in [0, 1]; at most PSNR_CAP."""
    error = float(np.mean(np.square(image - reference, dtype=np.float64)))
    return min(PSNR_CAP, -10 * np.log10(error)) if error > 0 else PSNR_CAP


def structural_similarity(image: np.ndarray, reference: np.ndarray) -> float:
    """Mean SSIM of two (H, W) arrays in [0, 1]; in [-1, 1], 1 if they are equal.

    Gaussian window of 11 pixels, sigma 1.5, population moments, C1 = 0.01^2, C2 = 0.03^2, averaged over the places where the
    window lies inside. Raises ValueError below 11 x 11. Source: Wang et al. 2004 (IEEE TIP 13(4)); read in its text.
    """
    if min(image.shape) < 11:
        raise ValueError(f"SSIM needs images of at least 11 x 11 pixels, got {image.shape[1]} x {image.shape[0]}")

    def blurred(values: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(values, 1.5, radius=5)[5:-5, 5:-5]

    x, y = image.astype(np.float64), reference.astype(np.float64)
    mx, my = blurred(x), blurred(y)
    vx, vy, cov = blurred(x * x) - mx * mx, blurred(y * y) - my * my, blurred(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return float(np.mean((2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))))


def over_targets(measure: Callable[[np.ndarray, np.ndarray], Score]) -> Callable:
    """Make a batched metric over the column `target` (path) from `measure(image, target) -> Score`; None without one."""

    @batched
    @wraps(measure)
    def metric(completions, *, target: Sequence[str | None]) -> list[Score]:
        scores = []
        for completion, path in zip(completions, target, strict=True):
            if path is None:
                scores.append(Score(None))
                continue
            reference = read_image(path)
            image = as_image(completion, reference.shape)
            scores.append(image if isinstance(image, Score) else measure(image, reference))
        return scores

    del metric.__wrapped__  # its signature is not the metric's
    return metric


@over_targets
def psnr(image: np.ndarray, target: np.ndarray) -> Score:
    """PSNR over all RGB values, in dB, at most 60; a bad completion scores 0."""
    return Score(decibels(image, target))


@over_targets
def psnr_y(image: np.ndarray, target: np.ndarray) -> Score:
    """PSNR of the luma, in dB, at most 60; a bad completion scores 0."""
    return Score(decibels(luma(image), luma(target)))


@over_targets
def ssim(image: np.ndarray, target: np.ndarray) -> Score:
    """Mean SSIM of the luma, negative values as 0. BrokenRow below 11 x 11 pixels."""
    try:
        return Score(max(0.0, structural_similarity(luma(image), luma(target))))
    except ValueError as error:
        raise BrokenRow(str(error)) from error


@batched
def target_iou(
    completions, *, target_mask=None, target=None, object=None, colour=None, palette=None, detector=None
) -> list[Score]:
    """IoU of the object found in the output with the object in the true target; 0 where it is not found.

    The true object is `target_mask`, or what is found in `target`; None without either. With a detector both are boxes.
    """
    nothing = [None] * len(completions)
    masks, targets = target_mask or nothing, target or nothing
    looks = [column or nothing for column in (object, colour, palette)] + [detector or [PALETTE] * len(completions)]
    scores: list[Score] = [Score(None)] * len(completions)
    images: dict[int, np.ndarray] = {}
    for i, completion in enumerate(completions):
        if path := masks[i] or targets[i]:
            image = as_image(completion, read_image(path).shape)
            if isinstance(image, Score):
                scores[i] = image
            else:
                images[i] = image
    truths = _found({i: read_image(targets[i]) for i in images if not masks[i]}, looks)
    for i, seen in _found(images, looks).items():
        if isinstance(truths.get(i), Score):
            raise BrokenRow(f"target {targets[i]} does not show the object")
        if isinstance(seen, Found):
            truth = truths[i].mask if i in truths else _true_mask(masks[i], seen, by_box=looks[-1][i] != PALETTE)
            seen = Score(iou(seen.mask, truth))
        scores[i] = seen
    return scores


def _found(images: dict[int, np.ndarray], looks: list[Sequence]) -> dict[int, Found | Score]:
    found = locate(list(images.values()), *([column[i] for i in images] for column in looks))
    return dict(zip(images, found, strict=True))


def _true_mask(path: str, seen: Found, by_box: bool) -> np.ndarray:
    mask = read_mask(path, seen.mask.shape)
    return rectangle(bounds(mask), mask.shape) if by_box and mask.any() else mask


@over_edits(looks=False)
def edit_locality(reference: Reference, image: np.ndarray, found: None) -> Score:
    """Share of the summed absolute change that lies where the edit may change something: the object's old and new place.

    0 with the reason unchanged where nothing changed.
    """
    change = np.abs(image - reference.image).mean(axis=2, dtype=np.float64)
    total = change.sum()
    return Score(1 - float(change[reference.outside].sum() / total)) if total else Score(0.0, "unchanged")
