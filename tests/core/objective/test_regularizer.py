"""KL estimators: values by hand, and whose gradient each of them has."""

import math

import pytest
import torch

from core.objective.recipes import RECIPES, flow_grpo, grpo, llds
from core.objective.regularizer import (
    closed_form_kl,
    distance_to_sampler,
    entropy_band,
    guard_likelihood,
    kl_and_entropy,
    kl_estimate,
)
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


# -- closed form ----------------------------------------------------------------------------------------------------------


def test_closed_form_kl_is_added_as_it_is():
    """No ratio, no weight; through the recipe's reduction."""
    divergence = torch.tensor([[0.5, 2.0, math.nan], [1.0, 4.0, 0.0]], dtype=torch.float64).requires_grad_()
    mask, weight = torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.full((2, 1), 7.0)
    logps, old = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fields = {"mask": mask, "advantage": torch.ones(2), "old_logps": old, "counts": Counts(2, 5, 3), "weight": weight}
    rows = Rows(logps=logps, extras={"divergence": divergence}, **fields)
    without, loss = flow_grpo.loss(rows), flow_grpo(beta=0.1).loss(rows)
    assert ((loss.sum - without.sum) / loss.count).item() == pytest.approx(0.1 * ((0.5 + 2) / 2 + (1 + 4 + 0) / 3) / 2)
    (gradient,) = torch.autograd.grad(loss.sum, divergence)
    torch.testing.assert_close(gradient, 0.1 * torch.tensor([[0.5, 0.5, 0.0], [1 / 3] * 3]).double())
    total, count = loss.metrics["kl"]
    assert (total.item(), count.item()) == (7.5, 5)
    assert "kl" not in without.metrics
    assert closed_form_kl(rows) == (None, {})
    with pytest.raises(ValueError, match="no extra 'divergence'"):
        flow_grpo(beta=0.1).loss(Rows(logps=logps, **fields))


# -- distance to the policy that sampled ----------------------------------------------------------------------------------


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def sampled(logps, old_logps=None, mask=None, **extras):
    logps = doubles(logps).requires_grad_()
    old = None if old_logps is None else doubles(old_logps)
    mask = torch.ones(logps.shape, dtype=torch.long) if mask is None else torch.tensor(mask)
    counts = Counts(rows=len(mask), tokens=mask.sum().item(), max_length=mask.shape[1])
    extras = {name: doubles(values) for name, values in extras.items()}
    advantage = torch.zeros(len(mask), dtype=torch.float64)
    return logps, Rows(
        logps=logps, old_logps=old, mask=mask, advantage=advantage, counts=counts, extras=extras
    ).settled()


@pytest.mark.parametrize(
    ("toward", "term", "slope"), [("k2", [0.04, 0.25], [-0.4, 1.0]), ("forward_kl", [1, 2], [-1, -1])]
)
def test_distance_to_the_sampler_by_hand(toward, term, slope):
    logps, rows = sampled([[-1.0, -2.0]], [[-0.8, -2.5]])
    penalty, metrics = distance_to_sampler(rows, toward=toward, penalty=0.3)
    torch.testing.assert_close(penalty, 0.3 * doubles([term]))
    (gradient,) = torch.autograd.grad(penalty.sum(), logps)
    torch.testing.assert_close(gradient, 0.3 * doubles([slope]))
    assert torch.div(*metrics[f"sampler_{toward}"]).item() == pytest.approx(sum(term) / 2)


def test_squared_distance_is_nothing_on_fresh_data():
    logps, rows = sampled([[-1.0, -2.0]])
    penalty, _ = distance_to_sampler(rows)
    (gradient,) = torch.autograd.grad(penalty.sum(), logps)
    assert penalty.tolist() == gradient.tolist() == [[0, 0]]


@pytest.mark.parametrize("band", [False, True], ids=["forward_kl", "entropy_band"])
def test_minus_logp_of_fresh_samples_has_no_expected_gradient(band):
    """One row per choice, weighted with its probability: imitation of fresh data, and the entropy band, only add noise."""
    logits, logps, rows = policy()
    rows.extras = {"entropy_gate": torch.ones(4), "entropy_bound": torch.zeros(4)}
    term = entropy_band(rows)[0] if band else distance_to_sampler(rows, toward="forward_kl")[0].squeeze(1)
    (gradient,) = torch.autograd.grad((logps.exp().detach() * term).sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "fixed_length"])
def test_asymre_is_reinforce_with_its_baseline_lowered(reduction):
    asymre, rec = (RECIPES[name](reduction=reduction) for name in ("asymre", "rec"))
    logps, old = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    advantage, gradients = doubles([0.6, -0.4, -0.4, -0.4, 0.6]), []
    for recipe, given in ((asymre, advantage), (rec(clip="none", weight="none"), advantage + 0.1)):
        leaf = logps.clone().requires_grad_()
        counts = Counts(rows=5, tokens=15, max_length=3)
        loss = recipe.loss(Rows(logps=leaf, old_logps=old, mask=torch.ones(5, 3), advantage=given, counts=counts))
        gradients.append(torch.autograd.grad(loss.sum / loss.count, leaf)[0])
    torch.testing.assert_close(*gradients)


# -- likelihood guard -----------------------------------------------------------------------------------------------------

OLD = [[-0.5, -0.2, -1.0, -0.3], [-0.4, -0.6, -0.2, -0.1]]
NEW = [[-0.7, -0.1, -1.2, -0.3], [-0.9, -0.6, -0.1, -0.1]]  # falls by .2, -.1, .2, 0; .5, 0, -.1, 0
GUARD = [[1, 1, 1, 1], [1, 1, 1, 0]]


def guarded(level, logps=NEW, old=OLD, mask=GUARD, protected=(1.0, 0.0)):
    leaf, rows = sampled(logps, old, mask, protected=list(protected))
    penalty, metrics = guard_likelihood(rows, penalty=0.5, level=level)
    (gradient,) = torch.autograd.grad(penalty.sum(), leaf)
    return penalty.tolist(), gradient.tolist(), metrics["guarded"]


@pytest.mark.parametrize(
    ("level", "gate"), [("turn", [1, 1, 1, 1]), ("rollout", [1, 1, 1, 1]), ("token", [1, 0, 1, 0])]
)
def test_fallen_tokens_of_protected_rollouts_cost(level, gate):
    penalty, gradient, metric = guarded(level)
    assert penalty == [pytest.approx(0.5 * 0.4), 0]
    assert gradient == [[-0.5, 0, -0.5, 0], [0, 0, 0, 0]]
    fell = 1 if level == "token" else 3  # of the other rollout, which nothing protects
    assert metric[0] == sum(gate) + fell
    assert metric[1] == 7


def test_turns_are_runs_of_decisions_between_observations():
    """Two turns and an observation: the first rose as a whole, the second fell. As one rollout they fell."""
    old, new = [[-0.5, -0.2, 0.0, -1.0, -0.3]], [[-0.7, 0.1, 9.0, -1.2, -0.3]]
    mask = [[1, 1, 0, 1, 1]]
    assert guarded("turn", new, old, mask, [1.0])[1] == [[0, 0, 0, -0.5, 0]]
    assert guarded("rollout", new, old, mask, [1.0])[1] == [[-0.5, 0, 0, -0.5, 0]]
    assert guarded("token", new, old, mask, [1.0])[1] == [[-0.5, 0, 0, -0.5, 0]]


@pytest.mark.parametrize("level", ["turn", "rollout"])
def test_turn_that_is_as_likely_as_before_is_not_guarded(level):
    assert guarded(level, [[-0.75, -0.25]], [[-0.5, -0.5]], [[1, 1]], [1.0])[0] == [0]


def slow_guard(old, new, mask, level):
    """Walks over the tokens of one rollout."""
    turns, inside = [], False
    for t, used in enumerate(mask):
        if used and (not inside or level == "token"):
            turns.append([])
        if used:
            turns[-1].append(t)
        inside = bool(used)
    if level == "rollout":
        turns = [[t for turn in turns for t in turn]]
    fallen = [turn for turn in turns if sum(old[t] - new[t] for t in turn) > 0]
    return sum(max(0.0, old[t] - new[t]) for turn in fallen for t in turn)


@pytest.mark.parametrize("level", ["turn", "rollout", "token"])
def test_guard_equals_a_walk_over_turns(level):
    """Masks that begin and end with gaps, whole, empty, and of single decisions."""
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(200, 7, generator=generator, dtype=torch.float64)
    new = old + 0.5 * torch.randn(200, 7, generator=generator, dtype=torch.float64)
    mask = (torch.rand(200, 7, generator=generator) < 0.7).long()
    mask[0], mask[1] = 0, 1
    penalty, _, _ = guarded(level, new.tolist(), old.tolist(), mask.tolist(), [1.0] * 200)
    expected = [0.5 * slow_guard(*(part[i].tolist() for part in (old, new, mask)), level) for i in range(200)]
    torch.testing.assert_close(doubles(penalty), doubles(expected))


@pytest.mark.parametrize("level", ["turn", "rollout", "token"])
def test_guard_is_exactly_nothing_where_the_policy_has_not_moved(level):
    penalty, gradient, _ = guarded(level, OLD, OLD, GUARD, [1.0, 1.0])
    assert penalty == [0, 0]
    assert gradient == [[0] * 4] * 2
    leaf, rows = sampled(OLD, None, GUARD, protected=[1.0, 1.0])
    assert torch.autograd.grad(guard_likelihood(rows, level=level)[0].sum(), leaf)[0].abs().sum() == 0


@pytest.mark.parametrize(("protected", "value"), [("mean", 0.02), ("all", 0.2 * 0.4 / 7)])
def test_guard_through_the_recipe(protected, value):
    """The mean over the four tokens of the protected rollout, or over all seven."""
    share = {"mean": 2 / 4, "all": 2 / 7}[protected]
    _, rows = sampled(NEW, OLD, GUARD, protected=[share, 0.0])
    loss, plain = llds.loss(rows), grpo.loss(rows)
    assert ((loss.sum - plain.sum) / loss.count).item() == pytest.approx(value)
    doubled = llds(penalty=0.4).loss(rows)
    assert ((doubled.sum - plain.sum) / loss.count).item() == pytest.approx(2 * value)


# -- entropy band ---------------------------------------------------------------------------------------------------------


def test_entropy_band_by_hand():
    leaf, rows = sampled(
        [[-1.0, -2.0], [-0.1, -9.0], [-0.5, -0.5]],
        mask=[[1, 1], [1, 0], [1, 1]],
        entropy_gate=[2.0, -3.0, 0.0],
        entropy_bound=[0.8, 0.2, 0.2],
    )
    penalty, _ = entropy_band(rows, band_coef=0.1)
    torch.testing.assert_close(penalty, 0.1 * doubles([2 * (0.2 + 1.2), -3 * -0.1, 0.0]))
    (gradient,) = torch.autograd.grad(penalty.sum(), leaf)
    torch.testing.assert_close(gradient, 0.1 * doubles([[-2, -2], [3, 0], [0, 0]]))


@pytest.mark.parametrize("name", ["protected", "entropy_gate", "entropy_bound"])
def test_extras_that_the_trainer_did_not_hand_on_are_named(name):
    extras = {"protected": [1.0], "entropy_gate": [1.0], "entropy_bound": [1.0]}
    del extras[name]
    _, rows = sampled([[-1.0]], **extras)
    with pytest.raises(ValueError, match=f"rows have no extra '{name}'"):
        (guard_likelihood if name == "protected" else entropy_band)(rows)
