"""core.cache: which verdicts are kept, what makes one another, and that none outlives the code or file it rests on."""

import importlib
import os
import random
import sqlite3
import sys
import time
import tracemalloc

import numpy as np
import pytest
import scoring_rewards as rewards

from core.cache import Cache, code_version
from core.scoring import Scorer, as_trl
from rewards import sql


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "singers.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript("CREATE TABLE singer(name TEXT, age INTEGER); INSERT INTO singer VALUES ('Ann', 30)")
    connection.close()
    return path


def calls(folder):
    return len(list(folder.iterdir()))


# -- what is kept


def test_a_verdict_is_kept_whole_and_costs_no_second_call(workers, tmp_path):
    scorer = Scorer({"x": rewards.counted_kind, "y": rewards.length}, pool=workers)
    rows = [{"notes": [str(tmp_path)]}] * 4
    first = scorer.score(["score", "none", "score", "fine"], rows)
    assert calls(tmp_path) == 3
    assert (first.metrics["cache_hits/x"], first.metrics["cache_hits/y"]) == (1, 1)
    again = scorer.score(["fine", "score", "none", "true"], rows)
    assert calls(tmp_path) == 4
    assert (again.metrics["cache_hits/x"], again.metrics["cache_hits/y"]) == (3, 3)
    np.testing.assert_array_equal(again.values[:, 0], [0.5, 0.25, np.nan, 1.0])
    assert again.reasons == [{}, first.reasons[0], {}, {}]
    assert again.details == [{}, first.details[0], {}, {}]
    assert not again.failed.any()
    last = scorer.score(["fine"] * 2, rows[:2])
    assert last.metrics["seconds/x"] == last.metrics["seconds/y"] == 0
    assert last.metrics["cache_hits/x"] == 2


def test_a_group_is_kept_as_a_whole(workers, tmp_path):
    scorer = Scorer({"x": rewards.counted_group}, pool=workers)
    rows = [{"notes": [str(tmp_path)]}] * 4
    for groups, made, hits in [("abcd", 2, 0), ("cdab", 2, 4), ("baab", 3, 2)]:
        scores = scorer.score(list(groups), rows, group_size=2)
        assert calls(tmp_path) == made
        assert scores.metrics["cache_hits/x"] == hits
        assert scores.reasons == [{"x": "r"}] * 4


@pytest.mark.parametrize(
    ("reward", "completion", "made"),
    [
        (rewards.counted_kind, "nan", 1),
        (rewards.counted_kind, "inf", 1),
        (rewards.counted_kind, "string", 1),
        (rewards.counted_kind, "raise", 1),
        (rewards.counted_fatal, "kill", 2),
        (rewards.counted_fatal, "sleep", 2),
        (rewards.counted_by_chance, "a", 1),
        (rewards.counted_volatile, "a", 1),
        (rewards.counted_batch, "a", 1),
        (rewards.counted_async, "a", 1),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_another_call_might_judge_otherwise_is_not_kept(workers, tmp_path, reward, completion, made):
    limits = {"workers": 1, "timeout_s": 0.3} if completion == "sleep" else {"pool": workers}
    scorer = Scorer({"x": reward}, **limits)
    for batch in (1, 2):
        scores = scorer.score([completion], [{"notes": [str(tmp_path)]}])
        assert calls(tmp_path) == made * batch
        assert scores.metrics["cache_hits/x"] == 0
    assert not len(scorer._cache)
    scorer.close()


def test_a_call_that_lost_a_worker_and_was_then_judged_is_kept(workers, tmp_path):
    scorer = Scorer({"x": rewards.killed_once}, pool=workers)
    hits = [scorer.score(["a"], [{"folder": str(tmp_path), "id": i}]).metrics["cache_hits/x"] for i in range(3)]
    assert hits == [0, 0, 1]  # the call changed the folder that its column names, so the second is another call


def test_cache_mb_0_keeps_nothing(workers, tmp_path):
    scorer = Scorer({"x": rewards.counted}, pool=workers, cache_mb=0)
    for batch in (1, 2):
        scorer.score(["a"] * 3, [{"notes": [str(tmp_path)]}] * 3)
        assert calls(tmp_path) == batch
    with pytest.raises(ValueError, match="cache_mb=-1 must be 0"):
        Scorer({"x": rewards.counted}, cache_mb=-1)


def test_scores_with_and_without_a_cache_are_equal(workers):
    together = {"a": rewards.same, "b": rewards.kind, "c": rewards.rank, "d": rewards.beside, "e": rewards.hash_order}
    kinds = ["none", "score", "true", "fine", "nan", "raise"]
    draw = random.Random(0)
    batches = [
        ([draw.choice(kinds) for _ in range(24)], [{"answer": draw.choice(kinds), "scale": i // 8} for i in range(24)])
        for _ in range(8)
    ]
    small, none = (Scorer(together, pool=workers, max_failure_share=1.0, cache_mb=mb) for mb in (0.05, 0))
    hits = 0
    for completions, rows in batches:
        ours, plain = (scorer.score(completions, rows, group_size=4) for scorer in (small, none))
        np.testing.assert_array_equal(ours.values, plain.values)
        np.testing.assert_array_equal(ours.failed, plain.failed)
        assert (ours.reasons, ours.details) == (plain.reasons, plain.details)
        hits += sum(ours.metrics[f"cache_hits/{x}"] - plain.metrics[f"cache_hits/{x}"] for x in "abce")
    assert 100 < hits < 8 * 24 * 3  # some were kept and some were dropped
    for scorer in (small, none):
        scorer.close()


def test_a_kept_verdict_is_much_cheaper_than_a_call():
    with Scorer({"x": rewards.same}, workers=1) as scorer:
        completions, rows = [str(i) for i in range(300)], [{"answer": "7", "id": i} for i in range(300)]
        scorer.score(["warm"], rows[:1])
        seconds = [scorer.score(completions, rows).metrics["score_s"] for _ in range(4)]
    assert min(seconds[1:]) < seconds[0] / 4  # about 15; a reward that does something widens it


# -- how much is kept


def test_the_least_recently_used_goes_first_and_the_bytes_stay_below_the_bound():
    cache = Cache(max_mb=0.01)
    verdicts = [[1.0, "match", "", True]]
    for i in range(1000):
        cache.put(b"%d" % i, verdicts)
        assert cache.get(b"0") is not None
        assert cache.bytes <= 0.01 * 2**20
    assert cache.get(b"999") == verdicts
    assert cache.get(b"500") is None
    assert 10 < len(cache) < 40
    cache.put(b"huge", [[1.0, "", "x" * 20_000, True]])
    assert cache.get(b"huge") is None
    assert cache.bytes <= 0.01 * 2**20


def test_a_key_put_twice_counts_once():
    cache, sizes = Cache(max_mb=1), []
    for key in (b"key", b"key", b"two"):
        cache.put(key, [[1.0, "", "", True]])
        sizes.append(cache.bytes)
    assert sizes == [sizes[0], sizes[0], 2 * sizes[0]]
    assert len(cache) == 2


@pytest.mark.parametrize("detail", ["", "12 rows, gold has {}", "\N{GRINNING FACE}{}" * 100])
def test_the_estimate_of_the_bytes_is_honest(detail):
    tracemalloc.start()
    try:
        cache = Cache(max_mb=64)
        before = tracemalloc.get_traced_memory()[0]
        for i in range(5000):
            cache.put(b"%032d" % i, [[i / 7, f"reason{i}", detail.format(i, *"a" * 99), True]])
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.8 < cache.bytes / taken < 1.3


# -- what a verdict rests on: files


def test_a_file_that_a_column_names_is_read_again_when_it_changed(workers, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"a")
    scorer = Scorer({"x": rewards.first_byte}, pool=workers)

    def value():
        scores = scorer.score(["c"], [{"file": str(file)}])
        return scores.values[0, 0], scores.metrics["cache_hits/x"]

    assert value() == (ord("a"), 0)
    assert value() == (ord("a"), 1)
    file.write_bytes(b"b")  # as long as before
    assert value() == (ord("b"), 0)
    (tmp_path / "other").write_bytes(b"c")
    os.utime(tmp_path / "other", ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    os.replace(tmp_path / "other", file)  # as long and as old as before
    assert value() == (ord("c"), 0)
    before = file.stat()
    time.sleep(0.02)  # a tick of the file system's clock
    file.write_bytes(b"d")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as `cp -p` does: as long, as old, the same inode
    assert value() == (ord("d"), 0)
    assert value() == (ord("d"), 1)


def test_other_files_are_watched_if_the_reward_names_them(workers, tmp_path):
    for name in ("file", "neighbour"):
        (tmp_path / name).write_bytes(b"\1")
    scorer = Scorer({"x": rewards.first_bytes_of_all, "y": rewards.first_byte_inside}, pool=workers)
    row = {"file": str(tmp_path / "file"), "files": [str(tmp_path / "neighbour")]}
    seen = []
    for change in (None, None, b"\2", None):
        if change:
            (tmp_path / "neighbour").write_bytes(change)
        scores = scorer.score(["c"], [row])
        seen.append((*scores.values[0], scores.metrics["cache_hits/x"], scores.metrics["cache_hits/y"]))
    assert seen == [(2, 1, 0, 0), (2, 1, 1, 1), (3, 2, 0, 0), (3, 2, 1, 1)]


def test_columns_whose_files_cannot_be_named_are_not_kept_and_the_reward_says_why(workers, tmp_path):
    scorer = Scorer({"y": rewards.first_byte_inside}, pool=workers)
    scores = scorer.score(["c"], [{"files": []}])
    assert "IndexError" in scores.details[0]["y"]
    assert not len(scorer._cache)


def test_text_that_can_be_no_path_is_no_file(workers):
    scorer = Scorer({"x": rewards.same}, pool=workers)
    for answer in ("\0", "x" * 100_000, "\ud800", ""):
        assert scorer.score([answer], [{"answer": answer}]).values.tolist() == [[1.0]]
    assert len(scorer._cache) == 4


def test_execution_is_judged_anew_when_the_database_changed(workers, database):
    scorer = Scorer({"x": sql.execution_match, "y": sql.schema_overlap}, pool=workers)
    rows = [{"sql": "SELECT age FROM singer", "database": str(database)}]

    def judged():
        scores = scorer.score(["SELECT 30"], rows)
        return scores.reasons[0]["x"], scores.metrics["cache_hits/x"], scores.metrics["cache_hits/y"]

    assert [judged(), judged()] == [("match", 0, 0), ("match", 1, 1)]
    connection = sqlite3.connect(database)
    connection.executescript("UPDATE singer SET age = 31")
    connection.close()
    assert [judged(), judged()] == [("wrong_rows", 0, 0), ("wrong_rows", 1, 1)]


MOMENTS = [
    "SELECT random()",
    "SELECT abs(random()) % 2",
    "SELECT hex(randomblob(4))",
    "SELECT age FROM singer ORDER BY random()",
    "SELECT CURRENT_TIMESTAMP",
    "SELECT CURRENT_TIME",
    "SELECT datetime('now')",
    "SELECT strftime('%f', 'now')",
    "SELECT julianday()",
    "SELECT name FROM singer WHERE date('now') > '2000-01-01'",
    "SELECT datetime(0, 'unixepoch', 'localtime')",
    "WITH x(y) AS (SELECT random() % 2) SELECT CASE y WHEN 0 THEN 'Ann' ELSE 'Bob' END FROM x",
]


def test_no_query_that_looks_at_the_moment_or_at_chance_has_a_verdict_that_changes(workers, database):
    together = {"x": sql.execution_match, "y": sql.executes, "z": sql.spider_execution}
    with_cache, without = (Scorer(together, pool=workers, cache_mb=mb) for mb in (64, 0))
    rows = [{"sql": "SELECT name FROM singer", "database": str(database)}] * len(MOMENTS)
    for scorer in (with_cache, without, with_cache, without):
        scores = scorer.score(MOMENTS, rows)
        assert scores.reasons == [dict.fromkeys("xyz", "refused")] * len(MOMENTS)
        assert (scores.values == 0).all()
        time.sleep(0.01)
    assert len(with_cache._cache) == 3 * len(MOMENTS)


# -- what a verdict rests on: code


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of rewards with imports of every form; `edit` changes one of its files."""
    files = {
        "judged/__init__.py": "",
        "judged/reward.py": "from judged.deep import base\nfrom . import near\nimport json, numpy, aside\n\n"
        "def reward(completion):\n    from judged.late import late\n    return base() + near.near() + late()\n",
        "judged/near.py": "def near():\n    return 1.0\n",
        "judged/far.py": "def far():\n    return 1.0\n",
        "judged/late.py": "from judged.near import near\n\ndef late():\n    return 1.0\n",
        "judged/deep/__init__.py": "from .base import base\n",
        "judged/deep/base.py": "import judged.reward\nfrom ..far import far as base\n",
        "judged/unused.py": "def unused():\n    return 1.0\n",
        "aside.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)

    def edit(name, old="1.0", new="2.0"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text.replace(old, new) if old in text else text + "\n# more\n")

    yield edit
    for name in [name for name in sys.modules if name.split(".")[0] in ("judged", "aside")]:
        del sys.modules[name]


FOLLOWED = ["reward.py", "near.py", "far.py", "late.py", "deep/__init__.py", "deep/base.py", "__init__.py"]


@pytest.mark.parametrize("name", [*(f"judged/{name}" for name in FOLLOWED), "aside.py"])
def test_the_version_is_of_the_module_and_of_all_that_it_imports(package, name):
    before = code_version("judged.reward")
    assert before == code_version("judged.reward") is not None
    package("judged/unused.py")
    assert code_version("judged.reward") == before
    package(name)
    assert code_version("judged.reward") not in (before, None)
    assert "judged" not in sys.modules  # nothing was imported to find out


def test_installed_packages_are_not_followed_and_what_cannot_be_read_has_no_version(package, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("builtins.open", lambda path, *args, real=open: opened.append(str(path)) or real(path, *args))
    code_version("judged.reward")
    assert sorted(opened) == sorted(
        [*(str(tmp_path / "judged" / name) for name in FOLLOWED), str(tmp_path / "aside.py")]
    )
    monkeypatch.undo()
    monkeypatch.syspath_prepend(tmp_path)
    assert code_version("judged.nowhere") is code_version("nowhere") is None
    (tmp_path / "judged" / "late.py").write_text("def late(:")
    assert code_version("judged.reward") is None


def test_edited_code_judges_anew_in_a_new_scorer_and_a_shared_cache_keeps_both(package):
    cache = Cache(max_mb=1)
    seen = []
    for edit in (None, None, "judged/late.py"):
        if edit:
            package(edit)
        with Scorer({"x": importlib.import_module("judged.reward").reward}, workers=1, cache=cache) as scorer:
            scores = scorer.score(["a"], [{}])
            seen.append((scores.values[0, 0], scores.metrics["cache_hits/x"]))
    assert seen == [(3, 0), (3, 1), (4, 0)]


def test_rewards_of_one_name_in_two_modules_do_not_meet(workers, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for module, value in (("judge_one", 1), ("judge_two", 2)):
        (tmp_path / f"{module}.py").write_text(f"def reward(completion):\n    return {value}.0\n")
    importlib.invalidate_caches()
    both = {module: importlib.import_module(module).reward for module in ("judge_one", "judge_two")}
    cache = Cache(max_mb=1)
    for _ in range(2):
        with Scorer(both, workers=1, cache=cache) as scorer:
            assert scorer.score(["a"], [{}]).values.tolist() == [[1.0, 2.0]]


def test_rewards_for_trl_share_a_cache(tmp_path):
    for batch in range(2):
        reward = as_trl(rewards.counted, workers=1)
        assert reward(prompts=["p"] * 2, completions=["a", "b"], notes=[[str(tmp_path)]] * 2) == [1.0, 1.0], batch
        assert calls(tmp_path) == 2
    as_trl(rewards.counted, workers=1, cache_mb=0)(prompts=["p"], completions=["a"], notes=[[str(tmp_path)]])
    assert calls(tmp_path) == 3


def test_a_reward_for_trl_that_was_edited_and_reloaded_is_not_judged_by_workers_with_the_old_code(package, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    values = []
    for edit in (None, None, ("judged/reward.py", "base()", "10 * base()")):
        module = importlib.import_module("judged.reward")
        if edit:
            package(*edit)
            module = importlib.reload(module)
        values += as_trl(module.reward, workers=1, memory_mb=999)(prompts=["p"], completions=["a"])
    assert values == [3.0, 3.0, 12.0]
