"""Units of systemd: a service and a timer for each job, and the tick that catches up what was missed.

After systemd.service(5), systemd.timer(5), systemd.exec(5) and systemd.time(7), as of version 252. What must be
quoted differs from setting to setting: arguments of a command lose ``$``, ``%`` and backslashes, an assignment of
``Environment=`` only the latter two, the path of ``LoadCredential=`` only ``%``.

This module knows neither windows nor clocks: what it is given says when.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from backhaul.errors import ConfigurationError
from backhaul.formats.window import format_window, join_days
from backhaul.model.calendar import EVERY_DAY, CalendarTime
from backhaul.model.job import JobCard

# The first line of each file that is made here: only files that begin with it are ever changed or removed.
MARKER = "# Made by: backhaul schedule install. Edits are lost; drop-ins (systemctl edit) are not touched."
TICK = "backhaul-tick"
_WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
# systemd takes no program whose path has quotes, backslashes or control characters; and what it shows a program as
# its own name is expanded like its arguments, while the path is not.
_AWKWARD_PATH = re.compile(r"[\x00-\x1f\x7f'\"\\$]")
_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]+", re.ASCII)


def job_units(
    card: JobCard,
    times: Sequence[CalendarTime],
    command: Sequence[str],
    *,
    system: bool = True,
    credentials: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the texts of a job's service and timer by file name.

    Args:
        card: the job; it has a window.
        times: when it begins.
        command: what runs Backhaul: an absolute path, and arguments that come before ``run``.
        system: whether they are for the system's manager, or a user's.
        credentials: files that the service is given, by the name it is to find them under.
        environment: variables that the service is given, besides those of its manager.

    Raises:
        ConfigurationError: the name of the job, or of a file, can't be written into a unit.
    """
    assert card.window is not None
    name = unit_name(card.name)
    service = _service(
        f"Backhaul: {card.name}" + (f": {card.what}" if card.what else ""),
        [*command, "run", "--scheduled", "--quiet", card.name],
        system=system,
        credentials=credentials or {},
        environment=environment or {},
    )
    timer = _timer(
        f"Backhaul: {card.name}: {format_window(card.window)}",
        [on_calendar(time) for time in times],
        ["Persistent=true"],
        card.window.excluded,
    )
    return {f"{name}.service": service, f"{name}.timer": timer}


def tick_units(
    command: Sequence[str],
    *,
    system: bool = True,
    credentials: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the service and the timer, each 10 minutes, of what catches up and tells what is wrong.

    Args, Raises: see ``job_units``.
    """
    service = _service(
        "Backhaul: begin what was missed, tell what is wrong",
        [*command, "schedule", "tick", "--via", "systemd"],
        system=system,
        credentials=credentials or {},
        environment=environment or {},
        # It begins jobs as units of their own, and waits for none: one that hangs must not silence all that follow.
        limit="15min",
    )
    # In UTC: by a clock that shows an hour twice, nothing would elapse in the second.
    timer = _timer("Backhaul: each 10 minutes", ["*-*-* *:00/10:00 UTC"], [], ())
    return {f"{TICK}.service": service, f"{TICK}.timer": timer}


def receiver_unit(command: Sequence[str]) -> str:
    """Return the text of a service that waits to be sent dumps: ``backhaul receive --listen`` as a command line.

    Raises:
        ConfigurationError: an argument can't be written into a unit.
    """
    sections = (
        [
            "# Made by: backhaul receive --listen --unit. Save it, systemctl daemon-reload, systemctl enable --now.",
            "[Unit]",
            "Description=Backhaul: receive dumps",
            "Wants=network-online.target",
            "After=network-online.target",
        ],
        [
            "[Service]",
            "Type=notify",
            f"ExecStart={exec_start(command)}",
            # A session that fails does not end the service; what does is started again.
            "Restart=always",
            "RestartSec=10",
            # It was asked to stop.
            "SuccessExitStatus=130",
        ],
        ["[Install]", "WantedBy=multi-user.target"],
    )
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def unit_name(job: str) -> str:
    """Return the name of a job's units, without the suffix; two jobs never have the same.

    Raises:
        ConfigurationError: the name is too long, or that of the tick.
    """
    escaped = "".join(
        char if re.fullmatch(r"[A-Za-z0-9_.:-]", char, re.ASCII) else _escaped(char.encode(errors="surrogateescape"))
        for char in job
    )
    name = f"backhaul-{escaped}"
    if name == TICK:
        raise ConfigurationError(
            f"The job {job!r} can't be scheduled by systemd",
            f"{TICK}.timer is the name of the timer that looks after all jobs",
            "Give the job another name.",
        )
    if not job or len(name) > 240:
        raise ConfigurationError(
            f"The job {job!r} can't be scheduled by systemd",
            f"the names of units have 255 characters at most, and this needs {len(name) + len('.service')}",
            "Give the job a shorter name.",
        )
    return name


def is_ours(text: str) -> bool:
    """Tell whether a file was made here, and may be changed or removed."""
    return text.split("\n", 1)[0] == MARKER


def on_calendar(time: CalendarTime) -> str:
    """Return a calendar time in the words of systemd.time(7): ``Mon..Sat *-*-* 22:07:00 Europe/Berlin``."""
    if time.date:
        date = time.date
    else:
        month = f"{time.month:02d}" if time.month else "*"
        days = "*" if (time.first, time.last) == (1, 31) else f"{time.first:02d}..{time.last:02d}"
        date = f"*-{month}-{days}"
        if time.days != EVERY_DAY:
            date = f"{join_days(time.days, _WEEKDAYS, '..')} {date}"
    hours = "*" if len(time.hours) == 24 else ",".join(f"{hour:02d}" for hour in time.hours)
    return f"{date} {hours}:{time.minute:02d}:00 {time.timezone}"


def exec_start(command: Sequence[str]) -> str:
    """Return a command for ``ExecStart=`` that is run with exactly these arguments.

    Raises:
        ConfigurationError: it has a NUL character, or no absolute path.
    """
    if not command[0].startswith("/") or any("\0" in argument for argument in command):
        raise ConfigurationError(
            f"{command[0]!r} can't be run by systemd",
            "it is no absolute path" if not command[0].startswith("/") else "an argument has a NUL character",
            "Install Backhaul where it has one, and try again.",
        )
    through = ["/bin/sh", "-c", 'exec "$0" "$@"'] if _AWKWARD_PATH.search(command[0]) else []
    words = [*through, *command]
    return " ".join(_quoted(word, dollar="$" if number == 0 else "$$") for number, word in enumerate(words))


def _service(
    description: str,
    command: Sequence[str],
    *,
    system: bool,
    credentials: Mapping[str, str],
    environment: Mapping[str, str],
    limit: str = "infinity",
) -> str:
    # A user's manager has no such target.
    online = ["Wants=network-online.target", "After=network-online.target"] if system else []
    return _text(
        ["[Unit]", f"Description={_description(description)}", *online],
        [
            "[Service]",
            "Type=oneshot",
            f"ExecStart={exec_start(command)}",
            # A run that is skipped, its window closed or a hold in force, did what it should.
            "SuccessExitStatus=75",
            # The run ends its programs itself, in order; what it leaves behind is killed.
            "KillMode=mixed",
            # As in a shell: a producer whose reader went away ends.
            "IgnoreSIGPIPE=no",
            f"TimeoutStartSec={limit}",
            "TimeoutStopSec=2min",
            "Nice=10",
            "IOSchedulingClass=best-effort",
            "IOSchedulingPriority=7",
            *(f"Environment={_quoted(f'{name}={value}', dollar='$')}" for name, value in sorted(environment.items())),
            *(f"LoadCredential={_credential(name, path)}" for name, path in sorted(credentials.items())),
        ],
    )


def _timer(description: str, specs: Iterable[str], settings: Iterable[str], excluded: Sequence[str]) -> str:
    # systemd has no words for these.
    note = [f"# Not on {', '.join(excluded)}: then the run itself does nothing."] if excluded else []
    return _text(
        ["[Unit]", f"Description={_description(description)}"],
        ["[Timer]", *note, *(f"OnCalendar={spec}" for spec in specs), *settings, "AccuracySec=1s"],
        ["[Install]", "WantedBy=timers.target"],
    )


def _text(*sections: Sequence[str]) -> str:
    return "\n\n".join("\n".join(section) for section in ([MARKER], *sections)) + "\n"


def _description(text: str) -> str:
    """Return a line for people: of characters that can be shown, without what would go on in the next line."""
    shown = "".join(char if char.isprintable() else " " for char in text)
    return shown.strip().rstrip("\\").replace("%", "%%")[:400]


def _quoted(word: str, *, dollar: str) -> str:
    if _PLAIN.fullmatch(word):
        return word
    quoted = []
    for char in word:
        if char in '"\\':
            quoted.append(f"\\{char}")
        elif char == "%":
            quoted.append("%%")
        elif char == "$":
            quoted.append(dollar)
        elif char.isprintable():
            quoted.append(char)
        else:
            quoted.append(_escaped(char.encode(errors="surrogateescape")))
    return f'"{"".join(quoted)}"'


def _escaped(data: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in data)


def _credential(name: str, path: str) -> str:
    # Its path is not unquoted: what can't stand at the end of a line, or in it, can't be said.
    if (
        not re.fullmatch(r"[A-Za-z0-9_.-]{1,255}", name, re.ASCII)
        or name in (".", "..")
        or not path.startswith("/")
        or not path.isprintable()
        or path != path.strip()
        or path.endswith("\\")
    ):
        raise ConfigurationError(
            f"The credential {name!r} can't be given to a service: {path!r}",
            "systemd takes names of letters, digits, dot, dash and underscore, and absolute paths of plain characters",
            "Give the file another name.",
        )
    return f"{name}:{path.replace('%', '%%')}"
