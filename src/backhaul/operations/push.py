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

import contextlib
import datetime as dt
import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import msgspec

from backhaul import version
from backhaul.errors import BackhaulError, FailedError, SourceError, UsageError
from backhaul.formats import manifest as manifest_format
from backhaul.formats import names, seekable
from backhaul.formats.location import parse_series
from backhaul.model.location import Location
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
from backhaul.model.objects import StoredObject
from backhaul.model.results import PushResult
from backhaul.operations import memory, series
from backhaul.operations.destination import CLEANUP_PATIENCE, Destination, Transcript
from backhaul.operations.progress import PushProgress
from backhaul.pipeline.buffers import BufferPool
from backhaul.pipeline.ordered_map import OrderedMap
from backhaul.pipeline.supervisor import Supervisor
from backhaul.pipeline.tee import Tee
from backhaul.pipeline.token_bucket import TokenBucket
from backhaul.planning.requirement import required_destinations
from backhaul.sources.base import Source
from backhaul.stores.open import DEFAULT_PATIENCE, open_store
from backhaul.stores.retry import RetryPolicy
from backhaul.transforms import compress
from backhaul.transforms.digest import StreamDigest, encode_crc64nvme

MARKER_WINDOW = 4 << 10
# At the start nothing is lost yet by failing: say soon that nobody is there.
START_PATIENCE = 3.0
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
    required = required_destinations(options.require, len(destinations))
    locations = [parse_series(text) for text in destinations]
    if len({_identity(location) for location in locations}) != len(locations):
        raise UsageError("push has a destination twice", ", ".join(destinations), "Name each SERIES once.")
    memory.settle_allocator()
    with contextlib.ExitStack() as stack:
        run = _Push(locations, source, options, setting, required, progress or PushProgress(), now, stack)
        return run.run()


class _Push:
    def __init__(
        self,
        locations: Sequence[Location],
        source: Source,
        options: PushOptions,
        setting: str,
        required: int,
        progress: PushProgress,
        now: Callable[[], dt.datetime],
        stack: contextlib.ExitStack,
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
        self.stream_file = names.stream_file(options.name, self.codec)
        self.markers = [os.fsencode(text) for text in options.expect]
        self.transcript: Future[Transcript] = Future()
        self.raw_digest = StreamDigest(crc=False)
        self.tail = b""
        self.producer: ProducerRecord | None = None
        throttle = None
        if options.limit is not None:
            throttle = TokenBucket(options.limit, sleep=self.group.sleep).take
        self.destinations: list[Destination] = []
        for location in locations:
            policy = RetryPolicy(options.patience, min(START_PATIENCE, options.patience), sleep=self.group.sleep)
            store = open_store(location, policy=policy, throttle=throttle)
            stack.callback(store.close)
            self.destinations.append(Destination(location, store, policy))
        progress.destinations = [destination.progress for destination in self.destinations]

    @property
    def living(self) -> list[Destination]:
        return [destination for destination in self.destinations if destination.failure is None]

    def run(self) -> PushResult:
        clock = time.monotonic()
        self.source.check()
        try:
            self.started = self._claim()
            with self.group:
                self.source.start(self.group)
                self._wire()
            if sum(destination.committed is not None for destination in self.destinations) < self.required:
                raise self._too_few()
        except BaseException:
            self._clean_up()
            raise
        finally:
            self.source.abort()
        return self._result(time.monotonic() - clock)

    # -- step 1: the claim -------------------------------------------------------------------------------

    def _claim(self) -> dt.datetime:
        """Reserve one id in every destination that can be used, and return the start that it stands for."""
        for _ in range(_MAX_ID_TRIES):
            start = self.now().replace(microsecond=0)
            self.id = names.backup_id(start)
            if self._claim_everywhere(series.new_claim(start)):
                return start
            # Another run began in this second. Ids tell seconds apart, so this one begins in the next.
            time.sleep(1.0 - self.now().microsecond / 1e6)
        raise FailedError(
            "No id was free for this backup",
            f"other runs took {_MAX_ID_TRIES} seconds in a row",
            "See who else pushes to this series; this host's clock may stand still.",
        )

    def _claim_everywhere(self, claim: series.Claim) -> bool:
        for destination in self.living:
            try:
                taken = destination.take_claim(self.id, claim)
            except BackhaulError as error:
                destination.fail(error)
                if len(self.living) < self.required:
                    raise
                continue
            if not taken:
                for other in self.living:
                    other.give_claim_back()
                return False
        return True

    # -- step 2: the stream ------------------------------------------------------------------------------

    def _wire(self) -> None:
        """Start every thread of the run; they end with the group."""
        group = self.group
        pool = BufferPool(group, memory.push_window(self.workers) + 1, compress.FRAME_SIZE)
        largest = compress.largest_frame(compress.FRAME_SIZE)
        receivers = self.living
        tee = Tee([d.attach(group, self.stream_file, largest, self.options.patience) for d in receivers])

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
        for number, destination in enumerate(receivers):
            group.start(functools.partial(self._deliver, destination), f"deliver-{number}")

    def _blocks(self, pool: BufferPool) -> Iterator[_Block]:
        """Read the stream in blocks; its end is only its end when the producer says so too."""
        while True:
            buffer = pool.take()
            size = 0
            while size < len(buffer) and (count := self.source.read_into(buffer[size:])):
                size += count
                self.progress.raw += count
            if size:
                block = buffer[:size]
                self.raw_digest.feed(block)
                self.tail = (self.tail + bytes(block[-MARKER_WINDOW:]))[-MARKER_WINDOW:]
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
        missing = [
            text for text, marker in zip(self.options.expect, self.markers, strict=True) if marker not in self.tail
        ]
        if missing:
            raise SourceError(
                f"The stream does not end as it should: {self.source.name}",
                "its last 4 KiB do not hold " + ", ".join(repr(text) for text in missing),
                "The dump is not whole, or --expect names the wrong text. Nothing was committed.",
            )
        shown = tuple(marker.decode(errors="backslashreplace") for marker in self.markers)
        return msgspec.structs.replace(record, markers=shown)

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
            Transcript(
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

    def _deliver(self, destination: Destination) -> None:
        destination.deliver(self.transcript, self._manifest)
        if not self.living:
            raise self._too_few()

    def _manifest(self, transcript: Transcript, stored: StoredObject) -> Manifest:
        return Manifest(
            format=manifest_format.FORMAT,
            version=manifest_format.VERSION,
            id=self.id,
            started=_iso(self.started),
            finished=_iso(self.now()),
            host=socket.gethostname(),
            tool=Tool(name="backhaul", version=version.VERSION),
            streams=(
                StreamRecord(
                    name=self.options.name,
                    object=self.stream_file,
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

    # -- the end -----------------------------------------------------------------------------------------

    def _clean_up(self) -> None:
        """Take back what uncommitted destinations hold, side by side, and not for long."""
        threads = [
            threading.Thread(target=destination.clean_up, daemon=True)
            for destination in self.destinations
            if destination.committed is None
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 4 * CLEANUP_PATIENCE
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _result(self, seconds: float) -> PushResult:
        transcript = self.transcript.result()
        return PushResult(
            id=self.id,
            stream=self.options.name,
            raw_size=transcript.raw.size,
            stored_size=transcript.stored.size,
            seconds=seconds,
            frames=transcript.frames,
            raw_blake3=transcript.raw.blake3,
            destinations=tuple(destination.result() for destination in self.destinations),
            required=self.required,
            memory=memory.push_bound(
                self.workers,
                self.setting,
                [destination.store.parts for destination in self.destinations],
                transcript.stored.size,
                transcript.frames,
            ),
            peak_memory=memory.peak_memory(),
        )

    def _too_few(self) -> BackhaulError:
        """Return the error that says which destinations failed, why, and which hold the backup all the same."""
        failures = [(d, d.failure) for d in self.destinations if d.failure is not None]
        committed = [d.text for d in self.destinations if d.committed is not None]
        if len(self.destinations) == 1 and failures:
            return failures[0][1]
        error = FailedError(
            f"{len(committed)} of {self.required} required destinations hold backup {self.id}",
            "; ".join(f"{failure.what}: {failure.why}" for _, failure in failures),
            (f"Committed and whole: {', '.join(committed)}. " if committed else "")
            + " ".join(f"{destination.text}: {failure.todo}" for destination, failure in failures),
        )
        fates = [msgspec.to_builtins(destination.result()) for destination in self.destinations]
        error.details = {"id": self.id, "required": self.required, "destinations": fates}
        return error


def _identity(location: Location) -> tuple[str | None, ...]:
    """Return what two spellings of the same place have in common."""
    if location.kind == "local":
        return ("local", os.path.realpath(location.path))
    return ("s3", location.endpoint, location.bucket, location.path)


def _iso(time: dt.datetime) -> str:
    return time.astimezone(dt.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
