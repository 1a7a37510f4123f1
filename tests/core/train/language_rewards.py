"""Rewards for tests/core/train/test_language.py; workers import them, so no torch here."""

import math
import zlib


def spread(completion: str) -> float:
    """In [0, 1), almost never the same for two texts, never a sum of few powers of two."""
    return zlib.crc32(completion.encode()) % 997 / 997


def shortness(completion: str) -> float:
    return 1 / (3 + len(completion.split()) + spread(completion) / 7)


def counts_red(completion: str) -> float:
    """Share of the eight words that are `red`."""
    return completion.split().count("red") / 8


def unsure_of_some(completion: str) -> float:
    """Cannot judge about a quarter of all texts."""
    return math.nan if zlib.crc32(completion.encode()) % 4 == 0 else spread(completion[::-1])
