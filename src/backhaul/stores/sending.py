"""Parts on their way to one store: several at once, as many as help, the slow ones tried twice.

One sender belongs to one destination. Its threads are its own: a try that hangs in a dead connection, and is not
needed any more since another one got the part there, must not keep the run from ending.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from backhaul.model.objects import UploadedPart
from backhaul.pipeline.supervisor import StoppedError, Supervisor
from backhaul.planning.concurrency import UploadConcurrency
from backhaul.planning.hedging import HedgePolicy
from backhaul.stores.body import BodyCancelledError, PartBody

# Bytes of parts under way to one destination. Small parts need company to fill a link; large ones do not.
MAX_UNDER_WAY = 256 << 20
_WATCH_EVERY = 0.25


class PartJob:
    """One part: how to send it, and what to do when that is done.

    Args:
        body: its bytes.
        send: one try; called again, at the same time, for a hedge. It is given the job, so that it need not hold it:
            a job that holds itself keeps its bytes until the garbage collector comes by.
        done: given the acknowledged part, once.
        release: called once when no try reads the bytes any more.
    """

    def __init__(
        self,
        body: PartBody,
        send: Callable[[PartJob], UploadedPart],
        done: Callable[[UploadedPart], None],
        release: Callable[[], None],
    ) -> None:
        self.body = body
        self.send = send
        self.done = done
        self.release = release
        self.tries = 0
        self.acknowledged = False
        self.failure: BaseException | None = None
        # Whether how long it took says something of the store. (Not where nothing had to be sent.)
        self.measured = True
        self.began = 0.0


class PartSender:
    """See the module. ``submit`` and ``drain`` come from one thread.

    Args:
        group: whose stop ends all waiting.
        name: for the threads' names.
        concurrency: how many at once.
        hedge: when to try a part twice; None for never.
        on_failure: told when the first part has failed for good, from any thread.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        group: Supervisor,
        name: str,
        concurrency: UploadConcurrency,
        hedge: HedgePolicy | None = None,
        *,
        on_failure: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._group = group
        self._name = name
        self._concurrency = concurrency
        self._hedge = hedge
        self._on_failure = on_failure
        self._clock = clock
        self._waiting: deque[PartJob] = deque()
        self._running: list[PartJob] = []
        self._unacknowledged = 0
        self._tries = 0
        self._weight = 0
        self._idle = 0
        self._threads = 0
        self._watcher: threading.Thread | None = None
        self._closed = threading.Event()
        self._failure: BaseException | None = None
        self.hedges = 0

    def submit(self, job: PartJob) -> None:
        """Send a part as soon as there is room among those under way.

        Raises:
            BaseException: the first failure of an earlier part.
        """
        size = len(job.body)
        with self._group.condition:
            if not self._has_room(size):
                self._concurrency.waited()
            self._group.wait_for(lambda: self._failure is not None or self._has_room(size))
            self._raise_failure()
            self._unacknowledged += 1
            self._weight += size
            self._waiting.append(job)
            if self._idle < len(self._waiting):
                self._start_thread()
            self._group.condition.notify_all()
        if self._hedge is not None and self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, name=f"{self._name}-watch", daemon=True)
            self._watcher.start()

    def drain(self) -> None:
        """Wait until every part was acknowledged.

        Raises:
            BaseException: the first failure.
        """
        with self._group.condition:
            self._group.wait_for(lambda: self._failure is not None or self._unacknowledged == 0)
            self._raise_failure()

    def fail(self, error: BaseException) -> None:
        """Make whoever submits or drains fail with that error."""
        with self._group.condition:
            if self._failure is None:
                self._failure = error
            for job in [*self._running, *self._waiting]:
                job.body.cancel()
            self._group.condition.notify_all()
        self._on_failure()

    def check(self) -> None:
        """Raise the first failure, if a part has failed."""
        with self._group.condition:
            self._raise_failure()

    def throttled(self) -> None:
        """Note that the store asked for fewer requests."""
        with self._group.condition:
            self._concurrency.throttled(self._clock())

    @property
    def backlog(self) -> int:
        """Bytes of parts that have not gone out yet."""
        with self._group.condition:
            return sum(len(job.body) - job.body.reached for job in [*self._running, *self._waiting])

    @property
    def limit(self) -> int:
        """How many parts may be under way."""
        return self._concurrency.limit

    def close(self) -> None:
        """Let the threads end; parts that did not begin are dropped, and those under way at their next piece."""
        self._closed.set()
        with self._group.condition:
            for job in self._waiting:
                self._forget(job)
            self._waiting.clear()
            for job in self._running:
                job.body.cancel()
            self._group.condition.notify_all()

    def wait_idle(self, timeout: float) -> bool:
        """Wait at most that long until nothing is under way, whatever has failed; tell whether that is so."""
        with self._group.condition:
            return self._group.condition.wait_for(lambda: self._tries == 0, timeout)

    # -- inside; with the group's condition held unless said otherwise -----------------------------------

    def _has_room(self, size: int) -> bool:
        return self._unacknowledged == 0 or (
            self._unacknowledged < self._concurrency.limit and self._weight + size <= MAX_UNDER_WAY
        )

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _forget(self, job: PartJob) -> None:
        self._unacknowledged -= 1
        self._weight -= len(job.body)
        job.release()

    def _start_thread(self) -> None:
        self._threads += 1
        threading.Thread(target=self._run, name=f"{self._name}-{self._threads}", daemon=True).start()

    def _run(self) -> None:
        condition = self._group.condition
        while True:
            with condition:
                self._idle += 1
                while not self._waiting and not self._closed.is_set() and not self._group.stopped:
                    condition.wait()
                self._idle -= 1
                if not self._waiting:
                    return
                job = self._waiting.popleft()
                self._running.append(job)
                job.tries += 1
                self._tries += 1
                job.began = self._clock()
            self._try(job)
            del job

    def _try(self, job: PartJob) -> None:
        """Send a part, without the lock, and settle what came of it."""
        failure: BaseException | None = None
        part: UploadedPart | None = None
        try:
            part = job.send(job)
            with self._group.condition:
                first = not job.acknowledged
                job.acknowledged = True
            if first:
                # Other tries are not needed any more; they end at their next piece, or with their connection.
                job.body.cancel()
                job.done(part)
        except BodyCancelledError:
            failure = StoppedError()
        except BaseException as error:  # noqa: BLE001 - handed to whoever submits or drains
            failure = error
        with self._group.condition:
            failed = self._failure is not None
            self._settle(job, part, failure)
            failed = self._failure is not None and not failed
            self._group.condition.notify_all()
        if failed:
            self._on_failure()

    def _settle(self, job: PartJob, part: UploadedPart | None, failure: BaseException | None) -> None:
        job.tries -= 1
        self._tries -= 1
        if failure is not None and (job.failure is None or isinstance(job.failure, StoppedError)):
            job.failure = failure
        now = self._clock()
        size = len(job.body)
        if part is not None and failure is None and job in self._running:
            self._unacknowledged -= 1
            self._running.remove(job)
            if job.measured:
                self._concurrency.acknowledged(now, size)
            if job.measured and self._hedge is not None:
                self._hedge.finished(size, now - job.began)
        elif failure is not None and job.tries == 0 and job in self._running:
            self._running.remove(job)
            self._unacknowledged -= 1
            if self._failure is None:
                self._failure = job.failure
        if job.tries == 0:
            self._weight -= size
            job.release()

    def _watch(self) -> None:
        """Try the slowest part once more, one at a time."""
        assert self._hedge is not None
        while not self._closed.wait(_WATCH_EVERY):
            if self._group.stopped:
                return
            with self._group.condition:
                if self._tries > len(self._running):
                    continue  # a try that lost still holds its part's memory
                now = self._clock()
                slow = [job for job in self._running if self._hedge.is_slow(len(job.body), now - job.began)]
                job = min(slow, key=lambda each: each.began, default=None)
                if job is None or job.tries != 1 or job.acknowledged:
                    continue
                job.tries += 1
                self._tries += 1
                self._hedge.hedged()
                self.hedges += 1
            self._try(job)
