"""Run one untrusted SELECT against a SQLite file, without letting it change, read or block anything else.

Covered: the file is opened read-only and immutable (no lock, no journal, no -shm is ever written next to it); an
authorizer allows reads of the file's own tables and a list of deterministic functions and nothing else (no DDL, DML,
PRAGMA, ATTACH, VACUUM, transaction, extension, temp object); EXPLAIN and reads of `sqlite_*` / `pragma_*` tables are
refused too, because they answer from the file's layout and not from its data; whatever depends on the moment or the
machine (`random()`, `current_timestamp`, 'now', 'localtime') is refused, so that a result can be cached and repeated.
Work is bounded by virtual machine steps first, so that the same query always ends the same way on any machine, and by
the wall clock only as the outer limit. Rows, bytes, one value, the text of the query and SQLite's own heap are capped.

Not covered: one opcode, or the preparation of a statement before SQLite 3.41, is never interrupted from in here, and
the Python process has no limit of its own. Those are the job of the process around it (core/worker.py: resource limits
and a hard kill). The file itself is trusted. Rows in a hot -wal file next to the database are not seen (immutable).
"""

import os
import re
import sqlite3
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from urllib.parse import quote

STEPS_PER_TICK = 1000  # virtual machine steps between two looks at the budget; no measurable cost
OPEN_DATABASES = 64  # persistent connections per thread; the least recently used is closed
HEAP_BYTES = 256 * 2**20  # SQLite's own heap, all connections of the process together; bounds sorts and preparation


@dataclass(frozen=True, slots=True)
class Limits:
    """Budget of one query. steps: virtual machine instructions (about 50-100 million a second); seconds: wall clock."""

    steps: int = 50_000_000
    seconds: float = 3.0
    rows: int = 100_000
    bytes: int = 32 * 2**20  # text and blobs of all returned rows
    value_bytes: int = 2**18  # one text, blob or stored row; instr() of two such values takes about 0.3 s, quadratic
    sql_bytes: int = 20_000


@dataclass(frozen=True, slots=True)
class Result:
    """Rows in the order SQLite gave them (None, int, float, str, bytes) and the names of the columns."""

    rows: list[tuple]
    columns: list[str]


class QueryError(Exception):
    """The query is at fault. reason: one of the codes below; by_clock: it ended on the wall clock, or on
    the heap that all queries of the process share, and not on its own budget: another time it might run.

    empty, several_statements, syntax_error, unknown_name, refused, timeout_in_query, too_many_rows, too_big,
    runtime_error.
    """

    def __init__(self, reason: str, detail: str = "", by_clock: bool = False):
        super().__init__(reason, detail)
        self.reason, self.detail, self.by_clock = reason, detail, by_clock

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class DatabaseUnavailable(Exception):
    """The file is missing, unreadable, locked or corrupt; no query is at fault."""


def execute(database: str, sql: str, limits: Limits = Limits()) -> Result:
    """Run one SELECT, WITH or VALUES statement on the SQLite file at `database`.

    Raises QueryError for anything the query did wrong and DatabaseUnavailable where no query could have run.
    """
    _refuse_early(sql)
    session = _session(database)
    try:
        return session.run(sql, limits)
    except MemoryError:
        _close(database)
        raise QueryError("too_big", "SQLite ran out of its heap", by_clock=True) from None


def read_schema(database: str) -> dict[str, dict[str, str]]:
    """Tables and views of the file with their columns and declared types, names as written: {table: {column: type}}."""
    connection = _connect(database)
    try:
        names = [
            name
            for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")
            if not name.lower().startswith("sqlite_")
        ]
        columns = "SELECT name, type FROM pragma_table_info(?)"
        return {name: dict(connection.execute(columns, (name,))) for name in names}
    except sqlite3.Error as error:
        raise DatabaseUnavailable(f"{database}: {error}") from error
    finally:
        connection.close()


def file_stamp(database: str) -> tuple:
    """(path, mtime and ctime in ns, size, inode): equal stamps mean an unchanged file. Raises DatabaseUnavailable."""
    try:
        stat = os.stat(database)
    except (OSError, ValueError) as error:
        raise DatabaseUnavailable(f"{database}: {error}") from error
    return database, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino


# --- what a statement may be ------------------------------------------------------------------------------------------

BLANK_OR_COMMENT = re.compile(r"(?:\s+|--[^\n]*(?:\n|\Z)|/\*.*?(?:\*/|\Z))*", re.DOTALL)
_STATEMENTS = """explain pragma insert replace update delete create drop alter attach detach vacuum reindex analyze
begin commit end rollback savepoint release"""
OTHER_STATEMENTS = frozenset(_STATEMENTS.split())


def _refuse_early(sql: str) -> None:
    """What needs no database: nothing to run, a NUL byte, text SQLite cannot hold, a statement that is no query."""
    if "\0" in sql:
        raise QueryError("refused", "NUL byte in the query")
    if not sql.isascii():
        try:
            sql.encode()
        except UnicodeEncodeError as error:
            raise QueryError("syntax_error", "the query is not valid Unicode") from error
    start = BLANK_OR_COMMENT.match(sql).end()
    first = re.match(r"\w+", sql[start : start + 20])
    if sql[start:].strip("; \t\r\n") == "":
        raise QueryError("empty", "no statement")
    word = first.group().lower() if first else sql[start]
    if word in OTHER_STATEMENTS:
        raise QueryError("refused", f"{word.upper()} is not a query")
    if word not in ("select", "with", "values"):
        raise QueryError("syntax_error", "the statement starts with none of SELECT, WITH, VALUES")


ALLOWED_ACTIONS = frozenset((sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE))
_FUNCTIONS = """
abs char coalesce concat concat_ws glob hex if ifnull iif instr length like likelihood likely lower ltrim max min nullif
octet_length quote replace round rtrim sign soundex substr substring trim typeof unhex unicode unlikely upper zeroblob
avg count group_concat string_agg sum total median percentile percentile_cont percentile_disc
row_number rank dense_rank percent_rank cume_dist ntile lag lead first_value last_value nth_value
acos acosh asin asinh atan atan2 atanh ceil ceiling cos cosh degrees exp floor ln log log10 log2 mod pi pow power
radians sin sinh sqrt tan tanh trunc
json json_array json_array_length json_extract json_group_array json_group_object json_object json_quote json_type
json_valid -> ->>
date time datetime julianday unixepoch strftime timediff printf format"""
ALLOWED_FUNCTIONS = frozenset(_FUNCTIONS.split())
TIME_ARGUMENT_AT = {"date": 0, "time": 0, "datetime": 0, "julianday": 0, "unixepoch": 0, "strftime": 1}
UNSTABLE_TIMES = frozenset(("now", "subsec", "subsecond", "localtime", "utc"))
WIDE_FIELD = re.compile(r"%[^a-zA-Z%]*(?:\*|\d{4})")


def _plain(value: object = "") -> str:
    """An argument as SQLite's C string functions read it: bytes as text, up to the first NUL, lower-cased."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return text.split("\0", 1)[0].lower()


# --- connections ------------------------------------------------------------------------------------------------------

UNAVAILABLE_CODES = frozenset(
    (
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_PROTOCOL,
    )
)
_THREAD = threading.local()  # .pid, .sessions: connections must not cross a fork or a thread


def _connect(database: str) -> sqlite3.Connection:
    file_stamp(database)  # a missing file gets its own words
    try:
        uri = f"file:{quote(os.path.abspath(database))}?mode=ro&immutable=1"
        return sqlite3.connect(uri, uri=True, isolation_level=None)
    except sqlite3.Error as error:
        raise DatabaseUnavailable(f"{database}: {error}") from error


def _session(database: str) -> "_Session":
    """The persistent connection for this file, reopened when the file changed; per thread and process."""
    if getattr(_THREAD, "pid", None) != os.getpid():
        _THREAD.pid, _THREAD.sessions = os.getpid(), OrderedDict()
    sessions, stamp = _THREAD.sessions, file_stamp(database)
    session = sessions.get(database)
    if session is None or session.stamp != stamp:
        _close(database)
        session = sessions[database] = _Session(database, stamp)
        while len(sessions) > OPEN_DATABASES:
            sessions.popitem(last=False)[1].connection.close()
    sessions.move_to_end(database)
    return session


def _close(database: str) -> None:
    session = _THREAD.sessions.pop(database, None)
    if session is not None:
        session.connection.close()


class _Session:
    """One locked-down connection, the budget of the query it is running and the reason it last refused something."""

    def __init__(self, database: str, stamp: tuple):
        self.database, self.stamp = database, stamp
        self.refused = ""
        self.ticks_left, self.deadline, self.by_clock = 0, 0.0, False
        self.connection = connection = _connect(database)
        try:
            for pragma in ("query_only=1", "temp_store=2", "trusted_schema=0", "mmap_size=0", "cache_size=-1024"):
                connection.execute(f"PRAGMA {pragma}")
            connection.execute(f"PRAGMA hard_heap_limit={HEAP_BYTES}")
            connection.execute("SELECT 1 FROM sqlite_master").fetchone()  # reads the header: corrupt files fail here
        except sqlite3.Error as error:
            connection.close()
            raise DatabaseUnavailable(f"{database}: {error}") from error
        for category, bound in (
            (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
            (sqlite3.SQLITE_LIMIT_WORKER_THREADS, 0),
            (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 200),
            (sqlite3.SQLITE_LIMIT_COMPOUND_SELECT, 50),
            (sqlite3.SQLITE_LIMIT_VDBE_OP, 100_000),
            (sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 1000),
        ):
            connection.setlimit(category, bound)
        self._replace_functions()
        connection.set_authorizer(self._authorize)
        connection.set_progress_handler(self._tick, STEPS_PER_TICK)

    def run(self, sql: str, limits: Limits) -> Result:
        connection = self.connection
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, limits.value_bytes)
        connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, limits.sql_bytes)
        self.refused, self.by_clock = "", False
        self.ticks_left, self.deadline = limits.steps // STEPS_PER_TICK, time.monotonic() + limits.seconds
        cursor = connection.cursor()
        try:
            return self._read(cursor, sql, limits)
        except sqlite3.OperationalError as error:
            if not str(error).startswith("Could not decode to UTF-8"):
                raise self._explain(error, limits) from error
            # Real files hold text that is not UTF-8 (Spider's wta_1). Bytes stay distinct; only such files pay for it.
            connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
            cursor.close()
            return self.run(sql, limits)
        except (sqlite3.Error, sqlite3.Warning) as error:
            raise self._explain(error, limits) from error
        finally:
            cursor.close()

    def _read(self, cursor: sqlite3.Cursor, sql: str, limits: Limits) -> Result:
        cursor.execute(sql)
        rows, size = [], 0
        for row in cursor:
            for value in row:
                if type(value) is str or type(value) is bytes:
                    size += len(value)
            rows.append(row)
            if len(rows) > limits.rows:
                raise QueryError("too_many_rows", f"more than {limits.rows} rows")
            if size > limits.bytes:
                raise QueryError("too_big", f"more than {limits.bytes} bytes of result")
        return Result(rows, [column[0] for column in cursor.description])

    def _tick(self) -> bool:
        self.ticks_left -= 1
        self.by_clock = time.monotonic() > self.deadline
        return self.ticks_left < 0 or self.by_clock

    def _authorize(self, action: int, first: str | None, second: str | None, *_: str | None) -> int:
        if action in ALLOWED_ACTIONS:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_READ:
            if not first.lower().startswith(("sqlite_", "pragma_")):
                return sqlite3.SQLITE_OK
            self.refused = f"reads {first}"
        elif action == sqlite3.SQLITE_FUNCTION:
            if second.lower() in ALLOWED_FUNCTIONS:
                return sqlite3.SQLITE_OK
            self.refused = f"calls {second}()"
        else:
            self.refused = "does more than read stored tables"
        return sqlite3.SQLITE_DENY

    def _replace_functions(self) -> None:
        """Put a check in front of the functions whose arguments decide whether they are stable or endless."""
        plain = sqlite3.connect(":memory:")

        def checked(name: str, refusal):
            def call(*arguments):
                self.refused = self.refused or refusal(arguments)
                if self.refused:
                    raise ValueError(self.refused)
                marks = ",".join("?" * len(arguments))
                return plain.execute(f"SELECT {name}({marks})", arguments).fetchone()[0]

            self.connection.create_function(name, -1, call, deterministic=True)

        def unstable(at: int):
            def refusal(arguments: tuple) -> str:
                times = {_plain(argument) for argument in arguments[at:] if argument is not None}
                now = len(arguments) <= at or UNSTABLE_TIMES & times
                return "uses the current time or the time zone" if now else ""

            return refusal

        def wide(arguments: tuple) -> str:
            return "asks for a field over 999 wide" if WIDE_FIELD.search(_plain(*arguments[:1])) else ""

        for name, at in TIME_ARGUMENT_AT.items():
            checked(name, unstable(at))
        for name in ("printf", "format"):
            checked(name, wide)

    def _explain(self, error: sqlite3.Error, limits: Limits) -> Exception:
        """The error to raise instead of SQLite's own."""
        message, code = str(error), getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code in UNAVAILABLE_CODES:
            return DatabaseUnavailable(f"{self.database}: {message}")
        if self.refused:
            return QueryError("refused", f"the query {self.refused}")
        if code == sqlite3.SQLITE_INTERRUPT:
            limit = f"{limits.seconds} s" if self.by_clock else f"{limits.steps} steps"
            return QueryError("timeout_in_query", f"stopped after {limit}", by_clock=self.by_clock)
        if "one statement at a time" in message:
            return QueryError("several_statements", message)
        for pattern, reason in MESSAGES:
            if pattern.search(message):
                return QueryError(reason, message)
        return QueryError("too_big" if code == sqlite3.SQLITE_TOOBIG else "runtime_error", message)


MESSAGES = tuple(
    (re.compile(pattern, re.IGNORECASE), reason)
    for pattern, reason in (
        (r"no such (column|table|function|collation|window)|ambiguous column", "unknown_name"),
        (r"not authorized|prohibited", "refused"),
        (r"syntax error|unrecognized token|incomplete input", "syntax_error"),
        (r"too (many|large|big)|at most|stack overflow|LIKE or GLOB pattern", "too_big"),
    )
)
