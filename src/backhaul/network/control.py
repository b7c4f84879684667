"""A control connection: messages both ways between the sender and one receiver, and the sign that both live."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time

from backhaul.errors import FormatError, PeerError
from backhaul.formats import fan_out_messages
from backhaul.formats.fan_out_messages import LARGEST, LENGTH, Message

SILENCE = 12.0
"""Seconds without a word after which the other side is taken for dead."""
BEAT = 1.0
"""Seconds after which something is said even if there is nothing to say."""

_LARGEST_GREETING = 64 << 10
_WAITS = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class ConnectionLostError(Exception):
    """The other side is gone, or silent for too long; the text says which."""


class Control:
    """One side of the connection. Any thread may send; one receives, and releases it at the end.

    (OpenSSL's connections must not be read and written at once by two threads: each holds the lock for as long as it
    is inside, and waits outside.)

    Args:
        connection: connected and secured.
        name: the other side's, for messages.
    """

    def __init__(self, connection: socket.socket, name: str) -> None:
        self.name = name
        self.address = plain_address(connection.getpeername()[0])
        self.own_address = plain_address(connection.getsockname()[0])
        self.sent = 0
        self.closed = False
        self._socket = connection
        self._lock = threading.Lock()
        self._heard = time.monotonic()
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def silent_for(self) -> float:
        """Seconds since the last word of the other side."""
        return time.monotonic() - self._heard

    def greeted(self, timeout: float) -> Message:
        """Wait for the first message, of whoever it may be. Raises as ``receive`` does."""
        return self.receive(timeout, _LARGEST_GREETING)

    def send(self, message: Message) -> None:
        """Send a message.

        Raises:
            ConnectionLostError: the other side is gone, or takes nothing.
        """
        view = memoryview(fan_out_messages.encode(message))
        deadline = time.monotonic() + SILENCE
        try:
            with self._lock:
                while view:
                    try:
                        count = self._socket.send(view)
                    except _WAITS:
                        if not self._wait(select.POLLOUT, deadline):
                            raise ConnectionLostError(f"it took nothing for {SILENCE:.0f} s") from None
                        continue
                    self.sent += count
                    view = view[count:]
        except (OSError, ValueError) as error:
            raise ConnectionLostError(_words(error)) from error

    def receive(self, timeout: float = SILENCE, largest: int = LARGEST) -> Message:
        """Wait for the next message, of at most so many bytes.

        Raises:
            ConnectionLostError: the other side is gone, or has said nothing for so many seconds.
            PeerError: what it says is no message.
        """
        length = LENGTH.unpack(self._exactly(LENGTH.size, timeout))[0]
        if length > largest:
            raise self._no_message(f"it announces {length} bytes")
        try:
            message = fan_out_messages.decode(self._exactly(length, timeout))
        except FormatError as error:
            raise self._no_message(error.why) from error
        self._heard = time.monotonic()
        return message

    def close(self) -> None:
        """End the connection; who waits for a message on either side is told."""
        self.closed = True
        with contextlib.suppress(OSError):
            # (Not through TLS, whose own goodbye would wait for its turn.)
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def release(self) -> None:
        """End the connection and give its descriptor back; for the one who receives."""
        self.close()
        with self._lock, contextlib.suppress(OSError):
            self._socket.close()

    def _wait(self, event: int, deadline: float) -> bool:
        poll = select.poll()
        poll.register(self._socket.fileno(), event)
        return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))

    def _exactly(self, size: int, timeout: float) -> bytes:
        data = bytearray()
        deadline = time.monotonic() + timeout
        try:
            while len(data) < size:
                try:
                    with self._lock:
                        piece = self._socket.recv(min(size - len(data), 1 << 20))
                except _WAITS:
                    if not self._wait(select.POLLIN, deadline):
                        raise ConnectionLostError(f"it has said nothing for {timeout:.0f} s") from None
                    continue
                if not piece:
                    raise ConnectionLostError("it has closed the connection")
                data += piece
        except (OSError, ValueError) as error:
            raise ConnectionLostError(_words(error)) from error
        return bytes(data)

    def _no_message(self, why: str) -> PeerError:
        return PeerError(
            f"{self.name} says what can't be read",
            why,
            "See that both hosts run the same version of backhaul.",
        )


def plain_address(text: str) -> str:
    """Return an address as people write it: of IPv4 also where it came in on a socket for both (RFC 4291, 2.5.5.2)."""
    return text.removeprefix("::ffff:") if "." in text else text


def _words(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
