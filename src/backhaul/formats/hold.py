"""The record of a hold as JSON, and its name beside the backup: ``<id>/hold-<time>.json``."""

from __future__ import annotations

import datetime as dt

import msgspec

from backhaul.errors import FormatError
from backhaul.formats.names import backup_id, object_key
from backhaul.model.backup_hold import BackupHold

FORMAT = "backhaul-hold"
VERSION = "1.0"
_MAJOR = "1"
MAX_SIZE = 1 << 20
# Made here and not at the first use: threads that decode a struct for the first time at once can crash the process
# (formats.manifest).
_DECODER = msgspec.json.Decoder(BackupHold)
_RELEASE = "Look at it; backhaul hold --release takes it away."


def hold_key(backup: str, since: dt.datetime) -> str:
    """Return the key of a hold's record, relative to the series."""
    return object_key(backup, f"hold-{backup_id(since)}.json")


def encode(hold: BackupHold) -> bytes:
    """Return the record as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(hold), indent=2) + b"\n"


def decode(data: bytes, *, where: str) -> BackupHold:
    """Read a record.

    Raises:
        FormatError: it is none, of a newer major version, or its end is no time.
    """
    try:
        hold = _DECODER.decode(data)
        end_of(hold)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise FormatError(f"{where} is not the record of a hold", str(error), _RELEASE) from error
    if hold.format != FORMAT or hold.version.partition(".")[0] != _MAJOR:
        raise FormatError(
            f"{where} is not the record of a hold",
            f"it says format {hold.format!r}, version {hold.version!r}",
            "Install a newer Backhaul.",
        )
    return hold


def end_of(hold: BackupHold) -> dt.datetime | None:
    """Return when the hold ends (aware), or None for one without end.

    Raises:
        ValueError: its end is no time, or a time without a zone.
    """
    if hold.until is None:
        return None
    end = dt.datetime.fromisoformat(hold.until)
    if end.tzinfo is None:
        raise ValueError(f"{hold.until!r} names no time zone")
    return end
