"""A window as people write it: ``start``, ``length``, ``days``; and as they read it."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Sequence

from backhaul.errors import UsageError
from backhaul.formats.quantities import format_duration
from backhaul.model.schedule import WEEKDAYS, Window

_TIME = re.compile(r"(\*|\d{1,2}):(\d{2})", re.ASCII)
_YEARLY = re.compile(r"(\d{2})-(\d{2})", re.ASCII)
_GROUPS = {"daily": (0, 1, 2, 3, 4, 5, 6), "weekdays": (0, 1, 2, 3, 4), "weekend": (5, 6)}


def parse_starts(texts: Sequence[str]) -> tuple[int, ...]:
    """Read ``22:00``, several of it, or ``*:15`` for each hour, as minutes of the day.

    Raises:
        UsageError: it is no time of the day.
    """
    minutes: set[int] = set()
    for text in texts:
        match = _TIME.fullmatch(text.strip())
        if match is None or int(match[2]) > 59 or (match[1] != "*" and int(match[1]) > 23):
            raise UsageError(
                f"{text!r} is not a time of the day", "it is HH:MM, or *:MM for each hour", 'Write e.g. "22:00".'
            )
        hours = range(24) if match[1] == "*" else (int(match[1]),)
        minutes.update(60 * hour + int(match[2]) for hour in hours)
    if not minutes:
        raise UsageError("there is no start", "a window opens at a time of the day", 'Write e.g. "22:00".')
    return tuple(sorted(minutes))


def parse_days(texts: Sequence[str]) -> tuple[int, ...]:
    """Read ``mon-sat``, ``mon,wed``, ``weekdays``, ``daily``, or several of them, as days with 0 for Monday.

    Raises:
        UsageError: a day is not known.
    """
    days: set[int] = set()
    for text in (part.strip().lower() for entry in texts for part in entry.split(",")):
        first, dash, last = text.partition("-")
        if text in _GROUPS:
            days.update(_GROUPS[text])
        elif not dash:
            days.add(_day(text))
        else:
            begin, end = _day(first), _day(last)
            days.update((begin + step) % 7 for step in range((end - begin) % 7 + 1))
    return tuple(sorted(days))


def _day(text: str) -> int:
    text = text.strip()
    for number, name in enumerate(WEEKDAYS):
        if len(text) >= 3 and (name == text or f"{name}day".startswith(text) or _FULL[number].startswith(text)):
            return number
    raise UsageError(
        f"{text!r} is not a day",
        f"days are {', '.join(WEEKDAYS)}, daily, weekdays and weekend",
        'Write e.g. "mon-sat".',
    )


_FULL = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


def parse_date(text: str) -> str:
    """Check a date on which a window does not open: ``2026-12-24``, or each year ``12-24``.

    Raises:
        UsageError: there is no such date.
    """
    text = text.strip()
    yearly = _YEARLY.fullmatch(text)
    try:
        # (A leap year, so that the 29th of February is one.)
        dt.date.fromisoformat(f"2028-{text}" if yearly else text)
    except ValueError:
        raise UsageError(
            f"{text!r} is not a date", "it is YYYY-MM-DD, or MM-DD for each year", 'Write e.g. "2026-12-24".'
        ) from None
    return text


def format_starts(starts: Sequence[int]) -> str:
    """Write the times of a day."""
    if len(starts) == 24 and len({minute % 60 for minute in starts}) == 1:
        return f"*:{starts[0] % 60:02d}"
    return ", ".join(f"{minute // 60:02d}:{minute % 60:02d}" for minute in starts)


def format_days(days: Sequence[int]) -> str:
    """Write days, runs of three and more as ``mon-sat``."""
    return "daily" if len(days) == 7 else join_days(days, WEEKDAYS, "-")


def join_days(days: Sequence[int], names: Sequence[str], to: str) -> str:
    """Write days by their names, with ``to`` between the ends of three and more in a row.

    Args:
        days: 0 for Monday, ascending.
        names: of the days, Monday's first.
        to: what stands between the first and the last of a run.
    """
    runs: list[list[int]] = []
    for day in days:
        if runs and runs[-1][-1] == day - 1:
            runs[-1].append(day)
        else:
            runs.append([day])
    words = []
    for run in runs:
        words += [f"{names[run[0]]}{to}{names[run[-1]]}"] if len(run) > 2 else [names[day] for day in run]
    return ",".join(words)


def format_window(window: Window) -> str:
    """Write a window in a line: ``mon-sat 22:00 for 5 h 30 min (Europe/Berlin)``."""
    words = f"{format_days(window.days)} {format_starts(window.starts)} for {format_duration(window.length)}"
    return f"{words} ({window.timezone})"
