"""The conformance suite over every store, bare and in its wrappers."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from backhaul.errors import ObjectNotFoundError
from backhaul.formats.location import parse_location
from backhaul.formats.profiles import S3_PROVIDERS
from backhaul.model.profile import UNORDERED
from backhaul.stores.base import Store
from backhaul.stores.local import LocalStore
from backhaul.stores.open import open_store
from backhaul.stores.retry import RetryingStore, RetryPolicy
from backhaul.stores.throttle import RateLimit, ThrottledStore
from backhaul.testing.conformance import StoreConformance
from backhaul.testing.memory_store import MemoryStore
from backhaul.testing.providers import ProviderProxy, ProviderRules
from backhaul.testing.servers import MotoS3, RcloneS3, SeaweedFS, SmallS3, s3_client
from backhaul.transforms.digest import crc64nvme

_numbers = itertools.count(1)
NO_LIMIT = RateLimit(lambda count: None, lambda count: None, 1 << 20)


class TestMemory(StoreConformance):
    small_part = 100

    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()


class TestLocal(StoreConformance):
    small_part = 100
    resumable = False

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        store = LocalStore(str(tmp_path / "a series" / "ü"))
        yield store
        store.close()


class TestWrapped(StoreConformance):
    """Retrying and throttling change when things happen, not what."""

    small_part = 100
    resumable = False

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
        store = open_store(parse_location(f"s3://{bucket}/some series/ü"), policy=RetryPolicy(1))
        yield store
        store.close()


class TestThrottledSeaweedFS(StoreConformance):
    @pytest.fixture
    def store(self, s3_environment: None, bucket: str) -> Iterator[Store]:
        store = open_store(parse_location(f"s3://{bucket}/series"), limit=NO_LIMIT, policy=RetryPolicy(1))
        yield store
        store.close()


@pytest.fixture(scope="module")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallS3]:
    yield from running(RcloneS3(tmp_path_factory.mktemp("rclone") / "data"))


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallS3]:
    yield from running(MotoS3(tmp_path_factory.mktemp("moto") / "data"))


def running(server: SmallS3) -> Iterator[SmallS3]:
    server.start()
    try:
        yield server
    finally:
        server.kill()


def store_on(endpoint: str, settings: str = "") -> Iterator[Store]:
    """A bucket of its own, and a series in it, as Backhaul opens it."""
    name = f"store-{os.getpid()}-{next(_numbers)}"
    client = s3_client(endpoint)
    client.create_bucket(Bucket=name)
    client.close()
    store = open_store(parse_location(f"s3://{name}/series?endpoint={endpoint}{settings}"), policy=RetryPolicy(1))
    yield store
    store.close()


class TestRclone(StoreConformance):
    @pytest.fixture
    def store(self, s3_environment: None, rclone: SmallS3) -> Iterator[Store]:
        for store in store_on(rclone.endpoint):
            assert store.profile.name == "rclone"
            yield store


class TestMoto(StoreConformance):
    """A store that is not known: what the generic profile does without is enough."""

    @pytest.fixture
    def store(self, s3_environment: None, moto: SmallS3) -> Iterator[Store]:
        for store in store_on(moto.endpoint):
            assert store.profile.name == "generic"
            yield store


# What each provider takes, from its documentation (docs/PROVIDERS.md), not from the table in the code. Sizes that
# can't be reached here are scaled down: the client is told of the smaller number of parts by its own setting.
FEW = "&max-parts=3"
RULES: dict[str, tuple[ProviderRules, str]] = {
    "aws": (ProviderRules(), ""),
    "r2": (ProviderRules(equal_parts=True, max_parts=3), FEW),
    "b2": (ProviderRules(checksums=False, conditional_writes="refused", opaque_etags=True), ""),
    "wasabi": (ProviderRules(checksums=False, conditional_writes="ignored"), ""),
    "minio": (ProviderRules(), ""),
    "ceph": (ProviderRules(ignores_checksums=True, conditional_writes="ignored"), ""),
    "gcs": (
        ProviderRules(checksums=False, conditional_writes="ignored", part_copies=False, opaque_etags=True),
        "",
    ),
    "scaleway": (ProviderRules(max_parts=3), FEW),
    "generic": (
        ProviderRules(
            equal_parts=True,
            max_parts=3,
            checksums=False,
            conditional_writes="refused",
            part_copies=False,
            opaque_etags=True,
        ),
        FEW,
    ),
}


def test_every_provider_is_played() -> None:
    assert {*RULES, "rclone", "seaweedfs"} == set(S3_PROVIDERS)


class TestProviders(StoreConformance):
    """Providers that can't be reached from a test: their rules, kept by a proxy in front of SeaweedFS."""

    rounds = 5  # 80 MB: three segments where an upload has 3 parts
    listing = UNORDERED  # it is SeaweedFS's, whoever is played

    @pytest.fixture(params=list(RULES))
    def store(self, s3_environment: None, seaweed: SeaweedFS, request: pytest.FixtureRequest) -> Iterator[Store]:
        rules, settings = RULES[request.param]
        with ProviderProxy(seaweed.endpoint, rules) as proxy:
            yield from store_on(proxy.endpoint, f"&provider={request.param}{settings}")
            assert proxy.refusals == []


@pytest.mark.parametrize("provider", ["r2", "minio"])
def test_a_provider_that_drops_unfinished_uploads(s3_environment: None, seaweed: SeaweedFS, provider: str) -> None:
    """An upload that was dropped is told apart from one that can be gone on with, and from one that was completed."""
    with ProviderProxy(seaweed.endpoint, ProviderRules(keeps_uploads=False)) as proxy:
        for store in store_on(proxy.endpoint, f"&provider={provider}"):
            upload = store.begin("x/data")
            part = store.put_part(upload, 1, 0, b"content", crc64nvme(b"content"))
            assert proxy.drop_uploads() >= 1
            with pytest.raises(ObjectNotFoundError):
                store.uploaded_parts(upload)
            with pytest.raises(ObjectNotFoundError):
                store.complete(upload, [part], crc64nvme(b"content"))
            store.abort(upload)
            assert list(store.list()) == []
