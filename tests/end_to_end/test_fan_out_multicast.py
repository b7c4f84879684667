"""Fan-out by multicast, by the command line, over networks that lose, double, reorder, cut and change datagrams."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from backhaul.testing.bad_switch import BadSwitch
from backhaul.testing.network_lab import Lab
from tests.end_to_end.fan_out_hosts import Hosts, Program, fate, until

pytestmark = pytest.mark.timeout(150)
MULTICAST = ("--transport", "multicast")
GROUP = ("239.255.74.11", 7412)
NAMES = ("r1", "r2", "r3")
HOSTS = ("primary", *NAMES, "second")
# It passes everything, until it is told to do harm.
SWITCH = BadSwitch()
PAYLOAD = 12_000_000


def transports(sender: Program) -> dict[str, tuple[str, str]]:
    return {one["name"]: (one["state"], one.get("transport", "chain")) for one in sender.json["fan_out"]["receivers"]}


BY_MULTICAST = dict.fromkeys(NAMES, ("complete", "multicast"))


@pytest.mark.parametrize(
    ("harm", "options"),
    [
        (BadSwitch(loss=0.01), ()),
        (BadSwitch(loss=0.10), ()),
        (BadSwitch(loss=0.02), ("--parity", "16")),
        (BadSwitch(duplicate=0.05, reorder=0.05), ()),
        (BadSwitch(truncate=0.01, corrupt=0.01), ()),
    ],
    ids=["1% lost", "10% lost", "parity", "doubled and out of order", "cut and changed"],
)
def test_harm_on_the_way(hosts: Hosts, harm: BadSwitch, options: tuple[str, ...]) -> None:
    hosts.lab.harm(harm)
    receivers = [hosts.receive(name) for name in NAMES]
    sender = hosts.send(*MULTICAST, *options)
    assert sender.wait() == 0, sender.err
    for receiver in receivers:
        assert receiver.wait() == 0, receiver.err
        hosts.assert_whole(receiver.name)
    assert transports(sender) == BY_MULTICAST
    done = hosts.lab.harms()
    for name in NAMES:
        for kind in ("loss", "duplicate", "reorder", "truncate", "corrupt"):
            assert (getattr(done[name], kind) > 0) == (getattr(harm, kind) > 0), (name, kind)


def test_each_byte_is_sent_once(tmp_path: Path, keys: Path, payload: Path) -> None:
    """However many receive: what the sender puts on its cable is the payload and its headers, once."""
    sent = {}
    for count in (1, 3):
        with Lab(["primary", *NAMES]) as lab:
            directory = tmp_path / str(count)
            directory.mkdir()
            hosts = Hosts(lab, directory, keys, payload)
            receivers = [hosts.receive(name) for name in NAMES[:count]]
            sender = hosts.send(*MULTICAST, "--rate", "60M", count=count)
            assert sender.wait() == 0, sender.err
            for receiver in receivers:
                assert receiver.wait() == 0, receiver.err
                hosts.assert_whole(receiver.name)
            assert {transport for _, transport in transports(sender).values()} == {"multicast"}
            sent[count] = sender.json["fan_out"]["sent"]
    # Of each datagram 22 bytes of 1,472 are its own header; a few tenths of a percent are messages and probes.
    size = payload.stat().st_size
    assert size < sent[1] < size * 1.03
    assert abs(sent[3] - sent[1]) < size * 0.01


def test_a_host_that_multicast_does_not_reach_gets_the_chain(hosts: Hosts) -> None:
    hosts.lab.harm(BadSwitch(loss=1.0, hosts=("r2",)))
    receivers = [hosts.receive(name) for name in NAMES]
    sender = hosts.send(*MULTICAST)
    assert sender.wait() == 0, sender.err
    for receiver in receivers:
        assert receiver.wait() == 0, receiver.err
        hosts.assert_whole(receiver.name)
    assert transports(sender) == {**BY_MULTICAST, "r2": ("complete", "chain")}
    found = fate(sender, "r2")
    assert "multicast did not reach it (0 of 50 probes came)" in found["reason"]


@pytest.mark.parametrize("times", [1, 4])
def test_a_host_that_is_cut_off_from_the_group_midway_goes_on_by_the_chain(hosts: Hosts, times: int) -> None:
    """Also where all that is left fits into what may be on its way."""
    receivers = [hosts.receive(name) for name in NAMES]
    sender = hosts.send(*MULTICAST, *hosts.gated(times=times))
    gate = hosts.until_gate()
    hosts.until_taken(*NAMES)
    hosts.lab.harm(BadSwitch(loss=1.0, hosts=("r3",)))
    os.write(gate, b"\n")
    os.close(gate)
    assert sender.wait(100) == 0, sender.err
    for receiver in receivers:
        assert receiver.wait() == 0, receiver.err
        hosts.assert_whole(receiver.name, content=hosts.content * times)
    assert transports(sender) == {**BY_MULTICAST, "r3": ("complete", "chain")}


def test_a_receiver_that_is_killed(hosts: Hosts) -> None:
    """The others are not held up by it."""
    receivers = {name: hosts.receive(name) for name in NAMES}
    sender = hosts.send(*MULTICAST, "--require", "2", *hosts.gated(times=4))
    gate = hosts.until_gate()
    hosts.until_taken(*NAMES)
    receivers["r2"].kill()
    os.write(gate, b"\n")
    os.close(gate)
    assert sender.wait() == 3, sender.err
    for name in ("r1", "r3"):
        assert receivers[name].wait() == 0
        hosts.assert_whole(name, content=hosts.content * 4)
    assert transports(sender) == {**BY_MULTICAST, "r2": ("lost", "multicast")}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_sender_that_is_killed(hosts: Hosts, number: signal.Signals) -> None:
    receivers = [hosts.receive(name) for name in NAMES]
    sender = hosts.send(*MULTICAST, *hosts.gated())
    hosts.until_taken(*NAMES)
    sender.kill(number)
    assert sender.wait() in (-signal.SIGKILL, 130)
    for receiver in receivers:
        assert receiver.wait() == 1
        assert "The dump did not arrive whole" in receiver.err
        hosts.assert_nothing(receiver.name)


def test_a_dump_that_fails_at_its_end(hosts: Hosts) -> None:
    receivers = [hosts.receive(name) for name in NAMES]
    sender = hosts.send(*MULTICAST, "--", "sh", "-c", f"cat {hosts.payload}; exit 3")
    assert sender.wait() == 1
    for receiver in receivers:
        assert receiver.wait() == 1
        hosts.assert_nothing(receiver.name)


def test_a_consumer_that_stands_still(hosts: Hosts) -> None:
    """With a spool it costs nobody else anything, and has the whole in the end."""
    wait = "while [ ! -e go ]; do sleep 0.05; done; cat > taken && mv taken seen"
    slow = hosts.receive("r1", "--spool", ".", "--memory", "2M", "-o", "got", "--", "sh", "-c", wait)
    others = [hosts.receive("r2"), hosts.receive("r3")]
    sender = hosts.send(*MULTICAST, "--", "cat", *[str(hosts.payload)] * 3)
    until(lambda: all((hosts.directory / name / "seen").exists() for name in ("r2", "r3")), "the whole at the others")
    assert slow.running
    assert sender.running
    (hosts.directory / "r1" / "go").touch()
    assert sender.wait() == 0, sender.err
    for receiver in (slow, *others):
        assert receiver.wait() == 0, receiver.err
        hosts.assert_whole(receiver.name, content=hosts.content * 3)
    found = fate(sender, "r1")
    assert found["receipt"]["spooled"] > 10_000_000


def test_a_session_that_is_replayed(hosts: Hosts) -> None:
    """Datagrams of another session, and forged ones, change nothing."""
    hosts.lab.record(6000)
    first = [hosts.receive(name) for name in NAMES]
    sender = hosts.send(*MULTICAST)
    assert sender.wait() == 0, sender.err
    assert [receiver.wait() for receiver in first] == [0, 0, 0]
    old = [frame.data for frame in hosts.lab.recorded() if frame.datagram is not None and frame.host == "primary"]
    assert len(old) > 1000
    for name in NAMES:
        for file in ("got", "seen"):
            (hosts.directory / name / file).unlink()
    again = [hosts.receive(name) for name in NAMES]
    sender = hosts.send(*MULTICAST, *hosts.gated())
    gate = hosts.until_gate()
    for frame in old[:1500]:
        for name in NAMES:
            hosts.lab.inject(name, frame)
    for number in range(200):
        forged = b"BHU1" + bytes([number]) * 8 + bytes(4) + (1 << 20).to_bytes(4, "big") + bytes(2) + bytes(1000)
        for name in NAMES:
            hosts.lab.forge(name, forged, source=("primary", 40000), destination=GROUP)
    os.write(gate, b"\n")
    os.close(gate)
    assert sender.wait() == 0, sender.err
    for receiver in again:
        assert receiver.wait() == 0, receiver.err
        hosts.assert_whole(receiver.name)


def test_two_sessions_at_once_in_one_group(hosts: Hosts) -> None:
    receivers = [hosts.receive("r1"), hosts.receive("r2")]
    other = hosts.start("r3", "receive", "--from", "second", "-o", "got", *hosts.consumer)
    one = hosts.send(*MULTICAST, count=2)
    two = hosts.send(*MULTICAST, "--hosts", "r3", host="second")
    assert one.wait() == 0, one.err
    assert two.wait() == 0, two.err
    for receiver in (*receivers, other):
        assert receiver.wait() == 0, receiver.err
        hosts.assert_whole(receiver.name)
    assert transports(two) == {"r3": ("complete", "multicast")}
    until(lambda: not any(program.running for program in (*receivers, other)))
