"""Key files, and what two hosts find out about each other by them: over real sockets, both sides looked at."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from backhaul.errors import BackhaulError, ConfigurationError, FormatError, PeerError, UsageError
from backhaul.network.authority import (
    RECEIVE,
    ROLES,
    SEND,
    Authority,
    host_name,
    new_authority,
    new_shared_key,
    read_authority,
    read_bundle,
    shared_authority,
)
from backhaul.network.credentials import Credentials, Peer, credentials_from, default_key_path, load_credentials, plain
from backhaul.network.handshake import LINGER

pytestmark = pytest.mark.unit

NOW = dt.datetime.now(dt.UTC)
DAY = dt.timedelta(days=1)
# So long ago that a host's certificate is over, and so that its authority is not.
LONG_AGO = NOW - 4000 * DAY
NEVER = 30.0
GREETING = b"BACKHAUL 1 certificate \n"

Secured = tuple[socket.socket, Peer]


def secured(outcome: Secured | BaseException) -> Secured:
    assert not isinstance(outcome, BaseException), outcome
    return outcome


def refused(outcome: Secured | BaseException, reason: str, *words: str) -> PeerError:
    """Return the error after a look at it: three parts, the reason, words of the second part."""
    assert isinstance(outcome, PeerError), outcome
    assert outcome.details["reason"] == reason, outcome
    assert outcome.what
    assert outcome.why
    assert outcome.todo
    for word in words:
        assert word in outcome.why, outcome.why
    return outcome


class Pair:
    """Two ends of a connection over loopback, and a thread for the second."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.client = socket.create_connection(listener.getsockname())
            self.server, _ = listener.accept()
        self.opened: list[socket.socket] = [self.client, self.server]

    def secure(
        self,
        server: Credentials,
        client: Credentials,
        *,
        server_expects: str = SEND,
        client_expects: str = RECEIVE,
    ) -> tuple[Secured | BaseException, Secured | BaseException]:
        """Return what came of it at the server, and at the client."""
        outcomes: dict[bool, Secured | BaseException] = {}

        def side(own: Credentials, sock: socket.socket, role: str, server_side: bool) -> None:
            try:
                outcomes[server_side] = own.secure(sock, server_side=server_side, expect_role=role, timeout=NEVER)
            except BackhaulError as error:
                outcomes[server_side] = error

        began = time.monotonic()
        thread = threading.Thread(target=side, args=(server, self.server, server_expects, True))
        thread.start()
        side(client, self.client, client_expects, False)
        thread.join()
        # Nobody found out by waiting.
        assert time.monotonic() - began < NEVER
        self.opened += [outcome[0] for outcome in outcomes.values() if not isinstance(outcome, BaseException)]
        return outcomes[True], outcomes[False]

    def against(self, own: Credentials, *, server_side: bool, timeout: float = NEVER) -> Secured | BaseException:
        """Return what came of it at one side; the test does what the other does."""
        sock = self.server if server_side else self.client
        try:
            done = own.secure(sock, server_side=server_side, expect_role=SEND, timeout=timeout)
        except BackhaulError as error:
            return error
        self.opened.append(done[0])
        return done


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    for sock in pair.opened:
        sock.close()


def credentials_of(authority: Authority, name: str, *roles: str, at: dt.datetime = NOW) -> Credentials:
    """Return credentials as the host had them at that time: of a date that no file would be taken with now."""
    return credentials_from(read_bundle(authority.issue(name, frozenset(roles), at)), Path("a.key"), now=at)


AUTHORITY = new_authority(LONG_AGO)
SENDER = credentials_of(AUTHORITY, "db1", SEND)
RECEIVER = credentials_of(AUTHORITY, "db2.example.net", RECEIVE)


class Folder:
    """Writes key files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def file(self, content: bytes, mode: int = 0o600) -> Path:
        path = self.path / "a.key"
        path.write_bytes(content)
        path.chmod(mode)
        return path

    def shared(self, secret: bytes, name: str) -> Credentials:
        return load_credentials(self.file(new_shared_key(secret)), name=name)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def assert_carries(server: socket.socket, client: socket.socket) -> None:
    """Both directions work, with what was there before gone from the stream."""
    for one, other in ((server, client), (client, server)):
        one.sendall(b"some bytes")
        assert other.recv(100) == b"some bytes"


# -- who is let in -------------------------------------------------------------------------------------------


def test_certificates_of_one_authority(pair: Pair) -> None:
    pair.client.settimeout(77)
    server, client = map(secured, pair.secure(RECEIVER, SENDER))
    assert server[1] == Peer("db1", frozenset({SEND}), "certificate")
    assert client[1] == Peer("db2.example.net", frozenset({RECEIVE}), "certificate")
    assert_carries(server[0], client[0])
    assert client[0].gettimeout() == 77
    assert server[0].gettimeout() is None
    for sock, _ in (server, client):
        assert isinstance(sock, ssl.SSLSocket)
        assert sock.version() == "TLSv1.3"


@pytest.mark.parametrize("address", ["192.0.2.7", "2001:db8::7"])
def test_an_address_for_a_name(pair: Pair, address: str) -> None:
    server, client = pair.secure(RECEIVER, credentials_of(AUTHORITY, address, SEND))
    assert secured(server)[1].name == address
    secured(client)


def test_one_shared_key(pair: Pair, folder: Folder) -> None:
    secret = os.urandom(32)
    server, client = map(secured, pair.secure(folder.shared(secret, "db2"), folder.shared(secret, "DB1")))
    assert server[1] == Peer("db1", ROLES, "shared")
    assert client[1] == Peer("db2", ROLES, "shared")
    assert_carries(server[0], client[0])
    assert isinstance(server[0], ssl.SSLSocket)


def test_no_clock_has_a_say_in_a_shared_key() -> None:
    bundle = read_bundle(shared_authority(bytes(32)).issue_for_ever("db1"))
    assert bundle.begins.year == 1970
    assert bundle.expires.year == 9999


def test_no_keys_on_either_side(pair: Pair) -> None:
    server, client = map(secured, pair.secure(plain("db2"), plain("db1")))
    assert server == (pair.server, Peer("127.0.0.1", ROLES, "plain"))
    assert client == (pair.client, Peer("127.0.0.1", ROLES, "plain"))
    assert_carries(server[0], client[0])


def test_nothing_but_ciphertext_on_the_wire() -> None:
    """What a proxy sees of the same bytes: with keys nothing, without keys all."""
    for own, other, seen in ((RECEIVER, SENDER, False), (plain("a"), plain("b"), True)):
        near, far = Pair(), Pair()
        wire = bytearray()

        def carry(source: socket.socket, target: socket.socket, wire: bytearray = wire) -> None:
            with contextlib.suppress(OSError):
                while piece := source.recv(65536):
                    wire.extend(piece)
                    target.sendall(piece)

        threads = [
            threading.Thread(target=carry, args=ends) for ends in ((near.server, far.client), (far.client, near.server))
        ]
        for thread in threads:
            thread.start()
        both = Pair.__new__(Pair)
        both.client, both.server, both.opened = near.client, far.server, []
        server, client = map(secured, both.secure(own, other))
        client[0].sendall(b"the salaries of all")
        assert server[0].recv(100) == b"the salaries of all"
        for sock in (*both.opened, near.server, far.client):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in threads:
            thread.join()
        assert (b"the salaries of all" in wire) is seen
        assert b"BACKHAUL 1 " in wire


def test_one_key_serves_many_threads_at_once() -> None:
    pairs = [Pair() for _ in range(8)]

    def one(pair: Pair) -> str:
        server, client = map(secured, pair.secure(RECEIVER, SENDER))
        assert_carries(server[0], client[0])
        return server[1].name

    with ThreadPoolExecutor(len(pairs)) as pool:
        names = list(pool.map(one, pairs))
    for pair in pairs:
        for sock in pair.opened:
            sock.close()
    assert names == ["db1"] * 8


# -- who is not ----------------------------------------------------------------------------------------------


def test_another_authority(pair: Pair) -> None:
    server, client = pair.secure(RECEIVER, credentials_of(new_authority(NOW), "db1", SEND))
    refused(client, "key", "different authorities", "ca.key")
    refused(server, "key", "different authorities", "refuses this host")


def test_an_authority_of_the_same_name_with_another_key(pair: Pair) -> None:
    """What somebody makes who has seen the certificates, and has no key."""
    real = x509.load_pem_x509_certificate(AUTHORITY.certificate_pem())
    key = ec.generate_private_key(ec.SECP256R1())
    forged = (
        x509.CertificateBuilder(real.issuer, real.subject, key.public_key(), real.serial_number)
        .not_valid_before(real.not_valid_before_utc)
        .not_valid_after(real.not_valid_after_utc)
    )
    for extension in real.extensions:  # (Also the id of the real one's key.)
        forged = forged.add_extension(extension.value, extension.critical)
    content = Authority(key, forged.sign(key, hashes.SHA256())).issue("db1", ROLES, NOW)
    forger = credentials_from(
        msgspec.structs.replace(read_bundle(content), trusted=AUTHORITY.certificate_pem()), Path("a.key"), now=NOW
    )
    server, client = pair.secure(RECEIVER, forger)
    refused(server, "key", "different authorities")
    refused(client, "key", "refuses this host")


def test_a_host_is_no_authority(pair: Pair) -> None:
    """The key of a host signs no other host's certificate, and no other role for itself."""
    bundle = read_bundle(AUTHORITY.issue("db2", frozenset({RECEIVE}), NOW))
    key = serialization.load_pem_private_key(bundle.chain, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    own = x509.load_pem_x509_certificates(bundle.chain)[0]
    made = Authority(key, own).issue("db1", ROLES, NOW)  # a key, its certificate, and what signed that: the host's own
    mallory = credentials_from(msgspec.structs.replace(bundle, chain=made), Path("a.key"), now=NOW)
    server, client = pair.secure(RECEIVER, mallory)
    refused(server, "key")
    refused(client, "key")


def test_another_shared_key(pair: Pair, folder: Folder) -> None:
    server, client = pair.secure(folder.shared(b"x" * 32, "db2"), folder.shared(b"y" * 32, "db1"))
    refused(client, "key", "another shared key")
    refused(server, "key", "another shared key", "refuses this host")


@pytest.mark.parametrize("server_has_the_shared_one", [False, True])
def test_a_shared_key_against_a_certificate(pair: Pair, folder: Folder, server_has_the_shared_one: bool) -> None:
    shared = folder.shared(b"x" * 32, "db2")
    server, client = pair.secure(shared, SENDER) if server_has_the_shared_one else pair.secure(RECEIVER, shared)
    with_shared, other = (server, client) if server_has_the_shared_one else (client, server)
    refused(with_shared, "kind", "it has a key with a certificate", "this host has a shared key")
    refused(other, "kind", "it has a shared key", "this host has a key with a certificate")


def test_the_client_may_not_send(pair: Pair) -> None:
    server, client = pair.secure(RECEIVER, credentials_of(AUTHORITY, "db3", RECEIVE))
    error = refused(server, "role", "db3 is not allowed to send", "its key is for receiving")
    assert "backhaul keys DIR --renew --both db3" in error.todo
    error = refused(client, "role", "db2.example.net refuses this host", "allowed to send")
    assert "backhaul keys DIR --renew --both db3" in error.todo


def test_the_server_may_not_receive(pair: Pair) -> None:
    server, client = pair.secure(credentials_of(AUTHORITY, "db3", SEND), SENDER)
    refused(client, "role", "db3 is not allowed to receive", "its key is for sending")
    refused(server, "role", "db1 refuses this host", "allowed to receive")


def test_neither_has_the_role_that_the_other_asks_for(pair: Pair) -> None:
    server, client = pair.secure(SENDER, RECEIVER)
    refused(server, "role", "db2.example.net is not allowed to send")
    refused(client, "role", "db1 is not allowed to receive")


def test_no_role_at_all(pair: Pair) -> None:
    server, client = pair.secure(RECEIVER, credentials_of(AUTHORITY, "db3"))
    refused(server, "role", "its key is for neither")
    refused(client, "role")


@pytest.mark.parametrize("server_is_off", [False, True])
@pytest.mark.parametrize(("at", "words"), [(LONG_AGO, "has expired"), (NOW + 5 * DAY, "is not valid yet")])
def test_a_certificate_out_of_its_time(pair: Pair, at: dt.datetime, words: str, server_is_off: bool) -> None:
    off = credentials_of(AUTHORITY, "db9", SEND, RECEIVE, at=at)
    server, client = pair.secure(off, SENDER) if server_is_off else pair.secure(RECEIVER, off)
    of_the_other, own = (client, server) if server_is_off else (server, client)
    refused(of_the_other, "clock", f"its certificate {words}", "by the clock of this host: 2")
    refused(own, "clock", "by its clock", "here it is 2", "good until 2")


def test_hosts_whose_clocks_differ_by_less_than_a_day(pair: Pair) -> None:
    at = NOW + dt.timedelta(hours=23)
    server, client = pair.secure(RECEIVER, credentials_of(AUTHORITY, "db1", SEND, at=at))
    secured(server)
    secured(client)


@pytest.mark.parametrize("server_is_plain", [False, True])
def test_keys_on_one_side_only(pair: Pair, server_is_plain: bool) -> None:
    server, client = pair.secure(plain("db2"), SENDER) if server_is_plain else pair.secure(RECEIVER, plain("db1"))
    without, with_ = (server, client) if server_is_plain else (client, server)
    refused(without, "plain", "it has a key with a certificate", "this host has no key at all")
    refused(with_, "plain", "it has no key at all", "this host has a key with a certificate")


def test_a_client_without_a_certificate(pair: Pair) -> None:
    """It has the authority's certificate, speaks TLS, and shows nothing of itself."""
    bundle = read_bundle(AUTHORITY.issue("db1", ROLES, NOW))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=bundle.trusted.decode())
    seen: list[str] = []

    def client() -> None:
        pair.client.sendall(GREETING)
        assert pair.client.recv(24) == GREETING
        with context.wrap_socket(pair.client) as sock:
            try:
                sock.recv(1)
            except ssl.SSLError as error:
                seen.append(str(error.reason))

    thread = threading.Thread(target=client)
    thread.start()
    refused(pair.against(RECEIVER, server_side=True), "key", "showed no certificate")
    thread.join()
    assert seen == ["TLSV13_ALERT_CERTIFICATE_REQUIRED"]


def test_tls_1_2_is_not_spoken(pair: Pair) -> None:
    bundle = read_bundle(AUTHORITY.issue("db1", ROLES, NOW))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=bundle.trusted.decode())
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    failed: list[str] = []

    def client() -> None:
        pair.client.sendall(GREETING)
        assert pair.client.recv(24) == GREETING
        try:
            context.wrap_socket(pair.client).close()
        except ssl.SSLError as error:
            failed.append(str(error.reason))

    thread = threading.Thread(target=client)
    thread.start()
    refused(pair.against(RECEIVER, server_side=True), "protocol", "unsupported protocol")
    thread.join()
    assert failed == ["TLSV1_ALERT_PROTOCOL_VERSION"]


# -- who is no Backhaul, or says nothing ---------------------------------------------------------------------

EVERY_KIND = pytest.mark.parametrize("own", [RECEIVER, plain("db2")], ids=["certificate", "plain"])
BOTH_SIDES = pytest.mark.parametrize("server_side", [False, True])


@EVERY_KIND
@BOTH_SIDES
def test_a_silent_other_side(pair: Pair, own: Credentials, server_side: bool) -> None:
    began = time.monotonic()
    error = pair.against(own, server_side=server_side, timeout=0.3)
    refused(error, "timeout", "within 0.3 s")
    assert time.monotonic() - began >= 0.3


@BOTH_SIDES
def test_one_that_falls_silent_after_its_greeting(pair: Pair, server_side: bool) -> None:
    other = pair.client if server_side else pair.server
    other.sendall(GREETING)
    refused(pair.against(RECEIVER, server_side=server_side, timeout=0.3), "timeout", "within 0.3 s")


def test_one_that_gives_a_byte_now_and_then_has_no_more_time(pair: Pair) -> None:
    stop = threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError):
            for byte in GREETING:
                pair.client.send(bytes([byte]))
                if stop.wait(0.3):
                    return

    thread = threading.Thread(target=drip)
    thread.start()
    refused(pair.against(RECEIVER, server_side=True, timeout=0.5), "timeout")
    assert not stop.is_set() and thread.is_alive()  # it still had bytes to give, each in time
    stop.set()
    thread.join()


@EVERY_KIND
@BOTH_SIDES
@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "no Backhaul"),
        (b"S", "no Backhaul"),
        (b"\x16\x03\x01\x02\x00\x01", "began to speak TLS"),
        (os.urandom(1_000_000).replace(b"B", b"b"), "no Backhaul"),
        (b"BACKHAUL 2 certificate \n", "version"),
        (b"BACKHAUL 1 quantum     \n", "version"),
        (b"BACKHAUL 1 certificate??", "version"),
    ],
    ids=["http", "one byte", "tls", "noise", "version", "kind", "end"],
)
def test_one_that_is_no_backhaul(pair: Pair, own: Credentials, server_side: bool, said: bytes, words: str) -> None:
    other = pair.client if server_side else pair.server

    def say() -> None:
        with contextlib.suppress(OSError):
            other.sendall(said)
            other.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=say)
    thread.start()
    refused(pair.against(own, server_side=server_side), "stranger", words)
    thread.join()


@BOTH_SIDES
def test_noise_in_the_place_of_tls(pair: Pair, server_side: bool) -> None:
    other = pair.client if server_side else pair.server
    other.sendall(GREETING + b"now for something completely different" * 10)
    refused(pair.against(RECEIVER, server_side=server_side), "protocol", "TLS:")


@BOTH_SIDES
@pytest.mark.parametrize(
    ("own", "said"),
    [(RECEIVER, b""), (RECEIVER, b"BACK"), (RECEIVER, GREETING), (plain("db2"), b""), (plain("db2"), b"BACK")],
)
def test_one_that_goes_away(pair: Pair, own: Credentials, server_side: bool, said: bytes) -> None:
    other = pair.client if server_side else pair.server
    other.sendall(said)
    other.shutdown(socket.SHUT_WR)
    refused(pair.against(own, server_side=server_side), "closed", "closed the connection")


def test_one_that_goes_away_before_its_verdict(pair: Pair) -> None:
    context = credentials_context(AUTHORITY.issue("db1", ROLES, NOW))

    def client() -> None:
        pair.client.sendall(GREETING)
        pair.client.recv(24)
        with context.wrap_socket(pair.client) as sock:
            assert sock.recv(1) == b"+"

    thread = threading.Thread(target=client)
    thread.start()
    refused(pair.against(RECEIVER, server_side=True), "closed")
    thread.join()


def test_an_unknown_verdict(pair: Pair) -> None:
    context = credentials_context(AUTHORITY.issue("db1", ROLES, NOW))

    def client() -> None:
        pair.client.sendall(GREETING)
        pair.client.recv(24)
        with context.wrap_socket(pair.client) as sock:
            sock.sendall(b"?")
            sock.recv(1)

    thread = threading.Thread(target=client)
    thread.start()
    refused(pair.against(RECEIVER, server_side=True), "protocol", "its answer")
    thread.join()


def credentials_context(bundle: bytes) -> ssl.SSLContext:
    """Return the TLS settings of a client that behaves, for one that then does not."""
    loaded = credentials_from(read_bundle(bundle), Path("a.key"), now=NOW)
    assert loaded._contexts is not None
    return loaded._contexts[1]


def test_a_refused_connection_is_not_reset_under_what_the_other_side_still_says(pair: Pair) -> None:
    """It can finish, and read what it was told: a reset would fail its writing, and may overtake the words."""

    def say() -> bytes:
        pair.client.sendall(b"x" * 100_000)
        time.sleep(LINGER / 5)
        pair.client.sendall(b"y")
        time.sleep(LINGER / 5)
        pair.client.sendall(b"z")
        pair.client.shutdown(socket.SHUT_WR)
        return pair.client.recv(100)

    with ThreadPoolExecutor(1) as pool:
        heard = pool.submit(say)
        refused(pair.against(RECEIVER, server_side=True), "stranger")
        assert heard.result() == GREETING


def test_a_refused_connection_is_closed(pair: Pair) -> None:
    pair.secure(RECEIVER, plain("db1"))
    assert pair.client.fileno() == -1
    assert pair.server.fileno() == -1


def test_no_descriptor_is_left(folder: Folder) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        load_credentials(folder.file(AUTHORITY.issue("db1", ROLES, NOW)), name="db1")
        pair = Pair()
        pair.secure(RECEIVER, credentials_of(new_authority(NOW), "db1", SEND))
    assert len(os.listdir("/proc/self/fd")) == before


# -- key files -----------------------------------------------------------------------------------------------


def test_a_bundle_and_what_is_said_of_it(folder: Folder) -> None:
    path = folder.file(new_authority(NOW).issue("DB1.Example.net", ROLES, NOW))
    loaded = load_credentials(path, name="another")
    assert (loaded.name, loaded.roles, loaded.kind, loaded.path) == ("db1.example.net", ROLES, "certificate", path)
    assert loaded.expires is not None
    assert loaded.expires.tzinfo is not None
    assert abs(loaded.expires - NOW - 3653 * DAY) < DAY


def test_a_bundle_in_any_order(pair: Pair, folder: Folder) -> None:
    blocks = re.findall(rb"-----BEGIN.+?-----END [A-Z ]+-----\n", AUTHORITY.issue("db1", ROLES, NOW), re.DOTALL)
    assert len(blocks) == 3
    loaded = load_credentials(folder.file(b"".join(reversed(blocks))), name="x")
    for outcome in pair.secure(RECEIVER, loaded):
        secured(outcome)


def test_a_shared_key_and_what_is_said_of_it(folder: Folder) -> None:
    loaded = folder.shared(b"x" * 32, "DB1")
    assert (loaded.name, loaded.roles, loaded.kind, loaded.expires) == ("db1", ROLES, "shared", None)


def test_no_disk_has_a_copy_of_the_key(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    paths: list[str] = []
    real = ssl.SSLContext.load_cert_chain

    def spy(self: ssl.SSLContext, certfile: str) -> None:
        paths.append(os.readlink(certfile))
        real(self, certfile)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", spy)
    folder.shared(b"x" * 32, "db1")
    assert len(paths) == 2
    assert all(path.startswith("/memfd:") for path in paths)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o777])
@pytest.mark.parametrize("content", [AUTHORITY.issue("db1", ROLES, NOW), new_shared_key(b"x" * 32)])
def test_a_file_that_others_can_read_or_change(folder: Folder, mode: int, content: bytes) -> None:
    path = folder.file(content, mode)
    with pytest.raises(ConfigurationError, match="open to others") as caught:
        load_credentials(path, name="db1")
    assert f"{mode:04o}" in caught.value.why
    assert f"chmod 600 {path}" in caught.value.todo
    path.chmod(0o400)
    assert load_credentials(path, name="db1").name == "db1"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"There is no key file .*/no\.key") as caught:
        load_credentials(tmp_path / "no.key", name="db1")
    assert "backhaul keys" in caught.value.todo


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ConfigurationError, match="is no key file"):
            load_credentials(path, name="db1")


GOOD = AUTHORITY.issue("db1", ROLES, NOW)
OTHER = new_authority(NOW).issue("db1", ROLES, NOW)
KEY, LEAF, CA = re.findall(rb"-----BEGIN.+?-----END [A-Z ]+-----\n", GOOD, re.DOTALL)
OTHER_KEY, OTHER_LEAF, OTHER_CA = re.findall(rb"-----BEGIN.+?-----END [A-Z ]+-----\n", OTHER, re.DOTALL)
SHARED = new_shared_key(b"\xa7" * 32)
LOCKED = serialization.load_pem_private_key(KEY, None).private_bytes(
    serialization.Encoding.PEM,
    serialization.PrivateFormat.PKCS8,
    serialization.BestAvailableEncryption(b"a passphrase"),
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no key, or a damaged one"),
        (b"\xff\x00" * 100, "no key, or a damaged one"),
        (b"x" * (1 << 20) + b"x", "far too large"),
        (LEAF + CA, "no key, or a damaged one"),
        (KEY, "no key, or a damaged one"),
        (GOOD[: len(GOOD) // 2], "no key, or a damaged one"),
        (KEY + LEAF, "1 certificates, and must have 2"),
        (GOOD + OTHER_CA, "3 certificates, and must have 2"),
        (KEY + LEAF + OTHER_CA, "did not sign"),
        (OTHER_KEY + LEAF + CA, "none of its certificates is its private key's"),
        (LOCKED + LEAF + CA, "passphrase"),
        (AUTHORITY.pem(), "authority's own key"),
        (SHARED.replace(b"KEY-1", b"KEY-2"), "another version"),
        (SHARED.replace(b"=", b""), "no base64"),
        (SHARED.replace(b"KEY-1 ", b"KEY-1 AAAA"), "35 bytes instead of 32"),
        (SHARED + SHARED, "2 lines that count"),
        (b"BACKHAUL-SHARED-KEY-1", "0 bytes instead of 32"),
    ],
)
def test_a_file_that_is_damaged(folder: Folder, content: bytes, words: str) -> None:
    path = folder.file(content)
    with pytest.raises(ConfigurationError) as caught:
        load_credentials(path, name="db1")
    error = caught.value
    assert words in str(error)
    assert str(path) in error.what
    assert error.todo
    # Nothing of a secret is said, nor kept by what the error came from.
    secret = base64.b64encode(b"\xa7" * 32)[:12].decode()
    told: BaseException | None = error
    while told is not None:
        assert secret not in f"{told} {getattr(told, 'todo', '')}"
        told = told.__cause__


def test_one_byte_changed_anywhere_is_found_out_or_changes_nothing(folder: Folder) -> None:
    """A bundle with one wrong character is refused, or is the same key still (a line end, a word of no weight)."""
    loaded = 0
    for at in range(0, len(GOOD), 7):
        content = GOOD[:at] + (b"A" if GOOD[at : at + 1] != b"A" else b"B") + GOOD[at + 1 :]
        try:
            bundle = read_bundle(content)
        except (FormatError, ConfigurationError):
            continue
        loaded += 1
        assert bundle == read_bundle(GOOD)
    assert loaded < len(GOOD) // 7 // 10


def test_an_expired_file(folder: Folder) -> None:
    with pytest.raises(ConfigurationError, match="has expired") as caught:
        load_credentials(folder.file(AUTHORITY.issue("db1", frozenset({SEND}), LONG_AGO)), name="db1")
    assert "by the clock of this host" in caught.value.why
    assert "backhaul keys DIR --renew --sender db1" in caught.value.todo


def test_a_file_from_the_future(folder: Folder) -> None:
    with pytest.raises(ConfigurationError, match="not valid yet") as caught:
        load_credentials(folder.file(AUTHORITY.issue("db1", ROLES, NOW + 5 * DAY)), name="db1")
    assert "clock" in caught.value.todo


def test_a_key_is_not_good_for_longer_than_what_made_it() -> None:
    old = new_authority(NOW - 7000 * DAY)
    assert read_bundle(old.issue("db1", ROLES, NOW)).expires == old.expires
    assert old.expires < NOW + 400 * DAY


def test_a_host_whose_own_name_is_none(folder: Folder) -> None:
    with pytest.raises(ConfigurationError, match="can't be called 'db_1'"):
        folder.shared(b"x" * 32, "db_1")


def test_an_authority_read_again(pair: Pair) -> None:
    again = read_authority(AUTHORITY.pem())
    for outcome in pair.secure(RECEIVER, credentials_of(again, "db7", SEND)):
        secured(outcome)
    with pytest.raises(FormatError, match="one host's"):
        read_authority(GOOD)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("db1", "db1"),
        ("DB-1.Example.NET", "db-1.example.net"),
        ("3com.example", "3com.example"),
        ("a" * 63, "a" * 63),
        ("192.0.2.1", "192.0.2.1"),
        ("2001:DB8:0::1", "2001:db8::1"),
    ],
)
def test_names_of_hosts(text: str, name: str) -> None:
    assert host_name(text) == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "db1.",
        ".db1",
        "-db1",
        "db1-",
        "db_1",
        "db 1",
        "db1\n",
        "../db1",
        "a/b",
        "a\0b",
        "dé1",
        "a" * 64,
        ".".join(["a" * 60] * 5),
        "10.0.0.300",
        "1234",
        "fe80::1%eth0",
        "[::1]",
        "root@db1",
        "db1:22",
        "*.example.net",
    ],
)
def test_what_no_host_is_called(text: str) -> None:
    with pytest.raises(UsageError, match="can't be a host's name"):
        host_name(text)


@pytest.mark.parametrize(
    ("uid", "environment", "expected"),
    [
        (0, {"XDG_CONFIG_HOME": "/x"}, "/etc/backhaul/fan-out.key"),
        (1000, {"XDG_CONFIG_HOME": "/x", "HOME": "/home/u"}, "/x/backhaul/fan-out.key"),
        (1000, {"XDG_CONFIG_HOME": "", "HOME": "/home/u"}, "/home/u/.config/backhaul/fan-out.key"),
    ],
)
def test_where_a_key_lies(
    monkeypatch: pytest.MonkeyPatch, uid: int, environment: dict[str, str], expected: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_key_path() == Path(expected)
