"""doctor for sources: would a backup of this database work, and what is missing; each ✗ with what mends it."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from backhaul.databases.prerequisites import PACKAGES, Missing, Prerequisites, find_program
from backhaul.errors import BackhaulError
from backhaul.formats.quantities import format_duration, format_size
from backhaul.formats.source_url import parse_source_url
from backhaul.model.results import Diagnosis, SourceDoctorResult
from backhaul.model.source_url import SourceUrl

# Seconds by which a server's clock may differ from ours before times in records and logs mislead.
_CLOCK_TOLERANCE = 5.0
_LONG_STATEMENT = 30
_WRITE_TIMEOUT = 1200


def doctor_source(text: str, *, on_finding: Callable[[Diagnosis], None] = lambda diagnosis: None) -> SourceDoctorResult:
    """Look at a source: connection, programs, versions, privileges, settings, room, clock. Nothing is changed.

    Args:
        text: the URL.
        on_finding: told each diagnosis as it is made.

    Raises:
        UsageError: it is no URL of a source.
        ConfigurationError: the server can't be reached at all.
    """
    clock = time.monotonic()
    url = parse_source_url(text)
    examination = _Examination(url, on_finding)
    kind = url.kind.partition("+")[0]
    look = {
        "postgresql": examination.postgresql,
        "mariadb": examination.mariadb,
        "redis": examination.redis,
        "sqlite": examination.sqlite,
        "dir": examination.directory,
        "file": examination.file,
    }[kind]
    look()
    return SourceDoctorResult(source=url.text, diagnoses=tuple(examination.diagnoses), seconds=time.monotonic() - clock)


class _Examination:
    def __init__(self, url: SourceUrl, on_finding: Callable[[Diagnosis], None]) -> None:
        self.diagnoses: list[Diagnosis] = []
        self._url = url
        self._on_finding = on_finding

    @property
    def _physical(self) -> bool:
        return self._url.kind.endswith("+physical")

    # -- what is found ---------------------------------------------------------------------------------

    def _say(self, name: str, state: str, detail: str, cost: str = "", todo: str = "") -> None:
        diagnosis = Diagnosis(name=name, state=state, detail=detail, cost=cost, todo=todo)
        self.diagnoses.append(diagnosis)
        self._on_finding(diagnosis)

    def _ok(self, name: str, detail: str) -> None:
        self._say(name, "ok", detail)

    def _note(self, name: str, detail: str, cost: str, todo: str = "") -> None:
        self._say(name, "note", detail, cost, todo)

    def _take(self, name: str, missing: Prerequisites, good: str, *, needed: bool = True, cost: str = "") -> None:
        """Say what a look at prerequisites has found: problems where they are needed, notes elsewhere."""
        for each in missing.missing:
            self._missing(each, needed=needed, cost=cost)
        if not missing.missing:
            self._ok(name, good)

    def _missing(self, each: Missing, *, needed: bool, cost: str) -> None:
        self._say(each.what, "problem" if needed else "note", each.why, cost, each.todo)

    def _program(self, name: str, *, needed: bool, cost: str = "") -> None:
        found = find_program(name)
        if found is None:
            state = "problem" if needed else "note"
            self._say(name, state, "it is not installed", cost, f"apt-get install {PACKAGES.get(name, name)}")
        else:
            self._ok(name, f"{found.version}, {found.path}" if found.version != "0" else found.path)

    def _clock(self, theirs: float) -> None:
        difference = abs(theirs - time.time())
        if difference <= _CLOCK_TOLERANCE:
            self._ok("clock", f"within {difference:.1f} s of the server's")
        else:
            self._say(
                "clock",
                "problem",
                f"the server's differs by {format_duration(difference)}",
                "times in records and logs don't fit each other",
                "timedatectl set-ntp true",
            )

    def _secret_file(self, path: str, what: str) -> None:
        """Look at who may read a file of passwords."""
        try:
            status = Path(path).expanduser().stat()
        except OSError:
            return
        mode = stat.S_IMODE(status.st_mode)
        if mode & 0o077:
            self._say(
                what, "problem", f"others may read {path} (mode {mode:o})", "it holds passwords", f"chmod 600 {path}"
            )
        else:
            self._ok(what, f"{path} is private")

    def _room(self, size: int) -> None:
        where = tempfile.gettempdir()
        free = shutil.disk_usage(where).free
        if free < size * 1.2:
            self._note(
                "room for a drill",
                f"{format_size(free)} free in {where}, and the source has {format_size(size)}",
                "backups need no room here; a drill does",
                "drill with --scratch DIR",
            )
        else:
            self._ok("room for a drill", f"{format_size(free)} free in {where}")

    # -- kinds -----------------------------------------------------------------------------------------

    def postgresql(self) -> None:
        """Look at a PostgreSQL server."""
        from backhaul.databases import postgresql
        from backhaul.sources.postgresql import PostgreSQLSource
        from backhaul.sources.postgresql_physical import check_physical

        server = postgresql.PostgreSQLServer(self._url)
        facts = server.facts()
        role = "superuser" if facts.superuser else "no superuser"
        self._ok("connection", f"PostgreSQL {facts.version} at {server.address} as {facts.user} ({role})")
        self._secret_file(os.environ.get("PGPASSFILE", "~/.pgpass"), "password file")
        databases = server.databases()
        size = sum(size for name, size in databases if self._url.database in ("", name))
        asked = [name for name, _ in databases if self._url.database in ("", name)]
        self._ok("size", f"{format_size(size)} in {', '.join(asked[:5]) or 'nothing'}{' and more' * (len(asked) > 5)}")
        if self._physical:
            missing = Prerequisites("a backup")
            program = server.client("pg_basebackup", facts.major, missing)
            check_physical(server, facts, missing)
            self._take("physical backups", missing, f"{program.path} {program.version}" if program else "")
        else:
            source = PostgreSQLSource(self._url, streams=2)
            missing = Prerequisites("a backup")
            source.gather(missing)
            self._take("logical backups", missing, "programs fit the server, and every table may be read")
            lacking = Prerequisites("a physical backup")
            check_physical(server, facts, lacking)
            cost = "only postgresql+physical:// needs it"
            self._take("physical backups", lacking, "possible too", needed=False, cost=cost)
        if not self._physical:
            restoring = Prerequisites("a restore")
            program = server.client("pg_restore", facts.major, restoring)
            self._take("restores", restoring, f"{program.path} {program.version}" if program else "")
        here = [p.version for p in postgresql.installed("postgres") if p.major >= facts.major]
        if here:
            self._ok("drills", f"a server of {here[0]} is on this host")
        else:
            self._note(
                "drills",
                f"no PostgreSQL server of version {facts.major} is on this host",
                "drill can't prove the backups here",
                f"apt-get install postgresql-{facts.major}",
            )
        if not facts.superuser and not self._physical:
            self._note("roles", f"{facts.user} is no superuser", "the passwords of roles are not in the backups", "")
        if facts.settings.get("data_checksums") == "off":
            self._note(
                "data checksums",
                "they are off",
                "damage on the server's disk gets into backups unnoticed",
                "pg_checksums --enable  (with the server stopped)",
            )
        with server.session() as connection:
            self._clock(float(postgresql.one_value(connection, "select extract(epoch from clock_timestamp())::text")))
        self._room(size)

    def mariadb(self) -> None:
        """Look at a MariaDB server."""
        from backhaul.databases import mariadb
        from backhaul.sources.mariadb import check_logical, dump_program
        from backhaul.sources.mariadb_physical import check_physical, check_program_version

        server = mariadb.MariaDBServer(self._url)
        facts = server.facts()
        self._ok("connection", f"{facts.version} at {server.address} as {facts.user}")
        self._secret_file("~/.my.cnf", "option file")
        names = server.databases()
        wanted = [name for name in names if self._url.database in ("", name)]
        if self._url.database and not wanted:
            self._say(
                "database", "problem", f"there is no {self._url.database!r}", "", f"There are: {', '.join(names)}"
            )
        with server.session() as connection:
            records = [mariadb.database_record(connection, name)[0] for name in wanted]
            now = mariadb.rows(connection, "select unix_timestamp(now(6))")[0][0]
            slow = mariadb.rows(
                connection,
                "select id, time, left(info, 60) from information_schema.processlist "
                "where command = 'Query' and time > %s",
                (_LONG_STATEMENT,),
            )
        size = sum(record.size for record in records)
        self._ok(
            "size", f"{format_size(size)} in {', '.join(wanted[:5]) or 'nothing'}{' and more' * (len(wanted) > 5)}"
        )
        logical, physical = Prerequisites("a backup"), Prerequisites("a backup")
        dump_program(logical)
        check_logical(server, facts, wanted, logical, everything=not self._url.database)
        backup = physical.program("mariadb-backup")
        check_physical(server, facts, physical)
        if backup is not None:
            check_program_version(backup, facts, physical)
        self._take("logical backups", logical, "programs and privileges are there", needed=not self._physical)
        cost = "" if self._physical else "only mariadb+physical:// needs it"
        self._take("physical backups", physical, "possible", needed=self._physical, cost=cost)
        self._program("mbstream" if self._physical else "mariadb", needed=True, cost="restores need it")
        apart = [f"{r.name}.{t.name}" for r in records for t in r.tables if t.apart]
        if apart and not self._physical:
            self._note(
                "tables without transactions",
                f"{len(apart)}: {', '.join(apart[:3])}",
                "they are read apart from the state of the others",
                f"ALTER TABLE {apart[0]} ENGINE=InnoDB",
            )
        if facts.binlog:
            self._ok("binary log", "on: backups have coordinates")
        else:
            self._note(
                "binary log",
                "off",
                "no coordinates to replicate or replay from",
                "log_bin in [mysqld], and restart the server",
            )
        timeout = facts.variables.get("net_write_timeout", "60")
        if not self._physical and int(timeout) < _WRITE_TIMEOUT:
            self._note(
                "net_write_timeout",
                f"{timeout} s",
                "a store that takes nothing for so long costs the backup, however long --retry-for is",
                f"mariadb -e 'SET GLOBAL net_write_timeout = {_WRITE_TIMEOUT}'  (or --spool DIR)",
            )
        if slow and not self._physical:
            number, seconds, statement = slow[0]
            self._note(
                "long statements",
                f"{len(slow)} run for more than {_LONG_STATEMENT} s, one for {seconds} s: {statement}",
                "the moment of a global read lock waits for them, and all writers behind it",
                f"KILL {number}  (if it may go)",
            )
        self._program("mariadbd", needed=False, cost="drill can't prove the backups here")
        self._clock(float(now))
        self._room(size)

    def redis(self) -> None:
        """Look at a Redis server."""
        from backhaul.databases.redis import DumpChecker, RedisConnection, RedisError
        from backhaul.sources.redis import key_counts

        connection = RedisConnection(self._url)
        try:
            information = connection.information("server")
            self._ok("connection", f"Redis {information.get('redis_version')} at {connection.address}")
            counts = key_counts(connection)
            self._ok("keys", ", ".join(f"{name} {count}" for name, count in counts.items()) or "none")
            seconds, micro = [*connection.ask_many("TIME"), "0", "0"][:2]
            self._clock(int(seconds) + int(micro) / 1e6)
            try:
                checksum = connection.ask_many("CONFIG", "GET", "rdbchecksum")
            except RedisError as error:
                self._note("dump checksums", str(error), "not known whether dumps have one")
            else:
                if "no" in checksum:
                    self._note(
                        "dump checksums",
                        "rdbchecksum is off",
                        "damage within the server is not noticed",
                        "redis-cli config set rdbchecksum yes",
                    )
                else:
                    self._ok("dump checksums", "on")
        finally:
            connection.close()
        try:
            DumpChecker()
        except BackhaulError as error:
            self._say("checksum library", "problem", error.why, "dumps can't be checked", error.todo)
        self._program("redis-server", needed=False, cost="drill can't prove the backups here")

    def sqlite(self) -> None:
        """Look at a SQLite database."""
        import sqlite3

        from backhaul.sources.sqlite import check_file

        missing = Prerequisites("a backup")
        check_file(self._url.path, self._url.options.get("stage") or tempfile.gettempdir(), missing)
        self._take("file", missing, self._url.path)
        if missing.missing:
            return
        connection = sqlite3.connect(f"file:{self._url.path}?mode=ro", uri=True)
        try:
            mode = connection.execute("pragma journal_mode").fetchone()[0]
        except sqlite3.Error as error:
            self._say("database", "problem", str(error), "", "sqlite3 FILE 'pragma integrity_check'")
            return
        finally:
            connection.close()
        if mode == "wal":
            self._ok("journal", "WAL: nobody waits for a backup")
        else:
            self._note("journal", mode, "writers wait while a backup copies", "pragma journal_mode = wal")

    def directory(self) -> None:
        """Look at a directory."""
        self.file()
        self._program("tar", needed=True)

    def file(self) -> None:
        """Look at a path."""
        path = self._url.path
        try:
            os.listdir(path) if self._url.kind == "dir" else os.close(os.open(path, os.O_RDONLY))
        except OSError as error:
            self._say("path", "problem", error.strerror or str(error), "", "Check the path and its permissions.")
        else:
            changed = dt.datetime.fromtimestamp(Path(path).stat().st_mtime, dt.UTC)
            self._ok("path", f"{path}, last changed {changed.isoformat(timespec='seconds')}")
