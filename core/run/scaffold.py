"""make new APP=x: the two files of a new app, ready to run `make check` and `make train` before anything is changed."""

from __future__ import annotations

import importlib.util
import keyword
from pathlib import Path

from core.app import AppError, names

APP = '''"""{title}: what the task is, how it is scored, where scoring runs.

This skeleton asks for a word backwards. Replace the data, the rewards and the metric; everything else is the core's.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from apps.{name}.rewards import same_letters, solved
from core.app import App, Language, Row, Rows

ALPHABET = "abcdefgh"


def write_offline(folder: Path, seed: int) -> None:
    """A folder in the real data set's on-disk format, deterministic from the seed. {{"id", "word"}} a line."""
    random = Random(seed)
    folder.mkdir(parents=True)
    for split, count in (("train", 2000), ("test", 200)):
        words = ("".join(random.choices(ALPHABET, k=random.randint(2, 4))) for _ in range(count))
        lines = (json.dumps({{"id": f"{{split}}-{{i}}", "word": word}}) for i, word in enumerate(words))
        (folder / f"{{split}}.jsonl").write_text("\\n".join(lines) + "\\n")


def load(folder: Path) -> dict[str, list[Row]]:
    """{{split: rows}} from local files; columns: id, word."""
    files = {{split: Path(folder) / f"{{split}}.jsonl" for split in ("train", "test")}}
    return {{split: [json.loads(line) for line in path.read_text().splitlines()] for split, path in files.items()}}


def prompt(row: Row) -> str:
    return "word : " + " ".join(row["word"]) + "\\nbackwards :"


def gold(row: Row) -> str:
    return " " + " ".join(reversed(row["word"]))


def first_word(train: Rows, test: Rows) -> list[str]:
    """The free rival: always the same answer."""
    return [gold(train[0]) for _ in test]


APP = App(
    name="{name}",
    acts=Language(prompt=prompt),
    load=load,
    write_offline=write_offline,
    gold=gold,
    demonstrations=lambda rows, seed: [gold(row) for row in rows],
    rewards={{"solved": (1.0, solved), "same_letters": (0.3, same_letters)}},
    outcome="solved",
    metrics={{"accuracy": solved}},
    baselines={{"first word": first_word}},
)
'''

REWARDS = '''"""Rewards of {name}: plain functions; dataset columns arrive by name; values lie in [0, 1]."""

from rewards.score import Score


def _letters(text: str) -> str:
    return "".join(text.split())


def solved(completion: str, *, word: str) -> Score:
    """1 if the completion is the word backwards."""
    right = _letters(completion) == word[::-1]
    return Score(float(right), "solved" if right else "wrong")


def same_letters(completion: str, *, word: str) -> Score:
    """1 if the completion uses the word's letters, in any order."""
    return Score(float(sorted(_letters(completion)) == sorted(word)))
'''

CONFIG = """# A 0.3M-parameter model from nothing; a minute or two on one core.
model: {path: tiny, width: 96, layers: 2, vocabulary: 300}
data: {test: test, validation_share: 0}
warmup: {labels: gold, rows: 400, steps: 150, batch_size: 32, lr: 3e-3, prompt_loss: true}
rollout: {prompts_per_step: 8, group_size: 8, max_prompt_length: 64, max_completion_length: 12}
optim: {steps: 60, lr: 3e-4}
evaluate: {every: 0}
trainer: {gradient_checkpointing: false}
"""


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
    (folder / "app.py").write_text(APP.format(name=name, title=title))
    (folder / "rewards.py").write_text(REWARDS.format(name=name))
    (folder / "tiny.yaml").write_text(CONFIG)
    return f"apps/{name}/ written: app.py, rewards.py, tiny.yaml. Try it: make check APP={name}; make train APP={name}"
