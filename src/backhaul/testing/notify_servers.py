"""Servers that messages are delivered to, for tests: mail servers and an HTTP server that records what it is sent.

All on free ports of the loopback, and scripted: what they say to the next message is set before it comes.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import logging
import socket
import ssl
import threading
from collections import deque
from collections.abc import Mapping
from email.message import EmailMessage
from email.parser import BytesParser
from email.policy import default
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

_START_TIMEOUT = 20.0


class Certificate:
    """A certificate for 127.0.0.1 and localhost that signs itself: nothing trusts it but what is told to."""

    def __init__(self, directory: Path) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID

        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
        now = dt.datetime.now(dt.UTC)
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=2))
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        self.file = directory / "certificate.pem"
        self.file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        self._key = directory / "key.pem"
        self._key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )

    def server_context(self) -> ssl.SSLContext:
        """Return what a server speaks TLS with."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.file, self._key)
        return context


class ReceivedMail(msgspec.Struct, frozen=True):
    """A mail as the server took it: the envelope, the bytes, and whether its sender had logged in and spoke TLS."""

    sender: str
    recipients: tuple[str, ...]
    content: bytes
    authenticated: bool
    tls: bool

    @property
    def message(self) -> EmailMessage:
        """The mail, parsed."""
        return BytesParser(policy=default).parsebytes(self.content)


class MailServer:
    """A mail server (aiosmtpd).

    Args:
        certificate: for TLS; with ``implicit`` from the first byte, else by STARTTLS.
        login: (user, password) that a sender must log in with; None: nobody needs to.
        refused: recipients, and what is said to them.
        reply: what is said to the mail itself instead of taking it.
    """

    def __init__(
        self,
        *,
        certificate: Certificate | None = None,
        implicit: bool = False,
        login: tuple[str, str] | None = None,
        refused: Mapping[str, str] | None = None,
        reply: str | None = None,
    ) -> None:
        self._certificate = certificate
        self._implicit = implicit
        self.login = login
        self.refused = dict(refused or {})
        self.reply = reply
        self.mails: list[ReceivedMail] = []
        self.host = "127.0.0.1"
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="mail-server", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._started.wait(_START_TIMEOUT):
            raise TimeoutError("the mail server did not start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_START_TIMEOUT)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        context = self._certificate.server_context() if self._certificate is not None and self._implicit else None
        server = await self._loop.create_server(self._session, self.host, 0, ssl=context)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._stop.wait()
        server.close()
        await server.wait_closed()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _session(self) -> asyncio.Protocol:
        from aiosmtpd.smtp import SMTP, AuthResult

        logging.getLogger("mail.log").setLevel(logging.CRITICAL)

        def check(server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> Any:
            given = (data.login.decode(), data.password.decode())
            return AuthResult(success=given == self.login, handled=False)

        starttls = self._certificate.server_context() if self._certificate is not None and not self._implicit else None
        return SMTP(  # type: ignore[no-any-return, unused-ignore]
            self,
            hostname="mail.test",
            tls_context=starttls,
            authenticator=check if self.login is not None else None,
            auth_require_tls=False,
            auth_exclude_mechanism=None if self.login is not None else ["LOGIN", "PLAIN"],
            enable_SMTPUTF8=True,
            loop=self._loop,
        )

    # -- what aiosmtpd calls -------------------------------------------------------------------------------

    async def handle_MAIL(self, server: Any, session: Any, envelope: Any, address: str, options: list[str]) -> str:  # noqa: N802
        """Take the sender, if it may send."""
        if self.login is not None and not session.authenticated:
            return "530 5.7.0 Authentication required"
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        return "250 OK"

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: list[str]) -> str:  # noqa: N802
        """Take or refuse a recipient."""
        if address in self.refused:
            return self.refused[address]
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802
        """Take the mail, or say what was set instead."""
        if self.reply is not None:
            return self.reply
        self.mails.append(
            ReceivedMail(
                envelope.mail_from,
                tuple(envelope.rcpt_tos),
                bytes(envelope.original_content),
                bool(session.authenticated),
                session.ssl is not None or self._implicit,
            )
        )
        return "250 OK"


class Reply(msgspec.Struct, frozen=True):
    """What is answered to a request.

    Attributes:
        status: of HTTP.
        body: the whole of it.
        headers: besides Content-Length.
        trickle: a byte every 20 ms and never an end: of the headers ("headers") or of the body ("body").
        silent: nothing at all.
    """

    status: int = 200
    body: bytes = b"ok"
    headers: tuple[tuple[str, str], ...] = ()
    trickle: str = ""
    silent: bool = False


class Request(msgspec.Struct, frozen=True):
    """A request as it came."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return msgspec.json.decode(self.body)


class HttpSink:
    """An HTTP server that records each request, and answers what was set in ``replies``, else 200."""

    def __init__(self, *, certificate: Certificate | None = None) -> None:
        sink = self
        self.requests: list[Request] = []
        self.replies: deque[Reply] = deque()
        self._closing = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                sink.requests.append(Request(self.command, self.path, headers, body))
                sink._answer(self, sink.replies.popleft() if sink.replies else Reply())

            do_GET = do_PUT = do_PATCH = do_HEAD = do_POST  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients that leave are part of the tests

        self._server = Server(("127.0.0.1", 0), Handler)
        if certificate is not None:
            context = certificate.server_context()
            # The handshake belongs to the connection's own thread: one that never comes mustn't keep the others.
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._scheme = "http" if certificate is None else "https"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="sink", daemon=True)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Its root, without a slash at the end."""
        return f"{self._scheme}://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join(_START_TIMEOUT)
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        if reply.silent:
            self._closing.wait()
            return
        if reply.trickle == "headers":
            self._drip(handler, b"HTTP/1.0 200 OK\r\nX-Slow: ")
            return
        handler.send_response(reply.status)
        for name, value in reply.headers:
            handler.send_header(name, value)
        if reply.trickle == "body":
            handler.end_headers()
            self._drip(handler, reply.body)
            return
        handler.send_header("Content-Length", str(len(reply.body)))
        handler.end_headers()
        handler.wfile.write(reply.body)

    def _drip(self, handler: BaseHTTPRequestHandler, beginning: bytes) -> None:
        handler.wfile.write(beginning)
        while not self._closing.wait(0.02):
            handler.wfile.write(b"x")


class BareServer:
    """A server that takes connections and speaks no protocol: it says nothing, or a byte every 20 ms for ever.

    Args:
        drip: what it repeats; empty for silence.
        hang_up: whether it closes each connection at once instead.
    """

    def __init__(self, drip: bytes = b"", *, hang_up: bool = False) -> None:
        self._drip = drip
        self._hang_up = hang_up
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.05)
        self.port = int(self._listener.getsockname()[1])
        self.connections = 0
        self.left = threading.Event()
        self._threads: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._accept, name="bare-server", daemon=True)

    def __enter__(self) -> Self:
        self._acceptor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        for thread in (self._acceptor, *self._threads):
            thread.join(_START_TIMEOUT)
        self._listener.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            self.connections += 1
            thread = threading.Thread(target=self._talk, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _talk(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(0.02)
            while not self._hang_up and not self._closing.is_set():
                try:
                    if self._drip:
                        connection.sendall(self._drip)
                    if not connection.recv(4096):
                        break
                except TimeoutError:
                    continue
                except OSError:
                    break
        self.left.set()
