"""core.main: every mistake of a new user is one sentence and exit code 2; and what the Makefile's options become."""

import re
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core import app as apps
from core import config as configs
from core.main import COMMANDS, HELP, command, main, parser, resolved, run_path
from core.objective import family
from core.ranks import OtherRankFailed
from core.run.folder import RunFolder
from core.run.stopping import Stopped
from data.synthetic import spider

SQL = "--app=text_to_sql"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Every command runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DEBUG", raising=False)
    return tmp_path


def refused(capsys, *arguments):
    """The sentence that a command ends with."""
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


def test_every_command_has_a_help_line_and_a_function():
    assert set(COMMANDS) == set(HELP)
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["fly"])
    assert ended.value.code == 2


def test_a_dry_run_prints_config_and_batch_and_touches_nothing(capsys, home):
    assert main(["train", SQL, "--dry-run", "--seed", "3", "--set", "optim.lr=1e-5 rollout.group_size=4"]) == 0
    shown = capsys.readouterr().out
    assert "lr: 1.0e-05" in shown
    assert "seed: 3" in shown
    assert "prompts x 4 completions = " in shown.splitlines()[-1]
    assert list(home.iterdir()) == []


def test_apps_are_listed(capsys):
    assert main(["apps"]) == 0
    assert "text_to_sql" in capsys.readouterr().out


@pytest.mark.parametrize(("columns", "width"), [("60", 100), ("110", 110), ("400", 120)])
def test_recipes_are_listed_as_wide_as_the_terminal_within_limits(capsys, monkeypatch, columns, width):
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["recipes"]) == 0
    assert capsys.readouterr().out == family.table(width) + "\n"


def test_one_recipe_or_a_combination_is_described(capsys):
    assert main(["recipes", "--name", "ngrpo"]) == 0
    assert "virtual: 1    (a whole number from 1 up)" in capsys.readouterr().out
    assert main(["recipes", "--name", "gdpo+gspo"]) == 0
    assert "config: objective: {recipe: [gdpo, gspo]}" in capsys.readouterr().out
    assert "DEBUG" not in refused(capsys, "recipes", "--name", "nrgpo"), "the sentence is for the user"


def test_the_page_on_recipes_is_written(home):
    assert main(["recipes", "--write", "page.md"]) == 0
    assert (home / "page.md").read_text() == family.page()


def test_a_recipe_that_compares_answers_finds_them_in_its_preset(capsys):
    chosen = "objective.recipe=seed_grpo rewards.preset="
    assert main(["train", SQL, "--dry-run", "--set", f"{chosen}answers"]) == 0
    assert "recipe: seed_grpo" in capsys.readouterr().out
    assert "unknown reward component in answers=" in refused(capsys, "train", SQL, "--set", f"{chosen}default")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "--app", "text_to_sq"], "did you mean 'text_to_sql'"),
        (["train", SQL, "--config", "huge"], "no config huge.yaml in apps/text_to_sql; there are: "),
        (["train", SQL, "--task", "hard"], "TASK"),
        (["train", SQL, "--set", "optim.lrr=1"], "unknown key in section optim 'lrr'; did you mean 'lr'"),
        (["train", SQL, "--set", "task.template=fence"], "did you mean 'fenced'"),
        (["train", SQL, "--set", "trainer.beta=0.1"], "set objective.beta instead"),
        (["train", SQL, "--set", "objective.recipe=drgrpo"], "did you mean 'dr_grpo'"),
        (["train", SQL, "--set", "objective.epsilon_hihg=1"], "did you mean 'epsilon_high'"),
        (["train", SQL, "--set", "rewards.weights.executs=1"], "did you mean 'executes'"),
        (["train", SQL, "--set", "rewards.preset=reasoning"], "did you mean 'reasoning_sql'"),
        (["train", SQL, "--set", "optim.micro_batch=7"], "optim.micro_batch=7 does not divide the 64 rollouts"),
        (["train", SQL, "--data", "nowhere"], "DATA=nowhere is not a folder; see data/README.md"),
        (["train", SQL, "--set", "run.needs_gpu=true", "--model", "Qwen/Q-7B"], "about"),
        (["train", SQL, "--set", "optim.lr=[1"], "override 'optim.lr=[1': the value is not valid YAML"),
        (["train", SQL, "--set", '"optim.lr=1'], "cannot be split into section.key=value"),
        (["train", SQL, "--set", "optim.lr.x=1"], "reaches into optim.lr, which is a value"),
        (["train", SQL, "--set", "optim.lr=.inf"], "optim.lr=inf is not a finite number"),
        (["train", SQL, "--set", "rollout.top_p=2"], "rollout.top_p=2.0 is a share"),
        (["train", SQL, "--set", "warmup.steps=0"], "warmup.labels=demonstrations and warmup.steps=0 contradict"),
        (["train", SQL, "--set", "optim.schedule=linar"], "linar is not a valid SchedulerType"),
        (["train", SQL, "--set", "trainer.adam_beta2=x"], "trainer.adam_beta2='x' is not a finite number"),
        (["train", SQL, "--set", "trainer.adam_bet2=1"], "did you mean 'adam_beta2'?"),
        (["train", SQL, "--set", "launch.sampler=vllm_colocate"], "needs the package vllm, which is not installed"),
        (["train", SQL, "--dry-run", "--set", "objective.recipe=drgrpo"], "did you mean 'dr_grpo'"),
        (["recipes", "--name", "ngrp"], "did you mean 'ngrpo'"),
        (["recipes", "--name", "ngrpo+dapo"], "recipes ngrpo and dapo both set surrogate, reduce"),
        (["eval", SQL, "--run", "other"], "runs/text_to_sql/other holds no trained model; run make train"),
        (["eval", SQL, "--model", "nowhere"], "MODEL=nowhere cannot be loaded"),
        (["report", SQL], "has no finished run; run make train APP=text_to_sql first"),
        (["predict", SQL, "--input", "none.jsonl", "--output", "o"], "INPUT=none.jsonl is no file"),
    ],
)
def test_a_mistake_is_one_sentence(capsys, arguments, sentence):
    assert sentence in refused(capsys, *arguments)


@pytest.mark.parametrize("change", [["--set", "optim.schedule=linar"], ["--data", "nowhere"]])
def test_a_config_that_cannot_run_deletes_nothing(capsys, home, change):
    path = home / "runs" / "text_to_sql" / "tiny-s0"
    with RunFolder.open(path, {}) as run:
        run.write_text("precious.txt", "")
    refused(capsys, "train", SQL, "--fresh", *change)
    assert (path / "precious.txt").exists()


def test_a_run_is_evaluated_with_its_own_config_and_what_the_command_adds(home):
    options = parser().parse_args(["eval", SQL, "--run", "mine", "--set", "evaluate.batch_size=7"])
    config = resolved(options)[1]
    made = replace(config, rollout=replace(config.rollout, max_completion_length=33))
    RunFolder.open(home / "runs" / "text_to_sql" / "mine", made.as_dict()).close()
    assert resolved(options, of_run=True)[1] == made
    assert resolved(options)[1] == config
    options.model = "other"
    assert resolved(options, of_run=True)[1].rollout == config.rollout


def test_another_package_of_a_room_s_name_is_refused(capsys, home, monkeypatch):
    (home / "data").mkdir()
    (home / "data" / "__init__.py").write_text("")
    monkeypatch.delitem(sys.modules, "data", raising=False)
    monkeypatch.syspath_prepend(str(home))
    assert f"the package 'data' comes from {home / 'data'}" in refused(capsys, "apps")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ModuleNotFoundError("No module named 'peft'", name="peft"), "the package 'peft' is not installed; make setup"),
        (ModuleNotFoundError("this needs sqlglot; install it"), "this needs sqlglot; install it"),
    ],
)
def test_a_missing_package_is_a_sentence_but_a_missing_file_of_ours_is_a_bug(capsys, monkeypatch, error, sentence):
    def missing(options):
        raise error

    monkeypatch.setitem(COMMANDS, "apps", missing)
    assert sentence in refused(capsys, "apps")
    error.name = "core.lost"
    with pytest.raises(ModuleNotFoundError):
        main(["apps"])


def test_a_database_that_does_not_open_stops_the_run_before_training(capsys, home):
    spider.write(home / "data", 0, train_databases=4, dev_databases=2, train_questions=10, dev_questions=5)
    for path in (home / "data").glob("database/*/*.sqlite"):
        path.write_bytes(b"SQLite format 3\0" + b"x" * 5000)
    arguments = ["train", SQL, "--data", home / "data", "--set", "rewards.max_failure_share=1 rewards.workers=1"]
    error = refused(capsys, *arguments).splitlines()[-1]
    assert re.search(
        r"gold answer of row train-\d+ cannot be judged on execution_match \(database_unavailable: .*sqlite", error
    )


def test_a_new_app_needs_a_fresh_name_that_python_can_import(capsys):
    assert "text_to_sql" in refused(capsys, "new", SQL)
    assert "2-words" in refused(capsys, "new", "--app", "2-words")


def test_an_app_s_missing_extra_is_named(capsys, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'sqlglot'", name="sqlglot")

    monkeypatch.setattr(apps.importlib, "import_module", missing)
    assert "needs the package 'sqlglot'" in refused(capsys, "check", SQL)


@pytest.mark.parametrize(
    ("visible", "options", "said"),
    [
        (
            2,
            [],
            "2 GPUs are visible and the run has one process: GPUS=2 uses them all, CUDA_VISIBLE_DEVICES=0 takes one",
        ),
        (2, ["--gpus=3"], "GPUS=3 is more than the 2 GPUs that are visible"),
        (0, ["--gpus=0"], "GPUS=0 is below its least value 1"),
        (0, ["--gpus=3"], "does not divide over 3 ranks; every rank needs whole groups, so use a multiple of 3"),
        (1, ["--set=launch.strategy=fsdp"], "launch.strategy=fsdp spreads a model over ranks and this run has one"),
        (0, ["--gpus=2", "--set=launch.strategy=fsdp"], "without them accelerate would quietly run ddp instead"),
        (2, ["--gpus=2", "--set=launch.strategy=deepspeed"], "needs the package deepspeed, which is not installed"),
        (
            2,
            ["--gpus=2", "--set=launch.strategy=fsdp launch.file=none.json"],
            "launch.file=none.json is not a readable",
        ),
        (0, ["--set=launch.sampler=vllm_server"], "needs the package vllm, which is not installed"),
        (0, ["--set=trainer.fsdp=true"], "trainer.fsdp is decided elsewhere; set launch.strategy instead"),
    ],
)
def test_ranks_that_this_machine_cannot_run_are_refused(visible, options, said, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert said in refused(capsys, "train", SQL, *options)


def test_a_folder_that_is_no_spider_folder_is_refused(capsys, home):
    (home / "data").mkdir()
    assert str(home / "data") in refused(capsys, "train", SQL, "--data", home / "data")


def test_a_request_that_cannot_be_read_is_named_by_its_line(capsys, home):
    base = sqlite3.connect(home / "d.sqlite")
    base.execute("CREATE TABLE a (b)")
    base.close()
    (home / "in.jsonl").write_text(f'{{"question": "?", "database": "{home}/d.sqlite"}}\n\n{{"question": "?"}}\n')
    error = refused(capsys, "predict", SQL, "--input", "in.jsonl", "--output", "out.jsonl")
    assert "in.jsonl, line 3 lacks the key 'database'" in error
    for text, sentence in (("[1]", "line 1 is not a JSON object: [1]"), ("", "INPUT=in.jsonl is empty"),
                           ('{"question": 3, "database": "d.sqlite"}', "line 1: 'question' is 3; it must be text")):  # fmt: skip
        (home / "in.jsonl").write_text(text)
        assert sentence in refused(capsys, "predict", SQL, "--input", "in.jsonl", "--output", "out.jsonl")
    assert "OUTPUT=. is a folder" in refused(capsys, "predict", SQL, "--input", "in.jsonl", "--output", "")


def test_after_a_refused_config_the_mended_one_may_use_the_same_run(home):
    """A typo must not ask for FRESH=1; a run with work in it must."""
    path = home / "runs" / "run"
    RunFolder.open(path, {"recipe": "grop"}).close()
    run = RunFolder.open(path, {"recipe": "grpo"})
    assert run.config == {"recipe": "grpo"}
    run.log_metrics(0, {"eval/x": 1.0})
    run.close()
    with pytest.raises(ValueError, match="holds a run with another config"):
        RunFolder.open(path, {"recipe": "dapo"})


def test_a_bug_keeps_its_traceback_and_debug_shows_every_other(monkeypatch):
    monkeypatch.setitem(COMMANDS, "apps", lambda options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["apps"])
    monkeypatch.setenv("DEBUG", "1")
    with pytest.raises(configs.ConfigError):
        main(["report", SQL])


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (Stopped(signal.SIGTERM), 0, "stopped; the same command goes on\n"),
        (Stopped(signal.SIGINT), 130, "stopped; the same command goes on\n"),
        (OtherRankFailed("it has said why"), 2, ""),
    ],
)
def test_what_a_command_that_was_stopped_exits_with(how, code, said, monkeypatch, capsys):
    def stop(options):
        raise how

    monkeypatch.setitem(COMMANDS, "apps", stop)
    assert main(["apps"]) == code
    assert capsys.readouterr().err == said


def test_where_a_run_lives_and_the_command_that_does_it_again():
    options = parser().parse_args(["train", SQL, "--seed", "2", "--set", "optim.lr=0.1 optim.steps=3"])
    app, config = resolved(options)
    assert run_path(options, app, config) == Path("runs/text_to_sql/tiny-s2")
    assert command(options) == "make train APP=text_to_sql SEED=2 SET='optim.lr=0.1 optim.steps=3'"
    for run, path in (("mine", "runs/text_to_sql/mine"), ("a/b", "a/b")):
        options.run = run
        assert run_path(options, app, config) == Path(path)


def test_a_reader_that_has_seen_enough_is_no_error():
    start = [sys.executable, "-P", "-m", "core.main", "recipes"]
    started = subprocess.Popen(start, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    started.stdout.close()
    with started.stderr as errors:
        assert errors.read() == b""
    assert started.wait() == 0
