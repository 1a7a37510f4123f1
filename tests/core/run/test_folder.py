import errno
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from core.run.folder import RunFolder, RunRefused, WriteFailed, make_folder

CONFIG = {"objective": {"recipe": "grpo", "epsilon": 0.2}, "rewards": ["a", "b"], "model": {"tokenizer": "some/path"}}


def rollouts(reasons, **more):
    n = len(reasons)
    return {
        "prompt_id": ["p"] * n,
        "prompt": ["q"] * n,
        "completion": ["c\udc80"] * n,
        "advantage": np.zeros(n),
        "keep": [True] * n,
        "reward": [math.nan] * n,
        "reward/x": [None] * n,
        "reason/x": reasons,
        **more,
    }


def test_same_config_resumes_and_another_one_is_refused_by_key(tmp_path):
    with RunFolder.open(tmp_path / "r", CONFIG) as run:
        run.log_metrics(1, {"loss": 0.5})
    with RunFolder.open(tmp_path / "r", json.loads(json.dumps(CONFIG))) as run:
        assert run.read_metrics() == [{"step": 1, "loss": 0.5}]
    other = {**CONFIG, "objective": {"recipe": "grpo", "epsilon": 0.3}, "extra": 1}
    with pytest.raises(RunRefused, match=r"objective\.epsilon: 0\.2 -> 0\.3; extra: \(absent\) -> 1.*RUN=.*FRESH=1"):
        RunFolder.open(tmp_path / "r", other)
    with RunFolder.open(tmp_path / "r", other, fresh=True) as run:
        assert run.read_metrics() == []
        assert run.config == other


@pytest.mark.parametrize("names", [["thesis.txt"], ["thesis.txt", ".lock"], ["thesis.txt", "config.yaml"]])
@pytest.mark.parametrize("fresh", [False, True])
def test_folder_that_is_not_a_run_is_never_touched(tmp_path, names, fresh):
    for name in names:
        (tmp_path / name).write_text("years of work")
    with pytest.raises(RunRefused, match="not a run folder"):
        RunFolder.open(tmp_path, CONFIG, fresh=fresh)
    assert sorted(os.listdir(tmp_path)) == sorted(names)


def test_second_process_is_refused_with_the_pid_of_the_first(tmp_path):
    with RunFolder.open(tmp_path, CONFIG):
        code = "import sys; from core.run.folder import RunFolder; RunFolder.open(sys.argv[1], {}, fresh=True)"
        second = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
        assert second.returncode != 0
        assert f"in use by another process (pid {os.getpid()} " in second.stderr
    RunFolder.open(tmp_path, CONFIG).close()


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    run.write_json("summary.json", {"after": 1})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        run.write_json("summary.json", {"after": 2})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"after": 1}
    assert os.listdir(tmp_path) == ["summary.json"]
    assert run.finished


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_writer_makes_replaces_the_old_whole_or_not_at_all(tmp_path, kind):
    run, seen = RunFolder(tmp_path), []

    def make(text, broken=False):
        def write(path):
            seen.append(path.suffix)
            if kind == "folder":
                path.mkdir()
                path = path / "part"
            path.write_text(text)
            if broken:
                raise RuntimeError("the disk broke")

        return write

    def text():
        found = tmp_path / "samples/a.zarr"
        return (found / "part" if kind == "folder" else found).read_text()

    (tmp_path / "samples/.a.zarr").mkdir(parents=True)  # left by a process that was killed
    (tmp_path / "samples/.a.zarr/half").write_text("")
    assert run.write_made("samples/a.zarr", make("old")) == tmp_path / "samples/a.zarr"
    with pytest.raises(RuntimeError, match="the disk broke"):
        run.write_made("samples/a.zarr", make("new", broken=True))
    assert text() == "old"
    run.write_made("samples/a.zarr", make("new"))
    assert text() == "new"
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["a.zarr"]
    assert set(seen) == {".zarr"}, "writers choose the format by the ending"


def test_json_is_strict_and_takes_numpy_values(tmp_path):
    run = RunFolder(tmp_path)
    path = run.write_json("x.json", {"a": np.float32(1.5), "b": [math.nan, math.inf], "c": np.arange(2), "d": tmp_path})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "a": 1.5,
        "b": [None, None],
        "c": [0, 1],
        "d": str(tmp_path),
    }
    run.log_metrics(3, {"loss": math.nan})
    assert math.isnan(run.read_metrics()[0]["loss"])


def test_resuming_drops_later_steps_and_a_line_cut_by_a_crash(tmp_path):
    with RunFolder.open(tmp_path, CONFIG) as run:
        for step in range(1, 6):
            run.log_metrics(step, {"reward": step})
            run.log_rollouts(step, rollouts([None]))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')
    with RunFolder.open(tmp_path, CONFIG) as run:
        run.log_metrics(6, {"reward": 6})
        assert [line["step"] for line in run.read_metrics()] == [1, 2, 3, 4, 5, 6]
        run.truncate_after(3)
        run.log_metrics(4, {"reward": 40})
        assert [line["reward"] for line in run.read_metrics()] == [1, 2, 3, 40]
        assert run.read_rollouts()["step"].to_pylist() == [1, 2, 3]


def test_rollout_parts_read_as_one_dataset_even_when_a_column_is_empty_in_one(tmp_path):
    run = RunFolder(tmp_path)
    run.log_rollouts(12, rollouts([None, None]))
    run.log_rollouts(12, rollouts([None, None]))  # the same step again replaces, it does not add
    run.log_rollouts(13, rollouts(["syntax_error", ""]))
    table = pq.read_table(tmp_path / "rollouts.parquet")
    assert table["step"].to_pylist() == [12, 12, 13, 13]
    assert table["reason/x"].to_pylist() == [None, None, "syntax_error", ""]
    assert table["completion"][0].as_py() == "c?"
    assert run.read_rollouts(last=1)["step"].to_pylist() == [13, 13]
    run.log_rollouts(14, rollouts(["x"], seconds=[1.5]))
    assert run.read_rollouts()["seconds"].to_pylist() == [None] * 4 + [1.5]
    with pytest.raises(ValueError, match="advantage has 1 values"):
        run.log_rollouts(15, rollouts(["a", "b"], advantage=[1.0]))


def test_last_checkpoint_is_the_newest_complete_one_and_the_owner_removes_broken_ones(tmp_path):
    for step, state in ((9, "{}"), (10, "{}"), (20, '{"cut'), (30, None)):
        (tmp_path / "r/checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
        if state is not None:
            (tmp_path / f"r/checkpoints/checkpoint-{step}/trainer_state.json").write_text(state)
    for name in ("config.yaml", ".lock"):
        (tmp_path / "r" / name).write_text("{}")
    assert RunFolder(tmp_path / "r").last_checkpoint().name == "checkpoint-10"
    assert len(os.listdir(tmp_path / "r/checkpoints")) == 4
    with RunFolder.open(tmp_path / "r", {}) as run:
        assert run.last_checkpoint().name == "checkpoint-10"
    assert sorted(os.listdir(tmp_path / "r/checkpoints")) == ["checkpoint-10", "checkpoint-9"]
    assert RunFolder(tmp_path / "none").last_checkpoint() is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "global_step9/rng_state.pth"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_checkpoint_with_a_cut_file_is_not_complete(tmp_path, name, share):
    """What a machine that lost power leaves: every file is there, also the one written last, but not all are whole."""
    for step in (9, 10):
        folder = tmp_path / f"checkpoints/checkpoint-{step}"
        (folder / "global_step9").mkdir(parents=True)
        save_file({"w": torch.ones(100), "b": torch.ones(3)}, folder / "model.safetensors", metadata={"format": "pt"})
        for other in ("optimizer.pt", "global_step9/rng_state.pth"):
            torch.save({"state": torch.ones(100)}, folder / other)
        (folder / "trainer_state.json").write_text("{}")
    assert RunFolder(tmp_path).last_checkpoint().name == "checkpoint-10"
    path = tmp_path / "checkpoints/checkpoint-10" / name
    os.truncate(path, int(share * path.stat().st_size))
    assert RunFolder(tmp_path).last_checkpoint().name == "checkpoint-9"


def test_lines_of_the_metrics_that_a_crash_tore_are_left_out(tmp_path):
    good = [b'{"step": 1}', b'{"step": 2, "loss": null}', b'{"step": 4}']
    torn = [good[0], good[1], b"\0" * 20, b'{"step": 3, "lo', good[2], b'{"step": 5']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(torn))
    assert [line["step"] for line in RunFolder(tmp_path).read_metrics()] == [1, 2, 4]


# -- what cannot be written


def failures():
    """(error, cause): what libraries raise when a disk is full or read-only."""
    return [
        (OSError(errno.ENOSPC, "x"), "No space left on device ("),
        (OSError(errno.EDQUOT, "x"), "Disk quota exceeded ("),
        (OSError(errno.EROFS, "x", "name"), "Read-only file system; make it writable, or use a folder that is (RUN="),
        (
            SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
            "No space left on device (",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
            "No space left on device (",
        ),
        (
            RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
            "No space left on device (",
        ),
    ]


@pytest.mark.parametrize(("error", "cause"), failures())
def test_whoever_cannot_write_the_run_ends_in_one_sentence(tmp_path, error, cause):
    half = tmp_path / "r/checkpoints/checkpoint-5"

    def work():
        with RunFolder.open(tmp_path / "r", CONFIG):
            half.mkdir(parents=True)
            (tmp_path / "r/.model.part").mkdir()
            (tmp_path / "r/.report.html.part").touch()
            raise error

    with pytest.raises(WriteFailed) as failed:
        work()
    assert str(failed.value).startswith(f"{tmp_path / 'r'} cannot be written: {cause}")
    assert failed.value.__cause__ is error
    assert sorted(os.listdir(tmp_path / "r")) == [".lock", "checkpoints", "config.yaml", "metrics.jsonl"]
    assert not half.exists()
    half.mkdir()
    with pytest.raises(WriteFailed), RunFolder(tmp_path / "r"):  # another rank, which does not own the folder
        raise error
    assert half.exists()


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "x"),
        RuntimeError("a bug"),
        SafetensorError("invalid header"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_pass_through_a_run_as_they_are(tmp_path, error):
    def work():
        with RunFolder.open(tmp_path, CONFIG):
            (tmp_path / "checkpoints/checkpoint-5").mkdir(parents=True)
            raise error

    with pytest.raises(type(error)) as raised:
        work()
    assert raised.value is error
    assert (tmp_path / "checkpoints/checkpoint-5").exists()


def test_a_place_where_nothing_can_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in ("file/run", "file/a/run"):
        with pytest.raises(WriteFailed, match=f"{path} cannot be written: Not a directory; make it writable, or use"):
            RunFolder.open(tmp_path / path, CONFIG)
        with pytest.raises(WriteFailed, match=f"{path} cannot be written: (Not a directory|File exists); make it"):
            make_folder(tmp_path / path, Path.mkdir, pytest.fail)


# -- folders that runs share


def fill(folder):
    folder.mkdir()
    (folder / "a").write_text("b")


def test_a_shared_folder_is_made_once(tmp_path):
    for make in (fill, pytest.fail):
        make_folder(tmp_path / "deep" / "x", make, pytest.fail)
    assert (tmp_path / "deep/x/a").read_text() == "b"
    assert sorted(os.listdir(tmp_path / "deep")) == [".x.lock", "x"]


def test_a_shared_folder_is_whole_or_absent(tmp_path):
    def fail(folder):
        fill(folder)
        raise failures.pop()

    failures = [OSError(errno.ENOSPC, "full"), KeyError("bug")]
    for expected in (KeyError, WriteFailed):
        with pytest.raises(expected):
            make_folder(tmp_path / "x", fail, pytest.fail)
        assert os.listdir(tmp_path) == [".x.lock"]
    (tmp_path / ".x.part").mkdir()  # a process that was killed
    (tmp_path / ".x.part" / "half").touch()
    make_folder(tmp_path / "x", fill, pytest.fail)
    assert os.listdir(tmp_path / "x") == ["a"]


MAKE = """
import sys, time
from pathlib import Path
from core.run.folder import make_folder
place = Path(sys.argv[1])
def make(folder):
    (place / "makers").open("a").write("x")
    folder.mkdir()
    while not (place / "go").exists():
        time.sleep(0.01)
make_folder(place / "x", make, lambda said: print(said, flush=True))
"""


@pytest.mark.parametrize("killed", [False, True])
def test_of_several_processes_one_makes_a_folder_and_the_others_wait(tmp_path, killed):
    line = [sys.executable, "-c", MAKE, str(tmp_path)]
    first = subprocess.Popen(line)
    while not (tmp_path / "makers").exists():
        time.sleep(0.01)
    others = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [other.stdout.readline() for other in others]
    assert {line.split(" on ")[0] for line in said} == {f"pid {first.pid}"}
    assert all(line.endswith(f" is making {tmp_path / 'x'}; waiting for it\n") for line in said)
    if killed:
        first.kill()
    (tmp_path / "go").touch()
    assert [process.wait(60) for process in (first, *others)] == [-9 * killed, 0, 0, 0]
    for other in others:
        other.stdout.close()
    assert (tmp_path / "makers").read_text() == "xx"[: 1 + killed]
    assert sorted(os.listdir(tmp_path)) == [".x.lock", "go", "makers", "x"]


@pytest.mark.parametrize("key", ["api_key", "HUB_TOKEN", "password", "client_secret", "openaiKey"])
def test_secret_in_a_config_is_refused_before_anything_is_written(tmp_path, key):
    with pytest.raises(RunRefused, match=rf"judge\.0\.{key} .*environment") as refusal:
        RunFolder.open(tmp_path / "r", {"judge": [{key: "sk-123"}]})
    assert "sk-123" not in str(refusal.value)
    assert not (tmp_path / "r").exists()


def test_words_that_only_look_like_secrets_pass(tmp_path):
    config = {
        "max_tokens": 5,
        "tokenizer": "path",
        "pad_token": "<pad>",
        "api_key": "",
        "key": None,
        "api_key_env": "K",
    }
    RunFolder.open(tmp_path / "r", config).close()
