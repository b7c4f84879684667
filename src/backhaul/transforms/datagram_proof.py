"""The proof in a datagram that its sender is of the session; the format is in ``formats.chunk``."""

from __future__ import annotations

from blake3 import blake3

from backhaul.formats import chunk
from backhaul.transforms.seal import SessionKeys

_SIZE = 8


class DatagramProof:
    """Makes what all of a chunk's datagrams begin with, and the proof of a probe."""

    def __init__(self, keys: SessionKeys) -> None:
        self._key = blake3(keys.key, derive_key_context=chunk.DATAGRAM_CONTEXT).digest()

    def prefix(self, number: int, size: int) -> bytes:
        """Return the header of a chunk's datagrams but for the place: 20 bytes."""
        proved = chunk.DATAGRAM_PROVED.pack(number, size)
        return chunk.DATAGRAM_MAGIC + blake3(proved, key=self._key).digest(length=_SIZE) + proved

    def probe(self, token: bytes, place: int) -> bytes:
        """Return a probe; the token is 16 bytes."""
        proof = blake3(token, key=self._key).digest(length=_SIZE)
        return chunk.PROBE.pack(chunk.PROBE_MAGIC, proof, token, place).ljust(chunk.DATAGRAM_SIZE, b"\0")

    def probe_token(self, data: bytes | bytearray | memoryview) -> bytes | None:
        """Return the token of a probe; None where it is none, or of another session."""
        if len(data) != chunk.DATAGRAM_SIZE:
            return None
        magic, proof, token, _ = chunk.PROBE.unpack_from(data)
        right: bool = proof == blake3(token, key=self._key).digest(length=_SIZE)
        return token if magic == chunk.PROBE_MAGIC and right else None
