"""Rewards of the app in faulty_apps/: they go wrong in the way that the file `fault` of the working folder names.

A file, not an option, so that the very same command meets a fault and, once it is gone, goes on. Gold is never a victim.
"""

import os
import re
import signal
import sys
import time
import zlib
from pathlib import Path

FAULTS = ("raise", "nan", "inf", "string", "print", "fork", "kill", "hang")
SOME = FAULTS * 3 + FAULTS[:-1] + ("",) * 9  # of 40 completions


def fault_of(completion: str, word: str, fault: str) -> str:
    """What befalls a completion: the fault itself; with `some` it is one of SOME, by the completion's text."""
    if completion == f" {word}" or not fault:
        return ""
    if fault == "some":
        return SOME[zlib.crc32(b"fault" + completion.encode()) % len(SOME)]
    return fault


def spread(completion: str) -> float:
    """In [0, 0.9), almost never the same for two texts."""
    return zlib.crc32(completion.encode()) % 997 / 1108


def likeness(completion: str, *, word: str) -> float:
    """1 for gold, else `spread`, unless a fault comes first."""
    file = Path("fault")
    fault = fault_of(completion, word, file.read_text() if file.exists() else "")
    if fault == "raise":
        raise RuntimeError("the grader broke")
    if fault == "hang":
        re.fullmatch(r"(a+)+b", "a" * 60)  # holds the GIL
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "print":
        print("x" * 10**7)
        sys.stderr.write("y" * 10**7)
    if fault == "fork" and os.fork() == 0:
        time.sleep(0.2)  # and returns from the reward as well
    if fault == "slow":
        time.sleep(0.05)
    if fault == "zero":
        return 0.0
    if fault in ("nan", "inf"):
        return float(fault)
    if fault == "string":
        return "0.5"
    return 1.0 if completion == f" {word}" else spread(completion)


likeness.reads = lambda columns: ["fault"]


def brevity(completion: str) -> float:
    """A second component, which never fails."""
    return 1 / (1 + len(completion))


def exact(completion: str, *, word: str) -> float:
    """The metric."""
    return float(completion.split() == [word])
