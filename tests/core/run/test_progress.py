import io
import time

import pytest
from rich.console import Console

from core.run.progress import Progress, clean_text, duration

HOSTILE = {
    "[red]x[/red]": "[red]x[/red]",
    "\x1b[2J\x1b[31mx\x1b[0m": "x",
    "\x1b]0;title\x07x": "x",
    "\x1b]8;;http://evil\x1b\\x": "x",
    "\x9b31mx\x9d0;t\x9cy": "xy",
    "\x1b]never ended x": "never ended x",
    "a\x00b\x08\x7f\x85c": "abc",
    "\u202egnp\u2066.exe\u200f": "gnp.exe",
    "a\r\nb\rc\td": "a\nb\nc    d",
    "\ud800": "\ufffd",
    ":warning: [link=file:///x]": ":warning: [link=file:///x]",
    "ends in \\": "ends in \\",
}


def printed(act, terminal=False, width=100) -> str:
    out = io.StringIO()
    act(Console(file=out, force_terminal=terminal, width=width, color_system=None, _environ={"TERM": "xterm"}))
    return out.getvalue()


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_loses_its_controls_and_nothing_else(text):
    assert clean_text(text) == HOSTILE[text]
    assert clean_text(clean_text(text)) == clean_text(text)
    assert printed(lambda console: Progress(1, "", console).note(text)) == HOSTILE[text] + "\n"


@pytest.mark.parametrize("text", HOSTILE)
def test_note_warning_and_table_make_text_safe_themselves(text):
    def act(console):
        progress = Progress(1, text, console, metric=text)
        progress.phase(text)
        progress.note(text)
        progress.warn(text)
        progress.table(text, ["a", text], [[text, 1]])
        progress.update(1, {f"eval/{text}": 0.5})

    out = printed(act)
    clean = HOSTILE[text].split("\n")[0]
    assert f"warning: {clean}" in out
    assert not any((ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0 or c in "\u202e\u2066\u200f\ud800" for c in out)


@pytest.mark.parametrize("unit", ["a", "\x1b]", "\x9d", "\x1b[1;", "[red]", "\x1b", "\\"])
def test_a_megabyte_of_text_is_cut_and_cleaned_in_linear_time(unit):
    began = time.monotonic()
    text = unit * (1_000_000 // len(unit))
    assert len(clean_text(text, limit=500)) < 560
    clean_text(text, limit=len(text))
    assert time.monotonic() - began < 2
    assert "characters cut" in clean_text(text, limit=500)


def test_plain_lines_are_few_and_say_reward_metric_spread_and_time():
    def act(console):
        with Progress(200, "t", console) as progress:
            for step in range(1, 201):
                progress.update(step, {"reward": 0.5, "reward_std": 0.1, "zero_spread": 0.25, "step_s": 0.5})
            progress.update(200, {"eval/accuracy": 0.75, "eval/accuracy/lo": 0.7})

    lines = printed(act).splitlines()
    assert len(lines) <= 22
    assert "step 10/200  reward 0.500 ± 0.100  spread 75%" in lines[1]
    assert "accuracy 0.750" in lines[-1]
    assert "reward 0.500" in lines[-1]


def test_terminal_shows_one_live_table_with_notes_above_it():
    def act(console):
        with Progress(3, "run", console) as progress:
            progress.phase("GRPO")
            for step in (1, 2, 3):
                progress.update(step, {"reward": step / 10, "eval/acc": 0.5})
                progress.note("[b]hello")
            progress.table("result", ["metric"], [["last words"]])

    out = printed(act, terminal=True)
    assert "run · GRPO" in out
    assert "3/3" in out
    assert "[b]hello" in out
    assert "\x1b" not in out[out.index("\x1b[?25h") + 6 :]  # the live table is over, the cursor shown again
    assert out.index("last words") > out.index("\x1b[?25h")


def test_duration_reads_like_a_clock():
    assert [duration(s) for s in (4.2, 200, 7500)] == ["4 s", "3 min 20 s", "2 h 5 min"]
