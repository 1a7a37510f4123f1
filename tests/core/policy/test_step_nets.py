"""core/policy/step_nets.py: shapes, an untrained net, memory, and that what is saved comes back, with an adapter or without."""

import json

import pytest
import torch
from torch import nn

from core.config import ConfigError, Model
from core.policy.step_nets import ConvLSTM, StepNet, UNet, ViT, load_step_net

SMALL = {UNet: {"width": 8, "levels": 2}, ConvLSTM: {"width": 8}, ViT: {"width": 16, "layers": 2, "heads": 2}}
NETS = pytest.mark.parametrize("kind", SMALL)
MAP = torch.randn(2, 5, 8, 12, generator=torch.Generator().manual_seed(0))


def small(kind, stir=True, **settings):
    torch.manual_seed(0)
    net = kind(5, 3, **SMALL[kind] | settings)
    if stir:
        with torch.no_grad():
            net.leave.weight.normal_(0, 0.3)
    return net


def out(net, x=MAP, memory=None):
    with torch.no_grad():
        return net.step(x, memory)[0]


@NETS
@pytest.mark.parametrize("cells", [(16, 24), (7, 5), (9, 10), (1, 1), (3, 30)])
def test_any_map_will_do(kind, cells):
    made = out(small(kind), torch.randn(2, 5, *cells))
    assert made.shape == (2, 3, *cells)
    assert made.isfinite().all()


@NETS
def test_an_untrained_net_says_nothing(kind):
    net = small(kind, stir=False)
    made, _ = net.step(MAP)
    assert not made.any()
    made.sum().backward()
    assert net.leave.weight.grad.any(), "and yet it can learn"


@NETS
def test_rows_do_not_see_each_other(kind):
    net = small(kind)
    torch.testing.assert_close(out(net, MAP[1:]), out(net)[1:], atol=1e-5, rtol=1e-5)


@NETS
def test_every_cell_sees_far(kind):
    """On 8 x 12 cells a change in one corner is felt in the other; a ConvLSTM's reach grows with its steps."""
    net, changed = small(kind), MAP.clone()
    changed[:, :, 0, 0] += 5
    memory = other = None
    with torch.no_grad():
        for _ in range(4 if net.recurrent else 1):
            (one, memory), (two, other) = net.step(MAP, memory), net.step(changed, other)
    assert (one - two)[..., -1, -1].abs().min() > 0


def test_the_default_nets_are_small():
    sizes = {kind.__name__: sum(p.numel() for p in kind(30, 40).parameters()) for kind in SMALL}
    assert sizes == {"UNet": 169_016, "ConvLSTM": 228_632, "ViT": 440_104}


def test_only_the_lstm_remembers():
    for kind in SMALL:
        net = small(kind)
        with torch.no_grad():
            first, memory = net.step(MAP)
            second, _ = net.step(MAP, memory)
        assert net.recurrent == (memory is not None) == (kind is ConvLSTM)
        assert torch.equal(first, second) != net.recurrent


def test_the_lstm_is_that_of_the_paper():
    """Shi et al. 2015 without peepholes: against torch's own cell, of which a map of one cell is one."""
    net = small(ConvLSTM)
    cell = nn.LSTMCell(net.wide, net.wide).double()
    net.double()
    x = torch.randn(2, 5, 1, 1, dtype=torch.float64)
    order = [0, 1, 3, 2]  # torch: input, forget, new, output; here: input, forget, output, new
    with torch.no_grad():
        # A map of 1 x 1 is padded to 2 x 2 and halved to 1 x 1: of the gates' kernel only the centre counts.
        centre = net.gates.weight[:, :, 1, 1].unflatten(0, (4, -1))[order].flatten(0, 1)
        cell.weight_ih.copy_(centre[:, : net.wide])
        cell.weight_hh.copy_(centre[:, net.wide :])
        cell.bias_ih.copy_(net.gates.bias.unflatten(0, (4, -1))[order].flatten())
        cell.bias_hh.zero_()
        _, (h, c) = net.step(x)
        _, (later_h, later_c) = net.step(2 * x, (h, c))
        fine = net.first(net.enter(nn.functional.pad(2 * x, (0, 1, 0, 1), mode="replicate")))
        expected = cell(nn.functional.silu(net.down(fine)).flatten(1), (h.flatten(1), c.flatten(1)))
    torch.testing.assert_close((later_h.flatten(1), later_c.flatten(1)), expected)


def test_the_places_of_patches_stretch_over_the_map():
    net = small(ViT)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
        net.place[:] = torch.arange(8.0).view(1, 1, 8, 1)  # the row
        net.norm.weight.fill_(0)
        assert net.place.shape == (1, 16, 8, 8)
        places = []
        for block in net.blocks:
            block.register_forward_hook(lambda module, given, made: places.append(given[0]))
        out(net, torch.zeros(1, 5, 64, 12))
    by_row = places[0].view(16, 3, 16)[:, 0, 0]
    torch.testing.assert_close(by_row[1:-1], torch.arange(0.25, 7, 0.5))


# -- saving and loading ---------------------------------------------------------------------------------------------------


@NETS
def test_what_is_saved_comes_back(kind, tmp_path):
    net = small(kind)
    net.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = load_step_net(Model(), tmp_path, build=None)
    assert type(again) is kind
    assert torch.equal(out(again), out(net))
    other = small(kind, stir=False)
    other.restore(tmp_path)
    assert torch.equal(out(other), out(net))


def test_saving_changes_no_chance(tmp_path):
    net = small(UNet)
    net.add_lora(Model(lora_rank=2))
    before = torch.get_rng_state()
    net.save(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_net_of_ones_own_is_found_again(tmp_path):
    class Shift(StepNet):
        def __init__(self, inputs: int, outputs: int):
            super().__init__()
            self.leave = nn.Conv2d(inputs, outputs, 1)

        def step(self, x, memory=None):
            return self.leave(x), None

    net = load_step_net(Model(), "tiny", build=lambda settings: Shift(5, 3))
    net.save(tmp_path)
    assert torch.equal(out(load_step_net(Model(), tmp_path, build=None)), out(net))


def test_a_folder_that_holds_no_step_net_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config.json; give the model folder of a run, or tiny"):
        load_step_net(Model(), tmp_path, build=None)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "TinyFlow"}))
    with pytest.raises(ConfigError, match=r"holds a TinyFlow; a forecast steps with one of .*ConvLSTM, .*UNet, ViT"):
        load_step_net(Model(), tmp_path, build=None)


# -- LoRA -----------------------------------------------------------------------------------------------------------------


def adapted(kind, **settings):
    net = small(kind)
    net.add_lora(Model(lora_rank=2, **settings))
    return net


def stir(net):
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.1)


@NETS
def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained(kind):
    net = adapted(kind)
    torch.testing.assert_close(out(net), out(small(kind)))
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    linear = {n for n, m in small(kind).named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert trained == {f"{name}.lora_{part}.default.weight" for name in linear for part in "AB"}
    net.step(MAP)[0].sum().backward()
    stir(net)
    assert not torch.allclose(out(net), out(small(kind)))
    with net.reference():
        torch.testing.assert_close(out(net), out(small(kind)))
    assert trained == {name for name, p in net.named_parameters() if p.requires_grad}


def test_layers_may_be_named():
    net = adapted(UNet, lora_targets="enter, leave")
    trained = {name.split(".lora")[0] for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {"enter", "leave"}
    with pytest.raises(ConfigError, match=r"model.lora_targets=nowhere: no layer is named 'nowhere'"):
        adapted(UNet, lora_targets="nowhere")


def test_a_net_without_adapter_has_no_reference():
    with pytest.raises(ValueError, match="no adapter to turn off"), small(UNet).reference():
        pass


@NETS
def test_a_saved_adapter_is_taken_back_or_merged(kind, tmp_path):
    net = adapted(kind)
    stir(net)
    now = out(net)
    net.save(tmp_path)
    assert torch.equal(out(net), now), "saving leaves the adapter where it is"
    assert torch.equal(out(small(kind, stir=False).from_pretrained(tmp_path)), out(small(kind))), "the bare net"
    other = adapted(kind)
    other.restore(tmp_path)
    assert torch.equal(out(other), now)
    merged = load_step_net(Model(), tmp_path, build=None)
    torch.testing.assert_close(out(merged), now, atol=1e-5, rtol=1e-4)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert all(p.requires_grad for p in merged.parameters())
    anew = load_step_net(Model(lora_rank=3), tmp_path, build=None)
    with anew.reference():
        torch.testing.assert_close(out(anew), now, atol=1e-5, rtol=1e-4)


def test_tiny_gets_an_adapter_if_asked():
    net = load_step_net(Model(lora_rank=2), "tiny", build=lambda settings: small(UNet))
    assert any("lora_" in name for name, _ in net.named_parameters())
