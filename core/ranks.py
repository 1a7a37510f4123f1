"""The ranks of a run: equal processes, one a GPU, that share each step; alone, everything here does nothing.

`launch` starts them on this machine (GPUS=n) under torch's elastic agent; any other launcher that sets RANK and
WORLD_SIZE does too (torchrun over several machines). Rank 0 is the main one: it alone owns the run folder and speaks.
All of them must come to every function below in the same order; the process group is the trainer's own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def index() -> int:
    return int(os.environ.get("RANK", "0"))


def local_count() -> int:
    """Ranks on this machine; they share its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count()))


def is_main() -> bool:
    return index() == 0


class OtherRankFailed(RuntimeError):
    """Another rank ended the run; it has said why."""


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The main rank does the block before the others; if it fails, they raise OtherRankFailed instead."""
    if count() == 1:
        yield
    elif is_main():
        try:
            yield
        except BaseException:
            _told(False)
            raise
        _told(True)
    else:
        if not _told(True):
            raise OtherRankFailed("the main rank failed")
        yield


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What the block raises on one rank ends it on all: the others raise OtherRankFailed, instead of waiting for that one."""
    problem = None
    try:
        yield
    except Exception as error:
        problem = error
    if any_rank(problem is not None):
        raise problem or OtherRankFailed("another rank failed")


def _told(fine: bool) -> bool:
    """What the main rank says, on every rank."""
    import torch.distributed as dist

    words = [fine]
    dist.broadcast_object_list(words, src=0)
    return words[0]


def gather(part: Sequence[T]) -> list[T]:
    """The lists of all ranks, one after the other in the order of the ranks; on every rank."""
    if count() == 1:
        return list(part)
    import torch.distributed as dist

    parts: list[Any] = [None] * count()
    dist.all_gather_object(parts, list(part))
    return [item for one in parts for item in one]


def any_rank(flag: bool) -> bool:
    return any(gather([flag]))


def share(length: int) -> list[int]:
    """This rank's part of range(length): contiguous, and equally long on every rank, the last items repeated if need be.

    Equally long because models whose weights are spread over ranks must be run equally often. `gather` of such parts, cut
    to `length`, is in order again.
    """
    each = -(-length // count())
    return [min(i, length - 1) for i in range(index() * each, (index() + 1) * each)]


# -- starting them -----------------------------------------------------------------------------------------------------


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run this program with `arguments` as so many ranks on this machine; returns the first bad exit status, or 0.

    SIGTERM and SIGINT are handed on to the ranks, which end in their own time; so is a terminal that hangs up, as SIGTERM.
    A rank that fails ends the others (SIGTERM, after 30 s SIGKILL: one that waits for it in a collective hears nothing).
    Raises Stopped for a signal that comes before the ranks are there.
    """
    import psutil
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from core.run.stopping import Stopped

    asked = 0

    def hand_on(number: int, frame: Any) -> None:
        nonlocal asked
        asked = signal.SIGTERM if number == signal.SIGHUP else number
        children = psutil.Process().children()
        if not children:
            raise Stopped(asked)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(asked)

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"grpo-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        signals_to_handle="SIGQUIT",  # the agent's own answer to SIGTERM is to fail
        logs_specs=DefaultLogsSpecs(redirects=dict.fromkeys(range(1, processes), Std.OUT)),
    )
    heard = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        heard.append(signal.SIGHUP)
    before = {number: signal.signal(number, hand_on) for number in heard}
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a rank, or we, say why it ended
    try:
        elastic_launch(config, sys.executable)("-P", "-m", "core.main", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode  # as a shell says it
        if asked and status == 128 + asked:  # stopped on the spot, perhaps before it could listen
            return 0 if asked == signal.SIGTERM else status
        if failure.exitcode < 0:
            print(f"error: {signal.Signals(-failure.exitcode).name} ended rank {rank}", file=sys.stderr)
        return status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0
