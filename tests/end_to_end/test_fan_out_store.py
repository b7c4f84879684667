"""Fan-out: hosts that come too late for the stream, and read the backup in the store instead."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from backhaul.errors import BackhaulError, IntegrityError
from backhaul.model.manifest import Manifest
from backhaul.operations import series
from backhaul.operations.from_store import pull_streams
from backhaul.operations.places import reference_at
from backhaul.operations.progress import PullProgress
from backhaul.operations.restore import restore
from backhaul.stores.open import open_store
from backhaul.targets.file import FileTarget
from backhaul.testing.network_lab import Lab
from backhaul.testing.servers import PostgreSQL, SeaweedFS
from tests.conftest import Cli
from tests.end_to_end.fan_out_hosts import Hosts, Program, fate, fates, until

pytestmark = pytest.mark.timeout(150)
HOSTS = ("primary", "r1", "r2", "r3")


class Relays:
    """Ways from hosts to a server of this machine's loopback, at the same address of their own."""

    def __init__(self, lab: Lab, server: SeaweedFS, path: Path) -> None:
        self._lab = lab
        self._port = server.port
        self._path = path

    def open(self, *hosts: str) -> None:
        words = f"TCP-LISTEN:{self._port},bind=127.0.0.1,fork,reuseaddr", f"UNIX-CONNECT:{self._path}"
        for host in hosts:
            self._lab.host(host).start(["socat", *words])


@pytest.fixture
def relays(hosts: Hosts, seaweed: SeaweedFS) -> Iterator[Relays]:
    """To the store, from the primary only; other hosts know it, and find nobody there yet."""
    path = hosts.directory / "store.sock"
    outer = subprocess.Popen(["socat", f"UNIX-LISTEN:{path},fork", f"TCP:127.0.0.1:{seaweed.port}"])
    try:
        until(path.exists)
        hosts.environment |= seaweed.environment
        relays = Relays(hosts.lab, seaweed, path)
        relays.open("primary")
        yield relays
    finally:
        outer.kill()
        outer.wait()


def push(hosts: Hosts, bucket: str, roster: str, *more: str) -> Program:
    """Push to the store, and to those of the roster who are there."""
    roster = f"send:{roster}?require=1&max-wait=2s&memory=2M&key={hosts.keys / 'primary.key'}"
    return hosts.start("primary", "push", f"s3://{bucket}/app", roster, "--compress", "none", "--json", *more, key=None)


def come_late(hosts: Hosts, *receivers: tuple[str, ...]) -> list[Program]:
    """Have receivers come, in the middle of a dump whose first part is nowhere but on its way to the store."""
    late = [hosts.receive(*words) for words in receivers]
    for receiver in late:
        receiver.says("waiting for the start")
    return late


@contextlib.contextmanager
def halfway(hosts: Hosts) -> Iterator[None]:
    """In the middle of the dump; it goes on after this."""
    gate = hosts.until_gate()
    hosts.until_taken("r1", size=6_000_000)
    yield
    os.close(gate)


def manifests(s3: Any, bucket: str, series: str) -> list[str]:
    listed = s3.list_objects_v2(Bucket=bucket, Prefix=f"{series}/").get("Contents", [])
    return [entry["Key"] for entry in listed if entry["Key"].endswith("/manifest.json")]


def read(s3: Any, bucket: str, key: str) -> bytes:
    content = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
    assert isinstance(content, bytes)
    return content


def test_a_late_receiver_reads_the_backup_from_the_store(hosts: Hosts, relays: Relays, bucket: str) -> None:
    relays.open("r2", "r3")
    first = hosts.receive("r1", "--memory", "2M")
    pushed = push(hosts, bucket, "r1,r2,r3", "--name", "orders", *hosts.gated())
    with halfway(hosts):
        late = come_late(hosts, ("r2", "-o", "got", *hosts.consumer), ("r3", "-o", "dumps/"))
    assert pushed.wait() == 0, pushed.err
    for receiver in (first, *late):
        assert receiver.wait() == 0, receiver.err
    hosts.assert_whole("r1")
    hosts.assert_whole("r2")
    # As a host that was in time would have it.
    assert [path.name for path in (hosts.directory / "r3" / "dumps").iterdir()] == ["orders"]
    hosts.assert_whole("r3", "dumps/orders")
    for receiver in late:
        assert f"reading s3://{bucket}/app@" in receiver.err
        assert fate(pushed, receiver.name)["state"] == "complete"
        assert fate(pushed, receiver.name)["late"] is True


def test_a_late_receiver_that_can_not_open_the_backup(hosts: Hosts, relays: Relays, bucket: str) -> None:
    """Who has no identity says so, and why, to the sender too."""
    relays.open("r2", "r3")
    key = hosts.directory / "identity"
    words = [sys.executable, "-m", "backhaul", "keygen", "-o", str(key)]
    recipient = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout.strip()
    first = hosts.receive("r1", "--memory", "2M")
    pushed = push(hosts, bucket, "r1,r2,r3", "--encrypt-to", recipient, *hosts.gated())
    with halfway(hosts):
        without, with_ = come_late(
            hosts, ("r2", "-o", "got", *hosts.consumer), ("r3", "-o", "got", "--identity", str(key))
        )
    assert pushed.wait() == 3, pushed.err
    assert fates(pushed) == {"r1": "complete", "r2": "failed", "r3": "complete"}
    assert without.wait() == 10
    assert "encrypted" in without.err
    assert "encrypted" in fate(pushed, "r2")["reason"]
    assert fate(pushed, "r2")["receipt"]["outcome"] == "failed"
    hosts.assert_nothing("r2")
    for receiver in (first, with_):
        assert receiver.wait() == 0, receiver.err
        hosts.assert_whole(receiver.name, "got")


def test_what_was_read_from_the_store_is_compared_and_what_is_missing_is_said(
    hosts: Hosts, relays: Relays, bucket: str, s3: Any
) -> None:
    """What one would read is compared with what was sent; and one that finds nothing says so to the sender."""
    other = hosts.directory / "other"
    other.write_bytes(os.urandom(1_000_000))
    words = ("push", f"s3://{bucket}/other", "--compress", "none", "--from", str(other))
    assert hosts.start("primary", *words, key=None).wait() == 0
    first = hosts.receive("r1", "--memory", "2M")
    pushed = push(hosts, bucket, "r1,r2,r3", *hosts.gated())
    with halfway(hosts):
        deceived, missing = come_late(hosts, ("r2", "-o", "got"), ("r3", "-o", "got", *hosts.consumer))
    until(lambda: manifests(s3, bucket, "app"), "the backup in the store")
    # The other backup, whole in itself, in the place of the one that was made.
    (place,) = [key.rpartition("/")[0] for key in manifests(s3, bucket, "app")]
    (source,) = [key.rpartition("/")[0] for key in manifests(s3, bucket, "other")]
    for entry in s3.list_objects_v2(Bucket=bucket, Prefix=f"{source}/")["Contents"]:
        content = read(s3, bucket, entry["Key"])
        if entry["Key"].endswith("/manifest.json"):
            manifest = json.loads(content)
            manifest["id"] = place.rpartition("/")[2]
            content = json.dumps(manifest).encode()
        s3.put_object(Bucket=bucket, Key=f"{place}/{entry['Key'].rpartition('/')[2]}", Body=content)
    relays.open("r2")
    assert deceived.wait() == 1, deceived.err
    assert "is another backup than the one that was sent" in deceived.err
    hosts.assert_nothing("r2")
    s3.delete_object(Bucket=bucket, Key=f"{place}/manifest.json")
    relays.open("r3")
    assert missing.wait() == 1, missing.err
    assert pushed.wait() == 3, pushed.err
    assert first.wait() == 0
    assert fates(pushed) == {"r1": "complete", "r2": "failed", "r3": "failed"}
    assert "is another backup than the one that was sent" in fate(pushed, "r2")["reason"]
    assert fate(pushed, "r2")["receipt"]["outcome"] == "failed"
    gone = fate(pushed, "r3")
    assert "There is no backup" in gone["reason"]
    assert gone["receipt"]["outcome"] == "failed"
    hosts.assert_nothing("r3")


def test_a_database_read_from_the_store(hosts: Hosts, relays: Relays, bucket: str, postgres: PostgreSQL) -> None:
    """Its streams into a database, whose rows are counted, and each into a file of its own."""
    relays.open("r2", "r3")
    hosts.shorten_buffers()
    postgres.sql("create database stored")
    postgres.sql("create table large as select g, repeat(md5(g::text), 4) from generate_series(1, 300000) g", "stored")
    postgres.sql("create table small as select g from generate_series(1, 100) g; analyze", "stored")
    # The first one takes some of the largest table, and then no more: the dump, which fits no memory, waits for it.
    script = f"[ $(head -c 3000000 | wc -c) -lt 3000000 ] || read go < {hosts.gate}; cat > /dev/null"
    first = hosts.receive("r1", "--memory", "2M", "-o", "kept/", "--", "sh", "-c", script)
    try:
        pushed = push(hosts, bucket, "r1,r2,r3", "--streams", "2", "--from", postgres.url("stored"))
        gate = hosts.until_gate()
        late = come_late(hosts, ("r2", "--into", postgres.url("back"), "--counts"), ("r3", "-o", "kept/"))
        os.close(gate)
        assert pushed.wait() == 0, pushed.err
        for receiver in (first, *late):
            assert receiver.wait() == 0, receiver.err
        assert all("reading s3://" in receiver.err for receiver in late)
        rows = fate(pushed, "r2")["receipt"]["rows"]
        assert rows == {"stored/public.large": 300_000, "stored/public.small": 100}
        sums = "select sum(hashtext(large::text)) from large"
        assert postgres.sql(sums, "back") == postgres.sql(sums, "stored")
        files = {path.name: path.read_bytes() for path in (hosts.directory / "r3" / "kept").iterdir()}
        assert {name: len(content) for name, content in files.items()} == {
            stream["name"]: stream["raw_size"] for stream in pushed.json["streams"]
        }
        assert len(files) > 3
        assert files == {path.name: path.read_bytes() for path in (hosts.directory / "r1" / "kept").iterdir()}
    finally:
        for name in ("stored", "back"):
            postgres.sql(f"drop database if exists {name}")


def manifest_at(reference: str) -> Manifest:
    location, when = reference_at(reference)
    with contextlib.closing(open_store(location)) as store:
        return series.read_manifest(store, series.find_backup(store, when))


def test_a_backup_that_is_replaced_after_it_was_compared_is_not_read(local_cli: Cli, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "file").write_bytes(b"content")
    local_cli.ok("push", str(tmp_path / "some"), "--from", f"dir:{here}")
    reference = f"{tmp_path / 'some'}@latest"
    other = msgspec.structs.replace(manifest_at(reference), host="another")
    began: list[str] = []

    def target(name: str) -> FileTarget:
        began.append(name)
        return FileTarget(str(tmp_path / name))

    with pytest.raises(IntegrityError, match="another manifest"):
        pull_streams(reference, other, target, (), PullProgress())
    assert began == []
    with pytest.raises(IntegrityError, match="another manifest"):
        restore(reference, str(tmp_path / "back"), expected=other)
    assert not (tmp_path / "back").exists()
    restore(reference, str(tmp_path / "back"), expected=manifest_at(reference))
    assert (tmp_path / "back" / "file").read_bytes() == b"content"


def test_no_file_of_several_when_one_is_missing_in_the_store(
    local_cli: Cli, tmp_path: Path, postgres: PostgreSQL
) -> None:
    """As with a stream that comes live: all of them, or none."""
    postgres.sql("create database pieces")
    postgres.sql("create table t as select 7 as id", "pieces")
    local_cli.ok("push", str(tmp_path / "some"), "--from", postgres.url("pieces"))
    postgres.sql("drop database pieces")
    reference = f"{tmp_path / 'some'}@latest"

    def pull(directory: Path) -> None:
        directory.mkdir()
        pull_streams(reference, manifest, lambda name: FileTarget(str(directory / name)), (), PullProgress())

    manifest = manifest_at(reference)
    records = manifest.streams
    pull(tmp_path / "all")
    assert {path.name: path.stat().st_size for path in (tmp_path / "all").iterdir()} == {
        record.name: record.raw.size for record in records
    }
    (missing,) = (tmp_path / "some").glob(f"*/{records[-1].object}")
    missing.unlink()
    with pytest.raises(BackhaulError, match=records[-1].name):
        pull(tmp_path / "none")
    assert not list((tmp_path / "none").iterdir())
