"""The laboratory itself: what tests of the network rely on is really so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backhaul.testing.network_lab import BadSwitch, Lab, LabError, Traffic, remove_leftovers

GROUP = "239.7.7.7"
PORT = 5000
LENGTH = 400

# A plain program on a plain socket. It reads until nothing has come for a while after it was told that all was sent.
RECEIVER = f"""
import json, select, socket, struct, sys
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)
udp.bind(("", {PORT}))
udp.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton("{GROUP}") + socket.inet_aton("0.0.0.0"))
print("ready", flush=True)
got, quiet = [], None
while True:
    ready, _, _ = select.select([udp] + [sys.stdin] * (quiet is None), [], [], quiet)
    if udp in ready:
        got.append(udp.recv(65536).hex())
    elif ready:
        quiet = 0.3
    else:
        break
print(json.dumps(got))
"""

SENDER = f"""
import socket, struct, sys, time
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for number in range(int(sys.argv[2])):
    udp.sendto(struct.pack("!I", number) * {LENGTH // 4}, (sys.argv[1], {PORT}))
    if number % 50 == 49:
        time.sleep(0.002)
"""


class Receiver:
    def __init__(self, lab: Lab, host: str) -> None:
        self.process = lab.host(host).start(
            [sys.executable, "-c", RECEIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def got(self) -> list[bytes]:
        out, _ = self.process.communicate(timeout=20)
        return [bytes.fromhex(payload) for payload in json.loads(out)]


def send(lab: Lab, host: str, to: str = GROUP, count: int = 1) -> None:
    lab.host(host).run([sys.executable, "-c", SENDER, to, str(count)])


def numbers(payloads: list[bytes]) -> list[int]:
    return [int.from_bytes(payload[:4], "big") for payload in payloads]


def tcp(lab: Lab, sender: str, receiver: str, size: int) -> bool:
    """Carry bytes over TCP; tell whether they came as they were sent."""
    content = os.urandom(size)
    with tempfile.TemporaryFile() as file:
        target = lab.host(receiver).start(["socat", "-u", "TCP-LISTEN:5001", "-"], stdout=file)
        lab.host(sender).run(["socat", "-u", "-", f"TCP:{receiver}:5001,retry=50,interval=0.1"], input=content)
        assert target.wait(20) == 0
        file.seek(0)
        arrived = file.read()
    assert len(arrived) == size
    return arrived == content


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(["primary", "a", "b"]) as lab:
        yield lab


def test_hosts_reach_each_other_by_name_over_icmp_udp_multicast_and_tcp(lab: Lab) -> None:
    lab.host("primary").run(["ping", "-c1", "-W2", "b"], stdout=subprocess.DEVNULL)
    lab.host("b").run(["ping", "-c1", "-W2", "localhost"], stdout=subprocess.DEVNULL)
    assert lab.host("b").run(["uname", "-n"], capture_output=True).stdout == b"b\n"
    receivers = [Receiver(lab, "a"), Receiver(lab, "b")]
    send(lab, "primary", count=3)
    send(lab, "primary", "a", count=2)
    assert [numbers(receiver.got()) for receiver in receivers] == [[0, 1, 2, 0, 1], [0, 1, 2]]
    assert tcp(lab, "primary", "a", 1_000_000)


def test_what_crosses_a_cable_is_counted_as_on_the_wire(lab: Lab) -> None:
    names = ("primary", "a", "b")
    assert all(lab.host(name).sent().packets == lab.host(name).received().packets == 0 for name in names)
    send(lab, "primary", "a", count=10)
    expected = Traffic(10 * (LENGTH + 42), 10, 0)
    assert lab.host("primary").sent() == lab.host("a").received() == expected
    assert lab.host("b").received().packets == 0
    # IGMP reports of the first join cross the cable too: let them pass.
    Receiver(lab, "a").got()
    before = [lab.host(name).received() for name in names]
    send(lab, "primary", count=10)
    after = [lab.host(name).received() for name in names]
    assert [(now - then).packets >= 10 for now, then in zip(after, before, strict=True)] == [False, True, True]
    before_sent = lab.host("primary").sent()
    assert tcp(lab, "primary", "b", 3_000_000)
    sent = lab.host("primary").sent() - before_sent
    # In batches the kernel would count a header for 64 kB only: here each packet has its own.
    assert sent.packets >= 3_000_000 // 1448
    assert sent.bytes >= 3_000_000 + sent.packets * 66


def test_a_limit_is_kept_in_both_directions_and_can_be_changed_and_taken_away(lab: Lab) -> None:
    rate = 3_000_000
    flood = (
        "import socket\nu = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\nwhile 1: u.sendto(bytes(1400), ('{}', 9))"
    )
    for limited, sender, receiver in (("a", "a", "b"), ("a", "b", "a")):
        process = lab.host(sender).start([sys.executable, "-c", flood.format(lab.host(receiver).address)])
        for factor in (1, 2):
            lab.host(limited).limit(rate * factor)
            time.sleep(0.3)  # so that what waited in the queue is gone
            before, start = lab.host(receiver).received(), time.monotonic()
            time.sleep(0.5)
            taken = lab.host(receiver).received() - before
            bound = rate * factor * (time.monotonic() - start) + 64_000
            assert bound / 4 < taken.bytes < bound
        process.kill()
        lab.host(limited).limit(None)
        lab.host(limited).limit(None)
    before, start = lab.host("b").received(), time.monotonic()
    assert tcp(lab, "a", "b", 20_000_000)
    assert (lab.host("b").received() - before).bytes >= 20_000_000


def test_a_blocked_pair_reaches_all_others(lab: Lab) -> None:
    primary, a = lab.host("primary"), lab.host("a")
    primary.block(a)
    receivers = [Receiver(lab, "a"), Receiver(lab, "b")]
    send(lab, "primary", count=3)
    send(lab, "b", "a", count=1)
    assert [len(receiver.got()) for receiver in receivers] == [1, 3]
    assert a.run(["ping", "-c1", "-W1", "primary"], check=False, stdout=subprocess.DEVNULL).returncode == 1
    primary.unblock(a)
    a.run(["ping", "-c1", "-W2", "primary"], stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("switch", [None, BadSwitch()])
def test_a_pulled_cable_passes_nothing_until_it_is_put_back(switch: BadSwitch | None) -> None:
    with Lab(["primary", "a", "b"], switch) as lab:
        lab.host("a").unplug()
        link = lab.host("a").run(["ip", "link", "show", "eth0"], capture_output=True, text=True).stdout
        assert "NO-CARRIER" in link
        ping = ["ping", "-c1", "-W1"]
        failed = lab.host("primary").run([*ping, "a"], check=False, stdout=subprocess.DEVNULL)
        assert failed.returncode != 0
        lab.host("primary").run([*ping, "b"], stdout=subprocess.DEVNULL)
        lab.host("a").plug()
        lab.host("primary").run(["ping", "-c10", "-i0.1", "-W1", "a"], stdout=subprocess.DEVNULL)


def test_signals_reach_the_program_and_what_is_left_is_killed() -> None:
    with Lab(["a"]) as lab:
        program = lab.host("a").start(["sleep", "1000"])
        time.sleep(0.2)
        assert Path(f"/proc/{program.pid}/comm").read_text() == "sleep\n"
        program.send_signal(signal.SIGTERM)
        assert program.wait(5) == -signal.SIGTERM
        script = "setsid sleep 1000 > /dev/null & echo $!; exec sleep 1000"
        shell = lab.host("a").start(["sh", "-c", script], stdout=subprocess.PIPE, text=True)
        assert shell.stdout is not None
        daemon = int(shell.stdout.readline())
        assert alive(daemon)
    assert shell.returncode == -signal.SIGKILL
    assert not alive(daemon)


def test_labs_stand_side_by_side_and_leave_nothing_behind() -> None:
    with Lab(["a", "b"]) as one, Lab(["a", "b"], BadSwitch()) as other:
        assert len({path.name for path in Path("/run/netns").iterdir() if path.name.startswith(one.prefix)}) == 3
        for lab in (one, other):
            lab.host("a").run(["ping", "-c1", "-W2", "b"], stdout=subprocess.DEVNULL)
        assert one.host("a").sent().packets == 1
    for directory in (Path("/run/netns"), Path("/etc/netns")):
        mine = f"backhaul-{os.getpid()}-"
        assert not directory.exists() or not [path for path in directory.iterdir() if path.name.startswith(mine)]


def test_what_a_killed_laboratory_left_is_removed_with_its_programs() -> None:
    script = (
        "import os, signal\nfrom backhaul.testing.network_lab import *\nlab = Lab(['a'], BadSwitch()).__enter__()\n"
        "p = lab.host('a').start(['sleep', '1000'], stdout=-3)\nprint(lab.prefix, p.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=30, check=False)
    prefix, pid = done.stdout.split()
    assert done.returncode == -signal.SIGKILL
    # A laboratory that another test enters meanwhile may remove it first.
    remove_leftovers()
    assert not [path for path in Path("/run/netns").iterdir() if path.name.startswith(f"{prefix}-")]
    assert not alive(int(pid))


@pytest.mark.parametrize(
    ("kind", "switch"),
    [
        ("loss", BadSwitch(loss=0.1)),
        ("duplicate", BadSwitch(duplicate=0.1)),
        ("reorder", BadSwitch(reorder=0.1)),
        ("truncate", BadSwitch(truncate=0.1)),
        ("corrupt", BadSwitch(corrupt=0.1)),
    ],
)
def test_each_harm_is_done_and_reaches_the_program(kind: str, switch: BadSwitch) -> None:
    count = 2000
    with Lab(["primary", "a", "b"], switch) as lab:
        receivers = [Receiver(lab, "a"), Receiver(lab, "b")]
        send(lab, "primary", count=count)
        got = dict(zip("ab", (receiver.got() for receiver in receivers), strict=True))
        harms = lab.harms()
    whole = {(number.to_bytes(4, "big") * (LENGTH // 4)) for number in range(count)}
    for host, payloads in got.items():
        done = getattr(harms[host], kind)
        assert count * 0.05 < done < count * 0.2
        assert harms[host].overrun == 0
        damaged = [payload for payload in payloads if payload not in whole]
        match kind:
            case "loss":
                assert len(payloads) == count - done
            case "duplicate":
                assert len(payloads) == count + done
            case "reorder":
                assert len(payloads) == count
                assert numbers(payloads) != sorted(numbers(payloads))
            case "truncate":
                assert len(damaged) == done
                assert all(len(payload) < LENGTH for payload in damaged)
            case "corrupt":
                assert len(damaged) == done
                assert all(len(payload) == LENGTH for payload in damaged)
        if kind not in ("truncate", "corrupt"):
            assert not damaged
    # Each receiver has its own fate.
    assert got["a"] != got["b"]


def test_tcp_passes_unharmed_beside_harmed_udp_and_is_harmed_when_asked_to_be() -> None:
    with Lab(["primary", "a"], BadSwitch(loss=0.3, truncate=0.3, corrupt=0.3)) as lab:
        assert tcp(lab, "primary", "a", 2_000_000)
        receiver = Receiver(lab, "a")
        send(lab, "primary", count=100)
        assert len(receiver.got()) < 100
        lab.harm(BadSwitch(corrupt=0.2, only="all", hosts=("a",)))
        before = lab.harms()
        assert not tcp(lab, "primary", "a", 300_000)
        after = lab.harms()
        assert after["a"].corrupt > before["a"].corrupt
        assert after["primary"].corrupt == before["primary"].corrupt


def test_frames_are_recorded_replayed_and_forged() -> None:
    with Lab(["primary", "a", "b"], BadSwitch()) as lab:
        lab.record()
        receiver = Receiver(lab, "a")
        send(lab, "primary", count=1)
        found = [frame for frame in lab.recorded() if frame.datagram]
        assert len(found) == 1
        assert found[0].host == "primary"
        datagram = found[0].datagram
        assert datagram is not None
        assert datagram.destination == (GROUP, PORT)
        assert datagram.source[0] == lab.host("primary").address
        assert datagram.payload == bytes(LENGTH)
        lab.inject("a", found[0].data)
        lab.forge("a", b"forged", source=("b", 7), destination=("a", PORT))
        lab.forge("a", b"odd", source=("10.77.0.99", 7), destination=(GROUP, PORT))
        lab.host("b").block(lab.host("a"))
        send(lab, "b", count=1)
        assert receiver.got() == [bytes(LENGTH), bytes(LENGTH), b"forged", b"odd"]


def test_a_plain_switch_says_that_it_harms_nothing_and_senseless_chances_are_refused(lab: Lab) -> None:
    with pytest.raises(LabError, match="BadSwitch"):
        lab.harms()
    with pytest.raises(ValueError, match="at most 1"):
        BadSwitch(loss=0.6, corrupt=0.6)
    with pytest.raises(LabError, match="netns"):
        Lab(["a/b"]).__enter__()
