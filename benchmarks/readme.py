"""Tables of an app's README that a script writes, each between two marks of its own."""

from core import app as apps
from core.run.folder import RunFolder


def rewrite(app: str, mark: str, text: str) -> None:
    """`text` takes the place of all between <!-- mark --> and <!-- /mark --> in apps/<app>/README.md."""
    readme, marks = apps.folder(app) / "README.md", (f"<!-- {mark} -->", f"<!-- /{mark} -->")
    head, rest = readme.read_text().split(marks[0])
    _, tail = rest.split(marks[1])
    RunFolder(readme.parent).write_text(readme.name, f"{head}{marks[0]}\n\n{text}\n\n{marks[1]}{tail}")
