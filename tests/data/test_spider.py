"""The loader on a hand-written folder in Spider's real layout, with its variants."""

import json
import sqlite3

import pytest

from data.spider import load


def tables_entry(db_id: str, extra_column: str = "Country") -> dict:
    return {
        "db_id": db_id,
        "table_names_original": ["Singer", "Song"],
        "table_names": ["singer", "song"],
        "column_names_original": [
            [-1, "*"],
            [0, "Singer_ID"],
            [0, "Name"],
            [0, extra_column],
            [1, "Song_ID"],
            [1, "Singer_ID"],
        ],
        "column_names": [[-1, "*"], [0, "singer id"], [0, "name"], [0, "country"], [1, "song id"], [1, "singer id"]],
        "column_types": ["text", "number", "text", "text", "number", "number"],
        "primary_keys": [1, 4],
        "foreign_keys": [[5, 1]],
    }


def entry(
    db_id: str = "music", question: str = "How many singers?", query: str = "SELECT count(*) FROM Singer"
) -> dict:
    return {"db_id": db_id, "question": question, "query": query, "sql": {}}


def put(path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def put_database(root, db_id: str) -> None:
    (root / db_id).mkdir(parents=True)
    connection = sqlite3.connect(root / db_id / f"{db_id}.sqlite")
    connection.execute("CREATE TABLE Singer (Singer_ID INTEGER PRIMARY KEY, Name TEXT, Country TEXT)")
    connection.close()


@pytest.fixture
def folder(tmp_path):
    put(tmp_path / "tables.json", [tables_entry("music")])
    put(tmp_path / "train_spider.json", [entry(), entry(question="Again?")])
    put(tmp_path / "dev.json", [entry()])
    put_database(tmp_path / "database", "music")
    return tmp_path


def test_row_has_the_names_of_the_database_not_the_natural_ones(folder):
    (row,) = load(folder)["dev"]
    assert row == {
        "id": "dev-00000",
        "question": "How many singers?",
        "sql": "SELECT count(*) FROM Singer",
        "database": str(folder / "database" / "music" / "music.sqlite"),
        "db_id": "music",
        "schema": {
            "tables": [
                {
                    "name": "Singer",
                    "columns": [
                        {"name": "Singer_ID", "type": "number"},
                        {"name": "Name", "type": "text"},
                        {"name": "Country", "type": "text"},
                    ],
                    "primary_key": ["Singer_ID"],
                },
                {
                    "name": "Song",
                    "columns": [{"name": "Song_ID", "type": "number"}, {"name": "Singer_ID", "type": "number"}],
                    "primary_key": ["Song_ID"],
                },
            ],
            "foreign_keys": [["Song", "Singer_ID", "Singer", "Singer_ID"]],
        },
        "kind": None,
        "novel": False,
    }


def test_train_others_continues_train(folder):
    put(folder / "train_others.json", [entry(question="Other?")])
    rows = load(folder)["train"]
    assert [(row["id"], row["question"]) for row in rows] == [
        ("train-00000", "How many singers?"),
        ("train-00001", "Again?"),
        ("train-00002", "Other?"),
    ]


def test_test_split_brings_its_own_tables_and_databases(folder):
    put(folder / "test.json", [entry("hidden")])
    put(folder / "test_tables.json", [tables_entry("hidden", "Continent")])
    put_database(folder / "test_database", "hidden")
    (row,) = load(folder)["test"]
    assert row["database"] == str(folder / "test_database" / "hidden" / "hidden.sqlite")
    assert row["schema"]["tables"][0]["columns"][2]["name"] == "Continent"


def test_dk_syn_and_realistic_load_from_their_repositories(folder):
    put(folder / "Spider-DK" / "Spider-DK.json", [entry("new_music") | {"type": 3}, entry() | {"type": 0}])
    put(folder / "Spider-DK" / "tables.json", [tables_entry("new_music")])
    put_database(folder / "Spider-DK" / "database", "new_music")
    syn = {"db_id": "music", "SpiderQuestion": "How many singers?", "SpiderSynQuestion": "How many vocalists?"}
    put(folder / "Spider-Syn" / "Spider-Syn" / "dev.json", [syn | {"query": "SELECT count(*) FROM Singer"}])
    put(folder / "spider-realistic.json", [entry(question="How many of them?")])
    splits = load(folder)
    assert [row["database"].removeprefix(str(folder)) for row in splits["dk"]] == [
        "/Spider-DK/database/new_music/new_music.sqlite",
        "/database/music/music.sqlite",
    ]
    assert [row["question"] for row in splits["syn"]] == ["How many vocalists?"]
    assert splits["realistic"][0]["id"] == "realistic-00000"
    assert splits["dev"][0]["question"] == "How many singers?"


def test_dk_merged_into_the_folder_uses_its_tables(folder):
    put(folder / "Spider-DK.json", [entry()])
    assert load(folder)["dk"][0]["db_id"] == "music"


def drop_database(folder):
    (folder / "database" / "music" / "music.sqlite").unlink()


@pytest.mark.parametrize(
    ("harm", "error", "words"),
    [
        (lambda f: (f / "tables.json").unlink(), FileNotFoundError, ["tables.json is missing"]),
        (lambda f: (f / "dev.json").unlink(), FileNotFoundError, ["dev.json is missing"]),
        (drop_database, FileNotFoundError, ["train-00000", "database/music/music.sqlite"]),
        (lambda f: put(f / "dev.json", [entry("nowhere")]), ValueError, ['"nowhere"', "dev-00000", "tables.json"]),
        (lambda f: put(f / "dev.json", [entry(), {"db_id": "music"}]), ValueError, ["entry 1", '"question"']),
        (lambda f: put(f / "dev.json", [entry() | {"query": None}]), ValueError, ["dev-00000", '"query" is None']),
        (lambda f: put(f / "dev.json", ["music"]), ValueError, ["entry 0", '"db_id"']),
        (lambda f: put(f / "dev.json", {"db_id": "music"}), ValueError, ["holds a dict", "list"]),
        (lambda f: (f / "dev.json").write_text("[{"), ValueError, ["dev.json is not JSON"]),
        (lambda f: put(f / "tables.json", [{"db_id": "music"}]), ValueError, ["entry 0", "table_names_original"]),
        (
            lambda f: put(f / "tables.json", [tables_entry("music") | {"primary_keys": [99]}]),
            ValueError,
            ["entry 0", "not in the form"],
        ),
    ],
)
def test_damaged_folder_is_refused_in_words(folder, harm, error, words):
    harm(folder)
    with pytest.raises(error) as raised:
        load(folder)
    for word in words:
        assert word in str(raised.value)


def test_missing_folder_says_what_belongs_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder.*tables\.json"):
        load(tmp_path / "absent")
