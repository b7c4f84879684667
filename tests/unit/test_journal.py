"""The journal of an upload: which frame was to be made how, and what becomes of a record that can't be kept."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from backhaul.formats import age_keys
from backhaul.formats import journal as format_
from backhaul.formats.journal import Header, RungLine, SourceIdentity, encode_line
from backhaul.formats.location import parse_location
from backhaul.formats.part_sizes import PartLayout
from backhaul.model.claim import Claim
from backhaul.operations import kept_key
from backhaul.operations.encryption import fresh_key, recipients_of
from backhaul.operations.journal import UploadJournal, machine

pytestmark = pytest.mark.unit
BACKUP = "20261122T000000Z"
LAYOUT = PartLayout(
    first=8 << 20,
    step=0,
    growing_segments=False,
    largest=8 << 20,
    max_parts=10_000,
    max_object=1 << 40,
    numbered=False,
)


def header(*recipients: str) -> Header:
    return Header(
        version=format_.VERSION,
        machine=machine(),
        series="s3://bucket/x",
        write=parse_location("s3://bucket/x").write,
        backup=BACKUP,
        stream="data",
        codec="zstd",
        setting="auto",
        frame_size=4 << 20,
        layout=LAYOUT,
        source=SourceIdentity(path="/x", device=1, inode=2, size=3, modified=4),
        claim=Claim(run="r", host="here", pid=1, since="2026-11-22T00:00:00Z"),
        recipients=recipients,
    )


def opened(directory: Path, monkeypatch: pytest.MonkeyPatch) -> UploadJournal:
    monkeypatch.setenv("BACKHAUL_STATE", str(directory / "state"))
    return UploadJournal("s3://bucket/x", "/x", "data")


def test_rungs_are_told_by_frame_in_whatever_order_they_were_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = opened(tmp_path, monkeypatch)
    journal.start(header(), None)
    for frame, rung in ((1, 3), (0, 0), (4, 6), (4, 6)):
        journal.chosen(frame, rung)
    journal.close()
    again = opened(tmp_path, monkeypatch)
    assert again.state is not None
    assert list(again.state.rungs) == [1, 4, 0, 0, 7]
    # What the next run makes again is noted already.
    (path,) = (tmp_path / "state" / "uploads").iterdir()
    size = path.stat().st_size
    again.chosen(4, 6)
    assert path.stat().st_size == size
    again.close()


@pytest.mark.parametrize(("frame", "rung"), [(-1, 0), (1 << 40, 0), (0, -1), (0, 255), (1, 1 << 70)])
def test_a_line_that_nobody_has_written_ends_the_journal(frame: int, rung: int) -> None:
    first = encode_line(header()) + encode_line(RungLine(frame=0, rung=2))
    wrong = f'{{"type":"rung","frame":{frame},"rung":{rung}}}\n'.encode()
    state = format_.decode(first + wrong + encode_line(RungLine(frame=1, rung=1)))
    assert state is not None
    assert (list(state.rungs), state.length) == ([3], len(first))


def test_a_rung_that_can_not_be_noted_costs_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frame is made and sealed all the same: so nothing may be sealed under this key by the next run."""
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setattr(kept_key, "SHARED_MEMORY", shared)
    monkeypatch.setattr(kept_key, "_is_memory", lambda path: True)
    recipient = age_keys.new_identity(os.urandom).recipient
    key = fresh_key(recipients_of([recipient]))
    journal = opened(tmp_path, monkeypatch)
    journal.start(header("key"), key)
    journal.chosen(0, 1)
    assert journal.recall_key() is not None

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(os, "write", full)
        journal.chosen(1, 1)
    assert journal.recall_key() is None
    journal.close()
