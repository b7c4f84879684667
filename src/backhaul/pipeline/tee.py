"""One stream of pieces to many takers, each with its own bounded queue and its own fate."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from backhaul.pipeline.spool import Spool, SpooledPiece
from backhaul.pipeline.supervisor import Supervisor

_SPOOL_LOOK = 0.25


class AbandonedError(Exception):
    """The taker was given up while it waited for a piece; why, whoever gave it up knows."""


class PieceQueue:
    """A queue of byte strings, bounded by their total size in memory; one putter, one taker.

    A piece larger than the bound passes when the queue is empty. With a spool, what memory has no room for goes
    there; the putter waits only when that is full too.

    Args:
        group: whose stop ends all waiting.
        max_bytes: most bytes in memory.
        spool: where the rest goes, or None.
        stall_after: seconds of waiting without any progress of the taker after which it is given up; None for never.
        on_stall: told then, once, with the seconds; has to make the taker fail.
        on_spool_error: told when the spool failed; has to make the taker fail.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        group: Supervisor,
        max_bytes: int,
        *,
        spool: Spool | None = None,
        stall_after: float | None = None,
        on_stall: Callable[[float], None] = lambda seconds: None,
        on_spool_error: Callable[[OSError], None] = lambda error: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._group = group
        self._max_bytes = max_bytes
        self._spool = spool
        self._stall_after = stall_after
        self._on_stall = on_stall
        self._on_spool_error = on_spool_error
        self._clock = clock
        self._moved = clock()
        self._pieces: deque[bytes | SpooledPiece] = deque()
        self._held = 0
        self._ended = False
        self._abandoned = False
        self.spooled = 0
        self.put_bytes = 0

    @property
    def abandoned(self) -> bool:
        """Whether the taker gave up, or was given up; pieces put from then on vanish."""
        return self._abandoned

    @property
    def held(self) -> int:
        """Bytes that wait in memory."""
        return self._held

    @property
    def room(self) -> int:
        """Most bytes that wait before the putter does; 0 if it does not have to, since a disk takes what is more."""
        return 0 if self._spool is not None or self._abandoned else self._max_bytes

    def moved(self) -> None:
        """Note that the taker gets on, even though it took nothing: it is not stalled."""
        self._moved = self._clock()

    def put(self, piece: bytes) -> None:
        """Wait for room and add a piece; a no-op once the taker gave up."""
        began = self._clock()
        self.put_bytes += len(piece)
        while True:
            with self._group.condition:
                self._group.check()
                if self._abandoned or self._has_room(piece):
                    self._add(piece)
                    return
            if self._spool is not None and self._add_to_spool(self._spool, piece):
                return
            if not self._wait(piece, began):
                # Told first: whoever takes must find out why before it finds the queue gone.
                self._on_stall(self._stall_after or 0.0)
                self.abandon()
                return

    def end(self) -> None:
        """Say that no more pieces come: only called for a stream that is whole."""
        with self._group.condition:
            self._ended = True
            self._group.condition.notify_all()

    def abandon(self) -> None:
        """Give up taking: the putter is never blocked by this queue again."""
        with self._group.condition:
            self._abandoned = True
            self._pieces.clear()
            self._held = self.spooled = 0
            self._group.condition.notify_all()
        if self._spool is not None:
            self._spool.close()

    def __iter__(self) -> Iterator[bytes]:
        """Take pieces until the stream's whole end.

        Raises:
            StoppedError: the group stopped; an abort never looks like an end.
            AbandonedError: the queue was abandoned.
            OSError: the spool failed.
        """
        while True:
            with self._group.condition:
                self._group.wait_for(lambda: bool(self._pieces) or self._ended or self._abandoned)
                if self._abandoned:
                    raise AbandonedError
                if not self._pieces:
                    break
                piece = self._pieces.popleft()
                if isinstance(piece, bytes):
                    self._held -= len(piece)
                else:
                    self.spooled -= piece.size
                self._moved = self._clock()
                self._group.condition.notify_all()
            if isinstance(piece, SpooledPiece):
                assert self._spool is not None
                piece = self._spool.take(piece)
            yield piece
            del piece
        if self._spool is not None:
            self._spool.close()

    # -- inside; with the group's condition held, but for the waiting ------------------------------------

    def _has_room(self, piece: bytes) -> bool:
        return not self._pieces or self._held + len(piece) <= self._max_bytes

    def _add(self, piece: bytes) -> None:
        if not self._abandoned:
            self._pieces.append(piece)
            self._held += len(piece)
            self._group.condition.notify_all()

    def _add_to_spool(self, spool: Spool, piece: bytes) -> bool:
        """Add by way of the disk; tell whether the piece is seen to. (The condition is not held.)"""
        # Only this thread adds: nothing can come between the writing and the place in the queue.
        try:
            spooled = spool.add(piece)
        except OSError as error:
            if not self._abandoned:
                self._on_spool_error(error)
                self.abandon()
            return True
        if spooled is None:
            return False
        with self._group.condition:
            if not self._abandoned:
                self.spooled += spooled.size
                self._pieces.append(spooled)
                self._group.condition.notify_all()
        return True

    def _wait(self, piece: bytes, began: float) -> bool:
        """Wait a while for room; tell whether the taker gets on. (The condition is not held.)"""
        with self._group.condition:
            if self._abandoned or self._has_room(piece):
                return True
            idle = self._clock() - max(began, self._moved)
            if self._stall_after is not None and idle >= self._stall_after:
                return False
            pause = None if self._stall_after is None else max(0.01, self._stall_after - idle)
            if self._spool is not None:  # room on the disk comes back without a word
                pause = min(pause or _SPOOL_LOOK, _SPOOL_LOOK)
            self._group.condition.wait(pause)
            return True


class Tee:
    """Puts every piece into every queue that is still taken from."""

    def __init__(self, queues: Sequence[PieceQueue]) -> None:
        self._queues = queues

    def put(self, piece: bytes) -> None:
        """Hand the piece to all; waits for the slowest one that has not given up."""
        for queue in self._queues:
            queue.put(piece)

    def end(self) -> None:
        """Tell all that the stream ended, whole."""
        for queue in self._queues:
            queue.end()
