"""The attack corpus against every component that reads the query, on a database that must not change."""

import hashlib
import inspect
import os
import time
from pathlib import Path

import pytest

from rewards import sql
from rewards.sql.attacks import ATTACKS, CANARIES

GOLD = "SELECT name FROM singer WHERE age > 99"  # empty: also an attack that returns nothing must not pass
ROW = {"sql": GOLD, "question": "Who is older than 99?", "template": "plain"}
LIMIT_S = 5.0  # the sandbox's own wall limit is 3 s; the rest is what one opcode may take on a busy machine


def state(database: str) -> tuple:
    folder = Path(database).parent
    return hashlib.sha256(Path(database).read_bytes()).hexdigest(), sorted(os.listdir(folder)), sorted(os.listdir("."))


def score(component: str, completion: str, row: dict):
    reward = getattr(sql, component)
    return reward(completion, **{name: row[name] for name in inspect.signature(reward).parameters if name in row})


@pytest.mark.parametrize("canary", CANARIES, ids=lambda canary: f"{canary.component}-{canary.name}")
def test_canary_scores_as_declared_in_time_and_changes_nothing(database, canary):
    row = {**ROW, "database": database}
    before, started = state(database), time.monotonic()
    value = score(canary.component, canary.completion(row), row).value
    assert canary.at_least <= value <= canary.at_most
    assert time.monotonic() - started < LIMIT_S
    assert state(database) == before


@pytest.mark.parametrize("component", ["schema_overlap", "ngram_overlap", "structure_match", "format_ok"])
def test_no_attack_breaks_or_pleases_a_component_that_only_reads(database, component):
    gold = "SELECT s.name, count(*) FROM singer AS s JOIN concert AS c ON s.id = c.singer_id GROUP BY s.id"
    row = {"sql": gold, "database": database, "template": "reasoning"}
    started = time.monotonic()
    for name, attack in ATTACKS.items():
        assert score(component, attack.replace("{t}", "singer"), row).value <= 0.5, name
    assert time.monotonic() - started < LIMIT_S


def test_gold_in_another_wrapper_is_still_the_right_answer(database):
    for template in sql.TEMPLATES:
        completion = sql.in_template(GOLD, template)
        assert score("execution_match", completion, {**ROW, "database": database}).value == 1.0
