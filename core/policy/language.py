"""Language models: loading one by folder or hub id, and completing prompts with it.

Loading never runs remote code unless `model.remote_code` says so, and takes weights as safetensors only. Completing sorts
prompts by length, so one setting gives one padding and greedy answers are the same on every call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from core.config import ConfigError, Model
from core.train.health import finite_sampling

Prompt = str | list[dict[str, str]]


def load(settings: Model, path: str | Path | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer of `path` (default settings.path), on the CPU or the current GPU, left-padded.

    Raises ConfigError with the likely reason if it cannot be loaded.
    """
    path = str(path or settings.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", trust_remote_code=settings.remote_code)
        if (Path(path) / "adapter_config.json").exists():
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(path, dtype=getattr(torch, settings.dtype))
        else:
            model = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=getattr(torch, settings.dtype),
                trust_remote_code=settings.remote_code,
                use_safetensors=True,
            )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"MODEL={path} cannot be loaded: it is neither a folder with config.json, tokenizer and safetensors weights "
            f"nor a hub id that is in reach (offline, only folders and cached models are). {str(error).splitlines()[0]}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def render(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """The text that the model sees: plain prompts as they are, chat messages through the chat template."""
    if isinstance(prompt, str):
        return prompt
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


@dataclass(frozen=True)
class Sampling:
    """temperature 0 = greedy. max_new_tokens counts the end token."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 64
    seed: int = 0


@torch.no_grad()
def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], sampling: Sampling
) -> tuple[list[str], list[bool]]:
    """One completion a prompt, and whether it was cut off before the end token; in the order of the prompts.

    The caller's random state is left as it was.
    """
    texts = [render(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
    completions, truncated = [""] * len(texts), [False] * len(texts)
    style = {"do_sample": False}
    if sampling.temperature > 0:
        style = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(sampling.seed)
        for start in range(0, len(order), sampling.batch_size):
            chosen = order[start : start + sampling.batch_size]
            batch = tokenizer(
                [texts[i] for i in chosen],
                return_tensors="pt",
                padding=True,
                padding_side="left",
                return_token_type_ids=False,
                add_special_tokens=isinstance(prompts[chosen[0]], str),
            ).to(model.device)
            with finite_sampling("evaluation"):
                output = model.generate(
                    **batch,
                    **style,
                    max_new_tokens=sampling.max_new_tokens,
                    eos_token_id=sorted(ends),
                    pad_token_id=tokenizer.pad_token_id,
                    use_cache=True,
                )
            answers = output[:, batch["input_ids"].shape[1] :]
            for i, ids in zip(chosen, answers, strict=True):
                completions[i] = tokenizer.decode(ids, skip_special_tokens=True)
                truncated[i] = not any(int(t) in ends for t in ids)
    model.train(training)
    return completions, truncated


def context_length(model) -> float:
    """Tokens that the model has positions for, prompt and completion together; infinite if its config does not say."""
    config = model.config.get_text_config()
    scaling = getattr(config, "rope_parameters", None) or {}
    return getattr(config, "max_position_embeddings", math.inf) * max(1.0, scaling.get("factor") or 1.0)
