"""Twenty bfloat16 LoRA steps of a 0.5B Qwen2 with random weights, by apps/text_to_sql/gpu.yaml: tokens a second, peak memory.

    python -P benchmarks/gpu_lora.py [--smoke] [--output FOLDER]      writes results/gpu_lora.json

Needs a GPU, or --smoke, which runs three steps of a very small model wherever it is, to see that it runs. Weights are
random so that nothing is downloaded; a random model never ends its answers, so every completion has full length, and
run.control=random_rewards gives the groups spread. Not in `make bench`: it is a figure of one card, not a ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from core import app as apps
from core.main import main as command
from core.policy.tiny import build_tokenizer
from core.run.folder import RunFolder
from core.run.summary import git_revision

HALF_BILLION = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151_936, "max_position_embeddings": 32_768, "tie_word_embeddings": True,
}  # fmt: skip
SMALL = HALF_BILLION | {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1024,
}  # fmt: skip
WARM = 5  # first steps that are not counted: allocator, kernels, caches


def main(arguments: list[str] | None = None) -> None:
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--smoke", action="store_true")
    parse.add_argument("--output", type=Path, default=Path("results"))
    options = parse.parse_args(arguments)
    if not torch.cuda.is_available() and not options.smoke:
        parse.error("no GPU is visible; --smoke tries the script without one")
    steps, output = (3, options.output.absolute()) if options.smoke else (20, options.output.absolute())
    overrides = (
        f"optim.steps={steps} launch.sampler=hf run.control=random_rewards run.force_cpu=true evaluate.every=0 "
        "evaluate.samples=0 data.train_rows=640 data.test_rows=8 rollout.max_completion_length=256"
    )
    if options.smoke:
        overrides += " rollout.prompts_per_step=2 rollout.group_size=4 optim.micro_batch=4 data.train_rows=16"
        overrides = overrides.replace("max_completion_length=256", "max_completion_length=8")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        apps.find("text_to_sql").write_offline(Path("data"), 0)
        write_model(Path("model"), SMALL if options.smoke else HALF_BILLION)
        given = ["--app", "text_to_sql", "--config", "gpu", "--data", "data", "--model", "model", "--run", "lora"]
        if command(["train", *given, "--set", overrides]):
            raise SystemExit("the run did not end well")
        run = RunFolder(Path("runs") / "text_to_sql" / "lora")
        lines = [line for line in run.read_metrics() if "step_s" in line][min(WARM, steps - 1) :]
        rollout = run.config["rollout"]
    rollouts = rollout["prompts_per_step"] * rollout["group_size"]
    gpu = torch.cuda.is_available()
    RunFolder(output).write_json(
        "gpu_lora.json",
        {
            "model": "Qwen2 shape of 0.5B, random weights, bfloat16, LoRA" if not options.smoke else "smoke",
            "steps": len(lines),
            "rollouts_a_step": rollouts,
            "seconds_a_step": float(np.median([line["step_s"] for line in lines])),
            "completion_tokens_a_second": float(
                np.median([rollouts * line["completion_length"] / line["step_s"] for line in lines])
            ),
            "peak_gpu_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
            "machine": {"gpu": torch.cuda.get_device_name() if gpu else None, "torch": torch.__version__},
            "command": "python -P benchmarks/gpu_lora.py" + " --smoke" * options.smoke,
            "git": git_revision(),
        },
    )
    print(json.dumps(json.loads((output / "gpu_lora.json").read_text()), indent=2))


def write_model(folder: Path, shape: dict) -> None:
    tokenizer = build_tokenizer(["SELECT count(*) FROM singer WHERE age > 20 ORDER BY name"] * 20, 1024)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(
            Qwen2Config(
                **shape, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None
            )
        )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
