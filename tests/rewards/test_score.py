import subprocess
import sys

import numpy as np
import pytest

from rewards.sandbox.sqlite import QueryError
from rewards.score import FAILED, BrokenRow, Score, batched, per_group, reads, volatile
from rewards.sql import executes, execution, execution_match


def test_only_a_failed_check_is_failed():
    assert Score(FAILED).failed
    assert not any(score.failed for score in (Score(0.0), Score(1.0, "match"), Score(None)))


def test_an_array_over_decisions_has_not_failed_and_counts_as_one_case_unless_it_says_so():
    score = Score(np.array([1.0, np.nan]), weight=3.0)
    assert (score.failed, score.weight, Score(np.float32("nan")).failed, Score(0.0).weight) == (False, 3.0, True, 1.0)


def test_marks_and_broken_row_are_readable_without_importing_this_module():
    assert per_group(lambda completions: []).scope == "group"
    assert batched(lambda completions: []).scope == "batch"
    assert volatile(lambda completion: 0.0).volatile is True
    assert reads(lambda columns: [columns["folder"]])(lambda completion, *, folder: 0.0).reads({"folder": "f"}) == ["f"]
    assert BrokenRow.broken_row
    assert issubclass(BrokenRow, ValueError)


@pytest.mark.parametrize("by_clock", [True, False])
def test_a_query_that_the_clock_stopped_is_not_repeatable(tmp_path, monkeypatch, by_clock):
    def stopped(path, sql):
        if "slow" in sql:
            raise QueryError("timeout_in_query", "stopped", by_clock=by_clock)
        return execute(path, sql)

    execute = execution.execute
    monkeypatch.setattr(execution, "execute", stopped)
    database = str(tmp_path / "empty.sqlite")
    open(database, "w").close()
    for score in (
        executes("SELECT 'slow'", database=database),
        execution_match("SELECT 'slow'", sql="SELECT 1", database=database),
    ):
        assert score == Score(0.0, "timeout_in_query", "stopped", repeatable=not by_clock)
    assert executes("SELECT 1", database=database).repeatable
    if by_clock:  # the judge of the row was too slow: nobody's fault
        score = execution_match("SELECT 1", sql="SELECT 'slow'", database=database)
        assert (score.failed, score.reason, score.repeatable) == (True, "gold_timeout", False)


def test_rewards_import_without_torch_numpy_or_sqlglot():
    code = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'sqlglot', 'core', 'data'): sys.modules[name] = None\n"
        "import rewards.sql, rewards.canaries, rewards.text\n"
        "print(rewards.sql.executes('SELECT 1', database=':missing:').reason)\n"
        "try: rewards.sql.format_ok('SELECT 1')\n"
        "except ImportError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[0] == "database_unavailable"
    assert '".[sql]"' in run.stdout.splitlines()[1]
