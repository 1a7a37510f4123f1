"""Advantages: closed forms on a few numbers, slow twins, identities, edges. Worked examples are in test_oracles.py."""

import math
from functools import partial
from itertools import product
from statistics import NormalDist, mean, median, pstdev, stdev

import pytest
import torch

from core.objective.advantage import (
    anchored_values,
    balanced_advantages,
    group_advantages,
    keep_groups,
    median_advantages,
    no_spread,
    quantile_advantages,
    ranked_advantages,
    virtual_maximum,
)
from core.objective.aggregation import weighted_sum
from core.objective.composition import ASKED
from core.objective.group import Group
from core.objective.recipes import (
    RECIPES,
    forecast_grpo,
    gdpo,
    grpo,
    mc_grpo,
    ngrpo,
    red_drop,
    rloo,
    unlikeliness,
    value_anchored,
)

NAN = math.nan
DTYPES = [torch.float32, torch.float64]
AS_ONE = [0.1, 0.6, 0.7]  # weights: in float32 the first two add up to an ulp more than the third


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def random_rewards(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got, expected, tolerance=1e-12):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def group(rewards, **fields):
    """What every recipe that asks no model can use; rewards (P, G, 3)."""
    rewards = rewards if isinstance(rewards, torch.Tensor) else doubles(rewards)
    rows = (rewards.shape[0] * rewards.shape[1], *(rewards.shape[3:] or (2,)))
    old = -random_rewards(*rows, seed=9)
    given = {"mask": torch.ones(rows), "old_logps": old, "names": ("quality", "safety", "answer"), "outcome": 0}
    return Group(rewards=rewards, weights=torch.ones(rewards.shape[2]), **given | fields)


def bare(reward, **fields):
    """The group of one component, (P, G) or (P, G, T)."""
    return Group(rewards=reward.unsqueeze(2), weights=torch.ones(1), aligned=reward.dim() == 3, **fields)


def of(function, reward, **options):
    return function(reward, bare(reward), **options)


FUNCTIONS = {
    "mean": group_advantages,
    "leave_one_out": partial(group_advantages, baseline="leave_one_out", scale="none"),
    "log_mean_exp": partial(group_advantages, baseline="log_mean_exp"),
    "batch_scale": partial(group_advantages, scale="batch"),
    "batch": partial(group_advantages, baseline="batch", scale="batch"),
    "pooled": partial(group_advantages, scale="pooled"),
    "ranked": ranked_advantages,
    "virtual": partial(virtual_maximum, highest=1.0),
    "median": lambda reward, group: median_advantages(reward, group)[0],
    "quantile": quantile_advantages,
    "balanced": balanced_advantages,
    # a trajectory of one decision, without the push
    "values": lambda reward, group: anchored_values(reward.unsqueeze(2), group, anchor=0.0).squeeze(2),
}
BATCH = ("batch_scale", "batch", "pooled", "ranked")  # one group changes another
every = pytest.mark.parametrize("name", FUNCTIONS)
in_float = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
MOSTLY_GOOD = doubles([[0.9, 0.8, 0.75, 0.1, 0.2], [0.6, 0.3, 0.5, 0.1, 0.7]])  # no negative is dropped at random


# -- all functions ------------------------------------------------------------------------------------------------------


@every
def test_unscored_rollouts_get_zero_and_are_out_of_all_statistics(name):
    wide = torch.full((2, 7), NAN, dtype=torch.float64)
    wide[:, [0, 2, 3, 5, 6]] = MOSTLY_GOOD
    got = of(FUNCTIONS[name], wide)
    assert got[:, [1, 4]].tolist() == [[0, 0], [0, 0]]
    close(got[:, [0, 2, 3, 5, 6]], of(FUNCTIONS[name], MOSTLY_GOOD))


@every
@in_float
def test_batch_without_scored_rollouts_is_zero(name, dtype):
    assert of(FUNCTIONS[name], torch.full((2, 3), NAN, dtype=dtype)).tolist() == [[0] * 3] * 2


@every
def test_only_scored_rollout_gets_zero(name):
    """But for the virtual maximum, beside which it is not alone."""
    got = of(FUNCTIONS[name], doubles([[NAN, 0.7, NAN]]))
    expected = [[0, pytest.approx(-(0.5**0.5), abs=1e-5), 0]] if name == "virtual" else [[0, 0, 0]]
    assert got.tolist() == expected


@every
@in_float
def test_equal_rewards_get_exactly_zero(name, dtype):
    """Also where the mean of equal numbers is not that number in floating point (seven times 0.7)."""
    for value, size in product([0.1, 0.7, 1e6 + 0.1], [3, 5, 7, 9, 11]):
        function = FUNCTIONS[name] if name != "virtual" else partial(virtual_maximum, highest=value)
        assert of(function, torch.full((3, size), value, dtype=dtype)).tolist() == [[0] * size] * 3


def test_mean_of_equal_numbers_is_not_that_number():
    assert torch.full((7,), 0.7).mean() != torch.tensor(0.7)
    assert torch.full((8,), 0.7).mean() != torch.tensor(0.7)


@every
@in_float
def test_dtype_and_shape_are_those_of_the_rewards(name, dtype):
    got = of(FUNCTIONS[name], MOSTLY_GOOD.to(dtype))
    assert (got.dtype, got.shape) == (dtype, MOSTLY_GOOD.shape)
    close(got.double(), of(FUNCTIONS[name], MOSTLY_GOOD), 1e-5)


@every
def test_permutation_permutes(name):
    rollouts, prompts = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([1, 0])
    got = of(FUNCTIONS[name], MOSTLY_GOOD[prompts][:, rollouts])
    close(got, of(FUNCTIONS[name], MOSTLY_GOOD)[prompts][:, rollouts])


@every
def test_groups_are_independent_unless_statistics_are_the_batch_s(name):
    reward = random_rewards(2, 5)
    other = torch.cat([reward[:1], reward[1:] ** 2])
    same = torch.equal(of(FUNCTIONS[name], reward)[0], of(FUNCTIONS[name], other)[0])
    assert same == (name not in BATCH)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in ("median", "values", "pooled")])
def test_decisions_are_credited_one_by_one(name):
    reward = torch.stack([MOSTLY_GOOD, MOSTLY_GOOD**2], dim=2)
    reward[0, 1, 1] = NAN  # one unobserved cell: out of that decision's statistics alone
    got = of(FUNCTIONS[name], reward)
    assert got[0, 1, 1] == 0
    for t in range(2):
        close(got[..., t], of(FUNCTIONS[name], reward[..., t]))


@every
@in_float
def test_huge_rewards_stay_finite_and_in_order(name, dtype):
    function = FUNCTIONS[name] if name != "virtual" else partial(virtual_maximum, highest=1e6)
    reward = (MOSTLY_GOOD * 1e6).to(dtype)
    got = of(function, reward)
    assert got.isfinite().all()
    assert torch.equal(got.argsort(1), reward.argsort(1))


@pytest.mark.parametrize(
    ("function", "options", "scaled"),
    [
        (group_advantages, {"eps": 0.0}, {}),
        (group_advantages, {"eps": 0.0, "baseline": "batch", "scale": "batch"}, {}),
        (group_advantages, {"eps": 0.0, "baseline": "log_mean_exp"}, {"tau": 1e6}),
        (group_advantages, {"eps": 0.0, "scale": "pooled"}, {}),
        (ranked_advantages, {"eps": 0.0}, {}),
        (virtual_maximum, {"eps": 0.0}, {"highest": 1e6}),
        (lambda *given: median_advantages(*given, eps=0.0)[0], {}, {}),
        (quantile_advantages, {}, {}),
    ],
)
def test_scale_of_rewards_changes_nothing(function, options, scaled):
    close(of(function, MOSTLY_GOOD * 1e6, **options | scaled), of(function, MOSTLY_GOOD, **options), 1e-9)


@every
def test_shift_changes_nothing(name):
    """Of the virtual maximum if the highest is shifted too."""
    shifted = partial(virtual_maximum, highest=4.0) if name == "virtual" else FUNCTIONS[name]
    close(of(shifted, MOSTLY_GOOD + 3.0), of(FUNCTIONS[name], MOSTLY_GOOD), 1e-9)


# -- group_advantages ---------------------------------------------------------------------------------------------------


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


def test_pooled_scale_is_one_root_mean_square_of_what_the_baseline_leaves():
    reward = doubles([[0.0, 2.0], [4.0, 10.0], [7.0, NAN]])  # left: 1, 1, 3, 3, and 0 of the lone one
    scale = (20 / 5) ** 0.5
    close(group_advantages(reward, scale="pooled", eps=0.0), doubles([[-1, 1], [-3, 3], [0, 0]]) / scale)
    close(group_advantages(reward, scale="pooled", eps=0.5), doubles([[-1, 1], [-3, 3], [0, 0]]) / 2.5)
    plain = doubles([[1.0, 2.0], [3.0, NAN]])
    close(group_advantages(plain, baseline="none", scale="pooled", eps=0.0)[0], doubles([1.0, 2.0]) / (14 / 3) ** 0.5)


def test_pooled_scale_by_the_slow_loop_over_observed_decisions():
    reward = random_rewards(3, 4, 6)
    reward[0, 1, 2] = reward[2, :, 3] = reward[1, 0] = NAN
    mask = torch.ones(12, 6).long()
    mask[:, 4] = 0  # not observed
    reward[..., 4] *= 1e3  # and whatever stands there
    got = group_advantages(reward, bare(reward, mask=mask), scale="pooled", eps=1e-3)
    centred = {}
    for p, t in product(range(3), range(6)):
        known = [reward[p, g, t].item() for g in range(4) if not reward[p, g, t].isnan()]
        centred |= {(p, g, t): reward[p, g, t].item() - mean(known) for g in range(4) if not reward[p, g, t].isnan()}
    scale = mean(value**2 for (_, _, t), value in centred.items() if t != 4) ** 0.5 + 1e-3
    for p, g, t in product(range(3), range(4), range(6)):
        assert got[p, g, t].item() == pytest.approx(centred.get((p, g, t), 0.0) / scale, rel=1e-12, abs=1e-15)


def costs(scale):
    """The contrasts that a hit makes with a miss and a correct quiet with a false alarm, cell by cell; costs 0.8 and 0.2."""
    missed, alarmed = [0.2, 1.0, 0.2, 1.0], [1.0, 1.0, 1.0, 0.8]
    rewards = doubles([missed, alarmed]).T.view(1, 4, 1, 2)
    rewards = torch.cat([rewards, rewards.flip(1)])
    given = Group(rewards=rewards, weights=torch.ones(1), mask=torch.ones(8, 2), aligned=True)
    advantage = forecast_grpo(scale=scale, eps=0.0).credit(given).advantage.view(2, 4, 2)
    return (advantage.amax(1) - advantage.amin(1))[0].tolist()


def test_asymmetric_costs_survive_the_pooled_scale_and_no_scale_of_the_decision_s_own():
    """What a cell's own spread leaves is how rare an outcome is in its group, and nothing of what it costs."""
    miss, alarm = costs("pooled")
    assert miss / alarm == pytest.approx(0.8 / 0.2, rel=1e-12)
    for own in ("group", "batch"):
        miss, alarm = costs(own)
        assert miss < alarm  # one false alarm in four is further from the mean, in deviations, than two misses in four


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_pooled_advantages_have_mean_zero_at_every_decision(baseline):
    reward = random_rewards(3, 5, 7)
    reward[0, 2, 1] = reward[1, :, 4] = NAN
    advantage = of(group_advantages, reward, baseline=baseline, scale="pooled")
    close(advantage.sum(1), torch.zeros(3, 7).double())
    assert of(group_advantages, reward, scale="pooled", eps=0.0)[~reward.isnan()].square().mean() == pytest.approx(1.0)


def test_leave_one_out_is_the_mean_baseline_stretched():
    reward = random_rewards(5, 7)
    stretched = group_advantages(reward, scale="none") * 7 / 6
    close(group_advantages(reward, baseline="leave_one_out", scale="none"), stretched)


def test_log_mean_exp_lies_between_the_mean_and_the_best():
    def baseline(tau):
        return (reward - group_advantages(reward, baseline="log_mean_exp", scale="none", tau=tau))[0, 0].item()

    reward = doubles([[1.0, 0.0, 0.0, 0.0, 1.0]])
    assert baseline(1.0) == pytest.approx(math.log((2 * math.e + 3) / 5), rel=1e-14)
    assert baseline(1e-3) == pytest.approx(1.0, abs=1e-3)
    assert baseline(1e3) == pytest.approx(0.4, abs=1e-3)


def test_group_of_one_is_refused_where_it_has_no_statistics():
    reward = doubles([[0.7], [0.2]])
    for function in (group_advantages, balanced_advantages, ranked_advantages):
        with pytest.raises(ValueError, match="group_size=1"):
            of(function, reward)
    with pytest.raises(ValueError, match="group_size=1"):
        of(anchored_values, reward.unsqueeze(2))
    close(of(virtual_maximum, reward, eps=0.0), torch.full_like(reward, -(0.5**0.5)))  # whatever the reward, two differ
    assert not of(quantile_advantages, reward).any()
    advantage, keep = of(median_advantages, reward)
    assert not advantage.any()
    assert not keep.any()
    close(group_advantages(reward, baseline="none", scale="none"), reward)


def test_limit_cuts_the_greatest_advantages_and_nothing_else():
    reward = doubles([[0.0] * 49 + [1.0], [0.0, 1.0] * 25])
    plain, cut = (group_advantages(reward, limit=limit) for limit in (None, 5.0))
    assert plain[0, -1] > 6.9
    assert cut[0, -1] == 5.0
    assert torch.equal(cut[0, :-1], plain[0, :-1])
    assert torch.equal(cut[1], plain[1])
    assert group_advantages(-reward, limit=5.0)[0, -1] == -5.0


def test_no_spread_is_exact_and_ignores_the_unscored():
    reward = torch.tensor([[0.5, NAN, 0.5], [0.5, 0.5, 0.5 + 2**-24], [NAN, NAN, 1.0], [NAN, NAN, NAN]])
    assert no_spread(reward).squeeze(1).tolist() == [True, False, True, True]


# -- virtual maximum ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", range(1, 10))
def test_all_wrong_group_is_pushed_by_one_over_the_root_of_one_more(size):
    close(of(virtual_maximum, doubles([[0.0] * size]), eps=0.0), doubles([[-((size + 1) ** -0.5)] * size]))


@pytest.mark.parametrize("options", [{}, {"virtual": 3}, {"ddof": 0}, {"highest": 2.5, "eps": 0.1}])
def test_virtual_rollouts_are_rollouts_in_mean_and_deviation(options):
    rewards = random_rewards(4, 5) * 2 - 1
    for reward, got in zip(rewards.tolist(), of(virtual_maximum, rewards, **options).tolist(), strict=True):
        among = reward + [options.get("highest", 1.0)] * options.get("virtual", 1)
        scale = (pstdev if "ddof" in options else stdev)(among) + options.get("eps", 1e-6)
        assert got == pytest.approx([(r - mean(among)) / scale for r in reward])


def test_highest_reward_is_the_sum_of_the_positive_weights():
    given = Group(rewards=torch.ones(1, 3, 3), weights=torch.tensor([2.0, 1.0, -1.0]))
    assert not virtual_maximum(torch.full((1, 3), 3.0), given).any()
    with pytest.raises(ValueError, match=r"reward 3\.5 is above highest=3; set objective\.highest"):
        virtual_maximum(torch.tensor([[0.0, 3.5, 1.0]]), given)
    assert virtual_maximum(torch.tensor([[0.0, 3.5, 1.0]]), given, highest=3.5)[0, 1] > 0


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_reward_that_rounding_puts_beside_the_highest_is_at_it(scale):
    """Sums in another order end an ulp or two away, which eps = 1e-6 would not silence."""
    weights = torch.tensor([1.0, 2.0, 4.0]) * scale
    top = weights.sum()
    for beside in (top * (1 + 2e-7), top * (1 - 2e-7)):
        reward = torch.stack([top, beside, beside]).unsqueeze(0)
        assert (reward != top).any()
        assert not virtual_maximum(reward, Group(rewards=torch.ones(1, 3, 3), weights=weights)).any()


def test_ngrpo_drops_groups_that_are_all_right_and_keeps_those_that_are_all_wrong():
    credit = ngrpo.credit(Group(rewards=doubles([[[1.0], [1.0]], [[0.0], [0.0]]]), weights=torch.ones(1), outcome=0))
    assert credit.keep.tolist() == [0, 0, 1, 1]
    close(credit.advantage, doubles([0, 0, -(3**-0.5), -(3**-0.5)]), 1e-5)


# -- median -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("floor", [None, 0.0, 0.5])
def test_median_by_hand(size, floor):
    rewards = torch.cat([random_rewards(8, size), (random_rewards(8, size, seed=1) * 3).round() / 3])
    advantages, keep = of(median_advantages, rewards, mad_floor=floor)
    for reward, got, kept in zip(rewards.tolist(), advantages.tolist(), keep.tolist(), strict=True):
        centre = median(reward)
        scale = median(abs(r - centre) for r in reward)
        scale = (scale or stdev(reward)) if floor is None else max(scale, floor)
        active = sum(r != centre for r in reward)
        assert got == pytest.approx([(r - centre) / (scale + 1e-3) * size / max(active, 1) for r in reward])
        assert kept == [i != reward.index(centre) for i in range(size)]


@pytest.mark.parametrize("size", [3, 5, 7])
def test_right_or_wrong_rewards_have_no_median_deviation(size):
    """The released code divides by eps alone: 1000 n / k. The fallback is the standard deviation."""
    rewards = doubles(list(product([0.0, 1.0], repeat=size)))
    released, keep = of(median_advantages, rewards, mad_floor=0.0)
    centre = rewards.median(1, keepdim=True).values
    minority = (rewards != centre).sum(1, keepdim=True)
    close(released, (rewards - centre) * 1000 * size / minority.clamp(min=1), 1e-9)
    fallback, same = of(median_advantages, rewards, rebalance=False)
    close(fallback, (rewards - centre) / (rewards.std(1, keepdim=True) + 1e-3), 1e-9)
    assert fallback.abs().max() < size**0.5
    close(of(median_advantages, rewards, mad_floor=1.0, rebalance=False)[0], (rewards - centre) / 1.001, 1e-9)
    assert torch.equal(keep, same)
    assert keep.sum(1).tolist() == [size - 1] * len(rewards)


def test_first_of_ties_at_the_median_is_dropped_even_if_all_are_equal():
    keep = of(median_advantages, doubles([[0.2, 0.5, 0.9, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0, 1.0]]))[1]
    assert keep.tolist() == [[True, False, True, True, True], [False, True, True, True, True]]


def test_unscored_rollout_that_leaves_an_even_number_makes_the_lower_middle_the_median():
    advantage, keep = of(median_advantages, doubles([[0.8, NAN, 0.1, 0.4, 0.9]]), rebalance=False, mad_floor=1.0)
    close(advantage, doubles([[0.4, 0.0, -0.3, 0.0, 0.5]]) / 1.001)
    assert keep.tolist() == [[True, True, True, False, True]]
    credit = mc_grpo.credit(group(doubles([[0.8, NAN, 0.1, 0.4, 0.9]]).view(1, 5, 1), names=()))
    assert credit.keep.tolist() == [1, 0, 1, 0, 1]


def test_even_number_of_rollouts_has_no_median_among_them():
    with pytest.raises(ValueError, match=r"4 rollouts have no median among them.*use an even group_size"):
        of(median_advantages, doubles([[0.1, 0.2, 0.3, 0.4]]))


def test_outlier_turns_no_advantage_around_the_median():
    reward = doubles([[0.1, 0.4, 0.5, 0.9, 2.0]])
    for outlier in (2.0, 1e6):
        reward[0, 4] = outlier
        assert of(median_advantages, reward)[0].sign().tolist() == [[-1, -1, 0, 1, 1]]
    assert group_advantages(reward).sign().tolist() == [[-1, -1, -1, -1, 1]]


@pytest.mark.parametrize("floor", [None, 0.5])
def test_rounding_of_sums_is_no_deviation_from_the_median(floor):
    """.1 + .6 beside .7 in float32: a deviation of 6e-8 is not one to divide by."""
    components = torch.tensor([[[1, 1, 0], [0, 0, 1], [1, 1, 0], [0, 0, 1], [1, 1, 1.0]]])
    given = Group(rewards=components, weights=torch.tensor(AS_ONE))
    reward = weighted_sum(components, given)
    assert reward[0, 0] != reward[0, 1]
    exact = of(median_advantages, doubles([[0.7, 0.7, 0.7, 0.7, 1.4]]), mad_floor=floor)[0]
    close(median_advantages(reward, given, mad_floor=floor)[0].double(), exact, 1e-4)


# -- quantiles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4, 8, 33])
def test_quantiles_by_hand(size):
    """Sort, take the normal's quantiles, give equal rewards their mean."""
    rewards = torch.cat([random_rewards(3, size), (random_rewards(5, size, seed=1) * 3).round()])
    for reward, got in zip(rewards.tolist(), of(quantile_advantages, rewards).tolist(), strict=True):
        quantile = [NormalDist().inv_cdf((k + 0.5) / size) for k in range(size)]
        order = sorted(reward)
        shared = {r: mean(q for q, s in zip(quantile, order, strict=True) if s == r) for r in reward}
        assert got == pytest.approx([shared[r] for r in reward], abs=1e-12)
        assert max(map(abs, got)) <= NormalDist().inv_cdf(1 - 0.5 / size) + 1e-12
        assert sum(got) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("reward", "variance"),
    [([1, 0, 0, 0, 1], 0.54358), ([0.1, 0.4, 0.5, 0.9, 20], 0.76695), ([0] * 7 + [1], 0.33622), (range(2000), 0.999)],
)
def test_ties_shrink_the_variance_of_quantiles(reward, variance):
    got = of(quantile_advantages, doubles([[float(r) for r in reward]]))
    assert got.var(correction=0).item() == pytest.approx(variance, abs=5e-6 if len(reward) < 10 else 1e-3)


def test_quantiles_see_the_order_alone():
    reward = random_rewards(3, 7)
    assert torch.equal(of(quantile_advantages, reward.exp() * 1e6 - 5e6), of(quantile_advantages, reward))


def test_rounding_of_sums_is_no_rank():
    given = Group(rewards=torch.tensor([[[1, 1, 0], [0, 0, 1.0]]]), weights=torch.tensor(AS_ONE))
    reward = weighted_sum(given.rewards, given)
    assert quantile_advantages(reward, given, resolution=0.0).abs().min() > 0.67
    assert not quantile_advantages(reward, given).any()


def test_resolution_ties_rewards_that_round_to_the_same():
    reward = doubles([[0.50, 0.51, 0.49, 0.58]])
    got = of(quantile_advantages, reward, resolution=0.1)
    close(got, of(quantile_advantages, doubles([[0.5, 0.5, 0.5, 0.6]])))
    assert of(quantile_advantages, reward).unique().numel() == 4


# -- dropping negatives -------------------------------------------------------------------------------------------------


def test_ranks_go_from_minus_one_to_one_and_equal_rewards_share_theirs():
    ranks = partial(ranked_advantages, z_weight=0.0)
    reward = doubles([[0.6, 0.4, 0.9, 0.5, 0.1], [0.0, 1.0, 1.0, 0.0, 0.0], [0.2, NAN, 0.1, NAN, 0.3]])
    expected = [[0.5, -0.5, 1, 0, -1], [-0.5, 0.75, 0.75, -0.5, -0.5], [0, 0, -1, 0, 1]]
    close(of(ranks, reward), doubles(expected))
    close(of(ranks, reward).sum(1), torch.zeros(3).double())


def test_score_is_of_the_batch_and_groups_without_spread_have_none():
    reward = doubles([[0.0, 4.0], [6.0, 6.0], [NAN, 2.0]])  # mean 3.6, squared deviations 12.96 .16 5.76 5.76 2.56
    std = (27.2 / 5) ** 0.5
    score = of(ranked_advantages, reward, z_weight=1.0, eps=0.0)
    close(score, doubles([[-3.6 / std, 0.4 / std], [0, 0], [0, 0]]))
    close(of(ranked_advantages, reward, z_weight=0.25, eps=0.0)[0], 0.25 * score[0] + 0.75 * doubles([-1.0, 1.0]))
    given = of(ranked_advantages, reward, z_weight=1.0, mean=1.0, std=2.0, eps=0.5)
    close(given, doubles([[-0.4, 1.2], [0, 0], [0, 0]]))


def test_negatives_are_dropped_until_they_are_no_more_than_the_positives():
    rewards = random_rewards(200, 8, seed=2) ** 3
    rewards[::3, 1] = NAN
    got = balanced_advantages(rewards, bare(rewards, seed=4))
    for reward, advantage in zip(rewards, got, strict=True):
        scored = ~reward.isnan()
        positive = reward >= reward.nanmean()
        negative = scored & ~positive
        kept = advantage != 0
        assert kept[positive].all()
        assert (scored & ~kept).sum() == max(negative.sum() - positive.sum(), 0)
        close(advantage[kept], reward[kept] - reward[kept].mean())


def test_dropping_is_drawn_from_the_seed_alone_and_fairly():
    reward = doubles([[1.0, 0.0, 0.0, 0.0]]).expand(6000, 4)
    first, again, other = (balanced_advantages(reward, bare(reward, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first[:, 0].unique().tolist() == [0.5]
    assert ((first[:, 1:] != 0).double().mean(0) - 1 / 3).abs().max() < 4 * (2 / 9 / 6000) ** 0.5
    torch.rand(1)
    assert torch.equal(red_drop.credit(bare(reward, seed=1)).advantage.view(6000, 4), first)


def test_rollout_at_the_mean_is_positive():
    """So that here one negative stands beside three, and none is dropped."""
    reward = doubles([[1.0, 0.5, 0.5, 0.0]]).expand(20, 4)
    assert of(balanced_advantages, reward).tolist() == [[0.5, 0.0, 0.0, -0.5]] * 20


def test_dropped_negatives_stay_in_the_counts():
    reward = doubles([[1.0, 0.0, 0.0, 0.0]])
    credit = red_drop.credit(bare(reward))
    assert credit.keep.tolist() == [1] * 4
    assert sorted(credit.advantage.tolist()) == [-0.5, 0, 0, 0.5]


# -- values along a trajectory ------------------------------------------------------------------------------------------


def discounted(reward, gamma):
    """(P, G, T) by the slow loop, backwards."""
    q = torch.zeros_like(reward)
    for t in reversed(range(reward.shape[2])):
        q[..., t] = reward[..., t] + (gamma * q[..., t + 1] if t + 1 < reward.shape[2] else 0)
    return q


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 13])
def test_values_by_the_slow_loop(gamma, length):
    reward = random_rewards(2, 4, length)
    q = discounted(reward, gamma)
    z = (q - q.mean(1, keepdim=True)) / (q.std(1, keepdim=True, correction=0) + 1e-4)
    slow = (q / q.mean(2, keepdim=True) * z + 0.1 * q).clamp(-5, 5)
    close(of(anchored_values, reward, gamma=gamma), slow)


def test_decision_without_a_reward_is_out_of_the_statistics_along_the_trajectory_too():
    reward = doubles([[[0.2, NAN, 0.6], [0.2, 0.2, 0.2]]])
    got = of(anchored_values, reward, anchor=0.0, eps=0.0)
    assert got[0, 0, 1] == got[0, 1, 1] == 0
    first, last = 0.2 + 0.81 * 0.6, 0.6
    close(got[0, 0, [0, 2]], doubles([first, last]) / ((first + last) / 2))
    assert of(anchored_values, reward)[0, 0, 1] == 0
    whole = of(anchored_values, doubles([[[NAN] * 3, [0.2, 0.4, 0.6], [0.2] * 3]]))
    assert whole[0, 0].tolist() == [0, 0, 0]
    close(whole[:, 1:], of(anchored_values, doubles([[[0.2, 0.4, 0.6], [0.2] * 3]])))


def test_push_is_all_that_is_left_without_spread_and_only_where_it_is_anchored():
    reward = torch.full((1, 3, 4), 0.7, dtype=torch.float64)
    got, q = of(anchored_values, reward, anchor=0.2, anchored=2), discounted(reward, 0.9)
    close(got[..., :2], 0.2 * q[..., :2])
    assert not got[..., 2:].any()
    assert not of(anchored_values, reward, anchor=0.2, anchored=0).any()
    close(of(anchored_values, reward, anchor=0.2, anchored=9), 0.2 * q)


def test_values_of_nothing_are_zero_and_great_ones_are_clamped():
    assert not of(anchored_values, torch.zeros(1, 2, 3)).any()
    got = of(anchored_values, doubles([[[1e6, 1e6], [0.0, 0.0]]]), limit=2.0)
    close(got, doubles([[[2.0, 2.0], [-1.0, -1.0]]]), 1e-9)  # values of 0 have weight 1


def test_rounding_of_values_is_no_full_step():
    """The same three rewards in another order, undiscounted: the sums differ by an ulp in float32."""
    reward = torch.tensor([[[0.1, 0.2, 0.4], [0.4, 0.2, 0.1]]])
    assert of(anchored_values, reward, gamma=1.0, anchor=0.0)[0, :, 0].abs().max() < 0.01


def test_values_need_rewards_per_decision_that_are_not_negative():
    with pytest.raises(ValueError, match="need one reward per decision"):
        of(anchored_values, doubles([[0.1, 0.2]]))
    with pytest.raises(ValueError, match=r"reward -0\.3 is negative; shift rewards to \[0, 1\]"):
        of(anchored_values, doubles([[[0.1], [-0.3]]]))


# -- which groups stay --------------------------------------------------------------------------------------------------


def test_filter_looks_at_the_outcome_alone():
    rewards = [
        [[0.0, 0.1], [0.0, 0.9]],  # outcome without spread, another component with: dropped
        [[0.0, 0.5], [1.0, 0.5]],  # the other way round: kept
        [[1.0, 0.0], [0.0, 1.0]],  # the total has no spread, the outcome has: kept
    ]
    credit = grpo(filter="outcome").credit(group(rewards, names=()))
    assert credit.keep.tolist() == [0, 0, 1, 1, 1, 1]
    assert credit.advantage[:2].tolist() == [0, 0]
    assert credit.advantage[2] < 0 < credit.advantage[3]
    third = pytest.approx(1 / 3)
    assert (credit.metrics["zero_spread"], credit.metrics["zero_spread_outcome"]) == (third, third)
    assert (credit.metrics["dropped"], credit.metrics["unscored"]) == (third, 0)
    assert grpo.credit(group(rewards, names=())).keep.tolist() == [1] * 6


@pytest.mark.parametrize(
    ("outcomes", "success", "outcome", "all_right"),
    [
        ([1.0, 1.0, 1.0], 1.0, False, False),
        ([0.0, 0.0, 0.0], 1.0, False, True),
        ([1.0, 0.0, 1.0], 1.0, True, True),
        ([1.0, NAN, 1.0], 1.0, False, False),  # an unscored rollout says nothing
        ([0.6, 0.9, 1.0], 0.6, True, False),
        ([0.6, 0.9, 1.0], 0.7, True, True),
    ],
)
def test_groups_without_contrast_and_groups_that_are_all_right(outcomes, success, outcome, all_right):
    given = bare(doubles([outcomes]), outcome=0)
    assert keep_groups(given).tolist() == [[True]]
    assert keep_groups(given, filter="outcome").tolist() == [[outcome]]
    assert keep_groups(given, filter="all_right", success=success).tolist() == [[all_right]]


def test_rollout_whose_outcome_does_not_apply_is_not_right():
    given = Group(rewards=doubles([[[1.0, 0.5], [NAN, 0.5]]]), weights=torch.ones(2), outcome=0)
    assert keep_groups(given, filter="all_right").tolist() == [[True]]


def test_filters_judge_a_rollout_of_several_decisions_as_a_whole():
    rewards = doubles([[[1.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [1.0, 1.0]]])
    assert keep_groups(bare(rewards, outcome=0), filter="outcome").tolist() == [[False], [True]]
    assert keep_groups(bare(rewards, outcome=0), filter="all_right").tolist() == [[False], [True]]


@pytest.mark.parametrize("name", ["outcome", "all_right"])
def test_filter_without_an_outcome_is_refused(name):
    with pytest.raises(ValueError, match="the group names none; set outcome="):
        grpo(filter=name).credit(bare(doubles([[0.0, 1.0]])))


# -- recipes ------------------------------------------------------------------------------------------------------------

PLAIN = [recipe for recipe in RECIPES.values() if not recipe.needs & {*ASKED, "aligned"}]
plain = pytest.mark.parametrize("recipe", PLAIN, ids=lambda recipe: recipe.name)


@plain
@in_float
def test_recipe_gives_equal_rewards_exactly_zero(recipe, dtype):
    """ngrpo pushes them away unless they are the highest."""
    if recipe is ngrpo:
        recipe = recipe(highest=2.1)
    credit = recipe.credit(group(torch.full((3, 7, 3), 0.7, dtype=dtype)))
    assert credit.advantage.tolist() == [0] * 21
    assert credit.metrics["zero_spread"] == credit.metrics["zero_spread_outcome"] == 1


@pytest.mark.parametrize("recipe", [r for r in PLAIN if r is not red_drop], ids=lambda recipe: recipe.name)
def test_recipe_permutes_with_its_rollouts_and_groups(recipe):
    """But for the one that draws by place."""
    rollouts, prompts = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([2, 0, 3, 1])
    given = group(random_rewards(4, 5, 3))
    old = given.old_logps.view(4, 5, -1)[prompts][:, rollouts].flatten(0, 1)
    moved = recipe.credit(group(given.rewards[prompts][:, rollouts], old_logps=old)).advantage.view(4, 5)
    close(moved, recipe.credit(given).advantage.view(4, 5)[prompts][:, rollouts])


@plain
def test_unscored_and_dropped_rollouts_of_a_recipe_have_advantage_zero(recipe):
    rewards = random_rewards(4, 5, 3).round()
    rewards[1, 2] = NAN
    credit = recipe.credit(group(rewards))
    assert credit.keep[7] == 0
    assert credit.advantage.isfinite().all()
    assert not credit.advantage[credit.keep == 0].any()
    assert credit.keep.dtype == credit.advantage.dtype


def test_value_anchored_pushes_equal_rewards_and_needs_decisions():
    rewards = torch.full((1, 3, 1, 4), 0.7, dtype=torch.float64)
    given = Group(rewards=rewards, weights=torch.ones(1), aligned=True)
    close(value_anchored.credit(given).advantage, 0.1 * discounted(rewards.squeeze(2), 0.9)[0])
    with pytest.raises(ValueError, match="need one reward per decision"):
        value_anchored.credit(bare(doubles([[0.0, 1.0]])))


@pytest.mark.parametrize("recipe", [unlikeliness, gdpo, grpo, ngrpo], ids=lambda recipe: recipe.name)
def test_aligned_rewards_are_credited_decision_by_decision(recipe):
    rewards = random_rewards(3, 4, 2, 5)
    rewards[0, 1, :, 2] = NAN
    fields = {"old_logps": -random_rewards(12, 1).expand(12, 5), "mask": torch.ones(12, 5), "names": ()}
    credit = recipe.credit(group(rewards, aligned=True, **fields))
    assert credit.advantage.shape == (12, 5)
    assert credit.advantage[1, 2] == 0
    assert credit.keep.tolist() == [1] * 12
    for t in [0, 1, 3, 4]:
        close(credit.advantage[:, t], recipe.credit(group(rewards[..., t], **fields)).advantage)


@pytest.mark.parametrize("credit", ["decision", "segment", "rollout"])
@in_float
def test_constant_rewards_of_a_forecast_get_exactly_zero(credit, dtype):
    """Also where cells differ, or stand in another order."""
    rewards = torch.full((2, 7, 2, 6), 0.7, dtype=dtype) * torch.arange(1, 7)
    if credit != "decision":
        rewards[:, 1::2] = rewards[:, 1::2][..., [1, 0, 2, 3, 5, 4]]
    blocks = torch.tensor([0, 0, 1, 1, 2, 2]).expand(14, 6)
    given = group(rewards, segments=blocks, aligned=True, names=())
    assert not forecast_grpo(credit=credit).credit(given).advantage.any()


@pytest.mark.parametrize("credit", ["decision", "segment", "rollout"])
def test_a_forecast_permutes_with_its_rollouts_and_groups(credit):
    rollouts, prompts = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([2, 0, 3, 1])
    rewards, blocks = random_rewards(4, 5, 2, 6), torch.tensor([0, 0, 1, 1, 2, 2]).expand(20, 6)
    recipe = forecast_grpo(credit=credit)
    before, after = (
        recipe.credit(group(given, segments=blocks, aligned=True, names=())).advantage.view(4, 5, 6)
        for given in (rewards, rewards[prompts][:, rollouts])
    )
    close(after, before[prompts][:, rollouts])


def test_advantage_std_is_over_kept_rows_and_their_decisions():
    credit = rloo.credit(bare(doubles([[0.0, 1.0, NAN]])))
    assert credit.metrics["advantage_std"] == pytest.approx(1.0)
    mask = torch.tensor([[1, 0], [1, 0]])
    credit = rloo.credit(bare(doubles([[[0.0, 0.0], [1.0, 9.0]]]), mask=mask))
    assert credit.metrics["advantage_std"] == pytest.approx(1.0)
