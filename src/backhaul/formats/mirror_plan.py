"""A plan as a file: one JSON object, with an action a line, so that it is written and read piece by piece::

    {"schema": "backhaul.plan/1", "id": ..., "mirror": ..., "directory": ..., "options": ..., "actions": [
    {"kind": "upload", "key": "a", ...},
    {"kind": "tombstone", "key": "b", ...}
    ], "totals": {...}, "refusals": [...], "seal": "<BLAKE3 of all that is before the seal's value>"}

The seal finds what was cut or changed by accident or by hand: a plan is applied as it was approved, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import msgspec
from blake3 import blake3

from backhaul.errors import FormatError
from backhaul.model.mirror import Action, MirrorRecord, Refusal, SourceRecord, Totals

SCHEMA = "backhaul.plan/1"
_ACTIONS = b', "actions": [\n'
_SEAL = b', "seal": "'


class PlanHead(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan was made of.

    Attributes:
        id: random.
        made: when (ISO, UTC).
        directory, mirror: as they were given.
        place: the mirror in a form that all its spellings share.
        root: the copy that it is for.
        source: where the tree comes from.
        record: the mirror's page as it was; None for a new mirror.
        options: how it was compared, for people.
        exclude: patterns of names that were left alone.
    """

    id: str
    made: str
    directory: str
    mirror: str
    place: str
    root: str = ""
    source: SourceRecord
    record: MirrorRecord | None = None
    options: dict[str, Any] = {}
    exclude: tuple[str, ...] = ()


class PlanTail(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it: approved if nothing was refused. ``mounts`` are the file systems below the directory."""

    totals: Totals
    refusals: tuple[Refusal, ...] = ()
    mounts: dict[str, str] = {}


class PlanWriter:
    """Writes a plan: the head, then actions, then the tail."""

    def __init__(self, file: BinaryIO, head: PlanHead) -> None:
        self._file = file
        self._hash = blake3()
        self._first = True
        document = msgspec.json.encode({"schema": SCHEMA, **msgspec.to_builtins(head)})
        self._write(document[:-1] + _ACTIONS)

    def add(self, action: Action) -> None:
        """Add an action."""
        self._write((b"" if self._first else b",\n") + msgspec.json.encode(action))
        self._first = False

    def finish(self, tail: PlanTail) -> None:
        """Add the tail and the seal."""
        self._write(b"\n]" + b", " + msgspec.json.encode(tail)[1:-1] + _SEAL)
        self._file.write(self._hash.hexdigest().encode() + b'"}\n')
        self._file.flush()

    def _write(self, data: bytes) -> None:
        self._hash.update(data)
        self._file.write(data)


class PlanReader:
    """Reads a plan that can be read again from its beginning. ``head`` and ``tail`` are there at once, and checked.

    Raises:
        FormatError: it is no plan, or not as it was sealed.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        file.seek(0)
        first = file.readline()
        if not first.endswith(_ACTIONS) or not first.startswith(b'{"schema":"' + SCHEMA.encode() + b'"'):
            raise self._error("it does not begin as one")
        try:
            self.head = msgspec.json.decode(first[: -len(_ACTIONS)] + b"}", type=PlanHead)
            digest = blake3(first)
            self._start = file.tell()
            last = b""
            for line in file:
                if last:
                    digest.update(last)
                last = line
            head, seal, rest = last.rpartition(_SEAL)
            if not seal or not head.startswith(b"], "):
                raise self._error("its end is missing")
            digest.update(head + seal)
            if rest != digest.hexdigest().encode() + b'"}\n':
                raise self._error("it was changed after it was made")
            self.tail = msgspec.json.decode(b"{" + head[len(b"], ") :] + b"}", type=PlanTail)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._error(str(error)) from error

    def actions(self) -> Iterator[tuple[int, Action]]:
        """Yield the actions in order, each with where its line begins."""
        self._file.seek(self._start)
        position = self._start
        while (line := self._file.readline()) and not line.startswith(b"]"):
            if line != b"\n":
                yield position, msgspec.json.decode(line.rstrip(b",\n"), type=Action)
            position += len(line)

    def action_at(self, position: int) -> Action:
        """Return the action whose line begins there."""
        self._file.seek(position)
        return msgspec.json.decode(self._file.readline().rstrip(b",\n"), type=Action)

    def _error(self, why: str) -> FormatError:
        return FormatError(f"{self._name} is not a plan that can be applied", why, "Make a new one: backhaul plan")
