"""LoRA on diffusers models: adding an adapter, and taking over the weights of one that was saved.

Saving is the model's own `save_lora_adapter`, turning off its `disable_adapters`.
"""

from __future__ import annotations

from pathlib import Path

from diffusers import ModelMixin
from safetensors.torch import load_file

from core.config import ConfigError, Model

FILE = "pytorch_lora_weights.safetensors"  # where save_lora_adapter writes


def add(model: ModelMixin, settings: Model) -> None:
    """A new adapter of rank settings.lora_rank; from now on it alone carries gradient. Starts as if it were not there.

    lora_targets: names of layers, separated by commas; all-linear: every linear layer.
    Raises ConfigError if a name is no layer's, or of a kind that LoRA does not cover.
    """
    from peft import LoraConfig

    targets = settings.lora_targets
    names = [name.strip() for name in targets.split(",")]
    for name in names if targets != "all-linear" else []:
        if not any(f".{layer}".endswith(f".{name}") for layer, _ in model.named_modules() if layer):
            raise ConfigError(f"model.lora_targets={targets}: no layer is named {name!r}; correct it or use all-linear")
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=targets if targets == "all-linear" else names,
    )
    model.requires_grad_(False)
    try:
        model.add_adapter(config)
    except ValueError as error:
        raise ConfigError(f"model.lora_targets={targets}: {error}") from error


def restore(model: ModelMixin, folder: Path) -> None:
    """The adapter's weights as `save_lora_adapter` wrote them. Raises ConfigError if they are another adapter's."""
    from peft import set_peft_model_state_dict

    try:
        found = set_peft_model_state_dict(model, load_file(folder / FILE))
    except RuntimeError as error:
        raise ConfigError(f"{folder} holds an adapter of another shape; check model.lora_rank ({error})") from error
    missing = [name for name in found.missing_keys if "lora_" in name]
    if found.unexpected_keys or missing:
        name = (found.unexpected_keys or missing)[0]
        raise ConfigError(
            f"{folder} holds another adapter than this net's ({name} does not fit); check model.lora_targets"
        )
