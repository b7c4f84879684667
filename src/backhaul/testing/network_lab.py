"""A network of hosts on one machine, for tests: network namespaces, veth pairs and a switch.

Needs root, iproute2, nftables (for ``block``) and ethtool (for a ``BadSwitch``); no kernel module beyond bridge,
veth, htb and nftables. What is missing is an error (``LabError``), never a skipped test. A laboratory touches
nothing but namespaces of its own, whose names carry the id and the start time of its process.

Rates are kept and bytes are counted by one htb queue at each end of each cable. Without a limit packets go straight
through it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from backhaul.testing.bad_switch import Answer, BadSwitch, Command, Frame, Harms, udp_frame

__all__ = ["BadSwitch", "Frame", "Harms", "Host", "Lab", "LabError", "Traffic", "remove_leftovers"]

_NAMESPACES = Path("/run/netns")
_FILES = Path("/etc/netns")  # what `ip netns exec` mounts over /etc
_NAME = re.compile(r"backhaul-(\d+)-(\d+)-\d+-")
_NETWORK = "10.77.0"
_BURST = 16_384  # bytes that a limit lets through at once, at least; else what it allows in 2 ms
_QUEUE = 262_144  # bytes that wait before a limit, at least; else what it allows in 50 ms
_RECORD = 10_000
_NAMED = 'printf %s "$0" > /proc/sys/kernel/hostname && exec "$@"'
_numbers = itertools.count(1)


class LabError(Exception):
    """The network could not be made or changed; with the command's own words."""


class Traffic(msgspec.Struct, frozen=True):
    """What crossed a cable in one direction, as packets on the wire.

    ``bytes`` are Ethernet headers and all that follows, without preamble and check sequence; a batch that the
    kernel passes on in one piece (GSO) counts as the packets that a real card makes of it. ``lost`` are packets
    that did not fit into the queue before the cable.
    """

    bytes: int
    packets: int
    lost: int

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(self.bytes - earlier.bytes, self.packets - earlier.packets, self.lost - earlier.lost)


class Host:
    """One host: a network namespace with ``lo`` and ``eth0``."""

    def __init__(self, lab: Lab, name: str, number: int) -> None:
        self.name = name
        self.address = f"{_NETWORK}.{number}"
        self.namespace = f"{lab.prefix}-{name}"
        self.mac = bytes([2, 0, 10, 77, 0, number])
        self.port = f"port{number}"
        self._lab = lab

    def start(self, arguments: Sequence[str | os.PathLike[str]], **options: Any) -> subprocess.Popen[Any]:
        """Start a program on this host; ``options`` are ``Popen``'s.

        The process becomes the program, so signals reach it. It sees this host's name as the machine's, this
        network's /etc/hosts, and a /sys without cgroups; other files are the machine's. What still runs when the
        laboratory is left is killed.
        """
        process: subprocess.Popen[Any] = subprocess.Popen(self.command(arguments), **options)
        self._lab.started.append(process)
        return process

    def run(
        self, arguments: Sequence[str | os.PathLike[str]], *, timeout: float = 60, check: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[Any]:
        """Run a program on this host to its end; ``options`` are ``subprocess.run``'s.

        Raises:
            subprocess.CalledProcessError: it failed, and ``check`` is set.
            subprocess.TimeoutExpired: it took more than ``timeout`` seconds, and was killed.
        """
        return subprocess.run(self.command(arguments), timeout=timeout, check=check, **options)

    def command(self, arguments: Sequence[str | os.PathLike[str]]) -> list[str]:
        """Return the command line that runs a program on this host."""
        named = ["unshare", "--uts", "sh", "-c", _NAMED, self.name]
        return ["ip", "netns", "exec", self.namespace, *named, *(os.fspath(word) for word in arguments)]

    def sent(self) -> Traffic:
        """Return what this host has put on its cable so far, exactly."""
        return _traffic(self.namespace, "eth0")

    def received(self) -> Traffic:
        """Return what the switch has put on this host's cable so far, exactly.

        The host got it; whether a program did is another matter: a full socket buffer drops.
        """
        return _traffic(self._lab.switch_namespace, self.port)

    def limit(self, rate: int | None) -> None:
        """Let ``rate`` bytes a second through the cable in each direction; None: as many as can.

        It can be changed while traffic flows. What does not fit into the queue before the cable (50 ms, at least
        256 KiB) is dropped. Taking a limit away drops what waits in that queue.
        """
        for namespace, device in ((self.namespace, "eth0"), (self._lab.switch_namespace, self.port)):
            limited = "class htb 1:1" in _run("tc", "-n", namespace, "class", "show", "dev", device)
            if rate is None:
                if limited:  # what has no class of htb's is not held
                    _run("tc", "-n", namespace, "class", "del", "dev", device, "classid", "1:1")
                continue
            burst, queue = max(_BURST, rate // 500), max(_QUEUE, rate // 20)
            lines = [
                f"class {'change' if limited else 'add'} dev {device} parent 1: classid 1:1 "
                f"htb rate {rate}bps burst {burst}b cburst {burst}b quantum 60000",
                f"qdisc {'change' if limited else 'add'} dev {device} parent 1:1 handle 2: bfifo limit {queue}b",
            ]
            _batch("tc", namespace, lines)

    def unplug(self) -> None:
        """Pull the cable: the host sees its link go down, and nothing passes."""
        _run("ip", "-n", self._lab.switch_namespace, "link", "set", self.port, "down")

    def plug(self) -> None:
        """Put the cable back."""
        _run("ip", "-n", self._lab.switch_namespace, "link", "set", self.port, "up")

    def block(self, other: Host) -> None:
        """Let nothing pass between this host and another, multicast included; both still reach the rest."""
        self._lab.block(self, other, blocked=True)

    def unblock(self, other: Host) -> None:
        """Take a block away."""
        self._lab.block(self, other, blocked=False)


class Lab:
    """Hosts on one switch, ``10.77.0.1`` and on in the order of their names, with MTU 1,500; a context manager.

    Every host resolves the others' names. There is no route out. Without ``switch`` the switch is a kernel bridge
    and offloads (GSO, GRO, checksums) are as they come; with one, frames pass a process that harms them
    (some 30 MB/s), and the hosts' offloads are off.

    Raises:
        LabError: the network could not be made.
    """

    def __init__(self, hosts: Iterable[str], switch: BadSwitch | None = None) -> None:
        self.prefix = f"backhaul-{os.getpid()}-{_start_time(os.getpid())}-{next(_numbers)}"
        self.switch_namespace = f"{self.prefix}-switch."  # the dot keeps it apart from a host of that name
        self.hosts = {name: Host(self, name, number) for number, name in enumerate(hosts, 1)}
        self.started: list[subprocess.Popen[Any]] = []
        self._switch = switch
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def __enter__(self) -> Lab:
        if os.geteuid() != 0:
            raise LabError("a network of namespaces can be made by root only")
        remove_leftovers()
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def host(self, name: str) -> Host:
        """Return the host of that name."""
        return self.hosts[name]

    def close(self) -> None:
        """Kill every process that was started and still lives, by its id, close its pipes, remove the namespaces."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
        for process in self.started:
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    with contextlib.suppress(OSError):  # what nobody reads any more
                        stream.close()
        if self._control is not None:
            self._control.close()  # its end of file ends the switch
            self._control = None
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(2)
            self._process.kill()
            self._process.wait()
            self._process = None
        _remove([name for name in _namespaces() if name.startswith(f"{self.prefix}-")])

    def block(self, one: Host, other: Host, *, blocked: bool) -> None:
        """Let nothing pass between two hosts, or let it pass again; see ``Host.block``."""
        if self._switch is not None:
            self._ask(Command("block" if blocked else "unblock", port=one.name, other=other.name))
            return
        pairs = f"{{ {one.port} . {other.port}, {other.port} . {one.port} }}"
        words = ("add" if blocked else "delete", "element", "bridge", "lab", "blocked", pairs)
        _run("ip", "netns", "exec", self.switch_namespace, "nft", *words)

    def harm(self, switch: BadSwitch) -> None:
        """Change what the switch does, from the next frame on.

        Raises:
            LabError: this laboratory was made without a ``BadSwitch``.
        """
        self._ask(Command("harm", switch=switch))

    def harms(self) -> dict[str, Harms]:
        """Return what was done so far to the frames for each host.

        Raises:
            LabError: this laboratory was made without a ``BadSwitch``.
        """
        return self._ask(Command("harms")).harms

    def record(self, count: int = _RECORD) -> None:
        """Keep the next ``count`` frames that come into the switch, from any host; forget those kept before.

        Raises:
            LabError: this laboratory was made without a ``BadSwitch``.
        """
        self._ask(Command("record", count=count))

    def recorded(self) -> list[Frame]:
        """Return the frames kept since ``record``, oldest first, as their hosts sent them.

        Raises:
            LabError: this laboratory was made without a ``BadSwitch``.
        """
        return self._ask(Command("recorded")).frames

    def inject(self, to: str, frame: bytes) -> None:
        """Put a raw Ethernet frame on the cable to a host, unharmed.

        Raises:
            LabError: this laboratory was made without a ``BadSwitch``.
        """
        self._ask(Command("inject", port=to, frame=frame))

    def forge(self, to: str, payload: bytes, *, source: tuple[str, int], destination: tuple[str, int]) -> None:
        """Put a UDP datagram on the cable to a host, unharmed.

        ``source`` and ``destination`` are a host's name or any IPv4 address, multicast too, and a port.

        Raises:
            LabError: this laboratory was made without a ``BadSwitch``.
            ValueError: the payload is longer than 1,472 bytes.
        """
        sender, receiver = self._address(source[0]), self._address(destination[0])
        first, *rest = socket.inet_aton(receiver)
        mac = self.hosts[to].mac
        if 224 <= first < 240:  # RFC 1112, 6.4
            mac = bytes([1, 0, 0x5E, rest[0] & 0x7F, *rest[1:]])
        known = {host.address: host.mac for host in self.hosts.values()}
        source_mac = known.get(sender, bytes([2, 0, 0, 0, 0, 1]))
        self.inject(to, udp_frame(payload, (sender, source[1]), (receiver, destination[1]), source_mac, mac))

    def _address(self, name: str) -> str:
        return self.hosts[name].address if name in self.hosts else name

    def _make(self) -> None:
        hosts = list(self.hosts.values())
        for host in hosts:
            directory = _FILES / host.namespace
            directory.mkdir(parents=True, exist_ok=True)
            lines = ["127.0.0.1 localhost", "::1 localhost", *(f"{other.address} {other.name}" for other in hosts)]
            (directory / "hosts").write_text("\n".join(lines) + "\n")
        names = [self.switch_namespace, *(host.namespace for host in hosts)]
        _batch("ip", None, [f"netns add {name}" for name in names])
        # No IPv6 in the switch, and no address on the hosts that the kernel gives itself: it would speak unasked.
        quiet = (
            "echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6; echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6"
        )
        _run("ip", "netns", "exec", self.switch_namespace, "sh", "-c", quiet)
        lines = ["link set lo up"]
        for host in hosts:
            mac = host.mac.hex(":")
            lines.append(f"link add {host.port} type veth peer name eth0 address {mac} netns {host.namespace}")
        if self._switch is None:
            lines += ["link add bridge type bridge mcast_snooping 0", "link set bridge up"]
            lines += [f"link set {host.port} master bridge" for host in hosts]
        lines += [f"link set {host.port} up" for host in hosts]
        _batch("ip", self.switch_namespace, lines)
        if self._switch is None:
            # A bridge that has yet to learn where a host is would send its first packets to all.
            known = [f"fdb add {host.mac.hex(':')} dev {host.port} master static" for host in hosts]
            _batch("bridge", self.switch_namespace, known)
        _batch(
            "tc", self.switch_namespace, [f"qdisc add dev {host.port} root handle 1: htb default 1" for host in hosts]
        )
        for host in hosts:
            if self._switch is not None:
                features = ("tx", "off", "tso", "off", "gso", "off")
                _run("ip", "netns", "exec", host.namespace, "ethtool", "-K", "eth0", *features)
            _batch("tc", host.namespace, ["qdisc add dev eth0 root handle 1: htb default 1"])
            # Neighbours are known: asking for them would blur counts, and failing to would outlast a block.
            lines = ["link set lo up", "link set eth0 addrgenmode none", "link set eth0 up"]
            lines.append(f"address add {host.address}/24 brd + dev eth0")
            lines.append("route add 224.0.0.0/4 dev eth0")
            lines += [
                f"neighbour add {other.address} lladdr {other.mac.hex(':')} dev eth0 nud permanent"
                for other in hosts
                if other is not host
            ]
            _batch("ip", host.namespace, lines)
        if self._switch is None:
            rules = (
                "table bridge lab {\n set blocked { type ifname . ifname; }\n"
                " chain forward { type filter hook forward priority 0; iifname . oifname @blocked drop; }\n}\n"
            )
            _run("ip", "netns", "exec", self.switch_namespace, "nft", "-f", "-", words=rules)
        else:
            self._start_switch(self._switch)

    def _start_switch(self, switch: BadSwitch) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            ports = [f"{host.port}={host.name}={host.mac.hex()}" for host in self.hosts.values()]
            module = [sys.executable, "-m", "backhaul.testing.bad_switch", str(theirs.fileno()), *ports]
            self._process = subprocess.Popen(
                ["ip", "netns", "exec", self.switch_namespace, *module],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._control = ours
        ours.settimeout(60)
        self._answer()
        self.harm(switch)

    def _ask(self, command: Command) -> Answer:
        if self._control is None:
            raise LabError("only a laboratory with a BadSwitch can do this")
        self._control.sendall(msgspec.json.encode(command) + b"\n")
        return self._answer()

    def _answer(self) -> Answer:
        assert self._control is not None
        words = b""
        while not words.endswith(b"\n"):
            piece = self._control.recv(1 << 20)
            if not piece:
                raise LabError("the switch has ended; its last words are on stderr")
            words += piece
        return msgspec.json.decode(words, type=Answer)


def remove_leftovers() -> None:
    """Remove the namespaces of laboratories whose process is dead, and kill what still runs in them."""
    dead = []
    for name in _namespaces():
        found = _NAME.match(name)
        if found is not None and _start_time(int(found[1])) != int(found[2]):
            dead.append(name)
    _remove(dead)


def _namespaces() -> set[str]:
    """Return the names of all laboratories' namespaces, also of those that are made only in part."""
    names: set[str] = set()
    for directory in (_NAMESPACES, _FILES):
        with contextlib.suppress(FileNotFoundError):
            names.update(name for name in os.listdir(directory) if _NAME.match(name))
    return names


def _remove(names: Iterable[str]) -> None:
    """Remove namespaces; another laboratory may be removing the same."""
    names = list(names)
    inodes = set()
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            inodes.add((_NAMESPACES / name).stat().st_ino)
    deadline = time.monotonic() + 10
    while inodes and time.monotonic() < deadline:
        descriptors = list(_inside(inodes))
        for descriptor in descriptors:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            os.close(descriptor)
        if not descriptors:
            break
        time.sleep(0.01)
    for name in names:
        if (_NAMESPACES / name).exists():
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL, check=False)
        shutil.rmtree(_FILES / name, ignore_errors=True)


def _inside(inodes: set[int]) -> Iterator[int]:
    """Yield a descriptor of every process in these namespaces, to be closed by the caller."""
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{entry}/ns/net").st_ino not in inodes:
                continue
            descriptor = os.pidfd_open(int(entry))
            # The descriptor stays with this process; that it is one of ours is to be seen after it was taken.
            try:
                ours = os.stat(f"/proc/{entry}/ns/net").st_ino in inodes
            except OSError:
                ours = False
            if ours:
                yield descriptor
            else:
                os.close(descriptor)


def _start_time(pid: int) -> int:
    """Return when a process was started, in clock ticks since the boot; -1 when there is none.

    With it an id that was given to another process later is not taken for the first.
    """
    try:
        words = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    return int(words.rpartition(")")[2].split()[19])


def _traffic(namespace: str, device: str) -> Traffic:
    queues: list[dict[str, Any]] = json.loads(_run("tc", "-n", namespace, "-s", "-j", "qdisc", "show", "dev", device))
    root = next(queue for queue in queues if queue.get("root"))
    return Traffic(root["bytes"], root["packets"], root["drops"])


def _batch(program: str, namespace: str | None, lines: Iterable[str]) -> None:
    """Run many commands of ``ip``, ``tc`` or ``bridge`` in one process."""
    place = [] if namespace is None else ["-n", namespace]
    _run(program, *place, "-batch", "-", words="".join(f"{line}\n" for line in lines))


def _run(*command: str, words: str = "") -> str:
    try:
        done = subprocess.run(command, input=words, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError as error:
        raise LabError(f"{command[0]} is not installed; `make test` installs what the tests need") from error
    if done.returncode:
        what = " ".join(command) + (f"\n{words}" if words else "")
        raise LabError(f"this failed with status {done.returncode}: {what}\n{done.stderr.strip()}")
    return done.stdout
