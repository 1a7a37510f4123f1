"""What the scoring benchmark measures against judges as the rewards do: else its times would be those of other work."""

import itertools
import sqlite3
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import rivals

from core.scoring import Scorer
from rewards.sql import execution
from rewards.sql.execution import execution_match
from rewards.sql.official import spider_execution

ROWS = [(1, "Ann", "France", 30), (2, "Bob", "France", 25), (3, "Cid", "Spain", 30), (4, "Eve", None, 41)]
GOLD = "SELECT name, age FROM singer WHERE age < 40"
ORDERED = "SELECT name, age FROM singer ORDER BY age, name"
STRICT = [  # prediction, gold, value
    (GOLD, GOLD, 1.0),
    ("SELECT s.name AS n, s.age FROM singer AS s WHERE NOT s.age >= 40", GOLD, 1.0),
    (ORDERED, ORDERED, 1.0),
    ("SELECT name, age FROM singer WHERE age <= 41", GOLD, 0.0),
    ("SELECT name, age + 1 FROM singer WHERE age < 40", GOLD, 0.0),
    ("SELECT name FROM singer WHERE age < 40", GOLD, 0.0),
    ("SELECT name, age FROM singer ORDER BY age DESC", ORDERED, 0.0),
    ("SELECT name, missing FROM singer", GOLD, 0.0),
    ("SELECT name, age FROM", GOLD, 0.0),
]
OFFICIAL = [  # what Spider's script forgives, and where it looks twice
    ("SELECT age, name FROM singer WHERE age < 40", GOLD, 1.0),
    ("SELECT DISTINCT name, age FROM singer WHERE age < 40", GOLD, 1.0),
    ("SELECT DISTINCT age FROM singer", "SELECT age FROM singer", 1.0),
    ("SELECT age, name FROM singer ORDER BY age, name", ORDERED, 1.0),
    ("VALUES (2, 1), (1, 2), (1, 3)", "VALUES (1, 2), (2, 1), (1, 3) -- order by", 0.0),
    ("VALUES (2, 1), (1, 2), (1, 3)", "VALUES (1, 2), (2, 1), (1, 3)", 1.0),
    ("SELECT name, age FROM singer WHERE age < = 39", GOLD, 1.0),
    ("SELECT country, country FROM singer", "SELECT country, name FROM singer", 0.0),
    (
        "SELECT country, age, id, name, age > 29, 1 FROM singer",
        "SELECT id, name, country, age, 1, age > 29 FROM singer",
        1.0,
    ),
]


def fill(path, rows):
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE singer(id INTEGER PRIMARY KEY, name TEXT, country TEXT, age INTEGER)")
    connection.execute("CREATE TABLE song(id INTEGER PRIMARY KEY, title TEXT, singer_id INTEGER REFERENCES singer(id))")
    connection.executemany("INSERT INTO singer VALUES (?, ?, ?, ?)", rows)
    connection.executemany("INSERT INTO song VALUES (?, ?, ?)", [(1, "Sun", 4), (2, "Sea", 1)])
    connection.commit()
    connection.close()
    return str(path)


@pytest.fixture
def database(tmp_path):
    return fill(tmp_path / "singers.sqlite", ROWS)


@pytest.mark.parametrize(("prediction", "gold", "value"), STRICT + OFFICIAL)
def test_the_test_suite_way_judges_as_the_official_metric(prediction, gold, value, database):
    assert rivals.test_suite_match(prediction, gold, database) == value
    assert spider_execution(prediction, sql=gold, database=database).value == value


@pytest.mark.parametrize(("prediction", "gold", "value"), STRICT)
def test_the_slow_ways_judge_as_the_reward(prediction, gold, value, database):
    assert execution_match(prediction, sql=gold, database=database).value == value
    assert rivals.execution_match_uncached(prediction, sql=gold, database=database).value == value
    assert rivals.test_suite_match(prediction, gold, database) == value


def test_a_second_database_tells_apart_what_the_first_does_not(database, tmp_path):
    prediction, gold = "SELECT name FROM singer WHERE id < 3", "SELECT name FROM singer WHERE country = 'France'"
    assert rivals.test_suite_match(prediction, gold, database) == 1.0
    fill(tmp_path / "more.sqlite", [*ROWS, (5, "Fay", "France", 20)])
    assert rivals.test_suite_match(prediction, gold, database) == 0.0


def test_gold_that_does_not_run_is_an_error_and_no_verdict(database):
    with pytest.raises(ValueError, match="gold does not run"):
        rivals.test_suite_match(GOLD, "SELECT missing FROM singer", database)


def test_counts_decide_where_the_sets_of_rows_are_equal(database):
    prediction = "SELECT country FROM singer UNION ALL SELECT 'Spain' LIMIT 5"
    gold = "SELECT country FROM singer UNION ALL SELECT 'France' LIMIT 5"
    assert rivals.test_suite_match(prediction, gold, database) == 0.0
    assert rivals.test_suite_match(gold, gold, database) == 1.0


def test_without_a_cache_every_call_runs_gold_and_the_prediction(database, monkeypatch):
    ran = []
    run = execution.execute
    monkeypatch.setattr(execution, "execute", lambda path, sql: ran.append(sql) or run(path, sql))
    monkeypatch.setattr(execution, "_RESULTS", execution._Results(execution.CACHE_BYTES))
    for _ in range(2):
        rivals.execution_match_uncached("SELECT 1, 2", sql=GOLD, database=database)
    assert ran == [GOLD, "SELECT 1, 2"] * 2
    for _ in range(2):
        execution_match("SELECT 1, 2", sql=GOLD, database=database)
    assert ran == [GOLD, "SELECT 1, 2"] * 3


def test_equal_completions_of_different_turns_are_calls_of_their_own(database):
    rows = [{"sql": GOLD, "database": database, "turn": turn} for turn in range(3)]
    with Scorer({"reward": rivals.execution_match_undeduplicated}, workers=1, cache_mb=0) as scorer:
        scores = scorer.score([GOLD] * 3, rows, 3)
    assert scores.values[:, 0].tolist() == [1.0] * 3
    assert scores.metrics["cache_hits/reward"] == 0


def test_a_grown_database_has_the_tables_shares_cells_and_keys_of_its_source(database, tmp_path):
    rivals.grow(Path(database), tmp_path / "large.sqlite", 600, seed=0)
    rivals.grow(Path(database), tmp_path / "same.sqlite", 600, seed=0)
    rivals.grow(Path(database), tmp_path / "other.sqlite", 600, seed=1)

    def dump(name):
        return "\n".join(sqlite3.connect(tmp_path / f"{name}.sqlite").iterdump())

    large = sqlite3.connect(tmp_path / "large.sqlite")
    singers, songs = (large.execute(f"SELECT * FROM {table}").fetchall() for table in ("singer", "song"))
    assert (len(singers), len(songs)) == (400, 200)
    assert [row[0] for row in singers] == list(range(1, 401))
    for at in (1, 2, 3):
        assert {row[at] for row in singers} == {row[at] for row in ROWS}
    assert max(Counter(itertools.chain(row[2] for row in songs)).values()) < 10
    assert {row[2] for row in songs} <= set(range(1, 401))
    assert dump("large") == dump("same") != dump("other")
