"""The key of an interrupted push, in memory that outlives the process: for the next run to go on where it was.

The parts that a store holds were sealed under the stream's key, so a run that resumes needs that very key, while a
host that pushes must hold none that opens its backups. Both is possible because there is no backup yet: the key is
kept in shared memory (tmpfs, never a disk, gone with a reboot; readable by its owner alone), and it is dropped before
the first manifest goes out. Where there is no such memory nothing is kept, and an interrupted push begins anew.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from backhaul.formats.age import FILE_KEY_SIZE
from backhaul.transforms.encrypt import StreamKey

SHARED_MEMORY = Path("/dev/shm")
_LARGEST = 2 << 20


class KeptKey:
    """The place for one key, named after the journal that it belongs to."""

    def __init__(self, name: str) -> None:
        self._path = SHARED_MEMORY / f"backhaul-{os.getuid()}-{name}"

    def keep(self, backup: str, key: StreamKey) -> None:
        """Keep the key of a backup in the making; or nothing, where there is no memory for it."""
        self.drop()
        if not _is_memory(SHARED_MEMORY):
            return
        # (Somebody else may have taken the name: then nothing is kept, and nothing told.)
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(self._path, flags, 0o600), "wb") as file:
                file.write(f"{backup}\n".encode() + key.export())

    def recall(self, backup: str) -> StreamKey | None:
        """Return the key that is kept for that backup, or None."""
        try:
            with os.fdopen(os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
                    return None
                content = file.read(_LARGEST)
        except OSError:
            return None
        name, _, secret = content.partition(b"\n")
        if name != backup.encode() or len(secret) <= FILE_KEY_SIZE:
            return None
        return StreamKey.imported(secret)

    def drop(self) -> None:
        """Forget the key."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)


def _is_memory(directory: Path) -> bool:
    """Tell whether a directory is a file system in memory."""
    try:
        mounts = Path("/proc/self/mounts").read_text()
    except OSError:
        return False
    fields = (line.split() for line in mounts.splitlines())
    return any(len(field) > 2 and field[1] == str(directory) and field[2] in ("tmpfs", "ramfs") for field in fields)
