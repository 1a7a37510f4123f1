"""model/: what a run leaves for others. Loads in plain transformers (and vLLM) and says how it wants to be asked.

model/  config.json model.safetensors (or a PEFT adapter)  tokenizer files  prompt.json  README.md (model card)
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from core.app import App
from core.config import Config

CARD = """# {app}: {recipe}, seed {seed}

Trained with GRPO on verifiable rewards ({rewards}). {metric}: {before:.3f} before, {after:.3f} after, on {n} held-out rows.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")

`prompt.json` holds an example prompt and the task options. Base: {base}. Made for experiments; not checked for any other use.
"""


def export_model(folder: Path, model, tokenizer, app: App, config: Config, example: Any, weights: Any = None) -> Path:
    """Write model/ whole or not at all (beside its place, then renamed). weights: of a model that is spread over ranks."""
    target, part = folder / "model", folder / ".model.part"
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part, state_dict=weights)
    tokenizer.save_pretrained(part)
    form = {
        "app": app.name,
        "task": config.as_dict()["task"],
        "max_new_tokens": config.rollout.max_completion_length,
        "example_prompt": example,
    }
    (part / "prompt.json").write_text(json.dumps(form, indent=2, ensure_ascii=False) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    return target


def write_card(target: Path, summary: dict[str, Any], rewards: list[str], base: str) -> None:
    card = CARD.format(
        **{k: summary[k] for k in ("app", "recipe", "seed", "metric", "before", "after", "n")},
        rewards=", ".join(rewards),
        base=base,
    )
    (target / "README.md").write_text(card)
