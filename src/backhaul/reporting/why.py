"""One paragraph on a job: when it runs, what keeps it from running, and what became of it last."""

from __future__ import annotations

import datetime as dt
import textwrap
from collections.abc import Sequence

from backhaul.formats.window import format_window
from backhaul.model.verdict import FAILED, NEVER_RUN, OK, Verdict
from backhaul.planning.windows import jitter, open_at
from backhaul.reporting import words

_WIDTH = 100
_IS = {FAILED: "has failed", NEVER_RUN: "has never run"}


def why_text(verdict: Verdict, now: dt.datetime, facts: Sequence[str]) -> str:
    """Return the paragraph.

    Args:
        verdict: of now.
        now: the present (aware).
        facts: what else is known, as whole sentences: of the timer, of the lock.
    """
    card = verdict.card
    said = [f"{card.name} ({card.what}) {_IS.get(verdict.state, f'is {verdict.state}')}{_reasons(verdict)}."]
    zone = words.zone_of(card)
    if card.window is None:
        said.append("It has no window: nothing but a person runs it.")
    else:
        said.append(f"It runs {format_window(card.window)}.")
        delay = jitter(card.window, card.jitter_of)
        if card.window.jitter:
            mine, most = words.length(delay.total_seconds()), words.length(card.window.jitter)
            said.append(f"Its jitter is {mine} of up to {most}.")
        if card.window.excluded:
            said.append(f"It does not open on {', '.join(card.window.excluded)}.")
        opening = open_at(card.window, card.jitter_of, now)
        if opening is not None:
            said.append(f"The window is open until {words.clock(opening.closes.isoformat(), zone)}.")
        if verdict.next_begins:
            said.append(f"The next run begins {words.clock(verdict.next_begins, zone)}.")
        else:
            said.append("It does not open within the next year.")
    if verdict.hold is None:
        said.append("No hold is in force.")
    said += facts
    run = verdict.last
    if run is None:
        said.append("There is no record of a run.")
    else:
        done = words.figures(run)
        end = f"ended {run.state}" if run.finished else f"is {run.state}"
        said.append(
            f"The last run ({run.id}, {run.trigger}) began {words.clock(run.started, zone)}, "
            f"{words.ago(run.started, now)}, and {end}" + (f" ({done})." if done else ".")
        )
        if run.why and run.state != OK and not any(run.why in text for _, text in verdict.reasons):
            said.append(f"It says: {run.why}.")
        if verdict.last_good is not None and verdict.last_good is not run:
            good = verdict.last_good.started
            said.append(f"The last good one began {words.clock(good, zone)}, {words.ago(good, now)}.")
        said += [f"{remark[:1].upper()}{remark[1:]}." for remark in run.remarks]
    said += [f"Note: {warning}." for warning in verdict.warnings]
    return textwrap.fill(" ".join(said), _WIDTH, break_on_hyphens=False, break_long_words=False) + "\n"


def _reasons(verdict: Verdict) -> str:
    reasons = [text for state, text in verdict.reasons if state != NEVER_RUN]
    return f": {'; '.join(reasons)}" if reasons else ""
