import pytest

from rewards.sql import structure_match
from rewards.sql.structure import structure_match_if_wrong

GOLD = (
    "SELECT T1.name, count(*) FROM singer AS T1 JOIN concert AS T2 ON T1.id = T2.singer_id "
    "WHERE T1.age > 20 AND T2.year = 2014 GROUP BY T1.id ORDER BY count(*) DESC LIMIT 3"
)


def value(completion: str, gold: str, database: str) -> float | None:
    return structure_match(completion, sql=gold, database=database).value


@pytest.mark.parametrize(
    "same",
    [
        GOLD.lower(),
        GOLD.replace("T1", "a").replace("T2", "b"),
        GOLD.replace("T1.age > 20 AND T2.year = 2014", "(T2.year = 2014) AND ((20 < T1.age))"),
        GOLD.replace("T1.id = T2.singer_id", "T2.singer_id = T1.id"),
        GOLD.replace(
            "JOIN concert AS T2 ON T1.id = T2.singer_id WHERE", ", concert AS T2 WHERE T1.id = T2.singer_id AND"
        ),
        GOLD.replace("count(*) FROM", "count(*) AS n FROM").replace("ORDER BY count(*)", "ORDER BY n"),
        GOLD.replace("ORDER BY count(*)", "ORDER BY 2"),
        GOLD.replace("> 20", "> 20.0") + " -- comment",
    ],
)
def test_spelling_does_not_matter(database, same):
    assert value(same, GOLD, database) == 1.0


@pytest.mark.parametrize(
    ("change", "items"),
    [
        (("T2.singer_id", "T2.id"), ["joins"]),
        (("JOIN concert", "LEFT JOIN concert"), ["joins"]),
        (("> 20", ">= 20"), ["filters"]),
        (("20 AND", "20 OR"), ["filters"]),
        (("GROUP BY T1.id", "GROUP BY T1.name"), ["aggregation"]),
        (("GROUP BY T1.id", "GROUP BY T1.id HAVING count(*) > 1"), ["aggregation"]),
        (("DESC", "ASC"), ["projection"]),
        (("LIMIT 3", "LIMIT 4"), ["projection"]),
        (("SELECT", "SELECT DISTINCT"), ["projection"]),
        (("T1.name,", "T1.age,"), ["projection"]),
        (("count(*) FROM", "sum(T1.age) FROM"), ["aggregation", "projection"]),
    ],
)
def test_each_change_costs_its_own_items(database, change, items):
    score = structure_match(GOLD.replace(*change), sql=GOLD, database=database)
    assert score.value == pytest.approx(1 - len(items) / 5)
    assert score.detail == "differs in " + ", ".join(items)


def test_arguments_have_an_order_and_in_lists_have_none(database):
    gold = "SELECT substr(name, 1, 2) FROM singer WHERE age IN (25, 30)"
    assert value(gold.replace("25, 30", "30, 25"), gold, database) == 1.0
    assert value(gold.replace("1, 2", "2, 1"), gold, database) == pytest.approx(0.8)


@pytest.mark.parametrize(
    "odd",
    [
        "VALUES (1), (2)",
        "WITH a AS (SELECT x FROM b), b AS (SELECT x FROM a) SELECT x FROM a",
        "WITH RECURSIVE c AS (SELECT id AS x FROM singer UNION ALL SELECT x + 1 FROM c WHERE x < 9) SELECT c.x FROM c",
        "SELECT group_concat(DISTINCT) FILTER (WHERE age > 1) FROM singer",
        "SELECT 9223372036854775808, 1e999 0 year, 1 weight",
        "SELECT a.b.c.d FROM singer",
    ],
)
def test_odd_queries_get_a_low_score_and_break_nothing(database, odd, capfd):
    assert value(odd, GOLD, database) <= 0.4
    value(GOLD, odd, database)
    assert capfd.readouterr().err == ""


def test_cte_and_subquery_are_the_same(database):
    inner = "SELECT name AS n FROM singer WHERE age > 20"
    assert value(f"WITH w AS ({inner}) SELECT n FROM w", f"SELECT x.n FROM ({inner}) AS x", database) == 1.0


def test_set_operations_and_double_quoted_text(database):
    gold = "SELECT name FROM singer UNION SELECT title FROM concert"
    assert value(gold.replace("UNION", "UNION ALL"), gold, database) == pytest.approx(0.8)
    assert value(f"{gold} ORDER BY 1", f"{gold} ORDER BY name", database) == 1.0
    assert value("SELECT count(*) FROM singer, singer", gold, database) == 0.0  # two sources of one name
    quoted = 'SELECT name FROM singer WHERE country = "Spain"'
    assert value(quoted.replace('"', "'"), quoted, database) == 1.0


def test_having_nothing_is_worth_nothing_over_the_wrong_tables(database):
    assert value("SELECT 1", "SELECT name FROM singer", database) == 0.0
    assert value("SELECT made AS made FROM singer", "SELECT name FROM singer", database) == pytest.approx(0.8)
    assert value("not sql", GOLD, database) == value("SELECT (", GOLD, database) == 0.0
    assert value(GOLD, "SELECT FROM", database) is None


def test_the_judges_slot_is_empty_for_a_correct_query(database):
    gold = "SELECT name FROM singer WHERE age > 25"
    right = structure_match_if_wrong("SELECT name FROM singer WHERE age > 26", sql=gold, database=database)
    wrong = structure_match_if_wrong("SELECT name FROM singer WHERE age > 30", sql=gold, database=database)
    assert right.value is None
    assert wrong.value == pytest.approx(0.8)
    assert structure_match_if_wrong(gold, sql=gold, database="missing").failed
