"""A key prefix in an S3 bucket as a store.

Parts carry their CRC64NVME, which the store checks on arrival; the whole object's CRC64NVME is asserted at
completion. Payloads are not hashed again for the signature (that would halve the speed). botocore's own
retries are off: ``stores.retry`` does that for every kind of store, and knows which answers were lost.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from backhaul.errors import (
    IntegrityError,
    ObjectNotFoundError,
    PreconditionError,
    StoreUnavailableError,
)
from backhaul.model.location import Location
from backhaul.model.objects import StoredObject, UnfinishedUpload, Upload, UploadedPart
from backhaul.stores.base import Body, BrokenReadError, PartRules
from backhaul.stores.s3.errors import translated
from backhaul.transforms.digest import encode_crc64nvme

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PARALLEL_PARTS = 4
CONNECT_TIMEOUT = 10
# Seconds of silence after which a request counts as lost: questions are answered at once, while a part
# or a completion may keep a store busy.
QUESTION_TIMEOUT = 20
BULK_TIMEOUT = 60
_CHECKSUM: Final = "CRC64NVME"


class S3Store:
    """Objects under ``s3://bucket/prefix/``. Thread-safe; one client, one pool of connections."""

    def __init__(self, location: Location) -> None:
        self.url = f"s3://{location.bucket}/{location.path}"
        self.parts = PartRules(buffered=True, parallel=PARALLEL_PARTS)
        self._bucket = location.bucket
        self._prefix = location.path + "/"
        self._endpoint = location.endpoint or "the S3 endpoint"
        self._lock = threading.Lock()
        self._bulk_client: S3Client | None = None
        with self._translating(f"Could not set up access to {self.url}"):
            session = boto3.session.Session(profile_name=location.profile, region_name=location.region)
            self._session, self._location = session, location
            self._client = self._new_client(QUESTION_TIMEOUT)
        self._endpoint = self._client.meta.endpoint_url

    def _new_client(self, read_timeout: float) -> S3Client:
        return self._session.client(
            "s3",
            endpoint_url=self._location.endpoint,
            region_name=self._session.region_name or "us-east-1",
            config=Config(
                connect_timeout=CONNECT_TIMEOUT,
                read_timeout=read_timeout,
                max_pool_connections=32,
                # Part bodies are memoryviews of reused memory, which validation would refuse.
                parameter_validation=False,
                retries={"total_max_attempts": 1},
                # Third-party stores answer errors to the trailers that newer botocore adds by itself.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                s3={"payload_signing_enabled": False},
            ),
        )

    @property
    def _bulk(self) -> S3Client:
        """The client for what may take long: parts, and completions. Made on first use."""
        with self._lock:
            if self._bulk_client is None:
                self._bulk_client = self._new_client(BULK_TIMEOUT)
            return self._bulk_client

    def put(self, key: str, body: Body, crc64nvme: int, *, if_absent: bool = True) -> StoredObject:
        """See ``Store.put``."""
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if if_absent else {}
        with self._translating(f"Could not write {self._name(key)}"):
            reply = self._client.put_object(
                Bucket=self._bucket,
                Key=self._prefix + key,
                Body=body,  # type: ignore[arg-type]
                ContentLength=len(body),
                ChecksumCRC64NVME=encode_crc64nvme(crc64nvme),
                **condition,
            )
        checksum = reply.get("ChecksumCRC64NVME")
        return StoredObject(
            key=key,
            size=len(body),
            modified=dt.datetime.now(dt.UTC),
            etag=reply.get("ETag"),
            checksum=f"{_CHECKSUM}:{checksum}" if checksum else None,
        )

    def begin(self, key: str) -> Upload:
        """See ``Store.begin``."""
        with self._translating(f"Could not begin an upload to {self._name(key)}"):
            reply = self._client.create_multipart_upload(
                Bucket=self._bucket,
                Key=self._prefix + key,
                ChecksumAlgorithm=_CHECKSUM,
                ChecksumType="FULL_OBJECT",
            )
        return Upload(key=key, token=reply["UploadId"])

    def put_part(self, upload: Upload, number: int, offset: int, body: Body, crc64nvme: int) -> UploadedPart:
        """See ``Store.put_part``."""
        with self._translating(f"Could not upload part {number} of {self._name(upload.key)}"):
            reply = self._bulk.upload_part(
                Bucket=self._bucket,
                Key=self._prefix + upload.key,
                UploadId=upload.token,
                PartNumber=number,
                Body=body,  # type: ignore[arg-type]
                ContentLength=len(body),
                ChecksumCRC64NVME=encode_crc64nvme(crc64nvme),
            )
        return UploadedPart(number=number, size=len(body), etag=reply["ETag"], crc64nvme=crc64nvme)

    def complete(
        self, upload: Upload, parts: Sequence[UploadedPart], crc64nvme: int, *, if_absent: bool = True
    ) -> StoredObject:
        """See ``Store.complete``.

        The reply can be lost after it worked, and then a second call finds no upload: whether the object is
        there with the ETag that these parts must have decides.
        """
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if if_absent else {}
        size = sum(part.size for part in parts)
        try:
            with self._translating(f"Could not complete {self._name(upload.key)}"):
                self._bulk.complete_multipart_upload(
                    Bucket=self._bucket,
                    Key=self._prefix + upload.key,
                    UploadId=upload.token,
                    ChecksumCRC64NVME=encode_crc64nvme(crc64nvme),
                    ChecksumType="FULL_OBJECT",
                    MpuObjectSize=size,
                    MultipartUpload={
                        "Parts": [
                            {
                                "PartNumber": part.number,
                                "ETag": part.etag,
                                "ChecksumCRC64NVME": encode_crc64nvme(part.crc64nvme),
                            }
                            for part in parts
                        ]
                    },
                    **condition,
                )
        except (StoreUnavailableError, ObjectNotFoundError, PreconditionError) as error:
            try:
                found = self.stat(upload.key)
            except StoreUnavailableError:
                raise error from None
            if found is None or found.size != size or found.etag != multipart_etag(parts):
                raise
        return self._settled(upload.key, size, encode_crc64nvme(crc64nvme))

    def abort(self, upload: Upload) -> None:
        """See ``Store.abort``."""
        try:
            with self._translating(f"Could not abort the upload of {self._name(upload.key)}"):
                self._client.abort_multipart_upload(
                    Bucket=self._bucket, Key=self._prefix + upload.key, UploadId=upload.token
                )
        except ObjectNotFoundError:
            pass

    def unfinished(self) -> Iterator[UnfinishedUpload]:
        """See ``Store.unfinished``."""
        with self._translating(f"Could not list the unfinished uploads under {self.url}"):
            for page in self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=self._prefix
            ):
                for entry in page.get("Uploads", []):
                    if not entry["Key"].startswith(self._prefix):
                        continue
                    upload = Upload(key=entry["Key"].removeprefix(self._prefix), token=entry["UploadId"])
                    size, last = 0, entry["Initiated"]
                    with contextlib.suppress(self._client.exceptions.NoSuchUpload):  # ended meanwhile: as begun
                        for parts in self._client.get_paginator("list_parts").paginate(
                            Bucket=self._bucket, Key=entry["Key"], UploadId=upload.token
                        ):
                            for part in parts.get("Parts", []):
                                size += part["Size"]
                                last = max(last, part["LastModified"])
                    yield UnfinishedUpload(upload=upload, size=size, last_activity=last)

    def read_into(self, key: str, offset: int, out: memoryview, *, etag: str | None = None) -> None:
        """See ``Store.read_into``. A connection that breaks is reported; ``stores.retry`` goes on from there."""
        if not out:
            return  # no range says "nothing"
        condition: dict[str, Any] = {"IfMatch": etag} if etag is not None else {}
        done = 0
        with self._translating(f"Could not read {self._name(key)}", reading=True):
            reply = self._bulk.get_object(
                Bucket=self._bucket,
                Key=self._prefix + key,
                Range=f"bytes={offset}-{offset + len(out) - 1}",
                **condition,
            )
            with contextlib.closing(reply["Body"]) as body:
                expected = reply["ContentLength"]
                if reply["ResponseMetadata"]["HTTPStatusCode"] != 206 or expected != len(out):
                    raise IntegrityError(
                        f"{self._name(key)} is too short",
                        f"asked for {len(out)} bytes from {offset}, the store has {expected}",
                        "Run: backhaul verify --deep",
                    )
                while done < len(out):
                    try:
                        count = body.readinto(out[done : done + _READ_SIZE])  # type: ignore[arg-type]
                    except Exception as error:
                        raise BrokenReadError(done, error) from error
                    if count == 0:
                        raise BrokenReadError(done, EOFError("the connection ended early"))
                    done += count

    def stat(self, key: str) -> StoredObject | None:
        """See ``Store.stat``."""
        try:
            with self._translating(f"Could not look at {self._name(key)}"):
                reply = self._client.head_object(Bucket=self._bucket, Key=self._prefix + key, ChecksumMode="ENABLED")
        except ObjectNotFoundError:
            return None
        checksum = reply.get("ChecksumCRC64NVME")
        return StoredObject(
            key=key,
            size=reply["ContentLength"],
            modified=reply["LastModified"],
            etag=reply.get("ETag"),
            checksum=f"{_CHECKSUM}:{checksum}" if checksum else None,
        )

    def list(self) -> Iterator[StoredObject]:
        """See ``Store.list``."""
        with self._translating(f"Could not list {self.url}"):
            for page in self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix
            ):
                for entry in page.get("Contents", []):
                    key = entry["Key"].removeprefix(self._prefix)
                    if key and not key.endswith("/"):
                        yield StoredObject(
                            key=key,
                            size=entry["Size"],
                            modified=entry["LastModified"],
                            etag=entry.get("ETag"),
                        )

    def delete(self, key: str) -> None:
        """See ``Store.delete``."""
        try:
            with self._translating(f"Could not delete {self._name(key)}"):
                self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)
        except ObjectNotFoundError:
            pass

    def close(self) -> None:
        """See ``Store.close``."""
        self._client.close()
        if self._bulk_client is not None:
            self._bulk_client.close()

    # -- inside ----------------------------------------------------------------------------------------

    def _name(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}{key}"

    def _settled(self, key: str, size: int, checksum: str | None) -> StoredObject:
        """Ask the store what it holds now; the answer goes into the manifest."""
        found = self.stat(key)
        if found is None:
            raise StoreUnavailableError(
                f"{self._name(key)} is not there",
                "the store accepted it and then did not find it",
                "Try again.",
            )
        if found.size != size or (
            checksum is not None and found.checksum is not None and found.checksum != f"{_CHECKSUM}:{checksum}"
        ):
            raise IntegrityError(
                f"{self._name(key)} is not what was sent",
                f"{size} bytes with {_CHECKSUM} {checksum} were sent,"
                f" the store holds {found.size} with {found.checksum}",
                "Another program writes there, or the store damages data; do not trust it with backups.",
            )
        return found

    @contextlib.contextmanager
    def _translating(self, what: str, *, reading: bool = False) -> Iterator[None]:
        try:
            yield
        except (IntegrityError, BrokenReadError):
            raise
        except Exception as error:
            if reading and isinstance(error, ClientError) and error.response["Error"]["Code"] == "InvalidRange":
                raise IntegrityError(
                    what, "the object ends before the place that was asked for", "Run: backhaul verify --deep"
                ) from error
            raise translated(error, what, bucket=self._bucket, endpoint=self._endpoint) from error


_READ_SIZE = 1 << 20


def multipart_etag(parts: Sequence[UploadedPart]) -> str:
    """Return the ETag of an object made from these parts where part ETags are MD5s (not under SSE-KMS)."""
    digest = hashlib.md5(usedforsecurity=False)
    for part in parts:
        try:
            digest.update(bytes.fromhex(part.etag.strip('"')))
        except ValueError:
            return ""
    return f'"{digest.hexdigest()}-{len(parts)}"'
