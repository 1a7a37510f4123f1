"""PipelineNet: a diffusers pipeline as a flow net; its transformer is trained, its text encoders and VAE are frozen.

Every family here predicts v = x1 - x0 at x = (1 - sigma) x0 + sigma x1, x1 ~ N(0, I), with neither sign nor scale changed: a
pipeline's own Euler step is x + (sigma' - sigma) v. x is what the pipeline calls its latents, and an x0 of the VAE has
about mean 0 and deviation 1 (read in diffusers 0.42; the tests follow each pipeline's own call to 1e-4).

| pipeline                          | x             | timestep   | condition beside the text     | its own guidance              |
|-----------------------------------|---------------|------------|-------------------------------|-------------------------------|
| FluxPipeline, FluxKontextPipeline | tokens (L, C) | sigma      | Kontext: source, as tokens    | distilled (an input) or plain |
| QwenImagePipeline, -EditPipeline  | tokens (L, C) | sigma      | Edit: tokens; the text sees it| plain, at each token's norm   |
| StableDiffusion3Pipeline          | (C, h, w)     | 1000 sigma |                               | plain                         |
| WanPipeline (2.1; 2.2 TI2V, 5 B)  | (C, F, h, w)  | 1000 sigma |                               | plain                         |
| LTXPipeline                       | tokens (L, C) | 1000 sigma |                               | plain                         |

The plain guidance is free + scale * (v - free) and belongs to the policy (core/policy/flow.py), as does the schedule: a
pipeline's shift and its scheduler are not read.

Not covered: Wan 2.2 of 14 B (two transformers), image to video, several source images, sources of another size than the
output (pipelines enlarge them to a million pixels; here a source keeps its size), reference images through IP-Adapter.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoModel, DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from core.config import ConfigError, Model
from core.policy.kernel import STANDARD, Prior

Condition = dict[str, Tensor]
NOTE = "flow_net.json"  # beside saved weights: the pipeline that they belong to, and the shape of the adapter
ADAPTER = "policy"  # the one that is trained
TEXT, MASK, POOLED = "encoder_hidden_states", "encoder_attention_mask", "pooled_projections"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


class Family:
    """What one kind of pipeline does in its own way. Sizes are (frames, height, width): in pixels, or of the VAE's latents."""

    edits = False  # the condition has a source image
    video = False
    deep = False  # the VAE has an axis of frames, for images too
    clock = 1000.0  # timestep = clock * sigma
    patch = 2  # latents along a side that the transformer takes together
    blank = ""  # the text of no instruction
    texts: tuple[str | None, ...] = (
        TEXT,
        None,
    )  # what the transformer calls the parts of encode_prompt; None: not used

    def __init__(self, pipeline: DiffusionPipeline):
        self.pipeline = pipeline

    def __deepcopy__(self, memo: dict) -> Family:
        return self  # a frozen copy of a net needs no second VAE and text encoder

    @property
    def strides(self) -> tuple[int, int]:
        """Frames and pixels of one step along a side of the latents."""
        return 1, self.pipeline.vae_scale_factor

    @property
    def moments(self) -> tuple[Sequence[float] | Tensor, Sequence[float] | Tensor]:
        """Mean and deviation of the VAE's latents: one for all channels, or one each."""
        config = self.pipeline.vae.config
        if self.deep:
            return config.latents_mean, config.latents_std
        return [config.shift_factor or 0.0], [1 / config.scaling_factor]

    def pack(self, latents: Tensor) -> Tensor:
        """Latents (N, C, [F,] h, w) as x."""
        return latents

    def unpack(self, x: Tensor, size: tuple[int, int, int]) -> Tensor:
        """x of an output of `size` as latents."""
        return x

    def inputs(self, x: Tensor, time: Tensor, given: Condition, grid: tuple[int, int, int]) -> dict[str, Any]:
        """What the transformer takes beside x, time and text. time: its timestep, (B,); grid: the size of the latents."""
        return {}

    # -- the same for all -----------------------------------------------------------------------------------------------

    def default(self, name: str) -> Any:
        return inspect.signature(self.pipeline.__call__).parameters[name].default

    def text(self, prompts: list[str], images: list[np.ndarray] | None, device: torch.device) -> Condition:
        """What the transformer reads of the prompts; the first dimension is theirs."""
        options = {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False, "device": device}
        options["max_sequence_length"] = self.default("max_sequence_length")  # encode_prompt's default may be another
        if images:
            options["image"] = self.pipeline.image_processor.numpy_to_pil(np.stack(images))
        takes = inspect.signature(self.pipeline.encode_prompt).parameters
        parts = self.pipeline.encode_prompt(prompts, **{name: v for name, v in options.items() if name in takes})
        return {name: part for name, part in zip(self.texts, parts, strict=True) if name}

    def velocity(self, net: nn.Module, x: Tensor, time: Tensor, given: Condition, grid: tuple[int, int, int]) -> Tensor:
        """v of x, (B, ...)."""
        tokens = torch.cat([x, given["source"]], dim=1) if self.edits else x
        texts = {name: tensor for name, tensor in given.items() if f"free_{name}" in given}
        inputs = {"timestep": time, **texts, **self.inputs(x, time, given, grid)}
        return net(hidden_states=tokens, **inputs, return_dict=False)[0][:, : x.shape[1]]

    def size(self, condition: Mapping[str, Any]) -> tuple[int, int, int]:
        """Of the output that a condition asks for. Raises ValueError if the pipeline cannot make that."""
        name = type(self.pipeline).__name__
        needed = {"text", "image"} if self.edits else {"text"}
        if not needed <= condition.keys():
            raise ValueError(f"a condition has {sorted(condition)}, but {name} needs {sorted(needed)}")
        if self.edits:
            size = (1, *np.shape(condition["image"])[:2])
        elif "image" in condition:
            raise ValueError(f"a condition has an image, but {name} draws from text alone; use a pipeline that edits")
        else:
            side = getattr(self.pipeline, "default_sample_size", 0) * self.strides[1]
            sides = (condition.get(key) or self.default(key) or side for key in ("height", "width"))
            size = (condition.get("frames") or self.default("num_frames") if self.video else 1, *sides)
        frame, unit = self.strides[0], self.strides[1] * self.patch
        if any(side % unit for side in size[1:]) or (size[0] - 1) % frame:
            raise ValueError(
                f"an output of {'x'.join(map(str, size[not self.video :]))} does not fit {name}: height and width must "
                f"divide by {unit}{f', and frames - 1 by {frame}' if self.video else ''}; resize or crop the data"
            )
        return size

    def grid(self, size: Sequence[int]) -> tuple[int, int, int]:
        """The size of the latents."""
        frame, pixel = self.strides
        return (size[0] - 1) // frame + 1, size[1] // pixel, size[2] // pixel

    def shape(self, size: Sequence[int]) -> tuple[int, ...]:
        """Of one x."""
        config = self.pipeline.vae.config
        channels = config.get("latent_channels") or config.z_dim
        return tuple(self.pack(torch.empty(1, channels, *self.grid(size)[not self.deep :], device="meta")).shape[1:])

    def to_x(self, outputs: Sequence[np.ndarray]) -> Tensor:
        """Images (H, W, 3) or videos (F, H, W, 3) in [0, 1] -> (N, ...)."""
        vae = self.pipeline.vae
        pixels = torch.from_numpy(np.stack(outputs)).movedim(-1, 1).to(vae.device, vae.dtype) * 2 - 1
        flat = self.deep and not self.video
        pixels = pixels.unsqueeze(2) if flat else pixels
        latents = torch.cat([vae.encode(one).latent_dist.mode() for one in pixels.split(1)])  # for memory
        mean, deviation = self._moments(latents)
        return self.pack((latents - mean) / deviation)

    def to_outputs(self, x: Tensor, size: tuple[int, int, int]) -> list[np.ndarray]:
        """(N, ...) -> images or videos; what lies outside [0, 1] is clipped."""
        vae = self.pipeline.vae
        latents = self.unpack(x, size).to(vae.device, vae.dtype)
        mean, deviation = self._moments(latents)
        # A VAE that can end the denoising itself is told that nothing is left to do, as its pipeline does.
        rest = (latents.new_zeros(1),) if vae.config.get("timestep_conditioning") else ()
        # One at a time for memory. enable_slicing() would do the same, but fails with `rest` (diffusers 0.42).
        pixels = torch.cat([vae.decode(one, *rest).sample for one in (latents * deviation + mean).split(1)])
        pixels = pixels[:, :, 0] if self.deep and not self.video else pixels
        return list((pixels.float() / 2 + 0.5).clamp(0, 1).movedim(1, -1).contiguous().cpu().numpy())

    def _moments(self, latents: Tensor) -> Iterator[Tensor]:
        axes = [1] * (latents.dim() - 2)
        return (torch.as_tensor(moment).to(latents).view(1, -1, *axes) for moment in self.moments)


class Flux(Family):
    clock = 1.0
    texts = (TEXT, POOLED, None)

    def pack(self, latents):
        return self.pipeline._pack_latents(latents, *latents.shape)

    def unpack(self, x, size):
        return self.pipeline._unpack_latents(x, *size[1:], self.pipeline.vae_scale_factor)

    def inputs(self, x, time, given, grid):
        places = self.pipeline._prepare_latent_image_ids(1, grid[1] // 2, grid[2] // 2, x.device, x.dtype)
        if self.edits:
            of_source = places.clone()
            of_source[:, 0] = 1
            places = torch.cat([places, of_source])
        distilled = self.pipeline.transformer.config.guidance_embeds
        return {
            "txt_ids": x.new_zeros(given[TEXT].shape[1], 3),
            "img_ids": places,
            "guidance": time.new_full(time.shape, self.default("guidance_scale")) if distilled else None,
        }


class Kontext(Flux):
    edits = True


class Qwen(Family):
    deep = True
    clock = 1.0
    blank = " "  # what its authors use
    texts = (TEXT, f"{TEXT}_mask")

    def text(self, prompts, images, device):
        texts = super().text(prompts, images, device)
        mask = texts[f"{TEXT}_mask"]
        return texts | {f"{TEXT}_mask": torch.ones_like(texts[TEXT][..., 0]) if mask is None else mask}

    def pack(self, latents):
        return self.pipeline._pack_latents(latents, *latents.shape[:2], *latents.shape[3:])

    unpack = Flux.unpack

    def inputs(self, x, time, given, grid):
        shapes = [(1, grid[1] // 2, grid[2] // 2)] * (1 + self.edits)
        mask = given[f"{TEXT}_mask"].bool()
        return {"img_shapes": [shapes] * len(x), f"{TEXT}_mask": None if mask.all() else mask}


class QwenEdit(Qwen):
    edits = True


class SD3(Family):
    texts = (TEXT, None, POOLED, None)


class Wan(Family):
    """2.2 of 5 B is given a time for each token by its pipeline; they are all the same, and one time means that too."""

    video = deep = True

    @property
    def strides(self):
        return self.pipeline.vae_scale_factor_temporal, self.pipeline.vae_scale_factor_spatial


class LTX(Family):
    video = deep = True
    patch = 1
    texts = (TEXT, MASK, None, None)

    @property
    def strides(self):
        return self.pipeline.vae_temporal_compression_ratio, self.pipeline.vae_spatial_compression_ratio

    @property
    def moments(self):
        vae = self.pipeline.vae
        return vae.latents_mean, vae.latents_std / vae.config.scaling_factor

    def pack(self, latents):
        return self.pipeline._pack_latents(latents)

    def unpack(self, x, size):
        return self.pipeline._unpack_latents(x, *self.grid(size))

    def inputs(self, x, time, given, grid):
        frame, pixel = self.strides
        sizes = dict(zip(("num_frames", "height", "width"), grid, strict=True))
        return {**sizes, "rope_interpolation_scale": (frame / self.default("frame_rate"), pixel, pixel)}


FAMILIES: dict[str, type[Family]] = {
    "FluxPipeline": Flux,
    "FluxKontextPipeline": Kontext,
    "QwenImagePipeline": Qwen,
    "QwenImageEditPipeline": QwenEdit,
    "StableDiffusion3Pipeline": SD3,
    "WanPipeline": Wan,
    "LTXPipeline": LTX,
}


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
            targets = {"attention": ATTENTION, "all-linear": "all-linear"}.get(settings.lora_targets)
            lora = {
                "r": settings.lora_rank,
                "lora_alpha": settings.lora_alpha,
                "target_modules": targets or [name.strip() for name in settings.lora_targets.split(",")],
            }
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
        """Takes the weights that `save` wrote there. Raises ValueError if they are of another shape."""
        if self.lora:
            _fill(self.transformer, ADAPTER, folder)
        else:
            self.transformer.load_state_dict(_transformer(folder, self.dtype).state_dict())

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype


def _size(condition: Condition) -> tuple[int, int, int]:
    return tuple(condition["size"][0].tolist())


def _add_adapter(transformer: nn.Module, name: str, lora: Mapping[str, Any]) -> None:
    """Beside the adapters there are. Float32: an update of 1e-4 of a weight is lost in bfloat16."""
    transformer.add_adapter(LoraConfig(init_lora_weights="gaussian", **lora), name)
    transformer.set_adapter(list(transformer.peft_config))
    for key, weight in transformer.named_parameters():
        if f".{name}." in key:
            weight.data = weight.data.float()


def _fill(transformer: nn.Module, name: str, folder: Path | str) -> None:
    found = set_peft_model_state_dict(transformer, load_file(Path(folder) / LORA_WEIGHT_NAME_SAFE), name)
    missing = [key for key in found.missing_keys if f".{name}." in key]
    if missing or found.unexpected_keys:
        raise ValueError(
            f"{folder} holds an adapter of other layers: {len(missing)} of the net's are not in it and "
            f"{len(found.unexpected_keys)} of its own have no place; set model.lora_targets as it was"
        )


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
        _fill(pipeline.transformer, name, path)
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
