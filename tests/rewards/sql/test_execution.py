import sqlite3

import pytest

from rewards.sandbox.sqlite import DatabaseUnavailable, QueryError, Result
from rewards.score import BrokenRow
from rewards.sql import executes, execution, execution_match


def verdict(completion: str, gold: str, database: str) -> str:
    score = execution_match(completion, sql=gold, database=database)
    assert score.value == float(score.reason == "match")
    return score.reason


GOLD = "SELECT name, age FROM singer WHERE age > 25"


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        (GOLD, "match"),
        ("select S.NAME as who, (S.age) from singer as S where ((25 < s.age));", "match"),
        ("WITH x AS (SELECT * FROM singer) SELECT name, age FROM x WHERE age >= 26 -- done", "match"),
        (GOLD + " ORDER BY age DESC", "match"),
        ("SELECT age, name FROM singer WHERE age > 25", "wrong_rows"),
        ("SELECT name FROM singer WHERE age > 25", "wrong_columns"),
        ("SELECT name, age FROM singer WHERE 0", "wrong_rows"),
        ("SELECT name, CAST(age AS TEXT) FROM singer WHERE age > 25", "wrong_rows"),
        ("SELECT name, age FROM singer WHERE age > 25 UNION ALL SELECT 'Ann', 30", "wrong_rows"),
        ("I do not know", "no_sql"),
        ("DELETE FROM singer", "refused"),
        ("SELECT nobody FROM singer", "unknown_name"),
    ],
)
def test_reasons(database, completion, reason):
    assert verdict(completion, GOLD, database) == reason


def test_duplicates_count(database):
    gold = "SELECT name FROM singer WHERE country = 'Spain'"
    assert verdict("SELECT DISTINCT name FROM singer WHERE country = 'Spain'", gold, database) == "wrong_rows"


def test_empty_equals_empty_but_an_error_or_another_width_does_not(database):
    gold = "SELECT name FROM singer WHERE age > 99"
    assert verdict("SELECT title FROM concert WHERE 0", gold, database) == "match"
    assert verdict("SELECT 1, 2 WHERE 0", gold, database) == "wrong_columns"
    assert verdict("DELETE FROM singer", gold, database) == "refused"
    assert verdict("", gold, database) == "no_sql"


@pytest.mark.parametrize(
    "gold",
    [
        "SELECT name FROM singer ORDER BY age DESC, name",
        "SELECT country FROM singer UNION SELECT title FROM concert ORDER BY 1",
        "WITH x AS (SELECT name FROM singer) SELECT name FROM x ORDER BY name",
    ],
)
def test_order_counts_where_the_top_level_orders(database, gold):
    assert verdict(gold, gold, database) == "match"
    assert verdict(f"SELECT * FROM ({gold}) ORDER BY 1 DESC", gold, database) == "wrong_order"


@pytest.mark.parametrize(
    "gold",
    [
        "SELECT name FROM (SELECT name FROM singer ORDER BY age)",
        "SELECT name FROM singer WHERE name <> 'ORDER BY'",
        "SELECT name FROM singer -- ORDER BY name",
        "SELECT name FROM singer WHERE age IN (SELECT age FROM singer ORDER BY age LIMIT 2)",
        "SELECT name, rank() OVER (ORDER BY age) FROM singer",
        "WITH x AS (SELECT name FROM singer ORDER BY age) SELECT name FROM x",
    ],
)
def test_order_is_free_where_only_an_inner_part_or_a_literal_orders(database, gold):
    backwards = f"SELECT * FROM ({gold}\n) ORDER BY 1 DESC"
    assert verdict(backwards, gold, database) == "match"


def test_gold_that_does_not_run_raises_whatever_the_completion_says(database):
    for completion in ("", "SELECT 1", "SELECT nope"):
        with pytest.raises(BrokenRow, match="unknown_name: no such column: nope"):
            execution_match(completion, sql="SELECT nope FROM singer", database=database)


def test_a_file_that_cannot_be_opened_fails_the_check(tmp_path):
    for score in (
        execution_match("SELECT 1", sql="SELECT 1", database=str(tmp_path / "missing")),
        executes("SELECT 1", database=str(tmp_path / "missing")),
    ):
        assert score.failed
        assert score.reason == "database_unavailable"


def test_gold_stopped_by_the_clock_fails_the_check_and_is_not_remembered(database, monkeypatch):
    calls = []

    def slow(path, sql):
        calls.append(sql)
        raise QueryError("timeout_in_query", "slow machine", by_clock=True)

    monkeypatch.setattr(execution, "execute", slow)
    for _ in range(2):
        assert execution_match("SELECT 1", sql="SELECT 'slow'", database=database).failed
    assert calls == ["SELECT 'slow'"] * 2


def test_an_unexpected_error_is_never_a_low_score(database, monkeypatch):
    def broken(path, sql):
        raise ZeroDivisionError

    monkeypatch.setattr(execution, "execute", broken)
    with pytest.raises(ZeroDivisionError):
        execution_match("SELECT 1", sql="SELECT 'never run before'", database=database)


def test_gold_and_repeated_predictions_run_once(database, monkeypatch):
    ran = []
    real = execution.execute
    monkeypatch.setattr(execution, "execute", lambda path, sql: ran.append(sql) or real(path, sql))
    for completion in ["SELECT 11", "SELECT nope", "SELECT 12"] * 3:
        execution_match(completion, sql="SELECT 11 AS gold", database=database)
    assert sorted(ran) == ["SELECT 11", "SELECT 11 AS gold", "SELECT 12", "SELECT nope"]


def test_a_changed_database_is_not_answered_from_the_cache(tmp_path):
    path = tmp_path / "d.sqlite"
    for value, expected in ((1, "match"), (2, "wrong_rows")):
        path.unlink(missing_ok=True)
        connection = sqlite3.connect(path)
        connection.execute("CREATE TABLE t(x)")
        connection.execute("INSERT INTO t VALUES (?)", (value,))
        connection.commit()
        connection.close()
        assert verdict("SELECT 1", "SELECT x FROM t", str(path)) == expected


def test_cache_is_bounded_in_bytes():
    results = execution._Results(limit=100_000)
    for i in range(100):
        results.put((i,), Result([("x" * 5_000,)], ["x"]))
        assert results.used <= results.limit
    assert 10 < len(results.entries) < 20
    results.put(("huge",), Result([("x" * 50_000,)], ["x"]))
    assert results.get(("huge",)) is None
    assert results.get((99,)) is not None


def test_executes(database):
    assert executes("SELECT 1", database=database).value == 1.0
    for completion, reason in (("SELECT nope", "unknown_name"), ("hello", "no_sql"), ("DROP TABLE singer", "refused")):
        score = executes(completion, database=database)
        assert (score.value, score.reason) == (0.0, reason)


def test_failing_to_read_the_prediction_file_is_a_failed_check(database, monkeypatch):
    execution_match("SELECT 1", sql="SELECT 'warm'", database=database)

    def locked(path, sql):
        raise DatabaseUnavailable("locked")

    monkeypatch.setattr(execution, "execute", locked)
    assert execution_match("SELECT 'cold'", sql="SELECT 'warm'", database=database).failed
