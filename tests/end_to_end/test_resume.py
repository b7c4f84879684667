"""``push --from FILE``: what was sent is not sent again, and never trusted without being asked for."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from backhaul.testing.data import dump_text, random_bytes
from backhaul.testing.faults import Fault, FaultPlan
from backhaul.transforms.digest import crc64nvme, encode_crc64nvme
from tests.conftest import FILE_SIZE, Files, keys, open_uploads

PART = 8 << 20


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_only_what_is_missing_is_sent(files: Files, s3: Any, number: signal.Signals) -> None:
    said = files.interrupt(number)
    if number == signal.SIGTERM:
        assert "The same command goes on where it was" in said
    (upload,) = open_uploads(s3, files.bucket)
    there = s3.list_parts(Bucket=files.bucket, Key=upload["Key"], UploadId=upload["UploadId"])["Parts"]
    stored = sum({part["PartNumber"]: part["Size"] for part in there}.values())
    sent_before = sum(served.bytes_in for served in files.proxy.requests if served.operation == "UploadPart")
    result = files.push()
    sent_after = (
        sum(served.bytes_in for served in files.proxy.requests if served.operation == "UploadPart") - sent_before
    )
    (destination,) = result["destinations"]
    assert destination["reused"] + destination["sent"] == result["stored_size"]
    assert destination["sent"] == sent_after
    # A part whose acknowledgement was on its way when the process died is sent again: at most those under way.
    assert destination["reused"] >= stored - 12 * PART
    assert destination["reused"] >= 4 * PART
    assert files.pulled() == files.content
    assert open_uploads(s3, files.bucket) == []
    assert sorted(key.rpartition("/")[2] for key in keys(s3, files.bucket)) == ["data.zst", "manifest.json"]
    assert list((files.state / "uploads").iterdir()) == []


def test_the_id_is_that_of_the_first_run(files: Files, s3: Any) -> None:
    files.interrupt()
    (claim,) = keys(s3, files.bucket)
    result = files.push()
    assert claim == f"files/{result['id']}/claim.json"


@pytest.mark.parametrize("change", ["content", "size", "replaced", "setting", "touched"])
def test_a_changed_source_starts_anew(files: Files, s3: Any, change: str) -> None:
    files.interrupt()
    (claim,) = keys(s3, files.bucket)
    content = bytearray(files.content)
    more: tuple[str, ...] = ()
    if change == "content":
        content[20_000_000] ^= 1
        files.file.write_bytes(content)
    elif change == "size":
        content += b"more"
        files.file.write_bytes(content)
    elif change == "replaced":
        other = files.file.with_name("other")
        other.write_bytes(content)
        os.replace(other, files.file)
    elif change == "touched":
        os.utime(files.file)
    else:
        more = ("--compress", "none")
    result = files.push(*more)
    assert result["destinations"][0]["reused"] == 0
    assert result["id"] not in claim
    assert files.pulled() == content
    assert open_uploads(s3, files.bucket) == [], "what the first run left was taken back"
    assert len(keys(s3, files.bucket)) == 2


def test_a_part_that_was_replaced_never_gets_into_the_backup(files: Files, s3: Any) -> None:
    """Somebody wrote other bytes over a part: what is committed is the file all the same."""
    files.interrupt()
    (upload,) = open_uploads(s3, files.bucket)
    where = {"Bucket": files.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
    other = os.urandom(PART)
    s3.upload_part(**where, PartNumber=2, Body=other, ChecksumCRC64NVME=encode_crc64nvme(crc64nvme(other)))
    files.push()
    assert files.pulled() == files.content


def test_an_upload_that_the_store_has_dropped_is_sent_anew(files: Files, s3: Any) -> None:
    files.interrupt()
    (upload,) = open_uploads(s3, files.bucket)
    where = {"Bucket": files.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
    s3.abort_multipart_upload(**where)
    result = files.push()
    assert result["destinations"][0]["reused"] == 0
    assert files.pulled() == files.content


@pytest.mark.parametrize("damage", ["torn", "garbage", "empty", "gone"])
def test_a_journal_that_is_damaged_costs_bytes_and_nothing_else(files: Files, s3: Any, damage: str) -> None:
    files.interrupt()
    (journal,) = (files.state / "uploads").iterdir()
    text = journal.read_bytes()
    if damage == "torn":
        journal.write_bytes(text[:-20])
    elif damage == "garbage":
        journal.write_bytes(b"\xff\x00 not a journal\n" + text)
    elif damage == "empty":
        journal.write_bytes(b"")
    else:
        journal.unlink()
    result = files.push()
    assert files.pulled() == files.content
    reused = result["destinations"][0]["reused"]
    assert reused > 0 if damage == "torn" else reused == 0


def test_a_run_that_fails_before_it_begins_keeps_what_there_is(files: Files) -> None:
    """The store is still away, the key is wrong, another destination is not there: the one after that goes on."""
    files.interrupt()
    arguments = ("push", files.series, "--from", str(files.file))
    files.proxy.outage(True)
    away = files.cli(*arguments, env=files.environment)
    assert away.code == 1, away.err
    files.proxy.outage(False)
    denied = files.cli(*arguments, env={**files.environment, "AWS_ACCESS_KEY_ID": ""})
    assert denied.code == 10, denied.err
    other = files.cli(*arguments, "s3://no-such-bucket-here/x", env=files.environment)
    assert other.code == 10, other.err
    assert files.push()["destinations"][0]["reused"] >= 3 * PART
    assert files.pulled() == files.content


def test_interrupted_again_and_again_with_torn_journals(files: Files) -> None:
    uploads = files.state / "uploads"
    for number in range(3):
        # Killed when the store has acknowledged two parts more: those are what can be gone on with.
        arguments = ("push", files.series, "--from", str(files.file), "--limit", "40M", "--retry-for", "2s")
        process = files.cli.start(*arguments, env=files.environment)
        known = 0
        while known < 2 * (number + 1) and process.poll() is None:
            time.sleep(0.01)
            known = sum(path.read_bytes().count(b'{"type":"part","segment"') for path in uploads.glob("*"))
        process.kill()
        process.communicate(timeout=60)
        (journal,) = uploads.iterdir()
        with open(journal, "ab") as file:
            file.write(b'{"type":"part","segm')
    assert files.push()["destinations"][0]["reused"] >= 5 * PART
    assert files.pulled() == files.content


def test_another_spelling_of_the_same_place(files: Files) -> None:
    files.interrupt()
    files.series = files.series.replace("/files?", "//files/?")
    assert files.push()["destinations"][0]["reused"] >= 3 * PART


def test_the_journal_of_another_host_is_not_ours(files: Files, s3: Any) -> None:
    """Of a copied host: its journal is not this host's, and what it names is left alone."""
    files.interrupt()
    (journal,) = (files.state / "uploads").iterdir()
    machine = json.loads(journal.read_text().splitlines()[0])["machine"]
    journal.write_text(journal.read_text().replace(machine, "another host"))
    before = {upload["UploadId"] for upload in open_uploads(s3, files.bucket)}
    assert files.push()["destinations"][0]["reused"] == 0
    assert {upload["UploadId"] for upload in open_uploads(s3, files.bucket)} == before


def test_two_pushes_of_one_file_at_once(files: Files) -> None:
    arguments = ("push", files.series, "--from", str(files.file), "--limit", "40M")
    first = files.cli.start(*arguments, env=files.environment)
    while files.proxy.count("UploadPart") < 1:
        time.sleep(0.01)
    second = files.cli("push", files.series, "--from", str(files.file), env=files.environment)
    assert second.code == 11
    assert "already" in second.err and "next:" in second.err
    _, err = first.communicate(timeout=60)
    assert first.returncode == 0, err
    assert files.pulled() == files.content


def test_two_destinations_one_of_which_was_done(files: Files, s3: Any, tmp_path: Path) -> None:
    """The disk committed, S3 did not; the next run finishes S3, under the same id, and leaves the disk alone."""
    disk = str(tmp_path / "disk")
    files.proxy.use(
        FaultPlan(stall=Fault(only=lambda r: r.query.get("partNumber") == "6", place=0.1), stall_seconds=600)
    )
    process = files.cli.start("push", files.series, disk, "--from", str(files.file), env=files.environment)
    while not list((tmp_path / "disk").rglob("manifest.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    files.proxy.use(FaultPlan())
    (made,) = (tmp_path / "disk").rglob("data.zst")
    before = made.stat()
    result = files.push(disk)
    assert [d["state"] for d in result["destinations"]] == ["committed", "committed"]
    assert result["destinations"][0]["reused"] > 0
    assert result["id"] == made.parent.name
    assert made.stat() == before
    for series in (files.series, disk):
        assert files.cli.ok("pull", "-q", series).out == files.content
        assert len(files.cli.ok("list", series, "--json").json["backups"]) == 1


def test_a_store_that_is_away_leaves_it_to_be_gone_on_with(files: Files) -> None:
    process = files.cli.start(
        "push",
        files.series,
        "--from",
        str(files.file),
        "--limit",
        "40M",
        "--retry-for",
        "2s",
        "--json",
        env=files.environment,
    )
    while files.proxy.count("UploadPart") < 5:
        time.sleep(0.01)
    files.proxy.outage(True)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"run the same command again" in err
    assert json.loads(out)["error"]
    files.proxy.outage(False)
    assert files.push()["destinations"][0]["reused"] >= 4 * PART
    assert files.pulled() == files.content


def test_a_file_that_changes_while_it_is_read_is_not_committed(files: Files, s3: Any) -> None:
    process = files.cli.start("push", files.series, "--from", str(files.file), "--limit", "40M", env=files.environment)
    while files.proxy.count("UploadPart") < 3:
        time.sleep(0.01)
    with open(files.file, "r+b") as file:
        file.seek(FILE_SIZE - 1)
        file.write(b"x")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"changed while it was read" in err
    assert keys(s3, files.bucket) == []
    assert open_uploads(s3, files.bucket) == []


@pytest.mark.parametrize("size", [0, 1, PART, 2 * PART])
def test_files_of_awkward_sizes(files: Files, size: int) -> None:
    content = b"".join(random_bytes(size)) if size else b""
    files.file.write_bytes(content)
    more = ("--compress", "none") if size % PART == 0 and size else ("--allow-empty",)
    assert files.push(*more)["raw_size"] == size
    assert files.pulled() == content
    assert list((files.state / "uploads").iterdir()) == []


def test_what_can_not_be_read_twice(files: Files, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for what, code in (
        (str(tmp_path / "pipe"), 2),
        (str(tmp_path), 2),
        (str(tmp_path / "none"), 1),
        ("nosuch:///x", 2),
    ):
        result = files.cli("push", files.series, "--from", what, env=files.environment)
        assert result.code == code, what
        assert "next:" in result.err
    result = files.cli("push", files.series, "--from", str(files.file), "--", "cat", env=files.environment)
    assert result.code == 2


def test_no_journal_can_be_written(files: Files, tmp_path: Path) -> None:
    """A disk needs none; a store says what it lacks before anything begins."""
    (tmp_path / "file-in-the-way").touch()
    environment = {"BACKHAUL_STATE": str(tmp_path / "file-in-the-way")}
    files.cli.ok("push", str(tmp_path / "disk"), "--from", str(files.file), env=environment)
    result = files.cli("push", files.series, "--from", str(files.file), env=environment)
    assert result.code == 10
    assert "BACKHAUL_STATE" in result.err


def test_to_a_disk(files: Files, tmp_path: Path) -> None:
    disk = str(tmp_path / "disk")
    content = b"".join(dump_text(30_000_000))
    files.file.write_bytes(content)
    process = files.cli.start("push", disk, "--from", str(files.file), "--limit", "2M", env=files.environment)
    while not list(tmp_path.rglob(".data*.partial")):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    files.cli.ok("push", disk, "--from", str(files.file), env=files.environment)
    assert files.cli.ok("pull", "-q", disk).out == content
    assert list(tmp_path.rglob("*.partial")) == []
    shown = files.cli.ok("show", disk, "--json").json["manifest"]["producers"][0]
    assert (shown["kind"], shown["path"]) == ("file", str(files.file))
