"""Parts on their way: how many at once, which ones twice, and that memory is not reused while a try still reads it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backhaul.errors import StoreThrottledError, StoreUnavailableError
from backhaul.formats.part_sizes import PartLayout
from backhaul.model.objects import Upload, UploadedPart
from backhaul.pipeline.supervisor import StoppedError, Supervisor
from backhaul.pipeline.token_bucket import TokenBucket
from backhaul.planning.concurrency import START, UploadConcurrency
from backhaul.planning.hedging import HedgePolicy
from backhaul.stores.base import PartRules
from backhaul.stores.body import Body, BodyCancelledError, PartBody
from backhaul.stores.multipart import StreamWriter
from backhaul.stores.retry import RetryingStore, RetryPolicy
from backhaul.stores.sending import PartJob, PartSender
from backhaul.stores.throttle import RateLimit, ThrottledStore
from backhaul.testing.memory_store import MemoryStore
from backhaul.transforms.digest import crc64nvme

pytestmark = pytest.mark.unit


@pytest.fixture
def group() -> Iterator[Supervisor]:
    with Supervisor("test", grace=1.0) as group:
        yield group


def part(number: int = 1) -> UploadedPart:
    return UploadedPart(number=number, size=1, etag=str(number), crc64nvme=0)


def job(send: Callable[[], UploadedPart], size: int = 10, events: list[str] | None = None) -> PartJob:
    log = events if events is not None else []
    return PartJob(
        PartBody(bytes(size)), lambda _: send(), lambda part: log.append("done"), lambda: log.append("released")
    )


# -- the sender --------------------------------------------------------------------------------------------


def test_as_many_as_the_limit_at_once(group: Supervisor) -> None:
    running = most = 0
    lock = threading.Lock()

    def send() -> UploadedPart:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        with lock:
            running -= 1
        return part()

    sender = PartSender(group, "s", UploadConcurrency(3))
    for _ in range(40):
        sender.submit(job(send))
    sender.drain()
    assert running == 0
    assert most == 3
    sender.close()


def test_large_parts_go_one_by_one(group: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backhaul.stores.sending.MAX_UNDER_WAY", 25)
    most = running = 0
    lock = threading.Lock()

    def send() -> UploadedPart:
        nonlocal most, running
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        with lock:
            running -= 1
        return part()

    sender = PartSender(group, "s", UploadConcurrency(8, 8))
    for size in [10] * 10 + [100] * 3:
        sender.submit(job(send, size))
    sender.drain()
    assert most == 2
    sender.close()


def test_a_failure_is_the_senders_own(group: Supervisor) -> None:
    events: list[str] = []

    def fails() -> UploadedPart:
        raise StoreUnavailableError("boom")

    sender = PartSender(group, "s", UploadConcurrency(2))
    sender.submit(job(fails, events=events))
    with pytest.raises(StoreUnavailableError):
        sender.drain()
    with pytest.raises(StoreUnavailableError):
        sender.submit(job(part))
    assert not group.stopped
    assert sender.wait_idle(1)
    assert events == ["released"]
    sender.close()


def test_a_stop_reaches_whoever_waits(group: Supervisor) -> None:
    hang = threading.Event()

    def hangs() -> UploadedPart:
        hang.wait(10)
        return part()

    sender = PartSender(group, "s", UploadConcurrency(1))
    sender.submit(job(hangs))
    threading.Timer(0.05, group.stop).start()
    with pytest.raises(StoppedError):
        sender.submit(job(part))
    hang.set()


def test_the_slowest_part_is_tried_twice_and_its_memory_kept(group: Supervisor) -> None:
    """The first try hangs; a second one gets the part there. The bytes stay as they are until the first lets go."""
    sender = PartSender(group, "s", UploadConcurrency(4), HedgePolicy(least=0.01))
    for _ in range(8):
        sender.submit(job(part))
    sender.drain()
    events: list[str] = []
    let_go = threading.Event()
    tries: list[int] = []
    slow: PartJob

    def send() -> UploadedPart:
        tries.append(1)
        if len(tries) == 1:
            let_go.wait(20)
            with pytest.raises(BodyCancelledError):
                slow.body.open().read()
            raise BodyCancelledError
        return part()

    slow = job(send, events=events)
    sender.submit(slow)
    sender.drain()
    assert events == ["done"]
    assert len(tries) == 2
    assert sender.hedges == 1

    def slow_too() -> UploadedPart:
        time.sleep(0.6)
        return part()

    sender.submit(job(slow_too))  # the sender goes on although a try still hangs
    sender.drain()
    assert sender.hedges == 1, "no second one while the first one's loser holds its memory"
    let_go.set()
    assert sender.wait_idle(5)
    assert events == ["done", "released"]
    sender.close()


def test_what_was_not_sent_says_nothing_of_the_store(group: Supervisor) -> None:
    """Parts that an earlier run had sent are acknowledged at the speed of hashing: no pace to compare others with."""
    policy = HedgePolicy(least=0.0)
    sender = PartSender(group, "s", UploadConcurrency(4), policy)
    for _ in range(20):
        known = job(part)
        known.measured = False
        sender.submit(known)
    sender.drain()
    assert not policy.is_slow(10, 1e6)
    sender.close()


def test_a_hedge_that_fails_does_no_harm(group: Supervisor) -> None:
    sender = PartSender(group, "s", UploadConcurrency(4), HedgePolicy(least=0.01))
    for _ in range(8):
        sender.submit(job(part))
    sender.drain()
    hedged = threading.Event()
    tries: list[int] = []

    def send() -> UploadedPart:
        tries.append(1)
        if len(tries) == 1:
            assert hedged.wait(20)
            time.sleep(0.05)
            return part()
        hedged.set()
        raise StoreUnavailableError("503")

    events: list[str] = []
    sender.submit(job(send, events=events))
    sender.drain()
    assert events == ["done", "released"]
    sender.close()


def test_when_both_tries_fail_the_part_has_failed(group: Supervisor) -> None:
    sender = PartSender(group, "s", UploadConcurrency(4), HedgePolicy(least=0.01))
    for _ in range(8):
        sender.submit(job(part))
    sender.drain()
    hedged = threading.Event()
    tries: list[int] = []

    def send() -> UploadedPart:
        tries.append(1)
        if len(tries) == 1:
            assert hedged.wait(20)
            raise StoreUnavailableError("first")
        hedged.set()
        raise StoreUnavailableError("second")

    sender.submit(job(send))
    with pytest.raises(StoreUnavailableError):
        sender.drain()
    assert sender.wait_idle(5)
    sender.close()


def test_dropping_a_stalled_destination_ends_its_tries(group: Supervisor) -> None:
    stalled = StoreUnavailableError("stalled")
    began = threading.Event()

    def send() -> UploadedPart:
        began.set()
        body = the_job.body
        while True:
            body.open().read()
            time.sleep(0.001)

    sender = PartSender(group, "s", UploadConcurrency(1))
    the_job = job(send)
    sender.submit(the_job)
    assert began.wait(5)
    sender.fail(stalled)
    with pytest.raises(StoreUnavailableError) as caught:
        sender.drain()
    assert caught.value is stalled
    assert sender.wait_idle(5)
    sender.close()


# -- how many at once: simulated -----------------------------------------------------------------------------


def simulated(controller: UploadConcurrency, rate: Callable[[int], float], seconds: float, start: float = 0.0) -> float:
    """Send 8 MB parts for some time over a link that gives ``rate(connections)`` bytes a second in all."""
    now = start
    while now < start + seconds:
        at_once = controller.limit
        now += 8e6 / rate(at_once)
        controller.waited()
        controller.acknowledged(now, 8_000_000)
    return now


def test_it_climbs_while_that_helps_and_no_further() -> None:
    """Each connection carries 10 MB/s and the link 80: eight are best."""
    controller = UploadConcurrency(12)
    simulated(controller, lambda n: min(10e6 * n, 80e6), 600)
    assert 7 <= controller.limit <= 9


def test_it_stays_low_where_more_does_not_help() -> None:
    controller = UploadConcurrency(12)
    simulated(controller, lambda n: 50e6, 300)
    assert controller.limit <= START


def test_it_climbs_to_the_top_of_a_wide_link() -> None:
    controller = UploadConcurrency(12)
    simulated(controller, lambda n: 10e6 * n, 300)
    assert controller.limit == 12


def test_it_is_cut_by_half_when_the_store_asks_and_recovers() -> None:
    controller = UploadConcurrency(12)
    now = simulated(controller, lambda n: 10e6 * n, 300)
    for _ in range(5):  # a burst counts once
        controller.throttled(now)
    assert controller.limit == 6
    controller.throttled(now + 10)
    assert controller.limit == 3
    for later in range(20):
        controller.throttled(now + 20 + 10 * later)
    assert controller.limit == 1
    simulated(controller, lambda n: 10e6 * n, 900, now + 300)
    assert controller.limit == 12


def test_a_stream_that_sets_the_pace_says_nothing_of_the_store() -> None:
    controller = UploadConcurrency(12)
    for tick in range(1000):
        controller.acknowledged(tick, 8_000_000)  # nobody ever waited
    assert controller.limit == START


@given(
    st.lists(st.tuples(st.sampled_from(["part", "wait", "503"]), st.floats(0, 5), st.integers(1, 10**9))),
    st.integers(1, 12),
)
def test_the_limit_is_always_legal(events: list[tuple[str, float, int]], most: int) -> None:
    controller = UploadConcurrency(most)
    now = 0.0
    for kind, pause, size in events:
        now += pause
        if kind == "part":
            controller.acknowledged(now, size)
        elif kind == "wait":
            controller.waited()
        else:
            controller.throttled(now)
        assert 1 <= controller.limit <= most


# -- which ones twice ------------------------------------------------------------------------------------------


def test_a_part_is_slow_only_beside_its_neighbours() -> None:
    policy = HedgePolicy(least=1.0)
    assert not policy.is_slow(100, 1e6), "nothing to compare with yet"
    for _ in range(10):
        policy.finished(100, 2.0)
    assert not policy.is_slow(100, 7.9)
    assert policy.is_slow(100, 8.1)
    assert not policy.is_slow(1000, 70.0), "a larger part may take longer"


def test_hedges_are_few() -> None:
    policy = HedgePolicy(least=0.0)
    generator = random.Random(1)
    hedges = 0
    for _ in range(2000):
        policy.finished(100, generator.uniform(1, 2))
        if policy.is_slow(100, 1e9):
            policy.hedged()
            hedges += 1
    assert 0 < hedges <= 2000 / 20 + 1


# -- bodies, limits and retries --------------------------------------------------------------------------------


def consumed(body: PartBody) -> bytes:
    reader = body.open()
    pieces = []
    while piece := reader.read(16):
        pieces.append(bytes(piece))
    return b"".join(pieces)


@given(st.binary(max_size=200), st.integers(1, 50), st.lists(st.integers(0, 30), max_size=5))
def test_bytes_are_charged_once_however_often_they_are_sent(content: bytes, piece: int, breaks: list[int]) -> None:
    """Tries break off anywhere; what was charged in the end is the length, and each try reads the same bytes."""
    charged: list[int] = []
    again: list[int] = []
    body = PartBody(content)
    body.pace(charged.append, again.append, piece)
    for pieces in breaks:
        reader = body.open()
        for _ in range(pieces):
            reader.read()
    assert consumed(body) == content
    assert sum(charged) == len(content) == body.reached
    total = sum(charged) + sum(again)
    assert consumed(body) == content
    assert sum(charged) == len(content)
    assert sum(charged) + sum(again) == total + len(content)


def test_few_bytes_are_handed_over_at_once_and_charged_once() -> None:
    charged: list[int] = []
    again: list[int] = []
    body = PartBody(b"x" * 50_000)
    body.pace(charged.append, again.append, 64 << 10)
    assert bytes(body.whole() or b"") == b"x" * 50_000
    assert (charged, again, body.reached) == ([50_000], [], 50_000)
    assert bytes(body.whole() or b"") == b"x" * 50_000
    assert (charged, again, body.reached) == ([50_000], [50_000], 50_000)
    body.cancel()
    with pytest.raises(BodyCancelledError):
        body.whole()


def test_what_is_paced_in_smaller_pieces_or_is_much_is_not_handed_over_at_once() -> None:
    slow = PartBody(bytes(2000))
    slow.pace(lambda count: None, lambda count: None, 1999)
    assert slow.whole() is None
    assert PartBody(bytes((64 << 10) + 1)).whole() is None
    assert slow.reached == 0
    slow.open().read()
    slow.pace(lambda count: None, lambda count: None, 1 << 20)
    assert slow.whole() is None, "a part of it has left in a piece of its own"


def test_pieces_grow_while_the_line_takes_them_at_once_and_begin_small_again_when_it_does_not() -> None:
    now = 0.0
    body = PartBody(bytes(5 << 20), clock=lambda: now)
    reader = body.open()
    sizes = []
    for seconds in (0.0, 0.01, 0.01, 0.01, 0.01, 0.01, 0.3, 0.01):
        now += seconds
        sizes.append(len(reader.read()) >> 10)
    assert sizes == [64, 128, 256, 256, 256, 256, 64, 128]
    again = body.open()
    assert [len(again.read()) >> 10 for _ in range(3)] == [64, 64, 64], "a second try is as patient as can be"


class Flaky(MemoryStore):
    """Every part fails twice after all of its bytes went out."""

    def __init__(self) -> None:
        super().__init__()
        self.tries: dict[int, int] = {}
        self.sent = 0

    def put_part(self, upload: Upload, number: int, offset: int, body: Body, crc64nvme: int) -> UploadedPart:
        stored = super().put_part(upload, number, offset, body, crc64nvme)
        self.sent += len(body)
        self.tries[number] = self.tries.get(number, 0) + 1
        if self.tries[number] < 3:
            raise StoreThrottledError("503")
        return stored


def test_retries_do_not_count_against_the_limit() -> None:
    inner = Flaky()
    fresh: list[int] = []
    again: list[int] = []
    limit = RateLimit(fresh.append, again.append, 1000)
    store = ThrottledStore(RetryingStore(inner, RetryPolicy(60, sleep=lambda _: None)), limit)
    upload = store.begin("x")
    content = bytes(5500)
    for number in (1, 2):
        store.put_part(upload, number, 0, content, crc64nvme(content))
    assert inner.sent == 6 * 5500
    assert sum(fresh) == 2 * 5500
    assert sum(again) == 4 * 5500


@pytest.mark.parametrize("rate", [100_000, 5_000_000, 400_000_000])
@pytest.mark.parametrize("connections", [1, 3, 16])
def test_the_limit_is_exact_within_five_percent_over_ten_seconds(rate: int, connections: int) -> None:
    """One bucket over many connections; counted in virtual time, over every ten seconds of a minute."""
    now = 0.0
    passed: list[tuple[float, int]] = []
    piece = min(64 << 10, int(rate * 0.02))
    waits: list[float] = []
    bucket = TokenBucket(lambda: rate, clock=lambda: now, sleep=waits.append)
    wakes = [0.0] * connections
    while now < 60:
        # The connection that wakes first sends its next piece, and sleeps until that is due.
        first = min(range(connections), key=lambda i: wakes[i])
        now = max(now, wakes[first])
        waits.clear()
        bucket.take(piece)
        wakes[first] = now + sum(waits)
        passed.append((wakes[first], piece))
    for start in range(0, 45, 5):
        sent = sum(size for time_, size in passed if start <= time_ < start + 10)
        assert abs(sent / (10 * rate) - 1) < 0.05, start


def test_the_limit_follows_the_timetable() -> None:
    now = 0.0
    waits: list[float] = []
    bucket = TokenBucket(lambda: 1000 if now < 10 else None if now < 20 else 500, clock=lambda: now, sleep=waits.append)
    sent = {"first": 0, "free": 0, "last": 0}
    while now < 30:
        phase = "first" if now < 10 else "free" if now < 20 else "last"
        waits.clear()
        bucket.take(20)
        sent[phase] += 20
        now += sum(waits) or (0.001 if phase == "free" else 0)
    assert abs(sent["first"] / 10_000 - 1) < 0.05
    assert sent["free"] > 9_900 * 20, "nothing waits while there is no limit"
    assert abs(sent["last"] / 5_000 - 1) < 0.05


# -- the writer ------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 25), max_size=40),
    st.integers(1, 12),
    st.integers(1, 6),
    st.integers(0, 3),
    st.booleans(),
)
def test_any_stream_is_cut_legally_and_comes_back(
    sizes: list[int], first: int, parts: int, step: int, growing: bool
) -> None:
    """Pieces of any size through layouts of any shape; a segment holds whole pieces as long as one fits."""
    layout = PartLayout(
        first=first,
        step=step,
        growing_segments=growing,
        largest=8 * first,
        max_parts=max(parts, 25 // first + 1),
        max_object=1 << 40,
        numbered=True,
    )
    store = MemoryStore(parts=PartRules(buffered=True, parallel=2, layout=layout))
    generator = random.Random(1)
    pieces = [generator.randbytes(size) for size in sizes]
    whole = b"".join(pieces)
    sent: list[int] = []
    with Supervisor("writer") as group:
        writer = StreamWriter(
            store, store.parts(), lambda n: f"x.{n:04d}", group, on_sent=lambda size, reused: sent.append(size)
        )
        for piece in pieces:
            writer.write(piece)
        writer.finish()
        assert store.objects == {}
        segments = writer.commit(crc64nvme(whole))
        writer.close()
    assert b"".join(store.objects[segment.key][0] for segment in segments) == whole
    assert sum(sent) == len(whole)
    assert store.uploads == {}
    ends = {sum(sizes[:n]) for n in range(len(sizes) + 1)}
    at = 0
    for number, segment in enumerate(segments, 1):
        assert segment.size <= layout.capacity(number)
        at += segment.size
        assert at in ends
