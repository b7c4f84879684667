"""What every store can do. Small enough to memorise; the conformance suite in ``backhaul.testing`` holds it.

Keys are relative to the store's root (a series or a mirror), with ``/`` between segments. Errors are the
store errors of ``backhaul.errors`` and no others: each store translates its own at its edge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import msgspec

from backhaul.errors import StoreUnavailableError
from backhaul.formats.part_sizes import PartLayout
from backhaul.model.objects import NO_METADATA, Metadata, StoredObject, UnfinishedUpload, Upload, UploadedPart
from backhaul.model.profile import Profile
from backhaul.stores.body import Body

# What an object is for: ``data`` (a stream) gets the storage class, tags and retention that were asked for,
# ``record`` (a manifest) all but the storage class, since it must be readable at once; ``working`` none, since
# it is deleted again.
Kind = Literal["data", "record", "working"]

# The largest object that can be copied in one request (S3's CopyObject).
COPY_LIMIT = 5 * 10**9


class BrokenReadError(StoreUnavailableError):
    """A read broke off; ``done`` bytes had arrived, in order, and need not be read again."""

    def __init__(self, done: int, error: Exception) -> None:
        super().__init__("A read broke off", str(error) or type(error).__name__, "Try again.")
        self.done = done


class PartRules(msgspec.Struct, frozen=True):
    """How a store wants an upload cut.

    Attributes:
        buffered: whether pieces are gathered into parts of ``layout``. Else each piece is written as it comes,
            in order, and ``complete`` is given a single part that stands for all.
        parallel: how many parts may be under way at once; 1 where they are not buffered.
        layout: the sizes of parts and segments; not looked at where they are not buffered.
        hedged: whether a part may be under way twice. (Where ETags differ from try to try, the later one would
            make the earlier one's worthless.)
    """

    buffered: bool
    parallel: int
    layout: PartLayout
    hedged: bool = True


class Store(Protocol):
    """A place that keeps objects under keys."""

    url: str

    @property
    def profile(self) -> Profile:
        """What kind of store it is. May ask the store, the first time.

        Raises:
            StoreError: it had to be asked, and could not be.
        """
        ...

    def parts(self, at_most: int | None = None) -> PartRules:
        """Say how it wants an upload cut. May ask the store, as ``profile`` does.

        Args:
            at_most: stored bytes that the stream certainly does not exceed; None if nobody knows.
        """
        ...

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
        """Make a whole small object visible at once.

        Args:
            key: its name.
            body: its bytes.
            crc64nvme: of the bytes; a store that can checks it on arrival.
            if_absent: refuse to replace an object. Where the profile has no conditional writes it is looked
                first, and two writers in the same instant are not told apart.
            replaces: the ETag of the only object that may be replaced; ``if_absent`` is not looked at then.
            kind: what the object is for.
            metadata: stored with it, where the store keeps such.

        Raises:
            PreconditionError: ``if_absent``, and there is one; or ``replaces``, and it is not there any more.
        """
        ...

    def begin(self, key: str, *, metadata: Metadata = NO_METADATA) -> Upload:
        """Begin an object, of kind ``data``, that stays invisible until it is completed.

        ``metadata`` is stored with it, where the store keeps such.
        """
        ...

    def put_part(self, upload: Upload, number: int, offset: int, body: Body, crc64nvme: int) -> UploadedPart:
        """Store part ``number`` (from 1), whose first byte is byte ``offset`` of the object.

        May be called from many threads, in any order, and again for the same number with the same bytes.
        """
        ...

    def complete(
        self,
        upload: Upload,
        parts: Sequence[UploadedPart],
        crc64nvme: int,
        *,
        if_absent: bool = True,
        replaces: str | None = None,
    ) -> StoredObject:
        """Make the object visible, whole; ``parts`` in order, ``crc64nvme`` of all of it.

        Calling it again after a lost reply gives the object that the first call made.

        ``if_absent`` and ``replaces`` are as in ``put``.

        Raises:
            PreconditionError: another object has the key than may have it.
            IntegrityError: the store holds other bytes than were sent.
        """
        ...

    def copy_part(
        self, upload: Upload, number: int, source: str, etag: str, offset: int, size: int, crc64nvme: int
    ) -> UploadedPart:
        """Make a range of an object part ``number`` of an upload, without its bytes leaving the store.

        Only where the profile has part copies.

        Args:
            upload, number: as in ``put_part``.
            source: the key of the object that holds the bytes.
            etag: which object it must be.
            offset, size: the range.
            crc64nvme: of the range, as the caller knows it: the completion asserts what it adds up to.

        Raises:
            PreconditionError: the source is another object now.
            ObjectNotFoundError: there is no such source, or no such upload.
            IntegrityError: the store copied other bytes, as far as it says.
        """
        ...

    def copy(self, source: StoredObject, key: str, *, metadata: Metadata = NO_METADATA) -> StoredObject:
        """Make an object of the same content under another, absent key, without its bytes leaving the store.

        Args:
            source: its key, size and ETag are looked at; at most ``COPY_LIMIT`` bytes.
            key: the new name.
            metadata: stored with the new object, where the store keeps such.

        Raises:
            PreconditionError: the source is another object now, or the key is taken.
            ObjectNotFoundError: there is no such source.
        """
        ...

    def uploaded_parts(self, upload: Upload) -> Sequence[UploadedPart]:
        """Return the parts that an upload holds, by number; ``crc64nvme`` is 0 where the store does not say.

        A part that was sent several times may be there several times.

        Raises:
            ObjectNotFoundError: there is no such upload, or it is completed, or the store can't go on with one.
        """
        ...

    def abort(self, upload: Upload) -> None:
        """Forget an upload and its parts. Nothing happens if there is none."""
        ...

    def unfinished(self) -> Iterator[UnfinishedUpload]:
        """Yield the uploads that were begun under this root and neither completed nor aborted."""
        ...

    def read_into(self, key: str, offset: int, out: memoryview, *, etag: str | None = None) -> None:
        """Fill ``out`` with the object's bytes from ``offset``.

        Raises:
            BrokenReadError: the connection broke after some bytes.
            ObjectNotFoundError: no such object.
            PreconditionError: ``etag`` is given and the object is another one now.
            IntegrityError: the object ends before ``out`` is full.
        """
        ...

    def stat(self, key: str) -> StoredObject | None:
        """Say what the store knows of an object, its metadata too, without reading it; None if there is none."""
        ...

    def list(self, prefix: str = "", *, after: str = "", until: str | None = None) -> Iterator[StoredObject]:
        """Yield every visible object under the root, each once, in the order that the profile names.

        Args:
            prefix: only keys that begin so.
            after: only keys behind this one, in that order; where the profile names none, all that there are.
            until: only keys up to and with this one, in that order.
        """
        ...

    def delete(self, key: str, *, etag: str | None = None) -> None:
        """Delete an object. Nothing happens if there is none.

        Args:
            key: its name.
            etag: delete it only if it is this one. Where the profile has no conditional deletes it is looked first.

        Raises:
            PreconditionError: it is another object now.
        """
        ...

    def close(self) -> None:
        """Let go of connections. The store is not used afterwards."""
        ...
