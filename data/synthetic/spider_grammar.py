"""The choices that a question is made of: a table, columns, a condition, a value, each as SQL tree and as English.

Templates (`spider_templates`) compose them; because tree and words come from one choice, they cannot drift apart.
The English separates what SQL separates: "more than" is >, "at least" is >=, "different" is DISTINCT, "highest first"
is DESC, "each" without "different" keeps duplicates. Text values stand in quotes in most questions.
"""

from dataclasses import dataclass
from random import Random

from .spider_domains import Column, Database, Table
from .spider_trees import binary, col, literal

COMPARE = {
    "GT": ("more than {v}", "greater than {v}", "above {v}", "over {v}"),
    "GTE": ("at least {v}", "{v} or more", "not less than {v}"),
    "LT": ("less than {v}", "below {v}", "under {v}"),
    "LTE": ("at most {v}", "{v} or less", "not more than {v}"),
}
AGGREGATES = {
    "Avg": ("average", "mean"),
    "Sum": ("total", "summed"),
    "Min": ("lowest", "smallest", "minimum"),
    "Max": ("highest", "largest", "maximum"),
}
# How often: as in Spider and in questions that people ask, strict comparisons, means and "most first" are the common ones.
OPERATORS = (*["GT"] * 5, "GTE", *["LT"] * 5, "LTE")
FUNCTIONS = ("Avg", "Avg", "Sum", "Min", "Max")
DESCENDING = 0.8
DOWN = ("from high to low", "in descending order", "highest first")
UP = ("from low to high", "in ascending order", "lowest first")
VERBS = ("Show", "List", "Give", "Find", "Return")


class Unsuitable(Exception):
    """This database has no table, column or value for the template; draw again."""


@dataclass(frozen=True)
class Condition:
    """`tree` in SQL; in English "<column> <verb> <rest>", as in "age | is | more than 30"."""

    column: Column
    tree: object
    rest: str
    verb: str = "is"

    @property
    def said(self) -> str:
        return f"{self.column.words} {self.verb} {self.rest}"


def plural(noun: str) -> str:
    if noun == "aircraft":
        return noun
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def an(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


class Draw:
    """Random choices inside one database; every method raises Unsuitable where there is nothing to choose from."""

    def __init__(self, database: Database, random: Random):
        self.database, self.random = database, random

    def one(self, options):
        options = list(options)
        if not options:
            raise Unsuitable
        return self.random.choice(options)

    def table(self) -> Table:
        return self.one(self.database.tables)

    def edge(self) -> dict:
        """{"child": a table, "parent": a parent of it, "key": the child's foreign key column}."""
        child, key = self.one((t, key) for t in self.database.tables for key in t.parents)
        return {"child": child, "parent": self.database.table(child.parents[key]), "key": key}

    def column(self, table: Table, *kinds: str, but=(), complete: bool = False) -> Column:
        """A column of one of `kinds` (any but keys if none is named, and labels often); complete: one without NULLs."""
        wanted = kinds or ("label", "text", "number", "year")
        options = [c for c in table.columns if c.kind in wanted and c not in but and not (complete and c.nullable)]
        labels = [c for c in options if c.kind == "label"]
        return labels[0] if labels and not kinds and self.random.random() < 0.4 else self.one(options)

    def value(self, table: Table, column: Column):
        """A value that occurs; whole numbers only."""
        present = dict.fromkeys(v for v in table.values(column) if v is not None)
        value = self.one(v for v in present if isinstance(v, str) or v == int(v))
        return value if isinstance(value, str) else int(value)

    def mention(self, value: str) -> str:
        return f"'{value}'" if self.random.random() < 0.85 else value

    def compare(self, table: Table, but=(), within: Table | None = None) -> Condition:
        """A number against a value that occurs, by >, >=, < or <=; within: the table that qualifies the column."""
        column = self.column(table, "number", "year", but=but)
        value, operator = self.value(table, column), self.one(OPERATORS)
        tree = binary(operator, col(column, within), literal(value))
        return Condition(column, tree, self.one(COMPARE[operator]).format(v=value))

    def equal(self, table: Table, but=(), within: Table | None = None) -> Condition:
        """A text equal to a value that occurs; seldom the label, which few rows share."""
        column = self.column(table, *self.one((("text",), ("text",), ("text", "label"))), but=but)
        value = self.value(table, column)
        return Condition(column, binary("EQ", col(column, within), literal(value)), self.mention(value))

    def condition(self, table: Table, but=(), within: Table | None = None) -> Condition:
        return self.one((self.compare, self.equal))(table, but, within)

    def such(self, condition: Condition) -> str:
        """The filter as a clause with its leading blank: " whose age is more than 30"."""
        forms = [f" whose {condition.said}", f" where the {condition.said}"]
        if condition.verb == "is":
            forms.append(f" with {condition.column.words} {condition.rest}")
        return self.one(forms)

    def such_parent(self, parent: Table, condition: Condition) -> str:
        """The filter on a parent, said of its child: " whose singer has age above 30"."""
        column, rest = condition.column.words, condition.rest
        return self.one(
            (f" where the {column} of the {parent.name} is {rest}", f" whose {parent.name} has {column} {rest}")
        )

    def say(self, patterns: tuple[str, ...], **words) -> str:
        """One of the patterns, filled in: tables and columns by their words, a Condition or None as a clause."""
        filled = {"Verb": self.one(VERBS), "w": ""}
        for name, word in words.items():
            if isinstance(word, Table):
                filled[name], filled[name + "s"] = word.name, plural(word.name)
            elif isinstance(word, Condition):
                filled[name] = self.such(word)
            elif isinstance(word, list):
                filled[name] = " and ".join(column.words for column in word)
            elif word is not None:
                filled[name] = word.words if isinstance(word, Column) else word
        return self.one(patterns).format(**filled)
