"""Backhaul's side of a guarded command: start it, keep its last words, learn how it ended, end it.

``guardian`` is the other side, in a process of its own.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from backhaul.errors import ConfigurationError
from backhaul.formats.redaction import redact_command, redact_text

_GUARDIAN = str(Path(__file__).with_name("guardian.py"))
TAIL_LINES = 15
_LONGEST_LINE = 4096
# The guardian's own grace, and time for the kernel to take a large process apart.
_END_TIMEOUT = 8.0


class ExitStatus:
    """How a command ended: exactly one of ``code``, ``signal`` and ``error`` (it never started) is set."""

    def __init__(self, *, code: int | None = None, signal_number: int | None = None, error: str | None = None) -> None:
        self.code = code
        self.signal = signal_number
        self.error = error

    @property
    def ok(self) -> bool:
        """Whether it ran and exited with 0."""
        return self.code == 0

    def __str__(self) -> str:
        if self.error is not None:
            return f"it could not be started: {self.error}"
        if self.signal is not None:
            with contextlib.suppress(ValueError):
                return f"it was killed by {signal.Signals(self.signal).name}"
            return f"it was killed by signal {self.signal}"
        return f"it exited with status {self.code}"


class Command:
    """A running command under its guardian. Started by the constructor.

    Args:
        arguments: the program and its arguments; no shell.
        capture_output: whether its stdout is read here (``output``), else it is inherited.
        discard_output: whether its stdout goes nowhere.
        feed_input: whether its stdin is written here (``input``), else it is inherited.
        discard_input: whether its stdin is empty.
        output_to, error_to: descriptors that its stdout and stderr are, instead; they stay the caller's to close.
        on_error_line: told each line of its stderr, without the newline; the default passes them on.
        is_chatter: tells lines of its stderr that are no news: they are not passed on, and not among its last words.
        environment: instead of this process's.

    Raises:
        ConfigurationError: this host can start no process at all.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        capture_output: bool = False,
        discard_output: bool = False,
        feed_input: bool = False,
        discard_input: bool = False,
        output_to: int | None = None,
        error_to: int | None = None,
        on_error_line: Callable[[bytes], None] | None = None,
        is_chatter: Callable[[bytes], bool] = lambda line: False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._is_chatter = is_chatter
        self.arguments = tuple(arguments)
        self.output: int | None = None
        self.input: int | None = None
        self._on_error_line = on_error_line or _pass_on
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._status: ExitStatus | None = None
        self.pid = 0
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:

            def pipe() -> tuple[int, int]:
                return os.pipe()

            def close_on(stack: contextlib.ExitStack, descriptor: int) -> int:
                stack.callback(os.close, descriptor)
                return descriptor

            control_reader, control_writer = pipe()
            close_on(theirs, control_reader), close_on(ours, control_writer)
            status_reader, status_writer = pipe()
            close_on(ours, status_reader), close_on(theirs, status_writer)
            error_reader, error_writer = -1, error_to if error_to is not None else -1
            if error_to is None:
                error_reader, error_writer = pipe()
                close_on(ours, error_reader), close_on(theirs, error_writer)
            standard_input: int | None = subprocess.DEVNULL if discard_input else None
            standard_output: int | None = subprocess.DEVNULL if discard_output else output_to
            hold = -1
            if feed_input:
                standard_input, self.input = pipe()
                close_on(theirs, standard_input), close_on(ours, self.input)
                hold = self.input
            if capture_output:
                self.output, standard_output = pipe()
                close_on(ours, self.output), close_on(theirs, standard_output)
            passed = [control_reader, status_writer] + ([hold] if hold >= 0 else [])
            try:
                self._guardian = subprocess.Popen(
                    [
                        sys.executable,
                        "-I",
                        "-S",
                        _GUARDIAN,
                        str(control_reader),
                        str(status_writer),
                        str(hold),
                        *self.arguments,
                    ],
                    stdin=standard_input,
                    stdout=standard_output,
                    stderr=error_writer,
                    pass_fds=passed,
                    env=environment,
                )
            except (OSError, ValueError) as error:
                raise ConfigurationError(
                    f"Could not start {self.name}",
                    str(error),
                    "This account may not run Backhaul's own Python: install Backhaul where it may."
                    if isinstance(error, PermissionError)
                    else "Check the limits on processes and memory (ulimit -a).",
                ) from error
            ours.pop_all()
        self._control = control_writer
        self._status_file = os.fdopen(status_reader, "rb", buffering=0)
        self._error_thread: threading.Thread | None = None
        if error_reader >= 0:
            self._error_thread = threading.Thread(
                target=self._read_errors, args=(error_reader,), name="backhaul-stderr", daemon=True
            )
            self._error_thread.start()
        self._read_start()

    @property
    def name(self) -> str:
        """The command for messages, its secrets masked."""
        return shlex.join(redact_command(self.arguments))

    @property
    def tail(self) -> str:
        """The last lines of its stderr so far, secrets masked."""
        return "\n".join(redact_text(line) for line in self._tail)

    def wait(self) -> ExitStatus:
        """Wait for its end and return how it ended."""
        if self._status is None:
            self._status = self._read_end()
            # Something that the command left running may hold its stderr open: its last words are in by then.
            if self._error_thread is not None:
                self._error_thread.join(timeout=2.0)
        return self._status

    def ended_within(self, seconds: float) -> bool:
        """Wait at most that long for its end; tell whether it has ended."""
        if self._status is not None:
            return True
        return bool(select.select([self._status_file], [], [], seconds)[0])

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the command itself, not to what it started; nothing happens if it has ended."""
        if self.pid and self._status is None and not self.ended_within(0.0):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, number)

    def close_input(self) -> None:
        """Give the command the end of its input: only when the stream was whole."""
        assert self.input is not None
        os.close(self.input)
        self.input = None
        self._tell(b"o")

    def terminate(self) -> None:
        """Ask it and all it started to end, kill them after a grace, and wait, within reason."""
        self._end(b"t")

    def kill(self) -> None:
        """Kill it and all it started, while its input is still open, and wait, within reason."""
        self._end(b"k")

    def release(self) -> None:
        """Let go of a command that has ended well; what it left running goes on."""
        self._end(b"d")

    # -- inside ----------------------------------------------------------------------------------------

    def _end(self, message: bytes) -> None:
        """Tell the guardian, wait for it, and close what is left. Harmless the second time."""
        if self._control < 0:
            return
        if self.output is not None:
            os.close(self.output)  # a producer that can't be signalled ends when it writes
            self.output = None
        self._tell(message)
        try:
            self._guardian.wait(_END_TIMEOUT)
            if self._status is None:
                self.wait()
        except subprocess.TimeoutExpired:
            # Something that can't be killed. The guardian stays behind with the pipe's other end and waits
            # for it: it will read no end, whatever becomes of this process.
            self._guardian.returncode = 0
            self._status = self._status or ExitStatus(error="it could not be killed")
        if self.input is not None:
            os.close(self.input)
            self.input = None
        os.close(self._control)
        self._control = -1
        self._status_file.close()

    def _tell(self, message: bytes) -> None:
        if self._control >= 0:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._control, message)

    def _read_start(self) -> None:
        line = self._status_file.readline().split(b" ", 2)
        if line[0] == b"started":
            self.pid = int(line[1])
            return
        if line[0] == b"error":
            self._status = ExitStatus(error=line[2].decode(errors="replace").strip())
        else:
            self._status = ExitStatus(error="its guardian process ended at once")
            self._guardian.kill()

    def _read_end(self) -> ExitStatus:
        kind, _, number = self._status_file.readline().strip().partition(b" ")
        if kind == b"exit":
            return ExitStatus(code=int(number))
        if kind == b"signal":
            return ExitStatus(signal_number=int(number))
        return ExitStatus(error="its guardian process was killed")

    def _read_errors(self, descriptor: int) -> None:
        with os.fdopen(descriptor, "rb") as file:
            while line := file.readline(_LONGEST_LINE):
                text = line.rstrip(b"\r\n")
                if self._is_chatter(text):
                    continue
                self._tail.append(text.decode(errors="replace"))
                # Whoever listens may be gone; the command must not suffer for it.
                with contextlib.suppress(Exception):
                    self._on_error_line(text)


def _pass_on(line: bytes) -> None:
    with contextlib.suppress(OSError):
        os.write(2, line + b"\n")
