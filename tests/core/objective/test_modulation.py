"""What is done to advantages between baseline and loss: closed forms, slow doubles written here, and where nothing is known."""

import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from objective_fixtures import Policy

from core.objective.advantage import group_advantages
from core.objective.group import Group
from core.objective.modulation import (
    add_tempered_imitation,
    gate_entropy,
    mask_indistinct,
    route_to_teacher,
    share_of_protected,
    token_influence,
    weight_by_answer_entropy,
    weight_by_difficulty,
    weight_by_exponential,
    weight_by_influence,
)
from core.objective.recipes import RECIPES, dagrpo, distribution_centric, gaussian_rank, llds, sample_routed
from core.objective.rows import Counts, Rows

NAN = math.nan
close = torch.testing.assert_close


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def group(outcome, failed=None, aligned=False, **fields):
    """Rewards of one component, the outcome, (P, G) or (P, G, T); or of several by name, the first one being it."""
    columns = outcome if isinstance(outcome, dict) else {"outcome": outcome}
    rewards = torch.stack([doubles(values) for values in columns.values()], dim=2)
    failed = None if failed is None else torch.tensor(failed)
    fields = {"names": tuple(columns), "outcome": 0, "failed": failed, "aligned": aligned} | fields
    return Group(rewards=rewards, weights=torch.ones(rewards.shape[2]), **fields)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- red_weight, a_grae ---------------------------------------------------------------------------------------------------


def test_exponential_weight():
    got = weight_by_exponential(doubles([[math.log(2.0), -math.log(2.0), 0.0]]), None, temperature=0.5)
    close(got, doubles([[4 * math.log(2), -math.log(2) / 4, 0]]))


MIXED = [[1, 0, 0, 0], [1, 1, 1, 0]]  # p = 1/4 and 3/4, omega = 1/2


def difficulty(p, omega):
    return (omega / math.sqrt(p) + (1 - omega) / math.sqrt(1 - p)) / 2


def test_difficulty_by_hand():
    hard, easy = difficulty(0.25, 0.5), difficulty(0.75, 0.5)
    assert hard == pytest.approx(easy)  # at omega = 1/2 the two terms are each other's mirror
    advantage = doubles([[3, -1, -1, -1], [1, 1, 1, -3]])
    expected = doubles([[3 * hard / 2, -hard, -hard, -hard], [easy / 2] * 3 + [-3 * easy]])
    close(weight_by_difficulty(advantage, group(MIXED)), expected)


@pytest.mark.parametrize(("alpha", "share"), [(1.0, 0.5), (0.8, 0.625), (0.5, 1.0), (0.25, 1.0)])
def test_only_positive_advantages_wait_for_the_batch(alpha, share):
    advantage = torch.ones(2, 4, dtype=torch.float64)
    factor = doubles([[difficulty(0.25, 0.5)] * 4, [difficulty(0.75, 0.5)] * 4])
    close(weight_by_difficulty(advantage, group(MIXED), alpha=alpha), share * factor)
    close(weight_by_difficulty(-advantage, group(MIXED), alpha=alpha), -factor)


def test_released_code_divides_by_another_easy_term():
    got = weight_by_difficulty(-torch.ones(2, 4, dtype=torch.float64), group(MIXED), easy_term="released")
    factor = [(0.5 / (math.sqrt(p) + 1e-6) + 0.5 / (1 - math.sqrt(p) + 1e-6)) / 2 for p in (0.25, 0.75)]
    close(got, -doubles(factor).unsqueeze(1).expand(2, 4))


def test_groups_all_right_or_all_wrong_are_not_divided():
    advantage = doubles([[1, -1], [1, -1]])
    close(weight_by_difficulty(advantage, group([[1, 1], [0, 0]])), doubles([[0.5, -1], [0.5, -1]]))


def test_nothing_right_leaves_only_negatives_above_the_floor():
    advantage = doubles([[1, -1]])
    assert weight_by_difficulty(advantage, group([[0, 0]])).tolist() == [[0, -1]]
    close(weight_by_difficulty(advantage, group([[0, 0]]), least_progress=0.3), doubles([[0.3, -1]]))


def test_difficulty_counts_scored_rollouts_and_graded_success():
    """An unscored rollout and an unscored group are in neither p nor omega; right is `success` and above."""
    advantage = -torch.ones(2, 4, dtype=torch.float64)
    got = weight_by_difficulty(advantage, group([[0.6, 0.5, 0.4, NAN], [NAN] * 4]), success=0.5)
    close(got[0], torch.full((4,), -difficulty(2 / 3, 2 / 3), dtype=torch.float64))
    assert got[1].tolist() == [-1] * 4
    failed = [[False, False, False, True], [False] * 4]
    close(
        weight_by_difficulty(advantage, group(MIXED, failed))[0, 0],
        torch.tensor(-difficulty(1 / 3, 4 / 7), dtype=torch.float64),
    )


@pytest.mark.parametrize("modulate", [weight_by_difficulty, weight_by_exponential])
def test_advantage_per_decision_is_modulated_decision_by_decision(modulate):
    advantage = random(2, 4, 3)
    got = modulate(advantage, group(MIXED))
    for t in range(3):
        close(got[:, :, t], modulate(advantage[:, :, t], group(MIXED)))


# -- distribution_centric -------------------------------------------------------------------------------------------------


def imitation(outcome, entropy=0.2, tempered=None, mask=None, **fields):
    """One token a rollout; old log-probabilities of -entropy, and the same at another temperature if nothing is said."""
    rows = sum(map(len, outcome))
    old = torch.full((rows, 1), -entropy, dtype=torch.float64)
    model = SimpleNamespace(tempered_logps=lambda temperature: old if tempered is None else tempered)
    mask = torch.ones(rows, 1) if mask is None else mask
    return group(outcome, old_logps=old, mask=mask, model=model, **fields)


@pytest.mark.parametrize(
    ("outcome", "entropy", "mixed"),
    [
        ([[1, 0]], 0.2, 1 / 11),  # a0 = .05, f = .5
        ([[1, 0]], 0.05, 1 / 6),  # a0 is kept at .1
        ([[1, 0]], 0.4, 1 / 6),  # the same on the other side of the target
        ([[1, 0, 0, 0, 1]], 0.0, 1 / 5),
        ([[1, 0]], 0.25, 0.0),
    ],
)
def test_share_of_imitation(outcome, entropy, mixed):
    advantage = doubles([[0.7 if right else -0.4 for right in outcome[0]]])
    expected = (1 - mixed) * advantage + mixed * doubles(outcome)  # the ratio is 1
    close(add_tempered_imitation(advantage, imitation(outcome, entropy)).squeeze(2), expected)


@pytest.mark.parametrize(("target", "asked"), [(10.0, 1.2), (0.0, 0.8)])
def test_right_rollouts_are_imitated_as_a_hotter_or_cooler_policy_samples_them(target, asked):
    policy = Policy(4, 3)
    given = group([[1, 0], [0.05, 0.04]], old_logps=policy.logps(policy.logits), mask=torch.ones(4, 3), model=policy)
    advantage = random(2, 2)
    got = add_tempered_imitation(advantage, given, target=target, most=0.15)
    mixed = 0.3 / 1.3  # a0 = .15, f = 1/2
    for p, g in product(range(2), repeat=2):
        logits = policy.logits[2 * p + g]
        ratio = torch.stack(
            [
                ((logits[t] / asked).exp() / (logits[t] / asked).exp().sum() / logits[t].softmax(0))[word]
                for t, word in enumerate(policy.ids[2 * p + g])
            ]
        )
        close(got[p, g], (1 - mixed) * advantage[p, g] + mixed * (g == 0) * ratio)
    assert policy.asked == [asked]


def test_up_to_the_target_the_hotter_policy_is_asked():
    policy = Policy(2, 3)
    old = torch.full((2, 3), -0.25, dtype=torch.float64)
    add_tempered_imitation(doubles([[1, -1]]), group([[1, 0]], old_logps=old, mask=torch.ones(2, 3), model=policy))
    assert policy.asked == [1.2]


def test_without_a_right_rollout_nothing_changes():
    for entropy in (0.0, 0.25, 5.0):  # at the target the authors' code divides 0 by 0, elsewhere by 0
        advantage = doubles([[0.3, -0.3]])
        close(add_tempered_imitation(advantage, imitation([[0, 0]], entropy)).squeeze(2), advantage)


def test_right_groups_keep_a_push_and_wrong_ones_have_none():
    credit = distribution_centric.credit(imitation([[1, 1], [0, 0]], 0.0))
    close(credit.advantage, doubles([[1 / 6], [1 / 6], [0], [0]]))


def test_ratio_is_capped_and_no_garbage_gets_in():
    """An overflow in a wrong rollout, NaN in padding; a failed rollout is not imitated, and not in the share of right ones."""
    tempered = doubles([[900.0, NAN], [900.0, NAN], [math.log(3.0), 0.0], [0.0, 0.0]])
    old, mask = (
        doubles([[0.0, NAN], [-900.0, NAN], [0.0, 0.0], [0.0, 0.0]]),
        torch.tensor([[1, 0], [1, 0], [1, 1], [1, 1]]),
    )
    given = group(
        [[0, 0, 1, 1]],
        [[False, False, False, True]],
        old_logps=old,
        mask=mask,
        model=SimpleNamespace(tempered_logps=lambda temperature: tempered),
        aligned=False,
    )
    got = add_tempered_imitation(torch.zeros(1, 4, dtype=torch.float64), given, target=0.0, cap=2.0)
    assert got.isfinite().all()
    share = 0.1 * 3 / (1 + 0.1 * 3)  # the entropy, 900 / 6, is far above the target
    close(got, share * doubles([[[0, 0], [0, 0], [2, 1], [0, 0]]]))
    assert add_tempered_imitation(torch.zeros(1, 4), given, target=0.0)[0, 2, 0].item() == pytest.approx(share * 3)


# -- seed_grpo ------------------------------------------------------------------------------------------------------------


def answers(*values, **fields):
    return group({"outcome": [[0.0] * len(values)], "answer": [list(values)]}, **fields)


def factor(given, **options):
    size = given.rewards.shape[1]
    out = weight_by_answer_entropy(torch.ones(len(given.rewards), size, dtype=torch.float64), given, **options)
    assert (out == out[:, :1]).all()  # constant in a group: never which rollout is preferred
    return out[:, 0]


SIZES = [0, 0, 0, 0, 1, 1, 2, 3]
MEAN_LOG = -(math.log(1 / 2) + math.log(1 / 4) + 2 * math.log(1 / 8)) / 4
SHANNON = math.log(2) / 2 + math.log(4) / 4 + 2 * math.log(8) / 8


@pytest.mark.parametrize(("entropy", "value"), [("mean_log", MEAN_LOG), ("shannon", SHANNON)])
def test_answer_entropy_by_hand(entropy, value):
    x = 0.5 * value / math.log(8)
    for decay, expected in (
        ("reciprocal", 1 / (1 + x)), ("linear", 1 - x), ("exponential", math.exp(-x)), ("focal", (1 - x) ** 3),
    ):  # fmt: skip
        got = factor(answers(*SIZES), alpha=0.5, entropy=entropy, decay=decay, focus=3.0).item()
        assert got == pytest.approx(expected, rel=1e-6)


def slow_factor(value, logps, scored, entropy, mass, alpha):
    """One group, cluster by cluster."""
    kept = [i for i in range(len(value)) if scored[i]]
    if len(kept) < 2:
        return 1.0
    name = {i: "unreadable" if math.isnan(value[i]) else value[i] for i in kept}
    weight = {i: math.exp(logps[i]) if mass == "probability" else 1.0 for i in kept}
    total = sum(weight.values())
    mass_of = {c: sum(weight[i] for i in kept if name[i] == c) / total for c in set(name.values())}
    if entropy == "shannon":
        spread = -sum(m * math.log(m) for m in mass_of.values())
    else:
        spread = -sum(map(math.log, mass_of.values())) / len(mass_of)
    return 1 / (1 + alpha * min(1.0, spread / math.log(len(kept))))


@pytest.mark.parametrize("mass", ["count", "probability"])
@pytest.mark.parametrize("entropy", ["mean_log", "shannon"])
def test_answer_entropy_equals_a_slow_double(entropy, mass):
    """Twenty groups with unreadable answers, unscored rollouts, ragged completions and NaN in their padding."""
    generator = torch.Generator().manual_seed(3)
    prompts, size, steps = 20, 6, 4
    value = torch.randint(0, 3, (prompts, size), generator=generator).double()
    value[torch.rand(prompts, size, generator=generator) < 0.2] = NAN
    failed = torch.rand(prompts, size, generator=generator) < 0.2
    failed[0, 1:] = True
    failed[1] = True
    old, mask = (
        random(prompts * size, steps) - 1,
        torch.arange(prompts * size).unsqueeze(1) % steps >= torch.arange(steps),
    )
    given = group(
        {"outcome": torch.zeros(prompts, size).tolist(), "answer": value.tolist()},
        failed.tolist(),
        old_logps=torch.where(mask, old, NAN),
        mask=mask.long(),
    )
    sums = (old * mask).sum(1).view(prompts, size).tolist()
    expected = [
        slow_factor(value[p].tolist(), sums[p], (~failed[p]).tolist(), entropy, mass, 0.7) for p in range(prompts)
    ]
    close(factor(given, alpha=0.7, entropy=entropy, mass=mass), doubles(expected), rtol=1e-6, atol=1e-6)
    assert len(set(expected)) > 6


def test_one_cluster_and_all_apart_are_the_ends():
    assert factor(answers(5, 5, 5), alpha=1.0).item() == 1
    assert factor(answers(1, 2, 3), alpha=1.0).item() == pytest.approx(0.5)
    assert factor(answers(NAN, NAN, NAN), alpha=1.0).item() == 1


def test_one_odd_answer_counts_as_more_disagreement_than_two_camps():
    """Of the text's mean of logs; Shannon's entropy has it the other way round."""
    odd, camps = answers(*[0] * 7, 1), answers(*[0] * 4, *[1] * 4)
    assert factor(odd) < factor(camps)
    assert factor(odd, entropy="shannon") > factor(camps, entropy="shannon")


def test_group_of_one_has_weight_one():
    assert factor(answers(4.0), alpha=1.0).item() == 1
    assert factor(answers(4.0, 5.0, failed=[[True, False]]), alpha=1.0).item() == 1


def test_entropy_above_that_of_equal_shares_is_clamped():
    """A cluster of hardly any mass: the mean of -log P is 7, log G is .7."""
    given = answers(1.0, 2.0, old_logps=doubles([[0.0], [-14.0]]), mask=torch.ones(2, 1))
    assert factor(given, alpha=1.0, mass="probability").item() == pytest.approx(0.5)
    assert factor(given, alpha=1.0, mass="probability", entropy="shannon").item() > 0.99


def test_probability_masses_do_not_underflow():
    given = answers(1.0, 2.0, old_logps=doubles([[-1e5], [-1e5]]), mask=torch.ones(2, 1))
    assert factor(given, alpha=1.0, mass="probability", entropy="shannon").item() == pytest.approx(0.5)
    alone = answers(1.0, 2.0, old_logps=doubles([[0.0], [-1e5]]), mask=torch.ones(2, 1))
    assert factor(alone, alpha=1.0, mass="probability", entropy="shannon").item() == pytest.approx(1.0)


def test_answers_per_decision_are_read_by_their_mean_where_observed():
    value = [[[1.0, NAN], [1.0, NAN], [3.0, NAN]]]
    given = group({"outcome": torch.zeros(1, 3, 2).tolist(), "answer": value}, aligned=True)
    assert factor(given, alpha=1.0).item() == pytest.approx(
        slow_factor([1.0, 1.0, 3.0], None, [True] * 3, "mean_log", "count", 1.0)
    )


def test_published_scales_are_small():
    worst = factor(answers(1, 2, 3, 4), alpha=0.0417).item()
    assert 0.9599 < worst < 0.96


def test_what_answer_entropy_misses_is_named():
    with pytest.raises(ValueError, match="no reward component is called 'reply'; there are: outcome, answer"):
        factor(answers(1.0, 2.0), answers="reply")
    with pytest.raises(ValueError, match="mass=probability needs old log-probabilities; use mass=count"):
        factor(answers(1.0, 2.0), mass="probability")


# -- dagrpo ---------------------------------------------------------------------------------------------------------------


def graded(outcome, quality, failed=None):
    return group({"outcome": outcome, "quality": quality}, failed)


def test_indistinct_rollouts_are_silent():
    """The wrong rollout of quality .8 is below no right one by more than .2."""
    given = graded([[1, 1, 1, 0, 0]], [[0.92, 0.88, 0.35, 0.80, 0.10]])
    advantage, keep = mask_indistinct(doubles([[1, 2, 3, 4, 5]]), given)
    assert advantage.tolist() == [[1, 2, 3, 0, 5]]
    assert keep.all()


def test_masking_equals_a_walk_over_pairs():
    """Groups of all kinds, some qualities unknown, some rollouts unscored."""
    generator = torch.Generator().manual_seed(1)
    outcome = (torch.rand(60, 4, generator=generator) < 0.5).double()
    quality = (torch.rand(60, 4, generator=generator) * 10).round() / 10
    quality[torch.rand(60, 4, generator=generator) < 0.1] = NAN
    failed = torch.rand(60, 4, generator=generator) < 0.15
    advantage = random(60, 4)
    got, keep = mask_indistinct(advantage, graded(outcome.tolist(), quality.tolist(), failed.tolist()), margin=0.25)
    kinds = set()
    for p in range(60):
        pairs = [
            (i, j)
            for i, j in product(range(4), repeat=2)
            if outcome[p, i] == 1 and outcome[p, j] == 0 and not failed[p, i] and not failed[p, j]
        ]
        clear = [(i, j) for i, j in pairs if not quality[p, i] - quality[p, j] <= 0.25]  # unknown: keep
        distinct = {i for pair in clear for i in pair}
        expected = [
            0.0 if pairs and i not in distinct and not failed[p, i] else advantage[p, i].item() for i in range(4)
        ]
        assert got[p].tolist() == expected
        assert keep[p].tolist() == [bool(clear) or not pairs] * 4
        kinds.add((bool(pairs), bool(clear), len(distinct) in (2, 3)))
    assert kinds >= {(False, False, False), (True, False, False), (True, True, True), (True, True, False)}


def test_groups_without_a_distinct_pair_leave_the_counts():
    credit = dagrpo.credit(graded([[1, 0], [1, 0]], [[0.5, 0.4], [0.9, 0.1]]))
    assert credit.keep.tolist() == [0, 0, 1, 1]
    assert credit.advantage[:2].tolist() == [0, 0]
    assert credit.advantage[2] > 0


@pytest.mark.parametrize("outcome", [[[1, 1, 1]], [[0, 0, 0]], [[1]]])
def test_groups_without_contrast_are_left_alone(outcome):
    advantage = random(1, len(outcome[0]))
    for renormalize in (False, len(outcome[0]) > 1):
        got, keep = mask_indistinct(advantage, graded(outcome, [[0.5] * len(outcome[0])]), renormalize=renormalize)
        assert keep.all()
        close(got, group_advantages(advantage) if renormalize else advantage)


def test_renormalized_advantages_are_those_of_the_rest_alone():
    given = graded([[1, 1, 1, 0, 0]], [[0.92, 0.88, 0.35, 0.80, 0.10]])
    got, _ = mask_indistinct(group_advantages(given.rewards[:, :, 0]), given, renormalize=True)
    rest = group_advantages(doubles([[1, 1, 1, 0]]))
    close(got[0, [0, 1, 2, 4]], rest[0], rtol=1e-3, atol=0)  # eps is added twice
    assert got[0, 3] == 0
    one_sided, keep = mask_indistinct(doubles([[1, -1]]), graded([[1, 0]], [[0.5, 0.5]]), renormalize=True)
    assert one_sided.tolist() == [[0, 0]]
    assert not keep.any()


def test_mask_per_decision_silences_the_whole_rollout():
    given = graded([[1, 1, 0]], [[0.9, 0.1, 0.5]])
    got, _ = mask_indistinct(torch.ones(1, 3, 2, dtype=torch.float64), given)
    assert got.tolist() == [[[1, 1], [0, 0], [1, 1]]]


def test_unknown_quality_component_is_named():
    with pytest.raises(ValueError, match="no reward component is called 'finish'"):
        mask_indistinct(doubles([[1, 0]]), graded([[1, 0]], [[1, 0]]), quality="finish")


# -- token_hidden_reward --------------------------------------------------------------------------------------------------


def influences(seed=0, size=3, steps=4, dtype=torch.float64):
    hidden, gradient = random(size, steps, 5, seed=seed).to(dtype), random(size, steps, 6, seed=seed + 1).to(dtype)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1]])[:size, :steps]
    return hidden, gradient, mask, torch.tensor([True, False, True])[:size]


def test_influence_equals_the_sum_over_all_pairs_of_tokens():
    hidden, gradient, mask, right = influences()
    total, own = token_influence(hidden, gradient, mask, right)
    for i, t in product(range(3), range(4)):
        pairs = {
            j: sum((gradient[i, t] @ gradient[j, s]) * (hidden[i, t] @ hidden[j, s]) for s in range(4) if mask[j, s])
            for j in range(3)
            if right[j]
        }
        used = mask[i, t].item()
        close(total[i, t], used * torch.stack([*pairs.values()]).sum())
        close(own[i, t], used * pairs[i] if i in pairs else doubles(0.0))


def test_influence_without_a_right_rollout_is_zero():
    hidden, gradient, mask, right = influences()
    for part in token_influence(hidden, gradient, mask, torch.zeros_like(right)):
        assert (part == 0).all()


def test_influence_of_half_precision_is_summed_in_float32_and_ignores_padding():
    hidden, gradient, mask, right = influences(dtype=torch.bfloat16)
    expected = token_influence(hidden.float(), gradient.float(), mask, right)
    hidden[mask == 0], gradient[mask == 0] = NAN, math.inf
    for got, part in zip(token_influence(hidden, gradient, mask, right), expected, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, part)


def hidden_reward(total, outcome, own=None, mask=None, failed=None, **options):
    """weight_by_influence of given influences (G, T), one group."""
    total = doubles(total)
    own = torch.zeros_like(total) if own is None else doubles(own)
    mask = torch.ones(total.shape) if mask is None else torch.tensor(mask)
    model = SimpleNamespace(influence=lambda right: (total, own))
    given = group([outcome], failed, mask=mask, model=model)
    advantage = doubles([[1.0 if value else -2.0 for value in outcome]])
    return weight_by_influence(advantage, given, **options)[0].tolist()


def test_tokens_are_weighted_by_the_sign_of_what_they_do_to_the_right_ones():
    """A wrong rollout's token with positive influence has a negative hidden reward: pushing it down hurts the right ones."""
    total = [[3.0, -2.0, 0.5], [3.0, -2.0, 0.5]]
    close(doubles(hidden_reward(total, [1, 0], threshold=0.0)), doubles([[1.1, 0.9, 1.1], [-1.8, -2.2, -1.8]]))
    explored = hidden_reward(total, [1, 0], threshold=0.0, exploit=-0.5)
    close(doubles(explored), doubles([[0.5, 1.5, 0.5], [-3, -1, -3]]))
    dominant = hidden_reward(total, [1, 0], threshold=2.0, exploit=0.0)
    assert dominant == [[1, 0, 0], [-2, 0, 0]]  # strictly above


def test_threshold_is_the_least_mean_of_a_right_rollout():
    """Means 2 and 1 over their own tokens (the wrong rollout's -9 and the padding's 50 do not count)."""
    total, mask = [[3.0, 1.0], [1.0, 50.0], [-9.0, -9.0]], [[1, 1], [1, 0], [1, 1]]
    at_one = [[True, False], [False, True], [True, True]]
    got = hidden_reward(total, [1, 1, 0], mask=mask)
    assert [[value != 0 for value in row] for row in got] == at_one
    got = hidden_reward(total, [1, 1, 0], mask=mask, tau_scale=9.5)
    assert [[value != 0 for value in row] for row in got] == [[False, False], [False, True], [False, False]]
    failed = [[False, True, False]]  # an unscored rollout is not a right one: the least mean is 2
    got = hidden_reward([[3.0, 1.0], [1.5, 1.5], [-1.5, 2.5]], [1, 1, 0], failed=failed)
    assert got == [[1.1, 0], [0, 0], [0, -1.8]]


def test_negative_threshold_is_zero():
    assert hidden_reward([[-3.0, 0.1], [0.1, 0.0]], [1, 0]) == [[0.9, 1.1], [-1.8, 0]]


def test_influence_on_itself_can_be_left_out():
    total, own = [[3.0, 1.0], [1.0, 1.0]], [[4.0, 0.0], [0.0, 0.0]]
    assert hidden_reward(total, [1, 0], own, threshold=0.5)[0] == [1.1, 1.1]
    assert hidden_reward(total, [1, 0], own, threshold=0.5, self_pairs=False)[0] == [0.9, 1.1]


@pytest.mark.parametrize("outcome", [[1, 1], [0, 0]])
def test_influence_leaves_groups_without_contrast_alone(outcome):
    expected = [[1.0 if value else -2.0] * 2 for value in outcome]
    assert hidden_reward([[3.0, -9.0], [2.0, NAN]], outcome) == expected
    assert hidden_reward([[3.0, -9.0], [2.0, 1.0]], [1, 0, 0][: len(outcome)], failed=[[False, True]])[0] == [1, 1]


def test_advantage_zero_stays_zero_and_decisions_keep_their_own():
    total = doubles([[3.0, -2.0], [1.0, 1.0]])
    given = group([[1, 0]], mask=torch.ones(2, 2), model=SimpleNamespace(influence=lambda right: (total, total)))
    got = weight_by_influence(doubles([[[2.0, 0.0], [-1.0, 1.0]]]), given, threshold=0.0)
    close(got, doubles([[[2.2, 0.0], [-0.9, 1.1]]]))


# -- what the loss must know ----------------------------------------------------------------------------------------------


def test_protected_rows_are_scaled_to_the_mean_over_their_tokens():
    """Advantages .5, -.5, 0 and a dropped one; 3, 2, 1 and 4 tokens: the mean of rows is the mean of 4 protected tokens."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    given, keep = group([[0, 0], [0, 0]], mask=mask), torch.tensor([[True, True], [True, False]])
    advantage = doubles([[0.5, -0.5], [0.0, 0.0]])
    got = share_of_protected(given, advantage, keep)["protected"]
    assert got.tolist() == [0.75, 0, 0.75, 0]
    per_row = doubles([6.0, 5.0, 2.0, 7.0])  # sums over a row's tokens
    close((got * per_row).sum() / keep.sum(), doubles((6 + 2) / 4))
    assert share_of_protected(given, advantage, keep, protected="all")["protected"].tolist() == [0.5, 0, 0.5, 0]


def test_without_a_protected_rollout_there_is_no_penalty():
    given, keep = group([[0, 0]], mask=torch.ones(2, 3)), torch.ones(1, 2, dtype=torch.bool)
    assert share_of_protected(given, doubles([[-1, -1]]), keep)["protected"].tolist() == [0, 0]
    assert share_of_protected(given, doubles([[1, 1]]), ~keep)["protected"].tolist() == [0, 0]


def test_protection_of_advantages_per_decision_goes_by_their_sum_where_loss_is_carried():
    given, keep = group([[0, 0]], mask=torch.tensor([[1, 1, 0], [1, 1, 1]])), torch.ones(1, 2, dtype=torch.bool)
    advantage = doubles([[[1.0, -2.0, 9.0], [1.0, -2.0, 9.0]]])
    assert [value > 0 for value in share_of_protected(given, advantage, keep)["protected"]] == [False, True]


def test_entropy_gate_of_three_tasks():
    """Task 0 above the band, 1 below, 2 inside; the mean over a task's tokens comes out of a mean over the update's rows."""
    old = -doubles([[1.0, 2.0], [3.0, NAN], [0.1, 0.1], [0.0, 0.2], [0.5, 0.5], [0.5, 0.5], [9.0, 9.0], [1.0, 1.0]])
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1], [1, 1], [1, 1], [1, 1], [0, 0]])
    keep = torch.tensor([[True, True], [True, True], [True, True], [False, True]])
    given = group([[0, 0]] * 4, mask=mask, old_logps=old, task=torch.tensor([0, 1, 2, 3]))
    got = gate_entropy(given, torch.zeros(4, 2), keep)
    assert got["entropy_gate"].tolist() == [7 / 3, 7 / 3, -7 / 4, -7 / 4, 0, 0, 0, 0]
    close(got["entropy_bound"], doubles([0.8, 0.8, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2]))
    rows = Rows(
        logps=torch.where(mask.bool(), old, 0.0),
        mask=mask,
        advantage=torch.zeros(8),
        keep=keep.flatten().double(),
        counts=Counts(rows=7, tokens=11, max_length=2),
        extras=got,
    )
    loss = gaussian_rank(band_coef=0.5).loss(rows)
    close(loss.sum / loss.count, doubles(0.5 * ((2.0 - 0.8) + (0.2 - 0.1))))


def test_band_upside_down_is_refused():
    given = group([[1, 0]], mask=torch.ones(2, 1), old_logps=torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"entropy_low=0.9 is above entropy_high=0.8"):
        gaussian_rank(entropy_low=0.9).credit(given)


@pytest.mark.parametrize(("entropy", "band"), [(0.1, 0.1), (0.5, 0.0), (1.0, 0.2), (0.2, 0.0), (0.8, 0.0)])
def test_without_tasks_all_prompts_are_one(entropy, band):
    old, mask = torch.full((4, 3), -entropy, dtype=torch.float64), torch.ones(4, 3)
    given = group([[1, 0], [0, 0]], mask=mask, old_logps=old)
    credit = gaussian_rank.credit(given)
    counts = Counts(rows=4, tokens=12, max_length=3)
    rows = Rows(logps=old, mask=mask, advantage=torch.zeros(4), counts=counts, extras=credit.extras)
    loss = gaussian_rank(band_coef=1.0).loss(rows)
    assert (loss.sum / loss.count).item() == pytest.approx(band, abs=1e-12)


def test_wrong_rollouts_with_a_right_sibling_go_to_the_teacher():
    """Kept and wrong, beside a right one: not the unscored, not those of a group that is all wrong."""
    policy = Policy(6, 3)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]])
    given = group([[1, 0, 0.5], [0, 0, 0]], [[False, False, True], [False] * 3], mask=mask, model=policy)
    weight = route_to_teacher(given, torch.zeros(2, 3), given.scored)["distillation_weight"]
    assert (weight > 0).nonzero().tolist() == [[1, 0], [1, 1]]
    ((taught, right),) = policy.asked
    assert taught.tolist() == [[False, True, False], [False] * 3]
    assert right.tolist() == [[True, False, False], [False] * 3]


def taught(entropies, sharpness=1.0, mask=None):
    """Weights of a wrong rollout's tokens, whose right sibling comes first."""
    entropies = doubles([[NAN] * len(entropies), entropies])
    mask = torch.ones(entropies.shape) if mask is None else torch.tensor([[1] * len(mask), mask])
    given = group([[1, 0]], mask=mask, model=SimpleNamespace(teach=lambda taught, right: entropies))
    keep = torch.ones(1, 2, dtype=torch.bool)
    weight = route_to_teacher(given, torch.zeros(1, 2), keep, sharpness=sharpness)["distillation_weight"]
    assert (weight[0] == 0).all()
    return weight[1]


def test_sure_tokens_of_the_teacher_weigh_more():
    got = taught([0.0, math.log(2.0), math.log(4.0)])
    close(got, doubles([1.0, 0.5, 0.25]) * 3 / 1.75)
    close(taught([0.1, 1.0, 2.0], sharpness=0.0), torch.ones(3, dtype=torch.float64))
    close(taught([0.0, math.log(2.0), NAN], mask=[1, 1, 0]), doubles([4 / 3, 2 / 3, 0.0]))


def test_weights_of_a_teacher_that_knows_nothing_are_even():
    close(taught([2e4, 2e4]), torch.ones(2, dtype=torch.float64))
    assert taught([1.0, 2.0], mask=[0, 0]).tolist() == [0, 0]


@pytest.mark.parametrize("outcome", [[[0, 0]], [[1, 1]]])
def test_teacher_is_not_asked_if_no_one_is_taught(outcome):
    given = group(outcome, mask=torch.ones(2, 3))
    weight = route_to_teacher(given, torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))["distillation_weight"]
    assert weight.tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("recipe", [llds, RECIPES["token_hidden_reward"], sample_routed])
def test_group_without_a_mask_is_refused_in_words(recipe):
    model = SimpleNamespace(influence=lambda right: (torch.ones(2, 3), torch.ones(2, 3)))
    with pytest.raises(ValueError, match="the group has no mask"):
        recipe.credit(group([[1, 0]], model=model))
