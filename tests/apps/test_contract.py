"""What every app in apps/ and every variant of one must do: pass its self-check, and train two steps into a whole run folder.

An app needs no test of its own for this; its folder is enough.
"""

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from core import app as apps
from core import config as configs
from core.app import Flow, Forecast, Language
from core.batch import Batch
from core.policy.flow import FlowPolicy, load_net
from core.policy.forecast import ForecastPolicy
from core.policy.step_nets import load_step_net
from core.run import media
from core.run.evaluate import Judge
from core.run.evaluation import run_evaluation
from core.run.folder import RunFolder
from core.run.progress import Progress
from core.run.splits import Split
from core.run.train import Setup, run_training

SMALL = (
    "data.train_rows=48", "data.test_rows=16", "warmup.steps=2", "rollout.prompts_per_step=2", "rollout.group_size=4",
    "optim.steps=2", "optim.micro_batch=8", "evaluate.every=1", "evaluate.validation_rows=8", "run.save_every=1",
    "rewards.workers=1", "run.control=random_rewards",  # so that weights move, whatever an untrained model makes
)  # fmt: skip
SMALLER = {
    Language: ("model.width=32", "model.layers=1", "rollout.max_completion_length=12", "optim.lr=0.01"),
    Flow: ("model.width=8", "model.layers=1", "rollout.eval_steps=2", "warmup.straighten=2", "optim.lr=0.001"),
    Forecast: (
        "model.width=8", "model.layers=1", "rollout.leads=2", "rollout.first_leads=2", "rollout.eval_leads=3",
        "optim.lr=0.001",
    ),
}  # fmt: skip


class Workplace:
    """An app's offline data, written once, and the means to run it in a folder of one's own."""

    def __init__(self, name: str, task: str | None, folder: Path):
        self.app, self.data = apps.find(name, task), folder / "data"
        self.kind = type(self.app.acts)
        self.app.write_offline(self.data, 0)
        self.config = self.load(f"data.folder={self.data}")
        self.said = io.StringIO()

    def file(self, name: str) -> Path:
        return apps.folder(self.app.name) / f"{self.app.variant + '-' if self.app.variant else ''}{name}.yaml"

    def load(self, *overrides: str):
        return configs.load(self.app, self.file("tiny"), [*SMALL, *SMALLER[self.kind], *overrides])

    def rows(self) -> list[dict]:
        """The first test rows, prepared."""
        return apps.prepare(self.app, list(self.app.load(self.data)[self.config.data.test])[:16], self.config.task)

    def row(self) -> dict:
        return self.rows()[0]

    def train(self, folder: Path, config=None):
        config = config or self.config
        console = Console(file=self.said, width=200)
        with RunFolder.open(folder, config.as_dict()) as run, Progress(2, "test", console) as progress:
            return run_training(Setup(self.app, config), run, progress, f"make train APP={self.app.name}")


CASES = [(name, task) for name in apps.names() for task in (None, *apps.find(name).variants)]
# Of each kind of policy; forecasts resume to the same bits in tests/core/run/test_forecast.py, in a second.
FIRST = [
    case
    for kind, case in {type(apps.find(*case).acts): case for case in reversed(CASES)}.items()
    if kind is not Forecast
]
ONE_OF_A_KIND = [pytest.param(case, marks=() if case in FIRST else pytest.mark.slow) for case in CASES]


def said(case) -> str:
    return "-".join(filter(None, case))


one_of_a_kind = pytest.mark.parametrize("place", ONE_OF_A_KIND, indirect=True, ids=said, scope="module")


@pytest.fixture(scope="module", params=CASES, ids=said)
def place(request, tmp_path_factory):
    return Workplace(*request.param, tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    """The run folder of two steps, and its summary."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        summary = place.train(Path("runs") / "run")
    return home / "runs" / "run", summary


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in (run / "model").glob("*.safetensors") for name, value in load_file(path).items()}


def same(a, b):
    return bool(a) and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def pictures(run: Path, folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "samples" / folder).glob("*.png")}


def test_an_app_is_complete(place):
    app, folder = place.app, apps.folder(place.app.name)
    files = {"app.py", "README.md", place.file("tiny").name, place.file("gpu").name}
    assert files <= {path.name for path in folder.iterdir()}
    assert app.outcome in app.rewards
    assert app.metrics
    assert not {reward for _, reward in app.rewards.values()} & set(list(app.metrics.values())[:1])
    for name, config in (("tiny", place.config), ("gpu", configs.load(app, place.file("gpu")))):
        assert Batch.of(config).rollouts > 0, name


def test_gold_and_canaries_score_as_declared(place):
    splits = place.app.load(place.data)
    with Judge(place.app, place.config, place.app.composite()) as judge:
        for split, canaries in ((place.config.data.train, 0), (place.config.data.test, 1)):
            rows = apps.prepare(place.app, list(splits[split])[:16], place.config.task)
            findings = apps.self_check(place.app, rows, judge.rewards, judge.metrics, canary_rows=canaries)
            assert [finding for finding in findings if not finding.ok] == []
            aimed = [canary for canary in place.app.canaries if canary.component in judge.rewards.names]
            assert len(findings) == len(place.app.rewards) + len(place.app.metrics) + canaries * len(aimed)
        wrong = {Language: lambda row: "no answer"}.get(place.kind, lambda row: np.zeros_like(place.app.gold(row)))
        broken = replace(place.app, gold=wrong)
        findings = apps.self_check(broken, rows[:2], judge.rewards, judge.metrics, canary_rows=0)
        assert not all(finding.ok for finding in findings), "this check cannot fail"


def test_two_steps_leave_the_whole_run_folder(place, trained):
    run, summary = trained
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "config.yaml", "metrics.jsonl", "rollouts.parquet", "checkpoints", "model", "eval.json", "report.html",
        "summary.json",
    }  # fmt: skip
    assert not [name for name in names if "part" in name.split(".")], "something was left half-written"
    said = json.loads(json.dumps(summary), parse_constant=lambda nan: None)
    assert json.loads((run / "summary.json").read_text()) == said
    assert set(summary) >= {
        "app", "task", "recipe", "seed", "config", "git", "metric", "better", "before", "after", "n", "n_clusters",
        "unscored", "ci95", "baselines", "best_baseline", "tables", "seconds", "peak_rss_mb",
    }  # fmt: skip
    assert set(summary["seconds"]) >= {"make", "warmup", "rl", "eval"}
    assert summary["n"] == 16
    assert summary["ci95"][0] <= summary["after"] - summary["before"] <= summary["ci95"][1]
    assert set(summary["baselines"]) == {*place.app.baselines, *place.app.learned}
    assert summary["better"] == place.app.better(summary["metric"])
    assert bool(summary["tables"]) == bool(place.app.verify)
    assert RunFolder(run).config == json.loads(json.dumps(place.config.as_dict()))


def test_metrics_and_rollouts_hold_every_step_and_component(place, trained):
    run = RunFolder(trained[0])
    lines = run.read_metrics()
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert [line["step"] for line in lines if any(name.startswith("eval/") for name in line)] == [0, 1, 2]
    rollouts = run.read_rollouts().to_pydict()
    assert rollouts["step"] == [1] * 8 + [2] * 8
    for name in place.app.rewards:
        assert {f"reward/{name}", f"reason/{name}"} <= set(rollouts)
    assert any(rollouts["advantage"])
    if place.kind is not Language:  # pictures of the first group of each step
        assert [bool(name) for name in rollouts["completion"]] == 2 * ([True] * 4 + [False] * 4)
        assert all((trained[0] / name).is_file() for name in rollouts["completion"] if name)


def test_the_report_is_one_page_without_scripts_from_elsewhere(place, trained):
    page = (trained[0] / "report.html").read_text()
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=[\"']?(?:https?:)?//", page)
    assert ("data:image/" in page) == (place.kind is not Language)
    assert len(page) < 5_000_000


def test_the_model_loads_by_itself_and_has_moved(place, trained):
    run, summary = trained
    if place.kind is Flow:
        net = load_net(configs.Model(), run / "model", place.app.acts.build)
        made = FlowPolicy(net, place.config.rollout).generate([place.app.acts.condition(place.row())], [0], steps=2)[0]
        assert media.is_picture(made)
        assert np.isfinite(made).all()
    elif place.kind is Forecast:
        net, acts = load_step_net(configs.Model(), run / "model", place.app.acts.build), place.app.acts
        policy = ForecastPolicy(net, place.config.rollout, acts.quantity(place.config.task))
        made = policy.forecast([acts.condition(place.row())], 3)[0]
        assert made.shape[:2] == (3, len(policy.quantity.variables))
        assert np.isfinite(made["value"]).all()
    else:
        model, tokenizer = (kind.from_pretrained(run / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
        ids = tokenizer("one", return_tensors="pt")["input_ids"]
        assert model(ids).logits.shape[-1] == len(tokenizer)
    assert json.loads((run / "model" / "prompt.json").read_text())["example_prompt"]
    assert summary["update_size"] > 0


def test_the_same_command_again_says_that_the_run_is_finished(place, trained, monkeypatch):
    run, summary = trained
    monkeypatch.chdir(run.parent.parent)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    place.said.truncate(0)
    assert place.train(Path("runs") / "run")["after"] == summary["after"]
    assert "is finished" in place.said.getvalue()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before


@one_of_a_kind
def test_the_same_seed_elsewhere_gives_the_same_bits(place, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    summary = place.train(Path("other"))
    assert same(weights(tmp_path / "other"), weights(trained[0]))
    assert summary["after"] == trained[1]["after"]
    rollouts = RunFolder(tmp_path / "other").read_rollouts()
    assert rollouts.equals(RunFolder(trained[0]).read_rollouts())


@one_of_a_kind
def test_an_interrupted_run_goes_on_to_the_same_bits(place, trained, tmp_path, monkeypatch):
    run, summary = trained
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run.parent, tmp_path / "runs")  # with the cached warm start
    copy = tmp_path / "runs" / "run"
    for name in ("model", "checkpoints/checkpoint-2"):
        shutil.rmtree(copy / name)
    for name in ("summary.json", "eval.json", "report.html"):
        (copy / name).unlink()
    assert place.train(Path("runs") / "run")["after"] == summary["after"]
    assert "resuming after step 1" in place.said.getvalue()
    assert same(weights(copy), weights(run))
    assert RunFolder(copy).read_rollouts().equals(RunFolder(run).read_rollouts())


def test_evaluation_of_the_run_gives_its_after_number_again(place, trained, monkeypatch, capsys):
    run, summary = trained
    monkeypatch.chdir(run.parent.parent)
    assert run_evaluation(place.app, place.config, None, Path("runs") / "run", None) == 0
    report = json.loads((run / f"eval-{place.config.data.test}.json").read_text())
    assert report["metrics"][summary["metric"]]["mean"] == summary["after"]
    assert len(report["items"]) == summary["n"]
    after = json.loads((run / "eval.json").read_text())["items"]
    if place.kind is Forecast:
        with Progress(0, "", quiet=True) as progress:
            rows = Split(place.app, place.config, progress).test
        assert [item["completion"] for item in after] == [f"samples/after.zarr/{row['id']}" for row in rows]
        made, again = (
            place.app.acts.read(run / "samples" / f"{name}.zarr", rows)
            for name in ("after", f"eval-{place.config.data.test}")
        )
        assert all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(made, again, strict=True))
    elif place.kind is Flow:
        assert pictures(run, f"eval-{place.config.data.test}") == pictures(run, "after")
        assert {item["completion"] for item in after} == {f"samples/after/{name}" for name in pictures(run, "after")}
    else:
        assert [item["completion"] for item in report["items"]] == [item["completion"] for item in after]
    assert run_evaluation(place.app, place.config, str(run / "model"), Path("runs") / "none", None) == 0
