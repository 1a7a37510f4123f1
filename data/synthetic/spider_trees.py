"""SQL as sqlglot trees: the few builders that the templates need, and the text of a tree as Spider writes it."""

from functools import cache

from .spider_domains import Column, Table


def col(column: Column | str, table: Table | None = None):
    """A column by its object or name, qualified if `table` is given."""
    from sqlglot import exp

    return exp.column(column if isinstance(column, str) else column.name, table=table.name if table else None)


def literal(value: int | str):
    from sqlglot import exp

    return exp.Literal.string(value) if isinstance(value, str) else exp.Literal.number(value)


def binary(operator: str, left, right):
    """operator: the name of a sqlglot class, such as GT, EQ, And, Like."""
    from sqlglot import exp

    return getattr(exp, operator)(this=left, expression=right)


def call(function: str, argument):
    """function: the name of a sqlglot class, such as Avg."""
    from sqlglot import exp

    return getattr(exp, function)(this=argument)


def count(column: Column | None = None):
    """COUNT(*), or COUNT(DISTINCT column)."""
    from sqlglot import exp

    return exp.Count(this=exp.Distinct(expressions=[col(column)]) if column else exp.Star())


def select(*columns, source: Table, where=None, group=None):
    """columns: Column objects or trees; where, group: trees or None."""
    from sqlglot import exp

    tree = exp.Select(expressions=[col(c) if isinstance(c, Column) else c for c in columns])
    return _clauses(tree.from_(_table(source), copy=False), where, group)


def joined(*columns, child: Table, parent: Table, key: str, where=None, group=None):
    """SELECT columns FROM child JOIN parent ON child.key = parent.id ..."""

    on = binary("EQ", col(key, child), col("id", parent))
    tree = select(*columns, source=child).join(_table(parent), on=on, copy=False)
    return _clauses(tree, where, group)


def _table(table: Table):
    from sqlglot import exp

    return exp.Table(this=exp.to_identifier(table.name))  # exp.to_table would parse it


def _clauses(tree, where, group):
    tree = tree.where(where, copy=False) if where is not None else tree
    return tree.group_by(group, copy=False) if group is not None else tree


def ordered(tree, key, descending: bool, limit: int | None = None):
    from sqlglot import exp

    tree = tree.order_by(exp.Ordered(this=key, desc=descending, nulls_first=not descending), copy=False)
    return tree.limit(exp.Literal.number(limit), copy=False) if limit else tree


def inside(key: str, child: Table, where=None, negate: bool = False):
    """id [NOT] IN (SELECT key FROM child [WHERE ...])"""
    from sqlglot import exp

    tree = exp.In(this=col("id"), query=exp.Subquery(this=select(col(key), source=child, where=where)))
    return exp.Not(this=tree) if negate else tree


def average_of(table: Table, column: Column):
    """(SELECT AVG(column) FROM table)"""
    from sqlglot import exp

    return exp.Subquery(this=select(call("Avg", col(column)), source=table))


@cache
def _generator():
    from sqlglot import exp
    from sqlglot.dialects.sqlite import SQLite

    class Spider(SQLite.Generator):
        """SQLite as people write it in Spider: `!=`, `x NOT IN (...)` and `x IS NOT NULL`."""

        def neq_sql(self, expression):
            return self.binary(expression, "!=")

        def not_sql(self, expression):
            inner = expression.this
            if isinstance(inner, exp.In):
                return f"{self.sql(inner, 'this')} NOT IN {self.sql(inner, 'query')}"
            if isinstance(inner, exp.Is):
                return f"{self.sql(inner, 'this')} IS NOT {self.sql(inner, 'expression')}"
            return super().not_sql(expression)

    return Spider()


def sql(tree) -> str:
    """The text of a sqlglot tree, in one line."""
    return _generator().generate(tree, copy=False)
