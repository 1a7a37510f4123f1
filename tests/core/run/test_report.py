import math
from html.parser import HTMLParser

import pytest

from core.run.folder import RunFolder
from core.run.report import write_report

ATTACKS = [
    "<script>alert(1)</script>",
    "</textarea><img src=x onerror=alert(1)>",
    "</pre></details></main></body></html><iframe src=//evil>",
    '" onmouseover="alert(1)" x="',
    "{{ 7*7 }}{% for x in y %}",
    "[red]x[/red]",
    "\x1b[31mred\x1b]0;title\x07",
    "nul\x00bell\x07\u202ereversed\ud800",
    "<![CDATA[ <!-- ",
    "long " * 200_000,
]
PAGE = {"html", "head", "meta", "title", "style", "body", "main", "header", "section", "h1", "h2", "p", "b", "span"}
BLOCKS = {"div", "table", "tr", "th", "td", "details", "summary", "pre", "figure", "figcaption"}
DRAWING = {"svg", "line", "text", "path", "g", "circle"}
VOID = {"meta"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on a tag that is closed out of order."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.text, self.open, self.policy, self.title = set(), set(), [], [], None, ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_comment(self, data):
        raise AssertionError(f"comment: {data[:80]}")

    handle_decl = unknown_decl = lambda self, data: self.tags.add("!") if data != "doctype html" else None

    def handle_data(self, data):
        self.text.append(data)


def parse(path) -> Page:
    html = path.read_text("utf-8")
    page = Page(html)
    assert page.tags <= PAGE | BLOCKS | DRAWING
    assert not {name for name in page.attributes if name.startswith("on") or name in ("href", "src", "style")}
    assert page.policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert not any((ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0 or c in "\u202e\x00" for c in html)
    assert len(html) < 1_000_000
    return page


def hostile_run(folder, text) -> tuple[RunFolder, dict, dict]:
    run, name = RunFolder(folder), text[:99].replace("\ud800", "")
    run.write_text("config.yaml", f"task: {text[:500]}")
    for step in range(1, 41):
        line = {"reward": step / 40, "reward_std": 0.1, f"rewards/{name}/mean": 0.5, "zero_spread": 1.0}
        run.log_metrics(step, line | {"eval/acc": step / 50, "loss": math.nan})
        if step > 30:
            run.log_rollouts(
                step,
                {
                    "prompt_id": [text + str(i // 4) for i in range(16)],
                    "prompt": [text] * 16,
                    "completion": [text] * 16,
                    "advantage": [1.0] * 16,
                    "keep": [0] * 16,
                    "reward": [math.nan, *range(15)],
                    f"reward/{name}": [0.5] * 16,
                    f"reason/{name}": [text] * 16,
                },
            )
    fields = dict.fromkeys(("app", "task", "recipe", "metric", "git"), text)
    numbers = {"before": 0.1, "after": 0.2, "ci95": [0.05, 0.15], "seed": 0, "n": 9, "baselines": {text: 0.1}}
    numbers["best_baseline"] = {"name": text, "before": 0.2, "after": -0.1, "ci95": [-0.2, math.nan]}
    table = {"title": text, "columns": [text, text], "rows": [[text, None], [text, 3]], "note": text}
    plot = {"title": text, "lines": {text: [[0, 1], [None, 0.5]], "b": [[0, 1], [1, 2]]}, "x_label": text, "note": text}
    samples = [dict.fromkeys(("question", "gold", "before", "after"), text) | {"before_ok": False, "after_ok": True}]
    extra = {
        "table": [{"name": text, "before": 1, "after": 2, "change": 1, "lo": None, "hi": math.nan}],
        "health": [(text, text, text, text)],
        "warmup": [{"step": 1, "loss": 1.0, "metric": 0.1}],
        "batch": text,
        "command": text,
        "samples": samples * 500,
        "plots": [plot | {"unit": False}],
    }
    return run, fields | numbers | {"tables": [table]}, extra


@pytest.mark.parametrize("text", ATTACKS, ids=lambda text: ascii(text[:20]))
def test_hostile_text_everywhere_leaves_the_page_intact(tmp_path, text):
    page = parse(write_report(*hostile_run(tmp_path, text)))
    shown = "".join(page.text)
    assert "How this was made" in shown
    if text.isprintable() and len(text) < 1000:
        assert shown.count(text) > 20
    if len(text) > 1000:
        assert "characters cut" in shown


def test_run_without_steps_has_a_report(tmp_path):
    text = "".join(parse(write_report(tmp_path / "new", {}, {})).text)
    assert "No step has been logged yet." in text
    assert "not finished" in text


def test_result_table_shows_interval_baselines_and_clusters(tmp_path):
    summary = {"app": "a", "seed": 3, "metric": "accuracy", "before": 0.44, "after": 0.815, "ci95": [0.33, 0.41]}
    summary |= {"n": 640, "n_clusters": 32, "baselines": {"nearest": 0.263}}
    rows = [
        {"name": "accuracy", "before": 0.44, "after": 0.815, "change": 0.375, "lo": 0.33, "hi": 0.41},
        {"name": "sampled", "before": 0.38, "after": 0.77, "change": 0.39, "lo": 0.35, "hi": 0.43},
    ]
    path = write_report(tmp_path, summary, {"table": rows})
    text = " ".join(" ".join(parse(path).text).split())
    assert "accuracy 0.440 0.815 +0.375 [+0.330, +0.410] sampled 0.380 0.770 +0.390 [+0.350, +0.430]" in text
    assert "baseline: nearest 0.263" in text
    assert "640 held-out items in 32 clusters" in text
    assert 'class="good">+0.375' in path.read_text()
    worse = write_report(tmp_path, {**summary, "better": "lower"}, {}).read_text()
    assert 'class="bad">+0.375' in worse


def test_the_best_baseline_stands_below_the_others_with_the_difference_and_its_verdict(tmp_path):
    summary = {"metric": "cost", "better": "lower", "before": 0.4, "after": 0.3, "baselines": {"none": 0.35}}
    best = {"name": "none", "value": 0.35, "before": 0.05, "after": -0.05, "ci95": [-0.07, -0.02]}
    path = write_report(tmp_path, summary | {"best_baseline": best}, {})
    text = " ".join(" ".join(parse(path).text).split())
    assert "minus the best baseline, none +0.050 -0.050 [-0.070, -0.020]" in text
    assert "cost ↓" in text
    assert "↓ lower is better." in text
    assert 'class="good">-0.050' in path.read_text()
    worse = write_report(tmp_path, summary | {"best_baseline": best | {"ci95": [0.01, 0.02]}}, {}).read_text()
    assert 'class="bad">-0.050' in worse
    assert "minus the best baseline" not in write_report(tmp_path, summary | {"best_baseline": None}, {}).read_text()


def test_a_verification_is_tables_and_charts_with_a_key(tmp_path):
    table = {"title": "by lead", "columns": ["lead", "POD"], "rows": [["6 h", 0.5], ["12 h", None]], "note": "of all"}
    lines = {f"arm {i}": [[0, 0.4, 1], [0, 0.5, 1]] for i in range(6)}
    plot = {"title": "ROC", "lines": lines, "x_label": "false alarm rate", "note": "up is good", "unit": True}
    path = write_report(tmp_path, {"tables": [table]}, {"plots": [plot]})
    text = " ".join(" ".join(parse(path).text).split())
    assert "by lead lead POD 6 h 0.500 12 h – of all" in text
    assert "ROC" in text
    assert "false alarm rate" in text
    assert " ".join(lines) in text, "the key"
    assert 'class="line c0 d1"' in path.read_text(), "a fifth line has the first one's colour and is dashed"
    assert "up is good" in text
    assert "Verification" not in write_report(tmp_path, {}, {}).read_text()


def test_groups_are_the_best_the_most_divided_and_the_worst_of_the_last_steps(tmp_path):
    run = RunFolder(tmp_path)
    rewards = {
        "high": [3, 3],
        "split": [0, 3],
        "low": [0, 0.1],
        "unjudged": [math.nan, math.nan],
        "mid": [1, 1],
        "mid2": [2, 2],
    }
    for step in (1, 2):
        prompts = [name if step == 2 else "early" for name in rewards for _ in "ab"]
        run.log_rollouts(
            step,
            {
                "prompt_id": prompts,
                "prompt": prompts,
                "completion": [f"{p}-{i % 2}" for i, p in enumerate(prompts)],
                "advantage": [0.0] * 12,
                "keep": [1] * 12,
                "reward": [v for pair in rewards.values() for v in pair],
            },
        )
    parts = [part.strip() for part in parse(write_report(run, {}, {})).text if part.strip()]
    kinds = [
        (parts[i], parts[i + 1].split(" · ")[-1])
        for i in range(len(parts))
        if parts[i] in ("best", "most divided", "worst")
    ]
    assert kinds == [
        ("best", "high"),
        ("best", "mid2"),
        ("most divided", "split"),
        ("most divided", "low"),
        ("worst", "mid"),
    ]
    assert parts.index("split-1") < parts.index("split-0")
    assert "early" not in " ".join(parts)
