import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.image.geometry import Command, Reference, centroid, iou, overlap, transformed
from rewards.image.location import bounds, rectangle
from rewards.score import BrokenRow

NONE = dict.fromkeys(("target_box", "direction", "distance", "angle", "factor", "mask", "colour", "palette"))


def command(operation, box, **columns):
    return Command.of(**NONE | {"source": "x", "operation": operation, "box": box, "detector": "palette"} | columns)


def an_l(shape=(30, 30), corner=(10, 8)):
    mask = np.zeros(shape, dtype=bool)
    mask[corner[1] : corner[1] + 8, corner[0] : corner[0] + 2] = True
    mask[corner[1] + 6 : corner[1] + 8, corner[0] : corner[0] + 5] = True
    return mask


BOX = (10, 8, 15, 16)


@pytest.mark.parametrize(("direction", "dx", "dy"), [("right", 6, 0), ("left", -6, 0), ("down", 0, 6), ("up", 0, -6)])
def test_a_translation_moves_the_mask_by_whole_pixels(direction, dx, dy):
    moved = transformed(an_l(), command("translate", BOX, direction=direction, distance=6))
    np.testing.assert_array_equal(moved, np.roll(an_l(), (dy, dx), (0, 1)))
    box = [BOX[0] + dx, BOX[1] + dy, BOX[2] + dx, BOX[3] + dy]
    np.testing.assert_array_equal(transformed(an_l(), command("translate", BOX, target_box=box)), moved)


@pytest.mark.parametrize("angle", [90, 180, 270, -90])
def test_a_quarter_turn_is_clockwise_and_exact(angle):
    crop = an_l()[8:16, 10:15]
    turned = np.rot90(crop, -angle // 90)  # numpy turns the other way
    target = (7, 9, 7 + turned.shape[1], 9 + turned.shape[0])
    out = transformed(an_l(), command("rotate", BOX, angle=angle, target_box=target))
    assert bounds(out) == target
    np.testing.assert_array_equal(out[target[1] : target[3], target[0] : target[2]], turned)


def test_without_a_target_box_a_rotation_keeps_the_middle_of_the_box():
    out = transformed(an_l(corner=(11, 8)), command("rotate", (11, 8, 16, 16), angle=180))
    np.testing.assert_array_equal(out[8:16, 11:16], an_l()[8:16, 10:15][::-1, ::-1])


@pytest.mark.parametrize(
    "columns", [{"factor": 2}, {"factor": 2, "target_box": (7, 3, 17, 19)}, {"target_box": (7, 3, 17, 19)}]
)
def test_a_resize_by_two_doubles_each_pixel(columns):
    if "target_box" not in columns:
        columns["target_box"] = None
    box = (10, 7, 14, 15) if columns["target_box"] is None else BOX
    mask = an_l() if columns["target_box"] else np.roll(an_l(), -1, 0) & (np.arange(30) < 14)
    out = transformed(mask, command("resize", box, **columns))
    crop = mask[mask.any(1)][:, mask.any(0)]
    np.testing.assert_array_equal(out[out.any(1)][:, out.any(0)], np.kron(crop, np.ones((2, 2))) > 0)
    if columns["target_box"]:
        assert bounds(out) == columns["target_box"]


def test_a_turn_by_any_angle_turns_the_long_axis():
    bar = np.zeros((41, 41), dtype=bool)
    bar[19:22, 5:36] = True
    for angle in (20, 45, -30):
        out = transformed(bar, command("rotate", (5, 19, 36, 22), angle=angle))
        y, x = np.nonzero(out)
        (xx, xy), (_, yy) = np.cov(x, y)
        assert np.degrees(np.arctan2(2 * xy, xx - yy) / 2) == pytest.approx(angle, abs=1)
        np.testing.assert_allclose(centroid(out), [20.5, 20.5], atol=0.1)


@pytest.mark.parametrize("angle", [30, 45, -60])
def test_the_middle_of_a_turned_box_is_where_the_command_wants_it(angle):
    out = bounds(transformed(an_l(), command("rotate", BOX, angle=angle, target_box=(9, 7, 21, 21))))
    np.testing.assert_allclose([(out[0] + out[2]) / 2, (out[1] + out[3]) / 2], [15, 14], atol=0.5)


def test_an_object_at_the_border_of_the_image_keeps_its_outline():
    mask = np.zeros((12, 12), dtype=bool)
    mask[:3, :4] = True
    out = transformed(mask, command("resize", (0, 0, 4, 3), factor=2, target_box=(0, 0, 8, 6)))
    np.testing.assert_array_equal(out, rectangle((0, 0, 8, 6), (12, 12)))


@given(st.integers(-8, 8), st.integers(-8, 8), st.integers(0, 3))
def test_overlap_does_not_see_where_a_shape_lies(dx, dy, slack):
    mask = np.roll(an_l(), (dy, dx), (0, 1))
    assert overlap(mask, an_l(), slack) == 1.0
    assert overlap(an_l(), mask, slack) == 1.0


def test_overlap_by_hand():
    square, larger = np.zeros((2, 20, 20), dtype=bool)
    square[5:9, 5:9] = True
    larger[8:14, 8:14] = True
    assert overlap(square, larger) == pytest.approx(16 / 36)
    # one pixel around the square, without corners, is free: 4 corners of 36 are wrong
    assert overlap(square, larger, slack=1) == pytest.approx(1 - 4 / 36)
    assert overlap(larger, square, slack=1) == pytest.approx(1 - 4 / 36)
    assert iou(square, larger) == pytest.approx(1 / 51)
    assert iou(square, square) == 1.0
    assert iou(np.zeros((2, 2), bool), np.zeros((2, 2), bool)) == 0.0


def test_shapes_that_cross_the_border_of_the_image_overlap_too():
    square, corner = np.zeros((2, 10, 10), dtype=bool)
    square[3:7, 3:7] = True
    corner[6:, 6:] = True
    assert overlap(square, corner) == 1.0


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"operation": "paint"}, "operation='paint' is unknown"),
        ({"box": None}, "box is missing"),
        ({"box": (3, 3, 3, 9)}, "is no box"),
        ({"box": (0, 0, float("nan"), 9)}, "is no box"),
        ({"target_box": (1, 2, 3)}, "is no box"),
        ({"direction": None}, "direction is missing"),
        ({"distance": None}, "distance is missing"),
        ({"direction": "cup"}, "direction='cup' is unknown"),
        ({"operation": "rotate"}, "angle is missing"),
        ({"operation": "resize"}, "factor is missing"),
    ],
)
def test_a_command_that_says_too_little_is_a_broken_row(columns, message):
    known = {"operation": "translate", "box": BOX, "direction": "left", "distance": 3}
    with pytest.raises(BrokenRow, match=message):
        command(**known | columns)


def test_a_source_without_the_object_and_an_edit_out_of_the_image_are_broken_rows(make):
    row, _ = make("translate", dx=10)
    columns = {name: row.get(name) for name in Command.__dataclass_fields__}
    Reference(Command.of(**columns))
    with pytest.raises(BrokenRow, match="does not show the object"):
        Reference(Command.of(**columns | {"box": [30, 30, 36, 39]}))
    with pytest.raises(BrokenRow, match="out of the image"):
        Reference(Command.of(**columns | {"target_box": [50, 20, 56, 29]}))
