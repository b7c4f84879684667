"""Units and crontab lines: their times are those of the windows, their words come back as they were."""

from __future__ import annotations

import datetime as dt
import re
import shlex
from collections.abc import Iterable, Sequence
from zoneinfo import ZoneInfo

import msgspec
import pytest
from cronsim import CronSim
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from backhaul.errors import ConfigurationError
from backhaul.formats import crontab, systemd
from backhaul.model.calendar import CalendarTime
from backhaul.model.job import COMMAND, JobCard
from backhaul.model.schedule import Occurrence, Window
from backhaul.planning import begin_times, windows

pytestmark = pytest.mark.unit

ZONES = (
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "Europe/Dublin",
    "Australia/Sydney",
    "Australia/Lord_Howe",
    "Africa/Casablanca",
    "Asia/Beirut",
    "Asia/Kolkata",
)
DAY = dt.timedelta(days=1)
MINUTE = dt.timedelta(minutes=1)
# Words with all that systemd, cron or a shell could take for something else.
words = st.text(st.sampled_from("ab \t\\\"'%$#;{}()*?~`&|<>!=-ü\u00a0\udcff"), min_size=1, max_size=12)
a_window = st.builds(
    Window,
    starts=st.lists(st.integers(0, 1439), min_size=1, max_size=4, unique=True).map(lambda found: tuple(sorted(found))),
    length=st.integers(1, 1500).map(lambda minutes: minutes * 60.0) | st.floats(60, 5000),
    days=st.sets(st.integers(0, 6), min_size=1).map(lambda found: tuple(sorted(found))),
    jitter=st.integers(0, 300).map(lambda minutes: minutes * 60.0),
    timezone=st.sampled_from(ZONES),
)


def a_card(name: str = "nas", window: Window | None = None) -> JobCard:
    window = window or Window(starts=(1320,), length=330 * 60, days=(0, 1, 2, 3, 4, 5), timezone="Europe/Berlin")
    return JobCard(name=name, host="h", kind=COMMAND, window=window, jitter_of=f"h {name}")


def fires(spec: str, since: dt.date, days: int) -> set[dt.datetime]:
    """Read a calendar time as systemd.time(7) has it: the instants at which the clock first shows it."""
    match = re.fullmatch(
        r"(?:(?P<days>[A-Z][A-Za-z.,]+) )?(?P<date>\S+-\S+-\S+) (?P<hours>[*\d,]+):(?P<minute>\d\d):00 (?P<zone>\S+)",
        spec,
    )
    assert match is not None, spec
    names = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
    weekdays: set[int] = set()
    for part in (match["days"] or "Mon..Sun").split(","):
        first, _, last = part.partition("..")
        weekdays.update(range(names.index(first), names.index(last or first) + 1))
    year, month, dates = match["date"].split("-")
    first_day, _, last_day = ("1..31" if dates == "*" else dates).partition("..")
    hours = range(24) if match["hours"] == "*" else [int(hour) for hour in match["hours"].split(",")]
    found = set()
    for date in (since + DAY * step for step in range(days)):
        if (
            date.weekday() not in weekdays
            or year not in ("*", f"{date.year}")
            or month not in ("*", f"{date.month:02d}")
            or not int(first_day) <= date.day <= int(last_day or first_day)
        ):
            continue
        for hour in hours:
            wall = dt.datetime.combine(date, dt.time(hour, int(match["minute"])))
            instant = wall.replace(tzinfo=ZoneInfo(match["zone"])).astimezone(dt.UTC)
            if instant.astimezone(ZoneInfo(match["zone"])).replace(tzinfo=None) == wall:
                found.add(instant)
    return found


def begins(occurrence: Occurrence) -> dt.datetime:
    """Return the first whole minute at which a run of it may begin: calendars here know no seconds."""
    floor = occurrence.begins.replace(second=0, microsecond=0)
    return floor if floor == occurrence.begins else floor + MINUTE


def steady(zone: str, instant: dt.datetime, around: dt.timedelta) -> bool:
    """Tell whether the clock does not change around an instant."""
    clock = ZoneInfo(zone)
    hours = range(-int(around / dt.timedelta(hours=1)), int(around / dt.timedelta(hours=1)) + 1)
    return len({(instant + dt.timedelta(hours=each)).astimezone(clock).utcoffset() for each in hours}) == 1


HOURLY = Window(starts=tuple(range(10, 1440, 60)), length=3600, jitter=3540.0, timezone="Europe/Berlin")
LATE = next(key for key in map(str, range(1000)) if windows.jitter(HOURLY, key) == 55 * MINUTE)


@settings(max_examples=150, deadline=None)
# The second 02:05 of a night is not the first, which is another opening's.
@example(HOURLY, LATE, dt.date(2026, 10, 1))
@given(a_window, st.text(max_size=3), st.dates(dt.date(2026, 1, 10), dt.date(2050, 1, 1)))
def test_a_timer_fires_when_a_window_begins(window: Window, key: str, date: dt.date) -> None:
    times = (*begin_times.usual_times(window, key), *begin_times.changed_times(window, key))
    since = dt.datetime.combine(date, dt.time(), dt.UTC)
    until = since + 400 * DAY
    fired: set[dt.datetime] = set()
    for time in times:
        fired |= fires(systemd.on_calendar(time), date - 2 * DAY, 404)
    expected = list(windows.occurrences(window, key, since, until))
    assert expected
    for occurrence in expected:
        assert begins(occurrence) in fired, occurrence
        assert occurrence.opens <= begins(occurrence) < occurrence.closes
    # It fires besides only where a clock changes, since it can't be told not to.
    wanted = {begins(occurrence) for occurrence in expected}
    for extra in fired - wanted:
        if since + 2 * DAY < extra < until:
            assert not steady(window.timezone, extra, dt.timedelta(hours=49)), extra


@settings(max_examples=100, deadline=None)
@given(a_window, st.text(max_size=3), st.dates(dt.date(2026, 1, 10), dt.date(2050, 1, 1)))
def test_cron_fires_when_a_window_begins(window: Window, key: str, date: dt.date) -> None:
    clock = ZoneInfo(window.timezone)
    block = crontab.crontab_block([(a_card(window=window), begin_times.usual_times(window, key))], ["/b"])
    lines = [line for line in block.splitlines() if " run " in line]
    since = dt.datetime.combine(date, dt.time(), clock)
    until = since + 60 * DAY
    fired = set()
    for line in lines:
        fields = " ".join(line.split()[:5])
        for time in CronSim(fields, since - MINUTE):
            if time >= until:
                break
            fired.add(time.astimezone(dt.UTC))
    found = [each for each in windows.occurrences(window, key, since - 2 * DAY, until) if since <= each.begins < until]
    wanted = {begins(each) for each in found}
    for time in fired ^ wanted:
        # Around a change of the clock cron has ways of its own, and the tick has the rest.
        assert time >= until or not steady(window.timezone, time, dt.timedelta(hours=49)), time


def test_a_delay_over_midnight_moves_the_days() -> None:
    window = Window(starts=(1430,), length=7200, days=(5, 6), jitter=6 * 3600.0, timezone="Europe/Berlin")
    key = next(key for key in map(str, range(1000)) if windows.jitter(window, key) == 17 * MINUTE)
    (time,) = begin_times.usual_times(window, key)
    assert systemd.on_calendar(time) == "Mon,Sun *-*-* 00:07:00 Europe/Berlin"
    assert "\n7 0 * * 0,1 " in crontab.crontab_block([(a_card(window=window), [time])], ["/b"])


def test_a_time_that_the_clock_skips_has_a_rule_of_its_own() -> None:
    def specs(**settings: object) -> list[str]:
        window = msgspec.structs.replace(Window(starts=(150,), length=7200, timezone="Europe/Berlin"), **settings)
        return [systemd.on_calendar(time) for time in begin_times.changed_times(window, "")]

    assert specs() == ["Sun *-03-25..31 03:00:00 Europe/Berlin"]
    assert specs(timezone="America/New_York") == ["Sun *-03-08..14 03:00:00 America/New_York"]
    assert specs(timezone="Australia/Sydney") == ["Sun *-10-01..07 03:00:00 Australia/Sydney"]
    assert specs(days=(0, 1, 2)) == specs(timezone="UTC") == specs(starts=(1320,)) == []
    # No rule has these: they follow the moon.
    assert "2026-03-22 03:00:00 Africa/Casablanca" in specs(timezone="Africa/Casablanca")


def test_a_begin_in_the_hour_that_comes_twice_is_written_in_utc() -> None:
    window = Window(starts=(60,), length=6 * 3600, jitter=6 * 3600.0, timezone="Europe/Berlin")
    key = next(key for key in map(str, range(5000)) if windows.jitter(window, key) == 130 * MINUTE)
    # 130 minutes after 01:00, when the clock went forward or back in between.
    assert [systemd.on_calendar(time) for time in begin_times.changed_times(window, key)] == [
        "Sun *-03-25..31 04:10:00 Europe/Berlin",
        "Sun *-10-25..31 01:10:00 UTC",
    ]


def test_clocks_that_show_the_same() -> None:
    assert begin_times.same_clock("UTC", "Etc/UTC")
    assert begin_times.same_clock("Europe/Berlin", "Europe/Vienna")
    assert not begin_times.same_clock("Europe/Berlin", "Europe/London")
    assert not begin_times.same_clock("Asia/Tokyo", "UTC")
    # The same offset for half of the year.
    assert not begin_times.same_clock("Europe/Berlin", "Africa/Algiers")


def test_a_job_has_a_service_and_a_timer() -> None:
    window = Window(
        starts=(1320,), length=330 * 60, days=(0, 1, 2, 3, 4, 5), excluded=("12-24",), timezone="Europe/Berlin"
    )
    card = msgspec.structs.replace(a_card(window=window), what="/data 100% \\")
    units = systemd.job_units(
        card,
        [CalendarTime("Europe/Berlin", (22,), 7, (0, 1, 2, 3, 4, 5))],
        ["/opt/b/backhaul", "--config", "/etc/my config.toml"],
        credentials={"token": "/etc/a b%"},
        environment={"BACKHAUL_STATE": "/var/lib/x y"},
    )
    service, timer = units["backhaul-nas.service"], units["backhaul-nas.timer"]
    assert len(units) == 2 and systemd.is_ours(service) and systemd.is_ours(timer)
    for line in (
        "Description=Backhaul: nas: /data 100%% ",
        "Wants=network-online.target",
        'ExecStart=/opt/b/backhaul --config "/etc/my config.toml" run --scheduled --quiet nas',
        "SuccessExitStatus=75",
        "KillMode=mixed",
        'Environment="BACKHAUL_STATE=/var/lib/x y"',
        "LoadCredential=token:/etc/a b%%",
    ):
        assert line in service.splitlines()
    for line in (
        "Description=Backhaul: nas: mon-sat 22:00 for 5 h 30 min (Europe/Berlin)",
        "OnCalendar=Mon..Sat *-*-* 22:07:00 Europe/Berlin",
        "# Not on 12-24: then the run itself does nothing.",
        "Persistent=true",
        "AccuracySec=1s",
        "WantedBy=timers.target",
    ):
        assert line in timer.splitlines()
    user = systemd.job_units(card, [], ["/b"], system=False)["backhaul-nas.service"]
    assert "network-online" not in user
    assert (
        "TimeoutStartSec=infinity" in service
        and "TimeoutStartSec=15min\n" in systemd.tick_units(["/b"])["backhaul-tick.service"]
    )
    # A clock that shows an hour twice would be silent in the second.
    assert "OnCalendar=*-*-* *:00/10:00 UTC\n" in systemd.tick_units(["/b"])["backhaul-tick.timer"]


def unquoted(line: str, *, dollars: bool) -> list[bytes]:
    """Read words as systemd.syntax(7), systemd.unit(5) and systemd.service(5) have them; no word is expanded."""
    found: list[bytearray] = []
    word: bytearray | None = None
    inside = False
    position = 0
    while position < len(line):
        char = line[position]
        position += 1
        if char == " " and not inside:
            word = None
            continue
        if word is None:
            word = bytearray()
            found.append(word)
        if char == '"':
            inside = not inside
        elif char == "\\":
            if line[position] == "x":
                word.append(int(line[position + 1 : position + 3], 16))
                position += 3
            else:
                assert line[position] in '"\\'
                word += line[position].encode()
                position += 1
        elif char == "%" or (char == "$" and dollars):
            assert line[position] == char, "it would be expanded"
            word += char.encode()
            position += 1
        else:
            assert inside or char not in "';~", "it would be read as something else"
            word += char.encode()
    assert not inside
    return [bytes(word) for word in found]


@given(st.lists(words, max_size=4))
def test_arguments_come_back_from_an_exec_start(arguments: list[str]) -> None:
    line = systemd.exec_start(["/opt/back haul", *arguments])
    assert line.isprintable()
    expected = [word.encode(errors="surrogateescape") for word in ["/opt/back haul", *arguments]]
    assert unquoted(line, dollars=True) == expected


@given(words)
def test_a_program_that_systemd_would_not_take_is_run_by_a_shell(name: str) -> None:
    first, *rest = unquoted(systemd.exec_start([f"/{name}", "run"]), dollars=True)
    if re.search(r"[\"'\\$\t]", name):
        assert [first, *rest[:2]] == [b"/bin/sh", b"-c", b'exec "$0" "$@"']
        first, *rest = rest[2:]
    assert [first, *rest] == [f"/{name}".encode(errors="surrogateescape"), b"run"]


@given(words)
def test_values_come_back_from_an_environment(value: str) -> None:
    service = systemd.tick_units(["/b"], environment={"BACKHAUL_CONFIG": value})["backhaul-tick.service"]
    (line,) = [line for line in service.split("\n") if line.startswith("Environment=")]
    expected = f"BACKHAUL_CONFIG={value}".encode(errors="surrogateescape")
    assert unquoted(line.partition("=")[2], dollars=False) == [expected]


@given(st.text(max_size=40), st.text(max_size=80))
def test_no_name_breaks_out_of_its_line(name: str, what: str) -> None:
    assume(name and "\0" not in name and not re.search(r"[\ud800-\udfff]", name + what) and len(name) < 20)
    plain, odd = (
        systemd.job_units(msgspec.structs.replace(a_card(*given), what=what[: len(given[0])]), [], ["/b"])
        for given in (("nas",), (name,))
    )
    for text in odd.values():
        assert not any(line.endswith("\\") for line in text.split("\n"))
    # Whatever it is called, it has the lines of any other.
    settings_of = [[line.partition("=")[0] for line in text.splitlines()] for text in (*plain.values(), *odd.values())]
    assert settings_of[:2] == settings_of[2:]
    assert all(re.fullmatch(r"[A-Za-z0-9_.:\\-]+\.(service|timer)", file, re.ASCII) for file in odd)


@given(words, words)
def test_two_jobs_have_two_units(one: str, other: str) -> None:
    assert (systemd.unit_name(one) == systemd.unit_name(other)) == (one == other)


@pytest.mark.parametrize("name", ["tick", "", "x" * 300])
def test_names_that_no_unit_can_have_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        systemd.unit_name(name)
    assert caught.value.what and caught.value.why and caught.value.todo


@pytest.mark.parametrize(
    ("name", "path"), [("a b", "/x"), ("..", "/x"), ("a", "x"), ("a", "/x\n[Service]"), ("a", "/x\\"), ("a", "/x ")]
)
def test_credentials_that_can_not_be_written_are_refused(name: str, path: str) -> None:
    with pytest.raises(ConfigurationError):
        systemd.tick_units(["/b"], credentials={name: path})


def test_a_command_without_an_absolute_path_is_refused() -> None:
    for command in (["backhaul"], ["/b", "a\0b"]):
        with pytest.raises(ConfigurationError):
            systemd.exec_start(command)


def to_shell(command: str, *, doubled: bool) -> str:
    """Read a command as cron does before a shell has it; some crons read two backslashes as one."""
    found = ""
    position = 0
    while position < len(command):
        pair = command[position : position + 2]
        if pair == r"\%" or (pair == "\\\\" and doubled):
            found += pair[1]
            position += 2
            continue
        assert command[position] != "%", "the rest would be the command's input"
        found += command[position]
        position += 1
    return found


@given(st.lists(words, min_size=1, max_size=4))
def test_arguments_come_back_from_a_crontab(arguments: list[str]) -> None:
    line = crontab.cron_command(arguments)
    for doubled in (True, False):
        assert shlex.split(to_shell(line, doubled=doubled)) == arguments


def test_a_line_break_is_refused_in_a_crontab() -> None:
    with pytest.raises(ConfigurationError):
        crontab.cron_command(["/b", "a\nb"])


def a_block(names: Iterable[str] = ("nas",), command: Sequence[str] = ("/b",)) -> str:
    times = [CalendarTime("UTC", (22,), 7, (0, 1, 2, 3, 4, 5))]
    return crontab.crontab_block([(a_card(name), times) for name in names], command)


def test_a_block() -> None:
    window = Window(starts=(1320,), length=3600, timezone="Asia/Tokyo")
    times = [CalendarTime("UTC", (22,), 7, (0, 1, 2, 3, 4, 6))]
    block = crontab.crontab_block(
        [(a_card("nas"), times), (a_card("far", window), ())],
        ["/opt/b", "--config", "/etc/my 100%.toml"],
        path="/usr/bin:/bin",
        environment={"BACKHAUL_STATE": "/s t"},
    )
    prefix = "PATH=/usr/bin:/bin BACKHAUL_STATE='/s t' /opt/b --config '/etc/my 100\\%.toml'"
    assert block.splitlines() == [
        "# BEGIN backhaul (made by: backhaul schedule install; edits between the markers are lost)",
        "# Job nas: mon-sat 22:00 for 5 h 30 min (Europe/Berlin)",
        f"7 22 * * 0-5 {prefix} run --scheduled --quiet nas",
        "# Job far: daily 22:00 for 1 h 00 min (Asia/Tokyo)",
        "# cron knows only this host's zone, not Asia/Tokyo: the last line begins it.",
        "# Begins what was missed, tells what is wrong",
        f"*/10 * * * * {prefix} schedule tick",
        "# END backhaul",
    ]


a_crontab = st.lists(
    st.sampled_from(["MAILTO=me", "# END of mine", "5 4 * * * x", "", "\t", "# BEGIN backhaulage", "*/5 * * * * y\r"]),
    max_size=6,
).flatmap(lambda lines: st.sampled_from(["\n".join(lines), "".join(f"{line}\n" for line in lines)]))


@given(a_crontab, a_crontab)
def test_a_block_comes_and_goes_and_the_rest_stays(text: str, below: str) -> None:
    one, two = a_block(["a"]), a_block(["b", "END backhaul", "BEGIN backhaul"])
    merged = crontab.merge_block(text, one)
    assert merged.startswith(text) and crontab.find_block(merged) == one
    assert crontab.merge_block(merged, one) == merged
    changed = crontab.merge_block(merged, two)
    assert crontab.find_block(changed) == two
    assert crontab.merge_block(changed, one) == merged
    assert crontab.remove_block(changed) == text
    assert crontab.remove_block(text) == text and crontab.find_block(text) is None
    # What others wrote below stays below.
    longer = changed + below
    assert crontab.merge_block(longer, one) == merged + below
    assert crontab.remove_block(longer).replace("\n", "") == (text + below).replace("\n", "")
    if text.endswith("\n") or not text:
        assert crontab.remove_block(longer) == text + below


def test_damaged_markers_are_refused() -> None:
    block = a_block()
    begin, *_, end = block.splitlines()
    for text in (
        f"{begin}\n",
        f"x\n{end}\n",
        f"{end}\n{begin}\n",
        block + block,
        block.replace(f"{end}\n", ""),
        f"# BEGIN backhaul\n{block}",
        f"{block}{end}\n",
    ):
        for action in (crontab.remove_block, crontab.find_block, lambda text: crontab.merge_block(text, block)):
            with pytest.raises(ConfigurationError) as caught:
                action(text)
            assert caught.value.what and caught.value.why and "crontab -e" in caught.value.todo
