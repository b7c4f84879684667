"""A run of numbered chunks between one writer and several readers, each at its own place: memory, then a disk.

Memory holds the last chunks, up to a bound, whether or not all readers have passed them: whoever comes back to the
last few hundred megabytes finds them. What a reader has not passed is never dropped: when memory is full of that,
the oldest chunks go to the spool, and when there is none, or it is full too, the writer waits.

Who waits for whom is told by ``blocked``, so that others can see which reader holds everything up.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable

from backhaul.pipeline.recycler import Recycler
from backhaul.pipeline.spool import FULL, SpoolSpace, open_nameless

_LOOK = 0.2


class ChunkGoneError(Exception):
    """The chunk was here, and is no more."""


class LogClosedError(Exception):
    """The log was closed; it carries no news and is never shown."""


class _File:
    """A nameless file of chunks. It is closed when it was dropped and nobody reads it any more."""

    def __init__(self, directory: str, first: int) -> None:
        self.descriptor = open_nameless(directory)
        self.first = first
        self.size = 0
        self.places: list[tuple[int, int]] = []
        self.users = 0
        self.dropped = False

    def close_if_done(self) -> None:
        if self.dropped and not self.users and self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


_NOTHING = bytearray()


class _Entry:
    def __init__(self, chunk: bytearray, opened: memoryview | None) -> None:
        self.chunk = chunk
        self.opened = opened


class Reader:
    """A reader's place: chunks below ``position`` are not kept for it."""

    def __init__(self, log: ChunkLog, name: str, position: int) -> None:
        self.name = name
        self.position = position
        self._log = log

    def advance(self, position: int) -> None:
        """Say that what is below is not needed any more."""
        with self._log.condition:
            if position > self.position:
                self.position = position
                self._log.condition.notify_all()

    def close(self) -> None:
        """Keep nothing for this reader any more."""
        with self._log.condition:
            self._log.readers.discard(self)
            self._log.condition.notify_all()


class ChunkLog:
    """See the module.

    Args:
        memory: most bytes of chunks in memory; one chunk more may be on its way in.
        space: room on a disk, or None.
        keep_all: whether to put on the disk, while there is room, also what every reader has passed: for readers
            that come late.
        opened_ahead: most bytes of opened chunks to hold for the one who takes them; the others are opened again.
        recycler: gets the chunks that are dropped.
    """

    def __init__(
        self,
        memory: int,
        *,
        space: SpoolSpace | None = None,
        keep_all: bool = False,
        opened_ahead: int = 0,
        recycler: Recycler | None = None,
    ) -> None:
        self.condition = threading.Condition()
        self.readers: set[Reader] = set()
        self.end = 0
        self.appended = 0
        self.held_seconds = 0.0
        self.most_spooled = 0
        self._memory = memory
        self._space = space
        self._keep_all = keep_all
        self._opened_ahead = opened_ahead
        self._recycler = recycler
        self._entries: deque[_Entry] = deque()
        self._held = 0
        self._opened = 0
        self._files: deque[_File] = deque()
        self._spooled = 0
        self._blocked_since: float | None = None
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether nothing is to be had here any more."""
        return self._closed

    @property
    def start(self) -> int:
        """The lowest number that is here; that of the next chunk if there is none."""
        with self.condition:
            return self._start()

    @property
    def spooled(self) -> int:
        """Bytes on the disk."""
        return self._spooled

    def backlog(self) -> tuple[int, int]:
        """Return the bytes in memory that some reader has not passed, and how many can wait; 0 if a disk takes more."""
        with self.condition:
            lowest = min((reader.position for reader in self.readers), default=self.end)
            waiting = max(0, self.end - lowest)
            held = sum(len(entry.chunk) for entry, _ in zip(reversed(self._entries), range(waiting), strict=False))
            return held, 0 if self._space is not None else self._memory

    @property
    def blocked(self) -> tuple[float, tuple[str, ...]]:
        """For how many seconds the writer has waited now, and for which readers; 0 and none if it does not."""
        with self.condition:
            if self._blocked_since is None:
                return 0.0, ()
            lowest = min((reader.position for reader in self.readers), default=self.end)
            names = tuple(reader.name for reader in self.readers if reader.position == lowest)
            return time.monotonic() - self._blocked_since, names

    def reader(self, name: str, position: int) -> Reader:
        """Return a new reader at a place.

        Raises:
            ChunkGoneError: what it wants to begin with is not here any more.
        """
        with self.condition:
            if position < self._start():
                raise ChunkGoneError
            reader = Reader(self, name, position)
            self.readers.add(reader)
            return reader

    # -- writing -----------------------------------------------------------------------------------------

    def append(
        self, chunk: bytearray, opened: memoryview | None = None, check: Callable[[], None] = lambda: None
    ) -> None:
        """Add the next chunk; waits for room, calling ``check`` now and then, which may raise.

        Raises:
            LogClosedError: the log was closed.
            OSError: the spool failed otherwise than by being full.
        """
        began = time.monotonic()
        try:
            while True:
                with self.condition:
                    if self._closed:
                        raise LogClosedError
                    if self._make_room(len(chunk)):
                        self._add(chunk, opened)
                        return
                    if self._blocked_since is None:
                        self._blocked_since = began
                    self.condition.wait(_LOOK)
                # (Without the lock: whoever is asked may hold one of its own, and want this one.)
                check()
        finally:
            with self.condition:
                if self._blocked_since is not None:
                    self.held_seconds += time.monotonic() - self._blocked_since
                    self._blocked_since = None

    def close(self) -> None:
        """Wake everybody who waits, and give memory and disk back."""
        with self.condition:
            self._closed = True
            self._entries.clear()
            self._held = self._opened = 0
            while self._files:
                self._drop_file()
            self.condition.notify_all()

    # -- reading -----------------------------------------------------------------------------------------

    def wait(self, number: int, timeout: float) -> bool:
        """Wait at most so many seconds for a chunk to be here; tell whether it has come.

        Raises:
            LogClosedError: the log was closed.
        """
        with self.condition:
            if number >= self.end and not self._closed:
                self.condition.wait_for(lambda: self._closed or number < self.end, timeout)
            if self._closed:
                raise LogClosedError
            return number < self.end

    def get(self, number: int) -> bytearray:
        """Return a chunk that has come.

        Raises:
            ChunkGoneError: it is not here any more.
            LogClosedError: the log was closed.
            OSError: the spool failed.
        """
        with self.condition:
            if self._closed:
                raise LogClosedError
            first = self.end - len(self._entries)
            if number >= first:
                return self._entries[number - first].chunk
            if number < self._start():
                raise ChunkGoneError
            file = next(file for file in reversed(self._files) if file.first <= number)
            offset, size = file.places[number - file.first]
            file.users += 1
        # Read without the lock: a slow disk holds up nobody else.
        try:
            chunk = bytearray(size)
            view = memoryview(chunk)
            while view and (count := os.preadv(file.descriptor, [view], offset + size - len(view))):
                view = view[count:]
            if view:
                raise OSError("the spool file is shorter than what was written to it")
            return chunk
        finally:
            with self.condition:
                file.users -= 1
                file.close_if_done()

    def take_opened(self, number: int) -> memoryview | None:
        """Return a chunk's opened body if it is still held, and let go of it here."""
        with self.condition:
            first = self.end - len(self._entries)
            if number < first or self._closed:
                return None
            entry = self._entries[number - first]
            opened, entry.opened = entry.opened, None
            if opened is not None:
                self._opened -= len(opened)
            return opened

    # -- inside; with the condition held -----------------------------------------------------------------

    def _start(self) -> int:
        return self._files[0].first if self._files else self.end - len(self._entries)

    def _add(self, chunk: bytearray, opened: memoryview | None) -> None:
        if opened is not None and self._opened + len(opened) <= self._opened_ahead:
            self._opened += len(opened)
        else:
            opened = None
        self._entries.append(_Entry(chunk, opened))
        self._held += len(chunk)
        self.appended += len(chunk)
        self.end += 1
        self.condition.notify_all()

    def _make_room(self, size: int) -> bool:
        while self._entries and self._held + size > self._memory:
            first = self.end - len(self._entries)
            passed = all(reader.position > first for reader in self.readers)
            if passed and not self._keep_all:
                self._forget_disk()
            elif not self._to_disk(first) and not (passed and self._give_up_history()):
                return False
            self._drop(self._entries.popleft())
        return True

    def _drop(self, entry: _Entry) -> None:
        self._held -= len(entry.chunk)
        if entry.opened is not None:
            self._opened -= len(entry.opened)
        if self._recycler is not None:
            chunk, entry.chunk = entry.chunk, _NOTHING
            self._recycler.give(chunk)

    def _forget_disk(self) -> None:
        """Drop the files: all in them is passed, since what is after them is."""
        while self._files:
            self._drop_file()

    def _give_up_history(self) -> bool:
        """Keep no more for those who may come late: there is no room."""
        self._keep_all = False
        self._forget_disk()
        return True

    def _to_disk(self, number: int) -> bool:
        """Write the oldest chunk in memory to the spool; tell whether there was room."""
        space, chunk = self._space, self._entries[0].chunk
        if space is None:
            return False
        while not space.reserve(len(chunk)):
            if not self._drop_passed_file():
                return False
        try:
            if not self._files or self._files[-1].size >= space.file_size:
                self._files.append(_File(space.directory, number))
            file = self._files[-1]
            view = memoryview(chunk)
            while view:
                view = view[os.pwrite(file.descriptor, view, file.size + len(chunk) - len(view)) :]
        except OSError as error:
            space.give_back(len(chunk))
            if self._files and not self._files[-1].places:
                self._drop_file(self._files.pop())
            if error.errno in FULL:
                return False
            raise
        file.places.append((file.size, len(chunk)))
        file.size += len(chunk)
        self._spooled += len(chunk)
        self.most_spooled = max(self.most_spooled, self._spooled)
        return True

    def _drop_passed_file(self) -> bool:
        """Drop the oldest file if every reader has passed it; tell whether there was one."""
        if not self._files:
            return False
        after = self._files[0].first + len(self._files[0].places)
        if any(reader.position < after for reader in self.readers):
            return False
        # Those who are there come before those who may come late: without the beginning the rest is no use to them.
        self._keep_all = False
        self._drop_file()
        return True

    def _drop_file(self, file: _File | None = None) -> None:
        if file is None:
            file = self._files.popleft()
        file.dropped = True
        self._spooled -= file.size
        if self._space is not None:
            self._space.give_back(file.size)
        file.close_if_done()
