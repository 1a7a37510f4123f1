"""core/policy/distributions.py against torch.distributions, closed forms and finite differences."""

import math

import numpy as np
import pytest
import torch
from torch import distributions as known

from core.app import Quantity
from core.config import ConfigError, ForecastRollout
from core.policy.distributions import (
    GAIN,
    TEMPERATURE,
    Categorical,
    CategoricalFrames,
    Gaussian,
    LowRankGaussian,
    Scale,
    cosines,
    edges_of_bins,
    family,
)

EDGES = ((15.0, 35.0, 75.0), (30.0, 80.0, 150.0))
SCALE = Scale(10.0, 1000.0)
PLAIN = Scale(math.inf, 1000.0)
N, V, Y, X = 3, 2, 3, 4


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def last(seed=5):
    return rand(N, V, Y, X, seed=seed).abs()


def categorical(bins=12, seed=1):
    made = Categorical(EDGES, SCALE, bins).double()
    return made(rand(N, made.outputs, Y, X, seed=seed), last())


def gaussian(seed=1, scale=SCALE, sigma=0.3):
    return Gaussian(V, scale, sigma)(rand(N, V, Y, X, seed=seed), last())


def low_rank(seed=1, valid=None, rank=3):
    made = LowRankGaussian(V, SCALE, 0.3, rank)
    return made(rand(N, made.outputs, Y, X, seed=seed), last(), valid)


def joint(frames):
    """The same as torch has it: N frames of V * Y * X numbers."""
    factors = frames.factors.flatten(2).mT
    white = torch.full((N, V * Y * X), frames.family.sigma**2, dtype=torch.float64)
    return known.LowRankMultivariateNormal(frames.centre.flatten(1), factors, white)


# -- scale and bins -------------------------------------------------------------------------------------------------------


def test_s_is_a_logarithm_and_comes_back():
    x = torch.tensor([0.0, 10.0, 90.0, 1000.0], dtype=torch.float64)
    torch.testing.assert_close(SCALE.inward(x)[:3], torch.tensor([0, math.log(2), math.log(10)], dtype=torch.float64))
    torch.testing.assert_close(SCALE.outward(SCALE.inward(x)), x)
    assert SCALE.outward(torch.tensor([-1.0, 50.0])).tolist() == pytest.approx([0, 1000]), "values stay in [0, top]"
    assert SCALE.inward(torch.tensor([-3.0, 2000.0])).tolist() == pytest.approx([0, math.log(101)])
    assert PLAIN.inward(x).tolist() == PLAIN.outward(x).tolist() == x.tolist()


@pytest.mark.parametrize(
    ("bins", "in_s"),
    [
        (2, [0, 1, 4]),
        (3, [0, 1, 2.5, 4]),
        (4, [0, 1, 2, 3, 4]),
        (5, [0, 0.5, 1, 2, 3, 4]),  # all are 1 wide: of equals the lowest class is divided
        (6, [0, 0.5, 1, 1.75, 2.5, 3.25, 4]),
    ],
)
def test_the_widest_class_is_divided_until_there_are_enough_bins(bins, in_s):
    scale = Scale(1.0, math.expm1(4))
    made = edges_of_bins([math.expm1(1)], scale, bins)
    np.testing.assert_allclose(made, np.expm1(in_s), rtol=1e-12)


@pytest.mark.parametrize("bins", [4, 5, 20, 33, 100])
@pytest.mark.parametrize("edges", [*EDGES, (9.1, 35.5, 55.5, 125.5)])
def test_every_class_edge_is_exactly_the_edge_of_a_bin(edges, bins):
    bins += len(edges) - 3
    made = edges_of_bins(edges, SCALE, bins)
    assert len(made) == bins + 1
    assert set(edges) | {0.0, 1000.0} <= set(made.tolist())
    assert (np.diff(made) > 0).all()
    widths = np.diff(np.log1p(made / 10))
    assert widths.max() <= np.diff(np.log1p(np.array([0, *edges, 1000]) / 10)).sum() / (bins - len(edges)), "minimax"


def test_more_classes_than_bins_are_refused():
    with pytest.raises(ConfigError, match=r"rollout.bins=3 is fewer than the 4 classes, each of which needs one"):
        Categorical(EDGES, SCALE, 3)


@pytest.mark.parametrize("bins", [4, 20])
def test_a_bin_holds_the_values_of_one_class(bins):
    made = Categorical(EDGES, SCALE, bins)
    everything = torch.arange(bins).repeat(V, 1)[:, :, None].to(torch.int16)  # (V, Y=bins, X=1)
    assert torch.equal(made.actions(made.values(everything)), everything)
    torch.testing.assert_close(made.states(everything), SCALE.inward(made.values(everything)))
    for v, edges in enumerate(EDGES):
        x = np.array(
            [0, edges[0], np.nextafter(np.float32(edges[0]), 0), *edges[1:], 14.99, 500, 1000, 5000], np.float32
        )
        values = torch.zeros(V, len(x), 1)
        values[v, :, 0] = torch.from_numpy(x)
        drawn = made.values(made.actions(values))[v, :, 0].numpy()
        assert np.digitize(drawn, edges).tolist() == np.digitize(x, edges).tolist()


# -- categorical ----------------------------------------------------------------------------------------------------------


def test_categorical_agrees_with_torch():
    one, other = categorical(seed=1), categorical(seed=2)
    ours = known.Categorical(logits=one.logps.movedim(2, -1))
    theirs = known.Categorical(logits=other.logps.movedim(2, -1))
    bins = torch.randint(12, (N, V, Y, X), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(one.log_prob(bins.to(torch.int16)), ours.log_prob(bins))
    torch.testing.assert_close(one.kl(other), known.kl_divergence(ours, theirs))
    torch.testing.assert_close(one.entropy(), ours.entropy())
    many = torch.randint(12, (5, N, V, Y, X), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(one.log_prob(many), ours.log_prob(many), msg="several draws of each frame")


def test_probabilities_are_of_the_free_parts_and_the_distance_to_where_the_last_frame_is_shifted():
    made = Categorical(EDGES, SCALE, 4).double()
    output = rand(1, 12, 1, 1)
    before = torch.full((1, V, 1, 1), 1.7, dtype=torch.float64)
    shift, spread, free = output[0, 6, 0, 0], output[0, 7, 0, 0], output[0, 8:, 0, 0]
    logits = free - (made.middle[1] - 1.7 - shift).abs() / (math.log(101) / 4 * spread.exp())
    torch.testing.assert_close(made(output, before).logps[0, 1, :, 0, 0], logits.log_softmax(0))


def test_a_spread_is_bounded_so_that_no_bin_becomes_impossible():
    made = Categorical(EDGES, SCALE, 4)
    output = torch.zeros(1, 12, 1, 1)
    output[:, [1, 7]] = -50.0
    at_most = torch.zeros_like(output)
    at_most[:, [1, 7]] = -3.0
    before = torch.full((1, V, 1, 1), 1.7)
    torch.testing.assert_close(made(output, before).logps, made(at_most, before).logps)
    assert made(output, before).logps.isfinite().all()


def test_one_number_of_the_net_moves_the_whole_distribution():
    made = Categorical(EDGES, SCALE, 40)
    output = torch.zeros(1, made.outputs, 1, 1)
    output[:, [0, 42]] = 0.8
    before = torch.full((1, V, 1, 1), 1.7)
    moved = made(output, before).state() - made(torch.zeros_like(output), before).state()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.8), atol=0.06, rtol=0)


@pytest.mark.parametrize("bins", [12, 20, 40])
def test_an_untrained_mean_is_about_the_last_frame(bins):
    made = Categorical(EDGES, SCALE, bins)
    before = torch.linspace(float(SCALE.inward(torch.tensor(5.0))), float(SCALE.inward(torch.tensor(300.0))), 50)
    before = before.expand(1, V, 1, 50)
    state = made(torch.zeros(1, made.outputs, 1, 50), before).state()
    assert float((state - before).abs().max()) < SCALE.end / bins, "within a bin"


def test_bins_are_drawn_as_often_as_they_are_likely():
    frames = categorical()
    evenly = ((torch.arange(20000, dtype=torch.float64) + 0.5) / 20000).view(-1, 1, 1, 1, 1).expand(-1, N, V, Y, X)
    drawn = frames.sample(evenly)
    share = torch.stack([(drawn == k).double().mean(0) for k in range(12)], dim=2)
    torch.testing.assert_close(share, frames.probs, atol=1.1e-4, rtol=0)
    assert torch.equal(frames.sample(evenly[7]), drawn[7])


def test_mean_mode_and_state_are_those_of_the_bins():
    made = Categorical(EDGES, SCALE, 4).double()
    logits = rand(1, made.outputs, 1, 1)
    frames = made(logits, torch.zeros(1, V, 1, 1, dtype=torch.float64))
    for v in range(V):
        p, middle = frames.probs[0, v, :, 0, 0], made.middle[v]
        values = 10 * middle.expm1()
        assert float(frames.state()[0, v]) == pytest.approx(float(p @ middle))
        assert float(frames.mean()[0, v]) == pytest.approx(float(p @ values), rel=1e-6)
        assert float(frames.mode()[0, v]) == pytest.approx(float(values[p.argmax()]), rel=1e-6)


def test_exceedance_of_a_class_edge_is_the_sum_of_the_bins_above():
    frames = categorical(bins=20)
    bounds = frames.family.bounds
    for v, edges in enumerate(EDGES):
        for e, edge in enumerate(edges):
            above = frames.probs[:, v, bounds[v, :-1] >= edge - 1e-3].sum(1)
            torch.testing.assert_close(frames.exceedance(EDGES)[:, v, e], above, atol=1e-6, rtol=0)


def test_quantiles_invert_the_exceedance():
    frames = categorical()
    levels = [0.0625, 0.4, 0.9375]
    at = frames.quantiles(levels)
    assert (at.diff(dim=1) >= 0).all()
    for q, level in enumerate(levels):
        value = [[float(at[1, q, v, 2, 3])] for v in range(V)]
        torch.testing.assert_close(
            frames.exceedance(value)[1, :, 0, 2, 3], torch.full((V,), 1 - level).double(), atol=1e-5, rtol=0
        )


def test_a_bin_that_is_certain_has_its_quantiles_inside():
    made = Categorical(EDGES, SCALE, 4)
    output = torch.full((1, made.outputs, 1, 1), -1e4)
    output[:, [0, 1, 6, 7]] = 0.0
    output[:, [3, 9]] = 1e4
    at = made(output, torch.zeros(1, V, 1, 1)).quantiles([0.01, 0.5, 0.99])[0, :, :, 0, 0]
    assert (at > torch.tensor([15.0, 30.0])).all()
    assert (at < torch.tensor([35.0, 80.0])).all()
    np.testing.assert_allclose(at[1], made.middle_value[:, 1], rtol=1e-5)


def test_a_bin_that_is_impossible_has_no_quantile():
    made = Categorical(EDGES, SCALE, 4)
    halves = torch.tensor([0.5, 0.0, 0.0, 0.5]).log().view(1, 1, 4, 1, 1).expand(1, V, -1, 1, 1)
    at = CategoricalFrames(halves, made).quantiles([0.25, 0.5, 0.51])[0, :, :, 0, 0]
    assert at[:2].isfinite().all()
    assert (at[2] > torch.tensor([75.0, 150.0])).all()


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_great_logits_are_no_trouble_in_float32(size):
    made = Categorical(EDGES, SCALE, 8)
    output = (size * rand(1, made.outputs, 2, 2).sign()).float().requires_grad_()
    frames = made(output, torch.zeros(1, V, 2, 2))
    other = made(-output.detach(), torch.zeros(1, V, 2, 2))
    bins = frames.sample(torch.full((1, V, 2, 2), 0.5))
    total = frames.log_prob(bins).sum() + frames.entropy().sum() + frames.kl(other).sum() * 0
    total.backward()
    assert frames.log_prob(bins).isfinite().all()
    assert output.grad.isfinite().all()


def test_the_supervised_error_is_the_likelihood_of_the_bin():
    frames = categorical()
    x = 10 * rand(N, V, Y, X, seed=3).abs()
    bins = torch.stack(
        [torch.from_numpy(np.digitize(x[:, v], frames.family.bounds[v].numpy()) - 1) for v in range(V)], dim=1
    )
    torch.testing.assert_close(frames.error(x), -frames.logps.gather(2, bins.unsqueeze(2)).squeeze(2))


# -- Gaussian -------------------------------------------------------------------------------------------------------------


def test_gaussian_agrees_with_torch():
    one, other = gaussian(seed=1), gaussian(seed=2)
    ours, theirs = known.Normal(one.centre, 0.3), known.Normal(other.centre, 0.3)
    action = rand(4, N, V, Y, X, seed=3)
    torch.testing.assert_close(one.log_prob(action), ours.log_prob(action))
    torch.testing.assert_close(one.kl(other), known.kl_divergence(ours, theirs))
    torch.testing.assert_close(one.entropy(), ours.entropy())
    torch.testing.assert_close(one.sample(action), one.centre + 0.3 * action)
    at = torch.tensor(EDGES, dtype=torch.float64)[:, :, None, None]
    torch.testing.assert_close(
        one.exceedance(EDGES), 1 - known.Normal(one.centre[:, :, None], 0.3).cdf((at / 10).log1p())
    )
    torch.testing.assert_close(one.error(10 * at[:, 0].expand(N, V, Y, X)), (one.centre - at[:, 0].log1p()).square())


def test_the_papers_gaussian_in_plain_units():
    """arXiv 2511.22169: means over valid cells of a log-probability and of a KL, sigma 4."""
    made, none = Gaussian(2, PLAIN, 4.0), torch.zeros(1, 2, 1, 1)

    def frames(*mean):
        return made(torch.tensor(mean).view(1, 2, 1, 1), none)

    action = made.actions(torch.tensor([30.0, 42.0]).view(1, 2, 1, 1))
    assert float(frames(28, 45).log_prob(action).mean()) == pytest.approx(-2.50835789432, rel=1e-6)
    assert float(frames(28, 45).kl(frames(29, 41)).mean()) == pytest.approx(0.265625, rel=1e-6)
    assert made.values(frames(28, 45).sample(torch.ones(1, 2, 1, 1))).flatten().tolist() == [32, 49]


@pytest.mark.parametrize("scale", [SCALE, PLAIN, Scale(10.0, 60.0), Scale(math.inf, 60.0)])
@pytest.mark.parametrize(
    ("centre", "std"), [(0.0, 0.5), (1.5, 0.2), (-2.0, 0.3), (4.0, 1.0), (1.0, 1e-3), (500.0, 0.2)]
)
def test_the_mean_of_a_clipped_gaussian(scale, centre, std):
    levels = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    expected = scale.outward(centre + std * torch.special.ndtri(levels)).mean()
    got = scale.normal_mean(torch.tensor(centre, dtype=torch.float64), torch.tensor(std, dtype=torch.float64))
    assert float(got) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)


def test_a_gaussians_means_never_leave_the_range_of_values():
    frames = Gaussian(1, SCALE, 0.2)(torch.tensor([-1e4, 0.0, 1e4]).view(1, 1, 1, 3), torch.zeros(1, 1, 1, 3))
    assert frames.mean().flatten().tolist() == pytest.approx([0, float(frames.mean()[0, 0, 0, 1]), 1000])
    assert frames.state().flatten().tolist() == pytest.approx([0, 0, math.log(101)])
    assert frames.mode().flatten().tolist() == pytest.approx([0, 0, 1000])


def test_quantiles_of_a_gaussian():
    frames = gaussian()
    at = frames.quantiles([0.1, 0.5])
    torch.testing.assert_close(at[:, 1], frames.mode())
    torch.testing.assert_close(
        at[:, 0], SCALE.outward(known.Normal(frames.centre, 0.3).icdf(torch.tensor(0.1).double()))
    )


def test_an_untrained_gaussian_is_the_last_frame():
    before = last()
    assert torch.equal(Gaussian(V, SCALE, 0.2)(torch.zeros_like(before), before).state(), before)
    made = LowRankGaussian(V, SCALE, 0.2, 3)
    assert torch.equal(made(torch.zeros(N, made.outputs, Y, X).double(), before).state(), before)


# -- low rank -------------------------------------------------------------------------------------------------------------


def test_low_rank_agrees_with_torch():
    one, other = low_rank(seed=1), low_rank(seed=2)
    action = one.centre + rand(4, N, V, Y, X, seed=3)
    torch.testing.assert_close(one.log_prob(action).sum((2, 3, 4)), joint(one).log_prob(action.flatten(2)))
    torch.testing.assert_close(one.kl(other).sum((1, 2, 3)), known.kl_divergence(joint(one), joint(other)))
    torch.testing.assert_close(one.entropy().sum((1, 2, 3)), joint(one).entropy())
    torch.testing.assert_close(one.std.flatten(1), joint(one).stddev)


def test_every_cell_has_an_equal_share():
    frames = low_rank()
    shares = frames.log_prob(frames.centre + 0.1)
    assert torch.equal(shares, shares[:, :1, :1, :1].expand_as(shares))


def test_cells_that_are_not_valid_are_integrated_out():
    valid = (rand(N, V, Y, X, seed=7) > 0).double()
    one, other = low_rank(1, valid), low_rank(2, valid)
    action = one.centre + rand(N, V, Y, X, seed=3)
    for n in range(N):
        at = valid[n].flatten().bool()

        def marginal(frames, n=n, at=at):
            of_all = joint(frames)
            return known.MultivariateNormal(of_all.mean[n, at], of_all.covariance_matrix[n][at][:, at])

        def total(shares, n=n):
            return (shares[n] * valid[n]).sum()

        torch.testing.assert_close(total(one.log_prob(action)), marginal(one).log_prob(action[n].flatten()[at]))
        torch.testing.assert_close(total(one.kl(other)), known.kl_divergence(marginal(one), marginal(other)))
        torch.testing.assert_close(total(one.entropy()), marginal(one).entropy())


def test_a_frame_without_valid_cells_is_worth_nothing():
    frames = low_rank(1, torch.zeros(N, V, Y, X).double())
    for part in (frames.log_prob(frames.centre), frames.kl(low_rank(2, torch.zeros(N, V, Y, X).double()))):
        assert not part.any()


def test_noise_becomes_the_covariance_of_the_frame():
    frames, size = low_rank(), V * Y * X
    assert frames.family.noise(5, (V, Y, X), torch.Generator()).shape == (5, size + 3)
    units = torch.eye(size + 3, dtype=torch.float64).unsqueeze(1).expand(-1, N, -1)
    columns = (frames.sample(units) - frames.centre).flatten(2).permute(1, 2, 0)  # (N, D, D + R)
    torch.testing.assert_close(columns @ columns.mT, joint(frames).covariance_matrix)


def test_an_untrained_frame_has_as_much_smooth_noise_as_white():
    made = LowRankGaussian(V, SCALE, 0.2, 4)
    frames = made(torch.zeros(1, made.outputs, 8, 12), torch.zeros(1, V, 8, 12))
    assert float(frames.std.square().mean()) == pytest.approx(2 * 0.2**2, rel=1e-5)


def test_the_smooth_fields_are_the_lowest_cosines():
    fields = cosines(4, 6, 8)
    assert torch.equal(fields[0], torch.ones(6, 8))
    across, along = fields[1], fields[2]
    assert torch.equal(across, across[:1].expand(6, 8)), "the longest wave lies along the longer side"
    assert torch.equal(along, along[:, :1].expand(6, 8))
    torch.testing.assert_close(fields.flatten(1) @ fields.flatten(1).T / 48, torch.eye(4), atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match=r"rollout.rank=9 is more than the 2 x 4 cells"):
        cosines(9, 2, 4)


# -- a head that decides ---------------------------------------------------------------------------------------------------


COSTS = ((0.0, 0.1, 0.4, 0.6), (0.1, 0.0, 0.3, 0.5), (0.8, 0.7, 0.0, 0.2), (1.0, 0.9, 0.4, 0.0))


def decided(seed=1, distribution="gaussian", costs=COSTS):
    settings = ForecastRollout(distribution=distribution, bins=6, rank=2, sigma=0.3, decide="head")
    made = family(settings, Quantity(("a", "b"), EDGES, costs=costs)).double()
    output = rand(N, made.outputs, Y, X, seed=seed)
    output[:, made.forecast.outputs :] /= GAIN
    return made, output


def chances_of(exceed):
    e = exceed.unbind(2)
    return torch.stack([1 - e[0], e[0] - e[1], e[1] - e[2], e[2]], dim=2)


@pytest.mark.parametrize("distribution", ["categorical", "gaussian", "low_rank"])
def test_a_head_adds_to_what_an_announcement_is_expected_to_cost(distribution):
    made, output = decided(distribution=distribution)
    frames = made(output, last())
    inner = made.forecast(output[:, : made.forecast.outputs], last())
    chances, head = chances_of(inner.exceedance(EDGES)), output[:, made.forecast.outputs :].view(N, V, 4, Y, X)
    expected = torch.stack([sum(COSTS[c][a] * chances[:, :, c] for c in range(4)) for a in range(4)], dim=2)
    torch.testing.assert_close(
        frames.logps, (GAIN * head - expected / TEMPERATURE).log_softmax(2), atol=1e-5, rtol=1e-5
    )
    assert torch.equal(frames.announced(), frames.logps.argmax(2))
    for name in ("state", "mean", "mode"):
        torch.testing.assert_close(getattr(frames, name)(), getattr(inner, name)())
    torch.testing.assert_close(frames.exceedance(EDGES), inner.exceedance(EDGES))
    torch.testing.assert_close(frames.quantiles([0.1, 0.7]), inner.quantiles([0.1, 0.7]))


@pytest.mark.parametrize("costs", [None, COSTS])
def test_a_head_of_zeros_announces_the_bayes_decision(costs):
    made, output = decided(distribution="categorical", costs=costs)
    output[:, made.forecast.outputs :] = 0
    frames = made(output, last())
    chances = chances_of(frames.exceedance(EDGES)).movedim(2, -1).numpy()
    told = 1 - np.eye(4) if costs is None else np.array(costs)
    best = (chances @ told).argmin(-1)
    np.testing.assert_array_equal(frames.announced(), best)
    assert (best != chances.argmax(-1)).any() == (costs is not None), "costs are what moves it from the likeliest class"


def test_an_action_of_a_head_is_a_class_and_its_value_is_in_it():
    made, _ = decided()
    values = torch.tensor([0.0, 14.9, 15, 34.9, 35, 74.9, 75, 900]).expand(V, 1, 8)
    assert made.actions(values)[0].tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]]
    classes = torch.arange(4, dtype=torch.int16).expand(V, 1, 4)
    assert torch.equal(made.actions(made.values(classes)), classes)


def test_what_a_decision_is_credited_with_does_not_move_the_forecast_but_the_anchor_holds_it():
    made, output = decided()
    output.requires_grad_()
    frames, other = made(output, last()), made(decided(seed=2)[1], last())
    classes = torch.randint(4, (N, V, Y, X), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    (gradient,) = torch.autograd.grad(frames.log_prob(classes).sum(), output, retain_graph=True)
    assert float(gradient[:, :V].abs().max()) == 0
    assert float(gradient[:, V:].abs().min()) > 0
    choice = known.kl_divergence(*(known.Categorical(logits=one.logps.movedim(2, -1)) for one in (frames, other)))
    torch.testing.assert_close(frames.kl(other), choice + frames.forecast.kl(other.forecast))
    (gradient,) = torch.autograd.grad(frames.kl(other).sum(), output)
    assert float(gradient[:, :V].abs().min()) > 0
    value = 20 * rand(N, V, Y, X, seed=9).abs()
    torch.testing.assert_close(frames.error(value), frames.forecast.error(value))


# -- all ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", ["categorical", "gaussian", "low_rank"])
@pytest.mark.parametrize("what", ["log_prob", "kl", "entropy", "error"])
def test_gradients_are_those_of_finite_differences(distribution, what):
    quantity = Quantity(("a", "b"), EDGES)
    made = family(ForecastRollout(distribution=distribution, bins=6, rank=2, sigma=0.3), quantity).double()
    before, valid = last()[:1], (rand(1, V, Y, X, seed=7) > 0).double()
    other = made(rand(1, made.outputs, Y, X, seed=4), before, valid)
    action = other.sample(made.noise(1, (V, Y, X), torch.Generator().manual_seed(0)).double())
    value = 20 * rand(1, V, Y, X, seed=9).abs()
    given = {"log_prob": (action,), "kl": (other,), "entropy": (), "error": (value,)}[what]

    def function(output):
        return getattr(made(output, before, valid), what)(*given)

    output = rand(1, made.outputs, Y, X, seed=1).requires_grad_()
    if what == "entropy" and distribution == "gaussian":
        assert not function(output).requires_grad, "its spread is fixed"
    else:
        assert torch.autograd.gradcheck(function, output)


@pytest.mark.parametrize("decide", ["class", "head"])
@pytest.mark.parametrize("distribution", ["categorical", "gaussian", "low_rank"])
def test_nothing_diverges_from_itself(distribution, decide):
    made = family(ForecastRollout(distribution=distribution, decide=decide), Quantity(("a", "b"), EDGES))
    frames = made(rand(N, made.outputs, Y, X).float(), last().float())
    assert float(frames.kl(frames).abs().max()) < 1e-6
