"""The schedule on this host: timers of systemd, or lines of a crontab, that begin jobs at their times.

What is to be done is a value, the plan, made of what the config says and what lies on the host; ``install`` does it.
A plan has both in it, the units and the crontab: who changes from one to the other leaves no job begun twice.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import difflib
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from backhaul.errors import ConfigurationError, FailedError
from backhaul.formats import crontab, systemd
from backhaul.model.calendar import CalendarTime
from backhaul.model.job import JobCard
from backhaul.model.schedule import Occurrence
from backhaul.operations.atomic_file import write_atomically
from backhaul.planning import begin_times, windows
from backhaul.targets.file import sync_directory

SYSTEMD, CRON, AUTO = "systemd", "cron", "auto"
WAYS = (SYSTEMD, CRON)
WRITE, CHANGE, REMOVE = "write", "change", "remove"
# How it is with what begins a job.
INSTALLED, DIFFERS, MISSING, DISABLED, BY_TICK = "installed", "differs", "missing", "disabled", "by the tick"
_SYSTEM_UNITS = "/etc/systemd/system"
# The file that says, by its existence, that systemd runs this host: sd_booted(3).
_RUNNING = "/run/systemd/system"


class Outcome(msgspec.Struct, frozen=True):
    """How a program ended, and what it said."""

    status: int
    output: bytes = b""
    errors: bytes = b""

    @property
    def words(self) -> str:
        """What it said, for people."""
        return (self.errors or self.output).decode(errors="replace").strip() or f"it ended with status {self.status}"


# Runs a program with an input; FileNotFoundError where there is none of that name.
Runner = Callable[[Sequence[str], bytes], Outcome]


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """What the schedule is made on.

    Attributes:
        system: whether the units are the system's, root's; else a user's.
        units: the directory that they lie in.
        booted: whether systemd runs the host.
        timezone: of the host's clock, which is that of cron.
        user: who is to run the jobs.
        run: runs a program.
        has: tells whether there is a program of a name.
    """

    system: bool
    units: Path
    booted: bool
    timezone: str
    user: str
    run: Runner
    has: Callable[[str], bool]


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A file, or the crontab, that is to be other than it is. ``before``, ``after``: its text, empty for no file."""

    action: str
    path: str
    before: str = ""
    after: str = ""


class SchedulePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be done for the schedule to be as the config says.

    Attributes:
        how: ``systemd`` or ``cron``; empty to have none.
        changes: of unit files, in order.
        crontab: the change of the crontab; None for none.
        kept: unit files that are as they must be.
        timers: that must be enabled; they all are named, also those that are.
        remarks: what the operator may want to know.
    """

    how: str
    changes: tuple[Change, ...] = ()
    crontab: Change | None = None
    kept: tuple[str, ...] = ()
    timers: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


class Scheduled(msgspec.Struct, frozen=True, kw_only=True):
    """How it is with one job.

    Attributes:
        job: its name.
        window: in words.
        next: when it begins next; None for never, within a year.
        state: ``installed``, ``differs`` from what would be written now, ``missing``, ``disabled`` (its timer is there
            and does not run), or ``by the tick``, within 10 minutes: of a zone that cron does not know.
    """

    job: str
    window: str
    next: Occurrence | None
    state: str


class ScheduleState(msgspec.Struct, frozen=True, kw_only=True):
    """How it is with the schedule.

    Attributes:
        how: ``systemd`` or ``cron``: what is installed; both, joined by ``and``, is one too many; empty for nothing.
        jobs: each that has a window.
        tick: the state of what catches up, as in ``Scheduled``.
        gone: timers and files that are installed for jobs that are no more.
        remarks: what the operator may want to know.
    """

    how: str
    jobs: tuple[Scheduled, ...]
    tick: str
    gone: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def as_planned(self) -> bool:
        """Whether nothing is to be installed."""
        good = (INSTALLED, BY_TICK)
        return self.how in WAYS and not self.gone and all(each in good for each in (*self.states, self.tick))

    @property
    def states(self) -> tuple[str, ...]:
        """Those of the jobs."""
        return tuple(job.state for job in self.jobs)


def this_host() -> Host:
    """Return the host that this runs on, and its user."""
    system = os.geteuid() == 0
    return Host(
        system=system,
        units=Path(_SYSTEM_UNITS) if system else _user_units(),
        booted=Path(_RUNNING).is_dir(),
        timezone=host_timezone(),
        user=_user_name(),
        run=run,
        has=lambda name: shutil.which(name) is not None,
    )


def run(command: Sequence[str], data: bytes) -> Outcome:
    """Run a program to its end; messages in English, since they are looked at.

    Raises:
        FileNotFoundError: there is no such program.
    """
    done = subprocess.run(
        command, input=data, capture_output=True, check=False, env={**os.environ, "LC_ALL": "C.UTF-8"}
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def host_timezone(localtime: Path = Path("/etc/localtime"), timezone: Path = Path("/etc/timezone")) -> str:
    """Return the IANA name of the zone of this host's clock; empty where it has no name."""
    from zoneinfo import ZoneInfo

    names = []
    with contextlib.suppress(OSError):
        names.append(os.path.realpath(localtime).rpartition("/zoneinfo/")[2])
    with contextlib.suppress(OSError, UnicodeDecodeError):
        names.append(timezone.read_text().strip())
    if not localtime.exists():
        names.append("UTC")
    for name in names:
        # (A directory is no zone, but not all versions say so in the same way.)
        with contextlib.suppress(OSError, ValueError, KeyError):
            return ZoneInfo(name).key
    return ""


def own_command(config: str | None = None) -> tuple[str, ...]:
    """Return what runs this Backhaul from anywhere: an absolute path, and what comes before the verb.

    Args:
        config: the config that was named, if one was.
    """
    script = Path(sys.executable).parent / "backhaul"
    command = (str(script),) if os.access(script, os.X_OK) else (sys.executable, "-m", "backhaul")
    return command if config is None else (*command, "--config", str(Path(config).absolute()))


def plan_schedule(
    cards: Sequence[JobCard],
    how: str,
    command: Sequence[str],
    host: Host,
    *,
    credentials: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    path: str = "",
) -> SchedulePlan:
    """Say what must be written, changed and removed. Nothing is.

    Args:
        cards: all jobs; those without a window are not scheduled.
        how: ``systemd``, ``cron`` or ``auto``.
        command: see ``own_command``.
        host: see ``this_host``.
        credentials: files that services are given, by name (systemd only).
        environment: variables that the runs are given.
        path: the ``PATH`` of runs in a crontab.

    Raises:
        ConfigurationError: neither systemd nor cron is there, or not the one that was asked for; a file that was not
            made here is in the way; the crontab can't be read, or its markers are damaged.
    """
    chosen = choose(how, host)
    scheduled = [card for card in cards if card.window is not None]
    remarks: list[str] = []
    units: dict[str, str] = {}
    block: str | None = None
    if chosen == SYSTEMD:
        units = _units(scheduled, command, host, credentials, environment)
        remarks += _lingering(host)
    else:
        block = _block(scheduled, command, host, environment, path)
        if credentials:
            remarks.append("Credentials are given by systemd only: cron's runs find the files that the config names.")
    return _plan(chosen, units, block, host, remarks)


def plan_removal(host: Host) -> SchedulePlan:
    """Say what must be removed for nothing to call Backhaul any more.

    Raises:
        ConfigurationError: the markers in the crontab are damaged.
    """
    return _plan("", {}, None, host, [])


def choose(how: str, host: Host) -> str:
    """Return ``systemd`` or ``cron``, for ``auto`` what runs here.

    Raises:
        ConfigurationError: it is not there.
    """
    has_systemd = host.booted and host.has("systemctl")
    if how == SYSTEMD or (how == AUTO and has_systemd):
        if not has_systemd:
            raise ConfigurationError(
                "The schedule can't be given to systemd",
                "systemd does not run this host" if not host.booted else "there is no systemctl",
                "Use cron: backhaul schedule install --with cron; or in a container: backhaul schedule run",
            )
        return SYSTEMD
    if not host.has("crontab"):
        raise ConfigurationError(
            "Nothing here can begin jobs at their times",
            "there is no crontab" if how == CRON else "systemd does not run this host, and there is no crontab",
            "In a container let Backhaul do it itself: backhaul schedule run; else install cron.",
        )
    return CRON


def describe(plan: SchedulePlan) -> list[str]:
    """Return a plan in lines for people: what is done to which file, and how changed ones differ."""
    lines = [f"keep    {path}" for path in plan.kept]
    crontabs = () if plan.crontab is None else (plan.crontab,)
    for change in (*plan.changes, *crontabs):
        lines.append(f"{change.action:7} {change.path}")
        if change.action == CHANGE:
            before, after = change.before.splitlines(), change.after.splitlines()
            lines += [f"        {line}" for line in list(difflib.unified_diff(before, after, lineterm="", n=0))[2:]]
    lines += [f"enable  {timer}" for timer in plan.timers]
    return lines + list(plan.remarks)


def install(plan: SchedulePlan, host: Host) -> None:
    """Do what a plan says, and look whether it is so. Doing it again is right after any failure.

    Raises:
        ConfigurationError: systemd, cron or the disk refuse.
        FailedError: what was installed is not in force; or a file was changed by others since the plan was made.
    """
    _check_unchanged(plan, host)
    gone = [Path(change.path) for change in plan.changes if change.action == REMOVE]
    # First what is new, so that at no point of death a job has nobody to begin it.
    if plan.how == CRON and plan.crontab is not None:
        _write_crontab(plan.crontab, host)
    for change in plan.changes:
        if change.action != REMOVE:
            _write_file(Path(change.path), change.after)
    if plan.timers:
        _systemctl(host, "daemon-reload")
        _systemctl(host, "enable", "--now", "--", *plan.timers)
    _disable([path.name for path in gone if path.suffix == ".timer"], host)
    for path in gone:
        with _disk(path):
            path.unlink(missing_ok=True)
    if gone:
        with _disk(host.units):
            sync_directory(host.units)
        if host.booted:
            _systemctl(host, "daemon-reload")
    if plan.how != CRON and plan.crontab is not None:
        _write_crontab(plan.crontab, host)
    wrong = {name: words for name, words in _timer_states(plan.timers, host).items() if words}
    if wrong:
        raise FailedError(
            f"Not all timers are in force: {', '.join(wrong)}",
            "; ".join(f"{name} is {words}" for name, words in wrong.items()),
            f"See: {' '.join(_systemctl_command(host))} status {next(iter(wrong))}",
        )


def remove(host: Host) -> SchedulePlan:
    """Remove all that was installed, by either way; return what was done.

    Raises:
        ConfigurationError, FailedError: see ``install``.
    """
    plan = plan_removal(host)
    install(plan, host)
    return plan


def installed(
    cards: Sequence[JobCard],
    command: Sequence[str],
    host: Host,
    now: dt.datetime,
    *,
    credentials: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    path: str = "",
) -> ScheduleState:
    """Say when each job begins next, and whether what begins it is installed as it would be now.

    Args:
        now: the present, aware. The others: see ``plan_schedule``.

    Raises:
        ConfigurationError: the crontab can't be read, or its markers are damaged.
    """
    scheduled = [card for card in cards if card.window is not None]
    there = _our_units(host)
    remarks: list[str] = []
    text = _old_crontab(host, remarks)
    block = None if text is None else crontab.find_block(text)
    ways = [way for way, found in ((SYSTEMD, bool(there)), (CRON, block is not None)) if found]
    states = {card.name: MISSING for card in scheduled}
    tick = MISSING
    gone: list[str] = []
    if SYSTEMD in ways:
        wanted = _units(scheduled, command, host, credentials, environment)
        names = {card.name: systemd.unit_name(card.name) for card in scheduled}
        try:
            in_force = _timer_states([f"{name}.timer" for name in (*names.values(), systemd.TICK)], host)
        except ConfigurationError as error:
            remarks.append(f"{error.what}: {error.why}. Whether the timers are in force is not known.")
            in_force = {}
        states = {job: _unit_state(name, wanted, there, in_force) for job, name in names.items()}
        tick = _unit_state(systemd.TICK, wanted, there, in_force)
        gone = sorted(str(host.units / name) for name in there if name not in wanted)
        remarks += _lingering(host)
    elif block is not None:
        lines = set(block.splitlines())
        expected = _block(scheduled, command, host, environment, path)
        for card in scheduled:
            states[card.name] = _line_state(card, lines, command, host, environment, path)
        *_, last, _ = expected.splitlines()
        tick = INSTALLED if last in lines else DIFFERS
        known = set(expected.splitlines())
        gone = [line for line in block.splitlines() if not line.startswith("#") and line not in known]
        if DIFFERS in (*states.values(), tick):
            gone = []  # they may be the same jobs' lines, of an earlier config
    if len(ways) > 1:
        remarks.append("Both systemd and cron begin the jobs: install one again, and the other is removed.")
    return ScheduleState(
        how=" and ".join(ways),
        jobs=tuple(_scheduled(card, states[card.name], now) for card in scheduled),
        tick=tick,
        gone=tuple(gone),
        remarks=tuple(remarks),
    )


def _scheduled(card: JobCard, state: str, now: dt.datetime) -> Scheduled:
    from backhaul.formats.window import format_window

    assert card.window is not None
    after = windows.open_at(card.window, card.jitter_of, now)
    if after is None or after.begins <= now:
        after = windows.following(card.window, card.jitter_of, now)
    return Scheduled(job=card.name, window=format_window(card.window), next=after, state=state)


def _unit_state(name: str, wanted: Mapping[str, str], there: Mapping[str, str], in_force: Mapping[str, str]) -> str:
    files = [f"{name}.service", f"{name}.timer"]
    if any(file not in there for file in files):
        return MISSING
    if any(there[file] != wanted[file] for file in files):
        return DIFFERS
    return DISABLED if in_force.get(f"{name}.timer", "not known") else INSTALLED


def _line_state(
    card: JobCard,
    lines: set[str],
    command: Sequence[str],
    host: Host,
    environment: Mapping[str, str] | None,
    path: str,
) -> str:
    own = _block([card], command, host, environment, path).splitlines()[1:-3]
    calls = [line for line in own if not line.startswith("#")]
    if any(line not in lines for line in own):
        # Its comment names it, whatever became of its times.
        return DIFFERS if any(line.startswith(f"{own[0].partition(': ')[0]}: ") for line in lines) else MISSING
    return INSTALLED if calls else BY_TICK


def _units(
    cards: Sequence[JobCard],
    command: Sequence[str],
    host: Host,
    credentials: Mapping[str, str] | None,
    environment: Mapping[str, str] | None,
) -> dict[str, str]:
    units = systemd.tick_units(command, system=host.system, credentials=credentials, environment=environment)
    for card in cards:
        assert card.window is not None
        times = (
            *begin_times.usual_times(card.window, card.jitter_of),
            *begin_times.changed_times(card.window, card.jitter_of),
        )
        units |= systemd.job_units(
            card, times, command, system=host.system, credentials=credentials, environment=environment
        )
    return units


def _block(
    cards: Sequence[JobCard],
    command: Sequence[str],
    host: Host,
    environment: Mapping[str, str] | None,
    path: str,
) -> str:
    entries = [(card, _cron_times(card, host)) for card in cards]
    return crontab.crontab_block(entries, command, path=path, environment=environment)


def _cron_times(card: JobCard, host: Host) -> tuple[CalendarTime, ...]:
    """Return when cron begins a job; empty where it does not know the clock of its window."""
    assert card.window is not None
    if not host.timezone or not begin_times.same_clock(card.window.timezone, host.timezone):
        return ()
    # At a change of its clock, cron itself begins at once what was skipped, and what begins later then, the tick.
    return begin_times.usual_times(card.window, card.jitter_of)


def _plan(how: str, units: Mapping[str, str], block: str | None, host: Host, remarks: list[str]) -> SchedulePlan:
    there = _our_units(host)
    changes, kept = [], []
    for name, text in sorted(units.items()):
        path = host.units / name
        if name not in there and os.path.lexists(path):
            raise ConfigurationError(
                f"{path} is in the way",
                "it does not begin with the line that marks what Backhaul made, so it is somebody else's",
                "Rename or remove it, or rename the job.",
            )
        if there.get(name) == text:
            kept.append(str(path))
        else:
            action = CHANGE if name in there else WRITE
            changes.append(Change(action=action, path=str(path), before=there.get(name, ""), after=text))
    gone = sorted(set(there) - set(units))
    changes += [Change(action=REMOVE, path=str(host.units / name), before=there[name]) for name in gone]
    before = _crontab(host) if how == CRON else _old_crontab(host, remarks)
    crontab_change = None
    if before is not None:
        after = crontab.remove_block(before) if block is None else crontab.merge_block(before, block)
        crontab_change = None if before == after else _crontab_change(before, after, host)
    return SchedulePlan(
        how=how,
        changes=tuple(changes),
        crontab=crontab_change,
        kept=tuple(kept),
        timers=tuple(name for name in sorted(units) if name.endswith(".timer")),
        remarks=tuple(remarks),
    )


def _crontab_change(before: str, after: str, host: Host) -> Change:
    action = REMOVE if not after else CHANGE if before else WRITE
    return Change(action=action, path=f"crontab of {host.user}", before=before, after=after)


def _our_units(host: Host) -> dict[str, str]:
    """Return the texts of the unit files that were made here, by name."""
    found = {}
    with _disk(host.units):
        for path in sorted([*host.units.glob("backhaul-*.service"), *host.units.glob("backhaul-*.timer")]):
            # A link is somebody's decision, too: one to /dev/null masks a unit.
            if path.is_file() and not path.is_symlink():
                text = path.read_text(errors="surrogateescape")
                if systemd.is_ours(text):
                    found[path.name] = text
    return found


def _check_unchanged(plan: SchedulePlan, host: Host) -> None:
    there = _our_units(host)
    for change in plan.changes:
        path = Path(change.path)
        if there.get(path.name, "") != change.before or (path.name not in there and os.path.lexists(path)):
            raise _stale(change.path)
    if plan.crontab is not None and _crontab(host) != plan.crontab.before:
        raise _stale(plan.crontab.path)


def _stale(path: str) -> FailedError:
    return FailedError(f"{path} was not touched", "it was changed by another since the plan was made", "Install again.")


def _write_file(path: Path, text: str) -> None:
    """Write a unit file so that systemd reads the old one or the new one, at every moment."""
    with _disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # (Under a temporary name that systemd does not take for a unit's.)
        write_atomically(path, text.encode(errors="surrogateescape"), mode=0o644)


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"The schedule can't be kept in {path}",
            error.strerror or str(error),
            "Make it writable, or run this as the user who is to run the jobs.",
        ) from error


def _old_crontab(host: Host, remarks: list[str]) -> str | None:
    """Return the crontab where it is not needed, only looked into; None where there is none, or with a remark."""
    if not host.has("crontab"):
        return None
    try:
        return _crontab(host)
    except ConfigurationError as error:
        # Some users may have none (cron.allow): then there is nothing of ours in it that cron would run.
        remarks.append(f"{error.what}: {error.why}. Should lines of Backhaul be in it, they still are.")
        return None


def _crontab(host: Host) -> str:
    found = _program(host, ["crontab", "-l"])
    if found.status != 0:
        # (The second is busybox's.)
        if b"no crontab for" in found.errors or b"No such file" in found.errors:
            return ""
        raise ConfigurationError(
            f"The crontab of {host.user} can't be read", found.words, "See crontab(1): cron.allow and cron.deny."
        )
    return found.output.decode(errors="surrogateescape")


def _write_crontab(change: Change, host: Host) -> None:
    data = change.after.encode(errors="surrogateescape")
    # Only where -n is what Debian's has: to others it means what must not happen.
    if data and b"dry run: checks the syntax" in _program(host, ["crontab", "-h"]).errors:
        checked = _program(host, ["crontab", "-n", "-"], data)
        if checked.status != 0:
            raise _refused(host, checked)
    written = _program(host, ["crontab", "-"], data) if data else _program(host, ["crontab", "-r"])
    if written.status != 0:
        raise _refused(host, written)
    if crontab.find_block(_crontab(host)) != crontab.find_block(change.after):
        raise FailedError(
            f"The crontab of {host.user} is not what was written",
            "crontab -l shows other lines between the markers",
            "Look at it with crontab -l, and install again.",
        )


def _refused(host: Host, outcome: Outcome) -> ConfigurationError:
    return ConfigurationError(
        f"The crontab of {host.user} was not changed",
        outcome.words,
        "Correct the line that cron names with crontab -e, and install again.",
    )


def _program(host: Host, command: Sequence[str], data: bytes = b"") -> Outcome:
    try:
        return host.run(command, data)
    except OSError as error:
        raise ConfigurationError(
            f"{command[0]} can't be run", error.strerror or str(error), f"Install {command[0]}, and try again."
        ) from error


def _systemctl_command(host: Host) -> list[str]:
    return ["systemctl"] if host.system else ["systemctl", "--user"]


def _systemctl(host: Host, *arguments: str) -> Outcome:
    command = [*_systemctl_command(host), *arguments]
    outcome = _program(host, command)
    if outcome.status != 0:
        raise ConfigurationError(
            f"systemd did not do: {' '.join(command)}",
            outcome.words,
            "Check that you may: root for the system's timers, a login session for a user's."
            if b"bus" in outcome.errors or b"denied" in outcome.errors
            else "See: journalctl -xe; then install again.",
        )
    return outcome


def _disable(timers: Sequence[str], host: Host) -> None:
    if not timers or not host.has("systemctl"):
        return
    if host.booted:
        # (A service that runs now is left to end.)
        _systemctl(host, "disable", "--now", "--", *timers)
    else:
        # Nothing runs that could be stopped; what is left are links, and no harm where they can't be removed.
        with contextlib.suppress(ConfigurationError):
            _systemctl(host, "disable", "--", *timers)


def _timer_states(timers: Sequence[str], host: Host) -> dict[str, str]:
    """Return for each timer what is wrong with it, by systemd's own word; empty for one that is in force."""
    if not timers or not host.booted or not host.has("systemctl"):
        return dict.fromkeys(timers, "not known to systemd, which does not run")
    properties = "Id,LoadState,UnitFileState,ActiveState,NeedDaemonReload"
    outcome = _systemctl(host, "show", f"--property={properties}", "--", *timers)
    states: dict[str, str] = dict.fromkeys(timers, "not known to systemd")
    for paragraph in outcome.output.decode(errors="replace").split("\n\n"):
        values = dict(line.partition("=")[::2] for line in paragraph.splitlines())
        expected = {"LoadState": "loaded", "UnitFileState": "enabled", "ActiveState": "active"}
        wrong = [values.get(key, "") or "unknown" for key, value in expected.items() if values.get(key) != value]
        if values.get("NeedDaemonReload") == "yes":
            wrong.append("changed on disk, and not reloaded")
        if values.get("Id") in states:
            states[values["Id"]] = ", ".join(wrong)
    return states


def _lingering(host: Host) -> list[str]:
    """Return a remark where a user's timers end with his session."""
    if host.system or not host.booted or not host.has("loginctl"):
        return []
    outcome = _program(host, ["loginctl", "show-user", "--property=Linger", "--", host.user])
    if outcome.status == 0 and outcome.output.strip() == b"Linger=yes":
        return []
    if outcome.status == 0 and outcome.output.strip() != b"Linger=no":
        return []
    return [f"Timers of {host.user} run only while he is logged in. To have them always: loginctl enable-linger"]


def _user_units() -> Path:
    config = os.environ.get("XDG_CONFIG_HOME", "")
    # (A relative one is to be ignored, says the specification.)
    base = Path(config) if config.startswith("/") else Path.home() / ".config"
    return base / "systemd" / "user"


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
