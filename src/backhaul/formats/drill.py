"""The record of a drill as JSON, and its name beside the backup: ``<id>/drill-<time>.json``."""

from __future__ import annotations

import datetime as dt

import msgspec

from backhaul.errors import FormatError
from backhaul.formats.names import backup_id, object_key
from backhaul.model.drill import DrillRecord

FORMAT = "backhaul-drill"
VERSION = "1.0"
_MAJOR = "1"
MAX_SIZE = 16 << 20
# Made here and not at the first use: threads that decode a struct for the first time at once can crash the process
# (formats.manifest).
_DECODER = msgspec.json.Decoder(DrillRecord)


def drill_key(backup: str, started: dt.datetime) -> str:
    """Return the key of a drill's record, relative to the series."""
    return object_key(backup, f"drill-{backup_id(started)}.json")


def encode(record: DrillRecord) -> bytes:
    """Return the record as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"


def decode(data: bytes, *, where: str) -> DrillRecord:
    """Read a record.

    Raises:
        FormatError: it is none, or of a newer major version.
    """
    try:
        record = _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{where} is not the record of a drill", str(error), "Drill again.") from error
    if record.format != FORMAT or record.version.partition(".")[0] != _MAJOR:
        raise FormatError(
            f"{where} is not the record of a drill",
            f"it says format {record.format!r}, version {record.version!r}",
            "Drill again, or install a newer Backhaul.",
        )
    return record
