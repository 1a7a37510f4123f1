"""What a Group refuses, and what a recipe makes of rollouts that could not be scored."""

import math

import pytest
import torch

from core.objective.group import Group
from core.objective.recipes import RECIPES, grpo

NAN = math.nan


def group(rewards, **fields):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    return Group(rewards=rewards, weights=torch.ones(rewards.shape[2]), **fields)


def test_reward_per_decision_is_refused_unless_the_policy_is_aligned():
    rewards = torch.zeros(1, 2, 1, 3)
    with pytest.raises(ValueError, match="not aligned"):
        Group(rewards=rewards, weights=torch.ones(1))
    Group(rewards=rewards, weights=torch.ones(1), aligned=True)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_reward_is_refused_by_the_component_s_name(value):
    with pytest.raises(ValueError, match="'schema' has a reward that is not finite"):
        group([[[0.0, 1.0], [1.0, value]]], names=("execution", "schema"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rewards": torch.zeros(2, 2), "weights": torch.ones(1)}, "must be float"),
        ({"rewards": torch.zeros(1, 2, 1, dtype=torch.long), "weights": torch.ones(1)}, "must be float"),
        ({"rewards": torch.zeros(1, 2, 2), "weights": torch.ones(3)}, "weights for 2 reward components"),
        ({"rewards": torch.zeros(1, 2, 1), "weights": torch.tensor([NAN])}, "weight that is not finite"),
        ({"rewards": torch.zeros(1, 2, 1), "weights": torch.ones(1), "names": ("a", "b")}, "2 names for 1"),
        ({"rewards": torch.zeros(1, 2, 1), "weights": torch.ones(1), "outcome": 1}, "outcome=1"),
        ({"rewards": torch.zeros(1, 2, 1), "weights": torch.ones(1), "failed": torch.zeros(2, 1)}, "failed has shape"),
        ({"rewards": torch.zeros(1, 2, 1), "weights": torch.ones(1), "mask": torch.ones(3, 4)}, r"expected \(2, T\)"),
        (
            {"rewards": torch.zeros(1, 2, 1, 3), "weights": torch.ones(1), "aligned": True, "mask": torch.ones(2, 4)},
            r"expected \(2, 3\)",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Group(**fields)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_group_of_one_is_refused(recipe):
    with pytest.raises(ValueError, match="group_size=1"):
        recipe.credit(group([[[1.0]]]))


def test_group_of_one_is_allowed_without_group_statistics():
    assert grpo(baseline="none", scale="none").credit(group([[[0.5]]])).advantage.tolist() == [0.5]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_unscored_rollout_has_no_weight_and_is_out_of_the_baseline(recipe):
    """Whether all its components are missing or its check failed: the others are worth the same without it."""
    others = [[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    missing = recipe.credit(group([[*others, [NAN, NAN]]]))
    failed = recipe.credit(group([[*others, [1.0, 0.5]]], failed=torch.tensor([[False, False, False, True]])))
    without = recipe.credit(group([others]))
    for credit in (missing, failed):
        assert credit.keep.tolist() == [1, 1, 1, 0]
        assert credit.advantage[3] == 0
        torch.testing.assert_close(credit.advantage[:3], without.advantage, rtol=1e-12, atol=1e-12)
        assert credit.metrics["unscored"] == credit.metrics["dropped"] == 0.25


def test_component_that_does_not_apply_counts_as_zero_in_the_sum():
    credit = grpo(scale="none").credit(group([[[1.0, NAN], [1.0, 1.0]]]))
    assert credit.advantage.tolist() == [-0.5, 0.5]
    assert credit.keep.tolist() == [1, 1]


def test_batch_without_any_scored_rollout_is_all_zero():
    credit = grpo(filter="outcome").credit(group([[[NAN], [NAN]]], outcome=0))
    assert credit.advantage.tolist() == [0, 0]
    assert credit.keep.tolist() == [0, 0]
    assert credit.metrics["advantage_std"] == 0
