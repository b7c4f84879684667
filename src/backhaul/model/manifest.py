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

    @property
    def objects(self) -> tuple[SegmentRecord, ...]:
        """The stream's objects, one or several, in their order."""
        whole = self.stored
        return self.segments or (
            SegmentRecord(object=self.object, size=whole.size, crc64nvme=whole.crc64nvme, store=self.store),
        )


class ProducerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What wrote the streams: ``kind`` is ``command``, ``stdin`` or ``file``.

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
