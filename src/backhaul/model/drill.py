"""What a drill found, as values. ``formats.drill`` turns them into bytes and back."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

PROVED, FAILED, UNTESTED = "proved", "failed", "could not test"


class DrillCheck(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that was looked at in the restored database.

    ``state`` is ``ok``, ``failed``, ``skipped``, or ``untested`` for a question that is none to this database.
    """

    name: str
    state: str
    detail: str = ""


class DrillRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The record beside a backup: what was tried, where, and what came of it.

    Attributes:
        format, version: of this record.
        id: of the backup.
        started, finished: ISO, UTC.
        host, tool: where, and by which version of Backhaul.
        result: ``proved``, ``failed`` or ``could not test``.
        why: of what is not proved.
        server: the version of the server that it was tried in.
        seconds: by what went on: ``restore`` is the time to restore, from the first byte to a database that answers.
        raw_size: bytes of the streams that were restored.
        checks: what was looked at.
    """

    format: str
    version: str
    id: str
    started: str
    finished: str
    host: str
    tool: str
    result: str
    why: str = ""
    server: str = ""
    seconds: Mapping[str, float] = {}
    raw_size: int = 0
    checks: tuple[DrillCheck, ...] = ()
