"""push: one stream becomes a backup in every destination, in one pass.

The order, which every promise leans on:

1. claim the id in every destination (finds wrong credentials before the dump begins);
2. start the producer; read, hash, compress, hash, tee; each destination sends parts as they fill;
3. the stream ends: the producer must have ended well and shown its markers, or nothing is committed;
4. each destination for itself: all parts acknowledged, object completed, manifest written, claim released.

A destination that fails takes only itself out. What fails before step 4 takes the whole run down, and
then every destination's upload is aborted and its claim released.
"""

from __future__ import annotations

import datetime as dt
import functools
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import msgspec

import backhaul.version
from backhaul.errors import (
    BackhaulError,
    ConfigurationError,
    FailedError,
    PreconditionError,
    SourceError,
    StoreError,
    UsageError,
)
from backhaul.formats import manifest as manifest_format
from backhaul.formats import names, seekable
from backhaul.formats.location import parse_location
from backhaul.model.manifest import (
    Codec,
    Manifest,
    ProducerRecord,
    RawBytes,
    SeekTablePosition,
    StoredBytes,
    StoreRecord,
    StreamRecord,
    Tool,
)
from backhaul.model.results import DestinationResult, PushResult
from backhaul.operations import memory, series
from backhaul.operations.progress import DestinationProgress, PushProgress
from backhaul.pipeline.buffers import BufferPool
from backhaul.pipeline.ordered_map import OrderedMap
from backhaul.pipeline.supervisor import Supervisor
from backhaul.pipeline.tee import PieceQueue, Tee
from backhaul.pipeline.token_bucket import TokenBucket
from backhaul.planning.requirement import required_destinations
from backhaul.sources.base import Source
from backhaul.stores.base import Store
from backhaul.stores.multipart import MultipartWriter
from backhaul.stores.open import DEFAULT_PATIENCE, open_store
from backhaul.stores.retry import RetryPolicy
from backhaul.transforms import compress
from backhaul.transforms.digest import StreamDigest, encode_crc64nvme

MARKER_WINDOW = 4 << 10
# At the start nothing is lost yet by failing: say soon that nobody is there.
START_PATIENCE = 3.0
# While cleaning up after a failure a dead store must not hold the process for long.
CLEANUP_PATIENCE = 2.0
_MAX_ID_TRIES = 120


class PushOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to make of the stream.

    Attributes:
        name: the stream's name.
        compress: ``auto``, ``none`` or ``1`` to ``19``.
        require: how many destinations must hold it: ``all``, ``any`` or a number.
        expect: texts that the last 4 KiB of the raw stream must hold.
        limit: bytes a second over all connections, or None.
        allow_empty: whether a stream of no bytes is a backup.
        workers: compressing threads; None for one a core.
        patience: seconds for which a store that is ill or away is tried again.
    """

    name: str = "data"
    compress: str = compress.AUTO
    require: str = "all"
    expect: tuple[str, ...] = ()
    limit: int | None = None
    allow_empty: bool = False
    workers: int | None = None
    patience: float = DEFAULT_PATIENCE


class _Block(msgspec.Struct, frozen=True):
    buffer: memoryview
    size: int


class _Frame(msgspec.Struct, frozen=True):
    stored: bytes
    raw_size: int


class _Transcript(msgspec.Struct, frozen=True):
    """What the whole stream turned out to be: the same for every destination."""

    raw: RawBytes
    stored: StoredBytes
    crc: int
    frames: int
    seek_table: SeekTablePosition | None
    producer: ProducerRecord


class _Destination:
    """One destination: its store, its part of the run, and its fate."""

    def __init__(self, text: str, store: Store, policy: RetryPolicy) -> None:
        self.text = text
        self.store = store
        self.policy = policy
        self.progress = DestinationProgress(text)
        self.claimed = False
        self.failure: BackhaulError | None = None
        self.writer: MultipartWriter | None = None
        self.queue: PieceQueue | None = None
        self.manifest_sent = False
        self.committed: Manifest | None = None

    def fail(self, error: BackhaulError) -> None:
        self.failure = error
        self.progress.state = "failed"


def push(
    destinations: Sequence[str],
    source: Source,
    options: PushOptions = PushOptions(),  # noqa: B008 - frozen
    *,
    progress: PushProgress | None = None,
    now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
) -> PushResult:
    """Make one backup from one stream in every destination.

    Args:
        destinations: SERIES, as on the command line.
        source: the stream; started here, ended here whatever happens.
        options: what to make of it.
        progress: counters to keep up to date.
        now: the clock that ids and records come from.

    Returns:
        A result whose required destinations all hold the backup; ``complete`` tells whether all do.

    Raises:
        UsageError: the call contradicts itself. Nothing was done.
        ConfigurationError: a required destination can't be used. The producer was not started.
        SourceError: the producer did not end well. Nothing was committed anywhere.
        FailedError: fewer destinations than required hold the backup; those that do are named.
    """
    setting = compress.check_setting(options.compress)
    names.check_stream_name(options.name)
    if not destinations:
        raise UsageError("push has no destination", "no SERIES was given", "Write: backhaul push SERIES -- COMMAND")
    if len(set(destinations)) != len(destinations):
        raise UsageError("push has a destination twice", ", ".join(destinations), "Name each SERIES once.")
    required = required_destinations(options.require, len(destinations))
    run = _Push(destinations, source, options, setting, required, progress or PushProgress(), now)
    return run.run()


class _Push:
    def __init__(
        self,
        destinations: Sequence[str],
        source: Source,
        options: PushOptions,
        setting: str,
        required: int,
        progress: PushProgress,
        now: Callable[[], dt.datetime],
    ) -> None:
        self.source = source
        self.options = options
        self.setting = setting
        self.required = required
        self.progress = progress
        self.now = now
        self.workers = options.workers or memory.default_workers()
        self.group = Supervisor("push")
        self.codec = compress.codec_name(setting)
        self.transcript: Future[_Transcript] = Future()
        self.raw_digest = StreamDigest(crc=False)
        self.tail = b""
        self.producer: ProducerRecord | None = None
        throttle = None
        if options.limit is not None:
            throttle = TokenBucket(options.limit, sleep=self.group.sleep).take
        self.destinations: list[_Destination] = []
        for text in destinations:
            policy = RetryPolicy(options.patience, min(START_PATIENCE, options.patience), sleep=self.group.sleep)
            store = open_store(parse_location(text), policy=policy, throttle=throttle)
            self.destinations.append(_Destination(text, store, policy))
        progress.destinations = [destination.progress for destination in self.destinations]

    @property
    def living(self) -> list[_Destination]:
        return [destination for destination in self.destinations if destination.failure is None]

    def run(self) -> PushResult:
        clock = time.monotonic()
        memory.settle_allocator()
        try:
            self.source.check()
            self.started = self._claim()
            self.id = names.backup_id(self.started)
            with self.group:
                self.source.start(self.group)
                self._wire()
        except BaseException:
            self._clean_up(self.destinations)
            raise
        finally:
            self.source.abort()
            for destination in self.destinations:
                destination.store.close()
        return self._result(time.monotonic() - clock)

    # -- step 1: the claim -------------------------------------------------------------------------------

    def _claim(self) -> dt.datetime:
        """Reserve one id in every destination that can be used, and return the start that it stands for."""
        for _ in range(_MAX_ID_TRIES):
            start = self.now().replace(microsecond=0)
            claim = series.new_claim(start)
            if self._claim_at(names.backup_id(start), claim):
                self.claim = claim
                for destination in self.living:
                    destination.policy.reach_patience = self.options.patience
                    destination.progress.state = "sending"
                return start
            # Another run began in this second. Ids tell seconds apart, so this one begins in the next.
            time.sleep(1.0 - self.now().microsecond / 1e6)
        raise FailedError(
            "No id was free for this backup",
            f"other runs took {_MAX_ID_TRIES} seconds in a row",
            "See who else pushes to this series; this host's clock may stand still.",
        )

    def _claim_at(self, backup: str, claim: series.Claim) -> bool:
        for destination in self.living:
            try:
                if not series.take_claim(destination.store, backup, claim):
                    for other in self.destinations:
                        if other.claimed:
                            series.release_claim(other.store, backup)
                            other.claimed = False
                    return False
                destination.claimed = True
                self.id = backup
            except BackhaulError as error:
                destination.fail(error)
                # The claim may have arrived although its reply did not.
                destination.claimed = error.exit_code != ConfigurationError.exit_code
                if len(self.living) < self.required:
                    raise
        return True

    # -- step 2: the stream ------------------------------------------------------------------------------

    def _wire(self) -> None:
        group = self.group
        pool = BufferPool(group, memory.push_window(self.workers) + 1, compress.FRAME_SIZE)
        largest = compress.largest_frame(compress.FRAME_SIZE)
        queues = []
        for destination in self.living:
            destination.queue = PieceQueue(group, memory.QUEUE_BYTES)
            destination.writer = MultipartWriter(
                destination.store,
                names.object_key(self.id, names.stream_file(self.options.name, self.codec)),
                group,
                largest_piece=largest,
                on_sent=destination.progress.add,
            )
            queues.append(destination.queue)
        tee = Tee(queues)

        def make_worker() -> Callable[[_Block], _Frame]:
            compressor = compress.FrameCompressor(self.setting)

            def work(block: _Block) -> _Frame:
                stored = compressor.compress(block.buffer[: block.size])
                pool.give(block.buffer)
                return _Frame(stored, block.size)

            return work

        frames = OrderedMap(
            group,
            self._blocks(pool),
            make_worker,
            workers=self.workers,
            window=memory.push_window(self.workers),
            name="compress",
        )
        group.start(lambda: self._assemble(frames, tee), "assemble")
        for number, destination in enumerate(self.living):
            group.start(functools.partial(self._deliver, destination), f"deliver-{number}")

    def _blocks(self, pool: BufferPool) -> Iterator[_Block]:
        """Read the stream in blocks; its end is only its end when the producer says so too."""
        while True:
            buffer = pool.take()
            size = self.source.read_into(buffer)
            if size:
                block = buffer[:size]
                self.raw_digest.feed(block)
                self.tail = (self.tail + bytes(block[-MARKER_WINDOW:]))[-MARKER_WINDOW:]
                self.progress.raw += size
                yield _Block(buffer, size)
            if size < len(buffer):
                break
        self.producer = self._checked_producer()

    def _checked_producer(self) -> ProducerRecord:
        record = self.source.finish()
        if self.raw_digest.size == 0 and not self.options.allow_empty:
            raise SourceError(
                f"The stream is empty: {self.source.name}",
                "it ended without a single byte",
                "If an empty backup is what you want, say so with --allow-empty.",
            )
        missing = [text for text in self.options.expect if text.encode() not in self.tail]
        if missing:
            raise SourceError(
                f"The stream does not end as it should: {self.source.name}",
                "its last 4 KiB do not hold " + ", ".join(repr(text) for text in missing),
                "The dump is not whole, or --expect names the wrong text. Nothing was committed.",
            )
        return msgspec.structs.replace(record, markers=self.options.expect)

    def _assemble(self, frames: OrderedMap[_Block, _Frame], tee: Tee) -> None:
        """Put the frames in order into every queue, then the seek table, and settle what the stream is."""
        digest = StreamDigest()
        table = seekable.SeekTable()
        framed = self.codec == "zstd"
        for frame in frames:
            if framed:
                table.append(len(frame.stored), frame.raw_size)
            self._pass_on(frame.stored, digest, tee)
        position: SeekTablePosition | None = None
        if framed:
            if len(table) == 0:
                # An empty stream still is one frame, so that any decoder accepts the object.
                empty = compress.FrameCompressor(self.setting).compress(memoryview(b""))
                table.append(len(empty), 0)
                self._pass_on(empty, digest, tee)
            encoded = seekable.encode(table)
            position = SeekTablePosition(offset=digest.size, size=len(encoded))
            for start in range(0, len(encoded), compress.FRAME_SIZE):
                self._pass_on(encoded[start : start + compress.FRAME_SIZE], digest, tee)
        assert self.producer is not None  # the iteration above ends well only after it was set
        self.transcript.set_result(
            _Transcript(
                raw=RawBytes(size=self.raw_digest.size, blake3=self.raw_digest.blake3),
                stored=StoredBytes(
                    size=digest.size, blake3=digest.blake3, crc64nvme=encode_crc64nvme(digest.crc64nvme)
                ),
                crc=digest.crc64nvme,
                frames=len(table),
                seek_table=position,
                producer=self.producer,
            )
        )
        tee.end()

    def _pass_on(self, piece: bytes, digest: StreamDigest, tee: Tee) -> None:
        digest.feed(piece)
        self.progress.stored = digest.size
        tee.put(piece)

    # -- steps 3 and 4: each destination for itself ------------------------------------------------------

    def _deliver(self, destination: _Destination) -> None:
        assert destination.queue is not None and destination.writer is not None
        try:
            for piece in destination.queue:
                destination.writer.write(piece)
            destination.writer.finish()
            destination.progress.state = "committing"
            self._commit(destination, self.transcript.result())
            destination.progress.state = "committed"
        except BackhaulError as error:
            self.group.check()  # after a stop a failure is its consequence, and cleaned up with the rest
            destination.fail(error)
            destination.queue.abandon()
            self._clean_up([destination])
            if not self.living:
                raise self._too_few() from error
        finally:
            destination.writer.close()

    def _commit(self, destination: _Destination, transcript: _Transcript) -> None:
        assert destination.writer is not None
        if not series.owns_claim(destination.store, self.id, self.claim):
            raise PreconditionError(
                f"{destination.text}/{self.id} is another run's",
                "the claim that this run made there is gone or replaced",
                "Another push began in the same second, or clean removed it; push again.",
            )
        stored = destination.writer.commit(transcript.crc)
        stream_file = names.stream_file(self.options.name, self.codec)
        manifest = Manifest(
            format=manifest_format.FORMAT,
            version=manifest_format.VERSION,
            id=self.id,
            started=_iso(self.started),
            finished=_iso(self.now()),
            host=socket.gethostname(),
            tool=Tool(name="backhaul", version=backhaul.version.VERSION),
            streams=(
                StreamRecord(
                    name=self.options.name,
                    object=stream_file,
                    raw=transcript.raw,
                    stored=transcript.stored,
                    codec=Codec(name=self.codec, frame_size=compress.FRAME_SIZE, setting=self.setting),
                    frames=transcript.frames,
                    seek_table=transcript.seek_table,
                    producer=0,
                    store=StoreRecord(etag=stored.etag, checksum=stored.checksum, modified=stored.modified_ns),
                ),
            ),
            producers=(transcript.producer,),
        )
        destination.manifest_sent = True
        series.write_manifest(destination.store, manifest)
        destination.committed = manifest
        try:
            series.release_claim(destination.store, self.id)
        except StoreError:
            pass  # the backup is committed; clean removes the claim

    # -- the end -----------------------------------------------------------------------------------------

    def _clean_up(self, destinations: Sequence[_Destination]) -> None:
        """Take back what uncommitted destinations hold, side by side, as far as their stores can be reached."""

        def clean(destination: _Destination) -> None:
            destination.policy.patience = destination.policy.reach_patience = CLEANUP_PATIENCE
            destination.policy.sleep = time.sleep
            backup = getattr(self, "id", None)
            try:
                if destination.writer is not None:
                    destination.writer.abort()
                if destination.claimed and backup is not None:
                    file = names.stream_file(self.options.name, self.codec)
                    # The object may be complete and only its manifest missing. But once the manifest was
                    # sent, it may stand or still arrive although no reply came: then nothing is deleted
                    # here, and ``clean`` decides when it is certain.
                    if destination.manifest_sent:
                        return
                    if destination.writer is not None and series.owns_claim(destination.store, backup, self.claim):
                        destination.store.delete(names.object_key(backup, file))
                    series.release_claim(destination.store, backup)
            except BackhaulError:
                destination.progress.state = "failed, leftovers"

        threads = [
            threading.Thread(target=clean, args=(destination,), daemon=True)
            for destination in destinations
            if destination.committed is None
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 4 * CLEANUP_PATIENCE
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _result(self, seconds: float) -> PushResult:
        transcript = self.transcript.result()
        result = PushResult(
            id=self.id,
            stream=self.options.name,
            raw_size=transcript.raw.size,
            stored_size=transcript.stored.size,
            seconds=seconds,
            frames=transcript.frames,
            raw_blake3=transcript.raw.blake3,
            destinations=tuple(self._fate(destination) for destination in self.destinations),
            required=self.required,
            memory=memory.push_bound(
                self.workers,
                self.setting,
                [destination.store.parts for destination in self.destinations],
                transcript.stored.size,
            ),
            peak_memory=memory.peak_memory(),
        )
        if sum(destination.committed is not None for destination in self.destinations) < self.required:
            raise self._too_few()
        return result

    def _too_few(self) -> BackhaulError:
        """Return the error that says which destinations failed, why, and which hold the backup all the same."""
        failures = [(d, d.failure) for d in self.destinations if d.failure is not None]
        committed = [d.text for d in self.destinations if d.committed is not None]
        if len(self.destinations) == 1 and failures:
            return failures[0][1]
        return FailedError(
            f"{len(committed)} of {self.required} required destinations hold backup {self.id}",
            "; ".join(f"{failure.what}: {failure.why}" for _, failure in failures),
            (f"Committed and whole: {', '.join(committed)}. " if committed else "")
            + " ".join(f"{destination.text}: {failure.todo}" for destination, failure in failures),
        )

    def _fate(self, destination: _Destination) -> DestinationResult:
        error = destination.failure
        if destination.committed is not None:
            return DestinationResult(
                series=destination.text,
                state="committed",
                stored_size=destination.committed.stored_size,
                manifest=f"{destination.text}/{names.object_key(self.id, names.MANIFEST)}",
            )
        return DestinationResult(
            series=destination.text,
            state="failed",
            error_what=error.what if error else None,
            error_why=error.why if error else None,
            error_next=error.todo if error else None,
        )


def _iso(time: dt.datetime) -> str:
    return time.astimezone(dt.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
