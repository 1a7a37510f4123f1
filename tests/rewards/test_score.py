import subprocess
import sys

from rewards.score import FAILED, BrokenRow, Score, batched, per_group


def test_only_a_failed_check_is_failed():
    assert Score(FAILED).failed
    assert not any(score.failed for score in (Score(0.0), Score(1.0, "match"), Score(None)))


def test_marks_and_broken_row_are_readable_without_importing_this_module():
    assert per_group(lambda completions: []).scope == "group"
    assert batched(lambda completions: []).scope == "batch"
    assert BrokenRow.broken_row
    assert issubclass(BrokenRow, ValueError)


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
