"""Spider's own execution accuracy: the semantics of taoyds/test-suite-sql-eval, run by our engine. A metric, not a
reward.

Known from a written account of the script, not read again in its code (grade b), and kept, holes included: rows are a
bag, up to any permutation of the columns; order matters if "order by" occurs anywhere in gold's text; DISTINCT is
removed from both queries; two empty results are equal whatever their columns; "value" in a prediction becomes 1 (so a
gold query that holds it fails against itself); "> =" becomes ">=" even in literals; YEAR(CURDATE()) becomes 2020; every
.sqlite file beside the database is one more test.
Different on purpose: only queries run (there a DELETE matches an empty gold), a timeout really stops (there it counts
as success), the search for a column permutation is complete up to a budget of NODES (there it is exponential), after
which the prediction is wrong with the reason undecided.
"""

import re
from collections import Counter
from pathlib import Path

from rewards.sandbox.sqlite import DatabaseUnavailable, QueryError
from rewards.score import FAILED, Score, reads
from rewards.sql.execution import did_not_run, gold_result, result_of
from rewards.sql.extract import extract_sql
from rewards.sql.tokens import without_word

NODES = 2000  # partial column assignments tried per result
CURRENT_YEAR = re.compile(r"YEAR\s*\(\s*CURDATE\s*\(\s*\)\s*\)\s*", re.IGNORECASE)


@reads(lambda columns: Path(columns["database"]).parent.iterdir())
def spider_execution(completion: str, *, sql: str, database: str) -> Score:
    """1 if the prediction equals gold on every database of the row's folder, else 0. Raises BrokenRow as
    gold_result.
    """
    gold_sql = _prepared(sql)
    predicted = extract_sql(completion)
    ordered = "order by" in gold_sql.lower()
    for path in sorted(str(path) for path in Path(database).parent.iterdir() if ".sqlite" in path.name):
        gold = gold_result(path, gold_sql)
        if isinstance(gold, Score):
            return gold
        if predicted is None:
            return Score(0.0, "no_sql")
        try:
            found = result_of(path, _prepared(predicted.replace("value", "1")))
        except QueryError as error:
            return did_not_run(error)
        except DatabaseUnavailable as error:
            return Score(FAILED, "database_unavailable", str(error))
        equal = equal_up_to_columns(gold.rows, found.rows, ordered)
        if not equal:
            return Score(0.0, "undecided" if equal is None else "wrong_rows")
    return Score(1.0, "match")


def equal_up_to_columns(first: list[tuple], second: list[tuple], ordered: bool) -> bool | None:
    """Whether some permutation of the second's columns makes the rows equal; None if NODES did not suffice to know.

    ordered: rows in order, then the columns need only be the same multiset of vectors. Otherwise columns are assigned
    one by one among those with the same values, and an assignment goes on only while the assigned part agrees as a bag
    of rows.
    """
    if not first and not second:
        return True
    if len(first) != len(second) or len(first[0]) != len(second[0]):
        return False
    if first == second or (not ordered and Counter(first) == Counter(second)):
        return True  # the columns stand as they are, as in most right answers
    columns, others = list(zip(*first, strict=True)), list(zip(*second, strict=True))
    if ordered:
        return Counter(columns) == Counter(others)
    bags = [frozenset(Counter(column).items()) for column in others]
    wanted = [frozenset(Counter(column).items()) for column in columns]
    if Counter(bags) != Counter(wanted):
        return False
    # Columns with the most telling values first: each then leaves the fewest ways for the next.
    turns = sorted(range(len(columns)), key=lambda i: -len(wanted[i]))
    budget = NODES

    def search(turn: int, left: frozenset, mine: list[int], theirs: list[int]) -> bool:
        """Assign the columns from `turn` on; mine, theirs: for each row the id of its assigned part."""
        nonlocal budget
        if turn == len(turns):
            return True
        tried = set()
        for other in sorted(left):
            if bags[other] != wanted[turns[turn]] or others[other] in tried:
                continue
            tried.add(others[other])  # an identical column would fail the same way
            if budget == 0:
                return False
            budget -= 1
            ids: dict = {}
            longer = [ids.setdefault(part, len(ids)) for part in zip(mine, columns[turns[turn]], strict=True)]
            also = [ids.setdefault(part, len(ids)) for part in zip(theirs, others[other], strict=True)]
            if Counter(longer) == Counter(also) and search(turn + 1, left - {other}, longer, also):
                return True
        return False

    found = search(0, frozenset(range(len(others))), [0] * len(first), [0] * len(first))
    return True if found else (None if budget == 0 else False)


def _prepared(sql: str) -> str:
    for spaced, joined in (("> =", ">="), ("< =", "<="), ("! =", "!=")):
        sql = sql.replace(spaced, joined)
    return CURRENT_YEAR.sub("2020", without_word(sql, "distinct"))
