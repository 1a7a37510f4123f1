"""result_identity: equal values for equal results, by the same definition as execution_match or a stricter one."""

import random
import sqlite3

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.sandbox.sqlite import QueryError, Result
from rewards.score import BrokenRow
from rewards.sql import CANARIES, execution, result_identity
from rewards.sql.compare import aligned, same_rows
from rewards.sql.identity import normal_form

GOLD = "SELECT name FROM singer WHERE age > 99"
OLDEST = "SELECT name FROM singer ORDER BY age DESC"  # Ann and Cid tie, so do Bob and the two Eves


def value(completion: str, database: str, gold: str = GOLD):
    return result_identity(completion, sql=gold, database=database).value


def form(rows: list[tuple], ordered: bool = False, width: int = 1) -> str:
    return normal_form(Result(rows, ["x"] * (len(rows[0]) if rows else width)), ordered)


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        ("SELECT name FROM singer", "select S.NAME as who from singer as S", True),
        ("SELECT name FROM singer", "SELECT name FROM singer ORDER BY id DESC", True),
        ("SELECT name FROM singer", "SELECT DISTINCT name FROM singer", False),
        ("SELECT name, age FROM singer", "SELECT age, name FROM singer", False),
        ("SELECT age FROM singer", "SELECT CAST(age AS REAL) FROM singer", True),
        ("SELECT age FROM singer", "SELECT CAST(age AS TEXT) FROM singer", False),
        ("SELECT name FROM singer", "SELECT CAST(name AS BLOB) FROM singer", False),
        ("SELECT 0.1 + 0.2", "SELECT 0.3", True),
        ("SELECT 2.9999999999999996", "SELECT 3", True),
        ("SELECT 0.3", "SELECT 0.30000001", False),
        ("SELECT 9007199254740993", "SELECT 9007199254740992.0", False),
        ("SELECT NULL", "SELECT ''", False),
        ("SELECT NULL", "SELECT 0", False),
        ("SELECT 1, 2 WHERE 0", "SELECT 3, 4 WHERE 0", True),
        ("SELECT 1, 2 WHERE 0", "SELECT 1, 2, 3 WHERE 0", False),
        ("SELECT 'a', 'b'", "SELECT 'a'', ''b'", False),
    ],
)
def test_values_are_equal_where_results_are(database, first, second, equal):
    values = value(first, database), value(second, database)
    assert (values[0] == values[1]) is equal
    assert all(0 < v < 1 and float(np.float32(v)) == v for v in values), "not a wrong answer, or not exact in float32"


def test_order_counts_only_where_gold_orders(database):
    for gold, same in ((GOLD, True), (OLDEST, False)):
        ages = [value(f"SELECT age FROM singer ORDER BY age {way}", database, gold) for way in ("ASC", "DESC")]
        assert (ages[0] == ages[1]) is same


def test_what_execution_match_accepts_is_one_answer_with_the_value_1(database):
    """Also where rows that tie come in another order, and where rounding to digits would part them."""
    ties = [f"SELECT name FROM singer ORDER BY age DESC, name {way}" for way in ("ASC", "DESC")]
    for completion in (*ties, OLDEST):
        assert value(completion, database, OLDEST) == 1.0
    assert form([(0.12345678901249,)]) != form([(0.12345678901251,)])
    assert value("SELECT 0.12345678901249", database, "SELECT 0.12345678901251") == 1.0


def test_what_does_not_run_does_not_apply(database):
    for completion, reason in (("SELECT nope", "unknown_name"), ("I do not know", "no_sql"), ("", "no_sql"),
                               ("DROP TABLE singer", "refused")):  # fmt: skip
        score = result_identity(completion, sql=GOLD, database=database)
        assert (score.value, score.reason) == (None, reason)


def test_what_the_clock_stopped_is_asked_again(database, monkeypatch):
    def slow(path, sql):
        raise QueryError("timeout_in_query", "slow machine", by_clock=True)

    value("SELECT 1", database)  # gold's result is kept
    monkeypatch.setattr(execution, "execute", slow)
    score = result_identity("SELECT 'never run before'", sql=GOLD, database=database)
    assert (score.value, score.repeatable) == (None, False)
    assert result_identity("SELECT 1", sql="SELECT 'slow gold'", database=database).failed


def test_a_database_that_does_not_open_judges_nobody_and_a_broken_gold_raises(tmp_path, database):
    assert result_identity("SELECT 1", sql="SELECT 1", database=str(tmp_path / "missing")).failed
    with pytest.raises(BrokenRow):
        value("SELECT 1", database, "SELECT nope FROM singer")


def test_a_query_runs_once(database, monkeypatch):
    ran = []
    real = execution.execute
    monkeypatch.setattr(execution, "_RESULTS", execution._Results(limit=0))  # as for a result too large to keep
    monkeypatch.setattr(execution, "execute", lambda path, sql: ran.append(sql) or real(path, sql))
    value("SELECT 21", database, "SELECT 20")
    assert sorted(ran) == ["SELECT 20", "SELECT 21"]


@pytest.mark.parametrize("canary", [c for c in CANARIES if c.component == "execution_match"], ids=lambda c: c.name)
def test_only_gold_has_the_value_of_gold(database, canary):
    row = {"sql": "SELECT name FROM singer", "question": "Who sings?", "template": "plain"}
    found = value(canary.completion(row), database, row["sql"])
    assert (found == 1.0) is (canary.name == "gold")
    assert found is None or 0 < found <= 1


cells = st.one_of(
    st.none(), st.integers(-3, 3), st.sampled_from("ab1"), st.sampled_from([b"a", b"1"]),
    st.builds(lambda base, steps: base * (1 + steps * 3e-12), st.sampled_from([0.3, 1.0, 2.5, 1e15]), st.integers(-4, 4)),
)  # fmt: skip
results = st.lists(st.tuples(cells, cells), min_size=1, max_size=4)


@settings(max_examples=400, deadline=None)
@given(results, st.randoms(use_true_random=False), st.lists(st.integers(-4, 4), min_size=8, max_size=8))
def test_one_normal_form_means_the_same_result(rows, shuffle, steps):
    """Never coarser than compare.py; and no stricter where no number has a fractional part."""
    moved = [tuple(c * (1 + next(step) * 1e-12) if type(c) is float else c for c in row)
             for step in [iter(steps)] for row in rows]  # fmt: skip
    shuffle.shuffle(moved)
    same, equal = same_rows(*aligned(rows, moved)), form(rows) == form(moved)
    assert same or not equal
    if all(type(c) is not float or c.is_integer() for row in rows + moved for c in row):
        assert same == equal


def test_values_spread_over_the_unit_interval(tmp_path):
    path = str(tmp_path / "d.sqlite")
    sqlite3.connect(path).close()
    values = [value(f"SELECT {i}", path, "SELECT 'gold'") for i in range(500)]
    assert len(set(values)) == 500
    assert np.mean(values) == pytest.approx(0.5, abs=0.06)  # 4.6 standard errors


def test_rows_in_any_order_have_one_normal_form():
    rows = [(i % 7, None, str(i)) for i in range(50)]
    moved = random.Random(0).sample(rows, len(rows))
    assert form(rows) == form(moved)
    assert form(rows, ordered=True) != form(moved, ordered=True)
