"""Digests: feed bytes, take the result. BLAKE3 for identity, CRC64NVME for what S3 checks itself."""

from __future__ import annotations

import base64

from blake3 import blake3


class StreamDigest:
    """Size, BLAKE3 and CRC64NVME of a stream, fed in order."""

    def __init__(self, *, crc: bool = True) -> None:
        self._blake3 = blake3()
        self._with_crc = crc
        self._crc = 0
        self.size = 0

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes."""
        self._blake3.update(data)
        if self._with_crc:
            self._crc = crc64nvme(data, self._crc)
        self.size += len(data)

    @property
    def blake3(self) -> str:
        """The BLAKE3 so far, in lower-case hex."""
        return self._blake3.hexdigest()

    @property
    def crc64nvme(self) -> int:
        """The CRC64NVME so far (0 when made without)."""
        return self._crc


def crc64nvme(data: bytes | bytearray | memoryview, previous: int = 0) -> int:
    """Return the CRC64NVME of ``data``, continuing from that of what came before."""
    from awscrt import checksums  # takes 40 ms to load: listing a directory does without

    return int(checksums.crc64nvme(data, previous))


def combine_crc64nvme(first: int, second: int, second_length: int) -> int:
    """Return the CRC64NVME of two pieces joined, from theirs and the second one's length in bytes."""
    from awscrt import checksums  # (see above)

    return int(checksums.combine_crc64nvme(first, second, second_length))


def encode_crc64nvme(value: int) -> str:
    """Return a CRC64NVME as S3 writes it: base64 of 8 big-endian bytes."""
    return base64.b64encode(value.to_bytes(8, "big")).decode("ascii")


def decode_crc64nvme(text: str | None) -> int:
    """Read a CRC64NVME as S3 writes it; 0 for None, and for what is none."""
    try:
        return int.from_bytes(base64.b64decode(text or "", validate=True), "big")
    except ValueError:
        return 0
