"""When are two results the same? One definition, used wherever two results are compared strictly.

Rows are a multiset: duplicates count. The number of columns and their order must agree; names do not matter, also for
no rows. Cells: NULL equals NULL and nothing else; 1 = 1.0 and -0.0 = 0.0, but '1' is not 1, and a blob is not a text;
NaN (which SQLite never returns) equals NaN. Numbers with a fractional part may differ by RTOL, because a sum has no
order in SQL: two numbers are the same if steps of at most RTOL, between neighbouring values of both results, lead from
one to the other. Two whole numbers are compared exactly whatever their type, so that large ids stored as REAL stay
apart. RTOL is 1e-11: a thousand times the rounding of a sum over ten million rows, and 2 seconds of a Julian day
number. A sum that cancels to nearly 0 has no such bound and is compared as it is.
"""

import math
from collections import Counter
from collections.abc import Sequence

RTOL = 1e-11


def aligned(first: list[tuple], second: list[tuple]) -> tuple[list[tuple], list[tuple]]:
    """Both results with cells rewritten so that `==` on cells means "the same" as defined above."""
    if first == second or Counter(first) == Counter(second):
        return first, second
    numbers = {cell for row in first for cell in row if type(cell) is float}
    numbers |= {cell for row in second for cell in row if type(cell) is float}
    if all(number.is_integer() for number in numbers):
        return first, second
    numbers |= {cell for rows in (first, second) for row in rows for cell in row if type(cell) is int}
    same = _representatives(numbers)

    def rewrite(rows: list[tuple]) -> list[tuple]:
        return [tuple(same.get(cell, cell) if type(cell) in (int, float) else cell for cell in row) for row in rows]

    return rewrite(first), rewrite(second)


def same_rows(first: list[tuple], second: list[tuple]) -> bool:
    """Whether two aligned results hold the same rows equally often."""
    return len(first) == len(second) and (first == second or Counter(first) == Counter(second))


def same_order(first: list[tuple], second: list[tuple], blocks: Sequence[int]) -> bool:
    """Whether two aligned results agree block by block; blocks: lengths of the runs of rows that tie, in order."""
    start = 0
    for length in blocks:
        if not same_rows(first[start : start + length], second[start : start + length]):
            return False
        start += length
    return start == len(first) == len(second)


def _representatives(numbers: set) -> dict:
    """{number: the smallest number of its chain}, for the numbers that are not their own representative, and NaN."""
    same, previous = {}, None
    for number in sorted(number for number in numbers if number == number):
        if previous is not None and _near(previous, number):
            same[number] = same.get(previous, previous)
        previous = number
    same |= {number: "NaN" for number in numbers if number != number}
    return same


def _near(low: float, high: float) -> bool:
    if (float(low).is_integer() and float(high).is_integer()) or math.isinf(low) or math.isinf(high):
        return False
    return high - low <= RTOL * max(abs(low), abs(high))
