"""GRPO on language models: trl.GRPOTrainer with credit and loss from core.objective.

The only file that touches TRL's private methods.

Two moments (core/objective): *credit* enters where TRL has gathered the reward matrix of whole groups over all ranks
(`_calculate_rewards`, `_generate_and_score_completions`); *loss* replaces `_compute_loss`, after TRL has shuffled rows and
split them into micro-batches. Everything else - generation, vLLM, PEFT, DeepSpeed, FSDP, VLM plumbing, checkpoints - is
TRL's. What TRL multiplies or adds in its own `_compute_loss` (vLLM importance ratio, off-policy mask, high-entropy mask,
tool mask, entropy bonus, router loss) is kept.

    generation batch (whole groups)          credit()            shuffle, split            loss()
    p0 p0 p0 p1 p1 p1 p2 p2 p2 p3 p3 p3  ->  advantage, keep  ->  p2 p0 p3 | p1 p0 ...  ->  per micro-batch
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather, gather_object
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from core import ranks
from core.app import Row
from core.batch import Batch
from core.config import Config, ConfigError
from core.objective.group import Group
from core.objective.recipes import Recipe
from core.objective.rows import Counts, Metrics, Rows
from core.policy.language import context_length
from core.scoring import Scorer
from core.train.arguments import arguments, refuse_few_prompts, refuse_recipe
from core.train.asked import Asked, Teacher, Whole, shown
from core.train.health import Guard, finite_sampling
from core.train.rollouts import columns, per_rollout

TEACHER = "teacher.pt"  # a checkpoint's averaged weights; the same on all ranks
EXTRA = "extra/"  # prefix of a recipe's own row tensors among TRL's
MULTIMODAL = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


class LanguageTrainer(GRPOTrainer):
    """See the module docstring.

    rows: prepared rows (they hold `prompt`); scorer: the reward components; weights: one a component, in scorer's order.
    on_rollouts: called on the main process with (step, columns) once per generation batch. on_not_finite: called there
    with (step, rows) of an update that was skipped (core.train.health.Guard).
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
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
        peft_config: Any = None,
    ):
        refuse_recipe(recipe, dict(zip(scorer.names, weights, strict=True)), outcome, config)
        refuse_few_prompts(len(rows), batch)
        self.rows, self.scorer, self.recipe, self.outcome = rows, scorer, recipe, outcome
        self.run_control, self.on_rollouts = config.run.control, on_rollouts  # Trainer.control is something else
        self.weights = torch.tensor(list(weights), dtype=torch.float32)
        self.guard = Guard(on_not_finite if ranks.is_main() else None)
        args = arguments(config, batch, recipe, output)
        if args.beta and peft_config is None and not model.config._name_or_path:
            self._keep_reference(model, output / "reference")
        super().__init__(
            model=model,
            reward_funcs=[_named(name) for name in scorer.names],
            args=args,
            train_dataset=Dataset.from_dict({"prompt": [row["prompt"] for row in rows], "row": list(range(len(rows)))}),
            processing_class=tokenizer,
            callbacks=list(callbacks),
            peft_config=peft_config,
        )
        self.teacher = None
        if "teacher" in recipe.needs:
            for row in rows:
                shown(row["prompt"], "")  # refuses what it cannot show an answer in
            policy = self.accelerator.unwrap_model(self.model)
            self.teacher = Teacher(
                policy,
                tokenizer,
                self.temperature,
                context_length(policy),
                {"chat_template": self.chat_template, **self.chat_template_kwargs},
            )
            self.add_callback(self.teacher)
        self.reward_weights = self.weights  # TRL logs the weighted sum as `reward`
        if self.use_vllm and peft_config is not None and config.launch.strategy == "ddp":
            self.vllm_generation._iter_named_params = self._merged_weights

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """The components' weights from the next generation batch on, {component: weight}."""
        self.weights = torch.tensor([weights[name] for name in self.scorer.names], dtype=torch.float32)
        self.reward_weights = self.weights

    @staticmethod
    def _keep_reference(model: PreTrainedModel, folder: Path) -> None:
        """TRL reads the reference from the policy's own path; a policy that was built in memory gets one."""
        with ranks.main_first():
            if ranks.is_main() and not (folder / "config.json").exists():
                model.save_pretrained(folder)
        model.config._name_or_path = str(folder)

    def _merged_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What vLLM loads of a LoRA model, by vLLM's names. TRL merges in place and back, which wears bfloat16 weights off."""
        model = self.accelerator.unwrap_model(self.model)
        for name, param in model.named_parameters():
            if model.prefix in name or "original_module" in name:
                continue
            merged, (layer, base, _) = param.data, name.rpartition(".base_layer.weight")
            if base:
                merged = (merged + model.get_submodule(layer).get_delta_weight("default")).to(param.dtype)
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            yield (
                self.vllm_generation._fix_param_name_to_vllm(name, extra_prefixes=["modules_to_save.default."]),
                merged,
            )

    # -- credit: once per generation batch, on whole groups of all ranks ------------------------------------------------

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        rows = [self.rows[example["row"]] for example in inputs]
        with ranks.together():
            scores = self.scorer.score(texts, rows, self.num_generations)
        for name, value in scores.metrics.items():
            self._metrics["train"][name].append(float(value))
        values = torch.tensor(scores.values, dtype=torch.float32, device=self.accelerator.device)
        failed = torch.tensor(scores.failed, device=self.accelerator.device)
        self._judged = {
            "rewards": gather(values),
            "failed": gather(failed),
            "ids": gather_object([row["id"] for row in rows]),
            "rows": gather_object([example["row"] for example in inputs]),
            "prompts": gather_object([row["prompt"] for row in rows]),
            "texts": gather_object(texts),
            "reasons": gather_object(scores.reasons),
        }
        counted = self._judged["rewards"][:, self.weights.to(values.device) != 0]
        return self._judged["rewards"].masked_fill(
            counted.isnan().all(1, keepdim=True), math.nan
        )  # else TRL logs reward 0

    def _generate_and_score_completions(self, inputs):
        with finite_sampling(f"step {self.state.global_step + 1}"):
            output = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return output
        rank, local = self.accelerator.process_index, len(inputs)
        mine = slice(rank * local, (rank + 1) * local)
        group, asked = self._group(output, mine)
        credit = self.recipe.credit(group)
        advantage, keep = credit.advantage, credit.keep
        if self.run_control == "shuffled_advantages":
            kept = keep.nonzero().squeeze(1)
            order = torch.randperm(len(kept), generator=self._control_generator()).to(kept.device)
            advantage = advantage.index_copy(0, kept, advantage[kept[order]])
        width = output["completion_ids"].size(1)  # ranks pad to their own longest completion
        own = advantage[mine] if advantage.dim() == 1 else advantage[mine, :width]
        group_id = torch.arange(len(keep), device=keep.device) // self.num_generations
        output |= {"advantages": own, "keep": keep[mine], "group_id": group_id[mine]}
        output |= {"kept_rows": keep.sum(), "kept_tokens": (group.mask * keep.unsqueeze(1)).sum()}
        for name, value in credit.extras.items():
            output[f"{EXTRA}{name}"] = value[mine] if value.dim() == 1 else value[mine, :width]
        output |= {f"{EXTRA}{name}": value for name, value in asked.rows.items()}
        for name, value in credit.metrics.items():
            self._metrics["train"][name].append(float(value))
        if self.on_rollouts and self.accelerator.is_main_process:
            self.on_rollouts(self.state.global_step + 1, self._rollout_columns(advantage, keep, group.mask))
        return output

    def _group(self, output: dict[str, Any], mine: slice) -> tuple[Group, Asked]:
        """The groups of all ranks, and who answers the recipe's questions about the rank's own rows, `mine`."""
        rewards = self._judged["rewards"]
        if self.run_control == "random_rewards":
            rewards = torch.rand(rewards.shape, generator=self._control_generator()).to(rewards)
        shape = (-1, self.num_generations, rewards.shape[1])
        asked = Asked(
            forward=lambda model, rows: self._asked_pass(model, output, rows),
            gathered=self._gathered,
            mine=mine,
            model=self.model,
            temperature=self.temperature,
            ids=output["completion_ids"],
            mask=_loss_mask(output),
            size=self.num_generations,
            micro=self.args.per_device_train_batch_size,
            teacher=self.teacher,
            prompts=self._judged["prompts"][mine],
        )
        old = output.get("old_per_token_logps")
        if old is None and "old_logps" in self.recipe.needs:
            old = self._asked_pass(self.model, output, slice(None))[0]
        tasks = [self.rows[i].get("task") for i in self._judged["rows"][:: self.num_generations]]
        return Group(
            rewards=rewards.view(shape),
            weights=self.weights.to(rewards.device),
            mask=self._gathered(asked.mask),
            old_logps=None if old is None else self._gathered(old),
            failed=self._judged["failed"].view(shape[:2]),
            names=tuple(self.scorer.names),
            outcome=self.scorer.names.index(self.outcome),
            task=torch.tensor([sorted(set(map(str, tasks))).index(str(task)) for task in tasks], device=rewards.device),
            model=asked,
            seed=self.args.seed * 1_000_003 + self.state.global_step,
        ), asked

    def _gathered(self, values: torch.Tensor) -> torch.Tensor:
        """(local B, T) -> (B, T) of all ranks, padded with 0 to the longest."""
        return gather(self.accelerator.pad_across_processes(values.contiguous(), dim=1))

    @torch.no_grad()
    def _asked_pass(self, model, output, rows) -> tuple[torch.Tensor, torch.Tensor]:
        """TRL's pass over some of the generation batch's rows: log-probabilities and entropies, (rows, T)."""
        if rows != slice(None) and any(output.get(name) is not None for name in MULTIMODAL):
            raise ConfigError(f"recipe {self.recipe.name} asks the model group by group, which works for text alone")
        return self._pass(model, output, rows, self.args.per_device_train_batch_size)[:2]

    def _pass(self, model, inputs, rows=slice(None), batch_size=None, aux_loss=False):
        """TRL's forward pass over (prompt, completion): log-probabilities, entropies, router loss."""
        return self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)[rows],
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)[rows],
            inputs["completion_ids"].size(1),
            batch_size,
            compute_entropy=True,
            compute_aux_loss=aux_loss,
            **{key: inputs.get(key) for key in MULTIMODAL},
        )

    def _control_generator(self) -> torch.Generator:
        """The controls' randomness: a function of seed and step alone, so that a resumed control is the same control."""
        return torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)

    def _rollout_columns(self, advantage: torch.Tensor, keep: torch.Tensor, mask: torch.Tensor) -> dict[str, list]:
        prompts = [p if isinstance(p, str) else p[-1]["content"] for p in self._judged["prompts"]]
        judged = self._judged | {"prompts": prompts, "completions": self._judged["texts"]}
        return columns(judged, self.weights, self.scorer.names, per_rollout(advantage, mask), keep)

    # -- loss: per micro-batch, on rows ---------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        mask = _loss_mask(inputs)
        extras = {name.removeprefix(EXTRA): value for name, value in inputs.items() if name.startswith(EXTRA)}
        if self.teacher:
            compared = self.teacher.compare(extras, inputs["completion_ids"], mask)
            model = Whole(model, mask.shape[1], self.temperature, compared)
        logps, entropy, aux_loss = self._pass(model, inputs, aux_loss=self.aux_loss_enabled)
        weight, entropy_mask = self._weight(inputs, logps.detach(), entropy, mask)
        loss = self.recipe.loss(
            Rows(
                logps=logps,
                mask=mask,
                advantage=inputs["advantages"],
                old_logps=inputs.get("old_per_token_logps"),
                ref_logps=inputs.get("ref_per_token_logps"),
                keep=inputs.get("keep"),
                group_id=inputs.get("group_id"),
                entropy=entropy,
                weight=weight,
                counts=self._counts(inputs),
                extras=extras,
            )
        )
        accumulation = self.current_gradient_accumulation_steps
        if loss.local:
            value = loss.sum / loss.count / accumulation
        else:  # ranks average their gradients, so each divides by its share of the count
            value = loss.sum / (loss.count / self.accelerator.num_processes)
        self._log_sums(loss.metrics)
        if self._entropy_bonus_enabled:
            value = value - self._entropy_bonus(entropy, mask if entropy_mask is None else mask * entropy_mask)
        if self.aux_loss_enabled:
            value = value + self.router_aux_loss_coef * aux_loss / accumulation
            self._metrics["train"]["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss).mean().item())
        self._note_not_finite(inputs, logps.detach(), mask, value)
        return value

    # -- an update that is not finite is skipped --------------------------------------------------------------------------

    def _note_not_finite(self, inputs, logps, mask, loss) -> None:
        """Tells the guard which rows of a micro-batch are not finite: those with such log-probabilities, else all."""
        bad = (~logps.isfinite() & (mask > 0)).sum(1)
        if loss.isfinite() and not bad.any():
            return
        read = partial(self.processing_class.batch_decode, skip_special_tokens=True)
        columns = {
            "prompt": read(inputs["prompt_ids"]),
            "completion": read(inputs["completion_ids"]),
            "tokens": mask.sum(1).tolist(),
            "not_finite_tokens": bad.tolist(),
            "advantage": per_rollout(inputs["advantages"].float(), mask).tolist(),
            "keep": inputs["keep"].tolist(),
        }
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        self.guard.note([row for row in rows if row["not_finite_tokens"]] or rows)

    def _get_grad_norm(self, model, grad_norm=None):
        """Right before the optimizer's step, with the norm over all ranks; without gradients that step does nothing.

        DeepSpeed steps in its backward pass: there such an update is only counted, and too many in a row end the run.
        """
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        allowed = grad_norm is None or self.guard.allows(self.state.global_step + 1, float(grad_norm))
        if not allowed:
            model.zero_grad(set_to_none=True)
        self._metrics["train"]["skipped_updates"].append(float(not allowed))
        return grad_norm

    def log(self, logs, start_time=None):
        if self.guard.in_a_row and "loss" in logs:
            logs["loss"] = math.nan  # transformers puts a finite number in its place (logging_nan_inf_filter)
        super().log(logs, start_time)

    def _log_sums(self, metrics: Metrics) -> None:
        """Means over all ranks, in one reduction."""
        sums = torch.stack([part.float() for pair in metrics.values() for part in pair])
        for name, (total, count) in zip(metrics, self.accelerator.reduce(sums).view(-1, 2).tolist(), strict=True):
            if count:  # nothing was kept: there is no mean, not a mean of 0
                self._metrics["train"][name].append(total / count)

    def _weight(self, inputs, logps, entropy, mask):
        """What TRL multiplies the surrogate with, in TRL's order; None if nothing is switched on."""
        weight, entropy_mask = None, None
        if self.off_policy_mask_threshold is not None:
            advantage = inputs["advantages"]
            old = inputs.get("old_per_token_logps", logps)
            weight = self.get_off_policy_mask(
                advantages=advantage if advantage.dim() == 2 else advantage.unsqueeze(1),
                per_token_logps=logps,
                sampling_per_token_logps=inputs.get("sampling_per_token_logps", old),
                mask=mask,
                off_policy_threshold=self.off_policy_mask_threshold,
            )
        if self.top_entropy_quantile < 1.0:
            entropy_mask = self.get_high_entropy_mask(entropy, mask, 1 - self.top_entropy_quantile)
            weight = entropy_mask if weight is None else weight * entropy_mask
        if self.use_vllm and self.vllm_importance_sampling_correction:
            ratio = inputs["importance_sampling_ratio"]
            weight = ratio if weight is None else weight * ratio
        return weight, entropy_mask

    def _counts(self, inputs) -> Counts:
        """Kept rows and tokens of one update, all ranks: the generation batch's, shared out evenly over its updates.

        So every token of a generation batch weighs the same, in whichever update it lands, and no rank has to ask another.
        """
        rows, tokens = (
            inputs[name] * self.current_gradient_accumulation_steps / self.args.steps_per_generation
            for name in ("kept_rows", "kept_tokens")
        )
        return Counts(rows=rows, tokens=tokens, max_length=self.max_completion_length)

    def _entropy_bonus(self, entropy, mask):
        """TRL's own entropy bonus (trainer.entropy_coef, trainer.use_adaptive_entropy): a token mean per micro-batch."""
        bonus = (entropy * mask).sum() / mask.sum().clamp(min=1.0) / self.current_gradient_accumulation_steps
        coefficient = self.entropy_coef
        if self.use_adaptive_entropy:
            coefficient = self.entropy_coef if self._last_world_entropy <= self.args.entropy_target else 0.0
            self._adapt_entropy(torch.stack([(entropy * mask).sum(), mask.sum()]).detach())
        if self.accelerator.sync_gradients:
            self._metrics["train"]["entropy_coef"].append(self.entropy_coef)
        return coefficient * bonus

    def _adapt_entropy(self, stats: torch.Tensor) -> None:
        """TRL's controller: one step of the coefficient at the end of each accumulation window."""
        window = stats if self._entropy_window_stats is None else self._entropy_window_stats + stats
        self._entropy_window_stats = window
        if not self.accelerator.sync_gradients:
            return
        total, count = self.accelerator.reduce(window, reduction="sum")
        measured = (total / count.clamp(min=1.0)).item()
        step = self.args.entropy_coef_delta if measured <= self.args.entropy_target else -self.args.entropy_coef_delta
        self.entropy_coef = min(max(self.entropy_coef + step, self.args.entropy_coef_min), self.args.entropy_coef_max)
        self._last_world_entropy, self._entropy_window_stats = measured, None

    # -- going on: what stock forgets ---------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset=None):
        stock = super()._get_train_sampler(dataset)
        # One item of TRL's loader is a whole generation batch; a step takes one for each of its micro-batches.
        per_step = self.args.generation_batch_size * self.args.gradient_accumulation_steps
        return _EpochSampler(stock, lambda: self.state.global_step // (len(stock) // per_step))

    def _save_rng_state(self, output_dir):
        """Also the micro-batch counter and a generation batch that has steps left: a checkpoint may fall inside one."""
        super()._save_rng_state(output_dir)
        half_used = self._step % (self.args.steps_per_generation * self.num_iterations)
        state = {"step": self._step, "ranks": ranks.count(), "batch": self._buffered_inputs if half_used else None}
        torch.save(state, self._generation_file(output_dir))
        if self.teacher and ranks.is_main():
            torch.save(self.teacher.state_dict(), Path(output_dir) / TEACHER)
        self.accelerator.wait_for_everyone()  # trainer_state.json, which says that a checkpoint is whole, comes next

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # a rank that is asked to stop ends now, and its end may end the main one

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        path = self._generation_file(checkpoint)
        state = torch.load(path, map_location=self.accelerator.device.type, weights_only=True) if path.exists() else {}
        written = ranks.gather([state.get("ranks", 0)])
        if max(written) != ranks.count():
            raise ConfigError(
                f"{checkpoint} was written by {max(written) or 'other'} ranks and this run has {ranks.count()}; a "
                f"run goes on with as many as it began with (GPUS=), or starts again under another name (RUN=)"
            )
        if 0 in written:
            raise ConfigError(
                f"{checkpoint} lacks the state of rank {written.index(0)}; delete it to go on from the one before"
            )
        self._step, self._buffered_inputs = state["step"], state["batch"]
        if self.teacher:
            path = Path(checkpoint) / TEACHER
            self.teacher.load_state_dict(torch.load(path, map_location=self.accelerator.device.type, weights_only=True))

    @staticmethod
    def _generation_file(checkpoint: str) -> Path:
        return Path(checkpoint) / f"generation_{ranks.index()}.pt"


class _EpochSampler(Sampler):
    """TRL's sampler, which in a resumed run goes on with the permutation of its epoch instead of the first one.

    epoch: asked when an iteration begins, because data loaders that skip or share out batches do not pass `set_epoch` on.
    """

    def __init__(self, stock: RepeatSampler, epoch: Callable[[], int]):
        self.stock, self.epoch = stock, epoch

    def __len__(self) -> int:
        return len(self.stock)

    def __iter__(self) -> Iterator[int]:
        if self.stock.shuffle:
            self.stock.generator.manual_seed(self.stock.seed)
            for _ in range(self.epoch()):
                torch.randperm(self.stock.num_samples, generator=self.stock.generator)
        return iter(self.stock)


def _loss_mask(inputs: dict[str, Any]) -> torch.Tensor:
    """(B, T): 1 on tokens that the policy wrote and that carry loss."""
    mask = inputs["completion_mask"]
    return mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]


def _named(name: str) -> Callable:
    """A name for TRL's tables; `_calculate_rewards` asks the scorer instead of calling it."""

    def reward(**_: Any):
        raise RuntimeError("rewards are computed by the scorer")

    reward.__name__ = name
    return reward
