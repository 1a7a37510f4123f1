"""core.scoring, core.pool and core.worker: every way a reward or its worker can go wrong, with the exact outcome."""

import functools
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # workers get the parent's sys.path

import scoring_rewards as rewards

from core import pool, worker
from core.scoring import MIN_ROWS, BrokenRowError, RewardsFailing, Scorer, as_trl

TIMEOUT_S = 1.0


@pytest.fixture(scope="module")
def workers():
    """One pool for all tests that may share it."""
    shared = pool.Pool(pool.Limits(workers=2, timeout_s=TIMEOUT_S, memory_mb=512))
    yield shared
    shared.close()


def score(workers, reward, completions, columns=None, group_size=1, **options):
    rows = (
        columns if isinstance(columns, list) else [{"id": f"r{i}", **(columns or {})} for i in range(len(completions))]
    )
    return Scorer({"x": reward}, pool=workers, **options).score(completions, rows, group_size)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rsplit(")")[-1].split()[0] == "Z")


def gone(pid, within_s):
    end = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


# -- what rewards say


def test_results_are_ordered_by_row_and_not_by_arrival(workers):
    delays = [0.12, 0.0, 0.08, 0.0, 0.04, 0.0]
    scores = score(workers, rewards.slow_first, ["a"] * 6, [{"delay": d} for d in delays])
    assert scores.values[:, 0].tolist() == delays


def test_columns_are_chosen_by_the_signature_and_defaults_hold(workers):
    rows = [{"id": 0, "answer": "ab", "object": object()}, {"id": 1, "answer": "x", "scale": 4}]
    scorer = Scorer({"same": rewards.same, "length": rewards.length, "again": rewards.same}, pool=workers)
    scores = scorer.score(["ab", "ab"], rows)
    np.testing.assert_array_equal(scores.values, [[1, 0.2, 1], [0, 0.5, 0]])
    assert scorer.names == ("same", "length", "again")
    assert set(scores.metrics) == {
        *(f"{metric}/{name}" for metric in ("reward_failures", "seconds") for name in scorer.names),
        *("timeouts", "killed_workers", "score_s"),
    }


@pytest.mark.parametrize(
    ("completion", "value", "failed", "reason"),
    [
        ("nan", None, True, "failed"),
        ("unsure", None, True, "locked"),
        ("inf", None, True, "bad_reward_value"),
        ("huge", None, True, "bad_reward_value"),
        ("string", None, True, "bad_reward_value"),
        ("raise", None, True, "error"),
        ("exit", None, True, "error"),
        ("none", None, False, ""),
        ("score", 0.25, False, "wrong_rows"),
        ("true", 1.0, False, ""),
        ("print", 1.0, False, ""),
        ("stdin", 1.0, False, ""),
    ],
)
def test_what_a_reward_returns_or_raises_is_one_of_the_four_cases(workers, completion, value, failed, reason):
    scorer = Scorer({"x": rewards.kind, "length": rewards.length}, pool=workers)
    scores = scorer.score([completion, "fine"], [{"id": 0}, {"id": 1}])
    assert scores.failed.tolist() == [failed, False]
    assert scores.reasons[0].get("x", "") == reason
    assert scores.metrics["reward_failures/x"] == failed
    np.testing.assert_equal(scores.values[0, 0], math.nan if value is None else value)
    # A failed check takes the row along; a component that does not apply leaves the others.
    np.testing.assert_equal(scores.values[0, 1], math.nan if failed else len(completion) / 10)
    np.testing.assert_array_equal(scores.values[1], [0.5, 0.4])


def test_an_exception_keeps_type_message_and_place_and_a_detail_is_cut_and_cleaned(workers):
    scores = score(workers, rewards.kind, ["raise", "score"])
    assert "IndexError: list index out of range" in scores.details[0]["x"]
    assert "scoring_rewards.py" in scores.details[0]["x"]
    assert len(scores.details[1]["x"]) == worker.MAX_DETAIL
    assert scores.details[1]["x"].startswith("2 rows for 3\ufffd[31mxxx")


def test_a_broken_row_raises_with_its_id_and_the_first_row_wins(workers):
    rows = [{"id": f"dev-{i}", "gold": "fine" if i < 3 else "broken"} for i in range(6)]
    with pytest.raises(BrokenRowError, match=r"row dev-3 .*'x'.*no such table: singer"):
        score(workers, rewards.gold_runs, list("abcdef"), rows)
    assert score(workers, rewards.gold_runs, ["a"], rows[:1]).values.tolist() == [[1.0]]


def test_identical_calls_are_made_once_and_different_ones_are_not(workers, tmp_path):
    scorer = Scorer({"a": rewards.killed_once, "b": rewards.killed_once}, pool=workers)
    scores = scorer.score(["x"] * 4, [{"folder": str(tmp_path)}] * 4)
    assert scores.values.tolist() == [[1.0, 1.0]] * 4
    assert scores.metrics["seconds/a"] > 0 == scores.metrics["seconds/b"]
    assert len(set(score(workers, rewards.length, ["a", "ab"], [{"scale": 1}, {"scale": 2}]).values[:, 0])) == 1


def test_one_and_four_workers_give_the_same_scores():
    completions = [f"w{i % 7}" * (i % 5) for i in range(40)]
    rows = [{"answer": f"w{i % 3}", "delay": 0.001 * (i % 4)} for i in range(40)]
    results = []
    for count in (1, 4):
        together = {"a": rewards.same, "b": rewards.slow_first, "c": rewards.hash_order, "d": rewards.rank}
        with Scorer(together, workers=count) as scorer:
            results.append(scorer.score(completions, rows, group_size=4).values)
    np.testing.assert_array_equal(*results)


# -- groups and batches


def test_a_group_reward_sees_its_group_and_the_columns_of_its_first_row(workers):
    rows = [{"scale": 1.0 + (i >= 3)} for i in range(6)]
    scores = score(workers, rewards.rank, ["b", "a", "c", "z", "y", "y"], rows, group_size=3)
    assert scores.values[:, 0].tolist() == [0.5, 0.0, 1.0, 2.0, 0.0, 0.0]


def test_a_group_reward_of_the_wrong_length_fails_the_group(workers):
    scores = score(workers, rewards.rank_short, ["a", "b", "c", "d"], group_size=2)
    assert scores.failed.all()
    assert "returned 1 scores for 2 completions" in scores.details[3]["x"]


def test_a_group_answer_over_the_limit_loses_its_details_only(workers):
    scores = score(workers, rewards.rank_wordy, [str(i) for i in range(32)], group_size=32)
    assert scores.values[:, 0].tolist() == [1.0] * 32
    assert scores.reasons[31] == {"x": "r"}
    assert scores.details[31] == {}


def test_a_group_that_kills_its_worker_scores_zero_and_its_neighbour_does_not(workers):
    scores = score(workers, rewards.rank_fatal, ["a", "kill", "b", "c"], group_size=2)
    assert scores.values[:, 0].tolist() == [0.0, 0.0, 1.0, 1.0]


def test_a_batched_reward_runs_once_in_this_process(workers):
    rows = [{"pids": os.getpid()}] * 3
    assert score(workers, rewards.above_mean, ["a", "abc", "ab"], rows).values[:, 0].tolist() == [0.0, 1.0, 0.0]
    failing = score(workers, rewards.above_mean, ["a"], [{"pids": -1}])
    assert failing.failed.all()
    assert "AssertionError" in failing.details[0]["x"]


# -- death


@pytest.mark.parametrize(
    ("completion", "reason", "detail"),
    [
        ("hang", "timeout", "ran over 1 s"),
        ("exit", "killed_worker", "exit status 0"),
        ("kill", "killed_worker", "exit status -9"),
        ("memory", "killed_worker", "ran out of 512 MB"),
        ("babble", "killed_worker", "ended its worker"),
    ],
)
def test_a_completion_that_ends_two_workers_scores_zero_and_nobody_else_is_blamed(workers, completion, reason, detail):
    if completion == "memory" and sys.platform != "linux":
        pytest.skip("RLIMIT_AS is enforced on Linux only")
    start = time.monotonic()
    scores = score(workers, rewards.fatal, ["a", "b", completion, "c", "d"])
    assert time.monotonic() - start < 2 * (TIMEOUT_S + 1)
    assert scores.values[:, 0].tolist() == [1.0, 1.0, 0.0, 1.0, 1.0]
    assert not scores.failed.any()
    assert scores.reasons == [{}, {}, {"x": reason}, {}, {}]
    assert detail in scores.details[2]["x"]
    assert scores.metrics["timeouts"] == (reason == "timeout")
    assert scores.metrics["killed_workers"] == (reason == "killed_worker")


@pytest.mark.parametrize("completion", ["hang", "exit", "return", "both return"])
def test_no_child_of_a_reward_outlives_its_worker(completion, tmp_path):
    start = time.monotonic()
    with Scorer({"x": rewards.forks}, workers=1, timeout_s=TIMEOUT_S) as scorer:
        scores = scorer.score([completion], [{"folder": str(tmp_path)}])
    assert scores.values[0, 0] == ("return" in completion)
    assert scores.reasons[0].get("x", "") == {"hang": "timeout", "exit": "killed_worker"}.get(completion, "")
    assert time.monotonic() - start < 2 * (TIMEOUT_S + 1)
    children = [int(folder.name) for folder in tmp_path.iterdir()]
    assert len(children) == (1 if "return" in completion else 2)
    assert all(gone(child, within_s=1) for child in children)


def test_a_kill_from_outside_costs_a_second_try_and_no_score(workers, tmp_path):
    scores = score(workers, rewards.killed_once, ["a"], {"folder": str(tmp_path)})
    assert scores.values.tolist() == [[1.0]]
    assert scores.reasons == [{}]
    assert scores.metrics["killed_workers"] == 0


def test_workers_that_all_die_between_batches_are_replaced():
    with Scorer({"x": rewards.pid, "y": rewards.slow_first}, workers=3) as scorer:
        rows = [{"delay": 0.05 + i / 1000} for i in range(6)]
        before = {int(pid) for pid in scorer.score(list("abcdef"), rows).values[:, 0]}
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        scores = scorer.score(list("abcdef"), rows)
        assert not scores.failed.any()
        assert scores.reasons == [{}] * 6
        assert before.isdisjoint(int(pid) for pid in scores.values[:, 0])


def test_a_stopped_idle_worker_delays_nothing_but_its_own_call(monkeypatch):
    monkeypatch.setattr(pool, "START_S", 2.0)
    with Scorer({"x": rewards.pid}, workers=1) as scorer:
        first = int(scorer.score(["a"], [{}]).values[0, 0])
        os.kill(first, signal.SIGSTOP)
        scores = scorer.score(["b" * 200_000], [{}])  # more than the pipe holds
        assert scores.values[0, 0] not in (first, 0.0)
        assert scores.reasons == [{}]


@pytest.mark.parametrize("doing", ["hang", "idle"])
def test_a_worker_outlives_a_killed_parent_by_less_than_one_call(doing):
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import scoring_rewards as r\n"
        f"from core.scoring import Scorer\n"
        f"s = Scorer(dict(pid=r.pid, fatal=r.fatal), workers=1, timeout_s={TIMEOUT_S})\n"
        f"print(int(s.score(['idle'], [{{}}]).values[0, 0]), flush=True)\n"
        f"import time; s.score([{doing!r}], [{{}}]); time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    time.sleep(0.3)
    assert alive(pid)
    parent.kill()
    parent.wait()
    assert gone(pid, within_s=TIMEOUT_S + worker.GRACE_S + 1 if doing == "hang" else 1)


def test_a_worker_writes_no_file_and_closing_ends_it(tmp_path):
    with Scorer({"x": rewards.writes, "pid": rewards.pid}, workers=1) as scorer:
        scores = scorer.score(["text"], [{"file": str(tmp_path / "out")}])
        assert "File too large" in scores.details[0]["x"]
        assert (tmp_path / "out").read_text() == ""
        pid = int(scorer.score(["text"], [{"file": os.devnull}]).values[0, 1])
        assert alive(pid)
    assert gone(pid, within_s=1)


def test_workers_that_cannot_start_or_import_are_an_error_with_their_own_words(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "__file__", str(tmp_path / "worker.py"))
    (tmp_path / "worker.py").write_text("raise SystemExit('no room at the inn')")
    with pytest.raises(pool.WorkerError, match=r"does not start: exit status 1.*no room at the inn"):
        Scorer({"x": rewards.pid}).score(["a"], [{}])
    monkeypatch.undo()
    with Scorer({"x": rewards.pid}) as scorer:
        monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(Path(__file__).parent)])
        with pytest.raises(
            pool.WorkerError, match=r"cannot import the reward scoring_rewards.pid, or what it needs: ModuleNotFound"
        ):
            scorer.score(["a"], [{}])


def test_a_package_that_a_reward_lacks_stops_the_run_and_is_no_failed_check():
    said = "or what it needs: No module named 'a_package_that_is_not_installed'"
    with Scorer({"x": rewards.needs_a_package}) as scorer, pytest.raises(pool.WorkerError, match=said):
        scorer.score(["a"], [{}])


def test_calls_whose_workers_die_before_the_reward_begins_fail_without_blame(tmp_path, monkeypatch):
    died = "import os, sys\nos.write(1, b'\"ready\"\\n')\nsys.stdin.readline()\nsys.stdin.readline()\n"
    (tmp_path / "worker.py").write_text(died)
    monkeypatch.setattr(worker, "__file__", str(tmp_path / "worker.py"))
    scores = Scorer({"x": rewards.pid}, workers=1).score(["a", "b"], [{}, {}])
    assert scores.failed.all()
    assert "3 workers were lost before the reward began" in scores.details[1]["x"]
    assert scores.metrics["killed_workers"] == 0


# -- what is refused, and when a run stops


def test_a_missing_column_is_named_with_the_reward_and_the_columns_there_are(workers):
    scorer = Scorer({"x": rewards.same}, pool=workers)
    message = r"reward 'x' \(scoring_rewards.same\) needs the column 'answer'; the row has: anwser, id"
    with pytest.raises(ValueError, match=message):
        scorer.check_columns({"id": 0, "anwser": 1})
    with pytest.raises(ValueError, match=message):
        scorer.score(["a"], [{"id": 0, "anwser": 1}])


def test_what_a_worker_could_not_find_or_call_is_refused_with_a_sentence():
    def inner(completion):
        return 1.0

    for reward, message in [
        (lambda completion: 1.0, "cannot be a lambda"),
        (inner, "move it to the top level of a module"),
        (rewards.nested, "cannot be a lambda"),
        (functools.partial(rewards.same, answer="a"), "is a partial; .* module-level function"),
        (rewards.open_ended, r"\(completion, \*\*columns\); .* name each column"),
        (rewards.later, "is async"),
        (Path("a").joinpath, "is another object"),
        (rewards.Broken, "is a type"),
    ]:
        with pytest.raises(ValueError, match=f"reward 'x' .*{message}|reward 'x': .*{message}"):
            Scorer({"x": reward})


def test_a_function_of_the_running_script_is_refused():
    script = "from core.scoring import Scorer\ndef r(completion): return 1.0\nScorer({'r': r})"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "reward 'r' is __main__.r; workers import rewards" in said.stderr


def test_what_is_not_json_or_does_not_fit_is_refused_with_the_row(workers):
    with pytest.raises(ValueError, match=r"row r0, reward 'x': .*ndarray is not JSON serializable.*batched"):
        score(workers, rewards.length, [np.zeros(3)])
    with pytest.raises(ValueError, match=r"row r0, reward 'x': .*take .* of 16777216 bytes"):
        score(workers, rewards.length, ["a" * 17 * 2**20])
    with pytest.raises(ValueError, match="group_size=2 must divide 3"):
        score(workers, rewards.length, ["a"] * 3, group_size=2)


def test_a_megabyte_of_hostile_text_arrives_whole(workers):
    text = "\x00\ud800</textarea>\U0001f600'" * 100_000
    assert score(workers, rewards.same, [text], {"answer": text}).values.tolist() == [[1.0]]


def test_a_run_stops_above_the_failure_share_with_a_summary(workers):
    kinds = ["raise"] * (MIN_ROWS // 2) + ["fine"] * (MIN_ROWS // 2)
    assert score(workers, rewards.kind, kinds).failed.sum() == MIN_ROWS // 2
    message = r"(?s)9 of the last 16 rows .* max_failure_share=0.5:.*x: 9 failures; its first was error: IndexError"
    with pytest.raises(RewardsFailing, match=message):
        score(workers, rewards.kind, ["raise", *kinds[:-1]])
    assert score(workers, rewards.kind, ["raise"] * MIN_ROWS, max_failure_share=1.0).failed.all()


def test_failures_of_small_batches_are_taken_together(workers):
    scorer = Scorer({"x": rewards.kind}, pool=workers)
    for _ in range(MIN_ROWS - 1):
        assert scorer.score(["raise"], [{}]).failed.all()
    with pytest.raises(RewardsFailing, match="16 of the last 16 rows"):
        scorer.score(["raise"], [{}])
    assert not scorer.score(["fine"] * MIN_ROWS, [{}] * MIN_ROWS).failed.any()


def test_the_first_failure_is_said_aloud_and_later_ones_are_counted(workers, caplog):
    scorer = Scorer({"x": rewards.kind}, pool=workers)
    for _ in range(2):
        scorer.score(["raise", "inf"], [{}, {}])
    assert len(caplog.records) == 1
    assert "IndexError" in caplog.text


# -- TRL


def test_as_trl_has_the_signature_and_the_name_and_leaves_out_what_was_not_judged():
    reward = as_trl(rewards.kind, timeout_s=TIMEOUT_S)
    assert reward.__name__ == "kind"
    extra = {}
    chat = [[{"role": "assistant", "content": "fine"}], [{"role": "assistant", "content": "nan"}]]
    parts = [
        {"role": "assistant", "content": [{"type": "text", "text": "score"}]},
        {"role": "tool", "content": "raise"},
    ]
    values = reward(
        prompts=["p"] * 4,
        completions=[*chat, parts, "none"],
        completion_ids=[[1]] * 4,
        trainer_state=object(),
        log_metric=print,
        log_extra=extra.__setitem__,
    )
    assert values == [0.5, None, 0.25, None]
    assert extra == {"kind_reason": ["", "failed", "wrong_rows", ""]}
    assert as_trl(rewards.same)(prompts=["p"], completions=["a"], answer=["a"]) == [1.0]


def test_as_trl_of_a_group_reward_needs_the_group_size():
    with pytest.raises(ValueError, match="needs group_size"):
        as_trl(rewards.rank)
    ranked = as_trl(rewards.rank, group_size=2)
    assert ranked(prompts=["p"] * 4, completions=["a", "b", "d", "c"]) == [0.0, 1.0, 1.0, 0.0]


def test_rewards_with_equal_limits_share_their_workers():
    one, two = as_trl(rewards.pid, workers=1), as_trl(rewards.pid, workers=1)
    assert one(prompts=["p"], completions=["a"]) == two(prompts=["p"], completions=["b"])


def test_as_trl_scores_chats_inside_a_plain_grpo_trainer(tmp_path):
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    words = ["<pad>", "<eos>", "user", "assistant", *"abcdefgh"]
    base = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}assistant "
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = Qwen2Config(vocab_size=len(words), num_key_value_heads=2, **size, **special)
    trainer = GRPOTrainer(
        model=Qwen2ForCausalLM(config),
        reward_funcs=[as_trl(rewards.length), as_trl(rewards.rank, group_size=4)],
        args=GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=6,
            use_cpu=True,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_dict(
            {"prompt": [[{"role": "user", "content": c}] for c in "abcd"], "scale": [20.0] * 4}
        ),
        processing_class=tokenizer,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    assert all(entry["rewards/length/mean"] > 0 and math.isfinite(entry["rewards/rank/mean"]) for entry in logs)
    assert set(trainer._logs["extra"]) == {"length_reason", "rank_reason"}
