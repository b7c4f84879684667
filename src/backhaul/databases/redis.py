"""A Redis (or Valkey) server, spoken to in its own protocol (RESP2): questions, and the dump that a replica gets.

The dump ends with a checksum of all of it (CRC-64 as Redis has it, polynomial 0xad93d23594c935a9), little-endian.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import time
from collections.abc import Callable

from backhaul.databases.prerequisites import read_password
from backhaul.errors import ConfigurationError, SourceError
from backhaul.model.source_url import SourceUrl

_CONNECT_TIMEOUT = 15.0
# A master saves before it sends, and says nothing but newlines meanwhile, one a second.
_SILENCE = 120.0
_CHECKSUM = 8
_MAGIC = b"REDIS"
PASSWORD_VARIABLE = "REDISCLI_AUTH"  # noqa: S105 - the name of redis-cli's variable


class RedisError(Exception):
    """The server answered with an error, or not at all."""


class RedisConnection:
    """One connection.

    Raises:
        ConfigurationError: the server can't be reached, or refuses the account.
    """

    def __init__(self, url: SourceUrl) -> None:
        self.address = url.path or f"{url.host or '127.0.0.1'}:{url.port or 6379}"
        from_environment = "" if url.isolated else os.environ.get(PASSWORD_VARIABLE, "")
        password = read_password(url.password_file) if url.password_file else from_environment
        self._buffer = b""
        try:
            if url.path:
                self._socket = socket.socket(socket.AF_UNIX)
                self._socket.settimeout(_CONNECT_TIMEOUT)
                self._socket.connect(url.path)
            else:
                host = url.host or "127.0.0.1"
                self._socket = socket.create_connection((host, url.port or 6379), _CONNECT_TIMEOUT)
                if url.tls:
                    self._socket = ssl.create_default_context().wrap_socket(self._socket, server_hostname=host)
            if password:
                self.ask("AUTH", *([url.user] if url.user else []), password)
            self.ask("PING")
        except (OSError, RedisError) as error:
            raise ConfigurationError(
                f"Could not connect to Redis at {self.address}",
                str(error),
                f"Check host, port and user in the URL; the password comes from {PASSWORD_VARIABLE} or "
                "?password-file=FILE.",
            ) from error

    def ask(self, *words: str) -> str:
        """Send a command and return its answer as text.

        Raises:
            RedisError: the server said no.
            OSError: the connection broke.
        """
        parts = [f"*{len(words)}\r\n".encode()]
        for word in words:
            encoded = word.encode()
            parts.append(b"$%d\r\n%s\r\n" % (len(encoded), encoded))
        self._socket.sendall(b"".join(parts))
        return self._answer()

    def ask_many(self, *words: str) -> list[str]:
        """Send a command whose answer is a list; raises as ``ask`` does."""
        return [self._answer() for _ in range(int(self.ask(*words)))]

    def information(self, section: str) -> dict[str, str]:
        """Return a section of ``INFO``."""
        lines = self.ask("INFO", section).splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line and not line.startswith("#"))

    def begin_dump(self) -> tuple[str, str, int | None, bytes]:
        """Become a replica for as long as a dump takes.

        Returns:
            Replication id, offset, the dump's size where it is known, else None and the mark that ends it.

        Raises:
            RedisError: the server refuses.
            OSError: the connection broke.
        """
        with contextlib.suppress(RedisError):  # (unknown to old servers: then the size is known)
            self.ask("REPLCONF", "capa", "eof")
        self._socket.settimeout(_SILENCE)
        words = self.ask("PSYNC", "?", "-1").split()
        if len(words) != 3 or words[0] != "FULLRESYNC":
            raise RedisError(f"it answered PSYNC with {' '.join(words)!r}")
        line = self._line()
        while not line.startswith(b"$"):  # newlines keep the connection alive
            if line.startswith(b"-"):
                raise RedisError(line[1:].decode(errors="replace"))
            line = self._line()
        if line.startswith(b"$EOF:"):
            return words[1], words[2], None, line[5:]
        return words[1], words[2], int(line[1:]), b""

    def read_into(self, buffer: memoryview, fileno: int, stopped: Callable[[], None]) -> int:
        """Read what there is of a dump; 0 at the connection's end.

        Args:
            buffer: where to.
            fileno: becomes readable when the reading is to stop.
            stopped: raises then.
        """
        if self._buffer:
            piece = self._buffer[: len(buffer)]
            buffer[: len(piece)] = piece
            self._buffer = self._buffer[len(piece) :]
            return len(piece)
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(fileno, select.POLLIN)
        pending = self._socket.pending() if isinstance(self._socket, ssl.SSLSocket) else 0
        deadline = time.monotonic() + _SILENCE
        if not pending and not poll.poll(_SILENCE * 1000) and time.monotonic() >= deadline:
            raise TimeoutError(f"it sent nothing for {_SILENCE:.0f} s")
        stopped()
        return self._socket.recv_into(buffer)

    def close(self) -> None:
        """End the connection."""
        with contextlib.suppress(OSError):
            self._socket.close()

    def _line(self) -> bytes:
        while b"\n" not in self._buffer:
            data = self._socket.recv(1 << 16)
            if not data:
                raise RedisError("the server closed the connection")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.rstrip(b"\r")

    def _answer(self) -> str:
        line = self._line()
        while not line:  # (a master that saves says newlines before its answer)
            line = self._line()
        kind, rest = line[:1], line[1:].decode(errors="replace")
        if kind == b"-":
            raise RedisError(rest)
        if kind == b"$" and int(rest) >= 0:
            size = int(rest)
            while len(self._buffer) < size + 2:
                data = self._socket.recv(1 << 16)
                if not data:
                    raise RedisError("the server closed the connection")
                self._buffer += data
            text, self._buffer = self._buffer[:size], self._buffer[size + 2 :]
            return text.decode(errors="replace")
        return rest


class DumpChecker:
    """Follows a dump as it passes, and says at its end whether it is whole.

    Raises:
        ConfigurationError: the library for the checksum is not installed.
    """

    def __init__(self) -> None:
        try:
            import anycrc
        except ImportError as error:
            raise ConfigurationError(
                "The library that checks Redis dumps is missing", str(error), "pip install 'backhaul[redis]'"
            ) from error
        self._model = anycrc.Model("CRC64-REDIS")
        self._crc = 0
        self._held = b""
        self._head = b""
        self.size = 0

    def feed(self, data: memoryview | bytes) -> None:
        """Take the next bytes."""
        joined = self._held + bytes(data)
        self.size += len(data)
        self._head = (self._head + bytes(data[:9]))[:9]
        self._held, body = joined[-_CHECKSUM:], joined[:-_CHECKSUM]
        if body:
            self._crc = self._model.calc(body, self._crc)

    def check(self, name: str) -> str:
        """Say how the dump was checked.

        Raises:
            SourceError: it is none, or not whole.
        """
        expected = int.from_bytes(self._held, "little")
        why = ""
        if not self._head.startswith(_MAGIC) or self.size < len(_MAGIC) + 4 + 1 + _CHECKSUM:
            why = "it does not begin like one"
        elif expected and expected != self._crc:
            why = f"its checksum is {expected:016x}, and that of what came is {self._crc:016x}"
        if why:
            raise SourceError(f"The dump of {name} is not whole", why, "Nothing was committed; push again.")
        return f"CRC-64 {expected:016x}" if expected else "no checksum: the server has rdbchecksum off"
