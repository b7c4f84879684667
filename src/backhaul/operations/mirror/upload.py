"""One file into the mirror: whole, composed or gone on with, and visible only when it is all there and unchanged.

The order, and what a death in between leaves:

1. the upload is begun and noted (``park``); its parts are sent or copied, and noted as the store acknowledges them.
   A death leaves the old object, and an upload that the next run goes on with, if the file is still the same.
2. the file is looked at once more: if it changed while it was read, the upload is aborted.
3. the upload is completed, replacing the object that the plan saw and no other. A death leaves an object that the
   records do not know: the next plan recognises it by its checksum.
4. the object is noted in the state, and its signature written beside the mirror.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
from collections.abc import Callable
from concurrent.futures import Future

import msgspec

from backhaul.errors import IntegrityError, ObjectNotFoundError, PreconditionError, StoreError
from backhaul.model.mirror import DELTA, RENAME, UPLOAD, Action, Entry, LocalFile, PartPlan
from backhaul.model.objects import StoredObject, Upload, UploadedPart
from backhaul.operations.mirror.content import SMALLEST_WITH_CHUNKS, ChangedError
from backhaul.operations.mirror.plan import MTIME, encode_mtime, entry_of, part_size_for
from backhaul.operations.mirror.records import Records
from backhaul.operations.mirror.state import Content, MirrorState, ParkedUpload
from backhaul.pipeline.pool import BufferBudget, WorkerPool
from backhaul.pipeline.supervisor import Supervisor
from backhaul.planning.delta import plain_parts
from backhaul.sources.tree import OpenFile, Tree
from backhaul.stores.base import Store
from backhaul.stores.body import PartBody
from backhaul.transforms.chunks import Chunker
from backhaul.transforms.digest import StreamDigest, combine_crc64nvme, crc64nvme, encode_crc64nvme

# Files up to this are a single request.
LARGEST_PUT = 8 << 20
_SCRATCH = 1 << 20
_NEVER = dt.datetime.fromtimestamp(0, dt.UTC)


class ParkedError(Exception):
    """The window has ended while a file was under way; what was sent of it is noted. ``left`` bytes are not sent."""

    def __init__(self, left: int) -> None:
        super().__init__(f"{left} bytes left")
        self.left = left


class Sent(msgspec.Struct, frozen=True):
    """A file that is in the mirror now: bytes that were sent, that the store had from before, that it copied itself."""

    entry: Entry
    sent: int
    reused: int = 0
    copied: int = 0


class FileUploader:
    """Sends files; for many threads, a file each.

    Args:
        tree, store, state, records: of the run.
        root: the copy's prefix.
        group: whose stop ends all waiting.
        pool: sends parts.
        budget: memory of the parts.
        ended: whether the window has ended.
        on_sent: told bytes that the store has acknowledged, or copied.
    """

    def __init__(
        self,
        tree: Tree,
        store: Store,
        state: MirrorState,
        records: Records,
        root: str,
        *,
        group: Supervisor,
        pool: WorkerPool,
        budget: BufferBudget,
        ended: Callable[[], bool],
        on_sent: Callable[[int], None],
    ) -> None:
        self._tree, self._store, self._state, self._records, self._root = tree, store, state, records, root
        self._group, self._pool, self._budget = group, pool, budget
        self._ended, self._on_sent = ended, on_sent
        self._buffered = store.parts().buffered

    def upload(self, action: Action) -> Sent:
        """Bring a file into the mirror as the action says.

        Raises:
            ChangedError: the file is not the one that the action was planned for, or changed while it was read.
            ParkedError: the window has ended.
            OSError: the file can't be read.
            StoreError: the store did not take it.
        """
        if action.kind == RENAME:
            try:
                return self._copy(action)
            except (PreconditionError, ObjectNotFoundError, IntegrityError):
                # What was to be copied is not there any more, or is damaged: the file itself is here.
                action = msgspec.structs.replace(action, kind=UPLOAD, source="", source_etag="")
        with self._tree.open(action.key) as opened:
            file = self._tree.look(action.key)
            if file is None or opened.identity != action.identity or file.identity != opened.identity:
                raise ChangedError
            if opened.identity.size <= LARGEST_PUT and not action.parts:
                return self._put(action, file, opened)
            try:
                return self._multipart(action, file, opened)
            except (_SourceGoneError, IntegrityError):
                if action.kind != DELTA:
                    raise
                # What was to be copied is not there any more, or is damaged: the file itself is here.
                plain = msgspec.structs.replace(action, parts=())
                return self._multipart(plain, file, opened)

    def _put(self, action: Action, file: LocalFile, opened: OpenFile) -> Sent:
        size = opened.identity.size
        # (Another byte, to see whether it has grown.)
        buffer = bytearray(size + 1)
        if opened.read_into(0, memoryview(buffer)) != size:
            raise ChangedError
        view = memoryview(buffer)[:size]
        digest = StreamDigest()
        digest.feed(view)
        if not opened.unchanged():
            raise ChangedError
        key = self._root + action.key
        content = Content(digest.blake3, digest.crc64nvme)

        def put(*, if_absent: bool) -> StoredObject:
            return self._store.put(
                key,
                PartBody(view, lambda count: None),
                content.crc64nvme,
                if_absent=if_absent,
                replaces=action.etag or None,
                kind="data",
                metadata=_metadata(file),
            )

        try:
            stored = put(if_absent=not action.etag)
        except PreconditionError:
            # Some stores take a former directory of that name for an object.
            if action.etag or self._store.stat(key) is not None:
                raise
            stored = put(if_absent=False)
        self._on_sent(size)
        self._state.note_content(opened.identity, content)
        entry = entry_of(file, key, stored.etag or "", content, opened.xattrs())
        self._state.put(entry, self._records.order)
        return Sent(entry, size)

    def _copy(self, action: Action) -> Sent:
        """Copy what the store has under another name. The content is the one that was read for the plan."""
        file = self._tree.look(action.key)
        source = self._state.entry(action.source, "file", self._records.order)
        if file is None or file.identity != action.identity or source is None or not source.etag:
            raise ChangedError
        content = self._state.content(file.identity)
        if action.source_etag and (content is None or content.blake3 != source.blake3):
            raise ChangedError
        with self._tree.open(action.key) as opened:
            xattrs = opened.xattrs()
            if opened.identity != action.identity:
                raise ChangedError
        key = self._root + action.key
        thing = StoredObject(key=source.key, size=source.size, modified=_NEVER, etag=source.etag)
        stored = self._store.copy(thing, key, metadata=_metadata(file))
        crc = f"CRC64NVME:{encode_crc64nvme(source.crc64nvme)}" if source.crc64nvme is not None else None
        if stored.size != source.size or (stored.checksum is not None and crc not in (None, stored.checksum)):
            self._store.delete(key, etag=stored.etag)
            raise IntegrityError(
                f"{self._store.url}/{key} is not what was copied",
                f"{source.key} was to be copied, and the copy has another checksum",
                "The next run sends the file; backhaul verify tells whether the source is damaged.",
            )
        known = Content(source.blake3, source.crc64nvme) if source.blake3 and source.crc64nvme is not None else None
        entry = entry_of(file, key, stored.etag or "", known, xattrs)
        self._state.put(entry, self._records.order)
        return Sent(entry, 0, copied=source.size)

    # -- in parts ----------------------------------------------------------------------------------------

    def _multipart(self, action: Action, file: LocalFile, opened: OpenFile) -> Sent:
        size = opened.identity.size
        parts = action.parts or plain_parts(size, part_size_for(size, self._store))
        upload, known = self._begin(action, file, ParkedUpload(opened.identity, parts))
        chunker = Chunker() if size >= SMALLEST_WITH_CHUNKS else None
        digest = chunker.digest if chunker is not None else StreamDigest()
        feed = chunker.feed if chunker is not None else digest.feed
        running: list[Future[UploadedPart]] = []
        done: dict[int, UploadedPart] = {}
        reused = 0
        try:
            for number, part in enumerate(parts, 1):
                self._group.check()
                if self._ended():
                    break
                found = known.get(number)
                if found is None and not part.source:
                    running.append(self._send(upload, number, part, opened, feed))
                    continue
                crc, md5 = self._read_only(opened, part, feed)
                if found is not None and (found.size, found.crc64nvme) == (part.size, crc):
                    done[number] = found
                    reused += 0 if part.source else part.size
                    self._on_sent(0 if part.source else part.size)
                elif part.source:
                    running.append(self._pool.submit(self._copier(upload, number, part, crc, md5)))
                else:
                    # Noted as sent, and other bytes now: it can't be the file that it was.
                    raise ChangedError
            failure: BaseException | None = None
            for future in running:
                try:
                    result = self._wait(future)
                    done[result.number] = result
                except _NotBegunError:
                    continue
                except StoreError as error:
                    failure = failure or error
            if failure is not None:
                raise failure
            if len(done) < len(parts):
                there = {*done, *known}
                raise ParkedError(sum(p.size for n, p in enumerate(parts, 1) if n not in there and not p.source))
            if digest.size != size or not opened.unchanged():
                raise ChangedError
            stored = self._complete(action, upload, [done[number] for number in range(1, len(parts) + 1)], digest)
        except ParkedError:
            if not self._buffered:
                self._give_up(upload)
            raise
        except (ChangedError, IntegrityError, PreconditionError, _SourceGoneError, ObjectNotFoundError):
            for future in running:
                with contextlib.suppress(Exception):
                    self._wait(future)
            self._give_up(upload)
            raise
        content = Content(digest.blake3, digest.crc64nvme)
        self._state.note_content(opened.identity, content)
        signature = chunker.finish() if chunker is not None else None
        if signature is not None:
            self._state.note_signature(content.blake3, signature, published=False)
        entry = entry_of(file, upload.key, stored.etag or "", content, opened.xattrs())
        with self._state.together():
            self._state.put(entry, self._records.order)
            self._state.unpark(upload.key)
        if signature is not None:
            self._records.publish_signature(content.blake3, signature)
        sent = sum(part.size for part in parts if not part.source) - reused
        return Sent(entry, sent, reused, sum(part.size for part in parts if part.source))

    def _begin(self, action: Action, file: LocalFile, plan: ParkedUpload) -> tuple[Upload, dict[int, UploadedPart]]:
        """Begin the upload of a file, or go on with the one that an earlier run has begun for it."""
        key = self._root + action.key
        parked = self._state.parked(key)
        if parked is not None:
            upload, before = parked
            if before.identity == plan.identity and before.parts == plan.parts:
                with contextlib.suppress(ObjectNotFoundError):
                    listed = {(part.number, part.size, part.etag) for part in self._store.uploaded_parts(upload)}
                    noted = self._state.parts(key)
                    return upload, {n: p for n, p in noted.items() if (p.number, p.size, p.etag) in listed}
            self._give_up(upload)
        self._state.begin(key)
        upload = self._store.begin(key, metadata=_metadata(file))
        self._state.park(upload, plan)
        return upload, {}

    def _send(
        self, upload: Upload, number: int, part: PartPlan, opened: OpenFile, feed: Callable[[memoryview], None]
    ) -> Future[UploadedPart]:
        buffer = self._budget.take(part.size)
        view = memoryview(buffer)[: part.size]
        try:
            if opened.read_into(part.offset, view) != part.size:
                raise ChangedError
            feed(view)
        except BaseException:
            self._budget.give(buffer)
            raise

        def send() -> UploadedPart:
            try:
                self._refuse_late()
                sent = self._store.put_part(upload, number, part.offset, PartBody(view), crc64nvme(view))
                self._state.acknowledged(upload.key, sent)
                self._on_sent(part.size)
                return sent
            finally:
                self._budget.give(buffer)

        return self._pool.submit(send)

    def _copier(
        self, upload: Upload, number: int, part: PartPlan, crc: int, md5: str | None
    ) -> Callable[[], UploadedPart]:
        def copy() -> UploadedPart:
            self._refuse_late()
            try:
                copied = self._store.copy_part(
                    upload, number, part.source, part.source_etag, part.source_offset, part.size, crc
                )
            except (PreconditionError, ObjectNotFoundError) as error:
                raise _SourceGoneError(error.what, error.why, error.todo) from error
            if md5 is not None and copied.etag.strip('"') != md5:
                raise IntegrityError(
                    f"Part {number} of {upload.key} is not what was to be copied",
                    f"its MD5 is {copied.etag}, and should be {md5}",
                    "The file is sent as a whole; backhaul verify tells whether the source is damaged.",
                )
            self._state.acknowledged(upload.key, copied)
            return copied

        return copy

    def _read_only(
        self, opened: OpenFile, part: PartPlan, feed: Callable[[memoryview], None]
    ) -> tuple[int, str | None]:
        """Read what the store has already, for the hashes of the whole; return its CRC64NVME and, if used, its MD5."""
        profile = self._store.profile
        md5 = hashlib.md5(usedforsecurity=False) if not profile.checksums and profile.md5_etags else None
        crc, offset, end = 0, part.offset, part.offset + part.size
        scratch = memoryview(bytearray(min(_SCRATCH, part.size)))
        while offset < end:
            self._group.check()
            piece = scratch[: min(len(scratch), end - offset)]
            if opened.read_into(offset, piece) != len(piece):
                raise ChangedError
            feed(piece)
            crc = crc64nvme(piece, crc)
            if md5 is not None:
                md5.update(piece)
            offset += len(piece)
        return crc, md5.hexdigest() if md5 is not None else None

    def _complete(
        self, action: Action, upload: Upload, parts: list[UploadedPart], digest: StreamDigest
    ) -> StoredObject:
        combined = 0
        for part in parts:
            combined = combine_crc64nvme(combined, part.crc64nvme, part.size)
        if combined != digest.crc64nvme:
            raise IntegrityError(
                f"{upload.key} was not sent as it was read",
                f"the parts' checksums make {combined:016x}, and the file's is {digest.crc64nvme:016x}",
                "Test this host's memory; the file is sent again by the next run.",
            )
        return self._store.complete(upload, parts, combined, if_absent=not action.etag, replaces=action.etag or None)

    def _refuse_late(self) -> None:
        """Begin no part after the window's end."""
        if self._ended():
            raise _NotBegunError

    def _wait(self, future: Future[UploadedPart]) -> UploadedPart:
        with self._group.condition:
            self._group.wait_for(future.done)
        return future.result()

    def _give_up(self, upload: Upload) -> None:
        self._store.abort(upload)
        self._state.unpark(upload.key)


class _NotBegunError(Exception):
    """The window had ended before a part was begun."""


class _SourceGoneError(StoreError):
    """What was to be copied is not there any more."""


def _metadata(file: LocalFile) -> dict[str, str]:
    return {MTIME: encode_mtime(file.identity.modified)}
