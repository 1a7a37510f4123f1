"""One training run, from a config to a report: data, warm start, evaluation, GRPO, evaluation, table.

Each part leaves its result in the run folder, so the same command resumes where it stopped: the warm start is cached by a
hash of what it depends on, the evaluation before training is kept, and GRPO continues from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback, set_seed

from core import app as apps
from core.app import App, Row
from core.config import Batch, Config, ConfigError, batch
from core.objective import recipes
from core.policy import language, tiny
from core.run import evaluate as ev
from core.run.export import export_model, write_card
from core.run.folder import RunFolder
from core.run.progress import Progress
from core.run.report import write_report
from core.train.health import Health
from core.train.language import LanguageTrainer
from core.train.warmup import cache_key, imitate, quiet

NAMES = {  # trl's and transformers' names of what is logged -> ours
    "reward": "reward",
    "reward_std": "reward_std",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "step_time": "step_s",
    "completions/mean_length": "completion_length",
    "completions/clipped_ratio": "truncated",
}
SHOWN = 12  # sample predictions in the report


def run_training(app: App, config: Config, folder: RunFolder, progress: Progress, command: str) -> dict[str, Any]:
    """Run or resume the training of `config` in `folder`; returns the summary. Raises ConfigError before any work starts."""
    if folder.finished:
        summary = json.loads((folder.path / "summary.json").read_text())
        progress.note(f"{folder.path} is finished; RUN=<another name> starts another, FRESH=1 does it again")
        final_table(progress, summary)
        return summary
    setup = Setup(app, config, progress)
    clock = Clock()
    with ev.Judge(app, config, setup.composite) as judge:
        data = Split(app, config, progress)
        clock.mark("make")
        check_gold(app, judge, data, progress)
        model, tokenizer, warm = start(app, config, data, folder, judge, progress)
        clock.mark("warmup")
        before = kept_evaluation(folder, "before", lambda: full_evaluation(model, tokenizer, judge, data.test, config))
        progress.note(
            f"before: {setup.headline} {before.mean(setup.headline):.3f} greedy on {len(data.test)} held-out rows"
        )
        clock.mark("eval")
        trained = reinforce(app, config, setup, data, folder, judge, progress, model, tokenizer, warm)
        clock.mark("rl")
        after = full_evaluation(trained, tokenizer, judge, data.test, config)
        clock.mark("eval")
        summary = summarise(app, config, setup, data, folder, before, after, judge)
    summary["seconds"] = {**clock.seconds, "warmup_made": warm["seconds"]}
    summary["update_size"] = warm["distance"](trained)
    target = export_model(folder.path, trained, tokenizer, app, config, data.test[0]["prompt"])
    write_card(target, summary, list(setup.composite), config.model.path)
    save_evaluation(folder, app, data.test, after, setup.headline)
    folder.write_json("summary.json", summary)
    extra = {
        "table": summary["table"],
        "warmup": warm["curve"],
        "batch": setup.batch.line(),
        "command": command,
        "updates_per_batch": setup.batch.steps_per_batch * setup.batch.iterations,
        "samples": samples(app, data.test, before, after, setup.headline),
    }
    folder.write_json("report.json", extra)
    write_report(folder, summary, extra)
    final_table(progress, summary)
    progress.note(f"report: {folder.path / 'report.html'}")
    return summary


class Clock:
    """Wall seconds of the parts of a run."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._at = time.monotonic()

    def mark(self, part: str) -> None:
        now = time.monotonic()
        self.seconds[part] = round(self.seconds.get(part, 0.0) + now - self._at, 2)
        self._at = now


class Setup:
    """What is decided before any work: recipe, composite, batch arithmetic. Says it, and warns."""

    def __init__(self, app: App, config: Config, progress: Progress, need_machine: bool = True):
        if need_machine:
            refuse_machine(config)
        self.composite = app.composite(config.rewards.preset, config.rewards.weights)
        self.recipe = recipes.build(config.objective)
        self.batch: Batch = batch(config, int(os.environ.get("WORLD_SIZE", "1")))
        self.headline = next(iter(app.metrics))
        weights = {name: weight for name, (weight, _) in self.composite.items()}
        progress.note(f"{app.name}: recipe {self.recipe.name}; {self.batch.line()}")
        progress.note("rewards: " + ", ".join(f"{weight:g} x {name}" for name, weight in weights.items()))
        chosen = config.objective["recipe"]
        for sentence in app.warnings(weights, app.outcome, [chosen] if isinstance(chosen, str) else list(chosen)):
            progress.warn(sentence)
        if config.run.control != "none":
            progress.warn(f"run.control={config.run.control}: this run is a control and must not learn")


def refuse_machine(config: Config) -> None:
    """Raise ConfigError if this machine cannot do what the config asks."""
    torch.set_num_threads(config.run.threads)
    gpus = torch.cuda.device_count()
    if gpus > 1 and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            f"{gpus} GPUs are visible but there is no launcher, and one process cannot use them; "
            f"set GPUS={gpus} to start one process each, or CUDA_VISIBLE_DEVICES=0 to use one"
        )
    if config.run.needs_gpu and not gpus and not config.run.force_cpu:
        raise ConfigError(
            f"this config is made for a GPU and none is visible: {config.model.path} needs {memory_estimate(config)}. "
            f'Use CONFIG=tiny on this machine, or SET="run.force_cpu=true" to try all the same'
        )


def memory_estimate(config: Config) -> str:
    """A rule of thumb in words: weights, gradients and Adam states in the given dtype (LoRA: weights only), and activations."""
    import re

    size = re.search(r"(\d+(?:\.\d+)?)\s*[bB]\b", config.model.path)
    if not size:
        return "a GPU (its size is not known from the path)"
    width = 2 if config.model.dtype == "bfloat16" else 4
    billions = float(size[1])
    gigabytes = billions * (width if config.model.lora_rank else 2 * width + 8) * 1.2 + 6
    return f"about {gigabytes:.0f} GB of GPU memory ({billions:g}B weights in {config.model.dtype}{', LoRA' if config.model.lora_rank else ', all weights trained'})"


class Split:
    """Training, validation and test rows. Validation clusters are taken out of the training ones; test is never touched."""

    def __init__(self, app: App, config: Config, progress: Progress):
        source = data_folder(app, config, progress)
        splits = app.load(source)
        for key in (config.data.train, config.data.test):
            if key not in splits:
                raise ConfigError(apps.unknown(f"split in {source}:", key, splits))
        options = config.task
        shuffle = random.Random(config.run.seed).shuffle
        train = list(splits[config.data.train])
        test = list(splits[config.data.test])
        shuffle(train)
        if config.data.test_rows:
            shuffle(test)
        keys = sorted({str(row[app.cluster]) for row in train}) if app.cluster else []
        shuffle(keys)
        held = set(keys[: round(len(keys) * config.data.validation_share)])
        validation = [row for row in train if held and str(row[app.cluster]) in held]
        train = [row for row in train if not (held and str(row[app.cluster]) in held)]
        self.train: list[Row] = apps.prepare(app, train[: config.data.train_rows], options)
        self.validation: list[Row] = apps.prepare(app, validation[: config.evaluate.validation_rows], options)
        self.test: list[Row] = apps.prepare(app, test[: config.data.test_rows], options)
        if not self.train or not self.test:
            raise ConfigError(
                f"{source}: split {config.data.train} has {len(self.train)} rows and {config.data.test} {len(self.test)}; both need some"
            )
        progress.note(
            f"data: {source}: {len(self.train)} training, {len(self.validation)} validation, {len(self.test)} test rows"
        )


def data_folder(app: App, config: Config, progress: Progress) -> Path:
    """DATA as given, or the offline folder of this seed, written if it is not there yet."""
    if config.data.folder:
        if not Path(config.data.folder).is_dir():
            raise ConfigError(f"DATA={config.data.folder} is not a folder; see data/README.md for the layout")
        return Path(config.data.folder)
    folder = offline_folder(app, config.run.seed)
    if not folder.exists():
        progress.phase(f"writing the offline data to {folder}")
        app.write_offline(folder, config.run.seed)
    return folder


def offline_folder(app: App, seed: int) -> Path:
    return Path("runs") / "data" / f"{app.name}-{seed}"


def check_gold(app: App, judge: ev.Judge, data: Split, progress: Progress, rows: int = 64) -> None:
    """Gold must score 1 on the outcome before training starts: a reward that fails gold would teach the wrong thing."""
    chosen = (data.train[:rows], data.test[:rows])
    for part in chosen:
        judge.rewards.check_columns(part[0])
        judge.metrics.check_columns(part[0])
        scores = judge.rewards.score([app.gold(row) for row in part], part)
        k = judge.rewards.names.index(app.outcome)
        wrong = [i for i, value in enumerate(scores.values[:, k]) if not value >= 1]
        if wrong:
            i = wrong[0]
            raise ConfigError(
                f"the gold answer of row {part[i]['id']} scores {scores.values[i, k]} on {app.outcome} "
                f"({scores.reasons[i].get(app.outcome, '')}), and so do {len(wrong)} of {len(part)} rows; run make check APP={app.name}"
            )
    progress.note(f"gold scores 1 on {app.outcome} for {sum(map(len, chosen))} of {sum(map(len, chosen))} rows tried")


# -- the warm start ----------------------------------------------------------------------------------------------------------


def start(app, config: Config, data: Split, folder: RunFolder, judge: ev.Judge, progress: Progress):
    """The policy that GRPO starts from, its tokenizer, and how it came to be ({curve, seconds, path, distance})."""
    if config.model.path != "tiny" and config.warmup.labels == "none":
        model, tokenizer = language.load(config.model)
        return model, tokenizer, {"curve": [], "seconds": 0.0, "path": config.model.path, "distance": distance(model)}
    key = cache_key(
        app.name,
        asdict(config.model),
        asdict(config.warmup),
        asdict(config.data),
        config.as_dict()["task"],
        config.run.seed,
        config.rollout.max_completion_length,
    )
    cache = Path("runs") / "warmup" / f"{app.name}-{key}"
    if not (cache / "warmup.json").exists():
        build_start(app, config, data, cache, judge, progress)
    model, tokenizer = language.load(config.model, cache)
    note = json.loads((cache / "warmup.json").read_text())
    return model, tokenizer, {**note, "path": str(cache), "distance": distance(model)}


def build_start(app, config: Config, data: Split, cache: Path, judge: ev.Judge, progress: Progress) -> None:
    """Train the warm start and write it to `cache`, whole or not at all."""
    warmup, seed, began = config.warmup, config.run.seed, time.monotonic()
    rows = data.train[: warmup.rows]
    labels = app.demonstrations(rows, seed) if warmup.labels == "demonstrations" else [app.gold(row) for row in rows]
    if config.model.path == "tiny":
        texts = [json.dumps(row["prompt"]) if isinstance(row["prompt"], list) else row["prompt"] for row in rows]
        tokenizer = tiny.build_tokenizer([p + a for p, a in zip(texts, labels, strict=True)], config.model.vocabulary)
        shape = {"width": config.model.width, "layers": config.model.layers, "heads": config.model.heads}
        model = tiny.build_model(tokenizer, **shape, seed=seed)
    else:
        model, tokenizer = language.load(config.model)
    scores, _ = ev.grade(judge, rows, labels)
    headline = next(iter(app.metrics))
    facts = {"labels": warmup.labels, "rows": len(rows), "label_accuracy": float(np.nanmean(scores[headline]))}
    progress.note(f"demonstrations: {len(rows)}, of which {facts['label_accuracy']:.1%} are right; none is filtered")
    progress.phase("warm start", warmup.steps)
    curve: list[dict[str, Any]] = []

    def on_log(step: int, metrics: dict[str, Any]) -> None:
        point = {"step": step, "loss": metrics["loss"]}
        if data.validation and (len(curve) % 4 == 3 or step == warmup.steps):
            point["metric"] = ev.evaluate(model, tokenizer, judge, data.validation, config).mean(headline)
        curve.append(point)
        progress.update(step, metrics | ({f"eval/{headline}": point["metric"]} if "metric" in point else {}))

    imitate(
        model,
        tokenizer,
        [row["prompt"] for row in rows],
        labels,
        steps=warmup.steps,
        batch_size=warmup.batch_size,
        lr=warmup.lr,
        prompt_loss=warmup.prompt_loss,
        seed=seed,
        output=cache.parent / "sft",
        on_log=on_log,
    )
    part = cache.with_name(f".{cache.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    facts |= {"curve": curve, "seconds": round(time.monotonic() - began, 2)}
    (part / "warmup.json").write_text(json.dumps(facts))
    shutil.rmtree(cache, ignore_errors=True)
    part.rename(cache)


def distance(model):
    """A function that says how far another model's weights are from this one's: |change| / |weights|."""
    origin = (
        {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
        if sum(p.numel() for p in model.parameters()) < 5e7
        else {}
    )

    def measure(other) -> float | None:
        if not origin:
            return None
        moved = [
            (p.detach().cpu() - origin[name]).square().sum() for name, p in other.named_parameters() if name in origin
        ]
        return float(
            torch.stack(moved).sum().sqrt() / torch.stack([p.square().sum() for p in origin.values()]).sum().sqrt()
        )

    return measure


# -- reinforcement -----------------------------------------------------------------------------------------------------------


def reinforce(
    app, config: Config, setup: Setup, data: Split, folder: RunFolder, judge, progress, model, tokenizer, warm
):
    """GRPO from the warm start, or from the last checkpoint; returns the trained model."""
    set_seed(config.run.seed)
    rows = fitting(data.train, tokenizer, config.rollout.max_prompt_length, progress)
    progress.phase("GRPO", config.optim.steps)
    follow = Follow(app, config, data, folder, judge, progress, tokenizer, setup)
    with quiet():
        trainer = LanguageTrainer(
            model=model,
            tokenizer=tokenizer,
            rows=rows,
            scorer=judge.rewards,
            weights=judge.weights,
            outcome=app.outcome,
            recipe=setup.recipe,
            config=config,
            batch=setup.batch,
            output=folder.path / "checkpoints",
            on_rollouts=folder.log_rollouts,
            callbacks=[follow],
            peft_config=lora(config),
        )
        trainer.remove_callback(PrinterCallback)
        if config.optim.steps:
            checkpoint = folder.last_checkpoint()
            done = int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0
            folder.truncate_after(done)
            if checkpoint:
                progress.note(f"resuming after step {done}")
            if done < config.optim.steps:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            else:
                trainer._load_from_checkpoint(str(checkpoint))
    return trainer.accelerator.unwrap_model(trainer.model)


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


def fitting(rows: Sequence[Row], tokenizer, limit: int, progress: Progress) -> list[Row]:
    """Rows whose prompt has at most `limit` tokens; the others are left out, and counted aloud."""
    lengths = [len(tokenizer(language.render(tokenizer, row["prompt"]))["input_ids"]) for row in rows]
    kept = [row for row, length in zip(rows, lengths, strict=True) if length <= limit]
    if not kept:
        raise ConfigError(
            f"every training prompt is longer than rollout.max_prompt_length={limit} (the shortest has {min(lengths)} tokens)"
        )
    if len(kept) < len(rows):
        progress.warn(
            f"{len(rows) - len(kept)} of {len(rows)} training prompts are longer than rollout.max_prompt_length={limit} tokens and are left out"
        )
    return kept


class Follow(TrainerCallback):
    """Writes the run's metrics, shows them, watches their health, and evaluates on the validation rows on schedule."""

    def __init__(self, app, config, data, folder, judge, progress, tokenizer, setup):
        self.app, self.config, self.data, self.folder, self.judge = app, config, data, folder, judge
        self.progress, self.tokenizer, self.setup = progress, tokenizer, setup
        self.health = Health(updates_per_batch=setup.batch.steps_per_batch * setup.batch.iterations)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self._evaluate(0, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.config.evaluate.every and state.global_step % self.config.evaluate.every == 0:
            self._evaluate(state.global_step, model)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        metrics = {NAMES.get(name, name): value for name, value in logs.items() if isinstance(value, int | float)}
        kept = {k: v for k, v in metrics.items() if "/" not in k or not k.startswith("completions")}
        self._record(state.global_step, kept)

    def _evaluate(self, step: int, model) -> None:
        if not self.data.validation:
            return
        result = ev.evaluate(model, self.tokenizer, self.judge, self.data.validation, self.config)
        metrics: dict[str, float] = {}
        for name, values in result.scores.items():
            mean, lo, hi = ev.interval(self.app, self.data.validation, values)
            metrics |= {f"eval/{name}": mean, f"eval/{name}/lo": lo, f"eval/{name}/hi": hi}
        self._record(step, metrics)

    def _record(self, step: int, metrics: dict[str, float]) -> None:
        self.folder.log_metrics(step, metrics)
        self.progress.update(step, metrics)
        for sentence in self.health.update(step, metrics):
            self.progress.warn(sentence)


# -- results -----------------------------------------------------------------------------------------------------------------


def full_evaluation(model, tokenizer, judge, rows, config: Config) -> ev.Evaluation:
    return ev.evaluate(model, tokenizer, judge, rows, config, samples=config.evaluate.samples, with_rewards=True)


def kept_evaluation(folder: RunFolder, name: str, make) -> ev.Evaluation:
    """An evaluation that is made once and then read from the run folder."""
    path = folder.path / f"{name}.json"
    if not path.exists():
        made = make()
        folder.write_json(path.name, asdict(made))
        return made
    raw = json.loads(path.read_text())
    for part in ("scores", "sampled", "rewards"):
        raw[part] = {
            k: np.array([np.nan if v is None else v for v in values], dtype=float) for k, values in raw[part].items()
        }
    return ev.Evaluation(**raw)


def save_evaluation(folder: RunFolder, app: App, rows: Sequence[Row], result: ev.Evaluation, headline: str) -> None:
    """eval.json: every metric with its interval, and every item's prediction."""
    folder.write_json("eval.json", evaluation_json(app, rows, result, headline))


def evaluation_json(app: App, rows: Sequence[Row], result: ev.Evaluation, headline: str) -> dict[str, Any]:
    metrics = {}
    for name, values in result.scores.items():
        mean, lo, hi = ev.interval(app, rows, values)
        metrics[name] = {"mean": mean, "ci95": [lo, hi]}
    return {
        "metric": headline,
        "n": len(rows),
        "unscored": result.unscored,
        "metrics": metrics,
        "items": [
            {
                "id": row["id"],
                "completion": completion,
                "truncated": cut,
                "reasons": reasons,
                **{name: values[i] for name, values in result.scores.items()},
            }
            for i, (row, completion, cut, reasons) in enumerate(
                zip(rows, result.completions, result.truncated, result.reasons, strict=True)
            )
        ],
    }


def summarise(
    app, config: Config, setup: Setup, data: Split, folder: RunFolder, before, after, judge
) -> dict[str, Any]:
    """summary.json: see the run folder in CONTRIBUTING.md."""
    rows, headline = data.test, setup.headline
    table: list[dict[str, Any]] = []

    def add(name: str, a: np.ndarray, b: np.ndarray, items: Sequence[Row] = rows) -> None:
        diff, lo, hi = ev.change(app, items, a, b)
        table.append(
            {
                "name": name,
                "before": float(np.nanmean(a)),
                "after": float(np.nanmean(b)),
                "change": diff,
                "lo": lo,
                "hi": hi,
            }
        )

    for name in before.scores:
        add(name, before.scores[name], after.scores[name])
    for name in before.sampled:
        add(f"{name}, sampled", before.sampled[name], after.sampled[name])
    for name in before.rewards:
        add(f"reward {name}", before.rewards[name], after.rewards[name])
    parts = [app.part(row) if app.part else "" for row in rows]
    for name in sorted(set(parts) - {""}):
        chosen = [i for i, part in enumerate(parts) if part == name]
        add(
            f"{headline}: {name} ({len(chosen)} rows)",
            before.scores[headline][chosen],
            after.scores[headline][chosen],
            [rows[i] for i in chosen],
        )
    steps = [line for line in folder.read_metrics() if "zero_spread" in line]
    if steps:
        edge = max(1, len(steps) // 10)
        first, last = (
            float(np.nanmean([line["zero_spread"] for line in part])) for part in (steps[:edge], steps[-edge:])
        )
        table.append(
            {
                "name": f"groups without spread (first and last {edge} steps)",
                "before": first,
                "after": last,
                "change": last - first,
                "lo": None,
                "hi": None,
            }
        )
    baselines = {}
    for name, baseline in app.baselines.items():
        scores, _ = ev.grade(judge, rows, baseline(data.train, rows))
        baselines[name] = float(np.nanmean(scores[headline]))
    diff, lo, hi = ev.change(app, rows, before.scores[headline], after.scores[headline])
    return {
        "app": app.name,
        "task": None,
        "recipe": setup.recipe.name,
        "seed": config.run.seed,
        "config": config.as_dict(),
        "git": git_revision(),
        "metric": headline,
        "better": "higher",
        "before": before.mean(headline),
        "after": after.mean(headline),
        "n": len(rows),
        "n_clusters": len(set(ev.clusters(app, rows) or range(len(rows)))),
        "unscored": before.unscored + after.unscored,
        "ci95": [lo, hi],
        "baselines": baselines,
        "table": table,
        "peak_rss_mb": round(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)
        ),
    }


def git_revision() -> str | None:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def samples(
    app: App, rows: Sequence[Row], before: ev.Evaluation, after: ev.Evaluation, headline: str
) -> list[dict[str, Any]]:
    """Held-out rows for the report: mended ones first, then broken ones, then the rest."""
    a, b = before.scores[headline], after.scores[headline]
    order = sorted(range(len(rows)), key=lambda i: (a[i] - b[i] if a[i] < b[i] else (1 if a[i] > b[i] else 2), i))
    mended = [i for i in order if a[i] < b[i]][: SHOWN // 2]
    broken = [i for i in order if a[i] > b[i]][: SHOWN // 4]
    rest = [i for i in order if a[i] == b[i]][: SHOWN - len(mended) - len(broken)]
    return [
        {
            "question": rows[i].get("question", str(rows[i]["prompt"])),
            "gold": app.show(rows[i], app.gold(rows[i])),
            "before": app.show(rows[i], before.completions[i]),
            "after": app.show(rows[i], after.completions[i]),
            "before_ok": bool(a[i] >= 1),
            "after_ok": bool(b[i] >= 1),
        }
        for i in [*mended, *broken, *rest]
    ]


def final_table(progress: Progress, summary: dict[str, Any]) -> None:
    """The last lines of a run: before, after, change, 95 % interval, and the free baselines."""
    show = lambda v, sign="": "" if v is None or v != v else f"{v:{sign}.3f}"  # noqa: E731
    rows = [
        (
            row["name"],
            show(row["before"]),
            show(row["after"]),
            show(row["change"], "+"),
            f"[{show(row['lo'], '+')}, {show(row['hi'], '+')}]" if row["lo"] is not None else "",
        )
        for row in summary["table"]
    ]
    rows += [(f"free baseline: {name}", show(value), "", "", "") for name, value in summary["baselines"].items()]
    title = f"{summary['app']}, {summary['recipe']}, seed {summary['seed']}: {summary['n']} held-out rows in {summary['n_clusters']} clusters"
    progress.table(title, ["", "before", "after", "change", "95 % interval"], rows)
