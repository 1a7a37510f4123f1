"""transformers' arguments from ours, and what the trajectory trainer refuses before any work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import TrainingArguments

from core.batch import Batch
from core.config import Config, ConfigError
from core.objective.composition import NEEDS
from core.objective.recipes import Recipe
from core.policy.trajectory import TrajectoryModule
from core.train.arguments import refused_in_words, shared, theirs


def arguments(config: Config, output: Path) -> TrainingArguments:
    """transformers' arguments from ours. Raises ConfigError if a field of `trainer:` is unknown or refused."""
    given = shared(config, output) | {
        "per_device_train_batch_size": 1,  # of a loader that only counts the steps
        "gradient_accumulation_steps": 1,
    }
    given |= theirs(config, TrainingArguments, "transformers.TrainingArguments")
    with refused_in_words("transformers"):
        return TrainingArguments(**given)


def check(
    config: Config,
    batch: Batch,
    recipe: Recipe,
    weights: Mapping[str, float],
    outcome: str,
    policy: type[TrajectoryModule],
) -> None:
    """Raise ConfigError for what the trainer of this kind of policy cannot do. weights: {component: weight}."""
    try:
        recipe.refuse(policy.provides, weights, "the trajectory trainer")
        recipe.rehearse(weights, outcome)
    except ValueError as error:
        raise ConfigError(f"objective: {error}") from error
    if str(reduction := recipe.options.get("reduction")).endswith("_local"):
        raise ConfigError(
            f"objective.reduction={reduction} of recipe {recipe.name} depends on how a step is split; use token_mean or "
            f"sequence_mean"
        )
    policy.refuse(recipe, config.rollout)
    if batch.prompts % batch.ranks:
        raise ConfigError(
            f"rollout.prompts_per_step={batch.prompts} does not divide over {batch.ranks} ranks; use a multiple of {batch.ranks}"
        )
    if "whole_groups" in recipe.needs and batch.micro % batch.group:
        raise ConfigError(
            f"recipe {recipe.name} needs {NEEDS['whole_groups']}: optim.micro_batch={batch.micro} must be a multiple of "
            f"rollout.group_size={batch.group}"
        )
    if config.launch.strategy != "ddp" or config.launch.sampler != "hf":
        raise ConfigError(
            f"launch: {{strategy: {config.launch.strategy}, sampler: {config.launch.sampler}}} is for language models; the "
            f"trajectory trainer has strategy=ddp and samples itself"
        )
    arguments(config, Path())
