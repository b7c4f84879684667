"""Reading a stream of a committed backup: what is shared by pull, deep verify and ``open``."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec

from backhaul.errors import BackupNotFoundError, FormatError, IntegrityError, ObjectNotFoundError
from backhaul.formats import names, seekable
from backhaul.model.manifest import Manifest, SegmentRecord, StreamRecord
from backhaul.planning.read_ranges import ReadRange, framed_ranges, plain_ranges
from backhaul.stores.base import Store
from backhaul.transforms.compress import FrameDecompressor

# A frame must fit memory. Ours have 4 MiB; anything near this bound is no frame of a backup.
MAX_FRAME = 1 << 30
_PARALLEL_LOOKS = 8
_REREADS = 2


class _OpenSegment(msgspec.Struct, frozen=True):
    key: str
    size: int
    etag: str | None


class StoredStream:
    """One stream of a backup in a store, ready to be read in ranges.

    Opening it reads the seek table (for ``codec: zstd``) and checks it against the manifest; every later
    read insists on the same version of the object.

    Raises:
        BackupNotFoundError: the backup has no such stream.
        IntegrityError: the object is missing, shortened, or its seek table contradicts the manifest.
    """

    def __init__(self, store: Store, manifest: Manifest, stream: str | None) -> None:
        self.store = store
        self.record = choose_stream(store, manifest, stream)
        self._backup = manifest.id
        self.where = f"{store.url}/{names.object_key(manifest.id, self.record.object)}"
        records = self.record.objects
        if sum(segment.size for segment in records) != self.record.stored.size:
            raise self.damaged("the manifest's segments do not add up to the stream's stored size")
        with ThreadPoolExecutor(min(_PARALLEL_LOOKS, len(records))) as pool:
            self._segments = list(pool.map(self._open_segment, records))
        self._starts = list(itertools.accumulate((s.size for s in self._segments[:-1]), initial=0))
        self.rereads = 0
        self.table_bytes = b""
        self.table = self._open_table()

    def _open_segment(self, record: SegmentRecord) -> _OpenSegment:
        key = names.object_key(self._backup, record.object)
        found = self.store.stat(key)
        if found is None:
            raise self.damaged("it does not exist", key)
        if found.size != record.size:
            raise self.damaged(f"it has {found.size} bytes and should have {record.size}", key)
        return _OpenSegment(key, record.size, found.etag)

    def ranges(self, max_stored: int, max_raw: int) -> Iterator[ReadRange]:
        """Yield the ranges that make the whole stream, in order."""
        if self.table is None:
            yield from plain_ranges(self.record.raw.size, max_stored)
        else:
            yield from framed_ranges(self.table, max_stored, max_raw)

    def fetch(self, offset: int, out: memoryview) -> None:
        """Fill ``out`` with stored bytes.

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

    def read(self, part: ReadRange, stored: memoryview, out: memoryview, decompressor: FrameDecompressor) -> None:
        """Fetch a range into ``stored`` and decode it into ``out``; from many threads.

        A range that arrives damaged is fetched again: what the network damaged is whole then, what the store
        damaged is not. ``rereads`` counts these.

        Raises:
            IntegrityError: it is damaged where it lies.
            PreconditionError: the object was replaced since this stream was opened.
        """
        for last in (False,) * _REREADS + (True,):
            self.fetch(part.offset, stored)
            try:
                self.decode(part, stored, out, decompressor)
                return
            except IntegrityError:
                if last:
                    raise
                self.rereads += 1

    def decode(self, part: ReadRange, stored: memoryview, out: memoryview, decompressor: FrameDecompressor) -> None:
        """Decode the frames of a range, side by side in ``out``, each against its checksum.

        Raises:
            IntegrityError: a frame is damaged, with the object and the frame named.
        """
        if self.table is None:
            out[: part.raw_length] = stored[: part.length]
            return
        stored_at = raw_at = 0
        for frame in range(part.first_frame, part.first_frame + part.frames):
            stored_size, raw_size = self.table.stored_sizes[frame], self.table.raw_sizes[frame]
            try:
                decompressor.decompress_into(
                    stored[stored_at : stored_at + stored_size], out[raw_at : raw_at + raw_size]
                )
            except IntegrityError as error:
                at = self.table.stored_offsets[frame]
                raise self.damaged(f"frame {frame} at byte {at}: {error.what.lower()}: {error.why}") from error
            stored_at += stored_size
            raw_at += raw_size

    def check_raw(self, size: int, blake3: str) -> None:
        """Compare what was read with what was pushed.

        Raises:
            IntegrityError: it is not the same.
        """
        raw = self.record.raw
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
            if record.stored.size != record.raw.size:
                raise self.damaged("the manifest gives different raw and stored sizes for an uncompressed stream")
            return None
        position = record.seek_table
        if record.codec.name != "zstd" or position is None:
            raise IntegrityError(
                f"{self.where} can't be read",
                f"its codec is {record.codec.name!r}",
                "Install a newer Backhaul, or decode the object with the program of that name.",
            )
        if position.offset + position.size != record.stored.size or position.size != seekable.table_size(record.frames):
            raise self.damaged("the manifest's seek table position does not fit the object")
        content = bytearray(position.size)
        self.fetch(position.offset, memoryview(content))
        self.table_bytes = bytes(content)
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
