"""How a stream of stored bytes is cut into objects (segments) and parts, whatever its length turns out to be.

S3 takes at most 10,000 parts of 5 MiB to 5 GiB in one upload: 48.8 TiB. Nobody knows how long a dump will be, so
parts start small, for small backups to be sent in parallel, and grow by steps. Where an upload is full, or where a
provider wants equal parts or allows few, the stream goes on in a further object, its next *segment*: there is no
length at which a backup ends with an error.

Two shapes:

- *growing*: part sizes double within the upload. A stream of unknown length doubles after every 500 parts and has
  28 TiB in its first object. Each part below 5 GiB costs the upload's reach what it lacks of 5 GiB, so an upload
  that is to hold all 48.8 TiB can't begin with small parts: it takes a length known beforehand (a file's), for
  which the gentlest growth that holds it is chosen, and equal parts at the very end.
- *equal*: all parts of a segment have one size; sizes double from segment to segment.

The last part of a segment is as small as it comes. Segments hold whole frames; parts are cut anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from backhaul.model.profile import Limits

FIRST_SIZE = 8 << 20
# Growing: parts until the size doubles. The gentlest one that holds a stream of known length is taken.
STEPS = (1000, 500)
# Fewer parts than this are too few to grow within.
FEWEST_TO_GROW = 10_000
# Equal: parts of a segment while sizes still grow from segment to segment, and the largest size.
EQUAL_PARTS = 1000
EQUAL_LARGEST = 64 << 20
_ROUND = 1 << 20


class PartLayout(msgspec.Struct, frozen=True, kw_only=True):
    """Where segments and parts end. Numbers count from 1; sizes in bytes.

    Attributes:
        first: the size of the first part of the first segment.
        step: parts after which the size doubles within an upload; 0 where all parts of a segment are equal.
        growing_segments: whether equal parts double from segment to segment.
        largest: the largest part.
        max_parts: most parts of a segment.
        max_object: most bytes of a segment.
        numbered: whether the first segment's name has a number too.
    """

    first: int
    step: int
    growing_segments: bool
    largest: int
    max_parts: int
    max_object: int
    numbered: bool

    def part_size(self, segment: int, number: int) -> int:
        """Return the size of a part that is not its segment's last."""
        doublings = (number - 1) // self.step if self.step else segment - 1 if self.growing_segments else 0
        # (A shift by more than this is past every largest size, and would only make huge numbers.)
        return min(self.first << min(doublings, 40), self.largest)

    def capacity(self, segment: int) -> int:
        """Return the bytes that a segment can hold."""
        if self.step:
            total = sum(count * size for count, size in self._runs(segment))
        else:
            size = self.part_size(segment, 1)
            fewer = self.growing_segments and size < self.largest
            total = size * (min(self.max_parts, EQUAL_PARTS) if fewer else self.max_parts)
        return min(total, self.max_object)

    def largest_part(self, stored_size: int) -> int:
        """Return the largest part that a stream of that many bytes reaches; for the memory formula."""
        segment, left = 1, stored_size
        largest = self.first
        while True:
            here = min(left, self.capacity(segment))
            taken = 0
            for count, size in self._runs(segment):
                if taken >= here:
                    break
                largest = max(largest, size)
                taken += count * size
            left -= here
            if left <= 0 or largest == self.largest:
                return largest
            segment += 1

    def _runs(self, segment: int) -> Iterator[tuple[int, int]]:
        """Yield (count, size) of the runs of equal parts that fill a segment."""
        if not self.step:
            yield self.max_parts, self.part_size(segment, 1)
            return
        number = 1
        while number <= self.max_parts:
            size = self.part_size(segment, number)
            count = self.max_parts - number + 1 if size == self.largest else min(self.step, self.max_parts - number + 1)
            yield count, size
            number += count


def plan_layout(limits: Limits, *, at_most: int | None = None, max_part: int | None = None) -> PartLayout:
    """Choose how a stream is cut, before its first byte.

    Args:
        limits: the provider's.
        at_most: stored bytes that the stream certainly does not exceed; None if nobody knows.
        max_part: the operator's own bound on part sizes (and so on memory), or None.
    """
    largest = min(limits.max_part, max_part or limits.max_part)
    # Below the provider's least size there is no legal part, whatever the operator wished.
    largest = max(largest, limits.min_part)
    first = max(min(FIRST_SIZE, largest), limits.min_part)
    if limits.equal_parts or limits.max_parts < FEWEST_TO_GROW:
        top = max(first, min(EQUAL_LARGEST, largest))
        while first < top and at_most is not None and first * limits.max_parts < min(at_most, limits.max_object):
            first = min(2 * first, top)
        return PartLayout(
            first=first,
            step=0,
            growing_segments=True,
            largest=top,
            max_parts=limits.max_parts,
            max_object=limits.max_object,
            numbered=True,
        )

    def growing(size: int, step: int) -> PartLayout:
        return PartLayout(
            first=size,
            step=step,
            growing_segments=False,
            largest=largest,
            max_parts=limits.max_parts,
            max_object=limits.max_object,
            numbered=False,
        )

    wanted = limits.max_object if at_most is None else min(at_most, limits.max_object)
    for step in STEPS:
        layout = growing(first, step)
        if layout.capacity(1) >= wanted:
            return layout
    if at_most is None:
        return growing(first, STEPS[-1])
    even = -(-wanted // limits.max_parts)
    return growing(min(largest, max(first, -(-even // _ROUND) * _ROUND)), 0)
