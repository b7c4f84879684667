"""Threads that end together, order, bounds, and what a stop does to each wait."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from backhaul.pipeline.buffers import BufferPool
from backhaul.pipeline.ordered_map import OrderedMap
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
