"""Rates by the time of day: ``40M``, or ``08:00-18:00=5M,40M``; a pure table, asked with a wall-clock time.

Entries are looked at in their order, and the first one that holds counts; an entry without hours holds always.
Hours are those of the clock on the wall, from the first minute up to but without the last; ``22:00-06:00``
passes midnight. ``off`` is no limit. Where nothing holds there is no limit.
"""

from __future__ import annotations

import datetime as dt
import re

import msgspec

from backhaul.errors import UsageError
from backhaul.formats.quantities import parse_rate

_HOURS = re.compile(r"(\d{1,2}):(\d{2})-(\d{1,2}):(\d{2})", re.ASCII)


class Hours(msgspec.Struct, frozen=True):
    """One entry: minutes of the day, and bytes a second (None: no limit). ``start == end`` is the whole day."""

    start: int
    end: int
    rate: int | None


class Timetable(msgspec.Struct, frozen=True):
    """Entries in the order in which they count."""

    entries: tuple[Hours, ...]

    def rate_at(self, time: dt.datetime) -> int | None:
        """Return the bytes a second that are allowed at a wall-clock time; None for no limit."""
        minute = time.hour * 60 + time.minute
        for entry in self.entries:
            if entry.start < entry.end:
                holds = entry.start <= minute < entry.end
            else:
                holds = minute >= entry.start or minute < entry.end
            if holds:
                return entry.rate
        return None

    @property
    def slowest(self) -> int | None:
        """The lowest rate of all, None if there is none."""
        return min((entry.rate for entry in self.entries if entry.rate is not None), default=None)


def parse_timetable(text: str) -> Timetable:
    """Read a rate, or rates with hours.

    Raises:
        UsageError: an entry can't be read, or can never hold.
    """
    entries: list[Hours] = []
    for item in text.split(","):
        hours, equals, rate = item.strip().rpartition("=")
        if entries and entries[-1].start == entries[-1].end:
            raise UsageError(
                f"{text!r} holds a rate that never counts",
                f"{item.strip()!r} comes after one that holds all day",
                "Put the hours first, and the rate for the rest of the day last: 08:00-18:00=5M,40M",
            )
        start, end = _parse_hours(hours, text) if equals else (0, 0)
        entries.append(Hours(start, end, None if rate.strip().lower() == "off" else parse_rate(rate)))
    return Timetable(tuple(entries))


def _parse_hours(text: str, whole: str) -> tuple[int, int]:
    match = _HOURS.fullmatch(text.strip())
    if match is not None:
        hours = [int(group) for group in match.groups()]
        start, end = 60 * hours[0] + hours[1], 60 * hours[2] + hours[3]
        if hours[1] < 60 and hours[3] < 60 and start < 1440 and end <= 1440 and start != end % 1440:
            return start, end % 1440 if end == 1440 and start == 0 else end
    raise UsageError(
        f"{whole!r} is not a limit", f"{text!r} are no hours", "Write e.g. 40M, or 08:00-18:00=5M,22:00-06:00=off,40M"
    )
