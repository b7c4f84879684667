"""Times that come again, as timers and crontabs can say them."""

from __future__ import annotations

import msgspec

EVERY_DAY = (0, 1, 2, 3, 4, 5, 6)


class CalendarTime(msgspec.Struct, frozen=True, order=True):
    """A minute of some hours on some days by the clock of a zone.

    Attributes:
        timezone: the IANA name of the zone.
        hours: ascending; ``minute``: of each of them.
        days: the days of the week, 0 for Monday.
        month: 1 to 12, 0 for each; ``first`` to ``last``: the days of that month.
        date: the one date, ISO, that it is of; then ``days`` and ``month`` say nothing.
    """

    timezone: str
    hours: tuple[int, ...]
    minute: int
    days: tuple[int, ...] = EVERY_DAY
    month: int = 0
    first: int = 1
    last: int = 31
    date: str = ""
