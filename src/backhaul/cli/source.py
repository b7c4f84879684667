"""Where ``push`` and ``send`` have their stream from: a command, ``--from``, or stdin."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from backhaul.errors import UsageError

if TYPE_CHECKING:
    from backhaul.operations.progress import PushProgress
    from backhaul.sources.base import Source, SourceSet


def check_source(verb: str, example: str, command: list[str] | None, from_: str | None) -> None:
    """Make sure that there is one place, before anything begins.

    Args:
        verb: the command's name.
        example: what to write, up to the ``--``.
        command: what follows ``--``; None without one.
        from_: the value of ``--from``, or None.

    Raises:
        UsageError: there is none, or there are two.
    """
    if command is not None and not command:
        raise UsageError("There is no command", "nothing follows the --", f"Write e.g.: {example} -- pg_dump -Fc app")
    if from_ is not None and command is not None:
        raise UsageError(
            "The stream comes from two places", "both --from and a command are given", "Leave one of them out."
        )
    if command is None and from_ is None and sys.stdin is not None and sys.stdin.isatty():
        raise UsageError(
            f"{verb} has nothing to read",
            "stdin is a terminal",
            f"Name a command after --, or --from URL, or pipe a dump in (pg_dump app | {example})",
        )


def open_source(
    command: list[str] | None,
    from_: str | None,
    *,
    streams: int | None,
    counts: bool,
    progress: PushProgress,
    on_error_line: Callable[[bytes], None],
) -> Source | SourceSet:
    """Return what ``check_source`` has let pass.

    Args:
        command: see ``check_source``.
        from_: see ``check_source``.
        streams: of a database: how many dumps at once; None for as many as fit.
        counts: of a database: whether to count its rows.
        progress: counters to keep up to date.
        on_error_line: told each line of a program's stderr.

    Raises:
        UsageError: ``from_`` is no place that there is.
    """
    if from_ is not None:
        from backhaul.operations.databases import SourceOptions, source_of

        reading = SourceOptions(streams=streams, count=counts)
        return source_of(from_, reading, progress=progress, on_error_line=on_error_line)
    if command:
        from backhaul.sources.command import CommandSource

        return CommandSource(command, on_error_line)
    from backhaul.sources.stream import StreamSource

    return StreamSource(0)
