"""Rewards for tests/core/test_scoring.py: what a reward can do right, and what it can do to its worker."""

import contextlib
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace


def same(completion, *, answer):
    return float(completion == answer)


def length(completion: str, *, scale: float = 10.0) -> float:
    return len(completion) / scale


def slow_first(completion, *, delay):
    time.sleep(delay)
    return delay


def kind(completion):
    """Returns, raises or does what the completion names."""
    return {
        "nan": lambda: float("nan"),
        "inf": lambda: float("-inf"),
        "huge": lambda: 10**400,
        "string": lambda: "0.5",
        "none": lambda: None,
        "true": lambda: True,
        "score": lambda: SimpleNamespace(value=0.25, reason="wrong_rows", detail="2 rows for 3\x1b[31m" + "x" * 9999),
        "unsure": lambda: SimpleNamespace(value=float("nan"), reason="locked", detail=""),
        "raise": lambda: [][1],
        "exit": lambda: sys.exit("bye"),
        "print": lambda: print("x" * 10**7) or sys.stderr.write("y" * 10**7) / 10**7,
        "stdin": lambda: float(sys.stdin.read() == ""),
        "fine": lambda: 0.5,
    }[completion]()


def fatal(completion):
    if completion == "hang":
        re.fullmatch(r"(a+)+b", "a" * 60)  # holds the GIL: no thread and no signal handler of Python could end it
    elif completion == "exit":
        os._exit(0)
    elif completion == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif completion == "memory":
        return float(len(b"x" * 10**10))
    elif completion == "babble":
        for descriptor in range(3, 32):
            with contextlib.suppress(OSError):
                os.write(descriptor, b'{"id": 2, "seconds": 0, "verdicts": [[1.0, "", ""], [1.0, "", ""]]}\n')
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


def open_ended(completion, **columns):
    return 1.0


async def later(completion):
    return 1.0


nested = (lambda: lambda completion: 1.0)()


def needs_a_package(completion):
    import a_package_that_is_not_installed

    return a_package_that_is_not_installed.judge(completion)
