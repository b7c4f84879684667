"""The records of jobs as JSON, and their names: on this host, and beside the backups::

    .backhaul/jobs/<host>/<job>/card.json          what others must know of the job to judge it
    .backhaul/jobs/<host>/<job>/<run>.json         one run

A run's id is its start in UTC and four hex digits: ``20261121T210007Z-3f9a``.
"""

from __future__ import annotations

import datetime as dt
import re
from typing import TypeVar

import msgspec

from backhaul.errors import FormatError
from backhaul.formats.names import backup_id, parse_backup_id
from backhaul.model.job import Hold, JobCard, RunRecord

FORMAT = "backhaul-run"
VERSION = "1.0"
_MAJOR = "1"
DIRECTORY = ".backhaul/jobs/"
CARD = "card.json"
MAX_SIZE = 1 << 20
_RUN = re.compile(r"(\d{8}T\d{6}Z)-[0-9a-f]{4}", re.ASCII)
_KEY = re.compile(r"(?:.*/)?\.backhaul/jobs/([^/]+)/([^/]+)/([^/]+)\.json", re.ASCII)
_TIMES = ("started", "finished", "closes", "forecast", "since", "until", "known_since")
_Value = TypeVar("_Value", RunRecord, JobCard, Hold)


class RecordName(msgspec.Struct, frozen=True):
    """What a key says: whose record it is; ``run`` is empty for the card."""

    host: str
    job: str
    run: str


def run_id(start: dt.datetime, word: int) -> str:
    """Return the id of a run that starts then (aware); ``word`` tells two of one second apart."""
    return f"{backup_id(start)}-{word & 0xFFFF:04x}"


def is_run_id(text: str) -> bool:
    """Tell whether the text is a run's id."""
    match = _RUN.fullmatch(text)
    return match is not None and parse_backup_id(match[1]) is not None


def record_key(host: str, job: str, run: str = "") -> str:
    """Return the key of a run's record, or of the job's card."""
    return f"{DIRECTORY}{host}/{job}/{run}.json" if run else f"{DIRECTORY}{host}/{job}/{CARD}"


def parse_record_key(key: str) -> RecordName | None:
    """Say whose record a key names, wherever below the root it lies; None if it is none."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    if match[3] == CARD.removesuffix(".json"):
        return RecordName(match[1], match[2], "")
    return RecordName(match[1], match[2], match[3]) if is_run_id(match[3]) else None


def encode(value: RunRecord | JobCard | Hold) -> bytes:
    """Return a record as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def decode(data: bytes, kind: type[_Value], *, where: str) -> _Value:
    """Read a record.

    Raises:
        FormatError: it is none, or of a newer major version.
    """
    try:
        value = msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{where} is not a record of a job", str(error), "It is left as it is.") from error
    if isinstance(value, RunRecord):
        _check_version(value, where)
    for name in _TIMES:
        if text := getattr(value, name, ""):
            _check_time(text, name, where)
    return value


def _check_version(record: RunRecord, where: str) -> None:
    if record.format != FORMAT or record.version.partition(".")[0] != _MAJOR:
        raise FormatError(
            f"{where} is not a record of a job",
            f"it says format {record.format!r}, version {record.version!r}",
            "Install a newer Backhaul.",
        )


def _check_time(text: str, name: str, where: str) -> None:
    try:
        aware = dt.datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        aware = False
    if not aware:
        raise FormatError(f"{where} is not a record of a job", f"its {name} is {text!r}", "It is left as it is.")
