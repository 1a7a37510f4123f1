"""Is the named object where the instruction wants it, once, unchanged, and everything else as it was?

Five factors in [0, 1], each 1 for the exact edit, and `edit`, their product: what one hack gains in one factor it loses in
another. All come from the source image and the commanded geometry (rewards/image/geometry.py), never from a target image.
The released rewards of Talk2Move (arXiv 2601.02356), which pay for direction alone, are in rewards/image/talk2move.py.

Columns: source (path), operation (translate | rotate | resize), box and target_box (pixels, x2 and y2 exclusive; without
a target_box: direction and distance in pixels, or factor about the box's centre), angle (degrees, positive is clockwise),
mask (path), object (phrase), colour and palette (0..255), detector: "palette", or the path of a detector's folder.
With "palette" the object's shape is seen. With a detector only its box is, so a rotation shows as far as it changes the
box, and identity is judged inside the middle of the box. Not covered: a turn that the outline does not show (a disc).
Reasons, besides those of rewards/image/files.py and location.py: misplaced, misshapen, source_left, hole (the old place does
not look like its surroundings), duplicate, background_changed, object_changed.
"""

import math
from collections.abc import Callable, Sequence
from functools import wraps

import numpy as np
from scipy import ndimage

from rewards.image.files import as_image
from rewards.image.geometry import STRAY, Command, Reference, centroid
from rewards.image.location import EIGHT, Found, locate
from rewards.score import Score, batched

SHARPNESS = 3.0  # an error as large as the edit itself leaves e^-3 = 5 %
NEAR_CENTRE = 0.5  # pixels
BACKGROUND_NOISE, BACKGROUND_SCALE = 0.02, 0.25  # mean absolute difference in [0, 1]
COLOUR_NOISE, COLOUR_SCALE = 0.05, 0.25  # likewise
FILL_MARGIN, FILL_SCALE = 0.1, 0.25  # likewise


def prepared(
    completions: Sequence, looks: bool, *, object: Sequence[str | None], **columns: Sequence
) -> list[tuple[Reference, np.ndarray, Found | Score | None] | Score]:
    """(reference, image, what was found) of each completion, or the score of a bad one. looks: False = nothing is sought."""
    references: dict[Command, Reference] = {}
    ready: list = []
    for i, completion in enumerate(completions):
        command = Command.of(**{name: values[i] for name, values in columns.items()})
        if command not in references:
            references[command] = Reference(command)
        image = as_image(completion, references[command].image.shape)
        ready.append(image if isinstance(image, Score) else (references[command], image, None))
    good = [i for i, entry in enumerate(ready) if looks and not isinstance(entry, Score)]
    commands = [ready[i][0].command for i in good]
    found = locate(
        [ready[i][1] for i in good],
        [object[i] for i in good],
        [command.colour for command in commands],
        [command.palette for command in commands],
        [command.detector for command in commands],
    )
    for i, seen in zip(good, found, strict=True):
        ready[i] = (*ready[i][:2], seen)
    return ready


def over_edits(looks: bool = True) -> Callable:
    """Make a batched reward over the columns of an edit from `judge(reference, image, found) -> Score`."""

    def decorate(judge: Callable[[Reference, np.ndarray, Found | Score | None], Score]) -> Callable:
        @batched
        @wraps(judge)
        def reward(
            completions,
            *,
            source,
            operation,
            box,
            target_box=None,
            direction=None,
            distance=None,
            angle=None,
            factor=None,
            mask=None,
            object=None,
            colour=None,
            palette=None,
            detector=None,
        ):
            columns = {
                "target_box": target_box,
                "direction": direction,
                "distance": distance,
                "angle": angle,
                "factor": factor,
                "mask": mask,
                "object": object,
                "colour": colour,
                "palette": palette,
            }
            missing = [None] * len(completions)
            columns = {name: missing if values is None else values for name, values in columns.items()}
            detector = detector or ["palette"] * len(completions)
            ready = prepared(
                completions, looks, source=source, operation=operation, box=box, detector=detector, **columns
            )
            return [entry if isinstance(entry, Score) else judge(*entry) for entry in ready]

        del reward.__wrapped__  # its signature is not the reward's
        return reward

    return decorate


@over_edits()
def placement(reference: Reference, image: np.ndarray, found: Found | Score) -> Score:
    """How well the object's place, size and orientation fit the command.

        exp(-3 (e / reach + m))

    e: pixels between the centroid found and the commanded one, less half a pixel (one where the edit draws the object anew;
    5 % of its size with a detector). reach: the commanded distance, at least half the object's size. m: misfit of the
    shape, 1 for an object that was to be turned or resized and was not (Reference.misfit). So leaving the object as it was
    costs e^-3. Derived; see edit.
    """
    return found if isinstance(found, Score) else _placement(reference, found)


@over_edits()
def source_cleared(reference: Reference, image: np.ndarray, found: Found | Score) -> Score:
    """Whether the object left its old place, and the place looks like its surroundings.

    (1 - share of the vacated pixels that still look like the object) x (1 - the others' mean distance from the colours
    around the object in the source, over 0.25), each forgiving 5 %. None if the edit vacates less than 5 % of the object.
    """
    return _source_cleared(reference, image, found)


@over_edits()
def single(reference: Reference, image: np.ndarray, found: Found | Score) -> Score:
    """1 - the area that also looks like the object, as a share of the object's; 0 for a whole copy, 5 % are forgiven."""
    return found if isinstance(found, Score) else _single(reference, found)


@over_edits()
def background_kept(reference: Reference, image: np.ndarray, found: Found | Score) -> Score:
    """Whether the pixels away from the object's old, commanded and actual place are as in the source.

    exp(-3 max(0, w - 0.02) / 0.25), w: mean absolute difference in the worst window of the object's size (a mean over the
    whole image would hardly notice that another object is gone). The actual place is left to placement, so that an object
    on its way is not punished twice; but not that of an object of more than twice the commanded area.
    """
    return _background_kept(reference, image, found)


@over_edits()
def object_kept(reference: Reference, image: np.ndarray, found: Found | Score) -> Score:
    """Whether it is the same object: exp(-3 (colour / 0.25 + log2 of the area's error)), small errors forgiven.

    colour: the larger of the mean absolute differences of the channels' means and of their standard deviations, over the
    object's pixels in source and output. The area is compared with the commanded one.
    """
    return found if isinstance(found, Score) else _object_kept(reference, image, found)


@over_edits()
def edit(reference: Reference, image: np.ndarray, found: Found | Score) -> Score:
    """placement x source_cleared x single x background_kept x object_kept: 1 only if all of them are.

    The reason is that of the lowest factor. Derived: Talk2Move's text asks for these checks, its released reward has none.
    """
    if isinstance(found, Score):
        return found
    factors = [
        _placement(reference, found),
        _source_cleared(reference, image, found),
        _single(reference, found),
        _background_kept(reference, image, found),
        _object_kept(reference, image, found),
    ]
    judged = [factor for factor in factors if factor.value is not None]
    lowest = min(judged, key=lambda factor: factor.value)
    return Score(math.prod(factor.value for factor in judged), lowest.reason, lowest.detail)


def _placement(reference: Reference, found: Found) -> Score:
    off = float(np.hypot(*(centroid(found.mask) - reference.centroid)))
    place = max(0.0, off - max(NEAR_CENTRE, reference.slack)) / reference.reach
    shape = reference.misfit(found.mask)
    reason = "" if place + shape == 0 else "misplaced" if place >= shape else "misshapen"
    return Score(math.exp(-SHARPNESS * (place + shape)), reason, f"{off:.1f} px off, shape off by {shape:.2f}")


def _source_cleared(reference: Reference, image: np.ndarray, found: Found | Score) -> Score:
    vacated = int(reference.vacated.sum())
    if vacated < max(1.0, STRAY * reference.area):
        return Score(None)
    looks = np.zeros_like(reference.before) if isinstance(found, Score) else found.mask | found.rest
    still, odd = float(looks[reference.vacated].mean()), 0.0
    refilled = reference.refill & ~looks
    if reference.near is not None and refilled.any():
        low, high = reference.near
        pixels = image[refilled]
        beyond = np.maximum(low - pixels, pixels - high).max(axis=1) - FILL_MARGIN
        odd = float(np.clip(beyond / FILL_SCALE, 0, 1).mean())
    gone, filled = 1 - _beyond(still), 1 - _beyond(odd)
    reason = "" if gone * filled == 1 else "source_left" if gone <= filled else "hole"
    return Score(gone * filled, reason, f"{still:.0%} still there, {odd:.0%} unlike its surroundings")


def _single(reference: Reference, found: Found) -> Score:
    more = max(0, int(found.rest.sum()) - reference.stray) / reference.area
    value = 1 - _beyond(min(more, 1.0))
    return Score(value, "" if value == 1 else "duplicate", f"{more:.0%} of the object's area elsewhere")


def _background_kept(reference: Reference, image: np.ndarray, found: Found | Score) -> Score:
    change = np.abs(image - reference.image).mean(axis=2) * reference.outside
    if isinstance(found, Found) and found.mask.sum() <= 2 * reference.area:
        change[reference.widened(found.mask)] = 0
    window = max(1, min(round(reference.size), *change.shape))
    worst = float(ndimage.uniform_filter(change, window, mode="constant").max())
    value = math.exp(-SHARPNESS * max(0.0, worst - BACKGROUND_NOISE) / BACKGROUND_SCALE)
    return Score(value, "" if value == 1 else "background_changed", f"worst window differs by {worst:.3f}")


def _object_kept(reference: Reference, image: np.ndarray, found: Found) -> Score:
    before, now = reference.image[_core(reference.before, reference)], image[_core(found.mask, reference)]
    means, spreads = (np.abs(f(now, axis=0) - f(before, axis=0)).mean() for f in (np.mean, np.std))
    colour = max(0.0, float(max(means, spreads)) - COLOUR_NOISE) / COLOUR_SCALE
    ratio = abs(math.log2(found.mask.sum() / reference.area))
    area = max(0.0, ratio - reference.area_slack)
    value = math.exp(-SHARPNESS * (colour + area))
    return Score(value, "" if value == 1 else "object_changed", f"colour off by {max(means, spreads):.3f}")


def _core(mask: np.ndarray, reference: Reference) -> np.ndarray:
    """Pixels that show the object: all of a segmented one, the middle of a box."""
    if not reference.by_box:
        return mask
    inner = ndimage.binary_erosion(mask, EIGHT, iterations=max(1, round(reference.size / 4)))
    return inner if inner.any() else mask


def _beyond(share: float) -> float:
    return max(0.0, share - STRAY) / (1 - STRAY)
