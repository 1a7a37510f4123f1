"""core.pool and core.worker: every way a reward can end or hold up its worker, with the exact outcome; and speed."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import scoring_rewards as rewards
from scoring_rewards import TIMEOUT_S

from core import pool, worker
from core.scoring import Scorer


def score(workers, reward, completions, columns=None, group_size=1):
    rows = [{"id": f"r{i}", **(columns or {})} for i in range(len(completions))]
    return Scorer({"x": reward}, pool=workers).score(completions, rows, group_size)


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


# -- what a completion does to its own worker

VERDICT = '[1.0, "", "", true]'
FORGED = {  # lines that a reward writes where its worker answers; 2 is the number of its call
    "two verdicts": f'{{"id": 2, "seconds": 0, "verdicts": [{VERDICT}, {VERDICT}]}}',
    "no verdicts": '{"id": 2, "seconds": 0}',
    "huge value": f'{{"id": 2, "seconds": 0, "verdicts": [[1{"0" * 400}, "", "", true]]}}',
    "infinite value": '{"id": 2, "seconds": 0, "verdicts": [[Infinity, "", "", true]]}',
    "text value": '{"id": 2, "seconds": 0, "verdicts": [["1.0", "", "", true]]}',
    "another call": f'{{"id": 3, "seconds": 0, "verdicts": [{VERDICT}]}}',
    "bad seconds": f'{{"id": 2, "seconds": "soon", "verdicts": [{VERDICT}]}}',
    "no JSON": "{",
}


@pytest.mark.parametrize(
    ("completion", "reason", "detail"),
    [
        ("hang", "timeout", "ran over 1 s"),
        ("sleep", "timeout", "ran over 1 s"),
        ("exit", "killed_worker", "exit status 0"),
        ("kill", "killed_worker", "exit status -9"),
        ("memory", "killed_worker", "ran out of 512 MB"),
        ("exec", "killed_worker", "ended its worker"),
        ("exec and live", "killed_worker", "ended its worker"),
        ("close", "killed_worker", "ended its worker"),
        ("100 MB", "killed_worker", "ended its worker"),
        *((line, "killed_worker", "ended its worker") for line in FORGED.values()),
    ],
    ids=lambda value: next((name for name, line in FORGED.items() if line == value), None),
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
    assert scores.metrics["reward_failures/x"] == scores.metrics["cache_hits/x"] == 0


def test_a_group_that_kills_its_worker_scores_zero_and_its_neighbour_does_not(workers):
    scores = score(workers, rewards.rank_fatal, ["a", "kill", "b", "c"], group_size=2)
    assert scores.values[:, 0].tolist() == [0.0, 0.0, 1.0, 1.0]


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


# -- what others do to the workers


def test_a_kill_from_outside_costs_a_second_try_and_no_score(workers, tmp_path):
    scores = score(workers, rewards.killed_once, ["a"], {"folder": str(tmp_path)})
    assert scores.values.tolist() == [[1.0]]
    assert scores.reasons == [{}]
    assert scores.metrics["killed_workers"] == 0


def test_workers_that_all_die_between_batches_are_replaced():
    with Scorer({"x": rewards.pid, "y": rewards.slow_first}, workers=3, cache_mb=0) as scorer:
        rows = [{"delay": 0.05 + i / 1000} for i in range(6)]
        before = {int(pid) for pid in scorer.score(list("abcdef"), rows).values[:, 0]}
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        scores = scorer.score(list("abcdef"), rows)
        assert not scores.failed.any()
        assert scores.reasons == [{}] * 6
        assert before.isdisjoint(int(pid) for pid in scores.values[:, 0])


def test_workers_that_all_die_in_the_middle_of_a_batch_are_replaced_and_no_completion_is_blamed(tmp_path):
    def kill():
        while len(os.listdir(tmp_path)) < 2:
            time.sleep(0.01)
        for name in os.listdir(tmp_path):
            os.kill(int(name), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    with Scorer({"x": rewards.pid_later}, workers=2) as scorer:
        killer.start()
        scores = scorer.score(list("abcd"), [{"folder": str(tmp_path)}] * 4)
        killer.join()
    assert scores.values[:, 0].tolist() == [1.0] * 4
    assert scores.reasons == [{}] * 4
    assert len(os.listdir(tmp_path)) == 4  # two that died, two that took their place
    assert scores.metrics["killed_workers"] == 0


def test_what_a_job_manager_sends_to_every_process_ends_no_worker(tmp_path):
    def signal_all():
        for name in os.listdir(tmp_path):
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
                os.kill(int(name), number)

    with Scorer({"x": rewards.pid_later}, workers=2) as scorer:
        for batch in ("abcd", "efgh"):
            threading.Timer(0.2, signal_all).start()
            scores = scorer.score(list(batch), [{"folder": str(tmp_path)}] * 4)
            assert scores.values[:, 0].tolist() == [1.0] * 4
            assert scores.reasons == [{}] * 4
            signal_all()
        assert len(os.listdir(tmp_path)) == 2  # the first workers did it all


def test_the_programs_and_children_of_a_reward_can_still_be_ended(workers):
    assert score(workers, rewards.ends_its_helpers, ["a"]).values.tolist() == [[1.0]]


def test_a_stopped_idle_worker_delays_nothing_but_its_own_call(monkeypatch):
    monkeypatch.setattr(pool, "START_S", 2.0)
    with Scorer({"x": rewards.pid}, workers=1) as scorer:
        first = int(scorer.score(["a"], [{}]).values[0, 0])
        os.kill(first, signal.SIGSTOP)
        scores = scorer.score(["b" * 200_000], [{}])  # more than the pipe holds
        assert scores.values[0, 0] not in (first, 0.0)
        assert scores.reasons == [{}]


def test_an_answer_that_waits_while_another_worker_is_ended_is_not_late(monkeypatch):
    kill = pool._Worker.kill
    together = {"x": rewards.exits_halfway, "y": rewards.slow_first}
    with Scorer(together, workers=2, timeout_s=TIMEOUT_S) as scorer, monkeypatch.context() as patch:
        patch.setattr(pool._Worker, "kill", lambda one: (kill(one), time.sleep(TIMEOUT_S + 0.2))[0])
        scores = scorer.score(["a"], [{"delay": 0.6}])
    assert scores.values.tolist() == [[0.0, 0.6]]
    assert scores.reasons == [{"x": "killed_worker"}]


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


# -- speed


def takes_at_most(limit_s, rewards_, count, delay):
    """Whether a batch of different completions on two warm workers can be that quick; a busy machine may try again."""

    def seconds():
        with Scorer(rewards_, workers=2, cache_mb=0) as scorer:
            scorer.score(["warm", "up"], [{"delay": 0.1}] * 2)
            start = time.monotonic()
            scores = scorer.score([str(i) for i in range(count)], [{"delay": delay}] * count)
            assert not scores.failed.any()
            return time.monotonic() - start

    return any(seconds() < limit_s for _ in range(3))


ONE, TWO = {"x": rewards.slow_first}, {"x": rewards.slow_first, "y": rewards.slow_too}


def test_slow_rewards_share_the_workers_and_no_worker_is_idle_while_work_is_left():
    assert takes_at_most(1.15 * 16 * 0.05 / 2, ONE, 16, delay=0.05)
    assert takes_at_most(1.15 * 2 * 16 * 0.05 / 2, TWO, 16, delay=0.05)


@pytest.mark.slow
def test_64_calls_of_200_ms_take_two_workers_six_and_a_half_seconds_and_two_such_rewards_twice_that():
    assert takes_at_most(1.15 * 6.4, ONE, 64, delay=0.2)
    assert takes_at_most(1.15 * 12.8, TWO, 64, delay=0.2)


# -- what is left


def resources():
    """Open files, threads and children of this process."""
    gc.collect()
    children = "".join(path.read_text() for path in Path("/proc/self/task").glob("*/children")).split()
    return set(os.listdir("/proc/self/fd")), threading.active_count(), children


@pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")
def test_nothing_is_left_of_a_closed_scorer():
    together = {"x": rewards.fatal, "y": rewards.waits, "z": rewards.blocks}
    before = resources()
    scorer = Scorer(together, workers=2, timeout_s=TIMEOUT_S, cache_mb=0)
    for _ in range(2):  # closed and used again
        scores = scorer.score(["kill", "block", "a", "b"], [{"seconds": [0.01]}] * 4)
        assert not scores.failed.any()
        files, threads, children = resources()
        assert threads == before[1] + 1
        assert len(children) > len(before[2])
        assert len(files) > len(before[0])
        scorer.close()
        assert resources() == before
    scorer.close()


def test_a_process_that_closes_nothing_ends_in_order_and_at_once():
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import scoring_rewards as r\n"
        f"from core.scoring import Scorer\n"
        f"print(Scorer(dict(x=r.length, y=r.leaves_a_task)).score(['idle'], [{{}}]).values.tolist())\n"
    )
    start = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "[[0.4, 1.0]]\ncancelled\n", "")
    assert time.monotonic() - start < 5
