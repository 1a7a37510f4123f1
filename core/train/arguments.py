"""A trainer's arguments from ours: one place where a key of the config becomes a field of trl.GRPOConfig.

What transformers' and trl's trainers have in common is here too; core/train/trajectory_arguments.py adds the former's own.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from trl import GRPOConfig

from core.app import unknown
from core.batch import Batch
from core.config import Config, ConfigError, Launch, convert
from core.objective.composition import GIVES
from core.objective.recipes import Recipe

PROVIDES = GIVES["language"]


def shared(config: Config, output: Path) -> dict[str, Any]:
    """The fields of transformers.TrainingArguments that every trainer has from us."""
    optim = config.optim
    return {
        "output_dir": str(output),
        "max_steps": optim.steps,
        "learning_rate": optim.lr,
        "lr_scheduler_type": optim.schedule,
        "warmup_steps": optim.warmup_steps,
        "max_grad_norm": optim.max_grad_norm,
        "weight_decay": optim.weight_decay,
        "seed": config.run.seed,
        "data_seed": config.run.seed,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": config.run.save_every,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level_replica": "error",
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
    }


def theirs(config: Config, kind: type, name: str) -> dict[str, Any]:
    """The config's `trainer:` section as fields of `kind`, a dataclass of arguments that is called `name`.

    Raises ConfigError if it has no such field, or if a plain value is of another type.
    """
    kinds, found = get_type_hints(kind), {}
    for field, value in config.trainer.items():
        if field not in kind.__dataclass_fields__:
            raise ConfigError(unknown(f"field of {name} in trainer:", field, kind.__dataclass_fields__))
        plain = {kinds[field], *get_args(kinds[field])} <= {bool, int, float, type(None), kinds[field]}
        found[field] = convert(value, kinds[field], f"trainer.{field}") if plain else value
    return found


@contextlib.contextmanager
def refused_in_words(who: str) -> Iterator[None]:
    """ConfigError in place of what a library raises on arguments that it refuses."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"{who} refuses the trainer's arguments: {error}") from error


def arguments(config: Config, batch: Batch, recipe: Recipe, output: Path) -> GRPOConfig:
    """trl's arguments from ours. Raises ConfigError if a field of `trainer:` is unknown or refused by TRL."""
    rollout = config.rollout
    ours = shared(config, output) | {
        "per_device_train_batch_size": batch.micro,
        "gradient_accumulation_steps": batch.accumulation,
        "steps_per_generation": batch.accumulation * batch.steps_per_batch,
        "num_iterations": batch.iterations,
        "num_generations": batch.group,
        "max_completion_length": rollout.max_completion_length,
        "temperature": rollout.temperature,
        "top_p": rollout.top_p,
        "top_k": rollout.top_k,
        "beta": float(recipe.options.get("beta") or 0.0),
        "scale_rewards": "none",
        "bf16": config.model.dtype == "bfloat16",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_vllm": config.launch.sampler != "hf",
        "vllm_max_model_length": rollout.max_prompt_length + rollout.max_completion_length,
        "vllm_mode": "server" if config.launch.sampler == "vllm_server" else "colocate",
        **_spread(config.launch),
    }
    if recipe.options.get("entropy_coef") and config.trainer.get("entropy_coef"):
        raise ConfigError(
            "objective.entropy_coef and trainer.entropy_coef would both add an entropy bonus; keep the first"
        )
    given = ours | theirs(config, GRPOConfig, "trl.GRPOConfig")
    with refused_in_words("trl"):
        return GRPOConfig(**given)


def _spread(launch: Launch) -> dict[str, Any]:
    """The arguments that spread a model over ranks. Raises ConfigError if the file cannot be read."""
    if launch.strategy == "ddp":
        return {}
    path = Path(launch.file or Path(__file__).parent / "launch" / f"{launch.strategy}.json")
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"launch.file={path} is not a readable JSON file of {launch.strategy}: {error}") from error
    return {"fsdp": True, "fsdp_config": settings} if launch.strategy == "fsdp" else {"deepspeed": settings}


def refuse_recipe(recipe: Recipe, weights: Mapping[str, float], outcome: str, config: Config) -> None:
    """Raise ConfigError if the language trainer cannot give what the recipe needs, with these components' weights."""
    try:
        recipe.refuse(PROVIDES, weights, "the language trainer")
        recipe.rehearse(weights, outcome)
    except ValueError as error:
        raise ConfigError(f"objective: {error}") from error
    if "teacher" in recipe.needs and config.run.control == "shuffled_advantages":
        raise ConfigError(
            f"recipe {recipe.name} also learns from right answers that a teacher sees, and run.control=shuffled_advantages "
            f"shuffles advantages alone; use run.control=random_rewards"
        )
    if "teacher" in recipe.needs and config.launch.strategy != "ddp":
        raise ConfigError(
            f"recipe {recipe.name} has a teacher with weights of its own, and launch.strategy={config.launch.strategy} "
            f"spreads the policy's; use launch.strategy=ddp"
        )


def refuse_few_prompts(count: int, batch: Batch) -> None:
    """Raise ConfigError if `count` training prompts do not fill one generation batch: no step could be made."""
    needed = batch.prompts * batch.steps_per_batch
    if count < needed:
        raise ConfigError(
            f"{count} training prompts are fewer than the {needed} of one generation batch (prompts_per_step={batch.prompts} x "
            f"steps_per_batch={batch.steps_per_batch}). Lower rollout.prompts_per_step or give more data"
        )
