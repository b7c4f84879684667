"""The programs of a run, each feeding the next, and how each of them ended.

A program whose feeder failed never reads a clean end of its input: it is killed first (``processes.guardian`` holds the
pipe until the feeder ended well). One whose reader failed is ended: nobody wants its output any more.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import time
from collections.abc import Callable, Mapping, Sequence

from backhaul.formats.redaction import redact_command
from backhaul.jobs.log import ERROR, OUTPUT
from backhaul.model.job import StageRecord
from backhaul.processes.command import Command, ExitStatus

_PIECE = 1 << 16
_LOOK = 0.2
# So long what a program left running may go on writing after its end.
_DRAIN = 1.0
# So long a program may take to end by itself when it is asked to.
GRACE = 30.0


class Stages:
    """The running programs. Started by the constructor; ``finish`` or ``kill`` ends it.

    Args:
        stages: the programs and their arguments; no shell.
        environment: of all of them.
        on_output: given what they write: the tag of ``jobs.log``, and the bytes.
        ready: tells whether more of what they write can be taken; while it can't, they wait, and are watched.
        inherit_input: whether the first one reads this process's stdin; else it reads nothing.

    Raises:
        ConfigurationError: this host can start no process at all.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[str]],
        environment: Mapping[str, str],
        on_output: Callable[[bytes, bytes], None],
        *,
        ready: Callable[[], bool] = lambda: True,
        inherit_input: bool = False,
    ) -> None:
        self._on_output = on_output
        self._ready = ready
        # Once somebody was told to end, nobody is given an end: what the feeders say of themselves means nothing then.
        self._aborting = False
        self._kill_at: float | None = None
        self._commands: list[Command] = []
        self._ended: dict[int, ExitStatus] = {}
        self._selector = selectors.DefaultSelector()
        with contextlib.ExitStack() as theirs:
            writers = {}
            for tag in (OUTPUT, ERROR):
                reader, writers[tag] = os.pipe()
                theirs.callback(os.close, writers[tag])
                os.set_blocking(reader, False)
                self._selector.register(reader, selectors.EVENT_READ, tag)
            try:
                # The last one first: its input is the output of the one before it.
                following: Command | None = None
                for number, words in reversed(list(enumerate(stages))):
                    first = number == 0
                    following = Command(
                        words,
                        feed_input=not first,
                        discard_input=first and not inherit_input,
                        output_to=following.input if following is not None else writers[OUTPUT],
                        error_to=writers[ERROR],
                        environment=environment,
                    )
                    self._commands.insert(0, following)
            except BaseException:
                self.kill()
                raise

    @property
    def pids(self) -> tuple[int, ...]:
        """The programs' process ids; 0 for one that never started."""
        return tuple(command.pid for command in self._commands)

    def poll(self, seconds: float) -> bool:
        """Take what they write for so long, or until all have ended; tell whether they have."""
        deadline = time.monotonic() + seconds
        while not self._look():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._read(min(left, _LOOK))
        self._drain()
        return True

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to each program that has not ended."""
        for command in self._commands:
            command.send_signal(number)

    def end(self, grace: float = GRACE) -> None:
        """Ask them to end, and kill them and all that they started if they have not after so long.

        Those that read from others are killed at once: none may take what it has for the whole.
        """
        self._abort()
        self.send_signal(signal.SIGTERM)
        if not self.poll(grace):
            self.kill()

    def finish(self) -> tuple[StageRecord, ...]:
        """Let go of programs that have all ended; return how each of them did."""
        for number, command in enumerate(self._commands):
            if self._ended[number].ok:
                command.release()
            else:
                command.kill()
        self._close()
        return tuple(
            StageRecord(
                command=redact_command(command.arguments),
                exit_status=self._ended[number].code,
                signal=_signal_name(self._ended[number]),
                error=self._ended[number].error or "",
            )
            for number, command in enumerate(self._commands)
        )

    def kill(self) -> None:
        """Kill them and all that they started."""
        # From the end: none of them may read an end that is none.
        for number, command in reversed(list(enumerate(self._commands))):
            command.kill()
            self._ended.setdefault(number, command.wait())
        self._drain()

    def _look(self) -> bool:
        """See who has ended, and what follows from it for its neighbours."""
        for number, command in enumerate(self._commands):
            if number in self._ended or not command.ended_within(0.0):
                continue
            status = self._ended[number] = command.wait()
            after = self._commands[number + 1 :]
            if status.ok and after and not self._aborting:
                if number + 1 not in self._ended:
                    after[0].close_input()
            elif not status.ok and not self._aborting:
                self._abort(of=number)
        if self._kill_at is not None and time.monotonic() > self._kill_at:
            self.kill()
        return len(self._ended) == len(self._commands)

    def _abort(self, of: int | None = None) -> None:
        """End what is left of a pipeline, from the end: readers at once, feeders after a grace."""
        self._aborting = True
        self._kill_at = time.monotonic() + GRACE
        first_reader = 1 if of is None else of + 1
        for other in reversed(self._commands[first_reader:]):
            other.kill()
        if of is not None:
            for other in reversed(self._commands[1:of]):
                other.kill()
            if of > 0:
                self._commands[0].send_signal(signal.SIGTERM)

    def _read(self, seconds: float) -> bool:
        """Take what is there, waiting so long for it; tell whether something was."""
        if not self._selector.get_map() or (seconds > 0 and not self._ready()):
            time.sleep(min(seconds, _LOOK))
            return False
        found = self._selector.select(seconds)
        for key, _ in found:
            data = b""
            with contextlib.suppress(BlockingIOError):
                data = os.read(key.fd, _PIECE)
            if data:
                self._on_output(key.data, data)
            else:
                self._selector.unregister(key.fd)
                os.close(key.fd)
        return bool(found)

    def _drain(self) -> None:
        """Read to the end of the pipes; what something left behind still writes is waited for a moment."""
        deadline = time.monotonic() + _DRAIN
        while self._selector.get_map() and (self._read(0.0) or time.monotonic() < deadline):
            if not self._selector.get_map():
                return
            self._read(0.05)
            if time.monotonic() > deadline + 10 * _DRAIN:
                return

    def _close(self) -> None:
        for key in list(self._selector.get_map().values()):
            self._selector.unregister(key.fd)
            os.close(key.fd)
        self._selector.close()


def exit_status(stages: Sequence[StageRecord]) -> int:
    """Return what a shell would say: 0, the status of the first that failed, 128 + its signal, or 127 for not found.

    One that only lost its reader (SIGPIPE) counts when no other failed.
    """
    failed = [stage for stage in stages if stage.exit_status != 0]
    if not failed:
        return 0
    cause = next((stage for stage in failed if not _was_killed(stage, stages)), failed[0])
    if cause.exit_status is not None:
        return cause.exit_status
    if cause.signal:
        return 128 + _number(cause.signal)
    return 127


def described(stages: Sequence[StageRecord]) -> str:
    """Say which programs of a pipeline failed, and how."""
    words = []
    for number, stage in enumerate(stages, 1):
        if stage.exit_status == 0 or _was_killed(stage, stages):
            continue
        name = f"stage {number} of {len(stages)}, {stage.command[0]}" if len(stages) > 1 else stage.command[0]
        if stage.error:
            words.append(f"{name} could not be started: {stage.error}")
        elif stage.signal:
            words.append(f"{name} was killed by {stage.signal}")
        else:
            words.append(f"{name} exited with status {stage.exit_status}")
    return "; ".join(words)


def _was_killed(stage: StageRecord, stages: Sequence[StageRecord]) -> bool:
    """Tell whether a stage ended only because another one had failed."""
    own = ("SIGKILL", "SIGTERM", "SIGPIPE")
    others = [other for other in stages if other.exit_status != 0 and other.signal not in own]
    return stage.signal in own and bool(others)


def _signal_name(status: ExitStatus) -> str:
    if status.signal is None:
        return ""
    try:
        return signal.Signals(status.signal).name
    except ValueError:
        return f"signal {status.signal}"


def _number(name: str) -> int:
    try:
        return int(signal.Signals[name])
    except KeyError:
        return int(name.rpartition(" ")[2])
