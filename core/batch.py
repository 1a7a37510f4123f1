"""The arithmetic of a step: what follows from prompts per step, group size, micro-batch and ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from core.config import Config, ConfigError


@dataclass(frozen=True)
class Batch:
    """The derived arithmetic of one step, so that every rank's generation batch is a whole number of groups.

    group: rollouts sampled for a prompt, of which `extra` are not trained on.
    rollouts: B = prompts x group of one optimizer step over all ranks; micro: rollouts per forward on one rank;
    accumulation: micro-batches of one step on one rank; generation: rollouts sampled at once over all ranks.
    """

    prompts: int
    group: int
    ranks: int
    micro: int
    steps_per_batch: int
    iterations: int
    extra: int = 0

    @classmethod
    def of(cls, config: Config, ranks: int = 1, extra_rollouts: int = 0) -> Self:
        """Derive the batch; extra_rollouts: sampled beside each group. Raises ConfigError with the values that would work."""
        rollout, micro = config.rollout, config.optim.micro_batch
        if extra_rollouts and (rollout.group_size + extra_rollouts) % 2 == 0:
            raise ConfigError(
                f"rollout.group_size={rollout.group_size} and {extra_rollouts} more have no median among them; use an even "
                f"group_size"
            )
        group = rollout.group_size + extra_rollouts
        rollouts = rollout.prompts_per_step * group
        if rollout.prompts_per_step * rollout.steps_per_batch % ranks:
            raise ConfigError(
                f"rollout.prompts_per_step={rollout.prompts_per_step} x steps_per_batch={rollout.steps_per_batch} does not "
                f"divide over {ranks} ranks; every rank needs whole groups, so use a multiple of {ranks}"
            )
        if rollouts % ranks:
            raise ConfigError(f"{rollouts} rollouts a step do not divide over {ranks} ranks")
        share = rollouts // ranks
        micro = share if micro is None else micro
        if micro < 1 or share % micro:
            fits = [n for n in range(1, share + 1) if share % n == 0]
            raise ConfigError(
                f"optim.micro_batch={micro} does not divide the {share} rollouts of a rank "
                f"(prompts_per_step={rollout.prompts_per_step} x {group} completions / {ranks}); "
                f"use one of {', '.join(map(str, fits))}"
            )
        return cls(
            rollout.prompts_per_step, group, ranks, micro, rollout.steps_per_batch, rollout.iterations, extra_rollouts
        )

    @property
    def rollouts(self) -> int:
        return self.prompts * self.group

    @property
    def accumulation(self) -> int:
        return self.rollouts // (self.micro * self.ranks)

    @property
    def generation(self) -> int:
        return self.rollouts * self.steps_per_batch

    @property
    def updates(self) -> int:
        """Optimizer steps on one generation batch."""
        return self.steps_per_batch * self.iterations

    def line(self) -> str:
        """The derivation, in one line."""
        group = f"{self.group} completions"
        if self.extra:
            group = (
                f"({self.group - self.extra} + {self.extra}) completions, {self.group - self.extra} of them trained on,"
            )
        fresh = "fresh rollouts every step"
        if self.updates > 1:
            fresh = (
                f"{self.generation} rollouts sampled at once for {self.updates} steps "
                f"({self.steps_per_batch} parts x {self.iterations} passes)"
            )
        return (
            f"{self.prompts} prompts x {group} = {self.rollouts} rollouts a step; "
            f"{self.ranks} rank{'s' * (self.ranks > 1)} x {self.accumulation} micro-batch{'es' * (self.accumulation > 1)} "
            f"of {self.micro}; {fresh}"
        )
