"""An S3 server that costs next to nothing: it answers what uploaders ask and throws the bytes away.

Bodies are discarded inside the kernel (``MSG_TRUNC`` on a TCP socket copies nothing), so what remains of a
run's time is the client's own. It keeps sizes, so that clients which look afterwards are content.

    python -m bench.null_s3 PORT
"""

from __future__ import annotations

import re
import socket
import socketserver
import sys
import threading
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

_DISCARD = 1 << 20
_SMALL = 64 << 10  # objects that a client may read again: claims and manifests
_UNTOUCHED = bytearray(_DISCARD)  # asked for, never written to
_ETAG = '"00000000000000000000000000000000"'


class Handler(socketserver.StreamRequestHandler):
    """One connection: requests until it closes."""

    rbufsize = 64 << 10
    sizes: ClassVar[dict[str, int]] = {}
    uploads: ClassVar[dict[str, dict[int, int]]] = {}
    small: ClassVar[dict[str, bytes]] = {}
    lock = threading.Lock()

    def handle(self) -> None:
        """Answer requests."""
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while line := self.rfile.readline():
            method, target, _ = line.decode("latin-1").split(" ", 2)
            headers: dict[str, str] = {}
            while (header := self.rfile.readline()) not in (b"\r\n", b""):
                name, _, value = header.decode("latin-1").partition(":")
                headers[name.strip().lower()] = value.strip()
            url = urlsplit(target)
            self.answer(method, unquote(url.path), parse_qs(url.query, keep_blank_values=True), headers)

    def let_go_on(self, headers: dict[str, str]) -> None:
        """Tell a client that asks first to send its body."""
        if "100-continue" in headers.get("expect", "").lower():
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    def discard(self, headers: dict[str, str]) -> int:
        """Throw a body away; return the size of its content."""
        self.let_go_on(headers)
        if headers.get("transfer-encoding", "").lower() == "chunked":
            total = 0
            while size := int(self.rfile.readline().split(b";")[0], 16):
                self.skip(size)
                self.rfile.readline()
                total += size
            while self.rfile.readline() not in (b"\r\n", b""):
                pass
            return int(headers.get("x-amz-decoded-content-length", total))
        length = int(headers.get("content-length", 0))
        self.skip(length)
        return int(headers.get("x-amz-decoded-content-length", length))

    def skip(self, length: int) -> None:
        """Throw that many bytes away: first what the reader holds already, then unread, in the kernel."""
        held = len(self.rfile.peek(1)) if length else 0  # type: ignore[attr-defined]
        length -= len(self.rfile.read(min(held, length)))
        while length:
            count = self.connection.recv_into(_UNTOUCHED, min(length, _DISCARD), socket.MSG_TRUNC)
            if count == 0:
                return
            length -= count

    def answer(self, method: str, path: str, query: dict[str, list[str]], headers: dict[str, str]) -> None:
        """Do the least that clients accept."""
        if method == "POST" and "uploads" in query:
            self.discard(headers)
            with self.lock:
                token = f"u{len(self.uploads) + 1}"
                self.uploads[token] = {}
            self.reply(
                200, f"<InitiateMultipartUploadResult><UploadId>{token}</UploadId></InitiateMultipartUploadResult>"
            )
        elif method == "PUT" and "partNumber" in query:
            size = self.discard(headers)
            self.uploads[query["uploadId"][0]][int(query["partNumber"][0])] = size
            self.reply(200, "", {"ETag": _ETAG})
        elif method == "POST" and "uploadId" in query:
            length = int(headers.get("content-length", 0))
            numbers = re.findall(rb"<PartNumber>(\d+)</PartNumber>", self.rfile.read(length))
            parts = self.uploads[query["uploadId"][0]]
            self.sizes[path] = sum(parts[int(number)] for number in numbers)
            self.reply(
                200,
                f'<CompleteMultipartUploadResult><ETag>{_ETAG[:-1]}-{len(numbers)}"</ETag></CompleteMultipartUploadResult>',
            )
        elif method == "PUT":
            length = int(headers.get("content-length", 0))
            if length <= _SMALL and "x-amz-decoded-content-length" not in headers:
                self.let_go_on(headers)
                self.small[path] = self.rfile.read(length)
                self.sizes[path] = length
            else:
                self.sizes[path] = self.discard(headers)
            self.reply(200, "", {"ETag": _ETAG})
        elif method == "DELETE":
            self.sizes.pop(path, None)
            self.reply(204, "")
        elif method in ("HEAD", "GET") and path in self.sizes:
            # (What looks like an MD5, with a part count or without, would be compared.)
            extra = {"ETag": '"sink"', "Last-Modified": "Sat, 21 Nov 2026 02:00:00 GMT"}
            content = self.small.get(path, b"").decode("latin-1") if method == "GET" else ""
            status = 206 if "range" in headers else 200
            self.reply(status, content, extra, length=self.sizes[path])
        else:
            self.reply(404, "" if method == "HEAD" else "<Error><Code>NoSuchKey</Code></Error>")

    def reply(self, status: int, body: str, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        """Send an answer."""
        lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body) if length is None else length}"]
        lines.append("Server: SeaweedFS sink 4.48")  # plays a complete S3: nothing is left out for its sake
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self.connection.sendall(("\r\n".join(lines) + "\r\n\r\n" + body).encode("latin-1"))


class Server(socketserver.ThreadingTCPServer):
    """A thread for each connection."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128


if __name__ == "__main__":
    with Server(("127.0.0.1", int(sys.argv[1])), Handler) as server:
        server.serve_forever()
