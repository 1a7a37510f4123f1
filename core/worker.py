"""One reward worker: an interpreter of its own that runs rewards on what a model wrote, and may be killed any moment.

Standard library only. core.pool starts this very file (`python -P core/worker.py`, whatever `core` is importable as) in
a session of its own, so that killing the process group takes along what a reward forked. Lines of JSON, never pickle:

    parent -> worker   first {"path", "timeout_s", "memory_mb", "max_answer_bytes"}, then one call at a time:
                       [id, [module, qualname], [grouped, completion or completions, columns]]
    worker -> parent   first "ready"; for each call its id the moment the reward begins (its module is imported by
                       then), and {"id", "seconds"} with one of
                         "verdicts": [[value, reason, detail, repeatable, weight], ...]
                                     value: null = does not apply, NaN = could not judge
                         "error": text, or "broken_row": text;
                       {"id", "import_error": text} instead of beginning, or as an answer

Covered (Linux and macOS): a reward that prints or reads stdin (descriptors 0-2 are /dev/null; the lines travel on
private duplicates that children do not inherit); that hangs while the parent is dead (SIGALRM with its default action
ends the process `GRACE_S` after the parent should have; an idle worker ends at end of file); that writes files
(RLIMIT_FSIZE 0), dumps core, opens too many files, or forks and returns twice. The signals with which terminals and job
managers end or warn a whole job leave a worker alone: its parent decides. Linux only: memory (RLIMIT_AS).
Not covered: network; reading, deleting or truncating files; processes that leave the group with setsid; children that
a reward leaves behind (they live as long as their worker); forks without end. A reward that *executes* what a model
wrote needs a sandbox of its own (rewards/sandbox).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import numbers
import os
import reprlib
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

MAX_REQUEST_BYTES = 16 * 2**20
MAX_FILES = 1024
MAX_REASON, MAX_DETAIL, MAX_ERROR = 80, 500, 2000  # characters; JSON may take 12 bytes for one
GRACE_S = 1.0
OUT_OF_MEMORY = 71  # exit status: the reward met MemoryError
JOB_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    requests, answers = os.fdopen(os.dup(0), "rb"), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    settings = json.loads(requests.readline(MAX_REQUEST_BYTES))
    sys.path[:] = settings["path"]
    sys.dont_write_bytecode = True
    _limit(settings["memory_mb"])
    for number in JOB_SIGNALS:  # a handler and not SIG_IGN, which a program that a reward starts would inherit
        signal.signal(number, lambda *_: None)
    os.dup2(null, 2)  # until here stderr is the parent's file: it says why a worker could not start

    # A forked child keeps neither line: the parent sees the end of this process even if the child lives on, and a child
    # that returns from the reward as well ends at its first write.
    def in_child() -> None:
        os.close(answers)
        os.close(requests.fileno())
        for number in JOB_SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    os.register_at_fork(after_in_child=in_child)

    def send(message: Any) -> None:
        line = json.dumps(message).encode() + b"\n"
        while line:
            line = line[os.write(answers, line) :]

    find = functools.cache(resolve)
    send("ready")
    while line := requests.readline(MAX_REQUEST_BYTES):
        number, target, (grouped, completion, columns) = json.loads(line)
        try:
            reward = find(*target)
        except BaseException as error:
            send({"id": number, "import_error": describe(error)})
            continue
        send(number)
        signal.setitimer(signal.ITIMER_REAL, settings["timeout_s"] + GRACE_S)
        start = time.perf_counter()
        answer = _call(reward, completion, columns, len(completion) if grouped else None)
        answer |= {"id": number, "seconds": time.perf_counter() - start}
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(_fit(answer, settings["max_answer_bytes"]) if grouped else answer)


def _limit(memory_mb: int) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    limits = {
        resource.RLIMIT_AS: memory_mb * 2**20,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: MAX_FILES,
    }
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS refuses some of them
            resource.setrlimit(kind, (limit, limit))


def resolve(module: str, qualname: str) -> Any:
    """The object of that name. Raises whatever importing its module raises, or AttributeError."""
    return functools.reduce(getattr, qualname.split("."), importlib.import_module(module))


def _call(reward: Callable, completion: Any, columns: dict[str, Any], group: int | None) -> dict[str, Any]:
    try:
        return success(reward(completion, **columns), group)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)  # the completion used up its memory: like a kill, and nothing here is sound any more
    except BaseException as error:
        return failure(error)


def success(result: Any, group: int | None) -> dict[str, Any]:
    """The answer for what a reward returned for one completion, or for a group of that size. Raises as `listed`."""
    return {"verdicts": [verdict(one) for one in ([result] if group is None else listed(result, group))]}


def failure(error: BaseException) -> dict[str, Any]:
    """The answer for what a reward raised."""
    if isinstance(error, ImportError):  # a package is not installed: no later call can fare better
        return {"import_error": clean(str(error), MAX_ERROR)}
    if getattr(type(error), "broken_row", False):
        return {"broken_row": clean(str(error), MAX_ERROR)}
    return {"error": describe(error)}


def _fit(answer: dict[str, Any], limit: int) -> dict[str, Any]:
    """The answer for a large group, without its details if it would be too long with them."""
    if "verdicts" in answer and len(json.dumps(answer)) >= limit:
        answer["verdicts"] = [[value, reason, "", *rest] for value, reason, _, *rest in answer["verdicts"]]
        if len(json.dumps(answer)) >= limit:
            del answer["verdicts"]
            answer["error"] = f"the answer is longer than max_answer_bytes={limit}"
    return answer


def listed(results: Any, count: int) -> list | tuple:
    """What a reward returned for `count` completions. Raises ValueError unless it is so many scores."""
    if not isinstance(results, list | tuple) or len(results) != count:
        got = f"{len(results)} scores" if isinstance(results, list | tuple) else f"a {type(results).__name__}"
        raise ValueError(f"the reward returned {got} for {count} completions; it must return a list of one score each")
    return results


def verdict(result: Any) -> list:
    """[value, reason, detail, repeatable, weight] of what a reward returned: a number, None, or an object of these fields.

    value: finite float; None = does not apply; NaN = could not judge. weight: finite float, 0 or more. An infinite value or
    weight, or something that is not a number, is a bug of the reward: NaN with the reason bad_reward_value, never a zero.
    """
    value = getattr(result, "value", result)
    number = _number(value)
    if value is not None and (number is None or math.isinf(number)):
        arrays = "; arrays over decisions are for @batched rewards" if getattr(value, "ndim", 0) else ""
        return bad_value(value, "a finite number or None" + arrays)
    return judged(number, result)


def judged(value: Any, result: Any) -> list:
    """The verdict that has this value and the other fields of what a reward returned."""
    weight = _number(getattr(result, "weight", 1.0))
    if weight is None or not 0 <= weight < math.inf:
        return bad_value(result.weight, "a weight: a finite number, 0 or more")
    reason = clean(str(getattr(result, "reason", "")), MAX_REASON)
    detail = clean(str(getattr(result, "detail", "")), MAX_DETAIL)
    if not reason and isinstance(value, float) and math.isnan(value):
        reason = "failed"
    return [value, reason, detail, bool(getattr(result, "repeatable", True)), weight]


def _number(value: Any) -> float | None:
    """As a float; None if it is not a number, or none that a float can hold."""
    if isinstance(value, numbers.Real):
        with contextlib.suppress(OverflowError):
            return float(value)
    return None


def bad_value(value: Any, wanted: str) -> list:
    """The verdict on a reward that returned something else than `wanted`."""
    try:
        shown = clean(reprlib.repr(value), 100)
    except Exception:  # an int of more than 4300 digits, for one
        shown = "something that cannot be shown"
    wrong = f"returned {shown} ({type(value).__name__}), not {wanted}"
    return [math.nan, "bad_reward_value", wrong, False, 1.0]


def clean(text: str, limit: int) -> str:
    """At most `limit` characters, without control characters and lone surrogates: it ends in terminals and in pages."""
    text = text[:limit]
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def describe(error: BaseException) -> str:
    """Type, message and the last places of the traceback."""
    head = "".join(traceback.format_exception_only(error)).strip()
    places = "".join(traceback.format_tb(error.__traceback__)[-3:])
    return clean(f"{head[: MAX_ERROR // 2]}\n{places}", MAX_ERROR).strip()


if __name__ == "__main__":
    main()
