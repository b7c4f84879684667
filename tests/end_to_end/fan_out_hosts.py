"""Hosts that send and receive by the command line, in a network of namespaces: what the tests of fan-out share."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from backhaul.testing.network_lab import Lab

PATIENCE = 60.0
DATA_PORT = 7500
CHANGED = {"PYTHONUNBUFFERED": "1", "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/dev/null"}


def until(condition: Callable[[], Any], what: str = "it") -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come about"
        time.sleep(0.02)


class Program:
    """A process on a host; what it writes goes to files."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], out: Path, err: Path) -> None:
        self.name = name
        self.process = process
        self._out = out
        self._err = err

    @property
    def out(self) -> bytes:
        return self._out.read_bytes()

    @property
    def err(self) -> str:
        return self._err.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def wait(self, timeout: float = PATIENCE) -> int:
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} goes on after {timeout:.0f} s:\n{self.err}") from None
        # Whatever the end is, it was said in words and not by the interpreter.
        assert "Traceback" not in self.err, self.err
        return code

    def says(self, text: str) -> None:
        """Wait for a text on stderr."""
        until(lambda: text in self.err or not self.running, f"{text!r} at {self.name}")
        assert text in self.err, f"{self.name} ended without {text!r}:\n{self.err}"

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        self.process.send_signal(number)

    @property
    def documents(self) -> list[Any]:
        """The JSON objects on stdout, one after the other."""
        text, found = self.out.decode(), []
        decoder = json.JSONDecoder()
        while text := text.strip():
            document, end = decoder.raw_decode(text)
            found.append(document)
            text = text[end:]
        return found

    @property
    def json(self) -> Any:
        (document,) = self.documents
        return document


class Hosts:
    """``primary``, and receivers ``r1`` and on, with their keys. Each receiver has a directory of its own.

    A dump is ``payload``, or ``gated``: its first part, then nothing until ``open_gate``.
    """

    def __init__(self, lab: Lab, directory: Path, keys: Path, payload: Path) -> None:
        self.lab = lab
        self.directory = directory
        self.keys = keys
        self.payload = payload
        self.content = payload.read_bytes()
        self.gate = directory / "gate"
        os.mkfifo(self.gate)
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "PG"))}
        self.environment |= {**CHANGED, "HOME": str(directory), "BACKHAUL_STATE": str(directory / "state")}
        self._count = 0

    # -- programs ----------------------------------------------------------------------------------------

    def start(self, host: str, *arguments: str, env: Mapping[str, str] | None = None, key: str | None = "") -> Program:
        """Start the command line on a host, with its own key unless another, or None, is given."""
        self._count += 1
        place = self.directory / host
        place.mkdir(exist_ok=True)
        out, err = (place / f"{self._count}-{arguments[0]}.{kind}" for kind in ("out", "err"))
        words = [sys.executable, "-W", "error", "-m", "backhaul", arguments[0]]
        if key is not None:
            words += ["--key", str(self.keys / (key or f"{host}.key"))]
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = self.lab.host(host).start(
                [*words, *arguments[1:]],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**self.environment, **(env or {})},
                cwd=place,
            )
        return Program(host, process, out, err)

    def receive(self, host: str, *more: str, key: str | None = "", env: Mapping[str, str] | None = None) -> Program:
        """Start a receiver that calls the primary, keeps the file ``got``, and whose consumer makes ``seen``."""
        words = ("receive", "--from", "primary", *more)
        if "--" not in more and "-o" not in more and "--into" not in more:
            words += ("-o", "got", *self.consumer)
        return self.start(host, *words, key=key, env=env)

    def listen(self, host: str, *more: str, key: str | None = "", env: Mapping[str, str] | None = None) -> Program:
        """Start a receiver as a service, and wait until it listens."""
        words = ("receive", "--listen", *more)
        if "--" not in more and "-o" not in more and "--into" not in more:
            words += ("-o", "got", *self.consumer)
        program = self.start(host, *words, key=key, env=env)
        program.says("listening")
        return program

    def receivers(self, count: int, *more: str) -> list[Program]:
        """Start so many receivers, which take links at ``DATA_PORT``."""
        return [self.receive(f"r{number}", "--data-port", str(DATA_PORT), *more) for number in range(1, count + 1)]

    def send(self, *more: str, count: int = 3, key: str | None = "", host: str = "primary") -> Program:
        """Start the sender, to ``r1`` and on unless others are named; the payload's bytes as they are."""
        words = ["send", "--json", "--compress", "none", *more]
        if "--hosts" not in more and "--min-receivers" not in more:
            words[1:1] = ["--hosts", ",".join(f"r{number}" for number in range(1, count + 1))]
        if "--" not in more and "--from" not in more:
            words += ["--", "cat", str(self.payload)]
        return self.start(host, *words, key=key)

    # Its end of input makes the name, and nothing else does.
    consumer = ("--", "sh", "-c", "cat > taken && mv taken seen")

    # -- a dump in the middle ----------------------------------------------------------------------------

    def gated(self, first: int = 0, times: int = 1, end: str = "exit 0") -> tuple[str, ...]:
        """Return the command of a dump that stops after its first part (half of the payload, unless told).

        With ``times`` the payload is in it so many times.
        """
        first = first or len(self.content) // 2
        file = shlex.quote(str(self.payload))
        more = f" cat {file};" * (times - 1)
        gate = f"read go < {shlex.quote(str(self.gate))}"
        script = f"head -c {first} {file}; {gate}; tail -c +{first + 1} {file};{more} {end}"
        return ("--", "sh", "-c", script)

    def until_gate(self) -> int:
        """Wait until the first part of the dump was read, and return what opens the gate when it is closed."""
        found: list[int] = []

        def opened() -> bool:
            try:
                found.append(os.open(self.gate, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
            except OSError as error:
                assert error.errno == errno.ENXIO
                return False
            return True

        until(opened, "the middle of the dump")
        return found[0]

    def open_gate(self) -> None:
        """Let the dump go on, once it stands at the gate."""
        descriptor = self.until_gate()
        os.write(descriptor, b"\n")
        os.close(descriptor)

    def until_taken(self, *hosts: str, size: int = 1) -> None:
        """Wait until the consumers of these have so many bytes."""
        for host in hosts:
            file = self.directory / host / "taken"
            until(functools.partial(_has, file, size), f"{size} bytes at {host}")

    def until_still(self) -> int:
        """Wait until the sender puts no more of the stream on its cable; return the bytes there so far."""
        seen: list[int] = []

        def still() -> bool:
            seen.append(self.lab.host("primary").sent().bytes)
            time.sleep(0.4)
            return len(seen) > 3 and seen[-1] - seen[-4] < 30_000

        until(still, "a standstill")
        return seen[-1]

    def chain(self, count: int = 3) -> list[str]:
        """Return the receivers in the order in which the stream goes through them, by their connections."""
        names = {host.address: name for name, host in self.lab.hosts.items()}
        after: dict[str, str] = {}

        def complete() -> bool:
            for name in self.lab.hosts:
                command = ["ss", "-Htn", "state", "established", f"dport = :{DATA_PORT}"]
                for line in self.lab.host(name).run(command, capture_output=True, text=True).stdout.splitlines():
                    after[name] = names[line.split()[-1].rpartition(":")[0]]
            return len(after) == count

        until(complete, "the chain")
        order, last = [], "primary"
        while last in after:
            last = after[last]
            order.append(last)
        assert len(order) == count
        return order

    def shorten_buffers(self) -> None:
        """Have the kernels keep little on the way, so that whoever does not take holds up the others soon."""
        for host in self.lab.hosts.values():
            for name in ("rmem", "wmem"):
                host.run(["sysctl", "-q", "-w", f"net.ipv4.tcp_{name}=4096 65536 65536"])

    # -- outcomes ----------------------------------------------------------------------------------------

    def got(self, host: str, name: str = "got") -> bytes:
        return (self.directory / host / name).read_bytes()

    def assert_whole(self, host: str, *names: str, content: bytes | None = None) -> None:
        """The host has exactly what was sent."""
        for name in names or ("got", "seen"):
            got = hashlib.blake2b(self.got(host, name)).digest()
            assert got == hashlib.blake2b(self.content if content is None else content).digest(), (host, name)

    def assert_nothing(self, host: str) -> None:
        """No file has its name, none was left half, and no consumer was given an end."""
        left = {path.name for path in (self.directory / host).iterdir()}
        assert not {name for name in left if name in ("got", "seen") or "partial" in name}, left


def _has(file: Path, size: int) -> bool:
    return file.exists() and file.stat().st_size >= size


def fate(sender: Program, name: str) -> Any:
    """What became of a receiver, as the sender's JSON has it, in whichever way it ended."""
    (found,) = (one for one in _fates(sender) if one["name"] == name)
    return found


def fates(sender: Program) -> dict[str, str]:
    """What became of each receiver, in a word, by its name."""
    return {one["name"]: one["state"] for one in _fates(sender)}


def _fates(sender: Program) -> list[Any]:
    document = sender.json
    return list(document.get("fan_out", document)["receivers"])


RECEIVERS = tuple(f"r{number}" for number in range(1, 9))


def make_keys(directory: Path) -> Path:
    """Have ``backhaul keys`` make a key for each host, keys of another authority, and shared ones."""

    def keys(*words: str) -> None:
        command = [sys.executable, "-W", "error", "-m", "backhaul", "keys", *words]
        subprocess.run(command, cwd=directory, check=True, capture_output=True, timeout=60)

    keys("keys", "--sender", "primary,second", "--receiver", ",".join(RECEIVERS))
    keys("stranger", "--sender", "primary", "--receiver", "r1,r2,r3")
    for name in ("shared", "other"):
        keys("--shared", f"keys/{name}.key")
    return directory / "keys"


def make_payload(directory: Path, size: int = 24_000_000) -> Path:
    """Write bytes that do not compress."""
    file = directory / "payload"
    file.write_bytes(os.urandom(size))
    return file
