"""Query templates that read two things: a table and its mean, two filters of a table joined as sets, a table and its parent.

As in spider_single, a template returns a sqlglot tree with its question. Names are qualified in joins, and only there.
"""

from collections.abc import Callable

from .spider_grammar import AGGREGATES, Draw, an
from .spider_single import AGGREGATED, HOW_MANY, OF_EVERY, function_of, tree_of
from .spider_trees import average_of, binary, call, col, inside, joined, ordered, select
from .spider_trees import count as counted

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
    f, n = function_of(d, t)
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
    return edge["parent"], inside(edge["key"], child, tree_of(where), negate), tail


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
