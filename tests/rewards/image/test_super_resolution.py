import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from rewards.image.files import read_image
from rewards.image.super_resolution import (
    attribute_preference,
    attribute_reward,
    complexity,
    detail_map,
    fidelity,
    gradient_similarity,
    texture,
)
from rewards.score import BrokenRow


def slow_complexity(tile, size):
    """One tile by the steps of the released code, in other words: interpolate, filter, count."""
    centres = [(np.arange(64) + 0.5) * n / 64 - 0.5 for n in tile.shape]
    y, x = np.meshgrid(*centres, indexing="ij")
    big = ndimage.map_coordinates(tile, [y, x], order=1, mode="nearest")
    magnitude = np.hypot(ndimage.sobel(big, 0, mode="nearest"), ndimage.sobel(big, 1, mode="nearest"))
    share = np.histogram(magnitude, bins=512, range=(-5.5, 5.5))[0] / magnitude.size
    return -sum(p * math.log2(p) for p in share if p) * size**2


@pytest.mark.parametrize(("shape", "tile"), [((16, 16), 8), ((20, 13), 8), ((5, 7), 60), ((61, 60), 60), ((3, 3), 1)])
def test_complexity_is_that_of_each_tile_the_last_ones_too(shape, tile):
    grey = np.random.default_rng(0).random(shape)
    expected = np.empty(shape)
    for y in range(0, shape[0], tile):
        for x in range(0, shape[1], tile):
            block = np.s_[y : y + tile, x : x + tile]
            expected[block] = slow_complexity(grey[block], tile)
    np.testing.assert_allclose(complexity(grey, tile), expected, atol=1e-9)


def test_a_tile_must_have_a_size():
    with pytest.raises(ValueError, match="tile=0"):
        complexity(np.zeros((4, 4)), 0)


def test_flat_tiles_are_smooth_and_noisy_ones_complex():
    image = np.full((16, 20, 3), 0.4, dtype=np.float32)
    image[:8, 16:] = np.random.default_rng(0).random((8, 4, 3))
    expected = np.zeros((16, 20), dtype=bool)
    expected[:8, 16:] = True  # at the edge, half a tile: it counts as if it was whole
    np.testing.assert_array_equal(detail_map(image, tile=8), expected)


def test_the_released_numbers():
    reward = attribute_reward([24, 26, 25], [[0.5, 0.4, 0.6], [60, 55, 70]], detail=0.4)
    np.testing.assert_allclose(reward, [0.166666666667, 0.6, 0.7], rtol=1e-9)
    advantage = (reward - reward.mean()) / (reward.std(ddof=1) + 1e-8)
    np.testing.assert_allclose(advantage, [-1.13659957233, 0.39193088701, 0.744668685319], rtol=1e-6)


def test_equal_metrics_are_a_half():
    np.testing.assert_array_equal(attribute_reward([20, 20], [[0.1, 0.3]], 0.5), [0.25, 0.75])
    np.testing.assert_array_equal(attribute_reward([20], [[0.1]], 0.3), [0.5])


@given(st.lists(st.integers(0, 40), min_size=2, max_size=6), st.floats(0, 1), st.floats(0.5, 3))
def test_the_preference_does_not_see_shift_or_scale_of_a_metric(values, detail, scale):
    other = [scale * value - 7 for value in values]
    np.testing.assert_allclose(
        attribute_reward(values, [values], detail), attribute_reward(other, [other], detail), atol=1e-9
    )


def test_gradient_similarity_by_hand():
    step = np.zeros((5, 6))
    step[:, 3:] = 0.5  # Prewitt magnitude 0.5 beside the step: mean of three rows of a difference over two pixels
    c = 170 / 255**2
    expected = np.ones((5, 6))
    expected[:, 2:4] = c / (0.25 + c)
    np.testing.assert_allclose(gradient_similarity(np.zeros((5, 6)), step), expected)
    np.testing.assert_allclose(gradient_similarity(step, step), 1.0)
    expected[:, 2:4] = (2 * 0.25 * 0.5 + c) / (0.0625 + 0.25 + c)
    np.testing.assert_allclose(gradient_similarity(step / 2, step), expected)


@pytest.fixture
def picture(tmp_path):
    """A row whose upper half is smooth and whose lower half is detailed, and the picture."""
    pixels = np.full((32, 32, 3), 120, dtype=np.uint8)
    pixels[16:] = np.random.default_rng(1).integers(30, 220, (16, 32, 1))
    Image.fromarray(pixels).save(tmp_path / "high.png")
    return {"id": "a", "target": str(tmp_path / "high.png"), "tile": 8}, read_image(tmp_path / "high.png")


def test_the_exact_picture_has_both_and_a_flat_one_has_no_texture(picture, score):
    row, high = picture
    assert [score(reward, [high], row)[0].value for reward in (fidelity, texture)] == [1.0, 1.0]
    flat = np.full_like(high, 0.4)
    assert score(texture, [flat], row)[0].value == 0.0
    assert 0 < score(fidelity, [flat], row)[0].value < 0.4


def test_texture_looks_at_complex_tiles_only(picture, score):
    row, high = picture
    image = high.copy()
    image[:12] = np.random.default_rng(0).random((12, 32, 3))
    assert score(texture, [image], row)[0].value == 1.0


def test_fidelity_is_psnr_over_its_cap(picture, score):
    row, high = picture
    off = high + np.float32(0.05)
    assert score(fidelity, [off], row)[0].value == pytest.approx(-20 * math.log10(0.05 * 219 / 255) / 60, rel=1e-5)


def test_less_blur_is_more_texture_and_more_fidelity(picture, score):
    row, high = picture
    blurred = [ndimage.gaussian_filter(high, (sigma, sigma, 0)) for sigma in (2.0, 1.0, 0.5, 0.3)]
    for reward in (fidelity, texture):
        assert (np.diff([judged.value for judged in score(reward, blurred, row)]) > 0).all()


def test_texture_does_not_apply_to_a_smooth_picture(score, tmp_path):
    Image.fromarray(np.full((16, 16, 3), 90, dtype=np.uint8)).save(tmp_path / "flat.png")
    row = {"id": "a", "target": str(tmp_path / "flat.png"), "tile": 8}
    image = np.full((16, 16, 3), 0.1, dtype=np.float32)
    assert score(texture, [image], row)[0].value is None
    assert [judged.value for judged in score(attribute_preference, [image, image * 2], row)] == [0.0, 1.0]


def test_the_preference_is_within_neighbours_of_one_row_and_leaves_bad_images_out(picture, score):
    row, high = picture
    other = row | {"id": "b"}
    noisy = np.clip(high + np.random.default_rng(0).normal(0, 0.1, high.shape), 0, 1)
    flat = np.full_like(high, 0.4)
    images, rows = [high, flat, "text", noisy, noisy, flat], [row] * 4 + [other] * 2
    judged = [entry.value for entry in score(attribute_preference, images, rows)]
    assert judged[0] == judged[4] == 1.0  # noisy is the best of its own group only
    assert 0 < judged[3] < 1
    assert judged[1] == judged[2] == judged[5] == 0.0
    assert judged[:2] + judged[3:4] == score_values(score, [high, flat, noisy], row)
    assert score_values(score, [flat], row) == [0.5]
    assert score_values(score, ["text"], row) == [0.0]


def score_values(score, images, row):
    return [entry.value for entry in score(attribute_preference, images, row)]


@pytest.mark.parametrize(("rows_of_detail", "detail"), [(0, 0.0), (8, 0.25), (16, 0.5), (32, 1.0)])
def test_the_share_of_detail_decides_between_fidelity_and_texture(score, tmp_path, rows_of_detail, detail):
    pixels = np.full((32, 32, 3), 120, dtype=np.uint8)
    pixels[32 - rows_of_detail :] = np.random.default_rng(1).integers(30, 220, (rows_of_detail, 32, 1))
    Image.fromarray(pixels).save(tmp_path / "high.png")
    high = read_image(tmp_path / "high.png")
    flat = np.broadcast_to(high.mean(axis=(0, 1)), high.shape)  # no texture
    far = np.clip(high + 0.4, 0, 1)  # its texture, but much too bright
    row = {"id": "a", "target": str(tmp_path / "high.png"), "tile": 8}
    nearer, textured = score_values(score, [flat, far], row)
    assert nearer == pytest.approx(1 - detail)
    assert textured == pytest.approx(detail)


def test_a_row_without_a_high_resolution_image_is_broken(score):
    with pytest.raises(BrokenRow, match="target is missing"):
        score(fidelity, [np.zeros((4, 4, 3))], {"id": "a", "target": None, "tile": None})
