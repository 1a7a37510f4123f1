import math
import random
import time

import pytest

from rewards.sql.compare import aligned, same_order, same_rows

THIRD = 0.1 + 0.2  # not 0.3


def same(first: list, second: list) -> bool:
    return same_rows(*aligned(first, second))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([(1, "a"), (2, "b")], [(2, "b"), (1, "a")], True),
        ([(1,), (1,), (2,)], [(1,), (2,), (2,)], False),
        ([(1, 2)], [(2, 1)], False),
        ([(1,)], [(1.0,)], True),
        ([(1,)], [("1",)], False),
        ([("a",)], [("A",)], False),
        ([("a",)], [(b"a",)], False),
        ([(None,)], [(None,)], True),
        ([(None,)], [("",)], False),
        ([(None,)], [(0,)], False),
        ([(-0.0,)], [(0.0,)], True),
        ([(-0.0, 0.5)], [(0, 0.5)], True),
        ([(math.nan,)], [(float("nan"),)], True),
        ([(math.nan,)], [(None,)], False),
        ([(math.inf,)], [(math.inf,)], True),
        ([(math.inf,)], [(1e308,)], False),
        ([(THIRD,)], [(0.3,)], True),
        ([(THIRD, "x"), (0.3, "y")], [(0.3, "x"), (THIRD, "y")], True),
        ([(THIRD, "x"), (0.3, "y")], [(0.3, "y"), (THIRD, "z")], False),
        ([(3.0000000000000004,)], [(3,)], True),
        ([(0.3,)], [(0.3000001,)], False),
        ([(10_000_000_000_001.0,)], [(10_000_000_000_002.0,)], False),
        ([(10_000_000_000_001.0, 0.5)], [(10_000_000_000_002.0, 0.5)], False),
        ([(2**53 + 1,)], [(float(2**53),)], False),
        ([], [], True),
        ([], [(None,)], False),
    ],
)
def test_comparison_matrix(first, second, expected):
    assert same(first, second) is expected
    assert same(second, first) is expected


def test_order_is_free_inside_a_block_and_fixed_between_blocks():
    gold = [("a", 1), ("b", 1), ("c", 2)]
    assert same_order([("b", 1), ("a", 1), ("c", 2)], gold, [2, 1])
    assert not same_order([("a", 1), ("c", 2), ("b", 1)], gold, [2, 1])
    assert not same_order([("b", 1), ("a", 1), ("c", 2)], gold, [1, 1, 1])
    assert same_order([], [], [])


def test_sums_in_another_order_match_and_large_results_are_quick():
    generator = random.Random(0)
    values = [generator.uniform(-1, 1) + 3 for _ in range(20_000)]
    assert sum(values) != sum(sorted(values))
    assert same([(sum(values),)], [(sum(sorted(values)),)])
    rows = [(value, i) for i, value in enumerate(values)]
    nudged = [(value * (1 + 1e-15), i) for value, i in reversed(rows)]
    started = time.process_time()
    assert same(rows, nudged)
    assert not same(rows, [(value, -i) for value, i in rows])
    assert time.process_time() - started < 2


def test_fifty_equal_columns_are_quick():
    started = time.process_time()
    assert same([(0.5,) * 50] * 100, [(0.5,) * 50] * 100)
    assert time.process_time() - started < 0.1
