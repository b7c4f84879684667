"""What is asked of a restored database to prove that it is right: its own checks, row counts, questions of the user's.

Each function yields checks (``DrillCheck``) and raises nothing of the database's: what it says is the finding.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from backhaul.databases import mariadb, postgresql
from backhaul.databases.mariadb import MariaDBServer
from backhaul.databases.postgresql import PostgreSQLServer
from backhaul.databases.prerequisites import find_program
from backhaul.databases.redis import RedisConnection, RedisError
from backhaul.errors import TargetError
from backhaul.model.drill import DrillCheck
from backhaul.model.manifest import DatabaseRecord, SourceRecord, TableRecord
from backhaul.model.source_url import SourceUrl
from backhaul.processes.run import run_program

# A statement and the value that its first row's first column must have.
Question = tuple[str, str]
_MOST_NAMED = 5


def _check(name: str, good: bool, detail: str) -> DrillCheck:
    return DrillCheck(name=name, state="ok" if good else "failed", detail=detail)


def _skipped(name: str, detail: str) -> DrillCheck:
    return DrillCheck(name=name, state="skipped", detail=detail)


def compare_counts(label: str, expected: Sequence[TableRecord], found: dict[str, int | str]) -> DrillCheck:
    """Compare row counts with those of the push; a text is an error that stood in a count's place."""
    counted = [table for table in expected if table.rows is not None and not table.apart]
    gone = [table.name for table in expected if table.kind == "table" and table.name not in found]
    errors = [f"{table}: {text}" for table, text in found.items() if isinstance(text, str)]
    if gone or errors:
        return _check(f"rows of {label}", False, _listed([f"{name} is missing" for name in gone] + errors))
    wrong = [
        f"{table.name} has {found.get(table.name, 'vanished')}"
        + (f" rows, {table.rows} were backed up" if isinstance(found.get(table.name), int) else "")
        for table in counted
        if found.get(table.name) != table.rows
    ]
    name = f"rows of {label}"
    if not counted:
        total = sum(count for count in found.values() if isinstance(count, int))
        return _skipped(name, f"not counted at the push; now {total} rows in {len(found)} tables, all of them read")
    if wrong:
        return _check(name, False, _listed(wrong))
    total = sum(table.rows or 0 for table in counted)
    others = [table.name for table in expected if table.kind == "table" and table not in counted]
    besides = f" (and {len(others)} not counted at the push: {_listed(others)})" if others else ""
    return _check(name, True, f"{total} rows in {len(counted)} tables, as at the push{besides}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _listed(texts: Sequence[str]) -> str:
    more = len(texts) - _MOST_NAMED
    return "; ".join(texts[:_MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")


# -- PostgreSQL ----------------------------------------------------------------------------------------


def prove_postgresql(
    url: SourceUrl, source: SourceRecord, programs: str, questions: Sequence[Question], database: str | None, jobs: int
) -> Iterator[DrillCheck]:
    """Check the restored databases of a server.

    Args:
        url: the scratch server.
        source: what was backed up.
        programs: where the server's programs are.
        questions: of the user's.
        database: which database is asked them; None for the only one.
        jobs: how many checks at once.
    """
    server = PostgreSQLServer(url)
    present = [name for name, _ in server.databases()]
    wanted = [record.name for record in source.databases]
    gone = [name for name in wanted if name not in present]
    yield _check("databases", not gone, f"missing: {', '.join(gone)}" if gone else ", ".join(wanted))
    names = [name for name in wanted if name in present]
    yield _amcheck(server, programs, names, jobs)
    for record in source.databases:
        if record.name in present:
            yield _postgresql_rows(server, record)
    chosen = database or (names[0] if len(names) == 1 else None)
    for statement, expected in questions:
        yield _ask_postgresql(server, chosen, statement, expected)


def _amcheck(server: PostgreSQLServer, programs: str, names: Sequence[str], jobs: int) -> DrillCheck:
    program = find_program("pg_amcheck", (programs,))
    if program is None:
        return _skipped("pg_amcheck", "it is not here: apt-get install postgresql")
    with server.session() as connection:
        there = connection.execute("select 1 from pg_available_extensions where name = 'amcheck'").fetchone()
    if there is None:
        return _skipped("pg_amcheck", "the server has no extension amcheck: apt-get install postgresql-contrib")
    where = ["-h", str(server.url.host), "-p", str(server.url.port), "-U", server.url.user, "-w"]
    command = [program.path, *where, f"--jobs={jobs}", "--install-missing"]
    command += [f"--database={_pattern(name)}" for name in names]
    try:
        run_program(command, "pg_amcheck", environment=server.environment(), on_error_line=lambda line: None)
    except TargetError as error:
        return _check("pg_amcheck", False, error.why)
    return _check("pg_amcheck", True, f"tables and B-tree indexes of {', '.join(names)}")


def _pattern(name: str) -> str:
    return postgresql.quoted(name)


def _postgresql_rows(server: PostgreSQLServer, record: DatabaseRecord) -> DrillCheck:
    return compare_counts(record.name, record.tables, _postgresql_counts(server, record.name))


def _postgresql_counts(server: PostgreSQLServer, database: str) -> dict[str, int | str]:
    import psycopg

    found: dict[str, int | str] = {}
    with contextlib.closing(server.connect(database)) as connection:
        tables, _ = postgresql.tables_of(connection)
        for table in tables:
            if table.kind not in ("table", "view"):
                continue
            try:
                found[table.name] = postgresql.count_rows(connection, table)
            except psycopg.Error as error:
                found[table.name] = str(error).splitlines()[0]
    return found


def _mariadb_counts(server: MariaDBServer, database: str) -> dict[str, int | str]:
    import pymysql

    found: dict[str, int | str] = {}
    with contextlib.closing(server.connect()) as connection:
        now, _ = mariadb.database_record(connection, database)
        for table in now.tables:
            if table.kind == "table":
                name = f"{mariadb.quoted(database)}.{mariadb.quoted(table.name)}"
                try:
                    found[table.name] = int(mariadb.rows(connection, f"select count(*) from {name}")[0][0])
                except pymysql.Error as error:
                    found[table.name] = mariadb.words(error)
    return found


def count_restored(url: SourceUrl, record: DatabaseRecord) -> tuple[dict[str, int | str], DrillCheck]:
    """Count the rows of a database that one was restored into, and compare them with those of the original.

    Args:
        url: the server, PostgreSQL or MariaDB, and the database there; the original's name if it names none.
        record: the original.

    Returns:
        Rows by table, or a text where they could not be counted; and whether they are those of the original.

    Raises:
        ConfigurationError: the server can't be reached.
    """
    name = url.database or record.name
    if url.kind == "postgresql":
        found = _postgresql_counts(PostgreSQLServer(url), name)
    else:
        found = _mariadb_counts(MariaDBServer(url), name)
    return found, compare_counts(name, record.tables, found)


def _ask_postgresql(server: PostgreSQLServer, database: str | None, statement: str, expected: str) -> DrillCheck:
    import psycopg

    assert database is not None  # seen to before the restore
    try:
        with contextlib.closing(server.connect(database)) as connection:
            row = connection.execute(statement.encode()).fetchone()
    except psycopg.errors.SyntaxErrorOrAccessRuleViolation as error:
        return DrillCheck(name=statement, state="untested", detail=_first_line(error))
    except psycopg.Error as error:
        return _check(statement, False, _first_line(error))
    return _compare(statement, _NO_ROW if row is None else row[0], expected)


_NO_ROW = object()
_TRUE, _FALSE = ("true", "t", "1"), ("false", "f", "0")


def _compare(statement: str, value: object, expected: str) -> DrillCheck:
    """Compare an answer with what is expected: NULL by that name, true and false as any server writes them."""
    found = "no row" if value is _NO_ROW else "NULL" if value is None else str(value)
    good = value is not _NO_ROW and found == expected
    if isinstance(value, bool):
        good = expected.lower() in (_TRUE if value else _FALSE)
    elif found in ("0", "1"):
        good = good or expected.lower() in (_TRUE if found == "1" else _FALSE)
    return _check(statement, good, f"{found!r}" if good else f"{found!r}, expected {expected!r}")


# -- MariaDB -------------------------------------------------------------------------------------------


def prove_mariadb(
    url: SourceUrl, source: SourceRecord, questions: Sequence[Question], database: str | None
) -> Iterator[DrillCheck]:
    """Check the restored databases of a server; see ``prove_postgresql``."""
    import pymysql

    server = MariaDBServer(url)
    present = server.databases()
    gone = [record.name for record in source.databases if record.name not in present]
    names = [record.name for record in source.databases if record.name in present]
    yield _check("databases", not gone, f"missing: {', '.join(gone)}" if gone else ", ".join(names) or "none")
    with contextlib.closing(server.connect()) as connection:
        for record in source.databases:
            if record.name not in present:
                continue
            bad: list[str] = []
            found: dict[str, int | str] = {}
            now, _ = mariadb.database_record(connection, record.name)
            for table in now.tables:
                name = f"{mariadb.quoted(record.name)}.{mariadb.quoted(table.name)}"
                try:
                    verdicts = mariadb.rows(connection, f"check table {name}")
                    # (A note says that an engine has no such check: sequences, CSV, federated tables.)
                    bad += [f"{table.name}: {text}" for _, _, kind, text in verdicts if kind.lower() == "error"]
                    bad += [
                        f"{table.name}: {text}"
                        for _, _, kind, text in verdicts[-1:]
                        if kind.lower() == "status" and text not in ("OK", "Table is already up to date")
                    ]
                    if table.kind == "table":
                        found[table.name] = int(mariadb.rows(connection, f"select count(*) from {name}")[0][0])
                except pymysql.Error as error:
                    found[table.name] = mariadb.words(error)
            checked = f"{len(now.tables)} tables of {record.name}"
            yield _check(f"CHECK TABLE in {record.name}", not bad, _listed(bad) if bad else checked)
            yield compare_counts(record.name, record.tables, found)
        chosen = database or (names[0] if len(names) == 1 else None)
        for statement, expected in questions:
            try:
                if chosen is not None:
                    connection.select_db(chosen)
                answer = mariadb.rows(connection, statement)
            except pymysql.ProgrammingError as error:
                yield DrillCheck(name=statement, state="untested", detail=mariadb.words(error))
            except pymysql.Error as error:
                yield _check(statement, False, mariadb.words(error))
            else:
                yield _compare(statement, answer[0][0] if answer else _NO_ROW, expected)


# -- the others ----------------------------------------------------------------------------------------


def prove_sqlite(path: str, source: SourceRecord, questions: Sequence[Question]) -> Iterator[DrillCheck]:
    """Check a restored SQLite database."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        try:
            verdict = [str(row[0]) for row in connection.execute("pragma integrity_check")]
            yield _check("integrity_check", verdict == ["ok"], _listed(verdict))
            found: dict[str, int | str] = {}
            for (name,) in connection.execute("select name from sqlite_master where type = 'table'").fetchall():
                try:
                    quoted = '"' + name.replace('"', '""') + '"'
                    found[name] = int(connection.execute(f"select count(*) from {quoted}").fetchone()[0])
                except sqlite3.Error as error:
                    found[name] = str(error)
            yield compare_counts(source.databases[0].name, source.databases[0].tables, found)
        except sqlite3.Error as error:
            yield _check("integrity_check", False, str(error))
            return
        for statement, expected in questions:
            try:
                row = connection.execute(statement).fetchone()
            except sqlite3.Error as error:
                yield DrillCheck(name=statement, state="untested", detail=str(error))
            else:
                yield _compare(statement, _NO_ROW if row is None else row[0], expected)


def prove_redis(url: SourceUrl, source: SourceRecord, questions: Sequence[Question]) -> Iterator[DrillCheck]:
    """Check a restored Redis server; a question is a command, in words."""
    connection = RedisConnection(url)
    try:
        keyspace = connection.information("keyspace")
        text = ", ".join(f"{name} {counts}" for name, counts in keyspace.items()) or "no keys"
        expected_keys = sum(table.rows or 0 for record in source.databases for table in record.tables)
        # (Counted a moment before the dump: keys come and go, but not all of them.)
        yield _check("loads", bool(keyspace) or not expected_keys, f"{text}; {expected_keys} keys at the push")
        for statement, expected in questions:
            try:
                answer = connection.ask(*statement.split())
            except RedisError as error:
                yield _check(statement, False, str(error))
            else:
                yield _compare(statement, answer, expected)
    finally:
        connection.close()


def prove_directory(path: Path, source: SourceRecord) -> Iterator[DrillCheck]:
    """Compare the number of names with that of the push."""
    expected = source.coordinates.get("names")
    found = 1 + sum(len(directories) + len(files) for _, directories, files in os.walk(path))
    if expected is None:
        yield _skipped("names", f"not counted at the push; now {found}")
    else:
        yield _check("names", str(found) == expected, f"{found}, and {expected} at the push")


def is_database_error(error: BaseException) -> bool:
    """Tell whether it is what a database says, and not a fault of ours."""
    import psycopg
    import pymysql

    return isinstance(error, psycopg.Error | pymysql.Error | sqlite3.Error)
