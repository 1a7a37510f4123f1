import math

import numpy as np
import pytest
from scipy import ndimage

from data.edit_folder import load
from data.synthetic.scenes import write_edits
from rewards.image import hacks
from rewards.image.editing import background_kept, edit, object_kept, placement, single, source_cleared
from rewards.image.files import read_image
from rewards.image.location import by_colour, rectangle
from rewards.score import BrokenRow

FACTORS = (placement, source_cleared, single, background_kept, object_kept)
EDITS = (
    ("translate", {"dx": 14}),
    ("translate", {"dy": -9}),
    ("rotate", {"angle": 90}),
    ("rotate", {"angle": 180}),
    ("resize", {"factor": 2}),
)


@pytest.mark.parametrize(("operation", "amounts"), EDITS)
@pytest.mark.parametrize("reward", [*FACTORS, edit], ids=lambda reward: reward.__name__)
def test_the_exact_edit_scores_one_and_gives_no_reason(make, score, reward, operation, amounts):
    row, target = make(operation, **amounts)
    (judged,) = score(reward, [target], row)
    if reward is source_cleared and operation == "resize":
        assert judged.value is None  # a larger object leaves no place
    else:
        assert (judged.value, judged.reason) == (1.0, "")


@pytest.mark.parametrize("name", ["target_box", "direction_and_distance"])
def test_the_command_may_be_a_box_or_an_amount(make, score, name):
    row, target = make("translate", dx=14)
    row |= {"target_box": None} if name != "target_box" else {"direction": None, "distance": None}
    assert score(edit, [target], row)[0].value == 1.0


def test_placement_of_a_translation_in_closed_form(make, score, scene):
    row, _ = make("translate", dx=16)
    missed = [1, 2, 5, 16, 20]
    images = [scene.draw(scene.L, (8 + 16 - off, 20)) for off in missed]
    values = [judged.value for judged in score(placement, images, row)]
    np.testing.assert_allclose(values, [math.exp(-3 * (off - 0.5) / 16) for off in missed], rtol=1e-6)
    above = score(placement, [scene.draw(scene.L, (24, 20 - 3))], row)[0]
    assert above.value == pytest.approx(math.exp(-3 * 2.5 / 16))
    assert above.reason == "misplaced"


def test_a_nearer_miss_scores_more(make, score, scene):
    row, _ = make("translate", dx=16)
    ahead = [scene.draw(scene.L, (24 + off, 20)) for off in range(13)]
    behind = [scene.draw(scene.L, (24 - off, 20)) for off in range(24)]
    for images in (ahead, behind):
        assert (np.diff([judged.value for judged in score(placement, images, row)]) < 0).all()
    # the whole too, until the object covers its old place again
    for images in (ahead, behind[:13]):
        values = np.array([judged.value for judged in score(edit, images, row)])
        assert (np.diff(values) < 0).all(), values


def test_a_nearer_angle_and_a_nearer_factor_score_more(make, score):
    bar, _ = make("rotate", angle=90)
    images = [hacks.cut_and_paste(bar, amount=share) for share in (1, 0.8, 0.6, 0.4)]
    values = [judged.value for judged in score(placement, images, bar)]
    assert values[0] == 1.0
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 4
    large, _ = make("resize", factor=2)
    for amounts in ((1, 0.75, 0.5, 0.25, 0, -1), (1, 1.25, 1.5)):
        images = [hacks.cut_and_paste(large, amount=share) for share in amounts]
        values = [judged.value for judged in score(placement, images, large)]
        assert values[0] == 1.0
        assert (np.diff(values) < 0).all()


def test_a_resized_object_a_pixel_too_wide_is_seen_by_its_box(make, score):
    """Its outline alone may be a pixel off, for another way of drawing."""
    row, target = make("resize", factor=2)
    x1, y1, x2, y2 = row["target_box"]
    wide = target.copy()
    wide[y2 - 6 : y2, x2] = wide[y2 - 6 : y2, x2 - 1]
    shorter = target.copy()
    shorter[y1, x1 : x1 + 5] = shorter[y1 - 1, x1 : x1 + 5]  # a corner is left, so the box is as commanded
    seen, unseen = score(placement, [wide, shorter], row)
    assert 0.8 < seen.value < 1
    assert unseen.value == 1.0


@pytest.mark.parametrize(("operation", "amounts"), EDITS[2:])
def test_an_object_left_as_it_was_keeps_at_most_five_percent_of_placement(make, score, operation, amounts):
    row, _ = make(operation, **amounts)
    (judged,) = score(placement, [read_image(row["source"])], row)
    assert 0 < judged.value <= math.exp(-3) + 1e-9
    assert judged.reason == "misshapen"


def test_a_copy_counts_by_its_area_and_five_percent_are_forgiven(make, score, scene):
    row, target = make("translate", dx=20)
    area = int(scene.L.sum())
    red = np.float32(scene.RED) / 255
    for pixels in (1, 12, area):
        image = target.copy()
        image[2 : 2 + -(-pixels // 6), 2:8].reshape(-1, 3)[:pixels] = red
        block = np.zeros((12, 6), dtype=bool)
        block.ravel()[:pixels] = True
        image[2:14, 2:8] = np.where(block[..., None], red, target[2:14, 2:8])
        (judged,) = score(single, [image], row)
        assert judged.value == pytest.approx(1 - max(0, pixels / area - 0.05) / 0.95, abs=1e-6)
    assert (judged.value, judged.reason) == (0.0, "duplicate")


def test_the_old_place_must_not_show_the_object_nor_a_hole(make, score, scene):
    row, target = make("translate", dx=20)
    (x1, y1, x2, y2), area = row["box"], int(scene.L.sum())
    left = target.copy()
    left[y1:y2, x1:x2][scene.L & (np.arange(9) < 4)[:, None]] = np.float32(scene.RED) / 255
    (judged,) = score(source_cleared, [left], row)
    assert judged.value == pytest.approx(1 - (12 / area - 0.05) / 0.95, abs=1e-6)
    assert judged.reason == "source_left"
    hole = target.copy()
    hole[y1:y2, x1:x2][scene.L] = 1.0
    (judged,) = score(source_cleared, [hole], row)
    assert (judged.value, judged.reason) == (0.0, "hole")


def test_background_is_judged_in_its_worst_window(make, score, scene):
    row, target = make("translate", dx=14)
    assert score(background_kept, [target + np.float32(0.02)], row)[0].value == pytest.approx(1.0, abs=1e-5)
    changed = score(background_kept, [target + np.float32(0.08)], row)[0]
    assert changed.value == pytest.approx(math.exp(-3 * 0.06 / 0.25), rel=1e-4)
    assert changed.reason == "background_changed"
    without_square = scene.draw(scene.L, (22, 20), green=(200, 200))
    assert score(background_kept, [without_square], row)[0].value < 0.25  # 2 % of the pixels of the image


def test_a_misplaced_object_is_no_change_of_the_background_but_a_flood_of_its_colour_is(make, score, scene):
    row, _ = make("translate", dx=14)
    flood = np.broadcast_to(np.float32(scene.RED) / 255, (48, 48, 3))
    astray, flooded = score(background_kept, [scene.draw(scene.L, (8, 2)), flood], row)
    assert astray.value == 1.0
    assert flooded.value < 0.01


def test_another_colour_texture_or_size_is_another_object(make, score, scene):
    row, target = make("translate", dx=14)
    box = (slice(20, 29), slice(22, 28))
    images = []
    for colour in (scene.RED, (250, 50, 60)):
        image = target.copy()
        image[box][scene.L] = np.float32(colour) / 255
        images.append(image)
    flat, bright = score(object_kept, images, row)
    difference = np.abs(images[1][box][scene.L].mean(0) - target[box][scene.L].mean(0)).mean()
    assert bright.value == pytest.approx(math.exp(-3 * (difference - 0.05) / 0.25), rel=1e-3)
    assert bright.reason == "object_changed"
    assert flat.value <= 1.0
    half = scene.draw(scene.L[:6], (22, 20))
    assert score(object_kept, [half], row)[0].value == pytest.approx((18 / 36) ** (3 / math.log(2)), rel=0.1)


def test_the_whole_is_the_product_and_names_its_lowest_factor(make, score, scene):
    row, _ = make("translate", dx=14)
    images = [scene.draw(scene.L, (20, 21)), hacks.cut_and_paste(row, leave=True), read_image(row["source"])]
    images.append(np.clip(scene.draw(scene.L, (22, 20)) + np.float32(0.2), 0, 1))
    twice = scene.draw(scene.L, (22, 20))
    twice[2:5, 2:8] = np.float32(scene.RED) / 255
    images.append(twice)
    whole = score(edit, images, row)
    parts = [score(factor, images, row) for factor in FACTORS]
    for judged, *factors in zip(whole, *parts, strict=True):
        known = [factor for factor in factors if factor.value is not None]
        assert judged.value == pytest.approx(math.prod(factor.value for factor in known))
        assert judged.reason == min(known, key=lambda factor: factor.value).reason


def test_a_vanished_object_is_nowhere_and_its_place_is_cleared(make, score):
    row, _ = make("translate", dx=14)
    image = hacks.cut_and_paste(row, paste=False)
    values = {reward.__name__: score(reward, [image], row)[0] for reward in (*FACTORS, edit)}
    assert {name: judged.value for name, judged in values.items()} == {
        "placement": 0.0,
        "source_cleared": 1.0,
        "single": 0.0,
        "background_kept": 1.0,
        "object_kept": 0.0,
        "edit": 0.0,
    }
    assert values["edit"].reason == "object_not_found"


@pytest.mark.parametrize("reward", [*FACTORS, edit], ids=lambda reward: reward.__name__)
def test_what_is_no_image_scores_zero_beside_the_rest(make, score, reward):
    row, target = make("translate", dx=14)
    images = [make_broken(target) for make_broken in hacks.BROKEN.values()]
    judged = score(reward, [target, *images, target], row)
    assert [entry.value for entry in judged] == [1.0] + [0.0] * len(images) + [1.0]
    assert all(entry.reason for entry in judged[1:-1])


def test_scores_follow_their_images_and_rows_when_the_batch_is_shuffled(make, score):
    rows, images = [], []
    for operation, amounts in EDITS:
        row, target = make(operation, **amounts)
        rows += [row] * 3
        images += [target, read_image(row["source"]), hacks.cut_and_paste(row, amount=0.5)]
    order = np.random.default_rng(0).permutation(len(rows))
    for reward in (*FACTORS, edit):
        straight = score(reward, images, rows)
        assert score(reward, [images[i] for i in order], [rows[i] for i in order]) == [straight[i] for i in order]


def test_moving_the_whole_scene_changes_no_score(make, score):
    near, _near_target = make("translate", corner=(8, 20), dx=12)
    far, _far_target = make("translate", corner=(11, 24), dx=12)
    for amount in (1, 0.5, 1.5):
        judged = [score(placement, [hacks.cut_and_paste(row, amount)], row)[0].value for row in (near, far)]
        assert judged[0] == pytest.approx(judged[1])


def test_the_target_image_is_never_read(make, score):
    row, target = make("translate", dx=14)
    assert score(edit, [target], row | {"target": "gone.png", "target_mask": "gone.png"})[0].value == 1.0


def test_a_broken_row_raises(make, score):
    row, target = make("translate", dx=14)
    with pytest.raises(BrokenRow, match=r"gone\.png"):
        score(edit, [target], row | {"source": "gone.png"})


def test_small_shapes_drawn_anew_are_judged_right(score, tmp_path):
    """On 32 pixels a turned or resized shape has another outline than its resampled mask: still exact, and not free."""
    write_edits(tmp_path / "edits", seed=1, train_rows=160, test_rows=4)
    rows = load(tmp_path / "edits")["train"]
    exact = score(edit, [read_image(row["target"]) for row in rows], [row | {"detector": "palette"} for row in rows])
    assert [judged.value for judged in exact] == [1.0] * len(rows)
    unchanged = score(
        edit, [read_image(row["source"]) for row in rows], [row | {"detector": "palette"} for row in rows]
    )
    assert max(judged.value for judged in unchanged) <= math.exp(-3) + 1e-9


def test_by_a_detector_the_same_edit_is_judged_by_boxes(make, score, scene, monkeypatch):
    """The detector itself is in test_detectors.py; here its boxes are those of the colour, a pixel off."""
    row, target = make("translate", dx=20)
    row |= {"detector": "folder", "colour": None, "palette": None}

    def detect(folder, images, phrases):
        assert set(phrases) == {"red L"}
        boxes = []
        for image in images:
            found = by_colour(image, scene.RED, [scene.GROUND, scene.GREEN])
            labels, _n = ndimage.label(found.mask | found.rest)
            spans = [(x.start - 0.3, y.start + 0.2, x.stop, y.stop) for y, x in ndimage.find_objects(labels)]
            boxes.append([(span, 0.9 - 0.1 * i) for i, span in enumerate(reversed(spans))])
        return boxes

    monkeypatch.setattr("rewards.image.location.detect", detect)
    assert score(edit, [target], row)[0].value == 1.0
    copy = target.copy()
    copy[rectangle(row["box"], (48, 48))] = read_image(row["source"])[rectangle(row["box"], (48, 48))]
    names = [score(reward, [copy], row)[0].reason for reward in (single, source_cleared)]
    assert names == ["duplicate", "source_left"]
    near, far = (score(placement, [scene.draw(scene.L, (28 - off, 20))], row)[0].value for off in (4, 9))
    assert 1 > near > far > 0
