"""A crontab's lines that call Backhaul, between two markers; everything else in it is kept byte for byte.

After crontab(5) of Debian's cron, with nothing that other crons read differently: no zones, no environment lines
(they would hold for the lines of others below), and no doubled backslashes, which some crons make one and some don't.

This module knows neither windows nor clocks: what it is given says when.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

from backhaul.errors import ConfigurationError
from backhaul.formats.window import format_window
from backhaul.model.calendar import EVERY_DAY, CalendarTime
from backhaul.model.job import JobCard

BEGIN = "# BEGIN backhaul (made by: backhaul schedule install; edits between the markers are lost)"
END = "# END backhaul"
# What the last line above had not, and must not have again once the block is gone.
_NO_NEWLINE = "# (The line above had no newline at its end.)"
_BEGINS = "# BEGIN backhaul"
_BEGIN_LINE = re.compile(r"# BEGIN backhaul( \(.*)?\s*")


def crontab_block(
    entries: Iterable[tuple[JobCard, Sequence[CalendarTime]]],
    command: Sequence[str],
    *,
    path: str = "",
    environment: Mapping[str, str] | None = None,
) -> str:
    """Return the lines from marker to marker.

    Args:
        entries: the jobs, which have windows, and when each begins by the clock of the host; a job without a time is
            one that this clock can't tell, and is begun by the tick.
        command: what runs Backhaul, and arguments that come before ``run``.
        path: the ``PATH`` that it runs with; empty for that of cron.
        environment: variables that it runs with, besides.

    Raises:
        ConfigurationError: a line break in what must be a line.
    """
    assignments = {**({"PATH": path} if path else {}), **dict(sorted((environment or {}).items()))}
    prefix = "".join(f"{name}={shell_word(value)} " for name, value in assignments.items())
    lines = [BEGIN]
    for card, times in entries:
        assert card.window is not None
        run = prefix + cron_command([*command, "run", "--scheduled", "--quiet", card.name])
        lines.append(f"# Job {_shown(card.name)}: {format_window(card.window)}")
        if card.window.excluded:
            lines.append(f"# Not on {', '.join(card.window.excluded)}: then the run itself does nothing.")
        if not times:
            lines.append(f"# cron knows only this host's zone, not {card.window.timezone}: the last line begins it.")
        lines += [f"{_fields(time)} {run}" for time in times]
    lines.append("# Begins what was missed, tells what is wrong")
    lines.append(f"*/10 * * * * {prefix}{cron_command([*command, 'schedule', 'tick'])}")
    lines.append(END)
    return "\n".join(lines) + "\n"


def merge_block(text: str, block: str) -> str:
    """Return a crontab with this block where the old one was, or at its end.

    Raises:
        ConfigurationError: the markers are damaged.
    """
    span = _span(text)
    if span is not None:
        begin, end = span
        if _NO_NEWLINE in text[begin:end].split("\n"):
            block = _noted(block)
        # A hand that took the last newline away leaves an END without one.
        return text[:begin] + block + text[end:]
    if text and not text.endswith("\n"):
        return f"{text}\n{_noted(block)}"
    return text + block


def remove_block(text: str) -> str:
    """Return a crontab without the block; as it was before, when nothing else was changed since.

    Raises:
        ConfigurationError: the markers are damaged.
    """
    span = _span(text)
    if span is None:
        return text
    begin, end = span
    above, below = text[:begin], text[end:]
    if _NO_NEWLINE in text[begin:end].split("\n") and not below:
        above = above.removesuffix("\n")
    return above + below


def find_block(text: str) -> str | None:
    """Return the block of a crontab as it would be made; None when there is none.

    Raises:
        ConfigurationError: the markers are damaged.
    """
    span = _span(text)
    if span is None:
        return None
    block = text[slice(*span)].replace(f"{_NO_NEWLINE}\n", "")
    return block if block.endswith("\n") else f"{block}\n"


def cron_command(command: Sequence[str]) -> str:
    """Return a command for a line of a crontab: quoted for the shell, and what cron itself reads escaped.

    Raises:
        ConfigurationError: an argument has a line break, or a NUL character.
    """
    return " ".join(shell_word(word) for word in command)


def shell_word(word: str) -> str:
    """Return one word of such a command, see ``cron_command``."""
    if re.search(r"[\n\r\0]", word):
        raise ConfigurationError(
            f"{word!r} can't be written into a crontab",
            "a line of it is one command, and this has a line break",
            "Choose a name without, or use systemd: backhaul schedule install --with systemd",
        )
    # Between two quotes nothing of the word is lost, and no backslash stands before what cron would take it for.
    return re.sub(r"\\(?=[\\%])", r"\\''", shlex.quote(word)).replace("%", r"\%")


def _fields(time: CalendarTime) -> str:
    assert not time.month and not time.date, "cron joins a date and a weekday by or"
    # Never * for all hours: at a change of the clock, cron takes a line with * for one that needs no care.
    days = "*" if time.days == EVERY_DAY else _numbers(sorted((day + 1) % 7 for day in time.days))
    return f"{time.minute} {_numbers(time.hours)} * * {days}"


def _numbers(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)


def _noted(block: str) -> str:
    return block.replace(f"{BEGIN}\n", f"{BEGIN}\n{_NO_NEWLINE}\n", 1)


def _shown(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)


def _span(text: str) -> tuple[int, int] | None:
    """Return where the block begins and ends in a crontab, with its last newline; None for none."""
    begins: list[int] = []
    ends: list[int] = []
    offset = 0
    for line in text.split("\n"):
        if _BEGIN_LINE.fullmatch(line):
            begins.append(offset)
        elif line.rstrip() == END:
            ends.append(offset + len(line) + 1)
        offset += len(line) + 1
    if not begins and not ends:
        return None
    if len(begins) != 1 or len(ends) != 1 or begins[0] >= ends[0]:
        raise ConfigurationError(
            "The crontab can't be changed: its markers are damaged",
            f"{_BEGINS} stands in it {_times(len(begins))}, {END} {_times(len(ends))}"
            + (", in the wrong order" if len(begins) == len(ends) == 1 else ""),
            f"Run crontab -e, and remove all from {_BEGINS} to {END}, markers too; then install again.",
        )
    return begins[0], ends[0]


def _times(count: int) -> str:
    return {0: "nowhere", 1: "once"}.get(count, f"{count} times")
