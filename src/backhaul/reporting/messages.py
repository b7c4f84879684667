"""The messages that people get: an alert of one job, its recovery, the report of all."""

from __future__ import annotations

import datetime as dt
from typing import Any

import msgspec

from backhaul.model.verdict import BAD, OK, Message, Overview, Verdict
from backhaul.planning.alerts import RECOVERED, SIGN_OF_LIFE, STILL
from backhaul.reporting import words
from backhaul.reporting.html import report_html
from backhaul.reporting.text import report_text
from backhaul.reporting.why import why_text


def alert(overview: Overview, verdict: Verdict, why: str) -> Message:
    """Return what is said of one job.

    Args:
        overview: of this job alone, or of all.
        verdict: the job's.
        why: one of the reasons of ``planning.alerts``.
    """
    alone = Overview(host=overview.host, at=overview.at, verdicts=(verdict,), problems=overview.problems)
    line = words.headline(verdict)
    if why == RECOVERED:
        line = f"RECOVERED {verdict.card.name}: {verdict.state}"
    elif why == STILL:
        line = f"STILL {line}"
    subject = " ".join(f"{line} - {overview.host}".split())
    text = report_text(alone).split("\n", 1)[1]
    now = dt.datetime.fromisoformat(overview.at)
    return Message(
        subject=subject,
        text=f"{subject}\n{text}\n{why_text(verdict, now, ())}",
        html=report_html(alone),
        job=verdict.card.name,
        state=verdict.state if verdict.state in BAD else OK,
        failure=verdict.state in BAD and why != RECOVERED,
        document={"reason": why, "verdict": msgspec.to_builtins(verdict)},
    )


def report(overview: Overview, reason: str = "report") -> Message:
    """Return the report of all jobs; as the weekly sign of life it says so."""
    subject = words.subject(overview)
    life = "\nNothing more than the weekly sign of life: somebody still looks at these jobs.\n"
    return Message(
        subject=subject,
        text=report_text(overview) + (life if reason == SIGN_OF_LIFE else ""),
        html=report_html(overview),
        state=overview.state,
        failure=overview.state in BAD,
        document={"reason": reason, **report_document(overview)},
    )


def report_document(overview: Overview) -> dict[str, Any]:
    """Return the report for programs."""
    return {"subject": words.subject(overview), "state": overview.state, **msgspec.to_builtins(overview)}
