"""Runs of language models: loading, imitating, completing, and TRL's trainer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from transformers import PreTrainedTokenizerBase

from core import ranks
from core.app import App, Row
from core.batch import Batch
from core.config import Config, ConfigError
from core.objective.recipes import Recipe
from core.policy import language, tiny
from core.policy.language import Sampling, complete
from core.run.actor import Actor, Requests
from core.run.folder import RunFolder
from core.run.progress import Progress
from core.run.requests import read_lines, row_of
from core.train.arguments import arguments, refuse_recipe
from core.train.language import LanguageTrainer
from core.train.warmup import imitate, quiet

if TYPE_CHECKING:
    from core.run.evaluate import Judge


@dataclass(frozen=True)
class LanguageActor(Actor):
    """A causal language model and its tokenizer. Completions are text."""

    tokenizer: PreTrainedTokenizerBase

    how = "greedy"
    card = """\
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
"""

    @classmethod
    def refuse(cls, app: App, config: Config, batch: Batch, recipe: Recipe, weights: Mapping[str, float]) -> None:
        refuse_recipe(recipe, weights, app.outcome, config)
        with quiet():  # for its refusals: a typo in `trainer:` costs no warm start
            arguments(config, batch, recipe, Path())

    @classmethod
    def warnings(cls, config: Config) -> list[str]:
        half, launch = config.model.dtype == "bfloat16", config.launch
        if half and not config.model.lora_rank and launch.strategy == "ddp" and config.optim.lr < 1e-4:
            return [
                f"model.dtype=bfloat16 trains all weights in bfloat16, whose steps are 1/256 of a weight: at optim.lr="
                f"{config.optim.lr:g} most updates round to nothing. Use model.dtype=float32, model.lora_rank=32, or "
                f"launch.strategy=fsdp or deepspeed, which keep float32 weights"
            ]
        return []

    @classmethod
    def load(cls, app: App, config: Config, path: str | Path | None = None) -> Self:
        return cls(app, config, *language.load(config.model, path))

    @classmethod
    def build(cls, app: App, config: Config, rows: Sequence[Row], labels: Sequence[str]) -> Self:
        """The tokenizer is made from the rows' and labels' own text."""
        texts = [json.dumps(row["prompt"]) if isinstance(row["prompt"], list) else row["prompt"] for row in rows]
        tokenizer = tiny.build_tokenizer([p + a for p, a in zip(texts, labels, strict=True)], config.model.vocabulary)
        shape = {"width": config.model.width, "layers": config.model.layers, "heads": config.model.heads}
        return cls(app, config, tiny.build_model(tokenizer, **shape, seed=config.run.seed), tokenizer)

    @classmethod
    def start_needs(cls, config: Config) -> list[Any]:
        return [config.rollout.max_completion_length]

    def imitate(
        self,
        rows: Sequence[Row],
        labels: Sequence[str],
        output: Path,
        on_log: Callable[[int, dict[str, float]], None],
    ) -> None:
        warmup = self.config.warmup
        imitate(
            self.model,
            self.tokenizer,
            [row["prompt"] for row in rows],
            labels,
            steps=warmup.steps,
            batch_size=warmup.batch_size,
            lr=warmup.lr,
            prompt_loss=warmup.prompt_loss,
            seed=self.config.run.seed,
            output=output,
            on_log=on_log,
        )

    def save(self, folder: Path, weights: Any = None) -> None:
        self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)

    def complete(self, rows: Sequence[Row], places: Sequence[int]) -> tuple[list[str], list[bool]]:
        greedy = Sampling(self.config.rollout.max_completion_length, batch_size=self.config.evaluate.batch_size)
        return complete(self.model, self.tokenizer, [row["prompt"] for row in rows], greedy)

    def draws(self, rows: Sequence[Row], places: Sequence[int], count: int) -> list[list[str]]:
        """At the rollout's own temperature."""
        rollout = self.config.rollout
        return [
            complete(
                self.model,
                self.tokenizer,
                [row["prompt"] for row in rows],
                Sampling(
                    rollout.max_completion_length,
                    rollout.temperature,
                    rollout.top_p,
                    rollout.top_k,
                    self.config.evaluate.batch_size,
                    seed=self.config.run.seed * 1009 + n + 7919 * ranks.index(),
                ),
            )[0]
            for n in range(count)
        ]

    def fitting(self, rows: Sequence[Row], progress: Progress) -> list[Row]:
        """Rows whose prompt keeps to rollout.max_prompt_length and, with its completion, to the model's context."""
        rollout, context = self.config.rollout, language.context_length(self.model)
        limit, what = rollout.max_prompt_length, f"rollout.max_prompt_length={rollout.max_prompt_length}"
        if context - rollout.max_completion_length < limit:
            limit = context - rollout.max_completion_length
            what = (
                f"the {limit:.0f} that rollout.max_completion_length={rollout.max_completion_length} leaves of the model's "
                f"context of {context:.0f}"
            )
        texts = [language.render(self.tokenizer, row["prompt"]) for row in rows]
        lengths = [len(self.tokenizer(text)["input_ids"]) for text in texts]
        kept = [row for row, length in zip(rows, lengths, strict=True) if length <= limit]
        if not kept:
            raise ConfigError(f"every training prompt is longer than {what} tokens (the shortest has {min(lengths)})")
        if len(kept) < len(rows):
            progress.warn(
                f"{len(rows) - len(kept)} of {len(rows)} training prompts are longer than {what} tokens and are left out"
            )
        return kept

    def trainer(
        self,
        rows: Sequence[Row],
        judge: Judge,
        recipe: Recipe,
        batch: Batch,
        folder: RunFolder,
        callbacks: Sequence[Any],
    ) -> LanguageTrainer:
        return LanguageTrainer(
            model=self.model,
            tokenizer=self.tokenizer,
            rows=rows,
            scorer=judge.rewards,
            weights=judge.weights,
            outcome=self.app.outcome,
            recipe=recipe,
            config=self.config,
            batch=batch,
            output=folder.path / "checkpoints",
            on_rollouts=folder.log_rollouts,
            on_not_finite=lambda step, rows: folder.write_json(f"samples/not-finite-{step:06d}.json", rows),
            callbacks=callbacks,
            peft_config=lora(self.config),
        )

    def keep(self, folder: RunFolder, name: str, rows: Sequence[Row], completions: Sequence[str]) -> list[str]:
        return list(completions)

    def kept(self, folder: RunFolder, rows: Sequence[Row], texts: Sequence[str]) -> list[str]:
        return list(texts)

    def form(self) -> dict[str, Any]:
        return {"max_new_tokens": self.config.rollout.max_completion_length}

    @classmethod
    def requests(cls, app: App, source: Path, target: Path) -> tuple[Requests, list[Row]]:
        """A JSON-lines file; a line without an "id" gets "line-<number>"."""
        if not source.is_file():
            raise ConfigError(f"INPUT={source} is no file; give one with one JSON object a line")
        if target.is_dir():
            raise ConfigError(f"OUTPUT={target} is a folder; give the name of a file to write")
        requests, rows = [], []
        for where, number, request in read_lines(source):
            requests.append({"id": f"line-{number}", **request})
            rows.append(row_of(app, requests[-1], where))
        if not rows:
            raise ConfigError(f"INPUT={source} is empty; give a file with one JSON object a line")
        return requests, rows

    def answer(self, requests: Requests, rows: Sequence[Row], completions: Sequence[str], target: Path) -> None:
        """A JSON-lines file; "prediction" is null where no answer could be read from the "completion"."""
        read = self.app.extract or (lambda text: text)
        lines = [
            json.dumps(request | {"prediction": read(text), "completion": text}, ensure_ascii=False)
            for request, text in zip(requests, completions, strict=True)
        ]
        RunFolder(target.parent).write_text(target.name, "\n".join(lines) + "\n")


def lora(config: Config):
    if not config.model.lora_rank:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=config.model.lora_rank,
        lora_alpha=config.model.lora_alpha,
        target_modules=config.model.lora_targets,
        task_type="CAUSAL_LM",
    )
