"""What is tried again, how long, and with which pauses; on a clock that the test moves."""

from __future__ import annotations

import ssl
from typing import Any

import pytest
from botocore import exceptions as boto

from backhaul.errors import (
    ObjectNotFoundError,
    PreconditionError,
    StoreError,
    StoreFullError,
    StoreRefusedError,
    StoreThrottledError,
    StoreUnavailableError,
    StoreUnreachableError,
)
from backhaul.model.objects import StoredObject
from backhaul.stores.base import BrokenReadError
from backhaul.stores.retry import LONGEST_PAUSE, RetryingStore, RetryPolicy
from backhaul.stores.s3.errors import translated
from backhaul.testing.memory_store import MemoryStore
from backhaul.transforms.digest import crc64nvme

pytestmark = pytest.mark.unit


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def policy(self, patience: float, reach_patience: float | None = None) -> RetryPolicy:
        return RetryPolicy(patience, reach_patience, sleep=self.sleep, clock=lambda: self.now, jitter=lambda: 0.5)


class Failing(MemoryStore):
    """``stat`` raises the errors that it was given, in order, and then works."""

    def __init__(self, errors: list[Exception]) -> None:
        super().__init__()
        self.errors = errors

    def stat(self, key: str) -> StoredObject | None:
        if self.errors:
            raise self.errors.pop(0)
        return super().stat(key)


def test_a_passing_failure_passes() -> None:
    clock = Clock()
    policy = clock.policy(60)
    store = RetryingStore(Failing([StoreUnavailableError("503")] * 4), policy)
    assert store.stat("x") is None
    assert policy.retries == 4
    assert clock.pauses == sorted(clock.pauses), "pauses grow"


def test_a_refusal_is_final_at_once() -> None:
    clock = Clock()
    store = RetryingStore(Failing([StoreRefusedError("denied")]), clock.policy(60))
    with pytest.raises(StoreRefusedError):
        store.stat("x")
    assert clock.pauses == []


def test_patience_ends_and_the_last_error_is_raised() -> None:
    clock = Clock()
    errors = [StoreUnavailableError(str(n)) for n in range(1000)]
    policy = clock.policy(60)
    store = RetryingStore(Failing(list(errors)), policy)
    with pytest.raises(StoreUnavailableError) as caught:
        store.stat("x")
    assert caught.value is errors[policy.retries]
    assert 45 < clock.now <= 60
    assert max(clock.pauses) <= LONGEST_PAUSE


def test_nobody_there_has_a_patience_of_its_own() -> None:
    for error, patience in ((StoreUnreachableError("refused"), 3), (StoreUnavailableError("503"), 60)):
        clock = Clock()
        store = RetryingStore(Failing([error] * 1000), clock.policy(60, reach_patience=3))
        with pytest.raises(StoreUnavailableError):
            store.stat("x")
        assert patience / 2 < clock.now <= patience


def test_silence_counts_from_the_beginning() -> None:
    """A store that takes a minute to fail has used its patience up by then."""
    clock = Clock()

    class Silent(MemoryStore):
        calls = 0

        def stat(self, key: str) -> StoredObject | None:
            self.calls += 1
            clock.now += 60
            raise StoreUnavailableError("timed out")

    silent = Silent()
    with pytest.raises(StoreUnavailableError):
        RetryingStore(silent, clock.policy(10)).stat("x")
    assert silent.calls == 1


def test_a_read_that_moves_on_keeps_its_patience() -> None:
    """Each piece that arrives is progress: a slow, breaking line ends a pull only when nothing comes at all."""
    clock = Clock()
    content = bytes(range(256)) * 4

    class Breaking(MemoryStore):
        def read_into(self, key: str, offset: int, out: memoryview, *, etag: str | None = None) -> None:
            clock.now += 30
            if len(out) > 10:
                out[:10] = content[offset : offset + 10]
                raise BrokenReadError(10, ConnectionError("reset"))
            super().read_into(key, offset, out, etag=etag)

    inner = Breaking()
    inner.put("x", content, crc64nvme(content))
    out = bytearray(len(content))
    policy = clock.policy(40)
    store = RetryingStore(inner, policy)
    store.read_into("x", 0, memoryview(out))
    assert out == content
    assert policy.retries == len(content) // 10


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        ("SlowDown", 503, StoreThrottledError),
        ("TooManyRequests", 429, StoreThrottledError),
        ("InternalError", 500, StoreUnavailableError),
        ("BadDigest", 400, StoreUnavailableError),
        ("ConditionalRequestConflict", 409, StoreUnavailableError),
        ("PreconditionFailed", 412, PreconditionError),
        ("NoSuchUpload", 404, ObjectNotFoundError),
        ("NoSuchBucket", 404, StoreRefusedError),
        ("AccessDenied", 403, StoreRefusedError),
        ("QuotaExceeded", 403, StoreFullError),
        ("NotImplemented", 501, StoreError),
        ("InvalidObjectState", 403, StoreError),
    ],
)
def test_answers_are_classified(code: str, status: int, expected: type[StoreError]) -> None:
    """Throttled, transient, permanent, precondition: decided once, where botocore's words come in."""
    reply: Any = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error = translated(boto.ClientError(reply, "PutObject"), "Could not", bucket="b", endpoint="http://e")
    assert type(error) is expected
    assert error.why and error.todo


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate", StoreRefusedError),
        ("[SSL: WRONG_VERSION_NUMBER] wrong version number", StoreRefusedError),
        ("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol", StoreUnavailableError),
    ],
)
def test_tls_that_is_set_up_wrongly_is_told_from_tls_that_broke(words: str, expected: type[StoreError]) -> None:
    error = translated(
        boto.SSLError(endpoint_url="https://e", error=ssl.SSLError(1, words)),
        "Could not",
        bucket="b",
        endpoint="https://e",
    )
    assert type(error) is expected
