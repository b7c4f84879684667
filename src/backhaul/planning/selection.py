"""Which backup ``@WHEN`` means."""

from __future__ import annotations

from collections.abc import Sequence

from backhaul.formats.names import parse_backup_id
from backhaul.formats.when import When


def select_backup(committed: Sequence[str], when: When) -> str | None:
    """Return the id that is meant among the committed ids (in any order), or None."""
    if when.id is not None:
        return when.id if when.id in committed else None
    if when.at is None:
        return max(committed, default=None)
    at = when.at
    return max((i for i in committed if (start := parse_backup_id(i)) is not None and start <= at), default=None)
