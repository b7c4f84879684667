"""What wrappers of stores have in common: everything that they do not change is the inner store's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from backhaul.model.objects import NO_METADATA, Metadata, StoredObject, UnfinishedUpload, Upload, UploadedPart
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
            key, body, crc64nvme, if_absent=if_absent, replaces=replaces, kind=kind, metadata=metadata
        )

    def begin(self, key: str, *, metadata: Metadata = NO_METADATA) -> Upload:
        """See ``Store.begin``."""
        return self.inner.begin(key, metadata=metadata)

    def put_part(self, upload: Upload, number: int, offset: int, body: Body, crc64nvme: int) -> UploadedPart:
        """See ``Store.put_part``."""
        return self.inner.put_part(upload, number, offset, body, crc64nvme)

    def copy_part(
        self, upload: Upload, number: int, source: str, etag: str, offset: int, size: int, crc64nvme: int
    ) -> UploadedPart:
        """See ``Store.copy_part``."""
        return self.inner.copy_part(upload, number, source, etag, offset, size, crc64nvme)

    def copy(self, source: StoredObject, key: str, *, metadata: Metadata = NO_METADATA) -> StoredObject:
        """See ``Store.copy``."""
        return self.inner.copy(source, key, metadata=metadata)

    def uploaded_parts(self, upload: Upload) -> Sequence[UploadedPart]:
        """See ``Store.uploaded_parts``."""
        return self.inner.uploaded_parts(upload)

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
        return self.inner.complete(upload, parts, crc64nvme, if_absent=if_absent, replaces=replaces)

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

    def list(self, prefix: str = "", *, after: str = "", until: str | None = None) -> Iterator[StoredObject]:
        """See ``Store.list``."""
        return self.inner.list(prefix, after=after, until=until)

    def delete(self, key: str, *, etag: str | None = None) -> None:
        """See ``Store.delete``."""
        self.inner.delete(key, etag=etag)

    def close(self) -> None:
        """See ``Store.close``."""
        self.inner.close()
