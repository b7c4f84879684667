"""What every store must do, as tests. A test module makes a subclass with a ``store`` fixture::

    class TestMyStore(StoreConformance):
        @pytest.fixture
        def store(self): ...

``store`` is empty and fresh for each test. ``small_part`` is the least size of a part that is not the last;
``resumable`` says whether an unfinished upload can be gone on with. What a store's profile says it can't do is not
asked of it; what it says it can is.
"""

from __future__ import annotations

import datetime as dt
import os
import threading

import pytest

from backhaul.errors import IntegrityError, ObjectNotFoundError, PreconditionError, StoreError
from backhaul.formats.listing import place
from backhaul.model.objects import StoredObject, Upload, UploadedPart
from backhaul.model.profile import UNORDERED
from backhaul.pipeline.supervisor import Supervisor
from backhaul.stores.base import Store
from backhaul.stores.multipart import StreamWriter
from backhaul.transforms.digest import crc64nvme


def put(store: Store, key: str, content: bytes, *, if_absent: bool = True) -> StoredObject:
    """Store a small object."""
    return store.put(key, content, crc64nvme(content), if_absent=if_absent)


def read(store: Store, key: str, offset: int, length: int, etag: str | None = None) -> bytes:
    """Read a range."""
    out = bytearray(length)
    store.read_into(key, offset, memoryview(out), etag=etag)
    return bytes(out)


class StoreConformance:
    """The contract of ``stores.base.Store``."""

    small_part = 5 << 20
    listed = 3
    resumable = True
    rounds = 2
    # The order of listings, where it is not what the profile says.
    listing: str | None = None

    def send(self, store: Store, key: str, contents: list[bytes]) -> tuple[Upload, list[UploadedPart]]:
        """Begin an upload and send its parts."""
        upload = store.begin(key)
        parts = []
        offset = 0
        for number, content in enumerate(contents, 1):
            parts.append(store.put_part(upload, number, offset, memoryview(content), crc64nvme(content)))
            offset += len(content)
        return upload, parts

    def test_a_small_object_comes_back(self, store: Store) -> None:
        """Put, stat, read whole and in part, list."""
        content = bytes(range(256)) * 10
        stored = put(store, "a/b c/ü.bin", content)
        assert stored.size == len(content)
        found = store.stat("a/b c/ü.bin")
        assert found is not None
        assert found.size == len(content)
        assert found.etag == stored.etag
        assert abs((found.modified - dt.datetime.now(dt.UTC)).total_seconds()) < 300
        assert read(store, "a/b c/ü.bin", 0, len(content)) == content
        assert read(store, "a/b c/ü.bin", 100, 7, found.etag) == content[100:107]
        assert [entry.key for entry in store.list()] == ["a/b c/ü.bin"]

    def test_an_empty_object_is_an_object(self, store: Store) -> None:
        """Zero bytes are a content like any other."""
        put(store, "x/empty", b"")
        found = store.stat("x/empty")
        assert found is not None
        assert found.size == 0

    def test_replacing_takes_the_object_that_was_seen(self, store: Store) -> None:
        """Another object in its place is left alone, by puts, completions and deletes."""
        first = put(store, "x/a", b"one")
        assert first.etag is not None
        second = store.put("x/a", b"three", crc64nvme(b"three"), replaces=first.etag)
        found = store.stat("x/a")
        assert found is not None
        assert (found.size, found.etag) == (5, second.etag)
        for attempt in (
            lambda: store.put("x/a", b"other", crc64nvme(b"other"), replaces=first.etag),
            lambda: store.delete("x/a", etag=first.etag),
        ):
            with pytest.raises(PreconditionError):
                attempt()
        assert read(store, "x/a", 0, 5) == b"three"
        upload, parts = self.send(store, "x/a", [b"the whole"])
        with pytest.raises(PreconditionError):
            store.complete(upload, parts, crc64nvme(b"the whole"), replaces=first.etag)
        store.abort(upload)
        upload, parts = self.send(store, "x/a", [b"the whole"])
        third = store.complete(upload, parts, crc64nvme(b"the whole"), replaces=second.etag)
        assert read(store, "x/a", 0, 9) == b"the whole"
        store.delete("x/a", etag=third.etag)
        assert store.stat("x/a") is None
        store.delete("x/a", etag=third.etag)

    def test_a_copy_is_an_object_of_its_own(self, store: Store) -> None:
        """Under an absent name, of the object that was meant, with the metadata that was given."""
        content = os.urandom(1000)
        source = put(store, "x/a", content)
        copied = store.copy(source, "y/ü b", metadata={"mtime": "5.25"})
        assert read(store, "y/ü b", 0, 1000, copied.etag) == content
        with pytest.raises(PreconditionError):
            store.copy(source, "y/ü b")
        put(store, "x/a", b"another", if_absent=False)
        with pytest.raises((PreconditionError, ObjectNotFoundError)):
            store.copy(source, "y/other")
        store.delete("x/a")
        with pytest.raises(StoreError):
            store.copy(source, "y/other")
        assert store.stat("y/other") is None
        assert read(store, "y/ü b", 0, 1000) == content

    def test_an_upload_composed_of_ranges(self, store: Store) -> None:
        """Copied and sent parts make one object; a range of another object than was meant makes none."""
        if not store.profile.part_copies:
            return
        content = os.urandom(2 * self.small_part + 1000)
        source = put(store, "x/a", content)
        assert source.etag is not None
        size = self.small_part
        upload = store.begin("x/a")
        wanted = content[1000 : 1000 + size] + content[:size] + content[-7:]
        head, middle, tail = wanted[:size], wanted[size : 2 * size], wanted[2 * size :]
        parts = [
            store.copy_part(upload, 1, "x/a", source.etag, 1000, size, crc64nvme(head)),
            store.put_part(upload, 2, size, memoryview(middle), crc64nvme(middle)),
            store.copy_part(upload, 3, "x/a", source.etag, len(content) - 7, 7, crc64nvme(tail)),
        ]
        with pytest.raises((PreconditionError, ObjectNotFoundError)):
            store.copy_part(upload, 2, "x/a", '"0123456789abcdef0123456789abcdef"', 0, 7, crc64nvme(content[:7]))
        done = store.complete(upload, parts, crc64nvme(wanted), replaces=source.etag)
        assert done.size == len(wanted)
        assert read(store, "x/a", 0, len(wanted)) == wanted

    def test_listing_keeps_its_order(self, store: Store) -> None:
        """As the profile names it; a prefix, a beginning and an end are obeyed in it."""
        names = ["a/x", "a b/x", "b/1", "b/2", "a-b", "a/y z/q", "ä/1", "c"]
        for name in names:
            put(store, name, b"1")
        order = self.listing or store.profile.listing
        found = [entry.key for entry in store.list()]
        assert sorted(found) == sorted(names)
        assert [entry.key for entry in store.list("b/")] == ["b/1", "b/2"]
        if order == UNORDERED:
            return
        assert found == sorted(names, key=lambda key: place(key, order))
        for number, after in enumerate(found):
            assert [entry.key for entry in store.list(after=after)] == found[number + 1 :]
            assert [entry.key for entry in store.list(until=after)] == found[: number + 1]

    def test_create_if_absent_refuses_to_replace(self, store: Store) -> None:
        """The first one wins; replacing works when asked for."""
        put(store, "x/claim", b"first")
        with pytest.raises(PreconditionError):
            put(store, "x/claim", b"second")
        assert read(store, "x/claim", 0, 5) == b"first"
        put(store, "x/claim", b"third", if_absent=False)
        assert read(store, "x/claim", 0, 5) == b"third"

    def test_of_many_that_create_at_once_one_wins(self, store: Store) -> None:
        """A claim is exclusive under contention."""
        won: list[int] = []
        barrier = threading.Barrier(6)

        def race(number: int) -> None:
            barrier.wait()
            try:
                put(store, "x/claim", b"%d" % number)
                won.append(number)
            except PreconditionError:
                pass

        threads = [threading.Thread(target=race, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if store.profile.conditional_writes:
            assert len(won) == 1
        assert read(store, "x/claim", 0, 1) in [b"%d" % number for number in won]

    def test_an_upload_is_invisible_until_completed(self, store: Store) -> None:
        """Parts in, nothing listed; complete, and all of it is there."""
        contents = [os.urandom(self.small_part), os.urandom(self.small_part), b"tail"]
        upload, parts = self.send(store, "x/data", contents)
        assert store.stat("x/data") is None
        assert list(store.list()) == []
        pending = list(store.unfinished())
        if store.profile.lists_uploads:
            assert [entry.upload.key for entry in pending] == ["x/data"]
            assert pending[0].size == sum(map(len, contents))
        whole = b"".join(contents)
        stored = store.complete(upload, parts, crc64nvme(whole))
        assert stored.size == len(whole)
        assert list(store.unfinished()) == []
        assert read(store, "x/data", 0, len(whole)) == whole
        edge = self.small_part - 3
        assert read(store, "x/data", edge, 6) == whole[edge : edge + 6]

    def test_a_part_sent_again_replaces_itself(self, store: Store) -> None:
        """A retry after a lost reply does no harm."""
        contents = [os.urandom(self.small_part), b"tail"]
        upload, parts = self.send(store, "x/data", contents)
        parts[0] = store.put_part(upload, 1, 0, contents[0], crc64nvme(contents[0]))
        whole = b"".join(contents)
        store.complete(upload, parts, crc64nvme(whole))
        assert read(store, "x/data", 0, len(whole)) == whole

    def test_an_upload_can_be_gone_on_with(self, store: Store) -> None:
        """What was sent is listed as it was acknowledged; the rest is added; the whole is right."""
        contents = [os.urandom(self.small_part), os.urandom(self.small_part), b"tail"]
        upload, parts = self.send(store, "x/data", contents[:2])
        if not self.resumable:
            with pytest.raises(ObjectNotFoundError):
                store.uploaded_parts(upload)
            return
        found = store.uploaded_parts(upload)
        assert [(part.number, part.size, part.etag) for part in found] == [
            (part.number, part.size, part.etag) for part in parts
        ]
        assert all(part.crc64nvme in (0, ours.crc64nvme) for part, ours in zip(found, parts, strict=True))
        parts.append(store.put_part(upload, 3, 2 * self.small_part, contents[2], crc64nvme(contents[2])))
        whole = b"".join(contents)
        store.complete(upload, parts, crc64nvme(whole))
        assert read(store, "x/data", 0, len(whole)) == whole
        with pytest.raises(ObjectNotFoundError):
            store.uploaded_parts(upload)

    def test_completing_again_after_a_lost_reply(self, store: Store) -> None:
        """The second call finds what the first one made, and says the same of it."""
        if not self.resumable:
            return
        contents = [os.urandom(self.small_part), b"tail"]
        upload, parts = self.send(store, "x/data", contents)
        whole = b"".join(contents)
        first = store.complete(upload, parts, crc64nvme(whole))
        again = store.complete(upload, parts, crc64nvme(whole))
        assert (again.size, again.etag, again.checksum) == (first.size, first.etag, first.checksum)
        assert read(store, "x/data", 0, len(whole)) == whole

    def test_bytes_that_were_damaged_on_the_way_are_refused(self, store: Store) -> None:
        """Where the profile has checksums: by the store itself, part by part and as a whole."""
        if not store.profile.checksums:
            return
        with pytest.raises(StoreError):
            store.put("x/small", b"content", crc64nvme(b"other"))
        assert store.stat("x/small") is None
        upload = store.begin("x/data")
        with pytest.raises(StoreError):
            store.put_part(upload, 1, 0, b"content", crc64nvme(b"other"))
        part = store.put_part(upload, 1, 0, b"content", crc64nvme(b"content"))
        with pytest.raises(StoreError):
            store.complete(upload, [part], crc64nvme(b"other"))
        assert store.stat("x/data") is None
        store.abort(upload)

    def test_a_stream_of_any_length(self, store: Store) -> None:
        """Cut as the store wants it, in one object or several: one after the other they are the stream."""
        rules = store.parts()
        pieces = [os.urandom(size) for size in (1, 3_000_000, 4_000_000, 17, 4_000_000, 5_000_000, 2) * self.rounds]
        whole = b"".join(pieces)
        sent: list[int] = []
        with Supervisor("writer") as group:
            writer = StreamWriter(
                store, rules, lambda n: f"x/data.{n:04d}", group, on_sent=lambda size, reused: sent.append(size)
            )
            for piece in pieces:
                writer.write(piece)
            writer.finish()
            assert list(store.list()) == []
            segments = writer.commit(crc64nvme(whole))
            writer.close()
        assert sum(sent) == len(whole)
        assert b"".join(read(store, segment.key, 0, segment.size) for segment in segments) == whole
        assert {entry.key: entry.size for entry in store.list()} == {s.key: s.size for s in segments}
        assert list(store.unfinished()) == []
        if rules.buffered:
            assert all(segment.size <= rules.layout.capacity(n) for n, segment in enumerate(segments, 1))

    def test_an_aborted_upload_leaves_nothing(self, store: Store) -> None:
        """Nor does aborting twice hurt."""
        upload, _ = self.send(store, "x/data", [os.urandom(self.small_part), b"tail"])
        store.abort(upload)
        store.abort(upload)
        assert list(store.unfinished()) == []
        assert list(store.list()) == []

    def test_completing_refuses_to_replace(self, store: Store) -> None:
        """Two runs that complete the same key: the second is refused."""
        put(store, "x/data", b"there before")
        upload, parts = self.send(store, "x/data", [b"new"])
        with pytest.raises(PreconditionError):
            store.complete(upload, parts, crc64nvme(b"new"))
        assert read(store, "x/data", 0, 12) == b"there before"
        store.abort(upload)

    def test_what_is_not_there(self, store: Store) -> None:
        """Absence is an answer or an error of its own, never something else."""
        assert store.stat("no/such") is None
        with pytest.raises(ObjectNotFoundError):
            read(store, "no/such", 0, 1)
        store.delete("no/such")
        assert list(store.list()) == []
        assert list(store.unfinished()) == []

    def test_an_object_that_ends_too_soon(self, store: Store) -> None:
        """A read beyond the end is an integrity error, wherever it begins."""
        put(store, "x/short", b"0123456789")
        for offset in (5, 10, 11):
            with pytest.raises(IntegrityError):
                read(store, "x/short", offset, 6)

    def test_a_replaced_object_is_noticed(self, store: Store) -> None:
        """Reading on with the old etag is refused."""
        old = put(store, "x/data", b"0123456789")
        put(store, "x/data", b"abcdefghij", if_absent=False)
        with pytest.raises(PreconditionError):
            read(store, "x/data", 0, 10, old.etag)

    def test_listing_is_complete(self, store: Store) -> None:
        """Also across directories whose names sort around the separator, and beyond one page."""
        keys = [f"{name}/f{i}" for name in ("a", "a b", "a-b", "ä", "b") for i in range(self.listed)]
        for key in keys:
            put(store, key, b"x")
        assert sorted(entry.key for entry in store.list()) == sorted(keys)

    def test_deleting(self, store: Store) -> None:
        """One goes, the other stays."""
        put(store, "x/a", b"a")
        put(store, "x/b", b"b")
        store.delete("x/a")
        assert [entry.key for entry in store.list()] == ["x/b"]
