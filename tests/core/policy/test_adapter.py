"""core/policy/adapter.py on a net of three layers."""

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from safetensors.torch import load_file
from torch import nn

from core.config import ConfigError, Model
from core.policy import adapter

X = torch.tensor([[1.0, -2.0, 0.5]])


class Small(ModelMixin, ConfigMixin, PeftAdapterMixin):
    @register_to_config
    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(3, 4), nn.Linear(4, 2), nn.LayerNorm(4)

    def forward(self, x):
        return self.second(self.norm(self.first(x)))


def small(targets="all-linear", rank=2, alpha=6):
    torch.manual_seed(0)
    net = Small()
    adapter.add(net, Model(lora_rank=rank, lora_alpha=alpha, lora_targets=targets))
    return net


def stir(net):
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "lora_" in name:
                p.normal_()


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("all-linear", {"first", "second"}),
        ("second", {"second"}),
        (" first , second ", {"first", "second"}),
    ],
)
def test_only_the_adapter_of_the_named_layers_is_trained(targets, layers):
    trained = {name for name, p in small(targets).named_parameters() if p.requires_grad}
    assert trained == {f"{layer}.lora_{part}.default.weight" for layer in layers for part in "AB"}


def test_a_new_adapter_changes_nothing_and_then_adds_its_product():
    torch.manual_seed(0)
    plain, net = Small(), small("first", rank=2, alpha=6)
    assert torch.equal(net(X), plain(X))
    assert net.first.lora_A["default"].weight.shape == (2, 3)
    stir(net)
    a, b = net.first.lora_A["default"].weight, net.first.lora_B["default"].weight
    plain.first.weight.data += 6 / 2 * b @ a
    torch.testing.assert_close(net(X), plain(X))


@pytest.mark.parametrize("targets", ["third", "first, third", "first,", "irst", ""])
def test_a_name_that_no_layer_has_is_refused(targets):
    with pytest.raises(ConfigError, match=rf"model.lora_targets={targets}: no layer is named '(third|irst|)'; correct"):
        small(targets)


def test_a_layer_that_takes_no_adapter_is_refused():
    with pytest.raises(ConfigError, match=r"model.lora_targets=norm: .*LayerNorm.* not supported"):
        small("norm")


def test_a_saved_adapter_is_taken_back_bit_for_bit(tmp_path):
    net, other = small(), small()
    stir(net)
    net.save_lora_adapter(tmp_path)
    assert sorted(load_file(tmp_path / adapter.FILE)) == [
        f"{layer}.lora_{part}.weight" for layer in ("first", "second") for part in "AB"
    ]
    assert not torch.equal(other(X), net(X))
    adapter.restore(other, tmp_path)
    assert torch.equal(other(X), net(X))


@pytest.mark.parametrize(
    ("saved", "asked", "message"),
    [
        ({"targets": "first"}, {}, r"another adapter than this net's \(second.lora_.* does not fit\)"),
        ({}, {"targets": "first"}, r"another adapter than this net's \(second.lora_.* does not fit\)"),
        ({"rank": 3}, {}, r"adapter of another shape; check model.lora_rank \(.*first.lora_A"),
    ],
)
def test_an_adapter_of_another_net_is_refused(tmp_path, saved, asked, message):
    small(**saved).save_lora_adapter(tmp_path)
    with pytest.raises(ConfigError, match=f"(?s){tmp_path} holds .*{message}"):
        adapter.restore(small(**asked), tmp_path)
