"""Image editing: the policy draws the picture that an instruction asks for, and geometry decides.

    make train APP=image_editing                           move, resize or turn the object that the instruction names
    make train APP=image_editing TASK=super_resolution     a sharper picture in one step, by preferences within a group

Editing follows Talk2Move (arXiv 2601.02356): Flow-GRPO with a reward from the boxes of the named object. The released
reward pays for the direction alone; ours multiplies place, size, turn, a cleared source, a single object and a kept
background (rewards/image/editing.py). IoU with the true target is the metric and in no reward. Super-resolution follows
GDPO-SR (arXiv 2603.16769): a one-step model, rewarded for texture where a picture has some and for fidelity elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from core.app import App, Flow, Row, Rows
from core.policy.tiny_flow import TinyFlow
from data import edit_folder, super_resolution
from data.synthetic import scenes
from rewards import image as rewards
from rewards.image import read_image

SCALE = 4  # of the tiny super-resolution net, and of the offline pictures


@dataclass(frozen=True)
class EditOptions:
    """The `task:` section of editing."""

    detector: str = "palette"  # what finds the object: its colour among the scene's, or the folder of a detector
    mistakes: float = 0.4  # share of demonstrations that show another edit of the same scene


@dataclass(frozen=True)
class SuperResolutionOptions:
    """The `task:` section of TASK=super_resolution."""

    tile: int = 8  # pixels of the tiles that are judged smooth or detailed; 60 in the paper, for pictures of 512


def source(row: Row) -> np.ndarray:
    return read_image(row["source"])


def target(row: Row) -> np.ndarray:
    """What gold is: the picture after the edit, or at high resolution."""
    return read_image(row["target"])


def mistaken(rows: Rows, seed: int) -> list[np.ndarray]:
    """What a careless annotator drew: in a share of the rows the target of another instruction on the same scene."""
    return [read_image(path) for path in scenes.mistaken_targets(rows, seed, rows[0]["mistakes"])]


def unchanged(train: Rows, test: Rows) -> list[np.ndarray]:
    """The source as it is."""
    del train
    return [source(row) for row in test]


def bicubic(train: Rows, test: Rows) -> list[np.ndarray]:
    """The source, enlarged by pillow's bicubic."""
    from PIL import Image

    del train
    enlarged = []
    for row in test:
        small = Image.fromarray((source(row) * 255).round().astype(np.uint8))
        large = small.resize((small.width * row["scale"], small.height * row["scale"]), Image.Resampling.BICUBIC)
        enlarged.append(np.asarray(large, np.float32) / 255)
    return enlarged


SUPER_RESOLUTION = App(
    name="image_editing",
    acts=Flow(
        prompt=lambda row: f"{row['scale']} times as many pixels a side",
        condition=lambda row: {"image": source(row)},
        build=lambda model: TinyFlow(text=False, scale=SCALE, centre_scale=0.3, width=model.width, levels=model.layers),
    ),
    options=SuperResolutionOptions,
    load=super_resolution.load,
    write_offline=lambda folder, seed: scenes.write_super_resolution(folder, seed, scales=(SCALE,)),
    demonstrations=lambda rows, seed: [target(row) for row in rows],
    gold=target,
    rewards={"attribute_preference": (1.0, rewards.attribute_preference)},
    presets={  # its two sides logged beside it, and judged by `make check`
        "sides": {
            "attribute_preference": (1.0, rewards.attribute_preference),
            "fidelity": (0.0, rewards.fidelity),
            "texture": (0.0, rewards.texture),
        }
    },
    outcome="attribute_preference",
    metrics={"texture": rewards.texture, "psnr_y": rewards.psnr_y, "ssim": rewards.ssim},
    best={"attribute_preference": 0.5, "psnr_y": 60.0},  # a group of one has no better and no worse
    canaries=(
        *rewards.super_resolution_canaries("fidelity", 0.3),
        *rewards.super_resolution_canaries("texture", 0.9),  # noise where the true picture is speckle itself
    ),
    baselines={"bicubic": bicubic},
    cluster="scene",
    given=source,
    predict=lambda request: {"source": request["source"], "scale": SCALE},
    extras=("flow",),
)

APP = App(
    name="image_editing",
    acts=Flow(
        prompt=lambda row: row["instruction"],
        condition=lambda row: {"image": source(row), "text": row["instruction"]},
        build=lambda model: TinyFlow(text=True, width=model.width, levels=model.layers),
    ),
    options=EditOptions,
    load=edit_folder.load,
    write_offline=lambda folder, seed: scenes.write_edits(folder, seed, train_rows=2400),
    demonstrations=mistaken,
    gold=target,
    rewards={"edit": (1.0, rewards.edit)},
    presets={
        "factors": {
            name: (1.0, getattr(rewards, name))
            for name in ("edit", "placement", "source_cleared", "single", "background_kept", "object_kept")
        },
        "talk2move": {"edit": (0.0, rewards.edit), "talk2move_translation": (1.0, rewards.talk2move_translation)},
    },
    outcome="edit",
    metrics={"target_iou": rewards.target_iou, "psnr": rewards.psnr, "edit": rewards.edit},
    best={"psnr": 60.0},
    part=lambda row: row["operation"],
    canaries=tuple(rewards.edit_canaries()),
    cluster="scene",
    baselines={"source unchanged": unchanged},
    given=source,
    predict=lambda request: {"source": request["source"], "instruction": request["instruction"]},
    variants={"super_resolution": SUPER_RESOLUTION},
    extras=("flow",),
)
