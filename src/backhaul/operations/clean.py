"""clean: remove what dead runs left in a series. Committed backups are never touched."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

import msgspec

from backhaul.formats import names
from backhaul.model.objects import Upload
from backhaul.model.results import CleanAction, CleanResult
from backhaul.operations.places import series_at
from backhaul.planning.leftovers import plan_clean
from backhaul.stores.base import Store
from backhaul.stores.open import open_store

DEFAULT_AGE = 24 * 3600.0


def clean(
    text: str,
    *,
    older_than: float = DEFAULT_AGE,
    dry_run: bool = False,
    now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
) -> CleanResult:
    """Remove unfinished uploads and uncommitted objects whose run shows no activity any more.

    Args:
        text: SERIES.
        older_than: seconds without activity after which a run counts as dead.
        dry_run: only say what would go.
        now: the clock.

    Raises:
        StoreError: the series could not be listed, or something could not be removed.
    """
    location = series_at(text)
    store = open_store(location)
    try:
        # Uploads first: what is completed between the two listings then shows as an object, too young to go.
        uploads = list(store.unfinished())
        remove, keep = plan_clean(store.list(), uploads, now=now(), older_than=older_than)
        removed = []
        for action in remove:
            if dry_run or _remove(store, action):
                removed.append(action)
            else:
                keep.append(
                    msgspec.structs.replace(
                        action,
                        reason="its object is there: an abort might harm it"
                        if action.kind == "upload"
                        else "its backup was committed meanwhile",
                    )
                )
        return CleanResult(series=text, dry_run=dry_run, removed=tuple(removed), kept=tuple(keep))
    finally:
        store.close()


def _remove(store: Store, action: CleanAction) -> bool:
    """Remove one leftover, unless its run has committed since the listing; tell whether it went."""
    if action.kind == "upload":
        if not store.profile.aborts_safely and store.stat(action.key) is not None:
            return False
        store.abort(Upload(key=action.key, token=action.token))
        return True
    name = names.parse_key(action.key)
    assert name is not None
    if name.kind != "claim" and store.stat(names.object_key(name.id, names.MANIFEST)) is not None:
        return False
    store.delete(action.key)
    return True
