"""make new APP=x: the files of a new app, from core/run/new_app/, ready for `make check` and `make train` as they are."""

from __future__ import annotations

import importlib.util
import keyword
from importlib.resources import files
from pathlib import Path
from string import Template

from core.app import AppError, names


def write_app(name: str) -> str:
    """Write apps/<name>/{app,rewards}.py and tiny.yaml. Returns what to do next. Raises AppError if the name will not do."""
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower():
        raise AppError(f"APP={name} is not a name for an app: use lower-case letters, digits and _, like text_to_sql")
    if name in names():
        raise AppError(f"apps/{name} exists already")
    folder = Path(importlib.util.find_spec("apps").submodule_search_locations[0]) / name
    folder.mkdir()
    title = name.replace("_", " ").capitalize()
    (folder / "__init__.py").write_text(f'"""{title}."""\n')
    for template in sorted((files("core.run") / "new_app").iterdir(), key=lambda path: path.name):
        text = Template(template.read_text()).substitute(name=name, title=title)
        (folder / template.name.removesuffix(".txt")).write_text(text)
    return f"{folder.parent.name}/{name}/ is written. Try it: make check APP={name}; make train APP={name}"
