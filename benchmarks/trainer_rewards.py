"""Rewards for timing: deterministic and cheap; no torch. `spread` is almost never equal for two texts."""

import zlib

from rewards.score import batched


def spread(completion: str) -> float:
    """In [0, 1)."""
    return zlib.crc32(completion.encode()) % 997 / 997


@batched
def spread_of_batch(completions: list[str]) -> list[float]:
    return [spread(completion) for completion in completions]


@batched
def right_of_batch(completions: list[str]) -> list[float]:
    """1 or 0; about half of all texts are right."""
    return [float(spread(completion) > 0.5) for completion in completions]


@batched
def fine_of_batch(completions: list[str]) -> list[float]:
    """A second one, in tenths."""
    return [round(spread(completion[::-1]), 1) for completion in completions]


@batched
def left_brighter(completions: list) -> list[float]:
    """Of pictures (H, W, C): the left half's mean less the right half's; almost never equal for two."""
    half = completions[0].shape[1] // 2
    return [float(picture[:, :half].mean() - picture[:, half:].mean()) for picture in completions]
