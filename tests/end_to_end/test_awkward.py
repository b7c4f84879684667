"""Awkward surroundings: closed descriptors, stuck and odd commands, broken connections, hostile text."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from backhaul.formats.manifest import VERSION
from backhaul.testing.data import dump_text, random_bytes
from backhaul.testing.servers import SeaweedFS
from tests.conftest import Cli
from tests.end_to_end.test_failures import wait_until


def shell(cli: Cli, command: str, timeout: float = 60) -> subprocess.CompletedProcess[bytes]:
    """Run a line of shell in which ``backhaul`` is the command under test."""
    program = f"backhaul() {{ '{sys.executable}' -m backhaul \"$@\"; }}\n"
    return subprocess.run(
        ["bash", "-c", program + command],
        env=cli.environment,
        cwd=cli.directory,
        capture_output=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def test_closed_descriptors(local_cli: Cli) -> None:
    assert shell(local_cli, "backhaul push -q s <&-").returncode == 1  # nothing to read is an empty stream
    for redirection in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        done = shell(
            local_cli,
            f"backhaul push s {redirection} -- echo {redirection.replace('&', 'x').replace('>', 'y').replace('<', 'z')!r}",
        )
        assert done.returncode == 0, (redirection, done.stderr)
        time.sleep(1.1)
    assert shell(local_cli, "backhaul pull s -o f >&- 2>&-").returncode == 0
    assert (local_cli.directory / "f").exists()


def test_a_producer_survives_that_nobody_reads_its_words(local_cli: Cli) -> None:
    done = shell(
        local_cli,
        "backhaul push s -- sh -c 'for i in 1 2 3 4 5 6 7 8 9; do echo $i >&2; sleep 0.1; done; echo data' 2>&1 | head -1; backhaul pull -q s",
    )
    assert done.stdout.endswith(b"data\n"), (done.stdout, done.stderr)


def test_a_consumer_that_closes_its_input_and_stays(local_cli: Cli) -> None:
    local_cli.ok("push", "s", input=b"".join(random_bytes(5_000_000)))
    start = time.monotonic()
    result = local_cli("pull", "s", "--", "sh", "-c", "exec 0<&-; sleep 300")
    assert result.code == 1
    assert "closed its input" in result.err
    assert time.monotonic() - start < 30


def test_a_damaged_stream_is_noticed_while_the_consumer_does_not_read(local_cli: Cli) -> None:
    local_cli.ok("push", "s", input=b"".join(random_bytes(50_000_000)))
    path = next(local_cli.directory.rglob("data.zst"))
    content = bytearray(path.read_bytes())
    content[12_000_000] ^= 1  # within what is read ahead
    path.write_bytes(content)
    start = time.monotonic()
    result = local_cli("pull", "s", "--", "sleep", "300")
    assert result.code == 1
    assert "data.zst" in result.err
    assert time.monotonic() - start < 30


def test_what_a_consumer_left_running_reads_no_end(local_cli: Cli) -> None:
    """The command itself has ended well; a child of it still reads when Backhaul is killed."""
    local_cli.ok("push", "s", input=b"".join(random_bytes(60_000_000)))
    ended = local_cli.directory / "ended"
    begun = local_cli.directory / "begun"
    script = f"exec 3<&0; (touch '{begun}'; sleep 2; cat <&3 >/dev/null; touch '{ended}') & exit 0"
    for number in (signal.SIGKILL, signal.SIGTERM):
        begun.unlink(missing_ok=True)
        process = local_cli.start("pull", "s", "-q", "--", "sh", "-c", script)
        wait_until(begun.exists)
        time.sleep(0.3)
        process.send_signal(number)
        process.communicate(timeout=20)
        time.sleep(2.5)
        assert not ended.exists()


def test_nohup_stays_nohup(local_cli: Cli) -> None:
    def detach() -> None:
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = local_cli.start("push", "s", "-q", "--", "sh", "-c", "sleep 1; echo data", preexec_fn=detach)
    time.sleep(0.6)
    os.killpg(process.pid, signal.SIGHUP)
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert local_cli.ok("pull", "s").out == b"data\n"


def test_one_place_under_two_names(local_cli: Cli) -> None:
    (local_cli.directory / "link").symlink_to("s")
    for second in ("s/", "./s", "link", f"file://{local_cli.directory}/s"):
        assert local_cli("push", "s", second, "--", "echo", "x").code == 2


def test_a_forgotten_dash_dash(local_cli: Cli) -> None:
    result = local_cli("push", "./s", "pg_dump", "app", input=b"data")
    assert result.code == 2
    assert "Put -- before the command" in result.err
    assert [p.name for p in local_cli.directory.iterdir()] == []


def test_dumps_are_private_and_failures_leave_no_directories(local_cli: Cli) -> None:
    assert local_cli("push", "a/b/c", "--", "sh", "-c", "echo x; exit 1").code == 1
    assert list(local_cli.directory.iterdir()) == []
    local_cli.ok("push", "a/b/c", "--", "echo", "x")
    for path in (local_cli.directory / "a").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_failed_push_still_names_what_it_committed(local_cli: Cli) -> None:
    done = local_cli("push", "s", "t", "--json", "--", "sh", "-c", "rm -f t/*/claim.json; echo x")
    assert done.code == 1
    document = json.loads(done.out)
    assert [d["state"] for d in document["destinations"]] == ["committed", "failed"]
    assert (local_cli.directory / "s" / document["id"] / "manifest.json").exists()


def test_text_that_is_none(local_cli: Cli) -> None:
    odd = os.fsdecode(b"odd \xff argument")
    local_cli.ok("push", "s", "--expect", os.fsdecode(b"\xff"), "--", "printf", "data \\377", odd)
    shown = local_cli.ok("show", "s", "--json").json["manifest"]["producers"][0]
    assert shown["command"][-1] == "odd \\xff argument"
    assert shown["markers"] == ["\\xff"]


def test_markup_and_escapes_in_names(local_cli: Cli) -> None:
    series = "[red]x[/nonsense]"
    local_cli.ok("push", series, "--", "echo", "[/bold]")
    for verb in ("list", "show", "verify", "clean"):
        assert "Something unexpected" not in local_cli.ok(verb, series).err
    next(local_cli.directory.rglob("manifest.json")).write_text("[[[" * 100_000)
    result = local_cli("list", "--long", series)
    assert result.code == 0
    assert "not a manifest" in result.out.decode()
    assert local_cli("show", series).code == 1


@pytest.mark.parametrize(
    "change",
    [('"frames": 1', '"frames": -5'), (f'"{VERSION}"', '"' + "9" * 5000 + '.0"'), ('"offset": ', '"offset": 9')],
)
def test_hostile_manifests(local_cli: Cli, change: tuple[str, str]) -> None:
    local_cli.ok("push", "s", "--", "echo", "x")
    path = next(local_cli.directory.rglob("manifest.json"))
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    for verb in ("show", "pull", "verify"):
        result = local_cli(verb, "s", *(["--deep"] if verb == "verify" else []))
        assert "unexpected" not in result.err
        if verb != "show" or '"offset"' not in change[0]:
            assert result.code == 1, verb


def test_secrets_in_store_paths(local_cli: Cli) -> None:
    for path in (
        "s3://bucket/x?secret_access_key=hunter2",
        "s3://bucket/x?endpoint=http://me:hunter2@host",
        "sftp://me:hunter2@host/x",
        "s3://me:hunter2@bucket/x",
    ):
        for arguments in (["list", path], ["push", path, "--json", "--", "echo", "x"]):
            result = local_cli(*arguments)
            assert result.code == 2
            assert "hunter2" not in result.err
            assert b"hunter2" not in result.out


def test_json_is_one_object_whatever_the_status(local_cli: Cli) -> None:
    (local_cli.directory / "file").write_text("in the way")
    pushed = local_cli("push", "s", "file", "--require", "any", "--json", "--", "echo", "x")
    assert pushed.code == 3
    assert [d["state"] for d in json.loads(pushed.out)["destinations"]] == ["committed", "failed"]
    next(local_cli.directory.rglob("data.zst")).write_bytes(b"")
    verified = local_cli("verify", "s", "--json")
    assert verified.code == 1
    assert json.loads(verified.out)["schema"] == "backhaul.verify/1"
    for arguments in (["list", "nonsense:x", "--json"], ["list", "--json"], ["show", "none", "--json"]):
        failed = local_cli(*arguments)
        assert json.loads(failed.out)["exit_code"] == failed.code != 0


@contextlib.contextmanager
def cutting_proxy(server: SeaweedFS, cut_after: int, cuts: int) -> Iterator[tuple[str, list[int]]]:
    """A way to the server that breaks the first ``cuts`` replies longer than ``cut_after`` bytes, there.

    Yields its endpoint, and a list of the bytes that each connection brought back.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    brought: list[int] = []
    left = [cuts]
    lock = threading.Lock()

    def pump(client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", server.port)) as upstream:

            def requests() -> None:
                with contextlib.suppress(OSError):
                    while data := client.recv(1 << 16):
                        upstream.sendall(data)
                    upstream.shutdown(socket.SHUT_WR)

            threading.Thread(target=requests, daemon=True).start()
            index = len(brought)
            brought.append(0)
            with contextlib.suppress(OSError):
                while data := upstream.recv(1 << 16):
                    brought[index] += len(data)
                    client.sendall(data)
                    with lock:
                        if brought[index] > cut_after and left[0] > 0:
                            left[0] -= 1
                            client.shutdown(socket.SHUT_RDWR)
                            upstream.shutdown(socket.SHUT_RDWR)
                            return

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=pump, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", brought
    finally:
        listener.close()


def test_a_broken_read_goes_on_from_where_it_broke(cli: Cli, seaweed: SeaweedFS, bucket: str) -> None:
    data = b"".join(dump_text(20_000_000)) + b"".join(random_bytes(60_000_000))
    size = cli.ok("push", f"s3://{bucket}/app", "--json", input=data).json["stored_size"]
    with cutting_proxy(seaweed, cut_after=1_500_000, cuts=6) as (endpoint, brought):
        done = cli.ok("pull", f"s3://{bucket}/app?endpoint={endpoint}", "--json")
    assert done.out == data
    assert json.loads(done.err)["rereads"] == 6
    # Each cut costs what was under way in the sockets, not the megabytes that had arrived.
    assert sum(brought) < size + 6 * 1_000_000 + 100_000
