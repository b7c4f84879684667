"""A store whose uploads share a rate limit with every other store that has the same bucket of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from backhaul.model.objects import StoredObject, UnfinishedUpload, Upload, UploadedPart
from backhaul.stores.base import Body, Store

_CHUNK = 64 << 10


class PacedBody:
    """Bytes that come as fast as the limit lets them; what the HTTP client reads a request's body from."""

    def __init__(self, body: bytes | bytearray | memoryview, take: Callable[[int], None]) -> None:
        self._view = memoryview(body)
        self._take = take
        self._position = 0

    def __len__(self) -> int:
        return len(self._view)

    def read(self, size: int = -1, /) -> memoryview:
        """Return the next bytes, at most ``size`` and at most one chunk, when they are due."""
        count = min(_CHUNK if size < 0 else min(size, _CHUNK), len(self._view) - self._position)
        if count:
            self._take(count)
        piece = self._view[self._position : self._position + count]
        self._position += count
        return piece

    def tell(self) -> int:
        """Return the position, as botocore asks before it sends."""
        return self._position

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Move, as botocore does before it sends."""
        base = (0, self._position, len(self._view))[whence]
        self._position = base + offset
        return self._position


class ThrottledStore:
    """Wraps a store: ``take(n)`` is called before each n bytes of a body go out, and waits."""

    def __init__(self, inner: Store, take: Callable[[int], None]) -> None:
        self._inner = inner
        self._take = take
        self.url = inner.url
        self.parts = inner.parts
        self.begin = inner.begin
        self.abort = inner.abort
        self.read_into = inner.read_into
        self.stat = inner.stat
        self.delete = inner.delete
        self.close = inner.close

    def put(self, key: str, body: Body, crc64nvme: int, *, if_absent: bool = True) -> StoredObject:
        """See ``Store.put``."""
        return self._inner.put(key, self._paced(body), crc64nvme, if_absent=if_absent)

    def put_part(self, upload: Upload, number: int, offset: int, body: Body, crc64nvme: int) -> UploadedPart:
        """See ``Store.put_part``."""
        return self._inner.put_part(upload, number, offset, self._paced(body), crc64nvme)

    def complete(
        self, upload: Upload, parts: Sequence[UploadedPart], crc64nvme: int, *, if_absent: bool = True
    ) -> StoredObject:
        """See ``Store.complete``."""
        return self._inner.complete(upload, parts, crc64nvme, if_absent=if_absent)

    def unfinished(self) -> Iterator[UnfinishedUpload]:
        """See ``Store.unfinished``."""
        return self._inner.unfinished()

    def list(self) -> Iterator[StoredObject]:
        """See ``Store.list``."""
        return self._inner.list()

    def _paced(self, body: Body) -> Body:
        return PacedBody(body, self._take) if isinstance(body, bytes | bytearray | memoryview) else body
