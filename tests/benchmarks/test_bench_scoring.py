"""benchmarks/bench_scoring.py runs, and asks what it says it asks."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_scoring
import written

from data import spider
from data.synthetic import spider as synthetic
from rewards.sql.execution import execution_match


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "spider"
    synthetic.write(folder, train_databases=3, dev_databases=1, train_questions=8, dev_questions=4, dev_held_out=0)
    return list(spider.load(folder)["train"])


def scores(batch):
    return [execution_match(text, sql=row["sql"], database=row["database"]) for text, row in zip(*batch, strict=True)]


@pytest.mark.parametrize(("mix", "distinct"), [("right", 8), ("early", 8), ("late", 6)])
def test_a_group_holds_the_shares_that_the_module_states(mix, distinct, rows):
    first, second = bench_scoring.batches(rows, mix, 2)
    for batch in (first, second):
        assert len(set(batch[0])) == distinct * len(rows)
        for at in range(0, len(batch[0]), 8):
            assert len(set(batch[0][at : at + 8])) == distinct
            assert len({row["id"] for row in batch[1][at : at + 8]}) == 1
        found = scores(batch)
        assert sum(score.value for score in found) == (8 if mix == "right" else 3) * len(rows)
        if mix != "right":
            reasons = [score.reason for score in found]
            assert reasons.count("unknown_name") == reasons.count("syntax_error") == len(rows)
    again = sum(text in set(first[0]) for text in second[0])
    assert again == (4 * len(rows) if mix == "late" else 0)


def test_quick_writes_a_well_formed_file(tmp_path):
    script = written.ROOT / "benchmarks" / "bench_scoring.py"
    command = [sys.executable, "-P", str(script), "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    cases = written.check(tmp_path / "scoring.json")
    assert [path.name for path in tmp_path.iterdir()] == ["scoring.json"]
    names = [case["case"] for case in cases]
    for words in ("no caches: early", "no caches: late", "equal calls made again", "fork for every pair", "known rate"):
        assert any(words in name for name in names), words
    assert sum("test-suite style: 14 databases" in name for name in names) == 8
    assert "ours / baseline" in done.stdout
