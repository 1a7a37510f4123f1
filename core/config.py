"""The run's configuration: frozen dataclasses <- YAML <- key=value; unknown keys are refused with the nearest match.

Sections stand in the order a reader asks. The user states prompts per step and group size; core/batch.py derives the rest.
`trainer:` passes any field of trl.GRPOConfig through, except those that another section owns; those
are refused with the key to use instead.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from core.app import App, Flow, Forecast, Language, unknown


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key, the value, the limit and the fix."""


@dataclass(frozen=True)
class Model:
    path: str = "tiny"  # "tiny", a folder, or a hub id
    width: int = 128  # the tiny model's hidden size; the rest of its shape follows
    layers: int = 4
    net: Literal["unet", "convlstm", "vit"] = "unet"  # of a forecast; see core/policy/step_nets.py
    heads: int = 4
    vocabulary: int = 1024
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora_rank: int = 0  # 0 trains all weights
    lora_alpha: int = 32
    lora_targets: str = "all-linear"
    remote_code: bool = False


@dataclass(frozen=True)
class Data:
    folder: str | None = None  # None: the offline folder, written from the run's seed
    train: str = "train"
    test: str = "dev"
    validation: str | None = None  # split of the curve during training; None: a share of the training clusters
    train_rows: int | None = None  # first n after a seeded shuffle
    test_rows: int | None = None
    validation_share: float = 0.1  # that share


@dataclass(frozen=True)
class Warmup:
    labels: Literal["none", "gold", "demonstrations"] = (
        "none"  # what is imitated: gold, or what the app's annotator wrote
    )
    rows: int | None = None  # how many demonstrations; None: one for every training row
    steps: int = 0
    batch_size: int = 32
    lr: float = 2e-3
    straighten: int = 0  # of a flow: steps after those, towards its own ODE samples, for a policy of one step
    prompt_loss: bool = False  # the loss also on the prompt: a model from nothing learns its words and to copy from it


@dataclass(frozen=True)
class Rollout:
    """What is sampled at once, for any kind of policy."""

    prompts_per_step: int = 8
    group_size: int = 8
    steps_per_batch: int = 1  # optimizer steps that one generation batch is split into
    iterations: int = 1  # passes over the same generation batch


@dataclass(frozen=True)
class LanguageRollout(Rollout):
    max_prompt_length: int = 512
    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class FlowRollout(Rollout):
    steps: int = 10  # denoising steps of a rollout
    eval_steps: int = 40  # of an evaluation, without noise
    shift: float = 1.0  # of the schedule; above 1 stays longer near noise
    kernel: Literal["flow", "dance", "cps", "sage"] = "flow"
    noise_level: float = 0.7
    window: Literal["all", "first", "sliding", "random", "active"] = "all"  # which steps are noisy and trained
    window_size: int = 0  # noisy steps; 0 for all (every step but the last) and active (as many as are worth it)
    window_every: int = 25  # sliding: generation batches before it moves on by one step
    shortcut: int = 0  # steps in place of those after the window; 0 = the schedule's
    shared_noise: bool = True  # the rollouts of a group start from the same noise
    antithetic: bool = False  # the noise of a group comes in pairs that cancel
    guidance: float = 1.0  # 1 = none
    guidance_rescale: bool = False
    equalize: bool = False  # gradients of all steps on one scale
    divergence: Literal["exact", "code"] = "exact"  # unit of the closed-form KL, see core/policy/kernel.py


@dataclass(frozen=True)
class ForecastRollout(Rollout):
    distribution: Literal["categorical", "gaussian", "low_rank"] = "categorical"
    bins: int = 20  # of the categorical, log-spaced, the class edges among their edges
    sigma: float = 0.2  # of the gaussians, in s = log(1 + x / scale)
    rank: int = 8  # of low_rank: smooth fields of noise beside the white one
    start_leads: int = 4  # of the supervised start: over 1, 2, 4, ... up to so many
    leads: int = 4  # of a rollout, at the end of the curriculum
    first_leads: int = 4  # at its beginning
    leads_every: int = 0  # generation batches before one lead more; 0: `leads` from the beginning
    eval_leads: int = 20
    feedback: Literal["mean", "sample"] = "mean"  # what the next lead starts from; in evaluations always the mean
    # What is announced: the likeliest class, that of the mean, or what a head of its own learns to announce, from the Bayes
    # decision on, while the forecast stays what the supervised start learned.
    decide: Literal["class", "mean", "head"] = "class"


# By what an app's `acts` is.
ROLLOUTS: dict[type, type[Rollout]] = {Language: LanguageRollout, Flow: FlowRollout, Forecast: ForecastRollout}


@dataclass(frozen=True)
class Constraint:
    """The weight of a reward component follows a PI controller, so that a metric on the validation rows keeps to a limit.

    at_least, at_most: the limit, exactly one of them. kp, ki: gains of the controller. cap: the most that is added to the
    configured weight.
    """

    metric: str
    at_least: float | None = None
    at_most: float | None = None
    kp: float = 0.05
    ki: float = 0.01
    cap: float = 3.0


@dataclass(frozen=True)
class Rewards:
    preset: str = "default"
    weights: dict[str, float] = field(default_factory=dict)
    constraints: dict[str, Constraint] = field(default_factory=dict)  # {component: what its weight is moved for}
    workers: int = 2  # on one machine, shared out over its ranks
    timeout_s: float = 10.0
    memory_mb: int = 2048
    max_failure_share: float = 0.5
    max_concurrent: int = 32  # calls of an async reward beside each other
    cache_mb: float = 64.0  # verdicts kept for calls that come again; 0 = none


@dataclass(frozen=True)
class Optim:
    steps: int = 100
    lr: float = 1e-6
    schedule: str = "constant"
    warmup_steps: int = 0
    micro_batch: int | None = None  # rollouts in one forward pass per rank; None: all of the rank's
    micro_steps: int | None = None  # decisions of a trajectory in one forward pass; None: all of them
    ema: float = 0.0  # decay of averaged weights of a trajectory policy, which evaluation and export then use; 0 = none
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Evaluate:
    every: int = 50  # steps between evaluations on the validation rows; 0 = never
    validation_rows: int = 200
    batch_size: int = 64
    samples: int = 1  # sampled completions a row, beside the greedy one


@dataclass(frozen=True)
class Run:
    seed: int = 0
    threads: int = 1  # torch threads; two on a machine whose two cores are busy are many times slower
    save_every: int = 50
    force_cpu: bool = False
    needs_gpu: bool = False
    control: Literal["none", "shuffled_advantages", "random_rewards"] = "none"


@dataclass(frozen=True)
class Launch:
    """How the ranks of GPUS=n share the model, and what samples the rollouts."""

    strategy: Literal["ddp", "fsdp", "deepspeed"] = "ddp"  # a whole copy on each; or weights spread over them
    file: str | None = None  # JSON of fsdp or deepspeed; None: core/train/launch/<strategy>.json
    sampler: Literal["hf", "vllm_colocate", "vllm_server"] = "hf"


@dataclass(frozen=True)
class Config:
    task: Any
    model: Model = Model()
    data: Data = Data()
    warmup: Warmup = Warmup()
    rollout: Rollout = LanguageRollout()
    rewards: Rewards = Rewards()
    objective: dict[str, Any] = field(default_factory=lambda: {"recipe": "grpo"})
    optim: Optim = Optim()
    evaluate: Evaluate = Evaluate()
    run: Run = Run()
    launch: Launch = Launch()
    trainer: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


# Fields of trl.GRPOConfig that a section of ours decides, {field: the key to use instead}.
OWNED = {
    field: key
    for key, fields in {
        "objective.recipe": "loss_type sapo_temperature_neg sapo_temperature_pos vespo_k_neg vespo_k_pos vespo_lambda_neg "
        "vespo_lambda_pos",
        "objective.recipe (gspo)": "importance_sampling_level",
        "objective.recipe (gdpo)": "multi_objective_aggregation",
        "objective.epsilon_low": "epsilon",
        "objective.epsilon_high": "epsilon_high",
        "objective.delta": "delta",
        "objective.beta": "beta",
        "objective.kl_weight": "use_bias_correction_kl",
        "objective.scale": "scale_rewards",
        "rewards.weights": "reward_weights",
        "rollout.group_size": "num_generations",
        "rollout.prompts_per_step": "generation_batch_size",
        "optim.micro_batch": "per_device_train_batch_size",
        "rollout.prompts_per_step and optim.micro_batch": "gradient_accumulation_steps",
        "rollout.steps_per_batch": "steps_per_generation",
        "rollout.iterations": "num_iterations",
        "rollout.max_completion_length": "max_completion_length",
        "rollout.temperature": "temperature",
        "rollout.top_p": "top_p",
        "rollout.top_k": "top_k",
        "optim.lr": "learning_rate",
        "optim.schedule": "lr_scheduler_type",
        "optim.warmup_steps": "warmup_steps",
        "optim.max_grad_norm": "max_grad_norm",
        "optim.weight_decay": "weight_decay",
        "optim.steps": "max_steps num_train_epochs",
        "run.seed": "seed data_seed",
        "run.save_every": "save_steps save_strategy",
        "evaluate.every": "eval_strategy eval_steps do_eval eval_on_start",
        "evaluate.samples": "num_generations_eval",
        "evaluate.batch_size": "per_device_eval_batch_size",
        "RUN=": "output_dir",
        "model.path and model.dtype": "model_init_kwargs",
        "model.remote_code": "trust_remote_code",
        "launch.sampler": "use_vllm vllm_mode",
        "model.dtype": "bf16 fp16",
        "launch.strategy": "fsdp",
        "launch.file": "fsdp_config deepspeed",
    }.items()
    for field in fields.split()
}


def load(app: App, path: Path, overrides: Iterable[str] = (), task: str | None = None, **settings: Any) -> Config:
    """The config of `path`, with TASK's values, then key=value overrides, then settings given as section__key.

    Raises ConfigError that names the key and the nearest one there is.
    """
    try:
        raw = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError:
        there = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise ConfigError(f"no config {path.name} in apps/{app.name}; there are: {', '.join(there)}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path.name} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path.name} must be a mapping of sections, not {type(raw).__name__}")
    values = dict(app.tasks.get(task, {})) if task else {}
    if task and task not in app.tasks:
        known = [*app.tasks, *app.variants]
        raise ConfigError(unknown("TASK", task, known) if known else f"app {app.name} has no TASK= to choose")
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign:
            raise ConfigError(f"override {override!r} is not of the form section.key=value")
        try:
            values[key.strip()] = yaml.safe_load(value) if value.strip() else None
        except yaml.YAMLError as error:
            raise ConfigError(
                f"override {override!r}: the value is not valid YAML; quote it, or close what it opens"
            ) from error
    values |= {key.replace("__", "."): value for key, value in settings.items() if value is not None}
    for key, value in values.items():
        _set(raw, key.split("."), value, key)
    return resolve(app, raw)


def resolve(app: App, raw: Mapping[str, Any]) -> Config:
    """A Config from plain mappings, checked against the types of every section."""
    sections = {f.name: f for f in dataclasses.fields(Config)}
    of_app = {"task": app.options, "rollout": ROLLOUTS[type(app.acts)]}
    hints = typing.get_type_hints(Config) | of_app
    for key in raw:
        if key not in sections:
            raise ConfigError(unknown("section", key, sections))
    built = {name: convert(raw.get(name, {}), hints[name], name) for name in sections if name in raw or name in of_app}
    config = Config(**built)
    if "recipe" not in config.objective:
        config = dataclasses.replace(config, objective={"recipe": "grpo", **config.objective})
    _check(config)
    return config


def changed(app: App, config: Config, **settings: Any) -> Config:
    """The config with settings given as section__key."""
    raw = config.as_dict()
    for key, value in settings.items():
        _set(raw, key.split("__"), value, key.replace("__", "."))
    return resolve(app, raw)


def _set(raw: dict, path: list[str], value: Any, key: str) -> None:
    if len(path) < 2:
        raise ConfigError(f"override {key!r} names no section; write section.key=value, for example optim.lr=1e-5")
    for at, part in enumerate(path[:-1], 1):
        if not isinstance(raw.get(part) or {}, Mapping):
            raise ConfigError(
                f"override {key!r} reaches into {'.'.join(path[:at])}, which is a value and holds no keys"
            )
        raw[part] = dict(raw.get(part) or {})
        raw = raw[part]
    raw[path[-1]] = value


def convert(value: Any, kind: Any, key: str) -> Any:
    """value as `kind`, or a ConfigError that names key, value and kind. YAML reads 1e-5 as text; it is taken as a number."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value or {}, Mapping):
            raise ConfigError(f"{key} must be a section of keys, not {value!r}")
        fields, hints = {f.name for f in dataclasses.fields(kind)}, typing.get_type_hints(kind)
        for name in value or {}:
            if name not in fields:
                raise ConfigError(unknown(f"key in section {key}", name, fields))
        return kind(**{name: convert(v, hints[name], f"{key}.{name}") for name, v in (value or {}).items()})
    if kind is Any:
        return value
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(unknown(f"value of {key}:", value, arguments))
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return convert(value, next(a for a in arguments if a is not type(None)), key)
    if origin is dict:
        if not isinstance(value or {}, Mapping):
            raise ConfigError(f"{key} must be a section of keys, not {value!r}")
        return {str(k): convert(v, arguments[1], f"{key}.{k}") for k, v in (value or {}).items()}
    if kind is float and not isinstance(value, bool):
        try:
            if math.isfinite(number := float(value)):
                return number
        except (TypeError, ValueError):
            pass
    elif (kind is int and isinstance(value, int) and not isinstance(value, bool)) or (
        kind in (str, bool) and isinstance(value, kind)
    ):
        return value
    elif kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    wanted = {float: "a finite number", int: "a whole number", bool: "true or false", str: "text"}.get(kind, kind)
    raise ConfigError(f"{key}={value!r} is not {wanted}")


def _check(config: Config) -> None:
    """Ranges and contradictions that no later code should have to meet."""
    at_least = {
        "model.width": 1, "model.layers": 1, "model.heads": 1, "model.lora_rank": 0,
        "data.train_rows": 1, "data.test_rows": 1,
        "warmup.rows": 1, "warmup.steps": 0, "warmup.straighten": 0, "warmup.batch_size": 1,
        "rollout.prompts_per_step": 1, "rollout.group_size": 2, "rollout.max_prompt_length": 1,
        "rollout.max_completion_length": 1, "rollout.top_k": 0, "rollout.steps_per_batch": 1, "rollout.iterations": 1,
        "rollout.steps": 1, "rollout.eval_steps": 1, "rollout.window_size": 0, "rollout.window_every": 1,
        "rollout.shortcut": 0, "rollout.guidance": 0,
        "rollout.bins": 2, "rollout.rank": 1, "rollout.start_leads": 1, "rollout.leads": 1, "rollout.first_leads": 1,
        "rollout.leads_every": 0, "rollout.eval_leads": 1,
        "rewards.workers": 1, "rewards.memory_mb": 1, "rewards.max_concurrent": 1, "rewards.cache_mb": 0,
        "optim.steps": 0, "optim.warmup_steps": 0, "optim.micro_steps": 1, "optim.ema": 0,
        "optim.max_grad_norm": 0, "optim.weight_decay": 0,
        "evaluate.every": 0, "evaluate.validation_rows": 0, "evaluate.batch_size": 1, "evaluate.samples": 0,
        "run.seed": 0, "run.threads": 1, "run.save_every": 1,
    }  # fmt: skip
    above_0 = (
        "warmup.lr", "rollout.temperature", "rollout.top_p", "rollout.shift", "rollout.noise_level", "rollout.sigma",
        "rewards.timeout_s", "optim.lr",
    )  # fmt: skip

    def get(key: str) -> Any:
        """None also for a key of another kind of rollout."""
        section, name = key.split(".")
        return getattr(getattr(config, section), name, None)

    for key, limit in at_least.items():
        if get(key) is not None and get(key) < limit:
            raise ConfigError(f"{key}={get(key)} is below its least value {limit}")
    for key in above_0:
        if get(key) is not None and not get(key) > 0:
            raise ConfigError(f"{key}={get(key)} must be above 0")
    if isinstance(config.rollout, FlowRollout):
        _check_flow(config.rollout)
    elif isinstance(config.rollout, ForecastRollout):
        _check_forecast(config)
    else:
        _check_language(config)
    if config.optim.ema >= 1:
        raise ConfigError(f"optim.ema={config.optim.ema} must lie in [0, 1); 0.999 is usual, 0 averages nothing")
    if not 0 <= config.data.validation_share < 1:
        raise ConfigError(f"data.validation_share={config.data.validation_share} must lie in [0, 1)")
    if not 0 <= config.rewards.max_failure_share <= 1:
        raise ConfigError(f"rewards.max_failure_share={config.rewards.max_failure_share} must lie in [0, 1]")
    if (config.warmup.labels == "none") != (config.warmup.steps == 0):
        raise ConfigError(
            f"warmup.labels={config.warmup.labels} and warmup.steps={config.warmup.steps} contradict each other; "
            "set labels to gold or demonstrations and steps above 0, or labels=none and steps=0 for no warm start"
        )
    if config.data.validation in (config.data.train, config.data.test):
        raise ConfigError(
            f"data.validation={config.data.validation} is also data.train or data.test; name a split of its own, or leave it "
            f"out and hold back data.validation_share of the training clusters"
        )
    if config.rewards.constraints and not config.evaluate.every:
        raise ConfigError(
            "rewards.constraints follow evaluations, and evaluate.every=0 makes none; set it to 1 or more"
        )
    for name, constraint in config.rewards.constraints.items():
        _check_constraint(f"rewards.constraints.{name}", constraint)
    for name in config.trainer:
        if name in OWNED:
            raise ConfigError(f"trainer.{name} is decided elsewhere; set {OWNED[name]} instead")


def _check_language(config: Config) -> None:
    if config.rollout.top_p > 1:
        raise ConfigError(f"rollout.top_p={config.rollout.top_p} is a share: it must lie in (0, 1]")
    for name, off in (("micro_steps", None), ("ema", 0.0)):
        if (value := getattr(config.optim, name)) != off:
            raise ConfigError(f"optim.{name}={value} is for flow policies; a language model has nothing of the kind")


def _check_flow(rollout: FlowRollout) -> None:
    """What its keys say to each other."""
    window, size, steps = rollout.window, rollout.window_size, rollout.steps
    if window in ("all", "active") and size:
        noisy = "every step but the last" if window == "all" else "as many of the first steps as are worth it"
        raise ConfigError(
            f"rollout.window={window} makes {noisy} noisy, and rollout.window_size={size} names a number; "
            f"set window_size=0, or window=first"
        )
    if window in ("first", "sliding", "random") and not 1 <= size < steps:
        raise ConfigError(
            f"rollout.window={window} needs rollout.window_size in 1..{steps - 1} (it is {size}): so many of the "
            f"rollout.steps={steps} are noisy, and never the last one"
        )
    if rollout.shortcut and window not in ("first", "active"):
        raise ConfigError(
            f"rollout.shortcut={rollout.shortcut} takes the place of the steps after a window at the start; "
            f"rollout.window={window} is none: set window=first with a window_size, window=active, or shortcut=0"
        )
    if rollout.guidance_rescale and rollout.guidance == 1:
        raise ConfigError(
            "rollout.guidance_rescale=true rescales nothing while rollout.guidance=1; set guidance above 1"
        )


def _check_forecast(config: Config) -> None:
    """What its keys say to each other."""
    rollout = config.rollout
    if rollout.leads_every and rollout.first_leads > rollout.leads:
        raise ConfigError(
            f"rollout.first_leads={rollout.first_leads} is above rollout.leads={rollout.leads}: the curriculum grows, so begin "
            f"with at most {rollout.leads}, or set leads_every=0 for no curriculum"
        )
    if config.warmup.straighten:
        raise ConfigError(f"warmup.straighten={config.warmup.straighten} is for flow policies; set it to 0")


def _check_constraint(key: str, constraint: Constraint) -> None:
    if (constraint.at_least is None) == (constraint.at_most is None):
        raise ConfigError(
            f"{key} has at_least={constraint.at_least} and at_most={constraint.at_most}; give exactly one of them"
        )
    if constraint.kp < 0 or constraint.ki < 0 or not constraint.kp + constraint.ki > 0:
        raise ConfigError(f"{key} has kp={constraint.kp:g} and ki={constraint.ki:g}; both at least 0, and one above it")
    if not constraint.cap > 0:
        raise ConfigError(f"{key}.cap={constraint.cap:g} must be above 0")


def run_name(config_name: str, task: str | None, seed: int) -> str:
    return f"{config_name}{f'-{task}' if task else ''}-s{seed}"
