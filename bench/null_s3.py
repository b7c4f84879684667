"""An S3 server that costs next to nothing: it answers what uploaders ask and throws the bytes away, or keeps them.

Bodies are discarded inside the kernel (``MSG_TRUNC`` on a TCP socket copies nothing), so what remains of a
run's time is the client's own. It keeps sizes, so that clients which look afterwards are content.

With a directory it writes bodies to files there (in memory, best), and gives them out again by ``sendfile``.

    python -m bench.null_s3 PORT [DIRECTORY]
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import socketserver
import sys
import threading
from pathlib import Path
from typing import BinaryIO, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_DISCARD = 1 << 20
_SMALL = 64 << 10  # objects that a client may read again: claims and manifests
_UNTOUCHED = bytearray(_DISCARD)  # asked for, never written to
_ETAG = '"00000000000000000000000000000000"'
# (What looks like an MD5, with a part count or without, would be compared.)
_READ_ETAG = '"sink"'


class Body:
    """What was sent in one request: its size, and the file that has it, if it was kept."""

    def __init__(self, size: int, path: Path | None) -> None:
        self.size = size
        self.path = path


class Handler(socketserver.StreamRequestHandler):
    """One connection: requests until it closes."""

    rbufsize = 64 << 10
    keep: ClassVar[Path | None] = None
    objects: ClassVar[dict[str, list[Body]]] = {}
    uploads: ClassVar[dict[str, dict[int, Body]]] = {}
    small: ClassVar[dict[str, bytes]] = {}
    numbers: ClassVar[itertools.count[int]] = itertools.count(1)
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

    def take(self, headers: dict[str, str]) -> Body:
        """Take a request's body, framed or plain; keep its content if that is wanted."""
        self.let_go_on(headers)
        if self.keep is None:
            return Body(self.frames(headers, None), None)
        path = self.keep / f"body-{next(self.numbers)}"
        with open(path, "wb") as file:
            return Body(self.frames(headers, file), path)

    def frames(self, headers: dict[str, str], file: BinaryIO | None) -> int:
        """Take a body apart; return the size of its content. (HTTP's chunks and S3's have the same form.)"""
        if "chunked" not in headers.get("transfer-encoding", "") and "x-amz-decoded-content-length" not in headers:
            length = int(headers.get("content-length", 0))
            self.move(length, file)
            return length
        total = 0
        while size := int(self.rfile.readline().split(b";")[0], 16):
            self.move(size, file)
            self.rfile.readline()
            total += size
        while self.rfile.readline() not in (b"\r\n", b""):
            pass
        return total

    def move(self, length: int, file: BinaryIO | None) -> None:
        """Write that many bytes to a file, or throw them away: unread, in the kernel, but for what is read already."""
        held = len(self.rfile.peek(1)) if length else 0  # type: ignore[attr-defined]
        piece = self.rfile.read(min(held, length))
        length -= len(piece)
        if file is not None:
            file.write(piece)
        buffer = bytearray(_DISCARD) if file is not None else _UNTOUCHED
        while length:
            flags = 0 if file is not None else socket.MSG_TRUNC
            count = self.connection.recv_into(buffer, min(length, _DISCARD), flags)
            if count == 0:
                return
            if file is not None:
                file.write(memoryview(buffer)[:count])
            length -= count

    def answer(self, method: str, path: str, query: dict[str, list[str]], headers: dict[str, str]) -> None:
        """Do the least that clients accept."""
        if method == "POST" and "uploads" in query:
            self.take(headers)
            with self.lock:
                token = f"u{len(self.uploads) + 1}"
                self.uploads[token] = {}
            self.reply(
                200, f"<InitiateMultipartUploadResult><UploadId>{token}</UploadId></InitiateMultipartUploadResult>"
            )
        elif method == "PUT" and "partNumber" in query:
            self.uploads[query["uploadId"][0]][int(query["partNumber"][0])] = self.take(headers)
            self.reply(200, "", {"ETag": _ETAG})
        elif method == "POST" and "uploadId" in query:
            length = int(headers.get("content-length", 0))
            numbers = re.findall(rb"<PartNumber>(\d+)</PartNumber>", self.rfile.read(length))
            parts = self.uploads[query["uploadId"][0]]
            self.objects[path] = [parts[int(number)] for number in numbers]
            self.reply(
                200,
                f'<CompleteMultipartUploadResult><ETag>{_ETAG[:-1]}-{len(numbers)}"</ETag></CompleteMultipartUploadResult>',
            )
        elif method == "PUT":
            length = int(headers.get("content-length", 0))
            if length <= _SMALL and "x-amz-decoded-content-length" not in headers:
                self.let_go_on(headers)
                self.small[path] = self.rfile.read(length)
                self.objects[path] = [Body(length, None)]
            else:
                self.objects[path] = [self.take(headers)]
            self.reply(200, "", {"ETag": _ETAG})
        elif method == "DELETE":
            self.objects.pop(path, None)
            self.reply(204, "")
        elif method == "GET" and ("list-type" in query or path.count("/") == 1):
            self.list(path.strip("/"), query)
        elif method in ("HEAD", "GET") and path in self.objects:
            self.give(method, path, headers)
        else:
            self.reply(404, "" if method == "HEAD" else "<Error><Code>NoSuchKey</Code></Error>")

    def list(self, bucket: str, query: dict[str, list[str]]) -> None:
        """List all that there is under a prefix, on one page."""
        prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        after = query.get("start-after", [""])[0]
        lines, common = [], set()
        for path, bodies in sorted(self.objects.items()):
            key = path.removeprefix(f"/{bucket}/")
            if not key.startswith(prefix) or key <= after:
                continue
            if delimiter and delimiter in key[len(prefix) :]:
                common.add(prefix + key[len(prefix) :].split(delimiter)[0] + delimiter)
                continue
            lines.append(
                f"<Contents><Key>{escape(key)}</Key><LastModified>2026-11-21T02:00:00.000Z</LastModified>"
                f"<ETag>&quot;sink&quot;</ETag><Size>{sum(body.size for body in bodies)}</Size></Contents>"
            )
        lines += [f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(common)]
        head = f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><IsTruncated>false</IsTruncated>"
        xmlns = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
        self.reply(200, f"<ListBucketResult {xmlns}>{head}{''.join(lines)}</ListBucketResult>")

    def give(self, method: str, path: str, headers: dict[str, str]) -> None:
        """Give an object out, or a range of it; what was thrown away is not there to be given."""
        bodies = self.objects[path]
        size = sum(body.size for body in bodies)
        extra = {"ETag": _READ_ETAG, "Last-Modified": "Sat, 21 Nov 2026 02:00:00 GMT", "Accept-Ranges": "bytes"}
        first, last, status = 0, size - 1, 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", "")):
            first, last, status = int(found[1]), min(int(found[2] or last), last), 206
            extra["Content-Range"] = f"bytes {first}-{last}/{size}"
        self.reply(status, "", extra, length=last - first + 1)
        if method == "HEAD":
            return
        if path in self.small:
            self.connection.sendall(self.small[path][first : last + 1])
            return
        for body in bodies:
            if body.path is not None and first <= last and first < body.size:
                with open(body.path, "rb") as file:
                    at, end = first, min(last + 1, body.size)
                    while at < end:
                        at += os.sendfile(self.connection.fileno(), file.fileno(), at, end - at)
            first, last = max(0, first - body.size), last - body.size

    def reply(self, status: int, body: str, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        """Send an answer."""
        content = body.encode()
        lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(content) if length is None else length}"]
        lines.append("Server: SeaweedFS sink 4.48")  # plays a complete S3: nothing is left out for its sake
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self.connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode() + content)


class Server(socketserver.ThreadingTCPServer):
    """A thread for each connection."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128


def main() -> None:
    """Serve until killed."""
    if len(sys.argv) > 2:
        Handler.keep = Path(sys.argv[2])
    with Server(("127.0.0.1", int(sys.argv[1])), Handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
