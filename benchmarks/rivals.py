"""What the scoring benchmark measures against, each written here as plainly as its design allows; no torch.

`execution_match_uncached`   this repository's reward without its result cache
`fork_per_pair`              a child process for every pair of gold and prediction
`test_suite_match`           the operations of the public test-suite script of Spider, in its order

Operations of the public script (exec_eval.py and remove_distinct of taoyds/test-suite-sql-eval, read for this list) that
`test_suite_match` does, for one pair and the folder of databases it is judged on:
  1. in prediction and gold: "value" becomes "1" (prediction only), "> =", "< =", "! =" are joined;
  2. in both: the whole text is split into tokens and joined again without DISTINCT;
  3. the folder is listed; every .sqlite file in it is one test;
  4. for each file, gold and then the prediction: a new event loop, a timed task in it, YEAR(CURDATE()) replaced by a
     regular expression, a new connection with a lenient text decoder, execute, fetchall, close;
  5. results: lengths and widths; each row sorted by text and type, the rows as a set (as a list if gold says ORDER BY);
     the values of each gold column as a set; candidates for each column, for more than three columns thinned by 20 random
     rows; the product of the candidates until one permuted result is equal: list, or set and then counts;
  6. the first file that tells the two apart ends it.
Different here: step 2 walks sqlglot's tokens, because sqlparse is not among the dependencies. That walk is faster, so this
baseline is faster than the script, not slower. Left out: plugging gold's values into the prediction, off by default.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import random
import re
import select
import sqlite3
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from sqlglot.dialects.sqlite import SQLite
from sqlglot.tokens import TokenType

from rewards.score import Score
from rewards.sql import execution

Pair = tuple[str, str, str]  # prediction, gold, path of the database


def execution_match_uncached(completion: str, *, sql: str, database: str) -> Score:
    """`execution_match` with a result cache that holds nothing: gold and completion both run. Connections persist."""
    kept = execution._RESULTS
    execution._RESULTS = execution._Results(limit=0)
    execution._BLOCKS.clear()
    try:
        return execution.execution_match(completion, sql=sql, database=database)
    finally:
        execution._RESULTS = kept


def execution_match_undeduplicated(completion: str, *, sql: str, database: str, turn: int) -> Score:
    """The same; `turn` differs between equal completions, so that a scorer does not take them for one call."""
    return execution_match_uncached(completion, sql=sql, database=database)


# -- a fork for every pair ---------------------------------------------------------------------------------------------


def fork_per_pair(pairs: Sequence[Pair], children: int = 2) -> list[float]:
    """Values of `execution_match`, each pair in a child of its own, `children` at a time.

    Without the time limit that is the reason for such a design: nothing here runs long.
    """
    values = [math.nan] * len(pairs)
    running: dict[int, tuple[int, int]] = {}  # descriptor of the answer: child, place

    def reap() -> None:
        for reader in select.select(list(running), [], [])[0]:
            child, place = running.pop(reader)
            values[place] = float(os.read(reader, 64) or math.nan)
            os.close(reader)
            os.waitpid(child, 0)

    for place, (prediction, gold, database) in enumerate(pairs):
        if len(running) == children:
            reap()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                score = execution.execution_match(prediction, sql=gold, database=database)
                os.write(writer, str(score.value).encode())
            finally:
                os._exit(0)
        os.close(writer)
        running[reader] = child, place
    while running:
        reap()
    return values


# -- the public test-suite script's operations -------------------------------------------------------------------------

TIMEOUT_S = 60
SAMPLED_ROWS = 20
CURRENT_YEAR = r"YEAR\s*\(\s*CURDATE\s*\(\s*\)\s*\)\s*"
_tokenizer = SQLite.Tokenizer()


def test_suite_match(prediction: str, gold: str, database: str) -> float:
    """1.0 if prediction and gold agree on every .sqlite file beside `database`, else 0.0. Raises ValueError if gold fails."""
    prediction, gold = (_without_distinct(_joined(sql)) for sql in (prediction.replace("value", "1"), gold))
    ordered = "order by" in gold.lower()
    folder = os.path.dirname(database)
    for name in os.listdir(folder):
        if ".sqlite" not in name:
            continue
        path = os.path.join(folder, name)
        expected, found = _run(path, gold), _run(path, prediction)
        if isinstance(expected, Exception):
            raise ValueError(f"gold does not run on {path}: {expected}")
        if isinstance(found, Exception) or not _same_denotation(expected, found, ordered):
            return 0.0
    return 1.0


def _joined(sql: str) -> str:
    for apart in ("> =", "< =", "! ="):
        sql = sql.replace(apart, apart.replace(" ", ""))
    return sql


def _without_distinct(sql: str) -> str:
    pieces, end = [], 0
    for token in _tokenizer.tokenize(sql):
        pieces.append(sql[end : token.start if token.token_type == TokenType.DISTINCT else token.end + 1])
        end = token.end + 1
    return "".join([*pieces, sql[end:]])


def _run(path: str, sql: str) -> list[tuple] | Exception:
    async def timed() -> list[tuple] | Exception:
        return await asyncio.wait_for(_fetch(path, sql), TIMEOUT_S)

    return asyncio.run(timed())


async def _fetch(path: str, sql: str) -> list[tuple] | Exception:
    sql = re.sub(CURRENT_YEAR, "2020", sql, flags=re.IGNORECASE)
    if not os.path.exists(path):
        raise FileNotFoundError(path)
    connection = sqlite3.connect(path)
    connection.text_factory = lambda raw: raw.decode(errors="ignore")
    cursor = connection.cursor()
    try:
        return cursor.execute(sql).fetchall()
    except sqlite3.Error as error:
        return error
    finally:
        cursor.close()
        connection.close()


def _same_denotation(expected: list[tuple], found: list[tuple], ordered: bool) -> bool:
    if not expected and not found:
        return True
    if len(expected) != len(found) or len(expected[0]) != len(found[0]):
        return False
    loose, loosely_found = ([tuple(sorted(row, key=_text_and_type)) for row in rows] for rows in (expected, found))
    if (loose != loosely_found) if ordered else (set(loose) != set(loosely_found)):
        return False
    for columns in itertools.product(*_candidates(expected, found)):
        if len(set(columns)) < len(columns):
            continue
        turned = found if len(columns) == 1 else [tuple([row[at] for at in columns]) for row in found]
        if ordered:
            if expected == turned:
                return True
        elif set(expected) == set(turned) and _as_often(expected, turned):
            return True
    return False


def _as_often(first: list[tuple], second: list[tuple]) -> bool:
    counts = defaultdict(int)
    for row in first:
        counts[row] += 1
    for row in second:
        counts[row] -= 1
        if counts[row] < 0:
            return False
    return True


def _text_and_type(cell: object) -> str:
    return str(cell) + str(type(cell))


def _candidates(expected: list[tuple], found: list[tuple]) -> list[set[int]]:
    """For each column of the expected rows, the columns of the found ones that may stand for it."""
    width = len(expected[0])
    values = [{row[at] for row in expected} for at in range(width)]
    candidates = [set(range(width)) for _ in range(width)]
    for _ in range(SAMPLED_ROWS if width > 3 else 0):
        row = random.choice(found)
        for at, places in enumerate(candidates):
            places -= {place for place in places if row[place] not in values[at]}
    return candidates


# -- databases to measure on -------------------------------------------------------------------------------------------


def grow(source: Path, target: Path, rows: int, seed: int) -> None:
    """Writes a database with the tables of `source` and `rows` rows in all, in the shares of its tables.

    Keys are counted or point to any parent row; every other cell is one of its column's.
    """
    draw = random.Random(seed)
    with sqlite3.connect(source) as small, sqlite3.connect(target) as large:
        tables = dict(small.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'"))
        contents = {name: small.execute(f"SELECT * FROM {name}").fetchall() for name in tables}
        total = sum(map(len, contents.values()))
        counts = {name: max(1, round(rows * len(content) / total)) for name, content in contents.items()}
        for name, create in tables.items():
            large.execute(create)
            parents = {child: parent for _, _, parent, child, *_ in small.execute(f"PRAGMA foreign_key_list({name})")}
            keys = [column for _, column, *_ in small.execute(f"PRAGMA table_info({name})")]
            cells = []
            for column, pool in zip(keys, zip(*contents[name], strict=True), strict=True):
                if column in parents:
                    pool = range(1, counts[parents[column]] + 1)
                ids = range(1, counts[name] + 1)
                cells.append(ids if column == "id" else draw.choices(pool, k=counts[name]))
            large.executemany(f"INSERT INTO {name} VALUES ({', '.join('?' * len(keys))})", zip(*cells, strict=True))
    small.close()
    large.close()
