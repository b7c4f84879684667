"""Fan-out by the command line, on a network of namespaces: databases, bytes on the cable, who is let in, and when."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backhaul.testing.network_lab import Lab
from backhaul.testing.servers import MariaDB, PostgreSQL
from tests.end_to_end.awkward_databases import (
    fingerprint_postgresql,
    make_postgresql,
    schema_postgresql,
)
from tests.end_to_end.fan_out_hosts import RECEIVERS, Hosts, fate, fates, make_payload, until

pytestmark = pytest.mark.timeout(150)
HOSTS = ("primary", "second", "r1", "r2", "r3", "r4")


# -- bytes on the cable --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4, 8])
def test_the_sender_sends_once(tmp_path: Path, keys: Path, count: int) -> None:
    payload = make_payload(tmp_path, 60_000_000)
    with Lab(["primary", *RECEIVERS[:count]]) as lab:
        hosts = Hosts(lab, tmp_path, keys, payload)
        receivers = [hosts.receive(name, "-o", "got", "--json") for name in RECEIVERS[:count]]
        sender = hosts.send(count=count)
        assert sender.wait() == 0, sender.err
        sent = lab.host("primary").sent()
        for receiver in receivers:
            assert receiver.wait() == 0
            hosts.assert_whole(receiver.name, "got")
        # Of each packet 66 bytes are headers: Ethernet's, IP's, and TCP's with time stamps.
        assert len(hosts.content) < sent.bytes - 66 * sent.packets < 1.02 * len(hosts.content)
        result = sender.json["fan_out"]
        assert result["payload"] == len(hosts.content)
        assert len(hosts.content) < result["sent"] < 1.02 * len(hosts.content)
        # And each of the others sends it once at most.
        passed_on = sorted(receiver.json["passed_on"] for receiver in receivers)
        assert passed_on[0] == 0
        assert all(len(hosts.content) < bytes_ < 1.02 * len(hosts.content) for bytes_ in passed_on[1:])


def test_what_compresses_goes_over_the_cable_compressed(hosts: Hosts) -> None:
    text = b"".join(b"%d\tcustomer %d\t2026-11-22\n" % (n, n * 7) for n in range(600_000))
    (hosts.directory / "text").write_bytes(text)
    receivers = hosts.receivers(2)
    sender = hosts.send("--compress", "3", "--", "cat", str(hosts.directory / "text"), count=2)
    assert sender.wait() == 0, sender.err
    for receiver in receivers:
        assert receiver.wait() == 0
        hosts.assert_whole(receiver.name, content=text)
    assert sender.json["fan_out"]["sent"] < len(text) / 3


# -- databases -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(postgres: PostgreSQL) -> Iterator[PostgreSQL]:
    """A server with the database ``fanned``."""
    make_postgresql(postgres, "fanned")
    yield postgres
    postgres.sql("drop database fanned")


@contextlib.contextmanager
def others(count: int) -> Iterator[list[PostgreSQL]]:
    """Servers of their own, with the roles of the source."""
    servers = [PostgreSQL() for _ in range(count)]
    try:
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(PostgreSQL.start, servers))
        for server in servers:
            server.sql("""create role reader; create role "Owner Ö" login password 'unsaid'""")
        yield servers
    finally:
        for server in servers:
            server.stop()


def fingerprint(server: PostgreSQL, name: str) -> dict[str, str]:
    """Roles have other numbers on each server, which the database's rights are shown with."""
    found = fingerprint_postgresql(server, name)
    found["database"] = re.sub(r"\(\d+,\d+,", "(", found["database"])
    return found


def test_a_dump_restored_by_three_servers_as_it_is_made(hosts: Hosts, source: PostgreSQL) -> None:
    restore = ("-o", "the.dump", "--", PostgreSQL.program("pg_restore"), "-e", "-C", "-d", "postgres")
    dump = (PostgreSQL.program("pg_dump"), "-Fc", "-Z0", "-C", "fanned")
    with others(3) as targets:
        receivers = [
            hosts.receive(name, *restore, env=target.environment)
            for name, target in zip(("r1", "r2", "r3"), targets, strict=True)
        ]
        words = ("send", "--hosts", "r1,r2,r3", "--json", "--", *dump)
        sender = hosts.start("primary", *words, env=source.environment)
        assert sender.wait() == 0, sender.err
        before, schema = fingerprint(source, "fanned"), schema_postgresql(source, "fanned")
        dumps = set()
        for receiver, target in zip(receivers, targets, strict=True):
            assert receiver.wait() == 0, receiver.err
            assert fingerprint(target, "fanned") == before
            assert schema_postgresql(target, "fanned") == schema
            receipt = fate(sender, receiver.name)["receipt"]
            assert (receipt["outcome"], receipt["exit_status"], receipt["file"]) == ("complete", 0, "the.dump")
            dumps.add(hosts.got(receiver.name, "the.dump"))
    assert len(dumps) == 1


def test_a_database_in_several_streams_restored_in_parallel(hosts: Hosts, source: PostgreSQL) -> None:
    receivers = [
        hosts.receive(name, "--into", source.url(f"back_{name}"), "--counts", "--json") for name in ("r1", "r2")
    ]
    sender = hosts.send("--compress", "1", "--streams", "3", "--from", source.url("fanned"), count=2)
    assert sender.wait() == 0, sender.err
    assert {stream["name"] for stream in sender.json["streams"]} >= {"schema", "after", "data-1", "data-2", "data-3"}
    before, schema = fingerprint(source, "fanned"), schema_postgresql(source, "fanned")
    for receiver in receivers:
        assert receiver.wait() == 0, receiver.err
        name = f"back_{receiver.name}"
        assert fingerprint(source, name) == before | {"settings": fingerprint(source, name)["settings"]}
        assert schema_postgresql(source, name) == schema
        assert receiver.json["raw_size"] == sender.json["raw_size"]
        assert sum(fate(sender, receiver.name)["receipt"]["rows"].values()) > 270_000
        source.sql(f"drop database {name}")


def test_a_database_whose_dump_is_killed_is_seen_by_nobody(hosts: Hosts, source: PostgreSQL) -> None:
    """Not in the place of the one that was there, and not beside it."""
    source.sql("create database kept")
    source.sql("create table here (id int); insert into here values (7)", "kept")
    before = databases(source)
    receiver = hosts.receive("r1", "--into", source.url("kept"), "--replace")
    # A table that is locked: the dump waits, once others have gone out.
    with locked(source, "fanned", "events"):
        sender = hosts.send("--streams", "2", "--from", source.url("fanned"), count=1)
        until(lambda: source.sql("select count(*) from pg_locks where not granted") != "0", "a dump that waits")
        sender.kill()
        sender.wait()
    assert receiver.wait() == 1
    assert source.sql("select id from here", "kept") == "7"
    assert databases(source) == before
    source.sql("drop database kept")


@pytest.mark.parametrize(("require", "status"), [("1", 3), ("all", 1)])
def test_a_setting_that_can_not_be_brought_back(hosts: Hosts, postgres: PostgreSQL, require: str, status: int) -> None:
    """Everything else is there; but it is no complete end, here or at the sender."""
    postgres.sql("create role modest login createdb")
    postgres.sql("create database settings")
    # Only who administers the server may set it.
    postgres.sql("create table t as select 7 as id; alter database settings set log_statement = 'ddl'", "settings")
    try:
        short = hosts.receive("r1", "--into", postgres.url("settings_r1").replace("postgres@", "modest@"), "--no-owner")
        whole = hosts.receive("r2", "--into", postgres.url("settings_r2"))
        sender = hosts.send("--require", require, "--from", postgres.url("settings"), count=2)
        assert sender.wait() == status, sender.err
        assert short.wait() == 3, short.err
        assert "log_statement" in short.err
        assert postgres.sql("select id from t", "settings_r1") == "7"
        assert fates(sender) == {"r1": "failed", "r2": "complete"}
        assert "log_statement" in fate(sender, "r1")["reason"]
        assert whole.wait() == 0, whole.err
    finally:
        for name in ("settings", "settings_r1", "settings_r2"):
            postgres.sql(f"drop database if exists {name}")
        postgres.sql("drop role modest")


def databases(server: PostgreSQL) -> list[str]:
    return server.sql("select datname from pg_database where not datistemplate order by 1").splitlines()


@contextlib.contextmanager
def locked(server: PostgreSQL, database: str, table: str) -> Iterator[None]:
    process = subprocess.Popen(
        [PostgreSQL.program("psql"), "-Xq", "-d", database],
        env={**os.environ, **server.environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(f"begin; lock table {table} in access exclusive mode; \\echo locked\n".encode())
        process.stdin.flush()
        assert process.stdout.readline() == b"locked\n"
        yield
    finally:
        process.communicate()


SHOP = r"""
create table orders (id int primary key auto_increment, name varchar(100), total decimal(12, 2), key (name));
insert into orders (name, total) select concat('ö', seq, '\'\\"\n'), seq / 7 from seq_1_to_20000;
create table notes (id int primary key, b blob);
insert into notes select seq, unhex(md5(seq)) from seq_1_to_20000;
create view large as select * from orders where total > 1000;
create function plus_one(i int) returns int deterministic return i + 1;
"""


def test_mariadb_into_databases_and_into_files(hosts: Hosts, mariadb: MariaDB) -> None:
    """Several streams: a database takes them, and a directory; a single file does not, and holds up nobody."""
    mariadb.sql("create database fan")
    mariadb.sql(SHOP, "fan")
    try:
        receivers = [hosts.receive(name, "--into", mariadb.url(f"fan_{name}")) for name in ("r1", "r2")]
        kept, wrong = hosts.receive("r3", "-o", "kept/"), hosts.receive("r4", "-o", "got")
        words = ("--compress", "1", "--streams", "2", "--require", "3", "--from", mariadb.url("fan"))
        sender = hosts.send(*words, count=4)
        assert sender.wait() == 3, sender.err
        for receiver in receivers:
            assert receiver.wait() == 0, receiver.err
            assert mariadb.dump(f"fan_{receiver.name}") == mariadb.dump("fan")
        assert kept.wait() == 0
        sizes = {file.name: file.stat().st_size for file in (hosts.directory / "r3" / "kept").iterdir()}
        assert sizes == {stream["name"]: stream["raw_size"] for stream in sender.json["streams"]}
        assert len(sizes) > 1
        assert wrong.wait() == 2
        assert "--into" in wrong.err
        hosts.assert_nothing("r4")
        assert fate(sender, "r4")["state"] == "failed"
    finally:
        for name in ("fan", "fan_r1", "fan_r2"):
            mariadb.sql(f"drop database if exists `{name}`")


# -- who is let in -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forged", ["plain", "other shared key", "other authority", "role receive"])
def test_a_forged_sender(hosts: Hosts, forged: str) -> None:
    """It gets nothing into a receiver that listens, which the true sender then uses."""
    shared = forged == "other shared key"
    receiver = hosts.listen("r1", key="shared.key" if shared else "")
    key = {"other shared key": "other.key", "other authority": "../stranger/primary.key", "role receive": "r2.key"}
    insecure = ("--insecure-plain",) if forged == "plain" else ()
    forger = hosts.send("--max-wait", "2s", *insecure, count=1, key=key.get(forged), host="second")
    assert forger.wait() in {1, 10}
    assert not any(name.suffix == "" for name in (hosts.directory / "r1").iterdir())
    sender = hosts.send(count=1, key="shared.key" if shared else "")
    assert sender.wait() == 0, sender.err
    until((hosts.directory / "r1" / "got").exists)
    hosts.assert_whole("r1")
    assert receiver.running
    if forged != "role receive":  # (Which may see by itself that its key is not for that.)
        assert "10.77.0.2 was not let in" in receiver.err


@pytest.mark.parametrize("forged", ["plain", "other shared key", "other authority", "role receive"])
def test_a_forged_sender_that_is_called(hosts: Hosts, forged: str) -> None:
    shared = forged == "other shared key"
    key = {"other shared key": "other.key", "other authority": "../stranger/primary.key", "role receive": "r2.key"}
    insecure = ("--insecure-plain",) if forged == "plain" else ()
    forger = hosts.send("--max-wait", "20s", *insecure, count=1, key=key.get(forged))
    receiver = hosts.receive("r1", "--max-wait", "3s", key="shared.key" if shared else "")
    assert receiver.wait() in {1, 10}
    hosts.assert_nothing("r1")
    if forger.running:
        forger.kill()
    assert forger.wait() != 0


def test_receivers_that_may_not(hosts: Hosts) -> None:
    """One with another authority's key and one that is not on the roster get nothing; the others are not disturbed."""
    strange = hosts.receive("r3", "--max-wait", "3s", key="../stranger/r3.key")
    uninvited = hosts.receive("r4", "--max-wait", "3s")
    sender = hosts.send(*hosts.gated(), count=3)
    assert uninvited.wait() == 1
    assert "not of the roster" in uninvited.err
    assert strange.wait() in {1, 10}
    assert "different authorities" in strange.err
    receivers = hosts.receivers(3)
    hosts.open_gate()
    assert sender.wait() == 0, sender.err
    for receiver in receivers:
        assert receiver.wait() == 0
        hosts.assert_whole(receiver.name)
    hosts.assert_nothing("r4")


def test_whoever_has_a_key_and_comes(hosts: Hosts) -> None:
    """With no roster it begins when there are enough, and waits a little for more."""
    began = hosts.directory / "began"
    command = ("--", "sh", "-c", f"touch {began}; cat {hosts.payload}")
    sender = hosts.send("--min-receivers", "2", "--min-wait", "4s", *command)
    receivers = hosts.receivers(2)
    for receiver in receivers:
        receiver.says("waiting for the start")
    receivers.append(hosts.receive("r3"))
    receivers[-1].says("waiting for the start")
    assert not began.exists()
    assert sender.wait() == 0, sender.err
    for receiver in receivers:
        assert receiver.wait() == 0
        hosts.assert_whole(receiver.name)


def test_too_few_come(hosts: Hosts) -> None:
    """The dump is not begun, and those who came are told."""
    began = hosts.directory / "began"
    receiver = hosts.receive("r1", "--max-wait", "2s")
    sender = hosts.send("--require", "2", "--max-wait", "2s", "--", "touch", str(began))
    assert sender.wait() == 1
    assert "1 of 2 required receivers came" in sender.err
    assert "r2" in sender.err and "r3" in sender.err
    assert receiver.wait() == 1
    assert not began.exists()
    hosts.assert_nothing("r1")


def test_enough_come(hosts: Hosts) -> None:
    receivers = hosts.receivers(2)
    sender = hosts.send("--require", "2", "--max-wait", "3s")
    assert sender.wait() == 3
    for receiver in receivers:
        assert receiver.wait() == 0
        hosts.assert_whole(receiver.name)
    assert fate(sender, "r3")["state"] == "waiting"


@pytest.mark.parametrize("require", ["0", "4", "some"])
def test_a_requirement_that_does_not_fit(hosts: Hosts, require: str) -> None:
    assert hosts.send("--require", require).wait() == 2


def test_a_receiver_that_can_not_do_what_it_is_asked_to(hosts: Hosts) -> None:
    """It says so before the dump begins, and is there for the next one."""
    (hosts.directory / "r1" / "place").mkdir(parents=True)
    receiver = hosts.listen("r1", "-o", "place/got")
    (hosts.directory / "r1" / "place").rmdir()
    began = hosts.directory / "began"
    sender = hosts.send("--max-wait", "3s", "--", "touch", str(began), count=1)
    assert sender.wait() == 1
    assert "place/got can't be written" in sender.err
    assert not began.exists()
    (hosts.directory / "r1" / "place").mkdir()
    assert hosts.send(count=1).wait() == 0
    hosts.assert_whole("r1", "place/got")
    assert receiver.running


def test_a_port_that_is_taken_for_a_while(hosts: Hosts) -> None:
    """The service is not busy for ever with a session that could not begin."""
    taken = hosts.lab.host("r1").start(["socat", "TCP-LISTEN:7500", "-"], stdin=subprocess.PIPE)
    until(lambda: b"7500" in hosts.lab.host("r1").run(["ss", "-Hltn"], stdout=subprocess.PIPE).stdout)
    receiver = hosts.listen("r1", "--data-port", "7500")
    assert hosts.send("--max-wait", "2s", count=1).wait() == 1
    taken.kill()
    taken.wait()
    sender = hosts.send(count=1)
    assert sender.wait() == 0, sender.err
    hosts.assert_whole("r1")
    assert receiver.running


# -- late ones -----------------------------------------------------------------------------------------------


def test_a_late_receiver_catches_up_from_the_spool(hosts: Hosts) -> None:
    first = hosts.receive("r1", "--memory", "2M")
    sender = hosts.send(
        *("--require", "1", "--max-wait", "2s", "--memory", "2M", "--spool", str(hosts.directory)),
        *hosts.gated(),
        count=2,
    )
    gate = hosts.until_gate()
    hosts.until_taken("r1")
    late = hosts.receive("r2")
    hosts.until_taken("r2", size=6_000_000)
    os.close(gate)
    assert sender.wait() == 0, sender.err
    for receiver in (first, late):
        assert receiver.wait() == 0
        hosts.assert_whole(receiver.name)
    assert fate(sender, "r2")["late"] is True
    assert fate(sender, "r2")["caught_up"] > 6_000_000
    # The one before it has not got the first chunks any more, and has said so: it is not tried.
    assert fate(sender, "r2")["fed_by"][0] == "primary"
    assert "late" not in fate(sender, "r1")


def test_a_receiver_that_comes_too_late(hosts: Hosts) -> None:
    first = hosts.receive("r1", "--memory", "2M")
    sender = hosts.send("--require", "1", "--max-wait", "2s", "--memory", "2M", *hosts.gated(), count=2)
    gate = hosts.until_gate()
    hosts.until_taken("r1", size=6_000_000)
    late = hosts.receive("r2", "--max-wait", "2s")
    assert late.wait() == 1
    assert "came too late" in late.err
    hosts.assert_nothing("r2")
    os.close(gate)
    assert sender.wait() == 3, sender.err
    assert first.wait() == 0
    hosts.assert_whole("r1")
    assert fate(sender, "r2")["state"] != "complete"
    assert "too late" in fate(sender, "r2")["reason"]


# -- services ------------------------------------------------------------------------------------------------


def test_a_service_takes_one_session_after_the_other(hosts: Hosts) -> None:
    """It survives those that fail, and tells the service manager that it is there."""
    path = hosts.directory / "notify.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(30)
        service = hosts.listen(
            *("r1", "-o", "got-{sender}", "--", "sh", "-c", "cat > taken && mv taken seen; test -e fine"),
            env={"NOTIFY_SOCKET": str(path)},
        )
        assert manager.recv(100) == b"READY=1"
    place = hosts.directory / "r1"
    (place / "fine").touch()
    assert hosts.send(count=1).wait() == 0
    hosts.assert_whole("r1", "got-primary", "seen")
    for name in ("got-primary", "seen"):
        (place / name).unlink()
    assert hosts.send("--", "sh", "-c", f"cat {hosts.payload}; exit 3", count=1).wait() == 1
    assert not {"got-primary", "seen"} & {entry.name for entry in place.iterdir()}
    (place / "fine").unlink()
    failed = hosts.send(count=1)
    assert failed.wait() == 1
    hosts.assert_whole("r1", "got-primary")  # the file is whole, and the command was not content
    (place / "fine").touch()
    again = hosts.send("--", "cat", str(hosts.payload), str(hosts.payload), count=1)
    assert again.wait() == 0, again.err
    hosts.assert_whole("r1", "got-primary", "seen", content=2 * hosts.content)
    assert service.running
    service.kill(signal.SIGTERM)
    assert service.wait() == 130


def test_the_unit_of_the_service(hosts: Hosts) -> None:
    program = hosts.start("r1", "receive", "--listen", "-o", "/backups/a b-{id}.dump", "--unit", key=None)
    assert program.wait() == 0, program.err
    text = program.out.decode()
    assert "Type=notify" in text
    assert "--unit" not in text.split("[Service]")[1]
    unit = hosts.directory / "backhaul-receive.service"
    unit.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "--man=no", "verify", str(unit)], check=False, capture_output=True, text=True, timeout=60
    )
    assert not [line for line in (done.stdout + done.stderr).splitlines() if "backhaul" in line], done.stderr
    assert done.returncode == 0


def test_two_senders_to_one_receiver(hosts: Hosts) -> None:
    """The second is told that it is busy, waits, and gets through."""
    receiver = hosts.listen("r1", "-o", "got-{sender}")
    first = hosts.send(*hosts.gated(), count=1)
    gate = hosts.until_gate()
    # In words, for which it must not be asked for JSON.
    words = ("send", "--hosts", "r1", "--", "cat", str(hosts.payload), str(hosts.payload))
    second = hosts.start("second", *words)
    second.says("it is at a session with primary")
    os.close(gate)
    assert first.wait() == 0, first.err
    assert second.wait() == 0, second.err
    hosts.assert_whole("r1", "got-primary")
    hosts.assert_whole("r1", "got-second", content=2 * hosts.content)
    assert receiver.running


def test_two_senders_to_receivers_of_their_own(hosts: Hosts) -> None:
    for name in ("r1", "r2", "r3", "r4"):
        hosts.listen(name)
    first = hosts.send("--hosts", "r1,r2", *hosts.gated())
    gate = hosts.until_gate()
    second = hosts.send("--hosts", "r3,r4", "--", "cat", str(hosts.payload), str(hosts.payload), host="second")
    assert second.wait() == 0, second.err
    os.close(gate)
    assert first.wait() == 0, first.err
    for name in ("r1", "r2"):
        hosts.assert_whole(name)
    for name in ("r3", "r4"):
        hosts.assert_whole(name, content=2 * hosts.content)


def test_who_is_there(hosts: Hosts) -> None:
    hosts.listen("r1", "--spool", ".", "--spool-size", "7M")
    hosts.listen("r2")
    hosts.listen("r4", key="../stranger/r1.key")
    check = hosts.start("primary", "send", "--hosts", "r1,r2", "--check", "--json")
    assert check.wait() == 0, check.err
    one, two = check.json["receivers"]
    assert (one["name"], one["there"], one["spool"]) == ("r1", True, 7_000_000)
    assert one["free"] > 0
    assert abs(one.get("clock_off", 0.0)) < 5
    assert one["tool"].startswith("backhaul ")
    assert "cat > taken" in one["wants"]
    assert one["expires"].startswith("20")
    assert two["there"] is True
    # It has only looked: who was there is free again, and one that is at a session says so.
    sender = hosts.send("--hosts", "r2", *hosts.gated())
    gate = hosts.until_gate()
    check = hosts.start("primary", "send", "--hosts", "r1,r2,r3,r4", "--check", "--max-wait", "2s", "--json")
    assert check.wait() == 1
    (*_, found) = [document for document in check.documents if "receivers" in document]
    there = {receiver["name"]: receiver for receiver in found["receivers"]}
    assert {name: receiver["there"] for name, receiver in there.items()} == {
        "r1": True,
        "r2": False,
        "r3": False,
        "r4": False,
    }
    assert "it is at a session with primary" in there["r2"]["reason"]
    assert "refused" in there["r3"]["reason"]
    assert "different authorities" in there["r4"]["reason"]
    os.close(gate)
    assert sender.wait() == 0, sender.err
    hosts.assert_whole("r2")
