"""One destination of a push: its claim on the id, its share of each stream, its commit, and its fate.

The order of a commit, and what a stop in between leaves:

1. each stream's objects completed when it has ended well (invisible to every listing without a manifest; taken back
   at a stop);
2. after the last one the manifest sent: the point of no return. From here on nothing is deleted by this run, since
   the manifest may stand or still arrive although no reply came;
3. claim released.

With a journal (a source that can be read again) an interrupted destination is not taken back but left as it is,
for the next run to go on from.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future

import msgspec

from backhaul.errors import (
    BackhaulError,
    IntegrityError,
    ObjectNotFoundError,
    PreconditionError,
    StoreError,
    StoreStalledError,
    StoreThrottledError,
    StoreUnavailableError,
)
from backhaul.formats import manifest as manifest_format
from backhaul.formats import names
from backhaul.formats.journal import Header
from backhaul.formats.quantities import format_duration, format_size
from backhaul.model.claim import Claim
from backhaul.model.location import Location
from backhaul.model.manifest import Manifest
from backhaul.model.results import DestinationResult
from backhaul.operations import memory, series
from backhaul.operations.encoding import Transcript
from backhaul.operations.journal import UploadJournal
from backhaul.operations.progress import DestinationProgress
from backhaul.pipeline.spool import Spool
from backhaul.pipeline.supervisor import StoppedError, Supervisor
from backhaul.pipeline.tee import AbandonedError, PieceQueue
from backhaul.planning.compression_level import Line
from backhaul.stores.base import PartRules, Store
from backhaul.stores.multipart import Segment, StreamWriter
from backhaul.stores.retry import RetryPolicy
from backhaul.transforms.encrypt import StreamKey

# While cleaning up after a failure a dead store must not hold the process for long.
CLEANUP_PATIENCE = 2.0
REWRITTEN = "an interrupted push to a directory is begun anew"


# The objects of every stream, by its name, as one destination has them.
StoredStreams = Mapping[str, tuple[Segment, ...]]
MakeManifest = Callable[[StoredStreams], Manifest]


class Delivery:
    """One stream on its way to one destination: what waits, and what writes it."""

    def __init__(self, stream: str, queue: PieceQueue, writer: StreamWriter) -> None:
        self.stream = stream
        self.queue = queue
        self.writer: StreamWriter | None = writer
        self.objects: tuple[Segment, ...] = ()
        self._keys: tuple[str, ...] = ()
        self._hedges = 0

    def line(self) -> Line:
        """Return what has gone out so far, and what waits here to."""
        writer = self.writer
        held, room = writer.backlog() if writer is not None else (0, 0)
        held += self.queue.held
        return Line(gone=self.queue.put_bytes - held, held=held, room=self.queue.room and self.queue.room + room)

    @property
    def keys(self) -> tuple[str, ...]:
        """Every name under which an object may have become visible."""
        return self.writer.keys if self.writer is not None else self._keys

    @property
    def hedges(self) -> int:
        """How many parts were tried twice because the first try was slow."""
        return self.writer.hedges if self.writer is not None else self._hedges

    def completed(self, objects: tuple[Segment, ...]) -> None:
        """Note the objects, and let go of the writer's memory."""
        assert self.writer is not None
        self.objects, self._keys, self._hedges = objects, self.writer.keys, self.writer.hedges
        self.writer.close()
        self.writer = None


class Destination:
    """See the module. ``failure`` and ``committed`` tell the fate; at most one of them is set."""

    def __init__(
        self,
        location: Location,
        store: Store,
        policy: RetryPolicy,
        journal: UploadJournal | None = None,
        *,
        place: str = "",
    ) -> None:
        self.text = location.text
        self.place = place or location.text
        self.write = location.write
        # Whether every run writes all of the stream: nothing of an earlier one can be gone on with.
        self.rewritten = location.kind == "local"
        self.reachable_by_others = location.kind != "local"
        self.store = store
        self.journal = journal
        self.progress = DestinationProgress(location.text)
        self.failure: BackhaulError | None = None
        self.committed: Manifest | None = None
        self.rules: PartRules | None = None
        self.remark: str | None = None
        self._previous: Manifest | None = None
        self._suspended = False
        self._key_dropped = False
        self._policy = policy
        self._backup = ""
        self._claim: Claim | None = None
        self._manifest_sent = False
        self._deliveries: list[Delivery] = []
        self._running = 0
        self._lock = threading.Lock()
        self._group: Supervisor | None = None

    # -- the claim ---------------------------------------------------------------------------------------

    def take_claim(self, backup: str, claim: Claim) -> bool:
        """Reserve an id; tell whether it was free. The first request that a run makes of a store.

        Raises:
            StoreError: the store can't be used.
        """
        # Noted first: the claim may stand although its reply never comes.
        self._backup, self._claim = backup, claim
        taken = series.take_claim(self.store, backup, claim)
        if not taken:
            self._claim = None
        return taken

    def give_claim_back(self) -> None:
        """Free an id that was reserved a moment ago, for another one."""
        if self._claim is not None:
            with contextlib.suppress(StoreError):
                series.release_claim(self.store, self._backup)
            self._claim = None

    def fail(self, error: BackhaulError) -> None:
        """Take this destination out of the run."""
        self.failure = error
        self.progress.state = "failed"

    # -- what an earlier run left ------------------------------------------------------------------------

    def forsake(self) -> None:
        """Take back what the journal names: it is another upload's, or of another version of the source.

        Raises:
            StoreError: the store could not be told; ``clean`` will find it.
        """
        assert self.journal is not None
        state = self.journal.state
        if state is not None:
            backup = state.header.backup
            if self._held(backup) is not None:
                self.journal.forsake(self.store)
                if not series.is_committed(self.store, backup):
                    for key in {*(begun.key for begun in state.uploads.values()), _whole_key(state.header)}:
                        self.store.delete(key)
                series.release_claim(self.store, backup)
        self.journal.state = None
        self.journal.inherited = False

    def _held(self, backup: str) -> Claim | None:
        """Return the claim of the journal under which the store holds that backup for us, if any."""
        assert self.journal is not None and self.journal.state is not None
        claims = self.journal.state.claims
        return next((claim for claim in reversed(claims) if series.owns_claim(self.store, backup, claim)), None)

    def resume(self, backup: str, header: Header, key: StreamKey | None) -> bool:
        """Take part in the backup of an interrupted run; tell whether that is possible.

        Args:
            backup: its id.
            header: what this run would write; the journal's claim is taken over where there is one.
            key: what the stream is encrypted with.

        Raises:
            StoreError: the store can't be used.
        """
        state = self.journal.state if self.journal is not None else None
        if state is not None and state.header.backup != backup:
            self.forsake()
            state = None
        self._backup = backup
        if series.is_committed(self.store, backup):
            # This destination was done before the interruption, or another run's backup has the id: the
            # stream's hash will tell.
            self._previous = series.read_manifest(self.store, backup)
            self._claim = self._held(backup) if state is not None else None
            return True
        if self.journal is not None and state is not None and self._held(backup) is not None:
            # Under a claim of its own: to clean this run is young, and whoever else goes on from a copy of the
            # journal finds that the backup is not his any more.
            self.journal.take_over(header.claim)
            series.renew_claim(self.store, backup, header.claim)
            self._claim = header.claim
            self.remark = REWRITTEN if self.rewritten else self.remark
            self.journal.reconcile(self.store)
            if _whole_key(header) not in {begun.key for begun in state.uploads.values()}:
                # A stream in a single request, whose manifest was not written: there is no going on with it.
                self.store.delete(_whole_key(header))
            return True
        if state is not None:
            self.remark = REWRITTEN if self.rewritten else "what an interrupted push had sent is gone: begun anew"
        if self.journal is not None:
            self.start_journal(msgspec.structs.replace(header, backup=backup), key)
        return self.take_claim(backup, header.claim)

    def start_journal(self, header: Header, key: StreamKey | None) -> None:
        """Begin the journal anew; with the key for a run that goes on, where that is possible."""
        assert self.journal is not None
        self.journal.start(header, None if self.rewritten else key)

    def key_dropped(self) -> None:
        """Note that what was sent of an encrypted stream can't be gone on with any more."""
        self._key_dropped = True
        if self._suspended and self.failure is not None:
            self.failure.todo = (
                "The backup stands elsewhere, and its key is gone from this host: what was sent here can't be gone on "
                "with. The same command takes it back and pushes anew."
            )

    def start_over(self) -> None:
        """Forget an interrupted run whose backup stands: this run makes a new one."""
        if self._claim is not None:
            with contextlib.suppress(StoreError):
                series.release_claim(self.store, self._backup)
        self._claim = self._previous = None
        if self.journal is not None:
            self.journal.state = None
            self.journal.inherited = False

    @property
    def needs_stream(self) -> bool:
        """Whether the backup is not here yet."""
        return self._previous is None

    # -- the streams -------------------------------------------------------------------------------------

    def attach(
        self,
        group: Supervisor,
        stream: str,
        file: str,
        *,
        patience: float,
        stall_after: float | None,
        spool: Spool | None,
        lanes: int = 1,
    ) -> Delivery | None:
        """Make ready for a stream; None if this destination has failed meanwhile.

        Args:
            group: whose threads deliver.
            stream: its name.
            file: the name of its object.
            patience: seconds for which the store is tried again.
            stall_after: seconds without any progress after which it is given up.
            spool: where what it has not taken goes, or None.
            lanes: how many streams are delivered at once: they share the requests that may be under way.
        """
        assert self.rules is not None
        if self.journal is not None:
            self.journal.inherited = False  # from here on what is left is this run's too
        self._group = group
        rules = self.rules
        if lanes > 1 and rules.buffered:
            rules = msgspec.structs.replace(rules, parallel=max(2, -(-rules.parallel // lanes)))
        numbered = rules.layout.numbered

        def key_of(segment: int) -> str:
            return names.object_key(self._backup, names.segment_file(file, segment, numbered=numbered))

        queue = PieceQueue(
            group,
            memory.QUEUE_BYTES,
            spool=spool,
            stall_after=stall_after,
            on_stall=self._stalled,
            on_spool_error=self._spool_failed,
        )
        writer = StreamWriter(
            self.store,
            rules,
            key_of,
            group,
            on_sent=self.progress.add,
            on_progress=functools.partial(self._moved, queue),
            ledger=self.journal,
            on_failure=queue.abandon,
        )
        delivery = Delivery(stream, queue, writer)
        with self._lock:
            if self.failure is not None:
                writer.close()
                return None
            self._running += 1
            self._deliveries.append(delivery)
        self._policy.patience = self._policy.reach_patience = patience
        self._policy.on_failure = self._trouble
        self.progress.state = "sending"
        return delivery

    def _moved(self, queue: PieceQueue, _count: int) -> None:
        queue.moved()
        self._count_spooled()

    def _count_spooled(self) -> None:
        self.progress.spooled = sum(delivery.queue.spooled for delivery in self._deliveries)

    def _trouble(self, error: StoreError) -> None:
        if isinstance(error, StoreThrottledError):
            for writer in self._writers():
                writer.throttled()

    def _writers(self) -> list[StreamWriter]:
        with self._lock:
            return [delivery.writer for delivery in self._deliveries if delivery.writer is not None]

    def _stalled(self, seconds: float) -> None:
        self._fail_writers(
            StoreStalledError(
                f"{self.text} was dropped",
                f"it took nothing for {format_duration(seconds)} while the dump waited for it",
                "See what is wrong there. --stall-timeout gives it more time; --spool DIR lets it fall behind.",
            )
        )

    def _spool_failed(self, error: OSError) -> None:
        self._fail_writers(_spool_error(self.text, error))

    def _fail_writers(self, error: BackhaulError) -> None:
        for writer in self._writers():
            writer.fail(error)

    def deliver(self, delivery: Delivery, transcript: Future[Transcript]) -> bool:
        """Send a stream from its queue, and complete its objects; tell whether that is done.

        A failure is kept. Once no stream is under way any more, this run's traces are removed.

        Raises:
            StoppedError: the whole run was stopped.
        """
        assert self._group is not None and delivery.writer is not None
        try:
            try:
                for piece in delivery.queue:
                    delivery.writer.write(piece)
                    self._count_spooled()
            except (AbandonedError, OSError):
                # The queue, and its spool, are closed when a part has failed: that is the news then.
                delivery.writer.check()
                raise
            delivery.writer.finish()
            self._complete(delivery, transcript.result())
            return True
        except (AbandonedError, BackhaulError, OSError) as error:
            self._group.check()  # after a stop a failure is its consequence, and cleaned up with the rest
            self._give_up(error)
            delivery.queue.abandon()
            return False
        finally:
            if delivery.writer is not None:
                delivery.writer.close()
            with self._lock:
                self._running -= 1
                ended = self._running == 0
            if ended and self.failure is not None and not self._group.stopped:
                self._leave_or_clean_up()

    def _give_up(self, error: Exception) -> None:
        """Note the first failure, and have the other streams' deliveries end."""
        with self._lock:
            if self.failure is not None:
                return
            if isinstance(error, AbandonedError):
                raise error  # nobody gave this destination up: a fault that must not pass for an end
            if isinstance(error, OSError):
                error = _spool_error(self.text, error)
            assert isinstance(error, BackhaulError)
            self.fail(error)
        self._fail_writers(error)
        for delivery in self._deliveries:
            delivery.queue.abandon()

    def _leave_or_clean_up(self) -> None:
        if isinstance(self.failure, StoreUnavailableError | StoreStalledError):
            self.leave()
        else:
            self.clean_up()

    def confirm(self, transcript: Transcript) -> None:
        """Compare the stream with the backup that was here before this run began.

        It counts as committed, or as failed, if the same id holds something else.
        """
        previous = self._previous
        assert previous is not None
        if any(stream.raw == transcript.raw for stream in previous.streams):
            self.committed = previous
            self.progress.state = "committed"
            self._end_journal()
        else:
            self.fail(
                PreconditionError(
                    f"{self.text}/{self._backup} is another backup",
                    "it was committed by another run, of another stream",
                    "Push again.",
                )
            )

    def _complete(self, delivery: Delivery, transcript: Transcript) -> None:
        """Make a stream's objects visible: it has ended well, and every byte of it was acknowledged."""
        assert self._group is not None and delivery.writer is not None
        self._check_claim()
        assert self._claim is not None
        # A completed upload is, to S3, as old as its beginning: the claim is what keeps clean away until the manifest
        # stands, however long that takes.
        series.renew_claim(self.store, self._backup, self._claim)
        self._group.check()
        delivery.completed(delivery.writer.commit(transcript.crc))
        if self._group.stopped:
            self._take_back()
            self._group.check()

    def _take_back(self) -> None:
        """Delete what was completed after a stop: whoever cleaned up meanwhile could not see it.

        The objects are this run's: they were created just now, and only if there were none.
        """
        if self._suspended:
            return
        for delivery in self._deliveries:
            for segment in delivery.objects:
                with contextlib.suppress(StoreError):
                    self.store.delete(segment.key)
        self.clean_up()

    def commit(self, manifest: MakeManifest) -> None:
        """Write the manifest: every stream is here. A failure is kept, and this run's traces are removed.

        Raises:
            StoppedError: the whole run was stopped.
        """
        assert self._group is not None
        self.progress.state = "committing"
        try:
            self._commit(manifest)
        except BackhaulError as error:
            self._group.check()
            self.fail(error)
            self._leave_or_clean_up()

    def _commit(self, manifest: MakeManifest) -> None:
        assert self._group is not None
        try:
            record = self._ready_to_commit(manifest)
            with self._group.condition:
                self._group.check()
                self._manifest_sent = True
        except (StoppedError, BackhaulError):
            if self._group.stopped:
                self._take_back()
            raise
        self.progress.state = "commit in doubt"
        series.write_manifest(self.store, record)
        self.committed = record
        self.progress.state = "committed"
        self._end_journal()

    def _ready_to_commit(self, manifest: MakeManifest) -> Manifest:
        """Make sure that the objects are there and still this run's, and return the manifest that says so."""
        self._check_claim()
        stored = {delivery.stream: delivery.objects for delivery in self._deliveries}
        for segment in (segment for segments in stored.values() for segment in segments):
            found = self.store.stat(segment.key)
            if found is None or found.size != segment.size:
                raise IntegrityError(
                    f"{self.store.url}/{segment.key} is gone",
                    "it was complete a moment ago" if found is None else f"it has {found.size} bytes now",
                    "Another program deletes or writes there; nothing was committed.",
                )
        record = manifest(stored)
        manifest_format.encode(record)  # what can't be written must fail before the point of no return
        return record

    def _check_claim(self) -> None:
        if not self._owns_claim():
            raise PreconditionError(
                f"{self.text}/{self._backup} is another run's",
                "the claim that this run made there is gone or replaced",
                "Another push began in the same second, or clean removed it; push again.",
            )

    def _end_journal(self) -> None:
        if self._claim is not None:
            with contextlib.suppress(StoreError):  # the backup stands; clean removes the claim
                series.release_claim(self.store, self._backup)
        if self.journal is not None:
            self.journal.remove()

    # -- the end -----------------------------------------------------------------------------------------

    def leave(self) -> None:
        """End this destination's part in a failed run: to be resumed where that is possible, else taken back."""
        if self._suspended or self._keep_inherited():
            return
        resumable = self.journal is not None and self.rules is not None and self.rules.buffered
        if self.journal is not None and resumable and self._claim is not None and not self._key_dropped:
            self._suspended = True
            if self.progress.state != "commit in doubt":
                self.progress.state = "resumable"
            if self.failure is not None:
                kept = format_size(self.progress.sent + self.progress.reused)
                self.failure.todo = f"{self.failure.todo} {kept} are kept there: run the same command again to go on."
            self.journal.close()
        else:
            self.clean_up()

    def clean_up(self) -> None:
        """Take back what this run left, as far as the store can be reached; harmless if it left nothing."""
        if self._manifest_sent or self._suspended or not self.needs_stream or self._keep_inherited():
            return
        self._policy.patience = self._policy.reach_patience = CLEANUP_PATIENCE
        self._policy.sleep = time.sleep
        for step in (self._abort_uploads, self._remove_objects):
            try:
                step()
            except BackhaulError:
                self.progress.state = "failed, leftovers"
        if self.journal is not None and self.progress.state != "failed, leftovers":
            self.journal.remove()

    def _keep_inherited(self) -> bool:
        """Leave alone what an earlier run left if this one failed before it could go on with it; tell whether so."""
        if self.journal is None or not self.journal.inherited:
            return False
        self._suspended = True
        self.progress.state = "resumable"
        self.journal.close()
        return True

    def _abort_uploads(self) -> None:
        for writer in self._writers():
            writer.abort()
        if self.journal is not None:
            self.journal.forsake(self.store)

    def _remove_objects(self) -> None:
        # Only under a claim that is certainly this run's: an id that another run has is not touched.
        if self._claim is not None and self._owns_claim():
            for key in (key for delivery in self._deliveries for key in delivery.keys):
                self.store.delete(key)
            series.release_claim(self.store, self._backup)
            self._claim = None

    def _owns_claim(self) -> bool:
        if self._claim is None:
            return False
        try:
            return series.owns_claim(self.store, self._backup, self._claim)
        except (ObjectNotFoundError, IntegrityError):
            return False

    def result(self) -> DestinationResult:
        """Return the fate."""
        error, manifest = self.failure, self.committed
        return DestinationResult(
            series=self.text,
            state="committed" if manifest else "resumable" if self._suspended else "failed",
            stored_size=manifest.stored_size if manifest else 0,
            objects=sum(len(stream.objects) for stream in manifest.streams) if manifest else 0,
            sent=self.progress.sent,
            reused=self.progress.reused,
            retries=self._policy.retries,
            hedges=sum(delivery.hedges for delivery in self._deliveries),
            remark=self.remark,
            manifest=f"{self.store.url}/{names.object_key(manifest.id, names.MANIFEST)}" if manifest else None,
            error_what=error.what if error else None,
            error_why=error.why if error else None,
            error_next=error.todo if error else None,
        )


def _whole_key(header: Header) -> str:
    """Return the key of a stream that is one object under its plain name."""
    return names.object_key(
        header.backup, names.stream_file(header.stream, header.codec, encrypted=bool(header.recipients))
    )


def _spool_error(text: str, error: OSError) -> StoreError:
    return StoreError(f"The spool of {text} failed", error.strerror or str(error), "Check the disk that --spool names.")
