"""What every source of a stream can do."""

from __future__ import annotations

import os
import select
from typing import Protocol

from backhaul.errors import SourceError
from backhaul.model.manifest import ProducerRecord
from backhaul.pipeline.supervisor import Supervisor


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
