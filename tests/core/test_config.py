"""core.config: strict sections, overrides, and what `trainer:` may not decide."""

from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Literal

import pytest
from trl import GRPOConfig

from core.app import Flow, Forecast, Language
from core.batch import Batch
from core.config import (
    OWNED,
    Config,
    ConfigError,
    Constraint,
    FlowRollout,
    ForecastRollout,
    LanguageRollout,
    changed,
    load,
    resolve,
    run_name,
)


@dataclass(frozen=True)
class Options:
    template: Literal["plain", "fenced"] = "plain"
    words: int = 3


APP = SimpleNamespace(
    name="toy",
    acts=Language(prompt=str),
    options=Options,
    tasks={"hard": {"optim.lr": 0.5, "task.words": 9}, "easy": {"optim.lr": 0.1}},
    variants={},
)
FLOW = SimpleNamespace(**vars(APP) | {"acts": Flow(prompt=str, condition=dict, build=len)})
FORECAST = SimpleNamespace(**vars(APP) | {"acts": Forecast(*[str] * 8)})


@pytest.fixture
def config(tmp_path):
    """Loads a config from YAML text."""

    def from_text(text="", *overrides, **options):
        path = tmp_path / "tiny.yaml"
        path.write_text(text)
        return load(APP, path, overrides, **options)

    return from_text


def test_an_empty_file_is_all_defaults(config):
    assert config() == Config(task=Options())
    assert config().objective == {"recipe": "grpo"}
    assert config("objective: {beta: 0.1}").objective == {"recipe": "grpo", "beta": 0.1}


def test_file_then_task_then_override_then_setting(config):
    text = "optim: {lr: 0.9, steps: 7}\ntask: {words: 1}"
    assert config(text).optim.lr == 0.9
    assert config(text, task="hard").optim.lr == 0.5
    assert config(text, task="hard").task == Options(words=9)
    assert config(text, "optim.lr=0.3", task="hard").optim.lr == 0.3
    last = config(text, "optim.lr=0.3", task="hard", optim__lr=0.2, model__path=None)
    assert (last.optim.lr, last.optim.steps, last.model.path) == (0.2, 7, "tiny")


def test_an_override_reaches_into_a_section_that_passes_anything(config):
    overrides = ("rewards.weights.b=2", "objective.recipe=[gdpo, gspo]", "trainer.top_entropy_quantile=0.5")
    made = config("rewards: {weights: {a: 1}}", *overrides)
    assert made.rewards.weights == {"a": 1.0, "b": 2.0}
    assert made.objective["recipe"] == ["gdpo", "gspo"]
    assert made.trainer == {"top_entropy_quantile": 0.5}


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.lr=1e-5", 1e-5),  # YAML reads 1e-5 as text
        ("optim.lr=1", 1.0),
        ("optim.steps=3.0", 3),
        ("optim.micro_batch=4", 4),
        ("optim.micro_batch=", None),
        ("data.folder=2024", "2024"),
        ("run.force_cpu=true", True),
        ("run.control=random_rewards", "random_rewards"),
    ],
)
def test_a_value_becomes_its_field_s_type(config, override, value):
    section, name = override.partition("=")[0].split(".")
    got = getattr(getattr(config("", override), section), name)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "overrides", "sentence"),
    [
        ("optimiser: {lr: 1}", (), "unknown section 'optimiser'; did you mean 'optim'"),
        ("optim: {step: 1}", (), "unknown key in section optim 'step'; did you mean 'steps'"),
        ("task: {templat: plain}", (), "did you mean 'template'"),
        ("task: {template: fancy}", (), "unknown value of task.template: 'fancy'"),
        ("optim: 3", (), "optim must be a section of keys, not 3"),
        ("objective: [grpo]", (), "objective must be a section of keys"),
        ("- a", (), "must be a mapping of sections, not list"),
        ("a: [", (), "tiny.yaml is not valid YAML"),
        ("", ("optim.lr",), "override 'optim.lr' is not of the form section.key=value"),
        ("", ("lr=1",), "override 'lr' names no section"),
        ("", ("optim.lr=fast",), "optim.lr='fast' is not a finite number"),
        ("", ("optim.lr=true",), "optim.lr=True is not a finite number"),
        ("", ("optim.steps=1.5",), "optim.steps=1.5 is not a whole number"),
        ("", ("optim.steps=",), "optim.steps=None is not a whole number"),
        ("", ("run.force_cpu=1",), "run.force_cpu=1 is not true or false"),
        ("", ("rewards.weights.a=much",), "rewards.weights.a='much' is not a finite number"),
        ("", ("rollout.group_size=1",), "rollout.group_size=1 is below its least value 2"),
        ("", ("optim.lr=0",), "optim.lr=0.0 must be above 0"),
        ("", ("optim.lr=.nan",), "optim.lr=nan is not a finite number"),
        ("", ("data.validation_share=1",), "must lie in \\[0, 1\\)"),
        ("", ("objective=1",), "names no section"),
        ("", ("rollout.eval_steps=3",), "unknown key in section rollout 'eval_steps'"),
        ("", ("optim.ema=0.9",), "optim.ema=0.9 is for flow policies"),
        ("", ("optim.micro_steps=2",), "optim.micro_steps=2 is for flow policies"),
    ],
)
def test_a_mistake_is_a_sentence(config, text, overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        config(text, *overrides)


# -- flows


def flow(**rollout):
    return resolve(FLOW, {"rollout": rollout})


def test_the_rollout_section_is_that_of_the_app_s_policy(config):
    assert type(config().rollout) is LanguageRollout
    assert type(flow().rollout) is FlowRollout
    assert flow(steps=6, window="first", window_size=2).rollout == FlowRollout(steps=6, window="first", window_size=2)
    assert Batch.of(flow(prompts_per_step=3, group_size=4)).rollouts == 12
    made = resolve(FLOW, {"rollout": {"guidance": 3}, "optim": {"micro_steps": 2, "ema": 0.99}})
    assert resolve(FLOW, made.as_dict()) == made


@pytest.mark.parametrize(
    ("rollout", "sentence"),
    [
        ({"temperature": 1}, "unknown key in section rollout 'temperature'"),
        ({"steps": 0}, "rollout.steps=0 is below its least value 1"),
        ({"eval_steps": 0}, "rollout.eval_steps=0 is below its least value 1"),
        ({"shift": 0}, "rollout.shift=0.0 must be above 0"),
        ({"noise_level": 0}, "rollout.noise_level=0.0 must be above 0"),
        ({"guidance": -1}, "rollout.guidance=-1.0 is below its least value 0"),
        ({"window_every": 0}, "rollout.window_every=0 is below its least value 1"),
        ({"shortcut": -1}, "rollout.shortcut=-1 is below its least value 0"),
        ({"kernel": "ode"}, "unknown value of rollout.kernel: 'ode'"),
        ({"window": "last"}, "unknown value of rollout.window: 'last'"),
        ({"window": "first"}, r"rollout.window=first needs rollout.window_size in 1..9 \(it is 0\)"),
        (
            {"window": "first", "window_size": 10},
            r"in 1..9 \(it is 10\).* rollout.steps=10 are noisy, and never the last",
        ),
        ({"window": "sliding", "window_size": 4, "steps": 4}, "rollout.window=sliding needs"),
        ({"window": "random"}, "rollout.window=random needs"),
        ({"window_size": 3}, "rollout.window=all makes every step but the last noisy, and rollout.window_size=3"),
        (
            {"window": "active", "window_size": 3},
            "window=active makes as many of the first steps as are worth it noisy",
        ),
        ({"shortcut": 2}, "rollout.shortcut=2 takes the place .*rollout.window=all is none"),
        ({"shortcut": 2, "window": "sliding", "window_size": 3}, "rollout.window=sliding is none"),
        ({"guidance_rescale": True}, "guidance_rescale=true rescales nothing"),
    ],
)
def test_a_schedule_that_contradicts_itself_is_a_sentence(rollout, sentence):
    with pytest.raises(ConfigError, match=sentence):
        flow(**rollout)


@pytest.mark.parametrize(
    "rollout",
    [
        {"steps": 1, "eval_steps": 1},
        {"window": "first", "window_size": 9, "shortcut": 2},
        {"window": "active", "shortcut": 1},
        {"window": "sliding", "window_size": 1, "steps": 2},
        {"guidance": 4, "guidance_rescale": True},
    ],
)
def test_a_schedule_at_its_limits_is_taken(rollout):
    assert flow(**rollout).rollout == FlowRollout(**rollout)


# -- forecasts


def forecast(**rollout):
    return resolve(FORECAST, {"rollout": rollout})


def test_a_forecast_has_a_rollout_section_of_its_own():
    assert type(forecast().rollout) is ForecastRollout
    made = resolve(FORECAST, {"rollout": {"distribution": "gaussian"}, "optim": {"micro_steps": 2, "ema": 0.99}})
    assert resolve(FORECAST, made.as_dict()) == made
    grown = forecast(leads=8, first_leads=3, leads_every=20).rollout
    assert (grown.leads, grown.first_leads) == (8, 3)
    assert forecast(leads=2).rollout.leads == 2, "without a curriculum first_leads means nothing"


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({"rollout": {"temperature": 1}}, "unknown key in section rollout 'temperature'"),
        ({"rollout": {"distribution": "normal"}}, "unknown value of rollout.distribution: 'normal'"),
        ({"rollout": {"bins": 1}}, "rollout.bins=1 is below its least value 2"),
        ({"rollout": {"sigma": 0}}, "rollout.sigma=0.0 must be above 0"),
        ({"rollout": {"rank": 0}}, "rollout.rank=0 is below its least value 1"),
        ({"rollout": {"leads": 0}}, "rollout.leads=0 is below"),
        ({"rollout": {"first_leads": 0}}, "rollout.first_leads=0 is below"),
        ({"rollout": {"leads_every": -1}}, "rollout.leads_every=-1 is below"),
        ({"rollout": {"eval_leads": 0}}, "rollout.eval_leads=0 is below"),
        ({"rollout": {"first_leads": 5, "leads_every": 9}}, "rollout.first_leads=5 is above rollout.leads=4"),
        ({"warmup": {"labels": "gold", "steps": 1, "straighten": 2}}, "warmup.straighten=2 is for flow policies"),
    ],
)
def test_a_forecast_that_contradicts_itself_is_a_sentence(raw, sentence):
    with pytest.raises(ConfigError, match=sentence):
        resolve(FORECAST, raw)


# -- validation and constraints


def test_a_constraint_is_read_with_its_gains():
    made = resolve(APP, {"rewards": {"constraints": {"found": {"metric": "recall", "at_least": 0.6, "cap": 2}}}})
    assert made.rewards.constraints == {"found": Constraint("recall", at_least=0.6, kp=0.05, ki=0.01, cap=2.0)}
    assert resolve(APP, made.as_dict()) == made


@pytest.mark.parametrize(
    ("constraint", "sentence"),
    [
        ({}, "at_least=None and at_most=None; give exactly one of them"),
        ({"at_least": 0, "at_most": 1}, "at_least=0.0 and at_most=1.0; give exactly one of them"),
        ({"at_most": 1, "kp": -1}, "kp=-1 and ki=0.01; both at least 0"),
        ({"at_most": 1, "ki": -1}, "kp=0.05 and ki=-1; both at least 0"),
        ({"at_most": 1, "kp": 0, "ki": 0}, "kp=0 and ki=0; both at least 0, and one above it"),
        ({"at_most": 1, "cap": 0}, "rewards.constraints.found.cap=0 must be above 0"),
        ({"at_mots": 1}, "unknown key in section rewards.constraints.found 'at_mots'; did you mean 'at_most'"),
    ],
)
def test_a_constraint_without_sense_is_a_sentence(constraint, sentence):
    with pytest.raises(ConfigError, match=sentence):
        resolve(APP, {"rewards": {"constraints": {"found": {"metric": "recall", **constraint}}}})


def test_constraints_need_evaluations_and_validation_a_split_of_its_own():
    held = {"rewards": {"constraints": {"found": {"metric": "recall", "at_least": 0}}}}
    with pytest.raises(ConfigError, match=r"evaluate\.every=0 makes none"):
        resolve(APP, held | {"evaluate": {"every": 0}})
    assert resolve(APP, {"data": {"validation": "held"}}).data.validation == "held"
    for split in ("train", "dev"):
        with pytest.raises(ConfigError, match=f"data.validation={split} is also data.train or data.test"):
            resolve(APP, {"data": {"validation": split}})


def test_a_changed_config_is_checked_like_any_other_and_leaves_the_first_as_it_was():
    config = resolve(APP, {"task": {"words": 4}, "rewards": {"weights": {"a": 1}}})
    other = changed(APP, config, task__words=5, rewards__weights__b=2, optim__lr=0.5)
    assert (other.task.words, other.rewards.weights, other.optim.lr) == (5, {"a": 1.0, "b": 2.0}, 0.5)
    assert (config.task.words, config.rewards.weights) == (4, {"a": 1.0})
    with pytest.raises(ConfigError, match="did you mean 'words'"):
        changed(APP, config, task__word=5)
    with pytest.raises(ConfigError, match=r"optim\.lr=-1\.0 must be above 0"):
        changed(APP, config, optim__lr=-1)


@pytest.mark.parametrize(
    ("optim", "sentence"),
    [
        ({"ema": 1}, r"optim.ema=1.0 must lie in \[0, 1\)"),
        ({"ema": -0.1}, "optim.ema=-0.1 is below its least value 0"),
        ({"micro_steps": 0}, "optim.micro_steps=0 is below its least value 1"),
    ],
)
def test_averages_and_chunks_have_limits(optim, sentence):
    with pytest.raises(ConfigError, match=sentence):
        resolve(FLOW, {"optim": optim})


def test_a_missing_file_and_an_unknown_task_name_what_there_is(config, tmp_path):
    config()
    with pytest.raises(ConfigError, match=r"no config huge.yaml in apps/toy; there are: tiny"):
        load(APP, tmp_path / "huge.yaml")
    with pytest.raises(ConfigError, match="unknown TASK 'hards'; did you mean 'hard'"):
        config(task="hards")
    variants = SimpleNamespace(**vars(APP) | {"variants": {"harder": APP}})
    with pytest.raises(
        ConfigError, match=r"unknown TASK 'harde'; did you mean 'harder'\? \(known: easy, hard, harder\)"
    ):
        load(variants, tmp_path / "tiny.yaml", task="harde")
    with pytest.raises(ConfigError, match="app toy has no TASK= to choose"):
        load(SimpleNamespace(**vars(APP) | {"tasks": {}}), tmp_path / "tiny.yaml", task="hard")


@pytest.mark.parametrize("name", sorted(OWNED))
def test_a_field_that_a_section_owns_is_refused_with_the_key_to_use(config, name):
    assert name in GRPOConfig.__dataclass_fields__
    with pytest.raises(ConfigError) as refused:
        config(f"trainer: {{{name}: 1}}")
    assert str(refused.value) == f"trainer.{name} is decided elsewhere; set {OWNED[name]} instead"


def test_the_key_to_use_exists():
    from core.objective.recipes import RECIPES

    options = {"recipe", *(name for recipe in RECIPES.values() for name in recipe.options)}
    sections = {field.name: field.type for field in fields(Config)}
    for instead in OWNED.values():
        for key in instead.split(" (")[0].split(" and "):
            section, _, name = key.partition(".")
            if section == "objective":
                assert name in options
            elif key != "RUN=":
                assert name in {field.name for field in fields(getattr(Config(task=None), section))}, key
                assert section in sections


def test_the_resolved_config_reads_back_as_itself(config):
    made = config("task: {words: 4}\nrewards: {weights: {a: 1}}", "optim.lr=1e-5", "trainer.top_entropy_quantile=0.5")
    assert resolve(APP, made.as_dict()) == made


def test_run_names():
    assert run_name("tiny", None, 0) == "tiny-s0"
    assert run_name("gpu", "hard", 3) == "gpu-hard-s3"
