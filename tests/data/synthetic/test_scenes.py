"""Synthetic edits and super-resolution pairs: format, determinism, and that pictures, masks and amounts agree exactly."""

import hashlib
import os
import subprocess
import sys
import time
from collections import Counter
from itertools import combinations
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from data import edit_folder, super_resolution
from data.edit_folder import moved, resized
from data.synthetic import scene_phrases, scenes
from data.synthetic.scene_edits import random_scene
from data.synthetic.scene_shapes import COLOURS, CONTRAST, GROUND_CONTRAST, GROUNDS, SHAPES, TEXTURES, Thing, box_of

SMALL = {"train_rows": 120, "test_rows": 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("synthetic") / "edits"
    scenes.write_edits(path, 7, **SMALL)
    return path


@pytest.fixture(scope="module")
def splits(folder):
    return edit_folder.load(folder)


@pytest.fixture(scope="module")
def rows(splits):
    return splits["train"] + splits["test"]


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def mask_of(path: str) -> np.ndarray:
    values = pixels(path)
    assert set(np.unique(values)) == {0, 255}
    return values == 255


def digest(folder) -> str:
    total = hashlib.sha256()
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        total.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return total.hexdigest()


def test_same_seed_same_bytes_in_another_process_with_another_hash_seed(folder, tmp_path):
    scenes.write_super_resolution(tmp_path / "sr", 7, train=4, test=2)
    command = (
        "from data.synthetic import scenes\n"
        f"scenes.write_edits({str(tmp_path / 'edits2')!r}, 7, **{SMALL!r})\n"
        f"scenes.write_super_resolution({str(tmp_path / 'sr2')!r}, 7, train=4, test=2)"
    )
    root = Path(scenes.__file__).parents[2]
    subprocess.run([sys.executable, "-c", command], check=True, cwd=root, env=os.environ | {"PYTHONHASHSEED": "5"})
    assert digest(tmp_path / "edits2") == digest(folder)
    assert digest(tmp_path / "sr2") == digest(tmp_path / "sr")


def test_other_seed_other_pictures(splits, tmp_path):
    for seed in (0, 1):
        scenes.write_super_resolution(tmp_path / f"s{seed}", seed, train=2, test=1)
    assert digest(tmp_path / "s0") != digest(tmp_path / "s1")
    scenes.write_edits(tmp_path / "other", 8, train_rows=20, test_rows=4)
    other = {pixels(row["source"]).tobytes() for row in edit_folder.load(tmp_path / "other")["train"]}
    assert not other & {pixels(row["source"]).tobytes() for row in splits["train"]}


def test_operations_come_in_their_shares_and_novel_wordings_only_in_test(splits):
    assert Counter(row["operation"] for row in splits["train"]) == {"translate": 72, "resize": 30, "rotate": 18}
    assert Counter(row["operation"] for row in splits["test"]) == {"translate": 24, "resize": 10, "rotate": 6}
    assert {row["novel"] for row in splits["train"]} == {False}
    assert sum(row["novel"] for row in splits["test"]) == 12


def test_shares_are_met_by_largest_remainder():
    deck = scenes._deck({"a": 0.5, "b": 0.3, "c": 0.2}, 7, Random(0))
    assert Counter(deck) == {"a": 4, "b": 2, "c": 1}


def test_splits_share_no_scene_and_no_picture(splits):
    assert not {row["scene"] for row in splits["train"]} & {row["scene"] for row in splits["test"]}
    train, test = ({pixels(row["source"]).tobytes() for row in splits[split]} for split in ("train", "test"))
    assert (len(train), len(test), len(train & test)) == (30, 10, 0)


def test_splits_of_one_size_share_nothing_either(tmp_path):
    scenes.write_edits(tmp_path / "e", 0, train_rows=12, test_rows=12, novel_share=0.0)
    splits = edit_folder.load(tmp_path / "e")
    train, test = ({pixels(row["source"]).tobytes() for row in splits[split]} for split in ("train", "test"))
    assert not train & test


def test_several_edits_of_a_scene_are_of_several_objects(tmp_path):
    scenes.write_edits(tmp_path / "e", 0, train_rows=24, test_rows=2, edits_per_scene=2, weights={"rotate": 1})
    rows = edit_folder.load(tmp_path / "e")["train"]
    assert all(first["object"] != second["object"] for first, second in zip(rows[::2], rows[1::2], strict=True))


def test_edits_of_a_scene_have_one_source_and_different_targets(rows):
    by_scene = {}
    for row in rows:
        by_scene.setdefault(row["scene"], []).append(row)
    for of_scene in by_scene.values():
        assert len(of_scene) == 4
        assert len({row["source"] for row in of_scene}) == 1
        pictures = {pixels(row[key]).tobytes() for row in of_scene for key in ("source", "target")}
        assert len(pictures) == 5
        assert len({row["object"] for row in of_scene}) >= 2


def test_boxes_are_those_of_the_masks(rows):
    for row in rows:
        assert row["box"] == box_of(mask_of(row["mask"]))
        assert row["target_box"] == box_of(mask_of(row["target_mask"]))


def test_target_box_is_what_the_amounts_ask_for(rows):
    for row in rows:
        if row["operation"] == "translate":
            assert row["target_box"] == moved(row["box"], row["direction"], row["distance"])
        elif row["operation"] == "resize":
            assert row["target_box"] == resized(row["box"], row["factor"])


def test_a_moved_object_keeps_every_pixel(rows):
    for row in rows:
        if row["operation"] != "translate":
            continue
        (a1, b1, a2, b2), (c1, d1, c2, d2) = row["box"], row["target_box"]
        before, after = mask_of(row["mask"])[b1:b2, a1:a2], mask_of(row["target_mask"])[d1:d2, c1:c2]
        assert np.array_equal(before, after)
        source, target = pixels(row["source"])[b1:b2, a1:a2], pixels(row["target"])[d1:d2, c1:c2]
        assert np.array_equal(source[before], target[after])


def test_a_quarter_turn_turns_the_pixels(rows):
    seen = 0
    for row in rows:
        if row["operation"] != "rotate" or abs(row["angle"]) != 90:
            continue
        (a1, b1, a2, b2), (c1, d1, c2, d2) = row["box"], row["target_box"]
        turns = -1 if row["angle"] == 90 else 1  # numpy turns against the clock
        before = np.rot90(mask_of(row["mask"])[b1:b2, a1:a2], turns)
        assert np.array_equal(before, mask_of(row["target_mask"])[d1:d2, c1:c2])
        source = np.rot90(pixels(row["source"])[b1:b2, a1:a2], turns)
        assert np.array_equal(source[before], pixels(row["target"])[d1:d2, c1:c2][before])
        assert (a1 + a2, b1 + b2) == (c1 + c2, d1 + d2)
        seen += 1
    assert seen > 3


def test_a_rotation_is_visible_in_the_shape_and_keeps_its_area(rows):
    for row in rows:
        if row["operation"] == "rotate":
            before, after = mask_of(row["mask"]), mask_of(row["target_mask"])
            assert (before & after).sum() < 0.75 * (before | after).sum()
            assert abs(int(after.sum()) - int(before.sum())) <= 0.15 * before.sum()


def test_amounts_are_asked_for_about_equally_often(splits):
    for key, values in (("direction", 4), ("distance", 3), ("factor", 2), ("angle", 4)):
        counts = Counter(row[key] for row in splits["train"] if row[key] is not None)
        assert len(counts) == values
        assert max(counts.values()) <= 1.25 * min(counts.values()) + 1


def test_nothing_but_the_object_changes(rows):
    for row in rows:
        touched = mask_of(row["mask"]) | mask_of(row["target_mask"])
        source, target = pixels(row["source"]), pixels(row["target"])
        assert np.array_equal(source[~touched], target[~touched])


def test_the_nearest_colour_finds_object_and_background_exactly(rows):
    for row in rows:
        colours = np.array([row["colour"], *row["palette"]])
        for picture, mask in (("source", "mask"), ("target", "target_mask")):
            distance = ((pixels(row[picture])[:, :, None] - colours) ** 2).sum(-1)
            found = distance.argmin(-1)
            assert np.array_equal(found == 0, mask_of(row[mask]))
        left = mask_of(row["mask"]) & ~mask_of(row["target_mask"])
        assert (found[left] == 1).all()  # the background, which the palette names first, fills where the object was


def test_objects_stay_a_pixel_apart(rows):
    for row in rows:
        colours = np.array([row["colour"], *row["palette"]])
        for picture in ("source", "target"):
            found = ((pixels(row[picture])[:, :, None] - colours) ** 2).sum(-1).argmin(-1)
            boxes = [box_of(found == at) for at in range(len(colours)) if at != 1]
            assert len(boxes) >= 2
            for a, b in combinations(boxes, 2):
                assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


def test_instructions_say_operation_object_and_amount(rows):
    for row in rows:
        text = row["instruction"]
        colour, *_, shape = row["object"].split()
        assert f"the {row['object']}" in text or f"the {colour} {shape}" in text
        number = row["distance"] or abs(row["angle"] or 0)
        if row["operation"] == "resize":
            factor = row["factor"]
            said = [f"{factor:g}"]
            said += [form for n in (100 * factor, abs(100 * factor - 100)) for form in forms(round(n))]
            assert any(form in text for form in said)
            larger = ("larger", "bigger", "enlarge", "grow"), ("smaller", "shrink", "reduce")
            assert not any(word in text for word in larger[factor > 1])
        else:
            turns = {45: "an eighth turn", 90: "a quarter turn"} if row["operation"] == "rotate" else {}
            assert any(form in text for form in [*forms(number), turns.get(number, "never")])
        if row["operation"] == "translate":
            words = {"up": ("up", "higher"), "down": ("down", "lower")}.get(row["direction"], (row["direction"],))
            assert any(word in text for word in words)
        if row["operation"] == "rotate":
            assert ("counterclockwise" in text or "anticlockwise" in text) == (row["angle"] < 0)
            assert "clockwise" in text


def forms(number: int) -> list[str]:
    return [str(number), scene_phrases.words(number)]


def test_there_are_eight_wordings_an_operation_and_novel_ones_are_others():
    for operation, phrases in scene_phrases.PHRASES.items():
        assert len(set(phrases)) >= 8
        assert len(scene_phrases.NOVEL[operation]) >= 2
        assert not set(phrases) & set(scene_phrases.NOVEL[operation])


def test_train_uses_every_wording_and_test_novel_ones():
    random = Random(0)
    for operation, amounts in (("translate", {"direction": "up", "distance": 4}), ("rotate", {"angle": -45})):
        known = {scene_phrases.instruction(operation, ["x"], amounts, random) for _ in range(400)}
        novel = {scene_phrases.instruction(operation, ["x"], amounts, random, novel=True) for _ in range(400)}
        assert len(known) >= len(scene_phrases.PHRASES[operation])
        assert not known & novel


def test_numbers_in_words():
    said = {0: "zero", 8: "eight", 16: "sixteen", 45: "forty-five", 90: "ninety", 150: "one hundred and fifty"}
    assert {number: scene_phrases.words(number) for number in said} == said
    assert scene_phrases.words(300) == "three hundred"
    with pytest.raises(ValueError, match="number=1000"):
        scene_phrases.words(1000)


def test_colours_are_far_from_every_confusion():
    """The darkest and brightest of a colour are nearer to it than to any other, by almost 50 levels."""
    named = [(colour, CONTRAST) for colour in COLOURS.values()] + [(colour, GROUND_CONTRAST) for colour in GROUNDS]
    for colour, contrast in named:
        for other, _ in named:
            if other == colour or {colour, other} <= set(GROUNDS):
                continue
            for brightness in np.linspace(1 - contrast, 1 + contrast, 21):
                drawn = brightness * np.array(colour)
                assert np.linalg.norm(drawn - other) > np.linalg.norm(drawn - colour) + 45
                assert drawn.max() < 255


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fills_its_box_at_every_size_and_quarter_turn(shape):
    for width in range(3, 16):
        for turns in range(4):
            height = width if shape != "bar" else width + 2
            thing = Thing(shape, "red", "plain", width, height, (20 + width / 2, 20 + height / 2), 0)
            mask = thing.mask(48)
            assert box_of(mask) == [20, 20, 20 + width, 20 + height]
            turned = Thing(shape, "red", "plain", width, height, thing.centre, 90 * turns).mask(48)
            assert turned.sum() == mask.sum()


def test_a_thing_that_leaves_the_canvas_has_no_mask():
    inside = Thing("square", "red", "plain", 4, 4, (2, 2))
    assert inside.mask(8).sum() == 16
    assert Thing("square", "red", "plain", 4, 4, (1, 2)).mask(8) is None
    assert Thing("square", "red", "plain", 4, 4, (7, 6)).mask(8) is None


@pytest.mark.parametrize("texture", TEXTURES[1:])
def test_a_texture_changes_only_the_brightness(texture):
    canvas = np.zeros((16, 16, 3))
    thing = Thing("square", "pink", texture, 12, 12, (8, 8), grain=3)
    thing.paint(canvas, thing.mask(16))
    painted = canvas[thing.mask(16)] / np.array(COLOURS["pink"])
    assert np.allclose(painted, painted[:, :1])
    assert painted.min() >= 1 - CONTRAST - 1e-9
    assert painted.max() <= 1 + CONTRAST + 1e-9
    assert painted.max() - painted.min() > CONTRAST


def test_the_maker_refuses_a_scene_whose_colours_do_not_find_its_things():
    scene = random_scene(32, Random(0))
    picture = scene.draw()
    scenes._check(scene, picture)
    spoiled = picture.copy()
    spoiled[scene.things[0].mask(32)] = scene.ground
    with pytest.raises(AssertionError, match=scene.things[0].name):
        scenes._check(scene, spoiled)


@pytest.mark.parametrize("size", [24, 64])
def test_other_sizes_scale_things_and_distances(tmp_path, size):
    scenes.write_edits(tmp_path / "e", 0, size=size, train_rows=40, test_rows=4)
    rows = edit_folder.load(tmp_path / "e")["train"]
    assert {Image.open(row["source"]).size for row in rows} == {(size, size)}
    distances = {row["distance"] for row in rows if row["distance"]}
    assert distances <= {round(n * size / 32) for n in (4, 6, 8)}
    widths = [row["box"][2] - row["box"][0] for row in rows]
    assert 0.15 * size < np.mean(widths) < 0.4 * size


def test_amounts_and_weights_are_parameters(tmp_path):
    settings = {"weights": {"rotate": 1.0}, "angles": (180,), "train_rows": 8, "test_rows": 2, "edits_per_scene": 1}
    scenes.write_edits(tmp_path / "e", 0, **settings)
    rows = edit_folder.load(tmp_path / "e")["train"]
    assert {(row["operation"], row["angle"]) for row in rows} == {("rotate", 180)}
    assert len({row["scene"] for row in rows}) == 8


def test_settings_that_no_scene_meets_are_refused_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("data.synthetic.scene_edits.TRIES", 20)
    with pytest.raises(ValueError, match=r"no scene of 32x32.*distances=\[40\].*larger size"):
        scenes.write_edits(tmp_path / "e", 0, distances=[40], train_rows=4, test_rows=4)
    with pytest.raises(ValueError, match="no shares"):
        scenes.write_edits(tmp_path / "e", 0, weights={"translate": -1.0})
    with pytest.raises(ValueError, match=r"weights names \['move'\]; the operations are translate"):
        scenes.write_edits(tmp_path / "e", 0, weights={"move": 1.0})
    with pytest.raises(ValueError, match="scale 5 does not shrink size=32"):
        scenes.write_super_resolution(tmp_path / "s", 0, scales=(5,))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [scenes.write_edits, scenes.write_super_resolution])
def test_an_existing_folder_is_not_touched(tmp_path, write):
    with pytest.raises(FileExistsError, match="exists already"):
        write(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []


def test_mistaken_targets_are_another_instructions_of_the_same_scene(splits):
    rows = splits["train"]
    targets = scenes.mistaken_targets(rows, 3, 0.4)
    wrong = [(row, target) for row, target in zip(rows, targets, strict=True) if target != row["target"]]
    assert len(wrong) == 48
    scene_of = {row["target"]: row["scene"] for row in rows}
    assert all(scene_of[target] == row["scene"] for row, target in wrong)
    assert targets == scenes.mistaken_targets(rows, 3, 0.4)
    assert targets != scenes.mistaken_targets(rows, 4, 0.4)
    assert scenes.mistaken_targets(rows, 3, 0.0) == [row["target"] for row in rows]
    assert all(target != row["target"] for row, target in zip(rows, scenes.mistaken_targets(rows, 3, 1.0), strict=True))


def test_a_row_alone_in_its_scene_cannot_be_mistaken(splits):
    rows = splits["train"][::4]
    assert scenes.mistaken_targets(rows, 0, 1.0) == [row["target"] for row in rows]


def test_mistaken_targets_refuses_what_it_cannot_do(splits):
    with pytest.raises(ValueError, match=r"share=1\.5"):
        scenes.mistaken_targets(splits["train"], 0, 1.5)
    with pytest.raises(ValueError, match="row a has no target"):
        scenes.mistaken_targets([{"id": "a", "target": None, "scene": "s"}], 0, 0.5)


def test_super_resolution_folder_is_read_back_with_every_scale(tmp_path):
    scenes.write_super_resolution(tmp_path / "s", 0, size=24, train=6, test=3, scales=(2, 4))
    splits = super_resolution.load(tmp_path / "s")
    assert {split: Counter(row["scale"] for row in rows) for split, rows in splits.items()} == {
        "train": {2: 6, 4: 6},
        "test": {2: 3, 4: 3},
    }
    for row in splits["train"]:
        high = Image.open(row["target"])
        low = high.resize((24 // row["scale"],) * 2, Image.Resampling.BICUBIC)
        assert np.array_equal(pixels(row["source"]), np.asarray(low))
    pictures = [pixels(row["target"]).tobytes() for rows in splits.values() for row in rows if row["scale"] == 2]
    assert len(set(pictures)) == 9


def test_pictures_have_smooth_and_detailed_regions():
    """Shares of 4x4 tiles: without an edge, and with detail that a shrink by four loses."""
    random = Random(0)
    spread = []
    for _ in range(20):
        picture = scenes.detailed_picture(32, random).astype(float).mean(-1)
        spread.append(picture.reshape(8, 4, 8, 4).std(axis=(1, 3)).ravel())
    spread = np.concatenate(spread)
    assert 0.25 < (spread < 3).mean() < 0.6
    assert 0.2 < (spread > 15).mean() < 0.7


def test_the_default_folders_take_seconds(tmp_path):
    """Processor time, not the clock: 15 s is the limit on one slow core."""
    start = time.process_time()
    scenes.write_edits(tmp_path / "e", 0, train_rows=240, test_rows=48)
    scenes.write_super_resolution(tmp_path / "s", 0, train=120, test=24)
    assert time.process_time() - start < 3
