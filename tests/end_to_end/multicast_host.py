"""One host of a multicast, as a process of its own: ``python -m tests.end_to_end.multicast_host SETTINGS``.

The sender's part or a receiver's, with a TCP connection between them that stands in for the real one: reports one way,
damaged chunks and the end the other way. What became of it is a line of JSON on stdout.
"""

from __future__ import annotations

import random
import resource
import socket
import struct
import sys
import threading
import time

import msgspec
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from backhaul.errors import IntegrityError
from backhaul.model.reception import Reception
from backhaul.network.multicast_loop import MulticastLoop
from backhaul.network.multicast_receiver import MEMORY, MulticastReceiver, Taken
from backhaul.network.multicast_sender import MulticastSender, Sent
from backhaul.pipeline.supervisor import Supervisor
from backhaul.planning.pace import Pace
from backhaul.transforms.seal import Opener, Sealer, SessionKeys

CONTROL_PORT = 7001
REPORT_SECONDS = 0.01
_LENGTH = struct.Struct(">IQ")
PROBES = 8
TOKEN = b"0123456789abcdef"
SIGNER = Ed25519PrivateKey.from_private_bytes(bytes(32))
KEYS = SessionKeys(
    session=bytes(range(16)),
    key=bytes(range(32)),
    signer=SIGNER.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw),
)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """``receivers`` are their addresses, for the sender; ``sender`` its address, for a receiver."""

    address: str
    receivers: tuple[str, ...] = ()
    sender: str = ""
    group: str = "239.77.0.1"
    port: int = 7000
    chunks: int = 50
    sizes: tuple[int, int] = (1 << 20, 1 << 20)
    distinct: int = 1_000_000
    rate: float = 30e6
    limit: float | None = None
    parity: int = 0
    memory: int = MEMORY
    loop: bool = False


class Outcome(msgspec.Struct, kw_only=True):
    """``digest`` is the BLAKE3 of all opened chunks in their order; ``cpu`` is in seconds, from start to end."""

    digest: str = ""
    bytes: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    sent: Sent | None = None
    taken: Taken | None = None
    rate: float = 0.0
    over_tcp: int = 0
    most_used: int = 0
    probes: int = 0
    buffer: int = 0
    lost: tuple[int, ...] = ()


def sealed(settings: Settings) -> list[bytearray]:
    """Return the session's chunks: the same for the same settings."""
    numbers = random.Random(settings.chunks)
    sealer = Sealer(KEYS, SIGNER)
    bodies: list[bytes] = []
    chunks = []
    for number in range(settings.chunks):
        if number < settings.distinct:
            bodies.append(numbers.randbytes(numbers.randint(*settings.sizes)))
        body = bodies[number % len(bodies)]
        chunks.append(sealer.data(0, body, len(body)))
    return chunks


def digest(settings: Settings) -> str:
    """Return what every receiver's digest must be."""
    opener = Opener(KEYS)
    whole = blake3()
    for chunk in sealed(settings):
        whole.update(opener.open(opener.header(chunk), chunk))
    return whole.hexdigest()


class ListLog:
    """A log that has everything."""

    def __init__(self, chunks: list[bytearray]) -> None:
        self._chunks = chunks

    def wait(self, number: int, timeout: float) -> bool:
        if number < len(self._chunks):
            return True
        time.sleep(timeout)
        return False

    def get(self, number: int) -> bytearray:
        return self._chunks[number]


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def send(settings: Settings) -> Outcome:
    chunks = sealed(settings)
    sender = MulticastSender(
        KEYS,
        interface=settings.address,
        group=settings.group,
        port=settings.port,
        loop=settings.loop,
        parity=settings.parity,
    )
    outcome = Outcome(bytes=sum(map(len, chunks)))
    last: dict[int, Reception] = {}
    with socket.create_server((settings.address, CONTROL_PORT)) as server:
        server.settimeout(60)
        links = [server.accept()[0] for _ in settings.receivers]
    files = [link.makefile("rwb") for link in links]
    hellos = [msgspec.json.decode(file.readline()) for file in files]
    sender.rate = settings.rate
    sender.probe(TOKEN, PROBES)
    lock = threading.Lock()

    def over_tcp(member: int, number: int) -> None:
        with lock:
            outcome.over_tcp += 1
            links[member].sendall(_LENGTH.pack(len(chunks[number]), number) + chunks[number])

    loop = MulticastLoop(
        sender,
        ListLog(chunks),
        {index: (address, port) for index, (address, port) in enumerate(hellos)},
        pace=Pace(settings.rate, settings.limit),
        on_damaged=over_tcp,
    )
    loop.end(len(chunks))
    started, cpu = time.monotonic(), _cpu()
    with Supervisor() as group:

        def listen(index: int) -> None:
            while line := files[index].readline():
                last[index] = msgspec.json.decode(line, type=Reception)
                loop.report(index, last[index])

        for index in range(len(links)):
            threading.Thread(target=listen, args=(index,), daemon=True).start()
        group.start(lambda: loop.run(group), "multicast")
    outcome.seconds, outcome.cpu = time.monotonic() - started, _cpu() - cpu
    assert loop.finished
    for link in links:
        link.shutdown(socket.SHUT_WR)
    outcome.sent = sender.sent
    outcome.rate = loop.rate
    outcome.lost = tuple(last[index].lost for index in sorted(last))
    sender.close()
    return outcome


def _connect(settings: Settings) -> socket.socket:
    deadline = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection((settings.sender, CONTROL_PORT), 1, (settings.address, 0))
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def receive(settings: Settings) -> Outcome:
    opener = Opener(KEYS)
    outcome = Outcome()
    whole = blake3()
    early: dict[int, memoryview] = {}
    changed = threading.Event()
    lock = threading.Lock()
    next_ = 0
    ended = False
    light = settings.distinct < settings.chunks  # a measurement: what is opened is dropped

    def on_chunk(number: int, data: bytearray) -> None:
        nonlocal next_
        try:
            header = opener.header(data)
            if header.number != number or header.size != len(data):
                raise IntegrityError("Another chunk", "", "")
            opened = opener.open(header, data)
        except IntegrityError:
            receiver.refetch(number)
            changed.set()
            return
        outcome.most_used = max(outcome.most_used, receiver.used)
        with lock:
            if number < next_ or number in early:
                raise AssertionError(f"chunk {number} came twice")
            outcome.bytes += len(data)
            early[number] = opened[:0] if light else opened
            while next_ in early:
                whole.update(early.pop(next_))
                next_ += 1
            receiver.set_next(next_)
        changed.set()

    receiver = MulticastReceiver(
        KEYS,
        interface=settings.address,
        group=settings.group,
        port=settings.port,
        on_chunk=on_chunk,
        parity=settings.parity,
        memory=settings.memory,
    )
    outcome.buffer = receiver.receive_buffer
    link = _connect(settings)
    link.settimeout(None)
    file = link.makefile("rb")
    link.sendall(msgspec.json.encode((settings.address, receiver.own_port)) + b"\n")
    cpu = _cpu()

    def listen() -> None:
        nonlocal ended
        while head := file.read(_LENGTH.size):
            size, number = _LENGTH.unpack(head)
            data = bytearray(file.read(size))
            outcome.over_tcp += 1
            receiver.complete(number)
            on_chunk(number, data)
        ended = True
        group.stop()

    def report() -> None:
        while not ended:
            changed.wait(REPORT_SECONDS)
            changed.clear()
            try:
                link.sendall(msgspec.json.encode(receiver.reception()) + b"\n")
            except OSError:
                return
            time.sleep(REPORT_SECONDS / 2)

    with Supervisor() as group:
        group.start(listen, "listen")
        group.start(report, "report")
        group.start(lambda: receiver.run(group), "receive")
    outcome.cpu = _cpu() - cpu
    outcome.digest = whole.hexdigest()
    outcome.taken = receiver.taken
    outcome.probes = receiver.probes(TOKEN)
    receiver.close()
    return outcome


def main() -> None:
    settings = msgspec.json.decode(sys.argv[1], type=Settings)
    outcome = send(settings) if settings.receivers else receive(settings)
    sys.stdout.buffer.write(msgspec.json.encode(outcome) + b"\n")


if __name__ == "__main__":
    main()
