"""model/: what a run leaves for others. It says how it is loaded and how it wants to be asked.

model/  config.json and weights as safetensors (or a PEFT adapter)  tokenizer files  prompt.json  README.md (model card)

A language model loads in plain transformers and vLLM; a flow through its own save_pretrained.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from core.run.actor import Actor

CARD = """# {app}: {recipe}, seed {seed}

Trained with GRPO on verifiable rewards ({rewards}). {metric}: {before:.3f} before, {after:.3f} after, on {n} held-out rows.

{card}
`prompt.json` holds an example prompt and the task options. Base: {base}. Made for experiments; not checked for any other use.
"""


def export_model(folder: Path, actor: Actor, example: Any, weights: Any = None) -> Path:
    """Write model/ whole or not at all (beside its place, then renamed). weights: of a model that is spread over ranks."""
    target, part = folder / "model", folder / ".model.part"
    shutil.rmtree(part, ignore_errors=True)
    actor.save(part, weights)
    form = {
        "app": actor.app.name,
        "task": actor.config.as_dict()["task"],
        **actor.form(),
        "example_prompt": example,
    }
    (part / "prompt.json").write_text(json.dumps(form, indent=2, ensure_ascii=False) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    return target


def write_card(target: Path, actor: Actor, summary: dict[str, Any], rewards: list[str]) -> None:
    card = CARD.format(
        **{k: summary[k] for k in ("app", "recipe", "seed", "metric", "before", "after", "n")},
        rewards=", ".join(rewards),
        card=actor.card,
        base=actor.config.model.path,
    )
    (target / "README.md").write_text(card)
