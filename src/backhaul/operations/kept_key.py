"""The key of an interrupted push, in memory that outlives the process: for the next run to go on where it was.

The parts that a store holds were sealed under the stream's key, so a run that resumes needs that very key, while a
host that pushes must hold none that opens its backups. Both is possible because there is no backup yet: the key is
kept in shared memory (a tmpfs, gone with a reboot; readable by its owner alone), and every copy of it is dropped before
the first manifest goes out. Where there is no such memory nothing is kept, and an interrupted push begins anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path

from backhaul.errors import ConfigurationError
from backhaul.transforms.encrypt import StreamKey

SHARED_MEMORY = Path("/dev/shm")
_LARGEST = 2 << 20


class KeptKey:
    """The place for one key, named after the journal that it belongs to."""

    def __init__(self, name: str) -> None:
        self._path = SHARED_MEMORY / f"{_prefix()}{name}"

    def keep(self, backup: str, key: StreamKey) -> None:
        """Keep the key of a backup in the making; or nothing, where there is no memory for it."""
        self.drop()
        if not _is_memory(SHARED_MEMORY):
            return
        # (Somebody else may have taken the name: then nothing is kept, and nothing told.)
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(self._path, flags, 0o600), "wb") as file:
                file.write(_encoded(backup, key))

    def recall(self, backup: str) -> StreamKey | None:
        """Return the key that is kept for that backup, or None: if there is none, or any doubt about it."""
        content = _read(self._path)
        # A backup under a key that is not quite the right one would open for nobody.
        digest, secret = content[:32], content[32:]
        if digest != _digest(backup, secret):
            return None
        return StreamKey.imported(secret)

    def drop(self) -> None:
        """Forget the key."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)


def drop_everywhere(key: StreamKey) -> None:
    """Forget every copy of a key, whichever upload it was kept for.

    Raises:
        ConfigurationError: a copy can't be removed; then no backup that it opens may come about.
    """
    for path in SHARED_MEMORY.glob(f"{_prefix()}*"):
        if key.export() not in _read(path):
            continue
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"The key of this push can't be removed from {path}",
                error.strerror or str(error),
                "Remove that file; nothing was committed.",
            ) from error


def _prefix() -> str:
    return f"backhaul-{os.getuid()}-"


def _encoded(backup: str, key: StreamKey) -> bytes:
    return _digest(backup, key.export()) + key.export()


def _digest(backup: str, secret: bytes) -> bytes:
    return hashlib.sha256(backup.encode() + b"\0" + secret).digest()


def _read(path: Path) -> bytes:
    """Return what a file of ours holds; nothing of a file that is somebody else's or that others can read."""
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
                return b""
            return file.read(_LARGEST)
    except OSError:
        return b""


def _is_memory(directory: Path) -> bool:
    """Tell whether a directory is a file system in memory."""
    try:
        mounts = Path("/proc/self/mounts").read_text()
    except OSError:
        return False
    fields = (line.split() for line in mounts.splitlines())
    return any(len(field) > 2 and field[1] == str(directory) and field[2] in ("tmpfs", "ramfs") for field in fields)
