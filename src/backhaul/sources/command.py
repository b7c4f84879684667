"""A command's stdout as a source: the stream counts only if the command ends well."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from backhaul.errors import SourceError
from backhaul.formats.redaction import redact_command
from backhaul.model.manifest import ProducerRecord
from backhaul.pipeline.supervisor import Supervisor
from backhaul.processes.command import Command
from backhaul.processes.pipes import widen_pipe
from backhaul.sources.base import read_some


class CommandSource:
    """Runs a command and reads its stdout. Its stdin and terminal are inherited, so it may ask for a password.

    Args:
        arguments: the program and its arguments; no shell.
        on_error_line: told each line of its stderr; the default passes them on.
        name: for messages, instead of the command itself.
        is_chatter, environment: see ``Command``.
        accepted: statuses that are a good end.
        check_end: given its last words after an end with status 0; raises what makes that a failure all the same.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        on_error_line: Callable[[bytes], None] | None = None,
        *,
        name: str | None = None,
        is_chatter: Callable[[bytes], bool] = lambda line: False,
        environment: Mapping[str, str] | None = None,
        accepted: Sequence[int] = (0,),
        check_end: Callable[[str], None] = lambda tail: None,
    ) -> None:
        self.name = name or shlex.join(redact_command(arguments))
        self._arguments = arguments
        self._on_error_line = on_error_line
        self._is_chatter = is_chatter
        self._environment = environment
        self._accepted = accepted
        self._check_end = check_end
        self._command: Command | None = None
        self._group: Supervisor | None = None
        self._started = 0.0

    def check(self) -> None:
        """See ``Source.check``."""
        program = self._arguments[0]
        if shutil.which(program) is None:
            there = "/" in program and Path(program).is_file()
            raise SourceError(
                f"The command can't be run: {self.name}",
                f"{program!r} is not executable" if there else f"there is no program {program!r} on the PATH",
                f"chmod +x {program}"
                if there
                else "Install it, or correct its name; a line of shell goes through sh -c '...'.",
            )

    def start(self, group: Supervisor) -> None:
        """See ``Source.start``."""
        self._started = time.monotonic()
        self._group = group
        self._command = Command(
            self._arguments,
            capture_output=True,
            on_error_line=self._on_error_line,
            is_chatter=self._is_chatter,
            environment=self._environment,
        )
        assert self._command.output is not None
        widen_pipe(self._command.output)

    def read_into(self, buffer: memoryview) -> int:
        """See ``Source.read_into``."""
        assert self._command is not None and self._group is not None and self._command.output is not None
        return read_some(self._command.output, buffer, self._group, self.name)

    def finish(self) -> ProducerRecord:
        """See ``Source.finish``."""
        assert self._command is not None
        status = self._command.wait()
        good = status.code in self._accepted
        if good:
            self._command.release()
        if status.error is not None:
            raise SourceError(
                f"The command never ran: {self.name}", status.error, "Check the program's name and the PATH."
            )
        if not good:
            tail = self._command.tail
            raise SourceError(
                f"The command failed: {self.name}",
                f"{status}" + (f"; its last words:\n{tail}" if tail else "; it wrote nothing to stderr"),
                "Nothing was committed. Mend the command and push again.",
            )
        self._check_end(self._command.tail)
        return ProducerRecord(
            kind="command",
            command=redact_command(self._arguments),
            exit_status=status.code,
            seconds=round(time.monotonic() - self._started, 3),
        )

    def abort(self) -> None:
        """See ``Source.abort``."""
        if self._command is not None:
            self._command.terminate()
