import json
from pathlib import Path

import pytest

from rewards.sandbox.sqlite import file_stamp
from rewards.sql import ngram_overlap, schema_overlap
from rewards.sql.overlap import schema_items

ORACLES = {case["case"]: case for case in json.loads(Path(__file__).with_name("oracles.json").read_text())}
GOLD = "SELECT name FROM singer WHERE age > 20"


def test_bigram_oracle():
    case = ORACLES["bigram_symbol"]
    score = ngram_overlap(case["inputs"]["pred"], sql=case["inputs"]["gold"])
    assert score.value == pytest.approx(case["expected"])


def test_schema_oracle(database):
    score = schema_overlap("SELECT name, age FROM singer", sql="SELECT name, country FROM singer", database=database)
    assert score.value == ORACLES["schema_jaccard"]["expected"]


@pytest.mark.parametrize(
    ("sql", "items"),
    [
        ("SELECT 1", set()),
        ("SELECT count(*) FROM singer", {"singer"}),
        ("SELECT S.Name FROM Singer AS S", {"singer", "singer.name"}),
        ("SELECT c.* FROM singer s, concert c WHERE s.id = c.singer_id",
         {"singer", "singer.id", "concert", "concert.id", "concert.singer_id", "concert.year", "concert.title"}),
        ("SELECT year FROM singer JOIN concert ON singer.id = singer_id",
         {"singer", "singer.id", "concert", "concert.singer_id", "concert.year"}),
        ("SELECT name AS n FROM singer ORDER BY n", {"singer", "singer.name"}),
        ('SELECT name FROM singer WHERE country = "France"', {"singer", "singer.name", "singer.country"}),
        ("SELECT x.n FROM (SELECT name AS n, age FROM singer) AS x WHERE x.age > 1",
         {"singer", "singer.name", "singer.age"}),
        ("WITH w AS (SELECT id AS i FROM singer) SELECT i FROM w", {"singer", "singer.id"}),
        ("SELECT title FROM concert WHERE EXISTS (SELECT * FROM singer WHERE age = year)",
         {"concert", "concert.title", "concert.year", "singer", "singer.age"}),
        ("SELECT name FROM singer UNION SELECT title FROM concert ORDER BY name",
         {"singer", "singer.name", "concert", "concert.title"}),
        ("SELECT max(id) FROM singer JOIN concert USING (id)", {"singer", "singer.id", "concert", "concert.id"}),
        ("SELECT invented FROM singer", {"singer", "?.invented"}),
        ("SELECT s.invented FROM singer s", {"singer", "singer.invented"}),
    ],
)  # fmt: skip
def test_schema_items_resolve_aliases_stars_and_literals(database, sql, items):
    assert schema_items(sql, file_stamp(database)) == items


def test_schema_overlap_edges(database):
    def value(completion, gold):
        return schema_overlap(completion, sql=gold, database=database).value

    assert value("SELECT 1", "SELECT 2") == 1.0
    assert value("SELECT 1", GOLD) == value(GOLD, "SELECT 1") == 0.0
    assert value("SELECT name FROM", GOLD) == value("no query", GOLD) == value("SELECT 1; SELECT 1", GOLD) == 0.0
    assert value(GOLD, "SELECT FROM gold that does not parse") is None


def test_overlaps_do_not_see_comments_or_literals(database):
    for hidden in (f"SELECT 'x' /* {GOLD} */", f"-- {GOLD}\nSELECT 'x'", f"SELECT '{GOLD}'", f"SELECT 'x' /* {GOLD}"):
        assert schema_overlap(hidden, sql=GOLD, database=database).value == 0.0
        assert ngram_overlap(hidden, sql=GOLD).value == 0.0
    commented = GOLD.replace(" FROM", " /* SELECT */ -- x\n FROM")
    assert (
        ngram_overlap(commented, sql=GOLD).value == schema_overlap(commented, sql=GOLD, database=database).value == 1.0
    )


def test_overlaps_ignore_case_space_and_aliases_as_promised(database):
    assert ngram_overlap("select NAME\tfrom singer where age>20;", sql=GOLD).value == 1.0
    assert schema_overlap("SELECT x.NAME FROM singer x WHERE x.age = 1", sql=GOLD, database=database).value == 1.0


def test_a_missing_file_is_a_failed_check(tmp_path):
    assert schema_overlap(GOLD, sql=GOLD, database=str(tmp_path / "missing")).failed
