"""A command's stdin as a target: its clean end of input is the proof that the stream was whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from backhaul.errors import TargetError
from backhaul.formats.redaction import redact_command
from backhaul.processes.command import Command
from backhaul.processes.pipes import widen_pipe
from backhaul.targets.stream import write_all


class CommandTarget:
    """Runs a command and writes to its stdin. Unless ``commit`` is reached it is killed, never given an end."""

    def __init__(self, arguments: Sequence[str], on_error_line: Callable[[bytes], None] | None = None) -> None:
        self.name = " ".join(redact_command(arguments))
        self._arguments = arguments
        self._on_error_line = on_error_line
        self._command: Command | None = None

    def start(self, raw_size: int) -> None:
        """See ``Target.start``."""
        self._command = Command(self._arguments, feed_input=True, on_error_line=self._on_error_line)
        assert self._command.input is not None
        widen_pipe(self._command.input)

    def write(self, data: memoryview) -> None:
        """See ``Target.write``."""
        assert self._command is not None and self._command.input is not None
        try:
            write_all(self._command.input, data, self.name)
        except TargetError as error:
            if not isinstance(error.__cause__, BrokenPipeError):
                raise
            # It closed its input, so it ends or has ended: say how.
            status = self._command.wait()
            raise self._failure(f"before it had read everything, {status}", self._command.tail) from error

    def commit(self) -> None:
        """See ``Target.commit``."""
        assert self._command is not None
        self._command.close_input()
        status = self._command.wait()
        self._command.release()
        if not status.ok:
            raise self._failure(str(status), self._command.tail)

    def abort(self) -> None:
        """See ``Target.abort``."""
        if self._command is not None:
            self._command.kill()

    def _failure(self, status: str, tail: str) -> TargetError:
        return TargetError(
            f"The command failed: {self.name}",
            status + (f"; its last words:\n{tail}" if tail else "; it wrote nothing to stderr"),
            "The backup is fine; see to the command and pull again.",
        )
