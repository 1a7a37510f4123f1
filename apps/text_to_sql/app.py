"""Text-to-SQL: the policy writes a query, SQLite runs it, and the rows decide.

Rewards are Reasoning-SQL style (arXiv 2503.23157; see rewards/sql): execution, executes, schema, n-gram and structure
overlap, format. The default composite is ordered: no wrong query can outscore a correct one. Scored by the official
Spider execution accuracy and by our strict match, which closes its known holes.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from apps.text_to_sql import annotator, prompts
from core.app import App, Language, Row, Rows
from data import spider
from data.synthetic import spider as synthetic
from rewards import sql as rewards


@dataclass(frozen=True)
class Options:
    """The `task:` section: the answer format and how the schema is written."""

    template: Literal["plain", "fenced", "reasoning", "think_answer", "think_solution"] = "plain"
    schema_format: Literal["compact", "ddl"] = "compact"


# The published weights with an LLM in the judge's slot: JUDGE_URL, JUDGE_MODEL and JUDGE_API_KEY in the environment.
JUDGED = {("judge" if name == "structure_match_if_wrong" else name): w for name, w in rewards.REASONING_SQL.items()}


def composite(weights: dict[str, float]) -> dict:
    """{component: (weight, reward)}: a component is called as the function that computes it."""
    return {name: (weight, getattr(rewards, name)) for name, weight in weights.items()}


def warnings(weights: dict[str, float], outcome: str, recipes: list[str]) -> list[str]:
    """What a composite or a recipe takes away from the promise that no wrong query outscores a correct one."""
    found = []
    others = sum(weight for name, weight in weights.items() if name != outcome)
    if not rewards.is_ordered(weights, outcome):
        found.append(
            f"a wrong query can outscore a correct one: the weight of {outcome} ({weights[outcome]:g}) is not above the "
            f"sum of the others ({others:g}); raise rewards.weights.{outcome} or lower the others"
        )
    if "gdpo" in recipes and others:
        found.append(
            "recipe gdpo scales every component on its own, so partial credit can outrank correctness in a group; "
            "use grpo, dr_grpo or rloo to keep the order"
        )
    return found


def part(row: Row) -> str:
    """Which share of the offline rows a row belongs to: was its template seen, were its details demonstrated right?

    Empty for real data, which has neither templates nor the hasty annotator.
    """
    if not row.get("kind"):
        return ""
    novelty = "held-out templates" if row["novel"] else "seen templates"
    return f"{novelty}, details {'corrupted' if annotator.touched(row['sql']) else 'never corrupted'}"


def nearest_question(train: Rows, test: Rows) -> list[str]:
    """The gold query of the training question that shares the rarest words (idf-weighted overlap)."""
    words = [set(re.findall(r"\w+", row["question"].lower())) for row in train]
    frequency = Counter(word for bag in words for word in bag)
    answers = []
    for row in test:
        bag = set(re.findall(r"\w+", row["question"].lower()))
        best = max(range(len(train)), key=lambda i: sum(1 / frequency[w] for w in bag & words[i]))
        answers.append(prompts.answer({**row, "sql": train[best]["sql"]}))
    return answers


def first_column(train: Rows, test: Rows) -> list[str]:
    """SELECT the first non-key column of the first table: the laziest query that runs."""
    del train
    answers = []
    for row in test:
        table = row["schema"]["tables"][0]
        column = next((c["name"] for c in table["columns"] if c["name"] not in table["primary_key"]), "*")
        answers.append(prompts.answer({**row, "sql": f"SELECT {column} FROM {table['name']}"}))
    return answers


def predict_row(request: Row) -> Row:
    """A row without gold from {"question", "database"}: the schema is read from the SQLite file."""
    for key in ("question", "database"):
        if not isinstance(request[key], str):
            raise ValueError(f"{key!r} is {request[key]!r}; it must be text")
    return {
        "question": request["question"],
        "database": request["database"],
        "schema": spider.schema_of(request["database"]),
    }


APP = App(
    name="text_to_sql",
    acts=Language(prompt=prompts.prompt),
    options=Options,
    load=spider.load,
    write_offline=synthetic.write,
    demonstrations=annotator.demonstrations,
    part=part,
    gold=prompts.answer,
    rewards=composite(rewards.ORDERED),
    presets={
        "reasoning_sql": composite(rewards.REASONING_SQL),
        "llm_judge": composite(JUDGED),
        "answers": composite(rewards.ORDERED) | {"answer": (0.0, rewards.result_identity)},
    },
    outcome="execution_match",
    warnings=warnings,
    metrics={
        "execution_accuracy": rewards.spider_execution,
        "execution_strict": rewards.execution_match,
        "executable": rewards.executes,
    },
    canaries=tuple(rewards.CANARIES),
    cluster="db_id",
    baselines={"nearest question's query": nearest_question, "first column of the first table": first_column},
    predict=predict_row,
    extract=rewards.extract_sql,
    extras=("sql",),
)
