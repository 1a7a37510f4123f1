"""What the scorer knows of a reward: where it is found, what one call sees, which columns it reads, when an answer holds.

The attributes that rewards/score.py sets are read here by name, so that any function can carry them: `scope`,
`volatile`, `reads`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from core import worker
from core.cache import Stamps, code_version

SCOPES = ("completion", "group", "batch")


@dataclass(frozen=True)
class Reward:
    """A reward function under the name of its component.

    scope: what one call sees. target: (module, qualname), where workers find it. required, optional: columns.
    version: core.cache.code_version; None = its answers are not kept. reads: columns -> paths that it reads besides.
    """

    name: str
    function: Callable
    scope: str
    is_async: bool
    target: tuple[str, str]
    required: tuple[str, ...]
    optional: tuple[str, ...]
    version: str | None
    reads: Callable[[Mapping[str, Any]], Iterable]

    @classmethod
    def of(cls, name: str, function: Callable) -> Reward:
        """Raises ValueError if a worker could not find the function, or if its signature is not a reward's."""
        if not inspect.isroutine(function):
            raise ValueError(
                f"reward {name!r} is a {type(function).__name__}; workers find rewards by module and name, so it must "
                f"be a module-level function (for a functools.partial write a function, or make the argument a column)"
            )
        target = function.__module__, function.__qualname__
        if target[0] == "__main__" or "<" in target[1]:
            raise ValueError(
                f"reward {name!r} is {'.'.join(target)}; workers import rewards, so it cannot be a lambda, a nested "
                f"function or a function of the script that is being run: move it to the top level of a module"
            )
        try:
            found = worker.resolve(*target)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"reward {name!r}: workers could not find {'.'.join(target)}: {error}") from error
        if found != function:
            raise ValueError(f"reward {name!r}: {'.'.join(target)} is another object, and workers would run that one")
        scope, is_async = getattr(function, "scope", "completion"), inspect.iscoroutinefunction(function)
        if scope not in SCOPES:
            raise ValueError(f"reward {name!r} has scope={scope!r}; it may be 'completion', 'group' or 'batch'")
        if is_async and scope == "batch":
            raise ValueError(
                f"reward {name!r} is async and batched; leave out @batched: the calls of a batch run beside each other"
            )
        signature = inspect.signature(function)
        first, *columns = list(signature.parameters.values()) or [None]
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        if first is None or first.kind > named[0] or any(column.kind not in named for column in columns):
            raise ValueError(
                f"reward {name!r} has the signature {signature}; it must take the completion first and then name each "
                f"column that it reads, as in {function.__name__}(completion, *, sql, database)"
            )
        required = tuple(column.name for column in columns if column.default is column.empty)
        optional = tuple(column.name for column in columns if column.default is not column.empty)
        # What runs in this process is not kept: it may see anything, and an async judge is somebody else's.
        cached = not is_async and scope != "batch" and not getattr(function, "volatile", False)
        version = code_version(target[0]) if cached else None
        reads = getattr(function, "reads", lambda columns: ())
        return cls(name, function, scope, is_async, target, required, optional, version, reads)

    def columns(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row's columns that this reward reads. Raises ValueError if one is missing."""
        for column in self.required:
            if column not in row:
                raise ValueError(
                    f"reward {self.name!r} ({'.'.join(self.target)}) needs the column {column!r}; the row has: "
                    f"{', '.join(sorted(map(str, row)))}"
                )
        return {column: row[column] for column in (*self.required, *self.optional) if column in row}

    def payload(self, seen: Any, columns: Mapping[str, Any], row: Any) -> str:
        """All of a request that decides its answer, as JSON text. seen: a completion, or those of a group.

        Raises ValueError, naming the row, for what is not JSON or is too long.
        """
        where = f"row {row}, reward {self.name!r}"
        try:
            payload = json.dumps([self.scope == "group", seen, columns])
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{where}: {error}; workers get JSON: text completions, and columns of text, numbers, lists and dicts "
                f"(a @batched reward runs in this process and takes anything)"
            ) from error
        if len(payload) > worker.MAX_REQUEST_BYTES - 1024:
            raise ValueError(f"{where}: completion and columns take {len(payload)} of {worker.MAX_REQUEST_BYTES} bytes")
        return payload

    def key(self, payload: str, columns: Mapping[str, Any], stamps: Stamps) -> bytes | None:
        """What decides the answer to a call, as a hash: code, arguments, state of the files read; None: do not keep it."""
        if self.version is None:
            return None
        try:
            named = (value for value in columns.values() if isinstance(value, str))
            paths = [*named, *map(str, self.reads(columns))]
        except Exception:  # the reward will not fare better with these columns, and says so where it is counted
            return None
        files = [(path, stamp) for path in paths if (stamp := stamps[path])]
        known = repr((self.version, self.target, files))
        return hashlib.sha256(f"{known}\n{payload}".encode()).digest()
