"""A bad line between Backhaul and a real store: every kind of fault, and none of them believed."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backhaul.errors import StoreUnreachableError
from backhaul.stores.open import DEFAULT_PATIENCE
from backhaul.stores.retry import RetryingStore, RetryPolicy
from backhaul.testing.data import dump_text, random_bytes
from backhaul.testing.faults import Fault, FaultPlan, FaultProxy
from backhaul.testing.memory_store import MemoryStore
from backhaul.testing.servers import SeaweedFS
from backhaul.testing.soak import PLANS, soak
from tests.conftest import Cli, keys, open_uploads


@pytest.mark.parametrize("kind", list(PLANS))
def test_no_fault_is_believed(s3_environment: None, seaweed: SeaweedFS, bucket: str, kind: str) -> None:
    report = soak(seaweed.endpoint, bucket, PLANS[kind], rounds=2)
    assert report.lost == []
    assert report.wrong == []
    assert sum(report.faults.values()) > 0
    # Faults that pass are outlasted: not all, since some plans are merciless, but most operations end well.
    assert report.failed <= report.operations / 2


@pytest.fixture
def proxy(seaweed: SeaweedFS) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed.endpoint) as proxy:
        yield proxy


def later(seconds: float, act: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()
    return timer


def test_a_ten_minute_outage_in_scaled_time(cli: Cli, proxy: FaultProxy, bucket: str) -> None:
    """Ten seconds without a store for a patience of fifteen, as ten minutes for one of fifteen (the default)."""
    assert DEFAULT_PATIENCE / 600 == 15 / 10
    content = b"".join(random_bytes(40_000_000))
    (cli.directory / "dump").write_bytes(content)
    url = f"s3://{bucket}/app?endpoint={proxy.endpoint}&timeout=2s"
    process = cli.start("push", url, "--json", "--retry-for", "15s", "--limit", "20M", "--", "cat", "dump")
    while proxy.count("UploadPart") < 2:
        time.sleep(0.01)
    proxy.outage(True)
    later(10, lambda: proxy.outage(False))
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    assert json.loads(out)["destinations"][0]["retries"] > 0
    assert proxy.injected["outage"] > 0
    assert cli.ok("pull", "-q", f"s3://{bucket}/app").out == content


def test_ten_minutes_of_outage_are_outlasted_on_the_clock() -> None:
    """The default patience, in virtual time: whatever the jitter, the store that is back after 600 s is found."""
    for jitter in (0.0, 0.3, 0.7, 0.999):
        now = 0.0

        def sleep(seconds: float) -> None:
            nonlocal now
            now += seconds

        class Away(MemoryStore):
            def stat(self, key: str) -> Any:
                if now < 600:  # noqa: B023
                    raise StoreUnreachableError("away")
                return super().stat(key)

        policy = RetryPolicy(DEFAULT_PATIENCE, sleep=sleep, clock=lambda: now, jitter=lambda: jitter)  # noqa: B023
        RetryingStore(Away(), policy).stat("x")
        assert 600 <= now <= 630


def test_an_outage_that_does_not_end_is_an_error_that_says_so(
    cli: Cli, proxy: FaultProxy, s3: Any, bucket: str
) -> None:
    url = f"s3://{bucket}/app?endpoint={proxy.endpoint}&timeout=1s"
    process = cli.start("push", url, "--retry-for", "2s", "--", "sh", "-c", "head -c 30000000 /dev/urandom; sleep 60")
    while proxy.count("UploadPart") < 1:
        time.sleep(0.01)
    proxy.outage(True)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    text = err.decode()
    assert "why:" in text and "next:" in text
    assert str(proxy.port) in text
    proxy.outage(False)
    cli.ok("clean", "--older-than", "0s", f"s3://{bucket}/app")
    assert keys(s3, bucket) == []
    assert open_uploads(s3, bucket) == []


def test_a_part_that_hangs_is_sent_a_second_time(cli: Cli, proxy: FaultProxy, bucket: str) -> None:
    """One part's connection stalls while the others pass: a hedge gets it there long before its timeout."""
    content = b"".join(random_bytes(150_000_000))
    (cli.directory / "dump").write_bytes(content)
    hung: list[int] = []

    def eighth(request: Any) -> bool:
        if request.operation == "UploadPart" and request.query["partNumber"] == "10" and not hung:
            hung.append(1)
            return True
        return False

    proxy.use(FaultPlan(stall=Fault(only=eighth, place=0.2), stall_seconds=300))
    url = f"s3://{bucket}/app?endpoint={proxy.endpoint}&timeout=5m"
    result = cli.ok("push", url, "--json", "--", "cat", "dump").json
    assert hung == [1]
    assert result["destinations"][0]["hedges"] >= 1
    assert cli.ok("pull", "-q", f"s3://{bucket}/app").out == content


def test_after_a_503_the_next_try_takes_a_new_connection(cli: Cli, seaweed: SeaweedFS, bucket: str) -> None:
    class Counting(FaultProxy):
        connections = 0

        def accepts(self) -> bool:
            self.connections += 1
            return super().accepts()

    def connections(plan: FaultPlan, retries: int) -> int:
        with Counting(seaweed.endpoint, plan) as proxy:
            url = f"s3://{bucket}/app?endpoint={proxy.endpoint}&provider=seaweedfs"
            result = cli.ok("push", url, "--json", "--", "echo", "x").json
            assert result["destinations"][0]["retries"] == retries
            return proxy.connections

    puts = Fault(limit=3, only=lambda request: request.operation == "PutObject")
    undisturbed = connections(FaultPlan(), 0)
    looks = 2  # at each connection, when it comes and when its thread begins
    assert connections(FaultPlan(throttle=puts), 3) == undisturbed + 3 * looks


def test_a_completion_that_can_not_be_confirmed_at_once(cli: Cli, proxy: FaultProxy, bucket: str) -> None:
    """It worked; whether it did is asked, and the answers are lost: asked again, not taken for another run's."""
    content = b"".join(random_bytes(20_000_000))

    def of_the_object(request: Any) -> bool:
        return request.operation == "HeadObject" and str(request.key).endswith("data.zst")

    proxy.use(FaultPlan(throttle=Fault(only=of_the_object, limit=2)))
    url = f"s3://{bucket}/app?endpoint={proxy.endpoint}"
    result = cli.ok("push", url, "--json", input=content).json
    assert proxy.injected["throttle"] == 2
    assert result["destinations"][0]["retries"] == 2
    assert cli.ok("pull", "-q", f"s3://{bucket}/app").out == content


@pytest.mark.parametrize("direction", ["request", "reply"])
def test_a_line_that_always_damages_is_an_error(cli: Cli, proxy: FaultProxy, bucket: str, direction: str) -> None:
    """No patience makes good bytes of bad ones: nothing is committed, nothing is delivered."""
    content = b"".join(dump_text(20_000_000))
    if direction == "reply":
        cli.ok("push", f"s3://{bucket}/app", "-q", input=content)
    damaged = Fault(only=lambda request: request.key.endswith("data.zst"))
    proxy.use(FaultPlan(corrupt_request=damaged, corrupt_reply=damaged))
    url = f"s3://{bucket}/app?endpoint={proxy.endpoint}"
    if direction == "request":
        result = cli("push", url, "--retry-for", "2s", input=content)
        assert cli.ok("list", f"s3://{bucket}/app", "--json").json["backups"] == []
    else:
        result = cli("pull", url, "-o", "out")
        assert not (cli.directory / "out").exists()
    assert result.code == 1
    assert "why:" in result.err and "next:" in result.err
    assert "test-secret" not in result.err


# -- slow and stalled destinations ----------------------------------------------------------------------------


def stalled(seaweed_endpoint: str) -> FaultProxy:
    """A proxy whose parts never end."""
    return FaultProxy(
        seaweed_endpoint,
        FaultPlan(stall=Fault(only=lambda r: r.operation == "UploadPart", place=0.1), stall_seconds=600),
    )


def test_a_destination_that_takes_nothing_is_dropped(cli: Cli, seaweed: SeaweedFS, bucket: str, tmp_path: Path) -> None:
    content = b"".join(random_bytes(400_000_000))
    (cli.directory / "dump").write_bytes(content)
    with stalled(seaweed.endpoint) as proxy:
        slow = f"s3://{bucket}/slow?endpoint={proxy.endpoint}"
        fast = str(tmp_path / "disk")
        arguments = ("--require", "any", "--stall-timeout", "2s", "--json", "--", "cat", "dump")
        result = cli("push", slow, fast, *arguments)
        assert result.code == 3, result.err
        states = {d["series"]: d for d in json.loads(result.out)["destinations"]}
        assert states[fast]["state"] == "committed"
        assert states[slow]["state"] == "failed"
        assert "took nothing for" in states[slow]["error_why"]
        assert cli.ok("pull", "-q", fast).out == content


def test_with_a_spool_the_dump_does_not_wait(cli: Cli, proxy: FaultProxy, s3: Any, bucket: str, tmp_path: Path) -> None:
    """The store is away when the dump ends; the dump has ended all the same, and the backup is whole in the end."""
    content = b"".join(random_bytes(300_000_000))
    (cli.directory / "dump").write_bytes(content)
    spool = tmp_path / "spool"
    spool.mkdir()
    ended = cli.directory / "ended"
    url = f"s3://{bucket}/app?endpoint={proxy.endpoint}&timeout=2s"
    command = f"head -c 60000000 dump; while [ ! -e go ]; do sleep 0.05; done; tail -c +60000001 dump; touch {ended}"
    process = cli.start(
        "push",
        url,
        "--json",
        "--spool",
        str(spool),
        "--spool-size",
        "1G",
        "--retry-for",
        "60s",
        "--",
        "sh",
        "-c",
        command,
    )
    while proxy.count("UploadPart") < 1:
        time.sleep(0.01)
    proxy.outage(True)
    (cli.directory / "go").touch()
    deadline = time.monotonic() + 60
    while not ended.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ended.exists(), "the dump waits for a store that is away"
    assert process.poll() is None
    assert list(spool.iterdir()) == [], "the spool has no names"
    proxy.outage(False)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert cli.ok("pull", "-q", f"s3://{bucket}/app").out == content
    assert json.loads(out)["destinations"][0]["state"] == "committed"


@pytest.mark.parametrize("spool", ["missing", "file"])
def test_a_spool_that_can_not_be(cli: Cli, bucket: str, tmp_path: Path, spool: str) -> None:
    (tmp_path / "file").touch()
    result = cli("push", f"s3://{bucket}/app", "--spool", str(tmp_path / spool), "--", "echo", "x")
    assert result.code == 10
    assert "--spool" not in result.err or "directory" in result.err
    assert "next:" in result.err


# -- the limit --------------------------------------------------------------------------------------------------


def test_the_limit_holds_over_all_destinations_and_through_retries(cli: Cli, proxy: FaultProxy, bucket: str) -> None:
    """Never faster than the limit: a lower bound on time, which no noise can break."""
    proxy.use(FaultPlan(throttle=Fault(probability=0.3, limit=6)))
    content = b"".join(random_bytes(20_000_000))
    began = time.monotonic()
    cli.ok(
        "push",
        f"s3://{bucket}/one?endpoint={proxy.endpoint}",
        f"s3://{bucket}/two",
        "--limit",
        "10M",
        input=content,
    )
    assert time.monotonic() - began > 0.95 * (2 * 20_000_000 / 10_000_000 - 0.1)


def test_a_limit_by_the_hour(cli: Cli, bucket: str) -> None:
    """All hours off but one that is not now: nothing is slowed."""
    hour = (time.localtime().tm_hour + 12) % 24
    table = f"{hour:02d}:00-{(hour + 1) % 24:02d}:00=1K,off"
    cli.ok("push", f"s3://{bucket}/app", "-q", "--limit", table, input=b"".join(random_bytes(3_000_000)))
    result = cli("push", f"s3://{bucket}/app", "--limit", "at night", "--", "echo", "x")
    assert result.code == 2
    assert subprocess.list2cmdline(["at night"]).strip('"') in result.err
