"""One sender, many receivers: ours against the tools that people take, in a network of namespaces.

The payload is incompressible and lies in the page cache; receivers write to /dev/null (uftpd knows files only, and gets
a directory in memory). The receivers wait before the clock starts; it ends when the sender and all receivers have
ended, well. CPU time is that of all their processes, as the kernel told when each was waited for; what bridge and
cables cost is in it where it was done on a process's own time, and not where it was not.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from backhaul.formats.quantities import format_size
from backhaul.testing.network_lab import Host, Lab

PORT = 7000
SENDER = "primary"
CABLE = 100_000_000  # bytes a second, where the network is the bottleneck
CABLE_SHARE = 2  # the part of the payload that goes there
TIMEOUT = 600.0
_SETTLE = 1.0  # seconds for receivers to listen


class FailedError(Exception):
    """A run that does not count: somebody did not get everything, or got it by another way."""


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


class Run(msgspec.Struct, frozen=True):
    """One measured run: payload bytes, wall and CPU seconds, bytes that the sender put on its cable."""

    size: int
    wall: float
    cpu: float
    sent: int

    @property
    def rate(self) -> float:
        """Payload bytes a second."""
        return self.size / self.wall


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
        return Run(size, wall, cpu, lab.host(SENDER).sent().bytes)


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


def middle(runs: list[Run]) -> Run:
    """Return the medians."""
    return Run(
        runs[0].size,
        statistics.median(run.wall for run in runs),
        statistics.median(run.cpu for run in runs),
        int(statistics.median(run.sent for run in runs)),
    )


def alternate(
    ways: list[Way], file: Path, counts: list[int], rounds: int, cable: int | None = None
) -> dict[tuple[str, int], list[Run]]:
    """Run every way once a round, for each number of receivers; return the good runs by way and number.

    A peer that fails is tried again in the next round. Ours must not fail.
    """
    results: dict[tuple[str, int], list[Run]] = {(way.name, count): [] for way in ways for count in counts}
    for number in range(rounds):
        for way in ways:
            for count in counts:
                receivers = [f"replica{index}" for index in range(1, count + 1)]
                try:
                    run = measured(way, file, receivers, cable)
                except FailedError as error:
                    print(f"bench: {way.name}, {count} receivers, failed: {error}", file=sys.stderr)
                    if way.name.startswith("backhaul"):
                        sys.exit(1)
                    continue
                results[way.name, count].append(run)
                what = f"{way.name}, {count} receivers: {run.wall:.2f} s, {run.rate / 1e6:.0f} MB/s"
                print(f"  round {number + 1}: {what}", file=sys.stderr)
    return results


def table(title: str, results: dict[tuple[str, int], list[Run]], base: tuple[str, int] | None = None) -> list[str]:
    """Return a Markdown table; with ``base``, the last column is how many times its rate each way has."""
    against = f" rate against {base[0]} |" if base else ""
    lines = [
        f"### {title}",
        "",
        f"| way | receivers | good runs | payload | wall | rate | sent by the sender | CPU a GB |{against}",
        "| --- |" + " ---: |" * (8 if base else 7),
    ]
    for (name, count), runs in results.items():
        if not runs:
            lines.append(f"| {name} | {count} | 0 |" + " |" * (6 if base else 5))
            continue
        run = middle(runs)
        last = ""
        if base:
            last = f" {run.rate / middle(results[base]).rate:.2f} |" if results[base] else " |"
        figures = f"{format_size(run.size)} | {run.wall:.2f} s | {run.rate / 1e6:.0f} MB/s"
        costs = f"{run.sent / run.size:.3f}x | {run.cpu / run.size * 1e9:.2f} s"
        lines.append(f"| {name} | {count} | {len(runs)} | {figures} | {costs} |{last}")
    return [*lines, ""]


def fan_out(directory: Path, payload: Path, rounds: int) -> list[str]:
    """Measure fan-out to two receivers against the peers, and ours with one, four and eight."""
    size = payload.stat().st_size
    part = directory / "part"
    with open(payload, "rb") as source, open(part, "wb") as target:
        while left := size // CABLE_SHARE - source.tell():
            target.write(source.read(min(left, 1 << 24)))
    scratch = Path(tempfile.mkdtemp(prefix="backhaul-bench-", dir="/dev/shm"))
    try:
        others = peers(scratch)
        base = (others[0].name, 2)
        known = ours(scratch) if exists() else []
        print("fan-out to two receivers", file=sys.stderr)
        results = alternate([*known, *others], payload, [2], rounds)
        lines = table("To two receivers, cables without a limit", results, base)
        title = f"To two receivers, {CABLE / 1e6:.0f} MB/s on each cable in each direction"
        print(title, file=sys.stderr)
        results = alternate([*known, *others], part, [2], rounds, CABLE)
        lines += table(title, results, base)
        if known:
            print("more receivers", file=sys.stderr)
            results = alternate(known, payload, [1, 4, 8], rounds)
            lines += table("To more receivers, cables without a limit", results)
            title = f"To more receivers, {CABLE / 1e6:.0f} MB/s on each cable in each direction"
            results = alternate(known, part, [1, 4, 8], rounds, CABLE)
            lines += table(title, results)
        return lines
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def exists() -> bool:
    """Tell whether this Backhaul can send."""
    command = [sys.executable, "-m", "backhaul", "send", "--help"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
