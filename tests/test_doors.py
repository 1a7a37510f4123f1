"""The doors between the rooms, read from the imports of every file; and the names that no file may have."""

import ast
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("core", "rewards", "data", "apps")
FILES = sorted(path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py"))
VAGUE = {"utils", "helpers", "misc", "common"}


def imported(path: Path, everywhere: bool = True) -> set[str]:
    """Top-level packages that a file imports: anywhere, or only while it is being imported."""
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(path.parts[0] if node.level else node.module.split(".")[0])
        if everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(ast.parse((ROOT / path).read_text()))
    return found


def allowed(path: Path) -> set[str]:
    if path.parts[0] == "apps":
        return {"apps", "core", "rewards", "data"}
    if path.parts[:2] == ("data", "synthetic"):
        return {"data", "rewards"}
    return {path.parts[0]}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_through_open_doors(path):
    assert imported(path) & set(ROOMS) <= allowed(path)


def test_rewards_and_data_need_no_torch_to_be_imported():
    heavy = {"torch", "transformers", "trl", "datasets", "accelerate", "peft"}
    for path in FILES:
        if path.parts[0] in ("rewards", "data"):
            assert not imported(path, everywhere=False) & heavy, path


def test_the_objective_imports_nothing_but_torch():
    for path in FILES:
        if path.parts[:2] == ("core", "objective"):
            assert imported(path) <= {"core", "torch", *sys.stdlib_module_names}, path


def test_a_reward_worker_imports_only_the_standard_library():
    assert imported(Path("core/worker.py")) <= set(sys.stdlib_module_names)


def test_only_one_file_of_core_touches_the_trainer_of_trl():
    users = {str(path) for path in FILES if "GRPOTrainer" in (ROOT / path).read_text().replace("trl.GRPOTrainer", "")}
    assert users == {"core/train/language.py"}


def test_no_file_has_a_name_that_says_nothing():
    assert not [path for path in FILES if VAGUE & {*path.parts, path.stem}]


def test_pyproject_installs_the_four_rooms_and_nothing_else():
    include = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {str(p.relative_to(ROOT)).replace("/", ".") for p in ROOT.iterdir() if p.is_dir()}
    packages |= {".".join(p.parent.parts) for p in FILES}
    found = {name for name in packages if any(fnmatch(name, pattern) for pattern in include)}
    assert {name.split(".")[0] for name in found} == set(ROOMS)
    assert found >= {".".join(p.parent.parts) for p in FILES}
    assert not [folder for folder in {p.parent for p in FILES} if not (ROOT / folder / "__init__.py").exists()]


def test_tests_are_no_packages_and_core_runs_nothing_when_imported():
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert (ROOT / "core/__init__.py").read_text() == ""


def test_the_reader_of_imports_sees_what_it_must(tmp_path):
    file = tmp_path / "file.py"
    file.write_text("import a.b\nfrom c.d import e\nif x:\n    import f\ndef g():\n    from h import i\n")
    assert imported(file) == {"a", "c", "f", "h"}
    assert imported(file, everywhere=False) == {"a", "c", "f"}
