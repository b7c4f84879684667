"""One stream of pieces to many takers, each with its own bounded queue and its own fate."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from backhaul.pipeline.supervisor import Supervisor


class PieceQueue:
    """A queue of byte strings, bounded by their total size; one putter, one taker.

    A piece larger than the bound passes when the queue is empty.
    """

    def __init__(self, group: Supervisor, max_bytes: int) -> None:
        self._group = group
        self._max_bytes = max_bytes
        self._pieces: deque[bytes] = deque()
        self._held = 0
        self._ended = False
        self._abandoned = False

    @property
    def abandoned(self) -> bool:
        """Whether the taker gave up; pieces put from then on vanish."""
        return self._abandoned

    def put(self, piece: bytes) -> None:
        """Wait for room and add a piece; a no-op once the taker gave up."""
        with self._group.condition:
            self._group.wait_for(
                lambda: self._abandoned or not self._pieces or self._held + len(piece) <= self._max_bytes
            )
            if self._abandoned:
                return
            self._pieces.append(piece)
            self._held += len(piece)
            self._group.condition.notify_all()

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
            self._held = 0
            self._group.condition.notify_all()

    def __iter__(self) -> Iterator[bytes]:
        """Take pieces until the stream's whole end.

        Raises:
            StoppedError: the group stopped; an abort never looks like an end.
        """
        while True:
            with self._group.condition:
                self._group.wait_for(lambda: bool(self._pieces) or self._ended)
                if not self._pieces:
                    return
                piece = self._pieces.popleft()
                self._held -= len(piece)
                self._group.condition.notify_all()
            yield piece
            del piece


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
