"""An open file as a target: stdout, usually a pipe."""

from __future__ import annotations

import os

from backhaul.errors import TargetError
from backhaul.processes.pipes import widen_pipe


def write_all(descriptor: int, data: memoryview, name: str) -> None:
    """Write all of ``data``.

    Raises:
        TargetError: the reader went away, or the disk is full.
    """
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except BrokenPipeError as error:
        raise TargetError(
            f"{name} stopped reading",
            "its end of the pipe is closed",
            "See why it ended early; the backup is fine.",
        ) from error
    except OSError as error:
        raise TargetError(
            f"Could not write to {name}", error.strerror or str(error), "Check the disk or program behind it."
        ) from error


class StreamTarget:
    """Writes to a descriptor. What reads it can't be stopped from here: its only sign is the exit status."""

    def __init__(self, descriptor: int, name: str = "stdout") -> None:
        self.name = name
        self._descriptor = descriptor

    def start(self, raw_size: int) -> None:
        """See ``Target.start``."""
        widen_pipe(self._descriptor)

    def write(self, data: memoryview) -> None:
        """See ``Target.write``."""
        write_all(self._descriptor, data, self.name)

    def commit(self) -> None:
        """See ``Target.commit``."""

    def abort(self) -> None:
        """See ``Target.abort``."""
