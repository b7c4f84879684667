"""Taking connections: a refused one, or a shortage of descriptors, ends nobody's listening."""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable

_MOST = 64
"""Connections that are looked at side by side; more wait in the kernel's queue."""
_PAUSE = 0.1
_CLOSED = {errno.EBADF, errno.EINVAL, errno.ENOTSOCK}


def serve_connections(
    listener: socket.socket, serve: Callable[[socket.socket, str], None], stopped: Callable[[], bool], name: str
) -> None:
    """Give each connection to ``serve`` in a thread of its own, with the other side's address, until stopped.

    Args:
        listener: it has a time-out, so that a stop is seen; its closing is one.
        serve: it closes the connection, or keeps it.
        stopped: looked at again and again.
        name: for the threads' names.
    """
    room = threading.BoundedSemaphore(_MOST)

    def work(connection: socket.socket, address: str) -> None:
        try:
            serve(connection, address)
        finally:
            room.release()

    while not stopped():
        if not room.acquire(timeout=_PAUSE):
            continue
        try:
            connection, address = listener.accept()
            threading.Thread(target=work, args=(connection, address[0]), name=name, daemon=True).start()
        except TimeoutError:
            room.release()
        except (OSError, RuntimeError) as error:
            room.release()
            if listener.fileno() < 0 or (isinstance(error, OSError) and error.errno in _CLOSED):
                return
            # Out of descriptors, memory or threads, or a connection that was reset at once: it passes.
            time.sleep(_PAUSE)
