"""Makes a folder in the real on-disk format of Spider (Yu et al. 2018, arXiv 1809.08887), deterministic from a seed.

    tables.json  train_spider.json  dev.json  train_gold.sql  dev_gold.sql  database/<db_id>/<db_id>.sqlite

Databases come from `spider_domains`, questions and SQL from `spider_templates`. `spider_lint` judges every gold and
the engine of the rewards runs it. Train and dev share no database; templates in HELD_OUT are asked in dev only.
Two keys more than Spider has: "template" and "held_out_template". Not made: Spider's parse tree (`sql` is {}) and
train_others.json. The JSON is the same byte for byte for a seed; the SQLite files hold the same rows.
"""

import json
import re
from importlib.util import find_spec
from itertools import chain, cycle
from pathlib import Path
from random import Random

from rewards.sandbox.sqlite import execute

from .folder import whole
from .spider_domains import DOMAINS, Database, sample_database
from .spider_grammar import Draw, Unsuitable
from .spider_lint import Linter, build
from .spider_templates import HELD_OUT, TEMPLATES
from .spider_trees import sql

TRIES = 40  # draws before giving up on a template, a database, or a schema of known names
TYPES = {"key": "number", "label": "text", "text": "text", "number": "number", "year": "time"}


def write(
    folder: str | Path,
    seed: int = 0,
    *,
    train_databases: int = 140,
    dev_databases: int = 36,
    train_questions: int = 43,
    dev_questions: int = 20,
    dev_held_out: int = 3,
) -> None:
    """Writes the folder, whole or not at all (a temporary folder beside it is renamed).

    *_questions: per database; dev_held_out: how many of dev_questions come from held-out templates.
    Raises FileExistsError if the folder exists.
    """
    if find_spec("sqlglot") is None:
        raise ModuleNotFoundError("the synthetic Spider needs sqlglot; install it with pip install '.[sql]'")
    with whole(folder, "Spider") as partial:
        tables, taken = [], {}
        for split, databases, questions, novel in (
            ("train", train_databases, train_questions, 0),
            ("dev", dev_databases, dev_questions, dev_held_out),
        ):
            rows = []
            for number in range(databases):
                random = Random(f"spider/{seed}/{split}/{number}")
                database = _new_database(len(tables), split == "dev", random, taken)
                path = partial / "database" / database.name / f"{database.name}.sqlite"
                path.parent.mkdir(parents=True)
                build(str(path), database).close()
                tables.append(describe(database))
                plan = [False] * (questions - novel) + [True] * novel
                rows += _questions(database, str(path), plan, number * novel, random)
            _write_json(partial / ("train_spider.json" if split == "train" else "dev.json"), rows)
            gold = "".join(f"{row['query']}\t{row['db_id']}\n" for row in rows)
            (partial / f"{split}_gold.sql").write_text(gold, encoding="utf-8")
        _write_json(partial / "tables.json", tables)


def _new_database(number: int, held_out: bool, random: Random, taken: dict) -> Database:
    """A database whose schema is not in `taken` {schema: None}, which it joins; a held-out one is a new combination of
    known table and column names wherever that can be had."""
    domain = list(DOMAINS)[number % len(DOMAINS)]
    known = {name for schema in taken for table in schema for name in table}
    schema, attempts = None, 0
    while attempts == 0 or schema in taken or (held_out and attempts <= TRIES and not known.issuperset(chain(*schema))):
        database = sample_database(f"{domain}_{number + 1}", domain, random, held_out=held_out)
        schema = tuple((table.name, *(column.name for column in table.columns)) for table in database.tables)
        attempts += 1
    taken[schema] = None
    return database


def _questions(database: Database, path: str, plan: list[bool], start: int, random: Random) -> list[dict]:
    """One row per entry of plan (True: from a held-out template; these take turns, beginning with number `start`).

    No question comes twice. Raises ValueError if the database has no more of them.
    """
    linter, draw, rows, asked = Linter(database, random), Draw(database, random), [], set()
    turns = cycle(HELD_OUT[start % len(HELD_OUT) :] + HELD_OUT[: start % len(HELD_OUT)])
    try:
        for novel in plan:
            for _ in range(TRIES):
                template = next(turns) if novel else random.choices(list(TEMPLATES), TEMPLATES.values())[0]
                if found := _draw(template, draw, linter, asked):
                    break
            else:
                raise ValueError(f"{database.name} yields no question after {len(rows)} of {len(plan)}; ask for fewer")
            tree, question = found
            query = sql(tree)
            execute(path, query)
            asked.add(question)
            rows.append(_row(database.name, question, query, template.__name__, novel))
    finally:
        linter.close()
    return rows


def _draw(template, draw: Draw, linter: Linter, asked: set):
    """(tree, question) of a template that the linter lets pass, or None after TRIES draws."""
    for _ in range(TRIES):
        try:
            tree, question = template(draw)
        except Unsuitable:
            continue
        if question not in asked and linter.reject(tree) is None:
            return tree, question
    return None


def _row(db_id: str, question: str, query: str, template: str, novel: bool) -> dict:
    symbols = r"\w+|!=|>=|<=|[^\w\s]"
    return {
        "db_id": db_id,
        "query": query,
        "query_toks": re.findall(symbols, query),
        "query_toks_no_value": re.findall(symbols, re.sub(r"'[^']*'|\b\d+\b", "value", query.lower())),
        "question": question,
        "question_toks": re.findall(r"\w+|[^\w\s]", question),
        "sql": {},
        "template": template,
        "held_out_template": novel,
    }


def describe(database: Database) -> dict:
    """The entry of tables.json; column 0 is Spider's "*", keys are column numbers."""
    columns = [(at, column) for at, table in enumerate(database.tables) for column in table.columns]
    number = {(database.tables[at].name, column.name): i for i, (at, column) in enumerate(columns, start=1)}
    return {
        "db_id": database.name,
        "table_names_original": [table.name for table in database.tables],
        "table_names": [table.name for table in database.tables],
        "column_names_original": [[-1, "*"], *([at, column.name] for at, column in columns)],
        "column_names": [[-1, "*"], *([at, column.words] for at, column in columns)],
        "column_types": ["text", *(TYPES[column.kind] for _, column in columns)],
        "primary_keys": [number[table.name, "id"] for table in database.tables],
        "foreign_keys": [
            [number[table.name, key], number[parent, "id"]]
            for table in database.tables
            for key, parent in table.parents.items()
        ],
    }


def _write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
