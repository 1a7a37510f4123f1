"""benchmarks/mechanisms.py: the toy is what it says, exact numbers are those of closed form, and every mechanism runs."""

import json
import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import mechanisms
from mechanism_entries import QUICK, grpo, interval, panel
from toy import Sampled, Toy, credit, gradient, sampled, training

from core.objective.recipes import RECIPES

ROOT = Path(__file__).parents[2]
KEYS = {"recipe", "claim", "measure", "value", "ci95", "control", "holds", "note"}
TESTED = {
    "mc_grpo", "ngrpo", "gdpo", "rec", "opmd", "asymre", "unlikeliness", "llds", "gaussian_rank", "a_grae", "dhpo",
    "distribution_centric", "seed_grpo", "dagrpo", "sample_routed", "token_hidden_reward", "value_anchored",
}  # fmt: skip


@pytest.fixture(autouse=True)
def wide():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def small(learners=2, **fields):
    return Toy(learners, **{"prompts": 2, "vocabulary": 3, "places": (1, 2, 1), "modulus": 3, **fields})


def run(name):
    panels = {}
    return getattr(mechanisms, name)(QUICK, panels), panels


# -- the toy -------------------------------------------------------------------------------------------------------------


def test_the_masses_of_all_completions_are_those_of_a_walk_token_by_token():
    toy = small()
    masses, table = toy.masses(toy.start), toy.table(toy.start)
    torch.testing.assert_close(masses.sum(-1), torch.ones(2, 2))
    for at, tokens in enumerate(product(range(3), repeat=3)):
        assert toy.everything[at].tolist() == list(tokens)
        logp = sum(
            table[1, 0, t, before, token] for t, (before, token) in enumerate(zip((0, *tokens), tokens, strict=False))
        )
        torch.testing.assert_close(masses[1, 0, at], logp.exp())
        right = (tokens[0] + 2 * tokens[1] + tokens[2]) % 3 == toy.target[1, 0]
        assert bool(toy.right[1, 0, at]) == bool(right)


def test_samples_come_with_their_likelihoods_and_as_often_as_they_should():
    toy = small()
    batch = sampled(toy, toy.start, 20_000)
    place = (batch.completions * torch.tensor([9, 3, 1])).sum(-1)
    masses = toy.masses(toy.start)
    torch.testing.assert_close(batch.old.sum(-1).exp(), masses.gather(2, place))
    often = torch.stack([(place == at).double().mean(-1) for at in range(27)], -1)
    assert (often - masses).abs().max() < 5 * math.sqrt(0.25 / 20_000)
    assert (batch.outcome.mean(-1) - toy.pass_rate(toy.start)).abs().max() < 5 * math.sqrt(0.25 / 20_000)


def test_entropy_is_that_of_the_enumerated_policy_and_falls_with_temperature():
    toy = small()
    batch = sampled(toy, toy.start, 20_000)
    walked = toy.entropy(toy.table(toy.start), batch.completions).mean((1, 2, 3))
    torch.testing.assert_close(walked, toy.nats(toy.start), rtol=0.02, atol=0)
    assert (toy.table(toy.start, 0.5).amax(-1) > toy.table(toy.start).amax(-1)).all()


def test_an_observation_is_drawn_evenly_and_carries_no_loss():
    toy = small(places=(1, 0, 1))
    batch = sampled(toy, toy.start, 20_000)
    shares = torch.stack([(batch.completions[..., 1] == token).double().mean() for token in range(3)])
    assert (shares - 1 / 3).abs().max() < 0.01
    assert toy.mask(2).tolist() == [[1, 0, 1]] * 4


def test_the_gradient_on_fresh_data_is_that_of_the_expected_reward():
    """Unscaled advantages of a large group estimate d E[reward] / d weights, here known by enumeration."""
    toy = small()
    centred = RECIPES["dr_grpo"]
    batch = sampled(toy, toy.start, 40_000)
    step = -gradient(centred, batch, credit(centred, batch).advantage)
    weights = toy.start.clone().requires_grad_()
    (exact,) = torch.autograd.grad(toy.pass_rate(weights).mean(1).sum(), weights)
    cosine = torch.cosine_similarity(step.flatten(1), exact.flatten(1))
    assert (cosine > 0.98).all()
    torch.testing.assert_close(step.norm(), exact.norm() / len(toy.places), rtol=0.1, atol=0)


@pytest.mark.parametrize("name", ["grpo", "llds", "distribution_centric", "gdpo"])
def test_learners_do_not_hear_of_each_other(name):
    toy = small(3, spread=1.0)
    batch = sampled(toy, toy.start, 4)
    whole = credit(RECIPES[name], batch)
    for i in range(3):
        at = slice(i, i + 1)
        parts = (batch.sampler[at], batch.completions[at], batch.old[at], batch.outcome[at], batch.weights[at])
        alone = credit(RECIPES[name], Sampled(toy.one(at), *parts))
        torch.testing.assert_close(whole.advantage.view(3, 8, -1)[i].squeeze(1), alone.advantage.view(8, -1).squeeze(1))
        for extra, values in alone.extras.items():
            torch.testing.assert_close(whole.extras[extra].view(3, -1)[i], values)


def test_stale_batches_are_sampled_by_the_weights_of_that_many_batches_ago():
    toy = small()
    batches = list(training(toy, RECIPES["rec"], 6, lr=5.0, stale=2))
    for at, batch in enumerate(batches):
        expected = toy.start if at < 3 else batches[at - 3].weights
        assert torch.equal(batch.sampler, expected)
        assert not torch.equal(batch.weights, batch.sampler)


def test_passes_are_updates_on_the_same_batch_and_training_repeats_itself():
    toy = small()
    once = [batch.weights for batch in training(toy, grpo, 3, lr=1.0)]
    again = [batch.weights for batch in training(toy, grpo, 3, lr=1.0)]
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    (first,) = training(toy, grpo, 1, lr=1.0, passes=2)
    batch = Sampled(toy, toy.start, first.completions, first.old, first.outcome, once[0])
    torch.testing.assert_close(first.weights, once[0] - gradient(grpo, batch, first.advantage.flatten()))


@pytest.mark.parametrize("adam", [False, True])
def test_grpo_learns_the_toy(adam):
    toy = Toy(3)
    *_, last = training(toy, grpo, 60, lr=0.3 if adam else 30.0, adam=adam)
    assert toy.pass_rate(toy.start).mean() < 0.25
    assert toy.pass_rate(last.weights).mean() > 0.8


def test_copies_share_the_problem_and_sample_by_themselves():
    toy = small(2)
    copies = toy.one(slice(1, 2), 3)
    assert torch.equal(copies.masses(copies.start)[2], toy.masses(toy.start)[1])
    batch = sampled(copies, copies.start, 16)
    assert not torch.equal(batch.completions[0], batch.completions[1])


# -- numbers -------------------------------------------------------------------------------------------------------------


def test_the_interval_is_the_bootstrap_of_the_mean_without_nan():
    values = np.random.default_rng(1).normal(2.0, 1.0, 400)
    mean, (low, high) = interval([*values, math.nan])
    assert mean == pytest.approx(values.mean(), rel=1e-3)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)
    assert interval([3.0, 3.0]) == (3.0, [3.0, 3.0])


def test_a_small_plot_has_an_interval_at_each_x():
    plot = panel([1, 2], "x", "y", {"sampled": [[1.0, 1.0], [0.0, 2.0]], "exact": [5.0, 6.0]})
    assert plot["lines"]["sampled"] == {"y": [1.0, 1.0], "low": [1.0, 0.0], "high": [1.0, 2.0]}
    assert plot["lines"]["exact"]["low"] == plot["lines"]["exact"]["high"] == [5.0, 6.0]


# -- the mechanisms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", mechanisms.MECHANISMS, ids=lambda mechanism: mechanism.__name__)
def test_every_mechanism_gives_whole_entries(mechanism):
    entries, panels = run(mechanism.__name__)
    for one in entries:
        assert set(one) == KEYS
        assert one["recipe"] in RECIPES
        assert one["holds"] in (True, False, "partly")
        assert one["control"]
        low, high = one["ci95"]
        assert low <= one["value"] <= high
        json.dumps(one)
    if panels:
        picture = mechanisms.draw(panels).decode()
        assert picture.count('<g id="axes_') >= len(panels)


def test_the_virtual_rollout_gives_minus_a_third_at_eight_and_its_sums_are_in_closed_form():
    (push, _), _ = run("virtual_rollout")
    assert (push["value"], push["holds"]) == (-0.3333, True)
    for right in range(9):
        values = [1.0] * (right + 1) + [0.0] * (8 - right)
        spread = np.std(values, ddof=1)
        expected = 0.0 if right == 8 else -(1 - np.mean(values)) / spread
        assert push["control"]["sum_of_advantages"][f"{right} of 8 right"] == pytest.approx(expected, rel=1e-3)


def test_a_group_of_three_turns_the_same_signs_under_mean_and_median():
    """Of three numbers the highest lies above both, and the lowest below."""
    (pair, _), _ = run("median_against_outliers")
    assert pair["control"]["difference_on_the_same_rollouts"] == {"value": 0.0, "ci95": [0.0, 0.0]}
    assert pair["holds"] == "partly"


def test_combinations_are_counted_as_by_hand():
    """Two rewards of a pair of rollouts: the sum tells apart only which total is higher."""
    (found,), _ = run("combinations_apart")
    assert found["control"]["2_rewards"] == {
        "groups": 256, "gdpo": 107, "sum, then normalise": 51, "sum with weights 1, 1.01, ..": 183,
    }  # fmt: skip
    totals = np.array(list(product((0, 1, 1, 2), repeat=4)), dtype=float)  # (0, 0), (0, 1), (1, 0), (1, 1)
    spread = totals.std(axis=1, ddof=1, keepdims=True)
    z = np.divide(totals - totals.mean(axis=1, keepdims=True), spread, where=spread > 0, out=np.zeros_like(totals))
    assert len(np.unique(z.round(8), axis=0)) == 51


def test_the_largest_change_of_answer_entropy_is_that_of_answers_which_all_differ():
    (found,), _ = run("answer_entropy")
    assert found["value"] == pytest.approx(1 - 1 / 1.0417, rel=1e-3)
    assert found["control"]["greatest_change"]["alpha=1.0"] == {"mean_log": 0.5, "shannon": 0.5}


def test_asymmetry_is_the_batch_s_success_and_favours_what_the_text_says():
    """G (omega sqrt(1 - p) + (1 - omega) sqrt p) / 2 at both kinds, the right kind times omega: greatest where p is
    (1 - omega)^2 / (omega^2 + (1 - omega)^2), rounded to sixteenths."""
    (found,), panels = run("asymmetry")
    for omega in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert found["control"]["ratio"][str(omega)] == pytest.approx(omega, rel=1e-3)
        best = (1 - omega) ** 2 / (omega**2 + (1 - omega) ** 2)
        assert abs(found["control"]["favoured_pass_rate"][str(omega)] - min(best, 15 / 16)) <= 1 / 16
    lines = panels["A-GRAE: total |A| of a group"]["lines"]
    assert lines["grpo"]["y"][7] == pytest.approx(2 * 0.5 * math.sqrt(15 / 16), rel=1e-3)


def test_variances_of_quantiles_are_those_of_the_normal_law():
    (law, outlier), _ = run("normal_quantiles")
    steps = torch.special.ndtri((torch.arange(8.0) + 0.5) / 8)
    assert law["control"]["variance_without_ties"]["8"] == pytest.approx((steps**2).mean().item(), rel=1e-3)
    top = 1.534121  # one success in eight
    chances = [math.comb(8, k) * 0.1**k * 0.9 ** (8 - k) for k in range(1, 8)]
    upper = [steps[8 - k :].mean().item() for k in range(1, 8)]
    expected = sum(
        c * (k * u**2 + k**2 * u**2 / (8 - k)) / 8 for c, k, u in zip(chances, range(1, 8), upper, strict=True)
    )
    assert upper[0] == pytest.approx(top, rel=1e-6)
    assert law["value"] == pytest.approx(expected / sum(chances), rel=1e-3)
    assert (outlier["value"], outlier["holds"]) == (0.0, "partly")


def test_the_anchor_is_a_tenth_of_the_discounted_sum():
    (size, _), _ = run("anchored")
    sums = np.array([sum(0.9**k for k in range(10 - j)) for j in range(10)])
    assert size["value"] == pytest.approx(0.1 * math.sqrt((sums**2).mean()), rel=1e-3)
    assert size["control"]["at_reward_0"] == 0


def test_llds_is_inert_with_one_update_and_is_not_with_more():
    (_, inert), _ = run("falling_likelihood")
    assert (inert["value"], inert["holds"]) == (0.0, True)
    assert inert["control"]["by_updates_per_batch"]["4"] > 0


def test_a_step_on_the_output_layer_does_what_the_hidden_reward_says():
    (found,), _ = run("hidden_rewards")
    assert found["value"] == 1.0
    assert found["control"]["correlation"]["head"] > 0.9999
    assert found["control"]["correlation"]["all weights"] < 0.99


def test_rows_are_routed_as_specified():
    (share, weights), _ = run("routes")
    assert (share["value"], weights["value"]) == (1.0, 1.0)
    specified = {kind: row["specified"] for kind, row in share["control"]["table"].items()}
    assert specified == {
        "right, with a wrong sibling": "grpo", "wrong, with a right sibling": "teacher", "right, all are": "nothing",
        "wrong, all are": "nothing",
    }  # fmt: skip


# -- the files -----------------------------------------------------------------------------------------------------------


def check(folder, command):
    text = (folder / "mechanisms.json").read_text()
    result = json.loads(text)
    assert set(result) == {"mechanisms", "panels", "command", "git"}
    assert result["command"] == command
    assert {one["recipe"] for one in result["mechanisms"]} == TESTED
    assert str(ROOT) not in text
    picture = (folder / "mechanisms.svg").read_text()
    assert picture.count("<!-- ") > len(result["panels"])
    assert all(f"<!-- {title} -->" in picture for title in result["panels"] if ">" not in title)


def test_the_files_of_this_repository_are_whole_and_from_a_full_run():
    check(ROOT / "results", "python -P benchmarks/mechanisms.py")


@pytest.mark.slow
def test_the_script_runs(tmp_path):
    script = [sys.executable, "-P", "benchmarks/mechanisms.py", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "token_hidden_reward" in done.stdout
    check(tmp_path, "python -P benchmarks/mechanisms.py --quick")
