"""A file as a source: it can be read again, so that an interrupted push can go on where it was."""

from __future__ import annotations

import os
import stat
import time

import msgspec

from backhaul.errors import SourceError, UsageError
from backhaul.formats.journal import SourceIdentity
from backhaul.model.manifest import ProducerRecord
from backhaul.pipeline.supervisor import Supervisor


class FileSource:
    """Reads a regular file, and insists at the end that it is still the one that it was at the beginning."""

    def __init__(self, path: str) -> None:
        self.name = path
        self._path = os.path.realpath(path)
        self._descriptor = -1
        self._identity: SourceIdentity | None = None
        self._position = 0
        self._group: Supervisor | None = None
        self._started = 0.0

    def check(self) -> None:
        """See ``Source.check``. Opens the file; what it is counts from here on."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise SourceError(
                f"Could not read {self.name}",
                error.strerror or str(error),
                "Check the path and its permissions.",
            ) from error
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise UsageError(
                f"{self.name} is no regular file",
                "it is a directory" if stat.S_ISDIR(status.st_mode) else "it can't be read twice",
                f"Back it up as a tar: --from dir://{self._path}"
                if stat.S_ISDIR(status.st_mode)
                else "Pipe it in, or name the command that reads it after --.",
            )
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        self._descriptor = descriptor
        self._identity = self._identify(status)

    @property
    def identity(self) -> SourceIdentity:
        """What the file is; after ``check``."""
        assert self._identity is not None
        return self._identity

    def start(self, group: Supervisor) -> None:
        """See ``Source.start``."""
        self._group = group
        self._started = time.monotonic()

    def read_into(self, buffer: memoryview) -> int:
        """See ``Source.read_into``."""
        assert self._group is not None
        self._group.check()
        try:
            count = os.preadv(self._descriptor, [buffer], self._position)
        except OSError as error:
            raise SourceError(
                f"Could not read {self.name}", error.strerror or str(error), "Check the disk that holds it."
            ) from error
        self._position += count
        return count

    def finish(self) -> ProducerRecord:
        """See ``Source.finish``. A file that changed while it was read is no backup of anything."""
        try:
            # (A new link or mode changes the inode too, and nothing of the content.)
            now = msgspec.structs.replace(self._identify(os.stat(self._path)), changed=self.identity.changed)
        except OSError:
            now = None
        if now != self._identity or self._position != self.identity.size:
            raise SourceError(
                f"{self.name} changed while it was read",
                "it was replaced, written to or removed" if now != self._identity else "its size changed",
                "Push it when its writer is done; nothing was committed.",
            )
        return ProducerRecord(
            kind="file",
            path=self._path.encode(errors="surrogateescape").decode(errors="backslashreplace"),
            seconds=round(time.monotonic() - self._started, 3),
        )

    def abort(self) -> None:
        """See ``Source.abort``."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _identify(self, status: os.stat_result) -> SourceIdentity:
        return SourceIdentity(
            path=self._path.encode(errors="surrogateescape").decode(errors="backslashreplace"),
            device=status.st_dev,
            inode=status.st_ino,
            size=status.st_size,
            modified=status.st_mtime_ns,
            changed=status.st_ctime_ns,
        )
