"""The studies of apps/air_quality: what they train can be trained, and what they conclude follows from what was judged."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import air_quality_arms as arms
import air_quality_paper as paper

from core import app as apps
from core import config as configs
from core.run.train import Setup
from rewards.forecast import fields


@pytest.mark.parametrize("name", [name for group in arms.ARMS.values() for name in group])
def test_every_arm_is_a_config_that_runs(name):
    app = apps.find("air_quality")
    config = configs.load(app, apps.folder("air_quality") / "tiny.yaml", run__seed=0)
    changes = next(group[name] for group in arms.ARMS.values() if name in group)
    settings = {key.replace(".", "__"): value for key, value in changes.items() if "." in key}
    one = replace(configs.changed(app, config, **settings), objective=changes.get("objective", config.objective))
    assert Setup(app, one, need_machine=False).recipe.name == one.objective["recipe"]


def test_the_paper_task_starts_from_weighted_classes_and_grows_its_leads():
    app = apps.find("air_quality")
    config = configs.load(app, apps.folder("air_quality") / "tiny.yaml", task="paper", run__seed=0)
    assert (config.task.weighting, config.task.costs) == ("class", "paper")
    assert config.rollout.first_leads < config.rollout.leads < config.rollout.eval_leads
    assert set(config.rewards.constraints) == {"detected", "no_false_alarm"}
    Setup(app, config, need_machine=False)


def judged(cost, hits):
    """Four weeks, ten alert events and ten quiet cases each, one false alarm."""
    return {
        **{name: [[cost, 20.0]] * 4 for name in ("expected_cost", "regional_cost")},
        "alerts": [[hits, 1, 10 - hits, 9]] * 4,
    }


def seed(own, bayes, model=0.01):
    free = {"Bayes decision": judged(bayes, 6), "tuned threshold": judged(0.5, 5), "analysis model": judged(model, 9)}
    free["probability, tuned for regional_cost"] = judged(0.001, 9)
    chances = np.zeros((4, 101, 2))
    chances[:, 80] = 1, 5  # at .8: one quiet case and five events of ten
    chances[:, 10] = 9, 5
    names = [name for group in arms.ARMS.values() for name in group]
    return {
        "weeks": ["1", "2", "3", "4"], "roc": chances.tolist(), "free": free,
        "arms": {name: judged(own, 7) for name in names},
    }  # fmt: skip


def test_an_arm_is_compared_with_the_best_free_decision_of_its_own_cost():
    found = arms.summary({0: seed(0.10, 0.12), 1: seed(0.14, 0.12)}, "expected_cost", "cell, pooled scale")
    assert {one["best_free"] for one in found["by_seed"]} == {"Bayes decision"}  # not what had a weather forecast
    assert [one["difference"] for one in found["by_seed"]] == pytest.approx([-0.02, 0.02])
    assert found["mean"] == pytest.approx(0.12)
    half = 12.706 * math.sqrt(2) * 0.02 / math.sqrt(2)  # Student's t of one degree of freedom
    assert found["ci95"] == pytest.approx([-half, half], rel=1e-3)
    regional = arms.summary({0: seed(0.10, 0.12)}, "regional_cost", "regions, by cell")
    assert regional["by_seed"][0]["best_free"] == "probability, tuned for regional_cost"


def test_a_point_above_the_roc_is_measured_at_its_own_false_alarm_rate():
    one = arms.summary({0: seed(0.1, 0.1)}, "expected_cost", "cell, pooled scale")["by_seed"][0]
    assert (one["false_alarm_rate"], one["pod"]) == pytest.approx((0.1, 0.7))
    assert one["pod_above_roc"] == pytest.approx(0.7 - 0.5)  # the curve has POD .5 at .1


def test_the_table_and_the_figure_hold_every_arm_with_its_interval(tmp_path, monkeypatch):
    seeds = {0: seed(0.10, 0.12), 1: seed(0.14, 0.12)}
    study = {
        "arms": [arms.summary(seeds, cost, name) for cost, group in arms.ARMS.items() for name in group],
        "start": {cost: [0.2, 0.4] for cost in arms.ARMS},
    }
    lines = arms.table(study).splitlines()
    assert len(lines) == 2 + sum(len(group) for group in arms.ARMS.values())
    assert lines[2].startswith(
        "| cell, pooled scale | expected_cost | 0.3000 | 0.1200 | 0.1200 | +0.0000 [-0.2541, +0.2541] | +0.200 ["
    )
    (tmp_path / "results").mkdir()
    monkeypatch.chdir(tmp_path)
    arms.draw(study)
    assert (tmp_path / "results/air_quality_arms.svg").stat().st_size > 10_000


def test_a_table_takes_the_place_between_its_marks_and_no_other(tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    page.write_text("a <!-- x --> old <!-- /x --> b <!-- x y --> kept <!-- /x y -->\n")
    monkeypatch.setattr(arms.readme.apps, "folder", lambda app: tmp_path)
    arms.readme.rewrite("any", "x", "new")
    assert page.read_text() == "a <!-- x -->\n\nnew\n\n<!-- /x --> b <!-- x y --> kept <!-- /x y -->\n"


def test_a_mean_weighs_rows_by_their_cases():
    assert arms.mean([[1.0, 1.0], [0.0, 3.0], [9.0, 0.0]]) == 0.25


def test_a_region_is_alerted_as_a_whole_by_its_mean_probability():
    region = np.array([[1, 1], [2, 2]])
    window = SimpleNamespace(
        variables=("pm2p5", "pm10"), region=lambda: region, region_names={1: "a", 2: "b"},
        seen=lambda: np.ones((2, 2, 2, 2)), history=lambda: np.ones((2, 2, 2, 2)),
    )  # fmt: skip
    forecast = np.zeros((1, 2, 2, 2), fields.dtype(3))
    forecast["exceed"][0, 0, :, :, 1] = [[0.8, 0.1], [0.2, 0.1]]
    forecast["level"][0, 0] = [[3, 1], [2, 0]]
    level = arms.by_region(forecast, {"window": window, "scheme": "korea"}, np.array([0.4]))["level"]
    assert level[0, 0].tolist() == [[3, 2], [1, 0]]
    assert (level[0, 1] == 0).all()


def test_what_the_paper_claims_is_read_from_the_tables():
    columns = ["", "expected cost", "false alarm rate FP/(FP+TN)", "F1", "RMSE"]
    rows = [["before", 0.3, 0.4, 0.5, 20.0], ["after", 0.2, 0.1, 0.6, 22.0], ["persistence", 0.3, 0.2, 0.4, 30.0]]
    tables = [{"title": f"PM2.5 bad or worse, {end}", "columns": columns, "rows": rows}
              for end in ("every arm", "95 % intervals by week", "by lead")]  # fmt: skip
    told = paper.told({"tables": tables, "seed": 0, "config": {"rollout": {"leads": 8}}})
    assert (told["far_change"], told["f1_change"], told["rmse_ratio"]) == pytest.approx((-0.75, 0.1, 1.1))
