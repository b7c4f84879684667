"""Fan-out at its edges: pushes that may do without it, whole servers, hosts that nobody reaches, stuck consumers."""

from __future__ import annotations

import os
import signal
import time

import pytest

from backhaul.testing.servers import PostgreSQL
from tests.end_to_end.fan_out_hosts import DATA_PORT, Hosts, fate, until

pytestmark = pytest.mark.timeout(150)
HOSTS = ("primary", "r1", "r2")
PAYLOAD = 8_000_000


def push(hosts: Hosts, *more: str) -> tuple[str, ...]:
    roster = f"send:r1,r2?max-wait=3s&key={hosts.keys / 'primary.key'}"
    return ("push", "store", roster, "--json", *more, "--", "cat", str(hosts.payload))


def until_quiet(hosts: Hosts) -> None:
    """Wait until the primary sends no more than its signs of life: whoever receives takes nothing."""
    last = [-1_000_000]

    def quiet() -> bool:
        time.sleep(0.5)
        before, last[0] = last[0], hosts.lab.host("primary").sent().bytes
        return 1_000_000 < last[0] < before + 50_000

    until(quiet, "quiet on the cable")


def test_a_push_that_may_do_without_its_receivers(hosts: Hosts) -> None:
    """Each destination has its own fate: the store has the backup, and that nobody received is said."""
    pushed = hosts.start("primary", *push(hosts, "--require", "1"), key=None)
    assert pushed.wait() == 3
    document = pushed.documents[0]
    assert [place["state"] for place in document["destinations"]] == ["committed"]
    assert {one["state"] for one in document["fan_out"]["receivers"]} == {"waiting"}
    assert "0 of 2 receivers have the whole stream" in pushed.err
    assert hosts.start("primary", "pull", "store", "-o", "back", key=None).wait() == 0
    hosts.assert_whole("primary", "back")


def test_a_push_that_needs_its_receivers(hosts: Hosts) -> None:
    pushed = hosts.start("primary", *push(hosts), key=None)
    assert pushed.wait() == 1
    assert "The dump was not begun" in pushed.err
    assert not list((hosts.directory / "primary" / "store").glob("*/manifest.json"))


def test_a_whole_server_into_files(hosts: Hosts, postgres: PostgreSQL) -> None:
    """More databases than dumps at once: nobody waits for what nobody is left to begin."""
    names = [f"fanned_{number}" for number in range(3)]
    for name in names:
        postgres.sql(f"create database {name}")
        postgres.sql("create table t as select g from generate_series(1, 100) g", name)
    try:
        receivers = [hosts.receive(name, "-o", "dumps/") for name in ("r1", "r2")]
        sender = hosts.send("--from", postgres.url(""), "--streams", "2", count=2)
        assert sender.wait() == 0, sender.err
        for receiver in receivers:
            assert receiver.wait() == 0, receiver.err
            files = {path.name for path in (hosts.directory / receiver.name / "dumps").iterdir()}
            assert {"globals", *(f"{name}.{part}" for name in names for part in ("schema", "data-1", "after"))} <= files
    finally:
        for name in names:
            postgres.sql(f"drop database {name}")


def test_a_host_that_nobody_reaches_is_given_up(hosts: Hosts) -> None:
    """Its firewall lets nothing in: it calls the sender, and takes no link."""
    rules = f"table inet wall {{ chain in {{ type filter hook input priority 0; tcp dport {DATA_PORT} drop; }}; }}"
    hosts.lab.host("r2").run(["nft", rules])
    receivers = {receiver.name: receiver for receiver in hosts.receivers(2)}
    sender = hosts.send("--require", "1", count=2)
    assert sender.wait(100) == 3
    found = fate(sender, "r2")
    assert found["state"] == "failed"
    assert f"nobody reaches it at {hosts.lab.host('r2').address}:{DATA_PORT}" in found["reason"]
    assert receivers["r1"].wait() == 0
    hosts.assert_whole("r1")
    assert receivers["r2"].wait() == 1
    hosts.assert_nothing("r2")


def test_a_consumer_that_takes_nothing_is_killed_when_its_sender_was(hosts: Hosts) -> None:
    """A service that stood at it would turn away the next night's dump."""
    service = hosts.listen("r1", "--memory", "2M", "-o", "got", "--", "sh", "-c", "echo $$ > pid; exec sleep 1000")
    sender = hosts.send("--memory", "2M", "--hosts", "r1", "--", "cat", *[str(hosts.payload)] * 8)
    service.says("sends")
    until_quiet(hosts)
    sender.kill()
    service.says("The dump did not arrive whole")
    consumer = int((hosts.directory / "r1" / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(consumer, 0)
    hosts.assert_nothing("r1")
    # And it is there for the next one.
    checked = hosts.start("primary", "send", "--hosts", "r1", "--check", "--json")
    assert checked.wait() == 0, checked.err
    service.kill(signal.SIGTERM)
    assert service.wait() == 130
