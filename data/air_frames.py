"""Stores of maps over time: opened through dask, read in blocks, held in memory or in a bounded cache.

    open_store(path)   Zarr, NetCDF (CF or IOAPI), or a folder of such files
    Frames             one store as float32 (time, variable, ...), by whole-number slices of the archive's time axis

A block is a chunk of the store along time, or several small ones. Reading in time order decodes each chunk once; reading at
random from a store that is not in memory decodes a chunk for each window, so chunks of 10 to 50 frames are right for
training on a large archive, and chunks above CHUNK_MB are refused.
"""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from . import cf, ioapi

BLOCK_MB, CHUNK_MB = 4, 400  # of one variable, before coarsening


class Cache:
    """Blocks by key, the least recently used dropped as soon as they are more than `limit` bytes together."""

    def __init__(self, limit: int):
        self.limit, self.size, self.needed = limit, 0, 0
        self._blocks: OrderedDict[Any, np.ndarray] = OrderedDict()
        self._lock = threading.RLock()

    def get(self, key, nbytes: int, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The block of that key, of `nbytes`, made if it is not there."""
        with self._lock:  # one block is decoded at a time, so that threads together keep to the limit
            if key in self._blocks:
                self._blocks.move_to_end(key)
                return self._blocks[key]
            while self._blocks and self.size + nbytes > self.limit:
                self.size -= self._blocks.popitem(last=False)[1].nbytes
            block = self._blocks[key] = make()
            self.size += nbytes
            return block


class Frames:
    """One store on the archive's time axis: `frames.between(start, stop)` is float32 (stop - start, V, ...).

    NaN is missing, and so is every frame before the store begins or after it ends.
    """

    def __init__(self, variables: list, factors: list[float], k: int, shape: tuple[int, ...], first: int, place: str):
        """variables: DataArrays (time, ...) over dask, or None for a variable that is missing throughout; k: coarsening.

        shape: of one frame of one variable after coarsening. first: the archive's time index of the first frame.
        """
        self._variables, self._factors, self._k = variables, np.float32(factors), k
        there = next(one for one in variables if one is not None)
        self.first, self.length = first, there.sizes["time"]
        self.shape = (len(variables), *shape)
        self._held: np.ndarray | None = None
        self._cache: Cache | None = None  # None: everything is held in memory
        frame_mb = max(4 * one[0].size for one in variables if one is not None) / 2**20
        edges = np.cumsum([0, *there.chunks[there.get_axis_num("time")]])
        if (longest := int(np.diff(edges).max())) * frame_mb > CHUNK_MB:
            raise ValueError(
                f"{place} is stored in chunks of {longest} times, {longest * frame_mb:.0f} MB each; the limit is {CHUNK_MB} MB: "
                f"write it again in chunks of {max(1, int(BLOCK_MB / frame_mb))} times"
            )
        self._edges = [0]  # of the blocks: chunks together until they are BLOCK_MB
        for edge, following in zip(edges[1:], [*edges[2:], np.inf], strict=True):
            if (following - self._edges[-1]) * frame_mb > BLOCK_MB:
                self._edges.append(int(edge))

    @property
    def nbytes(self) -> int:
        """In memory."""
        return 4 * self.length * int(np.prod(self.shape))

    @property
    def block_nbytes(self) -> int:
        """Of the largest block, decoded and coarsened."""
        return 4 * int(np.diff(self._edges).max()) * int(np.prod(self.shape))

    def through(self, cache: Cache, blocks: int = 1) -> None:
        """Reads blocks when they are asked for, instead of everything the first time.

        blocks: how many a window may need at once. The cache grows if it cannot hold them: each would be decoded for each window.
        """
        self._cache = cache
        cache.needed += blocks * self.block_nbytes
        cache.limit = max(cache.limit, cache.needed)

    def between(self, start: int, stop: int) -> np.ndarray:
        out = np.full((stop - start, *self.shape), np.nan, np.float32)
        low, high = max(start - self.first, 0), min(stop - self.first, self.length)
        offset = self.first - start
        if self._cache is None and high > low:
            if self._held is None:
                self._held = self._read_all()
            out[low + offset : high + offset] = self._held[low:high]
            return out
        while low < high:
            number = bisect_right(self._edges, low) - 1
            begin, end = self._edges[number : number + 2]
            nbytes = 4 * (end - begin) * int(np.prod(self.shape))
            block = self._cache.get((id(self), number), nbytes, lambda b=begin, e=end: self._read(b, e))
            until = min(end, high)
            out[low + offset : until + offset] = block[low - begin : until - begin]
            low = until
            del block  # or it would be held while the next is decoded
        return out

    def blocks(self) -> Iterator[np.ndarray]:
        """Everything, some frames at a time, in time order."""
        for begin, end in pairwise(self._edges):
            if self._cache is None:
                yield self.between(begin + self.first, end + self.first)
            else:  # in passing: what a window needs stays in the cache
                yield self._read(begin, end)

    def _read_all(self) -> np.ndarray:
        whole = np.empty((self.length, *self.shape), np.float32)
        for begin, end in pairwise(self._edges):
            whole[begin:end] = self._read(begin, end)
        return whole

    def _read(self, begin: int, end: int) -> np.ndarray:
        block = np.full((end - begin, *self.shape), np.nan, np.float32)
        for number, variable in enumerate(self._variables):
            if variable is not None:
                # One chunk at a time and in this thread: decoding takes several times a chunk's memory, and a window may
                # be read inside a task of a cluster, whose scheduler would be the default.
                values = variable.data[begin:end].compute(scheduler="synchronous").astype(np.float32, copy=False)
                np.multiply(cf.coarse(values, self._k), self._factors[number], out=block[:, number])
        return block


def open_store(path: Path, keep: Callable[[xr.Dataset], list[str]] | None = None) -> xr.Dataset:
    """A Zarr store, a NetCDF file (CF or IOAPI) or a folder of such files that follow each other, over dask by time.

    keep: names of the variables that are needed, from the first file; joining the hundreds of others takes minutes.
    Raises ValueError where the path is none of them.
    """
    if path.is_dir() and not is_zarr(path):
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        if not files:
            raise ValueError(f"{path} is empty; it must hold NetCDF files (CF or IOAPI)")
        if ioapi.is_ioapi(first := open_one(files[0])):
            return ioapi.open_ioapi(files, keep(first) if keep else None)
        parts = [_by_time(open_one(file)) for file in files]
        whole = xr.concat(parts, "time", data_vars="minimal", coords="minimal", compat="override", join="override")
        _, first = np.unique(whole["time"].values, return_index=True)
        return whole.isel(time=first)
    ds = open_one(path)
    return ioapi.open_ioapi(path) if ioapi.is_ioapi(ds) else _by_time(ds)


def open_one(path: Path) -> xr.Dataset:
    """A Zarr store or a NetCDF file as xarray decodes it, not over dask; ValueError where it is neither."""
    try:
        if path.is_dir():
            described = path / "zarr.json"
            consolidated = (path / ".zmetadata").exists() or (
                described.exists() and '"consolidated_metadata"' in described.read_text()
            )
            return xr.open_dataset(path, engine="zarr", consolidated=consolidated, decode_timedelta=True)
        return xr.open_dataset(path, engine="netcdf4", decode_timedelta=True)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} does not open as {'Zarr' if path.is_dir() else 'NetCDF'}: {error}") from None


def _by_time(ds: xr.Dataset) -> xr.Dataset:
    """The Dataset over dask, in whole chunks of the store along time of about BLOCK_MB."""
    time = next((name for name in ("time", "valid_time", "Time", "date") if name in ds.dims), None)
    if time is None:
        return ds
    mapped = [one for one in ds.data_vars.values() if time in one.dims and one.ndim > 1]
    if not mapped:
        return ds
    stored = max(one.encoding.get("preferred_chunks", {}).get(time, 1) for one in mapped)
    block = int(BLOCK_MB * 2**20 / max(4 * one.size // max(one.sizes[time], 1) for one in mapped))
    return ds.chunk({time: stored * max(1, block // stored)})


def is_zarr(path: Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zmetadata"))
