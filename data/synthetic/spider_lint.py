"""Gold linter: is a question's SQL worth asking, and does its answer tell right queries from nearly right ones?

`reject` returns a reason, or None for a good gold. A gold is rejected if it
- is `empty` (or all NULL), or has more than MAX_ROWS rows;
- is `undetermined`: rows that tie in the order key differ, inside the answer or across the LIMIT, or
  the LIMIT cuts nothing;
- is `constant`: the same on all of COPIES mutated copies of the database (such a query tests nothing);
- is `like_neighbour`: it equals a nearly right query (>= for >, SUM for AVG, ascending for descending, AND for OR,
  without its DISTINCT, WHERE, HAVING or NOT, ...) on the database itself.

It covers one database at a time; two different right readings of an English question are the grammar's business.
"""

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from random import Random

from .spider_domains import Database, Table
from .spider_trees import sql

MAX_ROWS = 100
COPIES = 3


def build(path: str, database: Database) -> sqlite3.Connection:
    """Creates tables and rows at `path` (":memory:" or a file that does not exist yet); the connection stays open."""
    connection = sqlite3.connect(path)
    for table in database.tables:
        lines = [f"{c.name} {c.type}" + (" PRIMARY KEY" if c.name == "id" else "") for c in table.columns]
        lines += [f"FOREIGN KEY ({key}) REFERENCES {parent}(id)" for key, parent in table.parents.items()]
        connection.execute(f"CREATE TABLE {table.name} ({', '.join(lines)})")
        connection.executemany(f"INSERT INTO {table.name} VALUES ({', '.join('?' * len(table.columns))})", table.rows)
    connection.commit()
    return connection


def mutated(database: Database, random: Random) -> Database:
    """A copy in which a fifth of the rows are gone and a third of the cells hold another value of their column."""
    copy = Database(database.name, [])
    for table in database.tables:
        pools = [table.values(column) for column in table.columns]
        kept = sorted(random.sample(range(len(table.rows)), len(table.rows) * 4 // 5))
        rows = [
            tuple(
                random.choice(pool) if c.name != "id" and random.random() < 0.33 else value
                for c, pool, value in zip(table.columns, pools, table.rows[at], strict=True)
            )
            for at in kept
        ]
        copy.tables.append(Table(table.name, table.columns, table.parents, rows))
    return copy


class Linter:
    """Holds one database and its mutated copies in memory; close() it."""

    def __init__(self, database: Database, random: Random):
        self.original = build(":memory:", database)
        self.copies = [build(":memory:", mutated(database, random)) for _ in range(COPIES)]

    def close(self) -> None:
        for connection in (self.original, *self.copies):
            connection.close()

    def reject(self, tree) -> str | None:
        """The reason why the sqlglot tree of a gold query is no good, or None."""
        query, ordered = sql(tree), tree.args.get("order") is not None
        rows = self.original.execute(query).fetchall()
        if not rows or all(cell is None for row in rows for cell in row) or rows == [(0,)]:
            return "empty"
        if len(rows) > MAX_ROWS:
            return "too_many_rows"
        if ordered and not self._determined(tree):
            return "undetermined"
        answer = _answer(rows, ordered)
        if all(_answer(copy.execute(query).fetchall(), ordered) == answer for copy in self.copies):
            return "constant"
        for _, neighbour in neighbours(tree):
            if _answer(self.original.execute(sql(neighbour)).fetchall(), ordered) == answer:
                return "like_neighbour"
        return None

    def _determined(self, tree) -> bool:
        from sqlglot import exp

        free = tree.copy()
        limit = free.args.pop("limit", None)
        free.set("expressions", [*free.expressions, *(o.this.copy() for o in tree.args["order"].expressions)])
        rows, width = self.original.execute(sql(free)).fetchall(), len(tree.expressions)
        cut = int(limit.find(exp.Literal).name) if limit else len(rows)
        if limit and cut >= len(rows):  # the LIMIT cuts nothing
            return False
        for at in range(1, len(rows)):
            if rows[at][width:] != rows[at - 1][width:]:
                if at >= cut:
                    break
            elif rows[at][:width] != rows[at - 1][:width]:
                return False
        return True


def _answer(rows: list[tuple], ordered: bool):
    rows = [tuple(round(cell, 6) if isinstance(cell, float) else cell for cell in row) for row in rows]
    return rows if ordered else Counter(rows)


def neighbours(tree) -> Iterator[tuple[str, object]]:
    """(name of the mistake, tree) for every query that is one obvious mistake away."""
    for at, node in enumerate(tree.walk()):
        for mistake, change in _mistakes(node):
            yield mistake, _changed(tree, at, change)


def _mistakes(node) -> Iterator[tuple[str, Callable]]:
    """(name, change) of what could go wrong at one node; change takes a copy of the node and may consume it."""
    from sqlglot import exp

    kind, swap = type(node), _swaps()
    if kind in swap and not (isinstance(node, exp.Binary) and isinstance(node.expression, exp.Subquery)):
        yield f"{swap[kind].key} for {kind.key}", lambda n: swap[kind](**n.args)
    if kind in (exp.And, exp.Or, exp.Intersect, exp.Union, exp.Except):
        yield "left side only", lambda n: n.this
        if kind is not exp.Except:
            yield "right side only", lambda n: n.expression
    elif kind in (exp.GT, exp.LT) and isinstance(node.expression, exp.Subquery):
        yield "below for above", lambda n: (exp.LT if kind is exp.GT else exp.GT)(**n.args)
    elif kind is exp.Between:
        for bound in ("low", "high"):
            yield (
                f"without the {bound} bound",
                lambda n, bound=bound: exp.And(
                    this=n, expression=exp.NEQ(this=n.this.copy(), expression=n.args[bound].copy())
                ),
            )
    elif kind is exp.Ordered:
        down = bool(node.args["desc"])
        yield "other order", lambda n: exp.Ordered(this=n.this, desc=not down, nulls_first=down)
    elif kind is exp.Count and isinstance(node.this, exp.Distinct):
        yield "without distinct", lambda n: exp.Count(this=n.this.expressions[0])
    elif kind is exp.Not:
        yield "without not", lambda n: n.this
    elif kind is exp.Select:
        for clause in ("distinct", "where", "having"):
            if node.args.get(clause):
                yield f"without {clause}", lambda n, clause=clause: n.set(clause, None) or n


@cache
def _swaps() -> dict:
    from sqlglot import exp

    pairs = [(exp.GT, exp.GTE), (exp.LT, exp.LTE), (exp.Avg, exp.Sum), (exp.Min, exp.Max), (exp.And, exp.Or)]
    pairs.append((exp.Intersect, exp.Union))
    return {a: b for pair in pairs for a, b in (pair, pair[::-1])}


def _changed(tree, at: int, change):
    """A copy of the tree whose node number `at` (in walk order) was replaced by change(node)."""
    copy = tree.copy()
    node = next(n for i, n in enumerate(copy.walk()) if i == at)
    parent, key, index = node.parent, node.arg_key, node.index
    new = change(node)
    if parent is None:
        new.parent = None
        return new
    parent.set(key, new, index)
    return copy
