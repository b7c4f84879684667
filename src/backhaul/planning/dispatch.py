"""Whether a job begins now: its window, what its present opening has seen already, the holds."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from zoneinfo import ZoneInfo

import msgspec

from backhaul.model.job import (
    ALL_JOBS,
    DIED,
    INTERRUPTED,
    OK,
    RUNNING,
    SCHEDULED,
    SKIPPED,
    STOPPED,
    Hold,
    JobCard,
    RunRecord,
)
from backhaul.model.schedule import Occurrence
from backhaul.planning import windows

# A run that died, or had to stop for a hold, is begun again in the same opening; so many times in all.
MOST_BEGINNINGS = 3
_AGAIN = (DIED, INTERRUPTED, STOPPED)


class Decision(msgspec.Struct, frozen=True):
    """Whether to begin. ``why`` not, in words; ``final``: no later moment of this opening will do."""

    begin: bool
    occurrence: Occurrence | None = None
    why: str = ""
    hold: Hold | None = None
    final: bool = False


def decide(
    card: JobCard,
    runs: Sequence[RunRecord],
    holds: Iterable[Hold],
    now: dt.datetime,
    *,
    trigger: str,
    at_once: bool = False,
    despite_hold: bool = False,
) -> Decision:
    """Say whether a job begins now.

    Args:
        card: the job.
        runs: its records, newest first; one that died is marked so.
        holds: that are in force.
        now: the present.
        trigger: ``scheduled`` begins at the jittered time, and once in each opening; ``by hand`` whenever it is open.
        at_once: the window is not looked at.
        despite_hold: nor are the holds.
    """
    occurrence = None
    if card.window is not None:
        occurrence = windows.open_at(card.window, card.jitter_of, now)
    hold = None if despite_hold else hold_on(card.name, holds, now)
    if trigger == SCHEDULED:
        if occurrence is None or now < occurrence.begins:
            return Decision(False, occurrence, _closed(card, occurrence, now), final=occurrence is None)
        seen = [run for run in runs if run.occurrence == occurrence.id and run.state != SKIPPED and counts(run)]
        if any(run.state == RUNNING for run in seen):
            return Decision(False, occurrence, "it is running", final=True)
        done = next((run for run in seen if run.state not in _AGAIN), None)
        if done is not None:
            return Decision(False, occurrence, f"it ran in this window: {done.state}, {done.id}", final=True)
        if len(seen) >= MOST_BEGINNINGS:
            return Decision(False, occurrence, f"it was begun {len(seen)} times in this window", final=True)
    elif card.window is not None and occurrence is None and not at_once:
        return Decision(False, None, _closed(card, None, now), final=True)
    if hold is not None:
        return Decision(False, occurrence, held_words(hold, card), hold)
    return Decision(True, occurrence)


def counts(run: RunRecord) -> bool:
    """Tell whether a run is the night's: what a person tried in the window is not, unless it was good, or goes on."""
    return run.trigger == SCHEDULED or run.state in (OK, RUNNING)


def hold_on(job: str, holds: Iterable[Hold], now: dt.datetime) -> Hold | None:
    """Return the hold on a job that lasts longest, of those in force; None for none."""
    there = [hold for hold in holds if hold.job in (job, ALL_JOBS) and dt.datetime.fromisoformat(hold.until) > now]
    return max(there, key=lambda hold: dt.datetime.fromisoformat(hold.until), default=None)


def held_words(hold: Hold, card: JobCard) -> str:
    """Say that and why a job is held, until when by the clock of its window."""
    until = dt.datetime.fromisoformat(hold.until).astimezone(_zone(card))
    reason = f": {hold.reason}" if hold.reason else ""
    by = f", by {hold.by}" if hold.by else ""
    return f"held until {until:%a %Y-%m-%d %H:%M %Z}{reason}{by}"


def _zone(card: JobCard) -> dt.tzinfo:
    return ZoneInfo(card.window.timezone) if card.window is not None else dt.UTC


def _closed(card: JobCard, occurrence: Occurrence | None, now: dt.datetime) -> str:
    if card.window is None:
        return "it has no window: nothing schedules it"
    if occurrence is not None:
        return f"it begins at {_clock(card, occurrence.begins)}"
    after = windows.following(card.window, card.jitter_of, now)
    return "its window is closed" + (f", and opens at {_clock(card, after.opens)}" if after is not None else "")


def _clock(card: JobCard, time: dt.datetime) -> str:
    return f"{time.astimezone(_zone(card)):%a %Y-%m-%d %H:%M %Z}"
