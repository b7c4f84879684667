"""What a receiver of a multicast tells its sender, again and again: what is here, and what is missing."""

from __future__ import annotations

from typing import Annotated

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0)]


class Gap(msgspec.Struct, frozen=True, array_like=True):
    """What is missing of one chunk: ranges of pieces as (first place, count); none if nothing of it is here."""

    number: Count
    ranges: tuple[tuple[Count, Count], ...] = ()


class Reception(msgspec.Struct, frozen=True, array_like=True):
    """How far a receiver is.

    Attributes:
        next: all chunks below this number are here, and verified.
        judged: what is missing of the chunks below this number is known: nothing of them is still on its way for the
            first time.
        lost: pieces that did not come by themselves, of all chunks below ``judged``; it only grows.
        missing: what should be sent again, lowest chunk first; there may be more than it lists.
        damaged: chunks that were put together and were not as they were sealed: they are wanted over TCP.
    """

    next: Count
    judged: Count = 0
    lost: Count = 0
    missing: tuple[Gap, ...] = ()
    damaged: tuple[Count, ...] = ()
