"""The seek table of the *Zstandard seekable format*, version 0.1.0 (zstd, contrib/seekable_format).

A seekable stream is independent Zstandard frames followed by one skippable frame::

    u32le 0x184D2A5E | u32le length of what follows
    per frame: u32le stored size, u32le raw size [, u32le low half of XXH64]
    u32le number of frames | u8 descriptor (bit 7: checksums present) | u32le 0x8F92EAB1

An ordinary decoder skips that frame, so the stream decodes with ``zstd -d``. The frames carry their own
content checksums, so tables are written without; tables with checksums (from other writers) are read.

This module must not know where frames come from or lie: offsets here count from the stream's start.
"""

from __future__ import annotations

import bisect
import itertools
import struct
from array import array

from backhaul.errors import FormatError

SKIPPABLE_MAGIC = 0x184D2A5E
SEEKABLE_MAGIC = 0x8F92EAB1
HEADER_SIZE = 8
FOOTER_SIZE = 9
ENTRY_SIZE = 8
MAX_FRAMES = 0x8000000
_CHECKSUM_FLAG = 0x80
_RESERVED_BITS = 0x7C


class SeekTable:
    """The stored and raw sizes of every frame, in order; 8 bytes of memory a frame while it is written.

    Cumulative offsets are made on first use (16 bytes a frame more).
    """

    def __init__(self) -> None:
        self.stored_sizes = array("I")
        self.raw_sizes = array("I")
        self._stored_offsets: list[int] | None = None
        self._raw_offsets: list[int] | None = None

    def append(self, stored_size: int, raw_size: int) -> None:
        """Add the next frame.

        Raises:
            FormatError: the table is full (2**27 frames), which 512 TiB of 4 MiB frames reach.
        """
        if len(self.stored_sizes) >= MAX_FRAMES:
            raise FormatError(
                "The stream has too many frames for its seek table",
                f"the format ends at {MAX_FRAMES}",
                "Split the dump into several streams.",
            )
        self.stored_sizes.append(stored_size)
        self.raw_sizes.append(raw_size)
        self._stored_offsets = self._raw_offsets = None

    def __len__(self) -> int:
        return len(self.stored_sizes)

    @property
    def stored_offsets(self) -> list[int]:
        """Where each frame begins in the object, and at the end where the last one ends."""
        if self._stored_offsets is None:
            self._stored_offsets = list(itertools.accumulate(self.stored_sizes, initial=0))
        return self._stored_offsets

    @property
    def raw_offsets(self) -> list[int]:
        """Where each frame's content begins in the raw stream, and at the end the raw size."""
        if self._raw_offsets is None:
            self._raw_offsets = list(itertools.accumulate(self.raw_sizes, initial=0))
        return self._raw_offsets

    @property
    def stored_size(self) -> int:
        """Bytes of all frames, without the table itself."""
        return self.stored_offsets[-1]

    @property
    def raw_size(self) -> int:
        """Bytes of the decoded stream."""
        return self.raw_offsets[-1]

    def frame_at(self, raw_offset: int) -> int:
        """Return the index of the frame that holds the raw byte at that offset (0 <= offset < raw size)."""
        return bisect.bisect_right(self.raw_offsets, raw_offset) - 1


def table_size(frames: int) -> int:
    """Return the bytes of the skippable frame for that many frames."""
    return HEADER_SIZE + ENTRY_SIZE * frames + FOOTER_SIZE


def encode(table: SeekTable) -> bytes:
    """Return the skippable frame that ends a seekable stream."""
    entries = array("I", bytes(ENTRY_SIZE * len(table)))
    entries[0::2] = table.stored_sizes
    entries[1::2] = table.raw_sizes
    body = entries.tobytes() if _little_endian() else _swapped(entries)
    return (
        struct.pack("<II", SKIPPABLE_MAGIC, len(body) + FOOTER_SIZE)
        + body
        + struct.pack("<IBI", len(table), 0, SEEKABLE_MAGIC)
    )


def decode(data: bytes | bytearray | memoryview) -> SeekTable:
    """Read the skippable frame that ``encode`` or another writer of the format made.

    Raises:
        FormatError: it is not one, or contradicts itself.
    """
    if len(data) < HEADER_SIZE + FOOTER_SIZE:
        raise _broken(f"{len(data)} bytes are too few")
    magic, length = struct.unpack_from("<II", data, 0)
    frames, descriptor, footer_magic = struct.unpack_from("<IBI", data, len(data) - FOOTER_SIZE)
    if magic != SKIPPABLE_MAGIC or footer_magic != SEEKABLE_MAGIC:
        raise _broken(f"magic numbers {magic:#010x} and {footer_magic:#010x}")
    if descriptor & _RESERVED_BITS:
        raise _broken(f"reserved bits are set in the descriptor {descriptor:#04x}")
    entry_size = ENTRY_SIZE + (4 if descriptor & _CHECKSUM_FLAG else 0)
    if length != len(data) - HEADER_SIZE or frames * entry_size + FOOTER_SIZE != length:
        raise _broken(f"{frames} frames do not fit a length of {length}")
    entries = array("I")
    entries.frombytes(bytes(data[HEADER_SIZE : len(data) - FOOTER_SIZE]))
    if not _little_endian():
        entries.byteswap()
    step = entry_size // 4
    table = SeekTable()
    table.stored_sizes = entries[0::step]
    table.raw_sizes = entries[1::step]
    if any(size == 0 for size in table.stored_sizes):
        raise _broken("a frame of no bytes")
    return table


def _broken(why: str) -> FormatError:
    return FormatError("The seek table is damaged", why)


def _little_endian() -> bool:
    return array("H", [1]).tobytes()[0] == 1


def _swapped(entries: array[int]) -> bytes:
    swapped = entries[:]
    swapped.byteswap()
    return swapped.tobytes()
