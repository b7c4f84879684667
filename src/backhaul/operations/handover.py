"""What a command tells the job that runs it: its progress, its result, its error; a line of JSON each in a file.

The file's name is in ``BACKHAUL_RESULT``, which a command takes out of its environment: what it starts itself has
nothing to tell. Nobody need read it, and nothing fails because it can't be written. The other way round there is one
signal: end after your part.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

VARIABLE = "BACKHAUL_RESULT"
# Asks a mirror run to begin nothing more.
STOP_SIGNAL = signal.SIGUSR1
PROGRESS, RESULT, ERROR = "progress", "result", "error"
_EVERY = 5.0
_path: str | None = None


class Handed(msgspec.Struct, frozen=True, kw_only=True):
    """One line.

    Attributes:
        kind: ``progress``, ``result`` or ``error``.
        verb: of a result: what was run.
        done, total: of progress, bytes; ``total`` is 0 where nobody knows.
        document: of a result or an error, what ``--json`` prints.
    """

    kind: str
    verb: str = ""
    done: int = 0
    total: int = 0
    document: dict[str, Any] = {}


def take_over() -> None:
    """Learn from the environment who is to be told, and hide it from what this process starts."""
    global _path  # noqa: PLW0603 - one of the process, as its environment is
    _path = os.environ.pop(VARIABLE, None)


def hand(line: Handed) -> None:
    """Tell the job, if there is one."""
    if _path is None:
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(_path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            os.write(descriptor, msgspec.json.encode(line) + b"\n")
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def reporting(progress: Callable[[], tuple[int, int]]) -> Iterator[None]:
    """Tell the job every few seconds how far this is: bytes done, and in all or 0."""
    if _path is None:
        yield
        return
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(_EVERY):
            done, total = progress()
            hand(Handed(kind=PROGRESS, done=done, total=total))

    thread = threading.Thread(target=beat, name="backhaul-handover", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        done, total = progress()
        hand(Handed(kind=PROGRESS, done=done, total=total))


def read_handed(data: bytes) -> Iterator[Handed]:
    """Yield the whole lines of such a file; what can't be read is left out."""
    for line in data.splitlines():
        with contextlib.suppress(msgspec.DecodeError):
            yield msgspec.json.decode(line, type=Handed)
