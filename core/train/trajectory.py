"""GRPO on trajectories (flow, forecast): transformers.Trainer with credit and loss from core.objective.

One training step is one optimizer step, whole: where a new generation batch is due it is sampled, scored and given credit;
then the step's groups go through `model.forward` in micro-batches of rows and chunks of decisions. The sum of a step is
divided by its share of what the whole generation batch keeps, so neither the split nor the number of ranks changes its
gradient, and a kept rollout weighs the same in every update.

    generation batch, of one rank        update 1    update 2     (steps_per_batch=2; iterations=2 does both again)
    p0 p0 p0  p1 p1 p1  p2 p2 p2 ...  ->  p0 p0 p0  |  p1 p1 p1   whole groups, never shuffled: nothing needs it

A loss that looks at a whole rollout or group at once ("whole_rollouts", "whole_groups") is taken of all decisions without
gradient first, and its derivative is then carried back chunk by chunk (as in arXiv 2101.06983); others need one pass.

Rewards of single decisions come from arrays that a reward gave (forecasts), else from what each decision promises the output
to be (flows); a recipe that does not ask for them gets one reward a rollout, the mean.

What a rollout draws depends on seed, generation batch and prompt alone. A checkpoint holds what stock forgets: a
generation batch that has steps left, and what the policy remembers beside its weights.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from core import ranks
from core.app import Row
from core.batch import Batch
from core.config import Config, ConfigError
from core.objective.group import Group
from core.objective.recipes import Recipe
from core.objective.rows import Counts, Loss, Metrics, Rows
from core.policy.trajectory import Decisions, Trajectory, TrajectoryModule, slices
from core.scoring import Scorer, Scores
from core.train.arguments import refuse_few_prompts
from core.train.health import Guard
from core.train.rollouts import columns, per_rollout, total_rewards
from core.train.trajectory_arguments import arguments, check

COUPLED = {"whole_rollouts", "whole_groups"}  # losses that look beyond one decision
MEMORY = "policy.pt"


class _Average(TrainerCallback):
    """Right after the optimizer's step, before evaluations and checkpoints: the averaged weights follow."""

    def __init__(self, policy: TrajectoryModule, decay: float):
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
        policy: TrajectoryModule,
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
        check(config, batch, recipe, dict(zip(scorer.names, weights, strict=True)), outcome, type(policy))
        refuse_few_prompts(len(rows), batch)
        self.prompts = batch.prompts * batch.steps_per_batch  # of a generation batch, over all ranks
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
            args=arguments(config, output),
            train_dataset=[{"step": step} for step in range(config.optim.steps)],
            callbacks=[*([_Average(policy, config.optim.ema)] if config.optim.ema else []), *callbacks],
        )
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"{self.args.n_gpu} GPUs are visible to one process; GPUS={self.args.n_gpu} uses them all"
            )
        self.policy = policy

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """The components' weights from the next generation batch on, {component: weight}."""
        self.weights = torch.tensor([weights[name] for name in self.scorer.names], dtype=torch.float32)

    def get_train_dataloader(self) -> DataLoader:
        """Counts the steps; `_prompts` decides which rows they see."""
        return DataLoader(self.train_dataset, batch_size=1, collate_fn=lambda steps: steps[0])

    # -- credit: once per generation batch, on whole groups of all ranks ------------------------------------------------

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
        rows, seeds = [self.rows[i] for i, _ in chosen], [seed for _, seed in chosen]
        acting = [self.condition(row) for row in rows], self.batch.group, seeds
        if self.policy.unmeasured:
            measured = self.policy.measure(*acting, batch_size=self._at_once, judge=partial(self._totals, rows))
            for name, value in measured.items():
                self._log(name, value)
        self.trajectory = self.policy.rollout(*acting, batch=generation, batch_size=self._at_once, asks=self.asks)
        if (self.policy.half or COUPLED & self.asks) and "renoised" not in self.asks:
            self._weigh_again()
        rewards, judged = self._judge(rows)
        self._give_credit(rewards, judged["failed"], rows, generation)
        self._report_rollouts(judged, rows)
        self.trajectory.outputs, self.trajectory.estimates = [], None

    def _weigh_again(self) -> None:
        """Old log-probabilities, and means, from `forward`'s own batches: the shape of a batch changes the last digits.

        In bfloat16 by more than a clip range; and a guard that asks whether a sequence became less likely takes a last digit
        for an answer.
        """
        sampled, state = self.trajectory.logps, self.trajectory.state
        with torch.no_grad():
            again = [
                Decisions.joined([self.policy(self.trajectory.rows(rows), steps) for steps in self._chunks()])[0]
                for rows in slices(len(sampled), self.batch.micro)
            ]
        self.trajectory.logps = torch.cat([part.logps.detach() for part in again])
        for name in state.keys() & again[0].extras.keys():  # what an extra is compared with
            state[name] = torch.cat([part.extras[name].detach() for part in again])
        self._log("sampler_deviation", float((self.trajectory.logps - sampled).abs().mean()))

    def _score(self, versions: Sequence[Sequence[np.ndarray]], rows: Sequence[Row]) -> list[Scores]:
        """What the scorer says of each version of this rank's outputs; what went wrong is counted over all of them."""
        many, metrics = [row for row in rows for _ in range(self.batch.group)], Counter()
        with ranks.together():
            scored = [self.scorer.score(outputs, many, self.batch.group) for outputs in versions]
        for scores in scored:
            metrics.update(scores.metrics)  # adds up
        for name, value in metrics.items():
            self._log(name, float(value))
        return scored

    def _judge(self, rows: Sequence[Row]) -> tuple[Tensor, dict[str, Any]]:
        """The rewards of this rank's rollouts, (B, K) or, if the recipe asks for that, of their decisions, (B, K, T).

        And what is noted: "rewards" (B, K) of the outputs, "failed" (B,), their "reasons".
        """
        made, dense = self.trajectory, "aligned" in self.recipe.needs
        scored = self._score(made.estimates if dense and made.estimates is not None else [made.outputs], rows)
        values = torch.tensor(np.stack([scores.values for scores in scored], axis=2), dtype=torch.float32)
        output, decisions, count = (
            values[:, :, -1],
            scored[-1].decisions,
            made.logps.shape[1],
        )  # the last estimate is the output
        rewards = output
        if dense and made.estimates is not None:
            rewards = values
        elif dense:
            rewards = output[:, :, None].repeat(1, 1, count) if decisions is None else torch.from_numpy(decisions)
            if rewards.shape[2] != count:
                raise ValueError(
                    f"rewards gave arrays of {rewards.shape[2]} values and a rollout has {count} decisions; give one value for "
                    f"each, in C order of the completion"
                )
        failed = torch.tensor(np.any([scores.failed for scores in scored], axis=0))
        at, reasons = self.args.device, scored[-1].reasons
        return rewards.to(at), {"rewards": output.to(at), "failed": failed.to(at), "reasons": reasons}

    def _totals(self, rows: Sequence[Row], outputs: Sequence[np.ndarray]) -> Tensor:
        """(P, G): total rewards of the groups of all ranks that could be judged throughout."""
        scores = self._score([outputs], rows)[0]
        values = gather(torch.tensor(scores.values, dtype=torch.float32, device=self.args.device))
        failed = gather(torch.tensor(scores.failed, device=self.args.device)).view(-1, self.batch.group)
        total = (values * self.weights.to(values)).nansum(1).view(failed.shape)
        return total[~failed.any(1)]

    def _give_credit(self, rewards: Tensor, failed: Tensor, rows: Sequence[Row], generation: int) -> None:
        trajectory, size = self.trajectory, self.batch.group
        rewards, failed, mask = gather(rewards), gather(failed), gather(trajectory.mask)
        if self.config.run.control == "random_rewards":
            rewards = torch.rand(rewards.shape, generator=self._chance(generation)).to(rewards)
        tasks = ranks.gather([str(row.get("task")) for row in rows])
        group = Group(
            rewards=rewards.view(-1, size, *rewards.shape[1:]),
            weights=self.weights.to(rewards.device),
            mask=mask,
            old_logps=gather(trajectory.logps),
            aligned=True,
            failed=failed.view(-1, size),
            names=tuple(self.scorer.names),
            outcome=self.scorer.names.index(self.outcome),
            task=torch.tensor([sorted(set(tasks)).index(task) for task in tasks], device=rewards.device),
            segments=None if trajectory.segments is None else gather(trajectory.segments),
            seed=self.args.seed * 1_000_003 + generation,
        )
        credit = self.recipe.credit(group)
        advantage, keep = credit.advantage, credit.keep
        if (
            self.config.run.control == "shuffled_advantages"
        ):  # whole rows: what a rollout's decisions share stays together
            kept = keep.nonzero().squeeze(1)
            order = torch.randperm(len(kept), generator=self._chance(generation)).to(kept.device)
            advantage = advantage.index_copy(0, kept, advantage[kept[order]])
        local = len(trajectory.logps)
        mine = slice(ranks.index() * local, (ranks.index() + 1) * local)
        self.whole = {"advantage": per_rollout(advantage, mask), "keep": keep}
        self.credit = {
            "advantage": advantage[mine],
            "keep": keep[mine],
            "group_id": (torch.arange(len(keep), device=keep.device) // size)[mine],
            **{f"extra/{name}": value[mine] for name, value in credit.extras.items()},
            "kept": keep.sum(),  # of the whole generation batch, as are the decisions
            "decisions": (mask.bool() & keep.bool().unsqueeze(1)).sum(),
        }
        for name, value in credit.metrics.items():
            self._log(name, float(value))

    def _chance(self, generation: int) -> torch.Generator:
        """The controls' randomness: a function of seed and generation batch alone."""
        return torch.Generator().manual_seed(self.args.seed * 1_000_003 + generation)

    def _report_rollouts(self, judged: dict[str, Any], rows: Sequence[Row]) -> None:
        rewards, failed = gather(judged["rewards"]).cpu(), gather(judged["failed"]).cpu()
        many = [row for row in rows for _ in range(self.batch.group)]
        ids, prompts = (ranks.gather([str(row[name]) for row in many]) for name in ("id", "prompt"))
        judged = {"ids": ids, "prompts": prompts, "reasons": ranks.gather(judged["reasons"]), "rewards": rewards}
        total = total_rewards(rewards, failed, self.weights)
        groups = total.view(-1, self.batch.group)
        spread = (groups - groups.nanmean(1, keepdim=True)).square().nanmean(1).sqrt().nanmean()
        self._log("reward", float(total.nanmean()))
        self._log("reward_std", float(spread))
        for k, name in enumerate(self.scorer.names):
            known = rewards[:, k][~rewards[:, k].isnan() & ~failed]
            if len(known):
                self._log(f"rewards/{name}/mean", float(known.mean()))
                self._log(f"rewards/{name}/std", float(known.std(correction=0)))
        if self.on_rollouts and ranks.is_main():
            shown, rest = self.trajectory.outputs[: self.batch.group], [None] * len(ids)
            judged |= {"failed": failed, "completions": rest}
            noted = columns(judged, self.weights, self.scorer.names, **self.whole)
            self.on_rollouts(self.state.global_step + 1, noted | {"output": shown + rest[len(shown) :]})

    # -- loss: per micro-batch and chunk of decisions --------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """All of one optimizer step but the step itself. Returns the loss of this rank's share, detached."""
        began = time.monotonic()
        generation, turn = divmod(self.state.global_step, self.batch.updates)
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
        if turn + 1 == self.batch.updates:
            self.trajectory = None
        self._log("step_s", time.monotonic() - began)
        return total

    def _update(self, part: int) -> _Update:
        share = len(self.trajectory.logps) // self.batch.steps_per_batch
        kept, decisions = (float(self.credit[name]) / self.batch.steps_per_batch for name in ("kept", "decisions"))
        return _Update(slice(part * share, (part + 1) * share), kept, decisions)

    @property
    def _at_once(self) -> int:
        """Rollouts sampled together: as many rows for the net as `forward` makes of a micro-batch, at most, with gradient."""
        return self.batch.micro * (self.config.optim.micro_steps or self.policy.units)

    def _chunks(self) -> list[slice]:
        """The decisions of one forward pass each: whole units."""
        steps = self.config.optim.micro_steps
        return slices(self.trajectory.logps.shape[1], steps and steps * self.trajectory.unit)

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
        whole, leaves = Decisions.joined(seen)
        loss = self._loss(whole, rows, slice(None), update)
        value = self._value(loss)
        slopes = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        slopes = {name: slope for name, slope in zip(leaves, slopes, strict=True) if slope is not None}
        for steps in chunks:
            with passes(steps):
                again = model(part, steps).tensors()
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
        advantage = per_rollout(self.credit["advantage"][rows], self.trajectory.mask[rows]).tolist()
        keep = self.credit["keep"][rows].tolist()
        self.guard.note([{"advantage": a, "keep": k} for a, k in zip(advantage, keep, strict=True)])

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
            kept = {name: getattr(self.trajectory, name) for name in ("logps", "mask", "state", "unit", "segments")}
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
