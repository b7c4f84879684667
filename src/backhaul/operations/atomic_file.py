"""A small file that is there whole, or as it was before: also after a power cut, and on a disk that is full."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from backhaul.targets.file import sync_directory


def write_atomically(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write a file under a temporary name beside it, flush it, and rename it.

    Args:
        path: its name; what is there is replaced.
        data: all of it.
        mode: its permissions.

    Raises:
        OSError: the disk refuses; what was there before is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode), "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)
