"""Runs of forecast policies, on the app in forecast_apps/: start, evaluation, baselines, verification, predictions, refusals."""

import io
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.torch import load_file

import apps as room
from core import app as apps
from core import config as configs
from core.main import main
from core.run import start as starts
from core.run import train as training
from core.run.actor import actor_of
from core.run.evaluate import Judge, evaluate
from core.run.folder import RunFolder
from core.run.forecast import ForecastActor, StoredForecasts
from core.run.progress import Progress
from core.run.rivals import Rivals, compare
from core.run.sequences import Spool
from core.run.splits import Split
from core.run.start import NotMade, start
from core.train.constraints import constrained

HERE = Path(__file__).parent / "forecast_apps"
RUN = Path("runs/tides/tiny-s0")
HELD = "rewards.constraints={alerted: {metric: detected, at_least: 0.9, kp: 1, ki: 0.5}}"


@pytest.fixture(scope="module", autouse=True)
def tides():
    """The app, among the others while these tests run."""
    room.__path__.append(str(HERE))
    yield apps.find("tides")
    room.__path__.remove(str(HERE))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The home of a finished run."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert main(["train", "--app", "tides"]) == 0
    return home


@pytest.fixture
def home(trained, tmp_path, monkeypatch):
    """A copy of it, to work in."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DEBUG", raising=False)
    return tmp_path


def module():
    return sys.modules["apps.tides.app"]


def settings(app, *overrides):
    return configs.load(app, HERE / "tides" / "tiny.yaml", overrides)


def loaded(app, *overrides):
    return ForecastActor.load(app, settings(app, *overrides), RUN / "model")


def rows_of(app, split="test"):
    return apps.prepare(app, app.load(Path("runs/data/tides-0"))[split], app.options())


def summary_of(run=RUN):
    return json.loads((run / "summary.json").read_text())


def refused(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


def quiet():
    return Progress(1, "", quiet=True)


def equal(made, others):
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in zip(made, others, strict=True)
    )


# -- a run ---------------------------------------------------------------------------------------------------------------


def test_completions_are_kept_beside_the_json_to_the_last_bit(tides, home):
    rows, actor = rows_of(tides), loaded(tides)
    items = json.loads((RUN / "eval.json").read_text())["items"]
    assert [item["completion"] for item in items] == [f"samples/after.zarr/{row['id']}" for row in rows]
    made = actor.complete(rows, range(len(rows)))[0]
    assert isinstance(made, Spool), "forecasts of many rows do not fit in memory together"
    assert made[0].shape == (6, 2, 3, 4)
    assert equal(actor.kept(RunFolder(RUN), rows, [item["completion"] for item in items]), made)
    texts = actor.keep(RunFolder(RUN), "again", rows, made)
    assert equal(actor.kept(RunFolder(RUN), rows, texts), made)
    assert texts == actor.keep(RunFolder(RUN), "again", rows, made), "a half-finished one is written over"
    assert not [path for path in (RUN / "samples").iterdir() if path.name.startswith(".")]


def test_a_run_that_was_cut_after_its_steps_goes_on_with_the_evaluation_it_kept(home, capsys):
    summary, page = summary_of(), (RUN / "report.json").read_text()
    shown = {path.name: path.read_bytes() for path in (RUN / "samples" / "report").iterdir()}
    (RUN / "summary.json").unlink()
    for name in ("after.zarr", "report"):
        shutil.rmtree(RUN / "samples" / name)
    before = (RUN / "before.json").stat().st_mtime_ns
    assert main(["train", "--app", "tides"]) == 0
    again = summary_of()
    assert "resuming after step 4" in capsys.readouterr().out
    changing = {"seconds": 0, "peak_rss_mb": 0}
    assert {**again, **changing} == {**summary, **changing}
    assert (RUN / "before.json").stat().st_mtime_ns == before
    assert (RUN / "report.json").read_text() == page
    assert {path.name: path.read_bytes() for path in (RUN / "samples" / "report").iterdir()} == shown


def test_a_run_that_was_cut_within_its_steps_goes_on_to_the_same_bits(home):
    run = Path("runs/tides/held")
    train = ["train", "--app", "tides", "--run", "held", "--set", f'"{HELD}"']
    assert main(train) == 0
    whole, lines = load_file(run / "model" / "model.safetensors"), RunFolder(run).read_metrics()
    rollouts = RunFolder(run).read_rollouts()
    for name in ("model", "checkpoints/checkpoint-4", "samples/after.zarr"):
        shutil.rmtree(run / name)
    for name in ("summary.json", "eval.json", "report.html"):
        (run / name).unlink()
    assert main(train) == 0
    again = load_file(run / "model" / "model.safetensors")
    assert all((again[name] == whole[name]).all() for name in whole)
    assert RunFolder(run).read_rollouts().equals(rollouts)
    watched = [{k: v for k, v in line.items() if k.startswith(("eval/", "constraint/", "reward"))} for line in lines]
    assert watched == [
        {k: v for k, v in line.items() if k in watched[i]} for i, line in enumerate(RunFolder(run).read_metrics())
    ]


def test_rollouts_are_pictures_of_the_first_ones_of_a_group(home):
    rollouts = RunFolder(RUN).read_rollouts().to_pydict()
    assert [bool(name) for name in rollouts["completion"]] == 4 * ([True] * 4 + [False] * 4)
    assert rollouts["completion"][0] == "samples/rollouts/step-000001-00.png"
    page = (RUN / "report.html").read_text()
    sources = re.findall(r'<img class="(\w+)" alt="(\w+)" src="([^"]*)">', page)
    assert {what for _, what, _ in sources} == {"given", "gold", "before", "after", "rollout"}
    assert all(re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/=]+", uri) for _, _, uri in sources)
    assert main(["train", "--app", "tides", "--run", "wide", "--set", "rollout.group_size=6 optim.steps=1"]) == 0
    found = RunFolder(Path("runs/tides/wide")).read_rollouts().to_pydict()["completion"]
    assert [bool(name) for name in found] == [True] * 4 + [False] * 8
    page = Path("runs/tides/wide/report.html").read_text()
    assert page.count('alt="rollout"') == 4
    assert "2 more rollouts of this group are in rollouts.parquet" in page


# -- a metric of which less is better ------------------------------------------------------------------------------------


def test_a_fall_of_the_metric_is_an_improvement_everywhere(tides, home, capsys):
    run = Path("runs/tides/better")  # from a start that knows nothing
    assert (
        main(["train", "--app", "tides", "--run", run.name, "--set", "warmup.steps=1 optim.steps=40 optim.lr=5e-3"])
        == 0
    )
    capsys.readouterr()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["after"] < summary["before"]
    assert (summary["metric"], summary["better"]) == ("wrong", "lower")
    lower = {row["name"] for row in summary["table"] if row.get("better") == "lower"}
    assert lower == {"wrong", "wrong, sampled", "wrong: early (4 rows)", "wrong: late (8 rows)"}
    samples = json.loads((run / "report.json").read_text())["samples"]
    gains = [sample["before_score"] - sample["after_score"] for sample in samples]
    assert gains[0] == max(gains) > 0
    assert 'class="good">-' in (run / "report.html").read_text()
    assert "<b>wrong</b> ↓" in (run / "report.html").read_text()
    assert (
        main(["train", "--app", "tides", "--run", run.name, "--set", "warmup.steps=1 optim.steps=40 optim.lr=5e-3"])
        == 0
    )
    said = capsys.readouterr().out
    assert "↓ lower is better" in said
    assert "wrong ↓" in said
    assert "detected ↓" not in said
    follow = training.Follow(training.Setup(tides, settings(tides)), *[None] * 7)
    assert follow.health.sign == -1
    assert "0.0% are right" not in said


def test_the_worth_of_gold_labels_is_told_by_the_metric(tides, home):
    note = json.loads(next(Path("runs/warmup").glob("tides-*/warmup.json")).read_text())
    assert note["label_accuracy"] == 0


# -- weights ---------------------------------------------------------------------------------------------------------------


def pooled(app, completions, rows):
    """Wrong cells of all observed, and alerts announced of all alerts; counted apart from the app's metrics."""
    wrong = seen = hits = alerts = 0
    for row, made in zip(rows, completions, strict=True):
        observed = row["window"].observed()
        for v, edges in enumerate(app.acts.quantity(None).edges):
            known = ~np.isnan(observed[:, v])
            classes = np.digitize(observed[:, v][known], edges)
            announced = made["level"][:, v][known]
            wrong, seen = wrong + (classes != announced).sum(), seen + known.sum()
            hits, alerts = hits + ((classes == 2) & (announced == 2)).sum(), alerts + (classes == 2).sum()
    return wrong / seen, hits / alerts


def test_means_over_rows_are_those_of_all_cells(tides, home):
    rows = rows_of(tides)
    made = loaded(tides).complete(rows, range(len(rows)))[0]
    report = json.loads((RUN / "eval.json").read_text())
    found = tuple(report["metrics"][name]["mean"] for name in ("wrong", "detected"))
    assert found == pytest.approx(pooled(tides, made, rows), abs=1e-12)
    assert found[0] == summary_of()["after"] == summary_of()["table"][0]["after"]
    plain = np.mean([item["wrong"] for item in report["items"]])
    assert abs(plain - found[0]) > 1e-6, "this check cannot fail"
    assert [item["weights"]["wrong"] for item in report["items"]] == [
        int(np.isfinite(row["window"].observed()).sum()) for row in rows
    ]
    lo, hi = report["metrics"]["wrong"]["ci95"]
    assert lo < found[0] < hi


def test_sampled_scores_are_weighted_and_the_kept_evaluation_has_all_weights(tides, home):
    rows, config = rows_of(tides), settings(tides)
    actor = loaded(tides)
    kept = json.loads((RUN / "before.json").read_text())
    assert set(kept["weights"]) == {"scores", "sampled", "rewards"}
    assert set(kept["weights"]["rewards"]) == {"hit", "alerted"}
    with Judge(tides, config, tides.composite()) as judge:
        two = evaluate(actor, judge, rows, samples=2)
        one, other = actor.draws(rows, range(len(rows)), 2)
    for i, row in enumerate(rows):
        each = [module().detected([draw[i]], window=[row["window"]])[0] for draw in (one, other)]
        assert two.weights["sampled"]["detected"][i] == each[0].weight == each[1].weight
        if each[0].weight:
            assert two.sampled["detected"][i] == pytest.approx((each[0].value + each[1].value) / 2)


# -- the start -------------------------------------------------------------------------------------------------------------


def test_a_start_is_shared_by_what_does_not_change_it_and_no_other(tides, home):
    def path(*overrides):
        config = settings(tides, "warmup.steps=1", *overrides)
        with quiet() as progress, Judge(tides, config, tides.composite()) as judge:
            return start(tides, config, Split(tides, config, progress), judge, progress)[1]["path"]

    first = path()
    same = ("rollout.feedback=sample", "rollout.decide=mean", "rollout.eval_leads=4", "rollout.leads_every=1",
            "rollout.sigma=0.5", "rollout.rank=3", "optim.lr=0.1", "evaluate.batch_size=3")  # fmt: skip
    assert path(*same) == first
    gaussian = "rollout.distribution=gaussian"
    others = [
        path("rollout.start_leads=3"), path("rollout.bins=9"), path("task.weighting=alerts"), path("run.seed=1"), path(gaussian),
        path(gaussian, "rollout.sigma=0.5"), path("rollout.distribution=low_rank"),
        path("rollout.distribution=low_rank", "rollout.rank=3"), path("data.validation="), path("rollout.decide=head"),
    ]  # fmt: skip
    assert len({first, *others}) == 1 + len(others)
    assert path(gaussian, "rollout.bins=9") == others[4]


def test_labels_are_made_when_needed_and_only_some_are_graded(tides, home, monkeypatch):
    monkeypatch.setattr(starts, "GRADED", 5)
    made, graded = [], []
    app = replace(tides, gold=lambda row: made.append(row["id"]) or tides.gold(row))
    grade = starts.ev.grade
    monkeypatch.setattr(
        starts.ev, "grade", lambda judge, rows, labels: graded.append(len(rows)) or grade(judge, rows, labels)
    )
    config = settings(app, "warmup.steps=1", "warmup.batch_size=2", "data.train_rows=24")
    with quiet() as progress, Judge(app, config, app.composite()) as judge:
        start(app, config, Split(app, config, progress), judge, progress)
    assert graded == [5]
    assert len(made) == 5 + 2 * 2, "the labels of one batch, and again for their importance"


def test_validation_rows_are_those_of_their_split(tides, home, capsys):
    with quiet() as progress:
        data = Split(tides, settings(tides), progress)
        assert sorted(row["id"] for row in data.validation) == [f"held-{i:02d}" for i in range(8)]
        assert len(data.train) == 24
        shared = Split(tides, settings(tides, "data.validation=", "data.validation_share=0.5"), progress)
        assert len(shared.validation) == len(shared.train) == 12
        few = Split(tides, settings(tides, "evaluate.validation_rows=3"), progress)
        assert len(few.validation) == 3
    error = refused(capsys, "train", "--app", "tides", "--run", "x", "--set", "data.validation=helt")
    assert "did you mean 'held'" in error


# -- baselines -------------------------------------------------------------------------------------------------------------


def test_every_baseline_is_graded_and_the_best_is_compared_with_pair_by_pair(tides, home, capsys):
    summary, rows = summary_of(), rows_of(tides)
    best = summary["best_baseline"]
    assert list(summary["baselines"]) == ["persistence", "mean of all", "gaussian", "shifted"]
    assert best["name"] == min(summary["baselines"], key=summary["baselines"].get)
    assert best["name"] in ("gaussian", "shifted")  # what learned
    assert best["value"] == summary["baselines"][best["name"]]
    assert best["before"] == pytest.approx(summary["before"] - best["value"])
    assert best["after"] == pytest.approx(summary["after"] - best["value"])
    assert best["ci95"][0] < best["after"] < best["ci95"][1]
    gaussian = loaded_start(tides, "rollout.distribution=gaussian").complete(rows, range(len(rows)))[0]
    assert pooled(tides, gaussian, rows)[0] == pytest.approx(summary["baselines"]["gaussian"])
    assert main(["train", "--app", "tides"]) == 0
    assert f"wrong minus that of {best['name']}" in capsys.readouterr().out
    assert f"minus the best baseline, {best['name']}" in (RUN / "report.html").read_text()


def loaded_start(app, *overrides):
    config = settings(app, *overrides)
    with quiet() as progress, Judge(app, config, app.composite()) as judge:
        return start(app, config, Split(app, config, progress), judge, progress, make=False)[0]


def rivals_of(app, judge, progress, make=True):
    config = settings(app)
    data = Split(app, config, progress)
    return Rivals(app, config, data, data.test, judge, progress, make)


def test_the_start_of_a_learned_baseline_is_the_policy_before_it_learned(tides, home):
    with quiet() as progress, Judge(tides, settings(tides), tides.composite()) as judge:
        rivals = rivals_of(tides, judge, progress)
        rows = rivals.test
        before = json.loads((RUN / "before.json").read_text())["completions"]
        made = rivals.start.complete(rows, range(len(rows)))[0]
        assert equal(made, rivals.start.kept(RunFolder(RUN), rows, before))
        assert rivals.start is rivals.start
        assert rivals.fit(rollout__distribution="gaussian") is rivals.fit(rollout__distribution="gaussian")
        again = rivals.fit(task__weighting="alerts", warmup__steps=2)
        assert again.config.task.weighting == "alerts"
        assert [row["id"] for row in rivals.train] == [row["id"] for row in rivals.data.train]
        assert {row["id"][:4] for row in rivals.validation} == {"held"}


def test_another_weighting_of_the_loss_reaches_the_rows(tides, home, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "core.run.forecast.imitate",
        lambda policy, conditions, labels, importance, **_: seen.append(np.unique(importance[0]).tolist()),
    )
    with quiet() as progress, Judge(tides, settings(tides), tides.composite()) as judge:
        rivals_of(tides, judge, progress).fit(task__weighting="alerts")
    assert seen == [[1.0, 5.0]]


def test_a_baseline_whose_start_is_not_there_is_left_out_of_an_evaluation_and_that_is_said(tides, home, capsys):
    for path in Path("runs/warmup").glob("tides-*"):
        shutil.rmtree(path)
    assert main(["eval", "--app", "tides"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "baseline: gaussian left out: the supervised start runs/warmup/tides-" in said
    assert "make train APP=tides makes it" in said
    report = json.loads((RUN / "eval-test.json").read_text())
    assert list(report["baselines"]) == ["persistence", "mean of all"]
    assert report["best_baseline"]["name"] == "mean of all"
    assert not list(Path("runs/warmup").glob("tides-*"))
    with pytest.raises(NotMade):
        loaded_start(tides)


# -- verification ----------------------------------------------------------------------------------------------------------


def test_arms_are_reduced_one_by_one_and_tables_and_plots_are_shown(tides, home, capsys):
    summary, page = summary_of(), (RUN / "report.html").read_text()
    arms = ["before", "after", "persistence", "mean of all", "gaussian", "shifted"]
    first, second = summary["tables"]
    assert [row[0] for row in first["rows"]] == arms
    assert second["columns"] == ["lead", *arms]
    assert first["rows"][1][1] == pytest.approx(1 - summary["after"])
    assert first["rows"][0][1] == pytest.approx(1 - summary["before"])
    plots = json.loads((RUN / "report.json").read_text())["plots"]
    assert [plot["x_label"] for plot in plots] == ["hours ahead"]
    assert list(plots[0]["lines"]) == arms
    for text in (
        "Verification",
        "right classes",
        "right cells by lead",
        "Of the observed cells.",
        "hours ahead",
        "1,366",
    ):
        assert text in page
    assert all(f"</svg>{arm}</span>" in page for arm in arms), "a chart of several lines has a key"
    assert main(["train", "--app", "tides"]) == 0
    said = capsys.readouterr().out
    assert "right classes" in said
    assert "right cells by lead" not in said
    assert main(["report", "--app", "tides"]) == 0
    assert (RUN / "report.html").read_text() == page
    assert main(["eval", "--app", "tides"]) == 0
    tables = json.loads((RUN / "eval-test.json").read_text())["tables"]
    assert [row[0] for row in tables[0]["rows"]] == ["model", *arms[2:]]
    assert tables[0]["rows"][0][1] == pytest.approx(1 - summary["after"])
    assert "right cells by lead" in capsys.readouterr().out


def test_the_completions_of_an_arm_are_gone_before_the_next_one_s_are_made(tides, home):
    class Fields(list):
        alive = 0

        def __init__(self, *items):
            super().__init__(*items)
            Fields.alive += 1

        def __del__(self):
            Fields.alive -= 1

    most = []

    def baseline(train, test):
        made = Fields(module().persistence(train, test))
        most.append(Fields.alive)
        return made

    app = replace(tides, baselines=dict.fromkeys("abc", baseline), learned={})
    with quiet() as progress, Judge(app, settings(app), app.composite()) as judge:
        found = compare(rivals_of(app, judge, progress), {})
    assert list(found.arms) == list(found.baselines) == ["a", "b", "c"]
    assert max(most) <= 2


# -- constraints -----------------------------------------------------------------------------------------------------------


def test_a_component_s_weight_follows_the_validations_and_trains(tides, home):
    assert main(["train", "--app", "tides", "--run", "held", "--set", f'"{HELD}"']) == 0
    lines = RunFolder(Path("runs/tides/held")).read_metrics()
    validations = [line for line in lines if "eval/wrong" in line]
    constraint = settings(tides, HELD).rewards.constraints
    key = "constraint/alerted/weight"
    expected = [
        constrained({"hit": 1.0, "alerted": 0.0}, constraint, validations[: i + 1])[0]["alerted"]
        for i in range(len(validations))
    ]
    assert [line[key] for line in validations] == expected
    assert expected[0] > 0
    assert len(set(expected)) > 1
    assert [line["step"] for line in validations] == [0, 2, 4]
    rollouts = RunFolder(Path("runs/tides/held")).read_rollouts().to_pydict()
    for i, step in enumerate(rollouts["step"]):  # steps 1 and 2 follow the validation before step 1
        weight, alerted = expected[(step - 1) // 2], rollouts["reward/alerted"][i]
        total = rollouts["reward/hit"][i] + (0 if np.isnan(alerted) else weight * alerted)
        assert rollouts["reward"][i] == pytest.approx(total, abs=1e-5)
    assert any("rewards/alerted/mean" in line for line in lines), "a component without weight of its own is watched"
    assert not any("rewards/alerted/mean" in line for line in RunFolder(RUN).read_metrics())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("rewards.constraints={allerted: {metric: detected, at_least: 0.5}}", "did you mean 'alerted'"),
        ("rewards.constraints={alerted: {metric: detektet, at_least: 0.5}}", "did you mean 'detected'"),
        ("rewards.constraints={alerted: {metric: detected}}", "at_least=None and at_most=None; give exactly one"),
        (f'{HELD}" "data.validation=" "data.validation_share=0', "constraints follow a metric of the validation rows"),
        (f'{HELD}" "evaluate.every=0', "evaluate.every=0 makes none"),
    ],
)
def test_a_constraint_that_cannot_be_followed_is_refused(change, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, "train", "--app", "tides", "--set", f'"{change}"')
    assert not Path("runs/warmup").exists()


# -- evaluation ----------------------------------------------------------------------------------------------------------


def test_an_answer_depends_on_its_row_alone_and_a_draw_on_its_place_too(tides, home):
    rows, actor = rows_of(tides), loaded(tides)
    whole = actor.complete(rows, range(len(rows)))[0]
    part = actor.complete(rows[5:8], range(3))[0]
    assert all(np.allclose(a["value"], b["value"], atol=1e-3) for a, b in zip(part, whole[5:8], strict=True))
    drawn = actor.draws(rows[:2], range(2), 2)
    assert len({a.tobytes() for draw in drawn for a in draw}) == 4
    assert drawn[0][0].dtype == np.float32
    assert drawn[0][0].shape == (6, 2, 3, 4)
    again = actor.draws(rows[1:2], [1], 1)[0]
    assert np.allclose(again[0], drawn[0][1])
    assert not np.allclose(actor.draws(rows[1:2], [0], 1)[0][0], drawn[0][1])
    seeded = replace(actor, config=settings(tides, "run.seed=1"))
    assert not np.allclose(seeded.draws(rows[:1], [0], 1)[0][0], drawn[0][0])
    assert actor.how == "over 6 leads"


def test_any_forecaster_s_output_is_evaluated_like_a_policy(tides, home, capsys):
    after = summary_of()["after"]
    assert main(["eval", "--app", "tides"]) == 0
    assert json.loads((RUN / "eval-test.json").read_text())["metrics"]["wrong"]["mean"] == after
    assert main(["eval", "--app", "tides", "--model", str(RUN / "samples/after.zarr")]) == 0
    found = json.loads(Path("runs/tides/eval-after.zarr/eval-test.json").read_text())
    assert found["metrics"]["wrong"]["mean"] == after
    assert list(found["baselines"]) == ["persistence", "mean of all", "gaussian", "shifted"]
    assert found["best_baseline"]["model"] == pytest.approx(summary_of()["best_baseline"]["after"])
    assert "(as stored)" in " ".join(capsys.readouterr().out.split())
    rows = rows_of(tides)
    for path in (Path("theirs.nc"), Path("theirs.zarr")):  # plain numbers, fewer leads
        module().write(rows, [module().truth(row)[:2] for row in rows], path)
        assert main(["eval", "--app", "tides", "--model", str(path)]) == 0
        found = json.loads(Path(f"runs/tides/eval-{path.name}/eval-test.json").read_text())
        assert found["metrics"]["wrong"]["mean"] == 0
    assert isinstance(ForecastActor.load(tides, settings(tides), "theirs.nc"), StoredForecasts)


def test_stored_forecasts_do_not_learn_or_predict_and_must_have_the_rows(tides, home, capsys):
    rows = rows_of(tides)
    module().write(rows[:3], [module().truth(row) for row in rows[:3]], Path("few.nc"))
    assert "few.nc holds no forecast of test-03" in refused(capsys, "eval", "--app", "tides", "--model", "few.nc")
    assert "gone.zarr is not there" in refused(capsys, "eval", "--app", "tides", "--model", "gone.zarr")
    error = refused(capsys, "train", "--app", "tides", "--run", "x", "--model", "few.nc")
    assert "MODEL=few.nc holds forecasts and no policy: make eval APP=tides MODEL=few.nc scores them" in error
    analysis = "runs/data/tides-0/held.npy"
    error = refused(capsys, "predict", "--app", "tides", "--model", "few.nc", "--input", analysis, "--output", "o.zarr")
    assert "it cannot predict" in error
    assert not Path("o.zarr").exists()


# -- the model -------------------------------------------------------------------------------------------------------------


def test_the_model_card_s_own_lines_load_it(tides, home, monkeypatch):
    card = (RUN / "model" / "README.md").read_text()
    code = "\n".join(line[4:] for line in card.splitlines() if line.startswith("    "))
    row = rows_of(tides)[0]
    row["window"] = replace(row["window"], path=str(Path(row["window"].path).resolve()))
    expected = loaded(tides).complete([row], [0])[0]
    monkeypatch.chdir(RUN / "model")
    scope = {"row": row}
    exec(code, scope)
    assert equal(scope["forecasts"], expected)
    form = json.loads(Path("prompt.json").read_text())
    assert (form["leads"], form["edges"]) == (6, [[20, 40], [10, 60]])
    assert form["task"] == {"weighting": "equal"}
    assert "make predict APP=tides MODEL=" in card


def test_averaged_weights_are_what_is_evaluated_and_left(tides, home):
    assert main(["train", "--app", "tides", "--run", "averaged", "--set", "optim.ema=0.9 optim.lr=0.05"]) == 0
    assert main(["eval", "--app", "tides", "--run", "averaged"]) == 0
    report = json.loads(Path("runs/tides/averaged/eval-test.json").read_text())
    assert report["metrics"]["wrong"]["mean"] == summary_of(Path("runs/tides/averaged"))["after"]


# -- make predict --------------------------------------------------------------------------------------------------------


def predict(*more):
    return ["predict", "--app", "tides", "--input", "sea.npy", "--output", "out.zarr", *more]


@pytest.fixture
def sea(home):
    """An INPUT= file with two frames, and nothing of what is to come."""
    np.save("sea.npy", np.load("runs/data/tides-0/test.npy")[:2])


@pytest.mark.parametrize("target", ["out.zarr", "new/out.nc"])
def test_an_analysis_becomes_a_forecast_file(target, tides, sea, capsys):
    assert main(predict("--output", target)) == 0
    assert f"1 answers written to {target}" in " ".join(capsys.readouterr().out.split())
    row = apps.prepare(tides, tides.acts.requests(Path("sea.npy")), tides.options())[0]
    whole = loaded(tides).complete(rows_of(tides)[:1], [0])[0]
    assert equal(tides.acts.read(Path(target), [row]), whole)
    assert not [path for path in Path(target).parent.iterdir() if path.name.startswith(".")]


def test_what_cannot_be_forecast_from_or_written_is_refused(sea, capsys):
    np.save("wide.npy", np.zeros((2, 3, 3, 4)))
    Path("there.zarr").mkdir()
    for more, said in (
        (("--input", "none.npy"), "INPUT=none.npy is not there"),
        (("--input", "wide.npy"), "INPUT=wide.npy: an analysis has the shape"),
        (("--output", "out.grib"), "OUTPUT=out.grib must end in .zarr or .nc"),
        (("--output", "there.zarr"), "OUTPUT=there.zarr is there already"),
    ):
        assert said in refused(capsys, *predict(*more))
    assert not Path("out.zarr").exists()


# -- refusals before any work --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("rollout.leads=7", "rollout.leads=7 reaches beyond the 6 leads that the data know of (row train-"),
        ("rollout.eval_leads=20", "rollout.eval_leads=20 reaches beyond the 6 leads"),
        ("rollout.bins=2", "rollout.bins=2"),
        ("objective.recipe=grpo_guard", "recipe grpo_guard needs"),
        ("launch.sampler=vllm_colocate", "for language models"),
        ("trainer.bet=1", "unknown field of transformers.TrainingArguments in trainer: 'bet'"),
        ("data.train_rows=1", "1 training prompts are fewer than the 2 of one generation batch"),
        ("rollout.steps=1", "unknown key in section rollout 'steps'"),
        ("warmup.straighten=3", "warmup.straighten=3 is for flow policies"),
    ],
)
def test_what_a_forecast_cannot_do_is_refused_before_any_work(change, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, "train", "--app", "tides", "--set", change)
    assert not Path("runs/warmup").exists()


def test_a_quantity_that_is_none_is_refused(tides, tmp_path, monkeypatch):
    def quantity(options):
        return apps.Quantity(("level",), ((5.0, 3.0),))

    app = replace(tides, acts=replace(tides.acts, quantity=quantity))
    with pytest.raises(configs.ConfigError, match=r"task: class edges \(5.0, 3.0\) of level must ascend"):
        training.Setup(app, settings(app))


def test_a_setup_says_what_runs(tides, home):
    said = io.StringIO()
    with Progress(1, "", Console(file=said, width=200)) as progress:
        training.Setup(tides, settings(tides)).say(progress)
    assert "tides: recipe grpo; 2 prompts x 4 completions" in said.getvalue()
    assert actor_of(tides) is ForecastActor
