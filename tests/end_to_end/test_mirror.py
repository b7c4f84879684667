"""Mirrors by the command line, against SeaweedFS (and local directories), looked at from outside."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import zstandard

from backhaul.formats import catalog
from backhaul.testing.faults import FaultProxy
from backhaul.testing.mirrors import tree_contents
from backhaul.testing.servers import SeaweedFS, tool
from tests.conftest import Cli, Result, keys, open_uploads

MB = 1_000_000


class Counting(FaultProxy):
    """Counts bytes of bodies, and remembers which objects were read, and which were put."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.sent = 0
        self.read: list[str] = []
        self.put: list[str] = []

    def observe(self, request: Any, status: int, headers: Mapping[str, str]) -> None:
        super().observe(request, status, headers)
        if request.operation in ("GetObject", "PutObject"):
            (self.read if request.operation == "GetObject" else self.put).append(request.key)

    def request_body(self, request: Any, length: int, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in super().request_body(request, length, pieces):
            if request.operation in ("PutObject", "UploadPart"):
                self.sent += len(piece)
            yield piece


class Mirror:
    """A directory, a mirror behind a counting proxy, and a state directory."""

    def __init__(self, cli: Cli, seaweed: SeaweedFS, s3: Any, bucket: str, directory: Path) -> None:
        self.cli, self.s3, self.bucket = cli, s3, bucket
        self.proxy = Counting(seaweed.endpoint)
        self.proxy.start()
        self.here = directory / "backups"
        self.here.mkdir()
        self.back = directory / "back"
        self.url = f"s3://{bucket}/m?endpoint={self.proxy.endpoint}"
        self.environment = {"BACKHAUL_STATE": str(directory / "state")}
        self.rng = random.Random(11)

    def run(self, verb: str, *arguments: str, **options: Any) -> Result:
        return self.cli(verb, *arguments, env=self.environment, **options)

    def sync(self, *more: str, code: int = 0) -> Any:
        result = self.run("sync", str(self.here), self.url, *more, "--json")
        assert result.code == code, result.err
        return result.json

    def write(self, name: str, content: bytes | int) -> bytes:
        path = self.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = self.rng.randbytes(content) if isinstance(content, int) else content
        path.write_bytes(data)
        return data

    def stored(self) -> dict[str, bytes]:
        return {
            key.removeprefix("m/"): self.s3.get_object(Bucket=self.bucket, Key=key)["Body"].read()
            for key in keys(self.s3, self.bucket, "m/")
            if not key.startswith(f"m/{catalog.DIRECTORY}")
        }

    def parts_there(self) -> int:
        """Return how many parts of unfinished uploads the store has."""
        return sum(
            len(self.s3.list_parts(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]).get("Parts", []))
            for upload in open_uploads(self.s3, self.bucket)
        )

    def pull(self) -> dict[str, bytes]:
        self.cli.ok("pull", "-q", self.url, "-o", str(self.back), env=self.environment)
        return tree_contents(self.back)


@pytest.fixture
def mirror(cli: Cli, seaweed: SeaweedFS, s3: Any, bucket: str, tmp_path: Path) -> Iterator[Mirror]:
    found = Mirror(cli, seaweed, s3, bucket, tmp_path)
    yield found
    found.proxy.close()
    assert found.proxy.failures == []


def test_there_and_back(mirror: Mirror) -> None:
    """Names and bytes as they are; again: nothing is sent; changed: what is new; back: all of it."""
    mirror.write("set 1/chunk", 20 * MB)
    mirror.write("set 1/ä é", 5000)
    mirror.write("empty", b"")
    first = mirror.sync()
    assert first["state"] == "complete"
    assert (first["sent"]["files"], first["sent_bytes"]) == (3, 20 * MB + 5000)
    assert mirror.stored() == tree_contents(mirror.here)
    before = mirror.proxy.sent
    again = mirror.sync()
    assert (again["sent"]["files"], again["kept"]["files"]) == (0, 3)
    assert mirror.proxy.sent - before < 2000  # the mirror's own page
    os.rename(mirror.here / "set 1/chunk", mirror.here / "renamed")
    os.unlink(mirror.here / "empty")
    mirror.write("new", 100)
    third = mirror.sync()
    assert (third["renamed"]["files"], third["sent"]["files"], third["tombstones"]["files"]) == (1, 1, 2)
    assert mirror.proxy.sent - before < 10_000
    assert {name: mirror.stored()[name] for name in tree_contents(mirror.here)} == tree_contents(mirror.here)
    assert set(mirror.stored()) - set(tree_contents(mirror.here)) == {"set 1/chunk", "empty"}
    # Of the mirror's objects nothing was read.
    assert [key for key in mirror.proxy.read if catalog.DIRECTORY not in key] == []
    assert mirror.proxy.read != []  # its records were: reads are seen
    assert mirror.pull() == tree_contents(mirror.here)
    assert {"m/new", "m/renamed"} <= set(mirror.proxy.read)
    assert mirror.run("verify", str(mirror.here), mirror.url).code == 0
    assert mirror.run("verify", "--deep", mirror.url).code == 0
    assert open_uploads(mirror.s3, mirror.bucket) == []


def test_any_tool_reads_it(mirror: Mirror, seaweed: SeaweedFS, tmp_path: Path) -> None:
    """rclone finds the files under their names, with their own times; and a mirror that it made is taken over."""
    mirror.write("a/chunk", 9 * MB)
    mirror.write("b", 10)
    mirror.sync()
    remote = {
        **os.environ,
        **seaweed.environment,
        "RCLONE_CONFIG_R_TYPE": "s3",
        "RCLONE_CONFIG_R_PROVIDER": "Other",
        "RCLONE_CONFIG_R_ENV_AUTH": "true",
        "RCLONE_CONFIG_R_ENDPOINT": seaweed.endpoint,
        "RCLONE_CONFIG": "/dev/null",
    }

    def rclone(*arguments: str) -> bytes:
        return subprocess.run([tool("rclone"), *arguments], env=remote, capture_output=True, check=True).stdout

    listed = {entry["Path"]: entry for entry in json.loads(rclone("lsjson", "-R", f"R:{mirror.bucket}/m"))}
    for name in ("a/chunk", "b"):
        seconds = os.stat(mirror.here / name).st_mtime
        assert listed[name]["Size"] == os.stat(mirror.here / name).st_size
        assert listed[name]["ModTime"].startswith(time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)))
    rclone("copy", f"R:{mirror.bucket}/m/b", str(tmp_path / "copied"))
    assert (tmp_path / "copied" / "b").read_bytes() == (mirror.here / "b").read_bytes()
    rclone("sync", str(mirror.here), f"R:{mirror.bucket}/theirs")
    mirror.url = mirror.url.replace("/m?", "/theirs?")
    before = mirror.proxy.sent
    taken = mirror.sync()
    assert (taken["sent"]["files"], taken["recorded"]) == (0, 3)
    assert mirror.proxy.sent - before < 5000
    assert mirror.sync()["kept"]["files"] == 2


def test_of_a_changed_file_only_what_is_new_is_sent(mirror: Mirror) -> None:
    """Also when it moved into a file of another name; the object is the new file, by its checksum and its bytes."""
    old = mirror.write("chunk", 40 * MB)
    mirror.sync()
    mirror.write("chunk", old[: 20 * MB] + mirror.rng.randbytes(6 * MB) + old[20 * MB : 30 * MB] + old[32 * MB :])
    mirror.write("merged", old[2 * MB : 19 * MB] + mirror.rng.randbytes(300_000))
    before = mirror.proxy.sent
    result = mirror.sync()
    assert result["composed"]["files"] == 2
    # New are 6.3 MB. The seam where something was cut out and the one at the beginning of "merged" cost a least part
    # (5 MiB) each, and each end of what is new a chunk.
    assert 6.3 * MB < result["sent_bytes"] < 6.3 * MB + 2 * (5 << 20) + 6 * (512 << 10)
    assert mirror.proxy.sent - before < result["sent_bytes"] + 400_000
    assert mirror.stored() == tree_contents(mirror.here)
    assert mirror.run("verify", "--deep", str(mirror.here), mirror.url).code == 0


def test_a_copied_range_that_is_damaged_is_noticed(mirror: Mirror) -> None:
    """An object that others replaced is not composed from: the file is sent as a whole."""
    old = mirror.write("chunk", 20 * MB)
    mirror.sync()
    mirror.s3.put_object(Bucket=mirror.bucket, Key="m/chunk", Body=b"x" * 20 * MB)
    mirror.write("other", old[: 18 * MB] + b"new")
    result = mirror.sync()
    assert result["sent_bytes"] >= 38 * MB
    assert mirror.stored() == tree_contents(mirror.here)


def test_plan_and_apply(mirror: Mirror, tmp_path: Path) -> None:
    """A plan says each name, reason and bytes; it is applied once, as it is, or not at all."""
    mirror.write("keep", 10)
    mirror.write("change", 10)
    mirror.write("lose", 10)
    mirror.sync()
    mirror.write("change", b"changed!")
    os.unlink(mirror.here / "lose")
    mirror.write("new", 77)
    plan = tmp_path / "plan.json"

    def make() -> Any:
        mirror.cli.ok("plan", str(mirror.here), mirror.url, "-o", str(plan), env=mirror.environment)
        return json.loads(plan.read_bytes())

    document = make()
    actions = {action["key"]: action for action in document["actions"]}
    assert {key: action["kind"] for key, action in actions.items()} == {
        "change": "replace",
        "lose": "tombstone",
        "new": "upload",
    }
    assert actions["new"]["sent"] == 77
    assert all(action["reason"] for action in actions.values())
    before = mirror.stored()
    assert mirror.run("apply", str(plan)).code == 0
    after = mirror.stored()
    assert after != before
    again = mirror.run("apply", str(plan))
    assert again.code == 1
    assert "applied before" in again.err or "stale" in again.err

    # The directory has moved on.
    mirror.write("second", 5)
    make()
    mirror.write("second", b"other")
    stale = mirror.run("apply", str(plan))
    assert (stale.code, "second has changed here" in stale.err) == (1, True)
    # The store has moved on.
    mirror.write("change", b"once more")
    make()
    mirror.s3.put_object(Bucket=mirror.bucket, Key="m/change", Body=b"somebody else")
    stale = mirror.run("apply", str(plan))
    assert (stale.code, "another object" in stale.err) == (1, True)
    assert mirror.stored() == {**after, "change": b"somebody else"}
    # Touched.
    plan.write_bytes(plan.read_bytes().replace(b'"second"', b'"third!"'))
    assert "changed after it was made" in mirror.run("apply", str(plan)).err
    assert "second" not in mirror.stored()
    mirror.sync()
    assert mirror.stored()["change"] == b"once more"


def test_the_guard(mirror: Mirror, tmp_path: Path) -> None:
    """An empty, vanished or other source, and too many deletes: refused, said by name, and nothing is touched."""
    for number in range(30):
        mirror.write(f"f{number:02d}", 10)
    mirror.write(".mounted", b"")
    mirror.sync("--sentinel", ".mounted")
    before = mirror.stored()

    def refused(*more: str) -> str:
        result = mirror.run("sync", str(mirror.here), mirror.url, *more)
        assert result.code == 1, result.err
        assert mirror.stored() == before
        return result.err

    for number in range(11):
        os.unlink(mirror.here / f"f{number:02d}")
    words = refused()
    assert "11 files are gone here" in words
    assert "at most 10 of 31" in words
    assert all(f"f{number:02d}" in words for number in range(11))
    assert "--max-delete 11" in words
    plan = tmp_path / "plan.json"
    assert mirror.run("plan", str(mirror.here), mirror.url, "-o", str(plan)).code == 1
    assert json.loads(plan.read_bytes())["refusals"]
    assert mirror.run("apply", str(plan)).code == 1
    os.unlink(mirror.here / ".mounted")
    assert "sentinel .mounted" in refused("--sentinel", ".mounted", "--max-delete", "100%")
    moved = tmp_path / "elsewhere"
    os.rename(mirror.here, moved)
    assert "Could not read" in refused()
    mirror.here.mkdir()
    assert "is empty" in refused("--max-delete", "100%")
    os.rmdir(mirror.here)
    mirror.here = moved
    assert "not where this mirror comes from" in refused("--max-delete", "100%")
    assert mirror.sync("--max-delete", "40%", "--accept-source")["tombstones"]["files"] == 12
    assert mirror.stored() == before


def test_another_file_system_is_refused(mirror: Mirror) -> None:
    """What an unmounted disk leaves is another file system, whatever lies in it."""
    mirror.write("a", 10)
    mirror.sync()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mirror.here)], check=True)
    try:
        mirror.write("a", 10)
        result = mirror.run("sync", str(mirror.here), mirror.url)
        assert result.code == 1
        assert "is the disk mounted?" in result.err
    finally:
        subprocess.run(["umount", "-l", str(mirror.here)], check=True)
    assert mirror.sync()["kept"]["files"] == 1


def test_an_unreadable_directory_loses_nothing(mirror: Mirror) -> None:
    """Files below a directory that can't be read stay as they are, and nothing is deleted in such a run."""
    mirror.write("d/file", 10)
    mirror.write("old", 10)
    mirror.write("stay", 10)
    mirror.sync()
    os.unlink(mirror.here / "old")
    mirror.sync()
    time.sleep(1.1)
    before = mirror.stored()
    os.chmod(mirror.here / "d", 0)
    # Root without what lets it read everything.
    powerless = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", sys.executable, "-m", "backhaul"]
    command = [*powerless, "sync", str(mirror.here), mirror.url, "--recycle-after", "1s", "--json"]
    environment = {**mirror.cli.environment, **mirror.environment}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    os.chmod(mirror.here / "d", 0o700)
    assert done.returncode == 3, done.stderr
    result = json.loads(done.stdout)
    assert "Permission denied" in result["skipped"][0]["reason"]
    assert (result["held"]["files"], result["recycled"]["files"], result["tombstones"]["files"]) == (1, 0, 0)
    assert mirror.stored() == before
    assert mirror.sync("--recycle-after", "1s")["recycled"]["files"] == 1


@pytest.mark.parametrize(
    ("first", "order"), [("biggest", ["b", "a", "c"]), ("oldest", ["c", "b", "a"]), ("name", ["a", "b", "c"])]
)
def test_which_files_go_first(mirror: Mirror, first: str, order: list[str]) -> None:
    for name, size, age in (("a", 200, 1), ("b", 300, 2), ("c", 100, 3)):
        mirror.write(name, size)
        os.utime(mirror.here / name, (time.time() - age * 86400,) * 2)
    mirror.sync("--first", first, "--streams", "1")
    assert [key.removeprefix("m/") for key in mirror.proxy.put if catalog.DIRECTORY not in key] == order


def test_errors_of_a_store_say_what_why_and_what_next(mirror: Mirror) -> None:
    """A bucket that is not there, a port that nobody listens on, a word that is no store."""
    mirror.write("a", 10)
    for url, code, words in (
        (mirror.url.replace(mirror.bucket, "no-such-bucket"), 10, "no-such-bucket"),
        (f"s3://{mirror.bucket}/m?endpoint=http://127.0.0.1:9", 1, "127.0.0.1:9"),
        (f"s3:/{mirror.bucket}/m", 2, f"Did you mean s3://{mirror.bucket}/m?"),
        (f"s3://{mirror.bucket}", 2, "whole bucket"),
    ):
        result = mirror.run("sync", str(mirror.here), url, "--retry-for", "1s")
        assert (result.code, words in result.err) == (code, True), result.err
        assert all(label in result.err for label in ("why:", "next:")), result.err
    nothing = mirror.here / "empty"
    nothing.mkdir()
    assert mirror.run("sync", str(nothing), mirror.url).code == 0  # a new mirror of nothing is a mirror


def test_the_recycler(mirror: Mirror) -> None:
    """Gone, listed, brought back; waited out, deleted, but not while a run is not clean, and not if it was replaced."""
    for name in ("a", "b", "c", "stay"):
        mirror.write(name, 10)
    content = tree_contents(mirror.here)
    mirror.sync()
    for name in ("a", "b", "c"):
        os.unlink(mirror.here / name)
    assert mirror.sync()["tombstones"]["files"] == 3
    listed = mirror.run("undelete", mirror.url, "--json").json["files"]
    assert [file["name"] for file in listed] == ["a", "b", "c"]
    assert mirror.run("undelete", mirror.url, "a", "-o", str(mirror.here)).code == 0
    assert (mirror.here / "a").read_bytes() == content["a"]
    back = mirror.sync()
    assert (back["recorded"], back["waiting"]["files"]) == (1, 2)
    assert mirror.run("undelete", mirror.url, "nothing*", "-o", str(mirror.back)).code == 1
    # Not clean: a file that can't be mirrored for a reason that may pass.
    mirror.s3.put_object(Bucket=mirror.bucket, Key="m/b", Body=b"somebody else's")
    time.sleep(1.1)
    mirror.write("stay", b"changed")
    result = mirror.sync("--recycle-after", "1s")
    assert result["recycled"]["files"] == 1
    assert set(mirror.stored()) == {"a", "b", "stay"}
    assert mirror.stored()["b"] == b"somebody else's"
    assert mirror.sync("--recycle-after", "0s")["foreign"]["files"] == 1
    assert set(mirror.stored()) == {"a", "b", "stay"}


def test_odd_names_and_kinds(mirror: Mirror) -> None:
    """Right on the way back, or refused by name with status 3; the rest is mirrored all the same."""
    right = ["new\nline", " blank ", "percent%20", "plus+", "a&b<c>", "q?x=1#y", "ü\u0308", "d" * 200 + "/" + "e" * 250]
    right.append("/".join(["l" * 150] * 6))
    for name in right:
        mirror.write(name, 20)
    os.symlink("new\nline", mirror.here / "link")
    os.symlink("/nowhere", mirror.here / "dangling")
    (mirror.here / "empty directory").mkdir(mode=0o750)
    os.link(mirror.here / " blank ", mirror.here / "second name")
    with open(mirror.here / "sparse", "wb") as file:
        file.truncate(30 * MB)
        file.seek(10 * MB)
        file.write(b"in the middle")
    os.setxattr(mirror.here / "plus+", "user.note", b"\0binary")
    os.chmod(mirror.here / "plus+", 0o640)
    os.mkfifo(mirror.here / "pipe")
    # (A socket's path may be no longer than a hundred bytes or so.)
    with socket.socket(socket.AF_UNIX) as unix, contextlib.chdir(mirror.here):
        unix.bind("socket")
    Path(os.fsencode(mirror.here).decode() + "/back\\slash").write_bytes(b"1")
    with open(os.fsencode(mirror.here) + b"/not\xffutf8", "wb") as odd:
        odd.write(b"1")
    result = mirror.sync(code=3)
    assert {each["name"] for each in result["skipped"]} == {"pipe", "socket", "back\\\\slash", "not\\xffutf8"} or {
        each["name"] for each in result["skipped"]
    } == {"pipe", "socket", "back\\slash", "not\\xffutf8"}
    for name in ("pipe", "socket", "back\\slash"):
        os.unlink(mirror.here / name)
    os.unlink(os.fsencode(mirror.here) + b"/not\xffutf8")
    assert mirror.pull() == tree_contents(mirror.here)
    back = mirror.back
    assert os.readlink(back / "link") == "new\nline"
    assert os.readlink(back / "dangling") == "/nowhere"
    assert os.stat(back / "empty directory").st_mode & 0o777 == 0o750
    assert os.path.samefile(back / " blank ", back / "second name")
    assert os.stat(back / "sparse").st_blocks * 512 < 2 * MB
    assert os.getxattr(back / "plus+", "user.note") == b"\0binary"
    assert os.stat(back / "plus+").st_mode & 0o777 == 0o640
    for name in right:
        assert os.stat(back / name).st_mtime_ns == os.stat(mirror.here / name).st_mtime_ns
    assert mirror.sync("--compare", "md5")["sent"]["files"] == 0


def test_what_compares(mirror: Mirror) -> None:
    """By size, by time, by content; an unchanged file is not read twice, a touched one is not sent."""
    mirror.write("file", b"one")
    mirror.write("big", 13 * MB)
    mirror.sync()
    status = os.stat(mirror.here / "file")
    mirror.write("file", b"two")
    os.utime(mirror.here / "file", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert mirror.sync("--compare", "size")["kept"]["files"] == 2
    assert mirror.sync()["kept"]["files"] == 2  # size and time are as they were
    assert mirror.sync("--compare", "md5")["sent"]["files"] == 1
    assert mirror.stored()["file"] == b"two"
    os.utime(mirror.here / "big")
    touched = mirror.sync()
    assert (touched["sent"]["files"], touched["recorded"]) == (0, 1)
    dry = mirror.run("sync", str(mirror.here), mirror.url, "--dry-run", "--compare", "md5", "--json").json
    assert dry["bytes_read"] == 0
    assert dry["actions"] == []


def test_the_window(mirror: Mirror) -> None:
    """Nothing more is begun; status 75 says what is left, and the next night goes on from the part in hand."""
    for number in range(3):
        mirror.write(f"chunk{number}", 50 * MB)
    result = mirror.run("sync", str(mirror.here), mirror.url, "--for", "3s", "--limit", "12M", "--streams", "2")
    assert result.code == 75, result.err
    assert "left in" in result.err
    assert "more night" in result.err
    assert len(open_uploads(mirror.s3, mirror.bucket)) >= 1
    night = mirror.sync()
    assert night["reused_bytes"] >= 15 * MB
    assert night["reused_bytes"] + night["sent_bytes"] <= 150 * MB
    assert mirror.proxy.sent < 170 * MB
    assert mirror.stored() == tree_contents(mirror.here)
    assert open_uploads(mirror.s3, mirror.bucket) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_is_gone_on_with(mirror: Mirror, number: signal.Signals) -> None:
    mirror.write("chunk", 100 * MB)
    mirror.write("small", 10)
    # (One part at a time: the first one's reply has been noted once the second is in the store. Of several that share
    # the line, all can be there and none be known to be.)
    slowly = ("--limit", "25M", "--streams", "1")
    process = mirror.cli.start("sync", str(mirror.here), mirror.url, *slowly, env=mirror.environment)
    while mirror.parts_there() < 2 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert process.returncode == 130, err
    result = mirror.sync()
    assert result["reused_bytes"] >= 16 * MB
    assert mirror.stored() == tree_contents(mirror.here)
    assert open_uploads(mirror.s3, mirror.bucket) == []


def test_a_file_that_changes_while_it_is_read(mirror: Mirror) -> None:
    """Retried once, then skipped and said; what stood there stays."""
    mirror.write("log", 20 * MB)
    mirror.sync()
    before = mirror.stored()["log"]
    process = mirror.cli.start("sync", str(mirror.here), mirror.url, "--limit", "10M", "--json", env=mirror.environment)
    mirror.write("log", 20 * MB)
    while process.poll() is None:
        with open(mirror.here / "log", "ab") as file:
            file.write(b"x")
        time.sleep(0.02)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert "changed while it was read" in json.loads(out)["skipped"][0]["reason"]
    assert mirror.stored()["log"] == before
    assert mirror.sync()["state"] == "complete"
    assert mirror.stored() == tree_contents(mirror.here)


def test_locks(mirror: Mirror, tmp_path: Path) -> None:
    """The groom's lock, and a second run on the same mirror: status 11, nothing done."""
    mirror.write("a", 10)
    lock = tmp_path / "groom.lock"
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        busy = mirror.run("sync", str(mirror.here), mirror.url, "--lock", str(lock))
        assert (busy.code, "groom.lock is locked" in busy.err) == (11, True)
    assert mirror.sync("--lock", str(lock))["state"] == "complete"
    mirror.write("b", 60 * MB)
    process = mirror.cli.start("sync", str(mirror.here), mirror.url, "--limit", "5M", env=mirror.environment)
    while not open_uploads(mirror.s3, mirror.bucket) and process.poll() is None:
        time.sleep(0.01)
    assert mirror.run("sync", str(mirror.here), mirror.url).code == 11
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert mirror.sync()["state"] == "complete"


def test_starting_over(mirror: Mirror) -> None:
    """The old copy counts until the new one is whole; then it is in the recycler."""
    mirror.write("a", 10)
    mirror.write("chunk", 60 * MB)
    mirror.sync()
    mirror.s3.delete_object(Bucket=mirror.bucket, Key="m/a")
    mirror.s3.put_object(Bucket=mirror.bucket, Key="m/a", Body=b"damaged!!!")
    cut = mirror.run(
        "sync", str(mirror.here), mirror.url, "--anew", "--for", "1s", "--limit", "12M", "--streams", "1", "--json"
    )
    assert cut.code == 75
    assert cut.json["building"]
    assert (mirror.stored()["a"], len(mirror.stored())) == (b"damaged!!!", 2)
    assert mirror.run("verify", mirror.url).code == 1  # still the old one
    done = mirror.sync()
    assert done["switched"]
    assert mirror.run("verify", str(mirror.here), mirror.url).code == 0
    assert mirror.pull() == tree_contents(mirror.here)
    assert len(mirror.stored()) == 2
    result = mirror.sync("--recycle-after", "0s")
    assert result["recycled"]["files"] == 1  # the damaged one is another object than was put there
    assert set(mirror.stored()) == {"a"}
    assert mirror.sync()["kept"]["files"] == 2


def test_pull_goes_on_and_replaces_nothing(mirror: Mirror) -> None:
    mirror.write("chunk", 60 * MB)
    mirror.write("small", 10)
    mirror.write("own", 10)
    mirror.sync()
    process = mirror.cli.start("pull", "-q", mirror.url, "-o", str(mirror.back), env=mirror.environment)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        if any(path.stat().st_size > 9 * MB for path in mirror.back.glob(".chunk*")):
            process.kill()
            break
        time.sleep(0.001)
    process.communicate(timeout=60)
    (mirror.back / "own").unlink(missing_ok=True)
    (mirror.back / "own").write_bytes(b"my own file")
    result = mirror.run("pull", "-q", mirror.url, "-o", str(mirror.back))
    assert result.code == 3
    assert "another file of that name is there" in result.err
    assert tree_contents(mirror.back) == {**tree_contents(mirror.here), "own": b"my own file"}


def test_what_is_damaged_in_the_store_does_not_come_back(mirror: Mirror) -> None:
    """The hash of the content is in the records, whatever the object says of itself."""
    mirror.write("a", b"right")
    mirror.write("b", b"fine")
    mirror.sync()

    # A store that gives other bytes under the same name, size and ETag can't be had: records that say another hash.
    def forge(entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            if entry["key"] == "a":
                entry["blake3"] = "00" * 32

    edited_catalog(mirror, forge)
    result = mirror.run("pull", "-q", mirror.url, "-o", str(mirror.back))
    assert result.code == 3
    assert "a: its BLAKE3 is" in result.err
    assert tree_contents(mirror.back) == {"b": b"fine"}
    assert mirror.run("verify", "--deep", mirror.url).code == 1


def test_a_mirror_on_a_disk(local_cli: Cli, tmp_path: Path) -> None:
    """A directory as MIRROR: the same promises, files under their own names."""
    here, there = tmp_path / "here", tmp_path / "usb" / "mirror"
    (here / "d").mkdir(parents=True)
    (here / "d/chunk").write_bytes(random.Random(1).randbytes(25 * MB))
    (here / "b").write_bytes(b"b")
    environment = {"BACKHAUL_STATE": str(tmp_path / "state")}

    def sync(*more: str) -> Any:
        return local_cli.ok("sync", str(here), str(there), "--json", *more, env=environment).json

    assert sync()["sent"]["files"] == 2
    (here / "d/chunk").rename(here / "moved")
    assert (sync()["renamed"]["files"], sync()["kept"]["files"]) == (1, 2)
    assert (there / "moved").read_bytes() == (here / "moved").read_bytes()
    time.sleep(1.1)
    assert sync("--recycle-after", "1s")["recycled"]["files"] == 1
    assert not (there / "d").exists()
    local_cli.ok("verify", str(here), str(there), env=environment)
    local_cli.ok("pull", "-q", str(there), "-o", str(tmp_path / "back"), env=environment)
    assert tree_contents(tmp_path / "back") == tree_contents(here)
    inside = local_cli("sync", str(here), str(here / "mirror"), env=environment)
    assert (inside.code, "lie in each other" in inside.err) == (2, True)


def test_what_this_host_knew_is_lost_or_damaged(mirror: Mirror, tmp_path: Path) -> None:
    """It is read again from the mirror; nothing is sent again, and deltas still work."""
    old = mirror.write("chunk", 20 * MB)
    mirror.write("small", 10)
    mirror.sync()
    (state,) = (tmp_path / "state" / "mirrors").glob("*.sqlite")
    state.write_bytes(b"garbage" * 1000)
    result = mirror.sync()
    assert result["kept"]["files"] == 2
    assert "was damaged" in result["remarks"][0]
    for path in (tmp_path / "state" / "mirrors").iterdir():
        path.unlink()
    mirror.write("chunk", old + b"appended")
    assert mirror.sync()["composed"]["files"] == 1
    assert mirror.stored() == tree_contents(mirror.here)


def test_a_series_is_no_mirror_and_a_mirror_no_series(mirror: Mirror) -> None:
    mirror.write("a", 10)
    mirror.cli.ok("push", "-q", f"s3://{mirror.bucket}/series", "--", "echo", "x", env=mirror.environment)
    mirror.url = f"s3://{mirror.bucket}/series"
    result = mirror.run("sync", str(mirror.here), mirror.url)
    assert (result.code, "is a series of backups" in result.err) == (2, True)


def test_a_store_that_is_away(mirror: Mirror) -> None:
    """One error, soon, and what was sent until then is kept."""
    mirror.write("a", 10)
    mirror.sync()
    mirror.write("b", 10)
    mirror.proxy.outage(True)
    result = mirror.run("sync", str(mirror.here), mirror.url, "--retry-for", "1s")
    assert result.code == 1
    mirror.proxy.outage(False)
    assert mirror.sync()["sent"]["files"] == 1


def test_a_clock_that_jumped_deletes_nothing(mirror: Mirror, tmp_path: Path) -> None:
    """A host whose clock is years ahead of the store's holds what would be due."""
    mirror.write("a", 10)
    mirror.write("gone", 10)
    mirror.sync()
    os.unlink(mirror.here / "gone")
    mirror.sync()
    script = tmp_path / "ahead.py"
    script.write_text(
        "import datetime as dt, sys\n"
        "from backhaul.operations.mirror.plan import PlanOptions\n"
        "from backhaul.operations.mirror.sync import sync\n"
        "now = dt.datetime.now(dt.UTC) + dt.timedelta(days=400)\n"
        "result = sync(sys.argv[1], sys.argv[2], PlanOptions(recycle_after=86400.0), now=lambda: now)\n"
        "print(result.held.files, result.recycled.files, result.remarks)\n"
    )
    command = [sys.executable, str(script), str(mirror.here), mirror.url]
    environment = {**mirror.cli.environment, **mirror.environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("1 0")
    assert "clock" in done.stdout
    assert set(mirror.stored()) == {"a", "gone"}


def test_an_empty_directory_does_not_start_over(mirror: Mirror) -> None:
    """The guard counts what the copy that counts has: an empty second copy does not take its place."""
    for number in range(20):
        mirror.write(f"f{number}", 10)
    mirror.sync()
    for path in list(mirror.here.iterdir())[:19]:
        path.unlink()
    result = mirror.run("sync", str(mirror.here), mirror.url, "--anew")
    assert (result.code, "19 files are gone here" in result.err) == (1, True)
    for path in list(mirror.here.iterdir()):
        path.unlink()
    assert mirror.run("sync", str(mirror.here), mirror.url, "--anew").code == 1
    assert len(mirror.stored()) == 20
    assert keys(mirror.s3, mirror.bucket, "m/.backhaul/copies") == []


def edited_catalog(mirror: Mirror, edit: Callable[[list[dict[str, Any]]], None]) -> None:
    """Change what the mirror's catalog says, as somebody who can write to the store could."""
    for key in keys(mirror.s3, mirror.bucket, "m/.backhaul/catalog/"):
        data = mirror.s3.get_object(Bucket=mirror.bucket, Key=key)["Body"].read()
        lines = zstandard.ZstdDecompressor().decompressobj().decompress(data).splitlines()
        entries = [json.loads(line) for line in lines]
        edit(entries)
        text = b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)
        mirror.s3.put_object(Bucket=mirror.bucket, Key=key, Body=zstandard.ZstdCompressor().compress(text))


def test_a_pull_does_not_leave_its_directory(mirror: Mirror, tmp_path: Path) -> None:
    """Names and symlinks in forged records lead nowhere."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "shadow").mkdir(mode=0o700)
    mirror.write("file", 10)
    mirror.write("other", 10)
    mirror.sync()

    def forge(entries: list[dict[str, Any]]) -> None:
        entries += [
            {"key": "a", "kind": "symlink", "target": str(outside)},
            {"key": "a/shadow", "kind": "directory", "mode": 0o777},
            {**entries[0], "key": "a/file"},
            {**entries[0], "key": f"../{outside.name}/planted"},
            {**entries[0], "key": "/absolute"},
        ]

    edited_catalog(mirror, forge)
    result = mirror.run("pull", "-q", mirror.url, "-o", str(mirror.back))
    assert result.code == 3, result.err
    assert [path.name for path in outside.iterdir()] == ["shadow"]
    assert os.stat(outside / "shadow").st_mode & 0o777 == 0o700
    assert list((outside / "shadow").iterdir()) == []
    assert (mirror.back / "other").read_bytes() == (mirror.here / "other").read_bytes()


def test_names_of_one_file_come_back_right_or_alone(mirror: Mirror) -> None:
    """A further name is linked to what was brought back, never to what happens to have the first one's name."""
    content = mirror.write("a", 1000)
    os.link(mirror.here / "a", mirror.here / "b")
    assert mirror.sync()["renamed"]["files"] == 1
    mirror.back.mkdir()
    (mirror.back / "a").write_bytes(b"my own")
    assert mirror.run("pull", "-q", mirror.url, "-o", str(mirror.back)).code == 3
    assert (mirror.back / "a").read_bytes() == b"my own"
    assert (mirror.back / "b").read_bytes() == content


def test_a_first_name_that_vanishes_leaves_the_other(mirror: Mirror, tmp_path: Path) -> None:
    """What was to be copied from it is sent by itself; content that the store lost under both names is sent again."""
    mirror.write("a", 9 * MB)
    os.link(mirror.here / "a", mirror.here / "b")
    mirror.sync()
    for name in ("a", "b"):
        mirror.s3.delete_object(Bucket=mirror.bucket, Key=f"m/{name}")
    assert mirror.sync()["state"] == "complete"
    assert mirror.stored() == tree_contents(mirror.here)


def test_a_file_that_becomes_a_directory(mirror: Mirror) -> None:
    mirror.write("name", 10)
    mirror.sync()
    os.unlink(mirror.here / "name")
    mirror.write("name/inside", 20)
    mirror.sync(code=0)
    os.unlink(mirror.here / "name/inside")
    os.rmdir(mirror.here / "name")
    mirror.write("name", 30)
    mirror.sync(code=0)
    assert {name: mirror.stored()[name] for name in tree_contents(mirror.here)} == tree_contents(mirror.here)
    assert mirror.run("verify", str(mirror.here), mirror.url).code == 0


def test_a_catalog_that_can_not_be_read(mirror: Mirror) -> None:
    """What it said is found out again, without sending anything."""
    mirror.write("chunk", 13 * MB)
    mirror.sync()
    (segment,) = keys(mirror.s3, mirror.bucket, "m/.backhaul/catalog/")
    mirror.s3.put_object(Bucket=mirror.bucket, Key=segment, Body=b"garbage")
    result = mirror.sync()
    assert "can't be read" in result["remarks"][0]
    assert (result["state"], result["sent"]["files"], result["recorded"]) == ("complete", 0, 1)
    assert mirror.sync()["remarks"] == []
    assert mirror.pull() == tree_contents(mirror.here)


def test_misuse_is_refused_before_anything_happens(local_cli: Cli, tmp_path: Path) -> None:
    """Arguments the wrong way round, places that hold other things, lost records, words that mean nothing."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    (here / "name").write_bytes(b"newer")
    environment = {"BACKHAUL_STATE": str(tmp_path / "state")}

    def run(*arguments: str) -> Result:
        return local_cli(*arguments, env=environment)

    there.mkdir()
    (there / "name").write_bytes(b"precious")
    (there / "other").write_bytes(b"other")
    refused = run("sync", str(here), str(there))
    assert (refused.code, "1 objects that this mirror did not write" in refused.err) == (1, True)
    assert (there / "name").read_bytes() == b"precious"
    assert run("sync", str(here), str(there), "--overwrite").code == 0
    (here / "name").write_bytes(b"newest")
    around = run("sync", str(there), str(here))
    assert (around.code, "is a mirror itself" in around.err) == (2, True)
    assert (here / "name").read_bytes() == b"newest"
    for sentinel in ("", "/etc/passwd", "../here/name"):
        assert run("sync", str(here), str(there), "--sentinel", sentinel).code == 2
    empty = run("sync", "", str(there))
    assert (empty.code, "DIR is empty" in empty.err) == (2, True)
    assert run("plan", str(here), str(there), "-o", str(here / "plan.json")).code == 2
    assert run("undelete", str(tmp_path / "nothing")).code == 1
    os.rename(there / ".backhaul", tmp_path / "records")
    lost = run("sync", str(here), str(there))
    assert (lost.code, "records of this mirror are gone" in lost.err) == (1, True)
    os.rename(tmp_path / "records", there / ".backhaul")
    assert run("sync", str(here), str(there)).code == 0
    excluded = run("sync", str(here), str(there), "--exclude", "na*", "--json").json
    assert (excluded["excluded"]["files"], excluded["kept"]["files"]) == (1, 0)


def test_a_mirror_that_was_never_complete_says_so(mirror: Mirror) -> None:
    """What came of a first sync that was cut is not taken for all there is."""
    mirror.write("a", 10)
    mirror.write("chunk", 60 * MB)
    cut = mirror.run("sync", str(mirror.here), mirror.url, "--for", "1s", "--limit", "12M", "--streams", "1")
    assert cut.code == 75
    result = mirror.run("pull", "-q", mirror.url, "-o", str(mirror.back))
    assert (result.code, "never complete" in result.err) == (3, True)
    assert mirror.run("verify", mirror.url).code == 1
    mirror.sync()
    assert mirror.run("verify", mirror.url).code == 0


def test_a_series_is_not_pulled_as_a_mirror(local_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "into").mkdir()
    local_cli.ok("push", "-q", str(tmp_path / "series"), "--", "echo", "x")
    result = local_cli("pull", str(tmp_path / "series"), "-o", str(tmp_path / "into"))
    assert (result.code, "it is a directory" in result.err) == (1, True)
    assert list((tmp_path / "into").iterdir()) == []
