"""A store in memory: the contract of ``stores.base.Store`` at its shortest, and a place for tests to look into."""

from __future__ import annotations

import datetime as dt
import secrets
import threading
from collections.abc import Iterator, Sequence

import msgspec

from backhaul.errors import IntegrityError, ObjectNotFoundError, PreconditionError, StoreError
from backhaul.formats.part_sizes import plan_layout
from backhaul.formats.profiles import PROFILES
from backhaul.model.objects import NO_METADATA, Metadata, StoredObject, UnfinishedUpload, Upload, UploadedPart
from backhaul.stores.base import Kind, PartRules
from backhaul.stores.body import Body, PartBody
from backhaul.transforms.digest import crc64nvme as checksum_of
from backhaul.transforms.digest import encode_crc64nvme


class _Pending(msgspec.Struct):
    key: str
    parts: dict[int, bytes]
    since: dt.datetime
    metadata: Metadata = NO_METADATA


class MemoryStore:
    """Objects in a dictionary. ``objects`` and ``uploads`` may be read, and changed, by tests."""

    def __init__(self, url: str = "memory:", *, parts: PartRules | None = None) -> None:
        self.url = url
        self.profile = PROFILES["memory"]
        self._rules = parts
        self.objects: dict[str, tuple[bytes, StoredObject]] = {}
        self.uploads: dict[str, _Pending] = {}
        self._lock = threading.Lock()

    def parts(self, at_most: int | None = None) -> PartRules:
        """See ``Store.parts``."""
        layout = plan_layout(self.profile.limits, at_most=at_most)
        return self._rules or PartRules(buffered=True, parallel=2, layout=layout)

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
        content = _content(body)
        _check(key, content, crc64nvme)
        with self._lock:
            return self._publish(key, content, if_absent=if_absent, replaces=replaces, metadata=metadata)

    def begin(self, key: str, *, metadata: Metadata = NO_METADATA) -> Upload:
        """See ``Store.begin``."""
        with self._lock:
            token = f"upload-{secrets.token_hex(8)}"
            self.uploads[token] = _Pending(key, {}, dt.datetime.now(dt.UTC), metadata)
        return Upload(key=key, token=token)

    def put_part(self, upload: Upload, number: int, offset: int, body: Body, crc64nvme: int) -> UploadedPart:
        """See ``Store.put_part``."""
        content = _content(body)
        _check(upload.key, content, crc64nvme)
        with self._lock:
            if upload.token not in self.uploads:
                raise ObjectNotFoundError(f"{upload.key}: no such upload", upload.token, "")
            self.uploads[upload.token].parts[number] = content
        return UploadedPart(number=number, size=len(content), etag=_part_etag(content), crc64nvme=crc64nvme)

    def copy_part(
        self, upload: Upload, number: int, source: str, etag: str, offset: int, size: int, crc64nvme: int
    ) -> UploadedPart:
        """See ``Store.copy_part``."""
        content = bytearray(size)
        self.read_into(source, offset, memoryview(content), etag=etag)
        if checksum_of(bytes(content)) != crc64nvme:
            raise IntegrityError(f"{upload.key}: the copied bytes have another checksum", "", "")
        return self.put_part(upload, number, 0, bytes(content), crc64nvme)

    def copy(self, source: StoredObject, key: str, *, metadata: Metadata = NO_METADATA) -> StoredObject:
        """See ``Store.copy``."""
        content = bytearray(source.size)
        self.read_into(source.key, 0, memoryview(content), etag=source.etag)
        with self._lock:
            return self._publish(key, bytes(content), if_absent=True, metadata=metadata)

    def uploaded_parts(self, upload: Upload) -> Sequence[UploadedPart]:
        """See ``Store.uploaded_parts``."""
        with self._lock:
            pending = self.uploads.get(upload.token)
            if pending is None:
                raise ObjectNotFoundError(f"{upload.key}: no such upload", upload.token, "")
            return [
                UploadedPart(number=number, size=len(content), etag=_part_etag(content), crc64nvme=checksum_of(content))
                for number, content in sorted(pending.parts.items())
            ]

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
        with self._lock:
            pending = self.uploads.get(upload.token)
            if pending is None:
                found = self.objects.get(upload.key)
                if found is not None and found[1].checksum == f"CRC64NVME:{encode_crc64nvme(crc64nvme)}":
                    return found[1]
                raise ObjectNotFoundError(f"{upload.key}: no such upload", upload.token, "")
            if [part.number for part in parts] != sorted(pending.parts):
                raise StoreError(f"{upload.key}: the parts do not fit", f"have {sorted(pending.parts)}", "")
            content = b"".join(pending.parts[part.number] for part in parts)
            _check(upload.key, content, crc64nvme)
            stored = self._publish(
                upload.key, content, if_absent=if_absent, replaces=replaces, metadata=pending.metadata
            )
            del self.uploads[upload.token]
            return stored

    def abort(self, upload: Upload) -> None:
        """See ``Store.abort``."""
        with self._lock:
            self.uploads.pop(upload.token, None)

    def unfinished(self) -> Iterator[UnfinishedUpload]:
        """See ``Store.unfinished``."""
        with self._lock:
            found = [
                UnfinishedUpload(
                    upload=Upload(key=pending.key, token=token),
                    size=sum(map(len, pending.parts.values())),
                    last_activity=pending.since,
                )
                for token, pending in self.uploads.items()
            ]
        yield from found

    def read_into(self, key: str, offset: int, out: memoryview, *, etag: str | None = None) -> None:
        """See ``Store.read_into``."""
        with self._lock:
            if key not in self.objects:
                raise ObjectNotFoundError(f"{key} does not exist", "", "")
            content, stored = self.objects[key]
        if etag is not None and stored.etag != etag:
            raise PreconditionError(f"{key} was replaced", "", "")
        piece = content[offset : offset + len(out)]
        if len(piece) != len(out):
            raise IntegrityError(f"{key} is too short", f"{len(piece)} of {len(out)} bytes")
        out[:] = piece

    def stat(self, key: str) -> StoredObject | None:
        """See ``Store.stat``."""
        with self._lock:
            found = self.objects.get(key)
        return found[1] if found else None

    def list(self, prefix: str = "", *, after: str = "", until: str | None = None) -> Iterator[StoredObject]:
        """See ``Store.list``."""
        with self._lock:
            found = [stored for _, (_, stored) in sorted(self.objects.items())]
        for stored in found:
            if stored.key.startswith(prefix) and stored.key > after and (until is None or stored.key <= until):
                yield stored

    def delete(self, key: str, *, etag: str | None = None) -> None:
        """See ``Store.delete``."""
        with self._lock:
            found = self.objects.get(key)
            if etag is not None and found is not None and found[1].etag != etag:
                raise PreconditionError(f"{key} was replaced", "", "")
            self.objects.pop(key, None)

    def close(self) -> None:
        """See ``Store.close``."""

    def _publish(
        self, key: str, content: bytes, *, if_absent: bool, replaces: str | None = None, metadata: Metadata
    ) -> StoredObject:
        if replaces is not None:
            if key not in self.objects or self.objects[key][1].etag != replaces:
                raise PreconditionError(f"{key} was replaced", "", "")
        elif if_absent and key in self.objects:
            raise PreconditionError(f"{key} exists already", "", "")
        stored = StoredObject(
            key=key,
            size=len(content),
            modified=dt.datetime.now(dt.UTC),
            etag=f'"{secrets.token_hex(8)}"',
            checksum=f"CRC64NVME:{encode_crc64nvme(checksum_of(content))}",
            metadata=metadata,
        )
        self.objects[key] = (content, stored)
        return stored


def _content(body: Body) -> bytes:
    if not isinstance(body, PartBody):
        return bytes(body)
    reader = body.open()
    pieces = []
    while piece := reader.read():
        pieces.append(bytes(piece))
    return b"".join(pieces)


def _part_etag(content: bytes) -> str:
    return f'"{checksum_of(content):016x}"'


def _check(key: str, content: bytes, crc64nvme: int) -> None:
    if checksum_of(content) != crc64nvme:
        raise StoreError(f"{key}: bad checksum", "the bytes do not fit their CRC64NVME", "")
