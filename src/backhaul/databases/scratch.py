"""Servers of our own, for as long as a trial takes: in a directory of their own, on a socket in it, with no network.

Servers refuse to run as root, so as root they run under another account. They are children of a guardian: whatever
becomes of this process, they end.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from backhaul.databases import postgresql
from backhaul.databases.prerequisites import Prerequisites, Program, find_program
from backhaul.databases.temporary import OwnDirectory
from backhaul.errors import ConfigurationError
from backhaul.model.source_url import SourceUrl
from backhaul.processes.command import Command
from backhaul.processes.run import run_program

_START_PATIENCE = 600.0  # a server that replays WAL takes its time
_LONGEST_SOCKET_DIRECTORY = 80  # of the 107 bytes that a socket's path may have
_LOG_LINES = 12


class ScratchDirectory:
    """A directory for one trial, gone at its end.

    Args:
        parent: where; None for the system's directory for temporary files.
        account: whose it is when root makes it; the first of these that exists.

    Raises:
        ConfigurationError: it can't be made, or a server's socket would not fit its path.
    """

    def __init__(self, parent: str | None, accounts: Sequence[str]) -> None:
        self.account: pwd.struct_passwd | None = None
        if os.geteuid() == 0:
            for name in (*accounts, "nobody"):
                with contextlib.suppress(KeyError):
                    self.account = pwd.getpwnam(name)
                    break
        where = parent or tempfile.gettempdir()
        try:
            self._own = OwnDirectory("backhaul-drill-", where)
            self.path = self._own.path
            self.give(self.path)
        except OSError as error:
            raise ConfigurationError(
                f"Could not make a directory in {where}", error.strerror or str(error), "Name another with --scratch."
            ) from error
        if len(os.fsencode(self.path)) > _LONGEST_SOCKET_DIRECTORY:
            self.remove()
            raise ConfigurationError(
                f"The path of {where} is too long", "a server's socket would not fit it", "Name a shorter --scratch."
            )

    def give(self, path: Path) -> None:
        """Make a path the server account's."""
        if self.account is not None:
            os.chown(path, self.account.pw_uid, self.account.pw_gid)

    def give_all(self, path: Path) -> None:
        """Make everything below a path the server account's."""
        self.give(path)
        for directory, directories, files in os.walk(path):
            for name in (*directories, *files):
                if self.account is not None:
                    os.chown(
                        os.path.join(directory, name), self.account.pw_uid, self.account.pw_gid, follow_symlinks=False
                    )

    def as_account(self, command: Sequence[str]) -> list[str]:
        """Return the command as it runs under the server's account."""
        if self.account is None:
            return list(command)
        setpriv = find_program("setpriv")
        assert setpriv is not None  # ``check_programs`` has seen it
        uid, gid = f"--reuid={self.account.pw_uid}", f"--regid={self.account.pw_gid}"
        return [setpriv.path, uid, gid, "--clear-groups", "--", *command]

    def environment(self) -> dict[str, str]:
        """Return an environment in which nothing leads to another server."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "MYSQL", "MARIADB", "REDIS"))}
        return {**kept, "LC_ALL": "C.UTF-8", "HOME": str(self.path), "TMPDIR": str(self.path)}

    def free(self) -> int:
        """Return the bytes that are free there."""
        return shutil.disk_usage(self.path).free

    def remove(self) -> None:
        """Remove it, and all that is in it."""
        self._own.remove()


class _Server:
    """What scratch servers have in common: a process, its last words, and its end."""

    def __init__(self, directory: ScratchDirectory, name: str) -> None:
        self.directory = directory
        self._name = name
        self._command: Command | None = None
        self._log: deque[str] = deque(maxlen=_LOG_LINES)

    def _launch(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._command = Command(
            self.directory.as_account(command),
            discard_output=True,
            on_error_line=lambda line: self._log.append(line.decode(errors="replace")),
            environment=environment,
        )

    def _wait_until_ready(self) -> None:
        """Wait until the server answers.

        Raises:
            ConfigurationError: it ended, or does not answer.
        """
        deadline = time.monotonic() + _START_PATIENCE
        assert self._command is not None
        while not self._answers():
            if self._command.ended_within(0.1):
                raise self.failure(f"it ended: {self._command.wait()}")
            if time.monotonic() > deadline:
                raise self.failure(f"it did not answer within {_START_PATIENCE:.0f} s")

    def _answers(self) -> bool:
        raise NotImplementedError

    @property
    def log(self) -> str:
        """The last lines that the server said."""
        return "\n".join(self._log)

    def failure(self, why: str) -> ServerStartError:
        """Return the error for a server that does not run."""
        return ServerStartError(
            f"The {self._name} of the drill did not start",
            why + (f"; its last words:\n{self.log}" if self._log else ""),
            "See its words above.",
        )

    def stop(self) -> None:
        """End the server."""
        if self._command is not None:
            self._command.terminate()
            self._command = None


class ServerStartError(ConfigurationError):
    """A scratch server did not come up; of restored files that may be the files' fault."""


_POSTGRESQL_OPTIONS = {
    "listen_addresses": "",
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "archive_mode": "off",
    "autovacuum": "off",
    "ssl": "off",
    "logging_collector": "off",
    "log_destination": "stderr",
    "max_wal_size": "4GB",
    "shared_buffers": "128MB",
    "restore_command": "",
    "primary_conninfo": "",
}
SUPERUSER = "backhaul_drill"


class ScratchPostgreSQL(_Server):
    """A PostgreSQL server of its own. See the module."""

    def __init__(self, directory: ScratchDirectory) -> None:
        super().__init__(directory, "PostgreSQL server")
        self.data = directory.path / "data"
        self.user = SUPERUSER
        self._programs: dict[str, Program] = {}

    def check_programs(self, wanted: int, missing: Prerequisites, *, exact: bool) -> None:
        """Find the server's programs: of that major version, or for a logical backup of a newer one."""
        if self.directory.account is not None:
            missing.program("setpriv")
        for name in ("postgres", "initdb"):
            fitting = [p for p in postgresql.installed(name) if p.major == wanted or (not exact and p.major > wanted)]
            if fitting:
                self._programs[name] = fitting[0]
            else:
                here = ", ".join(program.version for program in postgresql.installed(name)) or "none"
                missing.add(
                    f"a PostgreSQL server of version {wanted}{'' if exact else ' or newer'} ({name})",
                    f"on this host there is {here}",
                    f"apt-get install postgresql-{wanted}",
                )
                return

    @property
    def version(self) -> str:
        """The server's version."""
        return self._programs["postgres"].version

    @property
    def bin(self) -> str:
        """Where its programs are."""
        return str(Path(self._programs["postgres"].path).parent)

    @property
    def url(self) -> SourceUrl:
        """Where it is."""
        return SourceUrl(
            text="a scratch server",
            kind="postgresql",
            host=str(self.directory.path),
            port=5432,
            user=self.user,
            isolated=True,
        )

    def make(self) -> None:
        """Make an empty cluster.

        Raises:
            ConfigurationError: that failed.
        """
        initdb = self._programs["initdb"].path
        command = [
            initdb,
            "-D",
            str(self.data),
            "-U",
            self.user,
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--locale=C",
            "--no-sync",
        ]
        try:
            run_program(self.directory.as_account(command), "initdb", environment=self.directory.environment())
        except Exception as error:
            raise self.failure(str(error)) from error

    def start(self, *, settings: Mapping[str, str], recovered_user: str | None = None) -> None:
        """Start it: on a cluster that ``make`` made, or with ``recovered_user`` on restored files.

        ``settings`` are those of the source: limits that recovery insists on, libraries that extensions need.

        Raises:
            ServerStartError: it did not come up.
        """
        options = dict(_POSTGRESQL_OPTIONS)
        options |= {name: settings[name] for name in postgresql.LIMITS if settings.get(name, "").isdigit()}
        libraries = Path(self.bin).parent / "lib"
        wanted = [name.strip().strip('"') for name in settings.get("shared_preload_libraries", "").split(",")]
        options["shared_preload_libraries"] = ",".join(n for n in wanted if n and (libraries / f"{n}.so").exists())
        if recovered_user is not None:
            self.user = recovered_user
            # Its own settings are for another host; accounts come in by our socket alone.
            configuration, hba = self.directory.path / "postgresql.conf", self.directory.path / "pg_hba.conf"
            configuration.write_text("")
            hba.write_text("local all all trust\n")
            (self.data / "postgresql.auto.conf").write_text("")
            for name in ("standby.signal", "recovery.signal"):
                (self.data / name).unlink(missing_ok=True)
            options |= {"config_file": str(configuration), "hba_file": str(hba), "data_directory": str(self.data)}
        else:
            options |= {"wal_level": "minimal", "max_wal_senders": "0"}
        arguments = [f"--{name}={value}" for name, value in options.items()]
        command = [self._programs["postgres"].path, "-D", str(self.data), "-k", str(self.directory.path), "-p", "5432"]
        self._launch([*command, *arguments], self.directory.environment())
        self._wait_until_ready()

    def _answers(self) -> bool:
        try:
            postgresql.PostgreSQLServer(self.url).facts()
        except ConfigurationError:
            return False
        return True


class ScratchMariaDB(_Server):
    """A MariaDB server of its own. See the module."""

    def __init__(self, directory: ScratchDirectory) -> None:
        super().__init__(directory, "MariaDB server")
        self.data = directory.path / "data"
        self._socket = str(directory.path / "s.sock")
        self._programs: dict[str, Program] = {}

    def check_programs(self, wanted: tuple[int, ...], missing: Prerequisites, *, exact: bool) -> None:
        """Find the server's programs: of that series, or for a logical backup of a newer one."""
        if self.directory.account is not None:
            missing.program("setpriv")
        server = missing.program("mariadbd")
        install = missing.program("mariadb-install-db")
        if server is None or install is None:
            return
        self._programs = {"mariadbd": server, "mariadb-install-db": install}
        series = tuple(int(number) for number in server.version.split(".")[:2])
        if series < wanted or (exact and series != wanted):
            words = ".".join(map(str, wanted))
            missing.add(
                f"a MariaDB server of version {words}{'' if exact else ' or newer'}",
                f"on this host there is {server.version}",
                f"apt-get install mariadb-server  (of {words})",
            )

    @property
    def version(self) -> str:
        """The server's version."""
        return self._programs["mariadbd"].version

    @property
    def url(self) -> SourceUrl:
        """Where it is."""
        return SourceUrl(
            text="a scratch server",
            kind="mariadb",
            user="root",
            # (An option file that says nothing: those of this host are for other servers.)
            options={"socket": self._socket, "defaults-file": os.devnull},
            isolated=True,
        )

    def make(self) -> None:
        """Make an empty server.

        Raises:
            ConfigurationError: that failed.
        """
        self.data.mkdir(mode=0o700)
        self.directory.give(self.data)
        command = [
            self._programs["mariadb-install-db"].path,
            "--no-defaults",
            f"--datadir={self.data}",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
        ]
        try:
            run_program(
                self.directory.as_account(command),
                "mariadb-install-db",
                environment=self.directory.environment(),
                on_error_line=lambda line: self._log.append(line.decode(errors="replace")),
            )
        except Exception as error:
            raise self.failure(str(error)) from error

    def start(self, *, recovered: bool = False) -> None:
        """Start it: on what ``make`` made, or on restored files.

        Raises:
            ServerStartError: it did not come up.
        """
        settings = self.data / "backup-my.cnf"
        defaults = f"--defaults-file={settings}" if recovered and settings.exists() else "--no-defaults"
        command = [
            self._programs["mariadbd"].path,
            defaults,
            f"--datadir={self.data}",
            f"--socket={self._socket}",
            f"--pid-file={self.directory.path / 'pid'}",
            f"--tmpdir={self.directory.path}",
            "--skip-networking",
            "--skip-log-bin",
            "--skip-slave-start",
            "--innodb-flush-log-at-trx-commit=0",
            "--max-allowed-packet=1G",
            # Nobody's password is known, and nobody else can come in. (This keeps events from running, too.)
            *(["--skip-grant-tables"] if recovered else ["--event-scheduler=OFF"]),
        ]
        self._launch(command, self.directory.environment())
        self._wait_until_ready()

    def _answers(self) -> bool:
        from backhaul.databases.mariadb import MariaDBServer

        if not Path(self._socket).exists():
            return False
        try:
            MariaDBServer(self.url).connect().close()
        except ConfigurationError:
            return False
        return True


class ScratchRedis(_Server):
    """A Redis server of its own, on a dump. See the module."""

    def __init__(self, directory: ScratchDirectory) -> None:
        super().__init__(directory, "Redis server")
        self.data = directory.path / "data"
        self._socket = str(directory.path / "s.sock")
        self._program: Program | None = None

    def check_programs(self, missing: Prerequisites) -> None:
        """Find the server."""
        if self.directory.account is not None:
            missing.program("setpriv")
        self._program = missing.program("redis-server")

    @property
    def version(self) -> str:
        """The server's version."""
        return self._program.version if self._program is not None else ""

    @property
    def url(self) -> SourceUrl:
        """Where it is."""
        return SourceUrl(text="a scratch server", kind="redis", path=self._socket, isolated=True)

    def start(self) -> None:
        """Start it on the dump in ``data``.

        Raises:
            ServerStartError: it did not come up.
        """
        assert self._program is not None
        options = ["--port", "0", "--unixsocket", self._socket, "--dir", str(self.data), "--save", ""]
        # (Its log goes to stdout, which is nobody's: into a file, then.)
        log = self.directory.path / "redis.log"
        command = [self._program.path, *options, "--appendonly", "no", "--logfile", str(log)]
        self._launch(command, self.directory.environment())
        try:
            self._wait_until_ready()
        except ServerStartError:
            with contextlib.suppress(OSError):
                self._log.extend(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
            raise self.failure("it did not come up with this dump") from None

    def _answers(self) -> bool:
        from backhaul.databases.redis import RedisConnection

        if not Path(self._socket).exists():
            return False
        try:
            RedisConnection(self.url).close()
        except ConfigurationError:
            return False
        return True
