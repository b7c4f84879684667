"""Temporary directories that a later run can tell from those in use: what a killed run left, the next one collects."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_LOCK = ".in-use"


class OwnDirectory:
    """A private directory that is ours for as long as this process lives and has not removed it.

    Making one first removes those of the same prefix, beside it, whose owners are gone.

    Args:
        prefix: of its name.
        parent: where; None for the system's directory for temporary files.

    Raises:
        OSError: it can't be made.
    """

    def __init__(self, prefix: str, parent: str | None = None) -> None:
        where = parent or tempfile.gettempdir()
        _collect(where, prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=where))
        self._descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def remove(self) -> None:
        """Remove it, and all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _collect(where: str, prefix: str) -> None:
    with contextlib.suppress(OSError):
        for path in Path(where).glob(f"{prefix}*"):
            with contextlib.suppress(OSError):
                descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(descriptor)
