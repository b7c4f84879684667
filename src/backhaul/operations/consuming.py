"""What a receiver does with a session's streams: decode, hash, hold the last piece back, and hand on to targets.

A target gets its end only after the ENDs were compared with what has come: of its stream, and, where a session is a
single stream, of the session. Until then the last piece of each stream is held back, so that no consumer can think
that it has seen everything.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator

from backhaul.errors import IntegrityError, TargetError
from backhaul.model.fan_out import ReceivedStream, Start, StreamEnd
from backhaul.model.manifest import (
    DATA,
    SCHEMA,
    WHOLE,
    Codec,
    RawBytes,
    StoredBytes,
    StoreRecord,
    StreamPart,
    StreamRecord,
)
from backhaul.operations import memory
from backhaul.pipeline.ordered_map import OrderedMap
from backhaul.pipeline.recycler import Recycler
from backhaul.pipeline.supervisor import Supervisor
from backhaul.targets.base import Target
from backhaul.targets.sections import RestoreTarget
from backhaul.transforms.compress import FrameDecompressor
from backhaul.transforms.digest import StreamDigest

_QUEUE_BYTES = 8 << 20
_PARKED_BYTES = 128 << 20


class StreamSink:
    """One stream on its way to its targets. ``put`` and ``end`` come from one thread; another runs ``run``.

    Args:
        group: whose stop ends all waiting.
        name: the stream's.
        codec: ``zstd`` or ``none``.
        on_delivered: told how many bytes the targets were given.
        recycler: where the pieces' byte arrays come from, and go back to.
    """

    def __init__(
        self, group: Supervisor, name: str, codec: str, on_delivered: Callable[[int], None], recycler: Recycler
    ) -> None:
        self._recycler = recycler
        self.name = name
        self.received: ReceivedStream | None = None
        self.running = False
        self._group = group
        self._codec = codec
        self._on_delivered = on_delivered
        self._pieces: deque[tuple[memoryview, int]] = deque()
        self._held = 0
        self._chunks = 0
        self._end: StreamEnd | None = None

    def put(self, body: memoryview, raw: int) -> None:
        """Add a piece; waits while too many wait. A stream whose turn has not come may wait in memory for a while.

        Raises:
            TargetError: too much of it waits for its turn.
            StoppedError: the group stopped.
        """
        with self._group.condition:
            if not self.running and self._held > _PARKED_BYTES:
                raise TargetError(
                    f"The stream {self.name} came too early",
                    f"more than {_PARKED_BYTES >> 20} MiB of it would wait in memory for the others before it",
                    "Keep the streams in files (-o DIR/) and restore them from there.",
                )
            self._group.wait_for(lambda: not self.running or self._held < _QUEUE_BYTES)
            self._pieces.append((body, raw))
            self._held += len(body)
            self._chunks += 1
            self._group.condition.notify_all()

    def end(self, end: StreamEnd) -> None:
        """Take the stream's END.

        Raises:
            IntegrityError: chunks are missing.
        """
        with self._group.condition:
            if end.chunks != self._chunks:
                raise IntegrityError(
                    f"The stream {self.name} is not whole",
                    f"{self._chunks} chunks have come of {end.chunks}",
                    "The sender must send again.",
                )
            self._end = end
            self._group.condition.notify_all()

    def run(self, target: Target, released: Callable[[], bool]) -> None:
        """Hand the stream to its target, to the end.

        Args:
            target: started; committed here once it has taken everything.
            released: whether the last piece may go out; looked at whenever the group's condition is notified.

        Raises:
            IntegrityError: it is not what was sent.
            TargetError: the target has failed.
            StoppedError: the group stopped.
        """
        with self._group.condition:
            self.running = True
            self._group.condition.notify_all()
        digest = StreamDigest(crc=False)
        held: memoryview | None = None
        for piece in self._decoded():
            digest.feed(piece)
            if held is not None:
                self._write(target, held)
            held = piece
        self._compare(digest)
        with self._group.condition:
            self._group.wait_for(released)
        if held is not None:
            self._write(target, held)
        target.commit()

    def _write(self, target: Target, piece: memoryview) -> None:
        target.write(piece)
        self._on_delivered(len(piece))
        self._let_go(piece)

    def _let_go(self, piece: memoryview) -> None:
        """Let a piece's memory be used again; nobody looks at it any more."""
        buffer = piece.obj
        piece.release()
        if isinstance(buffer, bytearray):
            self._recycler.give(buffer)

    def _compare(self, digest: StreamDigest) -> None:
        assert self._end is not None
        if (digest.size, digest.blake3) != (self._end.size, self._end.blake3):
            raise IntegrityError(
                f"The stream {self.name} is not what was sent",
                f"{digest.size} bytes have come with another hash than the {self._end.size} that were sent",
                "The sender must send again; a host on the way has changed it.",
            )
        self.received = ReceivedStream(name=self.name, size=digest.size, blake3=digest.blake3)

    def _taken(self) -> Iterator[tuple[memoryview, int]]:
        while True:
            with self._group.condition:
                self._group.wait_for(lambda: bool(self._pieces) or self._end is not None)
                if not self._pieces:
                    return
                piece = self._pieces.popleft()
                self._held -= len(piece[0])
                self._group.condition.notify_all()
            yield piece

    def _decoded(self) -> Iterator[memoryview]:
        if self._codec == "none":
            for body, _ in self._taken():
                yield body
            return

        def make_worker() -> Callable[[tuple[memoryview, int]], memoryview]:
            decompressor = FrameDecompressor()

            def work(item: tuple[memoryview, int]) -> memoryview:
                body, raw = item
                out = memoryview(self._recycler.take(raw))
                decompressor.decompress_into(body, out)
                self._let_go(body)
                return out

            return work

        workers = memory.default_workers()
        yield from OrderedMap(
            self._group, self._taken(), make_worker, workers=workers, window=workers + 2, name=f"decode-{self.name}"
        )


class StreamsConsumer:
    """Hands a session's streams to targets: one target set for each stream, all at once.

    Args:
        group: whose threads work; a failure stops it.
        start: what is to come.
        make_target: gives the target of a stream, by its name; started here.
        on_delivered, recycler: see ``StreamSink``.
    """

    def __init__(
        self,
        group: Supervisor,
        start: Start,
        make_target: Callable[[str], Target],
        on_delivered: Callable[[int], None],
        recycler: Recycler,
    ) -> None:
        self.sinks = [StreamSink(group, stream.name, start.codec, on_delivered, recycler) for stream in start.streams]
        self.remarks: list[str] = []
        self.shortfalls: list[str] = []
        self._group = group
        self._whole = False
        self._targets: list[Target] = []
        for sink in self.sinks:
            target = make_target(sink.name)
            self._targets.append(target)
            target.start(0, group)
            group.start(functools.partial(sink.run, target, lambda: self._whole), f"sink-{sink.name}")

    def finish(self) -> None:
        """The session was whole: let the last pieces go."""
        with self._group.condition:
            self._whole = True
            self._group.condition.notify_all()

    def commit(self) -> None:
        """See ``RestoreConsumer.commit``."""

    def abort(self) -> None:
        """Kill the consumers, remove the files; harmless after the end."""
        for target in self._targets:
            target.abort()


class RestoreConsumer:
    """Hands a session's streams to a database or directory, phase by phase, the streams of a phase side by side.

    Args:
        group: whose threads work; a failure stops it.
        start: what is to come; its source is known.
        target: what to restore into; checked here, before anything of it is touched.
        on_delivered, recycler: see ``StreamSink``.

    Raises:
        ConfigurationError: it does not fit.
        TargetError: it can't begin.
    """

    def __init__(
        self,
        group: Supervisor,
        start: Start,
        target: RestoreTarget,
        on_delivered: Callable[[int], None],
        recycler: Recycler,
    ) -> None:
        self.sinks = [StreamSink(group, stream.name, start.codec, on_delivered, recycler) for stream in start.streams]
        self.target = target
        self._group = group
        self._whole = False
        self._done = 0
        self._by_name = {sink.name: sink for sink in self.sinks}
        assert start.source is not None
        target.check(start.source, [_record(stream.name, stream.part) for stream in start.streams])
        # Every stream of a phase must be taken as it comes: the sender makes them side by side.
        phases = target.phases(max(1, len(start.streams)))
        taken = {step.stream for phase in phases for step in phase.steps}

        # What comes after the rows (a rename into place, indexes) waits until the sender has said that all was whole.
        sections = {stream.name: stream.part.section if stream.part is not None else WHOLE for stream in start.streams}
        rows = [
            number
            for number, phase in enumerate(phases)
            if any(sections[step.stream] in (SCHEMA, DATA, WHOLE) for step in phase.steps)
        ]

        def run() -> None:
            begun = 0
            for number, phase in enumerate(phases):
                if rows and number > rows[-1]:
                    with group.condition:
                        group.wait_for(lambda: self._whole)
                phase.before()
                for step in phase.steps:
                    group.start(self._step(self._by_name[step.stream], step.make), f"into-{step.stream}")
                begun += len(phase.steps)
                # (Not until its threads have ended: nobody is notified of that.)
                with group.condition:
                    group.wait_for(lambda begun=begun: self._done == begun)  # type: ignore[misc]

        group.start(run, "restore")
        for sink in self.sinks:
            if sink.name not in taken:  # roles, say, where they are not asked for: read, compared, and let go
                group.start(functools.partial(sink.run, _Nowhere(), lambda: True), f"skip-{sink.name}")

    @property
    def remarks(self) -> list[str]:
        """What its operator may want to know."""
        return self.target.remarks

    @property
    def shortfalls(self) -> list[str]:
        """What could not be brought back."""
        return self.target.shortfalls

    def _step(self, sink: StreamSink, make: Callable[[], Target]) -> Callable[[], None]:
        def work() -> None:
            target = make()
            try:
                target.start(0, self._group)
                sink.run(target, lambda: True)
            except BaseException:
                target.abort()
                raise
            with self._group.condition:
                self._done += 1
                self._group.condition.notify_all()

        return work

    def finish(self) -> None:
        """See ``StreamsConsumer.finish``. (Each stream's own END has let its last piece go.)"""
        with self._group.condition:
            self._whole = True
            self._group.condition.notify_all()

    def commit(self) -> None:
        """Everything was taken: let the database be seen.

        Raises:
            TargetError: it could not be finished.
        """
        self.target.commit()

    def abort(self) -> None:
        """Remove what was begun; harmless after the commit."""
        self.target.abort()


class _Nowhere:
    """A target that takes everything and keeps nothing."""

    name = "nowhere"

    def start(self, raw_size: int, group: Supervisor) -> None:
        """See ``Target.start``."""

    def write(self, data: memoryview) -> None:
        """See ``Target.write``."""

    def commit(self) -> None:
        """See ``Target.commit``."""

    def abort(self) -> None:
        """See ``Target.abort``."""


def _record(name: str, part: StreamPart | None) -> StreamRecord:
    """Return a stream's record as far as targets ask for it: how large it is nobody knows yet."""
    return StreamRecord(
        name=name,
        object=name,
        raw=RawBytes(size=0, blake3=""),
        stored=StoredBytes(size=0, blake3="", crc64nvme=""),
        codec=Codec(name="none", frame_size=0, setting="none"),
        frames=0,
        producer=0,
        store=StoreRecord(),
        part=part,
    )
