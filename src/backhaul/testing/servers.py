"""Real servers for tests: on free ports of the loopback, in a directory of their own, ended by their own id.

A missing program is an error (``ServerError``), never a skipped test.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ACCESS_KEY = "backhaul-test-key"
SECRET_KEY = "backhaul-test-secret"
_START_TIMEOUT = 60.0


class ServerError(Exception):
    """A server is not installed, or did not start; with its own last words."""


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on, below the range that outgoing connections are given."""
    sockets: list[socket.socket] = []
    try:
        while len(sockets) < count:
            candidate = socket.socket()
            try:
                candidate.bind(("127.0.0.1", random.randint(15_000, 32_000)))
            except OSError:
                candidate.close()
                continue
            sockets.append(candidate)
        return [int(s.getsockname()[1]) for s in sockets]
    finally:
        for opened in sockets:
            opened.close()


def tool(name: str) -> str:
    """Return the path of a program of this Python environment or of the PATH.

    Raises:
        ServerError: it is not installed.
    """
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ServerError(f"{name} is not installed; `make test` installs everything that the tests talk to")
    return found


def s3_environment(endpoint: str) -> dict[str, str]:
    """Return what a program's environment needs to talk to one of these servers, or to a proxy before it."""
    return {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def s3_client(endpoint: str, **config: Any) -> S3Client:
    """Return a plain boto3 client; ``config`` is botocore's."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
        config=Config(**config),
    )


class S3Server:
    """What every S3 server of the tests has: a directory, a port of the loopback, and a process of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """The S3 endpoint's URL."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a program's environment needs to talk to this server."""
        return s3_environment(self.endpoint)

    def client(self, **config: Any) -> S3Client:
        """Return a plain boto3 client, to look at the store from outside; ``config`` is botocore's."""
        return s3_client(self.endpoint, **config)


class SeaweedFS(S3Server):
    """A SeaweedFS with its S3 gateway, from the wheel: one process with master, volume and filer inside.

    ``options`` are more of its own.
    """

    options: tuple[str, ...] = ()
    _ports: Sequence[int] = ()

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, on new ports, over the directory's data; wait until it answers.

        Raises:
            ServerError: it did not come up.
        """
        for last in (False, False, True):
            try:
                self._start_once()
                return
            except ServerError:
                self.kill()
                if last:  # the ports may have been taken between the choice and the start
                    raise

    def _start_once(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        identities = {
            "identities": [
                {
                    "name": "test",
                    "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
                    "actions": ["Admin", "Read", "Write", "List", "Tagging"],
                }
            ]
        }
        config = self.directory / "s3.json"
        config.write_text(json.dumps(identities))
        data = self.directory / "data"
        data.mkdir(exist_ok=True)
        names = ["s3", "master", "volume", "filer"]
        ports = self._ports = free_ports(2 * len(names) + 2)
        self.port = ports[0]
        flags = [f"-{name}.port={ports[2 * i]}" for i, name in enumerate(names)]
        flags += [f"-{name}.port.grpc={ports[2 * i + 1]}" for i, name in enumerate(names)]
        flags += [f"-s3.port.iceberg={ports[-2]}", f"-s3.port.lance={ports[-1]}"]
        with open(self.directory / "log", "ab") as log:
            self._process = subprocess.Popen(
                [
                    tool("weed"),
                    "-logtostderr",
                    "server",
                    "-ip=127.0.0.1",
                    "-ip.bind=127.0.0.1",
                    f"-dir={data}",
                    "-master.volumeSizeLimitMB=1024",
                    "-master.telemetry=false",
                    "-volume.max=3000",  # each bucket takes some
                    "-s3",
                    "-s3.autoCreateBucket=false",
                    "-filer",
                    f"-s3.config={config}",
                    *flags,
                    *self.options,
                ],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        deadline = time.monotonic() + _START_TIMEOUT
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                lines = (self.directory / "log").read_text(errors="replace").splitlines()[-15:]
                raise ServerError("SeaweedFS did not start:\n" + "\n".join(lines))
            time.sleep(0.1)

    def _ready(self) -> bool:
        """Tell whether the server takes an object, not only a connection: volumes come up last."""
        from botocore.exceptions import BotoCoreError, ClientError

        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        try:
            connection.request("GET", "/")
            connection.getresponse().read()
        except OSError:
            return False
        finally:
            connection.close()
        client = self.client(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=5)
        try:
            with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
                client.create_bucket(Bucket="ready")
            client.put_object(Bucket="ready", Key="probe", Body=b"x")
            client.delete_object(Bucket="ready", Key="probe")
        except (BotoCoreError, ClientError):
            return False
        finally:
            client.close()
        return True

    def stop(self) -> None:
        """End it, in order."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a power cut would."""
        self._end(signal.SIGKILL)

    def suspend(self) -> None:
        """Stop it in its tracks: connections stay open and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def _end(self, number: int) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        # (It makes sockets there, and leaves them. Until it ends its ports are its own, and so are they.)
        for port in self._ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                with contextlib.suppress(OSError):
                    left.unlink()
        process.send_signal(number)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def seaweedfs(directory: Path) -> Iterator[SeaweedFS]:
    """Run a SeaweedFS over a directory while the block runs."""
    server = SeaweedFS(directory)
    server.start()
    try:
        yield server
    finally:
        server.kill()


class SmallS3(S3Server):
    """An S3 server that is one small process: how it is started is the subclass's."""

    name = ""

    def command(self) -> list[str]:
        """Return the command line that serves ``directory`` on ``port``."""
        raise NotImplementedError

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            ServerError: it did not come up.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self.port = free_ports(1)[0]
        with open(self.directory.with_suffix(".log"), "ab") as log:
            self._process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.directory
            )
        deadline = time.monotonic() + _START_TIMEOUT
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
            try:
                connection.request("GET", "/")
                connection.getresponse().read()
                return
            except OSError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise ServerError(f"{self.name} did not start; see {self.directory}.log") from error
                time.sleep(0.1)
            finally:
                connection.close()

    def kill(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class RcloneS3(SmallS3):
    """``rclone serve s3`` over a directory: weak in conditions, checksums and part copies."""

    name = "rclone serve s3"

    def command(self) -> list[str]:
        """See ``SmallS3.command``."""
        key = f"{ACCESS_KEY},{SECRET_KEY}"
        config = ["--config", str(self.directory.with_suffix(".conf"))]
        address = f"127.0.0.1:{self.port}"
        return [tool("rclone"), "serve", "s3", *config, "--addr", address, "--auth-key", key, str(self.directory)]


class MotoS3(SmallS3):
    """moto's server: S3 in the memory of a Python process; accepts wrong checksums."""

    name = "moto"

    def command(self) -> list[str]:
        """See ``SmallS3.command``."""
        return [tool("moto_server"), "-H", "127.0.0.1", "-p", str(self.port)]


class PostgreSQL:
    """A PostgreSQL server from Debian's packages, in a cluster of its own, on a socket of its own.

    When root it runs as the account ``postgres``: servers refuse to run as root.
    """

    def __init__(
        self, directory: Path | None = None, *, data: Path | None = None, auth: str = "trust", wal: bool = False
    ) -> None:
        """Make ready: in a directory of its own, or one that is given.

        ``data`` are files that are there already; ``wal`` puts the WAL into a directory of its own.
        """
        self._wal = Path(tempfile.mkdtemp(prefix="backhaul-wal-")) if wal else None
        self._directory = directory or Path(tempfile.mkdtemp(prefix="backhaul-pg-"))
        self._data = data
        self._auth = auth
        self.account = pwd.getpwnam("postgres") if os.geteuid() == 0 else None
        self._user = self.account.pw_uid if self.account else None
        self._group = self.account.pw_gid if self.account else None
        self._extra_groups: list[int] | None = [] if self.account else None
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_ports(1)[0]

    @property
    def environment(self) -> dict[str, str]:
        """What libpq's programs need to talk to this server."""
        return {"PGHOST": str(self._directory), "PGPORT": str(self.port), "PGUSER": "postgres"}

    @property
    def pid(self) -> int:
        """The postmaster's process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the server has gone down by itself."""
        return self._process is None or self._process.poll() is not None

    def url(self, database: str = "", *, physical: bool = False) -> str:
        """Return what ``--from`` and ``--into`` take."""
        scheme = "postgresql+physical" if physical else "postgresql"
        return f"{scheme}://postgres@/{quote(database)}?host={self._directory}&port={self.port}"

    def restart(self) -> None:
        """End the server in order, and start it again on its files."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        self._process.wait(60)
        self._data = self._data or self._directory / "data"
        self.start()

    def kill(self) -> None:
        """End the server as a crash would: at once, all its processes."""
        assert self._process is not None
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(20)

    @staticmethod
    def program(name: str) -> str:
        """Return the path of a server or client program, of the newest installed version.

        Raises:
            ServerError: it is not installed.
        """
        found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda p: int(p.parts[-3]))
        if not found:
            raise ServerError(f"PostgreSQL's {name} is not installed: apt-get install postgresql")
        return str(found[-1])

    def start(self) -> None:
        """Make the cluster and start the server.

        Raises:
            ServerError: it is not installed, or did not come up.
        """
        data = self._data or self._directory / "data"
        if self.account is not None:
            os.chown(self._directory, self.account.pw_uid, self.account.pw_gid)
        if self._data is None:
            password = self._directory / "password"
            password.write_text("geheim\n")
            command = [self.program("initdb"), "-D", str(data), "-U", "postgres", "-E", "UTF8", "--no-sync"]
            if self._wal is not None:
                if self.account is not None:
                    os.chown(self._wal, self.account.pw_uid, self.account.pw_gid)
                command.append(f"--waldir={self._wal / 'wal'}")
            self._run(*command, "-A", self._auth, f"--pwfile={password}")
        with open(self._directory / "log", "wb") as log:
            self._process = subprocess.Popen(
                [
                    self.program("postgres"),
                    "-D",
                    str(data),
                    "-k",
                    str(self._directory),
                    "-p",
                    str(self.port),
                    "-c",
                    "listen_addresses=",
                    "-c",
                    "fsync=off",
                    "-c",
                    "max_wal_size=4GB",
                ],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                user=self._user,
                group=self._group,
                extra_groups=self._extra_groups,
            )
        deadline = time.monotonic() + _START_TIMEOUT
        while subprocess.run(
            [self.program("pg_isready"), "-q"], env={**os.environ, **self.environment}, check=False
        ).returncode:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise ServerError("PostgreSQL did not start:\n" + (self._directory / "log").read_text(errors="replace"))
            time.sleep(0.05)

    def sql(self, statement: str, database: str = "postgres") -> str:
        """Run a statement by psql and return its rows as text, columns split by ``|``."""
        return subprocess.run(
            [self.program("psql"), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", database, "-f", "-"],
            input=statement,
            env={**os.environ, "PGPASSWORD": "geheim", **self.environment},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    def stop(self) -> None:
        """End the server and remove its cluster."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)
        if self._wal is not None:
            shutil.rmtree(self._wal, ignore_errors=True)

    def _run(self, *command: str) -> None:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            user=self._user,
            group=self._group,
            extra_groups=self._extra_groups,
        )
        if done.returncode:
            raise ServerError(f"{command[0]} failed: {done.stderr}")


class MariaDB:
    """A MariaDB server from Debian's packages, with a binary log, on a socket of its own; its root has no password.

    When root it runs as the account ``mysql``, or ``nobody``.
    """

    def __init__(self, *, data: Path | None = None, binlog: bool = True) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="backhaul-my-"))
        self.account: pwd.struct_passwd | None = None
        if os.geteuid() == 0:
            names = {entry.pw_name: entry for entry in pwd.getpwall()}
            self.account = names.get("mysql") or names["nobody"]
            os.chown(self._directory, self.account.pw_uid, self.account.pw_gid)
        self._data = data
        self._binlog = binlog
        self._process: subprocess.Popen[bytes] | None = None
        self.socket = str(self._directory / "s.sock")

    def url(self, database: str = "", *, physical: bool = False) -> str:
        """Return what ``--from`` and ``--into`` take."""
        scheme = "mariadb+physical" if physical else "mariadb"
        path = "/" if physical else f"/{quote(database)}"
        return f"{scheme}://root@{path}?socket={self.socket}&defaults-file=/dev/null"

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process is not None
        return self._process.pid

    @staticmethod
    def program(name: str) -> str:
        """Return the path of a server or client program.

        Raises:
            ServerError: it is not installed.
        """
        found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/bin")
        if found is None:
            raise ServerError(f"{name} is not installed: apt-get install mariadb-server-core mariadb-client")
        return found

    def start(self) -> None:
        """Make the server's files, unless they were given, and start it.

        Raises:
            ServerError: it is not installed, or did not come up.
        """
        data = self._data or self._directory / "data"
        identity: dict[str, Any] = {}
        if self.account is not None:
            identity = {"user": self.account.pw_uid, "group": self.account.pw_gid, "extra_groups": []}
        if self._data is None:
            install = [self.program("mariadb-install-db"), "--no-defaults", f"--datadir={data}", "--skip-test-db"]
            done = subprocess.run(
                [*install, "--auth-root-authentication-method=normal"],
                capture_output=True,
                text=True,
                check=False,
                cwd="/",
                **identity,
            )
            if done.returncode:
                raise ServerError(f"mariadb-install-db failed: {done.stdout}{done.stderr}")
        settings = [f"--datadir={data}", f"--socket={self.socket}", f"--pid-file={self._directory / 'pid'}"]
        settings += ["--skip-networking", "--innodb-flush-log-at-trx-commit=0", f"--tmpdir={self._directory}"]
        settings += ["--innodb-log-file-size=256M", "--max-allowed-packet=64M"] if self._data is None else []
        if self._binlog:
            settings += [f"--log-bin={self._directory / 'bin'}", "--server-id=7", "--sync-binlog=0"]
        with open(self._directory / "log", "wb") as log:
            self._process = subprocess.Popen(
                [self.program("mariadbd"), "--no-defaults", *settings],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd="/",
                **identity,
            )
        deadline = time.monotonic() + _START_TIMEOUT
        while True:
            try:
                self.sql("select 1")
                return
            except subprocess.CalledProcessError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    text = (self._directory / "log").read_text(errors="replace")
                    raise ServerError(f"MariaDB did not start:\n{text}") from None
                time.sleep(0.1)

    def sql(self, statement: str, database: str = "", *, check: bool = True) -> str:
        """Run statements by the client and return its rows as text, columns split by tabs."""
        command = [self.program("mariadb"), "--no-defaults", "-uroot", f"--socket={self.socket}", "-N", "-B"]
        command += ["--default-character-set=utf8mb4", *([f"--database={database}"] if database else [])]
        done = subprocess.run(command, input=statement, capture_output=True, text=True, check=check)
        return done.stdout.strip()

    def dump(self, database: str, *options: str, table: str | None = None) -> bytes:
        """Return a dump of a database, or of one of its tables, without what differs from time to time."""
        command = [self.program("mariadb-dump"), "--no-defaults", "-uroot", f"--socket={self.socket}"]
        command += ["--skip-dump-date", "--skip-comments", "--routines", "--events", "--triggers", *options, database]
        command += [table] if table is not None else []
        return subprocess.run(command, capture_output=True, check=True).stdout

    def kill(self) -> None:
        """End the server as a crash would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(20)

    def stop(self) -> None:
        """End the server and remove its files."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)


class Redis:
    """A Redis server on a socket of its own."""

    def __init__(self, directory: Path, *options: str) -> None:
        self._directory = directory
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self.socket = str(directory / "r.sock")
        self.url = f"redis+unix://{self.socket}"

    def start(self) -> None:
        """Start it.

        Raises:
            ServerError: it is not installed, or did not come up.
        """
        program = shutil.which("redis-server")
        if program is None:
            raise ServerError("redis-server is not installed: apt-get install redis-server")
        place = ["--port", "0", "--unixsocket", self.socket, "--dir", str(self._directory), "--save", ""]
        self._process = subprocess.Popen(
            [program, *place, "--repl-diskless-sync-delay", "0", *self._options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + _START_TIMEOUT
        while not Path(self.socket).exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise ServerError("Redis did not start")
            time.sleep(0.02)

    def cli(self, *words: str, script: str | None = None) -> str:
        """Run redis-cli and return what it says."""
        command = ["redis-cli", "-s", self.socket, *words]
        return subprocess.run(command, input=script, capture_output=True, text=True, check=True).stdout.strip()

    def kill(self) -> None:
        """End the server as a crash would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(20)

    def stop(self) -> None:
        """End the server."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(20)
