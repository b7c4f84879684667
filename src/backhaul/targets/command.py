"""A command's stdin as a target: its clean end of input is the proof that the stream was whole."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence

from backhaul.errors import TargetError
from backhaul.formats.redaction import redact_command
from backhaul.pipeline.supervisor import Supervisor
from backhaul.processes.command import Command
from backhaul.processes.pipes import widen_pipe
from backhaul.targets.stream import write_all

# Seconds that a command which closed its input early has to end by itself.
_END_PATIENCE = 5.0


class CommandTarget:
    """Runs a command and writes to its stdin. Unless ``commit`` is reached it is killed, never given an end.

    Args:
        arguments: the program and its arguments; no shell.
        on_error_line: told each line of its stderr; the default passes them on.
        name: for messages, instead of the command itself.
        is_chatter, environment, discard_output: see ``Command``.
        may_stop_early: whether it may end well without having read everything: it looks for something, and has it.

    Attributes:
        exit_status: once it has ended by itself; negative for a signal.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        on_error_line: Callable[[bytes], None] | None = None,
        *,
        name: str | None = None,
        is_chatter: Callable[[bytes], bool] = lambda line: False,
        environment: Mapping[str, str] | None = None,
        discard_output: bool = False,
        may_stop_early: bool = False,
    ) -> None:
        self._may_stop_early = may_stop_early
        self._ended_early = False
        self._discard_output = discard_output
        self.name = name or shlex.join(redact_command(arguments))
        self._is_chatter = is_chatter
        self._environment = environment
        self._arguments = arguments
        self._on_error_line = on_error_line
        self._command: Command | None = None
        self._group: Supervisor | None = None
        self.exit_status: int | None = None

    def start(self, raw_size: int, group: Supervisor) -> None:
        """See ``Target.start``."""
        self._group = group
        self._command = Command(
            self._arguments,
            feed_input=True,
            discard_output=self._discard_output,
            on_error_line=self._on_error_line,
            is_chatter=self._is_chatter,
            environment=self._environment,
        )
        assert self._command.input is not None
        widen_pipe(self._command.input)
        os.set_blocking(self._command.input, False)

    def write(self, data: memoryview) -> None:
        """See ``Target.write``."""
        assert self._command is not None and self._command.input is not None and self._group is not None
        if self._ended_early:
            return
        try:
            write_all(self._command.input, data, self.name, self._group)
        except TargetError as error:
            if not isinstance(error.__cause__, BrokenPipeError):
                raise
            # It closed its input, so it has ended, as a rule, or ends: say how.
            if not self._command.ended_within(_END_PATIENCE):
                self._command.kill()
                raise self._failure("it closed its input and went on running", self._command.tail) from error
            status = self._command.wait()
            self.exit_status = status.code
            if status.ok and self._may_stop_early:
                self._ended_early = True
                return
            raise self._failure(f"before it had read everything, {status}", self._command.tail) from error

    def commit(self) -> None:
        """See ``Target.commit``."""
        assert self._command is not None
        self._command.close_input()
        status = self._command.wait()
        self.exit_status = status.code
        if not status.ok:
            raise self._failure(str(status), self._command.tail)
        self._command.release()

    def abort(self) -> None:
        """See ``Target.abort``."""
        if self._command is not None:
            self._command.kill()

    def _failure(self, status: str, tail: str) -> TargetError:
        return TargetError(
            f"The command failed: {self.name}",
            status + (f"; its last words:\n{tail}" if tail else "; it wrote nothing to stderr"),
            "See to the command and pull again; in what was read of the backup there was no damage.",
        )
