"""A mirror's pure decisions: the comparison, the guard, the composition of changed files; and its formats."""

from __future__ import annotations

import datetime as dt
import io
import random
import tracemalloc
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backhaul.errors import FormatError, StoreError, UsageError
from backhaul.formats import catalog
from backhaul.formats import signature as signature_format
from backhaul.formats.catalog import SegmentName, parse_segment, segment_key, that_count
from backhaul.formats.file_names import shown
from backhaul.formats.listing import place, read_page
from backhaul.formats.mirror_plan import PlanHead, PlanReader, PlanTail, PlanWriter
from backhaul.model.mirror import (
    DIRECTORY,
    FILE,
    FORGET,
    RECORD,
    RECYCLE,
    REPLACE,
    SKIP,
    SPECIAL,
    SYMLINK,
    TOMBSTONE,
    UNREADABLE,
    UPLOAD,
    Action,
    Entry,
    FileIdentity,
    LocalFile,
    MirrorRecord,
    PartPlan,
    SourceRecord,
    Totals,
)
from backhaul.model.objects import StoredObject
from backhaul.model.profile import BY_KEY, BY_TREE, Limits
from backhaul.planning.delta import Run, compose, joined, plain_parts, to_send
from backhaul.planning.guard import MaxDelete, judge, parse_max_delete
from backhaul.planning.mirror_diff import CHECK, Change, Rules, diff, in_order, sort_key
from backhaul.transforms.chunks import AVERAGE, LARGEST, SMALLEST, Chunker

pytestmark = pytest.mark.unit

NOW = dt.datetime(2026, 11, 21, 2, tzinfo=dt.UTC)
SOURCE = SourceRecord(host="db7 1", path="/backups", file_system="ext4 1")
RECORD_PAGE = MirrorRecord(id="1", created="2026-01-01T00:00:00Z", source=SOURCE)
# Names that sort differently by key and by tree, and odd ones.
NAMES = ["a", "a b", "a-", "a/x", "a b/x", "a!/z", "ä", "\U0001f600", "new\nline", "z"]


def file_of(key: str, size: int, modified: int, kind: str = FILE, **more: Any) -> LocalFile:
    return LocalFile(key=key, kind=kind, identity=FileIdentity(1, hash(key) & 0xFFFF, size, modified, modified), **more)


def entry_of(key: str, size: int, modified: int, etag: str, gone: str = "", **more: Any) -> Entry:
    return Entry(key=key, size=size, modified=modified, etag=etag, gone=gone, mode=0, **more)


def thing_of(key: str, size: int, etag: str) -> StoredObject:
    return StoredObject(key=key, size=size, modified=NOW, etag=etag)


def differences(
    local: dict[str, LocalFile],
    known: dict[str, Entry],
    stored: dict[str, StoredObject],
    order: str = BY_KEY,
    **rules: Any,
) -> tuple[dict[str, Change], Totals]:
    totals = Totals()
    found = diff(
        iter(sorted(((sort_key(f.key, f.kind, order), f) for f in local.values()), key=lambda pair: pair[0])),
        iter(sorted(((sort_key(e.key, e.kind, order), e) for e in known.values()), key=lambda pair: pair[0])),
        in_order(iter(sorted(stored.values(), key=lambda o: place(o.key, order))), order, "s3://b/m"),
        Rules(now=NOW, order=order, **rules),
        totals,
    )
    changes: dict[str, Change] = {}
    for change in found:
        name = change.key
        if change.local is not None and change.local.kind in (DIRECTORY, UNREADABLE):
            name += "/"
        assert name not in changes
        changes[name] = change
    return changes, totals


_local = st.none() | st.tuples(st.integers(0, 2), st.integers(0, 2))
_known = st.none() | st.tuples(
    st.integers(0, 2),
    st.integers(0, 2),
    st.sampled_from(["e1", "e2"]),
    st.sampled_from(["", "2026-11-20T02:00:00Z", "2026-01-01T00:00:00Z", "2027-01-01T00:00:00Z", "garbage"]),
)
_stored = st.none() | st.tuples(st.integers(0, 2), st.sampled_from(["e1", "e2"]))


@given(
    st.lists(st.tuples(_local, _known, _stored), min_size=len(NAMES), max_size=len(NAMES)),
    st.sampled_from([BY_KEY, BY_TREE]),
    st.sampled_from(["size", "mtime", "md5"]),
    st.sampled_from([None, 30 * 86400.0]),
)
def test_each_name_is_treated_as_the_table_says(
    worlds: list[tuple[Any, Any, Any]], order: str, compare: str, recycle_after: float | None
) -> None:
    local, known, stored = {}, {}, {}
    for name, (here, entry, thing) in zip(NAMES, worlds, strict=True):
        if here is not None:
            local[name] = file_of(name, *here)
        if entry is not None:
            known[name] = entry_of(name, *entry)
        if thing is not None:
            stored[name] = thing_of(name, *thing)
    changes, totals = differences(local, known, stored, order, compare=compare, recycle_after=recycle_after)
    kept = waiting = foreign = 0
    for name, (here, entry, thing) in zip(NAMES, worlds, strict=True):
        kind = changes[name].kind if name in changes else None
        ours = entry is not None and thing is not None and entry[2] == thing[1]
        if here is not None and thing is None:
            assert kind == UPLOAD
        elif here is not None and (entry is None or not ours):
            assert kind == CHECK
        elif here is not None and entry[0] != here[0]:
            assert kind == REPLACE
        elif here is not None and (compare == "md5" or (compare == "mtime" and entry[1] != here[1])):
            assert kind == CHECK
        elif here is not None:
            # A store that says another size under the same ETag is not believed to have kept the file.
            expected = RECORD if entry[3] or thing[0] != here[0] else None
            assert kind == expected
            kept += expected is None
        elif entry is None:
            assert kind is None
            foreign += thing is not None
        elif thing is None:
            assert kind == FORGET
        elif not entry[3]:
            assert kind == TOMBSTONE
        elif not ours:
            assert kind == FORGET
            foreign += 1
        elif recycle_after is not None and entry[3].startswith("2026-01"):
            assert kind == RECYCLE
        else:
            assert kind is None
            waiting += 1
    assert (totals.kept.files, totals.waiting.files, totals.foreign.files) == (kept, waiting, foreign)
    assert totals.local.files == len(local)
    assert totals.live.files == sum(not entry.gone for entry in known.values())


def test_an_unreadable_directory_hides_what_is_below_it() -> None:
    known = {name: entry_of(name, 1, 1, "e") for name in ("d/a", "d/b/c", "d", "e")}
    stored = {name: thing_of(name, 1, "e") for name in known}
    local = {"d": file_of("d", 0, 0, UNREADABLE, detail="directory: Permission denied")}
    changes, totals = differences(local, known, stored)
    assert {name: change.kind for name, change in changes.items()} == {"d": TOMBSTONE, "d/": SKIP, "e": TOMBSTONE}
    assert totals.unreadable.files == 2


def test_what_is_excluded_is_left_alone_on_both_sides() -> None:
    known = {name: entry_of(name, 1, 1, "e") for name in ("tmp/x/y", "a.log", "d/b.log", "keep")}
    stored = {name: thing_of(name, 1, "e") for name in known}
    local = {"tmp/new": file_of("tmp/new", 1, 1), "keep": file_of("keep", 2, 2)}
    changes, _ = differences(local, known, stored, exclude=("*.log", "tmp/"))
    assert {name: change.kind for name, change in changes.items()} == {"keep": REPLACE}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (".backhaul", "own records"),
        (".backhaul/x", "own records"),
        ("k" * 1025, "1025 bytes"),
        ("ü" * 510, "1027 bytes"),
        ("bad\udcff", "not UTF-8"),
        ("back\\slash", "does not keep"),
    ],
)
def test_names_that_can_not_be_keys_are_refused_by_name(name: str, reason: str) -> None:
    prefix = "mirror/" if name.startswith("ü") else ""
    changes, _ = differences({name: file_of(name, 1, 1)}, {}, {}, unsafe_names="\\", prefix=prefix)
    assert changes[name].kind == SKIP
    assert changes[name].problem
    assert reason in changes[name].reason


def test_names_of_the_longest_length_are_keys() -> None:
    name = "/".join(["d" * 200] * 5) + "/" + "f" * 19
    assert len(name) == 1024
    assert differences({name: file_of(name, 1, 1)}, {}, {})[0][name].kind == UPLOAD


def test_a_file_that_becomes_a_directory_and_back() -> None:
    """One name as a file, a directory and a symlink: each has a place of its own."""
    local = {"d/": file_of("d", 0, 0, DIRECTORY, detail=""), "d/x": file_of("d/x", 1, 1)}
    known = {"d": entry_of("d", 5, 5, "e"), "l": entry_of("l", 0, 0, "", kind=SYMLINK, target="t")}
    changes, _ = differences(local, known, {"d": thing_of("d", 5, "e")})
    kinds = {name: change.kind for name, change in changes.items()}
    assert kinds == {"d": TOMBSTONE, "d/": RECORD, "d/x": UPLOAD, "l": FORGET}


def test_a_listing_out_of_order_is_an_error() -> None:
    with pytest.raises(StoreError, match="another order"):
        list(in_order(iter([thing_of("b", 1, "e"), thing_of("a", 1, "e")]), BY_KEY, "s3://b/m"))


@pytest.mark.parametrize("count", [10_000, 100_000])
def test_memory_is_flat(count: int) -> None:
    """A comparison of any length holds a few names at a time."""

    def local() -> Iterator[tuple[bytes, LocalFile]]:
        for number in range(count):
            key = f"d/{number:09d}"
            yield key.encode(), file_of(key, 1, 1)

    def known() -> Iterator[tuple[bytes, Entry]]:
        for number in range(count):
            key = f"d/{number:09d}"
            yield key.encode(), entry_of(key, 1, 1, "e", gone="" if number % 7 else "2026-11-20T02:00:00Z")

    stored = (thing_of(f"d/{number:09d}", 1, "e") for number in range(count))
    totals = Totals()
    tracemalloc.start()
    rules = Rules(now=NOW, order=BY_KEY)
    changes = sum(1 for _ in diff(local(), known(), in_order(stored, BY_KEY, ""), rules, totals))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert totals.kept.files + changes == count
    assert peak < 200_000


# -- the guard -----------------------------------------------------------------------------------------------


def judged(gone: int, recycled: int, live: int, local: int, limit: str | None = None, **more: Any) -> tuple[Any, ...]:
    totals = Totals()
    totals.live.files, totals.local.files = live, local
    totals.of(TOMBSTONE).files, totals.of(RECYCLE).files = gone, recycled
    more = {"record": RECORD_PAGE, "source": SOURCE, **more}
    return judge("/backups", totals, ["x"], parse_max_delete(limit) if limit else MaxDelete(), **more)


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 3000), st.integers(1, 3000))
def test_the_guard_lets_a_tenth_or_ten_files_go(gone: int, recycled: int, live: int, local: int) -> None:
    limit = max(10, live // 10)
    assert (judged(gone, recycled, live, local) == ()) == (gone <= limit and recycled <= limit)


@pytest.mark.parametrize(
    ("text", "live", "limit"), [("5", 1000, 5), ("0", 10, 0), ("50%", 10, 5), ("2.5%", 1000, 25), ("100%", 7, 7)]
)
def test_max_delete_as_people_write_it(text: str, live: int, limit: int) -> None:
    assert parse_max_delete(text).limit(live) == limit


@pytest.mark.parametrize("text", ["", "x", "-1", "101%", "1.5", "5 files", "٣"])
def test_what_is_no_number_of_deletes_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_max_delete(text)


def test_the_guard_refuses_sources_that_are_not_themselves() -> None:
    assert judged(0, 0, 5, 5) == ()
    assert "is empty" in judged(5, 0, 5, 0)[0].what
    assert judged(5, 0, 5, 0, allow_empty=True) == ()
    assert judged(0, 0, 0, 0) == ()
    assert "sentinel" in judged(0, 0, 5, 5, sentinel_missing=".mounted")[0].why
    for field, value in (("file_system", "tmpfs 2"), ("path", "/other"), ("host", "db8 2")):
        moved = msgspec.structs.replace(SOURCE, **{field: value})
        assert "not where this mirror comes from" in judged(0, 0, 5, 5, source=moved)[0].what
        assert judged(0, 0, 5, 5, source=moved, accept_source=True) == ()
    assert "not the file system" in judged(0, 0, 5, 5, vanished_mounts=["disk2"])[0].what
    assert judged(0, 0, 5, 5, record=None, source=SOURCE) == ()


# -- deltas --------------------------------------------------------------------------------------------------

LIMITS = Limits(min_part=50, max_part=400, max_parts=200)


@st.composite
def edits(draw: st.DrawFn) -> tuple[bytes, bytes, list[Run], bytes]:
    """An old object, another one, and a new file made of pieces of both and of new bytes."""
    rng = random.Random(draw(st.integers(0, 1 << 30)))
    old = {"old": rng.randbytes(2000), "other": rng.randbytes(1500)}
    runs, content = [], b""
    for _ in range(draw(st.integers(1, 12))):
        size = draw(st.integers(1, 700))
        source = draw(st.sampled_from(["", "old", "other"]))
        if source:
            at = draw(st.integers(0, len(old[source]) - 1))
            piece = old[source][at : at + size]
            runs.append(Run(len(content), len(piece), source, f"etag-{source}", at))
        else:
            piece = rng.randbytes(size)
            runs.append(Run(len(content), len(piece)))
        content += piece
    return old["old"], old["other"], runs, content


@given(edits(), st.integers(50, 300))
@settings(max_examples=500)
def test_any_edit_is_composed_into_the_new_file(case: Any, part_size: int) -> None:
    old, other, runs, content = case
    parts = compose(runs, len(content), LIMITS, part_size)
    if parts is None:
        return
    objects = {"old": old, "other": other}
    made = b""
    for number, part in enumerate(parts, 1):
        assert part.offset == len(made)
        if part.source:
            assert part.source_etag == f"etag-{part.source}"
            made += objects[part.source][part.source_offset : part.source_offset + part.size]
        else:
            made += content[part.offset : part.offset + part.size]
        assert part.size <= LIMITS.max_part
        assert part.size >= LIMITS.min_part or number == len(parts)
        assert part.size >= 1
    assert made == content
    assert len(parts) <= LIMITS.max_parts
    assert to_send(parts) + sum(part.size for part in parts if part.source) == len(content)
    # Each stretch that has to be sent drags at most a part's least size of its neighbours along on each side.
    new = [run for run in joined(runs) if not run.source or run.size < LIMITS.min_part]
    copies = [run for run in joined(runs) if run.source and run.size >= LIMITS.min_part]
    assert to_send(parts) <= sum(run.size for run in new) + LIMITS.min_part * (len(new) + 2 * len(copies))


def test_one_edit_in_a_large_file_costs_a_part() -> None:
    """128 KiB new in the middle of 600 MB: 5 MiB go over the line, S3's least part."""
    mib = 1 << 20
    size = 600 * mib
    runs = [
        Run(0, 300 * mib, "old", "e", 0),
        Run(300 * mib, 128 << 10),
        Run(300 * mib + (128 << 10), 300 * mib - (128 << 10), "old", "e", 300 * mib + (128 << 10)),
    ]
    parts = compose(runs, size, Limits(), 16 * mib)
    assert parts is not None
    assert to_send(parts) == 5 * mib
    assert len(parts) == 3


def test_where_nothing_is_gained_or_parts_must_be_equal_all_is_sent() -> None:
    mib = 1 << 20
    assert compose([Run(0, 50 * mib)], 50 * mib, Limits(), 16 * mib) is None
    assert compose([Run(0, 4 * mib, "old", "e", 0), Run(4 * mib, 46 * mib)], 50 * mib, Limits(), 16 * mib) is None
    whole = [Run(0, 50 * mib, "old", "e", 0)]
    assert compose(whole, 50 * mib, Limits(equal_parts=True), 16 * mib) is None
    parts = compose(whole, 50 * mib, Limits(), 16 * mib)
    assert parts == (PartPlan(0, 50 * mib, "old", "e", 0),)
    many = compose([Run(0, 3 << 30, "old", "e", 0)], 3 << 30, Limits(), 16 * mib)
    assert many is not None
    assert [part.size for part in many] == [1 << 30] * 3


@given(st.integers(1, 10**6), st.integers(1000, 10**5))
def test_plain_parts_cover_the_file(size: int, part_size: int) -> None:
    parts = plain_parts(size, part_size)
    assert sum(part.size for part in parts) == size
    assert all(part.size == part_size for part in parts[:-1])


# -- chunks and signatures -----------------------------------------------------------------------------------


def signature_of(content: bytes, feeds: int) -> signature_format.Signature:
    chunker = Chunker()
    view = memoryview(content)
    for offset in range(0, len(content), feeds):
        chunker.feed(view[offset : offset + feeds])
    return chunker.finish()


@pytest.mark.parametrize("size", [0, 1, SMALLEST, AVERAGE, 3_000_000])
def test_chunks_do_not_depend_on_how_a_file_is_fed(size: int) -> None:
    content = random.Random(size).randbytes(size)
    whole = signature_of(content, size + 1)
    for feeds in (1 << 20, 100_001, LARGEST, 65_537):
        fed = signature_of(content, feeds)
        assert list(fed.chunks()) == list(whole.chunks())
    assert whole.size == size
    assert all(length <= LARGEST for length in whole.lengths)
    assert signature_format.encode(signature_format.decode(signature_format.encode(whole))) == signature_format.encode(
        whole
    )


def test_an_insertion_changes_the_chunks_around_it() -> None:
    content = random.Random(3).randbytes(8_000_000)
    before = {chunk for _, _, chunk in signature_of(content, 1 << 20).chunks()}
    after = list(signature_of(content[:4_000_000] + b"new" + content[4_000_000:], 1 << 20).chunks())
    new = sum(length for _, length, chunk in after if chunk not in before)
    assert 0 < new <= 2 * LARGEST


@pytest.mark.parametrize("damage", [b"", b"BHSIG", lambda data: data[:-1], lambda data: b"X" + data[1:]])
def test_a_damaged_signature_is_refused(damage: Any) -> None:
    data = signature_format.encode(signature_of(b"x" * 1000, 100))
    with pytest.raises(FormatError):
        signature_format.decode(damage(data) if callable(damage) else damage)


# -- the catalog and the plan --------------------------------------------------------------------------------


def test_the_segments_that_count() -> None:
    log = [SegmentName(number) for number in (1, 2, 3, 7)]
    assert that_count(log) == (log, [])
    base = [SegmentName(4, 1, 2), SegmentName(4, 2, 2)]
    count, rest = that_count([*log, *base])
    assert (count, rest) == ([*base, SegmentName(7)], log[:3])
    # A base that is not whole does not count, and does not make what is before it garbage.
    count, rest = that_count([*log, base[0]])
    assert count == log
    assert rest == []
    for name in (*log, *base):
        assert parse_segment(segment_key(name)) == name
    for key in (".backhaul/catalog/x", ".backhaul/catalog/1.jsonl.zst", "0000000001.jsonl.zst"):
        assert parse_segment(key) is None


def test_entries_and_records_come_back() -> None:
    entries = [
        entry_of("ä\n", 5, 6, '"e"', crc64nvme=(1 << 64) - 1, xattrs={"user.x": "eA=="}, blake3="ab" * 32),
        Entry(key="l", kind=SYMLINK, target="t", dropped=True),
    ]
    assert list(catalog.decode_entries(catalog.encode_entries(entries))) == entries
    assert catalog.decode_record(catalog.encode_record(RECORD_PAGE)) == RECORD_PAGE
    with pytest.raises(FormatError, match=r"backhaul\.mirror/2"):
        catalog.decode_record(catalog.encode_record(RECORD_PAGE).replace(b"mirror/1", b"mirror/2"))
    for data in (b"", b"[]", b"{}", b"\xff", b'{"schema": "backhaul.mirror/1"}'):
        with pytest.raises(FormatError):
            catalog.decode_record(data)
    with pytest.raises(FormatError):
        list(catalog.decode_entries(b"{}\n"))


HEAD = PlanHead(id="1", made="2026-11-21T02:00:00Z", directory="/d", mirror="s3://b/m", place="p", source=SOURCE)
ACTIONS = [
    Action(kind=UPLOAD, key='a "b"\n]', reason="new", size=5, sent=5, identity=FileIdentity(1, 2, 5, 4, 5)),
    Action(kind=TOMBSTONE, key="], ", reason="gone here", etag='"e"'),
]


def plan_bytes(actions: list[Action]) -> bytes:
    file = io.BytesIO()
    writer = PlanWriter(file, HEAD)
    for action in actions:
        writer.add(action)
    writer.finish(PlanTail(totals=Totals()))
    return file.getvalue()


@pytest.mark.parametrize("actions", [[], ACTIONS[:1], ACTIONS])
def test_a_plan_is_json_and_comes_back(actions: list[Action]) -> None:
    data = plan_bytes(actions)
    document = msgspec.json.decode(data)
    assert document["schema"] == "backhaul.plan/1"
    assert len(document["actions"]) == len(actions)
    reader = PlanReader(io.BytesIO(data), "plan.json")
    assert reader.head == HEAD
    found = list(reader.actions())
    assert [action for _, action in found] == actions
    assert [reader.action_at(position) for position, _ in found] == actions


def test_a_plan_that_was_touched_is_refused() -> None:
    data = plan_bytes(ACTIONS)
    for number in range(len(data) - 1):
        for touched in (data[:number], data[:number] + bytes([data[number] ^ 1]) + data[number + 1 :]):
            with pytest.raises(FormatError, match=r"not a plan that can be applied"):
                PlanReader(io.BytesIO(touched), "plan.json")


def test_names_for_people_are_one_printable_line() -> None:
    assert shown("ä b") == "ä b"
    assert shown("a\nb\x1b[31m\udcff") == "a\\nb\\x1b[31m\\xff"
    assert SPECIAL != FILE


def test_a_page_of_a_listing_in_any_order_of_its_fields() -> None:
    body = (
        b"<ListBucketResult><EncodingType>url</EncodingType><Contents><Size>3</Size><ETag>&quot;e&quot;</ETag>"
        b"<Key>m/a%2Bb+c&amp;%0A</Key><Owner><ID>x</ID></Owner><LastModified>2026-11-21T02:00:00.000Z</LastModified>"
        b"</Contents><Contents><Key>m/dir/</Key><Size>0</Size><LastModified>2026-11-21T02:00:00Z</LastModified>"
        b"</Contents><IsTruncated>false</IsTruncated></ListBucketResult>"
    )
    page = read_page(body, "m/")
    assert [(entry.key, entry.size, entry.etag) for entry in page.objects] == [("a+b c&\n", 3, '"e"')]
    assert page.objects[0].modified == NOW
    assert b"Contents" not in page.rest
    assert b"<IsTruncated>false" in page.rest
    plain = read_page(
        body.replace(b"<EncodingType>url</EncodingType>", b"").replace(b"a%2Bb+c&amp;%0A", b"a&amp;b+"), "m/"
    )
    assert plain.objects[0].key == "a&b+"
    with pytest.raises(FormatError):
        read_page(body.replace(b"<Size>3", b"<Size>three"), "m/")
    assert read_page(b"<ListBucketResult></ListBucketResult>", "m/").objects == ()
