import itertools
import random
import sqlite3
import time
from collections import Counter

import pytest

from rewards.score import BrokenRow
from rewards.sql import spider_execution
from rewards.sql.official import equal_up_to_columns


def value(completion: str, gold: str, database: str) -> float:
    return spider_execution(completion, sql=gold, database=database).value


@pytest.mark.parametrize(
    ("completion", "gold", "expected"),
    [
        ("SELECT age, name FROM singer", "SELECT name, age FROM singer", 1.0),
        ("SELECT count(country) FROM singer", "SELECT count(DISTINCT country) FROM singer", 1.0),
        ("SELECT DISTINCT name FROM singer", "SELECT name FROM singer", 1.0),
        ("SELECT name FROM singer WHERE age > = 30", "SELECT name FROM singer WHERE age >= 30", 1.0),
        ("SELECT name FROM singer ORDER BY id DESC", "SELECT name FROM singer", 1.0),
        ("SELECT name FROM singer ORDER BY id DESC", "SELECT name FROM singer ORDER BY id", 0.0),
        ("SELECT 'order by', name FROM singer ORDER BY id DESC", "SELECT 'order by', name FROM singer", 0.0),
        ("SELECT 1, 2 WHERE 0", "SELECT name FROM singer WHERE 0", 1.0),
        ("DELETE FROM singer", "SELECT name FROM singer WHERE 0", 0.0),
        ("SELECT 'value'", "SELECT 'value'", 0.0),
        ("SELECT '1'", "SELECT '1'", 1.0),
        ("SELECT YEAR(CURDATE()) + 0", "SELECT 2020 + 0", 1.0),
        ("no query", "SELECT name FROM singer WHERE 0", 0.0),
        ("SELECT nope", "SELECT name FROM singer", 0.0),
    ],
)
def test_semantics_of_the_script_holes_included(database, completion, gold, expected):
    assert value(completion, gold, database) == expected


def test_every_database_of_the_folder_is_a_test(tmp_path):
    for name, x in (("a", 1), ("b", 2)):
        connection = sqlite3.connect(tmp_path / f"{name}.sqlite")
        connection.executescript(f"CREATE TABLE t(x); INSERT INTO t VALUES ({x});")
        connection.close()
    first = str(tmp_path / "a.sqlite")
    assert value("SELECT x FROM t", "SELECT x FROM t", first) == 1.0
    assert value("SELECT 1", "SELECT x FROM t", first) == 0.0


def test_failing_gold_raises(database):
    with pytest.raises(BrokenRow):
        value("SELECT 1", "SELECT nope", database)


def brute(first, second, ordered):
    if len(first) != len(second) or len(first[0]) != len(second[0]):
        return False
    for order in itertools.permutations(range(len(first[0]))):
        permuted = [tuple(row[i] for i in order) for row in second]
        if (permuted == first) if ordered else (Counter(permuted) == Counter(first)):
            return True
    return False


def test_column_search_agrees_with_all_permutations():
    generator = random.Random(0)
    outcomes = Counter()
    for _ in range(600):
        rows, columns = generator.randint(1, 4), generator.randint(1, 4)
        first = [tuple(generator.randint(0, 1) for _ in range(columns)) for _ in range(rows)]
        order = generator.sample(range(columns), columns)
        second = [tuple(row[i] for i in order) for row in generator.sample(first, rows)]
        if generator.random() < 0.5:
            i = generator.randrange(rows)
            second[i] = second[i][::-1]
        elif generator.random() < 0.5:  # same columns, another joint distribution
            second = list(zip(*(generator.sample(column, rows) for column in zip(*second, strict=True)), strict=True))
        for ordered in (True, False):
            expected = brute(first, second, ordered)
            assert equal_up_to_columns(first, second, ordered) is expected
            outcomes[ordered, expected] += 1
    assert min(outcomes.values()) > 50


def test_many_equal_columns_are_quick_and_hopeless_searches_stop():
    started = time.process_time()
    assert equal_up_to_columns([(1,) * 50] * 20, [(1,) * 50] * 20, False)
    assert (
        equal_up_to_columns([(0,) * 20 + (1,), (1,) * 20 + (0,)], [(0,) * 19 + (1, 1), (1,) * 19 + (0, 0)], False)
        is False
    )
    identity = [tuple(int(i == j) for j in range(26)) for i in range(26)]
    assert equal_up_to_columns(identity, identity[::-1], False)
    generator = random.Random(1)
    first = [
        [*half, *(1 - bit for bit in half)]
        for half in ([generator.randint(0, 1) for _ in range(26)] for _ in range(26))
    ]
    for rows in (first, list(zip(*first, strict=True))):
        second = [generator.sample(list(row), len(row)) for row in rows]
        assert equal_up_to_columns([*map(tuple, rows)], [*map(tuple, second)], False) in (False, None)
    assert time.process_time() - started < 2
