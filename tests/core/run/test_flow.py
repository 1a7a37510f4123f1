"""Runs of flow policies, on the app in flow_apps/: warm start, evaluation, pictures in the report, predictions, refusals."""

import io
import json
import os
import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))

from faulty_run import Event, command, die

import apps as room
from core import app as apps
from core import config as configs
from core.app import AppError
from core.config import ConfigError
from core.main import main
from core.run.actor import actor_of
from core.run.evaluate import Judge, evaluate
from core.run.flow import FlowActor
from core.run.folder import RunFolder
from core.run.progress import Progress
from core.run.report import write_report
from core.run.splits import Split, check_gold
from core.run.start import start
from core.run.train import Setup

HERE = Path(__file__).parent / "flow_apps"
RUN = Path("runs/painting/tiny-s0")


@pytest.fixture(scope="module", autouse=True)
def painting():
    """The app, among the others while these tests run."""
    room.__path__.append(str(HERE))
    yield apps.find("painting")
    room.__path__.remove(str(HERE))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The home of a finished run."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert main(["train", "--app", "painting"]) == 0
    return home


@pytest.fixture
def home(trained, tmp_path, monkeypatch):
    """A copy of it, to work in."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DEBUG", raising=False)
    return tmp_path


def settings(app, *overrides):
    return configs.load(app, HERE / "painting" / "tiny.yaml", overrides)


def loaded(app, *overrides):
    return FlowActor.load(app, settings(app, *overrides), RUN / "model")


def rows_of(app):
    return apps.prepare(app, app.load(Path("runs/data/painting-0"))["test"], app.options())


def refused(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


def picture(path):
    return np.asarray(Image.open(path).convert("RGB"), np.float32) / 255


# -- a run ---------------------------------------------------------------------------------------------------------------


def test_completions_are_kept_as_pictures_beside_the_json(painting, home):
    rows, actor = rows_of(painting), loaded(painting)
    items = json.loads((RUN / "eval.json").read_text())["items"]
    assert [item["id"] for item in items] == [row["id"] for row in rows]
    made = actor.complete(rows, range(len(rows)))[0]
    for item, array in zip(items, made, strict=True):
        assert np.abs(picture(RUN / item["completion"]) - array).max() <= 0.5 / 255 + 1e-6
    before = json.loads((RUN / "before.json").read_text())
    assert before["completions"] == [f"samples/before/{i:05d}.png" for i in range(len(rows))]
    kept = actor.kept(RunFolder(RUN), rows, before["completions"])
    assert all(np.array_equal(a, picture(RUN / b)) for a, b in zip(kept, before["completions"], strict=True))


def test_a_run_that_was_cut_after_its_steps_goes_on_with_the_evaluation_it_kept(home, capsys):
    summary, page = json.loads((RUN / "summary.json").read_text()), (RUN / "report.json").read_text()
    shown = {path.name: path.read_bytes() for path in (RUN / "samples" / "report").iterdir()}
    (RUN / "summary.json").unlink()
    for name in ("after", "report"):
        shutil.rmtree(RUN / "samples" / name)
    before = (RUN / "before.json").stat().st_mtime_ns
    assert main(["train", "--app", "painting"]) == 0
    again = json.loads((RUN / "summary.json").read_text())
    assert "resuming after step 4" in capsys.readouterr().out
    assert {**again, "seconds": 0, "peak_rss_mb": 0} == {**summary, "seconds": 0, "peak_rss_mb": 0}
    assert (RUN / "before.json").stat().st_mtime_ns == before
    assert len(list((RUN / "samples" / "after").iterdir())) == again["n"]
    assert (RUN / "report.json").read_text() == page
    assert {path.name: path.read_bytes() for path in (RUN / "samples" / "report").iterdir()} == shown


@pytest.mark.parametrize("cut", ["terminated", "killed"])
def test_a_run_that_was_cut_within_its_steps_goes_on_to_the_same_bits(cut, home):
    for name in ("painting", "warmup"):
        shutil.copytree(home / "runs" / name, home / "whole" / name)
    shutil.rmtree(home / RUN)
    more = {
        "app": "painting",
        "events": (Event("core.train.trajectory:TrajectoryTrainer.training_step", [3], ends[cut]),),
    }
    ended = command(home, **more)
    assert ended.code == (0 if cut == "terminated" else -signal.SIGKILL), ended.error
    again = command(home, app="painting")
    assert again.code == 0, again.error
    assert f"resuming after step {3 if cut == 'terminated' else 2}" in again.out
    for name in (
        "model/diffusion_pytorch_model.safetensors",
        "samples/after/00003.png",
        "samples/rollouts/step-000004-01.png",
    ):
        assert (home / RUN / name).read_bytes() == (home / "whole/painting/tiny-s0" / name).read_bytes(), name
    rollouts = [RunFolder(place).read_rollouts() for place in (home / RUN, home / "whole/painting/tiny-s0")]
    assert rollouts[0].equals(rollouts[1])


def terminate(*_, **__):
    os.kill(os.getpid(), signal.SIGTERM)


ends = {"terminated": terminate, "killed": die}


def test_memory_of_a_gpu_is_told_where_there_is_one(home, monkeypatch):
    assert "peak_gpu_mb" not in json.loads((RUN / "summary.json").read_text())
    from core.run import summary

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    assert summary.memory() == {"peak_rss_mb": summary.memory()["peak_rss_mb"], "peak_gpu_mb": 3}


# -- the warm start ------------------------------------------------------------------------------------------------------


def test_a_warm_start_is_shared_by_what_does_not_change_it_and_no_other(painting, home):
    def path(*overrides):
        config = settings(painting, *overrides)
        with Progress(1, "", quiet=True) as progress, Judge(painting, config, painting.composite()) as judge:
            return start(painting, config, Split(painting, config, progress), judge, progress)[1]["path"]

    first = path()
    assert path("rollout.steps=7", "rollout.kernel=cps", "optim.lr=0.1", "evaluate.batch_size=3") == first
    others = [path(change) for change in ("warmup.lr=0.002", "run.seed=1", "rollout.guidance=2", "data.train_rows=9")]
    assert len({first, *others}) == 5


def test_its_curve_and_the_worth_of_its_demonstrations_are_told(painting, home):
    note = json.loads(next(Path("runs/warmup").glob("painting-*/warmup.json")).read_text())
    assert note["label_accuracy"] == 60
    assert [point["step"] for point in note["curve"]] == list(range(1, 11))
    assert [point["step"] for point in note["curve"] if "metric" in point] == [5, 10]
    assert json.loads((RUN / "report.json").read_text())["warmup"] == note["curve"]
    assert "Warm start" in (RUN / "report.html").read_text()


def test_a_warm_start_that_diverges_is_one_sentence(home, capsys):
    error = refused(capsys, "train", "--app", "painting", "--run", "wild", "--set", "warmup.lr=1e30")
    assert "lower warmup.lr" in error


# -- evaluation ----------------------------------------------------------------------------------------------------------


def test_an_answer_depends_on_its_row_and_place_and_not_on_its_batch(painting, home):
    rows, actor = rows_of(painting), loaded(painting)
    whole = actor.complete(rows, range(len(rows)))[0]
    part = actor.complete(rows[5:8], range(5, 8))[0]
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(part, whole[5:8], strict=True))
    elsewhere = actor.complete(rows[5:8], range(3))[0]
    assert not any(np.allclose(a, b, atol=1e-3) for a, b in zip(elsewhere, part, strict=True))
    seeded = replace(actor, config=settings(painting, "run.seed=1"))
    assert not np.allclose(seeded.complete(rows[:1], [0])[0][0], whole[0], atol=1e-3)
    drawn = actor.draws(rows[:2], range(2), 2)
    assert len({a.tobytes() for draw in (*drawn, whole[:2]) for a in draw}) == 6


def test_pictures_of_several_sizes_are_made_size_by_size_and_come_in_order(painting, home):
    rows, sizes = rows_of(painting)[:4], [8, 12, 8, 12]
    for row, size in zip(rows, sizes, strict=True):
        row["source"] = f"{size}-{row['id']}.png"
        Image.new("RGB", (size, size), "red").save(row["source"])
    made = loaded(painting).complete(rows, range(4))[0]
    assert [one.shape for one in made] == [(size, size, 3) for size in sizes]


def test_metrics_and_rewards_get_arrays(painting, home):
    actor, rows = loaded(painting), rows_of(painting)
    with Judge(painting, actor.config, painting.composite()) as judge:
        result = evaluate(actor, judge, rows, samples=1, with_rewards=True)
    levels = {"dark": 0.2, "middle": 0.5, "bright": 0.8}
    distance = [abs(made - levels[row["told"]]).mean() for made, row in zip(result.completions, rows, strict=True)]
    assert result.rewards["nearness"] == pytest.approx(1 - np.array(distance))
    assert set(result.scores) == set(result.sampled) == {"decibels"}


def test_a_run_and_an_untouched_model_are_evaluated(home, capsys):
    after = json.loads((RUN / "summary.json").read_text())["after"]
    assert main(["eval", "--app", "painting"]) == 0
    assert json.loads((RUN / "eval-test.json").read_text())["metrics"]["decibels"]["mean"] == after
    cache = next(Path("runs/warmup").glob("painting-*"))
    assert main(["eval", "--app", "painting", "--model", str(cache), "--split", "train"]) == 0
    assert "(in 4 ODE steps)" in capsys.readouterr().out
    folder = Path("runs/painting") / f"eval-{cache.name}"
    items = json.loads((folder / "eval-train.json").read_text())["items"]
    assert len(items) == 24
    assert all((folder / item["completion"]).is_file() for item in items)


# -- the report ----------------------------------------------------------------------------------------------------------


def test_the_report_shows_what_was_given_gold_before_and_after_as_pictures_with_their_scores(home):
    page = (RUN / "report.html").read_text()
    samples = json.loads((RUN / "report.json").read_text())["samples"]
    assert len(samples) == 12
    assert set(samples[0]) == {"question", "given", "gold", "before", "after", "before_score", "after_score"}
    assert "img-src data:" in page
    sources = re.findall(r'<img class="(\w+)" alt="(\w+)" src="([^"]*)">', page)
    assert page.count("<img") == len(sources) >= 4 * 12 + 4
    assert {kind for kind, _, _ in sources} == {"small"}
    assert {what for _, what, _ in sources} == {"given", "gold", "before", "after", "rollout"}
    assert all(re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/=]+", uri) for _, _, uri in sources)
    assert "right</b>" not in page
    gains = [sample["after_score"] - sample["before_score"] for sample in samples]
    assert gains[0] == max(gains)
    assert f"<b>{samples[0]['after_score']:.3f}</b>" in page


def test_the_report_is_written_again_without_anything_but_the_run_folder(home):
    page = (RUN / "report.html").read_text()
    (RUN / "report.html").unlink()
    assert main(["report", "--app", "painting"]) == 0
    assert (RUN / "report.html").read_text() == page


def test_a_large_picture_is_shrunk_and_a_file_that_is_not_the_run_s_is_never_shown(tmp_path):
    run, noise = RunFolder(tmp_path / "run"), np.random.default_rng(0).integers(0, 256, (1000, 700, 3), dtype=np.uint8)
    for path in (tmp_path / "run/samples/report/00-after.png", tmp_path / "secret.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(path)
    names = ["samples/report/00-after.png", "../secret.png", str(tmp_path / "secret.png"), "samples/report/gone.png",
             "samples/../../secret.png", None, "samples/report/00-after.png\n"]  # fmt: skip
    samples = [{"question": "?", "gold": "text", "before": {"picture": name}, "after": "text"} for name in names]
    page = write_report(run, {}, {"samples": samples}).read_text()
    assert page.count("<img") == 1
    assert re.search(r'<img class="large" alt="before" src="data:image/jpeg;base64,[A-Za-z0-9+/=]{1000,}">', page)
    assert len(page) < 200_000
    assert "secret.png" in page, "what cannot be shown is named"


def test_text_that_looks_like_a_picture_of_the_run_stays_text_and_groups_without_pictures_are_left_out(tmp_path):
    run = RunFolder(tmp_path)
    columns = {
        "prompt_id": ["a", "a", "b", "b"],
        "completion": ["samples/rollouts/step-000001-00.png", "<img src=x>", None, None],
        "reward": [0.0, 1.0, 5.0, 5.0],
    }
    run.log_rollouts(1, columns)
    page = write_report(run, {}, {}).read_text()
    assert "<img " not in page
    assert "samples/rollouts/step-000001-00.png" in page
    assert "&lt;img src=x&gt;" in page
    assert "5.000" not in page


# -- the model -----------------------------------------------------------------------------------------------------------


def test_the_model_card_s_own_lines_load_it(painting, home, monkeypatch):
    card = (RUN / "model" / "README.md").read_text()
    code = "\n".join(line[4:] for line in card.splitlines() if line.startswith("    "))
    row = rows_of(painting)[0] | {"source": str(Path(rows_of(painting)[0]["source"]).resolve())}
    monkeypatch.chdir(RUN / "model")
    scope = {"row": row}
    exec(code, scope)
    assert scope["pictures"][0].shape == (8, 8, 3)
    assert "make predict APP=painting MODEL=" in card
    assert json.loads(Path("prompt.json").read_text())["steps"] == 4


def test_averaged_weights_are_what_is_evaluated_and_left(painting, home):
    assert main(["train", "--app", "painting", "--run", "averaged", "--set", "optim.ema=0.9 optim.lr=0.05"]) == 0
    summary = json.loads(Path("runs/painting/averaged/summary.json").read_text())
    assert main(["eval", "--app", "painting", "--run", "averaged"]) == 0
    report = json.loads(Path("runs/painting/averaged/eval-test.json").read_text())
    assert report["metrics"]["decibels"]["mean"] == summary["after"]


# -- make predict --------------------------------------------------------------------------------------------------------


@pytest.fixture
def wishes(home):
    """An INPUT= folder of two pictures."""
    folder = home / "in"
    folder.mkdir()
    for name, ending, told in (("cat", "png", "dark"), ("dog 2", "jpg", "bright\n")):
        Image.new("RGB", (8, 8), "red").save(folder / f"{name}.{ending}")
        (folder / f"{name}.txt").write_text(told)
    return folder


def predict(*more):
    return ["predict", "--app", "painting", "--input", "in", "--output", "out", *more]


def test_a_folder_of_pictures_is_answered_picture_by_picture(wishes, capsys):
    (wishes / "notes.md").write_text("ignored")
    assert main(predict()) == 0
    assert "2 answers written to out" in capsys.readouterr().out
    lines = [json.loads(line) for line in Path("out/predictions.jsonl").read_text().splitlines()]
    assert lines == [
        {"id": "cat", "source": "cat.png", "instruction": "dark", "prediction": "cat.png"},
        {"id": "dog 2", "source": "dog 2.jpg", "instruction": "bright", "prediction": "dog 2.png"},
    ]
    assert {path.name for path in Path("out").iterdir()} == {"cat.png", "dog 2.png", "predictions.jsonl"}
    assert picture("out/cat.png").shape == (8, 8, 3)


def test_a_list_of_requests_is_answered_line_by_line(wishes):
    requests = [
        {"id": "a", "source": "cat.png", "instruction": "dark"},
        {"source": "./dog 2.jpg", "instruction": "dark"},
    ]
    (wishes / "requests.jsonl").write_text("\n".join(map(json.dumps, requests)) + "\n\n")
    assert main(predict()) == 0
    lines = [json.loads(line) for line in Path("out/predictions.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in lines] == ["a.png", "line-2.png"]
    assert lines[0] == requests[0] | {"prediction": "a.png"}


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"id": "../x", "source": "cat.png", "instruction": "dark"}, "the id '../x' names the answer's file"),
        ({"id": "", "source": "cat.png", "instruction": "dark"}, "the id '' names"),
        ({"id": ".x", "source": "cat.png", "instruction": "dark"}, "the id '.x' names"),
        ({"id": "a\n", "source": "cat.png", "instruction": "dark"}, "names the answer's file"),
        ({"id": "a" * 101, "source": "cat.png", "instruction": "dark"}, "names the answer's file"),
        ({"id": 3, "source": "cat.png", "instruction": "dark"}, "the id 3 names"),
        ({"source": "../secret.png", "instruction": "dark"}, "source '../secret.png' is no file inside of in"),
        ({"source": "link.png", "instruction": "dark"}, "source 'link.png' is no file inside of in"),
        ({"source": "a\0b", "instruction": "dark"}, "is no file inside of in"),
        ({"source": "x" * 5000, "instruction": "dark"}, "is no file inside of in"),
        ({"source": ".", "instruction": "dark"}, "is no file inside of in"),
        ({"source": 3, "instruction": "dark"}, "line 1 lacks the key 'source'"),
        ({"instruction": "dark"}, "line 1 lacks the key 'source'"),
        ({"source": "cat.txt", "instruction": "dark"}, "source 'cat.txt' is not a picture that can be read"),
        ({"source": "cut.png", "instruction": "dark"}, "source 'cut.png' is not a picture that can be read"),
        ({"source": "cut.jpg", "instruction": "dark"}, "source 'cut.jpg' is not a picture that can be read"),
        ({"source": "cat.png"}, "line 1 lacks the key 'instruction'"),
        ([1], "line 1 is not a JSON object"),
    ],
)
def test_a_request_that_will_not_do_is_named_and_nothing_is_written(request_, said, wishes, capsys):
    Image.new("RGB", (8, 8)).save(wishes.parent / "secret.png")
    (wishes / "link.png").symlink_to(wishes.parent / "secret.png")
    for name, whole in (("cut.png", "cat.png"), ("cut.jpg", "dog 2.jpg")):
        (wishes / name).write_bytes((wishes / whole).read_bytes()[:-24])
    (wishes / "requests.jsonl").write_text(json.dumps(request_))
    assert said in refused(capsys, *predict())
    assert not Path("out").exists()


def test_folders_that_will_not_do_are_refused(wishes, capsys):
    (wishes / "cat.txt").unlink()
    assert "in/cat.png lacks the key 'instruction'" in refused(capsys, *predict())
    (wishes / "cat.txt").write_bytes(b"\xff\xfe")
    assert "in/cat.txt is not UTF-8 text" in refused(capsys, *predict())
    (wishes / "cat.txt").write_text("dark")
    (wishes / "requests.jsonl").write_text('{"id": "a", "source": "cat.png"}\n{"id": "A", "source": "cat.png"}')
    assert "requests.jsonl, line 2: the id 'A' comes twice" in refused(capsys, *predict())
    assert "INPUT=none is no folder" in refused(capsys, *predict("--input", "none"))
    assert "is a file, or INPUT= itself" in refused(capsys, *predict("--output", "in"))
    assert "is a file, or INPUT= itself" in refused(capsys, *predict("--output", "in/cat.png"))
    Path("empty").mkdir()
    assert "holds neither requests.jsonl nor a picture" in refused(capsys, *predict("--input", "empty"))


# -- refusals before any work --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("rollout.kernel=cps rollout.noise_level=1.5", "rollout: noise_level=1.5 of the kernel cps lies above 1"),
        ("rollout.kernel=sage rollout.steps=1000", "rollout: sage has no variance"),
        ("rollout.steps=1", "rollout.steps=1 leaves recipe grpo no decision"),
        ("launch.sampler=vllm_colocate", "for language models"),
        ("trainer.bet=1", "unknown field of transformers.TrainingArguments in trainer: 'bet'"),
        ("objective.recipe=seed_grpo", "objective: "),
        ("data.train_rows=1", "1 training prompts are fewer than the 2 of one generation batch"),
        ("rollout.temperature=1", "unknown key in section rollout 'temperature'"),
    ],
)
def test_what_a_flow_cannot_do_is_refused_before_any_work(change, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, "train", "--app", "painting", "--set", change)
    assert not Path("runs/warmup").exists()


def test_gold_must_reach_the_best_that_the_app_declares(painting, home):
    config = settings(painting)
    with (
        Progress(1, "", Console(file=io.StringIO())) as progress,
        Judge(painting, config, painting.composite()) as judge,
    ):
        data = Split(painting, config, progress)
        check_gold(painting, judge, data, progress)
        with pytest.raises(ConfigError, match=r"the gold answer of row .* scores 1 on nearness"):
            check_gold(replace(painting, best={"nearness": 2.0}), judge, data, progress)


# -- variants ------------------------------------------------------------------------------------------------------------


def test_a_task_that_is_a_variant_has_its_own_app_config_data_and_run(painting, home, capsys):
    assert main(["train", "--app", "painting", "--task", "untold"]) == 0
    run = Path("runs/painting/tiny-untold-s0")
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["app"], summary["task"]) == ("painting", "untold")
    assert Path("runs/data/painting-untold-0").is_dir()
    assert len(list(Path("runs/warmup").glob("painting-untold-*"))) == 1
    assert 'app.find("painting", "untold")'.replace('"', "'") in (run / "model" / "README.md").read_text()
    report = json.loads((run / "report.json").read_text())
    assert report["command"] == "make train APP=painting TASK=untold"
    assert {sample["question"] for sample in report["samples"]} == {"paint it"}
    assert main(["eval", "--app", "painting", "--task", "untold"]) == 0
    assert main(["apps"]) == 0
    assert "metric: decibels; TASK=untold\n" in capsys.readouterr().out
    error = refused(capsys, "train", "--app", "painting", "--task", "untol")
    assert "unknown TASK 'untol'; did you mean 'untold'" in error
    assert "no config huge.yaml" in refused(capsys, "train", "--app", "painting", "--config", "huge")
    assert "no config untold-huge.yaml" in refused(
        capsys, "train", "--app", "painting", "--task", "untold", "--config", "huge"
    )


def test_a_variant_is_found_by_its_task_and_must_be_of_the_same_folder(painting, monkeypatch):
    from apps.painting import app as module

    found = apps.find("painting", "untold")
    assert (found.variant, found.label, painting.label) == ("untold", "painting-untold", "painting")
    assert actor_of(found) is FlowActor
    assert apps.find("painting", "other") == painting
    for change in ({"variants": {"untold": replace(found, name="sketching")}}, {"tasks": {"untold": {}}}):
        monkeypatch.setattr(module, "APP", replace(painting, **change))
        with pytest.raises(AppError, match=r"variant 'untold' of apps/painting/app\.py"):
            apps.find("painting", "untold")


def test_a_setup_says_what_runs(painting, home):
    said = io.StringIO()
    with Progress(1, "", Console(file=said, width=200)) as progress:
        Setup(painting, settings(painting)).say(progress)
    assert "painting: recipe grpo; 2 prompts x 4 completions" in said.getvalue()
