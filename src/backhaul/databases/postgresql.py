"""A PostgreSQL server: how to reach it, which programs fit it, and the questions that are asked of it.

Connection settings are libpq's (its environment, ``~/.pgpass``, service files); a URL adds to them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, LiteralString

import msgspec

from backhaul.databases.prerequisites import Prerequisites, Program, find_program, read_password
from backhaul.errors import ConfigurationError, SourceError
from backhaul.model.manifest import DatabaseRecord, TableRecord
from backhaul.model.source_url import SourceUrl

if TYPE_CHECKING:
    from psycopg import Connection

_CONNECT_TIMEOUT = 15
# Where packages put the programs of each major version.
_DIRECTORIES = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/usr/local/pgsql*/bin", "/opt/homebrew/opt/*/bin")
_FIRST_LINES = 3
# What libpq would else take from its environment.
_ISOLATED = {
    "hostaddr": "",
    "sslmode": "disable",
    "gssencmode": "disable",
    "passfile": "/nonexistent/pgpass",
    "options": " ",
    "target_session_attrs": "any",
}


# What recovery compares with the server that wrote the WAL, and what extensions need to be there.
LIMITS = ("max_connections", "max_prepared_transactions", "max_worker_processes", "max_locks_per_transaction")
KEPT_SETTINGS = (*LIMITS, "shared_preload_libraries")


class ServerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a server says of itself."""

    version: str
    number: int
    user: str
    superuser: bool
    replication: bool
    sees_everything: bool
    recovery: bool
    settings: Mapping[str, str]

    @property
    def major(self) -> int:
        """The major version."""
        return self.number // 10000

    @property
    def kept_settings(self) -> dict[str, str]:
        """What another server needs to run the same data: limits, libraries."""
        return {name: self.settings[name] for name in KEPT_SETTINGS if self.settings.get(name)}


class PostgreSQLServer:
    """See the module. Connects anew for each question; nothing is kept open.

    Raises:
        ConfigurationError: libpq is not installed, or the password file can't be read.
    """

    def __init__(self, url: SourceUrl) -> None:
        try:
            import psycopg
        except ImportError as error:
            raise ConfigurationError(
                "PostgreSQL's client library is missing", str(error), "apt-get install libpq5"
            ) from error
        self.url = url
        self._psycopg = psycopg
        self._parameters: dict[str, Any] = dict(url.options)
        if url.host:
            self._parameters["host"] = url.host
        if url.port is not None:
            self._parameters["port"] = str(url.port)
        if url.user:
            self._parameters["user"] = url.user
        if url.isolated:
            self._parameters |= _ISOLATED
        self._password = read_password(url.password_file) if url.password_file else None
        # Whichever database is always there to be asked; PGDATABASE would name the one that is backed up.
        self.maintenance = "postgres"

    @property
    def address(self) -> str:
        """Where the server is, for records and messages."""
        host = self._parameters.get("host") or os.environ.get("PGHOST") or "local socket"
        port = self._parameters.get("port") or os.environ.get("PGPORT") or "5432"
        return f"{host}:{port}"

    def connect(self, database: str, *, autocommit: bool = True, **parameters: str) -> Connection[Any]:
        """Connect to a database.

        Raises:
            ConfigurationError: the server can't be reached, or refuses.
        """
        given = {**self._parameters, **({"password": self._password} if self._password else {}), **parameters}
        given.setdefault("connect_timeout", _CONNECT_TIMEOUT)
        given.setdefault("application_name", "backhaul")
        try:
            return self._psycopg.connect(dbname=database, autocommit=autocommit, **given)
        except self._psycopg.Error as error:
            raise ConfigurationError(
                f"Could not connect to PostgreSQL at {self.address}, database {database!r}",
                _words(error),
                "Check host, port and user in the URL; passwords come from ~/.pgpass, PGPASSWORD, or "
                "?password-file=FILE.",
            ) from error

    @contextlib.contextmanager
    def session(self, database: str | None = None) -> Iterator[Connection[Any]]:
        """Connect for a few questions.

        Raises:
            ConfigurationError: the server can't be reached, or refuses an answer.
        """
        with contextlib.closing(self.connect(database or self.maintenance)) as connection:
            try:
                yield connection
            except self._psycopg.Error as error:
                raise ConfigurationError(
                    f"PostgreSQL at {self.address} refused a question",
                    _words(error),
                    "Check the privileges of the account.",
                ) from error

    def psql(self, database: str | None = None) -> str:
        """Return how a person talks to this very server: the beginning of a command that is proposed to him."""
        words = ["psql"]
        for option, name in (("-h", "host"), ("-p", "port"), ("-U", "user")):
            if value := self._parameters.get(name):
                words += [option, str(value)]
        return shlex.join([*words, "-d", database or self.maintenance])

    def conninfo(self, database: str) -> str:
        """Return what programs take with ``-d``: no secret is in it."""
        from psycopg.conninfo import make_conninfo

        return make_conninfo(dbname=database, **self._parameters)

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment of programs: the password, English messages, and no time limit from outside."""
        inherited = {k: v for k, v in os.environ.items() if not (self.url.isolated and k.startswith("PG"))}
        environment = {**inherited, "LC_ALL": "C.UTF-8", "PGAPPNAME": "backhaul", **more}
        environment.pop("LANGUAGE", None)
        if self._password:
            environment["PGPASSWORD"] = self._password
        return environment

    # -- questions -------------------------------------------------------------------------------------

    def facts(self) -> ServerFacts:
        """Ask for version, account and settings. Raises as ``session`` does."""
        with self.session() as connection:
            row = _one(
                connection,
                """select current_setting('server_version'), current_setting('server_version_num')::int, current_user,
                   rolsuper, rolreplication or rolsuper, rolbypassrls or rolsuper, pg_is_in_recovery()
                   from pg_roles where rolname = current_user""",
            )
            settings = dict(
                _all(
                    connection,
                    """select name, setting from pg_settings where name = any(array['wal_level', 'max_wal_senders',
                       'data_directory', 'archive_mode', 'data_checksums', 'max_connections',
                       'max_prepared_transactions', 'max_worker_processes', 'max_locks_per_transaction',
                       'shared_preload_libraries'])""",
                )
            )
        version, number, user, superuser, replication, bypass, recovery = row
        return ServerFacts(
            version=version,
            number=number,
            user=user,
            superuser=superuser,
            replication=replication,
            sees_everything=bypass,
            recovery=recovery,
            settings=settings,
        )

    def databases(self) -> list[tuple[str, int]]:
        """Return names and sizes of the databases that hold data: all but the two templates, and closed ones."""
        with self.session() as connection:
            return [
                (name, int(size))
                for name, size in _all(
                    connection,
                    """select datname, coalesce(case when has_database_privilege(datname, 'connect')
                       then pg_database_size(datname) end, 0)
                       from pg_database where datallowconn and datname not in ('template0', 'template1')
                       order by datname""",
                )
            ]

    def closed_to_us(self) -> list[str]:
        """Return the databases that this account may not connect to."""
        with self.session() as connection:
            query: LiteralString = """select datname from pg_database where datallowconn
                and datname not in ('template0', 'template1') and not has_database_privilege(datname, 'connect')"""
            return [name for (name,) in _all(connection, query)]

    def exists(self, database: str) -> bool:
        """Tell whether there is a database of that name."""
        with self.session() as connection:
            return bool(_all(connection, "select 1 from pg_database where datname = %s", (database,)))

    def is_empty(self, database: str) -> bool:
        """Tell whether a database holds nothing that anybody made."""
        with self.session(database) as connection:
            return not _all(connection, _ANYTHING)

    def client(self, name: str, wanted: int, missing: Prerequisites) -> Program | None:
        """Return a client program that can talk to a server of that major version: the same, or the next newer one."""
        programs = installed(name)
        fitting = [program for program in programs if program.major >= wanted]
        if fitting:
            return fitting[0]
        if programs:
            newest = programs[-1]
            missing.add(
                f"a {name} of version {wanted} or newer",
                f"the server is of version {wanted}, and {newest.path} of {newest.version}: it refuses newer servers",
                f"apt-get install postgresql-client-{wanted}",
            )
        else:
            missing.program(name)
        return None


def installed(name: str) -> list[Program]:
    """Return the programs of that name on this host, the oldest first."""
    directories = sorted({str(found) for pattern in _DIRECTORIES for found in Path("/").glob(pattern[1:])})
    programs = [program for directory in directories if (program := find_program(name, (directory,))) is not None]
    on_path = find_program(name)
    if on_path is not None:
        programs.append(on_path)
    unique = {program.path: program for program in programs}
    # (Debian's /usr/bin/pg_dump is a wrapper that picks by its own rules: named programs come first.)
    return sorted(unique.values(), key=lambda program: (program.major, program.path.startswith("/usr/bin")))


# -- what a database holds -----------------------------------------------------------------------------

_ANYTHING: LiteralString = """
select 1 from pg_class c join pg_namespace n on n.oid = c.relnamespace
 where n.nspname not like 'pg\\_%' and n.nspname <> 'information_schema'
union all select 1 from pg_namespace where nspname not like 'pg\\_%' and nspname not in ('information_schema', 'public')
union all select 1 from pg_largeobject_metadata
union all select 1 from pg_proc p join pg_namespace n on n.oid = p.pronamespace
 where n.nspname not like 'pg\\_%' and n.nspname <> 'information_schema'
union all select 1 from pg_type t join pg_namespace n on n.oid = t.typnamespace
 where n.nspname not like 'pg\\_%' and n.nspname <> 'information_schema'
limit 1"""

# Tables, those whose rows are in partitions, materialised views, sequences; what extensions brought is theirs.
TABLES: LiteralString = """
select format('%I.%I', n.nspname, c.relname), c.relkind::text,
       coalesce(case when c.relkind in ('r', 'm') then pg_table_size(c.oid) end, 0),
       exists (select 1 from pg_depend d
                where d.classid = 'pg_class'::regclass and d.objid = c.oid and d.deptype = 'e')
  from pg_class c join pg_namespace n on n.oid = c.relnamespace
 where (c.relkind in ('r', 'p', 'S') or (c.relkind = 'm' and c.relispopulated)) and c.relpersistence <> 't'
   and n.nspname not like 'pg\\_%' and n.nspname <> 'information_schema'
 order by 1"""

_DATABASE: LiteralString = """
select pg_get_userbyid(datdba), pg_encoding_to_char(encoding), datcollate, datctype,
       coalesce(to_jsonb(d)->>'datlocprovider', 'c'),
       coalesce(to_jsonb(d)->>'daticulocale', to_jsonb(d)->>'datlocale', ''), datconnlimit, datistemplate,
       pg_database_size(oid), coalesce(shobj_description(oid, 'pg_database'), '')
  from pg_database d where datname = current_database()"""

# Statements of the database itself, which an archive restored under another name leaves out.
_SETTINGS: LiteralString = """
select case when s.setrole = 0 then 'ALTER DATABASE {database}'
            else format('ALTER ROLE %I IN DATABASE {database}', pg_get_userbyid(s.setrole)) end
       || format(' SET %I TO %s', split_part(c, '=', 1),
                 case when split_part(c, '=', 1) in ('search_path', 'temp_tablespaces', 'local_preload_libraries',
                                                     'session_preload_libraries', 'shared_preload_libraries')
                           and c not like '%=' and c not like '%=""'
                      then substr(c, strpos(c, '=') + 1)
                      else quote_literal(replace(substr(c, strpos(c, '=') + 1), '""', '')) end)
  from pg_db_role_setting s, unnest(s.setconfig) c
 where s.setdatabase = (select oid from pg_database where datname = current_database())
union all
select format('GRANT %s ON DATABASE {database} TO %s%s', a.privilege_type,
              case when a.grantee = 0 then 'PUBLIC' else quote_ident(pg_get_userbyid(a.grantee)) end,
              case when a.is_grantable then ' WITH GRANT OPTION' else '' end)
  from pg_database d, aclexplode(d.datacl) a where d.datname = current_database()
union all
select 'ALTER DATABASE {database} IS_TEMPLATE true' from pg_database
 where datname = current_database() and datistemplate
union all
select 'COMMENT ON DATABASE {database} IS ' || quote_literal(shobj_description(oid, 'pg_database'))
  from pg_database where datname = current_database() and shobj_description(oid, 'pg_database') is not null"""

_REVOKED: LiteralString = "select datacl is not null from pg_database where datname = current_database()"

_NEEDS: LiteralString = """
select 'extensions', extname || ' ' || extversion from pg_extension where extname <> 'plpgsql'
union
select 'roles', pg_get_userbyid(refobjid) from pg_shdepend
 where refclassid = 'pg_authid'::regclass
   and (dbid = (select oid from pg_database where datname = current_database())
        or (dbid = 0 and classid = 'pg_database'::regclass
            and objid = (select oid from pg_database where datname = current_database())))
union
select 'owners', pg_get_userbyid(refobjid) from pg_shdepend
 where refclassid = 'pg_authid'::regclass and deptype = 'o'
   and dbid = (select oid from pg_database where datname = current_database())
union
select 'roles', pg_get_userbyid(datdba) from pg_database where datname = current_database()
union
select 'tablespaces', spcname from pg_tablespace t
 where exists (select 1 from pg_class c where c.reltablespace = t.oid) and spcname not in ('pg_default', 'pg_global')
union
select 'schemas', nspname from pg_namespace where nspname = 'public'
 order by 1, 2"""


def database_record(connection: Connection[Any], name: str) -> DatabaseRecord:
    """Describe the database that the connection is in, tables and rows aside."""
    owner, encoding, collate, ctype, provider, locale, limit, _template, size, _comment = _one(connection, _DATABASE)
    needs: dict[str, list[str]] = {}
    for kind, need in _all(connection, _NEEDS):
        needs.setdefault(kind, []).append(need)
    settings = [statement for (statement,) in _all(connection, _SETTINGS)]
    if _one(connection, _REVOKED)[0]:
        settings.insert(0, "REVOKE ALL ON DATABASE {database} FROM PUBLIC")
    if limit >= 0:
        settings.append(f"ALTER DATABASE {{database}} CONNECTION LIMIT {limit}")
    return DatabaseRecord(
        name=name,
        size=int(size),
        properties={
            "owner": owner,
            "encoding": encoding,
            "collate": collate,
            "ctype": ctype,
            "provider": {"i": "icu", "b": "builtin"}.get(provider, "libc"),
            "locale": locale,
        },
        settings=tuple(settings),
        needs={kind: tuple(names) for kind, names in needs.items()},
    )


def tables_of(connection: Connection[Any]) -> tuple[list[TableRecord], set[str]]:
    """Return tables, materialised views and sequences; and the names of those that belong to extensions."""
    kinds = {"r": "table", "p": "partitioned", "m": "view", "S": "sequence"}
    rows = _all(connection, TABLES)
    records = [TableRecord(name=name, size=int(size), kind=kinds[kind]) for name, kind, size, _ in rows]
    return records, {name for name, _, _, extension in rows if extension}


def coordinates(connection: Connection[Any]) -> dict[str, str]:
    """Return where in the WAL the server is, and its timeline."""
    lsn, timeline = _one(
        connection,
        """select case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end::text,
           (select timeline_id from pg_control_checkpoint())::text""",
    )
    return {"lsn": lsn, "timeline": timeline}


def never_time_out(connection: Connection[Any]) -> None:
    """Let a session wait as long as a backup takes; but let the server notice if we are gone."""
    connection.execute(
        """select set_config(name, case name when 'client_connection_check_interval' then '10s' else '0' end, false)
           from pg_settings where name = any(array['statement_timeout', 'transaction_timeout', 'idle_session_timeout',
           'idle_in_transaction_session_timeout', 'client_connection_check_interval'])"""
    )


def one_value(connection: Connection[Any], query: LiteralString) -> str:
    """Return the only value of a question's only row."""
    return str(_one(connection, query)[0])


def share_locks(connection: Connection[Any], tables: Sequence[str]) -> None:
    """Keep tables from being dropped, altered or truncated until the transaction ends. Names are quoted already."""
    connection.execute("lock table only " + ", only ".join(tables) + " in access share mode")


def count_rows(connection: Connection[Any], table: TableRecord) -> int:
    """Count a table's rows; its name is quoted already, as ``TABLES`` gives it."""
    return int(_one(connection, "select count(*) from only " + table.name)[0])  # noqa: S608


def quoted(name: str) -> str:
    """Return an identifier in quotes."""
    return '"' + name.replace('"', '""') + '"'


def quoted_always(table: str) -> str:
    """Return a name as ``format('%I.%I')`` gives it with each part in quotes: as patterns of pg_dump want them."""
    parts = re.findall(r'"(?:[^"]|"")*"|[^."]+', table)
    return ".".join(part if part.startswith('"') else f'"{part}"' for part in parts)


def unquoted(table: str) -> tuple[str, str]:
    """Return schema and name of what ``format('%I.%I')`` gave."""
    schema, name = re.findall(r'"(?:[^"]|"")*"|[^."]+', table)
    return _unquote(schema), _unquote(name)


def _unquote(part: str) -> str:
    return part[1:-1].replace('""', '"') if part.startswith('"') else part


def refused(what: str, error: Exception) -> SourceError:
    """Return the error for a server that refuses in the middle of a backup."""
    return SourceError(what, _words(error), "Nothing was committed. See the server's log, and push again.")


def _words(error: Exception) -> str:
    """Return what the server said: the first lines, without the position in our statement."""
    return "\n".join(str(error).strip().splitlines()[:_FIRST_LINES]) or type(error).__name__


def _one(
    connection: Connection[Any], query: LiteralString, parameters: tuple[Any, ...] | None = None
) -> tuple[Any, ...]:
    row = connection.execute(query, parameters).fetchone()
    assert row is not None
    return tuple(row)


def _all(
    connection: Connection[Any], query: LiteralString, parameters: tuple[Any, ...] | None = None
) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in connection.execute(query, parameters).fetchall()]
