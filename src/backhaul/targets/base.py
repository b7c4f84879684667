"""What every target of a stream can do."""

from __future__ import annotations

from typing import Protocol

from backhaul.pipeline.supervisor import Supervisor


class Target(Protocol):
    """Takes a stream in order. An abort never looks like an end to whoever reads it."""

    name: str

    def start(self, raw_size: int, group: Supervisor) -> None:
        """Begin, for a stream of that many bytes. Writes that wait for a reader end when the group stops.

        Raises:
            TargetError: the target can't take it; nothing was changed.
        """
        ...

    def write(self, data: memoryview) -> None:
        """Take the next bytes, all of them.

        Raises:
            TargetError: it can't, and the stream is not to go on.
            StoppedError: the group stopped.
        """
        ...

    def commit(self) -> None:
        """The stream was whole and right: give the consumer its end, the file its name.

        Raises:
            TargetError: the consumer failed, or the file could not be finished.
        """
        ...

    def abort(self) -> None:
        """The stream is not whole: kill the consumer, remove the file. Harmless after ``commit``."""
        ...
