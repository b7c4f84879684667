"""A store whose uploads share a rate limit with every other store that has the same bucket of tokens.

It goes outside of the wrapper that tries again: a body is paced once, however often it has to be sent.
"""

from __future__ import annotations

import msgspec

from backhaul.model.objects import NO_METADATA, Metadata, StoredObject, Upload, UploadedPart
from backhaul.stores.base import Kind, Store
from backhaul.stores.body import Body, PartBody, Take
from backhaul.stores.wrapper import StoreWrapper


class RateLimit(msgspec.Struct, frozen=True):
    """``take(n)`` waits until n bytes may go out; ``take_again`` is for those that go out once more.

    ``piece`` is how many bytes to ask for at once: small enough for a slow limit to be even.
    """

    take: Take
    take_again: Take
    piece: int


class ThrottledStore(StoreWrapper):
    """Wraps a store; see the module."""

    def __init__(self, inner: Store, limit: RateLimit) -> None:
        super().__init__(inner)
        self._limit = limit

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
        return self.inner.put(
            key, self._paced(body), crc64nvme, if_absent=if_absent, replaces=replaces, kind=kind, metadata=metadata
        )

    def put_part(self, upload: Upload, number: int, offset: int, body: Body, crc64nvme: int) -> UploadedPart:
        """See ``Store.put_part``."""
        return self.inner.put_part(upload, number, offset, self._paced(body), crc64nvme)

    def _paced(self, body: Body) -> PartBody:
        paced = body if isinstance(body, PartBody) else PartBody(body)
        paced.pace(self._limit.take, self._limit.take_again, self._limit.piece)
        return paced
