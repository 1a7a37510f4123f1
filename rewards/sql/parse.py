"""A query as a tree whose names mean something: sqlglot's parser and scopes, the file's own tables, SQLite's own rules.

Aliases are resolved to base tables; a "double quoted" name that no table has is a text literal, as SQLite reads it
(Spider's gold relies on that). Two aliases of one table are not told apart. Hostile text is bounded before it reaches
the parser.
"""

import logging
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TypeVar

from rewards.sandbox.sqlite import Limits, read_schema
from rewards.sql.tokens import depth, tokens

T = TypeVar("T")
MAX_DEPTH = 40  # nesting of parentheses; SQLite itself gives up near 100


def sqlglot_module():
    """sqlglot, or an error that says how to get it."""
    try:
        import sqlglot
    except ImportError as error:
        raise ImportError('this reward parses SQL with sqlglot; install it with pip install ".[sql]"') from error
    # It warns about every odd query, and a policy writes thousands.
    logging.getLogger("sqlglot").setLevel(logging.ERROR)
    return sqlglot


@lru_cache(maxsize=64)  # trees are large, 1.6 MB for 8 kB of text; what is read from them is cached where it is read
def parse(sql: str):
    """The statement as a sqlglot Query (shared: do not modify), None if it is not exactly one query that parses."""
    sqlglot = sqlglot_module()
    words = tokens(sql) if len(sql) <= Limits().sql_bytes else []
    if not words or words[0] not in ("select", "with", "values") or depth(sql) > MAX_DEPTH:
        return None
    try:
        trees = sqlglot.parse(sql, read="sqlite")
    except (sqlglot.errors.SqlglotError, RecursionError):
        return None
    trees = [tree for tree in trees if tree is not None and not isinstance(tree, sqlglot.exp.Semicolon)]
    return trees[0] if len(trees) == 1 and isinstance(trees[0], sqlglot.exp.Query) else None


@lru_cache(maxsize=1024)
def columns_of(stamp: tuple) -> dict[str, tuple[str, ...]]:
    """{table: columns} of the file with this stamp (rewards.sandbox.sqlite.file_stamp), all lower case."""
    return {
        table.lower(): tuple(column.lower() for column in columns) for table, columns in read_schema(stamp[0]).items()
    }


def read_names(sql: str, stamp: tuple, read: Callable[["Names"], T]) -> T | None:
    """read(names of the query on the file with this stamp); None if it does not parse or its names make no sense.

    No sense: two sources of one name (sqlglot's OptimizeError), inner queries that define each other (no end of them).
    """
    tree = parse(sql)
    if tree is None:
        return None
    try:
        return read(Names(tree, columns_of(stamp)))
    except (sqlglot_module().errors.SqlglotError, RecursionError):
        return None


class Names:
    """The scopes of one query and what each name in them stands for."""

    def __init__(self, tree, tables: dict[str, tuple[str, ...]]):
        from sqlglot import exp
        from sqlglot.optimizer.scope import traverse_scope

        self.exp, self.tables = exp, tables
        self.scopes = traverse_scope(tree)

    def sources(self, scope) -> dict[str, object]:
        """{alias: base table name (str) or inner Scope} of the FROM clause, in order, lower case."""
        return {
            alias.lower(): source.name.lower() if isinstance(source, self.exp.Table) else source
            for alias, (_, source) in scope.selected_sources.items()
        }

    def outputs(self, source) -> tuple[str, ...]:
        """Column names, lower case, of a base table or of an inner query."""
        if isinstance(source, str):
            return self.tables.get(source, ())
        return tuple(name.lower() for name in source.expression.named_selects)

    def find(self, column, scope) -> tuple[str, object] | None:
        """(name, base table's name or inner Scope) of a column, looked up from the inside out; None where no source
        fits.
        """
        name, table = column.name.lower(), column.table.lower()
        while scope is not None:
            for alias, source in self.sources(scope).items():
                if table == alias or (not table and name in self.outputs(source)):
                    return name, source
            scope = scope.parent
        return None

    def star(self, scope, table: str = "") -> Iterator[tuple[str, object]]:
        """The (name, source) pairs that * or table.* stands for."""
        for alias, source in self.sources(scope).items():
            if table in ("", alias):
                for name in self.outputs(source):
                    yield name, source

    def is_literal(self, column) -> bool:
        """Whether SQLite reads a name that was found nowhere as text: double quoted and bare."""
        return bool(column.this.args.get("quoted")) and not column.table
