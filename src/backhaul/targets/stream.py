"""An open file as a target: stdout, usually a pipe."""

from __future__ import annotations

import os
import select
import stat

from backhaul.errors import TargetError
from backhaul.pipeline.supervisor import Supervisor
from backhaul.processes.pipes import widen_pipe


def write_all(descriptor: int, data: memoryview, name: str, group: Supervisor) -> None:
    """Write all of ``data``; on a non-blocking descriptor a reader that does not read can't hold up a stop.

    Raises:
        TargetError: the reader went away, or the disk is full.
        StoppedError: the group stopped.
    """
    try:
        while data:
            group.check()
            try:
                data = data[os.write(descriptor, data) :]
            except BlockingIOError:
                poll = select.poll()
                poll.register(descriptor, select.POLLOUT)
                poll.register(group.fileno(), select.POLLIN)
                poll.poll()
    except BrokenPipeError as error:
        raise TargetError(
            f"{name} stopped reading",
            "its end of the pipe is closed",
            "See why it ended early; what was read of the backup was undamaged.",
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
        self._own: int | None = None
        self._group: Supervisor | None = None

    def start(self, raw_size: int, group: Supervisor) -> None:
        """See ``Target.start``."""
        self._group = group
        widen_pipe(self._descriptor)
        if stat.S_ISFIFO(os.fstat(self._descriptor).st_mode):
            # A pipe opened anew can be made non-blocking without doing that to everybody who shares it.
            try:
                self._own = os.open(f"/proc/self/fd/{self._descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:
                self._own = None  # no /proc: writes block, and a stop waits for the reader

    def write(self, data: memoryview) -> None:
        """See ``Target.write``."""
        assert self._group is not None
        write_all(self._descriptor if self._own is None else self._own, data, self.name, self._group)

    def commit(self) -> None:
        """See ``Target.commit``."""
        self._close()

    def abort(self) -> None:
        """See ``Target.abort``."""
        self._close()

    def _close(self) -> None:
        if self._own is not None:
            os.close(self._own)
            self._own = None
