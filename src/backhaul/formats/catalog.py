"""The catalog of a mirror: what is known of each name, as a log of small objects that only grows between clean-ups::

    .backhaul/mirror.json                                    the mirror's own page (``model.mirror.MirrorRecord``)
    .backhaul/catalog/0000000012.jsonl.zst                   what one stretch of a run has changed
    .backhaul/catalog/0000000013-base-0001-of-0002.jsonl.zst everything up to there; counts once all pieces are there
    .backhaul/signatures/<BLAKE3 of the content>             the chunks of a file (``formats.signature``)
    .backhaul/copies/<id>/                                   a copy that was begun anew

A segment is JSON lines, an ``Entry`` each, compressed with Zstandard; a later line of the same name counts. Segments
are read in the order of their numbers, from the newest whole base on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import msgspec

from backhaul.errors import FormatError
from backhaul.model.mirror import Entry, MirrorRecord

DIRECTORY = ".backhaul/"
RECORD = DIRECTORY + "mirror.json"
CATALOG = DIRECTORY + "catalog/"
SIGNATURES = DIRECTORY + "signatures/"
COPIES = DIRECTORY + "copies/"
RECORD_SCHEMA = "backhaul.mirror/1"

_SEGMENT = re.compile(r"(\d{10})(?:-base-(\d{4})-of-(\d{4}))?\.jsonl\.zst", re.ASCII)
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Entry)


class SegmentName(msgspec.Struct, frozen=True, order=True):
    """A segment's place: its number, and for a piece of a base, which of how many."""

    number: int
    piece: int = 0
    pieces: int = 0


def segment_key(name: SegmentName) -> str:
    """Return the key of a segment."""
    base = f"-base-{name.piece:04d}-of-{name.pieces:04d}" if name.pieces else ""
    return f"{CATALOG}{name.number:010d}{base}.jsonl.zst"


def parse_segment(key: str) -> SegmentName | None:
    """Return what a key says of a segment, or None if it is none."""
    if not key.startswith(CATALOG):
        return None
    match = _SEGMENT.fullmatch(key[len(CATALOG) :])
    if match is None:
        return None
    return SegmentName(int(match[1]), int(match[2] or 0), int(match[3] or 0))


def that_count(names: Iterable[SegmentName]) -> tuple[list[SegmentName], list[SegmentName]]:
    """Return the segments that count, in the order in which they are read, and those that do not any more."""
    names = sorted(set(names))
    pieces: dict[tuple[int, int], int] = {}
    for name in names:
        if name.pieces:
            pieces[name.number, name.pieces] = pieces.get((name.number, name.pieces), 0) + 1
    whole = max((number for (number, count), found in pieces.items() if found == count), default=-1)
    count = [
        name for name in names if (name.number > whole and not name.pieces) or (name.number == whole and name.pieces)
    ]
    # A base beyond the newest whole one is still being written, or never will be.
    rest = [name for name in names if name.number < whole or (name.number == whole and not name.pieces)]
    return count, rest


def encode_entries(entries: Iterable[Entry]) -> bytes:
    """Return the lines of a segment."""
    return b"".join(_encoder.encode(entry) + b"\n" for entry in entries)


def decode_entries(data: bytes) -> Iterator[Entry]:
    """Yield the entries of a segment.

    Raises:
        FormatError: a line can't be read.
    """
    try:
        for line in data.splitlines():
            yield _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FormatError("The mirror's catalog can't be read", str(error), "Start over: --anew.") from error


def encode_record(record: MirrorRecord) -> bytes:
    """Return the mirror's own page, for people too."""
    document = {"schema": RECORD_SCHEMA, **msgspec.to_builtins(record)}
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def decode_record(data: bytes) -> MirrorRecord:
    """Read the mirror's own page.

    Raises:
        FormatError: it is none, or of a version that is not known.
    """
    try:
        document = msgspec.json.decode(data)
        schema = document.get("schema") if isinstance(document, dict) else None
        if schema == RECORD_SCHEMA:
            return msgspec.convert(document, MirrorRecord)
        why = f"its schema is {schema!r}, and {RECORD_SCHEMA!r} is known"
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        why = str(error)
    raise FormatError(
        f"{RECORD} can't be read", why, "Use the version of Backhaul that wrote it, or bring the page back."
    )
