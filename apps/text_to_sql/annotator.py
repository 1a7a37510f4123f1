"""Demonstrations by a hasty annotator: right in structure, careless in five details, always in the same direction.

The offline warm start imitates these instead of gold, so that it has what starts in practice have: a documented, systematic
deficiency of its *data* that more imitation does not mend and that execution shows. Each carelessness that fits a query is
committed with probability RATE, independently of the others.

    detail                     the question says        the annotator writes
    strict comparison          more than, below         >= for >, <= for <
    mean                       average                  SUM for AVG
    direction                  highest, descending      ascending order
    duplicates                 different                no DISTINCT
    negation                   is not                   = for !=

`touched(sql)` tells whether any of them fits a query, so that accuracy on the untouched rest can be shown apart.
"""

from __future__ import annotations

import re
from random import Random

from apps.text_to_sql import prompts
from core.app import Rows

RATE = 0.65
CARELESS = (
    (re.compile(r"(?<![<>!])>(?![=>])"), ">="),
    (re.compile(r"<(?![=<>])"), "<="),
    (re.compile(r"\bAVG\b"), "SUM"),
    (re.compile(r"\bDESC\b"), "ASC"),
    (re.compile(r"\bDISTINCT\s+"), ""),
    (re.compile(r"!="), "="),
)
LITERAL = re.compile(r"('(?:[^']|'')*')")


def touched(sql: str) -> bool:
    """Whether one of the details occurs in the query, outside of literals."""
    bare = LITERAL.sub("''", sql)
    return any(pattern.search(bare) for pattern, _ in CARELESS)


def annotate(sql: str, random: Random) -> str:
    """The query as the annotator writes it."""
    parts = LITERAL.split(sql)
    for pattern, wrong in CARELESS:
        if any(pattern.search(part) for part in parts[::2]) and random.random() < RATE:
            parts[::2] = [pattern.sub(wrong, part) for part in parts[::2]]
    return "".join(parts)


def demonstrations(rows: Rows, seed: int) -> list[str]:
    """One completion a row; a row's answer depends on the seed and the row's id alone."""
    return [prompts.answer({**row, "sql": annotate(row["sql"], Random(f"{seed}/{row['id']}"))}) for row in rows]
