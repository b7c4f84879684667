"""The mirror's own records: read when a run begins, written as it goes on, cleared up when it ended well.

Catalog segments are created only if absent: two runs that work on one mirror from two hosts collide here, and the
second one ends. See ``formats.catalog`` for what lies where.
"""

from __future__ import annotations

import datetime as dt
import itertools
import secrets
import threading

import zstandard

from backhaul.errors import FormatError, ObjectNotFoundError, PreconditionError
from backhaul.formats import catalog
from backhaul.formats import signature as signature_format
from backhaul.formats.catalog import SegmentName
from backhaul.formats.signature import Signature
from backhaul.model.mirror import MirrorRecord
from backhaul.model.objects import StoredObject
from backhaul.operations.mirror.state import MirrorState
from backhaul.stores.base import Store
from backhaul.transforms.digest import crc64nvme

# Lines of a segment; a base of a large mirror has several pieces.
SEGMENT_LINES = 50_000
# Segments beyond the base until all is written anew.
MOST_SEGMENTS = 30


def read_object(store: Store, entry: StoredObject) -> bytes:
    """Return a small object's bytes."""
    content = bytearray(entry.size)
    store.read_into(entry.key, 0, memoryview(content), etag=entry.etag)
    return bytes(content)


class Records:
    """The records of a mirror, and the local state that mirrors them. ``bytes_sent`` counts what was written."""

    def __init__(self, store: Store, state: MirrorState) -> None:
        self._store = store
        self._state = state
        self.order = store.profile.listing
        self.record: MirrorRecord | None = None
        self._record_etag: str | None = None
        self._highest = 0
        self._outdated: list[str] = []
        self._lock = threading.Lock()
        self.bytes_sent = 0
        self.remarks: list[str] = []
        # Whether this host knows a mirror here whose page is gone.
        self.lost = False

    def load(self) -> MirrorRecord | None:
        """Bring the local state up to the mirror's catalog; return the mirror's page, None for a new mirror.

        Raises:
            FormatError: a record can't be read.
            StoreError: the store could not be read.
        """
        found = self._store.stat(catalog.RECORD)
        if found is None:
            self.record = None
            self.lost = bool(self._state.get("mirror"))
        else:
            self.record = catalog.decode_record(read_object(self._store, found))
            self._record_etag = found.etag
        if self.record is None or self._state.get("mirror") != self.record.id or self._state.get("order") != self.order:
            self._state.forget_catalog()
            if self.record is not None:
                self._state.set("mirror", self.record.id)
            self._state.set("order", self.order)
        self._load_catalog()
        return self.record

    def _load_catalog(self) -> None:
        listed = {entry.key: entry for entry in self._store.list(catalog.CATALOG)}
        names = {name: entry for key, entry in listed.items() if (name := catalog.parse_segment(key)) is not None}
        self._highest = max((name.number for name in names), default=0)
        count, outdated = catalog.that_count(names)
        self._outdated = [catalog.segment_key(name) for name in outdated]
        ours = self._state.segments()
        here = [name for name in count if ours.get(catalog.segment_key(name)) == names[name].etag]
        new = [name for name in count if name not in here]
        if (new and (new[0].pieces or (here and new[0] < here[-1]))) or len(here) < len(ours):
            # Written anew, or gone back: nothing that was taken in can be relied on.
            self._state.forget_catalog()
            new = count
        for name in new:
            key = catalog.segment_key(name)
            data = read_object(self._store, names[name])
            try:
                lines = zstandard.ZstdDecompressor().decompressobj().decompress(data)
                with self._state.together():
                    self._state.take(catalog.decode_entries(lines), self.order)
                    self._state.took_segment(key, names[name].etag or "")
            except (zstandard.ZstdError, FormatError) as error:
                # What it said is looked at again, object by object; what it said of tombstones is lost.
                self.remarks.append(f"{key} can't be read ({error}): what it said is found out again")

    def load_signatures(self) -> None:
        """Fetch the signatures that the mirror has and this host does not know."""
        ours = self._state.signatures()
        for entry in self._store.list(catalog.SIGNATURES):
            digest = entry.key.removeprefix(catalog.SIGNATURES)
            if ours.get(digest) or not _is_digest(digest):
                continue
            try:
                signature = signature_format.decode(read_object(self._store, entry))
            except (FormatError, ObjectNotFoundError):
                continue  # of no use; the file that it was of is sent as a whole when it changes
            self._state.note_signature(digest, signature, published=True)

    def publish_signature(self, digest: str, signature: Signature) -> None:
        """Write a signature beside the mirror."""
        data = signature_format.encode(signature)
        self._put(catalog.SIGNATURES + digest, data, if_absent=False)
        self._state.note_signature(digest, signature, published=True)

    def write_record(self, record: MirrorRecord) -> None:
        """Write the mirror's own page; nobody else may have written it since it was read.

        Raises:
            PreconditionError: somebody has.
        """
        data = catalog.encode_record(record)
        try:
            stored = self._store.put(
                catalog.RECORD, data, crc64nvme(data), if_absent=self._record_etag is None, replaces=self._record_etag
            )
        except PreconditionError as error:
            raise PreconditionError(
                f"{self._store.url} is being worked on by somebody else",
                f"{catalog.RECORD} was written since this run began",
                "Let one host mirror to it; then plan again.",
            ) from error
        self.bytes_sent += len(data)
        self.record, self._record_etag = record, stored.etag
        self._state.set("mirror", record.id)
        self._state.set("order", self.order)

    def publish(self) -> None:
        """Write what was noted since the last time into the mirror's catalog.

        Raises:
            PreconditionError: another run writes there, too.
        """
        while True:
            mark, entries = self._state.to_publish(SEGMENT_LINES)
            if not entries:
                return
            entries.sort(key=lambda entry: entry.key)
            self._write_segment(SegmentName(self._highest + 1), catalog.encode_entries(entries))
            self._highest += 1
            self._state.was_published(mark)

    def compact(self) -> None:
        """Write the catalog anew where it has many segments, or one that can't be read, and drop the old ones."""
        count, _ = catalog.that_count(
            name for key in self._state.segments() if (name := catalog.parse_segment(key)) is not None
        )
        if sum(not name.pieces for name in count) > MOST_SEGMENTS or self.remarks:
            number = self._highest + 1
            # The number is taken by a segment of its own first: another run that wants it ends there.
            self._write_segment(SegmentName(number), b"")
            count = [*count, SegmentName(number)]
            pieces = max(1, -(-self._state.count() // SEGMENT_LINES))
            entries = (entry for _, entry in self._state.entries("", self.order))
            for piece in range(1, pieces + 1):
                lines = catalog.encode_entries(itertools.islice(entries, SEGMENT_LINES))
                self._write_segment(SegmentName(number, piece, pieces), lines)
            self._highest = number
            self._outdated += [catalog.segment_key(name) for name in count]
        for key in self._outdated:
            self._store.delete(key)
            self._state.drop_segment(key)
        self._outdated = []

    def settle_signatures(self) -> None:
        """Write the signatures that only this host has, and delete those of contents that no object has any more."""
        for digest, published in self._state.signatures().items():
            if not self._state.with_content(digest, ""):
                if published:
                    self._store.delete(catalog.SIGNATURES + digest)
                self._state.drop_signature(digest)
            elif not published and (signature := self._state.signature(digest)) is not None:
                self.publish_signature(digest, signature)

    def _write_segment(self, name: SegmentName, lines: bytes) -> None:
        key = catalog.segment_key(name)
        data = zstandard.ZstdCompressor(level=3).compress(lines)
        try:
            stored = self._put(key, data, if_absent=True)
        except PreconditionError as error:
            raise PreconditionError(
                f"{self._store.url} is being worked on by somebody else",
                f"{key} was written since this run began",
                "Let one host mirror to it; then run again. What was sent is known here, and not sent again.",
            ) from error
        self._state.took_segment(key, stored.etag or "")

    def _put(self, key: str, data: bytes, *, if_absent: bool) -> StoredObject:
        stored = self._store.put(key, data, crc64nvme(data), if_absent=if_absent)
        with self._lock:  # signatures come from many threads
            self.bytes_sent += len(data)
        return stored


def new_id() -> str:
    """Return a new random id."""
    return secrets.token_hex(8)


def iso(time: dt.datetime) -> str:
    """Return a time as records have it."""
    return time.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _is_digest(text: str) -> bool:
    return len(text) == 64 and all(character in "0123456789abcdef" for character in text)
