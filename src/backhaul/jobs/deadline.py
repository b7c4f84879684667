"""An end to work on the network, whatever the other side does: a timeout for each read is none for a server that
sends a byte now and then, and looking up a name knows no timeout at all.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
# For work whose connections were just broken to end by itself.
_GRACE = 1.0


class Deadline:
    """Seconds that a piece of work has, from now on."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._ends = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._held: list[socket.socket] = []
        self._over = False

    @property
    def left(self) -> float:
        """Seconds left, never 0: what sockets take for "don't wait" or refuse."""
        return max(0.01, self._ends - time.monotonic())

    @property
    def over(self) -> bool:
        """Whether nobody waits any more: what was not begun is not to be."""
        return self._over

    @property
    def patience(self) -> float:
        """Seconds for a connection's own timeout: longer, for the deadline breaks it, and knows why."""
        return self.left + _GRACE

    def hold(self, connection: socket.socket) -> None:
        """Have a connection broken when the time is over.

        Raises:
            TimeoutError: it is over.
        """
        with self._lock:
            if not self._over:
                # A copy: TLS takes the original's descriptor over, and both are the same connection.
                self._held.append(connection.dup())
                return
        connection.close()
        raise TimeoutError

    def run(self, work: Callable[[], T]) -> T:
        """Do it on a thread of its own; return what it returned, or raise what it raised.

        A thread that hangs where nothing can be broken (a name that is looked up) is left behind; it can open no
        connection any more, and doesn't keep the process.

        Raises:
            TimeoutError: the time was over first.
        """
        worker = _Worker(work)
        worker.start()
        worker.join(self.left)
        with self._lock:
            late = not worker.done
            self._over = True
            for connection in self._held:
                with contextlib.suppress(OSError):
                    if late:
                        connection.shutdown(socket.SHUT_RDWR)
                connection.close()
            self._held.clear()
        if late:
            worker.join(_GRACE)
            raise TimeoutError
        if worker.error is not None:
            raise worker.error
        return worker.results[0]


class _Worker(threading.Thread, Generic[T]):
    def __init__(self, work: Callable[[], T]) -> None:
        super().__init__(name="backhaul-notify", daemon=True)
        self._work = work
        self.results: list[T] = []
        self.error: BaseException | None = None

    @property
    def done(self) -> bool:
        return bool(self.results) or self.error is not None

    def run(self) -> None:
        try:
            self.results.append(self._work())
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            self.error = error
