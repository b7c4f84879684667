"""How streams are cut: never a part too many, too small, too large or unequal, up to 48.8 TiB and beyond."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backhaul.formats.part_sizes import EQUAL_LARGEST, FIRST_SIZE, STEPS, PartLayout, plan_layout
from backhaul.formats.profiles import PROFILES, S3_PROVIDERS
from backhaul.model.profile import Limits

pytestmark = pytest.mark.unit

TIB = 1 << 40
MAXIMUM = int(48.8 * TIB)
FRAME = 4_300_000

lengths = st.one_of(st.integers(0, 100 * FIRST_SIZE), st.integers(0, MAXIMUM), st.integers(MAXIMUM - 10**9, MAXIMUM))
providers = st.sampled_from(S3_PROVIDERS)


def segments_of(layout: PartLayout, length: int) -> list[int]:
    """The sizes of the segments of a stream, as the writer cuts it: each as full as it gets."""
    sizes: list[int] = []
    while length > 0:
        sizes.append(min(length, layout.capacity(len(sizes) + 1)))
        length -= sizes[-1]
    return sizes


def runs_of(layout: PartLayout, segment: int, size: int) -> list[tuple[int, int]]:
    """(count, size) of the parts of a segment, one run after the other; the last part apart."""
    runs: list[tuple[int, int]] = []
    number = 1
    while size > 0:
        part = layout.part_size(segment, number)
        # All parts up to the next doubling have this size.
        same = layout.step - (number - 1) % layout.step if layout.step else layout.max_parts
        whole = min(size // part, same)
        if whole:
            runs.append((whole, part))
            size -= whole * part
            number += whole
        if 0 < size < part:
            runs.append((1, size))
            break
    return runs


@given(providers, lengths, st.booleans())
def test_every_cut_is_legal_up_to_the_maximum(provider: str, length: int, told: bool) -> None:
    limits = PROFILES[provider].limits
    layout = plan_layout(limits, at_most=length if told else None)
    sizes = segments_of(layout, length)
    assert sum(sizes) == length
    for segment, size in enumerate(sizes, 1):
        runs = runs_of(layout, segment, size)
        assert sum(count * part for count, part in runs) == size <= limits.max_object
        assert sum(count for count, _ in runs) <= limits.max_parts
        inner = [part for _, part in runs[:-1]] + ([runs[-1][1]] if runs and runs[-1][0] > 1 else [])
        assert all(limits.min_part <= part <= limits.max_part for part in inner)
        assert runs == [] or runs[-1][1] <= limits.max_part
        if limits.equal_parts:
            assert len(set(inner)) <= 1
            assert not inner or runs[-1][1] <= inner[0]
    assert layout.numbered == (limits.equal_parts or limits.max_parts < 10_000)


@given(st.integers(1, MAXIMUM))
def test_a_stream_of_known_length_is_one_upload_on_s3_up_to_the_maximum(length: int) -> None:
    assert plan_layout(Limits(), at_most=length).capacity(1) >= length


def test_the_maximum_of_s3_itself() -> None:
    """10,000 parts of 5 GiB: 48.8 TiB in one upload, exactly."""
    limits = Limits()
    assert limits.max_object == 10_000 * (5 << 30)
    layout = plan_layout(limits, at_most=limits.max_object)
    assert layout.capacity(1) == limits.max_object
    assert layout.part_size(1, 1) == layout.part_size(1, 10_000) == 5 << 30


def test_a_stream_of_unknown_length_begins_small_and_goes_far() -> None:
    layout = plan_layout(Limits())
    assert [layout.part_size(1, n) for n in (1, 500, 501, 1001, 10_000)] == [
        8 << 20,
        8 << 20,
        16 << 20,
        32 << 20,
        5 << 30,
    ]
    # By hand: 500 parts each of 8 MiB to 4 GiB, and 5,000 of 5 GiB.
    reach = 500 * sum((8 << 20) << i for i in range(10)) + 5000 * (5 << 30)
    assert layout.capacity(1) == reach > 28 * TIB
    assert layout.step == STEPS[-1]


def test_no_upload_that_begins_small_can_hold_the_maximum() -> None:
    """The arithmetic behind the rule above: six parts below 100 MiB, and 48.8 TiB are out of reach."""
    assert MAXIMUM > 6 * (100 << 20) + 9994 * (5 << 30)


@given(providers, lengths, st.sampled_from([None, 8 << 20, 32 << 20, 100 << 20]))
def test_the_largest_part_is_told_for_the_memory_formula(provider: str, length: int, bound: int | None) -> None:
    layout = plan_layout(PROFILES[provider].limits, max_part=bound)
    told = layout.largest_part(length)
    seen = max(
        (part for n, size in enumerate(segments_of(layout, length)[:50], 1) for _, part in runs_of(layout, n, size)),
        default=0,
    )
    assert seen <= told
    assert bound is None or told <= max(bound, PROFILES[provider].limits.min_part)


@given(st.integers(2, 20), st.integers(0, 4 << 30), st.booleans())
def test_a_provider_that_allows_hardly_any_parts(parts: int, length: int, equal: bool) -> None:
    limits = Limits(max_parts=parts, max_object=1 << 30, equal_parts=equal)
    layout = plan_layout(limits)
    for segment, size in enumerate(segments_of(layout, length), 1):
        assert size <= 1 << 30
        assert sum(count for count, _ in runs_of(layout, segment, size)) <= parts


def test_equal_parts_grow_from_segment_to_segment() -> None:
    layout = plan_layout(Limits(max_parts=1000, max_object=5 * 10**12))
    assert [layout.part_size(n, 1) for n in range(1, 6)] == [8 << 20, 16 << 20, 32 << 20, 64 << 20, 64 << 20]
    assert layout.part_size(1, 1000) == 8 << 20
    assert layout.capacity(1) == 1000 * (8 << 20)
    assert layout.largest == EQUAL_LARGEST


def test_a_short_stream_is_parallel_everywhere() -> None:
    for provider in S3_PROVIDERS:
        layout = plan_layout(PROFILES[provider].limits)
        assert layout.part_size(1, 1) == FIRST_SIZE
        assert layout.capacity(1) > 100 * FRAME
