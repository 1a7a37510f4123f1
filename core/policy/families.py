"""What each kind of diffusers pipeline does in its own way, for core/policy/pipelines.py.

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
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

Condition = dict[str, Tensor]
TEXT, MASK, POOLED = "encoder_hidden_states", "encoder_attention_mask", "pooled_projections"


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
