"""Rewards and metrics for images: edits of one object by commanded geometry, and super-resolution.

An image is float32 (H, W, 3) in [0, 1]; what a policy gives is an array, what a row names is a path. Needs numpy, pillow and
scipy (`pip install ".[flow]"`); a detector needs torch and transformers.
"""

from rewards.image.editing import background_kept, edit, object_kept, placement, single, source_cleared
from rewards.image.files import as_image, read_image, read_mask
from rewards.image.hacks import cut_and_paste, edit_canaries, super_resolution_canaries
from rewards.image.location import Found, locate
from rewards.image.similarity import PSNR_CAP, edit_locality, psnr, psnr_y, ssim, target_iou
from rewards.image.super_resolution import attribute_preference, fidelity, texture
from rewards.image.talk2move import talk2move_position, talk2move_resize, talk2move_translation

__all__ = [
    "PSNR_CAP",
    "Found",
    "as_image",
    "attribute_preference",
    "background_kept",
    "cut_and_paste",
    "edit",
    "edit_canaries",
    "edit_locality",
    "fidelity",
    "locate",
    "object_kept",
    "placement",
    "psnr",
    "psnr_y",
    "read_image",
    "read_mask",
    "single",
    "source_cleared",
    "ssim",
    "super_resolution_canaries",
    "talk2move_position",
    "talk2move_resize",
    "talk2move_translation",
    "target_iou",
    "texture",
]
