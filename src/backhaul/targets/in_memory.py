"""A stream that is kept in memory until all of it was right, for a program that wants to read at random."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from backhaul.pipeline.supervisor import Supervisor


class InMemoryTarget:
    """An archive that is kept in memory until it was all right, and can be read at random then. See ``Target``."""

    def __init__(self, name: str, use: Callable[[str], None]) -> None:
        self.name = name
        self._use = use
        self._descriptor = -1

    def start(self, raw_size: int, group: Supervisor) -> None:
        """See ``Target.start``."""
        self._descriptor = os.memfd_create("backhaul", os.MFD_CLOEXEC)

    def write(self, data: memoryview) -> None:
        """See ``Target.write``."""
        while data:
            data = data[os.write(self._descriptor, data) :]

    def commit(self) -> None:
        """See ``Target.commit``."""
        try:
            self._use(_path_of(self._descriptor))
        finally:
            self.abort()

    def abort(self) -> None:
        """See ``Target.abort``."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@contextlib.contextmanager
def memory_file(content: bytes) -> Iterator[str]:
    """Yield the path of a file in memory that holds the content."""
    descriptor = os.memfd_create("backhaul", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, content)
        yield _path_of(descriptor)
    finally:
        os.close(descriptor)


def _path_of(descriptor: int) -> str:
    """Return a path by which our children open the file anew, each with a position of its own."""
    return f"/proc/{os.getpid()}/fd/{descriptor}"
