"""Pipes between processes."""

from __future__ import annotations

import contextlib
import fcntl

# As large as an unprivileged process may make a pipe: fewer, larger reads and fewer turns between processes.
PIPE_SIZE = 1 << 20


def widen_pipe(descriptor: int) -> None:
    """Give a pipe room for a megabyte; not a pipe, or not allowed, is fine."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
