"""What records amount to, case by case; and who is told."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backhaul.model import job as jobs
from backhaul.model.job import Expectations, Hold, JobCard, RunRecord
from backhaul.model.schedule import Window
from backhaul.model.verdict import FAILED, HELD, INCOMPLETE, NEVER_RUN, OK, OVERDUE, RUNNING, STATES, Verdict
from backhaul.planning.alerts import CHANGED, RECOVERED, STILL, Told, decide, life_is_due
from backhaul.planning.dispatch import decide as dispatch
from backhaul.planning.forecast import forecast_end, late_by, usual_seconds, usual_size
from backhaul.planning.verdicts import judge

pytestmark = pytest.mark.unit

UTC = dt.UTC
NOW = dt.datetime(2026, 11, 21, 8, 0, tzinfo=UTC)  # a Saturday
HOUR = dt.timedelta(hours=1)
NIGHTLY = Window(starts=(22 * 60,), length=5.5 * 3600)


def card(**fields: Any) -> JobCard:
    given = {"name": "orders", "host": "db7", "kind": jobs.PUSH, "known_since": "2026-01-01T00:00:00Z", **fields}
    return JobCard(**given)


def record(started: dt.datetime, state: str = jobs.OK, **fields: Any) -> RunRecord:
    given = {
        "format": "backhaul-run",
        "version": "1.0",
        "id": f"{started:%Y%m%dT%H%M%SZ}-000{jobs.RUN_STATES.index(state)}",
        "job": "orders",
        "kind": jobs.PUSH,
        "host": "db7",
        "trigger": jobs.SCHEDULED,
        "started": started.isoformat(),
        "finished": "" if state == jobs.RUNNING else (started + HOUR / 2).isoformat(),
        "seconds": 1800.0,
        "state": state,
        **fields,
    }
    return RunRecord(**given)


def last_night(state: str = jobs.OK, **fields: Any) -> RunRecord:
    return record(dt.datetime(2026, 11, 20, 22, 0, tzinfo=UTC), state, occurrence="2026-11-20T22:00:00Z", **fields)


def hold(since: dt.datetime, until: dt.datetime, job: str = "orders") -> Hold:
    return Hold(id="1", job=job, since=since.isoformat(), until=until.isoformat(), reason="groom", by="root")


def state(verdict: Verdict) -> str:
    return verdict.state


def test_the_order_of_the_states() -> None:
    assert STATES == (FAILED, OVERDUE, INCOMPLETE, NEVER_RUN, RUNNING, HELD, OK)


def test_all_is_well() -> None:
    verdict = judge(card(window=NIGHTLY), [last_night()], (), NOW)
    assert (verdict.state, verdict.reasons, verdict.warnings) == (OK, (), ())
    assert verdict.next_begins == "2026-11-21T22:00:00Z"


@pytest.mark.parametrize("ended", [jobs.FAILED, jobs.DIED, jobs.INTERRUPTED])
def test_failed(ended: str) -> None:
    runs = [last_night(ended, why="no space"), record(NOW - 40 * HOUR, ended), record(NOW - 60 * HOUR)]
    verdict = judge(card(window=NIGHTLY), runs, (), NOW)
    assert verdict.state == FAILED
    assert verdict.reasons[0][1] == "no space (2 times in a row)"
    assert verdict.last_good is not None
    # A run that goes on proves nothing yet; one that ended well does.
    live = record(NOW - HOUR, jobs.RUNNING)
    assert judge(card(), [live, *runs], (), NOW).state == FAILED
    assert judge(card(), [record(NOW - HOUR), *runs], (), NOW).state == OK


def test_overdue_by_age() -> None:
    old = [record(NOW - 27 * HOUR)]
    assert judge(card(expectations=Expectations(max_age=26 * 3600)), old, (), NOW).state == OVERDUE
    assert judge(card(expectations=Expectations(max_age=28 * 3600)), old, (), NOW).state == OK
    # None was ever good: it counts from when the job was first known.
    young = card(expectations=Expectations(max_age=26 * 3600), known_since=(NOW - HOUR).isoformat())
    assert judge(young, [], (), NOW).state == NEVER_RUN
    assert judge(card(expectations=Expectations(max_age=26 * 3600)), [], (), NOW).state == OVERDUE


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ("2026-11-20T21:59:00Z", OK),
        ("2026-11-20T22:30:00Z", OK),  # it may still begin
        ("2026-11-20T23:01:00Z", OVERDUE),  # an hour late
        ("2026-11-21T03:31:00Z", OVERDUE),  # closed
        ("2026-11-21T21:59:00Z", OVERDUE),
        ("2026-11-21T22:30:00Z", OVERDUE),  # the next one opened, and has not begun
    ],
)
def test_a_run_that_did_not_begin(now: str, expected: str) -> None:
    before = record(dt.datetime(2026, 11, 19, 22, 0, tzinfo=UTC), occurrence="2026-11-19T22:00:00Z")
    assert judge(card(window=NIGHTLY), [before], (), dt.datetime.fromisoformat(now)).state == expected


def test_a_window_misses_nothing_from_before_it_was_known() -> None:
    new = card(window=NIGHTLY, known_since="2026-11-21T07:00:00Z")
    assert judge(new, [], (), NOW).state == NEVER_RUN
    assert judge(new, [], (), NOW + 24 * HOUR).state == OVERDUE


def test_a_run_by_hand_after_the_window_makes_good_for_it() -> None:
    before = record(dt.datetime(2026, 11, 19, 22, 0, tzinfo=UTC), occurrence="2026-11-19T22:00:00Z")
    by_hand = record(NOW - HOUR, trigger=jobs.BY_HAND)
    assert judge(card(window=NIGHTLY), [before, by_hand], (), NOW).state == OK


def test_running_for_too_long() -> None:
    live = record(NOW - 3 * HOUR, jobs.RUNNING)
    assert judge(card(expectations=Expectations(max_duration=2 * 3600)), [live], (), NOW).state == OVERDUE
    verdict = judge(card(), [live], (), NOW)
    assert verdict.state == RUNNING
    done = judge(card(expectations=Expectations(max_duration=1200)), [last_night()], (), NOW)
    assert (done.state, done.reasons[0][1]) == (INCOMPLETE, "it took 30 min 00 s, and 20 min 00 s are allowed")


def test_incomplete() -> None:
    verdict = judge(card(window=NIGHTLY), [last_night(jobs.INCOMPLETE, why="one of two places failed")], (), NOW)
    assert (verdict.state, verdict.reasons[0][1]) == (INCOMPLETE, "one of two places failed")
    assert judge(card(window=NIGHTLY), [last_night(jobs.STOPPED)], (), NOW).state == INCOMPLETE


@pytest.mark.parametrize(("size", "expected"), [(49, INCOMPLETE), (50, OK), (100, OK), (300, OK), (301, INCOMPLETE)])
def test_a_size_that_is_not_usual(size: int, expected: str) -> None:
    wants = card(expectations=Expectations(least=0.5, most=3.0))
    usual = [record(NOW - (n + 1) * 24 * HOUR, backups=("x",), raw_size=s) for n, s in enumerate((90, 100, 110, 5000))]
    newest = record(NOW - HOUR, backups=("20261121T070000Z",), raw_size=size)
    assert judge(wants, [newest, *usual[:3]], (), NOW).state == expected
    # Of fewer than three nothing is usual.
    assert judge(wants, [newest, *usual[:2]], (), NOW).state == OK
    assert usual_size(usual) == 105


def test_the_age_of_the_last_proof() -> None:
    wants = card(expectations=Expectations(max_drill_age=7 * 86400))
    runs = [last_night()]
    assert judge(wants, runs, (), NOW, proved=NOW - 6 * 24 * HOUR).state == OK
    assert judge(wants, runs, (), NOW, proved=NOW - 8 * 24 * HOUR).state == INCOMPLETE
    assert judge(wants, runs, (), NOW).state == INCOMPLETE
    new = card(expectations=Expectations(max_drill_age=7 * 86400), known_since=(NOW - HOUR).isoformat())
    assert judge(new, runs, (), NOW).state == OK


def test_held() -> None:
    now_held = hold(NOW - HOUR, NOW + HOUR)
    verdict = judge(card(window=NIGHTLY), [last_night()], [now_held], NOW)
    assert verdict.state == HELD
    assert "groom" in verdict.reasons[0][1]
    assert judge(card(), [last_night()], [hold(NOW - HOUR, NOW + HOUR, "other")], NOW).state == OK
    assert judge(card(), [last_night()], [hold(NOW - 2 * HOUR, NOW - HOUR)], NOW).state == OK
    assert judge(card(), [last_night(jobs.FAILED)], [now_held], NOW).state == FAILED


def test_a_hold_over_the_next_opening_is_said_before() -> None:
    evening = dt.datetime(2026, 11, 21, 20, 0, tzinfo=UTC)
    whole = judge(card(window=NIGHTLY), [last_night()], [hold(evening, evening + 10 * HOUR)], evening)
    assert whole.next_begins == "2026-11-22T22:00:00Z"
    assert whole.warnings == (
        "the opening of Sat 2026-11-21 22:00 falls into the hold, and it begins next at Sun 2026-11-22 22:00",
    )
    part = judge(card(window=NIGHTLY), [last_night()], [hold(evening, evening + 3 * HOUR)], evening)
    assert (part.next_begins, part.warnings) == ("2026-11-21T23:00:00Z", ())


def test_a_mirror_that_stopped_for_a_hold_did_as_it_was_told() -> None:
    stopped = last_night(jobs.STOPPED, why="held")
    assert judge(card(window=NIGHTLY), [stopped], [hold(NOW - 12 * HOUR, NOW + HOUR)], NOW).state == HELD
    assert judge(card(window=NIGHTLY), [stopped], [hold(NOW - 12 * HOUR, NOW - HOUR)], NOW).state == INCOMPLETE


def test_a_run_that_says_it_goes_on_and_has_a_later_one_behind_it_has_died() -> None:
    ghost = record(NOW - 30 * HOUR, jobs.RUNNING)
    assert judge(card(expectations=Expectations(max_duration=3600)), [ghost, last_night()], (), NOW).state == OK


def test_a_hold_that_came_too_late_excuses_nothing() -> None:
    before = record(dt.datetime(2026, 11, 19, 22, 0, tzinfo=UTC), occurrence="2026-11-19T22:00:00Z")
    late = dt.datetime(2026, 11, 21, 1, 0, tzinfo=UTC)
    assert judge(card(window=NIGHTLY), [before], [hold(late, late + HOUR / 6)], late).state == OVERDUE
    assert judge(card(window=NIGHTLY), [before], [hold(late, late + 12 * HOUR)], NOW).state == OVERDUE
    # One that ended in the window leaves an hour to begin.
    opens = dt.datetime(2026, 11, 20, 22, 0, tzinfo=UTC)
    held = [hold(opens - HOUR, opens + 2 * HOUR)]
    assert judge(card(window=NIGHTLY), [before], held, opens + 2.2 * HOUR).state == OK
    assert judge(card(window=NIGHTLY), [before], held, opens + 3.2 * HOUR).state == OVERDUE


def test_a_night_that_was_held_to_its_end_is_not_missing() -> None:
    before = record(dt.datetime(2026, 11, 19, 22, 0, tzinfo=UTC), occurrence="2026-11-19T22:00:00Z")
    opens = dt.datetime(2026, 11, 20, 22, 0, tzinfo=UTC)
    whole, part = hold(opens - HOUR, opens + 6 * HOUR), hold(opens - HOUR, opens + 2 * HOUR)
    assert judge(card(window=NIGHTLY), [before], [whole], NOW).state == OK
    assert judge(card(window=NIGHTLY), [before], [part], NOW).state == OVERDUE
    # From another host: the hold is not known, the record of the skipped run is.
    skipped = record(opens, jobs.SKIPPED, occurrence="2026-11-20T22:00:00Z", finished=(opens + 6 * HOUR).isoformat())
    assert judge(card(window=NIGHTLY), [before, skipped], (), NOW).state == OK


def test_a_clock_that_was_set_back_is_said() -> None:
    verdict = judge(card(), [record(NOW + 5 * HOUR)], (), NOW)
    assert verdict.state == INCOMPLETE
    assert "clock" in verdict.reasons[0][1]


def test_forecasts() -> None:
    # Half of it in an hour: another hour.
    assert forecast_end(NOW, 3600, done=50, total=100) == NOW + HOUR
    assert forecast_end(NOW, 10, done=50, total=100) is None  # too early for a rate
    assert forecast_end(NOW, 0, usual=1800) == NOW + HOUR / 2
    assert forecast_end(NOW, 2000, usual=1800) is None
    assert late_by(NOW + HOUR, NOW) == 3600
    assert late_by(NOW, NOW + HOUR) == 0
    assert usual_seconds([record(NOW, seconds=s) for s in (10.0, 30.0, 20.0)]) == 20
    # Said before and during.
    slow = [record(NOW - (n + 1) * 24 * HOUR, seconds=6 * 3600.0) for n in range(3)]
    before = judge(card(window=NIGHTLY), [last_night(seconds=6 * 3600.0), *slow], (), NOW)
    assert before.warnings == (
        "with what it usually takes it will end at Sun 2026-11-22 04:00, 30 min 00 s past the window",
    )
    live = record(NOW, jobs.RUNNING, closes="2026-11-21T05:00:00+00:00", forecast="2026-11-21T05:41:00+00:00")
    during = judge(card(window=NIGHTLY), [live], (), NOW)
    assert during.warnings == ("at this rate it ends at Sat 2026-11-21 05:41, 41 min 00 s past the window",)


def test_a_hold_that_would_break_the_age_is_warned_of() -> None:
    wants = card(expectations=Expectations(max_age=26 * 3600))
    assert judge(wants, [last_night()], [hold(NOW, NOW + 12 * HOUR)], NOW).warnings == ()
    assert judge(wants, [last_night()], [hold(NOW, NOW + 20 * HOUR)], NOW).warnings != ()


# -- whether it begins -------------------------------------------------------------------------------------

OPEN = dt.datetime(2026, 11, 21, 23, 0, tzinfo=UTC)
TONIGHT = "2026-11-21T22:00:00Z"


def begins(*runs: RunRecord, now: dt.datetime = OPEN, holds: tuple[Hold, ...] = (), **how: Any) -> bool:
    return dispatch(card(window=NIGHTLY), runs, holds, now, **{"trigger": jobs.SCHEDULED, **how}).begin


def tonight(state_: str) -> RunRecord:
    return record(OPEN - HOUR / 2, state_, occurrence=TONIGHT)


def test_once_in_each_opening() -> None:
    assert begins()
    assert begins(last_night())
    for ended in (jobs.OK, jobs.FAILED, jobs.INCOMPLETE, jobs.RUNNING):
        assert not begins(tonight(ended))
    # What died, or stopped for a hold, goes on in the same night; but not for ever.
    for ended in (jobs.DIED, jobs.INTERRUPTED, jobs.STOPPED):
        assert begins(tonight(ended))
        assert not begins(tonight(ended), tonight(ended), tonight(ended))
    assert not begins(now=OPEN - 2 * HOUR)
    assert not begins(now=OPEN + 6 * HOUR)


def test_what_a_person_tried_is_not_the_run_of_the_night() -> None:
    def by_hand(state_: str) -> RunRecord:
        return record(OPEN - HOUR / 2, state_, occurrence=TONIGHT, trigger=jobs.BY_HAND)

    for ended in (jobs.FAILED, jobs.INTERRUPTED, jobs.INCOMPLETE):
        assert begins(by_hand(ended))
    assert not begins(by_hand(jobs.OK))
    assert not begins(by_hand(jobs.RUNNING))


def test_by_hand() -> None:
    assert begins(tonight(jobs.OK), trigger=jobs.BY_HAND)
    assert not begins(now=NOW, trigger=jobs.BY_HAND)
    assert begins(now=NOW, trigger=jobs.BY_HAND, at_once=True)
    held = (hold(OPEN - HOUR, OPEN + HOUR),)
    assert not begins(holds=held)
    assert not begins(holds=held, trigger=jobs.BY_HAND, at_once=True)
    assert begins(holds=held, trigger=jobs.BY_HAND, despite_hold=True)


# -- who is told -------------------------------------------------------------------------------------------


def told(of: str, hours_ago: float, run: str = "") -> Told:
    return Told(of, run, (NOW - hours_ago * HOUR).isoformat())


def test_when_people_are_told() -> None:
    failed = judge(card(), [last_night(jobs.FAILED)], (), NOW)
    run = failed.last.id if failed.last is not None else ""
    well = judge(card(), [last_night()], (), NOW)
    assert decide(None, failed, NOW) == CHANGED
    assert decide(None, well, NOW) is None
    assert decide(told(FAILED, 2, run), failed, NOW) is None
    assert decide(told(FAILED, 24, run), failed, NOW) == STILL
    assert decide(told(FAILED, 2, "another night"), failed, NOW) == CHANGED
    assert decide(told(OVERDUE, 2, run), failed, NOW) == CHANGED
    assert decide(told(FAILED, 2, run), well, NOW) == RECOVERED
    assert decide(told(OK, 2, run), well, NOW) is None
    # An alert reached nobody, and meanwhile it is well again: that it was not is said.
    assert decide(None, well, NOW, unheard=True) == RECOVERED
    # A time in the future, of a clock that was set back, silences nobody.
    assert decide(told(FAILED, -48, run), failed, NOW) == STILL
    running = judge(card(), [record(NOW, jobs.RUNNING)], (), NOW)
    assert decide(told(OVERDUE, 2), running, NOW) is None
    assert decide(None, judge(card(), [], (), NOW), NOW) is None
    assert life_is_due(None, NOW)
    assert life_is_due(told(OK, 7 * 24), NOW)
    assert not life_is_due(told(OK, 6 * 24), NOW)


RUNS = st.lists(
    st.tuples(st.integers(-30 * 24, 24), st.sampled_from(jobs.RUN_STATES)).map(
        lambda pair: record(NOW + pair[0] * HOUR, pair[1], occurrence="2026-11-20T22:00:00Z" if pair[0] == -10 else "")
    ),
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(RUNS, st.booleans(), st.booleans(), st.sampled_from((None, 3600.0, 86400.0)))
def test_a_verdict_is_the_worst_of_its_reasons(runs: list[RunRecord], scheduled: bool, held: bool, age: float) -> None:
    wants = card(window=NIGHTLY if scheduled else None, expectations=Expectations(max_age=age, max_duration=age))
    holds = [hold(NOW - HOUR, NOW + HOUR)] if held else []
    verdict = judge(wants, runs, holds, NOW)
    assert verdict.state == (min((reason[0] for reason in verdict.reasons), key=STATES.index, default=OK))
    assert [STATES.index(of) for of, _ in verdict.reasons] == sorted(STATES.index(of) for of, _ in verdict.reasons)
    assert judge(wants, list(reversed(runs)), holds, NOW).state == verdict.state
    if verdict.state == OK:
        begun = [run for run in runs if run.state not in (jobs.SKIPPED, jobs.RUNNING)]
        newest = max(begun, key=lambda run: (dt.datetime.fromisoformat(run.started), run.id))
        assert newest.state == jobs.OK
