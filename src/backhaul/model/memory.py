"""The bound of a run's memory."""

from __future__ import annotations

import msgspec


class MemoryBound(msgspec.Struct, frozen=True, kw_only=True):
    """The most memory a run may use: the formula's terms in bytes, and their sum."""

    terms: dict[str, int]
    total: int
