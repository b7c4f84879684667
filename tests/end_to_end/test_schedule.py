"""What begins jobs, judged by systemd and cron themselves; and its way onto a host and off it."""

from __future__ import annotations

import datetime as dt
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from zoneinfo import ZoneInfo

import msgspec
import pytest

from backhaul.errors import BackhaulError, ConfigurationError, FailedError
from backhaul.formats import crontab, systemd
from backhaul.jobs import schedule
from backhaul.jobs.schedule import Host, Outcome
from backhaul.model.calendar import CalendarTime
from backhaul.model.job import COMMAND, JobCard
from backhaul.model.schedule import Window
from backhaul.planning import begin_times, windows

DAY = dt.timedelta(days=1)
MINUTE = dt.timedelta(minutes=1)
NOW = dt.datetime(2026, 11, 21, 12, tzinfo=dt.UTC)
AWKWARD = ("plain", "two words", "100%n", "a$HOME${x}$$", "it's", 'say "so"', "back\\slash\\\\%", "ünï; #x", "-a*?")
NIGHTS = Window(
    starts=(1320,), length=330 * 60, days=(0, 1, 2, 3, 4, 5), jitter=1800.0, excluded=("12-24",), timezone="UTC"
)


def a_card(name: str = "nas", window: Window | None = NIGHTS) -> JobCard:
    return JobCard(name=name, host="h", kind=COMMAND, what=f"mirror {name}", window=window, jitter_of=f"h {name}")


def delayed(minutes: int, **settings: object) -> tuple[Window, str]:
    """Return a window with a key whose delay is so many minutes."""
    window = msgspec.structs.replace(Window(starts=(), length=0.0, jitter=minutes * 60.0), **settings)
    key = next(key for key in map(str, range(20_000)) if windows.jitter(window, key) == minutes * MINUTE)
    return window, key


HOURS = tuple(range(15, 1440, 60))
BERLIN, NEW_YORK = "Europe/Berlin", "America/New_York"
CASES = {
    "the night of the mirror": delayed(7, starts=(1320,), length=19800.0, days=(0, 1, 2, 3, 4, 5), timezone=BERLIN),
    "a delay over midnight": delayed(23, starts=(1430,), length=7200.0, days=(5, 6), timezone=BERLIN),
    "in the skipped hour": delayed(0, starts=(150,), length=5400.0, timezone=BERLIN),
    "in the skipped hour, later": delayed(17, starts=(170,), length=5400.0, timezone=BERLIN),
    "begun in the skipped hour": delayed(20, starts=(110,), length=5400.0, timezone=BERLIN),
    "opened before the change": delayed(130, starts=(60,), length=20000.0, timezone=BERLIN),
    "each hour": delayed(5, starts=HOURS, length=3600.0, timezone=BERLIN),
    "in the hour that comes twice": delayed(3, starts=(80,), length=3600.0, timezone=NEW_YORK),
    "skipped in New York": delayed(0, starts=(135, 1380), length=3000.0, days=(4, 5, 6), timezone=NEW_YORK),
    "longer than a day": delayed(50, starts=(1410,), length=100000.0, days=(5,), timezone=NEW_YORK),
    "in the south": delayed(11, starts=(140,), length=3600.0, timezone="Australia/Sydney"),
    "by the moon": delayed(0, starts=(150,), length=3600.0, timezone="Africa/Casablanca"),
    "where midnight is skipped": delayed(0, starts=(0,), length=3600.0, timezone="Asia/Beirut"),
    "with summer in winter": delayed(9, starts=(75, 300), length=3600.0, timezone="Europe/Dublin"),
}


def elapses(spec: str, since: dt.datetime, until: dt.datetime) -> set[dt.datetime]:
    """Ask systemd when a calendar time elapses."""
    count = 9000 if "*:" in spec.split()[-2] else 800 if not spec.startswith("2") else 2
    done = subprocess.run(
        ["systemd-analyze", "calendar", f"--iterations={count}", f"--base-time={since:%Y-%m-%d %H:%M:%S} UTC", spec],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "TZ": "UTC", "LC_ALL": "C.UTF-8"},
    )
    found = re.findall(r"(?:Next elapse|Iter\. #\d+|Iteration #\d+): \w+ (\S+ \S+) UTC", done.stdout)
    times = {dt.datetime.fromisoformat(f"{each}+00:00") for each in found}
    assert not times or spec.startswith("2") or max(times) > until
    return {time for time in times if since <= time < until}


@pytest.mark.parametrize("name", CASES)
def test_systemd_fires_when_windows_begin(name: str) -> None:
    window, key = CASES[name]
    since = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    until = since + 370 * DAY
    times = (*begin_times.usual_times(window, key), *begin_times.changed_times(window, key))
    fired: set[dt.datetime] = set()
    for time in times:
        if not time.date or time.date[:4] in ("2026", "2027"):
            fired |= elapses(systemd.on_calendar(time), since, until)
    clock = ZoneInfo(window.timezone)
    begins = set()
    for occurrence in windows.occurrences(window, key, since - 2 * DAY, until + 2 * DAY):
        if since <= occurrence.begins < until:
            begins.add(occurrence.begins)
            assert any(occurrence.begins <= time < occurrence.closes for time in fired), occurrence
    assert len(begins) > 50 and begins <= fired
    # What it fires besides is of the days on which a clock changes: the run itself then finds nothing to do.
    for extra in fired - begins:
        assert (extra - DAY).astimezone(clock).utcoffset() != (extra + DAY).astimezone(clock).utcoffset(), extra
    assert len(fired - begins) <= 4


def test_the_tick_fires_each_ten_minutes_also_in_an_hour_that_comes_twice() -> None:
    timer = systemd.tick_units(["/b"])["backhaul-tick.timer"]
    (spec,) = re.findall("OnCalendar=(.*)", timer)
    since = dt.datetime(2026, 10, 24, 22, tzinfo=dt.UTC)
    done = subprocess.run(
        ["systemd-analyze", "calendar", "--iterations=60", f"--base-time={since:%Y-%m-%d %H:%M:%S} UTC", spec],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "TZ": BERLIN},
    )
    times = [dt.datetime.fromisoformat(each) for each in re.findall(r"\(in UTC\): \w+ (\S+ \S+) UTC", done.stdout)]
    assert len(times) == 60
    assert {later - time for time, later in itertools.pairwise(times)} == {10 * MINUTE}


def verify(directory: Path, units: Mapping[str, str], *manager: str) -> subprocess.CompletedProcess[str]:
    directory.mkdir(exist_ok=True)
    for name, text in units.items():
        (directory / name).write_bytes(text.encode(errors="surrogateescape"))
    return subprocess.run(
        ["systemd-analyze", *manager, "--man=no", "verify", *(str(directory / name) for name in units)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_RUNTIME_DIR": str(directory), "LC_ALL": "C.UTF-8"},
    )


def complaints(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in (done.stdout + done.stderr).splitlines() if "backhaul" in line]


def a_program(directory: Path, text: str = "#!/bin/sh\n") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    program = directory / "backhaul"
    program.write_text(text)
    program.chmod(0o755)
    return program


def units_of(program: Path, *arguments: str, system: bool = True) -> dict[str, str]:
    units = systemd.tick_units([str(program), *arguments], system=system)
    for name, (window, key) in CASES.items():
        card = msgspec.structs.replace(a_card(name, window), jitter_of=key, what="100% of it\n\\")
        times = (*begin_times.usual_times(window, key), *begin_times.changed_times(window, key))
        units |= systemd.job_units(
            card,
            times,
            [str(program), *arguments],
            system=system,
            credentials={"token": "/etc/a b 100%"},
            environment={"BACKHAUL_CONFIG": f"/etc/{name} $x %y \"z' \\"},
        )
    return units


@pytest.mark.parametrize("system", [True, False])
def test_systemd_has_nothing_to_say_of_the_units(tmp_path: Path, system: bool) -> None:
    units = units_of(a_program(tmp_path), "--config", '/etc/a 100% $HOME\'s "config".toml', system=system)
    done = verify(tmp_path / "units", units, "--system" if system else "--user")
    assert complaints(done) == []
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("word", AWKWARD)
def test_systemd_finds_programs_and_takes_arguments_of_any_name(tmp_path: Path, word: str) -> None:
    program = a_program(tmp_path / f"the {word}" / "bin")
    units = systemd.job_units(a_card(word), [CalendarTime("UTC", (3,), 0)], [str(program), "--config", f"/etc/{word}"])
    done = verify(tmp_path / "units", units)
    assert complaints(done) == []
    assert done.returncode == 0, done.stderr


def test_systemd_would_have_complained(tmp_path: Path) -> None:
    """The judge of the tests above judges."""
    good = systemd.job_units(a_card(), [CalendarTime("UTC", (3,), 0)], [str(a_program(tmp_path))])
    for number, (old, new) in enumerate(
        [("/backhaul run", "/backhau run"), ("KillMode=mixed", "KillMode=some"), ("03:00:00 UTC", "03:00:00 UCT+")]
    ):
        texts = {name: text.replace(old, new) for name, text in good.items()}
        assert texts != good
        done = verify(tmp_path / str(number), texts)
        assert complaints(done) or done.returncode != 0


def read_by_systemd(units: Mapping[str, str]) -> dict[str, str]:
    """Let a manager read units, which it does not run, and tell what it read: its dump by unit."""
    with tempfile.TemporaryDirectory(prefix="units-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        for file, text in units.items():
            (directory / file).write_text(text)
        (directory / "backhaul-all.target").write_text(f"[Unit]\nWants={' '.join(units)}\n")
        # Only with no rights at all is it content with a host that another runs.
        nobody = {"user": "nobody", "extra_groups": []} if os.geteuid() == 0 else {}
        done = subprocess.run(  # type: ignore[call-overload]
            ["/lib/systemd/systemd", "--system", "--test", "--unit=backhaul-all.target", "--log-target=console"],
            check=False,
            capture_output=True,
            text=True,
            cwd="/",
            env={"SYSTEMD_UNIT_PATH": f"{directory}:", "LC_ALL": "C.UTF-8"},
            **nobody,
        )
    dump = re.split(r"^\s*-> Unit (.*):$", done.stdout, flags=re.MULTILINE)
    found = dict(zip(dump[1::2], dump[2::2], strict=True))
    assert set(units) <= set(found), done.stderr[-2000:]
    return found


def test_systemd_reads_the_words_that_were_meant() -> None:
    units: dict[str, str] = {}
    for word in AWKWARD:
        units |= systemd.job_units(
            msgspec.structs.replace(a_card(word), what=f"{word}\\"),
            [CalendarTime(BERLIN, (3, 4), 7, (0, 1, 2, 6)), CalendarTime("UTC", (3,), 0, date="2026-03-29")],
            ["/bin/true", "--config", word],
            environment={"BACKHAUL_CONFIG": word},
        )
    found = read_by_systemd(units)
    for word in AWKWARD:
        name = systemd.unit_name(word)
        service, timer = found[f"{name}.service"], found[f"{name}.timer"]
        (line,) = re.findall(r"^\s*Command Line: (.*)$", service, re.MULTILINE)
        # It quotes them for a shell.
        done = subprocess.run(["/bin/sh", "-c", f"printf '%s\\0' {line}"], check=True, capture_output=True, text=True)
        arguments = done.stdout.split("\0")[:-1]
        # What is left to be read is $, as the program is started: two are one, and alone it would be a variable.
        assert not any("$" in argument.replace("$$", "") for argument in arguments)
        expected = ["/bin/true", "--config", word, "run", "--scheduled", "--quiet", word]
        assert [argument.replace("$$", "$") for argument in arguments] == expected
        assert f"\tEnvironment: BACKHAUL_CONFIG={word}\n" in service
        assert f"\tDescription: Backhaul: {word}: {word.rstrip(chr(92))}" in service
        for text in ("KillMode: mixed", "TimeoutStartSec: infinity", "TimeoutStopSec: 2min", "IgnoreSIGPIPE: no"):
            assert f"\t{text}\n" in service
        for text in ("Persistent: yes", "Accuracy: 1s"):
            assert f"\t{text}\n" in timer
        assert set(re.findall("OnCalendar: (.*)", timer)) == {
            "Mon..Wed,Sun *-*-* 03,04:07:00 Europe/Berlin",
            "2026-03-29 03:00:00 UTC",
        }


def check_syntax(text: str) -> None:
    done = subprocess.run(["crontab", "-n", "-"], input=text.encode(), capture_output=True, check=False)
    assert done.returncode == 0 and b"successfully checked" in done.stderr, done.stderr


@pytest.mark.parametrize("word", AWKWARD)
def test_cron_takes_the_lines(word: str) -> None:
    entries = [(a_card(name, window), begin_times.usual_times(window, key)) for name, (window, key) in CASES.items()]
    block = crontab.crontab_block(entries, ["/b", "--config", f"/etc/{word}"], path="/usr/bin:/bin")
    check_syntax(crontab.merge_block("MAILTO=me\n5 4 * * * x\n", block))
    with pytest.raises(AssertionError):
        check_syntax(block.replace("*/10 * * * *", "*/10 * * *"))


@pytest.mark.parametrize("name", [name for name, (window, _) in CASES.items() if window.timezone in (BERLIN, NEW_YORK)])
def test_cron_or_the_tick_begins_what_is_due(name: str) -> None:
    from cronsim import CronSim

    window, key = CASES[name]
    block = crontab.crontab_block([(a_card(window=window), begin_times.usual_times(window, key))], ["/b"])
    clock = ZoneInfo(window.timezone)
    since, until = dt.datetime(2026, 1, 3, tzinfo=clock), dt.datetime(2027, 1, 3, tzinfo=clock)
    fired = set()
    for line in block.splitlines():
        if " run " in line:
            for time in CronSim(" ".join(line.split()[:5]), since - MINUTE):
                if time >= until:
                    break
                fired.add(time.astimezone(dt.UTC))
    found = [each for each in windows.occurrences(window, key, since - 2 * DAY, until) if since <= each.begins < until]
    missed = [each for each in found if each.begins not in fired]
    # A change of the clock, twice a year; then the tick comes at most 10 minutes later.
    assert len(found) > 50 and len(missed) <= 2
    for each in missed:
        assert (each.begins - DAY).astimezone(clock).utcoffset() != (each.begins + DAY).astimezone(clock).utcoffset()
        assert each.closes - each.begins >= 10 * MINUTE


def to_shell(command: str) -> str:
    return re.sub(r"\\([%\\])", r"\1", command)


@pytest.mark.parametrize("word", AWKWARD)
def test_a_shell_gives_programs_of_cron_their_arguments(tmp_path: Path, word: str) -> None:
    program = a_program(tmp_path / word, f"#!{sys.executable}\nimport sys, os\nprint(sys.argv[1:], os.environ['X'])\n")
    block = crontab.crontab_block([(a_card(word), ())], [str(program), "--config", word], environment={"X": word})
    line = block.splitlines()[-2].removeprefix("*/10 * * * * ")
    for command in (to_shell(line), re.sub(r"\\%", "%", line)):
        done = subprocess.run(["/bin/sh", "-c", command], check=True, capture_output=True, text=True)
        assert done.stdout == f"{['--config', word, 'schedule', 'tick']} {word}\n"


class FakeHost:
    """systemd's and cron's programs as far as they keep things; cron's syntax is checked by its own.

    No manager runs here that would take units, and a crontab of its own for each test there is not.
    """

    def __init__(self, directory: Path) -> None:
        self.units = directory / "etc" / "units"
        self.crontab: bytes | None = None
        self.enabled: set[str] = set()
        self.loaded: dict[str, str] = {}
        self.calls: list[str] = []
        self.fail = ""
        self.linger = b"Linger=no\n"

    def host(self, *programs: str, **settings: object) -> Host:
        there = programs or ("systemctl", "crontab", "loginctl")
        host = Host(
            system=True,
            units=self.units,
            booted="systemctl" in there,
            timezone="Etc/UTC",
            user="me",
            run=self.run,
            has=lambda name: name in there,
        )
        return msgspec.structs.replace(host, **settings)

    def run(self, command: Sequence[str], data: bytes) -> Outcome:
        call = " ".join(command)
        self.calls.append(call)
        if self.fail and self.fail in call:
            return Outcome(1, b"", b"it can't be done\n")
        words = [word for word in command[1:] if word not in ("--user", "--")]
        if command[0] == "loginctl":
            return Outcome(0, self.linger)
        if command[0] == "systemctl":
            return self.systemctl(*words)
        if words in (["-h"], ["-n", "-"]):
            return schedule.run(command, data)
        if words == ["-l"]:
            return Outcome(1, b"", b"no crontab for me\n") if self.crontab is None else Outcome(0, self.crontab)
        assert words in (["-"], ["-r"])
        self.crontab = data if words == ["-"] else None
        return Outcome(0)

    def systemctl(self, verb: str, *words: str) -> Outcome:
        if verb == "daemon-reload":
            self.loaded = {path.name: path.read_text() for path in self.units.glob("backhaul-*")}
        elif verb == "enable":
            assert words[0] == "--now" and all(word in self.loaded for word in words[1:])
            self.enabled.update(words[1:])
        elif verb == "disable":
            # Its file is there still, or systemd would not know what to undo.
            assert words[0] == "--now" and all((self.units / word).exists() for word in words[1:])
            self.enabled.difference_update(words[1:])
        else:
            assert verb == "show"
            return Outcome(0, "\n".join(self.shown(word) for word in words[1:]).encode())
        return Outcome(0)

    def shown(self, name: str) -> str:
        enabled = name in self.enabled
        values = {
            "Id": name,
            "LoadState": "loaded" if name in self.loaded else "not-found",
            "UnitFileState": "enabled" if enabled else "disabled",
            "ActiveState": "active" if enabled else "inactive",
            "NeedDaemonReload": "no",
        }
        return "".join(f"{key}={value}\n" for key, value in values.items())

    @property
    def files(self) -> set[str]:
        return {path.name for path in self.units.glob("*")} | {path.name for path in self.units.glob(".*")}


@pytest.fixture
def fake(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path)


@pytest.fixture
def command(tmp_path: Path) -> tuple[str, ...]:
    return (str(a_program(tmp_path)),)


def names(*jobs: str) -> set[str]:
    return {f"backhaul-{job}.{suffix}" for job in jobs for suffix in ("service", "timer")}


def put(fake: FakeHost, how: str, cards: Sequence[JobCard], command: Sequence[str], *programs: str) -> None:
    host = fake.host(*programs)
    schedule.install(schedule.plan_schedule(cards, how, command, host), host)


def test_units_come_change_and_go(fake: FakeHost, command: tuple[str, ...]) -> None:
    host = fake.host()
    plan = schedule.plan_schedule([a_card("a"), a_card("b"), a_card("none", None)], "auto", command, host)
    assert plan.how == "systemd" and fake.files == set(), "a plan does nothing"
    assert {Path(change.path).name for change in plan.changes} == names("a", "b", "tick")
    schedule.install(plan, host)
    assert fake.files == names("a", "b", "tick")
    assert fake.enabled == {"backhaul-a.timer", "backhaul-b.timer", "backhaul-tick.timer"}
    assert complaints(verify(fake.units, fake.loaded)) == []
    assert {path.stat().st_mode & 0o777 for path in fake.units.glob("*")} == {0o644}

    again = schedule.plan_schedule([a_card("a"), a_card("b")], "auto", command, host)
    assert again.changes == () and len(again.kept) == 6 and again.crontab is None

    later = msgspec.structs.replace(NIGHTS, starts=(60,))
    plan = schedule.plan_schedule([a_card("b", later), a_card("c")], "auto", command, host)
    assert {(change.action, Path(change.path).name) for change in plan.changes} == {
        ("change", "backhaul-b.timer"),
        *(("write", name) for name in names("c")),
        *(("remove", name) for name in names("a")),
    }
    text = "\n".join(schedule.describe(plan))
    assert re.search(r"\n        -OnCalendar=\*?.* 22:\d\d:00 UTC\n        \+OnCalendar=.* 01:\d\d:00 UTC\n", text)
    schedule.install(plan, host)
    assert fake.files == names("b", "c", "tick") == set(fake.loaded)
    assert fake.enabled == {"backhaul-b.timer", "backhaul-c.timer", "backhaul-tick.timer"}

    schedule.remove(host)
    assert fake.files == fake.enabled == set(fake.loaded) == set()
    assert schedule.plan_removal(host).changes == ()


def test_what_is_installed_knows_changes_of_the_clock(fake: FakeHost, command: tuple[str, ...]) -> None:
    window, key = CASES["in the skipped hour"]
    put(fake, "systemd", [msgspec.structs.replace(a_card("a", window), jitter_of=key)], command)
    specs = re.findall("OnCalendar=(.*)", fake.loaded["backhaul-a.timer"])
    assert specs == ["*-*-* 02:30:00 Europe/Berlin", "Sun *-03-25..31 03:00:00 Europe/Berlin"]


def test_files_of_others_are_neither_changed_nor_removed(fake: FakeHost, command: tuple[str, ...]) -> None:
    fake.units.mkdir(parents=True)
    foreign = fake.units / "backhaul-a.service"
    foreign.write_text("[Service]\nExecStart=/mine\n")
    os.symlink("/dev/null", fake.units / "backhaul-masked.timer")
    elsewhere = fake.units.parent / "elsewhere"
    elsewhere.write_text(systemd.MARKER + "\n")
    os.symlink(elsewhere, fake.units / "backhaul-linked.timer")
    for name in ("a", "masked", "linked"):
        with pytest.raises(ConfigurationError) as caught:
            schedule.plan_schedule([a_card(name)], "systemd", command, fake.host())
        error = caught.value
        assert f"backhaul-{name}." in error.what and error.why and error.todo
    put(fake, "systemd", [a_card("b")], command)
    schedule.remove(fake.host())
    assert fake.files == {"backhaul-a.service", "backhaul-masked.timer", "backhaul-linked.timer"}
    assert foreign.read_text() == "[Service]\nExecStart=/mine\n"


def test_a_plan_that_is_overtaken_is_not_carried_out(fake: FakeHost, command: tuple[str, ...]) -> None:
    host = fake.host()
    plan = schedule.plan_schedule([a_card("a")], "systemd", command, host)
    fake.units.mkdir(parents=True)
    (fake.units / "backhaul-a.timer").write_text("[Timer]\n")
    with pytest.raises(FailedError):
        schedule.install(plan, host)
    assert fake.files == {"backhaul-a.timer"} and fake.enabled == set()
    (fake.units / "backhaul-a.timer").unlink()

    plan = schedule.plan_schedule([a_card("a")], "cron", command, host)
    fake.crontab = b"5 4 * * * new\n"
    with pytest.raises(FailedError):
        schedule.install(plan, host)
    assert fake.crontab == b"5 4 * * * new\n"


@pytest.mark.parametrize("step", ["daemon-reload", "enable", "disable"])
def test_after_a_failure_installing_again_is_right(fake: FakeHost, command: tuple[str, ...], step: str) -> None:
    put(fake, "systemd", [a_card("a")], command)
    fake.fail = step
    with pytest.raises(ConfigurationError) as caught:
        put(fake, "systemd", [a_card("b")], command)
    assert "it can't be done" in caught.value.why and step in caught.value.what
    fake.fail = ""
    put(fake, "systemd", [a_card("b")], command)
    assert fake.files == names("b", "tick") and fake.enabled == {"backhaul-b.timer", "backhaul-tick.timer"}


def test_a_timer_that_is_not_in_force_is_told(
    fake: FakeHost, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = fake.shown
    monkeypatch.setattr(fake, "shown", lambda name: shown(name).replace("ActiveState=active", "ActiveState=failed"))
    with pytest.raises(FailedError) as caught:
        put(fake, "systemd", [a_card("a")], command)
    assert "backhaul-a.timer is failed" in caught.value.why


def test_a_crontab_gets_lines_and_keeps_its_own(fake: FakeHost, command: tuple[str, ...]) -> None:
    before = b"# mine \xff\nMAILTO=me\n5 4 * * * mine\n"
    fake.crontab = before
    far = msgspec.structs.replace(NIGHTS, timezone="Asia/Tokyo")
    cards = [a_card("a"), a_card("far", far)]
    plan = schedule.plan_schedule(cards, "auto", command, fake.host("crontab"))
    assert plan.how == "cron" and fake.crontab == before
    schedule.install(plan, fake.host("crontab"))
    assert fake.crontab.startswith(before) and b" run --scheduled --quiet a\n" in fake.crontab
    assert b"not Asia/Tokyo" in fake.crontab and b"run --scheduled --quiet far" not in fake.crontab
    assert any(call == "crontab -n -" for call in fake.calls), "Debian's cron checked it"
    assert schedule.plan_schedule(cards, "cron", command, fake.host()).crontab is None
    put(fake, "cron", [a_card("b")], command, "crontab")
    assert b"quiet b\n" in fake.crontab and b"quiet a\n" not in fake.crontab
    schedule.remove(fake.host("crontab"))
    assert fake.crontab == before
    fake.crontab = None
    put(fake, "cron", [a_card("b")], command, "crontab")
    schedule.remove(fake.host("crontab"))
    assert fake.crontab is None


def test_a_crontab_that_cron_would_not_take_is_not_written(fake: FakeHost, command: tuple[str, ...]) -> None:
    fake.crontab = b"5 4 * * nonsense x\n"
    with pytest.raises(ConfigurationError) as caught:
        put(fake, "cron", [a_card("a")], command, "crontab")
    assert "bad" in caught.value.why and fake.crontab == b"5 4 * * nonsense x\n"
    fake.crontab, fake.fail = b"", "crontab -l"
    with pytest.raises(ConfigurationError) as caught:
        put(fake, "cron", [a_card("a")], command, "crontab")
    assert "it can't be done" in caught.value.why


def test_who_changes_from_one_to_the_other_has_only_one(fake: FakeHost, command: tuple[str, ...]) -> None:
    put(fake, "cron", [a_card("a")], command)
    assert fake.crontab is not None and fake.files == set()
    put(fake, "systemd", [a_card("a")], command)
    assert fake.crontab is None and fake.files == names("a", "tick")
    put(fake, "cron", [a_card("a")], command)
    assert fake.crontab is not None and fake.files == fake.enabled == set()


def test_what_a_host_has_decides(fake: FakeHost) -> None:
    assert schedule.choose("auto", fake.host()) == "systemd"
    assert schedule.choose("auto", fake.host(booted=False)) == "cron"
    assert schedule.choose("cron", fake.host()) == "cron"
    for how, host in (
        ("auto", fake.host("nothing")),
        ("cron", fake.host("systemctl")),
        ("systemd", fake.host("crontab")),
        ("systemd", fake.host(booted=False)),
    ):
        with pytest.raises(ConfigurationError) as caught:
            schedule.choose(how, host)
        assert caught.value.what and caught.value.why and "backhaul schedule run" in caught.value.todo


def test_a_users_timers_need_him_to_linger(fake: FakeHost, command: tuple[str, ...]) -> None:
    host = fake.host(system=False)
    plan = schedule.plan_schedule([a_card("a")], "systemd", command, host)
    assert len(plan.remarks) == 1 and "loginctl enable-linger" in plan.remarks[0]
    schedule.install(plan, host)
    assert "systemctl --user daemon-reload" in fake.calls
    assert complaints(verify(fake.units, fake.loaded, "--user")) == []
    fake.linger = b"Linger=yes\n"
    assert schedule.plan_schedule([a_card("a")], "systemd", command, host).remarks == ()


def test_what_is_installed_is_told(fake: FakeHost, command: tuple[str, ...]) -> None:
    cards = [a_card("a"), a_card("b"), a_card("none", None)]

    def state() -> schedule.ScheduleState:
        return schedule.installed(cards, command, fake.host(), NOW)

    nothing = state()
    assert (nothing.how, nothing.states, nothing.tick, nothing.as_planned) == ("", ("missing",) * 2, "missing", False)
    put(fake, "systemd", cards, command)
    good = state()
    assert (good.how, good.states, good.tick, good.as_planned) == ("systemd", ("installed",) * 2, "installed", True)
    for job, card in zip(good.jobs, cards, strict=False):
        assert card.window is not None
        assert job.next == windows.following(card.window, card.jitter_of, NOW)
        assert job.next is not None and job.next.opens == dt.datetime(2026, 11, 21, 22, tzinfo=dt.UTC)
    fake.enabled.discard("backhaul-b.timer")
    with (fake.units / "backhaul-a.timer").open("a") as file:
        file.write("# edited\n")
    assert state().states == ("differs", "disabled") and not state().as_planned
    (fake.units / "backhaul-a.service").unlink()
    assert state().states == ("missing", "disabled")
    put(fake, "systemd", [*cards, a_card("gone")], command)
    assert state().gone == (
        str(fake.units / "backhaul-gone.service"),
        str(fake.units / "backhaul-gone.timer"),
    )
    assert not state().as_planned
    fake.crontab = b"# BEGIN backhaul\n# END backhaul\n"
    assert state().how == "systemd and cron" and state().remarks


def test_what_is_installed_in_a_crontab_is_told(fake: FakeHost, command: tuple[str, ...]) -> None:
    far = a_card("far", msgspec.structs.replace(NIGHTS, timezone="Asia/Tokyo"))
    cards = [a_card("a"), far]
    put(fake, "cron", cards, command, "crontab")

    def state(cards: Sequence[JobCard]) -> schedule.ScheduleState:
        return schedule.installed(cards, command, fake.host("crontab"), NOW)

    good = state(cards)
    assert (good.how, good.states, good.tick, good.as_planned) == (
        "cron",
        ("installed", "by the tick"),
        "installed",
        True,
    )
    later = msgspec.structs.replace(NIGHTS, starts=(60,))
    other = state([a_card("a", later), far, a_card("new")])
    assert other.states == ("differs", "by the tick", "missing") and not other.as_planned
    fewer = state([far])
    assert len(fewer.gone) == 1 and "--quiet a" in fewer.gone[0]
    elsewhere = schedule.installed(cards, ["/elsewhere"], fake.host("crontab"), NOW)
    assert elsewhere.states == ("differs", "by the tick") and elsewhere.tick == "differs"


def test_the_next_begin_is_the_one_that_is_still_to_come(fake: FakeHost, command: tuple[str, ...]) -> None:
    window, key = CASES["opened before the change"]
    card = msgspec.structs.replace(a_card("a", window), jitter_of=key)
    opened = windows.open_at(window, key, dt.datetime(2026, 6, 1, 0, 30, tzinfo=dt.UTC))
    assert opened is not None and opened.begins > dt.datetime(2026, 6, 1, 0, 30, tzinfo=dt.UTC)
    for now, begins in ((opened.begins - MINUTE, opened.begins), (opened.begins, opened.begins + DAY)):
        (job,) = schedule.installed([card], command, fake.host(), now).jobs
        assert job.next is not None and job.next.begins == begins


def test_the_command_is_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *rest = schedule.own_command("my config.toml")
    assert Path(program).is_absolute() and os.access(program, os.X_OK)
    assert rest == ["--config", str(Path.cwd() / "my config.toml")]
    done = subprocess.run([*schedule.own_command(), "--version"], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("backhaul")
    # Where no script was installed beside it.
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert schedule.own_command() == (str(tmp_path / "python"), "-m", "backhaul")


def test_the_host_has_a_zone(tmp_path: Path) -> None:
    link, file = tmp_path / "localtime", tmp_path / "timezone"
    link.symlink_to("/usr/share/zoneinfo/Europe/Berlin")
    assert schedule.host_timezone(link, file) == "Europe/Berlin"
    # A copy has no name; Debian keeps it beside.
    link.unlink()
    link.write_bytes(Path("/usr/share/zoneinfo/Europe/Berlin").read_bytes())
    assert schedule.host_timezone(link, file) == ""
    file.write_text("Europe/Vienna\n")
    assert schedule.host_timezone(link, file) == "Europe/Vienna"
    assert schedule.host_timezone(tmp_path / "none", tmp_path / "none") == "UTC"
    assert schedule.this_host().timezone == schedule.host_timezone()


def test_a_user_has_units_of_his_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    host = schedule.this_host()
    assert not host.system and host.units == tmp_path / "systemd" / "user"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    host = schedule.this_host()
    assert host.system and host.units == Path("/etc/systemd/system")


def test_a_directory_that_can_not_be_written_is_told(fake: FakeHost, command: tuple[str, ...]) -> None:
    fake.units.parent.mkdir()
    fake.units.write_text("no directory")
    with pytest.raises(BackhaulError) as caught:
        put(fake, "systemd", [a_card("a")], command)
    assert isinstance(caught.value, ConfigurationError) and str(fake.units) in caught.value.what


def test_the_credentials_of_a_config_are_given_to_its_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from backhaul.jobs import own_schedule
    from backhaul.jobs.host import JobHost
    from backhaul.operations.places import CONFIG_VARIABLE

    config = tmp_path / "config.toml"
    config.write_text(
        '[notify.ops]\nkind = "mail"\nhost = "127.0.0.1"\nfrom = "a@example.com"\nto = "b@example.com"\nuser = "u"\n'
        'password = { credential = "smtp" }\n[jobs.night]\nkind = "command"\ncommand = ["true"]\nnotify = "ops"\n'
        'environment = { PGPASSWORD = { credential = "pg" } }\nwindow = { start = "22:00" }\n'
    )
    monkeypatch.setenv(CONFIG_VARIABLE, str(config))
    monkeypatch.setenv("BACKHAUL_STATE", str(tmp_path / "state"))
    host = FakeHost(tmp_path)
    monkeypatch.setattr(own_schedule, "this_host", lambda: host.host("systemctl", "loginctl"))
    with JobHost() as jobs:
        plan = own_schedule.plan_of(jobs, "systemd")
    service = next(change.after for change in plan.changes if change.path.endswith("backhaul-night.service"))
    for name in ("smtp", "pg"):
        assert f"LoadCredential={name}:/etc/credstore/{name}\n" in service
