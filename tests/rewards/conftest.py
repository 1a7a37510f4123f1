"""One small database with what breaks comparisons: NULLs, duplicates, ties, REALs, text that looks like numbers."""

import sqlite3

import pytest

SCRIPT = """
CREATE TABLE singer(id INTEGER PRIMARY KEY, name TEXT, country TEXT, age INTEGER, weight REAL);
INSERT INTO singer VALUES (1, 'Ann', 'France', 30, 0.1), (2, 'Bob', 'France', 25, 0.2), (3, 'Cid', 'Spain', 30, 0.3),
    (4, 'Dee', NULL, 41, NULL), (5, 'Eve', 'Spain', 25, 1e9), (6, 'Eve', 'Spain', 25, 0.3);
CREATE TABLE concert(id INTEGER PRIMARY KEY, singer_id INTEGER REFERENCES singer(id), year INTEGER, title TEXT);
INSERT INTO concert VALUES (1, 1, 2014, 'Opening'), (2, 1, 2015, 'ORDER BY'), (3, 3, 2014, 'Finale'),
    (4, 5, 2020, '2014');
CREATE VIEW french AS SELECT name FROM singer WHERE country = 'France';
"""


@pytest.fixture(scope="session")
def database(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("database") / "singers.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript(SCRIPT)
    connection.close()
    return str(path)
