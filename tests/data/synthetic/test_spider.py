"""A small synthetic Spider folder: format, determinism, splits, and that its questions test what they ask."""

import hashlib
import json
import os
import random
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from data.spider import load
from data.synthetic import spider
from data.synthetic.spider_domains import DOMAINS, sample_database
from data.synthetic.spider_lint import build
from data.synthetic.spider_templates import HELD_OUT, TEMPLATES
from rewards.sandbox.sqlite import execute

SMALL = {"train_databases": 8, "dev_databases": 4, "train_questions": 60, "dev_questions": 16, "dev_held_out": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("synthetic") / "spider"
    spider.write(path, 7, **SMALL)
    return path


@pytest.fixture(scope="module")
def splits(folder):
    return load(folder)


def every(splits):
    return splits["train"] + splits["dev"]


def answer(connection, sql):
    rows = connection.execute(sql).fetchall()
    rows = [tuple(round(cell, 6) if isinstance(cell, float) else cell for cell in row) for row in rows]
    return rows if "ORDER BY" in sql else Counter(rows)


def digest(folder: Path) -> str:
    """Of every JSON and SQL file's bytes and every database's dump."""
    total = hashlib.sha256()
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        total.update(str(path.relative_to(folder)).encode())
        if path.suffix == ".sqlite":
            connection = sqlite3.connect(path)
            total.update("\n".join(connection.iterdump()).encode())
            connection.close()
        else:
            total.update(path.read_bytes())
    return total.hexdigest()


def test_same_seed_same_folder_in_another_process_with_another_hash_seed(folder, tmp_path):
    command = f"from data.synthetic import spider; spider.write({str(tmp_path / 'again')!r}, 7, **{SMALL!r})"
    root = Path(spider.__file__).parents[2]
    subprocess.run([sys.executable, "-c", command], check=True, cwd=root, env=os.environ | {"PYTHONHASHSEED": "5"})
    assert digest(tmp_path / "again") == digest(folder)


def test_other_seed_other_questions(folder, tmp_path):
    spider.write(tmp_path / "other", 8, **(SMALL | {"train_databases": 1, "dev_databases": 1}))
    questions = {row["question"] for row in load(tmp_path / "other")["train"]}
    assert len(questions & {row["question"] for row in load(folder)["train"]}) < len(questions) / 2


def test_loader_reads_back_every_question(folder, splits):
    for split, name in (("train", "train_spider"), ("dev", "dev")):
        entries = json.loads((folder / f"{name}.json").read_text())
        read = [(e["question"], e["query"], e["template"], e["held_out_template"]) for e in entries]
        assert read == [(row["question"], row["sql"], row["kind"], row["novel"]) for row in splits[split]]
        gold = (folder / f"{split}_gold.sql").read_text().splitlines()
        assert gold == [f"{row['sql']}\t{row['db_id']}" for row in splits[split]]
    assert (len(splits["train"]), len(splits["dev"])) == (480, 64)


def test_schema_of_tables_json_is_that_of_the_file(splits):
    for row in every(splits):
        connection = sqlite3.connect(row["database"])
        for table in row["schema"]["tables"]:
            found = connection.execute(f"PRAGMA table_info({table['name']})").fetchall()
            assert [column["name"] for column in table["columns"]] == [column[1] for column in found]
            assert table["primary_key"] == [column[1] for column in found if column[5]]
            foreign = {
                (table["name"], f[3], f[2], f[4])
                for f in connection.execute(f"PRAGMA foreign_key_list({table['name']})")
            }
            assert foreign == {tuple(f) for f in row["schema"]["foreign_keys"] if f[0] == table["name"]}
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        connection.close()


def test_splits_share_no_database_no_schema_and_no_held_out_template(splits):
    train, dev = splits["train"], splits["dev"]
    assert not {row["db_id"] for row in train} & {row["db_id"] for row in dev}
    assert not {json.dumps(row["schema"]) for row in train} & {json.dumps(row["schema"]) for row in dev}
    held_out = {template.__name__ for template in HELD_OUT}
    assert not held_out & {template.__name__ for template in TEMPLATES}
    assert not held_out & {row["kind"] for row in train}
    assert all(row["novel"] == (row["kind"] in held_out) for row in every(splits))
    assert Counter(row["db_id"] for row in dev if row["novel"]) == dict.fromkeys({row["db_id"] for row in dev}, 8)


def test_no_question_is_asked_twice_of_a_database(splits):
    asked = Counter((row["db_id"], row["question"]) for row in every(splits))
    assert asked.most_common(1)[0][1] == 1


def test_every_gold_runs_in_the_engine_of_the_rewards(splits):
    for row in every(splits):
        rows = execute(row["database"], row["sql"]).rows
        assert 1 <= len(rows) <= 100
        assert any(cell is not None for line in rows for cell in line)


def test_no_answer_depends_on_the_order_in_which_rows_are_stored(splits):
    """Renumbering the keys stores the same facts in another order: an answer that changes hung on a tie."""
    shuffle = random.Random(0).sample
    for db_id in {row["db_id"] for row in every(splits)}:
        rows = [row for row in every(splits) if row["db_id"] == db_id]
        before, after = sqlite3.connect(rows[0]["database"]), sqlite3.connect(":memory:")
        keys = {}
        for table in rows[0]["schema"]["tables"]:
            content = before.execute(f"SELECT * FROM {table['name']}").fetchall()
            keys[table["name"]] = dict(
                zip((line[0] for line in content), shuffle(range(1, 1001), len(content)), strict=True)
            )
            maps = {f[1]: keys[f[2]] for f in rows[0]["schema"]["foreign_keys"] if f[0] == table["name"]}
            maps["id"] = keys[table["name"]]
            columns = [column["name"] for column in table["columns"]]
            kept = dict(before.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'").fetchall())
            after.execute(kept[table["name"]])
            renumbered = [[maps.get(c, {}).get(v, v) for c, v in zip(columns, line, strict=True)] for line in content]
            after.executemany(f"INSERT INTO {table['name']} VALUES ({', '.join('?' * len(columns))})", renumbered)
        for row in rows:
            assert answer(before, row["sql"]) == answer(after, row["sql"]), row["sql"]
        before.close()
        after.close()


NEAR_MISSES = {
    r" > (?=\d)": " >= ",
    r" >= ": " > ",
    r" < (?=\d)": " <= ",
    r" <= ": " < ",
    r"AVG\((?=\w+\) FROM)": "SUM(",
    r"SUM\(": "AVG(",
    r" DESC": " ASC",
    r" ASC": " DESC",
    r"DISTINCT ": "",
    r" AND (?!\d)": " OR ",
    r" OR ": " AND ",
    r" WHERE [^()]*$": "",
    r"NOT IN": "IN",
}


def test_nearly_right_queries_give_other_answers(splits):
    """Edited as text, independently of the linter's trees."""
    tried = Counter()
    for row in every(splits):
        connection = sqlite3.connect(row["database"])
        for pattern, replacement in NEAR_MISSES.items():
            wrong = re.sub(pattern, replacement, row["sql"], count=1)
            if wrong != row["sql"] and not re.search("INTERSECT|UNION|EXCEPT", wrong):
                tried[pattern] += 1
                assert answer(connection, wrong) != answer(connection, row["sql"]), (row["sql"], wrong)
        connection.close()
    assert all(tried[pattern] for pattern in NEAR_MISSES)


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_domain_has_nulls_ties_repeated_labels_and_childless_parents(domain):
    nulls = ties = repeats = childless = 0
    for seed in range(10):
        database = sample_database("x", domain, random.Random(seed), held_out=False)
        assert 2 <= len(database.tables) <= 4
        for table in database.tables:
            assert 3 <= len(table.columns) <= 6
            assert len({column.name for column in table.columns}) == len(table.columns)
            assert 20 <= len(table.rows) <= 80
            for column in table.columns:
                values = table.values(column)
                nulls += None in values
                assert column.nullable or None not in values
                ties += column.kind == "number" and len(set(values)) < len(values)
                repeats += column.kind == "label" and len(set(values)) < len(values)
            for key, parent in table.parents.items():
                keys = next(table.values(column) for column in table.columns if column.name == key)
                childless += len(set(keys)) < len(database.table(parent).rows)
        build(":memory:", database).close()  # no name is a keyword
    assert nulls
    assert ties
    assert repeats
    assert childless


def test_every_template_is_asked_and_reads_as_one_sentence_or_two():
    asked = Counter()
    for number, domain in enumerate(DOMAINS):
        random_ = random.Random(number)
        database = sample_database("x", domain, random_, held_out=True)
        draw = spider.Draw(database, random_)
        for template in (*TEMPLATES, *HELD_OUT):
            for _ in range(5):
                try:
                    tree, question = template(draw)
                except spider.Unsuitable:
                    continue
                asked[template.__name__] += 1
                assert re.fullmatch(r"[A-Z][^{}]*[.?]", question), question
                assert "  " not in question, question
                assert len(re.findall(r"\w+", question)) <= 28, question
                build(":memory:", database).execute(spider.sql(tree)).close()
    assert set(asked) == {template.__name__ for template in (*TEMPLATES, *HELD_OUT)}


def test_write_refuses_an_existing_folder_and_leaves_nothing_after_a_failure(tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsError, match="taken exists already"):
        spider.write(tmp_path / "taken")

    def broken(path, query):
        raise RuntimeError("disk full")

    monkeypatch.setattr(spider, "execute", broken)
    with pytest.raises(RuntimeError, match="disk full"):
        spider.write(tmp_path / "new", 0, train_databases=1, dev_databases=0)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_more_questions_than_a_database_has_are_refused_with_the_number(tmp_path, monkeypatch):
    monkeypatch.setattr(spider, "TEMPLATES", {next(t for t in TEMPLATES if t.__name__ == "count"): 1})
    with pytest.raises(ValueError, match=r"shop_1 yields no question after \d+ of 500"):
        spider.write(tmp_path / "new", 0, train_databases=1, train_questions=500)
