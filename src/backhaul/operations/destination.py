"""One destination of a push: its claim on the id, its share of the stream, its commit, and its fate.

The order of a commit, and what a stop in between leaves:

1. object completed (invisible to every listing without a manifest; taken back at a stop);
2. manifest sent: the point of no return. From here on nothing is deleted by this run, since the manifest may
   stand or still arrive although no reply came;
3. claim released.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future

import msgspec

from backhaul.errors import BackhaulError, IntegrityError, ObjectNotFoundError, PreconditionError, StoreError
from backhaul.formats import manifest as manifest_format
from backhaul.formats import names
from backhaul.model.location import Location
from backhaul.model.manifest import Manifest, ProducerRecord, RawBytes, SeekTablePosition, StoredBytes
from backhaul.model.objects import StoredObject
from backhaul.model.results import DestinationResult
from backhaul.operations import memory, series
from backhaul.operations.progress import DestinationProgress
from backhaul.pipeline.supervisor import StoppedError, Supervisor
from backhaul.pipeline.tee import PieceQueue
from backhaul.stores.base import Store
from backhaul.stores.multipart import MultipartWriter
from backhaul.stores.retry import RetryPolicy

# While cleaning up after a failure a dead store must not hold the process for long.
CLEANUP_PATIENCE = 2.0


class Transcript(msgspec.Struct, frozen=True):
    """What the whole stream turned out to be: the same for every destination."""

    raw: RawBytes
    stored: StoredBytes
    crc: int
    frames: int
    seek_table: SeekTablePosition | None
    producer: ProducerRecord


class Destination:
    """See the module. ``failure`` and ``committed`` tell the fate; at most one of them is set."""

    def __init__(self, location: Location, store: Store, policy: RetryPolicy) -> None:
        self.text = location.text
        self.store = store
        self.progress = DestinationProgress(location.text)
        self.failure: BackhaulError | None = None
        self.committed: Manifest | None = None
        self._policy = policy
        self._backup = ""
        self._claim: series.Claim | None = None
        self._manifest_sent = False
        self._writer: MultipartWriter | None = None
        self._queue: PieceQueue | None = None
        self._group: Supervisor | None = None
        self._key = ""

    # -- the claim ---------------------------------------------------------------------------------------

    def take_claim(self, backup: str, claim: series.Claim) -> bool:
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

    # -- the stream --------------------------------------------------------------------------------------

    def attach(self, group: Supervisor, file: str, largest_piece: int, patience: float) -> PieceQueue:
        """Make ready for the stream; return the queue that its pieces go into."""
        self._group = group
        self._key = names.object_key(self._backup, file)
        self._queue = PieceQueue(group, memory.QUEUE_BYTES)
        self._writer = MultipartWriter(
            self.store, self._key, group, largest_piece=largest_piece, on_sent=self.progress.add
        )
        self._policy.reach_patience = patience
        self.progress.state = "sending"
        return self._queue

    def deliver(self, transcript: Future[Transcript], manifest: Callable[[Transcript, StoredObject], Manifest]) -> None:
        """Send the stream from the queue, and commit it. A failure is kept, and this run's traces are removed.

        Raises:
            StoppedError: the whole run was stopped.
        """
        assert self._group is not None and self._queue is not None and self._writer is not None
        try:
            for piece in self._queue:
                self._writer.write(piece)
            self._writer.finish()
            self.progress.state = "committing"
            self._commit(transcript.result(), manifest)
        except BackhaulError as error:
            self._group.check()  # after a stop a failure is its consequence, and cleaned up with the rest
            self.fail(error)
            self._queue.abandon()
            self.clean_up()
        finally:
            self._writer.close()

    def _commit(self, transcript: Transcript, manifest: Callable[[Transcript, StoredObject], Manifest]) -> None:
        assert self._group is not None and self._writer is not None
        if not self._owns_claim():
            raise PreconditionError(
                f"{self.text}/{self._backup} is another run's",
                "the claim that this run made there is gone or replaced",
                "Another push began in the same second, or clean removed it; push again.",
            )
        self._group.check()
        stored = self._writer.commit(transcript.crc)
        record = manifest(transcript, stored)
        manifest_format.encode(record)  # what can't be written must fail before the point of no return
        try:
            with self._group.condition:
                self._group.check()
                self._manifest_sent = True
        except StoppedError:
            # Whoever cleaned up meanwhile could not see the object, and has released the claim. It is this
            # run's: it was created just now, and only if there was none.
            with contextlib.suppress(StoreError):
                self.store.delete(self._key)
            self.clean_up()
            raise
        self.progress.state = "commit in doubt"
        series.write_manifest(self.store, record)
        self.committed = record
        self.progress.state = "committed"
        with contextlib.suppress(StoreError):  # the backup stands; clean removes the claim
            series.release_claim(self.store, self._backup)

    # -- the end -----------------------------------------------------------------------------------------

    def clean_up(self) -> None:
        """Take back what this run left, as far as the store can be reached; harmless if it left nothing."""
        if self._manifest_sent:
            return
        self._policy.patience = self._policy.reach_patience = CLEANUP_PATIENCE
        self._policy.sleep = time.sleep
        for step in (self._abort_upload, self._remove_objects):
            try:
                step()
            except BackhaulError:
                self.progress.state = "failed, leftovers"

    def _abort_upload(self) -> None:
        if self._writer is not None:
            self._writer.abort()

    def _remove_objects(self) -> None:
        # Only under a claim that is certainly this run's: an id that another run has is not touched.
        if self._claim is not None and self._owns_claim():
            if self._key:
                self.store.delete(self._key)
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
        if self.committed is not None:
            return DestinationResult(
                series=self.text,
                state="committed",
                stored_size=self.committed.stored_size,
                manifest=f"{self.store.url}/{names.object_key(self.committed.id, names.MANIFEST)}",
            )
        error = self.failure
        return DestinationResult(
            series=self.text,
            state="failed",
            error_what=error.what if error else None,
            error_why=error.why if error else None,
            error_next=error.todo if error else None,
        )
