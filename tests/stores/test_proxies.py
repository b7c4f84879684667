"""The proxies before a real server: what passes unaltered, what each rule refuses, what each fault does."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import http.server
import itertools
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectionClosedError, EndpointConnectionError, ReadTimeoutError

from backhaul.testing.faults import KINDS, Fault, FaultPlan, FaultProxy
from backhaul.testing.providers import ProviderProxy, ProviderRules
from backhaul.testing.s3_proxy import PIECE, BreakConnection, S3Proxy, S3Refusal, S3Request, Served, parse_request
from backhaul.testing.servers import SeaweedFS
from backhaul.transforms.digest import crc64nvme, encode_crc64nvme

MIB = 1 << 20
PART = 5 * MIB  # the least that SeaweedFS takes
CONTENT = bytes(range(256)) * 40

ClientOf = Callable[..., Any]


@pytest.fixture
def client_of() -> Iterator[ClientOf]:
    """Makes plain clients that try once, and add no checksums by themselves."""
    made: list[Any] = []

    def make(proxy: S3Proxy, **config: Any) -> Any:
        config = {
            "retries": {"total_max_attempts": 1},
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            **config,
        }
        client = boto3.client(
            "s3",
            endpoint_url=proxy.endpoint,
            aws_access_key_id="nobody",  # the proxies sign anew
            aws_secret_access_key="nothing",
            region_name="us-east-1",
            config=Config(**config),
        )
        made.append(client)
        return client

    yield make
    for client in made:
        client.close()


@pytest.fixture
def proxy(seaweed: SeaweedFS) -> Iterator[S3Proxy]:
    with S3Proxy(seaweed.endpoint) as running:
        yield running


@pytest.fixture
def through(proxy: S3Proxy, client_of: ClientOf) -> Any:
    return client_of(proxy)


@pytest.fixture
def provider(seaweed: SeaweedFS) -> Iterator[Callable[..., ProviderProxy]]:
    """Runs proxies with rules; the least size of a part is the server's, if nothing else is said."""
    running: list[ProviderProxy] = []

    def start(**rules: Any) -> ProviderProxy:
        made = ProviderProxy(seaweed.endpoint, ProviderRules(**rules))
        made.start()
        running.append(made)
        return made

    yield start
    for made in running:
        made.close()
        assert made.failures == []


@pytest.fixture
def faulty(proxy: S3Proxy) -> Iterator[FaultProxy]:
    """Injects nothing until it is told to; before ``proxy``, which shows what came through."""
    with FaultProxy(proxy.endpoint) as running:
        yield running


@pytest.fixture
def ill(faulty: FaultProxy, client_of: ClientOf) -> Any:
    return client_of(faulty, read_timeout=30)


def body(client: Any, bucket: str, key: str, **arguments: Any) -> bytes:
    return client.get_object(Bucket=bucket, Key=key, **arguments)["Body"].read()  # type: ignore[no-any-return]


def names(client: Any, bucket: str) -> list[str]:
    return [entry["Key"] for entry in client.list_objects_v2(Bucket=bucket).get("Contents", [])]


def code(caught: pytest.ExceptionInfo[ClientError]) -> tuple[int, str]:
    return caught.value.response["ResponseMetadata"]["HTTPStatusCode"], caught.value.response["Error"]["Code"]


def begin(client: Any, bucket: str, key: str, **arguments: Any) -> str:
    return client.create_multipart_upload(Bucket=bucket, Key=key, **arguments)["UploadId"]  # type: ignore[no-any-return]


def send(client: Any, bucket: str, key: str, upload: str, contents: Mapping[int, bytes]) -> list[dict[str, Any]]:
    return [
        {
            "PartNumber": number,
            "ETag": client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=content)[
                "ETag"
            ],
        }
        for number, content in contents.items()
    ]


def complete(client: Any, bucket: str, key: str, upload: str, parts: list[dict[str, Any]], **arguments: Any) -> Any:
    return client.complete_multipart_upload(
        Bucket=bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": parts}, **arguments
    )


def multipart(client: Any, bucket: str, key: str, *sizes: int) -> Any:
    """Upload an object in parts of these sizes."""
    upload = begin(client, bucket, key)
    return complete(
        client,
        bucket,
        key,
        upload,
        send(client, bucket, key, upload, {number: os.urandom(size) for number, size in enumerate(sizes, 1)}),
    )


def http_request(
    proxy: S3Proxy, method: str, target: str, content: bytes | None = None, headers: Mapping[str, str] | None = None
) -> tuple[http.client.HTTPResponse, bytes]:
    """Send a request with no client library in between: what the socket says is raised as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=60)
    try:
        connection.request(method, target, content, dict(headers or {}))
        reply = connection.getresponse()
        return reply, reply.read()
    finally:
        connection.close()


def assert_reset(action: Callable[[], object]) -> None:
    """Check for a reset, not an orderly end (for which http.client has a subclass of the same error)."""
    with pytest.raises(ConnectionError) as caught:
        action()
    assert type(caught.value) in (ConnectionResetError, BrokenPipeError)


# -- parsing -------------------------------------------------------------------------------------------


@pytest.mark.unit
@pytest.mark.parametrize(
    ("method", "target", "headers", "operation"),
    [
        ("PUT", "/bucket/key", {}, "PutObject"),
        ("PUT", "/bucket/key?x-id=PutObject", {}, "PutObject"),
        ("PUT", "/bucket/key", {"x-amz-copy-source": "/a/b"}, "CopyObject"),
        ("PUT", "/bucket/key?partNumber=1&uploadId=u", {}, "UploadPart"),
        ("PUT", "/bucket/key?partNumber=1&uploadId=u", {"x-amz-copy-source": "/a/b"}, "UploadPartCopy"),
        ("PUT", "/bucket/key?tagging", {}, "Other"),
        ("PUT", "/bucket", {}, "Other"),
        ("PUT", "/bucket/", {}, "Other"),
        ("POST", "/bucket/key?uploads", {}, "CreateMultipartUpload"),
        ("POST", "/bucket/key?uploads=", {}, "CreateMultipartUpload"),
        ("POST", "/bucket/key?uploadId=u", {}, "CompleteMultipartUpload"),
        ("POST", "/bucket?delete", {}, "Other"),
        ("GET", "/bucket/key", {}, "GetObject"),
        ("GET", "/bucket/key?versionId=1", {}, "GetObject"),
        ("GET", "/bucket/key?acl", {}, "Other"),
        ("GET", "/bucket/key?uploadId=u", {}, "ListParts"),
        ("GET", "/bucket?uploads", {}, "ListMultipartUploads"),
        ("GET", "/bucket?list-type=2&prefix=a", {}, "ListObjectsV2"),
        ("GET", "/bucket", {}, "Other"),
        ("GET", "/", {}, "Other"),
        ("HEAD", "/bucket/key", {}, "HeadObject"),
        ("HEAD", "/bucket", {}, "Other"),
        ("DELETE", "/bucket/key", {}, "DeleteObject"),
        ("DELETE", "/bucket/key?uploadId=u", {}, "AbortMultipartUpload"),
    ],
)
def test_operations_are_told_apart(method: str, target: str, headers: dict[str, str], operation: str) -> None:
    assert parse_request(method, target, headers).operation == operation


@pytest.mark.unit
def test_names_and_queries_are_decoded() -> None:
    request = parse_request("GET", "/a-bucket/a%20b/%C3%BC+c?prefix=x%2By%20z+w&uploads", {"range": "bytes=0-1"})
    assert request == S3Request(
        method="GET",
        bucket="a-bucket",
        key="a b/ü+c",
        query={"prefix": "x+y z w", "uploads": ""},
        headers={"range": "bytes=0-1"},
        operation="GetObject",
    )


# -- passing on ----------------------------------------------------------------------------------------

ODD_KEYS = [
    "plain",
    "a b/ü+ñ %20&=?#;.x",
    "q'()*!~$@,:",
    "日本/語 🎈",
    "percent%2Fslash%",
    "two  spaces and a plus +",
    "dots../x.",
]


@pytest.mark.parametrize("key", ODD_KEYS)
def test_odd_keys_arrive_unaltered(proxy: S3Proxy, through: Any, s3: Any, bucket: str, key: str) -> None:
    content = key.encode() * 10
    stored = through.put_object(Bucket=bucket, Key=key, Body=content)
    assert body(s3, bucket, key) == content
    assert names(s3, bucket) == names(through, bucket) == [key]
    assert body(through, bucket, key) == content
    assert through.head_object(Bucket=bucket, Key=key)["ETag"] == stored["ETag"]
    assert through.list_objects_v2(Bucket=bucket, Prefix=key)["KeyCount"] == 1
    assert through.list_objects_v2(Bucket=bucket, StartAfter=key)["KeyCount"] == 0
    through.delete_object(Bucket=bucket, Key=key)
    assert names(s3, bucket) == []
    assert proxy.requests[0] == Served("PUT", "PutObject", len(content))
    assert [proxy.count(o) for o in ("GetObject", "HeadObject", "ListObjectsV2", "DeleteObject")] == [1, 1, 3, 1]


def test_headers_pass_both_ways(through: Any, s3: Any, bucket: str) -> None:
    metadata = {"one": "a  b", "two-three": "x,y"}
    through.put_object(Bucket=bucket, Key="k", Body=b"x", ContentType="text/x-odd; a=b", Metadata=metadata)
    ours, theirs = (client.head_object(Bucket=bucket, Key="k") for client in (through, s3))
    for name in ("ContentType", "Metadata", "ETag", "LastModified", "ContentLength"):
        assert ours[name] == theirs[name]
    assert (ours["Metadata"], ours["ContentType"]) == (metadata, "text/x-odd; a=b")


def test_ranges(through: Any, bucket: str) -> None:
    through.put_object(Bucket=bucket, Key="k", Body=CONTENT)
    reply = through.get_object(Bucket=bucket, Key="k", Range="bytes=5-9")
    assert (reply["ResponseMetadata"]["HTTPStatusCode"], reply["Body"].read()) == (206, CONTENT[5:10])
    assert body(through, bucket, "k", Range="bytes=-3") == CONTENT[-3:]
    with pytest.raises(ClientError) as caught:
        through.get_object(Bucket=bucket, Key="k", Range=f"bytes={len(CONTENT)}-")
    assert code(caught) == (416, "InvalidRange")


def test_errors_and_conditions_pass(through: Any, bucket: str) -> None:
    with pytest.raises(ClientError) as caught:
        through.get_object(Bucket=bucket, Key="nothing")
    assert code(caught) == (404, "NoSuchKey")
    with pytest.raises(ClientError) as caught:
        through.head_object(Bucket=bucket, Key="nothing")
    assert code(caught) == (404, "404")
    stored = through.put_object(Bucket=bucket, Key="k", Body=b"x", IfNoneMatch="*")
    with pytest.raises(ClientError) as caught:
        through.put_object(Bucket=bucket, Key="k", Body=b"y", IfNoneMatch="*")
    assert code(caught) == (412, "PreconditionFailed")
    with pytest.raises(ClientError) as caught:
        through.get_object(Bucket=bucket, Key="k", IfNoneMatch=stored["ETag"])
    assert code(caught)[0] == 304
    assert body(through, bucket, "k", IfMatch=stored["ETag"]) == b"x"


def test_a_server_that_refuses_before_it_has_the_body(through: Any, bucket: str) -> None:
    through.put_object(Bucket=bucket, Key="k", Body=b"x")
    large = os.urandom(32 * MIB)
    for _ in range(3):
        with pytest.raises(ClientError) as caught:
            through.put_object(Bucket=bucket, Key="k", Body=large, IfNoneMatch="*")
        assert code(caught) == (412, "PreconditionFailed")
    assert body(through, bucket, "k") == b"x"


def test_uploads_in_parts(through: Any, s3: Any, bucket: str) -> None:
    key = "in parts/ü +"
    contents = {1: os.urandom(PART), 2: os.urandom(PART + 1), 3: b"end"}
    whole = b"".join(contents.values())
    upload = begin(through, bucket, key, ChecksumAlgorithm="CRC64NVME", ChecksumType="FULL_OBJECT")
    assert [u["UploadId"] for u in through.list_multipart_uploads(Bucket=bucket)["Uploads"]] == [upload]
    parts = []
    for number, content in contents.items():
        checksum = encode_crc64nvme(crc64nvme(content))
        reply = through.upload_part(
            Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=content, ChecksumCRC64NVME=checksum
        )
        parts.append({"PartNumber": number, "ETag": reply["ETag"], "ChecksumCRC64NVME": checksum})
    pages = list(
        through.get_paginator("list_parts").paginate(
            Bucket=bucket, Key=key, UploadId=upload, PaginationConfig={"PageSize": 2}
        )
    )
    assert [part["Size"] for page in pages for part in page["Parts"]] == [PART, PART + 1, 3]
    complete(
        through,
        bucket,
        key,
        upload,
        parts,
        ChecksumCRC64NVME=encode_crc64nvme(crc64nvme(whole)),
        ChecksumType="FULL_OBJECT",
    )
    assert body(s3, bucket, key) == whole
    found = through.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    assert found["ChecksumCRC64NVME"] == encode_crc64nvme(crc64nvme(whole))
    abandoned = begin(through, bucket, key)
    through.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=abandoned)
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=bucket)


def test_a_wrong_checksum_is_the_servers_to_refuse(through: Any, s3: Any, bucket: str) -> None:
    with pytest.raises(ClientError) as caught:
        through.put_object(Bucket=bucket, Key="k", Body=b"x", ChecksumCRC64NVME=encode_crc64nvme(crc64nvme(b"y")))
    assert code(caught)[0] == 400
    assert names(s3, bucket) == []


def test_copies(proxy: S3Proxy, through: Any, s3: Any, bucket: str) -> None:
    source, target = "source ü+", "target"
    content = os.urandom(PART + 10)
    through.put_object(Bucket=bucket, Key=source, Body=content)
    where = {"Bucket": bucket, "Key": source}
    through.copy_object(Bucket=bucket, Key="copy", CopySource=where)
    assert body(s3, bucket, "copy") == content
    upload = begin(through, bucket, target)
    parts = []
    for number, span in ((1, f"bytes=0-{PART - 1}"), (2, f"bytes={PART}-{PART + 9}")):
        reply = through.upload_part_copy(
            Bucket=bucket, Key=target, UploadId=upload, PartNumber=number, CopySource=where, CopySourceRange=span
        )
        parts.append({"PartNumber": number, "ETag": reply["CopyPartResult"]["ETag"]})
    complete(through, bucket, target, upload, parts)
    assert body(s3, bucket, target) == content
    assert (proxy.count("CopyObject"), proxy.count("UploadPartCopy")) == (1, 2)


def test_listings_page_and_group(through: Any, s3: Any, bucket: str) -> None:
    keys = [f"a +ü/{i:02}/{j}" for i in range(5) for j in range(4)] + ["other"]
    for key in keys:
        s3.put_object(Bucket=bucket, Key=key, Body=b"")
    for prefix in ("", "a +ü/", "a +ü/03"):
        pages = through.get_paginator("list_objects_v2").paginate(
            Bucket=bucket, Prefix=prefix, PaginationConfig={"PageSize": 3}
        )
        assert [e["Key"] for page in pages for e in page.get("Contents", [])] == [
            k for k in keys if k.startswith(prefix)
        ]
    grouped = through.list_objects_v2(Bucket=bucket, Prefix="a +ü/", Delimiter="/")
    assert [entry["Prefix"] for entry in grouped["CommonPrefixes"]] == [f"a +ü/{i:02}/" for i in range(5)]


@contextlib.contextmanager
def canned_server(reply: bytes) -> Iterator[str]:
    """Answer whatever is asked with the same bytes, and hang up: for replies that SeaweedFS does not give."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.wfile.write(reply)

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        serving.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            serving.join()


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n"


@pytest.mark.unit
def test_replies_in_chunks_stay_in_chunks() -> None:
    with canned_server(CHUNKED + b"0\r\n\r\n") as upstream, S3Proxy(upstream) as proxy:
        reply, content = http_request(proxy, "GET", "/bucket/key")
    assert content == b"hello world"
    assert reply.headers["Transfer-Encoding"] == "chunked"
    assert "Content-Length" not in reply.headers


@pytest.mark.unit
@pytest.mark.parametrize("rewriting", [False, True])
@pytest.mark.parametrize(
    "reply", [CHUNKED, b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nnot all", b"HTTP/1.1 200 OK\r\nCont", b""]
)
def test_a_reply_that_breaks_off_is_never_passed_on_as_whole(reply: bytes, rewriting: bool) -> None:
    with canned_server(reply) as upstream, S3Proxy(upstream) as proxy:
        proxy.rewrites_replies = rewriting
        with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
            http_request(proxy, "GET", "/bucket?list-type=2")


def test_bodies_pass_in_pieces(seaweed: SeaweedFS, client_of: ClientOf, s3: Any, bucket: str) -> None:
    class Measuring(S3Proxy):
        largest = 0
        pieces = 0

        def _measured(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
            for piece in pieces:
                self.largest = max(self.largest, len(piece))
                self.pieces += 1
                yield piece

        def request_body(self, request: S3Request, length: int, pieces: Iterator[bytes]) -> Iterator[bytes]:
            return self._measured(pieces)

        def reply_body(
            self, request: S3Request, status: int, length: int | None, pieces: Iterator[bytes]
        ) -> Iterator[bytes]:
            return self._measured(pieces)

    content = os.urandom(64 * MIB + 1)
    with Measuring(seaweed.endpoint) as measuring:
        client = client_of(measuring)
        client.put_object(Bucket=bucket, Key="k", Body=content)
        assert body(s3, bucket, "k") == content
        sending = measuring.pieces
        assert body(client, bucket, "k") == content
        assert 0 < measuring.largest <= PIECE
        assert sending > 256
        assert measuring.pieces - sending > 256


def test_many_clients_at_once(proxy: S3Proxy, through: Any, s3: Any, bucket: str) -> None:
    def there_and_back(number: int) -> bool:
        content = os.urandom(number * 10_000)
        through.put_object(Bucket=bucket, Key=str(number), Body=content)
        return body(through, bucket, str(number)) == content

    with ThreadPoolExecutor(10) as threads:
        assert all(threads.map(there_and_back, range(60)))
    assert sorted(names(s3, bucket), key=int) == [str(i) for i in range(60)]
    assert (proxy.count("PutObject"), proxy.count("GetObject")) == (60, 60)


def test_a_connection_serves_many_requests(proxy: S3Proxy, bucket: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=60)
    connection.connect()
    used = connection.sock
    for method, target, content, expected in (
        ("PUT", f"/{bucket}/k", CONTENT, b""),
        ("GET", f"/{bucket}/k", None, CONTENT),
        ("HEAD", f"/{bucket}/k", None, b""),
        ("DELETE", f"/{bucket}/k", None, b""),
        ("HEAD", f"/{bucket}/k", None, b""),
    ):
        connection.request(method, target, content)
        assert connection.getresponse().read() == expected
        assert connection.sock is used
    connection.close()


def test_a_client_that_waits_is_told_to_go_on(proxy: S3Proxy, s3: Any, bucket: str) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=60) as client:
        client.sendall(
            f"PUT /{bucket}/k HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n".encode()
        )
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"hello")
        assert client.recv(17).startswith(b"HTTP/1.1 200")
    assert body(s3, bucket, "k") == b"hello"


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"x-amz-content-sha256": "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"}, 501), ({"Transfer-Encoding": "chunked"}, 411)],
)
def test_bodies_in_frames_are_refused(
    proxy: S3Proxy, s3: Any, bucket: str, headers: dict[str, str], status: int
) -> None:
    assert http_request(proxy, "PUT", f"/{bucket}/k", b"0\r\n\r\n", headers)[0].status == status
    assert names(s3, bucket) == []


def test_a_client_that_breaks_off_is_no_error(
    proxy: S3Proxy, s3: Any, bucket: str, capfd: pytest.CaptureFixture[str]
) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=os.urandom(32 * MIB))
    for text, reset in itertools.product(
        (
            "",
            "PUT /",
            f"PUT /{bucket}/none HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n",
            f"PUT /{bucket}/half HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\nnot all of it",
            f"GET /{bucket}/k HTTP/1.1\r\nHost: x\r\n\r\n",
        ),
        (False, True),
    ):
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=60) as client:
            client.sendall(text.encode())
            if text.startswith("GET"):
                client.recv(1)
            if reset:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    proxy.close()
    assert proxy.failures == []
    assert names(s3, bucket) == ["k"]
    assert Served("PUT", "PutObject", len("not all of it")) in proxy.requests
    assert capfd.readouterr().err == ""


def test_a_proxy_before_a_proxy(proxy: S3Proxy, client_of: ClientOf, s3: Any, bucket: str) -> None:
    with S3Proxy(proxy.endpoint) as outer:
        client = client_of(outer)
        client.put_object(Bucket=bucket, Key="ü +%", Body=CONTENT)
        assert body(client, bucket, "ü +%") == CONTENT == body(s3, bucket, "ü +%")
        assert outer.requests == proxy.requests


def test_hooks_change_what_passes(seaweed: SeaweedFS, client_of: ClientOf, s3: Any, bucket: str) -> None:
    class Changing(S3Proxy):
        def __init__(self, upstream: str) -> None:
            super().__init__(upstream)
            self.seen: list[tuple[str, int]] = []

        def refuse(self, request: S3Request, body_length: int) -> S3Refusal | None:
            return S3Refusal(409, "NotHere", f"<{body_length}>") if request.key == "refused" else None

        def edit(self, request: S3Request) -> Mapping[str, str]:
            return {n: v for n, v in request.headers.items() if n != "content-type"} | {"x-amz-meta-added": "yes"}

        def observe(self, request: S3Request, status: int, headers: Mapping[str, str]) -> None:
            self.seen.append((request.operation, status))

        def edit_reply(self, request: S3Request, status: int, headers: Mapping[str, str]) -> Mapping[str, str]:
            return {**headers, "x-amz-version-id": "ours"}

    with Changing(seaweed.endpoint) as changing:
        client = client_of(changing)
        reply = client.put_object(Bucket=bucket, Key="k", Body=CONTENT, ContentType="text/odd")
        assert reply["VersionId"] == "ours"
        with pytest.raises(ClientError) as caught:
            client.put_object(Bucket=bucket, Key="refused", Body=CONTENT)
        assert code(caught) == (409, "NotHere")
        assert caught.value.response["Error"]["Message"] == f"<{len(CONTENT)}>"
        with pytest.raises(ClientError) as caught:
            client.head_object(Bucket=bucket, Key="refused")
        assert code(caught) == (409, "409")
        assert changing.seen == [("PutObject", 200)]
    found = s3.head_object(Bucket=bucket, Key="k")
    assert found["Metadata"] == {"added": "yes"}
    assert found["ContentType"] != "text/odd"
    assert names(s3, bucket) == ["k"]


def test_a_mistake_in_a_hook_is_raised_at_the_end(seaweed: SeaweedFS, bucket: str) -> None:
    class Mistaken(S3Proxy):
        def observe(self, request: S3Request, status: int, headers: Mapping[str, str]) -> None:
            raise ZeroDivisionError(request.key)

    def use() -> None:
        with Mistaken(seaweed.endpoint) as mistaken:
            assert_reset(lambda: http_request(mistaken, "GET", f"/{bucket}/k"))

    with pytest.raises(ZeroDivisionError, match="k"):
        use()


def test_the_end_breaks_connections_and_leaves_no_threads(seaweed: SeaweedFS, bucket: str) -> None:
    reached, errors = threading.Event(), []

    class Waiting(S3Proxy):
        def refuse(self, request: S3Request, body_length: int) -> S3Refusal | None:
            reached.set()
            self.pause(3600)
            raise BreakConnection

    waiting = Waiting(seaweed.endpoint)
    waiting.start()

    def ask() -> None:
        try:
            http_request(waiting, "GET", f"/{bucket}/k")
        except ConnectionError as error:
            errors.append(error)

    asking = threading.Thread(target=ask)
    with socket.create_connection(("127.0.0.1", waiting.port), timeout=60) as idle:
        asking.start()
        assert reached.wait(60)
        waiting.close()
        asking.join()
        try:
            rest = idle.recv(1)
        except ConnectionResetError:
            rest = b""
        assert rest == b""
    assert len(errors) == 1
    assert waiting.failures == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("s3-proxy")]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", waiting.port), timeout=60)
    waiting.close()  # once more is no error


def test_a_server_that_is_away_looks_so(client_of: ClientOf, bucket: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        with S3Proxy(f"http://127.0.0.1:{unused.getsockname()[1]}") as proxy:
            assert_reset(lambda: http_request(proxy, "GET", f"/{bucket}/k"))
            with pytest.raises(ConnectionClosedError):
                client_of(proxy).put_object(Bucket=bucket, Key="k", Body=CONTENT)


# -- providers' rules ----------------------------------------------------------------------------------


@pytest.mark.unit
def test_checksums_are_not_both_refused_and_ignored() -> None:
    with pytest.raises(ValueError, match="refused or ignored"):
        ProviderRules(checksums=False, ignores_checksums=True)


def test_a_complete_provider_refuses_nothing(
    provider: Callable[..., ProviderProxy], client_of: ClientOf, s3: Any, bucket: str
) -> None:
    complete_one = provider()
    client = client_of(
        complete_one, request_checksum_calculation="when_supported", response_checksum_validation="when_supported"
    )
    stored = client.put_object(Bucket=bucket, Key="k", Body=CONTENT, IfNoneMatch="*")
    assert stored["ETag"] == f'"{hashlib.md5(CONTENT).hexdigest()}"'
    assert "ChecksumCRC32" in client.head_object(Bucket=bucket, Key="k", ChecksumMode="ENABLED")
    multipart(client, bucket, "parts", PART, PART + 1, PART + 2)
    assert client.get_object(Bucket=bucket, Key="k", IfMatch=stored["ETag"])["Body"].read() == CONTENT
    assert names(s3, bucket) == ["k", "parts"]
    assert complete_one.refusals == []


@pytest.mark.parametrize("sizes", [(3,), (PART, 1), (PART, PART, PART - 1), (PART, PART, PART)])
def test_equal_parts_pass(
    provider: Callable[..., ProviderProxy], client_of: ClientOf, s3: Any, bucket: str, sizes: tuple[int, ...]
) -> None:
    strict = provider(equal_parts=True)
    multipart(client_of(strict), bucket, "k", *sizes)
    assert s3.head_object(Bucket=bucket, Key="k")["ContentLength"] == sum(sizes)
    assert strict.refusals == []


@pytest.mark.parametrize("sizes", [(PART + 1, PART, 1), (PART, PART + 1, 1), (PART, PART + 1)])
def test_unequal_parts_are_refused(
    provider: Callable[..., ProviderProxy], client_of: ClientOf, s3: Any, bucket: str, sizes: tuple[int, ...]
) -> None:
    strict = provider(equal_parts=True)
    with pytest.raises(ClientError) as caught:
        multipart(client_of(strict), bucket, "k", *sizes)
    assert code(caught) == (400, "InvalidPart")
    assert len(strict.refusals) == 1
    assert "InvalidPart" in strict.refusals[0]
    assert names(s3, bucket) == []
    multipart(client_of(provider()), bucket, "k", *sizes)


def test_the_parts_that_count_are_those_listed_as_last_sent(
    provider: Callable[..., ProviderProxy], client_of: ClientOf, s3: Any, bucket: str
) -> None:
    strict = provider(equal_parts=True)
    client = client_of(strict)
    upload = begin(client, bucket, "k")
    send(client, bucket, "k", upload, {1: os.urandom(PART + 1), 2: os.urandom(PART), 3: b"not listed", 5: b"end"})
    first = send(client, bucket, "k", upload, {1: os.urandom(PART)})
    others = send(client, bucket, "k", upload, {2: os.urandom(PART), 5: b"the end"})
    complete(client, bucket, "k", upload, first + others)
    assert s3.head_object(Bucket=bucket, Key="k")["ContentLength"] == 2 * PART + 7
    assert strict.refusals == []


def test_the_count_of_parts_is_limited(
    provider: Callable[..., ProviderProxy], client_of: ClientOf, bucket: str
) -> None:
    few = provider(max_parts=3)
    client = client_of(few)
    client.put_object(Bucket=bucket, Key="source", Body=CONTENT)
    upload = begin(client, bucket, "k")
    send(client, bucket, "k", upload, {3: b"x"})
    assert few.refusals == []
    with pytest.raises(ClientError) as caught:
        send(client, bucket, "k", upload, {4: b"x"})
    assert code(caught) == (400, "InvalidArgument")
    with pytest.raises(ClientError) as caught:
        client.upload_part_copy(
            Bucket=bucket, Key="k", UploadId=upload, PartNumber=4, CopySource={"Bucket": bucket, "Key": "source"}
        )
    assert code(caught) == (400, "InvalidArgument")
    assert len(few.refusals) == 2
    assert [p["PartNumber"] for p in client.list_parts(Bucket=bucket, Key="k", UploadId=upload)["Parts"]] == [3]
    send(client_of(provider(max_parts=None)), bucket, "k", upload, {4: b"x"})


def test_small_parts_are_refused_at_the_end(
    provider: Callable[..., ProviderProxy], client_of: ClientOf, bucket: str
) -> None:
    coarse = provider(min_part=PART + 1)
    client = client_of(coarse)
    multipart(client, bucket, "k", PART + 1, 1)
    multipart(client, bucket, "k", 1)
    assert coarse.refusals == []
    with pytest.raises(ClientError) as caught:
        multipart(client, bucket, "k", PART + 1, PART, 1)
    assert code(caught) == (400, "EntityTooSmall")
    assert len(coarse.refusals) == 1


def test_large_parts_are_refused(
    provider: Callable[..., ProviderProxy], client_of: ClientOf, s3: Any, bucket: str
) -> None:
    narrow = provider(max_part=1000)
    client = client_of(narrow)
    s3.put_object(Bucket=bucket, Key="source ü+", Body=CONTENT)
    upload = begin(client, bucket, "k")
    copy = {"Bucket": bucket, "Key": "k", "UploadId": upload, "CopySource": {"Bucket": bucket, "Key": "source ü+"}}
    send(client, bucket, "k", upload, {1: bytes(1000)})
    client.upload_part_copy(**copy, PartNumber=2, CopySourceRange="bytes=0-999")
    assert narrow.refusals == []
    for attempt in (
        lambda: send(client, bucket, "k", upload, {3: bytes(1001)}),
        lambda: client.upload_part_copy(**copy, PartNumber=3, CopySourceRange="bytes=0-1000"),
        lambda: client.upload_part_copy(**copy, PartNumber=3),
    ):
        with pytest.raises(ClientError) as caught:
            attempt()
        assert code(caught) == (400, "EntityTooLarge")
    assert len(narrow.refusals) == 3
    assert [p["Size"] for p in s3.list_parts(Bucket=bucket, Key="k", UploadId=upload)["Parts"]] == [1000, 1000]
    client_of(provider()).upload_part_copy(**copy, PartNumber=3)


def test_large_objects_are_refused(
    provider: Callable[..., ProviderProxy], client_of: ClientOf, s3: Any, bucket: str
) -> None:
    narrow = provider(max_object=PART + 10)
    client = client_of(narrow)
    multipart(client, bucket, "parts", PART, 10)
    client.put_object(Bucket=bucket, Key="whole", Body=bytes(PART + 10))
    assert narrow.refusals == []
    with pytest.raises(ClientError) as caught:
        multipart(client, bucket, "more parts", PART, 11)
    assert code(caught) == (400, "EntityTooLarge")
    with pytest.raises(ClientError) as caught:
        client.put_object(Bucket=bucket, Key="more", Body=bytes(PART + 11))
    assert code(caught) == (400, "EntityTooLarge")
    assert len(narrow.refusals) == 2
    assert names(s3, bucket) == ["parts", "whole"]


def test_checksums_are_refused(
    provider: Callable[..., ProviderProxy], client_of: ClientOf, s3: Any, bucket: str
) -> None:
    old = provider(checksums=False)
    eager = client_of(old, request_checksum_calculation="when_supported")
    plain = client_of(old)
    multipart(plain, bucket, "parts", PART, 1)
    plain.put_object(Bucket=bucket, Key="k", Body=CONTENT)
    assert body(plain, bucket, "k") == CONTENT
    assert old.refusals == []
    upload = begin(plain, bucket, "more")
    part = send(plain, bucket, "more", upload, {1: b"x"})[0]
    attempts: list[Callable[[], object]] = [
        lambda: eager.put_object(Bucket=bucket, Key="more", Body=CONTENT),
        lambda: plain.put_object(Bucket=bucket, Key="more", Body=b"x", ChecksumCRC64NVME="AAAAAAAAAAA="),
        lambda: begin(plain, bucket, "more", ChecksumAlgorithm="CRC64NVME"),
        lambda: plain.get_object(Bucket=bucket, Key="k", ChecksumMode="ENABLED"),
        lambda: complete(plain, bucket, "more", upload, [{**part, "ChecksumCRC64NVME": "AAAAAAAAAAA="}]),
    ]
    for number, attempt in enumerate(attempts, 1):
        with pytest.raises(ClientError) as caught:
            attempt()
        assert code(caught) == (400, "InvalidArgument")
        assert len(old.refusals) == number
    framed = {"x-amz-trailer": "x-amz-checksum-crc32", "x-amz-content-sha256": "STREAMING-UNSIGNED-PAYLOAD-TRAILER"}
    assert http_request(old, "PUT", f"/{bucket}/more", b"x", framed)[0].status == 501
    assert len(old.refusals) == len(attempts) + 1
    assert names(s3, bucket) == ["k", "parts"]


@pytest.mark.parametrize("rules", [{"checksums": False}, {"ignores_checksums": True}])
def test_replies_of_a_provider_without_checksums_have_none(
    provider: Callable[..., ProviderProxy], client_of: ClientOf, s3: Any, bucket: str, rules: dict[str, bool]
) -> None:
    checksum = encode_crc64nvme(crc64nvme(b"x"))
    s3.put_object(Bucket=bucket, Key="k", Body=b"x", ChecksumCRC64NVME=checksum)
    for get in (s3.head_object, s3.get_object):
        assert get(Bucket=bucket, Key="k", ChecksumMode="ENABLED")["ChecksumCRC64NVME"] == checksum
    client = client_of(provider(**rules))
    for get in (client.head_object, client.get_object):
        reply = get(Bucket=bucket, Key="k")
        assert not [name for name in reply["ResponseMetadata"]["HTTPHeaders"] if "checksum" in name]


@pytest.mark.unit
@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (ProviderRules(), b"<A><ChecksumCRC32>x==</ChecksumCRC32><Size>1</Size><ChecksumType/></A>"),
        (ProviderRules(checksums=False), b"<A><Size>1</Size></A>"),
        (ProviderRules(ignores_checksums=True), b"<A><Size>1</Size></A>"),
    ],
)
def test_documents_of_a_provider_without_checksums_have_none(rules: ProviderRules, expected: bytes) -> None:
    document = b"<A><ChecksumCRC32>x==</ChecksumCRC32><Size>1</Size><ChecksumType/></A>"
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nX-Amz-Checksum-Type: x\r\n\r\n%b" % (len(document), document)
    with canned_server(whole) as upstream, ProviderProxy(upstream, rules) as proxy:
        reply, content = http_request(proxy, "GET", "/bucket/key?uploadId=u")
    assert content == expected
    assert ("X-Amz-Checksum-Type" in reply.headers) is (expected == document)


def test_checksums_are_ignored(seaweed: SeaweedFS, client_of: ClientOf, s3: Any, bucket: str) -> None:
    class Looking(S3Proxy):
        """Sees what the server gets: SeaweedFS does not check the checksums in a completion."""

        seen = ""

        def edit_document(self, request: S3Request, document: bytes) -> bytes | S3Refusal:
            self.seen += document.decode()
            return document

        def edit(self, request: S3Request) -> Mapping[str, str]:
            self.seen += str(request.headers).lower()
            return request.headers

    with (
        Looking(seaweed.endpoint) as looking,
        ProviderProxy(looking.endpoint, ProviderRules(ignores_checksums=True)) as careless,
    ):
        _upload_with_wrong_checksums(client_of(careless), s3, bucket)
        assert careless.refusals == []
    assert "<PartNumber>" in looking.seen
    assert "checksum" not in looking.seen.lower()


def _upload_with_wrong_checksums(client: Any, s3: Any, bucket: str) -> None:
    wrong = "AAAAAAAAAAA="
    client.put_object(Bucket=bucket, Key="k", Body=CONTENT, ChecksumCRC64NVME=wrong)
    upload = begin(client, bucket, "parts", ChecksumAlgorithm="CRC64NVME", ChecksumType="FULL_OBJECT")
    parts = [
        {
            "PartNumber": 1,
            "ETag": client.upload_part(
                Bucket=bucket, Key="parts", UploadId=upload, PartNumber=1, Body=CONTENT, ChecksumCRC64NVME=wrong
            )["ETag"],
            "ChecksumCRC64NVME": wrong,
        }
    ]
    complete(client, bucket, "parts", upload, parts, ChecksumCRC64NVME=wrong, ChecksumType="FULL_OBJECT")
    for key in ("k", "parts"):
        assert body(s3, bucket, key) == CONTENT
        assert "ChecksumCRC64NVME" not in client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")


def _conditional_writes(client: Any, bucket: str, etag: str) -> list[Callable[[], object]]:
    """Return writes whose conditions do not hold, to objects ``k`` and ``parts``."""
    upload = begin(client, bucket, "parts")
    parts = send(client, bucket, "parts", upload, {1: b"new"})
    return [
        lambda: client.put_object(Bucket=bucket, Key="k", Body=b"new", IfNoneMatch="*"),
        lambda: client.put_object(Bucket=bucket, Key="k", Body=b"new", IfMatch=etag),
        lambda: complete(client, bucket, "parts", upload, parts, IfNoneMatch="*"),
    ]


@pytest.mark.parametrize(
    ("handling", "refusal"), [("yes", (412, "PreconditionFailed")), ("refused", (501, "NotImplemented"))]
)
def test_conditional_writes_that_do_not_hold(
    provider: Callable[..., ProviderProxy],
    client_of: ClientOf,
    s3: Any,
    bucket: str,
    handling: str,
    refusal: tuple[int, str],
) -> None:
    store = provider(conditional_writes=handling)
    client = client_of(store)
    etag = client.put_object(Bucket=bucket, Key="k", Body=b"old")["ETag"]
    client.put_object(Bucket=bucket, Key="parts", Body=b"old")
    attempts = _conditional_writes(client, bucket, '"0123456789abcdef0123456789abcdef"')
    for attempt in attempts:
        with pytest.raises(ClientError) as caught:
            attempt()
        assert code(caught) == refusal
    assert (body(s3, bucket, "k"), body(s3, bucket, "parts")) == (b"old", b"old")
    assert len(store.refusals) == (len(attempts) if handling == "refused" else 0)
    assert body(client, bucket, "k", IfMatch=etag) == b"old"  # reads have conditions everywhere


def test_conditional_deletes_are_refused(
    provider: Callable[..., ProviderProxy], client_of: ClientOf, s3: Any, bucket: str
) -> None:
    client = client_of(provider(conditional_writes="refused"))
    etag = client.put_object(Bucket=bucket, Key="k", Body=b"old")["ETag"]
    with pytest.raises(ClientError) as caught:
        client.delete_object(Bucket=bucket, Key="k", IfMatch=etag)
    assert code(caught) == (501, "NotImplemented")
    assert names(s3, bucket) == ["k"]
    client.delete_object(Bucket=bucket, Key="k")
    assert names(s3, bucket) == []


def test_conditions_are_ignored(
    provider: Callable[..., ProviderProxy], client_of: ClientOf, s3: Any, bucket: str
) -> None:
    store = provider(conditional_writes="ignored")
    client = client_of(store)
    for key in ("k", "parts"):
        client.put_object(Bucket=bucket, Key=key, Body=b"old")
    for attempt in _conditional_writes(client, bucket, '"0123456789abcdef0123456789abcdef"'):
        attempt()
    assert (body(s3, bucket, "k"), body(s3, bucket, "parts")) == (b"new", b"new")
    assert store.refusals == []
    with pytest.raises(ClientError) as caught:
        client.get_object(Bucket=bucket, Key="k", IfMatch='"0123456789abcdef0123456789abcdef"')
    assert code(caught) == (412, "PreconditionFailed")


def test_part_copies_are_refused(
    provider: Callable[..., ProviderProxy], client_of: ClientOf, s3: Any, bucket: str
) -> None:
    store = provider(part_copies=False)
    client = client_of(store)
    client.put_object(Bucket=bucket, Key="source", Body=CONTENT)
    source = {"Bucket": bucket, "Key": "source"}
    upload = begin(client, bucket, "k")
    with pytest.raises(ClientError) as caught:
        client.upload_part_copy(Bucket=bucket, Key="k", UploadId=upload, PartNumber=1, CopySource=source)
    assert code(caught) == (501, "NotImplemented")
    assert len(store.refusals) == 1
    client.copy_object(Bucket=bucket, Key="copy", CopySource=source)
    complete(client, bucket, "k", upload, send(client, bucket, "k", upload, {1: CONTENT}))
    assert names(s3, bucket) == ["copy", "k", "source"]


def test_unfinished_uploads_are_dropped(
    provider: Callable[..., ProviderProxy], client_of: ClientOf, s3: Any, bucket: str
) -> None:
    forgetful = provider(keeps_uploads=False)
    client = client_of(forgetful)
    client.put_object(Bucket=bucket, Key="stays", Body=b"x")
    uploads = {key: begin(client, bucket, key) for key in ("a", "b/ü +")}
    part = send(client, bucket, "a", uploads["a"], {1: b"x"})
    assert forgetful.drop_uploads() == 2
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=bucket)
    assert names(s3, bucket) == ["stays"]
    with pytest.raises(ClientError) as caught:
        send(client, bucket, "a", uploads["a"], {2: b"x"})
    assert code(caught) == (404, "NoSuchUpload")
    with pytest.raises(ClientError) as caught:
        complete(client, bucket, "a", uploads["a"], part)
    assert code(caught) == (404, "NoSuchUpload")
    assert forgetful.drop_uploads() == 0
    with pytest.raises(ValueError, match="keeps"):
        provider().drop_uploads()


def test_opaque_etags(provider: Callable[..., ProviderProxy], client_of: ClientOf, s3: Any, bucket: str) -> None:
    store = provider(opaque_etags=True)
    client = client_of(store)
    md5 = f'"{hashlib.md5(CONTENT).hexdigest()}"'
    reply = client.put_object(Bucket=bucket, Key="k", Body=CONTENT)
    etag = reply["ETag"]
    assert etag != md5
    assert len(etag) == len(md5)
    assert client.put_object(Bucket=bucket, Key="k2", Body=CONTENT)["ETag"] == etag
    listed = client.list_objects_v2(Bucket=bucket)["Contents"]
    found = client.get_object(Bucket=bucket, Key="k", IfMatch=etag)
    assert found["Body"].read() == CONTENT
    assert [entry["ETag"] for entry in (*listed, client.head_object(Bucket=bucket, Key="k"), found)] == [etag] * 4
    assert hashlib.md5(CONTENT).hexdigest() not in str((reply, found, listed))
    assert s3.head_object(Bucket=bucket, Key="k")["ETag"] == md5
    with pytest.raises(ClientError) as caught:
        client.get_object(Bucket=bucket, Key="k", IfMatch=md5)
    assert code(caught) == (412, "PreconditionFailed")
    with pytest.raises(ClientError) as caught:
        client.head_object(Bucket=bucket, Key="k", IfNoneMatch=etag)
    assert code(caught)[0] == 304
    with pytest.raises(ClientError) as caught:
        client.put_object(Bucket=bucket, Key="k", Body=b"", IfNoneMatch="*")
    assert code(caught) == (412, "PreconditionFailed")


def test_opaque_etags_of_parts(
    provider: Callable[..., ProviderProxy], client_of: ClientOf, s3: Any, bucket: str
) -> None:
    client = client_of(provider(opaque_etags=True))
    contents = {1: os.urandom(PART), 2: CONTENT}
    etag = client.put_object(Bucket=bucket, Key="source", Body=CONTENT)["ETag"]
    upload = begin(client, bucket, "k")
    parts = send(client, bucket, "k", upload, contents)
    copied = client.upload_part_copy(
        Bucket=bucket,
        Key="k",
        UploadId=upload,
        PartNumber=2,
        CopySource={"Bucket": bucket, "Key": "source"},
        CopySourceIfMatch=etag,
    )
    assert f'"{copied["CopyPartResult"]["ETag"].strip(chr(34))}"' == parts[1]["ETag"] == etag
    listed = client.list_parts(Bucket=bucket, Key="k", UploadId=upload)["Parts"]
    assert {part["ETag"] for part in listed} == {part["ETag"] for part in parts}
    plain = [{"PartNumber": n, "ETag": f'"{hashlib.md5(content).hexdigest()}"'} for n, content in contents.items()]
    with pytest.raises(ClientError) as caught:
        complete(client, bucket, "k", upload, plain)
    assert code(caught) == (400, "InvalidPart")
    done = complete(client, bucket, "k", upload, parts)
    assert body(s3, bucket, "k") == b"".join(contents.values())
    theirs = s3.head_object(Bucket=bucket, Key="k")["ETag"]
    assert done["ETag"] == client.head_object(Bucket=bucket, Key="k")["ETag"] != theirs
    assert done["ETag"].strip('"').endswith("-2")
    assert body(client, bucket, "k", IfMatch=done["ETag"], Range="bytes=0-4") == contents[1][:5]


# -- faults --------------------------------------------------------------------------------------------


def test_without_a_plan_nothing_happens(faulty: FaultProxy, ill: Any, bucket: str) -> None:
    multipart(ill, bucket, "k", PART, 10)
    ill.put_object(Bucket=bucket, Key="k", Body=CONTENT)
    assert body(ill, bucket, "k") == CONTENT
    assert not faulty.injected


def test_throttling_comes_before_the_work(faulty: FaultProxy, proxy: S3Proxy, ill: Any, s3: Any, bucket: str) -> None:
    faulty.use(FaultPlan(throttle=Fault(limit=2)))
    for _ in range(2):
        with pytest.raises(ClientError) as caught:
            ill.put_object(Bucket=bucket, Key="k", Body=CONTENT)
        assert code(caught) == (503, "SlowDown")
    assert proxy.requests == []
    ill.put_object(Bucket=bucket, Key="k", Body=CONTENT)
    assert body(s3, bucket, "k") == CONTENT
    assert faulty.injected == {"throttle": 2}
    assert faulty.requests == [Served("PUT", "PutObject", len(CONTENT))] * 3


def test_an_error_comes_after_the_work(faulty: FaultProxy, ill: Any, s3: Any, bucket: str) -> None:
    upload = begin(ill, bucket, "parts")
    parts = send(ill, bucket, "parts", upload, {1: CONTENT})
    faulty.use(FaultPlan(error=Fault()))
    with pytest.raises(ClientError) as caught:
        ill.put_object(Bucket=bucket, Key="k", Body=CONTENT)
    assert code(caught) == (500, "InternalError")
    with pytest.raises(ClientError) as caught:
        complete(ill, bucket, "parts", upload, parts)
    assert code(caught) == (500, "InternalError")
    with pytest.raises(ClientError) as caught:
        ill.get_object(Bucket=bucket, Key="k")
    assert code(caught) == (500, "InternalError")
    assert body(s3, bucket, "k") == body(s3, bucket, "parts") == CONTENT
    assert faulty.injected == {"error": 3}


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_a_request_is_reset_in_its_middle(
    faulty: FaultProxy, proxy: S3Proxy, s3: Any, bucket: str, place: float
) -> None:
    content = os.urandom(2 * MIB)
    faulty.use(FaultPlan(reset_request=Fault(place=place)))
    assert_reset(lambda: http_request(faulty, "PUT", f"/{bucket}/k", content))
    assert faulty.injected == {"reset_request": 1}
    faulty.use(FaultPlan())
    assert http_request(faulty, "GET", f"/{bucket}/k")[0].status == 404
    faulty.close()
    proxy.close()  # what was on its way has ended by now
    (sent,) = [served for served in proxy.requests if served.method == "PUT"]
    assert sent.bytes_in <= place * len(content)
    assert sent.bytes_in < len(content)
    assert names(s3, bucket) == []


def test_a_reset_part_is_not_there(faulty: FaultProxy, ill: Any, s3: Any, bucket: str) -> None:
    upload = begin(ill, bucket, "k")
    faulty.use(FaultPlan(reset_request=Fault(limit=1)))
    with pytest.raises(ConnectionClosedError):
        send(ill, bucket, "k", upload, {1: os.urandom(PART)})
    assert "Parts" not in s3.list_parts(Bucket=bucket, Key="k", UploadId=upload)
    assert faulty.injected == {"reset_request": 1}
    send(ill, bucket, "k", upload, {1: b"x"})  # nor is there a limit on going on


@pytest.mark.parametrize("place", [0.0, 0.49, 0.5, 0.99])
def test_a_reply_to_a_write_is_lost(faulty: FaultProxy, s3: Any, bucket: str, place: float) -> None:
    faulty.use(FaultPlan(reset_reply=Fault(place=place)))
    assert_reset(lambda: http_request(faulty, "PUT", f"/{bucket}/k", CONTENT))
    assert body(s3, bucket, "k") == CONTENT
    assert faulty.injected == {"reset_reply": 1}
    assert_reset(lambda: http_request(faulty, "HEAD", f"/{bucket}/k"))
    assert_reset(lambda: http_request(faulty, "DELETE", f"/{bucket}/k"))
    assert names(s3, bucket) == []
    assert faulty.injected == {"reset_reply": 3}


def test_a_reply_to_a_read_is_reset_in_its_middle(faulty: FaultProxy, s3: Any, bucket: str) -> None:
    content = os.urandom(2 * MIB)
    s3.put_object(Bucket=bucket, Key="k", Body=content)
    faulty.use(FaultPlan(reset_reply=Fault(place=0.75)))
    connection = http.client.HTTPConnection("127.0.0.1", faulty.port, timeout=60)
    connection.request("GET", f"/{bucket}/k")
    reply = connection.getresponse()
    assert (reply.status, reply.length) == (200, len(content))
    received = 0

    def read() -> None:
        nonlocal received
        while piece := reply.read1(PIECE):
            assert piece == content[received : received + len(piece)]
            received += len(piece)

    assert_reset(read)
    reply.close()
    connection.close()
    assert received <= len(content) // 2
    assert faulty.injected == {"reset_reply": 1}


def test_a_reply_is_too_short(faulty: FaultProxy, ill: Any, s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=CONTENT)
    faulty.use(FaultPlan(truncate=Fault(place=0.5)))
    with pytest.raises(http.client.IncompleteRead) as caught:
        http_request(faulty, "GET", f"/{bucket}/k")
    assert caught.value.partial == CONTENT[: len(CONTENT) // 2]
    assert caught.value.expected == len(CONTENT) - len(CONTENT) // 2
    with pytest.raises(Exception, match=r"IncompleteRead|Connection broken"):
        body(ill, bucket, "k")
    http_request(faulty, "PUT", f"/{bucket}/k", b"writes are not meant")
    assert faulty.injected == {"truncate": 2}
    faulty.use(FaultPlan())
    assert body(ill, bucket, "k") == b"writes are not meant"


@pytest.mark.unit
def test_a_reply_in_chunks_is_too_short() -> None:
    plan = FaultPlan(truncate=Fault(place=0.5, limit=1))
    with canned_server(CHUNKED + b"0\r\n\r\n") as upstream, FaultProxy(upstream, plan) as faulty:
        with pytest.raises(http.client.IncompleteRead) as caught:
            http_request(faulty, "GET", "/bucket/key")
        assert caught.value.partial == b"hello"
        assert faulty.injected == {"truncate": 1}
        assert http_request(faulty, "GET", "/bucket/key")[1] == b"hello world"


def test_a_stall_in_the_request(faulty: FaultProxy, s3: Any, bucket: str) -> None:
    faulty.use(FaultPlan(stall=Fault(place=0.25), stall_seconds=0.2))
    begun = time.monotonic()
    assert_reset(lambda: http_request(faulty, "PUT", f"/{bucket}/k", CONTENT))
    assert time.monotonic() - begun >= 0.2
    assert names(s3, bucket) == []
    assert faulty.injected == {"stall": 1}


def test_a_stall_in_the_reply(faulty: FaultProxy, s3: Any, bucket: str) -> None:
    faulty.use(FaultPlan(stall=Fault(place=0.75), stall_seconds=0.2))
    for method, content in (("PUT", CONTENT), ("GET", None), ("HEAD", None)):
        begun = time.monotonic()
        assert_reset(lambda m=method, c=content: http_request(faulty, m, f"/{bucket}/k", c))  # type: ignore[misc]
        assert time.monotonic() - begun >= 0.2
    assert body(s3, bucket, "k") == CONTENT
    assert faulty.injected == {"stall": 3}


@pytest.mark.parametrize("place", [0.25, 0.75])
def test_a_client_gives_up_on_a_stall_and_nobody_waits_for_its_end(
    proxy: S3Proxy, client_of: ClientOf, bucket: str, place: float
) -> None:
    reached = threading.Event()

    class Telling(FaultProxy):
        def pause(self, seconds: float) -> None:
            reached.set()
            super().pause(seconds)

    with Telling(proxy.endpoint, FaultPlan(stall=Fault(place=place), stall_seconds=3600)) as faulty:
        impatient = client_of(faulty, read_timeout=0.2)
        with pytest.raises(ReadTimeoutError):
            impatient.put_object(Bucket=bucket, Key="k", Body=CONTENT)
        assert reached.wait(60)
        assert faulty.injected == {"stall": 1}
        begun = time.monotonic()
    assert time.monotonic() - begun < 60


def test_a_byte_of_a_request_is_changed(faulty: FaultProxy, ill: Any, s3: Any, bucket: str) -> None:
    content = os.urandom(2 * PIECE)
    faulty.use(FaultPlan(corrupt_request=Fault(place=0.5)))
    ill.put_object(Bucket=bucket, Key="k", Body=content)
    stored = body(s3, bucket, "k")
    assert [i for i, (a, b) in enumerate(zip(content, stored, strict=True)) if a != b] == [PIECE]
    upload = begin(ill, bucket, "k")
    parts = send(ill, bucket, "k", upload, {1: content})
    assert parts[0]["ETag"] == f'"{hashlib.md5(stored).hexdigest()}"'
    complete(ill, bucket, "k", upload, parts)  # a document: not data
    assert body(ill, bucket, "k") == stored
    assert faulty.injected == {"corrupt_request": 2}


def test_a_server_that_checks_refuses_a_changed_byte(faulty: FaultProxy, ill: Any, s3: Any, bucket: str) -> None:
    faulty.use(FaultPlan(corrupt_request=Fault()))
    checks = (
        {"ChecksumCRC64NVME": encode_crc64nvme(crc64nvme(CONTENT))},
        {"ContentMD5": base64.b64encode(hashlib.md5(CONTENT).digest()).decode()},
    )
    for check in checks:
        with pytest.raises(ClientError) as caught:
            ill.put_object(Bucket=bucket, Key="k", Body=CONTENT, **check)
        assert code(caught)[0] == 400
    assert names(s3, bucket) == []
    assert faulty.injected == {"corrupt_request": 2}


def test_a_byte_of_a_reply_is_changed(faulty: FaultProxy, ill: Any, s3: Any, bucket: str) -> None:
    content = os.urandom(MIB)
    s3.put_object(Bucket=bucket, Key="k", Body=content)
    s3.put_object(Bucket=bucket, Key="empty", Body=b"")
    faulty.use(FaultPlan(seed=7, corrupt_reply=Fault(limit=1)))
    # None of these has data to damage, or counts.
    assert body(ill, bucket, "empty") == b""
    with pytest.raises(ClientError):
        ill.get_object(Bucket=bucket, Key="nothing")
    with pytest.raises(ClientError):
        ill.get_object(Bucket=bucket, Key="k", IfNoneMatch=s3.head_object(Bucket=bucket, Key="k")["ETag"])
    assert names(ill, bucket) == ["empty", "k"]
    assert not faulty.injected
    damaged = body(ill, bucket, "k", Range="bytes=100-")
    differences = [a ^ b for a, b in zip(content[100:], damaged, strict=True) if a != b]
    assert len(differences) == 1
    assert differences[0].bit_count() == 1
    assert faulty.injected == {"corrupt_reply": 1}
    assert body(ill, bucket, "k") == content


def test_slow_bodies_arrive_whole(faulty: FaultProxy, ill: Any, s3: Any, bucket: str) -> None:
    faulty.use(FaultPlan(slow=Fault(), slow_pieces=5, slow_bytes=100, slow_pause=0.02))
    begun = time.monotonic()
    ill.put_object(Bucket=bucket, Key="k", Body=CONTENT)
    assert time.monotonic() - begun >= 5 * 0.02
    assert body(s3, bucket, "k") == CONTENT
    begun = time.monotonic()
    assert body(ill, bucket, "k") == CONTENT
    assert time.monotonic() - begun >= 5 * 0.02
    ill.put_object(Bucket=bucket, Key="short", Body=b"x" * 150)
    assert body(s3, bucket, "short") == b"x" * 150
    assert faulty.injected == {"slow": 3}


def test_slow_bodies_begin_in_small_pieces(faulty: FaultProxy, s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=CONTENT)
    faulty.use(FaultPlan(slow=Fault(), slow_pieces=3, slow_bytes=10, slow_pause=0))
    request = parse_request("GET", f"/{bucket}/k", {})
    assert faulty.refuse(request, 0) is None
    pieces = list(faulty.reply_body(request, 200, len(CONTENT), iter([CONTENT[:25], CONTENT[25:]])))
    assert [len(piece) for piece in pieces] == [10, 10, 5, len(CONTENT) - 25]
    assert b"".join(pieces) == CONTENT


def test_an_outage_breaks_old_connections_and_new_ones(
    faulty: FaultProxy, proxy: S3Proxy, ill: Any, bucket: str
) -> None:
    ill.put_object(Bucket=bucket, Key="k", Body=CONTENT)
    passed = len(proxy.requests)
    with socket.create_connection(("127.0.0.1", faulty.port), timeout=60) as idle:
        idle.sendall(f"HEAD /{bucket}/k HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert idle.recv(4096).startswith(b"HTTP/1.1 200")
        faulty.outage(True)
        try:
            rest = idle.recv(1)
        except ConnectionResetError:
            rest = b""
        assert rest == b""
    broken = faulty.injected["outage"]
    assert broken >= 1
    for attempt in range(1, 4):
        assert_reset(lambda: http_request(faulty, "HEAD", f"/{bucket}/k"))
        assert faulty.injected["outage"] >= broken + attempt
    with pytest.raises((ConnectionClosedError, EndpointConnectionError)):
        ill.head_object(Bucket=bucket, Key="k")
    assert len(proxy.requests) == passed + 1
    faulty.outage(False)
    assert body(ill, bucket, "k") == CONTENT


def test_an_outage_breaks_a_request_under_way(faulty: FaultProxy, s3: Any, bucket: str) -> None:
    with socket.create_connection(("127.0.0.1", faulty.port), timeout=60) as client:
        client.sendall(f"PUT /{bucket}/k HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf".encode())
        client.sendall(b"")
        with socket.create_connection(("127.0.0.1", faulty.port), timeout=60) as other:
            # Connections are taken in order: when this one is served, that one was taken.
            other.sendall(f"HEAD /{bucket}/k HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert other.recv(4096).startswith(b"HTTP/1.1 404")
            faulty.outage(True)
        try:
            rest = client.recv(100)
        except ConnectionResetError:
            rest = b""
        assert rest == b""
    assert names(s3, bucket) == []
    assert faulty.injected["outage"] == 2


def test_faults_hit_only_what_they_may(faulty: FaultProxy, ill: Any, bucket: str) -> None:
    faulty.use(
        FaultPlan(
            only=lambda request: request.key.startswith("meant/"),
            throttle=Fault(only=lambda request: request.operation == "PutObject"),
            error=Fault(only=lambda request: request.operation == "HeadObject"),
        )
    )
    ill.put_object(Bucket=bucket, Key="other", Body=b"x")
    ill.head_object(Bucket=bucket, Key="other")
    ill.delete_object(Bucket=bucket, Key="meant/k")
    assert not faulty.injected
    with pytest.raises(ClientError) as caught:
        ill.put_object(Bucket=bucket, Key="meant/k", Body=b"x")
    assert code(caught)[0] == 503
    with pytest.raises(ClientError) as caught:
        ill.head_object(Bucket=bucket, Key="meant/k")
    assert code(caught)[0] == 500
    assert faulty.injected == {"throttle": 1, "error": 1}


@pytest.mark.unit
def test_the_same_seed_draws_the_same_faults() -> None:
    requests = [
        parse_request("PUT", f"/bucket/{i}", {}) if i % 2 else parse_request("GET", f"/bucket/{i}", {})
        for i in range(500)
    ]

    plan: dict[str, Any] = {kind: Fault(probability=0.1) for kind in KINDS}

    def drawn(seed: int) -> list[tuple[str, float] | None]:
        # Not started: what it draws is all that is asked.
        faulty = FaultProxy("http://127.0.0.1:1", FaultPlan(seed=seed, **plan))
        found = [faulty._draw(request, 100 if request.method == "PUT" else 0) for request in requests]
        return [(hit.kind, hit.place) if hit is not None else None for hit in found]

    first = drawn(1)
    assert first == drawn(1)
    assert first != drawn(2)
    assert {hit[0] for hit in first if hit is not None} == set(KINDS)
    assert all(0 <= hit[1] < 1 for hit in first if hit is not None)
    assert 100 < first.count(None) < 400
    reads = {hit[0] for request, hit in zip(requests, first, strict=True) if hit and request.method == "GET"}
    assert reads.isdisjoint({"reset_request", "corrupt_request"})


@pytest.mark.unit
def test_bursts_and_limits() -> None:
    request = parse_request("HEAD", "/bucket/key", {})

    def hits(fault: Fault, count: int) -> list[bool]:
        faulty = FaultProxy("http://127.0.0.1:1", FaultPlan(seed=3, throttle=fault))
        return [faulty.refuse(request, 0) is not None for _ in range(count)]

    assert hits(Fault(limit=2), 4) == [True, True, False, False]
    assert hits(Fault(probability=0), 50) == [False] * 50
    runs = [len(list(run)) for hit, run in itertools.groupby(hits(Fault(probability=0.05, burst=4), 400)[:-4]) if hit]
    assert runs
    assert all(run % 4 == 0 for run in runs[:-1])


def test_everything_at_once_ends_well(faulty: FaultProxy, client_of: ClientOf, bucket: str) -> None:
    """A client that tries again gets everything through; nothing is left of it all but the counts."""
    client = client_of(faulty, retries={"total_max_attempts": 30, "mode": "standard"}, max_pool_connections=8)
    plan: dict[str, Any] = {kind: Fault(probability=0.03) for kind in KINDS if not kind.startswith("corrupt")}
    faulty.use(FaultPlan(seed=5, stall_seconds=0.01, **plan))

    def put(number: int) -> None:
        for _ in range(50):
            try:
                client.put_object(Bucket=bucket, Key=f"{number}", Body=CONTENT * (number % 7))
                return
            except (ClientError, ConnectionClosedError):
                pass
        raise AssertionError(number)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(put, range(150)))
    assert faulty.injected.total() >= 5
    faulty.use(FaultPlan())
    for number in range(150):
        assert body(client, bucket, str(number)) == CONTENT * (number % 7)
