"""A MariaDB server (or MySQL): how to reach it, and the questions that are asked of it.

Connection settings are those of the option files (``~/.my.cnf``, groups ``[client]`` and ``[client-mariadb]``); a URL
adds to them.
"""

from __future__ import annotations

import configparser
import contextlib
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from backhaul.databases.prerequisites import read_password
from backhaul.errors import ConfigurationError, SourceError, UsageError
from backhaul.model.manifest import DatabaseRecord, TableRecord
from backhaul.model.source_url import SourceUrl

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

_CONNECT_TIMEOUT = 15
_SOCKETS = ("/run/mysqld/mysqld.sock", "/var/run/mysqld/mysqld.sock", "/var/lib/mysql/mysql.sock", "/tmp/mysql.sock")
_OPTION_FILES = ("/etc/my.cnf", "/etc/mysql/my.cnf", "/etc/mysql/mariadb.cnf", "~/.my.cnf")
_ON_DATABASE = re.compile(r"GRANT (.+?) ON `((?:[^`]|``)+)`\.\* TO ")
_GROUPS = ("client", "client-server", "client-mariadb", "backhaul")
SYSTEM_DATABASES = ("information_schema", "performance_schema", "mysql", "sys")
# Engines whose tables are read in the state of the snapshot.
TRANSACTIONAL = ("InnoDB", "RocksDB", "TokuDB")


class MariaDBFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a server says of itself."""

    version: str
    user: str
    variables: Mapping[str, str]
    privileges: frozenset[str]
    grants: tuple[str, ...] = ()

    def may(self, privilege: str, database: str) -> bool:
        """Tell whether the account has a privilege on everything, or at least on that database."""
        if self.privileges & {privilege, "ALL PRIVILEGES"}:
            return True
        for grant in self.grants:
            match = _ON_DATABASE.match(grant)
            if match is None:
                continue
            pattern = match[2].replace("``", "`").replace("\\_", "_").replace("\\%", "%")
            given = {part.strip().upper() for part in match[1].split(",")}
            if pattern == database and given & {privilege, "ALL PRIVILEGES"}:
                return True
        return False

    @property
    def binlog(self) -> bool:
        """Whether it writes a binary log."""
        return self.variables.get("log_bin", "OFF").upper() in ("ON", "1")

    @property
    def series(self) -> tuple[int, int]:
        """The first two numbers of the version."""
        numbers = self.version.partition("-")[0].split(".")
        return int(numbers[0]), int(numbers[1])


class MariaDBServer:
    """See the module.

    Raises:
        ConfigurationError: an option file or the password file can't be read.
        UsageError: the URL has an option that means nothing.
    """

    def __init__(self, url: SourceUrl) -> None:
        self.url = url
        self._option_file = -1
        unknown = [name for name in url.options if name not in ("socket", "defaults-file", "ssl-ca")]
        if unknown:
            raise UsageError(
                f"{url.text!r} has an option that means nothing here",
                ", ".join(unknown),
                "Known are: socket, defaults-file, ssl-ca, password-file",
            )
        self._file = url.options.get("defaults-file")
        given = _client_options(self._file)
        from_environment = "" if url.isolated else os.environ.get("MYSQL_PWD", given.get("password", ""))
        self._password = read_password(url.password_file) if url.password_file else from_environment
        self.user = url.user or given.get("user") or os.environ.get("USER") or "root"
        self.host = url.host or given.get("host", "")
        self.port = url.port or int(given.get("port") or os.environ.get("MYSQL_TCP_PORT") or 3306)
        self.socket = url.options.get("socket") or (
            "" if self.host not in ("", "localhost") else given.get("socket") or _default_socket()
        )
        self._ca = url.options.get("ssl-ca") or given.get("ssl-ca")

    @property
    def address(self) -> str:
        """Where the server is, for records and messages."""
        return self.socket or f"{self.host or 'localhost'}:{self.port}"

    def connect(self, database: str | None = None) -> Connection[Cursor]:
        """Connect.

        Raises:
            ConfigurationError: the server can't be reached, or refuses.
        """
        import pymysql

        where: dict[str, Any] = (
            {"unix_socket": self.socket} if self.socket else {"host": self.host or "127.0.0.1", "port": self.port}
        )
        if self._ca:
            where["ssl_ca"] = self._ca
        try:
            return pymysql.connect(
                user=self.user,
                password=self._password,
                database=database,
                charset="utf8mb4",
                autocommit=True,
                connect_timeout=_CONNECT_TIMEOUT,
                **where,
            )
        except (pymysql.Error, OSError, RuntimeError) as error:
            raise ConfigurationError(
                f"Could not connect to MariaDB at {self.address} as {self.user!r}",
                words(error),
                "Check host, socket and user in the URL; passwords come from ~/.my.cnf ([client]), MYSQL_PWD, or "
                "?password-file=FILE.",
            ) from error

    @contextlib.contextmanager
    def session(self, database: str | None = None) -> Iterator[Connection[Cursor]]:
        """Connect for a few questions.

        Raises:
            ConfigurationError: the server can't be reached, or refuses an answer.
        """
        import pymysql

        with contextlib.closing(self.connect(database)) as connection:
            try:
                yield connection
            except pymysql.Error as error:
                raise ConfigurationError(
                    f"MariaDB at {self.address} refused a question",
                    words(error),
                    "Check the privileges of the account.",
                ) from error

    def options(self) -> list[str]:
        """Return the options that programs take first, to reach the server: no secret is in them."""
        file = self._private_file() or self._file
        options = [f"--defaults-file={file}"] if file else []
        options.append(f"--user={self.user}")
        if self.socket:
            return [*options, f"--socket={self.socket}", "--protocol=socket"]
        options += [f"--host={self.host or '127.0.0.1'}", f"--port={self.port}", "--protocol=tcp"]
        return options + ([f"--ssl-ca={self._ca}"] if self._ca else [])

    def _private_file(self) -> str | None:
        """Return an option file in memory with the password of the password file: those on the disk may say another."""
        if not self.url.password_file:
            return None
        if self._option_file < 0:
            self._option_file = os.memfd_create("backhaul", os.MFD_CLOEXEC)
            os.fchmod(self._option_file, 0o600)
            password = self._password.replace("\\", "\\\\").replace('"', '\\"')
            os.write(self._option_file, f'[client]\npassword="{password}"\n'.encode())
        return f"/proc/{os.getpid()}/fd/{self._option_file}"

    def environment(self) -> dict[str, str]:
        """Return the environment of programs: the password, and English messages."""
        environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        environment.pop("MYSQL_PWD", None)
        if self._password:
            environment["MYSQL_PWD"] = self._password
        return environment

    def client(self) -> str:
        """Return how a person talks to this very server: the beginning of a command that is proposed to him."""
        where = ["--socket", self.socket] if self.socket else ["-h", self.host or "127.0.0.1", "-P", str(self.port)]
        return shlex.join(["mariadb", *where])

    # -- questions -------------------------------------------------------------------------------------

    def facts(self) -> MariaDBFacts:
        """Ask for version, account, settings and privileges. Raises as ``session`` does."""
        with self.session() as connection:
            version, user = rows(connection, "select version(), current_user()")[0]
            variables = dict(
                rows(
                    connection,
                    "show global variables where variable_name in ('log_bin', 'server_id', 'binlog_format', 'datadir',"
                    " 'net_write_timeout', 'max_allowed_packet', 'version_comment', 'lower_case_table_names')",
                )
            )
            grants = [grant for (grant,) in rows(connection, "show grants")]
        return MariaDBFacts(
            version=version,
            user=user,
            variables=variables,
            privileges=_global_privileges(grants),
            grants=tuple(grants),
        )

    def databases(self) -> list[str]:
        """Return the databases that people made."""
        with self.session() as connection:
            found = [name for (name,) in rows(connection, "select schema_name from information_schema.schemata")]
        return sorted(name for name in found if name.lower() not in SYSTEM_DATABASES)

    def has_table(self, database: str, table: str) -> bool:
        """Tell whether there is a table of that name."""
        query = "select 1 from information_schema.tables where table_schema = %s and table_name = %s"
        with self.session() as connection:
            return bool(rows(connection, query, (database, table)))

    def is_empty(self, database: str) -> bool:
        """Tell whether a database holds no table, view, routine or event."""
        with self.session() as connection:
            counts = rows(
                connection,
                """select (select count(*) from information_schema.tables where table_schema = %(d)s)
                        + (select count(*) from information_schema.routines where routine_schema = %(d)s)
                        + (select count(*) from information_schema.events where event_schema = %(d)s)""",
                {"d": database},
            )
        return int(counts[0][0]) == 0


def rows(connection: Connection[Cursor], query: str, parameters: object = None) -> list[tuple[Any, ...]]:
    """Ask, and return all rows."""
    with connection.cursor() as cursor:
        cursor.execute(query, parameters)
        return [tuple(_text(value) for value in row) for row in cursor.fetchall()]


def quoted(name: str) -> str:
    """Return an identifier in backticks."""
    return "`" + name.replace("`", "``") + "`"


def words(error: BaseException) -> str:
    """Return what the server said."""
    arguments: tuple[object, ...] = error.args
    if len(arguments) > 1:
        return f"{arguments[1]} ({arguments[0]})"
    return str(error) or type(error).__name__


def refused(what: str, error: Exception) -> SourceError:
    """Return the error for a server that refuses in the middle of a backup."""
    return SourceError(what, words(error), "Nothing was committed. See the server's log, and push again.")


def database_record(connection: Connection[Cursor], name: str) -> tuple[DatabaseRecord, dict[str, str]]:
    """Describe a database, rows aside; and return each table's engine (``VIEW`` of views)."""
    charset, collation = rows(
        connection,
        "select default_character_set_name, default_collation_name from information_schema.schemata "
        "where schema_name = %s",
        (name,),
    )[0]
    found = rows(
        connection,
        """select table_name, table_type, engine, coalesce(data_length, 0) + coalesce(index_length, 0),
           coalesce(data_length, 0) from information_schema.tables where table_schema = %s order by table_name""",
        (name,),
    )
    bound = rows(
        connection,
        "select distinct table_name from information_schema.columns where table_schema = %s and column_default like %s",
        (name, "%nextval(%"),
    )
    engines = {table: "VIEW" if "VIEW" in kind else engine or "" for table, kind, engine, _, _ in found}
    tables = [
        TableRecord(
            name=table,
            size=int(data),
            kind="sequence" if kind == "SEQUENCE" else "table",
            apart=kind != "SEQUENCE" and engine not in TRANSACTIONAL,
        )
        for table, kind, engine, _, data in found
        if "VIEW" not in kind
    ]
    in_use = sorted({engine for engine in engines.values() if engine and engine != "VIEW"})
    definers = rows(
        connection,
        """select definer from information_schema.views where table_schema = %(d)s
           union select definer from information_schema.routines where routine_schema = %(d)s
           union select definer from information_schema.triggers where trigger_schema = %(d)s
           union select definer from information_schema.events where event_schema = %(d)s""",
        {"d": name},
    )
    record = DatabaseRecord(
        name=name,
        size=sum(int(row[3]) for row in found),
        tables=tuple(tables),
        properties={"charset": charset, "collation": collation},
        needs={
            "engines": tuple(in_use),
            "definers": tuple(sorted(definer for (definer,) in definers)),
            # Their definitions name the database that their sequence is in.
            **({"own name": tuple(table for (table,) in bound)} if bound else {}),
            "history": tuple(t for t, kind, *_ in found if kind == "SYSTEM VERSIONED"),
        },
    )
    return record, engines


def coordinates(connection: Connection[Cursor], facts: MariaDBFacts) -> dict[str, str]:
    """Return binlog file, position and GTID; nothing where there is no binary log."""
    if not facts.binlog:
        return {}
    file, position, *_ = rows(connection, "show master status")[0]
    found = {"binlog_file": str(file), "binlog_position": str(position)}
    gtid = rows(connection, "select binlog_gtid_pos(%s, %s)", (file, position))[0][0]
    return {**found, "gtid": str(gtid)} if gtid else found


def _text(value: object) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def _default_socket() -> str:
    environment = os.environ.get("MYSQL_UNIX_PORT")
    return environment or next((path for path in _SOCKETS if Path(path).exists()), _SOCKETS[0])


def _global_privileges(grants: Sequence[str]) -> frozenset[str]:
    """Return the global privileges of the account, upper case, ``ALL PRIVILEGES`` among them."""
    found: set[str] = set()
    for grant in grants:
        what, on, _ = grant.removeprefix("GRANT ").partition(" ON *.* TO ")
        if on:
            found.update(part.strip().upper() for part in what.split(","))
    return frozenset(found)


def _client_options(file: str | None) -> dict[str, str]:
    """Read what option files say to clients, the last word counting.

    Raises:
        ConfigurationError: the file that was named can't be read.
    """
    options: dict[str, str] = {}
    for path in [file] if file else [str(Path(path).expanduser()) for path in _OPTION_FILES]:
        parser = configparser.ConfigParser(
            allow_no_value=True, strict=False, interpolation=None, comment_prefixes=("#", ";", "!")
        )
        try:
            with open(path, encoding="utf-8") as lines:
                parser.read_file(lines)
        except (OSError, UnicodeDecodeError, configparser.Error) as error:
            if file:
                why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                raise ConfigurationError(
                    f"Could not read the option file {file}", why, "Check its path and its lines."
                ) from error
            continue
        for name in _GROUPS:
            if parser.has_section(name):
                options.update({k.replace("_", "-"): (v or "").strip("'\"") for k, v in parser.items(name)})
    return options
