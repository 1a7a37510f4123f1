"""Runs rewards on completions: four cases kept apart, failures counted; and the TRL signature for any reward.

A *bad completion* has a low value and a reason code. A reward that does *not apply* gives None: only that component is
left out. A check that *could not judge* (an exception, NaN, inf, lost workers) leaves the whole row unscored and is
counted. A *broken row* of the data raises `BrokenRowError` with the row's id.

Rewards run in worker processes under limits (core/pool.py says when a dead worker is the completion's fault); each is
found there by module and name, and completion and columns travel as JSON: a tuple arrives as a list, the keys of a dict
as strings. `batched` rewards run in this process, without limits. Results are ordered by row, never by arrival.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from core import worker
from core.pool import Call, Limits, Pool

logger = logging.getLogger(__name__)

MIN_ROWS = 16  # a share of failures is taken over at least so many rows


class BrokenRowError(ValueError):
    """A row of the data is wrong (its gold does not run); the message names it."""


class RewardsFailing(RuntimeError):
    """More rows are unscored than `max_failure_share` allows; the message counts the failures of each reward."""


@dataclass(frozen=True)
class Scores:
    """What K rewards said of N completions, in the order of the rows.

    values: (N, K) float64; NaN = the component does not apply or, with the whole row, the row is unscored.
    failed: (N,) bool; True = unscored: some check could not judge.
    reasons, details: N dicts {component: text}, only where a reward said something.
    metrics: reward_failures/<name> (rows), timeouts and killed_workers (zeros given for that), seconds/<name> (sum of
        the time inside the reward), score_s (wall).
    """

    values: np.ndarray
    failed: np.ndarray
    reasons: list[dict[str, str]]
    details: list[dict[str, str]]
    metrics: dict[str, float]


class Scorer:
    """Scores completions with named rewards, in warm workers that start with the first call.

    rewards: {component: reward}; two components may be the same function. A reward is a module-level function of the
        completion and of the columns its signature names. Its attribute `scope` says what one call sees: "completion"
        (default), "group" (a group's completions and the columns of its first row; a kill is the whole group's fault),
        "batch" (all completions, and each column as a list; in this process).
    workers, timeout_s, memory_mb, max_answer_bytes: core.pool.Limits. pool: share these workers instead.
    max_failure_share: above this share of unscored rows in a batch, RewardsFailing. Of few rows a share says little:
        smaller batches are taken together with those before them, and nothing is raised before MIN_ROWS rows.
    Raises ValueError if something is not a reward.
    """

    def __init__(
        self,
        rewards: Mapping[str, Callable],
        *,
        workers: int = 2,
        timeout_s: float = 10.0,
        memory_mb: int = 2048,
        max_answer_bytes: int = 65536,
        max_failure_share: float = 0.5,
        pool: Pool | None = None,
    ):
        if not rewards:
            raise ValueError("a scorer needs at least one reward")
        self.names = tuple(rewards)
        self._rewards = [_Reward.of(name, function) for name, function in rewards.items()]
        self._pool = pool or Pool(Limits(workers, timeout_s, memory_mb, max_answer_bytes))
        self._failures = _Failures(max_failure_share)

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers; scoring again starts new ones."""
        self._pool.close()

    def check_columns(self, row: Mapping[str, Any]) -> None:
        """Raises ValueError if a reward needs a column that the row lacks."""
        for reward in self._rewards:
            reward.columns(row)

    def score(self, completions: Sequence[Any], rows: Sequence[Mapping[str, Any]], group_size: int = 1) -> Scores:
        """Scores completion i on row i; groups are adjacent. Identical calls within the batch are made once.

        Raises BrokenRowError (the first broken row), RewardsFailing, core.pool.WorkerError; ValueError on sizes that do
        not fit, a missing column, or a column that is not JSON.
        """
        start, n = time.perf_counter(), len(completions)
        if len(rows) != n or group_size < 1 or n % group_size:
            raise ValueError(
                f"{n} completions need {n} rows (got {len(rows)}) and group_size={group_size} must divide {n}"
            )
        calls: dict[tuple, Call] = {}
        placed: list[list[tuple[Call, int]]] = []  # [reward][row]: the call that judges it, and its place there
        spent: list[list[Call]] = []  # [reward]: the calls made for it
        for reward in self._rewards:
            before = len(calls)
            size = {"completion": 1, "group": group_size, "batch": n}[reward.scope]
            placed.append([])
            for first in range(0, n, size or 1) if reward.scope != "batch" else ():
                payload = _payload(reward, completions[first : first + size], rows[first], first)
                call = calls.setdefault((reward.target, payload), Call(reward.target, payload, size))
                placed[-1] += [(call, place) for place in range(size)]
            spent.append(list(calls.values())[before:])
        self._pool.run(list(calls.values()))
        for k, reward in enumerate(self._rewards):
            if reward.scope == "batch" and n:
                call = _in_process(reward, completions, rows)
                placed[k], spent[k] = [(call, place) for place in range(n)], [call]
        self._raise_broken(placed, rows)
        seconds = [sum(call.seconds for call in made) for made in spent]
        return self._collect(placed, n, seconds, start)

    def _raise_broken(self, placed: list[list[tuple[Call, int]]], rows: Sequence[Mapping[str, Any]]) -> None:
        for i, row in enumerate(rows):
            for reward, entries in zip(self._rewards, placed, strict=True):
                if (message := entries[i][0].broken_row) is not None:
                    which = "a row of the batch" if reward.scope == "batch" else f"row {row.get('id', i)}"
                    raise BrokenRowError(f"{which} is broken, says the reward {reward.name!r}: {message}")

    def _collect(self, placed: list[list[tuple[Call, int]]], n: int, seconds: list[float], start: float) -> Scores:
        values, failed = np.full((n, len(self.names)), np.nan), np.zeros(n, dtype=bool)
        reasons: list[dict[str, str]] = [{} for _ in range(n)]
        details: list[dict[str, str]] = [{} for _ in range(n)]
        failures, faults = Counter(), Counter()
        for k, name in enumerate(self.names):
            for i, (call, place) in enumerate(placed[k]):
                value, reason, detail = call.verdicts[place] if call.verdicts else (math.nan, "error", call.error)
                if reason:
                    reasons[i][name] = reason
                if detail:
                    details[i][name] = detail
                if call.fault:
                    faults[call.fault] += 1
                if value is None:
                    continue
                values[i, k] = value
                if math.isnan(value):
                    failed[i] = True
                    failures[name] += 1
                    self._failures.note(name, f"{reason}: {detail}")
        values[failed] = np.nan
        self._failures.add(n, int(failed.sum()), failures)
        metrics = {f"reward_failures/{name}": float(failures[name]) for name in self.names}
        metrics |= {"timeouts": float(faults["timeout"]), "killed_workers": float(faults["killed_worker"])}
        metrics |= {f"seconds/{name}": value for name, value in zip(self.names, seconds, strict=True)}
        metrics["score_s"] = time.perf_counter() - start
        return Scores(values, failed, reasons, details, metrics)


@dataclass(frozen=True)
class _Reward:
    """A reward as the scorer knows it: where a worker finds it, and which columns it reads."""

    name: str
    function: Callable
    scope: str
    target: tuple[str, str]
    required: tuple[str, ...]
    optional: tuple[str, ...]

    @classmethod
    def of(cls, name: str, function: Callable) -> _Reward:
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
        if inspect.iscoroutinefunction(function):
            raise ValueError(f"reward {name!r} is async; write it as a plain function: workers run beside each other")
        scope = getattr(function, "scope", "completion")
        if scope not in ("completion", "group", "batch"):
            raise ValueError(f"reward {name!r} has scope={scope!r}; it may be 'completion', 'group' or 'batch'")
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
        return cls(name, function, scope, target, required, optional)

    def columns(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row's columns that this reward reads. Raises ValueError if one is missing."""
        for column in self.required:
            if column not in row:
                raise ValueError(
                    f"reward {self.name!r} ({'.'.join(self.target)}) needs the column {column!r}; the row has: "
                    f"{', '.join(sorted(map(str, row)))}"
                )
        return {column: row[column] for column in (*self.required, *self.optional) if column in row}


@dataclass
class _Failures:
    """Failures of the latest rows: one batch, or as many as it takes to have MIN_ROWS rows."""

    max_share: float
    batches: deque[tuple[int, int, Counter]] = field(default_factory=deque)
    first: dict[str, str] = field(default_factory=dict)

    def note(self, name: str, message: str) -> None:
        """Says a reward's first failure aloud; later ones are only counted."""
        if name not in self.first:
            self.first[name] = message
            logger.warning(
                "reward %r could not judge a completion (later failures are only counted): %s", name, message
            )

    def add(self, rows: int, unscored: int, counts: Counter) -> None:
        """Raises RewardsFailing if too many of the latest rows are unscored."""
        self.batches.append((rows, unscored, counts))
        while sum(batch[0] for batch in self.batches) - self.batches[0][0] >= MIN_ROWS:
            self.batches.popleft()
        rows, unscored = (sum(batch[i] for batch in self.batches) for i in (0, 1))
        if rows < MIN_ROWS or unscored <= self.max_share * rows:
            return
        counts = sum((batch[2] for batch in self.batches), Counter())
        lines = [f"\n  {name}: {count} failures; its first was {self.first[name]}" for name, count in counts.items()]
        raise RewardsFailing(
            f"{unscored} of the last {rows} rows could not be scored, above max_failure_share={self.max_share:g}:"
            + "".join(lines)
        )


def _payload(reward: _Reward, completions: Sequence[Any], row: Mapping[str, Any], index: int) -> str:
    """All of a request that decides its answer, as JSON text."""
    grouped = reward.scope == "group"
    where = f"row {row.get('id', index)}, reward {reward.name!r}"
    try:
        payload = json.dumps([grouped, list(completions) if grouped else completions[0], reward.columns(row)])
    except TypeError as error:
        raise ValueError(
            f"{where}: {error}; workers get JSON: text completions, and columns of text, numbers, lists and dicts "
            f"(a @batched reward runs in this process and takes anything)"
        ) from error
    if len(payload) > worker.MAX_REQUEST_BYTES - 1024:
        raise ValueError(f"{where}: completion and columns take {len(payload)} of {worker.MAX_REQUEST_BYTES} bytes")
    return payload


def _in_process(reward: _Reward, completions: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> Call:
    """Calls a batched reward; what became of it in the form of a worker's call."""
    call = Call(reward.target, "", len(completions))
    each = [reward.columns(row) for row in rows]
    start = time.perf_counter()
    try:
        results = reward.function(list(completions), **{name: [columns[name] for columns in each] for name in each[0]})
        call.verdicts = worker.verdicts(results, len(completions))
    except Exception as error:
        if getattr(type(error), "broken_row", False):
            call.broken_row = str(error)
        else:
            call.error = worker.describe(error)
    call.seconds = time.perf_counter() - start
    return call


# -- in anyone's TRL script ------------------------------------------------------------------------------------------

TRL_KEYWORDS = ("completion_ids", "trainer_state", "log_metric", "environments")
_pools: dict[Limits, Pool] = {}


def as_trl(
    reward: Callable, *, group_size: int | None = None, max_failure_share: float = 0.5, **limits: Any
) -> Callable[..., list[float | None]]:
    """The reward with TRL's signature, (prompts, completions, **columns) -> list[float | None].

    None where it does not apply or could not judge, so that TRL leaves it out. Completions are text or chat messages
    (the last one of the assistant counts); the prompt is the column `prompt`; reasons go to `log_extra`.
    group_size: TRL's num_generations, for a reward that looks at whole groups.
    limits: fields of core.pool.Limits; rewards with equal limits share one pool, started at the first call.
    """
    limits = Limits(**limits)
    name = getattr(reward, "__name__", "reward")
    scorer = Scorer({name: reward}, pool=_pools.setdefault(limits, Pool(limits)), max_failure_share=max_failure_share)
    if getattr(reward, "scope", "completion") == "group" and group_size is None:
        raise ValueError(f"reward {name!r} looks at whole groups: as_trl needs group_size (TRL's num_generations)")

    def trl_reward(prompts: list, completions: list, log_extra: Callable | None = None, **columns: Any):
        columns = {column: values for column, values in columns.items() if column not in TRL_KEYWORDS}
        columns["prompt"] = prompts
        rows = [{column: values[i] for column, values in columns.items()} for i in range(len(prompts))]
        scores = scorer.score([_text(completion) for completion in completions], rows, group_size or 1)
        if log_extra is not None:
            log_extra(f"{name}_reason", [reasons.get(name, "") for reasons in scores.reasons])
        return [None if math.isnan(value) else value for value in scores.values[:, 0].tolist()]

    trl_reward.__name__ = trl_reward.__qualname__ = name
    trl_reward.__doc__ = reward.__doc__
    return trl_reward


def _text(completion: str | list[dict[str, Any]]) -> str:
    """A completion as text: itself, or the last message of the assistant."""
    if isinstance(completion, str):
        return completion
    content = next((message["content"] for message in reversed(completion) if message["role"] == "assistant"), "")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""
