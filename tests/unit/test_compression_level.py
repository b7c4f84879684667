"""The level controller, in a simulated push with recorded frames: what counts is when the last byte has left."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backhaul.planning.compression_level import LevelController, Line, Prior, _LineRate
from backhaul.transforms.compress import LADDER
from tests.unit.compression_simulation import (
    FRAME,
    KINDS,
    TRACES,
    Frame,
    Outcome,
    at_level_one,
    frames,
    incompressible,
    simulate,
)

PRIORS = [rung.prior for rung in LADDER]
MB = 1e6


def controller(workers: int, *, reserve: float = 1.0) -> LevelController:
    return LevelController(PRIORS, workers, frame=FRAME, window=2 * workers + 1, reserve=reserve)


def stored_at(kind: str, rung: int) -> float:
    return float(sum(size for _, size in TRACES[kind]["rungs"][rung]) / (4 * FRAME))


def cost_at(kind: str, rung: int) -> float:
    return float(sum(cpu for cpu, _ in TRACES[kind]["rungs"][rung]) / (4 * FRAME))


def raw_for(kind: str, seconds: float, line: float, workers: int) -> int:
    """Return raw bytes that take about so long at the fastest rung."""
    return int(seconds * min(line / stored_at(kind, 0), workers / cost_at(kind, 0), 1e9))


def fixed(kind: str, raw: int, rung: int, workers: int, line: float) -> float:
    return simulate(frames(kind, raw), lambda: rung, workers=workers, line=line, source=1e9).seconds


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [2, 16])
@pytest.mark.parametrize("line", [10 * MB, 25 * MB, 100 * MB])
def test_within_three_percent_of_the_best_fixed_rung(kind: str, workers: int, line: float) -> None:
    raw = raw_for(kind, 60, line, workers)
    auto = simulate(frames(kind, raw), controller(workers), workers=workers, line=line, source=1e9).seconds
    # (Rungs that the cores would take more than twice as long for than the line takes at the fastest need no trial.)
    tried = [rung for rung in range(len(LADDER)) if raw * cost_at(kind, rung) / workers < 120]
    best = min(fixed(kind, raw, rung, workers, line) for rung in tried)
    assert auto <= 1.03 * best


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [2, 16])
@pytest.mark.parametrize("line", [10 * MB, 25 * MB, 100 * MB])
def test_no_more_than_six_percent_over_a_push_of_a_quarter_of_a_minute(kind: str, workers: int, line: float) -> None:
    """Of so short a push the beginning, when nothing is known of the line, is a tenth."""
    raw = raw_for(kind, 15, line, workers)
    auto = simulate(frames(kind, raw), controller(workers), workers=workers, line=line, source=1e9).seconds
    tried = [rung for rung in range(len(LADDER)) if raw * cost_at(kind, rung) / workers < 30]
    assert auto <= 1.06 * min(fixed(kind, raw, rung, workers, line) for rung in tried)


@pytest.mark.parametrize("sockets", [256 << 10, 1 << 20, 4 << 20])
@pytest.mark.parametrize(("kind", "workers", "line"), [
    ("code", 2, 100 * MB), ("code", 16, 100 * MB), ("pgbench", 16, 10 * MB), ("log", 2, 25 * MB), ("copy", 2, 10 * MB),
])  # fmt: skip
def test_whatever_sockets_hold(kind: str, workers: int, line: float, sockets: int) -> None:
    """What sockets take looks as if it had left. Frames that differ much, and lines that cores just fill, did worst."""
    raw = raw_for(kind, 60, line, workers)

    def seconds(rung: Callable[[], int] | LevelController) -> float:
        return simulate(
            frames(kind, raw), rung, workers=workers, line=line, source=1e9, sockets=sockets, noise=0.2
        ).seconds

    tried = [rung for rung in range(len(LADDER)) if raw * cost_at(kind, rung) / workers < 120]
    best = min(seconds(lambda rung=rung: rung) for rung in tried)  # type: ignore[misc]
    assert seconds(controller(workers)) <= 1.05 * best


def test_a_line_of_which_nothing_is_known_is_not_waited_for_with_the_densest_rungs() -> None:
    """It fills and drains by turns, too soon to be measured: the cores are what all wait for."""
    level = controller(2)
    held = 0
    for tick in range(400):
        held = (20 << 20) if tick % 10 < 5 else 0
        level.observe(tick * 0.05, {"s3": Line(gone=tick << 22, held=held, room=56 << 20)}, spent=tick * 0.1, idle=0.0)
        rung = level.next()
        assert LADDER[rung].prior.cost <= 8
        assert rung == 0 or (held and tick * 0.05 < 2.0)
        level.made(rung, FRAME, int(FRAME * stored_at("code", rung)), FRAME * cost_at("code", rung), 0.05)


@pytest.mark.parametrize("at", [1.5, 6.0])
def test_a_pause_of_the_line_leads_to_no_denser_rungs_than_it_is_worth(at: float) -> None:
    """A lost packet, or replies that are waited for: nothing leaves for more than half a second."""
    level = controller(2)
    gone, rungs = 0.0, []
    for tick in range(240):
        now = tick * 0.05
        gone += 0 if at <= now < at + 0.6 else 0.05 * 10 * MB
        level.observe(now, {"s3": Line(gone=int(gone), held=40 << 20, room=56 << 20)}, spent=now, idle=now)
        rungs.append((now, level.next()))
        rung = rungs[-1][1]
        level.made(rung, FRAME, int(FRAME * stored_at("copy", rung)), FRAME * cost_at("copy", rung), 0.05)
    assert max(rung for _, rung in rungs) <= 4
    assert max(rung for now, rung in rungs if now > at + 0.6) >= 3


def test_looks_that_are_far_apart_measure_a_line_all_the_same() -> None:
    """Frames that take half a second each, or wait for room as long."""
    level = controller(2)
    rungs = []
    for tick in range(20):
        now = tick * 0.45
        level.observe(now, {"s3": Line(gone=int(now * 10 * MB), held=40 << 20, room=56 << 20)}, spent=now, idle=now)
        rungs.append(level.next())
        level.made(rungs[-1], FRAME, int(FRAME * stored_at("log", rungs[-1])), FRAME * cost_at("log", rungs[-1]), 0.05)
    assert min(rungs) > 0


@pytest.mark.parametrize("kind", ["log", "copy"])
@pytest.mark.parametrize(("spent", "idle"), [(0.3, 0.05), (0.7, 0.0), (0.7, 0.2)])
def test_a_line_that_parts_leave_in_bursts_is_not_slow_and_fast_by_turns(kind: str, spent: float, idle: float) -> None:
    """Several parts at once, and then few for as long: what is best is a mixture of two rungs all the while."""
    level = controller(2)
    half = 32  # looks in 1.6 s
    chosen: list[int] = []
    gone = 0.0
    for tick in range(16 * half):
        now = tick * 0.05
        gone += 0.05 * 10 * MB * (1.7 if tick // half % 2 == 0 else 0.3)
        line = Line(gone=int(gone), held=16 << 20, room=56 << 20)
        level.observe(now, {"s3": line}, spent=now * spent, idle=now * idle)
        chosen.append(level.next())
        rung = chosen[-1]
        level.made(rung, FRAME, int(FRAME * stored_at(kind, rung)), FRAME * cost_at(kind, rung), 0.05)
    settled = Counter(chosen[8 * half :])
    assert sum(count for _, count in settled.most_common(2)) >= 0.9 * 8 * half


def test_a_rung_is_not_left_out_for_a_moment_in_which_others_wait() -> None:
    """Frames that take longer than a window of others lasts on the line, by a few milliseconds, with plenty waiting."""
    level = controller(2)
    rate, contention = 40 * MB, 1.5
    frame, stored = contention * FRAME * cost_at("pgbench", 1), FRAME * stored_at("pgbench", 1)
    assert 0 < frame - 4 * stored / rate < 0.02
    chosen = []
    for tick in range(200):
        now = tick * 0.05
        line = Line(gone=int(now * rate), held=25 << 20, room=56 << 20)
        level.observe(now, {"s3": line}, spent=now * 0.8, idle=now * 0.8)
        chosen.append(level.next())
        rung = chosen[-1]
        cpu = FRAME * cost_at("pgbench", rung)
        level.made(rung, FRAME, int(FRAME * stored_at("pgbench", rung)), cpu, contention * cpu)
    assert sum(rung > 0 for rung in chosen[100:]) > 20


def test_a_line_that_runs_dry_is_not_taken_for_as_fast_as_sockets_are() -> None:
    """What they take at once after a pause counts with the pause."""
    rate = _LineRate()
    for now, gone in ((0.0, 0), (0.5, 20), (1.0, 40), (1.5, 60), (2.0, 80), (3.4, 80), (3.65, 128)):
        rate.observe(now, Line(gone=gone * 1_000_000, held=(40 << 20) if now <= 2 else 0, room=56 << 20))
    assert rate.rate is not None
    assert 35e6 < rate.rate < 60e6


def test_a_line_that_is_not_known_does_not_speak_for_one_that_is() -> None:
    level = controller(2)
    rungs = []
    for tick in range(400):
        now = tick * 0.05
        slow = Line(gone=int(now * 5 * MB), held=25 << 20, room=56 << 20)
        bursts = Line(gone=tick << 22, held=(50 << 20) if tick % 10 < 5 else 0, room=56 << 20)
        level.observe(now, {"slow": slow, "bursts": bursts}, spent=now * 0.5, idle=now * 1.5)
        rungs.append(level.next())
        level.made(rungs[-1], FRAME, int(FRAME * stored_at("log", rungs[-1])), FRAME * cost_at("log", rungs[-1]), 0.05)
    assert min(rungs[-100:]) > 0


@pytest.mark.parametrize(("workers", "line", "kind"), [
    (2, 10 * MB, "log"), (2, 25 * MB, "log"), (16, 10 * MB, "log"), (16, 25 * MB, "log"), (16, 100 * MB, "log"),
    (16, 10 * MB, "copy"), (16, 25 * MB, "copy"), (64, 100 * MB, "copy"),
])  # fmt: skip
def test_sooner_than_level_one_where_cores_are_idle(workers: int, line: float, kind: str) -> None:
    raw = raw_for(kind, 60, line, workers)
    auto = simulate(frames(kind, raw), controller(workers), workers=workers, line=line, source=1e9).seconds
    one = simulate(at_level_one(kind, raw), lambda: 0, workers=workers, line=line, source=1e9).seconds
    assert auto <= 0.85 * one


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [1, 2, 16])
@pytest.mark.parametrize("source", [100 * MB, 1e9])
def test_no_later_on_an_unlimited_line(kind: str, workers: int, source: float) -> None:
    raw = int(15 * min(source, workers / cost_at(kind, 0)))
    auto = simulate(frames(kind, raw), controller(workers), workers=workers, source=source)
    fastest = simulate(frames(kind, raw), lambda: 0, workers=workers, source=source)
    assert auto.seconds <= 1.03 * fastest.seconds
    assert set(auto.used) == {0}, "nothing is spent where the line is not what all wait for"


def at(outcome: Outcome, begin: float, end: float) -> list[int]:
    """Return the rungs of the frames that were begun between two moments."""
    return [rung for rung, begun in zip(outcome.order, outcome.begun, strict=True) if begin <= begun < end]


def test_a_slow_line_is_noticed_within_two_seconds() -> None:
    outcome = simulate(frames("log", int(600 * MB)), controller(2), line=10 * MB)
    rungs = at(outcome, 2.0, 8.0)
    assert min(rungs) > 0
    assert sum(rungs) / len(rungs) > 1.5


@pytest.mark.parametrize(("before", "after"), [(10 * MB, 400 * MB), (400 * MB, 10 * MB)])
def test_a_line_that_changes_is_followed(before: float, after: float) -> None:
    """Four seconds after the change the frames are what they are on a line that was always so."""
    outcome = simulate(
        frames("log", int(50e9)), controller(2), line=lambda now: before if now < 15 else after, until=25.0
    )
    slow, fast = (
        (at(outcome, 8, 15), at(outcome, 19, 25)) if before < after else (at(outcome, 19, 25), at(outcome, 8, 15))
    )
    assert sum(slow) / len(slow) > 1.5
    assert sum(fast) / len(fast) < 0.5


@pytest.mark.parametrize(("before", "after"), [(100 * MB, 10 * MB), (10 * MB, 3 * MB), (3 * MB, 10 * MB)])
def test_eight_seconds_after_a_change_a_line_is_as_if_it_had_always_been_so(before: float, after: float) -> None:
    """A slow line is measured over six seconds, so it takes longer to be believed."""

    def run(line: Callable[[float], float]) -> float:
        outcome = simulate(frames("copy", int(50e9)), controller(2), line=line, until=38.0)
        rungs = at(outcome, 23, 38)
        return sum(rungs) / len(rungs)

    assert abs(run(lambda now: before if now < 15 else after) - run(lambda now: after)) < 0.4


def test_data_that_stops_compressing_costs_nothing_and_the_rest_is_found_again() -> None:
    def stream() -> Iterator[Frame]:
        yield from frames("log", int(500 * MB))
        yield from incompressible(int(100 * MB))
        yield from frames("copy", int(400 * MB))

    outcome = simulate(stream(), controller(2), line=10 * MB)
    best = min(simulate(stream(), lambda rung=rung: rung, line=10 * MB).seconds for rung in range(5))  # type: ignore[misc]
    assert outcome.seconds <= 1.03 * best


def test_a_source_that_is_slower_than_the_line_leaves_the_cores_alone() -> None:
    outcome = simulate(frames("copy", int(1e9)), controller(16), workers=16, source=80 * MB, line=25 * MB)
    assert set(outcome.used) == {0}


def test_busy_cores_are_left_to_who_uses_them() -> None:
    """The line is slow since its other end needs the same cores: nothing is idle, so nothing is spent."""
    level = controller(2)
    for tick in range(400):
        now = tick * 0.05
        level.observe(now, {"s3": Line(gone=int(now * 30e6), held=40 << 20, room=56 << 20)}, spent=now * 0.25, idle=0.0)
        rung = level.next()
        level.made(rung, FRAME, int(FRAME * stored_at("copy", rung)), FRAME * cost_at("copy", rung), 0.05)
    assert sum(level.next() for _ in range(50)) <= 5
    assert level.budget < 0.4


def test_beside_others_who_take_all_that_is_left_a_part_of_its_share_is_used() -> None:
    """Two cores with two more workers on them: what is used must not be what is allowed, or it shrinks to nothing."""
    level = controller(2)
    gone = spent = 0.0
    for tick in range(600):
        now = tick * 0.05
        gone += 0.05 * 10e6
        level.observe(now, {"s3": Line(gone=int(gone), held=30 << 20, room=56 << 20)}, spent=spent, idle=0.0)
        rung = level.next()
        cpu = FRAME * cost_at("copy", rung)
        spent += min(cpu, 0.05)
        level.made(rung, FRAME, int(FRAME * stored_at("copy", rung)), cpu, 2 * cpu)
    assert level.budget >= 0.2
    assert sum(level.next() > 0 for _ in range(100)) >= 50


def test_what_may_have_to_be_made_again_keeps_cores_in_reserve() -> None:
    raw = raw_for("log", 30, 10 * MB, 16)
    free = simulate(frames("log", raw), controller(16), workers=16, line=10 * MB)
    kept = simulate(frames("log", raw), controller(16, reserve=4), workers=16, line=10 * MB)
    assert kept.cpu / 16 <= kept.seconds / 4 * 1.1
    assert free.cpu > kept.cpu


@pytest.mark.parametrize("noise", [0.1, 0.3])
@pytest.mark.parametrize("idle_known", [True, False])
def test_noise_does_no_harm(noise: float, idle_known: bool) -> None:
    raw = raw_for("log", 60, 25 * MB, 2)
    options = {"line": 25 * MB, "noise": noise, "source": 1e9}
    auto = simulate(frames("log", raw), controller(2), idle_known=idle_known, **options).seconds  # type: ignore[arg-type]
    best = min(simulate(frames("log", raw), lambda rung=rung: rung, **options).seconds for rung in range(5))  # type: ignore
    assert auto <= 1.03 * best


numbers = st.one_of(
    st.integers(-(1 << 70), 1 << 70), st.floats(), st.sampled_from([0, 1, FRAME, math.inf, -math.inf, math.nan])
)
whole = st.one_of(st.integers(-(1 << 70), 1 << 70), st.sampled_from([0, 1, FRAME, 56 << 20]))
events = st.lists(
    st.one_of(
        st.tuples(st.just("made"), st.integers(-3, 12), whole, whole, numbers, numbers),
        st.tuples(st.just("passed")),
        st.tuples(st.just("observe"), numbers, whole, whole, whole, st.none() | numbers, st.none() | numbers, numbers),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(events, st.integers(1, 200), st.integers(1, len(LADDER)))
def test_no_observation_leads_off_the_ladder(told: list[tuple[object, ...]], workers: int, rungs: int) -> None:
    level = LevelController(PRIORS[:rungs], workers, frame=FRAME, window=2 * workers + 1)
    for name, *values in told:
        if name == "made":
            level.made(*values)  # type: ignore[arg-type]
        elif name == "passed":
            level.passed()
        else:
            now, gone, held, room, spent, idle, source = values
            line = Line(gone=gone, held=held, room=room)  # type: ignore[arg-type]
            level.observe(now, {"line": line}, spent=spent, idle=idle, source=source)  # type: ignore[arg-type]
        assert 0 <= level.next() < rungs
    # And it gets over it: on a line that keeps up, the fastest again.
    for tick in range(3):
        level.observe(1e12 + tick, {"line": Line(gone=tick, held=0, room=56 << 20)})
    assert level.next() == 0


def test_the_ladder_climbs() -> None:
    costs, shares = [prior.cost for prior in PRIORS], [prior.share for prior in PRIORS]
    assert costs == sorted(costs)
    assert shares == sorted(shares, reverse=True)
    assert PRIORS[0] == Prior(1.0, 1.0)
