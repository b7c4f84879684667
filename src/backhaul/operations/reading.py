"""Reading a stream of a committed backup: what is shared by pull, deep verify and ``open``."""

from __future__ import annotations

from collections.abc import Iterator

from backhaul.errors import BackupNotFoundError, FormatError, IntegrityError, ObjectNotFoundError
from backhaul.formats import names, seekable
from backhaul.model.manifest import Manifest, StreamRecord
from backhaul.planning.read_ranges import ReadRange, framed_ranges, plain_ranges
from backhaul.stores.base import Store
from backhaul.transforms.compress import FrameDecompressor

# A frame must fit memory. Ours have 4 MiB; anything near this bound is no frame of a backup.
MAX_FRAME = 1 << 30


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
        self.key = names.object_key(manifest.id, self.record.object)
        self.where = f"{store.url}/{self.key}"
        found = store.stat(self.key)
        if found is None:
            raise self.damaged("it does not exist")
        if found.size != self.record.stored.size:
            raise self.damaged(f"it has {found.size} bytes and should have {self.record.stored.size}")
        self.etag = found.etag
        self.table = self._read_table()

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
        try:
            self.store.read_into(self.key, offset, out, etag=self.etag)
        except ObjectNotFoundError as error:
            raise self.damaged(error.why or "it does not exist") from error

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

    def damaged(self, why: str) -> IntegrityError:
        """Return the error that names the object and what to do."""
        return IntegrityError(
            f"{self.where} is not what was pushed",
            why,
            "Pull another backup, or this one from another of its destinations; see: backhaul verify --deep",
        )

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
