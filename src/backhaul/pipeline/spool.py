"""Bytes on a disk between one putter and one taker, when memory is not enough: asked for, bounded, and nameless.

The files have no names (they are unlinked as soon as they are open), so that nothing is left of them whatever
becomes of the process. Space is given back file by file as the taker gets on.
"""

from __future__ import annotations

import errno
import os
import tempfile
import threading

# The size of a file: room comes back file by file, and each is an open one, of which a process has a thousand.
_USUAL_FILE = 64 << 20
_LEAST_FILE = 1 << 20
_FEWEST_FILES = 16
_MOST_FILES = 256
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE}


class SpoolSpace:
    """Room on a disk that several queues share.

    Args:
        directory: where; it must exist.
        size: most bytes to use.
    """

    def __init__(self, directory: str, size: int) -> None:
        self.directory = directory
        self.file_size = max(_LEAST_FILE, min(_USUAL_FILE, size // _FEWEST_FILES), size // _MOST_FILES)
        self._free = size
        self._lock = threading.Lock()

    def reserve(self, size: int) -> bool:
        """Take some room; tell whether there was enough."""
        with self._lock:
            if size > self._free:
                return False
            self._free -= size
            return True

    def give_back(self, size: int) -> None:
        """Return room."""
        with self._lock:
            self._free += size


class _File:
    def __init__(self, directory: str) -> None:
        self.descriptor = open_nameless(directory)
        self.size = 0
        self.waiting = 0
        self.sealed = False


class SpooledPiece:
    """Where a piece lies."""

    def __init__(self, file: _File, offset: int, size: int) -> None:
        self.file = file
        self.offset = offset
        self.size = size


class Spool:
    """One queue's files in a space. ``add`` comes from one thread, ``take`` from another."""

    def __init__(self, space: SpoolSpace) -> None:
        self._space = space
        self._file: _File | None = None
        self._lock = threading.Lock()
        self._open: set[_File] = set()
        self._closed = False

    def add(self, piece: bytes) -> SpooledPiece | None:
        """Write a piece; None if the space, or the disk, is full.

        Raises:
            OSError: the disk failed otherwise.
        """
        if not self._space.reserve(len(piece)):
            return None
        # The lock is held while the disk is written and read: a descriptor that ``close`` had closed meanwhile
        # might be another file's by then.
        with self._lock:
            try:
                file = self._file_with_room()
                view = memoryview(piece)
                while view:
                    view = view[os.pwrite(file.descriptor, view, file.size + len(piece) - len(view)) :]
            except OSError as error:
                self._space.give_back(len(piece))
                if error.errno in FULL:
                    return None
                raise
            offset = file.size
            file.size += len(piece)
            file.waiting += 1
            return SpooledPiece(file, offset, len(piece))

    def take(self, piece: SpooledPiece) -> bytes:
        """Read a piece back; its room is free once all of its file was read.

        Raises:
            OSError: the disk failed, or the spool is closed.
        """
        with self._lock:
            self._check_open()
            content = os.pread(piece.file.descriptor, piece.size, piece.offset)
            if len(content) != piece.size:
                raise OSError(errno.EIO, "the spool file is shorter than what was written to it")
            piece.file.waiting -= 1
            self._drop_if_done(piece.file)
        return content

    def close(self) -> None:
        """Give all of it back."""
        with self._lock:
            self._closed = True
            for file in list(self._open):
                self._drop(file)

    def _check_open(self) -> None:
        if self._closed:
            raise OSError(errno.EBADF, "the spool is closed")

    def _file_with_room(self) -> _File:
        self._check_open()
        if self._file is None or self._file.size >= self._space.file_size:
            if self._file is not None:
                self._file.sealed = True
                self._drop_if_done(self._file)
                self._file = None
            self._file = _File(self._space.directory)
            self._open.add(self._file)
        return self._file

    def _drop_if_done(self, file: _File) -> None:
        if file.sealed and file.waiting == 0 and file in self._open:
            self._drop(file)

    def _drop(self, file: _File) -> None:
        self._open.discard(file)
        os.close(file.descriptor)
        self._space.give_back(file.size)


def open_nameless(directory: str) -> int:
    """Return the descriptor of a new file without a name on a directory's disk.

    Raises:
        OSError: there can't be one.
    """
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
            raise
    descriptor, path = tempfile.mkstemp(prefix=".backhaul-spool-", dir=directory)
    os.unlink(path)
    return descriptor
