"""Content-defined chunks of a file: cut where the content says, so that what is moved or kept is found again.

The cuts are FastCDC's (Xia et al., 2020), as the library ``pyfastcdc`` makes them; they do not depend on the sizes in
which the file is fed. A chunk's name is the first 16 bytes of its BLAKE3.
"""

from __future__ import annotations

from array import array

from blake3 import blake3
from pyfastcdc import FastCDC

from backhaul.formats.signature import HASH_SIZE, Signature
from backhaul.transforms.digest import StreamDigest

AVERAGE, SMALLEST, LARGEST = 128 << 10, 32 << 10, 512 << 10


class Chunker:
    """Feed a file in order; ``finish`` gives its signature. ``digest`` is of the whole."""

    def __init__(self) -> None:
        self.digest = StreamDigest()
        self._cutter = FastCDC(AVERAGE, min_size=SMALLEST, max_size=LARGEST)
        self._rest = b""
        self._lengths = array("I")
        self._hashes: list[bytes] = []

    def feed(self, data: memoryview) -> None:
        """Take the next bytes."""
        self.digest.feed(data)
        self._cut(b"".join((self._rest, data)) if self._rest else bytes(data), final=False)

    def finish(self) -> Signature:
        """Return the signature of all that was fed."""
        self._cut(self._rest, final=True)
        self._rest = b""
        return Signature(self._lengths, b"".join(self._hashes))

    def _cut(self, data: bytes, *, final: bool) -> None:
        view = memoryview(data)
        done = 0
        for chunk in self._cutter.cut_buf(data):
            end = done + chunk.length
            if end == len(view) and not final and chunk.length < LARGEST:
                break  # the next bytes may belong to it
            self._lengths.append(chunk.length)
            self._hashes.append(blake3(view[done:end]).digest(HASH_SIZE))
            done = end
        self._rest = bytes(view[done:])
