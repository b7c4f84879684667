"""pull: a stream of a backup, read and decoded in parallel, delivered in order, checked to the last byte.

Two stages, each with at most as much in hand as ``memory.pull_window`` says: ranges are fetched, as large as requests
should be, and kept until the last of them is delivered; pieces of them are decoded, as small as memory should be: what
compresses well is many times what was fetched. The target gets its end (a consumer its end of input, a file its name)
only after the hash of everything was compared.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import msgspec

from backhaul.formats.age_keys import Identity
from backhaul.model.results import PullResult
from backhaul.operations import memory, series
from backhaul.operations.encryption import unlock
from backhaul.operations.places import reference_at
from backhaul.operations.progress import PullProgress
from backhaul.operations.reading import StoredStream, choose_stream
from backhaul.pipeline.buffers import BufferPool
from backhaul.pipeline.ordered_map import OrderedMap
from backhaul.pipeline.supervisor import Supervisor
from backhaul.planning.read_ranges import ReadRange
from backhaul.stores.open import DEFAULT_PATIENCE, open_store
from backhaul.stores.retry import RetryPolicy
from backhaul.targets.base import Target
from backhaul.transforms.digest import StreamDigest


class PullOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to read.

    Attributes:
        stream: the stream's name; None for the only one.
        workers: threads that fetch; None for twice the cores, since they wait for the network. As many decode, at most
            one a core.
        patience: seconds for which a store that is ill or away is tried again.
        identities: whose secrets open an encrypted backup (``backhaul.read_identities``). With one a backup that is
            not encrypted is refused.
    """

    stream: str | None = None
    workers: int | None = None
    patience: float = DEFAULT_PATIENCE
    identities: tuple[Identity, ...] = ()


class _Fetched(msgspec.Struct, frozen=True):
    """A range of the stream; the span of the object that it comes from, and memory that has or will have that."""

    part: ReadRange
    offset: int
    length: int
    buffer: memoryview

    @property
    def stored(self) -> memoryview:
        return self.buffer[: self.length]


class _Piece(msgspec.Struct, frozen=True):
    """A piece of a range, its span, and memory for what it decodes to; ``last_of`` is the range, at its last piece."""

    part: ReadRange
    stored: memoryview
    buffer: memoryview
    last_of: _Fetched | None

    @property
    def raw(self) -> memoryview:
        return self.buffer[: self.part.raw_length]


def pull(
    reference: str,
    target: Target,
    options: PullOptions = PullOptions(),  # noqa: B008 - frozen
    *,
    progress: PullProgress | None = None,
) -> PullResult:
    """Write one stream of a backup to a target.

    Args:
        reference: ``SERIES[@WHEN]``.
        target: started, and committed or aborted, here.
        options: what to read.
        progress: counters to keep up to date.

    Raises:
        BackupNotFoundError: no such backup or stream.
        IdentityError: it is encrypted, and no identity fits.
        IntegrityError: what is stored is not what was pushed; the target got no end.
        TargetError: the consumer failed or the file could not be written.
        StoreError: the store could not be read.
    """
    clock = time.monotonic()
    memory.settle_allocator()
    location, when = reference_at(reference)
    group = Supervisor("pull", grace=2.0)
    policy = RetryPolicy(options.patience, sleep=group.sleep)
    store = open_store(location, policy=policy)
    counters = progress or PullProgress()
    workers = options.workers or 2 * memory.default_workers()
    with contextlib.closing(store):
        backup = series.find_backup(store, when)
        committed = series.read_backup(store, backup)
        record = choose_stream(store, committed.manifest, options.stream)
        key = unlock(store, committed, record, options.identities)
        stream = StoredStream(store, committed.manifest, record, key)
        counters.total = stream.record.raw.size
        # Undone in reverse: the target first, so that a consumer is dead before anything else is waited for.
        with group, contextlib.ExitStack() as stack:
            stack.callback(target.abort)
            deliver(stream, target, group, workers, counters)
    table = stream.table
    return PullResult(
        series=location.text,
        id=backup,
        stream=stream.record.name,
        raw_size=stream.record.raw.size,
        stored_size=stream.record.stored.size,
        seconds=time.monotonic() - clock,
        requests=counters.requests,
        rereads=policy.retries + stream.rereads,
        memory=memory.pull_bound(
            workers,
            max(table.raw_sizes) if table else 0,
            max(table.stored_sizes) if table else 0,
            len(table) if table else 0,
            encrypted=stream.encrypted,
        ),
        peak_memory=memory.peak_memory(),
    )


def deliver(stream: StoredStream, target: Target, group: Supervisor, workers: int, progress: PullProgress) -> None:
    """Bring a whole stream into a target, which gets its end once the hash of everything was compared.

    Raises as ``feed`` does.
    """
    feed(stream, target, group, workers, progress)
    target.commit()


def feed(stream: StoredStream, target: Target, group: Supervisor, workers: int, progress: PullProgress) -> None:
    """Start a target and give it the whole stream, whose hash was compared then, but not yet its end.

    Whoever calls is inside the group's block, and aborts the target if this raises.

    Raises:
        IntegrityError: what is stored is not what was pushed.
        TargetError: the target can't take it.
        StoreError: the store could not be read.
    """
    digest = StreamDigest(crc=False)
    target.start(stream.record.raw.size, group)
    for data in decoded(stream, group, workers, progress):
        digest.feed(data)
        target.write(data)
        progress.delivered(len(data))
    stream.check_raw(digest.size, digest.blake3)


def decoded(
    stream: StoredStream,
    group: Supervisor,
    workers: int,
    progress: PullProgress,
    on_stored: Callable[[int, memoryview], None] | None = None,
) -> Iterator[memoryview]:
    """Yield the decoded stream in order, in pieces that are valid until the next one is asked for.

    Args:
        stream: what to read.
        group: whose threads read; the caller is inside its block.
        workers: threads that fetch; as many decode, but no more than there are cores.
        progress: counts requests and fetched bytes.
        on_stored: given what was fetched of the object for each range, with its offset, in order (deep verify
            hashes it). Of an encrypted stream neighbours overlap by up to a chunk.
    """
    fetched, fetch_buffers = _fetched(stream, group, workers, progress)
    if stream.table is None and not stream.encrypted:
        for item in fetched:
            if on_stored is not None:
                on_stored(item.offset, item.stored)
            yield item.stored
            fetch_buffers.give(item.buffer)
        return

    largest = count = 0
    for part in stream.ranges(memory.RANGE_STORED):
        for piece in stream.pieces(part, memory.PIECE_RAW):
            largest = max(largest, piece.raw_length)
            count += 1
    decoders = memory.pull_decoders(workers)
    window = memory.pull_window(decoders)
    buffers = BufferPool(group, window, largest)

    def pieces() -> Iterator[_Piece]:
        for item in fetched:
            parts = list(stream.pieces(item.part, memory.PIECE_RAW))
            for part in parts:
                offset, length = stream.span(part.offset, part.length)
                stored = item.stored[offset - item.offset :][:length]
                yield _Piece(part, stored, buffers.take(), item if part is parts[-1] else None)

    def make_decoder() -> Callable[[_Piece], _Piece]:
        decoder = stream.decoder()

        def decode(piece: _Piece) -> _Piece:
            stream.decode(piece.part, piece.stored, piece.raw, decoder)
            return piece

        return decode

    decoders = min(decoders, max(count, 1))
    for done in OrderedMap(group, pieces(), make_decoder, workers=decoders, window=window, name="decode"):
        if done.last_of is not None and on_stored is not None:
            on_stored(done.last_of.offset, done.last_of.stored)
        yield done.raw
        buffers.give(done.buffer)
        if done.last_of is not None:
            fetch_buffers.give(done.last_of.buffer)


def _fetched(
    stream: StoredStream, group: Supervisor, workers: int, progress: PullProgress
) -> tuple[OrderedMap[_Fetched, _Fetched], BufferPool]:
    """Begin to fetch a stream; return its ranges, in order, and where their memory is given back."""
    window = memory.pull_window(workers)
    largest = count = 0
    for part in stream.ranges(memory.RANGE_STORED):
        largest = max(largest, stream.span(part.offset, part.length)[1])
        count += 1
    buffers = BufferPool(group, window, largest)

    def due() -> Iterator[_Fetched]:
        # Buffers are handed out in the order of the ranges: the next one due always has its own.
        for part in stream.ranges(memory.RANGE_STORED):
            yield _Fetched(part, *stream.span(part.offset, part.length), buffers.take())

    def fetch(item: _Fetched) -> _Fetched:
        stream.fetch(item.offset, item.stored)
        progress.fetched(item.length)
        return item

    # (No more threads than there is to do for: a short stream has one range.)
    workers = min(workers, max(count, 1))
    return OrderedMap(group, due(), lambda: fetch, workers=workers, window=window, name="fetch"), buffers
