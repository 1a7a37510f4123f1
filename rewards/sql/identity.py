"""Which completions of a group give the same answer: a number that says *which* result a query returned, not how good it is.

For a component of weight 0 by which answers are told apart (recipe seed_grpo reads one called `answer`). Neither the
value nor its mean says anything.

Two results are the same as in compare.py where that has a normal form: rows as a multiset, in order only where gold's
top-level query orders; columns counted and in order, names free; NULL, text and blob apart; 1 = 1.0 exactly. Stricter:
numbers with a fractional part are rounded to DIGITS significant digits, so that two closer than RTOL still differ when
a rounding step lies between them; and where gold orders, rows that tie in gold count in the order they came. Neither
splits the right answers: what execution_match accepts has the value 1.
"""

import hashlib

from rewards.sandbox.sqlite import Result
from rewards.score import Score
from rewards.sql.execution import judged
from rewards.sql.ties import orders_rows

DIGITS = 12  # numbers rounded to one number are nearer to each other than compare.RTOL, 1e-11
STEPS = 2**24  # the values that float32 tells apart in [0, 1]


def result_identity(completion: str, *, sql: str, database: str) -> Score:
    """Equal for completions whose queries return the same result, else different; 1 is gold's result.

    A multiple of 2^-24 in (0, 1], exact in float32. None for a query that does not run, so that all of these are one
    answer. Two different wrong results share a value with probability 2^-24. FAILED and BrokenRow as execution_match.
    """
    score, found = judged(completion, sql, database)
    if score.failed or score.value == 1.0:
        return score
    if found is None:
        return Score(None, score.reason, score.detail, score.repeatable)
    digest = hashlib.sha256(normal_form(found, orders_rows(sql)).encode()).digest()
    return Score((1 + int.from_bytes(digest[:8]) % (STEPS - 1)) / STEPS, score.reason)


def normal_form(result: Result, ordered: bool) -> str:
    """ASCII text, the same for the same result; see above. ordered: the order of rows counts."""
    rows = [ascii([_normal(cell) for cell in row]) for row in result.rows]
    return "\n".join([str(len(result.columns)), *(rows if ordered else sorted(rows))])


def _normal(cell: object) -> object:
    """A whole number as int, whatever its type; other numbers rounded; the rest as it is."""
    if type(cell) is not float:
        return cell
    rounded = cell if cell.is_integer() else float(f"{cell:.{DIGITS - 1}e}")
    return int(rounded) if rounded.is_integer() else rounded
