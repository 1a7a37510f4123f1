"""The one reward that both trainers are given: deterministic, cheap, almost never equal for two texts; no torch."""

import zlib

from rewards.score import batched


def spread(completion: str) -> float:
    """In [0, 1)."""
    return zlib.crc32(completion.encode()) % 997 / 997


@batched
def spread_of_batch(completions: list[str]) -> list[float]:
    return [spread(completion) for completion in completions]
