"""A file as a target: it gets its name only when every byte was checked and flushed to the disk."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
from pathlib import Path

from backhaul.errors import TargetError
from backhaul.pipeline.supervisor import Supervisor
from backhaul.targets.stream import write_all


class FileTarget:
    """Writes beside the final name and renames at the end; an existing file stays until then.

    A path that exists and is no regular file (a device, a FIFO) is written directly.
    """

    def __init__(self, path: str) -> None:
        self.name = path
        self._path = Path(path)
        self._temporary: Path | None = None
        self._descriptor = -1
        self._group: Supervisor | None = None

    def start(self, raw_size: int, group: Supervisor) -> None:
        """See ``Target.start``."""
        self._group = group
        try:
            try:
                mode: int | None = self._path.stat().st_mode
            except FileNotFoundError:
                mode = None
            if mode is not None and stat.S_ISDIR(mode):
                raise TargetError(
                    f"Could not write {self.name}",
                    "it is a directory",
                    f"Name a file: -o {self._path / 'dump'}",
                )
            if mode is not None and not stat.S_ISREG(mode):
                # Opening a FIFO waits for its reader, as the shell's > does.
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
                os.set_blocking(self._descriptor, False)
                return
            real = self._path.resolve()
            free = shutil.disk_usage(real.parent).free
            if free < raw_size:
                raise TargetError(
                    f"Could not write {self.name}",
                    f"it needs {raw_size} bytes, and {free} are free there",
                    "Make room, or pull elsewhere.",
                )
            temporary = real.with_name(f".{real.name}.{secrets.token_hex(6)}.partial")
            # As private as a dump must be unless the file that it replaces says otherwise.
            self._descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._temporary, self._path = temporary, real
            if mode is not None:
                os.fchmod(self._descriptor, stat.S_IMODE(mode))
        except OSError as error:
            raise self._failure(error) from error

    def write(self, data: memoryview) -> None:
        """See ``Target.write``."""
        assert self._group is not None
        write_all(self._descriptor, data, self.name, self._group)

    def commit(self) -> None:
        """See ``Target.commit``."""
        try:
            if self._temporary is not None:
                os.fsync(self._descriptor)
                os.rename(self._temporary, self._path)
                self._temporary = None
                sync_directory(self._path.parent)
        except OSError as error:
            raise self._failure(error) from error
        finally:
            self._close()

    def abort(self) -> None:
        """See ``Target.abort``."""
        self._close()
        if self._temporary is not None:
            with contextlib.suppress(OSError):  # gone, or the disk is: either way it has no name of its own
                self._temporary.unlink()
            self._temporary = None

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _failure(self, error: OSError) -> TargetError:
        return TargetError(
            f"Could not write {self.name}",
            error.strerror or str(error),
            "Check the directory, its owner and its disk.",
        )


def sync_directory(path: Path) -> None:
    """Have the names in a directory on the disk.

    Raises:
        OSError: the disk refuses.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
