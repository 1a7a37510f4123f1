"""What `make predict` is asked: JSON lines, or a folder of pictures. Names and paths come from outside and are not trusted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.app import App, Row
from core.config import ConfigError

PICTURES = (".png", ".jpg", ".jpeg")
NAME = re.compile(r"\w[\w .()+=-]{0,99}")  # of an answer's file: no folder, no hidden file, nothing a shell reads


def read_lines(source: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(where, number, object) of each line of a JSON-lines file. Raises ConfigError naming file and line."""
    for number, line in enumerate(source.read_text("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            request = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where} is not a JSON object: {error}") from error
        if not isinstance(request, dict):
            raise ConfigError(f"{where} is not a JSON object: {line[:60]}")
        yield where, number, request


def row_of(app: App, request: dict[str, Any], where: str) -> Row:
    """The row that the app makes of a request. Raises ConfigError naming where it stands."""
    if app.predict is None:
        raise ConfigError(f"app {app.name} has no predict: it answers no free questions")
    try:
        return {"id": request["id"], **app.predict(request)}
    except KeyError as error:
        raise ConfigError(f"{where} lacks the key {error.args[0]!r}") from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"{where}: {error}") from error


def read_pictures(app: App, folder: Path) -> tuple[list[dict[str, Any]], list[Row]]:
    """Requests of a folder, and the app's rows; the app gets "source" as a path that can be opened.

    Either requests.jsonl, one {"id", "source", ...} a line, its sources below the folder; or every picture there is, with
    its instruction in the text file of its name: {"id": "cat", "source": "cat.png", "instruction": text of cat.txt}.
    Raises ConfigError for a name that is not fit for a file or comes twice, a source outside of the folder or that is no
    picture, and whatever the app refuses.
    """
    listed, found = folder / "requests.jsonl", []
    if listed.is_file():
        found = [(where, {"id": f"line-{number}", **request}) for where, number, request in read_lines(listed)]
    else:
        for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES):
            text = path.with_suffix(".txt")
            said = {"instruction": _text(text)} if text.is_file() else {}
            found.append((str(path), {"id": path.stem, "source": path.name, **said}))
    if not found:
        raise ConfigError(
            f"INPUT={folder} holds neither requests.jsonl nor a picture; put cat.png and its instruction cat.txt there"
        )
    seen = set()
    for where, request in found:
        name = request["id"]
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ConfigError(f"{where}: the id {name!r} names the answer's file; use letters, digits, _ and - alone")
        if name.casefold() in seen:
            raise ConfigError(f"{where}: the id {name!r} comes twice, and its answers would be one file")
        seen.add(name.casefold())
    rows = [row_of(app, request | {"source": str(_inside(folder, request, where))}, where) for where, request in found]
    return [request for _, request in found], rows


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except ValueError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from error


def _inside(folder: Path, request: dict[str, Any], where: str) -> Path:
    """The picture of a request. Raises ConfigError unless it is one, and lies below the folder."""
    from PIL import Image

    source = request.get("source")
    if not isinstance(source, str):
        raise ConfigError(f"{where} lacks the key 'source', the name of a picture in {folder}")
    try:
        path = (folder / source).resolve()
        inside = path.is_relative_to(folder.resolve()) and path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        inside = False
    if not inside:
        raise ConfigError(f"{where}: source {source!r} is no file inside of {folder}; copy the picture there")
    try:
        with Image.open(path) as picture:
            picture.load()
    except Exception as error:  # whatever a broken picture makes of a decoder
        raise ConfigError(f"{where}: source {source!r} is not a picture that can be read: {error}") from error
    return path
