"""apply: what an approved plan says, in an order that a death anywhere leaves sound.

1. records: names that only the mirror's records know, files that came back, tombstones;
2. files are sent, several at once, and each becomes visible when it is whole;
3. copies of files that were sent in 2 (hard links);
4. the catalog is published (and every now and then during 2);
5. only if nothing failed, nothing was unreadable and nothing is left: what has waited long enough is deleted, each
   only if it is still the object that the plan saw;
6. a second copy that is whole, and is as it must be, becomes the one that counts.

What a death leaves unpublished is in the local state, and published by the next run.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import threading
import time
from array import array
from collections.abc import Callable, Iterator

import msgspec

from backhaul.errors import (
    BackhaulError,
    ConfigurationError,
    PreconditionError,
    StoreError,
    StoreFullError,
    StoreRefusedError,
    StoreUnavailableError,
    UsageError,
)
from backhaul.formats import catalog
from backhaul.formats.file_names import shown
from backhaul.formats.mirror_plan import PlanReader
from backhaul.formats.quantities import format_duration
from backhaul.model.memory import MemoryBound
from backhaul.model.mirror import (
    DELTA,
    FILE,
    FORGET,
    RECORD,
    RECYCLE,
    RENAME,
    REPLACE,
    SENDING,
    SKIP,
    TOMBSTONE,
    UPLOAD,
    Action,
    Building,
    Count,
    Entry,
    MirrorRecord,
)
from backhaul.model.results import MirrorResult, Skipped
from backhaul.operations import memory
from backhaul.operations.mirror.content import ChangedError
from backhaul.operations.mirror.plan import PART_SIZE
from backhaul.operations.mirror.records import Records, iso, new_id
from backhaul.operations.mirror.state import MirrorState
from backhaul.operations.mirror.upload import LARGEST_PUT, FileUploader, ParkedError, Sent
from backhaul.operations.progress import MirrorProgress
from backhaul.pipeline.pool import BufferBudget, WorkerPool
from backhaul.pipeline.supervisor import StoppedError, Supervisor
from backhaul.sources.tree import Tree
from backhaul.stores.base import Store

BIGGEST, OLDEST, BY_NAME = "biggest", "oldest", "name"
ORDERS = (BIGGEST, OLDEST, BY_NAME)
DEFAULT_STREAMS = 6
# Large files that are read at once: their parts fill the connections.
_LARGE_AT_ONCE = 2
# The catalog is published this often while files are sent: what is lost with this host is looked at again.
_PUBLISH_EVERY = 60.0
_NAMES_SAID = 1000
# Hashes of files are remembered for so many seconds; a file that is older is then read once more.
_HASHES_KEPT = 400 * 86400.0
# So many seconds may this host's clock and the store's be apart for anything to be deleted.
MOST_SKEW = 86400.0
# Of these the next file would fail, too.
_FATAL = (StoreUnavailableError, StoreRefusedError, StoreFullError, ConfigurationError)


class ApplyOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to go about it.

    Attributes:
        streams: requests at once.
        first: which files go first: ``biggest``, ``oldest`` or by ``name``.
        length: seconds after which nothing more is begun; None for no end.
        stop: asked before each thing that would be begun; once it says so, nothing more is.
    """

    streams: int = DEFAULT_STREAMS
    first: str = BIGGEST
    length: float | None = None
    stop: Callable[[], bool] = lambda: False


def memory_bound(options: ApplyOptions, part_size: int) -> MemoryBound:
    """Return the most memory that a run uses, whatever the mirror's size."""
    terms = {
        "base": memory.BASE,
        "parts": _budget(options, part_size),
        "small files": options.streams * LARGEST_PUT,
        "state": 48 << 20,
    }
    return MemoryBound(terms=terms, total=sum(terms.values()))


def _budget(options: ApplyOptions, part_size: int) -> int:
    return (options.streams + _LARGE_AT_ONCE) * part_size


class Applier:
    """Applies one approved plan.

    Args:
        plan: read; approved.
        tree, store, records, state: of the plan's mirror.
        group: whose threads work; the caller is inside its block.
        options: how.
        progress: counters to keep up to date.
        now: the clock that records take times from.
        clock: monotonic seconds, for the window.
        began: when the window began by that clock; None for now.
    """

    def __init__(
        self,
        plan: PlanReader,
        tree: Tree,
        store: Store,
        records: Records,
        state: MirrorState,
        group: Supervisor,
        options: ApplyOptions,
        progress: MirrorProgress,
        now: Callable[[], dt.datetime],
        clock: Callable[[], float] = time.monotonic,
        began: float | None = None,
    ) -> None:
        if options.first not in ORDERS:
            raise UsageError(f"{options.first!r} is no order", "known are " + ", ".join(ORDERS), "")
        assert not plan.tail.refusals
        self._plan, self._tree, self._store, self._records, self._state = plan, tree, store, records, state
        self._group, self._options, self._progress, self._now, self._clock = group, options, progress, now, clock
        began = clock() if began is None else began
        self._deadline = began + options.length if options.length is not None else None
        self._lock = threading.Lock()
        self._fatal: BaseException | None = None
        self._sent, self._renamed, self._composed = Count(), Count(), Count()
        self._recycled, self._held, self._left, self._tombstones = Count(), Count(), Count(), Count()
        self._recorded = 0
        self._sent_bytes = self._reused = self._saved = 0
        self._skipped: list[Skipped] = []
        self._failed: list[Skipped] = []
        self._skipped_count = self._failed_count = 0
        self._unsafe = False
        self._remarks: list[str] = []
        self._part_size = PART_SIZE
        self._published = clock()

    @property
    def _root(self) -> str:
        return self._plan.head.root

    def _ended(self) -> bool:
        late = self._deadline is not None and self._clock() >= self._deadline
        return self._fatal is not None or late or self._options.stop()

    def run(self) -> MirrorResult:
        """Do it.

        Raises:
            StoreError: the store is away, full or refuses; what was done until then is kept.
        """
        began = time.monotonic()
        switched = False
        self._begin()
        try:
            self._retire_older()
            self._note_records()
            self._send_all()
        finally:
            self._publish_at_end()
        if self._fatal is not None:
            raise self._fatal
        clean = not self._unsafe and not self._failed_count and not self._left.files
        self._recycle(clean=clean)
        building = self._is_building()
        if clean:
            if building:
                self._switch()
                switched = True
            self._forget_parked()
            self._records.settle_signatures()
            self._records.publish()
            self._records.compact()
            self._state.prune(_HASHES_KEPT)
        self._finish(clean=clean)
        return self._result(time.monotonic() - began, building=building, switched=switched)

    # -- 1 -----------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Note in the mirror what it comes from, before anything of it is there."""
        head, record = self._plan.head, self._records.record
        if record is None:
            record = MirrorRecord(id=new_id(), created=iso(self._now()), source=head.source)
            self._records.write_record(record)
        changed = msgspec.structs.replace(
            record, source=head.source, mounts=self._plan.tail.mounts, exclude=head.exclude
        )
        if head.root != record.root and record.building is None:
            changed = msgspec.structs.replace(changed, building=Building(root=head.root, since=iso(self._now())))
        if changed != record:
            self._records.write_record(changed)

    def _is_building(self) -> bool:
        record = self._records.record
        return record is not None and record.building is not None

    def _note_records(self) -> None:
        order = self._records.order
        gone = iso(self._now())
        with self._state.together():
            for _, action in self._plan.actions():
                if action.kind == RECORD and action.entry is not None:
                    self._state.put(self._rooted(action.entry), order)
                    self._recorded += 1
                elif action.kind == FORGET:
                    entry = action.entry or Entry(key=action.key)
                    self._state.put(msgspec.structs.replace(self._rooted(entry), dropped=True), order)
                    self._recorded += 1
                elif action.kind == TOMBSTONE:
                    known = self._state.entry(self._root + action.key, FILE, order)
                    if known is not None:
                        self._state.put(msgspec.structs.replace(known, gone=gone), order)
                        self._tombstones.add(action.size)
                elif action.kind == SKIP:
                    self._skip(action.key, action.reason)
                    self._unsafe = self._unsafe or action.unsafe

    def _rooted(self, entry: Entry) -> Entry:
        """Return an entry of the plan, whose name is relative to the copy, with its key in the mirror."""
        return msgspec.structs.replace(entry, key=self._root + entry.key)

    # -- 2 and 3 -----------------------------------------------------------------------------------------

    def _order(self) -> Iterator[int]:
        """Yield where the lines of the files that are to be sent begin, in the order in which they are."""
        positions, weights = array("q"), array("q")
        for position, action in self._plan.actions():
            if action.kind in SENDING and not _of_this_plan(action):
                positions.append(position)
                modified = action.identity.modified if action.identity is not None else 0
                weights.append(
                    -action.size if self._options.first == BIGGEST else modified if self._options.first == OLDEST else 0
                )
        self._progress.files = len(positions)
        for number in sorted(range(len(positions)), key=weights.__getitem__):
            yield positions[number]

    def _send_all(self) -> None:
        options = self._options
        self._progress.phase = "sending"
        self._progress.total = self._plan.tail.totals.to_send
        self._pool = WorkerPool(self._group, options.streams, "send")
        limits = self._store.profile.limits
        self._part_size = max(limits.min_part, min(PART_SIZE, self._store.parts().layout.largest))
        self._uploader = FileUploader(
            self._tree,
            self._store,
            self._state,
            self._records,
            self._root,
            group=self._group,
            pool=self._pool,
            budget=BufferBudget(self._group, _budget(options, self._part_size)),
            ended=self._ended,
            on_sent=self._progress.add_sent,
        )
        pending = self._order()
        large = threading.Semaphore(_LARGE_AT_ONCE)

        def drive() -> None:
            while True:
                with self._lock:
                    position = next(pending, None)
                    if position is None:
                        return
                    action = self._plan.action_at(position)
                if self._ended():
                    self._leave(action.size, action.sent)
                    continue
                if action.size > LARGEST_PUT:
                    while not large.acquire(timeout=0.2):
                        self._group.check()
                    try:
                        self._do(action)
                    finally:
                        large.release()
                else:
                    self._do(action)

        drivers = [self._group.start(drive, f"file-{number}") for number in range(options.streams)]
        with self._group.condition:
            while any(thread.is_alive() for thread in drivers):
                self._group.check()
                self._group.condition.wait(0.5)
                if self._clock() - self._published > _PUBLISH_EVERY:
                    self._publish_now()
        self._group.check()
        self._copy_links()
        self._pool.close()

    def _publish_now(self) -> None:
        self._published = self._clock()
        condition = self._group.condition
        condition.release()
        try:
            self._records.publish()
        finally:
            condition.acquire()

    def _do(self, action: Action) -> None:
        sent: Sent | None = None
        try:
            for last in (False, True):
                try:
                    sent = self._uploader.upload(action)
                    break
                except ChangedError:
                    seen = self._tree.look(action.key)
                    if last or seen is None or seen.kind != FILE:
                        self._skip(action.key, "it changed while it was read", unsafe=True)
                        return
                    # Once more, as it is now; as a whole, since the plan was made of something else.
                    action = msgspec.structs.replace(
                        action,
                        kind=REPLACE if action.etag else UPLOAD,
                        identity=seen.identity,
                        size=seen.identity.size,
                        sent=seen.identity.size,
                        parts=(),
                    )
        except StoppedError:
            raise
        except ParkedError as parked:
            self._leave(action.size, parked.left)
        except _FATAL as error:
            if _in_the_way(error):
                self._fail(action.key, f"{error.what}: {error.why}; something else of the mirror is in its way")
                return
            with self._lock:
                self._fatal = self._fatal or error
        except FileNotFoundError:
            self._skip(action.key, "it is gone since the plan was made")
        except OSError as error:
            self._skip(action.key, f"it can't be read: {error.strerror or error}", unsafe=True)
        except PreconditionError as error:
            self._fail(action.key, f"another object was put there since the plan was made ({error.why})")
        except BackhaulError as error:
            self._fail(action.key, f"{error.what}: {error.why}" if error.why else error.what)
        else:
            assert sent is not None
            with self._lock:
                self._sent_bytes += sent.sent
                self._reused += sent.reused
                self._saved += sent.copied
                count = {RENAME: self._renamed, DELTA: self._composed}.get(action.kind, self._sent)
                count.add(action.size)
        finally:
            self._progress.add_done()

    def _copy_links(self) -> None:
        """Copy files that have several names from the first one, which is there now."""
        for _, action in self._plan.actions():
            if action.kind != RENAME or not _of_this_plan(action):
                continue
            if self._ended():
                self._leave(action.size, 0)
                continue
            source = self._state.entry(self._root + action.source, FILE, self._records.order)
            if source is None or action.identity is None or source.modified != action.identity.modified:
                whole = msgspec.structs.replace(action, kind=UPLOAD, source="", sent=action.size)
                self._do(whole)
            else:
                self._do(msgspec.structs.replace(action, source=source.key))

    # -- 4 -----------------------------------------------------------------------------------------------

    def _publish_at_end(self) -> None:
        """Publish what is done, also of a run that fails: as far as the store lets that happen."""
        if self._fatal is None and not self._group.stopped:
            self._records.publish()
            return
        with contextlib.suppress(BackhaulError, StoppedError):
            if self._fatal is None or not isinstance(self._fatal, StoreUnavailableError):
                self._records.publish()

    # -- 5 and 6 -----------------------------------------------------------------------------------------

    def _recycle(self, *, clean: bool) -> None:
        order = self._records.order
        checked = False
        for _, action in self._plan.actions():
            if action.kind != RECYCLE:
                continue
            if clean and not checked:
                checked, clean = True, self._clock_is_right()
            if not clean or self._ended():
                self._held.add(action.size)
                continue
            key = action.key if action.source else self._root + action.key
            known = self._state.entry(key, FILE, order)
            if known is None or known.gone != action.gone or known.etag != action.etag:
                continue
            here = self._tree.look(action.key) if not action.source else None
            if here is not None and here.kind == FILE:
                continue  # it is back: the next run takes its tombstone off
            try:
                self._store.delete(key, etag=action.etag)
            except PreconditionError:
                # Not the mirror's any more, and so not its to delete.
                self._remarks.append(f"{shown(key)} was not deleted: somebody has put another object there")
                self._state.put(msgspec.structs.replace(known, dropped=True), order)
                continue
            except StoreError as error:
                self._fail(action.key, f"it could not be deleted: {error.why}")
                if isinstance(error, _FATAL):
                    return
                continue
            self._state.put(msgspec.structs.replace(known, dropped=True), order)
            self._recycled.add(action.size)

    def _switch(self) -> None:
        """Have the second copy count, if the store has all of it; what the first one had gets tombstones."""
        order, record = self._records.order, self._records.record
        assert record is not None
        listed = {entry.key: entry for entry in self._store.list(self._root)}
        for _, entry in self._state.entries(self._root, order):
            if entry.kind != FILE or entry.gone or (not self._root and entry.key.startswith(catalog.DIRECTORY)):
                continue
            thing = listed.get(entry.key)
            if thing is None or thing.size != entry.size or thing.etag != entry.etag:
                raise StoreError(
                    f"The new copy in {self._store.url} is not whole",
                    f"{entry.key} is " + ("not there" if thing is None else "another object than was put there"),
                    "The old copy still counts. Run again: what is missing is sent again.",
                )
        self._records.publish()
        self._records.write_record(msgspec.structs.replace(record, root=self._root, building=None))
        self._retire_older()
        self._remarks.append("the new copy is whole and counts from now on; the old one is in the recycler")

    def _retire_older(self) -> None:
        """Give tombstones to what is left of copies that do not count any more."""
        record, order = self._records.record, self._records.order
        if record is None or record.building is not None:
            return
        gone = iso(self._now())
        # (Without copies below the plain names there is nothing to look for.)
        places = self._state.entries("" if record.root else catalog.COPIES, order)
        old = [
            entry
            for _, entry in places
            if not _in_copy(entry.key, record.root) and (entry.kind != FILE or not entry.gone)
        ]
        with self._state.together():
            for entry in old:
                if entry.kind != FILE:
                    self._state.put(msgspec.structs.replace(entry, dropped=True), order)
                else:
                    self._state.put(msgspec.structs.replace(entry, gone=gone), order)

    def _clock_is_right(self) -> bool:
        """Tell whether the store has about the same time: a clock that jumped must not empty the recycler."""
        record = self._records.record
        assert record is not None
        self._records.write_record(msgspec.structs.replace(record, revision=record.revision + 1))
        stored = self._store.stat(catalog.RECORD)
        skew = abs((self._now() - stored.modified).total_seconds()) if stored is not None else MOST_SKEW + 1
        if skew > MOST_SKEW:
            self._remarks.append(
                f"nothing was deleted: this host's clock and the store's are {format_duration(skew)} apart"
            )
        return skew <= MOST_SKEW

    def _forget_parked(self) -> None:
        """Abort uploads of files that are gone or are in the mirror by now, and those whose begin was never noted."""
        with contextlib.suppress(StoreError):
            for upload, _ in self._state.all_parked():
                self._store.abort(upload)
                self._state.unpark(upload.key)
            begun = self._state.begun()
            if begun:
                for left in list(self._store.unfinished()):
                    if left.upload.key in begun:
                        self._store.abort(left.upload)
                self._state.forget_begun()

    def _finish(self, *, clean: bool) -> None:
        """Note that a run was here: plans that were made before it are stale."""
        record = self._records.record
        assert record is not None
        finished = iso(self._now()) if clean else record.finished
        self._records.publish()
        self._records.write_record(msgspec.structs.replace(record, finished=finished, revision=record.revision + 1))

    # -- what there is to say ----------------------------------------------------------------------------

    def _skip(self, name: str, reason: str, *, unsafe: bool = False) -> None:
        with self._lock:
            self._skipped_count += 1
            self._unsafe = self._unsafe or unsafe
            if len(self._skipped) < _NAMES_SAID:
                self._skipped.append(Skipped(shown(name), reason))

    def _fail(self, name: str, reason: str) -> None:
        with self._lock:
            self._failed_count += 1
            if len(self._failed) < _NAMES_SAID:
                self._failed.append(Skipped(shown(name), reason))

    def _leave(self, size: int, left: int) -> None:
        with self._lock:
            self._left.files += 1
            self._left.bytes += left

    def _result(self, seconds: float, *, building: bool, switched: bool) -> MirrorResult:
        head, totals = self._plan.head, self._plan.tail.totals
        state = "cut" if self._left.files else "complete"
        if state == "complete" and (self._skipped_count or self._failed_count):
            state = "incomplete"
        moved = max(self._progress.sent, self._sent_bytes + self._reused)
        return MirrorResult(
            mirror=head.mirror,
            directory=head.directory,
            plan=head.id,
            state=state,
            sent=self._sent,
            sent_bytes=self._sent_bytes,
            reused_bytes=self._reused,
            record_bytes=self._records.bytes_sent,
            saved=self._saved,
            renamed=self._renamed,
            composed=self._composed,
            kept=totals.kept,
            recorded=self._recorded,
            tombstones=self._tombstones,
            waiting=totals.waiting,
            recycled=self._recycled,
            held=self._held,
            foreign=totals.foreign,
            excluded=totals.excluded,
            skipped=tuple(self._skipped),
            skipped_count=self._skipped_count,
            failed=tuple(self._failed),
            failed_count=self._failed_count,
            left=self._left,
            nights=-(-self._left.bytes // moved) if self._left.files and moved else 0,
            root=self._root,
            building=building,
            switched=switched,
            seconds=seconds,
            memory=memory_bound(self._options, self._part_size),
            peak_memory=memory.peak_memory(),
            remarks=tuple(self._remarks),
        )


def _of_this_plan(action: Action) -> bool:
    """Tell whether what is copied is sent by the same plan."""
    return action.kind == RENAME and not action.source_etag


def _in_copy(key: str, root: str) -> bool:
    return key.startswith(root) if root else not key.startswith(catalog.DIRECTORY)


def _in_the_way(error: BackhaulError) -> bool:
    """Tell whether a disk refused a name since a file is where a directory should be, or the other way about."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
