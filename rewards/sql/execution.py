"""Does the query run, and does it return what gold returns? Decided by running both on the row's own database file.

Reasons: match, wrong_rows, wrong_order, wrong_columns, no_sql, or the sandbox's code for a query that did not run.
What "the same" means is in compare.py, what order means in ties.py. Two empty results are the same; an error is not a
result. Gold that does not run raises BrokenRow; gold (or the query for its ties) stopped by the wall clock, and a file
that cannot be opened, judge nobody (FAILED). Gold and prediction have the same budget. Results are cached per (file
stamp, text), bounded in bytes: a group asks for its gold G times and repeats itself late in training. What the
clock stopped is not cached.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from rewards.sandbox.sqlite import DatabaseUnavailable, QueryError, Result, execute, file_stamp
from rewards.score import FAILED, BrokenRow, Score
from rewards.sql.compare import aligned, same_order, same_rows
from rewards.sql.extract import extract_sql
from rewards.sql.ties import orders_rows, tie_blocks

CACHE_BYTES = 64 * 2**20  # per process
CELL_BYTES = 64  # what a cell costs in Python beside its text


@dataclass(slots=True)
class _Results:
    """Least recently used outcomes (a Result or a QueryError) with a bound on their estimated bytes."""

    limit: int
    used: int = 0
    entries: OrderedDict = field(default_factory=OrderedDict)

    def get(self, key: tuple):
        if key not in self.entries:
            return None
        self.entries.move_to_end(key)
        return self.entries[key][0]

    def put(self, key: tuple, outcome: Result | QueryError) -> None:
        rows = outcome.rows if isinstance(outcome, Result) else []
        size = 512 + sum(
            CELL_BYTES + (len(cell) if isinstance(cell, (str, bytes)) else 0) for row in rows for cell in row
        )
        if size > self.limit // 8:
            return  # one huge result must not push out everybody's gold
        self.entries[key] = outcome, size
        self.used += size
        while self.used > self.limit:
            self.used -= self.entries.popitem(last=False)[1][1]


_RESULTS = _Results(CACHE_BYTES)
_BLOCKS: OrderedDict[tuple, list[int]] = OrderedDict()  # tie blocks of the last golds


def result_of(database: str, sql: str) -> Result:
    """`execute` with default limits, through the cache. Raises QueryError and DatabaseUnavailable as it does."""
    key = (*file_stamp(database), sql)
    outcome = _RESULTS.get(key)
    if outcome is None:
        try:
            outcome = execute(database, sql)
        except QueryError as error:
            outcome = error
        if not (isinstance(outcome, QueryError) and outcome.by_clock):
            _RESULTS.put(key, outcome)
    if isinstance(outcome, QueryError):
        raise QueryError(outcome.reason, outcome.detail, outcome.by_clock)
    return outcome


def gold_result(database: str, sql: str) -> Result | Score:
    """Gold's result, or the FAILED score that stands for everybody in the group. Raises BrokenRow if gold is wrong."""
    try:
        return result_of(database, sql)
    except DatabaseUnavailable as error:
        return Score(FAILED, "database_unavailable", str(error))
    except QueryError as error:
        if error.by_clock:
            return Score(FAILED, "gold_timeout", error.detail, repeatable=False)
        raise BrokenRow(f"gold does not run on {database}: {error}; sql: {sql}") from error


def did_not_run(error: QueryError) -> Score:
    """The score of a prediction that did not run; one that the clock stopped might run another time."""
    return Score(0.0, error.reason, error.detail, repeatable=not error.by_clock)


def execution_match(completion: str, *, sql: str, database: str) -> Score:
    """1 if the completion's query returns gold's rows (in gold's order where gold orders), else 0."""
    return judged(completion, sql, database)[0]


def judged(completion: str, sql: str, database: str) -> tuple[Score, Result | None]:
    """The score of `execution_match`, and what the completion's query returned; None if it returned nothing."""
    gold = gold_result(database, sql)
    if isinstance(gold, Score):
        return gold, None
    predicted = extract_sql(completion)
    if predicted is None:
        return Score(0.0, "no_sql"), None
    try:
        found = result_of(database, predicted)
    except QueryError as error:
        return did_not_run(error), None
    except DatabaseUnavailable as error:
        return Score(FAILED, "database_unavailable", str(error)), None
    return _compared(found, gold, sql, database), found


def _compared(found: Result, gold: Result, sql: str, database: str) -> Score:
    if len(found.columns) != len(gold.columns):
        return Score(0.0, "wrong_columns", f"{len(found.columns)} columns, gold has {len(gold.columns)}")
    ours, theirs = aligned(found.rows, gold.rows)
    if not same_rows(ours, theirs):
        return Score(0.0, "wrong_rows", f"{len(ours)} rows, gold has {len(theirs)}")
    try:
        right = ours == theirs or not orders_rows(sql) or same_order(ours, theirs, _tie_blocks(database, sql, gold))
    except QueryError as error:
        return Score(FAILED, "gold_timeout", error.detail, repeatable=False)
    return Score(1.0, "match") if right else Score(0.0, "wrong_order")


def executes(completion: str, *, database: str) -> Score:
    """1 if the completion's query runs to its end within the limits, else 0 with the reason."""
    predicted = extract_sql(completion)
    if predicted is None:
        return Score(0.0, "no_sql")
    try:
        result_of(database, predicted)
    except QueryError as error:
        return did_not_run(error)
    except DatabaseUnavailable as error:
        return Score(FAILED, "database_unavailable", str(error))
    return Score(1.0)


def _tie_blocks(database: str, sql: str, gold: Result) -> list[int]:
    key = (*file_stamp(database), sql)
    if key not in _BLOCKS:
        _BLOCKS[key] = tie_blocks(database, sql, gold)
        if len(_BLOCKS) > 1024:
            _BLOCKS.popitem(last=False)
    return _BLOCKS[key]
