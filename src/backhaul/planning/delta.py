"""How a changed file is composed: which ranges the store already has and copies itself, and which are sent.

The rules are S3's: every part but the last has at least ``min_part`` bytes, copied or sent; a part is one range of one
object, or bytes that are sent. So a short range of the new file between two long old ones drags some of its
neighbours' bytes with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from backhaul.model.mirror import PartPlan
from backhaul.model.profile import Limits

# A copy of this much takes a store some seconds; larger ones are cut, so that several go side by side.
LARGEST_COPY = 1 << 30
# A delta that saves less than this share of the file is not worth its requests.
LEAST_SAVED = 0.1


class Run(msgspec.Struct, frozen=True, gc=False):
    """A range of the new file that is ``size`` bytes of the object ``source`` from ``source_offset``, or is new."""

    offset: int
    size: int
    source: str = ""
    source_etag: str = ""
    source_offset: int = 0


def joined(runs: Iterable[Run]) -> list[Run]:
    """Join neighbours that are one range of one object, or both new."""
    result: list[Run] = []
    for run in runs:
        last = result[-1] if result else None
        if (
            last is not None
            and last.source == run.source
            and last.source_etag == run.source_etag
            and (not run.source or last.source_offset + last.size == run.source_offset)
        ):
            result[-1] = msgspec.structs.replace(last, size=last.size + run.size)
        else:
            result.append(run)
    return result


def compose(runs: Iterable[Run], size: int, limits: Limits, part_size: int) -> tuple[PartPlan, ...] | None:
    """Return the parts of the new file, or None where there is nothing to gain or the limits do not allow it.

    Args:
        runs: cover the new file from its beginning to its end, in order.
        size: of the new file.
        limits: the provider's.
        part_size: of what is sent.
    """
    if limits.equal_parts or size > limits.max_object:
        return None
    least = limits.min_part
    parts: list[PartPlan] = []
    begin = end = 0  # what is to be sent next; nothing where they are equal

    def send() -> None:
        parts.extend(_sent(begin, end, max(part_size, least), least, last=end == size))

    for run in joined(runs):
        offset, left = run.offset, run.size
        if not run.source:
            begin = offset if begin == end else begin
            end = offset + left
            continue
        if begin != end:  # a part that is sent must be long enough
            taken = min(max(0, begin + least - end), left)
            end, offset, left = end + taken, offset + taken, left - taken
        if left == 0:
            continue
        if left < least and offset + left < size:  # too short to be copied
            begin = offset if begin == end else begin
            end = offset + left
            continue
        if begin != end:
            send()
        begin = end = offset + left
        parts.extend(_copied(run, offset, left, min(LARGEST_COPY, limits.max_part), least))
    if begin != end:
        send()
    saved = sum(part.size for part in parts if part.source)
    if len(parts) > limits.max_parts or saved < max(least, size * LEAST_SAVED):
        return None
    return tuple(parts)


def to_send(parts: Sequence[PartPlan]) -> int:
    """Return the bytes that go over the line."""
    return sum(part.size for part in parts if not part.source)


def plain_parts(size: int, part_size: int) -> tuple[PartPlan, ...]:
    """Return the parts of a file that is sent as a whole; equal but for the last."""
    return tuple(PartPlan(offset, min(part_size, size - offset)) for offset in range(0, size, part_size))


def _even(size: int, most: int, least: int) -> list[int]:
    """Cut into about equal pieces of at most ``most``, each at least ``least`` if the whole is."""
    count = -(-size // most)
    while count > 1 and size // count < least:
        count -= 1
    base, extra = divmod(size, count)
    return [base + (number < extra) for number in range(count)]


def _sent(begin: int, end: int, part_size: int, least: int, *, last: bool) -> Iterable[PartPlan]:
    if last:
        yield from (PartPlan(begin + part.offset, part.size) for part in plain_parts(end - begin, part_size))
        return
    for size in _even(end - begin, part_size, least):
        yield PartPlan(begin, size)
        begin += size


def _copied(run: Run, offset: int, size: int, most: int, least: int) -> Iterable[PartPlan]:
    for piece in _even(size, most, least):
        yield PartPlan(offset, piece, run.source, run.source_etag, run.source_offset + offset - run.offset)
        offset += piece
