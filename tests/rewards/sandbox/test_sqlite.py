import os
import sqlite3
import threading
import time

import pytest

from rewards.sandbox import sqlite
from rewards.sandbox.sqlite import DatabaseUnavailable, Limits, QueryError, execute, read_schema

ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT max(x) FROM c"


def reason(database: str, sql: str, **limits) -> str:
    with pytest.raises(QueryError) as caught:
        execute(database, sql, Limits(**limits))
    return caught.value.reason


def test_rows_and_columns_come_back_as_sqlite_gives_them(database):
    result = execute(database, "SELECT name AS who, weight, NULL, x'00ff' FROM singer WHERE id = 1;")
    assert result.columns == ["who", "weight", "NULL", "x'00ff'"]
    assert result.rows == [("Ann", 0.1, None, b"\x00\xff")]
    assert execute(database, "VALUES (1), (2)").rows == [(1,), (2,)]
    assert execute(database, "SELECT * FROM french").rows == [("Ann",), ("Bob",)]


@pytest.mark.parametrize(
    ("sql", "code"),
    [
        ("", "empty"),
        (" ; ; ", "empty"),
        ("-- nothing\n/* at all */", "empty"),
        ("SELECT 1; SELECT 2", "several_statements"),
        ("SELECT 1; -- hidden\n DROP TABLE singer", "several_statements"),
        ("SELEC 1", "syntax_error"),
        ("SELECT FROM WHERE", "syntax_error"),
        ("SELECT 'open", "syntax_error"),
        ("SELECT '\ud800'", "syntax_error"),
        ("SELECT nope FROM singer", "unknown_name"),
        ("SELECT * FROM nope", "unknown_name"),
        ("SELECT nope(1)", "unknown_name"),
        ("SELECT id FROM singer, concert", "unknown_name"),
        ("SELECT abs(-9223372036854775808)", "runtime_error"),
        ("SELECT 1 \0", "refused"),
        ("/* x */ DELETE FROM singer", "refused"),
        ("WITH x AS (SELECT 1) UPDATE singer SET age = 1", "refused"),
        ("EXPLAIN SELECT 1", "refused"),
        ("SELECT * FROM sqlite_master", "refused"),
        ("SELECT * FROM pragma_table_info('singer')", "refused"),
        ("SELECT random()", "refused"),
        ("SELECT current_date", "refused"),
        ("SELECT load_extension('x')", "refused"),
        ("SELECT (" * 500, "too_big"),
        ("SELECT 1" + " UNION SELECT 1" * 100, "too_big"),
        ("SELECT 1" + " UNION SELECT 1" * 10_000, "too_big"),
        ("SELECT zeroblob(1000000000)", "too_big"),
        ("SELECT " + "replace(" * 9 + "'aaaaaaaaaa'" + ", 'a', 'aaaaaaaaaa')" * 9, "too_big"),
    ],
)
def test_what_the_query_did_wrong_has_its_own_code(database, sql, code):
    assert reason(database, sql) == code


@pytest.mark.parametrize(
    "call",
    ["date()", "date('now')", "time('NOW')", "datetime(x'6e6f77')", "julianday('n' || 'ow')", "strftime('%Y')",
     "strftime('%s', 'now')", "datetime('2020-01-01', 'localtime')", "date('now' || char(0) || 'x')"],
)  # fmt: skip
def test_the_moment_and_the_time_zone_are_refused_however_they_are_spelled(database, call):
    assert reason(database, f"SELECT {call}") == "refused"


@pytest.mark.parametrize(
    ("call", "value"),
    [
        ("date('2020-01-31', '+1 day')", "2020-02-01"),
        ("date(NULL)", None),
        ("strftime('%Y', '2020-05-06')", "2020"),
        ("printf('%.2f and %05d', 1.234, 7)", "1.23 and 00007"),
        ("printf('100%% of 1000')", "100% of 1000"),
    ],
)
def test_stable_uses_of_guarded_functions_still_answer(database, call, value):
    assert execute(database, f"SELECT {call}").rows == [(value,)]


def test_wide_fields_are_refused_because_one_opcode_cannot_be_interrupted(database):
    for call in ("printf('%.*c', 500000000, 'x')", "printf('%500000000d', 1)", "format('%-9999s', 1)"):
        assert reason(database, f"SELECT {call}") == "refused"


def test_budget_counts_steps_and_ends_the_same_query_the_same_way(database):
    counted = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT {}) SELECT count(*) FROM c"
    fits, over = counted.format(4_000), counted.format(40_000)
    for _ in range(3):
        assert execute(database, fits, Limits(steps=200_000)).rows == [(4_000,)]
        with pytest.raises(QueryError) as caught:
            execute(database, over, Limits(steps=200_000))
        assert (caught.value.reason, caught.value.by_clock) == ("timeout_in_query", False)


def test_wall_clock_is_the_outer_limit_and_says_so(database):
    started = time.monotonic()
    with pytest.raises(QueryError) as caught:
        execute(database, ENDLESS, Limits(steps=10**12, seconds=0.1))
    assert (caught.value.reason, caught.value.by_clock) == ("timeout_in_query", True)
    assert time.monotonic() - started < 2
    assert execute(database, "SELECT 1").rows == [(1,)]  # the connection goes on


def test_rows_and_bytes_are_capped(database):
    rows = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 11) SELECT x FROM c"
    assert len(execute(database, rows, Limits(rows=11)).rows) == 11
    assert reason(database, rows, rows=10) == "too_many_rows"
    assert reason(database, "SELECT hex(zeroblob(600)) FROM singer", bytes=5_000) == "too_big"


def test_sorting_more_than_the_heap_ends_as_too_big_and_the_next_query_works(database):
    bomb = "WITH RECURSIVE c(x) AS (SELECT zeroblob(200000) UNION ALL SELECT x FROM c) SELECT x FROM c ORDER BY x"
    assert reason(database, bomb) == "too_big"
    assert execute(database, "SELECT count(*) FROM singer").rows == [(6,)]


def test_files_that_cannot_be_opened_are_nobodys_fault(tmp_path):
    (tmp_path / "text.sqlite").write_text("this is not a database, only text that is long enough to hold a header" * 9)
    for path in (tmp_path / "missing.sqlite", tmp_path / "text.sqlite", tmp_path):
        with pytest.raises(DatabaseUnavailable, match=path.name):
            execute(str(path), "SELECT 1")
    with pytest.raises(DatabaseUnavailable):
        execute("nul\0byte", "SELECT 1")


def test_a_file_corrupted_inside_is_unavailable_not_a_bad_query(tmp_path):
    path = tmp_path / "torn.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE t(x)")
    connection.executemany("INSERT INTO t VALUES (?)", [("y" * 500,)] * 100)
    connection.commit()
    connection.close()
    raw = bytearray(path.read_bytes())
    raw[4096:] = b"\xff" * (len(raw) - 4096)
    path.write_bytes(raw)
    with pytest.raises(DatabaseUnavailable):
        execute(str(path), "SELECT x FROM t")


def test_a_changed_file_is_read_anew(tmp_path):
    path = tmp_path / "changing.sqlite"
    for value in ("one", "another"):
        path.unlink(missing_ok=True)
        connection = sqlite3.connect(path)
        connection.execute("CREATE TABLE t(x)")
        connection.execute("INSERT INTO t VALUES (?)", (value,))
        connection.commit()
        connection.close()
        assert execute(str(path), "SELECT x FROM t").rows == [(value,)]


def test_text_that_is_not_utf8_is_read_and_stays_distinct(tmp_path):
    path = str(tmp_path / "latin.sqlite")
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE t(x)")
    connection.execute("INSERT INTO t SELECT CAST(x'e9' AS TEXT) UNION ALL SELECT CAST(x'e8' AS TEXT)")
    connection.commit()
    connection.close()
    rows = execute(path, "SELECT x FROM t").rows
    assert rows == execute(path, "SELECT x FROM t").rows
    assert len(set(rows)) == 2


def test_a_writer_ahead_log_beside_the_file_is_left_alone(tmp_path):
    path = tmp_path / "wal.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript("PRAGMA journal_mode = WAL; CREATE TABLE t(x); INSERT INTO t VALUES (1);")
    connection.close()
    before = sorted(os.listdir(tmp_path))
    assert execute(str(path), "SELECT x FROM t").rows == [(1,)]
    assert sorted(os.listdir(tmp_path)) == before


def test_connections_are_reused_bounded_and_never_shared_between_threads(database, tmp_path, monkeypatch):
    execute(database, "SELECT 1")
    session = sqlite._THREAD.sessions[database]
    execute(database, "SELECT 2")
    assert sqlite._THREAD.sessions[database] is session

    answers = []
    thread = threading.Thread(target=lambda: answers.append(execute(database, "SELECT 3").rows))
    thread.start()
    thread.join()
    assert answers == [[(3,)]]

    monkeypatch.setattr(sqlite, "OPEN_DATABASES", 2)
    for name in "abc":
        sqlite3.connect(tmp_path / name).executescript("CREATE TABLE t(x)").connection.close()
        execute(str(tmp_path / name), "SELECT 1")
    assert str(tmp_path / "a") not in sqlite._THREAD.sessions


def test_a_forked_child_opens_its_own_connection(database):
    execute(database, "SELECT 1")
    session = sqlite._THREAD.sessions[database]
    child = os.fork()
    if child == 0:
        answered = execute(database, "SELECT 1").rows == [(1,)]
        os._exit(0 if answered and sqlite._THREAD.sessions[database] is not session else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_schema_lists_tables_and_views_with_declared_types(database):
    schema = read_schema(database)
    assert list(schema) == ["singer", "concert", "french"]
    assert schema["singer"] == {"id": "INTEGER", "name": "TEXT", "country": "TEXT", "age": "INTEGER", "weight": "REAL"}


def test_thousands_of_queries_a_second(database):
    started = time.process_time()
    for i in range(1000):
        execute(database, f"SELECT name FROM singer WHERE id = {i}")
    assert 1000 / (time.process_time() - started) > 3000
