"""Which bytes of an object to fetch, so that whole frames come and can be decoded side by side."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from backhaul.formats.seekable import SeekTable


class ReadRange(msgspec.Struct, frozen=True):
    """One request: ``length`` stored bytes from ``offset``, which decode to ``raw_length`` bytes at ``raw_offset``.

    ``first_frame`` and ``frames`` say which frames those are; a stream without frames has ``frames == 0``.
    """

    offset: int
    length: int
    raw_offset: int
    raw_length: int
    first_frame: int = 0
    frames: int = 0


def framed_ranges(table: SeekTable, max_stored: int, max_raw: int) -> Iterator[ReadRange]:
    """Cut a framed stream into ranges of whole frames, each within both limits where a frame allows it.

    Both limits matter: the stored one bounds a request, the raw one bounds the memory for what it decodes
    to, which for data that compresses well is many times more.
    """
    first = 0
    while first < len(table):
        last = first
        stored = raw = 0
        while last < len(table):
            stored += table.stored_sizes[last]
            raw += table.raw_sizes[last]
            if last > first and (stored > max_stored or raw > max_raw):
                stored -= table.stored_sizes[last]
                raw -= table.raw_sizes[last]
                break
            last += 1
        yield ReadRange(
            table.stored_offsets[first],
            stored,
            table.raw_offsets[first],
            raw,
            first_frame=first,
            frames=last - first,
        )
        first = last


def plain_ranges(size: int, max_length: int) -> Iterator[ReadRange]:
    """Cut a stream that was stored as it is into ranges of equal length."""
    for offset in range(0, size, max_length):
        length = min(max_length, size - offset)
        yield ReadRange(offset, length, offset, length)
