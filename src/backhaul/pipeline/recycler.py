"""Byte arrays that are used again: a fresh one of half a megabyte costs page faults, and is filled with zeros first."""

from __future__ import annotations

import sys
import threading


def _references(buffer: bytearray) -> int:
    return sys.getrefcount(buffer)


def _unshared() -> int:
    """Return what is counted for a byte array that only its caller's variable has; 0 if the counts don't tell."""
    buffer = bytearray()
    alone = _references(buffer)
    view = memoryview(buffer)
    shared = _references(buffer)
    view.release()
    return alone if shared > alone else 0


# As this interpreter counts.
_UNSHARED = _unshared()


class Recycler:
    """Keeps byte arrays that nobody uses any more, by their size; any thread may take and give.

    Args:
        most: bytes to keep at most.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept = 0
        self._free: dict[int, list[bytearray]] = {}
        self._lock = threading.Lock()

    def take(self, size: int) -> bytearray:
        """Return a byte array of that size, with anything in it."""
        with self._lock:
            free = self._free.get(size)
            if free:
                self._kept -= size
                return free.pop()
        return bytearray(size)

    def give(self, buffer: bytearray) -> None:
        """Take back a byte array that the caller is about to forget; it is left alone if anybody else has it still."""
        if _references(buffer) > _UNSHARED + 1:  # (this function's own variable is one more)
            return
        size = len(buffer)
        with self._lock:
            if self._kept + size > self._most:
                # What was kept is of sizes that are not asked for any more, perhaps.
                self._free.clear()
                self._kept = 0
            if size <= self._most:
                self._free.setdefault(size, []).append(buffer)
                self._kept += size
