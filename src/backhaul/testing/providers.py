"""A proxy that makes a complete S3 server as narrow as a given provider.

The words and codes of the refusals are the real ones where the provider's are known: equal parts are Cloudflare
R2's rule, refused checksum headers Backblaze B2's. A request that breaks a rule never reaches the server.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Literal
from urllib.parse import unquote
from xml.etree import ElementTree

import msgspec

from backhaul.testing.s3_proxy import Asked, S3Proxy, S3Refusal, S3Request
from backhaul.testing.servers import ACCESS_KEY, SECRET_KEY

_CONDITIONS: Final = ("if-none-match", "if-match")
_CHECKSUM_HEADER: Final = re.compile(r"x-amz-checksum-.*|x-amz-sdk-checksum-algorithm|x-amz-trailer")
# Elements named Checksum..., in completions and in the replies that list or report: none of them has children.
_CHECKSUM_ELEMENT: Final = re.compile(rb"<(Checksum\w*)>[^<]*</\1>|<Checksum\w*/>")
_ETAG_ELEMENT: Final = re.compile(rb"(?<=<ETag>)[^<]*(?=</ETag>)")
_MD5: Final = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")
# Where ETags are in headers. SeaweedFS gives the plain one again in a header of its own.
_ETAGS_ASKED: Final = (*_CONDITIONS, "if-range", "x-amz-copy-source-if-match", "x-amz-copy-source-if-none-match")
_ETAGS_GIVEN: Final = ("etag", "seaweed-x-amz-etag")


class ProviderRules(msgspec.Struct, frozen=True, kw_only=True):
    """What a provider takes. The defaults are those of a complete S3.

    Attributes:
        equal_parts: all parts but the last must have the same size, and the last must not be larger.
        max_parts: the highest number of a part.
        min_part: the least size of a part that is not the last.
        max_part: the largest size of a part.
        max_object: the largest size of an object.
        checksums: whether headers and elements with checksums are known; if not, they are refused.
        ignores_checksums: such headers and elements are thrown away without a word.
        conditional_writes: what becomes of If-None-Match and If-Match where something is written or deleted.
        part_copies: whether a part may be copied from another object.
        keeps_uploads: whether unfinished uploads stay; if not, ``ProviderProxy.drop_uploads`` ends them.
        opaque_etags: ETags look like MD5s, and are none.
    """

    equal_parts: bool = False
    max_parts: int | None = 10_000
    min_part: int = 5 << 20
    max_part: int | None = 5 << 30
    max_object: int | None = None
    checksums: bool = True
    ignores_checksums: bool = False
    conditional_writes: Literal["yes", "refused", "ignored"] = "yes"
    part_copies: bool = True
    keeps_uploads: bool = True
    opaque_etags: bool = False

    def __post_init__(self) -> None:
        if self.ignores_checksums and not self.checksums:
            raise ValueError("checksums are either refused or ignored")


class ProviderProxy(S3Proxy):
    """Enforces a provider's rules. ``refusals`` has a line for every request that broke one."""

    rewrites_replies = True

    def __init__(
        self,
        upstream: str,
        rules: ProviderRules,
        *,
        access_key: str = ACCESS_KEY,
        secret_key: str = SECRET_KEY,
        region: str = "us-east-1",
    ) -> None:
        super().__init__(upstream, access_key=access_key, secret_key=secret_key, region=region)
        self.rules = rules
        self.refusals: list[str] = []
        self._buckets: set[str] = set()
        self._lock = threading.Lock()
        # Adding this to an MD5 by XOR hides it, and adding it again brings it back: nothing need be remembered,
        # and equal contents have equal ETags, before and after.
        self._mask = int.from_bytes(hashlib.sha256(b"opaque etags of " + secret_key.encode()).digest()[:16])

    def drop_uploads(self) -> int:
        """Abort every unfinished upload in the buckets that were used through this proxy; return how many.

        Raises:
            ValueError: this provider keeps them.
        """
        if self.rules.keeps_uploads:
            raise ValueError("this provider keeps unfinished uploads")
        with self._lock:
            buckets = sorted(self._buckets)
        dropped = 0
        for bucket in buckets:
            for key, upload in list(self._unfinished(bucket)):
                self.ask("DELETE", bucket, key, {"uploadId": upload})
                dropped += 1
        return dropped

    # -- hooks -----------------------------------------------------------------------------------------

    def refuse(self, request: S3Request, body_length: int) -> S3Refusal | None:
        """See ``S3Proxy.refuse``."""
        with self._lock:
            if request.bucket:
                self._buckets.add(request.bucket)
        for refusal in (
            self._check_headers(request),
            self._check_size(request, body_length),
            self._check_part_copy(request),
        ):
            if refusal is not None:
                return self._refused(request, refusal)
        return None

    def edit_document(self, request: S3Request, document: bytes) -> bytes | S3Refusal:
        """See ``S3Proxy.edit_document``."""
        rules = self.rules
        if not rules.checksums and _CHECKSUM_ELEMENT.search(document):
            return self._refused(request, S3Refusal(400, "InvalidArgument", "Unsupported element: checksum of a part."))
        document = self._translated(document)
        refusal = self._check_parts(request, document)
        if refusal is not None:
            return self._refused(request, refusal)
        return _CHECKSUM_ELEMENT.sub(b"", document) if rules.ignores_checksums else document

    def edit(self, request: S3Request) -> Mapping[str, str]:
        """See ``S3Proxy.edit``."""
        rules = self.rules
        headers = dict(request.headers)
        if rules.ignores_checksums:
            headers = _without_checksums(headers)
        if rules.conditional_writes == "ignored" and _writes(request):
            for name in _CONDITIONS:
                headers.pop(name, None)
        return self._with_other_etags(headers, _ETAGS_ASKED)

    def edit_reply(self, request: S3Request, status: int, headers: Mapping[str, str]) -> Mapping[str, str]:
        """See ``S3Proxy.edit_reply``."""
        if self.rules.ignores_checksums or not self.rules.checksums:
            headers = _without_checksums(headers)
        return self._with_other_etags(headers, _ETAGS_GIVEN)

    def reply_document(self, request: S3Request, status: int, document: bytes) -> bytes:
        """See ``S3Proxy.reply_document``."""
        if self.rules.ignores_checksums or not self.rules.checksums:
            document = _CHECKSUM_ELEMENT.sub(b"", document)
        return self._translated(document)

    # -- rules -----------------------------------------------------------------------------------------

    def _refused(self, request: S3Request, refusal: S3Refusal) -> S3Refusal:
        self.refusals.append(f"{request.operation} {request.key}: {refusal.code}: {refusal.message}")
        return refusal

    def _check_headers(self, request: S3Request) -> S3Refusal | None:
        rules = self.rules
        if not rules.checksums:
            for name in request.headers:
                if name == "x-amz-trailer":
                    return S3Refusal(501, "NotImplemented", "Trailing checksums are not implemented.")
                if _CHECKSUM_HEADER.fullmatch(name):
                    message = f"Unsupported header '{name}' received for this API call."
                    return S3Refusal(400, "InvalidArgument", message)
        if rules.conditional_writes == "refused" and _writes(request):
            for name in _CONDITIONS:
                if name in request.headers:
                    message = f"A header you provided implies functionality that is not implemented: {name}"
                    return S3Refusal(501, "NotImplemented", message)
        if not rules.part_copies and request.operation == "UploadPartCopy":
            return S3Refusal(501, "NotImplemented", "UploadPartCopy is not implemented.")
        return None

    def _check_size(self, request: S3Request, size: int) -> S3Refusal | None:
        rules = self.rules
        if request.operation in ("UploadPart", "UploadPartCopy"):
            number = request.query.get("partNumber", "")
            if rules.max_parts is not None and not (number.isdecimal() and 1 <= int(number) <= rules.max_parts):
                message = f"Part number must be an integer between 1 and {rules.max_parts}, inclusive"
                return S3Refusal(400, "InvalidArgument", message)
        if request.operation == "UploadPart" and _exceeds(size, rules.max_part):
            return _too_large(size)
        if request.operation == "PutObject" and _exceeds(size, rules.max_object):
            return _too_large(size)
        return None

    def _check_part_copy(self, request: S3Request) -> S3Refusal | None:
        """Check the size of a part that is copied, if a limit makes it matter."""
        if request.operation != "UploadPartCopy" or self.rules.max_part is None:
            return None
        spans = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("x-amz-copy-source-range", ""))
        if spans is not None:
            size = int(spans[2]) - int(spans[1]) + 1
        else:
            source = self._head(request.headers["x-amz-copy-source"])
            size = int(source.headers.get("content-length", 0)) if source.status == 200 else 0
        return _too_large(size) if size > self.rules.max_part else None

    def _check_parts(self, request: S3Request, document: bytes) -> S3Refusal | None:
        """Check the sizes of the parts that a completion lists; what is wrong otherwise is the server's to say."""
        rules = self.rules
        stored = self._stored_parts(request)
        try:
            sizes = [stored[_identity(part)] for part in ElementTree.fromstring(document).iterfind("{*}Part")]
        except (ElementTree.ParseError, ValueError, KeyError):
            return None
        if not sizes:
            return None
        if any(size < rules.min_part for size in sizes[:-1]):
            return S3Refusal(
                400, "EntityTooSmall", "Your proposed upload is smaller than the minimum allowed object size."
            )
        if rules.equal_parts and (len(set(sizes[:-1])) > 1 or sizes[-1] > sizes[0]):
            return S3Refusal(400, "InvalidPart", "All non-trailing parts must have the same length.")
        if _exceeds(sum(sizes), rules.max_object):
            return _too_large(sum(sizes))
        return None

    # -- ETags -----------------------------------------------------------------------------------------

    def _other_etag(self, etag: str) -> str:
        """Return the opaque form of an ETag, or from that the plain one. ``*``, and the count of parts, stay."""
        return _MD5.sub(lambda found: f"{int(found[0], 16) ^ self._mask:032x}", etag)

    def _with_other_etags(self, headers: Mapping[str, str], names: Sequence[str]) -> Mapping[str, str]:
        if not self.rules.opaque_etags:
            return headers
        return {n: self._other_etag(value) if n in names else value for n, value in headers.items()}

    def _translated(self, document: bytes) -> bytes:
        if not self.rules.opaque_etags:
            return document
        return _ETAG_ELEMENT.sub(lambda found: self._other_etag(found[0].decode()).encode(), document)

    # -- questions to the server -----------------------------------------------------------------------

    def _head(self, copy_source: str) -> Asked:
        bucket, _, key = unquote(copy_source.partition("?")[0]).removeprefix("/").partition("/")
        return self.ask("HEAD", bucket, key)

    def _stored_parts(self, request: S3Request) -> dict[tuple[int, str], int]:
        """Return the sizes of an upload's parts by number and plain ETag; none if there is no such upload.

        By number alone would not do: SeaweedFS lists a part that was sent again once for each time.
        """
        sizes: dict[tuple[int, str], int] = {}
        query = {"uploadId": request.query["uploadId"]}
        while True:
            page = self.ask("GET", request.bucket, request.key, query)
            if page.status != 200:
                return sizes
            tree = ElementTree.fromstring(page.body)
            for part in tree.iterfind("{*}Part"):
                sizes[_identity(part)] = int(part.findtext("{*}Size", ""))
            if tree.findtext("{*}IsTruncated") != "true":
                return sizes
            query["part-number-marker"] = tree.findtext("{*}NextPartNumberMarker", "")

    def _unfinished(self, bucket: str) -> Iterator[tuple[str, str]]:
        query = {"uploads": ""}
        while True:
            page = self.ask("GET", bucket, query=query)
            if page.status != 200:
                return
            tree = ElementTree.fromstring(page.body)
            for entry in tree.iterfind("{*}Upload"):
                yield entry.findtext("{*}Key", ""), entry.findtext("{*}UploadId", "")
            if tree.findtext("{*}IsTruncated") != "true":
                return
            query["key-marker"] = tree.findtext("{*}NextKeyMarker", "")
            query["upload-id-marker"] = tree.findtext("{*}NextUploadIdMarker", "")


def _identity(part: ElementTree.Element) -> tuple[int, str]:
    return int(part.findtext("{*}PartNumber", "")), part.findtext("{*}ETag", "").strip('"')


def _writes(request: S3Request) -> bool:
    return request.method in ("PUT", "POST", "DELETE")


def _exceeds(size: int, limit: int | None) -> bool:
    return limit is not None and size > limit


def _too_large(size: int) -> S3Refusal:
    return S3Refusal(400, "EntityTooLarge", f"Your proposed upload exceeds the maximum allowed size: {size} bytes.")


def _without_checksums(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if not _CHECKSUM_HEADER.fullmatch(name)}
