"""PostgreSQL by URL: pushed as several streams of one state, restored, proved; and what happens when it fails."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backhaul.formats.source_url import parse_source_url
from backhaul.pipeline.supervisor import Supervisor
from backhaul.sources.postgresql import PostgreSQLSource
from backhaul.testing.servers import PostgreSQL
from tests.conftest import Cli, keys, open_uploads
from tests.end_to_end.awkward_databases import fingerprint_postgresql, make_postgresql, schema_postgresql


@pytest.fixture(scope="session")
def app(postgres: PostgreSQL) -> str:
    make_postgresql(postgres, "app")
    return "app"


@pytest.fixture(autouse=True)
def drop_the_rest(postgres: PostgreSQL) -> Iterator[None]:
    """Physical backups and whole clusters would grow from test to test."""
    yield
    for name in databases(postgres):
        if name not in ("app", "postgres"):
            postgres.sql(f'drop database "{name}" with (force)')


@pytest.fixture(scope="session")
def other() -> Iterator[PostgreSQL]:
    """Another server, for restores of roles and whole clusters."""
    server = PostgreSQL()
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def pg_cli(cli: Cli, postgres: PostgreSQL) -> Cli:
    # No PGHOST and the like: where the server is, the URL says.
    return cli


def streams_of(cli: Cli, series: str) -> dict[str, Any]:
    manifest = cli.ok("show", series, "--json").json["manifest"]
    return {stream["name"]: stream for stream in manifest["streams"]}


def databases(server: PostgreSQL) -> list[str]:
    return server.sql("select datname from pg_database where not datistemplate order by 1").splitlines()


def children_named(program: str) -> list[int]:
    """The living processes of this user whose program has that name, and that our tests started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[0].rpartition(b"/")[2] == program.encode() and b"--version" not in words:
                found.append(int(entry.name))
    return found


def descendants_named(process: subprocess.Popen[bytes], program: str) -> list[int]:
    """The same, below one process."""
    below = set(descendants_of(process))
    return [pid for pid in children_named(program) if pid in below]


def descendants_of(process: subprocess.Popen[bytes]) -> list[int]:
    """The processes below one."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue

    def below(pid: int) -> bool:
        while pid in parents and pid != 1:
            if pid == process.pid:
                return True
            pid = parents[pid]
        return False

    return [pid for pid in parents if pid != process.pid and below(pid)]


def kill_at_random(process: subprocess.Popen[bytes], program: str, delay: float) -> bool:
    """Kill one of a push's programs after a while; tell whether a living one was killed."""
    deadline = time.monotonic() + 30
    while not (pids := descendants_named(process, program)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(delay)
    pids = descendants_named(process, program)
    if not pids:
        return False
    pid, state = random.choice(pids), ""
    # Stopped first: what can be seen standing still is alive, and has not ended a moment ago.
    try:
        os.kill(pid, signal.SIGSTOP)
        for _ in range(200):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state in "TZX":
                break
            time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)
    except (OSError, IndexError):
        return False
    return state == "T"


def test_everything_comes_back(pg_cli: Cli, postgres: PostgreSQL, app: str, bucket: str) -> None:
    series = f"s3://{bucket}/app"
    pushed = pg_cli.ok("push", series, "--from", postgres.url(app), "--streams", "3", "--json").json
    names = {stream["name"] for stream in pushed["streams"]}
    assert {"globals", "schema", "after", "data-1", "data-2", "data-3"} == names
    source = pushed["source"]
    assert source["kind"] == "postgresql"
    assert source["server"].startswith("15.")
    assert source["coordinates"]["lsn"].count("/") == 1
    tables = {table["name"]: table for table in source["databases"][0]["tables"]}
    assert tables["public.wide"]["rows"] == 120000
    assert tables['"Größe & Maß"."t ""q"".x\'"']["rows"] == 1000
    assert tables["public.wide"].get("stream") != tables["public.events"].get("stream")

    result = pg_cli.ok("restore", series, "--into", postgres.url("back"), "--json").json
    assert result["remarks"] == []
    before, after = fingerprint_postgresql(postgres, app), fingerprint_postgresql(postgres, "back")
    assert len(before) > 20
    assert after == before
    assert schema_postgresql(postgres, "back") == schema_postgresql(postgres, app)
    # Sequences go on where they were.
    assert postgres.sql("select nextval('alone'), nextval('events_id_seq')", "back") == "23|150001"
    assert [name for name in databases(postgres) if "restoring" in name or "replaced" in name] == []


def test_a_single_stream_comes_back(pg_cli: Cli, postgres: PostgreSQL, app: str) -> None:
    series = str(pg_cli.directory / "single")
    pushed = pg_cli.ok("push", series, "--from", postgres.url(app), "--streams", "1", "--json").json
    assert [stream["name"] for stream in pushed["streams"]] == ["data"]
    pg_cli.ok("restore", series, "--into", postgres.url("back_single"))
    assert fingerprint_postgresql(postgres, "back_single") == fingerprint_postgresql(postgres, app)
    # And without Backhaul: it is an archive of pg_restore's.
    listing = f"zstd -dc {series}/*/data.zst | {PostgreSQL.program('pg_restore')} -f - | tail -5"
    text = subprocess.run(["bash", "-c", listing], capture_output=True, text=True, check=True).stdout
    assert "PostgreSQL database dump complete" in text


def test_what_is_backed_up_is_known_though_only_the_roles_have_started(postgres: PostgreSQL, app: str) -> None:
    """A fan-out says at its start what is to come, and roles are of no state."""
    source = PostgreSQLSource(parse_source_url(postgres.url(app)), streams=2)
    source.check()
    with Supervisor() as group:
        streams = source.open(group)
        assert streams[0].name == "globals"
        try:
            streams[0].source.start(group)
            outline = source.outline()
        finally:
            for stream in streams:
                stream.source.abort()
            source.abort()
    assert outline is not None
    assert [database.name for database in outline.databases] == [app]


def test_without_the_schema_public(pg_cli: Cli, postgres: PostgreSQL) -> None:
    """What the source dropped is not in what is restored, although every new database has it."""
    make_postgresql(postgres, "bare", public=False)
    series = str(pg_cli.directory / "bare")
    pg_cli.ok("push", series, "--from", postgres.url("bare"))
    pg_cli.ok("restore", series, "--into", postgres.url("bare_back"))
    assert fingerprint_postgresql(postgres, "bare_back") == fingerprint_postgresql(postgres, "bare")
    assert postgres.sql("select count(*) from pg_namespace where nspname = 'public'", "bare_back") == "0"
    assert schema_postgresql(postgres, "bare_back") == schema_postgresql(postgres, "bare")


@pytest.mark.first
@pytest.mark.timeout(600)
def test_a_table_of_two_gigabytes(pg_cli: Cli, postgres: PostgreSQL, bucket: str) -> None:
    pg_cli.cold = True  # its memory is measured
    postgres.sql("create database large")
    postgres.sql(
        """create unlogged table lines (id int, v text); alter table lines alter v set storage external;
           insert into lines select n, repeat(md5(n::text), 60) from generate_series(1, 1060000) n;
           create table small (id int primary key); insert into small select generate_series(1, 1000)""",
        "large",
    )
    assert int(postgres.sql("select pg_table_size('lines')", "large")) > 2_000_000_000
    series = f"s3://{bucket}/large"
    pushed = pg_cli.ok("push", series, "--from", postgres.url("large"), "--json").json
    assert pushed["raw_size"] > 2_000_000_000
    assert pushed["peak_memory"] <= pushed["memory"]["total"]
    restored = pg_cli.ok("restore", series, "--into", postgres.url("large_back"), "--json").json
    assert restored["peak_memory"] <= restored["memory"]["total"]
    query = "select count(*), sum(id), sum(hashtext(v)::bigint) from lines"
    assert postgres.sql(query, "large_back") == postgres.sql(query, "large")
    for name in ("large", "large_back"):
        postgres.sql(f"drop database {name}")


def test_a_whole_cluster(pg_cli: Cli, postgres: PostgreSQL, other: PostgreSQL, bucket: str) -> None:
    """All databases, roles with their passwords, into a server that has none of them."""
    source = PostgreSQL()
    try:
        source.start()
        make_postgresql(source, "app")
        for name in ("Zwei Ö", "zwei=o'host=x", "empty"):
            source.sql(f'create database "{name}"')
        source.sql("create table t as select generate_series(1, 10) n", "Zwei Ö")
        series = f"s3://{bucket}/cluster"
        pushed = pg_cli.ok("push", series, "--from", source.url(), "--json").json
        assert {d["name"] for d in pushed["source"]["databases"]} == {
            "app",
            "Zwei Ö",
            "zwei=o'host=x",
            "empty",
            "postgres",
        }
        missing = pg_cli("restore", series, "--into", other.url())
        assert missing.code == 10
        assert "Owner Ö" in missing.err
        assert "--globals" in missing.err
        pg_cli.ok("restore", series, "--into", other.url(), "--globals")
        for name in ("app", "Zwei Ö"):
            assert fingerprint_postgresql(other, name) == fingerprint_postgresql(source, name)
            assert schema_postgresql(other, name) == schema_postgresql(source, name)
        assert databases(other) == databases(source)
        secret = "select rolname, rolpassword from pg_authid where rolname = 'Owner Ö'"
        assert other.sql(secret) == source.sql(secret)
        assert "SCRAM-SHA-256" in other.sql(secret)
    finally:
        source.stop()


def test_the_streams_are_of_one_state(pg_cli: Cli, postgres: PostgreSQL) -> None:
    """pgbench writes all the while: its sums over four tables, which are in different streams, agree."""
    postgres.sql("create database bench")
    bench = [PostgreSQL.program("pgbench"), "-q", "-d", "bench"][:2]
    environment = {**os.environ, **postgres.environment}
    subprocess.run([*bench, "-i", "-s", "3", "bench"], env=environment, check=True, capture_output=True)
    # A second large table that the same transactions change, to be in another stream than the first.
    postgres.sql(
        """create table mirror as select aid, abalance, filler from pgbench_accounts;
           alter table mirror add primary key (aid)""",
        "bench",
    )
    script = pg_cli.directory / "script.sql"
    script.write_text(
        """\\set aid random(1, 300000)
\\set delta random(-5000, 5000)
\\set bid random(1, 3)
\\set tid random(1, 30)
begin;
update pgbench_accounts set abalance = abalance + :delta where aid = :aid;
update mirror set abalance = abalance + :delta where aid = :aid;
update pgbench_tellers set tbalance = tbalance + :delta where tid = :tid;
update pgbench_branches set bbalance = bbalance + :delta where bid = :bid;
insert into pgbench_history (tid, bid, aid, delta, mtime) values (:tid, :bid, :aid, :delta, now());
end;
"""
    )
    load = subprocess.Popen(
        [*bench[:1], "-n", "-c", "2", "-T", "120", "-f", str(script), "bench"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while postgres.sql("select count(*) from pgbench_history", "bench") == "0" and time.monotonic() < deadline:
            time.sleep(0.05)
        series = str(pg_cli.directory / "bench")
        pushed = pg_cli.ok(
            "push", series, "--from", postgres.url("bench"), "--streams", "2", "--limit", "30M", "--json"
        ).json
        history = int(postgres.sql("select count(*) from pgbench_history", "bench"))
    finally:
        load.terminate()
        load.wait(30)
    tables = {table["name"]: table for table in pushed["source"]["databases"][0]["tables"]}
    assert tables["public.pgbench_accounts"].get("stream") != tables["public.mirror"].get("stream")
    pg_cli.ok("restore", series, "--into", postgres.url("bench_back"))
    sums = postgres.sql(
        """select (select sum(abalance) from pgbench_accounts), (select sum(abalance) from mirror),
                  (select sum(tbalance) from pgbench_tellers), (select sum(bbalance) from pgbench_branches),
                  (select coalesce(sum(delta), 0) from pgbench_history)""",
        "bench_back",
    ).split("|")
    assert len(set(sums)) == 1
    kept = int(postgres.sql("select count(*) from pgbench_history", "bench_back"))
    assert 0 < kept < history  # it did go on meanwhile
    assert kept == tables["public.pgbench_history"]["rows"]


def test_a_restore_refuses_what_is_not_empty(pg_cli: Cli, postgres: PostgreSQL, app: str) -> None:
    series = str(pg_cli.directory / "series")
    postgres.sql("create database small")
    postgres.sql("create table t as select generate_series(1, 100) n", "small")
    pg_cli.ok("push", series, "--from", postgres.url("small"))
    refused = pg_cli("restore", series, "--into", postgres.url(app))
    assert refused.code == 10
    assert "'app' to be empty, or not to exist" in refused.err
    assert "--replace" in refused.err
    # An empty one is taken; one that is not is replaced when that was said, with somebody connected.
    postgres.sql("create database waiting")
    pg_cli.ok("restore", series, "--into", postgres.url("waiting"))
    postgres.sql("insert into t values (0)", "waiting")
    connected = subprocess.Popen(
        [PostgreSQL.program("psql"), "-X", "-d", "waiting", "-c", "select pg_sleep(100)"],
        env={**os.environ, **postgres.environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        pg_cli.ok("restore", series, "--into", postgres.url("waiting"), "--replace")
    finally:
        connected.kill()
        connected.wait()
    assert postgres.sql("select count(*) from t", "waiting") == "100"
    assert [name for name in databases(postgres) if "restoring" in name or "replaced" in name] == []


def test_a_pool_that_comes_back_at_once(pg_cli: Cli, postgres: PostgreSQL) -> None:
    """Clients that reconnect as soon as they are thrown out don't keep a database from being replaced."""
    series = str(pg_cli.directory / "series")
    postgres.sql("create database pooled")
    postgres.sql("create table t as select generate_series(1, 100) n", "pooled")
    pg_cli.ok("push", series, "--from", postgres.url("pooled"))
    postgres.sql("insert into t values (0)", "pooled")
    loop = f"while true; do {PostgreSQL.program('psql')} -X -q -d pooled -c 'select pg_sleep(5)'; done"
    clients = [
        subprocess.Popen(
            ["bash", "-c", loop],
            env={**os.environ, **postgres.environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for _ in range(6)
    ]
    try:
        time.sleep(0.5)
        pg_cli.ok("restore", series, "--into", postgres.url("pooled"), "--replace")
    finally:
        for client in clients:
            os.killpg(client.pid, signal.SIGKILL)
            client.wait()
    assert postgres.sql("select count(*) from t", "pooled") == "100"
    assert postgres.sql("select datallowconn from pg_database where datname = 'pooled'") == "t"
    assert [name for name in databases(postgres) if name.startswith("pooled_")] == []


def test_a_damaged_backup_replaces_nothing(pg_cli: Cli, postgres: PostgreSQL) -> None:
    series = pg_cli.directory / "series"
    postgres.sql("create database precious")
    postgres.sql("create table t as select n, md5(n::text) from generate_series(1, 300000) n", "precious")
    pg_cli.ok("push", str(series), "--from", postgres.url("precious"), "--compress", "1")
    file = next(series.rglob("data-1.zst"))
    content = bytearray(file.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    file.write_bytes(content)
    before = postgres.sql("select count(*), sum(n) from t", "precious")
    for name in ("precious", "never"):
        failed = pg_cli("restore", str(series), "--into", postgres.url(name), "--replace")
        assert failed.code == 1
        assert "data-1.zst" in failed.err
    assert postgres.sql("select count(*), sum(n) from t", "precious") == before
    assert "never" not in databases(postgres)
    assert [name for name in databases(postgres) if "restoring" in name] == []
    # And the drill says that the backup is at fault, and keeps that beside it.
    drilled = pg_cli("drill", str(series), "--json")
    assert drilled.code == 1
    assert drilled.json["record"]["result"] == "failed"
    assert pg_cli.ok("list", str(series), "--json").json["backups"][0]["drill"] == "failed"


def test_a_restore_that_is_killed_leaves_no_database_of_that_name(pg_cli: Cli, postgres: PostgreSQL, app: str) -> None:
    series = str(pg_cli.directory / "series")
    pg_cli.ok("push", series, "--from", postgres.url(app))
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = pg_cli.start("restore", series, "--into", postgres.url("killed"))
        while not descendants_named(process, "pg_restore") and process.poll() is None:
            time.sleep(0.005)
        time.sleep(0.4)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode in (-9, 130)
        assert "killed" not in databases(postgres)
        left = [name for name in databases(postgres) if name.startswith("killed_restoring_")]
        if number == signal.SIGTERM:
            assert left == []
            continue
        # It can't be taken for the real one, and the next restore says what it is.
        assert len(left) == 1
        again = pg_cli("restore", series, "--into", postgres.url("killed"))
        assert again.code == 10
        assert "DROP DATABASE" in again.err
        postgres.sql(f'drop database "{left[0]}" with (force)')


def test_a_database_that_somebody_fills_meanwhile_stays(pg_cli: Cli, postgres: PostgreSQL, app: str) -> None:
    """It was absent when the restore began, and is somebody's when it ends."""
    series = str(pg_cli.directory / "series")
    pg_cli.ok("push", series, "--from", postgres.url(app))
    process = pg_cli.start("restore", series, "--into", postgres.url("theirs"))
    while "theirs_restoring_backhaul" not in databases(postgres) and process.poll() is None:
        time.sleep(0.01)
    postgres.sql("create database theirs")
    postgres.sql("create table precious as select 1 as one", "theirs")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err.decode()
    assert b"is not empty any more" in err
    assert postgres.sql("select one from precious", "theirs") == "1"
    assert [name for name in databases(postgres) if name.startswith("theirs_")] == []


def test_only_one_table(pg_cli: Cli, postgres: PostgreSQL, app: str) -> None:
    series = str(pg_cli.directory / "series")
    pg_cli.ok("push", series, "--from", postgres.url(app))
    result = pg_cli.ok(
        "restore", series, "--into", postgres.url("rescue"), "--only", "wide", "--only", "parts", "--json"
    ).json
    assert any("foreign keys were left out" in remark for remark in result["remarks"])
    before, after = fingerprint_postgresql(postgres, app), fingerprint_postgresql(postgres, "rescue")
    for table in ("public.wide", "public.parts", "public.parts_a", "public.parts_b1", "public.parts_b2"):
        assert after[table] == before[table]
    assert after["public.events"].startswith("0|")
    assert postgres.sql("select last_value from wide_id_seq", "rescue") == postgres.sql(
        "select last_value from wide_id_seq", app
    )
    wrong = pg_cli("restore", series, "--into", postgres.url("rescue2"), "--only", "no_such")
    assert wrong.code == 2
    assert "no_such" in wrong.err


def killed_ten_times(cli: Cli, url: str, program: str, longest: float) -> None:
    """Kill a push's program ten times at random: nothing is committed, and nothing stays behind.

    A kill that comes after the program's end counts for nothing but one more whole backup: another one is tried.
    """
    series = cli.directory / "killed"
    whole = killed = 0
    while killed < 10:
        process = cli.start("push", str(series), "--from", url, "--limit", "25M", "--compress", "none")
        hit = kill_at_random(process, program, random.uniform(0, longest))
        _, err = process.communicate(timeout=60)
        if hit:
            assert process.returncode == 1, err.decode()
            assert b"SIGKILL" in err
            killed += 1
        else:
            assert process.returncode == 0, err.decode()
            whole += 1
            assert whole < 30, "the moments are too late"
        # A backup is there for each that was not hit, and of the others not a file.
        backups = [path for path in series.iterdir() if path.is_dir()] if series.is_dir() else []
        assert len(backups) == len(list(series.glob("*/manifest.json"))) == whole


@pytest.mark.parametrize("physical", [False, True])
def test_a_producer_that_is_killed_anywhere(pg_cli: Cli, postgres: PostgreSQL, app: str, physical: bool) -> None:
    url = postgres.url("" if physical else app, physical=physical)
    killed_ten_times(pg_cli, url, "pg_basebackup" if physical else "pg_dump", 1.5 if physical else 0.3)


def test_a_producer_that_is_killed_leaves_no_upload(
    pg_cli: Cli, postgres: PostgreSQL, app: str, bucket: str, s3: Any
) -> None:
    series = f"s3://{bucket}/killed"
    process = pg_cli.start("push", series, "--from", postgres.url(app), "--limit", "15M", "--compress", "none")
    assert kill_at_random(process, "pg_dump", 0.1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err.decode()
    assert keys(s3, bucket) == []
    assert list(open_uploads(s3, bucket)) == []


def test_a_server_that_stops_midway(pg_cli: Cli, bucket: str) -> None:
    server = PostgreSQL()
    try:
        server.start()
        server.sql("create database app")
        server.sql("create table t as select n, repeat(md5(n::text), 8) v from generate_series(1, 200000) n", "app")
        for physical in (False, True):
            series = f"s3://{bucket}/stopped-{physical}"
            url = server.url("" if physical else "app", physical=physical)
            process = pg_cli.start("push", series, "--from", url, "--limit", "4M", "--compress", "none")
            program = "pg_basebackup" if physical else "pg_dump"
            while not descendants_named(process, program) and process.poll() is None:
                time.sleep(0.01)
            time.sleep(0.2)
            server.kill()
            _, err = process.communicate(timeout=60)
            assert process.returncode == 1, err.decode()
            assert pg_cli.ok("list", series, "--json").json["backups"] == []
            server._data = server._directory / "data"
            server.start()
        # And one that stops during a restore.
        series = f"s3://{bucket}/restored"
        pg_cli.ok("push", series, "--from", server.url("app"))
        process = pg_cli.start("restore", series, "--into", server.url("back"))
        while not descendants_named(process, "pg_restore") and process.poll() is None:
            time.sleep(0.005)
        time.sleep(0.3)
        server.kill()
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1, err.decode()
        server.start()
        assert "back" not in databases(server)
    finally:
        server.stop()


def test_a_disk_that_fills_during_a_restore(pg_cli: Cli, tmp_path: Path, postgres: PostgreSQL) -> None:
    """The target's disk: the restore fails, and no database of that name is there."""
    mount = tmp_path / "disk"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=130m", "tmpfs", str(mount)], check=True)
    # (Its WAL is elsewhere: a server that can't write that gives up altogether.)
    server = PostgreSQL(mount, wal=True)
    try:
        for directory in (tmp_path, *list(tmp_path.parents)[:-2]):  # the server's account must get there
            os.chmod(directory, os.stat(directory).st_mode | 0o055)
        server.start()
        postgres.sql("create database filling")
        postgres.sql(
            "create table t as select n, repeat(md5(n::text), 8) v from generate_series(1, 400000) n", "filling"
        )
        series = str(pg_cli.directory / "series")
        pg_cli.ok("push", series, "--from", postgres.url("filling"))
        filler = mount / "filler"
        filler.write_bytes(bytes(20_000_000))
        failed = pg_cli("restore", series, "--into", server.url("back"))
        assert failed.code == 1
        assert "could not extend file" in failed.err or "No space left on device" in failed.err
        # A server whose disk is full may go down with it: with room again, what does it have?
        filler.unlink()
        deadline = time.monotonic() + 60
        while True:
            try:
                assert "back" not in databases(server)
                break
            except subprocess.CalledProcessError:
                if server.ended:
                    server._data = server._directory / "data"
                    server.start()
                assert time.monotonic() < deadline
                time.sleep(0.5)
    finally:
        server.stop()
        subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_physical_backup(pg_cli: Cli, postgres: PostgreSQL, app: str, bucket: str, tmp_path: Path) -> None:
    series = f"s3://{bucket}/base"
    pushed = pg_cli.ok("push", series, "--from", postgres.url(physical=True), "--json").json
    assert pushed["source"]["coordinates"]["start_lsn"] < pushed["source"]["coordinates"]["end_lsn"]
    assert [stream["name"] for stream in pushed["streams"]] == ["base"]
    data = Path(postgres._directory) / "restored"
    result = pg_cli("restore", series, "--into", f"dir://{data}")
    assert result.code == 0, result.err
    assert (data / "PG_VERSION").exists()
    assert (data / "backup_label").exists()
    assert data.stat().st_mode & 0o777 == 0o700
    back = PostgreSQL(data=data)
    try:
        back.start()
        before, after = fingerprint_postgresql(postgres, app), fingerprint_postgresql(back, app)
        # (An unlogged table has no rows after a recovery: that is what it is.)
        assert after.pop("public.passing").startswith("0|")
        assert before.pop("public.passing").startswith("1|")
        assert after == before
    finally:
        back.stop()
    # It is not empty any more: refused, and with --replace taken.
    assert pg_cli("restore", series, "--into", f"dir://{data}").code == 10
    pg_cli.ok("restore", series, "--into", f"dir://{data}", "--replace")
    drilled = pg_cli.ok(
        "drill", series, "--json", "--check", "select count(*) from wide", "120000", "--database", app
    ).json
    assert drilled["record"]["result"] == "proved"
    shutil.rmtree(data)


def test_a_physical_backup_without_its_end(pg_cli: Cli, postgres: PostgreSQL, tmp_path: Path) -> None:
    """A pg_basebackup whose tar was cut, and that says all is well."""
    wrapper = tmp_path / "bin"
    wrapper.mkdir()
    script = wrapper / "pg_basebackup"
    real = PostgreSQL.program("pg_basebackup")
    script.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec {real} --version\n{real} "$@" | head -c 20000000\nexit 0\n'
    )
    script.chmod(0o755)
    series = str(pg_cli.directory / "cut")
    # (Named directories come before the PATH, so that the server's own version is taken.)
    result = pg_cli(
        "push",
        series,
        "--expect",
        "Manifest-Checksum",
        "--",
        str(script),
        "-D",
        "-",
        "-Ft",
        "-X",
        "fetch",
        "-c",
        "fast",
        "-h",
        postgres.environment["PGHOST"],
        "-p",
        postgres.environment["PGPORT"],
        "-U",
        "postgres",
    )
    assert result.code == 1
    assert "Manifest-Checksum" in result.err
    assert pg_cli.ok("list", series, "--json").json["backups"] == []


def test_passwords_are_nowhere_to_be_seen(pg_cli: Cli, tmp_path: Path) -> None:
    server = PostgreSQL(auth="scram-sha-256")
    try:
        server.start()
        secret = "geheim"
        url = server.url("postgres")
        refused = pg_cli("push", str(tmp_path / "s"), "--from", url.replace("postgres@", f"postgres:{secret}@"))
        assert refused.code == 2
        assert secret not in refused.err
        assert "password-file" in refused.err
        file = tmp_path / "password"
        file.write_text(secret + "\n")
        open_to_all = pg_cli("push", str(tmp_path / "s"), "--from", f"{url}&password-file={file}")
        assert open_to_all.code == 10
        assert "chmod 600" in open_to_all.err
        file.chmod(0o600)
        pgpass = tmp_path / "pgpass"
        pgpass.write_text(f"*:*:*:postgres:{secret}\n")
        pgpass.chmod(0o600)
        server.sql("create table t as select n, md5(n::text) from generate_series(1, 300000) n")
        for given, environment in (
            (f"{url}&password-file={file}", {}),
            (f"{url}&passfile={pgpass}", {}),
            (url, {"PGPASSWORD": secret}),
        ):
            pg_cli.cold = True  # others see how it was called
            seen: list[bytes] = []
            process = pg_cli.start("push", str(tmp_path / "s"), "--from", given, "--limit", "8M", env=environment)
            while process.poll() is None:
                for entry in Path("/proc").iterdir():
                    if entry.name.isdigit():
                        try:
                            seen.append((entry / "cmdline").read_bytes())
                        except OSError:
                            continue
                time.sleep(0.02)
            _, err = process.communicate()
            assert process.returncode == 0, err.decode()
            assert any(b"pg_dump" in line and b"--snapshot" in line for line in seen)
            assert not any(secret.encode() in line for line in seen)
            assert secret.encode() not in err
        for manifest in (tmp_path / "s").rglob("manifest.json"):
            assert secret not in manifest.read_text()
        wrong = pg_cli("push", str(tmp_path / "s"), "--from", url, env={"PGPASSWORD": "falsch"})
        assert wrong.code == 10
        assert "password authentication failed" in wrong.err
    finally:
        server.stop()


def test_what_is_missing_is_said_in_one_list(pg_cli: Cli, postgres: PostgreSQL, app: str) -> None:
    """No privileges and no database, in one error, before anything begins."""
    postgres.sql("create role poor login")
    series = str(pg_cli.directory / "series")
    url = postgres.url(app).replace("postgres@", "poor@")
    result = pg_cli("push", series, "--from", url)
    assert result.code == 10
    assert "the right to read all of 'app'" in result.err
    assert "GRANT pg_read_all_data" in result.err
    physical = pg_cli("push", series, "--from", postgres.url(physical=True).replace("postgres@", "poor@"))
    assert physical.code == 10
    assert "REPLICATION" in physical.err
    absent = pg_cli("push", series, "--from", postgres.url("no such"))
    assert absent.code == 10
    assert "'no such'" in absent.err
    assert not Path(series).exists() or list(Path(series).rglob("*.json")) == []
    # Restores: version, extension, roles and what is there, all at once.
    pg_cli.ok("push", series, "--from", postgres.url(app))
    edit_manifest(
        Path(series), lambda d: d["source"]["databases"][0]["needs"].update(extensions=["nosuch 1.0"], roles=["ghost"])
    )
    edit_manifest(Path(series), lambda d: d["source"].update(server="99.1"))
    result = pg_cli("restore", series, "--into", postgres.url(app))
    assert result.code == 10
    for words in ("version 99", "nosuch", "ghost", "to be empty"):
        assert words in result.err
    # To a drill that is no failure of the backup.
    drilled = pg_cli("drill", series, "--json")
    assert drilled.code == 10
    assert drilled.json["record"]["result"] == "could not test"
    edit_manifest(Path(series), lambda d: d["source"].update(server="15.1"))
    drilled = pg_cli("drill", series, "--json")
    assert drilled.json["record"]["result"] == "could not test"
    assert "nosuch" in drilled.json["record"]["why"]


def edit_manifest(series: Path, change: Callable[[Any], Any]) -> None:
    path = next(series.rglob("manifest.json"))
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_an_ordinary_account(pg_cli: Cli, postgres: PostgreSQL, other: PostgreSQL) -> None:
    """Neither superuser here nor there: what a managed server gives."""
    postgres.sql("create database managed")
    postgres.sql("create role dumper login; grant pg_read_all_data to dumper")
    postgres.sql("create table t as select generate_series(1, 50) n; create sequence s; select nextval('s')", "managed")
    series = str(pg_cli.directory / "series")
    pushed = pg_cli.ok("push", series, "--from", postgres.url("managed").replace("postgres@", "dumper@"), "--json").json
    assert any("passwords of roles" in remark for remark in pushed["source"]["remarks"])
    other.sql("create role maker login createdb")
    pg_cli.ok("restore", series, "--into", other.url("managed").replace("postgres@", "maker@"), "--no-owner")
    assert other.sql("select count(*) from t", "managed") == "50"


def test_a_drill(pg_cli: Cli, postgres: PostgreSQL, app: str, bucket: str) -> None:
    series = f"s3://{bucket}/drilled"
    pg_cli.ok("push", series, "--from", postgres.url(app))
    result = pg_cli.ok("drill", series, "--check", "select count(*) from wide", "120000", "--json").json
    record = result["record"]
    assert record["result"] == "proved"
    assert record["seconds"]["restore"] > 0
    checks = {check["name"]: check for check in record["checks"]}
    assert checks["pg_amcheck"]["state"] == "ok"
    assert checks["rows of app"]["state"] == "ok"
    assert checks["select count(*) from wide"]["state"] == "ok"
    assert result["kept"].startswith(f"s3://{bucket}/drilled/{record['id']}/drill-")
    # Another answer is a failure, and the last drill is the one that counts.
    time.sleep(1.1)
    assert pg_cli("drill", series, "--check", "select 1", "2").code == 1
    assert pg_cli.ok("list", series, "--json").json["backups"][0]["drill"] == "failed"
    assert [drill["result"] for drill in pg_cli.ok("show", series, "--json").json["drills"]] == ["proved", "failed"]
    assert pg_cli.ok("verify", series, "--json").json["drill"]["result"] == "failed"
    # Rows that are fewer than at the push are found. (Written by hand: no restore loses rows.)
    assert not [name for name in os.listdir("/tmp") if name.startswith("backhaul-drill-") and _mine(name)]


def _mine(name: str) -> bool:
    try:
        return time.time() - os.stat(f"/tmp/{name}").st_mtime > 600
    except OSError:
        return False


def test_a_drill_finds_rows_that_are_missing(pg_cli: Cli, postgres: PostgreSQL) -> None:
    series = pg_cli.directory / "series"
    postgres.sql("create database counted")
    postgres.sql("create table t as select generate_series(1, 100) n", "counted")
    pg_cli.ok("push", str(series), "--from", postgres.url("counted"))

    def claim_more(document: Any) -> None:
        document["source"]["databases"][0]["tables"][0]["rows"] = 101

    edit_manifest(series, claim_more)
    drilled = pg_cli("drill", str(series), "--json")
    assert drilled.code == 1
    assert "public.t has 100 rows, 101 were backed up" in drilled.json["record"]["why"]


def test_a_drill_without_room_could_not_test(pg_cli: Cli, postgres: PostgreSQL, app: str, tmpfs: Path) -> None:
    series = str(pg_cli.directory / "series")
    pg_cli.ok("push", series, "--from", postgres.url(app))
    drilled = pg_cli("drill", series, "--scratch", str(tmpfs), "--json")
    assert drilled.code == 10
    assert drilled.json["record"]["result"] == "could not test"
    assert "room" in drilled.json["record"]["why"]


def test_encrypted(pg_cli: Cli, postgres: PostgreSQL, app: str, tmp_path: Path) -> None:
    key = tmp_path / "key"
    recipient = pg_cli.ok("keygen", "-o", str(key), "--json").json["recipient"]
    series = str(tmp_path / "series")
    pg_cli.ok("push", series, "--from", postgres.url(app), "--encrypt-to", recipient)
    assert pg_cli("restore", series, "--into", postgres.url("opened")).code == 10
    assert "opened" not in databases(postgres)
    pg_cli.ok("restore", series, "--into", postgres.url("opened"), "--identity", str(key))
    assert fingerprint_postgresql(postgres, "opened") == fingerprint_postgresql(postgres, app)
    assert pg_cli("drill", series, "--json").json["record"]["result"] == "could not test"
    assert pg_cli.ok("drill", series, "--identity", str(key), "--json").json["record"]["result"] == "proved"
    assert pg_cli.ok("verify", series, "--deep", "--identity", str(key), "--json").json["checks"]


def test_a_destination_that_fills_is_dropped_and_the_other_holds_all(
    pg_cli: Cli, postgres: PostgreSQL, app: str, tmpfs: Path, tmp_path: Path
) -> None:
    good, bad = str(tmp_path / "good"), str(tmpfs / "bad")
    result = pg_cli("push", good, bad, "--from", postgres.url(app), "--compress", "none", "--require", "any", "--json")
    assert result.code == 3
    assert {d["series"]: d["state"] for d in result.json["destinations"]} == {good: "committed", bad: "failed"}
    assert [path for path in Path(bad).rglob("*") if path.is_file()] == []
    assert pg_cli.ok("verify", good, "--deep", "--json").json["checks"]
    pg_cli.ok("restore", good, "--into", postgres.url("from_good"))
    assert fingerprint_postgresql(postgres, "from_good") == fingerprint_postgresql(postgres, app)


def test_somebody_who_wants_a_table_for_himself(pg_cli: Cli, postgres: PostgreSQL) -> None:
    """A TRUNCATE in the middle waits for the backup; it does not make it empty."""
    postgres.sql("create database locked")
    postgres.sql(
        """create table a as select n, repeat(md5(n::text), 10) v from generate_series(1, 100000) n;
           create table b as select * from a""",
        "locked",
    )
    series = str(pg_cli.directory / "series")
    process = pg_cli.start("push", series, "--from", postgres.url("locked"), "--streams", "2", "--limit", "6M")
    while not descendants_named(process, "pg_dump") and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.5)
    truncating = threading.Thread(target=lambda: postgres.sql("truncate a", "locked"))
    truncating.start()
    _, err = process.communicate(timeout=100)
    truncating.join()
    assert process.returncode == 0, err.decode()
    pg_cli.ok("restore", series, "--into", postgres.url("locked_back"))
    assert postgres.sql("select count(*) from a", "locked_back") == "100000"
    assert postgres.sql("select count(*) from a", "locked") == "0"


def test_doctor_and_init(pg_cli: Cli, postgres: PostgreSQL, app: str) -> None:
    good = pg_cli.ok("doctor", postgres.url(app), "--json").json
    states = {each["name"]: each["state"] for each in good["diagnoses"]}
    assert states["connection"] == states["logical backups"] == states["clock"] == "ok"
    postgres.sql("do $$ begin create role meagre login; exception when duplicate_object then null; end $$")
    bad = pg_cli("doctor", postgres.url(app).replace("postgres@", "meagre@"))
    assert bad.code == 10
    assert "✗" in bad.out.decode()
    assert "GRANT pg_read_all_data" in bad.out.decode()
    away = pg_cli("doctor", "postgresql://postgres@127.0.0.1:1/app")
    assert away.code == 10
    assert "Connection refused" in away.err
    found = pg_cli.ok("init", "--to", "/backups", "--json", env=postgres.environment).json["found"]
    ours = next(source for source in found if source["label"] == app)
    assert ours["commands"][1].startswith("backhaul push /backups/app --from")
