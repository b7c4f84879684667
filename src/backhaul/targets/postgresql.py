"""PostgreSQL as a target: a database restored beside what is there, and renamed into place when it is whole.

Each database is restored under a name that says so (``app_restoring_20261121T020000Z``). Only when every stream was
right is it renamed, in one transaction with the old one, so that nobody ever sees a half one under the real name.
"""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from backhaul.databases import postgresql as questions
from backhaul.databases.postgresql import PostgreSQLServer, ServerFacts, quoted
from backhaul.databases.prerequisites import Prerequisites, Program, shortened
from backhaul.errors import BackhaulError, ConfigurationError, TargetError, UsageError
from backhaul.formats.sql_script import split_statements
from backhaul.model.manifest import (
    AFTER,
    DATA,
    GLOBALS,
    SCHEMA,
    WHOLE,
    DatabaseRecord,
    SourceRecord,
    StreamRecord,
    TableRecord,
)
from backhaul.model.source_url import SourceUrl
from backhaul.planning.foreign_keys import have_circles
from backhaul.processes.run import run_program
from backhaul.targets.base import Target
from backhaul.targets.command import CommandTarget
from backhaul.targets.in_memory import InMemoryTarget, memory_file
from backhaul.targets.sections import Phase, Step, TextTarget

if TYPE_CHECKING:
    from psycopg import Connection

_LONGEST_NAME = 63
_RENAME_PATIENCE = 60.0
# Lines of a listing that are made one after the other where foreign keys go in circles.
_WITH_FOREIGN_KEYS = re.compile(rb"^\d+; \d+ \d+ (?:FK CONSTRAINT|COMMENT|EVENT TRIGGER) ")
# What comes after the rows is definitions; kept in memory, so that pg_restore can work on it side by side.
_MOST_IN_MEMORY = 256 << 20
_TABLE_BEGUN = re.compile(rb'processing data for table "(.*)"')
_NEWS = re.compile(rb"(warning|error|fatal|hint|detail|command was|panic)\b", re.IGNORECASE)
_ROLE = re.compile(r'(CREATE|ALTER) ROLE ("(?:[^"]|"")*"|[^\s;]+)', re.IGNORECASE)
_LOCALE_UNKNOWN = ("42809", "22023")  # wrong object type, invalid parameter value
_MEMBERSHIP = re.compile(r'GRANT (?:"(?:[^"]|"")*"|\S+) TO ("(?:[^"]|"")*"|[^\s;]+)', re.IGNORECASE)
_SAFE_WHEN_THERE = ("42710", "42P06", "42P04")  # duplicate object, schema, database


class PostgreSQLRestoreOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to restore.

    Attributes:
        replace: whether a database that is not empty may be replaced.
        only: tables whose rows to restore, as ``table`` or ``schema.table``; none for all.
        globals_: whether roles (and tablespaces) that the server lacks are made from the backup.
        no_owner: whether everything belongs to the account that restores, and grants are left out.
        tablespaces: whether ``globals_`` makes tablespaces too: directories, outside the server's own.
    """

    replace: bool = False
    only: tuple[str, ...] = ()
    globals_: bool = False
    no_owner: bool = False
    tablespaces: bool = True


class _Restored(msgspec.Struct, kw_only=True):
    """A database on its way."""

    record: DatabaseRecord
    final: str
    temporary: str
    streams: list[StreamRecord]
    chosen: list[TableRecord] = []
    made: bool = False
    no_tablespaces: bool = False


class PostgreSQLRestore:
    """See the module, and ``RestoreTarget``.

    Args:
        url: the server, and the name of the database; without a name the recorded ones are taken.
        options: how to restore.
        on_error_line: told each line of the programs' stderr that is news.
        on_table: told each table as its rows begin.
    """

    def __init__(
        self,
        url: SourceUrl,
        options: PostgreSQLRestoreOptions,
        *,
        on_error_line: Callable[[bytes], None] | None = None,
        on_table: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.name = url.text
        self.remarks: list[str] = []
        self.shortfalls: list[str] = []
        self._ended: dict[str, int] = {}
        self.server = PostgreSQLServer(url)
        self._url = url
        self._options = options
        self._on_error_line = on_error_line
        self._on_table = on_table
        self._program: Program | None = None
        self._facts: ServerFacts | None = None
        self._restored: list[_Restored] = []
        self._globals: StreamRecord | None = None

    # -- before a byte is read -------------------------------------------------------------------------

    def check(self, source: SourceRecord, streams: Sequence[StreamRecord], suffix: str = "backhaul") -> None:
        """See ``RestoreTarget.check``; ``suffix`` ends the temporary names."""
        self._facts = facts = self.server.facts()
        missing = Prerequisites(f"A restore into {self.name}")
        wanted = int(source.server.partition(".")[0] or 0)
        if facts.major < wanted:
            missing.add(
                f"a PostgreSQL server of version {wanted} or newer",
                f"the backup is of {source.server}, and this server is {facts.version}",
                "Restore into a newer server.",
            )
        tool = int(source.tools.get("pg_dump", source.server).partition(".")[0])
        self._program = self.server.client("pg_restore", max(facts.major, tool), missing)
        self._plan(source, streams, suffix)
        for restored in self._restored:
            self._check_place(restored, missing)
            self._check_needs(restored, missing)
        missing.require()

    def _plan(self, source: SourceRecord, streams: Sequence[StreamRecord], suffix: str) -> None:
        named = self._url.database
        if named and len(source.databases) != 1:
            raise UsageError(
                f"{self.name} names one database",
                f"the backup has {len(source.databases)}: {', '.join(d.name for d in source.databases)}",
                "Leave the name out of the URL, to restore each under its own.",
            )
        if self._options.only and len(source.databases) != 1:
            raise UsageError("--only is for a backup of one database", "this one has several", "Leave --only out.")
        if self._options.only and any(s.part is not None and s.part.section == WHOLE for s in streams):
            raise UsageError(
                "--only can't choose from this backup",
                "it was made with --streams 1: all tables are in one stream",
                "Restore all of it, and copy the table.",
            )
        self._globals = next((s for s in streams if s.part is not None and s.part.section == GLOBALS), None)
        for record in source.databases:
            final = named or record.name
            own = [s for s in streams if s.part is not None and s.part.database == record.name]
            kept = shortened(final, _LONGEST_NAME - len(suffix) - len("_restoring_"))
            restored = _Restored(record=record, final=final, temporary=f"{kept}_restoring_{suffix}", streams=own)
            restored.chosen = [_find_table(record, text) for text in self._options.only]
            self._restored.append(restored)

    def _check_place(self, restored: _Restored, missing: Prerequisites) -> None:
        assert self._facts is not None
        if self.server.exists(restored.final) and not self._options.replace:
            if restored.final in ("postgres", "template1") and self.server.is_empty(restored.final):
                return
            if not self.server.is_empty(restored.final):
                missing.add(
                    f"the database {restored.final!r} to be empty, or not to exist",
                    f"it holds something on the server at {self.server.address}",
                    "Name another one in --into, or say --replace."
                    if self._url.database
                    else "Restore into another server, or say --replace: then all of these are replaced.",
                )
        if self.server.exists(restored.temporary):
            missing.add(
                f"the name {restored.temporary!r}",
                "an interrupted restore of the same backup left it, or another one is under way",
                f"{self.server.psql()} -c 'DROP DATABASE {quoted(restored.temporary)}'",
            )
        aside = _aside(restored)
        if self.server.exists(aside):
            missing.add(
                f"the name {aside!r}",
                f"it is what {restored.final!r} was before an earlier restore replaced it",
                f"Look into it, and: {self.server.psql()} -c 'DROP DATABASE {quoted(aside)}'",
            )
        with self.server.session() as connection:
            may = questions.one_value(
                connection, "select (rolcreatedb or rolsuper)::text from pg_roles where rolname = current_user"
            )
        if may != "true":
            missing.add(
                "the right to create databases",
                f"{self._facts.user} has it not",
                f"{self.server.psql()} -c 'ALTER ROLE {quoted(self._facts.user)} CREATEDB'",
            )

    def _check_needs(self, restored: _Restored, missing: Prerequisites) -> None:
        assert self._facts is not None
        needs = restored.record.needs
        with self.server.session() as connection:
            available = _names(connection, "select name from pg_available_extensions")
            roles = _names(connection, "select rolname from pg_roles")
            tablespaces = _names(connection, "select spcname from pg_tablespace")
        for extension in needs.get("extensions", ()):
            name = extension.partition(" ")[0]
            if name not in available:
                missing.add(
                    f"the extension {name}",
                    f"{restored.record.name!r} uses {extension}, and the server has no such extension to install",
                    f"apt-get install postgresql-{self._facts.major}-{name}  (or the package that holds it)",
                )
        lacking = [role for role in needs.get("roles", ()) if role not in roles]
        if lacking and not (self._options.no_owner or self._options.globals_):
            missing.add(
                f"the role{'s' * (len(lacking) > 1)} {', '.join(lacking)}",
                f"{restored.record.name!r} names them as owners or in grants, and the server has them not",
                "Say --globals, to make them from the backup, or --no-owner, to do without."
                if self._globals is not None
                else "Create them, or say --no-owner to do without.",
            )
        if not (self._facts.superuser or self._options.no_owner):
            with self.server.session() as connection:
                ours = _names(connection, "select rolname from pg_roles where pg_has_role(current_user, oid, 'member')")
            strange = [role for role in needs.get("owners", ()) if role in roles and role not in ours]
            if strange:
                missing.add(
                    f"membership in {', '.join(strange)}",
                    f"objects of {restored.record.name!r} belong to them, and {self._facts.user} can't give them away",
                    "Restore as a superuser, or say --no-owner.",
                )
        gone = [name for name in needs.get("tablespaces", ()) if name not in tablespaces]
        if gone:
            restored.no_tablespaces = True
            self.remarks.append(f"tablespaces that are not here were left out: {', '.join(gone)}")

    # -- the streams -----------------------------------------------------------------------------------

    def phases(self, jobs: int) -> Sequence[Phase]:
        """See ``RestoreTarget.phases``."""
        result: list[Phase] = []
        if self._options.globals_ and self._globals is not None:
            step = Step(self._globals.name, lambda: TextTarget(f"roles of {self.name}", self._make_globals))
            result.append(Phase("roles", (step,)))
        elif self._options.globals_:
            result.append(Phase("roles", (), self._make_plain_roles))
        for restored in self._restored:
            result += self._phases_of(restored, jobs)
        return result

    def _phases_of(self, restored: _Restored, jobs: int) -> list[Phase]:
        label = restored.record.name
        begin = functools.partial(self._create, restored)
        sections: dict[str, list[StreamRecord]] = {}
        for stream in restored.streams:
            assert stream.part is not None
            sections.setdefault(stream.part.section, []).append(stream)
        if WHOLE in sections:
            return [
                Phase(label, tuple(self._step(restored, s, self._options_of(restored)) for s in sections[WHOLE]), begin)
            ]
        schema = tuple(self._step(restored, s, self._options_of(restored)) for s in sections.get(SCHEMA, ()))
        after = tuple(Step(s.name, functools.partial(self._after, restored, s, jobs)) for s in sections.get(AFTER, ()))
        data = sections.get(DATA, [])
        if restored.chosen:
            wanted = {table.stream for table in restored.chosen}
            if any(table.kind == "partitioned" for table in restored.chosen):
                wanted = {s.name for s in data}  # the rows are its partitions', wherever those are
            data = [s for s in data if s.name in wanted or ("" in wanted and s.part is not None and s.part.others)]
        # The largest first: the end of all is the end of the last.
        data = sorted(data, key=lambda s: -s.raw.size)
        rows = tuple(Step(s.name, functools.partial(self._rows, restored, s)) for s in data)
        return [
            Phase(f"{label}: definitions", schema, begin),
            Phase(f"{label}: rows", rows),
            Phase(f"{label}: indexes and constraints", after),
        ]

    def _options_of(self, restored: _Restored) -> list[str]:
        options = []
        if self._options.no_owner:
            options += ["--no-owner", "--no-privileges"]
        if restored.no_tablespaces:
            options.append("--no-tablespaces")
        return options

    def _step(self, restored: _Restored, stream: StreamRecord, options: list[str]) -> Step:
        return Step(stream.name, lambda: self._pipe(restored, stream, options))

    def _rows(self, restored: _Restored, stream: StreamRecord) -> Target:
        options = [*self._options_of(restored), *self._chosen(restored)]
        return self._pipe(restored, stream, options, may_stop_early=bool(restored.chosen))

    def _pipe(
        self, restored: _Restored, stream: StreamRecord, options: list[str], *, may_stop_early: bool = False
    ) -> Target:
        return CommandTarget(
            self._command(restored, options),
            self._on_error_line,
            name=f"pg_restore into {restored.final} ({stream.name})",
            is_chatter=self._listen,
            environment=self._environment(),
            discard_output=True,
            may_stop_early=may_stop_early,
        )

    def _after(self, restored: _Restored, stream: StreamRecord, jobs: int) -> Target:
        if stream.raw.size > _MOST_IN_MEMORY:
            if restored.chosen:
                self.remarks.append("foreign keys were tried too: there are too many definitions to choose from")
            return self._pipe(restored, stream, self._options_of(restored))
        return InMemoryTarget(
            f"pg_restore into {restored.final} ({stream.name})",
            functools.partial(self._restore_after, restored, jobs),
        )

    def _restore_after(self, restored: _Restored, jobs: int, archive: str) -> None:
        """Restore an archive that can be read at random, side by side; of chosen tables without what needs others."""
        options = [*self._options_of(restored), f"--jobs={jobs}"]
        listing = self._read_archive("--list", archive)
        if not restored.chosen:
            # What hangs on foreign keys goes with them: comments, and event triggers, which would see them made.
            late = [line for line in listing if _WITH_FOREIGN_KEYS.search(line)]
            if jobs == 1 or not self._have_circles(late, archive):
                self._run(restored, [*options, archive])
                return
            rest = [line for line in listing if line not in set(late)]
            for lines, how in ((rest, options), (late, self._options_of(restored))):
                with memory_file(b"\n".join(lines) + b"\n") as use_list:
                    self._run(restored, [*how, f"--use-list={use_list}", archive])
            return
        kept = [line for line in listing if b" FK CONSTRAINT " not in line and b" MATERIALIZED VIEW DATA " not in line]
        with memory_file(b"\n".join(kept) + b"\n") as use_list:
            self._run(restored, [*options, f"--use-list={use_list}", archive])
        self.remarks.append(
            "only some tables have their rows: foreign keys were left out, materialised views are not filled"
        )

    def _have_circles(self, late: list[bytes], archive: str) -> bool:
        keys = [line for line in late if b" FK CONSTRAINT " in line]
        if len(keys) < 2:
            return False
        with memory_file(b"\n".join(keys) + b"\n") as use_list:
            return have_circles(b"\n".join(self._read_archive("--file=-", f"--use-list={use_list}", archive)))

    def _read_archive(self, *options: str) -> list[bytes]:
        """Return the lines that pg_restore prints of an archive."""
        assert self._program is not None
        return run_program([self._program.path, *options], "pg_restore", environment=self._environment())

    def _run(self, restored: _Restored, options: list[str]) -> None:
        run_program(
            self._command(restored, options),
            f"pg_restore into {restored.final} (indexes and constraints)",
            environment=self._environment(),
            on_error_line=self._on_error_line,
            is_chatter=self._listen,
        )

    def _command(self, restored: _Restored, options: Iterable[str]) -> list[str]:
        assert self._program is not None
        target = self.server.conninfo(restored.temporary)
        return [self._program.path, "-w", "--exit-on-error", "--verbose", "-d", target, *options]

    def _environment(self) -> dict[str, str]:
        # A crash of the server in the middle costs the restore in any case: it need not wait for each commit's disk.
        return self.server.environment(PGOPTIONS="-c synchronous_commit=off -c statement_timeout=0")

    def _listen(self, line: bytes) -> bool:
        begun = _TABLE_BEGUN.search(line)
        if begun is not None:
            self._on_table(begun[1].decode(errors="replace"))
        # (Its workers write into one pipe, and into each other's lines.)
        return (b"pg_restore:" in line or line.startswith(b" ")) and not _NEWS.search(line)

    def _chosen(self, restored: _Restored) -> list[str]:
        """Return the options that restore the rows of the chosen tables, their partitions and their sequences."""
        if not restored.chosen:
            return []
        names = {questions.unquoted(table.name) for table in restored.chosen}
        with self.server.session(restored.temporary) as connection:
            for table in restored.chosen:
                found = connection.execute(
                    """select n.nspname, c.relname from pg_depend d join pg_class c on c.oid = d.objid
                       join pg_namespace n on n.oid = c.relnamespace
                       where d.refobjid = %s::regclass and c.relkind = 'S' and d.deptype in ('a', 'i')
                       union select n.nspname, c.relname from pg_partition_tree(%s::regclass) p
                       join pg_class c on c.oid = p.relid join pg_namespace n on n.oid = c.relnamespace""",
                    (table.name, table.name),
                )
                names.update((str(schema), str(name)) for schema, name in found)
        schemas = sorted({schema for schema, _ in names})
        recorded = {questions.unquoted(t.name): t.name for t in restored.record.tables if t.kind == "table"}
        besides = [
            name
            for (schema, table), name in recorded.items()
            if schema in schemas and table in {n for _, n in names} and (schema, table) not in names
        ]
        if besides:
            self.remarks.append(f"restored besides, since their names are the same: {', '.join(besides)}")
        return [
            *(f"--schema={schema}" for schema in schemas),
            *(f"--table={name}" for _, name in sorted(names)),
        ]

    # -- before and after ------------------------------------------------------------------------------

    def _make_globals(self, script: str) -> None:
        """Make the roles and tablespaces that the server lacks; those that it has stay as they are."""
        import psycopg

        with self.server.session() as connection:
            present = _names(connection, "select rolname from pg_roles")
            for statement in split_statements(script):
                role = _ROLE.match(statement)
                if role is not None and _unquoted(role[2]) in present:
                    continue
                if statement.upper().startswith(("SET ", "SELECT ")):
                    continue
                member = _MEMBERSHIP.match(statement)
                if member is not None and _unquoted(member[1]) in present:
                    continue  # what an account that is here may do is not the backup's to say
                if not self._options.tablespaces and " TABLESPACE " in statement.upper():
                    continue
                try:
                    connection.execute(statement.encode(errors="surrogateescape"))
                except psycopg.Error as error:
                    if error.sqlstate not in _SAFE_WHEN_THERE:
                        what = " ".join(statement.split()[:3])
                        self.shortfalls.append(f"{what}: {str(error).splitlines()[0]}")

    def _make_plain_roles(self) -> None:
        """Make the roles that the server lacks by their names: a backup of a single stream has no more of them."""
        import psycopg

        wanted = {role for restored in self._restored for role in restored.record.needs.get("roles", ())}
        with contextlib.closing(self.server.connect(self.server.maintenance)) as connection:
            lacking = sorted(wanted - _names(connection, "select rolname from pg_roles"))
            try:
                for role in lacking:
                    connection.execute(f"create role {quoted(role)}".encode())
            except psycopg.Error as error:
                raise TargetError(
                    f"Could not make the roles that the backup names at {self.server.address}",
                    str(error).strip(),
                    "Make them by hand, or say --no-owner.",
                ) from error
        if lacking:
            self.remarks.append(f"the backup has no roles (--streams 1): made without rights: {', '.join(lacking)}")

    def _create(self, restored: _Restored) -> None:
        import psycopg

        properties = restored.record.properties
        statement = f"create database {quoted(restored.temporary)} template template0"
        if properties:
            statement += f" encoding {_literal(properties['encoding'])}"
            statement += f" lc_collate {_literal(properties['collate'])} lc_ctype {_literal(properties['ctype'])}"
            if properties.get("provider") == "icu" and self._facts is not None and self._facts.major >= 15:
                statement += f" locale_provider icu icu_locale {_literal(properties['locale'])}"
            if properties.get("provider") == "builtin":
                statement += f" locale_provider builtin builtin_locale {_literal(properties['locale'])}"
        try:
            with contextlib.closing(self.server.connect(self.server.maintenance)) as connection:
                connection.execute(statement.encode())
                restored.made = True
            if properties and "public" not in restored.record.needs.get("schemas", ()):
                # The template has it, and the source had it not.
                with contextlib.closing(self.server.connect(restored.temporary)) as connection:
                    connection.execute("drop schema public")
        except psycopg.Error as error:
            if error.sqlstate in _LOCALE_UNKNOWN and "locale" in str(error):
                raise ConfigurationError(
                    f"The server at {self.server.address} lacks a locale of {restored.record.name!r}",
                    str(error).strip(),
                    "Install it there (dpkg-reconfigure locales), restart the server, and restore again.",
                ) from error
            raise TargetError(
                f"Could not create a database at {self.server.address}",
                str(error).strip(),
                "See the server's log, and the rights of the account.",
            ) from error

    def commit(self) -> None:
        """See ``RestoreTarget.commit``."""
        import psycopg

        old: list[str] = []
        try:
            for restored in self._restored:
                self._settle(restored)
            self._rename(old)
        except psycopg.Error as error:
            raise TargetError(
                f"Could not give the restored database its name at {self.server.address}",
                str(error).strip(),
                "Nothing of what was there is lost. See who is connected, and restore again.",
            ) from error
        self.remarks += [f"sessions on {name} were ended: {count}" for name, count in self._ended.items() if count]
        for name in old:
            try:
                with contextlib.closing(self.server.connect(self.server.maintenance)) as connection:
                    connection.execute(f"drop database {quoted(name)}".encode())
            except (psycopg.Error, BackhaulError) as error:
                self.remarks.append(f"the old database is still there, as {name!r}: {error}")

    def _rename(self, old: list[str]) -> None:
        """Rename everything in one transaction; names of what was there go into ``old``.

        Raises:
            TargetError: somebody filled it meanwhile.
            psycopg.Error: the server refused, for a minute.
        """
        import psycopg

        deadline = time.monotonic() + _RENAME_PATIENCE
        busy = False
        while True:
            old.clear()
            for restored in self._restored:
                self._check_still_empty(restored)
            try:
                # Closed only if it has to be: a crash in that moment would leave it so.
                with self._closed() if busy else contextlib.nullcontext():
                    self._rename_once(old)
                return
            except psycopg.errors.ObjectInUse:  # a session that came, or is not quite gone
                if time.monotonic() > deadline:
                    raise
                busy = True

    def _check_still_empty(self, restored: _Restored) -> None:
        there = self.server.exists(restored.final)
        if there and not self._options.replace and not self.server.is_empty(restored.final):
            raise TargetError(
                f"The database {restored.final!r} is not empty any more",
                "somebody filled it during the restore",
                "Nothing of it was touched, and what was restored is removed. Say --replace to replace it.",
            )

    def _rename_once(self, old: list[str]) -> None:
        # (A database can't be renamed from within.)
        with contextlib.closing(self.server.connect("template1", autocommit=False)) as connection:
            for restored in self._restored:
                if self._there(connection, restored.final):
                    old.append(self._set_aside(connection, restored))
                connection.execute(
                    f"alter database {quoted(restored.temporary)} rename to {quoted(restored.final)}".encode()
                )
            connection.commit()
        for restored in self._restored:
            restored.made = False

    @staticmethod
    def _there(connection: Connection[Any], name: str) -> bool:
        return connection.execute("select 1 from pg_database where datname = %s", (name,)).fetchone() is not None

    def _set_aside(self, connection: Connection[Any], restored: _Restored) -> str:
        """Rename what has the name, in the transaction that renames the new one; end its sessions if it may go."""
        aside = _aside(restored)
        ended = connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", (restored.final,)
        ).rowcount
        self._ended[restored.final] = self._ended.get(restored.final, 0) + max(0, ended)
        connection.execute(f"alter database {quoted(restored.final)} rename to {quoted(aside)}".encode())
        return aside

    @contextlib.contextmanager
    def _closed(self) -> Iterator[None]:
        """Let nobody in who would come back at once, as pools do, while databases are renamed."""
        import psycopg

        def allow(connection: Connection[Any], name: str, *, connections: bool) -> None:
            with contextlib.suppress(psycopg.Error):  # it is not there, or not this account's
                word = "true" if connections else "false"
                connection.execute(f"alter database {quoted(name)} with allow_connections {word}".encode())

        with contextlib.closing(self.server.connect("template1")) as connection:
            there = [restored for restored in self._restored if self._there(connection, restored.final)]
            for restored in there:
                allow(connection, restored.final, connections=False)
            try:
                yield
            finally:
                for restored in there:
                    for name in (restored.final, _aside(restored)):
                        allow(connection, name, connections=True)

    def _settle(self, restored: _Restored) -> None:
        """Give the database its owner, grants and settings."""
        import psycopg

        owner = None if self._options.no_owner else restored.record.properties.get("owner")
        name = quoted(restored.temporary)
        statements = [
            statement.replace("{database}", name)
            for statement in restored.record.settings
            if not self._options.no_owner or statement.startswith(("ALTER DATABASE", "COMMENT"))
        ]
        statements.append(f"ALTER DATABASE {name} OWNER TO {quoted(owner)}" if owner else "")
        with contextlib.closing(self.server.connect(self.server.maintenance)) as connection:
            for statement in filter(None, statements):
                try:
                    connection.execute(statement.encode())
                except psycopg.Error as error:
                    what = statement.replace(name, quoted(restored.final))
                    self.shortfalls.append(f"{what}: {str(error).splitlines()[0]}")

    def abort(self) -> None:
        """See ``RestoreTarget.abort``."""
        for restored in self._restored:
            if not restored.made:
                continue
            with (
                contextlib.suppress(Exception),
                contextlib.closing(self.server.connect(self.server.maintenance)) as connection,
            ):
                connection.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", (restored.temporary,)
                )
                connection.execute(f"drop database {quoted(restored.temporary)}".encode())
                restored.made = False
        left = [restored.temporary for restored in self._restored if restored.made]
        if left:
            self.remarks.append(f"Left behind, half restored: {', '.join(left)}; drop it.")


def _aside(restored: _Restored) -> str:
    """Return the name that what is replaced has until it is dropped."""
    return restored.temporary.replace("_restoring_", "_replaced_")


def _find_table(record: DatabaseRecord, text: str) -> TableRecord:
    """Return the table that somebody means.

    Raises:
        UsageError: there is none, or several.
    """
    tables = [table for table in record.tables if table.kind in ("table", "partitioned")]
    found = [
        table
        for table in tables
        if text in (table.name, questions.unquoted(table.name)[1], ".".join(questions.unquoted(table.name)))
    ]
    if len(found) == 1:
        return found[0]
    near = [table.name for table in tables if text.rpartition(".")[2].lower() in table.name.lower()]
    raise UsageError(
        f"--only {text!r} means no single table of {record.name!r}",
        f"{', '.join(table.name for table in found)} have that name" if found else "there is none of that name",
        f"Name it with its schema; there are: {', '.join((near or [t.name for t in tables])[:10])}",
    )


def _unquoted(name: str) -> str:
    return name[1:-1].replace('""', '"') if name.startswith('"') else name


def _names(connection: Connection[Any], query: Any) -> set[str]:
    return {str(name) for (name,) in connection.execute(query)}


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
