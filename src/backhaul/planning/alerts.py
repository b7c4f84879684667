"""Who is told when: on a change, daily while it is bad, on recovery; once a week that somebody still looks."""

from __future__ import annotations

import datetime as dt

import msgspec

from backhaul.model.verdict import FAILED, INCOMPLETE, OVERDUE, Verdict

CHANGED, STILL, RECOVERED, SIGN_OF_LIFE = "changed", "still", "recovered", "sign of life"
# Of these somebody is told. (One that never ran is overdue as soon as it should have.)
ALARMING = (FAILED, OVERDUE, INCOMPLETE)
_AGAIN = dt.timedelta(days=1)
_LIFE = dt.timedelta(days=7)
# Timers are not punctual: what is due within the hour is due.
_EARLY = dt.timedelta(minutes=30)


class Told(msgspec.Struct, frozen=True):
    """What was last said, and delivered, of a job: its state, of which run, and when (ISO, UTC)."""

    state: str
    run: str
    at: str


def decide(told: Told | None, verdict: Verdict, now: dt.datetime, *, unheard: bool = False) -> str | None:
    """Return why somebody is to be told of a verdict; None for no reason.

    Args:
        told: what was last delivered; None for nothing ever.
        verdict: of now.
        now: the present (aware).
        unheard: an alert of it was sent since, and reached nobody.
    """
    bad = verdict.state in ALARMING
    was_bad = told is not None and told.state in ALARMING
    if not bad:
        # Somebody who was told that it is bad wants to know; but a run that goes on proves nothing yet.
        return RECOVERED if (was_bad or unheard) and verdict.state != "running" else None
    run = verdict.last.id if verdict.last is not None else ""
    if told is None or told.state != verdict.state:
        return CHANGED
    if verdict.state == FAILED and told.run != run and verdict.last is not None and verdict.last.state != "running":
        return CHANGED  # it failed once more: another night
    return STILL if _due(told.at, now, _AGAIN) else None


def is_due_again(told: Told, now: dt.datetime) -> bool:
    """Tell whether what is still bad is to be said again."""
    return _due(told.at, now, _AGAIN)


def life_is_due(told: Told | None, now: dt.datetime) -> bool:
    """Tell whether the weekly sign of life is due."""
    return told is None or _due(told.at, now, _LIFE)


def _due(at: str, now: dt.datetime, after: dt.timedelta) -> bool:
    last = dt.datetime.fromisoformat(at)
    # A time in the future is of a clock that was set back since: it silences nobody.
    return now - last >= after - _EARLY or last - now > after
