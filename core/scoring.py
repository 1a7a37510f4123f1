"""Runs rewards on completions: four cases kept apart, failures counted; and the TRL signature for any reward.

A *bad completion* has a low value and a reason code. A reward that does *not apply* gives None: only that component is
left out. A check that *could not judge* (an exception, NaN, inf, lost workers) leaves the whole row unscored and is
counted. A *broken row* of the data raises `BrokenRowError` with the row's id.

Rewards run in worker processes under limits (core/pool.py says when a dead worker is the completion's fault); each is
found there by module and name, and completion and columns travel as JSON: a tuple arrives as a list, the keys of a dict
as strings. Async rewards run beside them on an event loop in this process (core/coroutines.py), `batched` rewards run
here after both, without limits; only they may give a value for each decision of a completion, as an array. Answers that
hold are kept (core/cache.py). Results are ordered by row, never by arrival.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from core import worker
from core.cache import Cache, Stamps, code_version
from core.coroutines import Coroutines
from core.pool import Call, Limits, Pool
from core.reward import Reward

logger = logging.getLogger(__name__)

MIN_ROWS = 16  # a share of failures is taken over at least so many rows
MAX_IDS, MAX_QUOTED, MAX_LINE = 20, 3, 300  # broken rows that an error names, and quotes; characters of a quotation


class BrokenRowError(ValueError):
    """Rows of the data are wrong (their gold does not run). rows: {id: what a reward said}, every such row of the batch."""

    def __init__(self, rows: dict[str, str]):
        self.rows = rows
        count = "1 row of the data is" if len(rows) == 1 else f"{len(rows)} rows of the data are"
        more = f" and {len(rows) - MAX_IDS} more" if len(rows) > MAX_IDS else ""
        said = "".join(f"\n  {row}: {_first_line(message)}" for row, message in list(rows.items())[:MAX_QUOTED])
        super().__init__(f"{count} broken; mend or remove {', '.join(list(rows)[:MAX_IDS])}{more}:{said}")


class RewardsFailing(RuntimeError):
    """More rows are unscored than `max_failure_share` allows; the message counts the failures of each reward."""


@dataclass(frozen=True)
class Scores:
    """What K rewards said of N completions, in the order of the rows.

    values: (N, K) float64; NaN = the component does not apply or, with the whole row, the row is unscored. Of an array over
        decisions its mean, so that a composite, a canary and the spread of a group look at one number a completion.
    failed: (N,) bool; True = unscored: some check could not judge.
    weights: (N, K) float64, how many cases a value is the mean of: what means over rows weigh by; 0 where there is no value.
    decisions: (N, K, T) float32 if some reward gave arrays over T decisions, else None. NaN = does not apply there; a
        component that gave one number has it at every decision.
    reasons, details: N dicts {component: text}, only where a reward said something.
    metrics: reward_failures/<name> (rows); cache_hits/<name> (rows that needed no call of their own: their verdict was
        kept from an earlier batch, or the same call was made for another row or component of this one); timeouts and
        killed_workers (zeros given for that); seconds/<name> (sum of the time inside the reward), score_s (wall).
    """

    values: np.ndarray
    failed: np.ndarray
    weights: np.ndarray
    decisions: np.ndarray | None
    reasons: list[dict[str, str]]
    details: list[dict[str, str]]
    metrics: dict[str, float]


class Scorer:
    """Scores completions with named rewards, in warm workers that start with the first call.

    rewards: {component: reward}; two components may be the same function. A reward is a module-level function of the
        completion and of the columns its signature names. Its attribute `scope` says what one call sees: "completion"
        (default), "group" (a group's completions and the columns of its first row; a kill is the whole group's fault),
        "batch" (all completions, and each column as a list; in this process). `async def`: see core/coroutines.py.
    workers, timeout_s, memory_mb, max_answer_bytes, max_concurrent: core.pool.Limits. pool: share these workers instead.
    cache_mb: memory for verdicts of earlier batches; 0 = none are kept. cache: share this one instead.
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
        max_concurrent: int = 32,
        cache_mb: float = 64.0,
        max_failure_share: float = 0.5,
        pool: Pool | None = None,
        cache: Cache | None = None,
    ):
        if not rewards:
            raise ValueError("a scorer needs at least one reward")
        self.names = tuple(rewards)
        self._rewards = [Reward.of(name, function) for name, function in rewards.items()]
        self._cache = Cache(cache_mb) if cache is None else cache
        self._pool = pool or Pool(Limits(workers, timeout_s, memory_mb, max_answer_bytes, max_concurrent))
        self._coroutines = Coroutines(self._pool.limits)
        self._failures = _Failures(max_failure_share)

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers and the thread of async rewards; scoring again starts new ones. Kept verdicts are kept."""
        self._coroutines.close()
        self._pool.close()

    def check_columns(self, row: Mapping[str, Any]) -> None:
        """Raises ValueError if a reward needs a column that the row lacks."""
        for reward in self._rewards:
            reward.columns(row)

    def score(self, completions: Sequence[Any], rows: Sequence[Mapping[str, Any]], group_size: int = 1) -> Scores:
        """Scores completion i on row i; groups are adjacent. Identical calls within the batch are made once.

        Raises BrokenRowError (all broken rows), RewardsFailing, core.pool.WorkerError; ValueError on sizes that do not
        fit, a missing column, a column that is not JSON, or arrays over decisions of several lengths.
        """
        start, n = time.perf_counter(), len(completions)
        if len(rows) != n or group_size < 1 or n % group_size:
            raise ValueError(
                f"{n} completions need {n} rows (got {len(rows)}) and group_size={group_size} must divide {n}"
            )
        calls: dict[tuple, Call] = {}
        placed: list[list[tuple[Call, int]]] = []  # [reward][row]: the call that judges it, and its place there
        made: list[list[Call]] = []  # [reward]: the calls made for it
        stamps = Stamps()
        for reward in self._rewards:
            size = group_size if reward.scope == "group" else 1
            made.append([])
            placed.append([])
            for first in range(0, n, size) if reward.scope != "batch" else ():
                seen = list(completions[first : first + size]) if reward.scope == "group" else completions[first]
                columns = reward.columns(rows[first])
                payload = reward.payload(seen, columns, rows[first].get("id", first))
                call = calls.get((reward.target, payload))
                if call is None:
                    call = Call(reward.target, payload, size, reward.key(payload, columns, stamps))
                    call.verdicts = self._cache.get(call.key)
                    calls[reward.target, payload] = call
                    if call.verdicts is None:
                        made[-1].append(call)
                placed[-1] += [(call, place) for place in range(size)]
        self._run(made)
        for k, reward in enumerate(self._rewards):
            if reward.scope == "batch" and n:
                made[k] = [_in_process(reward, completions, rows)]
                placed[k] = [(made[k][0], place) for place in range(n)]
        self._raise_broken(placed, rows)
        return self._collect(placed, made, n, start)

    def _run(self, made: list[list[Call]]) -> None:
        """Runs the calls, async ones beside those in workers, and keeps the verdicts that hold."""
        pairs = [(reward, call) for reward, mine in zip(self._rewards, made, strict=True) for call in mine]
        try:
            self._coroutines.start([(reward.function, call) for reward, call in pairs if reward.is_async])
            self._pool.run([call for reward, call in pairs if not reward.is_async])
            self._coroutines.finish()
        except BaseException:
            self._coroutines.close()  # it is in the middle of calls
            raise
        for _, call in pairs:
            if call.key is not None and call.repeatable:
                self._cache.put(call.key, call.verdicts)

    def _raise_broken(self, placed: list[list[tuple[Call, int]]], rows: Sequence[Mapping[str, Any]]) -> None:
        broken: dict[str, str] = {}
        for i, row in enumerate(rows):
            for reward, entries in zip(self._rewards, placed, strict=True):
                if (message := entries[i][0].broken_row) is not None:
                    which = "a row of the batch" if reward.scope == "batch" else str(row.get("id", i))
                    broken.setdefault(which, f"reward {reward.name!r}: {message}")
        if broken:
            raise BrokenRowError(broken)

    def _collect(self, placed: list[list[tuple[Call, int]]], made: list[list[Call]], n: int, start: float) -> Scores:
        values, failed = np.full((n, len(self.names)), np.nan), np.zeros(n, dtype=bool)
        weights, arrays = np.zeros(values.shape), {}
        reasons: list[dict[str, str]] = [{} for _ in range(n)]
        details: list[dict[str, str]] = [{} for _ in range(n)]
        failures, faults = Counter(), Counter()
        for k, name in enumerate(self.names):
            for i, (call, place) in enumerate(placed[k]):
                value, reason, detail, _, weight = (
                    call.verdicts[place] if call.verdicts else (math.nan, "error", call.error, False, 1.0)
                )
                if reason:
                    reasons[i][name] = reason
                if detail:
                    details[i][name] = detail
                if call.fault:
                    faults[call.fault] += 1
                if value is None:
                    continue
                if isinstance(value, np.ndarray):
                    arrays[i, k], value = value, np.nanmean(value, dtype=np.float64)
                values[i, k], weights[i, k] = value, weight
                if math.isnan(value):
                    failed[i] = True
                    failures[name] += 1
                    self._failures.note(name, f"{reason}: {detail}")
        values[failed], weights[failed] = np.nan, 0.0
        decisions = self._decisions(values, arrays)
        self._failures.add(n, int(failed.sum()), failures)
        metrics = {f"reward_failures/{name}": float(failures[name]) for name in self.names}
        for name, mine in zip(self.names, made, strict=True):
            metrics[f"cache_hits/{name}"] = float(n - sum(call.size for call in mine))
            metrics[f"seconds/{name}"] = sum((call.seconds for call in mine), 0.0)
        metrics |= {"timeouts": float(faults["timeout"]), "killed_workers": float(faults["killed_worker"])}
        metrics["score_s"] = time.perf_counter() - start
        return Scores(values, failed, weights, decisions, reasons, details, metrics)

    def _decisions(self, values: np.ndarray, arrays: dict[tuple[int, int], np.ndarray]) -> np.ndarray | None:
        """(N, K, T) of values and of the arrays (T,) that stand in place of some, at (row, component)."""
        if not arrays:
            return None
        lengths = {(self.names[k], len(array)) for (_, k), array in sorted(arrays.items(), key=lambda item: item[0][1])}
        if len({length for _, length in lengths}) > 1:
            said = ", ".join(f"{name!r} of {length}" for name, length in sorted(lengths))
            raise ValueError(
                f"arrays over decisions have several lengths in one batch: {said}; give every completion of a batch one value a "
                f"decision, equally many"
            )
        decisions = np.repeat(values.astype(np.float32)[:, :, None], len(next(iter(arrays.values()))), axis=2)
        for (i, k), array in arrays.items():
            if not np.isnan(values[i, k]):  # else the row is unscored
                decisions[i, k] = array
        return decisions


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
        said = [
            f"\n  {name}: {n} failures; its first was {_first_line(self.first[name])}" for name, n in counts.items()
        ]
        raise RewardsFailing(
            f"{unscored} of the last {rows} rows could not be scored, above max_failure_share={self.max_share:g}:"
            + "".join(said)
        )


def _first_line(text: str) -> str:
    return text.split("\n", 1)[0][:MAX_LINE]


def _in_process(reward: Reward, completions: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> Call:
    """Calls a batched reward; what became of it in the form of a worker's call. Raises WorkerError as `Call.take`."""
    call = Call(reward.target, "", len(completions))
    each = [reward.columns(row) for row in rows]
    start = time.perf_counter()
    try:
        names = dict.fromkeys(name for columns in each for name in columns)  # a row may lack an optional one
        results = reward.function(list(completions), **{name: [row.get(name) for row in each] for name in names})
        answer = {"verdicts": [_verdict(result) for result in worker.listed(results, len(completions))]}
    except (Exception, SystemExit) as error:
        answer = worker.failure(error)
    call.take(answer, time.perf_counter() - start)
    return call


def _verdict(result: Any) -> list:
    """worker.verdict, also of a value that is an array over decisions: float32 (T,), or None if nothing applies."""
    value = getattr(result, "value", result)
    if not isinstance(value, np.ndarray) or not value.ndim:
        return worker.verdict(result)
    with np.errstate(over="ignore"):
        array = value.astype(np.float32).ravel() if value.dtype.kind in "biuf" else None
    if array is None or np.isinf(array).any():
        return worker.bad_value(value, "an array of numbers, finite or NaN")
    return worker.judged(None if np.isnan(array).all() else array, result)


# -- in anyone's TRL script ------------------------------------------------------------------------------------------

TRL_KEYWORDS = ("completion_ids", "trainer_state", "log_metric", "environments")
_pools: dict[Limits, Pool] = {}
_caches: dict[float, Cache] = {}
_code: dict[tuple[Limits, str, str], str | None] = {}  # what the workers of a pool may have imported under a name


def as_trl(
    reward: Callable,
    *,
    group_size: int | None = None,
    max_failure_share: float = 0.5,
    cache_mb: float = 64.0,
    **limits: Any,
) -> Callable[..., list[float | None]]:
    """The reward with TRL's signature, (prompts, completions, **columns) -> list[float | None].

    None where it does not apply or could not judge. TRL leaves out a row that all its rewards give None; beside another
    reward's number None adds 0, so there a check that could not judge is a zero. Completions are text or chat messages
    (the last one of the assistant counts); the prompt is the column `prompt`; reasons go to `log_extra`.
    group_size: TRL's num_generations, for a reward that looks at whole groups.
    limits: fields of core.pool.Limits; rewards with equal limits share one pool, started at the first call (anew when a
    reward comes again with other code), and rewards with equal cache_mb one cache.
    """
    limits = Limits(**limits)
    name = getattr(reward, "__name__", "reward")
    shared = {
        "pool": _pools.setdefault(limits, Pool(limits)),
        "cache": _caches.setdefault(cache_mb, Cache(cache_mb)),
    }
    scorer = Scorer({name: reward}, max_failure_share=max_failure_share, **shared)
    place, version = (limits, reward.__module__, reward.__qualname__), code_version(reward.__module__)
    if _code.setdefault(place, version) != version:  # edited and reloaded, as in a notebook: workers hold the old code
        _code[place] = version
        shared["pool"].close()
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
