"""From a location to a store with the wrappers that it needs."""

from __future__ import annotations

from backhaul.model.location import Location
from backhaul.stores.base import Store
from backhaul.stores.local import LocalStore
from backhaul.stores.retry import RetryingStore, RetryPolicy
from backhaul.stores.throttle import RateLimit, ThrottledStore

# Longer than the outages that pass by themselves: a restart, a failover, ten minutes of a line that is down.
DEFAULT_PATIENCE = 15 * 60.0


def open_store(
    location: Location,
    *,
    policy: RetryPolicy | None = None,
    limit: RateLimit | None = None,
) -> Store:
    """Return the store at a location.

    Args:
        location: where it is.
        policy: how long a remote store that is ill or away is tried again.
        limit: what every byte of a body waits for.

    Raises:
        StoreRefusedError: no credentials, or settings that make no sense. No request is made here.
    """
    store = bare_store(location)
    if location.kind == "s3":
        store = RetryingStore(store, policy or RetryPolicy(DEFAULT_PATIENCE))
    if limit is not None:
        store = ThrottledStore(store, limit)
    return store


def bare_store(location: Location) -> Store:
    """Return the store itself, without any wrapper. (Tests put another one in its place.)"""
    if location.kind == "s3":
        from backhaul.stores.s3.store import S3Store  # botocore takes a while to load

        return S3Store(location)
    return LocalStore(location.path)
