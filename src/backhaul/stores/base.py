"""What every store can do. Small enough to memorise; the conformance suite in ``backhaul.testing`` holds it.

Keys are relative to the store's root (a series or a mirror), with ``/`` between segments. Errors are the
store errors of ``backhaul.errors`` and no others: each store translates its own at its edge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import msgspec

from backhaul.errors import StoreUnavailableError
from backhaul.model.objects import StoredObject, UnfinishedUpload, Upload, UploadedPart


class PacedBytes(Protocol):
    """Bytes that are handed out at a limited rate: a file-like reader with a known length."""

    def __len__(self) -> int:
        """Return the whole length."""
        ...

    def read(self, size: int = -1, /) -> bytes | memoryview:
        """Return up to that many bytes, after waiting for them to be due; empty at the end."""
        ...


Body = bytes | bytearray | memoryview | PacedBytes


class BrokenReadError(StoreUnavailableError):
    """A read broke off; ``done`` bytes had arrived, in order, and need not be read again."""

    def __init__(self, done: int, error: Exception) -> None:
        super().__init__("A read broke off", str(error) or type(error).__name__, "Try again.")
        self.done = done


class PartRules(msgspec.Struct, frozen=True):
    """How a store wants an upload cut.

    Attributes:
        buffered: whether pieces are gathered into parts of ``formats.part_sizes``. Else each piece is written
            as it comes, in order, and ``complete`` is given a single part that stands for all.
        parallel: how many parts may be under way at once; 1 where they are not buffered.
    """

    buffered: bool
    parallel: int


class Store(Protocol):
    """A place that keeps objects under keys."""

    url: str
    parts: PartRules

    def put(self, key: str, body: Body, crc64nvme: int, *, if_absent: bool = True) -> StoredObject:
        """Make a whole small object visible at once.

        Args:
            key: its name.
            body: its bytes.
            crc64nvme: of the bytes; a store that can checks it on arrival.
            if_absent: refuse to replace an object.

        Raises:
            PreconditionError: ``if_absent``, and there is one.
        """
        ...

    def begin(self, key: str) -> Upload:
        """Begin an object that stays invisible until it is completed."""
        ...

    def put_part(self, upload: Upload, number: int, offset: int, body: Body, crc64nvme: int) -> UploadedPart:
        """Store part ``number`` (from 1), whose first byte is byte ``offset`` of the object.

        May be called from many threads, in any order, and again for the same number with the same bytes.
        """
        ...

    def complete(
        self, upload: Upload, parts: Sequence[UploadedPart], crc64nvme: int, *, if_absent: bool = True
    ) -> StoredObject:
        """Make the object visible, whole; ``parts`` in order, ``crc64nvme`` of all of it.

        Calling it again after a lost reply gives the object that the first call made.

        Raises:
            PreconditionError: ``if_absent``, and another object has the key.
            IntegrityError: the store holds other bytes than were sent.
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
        """Say what the store knows of an object, without reading it; None if there is none."""
        ...

    def list(self) -> Iterator[StoredObject]:
        """Yield every visible object under the root, each once, in an order of the store's own.

        (S3 lists by key; SeaweedFS walks its tree, where ``a/x`` comes before ``a b/x``.)
        """
        ...

    def delete(self, key: str) -> None:
        """Delete an object. Nothing happens if there is none."""
        ...

    def close(self) -> None:
        """Let go of connections. The store is not used afterwards."""
        ...
