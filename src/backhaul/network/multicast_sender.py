"""Chunks as datagrams to a group, and again to whoever missed some."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec

from backhaul.errors import FailedError
from backhaul.formats.chunk import DATAGRAM, DATAGRAM_SIZE, PIECE_SIZE, fill_headers, header_block
from backhaul.network import udp
from backhaul.pipeline.token_bucket import TokenBucket
from backhaul.planning import parity as parities
from backhaul.planning.assembly import LARGEST_CHUNK, piece_count, pieces_of
from backhaul.transforms.datagram_proof import DatagramProof
from backhaul.transforms.seal import SessionKeys

BATCH = 44
"""Datagrams in one call: as many as fit into the 64 KiB that the kernel takes at once."""
_SHORTEST_SLEEP = 0.001
_BATCH_SECONDS = 0.002
_BURST = 0.01
# What the kernel answers when a card or driver can't cut datagrams.
_NO_SEGMENTS = {errno.EIO, errno.EINVAL, errno.EOPNOTSUPP, errno.EMSGSIZE}
# A datagram that can't be sent is lost, as any other may be: a link that is down comes up, a receiver that is gone
# (refused) is told by its control connection.
_LOST = {
    errno.ENOBUFS,
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ECONNREFUSED,
    errno.EPERM,
    errno.EAGAIN,
}

Address = tuple[str, int]


class Sent(msgspec.Struct):
    """What was sent so far.

    Attributes:
        datagrams, bytes: in all, of UDP's payload.
        repairs_to_group, repairs_to_one: pieces that were sent again.
        unsent: datagrams that this host could not send.
    """

    datagrams: int = 0
    bytes: int = 0
    repairs_to_group: int = 0
    repairs_to_one: int = 0
    unsent: int = 0


class Outgoing:
    """A chunk on its way out, so far up to the piece at ``place``."""

    def __init__(self, number: int, chunk: bytearray, prefix: bytes) -> None:
        self.number = number
        self.size = len(chunk)
        self.pieces = piece_count(self.size)
        self.place = 0
        self.view = memoryview(chunk)
        self.prefix = prefix


class MulticastSender:
    """Sends to a group; for one thread.

    Args:
        keys: the session's.
        interface: the IPv4 address by which multicasts leave.
        group, port: where they go.
        ttl: how many routers they may pass, and one.
        loop: whether receivers on this host get them.
        parity: how many pieces have one parity piece; 0 for none.

    Attributes:
        rate: bytes a second, or None for as many as can; it may change at any time.
        sleep: how to wait; whoever stops the session may want to raise from it.
        sent: what was sent so far.

    Raises:
        ConfigurationError: this host has no such address.
        FailedError: from whatever sends: the kernel refuses to, for another reason than that a link is down.
    """

    def __init__(
        self,
        keys: SessionKeys,
        *,
        interface: str,
        group: str,
        port: int,
        ttl: int = 1,
        loop: bool = True,
        parity: int = 0,
    ) -> None:
        self.rate: float | None = None
        self.sleep: Callable[[float], None] = time.sleep
        self.sent = Sent()
        self._group = (group, port)
        self._proof = DatagramProof(keys)
        self._parity = parity
        self._bucket = TokenBucket(lambda: self.rate, burst=_BURST, sleep=self._wait)
        # The headers of all pieces of the largest chunk, filled in for each chunk anew: the kernel has copied them
        # when a call returns.
        self._headers = header_block(piece_count(LARGEST_CHUNK))
        view = memoryview(self._headers)
        self._header_views = [view[start : start + DATAGRAM.size] for start in range(0, len(view), DATAGRAM.size)]
        self._filled: Outgoing | None = None
        self._socket = udp.sending_socket(interface, ttl=ttl, loop=loop)
        self._segments = udp.segment(self._socket, DATAGRAM_SIZE)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def probe(self, token: bytes, count: int) -> None:
        """Send so many probes with that token, 16 bytes, to the group."""
        for place in range(count):
            self._send_single([self._proof.probe(token, place)], self._group)

    def highest(self, number: int) -> None:
        """Say to the group that the chunks up to this number were sent: the loss of the last ones shows."""
        self._send_single([self._proof.prefix(number, 0) + b"\0\0"], self._group)

    def send(self, number: int, chunk: bytearray) -> None:
        """Send a whole chunk to the group."""
        outgoing = self.begin(number, chunk)
        while not self.send_some(outgoing, outgoing.pieces):
            pass

    def begin(self, number: int, chunk: bytearray) -> Outgoing:
        """Return a chunk to be sent by ``send_some``; it must not change before it is."""
        return Outgoing(number, chunk, self._proof.prefix(number, len(chunk)))

    def send_some(self, outgoing: Outgoing, pieces: int) -> bool:
        """Send at least so many more pieces to the group, if there are; tell whether that was the last one."""
        if self._filled is not outgoing:
            fill_headers(self._headers, outgoing.prefix, outgoing.pieces)
            self._filled = outgoing
        end = min(outgoing.place + pieces, outgoing.pieces)
        while outgoing.place < end:
            count = min(self._batch(), outgoing.pieces - outgoing.place)
            buffers = self._header_views[outgoing.place : outgoing.place + count] * 2
            buffers[::2] = buffers[:count]
            buffers[1::2] = pieces_of(outgoing.view, outgoing.place, count)
            self._send(buffers, self._group)
            outgoing.place += count
        if outgoing.place < outgoing.pieces:
            return False
        if self._parity:
            self._send_parity(outgoing)
        self._filled = None
        return True

    def repair(self, number: int, chunk: bytearray, pieces: Sequence[int], to: Address | None = None) -> None:
        """Send pieces of a chunk, in rising order, again: to the group, or to one receiver."""
        prefix = self._proof.prefix(number, len(chunk))
        view = memoryview(chunk)
        buffers: list[bytes | memoryview] = []
        for place in pieces:
            buffers.append(prefix + place.to_bytes(2, "big"))
            buffers.append(view[place * PIECE_SIZE : (place + 1) * PIECE_SIZE])
        for batch in _slices(buffers, 2 * self._batch()):
            self._send(batch, to or self._group)
        if to is None:
            self.sent.repairs_to_group += len(pieces)
        else:
            self.sent.repairs_to_one += len(pieces)

    def _send_parity(self, outgoing: Outgoing) -> None:
        buffers: list[bytes | memoryview] = []
        for column, piece in enumerate(parities.parity_pieces(outgoing.view, self._parity)):
            buffers.append(outgoing.prefix + (outgoing.pieces + column).to_bytes(2, "big"))
            buffers.append(piece)
        for batch in _slices(buffers, 2 * self._batch()):
            self._send(batch, self._group)

    def _batch(self) -> int:
        """Return how many datagrams go in one call: fewer at a low rate, so that a switch's queue holds them."""
        if self.rate is None:
            return BATCH
        return max(1, min(BATCH, int(self.rate * _BATCH_SECONDS / DATAGRAM_SIZE)))

    def _send(self, buffers: Sequence[bytes | memoryview], to: Address) -> None:
        """Send datagrams: a header and a piece of each; all but the last are full."""
        count = len(buffers) // 2
        size = (count - 1) * DATAGRAM_SIZE + len(buffers[-2]) + len(buffers[-1])
        self._bucket.take(size)
        if self._segments or count == 1:
            try:
                self._socket.sendmsg(buffers, (), 0, to)
            except OSError as error:
                if count > 1 and error.errno in _NO_SEGMENTS:
                    self._segments = False
                    udp.segment(self._socket, 0)
                elif error.errno in _LOST:
                    self.sent.unsent += count
                    return
                else:
                    raise _failed(to, error) from error
            else:
                self.sent.datagrams += count
                self.sent.bytes += size
                return
        for datagram in _slices(buffers, 2):
            self._send_single(datagram, to)

    def _send_single(self, buffers: Sequence[bytes | memoryview], to: Address) -> None:
        try:
            self.sent.bytes += self._socket.sendmsg(buffers, (), 0, to)
            self.sent.datagrams += 1
        except OSError as error:
            if error.errno not in _LOST:
                raise _failed(to, error) from error
            self.sent.unsent += 1

    def _wait(self, seconds: float) -> None:
        # Sleeping takes longer than it was asked to: what is shorter is left to add up in the bucket.
        if seconds >= _SHORTEST_SLEEP:
            self.sleep(seconds)


def _failed(to: Address, error: OSError) -> FailedError:
    return FailedError(
        f"Nothing can be sent to {to[0]} port {to[1]}",
        error.strerror or str(error),
        "Look at this host's interface and firewall, or send by chain.",
    )


def _slices(buffers: Sequence[bytes | memoryview], size: int) -> Iterator[Sequence[bytes | memoryview]]:
    for start in range(0, len(buffers), size):
        yield buffers[start : start + size]
