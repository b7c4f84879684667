"""Links of the chain: a predecessor passes chunks on to its successor over TCP, as they were sealed.

A link is opened by the predecessor. Both ends prove first that they know the session's key, each over random bytes of
the other, so that no recorded link is one; the successor says with which chunk to begin. From then on chunks go one
way, and a link that breaks costs nothing but the next one's opening.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import socket
import struct
import threading
import time
from collections.abc import Callable

from blake3 import blake3

from backhaul.errors import IntegrityError
from backhaul.formats import chunk
from backhaul.formats.chunk import HEADER_SIZE, LINK_ANSWER, LINK_HELLO, LINK_MAGIC, Header
from backhaul.model.fan_out import Member
from backhaul.network.accepting import serve_connections
from backhaul.pipeline.chunk_log import ChunkGoneError, ChunkLog, LogClosedError, Reader
from backhaul.pipeline.recycler import Recycler
from backhaul.transforms.seal import Opener, SessionKeys

# Seconds for a connection and for the words at its beginning.
_OPENING = 5.0
# Seconds after which whoever takes nothing is looked at again; whether it is dead others decide, who see more.
_LOOK = 0.5
_PROOF = 32
# ``_LOOK`` as a struct timeval.
_KERNEL_LOOK = struct.pack("@ll", int(_LOOK), int(_LOOK % 1 * 1e6))


def _proof(key: bytes, role: bytes, hello: bytes, nonce: bytes, number: int) -> bytes:
    return blake3(role + hello + nonce + number.to_bytes(8, "big"), key=key).digest()


class Feeder:
    """Passes a log's chunks on to one successor, in a thread of its own, until it is stopped or the link breaks.

    Args:
        log: where they are.
        member: the successor.
        keys: the session's.
        index: the own place in the roster.
        on_down: told once when the link can't be opened, or has broken: why, and whether what the successor wants is
            not in the log any more.
        until: the last chunk to pass on; None for all that there will be.
    """

    def __init__(
        self,
        log: ChunkLog,
        member: Member,
        keys: SessionKeys,
        index: int,
        on_down: Callable[[Feeder, str, bool], None],
        *,
        until: int | None = None,
    ) -> None:
        self.member = member
        self.sent = 0
        self._log = log
        self._keys = keys
        self._index = index
        self._on_down = on_down
        self._until = until
        self._stopped = False
        self._socket: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name=f"feed-{member.name}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End the link, without a word to ``on_down``."""
        self._stopped = True
        connection = self._socket
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def ended(self) -> bool:
        """Whether it was begun and passes nothing on any more."""
        return self._thread.ident is not None and not self._thread.is_alive()

    def _run(self) -> None:
        reader: Reader | None = None
        try:
            address = (self.member.address, self.member.port)
            with socket.create_connection(address, timeout=_OPENING) as connection:
                self._socket = connection
                if self._stopped:  # nobody wants this link any more: it must not end the one that is wanted
                    return
                number = self._open(connection)
                reader = self._log.reader(self.member.name, number)
                self._pass_on(connection, reader)
        except ChunkGoneError:
            self._tell("what it wants is not here any more", gone=True)
        except LogClosedError:
            pass
        except TimeoutError:
            self._tell("it does not answer")
        except (OSError, IntegrityError) as error:
            self._tell((isinstance(error, OSError) and error.strerror) or getattr(error, "why", "") or str(error))
        finally:
            if reader is not None:
                reader.close()

    def _tell(self, reason: str, *, gone: bool = False) -> None:
        if not self._stopped:
            self._on_down(self, reason, gone)

    def _open(self, connection: socket.socket) -> int:
        """Say who we are, and have it proved that the other side is of the session; return what it wants."""
        key = self._keys.link_key
        hello = LINK_HELLO.pack(LINK_MAGIC, self._keys.session, self._index, os.urandom(16))
        connection.sendall(hello)
        nonce, number, proof = LINK_ANSWER.unpack(_exactly(connection, LINK_ANSWER.size))
        if not hmac.compare_digest(proof, _proof(key, b"S", hello, nonce, number)):
            raise IntegrityError(
                "The link is no link", "the other side does not know the session's key", "See what runs there."
            )
        if self._stopped:
            raise LogClosedError
        connection.sendall(_proof(key, b"P", hello, nonce, number))
        return int(number)

    def _pass_on(self, connection: socket.socket, reader: Reader) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The kernel waits, not Python: a chunk is one call, and the interpreter is not woken for every piece that fits.
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _KERNEL_LOOK)
        number = reader.position
        while not self._stopped and (self._until is None or number <= self._until):
            if not self._log.wait(number, _LOOK):
                if _closed(connection):
                    raise OSError("it has closed the link")
                continue
            view = memoryview(self._take(number))
            while view and not self._stopped:
                with contextlib.suppress(BlockingIOError):
                    count = connection.send(view)
                    self.sent += count
                    view = view[count:]
            number += 1
            reader.advance(number)

    def _take(self, number: int) -> bytearray:
        try:
            return self._log.get(number)
        except OSError as error:
            raise OSError(f"the spool of the one before failed: {error.strerror or error}") from error


class Intake:
    """Takes links from predecessors, one at a time: a newer one ends the older.

    Args:
        listener: a listening TCP socket; closed by ``stop``.
        keys: the session's.
        wanted: says which chunk is wanted next.
        take: given each chunk as it came, with its header and its opened body, in a thread of this object's; some
            come twice. It may raise ``IntegrityError``: then the link is ended.
        on_change: told the place of the one that feeds, or None and why there is nobody any more.
        recycler: where byte arrays come from.
    """

    def __init__(
        self,
        listener: socket.socket,
        keys: SessionKeys,
        wanted: Callable[[], int],
        take: Callable[[Header, bytearray, memoryview], None],
        on_change: Callable[[int | None, str], None],
        recycler: Recycler,
    ) -> None:
        self.upstream: int | None = None
        self.received = 0
        self._listener = listener
        self._keys = keys
        self._recycler = recycler
        self._opener = Opener(keys, recycler.take)
        self._wanted = wanted
        self._take = take
        self._on_change = on_change
        self._stopped = False
        self._current: socket.socket | None = None
        self._lock = threading.Lock()
        # Held while a chunk is taken: an old link's last chunk and a new link's first are not taken side by side.
        self._taking = threading.Lock()
        self._thread = threading.Thread(
            target=serve_connections,
            args=(listener, self._serve, lambda: self._stopped, "link"),
            name="links",
            daemon=True,
        )

    def start(self) -> None:
        """Begin."""
        self._listener.settimeout(_LOOK)
        self._thread.start()

    def stop(self) -> None:
        """Take no more, and end what is open."""
        self._stopped = True
        with contextlib.suppress(OSError):
            self._listener.close()
        self._drop()

    def _drop(self) -> None:
        with self._lock:
            if self._current is not None:
                with contextlib.suppress(OSError):
                    self._current.shutdown(socket.SHUT_RDWR)

    def _serve(self, connection: socket.socket, _address: str) -> None:
        reason = "it has closed the link"
        index: int | None = None
        with connection:
            try:
                connection.settimeout(_OPENING)
                index = self._answer(connection)
                if index is None:
                    return
                self._read(connection)
            except IntegrityError as error:
                reason = f"{error.what}: {error.why}"
            except OSError as error:
                reason = error.strerror or str(error)
            except LogClosedError:
                return
            finally:
                with self._lock:
                    current = self._current is connection
                    if current:
                        self._current, self.upstream = None, None
                if current and index is not None and not self._stopped:
                    self._on_change(None, reason)

    def _answer(self, connection: socket.socket) -> int | None:
        """Let the other side prove that it is of the session; return its place, or None if it is not."""
        key = self._keys.link_key
        hello = _exactly(connection, LINK_HELLO.size)
        magic, session, index, _ = LINK_HELLO.unpack(hello)
        if magic != LINK_MAGIC or session != self._keys.session:
            return None
        # (An older link goes on until the proof is there: nobody ends it who is not of the session. What it brings
        # meanwhile comes twice, which ``take`` has to know.)
        number = self._wanted()
        nonce = os.urandom(16)
        connection.sendall(LINK_ANSWER.pack(nonce, number, _proof(key, b"S", hello, nonce, number)))
        if not hmac.compare_digest(_exactly(connection, _PROOF), _proof(key, b"P", hello, nonce, number)):
            return None
        self._drop()
        with self._lock:
            self._current, self.upstream = connection, index
        self._on_change(index, "")
        return int(index)

    def _read(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        # (What has come by then counts: over a slow line a chunk takes longer than a link that brings nothing may.)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _KERNEL_LOOK)
        while not self._stopped:
            header = self._opener.header(_exactly(connection, HEADER_SIZE))
            data = self._recycler.take(header.size)
            data[:HEADER_SIZE] = chunk.encode_header(header)
            view = memoryview(data)[HEADER_SIZE:]
            while view:
                # The whole chunk by one call, if nothing breaks: waiting for each piece is the kernel's work.
                with contextlib.suppress(BlockingIOError):
                    count = connection.recv_into(view, 0, socket.MSG_WAITALL)
                    if not count:
                        return
                    self.received += count
                    view = view[count:]
            body = self._opener.open(header, data)
            with self._taking:
                if self._current is not connection:
                    return
                self._take(header, data, body)


def _exactly(connection: socket.socket, size: int) -> bytes:
    """Read so many bytes; all of them within the time that the connection allows for one read, if it bounds that."""
    patience = connection.gettimeout()
    deadline = time.monotonic() + patience if patience is not None else None
    data = b""
    while len(data) < size:
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError
        try:
            piece = connection.recv(size - len(data))
        except BlockingIOError:
            continue  # the kernel's look: a link may be silent for as long as the dump is
        if not piece:
            raise OSError("it has closed the link")
        data += piece
    return data


def _closed(connection: socket.socket) -> bool:
    """Tell whether the other side has closed a connection on which it never says anything."""
    try:
        return connection.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) == b""
    except (BlockingIOError, TimeoutError):
        return False
    except OSError:
        return True
