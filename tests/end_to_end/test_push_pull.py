"""The main job, from the outside: processes, a real S3 store, real decoders."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import backhaul
from backhaul.operations import memory
from backhaul.pipeline.supervisor import Supervisor
from backhaul.testing.crashes import MemorySource, MemoryTarget
from backhaul.testing.data import dump_text, random_bytes
from backhaul.testing.servers import tool
from tests.conftest import Cli, keys, open_uploads


@pytest.fixture(scope="module")
def dump() -> bytes:
    return b"".join(dump_text(45_000_001))


def stored(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_one_pass_to_two_stores_and_every_way_back(cli: Cli, s3: Any, bucket: str, tmp_path: Path, dump: bytes) -> None:
    series, local = f"s3://{bucket}/db7/orders", str(tmp_path / "disk" / "orders")
    result = cli.ok("push", series, local, "--json", input=dump).json
    assert result["schema"] == "backhaul.push/1"
    assert result["raw_size"] == len(dump)
    assert [d["state"] for d in result["destinations"]] == ["committed", "committed"]
    backup = result["id"]

    # What lies there, to the letter, and the same bytes in both places.
    assert keys(s3, bucket) == [f"db7/orders/{backup}/data.zst", f"db7/orders/{backup}/manifest.json"]
    files = stored(Path(local))
    assert sorted(files) == [f"{backup}/data.zst", f"{backup}/manifest.json"]
    remote = s3.get_object(Bucket=bucket, Key=f"db7/orders/{backup}/data.zst")["Body"].read()
    assert remote == files[f"{backup}/data.zst"]
    assert open_uploads(s3, bucket) == []

    for place in (series, local):
        listed = cli.ok("list", place, "--json").json
        assert [b["id"] for b in listed["backups"]] == [backup]
        assert listed["backups"][0]["stored_size"] == len(remote)
        shown = cli.ok("show", place, "--json").json["manifest"]
        stream = shown["streams"][0]
        assert (stream["name"], stream["object"]) == ("data", "data.zst")
        assert (stream["raw"]["size"], stream["stored"]["size"]) == (len(dump), len(remote))
        assert stream["seek_table"]["offset"] + stream["seek_table"]["size"] == len(remote)
        assert cli.ok("verify", place, "--json").json["bytes_read"] == 0
        deep = cli.ok("verify", "--deep", place, "--json").json
        assert deep["bytes_read"] == len(remote)
        assert cli.ok("pull", place).out == dump
        assert cli.ok("pull", f"{place}@{backup}", "-o", "out file").out == b""
        assert (tmp_path / "out file").read_bytes() == dump
        assert cli.ok("pull", f"{place}@latest", "--", "sh", "-c", "cat > by-command").code == 0
        assert (tmp_path / "by-command").read_bytes() == dump


def test_decodable_without_backhaul(cli: Cli, bucket: str, dump: bytes) -> None:
    backup = cli.ok("push", f"s3://{bucket}/app", "--json", input=dump).json["id"]
    command = f"{tool('aws')} s3 cp s3://{bucket}/app/{backup}/data.zst - | {tool('zstd')} -d -c"
    done = subprocess.run(["sh", "-c", command], env=cli.environment, capture_output=True, check=True)
    assert done.stdout == dump


@pytest.mark.parametrize("setting", ["auto", "none", "1", "12"])
@pytest.mark.parametrize("size", [1, 4 << 20, (4 << 20) + 1, 30_000_000])
def test_every_setting_and_size_comes_back(cli: Cli, bucket: str, tmp_path: Path, setting: str, size: int) -> None:
    data = (b"".join(dump_text(size // 2)) + b"".join(random_bytes(size)))[:size]
    series = f"s3://{bucket}/{setting}"
    pushed = cli.ok("push", series, str(tmp_path / "s"), "--compress", setting, "--json", input=data).json
    for place in (series, str(tmp_path / "s")):
        assert cli.ok("pull", place).out == data
        cli.ok("verify", "--deep", place)
    name = "data" if setting == "none" else "data.zst"
    content = (tmp_path / "s" / pushed["id"] / name).read_bytes()
    if setting == "none":
        assert content == data
    else:
        assert subprocess.run([tool("zstd"), "-dc"], input=content, capture_output=True, check=True).stdout == data


def test_empty_input_is_refused_unless_meant(cli: Cli, s3: Any, bucket: str, tmp_path: Path) -> None:
    series = f"s3://{bucket}/empty"
    refused = cli("push", series, str(tmp_path / "e"), input=b"")
    assert refused.code == 1
    assert "--allow-empty" in refused.err
    assert keys(s3, bucket) == []
    assert not any((tmp_path / "e").rglob("*"))
    for setting in ("auto", "none"):
        pushed = cli.ok(
            "push", series, str(tmp_path / "e"), "--allow-empty", "--compress", setting, "--json", input=b""
        )
        assert pushed.json["raw_size"] == 0
        assert cli.ok("pull", series).out == b""
        assert cli.ok("pull", str(tmp_path / "e")).out == b""
        cli.ok("verify", "--deep", series)
        time.sleep(1.1)
    framed = next((tmp_path / "e").rglob("data.zst")).read_bytes()
    assert subprocess.run([tool("zstd"), "-dc"], input=framed, capture_output=True, check=True).stdout == b""


def test_when(cli: Cli, tmp_path: Path) -> None:
    series = str(tmp_path / "s")
    ids = []
    for number in range(3):
        ids.append(cli.ok("push", series, "--json", input=b"%d" % number).json["id"])
    assert ids == sorted(set(ids))
    assert [b["id"] for b in cli.ok("list", series, "--json").json["backups"]] == ids
    assert cli.ok("pull", series).out == b"2"
    assert cli.ok("pull", f"{series}@{ids[0]}").out == b"0"
    at = f"{ids[1][:4]}-{ids[1][4:6]}-{ids[1][6:8]}T{ids[1][9:11]}:{ids[1][11:13]}:{ids[1][13:15]}"
    assert cli.ok("pull", f"{series}@{at}").out == b"1"
    early = cli("pull", f"{series}@2001-01-01")
    assert early.code == 1
    assert "it holds 3" in early.err
    assert cli("pull", f"{series}@20010101T000000Z").code == 1


def test_pushes_in_the_same_second_get_ids_of_their_own(cli: Cli, s3: Any, bucket: str, tmp_path: Path) -> None:
    for series in (f"s3://{bucket}/busy", str(tmp_path / "busy")):
        processes = [
            cli.start("push", series, "--json", "--", "sh", "-c", f"echo backup number {number}") for number in range(4)
        ]
        ids = []
        for process in processes:
            out, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
            ids.append(json.loads(out)["id"])
        assert len(set(ids)) == 4
        contents = {cli.ok("pull", f"{series}@{backup}").out for backup in ids}
        assert contents == {b"backup number %d\n" % number for number in range(4)}
    assert not any(key.endswith("claim.json") for key in keys(s3, bucket))


def test_odd_paths(cli: Cli, bucket: str, tmp_path: Path) -> None:
    for series in (f"s3://{bucket}/Kunden & Aufträge/größe 1+1", str(tmp_path / "ein Verzeichnis" / "größe 1+1")):
        cli.ok("push", series, input=b"data")
        assert cli.ok("pull", series).out == b"data"
        assert "größe 1+1" in cli.ok("show", series).out.decode()
        assert cli.ok("verify", "--deep", series).code == 0
        assert cli.ok("clean", series, "--older-than", "0s").code == 0
        assert cli.ok("pull", series).out == b"data"


def test_names_and_streams(cli: Cli, tmp_path: Path) -> None:
    series = str(tmp_path / "s")
    backup = cli.ok("push", series, "--name", "orders.dump", "--json", input=b"x").json["id"]
    assert (tmp_path / "s" / backup / "orders.dump.zst").exists()
    assert cli.ok("pull", series, "--stream", "orders.dump").out == b"x"
    wrong = cli("pull", series, "--stream", "data")
    assert wrong.code == 1
    assert "orders.dump" in wrong.err
    for name in ("a/b", "manifest.json", ".x"):
        assert cli("push", series, "--name", name, input=b"x").code == 2


def test_expected_markers(cli: Cli, tmp_path: Path) -> None:
    series = str(tmp_path / "s")
    text = b"x" * 9_000_000 + b"-- Dump completed on 2026-11-21\n"
    refused = cli("push", series, "--expect", "Dump completed", "--expect", "all done", input=text)
    assert refused.code == 1
    assert "'all done'" in refused.err
    assert "'Dump completed'" not in refused.err
    assert not any(p.is_file() for p in tmp_path.rglob("*"))
    # The marker may lie across two blocks, but not before the last 4 KiB.
    across = b"y" * ((4 << 20) - 5) + b"Dump completed" + b"\n" * 4000
    cli.ok("push", series, "--expect", "Dump completed", input=across)
    assert cli.ok("show", series, "--json").json["manifest"]["producers"][0]["markers"] == ["Dump completed"]
    assert cli("push", series, "--expect", "Dump completed", input=b"Dump completed" + b"\n" * 4096).code == 1


def test_limit_counts_every_destination(cli: Cli, tmp_path: Path) -> None:
    # 3 MB to two destinations at 4 MB/s is 1.5 s of waiting: a lower bound that noise can only raise.
    data = b"".join(random_bytes(3_000_000))
    start = time.monotonic()
    cli.ok("push", str(tmp_path / "a"), str(tmp_path / "b"), "--limit", "4M", input=data)
    assert time.monotonic() - start > 1.3


def test_limited_push_to_s3(cli: Cli, bucket: str) -> None:
    data = b"".join(random_bytes(12_000_000))
    start = time.monotonic()
    cli.ok("push", f"s3://{bucket}/slow", "--limit", "10M", input=data)
    assert time.monotonic() - start > 1.0
    assert cli.ok("pull", f"s3://{bucket}/slow").out == data


def test_pull_to_places_that_are_no_regular_files(cli: Cli, tmp_path: Path) -> None:
    series = str(tmp_path / "s")
    cli.ok("push", series, input=b"data")
    assert cli.ok("pull", series, "-o", "/dev/null").code == 0
    assert cli.ok("pull", series, "-o", "-").out == b"data"
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "old").chmod(0o640)
    (tmp_path / "link").symlink_to("old")
    cli.ok("pull", series, "-o", "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "old").read_bytes() == b"data"
    assert (tmp_path / "old").stat().st_mode & 0o777 == 0o640
    cli.ok("pull", series, "-o", "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600, "a dump is private"
    assert cli("pull", series, "-o", str(tmp_path)).code == 1


def test_json_of_a_pull_goes_to_stderr(cli: Cli, tmp_path: Path) -> None:
    cli.ok("push", str(tmp_path / "s"), input=b"data")
    done = cli.ok("pull", str(tmp_path / "s"), "--json")
    assert done.out == b"data"
    document = json.loads(done.err)
    assert document["schema"] == "backhaul.pull/1"
    failed = cli("pull", str(tmp_path / "none"), "--json")
    assert json.loads(failed.err)["exit_code"] == failed.code == 1


def test_the_command_gets_its_status_and_words_back(cli: Cli, tmp_path: Path) -> None:
    cli.ok("push", str(tmp_path / "s"), input=b"data")
    failed = cli("pull", str(tmp_path / "s"), "--", "sh", "-c", "cat >/dev/null; echo 6 7 | tr 67 xy >&2; exit 7")
    assert failed.code == 1
    assert "status 7" in failed.err
    assert failed.err.count("x y") == 2, "as it happened, and in the error"
    missing = cli("pull", str(tmp_path / "s"), "--", "no-such-restore")
    assert missing.code == 1
    assert "no-such-restore" in missing.err


def test_the_python_api(s3_environment: None, bucket: str, tmp_path: Path, dump: bytes) -> None:
    path = tmp_path / "dump"
    path.write_bytes(dump)
    for series in (f"s3://{bucket}/api", str(tmp_path / "series")):
        result = backhaul.push(series, backhaul.CommandSource(["cat", str(path)]))
        assert result.complete
        assert [b.id for b in backhaul.list(series).backups] == [result.id]
        assert backhaul.show(series).manifest.streams[0].raw.size == len(dump)
        assert backhaul.verify(series, deep=True).ok
        assert backhaul.clean(series, older_than=0).removed == ()
        backhaul.pull(series, backhaul.FileTarget(str(tmp_path / "back")))
        assert (tmp_path / "back").read_bytes() == dump


@pytest.mark.parametrize("setting", ["auto", "none"])
def test_open_reads_only_what_it_needs(
    s3_environment: None, bucket: str, tmp_path: Path, dump: bytes, setting: str
) -> None:
    path = tmp_path / "dump"
    path.write_bytes(dump)
    for series in (f"s3://{bucket}/open-{setting}", str(tmp_path / "series")):
        backhaul.push(series, backhaul.CommandSource(["cat", str(path)]), backhaul.PushOptions(compress=setting))
        fetched: list[int] = []
        with backhaul.open(f"{series}@latest") as file:
            raw: Any = file.raw
            fetch = raw._stream.fetch
            raw._stream.fetch = lambda offset, out, f=fetch, seen=fetched: (seen.append(len(out)), f(offset, out))
            assert file.seek(0, 2) == len(dump)
            assert file.read() == b""
            assert fetched == []
            for offset in (0, 1, (4 << 20) - 3, (4 << 20), 17_000_000, len(dump) - 10):
                file.seek(offset)
                assert file.read(50) == dump[offset : offset + 50], offset
            assert sum(fetched) < len(dump) * 0.8
            file.seek(-100, 2)
            assert file.read() == dump[-100:]
            file.seek(0)
            assert file.read() == dump
            with pytest.raises(ValueError, match="-1"):
                file.seek(-1)
        with pytest.raises(ValueError, match="closed"):
            file.read(1)


def test_pull_asks_for_whole_frames_in_few_requests(cli: Cli, bucket: str, dump: bytes) -> None:
    cli.cold = True  # its memory is measured
    cli.ok("push", f"s3://{bucket}/count", input=dump)
    done = cli.ok("pull", f"s3://{bucket}/count", "--json")
    document = json.loads(done.err)
    # 11 frames of 4 MiB, of which 9 MiB hold nine: the first range is an eighth of that, and each after it twice as long.
    assert document["requests"] == 4
    assert document["rereads"] == 0
    assert document["peak_memory"] <= document["memory"]["total"]


def test_a_short_stream_makes_no_more_readers_than_there_is_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread costs time, and one that reads has a connection."""
    made: list[str] = []
    start = Supervisor.start

    def counted(self: Supervisor, work: Callable[[], None], name: str) -> threading.Thread:
        made.append(name)
        return start(self, work, name)

    monkeypatch.setattr(Supervisor, "start", counted)
    cores = len(os.sched_getaffinity(0))
    # Zeros are a range of next to nothing, whose pieces are 9 MiB; noise is as long as it is.
    cases = ((bytes(1), 1, 1), (bytes(9_000_000), 1, 1), (bytes(30_000_000), 1, 4), (os.urandom(8_000_000), 2, 2))
    for content, readers, decoders in cases:
        size = len(content)
        series = str(tmp_path / str(size))
        backhaul.push(series, MemorySource(content))
        made.clear()
        target = MemoryTarget()
        backhaul.pull(series, target)
        assert target.content == content
        assert len([name for name in made if re.fullmatch(r"fetch-\d+", name)]) == min(readers, 2 * cores)
        assert len([name for name in made if re.fullmatch(r"decode-\d+", name)]) == min(decoders, cores)


@pytest.mark.first
@pytest.mark.timeout(600)
def test_more_than_four_gigabytes_through_a_pipe_stay_within_the_formula(cli: Cli, bucket: str, tmp_path: Path) -> None:
    """Real text, far more than memory would hold if anything kept it; peak as the kernel counted it."""
    cli.cold = True  # its memory is measured
    block = tmp_path / "block"
    block.write_bytes(b"".join(dump_text(64_000_000)))
    repeats = 68
    with subprocess.Popen(
        ["sh", "-c", f"i=0; while [ $i -lt {repeats} ]; do cat '{block}'; i=$((i+1)); done"], stdout=subprocess.PIPE
    ) as producer:
        process = cli.start("push", f"s3://{bucket}/big", "--json", stdin=producer.stdout)
        assert producer.stdout is not None
        producer.stdout.close()
        out, err = process.communicate(timeout=550)
    assert process.returncode == 0, err
    result = json.loads(out)
    assert result["raw_size"] == repeats * 64_000_000 > 1 << 32
    assert sum(result["memory"]["terms"].values()) == result["memory"]["total"]
    assert result["peak_memory"] <= result["memory"]["total"]
    if memory.default_workers() <= 2:
        assert result["memory"]["total"] <= 400 << 20
    # And back: the same bytes, in as little memory.
    pull = cli.start("pull", f"s3://{bucket}/big", "--json", "--", "sh", "-c", "wc -c >&2")
    _, err = pull.communicate(timeout=550)
    assert pull.returncode == 0, err
    text = err.decode()
    document = json.loads(text[text.index("{") :])
    assert str(repeats * 64_000_000) in text[: text.index("{")]
    assert document["peak_memory"] <= document["memory"]["total"]


def test_progress_lines_where_there_is_no_terminal(cli: Cli, tmp_path: Path) -> None:
    patched = (
        "import backhaul.cli.progress as p; p.LINE_EVERY = 0.3\n"
        "from backhaul.cli.main import main; main(['push', 's', '--', 'sh', '-c', 'echo x; sleep 1; echo y'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", patched],
        cwd=tmp_path,
        env=cli.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("backhaul: ")]
    # However long the run took on a busy host: each line came its interval after the one before.
    times = [float(re.search(r" in ([\d.]+) s; ", line)[1]) for line in lines]  # type: ignore[index]
    assert len(times) >= 2
    assert all(after - before > 0.15 for before, after in itertools.pairwise(times))  # (of 0.3, in tenths)
    assert re.search(r"\d+ B in, .* ratio .*; s: sending", lines[-1])
    assert "\x1b" not in done.stderr


def test_bars_on_a_terminal_and_no_color(cli: Cli, tmp_path: Path) -> None:
    def on_terminal(environment: dict[str, str]) -> str:
        command = f"'{sys.executable}' -m backhaul push one two -- sh -c 'head -c 9000000 /dev/urandom; sleep 1'"
        return subprocess.run(
            ["script", "-qec", command, "/dev/null"],
            cwd=tmp_path,
            env={**cli.environment, "TERM": "xterm-256color", "COLUMNS": "140", **environment},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    colored = on_terminal({})
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", colored)
    assert re.search(r"in 9\.00 MB at .*/s, ratio 1\.00, ", plain)
    assert re.search(r"two +out 9\.0\d MB at .*/s committed", plain)
    assert re.search(r"\x1b\[[0-9;]*3\dm", colored)
    time.sleep(1.1)
    assert not re.search(r"\x1b\[[0-9;]*3\dm", on_terminal({"NO_COLOR": "1"}))
