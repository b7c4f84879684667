"""The report as a page of its own: no script, no style sheet, nothing fetched; mail programs show it as it is."""

from __future__ import annotations

import datetime as dt
from html import escape

from backhaul.model.verdict import BAD, OK, RUNNING, Overview, Verdict
from backhaul.reporting import words

# Dark enough on white for everyone to read (WCAG AA), and told apart by their words as well.
COLOURS = {
    "failed": "#b3261e",
    "overdue": "#b3261e",
    "incomplete": "#8a5300",
    "never run": "#5f6368",
    "running": "#0b57d0",
    "held": "#5f6368",
    "ok": "#146c2e",
}
_FONT = "font-family:system-ui,-apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif"
_CELL = "padding:8px 12px;vertical-align:top;border-top:1px solid #e0e0e0"


def report_html(overview: Overview) -> str:
    """Return the report as one HTML page."""
    now = dt.datetime.fromisoformat(overview.at)
    colour = COLOURS[words.worst(overview)]
    title = escape(words.subject(overview))
    rows = "".join(_row(verdict, now) for verdict in overview.verdicts)
    notes = "".join(_note("Problem", text) for text in overview.problems)
    notes += "".join(
        _note("Not delivered", f"{each.subject} ({each.channel}: {each.error})") for each in overview.undelivered
    )
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title></head>
<body style="margin:0;background:#ffffff;color:#1f1f1f;{_FONT};font-size:15px;line-height:1.45">
<div style="max-width:900px;margin:0 auto;padding:16px">
<h1 style="font-size:19px;margin:0 0 4px;padding-left:12px;border-left:6px solid {colour}">{title}</h1>
<p style="margin:0 0 16px;color:#5f6368">{escape(overview.host)}, {now:%a %Y-%m-%d %H:%M}</p>
<table role="presentation" style="border-collapse:collapse;width:100%">
{rows}</table>
{notes}</div>
</body>
</html>
"""


def _row(verdict: Verdict, now: dt.datetime) -> str:
    colour = COLOURS[verdict.state]
    bold = "bold" if verdict.state in BAD else "normal"
    badge = (
        f'<td style="{_CELL};white-space:nowrap;color:{colour};font-weight:{bold}">{escape(verdict.state)}</td>'
        f'<td style="{_CELL};white-space:nowrap"><strong>{escape(verdict.card.name)}</strong></td>'
    )
    return f'<tr>{badge}<td style="{_CELL}">{_details(verdict, now)}</td></tr>\n'


def _details(verdict: Verdict, now: dt.datetime) -> str:
    zone = words.zone_of(verdict.card)
    lines = [escape(text) for _, text in verdict.reasons]
    run = verdict.last
    if run is not None and verdict.state in BAD and run.state not in (OK, RUNNING) and run.last_words:
        text = escape("\n".join(run.last_words.splitlines()[-4:]))
        lines.append(
            '<pre style="margin:6px 0;padding:8px;background:#f5f5f5;white-space:pre-wrap;overflow-wrap:anywhere;'
            f'font-size:13px">{text}</pre>'
        )
    small = []
    if run is not None:
        facts = words.figures(run)
        small.append(f"last run {words.moment(run.started, now, zone)}, {run.state}" + (f", {facts}" if facts else ""))
    if verdict.state in BAD and run is not None:
        good = verdict.last_good
        small.append(
            f"last good {words.moment(good.started, now, zone)}, {words.ago(good.started, now)}"
            if good
            else "no good run yet"
        )
    if verdict.next_begins:
        small.append(f"next {words.moment(verdict.next_begins, now, zone)}")
    small += [f"note: {warning}" for warning in verdict.warnings]
    lines.append(f'<span style="color:#5f6368">{escape(" · ".join(small))}</span>')
    return "<br>".join(line for line in lines if line)


def _note(label: str, text: str) -> str:
    colour = COLOURS["incomplete"]
    return f'<p style="margin:12px 0 0"><strong style="color:{colour}">{label}</strong> {escape(text)}</p>\n'
