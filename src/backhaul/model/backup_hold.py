"""A hold on one backup, as a value. ``formats.hold`` turns it into bytes and back."""

from __future__ import annotations

import msgspec


class BackupHold(msgspec.Struct, frozen=True, kw_only=True):
    """The record beside a backup that is not to be pruned.

    Attributes:
        format, version: of this record.
        id: of the backup.
        since: when it was set (ISO, UTC).
        until: when it ends (ISO, with its zone), or None for a hold without end.
        reason: why.
        by, host: who set it, and where.
    """

    format: str
    version: str
    id: str
    since: str
    until: str | None = None
    reason: str = ""
    by: str = ""
    host: str = ""
