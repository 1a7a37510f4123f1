"""results/: no file names a machine's folder, and the figures that the README quotes are those of the files."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import air_quality_arms
import air_quality_paper

ROOT = Path(__file__).parents[2]
README = " ".join((ROOT / "README.md").read_text().split())
FILES = sorted((ROOT / "results").glob("*.json"))


def result(name):
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def signed(value):
    return f"{value:+.3f}".replace("0.", ".", 1) if round(value, 3) else ".000"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_command_names_a_folder_of_a_machine(path):
    command = json.loads(path.read_text())["command"]
    assert not re.search(r"(?<![\w.])[/~]\S", command)


def test_the_readme_quotes_the_arena():
    arena = result("arena")
    by_name = {one["recipe"]: one for one in arena["recipes"]}
    verdicts = Counter(one.get("verdict") for one in arena["recipes"])
    tie, worse = verdicts["tie"], verdicts["worse"]
    assert verdicts["better"] == 0
    assert f"{tie} of {tie + worse} tie with it, {worse} end below" in README
    assert f"ends at {by_name['grpo']['end']:.2f}".replace("0.", ".") in README
    assert f"more than the {arena['smallest_detectable']['diff']['seeds']['5']:.3f}".replace("0.", ".") in README
    assert [name for name, one in by_name.items() if one.get("holm") == "worse"] == ["mc_grpo"]
    low, high = by_name["mc_grpo"]["diff_ci95"]
    assert f"{signed(by_name['mc_grpo']['diff'])} [{signed(low)}, {signed(high)}]" in README
    small = next(one for one in arena["small_groups"] if (one["recipe"], one["group"]) == ("mc_grpo", 2))
    low, high = small["diff_ci95"]
    assert f"({signed(small['diff'])} [{signed(low)}, {signed(high)}])" in README
    assert {one["name"]: f"{one['end']:.2f}" for one in arena["controls"]} == {
        "shuffled advantages": "0.09",
        "warm start, no training": "0.34",
    }
    assert "shuffled advantages at .09" in README
    assert "warm start .34" in README


def test_the_readme_counts_the_mechanisms():
    holds = Counter(str(one["holds"]) for one in result("mechanisms")["mechanisms"])
    counted = f"{holds['True']} hold, {holds['partly']} hold in part and {holds['False']} did not show"
    assert f"Of {sum(holds.values())} claims {counted}" in README


def test_the_readme_bounds_the_cost():
    assert max(one["ci95"][1] for one in result("recipe_cost")["cases"]) < 0.006
    assert "under 0.6 % of a step" in README


def test_the_readme_quotes_image_editing():
    found = result("image_editing")
    changes = [run["after"] - run["before"] for run in found["runs"]]
    assert len(changes) == 3
    assert f"+{min(changes):.2f} to +{max(changes):.2f}".replace("0.", ".") in README
    assert min(run["ci95"][0] for run in found["runs"]) > 0.2
    assert all(run["ci95"][1] < 0 for run in found["controls"]["shuffled advantages"])


KEEP_THE_FORECAST = (
    "before",
    "after",
    "Bayes decision",
    "tuned probability",
)  # of one start: only what is announced differs


def test_the_air_quality_readme_says_what_its_results_say():
    readme, found = (ROOT / "apps/air_quality/README.md").read_text(), result("air_quality")
    for run in found["runs"]:
        best = run["best_baseline"]
        low, high = best["ci95"]
        assert f"{best['name']}: {best['before']:+.4f} → {best['after']:+.4f} [{low:+.4f}, {high:+.4f}]" in readme
        assert low < 0 < high  # "every interval across 0"
        arms = next(table for table in run["tables"] if "every arm" in table["title"])
        rows = {row[0]: dict(zip(arms["columns"], row, strict=True)) for row in arms["rows"]}
        assert rows["before"]["expected cost"] == pytest.approx(rows["Bayes decision"]["expected cost"], abs=2e-5)
        assert all(
            abs(rows["after"][name] / rows["before"][name] - 1) < 0.03 for name in ("RMSE", "CRPS")
        )  # "at most 3 %"
        assert rows["after"]["CRPS"] < min(row["CRPS"] for name, row in rows.items() if name not in KEEP_THE_FORECAST)
    (shuffled,) = found["controls"]["shuffled advantages"]
    for arm in (found["runs"][0], shuffled):
        sampled = next(row for row in arm["table"] if row["name"].startswith("expected_cost, sampled"))
        assert f"{sampled['before']:.4f} to {sampled['after']:.4f}".replace("0.", ".") in " ".join(readme.split())
    differences = [run["best_baseline"]["after"] for run in found["runs"]]
    assert f"{min(differences):+.4f} to {max(differences):+.4f}".replace("0.", ".") in " ".join(readme.split())
    assert air_quality_paper.table(found["studies"]["paper"]["seeds"]) in readme
    changes = [one["far_change"] for one in found["studies"]["paper"]["seeds"]]
    assert (
        f"FAR falls by {-max(changes):.0%} to {-min(changes):.0%}".replace("%", " %", 2).replace(" % to", " to")
        in readme
    )
    for one in found["studies"]["paper"]["seeds"]:  # "better on every seed"
        f1, cost = (one["arms"]["columns"].index(name) for name in ("F1", "expected cost"))
        arms = {row[0]: row for row in one["arms"]["rows"]}
        for name in ("tuned threshold", "Bayes decision"):
            assert arms[name][f1] > arms["after"][f1]
            assert arms[name][cost] < arms["after"][cost]


def test_the_air_quality_readme_answers_as_the_study_does():
    readme = (ROOT / "apps/air_quality/README.md").read_text()
    study = result("air_quality")["studies"]["grpo_against_free_decisions"]
    assert (len(study["seeds"]), study["steps"]) == (5, 80)
    assert air_quality_arms.table(study) in readme
    arms = {arm["arm"]: arm for arm in study["arms"]}
    ties = {name for name, arm in arms.items() if arm["ci95"][0] < 0 < arm["ci95"][1]}
    assert ties == {
        "cell, pooled scale",
        "a head of its own, from the Bayes decision",
        "Gaussian, cell, pooled scale",
        "regions, by cell",
        "regions, by cell, a head of its own",
    }
    assert all(arm["ci95"][0] > 0 for name, arm in arms.items() if name not in ties)  # "every other arm loses"
    start = sum(study["start"]["expected_cost"]) / 5
    assert arms["cell, group scale"]["mean"] > start
    gain = start - arms["supervised for as long, over the same leads"]["mean"]
    assert f"supervised steps gain {gain:.4f}".replace("0.", ".") in readme
    assert arms["cell, pooled scale, shuffled advantages"]["mean"] > start
    above = {name for name, arm in arms.items() if arm["pod_above_roc_ci95"][0] > 0}
    assert above == {"Gaussian, cell, pooled scale"}
