"""From components to one reward: closed forms, slow twins, edges. Worked examples are in test_oracles.py."""

import math
from itertools import permutations, product
from statistics import mean, stdev

import pytest
import torch

from core.objective.advantage import group_advantages
from core.objective.aggregation import (
    decoupled_sum,
    favour_unlikely,
    gated_mean,
    group_range_sum,
    share_credit,
    weighted_sum,
)
from core.objective.group import Group
from core.objective.recipes import gdpo, grpo, safety_gated, unlikeliness

NAN = math.nan
AXES = ("politeness", "meaningfulness", "actionability", "safety")


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def random_rewards(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got, expected, tolerance=1e-12):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def group(rewards, weights=None, **fields):
    rewards = rewards if isinstance(rewards, torch.Tensor) else doubles(rewards)
    weights = torch.ones(rewards.shape[2]) if weights is None else torch.tensor(weights)
    return Group(rewards=rewards, weights=weights, **fields)


def of(function, given, **options):
    return function(given.rewards, given, **options)


@pytest.mark.parametrize("function", [weighted_sum, decoupled_sum, gated_mean, group_range_sum])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decisions_are_aggregated_one_by_one(function, dtype):
    rewards = random_rewards(2, 5, 4, 3).to(dtype)
    rewards[0, 1, 2, 0] = rewards[1, 3, :, 1] = NAN
    weights = [1.0, 0.5, 2.0, 1.5]
    got = of(function, group(rewards, weights, names=AXES, aligned=True))
    assert (got.dtype, got.shape) == (dtype, (2, 5, 3))
    assert got.isnan().sum() == got.isnan()[1, 3, 1] == 1
    for t in range(3):
        close(got[..., t], of(function, group(rewards[..., t], weights, names=AXES)), 1e-5)


# -- credit for blocks --------------------------------------------------------------------------------------------------


def cells(*shape, seed=0):
    """Rewards (P, G, K, T) with holes, a mask that leaves cells out, and segments that differ from row to row."""
    rewards = random_rewards(*shape, seed=seed)
    chance = torch.Generator().manual_seed(seed + 1)
    prompts, size, _, decisions = shape
    rewards[torch.rand(shape, generator=chance) < 0.3] = NAN
    rewards[0, 1] = NAN  # not scored
    mask = (torch.rand(prompts * size, decisions, generator=chance) < 0.7).long()
    segments = torch.randint(3, (prompts * size, decisions), generator=chance)
    return group(rewards, mask=mask, segments=segments, aligned=True)


@pytest.mark.parametrize("credit", ["segment", "rollout"])
def test_credit_of_a_block_by_the_slow_loop(credit):
    given = cells(3, 4, 2, 9)
    got = of(share_credit, given, credit=credit)
    assert (got.shape, got.dtype) == (given.rewards.shape, given.rewards.dtype)
    alone = 0
    for p, g, k, t in product(range(3), range(4), range(2), range(9)):
        row = p * 4 + g
        block = [
            given.rewards[p, g, k, other].item()
            for other in range(9)
            if given.mask[row, other] and not given.rewards[p, g, k, other].isnan()
            if credit == "rollout" or given.segments[row, other] == given.segments[row, t]
        ]
        alone += not block
        assert got[p, g, k, t].item() == pytest.approx(mean(block) if block else NAN, rel=1e-12, nan_ok=True)
    assert (
        alone == 18 if credit == "rollout" else alone > 18
    )  # the rollout that was not scored, and blocks without a reward


def test_one_block_is_the_rollout_and_blocks_of_one_are_decisions():
    given = cells(2, 3, 2, 5)
    given.segments = torch.zeros(6, 5).long()
    torch.testing.assert_close(
        of(share_credit, given, credit="segment"), of(share_credit, given, credit="rollout"), equal_nan=True
    )
    given.segments, given.mask = torch.arange(5).expand(6, 5), torch.ones(6, 5)
    close(of(share_credit, given, credit="segment"), given.rewards)
    assert of(share_credit, given, credit="decision") is of(share_credit, given) is given.rewards


def test_equal_blocks_have_equal_means_whatever_their_order():
    """In float32 the sum of these depends on the order, and a rounding error would be a contrast."""
    values = random_rewards(999).float()
    backwards = values.flip(0)
    assert values.sum() != backwards.sum()
    given = group(torch.stack([values, backwards]).view(1, 2, 1, 999), aligned=True)
    given.segments = torch.zeros(2, 999).long()
    for credit in ("segment", "rollout"):
        got = of(share_credit, given, credit=credit)
        assert got.dtype == torch.float32
        assert (got == got[0, 0, 0, 0]).all()


def test_credit_without_what_it_shares_is_refused():
    whole, each = group(random_rewards(2, 3, 1)), group(random_rewards(2, 3, 1, 4), aligned=True)
    assert of(share_credit, whole, credit="rollout") is whole.rewards
    for credit in ("decision", "segment"):
        with pytest.raises(ValueError, match=f"credit={credit} needs one reward per decision.*use credit=rollout"):
            of(share_credit, whole, credit=credit)
    with pytest.raises(ValueError, match=r"credit=segment needs blocks .* the group has no segments"):
        of(share_credit, each, credit="segment")


# -- plain sum ----------------------------------------------------------------------------------------------------------


def test_weighted_sum_by_hand():
    got = of(weighted_sum, group([[[1.0, 0.5], [NAN, 0.5], [NAN, NAN]]], [3.0, -1.0]))
    close(got, doubles([[2.5, -0.5, NAN]]))


def test_component_without_a_weight_makes_no_sum():
    close(of(weighted_sum, group([[[1.0, NAN], [0.0, 1.0]]], [0.0, 1.0])), doubles([[NAN, 1.0]]))


# -- decoupled ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ddof", [0, 1])
def test_decoupled_sum_by_the_slow_loop(ddof):
    """A component that does not apply to a rollout is out of that component's statistics and adds nothing to the sum."""
    rewards, weights = random_rewards(3, 6, 3), [1.0, 2.0, 0.25]
    rewards[0, 1, 0] = rewards[0, 2, 0] = rewards[1, 4, 1] = rewards[2, :, 2] = rewards[2, 5] = NAN
    got = of(decoupled_sum, group(rewards, weights), ddof=ddof)
    for p in range(3):
        total = [0.0] * 6
        for k, weight in enumerate(weights):
            column = rewards[p, :, k].tolist()
            scored = [r for r in column if not math.isnan(r)]
            if scored:
                scale = stdev(scored) * ((len(scored) - 1) / (len(scored) - ddof)) ** 0.5 + 1e-4
                total = [
                    t if math.isnan(r) else t + weight * (r - mean(scored)) / scale
                    for t, r in zip(total, column, strict=True)
                ]
        total = [NAN if rewards[p, i].isnan().all() else t for i, t in enumerate(total)]
        close(got[p], doubles(total))


def test_decoupled_components_lose_their_own_shift_and_scale():
    rewards = random_rewards(2, 5, 3)
    moved = rewards * doubles([1.0, 1e6, 0.01]) + doubles([0.0, 1e6, -4.0])
    close(of(decoupled_sum, group(moved), eps=0.0), of(decoupled_sum, group(rewards), eps=0.0), 1e-9)


def test_range_within_the_group_by_hand():
    """Decibels beside a share; a component that all agree on; one that does not apply everywhere, and one that nowhere does."""
    rewards = [[[30.0, 0.2, 0.7, 5.0, NAN], [20.0, 0.6, 0.7, NAN, NAN], [24.0, 0.3, 0.7, 3.0, NAN], [NAN] * 5]]
    weights = [1.0, 0.5, 2.0, 4.0, 8.0]
    half, expected = 1.0, [[1.0 + 0.0 + 4.0, 0.0 + 0.5, 0.4 + 0.125 + 0.0, NAN]]
    close(of(group_range_sum, group(rewards, weights)), half + doubles(expected))


def test_range_sum_forgets_each_component_s_shift_and_scale_and_no_other_group():
    rewards = random_rewards(3, 5, 2)
    plain = of(group_range_sum, group(rewards, [1.0, 2.0]))
    close(of(group_range_sum, group(rewards * doubles([60.0, 1e-3]) + doubles([-5.0, 2.0]), [1.0, 2.0])), plain)
    close(of(group_range_sum, group(rewards[1:2], [1.0, 2.0])), plain[1:2])
    assert ((plain > 0) & (plain <= 3)).any(dim=1).all()
    for k in range(2):
        ranged = of(group_range_sum, group(rewards, [1.0 - k, 0.0 + k]))
        assert (ranged.amin(1).tolist(), ranged.amax(1).tolist()) == ([0] * 3, [1] * 3)


def test_component_without_spread_adds_exactly_nothing():
    rewards = random_rewards(2, 7, 2).float()
    rewards[..., 1] = 0.7
    alone = group_advantages(rewards[..., 0])
    assert torch.equal(of(decoupled_sum, group(rewards)), alone)
    close(of(gdpo.aggregate, group(rewards[..., :1])), alone)


def test_decoupled_sum_lets_a_wrong_answer_outscore_a_right_one():
    """Half of them right: z = +-.866. The one that alone is short: z = 1.5, whatever its weight meant before."""
    rewards = doubles([[[1.0, 0.0], [1.0, 0.0], [0.0, 0.01], [0.0, 0.0]]])
    assert of(weighted_sum, group(rewards)).argmax() == 0
    decoupled = of(decoupled_sum, group(rewards), eps=0.0)[0]
    close(decoupled[[0, 2]], doubles([0.75**0.5 - 0.5, 1.5 - 0.75**0.5]))
    assert decoupled.argmax() == 2


def test_decoupled_group_of_one_is_refused():
    with pytest.raises(ValueError, match="group_size=1"):
        of(decoupled_sum, group([[[1.0, 0.0]]]))


def test_gdpo_whitens_over_the_batch_what_applies():
    rewards = random_rewards(3, 4, 2)
    rewards[0, 0] = rewards[1, :, 1] = NAN
    given = group(rewards)
    total = of(decoupled_sum, given).flatten()
    scored = total[~total.isnan()]
    expected = (total - scored.mean()) / (scored.std() + 1e-4)
    credit = gdpo.credit(given)
    close(credit.advantage, expected.nan_to_num(0.0))
    assert credit.keep.tolist() == [0] + [1] * 11


# -- gated --------------------------------------------------------------------------------------------------------------


def test_gate_by_hand():
    """Weights 1, 1, 2: what does not apply hands its weight to the others; a gate that does not apply stops nothing."""
    rewards = [[[0.9, 0.4, 0.8], [0.9, NAN, 0.8], [1.0, 1.0, 0.4], [0.9, 0.4, NAN], [NAN, NAN, 0.5], [NAN, NAN, NAN]]]
    given = group(rewards, [1.0, 1.0, 2.0], names=("polite", "useful", "safety"))
    expected = [0.9 + 0.4 + 1.6, (0.9 + 1.6) / 3 * 4, -0.6, (0.9 + 0.4) / 2 * 4, 2.0, NAN]
    close(of(gated_mean, given), doubles([expected]))
    assert of(gated_mean, given, passing=0.4)[0, 2] > 0  # at `passing` it passes
    assert safety_gated.credit(given).keep.tolist() == [1, 1, 1, 1, 1, 0]


def test_what_the_gate_stops_ranks_below_all_it_lets_through():
    rewards = random_rewards(1, 4000, 4)
    rewards[rewards < 0.1] = 0.0
    rewards[rewards > 0.9] = 1.0
    for passing in (0.2, 0.5, 1.0):
        got = of(gated_mean, group(rewards, [1.0, 3.0, 0.5, 0.0], names=AXES), passing=passing)[0]
        stopped = rewards[0, :, 3] < passing
        assert 0 < stopped.sum() < 4000
        assert got[stopped].max() < 0 <= got[~stopped].min()


def test_open_gate_is_the_weighted_sum():
    given = group(random_rewards(2, 5, 4), [0.25, 0.5, 1.0, 2.0], names=AXES)
    close(of(gated_mean, given, passing=0.0), of(weighted_sum, given))


def test_gate_without_a_weight_decides_and_does_not_count():
    """And makes no rollout scored: one that nothing else applies to stays out of the baseline, stopped or not."""
    given = group([[[0.6, 0.9], [0.6, 0.1], [NAN, 0.1], [NAN, 0.9]]], [2.0, 0.0], names=("useful", "safety"))
    close(of(gated_mean, given), doubles([[1.2, -0.9, NAN, NAN]]))
    credit = safety_gated(scale="none").credit(given)
    assert credit.keep.tolist() == [1, 1, 0, 0]
    close(credit.advantage, doubles([1.05, -1.05, 0, 0]))


def test_gate_that_is_not_there_and_weights_below_zero_are_refused():
    with pytest.raises(ValueError, match="no reward component is called 'safety'; there are: right, short"):
        of(gated_mean, group([[[1.0, 0.0], [0.0, 1.0]]], names=("right", "short")))
    with pytest.raises(ValueError, match=r"a gate needs weights >= 0, and one is -0\.5"):
        of(gated_mean, group([[[1.0, 0.0], [0.0, 1.0]]], [1.0, -0.5], names=("right", "safety")))


# -- unlikely first -----------------------------------------------------------------------------------------------------


def unlikely(outcomes, likely, **fields):
    """Outcomes (G,), mean log-probabilities (G,), as a group of one component."""
    logps = doubles(likely).unsqueeze(1)
    return group(doubles([outcomes]).unsqueeze(2), mask=torch.ones_like(logps), old_logps=logps, outcome=0, **fields)


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_factor_falls_with_the_rank_of_the_likelihood(order):
    likely = [-1.0, -0.5, -0.3, -0.1]
    given = unlikely([1.0] * 4, [likely[i] for i in order])
    close(of(favour_unlikely, given).flatten(), doubles([1 - 0.0625 * i for i in order]))
    text = of(favour_unlikely, given, rank_weight=0.4, rank_offset=1).flatten()
    close(text, doubles([1 - 0.1 * (i + 1) for i in order]))


def test_equal_likelihoods_share_their_mean_rank():
    got = of(favour_unlikely, unlikely([1.0] * 5, [-0.5, -0.2, -0.5, -0.5, -0.9]), rank_weight=1.0)
    close(got.flatten(), 1 - doubles([2.0, 4.0, 2.0, 2.0, 0.0]) / 5)
    got = of(favour_unlikely, unlikely([1.0] * 4, [-0.5] * 4), rank_weight=1.0)
    close(got.flatten(), doubles([1 - 1.5 / 4] * 4))


def test_only_positive_outcomes_are_scaled():
    """And a negative one is not helped. All wrong: nothing changes."""
    likely = [-0.4, -0.3, -0.2, -0.1]
    got = of(favour_unlikely, unlikely([0.0, -1.0, 0.5, 1.0], likely))
    close(got.flatten(), doubles([0.0, -1.0, 0.5 * (1 - 0.125), 1 - 0.1875]))
    given = unlikely([0.0] * 4, likely)
    assert torch.equal(of(favour_unlikely, given), given.rewards)


def test_other_components_and_the_group_s_own_rewards_stay_as_they_are():
    rewards, old = random_rewards(2, 3, 3), -random_rewards(6, 4)
    given = group(rewards.clone(), mask=torch.ones(6, 4), old_logps=old, outcome=1)
    got = of(favour_unlikely, given)
    assert torch.equal(got[..., [0, 2]], rewards[..., [0, 2]])
    assert torch.equal(given.rewards, rewards)
    assert (got[..., 1] <= rewards[..., 1]).all()


def test_every_decision_of_a_rollout_has_its_factor():
    rewards, old = random_rewards(1, 3, 1, 4), doubles([[-0.1] * 4, [-0.3] * 4, [-0.2] * 4])
    got = of(favour_unlikely, group(rewards, mask=torch.ones(3, 4), old_logps=old, outcome=0, aligned=True))
    close(got, rewards * (1 - 0.25 * doubles([2.0, 0.0, 1.0]) / 3).view(1, 3, 1, 1))


def test_likelihood_is_the_mean_over_the_mask():
    """A long rollout is not unlikely for its length, nor a padded one likely for its padding."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    old = doubles([[-0.2] * 4, [-0.3, -0.3, 9.0, NAN], [NAN] * 4])
    given = group([[[1.0], [1.0], [1.0]]], mask=mask, old_logps=old, outcome=0)
    close(of(favour_unlikely, given, rank_weight=0.75).flatten(), doubles([0.75, 1.0, 0.5]))


def test_unscored_rollout_has_no_rank():
    without = of(favour_unlikely, unlikely([1.0, 0.0, 1.0], [-0.5, -0.4, -0.1])).flatten()
    got = of(favour_unlikely, unlikely([1.0, NAN, 0.0, 1.0], [-0.5, -0.9, -0.4, -0.1])).flatten()
    close(got, doubles([without[0], NAN, without[1], without[2]]))


def test_all_right_group_is_pushed_by_ranks_alone_unless_it_is_filtered():
    given = unlikely([1.0] * 5, [-0.2, -0.5, -0.1, -0.9, -0.4])
    credit = unlikeliness.credit(given)
    assert credit.keep.tolist() == [0] * 5
    assert not credit.advantage.any()
    pushed = unlikeliness(filter="none").credit(given)
    assert pushed.keep.tolist() == [1] * 5
    assert pushed.advantage.argsort().tolist() == [2, 0, 4, 1, 3]  # the rarest most
    assert pushed.advantage.abs().max() == pytest.approx(1.26, abs=0.005)


def test_mixed_group_under_the_filter_is_that_without():
    given = unlikely([1.0, 0.0, 0.0, 0.0, 1.0], [-0.2, -0.5, -0.1, -0.9, -0.4])
    assert torch.equal(unlikeliness.credit(given).advantage, unlikeliness(filter="none").credit(given).advantage)
    likely, rare = unlikeliness.credit(given).advantage[[0, 4]]
    assert 0 < likely < grpo.credit(given).advantage[0] < rare


def test_unlikeliness_without_an_outcome_or_log_probabilities_is_refused():
    with pytest.raises(ValueError, match=r"unlikeliness needs log-probabilities .* and the group has no old_logps"):
        unlikeliness.credit(group([[[0.0], [1.0]]], outcome=0))
    given = unlikely([0.0, 1.0], [-0.1, -0.2])
    given.outcome = None
    with pytest.raises(ValueError, match="the group names none; set outcome="):
        unlikeliness.credit(given)
