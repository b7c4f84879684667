"""When a job may run: its window, and the times that come of it."""

from __future__ import annotations

import datetime as dt

import msgspec

# What becomes of a run at the end of its window.
STOP_NEW, FINISH, ABORT = "stop-new", "finish", "abort"
AT_END = (STOP_NEW, FINISH, ABORT)
WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """The hours in which a job may run.

    Attributes:
        starts: when it opens, in minutes of the day by the clock on the wall, ascending; one or several a day.
        length: seconds that it stays open; it closes earlier where the next one opens.
        days: the days on which it opens, 0 for Monday; one that passes midnight belongs to the day it opened on.
        at_end: ``stop-new``: nothing new is begun, what was begun is finished; ``finish``: the run goes on to its end;
            ``abort``: the run is ended.
        jitter: most seconds that a run begins after the opening; how many is the same for a job every time.
        excluded: dates on which it does not open: ``2026-12-24``, or each year ``12-24``.
        timezone: the IANA name of the zone of that clock.
    """

    starts: tuple[int, ...]
    length: float
    days: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6)
    at_end: str = FINISH
    jitter: float = 0.0
    excluded: tuple[str, ...] = ()
    timezone: str = "UTC"


class Occurrence(msgspec.Struct, frozen=True, order=True):
    """One opening of a window: it ``opens``, the run ``begins`` (the jitter later), it ``closes``. Aware, UTC."""

    opens: dt.datetime
    begins: dt.datetime
    closes: dt.datetime

    @property
    def id(self) -> str:
        """What the records of runs call it: its opening, ISO in UTC."""
        return self.opens.strftime("%Y-%m-%dT%H:%M:%SZ")
