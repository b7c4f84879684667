"""What a pull fetches, decodes and keeps: damage on the way is fetched again, and memory is what was promised."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import backhaul
from backhaul.errors import IntegrityError
from backhaul.operations import memory
from backhaul.operations.progress import PullProgress
from backhaul.operations.reading import RangeDecoder, StoredStream
from backhaul.operations.restore import RestoreOptions, RestoreRun
from backhaul.pipeline.buffers import BufferPool
from backhaul.pipeline.supervisor import Supervisor
from backhaul.planning.read_ranges import ReadRange
from backhaul.targets.sections import Phase, Step
from backhaul.testing.crashes import MemorySource, MemoryTarget
from backhaul.testing.data import random_bytes
from backhaul.transforms.compress import FRAME_SIZE
from tests.conftest import Cli
from tests.end_to_end.test_encryption import Key

FRAMES = 10
# A quarter of each frame does not compress, so that it takes a megabyte: the third range has four frames, two pieces.
CONTENT = b"".join(
    piece + bytes(FRAME_SIZE - len(piece))
    for piece in (b"".join(random_bytes(1 << 20, seed)) for seed in range(FRAMES))
)


@pytest.fixture
def key(local_cli: Cli, tmp_path: Path) -> Key:
    return Key(local_cli, tmp_path / "key")


def third_range(stream: StoredStream) -> list[ReadRange]:
    """Return the pieces of the third range."""
    part = list(stream.ranges(memory.RANGE_STORED))[2]
    pieces = list(stream.pieces(part, memory.PIECE_RAW))
    assert [piece.frames for piece in pieces] == [2, 2]
    return pieces


def in_the_last_piece(stream: StoredStream) -> int:
    """Return a place in the object that belongs to the second piece of a range, and to no other."""
    piece = third_range(stream)[1]
    return stream.span(piece.offset + piece.length // 2, 1)[0] + 99


def where_two_pieces_meet(stream: StoredStream) -> int:
    """Return a place in the object in the chunk that two pieces share, if it is encrypted; else the second's first."""
    return stream.span(third_range(stream)[1].offset, 1)[0]


class Line:
    """A way from the store on which a byte is harmed, ``times`` times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, place: Callable[[StoredStream], int], times: int) -> None:
        self.harmed = 0
        fetch = StoredStream.fetch
        lock = threading.Lock()

        def harming(stream: StoredStream, offset: int, out: memoryview) -> None:
            fetch(stream, offset, out)
            if not hasattr(stream, "table"):
                return  # it is being opened
            at = place(stream) - offset
            with lock:
                if self.harmed < times and 0 <= at < len(out):
                    self.harmed += 1
                    out[at] ^= 1

        monkeypatch.setattr(StoredStream, "fetch", harming)


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("place", [in_the_last_piece, where_two_pieces_meet])
def test_what_the_way_harmed_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: Key, place: Callable[[StoredStream], int], encrypted: bool
) -> None:
    series = str(tmp_path / "s")
    pushed = backhaul.push(
        series, MemorySource(CONTENT), backhaul.PushOptions(encrypt_to=(key.recipient,) if encrypted else ())
    )
    identities = (key.identity,) if encrypted else ()
    with monkeypatch.context() as patch:
        line = Line(patch, place, 1)
        target = MemoryTarget()
        pulled = backhaul.pull(series, target, backhaul.PullOptions(identities=identities))
        assert line.harmed == 1
        assert target.content == CONTENT
        # (The chunk that two pieces share may have been seen by both.)
        most = 2 if encrypted and place is where_two_pieces_meet else 1
        assert 1 <= pulled.rereads <= most
    with monkeypatch.context() as patch:
        line = Line(patch, place, 1)
        verified = backhaul.verify(series, deep=True, identities=identities)
        assert line.harmed == 1
        assert verified.ok
        # What was fetched again is what was hashed: nothing had to be read through once more.
        assert verified.bytes_read < 1.2 * pushed.stored_size


def test_what_is_harmed_each_time_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series = str(tmp_path / "s")
    backhaul.push(series, MemorySource(CONTENT))
    line = Line(monkeypatch, in_the_last_piece, 1000)
    target = MemoryTarget()
    with pytest.raises(IntegrityError, match="is not what was pushed") as caught:
        backhaul.pull(series, target)
    assert "frame 6" in caught.value.why
    assert line.harmed == 3
    assert target.content is None


@pytest.mark.parametrize("encrypted", [False, True])
def test_what_neighbours_share_is_given_no_bytes_that_were_not_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: Key, encrypted: bool
) -> None:
    """Whoever holds the store harms a piece, to have it fetched again while another thread opens its neighbour."""
    seen: list[bool] = []
    decode = StoredStream.decode

    def watched(
        stream: StoredStream, part: ReadRange, stored: memoryview, out: memoryview, decoder: RangeDecoder
    ) -> None:
        before = bytes(stored)
        try:
            decode(stream, part, stored, out, decoder)
        except IntegrityError:
            seen.append(bytes(stored) == before)
            raise

    series = str(tmp_path / "s")
    backhaul.push(series, MemorySource(CONTENT), backhaul.PushOptions(encrypt_to=(key.recipient,) if encrypted else ()))
    monkeypatch.setattr(StoredStream, "decode", watched)
    harmed = itertools.count()

    def place(stream: StoredStream) -> int:
        return in_the_last_piece(stream) + next(harmed)  # another byte each time

    Line(monkeypatch, place, 1000)
    with pytest.raises(IntegrityError, match="is not what was pushed"):
        backhaul.pull(series, MemoryTarget(), backhaul.PullOptions(identities=(key.identity,) if encrypted else ()))
    assert seen == [True]


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("compress", ["auto", "none"])
@pytest.mark.parametrize(
    "limits", [(9 << 20, 9 << 20), (9 << 20, 1 << 20), (1 << 20, 9 << 20)]
)  # also less than a frame
@pytest.mark.parametrize("content", ["quarter", "zeros", "noise"])
def test_memory_is_within_its_terms(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    key: Key,
    encrypted: bool,
    compress: str,
    limits: tuple[int, int],
    content: str,
) -> None:
    """All that a pull has in hand, against what it says it may have."""
    data = {"quarter": CONTENT, "zeros": bytes(40_000_000), "noise": b"".join(random_bytes(40_000_000))}[content]
    series = str(tmp_path / "s")
    recipients = (key.recipient,) if encrypted else ()
    backhaul.push(series, MemorySource(data), backhaul.PushOptions(compress=compress, encrypt_to=recipients))
    pools: list[int] = []
    opened: dict[int, int] = {}
    make, open_ = BufferPool.__init__, RangeDecoder.opened

    def making(pool: BufferPool, group: Supervisor, count: int, size: int) -> None:
        pools.append(count * size)
        make(pool, group, count, size)

    def opening(decoder: RangeDecoder, size: int) -> memoryview:
        opened[id(decoder)] = max(size, opened.get(id(decoder), 0))
        return open_(decoder, size)

    monkeypatch.setattr(BufferPool, "__init__", making)
    monkeypatch.setattr(RangeDecoder, "opened", opening)
    monkeypatch.setattr(memory, "RANGE_STORED", limits[0])
    monkeypatch.setattr(memory, "PIECE_RAW", limits[1])
    target = MemoryTarget()
    identities = (key.identity,) if encrypted else ()
    pulled = backhaul.pull(series, target, backhaul.PullOptions(workers=3, identities=identities))
    assert target.content == data
    terms = pulled.memory.terms
    assert len(pools) == (1 if compress == "none" and not encrypted else 2)
    assert pools[0] <= terms["fetched ranges"]
    assert sum(pools[1:]) <= terms["decoded pieces"]
    assert sum(opened.values()) <= terms.get("opened pieces", 0)


@pytest.mark.parametrize("steps", [1, 3, 7, 8, 20])
def test_a_restores_bound_is_that_of_the_phases_that_it_ran(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Fewer streams than lanes have more threads each, and rounded up they can be more than with all lanes."""
    ran: list[int] = []
    monkeypatch.setattr(RestoreRun, "_run_step", lambda run, step, record, group, workers: ran.append(workers))
    monkeypatch.setattr(memory, "default_workers", lambda: 8)
    run = RestoreRun(None, None, None, RestoreOptions(), PullProgress())  # type: ignore[arg-type]
    step = Step("stream", lambda: MemoryTarget())  # noqa: PLW0108 - a new one each time
    run._run_phase(Phase("rows", (step,) * steps), {"stream": None})  # type: ignore[dict-item]
    assert len(ran) == steps
    most = min(8, steps) * memory.pull_window(max(ran)) * memory.RANGE_STORED
    assert run._memory(None).terms["fetched ranges"] >= most
