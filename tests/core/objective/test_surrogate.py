"""Ratios and clips: where the gradient flows and where it stops."""

import math

import pytest
import torch

from core.objective.recipes import grpo
from core.objective.rows import Counts, Rows
from core.objective.surrogate import (
    cap_loss,
    capped_token_ratio,
    clip_loss,
    clip_mask,
    clipped_normalised_ratio,
    clipped_sequence_ratio,
    clipped_token_ratio,
    masked_reinforce,
    mixed_ratio,
    taught_or_clipped,
)

COUNTS = Counts(rows=1, tokens=1, max_length=1)


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def log_probs(*shape, seed=0, gradient=False):
    values = -torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.requires_grad_(gradient)


def rows(logps, old_logps, advantage, mask=None, **fields):
    mask = torch.ones_like(logps) if mask is None else mask
    return Rows(logps=logps, old_logps=old_logps, mask=mask, advantage=advantage, counts=COUNTS, **fields).settled()


def test_clip_table():
    """ratio x sign of the advantage, by hand, with 0.8 .. 1.3 and delta 2."""
    ratio = doubles([0.5, 1.0, 1.5, 3.0]).unsqueeze(1)
    for advantage, plain, bounded in (
        (2.0, [-1.0, -2.0, -2.6, -2.6], [-1.0, -2.0, -2.6, -2.6]),
        (-2.0, [1.6, 2.0, 3.0, 6.0], [1.6, 2.0, 3.0, 4.0]),
    ):
        advantages = torch.full_like(ratio, advantage)
        torch.testing.assert_close(clip_loss(ratio, advantages, 0.2, 0.3).squeeze(1), doubles(plain))
        torch.testing.assert_close(clip_loss(ratio, advantages, 0.2, 0.3, delta=2.0).squeeze(1), doubles(bounded))


def test_one_epsilon_is_symmetric():
    ratio, advantage = doubles([[0.1], [5.0]]), doubles([[-1.0], [1.0]])
    assert clip_loss(ratio, advantage, 0.2).tolist() == [[0.8], [-1.2]]


@pytest.mark.parametrize("surrogate", [clipped_token_ratio, capped_token_ratio])
def test_ratio_one_gives_the_policy_gradient(surrogate):
    logps, advantage = log_probs(3, 4, gradient=True), doubles([1.5, -0.5, 2.0])
    loss, metrics = surrogate(rows(logps, None, advantage))
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    torch.testing.assert_close(gradient, -advantage.unsqueeze(1).expand(3, 4))
    assert metrics["ratio_deviation"][0] == metrics["ratio_deviation_max"][0] == metrics["clip_high"][0] == 0
    assert metrics["ratio"][0] == metrics["ratio"][1] == 12


def test_sequence_ratio_at_one_gives_the_policy_gradient_of_the_row_mean():
    logps, advantage = log_probs(2, 4, gradient=True), doubles([1.5, -0.5])
    mask = doubles([[1, 1, 1, 1], [1, 1, 0, 0]])
    loss, _ = clipped_sequence_ratio(rows(logps, None, advantage, mask))
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    torch.testing.assert_close(gradient, doubles([[-1.5 / 4] * 4, [0.25, 0.25, 0, 0]]))


def test_clip_switched_off_equals_reinforce_with_importance_weights():
    logps, old, advantage = log_probs(3, 4, gradient=True), log_probs(3, 4, seed=1) * 3, doubles([1.5, -0.5, 2.0])
    unclipped, _ = clipped_token_ratio(rows(logps, old, advantage), epsilon_low=1.0, epsilon_high=math.inf)
    uncapped = cap_loss(torch.exp(logps - old), advantage.unsqueeze(1), logps, math.inf)
    by_hand = -torch.exp(logps - old).detach() * advantage.unsqueeze(1)
    for loss in (unclipped, uncapped):
        (gradient,) = torch.autograd.grad(loss.sum(), logps)
        torch.testing.assert_close(gradient, by_hand)


def test_clip_stops_only_the_gradient_that_leads_further_away():
    old = torch.zeros(4, 1, dtype=torch.float64)
    logps = doubles([[0.5], [-0.5], [0.5], [-0.5]]).requires_grad_()
    loss, metrics = clipped_token_ratio(rows(logps, old, doubles([1.0, 1.0, -1.0, -1.0])))
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    up, down = math.exp(0.5), math.exp(-0.5)
    torch.testing.assert_close(gradient, doubles([[0.0], [-down], [up], [0.0]]))
    assert [metrics[name][0].item() for name in ("clip_low", "clip_high")] == [1, 1]
    assert metrics["ratio_deviation_max"][0].item() == pytest.approx(up - 1)


def test_cap_keeps_every_gradient():
    logps, old = doubles([[2.0, 0.0]]).requires_grad_(), torch.zeros(1, 2, dtype=torch.float64)
    loss, metrics = capped_token_ratio(rows(logps, old, doubles([1.0])), epsilon_high=5.0)
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    torch.testing.assert_close(gradient, doubles([[-5.0, -1.0]]))
    assert metrics["clip_high"][0] == 1


def test_sequence_ratio_of_one_token_equals_the_token_ratio():
    given = rows(log_probs(5, 1), log_probs(5, 1, seed=1), torch.ones(5))
    torch.testing.assert_close(given.sequence_ratio, given.token_ratio)
    torch.testing.assert_close(given.token_ratio, torch.exp(given.logps - given.old_logps))


def test_sequence_ratio_is_the_geometric_mean_over_the_mask():
    logps = doubles([[math.log(2.0), math.log(8.0), 5.0], [1.0, 1.0, 1.0]])
    given = rows(logps, torch.zeros_like(logps), torch.ones(2), doubles([[1, 1, 0], [0, 0, 0]]))
    torch.testing.assert_close(given.sequence_ratio, doubles([[4.0], [1.0]]))


def test_advantage_per_decision_equals_per_row_where_it_is_constant():
    logps, old, advantage = log_probs(3, 4), log_probs(3, 4, seed=1), doubles([1.5, -0.5, 2.0])
    for surrogate in (clipped_token_ratio, clipped_sequence_ratio, capped_token_ratio):
        by_row, _ = surrogate(rows(logps, old, advantage))
        by_decision, _ = surrogate(rows(logps, old, advantage.unsqueeze(1).expand(3, 4)))
        torch.testing.assert_close(by_row.expand(3, 4), by_decision.expand(3, 4))


def test_metrics_count_kept_decisions_or_kept_rows():
    logps, mask, keep = log_probs(3, 4), doubles([[1, 1, 0, 0]] * 3), doubles([1, 0, 1])
    given = rows(logps, logps.detach(), doubles([1.0, 1.0, 1.0]), mask, keep=keep)
    assert clipped_token_ratio(given)[1]["ratio"][1] == 4
    assert clipped_sequence_ratio(given)[1]["ratio"][1] == 2


def test_weight_multiplies_the_surrogate_and_no_regularizer():
    logps, ref = log_probs(2, 3), log_probs(2, 3, seed=1)
    mask, advantage, counts = torch.ones(2, 3), doubles([1.0, -1.0]), Counts(rows=2, tokens=6, max_length=3)
    weight = doubles([[0.5], [3.0]])
    given = Rows(logps=logps, mask=mask, advantage=advantage, ref_logps=ref, counts=counts, weight=weight)
    loss = grpo(beta=0.1, kl="k2", reduction="token_mean").loss(given)
    by_hand = (-advantage.unsqueeze(1) * weight + 0.1 * 0.5 * (logps - ref) ** 2).sum()
    torch.testing.assert_close(loss.sum, by_hand)
    assert loss.count == 6


# -- ratios of Gaussian steps -----------------------------------------------------------------------------------------------


def gaussian_rows(mean, noise, std, dt, advantage):
    """One row a noise: samples old + std * noise of steps whose mean, 0 before, is now `mean`; each number one a step."""
    mean, noise, std, dt = (doubles(values) for values in (mean, noise, std, dt))
    mean.requires_grad_()
    sampled = (std * noise).unsqueeze(2)  # (B, T, 1)

    def logps(at):
        return torch.distributions.Normal(at.view(1, -1, 1), std.view(1, -1, 1)).log_prob(sampled).mean(2)

    wide = {"drift": mean**2 / (2 * std**2), "std": std, "dt": dt}
    extras = {name: values.expand(len(noise), -1) for name, values in wide.items()}
    return mean, rows(logps(mean), logps(torch.zeros_like(std)), doubles(advantage), extras=extras)


def test_normalised_ratio_of_fresh_data_is_one_with_the_policy_gradient_over_dt():
    mean, given = gaussian_rows([0.0, 0.0], [[0.5, -0.3], [-1.0, 0.2]], [0.5, 0.1], [0.1, 0.2], [1.0, -2.0])
    loss, metrics = clipped_normalised_ratio(given)
    torch.testing.assert_close(loss.detach(), doubles([[-10.0, -5.0], [20.0, 10.0]]))
    assert metrics["ratio_deviation_max"][0] == metrics["drift"][0] == metrics["clip_high"][0] == 0
    (gradient,) = torch.autograd.grad(loss.sum(), mean)
    # d log ratio / d mean = noise / std, times std: the same size at every step
    torch.testing.assert_close(gradient, doubles([-(0.5 + 2.0) / 0.1, (0.3 + 0.4) / 0.2]))


def test_drift_takes_the_bias_out_of_the_ratio_and_std_its_spread():
    """Of noises that come in pairs, log ratios average to -drift, and the normalised ones to 0, spread alike at each std."""
    std = [0.5, 0.1, 0.02]
    _, given = gaussian_rows([0.3 * s for s in std], [[1.0] * 3, [-1.0] * 3], std, [1.0] * 3, [1.0, 1.0])
    torch.testing.assert_close(given.log_ratio.mean(0), doubles([-0.045] * 3))
    loss, metrics = clipped_normalised_ratio(given, epsilon_low=1.0, epsilon_high=math.inf)
    log_ratio = (-loss).log()
    torch.testing.assert_close(log_ratio.mean(0), doubles([0.0] * 3))
    torch.testing.assert_close(log_ratio[0], 0.3 * doubles(std))  # that of the mean's way: 0.3 of a std
    assert torch.div(*metrics["drift"]).item() == pytest.approx(0.045)


def test_drift_has_a_gradient():
    mean, given = gaussian_rows([0.2], [[0.5]], [0.5], [0.1], [1.0])
    loss, _ = clipped_normalised_ratio(given, epsilon_low=1.0, epsilon_high=math.inf)
    (gradient,) = torch.autograd.grad(loss.sum(), mean)
    ratio = math.exp((0.5 * 0.2 / 0.5) * 0.5)  # log ratio + drift = noise * mean / std
    assert gradient.item() == pytest.approx(-ratio * 0.5 / 0.1)


def test_normalised_ratio_is_clipped_like_any_other():
    _, given = gaussian_rows([0.2], [[0.5], [0.5], [-0.5], [-0.5]], [0.5], [0.1], [1.0, -1.0, 1.0, -1.0])
    loss, metrics = clipped_normalised_ratio(given, epsilon_low=0.01, epsilon_high=0.02)
    up, down = math.exp(0.1), math.exp(-0.1)
    torch.testing.assert_close(loss.flatten(), 10 * doubles([-1.02, up, -down, 0.99]))
    assert [metrics[name][0].item() for name in ("clip_low", "clip_high")] == [1, 1]


def test_what_the_guard_looks_at_is_named_if_it_is_missing():
    _, given = gaussian_rows([0.2], [[0.5]], [0.5], [0.1], [1.0])
    for name in ("drift", "std", "dt"):
        extras = {key: value for key, value in given.extras.items() if key != name}
        with pytest.raises(ValueError, match=f"rows have no extra '{name}'"):
            clipped_normalised_ratio(rows(given.logps, given.old_logps, given.advantage, extras=extras))


# -- REINFORCE on what a clip lets through ------------------------------------------------------------------------------

RATIOS = [0.3, 0.5, 0.9, 1.1, 1.5, 3.5]
MASKS = {  # clip: advantage > 0, = 0, < 0
    "none": ([1] * 6, [1] * 6, [1] * 6),
    "one_side": ([1, 1, 1, 1, 0, 0], [1] * 6, [0, 0, 1, 1, 1, 1]),
    "two_side": ([0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0]),
    "ring": ([1, 0, 1, 1, 0, 0], [1, 0, 1, 1, 0, 1], [0, 0, 1, 1, 0, 1]),
}


@pytest.mark.parametrize("clip", list(MASKS))
def test_clip_mask_table(clip):
    """Ranges .8 to 1.2, and from .4 down and 3 up for the ring. An advantage of 0 is on both sides."""
    ratio = doubles([RATIOS] * 3)
    advantage = doubles([[2.0], [0.0], [-2.0]])
    got = clip_mask(ratio, advantage, clip, 0.2, 0.2, 0.6, 2.0)
    assert got.dtype == torch.bool
    assert got.int().tolist() == [*MASKS[clip]]
    by_decision = clip_mask(ratio[:1], advantage.expand(3, 6), clip, 0.2, 0.2, 0.6, 2.0)
    assert torch.equal(by_decision, got)


@pytest.mark.parametrize(("clip", "inside"), [("one_side", [1, 1]), ("two_side", [1, 1]), ("ring", [1, 1])])
def test_bounds_belong_to_the_inside(clip, inside):
    """With powers of two, so that 1 - low and 1 + high are exact; on fresh data no clip does anything."""
    ratio, advantage = doubles([[0.75, 1.5]]), doubles([[1.0]])
    for sign in (1, -1):
        assert clip_mask(ratio, sign * advantage, clip, 0.25, 0.5, 0.75, 2.0).int().tolist() == [inside]
        assert clip_mask(torch.ones(1, 4), sign * advantage, clip, 0.0, 0.0, 1.0, 2.0).all()
    ring = clip_mask(doubles([[0.25, 3.0], [0.25, 3.0]]), doubles([[1.0], [-1.0]]), "ring", 0.2, 0.2, 0.75, 2.0)
    assert ring.tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("decisions", [False, True], ids=["row", "decision"])
def test_one_sided_mask_with_the_ratio_has_the_gradient_of_the_clipped_loss(decisions):
    logps, old = log_probs(6, 8, gradient=True), log_probs(6, 8, seed=1)
    advantage = doubles([1.0, -1.0, 0.5, -2.0, 0.0, 3.0])
    given = rows(logps, old, advantage.unsqueeze(1) * log_probs(6, 8, seed=2).exp() if decisions else advantage)
    masked, metrics = masked_reinforce(given, epsilon_low=0.1, epsilon_high=0.3)
    clipped, _ = clipped_token_ratio(given, epsilon_low=0.1, epsilon_high=0.3)
    gradients = [torch.autograd.grad(loss.sum(), logps, retain_graph=True)[0] for loss in (masked, clipped)]
    assert torch.equal(*gradients)
    assert 10 < metrics["clip_masked"][0] < 40


@pytest.mark.parametrize("clip", list(MASKS))
@pytest.mark.parametrize("weight", ["ratio", "none"])
def test_masked_reinforce_by_hand(clip, weight):
    old = torch.zeros(3, 6, dtype=torch.float64)
    logps = doubles([RATIOS] * 3).log().requires_grad_()
    loss, metrics = masked_reinforce(rows(logps, old, doubles([2.0, 0.0, -2.0])), clip=clip, weight=weight)
    allowed = doubles([*MASKS[clip]])
    factor = allowed * doubles([[2.0], [0.0], [-2.0]]) * (doubles([RATIOS]) if weight == "ratio" else 1.0)
    torch.testing.assert_close(loss, -factor * logps)
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    torch.testing.assert_close(gradient, -factor)
    assert metrics["clip_masked"][0] == (1 - allowed).sum()
    assert metrics["clip_masked"][1] == 18  # a masked decision stays in the counts


# -- token and sequence ratio, mixed ------------------------------------------------------------------------------------


def mixed(advantage, entropy=None, mask=None, **options):
    """Ratios 1.5, .7 and 1.05, whose geometric mean is 1.033."""
    logps = doubles([[1.5, 0.7, 1.05]]).log().requires_grad_()
    given = rows(logps, torch.zeros_like(logps), doubles([advantage]), mask)
    given.entropy = None if entropy is None else doubles([entropy])
    loss, _ = mixed_ratio(given, mix="even" if entropy is None else "entropy", **options)
    return -loss[0].detach(), torch.autograd.grad(loss.sum(), logps)[0][0]


S = (1.5 * 0.7 * 1.05) ** (1 / 3)
HIGH, LOW = 1 + 4e-4, 1 - 3e-4  # the sequence's bounds


@pytest.mark.parametrize(
    ("pessimism", "advantage", "token", "sequence", "joint"),
    [
        ("each", 1.0, [1.2, 0.7, 1.05], [HIGH] * 3, None),
        ("each", -1.0, [1.5, 0.8, 1.05], [S] * 3, None),
        ("mixed", 1.0, [1.2, 0.7, 1.05], [HIGH, S, HIGH], [(1.2 + HIGH) / 2, (0.7 + S) / 2, (1.05 + HIGH) / 2]),
        ("mixed", -1.0, [1.5, 0.8, 1.05], [S, HIGH, S], [(1.5 + S) / 2, (0.8 + HIGH) / 2, (1.05 + S) / 2]),
        ("none", 1.0, [1.2, 0.8, 1.05], [HIGH] * 3, None),
        ("none", -1.0, [1.2, 0.8, 1.05], [HIGH] * 3, None),
    ],
)
def test_three_readings_of_the_mixed_ratio(pessimism, advantage, token, sequence, joint):
    even, _ = mixed(advantage, pessimism=pessimism)
    expected = joint or [(t + s) / 2 for t, s in zip(token, sequence, strict=True)]
    torch.testing.assert_close(even, advantage * doubles(expected))
    if joint is None:  # the least and the most uncertain decision, and one a quarter of the way
        shares = doubles([0.0, 1.0, 0.25])
        by_entropy, _ = mixed(advantage, entropy=[0.4, 2.4, 0.9], pessimism=pessimism)
        value = advantage * (shares * doubles(token) + (1 - shares) * doubles(sequence))
        torch.testing.assert_close(by_entropy, value, rtol=1e-7, atol=1e-7)


def test_clipped_branch_without_pessimism_has_no_gradient_on_either_side():
    for advantage in (1.0, -1.0):
        _, gradient = mixed(advantage, pessimism="none")
        torch.testing.assert_close(gradient, -advantage * doubles([0.0, 0.0, 1.05 / 2]))
    _, pessimistic = mixed(-1.0, pessimism="each")
    torch.testing.assert_close(pessimistic, (doubles([1.5, 0.0, 1.05]) + S) / 2)


def test_most_uncertain_decision_has_grpo_s_value_and_the_surest_one_gspo_s():
    """Shares 1 and 0, to the 1e-8 that keeps the division finite."""
    logps, old, advantage = log_probs(4, 3), log_probs(4, 3, seed=1), doubles([1.5, -0.5, 2.0, -1.0])
    given = rows(logps, old, advantage)
    given.entropy = doubles([[0.0, 1.0, 2.0]] * 4)
    token, _ = clipped_token_ratio(given, epsilon_low=0.2, epsilon_high=0.2)
    sequence, _ = clipped_sequence_ratio(given, epsilon_low=3e-4, epsilon_high=4e-4)
    for pessimism in ("each", "mixed"):
        both, _ = mixed_ratio(given, mix="entropy", pessimism=pessimism)
        torch.testing.assert_close(both[:, 0], sequence[:, 0], rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(both[:, 2], token[:, 2], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("pessimism", ["each", "mixed"])
def test_equal_ranges_on_one_decision_are_grpo_and_gspo_alike(pessimism):
    logps, old, advantage = log_probs(6, 1, gradient=True), log_probs(6, 1, seed=1), doubles([1, -1, 2, -2, 0.5, -0.5])
    given = rows(logps, old, advantage)
    ranges = {"epsilon_low": 0.1, "epsilon_high": 0.2}
    both, _ = mixed_ratio(given, pessimism=pessimism, **ranges, sequence_epsilon_low=0.1, sequence_epsilon_high=0.2)
    gradients = [torch.autograd.grad(both.sum(), logps, retain_graph=True)[0]]
    for surrogate in (clipped_token_ratio, clipped_sequence_ratio):
        alone, _ = surrogate(given, **ranges)
        torch.testing.assert_close(both, alone)
        gradients.append(torch.autograd.grad(alone.sum(), logps, retain_graph=True)[0])
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])


def test_fresh_data_mix_gradients_though_not_values():
    value, _ = mixed(1.0)
    logps = log_probs(1, 4, gradient=True)
    loss, _ = mixed_ratio(rows(logps, None, doubles([2.0])))
    assert loss.tolist() == [[-2.0] * 4]
    (gradient,) = torch.autograd.grad(loss[0, 1], logps)
    torch.testing.assert_close(gradient, -2.0 * doubles([[1 / 8, 1 / 2 + 1 / 8, 1 / 8, 1 / 8]]))
    assert value.shape == (3,)


def test_constant_entropy_and_a_row_without_decisions_have_even_shares():
    even, gradient = mixed(-1.0)
    constant, same = mixed(-1.0, entropy=[0.7, 0.7, 0.7])
    assert torch.equal(even, constant)
    assert torch.equal(gradient, same)
    masked, _ = mixed(-1.0, entropy=[0.7, 9.0, 0.7], mask=doubles([[1, 0, 1]]))  # padding is out of least and greatest
    assert masked[1] == mixed(-1.0, mask=doubles([[1, 0, 1]]))[0][1]
    empty, gradient = mixed(1.0, entropy=[0.1, 0.2, 0.3], mask=torch.zeros(1, 3, dtype=torch.float64))
    assert empty.tolist() == [1, 1, 1]
    assert gradient.tolist() == [0, 0, 0]


def test_entropy_mix_without_entropies_is_refused_and_with_them_is_detached():
    given = rows(log_probs(2, 3), None, doubles([1.0, -1.0]))
    with pytest.raises(ValueError, match=r"mix=entropy needs entropies.*use mix=even"):
        mixed_ratio(given, mix="entropy")
    given.entropy = log_probs(2, 3, gradient=True)
    assert not mixed_ratio(given, mix="entropy")[0].requires_grad


# -- taught rollouts ----------------------------------------------------------------------------------------------------


def test_taught_decisions_have_the_weighted_distance_and_the_others_the_clipped_loss():
    """Four tokens of GRPO, three of the teacher, whose entropies are .1, 1 and 2."""
    weights = [math.exp(-h) for h in (0.1, 1.0, 2.0)]
    weights = [3 * w / sum(weights) for w in weights]
    logps, distance = log_probs(2, 4, gradient=True), doubles([[9.0] * 4, [0.3, 0.2, 0.5, 9.0]]).requires_grad_()
    mask = doubles([[1, 1, 1, 1], [1, 1, 1, 0]])
    given = rows(logps, None, doubles([[0.1, 0.1, 0.2, -0.05], [7.0] * 4]), mask)
    given.extras = {"distillation_weight": doubles([[0.0] * 4, [*weights, math.nan]]), "distillation": distance}
    loss, metrics = taught_or_clipped(given)
    torch.testing.assert_close(loss[1, :3], doubles(weights) * doubles([0.3, 0.2, 0.5]))
    assert ((loss * mask).sum() / mask.sum()).item() == pytest.approx(0.075613, abs=1e-6)
    by_logps, by_distance = torch.autograd.grad((loss * mask).sum(), (logps, distance))
    torch.testing.assert_close(by_logps[0], -given.advantage[0])
    torch.testing.assert_close(by_distance[1], doubles([*weights, 0.0]))
    assert (by_logps[1] == 0).all()
    assert (by_distance[0] == 0).all()
    assert torch.div(*metrics["taught"]).item() == pytest.approx(3 / 7)
    assert torch.div(*metrics["distillation"]).item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_garbage_at_the_teacher_s_padding_and_dropped_rows_stays_out(garbage):
    logps, mask = log_probs(3, 2, gradient=True), doubles([[1, 1], [1, 0], [1, 1]])
    distance = doubles([[0.5, 0.5], [0.5, garbage], [garbage] * 2]).requires_grad_()
    given = rows(logps, None, doubles([1.0, 1.0, 1.0]), mask, keep=doubles([1, 1, 0]))
    given.extras = {"distillation_weight": doubles([[0, 1], [1, garbage], [1, garbage]]), "distillation": distance}
    loss, metrics = taught_or_clipped(given)
    gradients = torch.autograd.grad((loss * given.loss_mask).sum(), (logps, distance))
    assert loss.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert metrics["distillation"] == (1.0, 2.0)


def test_routing_to_the_teacher_without_what_it_says_is_refused():
    given = rows(log_probs(1, 2), None, doubles([1.0]))
    given.extras = {"distillation_weight": torch.zeros(1, 2)}
    for missing in ("distillation", "distillation_weight"):
        with pytest.raises(ValueError, match=f"rows have no extra {missing!r}"):
            taught_or_clipped(given)
        given.extras = {"distillation": torch.zeros(1, 2)}
