"""core.coroutines: async rewards, what they can do to the event loop and to each other, with the exact outcome."""

import math
import threading
import time

import numpy as np
import pytest
import scoring_rewards as rewards

from core import coroutines, pool
from core.scoring import BrokenRowError, Scorer, as_trl

TIMEOUT_S = 0.5


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(coroutines, "GRACE_S", 0.3)


@pytest.fixture
def scorer_of():
    """Makes scorers and closes them."""
    made = []

    def make(**rewards_):
        made.append(Scorer(rewards_, workers=1, timeout_s=TIMEOUT_S, max_concurrent=8, max_failure_share=1.0))
        return made[-1]

    yield make
    for scorer in made:
        scorer.close()


@pytest.fixture
def threads():
    """The threads of async rewards that there are since the test began."""
    before = set(threading.enumerate())
    return lambda: [t for t in threading.enumerate() if t.name == "async rewards" and t not in before]


def test_calls_run_beside_each_other_up_to_the_limit_and_are_ordered_by_row(scorer_of):
    rewards.running[:] = 0, 0
    completions = ["x" * i for i in range(24)]
    scores = scorer_of(x=rewards.beside).score(completions, [{"delay": 0.1 - i / 1000} for i in range(24)])
    assert scores.values[:, 0].tolist() == [float(i) for i in range(24)]
    assert rewards.running == [0, 8]
    assert scores.metrics["score_s"] < 2 * 3 * 0.1
    assert scores.metrics["seconds/x"] >= 24 * 0.07


def test_async_calls_wait_while_the_workers_work(scorer_of):
    scorer = scorer_of(x=rewards.beside, y=rewards.slow_first)
    scorer.score(["warm"], [{"delay": 0.0}])
    scores = scorer.score(["a", "b"], [{"delay": 0.2}, {"delay": 0.21}])
    assert scores.values.tolist() == [[1.0, 0.2], [1.0, 0.21]]
    assert 0.41 <= scores.metrics["score_s"] < 0.41 + 0.19  # the worker's two calls, one after the other


@pytest.mark.parametrize(
    ("completion", "reason", "detail"),
    [
        ("raise", "error", "IndexError: list index out of range"),
        ("exit", "error", "SystemExit: bye"),
        ("interrupt", "error", "KeyboardInterrupt"),
        ("recursion", "error", "RecursionError"),
        ("own timeout", "error", "TimeoutError: the server did not answer"),
        ("cancelled", "error", "CancelledError"),
        ("late", "no_answer", "no answer in 0.5 s"),
        ("nan", "failed", ""),
        ("unsure", "locked", ""),
        ("inf", "bad_reward_value", "returned inf (float)"),
        ("-inf", "bad_reward_value", "returned -inf (float)"),
        ("huge", "bad_reward_value", "(int)"),
        ("string", "bad_reward_value", "returned '0.5' (str)"),
        ("list", "bad_reward_value", "returned [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, ...] (list)"),
    ],
)
def test_what_goes_wrong_in_a_call_could_not_judge_its_row_and_harms_no_other(
    scorer_of, threads, completion, reason, detail
):
    scores = scorer_of(x=rewards.async_kind).score(["fine", completion, "score", "none"], [{}] * 4)
    np.testing.assert_array_equal(scores.values[:, 0], [0.5, math.nan, 0.25, math.nan])
    assert scores.failed.tolist() == [False, True, False, False]
    assert [reasons.get("x", "") for reasons in scores.reasons] == ["", reason, "wrong_rows", ""]
    assert detail in scores.details[1].get("x", "")
    assert scores.metrics["reward_failures/x"] == 1
    assert scores.metrics["timeouts"] == scores.metrics["killed_workers"] == 0
    assert len(threads()) == 1


def test_a_blocked_loop_fails_what_is_left_and_the_next_batch_gets_another(scorer_of, threads):
    scorer = scorer_of(x=rewards.blocks, y=rewards.length)
    rows = [{"seconds": [1.5]}] * 20
    completions = [f"a{i}" for i in range(20)]
    completions[10] = "block"
    start = time.monotonic()
    scores = scorer.score(completions, rows)
    assert time.monotonic() - start < 2 * (TIMEOUT_S + 0.3)
    assert scores.failed.tolist() == [False] * 10 + [True] * 10
    assert scores.values[:10].tolist() == [[1.0, 0.2]] * 10
    assert np.isnan(scores.values[10:]).all()
    assert [reasons.get("x") for reasons in scores.reasons[10:]] == ["no_answer"] * 10
    assert "blocks the event loop" in scores.details[19]["x"]
    assert scores.metrics["reward_failures/x"] == 10
    assert not scorer.score(["a", "b"], [{"seconds": [0]}] * 2).failed.any()
    assert len(threads()) == 2  # the abandoned one ends when its coroutine lets it
    time.sleep(1.5)
    assert len(threads()) == 1


def test_a_loop_that_is_blocked_again_and_again_ends_at_the_batch_s_deadline(scorer_of):
    start = time.monotonic()
    seconds = [[0.4 + i / 1000] for i in range(8)]
    scores = scorer_of(x=rewards.blocks).score(["block"] * 8, [{"seconds": s} for s in seconds])
    assert 0.7 < time.monotonic() - start < 1.3  # TIMEOUT_S + GRACE_S, where all calls together take 3.2
    assert scores.failed.tolist() == [False] + [True] * 7


def test_a_coroutine_that_goes_on_when_it_is_cancelled_fails_alone(scorer_of):
    scorer = scorer_of(x=rewards.stubborn)
    scores = scorer.score(["a", "stubborn", "b"], [{}] * 3)
    assert scores.failed.tolist() == [False, True, False]
    assert "goes on when it is cancelled" in scores.details[1]["x"]
    assert not scorer.score(["a"], [{}]).failed.any()


def test_threads_that_do_not_end_are_counted_and_end_the_run(scorer_of, monkeypatch):
    monkeypatch.setattr(coroutines, "MAX_ABANDONED", 1)
    scorer = scorer_of(x=rewards.blocks)
    rows = [{"seconds": [2.0]}] * 2
    for _ in range(2):
        assert scorer.score(["a", "block"], rows).failed.tolist() == [False, True]
    with pytest.raises(pool.WorkerError, match=r"2 threads of async rewards are held .* limit is 1"):
        scorer.score(["a", "b"], rows)
    time.sleep(1.0)  # the first one's time is over by now
    assert not scorer.score(["a", "b"], rows).failed.any()


def test_a_call_that_ends_the_loop_fails_what_is_left_and_the_next_batch_gets_another(scorer_of):
    scorer = scorer_of(x=rewards.ends_the_loop)
    start = time.monotonic()
    scores = scorer.score(["a", *(f"end now {i}" for i in range(9)), "b"], [{}] * 11)
    assert time.monotonic() - start < TIMEOUT_S
    assert scores.failed.tolist() == [False] + [True] * 10
    assert scores.details[9]["x"] == scores.details[10]["x"] == "no answer: an async call ended the event loop"
    assert not scorer.score(["a"], [{}]).failed.any()


def test_a_loop_that_ends_between_two_batches_is_replaced(scorer_of, threads):
    scorer = scorer_of(x=rewards.ends_the_loop)
    assert not scorer.score(["end after me"], [{}]).failed.any()
    while threads():
        time.sleep(0.01)
    assert not scorer.score(["a"], [{}]).failed.any()


def test_one_loop_serves_all_batches_until_the_scorer_is_closed(scorer_of, threads):
    scorer = scorer_of(x=rewards.loop_number)
    first = scorer.score(["a"], [{}]).values.tolist()
    assert scorer.score(["b"], [{}]).values.tolist() == first
    assert len(threads()) == 1
    scorer.close()
    assert threads() == []


def test_a_group_reward_sees_its_group_and_one_of_the_wrong_length_fails_it(scorer_of):
    scorer = scorer_of(x=rewards.async_rank)
    rows = [{"scale": 1.0 + (i >= 3)} for i in range(6)]
    values = scorer.score(["b", "a", "c", "z", "y", "y"], rows, group_size=3).values
    assert values[:, 0].tolist() == [0.5, 0.0, 1.0, 2.0, 0.0, 0.0]
    failing = scorer_of(x=rewards.async_rank_short).score(["a", "b"], [{}] * 2, group_size=2)
    assert failing.failed.all()
    assert "returned 1 scores for 2 completions" in failing.details[1]["x"]


def test_a_broken_row_and_a_missing_package_stop_the_run(scorer_of):
    with pytest.raises(BrokenRowError, match="dev-1: reward 'x': no such table: singer"):
        scorer_of(x=rewards.async_kind).score(["fine", "broken"], [{"id": "dev-0"}, {"id": "dev-1"}])
    scorer = scorer_of(x=rewards.async_needs_a_package)
    said = r"cannot import the reward scoring_rewards.async_needs_a_package, or what it needs: No module named"
    for _ in range(2):
        with pytest.raises(pool.WorkerError, match=said):
            scorer.score(["a", "b"], [{}] * 2)


def test_an_error_elsewhere_cancels_the_calls_under_way(scorer_of, threads):
    rewards.running[:] = 0, 0
    with pytest.raises(pool.WorkerError, match="a_package_that_is_not_installed"):
        scorer_of(x=rewards.beside, y=rewards.needs_a_package).score(["a"], [{"delay": 60}])
    assert rewards.running == [0, 1]
    assert threads() == []


def test_identical_calls_of_a_batch_are_made_once_and_those_of_the_next_again(scorer_of, tmp_path):
    scorer = scorer_of(x=rewards.counted_async, y=rewards.counted_async)
    for batches in (1, 2):
        scores = scorer.score(["a"] * 4, [{"notes": [str(tmp_path)]}] * 4)
        assert scores.values.tolist() == [[1.0, 1.0]] * 4
        assert len(list(tmp_path.iterdir())) == batches
        assert (scores.metrics["cache_hits/x"], scores.metrics["cache_hits/y"]) == (3, 4)


def test_as_trl_of_an_async_reward_is_a_plain_function():
    reward = as_trl(rewards.async_kind, timeout_s=TIMEOUT_S)
    extra = {}
    values = reward(prompts=["p"] * 4, completions=["fine", "raise", "score", "none"], log_extra=extra.__setitem__)
    assert values == [0.5, None, 0.25, None]
    assert extra == {"async_kind_reason": ["", "error", "wrong_rows", ""]}
