"""Sequences whose items are too large to be in memory together: made when asked for, or kept in a file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np


class Lazy(Sequence):
    """make(item) of every item, made anew whenever it is asked for."""

    def __init__(self, make: Callable[[Any], Any], items: Sequence[Any]):
        self._make, self._items = make, items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return Lazy(self._make, self._items[place])
        return self._make(self._items[place])


class Spool(Sequence):
    """Arrays in a temporary file without a name: it is gone with the spool, or with the process. Items are read as copies."""

    def __init__(self, arrays: Iterable[np.ndarray] = ()):
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._places: list[tuple[int, np.dtype, tuple[int, ...]]] = []
        self.extend(arrays)

    def extend(self, arrays: Iterable[np.ndarray]) -> None:
        for array in arrays:
            self._places.append((self._file.seek(0, 2), array.dtype, array.shape))
            self._file.write(np.ascontiguousarray(array).tobytes())

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return Lazy(self.__getitem__, range(len(self))[place])
        start, dtype, shape = self._places[place]
        self._file.seek(start)
        array = np.empty(shape, dtype)
        self._file.readinto(array.reshape(-1).view(np.uint8))
        return array
