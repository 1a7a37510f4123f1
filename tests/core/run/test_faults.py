"""Faults of a whole run: what the command exits with and says, what it leaves, and that the same command goes on.

A run of the app in faulty_apps/ takes about a second: 28 prompts, six steps of four, a checkpoint at steps 2, 4 and 6.
"""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from random import Random
from string import ascii_letters

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))  # the processes, and the workers in them, get this one's sys.path

import faulty_rewards
import faulty_run
from faulty_run import RUN, Command, Event, command

from core.run.folder import RunFolder

ROLLOUTS = "core.run.folder:RunFolder.log_rollouts"
MANY = range(1, 1000)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The home of a run that nothing befell."""
    home = tmp_path_factory.mktemp("reference")
    ended = command(home)
    assert ended.code == 0, ended.error
    return home


@pytest.fixture
def home(reference, tmp_path):
    """A place with the data and the warm start of the reference."""
    for name in ("data", "warmup"):
        shutil.copytree(reference / "runs" / name, tmp_path / "runs" / name)
    return tmp_path


def model(home, run=RUN):
    return (home / run / "model" / "model.safetensors").read_bytes()


def sentence(ended, code=2):
    """What a command that was refused or stopped said last: one line, no traceback."""
    assert ended.code == code, ended.error
    assert "Traceback" not in ended.error
    last = ended.error.splitlines()[-1]
    assert last.startswith("error: ")
    return last


def checkpoints(run):
    """The checkpoints that a resumed run could take; each must be whole."""
    found = []
    for folder in sorted((run / "checkpoints").glob("checkpoint-*")):
        load_file(folder / "model.safetensors")
        torch.load(folder / "optimizer.pt")
        assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == int(folder.name[11:])
        found.append(int(folder.name[11:]))
    return found


def assert_nothing_is_half_written(run):
    assert [path for path in run.rglob("*") if path.name.endswith(".part")] == []
    for path in run.glob("*.json"):
        json.loads(path.read_text())
    RunFolder(run).read_rollouts()


def assert_goes_on(home, reference, after, *arguments, run=RUN):
    """The same command goes on after step `after` (None: from the start), to the bits of the reference."""
    ended = command(home, *arguments)
    assert ended.code == 0, ended.error
    assert ("resuming after step" in ended.out) == (after is not None)
    assert after is None or f"resuming after step {after}\n" in ended.out
    assert model(home, run) == model(reference)
    folder = RunFolder(home / run)
    assert [line["step"] for line in folder.read_metrics() if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert sorted(set(folder.read_rollouts()["step"].to_pylist())) == [1, 2, 3, 4, 5, 6]
    assert_nothing_is_half_written(home / run)


# -- rewards -----------------------------------------------------------------------------------------------------------


def test_no_fault_of_a_reward_passes_for_a_judgement(home):
    (home / "fault").write_text("some")
    ended = command(home, "--set", "rewards.workers=4")
    assert ended.code == 0, ended.error
    folder = RunFolder(home / RUN)
    rows = folder.read_rollouts().to_pylist()
    reasons = {
        "raise": "error", "nan": "failed", "inf": "bad_reward_value", "string": "bad_reward_value",
        "kill": "killed_worker", "hang": "timeout",
    }  # fmt: skip
    count = dict.fromkeys(faulty_rewards.FAULTS, 0)
    for row in rows:
        text = row["completion"]
        fault = faulty_rewards.fault_of(text, row["prompt"].split()[1], "some")
        assert row["reason/likeness"] == reasons.get(fault, "")
        if fault:
            count[fault] += 1
        if fault in ("raise", "nan", "inf", "string"):  # nobody knows: no number at all, and no weight in the loss
            assert all(math.isnan(row[name]) for name in ("reward", "reward/likeness", "reward/brevity"))
            assert (row["keep"], row["advantage"]) == (0, 0)
        else:  # a completion that costs two workers is at fault itself
            assert row["reward/likeness"] == (0 if fault in reasons else pytest.approx(faulty_rewards.spread(text)))
            assert row["keep"] == 1
    assert all(count.values()), count
    lines = [line for line in folder.read_metrics() if "loss" in line]
    total = {name: sum(line[name] for line in lines) for name in lines[0]}
    assert total["reward_failures/likeness"] == sum(count[fault] for fault in ("raise", "nan", "inf", "string"))
    assert (total["reward_failures/brevity"], total["timeouts"]) == (0, count["hang"])
    assert total["killed_workers"] == count["kill"]
    assert total["unscored"] == pytest.approx(total["reward_failures/likeness"] / 16)


def test_a_reward_that_always_raises_stops_the_run_and_the_mended_one_goes_on(home, reference):
    breaks = Event(ROLLOUTS, [2], partial(faulty_run.begin_fault, "raise"))
    ended = command(home, events=(breaks,))
    assert ended.code == 2
    said = ended.error[ended.error.index("error: 16 of the last 16 rows could not be scored") :]
    assert (
        "above max_failure_share=0.5:\n  likeness: 16 failures; its first was error: RuntimeError: the grader" in said
    )
    assert "another rank" not in ended.error
    assert checkpoints(home / RUN) == [2]
    assert_nothing_is_half_written(home / RUN)
    (home / "fault").unlink()
    assert_goes_on(home, reference, 2)


def test_workers_that_all_die_at_once_change_nothing(home, reference):
    judge = "core.train.language:LanguageTrainer._calculate_rewards"
    ended = command(
        home,
        "--set",
        "rewards.workers=2",
        events=(
            Event(ROLLOUTS, [1, 5], faulty_run.kill_workers),  # idle ones
            Event(judge, [3], partial(faulty_run.begin_fault, "slow")),
            Event(judge, [3], faulty_run.kill_workers_soon),  # busy ones
            Event(judge, [4], partial(faulty_run.begin_fault, "")),
        ),
    )
    assert ended.code == 0, ended.error
    killed = (home / "killed").read_text().split()
    assert len(killed) == 3
    assert all(int(count) >= 2 for count in killed), killed
    assert model(home) == model(reference)
    lines = [line for line in RunFolder(home / RUN).read_metrics() if "loss" in line]
    assert all(line[name] == 0 for line in lines for name in ("unscored", "timeouts", "killed_workers"))


# -- the disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(home):
    """A disk of 8 MB at home/small, which can be filled."""
    if not faulty_run.mount(home / "small"):
        pytest.skip("no disk may be mounted here")
    yield home / "small" / "run"
    subprocess.run(["umount", "-l", home / "small"], check=True)


WRITE, SAVE = "core.run.folder:RunFolder.write_bytes", "transformers.modeling_utils:safe_save_file"


@pytest.mark.parametrize(
    ("where", "end", "free_kb", "left"),
    [
        ("torch:save", "checkpoint-4/optimizer.pt", 100, [2]),  # half of the optimizer's state fits
        pytest.param(SAVE, "checkpoint-4/model.safetensors", 4, [2], marks=pytest.mark.slow),
        pytest.param(SAVE, ".model.part/model.safetensors", 4, [4, 6], marks=pytest.mark.slow),
        pytest.param(WRITE, "before.json", 0, [], marks=pytest.mark.slow),
        pytest.param(WRITE, "step-000003.parquet", 0, [2], marks=pytest.mark.slow),
        pytest.param(WRITE, "report.html", 8, [4, 6], marks=pytest.mark.slow),
        pytest.param(WRITE, "summary.json", 0, [4, 6], marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_ends_the_run_in_a_sentence(home, reference, small, where, end, free_kb, left):
    full = Event(where, MANY, partial(faulty_run.fill, "small", free_kb, end))
    said = sentence(command(home, "--run", "small/run", events=(full,)))
    assert said.startswith("error: small/run cannot be written: No space left on device (0.")
    assert said.endswith(" MB are free there); what it holds is whole. Free some space, then the same command goes on")
    assert checkpoints(small) == left
    assert not (small / "summary.json").exists()
    assert_nothing_is_half_written(small)
    (home / "small" / "filler").unlink()
    assert_goes_on(home, reference, left[-1] if left else None, "--run", "small/run", run="small/run")


@pytest.mark.slow
def test_a_disk_that_fills_up_while_metrics_are_logged_cuts_at_most_the_last_line(home, reference, small):
    full = Event("core.run.folder:RunFolder.log_metrics", [4], partial(faulty_run.fill, "small", 0, ""))
    logged = Event("core.run.folder:RunFolder.log_metrics", [4], faulty_run.log_much)
    assert "No space left on device" in sentence(command(home, "--run", "small/run", events=(full, logged)))
    assert [line["step"] for line in RunFolder(small).read_metrics()] == [1, 2, 3]
    (home / "small" / "filler").unlink()
    assert_goes_on(home, reference, 2, "--run", "small/run", run="small/run")


@pytest.mark.slow
def test_a_full_disk_while_the_warm_start_is_written_leaves_none(home, reference, small):
    (home / "runs" / "warmup").rename(home / "kept")
    (home / "runs" / "warmup").symlink_to(home / "small")
    full = Event(SAVE, [1], partial(faulty_run.fill, "small", 4, ".part/model.safetensors"))
    said = sentence(command(home, events=(full,)))
    (made,) = (home / "kept").glob("faulty-*")
    assert said.startswith(f"error: runs/warmup/{made.name} cannot be written: No space left on device (0.")
    assert {path.name for path in (home / "small").iterdir()} == {"filler", f".{made.name}.lock"}
    (home / "small" / "filler").unlink()
    assert_goes_on(home, reference, None)


def test_a_file_that_may_not_grow_is_a_sentence_too(home, reference):
    """Needs no right to mount: a limit on the size of files fails torch and safetensors as a full disk does."""
    grown = Event(ROLLOUTS, [3], partial(faulty_run.limit_files, 64))
    said = sentence(command(home, events=(grown,)))
    assert said.startswith(f"error: {RUN} cannot be written: File too large (")
    assert checkpoints(home / RUN) == [2]
    assert_goes_on(home, reference, 2)


def test_a_run_below_a_file_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    ended = command(tmp_path, "--run", "file/a/run")
    assert sentence(ended) == (
        "error: file/a/run cannot be written: Not a directory; make it writable, or use a folder that is (RUN=<path>, or "
        "start in another)"
    )
    assert ended.out == ""
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("exists", [False, True])
def test_a_read_only_folder_is_refused_before_any_work(home, small, exists):
    if exists:
        RunFolder.open(small, {}).close()
    subprocess.run(["mount", "-o", "remount,ro", home / "small"], check=True)
    ended = command(home, "--run", "small/run")
    assert sentence(ended).startswith("error: small/run cannot be written: Read-only file system; make it writable, or")
    assert ended.out == ""


# -- the data ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """Writes a data set of the given training words; returns the arguments that name it."""

    def write(words):
        (tmp_path / "mine").mkdir()
        for split in ("train", "test"):
            rows = [
                {"id": f"{split}-{i}", "word": word} for i, word in enumerate(words if split == "train" else ["bal"])
            ]
            (tmp_path / "mine" / f"{split}.json").write_text(json.dumps(rows))
        return "--data", "mine"

    return write


WORDS = ["bal", "dem", "kon", "bar", "del", "kor"]
COLD = "warmup.labels=none warmup.steps=0"
LONG = "".join(Random(0).choices(ascii_letters, k=3000))  # hardly shorter in 300 tokens


def test_fewer_rows_than_a_batch_are_refused_before_the_warm_start(tmp_path, data):
    said = sentence(command(tmp_path, *data(WORDS[:3])))
    assert "3 training prompts are fewer than the 4 of one generation batch (prompts_per_step=4" in said
    assert not (tmp_path / "runs" / "warmup").exists()


def test_long_prompts_are_left_out_and_counted_aloud(tmp_path, data):
    ended = command(tmp_path, *data([*WORDS, LONG[:200], LONG[-200:]]), "--set", "optim.steps=2")
    assert ended.code == 0, ended.error
    left_out = "warning: 2 of 8 training prompts are longer than rollout.max_prompt_length=24 tokens and are left out"
    assert left_out in ended.out
    assert {row["prompt"].split()[1] for row in RunFolder(tmp_path / RUN).read_rollouts().to_pylist()} <= set(WORDS)


def test_a_prompt_and_its_completion_must_fit_the_model_s_context(tmp_path, data):
    ended = command(tmp_path, *data([*WORDS, LONG]), "--set", f"{COLD} optim.steps=2 rollout.max_prompt_length=9999")
    assert ended.code == 0, ended.error
    assert (
        "warning: 1 of 7 training prompts are longer than the 1016 that rollout.max_completion_length=8 leaves of the "
        "model's context of 1024 tokens and are left out" in ended.out
    )


@pytest.mark.parametrize(
    ("words", "options", "said"),
    [
        (
            [LONG[i : i + 200] for i in range(6)],
            "",
            r"every training prompt is longer than rollout.max_prompt_length=24 tokens \(the shortest has \d+",
        ),
        ([*WORDS[:3], LONG[:200]], "", "3 training prompts are fewer than the 4 of one generation batch"),
        (
            WORDS,
            "rollout.max_completion_length=1024",
            "longer than the 0 that rollout.max_completion_length=1024 leaves",
        ),
    ],
)
def test_prompts_that_leave_no_batch_are_refused_before_anything_is_evaluated(tmp_path, data, words, options, said):
    ended = command(tmp_path, *data(words), "--set", options)
    assert re.search(said, sentence(ended))
    assert not (tmp_path / RUN / "before.json").exists()


# -- learning ----------------------------------------------------------------------------------------------------------


FIFTY = "rollout.prompts_per_step=1 run.save_every=99"


def warnings(ended):
    """{warning without its numbers: how often}"""
    return Counter(re.sub(r"\d+", "N", line) for line in ended.out.splitlines() if line.startswith("warning: "))


def test_fifty_steps_without_spread_are_said_once(home):
    (home / "fault").write_text("zero")
    ended = command(home, "--set", f"{FIFTY} optim.steps=50 rewards.weights.brevity=0")
    assert ended.code == 0, ended.error
    (said,) = (
        warning for warning in warnings(ended) if "no group in the last N steps had different rewards: " in warning
    )
    assert set(warnings(ended).values()) == {1}, said
    assert len([line for line in RunFolder(home / RUN).read_metrics() if line.get("zero_spread") == 1]) == 50


def test_fifty_steps_that_nothing_could_judge_are_said_once_and_teach_nothing(home):
    breaks = Event(ROLLOUTS, [6], partial(faulty_run.begin_fault, "nan"))
    ended = command(home, "--set", f"{FIFTY} optim.steps=56 rewards.max_failure_share=1", events=(breaks,))
    assert ended.code == 0, ended.error
    assert set(warnings(ended).values()) == {1}
    said = "\n".join(warnings(ended))
    assert "N% of rollouts could not be scored" in said
    assert (
        "no group in the last N steps had different rewards: no rollout could be judged, so nothing is learned" in said
    )
    assert "entropy fell" not in said, "a mean of nothing is not a mean of 0"
    assert "RuntimeWarning" not in ended.error
    lines = RunFolder(home / RUN).read_metrics()
    assert {line["unscored"] for line in lines[6:]} == {1.0}
    assert not any("reward" in line or "ratio" in line for line in lines[6:])
    assert {(line["loss"], line["grad_norm"]) for line in lines[6:]} == {(0.0, 0.0)}


LOSS = "core.objective.composition:Recipe.loss"


def test_an_update_that_is_not_finite_is_skipped_counted_and_its_row_kept(home):
    spoilt = Event(LOSS, [3], faulty_run.spoil_row)
    ended = command(home, "--set", "optim.steps=4 run.save_every=1", events=(spoilt,))
    assert ended.code == 0, ended.error
    lines = RunFolder(home / RUN).read_metrics()
    assert [line["skipped_updates"] for line in lines] == [0, 0, 1, 0]
    assert [math.isnan(line["loss"]) for line in lines] == [False, False, True, False]
    assert "step 3: loss or gradient norm was not finite at 1 of the steps, first at step 3" in ended.out
    (row,) = json.loads((home / RUN / "samples" / "not-finite-000003.json").read_text())
    rollouts = [row for row in RunFolder(home / RUN).read_rollouts().to_pylist() if row["step"] == 3]
    assert (row["prompt"], row["completion"]) in {(rollout["prompt"], rollout["completion"]) for rollout in rollouts}
    assert row["not_finite_tokens"] == 1
    three, four = (load_file(home / RUN / f"checkpoints/checkpoint-{n}/model.safetensors") for n in (3, 4))
    assert all(tensor.isfinite().all() for tensor in four.values())
    assert any((three[name] != four[name]).any() for name in three)


def test_a_skipped_update_leaves_weights_and_optimizer_as_they_were(home):
    spoilt = Event("transformers.trainer:Trainer._clip_grad_norm", [3], faulty_run.spoil_gradients)
    assert command(home, "--set", "optim.steps=3 run.save_every=1", events=(spoilt,)).code == 0
    two, three = (home / RUN / "checkpoints" / f"checkpoint-{n}" for n in (2, 3))
    assert (two / "model.safetensors").read_bytes() == (three / "model.safetensors").read_bytes()
    before, after = (torch.load(folder / "optimizer.pt")["state"] for folder in (two, three))
    assert before
    assert all(torch.equal(before[i][name], after[i][name]) for i in before for name in before[i])


def test_five_skipped_updates_in_a_row_end_the_run(home):
    spoilt = Event("transformers.trainer:Trainer._clip_grad_norm", range(3, 99), faulty_run.spoil_gradients)
    arguments = "--set", "optim.steps=10"
    said = sentence(command(home, *arguments, events=(spoilt,)))
    assert (
        "the last 5 updates, to step 7, had a gradient norm of nan and were skipped; the weights are those of step 2"
        in said
    )
    assert checkpoints(home / RUN) == [4, 6]
    ended = command(home, *arguments)
    assert ended.code == 0, ended.error
    assert "resuming after step 6" in ended.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("optim.lr=1e38", "step 2: nothing can be sampled, because the model's probabilities are not finite"),
        ("optim.lr=1e38 optim.steps=1 evaluate.samples=1", "evaluation: nothing can be sampled, because the model's"),
        ("warmup.lr=1e38 warmup.steps=4", "the warm start diverged; lower warmup.lr=1e+38 ("),
    ],
)
def test_a_model_that_is_not_finite_is_a_sentence(home, options, said):
    kept = {path.name for path in (home / "runs" / "warmup").glob("faulty-*")}
    assert said in sentence(command(home, "--set", options))
    assert {path.name for path in (home / "runs" / "warmup").glob("faulty-*")} == kept, "a broken start was kept"


# -- processes ---------------------------------------------------------------------------------------------------------


def until(condition, timeout_s=30):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_second_process_on_a_run_is_refused_and_disturbs_nothing(home, reference):
    first = Command(home, events=(Event(ROLLOUTS, [3], partial(faulty_run.wait_for, "go")),))
    until((home / "waiting").exists)
    for more in ((), ("--fresh",), ("--set", "optim.steps=9")):
        said = sentence(command(home, *more))
        assert f"{RUN} is in use by another process (pid {first.process.pid} on " in said
    (home / "go").touch()
    assert first.end().code == 0
    assert model(home) == model(reference)


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_of_two_runs_one_makes_the_warm_start_and_the_other_waits_for_it(tmp_path, reference, killed):
    waits = Event("trl:SFTTrainer.training_step", [2], partial(faulty_run.wait_for, "go"))
    first = Command(tmp_path, "--run", "a", events=(waits,))
    until((tmp_path / "waiting").exists)
    second = Command(tmp_path, "--run", "b")
    until(lambda: "waiting for it" in second.out)
    assert f"pid {first.process.pid} on " in second.out
    if killed:
        first.process.kill()
    (tmp_path / "go").touch()
    for run, one in (("a", first), ("b", second)):
        assert one.end().code == (-signal.SIGKILL if killed and run == "a" else 0)
        assert (tmp_path / "runs/faulty" / run / "model").exists() != (killed and run == "a")
    assert ("\nwarm start\n" in second.out) == killed
    assert model(tmp_path, Path("runs/faulty/b")) == model(reference)
    assert not list((tmp_path / "runs").rglob("*.part"))


@pytest.mark.parametrize(
    ("where", "calls", "do", "after"),
    [
        ("torch:save", MANY, partial(faulty_run.die_saving, "checkpoint-4/optimizer.pt", half=True), 2),
        ("os:replace", MANY, partial(faulty_run.die_moving, "report.html"), 6),
        *(
            pytest.param(*moment, marks=pytest.mark.slow)
            for moment in (
                ("json:dumps", [1], faulty_run.die, None),  # before the offline data are written
                ("trl:SFTTrainer.training_step", [2], faulty_run.die, None),
                (ROLLOUTS, [3], faulty_run.die, 2),
                (LOSS, [5], faulty_run.die, 4),
                ("torch:save", MANY, partial(faulty_run.die_saving, "checkpoint-4/scheduler.pt"), 2),
                ("core.run.folder:RunFolder.log_metrics", [4], faulty_run.die_logging, 2),
                ("shutil:rmtree", MANY, partial(faulty_run.die_removing, "checkpoint-2"), 6),
                ("os:rename", MANY, partial(faulty_run.die_moving, "tiny-s0/model"), 6),
                ("os:replace", MANY, partial(faulty_run.die_moving, "summary.json"), 6),
            )
        ),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, home, reference, where, calls, do, after):
    if after is None:
        shutil.rmtree(home / "runs")
    ended = command(home, events=(Event(where, calls, do),))
    assert ended.code == -signal.SIGKILL, ended.error
    assert not (home / RUN / "summary.json").exists()
    assert_goes_on(home, reference, after)
