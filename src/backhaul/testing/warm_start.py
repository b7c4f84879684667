"""Processes of the command line that need not load other people's modules first: forked off one that has.

A test calls the command line dozens of times, and most of what a start costs is the loading of the libraries. Here a
process that has loaded those (and nothing of Backhaul) forks at each call. What comes of it is a process of its own,
with its own id, environment, directory, stdin, stdout and stderr; it loads Backhaul itself, and ends as any other.
What it has not: an argument vector that others see in /proc, and settings that an interpreter reads at its start
(``must_start_cold``).

This file is two programs: imported, the client (``WarmPopen``); run by its path, the server. So the server has loaded
nothing of Backhaul.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

# What the interpreter, the loader and the C library read once, at the start of a process.
_READ_AT_START = ("PYTHON", "LC_", "LANG", "LD_", "MALLOC_", "GLIBC_", "TZ", "OPENSSL_", "SSL_")
_LOCAL = (
    *("click", "msgspec.json", "blake3", "zstandard", "awscrt.checksums", "ctypes", "concurrent.futures.thread"),
    *("cryptography.hazmat.primitives.asymmetric.x25519", "cryptography.hazmat.primitives.ciphers.aead"),
    *("cryptography.hazmat.primitives.kdf.hkdf", "sqlite3", "tomllib", "logging", "subprocess", "tempfile", "secrets"),
    *("ipaddress", "getpass", "platform", "uuid", "_strptime", "difflib", "textwrap", "shlex", "selectors", "html"),
)
_S3 = (
    *("ssl", "botocore.session", "botocore.client", "botocore.config", "botocore.httpsession", "botocore.endpoint"),
    *("botocore.handlers", "botocore.docs", "botocore.signers", "botocore.httpchecksum", "botocore.retries.standard"),
    *("botocore.retries.adaptive", "botocore.tokens", "botocore.compress", "awscrt.auth"),
)
_STATUS = struct.Struct("=i")


def must_start_cold(environment: Mapping[str, str]) -> bool:
    """Tell whether an environment says what only a new interpreter would heed."""
    names = {*environment, *os.environ}
    return any(
        environment.get(name) != os.environ.get(name) for name in names if name.upper().startswith(_READ_AT_START)
    )


class WarmServer:
    """The process that others are forked off: ``python -W error``, with other people's modules loaded.

    Args:
        s3: whether it has what S3 takes, too. (What it has counts as memory of those that are forked off.)
    """

    def __init__(self, *, s3: bool) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "error", __file__, str(theirs.fileno()), *_LOCAL, *(_S3 if s3 else ())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )

    def fork(self, request: Mapping[str, Any], descriptors: Sequence[int]) -> tuple[int, int]:
        """Start a process; return its id and a pipe that its status will come by (as ``os.waitpid`` has it).

        Args:
            request: its ``arguments``, ``environment`` and ``directory``.
            descriptors: what becomes its stdin, stdout and stderr.
        """
        reader, writer = os.pipe()
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], [*descriptors, writer])
        finally:
            os.close(writer)
        number = os.read(reader, _STATUS.size)
        assert len(number) == _STATUS.size, "the server that forks is gone"
        return _STATUS.unpack(number)[0], reader

    def close(self) -> None:
        """End it; what it has forked off goes on."""
        self._socket.close()
        self._process.wait(30)


class WarmPopen(subprocess.Popen[bytes]):
    """A ``Popen`` of ``python -W error -m backhaul ARGUMENTS`` that is forked off a ``WarmServer``.

    It takes no options of ``Popen`` but those below: whoever needs others starts an interpreter.
    """

    def __init__(
        self,
        server: WarmServer,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: os.PathLike[str],
        stdin: Any = None,
        stdout: Any = None,
        stderr: Any = None,
    ) -> None:
        self._server = server
        self._status = -1  # the pipe by which its status comes, while it has not
        command = [sys.executable, "-W", "error", "-m", "backhaul", *arguments]
        super().__init__(command, env=env, cwd=cwd, stdin=stdin, stdout=stdout, stderr=stderr)

    # What ``Popen`` does alone for itself: to begin a child, and to wait for it.

    def _execute_child(self, args: Any, executable: Any, *rest: Any) -> None:
        own: Any = self
        _, _, _, cwd, env, _, _, _, *pipes = rest[:14]
        child_in, _, _, child_out, _, child_err = pipes
        given = [number if pipe == -1 else pipe for number, pipe in enumerate((child_in, child_out, child_err))]
        request = {"arguments": args[5:], "environment": dict(env), "directory": str(Path(cwd).absolute())}
        self.pid, self._status = self._server.fork(request, given)
        os.set_blocking(self._status, False)
        own._child_created = True
        own._close_pipe_fds(*pipes)

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if not wait_flags & os.WNOHANG:
            select.select([self._status], [], [])
        try:
            data = os.read(self._status, _STATUS.size)
        except BlockingIOError:
            return 0, 0
        os.close(self._status)
        self._status = -1
        assert len(data) == _STATUS.size, "the server that forks is gone"
        return self.pid, _STATUS.unpack(data)[0]

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        own: Any = self
        if self._status < 0 or not own._waitpid_lock.acquire(False):
            return self.returncode
        try:
            pid, status = self._try_wait(os.WNOHANG)
            if pid == self.pid:
                own._handle_exitstatus(status)
        finally:
            own._waitpid_lock.release()
        return self.returncode


# -- the server --------------------------------------------------------------------------------------------


def _become(request: Mapping[str, Any], descriptors: Sequence[int]) -> NoReturn:
    """Be ``python -m backhaul``, in a process that was just forked off."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    os.chdir(request["directory"])
    sys.path[0] = request["directory"]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old: io.TextIOWrapper = getattr(sys, name)
        new = io.TextIOWrapper(
            io.BufferedReader(io.FileIO(0, "rb", closefd=False))
            if number == 0
            else io.BufferedWriter(io.FileIO(number, "wb", closefd=False)),
            old.encoding,
            old.errors,
            newline=None if number == 0 else "\n",
            line_buffering=number == 2 or os.isatty(number),
        )
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    sys.argv = ["-m", *request["arguments"]]
    sys.orig_argv = [sys.executable, "-W", "error", "-m", "backhaul", *request["arguments"]]
    runpy.run_module("backhaul", run_name="__main__", alter_sys=True)
    sys.exit(0)


def _serve(control: socket.socket) -> tuple[Mapping[str, Any], Sequence[int]] | None:
    """Fork at each request and pass on how what was forked off ended.

    Return, in a process that was forked off, what it is to be; and None in the server, when nobody asks any more.
    """
    poll = select.poll()
    poll.register(control, select.POLLIN)
    running: dict[int, tuple[int, int]] = {}  # by the descriptor of the process: its id, and where its status goes
    while True:
        for ready, _ in poll.poll():
            if ready in running:
                pid, writer = running.pop(ready)
                poll.unregister(ready)
                os.close(ready)
                _, status = os.waitpid(pid, 0)
                with contextlib.suppress(BrokenPipeError):
                    os.write(writer, _STATUS.pack(status))
                os.close(writer)
                continue
            message, descriptors, _, _ = socket.recv_fds(control, 1 << 20, 4)
            if not message:
                return None
            *given, writer = descriptors
            pid = os.fork()
            if pid == 0:
                control.close()
                for process, (_, other) in running.items():
                    os.close(process)
                    os.close(other)
                os.close(writer)
                return json.loads(message), given
            for descriptor in given:
                os.close(descriptor)
            process = os.pidfd_open(pid)
            poll.register(process, select.POLLIN)
            running[process] = pid, writer
            os.write(writer, _STATUS.pack(pid))


def _main() -> None:
    with socket.socket(fileno=int(sys.argv[1])) as control:
        control.set_inheritable(False)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for name in sys.argv[2:]:
            importlib.import_module(name)
        gc.collect()
        gc.freeze()
        found = _serve(control)
    if found is not None:
        _become(*found)


if __name__ == "__main__":
    _main()
