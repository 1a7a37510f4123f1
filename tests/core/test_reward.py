"""core.reward: what a reward must be, which columns it gets, and what cannot travel to a worker."""

import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scoring_rewards as rewards

from core.reward import Reward
from core.scoring import Scorer


def test_a_missing_column_is_named_with_the_reward_and_the_columns_there_are():
    scorer = Scorer({"x": rewards.same})
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
        (rewards.async_batch, "is async and batched; leave out @batched"),
        (Path("a").joinpath, "is another object"),
        (rewards.Broken, "is a type"),
    ]:
        with pytest.raises(ValueError, match=f"reward 'x' .*{message}|reward 'x': .*{message}"):
            Scorer({"x": reward})


def test_a_function_of_the_running_script_is_refused():
    script = "from core.scoring import Scorer\ndef r(completion): return 1.0\nScorer({'r': r})"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "reward 'r' is __main__.r; workers import rewards" in said.stderr


@pytest.mark.parametrize("reward", [rewards.length, rewards.beside], ids=["worker", "async"])
def test_what_is_not_json_is_refused_with_the_row(reward):
    scorer = Scorer({"x": reward})
    loop = []
    loop.append(loop)
    endless = functools.reduce(lambda inner, _: [inner], range(100_000), 0)
    for completion, message in [
        (np.zeros(3), "ndarray is not JSON serializable.*batched"),
        (loop, "Circular reference"),
        (endless, "recursion"),
        ("a" * 17 * 2**20, "take .* of 16777216 bytes"),
    ]:
        with pytest.raises(ValueError, match=f"row r0, reward 'x': .*{message}"):
            scorer.score(["fine", completion], [{"id": "r1"}, {"id": "r0"}])


def test_only_what_runs_in_a_worker_and_is_not_volatile_has_a_version():
    kept = {
        name: Reward.of("x", getattr(rewards, name)).version is not None for name in dir(rewards) if "counted" in name
    }
    assert kept == {name: name not in ("counted_volatile", "counted_batch", "counted_async") for name in kept}
    assert len(kept) == 8
