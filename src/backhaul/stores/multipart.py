"""One stream of pieces into one store: cut into segments and parts, sent side by side, made visible on request.

A stream is one object, or several, its *segments*, where one can't hold it (``formats.part_sizes``). Segments hold
whole pieces, so that each can be decoded alone; parts are cut anywhere.

Memory (``memory_bound``): for stores whose parts are gathered, a buffer that fills, one that a slow try of a part
that was sent twice may still read, and those under way: ``parallel`` of them, or as many as fit
``sending.MAX_UNDER_WAY`` once parts have grown with the stream, and at least one. For the others
``parallel + 1`` pieces.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from backhaul.errors import IntegrityError
from backhaul.model.objects import StoredObject, Upload, UploadedPart
from backhaul.pipeline.supervisor import Supervisor
from backhaul.planning.concurrency import UploadConcurrency
from backhaul.planning.hedging import HedgePolicy
from backhaul.stores.base import PartRules, Store
from backhaul.stores.body import PartBody
from backhaul.stores.sending import MAX_UNDER_WAY, PartJob, PartSender
from backhaul.transforms.digest import combine_crc64nvme, crc64nvme


def memory_bound(rules: PartRules, largest_piece: int, stored_size: int = 0) -> int:
    """Return the most bytes a writer holds, for a stream of that stored size."""
    if not rules.buffered:
        return (rules.parallel + 1) * largest_piece
    part = rules.layout.largest_part(stored_size)
    under_way = max(1, min(rules.parallel, MAX_UNDER_WAY // part))
    return (under_way + 2) * part


_PART_MD5 = re.compile(r'"?([0-9a-f]{32})"?')


class Ledger(Protocol):
    """What an earlier run of the same stream left in the store, and the record for a later one."""

    def upload(self, segment: int, key: str) -> Upload | None:
        """Return the upload that was begun for a segment, or None."""
        ...

    def begun(self, segment: int, key: str, upload: Upload) -> None:
        """Note an upload, before its first part is sent."""
        ...

    def known(self, segment: int, number: int, body: memoryview) -> UploadedPart | None:
        """Return the part if the store holds these very bytes as it. Called from many threads."""
        ...

    def acknowledged(self, segment: int, part: UploadedPart, body: memoryview) -> None:
        """Note a part that the store has acknowledged. Called from many threads."""
        ...


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """A committed object of a stream."""

    key: str
    size: int
    crc64nvme: int
    stored: StoredObject


class _Open:
    """A segment in the making."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.key = ""
        self.upload: Upload | None = None
        self.parts: dict[int, UploadedPart] = {}
        self.next_part = 1
        self.size = 0
        self.sent = 0
        self.crc = 0


class StreamWriter:
    """Writes one stream. ``write`` and ``finish`` come from one thread; parts leave in others.

    Nothing is visible before ``commit``, and nothing is asked of the store before the first part is full: a
    small stream is a single request.

    Args:
        store: where to.
        rules: how the store wants this stream cut.
        key_of: the object's name for a segment's number, counted from 1; 0 is a stream in a single request.
        group: whose stop ends all waiting.
        on_sent: told the bytes of each part that the store has, and whether it had them from an earlier run.
        on_progress: told the bytes that go out.
        ledger: for streams that can be read again, None for others.
        on_failure: told when a part has failed for good, so that whoever waits for the next piece need not.
    """

    def __init__(
        self,
        store: Store,
        rules: PartRules,
        key_of: Callable[[int], str],
        group: Supervisor,
        *,
        on_sent: Callable[[int, bool], None],
        on_progress: Callable[[int], None] = lambda count: None,
        ledger: Ledger | None = None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._rules = rules
        self._key_of = key_of
        self._group = group
        self._on_sent = on_sent
        self._on_progress = on_progress
        self._ledger = ledger
        buffered = self._rules.buffered
        self._sender = PartSender(
            group,
            f"send-{key_of(0).rpartition('/')[2]}",
            UploadConcurrency(self._rules.parallel),
            HedgePolicy() if buffered and self._rules.hedged else None,
            on_failure=on_failure,
        )
        self._lock = threading.Lock()
        self._spare: list[bytearray] = []
        self._buffer: bytearray | None = None
        self._filled = 0
        self._largest_piece = 0
        self._segments = [_Open(1)]
        self._single: memoryview | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """Every name under which an object may have become visible."""
        return tuple({self._key_of(0): None, **{s.key: None for s in self._segments if s.key}})

    @property
    def hedges(self) -> int:
        """How many parts were tried twice because the first try was slow."""
        return self._sender.hedges

    def backlog(self) -> tuple[int, int]:
        """Return the bytes that wait here to go out, and how many can before ``write`` waits."""
        if not self._rules.buffered:
            return self._sender.backlog, self._sender.limit * self._largest_piece
        segment = self._segments[-1]
        part = self._rules.layout.part_size(segment.number, segment.next_part)
        under_way = max(part, min(self._sender.limit * part, MAX_UNDER_WAY))
        return self._sender.backlog + self._filled, under_way + part

    def throttled(self) -> None:
        """Note that the store asked for fewer requests."""
        self._sender.throttled()

    def fail(self, error: BaseException) -> None:
        """Make ``write`` and ``finish`` fail with that error, now."""
        self._sender.fail(error)

    def check(self) -> None:
        """Raise what has failed, if anything has.

        Raises:
            StoreError: a part could not be stored.
        """
        self._sender.check()

    def write(self, piece: bytes) -> None:
        """Take the next piece of the stream; waits while too many parts are under way.

        Raises:
            StoreError: a part could not be stored; nothing of the stream will ever be visible.
        """
        segment = self._segments[-1]
        if self._rules.buffered and segment.size and self._capacity_left(segment) < len(piece):
            self._flush()
            segment = _Open(segment.number + 1)
            self._segments.append(segment)
        segment.size += len(piece)
        self._largest_piece = max(self._largest_piece, len(piece))
        segment.crc = crc64nvme(piece, segment.crc)
        if not self._rules.buffered:
            self._send(segment, memoryview(piece), None)
            return
        rest = memoryview(piece)
        while rest:
            size = self._rules.layout.part_size(segment.number, segment.next_part)
            if self._buffer is None:
                self._buffer = self._take_buffer(size)
            taken = min(len(rest), size - self._filled)
            # (Into a view: a byte array would make another one of what it is given, and copy that.)
            memoryview(self._buffer)[self._filled : self._filled + taken] = rest[:taken]
            self._filled += taken
            rest = rest[taken:]
            if self._filled == size:
                self._flush()

    def finish(self) -> None:
        """Send what is left and wait until the store has acknowledged every byte.

        Raises:
            StoreError: a part could not be stored.
        """
        if self._rules.buffered and self._segments[0].upload is None:
            # All of it fits one request, which makes it visible: that has to wait for ``commit``.
            filled = self._buffer if self._buffer is not None else bytearray()
            self._single = memoryview(filled)[: self._filled]
            return
        self._flush()
        self._sender.drain()

    def commit(self, checksum: int) -> tuple[Segment, ...]:
        """Make the stream's objects visible; ``checksum`` is the CRC64NVME that all of it must have.

        Raises:
            IntegrityError: what was sent is not what the checksum is of.
            PreconditionError: a key is taken.
        """
        if self._single is not None:
            return (self._put(self._single, checksum),)
        if self._segments[0].upload is None:  # an empty stream in a store whose parts are not gathered
            return (self._put(memoryview(b""), checksum),)
        whole = 0
        for segment in self._segments:
            combined = 0
            for number in range(1, segment.next_part):
                part = segment.parts[number]
                combined = combine_crc64nvme(combined, part.crc64nvme, part.size)
            self._compare(segment.key, combined, segment.crc)
            whole = combine_crc64nvme(whole, segment.crc, segment.size)
        self._compare(self._key_of(0), whole, checksum)
        done = []
        for segment in self._segments:
            assert segment.upload is not None
            parts = [segment.parts[number] for number in range(1, segment.next_part)]
            stored = self._store.complete(segment.upload, parts, segment.crc)
            segment.upload = None
            done.append(Segment(key=segment.key, size=segment.size, crc64nvme=segment.crc, stored=stored))
        return tuple(done)

    def abort(self, patience: float = 3.0) -> None:
        """Forget the stream: parts under way get a moment to end, and then the store is told.

        Objects that ``commit`` completed stay: whoever calls knows whether they are to go.

        Raises:
            StoreError: the store could not be told; ``clean`` will find the uploads.
        """
        self._sender.close()
        idle = self._sender.wait_idle(patience)
        uploads = [segment.upload for segment in self._segments if segment.upload is not None]
        for upload in uploads:
            self._store.abort(upload)
        if uploads and not idle and self._sender.wait_idle(patience):
            # A part that was under way may have arrived after the abort, and would keep its bytes.
            for upload in uploads:
                self._store.abort(upload)
        for segment in self._segments:
            segment.upload = None

    def close(self) -> None:
        """Let the sending threads end."""
        self._sender.close()

    # -- inside ----------------------------------------------------------------------------------------

    def _capacity_left(self, segment: _Open) -> int:
        return self._rules.layout.capacity(segment.number) - segment.size

    def _flush(self) -> None:
        if not self._filled:
            return
        buffer, size = self._buffer, self._filled
        assert buffer is not None
        self._buffer, self._filled = None, 0
        self._send(self._segments[-1], memoryview(buffer)[:size], buffer)

    def _send(self, segment: _Open, view: memoryview, buffer: bytearray | None) -> None:
        if segment.upload is None:
            self._begin(segment)
        upload, number, offset = segment.upload, segment.next_part, segment.sent
        assert upload is not None
        if buffer is not None or number == 1:
            segment.next_part += 1
        else:
            number = 1  # pieces that are not gathered all belong to the one part that stands for them
        segment.sent += len(view)
        body = PartBody(view, self._on_progress)
        ledger = self._ledger if buffer is not None else None  # what is not gathered has no parts to find again
        reused = False

        def send(job: PartJob) -> UploadedPart:
            nonlocal reused
            if ledger is not None:
                known = ledger.known(segment.number, number, view)
                if known is not None:
                    reused, job.measured = True, False
                    return known
            return self._store.put_part(upload, number, offset, body, crc64nvme(view))

        def done(part: UploadedPart) -> None:
            if ledger is not None and not reused:
                ledger.acknowledged(segment.number, part, view)
            with self._lock:
                before = segment.parts.get(number)
                segment.parts[number] = part if buffer is not None or before is None else _joined(before, part)
            self._on_sent(len(view), reused)

        def release() -> None:
            if buffer is not None:
                with self._lock:
                    self._spare.append(buffer)

        self._sender.submit(PartJob(body, send, done, release))

    def _begin(self, segment: _Open) -> None:
        segment.key = self._key_of(segment.number)
        if self._ledger is not None:
            segment.upload = self._ledger.upload(segment.number, segment.key)
            if segment.upload is not None:
                return
        upload = self._store.begin(segment.key)
        if self._ledger is not None:
            self._ledger.begun(segment.number, segment.key, upload)
        if self._group.stopped and not (self._ledger is not None and self._rules.buffered):
            # While it began: whoever cleans up may have looked already. (What can be resumed is left.)
            self._store.abort(upload)
            self._group.check()
        segment.upload = upload

    def _take_buffer(self, size: int) -> bytearray:
        with self._lock:
            while self._spare:
                buffer = self._spare.pop()
                if len(buffer) >= size:
                    return buffer
        return bytearray(size)

    def _put(self, content: memoryview, checksum: int) -> Segment:
        key = self._key_of(0)
        self._compare(key, crc64nvme(content), checksum)
        stored = self._store.put(key, PartBody(content, self._on_progress), checksum, kind="data")
        self._on_sent(len(content), False)
        return Segment(key=key, size=len(content), crc64nvme=checksum, stored=stored)

    def _compare(self, key: str, sent: int, expected: int) -> None:
        if sent != expected:
            raise IntegrityError(
                f"{self._store.url}/{key} was not sent as it was made",
                f"the checksum of what was sent is {sent:016x} and should be {expected:016x}",
                "This is a fault of memory or of Backhaul; test this host's memory, and report it.",
            )


def _joined(before: UploadedPart, part: UploadedPart) -> UploadedPart:
    """Join a piece to those before it: a store that gathers nothing has nothing to list at the end."""
    return UploadedPart(
        number=1,
        size=before.size + part.size,
        etag="",
        crc64nvme=combine_crc64nvme(before.crc64nvme, part.crc64nvme, part.size),
    )


def multipart_etag(parts: Sequence[UploadedPart]) -> str:
    """Return the ETag of an object made from these parts, empty where the parts' ETags are no MD5s."""
    digest = hashlib.md5(usedforsecurity=False)
    for part in parts:
        match = _PART_MD5.fullmatch(part.etag)
        if match is None:
            return ""
        digest.update(bytes.fromhex(match[1]))
    return f'"{digest.hexdigest()}-{len(parts)}"'
