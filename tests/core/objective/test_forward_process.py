"""Forward-process losses: by slow loops, by their limits, and where their gradients lead."""

import math

import pytest
import torch
from objective_fixtures import flow_extras
from torch.autograd import gradcheck

from core.objective.forward_process import mirrored_regression, signed_preference
from core.objective.recipes import diffusion_nft, group_preference
from core.objective.rows import Counts, Rows

GROUPS = [0, 1, 0, 1, 0, 2, 2]
MASK = [
    [1, 1, 1],
    [1, 1, 0],
    [1, 0, 1],
    [1, 1, 1],
    [1, 1, 1],
    [1, 1, 1],
    [0, 0, 0],
]  # the last of group 2 has no decision
KEEP = [1, 1, 1, 1, 0, 1, 1]
ADVANTAGE = [0.7, -1.1, 6.0, 1.1, 0.4, 0.9, -0.9]


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def given(velocity=None, advantage=ADVANTAGE, mask=MASK, keep=KEEP, groups=GROUPS, **extras):
    """Rows with velocities, of D = 2, some way off the old and the reference's."""
    mask = torch.tensor(mask)
    moved = 8 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    known = flow_extras(moved) | extras
    known["velocity"] = (known["velocity"] if velocity is None else velocity).detach().clone().requires_grad_()
    kept = sum(keep) if keep else len(mask)
    return Rows(
        logps=torch.zeros(mask.shape, dtype=torch.float64),
        mask=mask,
        advantage=doubles(advantage),
        counts=Counts(rows=kept, tokens=1000, max_length=1000),
        keep=doubles(keep) if keep else None,
        group_id=None if groups is None else torch.tensor(groups),
        extras=known,
    )


def mean(loss):
    return loss.sum / loss.count


def slope(loss, rows):
    return torch.autograd.grad(mean(loss), rows.extras["velocity"])[0]


def at(rows, name, i, t):
    value = rows.extras[name][i]
    return value.detach() if name == "clean" else value[t].detach()


def used(rows):
    """{row: its decisions with loss}."""
    keep = [1] * len(rows.mask) if rows.keep is None else rows.keep.tolist()
    return {i: [t for t, m in enumerate(row) if m] for i, row in enumerate(rows.mask.tolist()) if keep[i] and sum(row)}


def slow_preference(rows, beta):
    """Over groups, rows and noise levels; every kept row counts its group once."""
    decisions, total = used(rows), 0.0
    advantage = rows.advantages.expand(rows.mask.shape)
    for group in set(rows.group_id.tolist()):
        members = [i for i in decisions if rows.group_id[i] == group]
        inside = 0.0
        for i in members:
            for t in decisions[i]:
                noise = (at(rows, "noised", i, t) - (1 - at(rows, "sigma", i, t)) * at(rows, "clean", i, t)) / at(
                    rows, "sigma", i, t
                )
                target = noise - at(rows, "clean", i, t)
                gap = ((at(rows, "velocity", i, t) - target) ** 2).mean()
                gap -= ((at(rows, "ref_velocity", i, t) - target) ** 2).mean()
                inside -= 0.5 * beta * advantage[i, t] * gap / len(decisions[i])
        if len(members) > 1:
            total -= len(members) * torch.sigmoid(inside).log()
    return total / rows.counts.rows


def slow_regression(rows, mix, limit, anchor_coef, held=None):
    """Over rows and noise levels. held: velocities that the normalisers are taken at."""
    decisions, total = used(rows), 0.0
    advantage = rows.advantages.expand(rows.mask.shape)
    held = rows.extras["velocity"] if held is None else held
    for i in decisions:
        for t in decisions[i]:
            old, v = at(rows, "old_velocity", i, t), rows.extras["velocity"][i, t]
            r, terms = min(max(advantage[i, t].item() / (2 * limit) + 0.5, 0.0), 1.0), []
            for sign in (1, -1):
                errors = [
                    at(rows, "noised", i, t)
                    - at(rows, "sigma", i, t) * (old + sign * mix * (velocity - old))
                    - at(rows, "clean", i, t)
                    for velocity in (v, held[i, t].detach())
                ]
                terms.append((errors[0] ** 2).mean() / errors[1].abs().mean().clamp(min=1e-5))
            loss = limit / mix * (r * terms[0] + (1 - r) * terms[1])
            loss = loss + anchor_coef * ((v - at(rows, "ref_velocity", i, t)) ** 2).mean()
            total = total + loss / len(decisions[i])
    return total / rows.counts.rows


PER_DECISION = torch.randn(7, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64).tolist()
SHAPES = pytest.mark.parametrize("advantage", [ADVANTAGE, PER_DECISION], ids=["per row", "per noise level"])


# -- both -----------------------------------------------------------------------------------------------------------------


@SHAPES
@pytest.mark.parametrize("keep", [KEEP, None], ids=["some dropped", "all kept"])
def test_losses_by_slow_loops(advantage, keep):
    rows = given(advantage=advantage, keep=keep)
    torch.testing.assert_close(mean(signed_preference(rows, beta=30.0)), slow_preference(rows, 30.0))
    options = {"mix": 0.6, "limit": 4.0, "anchor_coef": 0.3}
    torch.testing.assert_close(mean(mirrored_regression(rows, **options)), slow_regression(rows, **options))


@pytest.mark.parametrize("loss", [signed_preference, mirrored_regression])
def test_clean_samples_may_stand_once_or_at_every_noise_level(loss):
    rows = given()
    wide = given(clean=rows.extras["clean"].unsqueeze(1).expand(7, 3, 2))
    assert loss(rows).sum == loss(wide).sum


@pytest.mark.parametrize("recipe", [diffusion_nft, group_preference], ids=lambda recipe: recipe.name)
def test_the_velocity_to_predict_is_noise_minus_clean(recipe):
    """At it the error is 0, and a sample made with it is the clean one."""
    rows = given()
    noised, clean, sigma = (rows.extras[name] for name in ("noised", "clean", "sigma"))
    noise = (noised - (1 - sigma.unsqueeze(2)) * clean.unsqueeze(1)) / sigma.unsqueeze(2)
    exact = given(noise - clean.unsqueeze(1))
    for name in ("error", "positive"):
        before, after = (recipe.loss(r).metrics.get(name) for r in (rows, exact))
        assert before is None or (before[0] > 0.01 and after[0] < 1e-12)


def test_preference_by_finite_differences():
    rows = given()

    def value(velocity):
        rows.extras["velocity"] = velocity
        return mean(signed_preference(rows, beta=30.0))

    assert gradcheck(value, [rows.extras["velocity"]])


@pytest.mark.parametrize("mix", [1.0, 0.3])
def test_regression_by_finite_differences_of_the_slow_loop_whose_normalisers_stay(mix):
    options = {"mix": mix, "limit": 4.0, "anchor_coef": 0.3}
    rows = given()
    got, start = slope(mirrored_regression(rows, **options), rows), rows.extras["velocity"].detach().clone()

    def value(velocity):
        rows.extras["velocity"] = velocity
        return slow_regression(rows, held=start, **options)

    assert gradcheck(value, [start.clone().requires_grad_()])
    velocity = start.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(value(velocity), velocity)[0], got)


# -- the preference -------------------------------------------------------------------------------------------------------


def pairs(velocity, reference, advantage, target=0.0):
    """Rows of D = 1 and T = 1 in groups of two, whose velocity to predict is `target`."""
    count, one = len(advantage), torch.ones(len(advantage), 1, dtype=torch.float64)
    extras = {"clean": 0 * one, "noised": target * one.unsqueeze(2), "sigma": one}
    extras |= {name: doubles(v).view(-1, 1, 1) for name, v in (("velocity", velocity), ("ref_velocity", reference))}
    extras["velocity"].requires_grad_()
    counts, groups = Counts(rows=count, tokens=count, max_length=1), torch.arange(count) // 2
    return Rows(0 * one, torch.ones(count, 1), doubles(advantage), counts, group_id=groups, extras=extras)


def test_two_rollouts_with_advantages_of_one_are_diffusion_dpo():
    rng = torch.Generator().manual_seed(0)
    v, ref = torch.randn(2, 8, generator=rng, dtype=torch.float64)
    rows = pairs(v.tolist(), ref.tolist(), [1.0, -1.0] * 4, target=0.5)
    win, lose, ref_win, ref_lose = (((x - 0.5) ** 2) for x in (v[::2], v[1::2], ref[::2], ref[1::2]))
    dpo = -torch.nn.functional.logsigmoid(-0.5 * 3.0 * ((win - ref_win) - (lose - ref_lose))).mean()
    torch.testing.assert_close(mean(signed_preference(rows, beta=3.0)), dpo)
    group = group_preference(eps=0.0)  # two z-scores are +-1 / sqrt 2, whatever the rewards
    assert group.advantage(doubles([[0.2, 0.9]]), None).tolist() == [pytest.approx([-(0.5**0.5), 0.5**0.5])]


@pytest.mark.parametrize("beta", [1.0, 5000.0])
def test_preference_at_the_reference_is_log_two_and_leads_towards_what_is_good(beta):
    rows = pairs([1.0, 2.0, -1.0, 0.5], [1.0, 2.0, -1.0, 0.5], [1.0, -1.0, -0.5, 0.5])
    loss = signed_preference(rows, beta=beta)
    assert mean(loss).item() == pytest.approx(math.log(2))
    down = -slope(loss, rows).flatten()
    # -beta/4 A dl/dv, a mean over two groups: errors of the good ones fall, of the bad ones grow
    torch.testing.assert_close(
        down, -beta / 4 / 2 * doubles([1.0, -1.0, -0.5, 0.5]) * 2 * doubles([1.0, 2.0, -1.0, 0.5])
    )


def test_inside_is_logged_as_a_mean_over_groups_that_compare():
    rows = given(groups=[0, 0, 0, 1, 1, 1, 2], keep=[1] * 7)
    total, count = signed_preference(rows, beta=2.0).metrics["inside"]
    assert count == 6  # the only row of group 2 is compared with none
    big = pairs([1.0, 2.0], [0.0, 0.0], [1.0, -1.0])
    total, count = signed_preference(big, beta=2.0).metrics["inside"]
    assert (total / count).item() == pytest.approx(-(1.0 - 4.0))


def test_group_with_fewer_than_two_rows_carries_no_loss():
    for keep in ([1, 0, 1, 1], [1, 0, 0, 0]):
        rows = pairs([1.0, 2.0, -1.0, 0.5], [0.0] * 4, [1.0, -1.0, -0.5, 0.5])
        rows.keep, rows.counts = doubles(keep), Counts(rows=sum(keep), tokens=9, max_length=1)
        loss = signed_preference(rows, beta=1.0)
        gradient = slope(loss, rows).flatten()
        alone = pairs([-1.0, 0.5], [0.0] * 2, [-0.5, 0.5])
        expected = mean(signed_preference(alone, beta=1.0)).item() * 2 / 3 if sum(keep) == 3 else 0.0
        assert mean(loss).item() == pytest.approx(expected)
        assert (gradient[:2] == 0).all()
        assert (gradient[2:] != 0).all() == (sum(keep) == 3)


def test_dropped_row_is_as_if_it_were_not_there():
    rows = given()
    left = [i for i, kept in enumerate(KEEP) if kept]
    extras = {name: value[left] for name, value in rows.extras.items()}
    groups = [GROUPS[i] for i in left]
    without = given(
        advantage=[ADVANTAGE[i] for i in left], mask=[MASK[i] for i in left], keep=None, groups=groups, **extras
    )
    torch.testing.assert_close(mean(signed_preference(rows)), mean(signed_preference(without)))


def test_saturated_preference_is_finite_on_both_sides():
    rows = pairs([100.0, 0.0, 0.0, 100.0], [0.0] * 4, [1.0, -1.0, 1.0, -1.0])
    loss = signed_preference(rows, beta=1e6)
    assert loss.sum.isfinite()
    assert slope(loss, rows).isfinite().all()
    assert (slope(signed_preference(rows, beta=1e6), rows).flatten() != 0).tolist() == [True, False, False, False]


def test_preference_without_groups_is_refused():
    with pytest.raises(ValueError, match="needs group_id, and the trainer gave none"):
        group_preference.loss(given(groups=None))


# -- the regression -------------------------------------------------------------------------------------------------------


def at_old(advantage, **options):
    """The gradient at v = v_old."""
    old = given().extras["old_velocity"]
    rows = given(old, advantage=advantage, keep=None)
    return slope(mirrored_regression(rows, **{"anchor_coef": 0.0} | options), rows)


@pytest.mark.parametrize("mix", [1.0, 0.1, 3.0])
def test_at_the_old_velocity_the_gradient_is_the_advantage_times_that_of_the_error(mix):
    """Whatever the mix. So good samples become likelier and bad ones less, as far as their advantages say."""
    one = at_old([1.0] * 7)
    assert one.abs().max() > 0.01
    for advantage in ([2.0] * 7, [-1.0] * 7, [4.9, -4.9, 0.0, 1.0, 2.0, -3.0, 0.5]):
        torch.testing.assert_close(
            at_old(advantage, mix=mix), doubles(advantage).view(7, 1, 1) * one, rtol=1e-9, atol=1e-12
        )
    rows = given(given().extras["old_velocity"], keep=None)
    lower = rows.extras["velocity"].detach() - 1e-4 * one
    before, after = (
        mirrored_regression(given(v, keep=None)).metrics["positive"][0] for v in (rows.extras["velocity"], lower)
    )
    assert after < before


def test_advantages_beyond_the_limit_count_as_the_limit():
    assert torch.equal(at_old([7.0, -9.0] + [0.0] * 5, limit=2.0), at_old([2.0, -2.0] + [0.0] * 5, limit=2.0))
    assert (
        diffusion_nft.options["limit"] == 5.0
    )  # one option: where advantages are cut, and what makes a sample wholly good
    assert (
        diffusion_nft(limit=2.0).advantage.keywords["limit"]
        == diffusion_nft(limit=2.0).loss_fn.keywords["limit"]
        == 2.0
    )


def test_without_advantage_the_old_velocity_is_where_it_rests():
    assert (at_old([0.0] * 7) == 0).all()
    old = given().extras["old_velocity"]
    rows = given(old + 0.3, advantage=[0.0] * 7, keep=None)
    pull = (slope(mirrored_regression(rows, anchor_coef=0.0), rows) * 0.3).sum(2)[torch.tensor(MASK) == 1]
    assert (pull > 0).all()


def test_anchor_is_the_distance_to_the_reference_and_is_not_asked_for_at_zero():
    rows = given()
    with_anchor, without = (mirrored_regression(rows, anchor_coef=c) for c in (0.5, 0.0))
    total, count = with_anchor.metrics["anchor"]
    distance = ((rows.extras["velocity"] - rows.extras["ref_velocity"]) ** 2).mean(2) * rows.loss_mask
    assert count == rows.loss_mask.sum()
    assert (total / distance.sum()).item() == pytest.approx(1)
    per_row = distance.sum(1) / rows.mask.sum(1).clamp(min=1)
    torch.testing.assert_close(mean(with_anchor) - mean(without), 0.5 * per_row.sum() / rows.counts.rows)
    del rows.extras["ref_velocity"]
    assert "anchor" not in mirrored_regression(rows, anchor_coef=0.0).metrics
    with pytest.raises(ValueError, match="no extra 'ref_velocity'"):
        mirrored_regression(rows)


def test_every_noise_level_weighs_alike():
    """Errors ten times as large have terms ten times as large, not a hundred times."""
    rows = given(keep=None)
    off = rows.extras["noised"] - rows.extras["sigma"].unsqueeze(2) * rows.extras["velocity"]
    off = (off - rows.extras["clean"].unsqueeze(1)).detach()
    farther = given(noised=rows.extras["noised"] + 9 * off, keep=None)  # v = v+ at mix 1, so only that term is exact
    near, far = (mirrored_regression(r).metrics["positive"][0] for r in (rows, farther))
    assert (far / near).item() == pytest.approx(10)
