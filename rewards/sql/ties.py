"""Does gold order its rows, and which of them tie?

Gold orders exactly when its top-level query has an ORDER BY (in the parsed tree; a literal or a subquery does not
count). Tie rule: rows whose ORDER BY keys tie may come in either order, all others may not. SQLite itself says which
rows tie: gold is run again with DENSE_RANK() OVER (the same keys), so that collations and NULLs are judged by the
engine. The answer is used only if it explains gold's own rows (same rows, same order up to ties); else (DISTINCT
ordered by something not selected, a LIMIT that cuts through a tie, keys that cannot be rewritten) the rule is strict:
exactly gold's order. Strict can deny credit to a right query but never gives it to a wrong one. Which rows a LIMIT
keeps at a tie is not judged here: such gold is undetermined and belongs to the linter of the data.
"""

from itertools import groupby

from rewards.sandbox.sqlite import QueryError, Result, execute
from rewards.sql.compare import same_order
from rewards.sql.parse import parse
from rewards.sql.tokens import top_level


def orders_rows(sql: str) -> bool:
    """Whether the statement's top-level query has an ORDER BY."""
    if "order" not in sql.lower():
        return False
    tree = parse(sql)
    return "order" in top_level(sql) if tree is None else tree.args.get("order") is not None


def tie_blocks(database: str, sql: str, gold: Result) -> list[int]:
    """Lengths of the runs of gold rows that tie, in order; a run of one for every row where they cannot be known.

    Raises QueryError if the wall clock stopped the query that would say so: another time they may be known.
    """
    strict = [1] * len(gold.rows)
    query = rank_query(sql, gold.columns)
    if query is None:
        return strict
    try:
        ranked = execute(database, query).rows
    except QueryError as error:
        if error.by_clock:
            raise
        return strict
    blocks = [len(list(run)) for _, run in groupby(row[-1] for row in ranked)]
    return blocks if same_order([row[:-1] for row in ranked], gold.rows, blocks) else strict


def rank_query(sql: str, columns: list[str]) -> str | None:
    """Gold with one more column, the dense rank of its ORDER BY keys; None if it cannot be written.

    columns: the names of gold's result. Keys that are columns of the result rank around the query, which is right for
    DISTINCT and set operations too; other keys can only be ranked inside a plain SELECT.
    """
    tree = parse(sql)
    if tree is None or tree.args.get("order") is None:
        return None
    from sqlglot import exp

    tree = tree.copy()
    keys = tree.args["order"].expressions
    positions = [_position(key.this, tree, columns, exp) for key in keys]
    if None not in positions:
        names = [f"c{i}" for i in range(len(columns))]
        outer = {name: tree.args[name].sql("sqlite") for name in ("limit", "offset") if tree.args.get(name)}
        for key, position in zip(keys, positions, strict=True):
            key.this.replace(exp.column(names[position]))
        over = ", ".join(key.sql("sqlite") for key in keys)
        for name in ("order", "limit", "offset"):
            tree.set(name, None)
        listed = ", ".join(names)
        return (
            f"WITH gold_rows({listed}) AS ({tree.sql('sqlite')}) SELECT {listed}, DENSE_RANK() OVER (ORDER BY {over}) "
            f"AS tie_rank FROM gold_rows ORDER BY tie_rank {outer.get('limit', '')} {outer.get('offset', '')}"
        )
    if not isinstance(tree, exp.Select) or tree.args.get("distinct"):
        return None
    ranked = [key.copy() for key in keys]
    for key, position in zip(ranked, positions, strict=True):
        if position is not None:
            if len(tree.expressions) != len(columns):
                return None  # a star: the position has no expression
            key.this.replace(tree.expressions[position].unalias().copy())
    over = ", ".join(key.sql("sqlite") for key in ranked)
    return tree.select(f"DENSE_RANK() OVER (ORDER BY {over}) AS tie_rank", dialect="sqlite", copy=False).sql("sqlite")


def _position(key, tree, columns: list[str], exp) -> int | None:
    """Which column of the result an ORDER BY key is: an ordinal, an alias, or the same expression; None if none."""
    if isinstance(key, exp.Literal) and not key.is_string:
        number = int(key.this) if key.this.isdigit() else 0
        return number - 1 if 1 <= number <= len(columns) else None
    selects = tree.selects
    if isinstance(key, exp.Column) and not key.table:
        named = [i for i, name in enumerate(columns) if name.lower() == key.name.lower()]
        aliased = [i for i in named if len(selects) == len(columns) and isinstance(selects[i], exp.Alias)]
        if len(named) == 1 or len(aliased) == 1:
            return (aliased or named)[0]
    if len(selects) == len(columns):
        same = [i for i, select in enumerate(selects) if select.unalias() == key]
        return same[0] if same else None
    return None
