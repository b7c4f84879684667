"""What lies at a store path: a mirror, or backups."""

from __future__ import annotations

import contextlib

from backhaul.formats import catalog
from backhaul.operations.places import series_at
from backhaul.operations.series import committed_backups
from backhaul.stores.open import open_store


def is_mirror(location_text: str) -> bool:
    """Tell whether there is a mirror at a store path."""
    store = open_store(series_at(location_text))
    with contextlib.closing(store):
        return store.stat(catalog.RECORD) is not None


def is_series(location_text: str) -> bool:
    """Tell whether there is a series of backups at a store path."""
    store = open_store(series_at(location_text))
    with contextlib.closing(store):
        return bool(committed_backups(store))
