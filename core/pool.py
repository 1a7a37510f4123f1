"""Warm reward workers with a hard kill: sends calls, one at a time to each, and decides whose fault a death is.

A call has `timeout_s` from the moment its worker says that the reward begins; then the worker's process group is
killed. A call whose worker was killed, or died, once the reward had begun is tried once more, in a fresh worker. The
second death is the completion's fault: value 0.0, reason `timeout` or `killed_worker`. A death before that moment is
nobody's fault: the call is sent again. A worker that breaks the protocol of core/worker.py counts as dead: something
else got hold of its line. No pipelining: a kill can only hit the running call, and a trivial call takes but 0.1 ms.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from core import worker

START_S = 60.0  # for an interpreter to start, and for a worker to import a reward; a module may import torch
TRIES = 3  # starts that failed in a row, or workers a call lost before it began, until we give up


class WorkerError(RuntimeError):
    """Reward workers cannot start, or cannot import a reward; the message holds what they said."""


class Limits(NamedTuple):
    """What a pool and each call in it may use; max_answer_bytes bounds one line of a worker.

    timeout_s is also that of an async call, of which max_concurrent run beside each other (core/coroutines.py).
    """

    workers: int = 2
    timeout_s: float = 10.0
    memory_mb: int = 2048
    max_answer_bytes: int = 65536
    max_concurrent: int = 32


@dataclass(eq=False, slots=True)
class Call:
    """One call of a reward, as JSON text, and what became of it: exactly one of `verdicts`, `error`, `broken_row`.

    target: (module, qualname); payload: [grouped, completion or completions, columns]; size: completions in it.
    key: core.cache's name for its verdicts; None = they are not kept.
    fault: "timeout" or "killed_worker" when the verdicts are zeros because the call cost two workers.
    seconds: time inside the reward, all tries.
    """

    target: tuple[str, str]
    payload: str
    size: int
    key: bytes | None = None
    number: int = 0
    kills: int = 0
    losses: int = 0
    seconds: float = 0.0
    fault: str = ""
    verdicts: list[list] | None = None
    error: str | None = None
    broken_row: str | None = None

    def take(self, answer: dict[str, Any], seconds: float) -> None:
        """Notes a reward's answer (core/worker.py). Raises WorkerError if the reward lacks a package."""
        if "import_error" in answer:
            raise WorkerError(
                f"cannot import the reward {'.'.join(self.target)}, or what it needs: {answer['import_error']}"
            )
        self.verdicts, self.error = answer.get("verdicts"), answer.get("error")
        self.broken_row = answer.get("broken_row")
        self.seconds += seconds

    @property
    def repeatable(self) -> bool:
        """Whether another such call would be judged alike: it was judged, and no limit, clock or chance decided."""
        return self.verdicts is not None and all(
            repeatable and (value is None or not math.isnan(value)) for value, _, _, repeatable, _ in self.verdicts
        )


class _Worker:
    """A process and where it stands: starting -> idle -> sent (a call is on its way) -> running -> idle."""

    def __init__(self, limits: Limits, call: Call | None):
        """call: the one to run first. Raises OSError if the process cannot be made."""
        # One thread and one hash seed each: sums and sets come out alike in every worker, however many there are.
        environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **os.environ, "PYTHONHASHSEED": "0"}
        with contextlib.ExitStack() as stack:
            self.stderr = stack.enter_context(tempfile.TemporaryFile())
            self.process = subprocess.Popen(
                [sys.executable, "-P", worker.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.stderr,
                start_new_session=True,
                bufsize=0,
                env=environment,
            )
            stack.pop_all()
        self.requests, self.answers = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.requests, False)
        os.set_blocking(self.answers, False)
        self.call, self.state, self.deadline, self.began = call, "starting", time.monotonic() + START_S, 0.0
        self.inbox = b""
        path = [os.path.abspath(entry) for entry in sys.path]
        self.outbox = json.dumps({"path": path, **limits._asdict()}).encode() + b"\n"

    def flush(self) -> None:
        try:
            while self.outbox:
                self.outbox = self.outbox[os.write(self.requests, self.outbox[:65536]) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.outbox = b""  # it is dead; the end of its answers will say so

    def kill(self) -> int | None:
        """Ends the process group; returns the exit status (negative: the signal that ended it)."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # before reaping: until then the number is ours
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        for stream in (self.process.stdin, self.process.stdout, self.stderr):
            stream.close()
        return self.process.returncode

    def last_words(self) -> str:
        self.stderr.seek(max(0, self.stderr.seek(0, os.SEEK_END) - 2000))
        return worker.clean(self.stderr.read().decode(errors="replace"), 2000).strip()


class Pool:
    """Up to `limits.workers` processes, started with the first calls and ended by `close` or at exit; then anew."""

    def __init__(self, limits: Limits):
        least = Limits(workers=1, timeout_s=0, memory_mb=1, max_answer_bytes=32768, max_concurrent=1)
        if not all(value >= low for value, low in zip(limits, least, strict=True)) or limits.timeout_s == 0:
            raise ValueError(f"{limits}: {least} are the least values, and timeout_s must be above 0")
        self.limits = limits
        self._workers: list[_Worker] = []
        self._selector: selectors.BaseSelector | None = None
        self._queue: deque[Call] = deque()
        self._left = 0
        self._ever_ready, self._failed_starts = False, 0
        self._lock = threading.Lock()

    def run(self, calls: Sequence[Call]) -> None:
        """Runs the calls and fills in what became of each. Raises WorkerError."""
        with self._lock:
            for number, call in enumerate(calls):
                call.number = number
            self._queue, self._left = deque(calls), len(calls)
            try:
                self._run()
            except BaseException:
                self._stop()  # the workers are in the middle of calls
                raise

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        for one in list(self._workers):
            self._end(one)
        if self._selector is not None:
            self._selector.close()
            self._selector = None
            atexit.unregister(self.close)

    def _run(self) -> None:
        if self._selector is None and self._left:
            self._selector = selectors.DefaultSelector()
            atexit.register(self.close)
        while self._left:
            while len(self._workers) < min(self.limits.workers, self._left):
                self._start()
            for one in self._workers:
                if one.state == "idle" and self._queue:
                    self._send(one, self._queue.popleft())
            wait = min(one.deadline for one in self._workers) - time.monotonic()
            # What has arrived comes before what is late: an answer may have waited for this process.
            arrived, now = self._selector.select(max(0.0, wait)), time.monotonic()
            for key, events in arrived:
                one = key.data
                if one in self._workers and events & selectors.EVENT_WRITE:
                    self._flush(one)
                if one in self._workers and events & selectors.EVENT_READ:
                    self._receive(one)
            for one in [one for one in self._workers if one.deadline <= now]:
                self._lose(one, late=True)

    # -- to the workers

    def _start(self, call: Call | None = None) -> None:
        try:
            one = _Worker(self.limits, call)
        except OSError as error:
            self._start_failed(str(error))
            if call is not None:
                self._again(call)
            return
        self._workers.append(one)
        self._selector.register(one.answers, selectors.EVENT_READ, one)
        self._selector.register(one.requests, selectors.EVENT_WRITE, one)

    def _send(self, one: _Worker, call: Call) -> None:
        one.call, one.state, one.deadline = call, "sent", time.monotonic() + START_S
        one.outbox = f"[{call.number},{json.dumps(call.target)},{call.payload}]\n".encode()
        one.flush()
        if one.outbox:  # longer than the pipe holds: the rest when it has room, so that one worker stops no other
            self._selector.register(one.requests, selectors.EVENT_WRITE, one)

    def _flush(self, one: _Worker) -> None:
        one.flush()
        if not one.outbox:
            self._selector.unregister(one.requests)

    # -- from the workers

    def _receive(self, one: _Worker) -> None:
        data = os.read(one.answers, 65536)
        *lines, one.inbox = (one.inbox + data).split(b"\n")
        sound = data and max(map(len, (one.inbox, *lines))) <= self.limits.max_answer_bytes
        try:
            for line in lines if sound else ():
                self._handle(one, json.loads(line))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            sound = False
        if not sound:
            self._lose(one)

    def _handle(self, one: _Worker, message: Any) -> None:
        """One line of a worker. Raises ValueError, TypeError, KeyError, OverflowError if it is not one to send now."""
        call = one.call
        if one.state == "starting" and message == "ready":
            self._ever_ready, self._failed_starts = True, 0
            one.state, one.deadline = "idle", math.inf
            if call is not None:
                self._send(one, call)
        elif one.state == "sent" and type(message) is int and message == call.number:
            one.state, one.began = "running", time.monotonic()
            one.deadline = one.began + self.limits.timeout_s
        elif one.state in ("sent", "running") and message["id"] == call.number:
            answer = _checked(message, call.size)
            if one.state == "sent" and "import_error" not in answer:
                raise ValueError("an answer before the reward began")
            seconds = float(message.get("seconds", 0.0))
            one.call, one.state, one.deadline = None, "idle", math.inf
            call.take(answer, seconds)
            self._left -= 1
        else:
            raise ValueError("a line out of turn")

    # -- deaths

    def _lose(self, one: _Worker, late: bool = False) -> None:
        """Ends a worker that died, is late or broke the protocol, and decides what that means for its call."""
        words = one.last_words() if one.state == "starting" else ""
        status = self._end(one)
        if one.state == "starting":
            why = "it was not ready in time" if late else f"exit status {status}"
            self._start_failed(f"{why}; it said: {words or 'nothing'}")
        if one.call is None:
            return
        if one.state != "running":
            self._again(one.call)
            return
        self._blame(one.call, late or status == -signal.SIGALRM, status, time.monotonic() - one.began)

    def _blame(self, call: Call, late: bool, status: int | None, seconds: float) -> None:
        call.kills += 1
        if call.kills == 1:
            call.seconds += seconds
            self._start(call)
            return
        call.fault = "timeout" if late else "killed_worker"
        if late:
            how = f"ran over {self.limits.timeout_s:g} s"
        elif status == worker.OUT_OF_MEMORY:
            how = f"ran out of {self.limits.memory_mb} MB"
        else:
            how = f"ended its worker (exit status {status})"
        zero = [0.0, call.fault, f"{how}; the second worker lost to it", False, 1.0]
        call.take({"verdicts": [zero] * call.size}, seconds)
        self._left -= 1

    def _again(self, call: Call) -> None:
        """Its worker was lost before it began."""
        call.losses += 1
        if call.losses == TRIES:
            call.take({"error": f"{TRIES} workers were lost before the reward began"}, 0.0)
            self._left -= 1
        elif call.kills:
            self._start(call)  # it is owed a fresh worker
        else:
            self._queue.appendleft(call)

    def _start_failed(self, why: str) -> None:
        self._failed_starts += 1
        if not self._ever_ready or self._failed_starts == TRIES:
            raise WorkerError(f"a reward worker ({sys.executable} -P {worker.__file__}) does not start: {why}")

    def _end(self, one: _Worker) -> int | None:
        for descriptor in (one.requests, one.answers):
            with contextlib.suppress(KeyError):
                self._selector.unregister(descriptor)
        self._workers.remove(one)
        return one.kill()


def _checked(message: dict[str, Any], size: int) -> dict[str, Any]:
    """The answer in a line as it came from a process that touched model output. Raises as Pool._handle."""
    for kind in ("import_error", "broken_row", "error"):
        if kind in message:
            return {kind: worker.clean(str(message[kind]), worker.MAX_ERROR)}
    verdicts = [_checked_verdict(*verdict) for verdict in message["verdicts"]]
    if len(verdicts) != size:
        raise ValueError("not one verdict for each completion")
    return {"verdicts": verdicts}


def _checked_verdict(value: Any, reason: Any, detail: Any, repeatable: Any, weight: Any) -> list:
    if value is not None and (type(value) not in (int, float) or math.isinf(value)):
        raise ValueError("a value that is not a number")
    if type(weight) not in (int, float) or not 0 <= weight < math.inf:
        raise ValueError("a weight that is not a number, 0 or more")
    reason, detail = worker.clean(str(reason), worker.MAX_REASON), worker.clean(str(detail), worker.MAX_DETAIL)
    return [value, reason, detail, repeatable is True, weight]
