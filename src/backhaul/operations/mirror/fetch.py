"""The files of a mirror, read in parallel and delivered one after the other, each with its hash compared.

Ranges of many files are under way at once, small files as well as pieces of large ones; one thread takes them in
order. Memory is a number of ranges, whatever the mirror's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import msgspec

from backhaul.errors import IntegrityError, ObjectNotFoundError, PreconditionError, StoreError, StoreUnavailableError
from backhaul.model.mirror import Entry
from backhaul.model.results import Skipped
from backhaul.operations import memory
from backhaul.operations.progress import MirrorProgress
from backhaul.pipeline.buffers import BufferPool
from backhaul.pipeline.ordered_map import OrderedMap
from backhaul.pipeline.supervisor import Supervisor
from backhaul.stores.base import Store
from backhaul.transforms.digest import StreamDigest

RANGE = 8 << 20


class Receiver(Protocol):
    """Where files go to."""

    def wants(self, entry: Entry) -> int | None:
        """Return the byte from which on a file is wanted, None for not at all. Called ahead, from another thread."""
        ...

    def begin(self, entry: Entry, start: int, digest: StreamDigest) -> None:
        """Take a file from that byte on; what is there of it is fed into the digest."""
        ...

    def write(self, data: memoryview) -> None:
        """Take the next bytes."""
        ...

    def finish(self, entry: Entry) -> None:
        """The file is whole, and its hash is right."""
        ...

    def fail(self, entry: Entry) -> None:
        """The file is not to be had; what came of it is of no use."""
        ...


class _Piece(msgspec.Struct):
    entry: Entry
    offset: int
    size: int
    first: bool
    last: bool
    buffer: memoryview | None
    error: StoreError | None = None


def fetch(
    store: Store,
    entries: Iterable[Entry],
    receiver: Receiver,
    group: Supervisor,
    progress: MirrorProgress,
    *,
    workers: int | None = None,
) -> Iterator[Skipped]:
    """Deliver files; yield those that could not be had, with the reason.

    Raises:
        StoreUnavailableError: the store is away.
    """
    workers = workers or 2 * memory.default_workers() + 2
    window = workers + 2
    pool = BufferPool(group, window, RANGE)

    def pieces() -> Iterator[_Piece]:
        for entry in entries:
            start = receiver.wants(entry)
            if start is None:
                continue
            offset, first = start, True
            while first or offset < entry.size:
                size = min(RANGE, entry.size - offset)
                yield _Piece(entry, offset, size, first, offset + size >= entry.size, pool.take())
                offset, first = offset + size, False

    def make_worker() -> Callable[[_Piece], _Piece]:
        def work(piece: _Piece) -> _Piece:
            assert piece.buffer is not None
            try:
                store.read_into(
                    piece.entry.key, piece.offset, piece.buffer[: piece.size], etag=piece.entry.etag or None
                )
            except StoreUnavailableError:
                raise
            except (ObjectNotFoundError, PreconditionError, IntegrityError, StoreError) as error:
                piece.error = error if isinstance(error, StoreError) else StoreError(error.what, error.why, error.todo)
            return piece

        return work

    digest = StreamDigest()
    failed: Entry | None = None
    for piece in OrderedMap(group, pieces(), make_worker, workers=workers, window=window, name="fetch"):
        entry, buffer = piece.entry, piece.buffer
        assert buffer is not None
        if piece.first:
            digest, failed = StreamDigest(), None
            receiver.begin(entry, piece.offset, digest)
        if failed is not entry and piece.error is not None:
            failed = entry
            receiver.fail(entry)
            yield Skipped(entry.key, f"{piece.error.what}: {piece.error.why}")
        if failed is not entry:
            data = buffer[: piece.size]
            digest.feed(data)
            receiver.write(data)
            progress.add_sent(piece.size)
            if piece.last:
                wrong = _wrong(entry, digest)
                if wrong:
                    receiver.fail(entry)
                    yield Skipped(entry.key, wrong)
                else:
                    receiver.finish(entry)
                progress.add_done()
        pool.give(buffer)


def _wrong(entry: Entry, digest: StreamDigest) -> str:
    if digest.size != entry.size:
        return f"{digest.size} bytes came, and it has {entry.size}"
    if entry.blake3 and digest.blake3 != entry.blake3:
        return f"its BLAKE3 is {digest.blake3[:16]}..., and was {entry.blake3[:16]}... when it was sent: it is damaged"
    if not entry.blake3 and entry.crc64nvme is not None and digest.crc64nvme != entry.crc64nvme:
        return "its CRC64NVME is another one than when it was sent: it is damaged"
    return ""
