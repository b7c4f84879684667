"""A switch in user space that harms what it passes on: the worse half of ``network_lab``.

It runs as a process of its own, in the laboratory's switch namespace, with one packet socket for each port:
``python -m backhaul.testing.bad_switch CONTROL INTERFACE=HOST=MAC...``. Frames go by a fixed table of MAC addresses;
broadcast and multicast go to all other ports. Damage is drawn for each receiver of a frame on its own, at most
one kind for a frame. Truncated and corrupted packets get lengths and checksums that are right again: the
receiver's kernel delivers the damage to the program. ``CONTROL`` is the descriptor of a socket for commands, one
JSON object a line, each answered by one; its end of file ends the process.

Frames must come in whole: no checksum left to the hardware, no batches. The laboratory sees to that.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import random
import select
import socket
import struct
import sys
import time
from typing import Literal

import msgspec

Kind = Literal["loss", "duplicate", "reorder", "truncate", "corrupt"]

_KINDS: tuple[Kind, ...] = ("loss", "duplicate", "reorder", "truncate", "corrupt")
_ETHERNET = 14
_IPV4 = 0x0800
_TCP, _UDP = 6, 17
_ALL_PROTOCOLS = 0x0003
_MOST = 2048  # more than a frame has: MTU 1500
_BUFFER = 64 << 20  # bursts wait here while the loop is elsewhere
_TURN = 64  # frames from one port before the next has its turn
_SHORTEST_DELAY, _LONGEST_DELAY = 0.001, 0.02  # seconds that a frame which is to come late is held
_SO_RCVBUFFORCE = 33
_SOL_PACKET, _PACKET_STATISTICS = 263, 6


class BadSwitch(msgspec.Struct, frozen=True):
    """What a switch does to frames: chances from 0 to 1 for each receiver of each frame, 1 in all at most.

    ``reorder`` holds a frame back for 1 to 20 ms. ``truncate`` shortens the payload of UDP. ``corrupt`` flips one
    to three bits of it, of TCP's too with ``only="all"``. IP fragments are neither truncated nor corrupted.
    ``only`` says what is harmed: UDP, or every frame (ARP, TCP and its acknowledgements too). ``hosts`` are those
    whose incoming frames are harmed; empty: all.

    Raises:
        ValueError: the chances are below 0 or above 1 in all.
    """

    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    truncate: float = 0.0
    corrupt: float = 0.0
    only: Literal["udp", "all"] = "udp"
    hosts: tuple[str, ...] = ()
    seed: int = 1

    def __post_init__(self) -> None:
        if min(self.chances) < 0 or sum(self.chances) > 1 + 1e-9:
            raise ValueError("the chances of a BadSwitch are from 0 to 1, and at most 1 in all")

    @property
    def chances(self) -> tuple[float, ...]:
        """The chances, in the order of the kinds."""
        return tuple(float(getattr(self, kind)) for kind in _KINDS)


class Harms(msgspec.Struct):
    """What was done to the frames for one receiver; ``passed`` counts those that went on, harmed or not.

    ``overrun`` counts what the switch dropped without having been told to: its own queue or the port's was full.
    """

    passed: int = 0
    loss: int = 0
    duplicate: int = 0
    reorder: int = 0
    truncate: int = 0
    corrupt: int = 0
    overrun: int = 0


class Datagram(msgspec.Struct, frozen=True):
    """A UDP datagram as it lies in one frame: addresses, ports, payload."""

    source: tuple[str, int]
    destination: tuple[str, int]
    payload: bytes


class Frame(msgspec.Struct, frozen=True):
    """An Ethernet frame as it came into the switch, from which host, and when (seconds, monotonic)."""

    host: str
    at: float
    data: bytes

    @property
    def datagram(self) -> Datagram | None:
        """The UDP datagram in it; None when it holds something else, or a fragment."""
        found = _transport(self.data)
        if found is None or found[0] != _UDP:
            return None
        start = found[1]
        source, destination, length = struct.unpack_from("!HHH", self.data, start)
        return Datagram(
            (socket.inet_ntoa(self.data[26:30]), source),
            (socket.inet_ntoa(self.data[30:34]), destination),
            self.data[start + 8 : start + length],
        )


class Command(msgspec.Struct, omit_defaults=True):
    """What the laboratory asks of the switch; the fields that a command does not need are left out."""

    do: Literal["harm", "harms", "inject", "record", "recorded", "block", "unblock"]
    switch: BadSwitch | None = None
    port: str = ""
    other: str = ""
    frame: bytes = b""
    count: int = 0


class Answer(msgspec.Struct, omit_defaults=True):
    """The switch's answer to one command."""

    harms: dict[str, Harms] = {}
    frames: list[Frame] = []


def udp_frame(
    payload: bytes, source: tuple[str, int], destination: tuple[str, int], source_mac: bytes, mac: bytes
) -> bytes:
    """Return an Ethernet frame with a UDP datagram of IPv4 addresses and ports, checksums right.

    Raises:
        ValueError: the payload does not fit into one packet of 1,500 bytes.
    """
    if len(payload) > 1472:
        raise ValueError("a forged datagram has 1,472 bytes of payload at most")
    udp = struct.pack("!HHHH", source[1], destination[1], 8 + len(payload), 0)
    addresses = socket.inet_aton(source[0]) + socket.inet_aton(destination[0])
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 28 + len(payload), 0, 0x4000, 64, _UDP, 0) + addresses
    frame = bytearray(mac + source_mac + struct.pack("!H", _IPV4) + ip + udp + payload)
    _mend(frame, _UDP, _ETHERNET + 20, 28 + len(payload))
    return bytes(frame)


def truncated(frame: bytes, keep: int) -> bytes:
    """Return a frame whose UDP payload is cut to ``keep`` bytes, lengths and checksums mended."""
    found = _transport(frame)
    assert found is not None and found[0] == _UDP
    start = found[1]
    cut = bytearray(frame[: start + 8 + keep])
    struct.pack_into("!H", cut, start + 4, 8 + keep)
    _mend(cut, _UDP, start, start + 8 + keep - _ETHERNET)
    return bytes(cut)


def corrupted(frame: bytes, places: list[int], bit: int) -> bytes:
    """Return a frame with one bit flipped in each of some bytes of its payload, its checksum mended."""
    found = _transport(frame)
    assert found is not None
    protocol, start, payload, end = found
    harmed = bytearray(frame)
    for place in places:
        harmed[payload + place] ^= 1 << bit
    _mend(harmed, protocol, start, end - _ETHERNET)
    return bytes(harmed)


def _transport(frame: bytes | bytearray) -> tuple[int, int, int, int] | None:
    """Return protocol and the offsets of header, payload and end of whole TCP and UDP packets over IPv4."""
    if len(frame) < _ETHERNET + 28 or frame[12:14] != b"\x08\x00" or frame[14] >> 4 != 4:
        return None
    total, fragment = struct.unpack_from("!H2xH", frame, _ETHERNET + 2)
    protocol = frame[_ETHERNET + 9]
    if fragment & 0x3FFF or protocol not in (_TCP, _UDP) or _ETHERNET + total > len(frame):
        return None
    start = _ETHERNET + (frame[_ETHERNET] & 0x0F) * 4
    payload = start + (8 if protocol == _UDP else (frame[start + 12] >> 4) * 4)
    return protocol, start, payload, _ETHERNET + total


def _sum(data: bytes | bytearray) -> int:
    """Return the Internet checksum (RFC 1071): 65,536 is 1 in arithmetic modulo 65,535."""
    if len(data) % 2:
        data = data + b"\0"
    return 0xFFFF - (int.from_bytes(data, "big") % 0xFFFF)


def _mend(frame: bytearray, protocol: int, start: int, total: int) -> None:
    """Write IP's total length and both checksums."""
    struct.pack_into("!H", frame, _ETHERNET + 2, total)
    struct.pack_into("!H", frame, _ETHERNET + 10, 0)
    struct.pack_into("!H", frame, _ETHERNET + 10, _sum(frame[_ETHERNET:start]))
    place = start + (6 if protocol == _UDP else 16)
    struct.pack_into("!H", frame, place, 0)
    segment = frame[start : _ETHERNET + total]
    pseudo = frame[_ETHERNET + 12 : _ETHERNET + 20] + struct.pack("!HH", protocol, len(segment))
    # Zero would mean "no checksum" in UDP; both are zero in ones' complement.
    struct.pack_into("!H", frame, place, _sum(pseudo + segment) or 0xFFFF)


class _Port:
    """A port: its interface, the host behind it, and the harm done to what goes there."""

    def __init__(self, interface: str, host: str, mac: bytes) -> None:
        self.host, self.mac = host, mac
        self.harms = Harms()
        self.harmed = True
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS))
        self.socket.bind((interface, _ALL_PROTOCOLS))
        self.socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.socket.setblocking(False)

    def send(self, frame: bytes) -> None:
        """Pass a frame on, or drop it as a switch does whose port is full or unplugged."""
        try:
            self.socket.send(frame)
            self.harms.passed += 1
        except BlockingIOError:
            self.harms.overrun += 1
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                self.harms.overrun += 1
            elif error.errno not in (errno.ENETDOWN, errno.ENXIO):
                raise


class Switch:
    """The loop: frames from port to port, commands in between."""

    def __init__(self, control: socket.socket, ports: dict[str, _Port]) -> None:
        self._control = control
        self._ports = ports
        self._by_mac = {port.mac: port for port in ports.values()}
        self._others = {name: [port for port in ports.values() if port.host != name] for name in ports}
        self._blocked: set[tuple[str, str]] = set()
        self._late: list[tuple[float, int, _Port, bytes]] = []
        self._numbers = itertools.count()
        self._frames: list[Frame] = []
        self._room = 0
        self.harm(BadSwitch())

    def harm(self, switch: BadSwitch) -> None:
        """Do this from now on."""
        self._rng = random.Random(switch.seed)
        self._total = sum(switch.chances)
        self._bounds = list(zip(itertools.accumulate(switch.chances), _KINDS, strict=True))
        self._udp_only = switch.only == "udp"
        for port in self._ports.values():
            port.harmed = not switch.hosts or port.host in switch.hosts

    def run(self) -> None:
        """Pass frames on until the control socket is closed at the other end."""
        poll = select.epoll()
        poll.register(self._control, select.EPOLLIN)
        by_descriptor = {port.socket.fileno(): port for port in self._ports.values()}
        for descriptor in by_descriptor:
            poll.register(descriptor, select.EPOLLIN)
        lines = self._control.makefile("rb")
        while True:
            wait = max(0.0, self._late[0][0] - time.monotonic()) if self._late else -1
            for descriptor, _ in poll.poll(wait):
                if descriptor == self._control.fileno():
                    line = lines.readline()
                    if not line:
                        return
                    answer = self.answer(msgspec.json.decode(line, type=Command))
                    self._control.sendall(msgspec.json.encode(answer) + b"\n")
                else:
                    self._take(by_descriptor[descriptor])
            while self._late and self._late[0][0] <= time.monotonic():
                _, _, port, frame = heapq.heappop(self._late)
                port.send(frame)

    def answer(self, command: Command) -> Answer:
        """Do what the laboratory asks."""
        match command.do:
            case "harm":
                assert command.switch is not None
                self.harm(command.switch)
            case "harms":
                for port in self._ports.values():
                    _, drops = struct.unpack("II", port.socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
                    for other in self._others[port.host]:
                        other.harms.overrun += drops  # a reading sets it to zero; who would have got them is unknown
                return Answer(harms={port.host: port.harms for port in self._ports.values()})
            case "inject":
                self._ports[command.port].send(command.frame)
            case "record":
                self._frames, self._room = [], command.count
            case "recorded":
                return Answer(frames=self._frames)
            case "block":
                self._blocked |= {(command.port, command.other), (command.other, command.port)}
            case "unblock":
                self._blocked -= {(command.port, command.other), (command.other, command.port)}
        return Answer()

    def _take(self, port: _Port) -> None:
        for _ in range(_TURN):
            try:
                frame = port.socket.recv(_MOST)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENETDOWN:  # unplugged; it is told once
                    return
                raise
            if self._room:
                self._room -= 1
                self._frames.append(Frame(port.host, time.monotonic(), frame))
            only = self._by_mac.get(frame[:6])
            exempt = not self._total or (self._udp_only and (frame[12:14] != b"\x08\x00" or frame[23] != _UDP))
            for other in self._others[port.host] if only is None else (only,):
                if self._blocked and (port.host, other.host) in self._blocked:
                    continue
                if exempt or not other.harmed or (draw := self._rng.random()) >= self._total:
                    other.send(frame)
                else:
                    kind = next((kind for bound, kind in self._bounds if draw < bound), _KINDS[-1])
                    self._do(kind, other, frame)

    def _do(self, kind: Kind, port: _Port, frame: bytes) -> None:
        harms = port.harms
        match kind:
            case "loss":
                harms.loss += 1
            case "duplicate":
                port.send(frame)
                port.send(frame)
                harms.duplicate += 1
            case "reorder":
                due = time.monotonic() + self._rng.uniform(_SHORTEST_DELAY, _LONGEST_DELAY)
                heapq.heappush(self._late, (due, next(self._numbers), port, frame))
                harms.reorder += 1
            case "truncate":
                found = _transport(frame)
                if found is not None and found[0] == _UDP and found[3] > found[2]:
                    frame = truncated(frame, self._rng.randrange(found[3] - found[2]))
                    harms.truncate += 1
                port.send(frame)
            case "corrupt":
                found = _transport(frame)
                if found is not None and found[3] > found[2]:
                    length = found[3] - found[2]
                    places = self._rng.sample(range(length), min(length, self._rng.randint(1, 3)))
                    frame = corrupted(frame, places, self._rng.randrange(8))
                    harms.corrupt += 1
                port.send(frame)


def main() -> None:
    """Run the switch: ``CONTROL INTERFACE=HOST=MAC...``."""
    control = socket.socket(fileno=int(sys.argv[1]))
    ports = {}
    for word in sys.argv[2:]:
        interface, host, mac = word.split("=")
        ports[host] = _Port(interface, host, bytes.fromhex(mac))
    switch = Switch(control, ports)
    control.sendall(msgspec.json.encode(Answer()) + b"\n")  # the ports are open
    switch.run()


if __name__ == "__main__":
    main()
