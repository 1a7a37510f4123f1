"""The gold linter on a table small enough to check by eye."""

from random import Random

import pytest
import sqlglot

from data.synthetic.spider_domains import Column, Database, Table
from data.synthetic.spider_lint import Linter, neighbours
from data.synthetic.spider_trees import sql

COLUMNS = [
    Column("id", "key", "INTEGER"),
    Column("name", "label", "TEXT"),
    Column("city", "text", "TEXT"),
    Column("age", "number", "INTEGER"),
    Column("same", "number", "INTEGER"),
]
ROWS = [
    (1, "Anna", "Oslo", 30, 1),
    (2, "Ben", "Oslo", 41, 1),
    (3, "Carla", "Rome", 41, 1),
    (4, "David", "Rome", 25, 1),
    (5, "Elena", "Paris", 52, 1),
    (6, "Frank", "Paris", 18, 1),
    (7, "Grace", "Paris", 33, 1),
    (8, "Hugo", "Lima", 60, 1),
    (9, "Ines", "Lima", 61, 1),
    (10, "Jack", "Lima", 29, 1),
]


def tree(text):
    return sqlglot.parse_one(text, read="sqlite")


@pytest.fixture
def linter():
    linter = Linter(Database("people", [Table("person", COLUMNS, {}, ROWS)]), Random(0))
    yield linter
    linter.close()


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("SELECT name FROM person WHERE age > 41", None),
        ("SELECT name FROM person WHERE age > 90", "empty"),
        ("SELECT COUNT(*) FROM person WHERE age > 90", "empty"),
        ("SELECT MAX(age) FROM person WHERE age > 90", "empty"),
        ("SELECT name FROM person WHERE age > 42", "like_neighbour"),  # nobody is 42: > and >= agree
        ("SELECT DISTINCT name FROM person", "like_neighbour"),  # no name occurs twice
        ("SELECT DISTINCT city FROM person WHERE age > 41", None),
        ("SELECT AVG(age) FROM person WHERE name = 'Anna'", "like_neighbour"),  # one row: the sum is the average
        ("SELECT name FROM person WHERE age > 41 AND same = 1", "like_neighbour"),  # the second condition does nothing
        ("SELECT same FROM person LIMIT 1", "constant"),
        ("SELECT name FROM person ORDER BY age DESC LIMIT 1", None),
        ("SELECT name FROM person ORDER BY age ASC LIMIT 6", "undetermined"),  # rows 6 and 7 are both 41
        ("SELECT name FROM person ORDER BY age ASC LIMIT 7", "undetermined"),  # the tie lies inside
        ("SELECT name FROM person ORDER BY age ASC LIMIT 5", None),
        ("SELECT name FROM person ORDER BY age ASC LIMIT 10", "undetermined"),  # the LIMIT cuts nothing
        ("SELECT age FROM person ORDER BY age ASC", None),  # a tie that cannot be seen
        ("SELECT city FROM person GROUP BY city ORDER BY COUNT(*) DESC LIMIT 1", "undetermined"),
        ("SELECT p.name FROM person AS p, person AS q, person AS r", "too_many_rows"),
    ],
)
def test_gold_is_judged(linter, query, reason):
    assert linter.reject(tree(query)) == reason


@pytest.mark.parametrize(
    ("query", "wrong"),
    [
        ("SELECT a FROM t WHERE b > 3", {"SELECT a FROM t WHERE b >= 3", "SELECT a FROM t"}),
        ("SELECT MAX(a) FROM t", {"SELECT MIN(a) FROM t"}),
        ("SELECT AVG(a) FROM t", {"SELECT SUM(a) FROM t"}),
        ("SELECT COUNT(DISTINCT a) FROM t", {"SELECT COUNT(a) FROM t"}),
        ("SELECT DISTINCT a FROM t", {"SELECT a FROM t"}),
        ("SELECT a FROM t ORDER BY b DESC LIMIT 1", {"SELECT a FROM t ORDER BY b LIMIT 1"}),
        (
            "SELECT a FROM t GROUP BY a HAVING COUNT(*) <= 2",
            {"SELECT a FROM t GROUP BY a HAVING COUNT(*) < 2", "SELECT a FROM t GROUP BY a"},
        ),
        (
            "SELECT a FROM t WHERE id NOT IN (SELECT t_id FROM s)",
            {"SELECT a FROM t WHERE id IN (SELECT t_id FROM s)", "SELECT a FROM t"},
        ),
        (
            "SELECT a FROM t WHERE b BETWEEN 1 AND 4",
            {
                "SELECT a FROM t WHERE b BETWEEN 1 AND 4 AND b != 1",
                "SELECT a FROM t WHERE b BETWEEN 1 AND 4 AND b != 4",
                "SELECT a FROM t",
            },
        ),
        (
            "SELECT a FROM t WHERE b = 1 OR c = 2",
            {
                "SELECT a FROM t WHERE b = 1 AND c = 2",
                "SELECT a FROM t WHERE b = 1",
                "SELECT a FROM t WHERE c = 2",
                "SELECT a FROM t",
            },
        ),
        (
            "SELECT a FROM t WHERE b > (SELECT AVG(b) FROM t)",
            {
                "SELECT a FROM t WHERE b < (SELECT AVG(b) FROM t)",
                "SELECT a FROM t WHERE b > (SELECT SUM(b) FROM t)",
                "SELECT a FROM t",
            },
        ),
    ],
)
def test_neighbours_are_the_obvious_mistakes(query, wrong):
    gold = tree(query)
    assert {re_read(sql(neighbour)) for _, neighbour in neighbours(gold)} == {re_read(text) for text in wrong}
    assert re_read(sql(gold)) == re_read(query)  # the gold itself is left as it was


def re_read(text: str) -> str:
    """One spelling for one query: ASC said or unsaid."""
    return sql(tree(text)).replace(" ASC", "")


def test_text_is_written_as_in_spider():
    query = "SELECT a FROM t WHERE b != 'x' AND c IS NOT NULL AND id NOT IN (SELECT t_id FROM s)"
    assert sql(tree(query)) == query
