"""The query templates: each draws its choices and returns a sqlglot tree with its question, in 3-5 paraphrases.

The SQL has two habits for the sake of small models: no aliases, and qualified names only in joins.
TEMPLATES says how often each is drawn. Those in HELD_OUT compose clauses that TEMPLATES shows apart; only held-out
databases are asked these.
"""

from collections import Counter
from collections.abc import Callable

from .spider_domains import Column, Table
from .spider_grammar import AGGREGATES, DESCENDING, DOWN, FUNCTIONS, OPERATORS, UP, Condition, Draw, an
from .spider_trees import average_of, binary, call, col, inside, joined, literal, ordered, select
from .spider_trees import count as counted

# In patterns {t} is a table, {ts} its plural, {c} {e} {n} columns, {w} a filter with its leading blank, or nothing.
OF_EVERY = (
    "{Verb} the {c} of every {t}{w}.",
    "What is the {c} of each {t}{w}?",
    "{Verb} the {c} of all {ts}{w}.",
    "For every {t}{w}, give the {c}.",
    "I want the {c} of each {t}{w}.",
)
HOW_MANY = (
    "How many {ts} are there{w}?",
    "Count the {ts}{w}.",
    "What is the number of {ts}{w}?",
    "{Verb} the number of {ts}{w}.",
)
AGGREGATED = (
    "What is the {f} {n} of all {ts}{w}?",
    "{Verb} the {f} {n} of the {ts}{w}.",
    "Over all {ts}{w}, what is the {f} {n}?",
)


def _tree(condition: Condition | None):
    return condition.tree if condition else None


# --- one table: project and filter -----------------------------------------------------------------------------------


def project(d: Draw):
    t = d.table()
    c = d.column(t)
    return select(c, source=t), d.say(OF_EVERY, c=c, t=t)


def project_two(d: Draw):
    t = d.table()
    c = d.column(t)
    e = d.column(t, but=(c,))
    return select(c, e, source=t), d.say(OF_EVERY, c=[c, e], t=t)


def _filtered(d: Draw, condition: Callable, two: bool = False):
    t = d.table()
    where = condition(t)
    columns = [d.column(t, but=(where.column,))]
    if two:
        columns.append(d.column(t, but=(where.column, *columns)))
    return select(*columns, source=t, where=where.tree), d.say(OF_EVERY, c=columns, t=t, w=where)


def filter_equal(d: Draw):
    return _filtered(d, d.equal)


def filter_compare(d: Draw):
    return _filtered(d, d.compare)


def filter_two(d: Draw):
    return _filtered(d, d.condition, two=True)


def filter_not(d: Draw):
    def condition(t):
        column = d.column(t, "text")
        value = d.value(t, column)
        return Condition(column, binary("NEQ", col(column), literal(value)), f"not {d.mention(value)}")

    return _filtered(d, condition)


def filter_between(d: Draw):
    from sqlglot import exp

    def condition(t):
        column = d.column(t, "number", "year")
        low, high = sorted((d.value(t, column), d.value(t, column)))
        tree = exp.Between(this=col(column), low=literal(low), high=literal(high))
        return Condition(column, tree, d.one((f"between {low} and {high}", f"from {low} to {high}")) + " inclusive")

    return _filtered(d, condition)


def filter_null(d: Draw):
    from sqlglot import exp

    def condition(t):
        column = d.one(c for c in t.columns if c.nullable)
        tree = binary("Is", col(column), exp.Null())
        if d.random.random() < 0.5:
            return Condition(column, tree, d.one(("unknown", "missing")))
        return Condition(column, exp.Not(this=tree), d.one(("known", "not missing")))

    return _filtered(d, condition)


def filter_like(d: Draw):
    def condition(t):
        column = d.column(t, "label")
        word = d.one(d.value(t, column).split())
        tree = binary("Like", col(column), literal(f"%{word}%"))
        return Condition(column, tree, f"'{word}'", verb=d.one(("contains", "includes")))

    return _filtered(d, condition)


def _both(d: Draw, operator: str, word: str):
    t = d.table()
    a = d.condition(t)
    b = d.condition(t, but=(a.column,))
    c = d.column(t, but=(a.column, b.column))
    such = d.one((f" whose {a.said} {word} {b.said}", f" where the {a.said} {word} the {b.said}"))
    return select(c, source=t, where=binary(operator, a.tree, b.tree)), d.say(OF_EVERY, c=c, t=t, w=such)


def filter_and(d: Draw):
    return _both(d, "And", "and")


def filter_or(d: Draw):
    return _both(d, "Or", "or")


def _different(d: Draw, such: Callable):
    t = d.table()
    c = d.column(t, "text", "year", complete=True)
    where = such(t, c)
    patterns = (
        "{Verb} the different {c} values of all {ts}{w}.",
        "What are the distinct values of {c} for {ts}{w}?",
        "Which different {c} values do the {ts}{w} have?",
        "{Verb} each {c} of the {ts}{w} only once.",
    )
    return select(c, source=t, where=_tree(where)).distinct(copy=False), d.say(patterns, c=c, t=t, w=where)


def distinct(d: Draw):
    return _different(d, lambda t, c: None)


def distinct_filter(d: Draw):
    return _different(d, lambda t, c: d.condition(t, but=(c,)))


# --- one table: aggregate and group ----------------------------------------------------------------------------------


def count(d: Draw):
    t = d.table()
    return select(counted(), source=t), d.say(HOW_MANY, t=t)


def count_filter(d: Draw):
    t = d.table()
    where = d.condition(t)
    return select(counted(), source=t, where=where.tree), d.say(HOW_MANY, t=t, w=where)


def _count_different(d: Draw, such: Callable):
    t = d.table()
    c = d.column(t, "text", "year", complete=True)
    where = such(t, c)
    patterns = (
        "How many different {c} values do the {ts}{w} have?",
        "Count the distinct {c} values of the {ts}{w}.",
        "What is the number of different {c} values for {ts}{w}?",
    )
    return select(counted(c), source=t, where=_tree(where)), d.say(patterns, c=c, t=t, w=where)


def count_distinct(d: Draw):
    return _count_different(d, lambda t, c: None)


def count_distinct_filter(d: Draw):
    return _count_different(d, lambda t, c: d.condition(t, but=(c,)))


def _function(d: Draw, t: Table, but=()) -> tuple[str, Column]:
    """An aggregate function and a column that it suits: years have no sum and no mean."""
    n = d.column(t, "number", "year")
    return d.one(f for f in FUNCTIONS if f not in but and (n.kind == "number" or f in ("Min", "Max"))), n


def _aggregate(d: Draw, such: Callable):
    t = d.table()
    f, n = _function(d, t)
    where = such(t, n)
    question = d.say(AGGREGATED, f=d.one(AGGREGATES[f]), n=n, t=t, w=where)
    return select(call(f, col(n)), source=t, where=_tree(where)), question


def aggregate(d: Draw):
    return _aggregate(d, lambda t, n: None)


def aggregate_filter(d: Draw):
    return _aggregate(d, lambda t, n: d.condition(t, but=(n,)))


def aggregate_two(d: Draw):
    t = d.table()
    f, n = _function(d, t)
    g = d.one(g for g in AGGREGATES if g != f and (n.kind == "number" or g in ("Min", "Max")))
    patterns = (
        "What are the {f} and the {g} {n} of all {ts}?",
        "{Verb} the {f} and the {g} {n} of the {ts}.",
        "Over all {ts}, what are the {f} and the {g} {n}?",
    )
    question = d.say(patterns, f=d.one(AGGREGATES[f]), g=d.one(AGGREGATES[g]), n=n, t=t)
    return select(call(f, col(n)), call(g, col(n)), source=t), question


def _per_group(d: Draw, such: Callable):
    t = d.table()
    c = d.column(t, "text", "year", complete=True)
    where = such(t, c)
    patterns = (
        "{Verb} each {c} and the number of {ts}{w}.",
        "How many {ts}{w} are there for each {c}? Show the {c} and the count.",
        "For every {c}, give the {c} and count the {ts}{w}.",
        "{Verb} every {c} with its number of {ts}{w}.",
    )
    return select(c, counted(), source=t, where=_tree(where), group=col(c)), d.say(patterns, c=c, t=t, w=where)


def group_count(d: Draw):
    return _per_group(d, lambda t, c: None)


def group_count_filter(d: Draw):
    return _per_group(d, lambda t, c: d.compare(t, but=(c,)))


def group_aggregate(d: Draw):
    t = d.table()
    c = d.column(t, "text", complete=True)
    f, n = _function(d, t)
    patterns = (
        "{Verb} each {c} and the {f} {n} of its {ts}.",
        "What is the {f} {n} of the {ts} for each {c}? Show the {c} too.",
        "For every {c}, give the {c} and the {f} {n} of the {ts}.",
        "{Verb} every {c} with the {f} {n} of the {ts}.",
    )
    question = d.say(patterns, c=c, f=d.one(AGGREGATES[f]), n=n, t=t)
    return select(c, call(f, col(n)), source=t, group=col(c)), question


def group_having(d: Draw):
    t = d.table()
    c = d.column(t, "text", "year", complete=True)
    value, operator = d.one(sorted(set(Counter(t.values(c)).values()))), d.one(OPERATORS)
    size = {"GT": "more than {}", "GTE": "at least {}", "LT": "less than {}", "LTE": "at most {}"}[operator]
    patterns = (
        "Which {c} values have {size} {ts}?",
        "{Verb} every {c} that has {size} {ts}.",
        "For which {c} values are there {size} {ts}?",
        "{Verb} the {c} values shared by {size} {ts}.",
    )
    tree = select(c, source=t, group=col(c)).having(binary(operator, counted(), literal(value)), copy=False)
    return tree, d.say(patterns, c=c, size=size.format(value), t=t)


def group_top(d: Draw):
    t = d.table()
    c = d.column(t, "text", "year", complete=True)
    descending = d.random.random() < DESCENDING
    patterns = (
        "Which {c} has the {most} {ts}?",
        "{Verb} the {c} with the {most} {ts}.",
        "What is the {c} that the {most} {ts} have?",
        "{Verb} the {c} shared by the {most} {ts}.",
    )
    question = d.say(patterns, c=c, most="most" if descending else "fewest", t=t)
    return ordered(select(c, source=t, group=col(c)), counted(), descending, 1), question


# --- one table: order ------------------------------------------------------------------------------------------------


def _sorted(d: Draw, two: bool):
    t = d.table()
    n = d.column(t, "number", "year", complete=True)
    columns = [d.column(t, but=(n,))]
    if two:
        columns.append(d.column(t, but=(n, *columns)))
    descending = d.random.random() < DESCENDING
    patterns = (
        "{Verb} the {c} of every {t}, sorted by {n} {way}.",
        "Sort the {ts} by {n} {way} and give the {c} of each.",
        "What is the {c} of each {t}, ordered by {n} {way}?",
        "{Verb} the {c} of all {ts} by {n} {way}.",
    )
    question = d.say(patterns, c=columns, n=n, t=t, way=d.one(DOWN if descending else UP))
    return ordered(select(*columns, source=t), col(n), descending), question


def order(d: Draw):
    return _sorted(d, two=False)


def order_two(d: Draw):
    return _sorted(d, two=True)


def top_one(d: Draw):
    t = d.table()
    n = d.column(t, "number", "year", complete=True)
    c = d.column(t, but=(n,))
    descending = d.random.random() < DESCENDING
    patterns = (
        "{Verb} the {c} of the {t} with the {most} {n}.",
        "What is the {c} of the {t} that has the {most} {n}?",
        "Which {t} has the {most} {n}? Give its {c}.",
        "For the {t} with the {most} {n}, give the {c}.",
    )
    question = d.say(patterns, c=c, n=n, t=t, most=d.one(AGGREGATES["Max" if descending else "Min"]))
    return ordered(select(c, source=t), col(n), descending, 1), question


def _top(d: Draw, such: Callable):
    t = d.table()
    n = d.column(t, "number", "year", complete=True)
    where = such(t, n)
    c = d.column(t, but=(n, where.column) if where else (n,))
    descending, k = d.random.random() < DESCENDING, d.random.randint(2, 5)
    most, way = d.one(AGGREGATES["Max" if descending else "Min"]), (DOWN if descending else UP)[2]
    patterns = (
        "{Verb} the {c} of the {k} {ts}{w} with the {most} {n}, {way}.",
        "What is the {c} of each of the {k} {ts}{w} that have the {most} {n}, {way}?",
        "Among the {ts}{w}, which {k} have the {most} {n}? Give the {c}, {way}.",
        "Take the {k} {ts}{w} with the {most} {n} and list the {c}, {way}.",
    )
    tree = ordered(select(c, source=t, where=_tree(where)), col(n), descending, k)
    return tree, d.say(patterns, c=c, k=k, n=n, t=t, w=where, most=most, way=way)


def top_some(d: Draw):
    return _top(d, lambda t, n: None)


def top_some_filter(d: Draw):
    return _top(d, lambda t, n: d.equal(t, but=(n,)))


# --- one table twice -------------------------------------------------------------------------------------------------


def _against_average(d: Draw):
    """(table, its compared column, tree of the filter, the filter as a clause)."""
    t = d.table()
    n = d.column(t, "number")
    operator = d.one(("GT", "LT"))
    than = d.one({"GT": ("above", "more than"), "LT": ("below", "less than")}[operator])
    forms = (
        f" whose {n.words} is {than} the average",
        f" with {n.words} {than} the average",
        f" where the {n.words} is {than} the average {n.words}",
    )
    return t, n, binary(operator, col(n), average_of(t, n)), d.one(forms)


def above_average(d: Draw):
    t, n, where, such = _against_average(d)
    c = d.column(t, but=(n,))
    return select(c, source=t, where=where), d.say(OF_EVERY, c=c, t=t, w=such)


def count_above_average(d: Draw):
    t, _, where, such = _against_average(d)
    return select(counted(), source=t, where=where), d.say(HOW_MANY, t=t, w=such)


def _set_operation(d: Draw, operator: str, patterns: tuple[str, ...]):
    from sqlglot import exp

    t = d.table()
    c = d.column(t, "text", "year", complete=True)
    a, b = d.condition(t, but=(c,)), d.condition(t, but=(c,))
    left, right = (select(c, source=t, where=x.tree) for x in (a, b))
    tree = getattr(exp, operator)(this=left, expression=right, distinct=True)
    return tree, d.say(patterns, c=c, t=t, a=a.said, b=b.said)


def intersect(d: Draw):
    patterns = (
        "Which {c} values have both {ts} whose {a} and {ts} whose {b}?",
        "{Verb} each {c} shared by {ts} whose {a} and {ts} whose {b}.",
        "Which {c} appears for {ts} whose {a} and also for {ts} whose {b}?",
    )
    return _set_operation(d, "Intersect", patterns)


def union(d: Draw):
    patterns = (
        "Which different {c} values have {ts} whose {a} or {ts} whose {b}?",
        "{Verb} the different {c} values of {ts} whose {a} together with {ts} whose {b}.",
        "{Verb} once each {c} of {ts} whose {a} or of {ts} whose {b}.",
    )
    return _set_operation(d, "Union", patterns)


def difference(d: Draw):
    patterns = (
        "Which {c} values have {ts} whose {a} but no {ts} whose {b}?",
        "{Verb} each {c} that has {ts} whose {a} but not {ts} whose {b}.",
        "Which {c} appears for {ts} whose {a} but not for {ts} whose {b}?",
    )
    return _set_operation(d, "Except", patterns)


# --- two tables ------------------------------------------------------------------------------------------------------


def join_two(d: Draw):
    edge = d.edge()
    t, p = edge["child"], edge["parent"]
    c, e = d.column(t), d.column(p)
    patterns = (
        "{Verb} the {c} of every {t} and the {e} of its {p}.",
        "What is the {c} of each {t} and the {e} of its {p}?",
        "For every {t}, give its {c} and the {e} of its {p}.",
        "{Verb} the {c} of all {ts} together with the {e} of the {p}.",
    )
    return joined(col(c, t), col(e, p), **edge), d.say(patterns, c=c, e=e, t=t, p=p)


def join_filter(d: Draw):
    edge = d.edge()
    t, p = edge["child"], edge["parent"]
    where, c = d.condition(p, within=p), d.column(t)
    return joined(col(c, t), **edge, where=where.tree), d.say(OF_EVERY, c=c, t=t, w=d.such_parent(p, where))


def join_filter_child(d: Draw):
    edge = d.edge()
    t, p = edge["child"], edge["parent"]
    where, c = d.condition(t, within=t), d.column(p)
    patterns = (
        "For each {t}{w}, give the {c} of its {p}.",
        "{Verb} the {c} of the {p} of every {t}{w}.",
        "What is the {c} of the {p} for each {t}{w}?",
    )
    return joined(col(c, p), **edge, where=where.tree), d.say(patterns, c=c, t=t, p=p, w=where)


def join_count_filter(d: Draw):
    edge = d.edge()
    t, p = edge["child"], edge["parent"]
    where = d.condition(p, within=p)
    return joined(counted(), **edge, where=where.tree), d.say(HOW_MANY, t=t, w=d.such_parent(p, where))


def join_aggregate_filter(d: Draw):
    edge = d.edge()
    t, p = edge["child"], edge["parent"]
    where = d.condition(p, within=p)
    f, n = _function(d, t)
    question = d.say(AGGREGATED, f=d.one(AGGREGATES[f]), n=n, t=t, w=d.such_parent(p, where))
    return joined(call(f, col(n, t)), **edge, where=where.tree), question


def join_group_count(d: Draw):
    edge = d.edge()
    t, p = edge["child"], edge["parent"]
    c = d.column(p, "label")
    patterns = (
        "For each {p} that has {ts}, show its {c} and its number of {ts}.",
        "{Verb} the {c} and the number of {ts} of every {p} that has {ts}.",
        "How many {ts} does each {p} with {ts} have? Show the {c} and the count.",
    )
    return joined(col(c, p), counted(), **edge, group=col("id", p)), d.say(patterns, c=c, t=t, p=p)


def join_top(d: Draw):
    edge = d.edge()
    t, p = edge["child"], edge["parent"]
    c = d.column(p, "label")
    patterns = (
        "Which {p} has the most {ts}? Give its {c}.",
        "{Verb} the {c} of the {p} with the most {ts}.",
        "What is the {c} of the {p} that has the most {ts}?",
    )
    return ordered(joined(col(c, p), **edge, group=col("id", p)), counted(), True, 1), d.say(patterns, c=c, t=t, p=p)


def _with_child(d: Draw, such: Callable, negate: bool = False):
    """(parent, tree of `id [NOT] IN (children)`, "has a child whose ..." from its object on)."""
    edge = d.edge()
    child = edge["child"]
    where = such(child)
    tail = (f"no {child.name}" if negate else an(child.name)) + (f" whose {where.said}" if where else "")
    return edge["parent"], inside(edge["key"], child, _tree(where), negate), tail


def _parents(d: Draw, such: Callable, negate: bool = False):
    p, where, tail = _with_child(d, such, negate)
    c = d.column(p)
    patterns = (
        "{Verb} the {c} of every {p} that has {tail}.",
        "What is the {c} of each {p} that has {tail}?",
        "{Verb} the {c} of all {ps} that have {tail}.",
        "Which {ps} have {tail}? Give the {c}.",
    )
    return select(c, source=p, where=where), d.say(patterns, c=c, p=p, tail=tail)


def in_subquery(d: Draw):
    return _parents(d, d.condition)


def in_any(d: Draw):
    return _parents(d, lambda t: None)


def not_in(d: Draw):
    return _parents(d, lambda t: None, negate=True)


def not_in_filter(d: Draw):
    return _parents(d, d.condition, negate=True)


def count_in_subquery(d: Draw):
    p, where, tail = _with_child(d, d.condition)
    patterns = (
        "How many {ps} have {tail}?",
        "Count the {ps} that have {tail}.",
        "What is the number of {ps} that have {tail}?",
    )
    return select(counted(), source=p, where=where), d.say(patterns, p=p, tail=tail)


# How often each is drawn, in relation to the others. The first block (one simple clause) makes about 70 %.
TEMPLATES: dict[Callable, float] = {
    project: 8, project_two: 6, filter_equal: 10, filter_compare: 14, filter_two: 3, filter_not: 1, filter_between: 1,
    filter_null: 1, filter_like: 1, distinct: 4, count: 2, count_filter: 8, count_distinct: 2, aggregate: 8,
    aggregate_filter: 7, order: 7, top_one: 8, top_some: 4, group_count: 4,
    filter_and: 2, filter_or: 1, distinct_filter: 1, aggregate_two: 1, group_aggregate: 2, group_having: 1,
    group_top: 1, above_average: 1, intersect: 0.5, union: 0.5, difference: 0.5, join_two: 2, join_filter: 2,
    join_filter_child: 1, join_count_filter: 1, join_group_count: 1, in_subquery: 1, in_any: 0.5, not_in: 0.5,
    not_in_filter: 0.5,
}  # fmt: skip
HELD_OUT: tuple[Callable, ...] = (
    order_two, top_some_filter, count_distinct_filter, group_count_filter, count_above_average, join_aggregate_filter,
    count_in_subquery, join_top,
)  # fmt: skip
