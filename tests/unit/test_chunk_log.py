"""The log of chunks: every reader finds what it has not passed, within the memory and the disk that it may use."""

from __future__ import annotations

import random
import tempfile
import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backhaul.pipeline.chunk_log import ChunkGoneError, ChunkLog, LogClosedError, Reader
from backhaul.pipeline.recycler import Recycler
from backhaul.pipeline.spool import SpoolSpace

pytestmark = pytest.mark.unit

MEMORY = 600_000
LARGEST = 300_000
PATIENCE = 60.0


class NoRoomError(Exception):
    """The writer would wait."""


def refuse() -> None:
    raise NoRoomError


def chunk_of(number: int, size: int) -> bytearray:
    return bytearray(number.to_bytes(4, "big") * (size // 4))


class World:
    """A log, and what must be in it."""

    def __init__(self, spool: int, *, keep_all: bool) -> None:
        self.spool = spool
        self.keep_all = keep_all
        self.space = SpoolSpace(tempfile.gettempdir(), spool) if spool else None
        self.recycler = Recycler(1 << 20)
        self.log = ChunkLog(MEMORY, space=self.space, keep_all=keep_all, recycler=self.recycler)
        self.sizes: list[int] = []
        self.readers: list[Reader] = []
        # What readers have in hand, and what it must go on being.
        self.held: list[tuple[memoryview, int]] = []

    @property
    def lowest(self) -> int:
        return min((reader.position for reader in self.readers), default=len(self.sizes))

    def append(self, size: int) -> None:
        number = len(self.sizes)
        chunk = self.recycler.take(size // 4 * 4)
        chunk[:] = chunk_of(number, size)
        unpassed = sum(self.sizes[self.lowest :])
        try:
            self.log.append(chunk, check=refuse)
        except NoRoomError:
            # It waits for somebody, with memory full, and the spool too but for a file that is passed in part.
            assert self.lowest < number
            slack = LARGEST + (self.space.file_size + LARGEST if self.space is not None else 0)
            assert unpassed + len(chunk) > MEMORY + self.spool - slack
            assert self.log.end == number
            return
        self.sizes.append(len(chunk))

    def check(self) -> None:
        log, end = self.log, len(self.sizes)
        assert log.end == end
        assert log.start <= self.lowest
        kept = sum(self.sizes[log.start :])
        assert kept <= MEMORY + self.spool + LARGEST
        assert log.spooled <= self.spool
        # Nobody is told less than there is: a little of what was passed is always there.
        if not self.readers and not self.spool:
            assert kept + LARGEST >= min(MEMORY, sum(self.sizes))
        for number in {log.start, self.lowest, end - 1, (log.start + end) // 2}:
            if log.start <= number < end:
                assert log.get(number) == chunk_of(number, self.sizes[number])
        if log.start > 0:
            with pytest.raises(ChunkGoneError):
                log.get(log.start - 1)
            with pytest.raises(ChunkGoneError):
                log.reader("late", log.start - 1)
        for view, number in self.held:
            assert view == chunk_of(number, self.sizes[number])

    def read(self, which: int, count: int, *, hold: bool) -> None:
        if not self.readers:
            return
        reader = self.readers[which % len(self.readers)]
        for number in range(reader.position, min(reader.position + count, len(self.sizes))):
            got = self.log.get(number)
            assert got == chunk_of(number, self.sizes[number])
            if hold:
                self.held.append((memoryview(got), number))
            reader.advance(number + 1)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(4, LARGEST), st.just(0)),
        st.tuples(st.just("append"), st.integers(LARGEST // 2, LARGEST), st.just(0)),
        st.tuples(st.just("read"), st.integers(0, 3), st.integers(1, 9)),
        st.tuples(st.just("hold"), st.integers(0, 3), st.integers(1, 3)),
        st.tuples(st.just("come"), st.integers(0, 100), st.just(0)),
        st.tuples(st.just("leave"), st.integers(0, 3), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=150)
@given(steps, st.sampled_from([0, 1_500_000, 4_000_000]), st.booleans())
def test_nothing_is_lost_and_nothing_waits_without_need(
    todo: list[tuple[str, int, int]], spool: int, keep_all: bool
) -> None:
    world = World(spool, keep_all=keep_all and bool(spool))
    world.readers.append(world.log.reader("first", 0))
    for what, one, two in todo:
        if what == "append":
            world.append(one)
        elif what in {"read", "hold"}:
            world.read(one, two, hold=what == "hold")
        elif what == "come":
            place = world.log.start + one * (len(world.sizes) - world.log.start) // 100
            world.readers.append(world.log.reader(f"reader-{len(world.readers)}", place))
        elif world.readers:
            world.readers.pop(one % len(world.readers)).close()
        world.check()
    world.log.close()
    if world.space is not None:
        assert world.space.reserve(spool)  # all of it was given back


@pytest.mark.parametrize(("spool", "keep_all"), [(0, False), (8_000_000, False), (8_000_000, True)])
def test_readers_of_every_speed_read_the_same(spool: int, keep_all: bool) -> None:
    count, chaos = 400, random.Random(7)
    recycler = Recycler(2 << 20)
    space = SpoolSpace(tempfile.gettempdir(), spool) if spool else None
    log = ChunkLog(MEMORY, space=space, keep_all=keep_all, opened_ahead=200_000, recycler=recycler)
    failures: list[str] = []

    def read(reader: Reader, pause: float) -> None:
        for number in range(count):
            while not log.wait(number, 1.0):
                pass
            if reader.name == "opener":
                opened = log.take_opened(number)
                if opened is not None and bytes(opened) != b"opened %d" % number:
                    failures.append(f"opened {number}")
            chunk = log.get(number)
            if number % 40 == 0:
                time.sleep(pause)
            if bytes(chunk[:4]) != number.to_bytes(4, "big") or len(set(memoryview(chunk).cast("I"))) != 1:
                failures.append(f"{reader.name}: {number}")
            del chunk
            reader.advance(number + 1)

    threads = []
    for name, pause in (("opener", 0.0), ("quick", 0.0), ("slow", 0.02)):
        threads.append(threading.Thread(target=read, args=(log.reader(name, 0), pause)))
        threads[-1].start()
    for number in range(count):
        size = chaos.randrange(4, 60_000) // 4 * 4
        chunk = recycler.take(size)
        chunk[:] = chunk_of(number, size)
        log.append(chunk, memoryview(b"opened %d" % number))
        del chunk
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert failures == []
    log.close()


def test_it_says_who_holds_up_the_writer() -> None:
    log = ChunkLog(MEMORY)
    quick, slow = log.reader("quick", 0), log.reader("slow", 0)
    for number in range(2):
        log.append(chunk_of(number, LARGEST))
    quick.advance(2)
    assert log.blocked == (0.0, ())
    seen: list[tuple[str, ...]] = []

    def look() -> None:
        held, names = log.blocked
        assert held >= 0
        seen.append(names)
        if len(seen) == 2:
            slow.advance(1)

    log.append(chunk_of(2, LARGEST), check=look)
    assert seen == [("slow",), ("slow",)]
    assert log.blocked == (0.0, ())
    assert log.held_seconds > 0


@pytest.mark.parametrize("who", ["writer", "reader"])
def test_closing_wakes_whoever_waits(who: str) -> None:
    log = ChunkLog(MEMORY)
    log.reader("nobody", 0)
    for number in range(2):
        log.append(chunk_of(number, LARGEST))
    waiting = threading.Event()
    outcome: list[str] = []

    def write() -> None:
        log.append(chunk_of(2, LARGEST), check=waiting.set)

    def read() -> None:
        waiting.set()
        log.wait(7, PATIENCE)

    def work(step: Callable[[], None]) -> None:
        try:
            step()
        except LogClosedError:
            outcome.append("closed")

    thread = threading.Thread(target=work, args=(write if who == "writer" else read,))
    thread.start()
    assert waiting.wait(PATIENCE)
    log.close()
    thread.join(PATIENCE)
    assert outcome == ["closed"]
    assert log.closed
    with pytest.raises(LogClosedError):
        log.get(0)
    with pytest.raises(LogClosedError):
        log.append(chunk_of(2, 4))


def test_a_slow_reader_gets_the_room_of_what_was_kept_for_late_ones() -> None:
    """What all have passed is not kept at the cost of those who are there."""
    spool = 4_000_000
    log = ChunkLog(MEMORY, space=SpoolSpace(tempfile.gettempdir(), spool), keep_all=True)
    reader = log.reader("slow", 0)
    for number in range(9):  # 2.7 MB of history: the spool is not full yet
        log.append(chunk_of(number, LARGEST))
        reader.advance(number + 1)
    for number in range(9, 21):  # and now it stands still
        log.append(chunk_of(number, LARGEST), check=refuse)
    assert log.get(9) == chunk_of(9, LARGEST)
    log.close()
