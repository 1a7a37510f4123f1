import numpy as np
import pytest

from rewards.image import hacks
from rewards.image.editing import edit
from rewards.image.files import read_image
from rewards.image.super_resolution import fidelity, texture
from rewards.image.talk2move import relative_position, resize, talk2move_resize, talk2move_translation, translation

ROWS = (("translate", {"dx": -6, "dy": 0}), ("rotate", {"angle": 90}), ("resize", {"factor": 2}))


def one(operation, amounts, make):
    corner = (30, 20) if operation == "translate" else (16, 20)
    return make(operation, corner=corner, **amounts)


@pytest.mark.parametrize(("operation", "amounts"), ROWS)
@pytest.mark.parametrize("canary", hacks.edit_canaries(), ids=lambda canary: canary.name)
def test_no_hack_of_an_edit_pays(make, score, canary, operation, amounts):
    row, target = one(operation, amounts, make)
    bad, good = score(edit, [canary.completion(row), target], row)
    assert canary.at_least <= bad.value <= canary.at_most
    assert good.value == 1.0


@pytest.mark.parametrize("name", ["overshoot", "copy", "erased_background"])
def test_the_released_reward_pays_for_what_is_no_edit(make, score, name):
    row, target = one("translate", {"dx": -10}, make)
    image = hacks.EDITS[name][0](row)
    released, exact = score(talk2move_translation, [image, target], row)
    assert released.value >= exact.value > 0.7
    assert score(edit, [image], row)[0].value <= hacks.EDITS[name][1]


def test_the_released_reward_for_size_pays_for_doing_nothing(make, score):
    row, _ = make("resize", factor=2)
    source = read_image(row["source"])
    assert score(talk2move_resize, [source], row)[0].value == pytest.approx(0.5)
    assert score(edit, [source], row)[0].value < 0.1


def test_the_released_reward_reads_up_in_cup():
    down, up = (10, 40, 30, 60), (10, 10, 30, 30)
    assert translation(down, up, "move the cup to the left") == relative_position(down, up)[1] > 0.7


def test_an_edit_by_cut_and_paste_is_right(make, score):
    for operation, amounts in (("translate", {"dx": 14}), ("rotate", {"angle": 90}), ("resize", {"factor": 2})):
        row, target = make(operation, **amounts)
        image = hacks.cut_and_paste(row)
        assert score(edit, [image], row)[0].value > 0.9
        assert np.abs(image - target).mean() < 0.01


@pytest.mark.parametrize(("reward", "at_most"), [(fidelity, 0.4), (texture, 0.4)])
def test_no_image_of_nothing_is_a_high_resolution_image(make, score, reward, at_most):
    row, _ = make("translate", dx=14)
    for canary in hacks.super_resolution_canaries(reward.__name__, at_most):
        bad, good = score(reward, [canary.completion(row), read_image(row["target"])], row | {"tile": 8})
        assert canary.at_least <= bad.value <= canary.at_most, canary.name
        assert good.value == 1.0


def test_resize_in_the_released_form_can_be_negative_but_no_reward_is(make, score):
    assert resize(0.1, 0.1, 4.0) < 0
    row, _ = make("resize", factor=2)
    row["factor"] = 9.0
    assert score(talk2move_resize, [read_image(row["source"])], row)[0].value == 0.0
