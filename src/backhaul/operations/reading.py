"""Reading a stream of a committed backup: what is shared by pull, deep verify and ``open``.

Three coordinates: the *raw* stream; the *content*, frames and seek table, which for an encrypted stream is inside the
encryption; and the *object*, what lies in the store. Ranges (``planning.read_ranges``) are of raw and content; where a
stream is not encrypted its content is its object.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec

from backhaul.errors import BackupNotFoundError, FormatError, IntegrityError, ObjectNotFoundError
from backhaul.formats import names, seekable
from backhaul.formats.age import CHUNK_SIZE, Payload
from backhaul.model.manifest import Manifest, SegmentRecord, StreamRecord
from backhaul.planning.read_ranges import ReadRange, framed_pieces, framed_ranges, plain_ranges
from backhaul.stores.base import Store
from backhaul.transforms.compress import FrameDecompressor
from backhaul.transforms.encrypt import StreamKey

# A frame must fit memory. Ours have 4 MiB; anything near this bound is no frame of a backup.
MAX_FRAME = 1 << 30
_PARALLEL_LOOKS = 8
_REREADS = 2


class _OpenSegment(msgspec.Struct, frozen=True):
    key: str
    size: int
    etag: str | None


class RangeDecoder:
    """What one thread needs to decode ranges: a decompressor, a cipher, and memory that is used again."""

    def __init__(self, key: StreamKey | None) -> None:
        self.decompressor = FrameDecompressor()
        self.cipher = key.cipher() if key is not None else None
        self._opened = memoryview(b"")

    def opened(self, size: int) -> memoryview:
        """Return memory for that many opened bytes; its content is that of the last use."""
        if len(self._opened) < size:
            self._opened = memoryview(b"")  # (not both at once)
            self._opened = memoryview(bytearray(size))
        return self._opened[:size]


class StoredStream:
    """One stream of a backup in a store, ready to be read in ranges.

    Opening it reads the seek table (for ``codec: zstd``) and checks it against the manifest; every later
    read insists on the same version of the object.

    Args:
        store: where it lies.
        manifest: the backup's.
        record: the stream's record in it (``choose_stream``).
        key: the stream's key if it is encrypted, from ``encryption.unlock``, which has checked the manifest.

    Raises:
        IntegrityError: the object is missing, shortened, or its seek table contradicts the manifest.
    """

    def __init__(self, store: Store, manifest: Manifest, record: StreamRecord, key: StreamKey | None) -> None:
        self.store = store
        self.record = record
        self._key = key
        self._payload: Payload | None = None
        self._backup = manifest.id
        self.where = f"{store.url}/{names.object_key(manifest.id, self.record.object)}"
        records = self.record.objects
        if sum(segment.size for segment in records) != self.record.stored.size:
            raise self.damaged("the manifest's segments do not add up to the stream's stored size")
        with ThreadPoolExecutor(min(_PARALLEL_LOOKS, len(records))) as pool:
            self._segments = list(pool.map(self._open_segment, records))
        self._starts = list(itertools.accumulate((s.size for s in self._segments[:-1]), initial=0))
        self._content_size = self.record.stored.size
        if record.encryption is not None:
            assert key is not None
            self._payload = Payload(record.encryption.header_size, record.encryption.payload_size)
            self._content_size = self._payload.size
            if self._payload.end != record.stored.size:
                raise self.damaged("the manifest's payload size does not fit the stored size")
        self.rereads = 0
        # What of the object is not part of any range: its first bytes, and its last ones with their offset.
        self.head = key.header if key is not None else b""
        self.tail = (self.record.stored.size, b"")
        self.table = self._open_table()

    def _open_segment(self, record: SegmentRecord) -> _OpenSegment:
        key = names.object_key(self._backup, record.object)
        found = self.store.stat(key)
        if found is None:
            raise self.damaged("it does not exist", key)
        if found.size != record.size:
            raise self.damaged(f"it has {found.size} bytes and should have {record.size}", key)
        return _OpenSegment(key, record.size, found.etag)

    def ranges(self, max_stored: int) -> Iterator[ReadRange]:
        """Yield what is fetched at once, in order; together it is the whole stream."""
        if self.table is None:
            # (The limit, and an eighth of it, is a whole number of chunks: a sealed one is fetched once.)
            yield from plain_ranges(self.record.raw.size, max_stored)
        else:
            yield from framed_ranges(self.table, max_stored)

    def pieces(self, part: ReadRange, max_raw: int) -> Iterator[ReadRange]:
        """Yield what of a range is decoded at once, in order."""
        if self.table is None:
            yield part
        else:
            yield from framed_pieces(self.table, part, max_raw)

    @property
    def encrypted(self) -> bool:
        """Whether the content is inside an encryption."""
        return self._payload is not None

    def decoder(self) -> RangeDecoder:
        """Return what a thread needs to read ranges."""
        return RangeDecoder(self._key)

    def span(self, offset: int, length: int) -> tuple[int, int]:
        """Return the offset and length in the object of what has to be fetched for a piece of the content."""
        if self._payload is None:
            return offset, length
        chunks = self._payload.covering(offset, length)
        return chunks.offset, chunks.length

    def fetch(self, offset: int, out: memoryview) -> None:
        """Fill ``out`` with bytes of the object, or objects.

        Raises:
            IntegrityError: the object is not there, or ends too soon.
            PreconditionError: it was replaced since this stream was opened.
        """
        index = bisect.bisect_right(self._starts, offset) - 1
        while out:
            segment = self._segments[index]
            at = offset - self._starts[index]
            count = min(len(out), segment.size - at)
            if count <= 0:
                raise self.damaged(f"it ends before byte {offset}")
            try:
                self.store.read_into(segment.key, at, out[:count], etag=segment.etag)
            except ObjectNotFoundError as error:
                raise self.damaged(error.why or "it does not exist", segment.key) from error
            offset, out, index = offset + count, out[count:], index + 1
            if out and index == len(self._segments):
                raise self.damaged(f"it ends before byte {offset}")

    def read(self, part: ReadRange, stored: memoryview, out: memoryview, decoder: RangeDecoder) -> None:
        """Fetch a range's span into ``stored`` and decode it into ``out``, as ``decode`` does."""
        self.fetch(self.span(part.offset, part.length)[0], stored)
        self.decode(part, stored, out, decoder)

    def decode(self, part: ReadRange, stored: memoryview, out: memoryview, decoder: RangeDecoder) -> None:
        """Decode a range into ``out`` from its span in ``stored``; from many threads, each with its decoder.

        A range that arrived damaged is fetched again: what the network damaged is whole then, what the store damaged
        is not. ``rereads`` counts these. ``stored`` has the right bytes afterwards, and is given no others: the spans
        of neighbours in an encrypted stream share a chunk, which may be opened at this moment, and must not change
        between being authenticated and being deciphered.

        Raises:
            IntegrityError: it is damaged where it lies.
            PreconditionError: the object was replaced since this stream was opened.
            StoreError: it could not be fetched again.
        """
        try:
            self._decode(part, stored, out, decoder)
            return
        except IntegrityError:
            again = memoryview(bytearray(len(stored)))
        for attempt in range(1, _REREADS + 1):
            self.rereads += 1
            self.fetch(self.span(part.offset, part.length)[0], again)
            try:
                self._decode(part, again, out, decoder)
            except IntegrityError:
                if attempt == _REREADS:
                    raise
            else:
                stored[:] = again
                return

    def _decode(self, part: ReadRange, stored: memoryview, out: memoryview, decoder: RangeDecoder) -> None:
        """Decode the frames of a range, side by side in ``out``, each against its checksum.

        Raises:
            IntegrityError: a frame or chunk is damaged, with the object and its place named.
        """
        stored = self._opened(part.offset, part.length, stored, decoder)
        if self.table is None:
            out[: part.raw_length] = stored
            return
        stored_at = raw_at = 0
        for frame in range(part.first_frame, part.first_frame + part.frames):
            stored_size, raw_size = self.table.stored_sizes[frame], self.table.raw_sizes[frame]
            try:
                decoder.decompressor.decompress_into(
                    stored[stored_at : stored_at + stored_size], out[raw_at : raw_at + raw_size]
                )
            except IntegrityError as error:
                at = self.table.stored_offsets[frame]
                raise self.damaged(f"frame {frame} at byte {at}: {error.what.lower()}: {error.why}") from error
            stored_at += stored_size
            raw_at += raw_size

    def _opened(self, offset: int, length: int, stored: memoryview, decoder: RangeDecoder) -> memoryview:
        """Return a piece of the content from the span of the object that was fetched for it.

        Raises:
            IntegrityError: a chunk is not authentic.
        """
        if self._payload is None:
            return stored[:length]
        assert decoder.cipher is not None
        chunks = self._payload.covering(offset, length)
        opened = decoder.opened(len(stored))
        try:
            decoder.cipher.open_into(self._payload, chunks.first, stored[: chunks.length], opened)
        except IntegrityError as error:
            raise self.damaged(f"{error.what.lower()}: {error.why}") from error
        skipped = offset - chunks.first * CHUNK_SIZE
        return opened[skipped : skipped + length]

    def check_raw(self, size: int, blake3: str) -> None:
        """Compare what was read with what was pushed.

        Raises:
            IntegrityError: it is not the same.
        """
        raw = self.record.raw
        if self._key is not None:
            blake3 = self._key.conceal(blake3)
        if (size, blake3) != (raw.size, raw.blake3):
            raise self.damaged(
                f"it decodes to {size} bytes with BLAKE3 {blake3}, and {raw.size} with {raw.blake3} were pushed"
            )

    def damaged(self, why: str, key: str | None = None) -> IntegrityError:
        """Return the error that names the object (the whole stream, or one of its segments) and what to do."""
        return IntegrityError(
            f"{self.where if key is None else f'{self.store.url}/{key}'} is not what was pushed",
            why,
            "Pull another backup, or this one from another of its destinations; see: backhaul verify --deep",
        )

    def _open_table(self) -> seekable.SeekTable | None:
        """Read the seek table; again, like any range, if it arrives damaged."""
        for _ in range(_REREADS):
            try:
                return self._read_table()
            except IntegrityError:
                self.rereads += 1
        return self._read_table()

    def _read_table(self) -> seekable.SeekTable | None:
        record = self.record
        if record.codec.name == "none":
            if self._content_size != record.raw.size:
                raise self.damaged("the manifest gives different raw and stored sizes for an uncompressed stream")
            if self._content_size == 0:
                self._read_tail(0, 0)  # no range will: even of nothing the last chunk says that it is all
            return None
        position = record.seek_table
        if record.codec.name != "zstd" or position is None:
            raise IntegrityError(
                f"{self.where} can't be read",
                f"its codec is {record.codec.name!r}",
                "Install a newer Backhaul, or decode the object with the program of that name.",
            )
        if position.offset + position.size != self._content_size or position.size != seekable.table_size(record.frames):
            raise self.damaged("the manifest's seek table position does not fit the object")
        content = self._read_tail(position.offset, position.size)
        try:
            table = seekable.decode(content)
        except FormatError as error:
            raise self.damaged(f"{error.what.lower()}: {error.why}") from error
        if (len(table), table.stored_size, table.raw_size) != (
            record.frames,
            position.offset,
            record.raw.size,
        ):
            raise self.damaged("its seek table does not add up to the sizes in the manifest")
        if max(*table.raw_sizes, 0) > MAX_FRAME or max(*table.stored_sizes, 0) > MAX_FRAME:
            raise self.damaged("its seek table names a frame of more than a gigabyte")
        return table

    def _read_tail(self, offset: int, length: int) -> bytes:
        """Read the end of the content; ``tail`` is what of the object was fetched for it."""
        start, size = self.span(offset, length)
        stored = bytearray(size)
        self.fetch(start, memoryview(stored))
        self.tail = (start, bytes(stored))
        return bytes(self._opened(offset, length, memoryview(stored), self.decoder()))


def choose_stream(store: Store, manifest: Manifest, name: str | None) -> StreamRecord:
    """Return the stream of that name, or the only one.

    Raises:
        BackupNotFoundError: there is none of that name, or several and no name was given.
    """
    available = ", ".join(stream.name for stream in manifest.streams)
    if name is None:
        if len(manifest.streams) == 1:
            return manifest.streams[0]
        raise BackupNotFoundError(
            f"Backup {manifest.id} in {store.url} has several streams",
            available,
            "Choose one with --stream NAME.",
        )
    record = manifest.stream(name)
    if record is None:
        raise BackupNotFoundError(
            f"Backup {manifest.id} in {store.url} has no stream {name!r}",
            f"it has {available}",
            "Choose one of these.",
        )
    return record
