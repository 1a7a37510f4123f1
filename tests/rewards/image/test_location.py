import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.image import location as module
from rewards.image.location import bounds, by_boxes, by_colour, locate, rectangle, shows
from rewards.score import BrokenRow

RED, BLUE, GROUND = (200, 30, 40), (40, 60, 200), (50, 50, 60)


def canvas(**patches):
    image = np.ones((20, 20, 3)) * np.array(GROUND)
    colours = {"red": RED, "blue": BLUE}
    for name, (y, x) in patches.items():
        image[y, x] = colours[name.rstrip("0123456789")]
    return (image / 255).astype(np.float32)


def test_the_object_is_found_under_any_brightness_of_its_texture():
    image = canvas(red=(slice(3, 9), slice(4, 12)), blue=(slice(12, 18), slice(2, 9)))
    image *= np.random.default_rng(0).uniform(0.5, 1.25, (20, 20, 1)).astype(np.float32)
    found = by_colour(image, RED, [GROUND, BLUE])
    assert found.box == (4, 3, 12, 9)
    assert found.mask.sum() == 48
    assert not found.rest.any()


def test_colours_that_differ_only_in_brightness_are_told_apart():
    grey, dark = (160, 160, 160), (60, 60, 60)
    image = (np.ones((4, 4, 3)) * np.array(dark) / 255).astype(np.float32)
    image[:2] = np.array(grey) / 255
    np.testing.assert_array_equal(shows(image, grey, [dark]), np.arange(4)[:, None] < np.full(4, 2))


def test_a_pixel_far_from_every_colour_is_no_object():
    white = np.ones((4, 4, 3), dtype=np.float32)
    assert not shows(white, RED, None).any()
    assert not shows(white, RED, [GROUND]).any()


def test_the_object_is_the_largest_region_and_the_rest_is_reported():
    image = canvas(red=(slice(0, 3), slice(0, 3)), red2=(slice(10, 15), slice(10, 15)))
    found = by_colour(image, RED, [GROUND])
    assert found.box == (10, 10, 15, 15)
    assert found.rest.sum() == 9
    assert by_colour(image, RED, [GROUND], near=(0, 0, 4, 4)).box == (0, 0, 3, 3)
    assert by_colour(image, RED, [GROUND], near=(5, 0, 9, 4)) is None


def test_regions_that_touch_at_a_corner_are_one():
    image = canvas(red=(slice(0, 3), slice(0, 3)), red2=(slice(3, 6), slice(3, 6)))
    assert by_colour(image, RED, [GROUND]).box == (0, 0, 6, 6)


def test_nothing_found_is_a_zero_with_its_reason():
    (score,) = locate([canvas()], ["red"], [RED], [[GROUND]], ["palette"])
    assert (score.value, score.reason) == (0.0, "object_not_found")


@pytest.mark.parametrize(
    ("colour", "palette"), [(None, None), ((1, 2), None), ((300, 0, 0), None), (RED, [(-1, 0, 0)])]
)
def test_a_row_without_a_colour_is_broken(colour, palette):
    with pytest.raises(BrokenRow, match="colour"):
        by_colour(canvas(), colour, palette)


def test_the_best_box_is_the_object_and_boxes_apart_from_it_are_the_rest():
    boxes = [((2.2, 3.0, 8.0, 9.0), 0.9), ((2.0, 3.0, 9.0, 9.0), 0.8), ((12.0, 12.0, 16.0, 16.0), 0.4)]
    found = by_boxes(boxes, (20, 20))
    assert found.box == (2.2, 3.0, 8.0, 9.0)
    assert (found.mask.sum(), found.rest.sum()) == (36, 16)
    assert by_boxes([((30.0, 30.0, 40.0, 40.0), 0.9), *boxes[2:]], (20, 20)).box == boxes[2][0]  # one outside is none
    assert by_boxes([], (20, 20)) is None


def test_a_detector_is_asked_once_for_all_its_images(monkeypatch):
    asked = []

    def detect(folder, images, phrases):
        asked.append((folder, len(images), phrases))
        return [[((0.0, 0.0, 2.0, 2.0), 0.5)], []][: len(images)]

    monkeypatch.setattr(module, "detect", detect)
    images = [canvas(red=(slice(5), slice(5)))] * 4
    found = locate(images, list("abcd"), [RED] * 4, [[GROUND]] * 4, ["x", "palette", "y", "x"])
    assert asked == [("x", 2, ["a", "d"]), ("y", 1, ["c"])]
    assert [seen.box for seen in found[:3]] == [(0, 0, 2, 2), (0, 0, 5, 5), (0, 0, 2, 2)]
    assert found[3].reason == "object_not_found"


@given(*[st.integers(0, 9)] * 2, *[st.integers(1, 9)] * 2)
def test_the_bounds_of_a_rectangle_are_its_box(x, y, w, h):
    box = (x, y, min(x + w, 12), min(y + h, 11))
    assert bounds(rectangle(box, (11, 12))) == box
