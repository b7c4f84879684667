"""What a job's record amounts to. One pure function, and everything that people or programs are told comes of it.

failed > overdue > incomplete > never run > running > held > ok: the worst that holds is the verdict, and the rest are
among its reasons.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from zoneinfo import ZoneInfo

from backhaul.formats.quantities import format_duration, format_size
from backhaul.model import job as jobs
from backhaul.model.job import Hold, JobCard, RunRecord
from backhaul.model.schedule import Occurrence
from backhaul.model.verdict import FAILED, HELD, INCOMPLETE, NEVER_RUN, OK, OVERDUE, RUNNING, STATES, Verdict
from backhaul.planning import windows
from backhaul.planning.dispatch import counts, held_words, hold_on
from backhaul.planning.forecast import forecast_end, late_by, usual_seconds, usual_size

# Clocks of hosts differ by this much without anybody having set one back.
_SKEW = dt.timedelta(minutes=10)


def judge(
    card: JobCard,
    runs: Sequence[RunRecord],
    holds: Sequence[Hold],
    now: dt.datetime,
    *,
    proved: dt.datetime | None = None,
) -> Verdict:
    """Return the verdict on a job.

    Args:
        card: the job and what is expected of it.
        runs: its records, in any order; a run that died unseen is marked ``died``.
        holds: all that there are, and that there were of late.
        now: the present (aware).
        proved: when one of its backups was last proved to restore; None for never.
    """
    runs = sorted(runs, key=lambda run: (_time(run.started), run.id), reverse=True)
    # A run from the future, of a clock that was wrong once, hides nothing of what happened since.
    future = [run for run in runs if _time(run.started) > now + _SKEW]
    runs = [run for run in runs if run not in future]
    begun = [run for run in runs if run.state != jobs.SKIPPED]
    # There is one run at a time: one that says it goes on, and has a later one behind it, has died.
    live = [run for run in begun[:1] if run.state == jobs.RUNNING]
    ended = [run for run in begun if run not in live]
    good = next((run for run in ended if run.state == jobs.OK), None)
    hold = hold_on(card.name, holds, now)
    reasons = [
        *_failed(ended),
        *_overdue(card, runs, begun, live, good, holds, now),
        *_incomplete(card, ended, proved, hold, now),
    ]
    if future:
        words = f"a run of it is dated {future[0].started}: was this host's clock set back?"
        reasons.append((INCOMPLETE, words))
    if not begun:
        reasons.append((NEVER_RUN, "it has never run"))
    if live:
        reasons.append((RUNNING, f"running since {live[0].started}{_progress(live[0])}"))
    if hold is not None:
        reasons.append((HELD, held_words(hold, card)))
    reasons.sort(key=lambda reason: STATES.index(reason[0]))
    opening, kept_from = _coming(card, begun, holds, now)
    return Verdict(
        state=reasons[0][0] if reasons else OK,
        card=card,
        reasons=tuple(reasons),
        last=begun[0] if begun else None,
        last_good=good,
        hold=hold,
        next_begins=_iso(opening.begins) if opening is not None else "",
        next_closes=_iso(opening.closes) if opening is not None else "",
        warnings=tuple(_warnings(card, ended, live, good, hold, opening, kept_from, now)),
    )


def _failed(ended: Sequence[RunRecord]) -> list[tuple[str, str]]:
    bad = (jobs.FAILED, jobs.DIED, jobs.INTERRUPTED, jobs.RUNNING)
    if not ended or ended[0].state not in bad:
        return []
    last = ended[0]
    words = {
        jobs.FAILED: last.why or "it failed",
        jobs.DIED: last.why or "it was killed, or its host went down",
        jobs.INTERRUPTED: last.why or "it was interrupted",
        jobs.RUNNING: "it never ended",
    }[last.state]
    row = 0
    while row < len(ended) and ended[row].state in bad:
        row += 1
    return [(FAILED, words + (f" ({row} times in a row)" if row > 1 else ""))]


def _overdue(
    card: JobCard,
    runs: Sequence[RunRecord],
    begun: Sequence[RunRecord],
    live: Sequence[RunRecord],
    good: RunRecord | None,
    holds: Sequence[Hold],
    now: dt.datetime,
) -> list[tuple[str, str]]:
    found = []
    expected = card.expectations
    known = _time(card.known_since) if card.known_since else None
    missed = _missed(card, runs, begun, known, holds, now)
    if missed is not None:
        words = f"it was to begin at {_local(card, missed.begins)}"
        words += " and did not" if missed.closes > now else f", and its window closed at {_local(card, missed.closes)}"
        found.append((OVERDUE, words))
    if expected.max_age is not None:
        since = _time(good.started) if good is not None else known
        if since is not None and (now - since).total_seconds() > expected.max_age:
            age = format_duration((now - since).total_seconds())
            words = f"the last good run is {age} old" if good is not None else f"no good run in {age}"
            found.append((OVERDUE, f"{words}, and {format_duration(expected.max_age)} are allowed"))
    for run in live:
        took = (now - _time(run.started)).total_seconds()
        if expected.max_duration is not None and took > expected.max_duration:
            allowed = format_duration(expected.max_duration)
            found.append((OVERDUE, f"it has been running for {format_duration(took)}, and {allowed} are allowed"))
    return found


def _missed(
    card: JobCard,
    runs: Sequence[RunRecord],
    begun: Sequence[RunRecord],
    known: dt.datetime | None,
    holds: Sequence[Hold],
    now: dt.datetime,
) -> Occurrence | None:
    """Return the newest opening that should have seen a run by now, if it has not."""
    if card.window is None or known is None:
        return None
    opening = windows.latest(card.window, card.jitter_of, now)
    if opening is not None and now < _deadline(card, opening, holds):
        # This one has time left: it is the one before that counts.
        opening = windows.latest(card.window, card.jitter_of, opening.opens - dt.timedelta(seconds=1))
    if opening is None or opening.begins < known:
        return None
    if any(run.occurrence == opening.id or _time(run.started) >= opening.opens for run in begun):
        return None
    # Held to its end: that was said while it was, and no run is missing that nobody wanted.
    if _held_until(card, opening, holds) >= opening.closes:
        return None
    if not holds:
        # Of a hold that whoever asks does not know of, the record of the skipped run tells.
        told = [
            _time(run.finished)
            for run in runs
            if run.state == jobs.SKIPPED and run.occurrence == opening.id and run.finished
        ]
        if told and max(told) >= min(opening.closes, now):
            return None
    return opening


def _deadline(card: JobCard, opening: Occurrence, holds: Sequence[Hold]) -> dt.datetime:
    """Return when a run of an opening is missing: some time after it should have begun, or could."""
    could = max(opening.begins, _held_until(card, opening, holds))
    return min(could + dt.timedelta(seconds=card.expectations.grace), opening.closes)


def _held_until(card: JobCard, opening: Occurrence, holds: Sequence[Hold]) -> dt.datetime:
    """Return until when holds kept a run from beginning without a gap; one that came too late excuses nothing."""
    until = opening.begins
    grace = dt.timedelta(seconds=card.expectations.grace)
    for hold in sorted(holds, key=lambda each: each.since):
        if hold.job in (card.name, jobs.ALL_JOBS) and _time(hold.since) <= until + grace:
            until = max(until, _time(hold.until))
    return until


def _time(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text)


def _incomplete(
    card: JobCard, ended: Sequence[RunRecord], proved: dt.datetime | None, hold: Hold | None, now: dt.datetime
) -> list[tuple[str, str]]:
    if not ended:
        return []
    found = []
    last = ended[0]
    expected = card.expectations
    # One that stopped for a hold that is in force did as it was told, and says that it is held.
    if last.state == jobs.INCOMPLETE or (last.state == jobs.STOPPED and hold is None):
        found.append((INCOMPLETE, last.why or "it finished, but not all of it"))
    if expected.max_duration is not None and last.seconds > expected.max_duration:
        took, allowed = format_duration(last.seconds), format_duration(expected.max_duration)
        found.append((INCOMPLETE, f"it took {took}, and {allowed} are allowed"))
    sized = next((run for run in ended if run.backups), None)
    if sized is not None:
        usual = usual_size([run for run in ended if run.backups and run is not sized])
        if usual:
            share = sized.raw_size / usual
            if (expected.least is not None and share < expected.least) or (
                expected.most is not None and share > expected.most
            ):
                size = f"{format_size(sized.raw_size)}, {share:.0%} of the usual {format_size(usual)}"
                found.append((INCOMPLETE, f"the backup {sized.backups[-1]} has {size}"))
    if expected.max_drill_age is not None and any(run.state == jobs.OK for run in ended):
        allowed = format_duration(expected.max_drill_age)
        if proved is None:
            known = _time(card.known_since) if card.known_since else None
            if known is None or (now - known).total_seconds() > expected.max_drill_age:
                found.append((INCOMPLETE, f"no backup was ever proved to restore, and {allowed} are allowed"))
        elif (now - proved).total_seconds() > expected.max_drill_age:
            age = format_duration((now - proved).total_seconds())
            found.append((INCOMPLETE, f"the last proof that it restores is {age} old, and {allowed} are allowed"))
    return found


def _warnings(
    card: JobCard,
    ended: Sequence[RunRecord],
    live: Sequence[RunRecord],
    good: RunRecord | None,
    hold: Hold | None,
    opening: Occurrence | None,
    kept_from: Occurrence | None,
    now: dt.datetime,
) -> Iterable[str]:
    if live and live[0].forecast and live[0].closes:
        end, closes = _time(live[0].forecast), _time(live[0].closes)
        if late := late_by(end, closes):
            yield past_window(_local(card, end), late, "at this rate it ends")
    elif not live and opening is not None:
        begin = max(opening.begins, now)
        end_ = forecast_end(begin, 0.0, usual=usual_seconds(ended))
        if end_ is not None and (late := late_by(end_, opening.closes)):
            yield past_window(_local(card, end_), late, "with what it usually takes it will end")
    if kept_from is not None:
        after = f"it begins next at {_local(card, opening.begins)}" if opening is not None else "nothing follows"
        yield f"the opening of {_local(card, kept_from.opens)} falls into the hold, and {after}"
    if hold is not None and card.expectations.max_age is not None and good is not None:
        limit = _time(good.started) + dt.timedelta(seconds=card.expectations.max_age)
        over = _time(hold.until)
        if now < limit < over:
            yield f"before the hold ends the last good run is too old (max_age): at {_local(card, limit)}"


def past_window(end: str, late: float, words: str) -> str:
    """Say that a run ends after its window."""
    return f"{words} at {end}, {format_duration(late)} past the window"


def _coming(
    card: JobCard, begun: Sequence[RunRecord], holds: Sequence[Hold], now: dt.datetime
) -> tuple[Occurrence | None, Occurrence | None]:
    """Return the opening in which it begins next, and one before it that holds keep it from, if there is one.

    The present opening counts while it has not begun in it. ``begins`` is when holds let it.
    """
    if card.window is None:
        return None, None
    kept_from = None
    since = now - dt.timedelta(days=2)
    for days in (10, 370):
        for each in windows.occurrences(card.window, card.jitter_of, since, now + dt.timedelta(days=days)):
            has_run = any(_time(run.started) >= each.opens and counts(run) for run in begun)
            if each.closes <= now or has_run:
                continue
            until = _held_until(card, each, holds)
            if until >= each.closes:
                kept_from = kept_from or each
                continue
            return Occurrence(each.opens, max(each.begins, until), each.closes), kept_from
    return None, kept_from


def _progress(run: RunRecord) -> str:
    if run.total:
        return f", {min(run.done / run.total, 1.0):.0%} done"
    return f", {format_size(run.done)} so far" if run.done else ""


def _local(card: JobCard, time: dt.datetime) -> str:
    zone = ZoneInfo(card.window.timezone) if card.window is not None else dt.UTC
    return f"{time.astimezone(zone):%a %Y-%m-%d %H:%M}"


def _iso(time: dt.datetime) -> str:
    return time.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
