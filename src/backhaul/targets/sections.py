"""What the streams of a database go back into: order, and what comes before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from backhaul.model.manifest import SourceRecord, StreamRecord
from backhaul.targets.base import Target


class Step(msgspec.Struct, frozen=True):
    """One stream into one target; ``make`` is called when its turn comes."""

    stream: str
    make: Callable[[], Target]


class Phase(msgspec.Struct, frozen=True):
    """Steps that may run side by side; ``name`` is for people. ``before`` runs first, alone."""

    name: str
    steps: tuple[Step, ...]
    before: Callable[[], None] = lambda: None


class RestoreTarget(Protocol):
    """A database or directory that a backup is restored into. Nothing looks finished before ``commit``.

    ``remarks`` say what its operator may want to know, ``shortfalls`` what of the backup could not be brought back.
    """

    name: str
    remarks: list[str]
    shortfalls: list[str]

    def check(self, source: SourceRecord, streams: Sequence[StreamRecord]) -> None:
        """Make sure that the backup fits, before any of it is read.

        Raises:
            ConfigurationError: prerequisites are missing; all that are, in one error.
            UsageError: the call asks for what the backup has not.
        """
        ...

    def phases(self, jobs: int) -> Sequence[Phase]:
        """Begin, out of everybody's sight, and return what is to be done, in order.

        Raises:
            TargetError: it can't begin; nothing was changed.
        """
        ...

    def commit(self) -> None:
        """Every stream was whole, and was taken: let it be seen.

        Raises:
            TargetError: it could not be finished.
        """
        ...

    def abort(self) -> None:
        """Remove what was begun. Harmless after ``commit``."""
        ...


class TextTarget:
    """Takes a small stream of text as a whole, and hands it on. See ``Target``.

    Args:
        name: for messages.
        use: given the text once all of it was right.
    """

    def __init__(self, name: str, use: Callable[[str], None]) -> None:
        self.name = name
        self._use = use
        self._text = bytearray()

    def start(self, raw_size: int, group: object) -> None:
        """See ``Target.start``."""

    def write(self, data: memoryview) -> None:
        """See ``Target.write``."""
        self._text += data

    def commit(self) -> None:
        """See ``Target.commit``."""
        self._use(self._text.decode(errors="surrogateescape"))

    def abort(self) -> None:
        """See ``Target.abort``."""
        self._text.clear()
