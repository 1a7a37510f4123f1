"""How fast execution rewards are: against no caches, a fork for every pair, and the public test-suite script's way.

    python -P benchmarks/bench_scoring.py [--quick] [--output FOLDER]      writes results/scoring.json

Data: synthetic Spider databases as data.synthetic.spider writes them (50-200 rows each), and the same tables grown to
8000 rows. A batch is 32 prompts x 8 completions; prompts recur in every batch, completions are written anew. Of a group's 8
  early  3 are right (gold with a column alias of its own), 3 wrong (one mistake of data.synthetic.spider_lint away from gold,
         with an alias too), 1 names an unknown column, 1 is cut off after FROM; no text ever comes twice;
  late   the same shares, but one right and one wrong text come twice each, and did in all batches before: half of the
         group are duplicates.
Because prompts recur, "ours" runs no gold in a counted batch; a training run, which comes back to a prompt once an epoch, runs
it once for each group and worker (early mix at 8000 rows on new prompts each round: about 1.4 instead of 1.6-1.8).
Both sides have warm workers and both have scored one batch that is not counted. A ratio above 1 is in our favour.

Switched off in "against no caches": the scorer's result cache (cache_mb=0) and each worker's own result and tie caches
(rivals.execution_match_uncached); left on: warm workers, open connections, and that a scorer makes equal calls of one batch
once. That too is off in the case that says so.

The test-suite cases run in one process on all sides. Four databases, each in 14 versions of 200 to 8000 rows with
contents of their own. "Ours" is what the design allows (`lean`): connections stay open, rows are compared before
columns are permuted, gold runs once for each group of 8 and is forgotten after the batch. `spider_execution` is the
metric that this repository ships; its cache may keep gold from batch to batch. An evaluation asks one completion a
prompt, so that gold serves one prediction instead of 8: that is the last pair of cases, with an empty cache in every
round. The script itself was measured at 47 pairs/s on 14 such databases, with correct predictions and results of up
to about 150 rows; that our version of it is no slower is a case of its own, and the condition for reading the others.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # `-P` leaves it out; workers get the path of this process

import rivals
import sqlglot
from side_by_side import case, measure, write
from sqlglot import exp

from core.scoring import Scorer
from data import spider
from data.synthetic import spider as synthetic
from data.synthetic.spider_lint import neighbours
from rewards.sandbox.sqlite import QueryError, execute
from rewards.sql import execution, official
from rewards.sql.execution import execution_match

GROUP = 8
LARGE_ROWS = 8000
VERSIONS = 14
VERSION_ROWS = (200, 8000)
SCRIPT_RATE = 47.0  # pairs/s
SCRIPT_RESULT_ROWS = 150
Row = dict[str, Any]
Batch = tuple[list[str], list[Row]]


def main(arguments: Sequence[str] | None = None) -> Path:
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument(
        "--quick", action="store_true", help="few prompts and rounds, small databases: does it run, not how fast"
    )
    parse.add_argument("--output", type=Path, default=Path("results"), help="folder of scoring.json")
    options = parse.parse_args(arguments)
    prompts, suite_prompts, rounds, slow_rounds = (2, 1, 2, 2) if options.quick else (32, 16, 20, 12)
    with tempfile.TemporaryDirectory() as name:
        small, large, suite = databases(Path(name), Random(0))
        cases = []
        for size, rows in [("50-200 rows", small), (f"{LARGE_ROWS} rows", large)][: 1 if options.quick else 2]:
            asked = Random(1).sample(rows, prompts)
            cases += against_no_caches(asked, rounds, size)
            cases.append(against_forks(asked, slow_rounds, size))
        cases += against_the_test_suite(suite, suite_prompts, slow_rounds)
    command = "python -P benchmarks/bench_scoring.py" + " --quick" * options.quick
    return write(options.output, "scoring", cases, command)


# -- data --------------------------------------------------------------------------------------------------------------


def databases(folder: Path, random: Random) -> tuple[list[Row], list[Row], list[Row]]:
    """Rows on databases as they are made; on the same grown; and on test suites of four of them."""
    synthetic.write(folder / "spider", train_databases=12, dev_databases=1, train_questions=20, dev_held_out=0)
    small = list(spider.load(folder / "spider")["train"])
    places = sorted({row["database"] for row in small})
    large = {place: str(folder / Path(place).name) for place in places}
    suite = {}
    for place in places:
        rivals.grow(Path(place), Path(large[place]), LARGE_ROWS, seed=0)
    low, high = VERSION_ROWS
    for place in random.sample(places, 4):  # 56 files: within the connections that a process keeps open
        versions = folder / "suite" / Path(place).stem
        versions.mkdir(parents=True)
        suite[place] = str(versions / "0.sqlite")
        for version in range(VERSIONS):
            rows = round(low * (high / low) ** (version / (VERSIONS - 1)))
            rivals.grow(Path(place), versions / f"{version}.sqlite", rows, seed=version)

    def moved(to: dict[str, str]) -> list[Row]:
        return [{**row, "database": to[row["database"]]} for row in small if row["database"] in to]

    return small, moved(large), moved(suite)


class Answers:
    """Completions for one row; all whose `numbers` are one iterator give another text each time."""

    def __init__(self, row: Row, numbers: Iterator[int]):
        self.numbers, self.random = numbers, Random(row["id"])
        tree = sqlglot.parse_one(row["sql"], read="sqlite")
        self._right = _aliased(tree)
        self._wrong = [_aliased(wrong) for _, wrong in neighbours(tree)] or [_aliased(tree, exp.Literal.number(0))]
        self._unknown = _aliased(tree, exp.column("missing"))

    def _numbered(self, sql: str) -> str:
        return sql.replace("AS answer", f"AS answer_{next(self.numbers)}", 1)

    def right(self) -> str:
        return self._numbered(self._right)

    def wrong(self) -> str:
        return self._numbered(self.random.choice(self._wrong))

    def unknown(self) -> str:
        return self._numbered(self._unknown)

    def cut(self) -> str:
        sql = self.right()
        return sql[: sql.rindex(" FROM ") + 6]


def _aliased(tree: exp.Expression, instead: exp.Expression | None = None) -> str:
    """The query with its first column, or something instead of it, under the name `answer`."""
    tree = tree.copy()
    first = tree.selects[0]
    first.replace(exp.alias_(instead or first.unalias().copy(), "answer"))
    return tree.sql("sqlite")


def batches(rows: Sequence[Row], mix: str, count: int) -> Iterator[Batch]:
    """`count` batches: completions and their rows, groups adjacent.

    mix: "early", "late", "right" (nothing else) or "single" (one right completion a prompt).
    """
    group = 1 if mix == "single" else GROUP
    numbers = itertools.count()
    answers = [Answers(row, numbers) for row in rows]
    usual = [(one.right(), one.wrong()) for one in answers]
    for _ in range(count):
        completions = []
        for one, (right, wrong) in zip(answers, usual, strict=True):
            if mix in ("right", "single"):
                completions += [one.right() for _ in range(group)]
                continue
            pairs = [right, right, wrong, wrong]
            if mix == "early":
                pairs = [one.right(), one.right(), one.wrong(), one.wrong()]
            completions += [*pairs, one.right(), one.wrong(), one.unknown(), one.cut()]
        yield completions, [{**row, "turn": turn} for row in rows for turn in range(group)]


# -- without caches ----------------------------------------------------------------------------------------------------


def against_no_caches(rows: Sequence[Row], rounds: int, size: str) -> list[dict]:
    cases = []
    for mix, reward, without in (
        ("early", rivals.execution_match_uncached, "against no caches"),
        ("late", rivals.execution_match_uncached, "against no caches"),
        ("late", rivals.execution_match_undeduplicated, "against no caches, equal calls made again"),
    ):
        with Scorer({"ours": execution_match}) as ours, Scorer({"baseline": reward}, cache_mb=0) as baseline:
            arms = {"ours": scored_by(ours), "baseline": scored_by(baseline)}
            seconds = measure(arms, batches(rows, mix, rounds + 1))
        name = f"{without}: {mix} mix, {len(rows)} x {GROUP}, databases of {size}"
        cases.append(compared(name, seconds, len(rows) * GROUP, "completions/s"))
    return cases


def scored_by(scorer: Scorer):
    return lambda batch: scorer.score(*batch, GROUP).values[:, 0].tolist()


def against_forks(rows: Sequence[Row], rounds: int, size: str) -> dict:
    def forked(batch: Batch) -> list[float]:
        return rivals.fork_per_pair([(text, row["sql"], row["database"]) for text, row in zip(*batch, strict=True)])

    with Scorer({"ours": execution_match}) as ours:
        seconds = measure({"ours": scored_by(ours), "baseline": forked}, batches(rows, "early", rounds + 1))
    name = f"against a fork for every pair: early mix, {len(rows)} x {GROUP}, databases of {size}"
    return compared(name, seconds, len(rows) * GROUP, "completions/s")


def compared(name: str, seconds: dict, count: int, unit: str) -> dict:
    return case(name, count / seconds["ours"], count / seconds["baseline"], unit)


# -- the test suite ----------------------------------------------------------------------------------------------------


def against_the_test_suite(rows: Sequence[Row], prompts: int, rounds: int) -> list[dict]:
    few = [row for row in rows if most_rows(row) <= SCRIPT_RESULT_ROWS]
    cases = []
    for which, mix, shown in (
        (few, "right", f"correct predictions, results up to {SCRIPT_RESULT_ROWS} rows"),
        (few, "early", f"early mix, results up to {SCRIPT_RESULT_ROWS} rows"),
        (rows, "right", "correct predictions, results of any size"),
        (few, "single", f"one correct prediction a prompt, results up to {SCRIPT_RESULT_ROWS} rows"),
    ):
        asked = Random(2).sample(which, prompts)
        shipped = as_shipped_at_first if mix == "single" else as_shipped
        seconds = measure(
            {"ours": lean, "shipped": shipped, "baseline": by_the_script}, batches(asked, mix, rounds + 1)
        )
        pairs = prompts * (1 if mix == "single" else GROUP)
        rate = {name: pairs / values for name, values in seconds.items()}
        if not cases:
            name = "test-suite style itself (as ours), against the script's known rate (as baseline)"
            cases.append(case(name, rate["baseline"], SCRIPT_RATE, "pairs/s"))
        where = f"{VERSIONS} databases, {shown}"
        cases.append(case(f"against test-suite style: {where}", rate["ours"], rate["baseline"], "pairs/s"))
        name = f"spider_execution as shipped, against test-suite style: {where}"
        cases.append(case(name, rate["shipped"], rate["baseline"], "pairs/s"))
    return cases


def by_the_script(batch: Batch) -> list[float]:
    return [rivals.test_suite_match(text, row["sql"], row["database"]) for text, row in zip(*batch, strict=True)]


def as_shipped(batch: Batch) -> list[float]:
    return [
        official.spider_execution(text, sql=row["sql"], database=row["database"]).value
        for text, row in zip(*batch, strict=True)
    ]


def as_shipped_at_first(batch: Batch) -> list[float]:
    """With nothing kept from before."""
    execution._RESULTS = execution._Results(execution.CACHE_BYTES)
    return as_shipped(batch)


def lean(batch: Batch) -> list[float]:
    """The same verdicts from the same prepared texts: gold once for each file and prompt, on connections that stay open."""
    gold: dict[str, list[tuple[str, list[tuple]]]] = {}
    values = []
    for text, row in zip(*batch, strict=True):
        if row["id"] not in gold:
            query = official._prepared(row["sql"])
            gold[row["id"]] = [(path, execute(path, query).rows) for path in versions(row)]
        ordered = "order by" in row["sql"].lower()
        values.append(_agrees(official._prepared(text.replace("value", "1")), gold[row["id"]], ordered))
    return values


def _agrees(query: str, gold: list[tuple[str, list[tuple]]], ordered: bool) -> float:
    for path, expected in gold:
        try:
            found = execute(path, query).rows
        except QueryError:
            return 0.0
        if found == expected or (not ordered and Counter(found) == Counter(expected)):
            continue
        if not official.equal_up_to_columns(expected, found, ordered):
            return 0.0
    return 1.0


def versions(row: Row) -> list[str]:
    return sorted(map(str, Path(row["database"]).parent.glob("*.sqlite")))


def most_rows(row: Row) -> int:
    return max(len(execute(path, row["sql"]).rows) for path in versions(row))


if __name__ == "__main__":
    main()
