"""Partial credit from the text: which tables and columns a query uses, and which token pairs it shares with gold.

R_schema = |S(p) & S(g)| / |S(p) | S(g)| with S the base tables and their columns (aliases resolved, * expanded);
R_ngram  = |B(p) & B(g)| / |B(p) | B(g)| with B the adjacent token pairs.
Reasoning-SQL style (arXiv 2503.23157): derived from the abstract and from two independent re-implementations. Comments
count for nothing, so gold pasted into one earns nothing.
"""

from functools import lru_cache

from rewards.sandbox.sqlite import DatabaseUnavailable, file_stamp
from rewards.score import FAILED, Score
from rewards.sql.extract import extract_sql
from rewards.sql.parse import Names, read_names
from rewards.sql.tokens import tokens
from rewards.text import ngram_jaccard


def schema_overlap(completion: str, *, sql: str, database: str) -> Score:
    """Jaccard index of the schema items used; both none: 1, one none or unparsable: 0; None if gold does not parse."""
    try:
        stamp = file_stamp(database)
        gold = schema_items(sql, stamp)
        if gold is None:
            return Score(None, "gold_unparsable")
        predicted = schema_items(extract_sql(completion) or "", stamp)
    except DatabaseUnavailable as error:
        return Score(FAILED, "database_unavailable", str(error))
    if predicted is None:
        return Score(0.0, "unparsable")
    union = gold | predicted
    return Score(len(gold & predicted) / len(union) if union else 1.0)


def ngram_overlap(completion: str, *, sql: str) -> Score:
    """Jaccard index of token bigrams, identifiers and symbols lower-cased outside text literals."""
    predicted = extract_sql(completion)
    if predicted is None:
        return Score(0.0, "no_sql")
    return Score(ngram_jaccard(tokens(predicted), tokens(sql)))


@lru_cache(maxsize=8192)
def schema_items(sql: str, stamp: tuple) -> frozenset[str] | None:
    """{"table", "table.column"} used by a query, lower case; None if it does not parse.

    A name that no table of the file has still counts (as "?.name"), so that inventing columns costs.
    """
    return read_names(sql, stamp, _items)


def _items(names: Names) -> frozenset[str]:
    exp, items = names.exp, set()

    def use(name: str, source) -> None:
        if isinstance(source, str):
            items.update((source, f"{source}.{name}"))

    for scope in names.scopes:
        items.update(source for source in names.sources(scope).values() if isinstance(source, str))
        selects, of_set = scope.expression.selects, isinstance(scope.expression, exp.SetOperation)
        aliases = {select.alias_or_name.lower() for select in selects if of_set or isinstance(select, exp.Alias)}
        for column in scope.find_all(exp.Column):
            if isinstance(column.this, exp.Star):
                continue
            found = names.find(column, scope)
            if found:
                use(*found)
            elif not names.is_literal(column) and (column.table or column.name.lower() not in aliases):
                items.add(f"?.{column.name.lower()}")
        if isinstance(scope.expression, exp.Select) and not isinstance(scope.expression.parent, exp.Exists):
            for projection in scope.expression.expressions:
                if projection.is_star:
                    for name, source in names.star(scope, getattr(projection, "table", "").lower()):
                        use(name, source)
        for join in scope.expression.args.get("joins") or ():
            for column in join.args.get("using") or ():
                for name, source in names.star(scope):
                    if name == column.name.lower():
                        use(name, source)
    return frozenset(items)
