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
    clipped_sequence_ratio,
    clipped_token_ratio,
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
