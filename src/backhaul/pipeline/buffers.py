"""Memory that is used again: fresh megabytes cost page faults, which show as system time."""

from __future__ import annotations

from backhaul.pipeline.supervisor import Supervisor


class BufferPool:
    """A fixed number of buffers of one size, made on first use. Taking one waits until one is free."""

    def __init__(self, group: Supervisor, count: int, size: int) -> None:
        self._group = group
        self._free: list[memoryview] = []
        self._unmade = count
        self._size = size

    def take(self) -> memoryview:
        """Return a free buffer, whole.

        Raises:
            StoppedError: the group stopped.
        """
        with self._group.condition:
            self._group.wait_for(lambda: bool(self._free) or self._unmade > 0)
            if self._free:
                return self._free.pop()
            self._unmade -= 1
        return memoryview(bytearray(self._size))

    def give(self, buffer: memoryview) -> None:
        """Give a buffer (or a slice of it) back; its content is gone."""
        whole = memoryview(buffer.obj)
        with self._group.condition:
            self._free.append(whole)
            self._group.condition.notify_all()
