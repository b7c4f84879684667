"""MariaDB by URL: pushed as several streams of one state, restored, proved; and what happens when it fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backhaul.testing.servers import MariaDB
from tests.conftest import Cli
from tests.end_to_end.awkward_databases import fingerprint_mariadb, make_mariadb
from tests.end_to_end.test_postgresql_backups import descendants_named, descendants_of, killed_ten_times


@pytest.fixture(scope="session")
def app(mariadb: MariaDB) -> str:
    make_mariadb(mariadb, "app")
    return "app"


@pytest.fixture(autouse=True)
def drop_the_rest(mariadb: MariaDB) -> Iterator[None]:
    """Physical backups and whole servers would grow from test to test."""
    yield
    for name in databases(mariadb):
        if name != "app":
            mariadb.sql(f"drop database `{name}`")


@pytest.fixture(scope="session")
def other() -> Iterator[MariaDB]:
    server = MariaDB(binlog=False)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def databases(server: MariaDB) -> list[str]:
    system = ("information_schema", "mysql", "performance_schema", "sys")
    return [name for name in server.sql("show databases").splitlines() if name not in system]


def test_everything_comes_back(cli: Cli, mariadb: MariaDB, app: str, bucket: str) -> None:
    series = f"s3://{bucket}/app"
    position = mariadb.sql("show master status").split("\t")
    pushed = cli.ok("push", series, "--from", mariadb.url(app), "--streams", "2", "--json").json
    assert {s["name"] for s in pushed["streams"]} == {"schema", "after", "views", "data-1", "data-2"}
    source = pushed["source"]
    # Nobody writes: the coordinates are those of now.
    assert source["coordinates"]["binlog_file"] == position[0]
    assert source["coordinates"]["binlog_position"] == position[1]
    assert source["coordinates"]["gtid"] == mariadb.sql("select @@gtid_binlog_pos")
    tables = {table["name"]: table for table in source["databases"][0]["tables"]}
    assert tables["big"]["rows"] == 90000
    assert tables["big"].get("stream") != tables["big_too"].get("stream")
    assert tables["old_style"]["apart"]
    assert "rows" not in tables["old_style"]
    assert any("old_style" in remark for remark in source["remarks"])

    cli.ok("restore", series, "--into", mariadb.url("back"))
    assert fingerprint_mariadb(mariadb, "back") == fingerprint_mariadb(mariadb, app)
    assert mariadb.dump("back", "--no-data") == mariadb.dump(app, "--no-data")
    assert mariadb.dump("back") == mariadb.dump(app)
    assert [name for name in databases(mariadb) if "restor" in name or "replaced" in name] == []
    assert mariadb.sql("select count(*) from richer", "back") == mariadb.sql("select count(*) from richer", app)


def test_a_single_stream_comes_back(cli: Cli, mariadb: MariaDB, app: str) -> None:
    series = str(cli.directory / "single")
    pushed = cli.ok("push", series, "--from", mariadb.url(app), "--streams", "1", "--json").json
    assert [s["name"] for s in pushed["streams"]] == ["data"]
    cli.ok("restore", series, "--into", mariadb.url("back_single"))
    assert mariadb.dump("back_single") == mariadb.dump(app)
    text = subprocess.run(["bash", "-c", f"zstd -dc {series}/*/data.zst"], capture_output=True, check=True).stdout
    assert b"-- CHANGE MASTER TO" in text[:8192]
    assert b"-- Dump completed on" in text[-200:]


def test_a_whole_server(cli: Cli, mariadb: MariaDB, app: str, other: MariaDB, bucket: str) -> None:
    mariadb.sql(
        "create database `zwei ö`; use `zwei ö`; create table t as select seq from seq_1_to_10; create database leer"
    )
    mariadb.sql(
        "create user if not exists 'maker'@'localhost' identified by 'geheim'; grant select on app.* to 'maker'@'localhost'"
    )
    series = f"s3://{bucket}/server"
    pushed = cli.ok("push", series, "--from", mariadb.url(), "--json").json
    assert {"app", "zwei ö", "leer"} <= {d["name"] for d in pushed["source"]["databases"]}
    cli.ok("restore", series, "--into", other.url(), "--globals")
    assert fingerprint_mariadb(other, app) == fingerprint_mariadb(mariadb, app)
    assert other.dump(app) == mariadb.dump(app)
    assert other.sql("select count(*) from t", "zwei ö") == "10"
    assert "leer" in databases(other)
    assert other.sql("show grants for 'maker'@'localhost'") == mariadb.sql("show grants for 'maker'@'localhost'")


def test_the_streams_are_of_one_state(cli: Cli, mariadb: MariaDB) -> None:
    """Money moves between two large tables, which are in different streams: none is lost or made."""
    mariadb.sql("create database bank")
    mariadb.sql(
        """create table a (id int primary key, v varchar(300), money int) ;
           insert into a select seq, repeat(md5(seq), 8), 100 from seq_1_to_80000;
           create table b like a; insert into b select * from a;
           create table moves (id int primary key auto_increment, n int);""",
        "bank",
    )
    script = """delimiter //
create procedure move() begin declare i int default 0; declare r int; while i < 1000000 do
  set r = 1 + floor(rand() * 80000);
  start transaction; update a set money = money - 1 where id = r; update b set money = money + 1 where id = r;
  insert into moves (n) values (1); commit; set i = i + 1; end while; end//
delimiter ;
call move();"""
    command = [mariadb.program("mariadb"), "--no-defaults", "-uroot", f"--socket={mariadb.socket}", "bank"]
    load = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert load.stdin is not None
    load.stdin.write(script.encode())
    load.stdin.close()
    try:
        deadline = time.monotonic() + 60
        while mariadb.sql("select count(*) from moves", "bank") == "0" and time.monotonic() < deadline:
            time.sleep(0.05)
        series = str(cli.directory / "bank")
        pushed = cli.ok("push", series, "--from", mariadb.url("bank"), "--streams", "2", "--json").json
        moved = int(mariadb.sql("select count(*) from moves", "bank"))
    finally:
        load.kill()
        load.wait()
        for number in mariadb.sql("select id from information_schema.processlist where db = 'bank'").split():
            mariadb.sql(f"kill {number}", check=False)
    tables = {table["name"]: table for table in pushed["source"]["databases"][0]["tables"]}
    assert tables["a"].get("stream") != tables["b"].get("stream")
    cli.ok("restore", series, "--into", mariadb.url("bank_back"))
    total, kept, here = mariadb.sql(
        """select (select sum(money) from a) + (select sum(money) from b), (select count(*) from moves),
                  8000000 - (select sum(money) from a)""",
        "bank_back",
    ).split("\t")
    assert total == "16000000"
    assert kept == here  # each move is in all three tables, or in none
    assert int(kept) == tables["moves"]["rows"]
    assert 0 < int(kept) < moved


def test_a_restore_refuses_what_is_not_empty(cli: Cli, mariadb: MariaDB, app: str) -> None:
    series = str(cli.directory / "series")
    mariadb.sql("create database small")
    mariadb.sql("create table t as select seq n from seq_1_to_100; create view v as select * from t", "small")
    cli.ok("push", series, "--from", mariadb.url("small"))
    refused = cli("restore", series, "--into", mariadb.url(app))
    assert refused.code == 10
    assert "'app' to be empty, or not to exist" in refused.err
    mariadb.sql("create database waiting")
    cli.ok("restore", series, "--into", mariadb.url("waiting"))
    mariadb.sql("delimiter //\ncreate trigger g before insert on t for each row begin set new.n = 1; end//", "waiting")
    mariadb.sql("insert into t values (5); create table extra (id int)", "waiting")
    cli.ok("restore", series, "--into", mariadb.url("waiting"), "--replace")
    assert mariadb.dump("waiting") == mariadb.dump("small")
    assert [name for name in databases(mariadb) if "restoring" in name or "replaced" in name] == []


def test_a_damaged_backup_replaces_nothing(cli: Cli, mariadb: MariaDB) -> None:
    series = cli.directory / "series"
    mariadb.sql("create database precious; use precious; create table t as select seq n, md5(seq) from seq_1_to_300000")
    cli.ok("push", str(series), "--from", mariadb.url("precious"), "--compress", "1")
    file = next(series.rglob("data-1.zst"))
    content = bytearray(file.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    file.write_bytes(content)
    before = mariadb.dump("precious")
    for name in ("precious", "never"):
        failed = cli("restore", str(series), "--into", mariadb.url(name), "--replace")
        assert failed.code == 1
        assert "data-1.zst" in failed.err
    assert mariadb.dump("precious") == before
    assert [name for name in databases(mariadb) if "never" in name or "restoring" in name] == []
    assert cli("drill", str(series), "--json").json["record"]["result"] == "failed"


def test_a_restore_that_is_killed_leaves_no_database_of_that_name(cli: Cli, mariadb: MariaDB, app: str) -> None:
    series = str(cli.directory / "series")
    cli.ok("push", series, "--from", mariadb.url(app))
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = cli.start("restore", series, "--into", mariadb.url("killed"))
        while not descendants_named(process, "mariadb") and process.poll() is None:
            time.sleep(0.005)
        time.sleep(0.8)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode in (-9, 130)
        assert "killed" not in databases(mariadb)
        left = [name for name in databases(mariadb) if name.startswith("killed_restoring_")]
        if number == signal.SIGTERM:
            assert left == []
            continue
        assert len(left) == 1
        again = cli("restore", series, "--into", mariadb.url("killed"))
        assert again.code == 10
        assert "DROP DATABASE" in again.err
        mariadb.sql(f"drop database `{left[0]}`")


def test_only_one_table(cli: Cli, mariadb: MariaDB, app: str) -> None:
    series = str(cli.directory / "series")
    cli.ok("push", series, "--from", mariadb.url(app))
    cli.ok("restore", series, "--into", mariadb.url("rescue"), "--only", "big_too", "--only", 'Größe & "Maß`')
    before, after = fingerprint_mariadb(mariadb, app), fingerprint_mariadb(mariadb, "rescue")
    for table in ("big_too", 'Größe & "Maß`'):
        assert after[table] == before[table]
        assert after[f"count {table}"] != "0"
    assert after["count big"] == after["count accounts"] == after["count old_style"] == "0"
    wrong = cli("restore", series, "--into", mariadb.url("rescue2"), "--only", "no_such")
    assert wrong.code == 2
    assert "no_such" in wrong.err


@pytest.mark.parametrize("physical", [False, True])
def test_a_producer_that_is_killed_anywhere(cli: Cli, mariadb: MariaDB, app: str, physical: bool) -> None:
    program = "mariadb-backup" if physical else "mariadb-dump"
    url = mariadb.url("" if physical else app, physical=physical)
    killed_ten_times(cli, url, program, 0.8 if physical else 0.1)
    mariadb.sql("create table if not exists app.unlocked (id int); drop table app.unlocked")  # no lock stays behind


def test_a_server_that_stops_midway(cli: Cli, bucket: str) -> None:
    server = MariaDB()
    try:
        server.start()
        server.sql(
            "create database app; use app; create table t as select seq n, repeat(md5(seq), 8) v from seq_1_to_300000"
        )
        for physical in (False, True):
            series = f"s3://{bucket}/stopped-{physical}"
            url = server.url("" if physical else "app", physical=physical)
            process = cli.start("push", series, "--from", url, "--limit", "4M", "--compress", "none")
            program = "mariadb-backup" if physical else "mariadb-dump"
            while not descendants_named(process, program) and process.poll() is None:
                time.sleep(0.01)
            time.sleep(0.3)
            server.kill()
            _, err = process.communicate(timeout=100)
            assert process.returncode == 1, err.decode()
            assert cli.ok("list", series, "--json").json["backups"] == []
            server._data = server._directory / "data"
            server.start()
    finally:
        server.stop()


def test_a_physical_backup(cli: Cli, mariadb: MariaDB, app: str, bucket: str) -> None:
    series = f"s3://{bucket}/base"
    pushed = cli.ok("push", series, "--from", mariadb.url(physical=True), "--json").json
    coordinates = pushed["source"]["coordinates"]
    assert int(coordinates["to_lsn"]) > 0
    assert coordinates["binlog_file"].startswith("bin.")
    data = Path(mariadb._directory) / "restored"
    data.mkdir()
    os.chmod(data, 0o750)
    if mariadb.account is not None:
        os.chown(data, mariadb.account.pw_uid, mariadb.account.pw_gid)
    cli.ok("restore", series, "--into", str(data))
    assert data.stat().st_mode & 0o777 == 0o750
    back = MariaDB(data=data, binlog=False)
    try:
        back.start()
        before, after = fingerprint_mariadb(mariadb, app), fingerprint_mariadb(back, app)
        # (Ids that the server had reserved in its memory, and nobody got, are not in its files.)
        assert 3000 < int(after.pop("auto_increment")) <= int(before.pop("auto_increment"))
        assert after == before
    finally:
        back.stop()
    record = cli.ok("drill", series, "--check", "select count(*) from big", "90000", "--database", app, "--json").json
    assert record["record"]["result"] == "proved"


def wrap(directory: Path, name: str, script: str) -> dict[str, str]:
    """Put a program of that name first on the PATH; REAL stands for the real one."""
    directory.mkdir(exist_ok=True)
    path = directory / name
    real = subprocess.run(["which", name], capture_output=True, text=True, check=True).stdout.strip()
    path.write_text("#!/bin/bash\n" + script.replace("REAL", real))
    path.chmod(0o755)
    return {"PATH": f"{directory}:{os.environ['PATH']}"}


def test_a_stream_that_is_cut_between_chunks(cli: Cli, mariadb: MariaDB, app: str, tmp_path: Path) -> None:
    """mbstream and --prepare find nothing wrong with it: the last file is what tells."""
    whole = tmp_path / "whole"
    cut = f"""
[ "$1" = --version ] && exec REAL --version
REAL "$@" > {whole} || exit
{sys.executable} - {whole} <<'PY'
import struct, sys
data = open(sys.argv[1], "rb").read()
# mbstream: magic 8, flags 1, type 1, path length 4, path; then for payload: length 8, offset 8, checksum 4, data.
at, ends = 0, []
while at < len(data):
    assert data[at:at + 8] == b"XBSTCK01", at
    kind = data[at + 9:at + 10]
    length, = struct.unpack("<I", data[at + 10:at + 14])
    at += 14 + length
    if kind == b"P":
        size, = struct.unpack("<Q", data[at:at + 8])
        at += 20 + size
    ends.append(at)
sys.stdout.buffer.write(data[:ends[len(ends) * 9 // 10]])
PY
"""
    environment = wrap(tmp_path / "bin", "mariadb-backup", cut)
    series = str(tmp_path / "series")
    # The producer itself says that all is well, so this is committed.
    cli.ok("push", series, "--from", mariadb.url(physical=True), env=environment)
    place = tmp_path / "restored"
    failed = cli("restore", series, "--into", str(place))
    assert failed.code == 1
    assert "xtrabackup_info" in failed.err
    assert not place.exists()
    assert [name for name in os.listdir(tmp_path) if "restoring" in name] == []
    assert cli("drill", series, "--json").json["record"]["result"] == "failed"


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ('[ "$1" = --version ] && exec REAL --version\nREAL "$@" 2>/dev/null\nexit 0\n', "completed OK!"),
        ('[ "$1" = --version ] && exec REAL --version\necho data\necho "completed OK!" >&2\n', "xtrabackup_info"),
        ('[ "$1" = --version ] && exec REAL --version\nREAL "$@"; echo "completed OK!" >&2; exit 3\n', "status 3"),
    ],
)
def test_markers_that_are_missing(cli: Cli, mariadb: MariaDB, tmp_path: Path, script: str, why: str) -> None:
    environment = wrap(tmp_path / "bin", "mariadb-backup", script)
    failed = cli("push", str(tmp_path / "series"), "--from", mariadb.url(physical=True), env=environment)
    assert failed.code == 1
    assert why in failed.err
    assert cli.ok("list", str(tmp_path / "series"), "--json").json["backups"] == []


def test_a_dump_without_its_end(cli: Cli, mariadb: MariaDB, app: str, tmp_path: Path) -> None:
    environment = wrap(
        tmp_path / "bin",
        "mariadb-dump",
        '[ "$1" = --version ] && exec REAL --version\nREAL "$@" | head -c 3000000\nexit 0\n',
    )
    failed = cli("push", str(tmp_path / "series"), "--from", mariadb.url(app), env=environment)
    assert failed.code == 1
    assert "-- Dump completed on" in failed.err
    assert cli.ok("list", str(tmp_path / "series"), "--json").json["backups"] == []


def test_a_disk_that_fills_during_a_restore(cli: Cli, mariadb: MariaDB, app: str, tmpfs: Path) -> None:
    series = str(cli.directory / "series")
    cli.ok("push", series, "--from", mariadb.url(physical=True))
    place = tmpfs / "data"
    assert cli("restore", series, "--into", str(place)).code == 10  # seen before a byte is read
    # And when it was not to be seen before: the disk is filled meanwhile.
    dumped = str(cli.directory / "files")
    directory = cli.directory / "tree"
    directory.mkdir()
    for number in range(4):
        (directory / f"file {number}").write_bytes(os.urandom(3 << 20))
    cli.ok("push", dumped, "--from", f"dir://{directory}")
    process = cli.start(
        "restore",
        dumped,
        "--into",
        str(place),
        env={
            "PATH": wrap(
                cli.directory / "bin",
                "tar",
                f'[ "$1" = --version ] && exec REAL --version\nhead -c 8000000 /dev/zero > "{tmpfs}/filler"\nexec REAL "$@"\n',
            )["PATH"]
        },
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"No space left on device" in err
    assert not place.exists()
    assert [name for name in os.listdir(tmpfs) if "restoring" in name] == []


def test_passwords_and_privileges(cli: Cli, mariadb: MariaDB, app: str, tmp_path: Path) -> None:
    mariadb.sql(
        "create or replace user 'poor'@'localhost' identified by 'geheim'; grant select on app.* to 'poor'@'localhost'"
    )
    url = mariadb.url(app).replace("root@", "poor@").replace("&defaults-file=/dev/null", "")
    series = str(tmp_path / "series")
    refused = cli("push", series, "--from", url.replace("poor@", "poor:geheim@"))
    assert refused.code == 2
    assert "geheim" not in refused.err
    wrong = cli("push", series, "--from", url, env={"MYSQL_PWD": "falsch"})
    assert wrong.code == 10
    assert "Access denied" in wrong.err
    lacking = cli("push", series, "--from", url, env={"MYSQL_PWD": "geheim"})
    assert lacking.code == 10
    assert "GRANT" in lacking.err
    assert "RELOAD" in lacking.err
    mariadb.sql("grant select, reload, show view, trigger, event, binlog monitor, execute on *.* to 'poor'@'localhost'")
    options = tmp_path / "my.cnf"
    options.write_text("[client]\nuser = poor\npassword = geheim\n")
    options.chmod(0o600)
    given = mariadb.url(app).replace("root@", "").replace("/dev/null", str(options))
    cli.cold = True  # others see how it was called
    seen: list[bytes] = []
    process = cli.start("push", series, "--from", given, "--limit", "8M", "--compress", "none")
    while process.poll() is None:
        for pid in (process.pid, *descendants_of(process)):
            try:
                seen.append((Path("/proc") / str(pid) / "cmdline").read_bytes())
            except OSError:
                continue
        time.sleep(0.02)
    _, err = process.communicate()
    assert process.returncode == 0, err.decode()
    assert any(b"mariadb-dump" in line and b"--single-transaction" in line for line in seen)
    assert not any(b"geheim" in line for line in seen)
    for manifest in (tmp_path / "series").rglob("manifest.json"):
        assert "geheim" not in manifest.read_text()


def test_doctor(cli: Cli, mariadb: MariaDB, app: str) -> None:
    good = cli.ok("doctor", mariadb.url(app), "--json").json
    states = {each["name"]: each["state"] for each in good["diagnoses"]}
    assert states["connection"] == states["logical backups"] == states["binary log"] == "ok"
    assert states["tables without transactions"] == "note"
    mariadb.sql("create or replace user 'meagre'@'localhost'")
    bad = cli("doctor", mariadb.url(app).replace("root@", "meagre@"))
    assert bad.code == 10
    assert "mariadb -e" in bad.out.decode()


def test_definitions_are_of_the_state_of_the_rows(cli: Cli, mariadb: MariaDB, tmp_path: Path) -> None:
    """Somebody swaps two columns while definitions are read: what is restored is never the one with the rows of the other."""
    mariadb.sql("create database swapped; use swapped; create table t (id int primary key, debit int, credit int)")
    mariadb.sql("insert into t select seq, 0, seq from seq_1_to_1000", "swapped")
    slow = '[ "$1" = --version ] && exec REAL --version\ncase "$*" in *--no-data*) sleep 1.5;; esac\nexec REAL "$@"\n'
    environment = wrap(tmp_path / "bin", "mariadb-dump", slow)
    process = cli.start("push", "series", "--from", mariadb.url("swapped"), env=environment)
    time.sleep(1.2)
    mariadb.sql(
        "alter table t modify debit int after credit; insert into t (id, debit, credit) values (2000, 0, 7)", "swapped"
    )
    _, err = process.communicate(timeout=60)
    if process.returncode == 0:
        cli.ok("restore", "series", "--into", mariadb.url("swapped_back"))
        assert mariadb.sql("select sum(debit), count(*) from t", "swapped_back").split("\t")[0] == "0"
    else:
        assert b"definition has changed" in err


def test_a_database_that_somebody_else_made_stays(cli: Cli, mariadb: MariaDB, tmp_path: Path) -> None:
    """It was absent when the restore began, and is somebody's when it ends."""
    mariadb.sql("create database mine; use mine; create table t as select seq from seq_1_to_1000")
    cli.ok("push", "series", "--from", mariadb.url("mine"))
    environment = wrap(
        tmp_path / "bin", "mariadb", '[ "$1" = --version ] && exec REAL --version\nsleep 1\nexec REAL "$@"\n'
    )
    process = cli.start("restore", "series", "--into", mariadb.url("theirs"), env=environment)
    while not [name for name in databases(mariadb) if name.startswith("theirs_restoring")] and process.poll() is None:
        time.sleep(0.02)
    mariadb.sql("create database theirs; create table theirs.precious as select 1 as one")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err.decode()
    assert mariadb.sql("select one from precious", "theirs") == "1"
    assert [name for name in databases(mariadb) if "restoring" in name] == []
    # And code of a database that is replaced stays if the tables can't be taken.
    mariadb.sql("create database used; use used; create table t (id int); create view v as select * from t")
    mariadb.sql("delimiter //\ncreate trigger g before insert on t for each row begin set new.id = 1; end//", "used")
    cli.ok("restore", "series", "--into", mariadb.url("used"), "--replace")
    assert mariadb.sql("select count(*) from t", "used") == "1000"


def test_grants_on_tables_come_back(cli: Cli, mariadb: MariaDB) -> None:
    """They name tables, and so come after these; and the dump's own helper leaves nothing behind."""
    source = MariaDB(binlog=False)
    target = MariaDB(binlog=False)
    try:
        source.start()
        target.start()
        source.sql("create database shop; create table shop.customers (id int); create role seller")
        source.sql("create user ro@localhost identified by 'geheim'; grant select on shop.customers to ro@localhost")
        source.sql(
            "grant insert on shop.* to seller; grant seller to ro@localhost; set default role seller for ro@localhost"
        )
        cli.ok("push", "series", "--from", source.url())
        cli.ok("restore", "series", "--into", target.url(), "--globals")
        for who in ("ro@localhost", "seller"):
            assert target.sql(f"show grants for {who}") == source.sql(f"show grants for {who}")
        assert target.sql("select count(*) from mysql.user where user = 'mariadb_dump_import_role'") == "0"
    finally:
        source.stop()
        target.stop()


def test_an_account_with_rights_on_its_database_alone(cli: Cli, mariadb: MariaDB, app: str) -> None:
    mariadb.sql(
        "create database own; use own; create table t as select seq from seq_1_to_10; create view v as select * from t"
    )
    mariadb.sql(
        "create or replace user app@localhost; grant all on own.* to app@localhost; grant all on app.* to app@localhost"
    )
    mariadb.sql("grant reload, binlog monitor on *.* to app@localhost")
    url = mariadb.url("own").replace("root@", "app@")
    cli.ok("push", "series", "--from", url)
    mariadb.sql("drop database own")
    # The text of somebody else's routines is not shown to it: said before anything begins.
    refused = cli("push", "other", "--from", mariadb.url(app).replace("root@", "app@"))
    assert refused.code == 10
    assert "GRANT SELECT ON mysql.proc" in refused.err
    denied = cli("restore", "series", "--into", url)
    assert denied.code == 1
    assert "denied" in denied.err  # it may not create the database beside
