"""The supervised start: imitation of demonstrations through TRL's SFTTrainer, cached by a hash of all that it depends on.

What is imitated is gold, or what the app's annotator would have written, mistakes included (`App.demonstrations`): a start
at its own plateau has the faults of its data, and more of the same data does not mend them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from core.policy.language import Prompt


def imitate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    output: Path,
    on_log: Callable[[int, dict[str, Any]], None] | None = None,
    seconds: float | None = None,
    prompt_loss: bool = False,
) -> PreTrainedModel:
    """Train `model` in place to complete each prompt with its completion.

    prompt_loss: the loss is on the prompt too, not on the completion alone.

    steps: optimizer steps (cosine schedule, 5 % warm-up); seconds: if given, stop after this wall time at constant rate.
    """
    if len(prompts) != len(completions) or not prompts:
        raise ValueError(f"{len(prompts)} prompts and {len(completions)} completions; both must be equal and not 0")
    chat = not isinstance(prompts[0], str)
    data = Dataset.from_dict(
        {
            "prompt": list(prompts),
            "completion": [[{"role": "assistant", "content": c}] if chat else c for c in completions],
        }
    )
    disable_progress_bars()
    arguments = SFTConfig(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        lr_scheduler_type="constant_with_warmup" if seconds else "cosine",
        warmup_steps=max(1, steps // 20) if not seconds else 10,
        weight_decay=0.0,
        adam_beta2=0.98,
        seed=seed,
        data_seed=seed,
        max_length=None,
        completion_only_loss=not prompt_loss,
        train_sampling_strategy="group_by_length",
        logging_steps=max(1, steps // 20),
        logging_nan_inf_filter=False,  # else a loss of NaN is shown as 0
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=model.dtype == torch.bfloat16,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # GPUS=n: one process makes the start, and sees the GPUs of all ranks

    class Report(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if on_log and logs and "loss" in logs:
                on_log(state.global_step, {"loss": logs["loss"], "token_accuracy": logs.get("mean_token_accuracy")})

    callbacks = [Report()] + ([_StopAfter(seconds)] if seconds else [])
    with quiet():
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=callbacks
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model


class _StopAfter(TrainerCallback):
    """Stops a training run after so many seconds."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= time.monotonic() > self.end


@contextlib.contextmanager
def quiet():
    """Libraries' notes, bars and deprecation warnings off for the duration; their errors, and all of ours, still show."""
    from transformers.utils import logging as hf

    names = ["transformers", "trl", "accelerate", "datasets"]
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    bars = hf.is_progress_bar_enabled()
    hf.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars:
            hf.enable_progress_bar()


def cache_key(*parts: Any) -> str:
    """A short hash of everything a start depends on."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
