"""From a location to a store with the wrappers that it needs."""

from __future__ import annotations

from collections.abc import Callable

from backhaul.model.location import Location
from backhaul.stores.base import Store
from backhaul.stores.local import LocalStore
from backhaul.stores.retry import RetryingStore, RetryPolicy
from backhaul.stores.throttle import ThrottledStore

DEFAULT_PATIENCE = 60.0


def open_store(
    location: Location,
    *,
    policy: RetryPolicy | None = None,
    throttle: Callable[[int], None] | None = None,
) -> Store:
    """Return the store at a location.

    Args:
        location: where it is.
        policy: how long a remote store that is ill or away is tried again.
        throttle: called with a count before that many bytes of a body go out; waits for the rate limit.

    Raises:
        StoreRefusedError: no credentials, or settings that make no sense. No request is made here.
    """
    store: Store
    if location.kind == "s3":
        from backhaul.stores.s3.store import S3Store  # boto3 takes a while to load

        store = S3Store(location)
    else:
        store = LocalStore(location.path)
    if throttle is not None:
        store = ThrottledStore(store, throttle)
    if location.kind == "s3":
        store = RetryingStore(store, policy or RetryPolicy(DEFAULT_PATIENCE))
    return store
