"""MariaDB as a target: tables restored in a database beside, and renamed into place when their rows are whole.

MariaDB can't rename a database, but any number of tables in one statement. So tables and rows go into
``app_restoring_...``; once all are right they are renamed into ``app`` at once (those that were there into
``app_replaced_...`` by the same statement), and then come views, routines, triggers and events. A table of the name
``backhaul_restore_unfinished`` stands in ``app`` from before the renaming until all is done.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from backhaul.databases import mariadb as questions
from backhaul.databases.mariadb import MariaDBServer, quoted, rows
from backhaul.databases.prerequisites import Prerequisites, Program, find_program, shortened
from backhaul.errors import TargetError, UsageError
from backhaul.formats.sql_script import split_statements
from backhaul.model.manifest import AFTER, DATA, GLOBALS, SCHEMA, WHOLE, DatabaseRecord, SourceRecord, StreamRecord
from backhaul.model.source_url import SourceUrl
from backhaul.pipeline.supervisor import Supervisor
from backhaul.targets.base import Target
from backhaul.targets.command import CommandTarget
from backhaul.targets.sections import Phase, Step, TextTarget

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

_LONGEST_NAME = 64
# Seconds for which a statement waits for whoever uses the tables that it renames or drops.
_LOCK_PATIENCE = 60
_ROOMY_PACKET = 64 << 20
MARKER = "backhaul_restore_unfinished"
_IMPORT_ROLE = "mariadb_dump_import_role"
_OF_ACCOUNTS = ("CREATE USER", "CREATE ROLE", "GRANT", "ALTER USER", "SET DEFAULT ROLE")
# (Without the M it is for MySQL, of versions that MariaDB is not.)
_VERSIONED = re.compile(r"/\*M!\d+ (.*?) ?\*/", re.DOTALL)
_TO_ROLE = re.compile(r" TO [`']([^`']*)[`'](?!@)")
_ACCOUNT = re.compile(r"(?:`([^`]*)`|'([^']*)')@(?:`([^`]*)`|'([^']*)')")


class MariaDBRestoreOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to restore: see ``PostgreSQLRestoreOptions``; ``globals_`` makes accounts that the server lacks."""

    replace: bool = False
    only: tuple[str, ...] = ()
    globals_: bool = False


class _Restored(msgspec.Struct, kw_only=True):
    """A database on its way. ``in_place``: its definitions name it, so it can't be made under another name."""

    record: DatabaseRecord
    final: str
    temporary: str
    aside: str
    streams: list[StreamRecord]
    in_place: bool
    existed: bool = False
    made_temporary: bool = False
    made_final: bool = False
    made_aside: bool = False
    marked: bool = False
    swapped: bool = False


class MariaDBRestore:
    """See the module, and ``RestoreTarget``.

    Args:
        url: the server, and the name of the database; without a name the recorded ones are taken.
        options: how to restore.
        on_error_line: told each line of the programs' stderr.
        on_table: told each table as its rows begin.
    """

    def __init__(
        self,
        url: SourceUrl,
        options: MariaDBRestoreOptions,
        *,
        on_error_line: Callable[[bytes], None] | None = None,
        on_table: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.name = url.text
        self.remarks: list[str] = []
        self.shortfalls: list[str] = []
        self.server = MariaDBServer(url)
        self._url = url
        self._options = options
        self._on_error_line = on_error_line
        self._on_table = on_table
        self._program: Program | None = None
        self._restored: list[_Restored] = []
        self._globals: StreamRecord | None = None

    def check(self, source: SourceRecord, streams: Sequence[StreamRecord], suffix: str = "backhaul") -> None:
        """See ``RestoreTarget.check``; ``suffix`` ends the temporary names."""
        facts = self.server.facts()
        missing = Prerequisites(f"A restore into {self.name}")
        self._program = find_program("mariadb") or find_program("mysql") or missing.program("mariadb")
        numbers = tuple(int(number) for number in re.findall(r"\d+", source.server)[:2])
        if facts.series < numbers and ("maria" in facts.version.lower()) == ("maria" in source.server.lower()):
            missing.add(
                f"a MariaDB server of version {'.'.join(map(str, numbers))} or newer",
                f"the backup is of {source.server}, and this server is {facts.version}",
                "Restore into a newer server.",
            )
        self._plan(source, streams, suffix)
        with self.server.session() as connection:
            engines = {str(name) for name, support, *_ in rows(connection, "show engines") if support != "NO"}
            accounts = self._accounts(connection)
        for restored in self._restored:
            self._check_place(restored, missing)
            for engine in restored.record.needs.get("engines", ()):
                if engine not in engines:
                    missing.add(
                        f"the storage engine {engine}",
                        f"tables of {restored.record.name!r} use it, and the server has it not",
                        f"apt-get install mariadb-plugin-{engine.lower()}  (or the package that holds it)",
                    )
            unknown = [name for name in restored.record.needs.get("definers", ()) if name not in accounts]
            if unknown and accounts and not self._options.globals_:
                self.remarks.append(
                    f"views, routines, triggers or events run as accounts that are not here: {', '.join(unknown)}"
                )
        packet = int(facts.variables.get("max_allowed_packet", "0"))
        if 0 < packet < _ROOMY_PACKET:
            self.remarks.append(
                f"max_allowed_packet is {packet >> 20} MB on this server: a row of more than about half of that can't "
                "be restored (SET GLOBAL max_allowed_packet = 1073741824)"
            )
        missing.require()

    def _accounts(self, connection: Connection[Cursor]) -> set[str]:
        """Return the server's accounts; nothing where this one may not ask."""
        import pymysql

        try:
            return {f"{user}@{host}" for user, host in rows(connection, "select user, host from mysql.user")}
        except pymysql.Error:
            if self._options.globals_:
                raise
            return set()

    def _plan(self, source: SourceRecord, streams: Sequence[StreamRecord], suffix: str) -> None:
        named = self._url.database
        if named and len(source.databases) != 1:
            raise UsageError(
                f"{self.name} names one database",
                f"the backup has {len(source.databases)}: {', '.join(d.name for d in source.databases)}",
                "Leave the name out of the URL, to restore each under its own.",
            )
        self._globals = next((s for s in streams if s.part is not None and s.part.section == GLOBALS), None)
        for record in source.databases:
            final = named or record.name
            own = [s for s in streams if s.part is not None and s.part.database == record.name]
            whole = any(s.part is not None and s.part.section == WHOLE for s in own)
            bound = record.needs.get("own name", ())
            if bound and final != record.name:
                raise UsageError(
                    f"{record.name!r} can only be restored under its own name",
                    f"the definition of {bound[0]} names the database that its sequence is in",
                    f"Restore it into another server, as {record.name!r}.",
                )
            self._check_only(record, whole=whole)
            kept = shortened(final, _LONGEST_NAME - len(suffix) - len("_restoring_"))
            self._restored.append(
                _Restored(
                    record=record,
                    final=final,
                    temporary=f"{kept}_restoring_{suffix}",
                    aside=f"{kept}_replaced_{suffix}",
                    streams=own,
                    in_place=whole or bool(bound),
                )
            )

    def _check_only(self, record: DatabaseRecord, *, whole: bool) -> None:
        names = [table.name for table in record.tables]
        for name in self._options.only:
            if name not in names:
                raise UsageError(
                    f"--only {name!r} means no table of {record.name!r}",
                    "there is none of that name",
                    f"There are: {', '.join(names[:10])}",
                )
        if self._options.only and whole:
            raise UsageError(
                "--only can't choose from this backup",
                "it was made with --streams 1: all tables are in one stream",
                "Restore all of it, and copy the table.",
            )

    def _check_place(self, restored: _Restored, missing: Prerequisites) -> None:
        present = self.server.databases()
        restored.existed = restored.final in present
        if restored.existed and not self.server.is_empty(restored.final):
            if not self._options.replace:
                missing.add(
                    f"the database {restored.final!r} to be empty, or not to exist",
                    f"it holds something on the server at {self.server.address}",
                    "Name another one in --into, or say --replace.",
                )
            elif restored.in_place:
                missing.add(
                    f"the database {restored.final!r} to be empty, or not to exist",
                    "this backup can't be restored beside it (one stream of all, or tables that name their database)",
                    f"Drop it, if it may go: {self.server.client()} -e 'DROP DATABASE {quoted(restored.final)}'",
                )
        if restored.temporary in present:
            missing.add(
                f"the name {restored.temporary!r}",
                "an interrupted restore of the same backup left it, or another one is under way",
                f"{self.server.client()} -e 'DROP DATABASE {quoted(restored.temporary)}'",
            )
        if restored.aside in present:
            missing.add(
                f"the name {restored.aside!r}",
                f"it holds the tables that {restored.final!r} had before a restore that did not finish",
                "Look into it, keep what you need, and drop it.",
            )
        if restored.existed and self.server.has_table(restored.final, MARKER):
            missing.add(
                f"the table {MARKER!r} to be gone from {restored.final!r}",
                "a restore into it did not finish",
                f"{self.server.client()} -e 'DROP DATABASE {quoted(restored.final)}'  (if nothing in it is needed)",
            )

    # -- the streams -----------------------------------------------------------------------------------

    def phases(self, jobs: int) -> Sequence[Phase]:
        """See ``RestoreTarget.phases``."""
        result: list[Phase] = []
        for restored in self._restored:
            result += self._phases_of(restored)
        # Last: grants name tables and routines, which have to be there.
        if self._options.globals_ and self._globals is not None:
            step = Step(self._globals.name, lambda: TextTarget(f"accounts of {self.name}", self._make_globals))
            result.append(Phase("accounts", (step,)))
        return result

    def _phases_of(self, restored: _Restored) -> list[Phase]:
        label = restored.record.name
        sections: dict[str, list[StreamRecord]] = {}
        for stream in restored.streams:
            assert stream.part is not None
            sections.setdefault(stream.part.section, []).append(stream)
        working = restored.final if restored.in_place else restored.temporary

        def steps(section: str, database: str) -> tuple[Step, ...]:
            streams = sorted(sections.get(section, ()), key=lambda s: -s.raw.size)
            return tuple(Step(s.name, functools.partial(self._pipe, restored, s, database)) for s in streams)

        begin = functools.partial(self._create, restored)
        swap = functools.partial(self._swap, restored)
        if WHOLE in sections:
            return [Phase(label, steps(WHOLE, working), begin)]
        after = [
            Phase(
                f"{label}: {s.name.rpartition('.')[2]}",
                (Step(s.name, functools.partial(self._pipe, restored, s, restored.final)),),
            )
            for s in sections.get(AFTER, ())
        ]
        return [
            Phase(f"{label}: definitions", steps(SCHEMA, working), begin),
            Phase(f"{label}: rows", steps(DATA, working)),
            Phase(f"{label}: into place", (), swap),
            *after,
        ]

    def _pipe(self, restored: _Restored, stream: StreamRecord, database: str) -> Target:
        assert self._program is not None
        command = [
            self._program.path,
            *self.server.options(),
            "--default-character-set=utf8mb4",
            "--binary-mode",
            "--max-allowed-packet=1G",
            "--init-command=set session foreign_key_checks = 0, unique_checks = 0",
            f"--database={database}",
        ]
        return _Script(
            CommandTarget(
                command,
                self._on_error_line,
                name=f"mariadb into {restored.final} ({stream.name})",
                environment=self.server.environment(),
                discard_output=True,
            ),
            self._on_table,
            self._options.only if stream.part is not None and stream.part.section == DATA else (),
        )

    # -- before and after ------------------------------------------------------------------------------

    def _make_globals(self, script: str) -> None:
        """Make the accounts that the server lacks; those that it has stay as they are."""
        import pymysql

        with self.server.session() as connection:
            present = {(str(u), str(h)) for u, h in rows(connection, "select user, host from mysql.user")}
            for statement in split_statements(script):
                bare = _VERSIONED.sub(r"\1", statement).strip().replace(f" WITH ADMIN {_IMPORT_ROLE}", "")
                match = _ACCOUNT.findall(bare)
                if _IMPORT_ROLE in bare or not bare.upper().startswith(_OF_ACCOUNTS):
                    continue  # (the role that a dump uses for its own import, and session settings)
                if any((one or two, three or four) in present for one, two, three, four in match):
                    continue
                role = _TO_ROLE.search(bare)
                if role is not None and (role[1], "") in present:
                    continue
                try:
                    rows(connection, bare)
                except pymysql.Error as error:
                    what = bare if bare.upper().startswith("GRANT") and "IDENTIFIED" not in bare.upper() else bare[:20]
                    self.shortfalls.append(f"{what}: {questions.words(error)}")

    def _create(self, restored: _Restored) -> None:
        properties = restored.record.properties
        options = (
            f" character set {properties['charset']} collate {properties['collation']}"
            if properties.get("charset", "").isidentifier() and properties.get("collation", "").isidentifier()
            else ""
        )
        with self._statements("make a database") as connection:
            if not restored.in_place:
                rows(connection, f"create database {quoted(restored.temporary)}{options}")
                restored.made_temporary = True
                return
            if not restored.existed:
                rows(connection, f"create database {quoted(restored.final)}{options}")
                restored.made_final = True
            self._mark(connection, restored)

    def _mark(self, connection: Connection[Cursor], restored: _Restored) -> None:
        rows(connection, f"create table {quoted(restored.final)}.{quoted(MARKER)} (since timestamp) engine = InnoDB")
        restored.marked = True

    def _swap(self, restored: _Restored) -> None:
        """Rename every table into place, and what was there out of it, in one statement."""
        if restored.in_place:
            return
        final, temporary, aside = quoted(restored.final), quoted(restored.temporary), quoted(restored.aside)
        with self._statements("give the restored tables their place") as connection:
            new = _tables(connection, restored.temporary)
            if not restored.existed:
                rows(connection, f"create database {final}")  # fails if somebody has made it meanwhile
                restored.made_final = True
            properties = restored.record.properties
            if properties.get("collation", "").isidentifier():
                rows(connection, f"alter database {final} collate {properties['collation']}")
            old = _tables(connection, restored.final)
            if not self._options.replace and not self.server.is_empty(restored.final):
                raise TargetError(
                    f"The database {restored.final!r} is not empty any more",
                    "somebody filled it during the restore",
                    "Nothing of it was touched, and what was restored is removed. Say --replace to replace it.",
                )
            self._mark(connection, restored)
            if old:
                rows(connection, f"create database {aside}")
                restored.made_aside = True
            renames = [f"{final}.{quoted(name)} to {aside}.{quoted(name)}" for name in old]
            renames += [f"{temporary}.{quoted(name)} to {final}.{quoted(name)}" for name in new]
            with self._without_triggers(connection, restored.final):
                if renames:
                    rows(connection, "rename table " + ", ".join(renames))
                restored.swapped = True
            self._drop_code(connection, restored.final)
            rows(connection, f"drop database {temporary}")
            restored.made_temporary = False

    @contextlib.contextmanager
    def _without_triggers(self, connection: Connection[Cursor], database: str) -> Iterator[None]:
        """Drop the triggers of a database, whose tables can't be renamed elsewhere with them; back if that fails."""
        query = "select trigger_name from information_schema.triggers where trigger_schema = %s"
        names = [str(name) for (name,) in rows(connection, query, (database,))]
        texts = [
            (mode, str(text))
            for name in names
            for _, mode, text, *_ in rows(connection, f"show create trigger {quoted(database)}.{quoted(name)}")
        ]
        try:
            for name in names:
                rows(connection, f"drop trigger {quoted(database)}.{quoted(name)}")
            yield
        except BaseException:
            connection.select_db(database)
            for mode, text in texts:
                with contextlib.suppress(Exception):  # one that is still there
                    rows(connection, "set session sql_mode = %s", (mode,))
                    rows(connection, text)
            raise

    def _drop_code(self, connection: Connection[Cursor], database: str) -> None:
        """Drop the views, routines and events of the tables that were there."""
        for kind, query in (
            ("view", "select table_name from information_schema.views where table_schema = %s"),
            ("event", "select event_name from information_schema.events where event_schema = %s"),
        ):
            for (name,) in rows(connection, query, (database,)):
                rows(connection, f"drop {kind} {quoted(database)}.{quoted(name)}")
        routines = "select routine_type, routine_name from information_schema.routines where routine_schema = %s"
        for kind, name in rows(connection, routines, (database,)):
            rows(connection, f"drop {kind} {quoted(database)}.{quoted(name)}")

    def commit(self) -> None:
        """See ``RestoreTarget.commit``."""
        with self._statements("finish the restore") as connection:
            for restored in self._restored:
                rows(connection, f"drop table {quoted(restored.final)}.{quoted(MARKER)}")
                restored.marked = restored.made_final = restored.swapped = False
                if restored.made_aside:
                    rows(connection, f"drop database {quoted(restored.aside)}")
        if self._options.only:
            self.remarks.append("only some tables have their rows; foreign keys were not checked")

    def abort(self) -> None:
        """See ``RestoreTarget.abort``. Only what this restore made is dropped."""
        for restored in self._restored:
            with contextlib.suppress(Exception), self._statements("clean up") as connection:
                if restored.made_temporary:
                    rows(connection, f"drop database {quoted(restored.temporary)}")
                    restored.made_temporary = False
                if restored.made_aside and not restored.swapped:
                    rows(connection, f"drop database {quoted(restored.aside)}")  # nothing came into it
                    restored.made_aside = False
                if restored.made_aside:
                    self.remarks.append(
                        f"The new tables are in {restored.final!r}, without all of their views and routines; those "
                        f"that were there are in {restored.aside!r}."
                    )
                elif not self._is_ours(connection, restored):
                    if restored.marked:
                        rows(connection, f"drop table {quoted(restored.final)}.{quoted(MARKER)}")
                elif restored.made_final:
                    rows(connection, f"drop database {quoted(restored.final)}")
                elif restored.marked:
                    # It was there, and empty, when this began.
                    self._drop_code(connection, restored.final)
                    for name in (*_tables(connection, restored.final), MARKER):
                        rows(connection, f"drop table {quoted(restored.final)}.{quoted(name)}")
                restored.made_final = restored.marked = False
            if restored.made_temporary:
                self.remarks.append(f"Left behind, half restored: the database {restored.temporary!r}; drop it.")

    def _is_ours(self, connection: Connection[Cursor], restored: _Restored) -> bool:
        """Tell whether a database holds nothing but what this restore put there.

        That is nothing before the tables were renamed, but for a database that is restored in place.
        """
        recorded = {table.name for table in restored.record.tables}
        own = recorded if restored.swapped or restored.in_place else set()
        return set(_tables(connection, restored.final)) <= own

    @contextlib.contextmanager
    def _statements(self, what: str) -> Iterator[Connection[Cursor]]:
        import pymysql

        with contextlib.closing(self.server.connect()) as connection:
            try:
                rows(connection, "set session foreign_key_checks = 0, max_statement_time = 0")
                rows(connection, f"set session lock_wait_timeout = {_LOCK_PATIENCE}")
                yield connection
            except pymysql.Error as error:
                raise TargetError(
                    f"Could not {what} at {self.server.address}",
                    questions.words(error),
                    "Check the privileges of the account, and the server's log.",
                ) from error


class _Script:
    """A dump on its way into the client: tells the tables as they pass, and leaves out those that nobody wants.

    In a dump no line of rows begins with ``-- ``: line ends within values are escaped. See ``Target``.
    """

    def __init__(self, target: CommandTarget, on_table: Callable[[str], None], only: Sequence[str]) -> None:
        self.name = target.name
        self._target = target
        self._on_table = on_table
        self._only = [quoted(name).encode() for name in only]
        self._wanted = True
        self._line = b""

    def start(self, raw_size: int, group: Supervisor) -> None:
        """See ``Target.start``."""
        self._target.start(raw_size, group)

    def write(self, data: memoryview) -> None:
        """See ``Target.write``."""
        content = self._line + bytes(data)
        position = 0
        for match in _HEADING.finditer(content):
            start = match.start() + 1
            self._pass(content[position:start])
            position = start
            table = match[1]
            self._wanted = not self._only or table is None or table in self._only
            if table is not None:
                self._on_table(table.decode(errors="replace").strip("`"))
        # What may be the beginning of a heading waits for its rest; lines of rows, however long, do not.
        end = content.rfind(b"\n", position)
        last = content[end:] if end >= 0 else b""
        if end < 0 or len(last) > _LONGEST_HEADING or not any(_may_become(last, h) for h in _HEADINGS):
            end = len(content)
        self._pass(content[position:end])
        self._line = content[max(end, position) :]

    def _pass(self, piece: bytes) -> None:
        if self._wanted and piece:
            self._target.write(memoryview(piece))

    def commit(self) -> None:
        """See ``Target.commit``."""
        self._pass(self._line)
        self._target.commit()

    def abort(self) -> None:
        """See ``Target.abort``."""
        self._target.abort()


_HEADINGS = (b"\n-- Dumping data for table `", b"\n/*!40103 SET TIME_ZONE=@OLD_TIME_ZONE */")
_LONGEST_HEADING = 1024
# A table's rows begin; or, without a name, something that is no table's.
_HEADING = re.compile(rb"\n(?:-- Dumping data for table (`.*`)\n|/\*!40103 SET TIME_ZONE=@OLD_TIME_ZONE \*/)")


def _may_become(text: bytes, heading: bytes) -> bool:
    return text.startswith(heading) or heading.startswith(text)


def _tables(connection: Connection[Cursor], database: str) -> list[str]:
    """Return what ``RENAME TABLE`` can rename: tables and sequences."""
    query = (
        "select table_name from information_schema.tables where table_schema = %s"
        " and table_type not in ('VIEW', 'SYSTEM VIEW') and table_name <> %s"
    )
    return [str(name) for (name,) in rows(connection, query, (database, MARKER))]
