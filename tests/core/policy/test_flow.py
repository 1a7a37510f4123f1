"""FlowPolicy: what a rollout draws, that `forward` weighs it alike, guidance, windows, references and averages."""

import contextlib
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from core.config import ConfigError, FlowRollout, Model
from core.policy.flow import FlowPolicy, load_net
from core.policy.kernel import STANDARD, Schedule
from core.policy.tiny_flow import TinyFlow

GIVEN = [{"image": np.full((8, 8, 1), level, np.float32)} for level in (0.2, 0.5, 0.9)]


class Line(nn.Module):
    """A net of two weights over vectors of 6: v = weight * x + push * (the condition's own number); the last two are padding."""

    def __init__(self):
        super().__init__()
        self.weight, self.push = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.5))
        self.calls = 0

    def encode(self, conditions):
        valid = torch.ones(len(conditions), 6)
        valid[:, 4:] = 0
        return {"number": torch.tensor([[float(c)] for c in conditions]), "valid": valid}

    def unconditional(self, condition):
        return condition | {"number": torch.zeros_like(condition["number"])}

    def noise_shape(self, condition):
        return (6,)

    def velocity(self, x, sigma, condition):
        self.calls += 1
        # Attention reads the padding too, so its values reach the others; here they only must not count.
        return self.weight * x + self.push * condition["number"] + 0.1 * sigma[:, None]

    def decode(self, x, condition):
        return list(x.numpy())

    def prior(self, condition):
        return STANDARD

    def reference(self):
        raise ValueError("no adapter")


def rollout(**settings):
    return FlowRollout(**{"steps": 6, "window": "first", "window_size": 3, "group_size": 4} | settings)


def tiny(half=False, **settings):
    torch.manual_seed(0)
    net = TinyFlow(channels=1, text=False, width=8, levels=1)
    with torch.no_grad():
        net.leave[-1].weight.normal_(0, 0.3)
    return FlowPolicy(net, rollout(**settings), half=half)


def test_a_rollout_does_not_depend_on_batches_or_on_other_prompts():
    policy = tiny()
    whole = policy.rollout(GIVEN, 4, [11, 12, 13])
    for size in (1, 5, 12):
        split = policy.rollout(GIVEN, 4, [11, 12, 13], batch_size=size)
        torch.testing.assert_close(split.state["x"], whole.state["x"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(split.logps, whole.logps, atol=1e-5, rtol=1e-5)
    alone = policy.rollout(GIVEN[1:2], 4, [12])
    torch.testing.assert_close(alone.state["x"], whole.state["x"][4:8], atol=1e-5, rtol=1e-5)


def test_log_probabilities_are_those_of_the_noise_that_was_added():
    policy = tiny()
    acted = policy.rollout(GIVEN, 4, [11, 12, 13])
    state = acted.state
    for t in range(3):
        sigma, after = state["sigma"][:, t], state["after"][:, t]
        mean, std = policy.kernel.step(
            state["x"][:, t],
            policy.net.velocity(state["x"][:, t], sigma, {"image": state["condition/image"]}),
            sigma,
            after,
        )
        drawn = ((state["x"][:, t + 1] - mean) / std).detach()
        expected = (-(drawn**2) / 2).flatten(1).mean(1) - std.flatten().log() - 0.5 * math.log(2 * math.pi)
        torch.testing.assert_close(acted.logps[:, t], expected, atol=1e-5, rtol=1e-5)
        assert abs(float(drawn.std()) - 1) < 0.1


@pytest.mark.parametrize("kernel", ["flow", "dance", "cps", "sage"])
@pytest.mark.parametrize("settings", [{}, {"shift": 3.0}, {"shortcut": 2}, {"guidance": 2.5}, {"equalize": True}])
def test_the_policy_that_acted_weighs_its_acts_alike(kernel, settings):
    policy = tiny(kernel=kernel, noise_level=0.5, **settings)
    acted = policy.rollout(GIVEN, 4, [1, 2, 3])
    torch.testing.assert_close(policy(acted).logps, acted.logps, atol=1e-5, rtol=1e-5)
    parts = torch.cat([policy(acted, slice(t, t + 1)).logps for t in range(3)], dim=1)
    torch.testing.assert_close(parts, policy(acted).logps, atol=1e-6, rtol=1e-6)


def test_without_noise_a_rollout_is_the_ode():
    policy = tiny(kernel="dance", noise_level=1e-6)
    acted = policy.rollout(GIVEN[:1], 2, [5])
    start = torch.Generator().manual_seed(5)
    x = torch.randn(1, 1, 8, 8, generator=start).expand(2, -1, -1, -1)
    with torch.no_grad():
        image = policy.net.encode(GIVEN[:1])["image"].expand(2, -1, -1, -1)
        for sigma, after in zip(policy.schedule.sigmas, policy.schedule.sigmas[1:], strict=False):
            x = x + (after - sigma) * policy.net.velocity(x, torch.full((2,), sigma), {"image": image})
    np.testing.assert_allclose(acted.outputs, policy.net.decode(x, {}), atol=1e-4)


def test_a_group_shares_its_start_or_not():
    same = tiny(shared_noise=True).rollout(GIVEN[:1], 4, [5]).state["x"]
    own = tiny(shared_noise=False).rollout(GIVEN[:1], 4, [5]).state["x"]
    assert torch.equal(same[0, 0], same[3, 0])
    assert not torch.equal(own[0, 0], own[3, 0])
    assert not torch.equal(same[0, 1], same[3, 1]), "the noise of the steps is each rollout's own"


def test_antithetic_noise_cancels_in_a_groups_mean():
    policy = tiny(antithetic=True)
    state = policy.rollout(GIVEN[:1], 4, [5]).state
    means = [policy.kernel.step(state["x"][:, 0], policy.velocity(state["x"][:, 0], 1.0, {"image": state["condition/image"]}),
                                state["sigma"][:, 0], state["after"][:, 0])[0]]  # fmt: skip
    added = state["x"][:, 1] - means[0]
    torch.testing.assert_close(added[0], -added[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(added[2], -added[3], atol=1e-5, rtol=1e-5)


def test_a_shortcut_takes_fewer_calls_and_still_ends_at_zero():
    net = Line()
    FlowPolicy(net, rollout(steps=10, shortcut=2)).rollout([1, 2], 2, [3, 4])
    assert net.calls == 3 + 2
    assert FlowPolicy(net, rollout(steps=10, shortcut=2)).path(range(3)).sigmas[-1] == 0


def test_a_shortcut_leaves_the_equalizer_alone():
    weight = [
        tiny(steps=10, equalize=True, shortcut=cut).rollout(GIVEN[:1], 2, [5]).state["weight"] for cut in (0, 1, 2)
    ]
    assert torch.equal(weight[0], weight[1])
    assert torch.equal(weight[0], weight[2])


def test_no_pass_of_a_rollout_has_more_rows_than_asked_for():
    policy, seen = FlowPolicy(Line(), rollout()), []
    policy.keep_reference()
    for net in (policy.net, policy._reference[0]):
        net.velocity = lambda x, *rest, of=net.velocity: seen.append(len(x)) or of(x, *rest)
    for asks in ({"divergence", "drift", "aligned"}, {"renoised"}):
        policy.rollout([1.0, 2.0], 4, [3, 4], batch_size=3, asks=frozenset(asks))
    assert set(seen) == {3, 2}


def test_padding_does_not_count():
    net = Line()
    policy = FlowPolicy(net, rollout())
    acted = policy.rollout([1.0], 2, [3])
    before = policy(acted).logps.detach()
    acted.state["x"][:, :, 4:] = 1e6
    torch.testing.assert_close(policy(acted).logps, before)
    acted.state["x"][:, :, 3] += 1
    assert not torch.allclose(policy(acted).logps, before)


def test_guidance_is_linear_and_its_free_branch_has_no_gradient():
    net = Line()
    given = net.encode([2.0])
    x = torch.randn(1, 6)
    policy = FlowPolicy(net, rollout(guidance=3.0))
    v = policy.velocity(x, 0.5, given)
    conditional, free = (net.velocity(x, torch.tensor([0.5]), part) for part in (given, net.unconditional(given)))
    torch.testing.assert_close(v, free + 3 * (conditional - free))
    slope = torch.autograd.grad(v.sum(), net.weight)[0]
    torch.testing.assert_close(slope, 3 * x.sum())
    rescaled = FlowPolicy(net, rollout(guidance=3.0, guidance_rescale=True)).velocity(x, 0.5, given)
    torch.testing.assert_close(rescaled.norm(dim=1), conditional.norm(dim=1))


def test_the_reference_stays_where_training_began():
    net = Line()
    policy = FlowPolicy(net, rollout())
    policy.keep_reference()
    asks = frozenset({"divergence", "drift"})
    acted = policy.rollout([1.0, 2.0], 2, [3, 4], asks=asks)
    assert float(policy(acted).extras["divergence"].detach().abs().max()) < 1e-12
    with torch.no_grad():
        net.push += 0.1
    made = policy(acted)
    d = made.extras
    sigma = acted.state["sigma"]
    # In velocity space: (dmean/dv)^2 mean (v - v_ref)^2 / (2 std^2), over the four elements that are no padding.
    moved = (0.1 * torch.tensor([1.0, 1.0, 2.0, 2.0])) ** 2
    slope = policy.kernel.slope(sigma[0].double(), acted.state["after"][0].double())
    expected = slope**2 * moved[:, None] / (2 * d["std"].double() ** 2)
    torch.testing.assert_close(d["divergence"].double(), expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(d["drift"], d["divergence"])
    torch.testing.assert_close(d["dt"], sigma - acted.state["after"])
    assert len(list(policy.parameters())) == 2, "the copy is not trained"
    assert "push" not in "".join(name for name in policy.state_dict() if "reference" in name)


def test_an_output_is_noised_again_along_the_path():
    policy = tiny(steps=4, window="all", window_size=0)
    policy.keep_reference()
    acted = policy.rollout(GIVEN, 4, [1, 2, 3], asks=frozenset({"renoised"}))
    state = acted.state
    sigma = state["sigma"].view(12, -1, 1, 1, 1)
    clean = state["clean"].unsqueeze(1)
    noise = (state["noised"] - (1 - sigma) * clean) / sigma
    assert abs(float(noise.std()) - 1) < 0.05
    assert state["sigma"][0].tolist() == pytest.approx([1.0, 0.75, 0.5, 0.25]), "also at 1, and at the step before 0"
    made = policy(acted).extras
    torch.testing.assert_close(made["velocity"], made["old_velocity"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made["velocity"], made["ref_velocity"], atol=1e-5, rtol=1e-5)
    assert made["velocity"].requires_grad
    assert not made["old_velocity"].requires_grad


def test_padding_has_no_error_when_an_output_is_noised_again():
    policy = FlowPolicy(Line(), rollout())
    policy.keep_reference()
    acted = policy.rollout([1.0], 2, [3], asks=frozenset({"renoised"}))
    before = {name: part.detach() for name, part in policy(acted).extras.items()}
    for name in ("clean", "noised", "old", "reference"):
        acted.state[name][..., 4:] = torch.nan
    for name, part in policy(acted).extras.items():
        assert torch.equal(part.detach(), before[name]), name
    assert not before["velocity"][..., 4:].any()
    assert before["velocity"][..., :4].all()


def test_generating_depends_on_the_seed_alone():
    policy = tiny()
    whole = policy.generate(GIVEN, [7, 8, 9], steps=5)
    one = policy.generate(GIVEN[1:2], [8], steps=5, batch_size=1)
    np.testing.assert_allclose(one[0], whole[1], atol=1e-5)
    assert not np.allclose(policy.generate(GIVEN[1:2], [9], steps=5)[0], whole[1])


def test_averaged_weights_are_what_generates_and_is_saved():
    policy = tiny()
    policy.average(0.5)
    start = {name: p.detach().clone() for name, p in policy.net.named_parameters()}
    plain = policy.generate(GIVEN[:1], [7], steps=3)[0]
    with torch.no_grad():
        for p in policy.net.parameters():
            p.add_(0.2)
    np.testing.assert_array_equal(policy.generate(GIVEN[:1], [7], steps=3)[0], plain)
    policy.average(0.5)
    with policy.averaged():
        for name, p in policy.net.named_parameters():
            torch.testing.assert_close(p, start[name] + 0.1)
    for name, p in policy.net.named_parameters():
        torch.testing.assert_close(p, start[name] + 0.2)
    with contextlib.suppress(RuntimeError), policy.averaged():
        raise RuntimeError
    torch.testing.assert_close(next(policy.net.parameters()), next(iter(start.values())) + 0.2)


def test_averages_move_in_bfloat16_too():
    policy = tiny()
    policy.net.to(torch.bfloat16)
    policy.average(0.999)
    with torch.no_grad():
        for p in policy.net.parameters():
            p.fill_(2.0)
    start = policy.memory()["averaged"]["enter.bias"].clone()
    for _ in range(1000):
        policy.average(0.999)
    share = (policy.memory()["averaged"]["enter.bias"] - start) / (2.0 - start)
    torch.testing.assert_close(share, torch.full_like(share, 1 - 0.999**1000), atol=1e-4, rtol=0)
    with policy.averaged():
        assert policy.net.enter.bias.dtype == torch.bfloat16


def test_gradient_checkpointing_is_the_nets_own_or_refused_in_words():
    net, asked = Line(), []
    net.gradient_checkpointing_enable = asked.append
    FlowPolicy(net, rollout()).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert asked == [{"use_reentrant": False}]
    with pytest.raises(ConfigError, match="TinyFlow cannot compute its blocks again"):
        tiny().gradient_checkpointing_enable()


def test_windows_move_and_what_is_not_measured_is_refused():
    policy = tiny(window="sliding", window_size=2, window_every=3)
    assert [policy.window(batch) for batch in (0, 2, 3, 12)] == [range(2), range(2), range(1, 3), range(2)]
    with pytest.raises(ValueError, match="has not been measured"):
        tiny(window="active", window_size=0).window(0)
    assert len(Schedule.uniform(6)) == 6


def test_dropout_stays_off():
    policy = tiny()
    assert not policy.train().net.training


def test_a_net_is_loaded_by_what_its_folder_holds(tmp_path):
    build = lambda model: TinyFlow(channels=1, text=False, width=model.width, levels=model.layers)  # noqa: E731
    net = load_net(Model(width=8, layers=1), "tiny", build)
    net.save(tmp_path / "net")
    again = load_net(Model(), tmp_path / "net", build)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ConfigError, match="holds a UNet2DModel"):
        load_net(Model(), tmp_path / "other", build)
    with pytest.raises(ConfigError, match="MODEL="):
        load_net(Model(), tmp_path / "nothing", build)
