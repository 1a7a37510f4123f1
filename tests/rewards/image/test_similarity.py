import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rewards.image import hacks
from rewards.image.files import read_image
from rewards.image.location import rectangle
from rewards.image.similarity import (
    PSNR_CAP,
    decibels,
    edit_locality,
    luma,
    psnr,
    psnr_y,
    ssim,
    structural_similarity,
    target_iou,
)
from rewards.score import BrokenRow


def test_psnr_in_closed_form(make, score):
    row, target = make("translate", dx=14)
    dark = target * np.float32(1)
    dark[:, :24] -= np.float32(0.1)
    dark = np.clip(dark, 0, 1)
    assert decibels(np.zeros((4, 4)), np.full((4, 4), 0.1)) == pytest.approx(20.0)
    assert decibels(np.zeros((4, 4)), np.ones((4, 4))) == 0.0
    expected = -10 * math.log10(np.mean((dark - target) ** 2))
    assert score(psnr, [target, dark], row)[0].value == PSNR_CAP
    assert score(psnr, [dark], row)[0].value == pytest.approx(expected, rel=1e-5)


def test_psnr_has_a_cap():
    assert decibels(np.zeros(4), np.full(4, 1e-4)) == PSNR_CAP
    assert decibels(np.zeros(4), np.full(4, 2e-3)) < PSNR_CAP


def test_luma_is_that_of_studio_range():
    corners = np.float32([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 0, 1]])
    np.testing.assert_allclose(luma(corners) * 255, [16, 235, 81.481, 40.966], rtol=1e-5)


def test_a_change_of_all_channels_loses_less_in_luma(make, score):
    row, target = make("translate", dx=14)
    off = target + np.float32(0.05)
    difference = score(psnr_y, [off], row)[0].value - score(psnr, [off], row)[0].value
    assert difference == pytest.approx(20 * math.log10(255 / 219), abs=1e-3)


def slow_ssim(x, y):
    """Window by window, as written in the paper."""
    g = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    w = np.outer(g, g) / np.outer(g, g).sum()
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            ma, mb = (w * a).sum(), (w * b).sum()
            va, vb, c = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
            structure = (2 * c + 0.0009) / (va + vb + 0.0009)
            values.append((2 * ma * mb + 0.0001) / (ma**2 + mb**2 + 0.0001) * structure)
    return np.mean(values)


def test_ssim_is_that_of_an_independent_slow_version():
    rng = np.random.default_rng(0)
    x = rng.random((17, 14))
    for y in (x, 0.7 * x + 0.1, 1 - x, rng.random((17, 14)), np.zeros((17, 14))):
        assert structural_similarity(x, y) == pytest.approx(slow_ssim(x, y), abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_ssim_is_symmetric_and_one_for_equals(seed):
    x, y = np.random.default_rng(seed).random((2, 12, 13))
    assert structural_similarity(x, x) == pytest.approx(1.0)
    assert structural_similarity(x, y) == pytest.approx(structural_similarity(y, x))


def test_ssim_as_a_metric(make, score, tmp_path):
    row, target = make("translate", dx=14)
    noise = np.random.default_rng(0).random(target.shape)
    values = [judged.value for judged in score(ssim, [target, noise, "text"], row)]
    assert values[0] == 1.0
    assert 0 <= values[1] < 0.1
    assert values[2] == 0.0
    Image.fromarray(np.zeros((10, 30, 3), dtype=np.uint8)).save(tmp_path / "thin.png")
    with pytest.raises(BrokenRow, match="at least 11 x 11 pixels, got 30 x 10"):
        score(ssim, [np.zeros((10, 30, 3))], row | {"target": str(tmp_path / "thin.png")})


def test_target_iou_by_hand(make, score, scene):
    row, target = make("translate", dx=14)
    shifted = scene.draw(scene.L, (24, 20))  # 2 pixels on: 3 of 3 columns to 1, and 6 of 6 to 4 in the last 3 rows
    area = scene.L.sum()
    common = 6 * 1 + 3 * 4
    exact, two, source, nothing = score(
        target_iou, [target, shifted, read_image(row["source"]), hacks.cut_and_paste(row, paste=False)], row
    )
    assert exact.value == 1.0
    assert two.value == pytest.approx(common / (2 * area - common))
    assert source.value == 0.0
    assert (nothing.value, nothing.reason) == (0.0, "object_not_found")


def test_target_iou_with_a_mask_reads_no_target(make, score, scene, tmp_path):
    row, target = make("translate", dx=14)
    mask = rectangle((22, 20, 28, 29), (48, 48))
    Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "mask.png")
    row |= {"target": None, "target_mask": str(tmp_path / "mask.png")}
    assert score(target_iou, [target], row)[0].value == pytest.approx(scene.L.sum() / 54)


def test_metrics_do_not_apply_without_a_target(make, score):
    row, target = make("translate", dx=14)
    for metric in (psnr, psnr_y, ssim, target_iou):
        assert score(metric, [target], row | {"target": None})[0].value is None


def test_a_target_without_the_object_is_a_broken_row(make, score):
    row, target = make("translate", dx=14)
    Image.fromarray(np.zeros((48, 48, 3), dtype=np.uint8)).save(row["target"])
    with pytest.raises(BrokenRow, match="does not show the object"):
        score(target_iou, [target], row)


def test_by_a_detector_iou_is_that_of_boxes(make, score, tmp_path, monkeypatch):
    row, target = make("translate", dx=14)
    monkeypatch.setattr("rewards.image.location.detect", lambda *_: [[((22.0, 20.0, 28.0, 29.0), 0.9)]])
    corners = rectangle((22, 20, 24, 22), (48, 48)) | rectangle((26, 24, 28, 26), (48, 48))  # in a box of 6 x 6
    Image.fromarray(corners.astype(np.uint8) * 255).save(tmp_path / "mask.png")
    row |= {"target_mask": str(tmp_path / "mask.png"), "detector": "folder"}
    assert score(target_iou, [target], row)[0].value == pytest.approx(6 / 9)


def test_locality_is_the_share_of_change_inside(make, score):
    row, target = make("translate", dx=14)
    source = read_image(row["source"])
    exact, unchanged = score(edit_locality, [target, source], row)
    assert exact.value == 1.0
    assert (unchanged.value, unchanged.reason) == (0.0, "unchanged")
    marked = target.copy()
    marked[2:6, 40:44] += np.float32(0.25)
    outside, inside = 16 * 0.25, np.abs(target - source).mean(axis=2).sum()
    assert score(edit_locality, [marked], row)[0].value == pytest.approx(inside / (inside + outside), rel=1e-5)
