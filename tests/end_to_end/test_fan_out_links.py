"""Links over real sockets, with somebody on the way: bytes that are changed, recorded and sent again, or made up."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from backhaul.formats.chunk import HEADER_SIZE, LINK_ANSWER, LINK_HELLO, LINK_MAGIC, Header
from backhaul.model.fan_out import Member
from backhaul.network.links import Feeder, Intake
from backhaul.pipeline.chunk_log import ChunkLog, LogClosedError
from backhaul.pipeline.recycler import Recycler
from backhaul.transforms.seal import Sealer, SessionKeys
from tests.end_to_end.fan_out_hosts import until

pytestmark = pytest.mark.timeout(60)
SIGNER = Ed25519PrivateKey.generate()


def new_keys() -> SessionKeys:
    return SessionKeys(os.urandom(16), os.urandom(32), SIGNER.public_key().public_bytes_raw())


class Receiving:
    """A successor's intake, and the log that it fills as a receiver does."""

    def __init__(self, keys: SessionKeys) -> None:
        self.log = ChunkLog(64 << 20)
        self.changes: list[tuple[int | None, str]] = []
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.intake = Intake(listener, keys, lambda: self.log.end, self.take, self.changed, Recycler(1 << 20))
        self.intake.start()

    def changed(self, index: int | None, reason: str) -> None:
        self.changes.append((index, reason))

    def take(self, header: Header, data: bytearray, body: memoryview) -> None:
        if header.number == self.log.end:
            self.log.append(data)

    def member(self, port: int | None = None) -> Member:
        return Member(index=0, name="r", address="127.0.0.1", port=port or self.port)


class Proxy:
    """Passes a connection on, keeps what the client said, and changes one byte of it where it is told to.

    What the client says after so many bytes as ``hold`` stays here until ``go`` is set.
    """

    def __init__(self, port: int) -> None:
        self.said = bytearray()
        self.flip: int | None = None
        self.hold: int | None = None
        self.go = threading.Event()
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            self._open += [near, far]
            threading.Thread(target=self._pass, args=(near, far, True), daemon=True).start()
            threading.Thread(target=self._pass, args=(far, near, False), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, forth: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := bytearray(source.recv(100_000)):
                if forth:
                    if self.flip is not None and len(self.said) <= self.flip < len(self.said) + len(piece):
                        piece[self.flip - len(self.said)] ^= 0x10
                        self.flip = None
                    kept = len(self.said) + len(piece) - self.hold if self.hold is not None else 0
                    self.said += piece
                    if kept > 0:
                        target.sendall(piece[: max(0, len(piece) - kept)])
                        self.go.wait()
                        piece = piece[max(0, len(piece) - kept) :]
                target.sendall(piece)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.go.set()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


class World:
    def __init__(self) -> None:
        self.keys = new_keys()
        self.log = ChunkLog(64 << 20)
        sealer, chaos = Sealer(self.keys, SIGNER), random.Random(3)
        for _ in range(12):
            self.log.append(sealer.data(0, chaos.randbytes(chaos.randrange(300_000)), 1))
        self.closing: list[Callable[[], None]] = [self.log.close]

    def receiving(self, keys: SessionKeys | None = None) -> Receiving:
        receiving = Receiving(keys or self.keys)
        self.closing += [receiving.intake.stop, receiving.log.close]
        return receiving

    def proxy(self, receiving: Receiving) -> Proxy:
        proxy = Proxy(receiving.port)
        self.closing.append(proxy.close)
        return proxy

    def feed(self, member: Member, keys: SessionKeys | None = None) -> list[str]:
        """Begin to feed a successor, again each time the link breaks; return why it broke, as it does."""
        broken: list[str] = []

        def down(feeder: Feeder, reason: str, gone: bool) -> None:
            assert not gone
            broken.append(reason)
            if len(broken) < 5:
                begin()

        def begin() -> None:
            feeder = Feeder(self.log, member, keys or self.keys, -1, down)
            self.closing.append(feeder.stop)
            feeder.start()

        begin()
        return broken

    def assert_same(self, receiving: Receiving) -> None:
        until(lambda: receiving.log.end == self.log.end, "all chunks")
        assert [receiving.log.get(n) for n in range(self.log.end)] == [self.log.get(n) for n in range(self.log.end)]


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    for close in reversed(world.closing):
        with contextlib.suppress(LogClosedError):
            close()


def test_chunks_are_passed_on_as_they_are(world: World) -> None:
    receiving = world.receiving()
    broken = world.feed(receiving.member())
    world.assert_same(receiving)
    assert broken == []
    assert receiving.changes == [(-1, "")]
    assert receiving.intake.upstream == -1


def test_half_a_chunk_is_progress(world: World) -> None:
    """Over a slow line a chunk takes longer than a link that brings nothing is waited for: its bytes are counted."""
    receiving = world.receiving()
    proxy = world.proxy(receiving)
    # The first chunks, and half of the last one.
    whole = LINK_HELLO.size + 32 + sum(len(world.log.get(number)) for number in range(world.log.end))
    half = len(world.log.get(world.log.end - 1)) // 2
    proxy.hold = whole - half
    broken = world.feed(receiving.member(proxy.port))
    until(lambda: receiving.log.end == world.log.end - 1, "all chunks but the last")
    counted = sum(len(world.log.get(number)) - HEADER_SIZE for number in range(world.log.end))
    until(lambda: receiving.intake.received == counted - half, "half of the last chunk")
    assert receiving.log.end == world.log.end - 1
    proxy.go.set()
    world.assert_same(receiving)
    assert broken == []


@pytest.mark.parametrize("where", ["hello", "proof", "header", "body", "tag", "number", "last"])
def test_a_changed_byte_costs_a_link_and_nothing_else(world: World, where: str) -> None:
    receiving = world.receiving()
    proxy = world.proxy(receiving)
    opening = LINK_HELLO.size + 32
    third = opening + len(world.log.get(0)) + len(world.log.get(1))
    size = len(world.log.get(2))
    whole = opening + sum(len(world.log.get(number)) for number in range(world.log.end))
    proxy.flip = {
        "hello": 25,
        "proof": LINK_HELLO.size + 3,
        "header": third + 1,
        "body": third + size // 2,
        "tag": third + size - 1,
        "number": third + 23,
        "last": whole - 1,
    }[where]
    broken = world.feed(receiving.member(proxy.port))
    world.assert_same(receiving)
    assert proxy.flip is None
    assert len(broken) == 1


def test_a_link_that_was_recorded_is_none(world: World) -> None:
    """Sent again to the same receiver, to another of the session, or to one of the next session."""
    receiving = world.receiving()
    proxy = world.proxy(receiving)
    world.feed(receiving.member(proxy.port))
    world.assert_same(receiving)
    others = [receiving, world.receiving(), world.receiving(new_keys())]
    for other in others:
        before, changes = other.log.end, list(other.changes)
        with socket.create_connection(("127.0.0.1", other.port), timeout=20) as replay:
            # (It may close before it has taken all of that.)
            with contextlib.suppress(OSError):
                replay.sendall(proxy.said)
            with contextlib.suppress(OSError):
                while replay.recv(1000):
                    pass
        assert (other.log.end, other.changes) == (before, changes)
    # The link that was open goes on.
    world.log.append(more(world, 12))
    world.assert_same(receiving)


def more(world: World, number: int) -> bytearray:
    sealer = Sealer(world.keys, SIGNER)
    sealer.number = number
    return sealer.data(0, b"more", 4)


def test_whoever_does_not_know_the_key_feeds_nobody(world: World) -> None:
    receiving = world.receiving()
    # The session is no secret, and its key is.
    stranger = SessionKeys(world.keys.session, os.urandom(32), world.keys.signer)
    broken = world.feed(receiving.member(), stranger)
    until(lambda: len(broken) == 5)
    assert receiving.changes == []
    assert receiving.log.end == 0
    # And nobody is fed who does not know it: nothing of the stream goes there.
    strange = world.receiving(stranger)
    proxy = world.proxy(strange)
    broken = world.feed(strange.member(proxy.port))
    until(lambda: len(broken) == 5)
    assert "does not know the session's key" in broken[0]
    assert len(proxy.said) == 5 * LINK_HELLO.size
    assert strange.log.end == 0


def test_one_that_only_knocks_does_not_end_the_link_that_is_open(world: World) -> None:
    receiving = world.receiving()
    broken = world.feed(receiving.member())
    world.assert_same(receiving)
    hello = LINK_HELLO.pack(LINK_MAGIC, world.keys.session, 3, os.urandom(16))
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n" + bytes(60), hello, hello + bytes(32), hello + os.urandom(2000)):
        # (It may close before it has taken all of that.)
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", receiving.port), timeout=20) as knock:
            knock.sendall(words)
            knock.shutdown(socket.SHUT_WR)
            while knock.recv(LINK_ANSWER.size):
                pass
    world.log.append(more(world, 12))
    world.assert_same(receiving)
    assert broken == []
    assert receiving.changes == [(-1, "")]


def test_a_newer_link_takes_over(world: World) -> None:
    """Two at once, over and over, bring each chunk once and in order."""
    receiving = world.receiving()
    downs: list[str] = []
    feeders = [
        Feeder(world.log, receiving.member(), world.keys, index, lambda feeder, reason, gone: downs.append(reason))
        for index in range(6)
    ]
    for feeder in feeders:
        world.closing.append(feeder.stop)
        feeder.start()
    world.assert_same(receiving)
    until(lambda: len(downs) == 5, "the end of all links but one")
    world.log.append(more(world, 12))
    world.assert_same(receiving)


def test_a_chunk_of_another_session_ends_the_link(world: World) -> None:
    """From a member whose key is right: it passes on what the sender did not seal for this session."""
    receiving = world.receiving()
    world.log.close()
    other = new_keys()
    log = ChunkLog(1 << 20)
    log.append(Sealer(other, SIGNER).data(0, b"of another", 10))
    world.closing.append(log.close)
    downs: list[str] = []
    feeder = Feeder(log, receiving.member(), world.keys, 2, lambda feeder, reason, gone: downs.append(reason))
    world.closing.append(feeder.stop)
    feeder.start()
    until(lambda: len(receiving.changes) == 2)
    assert receiving.changes[0] == (2, "")
    assert "another session" in receiving.changes[1][1]
    assert receiving.log.end == 0
