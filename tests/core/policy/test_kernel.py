"""core/policy/kernel.py against worked examples, independent derivations, diffusers' scheduler and simulated marginals."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from core.policy.kernel import (
    STANDARD,
    Centred,
    Kernel,
    Schedule,
    Window,
    divergence,
    draw,
    equalizer,
    log_prob,
)

# The worked example: one row of two elements, float64, from sigma 0.6 to 0.5; REF plays the reference and the old policy.
X = torch.tensor([[1.0, -0.5]], dtype=torch.float64)
V = torch.tensor([[0.4, 0.2]], dtype=torch.float64)
REF = torch.tensor([[0.3, 0.25]], dtype=torch.float64)
NEXT = torch.tensor([[0.9, -0.4]], dtype=torch.float64)
NOISY = [Kernel("flow", 0.7), Kernel("dance", 0.3), Kernel("sage", 0.5), Kernel("cps", 0.8)]
SDE = NOISY[:3]


def named(kernel):
    return kernel.name


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- worked examples (rounded to 12 digits where they come from, so compared at 1e-9)


@pytest.mark.parametrize(
    ("kernel", "sigma", "sigma_next", "mean", "std"),
    [
        (Kernel("flow", 0.7), 0.6, 0.5, [0.88895, -0.494275], 0.271108834235),
        (Kernel("flow", 0.7), 1.0, 0.9, [0.715, -0.3975], 0.7),
        (Kernel("flow", 0.7), 0.1, 0.0, [0.922977777778, -0.511288888889], 0.0737864787373),
        (Kernel("dance", 0.3), 0.6, 0.5, [0.9513, -0.51685], 0.0948683298051),
        (Kernel("cps", 0.8), 0.6, 0.5, [0.559229856737, -0.374893568819], 0.475528258148),
        (Kernel("sage", 0.5), 0.6, 0.5, [0.930240308432, -0.50922493926], 0.175459077362),
        (Kernel("ode"), 0.6, 0.5, [0.96, -0.52], 0.0),
    ],
)
def test_mean_and_std_of_the_worked_examples(kernel, sigma, sigma_next, mean, std):
    got, deviation = kernel.step(X, V, sigma, sigma_next)
    assert got[0].tolist() == pytest.approx(mean, abs=1e-9)
    assert deviation.item() == pytest.approx(std, abs=1e-9)


def test_sd_of_the_worked_examples():
    flow = Kernel("flow", 0.7)
    assert flow.sd(0.6, 0.5).item() == pytest.approx(0.857321409974)
    assert flow.sd(1.0, 0.9).item() == pytest.approx(2.21359436212)
    assert Kernel("dance", 0.3).sd(0.6, 0.5).item() == pytest.approx(0.3)
    assert flow.std(1.0, 0.0).item() == pytest.approx(0.7)


def test_log_probs_and_ratios_of_the_worked_example():
    flow = Kernel("flow", 0.7)
    new = log_prob(NEXT, *flow.step(X, V, 0.6, 0.5))
    old = log_prob(NEXT, *flow.step(X, REF, 0.6, 0.5))
    assert new.item() == pytest.approx(0.355650559214)
    assert old.item() == pytest.approx(0.351935144674)
    assert (new - old).exp().item() == pytest.approx(1.00372232525)
    assert (2 * new).item() == pytest.approx(0.711301118429)
    assert (2 * (new - old)).exp().item() == pytest.approx(1.0074585062)


@pytest.mark.parametrize(
    ("kernel", "expected"), [(Kernel("dance", 0.3), 0.983948692618), (Kernel("sage", 0.5), 0.71710529446)]
)
def test_log_prob_of_the_other_kernels(kernel, expected):
    assert log_prob(NEXT, *kernel.step(X, V, 0.6, 0.5)).item() == pytest.approx(expected)


def test_the_released_form_of_cps_is_ours_without_constants_and_scale():
    mean, std = Kernel("cps", 0.8).step(X, V, 0.6, 0.5)
    constants = std.log() + 0.5 * math.log(2 * math.pi)
    assert (2 * std**2 * (log_prob(NEXT, mean, std) + constants)).item() == pytest.approx(-0.0583773117129)


def test_divergence_of_the_worked_example_in_both_forms():
    flow = Kernel("flow", 0.7)
    mean, std = flow.step(X, V, 0.6, 0.5)
    reference, _ = flow.step(X, REF, 0.6, 0.5)
    assert reference[0].tolist() == pytest.approx([0.9014, -0.5005])
    assert divergence(mean, reference, std).item() == pytest.approx(0.000659024234694)
    for dt in (0.1, -0.1, torch.tensor([0.1])):
        assert divergence(mean, reference, std, form="code", dt=dt).item() == pytest.approx(6.59024234694e-05)


@pytest.mark.parametrize(("sigma", "sigma_next"), [(0.6, 0.5), (0.95, 0.7), (0.05, 0.0)])
def test_divergence_equals_its_form_in_velocities(sigma, sigma_next):
    flow = Kernel("flow", 0.7)
    mean, std = flow.step(X, V, sigma, sigma_next)
    reference, _ = flow.step(X, REF, sigma, sigma_next)
    sd = flow.sd(sigma, sigma_next).item()
    scale = (sigma - sigma_next) / 2 * (sd * (1 - sigma) / (2 * sigma) + 1 / sd) ** 2
    assert divergence(mean, reference, std).item() == pytest.approx(scale * (V - REF).square().mean().item())


def test_guard_s_ratio_of_the_worked_example():
    flow = Kernel("flow", 0.7)
    mean, std = flow.step(X, V, 0.6, 0.5)
    old, _ = flow.step(X, REF, 0.6, 0.5)
    drift = divergence(mean, old, std)
    ratio = ((log_prob(NEXT, mean, std) - log_prob(NEXT, old, std) + drift) * std).exp()
    assert ratio.item() == pytest.approx(1.00118665251)


def test_the_convention_from_noise_at_0_to_data_at_1_gives_the_same_step():
    time, dt, u, a = 0.4, 0.1, -V, 0.7
    sd = a * math.sqrt((1 - time) / time)
    expected = X + (u + sd**2 / (2 * (1 - time)) * (-X + time * u)) * dt
    mean, std = Kernel("flow", a).step(X, V, 1 - time, 1 - time - dt)
    torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-12)
    assert std.item() == pytest.approx(sd * math.sqrt(dt), rel=1e-12)


def test_sage_s_first_step_clamps_only_inside_the_logarithm():
    assert Kernel("sage", 0.5).std(1.0, 0.9).square().item() == pytest.approx(0.85163947433)


EQUALIZERS = {
    ("sage", 5): [4.78981747407, 1.56154922473, 1.0, 0.655317963817, 0.344423078774],
    ("flow", 5): [2.27304861365, 1.63299316186, 1.0, 0.666666666667, 0.408248290464],
    ("sage", 4): [3.2952557144, 1.0, 0.590171552268, 0.296388395679],
    ("flow", 4): [1.43760217028, 1.0, 0.57735026919, 0.333333333333],
}


@pytest.mark.parametrize(("name", "steps"), EQUALIZERS)
def test_equalizer_of_odd_and_even_numbers_of_steps(name, steps):
    kernel = Kernel(name, {"sage": 0.5, "flow": 0.7}[name])
    assert equalizer(kernel, Schedule.uniform(steps)).tolist() == pytest.approx(EQUALIZERS[name, steps])


@pytest.mark.parametrize("kernel", NOISY, ids=named)
def test_the_slope_of_the_equalizer_is_the_derivative_of_the_mean(kernel):
    v = V.clone().requires_grad_()
    (slope,) = torch.autograd.grad(kernel.step(X, v, 0.6, 0.5)[0].sum(), v)
    assert slope[0].tolist() == pytest.approx([kernel.slope(0.6, 0.5).item()] * 2)
    norm = [abs(kernel.slope(*step)) / kernel.std(*step) for step in pairwise(Schedule.uniform(3).sigmas)]
    weights = equalizer(kernel, Schedule.uniform(3))
    assert (weights[0] / weights[1]).item() == pytest.approx((norm[1] / norm[0]).item())


def test_a_step_without_density_weighs_one():
    assert equalizer(Kernel("ode"), Schedule.uniform(3)).tolist() == [1, 1, 1]
    weights = equalizer(Kernel("cps", 0.8), Schedule.uniform(3))
    assert weights[-1] == 1
    assert weights.isfinite().all()


# ---- kernels against each other, against diffusers and against a derivation of their own


def test_flow_and_dance_with_the_same_sd_are_one_kernel():
    flow = Kernel("flow", 0.7)
    for sigma, sigma_next in [(0.9, 0.8), (0.6, 0.3), (0.2, 0.0)]:
        dance = Kernel("dance", flow.sd(sigma, sigma_next).item())
        for ours, theirs in zip(flow.step(X, V, sigma, sigma_next), dance.step(X, V, sigma, sigma_next), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", SDE, ids=named)
def test_the_mean_is_the_ode_step_plus_half_the_variance_times_the_score(kernel):
    for sigma, sigma_next in [(1.0, 0.9), (0.6, 0.5), (0.1, 0.0)]:
        mean, std = kernel.step(X, V, sigma, sigma_next)
        clean = X - sigma * V
        score = -(X - (1 - sigma) * clean) / sigma**2
        torch.testing.assert_close(mean, X + V * (sigma_next - sigma) + 0.5 * std**2 * score, rtol=1e-12, atol=1e-12)


def test_full_noise_of_cps_is_diffusers_stochastic_sampling():
    sigmas = [1.0, 0.75, 0.4, 0.1]
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=sigmas)
    x = theirs = normal(2, 3, 4, 4, dtype=torch.float32)
    for at, (sigma, sigma_next) in enumerate(pairwise([*sigmas, 0.0])):
        v = normal(2, 3, 4, 4, seed=at + 1, dtype=torch.float32)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(99 + at))
        generator = torch.Generator().manual_seed(99 + at)
        theirs = scheduler.step(v, scheduler.timesteps[at], theirs, generator=generator, return_dict=False)[0]
        mean, std = Kernel("cps", 1.0).step(x, v, sigma, sigma_next)
        x = mean + std * noise
        torch.testing.assert_close(x, theirs, rtol=1e-5, atol=1e-6)


def test_ode_is_diffusers_euler_step():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.6])
    x, v = normal(2, 5, dtype=torch.float32), normal(2, 5, seed=1, dtype=torch.float32)
    theirs = scheduler.step(v, scheduler.timesteps[0], x, return_dict=False)[0]
    torch.testing.assert_close(Kernel("ode").step(x, v, 1.0, 0.6)[0], theirs)


def test_cps_has_the_path_s_noise_and_signal():
    """On the training path v = x1 - x0, so that x_next is (1 - s') x0 plus noise of total deviation s'."""
    x0, x1, sigma, after = normal(1, 4), normal(1, 4, seed=1), 0.7, 0.45
    mean, std = Kernel("cps", 0.6).step((1 - sigma) * x0 + sigma * x1, x1 - x0, sigma, after)
    carried = (mean - (1 - after) * x0) / x1
    assert (carried**2 + std**2)[0].tolist() == pytest.approx([after**2] * 4)


@pytest.mark.parametrize(("sigma", "sigma_next"), [(0.95, 0.9), (0.6, 0.5), (0.3, 0.0)])
def test_sage_s_variance_is_the_integral_of_flow_s(sigma, sigma_next):
    edges = np.linspace(sigma_next, sigma, 200_001)
    middles = (edges[1:] + edges[:-1]) / 2
    integral = (0.5**2 * middles / (1 - middles)).sum() * (edges[1] - edges[0])
    variance = Kernel("sage", 0.5).std(sigma, sigma_next).square().item()
    assert variance == pytest.approx(integral, rel=1e-8)
    assert variance < Kernel("flow", 0.5).std(sigma, sigma_next).square().item()


@pytest.mark.parametrize("name", ["flow", "dance", "sage", "cps"])
@pytest.mark.parametrize(("sigma", "sigma_next"), [(1.0, 0.9), (0.6, 0.5), (0.1, 0.0)])
def test_every_kernel_becomes_the_ode_without_noise(name, sigma, sigma_next):
    mean, std = Kernel(name, 1e-6).step(X, V, sigma, sigma_next)
    assert std.item() < 3e-6
    torch.testing.assert_close(mean, Kernel("ode").step(X, V, sigma, sigma_next)[0], rtol=0, atol=1e-9)


# ---- marginals: data N(0.7, 0.4^2), whose velocity E[x1 - x0 | x] is known

DATA_MEAN, DATA_STD = 0.7, 0.4


def exact_velocity(x, sigma, prior=STANDARD):
    start = prior.centre * sigma + (1 - sigma) * DATA_MEAN
    variance = ((1 - sigma) * DATA_STD) ** 2 + (sigma * prior.scale) ** 2
    residual = (x - start) / variance
    clean = DATA_MEAN + (1 - sigma) * DATA_STD**2 * residual
    return prior.centre + sigma * prior.scale**2 * residual - clean


def carried(kernel, steps, start=1.0, prior=STANDARD):
    """Mean and variance of x at the end: each step is linear in x, so they follow from the step at 0 and at 1."""
    mean = start * prior.centre + (1 - start) * DATA_MEAN
    variance = (start * prior.scale) ** 2 + ((1 - start) * DATA_STD) ** 2
    for sigma, sigma_next in pairwise(start * (1 - step / steps) for step in range(steps + 1)):
        x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        (at_zero, at_one), std = kernel.step(x, exact_velocity(x, sigma, prior), sigma, sigma_next, prior)
        slope = (at_one - at_zero).item()
        mean = at_zero.item() + slope * mean
        variance = slope**2 * variance + std.item() ** 2
    return mean, variance


@pytest.mark.parametrize("prior", [STANDARD, Centred(-0.5, 0.3)], ids=["standard", "centred"])
@pytest.mark.parametrize("kernel", [*SDE, Kernel("ode")], ids=named)
def test_the_marginal_is_kept_to_first_order_in_the_length_of_a_step(kernel, prior):
    """From sigma = 0.9: flow's and sage's first step from 1 is noise of a size that no number of steps makes small."""
    errors = []
    for steps in (50, 200):
        mean, variance = carried(kernel, steps, 0.9, prior)
        errors.append(max(abs(mean - DATA_MEAN), abs(math.sqrt(variance) - DATA_STD)))
    assert errors[1] < 0.004
    assert errors[1] < 0.3 * errors[0]


@pytest.mark.parametrize("kernel", SDE, ids=named)
def test_sampled_paths_keep_the_marginal(kernel):
    generator = torch.Generator().manual_seed(0)
    x = draw((40_000, 1), 1, generator)
    for sigma, sigma_next in pairwise(Schedule.uniform(80).sigmas):
        mean, std = kernel.step(x, exact_velocity(x, sigma), sigma, sigma_next)
        x = mean + std * draw(tuple(x.shape), 1, generator)
    mean, variance = carried(kernel, 80)
    assert x.mean().item() == pytest.approx(DATA_MEAN, abs=0.012)
    assert x.std().item() == pytest.approx(DATA_STD, abs=0.012)
    assert x.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / 40_000))
    assert x.std().item() == pytest.approx(math.sqrt(variance), abs=4 * math.sqrt(variance / 80_000))


# ---- priors


def log_marginal(x, sigma, prior):
    """Log-density of x at `sigma` by summing over the data's density on a grid."""
    x0 = torch.linspace(DATA_MEAN - 8 * DATA_STD, DATA_MEAN + 8 * DATA_STD, 20_001, dtype=torch.float64)
    data = torch.distributions.Normal(DATA_MEAN, DATA_STD).log_prob(x0)
    path = torch.distributions.Normal((1 - sigma) * x0 + sigma * prior.centre, sigma * prior.scale)
    return torch.logsumexp(data + path.log_prob(x), 0) + torch.log(x0[1] - x0[0])


@pytest.mark.parametrize("prior", [STANDARD, Centred(0.2, 0.487)], ids=["standard", "centred"])
@pytest.mark.parametrize("sigma", [1.0, 0.6, 0.2])
def test_the_score_is_the_derivative_of_the_log_density(prior, sigma):
    for at in torch.tensor([-0.3, 0.5, 1.1], dtype=torch.float64):
        slope = (log_marginal(at + 1e-5, sigma, prior) - log_marginal(at - 1e-5, sigma, prior)) / 2e-5
        x = at.reshape(1, 1)
        score = prior.score(x, exact_velocity(x, sigma, prior), sigma)
        assert score.item() == pytest.approx(slope.item(), rel=1e-6)


def test_the_standard_score_of_the_worked_example():
    assert STANDARD.score(X, V, 0.6)[0].tolist() == pytest.approx([-1.93333333333, 0.7])


def test_a_centred_prior_at_0_of_scale_1_is_the_standard_one():
    for kernel in NOISY:
        for centre in (0.0, torch.zeros_like(X)):
            for ours, standard in zip(
                kernel.step(X, V, 0.6, 0.5, Centred(centre, 1.0)), kernel.step(X, V, 0.6, 0.5), strict=True
            ):
                assert torch.equal(ours, standard)


@pytest.mark.parametrize("kernel", [*NOISY, Kernel("ode")], ids=named)
def test_a_centred_step_is_the_standard_step_in_moved_coordinates(kernel):
    centre, scale = normal(3, 5, seed=2), 0.487
    x, v = normal(3, 5), normal(3, 5, seed=1)
    for sigma, sigma_next in [(1.0, 0.9), (0.6, 0.5), (0.1, 0.0)]:
        mean, std = kernel.step(x, v, sigma, sigma_next, Centred(centre, scale))
        moved, moved_std = kernel.step((x - sigma * centre) / scale, (v - centre) / scale, sigma, sigma_next)
        torch.testing.assert_close(mean, scale * moved + sigma_next * centre, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(std, scale * moved_std)


def test_path_and_clean_estimate_are_inverse():
    prior = Centred(normal(3, 4, seed=2), 0.3)
    x0, noise, sigma = normal(3, 4), normal(3, 4, seed=1), torch.tensor([1.0, 0.5, 0.1])
    x1 = prior.start(noise)
    torch.testing.assert_close(x1, prior.centre + 0.3 * noise)
    x = prior.noised(x0, noise, sigma)
    torch.testing.assert_close(x[1], 0.5 * x0[1] + 0.5 * x1[1])
    torch.testing.assert_close(x[0], x1[0])
    torch.testing.assert_close(prior.clean(x, x1 - x0, sigma), x0)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_prior_without_spread_is_refused(scale):
    with pytest.raises(ValueError, match="scale="):
        Centred(0.0, scale)


# ---- log-probabilities


@pytest.mark.parametrize("kernel", NOISY, ids=named)
def test_log_prob_is_the_mean_of_the_normal_log_density(kernel):
    x, v = normal(4, 2, 3), normal(4, 2, 3, seed=1)
    sigma = torch.tensor([0.9, 0.6, 0.5, 0.3], dtype=torch.float64)
    mean, std = kernel.step(x, v, sigma, sigma - 0.2)
    end = mean + std * normal(4, 2, 3, seed=2)
    expected = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(end).mean((1, 2))
    torch.testing.assert_close(log_prob(end, mean, std), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", NOISY, ids=named)
def test_the_gradient_of_log_prob_is_that_of_finite_differences(kernel):
    x, v, end = normal(2, 3), normal(2, 3, seed=1).requires_grad_(), normal(2, 3, seed=2)
    valid = torch.tensor([[1, 1, 0], [1, 1, 1]])
    for mask in (None, valid):
        assert torch.autograd.gradcheck(lambda v, mask=mask: log_prob(end, *kernel.step(x, v, 0.6, 0.4), mask), v)


def test_the_next_state_carries_no_gradient():
    mean = torch.zeros(1, 2, requires_grad=True)
    end = mean + torch.tensor([[0.3, -0.2]])
    (gradient,) = torch.autograd.grad(log_prob(end, mean, torch.tensor(0.5)).sum(), mean)
    assert gradient[0].tolist() == pytest.approx([0.3 / (2 * 0.25), -0.2 / (2 * 0.25)])


@pytest.mark.parametrize("wide", [False, True], ids=["every element", "one mask for all channels"])
def test_only_valid_elements_count_and_the_others_may_hold_anything(wide):
    valid = torch.tensor([[[1, 1, 0, 0]], [[1, 1, 1, 1]]])
    mask = valid.bool() if wide else valid.expand(2, 3, 4)
    v = normal(2, 3, 4, seed=1)
    v[0, :, 2:] = math.nan
    v.requires_grad_()
    kernel, x, end = Kernel("flow", 0.7), normal(2, 3, 4), normal(2, 3, 4, seed=2)
    mean, std = kernel.step(x, v, 0.6, 0.5)
    logps = log_prob(end, mean, std, mask)
    short, _ = kernel.step(x[:1, :, :2], v[:1, :, :2], 0.6, 0.5)
    torch.testing.assert_close(logps[:1], log_prob(end[:1, :, :2], short, std))
    torch.testing.assert_close(logps[1:], log_prob(end[1:], mean[1:], std))
    torch.testing.assert_close(
        divergence(mean, mean + 0.1, std, mask), divergence(short, short + 0.1, std).expand(2), rtol=1e-9, atol=0
    )
    logps.sum().backward()
    assert v.grad[0, :, :2].abs().min() > 0
    assert (v.grad[0, :, 2:] == 0).all()


def test_a_row_without_valid_elements_is_refused():
    with pytest.raises(ValueError, match=r"rows \[1\] have no valid element"):
        log_prob(NEXT.expand(2, 2), X.expand(2, 2), torch.tensor(0.1), torch.tensor([[1, 0], [0, 0]]))


@pytest.mark.parametrize(
    ("kernel", "sigma"), [(Kernel("ode"), 0.6), (Kernel("cps", 0.8), 0.1)], ids=["ode", "last cps"]
)
def test_no_log_prob_and_no_divergence_without_density(kernel, sigma):
    mean, std = kernel.step(X, V, sigma, sigma - 0.1 if kernel.name == "ode" else 0.0)
    assert std == 0
    for value in (lambda: log_prob(NEXT, mean, std), lambda: divergence(mean, mean, std)):
        with pytest.raises(ValueError, match="no density"):
            value()


def test_one_row_without_density_is_found_among_others():
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="no density"):
            log_prob(normal(2, 3), normal(2, 3), torch.tensor([0.1, bad]).reshape(2, 1))


def test_a_std_that_fits_no_rows_is_refused():
    with pytest.raises(ValueError, match=r"std of shape \(3,\)"):
        log_prob(normal(2, 3), normal(2, 3), torch.ones(3))


def test_the_code_form_needs_dt_and_other_forms_are_refused():
    with pytest.raises(ValueError, match="dt is None"):
        divergence(X, X, torch.tensor(0.1), form="code")
    with pytest.raises(ValueError, match="divergence='repo'"):
        divergence(X, X, torch.tensor(0.1), form="repo")


# ---- number formats


@pytest.mark.parametrize("kernel", NOISY, ids=named)
def test_bfloat16_inputs_are_worked_on_in_float32(kernel):
    x, v = (normal(2, 64, seed=seed).bfloat16() for seed in (0, 1))
    mean, std = kernel.step(x, v, 0.6, 0.5)
    wide, _ = kernel.step(x.float(), v.float(), 0.6, 0.5)
    assert mean.dtype == std.dtype == torch.float32
    assert torch.equal(mean, wide)
    end = (mean + std * normal(2, 64, seed=2)).bfloat16()
    logps = log_prob(end, mean.bfloat16(), std)
    assert logps.dtype == torch.float32
    exact = torch.distributions.Normal(mean.bfloat16().double(), std.double()).log_prob(end.double()).mean(1)
    torch.testing.assert_close(logps.double(), exact, rtol=0, atol=1e-5)
    for of in (STANDARD.score, STANDARD.clean, STANDARD.noised):
        assert torch.equal(of(x, v, 0.6), of(x.float(), v.float(), 0.6))


@pytest.mark.parametrize("kernel", NOISY, ids=named)
def test_numbers_and_rows_of_sigma_give_the_same_bits(kernel):
    x, v = normal(3, 2, 2, dtype=torch.float32), normal(3, 2, 2, seed=1, dtype=torch.float32)
    steps = list(pairwise(Schedule.uniform(4, shift=3.0).sigmas))[:3]
    for sigma, sigma_next in steps:
        mean, std = kernel.step(x, v, sigma, sigma_next)
        rows, row_stds = kernel.step(x, v, torch.full((3,), sigma), torch.full((3,), sigma_next))
        assert torch.equal(mean, rows)
        assert row_stds.shape == (3, 1, 1)
        assert (row_stds == std).all()
    mixed, stds = kernel.step(x, v, *torch.tensor(steps).T)
    for at, (sigma, sigma_next) in enumerate(steps):
        mean, std = kernel.step(x[at : at + 1], v[at : at + 1], sigma, sigma_next)
        torch.testing.assert_close(mixed[at], mean[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(stds[at].squeeze(), std, rtol=1e-6, atol=0)


def test_float32_is_near_enough_to_float64_for_a_clip_range_of_1e_5():
    for kernel in NOISY:
        for sigma, sigma_next in list(pairwise(Schedule.uniform(50, shift=3.0).sigmas))[:-1]:
            x, v, noise = normal(1, 256), normal(1, 256, seed=1), normal(1, 256, seed=2)
            mean, std = kernel.step(x, v, sigma, sigma_next)
            end = mean + std * noise
            single = log_prob(end, *kernel.step(x.float(), v.float(), sigma, sigma_next))
            other = log_prob(end, *kernel.step(x.float(), (v + 1e-3).float(), sigma, sigma_next))
            exact = log_prob(end, mean, std)
            moved = log_prob(end, *kernel.step(x, v + 1e-3, sigma, sigma_next))
            assert (other - single).item() == pytest.approx((moved - exact).item(), abs=1e-5)


# ---- schedules


def test_a_uniform_schedule_runs_from_1_to_exactly_0():
    assert Schedule.uniform(5).sigmas == pytest.approx((1, 0.8, 0.6, 0.4, 0.2, 0))
    assert Schedule.uniform(2, shift=3.0).sigmas == pytest.approx((1, 0.75, 0))
    for steps in (1, 3, 7, 40, 1000):
        for shift in (0.5, 1.0, 3.0):
            schedule = Schedule.uniform(steps, shift)
            assert len(schedule) == steps
            assert schedule.sigmas[0] == 1.0
            assert schedule.sigmas[-1] == 0.0


def test_the_shift_is_diffusers_shift_and_diffusers_own_grid_is_not_ours():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert Schedule.uniform(4, shift=3.0).sigmas == pytest.approx(scheduler.sigmas.tolist())
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    assert scheduler.sigmas[-2] == pytest.approx(0.001)
    assert Schedule.uniform(5).sigmas[-2] == pytest.approx(0.2)


def test_a_shortcut_keeps_the_first_steps_and_ends_at_0():
    assert Schedule.uniform(10).shortcut(4, 2).sigmas == pytest.approx((1, 0.9, 0.8, 0.7, 0.6, 0.3, 0))
    assert Schedule.uniform(10).shortcut(0, 2).sigmas == pytest.approx((1, 0.5, 0))
    assert Schedule.uniform(4).shortcut(3, 1) == Schedule.uniform(4)
    assert Schedule.uniform(7, 3.0).shortcut(3, 3).sigmas[-1] == 0.0


@pytest.mark.parametrize(
    "sigmas",
    [(), (1.0,), (0.9, 0.0), (1.0, 0.5, 0.001), (1.0, 0.5, 0.5, 0.0), (1.0, 0.2, 0.6, 0.0), (1.0, math.nan, 0.0)],
)
def test_sigmas_that_do_not_fall_from_1_to_0_are_refused(sigmas):
    with pytest.raises(ValueError, match="sigmas"):
        Schedule(sigmas)


def test_a_schedule_is_refused_by_the_name_of_what_is_wrong():
    with pytest.raises(ValueError, match=r"sigmas\[2\]=0.6 is not below sigmas\[1\]=0.2"):
        Schedule((1.0, 0.2, 0.6, 0.0))
    with pytest.raises(ValueError, match="steps=0"):
        Schedule.uniform(0)
    for shift in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="shift="):
            Schedule.uniform(4, shift)
    for after in (-1, 4):
        with pytest.raises(ValueError, match=f"after={after}"):
            Schedule.uniform(4).shortcut(after, 1)
    with pytest.raises(ValueError, match="steps=0"):
        Schedule.uniform(4).shortcut(1, 0)


# ---- kernels that are refused


@pytest.mark.parametrize(
    ("name", "noise_level", "message"),
    [
        ("euler", 0.5, "kernel='euler' is unknown"),
        ("flow", 0.0, "noise_level=0.0"),
        ("dance", -0.1, "noise_level=-0.1"),
        ("sage", math.nan, "noise_level=nan"),
        ("cps", 1.1, "cps lies above 1"),
        ("ode", 0.7, "noise_level=0.7 does nothing"),
    ],
)
def test_kernels_that_make_no_sense_are_refused(name, noise_level, message):
    with pytest.raises(ValueError, match=message):
        Kernel(name, noise_level)


@pytest.mark.parametrize("kernel", [*NOISY, Kernel("ode")], ids=named)
@pytest.mark.parametrize(
    ("sigma", "sigma_next"), [(0.5, 0.5), (0.5, 0.6), (1.1, 0.5), (0.5, -0.1), (0.0, 0.0), (math.nan, 0.0)]
)
def test_steps_that_do_not_go_down_are_refused(kernel, sigma, sigma_next):
    with pytest.raises(ValueError, match="no step down"):
        kernel.step(X, V, sigma, sigma_next)
    with pytest.raises(ValueError, match="no step down"):
        kernel.step(X.expand(2, 2), V.expand(2, 2), torch.tensor([0.5, sigma]), torch.tensor([0.4, sigma_next]))


def test_a_first_step_of_sage_shorter_than_its_clamp_is_refused():
    with pytest.raises(ValueError, match="sage has no variance from"):
        Kernel("sage", 0.5).step(X, V, 1.0, 0.998)


def test_a_sigma_that_fits_no_rows_is_refused():
    with pytest.raises(ValueError, match=r"sigma of shape \(3,\)"):
        Kernel("flow", 0.7).step(X, V, torch.ones(3), torch.zeros(3))


# ---- noise


def test_antithetic_noise_cancels_in_pairs_within_a_group():
    generator = torch.Generator().manual_seed(0)
    noise = draw((10, 3, 2), 5, generator, antithetic=True)
    assert noise.dtype == torch.float32
    for group in noise.unflatten(0, (2, 5)):
        assert torch.equal(group[1], -group[0])
        assert torch.equal(group[3], -group[2])
        assert not torch.equal(group[2].abs(), group[0].abs())
        assert not torch.equal(group[4].abs(), group[3].abs())
    assert not torch.equal(noise[5].abs(), noise[4].abs())


def test_noise_is_standard_normal_and_repeats_with_its_generator():
    for antithetic in (False, True):
        noise = draw((400, 100), 4, torch.Generator().manual_seed(3), antithetic)
        assert noise.std().item() == pytest.approx(1, abs=0.02)
        assert noise.mean().item() == pytest.approx(0, abs=0.02)
        assert torch.equal(noise, draw((400, 100), 4, torch.Generator().manual_seed(3), antithetic))
    plain = draw((4, 2), 4, torch.Generator().manual_seed(0))
    assert torch.equal(plain, torch.randn(4, 2, generator=torch.Generator().manual_seed(0)))


def test_antithetic_pairs_lower_the_variance_of_a_group_s_mean():
    noise = draw((4000, 1), 4, torch.Generator().manual_seed(0), antithetic=True)
    nearly_linear = (noise + 0.1 * noise**2).unflatten(0, (1000, 4)).mean(1)
    assert nearly_linear.var() < 0.1 * (1 / 4)


@pytest.mark.parametrize("group_size", [0, 3])
def test_noise_for_broken_groups_is_refused(group_size):
    with pytest.raises(ValueError, match=f"group_size={group_size} does not divide the 4 rows"):
        draw((4, 2), group_size, torch.Generator())


# ---- windows


def test_windows_by_hand():
    assert Window().steps(7, 5) == range(4)
    assert Window("first", 2).steps(7, 5) == range(2)
    assert [Window("sliding", 2, every=3).steps(update, 5).start for update in range(12)] == [
        0,
        0,
        0,
        1,
        1,
        1,
        2,
        2,
        2,
        0,
        0,
        0,
    ]
    assert Window("sliding", 4, every=1).steps(9, 5) == range(4)


@pytest.mark.parametrize(
    "window", [Window(), Window("first", 3), Window("sliding", 3, 2), Window("random", 3)], ids=named
)
@pytest.mark.parametrize("total", [4, 5, 10])
def test_no_window_holds_the_last_step_or_one_without_density(window, total):
    sigmas = Schedule.uniform(total).sigmas
    for update in range(40):
        steps = window.steps(update, total)
        assert steps.step == 1
        assert 0 <= steps.start < steps.stop <= total - 1
        assert len(steps) == (total - 1 if window.name == "all" else 3)
        for kernel in NOISY:
            assert all(kernel.std(sigmas[step], sigmas[step + 1]) > 0 for step in steps)


def test_a_random_window_repeats_by_update_and_reaches_every_start():
    starts = [Window("random", 3, seed=1).steps(update, 10).start for update in range(200)]
    assert starts == [Window("random", 3, seed=1).steps(update, 10).start for update in range(200)]
    assert set(starts) == set(range(7))
    assert starts != [Window("random", 3, seed=2).steps(update, 10).start for update in range(200)]


def test_windows_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="window='middle' is unknown"):
        Window("middle", 2)
    for name in ("first", "sliding", "random"):
        with pytest.raises(ValueError, match="window_size=0 leaves"):
            Window(name, 0)
        with pytest.raises(ValueError, match="window_size=5 does not fit before the last of 5 steps"):
            Window(name, 5).steps(0, 5)
    with pytest.raises(ValueError, match="window_every=0"):
        Window("sliding", 2, every=0)
    with pytest.raises(ValueError, match="steps=1"):
        Window().steps(0, 1)
