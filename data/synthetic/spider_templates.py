"""Which templates are asked, how often, and which only held-out databases are asked.

The SQL has two habits for the sake of small models: no aliases, and qualified names only in joins. Those in HELD_OUT compose
clauses that TEMPLATES shows apart.
"""

from collections.abc import Callable

from .spider_relations import (
    above_average,
    count_above_average,
    count_in_subquery,
    difference,
    in_any,
    in_subquery,
    intersect,
    join_aggregate_filter,
    join_count_filter,
    join_filter,
    join_filter_child,
    join_group_count,
    join_top,
    join_two,
    not_in,
    not_in_filter,
    union,
)
from .spider_single import (
    aggregate,
    aggregate_filter,
    aggregate_two,
    count,
    count_distinct,
    count_distinct_filter,
    count_filter,
    distinct,
    distinct_filter,
    filter_and,
    filter_between,
    filter_compare,
    filter_equal,
    filter_like,
    filter_not,
    filter_null,
    filter_or,
    filter_two,
    group_aggregate,
    group_count,
    group_count_filter,
    group_having,
    group_top,
    order,
    order_two,
    project,
    project_two,
    top_one,
    top_some,
    top_some_filter,
)

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
