"""One stream of pieces into one store: gathered into parts, sent side by side, made visible only on request.

Memory (``memory_bound``): for stores whose parts are gathered, a buffer that fills and those that are under
way: ``parallel`` of them, or as many as fit ``MAX_UNDER_WAY`` once parts have grown with the stream
(``formats.part_sizes``), and at least one; each of the part's target plus one piece. For the others
``parallel + 1`` pieces.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from backhaul.errors import IntegrityError, StoreError
from backhaul.formats import part_sizes
from backhaul.model.objects import StoredObject, Upload, UploadedPart
from backhaul.pipeline.pool import WorkerPool
from backhaul.pipeline.supervisor import Supervisor
from backhaul.stores.base import PartRules, Store
from backhaul.transforms.digest import combine_crc64nvme, crc64nvme

# Bytes of parts under way to one destination. Small parts need company to fill a link; large ones do not.
MAX_UNDER_WAY = 128 << 20


def memory_bound(rules: PartRules, largest_piece: int, stored_size: int = 0) -> int:
    """Return the most bytes a writer holds, for a stream of that stored size."""
    if not rules.buffered:
        return (rules.parallel + 1) * largest_piece
    part = part_sizes.largest_target(stored_size) + largest_piece
    under_way = max(1, min(rules.parallel, MAX_UNDER_WAY // part))
    return (under_way + 1) * part


class MultipartWriter:
    """Writes one object. ``write`` and ``finish`` come from one thread; parts leave in others.

    Nothing is visible before ``commit``, and nothing is asked of the store before the first part is full:
    a small stream is a single request.

    Args:
        store: where to.
        key: the object's name.
        group: whose threads the part senders are.
        largest_piece: most bytes that one ``write`` brings.
        on_sent: told the bytes of each acknowledged part.
    """

    def __init__(
        self, store: Store, key: str, group: Supervisor, *, largest_piece: int, on_sent: Callable[[int], None]
    ) -> None:
        self._store = store
        self._key = key
        self._largest_piece = largest_piece
        self._on_sent = on_sent
        self._group = group
        name = f"send-{key.rpartition('/')[2]}"
        self._pool = WorkerPool(group, store.parts.parallel, name, MAX_UNDER_WAY)
        self._lock = threading.Lock()
        self._spare: list[bytearray] = []
        self._buffer: bytearray | None = None
        self._filled = 0
        self._number = 1
        self._offset = 0
        self._parts: dict[int, UploadedPart] = {}
        self._folded: UploadedPart | None = None
        self._upload: Upload | None = None
        self._single: memoryview | bytes | None = None

    def write(self, piece: bytes) -> None:
        """Take the next piece of the stream; waits while too many parts are under way.

        Raises:
            StoreError: a part could not be stored; nothing of the object will ever be visible.
        """
        if not self._store.parts.buffered:
            self._send(piece, len(piece), None)
            return
        if self._buffer is None:
            self._buffer = self._take_buffer()
        self._buffer[self._filled : self._filled + len(piece)] = piece
        self._filled += len(piece)
        if self._filled >= part_sizes.target_size(self._number):
            self._flush()

    def finish(self) -> None:
        """Send what is left and wait until the store has acknowledged every byte.

        Raises:
            StoreError: a part could not be stored.
        """
        if self._store.parts.buffered and self._upload is None:
            # All of it fits one request, which makes it visible: that has to wait for ``commit``.
            self._single = memoryview(self._buffer)[: self._filled] if self._buffer is not None else b""
            return
        if self._filled:
            self._flush()
        self._pool.drain()

    def commit(self, checksum: int) -> StoredObject:
        """Make the object visible; ``checksum`` is the CRC64NVME that the stream must have.

        Raises:
            IntegrityError: what was sent is not what the checksum is of.
            PreconditionError: the key is taken.
        """
        if self._single is not None:
            self._compare(crc64nvme(self._single), checksum)
            stored = self._store.put(self._key, self._single, checksum)
            self._on_sent(len(self._single))
            return stored
        if self._upload is None:  # an empty object in a store whose parts are not gathered
            return self._store.put(self._key, b"", checksum)
        if self._folded is not None:
            parts = [self._folded]
        else:
            parts = [self._parts[number] for number in range(1, self._number)]
        combined = 0
        for part in parts:
            combined = combine_crc64nvme(combined, part.crc64nvme, part.size)
        self._compare(combined, checksum)
        stored = self._store.complete(self._upload, parts, checksum)
        self._upload = None
        return stored

    def abort(self, patience: float = 3.0) -> None:
        """Forget the object: parts under way get a moment to end, and then the store is told.

        Raises:
            StoreError: the store could not be told; ``clean`` will find the upload.
        """
        self._pool.close()
        idle = self._pool.wait_idle(patience)
        upload = self._upload  # a commit in another thread may be at its end
        if upload is None:
            return
        self._store.abort(upload)
        if not idle and self._pool.wait_idle(patience):
            # A part that was under way may have arrived after the abort, and would keep its bytes.
            self._store.abort(upload)
        self._upload = None

    def close(self) -> None:
        """Let the sending threads end."""
        self._pool.close()

    # -- inside ----------------------------------------------------------------------------------------

    def _flush(self) -> None:
        buffer, size = self._buffer, self._filled
        assert buffer is not None
        self._buffer, self._filled = None, 0
        self._send(memoryview(buffer)[:size], size, buffer)

    def _send(self, body: bytes | memoryview, size: int, buffer: bytearray | None) -> None:
        if self._number > part_sizes.MAX_PARTS and self._store.parts.buffered:
            raise StoreError(
                f"{self._store.url}/{self._key} is too large for one upload",
                f"{part_sizes.MAX_PARTS} parts are full",
                "Split the dump into several streams, or compress it more.",
            )
        if self._upload is None:
            upload = self._store.begin(self._key)
            if self._group.stopped:  # while it began: whoever cleans up may have looked already
                self._store.abort(upload)
                self._group.check()
            self._upload = upload
        upload, number, offset = self._upload, self._number, self._offset
        self._number += 1
        self._offset += size

        def send() -> None:
            checksum = crc64nvme(body)
            part = self._store.put_part(upload, number, offset, body, checksum)
            with self._lock:
                if buffer is not None:
                    self._spare.append(buffer)
                    self._parts[number] = part
                else:
                    self._folded = self._fold(part)
            self._on_sent(size)

        self._pool.submit(send, size)

    def _fold(self, part: UploadedPart) -> UploadedPart:
        """Join a piece to those before it: such a store has one at a time, and nothing to list at the end."""
        before = self._folded
        if before is None:
            return part
        return UploadedPart(
            number=1,
            size=before.size + part.size,
            etag="",
            crc64nvme=combine_crc64nvme(before.crc64nvme, part.crc64nvme, part.size),
        )

    def _take_buffer(self) -> bytearray:
        size = part_sizes.target_size(self._number) + self._largest_piece
        with self._lock:
            while self._spare:
                buffer = self._spare.pop()
                if len(buffer) >= size:
                    return buffer
        return bytearray(size)

    def _compare(self, sent: int, expected: int) -> None:
        if sent != expected:
            raise IntegrityError(
                f"{self._store.url}/{self._key} was not sent as it was made",
                f"the checksum of what was sent is {sent:016x} and should be {expected:016x}",
                "This is a fault of memory or of Backhaul; test this host's memory, and report it.",
            )
