"""benchmarks/arena.py runs, goes on where it stopped, and measures what it says; its statistics, in closed form."""

import argparse
import itertools
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import arena
import arena_task as task
import torch
from arena import QUICK, Run, perform, planned, warm_start
from arena_report import critical_t, detectable, draw, estimate, holm, show, summarise, two_sided_p, verdict

from core.config import Model
from core.objective.recipes import RECIPES
from core.policy import language
from core.train.asked import shown

RECIPE = {"recipe", "options", "n", "start", "end", "ci95", "curve", "entropy", "rollouts", "seconds"}
PAIRED = {"diff", "diff_ci95", "verdict", "holm", "curve_diff", "curve_diff_ci95"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("arena")


def call(work):
    """The quick call, and what it wrote."""
    path = arena.main(["--quick", "--jobs", "1", "--work", str(work), "--output", str(work / "results")])
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def quick(work):
    return call(work)


@pytest.fixture(scope="module")
def policy(work):
    return language.load(Model(), warm_start(0, QUICK, work))


def test_quick_writes_what_it_promises(quick, work):
    assert set(quick) == {
        "settings", "runs", "recipes", "small_groups", "rates", "controls", "smallest_detectable",
        "false_alarms_expected", "cpu_seconds", "command", "git",
    }  # fmt: skip
    assert quick["command"] == "python -P benchmarks/arena.py --quick"  # and no folder of this machine
    grpo, dapo = quick["recipes"]
    assert (grpo["recipe"], dapo["recipe"]) == ("grpo", "dapo")
    assert set(grpo) >= RECIPE
    assert not set(grpo) & PAIRED
    assert set(dapo) >= RECIPE | PAIRED
    assert dapo["options"]["epsilon_high"] == 0.28
    assert [line["name"] for line in quick["controls"]] == ["shuffled advantages", "warm start, no training"]
    assert quick["controls"][1]["end"] == grpo["start"]
    assert [(line["recipe"], line["group"]) for line in quick["small_groups"]] == [("grpo", 2), ("grpo", 8)]
    assert len(quick["runs"]) == 8
    assert {run["rollouts"] for run in quick["runs"]} == {QUICK.rollouts * QUICK.steps}
    assert all(len(run["points"]) == QUICK.evaluations for run in quick["runs"])
    assert len({(run["seed"], run["start"]) for run in quick["runs"]}) == 2  # all runs of a seed start as one
    assert (work / "results" / "arena.svg").stat().st_size > 10_000


def test_a_second_call_runs_only_what_is_missing_and_that_comes_out_the_same(quick, work):
    files = sorted(work.glob("*/dapo*.json")) + sorted(work.glob("*/grpo*.json"))
    assert len(files) == 8
    files[0].unlink()
    before = {file: file.stat().st_mtime_ns for file in files[1:]}
    again = call(work)
    assert {file: file.stat().st_mtime_ns for file in files[1:]} == before
    assert files[0].exists()
    for old, new in zip(quick["runs"], again["runs"], strict=True):
        assert (old["points"], old["end_entropy"]) == (new["points"], new["end_entropy"])


def test_other_options_of_a_recipe_start_its_runs_anew(quick, work, monkeypatch):
    run = Run("dapo", 0)
    (file,) = work.glob(f"*/{run.name}.json")
    kept = file.read_text()
    monkeypatch.setitem(arena.OPTIONS, "dapo", {"epsilon_high": 0.5})
    (result,), _ = perform([run], QUICK, work, jobs=1)
    assert json.loads(file.read_text())["options"]["epsilon_high"] == result["options"]["epsilon_high"] == 0.5
    file.write_text(kept)


def test_rollouts_are_those_that_were_sampled_and_a_recipe_that_cannot_be_had_is_refused(work):
    results, refused = perform([Run("mc_grpo", 0), Run("value_anchored", 0)], QUICK, work, jobs=1)
    assert [(result["recipe"], result["rollouts"]) for result in results] == [
        ("mc_grpo", QUICK.rollouts * QUICK.steps * 9 // 8)
    ]
    assert list(refused) == ["value_anchored"]
    assert "value_anchored" in refused["value_anchored"]


def test_a_teacher_reads_the_answer_that_it_is_shown(work):
    """The tokenizer must take the words around it."""
    (result,), _ = perform([Run("sample_routed", 0)], QUICK, work, jobs=1)
    assert result["points"][-1] != result["start"]


def test_options_name_rewards_that_are_there():
    for name, options in arena.OPTIONS.items():
        assert set(options.values()) <= set(arena.REWARDS)
        assert arena.composed(name).options.items() >= options.items()


def test_a_run_that_diverges_is_raised_after_the_others_were_kept(work):
    diverges, learns = Run("grpo", 0, rate=1e45), Run("grpo", 0, rate=0.25)
    with pytest.raises(RuntimeError, match=r"grpo-G8-rate1e\+45-s0; the other runs are kept"):
        perform([diverges, learns], QUICK, work, jobs=1)
    assert list(work.glob(f"*/{learns.name}.json"))
    assert not list(work.glob(f"*/{diverges.name}.json"))


@pytest.mark.slow
def test_two_processes_find_what_one_finds(quick, work, tmp_path):
    runs = [Run("dapo", 0), Run("dapo", 1)]
    (one, other), _ = perform(runs, QUICK, tmp_path, jobs=2)
    expected = {run["seed"]: run["points"] for run in quick["runs"] if (run["recipe"], run["rate"]) == ("dapo", 1.0)}
    for run in (one, other):
        assert [round(point["accuracy"], 4) for point in run["points"]] == expected[run["seed"]]


def test_every_run_has_a_name_of_its_own():
    runs = planned(["grpo", "mc_grpo", "dapo"], [0, 1, 2], (2, 4), (0.5, 2.0))
    assert len(runs) == 3 * (3 + 1 + 2 * 2) + 2 * 3 * 2
    assert len({run.name for run in runs}) == len(set(runs)) == len(runs)


# -- the task ----------------------------------------------------------------------------------------------------------


def test_the_measured_probability_is_that_of_all_completions_that_the_reward_calls_right(policy):
    """Enumerates every completion that the sampler can give, as the trainer would decode it."""
    model, tokenizer = policy
    rows = [next(row for row in task.problems() if len(row["answer"]) == length) for length in (2, 3)]
    chances = task.right_answers(model, tokenizer, rows).logps.exp().tolist()
    measured = {row["id"]: chance for row, chance in zip(rows, chances, strict=True)}
    words = range(len(tokenizer))
    for row in rows:
        prefixes = [list(prefix) for n in range(task.LONGEST) for prefix in itertools.product(words[1:], repeat=n)]
        prompt = tokenizer(row["prompt"])["input_ids"]
        found, total = 0.0, 0.0
        reach = {(): 0.0}
        for n, group in itertools.groupby(prefixes, key=len):
            group = list(group)
            with torch.no_grad():
                logs = model(input_ids=torch.tensor([prompt + prefix for prefix in group])).logits[:, -1]
            logs = logs.double().log_softmax(-1).tolist()
            for prefix, after in zip(group, logs, strict=True):
                for word in words:
                    chance, ids = reach[tuple(prefix)] + after[word], (*prefix, word)
                    if word == tokenizer.eos_token_id or n + 1 == task.LONGEST:
                        total += math.exp(chance)
                        text = tokenizer.decode(ids, skip_special_tokens=True)
                        found += math.exp(chance) * task.exact([text], answer=[row["answer"]])[0]
                    else:
                        reach[ids] = chance
        assert total == pytest.approx(1.0, rel=1e-5)
        assert measured[row["id"]] == pytest.approx(found, rel=1e-4)


def test_greedy_is_right_exactly_where_greedy_decoding_gives_the_answer(policy):
    model, tokenizer = policy
    rows = task.problems()[:200]
    sampling = language.Sampling(max_new_tokens=task.LONGEST, batch_size=200)
    texts, cut = language.complete(model, tokenizer, [row["prompt"] for row in rows], sampling)
    asked = [row | {"answer": text} for row, text, long in zip(rows, texts, cut, strict=True) if not long]
    assert len({row["answer"] for row in asked}) > 2
    assert task.right_answers(model, tokenizer, asked).greedy.all()
    others = [row | {"answer": row["answer"] + "7"} for row in asked if len(row["answer"]) < 3]
    assert not task.right_answers(model, tokenizer, others).greedy.any()


def test_entropy_is_that_of_the_decisions_along_the_answer(policy):
    model, tokenizer = policy
    row = next(row for row in task.problems() if len(row["answer"]) == 2)
    longer = next(row for row in task.problems() if len(row["answer"]) == 3)
    ids = tokenizer(row["prompt"] + row["answer"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        shares = model(input_ids=ids).logits[0, -3:].softmax(-1)
    expected = -(shares * shares.log()).sum(-1).mean()
    for rows in ([row], [row, longer]):  # padding does not count
        assert task.right_answers(model, tokenizer, rows).entropy[0] == pytest.approx(expected.item(), rel=1e-5)


def test_prompts_are_all_pairs_and_a_quarter_is_held_out():
    rows = task.problems()
    assert len({row["id"] for row in rows}) == len(rows) == 1600
    assert sum(row["held_out"] for row in rows) == 400
    assert {len(row["prompt"]) for row in rows} == {6}
    assert {len(row["answer"]) for row in rows} == {2, 3}
    carries = {row["id"]: row["carries"] for row in rows}
    assert (carries["42+31"], carries["47+25"], carries["70+41"], carries["78+45"]) == (0, 1, 1, 2)


def test_the_annotator_slips_as_often_and_in_the_ways_that_are_said():
    slips = {
        "42+31": {"72", "74", "63", "83"},
        "47+25": {"62", "71", "73", "82"},
        "70+41": {"11", "110", "112", "101", "121"},
        "78+45": {"113", "23", "122", "124", "133"},
    }
    rows = {row["id"]: row for row in task.problems()}
    draw = random.Random(0)
    for name, wrong in slips.items():
        written = [task.label(rows[name], draw) for _ in range(4000)]
        share = task.RIGHT[rows[name]["carries"]]
        right = written.count(rows[name]["answer"]) / 4000
        assert abs(right - share) < 4 * math.sqrt(share * (1 - share) / 4000)
        assert set(written) - {rows[name]["answer"]} == wrong
    forgotten = [task.label(rows["70+41"], draw) for _ in range(4000)].count("11") / 4000
    assert forgotten == pytest.approx((1 - task.RIGHT[1]) * task.FORGETS, abs=0.03)


def test_demonstrations_are_of_prompts_that_are_not_held_out_and_half_are_also_copied():
    prompts, completions = task.demonstrations(seed=3, labels=4)
    assert (prompts, completions) == task.demonstrations(seed=3, labels=4) != task.demonstrations(seed=4, labels=4)
    assert len(prompts) == len(completions) == 1200 * 6
    held_out = {row["prompt"] for row in task.problems() if row["held_out"]}
    assert not held_out & {prompt[:6] for prompt in prompts}
    assert prompts[4:6] == [shown(prompts[0], completions[0]), shown(prompts[0], completions[2])]
    assert completions[4:6] == [completions[0], completions[2]]


def test_a_text_comes_back_from_its_tokens_and_what_is_no_arithmetic_is_one_token():
    tokenizer = task.build_tokenizer()
    assert tokenizer.decode(tokenizer("123" + task.END)["input_ids"], skip_special_tokens=True) == "123"
    assert tokenizer.decode(tokenizer(shown("47+25=", "72"))["input_ids"]) == "47+25=|72|"
    assert tokenizer("7" + task.END)["input_ids"][-1] == tokenizer.eos_token_id == tokenizer.pad_token_id


def test_digits_are_the_share_that_stands_where_it_should():
    texts = ["123", "124", "1230", "23", "", "321", "12"]
    expected = [1, 2 / 3, 3 / 4, 0, 0, 1 / 3, 2 / 3]
    assert task.digits(texts, answer=["123"] * 7) == pytest.approx(expected)
    assert task.exact(texts, answer=["123"] * 7) == [1, 0, 0, 0, 0, 0, 0]


def test_two_answers_have_one_identity_exactly_if_they_are_the_same():
    texts = ["".join(text) for n in range(task.LONGEST + 1) for text in itertools.product(task.CHARACTERS, repeat=n)]
    values = torch.tensor(task.identity(texts), dtype=torch.float32)  # what the trainer makes of them
    assert len(values.unique()) == len(texts)
    assert values.min() == 0
    assert values.max() < 1


# -- the statistics ----------------------------------------------------------------------------------------------------


def test_student_s_t_against_its_closed_forms():
    for t in (0.0, 0.3, 1.0, 2.5, 40.0):
        assert two_sided_p(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-12)
        assert two_sided_p(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-12)
        assert two_sided_p(t, 4) == pytest.approx(1 - t * (t * t + 6) / (t * t + 4) ** 1.5, abs=1e-12)
        three = 2 / math.pi * (math.atan(t / math.sqrt(3)) + math.sqrt(3) * t / (t * t + 3))
        assert two_sided_p(t, 3) == two_sided_p(-t, 3) == pytest.approx(1 - three, abs=1e-12)
    assert two_sided_p(1.5, 10_000) == pytest.approx(math.erfc(1.5 / math.sqrt(2)), abs=1e-4)


def test_critical_values_are_those_of_the_tables():
    table = {(0.05, 1): 12.706, (0.05, 4): 2.776, (0.05, 9): 2.262, (0.4, 4): 0.941, (0.01, 30): 2.750}
    for (p, df), value in table.items():
        assert critical_t(p, df) == pytest.approx(value, abs=5e-4)


def test_an_estimate_of_three_numbers_by_hand():
    found = estimate([3.0, 1.0, 2.0])
    assert (found["mean"], found["sd"]) == (2.0, 1.0)
    assert found["ci95"] == pytest.approx([2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)])
    assert found["p"] == pytest.approx(1 - math.sqrt(12) / math.sqrt(14))


def test_the_interval_excludes_0_exactly_if_p_is_below_5_percent():
    values = np.random.default_rng(0).normal(0.8, 1, (200, 5))
    verdicts = []
    for row in values:
        found = estimate(row)
        low, high = found["ci95"]
        assert (low > 0) - (high < 0) == {"better": 1, "worse": -1, "tie": 0}[verdict(found["mean"], found["p"])]
        verdicts.append(verdict(found["mean"], found["p"]))
    assert {"better", "tie"} <= set(verdicts)
    assert verdict(-0.1, 0.04) == "worse"


def test_equal_runs_are_a_tie_and_a_constant_difference_is_none():
    assert estimate([0.0] * 5)["p"] == 1
    assert estimate([0.5] * 5)["p"] == 0


def test_holm_s_adjustment_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1, 1]


def test_the_smallest_detectable_difference_is_found_four_times_out_of_five():
    draws = np.random.default_rng(0).normal(detectable(2.0, 5), 2.0, (50_000, 5))
    t = draws.mean(1) / (draws.std(1, ddof=1) / math.sqrt(5))
    assert (np.abs(t) > critical_t(0.05, 4)).mean() == pytest.approx(0.79, abs=0.01)


def fake(recipe, seed, end, **other):
    start = {"accuracy": 0.4, "held_out": 0.3, "greedy": 0.5, "entropy": 0.6}
    points = [start | {"accuracy": 0.5, "held_out": 0.4}, start | {"accuracy": end, "held_out": end - 0.1}]
    run = {"recipe": recipe, "seed": seed, "group": 8, "control": "none", "rate": 1.0} | other
    spent = {"rollouts": 64, "seconds": 1.0, "cpu_seconds": 1.0, "git": None}
    return {**run, **spent, "options": {}, "start": start, "points": points}


def test_differences_are_paired_by_seed_and_stay_within_rate_and_group_size(tmp_path, capsys):
    ends = {0: 0.5, 1: 0.9, 2: 0.7}
    results = [fake("dapo", seed, ends[seed] + 0.01 * (seed - 3)) for seed in (2, 0, 1)]
    results += [fake("grpo", seed, end) for seed, end in ends.items()]
    results += [fake("grpo", seed, 0.1, control="shuffled_advantages") for seed in ends]
    for size, rate in ((2, 1.0), (8, 0.5)):
        results += [fake("grpo", seed, 0.3 + size / 100 + seed / 10, group=size, rate=rate) for seed in ends]
        results += [fake("dapo", seed, 0.35 + size / 100 + seed / 10, group=size, rate=rate) for seed in ends]
    found = summarise(results, {"vgpo": "cannot"})
    dapo, grpo, refused = found["recipes"]
    assert refused == {"recipe": "vgpo", "refused": "cannot"}
    assert "diff" not in grpo
    assert (dapo["diff"], dapo["sd"], dapo["held_out_diff"]) == pytest.approx((-0.02, 0.01, -0.02))
    assert dapo["diff_ci95"] == pytest.approx([-0.02 - 0.01 * 4.302653 / 3**0.5, -0.02 + 0.01 * 4.302653 / 3**0.5])
    assert (dapo["curve_diff"], dapo["end"], dapo["curve"]) == pytest.approx((-0.01, 0.68, 0.59))
    assert (dapo["verdict"], dapo["holm"], dapo["holm_p"]) == ("tie", "tie", dapo["p"])
    assert (grpo["start"], grpo["gain"]) == pytest.approx((0.4, 0.3))
    small = {(line["recipe"], line["group"]): line for line in found["small_groups"]}
    assert list(small) == [("dapo", 2), ("dapo", 8), ("grpo", 2), ("grpo", 8)]
    assert small["dapo", 2]["diff"] == pytest.approx(0.05)
    assert small["dapo", 8]["diff"] == pytest.approx(-0.02)
    assert [line["diff"] for line in found["rates"] if "diff" in line] == pytest.approx([0.05])
    shuffled, untrained = found["controls"]
    assert (shuffled["diff"], untrained["diff"], untrained["gain"]) == pytest.approx((-0.6, -0.3, 0.0))
    assert found["smallest_detectable"]["diff"]["seeds"]["3"] == pytest.approx(detectable(0.01, 3))
    assert found["false_alarms_expected"] == 0.05
    show(found | {"cpu_seconds": 9.0})
    printed = capsys.readouterr().out
    assert "-0.020 [-0.045, +0.005]" in printed
    assert "rate x 0.5" in printed
    draw(found, tmp_path / "arena.svg")
    assert "shuffled advantages" in (tmp_path / "arena.svg").read_text()


def test_the_command_says_what_decides_numbers():
    given = argparse.Namespace(quick=False, seeds=[0, 1], recipes=["grpo", "dapo"], work="somewhere", jobs=7)
    assert arena.command(given) == "python -P benchmarks/arena.py --seeds 0 1 --recipes grpo dapo"
    given.seeds, given.recipes = arena.SEEDS, list(RECIPES)
    assert arena.command(given) == "python -P benchmarks/arena.py"
