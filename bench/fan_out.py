"""One sender, many receivers: ours against the tools that people take, in a network of namespaces.

The payload is incompressible and lies in the page cache; receivers write to /dev/null (uftpd knows files only, and gets
a directory in memory). The receivers wait before the clock starts; it ends when the sender and all receivers have
ended, well. CPU time is that of all their processes, as the kernel told when each was waited for; what bridge and
cables cost is in it where it was done on a process's own time, and not where it was not.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from backhaul.testing.data import random_bytes
from backhaul.testing.network_lab import Host, Lab
from backhaul.transforms.digest import StreamDigest
from bench import data
from bench.pipelines import thread_seconds
from bench.results import Comparison, Line, Results, Run
from bench.runs import FailedError, attempt, machine, today, versions

PORT = 7000
SENDER = "primary"
CABLE = 100_000_000  # bytes a second, where the network is the bottleneck
CABLE_SHARE = 2  # the part of the payload that goes there
TIMEOUT = 600.0
COUNTS = (1, 2, 4, 8)
_SETTLE = 1.0  # seconds for receivers to listen
NETWORK = "plain TCP, one copy over one cable"
PARTS = "the parts alone: TCP, BLAKE3, AES-256-GCM"
_OURS = ["receivers", "good runs", "payload", "wall", "rate", "sent by the sender", "CPU a GB"]
_PEERS = [*_OURS, "rate against {base}"]


class Way(msgspec.Struct, frozen=True):
    """One way: a command for each receiver, and one or several for the sender.

    ``stays``: the receivers are daemons, and are ended after the sender. ``judge`` gets what the sender printed and
    says what is wrong with it, if anything.
    """

    name: str
    receive: Callable[[str], list[str]]
    send: Callable[[Path, list[str]], list[list[str]]]
    stays: bool = False
    judge: Callable[[bytes], str] = lambda _: ""


def peers(scratch: Path) -> list[Way]:
    """Return what people take, with the options that were fastest here without losing anything."""

    def daemon(host: str) -> list[str]:
        place = scratch / host
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return ["uftpd", "-d", "-D", str(place), "-I", "eth0", "-B", "16000000"]

    udp = ["--nokbd", "--no-progress", "--interface", "eth0"]
    mbuffer = ["mbuffer", "-q", "-m", "64M", "-s", "256k"]
    socat = ["socat", "-u", "-b", "262144"]

    return [
        # As it comes, which is full duplex: larger slices, blocks and buffers were no better, or worse. Now and then it
        # drops a receiver, and the sender's exit status is 0 all the same.
        Way(
            "udpcast",
            lambda _: ["udp-receiver", *udp, "--file", "/dev/null"],
            lambda file, hosts: [["udp-sender", *udp, "--min-receivers", str(len(hosts)), "--file", str(file)]],
        ),
        Way(
            "UFTP, unlimited rate",
            daemon,
            lambda file, _: [["uftp", "-q", "-I", "eth0", "-R", "-1", "-B", "16000000", str(file)]],
            stays=True,
        ),
        Way(
            "mbuffer, one TCP stream to each",
            lambda _: [*mbuffer, "-I", str(PORT), "-o", "/dev/null"],
            lambda file, hosts: [
                [*mbuffer, "-i", str(file), *(word for host in hosts for word in ("-O", f"{host}:{PORT}"))]
            ],
        ),
        Way(
            "socat, a TCP copy to each",
            lambda _: [*socat, f"TCP-LISTEN:{PORT}", "OPEN:/dev/null"],
            lambda file, hosts: [[*socat, f"OPEN:{file},rdonly", f"TCP:{host}:{PORT}"] for host in hosts],
        ),
    ]


def ours(scratch: Path) -> list[Way]:
    """Return Backhaul's two ways."""
    backhaul = [sys.executable, "-m", "backhaul"]
    key = scratch / "key"
    if not key.exists():
        subprocess.run([*backhaul, "keys", "--shared", str(key)], stdout=subprocess.DEVNULL, check=True)

    def way(transport: str) -> Way:
        def judge(printed: bytes) -> str:
            # Receivers that multicast does not reach get the chain: that would be another measurement.
            fates = json.loads(printed)["fan_out"]["receivers"]
            others = [fate["name"] for fate in fates if fate.get("transport", "chain") != transport]
            return f"not by {transport}: {', '.join(others)}" if others else ""

        shared = ["--key", str(key), "-q"]
        sender = [*shared, "--json", "--listen", f":{PORT}"]
        return Way(
            f"backhaul, {transport}",
            lambda _: [*backhaul, "receive", "--from", f"{SENDER}:{PORT}", *shared, "-o", "/dev/null"],
            lambda file, hosts: [
                [
                    *backhaul,
                    "send",
                    "--hosts",
                    ",".join(hosts),
                    *sender,
                    "--transport",
                    transport,
                    "--compress",
                    "none",
                    "--from",
                    str(file),
                ]
            ],
            judge=judge,
        )

    return [way("chain"), way("multicast")]


def measured(way: Way, file: Path, receivers: list[str], cable: int | None = None) -> Run:
    """Send a file once, in a network of its own.

    Raises:
        FailedError: a program failed, did not do what was asked, or a receiver's cable carried less than the payload.
    """
    size = file.stat().st_size
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as words, Lab([SENDER, *receivers]) as lab:
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": words}
        hosts: list[Host] = list(lab.hosts.values())
        for host in hosts:
            host.limit(cable)
        waiting = [lab.host(name).start(way.receive(name), **options) for name in receivers]
        time.sleep(_SETTLE)
        start = time.monotonic()
        options["stdout"] = printed
        senders = [lab.host(SENDER).start(command, **options) for command in way.send(file, receivers)]
        cpu = _ended(senders, start, words.fileno())
        wall = time.monotonic() - start
        if way.stays:
            for process in waiting:
                process.terminate()
        cpu += _ended(waiting, start, words.fileno(), fine=not way.stays)
        if not way.stays:
            wall = time.monotonic() - start
        printed.seek(0)
        if wrong := way.judge(printed.read()):
            raise FailedError(wrong)
        short = [host.name for host in hosts[1:] if host.received().bytes < size]
        if short:
            raise FailedError(f"too little came to {', '.join(short)}")
        return Run(wall, cpu, sent=lab.host(SENDER).sent().bytes)


def _ended(processes: Iterable[subprocess.Popen[bytes]], start: float, words: int, *, fine: bool = True) -> float:
    """Wait for programs to end, well if ``fine``; return their CPU seconds, their children's among them."""
    cpu = 0.0
    for process in processes:
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() - start > TIMEOUT:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.005)
        process.returncode = os.waitstatus_to_exitcode(status)
        if fine and process.returncode:
            said = os.pread(words, 4000, 0).decode(errors="replace")
            raise FailedError(f"{process.args!r} ended with status {process.returncode}\n{said}")
        cpu += usage.ru_utime + usage.ru_stime
    return cpu


def compare(
    pairs: list[tuple[Way, int]], file: Path, rounds: int, cable: int | None = None, limits: tuple[str, ...] = ()
) -> list[Line]:
    """Run every way once a round, each with its number of receivers."""
    size = file.stat().st_size
    lines = [Line(way.name, size=size, receivers=count, limit=way.name in limits) for way, count in pairs]
    for number in range(rounds):
        for line, (way, count) in zip(lines, pairs, strict=True):
            receivers = [f"replica{index}" for index in range(1, count + 1)]
            attempt(line, functools.partial(measured, way, file, receivers, cable), f"round {number + 1}")
    return lines


def parts_alone(plain: Line, counts: list[int], cable: int | None) -> list[Line]:
    """Return what the parts that cannot be left out take together, on all cores at once or as long as the cable does.

    ``plain`` is one TCP copy to one receiver, as measured in the same run. The rest is measured here, in one thread,
    by CPU time: the best of five.
    """
    if not plain.runs or not plain.size:
        return []
    piece = next(random_bytes(1 << 20))
    cipher, nonce = AESGCM(bytes(32)), bytes(12)

    def digest() -> None:
        feeder = StreamDigest(crc=False)
        for _ in range(64):
            feeder.feed(piece)

    def seal() -> None:
        for _ in range(64):
            cipher.encrypt(nonce, piece, None)

    share = plain.size / (64 * len(piece))
    in_a_host = sum(min(thread_seconds(job) for _ in range(5)) for job in (digest, seal)) * share
    copy = plain.median("cpu") or 0.0
    cores = len(os.sched_getaffinity(0))
    lines = []
    for count in counts:
        cpu = round(count * copy + (count + 1) * in_a_host, 3)
        wall = max(cpu / cores, plain.size / cable if cable else 0.0)
        lines.append(Line(PARTS, [Run(round(wall, 3), cpu)], limit=True, size=plain.size, receivers=count))
    return lines


def fan_out(directory: Path, size: int, rounds: int) -> Results:
    """Measure fan-out to two receivers against the peers, and ours with one, four and eight."""
    payload = data.incompressible(directory / "payload", size)
    part = data.incompressible(directory / "part", size // CABLE_SHARE)
    scratch = Path(tempfile.mkdtemp(prefix="backhaul-bench-", dir="/dev/shm"))
    comparisons = []
    try:
        known, others = ours(scratch), peers(scratch)
        plain = msgspec.structs.replace(others[-1], name=NETWORK)
        for name, cables, file, cable in (
            ("open", "cables without a limit", payload, None),
            ("limited", f"{CABLE / 1e6:.0f} MB/s on each cable in each direction", part, CABLE),
        ):
            print(f"fan-out to two receivers, {cables}", file=sys.stderr)
            pairs = [*((way, 2) for way in (*known, *others)), (plain, 1)]
            two = compare(pairs, file, rounds, cable, (NETWORK,))
            two += parts_alone(two[-1], [2], cable)
            comparisons.append(Comparison(f"{name}-two", f"To two receivers, {cables}", _PEERS, two, others[0].name))
            print(f"more receivers, {cables}", file=sys.stderr)
            # Copies of their own for each receiver show what one after the other costs; on a cable it is its rate by n.
            ways = known if cable else [*known, others[-1]]
            pairs = [(way, count) for way in ways for count in COUNTS if count != 2]
            more = compare(pairs, file, max(1, rounds // 2), cable)
            more += [line for line in two if line.name in {way.name for way in ways} or line.name == NETWORK]
            more += parts_alone(next(line for line in two if line.name == NETWORK), list(COUNTS), cable)
            order = [*(way.name for way in ways), NETWORK, PARTS]
            more.sort(key=lambda line: (order.index(line.name), line.receivers))
            comparisons.append(Comparison(f"{name}-more", f"To more receivers, {cables}", _OURS, more))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    fewer = max(1, rounds // 2)
    return Results(
        area="fan-out",
        date=today(),
        machine=machine(),
        conditions=f"random bytes; medians of {rounds} alternating rounds, with more receivers of {fewer}",
        comparisons=comparisons,
        versions=versions("udp-sender", "uftp", "mbuffer", "socat"),
    )
