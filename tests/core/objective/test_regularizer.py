"""KL estimators: values by hand, and whose gradient each of them has."""

import math

import pytest
import torch

from core.objective.recipes import grpo
from core.objective.regularizer import kl_and_entropy, kl_estimate
from core.objective.rows import Counts, Rows

REFERENCE = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()


def test_closed_forms():
    logps, ref = torch.tensor(-1.0), torch.tensor(-1.0 + math.log(2.0))
    assert kl_estimate(logps, ref, "k1").item() == pytest.approx(-math.log(2))
    assert kl_estimate(logps, ref, "k2").item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_estimate(logps, ref, "k3").item() == pytest.approx(1 - math.log(2))
    for estimator in ("k1", "k2", "k3"):
        assert kl_estimate(ref, ref, estimator) == 0


def policy():
    """A policy over four choices, and one row per choice, as if each had been sampled once."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    logps = logits.log_softmax(0)
    counts = Counts(rows=4, tokens=4, max_length=1)
    mask, advantage, ref_logps = torch.ones(4, 1), torch.zeros(4), REFERENCE.unsqueeze(1)
    rows = Rows(logps=logps.unsqueeze(1), mask=mask, advantage=advantage, ref_logps=ref_logps, counts=counts)
    return logits, logps, rows.settled()


def forward_kl(logps):
    return (logps.exp() * (logps - REFERENCE)).sum()


def reverse_kl(logps):
    return (REFERENCE.exp() * (REFERENCE - logps)).sum()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator):
    _, logps, _ = policy()
    expected = (logps.exp() * kl_estimate(logps, REFERENCE, estimator)).sum()
    torch.testing.assert_close(expected, forward_kl(logps))


@pytest.mark.parametrize(
    ("estimator", "weight", "truth"),
    [
        ("k1", "none", lambda logps: 0 * logps.sum()),
        ("k2", "none", forward_kl),
        ("k3", "none", reverse_kl),
        ("k1", "token", forward_kl),
        ("k3", "token", forward_kl),
        ("k3", "sequence", forward_kl),
    ],
)
def test_expected_on_policy_gradient_is_the_one_documented(estimator, weight, truth):
    logits, logps, rows = policy()
    term, _ = kl_and_entropy(rows, beta=1.0, kl=estimator, kl_weight=weight)
    (got,) = torch.autograd.grad((logps.exp().detach() * term.squeeze(1)).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad(truth(logps), logits)
    torch.testing.assert_close(got, expected)


def test_entropy_bonus_raises_entropy_through_the_recipe_s_reduction():
    logits, logps, rows = policy()
    entropy = -(logps.exp() * logps).sum()
    rows.entropy = entropy.expand(4, 1)
    loss = grpo(entropy_coef=0.5, reduction="token_mean").loss(rows)
    (got,) = torch.autograd.grad(loss.sum / loss.count, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(-0.5 * entropy, logits)
    torch.testing.assert_close(got, expected)
    total, count = loss.metrics["entropy"]
    torch.testing.assert_close(total / count, entropy.detach().float())


def test_kl_metric_is_the_unweighted_estimate():
    _, logps, rows = policy()
    rows.old_logps = rows.logps.detach() - 0.7
    total, count = grpo(beta=0.3).loss(rows).metrics["kl"]
    torch.testing.assert_close(total / count, kl_estimate(logps, REFERENCE).mean().detach().float())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"beta": 0.1}, "beta=0.1 needs the reference"), ({"entropy_coef": 0.1}, "entropy with gradient")],
)
def test_what_the_trainer_did_not_give_is_named(options, message):
    _, _, rows = policy()
    rows.ref_logps, rows.entropy = None, torch.ones(4, 1)
    with pytest.raises(ValueError, match=message):
        grpo(**options).loss(rows)


def test_without_weights_there_is_no_term():
    assert kl_and_entropy(policy()[2]) == (None, {})
