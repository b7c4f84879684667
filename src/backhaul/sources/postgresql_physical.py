"""PostgreSQL as a source, physically: all of a server's files by one ``pg_basebackup``, with their manifest last.

With ``-X fetch`` the WAL that makes them consistent is among the files; a temporary replication slot of ours has the
server keep it for as long as the backup takes.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import re
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from backhaul.databases import postgresql as questions
from backhaul.databases.postgresql import PostgreSQLServer, ServerFacts
from backhaul.databases.prerequisites import Prerequisites, Program
from backhaul.errors import SourceError
from backhaul.model.manifest import WHOLE, DatabaseRecord, ProducerRecord, SourceRecord, StreamPart
from backhaul.model.source_url import SourceUrl
from backhaul.pipeline.supervisor import Supervisor
from backhaul.sources.base import NamedStream, utc
from backhaul.sources.command import CommandSource

if TYPE_CHECKING:
    from psycopg import Connection

# The end of a base backup is its manifest, whose last lines these are, and less than 4 KiB of a tar's end.
_TAIL = 16 << 10
_WAL_RANGES = re.compile(
    rb'"Timeline":\s*(\d+),\s*"Start-LSN":\s*"([0-9A-F]+/[0-9A-F]+)",\s*"End-LSN":\s*"([0-9A-F]+/[0-9A-F]+)"'
)
_MARKER = "Manifest-Checksum"
# What a server needs for one base backup: a WAL sender, and WAL that lasts.
_SLOT = "select pg_create_physical_replication_slot(%s, true, true)"


class PostgreSQLPhysicalSource:
    """All of a server's files, by ``pg_basebackup``, with the WAL that makes them consistent. See ``SourceSet``."""

    parallel = 1

    def __init__(
        self,
        url: SourceUrl,
        *,
        on_error_line: Callable[[bytes], None] | None = None,
        now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
    ) -> None:
        self.name = url.text
        self.total_tables = 0
        self._on_error_line = on_error_line
        self._now = now
        self._server = PostgreSQLServer(url)
        self._facts: ServerFacts | None = None
        self._program: Program | None = None
        self._slot: Connection[Any] | None = None
        self._databases: list[DatabaseRecord] = []
        self._source: _BaseBackup | None = None
        self._started = 0.0
        self._state_of = ""

    def check(self) -> None:
        """See ``SourceSet.check``."""
        self._facts = facts = self._server.facts()
        missing = Prerequisites(f"A physical backup of {self.name}")
        self._program = self._server.client("pg_basebackup", facts.major, missing)
        if self._program is not None and self._program.major != facts.major:
            missing.add(
                f"pg_basebackup of version {facts.major}",
                f"{self._program.path} is of {self._program.version}",
                f"apt-get install postgresql-client-{facts.major}",
            )
        check_physical(self._server, facts, missing)
        missing.require()

    def open(self, group: Supervisor) -> Sequence[NamedStream]:
        """See ``SourceSet.open``."""
        assert self._program is not None
        self._started = time.monotonic()
        self._state_of = utc(self._now())
        with self._server.session() as connection:
            owner = questions.one_value(
                connection, "select rolname from pg_roles where rolsuper and rolcanlogin order by oid limit 1"
            )
        self._databases = [
            DatabaseRecord(name=name, size=size, properties={"superuser": owner})
            for name, size in self._server.databases()
        ]
        self._keep_wal()
        command = [
            self._program.path,
            "--pgdata=-",
            "--format=tar",
            "--wal-method=fetch",
            "--checkpoint=fast",
            "-w",
            "-d",
            self._server.conninfo(self._server.maintenance),
        ]
        self._source = _BaseBackup(
            CommandSource(
                command,
                self._on_error_line,
                name=f"pg_basebackup of {self.name}",
                environment=self._server.environment(),
            )
        )
        return (NamedStream(name="base", source=self._source, expect=(_MARKER,), part=StreamPart(section=WHOLE)),)

    def _keep_wal(self) -> None:
        """Have the server keep its WAL from here on: the slot is gone with our connection, whatever happens."""
        import psycopg

        connection = self._server.connect(self._server.maintenance)
        self._slot = connection
        try:
            questions.never_time_out(connection)
            connection.execute(_SLOT, (f"backhaul_{connection.info.backend_pid}",))
        except psycopg.Error as error:
            raise questions.refused("Could not have the server keep its WAL during the backup", error) from error

    def outline(self) -> SourceRecord | None:
        """See ``SourceSet.outline``."""
        assert self._facts is not None and self._program is not None
        return SourceRecord(
            kind="postgresql+physical",
            server=self._facts.version,
            address=self._server.address,
            state_of=self._state_of,
            tools={"pg_basebackup": self._program.version},
            cluster=True,
            settings=self._facts.kept_settings,
        )

    def finish(self) -> SourceRecord:
        """See ``SourceSet.finish``."""
        assert self._facts is not None and self._program is not None and self._source is not None
        self.abort()
        return SourceRecord(
            kind="postgresql+physical",
            server=self._facts.version,
            address=self._server.address,
            state_of=self._state_of,
            tools={"pg_basebackup": self._program.version},
            size=sum(database.size for database in self._databases),
            seconds=round(time.monotonic() - self._started, 3),
            coordinates=self._source.coordinates,
            databases=tuple(self._databases),
            cluster=True,
            settings=self._facts.kept_settings,
        )

    def abort(self) -> None:
        """See ``SourceSet.abort``."""
        if self._slot is not None:
            with contextlib.suppress(Exception):
                self._slot.close()


def check_physical(server: PostgreSQLServer, facts: ServerFacts, missing: Prerequisites) -> None:
    """Note what keeps a server from giving a base backup to stdout."""
    user = questions.quoted(facts.user)
    if not facts.replication:
        missing.add(
            "the right to replicate", f"{facts.user} has it not", f"{server.psql()} -c 'ALTER ROLE {user} REPLICATION'"
        )
    if facts.settings.get("wal_level") == "minimal":
        missing.add(
            "wal_level = replica",
            "it is minimal: what the WAL lacks can't be replayed",
            f"{server.psql()} -c 'ALTER SYSTEM SET wal_level = replica'  (and restart the server)",
        )
    if facts.settings.get("max_wal_senders") == "0":
        missing.add(
            "a WAL sender",
            "max_wal_senders is 0",
            f"{server.psql()} -c 'ALTER SYSTEM SET max_wal_senders = 10'  (and restart the server)",
        )
    with server.session() as connection:
        tablespaces = [
            name
            for (name,) in connection.execute(
                "select spcname from pg_tablespace where spcname not in ('pg_default', 'pg_global')"
            )
        ]
        slots = questions.one_value(
            connection,
            """select (current_setting('max_replication_slots')::int
                       - (select count(*) from pg_replication_slots))::text""",
        )
    if int(slots) < 1:
        missing.add(
            "a free replication slot",
            "all of max_replication_slots are in use",
            f"{server.psql()} -c 'ALTER SYSTEM SET max_replication_slots = 20'  (and restart the server)",
        )
    if tablespaces:
        missing.add(
            "a server without tablespaces of its own",
            f"it has {', '.join(tablespaces)}, and pg_basebackup can't send them to a pipe",
            "Back it up logically, with postgresql://",
        )


class _BaseBackup:
    """``pg_basebackup``'s tar, whose end tells the LSNs. See ``Source``."""

    def __init__(self, source: CommandSource) -> None:
        self.name = source.name
        self.coordinates: dict[str, str] = {}
        self._source = source
        self._tail = b""

    def check(self) -> None:
        """See ``Source.check``."""
        self._source.check()

    def start(self, group: Supervisor) -> None:
        """See ``Source.start``."""
        self._source.start(group)

    def read_into(self, buffer: memoryview) -> int:
        """See ``Source.read_into``."""
        count = self._source.read_into(buffer)
        self._tail = (self._tail + bytes(buffer[max(0, count - _TAIL) : count]))[-_TAIL:]
        return count

    def finish(self) -> ProducerRecord:
        """See ``Source.finish``."""
        record = self._source.finish()
        ranges = _WAL_RANGES.findall(self._tail)
        if not ranges or _MARKER.encode() not in self._tail:
            raise SourceError(
                f"The stream does not end as it should: {self.name}",
                "its last file is no backup manifest with WAL ranges",
                "The backup is not whole. Nothing was committed; push again.",
            )
        self.coordinates = {
            "timeline": ranges[-1][0].decode(),
            "start_lsn": ranges[0][1].decode(),
            "end_lsn": ranges[-1][2].decode(),
        }
        return record

    def abort(self) -> None:
        """See ``Source.abort``."""
        self._source.abort()
