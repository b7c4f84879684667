"""``backhaul.open``: a stream of a backup as a seekable, read-only file that fetches only what is read."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Sequence

from backhaul.formats.age_keys import Identity
from backhaul.operations import series
from backhaul.operations.encryption import unlock
from backhaul.operations.places import reference_at
from backhaul.operations.reading import StoredStream, choose_stream
from backhaul.planning.read_ranges import ReadRange
from backhaul.stores.open import open_store

# Decoded frames that are kept, so that small reads near each other fetch once: 8 x 4 MiB.
CACHED_FRAMES = 8
# An uncompressed stream has no frames; it is read in blocks of this many bytes.
_PLAIN_BLOCK = 1 << 20


class BackupFile(io.RawIOBase):
    """A stream of a committed backup as a file. Thread-safe, one read at a time.

    Every frame read is checked against its checksum; the hash of the whole stream is not (``verify
    --deep`` does that), and an uncompressed stream has no checksums for its parts at all.
    """

    def __init__(self, reference: str, stream: str | None = None, identities: Sequence[Identity] = ()) -> None:
        super().__init__()
        location, when = reference_at(reference)
        self._store = open_store(location)
        try:
            self.id = series.find_backup(self._store, when)
            committed = series.read_backup(self._store, self.id)
            record = choose_stream(self._store, committed.manifest, stream)
            key = unlock(self._store, committed, record, identities)
            self._stream = StoredStream(self._store, committed.manifest, record, key)
        except BaseException:
            self._store.close()
            raise
        self.name = f"{location.text}@{self.id}"
        self.size = self._stream.record.raw.size
        self._decoder = self._stream.decoder()
        self._cache: OrderedDict[int, memoryview] = OrderedDict()
        self._lock = threading.Lock()
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in the raw stream."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move; nothing is fetched.

        Raises:
            ValueError: before the beginning, or an unknown ``whence``.
        """
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}.get(whence)
        if base is None or base + offset < 0:
            raise ValueError(f"can't seek to {offset} from {whence}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override]
        """Read up to the end of the current frame into the buffer; 0 at the end of the stream.

        Raises:
            IntegrityError: the frame is damaged.
            StoreError: it could not be fetched.
        """
        out = memoryview(buffer).cast("B")
        with self._lock:
            if self._position >= self.size or not out:
                return 0
            start, content = self._content_at(self._position)
            piece = content[self._position - start : self._position - start + len(out)]
            out[: len(piece)] = piece
            self._position += len(piece)
            return len(piece)

    def close(self) -> None:
        """Let go of the store and the cache."""
        if not self.closed:
            self._cache.clear()
            self._store.close()
        super().close()

    def _content_at(self, position: int) -> tuple[int, memoryview]:
        """Return the decoded block that holds a position, and the position of its first byte."""
        table = self._stream.table
        if table is None:
            index = position // _PLAIN_BLOCK
            start = index * _PLAIN_BLOCK
            length = min(_PLAIN_BLOCK, self.size - start)
            part = ReadRange(start, length, start, length)
        else:
            index = table.frame_at(position)
            part = ReadRange(
                table.stored_offsets[index],
                table.stored_sizes[index],
                table.raw_offsets[index],
                table.raw_sizes[index],
                first_frame=index,
                frames=1,
            )
        if index in self._cache:
            self._cache.move_to_end(index)
            return part.raw_offset, self._cache[index]
        stored = memoryview(bytearray(self._stream.span(part.offset, part.length)[1]))
        content = memoryview(bytearray(part.raw_length))
        self._stream.read(part, stored, content, self._decoder)
        self._cache[index] = content
        while len(self._cache) > CACHED_FRAMES:
            self._cache.popitem(last=False)
        return part.raw_offset, content


def open_stream(reference: str, stream: str | None = None, identities: Sequence[Identity] = ()) -> io.BufferedReader:
    """Open a stream of a committed backup for reading.

    Args:
        reference: ``SERIES[@WHEN]``.
        stream: its name; None for the only one.
        identities: for an encrypted one: whose secrets open it (``backhaul.read_identities``).

    Returns:
        A seekable, buffered, read-only binary file over the raw bytes.

    Raises:
        BackupNotFoundError: no such backup or stream.
        IdentityError: it is encrypted, and no identity fits.
        IntegrityError: its object or manifest is damaged.
        StoreError: the store could not be read.
    """
    return io.BufferedReader(BackupFile(reference, stream, identities), buffer_size=128 << 10)
