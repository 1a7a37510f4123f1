"""Small nets that take one step of a forecast: channels of now (N, C, Y, X) -> what the distribution of the next frame needs.

A step net knows nothing of leads, classes or distributions (core/policy/forecast.py feeds and reads it): `step(x, memory)` gives
(N, O, Y, X) and the memory of the next step. Its last layer starts at 0, and 0 means "as the last frame": an untrained
forecast is persistence. Any number of rows and columns will do; coarser levels pad by repeating the border.

`UNet` sees far through its coarse levels (Ronneberger et al. 2015, arXiv 1505.04597), `ViT` through attention between patches
(Dosovitskiy et al. 2021, arXiv 2010.11929); `ConvLSTM` remembers (Shi et al. 2015, arXiv 1506.04214). All are written from
these papers' text. Nothing here has dropout or batch statistics: a decision must weigh the same twice.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from core.config import ConfigError, Model

ADAPTER = "adapter_config.json"  # what peft calls it
KIND = "_class_name"  # in config.json, as diffusers has it


CARD = """---
{{ card_data }}
---

One step of a forecast, saved by `core.policy.step_nets`; `load_step_net` and `from_pretrained` read it.
"""


class StepNet(nn.Module, PyTorchModelHubMixin, model_card_template=CARD):
    """One step, and how it is kept: config.json and model.safetensors, with LoRA the adapter beside the net without it.

    A subclass that has been imported is found again by `load_step_net`; its constructor takes plain values only.
    recurrent: steps must be taken in order, because the memory of one is what the next one needs.
    """

    recurrent = False

    def step(self, x: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        """x (N, C, Y, X), memory None at the first step. Returns (N, O, Y, X) and the next step's memory."""
        raise NotImplementedError

    @classmethod
    def load(cls, folder: Path, settings: Model) -> Self:
        """The net that `save` wrote, its adapter merged into the weights; with a new adapter if the settings ask for one.

        So `reference` is the net as it was loaded, whatever its adapter had learned before.
        """
        net = cls(**{name: value for name, value in _config(folder).items() if name != KIND})
        net.load_state_dict(load_file(folder / SAFETENSORS_SINGLE_FILE))
        if (folder / ADAPTER).exists():
            from peft import LoraConfig

            from core.policy import adapter

            net.add_adapter(LoraConfig.from_pretrained(folder))
            adapter.restore(net, folder)
            net._unload(merge=True)
        if settings.lora_rank:
            net.add_lora(settings)
        return net

    def save_pretrained(self, save_directory: str | Path, **settings: Any) -> str | None:
        return super().save_pretrained(
            save_directory, config={KIND: type(self).__name__, **self._hub_mixin_config}, **settings
        )

    def save(self, folder: Path) -> None:
        bare = self
        if self._adapted:
            from peft import get_peft_model_state_dict

            from core.policy import adapter

            bare = copy.deepcopy(self)  # a new net would draw random numbers, and saving must not change a run
            bare._unload(merge=False)
        bare.save_pretrained(folder)
        if self._adapted:
            self.peft_config["default"].save_pretrained(folder)
            save_file(get_peft_model_state_dict(self), Path(folder) / adapter.FILE)

    def restore(self, folder: Path) -> None:
        """Takes over the weights that `save` wrote; with LoRA, the adapter's."""
        if self._adapted:
            from core.policy import adapter

            adapter.restore(self, folder)
        else:
            self.load_state_dict(load_file(Path(folder) / SAFETENSORS_SINGLE_FILE))

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """The adapter is off inside. Raises ValueError if there is none."""
        if not self._adapted:
            raise ValueError("the net has no adapter to turn off: all its weights are trained; keep a frozen copy")
        layers = self._adapter_layers()
        try:
            for layer in layers:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    # -- LoRA ------------------------------------------------------------------------------------------------------------

    def add_lora(self, settings: Model) -> None:
        """A new adapter (core/policy/adapter.py). all-linear: convolutions too, which are most of these nets."""
        from core.policy import adapter

        if settings.lora_targets == "all-linear":
            # Exactly these: what inherits from them may be used in other ways than called.
            linear = [name for name, layer in self.named_modules() if type(layer) in (nn.Linear, nn.Conv2d)]
            settings = replace(settings, lora_targets=",".join(linear))
        adapter.add(self, settings)

    def add_adapter(self, config: Any) -> None:
        """What adapter.add calls: `config` is a peft.LoraConfig."""
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, self)
        self.peft_config = {"default": config}  # where peft looks for it

    @property
    def _adapted(self) -> bool:
        return hasattr(self, "peft_config")

    def _adapter_layers(self) -> list[Any]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        return [layer for layer in self.modules() if isinstance(layer, BaseTunerLayer)]

    def _unload(self, merge: bool) -> None:
        """Takes the adapter away, or makes its part the layers' own."""
        adapted = self._adapter_layers()
        for layer in adapted if merge else []:
            layer.merge()
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if child in adapted:
                    setattr(module, name, child.get_base_layer())
        del self.peft_config
        self.requires_grad_(True)


class UNet(StepNet):
    """Residual blocks at full resolution and at `levels` coarser ones, each half of the one above. 0.17 M parameters.

    width: channels at full resolution; the coarser levels have half as many again.
    """

    def __init__(self, inputs: int, outputs: int, width: int = 32, levels: int = 2):
        super().__init__()
        wide = width + width // 2
        self.enter = _conv(inputs, width)
        self.first = _Block(width)
        self.down = nn.ModuleList(
            nn.Sequential(_conv(wide if level else width, wide, stride=2), _Block(wide)) for level in range(levels)
        )
        self.up = nn.ModuleList(nn.Conv2d(wide, wide if level else width, 1) for level in range(levels))
        self.last = _Block(width)
        self.leave = _zeroed(nn.Conv2d(width, outputs, 1))

    def step(self, x: Tensor, memory: None = None) -> tuple[Tensor, None]:
        rows, columns = x.shape[2:]
        x = _padded(x, 2 ** len(self.down)).contiguous(memory_format=torch.channels_last)  # a fifth faster on a CPU
        levels = [self.first(self.enter(x))]
        for down in self.down:
            levels.append(down(levels[-1]))
        h = levels.pop()
        for up in reversed(self.up):
            h = levels.pop() + functional.interpolate(up(h), scale_factor=2)
        return self.leave(self.last(h))[..., :rows, :columns], None


class ConvLSTM(StepNet):
    """One convolutional LSTM at half resolution between an encoder and a decoder; the memory is its (h, c)."""

    recurrent = True

    def __init__(self, inputs: int, outputs: int, width: int = 32):
        super().__init__()
        wide = width + width // 2
        self.wide = wide
        self.enter = _conv(inputs, width)
        self.first = _Block(width)
        self.down = _conv(width, wide, stride=2)
        self.gates = _conv(2 * wide, 4 * wide)
        self.up = nn.Conv2d(wide, width, 1)
        self.last = _Block(width)
        self.leave = _zeroed(nn.Conv2d(width, outputs, 1))
        with torch.no_grad():
            self.gates.bias[wide : 2 * wide] = 1.0  # begin by remembering (Jozefowicz et al. 2015)

    def step(self, x: Tensor, memory: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        rows, columns = x.shape[2:]
        fine = self.first(self.enter(_padded(x, 2)))
        seen = functional.silu(self.down(fine))
        h, c = memory or (torch.zeros_like(seen), torch.zeros_like(seen))
        take, keep, give, new = self.gates(torch.cat([seen, h], dim=1)).chunk(4, dim=1)
        c = keep.sigmoid() * c + take.sigmoid() * new.tanh()
        h = give.sigmoid() * c.tanh()
        fine = fine + functional.interpolate(self.up(h), scale_factor=2)
        return self.leave(self.last(fine))[..., :rows, :columns], (h, c)


class ViT(StepNet):
    """A transformer over patches of `patch` x `patch` cells, with a skip at full resolution around it.

    The learned position of each patch is interpolated to the map's own number of patches. width: divisible by heads.
    """

    def __init__(self, inputs: int, outputs: int, width: int = 96, layers: int = 3, heads: int = 4, patch: int = 4):
        super().__init__()
        self.patch = patch
        self.enter = nn.Conv2d(inputs, width, patch, stride=patch)
        self.place = nn.Parameter(0.02 * torch.randn(1, width, 8, 8))
        self.blocks = nn.ModuleList(_Attention(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        fine = max(8, width // patch)
        self.spread = nn.ConvTranspose2d(width, fine, patch, stride=patch)
        self.skip = _conv(inputs, fine)
        self.leave = _zeroed(_conv(fine, outputs))

    def step(self, x: Tensor, memory: None = None) -> tuple[Tensor, None]:
        rows, columns = x.shape[2:]
        x = _padded(x, self.patch)
        h = self.enter(x)
        size = h.shape[2:]
        h = (h + functional.interpolate(self.place, size=size, mode="bilinear")).flatten(2).mT
        for block in self.blocks:
            h = block(h)
        h = self.spread(self.norm(h).mT.unflatten(2, size)) + self.skip(x)
        return self.leave(functional.silu(h))[..., :rows, :columns], None


class _Block(nn.Module):
    """Two convolutions around a residual."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(width, 8), width)
        self.first, self.second = _conv(width, width), _conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(functional.silu(self.norm(x)))
        return x + self.second(functional.silu(h))


class _Attention(nn.Module):
    """A transformer block over tokens (N, T, C), normalised before each part."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.norm_think = nn.LayerNorm(width), nn.LayerNorm(width)
        self.look, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.think = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.look(self.norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = functional.scaled_dot_product_attention(*parts)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return x + self.think(self.norm_think(x))


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)


def _zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _padded(x: Tensor, multiple: int) -> Tensor:
    """Rows and columns up to a multiple, the border repeated northward and eastward."""
    rows, columns = (-size % multiple for size in x.shape[2:])
    return functional.pad(x, (0, columns, 0, rows), mode="replicate") if rows or columns else x


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG_NAME).read_text())


def load_step_net(settings: Model, path: str | Path, build: Callable[[Model], nn.Module]) -> nn.Module:
    """The net of `path`: "tiny" (built by `build`), or a folder that `StepNet.save` wrote; on the GPU if there is one.

    Raises ConfigError with the likely reason if it cannot be loaded.
    """
    if str(path) == "tiny":
        net = build(settings)
        if settings.lora_rank:
            net.add_lora(settings)
    else:
        if not (Path(path) / CONFIG_NAME).is_file():
            raise ConfigError(f"MODEL={path} has no {CONFIG_NAME}; give the model folder of a run, or tiny")
        kind = _config(Path(path)).get(KIND)
        kinds = {net.__name__: net for net in StepNet.__subclasses__()}
        if kind not in kinds:
            raise ConfigError(f"MODEL={path} holds a {kind}; a forecast steps with one of {', '.join(sorted(kinds))}")
        net = kinds[kind].load(Path(path), settings)
    return net.to("cuda" if torch.cuda.is_available() else "cpu")
