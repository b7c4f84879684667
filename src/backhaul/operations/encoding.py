"""From a source's bytes to what is stored: read, hash, compress in parallel, seal in parallel, hash again, hand on.

What the stream turned out to be is known once its producer was seen to have ended well; until then nobody is told
that it ended.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future

import msgspec

from backhaul.errors import SourceError
from backhaul.formats import seekable
from backhaul.model.manifest import ProducerRecord, RawBytes, SeekTablePosition, StoredBytes
from backhaul.operations import memory
from backhaul.operations.leveling import StreamLevels
from backhaul.operations.progress import StreamProgress
from backhaul.pipeline.buffers import BufferPool
from backhaul.pipeline.ordered_map import OrderedMap
from backhaul.pipeline.supervisor import Supervisor
from backhaul.pipeline.tee import Tee
from backhaul.sources.base import Source
from backhaul.transforms import compress, encrypt
from backhaul.transforms.digest import StreamDigest, encode_crc64nvme
from backhaul.transforms.encrypt import StreamKey

MARKER_WINDOW = 4 << 10
HEAD_SIZE = 64
# What is passed on uncompressed is read in blocks that stay in the processor's cache until they are sealed.
_PASSED_BLOCK = 1 << 20


class Transcript(msgspec.Struct, frozen=True):
    """What the whole stream turned out to be: the same for every destination.

    ``payload_size`` is what is inside the encryption; 0 without one.
    """

    raw: RawBytes
    stored: StoredBytes
    crc: int
    frames: int
    seek_table: SeekTablePosition | None
    payload_size: int
    producer: ProducerRecord


class _Block(msgspec.Struct, frozen=True):
    number: int
    buffer: memoryview
    size: int


class _Frame(msgspec.Struct, frozen=True):
    stored: bytes
    raw_size: int


class StreamEncoder:
    """Encodes one stream; ``transcript`` is settled when it has ended well, and before its takers are told so.

    ``head`` are the raw stream's first bytes.

    Args:
        group: whose threads work.
        source: where the stream comes from; started by the caller.
        setting: a normal ``--compress`` setting.
        workers: compressing threads.
        expect: texts that the last 4 KiB of the raw stream must hold.
        allow_empty: whether a stream of no bytes is a backup.
        progress: counters to keep up to date.
        key: what the stream is encrypted with, or None.
        on_settled: told when the transcript is there, before the stream's takers are told of its end.
        tap: given every frame as it is made, unsealed, with its raw size; it may wait, and keeps nothing of it. None
            for nobody.
        levels: what the frames are compressed at, for the setting ``auto``; None for the fastest way always.
        stored: whether anybody stores the stream: else nothing of what would be stored is made or hashed.
    """

    def __init__(
        self,
        group: Supervisor,
        source: Source,
        setting: str,
        *,
        workers: int,
        expect: tuple[str, ...],
        allow_empty: bool,
        progress: StreamProgress,
        key: StreamKey | None = None,
        on_settled: Callable[[], None] = lambda: None,
        tap: Callable[[bytes | memoryview, int], None] | None = None,
        levels: StreamLevels | None = None,
        stored: bool = True,
    ) -> None:
        self._on_settled = on_settled
        self._tap = tap
        self._levels = levels if setting == compress.AUTO else None
        self._stored = stored
        self.transcript: Future[Transcript] = Future()
        self._group = group
        self._source = source
        self._setting = setting
        self._framed = compress.codec_name(setting) == "zstd"
        self._workers = workers
        self._expect = expect
        self._markers = [os.fsencode(text) for text in expect]
        self._allow_empty = allow_empty
        self._progress = progress
        self._key = key
        self._raw_digest = StreamDigest(crc=False)
        self.head = b""
        self._tail = b""
        self._producer: ProducerRecord | None = None
        self._table = seekable.SeekTable()
        self._seek_table: SeekTablePosition | None = None
        self._payload_size = 0

    def start(self, tee: Tee) -> None:
        """Start the threads: the stream goes into the tee, and its end too if it is a good one."""
        if not self._framed and not self._stored:
            self._group.start(lambda: self._pass_through(tee), "pass-through")
            return
        window = memory.push_window(self._workers)
        pool = BufferPool(self._group, window + 1, compress.FRAME_SIZE)

        def make_worker() -> Callable[[_Block], _Frame]:
            compressor = compress.FrameCompressor(self._setting)
            if self._levels is not None:
                self._levels.leveling.worker()

            def work(block: _Block) -> _Frame:
                stored = self._compressed(compressor, block)
                pool.give(block.buffer)
                return _Frame(stored, block.size)

            return work

        frames = OrderedMap(
            self._group, self._blocks(pool), make_worker, workers=self._workers, window=window, name="compress"
        )
        pieces = self._pieces(frames)
        if self._key is not None and self._stored:
            pieces = self._sealed(pieces, self._key)
        self._group.start(lambda: self._assemble(pieces, tee), "assemble")

    def _compressed(self, compressor: compress.FrameCompressor, block: _Block) -> bytes:
        """Return a block's frame, at the rung that suits the time, and tell how it went."""
        view = block.buffer[: block.size]
        levels = self._levels
        if levels is None:
            return compressor.compress(view)
        rung = 0

        def choose() -> int:
            nonlocal rung
            rung = levels.choose(block.number)
            return rung

        began, before = time.monotonic(), time.thread_time()
        stored = compressor.compress(view, choose)
        cpu, wall = time.thread_time() - before, time.monotonic() - began
        levels.leveling.made(None if compressor.passed else rung, block.size, len(stored), cpu, wall)
        return stored

    def _pass_through(self, tee: Tee) -> None:
        """Hand on what is neither compressed nor stored, as it is read: in one thread, out of one buffer."""
        assert self._tap is not None
        buffer = memoryview(bytearray(_PASSED_BLOCK))
        while True:
            size = self._fill(buffer)
            if size:
                self._take_note(buffer[:size])
                self._tap(buffer[:size], size)
                self._progress.stored += size
            if size < len(buffer):
                break
        self._producer = self._checked_producer()
        self._assemble((), tee)

    def _fill(self, buffer: memoryview) -> int:
        """Read until the buffer is full or the stream ends; return the bytes read."""
        size = 0
        while size < len(buffer) and (count := self._source.read_into(buffer[size:])):
            size += count
            self._progress.raw += count
        return size

    def _take_note(self, block: memoryview) -> None:
        """Hash what was read, and keep the stream's beginning and end."""
        self.head = self.head or bytes(block[:HEAD_SIZE])
        self._raw_digest.feed(block)
        self._tail = (self._tail + bytes(block[-MARKER_WINDOW:]))[-MARKER_WINDOW:]

    def _blocks(self, pool: BufferPool) -> Iterator[_Block]:
        """Read the stream in blocks; its end is only its end when the producer says so too."""
        for number in itertools.count():
            buffer = pool.take()
            began = time.monotonic()
            size = self._fill(buffer)
            if self._levels is not None and size:
                self._levels.read(size, time.monotonic() - began)
            if size:
                self._take_note(buffer[:size])
                yield _Block(number, buffer, size)
            if size < len(buffer):
                break
        if self._levels is not None:
            self._levels.ended()
        self._producer = self._checked_producer()

    def _checked_producer(self) -> ProducerRecord:
        record = self._source.finish()
        if self._raw_digest.size == 0 and not self._allow_empty:
            raise SourceError(
                f"The stream is empty: {self._source.name}",
                "it ended without a single byte",
                "If an empty backup is what you want, say so with --allow-empty.",
            )
        missing = [text for text, marker in zip(self._expect, self._markers, strict=True) if marker not in self._tail]
        if missing:
            raise SourceError(
                f"The stream does not end as it should: {self._source.name}",
                "its last 4 KiB do not hold " + ", ".join(repr(text) for text in missing),
                "The dump is not whole, or --expect names the wrong text. Nothing was committed.",
            )
        shown = tuple(marker.decode(errors="backslashreplace") for marker in self._markers)
        return msgspec.structs.replace(record, markers=(*record.markers, *shown))

    def _pieces(self, frames: OrderedMap[_Block, _Frame]) -> Iterator[bytes]:
        """Yield what is stored, in order: the frames, and then their seek table."""
        for frame in frames:
            if self._tap is not None:
                self._tap(frame.stored, frame.raw_size)
            if self._framed:
                self._table.append(len(frame.stored), frame.raw_size)
            yield frame.stored
        if not self._framed:
            return
        if len(self._table) == 0:
            # An empty stream still is one frame, so that any decoder accepts the object.
            empty = compress.FrameCompressor(self._setting).compress(memoryview(b""))
            if self._tap is not None:
                self._tap(empty, 0)
            self._table.append(len(empty), 0)
            yield empty
        encoded = seekable.encode(self._table)
        self._seek_table = SeekTablePosition(offset=self._table.stored_size, size=len(encoded))
        for start in range(0, len(encoded), compress.FRAME_SIZE):
            yield encoded[start : start + compress.FRAME_SIZE]

    def _sealed(self, pieces: Iterator[bytes], key: StreamKey) -> Iterator[bytes]:
        """Yield the age file that the pieces make. Chunks ask nothing of where frames end, so they are cut anew."""

        window = memory.push_window(self._workers)
        sealed = OrderedMap(
            self._group,
            encrypt.batches(self._counted(pieces)),
            lambda: key.cipher().seal,
            workers=self._workers,
            window=window,
            name="seal",
        )
        yield key.header
        yield from sealed

    def _counted(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            self._payload_size += len(piece)
            yield piece

    def _assemble(self, pieces: Iterable[bytes], tee: Tee) -> None:
        """Put the pieces into every queue, and settle what the stream is."""
        digest = StreamDigest()
        size = self._progress.stored
        for piece in pieces:
            size += len(piece)
            self._progress.stored = size
            if self._stored:
                digest.feed(piece)
                tee.put(piece)
        assert self._producer is not None  # the iteration above ends well only after it was set
        self.transcript.set_result(
            Transcript(
                raw=RawBytes(size=self._raw_digest.size, blake3=self._raw_digest.blake3),
                stored=StoredBytes(size=size, blake3=digest.blake3, crc64nvme=encode_crc64nvme(digest.crc64nvme)),
                crc=digest.crc64nvme,
                frames=len(self._table),
                seek_table=self._seek_table,
                payload_size=self._payload_size,
                producer=self._producer,
            )
        )
        self._on_settled()
        tee.end()
