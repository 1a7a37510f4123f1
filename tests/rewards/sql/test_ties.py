import sqlite3
from collections import OrderedDict

import pytest

from rewards.sandbox.sqlite import QueryError, execute
from rewards.sql import execution, execution_match, ties
from rewards.sql.ties import orders_rows, tie_blocks


@pytest.mark.parametrize(
    ("gold", "blocks"),
    [
        ("SELECT name, age FROM singer ORDER BY age", [3, 2, 1]),
        ("SELECT name FROM singer ORDER BY age DESC", [1, 2, 3]),
        ("SELECT name FROM singer ORDER BY age, id", [1] * 6),
        ("SELECT name, age AS years FROM singer ORDER BY years", [3, 2, 1]),
        ("SELECT name, age FROM singer ORDER BY 2", [3, 2, 1]),
        ("SELECT * FROM singer ORDER BY age", [3, 2, 1]),
        ("SELECT name, -age FROM singer ORDER BY -age", [1, 2, 3]),
        ("SELECT name FROM singer AS s ORDER BY s.age / 100", [6]),
        ("SELECT country, count(*) FROM singer GROUP BY country ORDER BY count(*)", [1, 1, 1]),
        ("SELECT country, count(*) AS n FROM singer WHERE id < 4 GROUP BY country ORDER BY max(age)", [2]),
        ("SELECT DISTINCT country FROM singer ORDER BY country IS NULL", [1, 1, 1]),  # not an output: strict
        ("SELECT DISTINCT country, age FROM singer ORDER BY country", [1, 2, 2]),
        ("SELECT name FROM singer UNION ALL SELECT name FROM singer ORDER BY name", [2, 2, 2, 2, 4]),
        ("SELECT country FROM singer ORDER BY country", [1, 2, 3]),
        ("WITH x AS (SELECT * FROM singer) SELECT name FROM x ORDER BY age LIMIT 5", [3, 2]),
        ("SELECT name FROM singer ORDER BY age LIMIT 3 OFFSET 3", [2, 1]),
        (
            "SELECT s.name, count(*) FROM singer s JOIN concert c ON s.id = c.singer_id GROUP BY s.id ORDER BY 2 DESC",
            [1, 2],
        ),
        ("SELECT name FROM singer WHERE 0 ORDER BY age", []),
        ("SELECT name, age FROM singer ORDER BY weight DESC", [1, 2, 1, 1, 1]),
    ],
)
def test_sqlite_says_which_rows_tie(database, gold, blocks):
    assert tie_blocks(database, gold, execute(database, gold)) == blocks


def test_a_collation_decides_what_ties(tmp_path):
    path = str(tmp_path / "c.sqlite")
    connection = sqlite3.connect(path)
    connection.executescript(
        "CREATE TABLE t(x TEXT COLLATE NOCASE, y); INSERT INTO t VALUES ('a', 1), ('A', 2), ('b', 3);"
    )
    connection.close()
    for gold in ("SELECT y FROM t ORDER BY x", "SELECT x FROM t ORDER BY x"):
        assert tie_blocks(path, gold, execute(path, gold)) == [2, 1]
    gold = "SELECT y FROM t ORDER BY x COLLATE BINARY"
    assert tie_blocks(path, gold, execute(path, gold)) == [1, 1, 1]


def test_tied_rows_may_swap_and_others_may_not(database):
    gold = "SELECT name, age FROM singer ORDER BY age"
    swapped = "SELECT name, age FROM singer ORDER BY age, id DESC"
    assert execute(database, swapped).rows != execute(database, gold).rows
    assert execution_match(swapped, sql=gold, database=database).reason == "match"
    mixed = "SELECT name, age FROM singer ORDER BY age = 30, age"
    assert execution_match(mixed, sql=gold, database=database).reason == "wrong_order"
    unordered = "SELECT name, age FROM singer ORDER BY id"
    assert execution_match(unordered, sql=gold, database=database).reason == "wrong_order"


def test_ranks_that_do_not_explain_golds_own_rows_are_not_used(database, monkeypatch):
    gold = "SELECT name FROM singer ORDER BY age"
    monkeypatch.setattr(
        ties, "rank_query", lambda sql, columns: "SELECT name, 1 FROM singer WHERE id <> 6 UNION ALL SELECT 'x', 1"
    )
    assert ties.tie_blocks(database, gold, execute(database, gold)) == [1] * 6


def test_keys_that_cannot_be_known_leave_gold_order_as_the_only_one(database):
    gold = "SELECT DISTINCT name FROM singer ORDER BY age"
    assert execution_match(gold, sql=gold, database=database).reason == "match"
    other = "SELECT name FROM (SELECT DISTINCT name, age FROM singer) ORDER BY age, name DESC"
    assert execution_match(other, sql=gold, database=database).reason == "wrong_order"


def test_gold_that_the_parser_cannot_read_is_judged_by_its_tokens():
    deep = "SELECT " + "(" * 60 + "1" + ")" * 60
    assert orders_rows(f"{deep} ORDER BY 1")
    assert not orders_rows(f"{deep} FROM (SELECT 1 ORDER BY 1)")


def test_ties_that_the_clock_hid_judge_nobody_and_are_asked_for_again(database, monkeypatch):
    gold = "SELECT name, age FROM singer ORDER BY age"
    rows = execute(database, gold).rows
    turned = gold + ", id DESC"
    assert execute(database, turned).rows != rows

    def slow(path, query):
        raise QueryError("timeout_in_query", "stopped after 3.0 s", by_clock=True)

    monkeypatch.setattr(execution, "_BLOCKS", OrderedDict())
    with monkeypatch.context() as patch:
        patch.setattr(ties, "execute", slow)
        score = execution.execution_match(turned, sql=gold, database=database)
        assert (score.failed, score.reason, score.repeatable) == (True, "gold_timeout", False)
    assert execution.execution_match(turned, sql=gold, database=database).reason == "match"
