"""What a person sees while a run goes on: a live table in a terminal, plain lines anywhere else.

Model output is hostile to terminals: escape sequences move the cursor or rewrite the title, NUL and bidirectional
controls hide text, `[red]` is markup to rich, and a megabyte floods the screen. Everything shown here passes
`clean_text` and is printed as plain text, never as markup; callers hand over raw text.

Not covered: look-alike letters, and zero-width joiners, which real scripts need.
"""

import math
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Self

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

SEQUENCES = re.compile(  # OSC and its relatives with their text if they end, CSI, two-character escapes; linear time
    r"(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x80-\x9f]*(?:\x07|\x1b\\|\x9c)"
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?|\x1b[ -/]*[0-~]?"
)
CONTROLS = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e007f]"
)
SURROGATES = re.compile("[\ud800-\udfff]")
LINE_EVERY_S = 5.0
PLAIN_WIDTH = 120  # of tables in a file or a pipe
MOST_OF_NAMES = 28  # characters of the first column of a table that are kept on one line


def clean_text(text: object, limit: int = 2000) -> str:
    """Text without control characters, escape sequences, bidirectional overrides; newlines stay, tabs become spaces.

    limit: most characters of the input that are looked at; what is cut is said at the end. Idempotent on short text.
    """
    text = str(text)
    head = text[:limit].replace("\r\n", "\n").replace("\r", "\n").replace("\t", "    ")
    head = SURROGATES.sub("\ufffd", CONTROLS.sub("", SEQUENCES.sub("", head)))
    return head if len(text) <= limit else f"{head} … ({len(text) - limit:,} of {len(text):,} characters cut)"


class Progress:
    """Shows the steps of a run. Use as a context manager; all text is taken raw and made safe here.

    total: steps of the run.  metric: name of the headline metric, read from `eval/<metric>`; None takes the first seen.
    quiet: print nothing (every rank but the main one).
    """

    def __init__(
        self, total: int, title: str, console: Console | None = None, metric: str | None = None, quiet: bool = False
    ):
        self.total, self.title, self.metric = total, title, metric
        self.console = console or Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, quiet=quiet)
        self._phase = ""
        self._live: Live | None = None
        self._restart()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was; the last state of the table stays."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def phase(self, name: str, total: int | None = None) -> None:
        """Begin a part of the run (warm start, evaluation, training), with its own number of steps if given."""
        self.close()
        self._phase = name
        self.total = total if total is not None else self.total
        self._restart()
        self._say(_plain(name, "bold"))

    def note(self, text: object) -> None:
        self._say(_plain(text))

    def warn(self, text: object) -> None:
        self._say(Text("warning: ", "yellow") + _plain(text))

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a step (counted from 1). Missing metrics are left out; the last evaluation stays in sight."""
        now = time.monotonic()
        if self._at is not None and step > self._at[0]:
            self._pace.append((now - self._at[1]) / (step - self._at[0]))
        elif "step_s" in metrics:
            self._pace.append(float(metrics["step_s"]))
        self._at = (step, now)
        self._last |= metrics
        evaluated = [k[5:] for k in metrics if k.startswith("eval/") and k.count("/") == 1]
        self.metric = self.metric or next(iter(evaluated), None)
        cells = self._cells(step, self._last)
        due = evaluated or step >= self.total or step % self._every == 0 or now - self._said >= LINE_EVERY_S
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            if self._live is None:
                self._live = Live(console=self.console, auto_refresh=False)  # no thread beside forks and compilers
                self._live.start()
            self._live.update(self._live_table(cells), refresh=True)
        elif due:
            self._said = now
            self._say(_plain("  ".join(f"{name} {value}" for name, value in cells.items())))

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Print a table below all that was shown; the first column is aligned left, the others right."""
        self.close()
        table, rows = Table(title=_plain(title), title_justify="left"), list(rows)
        # Where space is short, numbers fold.
        names = min(MOST_OF_NAMES, max((len(str(row[0])) for row in rows), default=0))
        for i, column in enumerate(columns):
            width = {} if i else {"min_width": names}
            table.add_column(_plain(column), justify="right" if i else "left", overflow="fold", **width)
        for row in rows:
            table.add_row(*map(_plain, row))
        self._say(table)

    def _restart(self) -> None:
        self._at: tuple[int, float] | None = None
        self._pace: deque[float] = deque(maxlen=20)
        self._last: dict[str, float] = {}
        self._said = -math.inf
        self._every = max(1, math.ceil(self.total / 20))

    def _say(self, what: Text | Table) -> None:
        self.console.print(what, soft_wrap=isinstance(what, Text))

    def _cells(self, step: int, metrics: Mapping[str, float]) -> dict[str, str]:
        pace = sum(self._pace) / len(self._pace) if self._pace else math.nan
        spread = 1 - metrics["zero_spread"] if "zero_spread" in metrics else math.nan
        cells = {
            "step": f"{step}/{self.total}",
            "reward": _with_spread(metrics.get("reward", math.nan), metrics.get("reward_std", math.nan)),
            self.metric or "metric": _number(metrics.get(f"eval/{self.metric}", math.nan)),
            "spread": "" if math.isnan(spread) else f"{spread:.0%}",
            "length": _number(metrics.get("completion_length", math.nan), 0),
            "loss": _number(metrics.get("loss", math.nan), 4),
            "s/step": _number(pace, 2),
            "left": "" if math.isnan(pace) else duration(pace * max(0, self.total - step)),
        }
        return {k: v for k, v in cells.items() if v}

    def _live_table(self, cells: Mapping[str, str]) -> Table:
        title = f"{self.title} · {self._phase}" if self._phase else self.title
        table = Table(title=_plain(title), title_justify="left", box=box.SIMPLE)
        for name in cells:
            table.add_column(_plain(name), justify="right")
        table.add_row(*cells.values())
        return table


def duration(seconds: float) -> str:
    """Seconds as `4 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _plain(text: object, style: str = "") -> Text:
    return Text(clean_text(text), style)


def _number(value: float, digits: int = 3) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _with_spread(value: float, spread: float) -> str:
    return _number(value) + ("" if math.isnan(value) or math.isnan(spread) else f" ± {_number(spread)}")
