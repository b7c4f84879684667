"""Threads that end together, order, bounds, and what a stop does to each wait."""

from __future__ import annotations

import errno
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backhaul.pipeline.buffers import BufferPool
from backhaul.pipeline.ordered_map import OrderedMap
from backhaul.pipeline.spool import Spool, SpoolSpace
from backhaul.pipeline.supervisor import StoppedError, Supervisor
from backhaul.pipeline.tee import PieceQueue, Tee
from backhaul.pipeline.token_bucket import TokenBucket

pytestmark = [pytest.mark.unit, pytest.mark.timeout(30)]


class BoomError(Exception):
    pass


def alive(name: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(name)]


# -- supervisor --------------------------------------------------------------------------------------------


def test_the_first_failure_wins_and_stops_the_others() -> None:
    started = threading.Event()

    def waits(group: Supervisor) -> None:
        started.set()
        with group.condition:
            group.wait_for(lambda: False)

    def fails() -> None:
        started.wait()
        raise BoomError("first")

    with pytest.raises(BoomError, match="first"), Supervisor("t1") as group:
        group.start(lambda: waits(group), "waits")
        group.start(fails, "fails")
    assert alive("t1") == []


def test_a_failure_of_the_block_stops_the_threads() -> None:
    with pytest.raises(BoomError), Supervisor("t2") as group:
        group.start(lambda: group.sleep(3600), "sleeps")
        raise BoomError
    assert alive("t2") == []


def test_only_those_wake_for_whom_something_has_changed() -> None:
    """A change for one of many that wait is no turn for the others; a predicate that fails is its waiter's affair."""
    asked = dict.fromkeys(range(10), 0)
    here = threading.get_ident()
    ready: set[int] = set()
    with Supervisor() as group:

        def wait(number: int) -> None:
            def predicate() -> bool:
                asked[number] += threading.get_ident() != here
                return number in ready

            with group.condition:
                group.wait_for(predicate)

        for number in asked:
            group.start(lambda number=number: wait(number), str(number))  # type: ignore[misc]
        while sum(asked.values()) < len(asked):
            time.sleep(0.001)
        for number in asked:
            with group.condition:
                ready.add(number)
                group.condition.notify_all()
    # Once before it slept, and once when it was woken; what this thread asked for them does not count.
    assert all(count == 2 for count in asked.values()), asked


def test_a_predicate_that_fails_fails_whoever_waits_with_it() -> None:
    broken = threading.Event()

    def predicate() -> bool:
        if broken.is_set():
            raise ZeroDivisionError
        return False

    asleep = threading.Event()

    def wait(group: Supervisor) -> None:
        with group.condition:
            asleep.set()
            group.wait_for(predicate)

    with pytest.raises(ZeroDivisionError), Supervisor() as group:
        group.start(lambda: wait(group), "wait")
        asleep.wait()
        broken.set()
        with group.condition:
            group.condition.notify_all()


def test_a_thread_stuck_in_a_system_call_does_not_hold_the_end() -> None:
    release = threading.Event()
    with pytest.raises(BoomError), Supervisor("t3", grace=0.1) as group:
        group.start(lambda: (release.wait(), None)[1], "stuck")
        raise BoomError
    assert alive("t3") != []
    release.set()


def test_leaving_waits_for_the_work() -> None:
    done = []

    def work() -> None:
        time.sleep(0.05)
        done.append(1)

    with Supervisor("t4") as group:
        group.start(work, "works")
    assert done == [1]


# -- ordered map -------------------------------------------------------------------------------------------


def mapped(items: Iterator[int], work: Callable[[int], int], *, workers: int = 4, window: int = 6) -> list[int]:
    with Supervisor("map") as group:
        return list(OrderedMap(group, items, lambda: work, workers=workers, window=window, name="map"))


def test_results_come_in_order_whatever_the_speeds() -> None:
    rng = random.Random(3)
    delays = [rng.random() / 200 for _ in range(200)]

    def work(item: int) -> int:
        time.sleep(delays[item])
        return item * item

    assert mapped(iter(range(200)), work) == [item * item for item in range(200)]


def test_an_empty_input_is_an_empty_output() -> None:
    assert mapped(iter(()), lambda item: item) == []


def test_no_more_than_the_window_is_drawn_ahead_of_a_slow_taker() -> None:
    drawn = 0
    most = 0

    def items() -> Iterator[int]:
        nonlocal drawn
        for item in range(50):
            drawn += 1
            yield item

    with Supervisor("window") as group:
        taken = 0
        for _ in OrderedMap(group, items(), lambda: lambda item: item, workers=3, window=5, name="m"):
            time.sleep(0.002)
            most = max(most, drawn - taken)
            taken += 1
    assert taken == 50
    assert most <= 5


@pytest.mark.parametrize("where", ["draw", "work", "take"])
def test_a_failure_anywhere_ends_everything(where: str) -> None:
    def items() -> Iterator[int]:
        for item in range(1000):
            if where == "draw" and item == 20:
                raise BoomError
            yield item

    def work(item: int) -> int:
        if where == "work" and item == 20:
            raise BoomError
        return item

    with pytest.raises(BoomError), Supervisor("ends") as group:
        for result in OrderedMap(group, items(), lambda: work, workers=3, window=5, name="m"):
            if where == "take" and result == 20:
                raise BoomError
    assert alive("ends") == []


# -- buffers -----------------------------------------------------------------------------------------------


def test_buffers_are_used_again() -> None:
    with Supervisor("b") as group:
        pool = BufferPool(group, 2, 10)
        first, second = pool.take(), pool.take()
        pool.give(first[:3])
        again = pool.take()
        assert again.obj is first.obj
        assert len(again) == 10
        assert second.obj is not first.obj


def test_a_taker_waits_for_a_buffer_and_is_stopped() -> None:
    with pytest.raises(BoomError), Supervisor("b2") as group:
        pool = BufferPool(group, 1, 10)
        pool.take()
        group.start(lambda: (pool.take(), None)[1], "taker")
        time.sleep(0.02)
        raise BoomError
    assert alive("b2") == []


# -- tee ---------------------------------------------------------------------------------------------------


def test_every_taker_gets_every_piece_in_order() -> None:
    pieces = [bytes([i % 256]) * 10 for i in range(500)]
    got: list[list[bytes]] = [[], []]
    with Supervisor("tee") as group:
        queues = [PieceQueue(group, 35), PieceQueue(group, 35)]
        for number, queue in enumerate(queues):
            group.start(lambda n=number, q=queue: got[n].extend(q), f"taker-{number}")  # type: ignore[misc]
        tee = Tee(queues)
        for piece in pieces:
            tee.put(piece)
        tee.end()
    assert got == [pieces, pieces]


def test_a_queue_is_bounded_by_bytes_and_passes_what_is_larger_alone() -> None:
    with Supervisor("bound") as group:
        queue = PieceQueue(group, 10)
        queue.put(b"x" * 25)
        blocked = threading.Event()

        def putter() -> None:
            queue.put(b"y")
            blocked.set()

        group.start(putter, "putter")
        assert not blocked.wait(0.05)
        taken = iter(queue)
        assert next(taken) == b"x" * 25
        assert blocked.wait(5)


def test_a_taker_that_gives_up_never_blocks_the_putter() -> None:
    with Supervisor("gives-up") as group:
        dead, living = PieceQueue(group, 10), PieceQueue(group, 10)
        got: list[bytes] = []
        group.start(lambda: got.extend(living), "living")
        tee = Tee([dead, living])
        tee.put(b"0123456789")
        dead.abandon()
        for _ in range(20):
            tee.put(b"0123456789")
        tee.end()
    assert len(got) == 21
    assert dead.abandoned


def test_an_abort_never_looks_like_an_end() -> None:
    seen: list[str] = []

    def taker(queue: PieceQueue) -> None:
        try:
            for _ in queue:
                seen.append("piece")
            seen.append("end")
        except StoppedError:
            seen.append("stopped")
            raise

    with pytest.raises(BoomError), Supervisor("abort") as group:
        queue = PieceQueue(group, 10)
        group.start(lambda: taker(queue), "taker")
        queue.put(b"x")
        while seen != ["piece"]:
            time.sleep(0.001)
        raise BoomError
    assert seen == ["piece", "stopped"]


# -- worker pool -------------------------------------------------------------------------------------------


# -- stalls and spools -----------------------------------------------------------------------------------------


def test_a_taker_that_takes_nothing_is_given_up() -> None:
    now = 0.0
    stalls: list[float] = []
    with Supervisor("stall") as group:

        def clock() -> float:
            nonlocal now
            now += 0.3
            return now

        queue = PieceQueue(group, 10, stall_after=1.0, on_stall=stalls.append, clock=clock)
        queue.put(b"0123456789")
        queue.put(b"more")  # nobody takes: after a second of the clock it is given up
        assert stalls == [1.0]
        assert queue.abandoned
        queue.put(b"and more")  # which never blocks again


def test_a_slow_taker_that_gets_on_is_not_given_up() -> None:
    """Its clock starts anew with every byte that goes out, although the queue stays full."""
    stalls: list[float] = []

    class Clock:
        """0.4 s a look; at each of the first twenty looks of the waiting putter the taker has just sent a byte."""

        now = 0.0
        looks = 0
        nested = False

        def __call__(self) -> float:
            if not self.nested:
                self.now += 0.4
                self.looks += 1
                self.nested = True
                if self.looks < 20:
                    queue.moved()
                else:
                    next(iter(queue))
                self.nested = False
            return self.now

    clock = Clock()
    clock.nested = True
    with Supervisor("slow") as group:
        queue = PieceQueue(group, 10, stall_after=0.5, on_stall=stalls.append, clock=clock)
        queue.put(b"0123456789")
        clock.nested = False
        queue.put(b"more")
        assert stalls == []
        assert not queue.abandoned
        assert clock.looks >= 20


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(0, 3))
def test_a_spooled_stream_keeps_its_order(sizes: list[int], pauses: int) -> None:
    pieces = [bytes([n % 256]) * size for n, size in enumerate(sizes)]
    taken: list[bytes] = []
    with tempfile.TemporaryDirectory() as directory, Supervisor("spool") as group:
        space = SpoolSpace(directory, 1 << 20)
        queue = PieceQueue(group, 50, spool=Spool(space))
        iterator = iter(queue)
        for number, piece in enumerate(pieces):
            queue.put(piece)  # never waits: what memory has no room for is spooled
            if pauses and number % (pauses + 1) == 0:
                taken.append(next(iterator))
        queue.end()
        taken += list(iterator)
        assert taken == pieces
        assert queue.spooled == 0
        assert space.reserve(1 << 20), "all room was given back"
        assert os.listdir(directory) == []


def test_a_full_spool_makes_the_putter_wait(tmp_path: Path) -> None:
    with Supervisor("full") as group:
        queue = PieceQueue(group, 10, spool=Spool(SpoolSpace(str(tmp_path), 25)))
        done: list[int] = []

        def put() -> None:
            for number in range(6):
                queue.put(bytes([number]) * 10)
                done.append(number)
            queue.end()

        group.start(put, "put")
        deadline = time.monotonic() + 5
        while len(done) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert done == [0, 1, 2], "one in memory, two in the spool"
        assert [piece[0] for piece in queue] == [0, 1, 2, 3, 4, 5]


def test_a_spool_on_a_full_disk_is_a_full_spool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    space = SpoolSpace(str(tmp_path), 1000)
    spool = Spool(space)
    first = spool.add(b"first")
    assert first is not None

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("backhaul.pipeline.spool.os.pwrite", full)
        assert spool.add(b"second") is None
    third = spool.add(b"third")
    assert third is not None
    assert spool.take(first) == b"first"
    assert spool.take(third) == b"third"
    spool.close()
    assert space.reserve(1000)


def test_a_spool_that_fails_takes_its_destination_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failures: list[OSError] = []

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("backhaul.pipeline.spool.os.pwrite", broken)
    with Supervisor("eio") as group:
        queue = PieceQueue(group, 10, spool=Spool(SpoolSpace(str(tmp_path), 1000)), on_spool_error=failures.append)
        for _ in range(3):
            queue.put(b"0123456789")
        assert len(failures) == 1
        assert queue.abandoned


def test_nothing_of_a_spool_has_a_name(tmp_path: Path) -> None:
    """So that nothing is left of it, whatever becomes of the process."""
    spool = Spool(SpoolSpace(str(tmp_path), 1 << 20))
    pieces = [spool.add(b"x" * 1000) for _ in range(10)]
    assert all(pieces)
    assert os.listdir(tmp_path) == []
    spool.close()


# -- token bucket ------------------------------------------------------------------------------------------


def test_the_rate_is_kept_over_many_callers() -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    bucket = TokenBucket(lambda: 1000, clock=lambda: now, sleep=sleep)
    for _ in range(100):
        bucket.take(100)
    # 10,000 bytes at 1,000 a second, less what a tenth of a second of burst lets through.
    assert 9.7 <= now <= 10.0


def test_a_pause_is_not_saved_up_beyond_the_burst() -> None:
    now = 0.0
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds

    bucket = TokenBucket(lambda: 1000, clock=lambda: now, sleep=sleep)
    now = 3600.0
    bucket.take(1000)
    bucket.take(1000)
    assert sum(slept) == pytest.approx(1.9)
