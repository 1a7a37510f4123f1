"""Query templates on one table: project, filter, aggregate, group, order.

A template draws its choices and returns a sqlglot tree with its question, in 3-5 paraphrases.
"""

from collections import Counter
from collections.abc import Callable

from .spider_domains import Column, Table
from .spider_grammar import AGGREGATES, DESCENDING, DOWN, FUNCTIONS, OPERATORS, UP, Condition, Draw
from .spider_trees import binary, call, col, literal, ordered, select
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


def tree_of(condition: Condition | None):
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
    return select(c, source=t, where=tree_of(where)).distinct(copy=False), d.say(patterns, c=c, t=t, w=where)


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
    return select(counted(c), source=t, where=tree_of(where)), d.say(patterns, c=c, t=t, w=where)


def count_distinct(d: Draw):
    return _count_different(d, lambda t, c: None)


def count_distinct_filter(d: Draw):
    return _count_different(d, lambda t, c: d.condition(t, but=(c,)))


def function_of(d: Draw, t: Table, but=()) -> tuple[str, Column]:
    """An aggregate function and a column that it suits: years have no sum and no mean."""
    n = d.column(t, "number", "year")
    return d.one(f for f in FUNCTIONS if f not in but and (n.kind == "number" or f in ("Min", "Max"))), n


def _aggregate(d: Draw, such: Callable):
    t = d.table()
    f, n = function_of(d, t)
    where = such(t, n)
    question = d.say(AGGREGATED, f=d.one(AGGREGATES[f]), n=n, t=t, w=where)
    return select(call(f, col(n)), source=t, where=tree_of(where)), question


def aggregate(d: Draw):
    return _aggregate(d, lambda t, n: None)


def aggregate_filter(d: Draw):
    return _aggregate(d, lambda t, n: d.condition(t, but=(n,)))


def aggregate_two(d: Draw):
    t = d.table()
    f, n = function_of(d, t)
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
    return select(c, counted(), source=t, where=tree_of(where), group=col(c)), d.say(patterns, c=c, t=t, w=where)


def group_count(d: Draw):
    return _per_group(d, lambda t, c: None)


def group_count_filter(d: Draw):
    return _per_group(d, lambda t, c: d.compare(t, but=(c,)))


def group_aggregate(d: Draw):
    t = d.table()
    c = d.column(t, "text", complete=True)
    f, n = function_of(d, t)
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
    tree = ordered(select(c, source=t, where=tree_of(where)), col(n), descending, k)
    return tree, d.say(patterns, c=c, k=k, n=n, t=t, w=where, most=most, way=way)


def top_some(d: Draw):
    return _top(d, lambda t, n: None)


def top_some_filter(d: Draw):
    return _top(d, lambda t, n: d.equal(t, but=(n,)))
