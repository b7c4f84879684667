"""Fixtures: real servers, and the command line as a process of its own."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import msgspec
import pytest

from backhaul.testing.data import random_bytes
from backhaul.testing.faults import FaultProxy
from backhaul.testing.servers import MariaDB, PostgreSQL, SeaweedFS, seaweedfs
from backhaul.testing.warm_start import WarmPopen, WarmServer, must_start_cold

_numbers = itertools.count(1)
# On a machine that is shared no example has a time to keep.
hypothesis.settings.register_profile("shared", deadline=None)
hypothesis.settings.load_profile("shared")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Share out what takes long: each process begins with some of it, so that none has it left at the end."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    long = [item for item in items if item.get_closest_marker("first")]
    others = iter([item for item in items if not item.get_closest_marker("first")])
    left = len(items)
    items.clear()
    for number in range(processes):
        own = long[number::processes]
        share = left // (processes - number)
        items += [*own, *itertools.islice(others, max(share - len(own), 0))]
        left -= share
    items += others


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """One SeaweedFS for the tests of this process; never killed by a test (those start their own)."""
    directory = tmp_path_factory.mktemp("seaweed")
    with seaweedfs(directory) as server:
        yield server
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgreSQL]:
    server = PostgreSQL()
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def mariadb() -> Iterator[MariaDB]:
    server = MariaDB()
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def s3_environment(seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def s3(seaweed: SeaweedFS) -> Iterator[Any]:
    """A plain client, to look at the store from outside."""
    client = seaweed.client()
    yield client
    client.close()


@pytest.fixture
def bucket(s3: Any) -> Iterator[str]:
    name = f"bucket-{os.getpid()}-{next(_numbers)}"
    s3.create_bucket(Bucket=name)
    yield name
    # With all that is in it: a disk that is nearly full makes SeaweedFS refuse to write, and every test after it wait.
    with contextlib.suppress(s3.exceptions.NoSuchBucket):
        s3.delete_bucket(Bucket=name)


class Result(msgspec.Struct):
    code: int
    out: bytes
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@functools.cache
def warm_server(*, s3: bool) -> WarmServer:
    """What the command line is forked off in this process of the tests; it ends when that does."""
    server = WarmServer(s3=s3)
    atexit.register(server.close)
    return server


class Cli:
    """Runs ``backhaul`` as users do: another process, its real stdin, stdout and stderr.

    Attributes:
        cold: starts an interpreter each time, where that is seen: what others see in /proc, how much memory it takes.
    """

    cold = False

    def __init__(self, environment: dict[str, str], directory: Path) -> None:
        self.environment = environment
        self.directory = directory
        self.started: list[subprocess.Popen[bytes]] = []

    def kill_all(self) -> None:
        """End what a failed test left running: a push that nobody ends fills the disk."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
                process.wait()

    def start(self, *arguments: str, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[bytes]:
        options.setdefault("stdin", subprocess.DEVNULL)
        options.setdefault("stdout", subprocess.PIPE)
        options.setdefault("stderr", subprocess.PIPE)
        environment = {**self.environment, **(env or {})}
        process: subprocess.Popen[bytes]
        if self.cold or not options.keys() <= {"stdin", "stdout", "stderr"} or must_start_cold(environment):
            command = [sys.executable, "-W", "error", "-m", "backhaul", *arguments]
            process = subprocess.Popen(command, env=environment, cwd=self.directory, **options)
        else:
            server = warm_server(s3=any("s3://" in argument for argument in arguments))
            process = WarmPopen(server, arguments, env=environment, cwd=self.directory, **options)
        self.started.append(process)
        return process

    def __call__(
        self,
        *arguments: str,
        input: bytes | None = None,
        env: dict[str, str] | None = None,
        timeout: float = 120,
    ) -> Result:
        process = self.start(*arguments, env=env, stdin=subprocess.PIPE if input is not None else subprocess.DEVNULL)
        out, err = process.communicate(input, timeout)
        return Result(process.returncode, out, err.decode())

    def ok(self, *arguments: str, input: bytes | None = None, env: dict[str, str] | None = None) -> Result:
        result = self(*arguments, input=input, env=env)
        assert result.code == 0, result.err
        return result


@pytest.fixture
def local_cli(tmp_path: Path) -> Iterator[Cli]:
    """The command line with no S3 settings at all."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "PG"))}
    cli = Cli(
        {**clean, "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/dev/null", "HOME": str(tmp_path)}, tmp_path
    )
    yield cli
    cli.kill_all()


@pytest.fixture
def cli(local_cli: Cli, seaweed: SeaweedFS) -> Iterator[Cli]:
    """The command line set up for the test server."""
    cli = Cli({**local_cli.environment, **seaweed.environment}, local_cli.directory)
    yield cli
    cli.kill_all()


def open_uploads(s3: Any, bucket: str) -> Sequence[Any]:
    return s3.list_multipart_uploads(Bucket=bucket).get("Uploads", [])  # type: ignore[no-any-return]


def keys(s3: Any, bucket: str, prefix: str = "") -> list[str]:
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


@pytest.fixture
def tmpfs(tmp_path: Path) -> Any:
    """A small disk of its own (16 MB), as root; without root there is nothing to mount with."""
    mount = tmp_path / "small disk"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(mount)], check=True)
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


FILE_SIZE = 100_000_000


@functools.cache
def file_content() -> bytes:
    """What the file of ``Files`` holds."""
    return b"".join(random_bytes(FILE_SIZE))


class Files:
    """A file, a series through a counting proxy, and a state directory."""

    def __init__(self, cli: Cli, seaweed: SeaweedFS, bucket: str, directory: Path) -> None:
        self.cli = cli
        self.bucket = bucket
        self.proxy = FaultProxy(seaweed.endpoint)
        self.proxy.start()
        self.series = f"s3://{bucket}/files?endpoint={self.proxy.endpoint}"
        self.file = directory / "file"
        self.content = file_content()
        self.file.write_bytes(self.content)
        self.state = directory / "state"
        self.environment = {"BACKHAUL_STATE": str(self.state)}

    def interrupt(self, number: signal.Signals = signal.SIGKILL, parts: int = 5, *more: str) -> str:
        """Push until some parts have arrived, and end the process."""
        before = self.proxy.count("UploadPart")
        arguments = ("push", self.series, *more, "--from", str(self.file), "--limit", "40M", "--retry-for", "2s")
        process = self.cli.start(*arguments, env=self.environment)
        while self.proxy.count("UploadPart") < before + parts and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        # A part that had come when the process died is passed on, and counted, all the same: before what follows.
        self.proxy.wait_for_handlers()
        return err.decode()

    def push(self, *more: str) -> Any:
        arguments = ("push", self.series, *more, "--from", str(self.file), "--json")
        return self.cli.ok(*arguments, env=self.environment).json

    def pulled(self) -> bytes:
        return self.cli.ok("pull", "-q", self.series).out


@pytest.fixture
def files(cli: Cli, seaweed: SeaweedFS, bucket: str, tmp_path: Path) -> Any:
    files = Files(cli, seaweed, bucket, tmp_path)
    yield files
    files.proxy.close()
    assert files.proxy.failures == []
