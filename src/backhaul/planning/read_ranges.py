"""Which bytes of an object to fetch at once, and which of them to decode at once: whole frames, side by side."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

import msgspec

from backhaul.formats.seekable import SeekTable

# The first range is at most this part of what one may be, and each after it twice as much: whoever waits for the first
# bytes has them soon, also over a slow line, which all that is fetched at once shares.
_FIRST = 8


class ReadRange(msgspec.Struct, frozen=True):
    """``length`` stored bytes from ``offset``, which decode to ``raw_length`` bytes at ``raw_offset``.

    ``first_frame`` and ``frames`` say which frames those are; a stream without frames has ``frames == 0``.
    """

    offset: int
    length: int
    raw_offset: int
    raw_length: int
    first_frame: int = 0
    frames: int = 0


def framed_ranges(table: SeekTable, max_stored: int) -> Iterator[ReadRange]:
    """Cut a framed stream into what is fetched at once: whole frames, within the limit where a frame allows it."""
    first, limit = 0, -(-max_stored // _FIRST)
    while first < len(table):
        part = _frames_within(table, first, len(table), table.stored_offsets, limit)
        yield part
        first, limit = first + part.frames, min(2 * limit, max_stored)


def framed_pieces(table: SeekTable, part: ReadRange, max_raw: int) -> Iterator[ReadRange]:
    """Cut a range into what is decoded at once, within the limit where a frame allows it.

    It is a limit of its own, since data that compresses well decodes to many times what was fetched.
    """
    first, end = part.first_frame, part.first_frame + part.frames
    while first < end:
        piece = _frames_within(table, first, end, table.raw_offsets, max_raw)
        yield piece
        first += piece.frames


def _frames_within(table: SeekTable, first: int, end: int, offsets: Sequence[int], limit: int) -> ReadRange:
    """Return the frames from ``first`` on, before ``end``, that the limit allows by those offsets; at least one."""
    last = bisect.bisect_right(offsets, offsets[first] + limit) - 1
    last = max(first + 1, min(last, end))
    stored, raw = table.stored_offsets, table.raw_offsets
    return ReadRange(
        stored[first],
        stored[last] - stored[first],
        raw[first],
        raw[last] - raw[first],
        first_frame=first,
        frames=last - first,
    )


def plain_ranges(size: int, max_length: int) -> Iterator[ReadRange]:
    """Cut a stream that was stored as it is into ranges."""
    offset, limit = 0, -(-max_length // _FIRST)
    while offset < size:
        length = min(limit, size - offset)
        yield ReadRange(offset, length, offset, length)
        offset, limit = offset + length, min(2 * limit, max_length)
