"""The process between Backhaul and a user's command. Runs alone: only the standard library, no package.

It exists for the worst case: Backhaul is killed with SIGKILL while a restore reads from it. The kernel then
closes the pipe, and the restore would see a clean end of a stream that is not whole. The guardian holds the
pipe open until it is told that the stream is whole; if Backhaul vanishes before that, it kills the command
and everything the command started, and only then lets go.

Arguments: CONTROL_FD STATUS_FD HOLD_FD(-1: none) COMMAND [ARGUMENT...]

Control, one byte a message: ``o`` let go of HOLD_FD (the stream is whole); ``d`` all is done, leave; ``t``
terminate the command and all it started, killing after a grace; ``k`` kill them at once. The end of the
control pipe without ``d`` means ``k``, also after the command itself has ended: what it left running may
still read.
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
from typing import Any

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


def _spawn(command: list[str], status: int, inherited: dict[signal.Signals, Any]) -> int:
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
        # (Backhaul may be gone already; the command is killed for that before the pipe is let go.)
        with contextlib.suppress(OSError):
            os.write(status, b"started %d\n" % pid)
        return pid
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # As Backhaul found them (nohup stays nohup); but Python ignores SIGPIPE, and programs rely on it.
        for number, handler in inherited.items():
            keep = handler == signal.SIG_IGN and number != signal.SIGPIPE
            signal.signal(number, signal.SIG_IGN if keep else signal.SIG_DFL)
        os.closerange(3, error_writer)
        os.closerange(error_writer + 1, 4096)
        os.set_inheritable(error_writer, False)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(error_writer, b"%d %s" % (error.errno or 0, os.fsencode(error.strerror or str(error))))
    finally:
        os._exit(127)


def main(arguments: list[str]) -> None:
    """Guard one command until Backhaul lets go of it or vanishes."""
    control, status, hold = (int(text) for text in arguments[:3])
    inherited = {number: signal.getsignal(number) for number in _IGNORED}
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    wake_reader, wake_writer = os.pipe()
    os.set_blocking(wake_reader, False)
    os.set_blocking(wake_writer, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
    child = _spawn(arguments[3:], status, inherited)
    # The command's own ends of the pipes must be its alone: an end held here would never close.
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)

    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(wake_reader, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poll.poll()}
        if wake_reader in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wake_reader, 4096)
        _reap(child, status)
        if control in ready:
            message = os.read(control, 1)
            if message == b"o" and hold >= 0:
                os.close(hold)
                hold = -1
            elif message == b"d":
                return
            elif message == b"t":
                _send_all(signal.SIGTERM)
                _wait_for_the_end(child, status, _GRACE)
                break
            elif message != b"o":
                break
    # To the end of all of them, even if Backhaul is gone: only then may the held pipe close. What can't be
    # killed (another account's process, a dead disk's) is waited for; it reads no end meanwhile.
    pause = 0.005
    while _send_all(signal.SIGKILL):
        _wait_for_the_end(child, status, pause)
        pause = min(2 * pause, 1.0)
    _reap(child, status)


def _wait_for_the_end(child: int, status: int, seconds: float) -> None:
    """Wait until nothing below this process lives, at most that long; report the command's end meanwhile."""
    deadline = time.monotonic() + seconds
    while True:
        _reap(child, status)
        if not descendants(os.getpid()) or time.monotonic() >= deadline:
            return
        time.sleep(min(0.02, seconds))


def _reap(child: int, status: int) -> None:
    """Collect dead children; report the command's end, once."""
    while True:
        try:
            pid, code = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid == child:
            number = os.waitstatus_to_exitcode(code)
            with contextlib.suppress(OSError):
                os.write(status, b"exit %d\n" % number if number >= 0 else b"signal %d\n" % -number)


if __name__ == "__main__":
    main(sys.argv[1:])
