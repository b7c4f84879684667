"""Fan-out with everything that goes wrong: what each receiver and the sender make of it, and what is left behind.

Above all: no receiver ends well, no consumer gets an end and no file its name, with anything but the whole stream.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from backhaul.processes import guardian
from tests.end_to_end.fan_out_hosts import Hosts, fate, fates, until

pytestmark = pytest.mark.timeout(150)
HOSTS = ("primary", "r1", "r2", "r3")
SMALL = ("--memory", "2M")


def child_of(process: subprocess.Popen[bytes], word: bytes) -> int:
    """The process below one in whose command line a word is."""
    parents, commands = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                pid = int(entry.name)
                parents[pid] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                commands[pid] = (entry / "cmdline").read_bytes().split(b"\0")

    def below(pid: int) -> bool:
        while pid in parents and pid != process.pid:
            pid = parents[pid]
        return pid == process.pid

    (found,) = [pid for pid, words in commands.items() if words[0] == word and pid != process.pid and below(pid)]
    return found


# -- the dump ------------------------------------------------------------------------------------------------


def test_a_dump_that_is_killed(hosts: Hosts) -> None:
    receivers = hosts.receivers(3)
    sender = hosts.send(*hosts.gated())
    gate = hosts.until_gate()
    hosts.until_taken("r1", "r2", "r3")
    os.kill(child_of(sender.process, b"sh"), signal.SIGKILL)
    os.close(gate)
    assert sender.wait() == 1
    assert "SIGKILL" in sender.err
    for receiver in receivers:
        assert receiver.wait() == 1
        assert "The dump did not arrive whole" in receiver.err
        # It says what went wrong over there, and not just that the sender is gone.
        assert "SIGKILL" in receiver.err
        hosts.assert_nothing(receiver.name)


def test_a_dump_that_fails_after_its_last_byte(hosts: Hosts) -> None:
    receivers = hosts.receivers(3)
    sender = hosts.send("--", "sh", "-c", f"cat {hosts.payload}; exit 7")
    assert sender.wait() == 1
    for receiver in receivers:
        assert receiver.wait() == 1
        assert "status 7" in receiver.err
        hosts.assert_nothing(receiver.name)


def test_an_empty_dump(hosts: Hosts) -> None:
    receivers = hosts.receivers(2)
    sender = hosts.send("--", "true", count=2)
    assert sender.wait() == 1
    for receiver in receivers:
        assert receiver.wait() == 1
        assert "empty" in receiver.err
        hosts.assert_nothing(receiver.name)
    receivers = hosts.receivers(2)
    sender = hosts.send("--allow-empty", "--", "true", count=2)
    assert sender.wait() == 0
    for receiver in receivers:
        assert receiver.wait() == 0
        hosts.assert_whole(receiver.name, content=b"")


# -- the sender ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_a_sender_that_is_ended(hosts: Hosts, number: signal.Signals, code: int) -> None:
    receivers = hosts.receivers(3)
    sender = hosts.send(*hosts.gated())
    gate = hosts.until_gate()
    hosts.until_taken("r1", "r2", "r3")
    sender.kill(number)
    assert sender.wait() == code
    for receiver in receivers:
        assert receiver.wait() == 1
        if number != signal.SIGKILL:
            assert "interrupted" in receiver.err.lower()
        hosts.assert_nothing(receiver.name)
    os.close(gate)


def test_a_sender_that_is_killed_after_the_end(hosts: Hosts) -> None:
    """Whoever has everything keeps it, although nobody takes the receipt."""
    script = "cat > taken && read go < go && mv taken seen"
    receivers = [hosts.receive(name, "--json", "-o", "got", "--", "sh", "-c", script) for name in ("r1", "r2")]
    for name in ("r1", "r2"):
        os.mkfifo(hosts.directory / name / "go")
    sender = hosts.send(count=2)
    hosts.until_taken("r1", "r2", size=len(hosts.content))
    sender.kill()
    assert sender.wait() == -9
    for receiver in receivers:
        (hosts.directory / receiver.name / "go").write_text("\n")
        assert receiver.wait() == 0
        assert receiver.json["receipt_taken"] is False
        hosts.assert_whole(receiver.name)


def test_a_receiver_that_gives_no_receipt_in_time(hosts: Hosts) -> None:
    """It counts as failed, and may finish what it does."""
    os.mkfifo(hosts.directory / "go")
    script = "cat > taken && read go < ../go && mv taken seen"
    receiver = hosts.receive("r1", "--json", "-o", "got", "--", "sh", "-c", script)
    sender = hosts.send("--receipt-wait", "1s", count=1)
    assert sender.wait() == 1
    assert fates(sender) == {"r1": "failed"}
    assert "no receipt" in fate(sender, "r1")["reason"]
    assert receiver.running
    (hosts.directory / "go").write_text("\n")
    assert receiver.wait() == 0, receiver.err
    assert receiver.json["receipt_taken"] is False
    hosts.assert_whole("r1")


def test_a_receiver_that_gives_no_receipt_to_a_push(hosts: Hosts) -> None:
    """The others' receipts count, and their number decides."""
    os.mkfifo(hosts.directory / "go")
    late = hosts.receive("r1", "-o", "got", "--", "sh", "-c", "cat > taken && read go < ../go && mv taken seen")
    good = hosts.receive("r2")
    roster = f"send:r1,r2?require=1&receipt-wait=8s&key={hosts.keys / 'primary.key'}"
    pushed = hosts.start("primary", "push", "store", roster, "--json", "--", "cat", str(hosts.payload), key=None)
    assert pushed.wait() == 3, pushed.err
    assert fates(pushed) == {"r1": "failed", "r2": "complete"}
    assert "--receipt-wait" in pushed.err
    assert good.wait() == 0
    hosts.assert_whole("r2")
    (hosts.directory / "go").write_text("\n")
    assert late.wait() == 0
    assert "nobody took the receipt" in late.err
    hosts.assert_whole("r1")


# -- receivers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_receiver_that_is_ended_in_the_middle(hosts: Hosts, place: int, number: signal.Signals) -> None:
    receivers = {receiver.name: receiver for receiver in hosts.receivers(3)}
    require = "all" if number == signal.SIGTERM else "2"
    sender = hosts.send("--require", require, *hosts.gated())
    gate = hosts.until_gate()
    hosts.until_taken("r1", "r2", "r3")
    victim = receivers.pop(hosts.chain()[place])
    victim.kill(number)
    assert victim.wait() == (-9 if number == signal.SIGKILL else 130)
    os.close(gate)
    assert sender.wait() == (3 if require == "2" else 1)
    assert fates(sender) == {victim.name: "lost", **dict.fromkeys(receivers, "complete")}
    for receiver in receivers.values():
        assert receiver.wait() == 0
        hosts.assert_whole(receiver.name)
    # (A consumer is killed with its receiver, and whoever is killed removes nothing.)
    assert not (hosts.directory / victim.name / "got").exists()
    assert not (hosts.directory / victim.name / "seen").exists()


def test_a_receiver_whose_cable_is_pulled(hosts: Hosts) -> None:
    receivers = {receiver.name: receiver for receiver in hosts.receivers(3)}
    sender = hosts.send("--require", "2", *hosts.gated())
    gate = hosts.until_gate()
    hosts.until_taken("r1", "r2", "r3")
    victim = receivers.pop(hosts.chain()[1])
    hosts.lab.host(victim.name).unplug()
    os.close(gate)
    assert sender.wait() == 3
    assert fates(sender) == {victim.name: "lost", **dict.fromkeys(receivers, "complete")}
    for receiver in receivers.values():
        assert receiver.wait() == 0
        hosts.assert_whole(receiver.name)
    assert victim.wait() == 1
    hosts.assert_nothing(victim.name)


def test_two_neighbours_that_do_not_reach_each_other(hosts: Hosts) -> None:
    receivers = hosts.receivers(3)
    sender = hosts.send(*hosts.gated())
    gate = hosts.until_gate()
    hosts.until_taken("r1", "r2", "r3")
    first, second, _ = hosts.chain()
    hosts.lab.host(first).block(hosts.lab.host(second))
    os.close(gate)
    assert sender.wait() == 0, sender.err
    assert fates(sender) == dict.fromkeys(("r1", "r2", "r3"), "complete")
    fed_by = {fate["name"]: fate["fed_by"] for fate in sender.json["fan_out"]["receivers"]}
    assert len(fed_by[second]) > 1
    assert fed_by[second][-1] != first
    for receiver in receivers:
        assert receiver.wait() == 0
        hosts.assert_whole(receiver.name)


def test_hosts_that_reach_nobody_but_the_sender(hosts: Hosts) -> None:
    """There is no chain to be had: the sender feeds each one."""
    for one, other in (("r1", "r2"), ("r2", "r3"), ("r1", "r3")):
        hosts.lab.host(one).block(hosts.lab.host(other))
    receivers = hosts.receivers(3)
    sender = hosts.send()
    assert sender.wait() == 0, sender.err
    for receiver in receivers:
        assert receiver.wait() == 0
        hosts.assert_whole(receiver.name)


# -- consumers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("require", ["all", "2"])
def test_a_consumer_that_dies(hosts: Hosts, require: str) -> None:
    receivers = {receiver.name: receiver for receiver in hosts.receivers(3)}
    sender = hosts.send("--require", require, *hosts.gated())
    gate = hosts.until_gate()
    hosts.until_taken("r1", "r2", "r3")
    victim = receivers.pop(hosts.chain()[0])
    os.kill(child_of(victim.process, b"cat"), signal.SIGKILL)
    os.close(gate)
    assert sender.wait() == (1 if require == "all" else 3)
    assert fates(sender) == {victim.name: "failed", **dict.fromkeys(receivers, "complete")}
    for receiver in receivers.values():
        assert receiver.wait() == 0
        hosts.assert_whole(receiver.name)
    assert victim.wait() == 3
    # The file beside it is kept: it is whole.
    hosts.assert_whole(victim.name, "got")
    assert not (hosts.directory / victim.name / "seen").exists()


@pytest.mark.parametrize("script", ["head -c 1000000 > taken; exit 0", "cat > /dev/null; exit 4"])
def test_a_consumer_that_fails_with_no_file_beside_it(hosts: Hosts, script: str) -> None:
    """It fails, says so, and passes on all the same."""
    failing = hosts.receive("r1", "--data-port", "7500", "--", "sh", "-c", script)
    failing.says("is not there yet")
    sender = hosts.send("--require", "2", *hosts.gated())
    failing.says("waiting for the start")  # so it is the first of the chain
    others = [hosts.receive(name, "--data-port", "7500") for name in ("r2", "r3")]
    hosts.until_taken("r2", "r3")
    assert hosts.chain()[0] == "r1"
    hosts.open_gate()
    assert sender.wait() == 3
    assert fates(sender) == {"r1": "failed", "r2": "complete", "r3": "complete"}
    assert failing.wait() == 1
    assert "The command failed" in failing.err
    for receiver in others:
        assert receiver.wait() == 0
        hosts.assert_whole(receiver.name)


def test_a_consumer_that_stands_still_with_a_spool_holds_up_nobody(hosts: Hosts) -> None:
    receivers = {receiver.name: receiver for receiver in hosts.receivers(3, *SMALL, "--spool", ".", "--json")}
    sender = hosts.send(*SMALL, *hosts.gated(times=2))
    gate = hosts.until_gate()
    hosts.until_taken("r1", "r2", "r3")
    still = receivers.pop(hosts.chain()[0])
    consumer = child_of(still.process, b"cat")
    os.kill(consumer, signal.SIGSTOP)
    os.close(gate)
    for name in receivers:  # while it stands, the others have all of it
        until((hosts.directory / name / "seen").exists, f"the end at {name}")
        hosts.assert_whole(name, content=hosts.content * 2)
    assert still.running
    assert not (hosts.directory / still.name / "got").exists()
    os.kill(consumer, signal.SIGCONT)
    assert sender.wait() == 0
    assert sender.json["fan_out"]["held_seconds"] < 5
    assert still.wait() == 0
    hosts.assert_whole(still.name, content=hosts.content * 2)
    assert still.json["spooled"] > 1_000_000
    for receiver in receivers.values():
        assert receiver.wait() == 0


def test_a_consumer_that_stands_still_without_a_spool_is_waited_for(hosts: Hosts) -> None:
    hosts.shorten_buffers()
    receivers = {receiver.name: receiver for receiver in hosts.receivers(3, *SMALL)}
    sender = hosts.send(*SMALL, *hosts.gated(4_000_000, times=2))
    gate = hosts.until_gate()
    hosts.until_taken("r1", "r2", "r3")
    still = receivers.pop(hosts.chain()[1])
    consumer = child_of(still.process, b"cat")
    os.kill(consumer, signal.SIGSTOP)
    os.close(gate)
    # The receiver has no room, nor has the one before it: the dump waits, with most of it still unread.
    sent = hosts.until_still()
    assert sender.running
    assert sent < 2 * len(hosts.content) - 5_000_000
    assert not any((hosts.directory / name / "seen").exists() for name in receivers)
    os.kill(consumer, signal.SIGCONT)
    assert sender.wait() == 0
    assert sender.json["fan_out"]["held_seconds"] > 0.5
    for receiver in (*receivers.values(), still):
        assert receiver.wait() == 0
        hosts.assert_whole(receiver.name, content=2 * hosts.content)


@pytest.mark.parametrize("how", [("--slow", "drop"), ("--max-hold", "2s")])
def test_a_consumer_that_stands_still_is_dropped(hosts: Hosts, how: tuple[str, str]) -> None:
    hosts.shorten_buffers()
    receivers = {receiver.name: receiver for receiver in hosts.receivers(3, *SMALL)}
    sender = hosts.send(*SMALL, *how, "--require", "2", *hosts.gated(4_000_000, times=2))
    gate = hosts.until_gate()
    hosts.until_taken("r1", "r2", "r3")
    still = receivers.pop(hosts.chain()[1])
    os.kill(child_of(still.process, b"cat"), signal.SIGSTOP)
    os.close(gate)
    assert sender.wait() == 3
    assert fates(sender) == {still.name: "dropped", **dict.fromkeys(receivers, "complete")}
    for receiver in receivers.values():
        assert receiver.wait() == 0
        hosts.assert_whole(receiver.name, content=2 * hosts.content)
    assert still.wait() == 1
    assert how[0] in still.err  # it says why
    hosts.assert_nothing(still.name)


@pytest.mark.parametrize("full", ["size", "disk"])
def test_a_spool_that_is_full_throttles_and_loses_nothing(hosts: Hosts, tmpfs: Path, full: str) -> None:
    spool = ("--spool", str(tmpfs)) if full == "disk" else ("--spool", ".", "--spool-size", "3M")
    if full == "disk":
        (tmpfs / "ballast").write_bytes(bytes(12 << 20))
    hosts.shorten_buffers()
    receivers = {receiver.name: receiver for receiver in hosts.receivers(2, *SMALL, *spool, "--json")}
    sender = hosts.send(*SMALL, *hosts.gated(4_000_000, times=2), count=2)
    gate = hosts.until_gate()
    hosts.until_taken("r1", "r2")
    still = receivers[hosts.chain(2)[0]]
    consumer = child_of(still.process, b"cat")
    os.kill(consumer, signal.SIGSTOP)
    os.close(gate)
    sent = hosts.until_still()
    assert 5_000_000 < sent < 2 * len(hosts.content) - 5_000_000
    os.kill(consumer, signal.SIGCONT)
    assert sender.wait() == 0, sender.err
    for receiver in receivers.values():
        assert receiver.wait() == 0
        hosts.assert_whole(receiver.name, content=2 * hosts.content)
    assert still.json["spooled"] > 1_000_000


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_consumer_that_stands_still_is_killed_when_there_will_be_no_whole_stream(
    hosts: Hosts, number: signal.Signals
) -> None:
    hosts.shorten_buffers()
    receivers = {receiver.name: receiver for receiver in hosts.receivers(2, *SMALL)}
    sender = hosts.send(*SMALL, *hosts.gated(4_000_000, times=2), count=2)
    gate = hosts.until_gate()
    hosts.until_taken("r1", "r2")
    still = receivers[hosts.chain(2)[0]]
    consumer = child_of(still.process, b"cat")
    os.kill(consumer, signal.SIGSTOP)
    os.close(gate)
    hosts.until_still()
    sender.kill(number)
    sender.wait()
    if number == signal.SIGKILL:  # (The rest might be on its way: whether it is shows once there is room for it.)
        os.kill(consumer, signal.SIGCONT)
    for receiver in receivers.values():
        assert receiver.wait() == 1
        hosts.assert_nothing(receiver.name)


def test_a_relay_that_is_killed_while_all_wait_for_it(hosts: Hosts) -> None:
    """What was on its way through it, the others still get."""
    hosts.shorten_buffers()
    receivers = {receiver.name: receiver for receiver in hosts.receivers(3, *SMALL)}
    sender = hosts.send(*SMALL, "--require", "2", *hosts.gated(4_000_000, times=2))
    gate = hosts.until_gate()
    hosts.until_taken("r1", "r2", "r3")
    still = receivers.pop(hosts.chain()[1])
    os.kill(child_of(still.process, b"cat"), signal.SIGSTOP)
    os.close(gate)
    hosts.until_still()
    still.kill()
    assert sender.wait() == 3
    assert fates(sender) == {still.name: "lost", **dict.fromkeys(receivers, "complete")}
    for receiver in receivers.values():
        assert receiver.wait() == 0
        hosts.assert_whole(receiver.name, content=2 * hosts.content)


def test_a_command_is_given_no_end_when_its_host_program_dies_while_it_is_started(tmp_path: Path) -> None:
    """Nobody reads any more that it was started: that must not end the guardian, which holds the pipe open."""
    control, control_end = os.pipe()
    status, status_end = os.pipe()
    reader, hold = os.pipe()
    os.close(status)
    # What reads is not the command itself, whose own death the kernel sees to.
    script = "exec 3<&0; (cat <&3 > taken && mv taken seen) & wait"
    words = [
        sys.executable,
        "-I",
        "-S",
        guardian.__file__,
        str(control),
        str(status_end),
        str(hold),
        "sh",
        "-c",
        script,
    ]
    process = subprocess.Popen(words, stdin=reader, pass_fds=[control, status_end, hold], cwd=tmp_path)
    for descriptor in (control, status_end, reader, hold):
        os.close(descriptor)
    until((tmp_path / "taken").exists)
    os.close(control_end)
    process.wait(30)
    assert not (tmp_path / "seen").exists()


def test_a_receiver_that_has_something_else_is_told_so(hosts: Hosts) -> None:
    """Its receipt is compared at the sender, whatever it thinks of itself; and its own end is none of success."""
    faulty = hosts.directory / "faulty"
    faulty.mkdir()
    (faulty / "sitecustomize.py").write_text(
        "import msgspec\n"
        "from backhaul.operations.reception import Reception\n"
        "real = Reception._received\n"
        "Reception._received = lambda self: tuple(\n"
        "    msgspec.structs.replace(stream, blake3='0' * 64) for stream in real(self)\n"
        ")\n"
    )
    first = hosts.receive("r1")
    second = hosts.receive("r2", env={"PYTHONPATH": str(faulty)})
    sender = hosts.send("--require", "1", count=2)
    assert sender.wait() == 3, sender.err
    assert first.wait() == 0, first.err
    assert second.wait() == 1, second.err
    assert "primary has sent something else than what came here" in second.err
    assert fates(sender) == {"r1": "complete", "r2": "failed"}
    assert "its receipt is not for what was sent" in fate(sender, "r2")["reason"]


ANYBODY = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}


def test_receivers_do_where_one_is_enough_and_the_store_is_away(hosts: Hosts) -> None:
    """Whatever is required, the receivers are one of those who may be it: as a store that fails does not cost them."""
    first = hosts.receive("r1")
    roster = f"send:r1?key={hosts.keys / 'primary.key'}"
    words = ("push", "s3://b/x?endpoint=http://127.0.0.1:9", roster, "--require", "any", "--json")
    pushed = hosts.start(
        "primary", *words, "--compress", "none", "--", "cat", str(hosts.payload), key=None, env=ANYBODY
    )
    assert pushed.wait() == 3, pushed.err
    assert "127.0.0.1:9" in pushed.err
    assert first.wait() == 0, first.err
    hosts.assert_whole("r1")


def test_a_store_that_is_away_ends_it_where_all_are_required(hosts: Hosts) -> None:
    first = hosts.receive("r1")
    roster = f"send:r1?key={hosts.keys / 'primary.key'}"
    words = ("push", "s3://b/x?endpoint=http://127.0.0.1:9", roster, "--json", "--", "touch", "ran")
    pushed = hosts.start("primary", *words, key=None, env=ANYBODY)
    assert pushed.wait() == 1, pushed.err
    assert first.wait() == 1, first.err
    assert not (hosts.directory / "primary" / "ran").exists()
    hosts.assert_nothing("r1")
