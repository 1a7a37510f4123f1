"""The numbers are those of the released code's formulas (arXiv 2601.02356)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.image.talk2move import (
    position,
    relative_position,
    resize,
    talk2move_position,
    talk2move_resize,
    talk2move_translation,
    translation,
)

BEFORE, AFTER = (10, 10, 30, 30), (60, 20, 80, 40)


def test_translation_to_the_right():
    assert relative_position(BEFORE, AFTER) == pytest.approx((-0.902134221636, -0.117669681083))
    said = {name: translation(BEFORE, AFTER, name) for name in ("right", "left", "down", "up")}
    assert said == pytest.approx({"right": 0.902134221636, "left": 0.0, "down": 0.117669681083, "up": 0.0})
    assert position(BEFORE, AFTER) == pytest.approx(0.490098048641)


def test_a_shift_within_the_dead_zone_is_none():
    after = (11, 10, 31, 30)
    assert relative_position(BEFORE, after) == (0.0, 0.0)
    assert translation(BEFORE, after, "right") == 0.0
    assert position(BEFORE, after) == 1.0


def test_resize():
    assert resize(1.4, 1.7, 1.5) == pytest.approx(0.925)


@given(st.tuples(*[st.integers(-50, 50)] * 2), st.integers(1, 30), st.integers(1, 30))
def test_going_back_has_the_opposite_position(shift, w, h):
    after = (shift[0], shift[1], shift[0] + w, shift[1] + h)
    dx, dy = relative_position((0, 0, w, h), after)
    assert relative_position(after, (0, 0, w, h)) == (-dx, -dy)
    assert abs(dx) <= 1
    assert abs(dy) <= 1


def test_rewards_apply_to_their_own_operation(make, score):
    rows = {
        "translate": make("translate", dx=14),
        "rotate": make("rotate", angle=180),
        "resize": make("resize", factor=2),
    }
    values = {
        reward.__name__: {name: score(reward, [target], row)[0].value for name, (row, target) in rows.items()}
        for reward in (talk2move_translation, talk2move_position, talk2move_resize)
    }
    moved = (14 - 0.1 * 12) / 14
    assert values["talk2move_translation"] == {"translate": pytest.approx(moved), "rotate": None, "resize": None}
    assert values["talk2move_position"] == {"translate": None, "rotate": 1.0, "resize": 1.0}
    assert values["talk2move_resize"] == {"translate": None, "rotate": None, "resize": 1.0}


def test_a_smaller_object_is_judged_by_the_inverse_ratio(make, score):
    row, target = make("resize", factor=2)
    back = row | {"source": row["target"], "box": row["target_box"], "target_box": row["box"], "factor": 0.5}
    from rewards.image.files import read_image

    assert score(talk2move_resize, [read_image(row["source"])], back)[0].value == 1.0
    assert score(talk2move_resize, [target], back)[0].value == pytest.approx(0.5)
