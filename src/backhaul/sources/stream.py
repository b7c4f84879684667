"""An open file as a source: stdin, usually the end of a pipe."""

from __future__ import annotations

import os
import time

from backhaul.errors import SourceError, UsageError
from backhaul.model.manifest import ProducerRecord
from backhaul.pipeline.supervisor import Supervisor
from backhaul.processes.pipes import widen_pipe
from backhaul.sources.base import read_some


class StreamSource:
    """Reads a descriptor until its end. What wrote it can't be asked how it ended: use a command for that."""

    def __init__(self, descriptor: int, name: str = "stdin", kind: str = "stdin") -> None:
        self.name = name
        self._kind = kind
        self._descriptor = descriptor
        self._group: Supervisor | None = None
        self._started = 0.0

    def check(self) -> None:
        """See ``Source.check``."""
        try:
            terminal = os.isatty(self._descriptor)
            os.fstat(self._descriptor)
        except OSError as error:
            raise SourceError(f"Could not read {self.name}", str(error), "Pipe a dump in.") from error
        if terminal:
            raise UsageError(
                "There is nothing to back up",
                f"{self.name} is a terminal",
                "Pipe a dump in (pg_dump app | backhaul push ...), or name the command after --.",
            )

    def start(self, group: Supervisor) -> None:
        """See ``Source.start``."""
        widen_pipe(self._descriptor)
        self._group = group
        self._started = time.monotonic()

    def read_into(self, buffer: memoryview) -> int:
        """See ``Source.read_into``."""
        assert self._group is not None
        return read_some(self._descriptor, buffer, self._group, self.name)

    def finish(self) -> ProducerRecord:
        """See ``Source.finish``."""
        return ProducerRecord(kind=self._kind, seconds=round(time.monotonic() - self._started, 3))

    def abort(self) -> None:
        """See ``Source.abort``. The writer notices when this process ends."""
