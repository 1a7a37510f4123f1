"""Verdicts of earlier calls, so that a repeated call costs no worker: late in training a policy repeats itself.

A verdict is found under everything that decides it (`Reward.key`): the reward's module and name, its code, completion
and columns, and the state of every file that a text column names or that the reward lists (`reads` of
rewards/score.py). Kept are only verdicts of calls that would be judged alike again: not what could not be judged, not
the zeros for a lost worker, not a Score with repeatable=False, no `volatile`, batched or async reward.
Not covered: what a reward reads beside this (environment, network, files inside dicts) and imports by computed names;
code edited while a scorer is in use (a worker that replaces a lost one imports what is on disk by then);
two changes of a file within one tick of its clock (some milliseconds) that leave its size.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import os
import sys
from collections import OrderedDict
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder

ENTRY_BYTES = 160  # of an entry beside its key and verdicts: its place in the dict, a tuple, a size


class Cache:
    """Verdicts by key, the least recently used dropped when they take more than `max_mb` (estimated) of memory."""

    def __init__(self, max_mb: float):
        if not max_mb >= 0:
            raise ValueError(f"cache_mb={max_mb} must be 0 (off) or more")
        self.max_bytes, self.bytes = max_mb * 2**20, 0
        self._entries: OrderedDict[bytes, tuple[list[list], int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> list[list] | None:
        """The verdicts (core.worker.verdict) kept under `key`; do not change them."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: bytes, verdicts: list[list]) -> None:
        size = ENTRY_BYTES + sys.getsizeof(key) + sys.getsizeof(verdicts)
        size += sum(sys.getsizeof(verdict) + sum(map(sys.getsizeof, verdict)) for verdict in verdicts)
        self.bytes += size - self._entries.pop(key, (None, 0))[1]
        self._entries[key] = verdicts, size
        while self.bytes > self.max_bytes:
            self.bytes -= self._entries.popitem(last=False)[1][1]


class Stamps(dict):
    """path -> (mtime and ctime in ns, size, inode), None where no file is; each path is looked at once.

    ctime: `cp -p` of another version out of a reproducible archive leaves the other three; nobody can set it back.
    """

    def __missing__(self, path: str) -> tuple[int, ...] | None:
        try:
            stat = os.stat(path)
            self[path] = stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino
        except (OSError, ValueError):
            self[path] = None
        return self[path]


# -- the code behind a reward ------------------------------------------------------------------------------------------


def code_version(module: str) -> str | None:
    """Hash of the sources of a module and of every module it imports, directly or not, also inside functions.

    The standard library and installed packages are left out, except the package that the module itself is of. None if
    a source cannot be read or parsed.
    """
    sources: dict[str, bytes] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in sources:
            continue
        spec = _find(name, own=module.partition(".")[0])
        if spec is None or spec.origin is None:  # not a module but a name in one; or a folder without a file
            if name == module:
                return None
            continue
        try:
            with open(spec.origin, "rb") as file:
                sources[name] = file.read()
            package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
            waiting += _imports(sources[name], package) if spec.origin.endswith(".py") else ()
        except (OSError, SyntaxError, ValueError):
            return None
    return hashlib.sha256(repr(sorted(sources.items())).encode()).hexdigest()


def _find(name: str, own: str) -> ModuleSpec | None:
    """Where a module's source is, without importing anything; None if it is no module, or not ours to follow."""
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if top != own and (top in sys.stdlib_module_names or "-packages" in str(spec)):  # site-packages, dist-packages
        return None
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations)
    return spec


@functools.lru_cache(maxsize=256)  # the rewards of one package share most of it
def _imports(source: bytes, package: str) -> tuple[str, ...]:
    """Full names of all that a source may import, with the packages that hold them; some name no module."""

    def names() -> Iterator[str]:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                yield from (f"{base}.{alias.name}" for alias in node.names)

    return tuple(
        {".".join(parts[:i]) for parts in (name.split(".") for name in names()) for i in range(1, len(parts) + 1)}
    )
