"""Datagrams of a group, and those for this host alone, put together to chunks.

What costs is Python's work for each datagram, so there is none where all goes well: the kernel joins the datagrams of
one batch (GRO), and they are received in place. The first header is looked at before the batch is taken. Then all of it
goes where it belongs if it goes on as it begins: to its chunk, which has room for each datagram with its header. One
comparison of these headers with those that should be there takes in the batch. In any other case it is put side by side
again and looked at datagram by datagram; what lies in a chunk where nothing is noted as here does no harm.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable

import msgspec

from backhaul.formats.chunk import (
    DATAGRAM,
    DATAGRAM_MAGIC,
    DATAGRAM_SIZE,
    PIECE_SIZE,
    PREFIX_SIZE,
    PROBE_MAGIC,
    fill_headers,
    header_block,
)
from backhaul.model.reception import Reception
from backhaul.network import udp
from backhaul.network.multicast_sender import BATCH
from backhaul.pipeline.supervisor import Supervisor
from backhaul.planning.assembly import LARGEST_CHUNK, Assembly, PartialChunk, piece_count, piece_length
from backhaul.transforms.datagram_proof import DatagramProof
from backhaul.transforms.seal import SessionKeys

WINDOW = 128
"""Chunks, from the next one on, that are taken."""
MEMORY = 64 << 20
"""Bytes of chunks that are not whole yet. The sender's window should be no more than half of it."""
BUFFER = 64 << 20
"""Bytes asked for as each socket's buffer; the kernel may use twice as many. A sender's window fits into it, so that a
receiver that is busy for a while loses nothing."""
_LARGEST_BATCH = 1 << 16
_BATCHES_A_TURN = 16
_WAIT = 0.5
# After a batch smaller than this the next one is not looked at first.
_SMALL = 4
# Datagrams that overtake others do so by less than this, in seconds.
_REORDERED = 0.003
_MOST_TOKENS = 16
_MOST_RANGES = 2_000
_BLOCK = header_block(piece_count(LARGEST_CHUNK))
# The headers of so many datagrams that lie side by side.
_HEADERS = [struct.Struct(f"{DATAGRAM.size}s{PIECE_SIZE}x" * count) for count in range(BATCH + 1)]


class Taken(msgspec.Struct):
    """What came in so far.

    Attributes:
        datagrams, bytes: in all, of UDP's payload; of whatever kind.
        duplicates: pieces that were here already, or of chunks that were.
        foreign: datagrams of other sessions or programs, or forged.
        malformed: pieces with this session's proof that their chunk has no place for.
        outside: pieces of chunks that are too far ahead, or that there was no memory for.
        damaged: chunks that were not as they were sealed.
    """

    datagrams: int = 0
    bytes: int = 0
    duplicates: int = 0
    foreign: int = 0
    malformed: int = 0
    outside: int = 0
    damaged: int = 0


class _Expected:
    """A chunk that is on its way, with the headers that its datagrams have."""

    def __init__(self, chunk: PartialChunk, prefix: bytes) -> None:
        self.chunk = chunk
        self.prefix = prefix
        headers = _BLOCK[: chunk.pieces * DATAGRAM.size]
        fill_headers(headers, prefix, chunk.pieces)
        self.headers = headers


class MulticastReceiver:
    """Receives a session's chunks from a group, in any order.

    Args:
        keys: the session's.
        interface: the IPv4 address of the interface to join on, and for what is sent to this host alone.
        group, port: where the sender sends to.
        on_chunk: gets each chunk's number and bytes, once, in the thread of ``run``; not opened yet. It may call
            ``set_next`` and ``refetch``.
        window: chunk numbers, from the next one on, that are taken.
        memory: bytes of chunks that are not whole.
        buffer: bytes asked for as each socket's buffer.
        parity: as at the sender.
        own_port: UDP port for what is sent to this host alone; 0 for a free one.

    Attributes:
        taken: what came in so far.

    Raises:
        ConfigurationError: the group could not be joined there.
    """

    def __init__(
        self,
        keys: SessionKeys,
        *,
        interface: str,
        group: str,
        port: int,
        on_chunk: Callable[[int, bytearray], None],
        window: int = WINDOW,
        memory: int = MEMORY,
        buffer: int = BUFFER,
        parity: int = 0,
        own_port: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.taken = Taken()
        self._proof = DatagramProof(keys)
        self._on_chunk = on_chunk
        self._assembly = Assembly(window, memory, parity=parity)
        self._clock = clock
        self._lock = threading.RLock()
        self._expected: dict[int, _Expected] = {}
        self._probes: Counter[bytes] = Counter()
        self._whole: list[tuple[int, bytearray]] = []
        self._settled = (0, 0)
        self._mark = (clock(), (0, 0))
        self._last_count = BATCH
        self._first = bytearray(DATAGRAM.size)
        self._tail = memoryview(bytearray(_LARGEST_BATCH))
        self._group_socket = udp.group_socket(interface, group, port, buffer)
        try:
            self._own_socket = udp.own_socket(interface, buffer, own_port)
        except BaseException:
            self._group_socket.close()
            raise

    @property
    def own_port(self) -> int:
        """The UDP port for what is sent to this host alone."""
        port: int = self._own_socket.getsockname()[1]
        return port

    @property
    def receive_buffer(self) -> int:
        """Bytes of the group's socket buffer, as the kernel counts them."""
        return udp.receive_buffer(self._group_socket)

    def close(self) -> None:
        """Close the sockets; ``run`` must have ended."""
        self._group_socket.close()
        self._own_socket.close()

    def probes(self, token: bytes) -> int:
        """Return how many probes with that token have come."""
        with self._lock:
            return self._probes.get(token, 0)

    @property
    def used(self) -> int:
        """Bytes of chunks that are not whole."""
        return self._assembly.used

    def set_next(self, number: int) -> None:
        """Say that all chunks below are here and verified: they are not taken any more, and others may be."""
        with self._lock:
            self._assembly.set_next(number)
            self._forget(lambda other: other < number)

    def complete(self, number: int) -> None:
        """Say that a chunk came another way: it is not taken any more."""
        with self._lock:
            self._assembly.complete(number)
            self._forget(lambda other: other == number)

    def refetch(self, number: int) -> None:
        """Say that a chunk was not as it was sealed: it is told as damaged until it came another way (``complete``)."""
        with self._lock:
            self.taken.damaged += 1
            self._assembly.refetch(number)
            self._forget(lambda other: other == number)

    def reception(self, most: int = _MOST_RANGES) -> Reception:
        """Return what to tell the sender, with at most so many missing ranges.

        What came last may be overtaking what is still on its way, so what is missing before it counts only once the
        time for that has passed, and at a later call.
        """
        with self._lock:
            now = self._clock()
            if now - self._mark[0] >= _REORDERED:
                self._settled = self._mark[1]
                self._mark = (now, self._assembly.highest)
            self._assembly.judge(self._settled)
            return Reception(
                next=self._assembly.next,
                judged=self._assembly.judged,
                lost=self._assembly.lost,
                missing=self._assembly.missing(self._settled, most),
                damaged=self._assembly.damaged,
            )

    def run(self, group: Supervisor) -> None:
        """Receive until the group is stopped.

        Raises:
            StoppedError: it was.
        """
        poll = select.poll()
        sockets = {sock.fileno(): sock for sock in (self._group_socket, self._own_socket)}
        for descriptor in sockets:
            poll.register(descriptor, select.POLLIN)
        poll.register(group.fileno(), select.POLLIN)
        while True:
            group.check()
            for descriptor, _ in poll.poll(_WAIT * 1000):
                if descriptor in sockets:
                    self._drain(sockets[descriptor])
                    self._hand_over()

    def _drain(self, sock: socket.socket) -> None:
        with self._lock:
            for _ in range(_BATCHES_A_TURN):
                try:
                    self._receive(sock)
                except BlockingIOError:
                    return
                except ConnectionRefusedError:  # an answer to nothing that we sent
                    continue

    def _hand_over(self) -> None:
        whole, self._whole = self._whole, []
        for number, chunk in whole:
            self._on_chunk(number, chunk)

    def _receive(self, sock: socket.socket) -> None:
        """Receive one batch."""
        expected, place, room = self._look(sock) if self._last_count >= _SMALL else (None, 0, 0)
        start = place * DATAGRAM_SIZE
        buffers = [self._tail]
        if expected is not None and room:
            buffers = [expected.chunk.frames[start : start + room * DATAGRAM_SIZE], self._tail]
        size, ancillary, _, _ = sock.recvmsg_into(buffers, udp.ANCILLARY)
        length = udp.GRO_SIZE.unpack(ancillary[0][2])[0] if ancillary else size
        count = -(-size // DATAGRAM_SIZE)
        self.taken.bytes += size
        if (
            expected is not None
            and 0 < count <= room
            and size == _bytes(expected.chunk, place, count)
            and length in {DATAGRAM_SIZE, size}
            and expected.headers.startswith(
                b"".join(_HEADERS[count].unpack_from(expected.chunk.frames, start)), place * DATAGRAM.size
            )
        ):
            self.taken.datagrams += count
            self._last_count = count
            chunk = expected.chunk
            chunk.arrived(place, count)
            self._assembly.seen(chunk.number, place + count)
            if not chunk.left:
                self._finish(expected)
            return
        data = self._tail
        if len(buffers) > 1:
            data = memoryview(b"".join((buffers[0][:size], self._tail[: max(0, size - len(buffers[0]))])))
        length = max(1, length)
        for start in range(0, size, length):
            self._take(data[start : min(start + length, size)])
        self._last_count = -(-size // length)
        self.taken.datagrams += self._last_count

    def _look(self, sock: socket.socket) -> tuple[_Expected | None, int, int]:
        """Look at what comes next: its chunk, its place there, and how many pieces in a row may go there."""
        if sock.recv_into(self._first, 0, socket.MSG_PEEK) < DATAGRAM.size:
            return None, 0, 0
        magic, _, number, size, place = DATAGRAM.unpack(self._first)
        expected = self._find(bytes(self._first[:PREFIX_SIZE]), number, size) if magic == DATAGRAM_MAGIC else None
        if expected is None or place >= expected.chunk.pieces:
            return None, 0, 0
        return expected, place, expected.chunk.room(place, BATCH)

    def _find(self, prefix: bytes, number: int, size: int) -> _Expected | None:
        """Return the chunk whose datagrams begin so, a new one if need be; None if such a piece is not to be taken."""
        expected = self._expected.get(number)
        if expected is not None:
            return expected if prefix == expected.prefix else None
        if not self._assembly.wants(number) or prefix != self._proof.prefix(number, size):
            return None
        chunk = self._assembly.chunk(number, size)
        if chunk is None:
            return None
        for other in [other for other in self._expected if not self._assembly.is_open(other)]:
            del self._expected[other]  # given up for this one
        expected = self._expected[number] = _Expected(chunk, prefix)
        return expected

    def _take(self, data: memoryview) -> None:
        """Take one datagram."""
        if len(data) < DATAGRAM.size:
            self.taken.foreign += 1
            return
        magic, _, number, size, place = DATAGRAM.unpack_from(data)
        if magic != DATAGRAM_MAGIC:
            self._take_other(magic, data)
            return
        prefix = bytes(data[:PREFIX_SIZE])
        expected = self._find(prefix, number, size)
        if expected is None:
            self._refuse(prefix, number, size)
            return
        chunk = expected.chunk
        try:
            if not chunk.put(place, data[DATAGRAM.size :]):
                self.taken.duplicates += 1
        except ValueError:
            self.taken.malformed += 1
            return
        self._assembly.seen(number, min(place + 1, chunk.pieces))
        if not chunk.left:
            self._finish(expected)

    def _refuse(self, prefix: bytes, number: int, size: int) -> None:
        """Count a datagram that is no piece to be taken, or learn from it how far the sender is."""
        if prefix != self._proof.prefix(number, size):
            self.taken.foreign += 1
        elif not size:
            self._assembly.seen(number + 1, 0)
        elif number < self._assembly.next + self._assembly.window and not self._assembly.wants(number):
            self.taken.duplicates += 1
        else:
            self.taken.outside += 1

    def _take_other(self, magic: bytes, data: memoryview) -> None:
        token = self._proof.probe_token(data) if magic == PROBE_MAGIC else None
        if token is None or (token not in self._probes and len(self._probes) >= _MOST_TOKENS):
            self.taken.foreign += 1
        else:
            self._probes[token] += 1

    def _finish(self, expected: _Expected) -> None:
        chunk = expected.chunk
        if self._expected.pop(chunk.number, None) is None:
            return
        self._whole.append((chunk.number, self._assembly.whole(chunk)))

    def _forget(self, which: Callable[[int], bool]) -> None:
        for number in [number for number in self._expected if which(number)]:
            del self._expected[number]


def _bytes(chunk: PartialChunk, place: int, count: int) -> int:
    """Return the bytes of the datagrams that carry so many pieces from a place on."""
    return count * DATAGRAM.size + (count - 1) * PIECE_SIZE + piece_length(chunk.size, place + count - 1)
