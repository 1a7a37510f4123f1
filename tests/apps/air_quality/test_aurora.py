"""apps/air_quality/aurora.py with a tiny Aurora of random weights; without the package, that its absence is said."""

import importlib.util

import numpy as np
import pytest
import torch

from apps.air_quality.aurora import AuroraNet
from core.app import Quantity
from core.config import ConfigError, ForecastRollout, Model
from core.policy.forecast import ForecastPolicy
from core.policy.step_nets import load_step_net

V, H, Y, X = 2, 2, 8, 12
TINY = {"embed_dim": 16, "num_heads": 2, "encoder_depths": [1, 1], "encoder_num_heads": [2, 4],
        "decoder_depths": [1, 1], "decoder_num_heads": [4, 2], "window_size": [1, 2, 3]}  # fmt: skip
LAT, LON = np.linspace(30, 37, Y).tolist(), np.linspace(120, 131, X).tolist()
here = pytest.mark.skipif(importlib.util.find_spec("aurora") is None, reason="needs microsoft-aurora")


def tiny(stir=True, inputs=12, **settings):
    torch.manual_seed(0)
    net = AuroraNet(
        **{"inputs": inputs, "variables": ["pm2p5", "pm10"], "lat": LAT, "lon": LON, "model": TINY} | settings
    )
    if stir:
        with torch.no_grad():
            for name in ("pm2p5", "pm10"):
                net.model.decoder.surf_heads[name].weight.normal_(0, 0.3)
    return net


def condition(seed):
    chance = np.random.default_rng(seed)
    made = {
        "history": chance.gamma(2, 15, (H, V, Y, X)),
        "seen": chance.random((H, V, Y, X)) < 0.4,
        "given": chance.normal(size=(3, Y, X)),
        "ahead": chance.normal(size=(4, 1)),
        "valid": np.ones((4, V, Y, X)),
    }
    return {name: part.astype(np.float32) for name, part in made.items()}


@pytest.mark.skipif(importlib.util.find_spec("aurora") is not None, reason="microsoft-aurora is here")
def test_a_missing_package_is_named():
    with pytest.raises(ConfigError, match="needs the package microsoft-aurora; pip install microsoft-aurora"):
        tiny()


@here
def test_aurora_is_given_each_channel_under_its_name_north_first():
    net, seen = tiny(), []
    net.model.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    x = torch.randn(3, 12, Y, X)
    net.step(x)
    surface = seen[0].surf_vars
    assert list(surface) == [
        "pm2p5",
        "pm10",
        "seen_pm2p5",
        "seen_pm10",
        "channel_0",
        "channel_1",
        "channel_2",
        "channel_3",
    ]
    for name, channels in {
        "pm2p5": (0, 2),
        "pm10": (1, 3),
        "seen_pm2p5": (4, 6),
        "seen_pm10": (5, 7),
        "channel_1": (9, 9),
    }.items():
        assert torch.equal(surface[name], x[:, list(channels)].flip(2)), name
    assert seen[0].metadata.lat.tolist() == pytest.approx(LAT[::-1])
    assert len(seen[0].metadata.time) == 3


@here
def test_an_untrained_aurora_says_nothing_and_can_learn():
    net = tiny(stir=False)
    made, memory = net.step(torch.randn(2, 12, Y, X))
    assert made.shape == (2, V, Y, X)
    assert not made.any()
    assert memory is None
    made.sum().backward()
    assert net.model.decoder.surf_heads["pm10"].weight.grad.any()


@here
def test_south_stays_south():
    """Upside down, with its latitudes and all, the map is another one; the output is in the order of the input."""
    net, x = tiny(), torch.zeros(1, 12, Y, X)
    with torch.no_grad():
        base, _ = net.step(x)
        x[:, :4, :2, :3] = 3.0
        change = (net.step(x)[0] - base).abs().sum(1)[0]
    assert change[:2, :3].mean() > 2 * change[-2:, -3:].mean()


@here
def test_a_grid_may_be_curved():
    lat = (np.array(LAT)[:, None] + 0.1 * np.arange(X)).tolist()
    lon = (np.array(LON)[None, :] + 0.05 * np.arange(Y)[:, None]).tolist()
    with torch.no_grad():
        made, _ = tiny(lat=lat, lon=lon).step(torch.ones(1, 12, Y, X))
        flat, _ = tiny().step(torch.ones(1, 12, Y, X))
    assert made.isfinite().all()
    assert not torch.allclose(made, flat)


@here
def test_it_is_the_net_of_a_gaussian_policy():
    conditions, quantity = [condition(seed) for seed in range(2)], Quantity(("pm2p5", "pm10"), ((15.0,), (30.0,)))
    settings = ForecastRollout(distribution="gaussian", leads=2)
    shape = ForecastPolicy.shape(conditions[0], settings, quantity)
    acting = ForecastPolicy(tiny(inputs=shape.inputs), settings, quantity)
    acting.keep_reference()
    made = acting.rollout(conditions, 4, [1, 2])
    decisions = acting(made)
    torch.testing.assert_close(decisions.logps, made.logps, atol=1e-5, rtol=1e-5)
    (decisions.logps.sum() + decisions.extras["divergence"].sum()).backward()
    plain = {name: p.grad for name, p in acting.net.named_parameters() if p.grad is not None}
    assert plain["model.encoder.surf_token_embeds.weights.pm2p5"].any()
    assert len(acting.forecast(conditions, 3)) == 2
    frozen = ForecastPolicy(tiny(False, shape.inputs), ForecastRollout(distribution="gaussian", sigma=1e-3), quantity)
    made = frozen.forecast(conditions[:1], 2)[0]["value"]
    np.testing.assert_allclose(made, np.broadcast_to(conditions[0]["history"][-1], made.shape), rtol=1e-3)


@here
def test_it_is_saved_and_loaded_with_an_adapter_too(tmp_path):
    x, net = torch.randn(1, 12, Y, X), tiny()
    net.save(tmp_path / "plain")
    again = load_step_net(Model(), tmp_path / "plain", build=None)
    with torch.no_grad():
        assert torch.equal(again.step(x)[0], net.step(x)[0])
    net.add_lora(Model(lora_rank=2))
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.05)
        now, _ = net.step(x)
        net.save(tmp_path / "lora")
        merged = load_step_net(Model(), tmp_path / "lora", build=None)
        torch.testing.assert_close(merged.step(x)[0], now, atol=1e-5, rtol=1e-4)
        with net.reference():
            assert torch.equal(net.step(x)[0], again.step(x)[0])


@here
def test_checkpointed_activations_change_no_gradient():
    grads = []
    for again in (False, True):
        net = tiny()
        if again:
            net.gradient_checkpointing_enable()
        net.step(torch.ones(1, 12, Y, X))[0].square().sum().backward()
        grads.append({name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in net.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert (grad is None) == (grads[1][name] is None)
        if grad is not None:
            torch.testing.assert_close(grads[1][name], grad)


@here
def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="8 x 12 cells do not divide into patches of 5"):
        tiny(model=TINY | {"patch_size": 5})
    with pytest.raises(ConfigError, match="lat and lon are ndarray and list; give lists"):
        tiny(lat=np.array(LAT))
