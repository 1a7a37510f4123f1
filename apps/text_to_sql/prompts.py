"""Prompt templates and their answer formats for text-to-SQL.

    template        the answer                                                        read in
    plain           one SQL statement, nothing else                                   this project (tiny models)
    fenced          free text, the SQL in a ```sql block                              OmniSQL's prompt, arXiv 2503.02240
    reasoning       <reasoning>...</reasoning><answer>...</answer>                    Think2SQL, arXiv 2504.15077
    think_answer    <think>...</think><answer> with a ```sql block </answer>          SQL-R1, arXiv 2504.08600
    think_solution  <think>...</think><solution>...</solution>                        SkyRL-SQL

The tags are facts of those projects; the sentences around them are ours. Schemas are rendered compactly (names only, each
an own word, for tiny models) or as DDL with types and keys.
"""

from __future__ import annotations

import re

from core.app import Row
from rewards.sql import in_template

TASK = (
    "You translate questions into SQLite queries. Use only tables and columns of the schema; the query must run as it is "
    "and return exactly the columns that the question asks for, in that order."
)
FORMATS = {
    "fenced": "Think first if it helps. Then give one query in a ```sql block.",
    "reasoning": "Reason between <reasoning> and </reasoning>, then give the query alone between <answer> and </answer>.",
    "think_answer": "Think between <think> and </think>, then give the query in a ```sql block between <answer> and </answer>.",
    "think_solution": "Think between <think> and </think>, then give the query alone between <solution> and </solution>.",
}
WORDS = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|`[^`]*`|\w+(?:\.\d+)?|!=|>=|<=|<>|\|\||[^\w\s]")


def compact(schema: dict) -> str:
    """`singer : id , name ; concert : id , singer_id`: names as own words, so that a word has one token everywhere."""
    return " ; ".join(
        f"{table['name']} : " + " , ".join(column["name"] for column in table["columns"]) for table in schema["tables"]
    )


def ddl(schema: dict) -> str:
    """CREATE TABLE statements with types, primary keys and foreign keys; names are quoted where SQL needs it."""
    statements = []
    for table in schema["tables"]:
        lines = [f"  {_quoted(c['name'])} {c['type'].upper()}" for c in table["columns"]]
        if table["primary_key"]:
            lines.append(f"  PRIMARY KEY ({', '.join(map(_quoted, table['primary_key']))})")
        for child, column, parent, target in schema["foreign_keys"]:
            if child == table["name"]:
                lines.append(f"  FOREIGN KEY ({_quoted(column)}) REFERENCES {_quoted(parent)} ({_quoted(target)})")
        statements.append(f"CREATE TABLE {_quoted(table['name'])} (\n" + ",\n".join(lines) + "\n);")
    return "\n".join(statements)


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z_]\w*", name) else '"' + name.replace('"', '""') + '"'


def prompt(row: Row) -> str | list[dict[str, str]]:
    """The prompt of a row: plain text for the plain template, chat messages for the others."""
    schema = compact(row["schema"]) if row["schema_format"] == "compact" else ddl(row["schema"])
    if row["template"] == "plain":
        return f"tables : {schema}\nquestion : {row['question']}\nSQL :"
    evidence = f"\nHint: {row['evidence']}" if row.get("evidence") else ""
    return [
        {"role": "system", "content": f"{TASK} {FORMATS[row['template']]}"},
        {"role": "user", "content": f"Schema:\n{schema}\n\nQuestion: {row['question']}{evidence}"},
    ]


def answer(row: Row) -> str:
    """The gold query in the answer format of the row's template; plain answers have every word set off by one blank."""
    if row["template"] == "plain":
        return " " + " ".join(WORDS.findall(row["sql"]))
    return in_template(row["sql"].rstrip("; \n"), row["template"])
