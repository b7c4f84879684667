"""How two hosts find out who the other is, on a connection that was just made.

A connection is secured in three steps, and every one that fails leaves *both* sides with an error that says
why. Each host goes through the same steps, whoever connected::

    greeting   both ways, in the clear   24 bytes: "BACKHAUL 1 ", the kind of key, spaces, line feed
    TLS 1.3    both show certificates, and check the other's against their own authority alone
    verdict    the server's byte, then the client's: "+" go on, "s"/"r" you lack the role send/receive

The greeting is there because TLS says nothing that a person can use to whom does not speak it. It decides
nothing: who forges it gets a refusal. The verdict is there because with TLS 1.3 a client is done before the
server has looked at its certificate; without a byte from there it would learn of a refusal, if at all, in
the middle of its data.

Host names are not compared here: a host is reached by many names, and which hosts belong together is the
caller's to say. It gets the name that the certificate has.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import re
import socket
import ssl
import time
from typing import Literal

import msgspec
from cryptography import x509

from backhaul.errors import FormatError, PeerError
from backhaul.network.authority import RECEIVE, ROLES, SEND, identity_in

Kind = Literal["certificate", "shared", "plain"]

LINGER = 1.0
"""Seconds for which a refused connection is kept, at most, so that the other side can read why."""

_GREETING_SIZE = 24
_GREETING = re.compile(rb"BACKHAUL (\d+) ([a-z]+) *\n")
_GO_ON = b"+"
_LACKING = {b"s": SEND, b"r": RECEIVE}
_HAS = {
    "certificate": "a key with a certificate of its own",
    "shared": "a shared key",
    "plain": "no key at all",
}
# X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED (openssl/x509_vfy.h).
_NOT_YET_VALID, _EXPIRED = 9, 10
_MAKE_ONE = "Make it a key, where ca.key is: backhaul keys DIR ..."
_SAME_VERSION = "Run the same version of Backhaul on both."


class Peer(msgspec.Struct, frozen=True):
    """Who is at the other end.

    Attributes:
        name: the host's name in its certificate. With a shared key it is what the host calls itself: whoever
            has the key can use any name. Without keys it is the address.
        roles: what it may do, ``send`` or ``receive`` or both.
        kind: by what it showed it.
    """

    name: str
    roles: frozenset[str]
    kind: Kind


class Own(msgspec.Struct, frozen=True):
    """What this host has to show.

    Attributes:
        name: its name, as others see it.
        roles: what it may do.
        kind: by what it shows it.
        expires: until when that is good (aware); None for ever.
    """

    name: str
    roles: frozenset[str]
    kind: Kind
    expires: dt.datetime | None = None


class Handshake:
    """One connection while it is being secured: its socket, its deadline, and words for what goes wrong."""

    def __init__(self, sock: socket.socket, own: Own, *, server_side: bool, timeout: float) -> None:
        self._sock = sock
        self._own = own
        self._server_side = server_side
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._address, self._where = _address(sock)

    def run(self, context: ssl.SSLContext | None, expect_role: str) -> tuple[socket.socket, Peer]:
        """Go through all steps; the connection is closed if one fails.

        Args:
            context: the TLS settings for this side; None for no TLS.
            expect_role: the role that the other side must have.

        Raises:
            PeerError: as ``Credentials.secure`` says.
        """
        before = self._sock.gettimeout()
        try:
            peer = self._translating(context, expect_role)
            self._sock.settimeout(before)
        except PeerError as error:
            self._part(linger=error.details["reason"] not in {"timeout", "closed"})
            raise
        except BaseException:
            self._part(linger=False)
            raise
        return self._sock, peer

    def _translating(self, context: ssl.SSLContext | None, expect_role: str) -> Peer:
        try:
            self._greet()
            if context is None:
                return Peer(self._address, ROLES, "plain")
            name, roles = self._exchange_keys(context)
            self._exchange_verdicts(name, roles, expect_role)
        except TimeoutError as error:
            raise self._error(
                "timeout",
                f"it did not show who it is within {self._timeout:g} s",
                "See whether it is backhaul that runs there, and whether a firewall lets its packets through.",
            ) from error
        except ssl.SSLError as error:
            raise self._tls_error(error) from error
        except OSError as error:
            raise self._closed(error.strerror or str(error)) from error
        return Peer(name, roles, self._own.kind)

    def _tls_error(self, error: ssl.SSLError) -> PeerError:
        """Say what TLS found here, or was told by the other side."""
        renew = "make a new key where ca.key is (backhaul keys DIR --renew ...) and copy it"
        now = f"{dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC"
        if isinstance(error, ssl.SSLCertVerificationError):
            if error.verify_code in {_NOT_YET_VALID, _EXPIRED}:
                how = "has expired" if error.verify_code == _EXPIRED else "is not valid yet"
                return self._error(
                    "clock",
                    f"its certificate {how}, by the clock of this host: {now}",
                    f"Set the clock right where it is wrong; if both are right, {renew} there.",
                )
            return self._another_key(f"{self._its_key()} (TLS: {error.verify_message})")
        if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return self._closed("in the middle of the key exchange")
        reason = error.reason or ""
        words = f"(TLS: {reason.lower().replace('_', ' ') or error})"
        # (What is not valid *yet* is told as a bad certificate: the alerts of TLS have no word for it.)
        if "CERTIFICATE_EXPIRED" in reason or "BAD_CERTIFICATE" in reason:
            until = f", and it is good until {self._own.expires:%Y-%m-%d %H:%M} UTC" if self._own.expires else ""
            return self._error(
                "clock",
                f"by its clock, the certificate of this host has expired or is not valid yet; here it is {now}{until} "
                + words,
                f"Compare the clocks of the two; if both are right, {renew} here.",
            )
        if "UNKNOWN_CA" in reason or "DECRYPT_ERROR" in reason:
            return self._another_key(f"it refuses this host: {self._its_key()} {words}")
        if "DID_NOT_RETURN" in reason:
            return self._error("key", f"it showed no certificate {words}", _MAKE_ONE)
        return self._error(
            "protocol",
            f"the key exchange broke down {words}",
            "Run the same version of Backhaul on both, with an OpenSSL that has TLS 1.3.",
        )

    def _its_key(self) -> str:
        if self._own.kind == "shared":
            return "it has another shared key than this host"
        return "its key and this host's were made by different authorities (ca.key)"

    def _another_key(self, why: str) -> PeerError:
        if self._own.kind == "shared":
            return self._error("key", why, "Copy one and the same key file to all hosts.")
        return self._error(
            "key", why, "Make the keys of all hosts in one directory (backhaul keys DIR ...), and copy them."
        )

    def _error(self, reason: str, why: str, todo: str) -> PeerError:
        """Return an error about the other side."""
        what = (
            f"The connection from {self._where} is refused" if self._server_side else f"No connection to {self._where}"
        )
        error = PeerError(what, why, todo)
        error.details.update(peer=self._where, reason=reason)
        return error

    def _closed(self, how: str) -> PeerError:
        """Return the error for an end that nobody explained."""
        return self._error("closed", f"it closed the connection: {how}", "Read there why; it may have given up.")

    def _greet(self) -> None:
        """Send this host's greeting, and read the other's."""
        self._limit()
        self._sock.sendall(_greeting(self._own.kind))
        got = b""
        while len(got) < _GREETING_SIZE:
            self._limit()
            piece = self._sock.recv(_GREETING_SIZE - len(got))
            if not piece:
                raise self._closed("it said nothing of who it is" if not got else "it broke off in its greeting")
            got += piece
            # Found out at the first byte: who is no Backhaul may never send as much as a greeting.
            if not got.startswith(b"BACKHAUL "[: len(got)]):
                tls = " (it began to speak TLS at once)" if got[:1] == b"\x16" else ""
                raise self._error(
                    "stranger",
                    f"what is there is no Backhaul{tls}",
                    "Correct the port: another program uses this one.",
                )
        match = _GREETING.fullmatch(got)
        if match is None or match[1] != b"1" or match[2].decode() not in _HAS:
            raise self._error(
                "stranger",
                "it is of a version that this one does not know",
                _SAME_VERSION,
            )
        self._compare(match[2].decode())

    def _compare(self, other: str) -> None:
        own = self._own.kind
        if own == other:
            return
        if "plain" in {own, other}:
            raise self._error(
                "plain",
                f"it has {_HAS[other]}, and this host has {_HAS[own]}",
                "Start both with keys (backhaul keys makes them), or both without.",
            )
        raise self._error(
            "kind",
            f"it has {_HAS[other]}, and this host has {_HAS[own]}",
            "Give all hosts keys of the same kind: see backhaul keys --help.",
        )

    def _exchange_keys(self, context: ssl.SSLContext) -> tuple[str, frozenset[str]]:
        """Wrap the socket, and return the other's name and roles from its certificate."""
        self._limit()
        # Its socket is gone from here on, whether or not this succeeds.
        tls = context.wrap_socket(self._sock, server_side=self._server_side, do_handshake_on_connect=False)
        self._sock = tls
        tls.do_handshake()
        certificate = tls.getpeercert(binary_form=True)
        if certificate is None:  # (TLS was told to demand one.)
            raise self._error("key", "it showed no certificate", _MAKE_ONE)
        try:
            return identity_in(x509.load_der_x509_certificate(certificate))
        except (FormatError, ValueError) as error:
            why = error.why if isinstance(error, FormatError) else "it can't be read"
            raise self._error("key", f"its certificate is none that backhaul keys made: {why}", _MAKE_ONE) from error

    def _exchange_verdicts(self, name: str, roles: frozenset[str], expect_role: str) -> None:
        """Tell the other side whether it will do, and hear the same from it: the server speaks first.

        (Both at once would have a client write to a server that refused it: the reset that it would get for
        that could overtake the reason.)
        """
        lacking = next(byte for byte, role in _LACKING.items() if role == expect_role)
        verdict = _GO_ON if expect_role in roles else lacking
        if self._server_side:
            self._send(verdict)
        answer = self._receive()
        if not self._server_side:
            self._send(verdict)
        if verdict != _GO_ON:
            raise self._error(
                "role",
                f"{name} is not allowed to {expect_role}: its key is {_for(roles)}",
                _renew(name, roles | {expect_role}),
            )
        if answer == b"":
            raise self._closed("after the key exchange, without a word")
        if answer != _GO_ON:
            role = _LACKING.get(answer)
            if role is None:
                raise self._error("protocol", "its answer is none that there is", _SAME_VERSION)
            raise self._error(
                "role",
                f"{name} refuses this host, which must be allowed to {role}: its key is {_for(self._own.roles)}",
                _renew(self._own.name, self._own.roles | {role}),
            )

    def _send(self, byte: bytes) -> None:
        self._limit()
        self._sock.sendall(byte)

    def _receive(self) -> bytes:
        self._limit()
        return self._sock.recv(1)

    def _part(self, *, linger: bool) -> None:
        """Close the connection; first let the other side read what it was told, for ``LINGER`` s at most.

        (To close with bytes unread resets the connection, and a reset may overtake what was sent before it.)
        """
        end = time.monotonic() + LINGER
        with contextlib.suppress(OSError, ValueError):
            self._sock.shutdown(socket.SHUT_WR)
            while linger and (left := end - time.monotonic()) > 0:
                self._sock.settimeout(left)
                # (Past TLS, whose state may be broken: what comes is thrown away.)
                if not socket.socket.recv(self._sock, 65536):
                    break
        self._sock.close()

    def _limit(self) -> None:
        """Give the next step what is left of the time."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)


def _greeting(kind: Kind) -> bytes:
    return f"BACKHAUL 1 {kind:<12}\n".encode()


def _address(sock: socket.socket) -> tuple[str, str]:
    """Return the other side's address, and the same with its port for messages."""
    try:
        address = sock.getpeername()
    except OSError:
        address = None
    if isinstance(address, tuple):
        host, port = str(address[0]), address[1]
        return host, f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return "localhost", "the other process"


def _for(roles: frozenset[str]) -> str:
    words = [word for role, word in ((SEND, "sending"), (RECEIVE, "receiving")) if role in roles]
    return f"for {' and '.join(words) or 'neither'}"


def _renew(name: str, roles: frozenset[str]) -> str:
    return f"Make it another key: {renewal(name, roles)}, where ca.key is; copy it there."


def renewal(name: str, roles: frozenset[str]) -> str:
    """Return the command that makes a new key for a host that has one."""
    option = "--both" if roles == ROLES else "--sender" if SEND in roles else "--receiver"
    return f"backhaul keys DIR --renew {option} {name}"
