"""GRPO on trajectories (flow, later forecast): transformers.Trainer with credit and loss from core.objective.

One training step is one optimizer step, whole: where a new generation batch is due it is sampled, scored and given credit;
then the step's groups go through `model.forward` in micro-batches of rows and chunks of decisions. The sum of a step is
divided by its share of what the whole generation batch keeps, so neither the split nor the number of ranks changes its
gradient, and a kept rollout weighs the same in every update.

    generation batch, of one rank        update 1    update 2     (steps_per_batch=2; iterations=2 does both again)
    p0 p0 p0  p1 p1 p1  p2 p2 p2 ...  ->  p0 p0 p0  |  p1 p1 p1   whole groups, never shuffled: nothing needs it

A loss that looks at a whole rollout or group at once ("whole_rollouts", "whole_groups") is taken of all decisions without
gradient first, and its derivative is then carried back chunk by chunk (as in arXiv 2101.06983); others need one pass.

What a rollout draws depends on seed, generation batch and prompt alone. A checkpoint holds what stock forgets: a
generation batch that has steps left, averaged weights and the measured window.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
from accelerate.utils import gather
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from core import ranks
from core.app import Row, unknown
from core.config import Batch, Config, ConfigError, convert
from core.objective.composition import ASKED, NEEDS
from core.objective.group import Group
from core.objective.recipes import Recipe
from core.objective.rows import Counts, Loss, Metrics, Rows
from core.policy.flow import FlowPolicy, slices
from core.policy.trajectory import Decisions, Trajectory
from core.scoring import Scorer
from core.train.health import Guard

PROVIDES = frozenset(NEEDS) - {*ASKED, "ref_logps", "entropy"}
COUPLED = {"whole_rollouts", "whole_groups"}  # losses that look beyond one decision
ENOUGH = 0.9  # window=active: the share of the greatest variance that a shorter window must keep
MEMORY = "policy.pt"


def arguments(config: Config, batch: Batch, output: Path) -> TrainingArguments:
    """transformers' arguments from ours. Raises ConfigError if a field of `trainer:` is unknown or refused."""
    optim = config.optim
    ours = {
        "output_dir": str(output),
        "max_steps": optim.steps,
        "learning_rate": optim.lr,
        "lr_scheduler_type": optim.schedule,
        "warmup_steps": optim.warmup_steps,
        "max_grad_norm": optim.max_grad_norm,
        "weight_decay": optim.weight_decay,
        "per_device_train_batch_size": 1,  # of a loader that only counts the steps
        "gradient_accumulation_steps": 1,
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
    kinds = get_type_hints(TrainingArguments)
    theirs = {}
    for name, value in config.trainer.items():
        if name not in TrainingArguments.__dataclass_fields__:
            known = TrainingArguments.__dataclass_fields__
            raise ConfigError(unknown("field of transformers.TrainingArguments in trainer:", name, known))
        plain = {kinds[name], *get_args(kinds[name])} <= {bool, int, float, type(None), kinds[name]}
        theirs[name] = convert(value, kinds[name], f"trainer.{name}") if plain else value
    try:
        return TrainingArguments(**ours | theirs)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"transformers refuses the trainer's arguments: {error}") from error


def check(config: Config, batch: Batch, recipe: Recipe, weights: Mapping[str, float], outcome: str) -> None:
    """Raise ConfigError for what this trainer cannot do, before any work. weights: {component: weight}."""
    try:
        recipe.refuse(PROVIDES, weights, "the trajectory trainer")
        recipe.rehearse(weights, outcome)
    except ValueError as error:
        raise ConfigError(f"objective: {error}") from error
    if str(reduction := recipe.options.get("reduction")).endswith("_local"):
        raise ConfigError(
            f"objective.reduction={reduction} of recipe {recipe.name} depends on how a step is split; use token_mean or "
            f"sequence_mean"
        )
    rollout, size = config.rollout, batch.group
    if "renoised" in recipe.needs and rollout.shared_noise:
        raise ConfigError(
            f"recipe {recipe.name} samples without noisy steps: with rollout.shared_noise=true all rollouts of a group are one; "
            f"set rollout.shared_noise=false"
        )
    if rollout.window == "active" and not rollout.shared_noise:
        raise ConfigError(
            "rollout.window=active measures the spread that noisy steps make, which rollouts of different starts hide; set "
            "rollout.shared_noise=true, or window=first with a window_size"
        )
    if batch.prompts % batch.ranks:
        raise ConfigError(
            f"rollout.prompts_per_step={batch.prompts} does not divide over {batch.ranks} ranks; use a multiple of {batch.ranks}"
        )
    if "whole_groups" in recipe.needs and batch.micro % size:
        raise ConfigError(
            f"recipe {recipe.name} needs {NEEDS['whole_groups']}: optim.micro_batch={batch.micro} must be a multiple of "
            f"rollout.group_size={size}"
        )
    if config.launch.strategy != "ddp" or config.launch.sampler != "hf":
        raise ConfigError(
            f"launch: {{strategy: {config.launch.strategy}, sampler: {config.launch.sampler}}} is for language models; the "
            f"trajectory trainer has strategy=ddp and samples itself"
        )
    arguments(config, batch, Path())


class _Average(TrainerCallback):
    """Right after the optimizer's step, before evaluations and checkpoints: the averaged weights follow."""

    def __init__(self, policy: FlowPolicy, decay: float):
        self.policy, self.decay = policy, decay

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.policy.average(self.decay)


@dataclass
class _Update:
    """One optimizer step's share of a generation batch on this rank: rows `rows`, and counts (core.objective.rows.Counts)."""

    rows: slice
    kept_rows: float
    kept_decisions: float


class TrajectoryTrainer(Trainer):
    """See the module docstring.

    condition: row -> what the policy is given. rows: prepared rows; scorer: the reward components; weights: one a component.
    on_rollouts: called on the main process with (step, columns) once per generation batch; the column "output" holds the
    arrays of its first group and None elsewhere. on_not_finite: (step, rows) of an update that was skipped.
    """

    def __init__(
        self,
        *,
        policy: FlowPolicy,
        condition: Callable[[Row], Mapping[str, Any]],
        rows: Sequence[Row],
        scorer: Scorer,
        weights: Sequence[float],
        outcome: str,
        recipe: Recipe,
        config: Config,
        batch: Batch,
        output: Path,
        on_rollouts: Callable[[int, dict[str, list]], None] | None = None,
        on_not_finite: Callable[[int, list[dict[str, Any]]], Any] | None = None,
        callbacks: Sequence[Any] = (),
    ):
        check(config, batch, recipe, dict(zip(scorer.names, weights, strict=True)), outcome)
        self.prompts = batch.prompts * batch.steps_per_batch  # of a generation batch, over all ranks
        if len(rows) < self.prompts:
            raise ConfigError(
                f"{len(rows)} training prompts are fewer than the {self.prompts} of one generation batch; lower "
                f"rollout.prompts_per_step or give more data"
            )
        self.condition, self.rows, self.scorer, self.recipe = condition, rows, scorer, recipe
        self.config, self.batch, self.outcome, self.on_rollouts = config, batch, outcome, on_rollouts
        self.weights = torch.tensor(list(weights), dtype=torch.float32)
        self.guard = Guard(on_not_finite if ranks.is_main() else None)
        self.asks = recipe.all_needs
        if self.asks & {"divergence", "renoised"}:
            policy.keep_reference()
        self.trajectory: Trajectory | None = None  # the generation batch of this rank, while it has steps left
        self.credit: dict[str, Tensor] = {}  # its advantage, keep, group_id and a recipe's own rows
        self.logged: dict[str, list[float]] = defaultdict(list)
        super().__init__(
            model=policy,
            args=arguments(config, batch, output),
            train_dataset=[{"step": step} for step in range(config.optim.steps)],
            callbacks=[*([_Average(policy, config.optim.ema)] if config.optim.ema else []), *callbacks],
        )
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"{self.args.n_gpu} GPUs are visible to one process; GPUS={self.args.n_gpu} uses them all"
            )
        self.policy = policy

    def get_train_dataloader(self) -> DataLoader:
        """Counts the steps; `_prompts` decides which rows they see."""
        return DataLoader(self.train_dataset, batch_size=1, collate_fn=lambda steps: steps[0])

    # -- credit: once per generation batch, on whole groups of all ranks ------------------------------------------------

    @property
    def _updates(self) -> int:
        """Optimizer steps on one generation batch."""
        return self.batch.steps_per_batch * self.batch.iterations

    def _prompts(self, generation: int) -> list[tuple[int, int]]:
        """(row, seed) of this rank's prompts: for each update its share, in the order of the epoch's permutation."""
        per_epoch = len(self.rows) // self.prompts
        epoch, place = divmod(generation, per_epoch)
        chance = np.random.default_rng([self.args.seed, epoch])
        order = chance.permutation(len(self.rows))[place * self.prompts :][: self.prompts]
        seeds = np.random.default_rng([self.args.seed, generation, 1]).integers(2**62, size=self.prompts)
        share = self.batch.prompts // ranks.count()
        mine = [
            part * self.batch.prompts + ranks.index() * share + i
            for part in range(self.batch.steps_per_batch)
            for i in range(share)
        ]
        return [(int(order[i]), int(seeds[i])) for i in mine]

    def _generate(self, generation: int) -> None:
        """Samples, scores and credits a generation batch."""
        chosen = self._prompts(generation)
        rows = [self.rows[i] for i, _ in chosen]
        if self.policy.settings.window == "active" and self.policy.active is None:
            self._measure_window(rows, [seed for _, seed in chosen])
        self.trajectory = self.policy.rollout(
            [self.condition(row) for row in rows],
            self.batch.group,
            [seed for _, seed in chosen],
            batch=generation,
            batch_size=self._at_once,
            asks=self.asks,
        )
        if (self.policy.half or COUPLED & self.asks) and "renoised" not in self.asks:
            self._weigh_again()
        rewards, failed, reasons = self._score(self.trajectory, rows)
        self._give_credit(rewards, failed, rows, generation)
        self._report_rollouts(rewards, failed, reasons, rows)
        self.trajectory.outputs, self.trajectory.estimates = [], None

    def _weigh_again(self) -> None:
        """Old log-probabilities, and means, from `forward`'s own batches: the shape of a batch changes the last digits.

        In bfloat16 by more than a clip range; and a guard that asks whether a sequence became less likely takes a last digit
        for an answer.
        """
        sampled, state = self.trajectory.logps, self.trajectory.state
        with torch.no_grad():
            again = [
                _joined([self.policy(self.trajectory.rows(rows), steps) for steps in self._chunks()])[0]
                for rows in slices(len(sampled), self.batch.micro)
            ]
        self.trajectory.logps = torch.cat([part.logps.detach() for part in again])
        for name in state.keys() & again[0].extras.keys():  # what an extra is compared with
            state[name] = torch.cat([part.extras[name].detach() for part in again])
        self._log("sampler_deviation", float((self.trajectory.logps - sampled).abs().mean()))

    def _score(self, trajectory: Trajectory, rows: Sequence[Row]) -> tuple[Tensor, Tensor, list[dict[str, str]]]:
        """This rank's rewards (B, K), or (B, K, T) from the estimates of each decision; failed (B,); reasons of the outputs."""
        many = [row for row in rows for _ in range(self.batch.group)]
        dense = "aligned" in self.recipe.needs
        if dense and trajectory.estimates is None:
            raise ValueError(f"recipe {self.recipe.name} needs {NEEDS['aligned']}, and the policy gave no estimates")
        values, failed, metrics = [], torch.zeros(len(many), dtype=torch.bool), Counter()
        with ranks.together():
            for outputs in trajectory.estimates if dense else [trajectory.outputs]:
                scores = self.scorer.score(outputs, many, self.batch.group)
                values.append(torch.tensor(scores.values, dtype=torch.float32))
                failed |= torch.tensor(scores.failed)
                metrics.update(scores.metrics)  # adds up
        for name, value in metrics.items():
            self._log(name, float(value))
        rewards = torch.stack(values, dim=2) if dense else values[0]
        return rewards.to(self.args.device), failed.to(self.args.device), scores.reasons

    def _give_credit(self, rewards: Tensor, failed: Tensor, rows: Sequence[Row], generation: int) -> None:
        trajectory, size = self.trajectory, self.batch.group
        rewards, failed = gather(rewards), gather(failed)
        if self.config.run.control == "random_rewards":
            rewards = torch.rand(rewards.shape, generator=self._chance(generation)).to(rewards)
        tasks = ranks.gather([str(row.get("task")) for row in rows])
        group = Group(
            rewards=rewards.view(-1, size, *rewards.shape[1:]),
            weights=self.weights.to(rewards.device),
            mask=gather(trajectory.mask),
            old_logps=gather(trajectory.logps),
            aligned=True,
            failed=failed.view(-1, size),
            names=tuple(self.scorer.names),
            outcome=self.scorer.names.index(self.outcome),
            task=torch.tensor([sorted(set(tasks)).index(task) for task in tasks], device=rewards.device),
            seed=self.args.seed * 1_000_003 + generation,
        )
        credit = self.recipe.credit(group)
        advantage, keep = credit.advantage, credit.keep
        if self.config.run.control == "shuffled_advantages":
            kept = keep.nonzero().squeeze(1)
            order = torch.randperm(len(kept), generator=self._chance(generation)).to(kept.device)
            advantage = advantage.index_copy(0, kept, advantage[kept[order]])
        local = len(trajectory.logps)
        mine = slice(ranks.index() * local, (ranks.index() + 1) * local)
        self.whole = {"advantage": advantage, "keep": keep}
        self.credit = {
            "advantage": advantage[mine],
            "keep": keep[mine],
            "group_id": (torch.arange(len(keep), device=keep.device) // size)[mine],
            **{f"extra/{name}": value[mine] for name, value in credit.extras.items()},
            "kept": keep.sum(),  # of the whole generation batch
        }
        for name, value in credit.metrics.items():
            self._log(name, float(value))

    def _chance(self, generation: int) -> torch.Generator:
        """The controls' randomness: a function of seed and generation batch alone."""
        return torch.Generator().manual_seed(self.args.seed * 1_000_003 + generation)

    def _report_rollouts(
        self, rewards: Tensor, failed: Tensor, reasons: list[dict[str, str]], rows: Sequence[Row]
    ) -> None:
        rewards = rewards if rewards.dim() == 2 else rewards[:, :, -1]  # the last decision's is that of the output
        rewards, failed = gather(rewards).cpu(), gather(failed).cpu()
        many = [row for row in rows for _ in range(self.batch.group)]
        ids, prompts = (ranks.gather([str(row[name]) for row in many]) for name in ("id", "prompt"))
        reasons = ranks.gather(reasons)
        counted = self.weights != 0
        unscored = failed | rewards[:, counted].isnan().all(1)
        total = (rewards * self.weights).nansum(1).masked_fill(unscored, math.nan)
        groups = total.view(-1, self.batch.group)
        spread = (groups - groups.nanmean(1, keepdim=True)).square().nanmean(1).sqrt().nanmean()
        self._log("reward", float(total.nanmean()))
        self._log("reward_std", float(spread))
        for k, name in enumerate(self.scorer.names):
            known = rewards[:, k][~rewards[:, k].isnan() & ~failed]
            if len(known):
                self._log(f"rewards/{name}/mean", float(known.mean()))
                self._log(f"rewards/{name}/std", float(known.std(correction=0)))
        if not (self.on_rollouts and ranks.is_main()):
            return
        advantage = self.whole["advantage"].float()
        shown = self.trajectory.outputs[: self.batch.group]
        columns = {
            "prompt_id": ids,
            "prompt": prompts,
            "completion": [None] * len(ids),
            "output": shown + [None] * (len(ids) - len(shown)),
            "advantage": (advantage if advantage.dim() == 1 else advantage.mean(1)).tolist(),
            "keep": self.whole["keep"].tolist(),
            "reward": total.tolist(),
        }
        for k, name in enumerate(self.scorer.names):
            columns[f"reward/{name}"] = rewards[:, k].tolist()
            columns[f"reason/{name}"] = [said.get(name, "") for said in reasons]
        self.on_rollouts(self.state.global_step + 1, columns)

    def _measure_window(self, rows: Sequence[Row], seeds: Sequence[int]) -> None:
        """window=active: how many steps are worth being noisy, by the spread of rewards that they make within groups.

        The policy of now is sampled with the first k steps noisy, for every k; the smallest k that keeps ENOUGH of the
        greatest variance is taken (arXiv 2601.02356 keeps the steps of highest variance; the share is ours), and all steps if
        no rewards differ.
        """
        conditions, variance = [self.condition(row) for row in rows], []
        for k in range(1, len(self.policy.schedule)):
            made = self.policy.rollout(conditions, self.batch.group, seeds, batch_size=self._at_once, window=range(k))
            values, failed, _ = self._score(replace(made, estimates=[made.outputs]), rows)
            values = values if values.dim() == 2 else values[:, :, -1]
            total = (gather(values) * self.weights.to(values)).nansum(1).view(-1, self.batch.group)
            total = total[~gather(failed).view(total.shape).any(1)]
            variance.append(float(total.var(dim=1, correction=1).mean()) if len(total) else 0.0)
        enough = (k for k, v in enumerate(variance, 1) if v and v >= ENOUGH * max(variance))
        self.policy.active = next(enough, len(variance))
        self._log("active/steps", float(self.policy.active))
        for k, value in enumerate(variance, 1):
            self._log(f"active/variance_{k}", value)

    # -- loss: per micro-batch and chunk of decisions --------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """All of one optimizer step but the step itself. Returns the loss of this rank's share, detached."""
        began = time.monotonic()
        generation, turn = divmod(self.state.global_step, self._updates)
        if turn == 0:
            self._generate(generation)
            self._log("rollout_s", time.monotonic() - began)
        update = self._update(turn % self.batch.steps_per_batch)
        work = [
            slice(update.rows.start + rows.start, update.rows.start + rows.stop)
            for rows in slices(update.rows.stop - update.rows.start, self.batch.micro)
        ]
        total = torch.zeros((), device=self.args.device)
        sums: Metrics = {}
        for at, rows in enumerate(work):
            total += self._backward(model, rows, update, sums, last=at + 1 == len(work))
        for name, value in self._reduced(sums).items():
            self._log(name, value)
        if turn + 1 == self._updates:
            self.trajectory = None
        self._log("step_s", time.monotonic() - began)
        return total

    def _update(self, part: int) -> _Update:
        share = len(self.trajectory.logps) // self.batch.steps_per_batch
        kept = float(self.credit["kept"]) / self.batch.steps_per_batch
        decisions = kept * self.trajectory.logps.shape[1]
        return _Update(slice(part * share, (part + 1) * share), kept, decisions)

    @property
    def _at_once(self) -> int:
        """Rollouts sampled together: as many rows for the net as `forward` makes of a micro-batch, at most, with gradient."""
        return self.batch.micro * (self.config.optim.micro_steps or max(1, self.config.rollout.steps - 1))

    def _chunks(self) -> list[slice]:
        return slices(self.trajectory.logps.shape[1], self.config.optim.micro_steps)

    def _backward(self, model: nn.Module, rows: slice, update: _Update, sums: Metrics, last: bool) -> Tensor:
        """Adds the gradient of some rows; returns their loss. Ranks exchange gradients in the very last pass alone."""
        part, chunks = self.trajectory.rows(rows), self._chunks()

        def passes(steps: slice) -> contextlib.AbstractContextManager:
            return contextlib.nullcontext() if last and steps == chunks[-1] else self.accelerator.no_sync(model)

        if len(chunks) == 1 or not COUPLED & self.recipe.needs:
            total = torch.zeros((), device=self.args.device)
            for steps in chunks:
                with passes(steps):
                    loss = self._loss(model(part, steps), rows, steps, update)
                    value = self._value(loss)
                    self.accelerator.backward(value)
                self._note(loss, value, rows)
                _add(sums, loss.metrics)
                total += value.detach()
            return total
        with torch.no_grad():
            seen = [model(part, steps) for steps in chunks]
        whole, leaves = _joined(seen)
        loss = self._loss(whole, rows, slice(None), update)
        value = self._value(loss)
        slopes = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        slopes = {name: slope for name, slope in zip(leaves, slopes, strict=True) if slope is not None}
        for steps in chunks:
            with passes(steps):
                again = _fields(model(part, steps))
                self.accelerator.backward(sum((again[name] * slope[:, steps]).sum() for name, slope in slopes.items()))
        self._note(loss, value, rows)
        _add(sums, loss.metrics)
        return value.detach()

    def _loss(self, decisions: Decisions, rows: slice, steps: slice, update: _Update) -> Loss:
        """The recipe's loss of the decisions `steps` of some rows."""
        trajectory, credit = self.trajectory, self.credit
        advantage = credit["advantage"][rows]
        extras = {
            name.removeprefix("extra/"): value[rows] for name, value in credit.items() if name.startswith("extra/")
        }
        mask = trajectory.mask[rows]
        return self.recipe.loss(
            Rows(
                logps=decisions.logps,
                mask=mask[:, steps],
                advantage=advantage if advantage.dim() == 1 else advantage[:, steps],
                old_logps=trajectory.logps[rows][:, steps],
                keep=credit["keep"][rows],
                group_id=credit["group_id"][rows],
                entropy=decisions.entropy,
                weight=decisions.weight,
                lengths=mask.sum(1),
                counts=Counts(update.kept_rows, update.kept_decisions, mask.shape[1]),
                extras=extras | decisions.extras,
            )
        )

    def _value(self, loss: Loss) -> Tensor:
        """What is differentiated: ranks average their gradients, so each divides by its share of the count."""
        return loss.sum / (loss.count / self.accelerator.num_processes)

    def _note(self, loss: Loss, value: Tensor, rows: slice) -> None:
        """Tells the guard of rows whose loss is not finite."""
        if value.isfinite():
            return
        advantage = self.credit["advantage"][rows].float()
        advantage = advantage if advantage.dim() == 1 else advantage.mean(1)
        keep = self.credit["keep"][rows]
        self.guard.note([{"advantage": a, "keep": k} for a, k in zip(advantage.tolist(), keep.tolist(), strict=True)])

    def _get_grad_norm(self, model, grad_norm=None):
        """Right before the optimizer's step, with the norm over all ranks; without gradients that step does nothing."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        allowed = self.guard.allows(self.state.global_step + 1, float(grad_norm))
        if not allowed:
            model.zero_grad(set_to_none=True)
        self._log("skipped_updates", float(not allowed))
        return grad_norm

    # -- what is logged ---------------------------------------------------------------------------------------------------

    def _log(self, name: str, value: float) -> None:
        self.logged[name].append(value)

    def _reduced(self, sums: Metrics) -> dict[str, float]:
        """Means over all ranks, in one reduction."""
        if not sums:
            return {}
        flat = torch.stack([part.float() for pair in sums.values() for part in pair])
        pairs = self.accelerator.reduce(flat).view(-1, 2).tolist()
        return {name: total / count for name, (total, count) in zip(sums, pairs, strict=True) if count}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs |= {name: sum(values) / len(values) for name, values in self.logged.items()}
        self.logged.clear()
        if self.guard.in_a_row and "loss" in logs:
            logs["loss"] = math.nan  # transformers puts a finite number in its place (logging_nan_inf_filter)
        super().log(logs, start_time)

    # -- checkpoints: what stock forgets ----------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if ranks.is_main():
            self.policy.net.save(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.policy.net.restore(Path(resume_from_checkpoint))
        memory = self._read(Path(resume_from_checkpoint) / MEMORY)
        self.policy.remember(memory)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        state = {"ranks": ranks.count(), "trajectory": None, "credit": None}
        if self.trajectory is not None:
            kept = {name: getattr(self.trajectory, name) for name in ("logps", "mask", "state")}
            state |= {"trajectory": kept, "credit": self.credit}
        torch.save(state, self._generation_file(output_dir))
        if ranks.is_main():
            torch.save(self.policy.memory(), Path(output_dir) / MEMORY)
        self.accelerator.wait_for_everyone()  # trainer_state.json, which says that a checkpoint is whole, comes next

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # a rank that is asked to stop ends now, and its end may end the main one

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        path = self._generation_file(checkpoint)
        state = self._read(path) if path.exists() else {}
        written = ranks.gather([state.get("ranks", 0)])
        if set(written) != {ranks.count()}:
            raise ConfigError(
                f"{checkpoint} was written by {max(written) or 'other'} ranks and this run has {ranks.count()}; a run goes on "
                f"with as many as it began with (GPUS=), or starts again under another name (RUN=)"
            )
        if state["trajectory"] is not None:
            self.trajectory, self.credit = Trajectory(**state["trajectory"]), state["credit"]

    def _read(self, path: Path) -> dict[str, Any]:
        device = self.args.device
        place = (
            device.type if device.type == "cpu" else device
        )  # ranks without GPUs have cpu:0, which torch cannot load to
        return torch.load(path, map_location=place, weights_only=True)

    @staticmethod
    def _generation_file(checkpoint: str) -> Path:
        return Path(checkpoint) / f"generation_{ranks.index()}.pt"


def _add(sums: Metrics, more: Metrics) -> None:
    for name, (total, count) in more.items():
        before = sums.get(name, (0.0, 0.0))
        sums[name] = (before[0] + total, before[1] + count)


def _fields(decisions: Decisions) -> dict[str, Tensor]:
    """The tensors of decisions that may carry gradient, by name; (B, t, ...) each."""
    named = {field.name: getattr(decisions, field.name) for field in fields(decisions) if field.name != "extras"}
    return {name: value for name, value in {**named, **decisions.extras}.items() if value is not None}


def _joined(parts: Sequence[Decisions]) -> tuple[Decisions, dict[str, Tensor]]:
    """The decisions of all chunks as one, and its tensors as leaves of a graph."""
    named = [_fields(part) for part in parts]
    leaves = {name: torch.cat([part[name] for part in named], dim=1).requires_grad_() for name in named[0]}
    extras = {name: leaves[name] for name in parts[0].extras}
    return Decisions(leaves["logps"], leaves.get("entropy"), leaves.get("weight"), extras), leaves
