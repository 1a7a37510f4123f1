"""PipelineNet: a diffusers pipeline as a flow net; its transformer is trained, its text encoders and VAE are frozen.

Which pipelines there are and how they differ is in core/policy/families.py. The plain guidance is free + scale * (v - free)
and belongs to the policy (core/policy/flow.py), as does the schedule: a pipeline's shift and its scheduler are not read.

Not covered: Wan 2.2 of 14 B (two transformers), image to video, several source images, sources of another size than the
output (pipelines enlarge them to a million pixels; here a source keeps its size), reference images through IP-Adapter.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoModel, DiffusionPipeline
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from core.config import ConfigError, Model
from core.policy import adapter
from core.policy.families import FAMILIES, Condition
from core.policy.kernel import STANDARD, Prior

NOTE = "flow_net.json"  # beside saved weights: the pipeline that they belong to, and the shape of the adapter
ADAPTER = "policy"  # the one that is trained
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


class PipelineNet(nn.Module):
    """The transformer of a pipeline as a flow net. Its parameters are the transformer's alone.

    pipeline: its transformer may have adapters that stay frozen. base: the path to load it from again. lora: rank ("r"),
    "lora_alpha" and "target_modules" of the adapter to train, which starts as no change; None: all weights are trained.

    A condition row has "text" and, if the pipeline edits, "image" (H, W, 3) in [0, 1], whose size the output has; if it does
    not, "height", "width" and (video) "frames", or else the pipeline's defaults. "negative" is the text of guidance's
    branch without instruction. Rows of one call must ask for outputs of one size.
    """

    def __init__(self, pipeline: DiffusionPipeline, base: str = "", lora: Mapping[str, Any] | None = None):
        super().__init__()
        self.family, self.base, self.lora = FAMILIES[type(pipeline).__name__](pipeline), base, lora
        self.transformer = pipeline.transformer
        for part in self.frozen():
            part.requires_grad_(False).eval()
        if lora:
            _add_adapter(self.transformer, ADAPTER, lora)
        elif getattr(self.transformer, "peft_config", None):
            self.transformer.fuse_lora()
            self.transformer.unload_lora()
        for name, weight in self.transformer.named_parameters():
            weight.requires_grad_(not lora or f".{ADAPTER}." in name)

    @classmethod
    def load(cls, path: str | Path, settings: Model) -> PipelineNet:
        """A pipeline's folder or hub id, or a folder that `save` wrote; on the CPU, the VAE in float32.

        settings: dtype; lora_rank (0 trains all weights), lora_alpha, lora_targets ("attention": its projections;
        "all-linear"; or names with commas between); remote_code. Weights come from safetensors only.
        On a saved folder the adapter of settings is a new one, and the saved one stays as it is beneath (lora_rank=0
        merges it into the weights), so that `reference` is always the net as it was loaded.
        Raises ConfigError for what is no such pipeline or cannot be loaded.
        """
        pipeline, lora = _assemble(str(path), settings), None
        if settings.lora_rank:
            lora = adapter.shape(pipeline.transformer, settings, {"attention": ATTENTION})
        base = str(Path(path).resolve()) if Path(path).exists() else str(path)
        try:
            return cls(pipeline, base, lora)
        except ValueError as error:
            raise ConfigError(f"model.lora_targets={settings.lora_targets}: {error}") from error

    def frozen(self) -> list[nn.Module]:
        parts = self.family.pipeline.components.values()
        return [part for part in parts if isinstance(part, nn.Module) and part is not self.family.pipeline.transformer]

    def _apply(self, fn, recurse=True):
        for part in self.frozen():  # they are no submodules, and follow to the device all the same
            part._apply(fn)
        return super()._apply(fn, recurse)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """Computes the transformer's blocks again in the backward pass: less memory, a third more time."""
        self.transformer.enable_gradient_checkpointing()

    # -- a flow net -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, conditions: Sequence[Mapping[str, Any]]) -> Condition:
        """{"size": (N, 3) frames, height, width; the text's tensors, and the same as "free_..." for no instruction; "source"}.

        Raises ValueError for rows that lack something or ask for several sizes.
        """
        sizes = [self.family.size(row) for row in conditions]
        if len(set(sizes)) != 1:
            raise ValueError(
                f"the rows of a batch ask for outputs of {sorted(set(sizes))} (frames, height, width); use one"
            )
        device, count = self.transformer.device, len(conditions)
        images = [np.asarray(row["image"], np.float32) for row in conditions] if self.family.edits else None
        prompts = [row["text"] for row in conditions] + [row.get("negative", self.family.blank) for row in conditions]
        texts = self.family.text(prompts, images and images * 2, device)  # together: then both are padded alike
        condition = {"size": torch.tensor(sizes, device=device)}
        condition |= {name: tensor[:count] for name, tensor in texts.items()}
        condition |= {f"free_{name}": tensor[count:] for name, tensor in texts.items()}
        if images:
            condition["source"] = self.family.to_x(images).to(self.dtype)
        return condition

    def unconditional(self, condition: Condition) -> Condition:
        """The same without the instruction; a source image stays."""
        return {name: condition.get(f"free_{name}", tensor) for name, tensor in condition.items()}

    def noise_shape(self, condition: Condition) -> tuple[int, ...]:
        return self.family.shape(_size(condition))

    def velocity(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The transformer runs in its own dtype, whatever x has. Returns v in the dtype of x, contiguous."""
        grid = self.family.grid(_size(condition))
        time = sigma.float() * self.family.clock
        return self.family.velocity(self.transformer, x.to(self.dtype), time, condition, grid).to(x.dtype).contiguous()

    @torch.no_grad()
    def decode(self, x0: Tensor, condition: Condition) -> list[np.ndarray]:
        """B images (H, W, 3) or videos (F, H, W, 3), float32 in [0, 1]."""
        return self.family.to_outputs(x0, _size(condition))

    @torch.no_grad()
    def encode_target(self, artefacts: Sequence[np.ndarray], condition: Condition) -> Tensor:
        """The VAE's modes for artefacts, float32. Raises ValueError if one has another size than its condition asks for."""
        size = _size(condition)
        wanted = (*size[not self.family.video :], 3)
        for artefact in artefacts:
            if np.shape(artefact) != wanted:
                raise ValueError(f"a target has shape {np.shape(artefact)}, but its condition asks for {wanted}")
        return self.family.to_x([np.asarray(artefact, np.float32) for artefact in artefacts]).float()

    def prior(self, condition: Condition) -> Prior:
        return STANDARD

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """The trained adapter is off inside. Raises ValueError if there is none."""
        if not self.lora:
            raise ValueError("the net has no adapter to turn off: all its weights are trained; keep a frozen copy")
        layers = [layer for layer in self.transformer.modules() if isinstance(layer, LoraLayer)]
        try:
            for layer in layers:  # disable_adapters() would change requires_grad, and turn off adapters beneath
                layer.set_scale(ADAPTER, 0.0)
            yield
        finally:
            for layer in layers:
                layer.set_scale(ADAPTER, 1.0)

    def save(self, folder: Path) -> None:
        """What was trained: the adapter, or the transformer; and the path of the pipeline, for `load`.

        An adapter is also read by diffusers: pipeline.transformer.load_lora_adapter(folder, prefix=None, use_safetensors=True).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.lora:
            self.transformer.save_lora_adapter(folder, adapter_name=ADAPTER)
        else:
            self.transformer.save_pretrained(folder / "transformer")
        (folder / NOTE).write_text(json.dumps({"base": self.base, "lora": self.lora}, indent=2) + "\n")

    def restore(self, folder: Path) -> None:
        """Takes the weights that `save` wrote there. Raises ConfigError if they are another adapter's."""
        if self.lora:
            adapter.restore(self.transformer, folder, ADAPTER)
        else:
            self.transformer.load_state_dict(_transformer(folder, self.dtype).state_dict())

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype


def _size(condition: Condition) -> tuple[int, int, int]:
    return tuple(condition["size"][0].tolist())


def _add_adapter(transformer: nn.Module, name: str, lora: Mapping[str, Any]) -> None:
    """Beside the adapters there are, which stay on."""
    adapter.put(transformer, lora, name)
    transformer.set_adapter(list(transformer.peft_config))


def _assemble(path: str, settings: Model) -> DiffusionPipeline:
    """The pipeline of path; of a saved folder, with its transformer, or with its adapter on top and frozen."""
    note = Path(path) / NOTE
    if not note.exists():
        return _pipeline(path, settings)
    saved = json.loads(note.read_text())
    try:
        pipeline = _assemble(saved["base"], settings)
    except ConfigError as error:
        raise ConfigError(f"{note} names what its weights belong to; correct that if it has moved. {error}") from error
    if saved["lora"]:
        name = f"start{len(getattr(pipeline.transformer, 'peft_config', {}))}"
        _add_adapter(pipeline.transformer, name, saved["lora"])
        adapter.restore(pipeline.transformer, Path(path), name)
    else:
        pipeline.transformer = _transformer(path, getattr(torch, settings.dtype))
    return pipeline


def _transformer(folder: Path | str, dtype: torch.dtype) -> nn.Module:
    return AutoModel.from_pretrained(str(folder), subfolder="transformer", dtype=dtype, use_safetensors=True)


def _pipeline(path: str, settings: Model) -> DiffusionPipeline:
    try:
        config = DiffusionPipeline.load_config(path)
        if (name := str(config.get("_class_name"))) not in FAMILIES:
            raise ConfigError(
                f"MODEL={path} is a {name}, which is none of the velocity flows that are known: {', '.join(FAMILIES)}. A "
                "pipeline that predicts noise (InstructPix2Pix, Stable Diffusion 1, 2 and XL) cannot be one"
            )
        if config.get("boundary_ratio") is not None:
            raise ConfigError(
                f"MODEL={path} has two transformers, one for each part of the path, and only one would be trained; "
                "use a WanPipeline with one (2.1, or 2.2 TI2V of 5 B)"
            )
        return DiffusionPipeline.from_pretrained(
            path,
            dtype={"default": getattr(torch, settings.dtype), "vae": torch.float32},
            use_safetensors=True,
            trust_remote_code=settings.remote_code,
        )
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"MODEL={path} cannot be loaded: it is neither a folder with model_index.json and safetensors weights, nor a "
            f"hub id that is in reach (offline, only folders and cached pipelines are). {str(error).splitlines()[0]}"
        ) from error
