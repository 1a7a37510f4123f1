"""An app to break: say a word again. A run takes about two seconds; its rewards fail on demand (faulty_rewards.py)."""

import json
from pathlib import Path

import faulty_rewards as rewards

from core.app import App, Language

WORDS = [a + b + c for a in "bdk" for b in "aeo" for c in "lmnr"]


def write_offline(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True)
    for split, words in (("train", WORDS[:28]), ("test", WORDS[28:])):
        rows = [{"id": f"{split}-{i}", "word": word} for i, word in enumerate(words)]
        (folder / f"{split}.json").write_text(json.dumps(rows))


APP = App(
    name="faulty",
    acts=Language(prompt=lambda row: f"say {row['word']} :"),
    load=lambda folder: {path.stem: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))},
    write_offline=write_offline,
    gold=lambda row: f" {row['word']}",
    demonstrations=lambda rows, seed: [f" {row['word']}" for row in rows],
    rewards={"likeness": (1.0, rewards.likeness), "brevity": (0.2, rewards.brevity)},
    outcome="likeness",
    metrics={"exact": rewards.exact},
)
