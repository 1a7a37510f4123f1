"""The loader on small folders in DIV2K's layout and in the plain one."""

import pytest
from PIL import Image

from data.super_resolution import load


def put(folder, path: str, width: int, height: int) -> None:
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(folder / path)


@pytest.fixture
def folder(tmp_path):
    for split, names in (("train", ("0001", "0002")), ("valid", ("0801",))):
        for name in names:
            put(tmp_path, f"DIV2K_{split}_HR/{name}.png", 24, 12)
            put(tmp_path, f"DIV2K_{split}_LR_bicubic/X4/{name}x4.png", 6, 3)
    return tmp_path


def test_valid_is_the_test_split_and_a_row_has_its_pair(folder):
    splits = load(folder)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 2, "test": 1}
    assert splits["test"] == [
        {
            "id": "test-0801x4",
            "source": str(folder / "DIV2K_valid_LR_bicubic" / "X4" / "0801x4.png"),
            "target": str(folder / "DIV2K_valid_HR" / "0801.png"),
            "scale": 4,
            "scene": "test-0801",
        }
    ]


def test_every_scale_is_a_row_of_the_same_scene(folder):
    for name in ("0001", "0002"):
        put(folder, f"DIV2K_train_LR_bicubic/X2/{name}x2.png", 12, 6)
    rows = load(folder)["train"]
    assert [(row["id"], row["scale"], row["scene"]) for row in rows if "0001" in row["id"]] == [
        ("train-0001x2", 2, "train-0001"),
        ("train-0001x4", 4, "train-0001"),
    ]


def test_degradations_are_rows_too_and_their_ids_say_so(folder):
    for name in ("0801x4w1", "0801x4w2"):
        put(folder, f"DIV2K_valid_LR_wild/{name}.png", 6, 3)
    rows = load(folder)["test"]
    assert [row["id"] for row in rows] == ["test-bicubic-0801x4", "test-wild-0801x4w1", "test-wild-0801x4w2"]
    assert {row["scene"] for row in rows} == {"test-0801"}


def test_plain_folders_tell_the_scale_by_folder_or_size(tmp_path):
    for name in ("bo", "box4"):  # the second is no "bo" at x4
        put(tmp_path, f"train_HR/{name}.png", 24, 12)
        put(tmp_path, f"train_LR/{name}.png", 8, 4)
    put(tmp_path, "test_HR/b.png", 24, 12)
    put(tmp_path, "test_LR/X2/b.png", 12, 6)
    splits = load(tmp_path)
    assert [(row["id"], row["scale"]) for row in splits["train"]] == [("train-box3", 3), ("train-box4x3", 3)]
    assert [(row["id"], row["scale"]) for row in splits["test"]] == [("test-bx2", 2)]


def test_valid_keeps_its_name_beside_a_test_split(folder):
    put(folder, "DIV2K_test_HR/0901.png", 24, 12)
    put(folder, "DIV2K_test_LR_bicubic/X4/0901x4.png", 6, 3)
    assert sorted(load(folder)) == ["test", "train", "valid"]


def test_low_resolution_alone_is_no_split(folder):
    put(folder, "DIV2K_test_LR_bicubic/X4/0901x4.png", 6, 3)
    assert sorted(load(folder)) == ["test", "train"]


def remove(path):
    def harm(folder):
        (folder / path).unlink()

    return harm


HR, LR = "DIV2K_train_HR/", "DIV2K_train_LR_bicubic/X4/"


@pytest.mark.parametrize(
    ("harm", "error", "says"),
    [
        (remove(LR + "0002x4.png"), FileNotFoundError, ["0002.png has no low-resolution partner", "X4", "add 0002"]),
        (remove(HR + "0002.png"), FileNotFoundError, ["0002x4.png has no high-resolution partner 0002 in"]),
        (lambda f: put(f, LR + "0001x4.png", 6, 4), ValueError, ["6x4", "4 times", "24x12", "crop"]),
        (lambda f: put(f, HR + "0001.png", 26, 12), ValueError, ["6x3", "26x12", "multiple of the scale"]),
        (lambda f: put(f, "DIV2K_train_LR_x8/0001x8.png", 3, 1), FileNotFoundError, ["0002.png", "LR_x8"]),
        (
            lambda f: (f / LR / "0001x4.png").rename(f / LR / "0001x2.png"),
            ValueError,
            ["0001x2.png says x2", "lies in X4"],
        ),
        (lambda f: put(f, LR + "0001.png", 6, 3), ValueError, ["0001.png are one image at one scale"]),
        (lambda f: (f / HR / "0001.png").write_text("no"), ValueError, ["0001.png does not open as an image"]),
        (lambda f: put(f, "train_HR/1.png", 24, 12), ValueError, ['two folders for split "train"']),
        (lambda f: put(f, "more_HR/1.png", 24, 12), FileNotFoundError, ["more_HR has no folder more_LR"]),
        (lambda f: (f / "more_HR").mkdir(), FileNotFoundError, ["more_HR holds no image"]),
        (
            lambda f: (put(f, "more_HR/1.png", 24, 12), (f / "more_LR").mkdir()),
            FileNotFoundError,
            ["more_LR holds no image"],
        ),
    ],
)
def test_damaged_folder_is_refused_in_words(folder, harm, error, says):
    harm(folder)
    with pytest.raises(error) as raised:
        load(folder)
    for word in says:
        assert word in str(raised.value)


def test_equal_sizes_are_no_pair(tmp_path):
    put(tmp_path, "train_HR/a.png", 24, 12)
    put(tmp_path, "train_LR/a.png", 24, 12)
    with pytest.raises(ValueError, match="2 times that is not the 24x12"):
        load(tmp_path)


def test_missing_folder_says_what_belongs_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder.*DIV2K_train_HR"):
        load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no folder <split>_HR"):
        load(tmp_path)
