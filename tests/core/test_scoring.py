"""core.scoring: what rewards say and what becomes of it; when a run stops; the TRL signature."""

import math
import os

import numpy as np
import pytest
import scoring_rewards as rewards
from scoring_rewards import TIMEOUT_S

from core import pool, worker
from core.scoring import MIN_ROWS, BrokenRowError, RewardsFailing, Scorer, as_trl


def score(workers, reward, completions, columns=None, group_size=1, **options):
    rows = (
        columns if isinstance(columns, list) else [{"id": f"r{i}", **(columns or {})} for i in range(len(completions))]
    )
    return Scorer({"x": reward}, pool=workers, **options).score(completions, rows, group_size)


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
        *(f"{metric}/{name}" for metric in ("reward_failures", "cache_hits", "seconds") for name in scorer.names),
        *("timeouts", "killed_workers", "score_s"),
    }


@pytest.mark.parametrize(
    ("completion", "value", "failed", "reason"),
    [
        ("nan", None, True, "failed"),
        ("unsure", None, True, "locked"),
        ("inf", None, True, "bad_reward_value"),
        ("-inf", None, True, "bad_reward_value"),
        ("huge", None, True, "bad_reward_value"),
        ("huger", None, True, "bad_reward_value"),
        ("string", None, True, "bad_reward_value"),
        ("100 MB", None, True, "bad_reward_value"),
        ("array", None, True, "bad_reward_value"),
        ("list", None, True, "bad_reward_value"),
        ("raise", None, True, "error"),
        ("exit", None, True, "error"),
        ("interrupt", None, True, "error"),
        ("recursion", None, True, "error"),
        ("none", None, False, ""),
        ("score", 0.25, False, "wrong_rows"),
        ("100 MB reason", 0.25, False, "x" * worker.MAX_REASON),
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
    assert scores.metrics["timeouts"] == scores.metrics["killed_workers"] == 0
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


def test_broken_rows_raise_together_with_their_ids_and_the_first_messages(workers):
    rows = [{"id": f"dev-{i // 2}", "gold": f"fine {i}" if i < 6 else "broken"} for i in range(200)]
    with pytest.raises(BrokenRowError) as caught:
        score(workers, rewards.gold_runs, list("ab" * 100), rows)
    assert list(caught.value.rows) == [f"dev-{i}" for i in range(3, 100)]
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("97 rows of the data are broken; mend or remove dev-3, dev-4, ")
    assert lines[0].endswith(", dev-22 and 77 more:")
    assert lines[1:] == [f"  dev-{i}: reward 'x': no such table: singer" for i in (3, 4, 5)]


def test_one_broken_row_is_one_and_a_row_without_id_has_its_number(workers):
    with pytest.raises(
        BrokenRowError, match=r"^1 row of the data is broken; mend or remove 1:\n  1: reward 'x': no such"
    ):
        score(workers, rewards.gold_runs, ["a", "b"], [{"gold": "fine"}, {"gold": "broken"}])
    assert score(workers, rewards.gold_runs, ["a"], [{"gold": "fine"}]).values.tolist() == [[1.0]]


def test_a_broken_row_of_a_batched_reward_is_somewhere_in_the_batch(workers):
    with pytest.raises(BrokenRowError, match="a row of the batch: reward 'x': no such table: singer"):
        score(workers, rewards.golds_run, ["a", "b"], [{"gold": "fine"}, {"gold": "broken"}])


def test_identical_calls_are_made_once_and_different_ones_are_not(workers, tmp_path):
    scorer = Scorer({"a": rewards.killed_once, "b": rewards.killed_once}, pool=workers)
    scores = scorer.score(["x"] * 4, [{"folder": str(tmp_path)}] * 4)
    assert scores.values.tolist() == [[1.0, 1.0]] * 4
    assert scores.metrics["seconds/a"] > 0 == scores.metrics["seconds/b"]
    values = score(workers, rewards.length, ["a", "a", "ab"], [{"scale": 1}, {"scale": 2}, {"scale": 2}]).values
    assert values[:, 0].tolist() == [1.0, 0.5, 1.0]


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


def test_a_batched_reward_runs_once_in_this_process(workers):
    rows = [{"pids": os.getpid()}] * 3
    assert score(workers, rewards.above_mean, ["a", "abc", "ab"], rows).values[:, 0].tolist() == [0.0, 1.0, 0.0]
    failing = score(workers, rewards.above_mean, ["a"], [{"pids": -1}])
    assert failing.failed.all()
    assert "AssertionError" in failing.details[0]["x"]
    assert score(workers, rewards.exits, ["a"]).reasons == [{"x": "error"}]
    with pytest.raises(pool.WorkerError, match=r"cannot import the reward scoring_rewards\.all_need"):
        score(workers, rewards.all_need_a_package, ["a"])


# -- values over decisions, and what a value is the mean of


def test_a_batched_reward_may_give_a_value_for_each_decision():
    scorer = Scorer({"cells": rewards.cells, "words": rewards.words})
    scores = scorer.score(["1 - 0.5 0", "- - - -", "none", "fail", "0 0 0 1"], [{}] * 5)
    nan = math.nan
    np.testing.assert_array_equal(scores.values, [[0.5, 4], [nan, 4], [nan, 1], [nan, nan], [0.25, 4]])
    assert scores.failed.tolist() == [False, False, False, True, False]
    assert scores.decisions.dtype == np.float32
    np.testing.assert_array_equal(
        scores.decisions[:, 0], [[1, nan, 0.5, 0], [nan] * 4, [nan] * 4, [nan] * 4, [0, 0, 0, 1]]
    )
    np.testing.assert_array_equal(scores.decisions[:, 1], [[4] * 4, [4] * 4, [1] * 4, [nan] * 4, [4] * 4])
    assert scores.weights.tolist() == [[4, 1], [0, 1], [0, 1], [0, 0], [4, 1]]
    assert scores.reasons[0] == {"cells": "cells"}


def test_a_row_that_another_reward_could_not_judge_has_no_decisions():
    scorer = Scorer({"cells": rewards.cells, "again": rewards.cells, "kind": rewards.all_kinds})
    scores = scorer.score(["1 0", "0 0"], [{}] * 2)
    assert scores.failed.tolist() == [True, False]
    assert np.isnan(scores.decisions[0]).all()
    assert scores.decisions[1].tolist() == [[0, 0], [0, 0], [0.5, 0.5]]


def test_without_arrays_there_are_no_decisions(workers):
    assert score(workers, rewards.length, ["a"]).decisions is None
    assert score(workers, rewards.cells, ["none", "fail", "- -"]).decisions is None


def test_arrays_of_several_lengths_are_refused_by_name():
    scorer = Scorer({"cells": rewards.cells, "other": rewards.cells, "words": rewards.words})
    with pytest.raises(
        ValueError, match="several lengths in one batch: 'cells' of 2, 'cells' of 3, 'other' of 2, 'other' of 3"
    ):
        scorer.score(["1 0", "1 0 0"], [{}] * 2)


@pytest.mark.parametrize(
    ("reward", "completion", "words"),
    [
        (rewards.dense, "1 0", "for @batched rewards"),
        (rewards.async_dense, "1 0", "for @batched rewards"),
        (rewards.cells, "1 inf", "an array of numbers, finite or NaN"),
        (rewards.cells, "1 1e300", "an array of numbers, finite or NaN"),
    ],
)
def test_an_array_from_elsewhere_or_of_no_numbers_could_not_judge(workers, reward, completion, words):
    scores = score(workers, reward, [completion, "none"])
    assert scores.failed.tolist() == [True, False]
    assert scores.reasons[0]["x"] == "bad_reward_value"
    assert words in scores.details[0]["x"]


def test_how_many_cases_a_value_is_the_mean_of_comes_along(workers):
    scorer = Scorer({"x": rewards.weighted}, pool=workers)
    for _ in range(2):  # the second time from the cache
        scores = scorer.score(["3", "0", "none", "inf", "-1"], [{}] * 5)
        assert scores.weights[:, 0].tolist() == [3, 0, 0, 0, 0]
        assert scores.failed.tolist() == [False, False, True, True, True]
        assert scores.reasons[3] == {"x": "bad_reward_value"}
        assert "a weight: a finite number, 0 or more" in scores.details[4]["x"]


# -- what is refused, and when a run stops


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


def test_the_summary_fits_a_terminal_whatever_the_rewards_say(workers):
    names = [f"reward {i}" for i in range(6)]
    scorer = Scorer(dict.fromkeys(names, rewards.fails_at_length), pool=workers)
    with pytest.raises(RewardsFailing) as caught:
        scorer.score(["a"] * MIN_ROWS, [{}] * MIN_ROWS)
    lines = str(caught.value).splitlines()
    assert lines[0] == "16 of the last 16 rows could not be scored, above max_failure_share=0.5:"
    starts = [f"  {name}: 16 failures; its first was error: RuntimeError: xxx" for name in names]
    assert [line[: len(start)] for line, start in zip(lines[1:], starts, strict=True)] == starts
    assert max(map(len, lines)) < 400


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
