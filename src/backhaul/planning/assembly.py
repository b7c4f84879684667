"""Chunks from their pieces, which come in any order, twice, wrong or not at all.

Pure: it knows no datagram, socket or clock. What it holds is bounded by a window of chunk numbers, from the next one
that is wanted, and by bytes: whatever is outside allocates nothing. A piece that is here is never written again.
"""

from __future__ import annotations

from collections.abc import Sequence

from backhaul.formats.chunk import DATAGRAM, DATAGRAM_SIZE, HEADER_SIZE, LARGEST_BODY, PIECE_SIZE, TAG_SIZE
from backhaul.model.reception import Gap
from backhaul.planning import parity as parities

LARGEST_CHUNK = HEADER_SIZE + LARGEST_BODY
_MOST_PIECES = -(-LARGEST_CHUNK // PIECE_SIZE)
_ONES = memoryview(b"\1" * _MOST_PIECES)
_SLICES = [slice(place * PIECE_SIZE, (place + 1) * PIECE_SIZE) for place in range(_MOST_PIECES)]
_SLOTS = [
    slice(start + DATAGRAM.size, start + DATAGRAM_SIZE)
    for start in range(0, _MOST_PIECES * DATAGRAM_SIZE, DATAGRAM_SIZE)
]
# Buffers of chunks that are whole are kept for those to come: fresh megabytes cost page faults.
_MOST_SPARE = 4
# A chunk that nothing is known of counts as so many lost pieces until one of another size was seen.
_USUAL_PIECES = 1


def piece_count(size: int) -> int:
    """Return into how many pieces a chunk of so many bytes is cut."""
    return -(-size // PIECE_SIZE)


def piece_length(size: int, place: int) -> int:
    """Return the bytes of the piece at that place."""
    return min(PIECE_SIZE, size - place * PIECE_SIZE)


def frames_size(size: int) -> int:
    """Return the bytes of the datagrams of a chunk of so many bytes, were the last one as long as the others."""
    return piece_count(size) * DATAGRAM_SIZE


def pieces_of(chunk: memoryview, place: int, count: int) -> list[memoryview]:
    """Return so many of a chunk's pieces, from a place on, as views of it.

    A chunk's pieces are made a batch at a time, by no Python code: as many objects as a chunk has, kept as long as it
    is, would also have the garbage collector come by all the time.
    """
    return list(map(chunk.__getitem__, _SLICES[place : place + count]))


class PartialChunk:
    """A chunk, as far as its pieces are here: a place for each of its datagrams, header and piece, side by side.

    Attributes:
        number, size, pieces: which it is, its bytes and how many pieces they are.
        left: pieces that are not here.
        top: one more than the highest place of those that are here.
        frames: ``DATAGRAM_SIZE`` bytes for each datagram, for whoever puts several there directly and then says so by
            ``arrived``. The headers there are nobody's.
    """

    def __init__(self, number: int, size: int, parity: int = 0, buffer: bytearray | None = None) -> None:
        self.number = number
        self.size = size
        self.pieces = self.left = piece_count(size)
        self.top = 0
        self.buffer = bytearray(frames_size(size)) if buffer is None else buffer
        self.frames = memoryview(self.buffer)[: frames_size(size)]
        self._here = bytearray(self.pieces)
        self._parity = parity
        self._parity_pieces: dict[int, bytes] = {}

    def room(self, place: int, most: int) -> int:
        """Return how many pieces in a row, from that place on and at most ``most``, are not here."""
        end = min(self.pieces, place + most)
        taken = self._here.find(1, place, end)
        return (end if taken < 0 else taken) - place

    def arrived(self, place: int, count: int) -> None:
        """Note that so many pieces, none of which was here (``room``), were put into their slots."""
        end = place + count
        self._here[place:end] = _ONES[:count]
        self.left -= count
        self.top = max(self.top, end)

    def put(self, place: int, data: memoryview) -> bool:
        """Put in a piece, or a parity piece; tell whether it was a new one.

        Raises:
            ValueError: the chunk has no such piece, or not of that length.
        """
        if place >= self.pieces:
            return self._put_parity(place, data)
        slot = self._slot(place)
        if len(data) != len(slot):
            raise ValueError(f"piece {place} of {len(data)} bytes")
        if self._here[place]:
            return False
        slot[:] = data
        self.arrived(place, 1)
        if self._parity_pieces:
            self._recover(place % parities.stride(self.pieces, self._parity))
        return True

    def holes(self, start: int, end: int) -> int:
        """Return how many pieces from one place to before another are not here."""
        return self._here.count(0, start, end)

    def missing(self, end: int, most: int) -> tuple[tuple[int, int], ...]:
        """Return the ranges that are not here before the place ``end``, at most so many, as (first place, count)."""
        ranges: list[tuple[int, int]] = []
        end = min(end, self.pieces)
        start = self._here.find(0, 0, end)
        while start >= 0 and len(ranges) < most:
            stop = self._here.find(1, start, end)
            stop = end if stop < 0 else stop
            ranges.append((start, stop - start))
            start = self._here.find(0, stop, end)
        return tuple(ranges)

    def take(self) -> bytearray:
        """Return the chunk's bytes, once none is left."""
        pieces = list(map(self.frames.__getitem__, _SLOTS[: self.pieces]))
        pieces[-1] = self._slot(self.pieces - 1)
        return bytearray().join(pieces)

    def _slot(self, place: int) -> memoryview:
        start = place * DATAGRAM_SIZE + DATAGRAM.size
        return self.frames[start : start + piece_length(self.size, place)]

    def _put_parity(self, place: int, data: memoryview) -> bool:
        column = place - self.pieces
        if not self._parity or column >= parities.stride(self.pieces, self._parity) or len(data) != PIECE_SIZE:
            raise ValueError(f"parity piece {column} of {len(data)} bytes")
        if column in self._parity_pieces or not self.left:
            return False
        self._parity_pieces[column] = bytes(data)
        self._recover(column)
        return True

    def _recover(self, column: int) -> None:
        places = parities.column(column, self.pieces, self._parity)
        gone = [place for place in places if not self._here[place]]
        if len(gone) != 1 or column not in self._parity_pieces:
            return
        others = [self._slot(place) for place in places if place != gone[0]]
        slot = self._slot(gone[0])
        slot[:] = parities.recover(others, self._parity_pieces.pop(column), len(slot))
        self.arrived(gone[0], 1)


class Assembly:
    """The chunks of a session that are on their way.

    The memory is at most ``memory`` bytes for the datagrams of chunks that are not whole, and buffers for more of them,
    and a chunk more if that alone is larger: the next one is always let in, or nothing would ever move again; the
    highest ones are given up for it.

    Args:
        window: so many chunk numbers, from the next one on, are taken.
        memory: bytes.
        parity: how many pieces have one parity piece; 0 for none.

    Attributes:
        next: chunks below are here and verified.
        window: as it was given.
        highest: one more than the highest piece that was seen, as (number, place).
        lost: as a ``Reception`` has it.
    """

    def __init__(self, window: int, memory: int, *, parity: int = 0) -> None:
        self.next = 0
        self.highest = (0, 0)
        self.lost = 0
        self._judged = (0, 0)
        self.window = window
        self._memory = memory
        self._parity = parity
        self._used = 0
        self._spare: list[bytearray] = []
        self._open: dict[int, PartialChunk] = {}
        self._whole: set[int] = set()
        self._damaged: set[int] = set()
        self._usual = _USUAL_PIECES

    @property
    def used(self) -> int:
        """Bytes of the buffers of chunks that are not whole."""
        return self._used

    @property
    def judged(self) -> int:
        """All below this chunk was judged, as a ``Reception`` has it."""
        return self._judged[0]

    @property
    def damaged(self) -> tuple[int, ...]:
        """The chunks that are wanted afresh, over TCP."""
        return tuple(sorted(self._damaged))

    def is_open(self, number: int) -> bool:
        """Tell whether pieces of that chunk are held."""
        return number in self._open

    def wants(self, number: int) -> bool:
        """Tell whether pieces of that chunk are of use."""
        return (
            self.next <= number < self.next + self.window and number not in self._whole and number not in self._damaged
        )

    def chunk(self, number: int, size: int) -> PartialChunk | None:
        """Return the chunk to put pieces into; None where it is not wanted, of another size, or there is no room."""
        chunk = self._open.get(number)
        if chunk is not None:
            return chunk if chunk.size == size else None
        if not HEADER_SIZE + TAG_SIZE <= size <= LARGEST_CHUNK or not self.wants(number):
            return None
        need = frames_size(size)
        while self._used + need > self._memory and self._open:
            top = max(self._open)
            if number != self.next or top == number:
                return None
            self._drop(top)
        chunk = self._open[number] = PartialChunk(number, size, self._parity, self._buffer(need))
        self._usual = chunk.pieces
        return chunk

    def _buffer(self, need: int) -> bytearray:
        """Return a buffer of at least so many bytes: a spare one that there is memory for, or a new one."""
        most = max(need, min(2 * need, self._memory - self._used))
        buffer = min((one for one in self._spare if need <= len(one) <= most), key=len, default=None)
        if buffer is None:
            buffer = bytearray(need)
        else:
            self._spare = [one for one in self._spare if one is not buffer]
        self._used += len(buffer)
        while self._spare and self._used + sum(map(len, self._spare)) > self._memory:
            self._spare.pop(0)
        return buffer

    def seen(self, number: int, place: int) -> None:
        """Note that a piece of that place came, or (place 0) that the chunks below that number were all sent."""
        self.highest = max(self.highest, (min(number, self.next + self.window), place))

    def whole(self, chunk: PartialChunk) -> bytearray:
        """Return a chunk's bytes, none of whose pieces is left; pieces of it are not taken any more."""
        self.complete(chunk.number)
        return chunk.take()

    def complete(self, number: int) -> None:
        """Note that a chunk is here, from wherever: pieces of it are not taken any more."""
        self._drop(number)
        self._damaged.discard(number)
        if number >= self.next:
            self._whole.add(number)

    def set_next(self, number: int) -> None:
        """Note that all chunks below are here and verified; those are forgotten."""
        if number <= self.next:
            return
        self.next = number
        for old in [old for old in self._open if old < number]:
            self._drop(old)
        self._whole = {old for old in self._whole if old >= number}
        self._damaged = {old for old in self._damaged if old >= number}

    def refetch(self, number: int) -> None:
        """Note that a chunk was damaged: it is wanted again, and no more from pieces that anyone may have made."""
        self._drop(number)
        self._whole.discard(number)
        if self.next <= number < self.next + self.window:
            self._damaged.add(number)

    def judge(self, before: tuple[int, int]) -> None:
        """Count what is missing up to a piece, all of which should be here by now: it was lost."""
        number, start = self._judged
        while (number, start) < before:
            chunk = self._open.get(number)
            end = before[1] if number == before[0] else (chunk.pieces if chunk is not None else self._usual)
            if chunk is not None:
                self.lost += chunk.holes(start, end)
            elif self.wants(number):
                self.lost += max(0, end - start)
            if number == before[0]:
                start = end
                break
            number, start = number + 1, 0
        self._judged = (number, start)

    def missing(self, before: tuple[int, int], most: int) -> tuple[Gap, ...]:
        """Return what is missing before a piece, the lowest chunk first, in at most ``most`` ranges."""
        gaps: list[Gap] = []
        number, place = before
        for at in range(self.next, min(number + 1, self.next + self.window)):
            if most <= 0:
                break
            chunk = self._open.get(at)
            if chunk is not None:
                ranges = chunk.missing(place if at == number else chunk.pieces, most)
                if ranges:
                    gaps.append(Gap(at, ranges))
                    most -= len(ranges)
            elif at < number and self.wants(at):
                gaps.append(Gap(at))
                most -= 1
        return tuple(gaps)

    def _drop(self, number: int) -> None:
        chunk = self._open.pop(number, None)
        if chunk is not None:
            self._used -= len(chunk.buffer)
            self._spare = [*self._spare[1 - _MOST_SPARE :], chunk.buffer]


def places(ranges: Sequence[tuple[int, int]], pieces: int) -> int:
    """Return ranges of places as a number with a bit for each place; what is beyond the chunk's pieces is left out."""
    if not ranges:
        return (1 << pieces) - 1
    bits = 0
    for first, count in ranges:
        end = min(first + count, pieces)
        if first < end:
            bits |= ((1 << (end - first)) - 1) << first
    return bits
