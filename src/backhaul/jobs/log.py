"""The log of a run: each line with its time and whether it was stdout (O), stderr (E) or Backhaul itself (B).

::

    2026-11-21T22:00:01.123+01:00 O 42 rows copied

It is bounded: its first quarter is kept, and of the rest the end, in two files that take turns; ``close`` makes one of
them. A line of more than 8 KiB is cut into several. A disk that is full ends the log, never the run.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from backhaul.formats.redaction import MASK, redact_text

OUTPUT, ERROR, OWN = b"O", b"E", b"B"
LAST_LINES = 30
_LONGEST_LINE = 1 << 13
# A line of the last words that goes into records and messages.
_LONGEST_WORD = 500
# What would move a terminal's cursor, or colour it, in a report.
_CONTROL = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07]*\x07|.)|[\x00-\x08\x0b-\x1f\x7f]")
# A secret of the config that is shorter is no secret: masking it would garble everything.
_SHORTEST_SECRET = 6
# What may be a secret has one of these words near it, whatever its case; only such lines are looked at closely.
_WORDS = (b"pass", b"pwd", b"secret", b"token", b"credential", b"key", b"authorization", b"bearer", b"basic ", b"://")
# Programs whose short options may be one.
_PROGRAMS = (b"mysql", b"mariadb", b"redis", b"mongo", b"curl", b"openssl", b"gpg", b"7z", b"zip")
_ORACLE = (b"sqlplus", b"expdp", b"impdp")


class RunLog:
    """See the module. Not thread-safe: one loop writes it.

    Args:
        path: the file; None keeps the last lines only.
        size: most bytes on the disk.
        echo: given each stamped line, with its tag; None for nothing.
        secrets: texts that are masked wherever they stand.
        now: the clock (aware, of this host's zone).
    """

    def __init__(
        self,
        path: Path | None,
        size: int,
        *,
        echo: Callable[[bytes, bytes], None] | None = None,
        secrets: Iterable[str] = (),
        now: Callable[[], dt.datetime] = lambda: dt.datetime.now().astimezone(),
    ) -> None:
        self.problem = ""
        self.lines = 0
        self.bytes = 0
        self._path = path
        self._echo = echo
        self._now = now
        self._secrets = sorted(
            {
                part.strip().encode()
                for text in secrets
                for part in (text, *text.splitlines())
                if len(part.strip()) >= _SHORTEST_SECRET
            },
            key=len,
            reverse=True,
        )
        self._rest: dict[bytes, bytes] = {}
        self._last: deque[tuple[bytes, bytes]] = deque(maxlen=LAST_LINES)
        self._head = size // 4
        self._turn = max((size - self._head) // 2, _LONGEST_LINE)
        self._file: BinaryIO | None = None
        self._written = 0
        self._turns = 0
        self._dropped = 0
        if path is not None:
            try:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - for the life of the log
            except OSError as error:
                self._failed(error)

    @property
    def cut(self) -> bool:
        """Whether lines were left out."""
        return self._dropped > 0

    @property
    def last_words(self) -> str:
        """The last lines of stderr, or of stdout where it said nothing; secrets masked."""
        for tag in (ERROR, OUTPUT):
            lines = [line for of, line in self._last if of == tag]
            if lines:
                return "\n".join(
                    _CONTROL.sub("", line.decode(errors="replace"))[:_LONGEST_WORD] for line in lines[-10:]
                )
        return ""

    def masked(self, text: str) -> str:
        """Return a text of several lines without the secrets that this log knows of."""
        lines = [line.encode(errors="backslashreplace") for line in text.splitlines()]
        return "\n".join(line.decode(errors="replace") for line in self._masked(lines))

    def write(self, tag: bytes, data: bytes) -> None:
        """Take what a program wrote; lines that are not ended wait for their end."""
        data = self._rest.pop(tag, b"") + data
        end = data.rfind(b"\n") + 1
        if end and not self._looked_at(data[:end]):
            self._write_plain(tag, data[:end])
            data = data[end:]
        lines = data.splitlines(keepends=True)
        if lines and not lines[-1].endswith((b"\n", b"\r")):
            if len(lines[-1]) < _LONGEST_LINE:
                self._rest[tag] = lines.pop()
        elif lines and lines[-1].endswith(b"\r") and not lines[-1].endswith(b"\n"):
            # Its newline may be the next byte.
            self._rest[tag] = lines.pop()
        self._write_lines(tag, [line.rstrip(b"\r\n") for line in lines])

    def say(self, text: str) -> None:
        """Write a line of Backhaul's own."""
        self._write_lines(OWN, [line.encode(errors="backslashreplace") for line in text.splitlines()])

    def close(self) -> None:
        """Write what waits, and make one file of the pieces."""
        for tag in list(self._rest):
            self._write_lines(tag, [self._rest.pop(tag).rstrip(b"\r\n")])
        if self._file is None:
            return
        try:
            self._join()
            os.fsync(self._file.fileno())
        except OSError as error:
            self._failed(error)
        finally:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _looked_at(self, lines: bytes) -> bool:
        """Tell whether whole lines must be looked at one by one. Most need not be: a program that talks is no brake."""
        return (
            b"\r" in lines
            or _is_suspect(lines)
            or any(secret in lines for secret in self._secrets)
            or max(map(len, lines.split(b"\n"))) > _LONGEST_LINE
        )

    def _write_plain(self, tag: bytes, lines: bytes) -> None:
        stamp = self._stamp(tag)
        self.lines += lines.count(b"\n")
        self._last.extend((tag, line) for line in lines[:-1].rsplit(b"\n", LAST_LINES)[-LAST_LINES:])
        self._pass(tag, stamp + lines[:-1].replace(b"\n", b"\n" + stamp) + b"\n")

    def _stamp(self, tag: bytes) -> bytes:
        return self._now().isoformat(timespec="milliseconds").encode() + b" " + tag + b" "

    def _pass(self, tag: bytes, text: bytes) -> None:
        self.bytes += len(text)
        self._keep(text)
        if self._echo is not None:
            self._echo(tag, text)

    def _write_lines(self, tag: bytes, lines: list[bytes]) -> None:
        if not lines:
            return
        stamp = self._stamp(tag)
        clean = list(self._masked(lines))
        self.lines += len(clean)
        self._last.extend((tag, line) for line in clean[-LAST_LINES:])
        self._pass(tag, b"".join([stamp + line + b"\n" for line in clean]))

    def _masked(self, lines: list[bytes]) -> Iterator[bytes]:
        for line in lines:
            for start in range(0, max(len(line), 1), _LONGEST_LINE):
                piece = line[start : start + _LONGEST_LINE]
                for secret in self._secrets:
                    piece = piece.replace(secret, MASK.encode())
                if _is_suspect(piece):
                    text = redact_text(piece.decode(errors="surrogateescape"))
                    piece = text.encode(errors="surrogateescape")
                yield piece

    def _keep(self, text: bytes) -> None:
        if self._file is None:
            return
        assert self._path is not None
        limit = self._turn if self._turns else self._head
        try:
            while text:
                room = limit - self._written
                if room < len(text):
                    # Whole lines only: a piece ends where a line does.
                    fits = text.rfind(b"\n", 0, max(room, 0)) + 1
                    self._put(text[:fits])
                    text = text[fits:]
                    self._next_piece()
                    limit = self._turn
                    if len(text) > limit:
                        # More at once than a piece holds: its end alone counts.
                        begin = text.find(b"\n", len(text) - limit) + 1
                        self._dropped += begin
                        text = text[begin:]
                    continue
                self._put(text)
                return
        except OSError as error:
            self._failed(error)

    def _put(self, text: bytes) -> None:
        assert self._file is not None
        view = memoryview(text)
        while view:
            done = self._file.write(view) or 0
            view = view[done:]
        self._written += len(text)

    def _piece(self, turn: int) -> Path:
        assert self._path is not None
        return self._path.with_name(f"{self._path.name}.{turn % 2}")

    def _next_piece(self) -> None:
        self._turns += 1
        path = self._piece(self._turns)
        if self._turns > 2:
            with contextlib.suppress(OSError):
                self._dropped += path.stat().st_size
        if self._file is not None:
            self._file.close()
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - for the life of the log
        self._written = 0

    def _join(self) -> None:
        """Append the pieces to the head, in order."""
        if not self._turns:
            return
        assert self._path is not None
        assert self._file is not None
        self._file.close()
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        if self._dropped:
            note = f"... {self._dropped} bytes were left out here ..."
            stamp = self._now().isoformat(timespec="milliseconds")
            self._put(f"{stamp} {OWN.decode()} {note}\n".encode())
        for turn in range(max(self._turns - 1, 1), self._turns + 1):
            path = self._piece(turn)
            with open(path, "rb") as piece:
                while data := piece.read(1 << 20):
                    self._put(data)
            path.unlink()

    def _failed(self, error: OSError) -> None:
        self.problem = f"the log can't be kept: {error.strerror or error}"
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def _is_suspect(text: bytes) -> bool:
    """Tell whether a text may hold a secret. (Plain searches: an expression of all words takes fifty times as long.)"""
    lower = text.lower()
    return (
        any(word in lower for word in _WORDS)
        or (b" -" in lower and any(program in lower for program in _PROGRAMS))
        or (b"@" in lower and any(program in lower for program in _ORACLE))
    )


class LogReader:
    """Reads a log, also one that is being written, or was left in pieces by a run that was killed.

    Args:
        path: the log's file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Of each file, by what it is on the disk, how much was read.
        self._read: dict[tuple[int, int], int] = {}
        self._last = b""

    def new(self) -> Iterator[bytes]:
        """Yield what is there and was not read yet, in order."""
        pieces = [path for turn in (0, 1) if (path := self._path.with_name(f"{self._path.name}.{turn}")).exists()]
        joined = not pieces and len(self._read) > 1
        if joined:
            yield from self._rest_of_joined()
            return
        for path in (self._path, *sorted(pieces, key=_modified)):
            try:
                with open(path, "rb") as file:
                    status = os.fstat(file.fileno())
                    key = (status.st_dev, status.st_ino)
                    file.seek(self._read.get(key, 0))
                    while data := file.read(1 << 16):
                        self._last = (self._last + data)[-_LONGEST_LINE:]
                        yield data
                    self._read[key] = file.tell()
            except OSError:
                continue

    def _rest_of_joined(self) -> Iterator[bytes]:
        """Yield what follows the last line that was read, in the one file that the pieces have become."""
        last = self._last[:-1].rpartition(b"\n")[2] + b"\n"
        with contextlib.suppress(OSError):
            data = self._path.read_bytes()
            at = data.rfind(last)
            self._read = {(0, 0): 0}
            if at >= 0:
                yield data[at + len(last) :]


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
