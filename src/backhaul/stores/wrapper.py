"""What wrappers of stores have in common: everything that they do not change is the inner store's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from backhaul.model.objects import StoredObject, UnfinishedUpload, Upload, UploadedPart
from backhaul.model.profile import Profile
from backhaul.stores.base import Kind, PartRules, Store
from backhaul.stores.body import Body


class StoreWrapper:
    """A store that passes every call on to ``inner``."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.url = inner.url

    @property
    def profile(self) -> Profile:
        """See ``Store.profile``."""
        return self.inner.profile

    def parts(self, at_most: int | None = None) -> PartRules:
        """See ``Store.parts``."""
        return self.inner.parts(at_most)

    def put(
        self, key: str, body: Body, crc64nvme: int, *, if_absent: bool = True, kind: Kind = "record"
    ) -> StoredObject:
        """See ``Store.put``."""
        return self.inner.put(key, body, crc64nvme, if_absent=if_absent, kind=kind)

    def begin(self, key: str) -> Upload:
        """See ``Store.begin``."""
        return self.inner.begin(key)

    def put_part(self, upload: Upload, number: int, offset: int, body: Body, crc64nvme: int) -> UploadedPart:
        """See ``Store.put_part``."""
        return self.inner.put_part(upload, number, offset, body, crc64nvme)

    def uploaded_parts(self, upload: Upload) -> Sequence[UploadedPart]:
        """See ``Store.uploaded_parts``."""
        return self.inner.uploaded_parts(upload)

    def complete(
        self, upload: Upload, parts: Sequence[UploadedPart], crc64nvme: int, *, if_absent: bool = True
    ) -> StoredObject:
        """See ``Store.complete``."""
        return self.inner.complete(upload, parts, crc64nvme, if_absent=if_absent)

    def abort(self, upload: Upload) -> None:
        """See ``Store.abort``."""
        self.inner.abort(upload)

    def unfinished(self) -> Iterator[UnfinishedUpload]:
        """See ``Store.unfinished``."""
        return self.inner.unfinished()

    def read_into(self, key: str, offset: int, out: memoryview, *, etag: str | None = None) -> None:
        """See ``Store.read_into``."""
        self.inner.read_into(key, offset, out, etag=etag)

    def stat(self, key: str) -> StoredObject | None:
        """See ``Store.stat``."""
        return self.inner.stat(key)

    def list(self) -> Iterator[StoredObject]:
        """See ``Store.list``."""
        return self.inner.list()

    def delete(self, key: str) -> None:
        """See ``Store.delete``."""
        self.inner.delete(key)

    def close(self) -> None:
        """See ``Store.close``."""
        self.inner.close()
