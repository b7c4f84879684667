"""MariaDB as a source, logically: several ``mariadb-dump`` of one state.

A logical backup of a database is: ``schema`` (tables and sequences), ``data-1``... (rows, large tables packed by size;
``data-1`` has the rest), ``after`` (routines, triggers, events) and ``views``; and for a whole server ``globals``
(accounts and grants). All are SQL.

MariaDB can't export a snapshot, and definitions are in no snapshot at all. So for a moment we hold the global read
lock: our own transaction begins, every data dump begins its own, and the definitions are read to their end into memory;
then the lock is released. All have the same state then, and our transaction counts the rows in it. Tables whose engine
knows no transactions (Aria, MyISAM) are read as they are when their turn comes; the record says so
(``TableRecord.apart``).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from backhaul.databases import mariadb as questions
from backhaul.databases.mariadb import MariaDBFacts, MariaDBServer
from backhaul.databases.prerequisites import Prerequisites, Program, find_program
from backhaul.errors import BackhaulError, SourceError
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
)
from backhaul.model.source_url import SourceUrl
from backhaul.pipeline.supervisor import Supervisor
from backhaul.planning.packing import pack_tables
from backhaul.sources.base import NamedStream, unique_names, utc
from backhaul.sources.command import CommandSource

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

_MARKER = "-- Dump completed on"
# What a dump writes first once its transaction has begun.
_PAST_START = (b"\n-- Dumping data for table ", b"\n-- Table structure for table ", b"\n-- Dump completed on")
_PAST_START_SEQUENCE = b"\n-- Sequence structure for "
# Seconds that we wait for the global read lock: whoever writes waits behind us meanwhile.
_LOCK_PATIENCE = 30
# Seconds for the dumps to begin under it.
_START_PATIENCE = 60.0
_LONGEST_HEAD = 8 << 20
_MOST_DEFINITIONS = 256 << 20
_TABLE_BEGUN = re.compile(rb"-- Retrieving table structure for table (\S.*?)\.\.\.|-- Sending SELECT query")


class MariaDBSource:
    """A database, or with no name in the URL all of a server's. See the module, and ``SourceSet``.

    Args:
        url: where it is.
        streams: data streams of a database at once; 1 makes one stream of all of a single database.
        count: whether rows are counted, for a drill to compare.
        on_error_line: told each line of the programs' stderr.
        on_table: told each table that is begun.
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
        now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
    ) -> None:
        self.name = url.text
        self.parallel = streams
        self.total_tables = 0
        self._url = url
        self._count = count
        self._on_error_line = on_error_line
        self._on_table = on_table
        self._now = now
        self._server = MariaDBServer(url)
        self._facts: MariaDBFacts | None = None
        self._dump: Program | None = None
        self._databases: list[_Database] = []
        self._names: list[str] = []
        self._unfinished: list[str] = []
        self._started = 0.0
        self._state_of = ""

    def check(self) -> None:
        """See ``SourceSet.check``."""
        self._facts = facts = self._server.facts()
        missing = Prerequisites(f"A backup of {self.name}")
        self._dump = dump_program(missing)
        present = self._server.databases()
        self._unfinished = [] if self._url.database else [name for name in present if name.endswith(RESTORING)]
        self._names = [self._url.database] if self._url.database else [n for n in present if n not in self._unfinished]
        if self._url.database and self._url.database not in present:
            missing.add(
                f"the database {self._url.database!r}",
                f"the server at {self._server.address} has {', '.join(present) or 'none'}",
                "Correct the name in the URL.",
            )
        everything = not self._url.database
        check_logical(self._server, facts, self._names, missing, everything=everything)
        missing.require()

    def open(self, group: Supervisor) -> Sequence[NamedStream]:
        """See ``SourceSet.open``. The state is fixed as each database's first data stream starts."""
        assert self._facts is not None and self._dump is not None
        self._started = time.monotonic()
        self._state_of = utc(self._now())
        single = self.parallel == 1 and bool(self._url.database)
        streams = [] if self._url.database else [self._globals()]
        prefixes = [""] if self._url.database else unique_names(self._names)
        previous: _Database | None = None
        for name, prefix in zip(self._names, prefixes, strict=True):
            database = _Database(self._server, name, self._dump, self._facts, previous, count=self._count)
            database.on_error_line, database.on_table = self._on_error_line, self._on_table
            self._databases.append(database)
            streams += database.streams(f"{prefix}." if prefix else "", 1 if single else self.parallel, whole=single)
            self.total_tables += database.tables
            previous = database
        return streams

    def _globals(self) -> NamedStream:
        assert self._dump is not None
        options = self._server.options()
        source = CommandSource(
            [self._dump.path, *options, "--system=users"],
            self._on_error_line,
            name=f"mariadb-dump --system=users of {self.name}",
            environment=self._server.environment(),
        )
        return NamedStream(name="globals", source=source, expect=(_MARKER,), part=StreamPart(section=GLOBALS))

    def outline(self) -> SourceRecord | None:
        """See ``SourceSet.outline``."""
        # (Of a whole server each database has its own moment, and most are still to come.)
        return self.finish() if self._url.database else None

    def finish(self) -> SourceRecord:
        """See ``SourceSet.finish``."""
        assert self._facts is not None and self._dump is not None
        records = tuple(database.record for database in self._databases)
        apart = [f"{record.name}.{table.name}" for record in records for table in record.tables if table.apart]
        remarks = []
        if apart:
            shown = ", ".join(apart[:5]) + (f" and {len(apart) - 5} more" if len(apart) > 5 else "")
            remarks.append(f"tables without transactions were read apart from the state of the others: {shown}")
        if self._unfinished:
            remarks.append(f"left out, since a restore into it did not finish: {', '.join(self._unfinished)}")
        if not self._facts.binlog:
            remarks.append("the server writes no binary log: no coordinates to replicate or replay from")
        return SourceRecord(
            kind="mariadb",
            server=self._facts.version,
            address=self._server.address,
            state_of=self._state_of,
            tools={"mariadb-dump": self._dump.version},
            size=sum(record.size for record in records),
            seconds=round(time.monotonic() - self._started, 3),
            coordinates=self._databases[0].coordinates if len(self._databases) == 1 else {},
            databases=records,
            cluster=not self._url.database,
            remarks=tuple(remarks),
        )

    def abort(self) -> None:
        """See ``SourceSet.abort``."""
        for database in self._databases:
            database.close()


def dump_program(missing: Prerequisites) -> Program | None:
    """Return ``mariadb-dump``, or ``mysqldump`` where it still has that name."""
    return find_program("mariadb-dump") or find_program("mysqldump") or missing.program("mariadb-dump")


def check_logical(
    server: MariaDBServer, facts: MariaDBFacts, databases: Sequence[str], missing: Prerequisites, *, everything: bool
) -> None:
    """Note the privileges that a consistent dump needs, and the account lacks."""
    monitor = "REPLICATION CLIENT" if facts.series < (10, 5) else "BINLOG MONITOR"
    wanted = ["RELOAD", *([monitor] if facts.binlog else [])]
    lacking = [] if "ALL PRIVILEGES" in facts.privileges else [n for n in wanted if n not in facts.privileges]
    user, _, host = facts.user.partition("@")
    account = f"'{user}'@'{host}'"
    todo = []
    if lacking:
        todo.append(f"GRANT {', '.join(lacking)} ON *.* TO {account}")
    for database in databases:
        here = [n for n in ("SELECT", "SHOW VIEW", "EXECUTE", "TRIGGER", "EVENT") if not facts.may(n, database)]
        if here:
            where = "*.*" if everything else f"`{database}`.*"
            lacking += [name for name in here if name not in lacking]
            todo.append(f"GRANT {', '.join(here)} ON {where} TO {account}")
    if databases and not facts.may("SELECT", "mysql"):
        with server.session() as connection:
            strange = questions.rows(
                connection,
                "select 1 from information_schema.routines "
                "where routine_schema in %s and definer <> current_user() limit 1",
                (tuple(databases),),
            )
        if strange and not any("`mysql`.`proc`" in grant for grant in facts.grants):
            lacking.append("SELECT on mysql.proc")  # else the text of other accounts' routines is not shown
            todo.append(f"GRANT SELECT ON mysql.proc TO {account}")
    if lacking:
        missing.add(
            f"the privileges {', '.join(lacking)}",
            f"{facts.user} has not got them",
            f'{server.client()} -e "{"; ".join(dict.fromkeys(todo))}"',
        )


class _Database:
    """One database: the moment in which its state is fixed, the dumps of that state, and what it holds."""

    on_error_line: Callable[[bytes], None] | None = None

    def __init__(
        self,
        server: MariaDBServer,
        name: str,
        dump: Program,
        facts: MariaDBFacts,
        previous: _Database | None,
        *,
        count: bool,
    ) -> None:
        self.name = name
        self.tables = 0
        self.coordinates: dict[str, str] = {}
        self.on_table: Callable[[str], None] = lambda name: None
        self.ended = False
        self._server = server
        self._dump = dump
        self._facts = facts
        self._previous = previous
        self._count = count
        self._stream_of: dict[str, str] = {}
        self._dumps: list[_StateDump] = []
        self._lock = threading.Lock()
        self._connection: Connection[Cursor] | None = None
        self._left = 0
        self._record = DatabaseRecord(name=name)
        self._counts: dict[str, int] = {}
        self._counted = False
        self._count_failure: BackhaulError | None = None

    def streams(self, prefix: str, streams: int, *, whole: bool) -> list[NamedStream]:
        """Plan the streams, by the tables and sizes of now."""
        with self._server.session() as connection:
            self._record, engines = questions.database_record(connection, self.name)
        tables = [record for record in self._record.tables if record.kind == "table"]
        views = [name for name, engine in engines.items() if engine == "VIEW"]
        self.tables = len(tables)
        history = ["--dump-history"] if self._record.needs.get("history") and self._facts.series >= (10, 11) else []
        if whole:
            master = ["--master-data=2", "--gtid"] if self._facts.binlog else []
            options = ["--routines", "--events", "--triggers", *master, *history]
            self._left = 1
            return [self._data("data", options, [], WHOLE)]
        # (--no-data dumps hold no rows, so their options say nothing of a transaction.)
        no_views = [f"--ignore-table={self.name}.{view}" for view in views]
        plain = ["--skip-lock-tables", "--no-data"]
        result = [
            self._plain(f"{prefix}schema", SCHEMA, [*plain, "--skip-triggers", *no_views], []),
            self._plain(
                f"{prefix}after", AFTER, [*plain, "--no-create-info", "--routines", "--triggers", "--events"], []
            ),
        ]
        if views:
            result.append(self._plain(f"{prefix}views", AFTER, [*plain, "--skip-triggers"], views))
        bins = pack_tables([(record.name, record.size) for record in tables], streams)
        elsewhere = [f"--ignore-table={self.name}.{name}" for names in bins[1:] for name in names]
        for number, names in enumerate(bins, 1):
            stream = f"{prefix}data-{number}"
            self._stream_of.update(dict.fromkeys(names, stream))
            options = ["--no-create-info", "--skip-triggers", *history]
            if number == 1:
                options += [*elsewhere, *no_views]
            result.append(self._data(stream, options, names, DATA, others=number == 1))
        self._left = len(self._dumps)
        return result

    def _plain(self, stream: str, section: str, options: list[str], names: list[str]) -> NamedStream:
        dump = _StateDump(self, self._source(stream, options, names), definitions=True)
        self._dumps.append(dump)
        part = StreamPart(section=section, database=self.name)
        return NamedStream(name=stream, source=dump, expect=(_MARKER,), part=part)

    def _data(
        self, stream: str, options: list[str], names: list[str], section: str, *, others: bool = False
    ) -> NamedStream:
        inner = self._source(stream, ["--single-transaction", *options], names)
        dump = _StateDump(self, inner)
        self._dumps.append(dump)
        part = StreamPart(section=section, database=self.name, others=others)
        return NamedStream(name=stream, source=dump, expect=(_MARKER,), part=part)

    def _source(self, stream: str, options: list[str], names: list[str]) -> CommandSource:
        command = [
            self._dump.path,
            *self._server.options(),
            "--default-character-set=utf8mb4",
            "--hex-blob",
            "--quick",
            "--verbose",
            "--no-tablespaces",
            "--max-allowed-packet=1G",
            *options,
            "--",
            self.name,
            *names,
        ]
        return CommandSource(
            command,
            self.on_error_line,
            name=f"mariadb-dump of {self.name} ({stream})",
            is_chatter=self._listen,
            environment=self._server.environment(),
        )

    def _listen(self, line: bytes) -> bool:
        begun = _TABLE_BEGUN.match(line)
        if begun is not None and begun[1] is not None:
            self.on_table(f"{self.name}: {begun[1].decode(errors='replace')}")
        return line.startswith(b"-- ")

    def begin(self, group: Supervisor) -> None:
        """Fix the state, and start every dump in it, if that was not done yet.

        Raises:
            SourceError: the server refused, or the lock could not be had in time.
        """
        if self._previous is not None:
            # One database after the other: a dump that is begun and not read is thrown out by its server.
            with group.condition:
                group.wait_for(lambda: self._previous is None or self._previous.ended)
        with self._lock:
            if self._connection is None:
                self._fix_state(group)

    def _fix_state(self, group: Supervisor) -> None:
        import pymysql

        try:
            connection = self._server.connect()
            self._connection = connection
            with connection.cursor() as cursor:
                cursor.execute(f"set session lock_wait_timeout = {_LOCK_PATIENCE}, max_statement_time = 0")
                cursor.execute("set session wait_timeout = 604800, net_write_timeout = 86400")
                cursor.execute("set session transaction isolation level repeatable read")
                try:
                    cursor.execute("flush tables with read lock")
                except pymysql.OperationalError as error:
                    raise _lock_refused(self.name, error) from error
                cursor.execute("start transaction with consistent snapshot")
                self.coordinates = questions.coordinates(connection, self._facts)
                fresh, _ = questions.database_record(connection, self.name)
                self._record = fresh
                self._start_dumps(group)
                cursor.execute("unlock tables")
        except BaseException as error:
            self.close()  # and with our connection the lock: writers wait for no clean-up
            if isinstance(error, pymysql.Error):
                raise questions.refused(f"Could not fix the state of {self.name!r}", error) from error
            raise
        if self._count:
            group.start(lambda: self._count_rows(group, connection), f"count-{self.name}")
        else:
            self._counted = True

    def _start_dumps(self, group: Supervisor) -> None:
        """Have every dump begin under the lock, in a limited time: all who write wait for us."""
        # (A stop of the whole run reaches whoever reads, and is raised as its reason.)
        timer = threading.Timer(_START_PATIENCE, lambda: group.stop(_too_slow(self.name)))
        timer.daemon = True
        timer.start()
        try:
            for dump in self._dumps:
                dump.begin(group)
            for dump in self._dumps:
                dump.wait_for_start()
        finally:
            timer.cancel()
        group.check()

    def _count_rows(self, group: Supervisor, connection: Connection[Cursor]) -> None:
        import pymysql

        try:
            for record in self._record.tables:
                group.check()
                if record.kind == "table" and not record.apart:
                    name = f"{questions.quoted(self.name)}.{questions.quoted(record.name)}"
                    counted = questions.rows(connection, f"select count(*) from {name}")  # noqa: S608 - quoted
                    self._counts[record.name] = int(counted[0][0])
        except (pymysql.Error, OSError, RuntimeError, AttributeError, ValueError) as error:
            group.check()  # (closed under our hands)
            self._count_failure = questions.refused(f"Could not count the rows of {self.name!r}", error)
            group.stop(self._count_failure)
        finally:
            with group.condition:
                self._counted = True
                group.condition.notify_all()

    def dump_ended(self, group: Supervisor) -> None:
        """Note that a data dump has ended well; after the last one our transaction ends."""
        with self._lock:
            self._left -= 1
            if self._left:
                return
        with group.condition:
            group.wait_for(lambda: self._counted)
        if self._count_failure is not None:
            raise self._count_failure
        self.close()
        with group.condition:
            self.ended = True
            group.condition.notify_all()

    @property
    def record(self) -> DatabaseRecord:
        """What the database held in that state."""
        tables = tuple(
            msgspec.structs.replace(
                table, rows=self._counts.get(table.name), stream=self._stream_of.get(table.name, "")
            )
            for table in self._record.tables
        )
        return msgspec.structs.replace(self._record, tables=tables, coordinates=self.coordinates)

    def close(self) -> None:
        """End our transaction."""
        if self._connection is not None:
            with contextlib.suppress(Exception):
                self._connection.close()


class _StateDump:
    """A ``mariadb-dump`` that begins with all others of its database. See ``Source``.

    One of ``definitions`` is read to its end while the lock is held.
    """

    def __init__(self, database: _Database, source: CommandSource, *, definitions: bool = False) -> None:
        self.name = source.name
        self._definitions = definitions
        self._ended = False
        self._database = database
        self._source = source
        self._group: Supervisor | None = None
        self._head = bytearray()
        self._given = 0

    def check(self) -> None:
        """See ``Source.check``."""

    def begin(self, group: Supervisor) -> None:
        """Start the program."""
        self._group = group
        self._source.start(group)

    def wait_for_start(self) -> None:
        """Read until the dump is seen to be in its transaction, or to have ended; what was read is kept.

        Raises:
            SourceError: it does not get there.
        """
        buffer = memoryview(bytearray(1 << 16))
        while self._definitions or not any(marker in self._head for marker in (*_PAST_START, _PAST_START_SEQUENCE)):
            count = self._source.read_into(buffer)
            self._head += buffer[:count]
            if count == 0:
                self._ended = True  # how, ``finish`` will tell
                return
            if len(self._head) > (_MOST_DEFINITIONS if self._definitions else _LONGEST_HEAD):
                raise SourceError(
                    f"{self.name} does not begin as it should",
                    f"{len(self._head)} bytes in, it has {'not ended' if self._definitions else 'named no table'}",
                    "Run it by hand to see what it does. Nothing was committed.",
                )

    def start(self, group: Supervisor) -> None:
        """See ``Source.start``."""
        self._database.begin(group)

    def read_into(self, buffer: memoryview) -> int:
        """See ``Source.read_into``."""
        if self._given < len(self._head):
            piece = memoryview(self._head)[self._given : self._given + len(buffer)]
            buffer[: len(piece)] = piece
            self._given += len(piece)
            return len(piece)
        return 0 if self._ended else self._source.read_into(buffer)

    def finish(self) -> ProducerRecord:
        """See ``Source.finish``."""
        assert self._group is not None
        record = self._source.finish()
        self._database.dump_ended(self._group)
        return record

    def abort(self) -> None:
        """See ``Source.abort``."""
        self._source.abort()


def _too_slow(database: str) -> SourceError:
    return SourceError(
        f"Could not fix the state of {database!r}",
        f"the dumps had not begun within {_START_PATIENCE:.0f} s, and all who write waited for them",
        "See what holds mariadb-dump up (SHOW PROCESSLIST), or how many tables there are. Nothing was committed.",
    )


def _lock_refused(database: str, error: Exception) -> SourceError:
    return SourceError(
        f"Could not fix the state of {database!r}",
        f"FLUSH TABLES WITH READ LOCK was not granted within {_LOCK_PATIENCE} s: {questions.words(error)}",
        "A statement that runs for long holds it up (SHOW PROCESSLIST). Nothing was committed; push again.",
    )
