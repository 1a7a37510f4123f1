"""Rewards for the tests of scoring: what a reward can do right, what it can do to its worker, and to an event loop."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from array import array
from pathlib import Path
from types import SimpleNamespace

TIMEOUT_S = 1.0  # of a call, in the tests


def same(completion, *, answer):
    return float(completion == answer)


def length(completion: str, *, scale: float = 10.0) -> float:
    return len(completion) / scale


def slow_first(completion, *, delay):
    time.sleep(delay)
    return delay


def slow_too(completion, *, delay):
    return slow_first(completion, delay=delay)


def exits_halfway(completion, *, delay):
    time.sleep(delay / 2)
    os._exit(1)


def kind(completion):
    """Returns, raises or does what the completion names."""
    return {
        "nan": lambda: float("nan"),
        "inf": lambda: float("inf"),
        "-inf": lambda: float("-inf"),
        "huge": lambda: 10**400,
        "huger": lambda: 10**5000,
        "string": lambda: "0.5",
        "100 MB": lambda: "x" * 10**8,
        "100 MB reason": lambda: SimpleNamespace(value=0.25, reason="x" * 10**8),
        "array": lambda: array("d", [0.5]),
        "list": lambda: [0.5] * 10**7,
        "none": lambda: None,
        "true": lambda: True,
        "score": lambda: SimpleNamespace(value=0.25, reason="wrong_rows", detail="2 rows for 3\x1b[31m" + "x" * 9999),
        "unsure": lambda: SimpleNamespace(value=float("nan"), reason="locked", detail=""),
        "raise": lambda: [][1],
        "exit": lambda: sys.exit("bye"),
        "interrupt": lambda: signal.default_int_handler(signal.SIGINT, None),
        "recursion": lambda: kind("recursion"),
        "print": lambda: print("x" * 10**7) or sys.stderr.write("y" * 10**7) / 10**7,
        "stdin": lambda: float(sys.stdin.read() == ""),
        "fine": lambda: 0.5,
    }[completion]()


def fatal(completion):
    """Does to its worker what the completion names; a line of JSON is written to wherever its answers may go."""
    if completion == "hang":
        re.fullmatch(r"(a+)+b", "a" * 60)  # holds the GIL: no thread and no signal handler of Python could end it
    elif completion == "sleep":
        time.sleep(60)
    elif completion == "exit":
        os._exit(0)
    elif completion == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif completion == "exec":
        os.execv("/bin/sh", ["sh", "-c", "exit 3"])
    elif completion == "exec and live":
        os.execv("/bin/sh", ["sh", "-c", "sleep 60"])
    elif completion == "close":
        os.closerange(0, 256)
    elif completion == "memory":
        return float(len(b"x" * 10**11))  # at once: half a GB filled bit by bit outlasts the clock of a slow machine
    elif completion == "100 MB" or completion.startswith("{"):
        line = b"x" * 10**8 if completion == "100 MB" else completion.encode() + b"\n"
        for descriptor in range(3, 32):
            with contextlib.suppress(OSError):
                os.write(descriptor, line)
        time.sleep(60)
    return 1.0


def forks(completion, *, folder):
    """Leaves a child that sleeps, and its number as the name of a folder."""
    child = os.fork()
    if child == 0:
        if completion != "both return":
            time.sleep(60)
        return 0.0
    os.mkdir(os.path.join(folder, str(child)))
    if completion == "hang":
        time.sleep(60)
    if completion == "exit":
        os._exit(1)
    return 1.0


def pid(completion):
    return os.getpid()


def pid_later(completion, *, folder):
    """Says its process in the folder first, so that the process can be found while the call runs."""
    os.makedirs(os.path.join(folder, str(os.getpid())), exist_ok=True)
    time.sleep(0.3)
    return 1.0


def ends_its_helpers(completion):
    """1 if a program and a forked child still end when they are asked to."""
    program = subprocess.Popen(["sleep", "60"])
    program.terminate()
    child = os.fork()
    if child == 0:
        time.sleep(60)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    return float(program.wait() == -signal.SIGTERM and os.waitpid(child, 0)[1] == signal.SIGTERM)


def killed_once(completion, *, folder):
    """Dies in the first worker that gets it, is right in the next: what a kill from outside looks like."""
    try:
        os.mkdir(os.path.join(folder, "seen"))
    except FileExistsError:
        return 1.0
    return os.kill(os.getpid(), signal.SIGKILL)


def writes(completion, *, file):
    Path(file).write_text(completion)
    return 1.0


def hash_order(completion):
    return float(next(iter({f"word {i}" for i in range(100)})).split()[1])


class Broken(ValueError):
    broken_row = True


def gold_runs(completion, *, gold):
    if gold == "broken":
        raise Broken("no such table: singer")
    return 1.0


def golds_run(completions, *, gold):
    return [gold_runs(c, gold=g) for c, g in zip(completions, gold, strict=True)]


golds_run.scope = "batch"


def fails_at_length(completion):
    raise RuntimeError("x" * 5000 + "\n" + "y\n" * 5000)


def rank(completions, *, scale=1.0):
    order = sorted(completions)
    return [scale * order.index(c) / max(1, len(order) - 1) for c in completions]


rank.scope = "group"


def rank_short(completions):
    return [1.0] * (len(completions) - 1)


rank_short.scope = "group"


def rank_wordy(completions):
    return [SimpleNamespace(value=1.0, reason="r", detail="\N{GRINNING FACE}" * 500) for _ in completions]


rank_wordy.scope = "group"


def rank_fatal(completions):
    if "kill" in completions:
        os._exit(1)
    return [1.0] * len(completions)


rank_fatal.scope = "group"


def above_mean(completions, *, pids):
    assert os.getpid() == pids[0], "a batched reward runs in the caller's process"
    mean = sum(map(len, completions)) / len(completions)
    return [float(len(c) > mean) for c in completions]


above_mean.scope = "batch"


def cells(completions):
    """A value a decision: completion "1 - 0.5" says them, "-" where none applies; "none" and "fail" have no array."""
    return [dense(completion) for completion in completions]


cells.scope = "batch"


def dense(completion):
    import numpy as np

    if completion in ("none", "fail"):
        return None if completion == "none" else float("nan")
    values = np.array([float("nan" if value == "-" else value) for value in completion.split()])
    return SimpleNamespace(value=values.reshape(-1, 1), reason="cells", weight=float(len(values)))


async def async_dense(completion):
    return dense(completion)


def words(completions):
    return [float(len(completion.split())) for completion in completions]


words.scope = "batch"


def all_kinds(completions):
    """Could not judge the first."""
    return [0.5 if i else float("nan") for i in range(len(completions))]


all_kinds.scope = "batch"


def weighted(completion):
    """A value that is the mean of as many cases as the completion says."""
    return SimpleNamespace(value=0.5, weight=None if completion == "none" else float(completion))


def exits(completions):
    sys.exit("bye")


exits.scope = "batch"


def all_need_a_package(completions):
    return [needs_a_package(c) for c in completions]


all_need_a_package.scope = "batch"


def open_ended(completion, **columns):
    return 1.0


nested = (lambda: lambda completion: 1.0)()


def needs_a_package(completion):
    import a_package_that_is_not_installed

    return a_package_that_is_not_installed.judge(completion)


# -- for the cache


def counted(completion, *, notes):
    """Leaves a folder for every call, in the folder that the list `notes` names."""
    os.mkdir(os.path.join(notes[0], str(time.monotonic_ns())))
    return 1.0


def counted_kind(completion, *, notes):
    counted(completion, notes=notes)
    return kind(completion)


def counted_fatal(completion, *, notes):
    counted(completion, notes=notes)
    return fatal(completion)


def counted_by_chance(completion, *, notes):
    counted(completion, notes=notes)
    return SimpleNamespace(value=0.5, reason="", detail="", repeatable=False)


def counted_volatile(completion, *, notes):
    return counted(completion, notes=notes)


counted_volatile.volatile = True


def counted_group(completions, *, notes):
    counted("", notes=notes)
    return [SimpleNamespace(value=float(len(c)), reason="r", detail="d") for c in completions]


counted_group.scope = "group"


def counted_batch(completions, *, notes):
    return [counted(c, notes=n) for c, n in zip(completions, notes, strict=True)]


counted_batch.scope = "batch"


async def counted_async(completion, *, notes):
    return counted(completion, notes=notes)


def size_of(completion, *, file):
    return float(Path(file).stat().st_size)


def first_byte(completion, *, file):
    return float(Path(file).read_bytes()[0])


def first_bytes_of_all(completion, *, file):
    return float(sum(path.read_bytes()[0] for path in Path(file).parent.iterdir()))


first_bytes_of_all.reads = lambda columns: Path(columns["file"]).parent.iterdir()


def first_byte_inside(completion, *, files):
    return float(Path(files[0]).read_bytes()[0])


first_byte_inside.reads = lambda columns: columns["files"] if columns["files"] else 1 / 0


# -- async

running = [0, 0]  # now, at most


async def beside(completion, *, delay=0.05):
    running[0] += 1
    running[1] = max(running)
    try:
        await asyncio.sleep(delay)
    finally:
        running[0] -= 1
    return len(completion)


async def async_kind(completion):
    """As `kind`, and what only a coroutine can do."""
    if completion == "late":
        await asyncio.sleep(60)
    if completion == "own timeout":
        raise TimeoutError("the server did not answer")
    if completion == "cancelled":
        asyncio.current_task().cancel()
    if completion == "broken":
        raise Broken("no such table: singer")
    await asyncio.sleep(0)
    return kind(completion)


async def blocks(completion, *, seconds):
    """Holds up the loop, and says in the list `seconds` for how long."""
    if completion == "block":
        time.sleep(seconds[0])
    return 1.0


async def waits(completion, *, delay=0.0):
    await asyncio.sleep(delay)
    return 1.0


async def stubborn(completion):
    end = time.monotonic() + 2
    while completion == "stubborn" and time.monotonic() < end:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0.05)
    return 1.0


strays = []


async def ends_the_loop(completion):
    async def stray():
        raise SystemExit

    if "end" in completion:
        strays.append(asyncio.ensure_future(stray()))
    if completion.startswith("end now"):
        await asyncio.sleep(60)
    return 1.0


async def leaves_a_task(completion):
    async def stray():
        try:
            await asyncio.sleep(60)
        finally:
            print("cancelled")

    strays.append(asyncio.ensure_future(stray()))
    return 1.0


async def loop_number(completion):
    return float(id(asyncio.get_running_loop()) % 2**40)


async def async_rank(completions, *, scale=1.0):
    await asyncio.sleep(0)
    return rank(completions, scale=scale)


async_rank.scope = "group"


async def async_rank_short(completions):
    return rank_short(completions)


async_rank_short.scope = "group"


async def async_batch(completions):
    return [1.0] * len(completions)


async_batch.scope = "batch"


async def async_needs_a_package(completion):
    return needs_a_package(completion)
