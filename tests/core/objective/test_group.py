"""What a Group refuses and answers, and what a recipe makes of rollouts that could not be scored."""

import math

import pytest
import torch

from core.objective.composition import ASKED
from core.objective.group import Group
from core.objective.recipes import RECIPES, grpo, red_drop

NAN = math.nan


def group(rewards, **fields):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    return Group(rewards=rewards, weights=torch.ones(rewards.shape[2]), **fields)


def zeros(*shape, **fields):
    rewards = torch.zeros(*shape)
    return {"rewards": rewards, "weights": torch.ones(rewards.shape[2:3])} | fields


def test_reward_per_decision_is_refused_unless_the_policy_is_aligned():
    with pytest.raises(ValueError, match="not aligned"):
        Group(**zeros(1, 2, 1, 3))
    Group(**zeros(1, 2, 1, 3), aligned=True)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_reward_is_refused_by_the_component_s_name(value):
    with pytest.raises(ValueError, match="'schema' has a reward that is not finite"):
        group([[[0.0, 1.0], [1.0, value]]], names=("execution", "schema"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rewards": torch.zeros(2, 2), "weights": torch.ones(1)}, "must be float"),
        ({"rewards": torch.zeros(1, 2, 1, dtype=torch.long), "weights": torch.ones(1)}, "must be float"),
        (zeros(1, 2, 2, weights=torch.ones(3)), "weights for 2 reward components"),
        (zeros(1, 2, 1, weights=torch.tensor([NAN])), "weight that is not finite"),
        (zeros(1, 2, 1, names=("a", "b")), "2 names for 1"),
        (zeros(1, 2, 1, outcome=1), "outcome=1"),
        (zeros(1, 2, 1, outcome=-1), "outcome=-1"),
        (zeros(1, 2, 1, failed=torch.zeros(2, 1)), "failed has shape"),
        (zeros(1, 2, 1, mask=torch.ones(3, 4)), r"expected \(2, T\)"),
        (zeros(1, 2, 1, 3, aligned=True, mask=torch.ones(2, 4)), r"mask has shape \(2, 4\); expected \(2, 3\)"),
        (zeros(1, 2, 1, mask=torch.ones(2, 3), old_logps=torch.zeros(2)), "old_logps has shape"),
        (
            zeros(1, 2, 1, old_logps=torch.zeros(2, 3)),
            r"old_logps of shape \(2, 3\) need a mask of that shape, not None",
        ),
        (
            zeros(1, 2, 1, mask=torch.ones(2, 1), old_logps=torch.zeros(2, 3)),
            r"need a mask of that shape, not \(2, 1\)",
        ),
        (zeros(1, 2, 1, segments=torch.zeros(2).long()), r"segments has shape \(2,\); expected \(2, T\)"),
        (zeros(1, 2, 1, 3, aligned=True, segments=torch.zeros(2, 4).long()), r"segments has .* expected \(2, 3\)"),
        (
            zeros(1, 2, 1, mask=torch.ones(2, 3), segments=torch.zeros(2, 4).long()),
            r"segments of shape \(2, 4\) do not fit a mask of \(2, 3\)",
        ),
        (zeros(1, 2, 1, segments=torch.zeros(2, 3)), "segments are torch.float32; they must be whole numbers"),
        (zeros(1, 2, 1, segments=torch.zeros(2, 3).bool()), "segments are torch.bool"),
        (zeros(1, 2, 1, segments=torch.tensor([[0, -1], [0, 0]])), "segments go from -1 to 0; a row of 2 decisions"),
        (zeros(1, 2, 1, segments=torch.tensor([[0, 1], [0, 2]])), "from 0 to 2; .* number them from 0 to 1"),
        (zeros(2, 2, 1, task=torch.zeros(4)), r"task has shape \(4,\); expected \(2,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Group(**fields)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_segments_of_any_whole_numbers_below_the_number_of_decisions_are_taken(dtype):
    Group(**zeros(1, 2, 1, 3, aligned=True, segments=torch.tensor([[0, 2, 0], [1, 1, 1]]).to(dtype)))
    Group(**zeros(1, 2, 1, segments=torch.zeros(2, 0, dtype=dtype)))


def test_component_is_found_by_name():
    assert group([[[0.0, 1.0]]], names=("right", "short")).index("short") == 1
    with pytest.raises(ValueError, match="no reward component is called 'sort'; there are: right, short"):
        group([[[0.0, 1.0]]], names=("right", "short")).index("sort")


def test_right_is_success_reached_by_the_outcome_and_by_the_mean_of_its_decisions():
    given = group([[[1.0, 0.0], [0.5, 1.0], [NAN, 1.0]]], outcome=0)
    assert given.right(1.0).tolist() == [[True, False, False]]
    assert given.right(0.5).tolist() == [[True, True, False]]
    several = group([[[[1.0, 1.0]], [[1.0, 0.0]], [[NAN, 1.0]], [[NAN, NAN]]]], outcome=0, aligned=True)
    assert several.right(1.0).tolist() == [[True, False, True, False]]
    assert several.right(0.5).tolist() == [[True, True, True, False]]


def test_log_probability_of_a_rollout_is_the_mean_over_its_mask():
    mask = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 1, 1]])
    old = torch.tensor([[-1.0, -2.0, NAN], [NAN, -3.0, 7.0], [NAN, NAN, NAN], [-1.0, -1.0, -4.0]])
    given = group([[[0.0], [0.0]], [[0.0], [0.0]]], mask=mask, old_logps=old)
    assert given.sequence_logps().tolist() == [[-1.5, -3.0], [0.0, -2.0]]


def test_rollout_is_scored_if_a_component_with_a_weight_applies():
    rewards = torch.tensor([[[1.0, NAN], [NAN, 1.0], [NAN, NAN], [1.0, 1.0]]])
    failed = torch.tensor([[False, False, False, True]])
    assert Group(rewards=rewards, weights=torch.ones(2)).scored.tolist() == [[True, True, False, True]]
    given = Group(rewards=rewards, weights=torch.tensor([0.0, 1.0]), failed=failed)
    assert given.scored.tolist() == [[False, True, False, False]]
    assert rewards[0, 3].tolist() == [1, 1]  # the caller's own are not touched


# Those that ask no model and need no reward per decision.
PLAIN = [recipe for recipe in RECIPES.values() if not recipe.needs & {*ASKED, "aligned"}]
plain = pytest.mark.parametrize("recipe", PLAIN, ids=lambda recipe: recipe.name)


def full(rewards, **fields):
    """rewards (1, G, 3); the likelihoods of rollouts fall from first to last."""
    rows = len(rewards[0])
    old = -torch.arange(1.0, rows + 1).unsqueeze(1).double()
    names = ("quality", "safety", "answer")
    return group(rewards, names=names, outcome=0, mask=torch.ones(rows, 1), old_logps=old, **fields)


@plain
def test_group_of_one_is_refused_or_worth_nothing(recipe):
    """A virtual rollout beside it makes two."""
    if recipe.name in ("ngrpo", "gaussian_rank", "mc_grpo"):
        credit = recipe.credit(full([[[0.5, 0.5, 0.5]]]))
        assert credit.advantage.item() == pytest.approx(-(0.5**0.5) if recipe.name == "ngrpo" else 0.0, abs=1e-5)
        return
    with pytest.raises(ValueError, match="group_size=1"):
        recipe.credit(full([[[1.0, 1.0, 1.0]]]))


def test_group_of_one_is_allowed_without_group_statistics():
    assert grpo(baseline="none", scale="none").credit(group([[[0.5]]])).advantage.tolist() == [0.5]


@pytest.mark.parametrize("recipe", [r for r in PLAIN if r is not red_drop], ids=lambda recipe: recipe.name)
def test_unscored_rollout_has_no_weight_and_is_out_of_the_baseline(recipe):
    """Whether all its components are missing or its check failed: the others are worth the same without it."""
    others = [[0.0, 0.5, 0.0], [1.0, 0.5, 0.25], [1.0, 1.0, 1.0]]
    nothing = [[NAN, NAN, NAN]] * 2
    missing = recipe.credit(full([[*others, *nothing]]))
    failed = recipe.credit(full([[*others, *[[1.0, 0.5, 0.5]] * 2]], failed=torch.tensor([[False] * 3 + [True] * 2])))
    without = recipe.credit(full([others]))
    for credit in (missing, failed):
        assert credit.keep.tolist() == [*without.keep.tolist(), 0, 0]
        assert credit.advantage[3:].tolist() == [0, 0]
        torch.testing.assert_close(credit.advantage[:3], without.advantage, rtol=1e-12, atol=1e-12)
        assert credit.metrics["unscored"] == pytest.approx(0.4)
        assert credit.metrics["dropped"] == pytest.approx(1 - without.keep.sum().item() / 5)


@plain
def test_batch_without_any_scored_rollout_is_all_zero(recipe):
    for name in ("none", "outcome", "all_right"):
        credit = recipe(filter=name).credit(full([[[NAN] * 3] * 3]))
        assert credit.advantage.tolist() == [0, 0, 0]
        assert credit.keep.tolist() == [0, 0, 0]
        assert credit.metrics["advantage_std"] == 0
        assert credit.metrics["unscored"] == 1


def test_component_that_does_not_apply_counts_as_zero_in_the_sum():
    credit = grpo(scale="none").credit(group([[[1.0, NAN], [1.0, 1.0]]]))
    assert credit.advantage.tolist() == [-0.5, 0.5]
    assert credit.keep.tolist() == [1, 1]
