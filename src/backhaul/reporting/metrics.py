"""The verdicts as Prometheus text (exposition format 0.0.4), for the textfile collector or a Pushgateway."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator

from backhaul.model.verdict import STATES, Overview, Verdict

_HELP = (
    ("backhaul_job_state", "gauge", "1 for the state that the job is in, 0 for the others."),
    ("backhaul_job_last_run_timestamp_seconds", "gauge", "When the last run began."),
    ("backhaul_job_last_success_timestamp_seconds", "gauge", "When the last good run began."),
    ("backhaul_job_last_duration_seconds", "gauge", "How long the last run took that has ended."),
    ("backhaul_job_last_raw_bytes", "gauge", "Bytes that the last run read, or a mirror has."),
    ("backhaul_job_last_stored_bytes", "gauge", "Bytes that the last run stored or sent."),
    ("backhaul_job_next_run_timestamp_seconds", "gauge", "When the next run begins."),
    ("backhaul_job_done_bytes", "gauge", "How far the run is that is at work."),
    ("backhaul_problems", "gauge", "What is wrong with the records themselves."),
    ("backhaul_undelivered_alerts", "gauge", "Alerts that reached nobody."),
    ("backhaul_looked_timestamp_seconds", "gauge", "When a timer's call last looked what is to begin."),
    ("backhaul_judged_timestamp_seconds", "gauge", "When this was judged: one that grows old is an alarm, too."),
)


def metrics_text(overview: Overview) -> str:
    """Return all metrics of an overview."""
    samples: dict[str, list[str]] = {name: [] for name, _, _ in _HELP}
    for verdict in sorted(overview.verdicts, key=lambda each: each.card.name):
        for name, labels, value in _samples(verdict):
            samples[name].append(f"{name}{{{labels}}} {value}")
    host = f'host="{_escaped(overview.host)}"'
    samples["backhaul_problems"].append(f"backhaul_problems{{{host}}} {len(overview.problems)}")
    samples["backhaul_undelivered_alerts"].append(f"backhaul_undelivered_alerts{{{host}}} {len(overview.undelivered)}")
    samples["backhaul_judged_timestamp_seconds"].append(
        f"backhaul_judged_timestamp_seconds{{{host}}} {_seconds(overview.at)}"
    )
    if overview.looked:
        samples["backhaul_looked_timestamp_seconds"].append(
            f"backhaul_looked_timestamp_seconds{{{host}}} {_seconds(overview.looked)}"
        )
    lines = []
    for name, kind, words in _HELP:
        if samples[name]:
            lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}", *samples[name]]
    return "\n".join(lines) + "\n"


def _samples(verdict: Verdict) -> Iterator[tuple[str, str, float]]:
    card = verdict.card
    labels = f'job="{_escaped(card.name)}",kind="{_escaped(card.kind)}",host="{_escaped(card.host)}"'
    for state in STATES:
        yield "backhaul_job_state", f'{labels},state="{state}"', int(verdict.state == state)
    last, good = verdict.last, verdict.last_good
    if last is not None:
        yield "backhaul_job_last_run_timestamp_seconds", labels, _seconds(last.started)
        if last.finished:
            yield "backhaul_job_last_duration_seconds", labels, last.seconds
            yield "backhaul_job_last_raw_bytes", labels, last.raw_size
            yield "backhaul_job_last_stored_bytes", labels, last.stored_size
        else:
            yield "backhaul_job_done_bytes", labels, last.done
    if good is not None:
        yield "backhaul_job_last_success_timestamp_seconds", labels, _seconds(good.started)
    if verdict.next_begins:
        yield "backhaul_job_next_run_timestamp_seconds", labels, _seconds(verdict.next_begins)


def _seconds(text: str) -> float:
    return int(dt.datetime.fromisoformat(text).timestamp())


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
