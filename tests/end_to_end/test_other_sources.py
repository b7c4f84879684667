"""SQLite, Redis and directories by URL: there, back, proved; and what happens when they fail."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backhaul.testing.servers import Redis
from tests.conftest import Cli
from tests.end_to_end.test_postgresql_backups import kill_at_random


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    directory = tmp_path / "redis"
    directory.mkdir()
    server = Redis(directory)
    server.start()
    yield server
    server.stop()


# -- SQLite ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_sqlite_while_it_is_written(local_cli: Cli, mode: str) -> None:
    """Money moves between two tables all the while: each copy has as much as there was."""
    left_before = empty_directories()
    path = local_cli.directory / "büch er.db"
    connection = sqlite3.connect(path, isolation_level=None, timeout=60)
    connection.execute(f"pragma journal_mode = {mode}")
    connection.executescript(
        """create table a (id integer primary key, v text, money int); create table b (id integer primary key, money int);
           create virtual table words using fts5(word); insert into words values ('grüße');
           with recursive n(i) as (select 1 union all select i + 1 from n where i < 60000)
           insert into a select i, hex(randomblob(100)), 10 from n; insert into b select id, 10 from a;"""
    )
    connection.close()
    stop = threading.Event()
    moves = 0

    def move() -> None:
        nonlocal moves
        writer = sqlite3.connect(path, isolation_level=None, timeout=60)
        while not stop.is_set():
            number = random.randint(1, 60000)
            writer.execute("begin immediate")
            writer.execute("update a set money = money - 1 where id = ?", (number,))
            writer.execute("update b set money = money + 1 where id = ?", (number,))
            writer.execute("commit")
            moves += 1
        writer.close()

    thread = threading.Thread(target=move)
    thread.start()
    try:
        while moves < 10:
            time.sleep(0.01)
        before = moves
        pushed = local_cli.ok("push", "series", "--from", f"sqlite://{path}", "--json").json
        assert moves > before
    finally:
        stop.set()
        thread.join()
    assert pushed["source"]["databases"][0]["name"] == "büch er.db"
    local_cli.ok("restore", "series", "--into", f"sqlite://{local_cli.directory}/back.db")
    with sqlite3.connect(local_cli.directory / "back.db") as back:
        assert back.execute("pragma integrity_check").fetchone() == ("ok",)
        assert back.execute("select (select sum(money) from a) + (select sum(money) from b)").fetchone() == (1200000,)
        assert back.execute("select count(*) from words where word match 'grüße'").fetchone() == (1,)
    back.close()
    record = local_cli.ok("drill", "series", "--check", "select count(*) from a", "60000", "--json").json["record"]
    assert record["result"] == "proved"
    assert empty_directories() <= left_before


def empty_directories() -> set[str]:
    """Those in which a copy of a database was, and is no more. (Others may have been killed here before.)"""

    def empty(name: str) -> bool:
        try:
            return not os.listdir(f"/tmp/{name}")
        except OSError:
            return False

    return {name for name in os.listdir("/tmp") if name.startswith("backhaul-sqlite-") and empty(name)}


def test_sqlite_that_is_none_or_in_the_way(local_cli: Cli) -> None:
    (local_cli.directory / "text.db").write_text("this is no database, but text that is long enough")
    result = local_cli("push", "series", "--from", f"sqlite://{local_cli.directory}/text.db")
    assert result.code == 10
    assert "does not begin like one" in result.err
    assert local_cli("push", "series", "--from", "sqlite:///no/such.db").code == 10
    path = local_cli.directory / "f.db"
    sqlite3.connect(path).execute("create table t (a)").connection.close()
    local_cli.ok("push", "series", "--from", f"sqlite://{path}")
    refused = local_cli("restore", "series", "--into", f"sqlite://{path}")
    assert refused.code == 10
    assert "--replace" in refused.err
    # One that somebody has open in WAL mode is not replaced under his hands.
    connection = sqlite3.connect(path)
    connection.execute("pragma journal_mode = wal")
    connection.execute("insert into t values (1)")
    connection.commit()
    assert local_cli("restore", "series", "--into", f"sqlite://{path}", "--replace").code == 10
    connection.close()
    local_cli.ok("restore", "series", "--into", f"sqlite://{path}", "--replace")
    with sqlite3.connect(path) as back:
        assert back.execute("select count(*) from t").fetchone() == (0,)
    back.close()


# -- Redis -----------------------------------------------------------------------------------------------


def test_redis_there_and_back(local_cli: Cli, redis: Redis) -> None:
    redis.cli(script="".join(f"set key:{n} {'v' * (n % 50)}ä{n}\n" for n in range(20000)))
    redis.cli("sadd", "menge", "eins", "zwei")
    redis.cli("-n", "3", "hset", "hash", "field", "wert")
    pushed = local_cli.ok("push", "series", "--from", redis.url, "--json").json
    assert len(pushed["source"]["coordinates"]["replication_id"]) == 40
    (producer,) = local_cli.ok("show", "series", "--json").json["manifest"]["producers"]
    assert producer["markers"][0].startswith("CRC-64 ")
    place = local_cli.directory / "restored"
    local_cli.ok("restore", "series", "--into", str(place))
    assert os.listdir(place) == ["dump.rdb"]
    redis.stop()
    other = Redis(place)
    try:
        other.start()
        assert other.cli("dbsize") == "20001"
        assert other.cli("get", "key:777").endswith("ä777")
        assert other.cli("-n", "3", "hget", "hash", "field") == "wert"
    finally:
        other.stop()
    record = local_cli.ok("drill", "series", "--check", "GET key:5", "vvvvvä5", "--json").json["record"]
    assert record["result"] == "proved"


def test_redis_that_stops_or_refuses(local_cli: Cli, tmp_path: Path) -> None:
    directory = tmp_path / "locked"
    directory.mkdir()
    server = Redis(directory, "--requirepass", "geheim", "--rdb-key-save-delay", "200")
    server.start()
    try:
        wrong = local_cli("push", "series", "--from", server.url)
        assert wrong.code == 10
        assert "NOAUTH" in wrong.err
        environment = {"REDISCLI_AUTH": "geheim"}
        local_cli("push", "first", "--from", server.url, env=environment)
        server.cli(
            "-a", "geheim", "--no-auth-warning", script="".join(f"set key:{n} {'x' * 100}\n" for n in range(30000))
        )
        # (Saving takes it 6 seconds: killed in the middle of its dump.)
        process = local_cli.start("push", "series", "--from", server.url, env=environment)
        time.sleep(2.5)
        server.kill()
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1, err.decode()
        assert b"geheim" not in err
        assert local_cli.ok("list", "series", "--json").json["backups"] == []
    finally:
        server.stop()


# -- directories -----------------------------------------------------------------------------------------


def make_tree(root: Path) -> None:
    (root / "unter ordner" / "leer").mkdir(parents=True)
    (root / "unter ordner" / "dätei\nmit zeile").write_bytes(b"x" * 10000)
    (root / "link").symlink_to("unter ordner/nowhere")
    os.link(root / "unter ordner" / "dätei\nmit zeile", root / "hard")
    with open(root / "holes", "wb") as file:
        file.truncate(50_000_000)
        file.seek(20_000_000)
        file.write(b"in the middle")
    os.setxattr(root / "hard", "user.note", b"wert \x00\xff")
    (root / "script").write_text("#!/bin/sh\n")
    (root / "script").chmod(0o4751)
    for number in range(300):
        (root / f"file {number:04d}").write_bytes(random.randbytes(2000))
    os.utime(root / "script", ns=(10**18 + 123456789, 10**18 + 123456789))


def described(root: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for directory, names, files in os.walk(root):
        for name in (*names, *files):
            path = os.path.join(directory, name)
            status = os.lstat(path)
            content: object = None
            if os.path.islink(path):
                content = os.readlink(path)
            elif os.path.isfile(path):
                content = (Path(path).read_bytes(), [(k, os.getxattr(path, k)) for k in os.listxattr(path)])
            found[os.path.relpath(path, root)] = (
                status.st_mode,
                status.st_uid,
                status.st_mtime_ns,
                status.st_nlink,
                content,
            )
    return found


def test_a_directory_there_and_back(local_cli: Cli) -> None:
    tree = local_cli.directory / "tree"
    make_tree(tree)
    first = local_cli.ok("push", "series", "--from", f"dir://{tree}", "--json").json
    time.sleep(1.1)
    for path in tree.iterdir():  # read, and so with other access times
        if path.is_file():
            path.read_bytes()
    second = local_cli.ok("push", "series", "--from", f"dir://{tree}", "--json").json
    assert first["raw_blake3"] == second["raw_blake3"]
    assert first["raw_size"] < 10_000_000  # holes are no bytes
    assert first["source"]["size"] == first["raw_size"]
    back = local_cli.directory / "back"
    local_cli.ok("restore", "series", "--into", f"dir://{back}")
    assert described(back) == described(tree)
    assert (back / "holes").stat().st_blocks * 512 < 1_000_000
    assert local_cli.ok("drill", "series", "--json").json["record"]["result"] == "proved"
    full = local_cli("restore", "series", "--into", f"dir://{back}")
    assert full.code == 10
    (back / "stale").write_text("old")
    local_cli.ok("restore", "series", "--into", f"dir://{back}", "--replace")
    assert described(back) == described(tree)
    assert sorted(name for name in os.listdir(local_cli.directory) if "restoring" in name or "replaced" in name) == []


def test_a_directory_whose_files_change(local_cli: Cli) -> None:
    """tar says so with a status of its own; to whom that is no fault, he can say so."""
    tree = local_cli.directory / "tree"
    tree.mkdir()
    log = tree / "log"
    log.write_bytes(b"x" * 40_000_000)
    stop = threading.Event()

    def grow() -> None:
        with open(log, "ab", buffering=0) as file:
            while not stop.is_set():
                file.write(b"more")
                time.sleep(0.001)

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        failed = local_cli("push", "series", "--from", f"dir://{tree}")
        taken = local_cli("push", "series", "--from", f"dir://{tree}?changing=accept")
    finally:
        stop.set()
        thread.join()
    assert failed.code == 1
    assert "file changed as we read it" in failed.err
    assert taken.code == 0, taken.err
    assert len(local_cli.ok("list", "series", "--json").json["backups"]) == 1


def test_a_mount_point_is_filled_inside(local_cli: Cli, tmpfs: Path) -> None:
    tree = local_cli.directory / "tree"
    tree.mkdir()
    (tree / "a").write_text("new a")
    (tree / "b").write_text("b")
    local_cli.ok("push", "series", "--from", f"dir://{tree}")
    local_cli.ok("restore", "series", "--into", str(tmpfs))
    assert sorted(os.listdir(tmpfs)) == ["a", "b"]
    (tmpfs / "a").write_text("old a")
    (tmpfs / "c").write_text("c")
    assert local_cli("restore", "series", "--into", str(tmpfs)).code == 10
    local_cli.ok("restore", "series", "--into", str(tmpfs), "--replace")
    assert sorted(os.listdir(tmpfs)) == ["a", "b"]
    assert (tmpfs / "a").read_text() == "new a"


@pytest.mark.parametrize("kind", ["dir", "sqlite", "redis"])
def test_a_push_that_is_killed_anywhere(local_cli: Cli, kind: str, redis: Redis) -> None:
    """Ten times at random, the producer where it is a program, else the push itself: nothing is committed."""
    if kind == "dir":
        tree = local_cli.directory / "tree"
        tree.mkdir()
        (tree / "file").write_bytes(random.randbytes(60_000_000))
        url = f"dir://{tree}"
    elif kind == "sqlite":
        path = local_cli.directory / "f.db"
        connection = sqlite3.connect(path)
        connection.executescript(
            """create table a (v); with recursive n(i) as (select 1 union all select i + 1 from n where i < 60000)
               insert into a select randomblob(1000) from n;"""
        )
        connection.close()
        url = f"sqlite://{path}"
    else:
        redis.cli(script="".join(f"set key:{n} {random.randbytes(300).hex()}\n" for n in range(30000)))
        url = redis.url
    whole = killed = 0
    while killed < 10:
        process = local_cli.start("push", "series", "--from", url, "--limit", "20M", "--compress", "none")
        if kind == "dir":
            hit = kill_at_random(process, "tar", random.uniform(0, 0.3))
        else:
            time.sleep(random.uniform(0.3, 0.9))
            process.send_signal(signal.SIGKILL)
            hit = True
        process.communicate(timeout=60)
        if process.returncode == 0:
            whole += 1
            assert whole < 30, "the moments are too late"
        else:
            assert hit
            assert process.returncode in (1, -9)
            killed += 1
        assert len(local_cli.ok("list", "series", "--json").json["backups"]) == whole
    local_cli.ok("clean", "series", "--older-than", "0s")
    left = [path for path in (local_cli.directory / "series").rglob("*") if path.is_file()]
    assert len([path for path in left if path.name == "manifest.json"]) == whole
    assert len(left) == 2 * whole


def test_what_can_not_be_restored(local_cli: Cli) -> None:
    local_cli.ok("push", "command", "--", "echo", "data")
    result = local_cli("restore", "command", "--into", "postgresql:///x")
    assert result.code == 2
    assert "backhaul pull" in result.err
    tree = local_cli.directory / "tree"
    tree.mkdir()
    (tree / "f").write_text("x")
    local_cli.ok("push", "dir", "--from", f"dir://{tree}")
    result = local_cli("restore", "dir", "--into", "postgresql:///x")
    assert result.code == 2
    assert "--into dir:///EMPTY_DIRECTORY" in result.err
    assert local_cli("drill", "command").code == 2
    assert local_cli("drill", "dir", "--check", "select 1", "1").code == 2
    for url in (
        "nosuch://x/y",
        "dir://host/path",
        "sqlite:///f?x=y",
        "postgresql://u:p@h/d",
        "mariadb://u@h/d?password=x",
    ):
        wrong = local_cli("push", "series", "--from", url)
        assert wrong.code == 2, url
        assert "next:" in wrong.err
    assert local_cli("push", "series", "--from", f"dir://{tree}", "--expect", "x").code == 2


def test_nothing_is_installed(local_cli: Cli) -> None:
    """All missing programs in one list, with what installs them."""
    empty = local_cli.directory / "bin"
    empty.mkdir()
    (empty / "python3").symlink_to("/usr/bin/python3")
    tree = local_cli.directory / "tree"
    tree.mkdir()
    result = local_cli("push", "series", "--from", f"dir://{tree}", env={"PATH": str(empty)})
    assert result.code == 10
    assert "the program tar" in result.err
    assert "apt-get install tar" in result.err


def test_init_finds_nothing_quietly(local_cli: Cli) -> None:
    text = local_cli.ok("init", env={"PGHOST": "/nonexistent"}).out.decode()
    assert "backhaul" in text


def test_doctor_for_files(local_cli: Cli) -> None:
    path = local_cli.directory / "f.db"
    sqlite3.connect(path).execute("create table t (a)").connection.close()
    assert "journal" in local_cli.ok("doctor", f"sqlite://{path}").out.decode()
    assert local_cli("doctor", "sqlite:///no/such").code == 10
    tree = local_cli.directory / "tree"
    tree.mkdir()
    local_cli.ok("doctor", f"dir://{tree}")


def test_progress_by_tables_in_a_pipe_is_no_noise(local_cli: Cli) -> None:
    tree = local_cli.directory / "tree"
    make_tree(tree)
    result = local_cli.ok("push", "series", "--from", f"dir://{tree}")
    assert result.out == b""
    assert len(result.err.splitlines()) == 3
    quiet = local_cli.ok("push", "-q", "series", "--from", f"dir://{tree}")
    assert quiet.err == ""


def test_backups_are_not_replaced(local_cli: Cli) -> None:
    """Not by --replace either: the series that is restored from, another one, or what holds them."""
    tree = local_cli.directory / "tree"
    tree.mkdir()
    (tree / "f").write_text("x")
    for series in ("store/one", "store/two"):
        local_cli.ok("push", series, "--from", f"dir://{tree}")
    for place in ("store/one", "store/two", "store", "store/one/inside"):
        refused = local_cli("restore", "store/one", "--into", str(local_cli.directory / place), "--replace")
        assert refused.code == 10, place
        assert "backup" in refused.err or "series" in refused.err
    for series in ("store/one", "store/two"):
        assert len(local_cli.ok("list", series, "--json").json["backups"]) == 1
    both = local_cli("restore", "store/one", "--into", "x", "--only", "t", "--replace")
    assert both.code == 2


def test_sqlite_that_is_in_use_and_somebody_elses(local_cli: Cli) -> None:
    path = local_cli.directory / "f.db"
    sqlite3.connect(path).execute("create table t (a)").connection.close()
    local_cli.ok("push", "series", "--from", f"sqlite://{path}")
    os.chown(path, 65534, 65534)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("begin exclusive")
    refused = local_cli("restore", "series", "--into", f"sqlite://{path}", "--replace")
    assert refused.code == 10
    assert "locked" in refused.err
    connection.execute("rollback")
    connection.close()
    local_cli.ok("restore", "series", "--into", f"sqlite://{path}", "--replace")
    assert os.stat(path).st_uid == 65534


def test_questions_of_a_drill(local_cli: Cli) -> None:
    path = local_cli.directory / "f.db"
    connection = sqlite3.connect(path)
    connection.executescript("create table t (a); insert into t values (null), (1);")
    connection.close()
    local_cli.ok("push", "series", "--from", f"sqlite://{path}")
    for question, value, code in (
        ("select a from t where a is null", "NULL", 0),
        ("select count(*) > 1 from t", "true", 0),
        ("select count(*) from t", "2", 0),
        ("select count(*) from t", "3", 1),
        ("select a from t where a = 9", "NULL", 1),
        ("select count(*) from nosuch", "1", 10),
    ):
        result = local_cli("drill", "series", "--no-record", "--check", question, value)
        assert result.code == code, (question, result.err)
        if code:
            assert "restored, but a --check" in result.err
    assert local_cli.ok("list", "series", "--json").json["backups"][0]["drill"] is None
