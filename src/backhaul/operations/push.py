"""push: one stream, or several of one state, become a backup in every destination, in one pass.

The order, which every promise leans on:

1. claim the id in every destination (finds wrong credentials before the dump begins), or take an interrupted
   run's over where the source can be read again;
2. open the source, which fixes the state that all streams are of; for each stream, some of them side by side: start
   the producer; read, hash, compress, hash, tee; each destination sends parts as they fill;
3. a stream ends: its producer must have ended well and shown its markers, or nothing is committed; each destination
   completes its object, which nobody sees without a manifest;
4. the last stream has ended, and the source says that all were of one state: each destination for itself writes the
   manifest and releases the claim.

A destination that fails takes only itself out. What fails before step 4 takes the whole run down, and
then every destination's uploads are aborted, its objects removed and its claim released.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import msgspec

from backhaul import version
from backhaul.errors import (
    BackhaulError,
    ConfigurationError,
    FailedError,
    StoreStalledError,
    StoreUnavailableError,
    UsageError,
)
from backhaul.formats import age, names
from backhaul.formats import manifest as manifest_format
from backhaul.formats.age_keys import is_secret, key_id
from backhaul.formats.ciphertext import encrypted_as
from backhaul.formats.redaction import redact_identities
from backhaul.formats.timetable import Timetable
from backhaul.model.location import Location
from backhaul.model.manifest import (
    DATA,
    SCHEMA,
    Codec,
    EncryptionRecord,
    Manifest,
    RawBytes,
    SegmentRecord,
    SourceRecord,
    StoreRecord,
    StreamRecord,
    Tool,
)
from backhaul.model.memory import MemoryBound
from backhaul.model.objects import StoredObject
from backhaul.model.results import PushedStream, PushResult
from backhaul.operations import memory
from backhaul.operations.beginning import Beginning
from backhaul.operations.destination import CLEANUP_PATIENCE, Delivery, Destination, StoredStreams
from backhaul.operations.encoding import StreamEncoder, Transcript
from backhaul.operations.encryption import authenticated, fresh_key, recipients_of
from backhaul.operations.journal import UploadJournal
from backhaul.operations.kept_key import drop_everywhere
from backhaul.operations.leveling import Leveling, StreamLevels
from backhaul.operations.pacing import rate_limit
from backhaul.operations.places import place_of, series_at
from backhaul.operations.progress import PushProgress, StreamProgress
from backhaul.operations.spooling import spool_space
from backhaul.pipeline.spool import Spool
from backhaul.pipeline.supervisor import Supervisor
from backhaul.pipeline.tee import Tee
from backhaul.planning.requirement import required_destinations
from backhaul.sources.base import NamedStream, SingleStream, Source, SourceSet
from backhaul.sources.file import FileSource
from backhaul.stores.multipart import Segment
from backhaul.stores.open import DEFAULT_PATIENCE, open_store
from backhaul.stores.retry import RetryPolicy
from backhaul.transforms import compress
from backhaul.transforms.digest import encode_crc64nvme
from backhaul.transforms.encrypt import StreamKey

if TYPE_CHECKING:
    from backhaul.operations.fan_out import FanOut  # the network and its keys take 100 ms to load

# At the start nothing is lost yet by failing: say soon that nobody is there.
START_PATIENCE = 3.0
EARLY_PATIENCE = 60.0
_STALL_MARGIN = 300.0
DEFAULT_SPOOL_SIZE = 20 * 10**9

# Words of a command line that were meant for --encrypt-to.
_KEY_BEGINNINGS = ("age1", "ssh-ed25519 ", "ssh-rsa ")


class PushOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to make of the stream, or streams.

    Attributes:
        name: the stream's name, where the source has just one and does not name it itself.
        compress: ``auto``, ``none`` or ``1`` to ``19``.
        require: how many destinations must hold it: ``all``, ``any`` or a number.
        expect: texts that the last 4 KiB of the raw stream must hold (of a single one: a set has its own).
        limit: bytes a second over all connections, by the time of day; None for no limit.
        allow_empty: whether a stream of no bytes is a backup.
        workers: compressing threads; None for one a core.
        patience: seconds for which a store that is ill or away is tried again.
        stall_timeout: seconds for which a destination may hold the stream up without taking anything; with
            several destinations the others go on without it then. None for somewhat more than the patience: who
            comes back in time is not dropped.
        spool: directory for what slow destinations have not taken yet, or None.
        spool_size: most bytes there, over all destinations.
        encrypt_to: recipients (``age1...`` or SSH public keys) that may read the backup; none for no encryption.
    """

    name: str = "data"
    compress: str = compress.AUTO
    require: str = "all"
    expect: tuple[str, ...] = ()
    limit: Timetable | None = None
    allow_empty: bool = False
    workers: int | None = None
    patience: float = DEFAULT_PATIENCE
    stall_timeout: float | None = None
    spool: str | None = None
    spool_size: int = DEFAULT_SPOOL_SIZE
    encrypt_to: tuple[str, ...] = ()


def push(
    destinations: Sequence[str],
    source: Source | SourceSet,
    options: PushOptions = PushOptions(),  # noqa: B008 - frozen
    *,
    fan_out: FanOut | None = None,
    progress: PushProgress | None = None,
    now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
) -> PushResult:
    """Make one backup from one stream, or from a set of them, in every destination.

    Args:
        destinations: SERIES, as on the command line; none, if there is a fan-out.
        source: the stream or streams; started here, ended here whatever happens.
        options: what to make of it.
        fan_out: other hosts that are to receive the same, as one destination more; or None. It gathers them, and
            lets them go, here.
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
    if not destinations and fan_out is None:
        raise UsageError("push has no destination", "no SERIES was given", "Write: backhaul push SERIES -- COMMAND")
    for text in destinations:
        if text.lower().startswith(_KEY_BEGINNINGS) or is_secret(text):
            raise UsageError(
                f"{redact_identities(text)[:24]}... is a key, and stands where a SERIES belongs",
                "--encrypt-to takes one recipient",
                "Give each recipient its own --encrypt-to; a directory of that name is written ./NAME",
            )
    if isinstance(source, SourceSet) and (options.expect or options.name != PushOptions().name):
        raise UsageError(
            "--name and --expect are for a single stream",
            f"{source.name} names its streams, and knows how they end",
            "Leave them out.",
        )
    required = required_destinations(options.require, len(destinations) + (fan_out is not None))
    locations = [series_at(text) for text in destinations]
    if len({place_of(location) for location in locations}) != len(locations):
        raise UsageError("push has a destination twice", ", ".join(destinations), "Name each SERIES once.")
    memory.settle_allocator()
    with contextlib.ExitStack() as stack:
        run = _Push(locations, source, options, setting, required, progress or PushProgress(), now, stack, fan_out)
        return run.run()


class _OutgoingStream:
    """One stream of a push, from its source to every destination."""

    def __init__(self, stream: NamedStream, codec: str, key: StreamKey | None) -> None:
        self.name = stream.name
        self.source = stream.source
        self.expect = stream.expect
        self.part = stream.part
        self.key = key
        self.file = names.stream_file(stream.name, codec, encrypted=key is not None)
        self.progress = StreamProgress(stream.name)
        self.encoder: StreamEncoder | None = None
        self.deliveries = 0
        self.settled = False
        self.detach: list[Callable[[], None]] = []

    @property
    def transcript(self) -> Transcript:
        """What the stream was; once it has ended well."""
        assert self.encoder is not None
        return self.encoder.transcript.result()


class _Push:
    def __init__(
        self,
        locations: Sequence[Location],
        source: Source | SourceSet,
        options: PushOptions,
        setting: str,
        required: int,
        progress: PushProgress,
        now: Callable[[], dt.datetime],
        stack: contextlib.ExitStack,
        fan_out: FanOut | None,
    ) -> None:
        self.fan_out = fan_out
        if fan_out is not None:
            stack.callback(fan_out.close)
        self.sources: SourceSet = (
            source if isinstance(source, SourceSet) else SingleStream(options.name, source, options.expect)
        )
        self.options = options
        self.setting = setting
        self.required = required
        self.progress = progress
        self.now = now
        self.workers = options.workers or memory.default_workers()
        self.group = Supervisor("push")
        self.codec = compress.codec_name(setting)
        self.recipients = recipients_of(options.encrypt_to)
        key = fresh_key(self.recipients)
        self.streams: list[_OutgoingStream] = []
        self.begin_lock = threading.Lock()
        self.record: Future[SourceRecord | None] = Future()
        self.spool = spool_space(options.spool, options.spool_size)
        limit = rate_limit(options.limit, self.group) if options.limit is not None else None
        self.sources.check()
        self.identity = source.identity if isinstance(source, FileSource) else None
        self.destinations: list[Destination] = []
        for location in locations:
            patience = min(options.patience, EARLY_PATIENCE)
            policy = RetryPolicy(patience, min(patience, START_PATIENCE), sleep=self.group.sleep)
            store = open_store(location, policy=policy, limit=limit)
            stack.callback(store.close)
            journal = self._open_journal(location)
            if journal is not None:
                stack.callback(journal.close)
            self.destinations.append(Destination(location, store, policy, journal, place=place_of(location)))
        journals = [d for d in self.destinations if d.journal is not None and not d.rewritten]
        # What is encrypted and may be gone on with is made at one rung, always: its key outlives the run, at several
        # destinations, and other frames sealed under it would give away both.
        one_rung = key is not None and self.identity is not None
        self.leveling = (
            Leveling(self.workers, memory.push_window(self.workers), resumable=bool(journals))
            if setting == compress.AUTO and not one_rung
            else None
        )
        self.beginning = Beginning(
            self.destinations,
            identity=self.identity,
            stream=options.name,
            codec=self.codec,
            setting=setting,
            recipients=self.recipients,
            key=key,
            now=now,
        )
        progress.destinations = [destination.progress for destination in self.destinations]
        progress.fan_out = fan_out

    def _open_journal(self, location: Location) -> UploadJournal | None:
        if self.identity is None:
            return None
        try:
            return UploadJournal(place_of(location), self.identity.path, self.options.name, text=location.text)
        except ConfigurationError:
            if location.kind == "local":
                return None  # a disk is written anew in any case
            raise

    @property
    def id(self) -> str:
        return self.beginning.id

    @property
    def living(self) -> list[Destination]:
        return self.beginning.living

    def run(self) -> PushResult:
        clock = time.monotonic()
        try:
            if self.fan_out is not None:
                self._gather(self.fan_out)
                clock = time.monotonic()  # (the waiting for receivers is not the push's time)
            # Receivers count as one; those who have given up already do not.
            received = self.fan_out is not None and self.fan_out.failure is None
            self.started = self.beginning.begin(self.required - received)
            with self.group:
                self._open_streams()
                self._wire()
            self._confirm()
            if self.fan_out is not None:
                self.fan_out.wait(reference=self._reference())
            if self._succeeded() < self.required:
                raise self._too_few()
        except BaseException as error:
            self._clean_up(error)
            raise
        finally:
            # The producers first: none may write into a pipe that nobody reads, or be waited for.
            for stream in self.streams:
                stream.source.abort()
            self.sources.abort()
        return self._result(time.monotonic() - clock)

    def _gather(self, fan_out: FanOut) -> None:
        """Wait for the receivers; a push that may do without them goes on without them."""
        try:
            fan_out.gather(store_expected=any(d.reachable_by_others for d in self.destinations))
        except BackhaulError as error:
            fan_out.give_up(error)
            if len(self.living) < self.required:
                raise

    def _succeeded(self) -> int:
        stored = sum(destination.committed is not None for destination in self.destinations)
        return stored + (self.fan_out is not None and self.fan_out.failure is None)

    def _reference(self) -> str | None:
        """Return the backup in a store that other hosts can reach, where it was committed to one."""
        return next(
            (f"{d.text}@{self.id}" for d in self.destinations if d.committed is not None and d.reachable_by_others),
            None,
        )

    # -- step 2: the streams -----------------------------------------------------------------------------

    def _open_streams(self) -> None:
        """Fix the state, and learn which streams it has."""
        opened = self.sources.open(self.group)
        for number, stream in enumerate(opened):
            names.check_stream_name(stream.name)
            key = self.beginning.key if number == 0 else fresh_key(self.recipients)
            self.streams.append(_OutgoingStream(stream, self.codec, key))
        self.progress.streams = [stream.progress for stream in self.streams]
        self.progress.tables.total = self.sources.total_tables
        self.lanes = max(1, min(self.sources.parallel, len(self.streams)))
        # Streams side by side share the cores; one more each, since they seldom all have work.
        self.lane_workers = self.workers if self.lanes == 1 else -(-self.workers // self.lanes) + 1
        self.unsettled = len(self.streams)
        self.undelivered = {id(destination): len(self.streams) for destination in self.living}

    def _wire(self) -> None:
        """Start every thread of the run; they end with the group."""
        todo = iter(self.streams)
        for number in range(self.lanes):
            self.group.start(functools.partial(self._lane, todo), f"lane-{number}")

    def _lane(self, todo: Iterator[_OutgoingStream]) -> None:
        """Send one stream after the other, each to its end in every destination."""
        while True:
            with self.group.condition:
                stream = next(todo, None)
            if stream is None:
                return
            if self.fan_out is not None:
                self._wait_for_definitions(stream)
            self._send(stream)
            with self.group.condition:
                self.group.wait_for(lambda stream=stream: stream.deliveries == 0)  # type: ignore[misc]
            for detach in stream.detach:
                detach()

    def _wait_for_definitions(self, stream: _OutgoingStream) -> None:
        """Begin with no rows before the definitions were read: who restores as they come needs those first."""
        if stream.part is not None and stream.part.section == DATA:
            # (Of the same database: those of others may be behind this stream in the queue.)
            own = [s for s in self.streams if s.part is not None and s.part.database == stream.part.database]
            schemas = [s for s in own if s.part is not None and s.part.section == SCHEMA]
            with self.group.condition:
                self.group.wait_for(lambda: all(schema.settled for schema in schemas))

    def _begin_fan_out(self, fan_out: FanOut) -> None:
        """Tell the receivers what is to come; the first stream's start has fixed the state that it is of."""
        with self.begin_lock:
            named = tuple(NamedStream(name=s.name, source=s.source, part=s.part) for s in self.streams)
            fan_out.begin(self.id, named, self.codec, self.sources.outline())

    def _send(self, stream: _OutgoingStream) -> None:
        """Start a stream's producer, and what takes its bytes from there to every destination."""
        group = self.group
        stream.source.start(group)
        tap: Callable[[bytes | memoryview, int], None] | None = None
        if self.fan_out is not None:
            self._begin_fan_out(self.fan_out)
            put = self.fan_out.put

            def tap(piece: bytes | memoryview, raw: int) -> None:
                put(stream.name, piece, raw, group.check)

        deliveries = []
        for destination in self.living:
            if not destination.needs_stream:
                continue
            delivery = destination.attach(
                group,
                stream.name,
                stream.file,
                patience=self.options.patience,
                stall_after=self.options.stall_timeout or self.options.patience + _STALL_MARGIN,
                spool=Spool(self.spool) if self.spool is not None else None,
                lanes=self.lanes,
            )
            if delivery is not None:
                deliveries.append((destination, delivery))
        stream.encoder = StreamEncoder(
            group,
            stream.source,
            self.setting,
            workers=self.lane_workers,
            expect=stream.expect,
            allow_empty=self.options.allow_empty,
            progress=stream.progress,
            key=stream.key,
            on_settled=functools.partial(self._settled, stream),
            tap=tap,
            levels=self._levels(deliveries),
            stored=bool(deliveries),
        )
        stream.detach = self._attach(deliveries)
        stream.deliveries = len(deliveries) + (self.fan_out is not None)
        stream.encoder.start(Tee([delivery.queue for _, delivery in deliveries]))
        for number, (destination, delivery) in enumerate(deliveries):
            work = functools.partial(self._deliver, destination, delivery, stream)
            group.start(work, f"deliver-{stream.name}-{number}")

    def _levels(self, deliveries: Sequence[tuple[Destination, Delivery]]) -> StreamLevels | None:
        """Return what decides on a stream's frames; with a journal each decision is in it first."""
        if self.leveling is None:
            return None
        journals = [d.journal for d, _ in deliveries if d.journal is not None and not d.rewritten]

        def record(frame: int, rung: int) -> None:
            for journal in journals:
                journal.chosen(frame, rung)

        return StreamLevels(self.leveling, self.beginning.recorded, record)

    def _attach(self, deliveries: Sequence[tuple[Destination, Delivery]]) -> list[Callable[[], None]]:
        """Have the deliveries, and the fan-out, count for the levels; return what ends that."""
        if self.leveling is None:
            return []
        lines = [self.leveling.attach(destination.text, delivery.line) for destination, delivery in deliveries]
        if self.fan_out is not None:
            lines.append(self.leveling.attach(self.fan_out.text, self.fan_out.line))
        return lines

    def _settled(self, stream: _OutgoingStream) -> None:
        """A stream has ended well; after the last one the source says what all of them are."""
        if self.fan_out is not None:
            self.fan_out.end_stream(stream.name, stream.transcript, self.group.check)
        with self.group.condition:
            self.unsettled -= 1
            last = self.unsettled == 0
        if last:
            record = self.sources.finish()
            if self.fan_out is not None:
                self.fan_out.end(record, self.group.check)
            self.record.set_result(record)
        with self.group.condition:
            stream.settled = True
            stream.deliveries -= self.fan_out is not None
            self.group.condition.notify_all()
        if not self.living and (self.fan_out is None or self.fan_out.failure is not None):
            raise self._too_few()

    # -- steps 3 and 4: each destination for itself ------------------------------------------------------

    def _deliver(self, destination: Destination, delivery: Delivery, stream: _OutgoingStream) -> None:
        assert stream.encoder is not None
        try:
            if destination.deliver(delivery, stream.encoder.transcript):
                with self.group.condition:
                    self.undelivered[id(destination)] -= 1
                    complete = self.undelivered[id(destination)] == 0
                # (The last stream's end was told to nobody before the record was there.)
                if complete:
                    destination.commit(self._manifest)
        finally:
            with self.group.condition:
                stream.deliveries -= 1
                self.group.condition.notify_all()
        if not self.living and (self.fan_out is None or self.fan_out.failure is not None):
            raise self._too_few()

    def _confirm(self) -> None:
        """See to the destinations that had the backup before this run resumed it for the others."""
        for destination in self.living:
            if not destination.needs_stream:
                destination.confirm(self.streams[0].transcript)

    def _manifest(self, stored: StoredStreams) -> Manifest:
        manifest = Manifest(
            format=manifest_format.FORMAT,
            version=manifest_format.VERSION,
            id=self.id,
            started=_iso(self.started),
            finished=_iso(self.now()),
            host=socket.gethostname(),
            tool=Tool(name="backhaul", version=version.VERSION),
            streams=tuple(
                self._stream_record(stream, number, stored[stream.name]) for number, stream in enumerate(self.streams)
            ),
            producers=tuple(stream.transcript.producer for stream in self.streams),
            source=self.record.result(),
        )
        keys = {stream.name: stream.key for stream in self.streams if stream.key is not None}
        if not keys:
            return manifest
        # From the first backup on that it opens, the key is nowhere on this host but in this process.
        for key in keys.values():
            drop_everywhere(key)
        for destination in self.destinations:
            destination.key_dropped()
        return authenticated(manifest, keys)

    def _stream_record(self, stream: _OutgoingStream, number: int, stored: tuple[Segment, ...]) -> StreamRecord:
        transcript, key = stream.transcript, stream.key
        encryption: EncryptionRecord | None = None
        raw = transcript.raw
        if key is not None:
            raw = RawBytes(size=raw.size, blake3=key.conceal(raw.blake3))
            encryption = EncryptionRecord(
                format=age.FORMAT,
                header_size=len(key.header),
                payload_size=transcript.payload_size,
                recipients=tuple(key_id(recipient.text) for recipient in self.recipients),
                mac=manifest_format.NO_MAC,
            )
        whole = stored[0] if [names.file_of(segment.key) for segment in stored] == [stream.file] else None
        return StreamRecord(
            name=stream.name,
            object=stream.file,
            raw=raw,
            stored=transcript.stored,
            codec=Codec(name=self.codec, frame_size=compress.FRAME_SIZE, setting=self.setting),
            frames=transcript.frames,
            seek_table=transcript.seek_table,
            encryption=encryption,
            producer=number,
            part=stream.part,
            store=_store_record(whole.stored) if whole is not None else StoreRecord(),
            segments=()
            if whole is not None
            else tuple(
                SegmentRecord(
                    object=names.file_of(segment.key),
                    size=segment.size,
                    crc64nvme=encode_crc64nvme(segment.crc64nvme),
                    store=_store_record(segment.stored),
                )
                for segment in stored
            ),
        )

    # -- the end -----------------------------------------------------------------------------------------

    def _clean_up(self, error: BaseException) -> None:
        """Take back what uncommitted destinations hold, side by side, and not for long.

        After an interruption, or when stores are away, what can be resumed is left for the next run instead.
        """
        if self.fan_out is not None:
            self.fan_out.abort(_in_words(error))
        passing = isinstance(error, KeyboardInterrupt | StoreUnavailableError | StoreStalledError)
        threads = [
            threading.Thread(target=destination.leave if passing else destination.clean_up, daemon=True)
            for destination in self.destinations
            if destination.committed is None
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 4 * CLEANUP_PATIENCE
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _result(self, seconds: float) -> PushResult:
        transcripts = [stream.transcript for stream in self.streams]
        single = transcripts[0] if len(transcripts) == 1 else None
        return PushResult(
            id=self.id,
            stream=self.streams[0].name if single else None,
            streams=tuple(
                PushedStream(
                    name=stream.name,
                    raw_size=transcript.raw.size,
                    stored_size=transcript.stored.size,
                    seconds=transcript.producer.seconds,
                )
                for stream, transcript in zip(self.streams, transcripts, strict=True)
            ),
            raw_size=sum(transcript.raw.size for transcript in transcripts),
            stored_size=sum(transcript.stored.size for transcript in transcripts),
            seconds=seconds,
            frames=sum(transcript.frames for transcript in transcripts),
            remark=self._remark(),
            recipients=tuple(key_id(recipient.text) for recipient in self.recipients),
            raw_blake3=single.raw.blake3 if single else None,
            source=self.record.result(),
            destinations=tuple(destination.result() for destination in self.destinations),
            fan_out=self.fan_out.result() if self.fan_out is not None else None,
            required=self.required,
            memory=self._memory(transcripts),
            peak_memory=memory.peak_memory(),
            compression=self.leveling.used() if self.leveling is not None else None,
        )

    def _memory(self, transcripts: Sequence[Transcript]) -> MemoryBound:
        bound = memory.push_bound(
            self.lane_workers,
            self.setting,
            [destination.rules for destination in self.destinations if destination.rules is not None],
            max(transcript.stored.size for transcript in transcripts),
            max(transcript.frames for transcript in transcripts),
            encrypted=bool(self.recipients),
            lanes=self.lanes,
        )
        if self.fan_out is None:
            return bound
        more = memory.sender_terms(self.fan_out.options.memory)
        return MemoryBound(terms={**bound.terms, **more}, total=bound.total + sum(more.values()))

    def _remark(self) -> str | None:
        heads = [stream.encoder.head for stream in self.streams if stream.encoder is not None]
        kind = next((kind for head in heads if (kind := encrypted_as(head)) is not None), None)
        if not self.recipients or kind is None:
            return None
        return f"the stream was encrypted already ({kind}): --encrypt-to has done it once more"

    def _too_few(self) -> BackhaulError:
        """Return the error that says which destinations failed, why, and which hold the backup all the same."""
        failures = [(d.text, d.failure) for d in self.destinations if d.failure is not None]
        committed = [d.text for d in self.destinations if d.committed is not None]
        parts = len(self.destinations)
        if self.fan_out is not None:
            parts += 1
            if self.fan_out.failure is not None:
                failures.append((self.fan_out.text, self.fan_out.failure))
            else:
                committed.append(self.fan_out.text)
        if parts == 1 and failures:
            return failures[0][1]
        error = FailedError(
            f"{len(committed)} of {self.required} required destinations hold backup {self.id}",
            "; ".join(f"{failure.what}: {failure.why}" for _, failure in failures),
            (f"Committed and whole: {', '.join(committed)}. " if committed else "")
            + " ".join(f"{text}: {failure.todo}" for text, failure in failures),
        )
        fates = [msgspec.to_builtins(destination.result()) for destination in self.destinations]
        error.details = {"id": self.id, "required": self.required, "destinations": fates}
        if self.fan_out is not None:
            error.details["fan_out"] = msgspec.to_builtins(self.fan_out.result())
        return error


def _store_record(stored: StoredObject) -> StoreRecord:
    return StoreRecord(etag=stored.etag, checksum=stored.checksum, modified=stored.modified_ns)


def _in_words(error: BaseException) -> str:
    if isinstance(error, BackhaulError):
        return f"{error.what}: {error.why}" if error.why else error.what
    return "it was interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__


def _iso(time: dt.datetime) -> str:
    return time.astimezone(dt.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
