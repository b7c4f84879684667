"""What goes wrong: producers, destinations, stored bytes, signals. Each ends loudly and leaves nothing half."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backhaul.testing.data import dump_text, random_bytes
from backhaul.testing.servers import SeaweedFS, seaweedfs, tool
from tests.conftest import Cli, Result, keys, open_uploads


def assert_nothing(cli: Cli, s3: Any, bucket: str, local: Path) -> None:
    """Nothing listed, nothing stored, nothing left open, in either place."""
    assert keys(s3, bucket) == []
    assert open_uploads(s3, bucket) == []
    assert [p for p in local.rglob("*") if p.is_file()] == []
    for series in (f"s3://{bucket}/app", str(local)):
        assert cli.ok("list", series, "--json").json["backups"] == []


def assert_three_parts(result: Result, code: int) -> None:
    assert result.code == code, result.err
    assert re.search(r"^backhaul: \S", result.err, re.MULTILINE), result.err
    assert re.search(r"^  why:  \S", result.err, re.MULTILINE), result.err
    assert re.search(r"^  next: \S", result.err, re.MULTILINE), result.err
    assert "Traceback" not in result.err


# -- the producer ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 MB of dump text."""
    path = tmp_path_factory.mktemp("data") / "dump"
    with open(path, "wb") as file:
        file.writelines(dump_text(200_000_000))
    return path


@pytest.mark.parametrize(
    ("script", "words"),
    [
        pytest.param("cat '{file}'; echo 'pg_dump: error: connection lost' >&2; exit 1", "connection lost", id="exit"),
        pytest.param("cat '{file}'; kill -9 $$", "SIGKILL", id="killed"),
        pytest.param("head -c 1000 '{file}'; exit 3", "status 3", id="early"),
        pytest.param("cat '{file}' | (exec head -c 150000000); kill -TERM $$", "SIGTERM", id="terminated"),
    ],
)
def test_a_producer_that_fails_commits_nothing(
    cli: Cli, s3: Any, bucket: str, tmp_path: Path, long_file: Path, script: str, words: str
) -> None:
    result = cli("push", f"s3://{bucket}/app", str(tmp_path / "s"), "--", "sh", "-c", script.format(file=long_file))
    assert_three_parts(result, 1)
    assert words in result.err
    assert_nothing(cli, s3, bucket, tmp_path / "s")


def test_a_producer_that_never_starts(cli: Cli, s3: Any, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "not-executable").write_text("#!/bin/sh\n")
    (tmp_path / "bad-interpreter").write_text("#!/no/such/interpreter\n")
    (tmp_path / "bad-interpreter").chmod(0o755)
    for program in ("no-such-dump", str(tmp_path / "not-executable"), str(tmp_path / "bad-interpreter"), str(tmp_path)):
        result = cli("push", f"s3://{bucket}/app", str(tmp_path / "s"), "--", program, "-x")
        assert_three_parts(result, 1)
        assert program in result.err
    assert_nothing(cli, s3, bucket, tmp_path / "s")


def test_a_marker_that_is_missing_at_the_end_of_a_long_stream(
    cli: Cli, s3: Any, bucket: str, tmp_path: Path, long_file: Path
) -> None:
    result = cli(
        "push", f"s3://{bucket}/app", str(tmp_path / "s"), "--expect", "never said", "--", "cat", str(long_file)
    )
    assert_three_parts(result, 1)
    assert "never said" in result.err
    assert_nothing(cli, s3, bucket, tmp_path / "s")


def test_grandchildren_of_an_aborted_producer_do_not_live_on(cli: Cli, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"(echo $$; sh -c 'echo $$; sleep 600') >> '{pids}' & sh -c 'echo $$' >> '{pids}'; yes | cat"
    process = cli.start("push", str(tmp_path / "s"), "--quiet", "--", "sh", "-c", script)
    wait_until(lambda: pids.exists() and len(pids.read_text().split()) >= 3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=15)
    assert process.returncode == 130
    for pid in pids.read_text().split():
        assert not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()


# -- destinations ------------------------------------------------------------------------------------------


def wait_until(condition: Any, timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.parametrize(("require", "code"), [("all", 1), ("1", 3), ("any", 3)])
def test_one_destination_dies_midway(
    cli: Cli, s3: Any, bucket: str, tmp_path: Path, require: str, code: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The survivor's backup is committed and whole; the status says what was required."""
    go = tmp_path / "go"
    script = f"head -c 60000000 /dev/urandom; while [ ! -e '{go}' ]; do sleep 0.05; done; head -c 30000000 /dev/urandom"
    with seaweedfs(tmp_path / "mortal") as mortal:
        mortal_series = f"s3://doomed/app?endpoint={mortal.endpoint}"
        make_bucket(mortal, "doomed")
        survivor = f"s3://{bucket}/app"
        process = cli.start(
            "push",
            mortal_series,
            survivor,
            "--require",
            require,
            "--retry-for",
            "2s",
            "--json",
            "--",
            "sh",
            "-c",
            script,
        )
        wait_until(lambda: open_uploads(s3, bucket))
        mortal.kill()
        go.touch()
        out, err = process.communicate(timeout=90)
        assert process.returncode == code, err
        document = json.loads(out[: out.index(b"\n}") + 2])
        assert f"127.0.0.1:{mortal.port}" in err.decode()
        listed = cli.ok("list", survivor, "--json").json["backups"]
        assert len(listed) == 1
        cli.ok("verify", "--deep", survivor)
        if code == 3:
            assert [d["state"] for d in document["destinations"]] == ["failed", "committed"]
        else:
            assert "Committed and whole" in err.decode()
        # What the dead one holds is invisible, and clean collects it when it is back.
        mortal.start()
        mortal_series = f"s3://doomed/app?endpoint={mortal.endpoint}"
        assert cli.ok("list", mortal_series, "--json").json["backups"] == []
        cli.ok("clean", mortal_series, "--older-than", "0s")
        dead = {**cli.environment, "AWS_ENDPOINT_URL": mortal.endpoint}
        assert aws(dead, "s3", "ls", "--recursive", "s3://doomed") == ""
        assert "Uploads" not in aws(dead, "s3api", "list-multipart-uploads", "--bucket", "doomed")


def make_bucket(server: SeaweedFS, name: str) -> None:
    aws({**os.environ, **server.environment}, "s3", "mb", f"s3://{name}")


def aws(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run([tool("aws"), *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def test_all_destinations_die(cli: Cli, tmp_path: Path) -> None:
    with seaweedfs(tmp_path / "mortal") as mortal:
        make_bucket(mortal, "doomed")
        go = tmp_path / "go"
        script = f"head -c 60000000 /dev/urandom; touch '{go}'; exec yes"
        process = cli.start(
            "push", f"s3://doomed/app?endpoint={mortal.endpoint}", "--retry-for", "1s", "--", "sh", "-c", script
        )
        wait_until(go.exists)
        mortal.kill()
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert_three_parts(Result(1, b"", err.decode()), 1)


def test_a_destination_that_fails_at_the_start(cli: Cli, bucket: str, tmp_path: Path) -> None:
    """Before the dump begins: with --require all nothing begins, else the others go on."""
    ran = tmp_path / "ran"
    command = ["--", "sh", "-c", f"touch '{ran}'; echo data"]
    missing = f"s3://no-such-bucket-{os.getpid()}/app"
    assert_three_parts(cli("push", str(tmp_path / "s"), missing, *command), 10)
    assert not ran.exists()
    assert not any((tmp_path / "s").rglob("*"))
    done = cli("push", str(tmp_path / "s"), missing, "--require", "1", *command)
    assert done.code == 3
    assert "NoSuchBucket" in done.err
    assert cli.ok("pull", str(tmp_path / "s")).out == b"data\n"


# -- prerequisites and disks -------------------------------------------------------------------------------


def test_wrong_credentials(cli: Cli, bucket: str) -> None:
    wrong = {"AWS_SECRET_ACCESS_KEY": "not-the-secret-of-anybody"}
    for arguments in (["push", f"s3://{bucket}/x", "--", "echo", "x"], ["list", f"s3://{bucket}/x"]):
        result = cli(*arguments, env=wrong)
        assert_three_parts(result, 10)
        assert "AWS_SECRET_ACCESS_KEY" in result.err
        assert "not-the-secret-of-anybody" not in result.err
        assert cli.environment["AWS_ACCESS_KEY_ID"] not in result.err


def test_no_credentials(local_cli: Cli, seaweed: SeaweedFS) -> None:
    result = local_cli("list", "s3://bucket/x", env={"AWS_ENDPOINT_URL": seaweed.endpoint})
    assert_three_parts(result, 10)
    assert "AWS_ACCESS_KEY_ID" in result.err


def test_an_unknown_profile(local_cli: Cli) -> None:
    assert_three_parts(local_cli("list", "s3://bucket/x?profile=nobody"), 10)


def test_missing_bucket(cli: Cli) -> None:
    name = f"missing-{os.getpid()}"
    for verb in ("push", "list", "pull", "show", "verify", "clean"):
        result = cli(verb, f"s3://{name}/x", *(["--", "echo", "x"] if verb == "push" else []))
        assert_three_parts(result, 10)
        assert name in result.err


def test_refused_connection_and_unknown_host(cli: Cli, tmp_path: Path) -> None:
    for endpoint in ("http://127.0.0.1:9", "http://no-such-host.invalid:8333"):
        start = time.monotonic()
        result = cli("push", f"s3://b/x?endpoint={endpoint}", "--", "sh", "-c", f"touch '{tmp_path}/ran'; echo x")
        assert_three_parts(result, 1)
        assert endpoint.removeprefix("http://").split(":")[0] in result.err
        assert time.monotonic() - start < 30, "said soon, not after the patience of a running dump"
    assert not (tmp_path / "ran").exists()
    assert_three_parts(cli("push", "s3://b/x?endpoint=nonsense", "--", "echo", "x"), 10)


def test_usage_errors(cli: Cli, tmp_path: Path) -> None:
    for arguments in (
        [],
        ["push"],
        ["push", "s", "--compress", "20", "--", "echo"],
        ["push", "s", "--require", "2", "--", "echo"],
        ["push", "s", "s", "--", "echo"],
        ["push", "s", "--limit", "fast", "--", "echo"],
        ["push", "s", "--"],
        ["push", "http://x/y", "--", "echo"],
        ["pull", "s", "-o", "f", "--", "cat"],
        ["pull", "s@yesterday", "-o", "f"],
        ["clean", "s", "--older-than", "24"],
        ["nonsense"],
        ["list", "s", "--nonsense"],
    ):
        result = cli(*arguments)
        assert result.code == 2, (arguments, result.err)
        assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(cli: Cli, bucket: str, tmpfs: Path) -> None:
    noise = b"".join(random_bytes(30_000_000))
    result = cli("push", str(tmpfs / "s"), input=noise)
    assert_three_parts(result, 1)
    assert "No space left" in result.err
    assert [p for p in tmpfs.rglob("*") if p.is_file()] == [], "the half file is gone, the disk is free again"
    both = cli("push", str(tmpfs / "s"), f"s3://{bucket}/app", "--require", "any", "--json", input=noise)
    assert both.code == 3
    assert cli.ok("pull", f"s3://{bucket}/app").out == noise
    full = cli("pull", f"s3://{bucket}/app", "-o", str(tmpfs / "back"))
    assert_three_parts(full, 1)
    assert list(tmpfs.glob("*back*")) == []


def test_a_read_only_disk(cli: Cli, tmpfs: Path) -> None:
    cli.ok("push", str(tmpfs / "s"), input=b"old")
    subprocess.run(["mount", "-o", "remount,ro", str(tmpfs)], check=True)
    result = cli("push", str(tmpfs / "s"), "--", "echo", "new")
    assert_three_parts(result, 10)
    assert "Read-only" in result.err
    assert cli.ok("pull", str(tmpfs / "s")).out == b"old"
    assert_three_parts(cli("pull", str(tmpfs / "s"), "-o", str(tmpfs / "f")), 1)


def test_an_unwritable_place(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    for place in (tmp_path / "file" / "series", Path("/proc/backhaul-series")):
        result = cli("push", str(place), "--", "echo", "x")
        assert result.code in (1, 10), result.err
        assert_three_parts(result, result.code)
    assert_three_parts(cli("push", str(tmp_path / "file"), "--", "echo", "x"), 10)
    assert (tmp_path / "file").read_text() == "a file"


# -- stored bytes ------------------------------------------------------------------------------------------


class Stored:
    """A committed backup of a known stream, in S3 or on disk, and the means to damage it."""

    def __init__(self, cli: Cli, s3: Any, series: str, bucket: str | None, data: bytes, *more: str) -> None:
        self.cli, self.s3, self.series, self.bucket = cli, s3, series, bucket
        self.id: str = cli.ok("push", series, *more, "--json", input=data).json["id"]

    def read(self, name: str) -> bytes:
        if self.bucket:
            key = self.series.removeprefix(f"s3://{self.bucket}/") + f"/{self.id}/{name}"
            content: bytes = self.s3.get_object(Bucket=self.bucket, Key=key)["Body"].read()
            return content
        return (Path(self.series) / self.id / name).read_bytes()

    def write(self, name: str, content: bytes | None) -> None:
        if self.bucket:
            key = self.series.removeprefix(f"s3://{self.bucket}/") + f"/{self.id}/{name}"
            if content is None:
                self.s3.delete_object(Bucket=self.bucket, Key=key)
            else:
                self.s3.put_object(Bucket=self.bucket, Key=key, Body=content)
        elif content is None:
            (Path(self.series) / self.id / name).unlink()
        else:
            (Path(self.series) / self.id / name).write_bytes(content)


@pytest.fixture(params=["s3", "local"])
def backup(request: pytest.FixtureRequest, cli: Cli, s3: Any, bucket: str, tmp_path: Path) -> Stored:
    data = b"".join(dump_text(21_000_000))
    if request.param == "s3":
        return Stored(cli, s3, f"s3://{bucket}/app", bucket, data)
    return Stored(cli, s3, str(tmp_path / "series"), None, data)


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :]


OBJECT_DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "first byte": lambda c: flipped(c, 0),
    "first frame": lambda c: flipped(c, 100_000),
    "middle": lambda c: flipped(c, len(c) // 2),
    "last frame": lambda c: flipped(c, len(c) - 200),
    "seek table": lambda c: flipped(c, len(c) - 30),
    "last byte": lambda c: flipped(c, len(c) - 1),
    "truncated": lambda c: c[:-1],
    "half": lambda c: c[: len(c) // 2],
    "longer": lambda c: c + b"x",
    "empty": lambda c: b"",
    "missing": lambda c: None,
    "another": lambda c: bytes(len(c)),
}
SHALLOW_SEES = set(OBJECT_DAMAGE)  # each is a replaced object, and a store tells those apart


@pytest.mark.parametrize("damage", OBJECT_DAMAGE)
def test_a_damaged_object(backup: Stored, tmp_path: Path, damage: str) -> None:
    cli, series = backup.cli, backup.series
    backup.write("data.zst", OBJECT_DAMAGE[damage](backup.read("data.zst")))

    for arguments in (["pull", series], ["verify", "--deep", series], ["pull", series, "-o", str(tmp_path / "file")]):
        result = cli(*arguments)
        assert_three_parts(result, 1)
        assert f"{backup.id}/data.zst" in result.err
    assert not (tmp_path / "file").exists()
    assert list(tmp_path.glob(".file*")) == []

    # The consumer is killed: it never gets past reading its input.
    ended = tmp_path / "ended"
    result = cli("pull", series, "--", "sh", "-c", f"cat > /dev/null; touch '{ended}'")
    assert result.code == 1
    time.sleep(0.1)
    assert not ended.exists()

    shallow = cli("verify", series, "--json")
    assert shallow.code == 1
    assert shallow.out.count(b'"problem"') >= 1
    assert f"{backup.id}/data.zst" in shallow.err


MANIFEST_DAMAGE: dict[str, tuple[Callable[[bytes], bytes | None], str]] = {
    "missing": (lambda m: None, "no backup"),
    "garbage": (lambda m: b"\x00\xff garbage", "not a manifest"),
    "empty": (lambda m: b"", "not a manifest"),
    "another document": (lambda m: b'{"format": "other"}', "not a manifest"),
    "newer major": (lambda m: re.sub(rb'("version": )"1\.\d+"', rb'\g<1>"2.0"', m), "newer Backhaul"),
    "half": (lambda m: m[: len(m) // 2], "not a manifest"),
    "another size": (lambda m: re.sub(rb'("raw": \{\s*"size": )(\d+)', rb"\g<1>7", m), "data.zst"),
    "another hash": (lambda m: re.sub(rb'("raw": \{[^}]*"blake3": ")..', rb"\g<1>zz", m), "data.zst"),
}


@pytest.mark.parametrize("damage", MANIFEST_DAMAGE)
def test_a_damaged_manifest(backup: Stored, tmp_path: Path, damage: str) -> None:
    cli = backup.cli
    change, words = MANIFEST_DAMAGE[damage]
    backup.write("manifest.json", change(backup.read("manifest.json")))
    for series in (backup.series, f"{backup.series}@{backup.id}"):
        for arguments in (["pull", series], ["verify", "--deep", series], ["pull", series, "-o", str(tmp_path / "f")]):
            result = cli(*arguments)
            assert_three_parts(result, 1)
            assert words in result.err
    assert not (tmp_path / "f").exists()
    if damage == "missing":
        assert cli.ok("list", backup.series, "--json").json["backups"] == []
    else:
        assert backup.id in cli("list", "--long", backup.series).out.decode()


def test_a_local_file_that_was_only_copied_is_told_from_a_damaged_one(cli: Cli, tmp_path: Path) -> None:
    data = b"".join(dump_text(9_000_000))
    backup = cli.ok("push", str(tmp_path / "s"), "--json", input=data).json["id"]
    subprocess.run(["cp", "-r", str(tmp_path / "s"), str(tmp_path / "copy")], check=True)
    os.utime(tmp_path / "copy" / backup / "data.zst", ns=(0, 0))
    shallow = cli("verify", str(tmp_path / "copy"))
    assert shallow.code == 1
    assert "--deep" in shallow.err
    deep = cli("verify", "--deep", str(tmp_path / "copy"))
    assert deep.code == 0, deep.err
    assert cli.ok("pull", str(tmp_path / "copy")).out == data


# -- signals -----------------------------------------------------------------------------------------------


def started_push(cli: Cli, s3: Any, bucket: str, local: Path) -> subprocess.Popen[bytes]:
    """A push to both stores that has parts under way and whose producer would never end."""
    process = cli.start("push", f"s3://{bucket}/app", str(local), "--", "sh", "-c", "cat /dev/urandom")

    def parts() -> int:
        uploads = open_uploads(s3, bucket)
        if not uploads:
            return 0
        listed = s3.list_parts(Bucket=bucket, Key=uploads[0]["Key"], UploadId=uploads[0]["UploadId"])
        return len(listed.get("Parts", []))

    wait_until(lambda: parts() >= 2)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_push_takes_everything_back(
    cli: Cli, s3: Any, bucket: str, tmp_path: Path, number: signal.Signals
) -> None:
    process = started_push(cli, s3, bucket, tmp_path / "s")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert number.name in err.decode()
    assert "Traceback" not in err.decode()
    assert_nothing(cli, s3, bucket, tmp_path / "s")


def test_an_interrupt_while_stdin_is_silent(cli: Cli, s3: Any, bucket: str, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    process = cli.start("push", f"s3://{bucket}/app", str(tmp_path / "s"), stdin=reader)
    os.close(reader)
    wait_until(lambda: any((tmp_path / "s").rglob("claim.json")))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    os.close(writer)
    assert process.returncode == 130, err
    assert_nothing(cli, s3, bucket, tmp_path / "s")


def test_a_killed_push_leaves_older_backups_and_clean_collects_the_rest(
    cli: Cli, s3: Any, bucket: str, tmp_path: Path
) -> None:
    series, local = f"s3://{bucket}/app", tmp_path / "s"
    old = cli.ok("push", series, str(local), "--json", input=b"old").json["id"]
    process = started_push(cli, s3, bucket, local)
    process.kill()
    process.communicate()
    assert open_uploads(s3, bucket) != []
    for place in (series, str(local)):
        assert [b["id"] for b in cli.ok("list", place, "--json").json["backups"]] == [old]
        kept = cli.ok("clean", place, "--json").json
        assert kept["removed"] == []
        assert kept["kept"] != []
        planned = cli.ok("clean", place, "--older-than", "0s", "--dry-run", "--json").json
        assert planned["removed"] != []
        assert sum(action["size"] for action in planned["removed"]) > 1_000_000
    assert open_uploads(s3, bucket) != []
    for place in (series, str(local)):
        cleaned = cli.ok("clean", place, "--older-than", "0s", "--json").json
        assert {action["kind"] for action in cleaned["removed"]} == {"upload", "object"}
        assert cli.ok("pull", place).out == b"old"
        cli.ok("verify", "--deep", place)
    assert open_uploads(s3, bucket) == []
    assert keys(s3, bucket) == [f"app/{old}/data.zst", f"app/{old}/manifest.json"]
    assert sorted(str(p.relative_to(local)) for p in local.rglob("*") if p.is_file()) == [
        f"{old}/data.zst",
        f"{old}/manifest.json",
    ]


def test_clean_leaves_other_peoples_files_alone(cli: Cli, s3: Any, bucket: str, tmp_path: Path) -> None:
    s3.put_object(Bucket=bucket, Key="app/README", Body=b"x")
    s3.put_object(Bucket=bucket, Key="app/20200101T000000Z/notes/a.txt", Body=b"x")
    s3.put_object(Bucket=bucket, Key="app-2/20200101T000000Z/data.zst", Body=b"x")
    s3.put_object(Bucket=bucket, Key="app/20200101T000000Z/data.zst", Body=b"x")
    upload = s3.create_multipart_upload(Bucket=bucket, Key="app/somebody-elses.iso")["UploadId"]
    cleaned = cli.ok("clean", f"s3://{bucket}/app", "--older-than", "0s", "--json").json
    assert [action["key"] for action in cleaned["removed"]] == ["20200101T000000Z/data.zst"]
    assert len(keys(s3, bucket)) == 3
    assert [u["UploadId"] for u in open_uploads(s3, bucket)] == [upload]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_pull_never_gives_its_consumer_an_end(cli: Cli, tmp_path: Path, number: signal.Signals) -> None:
    """Even when Backhaul itself vanishes: a restore must not take the half for the whole."""
    series = str(tmp_path / "s")
    cli.ok("push", series, input=b"".join(random_bytes(60_000_000)))
    ended, begun = tmp_path / "ended", tmp_path / "begun"
    # Two stages behind a shell: killing only the shell would let the second one see an end.
    script = f"(head -c 1000000; touch '{begun}'; sleep 1; cat) | (cat > /dev/null; touch '{ended}'); touch '{ended}'"
    process = cli.start("pull", series, "--quiet", "--", "sh", "-c", script)
    wait_until(begun.exists)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    time.sleep(1.5)
    assert not ended.exists()


def test_an_interrupted_pull_to_a_file_leaves_no_file(cli: Cli, tmp_path: Path) -> None:
    series = str(tmp_path / "s")
    cli.ok("push", series, input=b"".join(random_bytes(150_000_000)))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_bytes(b"what was there before")
    process = cli.start("pull", series, "-o", str(tmp_path / "out" / "file"))
    wait_until(lambda: len(list((tmp_path / "out").iterdir())) == 2 or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    if process.returncode == 130:
        assert (tmp_path / "out" / "file").read_bytes() == b"what was there before"
    else:
        assert process.returncode == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file"]


def test_no_secret_anywhere(cli: Cli, tmp_path: Path) -> None:
    """A secret on the producer's command line is masked in messages and in the manifest."""
    script = ["sh", "-c", "echo data; echo PGPASSWORD=hunter2 >&2", "--password=hunter2", "postgresql://u:hunter2@h/d"]
    cli.ok("push", str(tmp_path / "s"), "--", *script)
    manifest = next((tmp_path / "s").rglob("manifest.json")).read_text()
    assert "hunter2" not in manifest
    assert "--password=***" in manifest
    failed = cli("push", str(tmp_path / "s"), "--json", "--", "sh", "-c", "exit 1", "--password=hunter2")
    assert failed.code == 1
    assert b"hunter2" not in failed.out
    assert "hunter2" not in failed.err
