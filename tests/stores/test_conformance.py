"""The conformance suite over every store, bare and in its wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from backhaul.formats.location import parse_location
from backhaul.stores.base import Store
from backhaul.stores.local import LocalStore
from backhaul.stores.open import open_store
from backhaul.stores.retry import RetryingStore, RetryPolicy
from backhaul.stores.throttle import RateLimit, ThrottledStore
from backhaul.testing.conformance import StoreConformance
from backhaul.testing.memory_store import MemoryStore

NO_LIMIT = RateLimit(lambda count: None, lambda count: None, 1 << 20)


class TestMemory(StoreConformance):
    small_part = 100

    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()


class TestLocal(StoreConformance):
    small_part = 100

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        store = LocalStore(str(tmp_path / "a series" / "ü"))
        yield store
        store.close()


class TestWrapped(StoreConformance):
    """Retrying and throttling change when things happen, not what."""

    small_part = 100

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        throttled = ThrottledStore(LocalStore(str(tmp_path)), NO_LIMIT)
        store = RetryingStore(throttled, RetryPolicy(1.0))
        yield store
        store.close()


class TestSeaweedFS(StoreConformance):
    listed = 250  # 1,250 objects: more than a page of a listing

    @pytest.fixture
    def store(self, s3_environment: None, bucket: str) -> Iterator[Store]:
        store = open_store(parse_location(f"s3://{bucket}/some series/ü"))
        yield store
        store.close()


class TestThrottledSeaweedFS(StoreConformance):
    @pytest.fixture
    def store(self, s3_environment: None, bucket: str) -> Iterator[Store]:
        store = open_store(parse_location(f"s3://{bucket}/series"), limit=NO_LIMIT)
        yield store
        store.close()
