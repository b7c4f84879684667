"""The commit record of a backup, as values. ``formats.manifest`` turns them into bytes and back.

Times are UTC in ISO 8601 with ``Z``; sizes are bytes; hashes are lower-case hex (BLAKE3) or base64
(CRC64NVME, as S3 writes it).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0)]


class RawBytes(msgspec.Struct, frozen=True, kw_only=True):
    """The stream as the producer wrote it.

    Of an encrypted stream ``blake3`` is concealed: HMAC-SHA-256 of the digest under the stream's file key.
    """

    size: Count
    blake3: str


class StoredBytes(msgspec.Struct, frozen=True, kw_only=True):
    """The object as it lies in a store: frames and seek table together."""

    size: Count
    blake3: str
    crc64nvme: str


class Codec(msgspec.Struct, frozen=True, kw_only=True):
    """How raw bytes became stored bytes.

    ``name`` is ``zstd`` (independent frames and a seek table) or ``none`` (stored as it is);
    ``frame_size`` is the raw size of each frame but the last; ``setting`` is what ``--compress`` said.
    """

    name: str
    frame_size: Count
    setting: str


class SeekTablePosition(msgspec.Struct, frozen=True, kw_only=True):
    """Where the skippable frame that holds the seek table begins in the stored stream, and its length.

    For an encrypted stream that is inside the encryption: in what ``age -d`` gives.
    """

    offset: Count
    size: Count


class EncryptionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How a stream is encrypted.

    ``format`` is ``age-encryption.org/v1``; ``header_size`` are the bytes before the first chunk (header and nonce),
    ``payload_size`` those inside; ``recipients`` are key ids, in the order of the header's stanzas; ``mac`` is of the
    whole manifest, under the stream's file key, in hex.
    """

    format: str
    header_size: Count
    payload_size: Count
    recipients: tuple[str, ...]
    mac: str


class StoreRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What this one store said of the object when it was complete; ``verify`` compares it later.

    ``etag`` as the store gave it; ``checksum`` as ``CRC64NVME:<base64>`` where the store keeps one;
    ``modified`` in nanoseconds since the epoch, for local files only.
    """

    etag: str | None = None
    checksum: str | None = None
    modified: int | None = None


class SegmentRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One of several objects that make a stream, in their order. ``crc64nvme`` is of this object alone."""

    object: str
    size: Count
    crc64nvme: str
    store: StoreRecord


class StreamPart(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What of a database a stream is: ``section`` is one of ``SECTIONS``.

    ``database`` is empty for what belongs to the whole server; ``others`` says that the stream holds, of its
    database, all that no stream names, besides what it names itself (``TableRecord.stream``).
    """

    section: str
    database: str = ""
    others: bool = False


# The order of a restore: accounts; definitions; rows; what is made once the rows are there. ``whole`` is all of it.
GLOBALS, SCHEMA, DATA, AFTER, WHOLE = "globals", "schema", "data", "after", "whole"
SECTIONS = (GLOBALS, SCHEMA, DATA, AFTER, WHOLE)


class TableRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A table of a database, or a file of a set.

    Attributes:
        name: as its server writes it, quoted where it has to be; with its schema where there are such.
        rows: counted in the state that was backed up; None where they were not counted.
        size: bytes that it took at the source.
        stream: which stream has its rows; empty where there is one alone, or for all that no stream names.
        kind: ``table``; ``partitioned`` for one whose rows are in its partitions; ``view`` of a materialised view;
            ``sequence``; ``file``.
        apart: it was not read in the state of the others: its engine knows no transactions.
    """

    name: str
    rows: int | None = None
    size: Count = 0
    stream: str = ""
    kind: str = "table"
    apart: bool = False


class DatabaseRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A database as it was backed up.

    Attributes:
        name: its name.
        size: bytes at the source.
        tables: what it holds.
        properties: what its server needs to make it again: encoding, collation, owner and the like.
        settings: statements of its own, with ``{database}`` for its quoted name.
        needs: roles, extensions, plugins and the like that a server must have; names by kind.
        coordinates: where in the server's log its state is, where each database has a state of its own.
    """

    name: str
    size: Count = 0
    tables: tuple[TableRecord, ...] = ()
    properties: Mapping[str, str] = {}
    settings: tuple[str, ...] = ()
    needs: Mapping[str, tuple[str, ...]] = {}
    coordinates: Mapping[str, str] = {}


class SourceRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was backed up, where it was not just a stream of bytes.

    Attributes:
        kind: ``postgresql``, ``mariadb``, either with ``+physical``, ``sqlite``, ``redis`` or ``dir``.
        server: the server's version as it names itself.
        address: where it was, without secrets.
        tools: the programs that made the streams, with their versions.
        size: bytes at the source.
        seconds: from the fixing of the state to the end of the last stream.
        state_of: when the state was fixed (ISO, UTC).
        coordinates: where in the server's log the state is: LSNs, binlog file and position, GTID, replication id.
        databases: what it holds.
        cluster: whether it is the whole server.
        settings: of the server, that another one needs to run the same data.
        remarks: what whoever restores it should know.
    """

    kind: str
    server: str
    address: str
    state_of: str
    tools: Mapping[str, str] = {}
    size: Count = 0
    seconds: float = 0.0
    coordinates: Mapping[str, str] = {}
    databases: tuple[DatabaseRecord, ...] = ()
    cluster: bool = False
    settings: Mapping[str, str] = {}
    remarks: tuple[str, ...] = ()


class StreamRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One stream of a backup.

    ``segments`` is empty where ``object`` is the whole stream. Else the stream is what they give one after the
    other, there is no object of the name ``object``, and ``store`` says nothing.
    """

    name: str
    object: str
    raw: RawBytes
    stored: StoredBytes
    codec: Codec
    frames: Count
    producer: Count
    store: StoreRecord
    seek_table: SeekTablePosition | None = None
    segments: tuple[SegmentRecord, ...] = ()
    encryption: EncryptionRecord | None = None
    part: StreamPart | None = None

    @property
    def objects(self) -> tuple[SegmentRecord, ...]:
        """The stream's objects, one or several, in their order."""
        whole = self.stored
        return self.segments or (
            SegmentRecord(object=self.object, size=whole.size, crc64nvme=whole.crc64nvme, store=self.store),
        )


class ProducerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What wrote a stream: ``kind`` is ``command``, ``stdin``, ``file``, or ``protocol`` (a server, spoken to).

    ``command`` has its secrets masked; ``path`` is the file's.
    """

    kind: str
    seconds: float
    command: tuple[str, ...] = ()
    exit_status: int | None = None
    markers: tuple[str, ...] = ()
    path: str | None = None


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """The program that wrote the manifest."""

    name: str
    version: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A backup: it exists when this was written, and not before.

    ``extra`` holds what a newer minor version wrote and this one does not know, at its path in the
    document, so that reading and writing again loses nothing.
    """

    format: str
    version: str
    id: str
    started: str
    finished: str
    host: str
    tool: Tool
    streams: tuple[StreamRecord, ...]
    producers: tuple[ProducerRecord, ...]
    source: SourceRecord | None = None
    extra: Mapping[str, Any] = {}

    def stream(self, name: str) -> StreamRecord | None:
        """Return the stream of that name, or None."""
        return next((stream for stream in self.streams if stream.name == name), None)

    @property
    def raw_size(self) -> int:
        """Bytes of all streams as their producers wrote them."""
        return sum(stream.raw.size for stream in self.streams)

    @property
    def stored_size(self) -> int:
        """Bytes of all streams' objects."""
        return sum(stream.stored.size for stream in self.streams)
