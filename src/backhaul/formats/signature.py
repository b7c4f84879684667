"""The signature of a mirrored file: its chunks in order, so that a later version is sent as what is new in it.

::

    8 bytes    "BHSIG\\0\\0\\1"
    8 bytes    number of chunks, little-endian
    4 bytes    a chunk's length, little-endian     } for
    16 bytes   the first 16 bytes of its BLAKE3    } each
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator

from backhaul.errors import FormatError

MAGIC = b"BHSIG\0\0\1"
HASH_SIZE = 16
_CHUNK = struct.Struct(f"<I{HASH_SIZE}s")
_COUNT = struct.Struct("<Q")


class Signature:
    """Chunks in order: ``lengths`` in bytes, ``hashes`` of ``HASH_SIZE`` bytes each, one behind the other."""

    def __init__(self, lengths: array[int], hashes: bytes) -> None:
        self.lengths = lengths
        self.hashes = hashes

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return sum(self.lengths)

    def chunks(self) -> Iterator[tuple[int, int, bytes]]:
        """Yield (offset, length, hash) of each chunk."""
        offset = 0
        for number, length in enumerate(self.lengths):
            yield offset, length, self.hashes[number * HASH_SIZE : (number + 1) * HASH_SIZE]
            offset += length


def encode(signature: Signature) -> bytes:
    """Return the bytes of a signature."""
    body = b"".join(_CHUNK.pack(length, digest) for _, length, digest in signature.chunks())
    return MAGIC + _COUNT.pack(len(signature)) + body


def decode(data: bytes) -> Signature:
    """Read a signature.

    Raises:
        FormatError: it is none, or not whole.
    """
    head = len(MAGIC) + _COUNT.size
    if data[: len(MAGIC)] != MAGIC or len(data) < head:
        raise FormatError(
            "A signature can't be read", "it does not begin as one", "It is made anew at the next change."
        )
    (count,) = _COUNT.unpack_from(data, len(MAGIC))
    if len(data) != head + count * _CHUNK.size:
        raise FormatError("A signature can't be read", "it is not whole", "It is made anew at the next change.")
    lengths, hashes = array("I"), []
    for length, digest in _CHUNK.iter_unpack(data[head:]):
        lengths.append(length)
        hashes.append(digest)
    return Signature(lengths, b"".join(hashes))
