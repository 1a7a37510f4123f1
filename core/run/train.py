"""One training run, from a config to a report: data, warm start, evaluation, GRPO, evaluation, table.

Each part leaves its result in the run folder, so the same command resumes where it stopped: the warm start is cached by a
hash of what it depends on, the evaluation before training is kept, and GRPO continues from its last checkpoint.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback, set_seed

from core import ranks
from core.app import App, Row, unknown
from core.batch import Batch
from core.config import Config, ConfigError
from core.objective import recipes
from core.objective.composition import NEEDS
from core.run import evaluate as ev
from core.run.actor import Actor, actor_of
from core.run.export import export_model, write_card
from core.run.folder import RunFolder
from core.run.progress import Progress
from core.run.report import write_report
from core.run.rivals import Rivals, compare, verified
from core.run.splits import Split, check_gold
from core.run.start import start
from core.run.stopping import StopRequest
from core.run.summary import evaluation_json, final_table, samples, summarise
from core.train.constraints import constrained
from core.train.health import Health
from core.train.warmup import quiet

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


def run_training(
    setup: Setup, folder: RunFolder, progress: Progress, command: str, task: str | None = None
) -> dict[str, Any]:
    """Run or resume the training of `setup` in `folder`; returns the summary ({} on all ranks but the main one).

    command: what makes it again; task: its TASK. Raises core.run.stopping.Stopped after SIGTERM or SIGINT.
    """
    if folder.finished:
        summary = json.loads((folder.path / "summary.json").read_text())
        progress.note(f"{folder.path} is finished; RUN=<another name> starts another, FRESH=1 does it again")
        final_table(progress, summary)
        return summary
    setup.say(progress)
    with quiet(), StopRequest() as stop:
        return _run(setup, folder, progress, stop, command, task)


def prepare(setup: Setup, progress: Progress) -> None:
    """What one process does before the ranks of GPUS=n start: the offline data and the warm start."""
    with quiet(), StopRequest(), ev.Judge(setup.app, setup.config, setup.composite) as judge:
        data = Split(setup.app, setup.config, progress)
        setup.kind.refuse_few(len(data.train), setup.batch)
        if setup.config.warmup.steps or setup.config.model.path == "tiny":
            start(setup.app, setup.config, data, judge, progress)
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()  # this process lives as long as the ranks, on the GPU of the first one


def _run(
    setup: Setup, folder: RunFolder, progress: Progress, stop: StopRequest, command: str, task: str | None
) -> dict[str, Any]:
    app, config, clock = setup.app, setup.config, Clock(folder)
    with ev.Judge(app, config, setup.composite) as judge:
        with ranks.main_first():
            data = Split(app, config, progress)
            setup.kind.refuse_few(len(data.train), setup.batch)
            if config.rewards.constraints and not data.validation:
                raise ConfigError(
                    f"rewards.constraints follow a metric of the validation rows, and there are none: name a split in "
                    f"data.validation, or raise data.validation_share={config.data.validation_share:g}"
                )
            clock.mark("make")
            if ranks.is_main():  # ours were checked when made
                check_gold(app, judge, data, progress, rows=None if config.data.folder else 64)
        actor, warm = start(app, config, data, judge, progress)
        rows = actor.fitting(data.train, progress)
        setup.kind.refuse_few(len(rows), setup.batch)
        clock.mark("warmup")
        before = kept_evaluation(folder, "before", actor, data.test, lambda: full_evaluation(actor, judge, data.test))
        progress.note(
            f"before: {setup.headline} {before.mean(setup.headline):.3f} {actor.how} on {len(data.test)} held-out rows"
        )
        clock.mark("eval")
        trained, weights = reinforce(setup, data, rows, folder, judge, progress, stop, clock, actor)
        clock.mark("rl")
        after = full_evaluation(trained, judge, data.test)
        clock.mark("eval")
        if not ranks.is_main():
            return {}
        rivals = Rivals(app, config, data, data.test, judge, progress, make=setup.processes == 1)
        compared = compare(rivals, {"before": before.completions, "after": after.completions})
        clock.mark("baselines")
    summary = summarise(setup, data, folder, before, after, compared, task)
    found = verified(app, data.test, compared.arms)
    summary["tables"] = found["tables"]
    summary["ranks"] = setup.processes
    summary["seconds"] = {**clock.seconds, "warmup_made": warm["seconds"]}
    summary["update_size"] = warm["distance"](trained.model) if config.launch.strategy == "ddp" else None
    target = export_model(folder.path, trained, data.test[0]["prompt"], weights)
    write_card(target, trained, summary, list(setup.composite))
    kept = trained.keep(folder, "after", data.test, after.completions)
    folder.write_json("eval.json", evaluation_json(app, data.test, after, kept, setup.headline))
    extra = {
        "table": summary["table"],
        "plots": found["plots"],
        "warmup": warm["curve"],
        "batch": setup.batch.line(),
        "command": command,
        "updates_per_batch": setup.batch.steps_per_batch * setup.batch.iterations,
        "samples": samples(app, folder, data.test, before, after, setup.headline),
    }
    folder.write_json("report.json", extra)
    write_report(folder, summary, extra)
    folder.write_json("summary.json", summary)  # last: it marks the run as finished
    final_table(progress, summary)
    progress.note(f"report: {folder.path / 'report.html'}")
    return summary


class Clock:
    """Wall seconds of the parts of a run, over all the processes that worked on it; what one lost is not counted."""

    def __init__(self, folder: RunFolder):
        self._folder, self._at = folder, time.monotonic()
        kept = folder.path / "seconds.json"
        self.seconds: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}

    def mark(self, part: str) -> None:
        now = time.monotonic()
        self.seconds[part] = round(self.seconds.get(part, 0.0) + now - self._at, 2)
        self._at = now
        if ranks.is_main():
            self._folder.write_json("seconds.json", self.seconds)


class Setup:
    """What is decided before any work: recipe, composite, batch arithmetic, trl's arguments.

    Raises ConfigError or AppError for a config that cannot run; unless need_machine is False, also for one
    that this machine cannot run.
    """

    def __init__(self, app: App, config: Config, processes: int | None = None, need_machine: bool = True):
        """processes: ranks of the run; None: as many as were started."""
        self.app, self.config, self.kind = app, config, actor_of(app)
        self.processes = processes or ranks.count()
        if need_machine:
            refuse_missing_gpu(config)
            refuse_ranks(config, self.processes)
        self.composite = app.composite(config.rewards.preset, config.rewards.weights)
        try:
            self.recipe = recipes.build(config.objective)
        except ValueError as error:
            raise ConfigError(f"objective: {error}") from error
        weights = {name: weight for name, (weight, _) in self.composite.items()}
        for name, constraint in config.rewards.constraints.items():
            if name not in weights:
                raise ConfigError(unknown("component in rewards.constraints", name, weights))
            if constraint.metric not in app.metrics:
                raise ConfigError(unknown(f"metric in rewards.constraints.{name}:", constraint.metric, app.metrics))
        self.batch = Batch.of(config, self.processes, self.recipe.extra_rollouts)
        self.kind.refuse(app, config, self.batch, self.recipe, weights)
        if need_machine and config.launch.sampler != "hf" and importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                f"launch.sampler={config.launch.sampler} needs the package vllm, which is not installed; it brings its "
                f'own torch, so it has its own environment. SET="launch.sampler=hf" does without'
            )
        self.headline = next(iter(app.metrics))

    def say(self, progress: Progress) -> None:
        """One line each: recipe and batch, rewards; and the warnings."""
        weights = {name: weight for name, (weight, _) in self.composite.items()}
        progress.note(f"{self.app.name}: recipe {self.recipe.name}; {self.batch.line()}")
        progress.note("rewards: " + ", ".join(f"{weight:g} x {name}" for name, weight in weights.items()))
        for name, held in self.config.rewards.constraints.items():
            limit = f"at least {held.at_least:g}" if held.at_least is not None else f"at most {held.at_most:g}"
            progress.note(f"constraint: the weight of {name} moves until {held.metric} is {limit}")
        chosen = self.config.objective["recipe"]
        names = [chosen] if isinstance(chosen, str) else list(chosen)
        for sentence in self.app.warnings(weights, self.app.outcome, names):
            progress.warn(sentence)
        if "several_updates" in self.recipe.needs and self.batch.steps_per_batch * self.batch.iterations == 1:
            progress.warn(
                f"recipe {self.recipe.name} needs {NEEDS['several_updates']}; this run makes one. Set rollout.iterations=2, or "
                f"rollout.steps_per_batch=2"
            )
        for sentence in self.kind.warnings(self.config):
            progress.warn(sentence)
        if self.config.run.control != "none":
            progress.warn(f"run.control={self.config.run.control}: this run is a control and must not learn")


def refuse_ranks(config: Config, processes: int) -> None:
    """Raise ConfigError if this machine cannot run so many ranks, or not as `launch:` says."""
    gpus, local = torch.cuda.device_count(), min(processes, ranks.local_count()) if ranks.count() > 1 else processes
    if gpus > 1 and processes == 1:
        raise ConfigError(
            f"{gpus} GPUs are visible and the run has one process: GPUS={gpus} uses them all, CUDA_VISIBLE_DEVICES=0 takes one"
        )
    if gpus and local > gpus:
        raise ConfigError(f"GPUS={local} is more than the {gpus} GPUs that are visible")
    if config.launch.strategy != "ddp" and processes == 1:
        raise ConfigError(
            f"launch.strategy={config.launch.strategy} spreads a model over ranks and this run has one; set GPUS=2 or more, or "
            f'SET="launch.strategy=ddp"'
        )
    if config.launch.strategy != "ddp" and not gpus:
        raise ConfigError(
            f"launch.strategy={config.launch.strategy} needs GPUs and none is visible: without them accelerate would quietly run "
            f'ddp instead. SET="launch.strategy=ddp" says so'
        )
    if config.launch.strategy == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "launch.strategy=deepspeed needs the package deepspeed, which is not installed: pip install deepspeed"
        )


def refuse_missing_gpu(config: Config) -> None:
    """Raise ConfigError if the config is made for a GPU and there is none."""
    torch.set_num_threads(config.run.threads)
    gpus = torch.cuda.device_count()
    if config.run.needs_gpu and not gpus and not config.run.force_cpu:
        raise ConfigError(
            f"this config is made for a GPU and none is visible: {config.model.path} needs {memory_estimate(config)}. "
            f'Use CONFIG=tiny on this machine, or SET="run.force_cpu=true" to try all the same'
        )


def memory_estimate(config: Config) -> str:
    """A rule of thumb in words: weights, gradients and Adam states in the given dtype (LoRA: weights only), and activations."""
    size = re.search(r"(\d+(?:\.\d+)?)\s*[bB]\b", config.model.path)
    if not size:
        return "a GPU (its size is not known from the path)"
    width = 2 if config.model.dtype == "bfloat16" else 4
    billions = float(size[1])
    gigabytes = billions * (width if config.model.lora_rank else 2 * width + 8) * 1.2 + 6
    trained = "LoRA" if config.model.lora_rank else "all weights trained"
    return f"about {gigabytes:.0f} GB of GPU memory ({billions:g}B weights in {config.model.dtype}, {trained})"


# -- reinforcement -----------------------------------------------------------------------------------------------------------


def reinforce(
    setup: Setup,
    data: Split,
    rows: Sequence[Row],
    folder: RunFolder,
    judge,
    progress,
    stop: StopRequest,
    clock: Clock,
    actor: Actor,
) -> tuple[Actor, Any]:
    """GRPO from the warm start, or from the last checkpoint; returns the trained actor, and its weights if they are spread.

    Raises Stopped, after saving, if a signal came during the steps.
    """
    config = setup.config
    set_seed(config.run.seed)
    progress.phase("GRPO", config.optim.steps)
    follow = Follow(setup, data, folder, judge, progress, stop, clock, actor)
    with quiet():
        trainer = actor.trainer(rows, judge, setup.recipe, setup.batch, folder, [follow])
        trainer.remove_callback(PrinterCallback)
        follow.reweigh = trainer.set_weights
        if config.optim.steps:
            with ranks.main_first():
                checkpoint = folder.last_checkpoint()
                done = int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0
                if ranks.is_main():
                    folder.truncate_after(done)
            if checkpoint:
                progress.note(f"resuming after step {done}")
            if done < config.optim.steps:
                with stop.between_steps():
                    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            else:
                trainer._load_from_checkpoint(str(checkpoint))
    spread = config.launch.strategy != "ddp"
    trained = actor.having(trainer.accelerator.unwrap_model(trainer.model))
    return trained, trainer.accelerator.get_state_dict(trainer.model) if spread else None


class Follow(TrainerCallback):
    """Writes the run's metrics, shows them, watches their health, and evaluates on the validation rows on schedule."""

    def __init__(self, setup: Setup, data, folder, judge, progress, stop, clock, actor: Actor):
        self.setup, self.app, self.config = setup, setup.app, setup.config
        self.data, self.folder, self.judge, self.progress = data, folder, judge, progress
        self.stop, self.clock, self.actor = stop, clock, actor
        # A component without weight is no reward: an identity's mean says nothing, and health would take it for a reward's.
        constraints = self.config.rewards.constraints
        self.unweighted = [
            f"rewards/{name}/"
            for name, (weight, _) in setup.composite.items()
            if not weight and name not in constraints
        ]
        self.health = Health(
            metric=setup.headline,
            better=self.app.better(setup.headline),
            updates_per_batch=setup.batch.steps_per_batch * setup.batch.iterations,
        )
        self.reweigh: Callable[[dict[str, float]], None] | None = None  # the trainer's set_weights, once there is one
        self.validations: list[dict[str, float]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        lines = self.folder.read_metrics()
        for line in lines:  # resumed: what health saw before
            self.health.update(line["step"], line)
        key = f"eval/{self.setup.headline}"
        self.validations = [line for line in lines if key in line]
        self._constrain()
        evaluated = any(line["step"] == state.global_step for line in self.validations)
        if not ranks.any_rank(evaluated):  # a run that was asked to stop leaves it to the next
            self._evaluate_on_schedule(state.global_step, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if not self._stopping(control):
            self._evaluate_on_schedule(state.global_step, model)
            self._stopping(control)

    def _stopping(self, control) -> bool:
        """Whether some rank was asked to stop; then all save at the end of this step, and end."""
        asked = max(ranks.gather([self.stop.asked]))
        if asked:
            self.stop.asked = asked
            control.should_save = control.should_training_stop = True
        return bool(asked)

    def _evaluate_on_schedule(self, step: int, model) -> None:
        if step == 0 or (self.config.evaluate.every and step % self.config.evaluate.every == 0):
            self._evaluate(step, model)

    def on_save(self, args, state, control, **kwargs):
        self.clock.mark("rl")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not ranks.is_main() or not logs or "loss" not in logs:
            return
        metrics = {NAMES.get(name, name): value for name, value in logs.items() if isinstance(value, int | float)}
        kept = {k: v for k, v in metrics.items() if not k.startswith(("completions/", *self.unweighted))}
        self._record(state.global_step, kept)

    def _evaluate(self, step: int, model) -> None:
        if not self.data.validation:
            return
        result = ev.evaluate(self.actor.having(model), self.judge, self.data.validation)
        metrics: dict[str, float] = {}
        for name, values in result.scores.items():
            mean, lo, hi = ev.interval(self.app, self.data.validation, values, result.weights["scores"][name])
            metrics |= {f"eval/{name}": mean, f"eval/{name}/lo": lo, f"eval/{name}/hi": hi}
        self.validations.append(metrics)
        metrics |= self._constrain()
        if ranks.is_main():
            self._record(step, metrics)

    def _constrain(self) -> dict[str, float]:
        """Gives the trainer the weights that all validations so far have led to; returns what to log of them."""
        constraints = self.config.rewards.constraints
        if not constraints:
            return {}
        weights = {name: weight for name, (weight, _) in self.setup.composite.items()}
        weights, logged = constrained(weights, constraints, self.validations)
        self.reweigh(weights)
        return logged

    def _record(self, step: int, metrics: dict[str, float]) -> None:
        self.folder.log_metrics(step, metrics)
        self.progress.update(step, metrics)
        for sentence in self.health.update(step, metrics):
            self.progress.warn(sentence)


# -- results -----------------------------------------------------------------------------------------------------------------


def full_evaluation(actor: Actor, judge: ev.Judge, rows: Sequence[Row]) -> ev.Evaluation:
    return ev.evaluate(actor, judge, rows, samples=actor.config.evaluate.samples, with_rewards=True)


def kept_evaluation(
    folder: RunFolder, name: str, actor: Actor, rows: Sequence[Row], make: Callable[[], ev.Evaluation]
) -> ev.Evaluation:
    """An evaluation that is made once, by all ranks together, and then read from the run folder."""
    path = folder.path / f"{name}.json"
    if not path.exists():
        made = make()
        if ranks.is_main():
            kept = actor.keep(folder, name, rows, made.completions)
            folder.write_json(path.name, asdict(replace(made, completions=kept)))
        return made
    raw = json.loads(path.read_text())
    raw["completions"] = actor.kept(folder, rows, raw["completions"])
    for part in ("scores", "sampled", "rewards"):
        for kind in (raw, raw["weights"]):
            kind[part] = {
                k: np.array([np.nan if v is None else v for v in values], dtype=float)
                for k, values in kind[part].items()
            }
    return ev.Evaluation(**raw)
