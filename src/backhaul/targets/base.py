"""What every target of a stream can do."""

from __future__ import annotations

from typing import Protocol


class Target(Protocol):
    """Takes a stream in order. An abort never looks like an end to whoever reads it."""

    name: str

    def start(self, raw_size: int) -> None:
        """Begin, for a stream of that many bytes.

        Raises:
            TargetError: the target can't take it; nothing was changed.
        """
        ...

    def write(self, data: memoryview) -> None:
        """Take the next bytes, all of them.

        Raises:
            TargetError: it can't, and the stream is not to go on.
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
