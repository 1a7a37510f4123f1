"""Being asked to stop, by SIGTERM, SIGINT or a terminal that hangs up: a run ends where it can go on from.

During steps the signal is only noted: the trainer finishes the step, saves on all ranks together and ends. That takes one
step (or the evaluation that is under way) and one save. Anywhere else there is nothing to finish, because every other
part of a run is made again or kept whole, and `Stopped` is raised on the spot. So it is at the second signal.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(BaseException):
    """The run was asked to stop, by the signal it holds; the same command goes on. No `except Exception` may eat it.

    together: after a save of all ranks. If not, this rank ended on the spot, and its exit status must end the others.
    """

    def __init__(self, number: int, together: bool = False):
        super().__init__(number)
        self.together = together


class StopRequest:
    """A context manager, to be entered in the main thread. asked: the signal that waits for the end of the step, or 0."""

    def __init__(self):
        self.asked, self._stepping = 0, False

    def __enter__(self) -> Self:
        heard = (number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN)  # nohup
        self._before = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """Within the block the first signal waits; at its end a signal that waited raises Stopped."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False
        if self.asked:
            raise Stopped(self.asked, together=True)

    def _handle(self, number: int, frame: Any) -> None:
        if not self._stepping or self.asked:
            raise Stopped(number)
        self.asked = number
        text = f"\n{signal.Signals(number).name}: finishing this step, then saving; once more stops at once\n"
        os.write(2, text.encode())  # a handler may interrupt a print, and print is not reentrant
