"""A command of core.main in a process of its own, and what happens to it on the way.

The processes are forked from one that has imported torch and trl once and done nothing else (a fork server): a fresh
process costs milliseconds instead of five seconds, may be killed, and has limits and an exit status of its own.
"""

import contextlib
import gc
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Container
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import psutil

APPS = [str(Path(__file__).parent / name) for name in ("faulty_apps", "flow_apps")]
RUN = Path("runs/faulty/tiny-s0")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "core.run.train", "core.run.language", "core.run.flow"])


class Event(NamedTuple):
    """Before each of the `calls` (counted from 1) of `where` ("module:name.name"), `do` gets the call's arguments."""

    where: str
    calls: Container[int]
    do: Callable[..., Any]


class Ended(NamedTuple):
    """code: exit status, negative for the signal that ended it. error: what was printed to stderr."""

    code: int
    out: str
    error: str


class Command:
    """`python -P -m core.main train --app <app> ...`, started in the folder `home`."""

    def __init__(self, home: Path, *arguments: str, events: tuple[Event, ...] = (), app: str = "faulty"):
        self._said = [home / f"{stream}-{time.monotonic_ns()}.txt" for stream in ("out", "error")]
        for path in self._said:
            path.touch()
        arguments = ["train", "--app", app, *arguments]
        self.process = FORKS.Process(target=_main, args=(home, self._said, arguments, events))
        self.process.start()

    @property
    def out(self) -> str:
        return self._said[0].read_text(errors="replace")

    def end(self, timeout_s: float = 60) -> Ended:
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"still running after {timeout_s} s, having said\n{self.out}")
        return Ended(self.process.exitcode, self.out, self._said[1].read_text(errors="replace"))


def command(home: Path, *arguments: str, **more: Any) -> Ended:
    return Command(home, *arguments, **more).end()


def _main(home: Path, said: list[Path], arguments: list[str], events: tuple[Event, ...]) -> None:
    gc.freeze()  # the trainer collects garbage: half a second for all that torch and trl are made of
    os.environ.pop("DEBUG", None)
    os.chdir(home)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore them (nohup, &)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for descriptor, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    import apps

    apps.__path__ += APPS
    for event in events:
        _arrange(event)
    sys.argv = ["core.main", *arguments]
    runpy.run_module("core.main", run_name="__main__", alter_sys=True)


def _arrange(event: Event) -> None:
    module, _, names = event.where.partition(":")
    *owners, last = names.split(".")
    owner = import_module(module)
    for name in owners:
        owner = getattr(owner, name)
    real, calls = getattr(owner, last), 0

    def watched(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls in event.calls:
            event.do(*arguments, **keywords)
        return real(*arguments, **keywords)

    setattr(owner, last, watched)


# -- what may happen -------------------------------------------------------------------------------------------------


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_saving(end: str, value: Any, path: Any, *_: Any, half: bool = False, **__: Any) -> None:
    """Of torch.save(value, path): before a file whose path ends like this is written, or in the midst of it."""
    if str(path).endswith(end):
        if half:
            Path(path).write_bytes(b"PK\3\4" + bytes(1000))
        die()


def die_moving(end: str, part: Any, target: Any, **_: Any) -> None:
    """Of os.replace or os.rename."""
    if str(target).endswith(end):
        die()


def die_removing(end: str, folder: Any, *_: Any, **__: Any) -> None:
    """Of shutil.rmtree(folder): half of the files are gone, trainer_state.json is not."""
    if str(folder).endswith(end):
        for path in sorted(Path(folder).iterdir())[:5]:
            path.unlink()
        die()


def die_logging(folder: Any, step: int, metrics: Any) -> None:
    """Of RunFolder.log_metrics: half a line is written, and no more."""
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": {step}, "lo')
    die()


def begin_fault(fault: str, *_: Any, **__: Any) -> None:
    Path("fault").write_text(fault)


def fill(disk: str, free_kb: int, end: str, *arguments: Any, **__: Any) -> None:
    """Fill the disk that is mounted there but for so many kB, if a text argument of the call ends like this."""
    if end and not any(str(argument).endswith(end) for argument in arguments if isinstance(argument, str | Path)):
        return
    filler = Path(disk) / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(filler, max(0, filler.stat().st_size - free_kb * 1024))


def limit_files(kb: int, *_: Any, **__: Any) -> None:
    """No file may grow beyond this: what a full disk looks like where nothing may be mounted."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (kb * 1024, resource.RLIM_INFINITY))


def log_much(folder: Any, step: int, metrics: dict[str, float]) -> None:
    """Of RunFolder.log_metrics: more than the last page of the file has room for."""
    metrics |= {f"metric-{i}": 0.123456789 for i in range(200)}


def workers() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [child] * any(part.endswith("worker.py") for part in child.cmdline())
    return found


def kill_workers(*_: Any, **__: Any) -> None:
    """All at once; leaves how many there were in the file `killed`."""
    killed = workers()
    for one in killed:
        one.kill()
    with Path("killed").open("a") as file:
        file.write(f"{len(killed)}\n")


def kill_workers_soon(*_: Any, **__: Any) -> None:
    threading.Timer(0.15, kill_workers).start()


def wait_for(name: str, *_: Any, **__: Any) -> None:
    """Say so by a file `waiting`, and wait for the file `name`."""
    Path("waiting").touch()
    end = time.monotonic() + 30
    while not Path(name).exists() and time.monotonic() < end:
        time.sleep(0.01)


def spoil_gradients(trainer: Any, model: Any) -> None:
    """Of the trainer's _clip_grad_norm."""
    next(model.parameters()).grad.view(-1)[0] = float("nan")


def spoil_row(recipe: Any, rows: Any) -> None:
    """Of Recipe.loss: the first token's log-probability of the first row is not a number."""
    rows.logps.data[0, 0] = float("nan")


def mount(folder: Path, mb: int = 8) -> bool:
    """A small disk of its own at `folder`; False if nothing may be mounted here."""
    folder.mkdir()
    if os.geteuid() != 0 or not shutil.which("mount"):
        return False
    line = ["mount", "-t", "tmpfs", "-o", f"size={mb}m", "tmpfs", str(folder)]
    return subprocess.run(line, capture_output=True).returncode == 0
