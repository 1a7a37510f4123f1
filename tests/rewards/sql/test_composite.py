"""The promise of ORDERED, on all component values: no wrong completion outscores a correct one, nor in advantage."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import sql
from rewards.sql import ORDERED, REASONING_SQL, is_ordered

ORACLES = {case["case"]: case for case in json.loads(Path(__file__).with_name("oracles.json").read_text())}
PARTS = [name for name in ORDERED if name != "execution_match"]
unit = st.floats(0, 1)
partial = st.one_of(st.none(), unit)
completion = st.fixed_dictionaries({"execution_match": st.sampled_from([0.0, 1.0]), **dict.fromkeys(PARTS, partial)})


def total(weights: dict, values: dict) -> float:
    return sum(weight * (values[name] or 0.0) for name, weight in weights.items())


def advantages(totals: list[float]) -> list[float]:
    mean = sum(totals) / len(totals)
    std = (sum((t - mean) ** 2 for t in totals) / (len(totals) - 1)) ** 0.5
    return [(t - mean) / (std + 1e-4) for t in totals]


@settings(max_examples=300, deadline=None)
@given(st.lists(completion, min_size=2, max_size=8))
def test_every_correct_completion_beats_every_wrong_one_in_reward_and_advantage(group):
    totals = [total(ORDERED, values) for values in group]
    for scores in (totals, advantages(totals)):
        right = [score for score, values in zip(scores, group, strict=True) if values["execution_match"]]
        wrong = [score for score, values in zip(scores, group, strict=True) if not values["execution_match"]]
        assert min(right, default=9e9) > max(wrong, default=-9e9)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcde"), st.floats(-2, 2), max_size=5),
    st.floats(0.001, 10),
    st.lists(unit, min_size=5, max_size=5),
    st.lists(unit, min_size=5, max_size=5),
)
def test_is_ordered_promises_only_what_holds(others, outcome, right, wrong):
    weights = {"outcome": outcome, **others}
    if is_ordered(weights, "outcome"):
        best_wrong = sum(weight * value for weight, value in zip(others.values(), wrong, strict=False))
        worst_right = outcome + sum(weight * value for weight, value in zip(others.values(), right, strict=False))
        assert worst_right > best_wrong


def test_the_published_weights_are_not_ordered_and_the_oracles_show_it():
    assert is_ordered(ORDERED, "execution_match")
    assert not is_ordered(REASONING_SQL, "execution_match")
    names = {"exec": "execution_match", "judge": "structure_match_if_wrong", "syntax": "executes",
             "schema": "schema_overlap", "ngram": "ngram_overlap", "format": "format_ok"}  # fmt: skip
    totals = {}
    for case in ("max_correct", "max_wrong", "correct_low_overlap"):
        values = {names[name]: value for name, value in ORACLES[case]["inputs"].items()}
        totals[case] = total(REASONING_SQL, values)
        assert totals[case] == pytest.approx(ORACLES[case]["expected"])
    assert totals["correct_low_overlap"] == pytest.approx(5.6)
    assert totals["correct_low_overlap"] < totals["max_wrong"] == 6.0


def test_decoupled_normalisation_breaks_the_order():
    group = [(1.0, 0.0)] * 4 + [(0.0, 0.01)] + [(0.0, 0.0)] * 3  # (outcome, all partial credit together)
    weights = (3.0, 2.5)
    columns = [advantages([reward * 100 for reward in column]) for column in zip(*group, strict=True)]
    decoupled = [sum(w * a for w, a in zip(weights, row, strict=True)) for row in zip(*columns, strict=True)]
    summed = advantages([sum(w * r for w, r in zip(weights, row, strict=True)) for row in group])
    assert summed[0] > summed[4]
    assert decoupled[0] < decoupled[4]


def test_every_weighted_component_is_a_reward_of_this_package():
    assert all(callable(getattr(sql, name)) for name in {**ORDERED, **REASONING_SQL})
