"""Advantages: closed forms on a few numbers, identities, the paper's worked examples."""

import json
import math
from pathlib import Path

import pytest
import torch

from core.objective.advantage import decoupled_sum, group_advantages, no_spread, weighted_sum
from core.objective.group import Group
from core.objective.recipes import RECIPES, gdpo, grpo, rloo

NAN = math.nan
ORACLES = {case["case"]: case for case in json.loads((Path(__file__).parent / "oracles.json").read_text())}


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def group(rewards, **fields):
    rewards = rewards if isinstance(rewards, torch.Tensor) else doubles(rewards)
    return Group(rewards=rewards, weights=torch.ones(rewards.shape[2]), **fields)


def random_rewards(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got, expected, tolerance=1e-12):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# mean .25, squared deviations (.5625 + 3 * .0625) = .75: std .5 (ddof 1), sqrt(.1875) (ddof 0)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"scale": "none"}, [0.75, -0.25, -0.25, -0.25]),
        ({"eps": 0.0}, [1.5, -0.5, -0.5, -0.5]),
        ({}, [0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001]),
        ({"eps": 0.0, "ddof": 0}, [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)]),
        ({"baseline": "leave_one_out", "scale": "none"}, [1.0, -1 / 3, -1 / 3, -1 / 3]),
        ({"baseline": "none", "scale": "none"}, [1.0, 0.0, 0.0, 0.0]),
        ({"baseline": "none", "eps": 0.0}, [2.0, 0.0, 0.0, 0.0]),
    ],
)
def test_closed_form_of_one_success_in_four(options, expected):
    close(group_advantages(doubles([[1.0, 0.0, 0.0, 0.0]]), **options), doubles([expected]))


def test_batch_statistics_span_the_groups():
    reward = doubles([[0.0, 2.0], [4.0, 6.0]])  # mean 3, squared deviations 9 + 1 + 1 + 9 = 20
    std = (20 / 3) ** 0.5
    close(group_advantages(reward, scale="batch", eps=0.0), doubles([[-1, 1], [-1, 1]]) / std)
    close(group_advantages(reward, baseline="batch", scale="batch", eps=0.0), doubles([[-3, -1], [1, 3]]) / std)


def test_leave_one_out_is_the_mean_baseline_stretched():
    reward = random_rewards(5, 7)
    stretched = group_advantages(reward, scale="none") * 7 / 6
    close(group_advantages(reward, baseline="leave_one_out", scale="none"), stretched)


def test_only_scored_rollout_of_a_group_gets_zero():
    for baseline in ("mean", "leave_one_out"):
        for scale in ("group", "none"):
            got = group_advantages(doubles([[NAN, 0.7, NAN]]), baseline=baseline, scale=scale)
            assert got.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_group_with_equal_rewards_gets_exactly_zero(recipe, dtype):
    """Also where the mean of equal numbers is not that number in floating point (eight times 0.7)."""
    rewards = torch.full((3, 8, 2), 0.7, dtype=dtype)
    credit = recipe.credit(group(rewards, outcome=0))
    assert credit.advantage.tolist() == [0] * 24
    assert credit.metrics["zero_spread"] == credit.metrics["zero_spread_outcome"] == 1


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_shift_of_a_component_changes_nothing(recipe):
    rewards = random_rewards(4, 5, 2)
    shifted = rewards + doubles([3.0, -2.0])
    close(recipe.credit(group(rewards)).advantage, recipe.credit(group(shifted)).advantage, 1e-9)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_permutation_of_rollouts_and_of_groups_permutes_advantages(recipe):
    rewards, rollouts, prompts = random_rewards(4, 5, 2), torch.tensor([3, 0, 4, 1, 2]), torch.tensor([2, 0, 3, 1])
    got = recipe.credit(group(rewards[prompts][:, rollouts])).advantage.view(4, 5)
    close(got, recipe.credit(group(rewards)).advantage.view(4, 5)[prompts][:, rollouts])


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_advantages_of_a_group_sum_to_zero(recipe):
    close(recipe.credit(group(random_rewards(4, 5, 2))).advantage.view(4, 5).sum(1), torch.zeros(4).double(), 1e-9)


def test_weights_multiply_components():
    rewards = random_rewards(2, 3, 2)
    total = weighted_sum(rewards, Group(rewards=rewards, weights=doubles([3.0, -1.0])))
    close(total, 3 * rewards[..., 0] - rewards[..., 1])


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_aligned_rewards_are_credited_decision_by_decision(recipe):
    rewards = random_rewards(3, 4, 2, 5)
    rewards[0, 1, :, 2] = NAN  # one unobserved cell: out of that decision's statistics alone
    credit = recipe.credit(group(rewards, aligned=True))
    assert credit.advantage.shape == (12, 5)
    assert credit.advantage[1, 2] == 0
    assert credit.keep.tolist() == [1] * 12
    for t in range(5):
        close(credit.advantage[:, t], recipe.credit(group(rewards[..., t])).advantage)


def test_gdpo_two_groups_two_rewards():
    """arXiv 2601.05242, worked example in float64; ddof 1 throughout."""
    case = ORACLES["two_groups_two_rewards"]
    tolerance, expected, given = case["tolerance"], case["expected"], group(case["inputs"]["rewards"])

    def equals(got, name):
        torch.testing.assert_close(got, doubles(expected[name]), **tolerance)

    equals(group_advantages(given.rewards), "z")
    equals(decoupled_sum(given.rewards, given), "pre_whitening")
    equals(gdpo.credit(given).advantage.view(2, 4), "advantage")
    equals(grpo.credit(given).advantage.view(2, 4), "grpo_on_sums")


def test_gdpo_collapse():
    """Sum-then-normalise gives one and two satisfied rewards the same advantage; decoupled normalisation does not."""
    case = ORACLES["collapse"]
    for rewards, count in (("group_one_reward", "one_reward"), ("group_two_rewards", "two_rewards")):
        given = group([case["inputs"][rewards]])
        for recipe, name in ((grpo, "grpo"), (gdpo(baseline="none", scale="none"), "gdpo_pre_whitening")):
            expected = doubles(case["expected"][f"{name}_{count}"])
            torch.testing.assert_close(recipe.credit(given).advantage, expected, **case["tolerance"])


def test_no_spread_is_exact_and_ignores_the_unscored():
    reward = torch.tensor([[0.5, NAN, 0.5], [0.5, 0.5, 0.5 + 2**-24], [NAN, NAN, 1.0], [NAN, NAN, NAN]])
    assert no_spread(reward).squeeze(1).tolist() == [True, False, True, True]


def test_filter_looks_at_the_outcome_alone():
    rewards = [
        [[0.0, 0.1], [0.0, 0.9]],  # outcome without spread, another component with: dropped
        [[0.0, 0.5], [1.0, 0.5]],  # the other way round: kept
        [[1.0, 0.0], [0.0, 1.0]],  # the total has no spread, the outcome has: kept
    ]
    credit = grpo(filter="outcome").credit(group(rewards, outcome=0))
    assert credit.keep.tolist() == [0, 0, 1, 1, 1, 1]
    assert credit.advantage[:2].tolist() == [0, 0]
    assert credit.advantage[2] < 0 < credit.advantage[3]
    third = pytest.approx(1 / 3)
    assert (credit.metrics["zero_spread"], credit.metrics["zero_spread_outcome"]) == (third, third)
    assert (credit.metrics["dropped"], credit.metrics["unscored"]) == (third, 0)
    assert grpo.credit(group(rewards, outcome=0)).keep.tolist() == [1] * 6


def test_filter_without_an_outcome_is_refused():
    with pytest.raises(ValueError, match="filter=outcome"):
        grpo(filter="outcome").credit(group([[[0.0], [1.0]]]))


def test_advantage_std_is_over_kept_rows_and_their_decisions():
    credit = rloo.credit(group([[[0.0], [1.0], [NAN]]]))
    assert credit.metrics["advantage_std"] == pytest.approx(1.0)
    mask = torch.tensor([[1, 0], [1, 0]])
    credit = rloo.credit(group([[[[0.0, 0.0]], [[1.0, 9.0]]]], aligned=True, mask=mask))
    assert credit.metrics["advantage_std"] == pytest.approx(1.0)
