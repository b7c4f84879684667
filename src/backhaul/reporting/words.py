"""Times, sizes and sentences that all reports share, so that they say the same of the same."""

from __future__ import annotations

import datetime as dt
from zoneinfo import ZoneInfo

from backhaul.formats.quantities import format_duration, format_size
from backhaul.model import job as jobs
from backhaul.model.job import JobCard, RunRecord
from backhaul.model.verdict import BAD, INCOMPLETE, NEVER_RUN, Overview, Verdict

_LONGEST_SUBJECT = 160
_WEEK = 6 * 86400.0


def subject(overview: Overview) -> str:
    """Return the first line of a report, which is the subject of a mail: what is wrong first."""
    count = len(overview.verdicts)
    bad = [verdict for verdict in overview.verdicts if verdict.state in BAD]
    wrong = [verdict for verdict in bad if verdict.state != NEVER_RUN]
    if not count:
        return _cut(f"No jobs on {overview.host}" if not overview.problems else f"PROBLEM: {overview.problems[0]}")
    if not wrong and overview.problems:
        return _cut(f"PROBLEM: {overview.problems[0]} - {overview.host}")
    if not wrong and overview.undelivered:
        return _cut(f"UNDELIVERED: {overview.undelivered[0].subject} - {overview.host}")
    if not wrong:
        if len(bad) == count:
            first = min((v.next_begins for v in bad if v.next_begins), default="")
            when = f", the first begins {clock(first, _zone_of_all(overview))}" if first else ""
            return _cut(f"FIRST NIGHT: {plural(count, 'job')} on {overview.host} not run yet{when}")
        new = f", {plural(len(bad), 'job')} not run yet" if bad else ""
        others = "all " if not bad and count > 1 else ""
        return _cut(f"OK: {others}{plural(count - len(bad), 'job')} on {overview.host} well{new}")
    first_bad = wrong[0]
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    well = count - len(bad)
    return _cut(f"{headline(first_bad)}", f"{more} - {well} of {plural(count, 'job')} well on {overview.host}")


def headline(verdict: Verdict) -> str:
    """Return a verdict in a line: ``FAILED orders: pg_dump exited with status 1``."""
    reason = f": {verdict.reasons[0][1]}" if verdict.reasons else ""
    return f"{verdict.state.upper()} {verdict.card.name}{reason}"


def _cut(text: str, end: str = "") -> str:
    text = " ".join(text.split())
    room = _LONGEST_SUBJECT - len(end)
    return (text if len(text) <= room else text[: room - 1] + "…") + end


def plural(count: int, word: str) -> str:
    """Write a number of things."""
    return f"{count} {word}{'s' * (count != 1)}"


def clock(text: str, zone: ZoneInfo | None = None) -> str:
    """Write an ISO time for people: ``Sat 2026-11-21 22:07``; in its own zone, or the one that is given."""
    time = dt.datetime.fromisoformat(text)
    if zone is not None:
        time = time.astimezone(zone)
    return f"{time:%a %Y-%m-%d %H:%M}"


def moment(text: str, now: dt.datetime, zone: ZoneInfo | None) -> str:
    """Write an ISO time as people say it: ``Fri 22:06`` within the week around now, else its date."""
    near = abs((dt.datetime.fromisoformat(text) - now).total_seconds()) < _WEEK
    words = clock(text, zone)
    return f"{words[:3]} {words[-5:]}" if near else words[:-6]


def length(seconds: float) -> str:
    """Write a duration without what is nothing: ``6 min``, ``5 h 30 min``."""
    words = format_duration(seconds)
    for nothing in (" 00 s", " 00 min", " 0 h"):
        words = words.removesuffix(nothing)
    return words


def took(run: RunRecord) -> str:
    """Write how long a run took."""
    return f"took {length(run.seconds)}" if run.seconds else ""


def zone_of(card: JobCard) -> ZoneInfo | None:
    """Return the zone in which people think of a job; None for this host's."""
    return ZoneInfo(card.window.timezone) if card.window is not None else None


def ago(text: str, now: dt.datetime) -> str:
    """Write how long ago an ISO time was."""
    seconds = (now - dt.datetime.fromisoformat(text)).total_seconds()
    return f"{length(seconds)} ago" if seconds >= 0 else f"{length(-seconds)} in the future"


def figures(run: RunRecord) -> str:
    """Write what a run did, in a few words."""
    return ", ".join(part for part in (took(run), did(run)) if part)


def did(run: RunRecord) -> str:
    """Write what came of a run: sizes, proofs, and how many attempts it took."""
    words = []
    if run.kind == jobs.PUSH and run.raw_size:
        words.append(f"{format_size(run.raw_size)} in, {format_size(run.stored_size)} stored")
    elif run.kind == jobs.MIRROR and run.finished:
        words.append(f"{format_size(run.stored_size)} sent of {format_size(run.raw_size)}")
    elif run.kind == jobs.DRILL and run.proved is not None:
        words.append("proved" if run.proved else "not proved")
    elif run.kind == jobs.PRUNE and run.finished:
        words.append(f"{plural(run.removed, 'backup')} removed")
    if run.attempts > 1:
        words.append(f"{run.attempts} attempts")
    return ", ".join(words)


def _zone_of_all(overview: Overview) -> ZoneInfo | None:
    """Return the zone that all jobs share, for what is said of all of them."""
    zones = {verdict.card.window.timezone for verdict in overview.verdicts if verdict.card.window is not None}
    return ZoneInfo(zones.pop()) if len(zones) == 1 else None


def worst(overview: Overview) -> str:
    """Return the state that colours a report."""
    return overview.state if overview.verdicts else (INCOMPLETE if overview.problems else "ok")
