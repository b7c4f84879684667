"""A program that is run to its end, under a guardian like all others, for what it says."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from backhaul.errors import TargetError
from backhaul.processes.command import Command


def run_program(
    command: Sequence[str],
    name: str,
    *,
    environment: Mapping[str, str] | None = None,
    on_error_line: Callable[[bytes], None] | None = None,
    is_chatter: Callable[[bytes], bool] = lambda line: False,
) -> list[bytes]:
    """Run a program to its end; return the lines of its output.

    Raises:
        TargetError: it failed, with its last words.
    """
    running = Command(
        command, capture_output=True, on_error_line=on_error_line, is_chatter=is_chatter, environment=environment
    )
    try:
        assert running.output is not None
        with os.fdopen(os.dup(running.output), "rb") as file:
            output = file.read()
        status = running.wait()
        if not status.ok:
            words = running.tail or "\n".join(line.decode(errors="replace") for line in output.splitlines()[-5:])
            raise TargetError(
                f"The command failed: {name}",
                f"{status}" + (f"; its last words:\n{words}" if words else ""),
                "See what it says; in what was read of the backup there was no damage.",
            )
        running.release()
    except BaseException:
        running.kill()
        raise
    return output.splitlines()
