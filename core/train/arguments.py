"""trl's arguments from ours: one place where a key of the config becomes a field of trl.GRPOConfig."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from trl import GRPOConfig

from core.app import unknown
from core.config import Batch, Config, ConfigError, Launch, convert
from core.objective.composition import NEEDS
from core.objective.recipes import Recipe

# What the language trainer gives a recipe that needs it.
PROVIDES = frozenset(NEEDS) - {"aligned", "drift", "renoised", "whole_groups", "divergence"}


def arguments(config: Config, batch: Batch, recipe: Recipe, output: Path) -> GRPOConfig:
    """trl's arguments from ours. Raises ConfigError if a field of `trainer:` is unknown or refused by TRL."""
    rollout, optim = config.rollout, config.optim
    ours = {
        "output_dir": str(output),
        "max_steps": optim.steps,
        "learning_rate": optim.lr,
        "lr_scheduler_type": optim.schedule,
        "warmup_steps": optim.warmup_steps,
        "max_grad_norm": optim.max_grad_norm,
        "weight_decay": optim.weight_decay,
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
        "seed": config.run.seed,
        "data_seed": config.run.seed,
        "bf16": config.model.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_vllm": config.launch.sampler != "hf",
        "vllm_max_model_length": rollout.max_prompt_length + rollout.max_completion_length,
        "vllm_mode": "server" if config.launch.sampler == "vllm_server" else "colocate",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": config.run.save_every,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level_replica": "error",
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        **_spread(config.launch),
    }
    if recipe.options.get("entropy_coef") and config.trainer.get("entropy_coef"):
        raise ConfigError(
            "objective.entropy_coef and trainer.entropy_coef would both add an entropy bonus; keep the first"
        )
    kinds = get_type_hints(GRPOConfig)
    theirs = {}
    for name, value in config.trainer.items():
        if name not in GRPOConfig.__dataclass_fields__:
            raise ConfigError(unknown("field of trl.GRPOConfig in trainer:", name, GRPOConfig.__dataclass_fields__))
        plain = {kinds[name], *get_args(kinds[name])} <= {bool, int, float, type(None), kinds[name]}
        theirs[name] = convert(value, kinds[name], f"trainer.{name}") if plain else value
    try:
        return GRPOConfig(**ours | theirs)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"trl refuses the trainer's arguments: {error}") from error


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
    """Raise ConfigError if `count` training prompts do not fill one generation batch: TRL would train zero steps."""
    needed = batch.generation // batch.group
    if count < needed:
        raise ConfigError(
            f"{count} training prompts are fewer than the {needed} of one generation batch "
            f"(prompts_per_step={batch.prompts} x steps_per_batch={batch.steps_per_batch}); TRL would train zero steps. "
            f"Lower rollout.prompts_per_step or give more data"
        )
