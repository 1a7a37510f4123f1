"""The loader on hand-written folders: what it reads, what it fills in, and what it refuses, in words."""

import json

import pytest
from PIL import Image

from data.edit_folder import load, moved, resized

BOX = [8, 4, 16, 10]


def line(**changes) -> dict:
    return {"source": "a/in.png", "instruction": "move the cup 4 pixels to the left", "geometry": geometry()} | changes


def geometry(**changes) -> dict:
    given = {"operation": "translate", "object": "cup", "box": BOX, "direction": "left", "distance": 4} | changes
    return {key: value for key, value in given.items() if value is not None}


def resize(**changes) -> dict:
    return geometry(**{"operation": "resize", "direction": None, "distance": None} | changes)


def rotate(**changes) -> dict:
    return geometry(**{"operation": "rotate", "direction": None, "distance": None} | changes)


def put(folder, *lines, split="train") -> None:
    text = "".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in lines)
    (folder / f"{split}.jsonl").write_text(text)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").mkdir()
    for name, size in (("in", (32, 24)), ("out", (32, 24)), ("mask", (32, 24)), ("small", (16, 12))):
        Image.new("RGB", size).save(tmp_path / "a" / f"{name}.png")
    (tmp_path / "a" / "text.png").write_text("no image")
    put(tmp_path, line())
    return tmp_path


def one(folder, **changes) -> dict:
    put(folder, line(**changes))
    return load(folder)["train"][0]


def test_a_whole_line_gives_every_column(folder):
    given = geometry(
        target_box=[4, 4, 12, 10], mask="a/mask.png", target_mask="a/mask.png", colour=[200, 0, 0], palette=[[0, 0, 0]]
    )
    put(folder, line(id="x", target="a/out.png", geometry=given, scene="kitchen", novel=True), split="test")
    assert load(folder)["test"] == [
        {
            "id": "x",
            "source": str(folder / "a" / "in.png"),
            "target": str(folder / "a" / "out.png"),
            "instruction": "move the cup 4 pixels to the left",
            "operation": "translate",
            "object": "cup",
            "box": BOX,
            "target_box": [4, 4, 12, 10],
            "direction": "left",
            "distance": 4,
            "angle": None,
            "factor": None,
            "mask": str(folder / "a" / "mask.png"),
            "target_mask": str(folder / "a" / "mask.png"),
            "colour": [200, 0, 0],
            "palette": [[0, 0, 0]],
            "scene": "kitchen",
            "novel": True,
        }
    ]


def test_a_bare_line_has_none_where_nothing_is_said(folder):
    row = one(folder, geometry={"operation": "translate", "object": "cup", "direction": "up"})
    assert (row["id"], row["scene"], row["novel"]) == ("train-00000", "a/in.png", False)
    keys = ("target", "box", "target_box", "distance", "angle", "factor", "mask", "target_mask", "colour", "palette")
    assert [row[key] for key in keys] == [None] * len(keys)


def test_rows_of_one_source_are_one_scene_however_its_path_is_written(folder):
    put(folder, line(), "", line(source="a/../a/./in.png"))
    first, second = load(folder)["train"]
    assert (first["scene"], first["source"]) == (second["scene"], second["source"])
    assert second["id"] == "train-00001"


def test_a_split_for_every_file(folder):
    put(folder, line(), line(), split="test")
    assert {split: len(rows) for split, rows in load(folder).items()} == {"train": 1, "test": 2}


@pytest.mark.parametrize(
    ("given", "filled"),
    [
        (geometry(), {"target_box": [4, 4, 12, 10]}),
        (geometry(direction="down", distance=5), {"target_box": [8, 9, 16, 15]}),
        (geometry(direction=None, distance=None, target_box=[8, 1, 16, 7]), {"direction": "up", "distance": 3}),
        (geometry(distance=None, target_box=[3, 4, 11, 10]), {"direction": "left", "distance": 5}),
        (geometry(target_box=[5, 4, 13, 10]), {"target_box": [5, 4, 13, 10], "distance": 4}),  # a pixel is rounding
        (geometry(direction="down", target_box=[4, 8, 12, 14]), {"direction": "down"}),  # on the diagonal both are so
        (resize(factor=1.5), {"target_box": [6, 2, 18, 11]}),
        (resize(factor=0.5), {"target_box": [10, 5, 14, 8]}),
        (resize(target_box=[4, 1, 20, 13]), {"factor": 2}),
        (rotate(angle=-90), {"target_box": None, "angle": -90}),
    ],
)
def test_what_follows_is_filled_in(folder, given, filled):
    row = one(folder, geometry=given)
    assert {key: row[key] for key in filled} == filled


def test_boxes_after_an_edit():
    assert moved([1, 2, 3, 5], "right", 7) == [8, 2, 10, 5]
    assert resized([10, 10, 20, 20], 1.5) == [7, 7, 22, 22]
    assert resized([10, 10, 20, 20], 0.6) == [12, 12, 18, 18]
    assert resized([0, 0, 1, 3], 0.1) == [0, 1, 1, 2]


def test_a_resize_keeps_the_centre_to_half_a_pixel():
    for side in range(1, 20):
        for factor in (0.3, 0.6, 1.5, 2.7):
            box = resized([50, 40, 50 + side, 45], factor)
            assert abs(box[0] + box[2] - 100 - side) <= 1
            assert abs(box[2] - box[0] - max(1, factor * side)) <= 0.5 + 1e-9


REFUSED = [
    (line(geometry=geometry(operation="translat")), ["'translat'", "did you mean 'translate'", "resize"]),
    (line(geometry=geometry(operation=["translate"])), ["\"geometry.operation\" is ['translate']"]),
    (line(geometry=geometry(direction="Left ")), ["'Left '", "did you mean 'left'", "down"]),
    (line(geometry=geometry(direction=1)), ['"geometry.direction" is 1', "known: left"]),
    (line(taget="a/out.png"), ["'taget'", "did you mean 'target'"]),
    (line(geometry=geometry(bbox=BOX)), ["key of geometry is 'bbox'", "did you mean 'box'"]),
    (line(source=None), ['no "source"']),
    (line(instruction=None), ['no "instruction"']),
    (line(instruction=" "), ["\"instruction\" is ' '", "text"]),
    (line(instruction=7), ['"instruction" is 7']),
    (line(geometry=None), ['no "geometry"']),
    (line(geometry=[1]), ['"geometry" is [1]', "object"]),
    (line(geometry=geometry(operation=None)), ['no "geometry.operation"']),
    (line(geometry=geometry(object=None)), ['no "geometry.object"']),
    (line(geometry=geometry(object=3)), ['"geometry.object" is 3']),
    (line(id=4), ['"id" is 4']),
    (line(scene=4), ['"scene" is 4']),
    (line(novel=1), ['"novel" is 1', "true or false"]),
    (line(source="../in.png"), ["'../in.png'", "leaves the folder"]),
    (line(target="a/../../in.png"), ['"target"', "leaves the folder"]),
    (line(geometry=geometry(mask="/etc/passwd")), ['"mask"', "leaves the folder"]),
    (line(source="a/text.png"), ['"source"', "text.png does not open as an image", "copy it again"]),
    (line(target="a/small.png"), ['"target"', "16x12", "32x24", "resize it"]),
    (line(geometry=geometry(target_mask="a/small.png")), ['"target_mask"', "16x12"]),
    (line(geometry=geometry(box=[1, 2, 3])), ['"geometry.box" is [1, 2, 3]', "[x1, y1, x2, y2]"]),
    (line(geometry=geometry(box=[1, 2, 3, "4"])), ['"geometry.box"']),
    (line(geometry=geometry(box=[1, 2, True, 4])), ['"geometry.box"']),
    (line(geometry=geometry(box=[1, 2, 3, float("nan")])), ['"geometry.box"']),
    (line(geometry=geometry(box=[9, 2, 3, 4])), ['"geometry.box" is [9, 2, 3, 4]', "x1 < x2"]),
    (line(geometry=geometry(box=[1, 2, 33, 4])), ["[1, 2, 33, 4]", "not inside the image of 32x24"]),
    (line(geometry=geometry(target_box=[0, 20, 8, 25])), ['"geometry.target_box"', "32x24"]),
    (line(geometry=geometry(distance=0)), ['"geometry.distance" is 0', "above 0"]),
    (line(geometry=geometry(distance="4")), ["\"geometry.distance\" is '4'"]),
    (line(geometry=geometry(distance=9)), ['"geometry.distance" 9', "[-1, 4, 7, 10]", "32x24"]),
    (line(geometry=geometry(direction=None)), ['no "geometry.direction"', "target_box"]),
    (line(geometry=geometry(factor=2)), ['"geometry.factor" is 2', "'translate'", "'resize'"]),
    (line(geometry=geometry(angle=2)), ['"geometry.angle" is 2', "'rotate'"]),
    (line(geometry=geometry(target_box=[12, 4, 20, 10])), ["'left'", "lies right"]),
    (line(geometry=geometry(target_box=[6, 4, 14, 10])), ['"geometry.distance" is 4', "2 pixels left"]),
    (line(geometry=geometry(target_box=[7, 3, 17, 11])), ["centre", "moves it"]),
    (line(geometry=resize()), ['no "geometry.factor"']),
    (line(geometry=resize(factor=1)), ['"geometry.factor" is 1', "not 1"]),
    (line(geometry=resize(factor=-2)), ['"geometry.factor" is -2']),
    (line(geometry=resize(factor=3.5)), ['"geometry.factor" 3.5', "out of the image"]),
    (line(geometry=resize(factor=1.5, target_box=[4, 1, 20, 13])), ['"geometry.factor" 1.5', "2 and 2"]),
    (line(geometry=resize(target_box=[4, 4, 20, 10])), ["needs one factor", "2 and 1"]),
    (line(geometry=resize(target_box=[9, 4, 17, 10])), ["as large as"]),
    (line(geometry=rotate()), ['no "geometry.angle"']),
    (line(geometry=rotate(angle=0)), ['"geometry.angle" is 0']),
    (line(geometry=rotate(angle=360)), ['"geometry.angle" is 360']),
    (line(geometry=geometry(colour=[1, 2])), ['"geometry.colour" holds [1, 2]']),
    (line(geometry=geometry(colour=[1, 2, 256])), ["256", "0 to 255"]),
    (line(geometry=geometry(colour=[0.5, 0, 0])), ["0.5"]),
    (line(geometry=geometry(palette=[])), ['"geometry.palette" is []']),
    (line(geometry=geometry(palette=[[1, 2, 3], 4])), ['"geometry.palette" holds 4']),
    (line(geometry=geometry(colour=[1, 2, 3], palette=[[0, 0, 0], [1, 2, 3]])), ["names a colour twice"]),
    ("[1]", ["holds a list"]),
    ("{", ["is not JSON"]),
]


@pytest.mark.parametrize(("entry", "says"), REFUSED, ids=range(len(REFUSED)))
def test_a_wrong_line_is_refused_by_file_and_number(folder, entry, says):
    put(folder, line(), entry)
    with pytest.raises(ValueError) as raised:
        load(folder)
    for word in (str(folder / "train.jsonl"), "line 2", *says):
        assert word in str(raised.value)


def test_a_missing_image_names_line_key_and_path(folder):
    put(folder, line(target="a/gone.png"))
    with pytest.raises(FileNotFoundError, match=r'train\.jsonl, line 1: "target" is \'a/gone\.png\'.*no file'):
        load(folder)


def test_an_image_may_be_no_folder(folder):
    put(folder, line(source="."))
    with pytest.raises(FileNotFoundError, match="no file"):
        load(folder)


def test_ids_differ_over_all_splits(folder):
    put(folder, line(id="x"))
    put(folder, line(), line(id="x"), split="test")
    with pytest.raises(ValueError, match=r'line 1: "id" is \'x\', which .*test\.jsonl, line 2 has too'):
        load(folder)


def test_folders_without_rows_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder.*train\.jsonl"):
        load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"no \.jsonl file"):
        load(tmp_path)
    put(tmp_path, "")
    with pytest.raises(ValueError, match=r"train\.jsonl holds no line"):
        load(tmp_path)


def test_the_loader_reads_no_pixels(folder):
    """A picture cut off after its header has a size all the same."""
    whole = (folder / "a" / "in.png").read_bytes()
    (folder / "a" / "in.png").write_bytes(whole[:45])
    assert one(folder)["box"] == BOX
