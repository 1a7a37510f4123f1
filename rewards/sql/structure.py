"""Five yes/no questions about a query's tree, averaged: a judge that needs no model and always answers the same.

1 the right tables; 2 the right joins; 3 the right filters; 4 the right aggregation and grouping; 5 the right projection
and order. These are the items of the LLM judge's rubric (our own: the prompt of Reasoning-SQL, arXiv 2503.23157, was
not read). Every SELECT of the query answers for itself and the query holds the multiset of the answers, so a CTE and a
subquery are the same. Insensitive to aliases, case, redundant parentheses, the order of AND / OR / + / * / = operands
and of IN lists, a join condition in ON or WHERE, 20 against 20.0. Absence counts only over the right tables: SELECT 1
has no wrong join, but earns nothing. Not equivalence: two ways to write one query may differ in every item.
"""

from dataclasses import replace
from functools import lru_cache

from rewards.sandbox.sqlite import DatabaseUnavailable, file_stamp
from rewards.score import FAILED, Score
from rewards.sql.execution import execution_match
from rewards.sql.extract import extract_sql
from rewards.sql.parse import Names, read_names

ITEMS = ("tables", "joins", "filters", "aggregation", "projection")


def structure_match(completion: str, *, sql: str, database: str) -> Score:
    """Share of the five items that agree with gold; unparsable 0; None if gold does not parse. detail: what differs."""
    try:
        stamp = file_stamp(database)
        gold = structure(sql, stamp)
        if gold is None:
            return Score(None, "gold_unparsable")
        predicted = structure(extract_sql(completion) or "", stamp)
    except DatabaseUnavailable as error:
        return Score(FAILED, "database_unavailable", str(error))
    if predicted is None:
        return Score(0.0, "unparsable")
    right_tables = predicted[0] == gold[0]
    wrong = [
        item
        for item, mine, theirs in zip(ITEMS, predicted, gold, strict=True)
        if mine != theirs or not (right_tables or any(any(part) for part in theirs))
    ]
    return Score(1 - len(wrong) / len(ITEMS), "", "differs in " + ", ".join(wrong) if wrong else "")


def structure_match_if_wrong(completion: str, *, sql: str, database: str) -> Score:
    """structure_match, granted only where the execution does not match: the judge's slot, R_judge (1 - R_exec)."""
    executed = execution_match(completion, sql=sql, database=database)
    if executed.failed or executed.value == 1.0:
        return Score(FAILED if executed.failed else None, executed.reason, executed.detail)
    score = structure_match(completion, sql=sql, database=database)
    return replace(score, repeatable=executed.repeatable)


@lru_cache(maxsize=8192)
def structure(sql: str, stamp: tuple) -> tuple | None:
    """The five items, each a sorted tuple with one entry per SELECT (each entry a tuple); None if it does not parse."""
    return read_names(sql, stamp, _structure)


def _structure(names: Names) -> tuple:
    reader = _Reader(names)
    selects = [reader.select(scope) for scope in reader.names.scopes if isinstance(scope.expression, reader.exp.Select)]
    items = [sorted(item, key=repr) for item in zip(*selects, strict=True)] or [[] for _ in ITEMS]  # only VALUES
    for scope in reader.names.scopes:
        if isinstance(scope.expression, reader.exp.SetOperation):
            query = scope.expression
            items[4].append((query.key, bool(query.args.get("distinct")), *reader.order(scope)))
    return tuple(tuple(item) for item in items)


class _Reader:
    """Canonical text of the parts of a query."""

    def __init__(self, names: Names):
        self.names, self.exp = names, names.exp

    def select(self, scope) -> tuple[tuple, ...]:
        query, exp = scope.expression, self.exp
        tables = sorted(source for source in self.names.sources(scope).values() if isinstance(source, str))
        conditions = [query.args["where"].this] if query.args.get("where") else []
        joins = []
        for join in query.args.get("joins") or ():
            conditions += [join.args["on"]] if join.args.get("on") else []
            joins += [f"{join.side} {join.method}".strip().lower()] if join.side or join.method else []
            for column in join.args.get("using") or ():
                same = [self.source_column(*pair) for pair in self.names.star(scope) if pair[0] == column.name.lower()]
                joins.append(f"eq({', '.join(sorted(same))})")
        filters = []
        for condition in (part for whole in conditions for part in self.conjuncts(whole)):
            across = isinstance(condition, exp.EQ) and all(
                isinstance(side.unnest(), exp.Column) and self.names.find(side.unnest(), scope)
                for side in (condition.left, condition.right)
            )
            (joins if across else filters).append(self.text(condition, scope))
        group, having = query.args.get("group"), query.args.get("having")
        aggregates = {self.text(call, scope) for call in scope.find_all(exp.AggFunc)}
        grouping = {self.key(key, scope) for key in group.expressions} if group else set()
        groups = [self.text(part, scope) for part in self.conjuncts(having.this)] if having else []
        return (
            tuple(tables),
            tuple(sorted(joins)),
            tuple(sorted(set(filters))),
            (
                *sorted(aggregates),
                *(f"by {key}" for key in sorted(grouping)),
                *(f"having {part}" for part in sorted(groups)),
            ),
            (*(["distinct"] if query.args.get("distinct") else []), *self.projections(scope), *self.order(scope)),
        )

    def projections(self, scope) -> list[str]:
        found = []
        for projection in scope.expression.expressions:
            if projection.is_star:
                table = getattr(projection, "table", "").lower()
                found += [self.source_column(*pair) for pair in self.names.star(scope, table)] or ["*"]
            else:
                found.append(self.text(projection, scope))
        return found

    def order(self, scope) -> list[str]:
        query = scope.expression
        ordered = query.args.get("order")
        keys = [
            f"order {self.key(key.this, scope)} {'desc' if key.args.get('desc') else 'asc'}"
            for key in (ordered.expressions if ordered else ())
        ]
        bounds = [
            f"{name} {self.text(query.args[name].expression, scope)}"
            for name in ("limit", "offset")
            if query.args.get(name) and query.args[name].expression
        ]
        return keys + bounds

    def key(self, node, scope) -> str:
        """An ORDER BY or GROUP BY key: ordinals and aliases stand for what they name, in a set operation its column."""
        selects = scope.expression.selects
        names = [select.alias_or_name.lower() for select in selects]
        of_set = isinstance(scope.expression, self.exp.SetOperation)
        if isinstance(node, self.exp.Literal) and node.this.isdigit() and 0 < int(node.this) <= len(selects):
            position = int(node.this) - 1
            return f"output {position}" if of_set else self.text(selects[position], scope)
        if of_set and node.name.lower() in names:
            return f"output {names.index(node.name.lower())}"
        return self.text(node, scope, aliases=True)

    def conjuncts(self, condition) -> list:
        condition = condition.unnest()
        if isinstance(condition, self.exp.And):
            return self.conjuncts(condition.left) + self.conjuncts(condition.right)
        return [condition]

    def source_column(self, name: str, source) -> str:
        """table.column, or for a column of an inner query the text of the expression it names."""
        if isinstance(source, str):
            return f"{source}.{name}"
        for projection in source.expression.selects:
            if (
                projection.alias_or_name.lower() == name
                and not projection.is_star
                and source.expression.key == "select"
            ):
                return self.text(projection, source)
        return f"inner.{name}"

    def text(self, node, scope, aliases: bool = False) -> str:
        """Canonical text of an expression; aliases: names of the SELECT list come before those of the tables."""
        exp = self.exp
        if isinstance(node, (exp.Paren, exp.Alias)):
            return self.text(node.this, scope, aliases)
        if isinstance(node, exp.Query):
            return "(select)"  # answers for itself
        if isinstance(node, exp.Literal):
            return repr(node.this) if node.is_string else repr(float(node.this))
        if isinstance(node, exp.Column) and not isinstance(node.this, exp.Star):
            found = self.names.find(node, scope)
            if not node.table and (aliases or not found):
                for projection in scope.expression.selects:
                    named = isinstance(projection, exp.Alias) and projection.alias.lower() == node.name.lower()
                    if named and projection.this.name.lower() != node.name.lower():  # x AS x names itself
                        return self.text(projection, scope)
            if found:
                return self.source_column(*found)
            return repr(node.name) if self.names.is_literal(node) else f"?.{node.name.lower()}"
        if isinstance(node, (exp.And, exp.Or)):
            parts = [self.text(part, scope, aliases) for part in node.flatten()]
            return f"{node.key}({', '.join(sorted(set(parts)))})"
        key, children = node.key, [child for child in node.args.values() if child not in (None, False, [], "")]
        texts = [self.child(child, scope, aliases, isinstance(node, exp.In)) for child in children]
        if isinstance(node, (exp.GT, exp.GTE)):
            key, texts = key.replace("gt", "lt"), texts[::-1]
        elif isinstance(node, (exp.EQ, exp.NEQ, exp.Add, exp.Mul)):
            texts = sorted(texts)
        return f"{key}({', '.join(texts)})"

    def child(self, child, scope, aliases: bool, unordered: bool) -> str:
        if isinstance(child, list):
            texts = [self.child(part, scope, aliases, unordered) for part in child]
            return f"[{', '.join(sorted(texts) if unordered else texts)}]"
        if isinstance(child, self.exp.Expression):
            return self.text(child, scope, aliases)
        return str(child).lower()
