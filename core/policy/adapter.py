"""LoRA on a net: adding an adapter, and taking over the weights of one that was saved.

The net is a diffusers model, or has `add_adapter` as these do. Saving is its own `save_lora_adapter`, turning off its
`disable_adapters`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from core.config import ConfigError, Model

if TYPE_CHECKING:
    from diffusers import ModelMixin

FILE = "pytorch_lora_weights.safetensors"  # where save_lora_adapter writes
DEFAULT = "default"  # what an adapter is called that was given no name


def add(model: ModelMixin, settings: Model) -> None:
    """A new adapter as the settings want it; from now on it alone carries gradient. Starts as if it were not there.

    Raises ConfigError if a name is no layer's (see `shape`), or of a kind that LoRA does not cover.
    """
    lora = shape(model, settings)
    model.requires_grad_(False)
    try:
        put(model, lora)
    except ValueError as error:
        raise ConfigError(f"model.lora_targets={settings.lora_targets}: {error}") from error


def shape(model: ModelMixin, settings: Model, groups: Mapping[str, Sequence[str]] | None = None) -> dict[str, Any]:
    """Rank ("r"), "lora_alpha" and "target_modules" of the adapter that the settings ask for.

    lora_targets: names of layers, separated by commas; all-linear: every linear layer; or a name of `groups`, which stands for
    those of its layers that there are.
    Raises ConfigError if a name is no layer's.
    """
    targets = settings.lora_targets
    found = {"all-linear": targets, **(groups or {})}.get(targets)
    if found is None:
        found = [name.strip() for name in targets.split(",")]
        for name in found:
            if not any(f".{layer}".endswith(f".{name}") for layer, _ in model.named_modules() if layer):
                raise ConfigError(
                    f"model.lora_targets={targets}: no layer is named {name!r}; correct it or use all-linear"
                )
    return {"r": settings.lora_rank, "lora_alpha": settings.lora_alpha, "target_modules": found}


def put(model: ModelMixin, lora: Mapping[str, Any], name: str = DEFAULT) -> None:
    """A new adapter of this shape. Float32: an update of 1e-4 of a weight is lost in bfloat16. Raises ValueError as peft does."""
    from peft import LoraConfig

    model.add_adapter(LoraConfig(init_lora_weights="gaussian", **lora), *([name] if name != DEFAULT else []))
    for key, weight in model.named_parameters():
        if "lora_" in key and f".{name}." in key:
            weight.data = weight.data.float()


def restore(model: ModelMixin, folder: Path, name: str = DEFAULT) -> None:
    """The adapter's weights as `save_lora_adapter` wrote them. Raises ConfigError if they are another adapter's."""
    from peft import set_peft_model_state_dict

    try:
        found = set_peft_model_state_dict(model, load_file(folder / FILE), name)
    except RuntimeError as error:
        raise ConfigError(f"{folder} holds an adapter of another shape; check model.lora_rank ({error})") from error
    missing = [key for key in found.missing_keys if "lora_" in key and f".{name}." in key]
    if found.unexpected_keys or missing:
        key = (found.unexpected_keys or missing)[0]
        raise ConfigError(
            f"{folder} holds another adapter than this net's ({key} does not fit); check model.lora_targets"
        )
