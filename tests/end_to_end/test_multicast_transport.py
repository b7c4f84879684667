"""The multicast transport over real sockets: in a laboratory's hosts, and in this process over the loopback."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from backhaul.formats.chunk import DATAGRAM, DATAGRAM_SIZE, PIECE_SIZE, PROBE
from backhaul.model.reception import Gap
from backhaul.network.multicast_loop import MulticastLoop
from backhaul.network.multicast_receiver import MulticastReceiver
from backhaul.network.multicast_sender import MulticastSender
from backhaul.pipeline.supervisor import Supervisor
from backhaul.planning.assembly import piece_count
from backhaul.planning.pace import Pace
from backhaul.testing.network_lab import BadSwitch, Lab
from backhaul.transforms.datagram_proof import DatagramProof
from backhaul.transforms.seal import SessionKeys
from tests.end_to_end.multicast_host import KEYS, PROBES, TOKEN, ListLog, Outcome, Settings, digest, sealed

# The module is found from there, wherever another test may have gone.
ROOT = Path(__file__).parents[2]
MODULE = [sys.executable, "-m", "tests.end_to_end.multicast_host"]
SMALL: dict[str, Any] = {"chunks": 30, "sizes": (1, 400_000), "rate": 4e6, "limit": 8e6}


def run(lab: Lab, beside: Callable[[], None] = lambda: None, **settings: Any) -> tuple[Outcome, list[Outcome]]:
    """Run a session from the first host to the others; check that all have the same."""
    sender, *receivers = lab.hosts.values()

    def start(host: Any, **more: Any) -> subprocess.Popen[bytes]:
        words = msgspec.json.encode(Settings(address=host.address, **more, **settings)).decode()
        process: subprocess.Popen[bytes] = host.start([*MODULE, words], stdout=subprocess.PIPE, cwd=ROOT)
        return process

    processes = [start(sender, receivers=tuple(host.address for host in receivers))]
    processes += [start(host, sender=sender.address) for host in receivers]
    beside()
    outcomes = [msgspec.json.decode(process.communicate(timeout=200)[0], type=Outcome) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    right = digest(Settings(address="", **settings))
    sent, *received = outcomes
    for outcome in received:
        assert outcome.digest == right
        assert outcome.bytes == sent.bytes
        assert outcome.most_used <= Settings(address="", **settings).memory
    return sent, received


def pieces_of(settings: dict[str, Any]) -> int:
    return sum(piece_count(len(chunk)) for chunk in sealed(Settings(address="", **settings)))


def test_without_loss_everything_is_sent_once() -> None:
    settings: dict[str, Any] = {"chunks": 60, "sizes": (1, 3_000_000), "rate": 50e6, "limit": 200e6}
    with Lab(["sender", "one", "two", "three"]) as lab:
        before = lab.host("sender").sent()
        sent, received = run(lab, **settings)
        wire = lab.host("sender").sent() - before
    assert sent.sent is not None
    assert sent.sent.repairs_to_group == sent.sent.repairs_to_one == sent.sent.unsent == 0
    assert sent.lost == (0, 0, 0)
    # Beside the pieces there are the probes and now and then the highest number. Nothing is there for each receiver.
    pieces = pieces_of(settings)
    assert pieces <= sent.sent.datagrams - PROBES <= pieces + 100
    assert sent.bytes < sent.sent.bytes < 1.02 * sent.bytes
    assert wire.bytes < 1.06 * sent.bytes  # with the headers of Ethernet, IP and UDP, and the control connections
    for outcome in received:
        assert outcome.taken is not None
        assert outcome.taken.duplicates == outcome.taken.foreign == outcome.taken.malformed == outcome.over_tcp == 0
        assert outcome.probes == PROBES


HARMS = {
    "loss 1%": BadSwitch(loss=0.01),
    "loss 10%": BadSwitch(loss=0.1),
    "duplicates": BadSwitch(duplicate=0.2),
    "reordered": BadSwitch(reorder=0.1),
    "truncated": BadSwitch(truncate=0.03),
    "corrupted": BadSwitch(corrupt=0.0005),
    "everything": BadSwitch(loss=0.03, duplicate=0.05, reorder=0.05, truncate=0.01, corrupt=0.0003),
}


@pytest.mark.parametrize("harm", HARMS)
def test_harm_is_made_good(harm: str) -> None:
    with Lab(["sender", "one", "two"], HARMS[harm]) as lab:
        sent, received = run(lab, **SMALL)
        harms = lab.harms()
    assert sent.sent is not None
    repairs = sent.sent.repairs_to_group + sent.sent.repairs_to_one
    lost = sum(harms[name].loss + harms[name].truncate for name in ("one", "two"))
    taken = [outcome.taken for outcome in received if outcome.taken is not None]
    if harm.startswith("loss"):
        assert repairs > 0
        # What is lost comes once more, but for the few that wait for a report of their own.
        assert repairs <= 1.5 * lost + 50
    if harm == "duplicates":
        assert all(one.duplicates > 0 for one in taken)
        assert sent.over_tcp == 0
    if harm == "truncated":
        assert sum(one.malformed + one.foreign for one in taken) > 0
    if harm == "corrupted":
        # A flipped bit in a header is a foreign datagram, in a piece it damages the chunk, which then comes over TCP.
        assert sum(one.damaged for one in taken) == sent.over_tcp == sum(outcome.over_tcp for outcome in received)
    if "corrupt" not in harm and harm != "everything":
        assert sent.over_tcp == 0


def test_parity_makes_losses_good_without_repairs() -> None:
    # With one receiver each repair is for one that is missing: parity leaves few of them.
    with Lab(["sender", "one"], BadSwitch(loss=0.01)) as lab:
        sent, _ = run(lab, **SMALL, parity=8)
        lost = lab.harms()["one"].loss
    assert sent.sent is not None
    assert lost > 20
    assert sent.sent.repairs_to_group + sent.sent.repairs_to_one < lost / 2


def test_what_all_miss_is_repaired_once_and_the_rate_finds_the_line() -> None:
    """The sender's own line is the narrow one: what its queue drops, no receiver has."""
    settings: dict[str, Any] = {"chunks": 150, "sizes": (300_000, 500_000), "rate": 80e6}
    with Lab(["sender", "one", "two", "three"]) as lab:
        lab.host("sender").limit(20_000_000)
        sent, _ = run(lab, **settings)
    assert sent.sent is not None
    repairs = sent.sent
    assert repairs.repairs_to_group > 0
    assert repairs.repairs_to_one <= 0.1 * repairs.repairs_to_group
    assert repairs.repairs_to_group <= 1.5 * max(sent.lost) + 100
    assert sent.rate < 40e6


def test_a_slow_receiver_is_repaired_alone() -> None:
    """One receiver's line is the narrow one: the others get nothing twice."""
    settings: dict[str, Any] = {"chunks": 60, "sizes": (300_000, 500_000), "rate": 40e6}
    with Lab(["sender", "one", "two"]) as lab:
        lab.host("two").limit(10_000_000)
        sent, (one, _) = run(lab, **settings)
    assert sent.sent is not None and one.taken is not None
    assert sent.sent.repairs_to_one > 0
    assert one.taken.duplicates <= sent.sent.repairs_to_group


def test_a_forged_flood_spoils_nothing() -> None:
    settings = Settings(address="", **SMALL)
    chunks = sealed(settings)
    proof = DatagramProof(KEYS)
    stranger = DatagramProof(SessionKeys(session=bytes(16), key=b"x" * 32, signer=bytes(32)))
    numbers = random.Random(3)

    def forged() -> Iterator[bytes]:
        while True:
            number = numbers.randrange(len(chunks))
            size = len(chunks[number])
            place = numbers.randrange(piece_count(size)).to_bytes(2, "big")
            junk = numbers.randbytes(PIECE_SIZE)
            # Someone who knows nothing: wrong proofs, giant chunks, chunks far ahead.
            yield stranger.prefix(number, size) + place + junk
            yield stranger.prefix(number, (1 << 32) - 1) + place + junk
            yield stranger.prefix((1 << 32) - 1 - number, size) + place + junk
            yield numbers.randbytes(numbers.randrange(1, DATAGRAM_SIZE))
            # Someone who has seen a datagram of chunk 0: its other pieces, pieces that it doesn't have.
            if number == 0:
                yield proof.prefix(number, size) + place + junk[: numbers.randrange(PIECE_SIZE + 1)]
                yield proof.prefix(number, size) + b"\xff\xff" + junk
                yield proof.prefix(number, size) + place + junk

    with Lab(["sender", "one", "two"], BadSwitch(loss=0.01)) as lab:
        over = threading.Event()

        def flood() -> None:
            for count, datagram in enumerate(forged()):
                if over.is_set():
                    return
                to = ("one", "two")[count % 2]
                time.sleep(0.0005)  # some for each datagram of the session, and room for those
                lab.forge(to, datagram, source=("sender", 4321), destination=(settings.group, settings.port))

        thread = threading.Thread(target=flood)
        try:
            sent, received = run(lab, thread.start, **SMALL)
        finally:
            over.set()
            thread.join()
    # Only the chunk whose datagrams the forger has seen had to come over TCP.
    assert sent.over_tcp <= 2
    for outcome in received:
        assert outcome.taken is not None
        assert outcome.taken.foreign > 100


# -- in this process -----------------------------------------------------------------------------------------

GROUP, ADDRESS = "239.77.0.9", "127.0.0.1"


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind((ADDRESS, 0))
        port: int = probe.getsockname()[1]
        return port


class Here:
    """A receiver on the loopback, in a thread."""

    def __init__(self, group: Supervisor, port: int, keys: SessionKeys = KEYS, **options: Any) -> None:
        self.chunks: dict[int, bytes] = {}
        self.receiver = MulticastReceiver(
            keys, interface=ADDRESS, group=GROUP, port=port, on_chunk=self._take, **options
        )
        group.start(lambda: self.receiver.run(group), "receive")

    def _take(self, number: int, chunk: bytearray) -> None:
        assert number not in self.chunks
        self.chunks[number] = bytes(chunk)


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def sender_to(port: int, keys: SessionKeys = KEYS) -> Iterator[MulticastSender]:
    sender = MulticastSender(keys, interface=ADDRESS, group=GROUP, port=port)
    try:
        yield sender
    finally:
        sender.close()


def ended(group: Supervisor, *heres: Here) -> None:
    group.stop()
    assert group.join(10)
    for here in heres:
        here.receiver.close()


def test_two_sessions_share_a_port() -> None:
    port = free_port()
    other = SessionKeys(session=bytes(16), key=b"o" * 32, signer=bytes(32))
    chunks = [random.Random(number).randbytes(200_000 + number) for number in range(4)]
    with Supervisor() as group, sender_to(port) as ours, sender_to(port, other) as theirs:
        mine, foreign = Here(group, port), Here(group, port, other)
        ours.probe(TOKEN, 3)
        for number, chunk in enumerate(chunks):
            ours.send(number, bytearray(chunk))
            theirs.send(number, bytearray(chunk[::-1]))
        eventually(lambda: len(mine.chunks) == len(foreign.chunks) == 4)
        assert mine.receiver.probes(TOKEN) == 3
        assert foreign.receiver.probes(TOKEN) == 0
        ended(group, mine, foreign)
    assert [mine.chunks[number] for number in range(4)] == chunks
    assert [foreign.chunks[number] for number in range(4)] == [chunk[::-1] for chunk in chunks]
    assert mine.receiver.taken.foreign == piece_count(200_000) * 4
    assert foreign.receiver.taken.foreign == piece_count(200_000) * 4 + 3


def test_a_repair_to_one_and_the_loss_of_the_last() -> None:
    port = free_port()
    chunk = bytearray(random.Random(1).randbytes(20 * PIECE_SIZE - 7))
    with Supervisor() as group, sender_to(port) as sender:
        here = Here(group, port)
        # Of chunk 0 comes a little, of chunk 1 nothing; what follows is only the word that both were sent.
        sender.repair(0, chunk, (3, 4, 19))
        assert here.receiver.reception().missing == ()
        sender.highest(1)
        told = (Gap(0, ((0, 3), (5, 14))), Gap(1))

        def is_told() -> bool:
            time.sleep(0.01)
            return here.receiver.reception().missing == told

        eventually(is_told)
        reception = here.receiver.reception()
        assert (reception.next, reception.judged, reception.lost) == (0, 2, 17 + 20)
        assert here.receiver.reception(1).missing == (Gap(0, ((0, 3),)),)
        to = (ADDRESS, here.receiver.own_port)
        sender.repair(0, chunk, (0, 1, 2, *range(5, 19)), to)
        sender.repair(1, chunk, tuple(range(20)), to)
        sender.repair(1, chunk, tuple(range(20)), to)
        eventually(lambda: len(here.chunks) == 2 and here.receiver.taken.duplicates == 20)
        assert here.chunks == {0: chunk, 1: chunk}
        assert sender.sent.repairs_to_one == 57 and sender.sent.repairs_to_group == 3
        # One of them was not as it was sealed; until it came another way it is told, and not taken.
        here.receiver.refetch(0)
        assert here.receiver.reception().damaged == (0,)
        sender.send(0, chunk)
        eventually(lambda: here.receiver.taken.duplicates == 40)
        here.receiver.complete(0)
        here.receiver.set_next(2)
        assert not here.receiver.reception().damaged and not here.receiver.reception().missing
        ended(group, here)


def test_a_chunk_ahead_and_one_too_large_take_no_memory() -> None:
    port = free_port()
    chunk = bytearray(50 * PIECE_SIZE)
    with Supervisor() as group, sender_to(port) as sender:
        here = Here(group, port, window=4, memory=60 * PIECE_SIZE)
        sender.send(4, chunk)
        sender.repair(3, chunk, (0,))
        sender.repair(2, chunk, (0,))  # no room beside the other
        sender.send(0, chunk)  # the next one has it
        eventually(lambda: len(here.chunks) == 1)
        eventually(lambda: here.receiver.taken.outside == 51)
        assert here.receiver.used == 0
        ended(group, here)


def test_a_loop_ends_when_it_is_stopped_and_names_the_slowest() -> None:
    port = free_port()
    chunks = [bytearray(1_000_000) for _ in range(200)]
    with Supervisor() as group, sender_to(port) as sender:
        here = Here(group, port)
        addresses = {0: (ADDRESS, here.receiver.own_port), 1: (ADDRESS, 9)}
        loop = MulticastLoop(sender, ListLog(chunks), addresses, pace=Pace(500e6), window_bytes=5_000_000)
        loop.end(len(chunks))
        thread = group.start(lambda: loop.run(group), "send")

        def held() -> bool:
            here.receiver.set_next(len(here.chunks))
            loop.report(0, here.receiver.reception())
            return loop.held_up is not None and loop.held_up[0] == 1

        eventually(held)
        assert len(here.chunks) <= 5  # the window of the one that is silent holds
        loop.remove(1)
        eventually(lambda: held() or len(here.chunks) > 20)
        ended(group, here)
        assert not thread.is_alive() and not loop.finished


def test_foreign_and_short_datagrams_are_counted() -> None:
    port = free_port()
    with Supervisor() as group, sender_to(port) as sender:
        here = Here(group, port)
        to = (GROUP, port)
        for size in (0, 1, DATAGRAM.size - 1, DATAGRAM.size, PROBE.size, DATAGRAM_SIZE, 9000, 60_000):
            sender._send_single([bytes(size)], to)
        probe = DatagramProof(KEYS).probe(TOKEN, 0)
        sender._send_single([probe[:-1]], to)
        for token in range(40):
            sender._send_single([DatagramProof(KEYS).probe(token.to_bytes(16, "big"), 0)], to)
        eventually(lambda: here.receiver.taken.datagrams >= 40 + 8)
        counted = here.receiver.taken
        assert counted.foreign >= 8 + 40 - 16
        assert counted.duplicates == counted.malformed == counted.outside == 0
        ended(group, here)
    assert json.loads(msgspec.json.encode(counted))["damaged"] == 0
