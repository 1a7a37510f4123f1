"""core.app: finding apps, composites, prepared rows, and a self-check that can fail."""

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from core import app as apps
from core.app import App, AppError, Language, Quantity, prepare, self_check


def good(completion):
    return 1.0


def nice(completion):
    return 0.5


@dataclass(frozen=True)
class Options:
    style: str = "plain"


def toy(**changes):
    made = {
        "name": "toy",
        "acts": Language(prompt=lambda row: f"{row['question']} ({row['style']})"),
        "load": lambda folder: {},
        "write_offline": lambda folder, seed: None,
        "demonstrations": lambda rows, seed: [row["answer"] for row in rows],
        "rewards": {"good": (3.0, good), "nice": (1.0, nice)},
        "presets": {"bare": {"nice": (1.0, nice)}, "flat": {"good": (1.0, good)}},
        "outcome": "good",
        "metrics": {"good": good},
        "gold": lambda row: row["answer"],
        "options": Options,
    }
    return App(**made | changes)


def test_apps_are_the_folders_that_hold_one():
    assert "text_to_sql" in apps.names()
    for name in apps.names():
        assert apps.find(name).name == name
        assert (apps.folder(name) / "app.py").exists()


def test_an_unknown_app_gets_the_nearest_name():
    with pytest.raises(AppError, match="unknown app 'text_to_sqll'; did you mean 'text_to_sql'"):
        apps.find("text_to_sqll")


def test_an_app_without_its_packages_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "apps.text_to_sql.app", raising=False)
    monkeypatch.setattr(apps.importlib, "import_module", raising(ModuleNotFoundError("no", name="sqlglot.errors")))
    with pytest.raises(AppError, match=r"needs the package 'sqlglot.*make train APP=text_to_sql` installs it"):
        apps.find("text_to_sql")


def test_a_broken_import_between_our_own_rooms_is_a_bug_and_not_a_missing_package(monkeypatch):
    monkeypatch.setattr(apps.importlib, "import_module", raising(ModuleNotFoundError("no", name="rewards.sqll")))
    with pytest.raises(ModuleNotFoundError):
        apps.find("text_to_sql")


def test_an_app_must_be_called_like_its_folder(monkeypatch):
    module = ModuleType("apps.text_to_sql.app")
    module.APP = toy()
    monkeypatch.setattr(apps.importlib, "import_module", lambda name: module)
    with pytest.raises(AppError, match="calls itself 'toy'"):
        apps.find("text_to_sql")


def raising(error):
    def fail(*_):
        raise error

    return fail


def test_composites():
    assert toy().composite() == {"good": (3.0, good), "nice": (1.0, nice)}
    assert toy().composite("flat", {"good": 2}) == {"good": (2.0, good)}
    with pytest.raises(AppError, match=r"unknown rewards.preset 'flatt'; did you mean 'flat'"):
        toy().composite("flatt")
    with pytest.raises(AppError, match=r"unknown component in rewards.weights 'nicer'; did you mean 'nice'"):
        toy().composite(weights={"nicer": 1})
    with pytest.raises(AppError, match="preset 'bare' of app toy lacks the outcome component 'good'"):
        toy().composite("bare")


def test_a_prepared_row_has_the_task_options_and_the_prompt():
    row = {"id": "r1", "question": "Why?"}
    assert prepare(toy(), [row], Options("loud")) == [row | {"style": "loud", "prompt": "Why? (loud)"}]
    assert set(row) == {"id", "question"}, "the data's own row is left as it was"


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"question": "?"}, "row 0 of app toy has no 'id'"),
        ({"id": 1, "question": "?", "style": "mine"}, "task option 'style' is also a column of the data"),
        ({"id": "r1", "text": "?"}, "row r1: the prompt needs the column 'question'; the row has: id, text"),
    ],
)
def test_a_row_that_cannot_be_prepared_is_named(row, sentence):
    with pytest.raises(AppError, match=sentence):
        prepare(toy(), [row], Options())


class Judge:
    """Scores completions with a function, as a Scorer would; None = could not judge."""

    def __init__(self, function):
        self.names, self.function = ("good",), function

    def score(self, completions, rows):
        values = [self.function(text) for text in completions]
        return SimpleNamespace(
            values=np.array([[np.nan if v is None else v] for v in values], dtype=float).reshape(-1, 1),
            failed=np.array([v is None for v in values], dtype=bool),
            reasons=[{"good": "wrong"} for _ in values],
        )


ROWS = [{"id": f"r{i}", "answer": answer} for i, answer in enumerate(["a", "b", "c"])]


def canary(component="good", at_least=0.0, at_most=0.0):
    return SimpleNamespace(
        name="echo", component=component, completion=lambda row: "!", at_least=at_least, at_most=at_most
    )


def test_gold_that_scores_one_passes():
    fair = Judge(lambda text: float(text in "abc"))
    findings = self_check(toy(canaries=(canary(), canary("absent"))), ROWS, fair, fair)
    assert [f.what for f in findings] == ["gold scores 1 on reward good", "gold scores 1 on metric good", "canary echo"]
    assert all(f.ok for f in findings)


def test_gold_that_scores_less_or_cannot_be_judged_fails_and_names_the_row():
    findings = self_check(toy(), ROWS, Judge(lambda text: 0.5 if text == "b" else 1.0), Judge(lambda text: None))
    assert [f.ok for f in findings] == [False, False]
    assert findings[0].detail == "1 of 3 rows below 1; row r1: 0.500 wrong"
    assert "3 rows could not be judged" in findings[1].detail


def test_gold_must_reach_what_the_app_calls_best():
    app, judge = toy(best={"good": 60.0}), Judge(lambda text: 59.0 if text == "b" else 60.0)
    findings = self_check(app, ROWS, judge, judge)
    assert [f.what for f in findings] == ["gold scores 60 on reward good", "gold scores 60 on metric good"]
    assert findings[0].detail == "1 of 3 rows below 60; row r1: 59.000 wrong"
    half = self_check(toy(best={"good": 0.5}), ROWS, Judge(lambda text: 0.5), Judge(lambda text: 1.0))
    assert [f.ok for f in half] == [True, True]


def test_of_a_metric_of_which_less_is_better_gold_must_not_score_more_than_its_best():
    app, none = toy(lower=frozenset({"good"})), Judge(lambda text: 1.0)
    assert (app.better("good"), toy().better("good")) == ("lower", "higher")
    findings = self_check(app, ROWS, none, Judge(lambda text: 0.25 if text == "b" else 0.0))
    assert [(f.what, f.ok) for f in findings] == [
        ("gold scores 1 on reward good", True),
        ("gold scores 0 on metric good", False),
    ]
    assert findings[1].detail == "1 of 3 rows above 0; row r1: 0.250 wrong"
    assert self_check(app, ROWS, none, Judge(lambda text: -1.0))[1].ok
    app = toy(lower=frozenset({"good"}), best={"good": 0.25})
    assert self_check(app, ROWS, Judge(lambda text: 0.25), Judge(lambda text: 0.25))[1].ok


def test_gold_is_made_and_judged_a_few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(apps, "AT_ONCE", 2)
    sizes, made = [], []

    class Counting(Judge):
        def score(self, completions, rows):
            sizes.append(len(rows))
            return super().score(completions, rows)

    app = toy(gold=lambda row: made.append(row["id"]) or row["answer"])
    fair = Counting(lambda text: 0.5 if text == "c" else 1.0)
    findings = self_check(app, ROWS, fair, fair)
    assert (sizes, made) == ([2, 2, 1, 1], ["r0", "r1", "r2"])
    assert {finding.detail for finding in findings} == {"1 of 3 rows below 1; row r2: 0.500 wrong"}


@pytest.mark.parametrize(
    ("edges", "sentence"),
    [
        (((15.0, 35.0),), "2 variables have class edges"),
        (((15.0, 35.0), (30.0,)), "2 variables have class edges"),
        (((), ()), "2 variables have class edges"),
        (((15.0, 15.0), (1.0, 2.0)), "of pm2p5 must ascend"),
        (((1.0, 2.0), (0.0, 2.0)), "of pm10 must ascend, above 0 and below top=1000"),
        (((1.0, 2.0), (1.0, 1000.0)), "of pm10 must ascend"),
    ],
)
def test_class_edges_that_are_none_are_refused(edges, sentence):
    with pytest.raises(ValueError, match=sentence):
        Quantity(("pm2p5", "pm10"), edges)
    with pytest.raises(ValueError, match="scale=0"):
        Quantity(("pm2p5",), ((15.0,),), scale=0)
    for costs in (((0.0, 1.0),), ((0.0, 1.0), (1.0,)), ((0.0,),)):
        with pytest.raises(ValueError, match=r"are no square of 2 classes; give C\[observed, announced\]"):
            Quantity(("pm2p5",), ((15.0,),), costs=costs)


def test_gold_may_be_an_array():
    seen = []

    def judge(made):
        seen.append(made)
        return float(made.mean())

    app = toy(gold=lambda row: np.ones((2, 2, 3), np.float32))
    assert all(finding.ok for finding in self_check(app, ROWS, Judge(judge), Judge(judge)))
    assert len(seen) == 2 * len(ROWS)
    assert seen[0].shape == (2, 2, 3)


def test_a_split_without_rows_fails():
    judge = Judge(lambda text: 1.0)
    assert {(f.ok, f.detail) for f in self_check(toy(), [], judge, judge)} == {(False, "there are no rows")}


@pytest.mark.parametrize(("score", "ok"), [(0.0, True), (0.2, True), (0.3, False), (None, False)])
def test_a_canary_fails_outside_of_its_range_or_unscored(score, ok):
    judge = Judge(lambda text: score if text == "!" else 1.0)
    assert self_check(toy(canaries=(canary(at_most=0.2),)), ROWS, judge, judge)[-1].ok is ok


def test_no_canary_is_asked_for_on_zero_rows():
    judge = Judge(lambda text: 1.0)
    assert len(self_check(toy(canaries=(canary(),)), ROWS, judge, judge, canary_rows=0)) == 2
