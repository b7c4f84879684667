"""The pure decisions."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backhaul.errors import UsageError
from backhaul.formats.age import CHUNK_SIZE
from backhaul.formats.seekable import SeekTable
from backhaul.formats.when import When
from backhaul.model.objects import StoredObject, UnfinishedUpload, Upload
from backhaul.operations import memory
from backhaul.planning.foreign_keys import have_circles
from backhaul.planning.leftovers import plan_clean
from backhaul.planning.read_ranges import framed_pieces, framed_ranges, plain_ranges
from backhaul.planning.requirement import required_destinations
from backhaul.planning.selection import select_backup

pytestmark = pytest.mark.unit

NOW = dt.datetime(2026, 11, 21, 12, tzinfo=dt.UTC)
IDS = ["20261119T020000Z", "20261120T020000Z", "20261121T020000Z"]


@given(
    st.lists(st.tuples(st.integers(1, 100), st.integers(0, 100)), max_size=40),
    st.integers(1, 300),
    st.integers(1, 300),
)
def test_framed_ranges_cover_everything_once(frames: list[tuple[int, int]], stored: int, raw: int) -> None:
    table = SeekTable()
    for frame in frames:
        table.append(*frame)
    ranges = list(framed_ranges(table, stored))
    offset = raw_offset = frame_number = 0
    for part in ranges:
        assert (part.offset, part.raw_offset, part.first_frame) == (offset, raw_offset, frame_number)
        assert part.frames >= 1
        assert part.frames == 1 or part.length <= stored
        offset += part.length
        raw_offset += part.raw_length
        frame_number += part.frames
    assert (offset, raw_offset, frame_number) == (table.stored_size, table.raw_size, len(table))
    for part in ranges:
        pieces = list(framed_pieces(table, part, raw))
        assert all(piece.frames == 1 or piece.raw_length <= raw for piece in pieces)
        offset, raw_offset, frame_number = part.offset, part.raw_offset, part.first_frame
        for piece in pieces:
            assert (piece.offset, piece.raw_offset, piece.first_frame) == (offset, raw_offset, frame_number)
            assert piece.frames >= 1
            offset += piece.length
            raw_offset += piece.raw_length
            frame_number += piece.frames
        assert offset == part.offset + part.length
        assert raw_offset == part.raw_offset + part.raw_length
        assert frame_number == part.first_frame + part.frames


def test_ranges_and_pieces_are_as_large_as_they_may_be() -> None:
    """The first ones are smaller, so that the first bytes are there soon; what was fetched may decode to any size."""
    table = SeekTable()
    for _ in range(100):
        table.append(1 << 19, 4 << 20)
    ranges = list(framed_ranges(table, 8 << 20))
    assert [part.length for part in ranges[:4]] == [1 << 20, 2 << 20, 4 << 20, 8 << 20]
    assert all(part.length == 8 << 20 for part in ranges[4:-1])
    assert [piece.raw_length for piece in framed_pieces(table, ranges[3], 9 << 20)] == [8 << 20] * 8
    assert [piece.frames for piece in framed_pieces(table, ranges[3], 13 << 20)] == [3] * 5 + [1]


def test_what_has_no_frames_begins_with_small_ranges_too_of_whole_chunks() -> None:
    lengths = [part.length for part in plain_ranges(40 << 20, 8 << 20)]
    assert lengths == [length << 20 for length in (1, 2, 4, 8, 8, 8, 8, 1)]
    assert all(part.offset % CHUNK_SIZE == 0 for part in plain_ranges(100 << 20, memory.RANGE_STORED))


@given(st.integers(0, 10_000), st.integers(1, 999))
def test_plain_ranges_cover_everything_once(size: int, most: int) -> None:
    end = 0
    for part in plain_ranges(size, most):
        assert part.offset == part.raw_offset == end
        assert 0 < part.length == part.raw_length <= most
        end += part.length
    assert end == size


def test_selection() -> None:
    assert select_backup(IDS[::-1], When()) == IDS[-1]
    assert select_backup([], When()) is None
    assert select_backup(IDS, When(id=IDS[1])) == IDS[1]
    assert select_backup(IDS, When(id="20200101T000000Z")) is None
    at = dt.datetime(2026, 11, 20, 2, 0, 0, tzinfo=dt.UTC)
    assert select_backup(IDS, When(at=at)) == IDS[1]
    assert select_backup(IDS, When(at=at - dt.timedelta(seconds=1))) == IDS[0]
    assert select_backup(IDS, When(at=dt.datetime(2020, 1, 1, tzinfo=dt.UTC))) is None


def test_requirement() -> None:
    assert required_destinations("all", 3) == 3
    assert required_destinations("any", 3) == 1
    assert required_destinations("2", 3) == 2
    for wrong in ("0", "4", "most", "", "-1"):
        with pytest.raises(UsageError):
            required_destinations(wrong, 3)


def an_object(key: str, hours: float, size: int = 10) -> StoredObject:
    return StoredObject(key=key, size=size, modified=NOW - dt.timedelta(hours=hours))


def an_upload(key: str, hours: float, token: str = "t") -> UnfinishedUpload:
    return UnfinishedUpload(upload=Upload(key=key, token=token), size=5, last_activity=NOW - dt.timedelta(hours=hours))


def planned(objects: list[StoredObject], uploads: list[UnfinishedUpload]) -> tuple[list[str], list[str]]:
    remove, keep = plan_clean(objects, uploads, now=NOW, older_than=24 * 3600)
    return [f"{a.kind} {a.key}" for a in remove], [f"{a.kind} {a.key}" for a in keep]


def test_clean_leaves_committed_backups_alone() -> None:
    remove, keep = planned([an_object(f"{IDS[0]}/data.zst", 99), an_object(f"{IDS[0]}/manifest.json", 99)], [])
    assert (remove, keep) == ([], [])


def test_clean_takes_dead_runs_claims_last() -> None:
    remove, _ = planned(
        [an_object(f"{IDS[0]}/claim.json", 60), an_object(f"{IDS[0]}/data.zst", 50)],
        [an_upload(f"{IDS[0]}/other.zst", 55)],
    )
    assert remove == [f"upload {IDS[0]}/other.zst", f"object {IDS[0]}/data.zst", f"object {IDS[0]}/claim.json"]


def test_clean_spares_a_run_whose_upload_is_still_fed() -> None:
    remove, keep = planned([an_object(f"{IDS[0]}/claim.json", 60)], [an_upload(f"{IDS[0]}/data.zst", 1)])
    assert remove == []
    assert keep == [f"upload {IDS[0]}/data.zst", f"object {IDS[0]}/claim.json"]


def test_clean_takes_the_claim_of_a_committed_backup() -> None:
    remove, keep = planned(
        [
            an_object(f"{IDS[0]}/claim.json", 30),
            an_object(f"{IDS[0]}/data.zst", 25),
            an_object(f"{IDS[0]}/manifest.json", 1),
        ],
        [],
    )
    assert remove == [f"object {IDS[0]}/claim.json"]
    assert keep == []


def test_clean_does_not_know_other_names() -> None:
    remove, keep = planned(
        [an_object("notes.txt", 99), an_object(f"{IDS[0]}/sub/data.zst", 99), an_object("x/data.zst", 99)],
        [an_upload("other/upload.bin", 99)],
    )
    assert (remove, keep) == ([], [])


@pytest.mark.parametrize(
    ("pairs", "circle"),
    [
        ([], False),
        ([("public.a", "public.b"), ("public.b", "public.c")], False),
        ([("public.a", "public.a")], False),
        ([("public.a", "public.b"), ("public.b", "public.a")], True),
        ([("public.a", "public.b"), ("public.b", "s.c"), ("s.c", "public.a")], True),
        ([("public.a", "s.a"), ("s.b", "public.b")], False),
        ([('"we ""ird".a(b', 'x."REFERENCES y ("'), ('x."REFERENCES y ("', '"we ""ird".a(b')], False),
        ([('"we ""ird"."a(b;"', 'x."y ("'), ('x."y ("', '"we ""ird"."a(b;"')], True),
    ],
)
def test_foreign_keys_that_go_in_circles(pairs: list[tuple[str, str]], circle: bool) -> None:
    statements = [
        f'ALTER TABLE ONLY {own}\n    ADD CONSTRAINT "a key" FOREIGN KEY (x, y) REFERENCES {other}(id) DEFERRABLE;\n'
        for own, other in pairs
    ]
    assert have_circles("\n".join(statements).encode()) is circle
