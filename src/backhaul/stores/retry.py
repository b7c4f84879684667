"""A store that tries again: the wrapper that every remote store wears.

What failed for a passing reason is tried again with growing, jittered pauses until a deadline; what was
refused is not. A create-if-absent whose reply was lost finds its own object on the second try, and says so.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from backhaul.errors import PreconditionError, StoreError, StoreThrottledError, StoreUnreachableError
from backhaul.model.objects import NO_METADATA, Metadata, StoredObject, UnfinishedUpload, Upload, UploadedPart
from backhaul.model.profile import UNORDERED, Profile
from backhaul.stores.base import BrokenReadError, Kind, PartRules, Store
from backhaul.stores.body import Body, PartBody, content_of
from backhaul.stores.wrapper import StoreWrapper
from backhaul.transforms.digest import encode_crc64nvme

T = TypeVar("T")

FIRST_PAUSE = 0.2
# A store that asked for fewer requests gets a longer rest at once.
THROTTLED_PAUSE = 1.0
LONGEST_PAUSE = 15.0
# A listing that breaks off goes on from the last whole page of this many.
_LISTED_AT_ONCE = 1000


class RetryPolicy:
    """How long to go on, and how to wait.

    Args:
        patience: seconds from an operation's beginning after which its next failure is final.
        reach_patience: the same while no connection comes about at all; None for ``patience``.
        sleep: waits; raises to give up at once (a stopped run).
        clock: monotonic seconds.
        jitter: a number in [0, 1).

    ``on_failure`` is told every passing failure; whoever sends parts learns from it to send fewer at once.
    ``retries`` counts the requests that were made again.
    """

    def __init__(
        self,
        patience: float,
        reach_patience: float | None = None,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.patience = patience
        self.reach_patience = patience if reach_patience is None else reach_patience
        self.sleep = sleep
        self.clock = clock
        self.jitter = jitter
        self.retries = 0
        self.on_failure: Callable[[StoreError], None] = lambda error: None


class RetryingStore(StoreWrapper):
    """Wraps a store; see the module."""

    def __init__(self, inner: Store, policy: RetryPolicy) -> None:
        super().__init__(inner)
        self._policy = policy

    @property
    def profile(self) -> Profile:
        """See ``Store.profile``."""
        return self._tried(lambda: self.inner.profile)

    def parts(self, at_most: int | None = None) -> PartRules:
        """See ``Store.parts``."""
        return self._tried(lambda: self.inner.parts(at_most))

    def put(
        self,
        key: str,
        body: Body,
        crc64nvme: int,
        *,
        if_absent: bool = True,
        replaces: str | None = None,
        kind: Kind = "record",
        metadata: Metadata = NO_METADATA,
    ) -> StoredObject:
        """See ``Store.put``."""
        tries = 0

        def attempt() -> StoredObject:
            nonlocal tries
            tries += 1
            try:
                return self.inner.put(
                    key, body, crc64nvme, if_absent=if_absent, replaces=replaces, kind=kind, metadata=metadata
                )
            except PreconditionError:
                found = self.inner.stat(key) if tries > 1 else None
                if found is None or not self._holds(key, found, body, crc64nvme):
                    raise
                return found

        return self._tried(attempt)

    def begin(self, key: str, *, metadata: Metadata = NO_METADATA) -> Upload:
        """See ``Store.begin``. A lost reply leaves an upload that only ``clean`` will find."""
        return self._tried(lambda: self.inner.begin(key, metadata=metadata))

    def put_part(self, upload: Upload, number: int, offset: int, body: Body, crc64nvme: int) -> UploadedPart:
        """See ``Store.put_part``. Bytes that went out for the first time are progress: a part may take long."""
        return self._tried(
            lambda: self.inner.put_part(upload, number, offset, body, crc64nvme),
            progress=lambda: body.reached if isinstance(body, PartBody) else 0,
        )

    def copy_part(
        self, upload: Upload, number: int, source: str, etag: str, offset: int, size: int, crc64nvme: int
    ) -> UploadedPart:
        """See ``Store.copy_part``."""
        return self._tried(lambda: self.inner.copy_part(upload, number, source, etag, offset, size, crc64nvme))

    def copy(self, source: StoredObject, key: str, *, metadata: Metadata = NO_METADATA) -> StoredObject:
        """See ``Store.copy``. A lost reply leaves a copy that the second try finds."""
        tries = 0

        def attempt() -> StoredObject:
            nonlocal tries
            tries += 1
            try:
                return self.inner.copy(source, key, metadata=metadata)
            except PreconditionError:
                found = self.inner.stat(key) if tries > 1 else None
                same = found is not None and found.size == source.size
                if found is None or not same or dict(found.metadata) != dict(metadata):
                    raise
                return found

        return self._tried(attempt)

    def uploaded_parts(self, upload: Upload) -> Sequence[UploadedPart]:
        """See ``Store.uploaded_parts``."""
        return self._tried(lambda: self.inner.uploaded_parts(upload))

    def complete(
        self,
        upload: Upload,
        parts: Sequence[UploadedPart],
        crc64nvme: int,
        *,
        if_absent: bool = True,
        replaces: str | None = None,
    ) -> StoredObject:
        """See ``Store.complete``."""
        return self._tried(
            lambda: self.inner.complete(upload, parts, crc64nvme, if_absent=if_absent, replaces=replaces)
        )

    def abort(self, upload: Upload) -> None:
        """See ``Store.abort``."""
        self._tried(lambda: self.inner.abort(upload))

    def unfinished(self) -> Iterator[UnfinishedUpload]:
        """See ``Store.unfinished``. Tried again as a whole: a listing that broke off is not a short one."""
        return iter(self._tried(lambda: list(self.inner.unfinished())))

    def read_into(self, key: str, offset: int, out: memoryview, *, etag: str | None = None) -> None:
        """See ``Store.read_into``. A broken read goes on from where it broke."""
        done = 0

        def attempt() -> None:
            nonlocal done
            try:
                self.inner.read_into(key, offset + done, out[done:], etag=etag)
            except BrokenReadError as error:
                done += error.done
                raise

        self._tried(attempt, progress=lambda: done)

    def stat(self, key: str) -> StoredObject | None:
        """See ``Store.stat``."""
        return self._tried(lambda: self.inner.stat(key))

    def list(self, prefix: str = "", *, after: str = "", until: str | None = None) -> Iterator[StoredObject]:
        """See ``Store.list``. Goes on behind the last key that came; where there is no order it is tried as a whole."""
        if self.profile.listing == UNORDERED:
            yield from self._tried(lambda: list(self.inner.list(prefix, after=after, until=until)))
            return
        pages = iter(self.inner.list(prefix, after=after, until=until))

        def page() -> list[StoredObject]:
            nonlocal pages
            try:
                return list(itertools.islice(pages, _LISTED_AT_ONCE))
            except StoreError:
                pages = iter(self.inner.list(prefix, after=after, until=until))
                raise

        while found := self._tried(page):
            after = found[-1].key
            yield from found

    def delete(self, key: str, *, etag: str | None = None) -> None:
        """See ``Store.delete``."""
        self._tried(lambda: self.inner.delete(key, etag=etag))

    # -- inside ----------------------------------------------------------------------------------------

    def _tried(self, attempt: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        """Run ``attempt`` until it succeeds, fails for good, or patience ends.

        ``progress`` tells how far it has come; an attempt that moved it starts patience anew.
        """
        policy = self._policy
        pause = FIRST_PAUSE
        reached = progress()
        began = policy.clock()
        while True:
            try:
                return attempt()
            except StoreError as error:
                if not error.transient:
                    raise
                policy.on_failure(error)
                now = policy.clock()
                if progress() != reached:
                    reached, began, pause = progress(), now, FIRST_PAUSE
                if isinstance(error, StoreThrottledError):
                    pause = max(pause, THROTTLED_PAUSE)
                delay = pause * (0.5 + policy.jitter())
                unreachable = isinstance(error, StoreUnreachableError)
                patience = policy.reach_patience if unreachable else policy.patience
                left = began + patience - now
                if left <= 0:
                    raise
                delay = min(delay, left)  # the last try is made at the deadline, not before it
            policy.retries += 1
            policy.sleep(delay)
            pause = min(pause * 2, LONGEST_PAUSE)

    def _holds(self, key: str, found: StoredObject, body: Body, crc64nvme: int) -> bool:
        """Tell whether the object is the one that an earlier try, whose reply was lost, has made."""
        if found.size != len(body):
            return False
        if found.checksum is not None:
            return found.checksum == f"CRC64NVME:{encode_crc64nvme(crc64nvme)}"
        content = bytearray(found.size)
        self.inner.read_into(key, 0, memoryview(content), etag=found.etag)
        return content == content_of(body)
