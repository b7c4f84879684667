"""What every source of a stream can do."""

from __future__ import annotations

import datetime as dt
import os
import re
import select
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import msgspec

from backhaul.errors import SourceError
from backhaul.model.manifest import ProducerRecord, SourceRecord, StreamPart
from backhaul.pipeline.supervisor import Supervisor

_LONGEST_BEGINNING = 60


class Source(Protocol):
    """A stream of bytes, and how its producer ended."""

    name: str

    def check(self) -> None:
        """Refuse what can be seen to fail, before anything begins.

        Raises:
            UsageError: there is nothing to read.
            SourceError: the producer can't be started.
        """
        ...

    def start(self, group: Supervisor) -> None:
        """Begin; from then on reads may be stopped by the group.

        Raises:
            SourceError: the producer could not be started.
        """
        ...

    def read_into(self, buffer: memoryview) -> int:
        """Read some bytes to the buffer's beginning, as soon as there are any; 0 means the stream's end.

        Raises:
            SourceError: reading failed.
            StoppedError: the group stopped.
        """
        ...

    def finish(self) -> ProducerRecord:
        """Wait for the producer's end, after the stream's.

        Raises:
            SourceError: it did not end well. The stream is not to be trusted.
        """
        ...

    def abort(self) -> None:
        """End the producer, whatever it does; harmless after its end."""
        ...


class NamedStream(msgspec.Struct, frozen=True, kw_only=True):
    """One stream of a backup that has several.

    ``expect`` are texts that its last 4 KiB must hold; ``part`` says what of the whole it is.
    """

    name: str
    source: Source
    expect: tuple[str, ...] = ()
    part: StreamPart | None = None


@runtime_checkable
class SourceSet(Protocol):
    """What a backup is made of: one stream or several, consistent with each other.

    Attributes:
        name: for messages.
        parallel: how many of the streams may run at once; known after ``open``.
        total_tables: how many tables there are to be read, 0 where nobody knows; known after ``open``.
    """

    name: str
    parallel: int
    total_tables: int

    def check(self) -> None:
        """Refuse what can be seen to fail, before anything begins. Raises as ``Source.check`` does.

        Raises:
            ConfigurationError: prerequisites are missing; all that are, in one error.
        """
        ...

    def open(self, group: Supervisor) -> Sequence[NamedStream]:
        """Fix the state that the streams are of; return them in the order in which they are to start.

        Raises:
            SourceError: the server refused.
        """
        ...

    def outline(self) -> SourceRecord | None:
        """Say what is backed up, as far as it is known once the first stream has started.

        Returns:
            Enough for a target to begin with; None where nothing is known, or too little.
        """
        ...

    def finish(self) -> SourceRecord | None:
        """Say what was backed up; called once, when every stream has ended well.

        Raises:
            SourceError: the streams are not of one state after all.
        """
        ...

    def abort(self) -> None:
        """End every producer and let go of the server; harmless after the end."""
        ...


class SingleStream:
    """One source as a set: what a command, a file or stdin gives."""

    parallel = 1
    total_tables = 0

    def __init__(self, stream: str, source: Source, expect: tuple[str, ...] = ()) -> None:
        self.name = source.name
        self.source = source
        self._stream = stream
        self._expect = expect

    def check(self) -> None:
        """See ``SourceSet.check``."""
        self.source.check()

    def open(self, group: Supervisor) -> Sequence[NamedStream]:
        """See ``SourceSet.open``."""
        return (NamedStream(name=self._stream, source=self.source, expect=self._expect),)

    def outline(self) -> SourceRecord | None:
        """See ``SourceSet.outline``."""
        return None

    def finish(self) -> SourceRecord | None:
        """See ``SourceSet.finish``. What a command's stream is of, nobody knows."""
        return None

    def abort(self) -> None:
        """See ``SourceSet.abort``."""
        self.source.abort()


def utc(time: dt.datetime) -> str:
    """Return a time as records have it: ISO 8601, UTC, whole seconds."""
    return time.astimezone(dt.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def unique_names(texts: Sequence[str]) -> list[str]:
    """Return, for names of any characters, beginnings of stream names: readable, and no two alike."""
    result: list[str] = []
    for text in texts:
        name = re.sub(r"[^A-Za-z0-9_-]", "_", text)[:_LONGEST_BEGINNING]
        name = name if re.match(r"[A-Za-z0-9_]", name) else f"_{name}"
        number, unique = 2, name
        while unique.lower() in (other.lower() for other in result):
            number, unique = number + 1, f"{name}-{number}"
        result.append(unique)
    return result


def read_some(descriptor: int, buffer: memoryview, group: Supervisor, name: str) -> int:
    """Read what a descriptor has, as soon as it has any; 0 at its end.

    Raises:
        SourceError: the read failed.
        StoppedError: the group stopped.
    """
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.register(group.fileno(), select.POLLIN)
    while True:
        poll.poll()
        group.check()
        try:
            return os.readv(descriptor, [buffer])
        except BlockingIOError:
            continue
        except OSError as error:
            raise SourceError(f"Could not read {name}", error.strerror or str(error), "Check the producer.") from error
