"""The decisions of a multicast: putting together, parity, repairs, pace."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backhaul.formats.chunk import DATAGRAM, HEADER_SIZE, PIECE_SIZE, TAG_SIZE, fill_headers, header_block
from backhaul.model.reception import Gap, Reception
from backhaul.planning import parity
from backhaul.planning.assembly import (
    LARGEST_CHUNK,
    Assembly,
    PartialChunk,
    frames_size,
    piece_count,
    piece_length,
    places,
)
from backhaul.planning.pace import Pace
from backhaul.planning.repair import RepairPlanner
from backhaul.transforms.datagram_proof import DatagramProof
from backhaul.transforms.seal import SessionKeys

pytestmark = pytest.mark.unit

SIZES = st.integers(HEADER_SIZE + TAG_SIZE, 12 * PIECE_SIZE)


def pieces(data: bytes) -> list[memoryview]:
    return [memoryview(data)[start : start + PIECE_SIZE] for start in range(0, len(data), PIECE_SIZE)]


# -- assembly ------------------------------------------------------------------------------------------------


@given(st.data(), st.lists(SIZES, min_size=1, max_size=5))
def test_chunks_come_together_from_pieces_in_any_order_and_twice(data: st.DataObject, sizes: list[int]) -> None:
    numbers = random.Random(1)
    chunks = [numbers.randbytes(size) for size in sizes]
    sent = [(number, place) for number, chunk in enumerate(chunks) for place in range(piece_count(len(chunk)))]
    order = data.draw(st.permutations(sent + data.draw(st.lists(st.sampled_from(sent), max_size=20))))
    assembly = Assembly(len(chunks), sum(map(frames_size, sizes)))
    whole: dict[int, bytearray] = {}
    for number, place in order:
        chunk = assembly.chunk(number, len(chunks[number]))
        if number in whole:
            assert chunk is None
            continue
        assert chunk is not None
        chunk.put(place, pieces(chunks[number])[place])
        if not chunk.left:
            whole[number] = assembly.whole(chunk)
    assert [whole[number] for number in range(len(chunks))] == chunks
    assert assembly.used == 0


@given(SIZES, st.integers(0, 70_000), st.integers(0, 2 * PIECE_SIZE))
def test_a_piece_of_a_wrong_place_or_length_is_refused(size: int, place: int, length: int) -> None:
    chunk = PartialChunk(0, size)
    right = place < chunk.pieces and length == piece_length(size, place)
    if right:
        assert chunk.put(place, memoryview(bytes(length)))
    else:
        with pytest.raises(ValueError, match="piece"):
            chunk.put(place, memoryview(bytes(length)))
        assert chunk.left == chunk.pieces


def test_the_first_writer_wins() -> None:
    chunk = PartialChunk(0, 2 * PIECE_SIZE)
    assert chunk.put(0, memoryview(b"a" * PIECE_SIZE))
    assert not chunk.put(0, memoryview(b"b" * PIECE_SIZE))
    assert chunk.room(0, 44) == 0 and chunk.room(1, 44) == 1
    assert chunk.put(1, memoryview(b"c" * PIECE_SIZE))
    assert chunk.take() == b"a" * PIECE_SIZE + b"c" * PIECE_SIZE


def test_what_is_outside_allocates_nothing() -> None:
    assembly = Assembly(4, frames_size(10 * PIECE_SIZE))
    assembly.set_next(10)
    for number, size in [
        (9, PIECE_SIZE),
        (14, PIECE_SIZE),
        (1 << 31, PIECE_SIZE),
        (10, LARGEST_CHUNK + 1),
        (10, 1 << 31),
        (10, HEADER_SIZE),
        (10, 0),
    ]:
        assert assembly.chunk(number, size) is None
    assert assembly.used == 0
    assert assembly.chunk(12, 6 * PIECE_SIZE) is not None
    assert assembly.chunk(13, 6 * PIECE_SIZE) is None  # no memory
    assert assembly.chunk(12, 5 * PIECE_SIZE) is None  # of another size
    # The next one is let in at the cost of the highest, or nothing would ever move.
    assert assembly.chunk(10, 6 * PIECE_SIZE) is not None
    assert not assembly.is_open(12) and assembly.used == frames_size(6 * PIECE_SIZE)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20 * PIECE_SIZE), st.integers(0, 30)), max_size=60))
def test_memory_is_bounded_whatever_comes(asked: list[tuple[int, int, int]]) -> None:
    memory = frames_size(30 * PIECE_SIZE)
    assembly = Assembly(8, memory)
    for number, size, next_ in asked:
        chunk = assembly.chunk(number, size)
        assert assembly.used <= memory
        if chunk is not None and next_ % 3 == 0:
            assembly.whole(chunk)
            assert len(chunk.take()) == size
        assembly.set_next(next_)


def test_a_damaged_chunk_is_wanted_another_way() -> None:
    assembly = Assembly(4, 1 << 20)
    chunk = assembly.chunk(0, PIECE_SIZE)
    assert chunk is not None
    chunk.put(0, memoryview(bytes(PIECE_SIZE)))
    assembly.whole(chunk)
    assembly.refetch(0)
    assert assembly.damaged == (0,)
    assert assembly.chunk(0, PIECE_SIZE) is None
    assert assembly.missing((1, 0), 10) == ()
    assembly.complete(0)
    assert not assembly.damaged and not assembly.wants(0)


@given(st.sets(st.integers(0, 29)), st.integers(0, 35), st.integers(1, 40))
def test_missing_ranges(here: set[int], end: int, most: int) -> None:
    chunk = PartialChunk(0, 30 * PIECE_SIZE)
    for place in here:
        chunk.put(place, memoryview(bytes(PIECE_SIZE)))
    ranges = chunk.missing(end, most)
    assert len(ranges) <= most
    told = {place for first, count in ranges for place in range(first, first + count)}
    missing = set(range(min(end, 30))) - here
    assert told == missing if len(ranges) < most else told <= missing
    if ranges:
        assert places(ranges, 30) == sum(1 << place for place in told)


def test_missing_chunks_and_what_was_lost() -> None:
    assembly = Assembly(8, 1 << 20)
    chunk = assembly.chunk(1, 4 * PIECE_SIZE)
    assert chunk is not None
    chunk.put(2, memoryview(bytes(PIECE_SIZE)))
    assembly.seen(1, 3)
    assert assembly.missing((1, 3), 10) == (Gap(0), Gap(1, ((0, 2),)))
    assembly.judge((1, 3))
    assert (assembly.judged, assembly.lost) == (1, 4 + 2)  # nothing is known of chunk 0 but that others have four
    # Repaired meanwhile: what was lost stays lost, and no more was.
    chunk.put(0, memoryview(bytes(PIECE_SIZE)))
    chunk.put(1, memoryview(bytes(PIECE_SIZE)))
    chunk.put(3, memoryview(bytes(PIECE_SIZE)))
    assembly.whole(chunk)
    assembly.judge((2, 0))
    assert (assembly.judged, assembly.lost) == (2, 6)
    assert assembly.missing((2, 0), 10) == (Gap(0),)
    # What a datagram far ahead says is cut to the window.
    assembly.seen(1 << 31, 5)
    assert assembly.highest == (8, 5)
    assert len(assembly.missing((8, 5), 3)) == 3


def test_headers() -> None:
    proof = DatagramProof(SessionKeys(session=bytes(16), key=bytes(32), signer=bytes(32)))
    block = header_block(5)
    fill_headers(block, proof.prefix(7, 9), 4)
    for place in range(4):
        start = place * DATAGRAM.size
        magic, _, number, size, at = DATAGRAM.unpack_from(block, start)
        assert (magic, number, size, at) == (b"BHU1", 7, 9, place)
        assert block[start : start + DATAGRAM.size - 2] == proof.prefix(7, 9)
    assert block[4 * DATAGRAM.size :] == bytes(DATAGRAM.size - 2) + b"\0\4"
    other = DatagramProof(SessionKeys(session=bytes(16), key=b"1" * 32, signer=bytes(32)))
    assert proof.prefix(7, 9) != other.prefix(7, 9)
    assert proof.probe_token(proof.probe(b"t" * 16, 3)) == b"t" * 16
    assert other.probe_token(proof.probe(b"t" * 16, 3)) is None


# -- parity --------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(2, 20), st.integers(1, PIECE_SIZE), st.data())
def test_one_lost_piece_of_each_column_comes_back(count: int, width: int, last: int, data: st.DataObject) -> None:
    chunk = random.Random(count).randbytes((count - 1) * PIECE_SIZE + last)
    extra = parity.parity_pieces(chunk, width)
    apart = parity.stride(count, width)
    assert len(extra) == apart <= -(-count // width)
    # A burst as long as a row takes one of each column.
    first = data.draw(st.integers(0, count - 1))
    lost = set(range(first, min(count, first + apart)))
    size = max(len(chunk), HEADER_SIZE + TAG_SIZE)
    if size != len(chunk):
        return
    partial = PartialChunk(0, size, width)
    arriving = [(place, piece) for place, piece in enumerate(pieces(chunk)) if place not in lost]
    arriving += [(count + column, memoryview(piece)) for column, piece in enumerate(extra)]
    for place, piece in data.draw(st.permutations(arriving)):
        partial.put(place, piece)
    assert partial.left == 0
    assert partial.take() == chunk


def test_parity_pieces_are_refused_without_parity() -> None:
    chunk = PartialChunk(0, 4 * PIECE_SIZE)
    with pytest.raises(ValueError, match="parity"):
        chunk.put(4, memoryview(bytes(PIECE_SIZE)))


# -- repair --------------------------------------------------------------------------------------------------


def report(next_: int, judged: int, **missing: tuple[tuple[int, int], ...]) -> Reception:
    gaps = tuple(Gap(int(number[1:]), ranges) for number, ranges in missing.items())
    return Reception(next=next_, judged=judged, missing=gaps)


def test_what_several_miss_goes_to_the_group_once() -> None:
    planner = RepairPlanner([0, 1, 2], lambda number: 10)
    planner.report(0, report(5, 6, c5=((0, 3),)), 1.0)
    assert planner.plan(1.0, 0.1, 100) == []  # the others have not spoken yet
    planner.report(1, report(5, 6, c5=((2, 2),)), 1.01)
    planner.report(2, report(6, 6), 1.02)
    plan = planner.plan(1.02, 0.1, 100)
    assert [(repair.number, repair.pieces, repair.member) for repair in plan] == [
        (5, (2,), None),
        (5, (0, 1), 0),
        (5, (3,), 1),
    ]
    # The same reports again, which can't know of the repair yet.
    planner.report(0, report(5, 6, c5=((0, 3),)), 1.05)
    planner.report(1, report(5, 6, c5=((2, 2),)), 1.05)
    assert planner.plan(1.05, 0.1, 100) == []
    # Reports that do: it was lost, for one of them.
    planner.report(0, report(5, 6, c5=((1, 2),)), 1.2)
    planner.report(1, report(6, 6), 1.2)
    assert [(repair.pieces, repair.member) for repair in planner.plan(1.2, 0.1, 100)] == [((1, 2), 0)]


def test_one_that_is_silent_is_not_waited_for() -> None:
    planner = RepairPlanner([0, 1], lambda number: 10, patience=0.05)
    planner.report(0, report(5, 6, c5=((0, 1),)), 1.0)
    assert planner.plan(1.04, 0.1, 100) == []
    assert [repair.member for repair in planner.plan(1.06, 0.1, 100)] == [0]
    planner.remove(1)
    planner.report(0, report(5, 7, c6=()), 1.2)
    assert [len(repair.pieces) for repair in planner.plan(1.2, 0.1, 4)] == [4]  # all of it, but at most four


@settings(max_examples=50)
@given(
    st.integers(1, 4),
    st.floats(0, 0.5),
    st.floats(0, 0.3),
    st.integers(1, 40),
    st.integers(0, 1 << 30),
)
def test_repairs_end_and_are_no_storm(members: int, loss: float, repair_loss: float, count: int, seed: int) -> None:
    chances = random.Random(seed)
    sizes = [chances.randint(1, 30) for _ in range(count)]
    missing = [
        {(number, place) for number in range(count) for place in range(sizes[number]) if chances.random() < loss}
        for _ in range(members)
    ]
    needed = sum(len(missing[member]) for member in range(members))
    planner = RepairPlanner(range(members), lambda number: sizes[number])
    on_the_way: list[tuple[float, int, tuple[int, int]]] = []
    sent = 0
    now = 0.0
    while any(missing):
        now += 0.01
        assert now < 100
        for when, member, piece in on_the_way:
            if when <= now:
                missing[member].discard(piece)
        on_the_way = [one for one in on_the_way if one[0] > now]
        for member in range(members):
            gaps: dict[int, list[tuple[int, int]]] = {}
            for number, place in sorted(missing[member]):
                gaps.setdefault(number, []).append((place, 1))
            told = tuple(Gap(number, tuple(ranges)) for number, ranges in gaps.items())
            planner.report(member, Reception(next=0, judged=count, missing=told), now)
        plan = planner.plan(now, 0.05, 50)
        assert sum(len(repair.pieces) for repair in plan) <= 50
        for repair in plan:
            for place in repair.pieces:
                sent += 1
                wanting = [member for member in range(members) if (repair.number, place) in missing[member]]
                assert wanting, "nobody needs it"
                assert repair.member in (None, *wanting)
                reached = range(members) if repair.member is None else [repair.member]
                on_the_way += [
                    (now + 0.04, member, (repair.number, place))
                    for member in reached
                    if chances.random() >= repair_loss
                ]
    if repair_loss == 0:
        assert sent <= needed


def test_reports_of_nonsense_do_no_harm() -> None:
    planner = RepairPlanner([0], lambda number: 10 if number < 3 else 0)
    planner.report(7, report(0, 9, c1=((0, 1),)), 1.0)
    planner.report(0, report(2, 9, c1=((0, 1),), c2=((8, 1 << 60), (1 << 60, 1)), c9=()), 1.0)
    assert [(repair.number, repair.pieces) for repair in planner.plan(1.0, 0.1, 100)] == [(2, (8, 9))]


# -- pace ----------------------------------------------------------------------------------------------------


def run_pace(pace: Pace, capacity: float, random_loss: float, rounds: int, *, seed: int = 1) -> float:
    """Return what arrived on average over the last half, in bytes a second."""
    chances = random.Random(seed)
    arrived = []
    for at in range(rounds):
        rate = pace.rate
        count = 2000
        passed = min(1.0, capacity / rate)
        lost = sum(chances.random() > passed * (1 - random_loss) for _ in range(count))
        if at >= rounds // 2:
            arrived.append(rate * (count - lost) / count)
        pace.observe(count, lost, rate)
    return sum(arrived) / len(arrived)


@pytest.mark.parametrize("random_loss", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("start", [1e6, 50e6, 99e6, 1e9])
def test_the_rate_finds_the_line(random_loss: float, start: float) -> None:
    capacity = 100e6
    pace = Pace(start)
    assert run_pace(pace, capacity, random_loss, 120) > 0.85 * capacity * (1 - random_loss)
    assert pace.rate < 1.3 * capacity


@pytest.mark.parametrize("random_loss", [0.01, 0.1])
def test_a_line_that_begins_to_lose_is_not_a_full_one(random_loss: float) -> None:
    pace = Pace(10e6)
    run_pace(pace, 100e6, 0.0, 60)
    assert run_pace(pace, 100e6, random_loss, 200) > 0.8 * 100e6 * (1 - random_loss)


def test_a_line_that_gets_slower_and_faster_is_followed() -> None:
    pace = Pace(10e6)
    run_pace(pace, 100e6, 0.01, 60)
    assert run_pace(pace, 20e6, 0.01, 100) > 0.85 * 20e6 * 0.99
    assert pace.rate < 30e6
    assert run_pace(pace, 100e6, 0.01, 200) > 0.8 * 100e6 * 0.99
    # From next to nothing it is back soon.
    for _ in range(200):
        pace.observe(1000, 900, pace.rate)
    assert pace.rate < 1e6
    assert run_pace(pace, 100e6, 0.01, 60) > 0.8 * 100e6 * 0.99


def test_a_queue_is_seen_before_it_loses() -> None:
    """A line with a queue of 50 ms: nothing is lost but at the beginning, and the line is used."""
    pace = Pace(10e6)
    capacity, queued, lost_pieces, arrived = 100e6, 0.0, 0, 0.0
    for at in range(400):
        rate, seconds = pace.rate, 0.05
        queued += (rate - capacity) * seconds
        lost = max(0.0, queued - 0.05 * capacity)
        queued = min(max(queued, 0.0), 0.05 * capacity)
        if at >= 40:
            lost_pieces += int(2000 * lost / (rate * seconds))
            arrived += min(rate, capacity) / capacity
        pace.observe(2000, int(2000 * lost / (rate * seconds)), rate, queued / capacity)
    assert lost_pieces < 0.005 * 360 * 2000
    assert arrived > 0.93 * 360


def test_a_delay_of_another_cause_does_not_stop_everything() -> None:
    pace = Pace(50e6)
    run_pace(pace, 100e6, 0.0, 60)
    for _ in range(100):
        pace.observe(2000, 0, pace.rate, 0.2)
    assert pace.rate > 60e6


def test_limits() -> None:
    pace = Pace(10e6, 40e6)
    run_pace(pace, 100e6, 0.0, 50)
    assert pace.rate == 40e6
    assert Pace(10e6, 5e6).rate == 5e6
    for _ in range(200):
        pace.observe(1000, 1000, pace.rate)
    assert 0 < pace.rate <= 1e6
    # A sender that waits for others learns nothing about faster rates.
    pace = Pace(10e6)
    for _ in range(50):
        pace.observe(1000, 0, 1e6)
    assert pace.rate == 10e6
