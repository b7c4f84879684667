"""The mirror's listing, in order and quickly: cut into ranges at keys that are known, which are listed side by side."""

from __future__ import annotations

import datetime as dt
import itertools
import sqlite3
from collections import deque
from collections.abc import Iterator

from backhaul.formats.listing import place
from backhaul.model.objects import StoredObject
from backhaul.model.profile import UNORDERED
from backhaul.operations.mirror.state import MirrorState
from backhaul.pipeline.supervisor import Supervisor
from backhaul.stores.base import Store

# Ranges are for large listings; a small one is a few pages.
_KEYS_A_RANGE = 10_000
_MOST_RANGES = 4
_PAGE = 1000
_PAGES_AHEAD = 3


def listing(store: Store, state: MirrorState, root: str, group: Supervisor) -> Iterator[StoredObject]:
    """Yield the objects of a copy in the order of the store's profile. Memory: some pages a range.

    Args:
        store: whose objects.
        state: knows keys at which the listing can be cut.
        root: the copy's prefix.
        group: whose threads list; the caller is inside its block.
    """
    order = store.profile.listing
    if order == UNORDERED:
        yield from _sorted(store.list(root))
        return
    ranges = min(_MOST_RANGES, state.count() // _KEYS_A_RANGE + 1)
    cuts = [state.some_key(order, root, number / ranges) for number in range(1, ranges)]
    borders = sorted({cut for cut in cuts if cut}, key=lambda key: place(key, order))
    pages = [
        _Range(group, store.list(root, after=after, until=until))
        for after, until in zip(["", *borders], [*borders, None], strict=True)
    ]
    try:
        for one in pages:
            yield from one
    finally:
        for one in pages:
            one.close()


class _Range:
    """A range that is listed by a thread of its own, some pages ahead of whoever takes."""

    def __init__(self, group: Supervisor, objects: Iterator[StoredObject]) -> None:
        self._group = group
        self._objects = objects
        self._pages: deque[list[StoredObject]] = deque()
        self._done = self._closed = False
        group.start(self._list, "list")

    def _list(self) -> None:
        condition = self._group.condition
        while page := list(itertools.islice(self._objects, _PAGE)):
            with condition:
                self._group.wait_for(lambda: len(self._pages) < _PAGES_AHEAD or self._closed)
                if self._closed:
                    return
                self._pages.append(page)
                condition.notify_all()
        with condition:
            self._done = True
            condition.notify_all()

    def close(self) -> None:
        """Let the thread end: nobody takes any more."""
        with self._group.condition:
            self._closed = True
            self._group.condition.notify_all()

    def __iter__(self) -> Iterator[StoredObject]:
        condition = self._group.condition
        while True:
            with condition:
                self._group.wait_for(lambda: bool(self._pages) or self._done)
                if not self._pages:
                    return
                page = self._pages.popleft()
                condition.notify_all()
            yield from page


def _sorted(objects: Iterator[StoredObject]) -> Iterator[StoredObject]:
    """Sort by key, on the disk where memory would not do."""
    connection = sqlite3.connect("", isolation_level=None)
    connection.execute("PRAGMA cache_size = -16384")
    connection.execute("CREATE TABLE objects(place BLOB, key TEXT, size INTEGER, modified TEXT, etag TEXT)")
    connection.execute("BEGIN")
    connection.executemany(
        "INSERT INTO objects VALUES (?, ?, ?, ?, ?)",
        ((place(o.key, UNORDERED), o.key, o.size, o.modified.isoformat(), o.etag) for o in objects),
    )
    for _, key, size, modified, etag in connection.execute("SELECT * FROM objects ORDER BY place"):
        yield StoredObject(key=key, size=size, modified=dt.datetime.fromisoformat(modified), etag=etag)
    connection.close()
