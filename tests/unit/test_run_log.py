"""The log of a run: every line kept as it came, whatever the pieces, within its bounds."""

from __future__ import annotations

import datetime as dt
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backhaul.formats.redaction import redact_text
from backhaul.jobs.log import ERROR, OUTPUT, LogReader, RunLog

pytestmark = pytest.mark.unit

NOW = dt.datetime(2026, 11, 21, 22, 0, 1, 123000, tzinfo=dt.timezone(dt.timedelta(hours=1)))
STAMP = "2026-11-21T22:00:01.123+01:00 O "


def log_of(path: Path | None, size: int = 1 << 20, secrets: tuple[str, ...] = ()) -> RunLog:
    return RunLog(path, size, secrets=secrets, now=lambda: NOW)


def kept(path: Path) -> list[bytes]:
    return [line.split(b" ", 2)[2] for line in path.read_bytes().split(b"\n")[:-1]]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=40).map(lambda each: each.replace(b"\r", b"")), max_size=8), st.integers(1, 30))
def test_lines_are_the_same_whatever_the_pieces(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], piece: int
) -> None:
    data = b"\n".join(lines)
    path = tmp_path_factory.mktemp("log") / "log"
    log = log_of(path)
    for at in range(0, len(data), piece):
        log.write(OUTPUT, data[at : at + piece])
    log.close()
    expected = data.split(b"\n")
    if not expected[-1]:
        expected.pop()
    # What looks like a secret is masked; nothing else is touched.
    plain = [
        line
        for line in expected
        if redact_text(line.decode(errors="surrogateescape")).encode(errors="surrogateescape") == line
    ]
    found = kept(path)
    assert len(found) == len(expected) == log.lines
    assert [line for line in found if line in plain] == [line for line in plain if line in found]


def test_a_line_and_its_stamp(tmp_path: Path) -> None:
    log = log_of(tmp_path / "log")
    log.write(OUTPUT, b"one\ntw")
    log.write(ERROR, b"err\r\n")
    log.write(OUTPUT, b"o\r10%\r20%\rlast")
    log.say("what Backhaul says")
    log.close()
    assert (tmp_path / "log").read_text().splitlines() == [
        STAMP + "one",
        STAMP.replace(" O ", " E ") + "err",
        STAMP + "two",
        STAMP + "10%",
        STAMP + "20%",
        STAMP.replace(" O ", " B ") + "what Backhaul says",
        STAMP + "last",
    ]
    assert log.last_words == "err"


@pytest.mark.parametrize("chunk", [100, 4096, 1 << 16])
def test_the_beginning_and_the_end_are_kept(tmp_path: Path, chunk: int) -> None:
    path = tmp_path / "log"
    log = log_of(path, size=200_000)
    data = b"".join(b"line %07d\n" % number for number in range(100_000))
    for at in range(0, len(data), chunk):
        log.write(OUTPUT, data[at : at + chunk])
    # A run that is killed here leaves pieces: they are read as one.
    pieces = b"".join(LogReader(path).new())
    log.close()
    for content in (pieces, path.read_bytes()):
        assert content.startswith(STAMP.encode() + b"line 0000000\n")
        assert content.endswith(b"line 0099999\n")
        assert all(re.fullmatch(rb"\S+ [OB] .*", line) for line in content.split(b"\n")[:-1])
    assert path.stat().st_size <= 200_200
    assert log.cut
    assert log.lines == 100_000
    assert [each.name for each in tmp_path.iterdir()] == ["log"]
    numbers = [int(found) for found in re.findall(rb"line (\d+)", path.read_bytes())]
    assert numbers == sorted(set(numbers))
    (note,) = re.findall(r"(\d+) bytes were left out here", path.read_text())
    gone = 100_000 - len(numbers)
    assert int(note) == gone * (len(STAMP) + len("line 0000000\n"))


def test_a_log_that_grows_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = log_of(path, size=40_000)
    reader = LogReader(path)
    seen = b""
    for number in range(600):
        log.write(OUTPUT, b"line %07d\n" % number)
        seen += b"".join(reader.new())
    log.close()
    seen += b"".join(reader.new())
    assert [int(found) for found in re.findall(rb"line (\d+)", seen)] == list(range(600))


def test_known_secrets_are_masked_line_by_line(tmp_path: Path) -> None:
    key = "-----BEGIN KEY-----\nabcdefghijkl\nmnopqrstuvwx\n-----END KEY-----"
    log = log_of(tmp_path / "log", secrets=("hunter2-hunter2", key, "abc"))
    log.write(ERROR, b"the password is hunter2-hunter2, and\nabcdefghijkl\nmnopqrstuvwx\nabc stays\n")
    log.close()
    text = (tmp_path / "log").read_text()
    assert "hunter2" not in text
    assert "abcdefgh" not in text
    assert "mnopqrst" not in text
    assert "abc stays" in text
    assert "hunter2" not in log.masked("failed: hunter2-hunter2")


def test_last_words_move_no_cursor() -> None:
    log = log_of(None)
    log.write(ERROR, b"\x1b[31mred\x1b[0m \x1b]0;title\x07and \x08plain\n")
    assert log.last_words == "red and plain"


def test_a_disk_that_takes_nothing_ends_the_log_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    log = log_of(tmp_path / "file" / "log")
    log.write(OUTPUT, b"one\n")
    log.close()
    assert "can't be kept" in log.problem
    assert log.lines == 1
    assert log.last_words == "one"
