"""The journal of an upload that can be resumed: JSON lines, each true by itself, the last one perhaps torn.

The first line says what is uploaded where, under which claim; then a line for each upload (segment) that was begun,
each part that the store acknowledged, and each frame whose compression was chosen as it went. A line that can't be
read ends the journal: what it said is lost, and sent again.
"""

from __future__ import annotations

import msgspec

from backhaul.formats.part_sizes import PartLayout
from backhaul.model.claim import Claim
from backhaul.model.location import WriteSettings

VERSION = 1
# What is farther on, or higher, nobody has written: 64 TiB, of frames of 4 MiB. (What does not compress has no rungs.)
_MOST_FRAMES = 1 << 24
_MOST_RUNGS = 100


class SourceIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What a file was when the upload began. Any difference means another file; times in ns since the epoch.

    ``changed`` is the inode's change time: unlike ``modified`` nobody sets it back.
    """

    path: str
    device: int
    inode: int
    size: int
    modified: int
    changed: int = 0


class Header(msgspec.Struct, frozen=True, kw_only=True, tag="upload-journal"):
    """The first line. ``series`` is the place in a form that all its spellings share; ``machine`` names the host.

    ``recipients`` are the key ids of an encrypted stream; ``writer`` are the versions of what makes the bytes.
    """

    version: int
    machine: str
    series: str
    write: WriteSettings
    backup: str
    stream: str
    codec: str
    setting: str
    frame_size: int
    layout: PartLayout
    source: SourceIdentity
    claim: Claim
    recipients: tuple[str, ...] = ()
    writer: str = ""


class BegunLine(msgspec.Struct, frozen=True, kw_only=True, tag="begun"):
    """An upload was begun for a segment."""

    segment: int
    key: str
    token: str


class PartLine(msgspec.Struct, frozen=True, kw_only=True, tag="part"):
    """A part was acknowledged; ``crc64nvme`` and ``blake3`` (hex) are of its bytes."""

    segment: int
    number: int
    size: int
    etag: str
    crc64nvme: int
    blake3: str


class ClaimLine(msgspec.Struct, frozen=True, kw_only=True, tag="claim"):
    """A later run took the backup over, under a claim of its own."""

    claim: Claim


class RungLine(msgspec.Struct, frozen=True, kw_only=True, tag="rung"):
    """A frame is to be compressed at that rung of the ladder: written before any byte of it is there to be sent."""

    frame: int
    rung: int


Line = Header | ClaimLine | BegunLine | PartLine | RungLine


class JournalState(msgspec.Struct, kw_only=True):
    """What a journal says: uploads by segment, parts by segment and number, rungs by frame (plus one; 0 is none).

    ``claims`` are all those under which the backup may be held: each run that resumes makes its own. ``length`` is
    how many bytes of the journal are whole.
    """

    header: Header
    length: int
    claims: list[Claim]
    uploads: dict[int, BegunLine]
    parts: dict[tuple[int, int], PartLine]
    rungs: bytearray = msgspec.field(default_factory=bytearray)


def encode_line(line: Line) -> bytes:
    """Return a line with its end."""
    return msgspec.json.encode(line) + b"\n"


def decode(data: bytes) -> JournalState | None:
    """Read a journal as far as it is whole; None if not even its first line is, or another version wrote it."""
    state: JournalState | None = None
    for text in data.splitlines(keepends=True):
        if not text.endswith(b"\n"):
            break
        try:
            line = msgspec.json.decode(text, type=Line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            break
        if isinstance(line, Header):
            if state is not None or line.version != VERSION:
                break
            state = JournalState(header=line, length=0, claims=[line.claim], uploads={}, parts={})
        elif state is None:
            break
        elif isinstance(line, ClaimLine):
            state.claims.append(line.claim)
        elif isinstance(line, RungLine):
            if not (0 <= line.frame < _MOST_FRAMES and 0 <= line.rung < _MOST_RUNGS):
                break
            state.rungs.extend(bytes(max(0, line.frame + 1 - len(state.rungs))))
            state.rungs[line.frame] = line.rung + 1
        elif isinstance(line, BegunLine):
            # A segment that was begun again has none of the former one's parts.
            state.parts = {place: part for place, part in state.parts.items() if place[0] != line.segment}
            state.uploads[line.segment] = line
        else:
            state.parts[line.segment, line.number] = line
        state.length += len(text)
    return state
