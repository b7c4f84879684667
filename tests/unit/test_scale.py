"""The model of docs/SCALE.md: the page says what it says, and S3's limits hold up to the largest object."""

from __future__ import annotations

import msgspec
import pytest
from bench.scale_model import MOST, StageCosts, schedule, stages

from backhaul.formats.part_sizes import plan_layout
from backhaul.formats.profiles import PROFILES, S3_PROVIDERS
from bench import scale_model

pytestmark = pytest.mark.unit

COSTS = StageCosts(
    date="2026-11-22",
    machine="a machine",
    read=0.1,
    hash=0.3,
    compress={"auto": 2.0, "9": 20.0},
    ratio=4.0,
    digest=0.4,
    crc=0.1,
    copy=0.1,
    seal=0.8,
    write=0.4,
    send=0.4,
    python=0.1,
    listing=20.0,
    request=500.0,
    mirror_first=1500.0,
    mirror_again=80.0,
    frame=1 << 22,
    pushes=(),
)


def first(cores: int, line: float | None, **more: object) -> tuple[str, float]:
    found = stages(COSTS, cores, line=line, **more)[0]  # type: ignore[arg-type]
    return found.name, pytest.approx(found.rate)  # type: ignore[return-value]


def test_cores_then_the_one_thread_that_reads_then_the_line() -> None:
    # 0.4 in order, (0.4 + 0.1) / 4 behind, 2.0 + (0.1 + 0.4) / 4 beside, and Python's 0.1: 2.75 s for a GB.
    assert first(1, 100) == ("all cores", 1 / 2.75)
    assert first(2, 100) == ("all cores", 2 / 2.75)
    assert first(96, 100) == ("reading and hashing the stream (one thread)", 1 / 0.4)
    assert first(96, 1.2) == ("the source", 1.2)
    assert first(2, 100, level="9") == ("all cores", 2 / 20.75)
    assert first(2, 100, sealed=True) == ("all cores", 2 / 2.95)
    # To a directory: a write instead of the copy, no CRC of parts, no sending.
    assert first(1, None) == ("all cores", 1 / (0.4 + (0.4 + 0.4) / 4 + 2.0 + 0.1))


def test_python_is_full_when_it_costs_most() -> None:
    slow = msgspec.structs.replace(COSTS, python=1.0)
    assert stages(slow, 96, line=None)[0] == scale_model.Stage("Python's lock", 1.0)


@pytest.mark.parametrize("name", S3_PROVIDERS)
@pytest.mark.parametrize("known", [True, False])
def test_the_largest_object_is_cut_within_the_limits(name: str, known: bool) -> None:
    limits = PROFILES[name].limits
    cut = schedule(plan_layout(limits, at_most=MOST if known else None), MOST)
    assert cut.largest <= limits.max_part
    assert cut.parts <= cut.objects * limits.max_parts
    assert cut.objects >= -(-MOST // limits.max_object)


def test_48_8_tib_of_known_length_are_one_object() -> None:
    limits = PROFILES["aws"].limits
    assert (
        schedule(plan_layout(limits, at_most=min(MOST, limits.max_object)), min(MOST, limits.max_object)).objects == 1
    )


def test_the_page_is_what_the_model_says_of_the_measured_costs() -> None:
    text = scale_model.PAGE.read_text()
    assert text == scale_model.render(text, scale_model.read_costs()), "run: python -m bench.scale_model --write"


def test_a_mirror_takes_as_long_as_its_store_or_its_host() -> None:
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in scale_model.mirror_rows(COSTS)][2:]
    # 0.08 and 0.02 ms a name, and 1,000 listings of 0.5 ms; 2 ms a name; at 50 and 200 a second the store is slower, then the host.
    assert rows[-1] == [
        "1,000,000", "1,000 listings", "100.5 s", "1,000,000 requests", "2000 s", "5.56 / 1.39 / 0.56",
    ]  # fmt: skip
