"""Super-resolution pairs in folders named as DIV2K names them (Agustsson and Timofte 2017; for academic research).

    DIV2K_train_HR/0001.png     DIV2K_train_LR_bicubic/X4/0001x4.png     -> "train"
    DIV2K_valid_HR/0801.png     DIV2K_valid_LR_bicubic/X4/0801x4.png     -> "test", for DIV2K keeps the test pictures
    train_HR/a.png              train_LR/a.png                           -> "train"; any `<split>_HR`, `<split>_LR...`

`load(folder)` gives a row for each low-resolution picture: several scales and degradations (LR_bicubic, LR_unknown,
LR_mild, ...) are rows of one scene each; keep in the folder what is to be used. The scale is that of the folder
(X4) or the name (0001x4, 0001x4m), else the ratio of the sizes. Sources, licences and how to bring other data into this
form: data/README.md. `data.synthetic.scenes.write_super_resolution` writes it. Loading downloads nothing and reads
the headers of images only. Not read: folders of low-resolution pictures without a high-resolution partner folder.
"""

import re
from pathlib import Path

from .image_header import image_size

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


def load(folder: str | Path) -> dict[str, list[dict]]:
    """{split: rows} of a folder of `<split>_HR` and `<split>_LR...` folders; "valid" is "test" where no test_HR is.

    A row: id ("test-0801x4", with the degradation where there are several), source (absolute path, low resolution),
    target (high resolution), scale (whole number: the target has exactly scale times the source's width and height),
    scene (name of the high-resolution picture; rows of one scene are one cluster).

    Raises FileNotFoundError for a missing folder or partner, ValueError for sizes that do not fit; both name the fix.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder; give the folder that holds DIV2K_train_HR, DIV2K_train_LR_bicubic, ... "
            "(data/README.md shows the layout; data.synthetic.scenes.write_super_resolution makes one offline)"
        )
    prefixes = sorted(path.name.removesuffix("_HR") for path in folder.glob("*_HR") if path.is_dir())
    if not prefixes:
        raise FileNotFoundError(
            f"{folder} holds no folder <split>_HR; super-resolution needs pairs such as DIV2K_train_HR and "
            "DIV2K_train_LR_bicubic/X4 (data/README.md shows the layout)"
        )
    names = {prefix: prefix.removeprefix("DIV2K_") for prefix in prefixes}
    splits: dict[str, list[dict]] = {}
    for prefix, split in names.items():
        if split == "valid" and "test" not in names.values():
            split = "test"
        if split in splits:
            raise ValueError(f'{folder} holds two folders for split "{split}", {prefix}_HR and another; keep one')
        splits[split] = _split(folder, prefix, split)
    return splits


def _split(folder: Path, prefix: str, split: str) -> list[dict]:
    high = {path.stem: path for path in _images(folder / f"{prefix}_HR")}
    low_folders = sorted(path for path in folder.glob(f"{prefix}_LR*") if path.is_dir())
    if not high or not low_folders:
        raise FileNotFoundError(
            f"{folder / f'{prefix}_HR'} "
            + ("has no folder" if high else "holds no image for")
            + f" {prefix}_LR... beside it; every <split>_HR needs images and a folder <split>_LR or <split>_LR_bicubic/X4"
        )
    sizes = {path: image_size(path) for path in high.values()}
    rows: dict[str, dict] = {}
    for low in low_folders:
        degradation = f"{low.name.removeprefix(f'{prefix}_LR').strip('_')}-" if len(low_folders) > 1 else ""
        places = [low, *sorted(path for path in low.glob("X*") if path.is_dir())]
        for place in places:
            paths = _images(place)
            partners = {path: _partner(path, high, folder / f"{prefix}_HR") for path in paths}
            if paths and (alone := sorted(set(high) - set(partners.values()))):
                raise FileNotFoundError(
                    f"{high[alone[0]]} has no low-resolution partner in {place} ({len(alone)} such); "
                    f"add {alone[0]}{paths[0].suffix} there or remove the high-resolution image"
                )
            for path, name in partners.items():
                scale = _scale(path, place, name, high[name], sizes[high[name]])
                label = path.stem if path.stem != name else f"{name}x{scale}"
                row = {
                    "id": f"{split}-{degradation}{label}",
                    "source": str(path),
                    "target": str(high[name]),
                    "scale": scale,
                    "scene": f"{split}-{name}",
                }
                if (other := rows.setdefault(row["id"], row)) is not row:
                    raise ValueError(f"{path} and {other['source']} are one image at one scale; remove one of them")
    if not rows:
        raise FileNotFoundError(f"{low_folders[0]} holds no image; put the low-resolution images into it or into X4/")
    return list(rows.values())


def _partner(path: Path, high: dict[str, Path], where: Path) -> str:
    """The name of the high-resolution image: that of the path, without its x4 or x4m if need be."""
    shorter = re.sub(r"x\d+[a-z]?\d*$", "", path.stem)
    for name in (path.stem, shorter):
        if name in high:
            return name
    raise FileNotFoundError(
        f"{path} has no high-resolution partner {shorter} in {where}; add it or remove the low-resolution image"
    )


def _scale(path: Path, place: Path, name: str, target: Path, size: tuple[int, int]) -> int:
    folder, suffix = re.fullmatch(r"X(\d+)", place.name), re.fullmatch(r"x(\d+)[a-z]?\d*", path.stem.removeprefix(name))
    if folder and suffix and folder[1] != suffix[1]:
        raise ValueError(f"{path} says x{suffix[1]} in its name, but lies in {place.name}; rename or move it")
    low = image_size(path)
    told = folder or suffix
    scale = int(told[1]) if told else max(2, round(size[0] / low[0]))
    if (low[0] * scale, low[1] * scale) != size:
        raise ValueError(
            f"{path} has {low[0]}x{low[1]} pixels, and {scale} times that is not the {size[0]}x{size[1]} of {target}; "
            "crop the high-resolution image to a multiple of the scale and shrink it again"
        )
    return scale


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES)
