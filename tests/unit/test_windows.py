"""Windows as instants, against a clock that is walked minute by minute."""

from __future__ import annotations

import datetime as dt
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backhaul.errors import UsageError
from backhaul.formats.window import format_days, format_starts, format_window, parse_date, parse_days, parse_starts
from backhaul.model.schedule import Window
from backhaul.planning import windows

pytestmark = pytest.mark.unit

UTC = dt.UTC
ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu")


def walked(window: Window, since: dt.datetime, until: dt.datetime) -> list[dt.datetime]:
    """The openings, by looking at the clock on the wall every minute: no arithmetic with zones."""
    zone = ZoneInfo(window.timezone)
    found: list[dt.datetime] = []
    opened: set[tuple[dt.date, int]] = set()
    time = since - dt.timedelta(days=1)
    before = time.astimezone(zone).replace(tzinfo=None)
    while time < until:
        wall = time.astimezone(zone).replace(tzinfo=None)
        # What the clock has passed since the last minute, be it one or, at a change, sixty.
        for start in window.starts:
            due = dt.datetime.combine(wall.date(), dt.time(start // 60, start % 60))
            new = before < due <= wall
            if not new or (due.date(), start) in opened:
                continue
            opened.add((due.date(), start))
            excluded = due.date().isoformat() in window.excluded or f"{due:%m-%d}" in window.excluded
            if due.weekday() in window.days and not excluded and time >= since and time not in found:
                found.append(time)
        before = wall
        time += dt.timedelta(minutes=1)
    return found


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("start", ["22:00", "00:00", "01:30", "02:30", "03:00"])
def test_a_year_of_openings(zone: str, start: str) -> None:
    window = Window(
        starts=parse_starts([start]),
        length=330 * 60,
        days=parse_days(["mon-sat"]),
        excluded=("12-24", "2026-07-04"),
        timezone=zone,
    )
    # Both changes of the clock, with a margin, and the turn of the year.
    for first, last in (((2026, 3, 1), (2026, 4, 10)), ((2026, 9, 28), (2026, 11, 8)), ((2026, 12, 20), (2027, 1, 3))):
        since, until = dt.datetime(*first, tzinfo=UTC), dt.datetime(*last, tzinfo=UTC)
        found = list(windows.occurrences(window, "key", since, until))
        assert [each.opens for each in found] == walked(window, since, until)
        assert all((each.closes - each.opens).total_seconds() == window.length for each in found)


def test_the_night_that_has_no_half_past_two() -> None:
    window = Window(starts=(150,), length=3600, timezone="Europe/Berlin")
    (night,) = windows.occurrences(
        window, "", dt.datetime(2026, 3, 28, 12, tzinfo=UTC), dt.datetime(2026, 3, 29, 12, tzinfo=UTC)
    )
    assert night.opens == dt.datetime(2026, 3, 29, 1, 0, tzinfo=UTC)  # 03:00 by the new time
    (night,) = windows.occurrences(
        window, "", dt.datetime(2026, 10, 24, 12, tzinfo=UTC), dt.datetime(2026, 10, 25, 12, tzinfo=UTC)
    )
    assert night.opens == dt.datetime(2026, 10, 25, 0, 30, tzinfo=UTC)  # the first of the two


WINDOWS = st.builds(
    Window,
    starts=st.lists(st.integers(0, 1439), min_size=1, max_size=4, unique=True).map(lambda each: tuple(sorted(each))),
    length=st.integers(1, 30 * 60).map(lambda minutes: minutes * 60.0),
    days=st.sets(st.integers(0, 6), min_size=1).map(lambda each: tuple(sorted(each))),
    jitter=st.integers(0, 3 * 3600).map(float),
    timezone=st.sampled_from(ZONES),
)
MOMENTS = st.datetimes(dt.datetime(2026, 1, 1), dt.datetime(2027, 12, 31)).map(lambda each: each.replace(tzinfo=UTC))


@settings(max_examples=150, deadline=None)
@given(WINDOWS, MOMENTS, st.text(max_size=5))
def test_openings_never_overlap_and_agree_with_each_other(window: Window, now: dt.datetime, key: str) -> None:
    found = list(windows.occurrences(window, key, now - dt.timedelta(days=9), now + dt.timedelta(days=9)))
    assert found
    for one, two in pairwise(found):
        assert one.opens < one.closes <= two.opens
    for each in found:
        assert each.opens <= each.begins < each.closes
        assert windows.open_at(window, key, each.begins) == each
        assert windows.open_at(window, key, each.closes) != each
        assert windows.following(window, key, each.opens - dt.timedelta(seconds=1)) == each
    last = windows.latest(window, key, now)
    assert last == max(each for each in found if each.opens <= now)


def test_the_jitter_is_the_same_each_time_and_spread_over_hosts() -> None:
    window = Window(starts=(0,), length=7200, jitter=3600)
    delays = {windows.jitter(window, f"db{number} orders") for number in range(300)}
    assert windows.jitter(window, "db7 orders") == windows.jitter(window, "db7 orders")
    assert len(delays) > 50
    assert dt.timedelta() <= min(delays)
    assert max(delays) <= dt.timedelta(hours=1)
    assert windows.jitter(Window(starts=(0,), length=7200), "db7") == dt.timedelta()


def test_what_people_write() -> None:
    assert parse_starts(["22:00"]) == (1320,)
    assert parse_starts(["06:30", "5:00"]) == (300, 390)
    assert parse_starts(["*:15"]) == tuple(range(15, 1440, 60))
    assert parse_days(["mon-sat"]) == (0, 1, 2, 3, 4, 5)
    assert parse_days(["sat-mon"]) == (0, 5, 6)
    assert parse_days(["Mon,thursday", "SUN"]) == (0, 3, 6)
    assert parse_days(["weekdays"]) == (0, 1, 2, 3, 4)
    assert parse_date("02-29") == "02-29"
    for wrong in ("24:00", "7", "*:60", "12:5", ""):
        with pytest.raises(UsageError):
            parse_starts([wrong])
    for wrong in ("mo", "mon-", "someday", ""):
        with pytest.raises(UsageError):
            parse_days([wrong])
    for wrong in ("2026-02-30", "13-01", "tomorrow"):
        with pytest.raises(UsageError):
            parse_date(wrong)
    assert format_days((0, 1, 2, 3, 4, 5)) == "mon-sat"
    assert format_days((0, 2, 3, 6)) == "mon,wed,thu,sun"
    assert format_starts(parse_starts(["*:15"])) == "*:15"
    window = Window(starts=(1320,), length=19800, days=(0, 1, 2, 3, 4, 5), timezone="Europe/Berlin")
    assert format_window(window) == "mon-sat 22:00 for 5 h 30 min (Europe/Berlin)"


@given(st.sets(st.integers(0, 6), min_size=1))
def test_days_are_read_as_they_are_written(days: set[int]) -> None:
    assert parse_days([format_days(sorted(days))]) == tuple(sorted(days))
