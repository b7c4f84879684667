"""A program that is given a text and some seconds, and asked for a few words: under a guardian like all others."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Mapping, Sequence

import msgspec

from backhaul.processes.command import Command, ExitStatus

_PIECE = 1 << 16
# How long to wait before asking again whether a program has ended that left something holding its output open.
_PAUSE = 0.05


class Answer(msgspec.Struct, frozen=True):
    """What came of it.

    Attributes:
        output: the beginning of what it wrote to its stdout.
        status: how it ended; None where the time was over, and it was ended.
        words: the last lines of its stderr, secrets masked.
    """

    output: bytes
    status: ExitStatus | None
    words: str


def ask_program(
    arguments: Sequence[str],
    *,
    seconds: float,
    text: bytes = b"",
    environment: Mapping[str, str] | None = None,
    most: int = _PIECE,
) -> Answer:
    """Run a program to its end; it and what it started are ended when the time is over (3 s grace).

    Args:
        arguments: the program and its arguments; no shell.
        seconds: how long it may take.
        text: what it reads from its stdin; it need not read it.
        environment: instead of this process's.
        most: bytes of its output that are kept; the rest is read and dropped.

    Raises:
        ConfigurationError: this host can start no process at all.
    """
    deadline = time.monotonic() + seconds
    running = Command(
        arguments, capture_output=True, feed_input=True, on_error_line=lambda line: None, environment=environment
    )
    try:
        output = _converse(running, text, deadline, most)
        if not running.ended_within(max(0.0, deadline - time.monotonic())):
            running.terminate()
            return Answer(output, None, running.tail)
        status = running.wait()
        answer = Answer(output, status, running.tail)
        if status.ok:
            running.release()
    finally:
        running.kill()
    return answer


def _converse(running: Command, text: bytes, deadline: float, most: int) -> bytes:
    """Write and read at once, without blocking, until both are done, the program has ended, or the time is over."""
    assert running.input is not None
    assert running.output is not None
    writers, readers = [running.input], [running.output]
    for descriptor in (*writers, *readers):
        os.set_blocking(descriptor, False)
    left = memoryview(text)
    output = bytearray()
    ended = False
    while (readers or writers) and not ended and time.monotonic() < deadline:
        # What an ended program had written before its end is still in the pipe: it is read after the end is seen.
        ended = running.ended_within(0)
        if not left and writers:
            writers.clear()
            running.close_input()
        wait = 0.0 if ended else min(_PAUSE, max(0.0, deadline - time.monotonic()))
        readable, writable, _ = select.select(readers, writers, [], wait)
        if writable:
            try:
                left = left[os.write(writable[0], left[:_PIECE]) :]
            except BlockingIOError:
                pass
            except BrokenPipeError:
                left = left[:0]
        if readable and not _read(readable[0], output, most, to_the_end=ended):
            readers.clear()
    return bytes(output)


def _read(descriptor: int, output: bytearray, most: int, *, to_the_end: bool) -> bool:
    """Read what there is; tell whether more may come."""
    with contextlib.suppress(BlockingIOError):
        while True:
            piece = os.read(descriptor, _PIECE)
            if not piece:
                return False
            output += piece[: max(0, most - len(output))]
            if not to_the_end:
                break
    return True
