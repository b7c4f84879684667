"""A key prefix in an S3 bucket as a store.

What it asks of a store follows the store's profile (``formats.profiles``). Where that has checksums, parts carry
their CRC64NVME, which the store checks on arrival, and the whole object's is asserted at completion. Elsewhere
parts carry their MD5, and the ETags that come back, of parts and of the whole, are compared with what they must be.

Payloads are not hashed again for the signature (that would halve the speed). botocore's own retries are off:
``stores.retry`` does that for every kind of store, and knows which answers were lost.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import hashlib
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode, urlsplit

from botocore.exceptions import ClientError

from backhaul.errors import (
    IntegrityError,
    ObjectNotFoundError,
    PreconditionError,
    StoreRefusedError,
    StoreUnavailableError,
)
from backhaul.formats.listing import place, read_page
from backhaul.formats.part_sizes import plan_layout
from backhaul.formats.profiles import GENERIC, PROFILES, profile_of_reply, provider_of_host, with_limits
from backhaul.model.location import Location
from backhaul.model.objects import NO_METADATA, Metadata, StoredObject, UnfinishedUpload, Upload, UploadedPart
from backhaul.model.profile import UNORDERED, Profile
from backhaul.pipeline.supervisor import StoppedError
from backhaul.stores.base import BrokenReadError, Kind, PartRules
from backhaul.stores.body import Body, BodyCancelledError, PartBody, content_of
from backhaul.stores.multipart import multipart_etag
from backhaul.stores.s3.client import new_client, new_session
from backhaul.stores.s3.errors import causes, translated
from backhaul.transforms.digest import decode_crc64nvme, encode_crc64nvme

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# Seconds of silence after which a request counts as lost: questions are answered at once, while a part may keep a
# store busy, and a completion for minutes.
QUESTION_TIMEOUT = 20
BULK_TIMEOUT = 60
COMPLETION_TIMEOUT = 600
_CHECKSUM: Final = "CRC64NVME"
# Under which the entries of a listing are handed past botocore.
_ENTRIES = "BackhaulEntries"
_PARTS_A_PAGE = 1000
_MULTIPART_ETAG = re.compile(r"[0-9a-f]{32}-\d+")
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')


class S3Store:
    """Objects under ``s3://bucket/prefix/``. Thread-safe; a client for each of three timeouts."""

    def __init__(self, location: Location, *, profile: Profile | None = None) -> None:
        prefix = f"{location.path}/" if location.path else ""
        self.url = f"s3://{location.bucket}/{location.path}".rstrip("/")
        self.bucket = self._bucket = location.bucket
        self.prefix = self._prefix = prefix
        self._endpoint = location.endpoint or "the S3 endpoint"
        self._lock = threading.Lock()
        self._bulk_client: S3Client | None = None
        self._completion_client: S3Client | None = None
        self._write = location.write
        with self.translating(f"Could not set up access to {self.url}"):
            self._session, self._location = new_session(location), location
            self._client = self._new_client(location.timeout or QUESTION_TIMEOUT)
        self._endpoint = _without_password(self._client.meta.endpoint_url)
        self._profile: Profile | None = None
        # Whether ETags are MD5s; of a store that is not known the first object that is written tells.
        self._md5_etags: bool | None = None
        self._keyed_bucket = False
        # Uploads whose completion was not answered: it may still be at work.
        self._unanswered: set[str] = set()
        if profile is None and location.provider is not None:
            profile = PROFILES[location.provider]
        if profile is None:
            name = provider_of_host(urlsplit(self._endpoint).hostname or "")
            profile = PROFILES[name] if name is not None else None
        if profile is not None:
            self._settle_profile(profile)

    @property
    def profile(self) -> Profile:
        """See ``Store.profile``. A host that is not known is asked once, and known by its answer's headers."""
        if self._profile is None:
            self._settle_profile(profile_of_reply(self._reply_headers()))
            assert self._profile is not None
        return self._profile

    def parts(self, at_most: int | None = None) -> PartRules:
        """See ``Store.parts``."""
        profile = self.profile
        layout = plan_layout(profile.limits, at_most=at_most, max_part=self._location.max_part)
        hedged = self._write.encryption != "aws:kms" and not self._keyed_bucket
        return PartRules(buffered=True, parallel=profile.parallel, layout=layout, hedged=hedged)

    def _settle_profile(self, profile: Profile) -> None:
        """Keep the profile, unless the store lacks what the settings ask for."""
        profile = with_limits(profile, max_parts=self._location.max_parts)
        write = self._write
        lacking = [
            words
            for words, missing in (
                ("tags", bool(write.tags) and not profile.tags),
                ("object lock (retain-until)", self.locks and not profile.object_lock),
                (
                    f"the storage class {write.storage_class} (it has {', '.join(profile.storage_classes or ())})",
                    write.storage_class is not None
                    and profile.storage_classes is not None
                    and write.storage_class not in profile.storage_classes,
                ),
            )
            if missing
        ]
        if lacking:
            raise StoreRefusedError(
                f"{self.url} can't be written as its settings say",
                f"{profile.title} has no {' and no '.join(lacking)}",
                "Take the setting out, or name the provider (provider=NAME) if it is another one.",
            )
        until = dt.datetime.fromisoformat(write.retain_until) if write.retain_until is not None else None
        if until is not None and until <= dt.datetime.now(dt.UTC):
            raise StoreRefusedError(
                f"{self.url} can't be written as its settings say",
                f"retain-until={write.retain_until} is in the past",
                "Name a later date, or a duration such as 30d.",
            )
        self._profile = profile
        self._md5_etags = profile.md5_etags if profile.name != GENERIC else None

    def _reply_headers(self) -> Mapping[str, str]:
        try:
            with self._recognising():
                reply: Any = self._client.head_bucket(Bucket=self._bucket)
        except ClientError as error:
            reply = error.response  # whatever it says of the bucket, its headers tell who it is
        return {name.lower(): value for name, value in reply["ResponseMetadata"].get("HTTPHeaders", {}).items()}

    @contextlib.contextmanager
    def _recognising(self) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500:
                raise self._translated(error, f"Could not reach {self.url}") from error
            raise
        except Exception as error:
            raise self._translated(error, f"Could not reach {self.url}") from error

    def _new_client(self, read_timeout: float) -> S3Client:
        client = new_client(self._session, self._location, read_timeout)
        client.meta.events.register("before-parse.s3.ListObjectsV2", self._take_entries)
        return client

    def _take_entries(self, response_dict: Any, customized_response_dict: Any, **_: Any) -> None:
        """Take the entries out of a listing before botocore parses it (``formats.listing``)."""
        if response_dict["status_code"] == 200:
            page = read_page(response_dict["body"], self._prefix)
            response_dict["body"] = page.rest
            customized_response_dict[_ENTRIES] = page.objects

    @property
    def _bulk(self) -> S3Client:
        """The client for parts and reads, which may take long. Made on first use."""
        with self._lock:
            if self._bulk_client is None:
                self._bulk_client = self._new_client(self._location.timeout or BULK_TIMEOUT)
            return self._bulk_client

    @property
    def _completing(self) -> S3Client:
        """The client for completions, which may take a store minutes."""
        with self._lock:
            if self._completion_client is None:
                self._completion_client = self._new_client(self._location.timeout or COMPLETION_TIMEOUT)
            return self._completion_client

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
        profile = self.profile
        checks, md5 = self._body_checks(body, crc64nvme)
        checks |= self._condition(key, profile.conditional_writes, if_absent=if_absent, replaces=replaces)
        with self.translating(f"Could not write {self._name(key)}"):
            reply = self._client.put_object(
                Bucket=self._bucket,
                Key=self._prefix + key,
                Body=sendable(body),
                ContentLength=len(body),
                Metadata=dict(metadata),
                **checks,
                **self.attributes(kind),
            )
        self._keyed_bucket = self._keyed_bucket or _keyed(reply)
        self._check_etag(self._name(key), reply, md5)
        checksum = reply.get("ChecksumCRC64NVME")
        return StoredObject(
            key=key,
            size=len(body),
            modified=dt.datetime.now(dt.UTC),
            etag=reply.get("ETag"),
            checksum=f"{_CHECKSUM}:{checksum}" if checksum else None,
        )

    def begin(self, key: str, *, metadata: Metadata = NO_METADATA) -> Upload:
        """See ``Store.begin``."""
        checks: dict[str, Any] = {}
        if self.profile.checksums:
            checks = {"ChecksumAlgorithm": _CHECKSUM, "ChecksumType": "FULL_OBJECT"}
        with self.translating(f"Could not begin an upload to {self._name(key)}"):
            reply = self._client.create_multipart_upload(
                Bucket=self._bucket,
                Key=self._prefix + key,
                Metadata=dict(metadata),
                **checks,
                **self.attributes("data"),
            )
        return Upload(key=key, token=reply["UploadId"])

    def put_part(self, upload: Upload, number: int, offset: int, body: Body, crc64nvme: int) -> UploadedPart:
        """See ``Store.put_part``."""
        checks, md5 = self._body_checks(body, crc64nvme)
        with self.translating(f"Could not upload part {number} of {self._name(upload.key)}"):
            reply = self._bulk.upload_part(
                Bucket=self._bucket,
                Key=self._prefix + upload.key,
                UploadId=upload.token,
                PartNumber=number,
                Body=sendable(body),
                ContentLength=len(body),
                **checks,
            )
        self._check_etag(f"part {number} of {self._name(upload.key)}", reply, md5)
        return UploadedPart(number=number, size=len(body), etag=reply["ETag"], crc64nvme=crc64nvme)

    def copy_part(
        self, upload: Upload, number: int, source: str, etag: str, offset: int, size: int, crc64nvme: int
    ) -> UploadedPart:
        """See ``Store.copy_part``."""
        with self.translating(f"Could not copy part {number} of {self._name(upload.key)} from {self._name(source)}"):
            reply = self._bulk.upload_part_copy(
                Bucket=self._bucket,
                Key=self._prefix + upload.key,
                UploadId=upload.token,
                PartNumber=number,
                CopySource={"Bucket": self._bucket, "Key": self._prefix + source},
                CopySourceRange=f"bytes={offset}-{offset + size - 1}",
                CopySourceIfMatch=etag,
            )["CopyPartResult"]
        checksum = reply.get("ChecksumCRC64NVME")
        if checksum is not None and decode_crc64nvme(checksum) != crc64nvme:
            raise IntegrityError(
                f"Part {number} of {self._name(upload.key)} is not what was to be copied",
                f"bytes {offset} to {offset + size} of {self._name(source)} have another CRC64NVME than expected",
                "The object is damaged, or was replaced; backhaul verify tells which objects are.",
            )
        return UploadedPart(number=number, size=size, etag=_quoted(reply["ETag"]), crc64nvme=crc64nvme)

    def copy(self, source: StoredObject, key: str, *, metadata: Metadata = NO_METADATA) -> StoredObject:
        """See ``Store.copy``."""
        checks = self._condition(key, self.profile.conditional_writes, if_absent=True, replaces=None)
        if source.etag is not None:
            checks["CopySourceIfMatch"] = source.etag
            if not self.profile.part_copies:  # who lacks these does not obey the condition either
                self._refuse_another(source.key, source.etag)
        attributes = self.attributes("data")
        if "Tagging" in attributes:
            checks["TaggingDirective"] = "REPLACE"
        with self.translating(f"Could not copy {self._name(source.key)} to {self._name(key)}"):
            self._completing.copy_object(
                Bucket=self._bucket,
                Key=self._prefix + key,
                CopySource={"Bucket": self._bucket, "Key": self._prefix + source.key},
                MetadataDirective="REPLACE",
                Metadata=dict(metadata),
                **checks,
                **attributes,
            )
        copied = self._look(key)[0]
        if copied is None or copied.size != source.size:
            raise StoreUnavailableError(
                f"{self._name(key)} is not what was copied",
                "the store accepted the copy, and then did not show it",
                "Try again.",
            )
        return copied

    def uploaded_parts(self, upload: Upload) -> Sequence[UploadedPart]:
        """See ``Store.uploaded_parts``. Pages after the first are asked for side by side.

        (SeaweedFS lists a part that was sent again once for each time, in no order.)
        """
        first, more = self._parts_page(upload, 0)
        parts = {(part.number, part.etag): part for part in first}
        if more:
            starts = range(_PARTS_A_PAGE, self.profile.limits.max_parts, _PARTS_A_PAGE)
            with ThreadPoolExecutor(4) as pool:
                for page in pool.map(lambda start: self._parts_between(upload, start), [0, *starts]):
                    parts.update(((part.number, part.etag), part) for part in page)
        return [parts[place] for place in sorted(parts)]

    def _parts_between(self, upload: Upload, start: int) -> Sequence[UploadedPart]:
        """Return the parts after number ``start``, a page's worth of numbers."""
        found: list[UploadedPart] = []
        marker, end = start, start + _PARTS_A_PAGE
        while marker < end:
            page, more = self._parts_page(upload, marker)
            found += [part for part in page if part.number <= end]
            if not page or not more:
                break
            marker = page[-1].number
        return found

    def _parts_page(self, upload: Upload, marker: int) -> tuple[Sequence[UploadedPart], bool]:
        with self.translating(f"Could not list the parts of {self._name(upload.key)}"):
            reply = self._client.list_parts(
                Bucket=self._bucket,
                Key=self._prefix + upload.key,
                UploadId=upload.token,
                PartNumberMarker=marker,
                MaxParts=_PARTS_A_PAGE,
            )
        parts = [
            UploadedPart(
                number=part["PartNumber"],
                size=part["Size"],
                etag=part["ETag"],
                crc64nvme=decode_crc64nvme(part.get("ChecksumCRC64NVME")),
            )
            for part in reply.get("Parts", [])
        ]
        return parts, bool(reply.get("IsTruncated"))

    def complete(
        self,
        upload: Upload,
        parts: Sequence[UploadedPart],
        crc64nvme: int,
        *,
        if_absent: bool = True,
        replaces: str | None = None,
    ) -> StoredObject:
        """See ``Store.complete``.

        The reply can be lost after it worked, and then a second call finds no upload, or its own object in the
        way: whether the object is there as these parts must make it decides.
        """
        profile = self.profile
        size = sum(part.size for part in parts)
        checks: dict[str, Any] = {}
        if profile.checksums:
            checks = {
                "ChecksumCRC64NVME": encode_crc64nvme(crc64nvme),
                "ChecksumType": "FULL_OBJECT",
                "MpuObjectSize": size,
            }
        try:
            checks |= self._condition(
                upload.key, profile.conditional_completions, if_absent=if_absent, replaces=replaces
            )
            with self.translating(f"Could not complete {self._name(upload.key)}"):
                self._completing.complete_multipart_upload(
                    Bucket=self._bucket,
                    Key=self._prefix + upload.key,
                    UploadId=upload.token,
                    MultipartUpload={"Parts": [_completed(part, checksums=profile.checksums) for part in parts]},
                    **checks,
                )
        except (StoreUnavailableError, ObjectNotFoundError, PreconditionError) as error:
            try:
                found, raw = self._look(upload.key)
            except StoreUnavailableError as away:
                # Whether it worked is not known: only a passing failure may be said, so that it is asked again.
                raise (error if error.transient else away) from None
            if found is None or not self._is_made_of(found, raw, parts, crc64nvme):
                if isinstance(error, StoreUnavailableError):
                    self._unanswered.add(upload.token)
                elif isinstance(error, ObjectNotFoundError) and found is None and upload.token in self._unanswered:
                    raise StoreUnavailableError(
                        error.what, "its completion was not answered, and may still be under way", error.todo
                    ) from error
                raise
        return self._settled(upload.key, parts, crc64nvme)

    def abort(self, upload: Upload) -> None:
        """See ``Store.abort``. Nothing is done where that could harm a completed object of the same key."""
        if not self.profile.aborts_safely and self.stat(upload.key) is not None:
            return
        try:
            with self.translating(f"Could not abort the upload of {self._name(upload.key)}"):
                self._client.abort_multipart_upload(
                    Bucket=self._bucket, Key=self._prefix + upload.key, UploadId=upload.token
                )
        except ObjectNotFoundError:
            pass

    def unfinished(self) -> Iterator[UnfinishedUpload]:
        """See ``Store.unfinished``. Nothing where the provider can't list them."""
        if not self.profile.lists_uploads:
            return
        with self.translating(f"Could not list the unfinished uploads under {self.url}"):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=self._prefix
            )
            try:
                uploads = [entry for page in pages for entry in page.get("Uploads", [])]
            except self._client.exceptions.NoSuchUpload:
                return  # how rclone says that there is none
            for entry in uploads:
                if not entry["Key"].startswith(self._prefix):
                    continue
                upload = Upload(key=entry["Key"].removeprefix(self._prefix), token=entry["UploadId"])
                # (Some do not say when an upload was begun. It is as old as its newest part then.)
                sizes: dict[int, int] = {}
                last = entry.get("Initiated") or dt.datetime.now(dt.UTC)
                with contextlib.suppress(self._client.exceptions.NoSuchUpload):  # ended meanwhile: as begun
                    for parts in self._client.get_paginator("list_parts").paginate(
                        Bucket=self._bucket, Key=entry["Key"], UploadId=upload.token
                    ):
                        for part in parts.get("Parts", []):
                            sizes[part["PartNumber"]] = part["Size"]
                            last = max(last, part["LastModified"])
                yield UnfinishedUpload(upload=upload, size=sum(sizes.values()), last_activity=last)

    def read_into(self, key: str, offset: int, out: memoryview, *, etag: str | None = None) -> None:
        """See ``Store.read_into``. A connection that breaks is reported; ``stores.retry`` goes on from there."""
        if not out:
            return  # no range says "nothing"
        condition: dict[str, Any] = {"IfMatch": etag} if etag is not None else {}
        done = 0
        with self.translating(f"Could not read {self._name(key)}", reading=True):
            client = self._client if len(out) <= _SMALL_READ else self._bulk
            reply = client.get_object(
                Bucket=self._bucket,
                Key=self._prefix + key,
                Range=f"bytes={offset}-{offset + len(out) - 1}",
                **condition,
            )
            with contextlib.closing(reply["Body"]) as body:
                expected = reply["ContentLength"]
                if etag is not None and reply.get("ETag") not in (None, etag):  # where conditions are ignored
                    raise PreconditionError(
                        f"{self._name(key)} was replaced", f"its ETag is {reply.get('ETag')} now", "Try again."
                    )
                # (rclone answers 200, and tells the range.)
                ranged = reply["ResponseMetadata"]["HTTPStatusCode"] == 206 or offset == 0
                ranged = ranged or reply.get("ContentRange", "").startswith(f"bytes {offset}-")
                if not ranged or expected != len(out):
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
        return self._look(key)[0]

    def _look(self, key: str) -> tuple[StoredObject | None, Any]:
        asked: dict[str, Any] = {"ChecksumMode": "ENABLED"} if self.profile.checksums else {}
        try:
            with self.translating(f"Could not look at {self._name(key)}"):
                reply = self._client.head_object(Bucket=self._bucket, Key=self._prefix + key, **asked)
        except ObjectNotFoundError:
            return None, {}
        checksum = reply.get("ChecksumCRC64NVME") if reply.get("ChecksumType") != "COMPOSITE" else None
        return StoredObject(
            key=key,
            size=reply["ContentLength"],
            modified=reply["LastModified"],
            etag=reply.get("ETag"),
            checksum=f"{_CHECKSUM}:{checksum}" if checksum else None,
            metadata=reply.get("Metadata", {}),
            retained_until=reply.get("ObjectLockRetainUntilDate"),
            legal_hold=reply.get("ObjectLockLegalHoldStatus") == "ON",
        ), reply

    def list(self, prefix: str = "", *, after: str = "", until: str | None = None) -> Iterator[StoredObject]:
        """See ``Store.list``."""
        order = self.profile.listing
        asked: dict[str, Any] = {"StartAfter": self._prefix + after} if after and order != UNORDERED else {}
        last = place(until, order) if until is not None and order != UNORDERED else None
        with self.translating(f"Could not list {self.url}"):
            for page in self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix, **asked
            ):
                entries: Any = page.get(_ENTRIES, ())
                for entry in entries:
                    if last is not None and place(entry.key, order) > last:
                        return
                    yield entry

    def delete(self, key: str, *, etag: str | None = None) -> None:
        """See ``Store.delete``."""
        condition: dict[str, Any] = {}
        if etag is not None and self.profile.conditional_deletes:
            condition["IfMatch"] = etag
        elif etag is not None:
            self._refuse_another(key, etag)
        try:
            with self.translating(f"Could not delete {self._name(key)}"):
                self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key, **condition)
        except ObjectNotFoundError:
            pass
        except PreconditionError:
            if self.stat(key) is not None:  # (some answer so where there is nothing)
                raise

    def close(self) -> None:
        """See ``Store.close``."""
        self._close_connections()

    def _close_connections(self) -> None:
        for client in (self._client, self._bulk_client, self._completion_client):
            if client is not None:
                client.close()

    # -- inside ----------------------------------------------------------------------------------------

    def _name(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}{key}"

    @property
    def locks(self) -> bool:
        """Whether the settings ask for what is written to be locked."""
        return self._write.retain is not None or self._write.retain_until is not None

    def attributes(self, kind: Kind) -> dict[str, Any]:
        """Return what the settings ask for on an object of that kind."""
        write = self._write
        asked: dict[str, Any] = {}
        if write.encryption is not None:
            asked["ServerSideEncryption"] = write.encryption
            if write.kms_key is not None:
                asked["SSEKMSKeyId"] = write.kms_key
        if kind == "working":
            return asked
        if kind == "data" and write.storage_class is not None:
            asked["StorageClass"] = write.storage_class
        if write.tags:
            asked["Tagging"] = urlencode(write.tags)
        if self.locks:
            until = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=write.retain or 0)
            if write.retain_until is not None:
                until = dt.datetime.fromisoformat(write.retain_until)
            asked["ObjectLockMode"] = write.lock_mode
            asked["ObjectLockRetainUntilDate"] = until
        return asked

    def _body_checks(self, body: Body, crc64nvme: int) -> tuple[dict[str, Any], str | None]:
        """Return the headers by which the store checks a body on arrival, and the MD5 that its ETag must be."""
        if self.profile.checksums:
            return {"ChecksumCRC64NVME": encode_crc64nvme(crc64nvme)}, None
        digest = hashlib.md5(content_of(body), usedforsecurity=False)
        encoded = base64.b64encode(digest.digest()).decode()
        return {"ContentMD5": encoded}, digest.hexdigest()

    def _check_etag(self, what: str, reply: Any, md5: str | None) -> None:
        """Compare the ETag with the MD5 of what was sent; encryption by a key makes it something else.

        Raises:
            StoreUnavailableError: other bytes arrived than were sent. Sending them again may help.
        """
        etag = _MD5.fullmatch(reply.get("ETag", ""))
        if md5 is None or etag is None or _keyed(reply):
            return
        if self._md5_etags is None:
            self._md5_etags = etag[1] == md5
        if self._md5_etags and etag[1] != md5:
            raise StoreUnavailableError(
                f"What arrived of {what} is not what was sent",
                f"its MD5 is {md5}, and {self._endpoint} answered {etag[1]}",
                "The network or the store damages data; try again, and watch whether it stays.",
            )

    def _condition(self, key: str, obeyed: bool, *, if_absent: bool, replaces: str | None) -> dict[str, Any]:
        """Return what makes a write conditional; where that is not obeyed, look now."""
        if replaces is not None:
            if obeyed:
                return {"IfMatch": replaces}
            self._refuse_another(key, replaces)
        elif if_absent:
            if obeyed:
                return {"IfNoneMatch": "*"}
            self._refuse_existing(key)
        return {}

    def _refuse_another(self, key: str, etag: str) -> None:
        found = self.stat(key)
        if found is not None and found.etag != etag:
            raise PreconditionError(
                f"{self._name(key)} was replaced", f"its ETag is {found.etag} now, and was {etag}", "Plan again."
            )

    def _refuse_existing(self, key: str) -> None:
        if self.stat(key) is not None:
            raise PreconditionError(
                f"{self._name(key)} exists already", "it was there a moment ago", "Another run made it."
            )

    def _is_made_of(self, found: StoredObject, raw: Any, parts: Sequence[UploadedPart], crc64nvme: int) -> bool:
        """Tell whether the object is the one that these parts make, as far as the store lets that be known."""
        if found.size != sum(part.size for part in parts):
            return False
        if found.checksum is not None:
            return found.checksum == f"{_CHECKSUM}:{encode_crc64nvme(crc64nvme)}"
        expected = multipart_etag(parts).strip('"')
        etag = (found.etag or "").strip('"')
        if self._md5_etags and expected and _MULTIPART_ETAG.fullmatch(etag) and not _keyed(raw):
            return etag == expected
        return True

    def _settled(self, key: str, parts: Sequence[UploadedPart], crc64nvme: int) -> StoredObject:
        """Ask the store what it holds now; the answer goes into the manifest."""
        found, raw = self._look(key)
        if found is None:
            raise StoreUnavailableError(
                f"{self._name(key)} is not there",
                "the store accepted it and then did not find it",
                "Try again.",
            )
        if not self._is_made_of(found, raw, parts, crc64nvme):
            raise IntegrityError(
                f"{self._name(key)} is not what was sent",
                f"{sum(part.size for part in parts)} bytes with {_CHECKSUM} {encode_crc64nvme(crc64nvme)} and ETag"
                f" {multipart_etag(parts)} were sent, the store holds {found.size} with"
                f" {found.checksum or 'no checksum'} and {found.etag}",
                "Another program writes there, or the store damages data; do not trust it with backups.",
            )
        return found

    @property
    def raw_client(self) -> S3Client:
        """The client itself, for the probes of ``doctor``."""
        return self._client

    @contextlib.contextmanager
    def translating(self, what: str, *, reading: bool = False) -> Iterator[None]:
        """Turn whatever a client call raises into a store error that begins with ``what``."""
        try:
            yield
        except (IntegrityError, BrokenReadError):
            raise
        except Exception as error:
            if reading and isinstance(error, ClientError) and error.response["Error"]["Code"] == "InvalidRange":
                raise IntegrityError(
                    what, "the object ends before the place that was asked for", "Run: backhaul verify --deep"
                ) from error
            raise self._translated(error, what) from error

    def _translated(self, error: Exception, what: str) -> Exception:
        for cause in causes(error):
            if isinstance(cause, BodyCancelledError | StoppedError):
                return cause  # raised by the body, through botocore; not a fault of the store
        found = translated(error, what, bucket=self._bucket, endpoint=self._endpoint)
        if isinstance(found, StoreUnavailableError) and isinstance(error, ClientError):
            # Whoever answered so may be one sick host of many: the next try takes a new connection.
            self._close_connections()
        return found


_READ_SIZE = 1 << 20
# A read that is answered like a question: a manifest, a seek table. (Each client takes 30 ms to make.)
_SMALL_READ = 1 << 20


def _without_password(url: str) -> str:
    """Return the endpoint for messages; ``AWS_ENDPOINT_URL`` may hold anything."""
    return re.sub(r"//[^/@]*@", "//***@", url)


def _quoted(etag: str) -> str:
    """Return an ETag as replies have it in their headers: SeaweedFS leaves the quotes out in bodies."""
    return etag if etag.startswith('"') else f'"{etag}"'


def sendable(body: Body) -> Any:
    """Return what botocore takes for a body: few bytes as a byte array, of many a reader.

    It makes a reader of ``bytes`` itself, and a reader's bytes wait for the server's word (``PartBody.whole``). A
    view it could not send again to another region, where a redirect leads.
    """
    if not isinstance(body, PartBody):
        body = PartBody(body)
    whole = body.whole()
    return body.open() if whole is None else bytearray(whole)


def _keyed(reply: Any) -> bool:
    """Tell whether the object is encrypted in a way that makes its ETag no MD5."""
    return str(reply.get("ServerSideEncryption", "")).startswith("aws:kms") or "SSECustomerAlgorithm" in reply


def _completed(part: UploadedPart, *, checksums: bool) -> Any:
    entry: dict[str, Any] = {"PartNumber": part.number, "ETag": part.etag}
    if checksums:
        entry["ChecksumCRC64NVME"] = encode_crc64nvme(part.crc64nvme)
    return entry
