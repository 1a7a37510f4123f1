import os

import numpy as np
import pytest
from PIL import Image

from rewards.image import files
from rewards.image.files import as_image, read_image, read_mask
from rewards.score import BrokenRow, Score

PIXELS = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)


@pytest.fixture(autouse=True)
def empty_cache():
    files._cache.clear()


def test_a_file_is_read_as_floats_of_rows_columns_and_channels(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image, PIXELS.astype(np.float32) / 255)
    with pytest.raises(ValueError):
        image[0] = 0


def test_a_file_is_decoded_once_until_it_changes(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(path)
    first = read_image(path)
    assert read_image(str(path)) is first
    Image.fromarray(255 - PIXELS).save(path)
    os.utime(path, ns=(0, 0))
    np.testing.assert_array_equal(read_image(path), (255 - PIXELS).astype(np.float32) / 255)


def test_the_cache_forgets_the_oldest_use_first_and_keeps_within_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CACHE_BYTES", 2 * PIXELS.size * 4)
    images = {}
    for name in ("a", "b", "a", "c"):
        Image.fromarray(PIXELS).save(tmp_path / "new.png")
        if not (tmp_path / name).exists():
            (tmp_path / "new.png").rename(tmp_path / name)
        images[name] = read_image(tmp_path / name)
    assert len(files._cache) == 2
    assert read_image(tmp_path / "a") is images["a"]
    assert read_image(tmp_path / "b") is not images["b"]


def test_files_that_are_no_images_are_broken_rows(tmp_path, monkeypatch):
    Image.fromarray(PIXELS).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:-30])
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(np.ones((4, 4), dtype=np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(PIXELS).save(tmp_path / "moving.gif")
    said = {"cut.png": "cannot be read", "text.png": "none of PNG", "deep.png": "8 bits", "moving.gif": "none of PNG"}
    for name, message in (said | {"gone.png": "cannot be opened"}).items():
        with pytest.raises(BrokenRow, match=message):
            read_image(tmp_path / name)
    monkeypatch.setattr(files, "MAX_PIXELS", 19)
    with pytest.raises(BrokenRow, match="4 x 5 pixels; at most 19"):
        read_image(tmp_path / "whole.png")


def test_a_mask_is_what_is_brighter_than_half_and_as_large_as_its_image(tmp_path):
    Image.fromarray(np.array([[0, 127], [128, 255]], dtype=np.uint8)).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", (2, 2)), [[False, False], [True, True]])
    with pytest.raises(BrokenRow, match="2 x 2 pixels, its image 3 x 2"):
        read_mask(tmp_path / "mask.png", (2, 3))


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("a picture", "not_an_image"),
        (None, "not_an_image"),
        ([[0.0]], "not_an_image"),
        (np.zeros((2, 3, 3), dtype=np.uint8), "wrong_dtype"),
        (np.zeros((2, 3, 3), dtype=object), "wrong_dtype"),
        (np.zeros((2, 3, 3), dtype=complex), "wrong_dtype"),
        (np.zeros((3, 2, 3)), "wrong_shape"),
        (np.zeros((0, 0, 3)), "wrong_shape"),
        (np.full((2, 3, 3), np.nan), "not_finite"),
        (np.array([np.inf] + [0.0] * 17).reshape(2, 3, 3), "not_finite"),
        (np.array([np.inf, -np.inf] + [0.0] * 16).reshape(2, 3, 3), "not_finite"),
        (np.full((2, 3, 3), 255.0), "out_of_range"),
        (np.full((2, 3, 3), -0.02), "out_of_range"),
    ],
)
def test_what_is_no_image_scores_zero_with_a_reason(completion, reason):
    score = as_image(completion, (2, 3, 3))
    assert isinstance(score, Score)
    assert (score.value, score.reason) == (0.0, reason)


def test_an_image_is_clipped_and_made_float32():
    image = as_image(np.array([[[-0.005, 0.5, 1.005]]]), (1, 1, 3))
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image, np.float32([[[0, 0.5, 1]]]))
