"""PostgreSQL as a source, logically: several ``pg_dump`` of one snapshot.

A logical backup of a database is, under one exported snapshot:

- ``schema``: definitions (``--section=pre-data``);
- ``data-1``...: rows, large tables packed by size; ``data-1`` has the rest, whatever it is: small tables, sequences,
  large objects, what extensions keep in tables;
- ``after``: indexes, constraints, triggers, the filling of materialised views (``--section=post-data``);

and for the server ``globals``: roles and tablespaces (``pg_dumpall``). Each is a custom-format archive of its own (but
``globals``, which is SQL), so that the data streams can be restored side by side from pipes.

A transaction of ours holds the snapshot from before the first ``pg_dump`` until after the last, and shares of locks on
all tables: nobody drops or truncates one between the plan and its turn. The same transaction counts the rows.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from backhaul.databases import postgresql as questions
from backhaul.databases.postgresql import PostgreSQLServer, ServerFacts
from backhaul.databases.prerequisites import Prerequisites, Program
from backhaul.errors import BackhaulError
from backhaul.formats.names import RESTORING
from backhaul.model.manifest import (
    AFTER,
    DATA,
    GLOBALS,
    SCHEMA,
    WHOLE,
    DatabaseRecord,
    ProducerRecord,
    SourceRecord,
    StreamPart,
    TableRecord,
)
from backhaul.model.source_url import SourceUrl
from backhaul.pipeline.supervisor import Supervisor
from backhaul.planning.packing import pack_tables
from backhaul.sources.base import NamedStream, unique_names, utc
from backhaul.sources.command import CommandSource

if TYPE_CHECKING:
    from psycopg import Connection

# Seconds that a dump waits for a lock which somebody else wants for himself, before it gives up: our transaction
# holds its share of it, and both would wait for ever.
_LOCK_PATIENCE = 60
_LOCKED_AT_ONCE = 500
_CLUSTER_MARKER = "PostgreSQL database cluster dump complete"
_TABLE_BEGUN = re.compile(rb'dumping contents of table "(.*)"')
_NEWS = re.compile(rb"(warning|error|fatal|hint|detail|query was|panic)\b", re.IGNORECASE)


def is_chatter(line: bytes) -> bool:
    """Tell what PostgreSQL's programs say with ``-v`` from what they would have said without."""
    return line.startswith((b"pg_dump: ", b"pg_restore: ", b"pg_dumpall: ")) and not _NEWS.search(line)


class PostgreSQLSource:
    """A database, or with no name in the URL all of a server's. See the module, and ``SourceSet``.

    Args:
        url: where it is.
        streams: data streams of each database at once; 1 makes one stream of all of a single database.
        count: whether rows are counted, for a drill to compare.
        on_error_line: told each line of the programs' stderr that is news.
        on_table: told each table as its rows begin.
        on_phase: told what goes on before that.
        now: the clock.
    """

    def __init__(
        self,
        url: SourceUrl,
        *,
        streams: int,
        count: bool = True,
        on_error_line: Callable[[bytes], None] | None = None,
        on_table: Callable[[str], None] = lambda name: None,
        on_phase: Callable[[str], None] = lambda text: None,
        now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
    ) -> None:
        self.name = url.text
        self._on_phase = on_phase
        self.parallel = streams
        self.total_tables = 0
        self._url = url
        self._count = count
        self._on_error_line = on_error_line
        self._on_table = on_table
        self._now = now
        self._server = PostgreSQLServer(url)
        self._facts: ServerFacts | None = None
        self._dump: Program | None = None
        self._dump_all: Program | None = None
        self._databases: list[_Database] = []
        self._names: list[str] = []
        self._closed: list[str] = []
        self._unfinished: list[str] = []
        self._started = 0.0
        self._state_of = ""
        self._group: Supervisor | None = None

    @property
    def _whole_server(self) -> bool:
        return not self._url.database

    def check(self) -> None:
        """See ``SourceSet.check``."""
        missing = Prerequisites(f"A backup of {self.name}")
        self.gather(missing)
        missing.require()

    def gather(self, missing: Prerequisites) -> None:
        """Note everything that keeps the database from being backed up."""
        self._facts = facts = self._server.facts()
        self._dump = self._server.client("pg_dump", facts.major, missing)
        self._dump_all = self._server.client("pg_dumpall", facts.major, missing)
        present = [name for name, _ in self._server.databases()]
        self._closed = self._server.closed_to_us() if self._whole_server else []
        self._unfinished = [name for name in present if name.endswith(RESTORING)] if self._whole_server else []
        left_out = (*self._closed, *self._unfinished)
        self._names = [n for n in present if n not in left_out] if self._whole_server else [self._url.database]
        if not self._whole_server and not self._server.exists(self._url.database):
            missing.add(
                f"the database {self._url.database!r}",
                f"the server at {self._server.address} has {', '.join(present) or 'none'}",
                "Correct the name in the URL.",
            )
        elif not facts.superuser:
            for name in self._names:
                self._check_readable(name, facts, missing)

    def _check_readable(self, database: str, facts: ServerFacts, missing: Prerequisites) -> None:
        with self._server.session(database) as connection:
            hidden = [
                name
                for (name,) in connection.execute(
                    """select format('%I.%I', n.nspname, c.relname) from pg_class c
                       join pg_namespace n on n.oid = c.relnamespace
                       where c.relkind in ('r', 'S', 'p') and n.nspname not like 'pg\\_%'
                         and n.nspname <> 'information_schema' and c.relpersistence <> 't'
                         and not exists (select 1 from pg_depend d join pg_extension e on e.oid = d.refobjid
                                          where d.classid = 'pg_class'::regclass and d.objid = c.oid
                                            and d.deptype = 'e' and not coalesce(c.oid = any(e.extconfig), false))
                         and not (has_schema_privilege(n.oid, 'usage') and has_table_privilege(c.oid, 'select'))
                       order by 1"""
                )
            ]
            filtered = [
                name
                for (name,) in connection.execute(
                    """select format('%I.%I', n.nspname, c.relname) from pg_class c
                       join pg_namespace n on n.oid = c.relnamespace
                       where c.relkind in ('r', 'p') and c.relrowsecurity and row_security_active(c.oid) order by 1"""
                )
            ]
        if filtered and not facts.sees_everything:
            missing.add(
                f"to see every row of {database!r}",
                f"row security hides some of {', '.join(filtered[:5])} from {facts.user}",
                f"{self._server.psql(database)} -c 'ALTER ROLE {questions.quoted(facts.user)} BYPASSRLS'",
            )
        if hidden:
            shown = ", ".join(hidden[:5]) + (f" and {len(hidden) - 5} more" if len(hidden) > 5 else "")
            missing.add(
                f"the right to read all of {database!r}",
                f"{facts.user} may not read {shown}",
                f"{self._server.psql(database)} -c 'GRANT pg_read_all_data TO {questions.quoted(facts.user)}'",
            )

    def open(self, group: Supervisor) -> Sequence[NamedStream]:
        """See ``SourceSet.open``. Snapshots are taken as each database's first stream starts."""
        assert self._facts is not None and self._dump is not None and self._dump_all is not None
        self._group = group
        self._started = time.monotonic()
        self._state_of = utc(self._now())
        single = self.parallel == 1 and not self._whole_server
        streams = [] if single else [self._globals()]
        prefixes = unique_names(self._names) if self._whole_server else [""]
        for name, prefix in zip(self._names, prefixes, strict=True):
            database = _Database(self._server, name, self._dump, count=self._count)
            database.on_error_line, database.on_table = self._on_error_line, self._on_table
            database.on_phase = self._on_phase
            self._databases.append(database)
            streams += database.streams(f"{prefix}." if prefix else "", 1 if single else self.parallel, whole=single)
            self.total_tables += database.tables
        return streams

    def _globals(self) -> NamedStream:
        assert self._facts is not None and self._dump_all is not None
        command = [self._dump_all.path, "--globals-only", "-w", "-d", self._server.conninfo("postgres")]
        if not self._facts.superuser:
            command.append("--no-role-passwords")
        source = CommandSource(
            command,
            self._on_error_line,
            name=f"pg_dumpall --globals-only of {self.name}",
            is_chatter=is_chatter,
            environment=self._server.environment(),
        )
        return NamedStream(name="globals", source=source, expect=(_CLUSTER_MARKER,), part=StreamPart(section=GLOBALS))

    def outline(self) -> SourceRecord | None:
        """See ``SourceSet.outline``."""
        # (Of a whole server each database has its own moment, and most are still to come.)
        if self._whole_server:
            return None
        assert self._group is not None
        for database in self._databases:
            # The stream that has started may be that of the roles, which is of no state.
            database.begin(self._group)
        return self.finish()

    def finish(self) -> SourceRecord:
        """See ``SourceSet.finish``."""
        assert self._facts is not None and self._dump is not None
        records = tuple(database.record() for database in self._databases)
        remarks = []
        if not self._facts.superuser:
            remarks.append(f"{self._facts.user} is no superuser: the passwords of roles are not in this backup")
        if self._closed:
            remarks.append(f"{self._facts.user} may not connect to, and this backup has not: {', '.join(self._closed)}")
        if self._unfinished:
            remarks.append(f"left out, since a restore into it did not finish: {', '.join(self._unfinished)}")
        if self._whole_server and not self._server.is_empty("template1"):
            remarks.append("template1 was changed; what is in it is not in this backup")
        coordinates = self._databases[0].coordinates if len(self._databases) == 1 else {}
        return SourceRecord(
            kind="postgresql",
            server=self._facts.version,
            address=self._server.address,
            state_of=self._state_of,
            tools={"pg_dump": self._dump.version},
            size=sum(record.size for record in records),
            seconds=round(time.monotonic() - self._started, 3),
            coordinates=coordinates,
            databases=records,
            cluster=self._whole_server,
            settings=self._facts.kept_settings,
            remarks=tuple(remarks),
        )

    def abort(self) -> None:
        """See ``SourceSet.abort``."""
        for database in self._databases:
            database.close()


class _Database:
    """One database: its snapshot, the streams that share it, and what they turn out to hold."""

    on_error_line: Callable[[bytes], None] | None = None

    def __init__(self, server: PostgreSQLServer, name: str, dump: Program, *, count: bool) -> None:
        self.name = name
        self.tables = 0
        self.coordinates: dict[str, str] = {}
        self.on_table: Callable[[str], None] = lambda name: None
        self.on_phase: Callable[[str], None] = lambda text: None
        self._server = server
        self._dump = dump
        self._count = count
        self._stream_of: dict[str, str] = {}
        self._lock = threading.Lock()
        self._connection: Connection[Any] | None = None
        self._snapshot = ""
        self._dumps: list[_SnapshotDump] = []
        self._left = 0
        self._record: DatabaseRecord | None = None
        self._records: list[TableRecord] = []
        self._counted = False
        self._uncounted: set[str] = set()
        self._counts: dict[str, int] = {}
        self._count_failure: BackhaulError | None = None

    def streams(self, prefix: str, streams: int, *, whole: bool) -> list[NamedStream]:
        """Plan the streams, by the sizes of now; what appears before the snapshot goes with the rest."""
        with self._server.session(self.name) as connection:
            records, extensions = questions.tables_of(connection)
        tables = [record for record in records if record.kind == "table"]
        self.tables = len(tables)
        if whole:
            self._left = 1
            return [self._stream("data", WHOLE, [])]
        movable = [(record.name, record.size) for record in tables if record.name not in extensions]
        bins = pack_tables(movable, streams)
        result = [self._stream(f"{prefix}schema", SCHEMA, ["--section=pre-data"])]
        result.append(self._stream(f"{prefix}after", AFTER, ["--section=post-data"]))
        for number, names in enumerate(bins, 1):
            stream = f"{prefix}data-{number}"
            if number == 1:
                # No matter what the others name: this one has all but that.
                options = [f"--exclude-table-data={questions.quoted_always(n)}" for names in bins for n in names]
            else:
                options = [f"--table={questions.quoted_always(name)}" for name in names]
                self._stream_of.update(dict.fromkeys(names, stream))
            result.append(self._stream(stream, DATA, ["--section=data", *options], others=number == 1))
        self._left = len(result)
        return result

    def _stream(self, stream: str, section: str, options: list[str], *, others: bool = False) -> NamedStream:
        source = _SnapshotDump(self, stream, options)
        self._dumps.append(source)
        part = StreamPart(section=section, database=self.name, others=others)
        return NamedStream(name=stream, source=source, part=part)

    def begin(self, group: Supervisor) -> None:
        """Take the snapshot if no stream has yet, and start every dump of it.

        All at once, whoever is read when: each has its locks within a moment then. One that began later could find
        somebody in the queue who waits for us, and wait behind him for ever.

        Raises:
            SourceError: the server refused, or somebody holds a table for himself.
        """
        with self._lock:
            if self._connection is None:
                self._take_snapshot(group)
                for dump in self._dumps:
                    dump.launch(group)

    def _take_snapshot(self, group: Supervisor) -> None:
        import psycopg

        # (row_security=off: rather an error than a count of what this account may see.)
        options = f"-c row_security=off -c lock_timeout={_LOCK_PATIENCE}s"
        try:
            connection = self._server.connect(self.name, autocommit=True, options=options)
            self._connection = connection
            questions.never_time_out(connection)
            connection.execute("begin isolation level repeatable read read only")
            self._snapshot = questions.one_value(connection, "select pg_export_snapshot()")
            self.coordinates = questions.coordinates(connection)
            self._record = questions.database_record(connection, self.name)
            self._records, extensions = questions.tables_of(connection)
            # What is an extension's is its own: dumps leave it out, but for what it keeps for its users.
            self._uncounted = extensions
            names = [r.name for r in self._records if r.kind == "table" and r.name not in extensions]
            self.on_phase(f"sharing locks on the tables of {self.name}, for at most {_LOCK_PATIENCE} s each")
            for start in range(0, len(names), _LOCKED_AT_ONCE):
                questions.share_locks(connection, names[start : start + _LOCKED_AT_ONCE])
            self.on_phase("")
        except psycopg.Error as error:
            raise questions.refused(f"Could not fix the state of {self.name!r}", error) from error
        if self._count:
            group.start(lambda: self._count_rows(group, connection), f"count-{self.name}")
        else:
            self._counted = True

    def _count_rows(self, group: Supervisor, connection: Connection[Any]) -> None:
        import psycopg

        try:
            for record in self._records:
                group.check()
                if record.kind in ("table", "view") and record.name not in self._uncounted:
                    self._counts[record.name] = questions.count_rows(connection, record)
        except psycopg.Error as error:
            group.check()
            # Our transaction, and the snapshot with it, is lost: that is the news, not what the dumps say of it.
            self._count_failure = questions.refused(f"Could not count the rows of {self.name!r}", error)
            group.stop(self._count_failure)
        finally:
            with group.condition:
                self._counted = True
                group.condition.notify_all()

    def stream_ended(self, group: Supervisor) -> None:
        """Note that a stream has ended well; after the last one the snapshot is let go."""
        with self._lock:
            self._left -= 1
            if self._left:
                return
        with group.condition:
            group.wait_for(lambda: self._counted)
        if self._count_failure is not None:
            raise self._count_failure
        self.close()

    def record(self) -> DatabaseRecord:
        """Return what the database held in that state."""
        assert self._record is not None
        tables = tuple(
            msgspec.structs.replace(
                record, rows=self._counts.get(record.name), stream=self._stream_of.get(record.name, "")
            )
            for record in self._records
        )
        return msgspec.structs.replace(self._record, tables=tables, coordinates=self.coordinates)

    def command(self, options: list[str]) -> list[str]:
        """Return a ``pg_dump`` of the snapshot."""
        return [
            self._dump.path,
            "--format=custom",
            "--compress=0",
            "--verbose",
            "-w",
            f"--lock-wait-timeout={_LOCK_PATIENCE}s",
            f"--snapshot={self._snapshot}",
            *options,
            "-d",
            self._server.conninfo(self.name),
        ]

    def source(self, stream: str, options: list[str]) -> CommandSource:
        """Return the source of a stream; the snapshot is taken."""
        return CommandSource(
            self.command(options),
            self.on_error_line,
            name=f"pg_dump of {self.name} ({stream})",
            is_chatter=self._listen,
            environment=self._server.environment(),
        )

    def _listen(self, line: bytes) -> bool:
        begun = _TABLE_BEGUN.search(line)
        if begun is not None:
            self.on_table(f"{self.name}: {begun[1].decode(errors='replace')}")
        return is_chatter(line)

    def close(self) -> None:
        """Let go of the snapshot and the locks."""
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.cancel()
            with contextlib.suppress(Exception):
                connection.close()


class _SnapshotDump:
    """One ``pg_dump`` that waits for its database's snapshot. See ``Source``."""

    def __init__(self, database: _Database, stream: str, options: list[str]) -> None:
        self.name = f"pg_dump of {database.name} ({stream})"
        self._database = database
        self._stream = stream
        self._options = options
        self._source: CommandSource | None = None
        self._group: Supervisor | None = None

    def check(self) -> None:
        """See ``Source.check``."""

    def start(self, group: Supervisor) -> None:
        """See ``Source.start``."""
        self._group = group
        self._database.begin(group)

    def launch(self, group: Supervisor) -> None:
        """Start the program; the snapshot is taken."""
        self._source = self._database.source(self._stream, self._options)
        self._source.start(group)

    def read_into(self, buffer: memoryview) -> int:
        """See ``Source.read_into``."""
        assert self._source is not None
        return self._source.read_into(buffer)

    def finish(self) -> ProducerRecord:
        """See ``Source.finish``."""
        assert self._source is not None and self._group is not None
        record = self._source.finish()
        self._database.stream_ended(self._group)
        return record

    def abort(self) -> None:
        """See ``Source.abort``."""
        if self._source is not None:
            self._source.abort()
