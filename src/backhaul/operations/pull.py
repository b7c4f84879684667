"""pull: a stream of a backup, read and decoded in parallel, delivered in order, checked to the last byte.

Ranges of whole frames are fetched and decoded by several workers, at most ``memory.pull_window`` of them
ahead of what was delivered. The target gets its end (a consumer its end of input, a file its name) only
after the hash of everything was compared.
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
        workers: threads that fetch and decode; None for twice the cores, since they also wait for the network.
        patience: seconds for which a store that is ill or away is tried again.
        identities: whose secrets open an encrypted backup (``backhaul.read_identities``). With one a backup that is
            not encrypted is refused.
    """

    stream: str | None = None
    workers: int | None = None
    patience: float = DEFAULT_PATIENCE
    identities: tuple[Identity, ...] = ()


class _Range(msgspec.Struct, frozen=True):
    part: ReadRange
    buffer: memoryview


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
        workers: threads that fetch and decode.
        progress: counts requests and fetched bytes.
        on_stored: given what was fetched of the object for each range, with its offset, in order (deep verify
            hashes it). Of an encrypted stream neighbours overlap by up to a chunk.
    """
    parts = list(stream.ranges(memory.RANGE_STORED, memory.RANGE_RAW))
    raw_size = max((part.raw_length for part in parts), default=0)
    stored_size = max((stream.span(part.offset, part.length)[1] for part in parts), default=0)
    window = memory.pull_window(workers)
    pool = BufferPool(group, window, raw_size)
    stored_pool = BufferPool(group, window, stored_size) if on_stored else None

    def ranges() -> Iterator[tuple[_Range, memoryview | None]]:
        # Buffers are handed out in the order of the ranges: the next one due always has its own.
        for part in parts:
            yield _Range(part, pool.take()), stored_pool.take() if stored_pool else None

    def make_worker() -> Callable[[tuple[_Range, memoryview | None]], tuple[_Range, memoryview | None]]:
        decoder = stream.decoder()
        as_it_is = stream.table is None and not stream.encrypted
        own = None if on_stored or as_it_is else memoryview(bytearray(stored_size))

        def work(item: tuple[_Range, memoryview | None]) -> tuple[_Range, memoryview | None]:
            taken, kept = item
            part = taken.part
            _, length = stream.span(part.offset, part.length)
            if as_it_is and kept is None:
                stream.fetch(part.offset, taken.buffer[: part.length])
            else:
                stored = kept if kept is not None else own
                assert stored is not None
                stream.read(part, stored[:length], taken.buffer[: part.raw_length], decoder)
            progress.fetched(length)
            return item

        return work

    # No more than there is to fetch: each has memory of its own, which a short stream would make in vain.
    busy = min(workers, max(len(parts), 1))
    for taken, kept in OrderedMap(group, ranges(), make_worker, workers=busy, window=window, name="fetch"):
        if on_stored is not None and kept is not None and stored_pool is not None:
            offset, length = stream.span(taken.part.offset, taken.part.length)
            on_stored(offset, kept[:length])
            stored_pool.give(kept)
        yield taken.buffer[: taken.part.raw_length]
        pool.give(taken.buffer)
