"""The process between Backhaul and a user's command. Runs alone: only the standard library, no package.

It exists for the worst case: Backhaul is killed with SIGKILL while a restore reads from it. The kernel then
closes the pipe, and the restore would see a clean end of a stream that is not whole. The guardian holds the
pipe open until it is told that the stream is whole; if Backhaul vanishes before that, it kills the command
and everything the command started, and only then lets go.

Arguments: CONTROL_FD STATUS_FD HOLD_FD(-1: none) COMMAND [ARGUMENT...]

Control, one byte a message: ``o`` let go of HOLD_FD (the stream is whole); ``t`` terminate the command,
killing it after a grace; ``k`` kill it at once. The end of the control pipe means ``k``.
Status, one line: ``started PID``, then ``exit N``, ``signal N`` or ``error ERRNO TEXT``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_GRACE = 3.0
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE)


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def descendants(root: int) -> list[int]:
    """Return the living processes below ``root``: zombies don't count, they can't read or write."""
    parents: dict[int, list[int]] = {}
    dead = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry))
            if fields[0] in (b"Z", b"X"):
                dead.add(int(entry))
    found: list[int] = []
    todo = [root]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return [pid for pid in found if pid not in dead]


def _send_all(signal_number: int) -> bool:
    """Signal every descendant; tell whether there was any."""
    pids = descendants(os.getpid())
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal_number)
    return bool(pids)


def _spawn(command: list[str], status: int) -> int:
    """Start the command as a child, in this process group so that it can ask for a password."""
    error_reader, error_writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(error_writer)
        with os.fdopen(error_reader, "rb") as reader:
            problem = reader.read()
        if problem:
            os.waitpid(pid, 0)
            os.write(status, b"error " + problem + b"\n")
            os._exit(127)
        os.write(status, b"started %d\n" % pid)
        return pid
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in _IGNORED:
            signal.signal(number, signal.SIG_DFL)
        os.closerange(3, error_writer)
        os.closerange(error_writer + 1, 4096)
        os.set_inheritable(error_writer, False)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(error_writer, b"%d %s" % (error.errno or 0, os.fsencode(error.strerror or str(error))))
    finally:
        os._exit(127)


def main(arguments: list[str]) -> None:
    """Guard one command until it has ended."""
    control, status, hold = (int(text) for text in arguments[:3])
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    wake_reader, wake_writer = os.pipe()
    os.set_blocking(wake_reader, False)
    os.set_blocking(wake_writer, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
    child = _spawn(arguments[3:], status)
    # The command's own ends of the pipes must be its alone: an end held here would never close.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)

    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(wake_reader, select.POLLIN)
    kill_at: float | None = None
    ended = False
    while not ended:
        timeout = None if kill_at is None else max(0.0, kill_at - time.monotonic()) * 1000
        ready = {descriptor for descriptor, _ in poll.poll(timeout)}
        if wake_reader in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wake_reader, 4096)
        if control in ready:
            message = os.read(control, 1)
            if message == b"o":
                if hold >= 0:
                    os.close(hold)
                    hold = -1
            elif message == b"t":
                _send_all(signal.SIGTERM)
                kill_at = time.monotonic() + _GRACE
            else:
                kill_at = time.monotonic()
                poll.unregister(control)
        if kill_at is not None and time.monotonic() >= kill_at:
            while _send_all(signal.SIGKILL):
                _reap(child, status)
                time.sleep(0.005)
            kill_at = None
        ended = _reap(child, status)
    if kill_at is not None:
        # Told to end, and the command has: what it left behind goes too.
        deadline = kill_at
        while time.monotonic() < deadline and descendants(os.getpid()):
            time.sleep(0.02)
        while _send_all(signal.SIGKILL):
            time.sleep(0.005)


_reported = False


def _reap(child: int, status: int) -> bool:
    """Collect dead children; report the command's end once, and tell whether it has ended."""
    global _reported  # noqa: PLW0603 - this is a process with one purpose
    while True:
        try:
            pid, code = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return _reported
        if pid == 0:
            return _reported
        if pid == child:
            _reported = True
            number = os.waitstatus_to_exitcode(code)
            with contextlib.suppress(OSError):
                os.write(status, b"exit %d\n" % number if number >= 0 else b"signal %d\n" % -number)


if __name__ == "__main__":
    main(sys.argv[1:])
