"""Spider (Yu et al. 2018, arXiv 1809.08887; CC BY-SA 4.0) and its dev variants, from a local folder.

`load(folder)` reads the folder as released (layout: data/README.md): train_spider.json + train_others.json are "train",
dev.json is "dev", and where they lie there: test.json "test", Spider-DK.json "dk", Spider-Syn/dev.json "syn" (the
question with synonyms), spider-realistic.json "realistic". `data.synthetic.spider` writes the same format.

Read: names as the database spells them (the *_original fields of tables.json) and the gold text. Not read: the parse
trees and tokens, and the extra databases of the test suites. Loading never downloads and opens no database; `schema_of`
reads the schema of a database that is not Spider's.
"""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

# split: the places of its question file relative to the folder; the first that exists counts.
OPTIONAL = {
    "test": ("test.json",),
    "dk": ("Spider-DK.json", "Spider-DK/Spider-DK.json"),
    "syn": ("Spider-Syn/dev.json", "Spider-Syn/Spider-Syn/dev.json"),
    "realistic": ("spider-realistic.json", "spider-realistic/spider-realistic.json"),
}


def load(folder: str | Path) -> dict[str, list[dict]]:
    """{split: rows} of a Spider folder; "train" and "dev" are always there.

    A row: id ("dev-00012"), question, sql (gold text), database (absolute path of the .sqlite file), db_id,
    schema {"tables": [{"name", "columns": [{"name", "type"}], "primary_key": [column]}],
            "foreign_keys": [[table, column, other table, other column]]} (one object shared by the rows of a database),
    kind (name of the query template, None in the real data), novel (True: a template that train never asks).

    Raises FileNotFoundError for a missing folder, file or database, ValueError for a malformed file; both name the fix.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder; give the folder that holds Spider's tables.json, train_spider.json, dev.json and "
            "database/ (data/README.md says where to get it; data.synthetic.spider.write makes one offline)"
        )
    tables = _tables(folder / "tables.json")
    main = (tables, [folder / "database"])
    files = [("train", folder / "train_spider.json", main), ("dev", folder / "dev.json", main)]
    if (folder / "train_others.json").exists():
        files.insert(1, ("train", folder / "train_others.json", main))
    for split, places in OPTIONAL.items():
        path = next((folder / place for place in places if (folder / place).exists()), None)
        if path is None:
            continue
        source = main
        if split == "test":
            extra = _tables(folder / "test_tables.json") if (folder / "test_tables.json").exists() else {}
            source = ({**tables, **extra}, [folder / "test_database", folder / "database"])
        elif (
            split == "dk" and path.parent != folder
        ):  # its own repository: three changed databases, its own tables.json
            source = (
                {**tables, **_tables(path.parent / "tables.json")},
                [path.parent / "database", folder / "database"],
            )
        files.append((split, path, source))
    splits: dict[str, list[dict]] = {}
    for split, path, (schemas, roots) in files:
        rows = splits.setdefault(split, [])
        located: dict[str, str] = {}
        question_key = "SpiderSynQuestion" if split == "syn" else "question"
        for at, entry in enumerate(_read(path)):
            row_id = f"{split}-{len(rows):05d}"
            for key in ("db_id", question_key, "query"):
                if not isinstance(entry, dict) or key not in entry:
                    raise ValueError(
                        f'{path}, entry {at} (row {row_id}) has no "{key}"; '
                        f"every entry needs db_id, {question_key} and query"
                    )
                if not isinstance(entry[key], str):
                    raise ValueError(f'{path}, entry {at} (row {row_id}): "{key}" is {entry[key]!r}; it must be text')
            db_id = entry["db_id"]
            if db_id not in schemas:
                raise ValueError(
                    f'{path}, entry {at} (row {row_id}) asks database "{db_id}", which tables.json does not describe; '
                    "add its entry (Spider-DK and the test set bring a tables.json of their own)"
                )
            if db_id not in located:
                located[db_id] = _database(roots, db_id, row_id)
            rows.append(
                {
                    "id": row_id,
                    "question": entry[question_key],
                    "sql": entry["query"],
                    "database": located[db_id],
                    "db_id": db_id,
                    "schema": schemas[db_id],
                    "kind": entry.get("template"),
                    "novel": bool(entry.get("held_out_template", False)),
                }
            )
    return splits


def schema_of(database: str | Path) -> dict:
    """The schema of a SQLite file, in the form of a row's `schema`; the file is opened read-only.

    Raises FileNotFoundError if there is no such file, ValueError if it is not a SQLite database.
    """
    path = Path(database).absolute()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; give the path of a SQLite database")
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
            names = connection.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
            )
            tables, foreign = [], []
            for (name,) in names.fetchall():
                columns = connection.execute("SELECT name, type, pk FROM pragma_table_info(?)", (name,)).fetchall()
                keys = sorted((pk, column) for column, _, pk in columns if pk)
                tables.append(
                    {
                        "name": name,
                        "columns": [{"name": column, "type": (kind or "text").lower()} for column, kind, _ in columns],
                        "primary_key": [column for _, column in keys],
                    }
                )
                links = connection.execute('SELECT "from", "table", "to" FROM pragma_foreign_key_list(?)', (name,))
                foreign += [[name, column, parent, target or "id"] for column, parent, target in links]
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path} does not open as a SQLite database: {error}") from None
    return {"tables": tables, "foreign_keys": foreign}


def _database(roots: list[Path], db_id: str, row_id: str) -> str:
    paths = [root / db_id / f"{db_id}.sqlite" for root in roots]
    for path in paths:
        if path.is_file():
            return str(path)
    raise FileNotFoundError(
        f"row {row_id} asks database {db_id}, but there is no file {' nor '.join(map(str, paths))}; "
        "copy the database/ folder of the release next to tables.json"
    )


def _tables(path: Path) -> dict[str, dict]:
    """{db_id: schema} of a tables.json."""
    schemas = {}
    for at, entry in enumerate(_read(path)):
        try:
            names, columns, types = entry["table_names_original"], entry["column_names_original"], entry["column_types"]
            tables = [{"name": name, "columns": [], "primary_key": []} for name in names]
            for (table, column), kind in zip(columns, types, strict=True):
                if table >= 0:  # -1 is the "*" that Spider counts as column 0
                    tables[table]["columns"].append({"name": column, "type": kind})
            for number in entry["primary_keys"]:
                tables[columns[number][0]]["primary_key"].append(columns[number][1])
            foreign = [
                [names[columns[n][0]] if part == 0 else columns[n][1] for n in pair for part in (0, 1)]
                for pair in entry["foreign_keys"]
            ]
            schemas[entry["db_id"]] = {"tables": tables, "foreign_keys": foreign}
        except KeyError as missing:
            raise ValueError(
                f"{path}, entry {at} has no {missing}; Spider's tables.json describes a database by it"
            ) from None
        except (TypeError, IndexError, ValueError) as error:
            raise ValueError(f"{path}, entry {at} is not in the form of Spider's tables.json: {error}") from None
    return schemas


def _read(path: Path) -> list:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing; Spider's release has {path.name} there (data/README.md shows the layout)"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; copy it again from the release") from None
    if not isinstance(entries, list):
        raise ValueError(f"{path} holds a {type(entries).__name__}; Spider's file is a list of entries")
    return entries
