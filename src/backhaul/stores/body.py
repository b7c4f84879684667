"""The bytes of a request, as they are handed to the network: paced, counted, and stoppable.

One body may be read by several tries, one after the other (a retry) or side by side (a hedge). Bytes that go out
for the first time are paced by the rate limit and count as progress. Bytes that go out again do neither: a limit
that charges retries against itself slows down until nothing moves any more. They have a limit of their own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

Take = Callable[[int], None]

# urllib3 asks file-like bodies for 16 KiB at a time, and sends whatever it is given. A piece has to leave within the
# socket's timeout, which is that of connecting at first: the first is small enough for the slowest line, 10 KB/s a
# connection. Each costs a system call and a turn of the interpreter, so they grow while they leave at once; not at a
# second try, since what took them at once may have been a proxy's buffer before a slow line.
_PIECE = 64 << 10
_LARGEST_PIECE = 256 << 10
# Seconds in which a piece must have left for the next one to be twice as large.
_AT_ONCE = 0.05


class BodyCancelledError(Exception):
    """The bytes are not wanted any more: another try got them there first."""


class PartBody:
    """A view of memory that tries to send.

    Args:
        view: the bytes. They must not change while a try reads them (``PartJob.release``).
        on_progress: told the count of bytes that were handed out, also of those that were before: they move.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        view: bytes | bytearray | memoryview,
        on_progress: Take | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.view = memoryview(view)
        self.clock = clock
        self._on_progress = on_progress
        self._take: Take | None = None
        self._take_again: Take | None = None
        self._piece = _LARGEST_PIECE
        self._lock = threading.Lock()
        self._tries = 0
        self._reached = 0
        self._cancelled = False

    def __len__(self) -> int:
        return len(self.view)

    def pace(self, take: Take, take_again: Take, piece: int) -> None:
        """Have every piece wait for the limit: ``take`` for new bytes, ``take_again`` for repeated ones.

        ``piece`` is the most bytes that wait at once.
        """
        self._take, self._take_again, self._piece = take, take_again, max(1, piece)

    def cancel(self) -> None:
        """End every try that still reads, at its next piece."""
        self._cancelled = True

    @property
    def cancelled(self) -> bool:
        """Whether the bytes are not wanted any more."""
        return self._cancelled

    @property
    def reached(self) -> int:
        """How many bytes went out at least once."""
        return self._reached

    def whole(self) -> memoryview | None:
        """Return all bytes, when they are due, if they are so few that they leave in one piece anyway; else None.

        They count as handed out before there is a connection. A reader's bytes are sent when the server has said that
        it would take them (``Expect: 100-continue``), which is right for much, and a round trip in vain for little.

        Raises:
            BodyCancelledError: the bytes are not wanted any more.
        """
        if len(self.view) > min(_PIECE, self._piece) or 0 < self._reached < len(self.view):
            return None
        return self.next_piece(0, len(self.view))

    def open(self) -> BodyReader:
        """Return a reader from the beginning, for one try."""
        self._tries += 1
        return BodyReader(self, _LARGEST_PIECE if self._tries == 1 else _PIECE)

    def next_piece(self, position: int, size: int) -> memoryview:
        """Return the piece at a position, of at most so many bytes, when it is due; empty at the end.

        Raises:
            BodyCancelledError: the bytes are not wanted any more.
        """
        if self._cancelled:
            raise BodyCancelledError
        end = min(position + min(size, self._piece), len(self.view))
        with self._lock:
            # A piece is new or repeated as a whole: a repeated one ends where the new bytes begin.
            if position < self._reached < end:
                end = self._reached
            new = end > self._reached
            self._reached = max(self._reached, end)
        count = end - position
        if count:
            take = self._take if new else self._take_again
            if take is not None:
                take(count)
            if self._on_progress is not None:
                self._on_progress(count)
            if self._cancelled:
                raise BodyCancelledError
        return self.view[position:end]


class BodyReader:
    """A file-like reader of a ``PartBody``, which is what HTTP clients take. Not for sharing."""

    def __init__(self, body: PartBody, largest: int) -> None:
        self._body = body
        self._largest = largest
        self._position = 0
        self._size = _PIECE
        self._given: float | None = None

    def __len__(self) -> int:
        return len(self._body)

    def read(self, size: int = -1, /) -> memoryview:
        """Return the next piece: as large as the line took the last ones, whatever was asked for."""
        if self._given is not None:
            at_once = self._body.clock() - self._given < _AT_ONCE
            self._size = min(2 * self._size, self._largest) if at_once else _PIECE
        piece = self._body.next_piece(self._position, self._size)
        self._position += len(piece)
        self._given = self._body.clock()
        return piece

    def tell(self) -> int:
        """Return the position, as botocore asks before it sends."""
        return self._position

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Move, as botocore does before it sends."""
        self._position = (0, self._position, len(self._body))[whence] + offset
        return self._position


Body = bytes | bytearray | memoryview | PartBody


def content_of(body: Body) -> bytes | bytearray | memoryview:
    """Return a body's bytes, all at once."""
    return body.view if isinstance(body, PartBody) else body
