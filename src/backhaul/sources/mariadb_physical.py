"""MariaDB as a source, physically: all of a server's files by one ``mariadb-backup``, on the server's own host.

It says ``completed OK!`` last, and leaves a record with the LSNs and the place in the binary log, in a directory beside
the stream (``--extra-lsndir``): without both it is no backup, whatever its exit status.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from backhaul.databases import mariadb as questions
from backhaul.databases.mariadb import MariaDBFacts, MariaDBServer
from backhaul.databases.prerequisites import Prerequisites, Program
from backhaul.databases.temporary import OwnDirectory
from backhaul.errors import SourceError
from backhaul.model.manifest import WHOLE, DatabaseRecord, SourceRecord, StreamPart
from backhaul.model.source_url import SourceUrl
from backhaul.pipeline.supervisor import Supervisor
from backhaul.sources.base import NamedStream, utc
from backhaul.sources.command import CommandSource

_COMPLETED = b"completed OK!"
# The record that mariadb-backup leaves; its name changed in 11.1.
_INFO_FILES = ("xtrabackup_info", "mariadb_backup_info")
_INFO_LINE = re.compile(r"^(\w+) = (.*)$", re.MULTILINE)
_BINLOG = re.compile(r"filename '([^']*)', position '(\d+)'(?:, GTID of the last change '([^']*)')?")
_BACKUP_NEWS = re.compile(rb"\b(error|failed|fatal|warning|cannot|can't)\b", re.IGNORECASE)
_FILE_BEGUN = re.compile(rb"Streaming (\S+)")


class MariaDBPhysicalSource:
    """All of a server's files, by ``mariadb-backup``. See ``SourceSet``."""

    parallel = 1

    def __init__(
        self,
        url: SourceUrl,
        *,
        threads: int,
        on_error_line: Callable[[bytes], None] | None = None,
        on_table: Callable[[str], None] = lambda name: None,
        now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
    ) -> None:
        self.name = url.text
        self.total_tables = 0
        self._threads = threads
        self._on_error_line = on_error_line
        self._on_table = on_table
        self._now = now
        self._server = MariaDBServer(url)
        self._facts: MariaDBFacts | None = None
        self._program: Program | None = None
        self._directory: str | None = None
        self._own: OwnDirectory | None = None
        self._databases: list[DatabaseRecord] = []
        self._last = b""
        self._started = 0.0
        self._state_of = ""

    def check(self) -> None:
        """See ``SourceSet.check``."""
        self._facts = facts = self._server.facts()
        missing = Prerequisites(f"A physical backup of {self.name}")
        self._program = missing.program("mariadb-backup")
        check_physical(self._server, facts, missing)
        if self._program is not None:
            check_program_version(self._program, facts, missing)
        missing.require()

    def open(self, group: Supervisor) -> Sequence[NamedStream]:
        """See ``SourceSet.open``."""
        assert self._program is not None
        self._started = time.monotonic()
        self._state_of = utc(self._now())
        with self._server.session() as connection:
            self._databases = [questions.database_record(connection, name)[0] for name in self._server.databases()]
        with self._server.session() as connection:
            replica = bool(questions.rows(connection, "show slave status"))
        # (For the tool's own record, a few kB.)
        self._own = OwnDirectory("backhaul-mariadb-")
        self._directory = str(self._own.path / "record")
        Path(self._directory).mkdir()
        command = [
            self._program.path,
            *self._server.options(),
            "--backup",
            "--stream=mbstream",
            f"--parallel={self._threads}",
            f"--target-dir={self._directory}",
            f"--extra-lsndir={self._directory}",
            *(["--slave-info"] if replica else []),
        ]
        source = CommandSource(
            command,
            self._on_error_line,
            name=f"mariadb-backup of {self.name}",
            is_chatter=self._listen,
            environment=self._server.environment(),
            check_end=self._check_end,
        )
        return (NamedStream(name="base", source=source, part=StreamPart(section=WHOLE)),)

    def _listen(self, line: bytes) -> bool:
        if line.strip():
            self._last = line
        begun = _FILE_BEGUN.search(line)
        if begun is not None:
            self._on_table(begun[1].decode(errors="replace"))
        return begun is not None or not _BACKUP_NEWS.search(line)

    def _check_end(self, _tail: str) -> None:
        why = ""
        if _COMPLETED not in self._last:
            why = f"its last line is not {_COMPLETED.decode()!r} but {self._last.decode(errors='replace')!r}"
        elif self._info() is None:
            why = "it left no record of the backup (xtrabackup_info)"
        if why:
            raise SourceError(
                f"The backup is not whole: {self.name}", why, "Nothing was committed. Run it by hand to see why."
            )

    def _info(self) -> str | None:
        assert self._directory is not None
        for name in _INFO_FILES:
            with contextlib.suppress(OSError):
                text = Path(self._directory, name).read_text(encoding="utf-8", errors="replace")
                if "innodb_to_lsn" in text:
                    return text
        return None

    def outline(self) -> SourceRecord | None:
        """See ``SourceSet.outline``."""
        assert self._facts is not None and self._program is not None
        return SourceRecord(
            kind="mariadb+physical",
            server=self._facts.version,
            address=self._server.address,
            state_of=self._state_of,
            tools={"mariadb-backup": self._program.version},
            cluster=True,
        )

    def finish(self) -> SourceRecord:
        """See ``SourceSet.finish``."""
        assert self._facts is not None and self._program is not None
        info = dict(_INFO_LINE.findall(self._info() or ""))
        coordinates = {"from_lsn": info.get("innodb_from_lsn", ""), "to_lsn": info.get("innodb_to_lsn", "")}
        binlog = _BINLOG.search(info.get("binlog_pos", ""))
        if binlog is not None:
            coordinates |= {"binlog_file": binlog[1], "binlog_position": binlog[2]}
            if binlog[3]:
                coordinates["gtid"] = binlog[3]
        self.abort()
        databases = self._still_there()
        return SourceRecord(
            kind="mariadb+physical",
            server=self._facts.version,
            address=self._server.address,
            state_of=self._state_of,
            tools={"mariadb-backup": self._program.version},
            size=sum(record.size for record in databases),
            seconds=round(time.monotonic() - self._started, 3),
            coordinates=coordinates,
            databases=tuple(databases),
            cluster=True,
        )

    def _still_there(self) -> list[DatabaseRecord]:
        """Return what was there before and after: of the rest nobody knows whether the backup has it."""
        with self._server.session() as connection:
            now = {
                name: {table.name for table in questions.database_record(connection, name)[0].tables}
                for name in self._server.databases()
            }
        return [
            msgspec.structs.replace(
                record, tables=tuple(table for table in record.tables if table.name in now[record.name])
            )
            for record in self._databases
            if record.name in now
        ]

    def abort(self) -> None:
        """See ``SourceSet.abort``."""
        if self._own is not None:
            self._own.remove()


def check_physical(server: MariaDBServer, facts: MariaDBFacts, missing: Prerequisites) -> None:
    """Note what keeps this account, here and on the server, from copying the server's files."""
    directory = facts.variables.get("datadir", "")
    try:
        os.listdir(directory)
    except OSError as error:
        missing.add(
            f"to read the server's files in {directory or 'its datadir'}",
            error.strerror or str(error),
            "Run on the server's own host, as root or as its account: sudo -u mysql backhaul push ...",
        )
    if "ALL PRIVILEGES" in facts.privileges:
        return
    monitor = ["BINLOG MONITOR", "REPLICA MONITOR"] if facts.series >= (10, 5) else ["REPLICATION CLIENT"]
    lacking = [name for name in ("RELOAD", "PROCESS", "LOCK TABLES", *monitor) if name not in facts.privileges]
    if lacking:
        user, _, host = facts.user.partition("@")
        missing.add(
            f"the privileges {', '.join(lacking)}",
            f"{facts.user} has not got them on *.*",
            f"{server.client()} -e \"GRANT {', '.join(lacking)} ON *.* TO '{user}'@'{host}'\"",
        )


def check_program_version(program: Program, facts: MariaDBFacts, missing: Prerequisites) -> None:
    """Note a ``mariadb-backup`` of another series than the server: it understands its own only."""
    numbers = (*(int(number) for number in program.version.split(".")[:2]), 0)[:2]
    if program.version != "0" and numbers != facts.series:
        missing.add(
            f"mariadb-backup of version {facts.series[0]}.{facts.series[1]}",
            f"the server is {facts.version}, and {program.path} is of {program.version}",
            "apt-get install mariadb-backup  (from where the server comes from)",
        )
