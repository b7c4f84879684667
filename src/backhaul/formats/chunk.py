"""The chunk: the unit in which a fan-out's streams cross the network, the same over TCP and over UDP.

A chunk is a header of 40 bytes, big-endian, and a sealed body:

======  ====  =====================================================================================
offset  size  field
======  ====  =====================================================================================
0       4     ``BHF1``
4       1     kind: 0 START, 1 DATA, 2 END of a stream, 3 END of the session, 4 ABORT
5       1     flags, 0
6       2     stream: its number; 0 in START, in the END of the session and in ABORT
8       4     length of the sealed body
12      4     raw: bytes that the body is once it is opened and decoded (DATA), else of the opened body
16      8     number: from 0, one up for each chunk of the session, of whatever kind
24      16    session: random
======  ====  =====================================================================================

The body is AES-256-GCM under the session's key: its nonce is four zero bytes and the number, the header is the
authenticated data beside it, and the tag of 16 bytes comes last. The body of DATA is a Zstandard frame, or the bytes
themselves. That of any other kind is an Ed25519 signature of 64 bytes by the key that the sender made for the
session, of the header and what comes after it: a JSON object (``backhaul.model.fan_out``). So whoever has the
session's key, as every receiver has, can't make an end that the sender did not make.

What a link is opened with, and how a datagram carries a piece of a chunk, is here too.
"""

from __future__ import annotations

import struct
from typing import Any, TypeVar

import msgspec

from backhaul.errors import IntegrityError
from backhaul.model.fan_out import Abort, SessionEnd, Start, StreamEnd

START, DATA, STREAM_END, SESSION_END, ABORT = range(5)
_LAST_KIND = ABORT
SIGNED = frozenset({START, STREAM_END, SESSION_END, ABORT})

HEADER_SIZE = 40
TAG_SIZE = 16
SIGNATURE_SIZE = 64
LARGEST_BODY = 17 << 20
"""The largest sealed body: whatever says more is no chunk. A frame of random bytes is a little above its 4 MiB."""
LARGEST_RAW = 16 << 20

_HEADER = struct.Struct(">4sBBHIIQ16s")
_MAGIC = b"BHF1"
_NONCE = struct.Struct(">4xQ")

Body = TypeVar("Body", Start, StreamEnd, SessionEnd, Abort)
# (Made at import: msgspec may fail when several threads decode a type for the first time.)
_DECODERS: dict[type, msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(kind) for kind in (Start, StreamEnd, SessionEnd, Abort)
}


class Header(msgspec.Struct, frozen=True):
    """A chunk's header; see the module."""

    kind: int
    stream: int
    length: int
    raw: int
    number: int
    session: bytes

    @property
    def size(self) -> int:
        """Bytes of the whole chunk."""
        return HEADER_SIZE + self.length


def encode_header(header: Header) -> bytes:
    """Return the header's 40 bytes."""
    return _HEADER.pack(_MAGIC, header.kind, 0, header.stream, header.length, header.raw, header.number, header.session)


def decode_header(data: bytes | bytearray | memoryview, session: bytes) -> Header:
    """Return the header in the first 40 bytes.

    Raises:
        IntegrityError: there is none, or not of this session.
    """
    if len(data) < HEADER_SIZE:
        raise _damaged("it is shorter than a header")
    magic, kind, flags, stream, length, raw, number, other = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise _damaged("it does not begin as a chunk does")
    if kind > _LAST_KIND or flags:
        raise _damaged(f"it is of an unknown kind ({kind}, {flags})")
    if not TAG_SIZE <= length <= LARGEST_BODY or raw > LARGEST_RAW:
        raise _damaged(f"it says that it has {length} bytes, for {raw}")
    if other != session:
        raise _damaged("it is of another session")
    return Header(kind, stream, length, raw, number, other)


def nonce(number: int) -> bytes:
    """Return the nonce of the chunk of that number: 12 bytes, used once in a session."""
    return _NONCE.pack(number)


def encode_body(body: Start | StreamEnd | SessionEnd | Abort) -> bytes:
    """Return a signed body's JSON."""
    return msgspec.json.encode(body)


def decode_body(data: bytes, kind: type[Body]) -> Body:
    """Return a body from its JSON.

    Raises:
        IntegrityError: it is none of that kind.
    """
    try:
        decoded: Body = _DECODERS[kind].decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _damaged(str(error)) from error
    return decoded


def _damaged(why: str) -> IntegrityError:
    return IntegrityError("A chunk is damaged", why, "It is asked for again.")


# -- links ---------------------------------------------------------------------------------------------------

LINK_HELLO = struct.Struct(">4s16si16s")
"""What a predecessor says first: ``BHL1``, session, its place in the roster (-1: the sender), 16 random bytes."""
LINK_ANSWER = struct.Struct(">16sQ32s")
"""What its successor says: 16 random bytes, the number of the chunk that it wants first, and a keyed BLAKE3 of both
sides' words under the link key. The predecessor confirms with a keyed BLAKE3 of its own, 32 bytes."""
LINK_MAGIC = b"BHL1"
LINK_CONTEXT = "backhaul 1 fan-out link key"


# -- datagrams -----------------------------------------------------------------------------------------------

DATAGRAM = struct.Struct(">4s8sIIH")
"""A datagram's header, 22 bytes: ``BHU1``, the chunk's proof, the chunk's number, the chunk's bytes in all, and the
piece's place in the chunk (from 0). The piece follows. Pieces are all of the size ``PIECE_SIZE``, but for the last one,
so that the chunk's size says how many there are. A place of that many and up is a parity piece, ``PIECE_SIZE`` too; see
``planning.parity``. A size of 0 says that there is no piece: it names the highest chunk that was sent so far.

The proof is the first 8 bytes of a keyed BLAKE3 of number and size (``DATAGRAM_PROVED``) under the session's datagram
key, which only members can derive: whoever hasn't seen a datagram of a chunk can't make one that counts as a piece of
it. Whoever has can spoil that chunk, which its tag then shows, but open no other."""
DATAGRAM_PROVED = struct.Struct(">II")
DATAGRAM_CONTEXT = "backhaul 1 fan-out datagram key"
DATAGRAM_MAGIC = b"BHU1"
PROBE = struct.Struct(">4s8s16sI")
"""What finds out whether a network carries datagrams: ``BHP1``, a keyed BLAKE3's first 8 bytes of the token under the
datagram key, the token, and the probe's place among its like. Zeros up to ``DATAGRAM_SIZE`` follow."""
PROBE_MAGIC = b"BHP1"
DATAGRAM_SIZE = 1472
"""Bytes of a whole datagram on a network with an MTU of 1500: IPv4's header takes 20, UDP's 8."""
PIECE_SIZE = DATAGRAM_SIZE - DATAGRAM.size
PREFIX_SIZE = DATAGRAM.size - 2
"""Bytes of a datagram's header that are the same in all of a chunk's: everything but the place."""
MOST_PLACES = 1 << 16


def fill_headers(block: bytearray, prefix: bytes, count: int) -> None:
    """Give the first ``count`` headers of a block another prefix (its places stay): a few strided copies for them all.

    ``block`` comes from ``header_block``.
    """
    end = count * DATAGRAM.size
    for at, value in enumerate(prefix):
        block[at : end : DATAGRAM.size] = bytes((value,)) * count


def header_block(count: int) -> bytearray:
    """Return ``count`` headers, one after the other, with the places from 0 and nothing else."""
    return bytearray(b"".join(bytes(PREFIX_SIZE) + place.to_bytes(2, "big") for place in range(count)))
