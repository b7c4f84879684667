"""Locks that end with the process that holds them, and that other programs can take, too (flock)."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

from backhaul.errors import ConfigurationError, LockBusyError

# Linux has no process id above 4194304.
_PID_WIDTH = 7


@contextlib.contextmanager
def locked(path: str, todo: str = "Make its directory writable.", what: str = "") -> Iterator[None]:
    """Hold a lock file for the block; the pid is written into it, for people.

    Args:
        path: the file; it is made where it is not there, and stays.
        todo: what to do when it can't be opened.
        what: what is locked, for messages; without it the file's name.

    Raises:
        LockBusyError: another program holds it.
        ConfigurationError: it can't be opened.
    """
    try:
        descriptor = _opened(path)
    except OSError as error:
        raise ConfigurationError(f"The lock file {path} can't be opened", error.strerror or str(error), todo) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = lock_owner(path)
            raise LockBusyError(
                f"{what or path} is {'running already' if what else 'locked'}",
                f"another program holds {path if what else 'it'}{f' (process {holder})' if holder else ''}",
                "Wait for it to end." if what else "Wait for it to end; what it does must not run beside this.",
            ) from error
        with contextlib.suppress(OSError):
            # (Of one length, and never cut to nothing: some file systems write a file out at once that was.)
            content = f"{os.getpid():<{_PID_WIDTH}}\n".encode()
            os.pwrite(descriptor, content, 0)
            os.ftruncate(descriptor, len(content))
        yield
    finally:
        os.close(descriptor)


def _opened(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        # One that is there can be locked on a file system that takes no more writes, too: its holder may have it so.
        with contextlib.suppress(OSError):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        raise


def is_locked(path: str) -> bool:
    """Tell whether a process holds a lock file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def lock_owner(path: str) -> int:
    """Return the process that wrote itself into a lock file last; 0 where nobody can say."""
    with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:
        return int(file.read(40).decode(errors="replace").strip())
    return 0
