"""A proxy between an S3 client and a real S3 server, on a free port of the loopback, in threads of this process.

Each request is signed anew for the server, with the payload left out of the signature, so that a subclass may
take away or change headers and bodies on the way. What the client signed is not checked. Nothing else changes:
names and queries travel as the bytes that came, bodies in pieces of at most ``PIECE``.

A request is handled by one thread from beginning to end, in this order of hooks:

1. ``refuse``: answer instead of the server; the request's body is read and thrown away.
2. ``edit_document``: change, or refuse, the XML of a completion.
3. ``edit``: the headers to send.
4. ``request_body``: the body on its way to the server.
5. ``observe``: look at the server's reply.
6. ``answer``: answer instead of the server, after it did the work.
7. ``edit_reply``, ``reply_document``: change the reply's headers, its XML.
8. ``reply_body``: the body on its way to the client; one that ends early is sent as a connection that broke.

A hook that raises ``BreakConnection`` resets the client's connection there and then. Any other exception of a
hook resets it too, and is raised again by the end of the ``with`` block.

Not supported: bodies in frames (``aws-chunked``), which SDKs send only over TLS; they get 501.
"""

from __future__ import annotations

import http.client
import http.server
import itertools
import select
import socket
import socketserver
import struct
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from email.message import Message
from typing import Any, Final, Literal, NamedTuple, Self, TypeAlias
from urllib.parse import parse_qsl, quote, unquote_to_bytes, urlsplit
from xml.sax.saxutils import escape

import msgspec
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from backhaul.testing.servers import ACCESS_KEY, SECRET_KEY

PIECE: Final = 256 << 10
_JOIN_TIMEOUT = 30.0
_ASK_TIMEOUT = 20.0
# SO_LINGER on with no time: close() sends RST, and throws away what was not sent.
_LINGER_RESET = struct.pack("ii", 1, 0)

Operation: TypeAlias = Literal[
    "PutObject",
    "GetObject",
    "HeadObject",
    "DeleteObject",
    "CreateMultipartUpload",
    "UploadPart",
    "UploadPartCopy",
    "CompleteMultipartUpload",
    "AbortMultipartUpload",
    "ListParts",
    "ListObjectsV2",
    "ListMultipartUploads",
    "CopyObject",
    "Other",
]

# Those whose successful reply is an XML document, not data.
_DOCUMENTS: Final = frozenset(
    {
        "CreateMultipartUpload",
        "UploadPartCopy",
        "CompleteMultipartUpload",
        "ListParts",
        "ListObjectsV2",
        "ListMultipartUploads",
        "CopyObject",
    }
)
# Parts of an object's name space that are not the object: tags, access lists.
_SUBRESOURCES: Final = frozenset(
    {"acl", "attributes", "legal-hold", "object-lock", "restore", "retention", "select", "tagging", "torrent"}
)
# Of one connection only (RFC 9110, 7.6.1), or made anew for the server.
_HOP_BY_HOP: Final = frozenset(
    {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
)
_MADE_ANEW: Final = frozenset(
    {"authorization", "content-length", "date", "expect", "host", "x-amz-content-sha256", "x-amz-date"}
)


class S3Request(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asked for. Names of headers are in lower case; a query's names without a value have ``""``."""

    method: str
    bucket: str
    key: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    operation: Operation


class S3Refusal(msgspec.Struct, frozen=True):
    """An error to answer with: HTTP's status, S3's code, and words."""

    status: int
    code: str
    message: str


class Served(NamedTuple):
    """A request that came, and how many bytes of its body were read."""

    method: str
    operation: Operation
    bytes_in: int


class Asked(NamedTuple):
    """The server's answer to a question of the proxy itself."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class BreakConnection(Exception):  # noqa: N818 (an order, not an error)
    """Raised by a hook: reset the client's connection, and give up the request to the server."""


def parse_request(method: str, target: str, headers: Mapping[str, str]) -> S3Request:
    """Return what a request with a path-style target asks for.

    Args:
        method: HTTP's.
        target: path and query, as on the request's first line.
        headers: with names in lower case.
    """
    path, _, raw_query = target.partition("?")
    bucket, _, key = path.removeprefix("/").partition("/")
    query = dict(parse_qsl(raw_query, keep_blank_values=True))
    return S3Request(
        method=method,
        bucket=_unquote(bucket),
        key=_unquote(key),
        query=query,
        headers=headers,
        operation=_operation(method, key, query, headers),
    )


def _unquote(text: str) -> str:
    return unquote_to_bytes(text).decode("utf-8", "surrogateescape")


def _operation(method: str, key: str, query: Mapping[str, str], headers: Mapping[str, str]) -> Operation:
    if not key:
        if method == "GET" and "uploads" in query:
            return "ListMultipartUploads"
        return "ListObjectsV2" if method == "GET" and query.get("list-type") == "2" else "Other"
    if not _SUBRESOURCES.isdisjoint(query):
        return "Other"
    copying = "x-amz-copy-source" in headers
    uploading = "uploadId" in query
    match method:
        case "PUT" if uploading:
            return "UploadPartCopy" if copying else "UploadPart"
        case "PUT":
            return "CopyObject" if copying else "PutObject"
        case "POST" if "uploads" in query:
            return "CreateMultipartUpload"
        case "POST" if uploading:
            return "CompleteMultipartUpload"
        case "GET":
            return "ListParts" if uploading else "GetObject"
        case "HEAD":
            return "HeadObject"
        case "DELETE":
            return "AbortMultipartUpload" if uploading else "DeleteObject"
        case _:
            return "Other"


class S3Proxy:
    """Passes everything on, and counts it. Subclasses change what passes, in the hooks that the module names.

    The upstream endpoint may be another proxy.
    """

    rewrites_replies = False
    """Whether ``reply_document`` is to be asked: replies in XML are then held in memory whole."""

    def __init__(
        self,
        upstream: str,
        *,
        access_key: str = ACCESS_KEY,
        secret_key: str = SECRET_KEY,
        region: str = "us-east-1",
    ) -> None:
        self.upstream = upstream
        self.port = 0
        self.requests: list[Served] = []
        self.failures: list[BaseException] = []
        self._signer = _Signer(Credentials(access_key, secret_key), "s3", region)
        self._server: _Server | None = None
        self._accepting: threading.Thread | None = None
        self._closing = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close()
        if self.failures and error is None:
            raise self.failures[0]

    @property
    def endpoint(self) -> str:
        """The URL for clients."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def closing(self) -> bool:
        """Whether the end has begun."""
        return self._closing.is_set()

    def start(self) -> None:
        """Listen, on a free port."""
        self._server = _Server(self)
        self.port = self._server.server_address[1]
        self._accepting = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, name="s3-proxy", daemon=True
        )
        self._accepting.start()

    def close(self) -> None:
        """Break every connection, and wait for every thread to end."""
        server, self._server = self._server, None
        if server is None:
            return
        assert self._accepting is not None
        self._closing.set()
        server.shutdown()
        self._accepting.join()
        server.break_connections()
        server.server_close()

    def count(self, operation: Operation) -> int:
        """Return how many requests of an operation came."""
        return sum(served.operation == operation for served in list(self.requests))

    def ask(self, method: str, bucket: str, key: str = "", query: Mapping[str, str] | None = None) -> Asked:
        """Put a question of the proxy's own to the server, on a connection of its own.

        Raises:
            OSError: the server is away.
            http.client.HTTPException: its answer broke off.
        """
        target = "/" + quote(bucket, safe="")
        if key:
            target += "/" + quote(key.encode("utf-8", "surrogateescape"), safe="/~")
        if query:
            target += "?" + "&".join(f"{quote(n, safe='~')}={quote(v, safe='~')}" for n, v in query.items())
        connection = self.connect(_ASK_TIMEOUT)
        try:
            self.send_head(connection, method, target, {}, 0)
            reply = connection.getresponse()
            return Asked(reply.status, {n.lower(): v for n, v in reply.getheaders()}, reply.read())
        finally:
            connection.close()

    # -- hooks -----------------------------------------------------------------------------------------

    def accepts(self) -> bool:
        """Tell whether to take a new connection; one that is not taken is reset."""
        return True

    def refuse(self, request: S3Request, body_length: int) -> S3Refusal | None:
        """Return an error to answer with at once; the server never hears of the request."""
        return None

    def edit_document(self, request: S3Request, document: bytes) -> bytes | S3Refusal:
        """Return the XML of a CompleteMultipartUpload as it is to be sent, or an error to answer with."""
        return document

    def edit(self, request: S3Request) -> Mapping[str, str]:
        """Return the headers to send; those of the connection, of the signature and the length are not asked."""
        return request.headers

    def request_body(self, request: S3Request, length: int, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """Pass on a body, of the same length. Not asked where there is none."""
        return pieces

    def answer(self, request: S3Request, status: int, headers: Mapping[str, str]) -> S3Refusal | None:
        """Return an error to answer with although the server did the work."""
        return None

    def observe(self, request: S3Request, status: int, headers: Mapping[str, str]) -> None:
        """Look at the server's reply, before the client can."""

    def edit_reply(self, request: S3Request, status: int, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Return the reply's headers for the client."""
        return headers

    def reply_document(self, request: S3Request, status: int, document: bytes) -> bytes:
        """Return a reply's XML for the client; asked if ``rewrites_replies``."""
        return document

    def reply_body(
        self, request: S3Request, status: int, length: int | None, pieces: Iterator[bytes]
    ) -> Iterator[bytes]:
        """Pass on a reply's body. Not asked for replies that never have one, as those to HEAD.

        Args:
            request: what was asked.
            status: the reply's.
            length: its Content-Length; None if it comes in chunks.
            pieces: as the server sends it.
        """
        return pieces

    # -- for subclasses --------------------------------------------------------------------------------

    def pause(self, seconds: float) -> None:
        """Wait, but no longer than until the proxy is closed."""
        self._closing.wait(seconds)

    def break_connections(self) -> int:
        """Reset every open connection; return how many there were."""
        return self._server.break_connections() if self._server is not None else 0

    def wait_for_handlers(self, timeout: float = 30.0) -> None:
        """Wait until what a client has left behind is served to its end, and counted.

        Raises:
            TimeoutError: it is not, after so many seconds.
        """
        if self._server is not None:
            self._server.join_workers(timeout)

    # -- for the handler -------------------------------------------------------------------------------

    def connect(self, timeout: float | None = None) -> http.client.HTTPConnection:
        """Return a new connection to the server; without a timeout, the client's patience decides."""
        split = urlsplit(self.upstream)
        assert split.hostname is not None
        connection = http.client.HTTPConnection(split.hostname, split.port, timeout=timeout)
        connection.connect()
        return connection

    def send_head(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        target: str,
        headers: Mapping[str, str],
        length: int | None,
    ) -> None:
        """Sign a request and send all of it but the body.

        Args:
            connection: to the server.
            method: HTTP's.
            target: path and query, sent as they are.
            headers: without those that are made here.
            length: the body's; None for a request without Content-Length.
        """
        kept = {name: value for name, value in headers.items() if name not in _HOP_BY_HOP | _MADE_ANEW}
        signed = AWSRequest(method=method, url=self.upstream + _canonical(target), headers=kept)
        self._signer.add_auth(signed)
        connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        connection.putheader("Host", urlsplit(self.upstream).netloc)
        for name, value in signed.headers.items():
            connection.putheader(name, value)
        if length is not None:
            connection.putheader("Content-Length", str(length))
        connection.endheaders()


class _Signer(S3SigV4Auth):
    def payload(self, request: Any) -> str:
        # Bodies pass in pieces, and may be changed on the way: there is nothing to hash beforehand.
        return "UNSIGNED-PAYLOAD"


def _canonical(target: str) -> str:
    """Return a target as the server will spell it when it checks the signature (which botocore takes as it is)."""
    path, _, query = target.partition("?")
    fields = (
        "=".join(quote(unquote_to_bytes(half.replace("+", " ")), safe="~") for half in (name, value))
        for name, _, value in (field.partition("=") for field in query.split("&") if field)
    )
    return quote(unquote_to_bytes(path), safe="/~") + ("?" + "&".join(fields) if query else "")


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    request_queue_size = 128

    def __init__(self, proxy: S3Proxy) -> None:
        self.proxy = proxy
        self._lock = threading.Lock()
        self._workers: list[threading.Thread] = []
        self._open: set[_Handler] = set()
        self._ending = False
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        # Daemons, so that a proxy that nobody closed keeps no process alive; the mix-in joins no daemons.
        worker = threading.Thread(
            target=self.process_request_thread, args=(request, client_address), name="s3-proxy-worker", daemon=True
        )
        self._workers = [thread for thread in self._workers if thread.is_alive()]
        worker.start()
        self._workers.append(worker)

    def server_close(self) -> None:
        super().server_close()
        for worker in self._workers:
            worker.join(_JOIN_TIMEOUT)
            if worker.is_alive():
                raise RuntimeError(f"{worker.name} still runs {_JOIN_TIMEOUT:.0f} seconds after the end")

    def join_workers(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        for worker in list(self._workers):
            worker.join(max(0.0, deadline - time.monotonic()))
            if worker.is_alive():
                raise TimeoutError(f"{worker.name} still serves after {timeout:.0f} seconds")

    def verify_request(self, request: Any, client_address: Any) -> bool:
        if self.proxy.accepts():
            return True
        reset_on_close(request)
        return False

    def shutdown_request(self, request: Any) -> None:
        try:
            reset = request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, len(_LINGER_RESET)) == _LINGER_RESET
        except OSError:
            reset = False
        if reset:
            self.close_request(request)  # no shutdown() before: that would send FIN
        else:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if error is not None and not isinstance(error, OSError):
            self.proxy.failures.append(error)

    def register(self, handler: _Handler) -> None:
        with self._lock:
            self._open.add(handler)
            if self._ending or not self.proxy.accepts():
                handler.break_off()

    def unregister(self, handler: _Handler) -> None:
        with self._lock:
            self._open.discard(handler)

    def break_connections(self) -> int:
        with self._lock:
            # From here on threads that were started, but have not come to register, break off by themselves.
            self._ending = self.proxy.closing
            for handler in self._open:
                handler.break_off()
            return len(self._open)


def reset_on_close(connection: socket.socket) -> None:
    """Make the socket's close() send RST, and throw away what was not sent."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)


class _Handler(http.server.BaseHTTPRequestHandler):
    """One client's connection, with a connection to the server of its own."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self._to_server: http.client.HTTPConnection | None = None
        self._socket_to_server: socket.socket | None = None
        self._left = 0
        self.server.register(self)

    def finish(self) -> None:
        # First out of reach of other threads: a closed socket's number may soon be another's.
        self.server.unregister(self)
        self._drop_server()
        super().finish()

    def break_off(self) -> None:
        """Wake this handler's thread, wherever it waits, to find its sockets dead. Called by other threads."""
        for connection in (self.connection, self._socket_to_server):
            if connection is None:
                continue
            try:
                reset_on_close(connection)
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # dead already

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        pass

    def do_GET(self) -> None:
        """Handle a request, of any method."""
        proxy = self.server.proxy
        request = parse_request(self.command, self.path, {n.lower(): _joined(self.headers, n) for n in self.headers})
        declared = request.headers.get("content-length")
        length = self._left = int(declared or 0)
        self._request, self._counted = request, False
        try:
            self._exchange(proxy, length, has_length=declared is not None)
        except (BreakConnection, OSError, http.client.HTTPException):
            self._reset()  # as ordered; or the client, or the server, is gone
        except Exception:
            self._reset()
            raise
        finally:
            self._count(length)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815 (the base class looks for these)

    def _exchange(self, proxy: S3Proxy, length: int, *, has_length: bool) -> None:
        request = self._request
        refusal = proxy.refuse(request, length) or self._unsupported()
        if refusal is not None:
            self._refuse(refusal, length)
            return
        pieces = self._received()
        if request.operation == "CompleteMultipartUpload":
            document = proxy.edit_document(request, b"".join(pieces))
            if isinstance(document, S3Refusal):
                self._refuse(document, length)
                return
            pieces, body_length = iter([document]), len(document)
        else:
            body_length = length
        reply = self._forward(proxy, pieces, body_length if has_length else None)
        self._count(length)
        names = {name.lower(): name for name, _ in reply.getheaders()}
        headers: Mapping[str, str] = {n: _joined(reply.headers, n) for n in names if n not in _HOP_BY_HOP}
        proxy.observe(request, reply.status, headers)
        refusal = proxy.answer(request, reply.status, headers)
        if refusal is not None:
            self._drop_server()  # its reply is still in that connection
            self._refuse(refusal, length)
            return
        headers = dict(proxy.edit_reply(request, reply.status, headers))
        # A client gets the server's own spelling: the names of metadata are in the names of headers.
        self._pass_back(proxy, reply, {names.get(name, name): value for name, value in headers.items()})

    def _unsupported(self) -> S3Refusal | None:
        headers = self._request.headers
        if "transfer-encoding" in headers:
            self.close_connection = True  # where the body ends is not known here
            return S3Refusal(411, "MissingContentLength", "You must provide the Content-Length HTTP header.")
        if headers.get("x-amz-content-sha256", "").startswith("STREAMING-"):
            return S3Refusal(501, "NotImplemented", "This proxy does not take bodies in aws-chunked frames.")
        return None

    def _received(self) -> Iterator[bytes]:
        while self._left:
            piece = self.rfile.read1(min(PIECE, self._left))
            if not piece:
                raise ConnectionResetError("the client broke off")
            self._left -= len(piece)
            yield piece

    def _forward(self, proxy: S3Proxy, pieces: Iterator[bytes], length: int | None) -> http.client.HTTPResponse:
        request = self._request
        passed = proxy.request_body(request, length, pieces) if length else iter(())
        # SeaweedFS stores an empty object, or part, when a connection ends between head and body, whatever length
        # was announced. No server should see that because of a proxy: there is no head without some of the body.
        first = next(passed, b"")
        connection = self._server_connection(proxy)
        proxy.send_head(connection, request.method, self.path, proxy.edit(request), length)
        listening = True
        for piece in itertools.chain([first], passed):
            if not listening:
                continue
            try:
                connection.send(piece)
            except OSError:
                # A server that refuses may answer before it has the body, and hang up: the answer is still there.
                listening = False
        reply = connection.getresponse()
        if reply.length is None and not reply.chunked:
            raise http.client.IncompleteRead(b"")  # the head broke off: every reply says how long it is
        if not listening:
            reply.will_close = True
        return reply

    def _pass_back(self, proxy: S3Proxy, reply: http.client.HTTPResponse, headers: dict[str, str]) -> None:
        request = self._request
        if request.method == "HEAD" or reply.status in (204, 304):
            self._begin_reply(reply.status, reply.reason, headers)
            reply.read()
        else:
            length = None if reply.chunked else reply.length
            pieces = _sent(reply)
            if proxy.rewrites_replies and request.operation in _DOCUMENTS:
                document = proxy.reply_document(request, reply.status, b"".join(pieces))
                pieces, length = iter([document]), len(document)
            self._send_body(proxy, reply, headers, length, pieces)
        if reply.length == 0:
            reply.close()
        if reply.will_close or not reply.isclosed():
            self._drop_server()

    def _send_body(
        self,
        proxy: S3Proxy,
        reply: http.client.HTTPResponse,
        headers: dict[str, str],
        length: int | None,
        pieces: Iterator[bytes],
    ) -> None:
        framing = {"Transfer-Encoding": "chunked"} if length is None else {"Content-Length": str(length)}
        others = {name: value for name, value in headers.items() if name.lower() != "content-length"}
        self._begin_reply(reply.status, reply.reason, others | framing)
        watched = _Watched(pieces)
        sent = 0
        for piece in proxy.reply_body(self._request, reply.status, length, watched):
            if piece:
                self.wfile.write(piece if length is not None else b"%x\r\n%b\r\n" % (len(piece), piece))
                sent += len(piece)
        if sent != length if length is not None else not watched.ended or sent != watched.count:
            self.close_connection = True  # the server broke off, or a hook did: so must we
        elif length is None:
            self.wfile.write(b"0\r\n\r\n")

    def _refuse(self, refusal: S3Refusal, length: int) -> None:
        for _ in self._received():
            pass
        self._count(length)
        request = self._request
        body = (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f"<Error><Code>{escape(refusal.code)}</Code><Message>{escape(refusal.message)}</Message>"
            f"<Resource>{escape(self.path)}</Resource><RequestId>proxy</RequestId></Error>"
        ).encode()
        reason = http.client.responses.get(refusal.status, "")
        self._begin_reply(refusal.status, reason, {"Content-Type": "application/xml", "Content-Length": str(len(body))})
        if request.method != "HEAD":
            self.wfile.write(body)

    def _begin_reply(self, status: int, reason: str, headers: Mapping[str, str]) -> None:
        self.send_response_only(status, reason)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def _server_connection(self, proxy: S3Proxy) -> http.client.HTTPConnection:
        if self._socket_to_server is not None and _readable(self._socket_to_server):
            self._drop_server()  # a server may hang up between requests
        if self._to_server is None:
            self._to_server = proxy.connect()
            self._socket_to_server = self._to_server.sock
            if proxy.closing:
                raise BreakConnection  # whoever closes did not see this socket
        return self._to_server

    def _drop_server(self) -> None:
        connection, self._to_server, self._socket_to_server = self._to_server, None, None
        if connection is not None:
            connection.close()

    def _count(self, length: int) -> None:
        # Before the client has its reply, so that it is there for whoever looks after it.
        if not self._counted:
            self._counted = True
            served = Served(self._request.method, self._request.operation, length - self._left)
            self.server.proxy.requests.append(served)

    def _reset(self) -> None:
        self.close_connection = True
        self._drop_server()
        try:
            reset_on_close(self.connection)
        except OSError:
            pass  # dead already


class _Watched:
    """An iterator that knows whether it was read to its end, and how many bytes it gave."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self.ended = False
        self.count = 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            piece = next(self._pieces)
        except StopIteration:
            self.ended = True
            raise
        self.count += len(piece)
        return piece


def _sent(reply: http.client.HTTPResponse) -> Iterator[bytes]:
    while piece := reply.read1(PIECE):
        yield piece
    if reply.length:
        raise http.client.IncompleteRead(b"", reply.length)


def _readable(connection: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))


def _joined(headers: Message[str, str], name: str) -> str:
    return ", ".join(headers.get_all(name, []))
