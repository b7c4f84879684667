"""The report as text, for one screen: what is wrong first, in full; what is well, a line each."""

from __future__ import annotations

import datetime as dt
import textwrap
from collections.abc import Iterator

from backhaul.model.verdict import BAD, HELD, OK, RUNNING, Overview, Verdict
from backhaul.reporting import words

_WIDTH = 100
_STATE = 11
_LAST_WORDS = 4


def report_text(overview: Overview) -> str:
    """Return the report; its first line is its subject."""
    now = dt.datetime.fromisoformat(overview.at)
    lines = [words.subject(overview), f"{overview.host}, {now:%a %Y-%m-%d %H:%M %Z}".rstrip(), ""]
    width = max((len(verdict.card.name) for verdict in overview.verdicts), default=0)
    bad = [verdict for verdict in overview.verdicts if verdict.state in BAD and verdict.last is not None]
    bad += [verdict for verdict in overview.verdicts if verdict.state in BAD and verdict.last is None]
    bad.sort(key=overview.verdicts.index)
    for verdict in bad:
        lines += _in_full(verdict, now, width)
        lines.append("")
    for verdict in overview.verdicts:
        if verdict.state not in BAD:
            lines += _in_a_line(verdict, now, width)
    for problem in overview.problems:
        lines += ["", *_wrapped("PROBLEM", problem)]
    for delivery in overview.undelivered:
        lines += ["", *_wrapped("UNDELIVERED", f"{delivery.subject} ({delivery.channel}: {delivery.error})")]
    while lines and not lines[-1]:
        lines.pop()
    return "\n".join(lines) + "\n"


def _in_full(verdict: Verdict, now: dt.datetime, width: int) -> Iterator[str]:
    indent = " " * (2 + _STATE + 1)
    head = f"  {verdict.state.upper():<{_STATE}} {verdict.card.name:<{width}}"
    reasons = [text for _, text in verdict.reasons] or ["-"]
    yield from textwrap.wrap(
        f"{head}  {reasons[0]}", _WIDTH, subsequent_indent=indent + " " * (width + 2), break_on_hyphens=False
    )
    for reason in reasons[1:]:
        yield from textwrap.wrap(f"{indent}and {reason}", _WIDTH, subsequent_indent=indent, break_on_hyphens=False)
    zone = words.zone_of(verdict.card)
    if verdict.last is not None and verdict.last.state not in (OK, RUNNING) and verdict.last.last_words:
        for line in verdict.last.last_words.splitlines()[-_LAST_WORDS:]:
            yield f"{indent}| {line}"[:_WIDTH]
    if verdict.last is not None:
        run = verdict.last
        facts = words.figures(run)
        yield f"{indent}last run   {words.clock(run.started, zone)}, {run.state}" + (f", {facts}" if facts else "")
    if verdict.last_good is not None:
        good = verdict.last_good
        yield f"{indent}last good  {words.clock(good.started, zone)}, {words.ago(good.started, now)}"
    elif verdict.last is not None:
        yield f"{indent}last good  none"
    if verdict.next_begins:
        yield f"{indent}next       {words.clock(verdict.next_begins, zone)}"
    for warning in verdict.warnings:
        yield from textwrap.wrap(f"{indent}note       {warning}", _WIDTH, subsequent_indent=indent + " " * 11)
    command = "log" if verdict.last is not None else "why"
    yield f"{indent}see        backhaul {command} {verdict.card.name}"


def _in_a_line(verdict: Verdict, now: dt.datetime, width: int) -> Iterator[str]:
    head = f"  {verdict.state:<{_STATE}} {verdict.card.name:<{width}}"
    zone = words.zone_of(verdict.card)
    facts = []
    run = verdict.last
    if verdict.state == RUNNING and run is not None:
        facts.append(verdict.reasons[0][1] if verdict.reasons else "running")
        if run.forecast:
            facts.append(f"ends about {words.clock(run.forecast, zone)[-5:]}")
    else:
        if run is not None:
            facts.append(f"{words.clock(run.started, zone)}")
            if done := words.figures(run):
                facts.append(done)
        if verdict.state == HELD:
            facts.append(verdict.reasons[0][1])
    if verdict.next_begins and verdict.state != RUNNING:
        facts.append(f"next {words.clock(verdict.next_begins, zone)}")
    yield f"{head}  {'; '.join(facts)}".rstrip()
    for warning in verdict.warnings:
        yield f"{' ' * (_STATE + 3)}{' ' * width}  note: {warning}"


def _wrapped(label: str, text: str) -> list[str]:
    indent = " " * (2 + _STATE + 1)
    return textwrap.wrap(f"  {label:<{_STATE}} {text}", _WIDTH, subsequent_indent=indent, break_on_hyphens=False)
