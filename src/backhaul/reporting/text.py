"""The report as text, for one screen: what is wrong first, in full; what is well, a line each."""

from __future__ import annotations

import datetime as dt
import textwrap
from collections.abc import Iterator

from backhaul.model.verdict import BAD, HELD, NEVER_RUN, OK, RUNNING, Overview, Verdict
from backhaul.reporting import words

_WIDTH = 100
_STATE = 10
_LAST_WORDS = 6


def report_text(overview: Overview) -> str:
    """Return the report; its first line is its subject."""
    now = dt.datetime.fromisoformat(overview.at)
    lines = [words.subject(overview), f"{overview.host}, {now:%a %Y-%m-%d %H:%M %Z}".rstrip(), ""]
    width = max((len(verdict.card.name) for verdict in overview.verdicts), default=0)
    for verdict in overview.verdicts:
        if _has_a_story(verdict):
            lines += [*_in_full(verdict, now, width), ""]
    lines += _in_lines([verdict for verdict in overview.verdicts if not _has_a_story(verdict)], now, width)
    for problem in overview.problems:
        lines += ["", *_wrapped("PROBLEM", problem)]
    for delivery in overview.undelivered:
        lines += ["", *_wrapped("UNDELIVERED", f"{delivery.subject} ({delivery.channel}: {delivery.error})")]
    while lines and not lines[-1]:
        lines.pop()
    return "\n".join(lines) + "\n"


def _has_a_story(verdict: Verdict) -> bool:
    return verdict.state in BAD and verdict.state != NEVER_RUN


def _in_full(verdict: Verdict, now: dt.datetime, width: int) -> Iterator[str]:
    indent = " " * (2 + _STATE + 1)
    reasons = [text for _, text in verdict.reasons] or ["-"]
    hanging = indent + " " * (width + 2)
    yield from _wrap(f"  {verdict.state.upper():<{_STATE}} {verdict.card.name:<{width}}  {reasons[0]}", hanging)
    for reason in reasons[1:]:
        yield from _wrap(f"{hanging}and {reason}", hanging)
    zone = words.zone_of(verdict.card)
    run, good = verdict.last, verdict.last_good
    if run is not None and run.state not in (OK, RUNNING):
        said = [line for text in run.last_words.splitlines() for line in textwrap.wrap(text, _WIDTH - len(indent) - 2)]
        yield from (f"{indent}| {line}" for line in said[-_LAST_WORDS:])
    if run is not None:
        facts = words.figures(run)
        yield f"{indent}last run   {words.moment(run.started, now, zone)}, {run.state}" + (
            f", {facts}" if facts else ""
        )
        when = (
            f"{words.moment(good.started, now, zone)}, {words.ago(good.started, now)}" if good is not None else "none"
        )
        yield f"{indent}last good  {when}"
    if verdict.next_begins:
        yield f"{indent}next       {words.moment(verdict.next_begins, now, zone)}"
    for warning in verdict.warnings:
        yield from _wrap(f"{indent}note       {warning}", indent + " " * 11)
    command = "log" if run is not None else "why"
    yield f"{indent}see        backhaul {command} {verdict.card.name}"


def _in_lines(verdicts: list[Verdict], now: dt.datetime, width: int) -> Iterator[str]:
    """Yield a line for each, in columns."""
    rows = [(verdict, _columns(verdict, now)) for verdict in verdicts]
    # A cell that is a sentence stands for itself: the columns of the others don't move for it.
    widths = [max((len(cells[at]) for _, cells in rows if len(cells) == _CELLS), default=0) for at in range(_CELLS)]
    for verdict, cells in rows:
        padded = cells if len(cells) < _CELLS else [f"{cell:<{widths[at]}}" for at, cell in enumerate(cells)]
        text = "  ".join(cell for cell in padded if cell)
        head = f"  {_shown(verdict.state):<{_STATE}} {verdict.card.name:<{width}}"
        yield f"{head}  {text}".rstrip()
        for warning in verdict.warnings:
            yield from _wrap(f"{' ' * (_STATE + 3 + width + 2)}note: {warning}", " " * (_STATE + 3 + width + 2))


_CELLS = 4


def _columns(verdict: Verdict, now: dt.datetime) -> list[str]:
    zone = words.zone_of(verdict.card)
    run = verdict.last
    after = f"next {words.moment(verdict.next_begins, now, zone)}" if verdict.next_begins else ""
    if verdict.state == RUNNING and run is not None:
        end = f", ends about {words.moment(run.forecast, now, zone)}" if run.forecast else ""
        return [f"{verdict.reasons[0][1]}{end}"]
    if verdict.state == HELD:
        return [f"{verdict.reasons[0][1]}; {after}" if after else verdict.reasons[0][1]]
    if run is None:
        return [after.replace("next", "first run", 1) or "nothing begins it but a person"]
    return [words.moment(run.started, now, zone), words.length(run.seconds), words.did(run), after]


def _shown(state: str) -> str:
    return state.upper() if state in BAD else state


def _wrap(text: str, hanging: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent=hanging, break_on_hyphens=False)


def _wrapped(label: str, text: str) -> list[str]:
    return _wrap(f"  {label:<{_STATE}} {text}", " " * (2 + _STATE + 1))
