"""The openings of a window as instants: over midnight, over changes of the clock, with their stable jitter.

A wall-clock time that the clock skips (02:30 in the night of the change) opens at the end of the gap; one that it
shows twice opens the first time. The length is time that passes, not what the clock shows: a window of 330 minutes has
330 in each night.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Iterator
from zoneinfo import ZoneInfo

from backhaul.model.schedule import Occurrence, Window

_DAY = dt.timedelta(days=1)
_MINUTE = dt.timedelta(minutes=1)


def occurrences(window: Window, key: str, since: dt.datetime, until: dt.datetime) -> Iterator[Occurrence]:
    """Yield the openings from ``since`` up to, but without, ``until`` (aware), in order.

    Args:
        window: when.
        key: what the jitter is made of: the same key has the same delay each time.
        since, until: between which instants it opens.
    """
    delay = jitter(window, key)
    found = _openings(window, since, until)
    opens = next(found, None)
    while opens is not None and opens < until:
        following = next(found, None)
        closes = opens + dt.timedelta(seconds=window.length)
        if following is not None:
            closes = min(closes, following)
        if opens >= since:
            yield Occurrence(opens, min(opens + delay, closes - _MINUTE), closes)
        opens = following


def latest(window: Window, key: str, now: dt.datetime) -> Occurrence | None:
    """Return the last opening at or before an instant, open or closed; None for none in the year before."""
    for days in (3, 10, 370):
        found = None
        for found in occurrences(window, key, now - days * _DAY, now + dt.timedelta.resolution):  # noqa: B007 - the last one
            pass
        if found is not None:
            return found
    return None


def following(window: Window, key: str, now: dt.datetime) -> Occurrence | None:
    """Return the next opening after an instant; None for none in the year after."""
    for days in (3, 10, 370):
        found = next((each for each in occurrences(window, key, now, now + days * _DAY) if each.opens > now), None)
        if found is not None:
            return found
    return None


def open_at(window: Window, key: str, now: dt.datetime) -> Occurrence | None:
    """Return the opening that an instant lies in, None where the window is closed."""
    found = latest(window, key, now)
    return found if found is not None and found.opens <= now < found.closes else None


def jitter(window: Window, key: str) -> dt.timedelta:
    """Return the delay of a key: whole minutes, since cron knows no less, from 0 to the window's jitter."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return int(share * (window.jitter // 60 + 1)) * _MINUTE


def _openings(window: Window, since: dt.datetime, until: dt.datetime) -> Iterator[dt.datetime]:
    """Yield the instants at which it opens, from two days before to one opening or two weeks after; each once."""
    zone = ZoneInfo(window.timezone)
    date = since.astimezone(zone).date() - 2 * _DAY
    last = until.astimezone(zone).date() + 14 * _DAY
    before = None
    while date <= last:
        if date.weekday() in window.days and not excluded(window, date):
            for minute in window.starts:
                opens = instant(dt.datetime.combine(date, dt.time(minute // 60, minute % 60)), zone)
                if before is None or opens > before:
                    yield opens
                    before = opens
                    if opens >= until:
                        return
        date += _DAY


def excluded(window: Window, date: dt.date) -> bool:
    """Tell whether the window does not open on a date though its weekday is right."""
    return date.isoformat() in window.excluded or f"{date:%m-%d}" in window.excluded


def instant(wall: dt.datetime, zone: ZoneInfo) -> dt.datetime:
    """Return when a clock on the wall shows a time (naive), first; or where it never does, the end of the gap. UTC."""
    first = wall.replace(tzinfo=zone, fold=0).astimezone(dt.UTC)
    if first.astimezone(zone).replace(tzinfo=None) == wall:
        return first
    # In a gap: the change lies between what the two offsets make of it.
    early, late = wall.replace(tzinfo=zone, fold=1).astimezone(dt.UTC), first
    offset = early.astimezone(zone).utcoffset()
    while late - early > dt.timedelta(seconds=1):
        middle = early + (late - early) / 2
        if middle.astimezone(zone).utcoffset() == offset:
            early = middle
        else:
            late = middle
    return late.replace(microsecond=0)
