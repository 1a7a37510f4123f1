"""Runs async rewards on an event loop in a thread of its own, the calls of a batch beside each other.

At most `max_concurrent` calls run at once, each with `timeout_s` from the moment it begins. An async reward waits for
somebody else (a judge behind HTTP), so whatever goes wrong says nothing about the completion: an exception, or no answer
in time, is "could not judge". The loop lives on from batch to batch, so that a reward may keep its HTTP client.

A coroutine that blocks the loop, or goes on when it is cancelled, cannot be ended. When no call has ended for
timeout_s + GRACE_S, or the batch has taken longer than calls that each use up their time can, the calls left fail, the
thread is abandoned (a daemon: the process can end) and the next batch gets another, until MAX_ABANDONED are alive.
Not covered: a call that holds Python's lock (it stops the whole process), memory, threads that a reward starts.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from core import worker
from core.pool import Call, Limits, WorkerError

GRACE_S = 1.0  # for a call to end when it is cancelled, and for the loop to get round to it
MAX_ABANDONED = 16  # threads that are left behind and still alive; each holds three files


class _Loop:
    """A thread that serves an event loop until it is stopped. answers: (call, answer, seconds); None: it has ended."""

    def __init__(self):
        self.answers: queue.SimpleQueue = queue.SimpleQueue()
        self._stopped, self.loop = asyncio.Event(), None
        self.thread = threading.Thread(target=self._serve, name="async rewards", daemon=True)
        try:
            self.loop = asyncio.new_event_loop()
            self.thread.start()
        except (OSError, RuntimeError) as error:
            if self.loop is not None:
                self.loop.close()
            raise WorkerError(f"the thread for async rewards does not start: {error}") from error

    def _serve(self) -> None:
        with (
            contextlib.suppress(SystemExit, KeyboardInterrupt),  # raised by a task that a reward started
            asyncio.Runner(loop_factory=lambda: self.loop) as runner,  # ends what still runs, closes the loop
        ):
            runner.run(self._stopped.wait())
        self.answers.put(None)

    def stop(self) -> None:
        with contextlib.suppress(RuntimeError):  # it is closed: the thread has ended
            self.loop.call_soon_threadsafe(self._stopped.set)


class Coroutines:
    """Calls of async rewards: `start` begins them, `finish` waits for them. The thread starts with the first call."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._loop: _Loop | None = None
        self._abandoned: list[threading.Thread] = []
        self._batch: Future | None = None  # held, for a loop has only weak references to its tasks
        self._left: set[Call] = set()
        self._deadline = 0.0

    def start(self, calls: Sequence[tuple[Callable, Call]]) -> None:
        """Begins calls, each with its reward. Raises WorkerError if no thread can be started, or too many do not end."""
        if not calls:
            return
        if self._loop is not None and not self._loop.thread.is_alive():  # ended by what an earlier call left running
            self.close()
        if self._loop is None:
            self._abandoned = [thread for thread in self._abandoned if thread.is_alive()]
            if len(self._abandoned) > MAX_ABANDONED:
                raise WorkerError(
                    f"{len(self._abandoned)} threads of async rewards are held by calls that do not end; let such a "
                    f"reward pass on asyncio.CancelledError, and wait with `await` (the limit is {MAX_ABANDONED})"
                )
            self._loop = _Loop()
            atexit.register(self.close)
        rounds = math.ceil(len(calls) / self._limits.max_concurrent)
        self._deadline = time.monotonic() + rounds * self._limits.timeout_s + GRACE_S
        self._left = {call for _, call in calls}
        self._batch = asyncio.run_coroutine_threadsafe(self._run(calls, self._loop.answers), self._loop.loop)

    def finish(self) -> None:
        """Waits for the calls begun and fills in what became of each. Raises WorkerError if a package is missing."""
        while self._left:
            wait = min(self._limits.timeout_s + GRACE_S, self._deadline - time.monotonic())
            try:
                answered, why = self._loop.answers.get(timeout=max(0.0, wait)), "an async call ended the event loop"
            except queue.Empty:
                answered, why = None, "an async call blocks the event loop, or goes on when it is cancelled"
            if answered is None:
                self._abandon(f"no answer: {why}")
                break
            call, answer, seconds = answered
            self._left.remove(call)
            call.take(answer, seconds)

    def close(self) -> None:
        """Ends the thread and what it still runs; a thread that does not end in GRACE_S is left behind."""
        if self._loop is not None:
            atexit.unregister(self.close)
            self._loop.stop()
            self._loop.thread.join(GRACE_S)
            self._loop, self._left = None, set()

    def _abandon(self, why: str) -> None:
        for call in self._left:
            call.take(_no_answer(call, why), 0.0)
        self._loop.stop()
        self._abandoned.append(self._loop.thread)
        self._loop, self._left = None, set()

    async def _run(self, calls: Sequence[tuple[Callable, Call]], answers: queue.SimpleQueue) -> None:
        limit = asyncio.Semaphore(self._limits.max_concurrent)

        async def one(reward: Callable, call: Call) -> None:
            async with limit:
                start = time.perf_counter()
                answer = await self._answer(reward, call)
                answers.put((call, answer, time.perf_counter() - start))

        await asyncio.gather(*(one(reward, call) for reward, call in calls))

    async def _answer(self, reward: Callable, call: Call) -> dict:
        limit = asyncio.timeout(self._limits.timeout_s)
        try:
            grouped, completion, columns = json.loads(call.payload)
            async with limit:
                result = await reward(completion, **columns)
            answer = worker.success(result, call.size if grouped else None)
        except BaseException as error:  # SystemExit would end the loop
            answer = worker.failure(error)
        if limit.expired():
            return _no_answer(call, f"no answer in {self._limits.timeout_s:g} s")
        return answer


def _no_answer(call: Call, why: str) -> dict:
    return {"verdicts": [[math.nan, "no_answer", why, False, 1.0]] * call.size}
