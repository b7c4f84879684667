"""The sender's side of a multicast: fresh chunks, repairs, the pace, and the window that the slowest receiver sets."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from backhaul.model.reception import Reception
from backhaul.network.multicast_sender import Address, MulticastSender, Outgoing
from backhaul.pipeline.chunk_log import ChunkGoneError, LogClosedError
from backhaul.pipeline.supervisor import Supervisor
from backhaul.planning.assembly import piece_count
from backhaul.planning.pace import Pace
from backhaul.planning.repair import RepairPlanner

WINDOW = 128
"""Chunks beyond the slowest receiver's next one that may be on their way."""
WINDOW_BYTES = 32 << 20
"""Bytes of them: what fits into a receiver's socket buffer and its reassembly."""
_PIECES_A_TURN = 16 * 44
_REPAIRS_A_TURN = 512
_TURN = 0.005
# While nothing is sent, how far the chunks went is said after so many seconds, and then less and less often.
_IDLE = 0.02
_MOST_IDLE = 1.0
# A stretch that tells a rate has at least so many pieces, sent in at least so many seconds.
_STRETCH = 400
_STRETCH_SECONDS = 0.04
# Reports whose shortest delay is the present one: any one may be late for other reasons.
_LAST_DELAYS = 4
_LEAST_SETTLE = 0.02
_MOST_SETTLE = 2.0
# So many chunks that every receiver has are remembered, for what reports say of them later.
_REMEMBERED = 512


class Log(Protocol):
    """Where the chunks are; see ``pipeline.chunk_log``."""

    def wait(self, number: int, timeout: float) -> bool:
        """Wait at most so many seconds for a chunk; tell whether it is here."""
        ...

    def get(self, number: int) -> bytearray:
        """Return a chunk."""
        ...


class _Chunk(msgspec.Struct):
    size: int
    pieces: int
    begun: float
    ended: float


class _Member:
    """A receiver, as its last report has it; ``first`` and ``lost_before`` as it was when the present stretch began."""

    def __init__(self, address: Address, next_: int) -> None:
        self.address = address
        self.next = next_
        self.judged = self.first = next_
        self.lost = self.lost_before = 0
        # Seconds from a chunk's sending to the report that has judged it: the last ones, and the shortest of those at
        # the end of each stretch.
        self.delays: deque[float] = deque(maxlen=_LAST_DELAYS)
        self.shortest: deque[float] = deque(maxlen=_REMEMBERED)

    def queue(self) -> float:
        """Return the seconds that the last chunks were longer on their way than others at best."""
        if not self.delays:
            return 0.0
        delay = min(self.delays)
        self.shortest.append(delay)
        return delay - min(self.shortest)


class MulticastLoop:
    """Sends the chunks of a log to a group until every receiver has all of them.

    ``report``, ``remove``, ``add`` and ``end`` are for any thread.

    Args:
        sender: its ``rate`` and ``sleep`` are set here.
        log: the chunks.
        members: the addresses of the receivers, for what one of them misses, by their places.
        pace: the rate.
        window, window_bytes: how far to go beyond the slowest receiver's next chunk.
        on_damaged: called with a receiver's place and a chunk's number when it has told that the chunk was damaged:
            it wants it over TCP. In the thread of ``run``, and for each of them once.
        first: the chunk to begin with.
    """

    def __init__(
        self,
        sender: MulticastSender,
        log: Log,
        members: Mapping[int, Address],
        *,
        pace: Pace,
        window: int = WINDOW,
        window_bytes: int = WINDOW_BYTES,
        on_damaged: Callable[[int, int], None] = lambda member, number: None,
        first: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sender = sender
        self._log = log
        self._members = {index: _Member(address, first) for index, address in members.items()}
        self._pace = pace
        self._window = window
        self._window_bytes = window_bytes
        self._on_damaged = on_damaged
        self._clock = clock
        self._number = first
        self._end: int | None = None
        self._repairs = RepairPlanner(members, self._pieces)
        self._news = threading.Condition()
        self._reports: dict[int, Reception] = {}
        self._changes: list[Callable[[], None]] = []
        self._chunks: dict[int, _Chunk] = {}
        self._in_flight = 0
        self._first = self._lowest = first
        self._forgotten = first
        self._pending: bytearray | None = None
        self._outgoing: Outgoing | None = None
        self._begun = 0.0
        self._told: set[tuple[int, int]] = set()
        self._delay = 0.0
        self._rate_since = clock()
        self._sent_at = self._planned_at = clock()
        self._idle = _IDLE
        self._held_since: float | None = None
        self._held_by = -1
        self._finished = False

    # -- for any thread --------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether every receiver that was not removed has every chunk."""
        return self._finished

    @property
    def held_up(self) -> tuple[int, float] | None:
        """The receiver for which everything waits now, and for how many seconds; None when nothing does."""
        with self._news:
            return None if self._held_since is None else (self._held_by, self._clock() - self._held_since)

    @property
    def rate(self) -> float:
        """Bytes a second that are allowed now."""
        return self._pace.rate

    def report(self, index: int, reception: Reception) -> None:
        """Take a receiver's report."""
        with self._news:
            self._reports[index] = reception
            self._news.notify()

    def end(self, count: int) -> None:
        """Say how many chunks there are in all."""
        with self._news:
            self._end = count
            self._news.notify()

    def add(self, index: int, address: Address, next_: int) -> None:
        """Take in a receiver that has what is below ``next_``, or gets it another way.

        What others have had for long is not sent again for it: ``next_`` should not be far behind them.
        """

        def change() -> None:
            self._members[index] = _Member(address, next_)
            self._repairs.add(index)

        self._change(change)

    def remove(self, index: int) -> None:
        """Wait for this receiver no more."""

        def change() -> None:
            self._members.pop(index, None)
            self._repairs.remove(index)

        self._change(change)

    def _change(self, change: Callable[[], None]) -> None:
        with self._news:
            self._changes.append(change)
            self._news.notify()

    # -- the thread of its own -------------------------------------------------------------------------------

    def run(self, group: Supervisor) -> None:
        """Send until every receiver has everything, or none is left, or the log is closed.

        Raises:
            StoppedError: the group was stopped.
        """
        self._sender.sleep = group.sleep
        self._sender.rate = self._pace.rate
        try:
            while True:
                group.check()
                self._take_news()
                if self._is_over():
                    return
                self._repair()
                if not self._send_fresh():
                    self._beat()
        except LogClosedError:
            group.check()

    def _is_over(self) -> bool:
        if self._members and (self._end is None or any(one.next < self._end for one in self._members.values())):
            return False
        self._finished = bool(self._members)
        return True

    def _take_news(self) -> None:
        with self._news:
            reports, self._reports = self._reports, {}
            changes, self._changes = self._changes, []
        for change in changes:
            change()
        now = self._clock()
        for index, reception in reports.items():
            if index in self._members:
                self._take_report(index, self._members[index], reception, now)
        if reports or changes:
            lowest = min((member.next for member in self._members.values()), default=self._number)
            for number in range(self._lowest, lowest):
                if number in self._chunks:
                    self._in_flight -= self._chunks[number].size
            self._lowest = max(self._lowest, lowest)
            for number in range(self._forgotten, self._lowest - _REMEMBERED):
                self._chunks.pop(number, None)
                self._forgotten = number + 1
            self._repairs.forget(self._lowest)
            self._observe()

    def _take_report(self, index: int, member: _Member, reception: Reception, now: float) -> None:
        member.next = max(member.next, min(reception.next, self._number))
        self._repairs.report(index, reception, now)
        for number in reception.damaged:
            if member.next <= number < self._number and (index, number) not in self._told:
                self._told.add((index, number))
                self._on_damaged(index, number)
        judged = min(reception.judged, self._number)
        if judged > member.judged:
            member.judged = judged
            member.lost = reception.lost
            last = self._chunks.get(judged - 1)
            if last is not None:
                delay = now - last.ended
                member.delays.append(delay)
                self._delay = max(delay, 0.9 * self._delay + 0.1 * delay)

    def _observe(self) -> None:
        """Tell the pace what became of a stretch: what the receiver lost that lost most of it.

        A stretch has been judged by all, is long enough to tell, and was sent at one rate.
        """
        end = min((member.judged for member in self._members.values()), default=0)
        chunks = self._between(self._first, end)
        if not chunks:
            return
        if chunks[0].begun >= self._rate_since:
            seconds = chunks[-1].ended - chunks[0].begun
            if seconds < _STRETCH_SECONDS or sum(chunk.pieces for chunk in chunks) < _STRETCH:
                return
            pieces, lost = max(
                (self._became(member) for member in self._members.values()), key=lambda one: one[1] / one[0]
            )
            before = self._pace.rate
            queue = max(member.queue() for member in self._members.values())
            self._pace.observe(pieces, lost, sum(chunk.size for chunk in chunks) / seconds, queue)
            if self._pace.rate != before:
                self._sender.rate = self._pace.rate
                self._rate_since = self._clock()
        self._first = end
        for member in self._members.values():
            member.first, member.lost_before = member.judged, member.lost

    def _became(self, member: _Member) -> tuple[int, int]:
        """Return how many pieces a receiver has judged since the stretch began, and lost."""
        pieces = sum(chunk.pieces for chunk in self._between(member.first, member.judged))
        return max(1, pieces), min(pieces, member.lost - member.lost_before)

    def _between(self, first: int, end: int) -> list[_Chunk]:
        return [self._chunks[number] for number in range(first, end) if number in self._chunks]

    def _pieces(self, number: int) -> int:
        chunk = self._chunks.get(number)
        return 0 if chunk is None else chunk.pieces

    def _repair(self) -> None:
        now = self._clock()
        if now - self._planned_at < _TURN:
            return
        self._planned_at = now
        settle = min(_MOST_SETTLE, _LEAST_SETTLE + 1.5 * self._delay)
        for repair in self._repairs.plan(now, settle, _REPAIRS_A_TURN):
            to = None if repair.member is None else self._members[repair.member].address
            try:
                chunk = self._log.get(repair.number)
            except ChunkGoneError:
                continue  # whoever keeps the log knows who was too slow
            self._sender.repair(repair.number, chunk, repair.pieces, to)

    def _send_fresh(self) -> bool:
        """Send some of the next chunk; tell whether there was anything to send, and room for it."""
        if self._outgoing is None:
            if not self._has_next():
                return False
            assert self._pending is not None
            self._outgoing = self._sender.begin(self._number, self._pending)
            self._begun = self._clock()
            size = len(self._pending)
            self._chunks[self._number] = _Chunk(size, piece_count(size), self._begun, self._begun)
            self._in_flight += size
        if self._sender.send_some(self._outgoing, _PIECES_A_TURN):
            self._chunks[self._number].ended = self._clock()
            self._number += 1
            self._outgoing = self._pending = None
        self._sent_at = self._clock()
        self._idle = _IDLE
        return True

    def _has_next(self) -> bool:
        if self._end is not None and self._number >= self._end:
            self._wait()
            return False
        if self._pending is None:
            if not self._log.wait(self._number, _TURN):
                self._hold(None)
                return False
            self._pending = self._log.get(self._number)
        full = self._number >= self._lowest + self._window or (
            self._in_flight and self._in_flight + len(self._pending) > self._window_bytes
        )
        if full:
            self._hold(min(self._members, key=lambda index: self._members[index].next))
            self._wait()
            return False
        self._hold(None)
        return True

    def _hold(self, index: int | None) -> None:
        with self._news:
            if index is None:
                self._held_since = None
            elif self._held_since is None or self._held_by != index:
                self._held_since, self._held_by = self._clock(), index

    def _wait(self) -> None:
        with self._news:
            if not self._reports and not self._changes:
                self._news.wait(_TURN)

    def _beat(self) -> None:
        """Say now and then how far the chunks went, while nothing follows that would show what is missing."""
        now = self._clock()
        if self._number and now - self._sent_at >= self._idle:
            self._sender.highest(self._number - 1)
            self._sent_at = now
            self._idle = min(_MOST_IDLE, 2 * self._idle)
