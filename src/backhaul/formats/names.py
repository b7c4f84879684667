"""The names of objects in a series, and what a name says (DESIGN: what lies in a store)::

    <id>/<stream>.zst      compressed stream          <id>/<stream>      stream stored as it is
    <id>/<stream>.zst.age  and encrypted              <id>/<stream>.age  encrypted as it is
    <id>/<stream>.zst.0001 its first segment, where one object can't hold a stream (formats.part_sizes)
    <id>/manifest.json     the commit record          <id>/claim.json    a run is making this backup
    <id>/drill-<time>.json what a drill found         <id>/hold-<time>.json   the backup is not to be pruned

An id is the UTC start of the backup, ``20261121T020000Z``.
"""

from __future__ import annotations

import datetime as dt
import re

import msgspec

from backhaul.errors import UsageError

MANIFEST = "manifest.json"
CLAIM = "claim.json"
# How the name of a database ends that is being restored: whoever reads it knows that it is not whole.
RESTORING = "_restoring_backhaul"
COMPRESSED_SUFFIX = ".zst"
ENCRYPTED_SUFFIX = ".age"

_ID_FORMAT = "%Y%m%dT%H%M%SZ"
_ID_PATTERN = re.compile(r"\d{8}T\d{6}Z", re.ASCII)
_STREAM_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}", re.ASCII)
_RECORD = re.compile(r"(drill|hold)-\d{8}T\d{6}Z\.json", re.ASCII)
_SEGMENT = re.compile(r"\.\d{4,}$", re.ASCII)
# A stream must not look like one of the other objects, nor like another codec's name of another stream.
_RESERVED_ENDINGS = (".json", ".zst", ".age")


class ObjectName(msgspec.Struct, frozen=True):
    """What a key within a series means: ``kind`` is ``stream``, ``manifest``, ``claim`` or ``record``.

    ``record`` tells what kind of record it is: ``drill`` or ``hold``.
    """

    kind: str
    id: str
    stream: str = ""
    encrypted: bool = False
    record: str = ""


def backup_id(start: dt.datetime) -> str:
    """Return the id of a backup that starts then (an aware time)."""
    return start.astimezone(dt.UTC).strftime(_ID_FORMAT)


def is_backup_id(text: str) -> bool:
    """Tell whether the text is an id: the right form, and a time that exists."""
    return parse_backup_id(text) is not None


def parse_backup_id(text: str) -> dt.datetime | None:
    """Return the start that an id stands for (aware, UTC), or None if it is no id."""
    if not _ID_PATTERN.fullmatch(text):
        return None
    # (strptime takes 15 times as long, and a listing has an id in every key.)
    numbers = text[:4], text[4:6], text[6:8], text[9:11], text[11:13], text[13:15]
    year, month, day, hour, minute, second = map(int, numbers)
    try:
        return dt.datetime(year, month, day, hour, minute, second, tzinfo=dt.UTC)
    except ValueError:
        return None


def check_stream_name(name: str) -> None:
    """Refuse a name that could not be an object's name, or would be taken for another object.

    Raises:
        UsageError: with the rule.
    """
    if not _is_stream_name(name):
        raise UsageError(
            f"{name!r} can't be a stream's name",
            "a name has 1 to 100 letters, digits, '_', '-', '+' or '.', does not start with '.', '-' or '+', "
            "and does not end with " + ", ".join(_RESERVED_ENDINGS) + " or a point and four digits",
            "Choose another --name, such as 'data' or 'orders'.",
        )


def stream_file(stream: str, codec: str, *, encrypted: bool = False) -> str:
    """Return the file name of a stream's object within its backup."""
    return stream + (COMPRESSED_SUFFIX if codec == "zstd" else "") + (ENCRYPTED_SUFFIX if encrypted else "")


def segment_file(file: str, segment: int, *, numbered: bool) -> str:
    """Return the file name of a stream's segment.

    Args:
        file: as ``stream_file`` gives it.
        segment: from 1; 0 for a stream that is a single request.
        numbered: whether the first segment has a number too (``PartLayout.numbered``).
    """
    if segment == 0 or (segment == 1 and not numbered):
        return file
    return f"{file}.{segment:04d}"


def object_key(backup: str, file: str) -> str:
    """Return the key, relative to the series, of a file of a backup."""
    return f"{backup}/{file}"


def file_of(key: str) -> str:
    """Return the file within its backup of a key relative to the series."""
    return key.partition("/")[2]


def parse_key(key: str) -> ObjectName | None:
    """Say what a key relative to the series is, or None for a name that Backhaul does not write."""
    backup, slash, file = key.partition("/")
    if not slash or not is_backup_id(backup):
        return None
    if file == MANIFEST:
        return ObjectName("manifest", backup)
    if file == CLAIM:
        return ObjectName("claim", backup)
    record = _RECORD.fullmatch(file)
    if record is not None:
        return ObjectName("record", backup, record=record[1])
    segment = _SEGMENT.search(file)
    whole = file[: segment.start()] if segment else file
    stream = whole.removesuffix(ENCRYPTED_SUFFIX).removesuffix(COMPRESSED_SUFFIX)
    if _is_stream_name(stream):
        return ObjectName("stream", backup, stream, whole.endswith(ENCRYPTED_SUFFIX))
    return None


def _is_stream_name(name: str) -> bool:
    return (
        _STREAM_PATTERN.fullmatch(name) is not None
        and not name.lower().endswith(_RESERVED_ENDINGS)
        and _SEGMENT.search(name) is None
    )
