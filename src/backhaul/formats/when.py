"""``@WHEN``: an id, ``latest``, or a date or time. Times without a zone are UTC, as ids are."""

from __future__ import annotations

import datetime as dt

import msgspec

from backhaul.errors import UsageError
from backhaul.formats.names import is_backup_id


class When(msgspec.Struct, frozen=True):
    """Which backup is meant: exactly ``id``, or the newest that started at or before ``at``, or the newest."""

    id: str | None = None
    at: dt.datetime | None = None


def parse_when(text: str) -> When:
    """Read what follows the ``@``. A date without a time means its whole day.

    Raises:
        UsageError: it is none of the three.
    """
    if text == "latest":
        return When()
    if is_backup_id(text):
        return When(id=text)
    try:
        at = _end_of_day(text) or dt.datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(
            f"{text!r} is no backup id and no time",
            "WHEN is 'latest', an id, or a date or time (UTC unless it names a zone)",
            "Write e.g. @20261121T020000Z, @2026-11-21 or @2026-11-21T04:30.",
        ) from None
    return When(at=at if at.tzinfo is not None else at.replace(tzinfo=dt.UTC))


def _end_of_day(text: str) -> dt.datetime | None:
    try:
        return dt.datetime.combine(dt.date.fromisoformat(text), dt.time.max, tzinfo=dt.UTC)
    except ValueError:
        return None
