"""What an S3 store really does, found out by trying it: with objects of its own, which are removed again.

Each probe asks for one thing that the documentation of S3 promises, and looks at what comes of it, not only at
the status: a store that answers 200 to a wrong checksum has not checked it.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import email.utils
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from backhaul.errors import StoreError
from backhaul.model.objects import UploadedPart
from backhaul.model.results import Finding
from backhaul.stores.multipart import multipart_etag
from backhaul.stores.s3.store import S3Store
from backhaul.transforms.digest import combine_crc64nvme, crc64nvme, encode_crc64nvme

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PREFIX = ".backhaul-doctor-"
_SMALL = b"backhaul doctor\n" * 64
# Two parts that are not the last, of different sizes, both of a legal one; and a last one of a byte.
_PARTS = (5 << 20, 6 << 20, 1)
# More than this and S3 refuses requests altogether (15 minutes); well before that a clock needs attention.
_SKEW = 60.0
_CONDITION = ("PreconditionFailed", "412")


class S3Probe:
    """Runs the probes against one store. ``bytes_sent`` counts the bodies."""

    def __init__(self, store: S3Store) -> None:
        self._store = store
        self._client: S3Client = store.raw_client
        self._bucket = store.bucket
        self._prefix = f"{store.prefix}{PREFIX}{secrets.token_hex(6)}/"
        self.bytes_sent = 0
        self._written: set[tuple[str, str | None]] = set()
        self._begun: dict[str, dict[str, str]] = {}
        self.left: list[str] = []

    def run(self) -> Iterator[Finding]:
        """Yield what each probe found, in the order in which a person would ask.

        Raises:
            StoreError: the store can't be written at all, which leaves nothing to find out.
        """
        try:
            yield self._access()
            yield self._clock()
            for probe in (
                self._conditional_writes,
                self._checksums,
                self._md5,
                self._reads_one_version,
                self._conditional_deletes,
                self._settings,
            ):
                yield self._attempt(probe)
            with self._store.translating(f"Could not upload in parts to {self._store.url}"):
                yield from self._multipart()
        finally:
            self._remove_everything()

    # -- probes ------------------------------------------------------------------------------------------

    def _access(self) -> Finding:
        """Write, look, read a range, list: without these nothing else makes sense."""
        with self._store.translating(f"Could not write into {self._store.url}"):
            self._put("access", _SMALL)
            head = self._client.head_object(Bucket=self._bucket, Key=self._prefix + "access")
            body = self._client.get_object(Bucket=self._bucket, Key=self._prefix + "access", Range="bytes=10-19")
            piece = body["Body"].read()
        listed = [self._store.prefix + entry.key for entry in self._store.list(self._prefix[len(self._store.prefix) :])]
        good = head["ContentLength"] == len(_SMALL) and piece == _SMALL[10:20] and listed == [self._prefix + "access"]
        return Finding(
            name="access",
            found=good,
            detail="writes, reads ranges, lists and tells sizes"
            if good
            else f"of {len(_SMALL)} bytes it tells {head['ContentLength']}; a range reads {piece!r}; it lists {listed}",
        )

    def _clock(self) -> Finding:
        with self._store.translating(f"Could not look at {self._store.url}"):
            reply = self._client.head_object(Bucket=self._bucket, Key=self._prefix + "access")
        date = reply["ResponseMetadata"]["HTTPHeaders"].get("date")
        if date is None:
            return Finding(name="clock", found=None, detail="it does not tell its time")
        skew = (dt.datetime.now(dt.UTC) - email.utils.parsedate_to_datetime(date)).total_seconds()
        return Finding(name="clock", found=abs(skew) < _SKEW, detail=f"{skew:+.0f} s between here and there")

    def _conditional_writes(self) -> Finding:
        self._put("once", b"first")
        refused = self._refusal(lambda: self._put("once", b"second", IfNoneMatch="*"))
        kept = self._content("once") == b"first"
        return self._told("conditional_writes", refused in _CONDITION and kept, _answer(refused))

    def _checksums(self) -> Finding:
        right, wrong = crc64nvme(_SMALL), crc64nvme(_SMALL) ^ 1
        taken = self._refusal(lambda: self._put("sum", _SMALL, ChecksumCRC64NVME=encode_crc64nvme(right)))
        if taken is not None:
            return self._told("checksums", False, f"a right one is answered {taken}")
        refused = self._refusal(lambda: self._put("sum2", _SMALL, ChecksumCRC64NVME=encode_crc64nvme(wrong)))
        if refused is None:
            return self._told("checksums", False, "it accepts a wrong one")
        told = self._client.head_object(Bucket=self._bucket, Key=self._prefix + "sum", ChecksumMode="ENABLED")
        kept = told.get("ChecksumCRC64NVME") == encode_crc64nvme(right)
        return self._told("checksums", kept, _answer(refused) if kept else "it does not tell it afterwards")

    def _md5(self) -> Finding:
        wrong = base64.b64encode(bytes(16)).decode()
        refused = self._refusal(lambda: self._put("md5", _SMALL, ContentMD5=wrong))
        return Finding(
            name="checks Content-MD5",
            found=refused is not None,
            detail=f"a wrong one is answered {refused}" if refused else "it accepts a wrong one",
        )

    def _reads_one_version(self) -> Finding:
        old = self._put("version", b"old")
        self._put("version", b"new")

        def read() -> None:
            self._client.get_object(Bucket=self._bucket, Key=self._prefix + "version", IfMatch=old["ETag"])

        refused = self._refusal(read)
        return Finding(
            name="reads one version of an object (If-Match)",
            found=refused is not None,
            detail=f"answered {refused}" if refused else "it gives the new one to who asked for the old one",
        )

    def _conditional_deletes(self) -> Finding:
        self._put("kept", _SMALL)

        def delete() -> None:
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + "kept", IfMatch=f'"{"0" * 32}"')

        refused = self._refusal(delete)
        return self._told("conditional_deletes", self._content("kept") == _SMALL, _answer(refused))

    def _settings(self) -> Finding:
        asked = {name: value for name, value in self._store.attributes("data").items() if "ObjectLock" not in name}
        if self._store.locks:  # what is locked could not be removed again: it is asked for, not tried
            try:
                reply = self._client.get_object_lock_configuration(Bucket=self._bucket)
                enabled = reply.get("ObjectLockConfiguration", {}).get("ObjectLockEnabled") == "Enabled"
            except ClientError:
                enabled = False
            if not enabled:
                return Finding(
                    name="settings of writes",
                    found=False,
                    detail="retain-until asks for object lock, and the bucket has none",
                )
        if not asked:
            detail = "the bucket has object lock" if self._store.locks else "none are asked for"
            return Finding(name="settings of writes", found=True, detail=detail)
        refused = self._refusal(lambda: self._put("settings", _SMALL, ChecksumAlgorithm="CRC32", **asked))
        words = ", ".join(sorted(asked))
        return Finding(
            name="settings of writes",
            found=refused is None,
            detail=f"takes {words}" if refused is None else f"{words}: answered {refused}",
        )

    def _multipart(self) -> Iterator[Finding]:
        """Probe uploads: unequal parts, their checksums and ETags, listings, copies, conditions."""
        contents = [os.urandom(size) for size in _PARTS]
        whole = b"".join(contents)
        upload = self._begin("parts", checksums=False)
        parts = [self._part(upload, number, content) for number, content in enumerate(contents, 1)]
        yield self._attempt(lambda: self._lists_uploads(upload, parts))
        refused = self._refusal(lambda: self._complete(upload, parts))
        made = refused is None and self._content("parts") == whole
        yield Finding(
            name="parts of different sizes",
            ability="limits.equal_parts",
            found=made,
            detail="an upload of 5 MiB, 6 MiB and 1 byte is whole" if made else f"the completion is answered {refused}",
        )
        if refused is not None:
            self._abort(upload)
            upload = self._begin("parts", checksums=False)
            contents = [contents[0], contents[2]]
            whole = b"".join(contents)
            parts = [self._part(upload, number, content) for number, content in enumerate(contents, 1)]
            self._complete(upload, parts)
        yield self._attempt(lambda: self._md5_etags(parts, contents))
        yield self._attempt(lambda: self._conditional_completion(contents[-1]))
        yield self._attempt(lambda: self._checked_uploads(contents[0]))
        yield self._attempt(lambda: self._part_copies(whole))
        yield self._attempt(self._aborts)

    def _lists_uploads(self, upload: dict[str, str], parts: list[UploadedPart]) -> Finding:
        listing = self._client.list_multipart_uploads(Bucket=self._bucket, Prefix=self._prefix)
        listed = [entry["UploadId"] for entry in listing.get("Uploads", [])] == [upload["UploadId"]]
        reply = self._client.list_parts(**upload)  # type: ignore[arg-type]
        sizes = [part["Size"] for part in reply.get("Parts", [])]
        told = sizes == [part.size for part in parts]
        detail = "uploads and their parts" if listed and told else f"uploads: {listed}, parts: {sizes}"
        return self._told("lists_uploads", listed and told, detail)

    def _md5_etags(self, parts: list[UploadedPart], contents: list[bytes]) -> Finding:
        head = self._client.head_object(Bucket=self._bucket, Key=self._prefix + "parts")
        of_parts = [hashlib.md5(content, usedforsecurity=False).hexdigest() for content in contents]
        good = [part.etag.strip('"') for part in parts] == of_parts
        good = good and head["ETag"].strip('"') == multipart_etag(parts).strip('"')
        return self._told("md5_etags", good, f"the ETag of an upload is {head['ETag']}")

    def _conditional_completion(self, content: bytes) -> Finding:
        self._put("taken", b"first")
        upload = self._begin("taken", checksums=False)
        parts = [self._part(upload, 1, content)]
        refused = self._refusal(lambda: self._complete(upload, parts, IfNoneMatch="*"))
        if refused is not None:
            self._abort(upload)
        kept = self._content("taken") == b"first"
        return self._told("conditional_completions", kept and refused in _CONDITION, _answer(refused))

    def _checked_uploads(self, content: bytes) -> Finding:
        """Probe whether the whole object's checksum is asserted at completion: a part of ``checksums``."""
        name = "asserts the whole object's CRC64NVME"
        begun = self._refusal(lambda: self._abort(self._begin("whole", checksums=True)))
        if begun is not None:
            return Finding(name=name, ability="checksums", found=False, detail=f"beginning is answered {begun}")
        upload = self._begin("whole", checksums=True)
        tail = b"tail"
        parts = [self._part(upload, 1, content, checked=True), self._part(upload, 2, tail, checked=True)]
        right = combine_crc64nvme(parts[0].crc64nvme, parts[1].crc64nvme, len(tail))
        size = len(content) + len(tail)
        asserted: dict[str, Any] = {"ChecksumType": "FULL_OBJECT", "MpuObjectSize": size, "checked": True}
        refused = self._refusal(
            lambda: self._complete(upload, parts, ChecksumCRC64NVME=encode_crc64nvme(right ^ 1), **asserted)
        )
        if refused is None:
            return Finding(name=name, ability="checksums", found=False, detail="it accepts a wrong one")
        again = self._refusal(
            lambda: self._complete(upload, parts, ChecksumCRC64NVME=encode_crc64nvme(right), **asserted)
        )
        if again is not None:
            self._abort(upload)
            # Some forget an upload whose completion they refused: then a right one alone tells.
            upload = self._begin("whole", checksums=True)
            parts = [self._part(upload, 1, content, checked=True), self._part(upload, 2, tail, checked=True)]
            self._complete(upload, parts, ChecksumCRC64NVME=encode_crc64nvme(right), **asserted)
        head = self._client.head_object(Bucket=self._bucket, Key=self._prefix + "whole", ChecksumMode="ENABLED")
        told = head.get("ChecksumCRC64NVME") == encode_crc64nvme(right)
        detail = f"a wrong one is answered {refused}, the right one is told afterwards"
        return Finding(
            name=name, ability="checksums", found=told, detail=detail if told else "it does not tell it afterwards"
        )

    def _part_copies(self, whole: bytes) -> Finding:
        upload = self._begin("copy", checksums=False)
        source = {"Bucket": self._bucket, "Key": self._prefix + "parts"}
        last = _PARTS[0] - 1
        tail = b"tail"
        try:
            reply = self._client.upload_part_copy(
                **upload,  # type: ignore[arg-type]
                PartNumber=1,
                CopySource=source,  # type: ignore[arg-type]
                CopySourceRange=f"bytes=0-{last}",
            )
            etag = reply["CopyPartResult"].get("ETag")
            if not etag:
                return self._told("part_copies", False, "it gives no ETag of the copied part")
            copied = UploadedPart(number=1, size=last + 1, etag=etag, crc64nvme=0)
            self._complete(upload, [copied, self._part(upload, 2, tail)])
        except Exception as error:  # noqa: BLE001 - whatever comes of it is the finding
            self._abort(upload)
            return self._told("part_copies", False, f"answered {_code(error)}")
        made = self._content("copy") == whole[: last + 1] + tail
        return self._told("part_copies", made, "the copied range is right" if made else "the copied range is wrong")

    def _aborts(self) -> Finding:
        upload = self._begin("aborted", checksums=False)
        self._part(upload, 1, b"x")
        self._client.abort_multipart_upload(**upload)  # type: ignore[arg-type]
        listing = self._client.list_multipart_uploads(Bucket=self._bucket, Prefix=self._prefix)
        left = [entry for entry in listing.get("Uploads", []) if entry["UploadId"] == upload["UploadId"]]
        detail = "nothing is left of them" if not left else "one is still listed after its end"
        return Finding(name="aborts uploads", found=not left, detail=detail)

    # -- tools of the probes -----------------------------------------------------------------------------

    def _attempt(self, probe: Callable[[], Finding]) -> Finding:
        """Run one probe; what it did not expect is a finding too."""
        try:
            return probe()
        except (ClientError, StoreError) as error:
            name = getattr(probe, "__name__", "").strip("_").replace("_", " ")
            return Finding(name=name or "a probe", found=None, detail=f"could not be found out: {error}")

    def _told(self, ability: str, found: bool, detail: str) -> Finding:
        return Finding(name=ability, ability=ability, found=found, detail=detail)

    def _put(self, name: str, body: bytes, **more: Any) -> Any:
        self.bytes_sent += len(body)
        self._written.add((self._prefix + name, None))
        reply = self._client.put_object(Bucket=self._bucket, Key=self._prefix + name, Body=body, **more)
        self._note_version(self._prefix + name, reply)
        return reply

    def _note_version(self, key: str, reply: Any) -> None:
        if reply.get("VersionId") not in (None, "null"):
            self._written.add((key, reply["VersionId"]))

    def _content(self, name: str) -> bytes:
        return self._client.get_object(Bucket=self._bucket, Key=self._prefix + name)["Body"].read()

    def _begin(self, name: str, *, checksums: bool) -> dict[str, str]:
        more: Any = {"ChecksumAlgorithm": "CRC64NVME", "ChecksumType": "FULL_OBJECT"} if checksums else {}
        key = self._prefix + name
        reply = self._client.create_multipart_upload(Bucket=self._bucket, Key=key, **more)
        upload = {"Bucket": self._bucket, "Key": key, "UploadId": reply["UploadId"]}
        self._begun[reply["UploadId"]] = upload
        return upload

    def _part(self, upload: dict[str, str], number: int, content: bytes, *, checked: bool = False) -> UploadedPart:
        self.bytes_sent += len(content)
        crc = crc64nvme(content)
        more: Any = {"ChecksumCRC64NVME": encode_crc64nvme(crc)} if checked else {}
        reply = self._client.upload_part(**upload, PartNumber=number, Body=content, **more)  # type: ignore[arg-type]
        return UploadedPart(number=number, size=len(content), etag=reply["ETag"], crc64nvme=crc)

    def _complete(
        self, upload: dict[str, str], parts: list[UploadedPart], *, checked: bool = False, **more: Any
    ) -> None:
        listed: Any = [
            {"PartNumber": part.number, "ETag": part.etag}
            | ({"ChecksumCRC64NVME": encode_crc64nvme(part.crc64nvme)} if checked else {})
            for part in parts
        ]
        request: Any = {**upload, "MultipartUpload": {"Parts": listed}, **more}
        self._written.add((upload["Key"], None))
        reply = self._client.complete_multipart_upload(**request)
        self._begun.pop(upload["UploadId"], None)
        self._note_version(upload["Key"], reply)

    def _abort(self, upload: dict[str, str]) -> None:
        with contextlib.suppress(ClientError):
            self._client.abort_multipart_upload(**upload)  # type: ignore[arg-type]

    def _refusal(self, request: Callable[[], Any]) -> str | None:
        """Return the code with which the store refuses a request; None if it does not. An ill store is asked again."""
        for last in (False, False, True):
            try:
                request()
            except ClientError as error:
                if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) in (500, 502, 503) and not last:
                    time.sleep(1)
                    continue
                return _code(error)
            return None
        return None

    def _remove_everything(self) -> None:
        """Remove what the probes made, each version of it; ``left`` names what the store did not let go."""
        for upload in list(self._begun.values()):
            self._abort(upload)
        # The versions first: deleting without one adds a mark to a versioned bucket, which would stay.
        versioned = {key for key, version in self._written if version is not None}
        for key, version in sorted(self._written, key=str):
            if version is None and key in versioned:
                continue
            try:
                more: Any = {"VersionId": version} if version is not None else {}
                reply = self._client.delete_object(Bucket=self._bucket, Key=key, **more)
                if version is None and reply.get("DeleteMarker") and reply.get("VersionId"):
                    self._client.delete_object(Bucket=self._bucket, Key=key, VersionId=reply["VersionId"])
            except Exception as error:  # noqa: BLE001 - told as what is left
                self.left.append(f"{key}: {_code(error)}")


def _answer(refused: str | None) -> str:
    return f"otherwise answered {refused}" if refused else "it does it all the same"


def _code(error: Exception) -> str:
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", "")
        return str(error.response.get("Error", {}).get("Code") or status)
    return str(error) or type(error).__name__
