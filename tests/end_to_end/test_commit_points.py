"""Stops, lost replies and rivals at the moments that matter, on stores that hold still there."""

from __future__ import annotations

import datetime as dt
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from backhaul.errors import BackhaulError, FailedError, PreconditionError, StoreUnavailableError
from backhaul.formats import names
from backhaul.formats.location import parse_location
from backhaul.model.objects import NO_METADATA, Metadata, StoredObject, Upload, UploadedPart
from backhaul.operations import push as push_module
from backhaul.operations import series
from backhaul.operations import verify as verify_module
from backhaul.operations.destination import Destination
from backhaul.operations.push import PushOptions, push
from backhaul.pipeline.supervisor import Supervisor
from backhaul.sources.command import CommandSource
from backhaul.stores.base import Kind
from backhaul.stores.body import Body
from backhaul.stores.retry import RetryingStore, RetryPolicy
from backhaul.testing.memory_store import MemoryStore
from backhaul.transforms.digest import crc64nvme

NOISE = ["head", "-c", "20000000", "/dev/urandom"]


class HoldingStore(MemoryStore):
    """Holds still in one call until it is let go, and then goes through with it."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.reached = threading.Event()
        self.go = threading.Event()

    def _hold(self, where: str) -> None:
        if where == self.where:
            self.reached.set()
            assert self.go.wait(60)

    def put(
        self,
        key: str,
        body: Body,
        crc64nvme: int,
        *,
        if_absent: bool = True,
        replaces: str | None = None,
        kind: Kind = "record",
        metadata: Metadata = NO_METADATA,
    ) -> StoredObject:
        self._hold(key.rpartition("/")[2])
        return super().put(key, body, crc64nvme, if_absent=if_absent, replaces=replaces)

    def complete(
        self,
        upload: Upload,
        parts: Sequence[UploadedPart],
        crc64nvme: int,
        *,
        if_absent: bool = True,
        replaces: str | None = None,
    ) -> StoredObject:
        self._hold("complete")
        return super().complete(upload, parts, crc64nvme, if_absent=if_absent, replaces=replaces)


@pytest.fixture
def run_push(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Push to a given store in a thread; returns (thread, outcome, group)."""

    def start(store: MemoryStore, command: list[str]) -> tuple[threading.Thread, list[Any], Supervisor]:
        groups: list[Supervisor] = []

        def supervisor(*arguments: Any) -> Supervisor:
            groups.append(Supervisor(*arguments, grace=0.3))
            return groups[-1]

        monkeypatch.setattr(push_module, "open_store", lambda location, **_: store)
        monkeypatch.setattr(push_module, "Supervisor", supervisor)
        monkeypatch.setattr(push_module, "CLEANUP_PATIENCE", 0.1)
        outcome: list[Any] = []

        def run() -> None:
            try:
                outcome.append(push(["memory"], CommandSource(command)))
            except BaseException as error:  # noqa: BLE001 - an interrupt is what the test is about
                outcome.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        while not groups:
            time.sleep(0.001)
        return thread, outcome, groups[0]

    return start


@pytest.mark.parametrize(
    ("where", "command"),
    [("complete", NOISE), ("data.zst", ["echo", "small"]), ("manifest.json", NOISE), ("manifest.json", ["echo", "x"])],
)
def test_a_stop_during_the_commit_never_lists_half_a_backup(run_push: Any, where: str, command: list[str]) -> None:
    store = HoldingStore(where)
    thread, outcome, group = run_push(store, command)
    assert store.reached.wait(30)
    group.stop(KeyboardInterrupt("SIGINT"))
    thread.join(30)
    assert not thread.is_alive()
    assert isinstance(outcome[0], KeyboardInterrupt)
    store.go.set()  # what the store was busy with happens all the same, after the run has ended
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(t.name.startswith("push-") for t in threading.enumerate()):
        time.sleep(0.01)
    committed = series.committed_backups(store)
    if where == "manifest.json":
        (backup,) = committed
        assert series.read_manifest(store, backup).streams[0].stored.size == store.objects[f"{backup}/data.zst"][1].size
    else:
        assert committed == {}
        assert [key for key in store.objects if key.endswith("data.zst")] == []


class FailingStore(MemoryStore):
    """Fails calls by a rule; ``after`` the work was done (a lost reply) or before."""

    def __init__(self, rule: Callable[[str], bool], *, after: bool) -> None:
        super().__init__()
        self.rule, self.after = rule, after

    def put(
        self,
        key: str,
        body: Body,
        crc64nvme: int,
        *,
        if_absent: bool = True,
        replaces: str | None = None,
        kind: Kind = "record",
        metadata: Metadata = NO_METADATA,
    ) -> StoredObject:
        fails = self.rule(key)
        if fails and not self.after:
            raise StoreUnavailableError("put failed", "503", "")
        stored = super().put(key, body, crc64nvme, if_absent=if_absent, replaces=replaces)
        if fails:
            raise StoreUnavailableError("the reply was lost", "reset", "")
        return stored


def test_an_id_that_another_run_has_is_not_touched() -> None:
    """Run 2's claim fails for another reason than run 1's claim; run 2 must not clean that one up."""
    broken: list[str] = []
    store = FailingStore(lambda key: bool(broken), after=False)
    location = parse_location("first")
    now = dt.datetime.now(dt.UTC)
    first = Destination(location, store, RetryPolicy(0))
    claim = series.new_claim(now)
    assert first.take_claim("20261121T020000Z", claim)
    broken.append("from now on")
    second = Destination(location, store, RetryPolicy(0))
    with pytest.raises(StoreUnavailableError):
        second.take_claim("20261121T020000Z", series.new_claim(now))
    second.clean_up()
    assert series.owns_claim(store, "20261121T020000Z", claim)
    first.clean_up()
    assert store.objects == {}


@pytest.mark.parametrize("lost", ["claim.json", "data.zst", "manifest.json"])
def test_a_lost_reply_is_told_from_a_failure(monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    """The first try worked and its reply vanished: the second finds its own object and goes on."""
    failed: list[str] = []

    def rule(key: str) -> bool:
        if key.endswith(lost) and not failed:
            failed.append(key)
            return True
        return False

    inner = FailingStore(rule, after=True)
    store = RetryingStore(inner, RetryPolicy(5, sleep=lambda _: None))
    monkeypatch.setattr(push_module, "open_store", lambda location, **_: store)
    result = push(["memory"], CommandSource(["echo", "data"]))
    assert failed != []
    assert result.complete
    assert sorted(inner.objects) == [f"{result.id}/data.zst", f"{result.id}/manifest.json"]


@pytest.mark.parametrize("broken", ["claim.json", "data.zst", "manifest.json"])
def test_a_store_that_fails_for_good_leaves_nothing_listed(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    inner = FailingStore(lambda key: key.endswith(broken), after=False)
    clock = [0.0]
    policy = RetryPolicy(5, sleep=lambda s: clock.__setitem__(0, clock[0] + s), clock=lambda: clock[0])
    monkeypatch.setattr(push_module, "open_store", lambda location, **_: RetryingStore(inner, policy))
    with pytest.raises(StoreUnavailableError):
        push(["memory"], CommandSource(["echo", "data"]))
    assert series.committed_backups(inner) == {}
    if broken != "manifest.json":  # after the manifest was sent nothing is deleted: it might stand
        assert inner.objects == {}


def test_what_a_store_gives_nothing_to_compare_is_unverifiable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither checksum nor ETag: not ok, not a problem, and said; reading it all tells."""

    class Mute(MemoryStore):
        def stat(self, key: str) -> StoredObject | None:
            found = super().stat(key)
            return msgspec.structs.replace(found, etag=None, checksum=None) if found is not None else None

        def put(
            self,
            key: str,
            body: Body,
            crc64nvme: int,
            *,
            if_absent: bool = True,
            replaces: str | None = None,
            kind: Kind = "record",
            metadata: Metadata = NO_METADATA,
        ) -> StoredObject:
            stored = super().put(key, body, crc64nvme, if_absent=if_absent, kind=kind)
            return msgspec.structs.replace(stored, etag=None, checksum=None)

    store = Mute()
    monkeypatch.setattr(push_module, "open_store", lambda location, **_: store)
    monkeypatch.setattr(verify_module, "open_store", lambda location, **_: store)
    push(["memory"], CommandSource(["echo", "data"]))
    states = {check.check: check.state for check in verify_module.verify("memory").checks}
    assert states == {"manifest": "ok", "exists": "ok", "size": "ok", "checksum": "unverifiable"}
    assert verify_module.verify("memory", deep=True).checks[-1].state == "ok"


def test_a_put_of_other_content_is_a_conflict() -> None:
    store = MemoryStore()
    retrying = RetryingStore(store, RetryPolicy(1, sleep=lambda _: None))
    retrying.put("x", b"a", crc64nvme(b"a"))
    with pytest.raises(PreconditionError):
        retrying.put("x", b"a", crc64nvme(b"a"))


def test_a_destination_that_is_gone_at_the_start_does_not_blame_the_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One store is away, the other's id is taken for a second: the push goes to the other, a second later."""
    away = FailingStore(lambda key: True, after=False)
    busy = MemoryStore()
    stores = iter([away, busy])
    monkeypatch.setattr(push_module, "open_store", lambda location, **_: next(stores))
    now = dt.datetime.now(dt.UTC).replace(microsecond=0)
    for second in range(2):
        taken = names.backup_id(now + dt.timedelta(seconds=second))
        busy.put(f"{taken}/claim.json", b"theirs", crc64nvme(b"theirs"))
    result = push(["away", "busy"], CommandSource(["echo", "data"]), PushOptions(require="any"))
    assert [d.state for d in result.destinations] == ["failed", "committed"]
    assert sum(content == b"theirs" for content, _ in busy.objects.values()) == 2


def test_a_stream_that_ends_in_the_middle_of_everything_raises_whole() -> None:
    """The errors of the tree survive a pickle-less trip through threads: same object, same parts."""
    error = FailedError("what", "why", "next")
    with pytest.raises(BackhaulError) as caught, Supervisor("whole") as group:
        group.start(lambda: (_ for _ in ()).throw(error), "raises")
    assert caught.value is error
