"""TinyFlow: a small from-scratch velocity net over 2-D maps (B, C, H, W) that are edited, cleaned or sharpened: the offline
default's policy for flows.

Every condition brings a map of the same shape as x: the source image, or the low-resolution image enlarged. Most of a
target equals its map, so the net is preconditioned around it, as Karras et al. 2022 (arXiv 2206.00364) do around zero;
derived: with target = map + d, d of standard deviation `spread`, and x1 = start + s n, the best linear guess of
v = x1 - x0 from x is known for every sigma; the U-Net predicts what the guess leaves over, in units of its standard
deviation.

With text the map is first edited by `Carry`: some of it is cut out, moved, and laid down elsewhere. What a large pretrained
editor brings along is built in here: a convolution alone needs hours on two cores to learn to copy over a distance.

The text is words and numbers hashed into buckets (crc32; no tokenizer file), read in their order by a transformer. It
and sigma scale and shift the features of each block, and the coarsest level attends to the words. The coarsest level sees
the whole map; two channels of coordinates tell positions apart.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from core.config import Model
from core.policy import adapter
from core.policy.kernel import STANDARD, Centred, Prior


class TinyFlow(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A velocity net over maps of `channels` channels; each condition holds "image" and, with `text`, "text".

    text: the condition has an instruction.
    scale: x is `scale` times higher and wider than the image of the condition (super-resolution; bicubic).
    centre_scale: 0: the path starts at N(0, I); else at N(map, centre_scale^2 I) (restoration, also in one step).
    spread: standard deviation of target - map, per value in [-1, 1]. doubt: with text, of target - edited map.
    width: channels of the finest level; each coarser level has twice as many, up to four times.
    levels: how often the map is halved, after a first 2x2 patch; height and width must divide by 2^(levels + 1).
    words: how many words of the text are read. buckets: hash buckets; a collision makes two words one.
    """

    @register_to_config
    def __init__(
        self,
        channels: int = 3,
        text: bool = True,
        scale: int = 1,
        centre_scale: float = 0.0,
        spread: float = 0.3,
        doubt: float = 0.15,
        width: int = 32,
        levels: int = 2,
        words: int = 24,
        buckets: int = 1024,
    ):
        super().__init__()
        widths = [width * min(2**level, 4) for level in range(levels + 1)]
        self.embedding = 2 * widths[-1]
        self.time = nn.Sequential(nn.Linear(32, self.embedding), nn.SiLU(), nn.Linear(self.embedding, self.embedding))
        self.reader = Reader(words, buckets, widths[-1], self.embedding) if text else None
        self.enter = nn.Conv2d(4 * 2 * channels + 2, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for fine, coarse in pairwise(widths):
            self.down.append(
                nn.ModuleList([Block(fine, fine, self.embedding), nn.Conv2d(fine, coarse, 3, stride=2, padding=1)])
            )
            self.up.insert(0, nn.ModuleList([nn.Conv2d(coarse, fine, 1), Block(2 * fine, fine, self.embedding)]))
        self.middle = nn.ModuleList([Block(widths[-1], widths[-1], self.embedding) for _ in range(2)])
        self.look = Attention(widths[-1])
        self.read = Attention(widths[-1]) if text else None
        self.carry = Carry(self.embedding + 2 * widths[-1], self.embedding) if text else None
        painted = channels * (2 if text else 1) + (
            1 if text else 0
        )  # what is left over; and with text a cut and its fill
        self.leave = nn.Sequential(_norm(width), nn.SiLU(), nn.Conv2d(width, 4 * painted, 3, padding=1))
        nn.init.zeros_(self.leave[-1].weight)
        nn.init.zeros_(self.leave[-1].bias)

    def forward(self, x: Tensor, sigma: Tensor, image: Tensor, words: Tensor | None = None) -> Tensor:
        """The velocity. x, image (B, C, H, W); sigma (B,) in [0, 1]; words (B, L) buckets, 0 = none. Returns (B, C, H, W)."""
        scale, start = (self.config.centre_scale, image) if self.config.centre_scale else (1.0, 0.0)
        sigma = sigma.to(x).view(-1, 1, 1, 1)
        away = x - (1 - sigma) * image - sigma * start
        power = (1 - sigma) ** 2 * self.config.spread**2 + (sigma * scale) ** 2
        painted, plan = self._unet(away * power.rsqrt(), sigma.flatten(), image, words)
        known, variance, channels = image, self.config.spread**2, self.config.channels
        if self.carry is not None:
            known = self.carry(image, painted[:, -1:], painted[:, channels:-1], plan)
            variance = self.config.doubt**2
            away = x - (1 - sigma) * known - sigma * start
            power = (1 - sigma) ** 2 * variance + (sigma * scale) ** 2
        guess = (sigma * scale**2 - (1 - sigma) * variance) / power * away + start - known
        return guess + (variance * scale**2 / power).sqrt() * painted[:, :channels]

    def _unet(self, x: Tensor, sigma: Tensor, image: Tensor, words: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is painted, (B, channels, H, W), and what is known of the whole map, (B, width)."""
        angles = sigma[:, None] * torch.linspace(0, 4, 16, device=x.device, dtype=x.dtype).exp()
        mood = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        said, mask = (None, None) if self.reader is None else self.reader(words)
        if said is not None:
            mood = mood + self.reader.summary(said, mask)
        mood = functional.silu(mood)
        h = functional.pixel_unshuffle(torch.cat([x, image], dim=1), 2)
        rows, columns = (torch.linspace(-1, 1, n, device=x.device, dtype=x.dtype) for n in h.shape[2:])
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(len(h), -1, -1, -1)
        h = self.enter(torch.cat([h, grid], dim=1))
        skips = []
        for block, halve in self.down:
            skips.append(block(h, mood))
            h = halve(skips[-1])
        h = self.middle[0](h, mood)
        if said is not None:
            h = self.read(h, said, mask)
        h = self.middle[1](self.look(h), mood)
        whole = torch.cat([mood, h.mean((2, 3)), h.amax((2, 3))], dim=1)
        for reduce, block in self.up:
            h = torch.cat([functional.interpolate(reduce(h), scale_factor=2.0), skips.pop()], dim=1)
            h = block(h, mood)
        return functional.pixel_shuffle(self.leave(h), 2), whole

    # The doors of a flow net.

    @torch.no_grad()
    def encode(self, conditions: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """{"image": (N, C, H, W) in [-1, 1], already enlarged by `scale`; with text "words": (N, L) buckets}."""
        image = self._maps([condition["image"] for condition in conditions])
        if self.config.scale > 1:
            image = functional.interpolate(image, scale_factor=self.config.scale, mode="bicubic").clamp(-1, 1)
        step = 2 ** (self.config.levels + 1)
        if image.shape[2] % step or image.shape[3] % step:
            raise ValueError(
                f"images of {image.shape[2]}x{image.shape[3]} do not divide by {step}: "
                f"a net of {self.config.levels} levels needs that; crop them or use fewer levels"
            )
        if self.reader is None:
            return {"image": image}
        return {"image": image, "words": self.reader.encode([c["text"] for c in conditions]).to(self.device)}

    def unconditional(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same without the instruction; the image stays."""
        return {k: torch.zeros_like(v) if k == "words" else v for k, v in condition.items()}

    def noise_shape(self, condition: dict[str, Tensor]) -> tuple[int, ...]:
        return tuple(condition["image"].shape[1:])

    def velocity(self, x: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return self(x, sigma, **condition)

    @torch.no_grad()
    def decode(self, x0: Tensor, condition: dict[str, Tensor]) -> list[np.ndarray]:
        """(B, C, H, W) -> B images, float32 (H, W, C) in [0, 1]; what lies outside is clipped."""
        return list(((x0.float() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).contiguous().cpu().numpy())

    @torch.no_grad()
    def encode_target(self, artefacts: Sequence[np.ndarray], condition: dict[str, Tensor]) -> Tensor:
        """The inverse of `decode`. Raises ValueError if a target has not the shape of x."""
        x0 = self._maps(artefacts)
        if tuple(x0.shape[1:]) != self.noise_shape(condition):
            raise ValueError(
                f"targets are {tuple(x0.shape[1:])}, but their conditions give {self.noise_shape(condition)} "
                f"(channels, height, width; model scale {self.config.scale})"
            )
        return x0

    def prior(self, condition: dict[str, Tensor]) -> Prior:
        return Centred(condition["image"], self.config.centre_scale) if self.config.centre_scale else STANDARD

    @classmethod
    def load(cls, folder: Path, settings: Model) -> TinyFlow:
        """The net that `save` wrote, its adapter merged into the weights; with a new adapter if the settings ask for one.

        So `reference` is the net as it was loaded, whatever its adapter had learned before.
        """
        net = cls.from_pretrained(folder)
        if (folder / adapter.FILE).exists():
            net.load_lora_adapter(folder, prefix=None, weight_name=adapter.FILE, adapter_name="default")
            net.fuse_lora()
            net.unload_lora()
            net.requires_grad_(True)
        if settings.lora_rank:
            adapter.add(net, settings)
        return net

    def save(self, folder: Path) -> None:
        """All weights; with LoRA, the net without the adapter and the adapter beside it."""
        if not getattr(self, "peft_config", None):
            self.save_pretrained(folder)
            return
        bare = copy.deepcopy(self)  # a new net would draw random numbers, and saving must not change a run
        bare.unload_lora()
        bare.save_pretrained(folder)
        self.save_lora_adapter(folder)

    def restore(self, folder: Path) -> None:
        """Takes over the weights that `save` wrote; with LoRA, the adapter's."""
        if getattr(self, "peft_config", None):
            adapter.restore(self, folder)
        else:
            self.load_state_dict(load_file(folder / SAFETENSORS_WEIGHTS_NAME))

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """The adapter is off inside. Raises ValueError if there is none."""
        if not getattr(self, "peft_config", None):
            raise ValueError("the net has no adapter to turn off: all its weights are trained; keep a frozen copy")
        self.disable_adapters()
        try:
            yield
        finally:
            self.enable_adapters()

    def _maps(self, images: Sequence[np.ndarray]) -> Tensor:
        """N images (H, W, C) in [0, 1] -> (N, C, H, W) in [-1, 1]."""
        shapes = {np.shape(image) for image in images}
        if len(shapes) != 1:
            raise ValueError(f"images of one batch must have one shape, not {sorted(shapes)}; crop or resize them")
        if (shape := shapes.pop())[2:] != (self.config.channels,):
            raise ValueError(f"an image has shape {shape}; the net needs (height, width, {self.config.channels})")
        stacked = torch.from_numpy(np.stack(images).astype(np.float32, copy=False))
        return (stacked.permute(0, 3, 1, 2).contiguous() * 2 - 1).to(self.device, self.dtype)


class Reader(nn.Module):
    """Words -> one feature each, aware of its place and of the others; a zero word is read as "nothing said"."""

    def __init__(self, words: int, buckets: int, width: int, embedding: int):
        super().__init__()
        self.words, self.buckets = words, buckets
        self.word = nn.Embedding(buckets + 1, width)
        self.place = nn.Parameter(torch.randn(words, width) * 0.5)
        self.mix = Attention(width)
        self.think = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )
        self.out = nn.Linear(2 * width, embedding)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """(N, words) buckets 1..buckets, 0 = no word; words past the limit are dropped."""
        rows = torch.zeros(len(texts), self.words, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            for place, word in enumerate(re.findall(r"[^\W\d]+|\d+(?:\.\d+)?", text.lower())[: self.words]):
                row[place] = zlib.crc32(word.encode()) % self.buckets + 1
        return rows

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) -> features (B, L, width) and the mask (B, L) of words that are there; the first place always is."""
        mask = words > 0
        mask[:, 0] = True
        h = self.word(words) + self.place
        h = self.mix(h.mT[..., None], None, mask)[..., 0].mT
        return h + self.think(h), mask

    def summary(self, said: Tensor, mask: Tensor) -> Tensor:
        """(B, embedding) of all words."""
        kept = said * mask[..., None]
        mean = kept.sum(1) / mask.sum(1, keepdim=True)
        return self.out(torch.cat([mean, said.masked_fill(~mask[..., None], -1e4).amax(1)], dim=1))


class Block(nn.Module):
    """Two convolutions around a residual; the embedding scales and shifts between them."""

    def __init__(self, width: int, out: int, embedding: int):
        super().__init__()
        self.first = nn.Sequential(_norm(width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1))
        self.norm = _norm(out)
        self.film = nn.Linear(embedding, 2 * out)
        self.second = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor, mood: Tensor) -> Tensor:
        scale, shift = self.film(mood)[..., None, None].chunk(2, dim=1)
        h = self.norm(self.first(x)) * (1 + scale) + shift
        return self.skip(x) + self.second(functional.silu(h))


class Carry(nn.Module):
    """Cuts a part out of a map, turns or scales it, shifts it, and lays it down; the hole is filled.

    The shift is a row and a column kernel predicted for each map (dynamic filters, arXiv 1605.09673; separable and
    softmax-normalised, as in arXiv 1605.07157), the turn a mixture of learned 2x2 matrices about the part's centre (as a
    spatial transformer, arXiv 1506.02025, samples): linear in the weights, so that every shift and turn has a gradient.
    """

    TURNS = ((1.0, 0), (0.6, 0), (0.8, 0), (1.25, 0), (1.6, 0), (1.0, -90), (1.0, -45), (1.0, 45), (1.0, 90))
    SHARPNESS = 4.0  # of the softmaxes: plans become decided within hundreds of steps

    def __init__(self, known: int, width: int, reach: int = 8):
        """known: features of the whole map that decide. reach: the longest shift, in pixels."""
        super().__init__()
        self.reach = reach
        turns = [(size, math.radians(angle)) for size, angle in self.TURNS]
        self.turns = nn.Parameter(
            torch.tensor([[[s * math.cos(a), -s * math.sin(a)], [s * math.sin(a), s * math.cos(a)]] for s, a in turns])
        )
        self.sizes = [2 * reach + 1, 2 * reach + 1, len(turns)]
        self.plan = nn.Sequential(nn.Linear(known, width), nn.SiLU(), nn.Linear(width, sum(self.sizes)))
        nn.init.normal_(self.plan[-1].weight, std=0.01)
        nn.init.zeros_(self.plan[-1].bias)

    def forward(self, image: Tensor, cut: Tensor, fill: Tensor, known: Tensor) -> Tensor:
        """image, fill (B, C, H, W); cut (B, 1, H, W) logits, about a fifth where 0; known (B, width). Returns the edited map."""
        cut = (2 * cut - 1.5).sigmoid()
        plan = (self.SHARPNESS * self.plan(known)).split(self.sizes, dim=1)
        along, down, turn = (part.softmax(dim=1) for part in plan)
        part = self._turned(torch.cat([cut * image, cut], dim=1), cut, turn)
        part = self._shift(self._shift(part, along, 3), down, 2)
        over = part[:, -1:].clamp(0, 1)
        return (1 - over) * ((1 - cut) * image + cut * fill) + part[:, :-1]

    def _turned(self, part: Tensor, cut: Tensor, weights: Tensor) -> Tensor:
        """The mixture of all turns of the part about the cut's centre; the first one is none."""
        rows, columns = (torch.linspace(-1, 1, n, device=part.device, dtype=part.dtype) for n in part.shape[2:])
        unit = torch.tensor([1, (len(rows) - 1) / (len(columns) - 1)]).to(part)  # else turns stretch in oblong maps
        places = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1) * unit  # (H, W, 2), x before y
        mass = cut.sum((1, 2, 3)) + 1e-4
        centre = torch.einsum("bhw,hwi->bi", cut[:, 0], places) / mass[:, None]
        back = torch.linalg.inv(self.turns[1:].float()).to(part)
        grid = torch.einsum("kij,bhwj->kbhwi", back, places - centre[:, None, None]) + centre[:, None, None]
        many = part.repeat(len(back), 1, 1, 1)
        moved = functional.grid_sample(many, (grid / unit).flatten(0, 1), align_corners=True)
        moved = moved.unflatten(0, (len(back), -1))
        return weights[:, 0, None, None, None] * part + torch.einsum("bk,kbchw->bchw", weights[:, 1:], moved)

    def _shift(self, part: Tensor, weights: Tensor, axis: int) -> Tensor:
        """Each map moved by the mixture of -reach ... reach pixels along an axis; what leaves the map is gone."""
        rows, channels = part.shape[:2]
        kernel = weights.flip(1).repeat_interleave(channels, dim=0)
        kernel = kernel[:, None, None, :] if axis == 3 else kernel[:, None, :, None]
        padding = (0, self.reach) if axis == 3 else (self.reach, 0)
        moved = functional.conv2d(part.flatten(0, 1)[None], kernel, padding=padding, groups=rows * channels)
        return moved[0].unflatten(0, (rows, channels))


class Attention(nn.Module):
    """Residual attention of the places of a map (B, C, H, W) to themselves, or to words (B, L, C)."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.keys = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, words: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        h = self.norm(x.flatten(2).mT)
        query, (key, value) = self.query(h), self.keys(h if words is None else words).chunk(2, dim=2)
        query, key, value = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        mask = None if mask is None else mask[:, None, None]
        h = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return x + self.out(h.transpose(1, 2).flatten(2)).mT.unflatten(2, x.shape[2:])


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(width, 8), width)
