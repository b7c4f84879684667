"""The begin times of a window as a timer or a crontab has them: by the clock on the wall, without knowing the past.

``windows.occurrences`` counts time that passes, a calendar only what the clock shows, and it knows no exceptions. On
all but a few days a year that is the same. The days of the clock's changes, on which a time is skipped, shown twice,
or further from the opening than on others, have calendar times of their own (``changed_times``). Dates on which a
window does not open are no matter of the calendar: the run itself skips them.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from zoneinfo import ZoneInfo

import msgspec

from backhaul.model.calendar import CalendarTime
from backhaul.model.schedule import Window
from backhaul.planning import windows

# The Gregorian calendar has each date on each weekday within 28 years: what is a rule in these is a rule. Constants,
# so that what is written for a window is the same whenever it is written.
_FIRST_YEAR, _YEARS = 2026, 28
_DAY = dt.timedelta(days=1)
_MINUTE = dt.timedelta(minutes=1)
_WEEK = 7 * 24 * 60


def usual_times(window: Window, key: str) -> tuple[CalendarTime, ...]:
    """Return when a job begins by the clock of its window's zone, in all weeks without a change of the clock.

    Args:
        window: when it opens.
        key: what the jitter is made of, see ``windows.jitter``.
    """
    days: dict[int, set[int]] = defaultdict(set)
    for weekday, minute in _usual(window, key):
        days[minute].add(weekday)
    hours: dict[tuple[int, tuple[int, ...]], list[int]] = defaultdict(list)
    for minute in sorted(days):
        hours[minute % 60, tuple(sorted(days[minute]))].append(minute // 60)
    return tuple(sorted(CalendarTime(window.timezone, tuple(hours[each]), *each) for each in hours))


@lru_cache(maxsize=256)
def changed_times(window: Window, key: str) -> tuple[CalendarTime, ...]:
    """Return when it begins, besides, around the changes of the clock: at what ``usual_times`` miss there.

    Each is a yearly rule where the zone's changes follow one, and dates up to 2053 where they don't. Times that the
    clock shows twice are meant the first time by a calendar; the second is written in UTC.
    """
    usual = set(_usual(window, key))
    always = msgspec.structs.replace(window, excluded=())
    around = _DAY + 2 * windows.jitter(window, key)
    missed: dict[tuple[str, int, int, int, int], set[dt.date]] = defaultdict(set)
    for change in _changes(window.timezone):
        for occurrence in windows.occurrences(always, key, change - around, change + around):
            begins = max(_whole(occurrence.begins), occurrence.opens)
            wall = begins.astimezone(ZoneInfo(window.timezone))
            if not wall.fold and (wall.weekday(), wall.hour * 60 + wall.minute) in usual:
                continue
            zone = window.timezone
            if wall.fold:
                wall, zone = begins, "UTC"
            missed[zone, wall.hour, wall.minute, wall.month, wall.weekday()].add(wall.date())
    found: list[CalendarTime] = []
    for (zone, hour, minute, month, weekday), dates in missed.items():
        first = _rule(dates, month, weekday)
        if first:
            found.append(CalendarTime(zone, (hour,), minute, (weekday,), month, first, first + 6))
        else:
            found += [CalendarTime(zone, (hour,), minute, date=date.isoformat()) for date in dates]
    return tuple(sorted(found))


def same_clock(zone: str, other: str) -> bool:
    """Tell whether the clocks of two zones show the same, now and to come: ``UTC`` and ``Etc/UTC``."""
    if zone == other:
        return True
    changes = _changes(zone)
    if changes != _changes(other):
        return False
    instants = [dt.datetime(_FIRST_YEAR, 1, 1, tzinfo=dt.UTC), *changes]
    return all(_offset(ZoneInfo(zone), each) == _offset(ZoneInfo(other), each) for each in instants)


def _usual(window: Window, key: str) -> Iterator[tuple[int, int]]:
    """Yield weekday and minute of the day of each begin in a week of no exceptions."""
    delay, length = windows.jitter(window, key), dt.timedelta(seconds=window.length)
    opens = sorted(day * 24 * 60 + minute for day in set(window.days) for minute in set(window.starts))
    for number, minute in enumerate(opens):
        following = opens[number + 1] if number + 1 < len(opens) else opens[0] + _WEEK
        stays = min(length, (following - minute) * _MINUTE)
        # Whole minutes, upwards: the last one is still before the end.
        begins = minute + max(0, -(-min(delay, stays - _MINUTE) // _MINUTE))
        yield begins // (24 * 60) % 7, begins % (24 * 60)


def _whole(instant: dt.datetime) -> dt.datetime:
    """Return the first whole minute from an instant on: a window's last one is never as late as its end."""
    floor = instant.replace(second=0, microsecond=0)
    return floor if floor == instant else floor + _MINUTE


def _rule(dates: Iterable[dt.date], month: int, weekday: int) -> int:
    """Return the first of the seven days of a month that, on a weekday, are exactly these dates each year; else 0."""
    wanted = set(dates)
    years = range(_FIRST_YEAR, _FIRST_YEAR + _YEARS)
    earliest = min(date.day for date in wanted)
    last = {2: 28, 4: 30, 6: 30, 9: 30, 11: 30}.get(month, 31)
    for first in range(max(1, earliest - 6), min(earliest, last - 6) + 1):
        week = (dt.date(year, month, first) + step * _DAY for year in years for step in range(7))
        if {date for date in week if date.weekday() == weekday} == wanted:
            return first
    return 0


@lru_cache(maxsize=64)
def _changes(zone: str) -> tuple[dt.datetime, ...]:
    """Return when the clock of a zone changes (the first second of the new time, UTC), in the years of the rules."""
    clock = ZoneInfo(zone)
    found = []
    day = dt.datetime(_FIRST_YEAR, 1, 1, tzinfo=dt.UTC)
    end = day.replace(year=_FIRST_YEAR + _YEARS)
    while day < end:
        if _offset(clock, day) != _offset(clock, day + _DAY):
            early, late = day, day + _DAY
            while late - early > dt.timedelta(seconds=1):
                middle = early + (late - early) // 2
                if _offset(clock, middle) == _offset(clock, day):
                    early = middle
                else:
                    late = middle
            found.append(late.replace(microsecond=0))
        day += _DAY
    return tuple(found)


def _offset(zone: ZoneInfo, instant: dt.datetime) -> dt.timedelta | None:
    return instant.astimezone(zone).utcoffset()
