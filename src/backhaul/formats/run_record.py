"""The records of jobs as JSON, and their names: on this host, and beside the backups::

    .backhaul/jobs/<host>/<job>/card.json          what others must know of the job to judge it
    .backhaul/jobs/<host>/<job>/<run>.json         one run

A run's id is its start in UTC and four hex digits: ``20261121T210007Z-3f9a``.
"""

from __future__ import annotations

import datetime as dt
import re
from typing import Any, TypeVar
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from backhaul.errors import FormatError
from backhaul.formats.names import backup_id, parse_backup_id
from backhaul.model.job import RUN_STATES, Hold, JobCard, RunRecord

FORMAT = "backhaul-run"
VERSION = "1.0"
_MAJOR = "1"
DIRECTORY = ".backhaul/jobs/"
CARD = "card.json"
MAX_SIZE = 1 << 20
_RUN = re.compile(r"(\d{8}T\d{6}Z)-[0-9a-f]{4}", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*", re.ASCII)
_KEY = re.compile(r"(?:.*/)?\.backhaul/jobs/([^/]+)/([^/]+)/([^/]+)\.json", re.ASCII)
_Value = TypeVar("_Value", RunRecord, JobCard, Hold)


# Made once: several threads that decode the first one of a kind at the same time crash msgspec 0.22.
_DECODERS: dict[Any, msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(kind) for kind in (RunRecord, JobCard, Hold)
}


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


def is_name(text: str) -> bool:
    """Tell whether the text can be a job's name: nothing that leads out of a directory."""
    return _NAME.fullmatch(text) is not None


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
    """Read a record; nothing in it can lead anywhere else than where it lies.

    Raises:
        FormatError: it is none, or of a newer major version.
    """
    try:
        value: _Value = _DECODERS[kind].decode(data)
        if isinstance(value, RunRecord):
            problem = _problem_of_run(value)
        elif isinstance(value, JobCard):
            problem = _problem_of_card(value)
        else:
            problem = _problem_of_times(value, ("since", "until"), ())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{where} is not a record of a job", str(error), "It is left as it is.") from error
    if problem:
        raise FormatError(f"{where} is not a record of a job", problem, "It is left as it is.")
    return value


def _problem_of_run(record: RunRecord) -> str:
    if record.format != FORMAT or record.version.partition(".")[0] != _MAJOR:
        return f"it says format {record.format!r}, version {record.version!r}"
    if not is_run_id(record.id) or not is_name(record.job):
        return f"its id is {record.id!r}, its job {record.job!r}"
    if record.state not in RUN_STATES:
        return f"its state is {record.state!r}"
    return _problem_of_times(record, ("started",), ("finished", "closes", "forecast", "proved_at", "seen"))


def _problem_of_card(card: JobCard) -> str:
    if not is_name(card.name):
        return f"its name is {card.name!r}"
    window = card.window
    if window is not None:
        try:
            ZoneInfo(window.timezone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            return f"its time zone is {window.timezone!r}"
        if not window.starts or not all(0 <= start < 1440 for start in window.starts) or not window.length >= 60:
            return "its window can never open"
        if not window.days or not all(0 <= day < 7 for day in window.days):
            return "its window opens on no day"
    return _problem_of_times(card, (), ("known_since",))


def _problem_of_times(value: Any, needed: tuple[str, ...], optional: tuple[str, ...]) -> str:
    for name in (*needed, *optional):
        text = getattr(value, name)
        if not text and name in optional:
            continue
        try:
            aware = dt.datetime.fromisoformat(text).tzinfo is not None
        except ValueError:
            aware = False
        if not aware:
            return f"its {name} is {text!r}"
    return ""
