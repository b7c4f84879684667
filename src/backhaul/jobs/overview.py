"""All jobs at one moment, from what this host recorded, or from what lies beside the backups."""

from __future__ import annotations

import datetime as dt
import socket
from collections.abc import Iterable, Sequence

import msgspec

from backhaul.formats.config import Config
from backhaul.jobs import published
from backhaul.jobs.config import card_of
from backhaul.jobs.history import History
from backhaul.jobs.holds import Holds
from backhaul.model import job as jobs
from backhaul.model.job import JobCard, RunRecord
from backhaul.model.verdict import STATES, Delivery, Overview, Verdict
from backhaul.planning.verdicts import judge

# What was run by ``exec`` is shown for so long after its last run.
_EXEC_SHOWN = dt.timedelta(days=30)
# Somebody waits for the answer.
PATIENCE = 20.0


def overview(
    config: Config, history: History, holds: Holds, now: dt.datetime, *, names: Sequence[str] = ()
) -> Overview:
    """Judge the jobs of this host.

    Args:
        config: the jobs that there are.
        history, holds: of this host.
        now: the present (aware).
        names: those that are asked for; empty for all.
    """
    held = holds.all()
    cards = [
        msgspec.structs.replace(card, known_since=history.seen(card)) for card in map(card_of, config.jobs.values())
    ]
    runs = {card.name: history.runs(card.name) for card in cards}
    for name in history.names():
        # Of what a config no longer has nothing is expected; what ``exec`` ran lately has nothing but its records.
        if name not in runs and (card := _exec_card(name, history, now)) is not None:
            cards.append(card)
            runs[name] = history.runs(name)
    verdicts = [
        judge(card, runs[card.name], held, now, proved=_proved(card, cards, runs))
        for card in cards
        if not names or card.name in names
    ]
    return Overview(
        host=socket.gethostname(),
        at=now.astimezone().isoformat(timespec="seconds"),
        verdicts=_sorted(verdicts),
        problems=(*history.problems, *holds.problems),
        undelivered=undelivered(history.deliveries(200)),
    )


def overview_of_store(place: str, now: dt.datetime) -> Overview:
    """Judge the jobs whose records lie in a store, of whatever host.

    Raises:
        BackhaulError: the store could not be asked.
    """
    problems: list[str] = []
    found = published.read_published(place, patience=PATIENCE, on_problem=problems.append)
    cards = [each.card for each in found]
    runs = {(each.card.host, each.card.name): list(each.runs) for each in found}
    newest: dict[tuple[str, str], Verdict] = {}
    for card in cards:
        by_name = {name: records for (host, name), records in runs.items() if host == card.host}
        own = [other for other in cards if other.host == card.host]
        verdict = judge(card, by_name[card.name], (), now, proved=_proved(card, own, by_name))
        # A job with several places has its records in each: the one that knows most counts.
        before = newest.get((card.host, card.name))
        if before is None or _last(verdict) > _last(before):
            newest[card.host, card.name] = verdict
    return Overview(
        host=place,
        at=now.astimezone().isoformat(timespec="seconds"),
        verdicts=_sorted(newest.values()),
        problems=tuple(problems),
    )


def undelivered(deliveries: Sequence[Delivery]) -> tuple[Delivery, ...]:
    """Return the last alert of each job that no channel took.

    Args:
        deliveries: newest first.
    """
    newest: dict[str, list[Delivery]] = {}
    for each in deliveries:
        batch = newest.setdefault(each.job, [])
        if not batch or (batch[0].subject, batch[0].at) == (each.subject, each.at):
            batch.append(each)
    return tuple(batch[-1] for batch in newest.values() if all(each.error for each in batch))


def _last(verdict: Verdict) -> float:
    return dt.datetime.fromisoformat(verdict.last.started).timestamp() if verdict.last is not None else 0.0


def _sorted(verdicts: Iterable[Verdict]) -> tuple[Verdict, ...]:
    return tuple(sorted(verdicts, key=lambda verdict: (STATES.index(verdict.state), verdict.card.name)))


def _exec_card(name: str, history: History, now: dt.datetime) -> JobCard | None:
    last = next(iter(history.runs(name, 1)), None)
    if last is None or last.trigger != jobs.EXEC or now - dt.datetime.fromisoformat(last.started) > _EXEC_SHOWN:
        return None
    return history.card(name) or JobCard(name=name, host=last.host, kind=last.kind, what=name)


def _proved(card: JobCard, cards: Sequence[JobCard], runs: dict[str, list[RunRecord]]) -> dt.datetime | None:
    """Return when a backup of a job was last proved: by its own record, or by a drill of one of its places."""
    places = {place.partition("@")[0] for place in card.places}
    times = [run.proved_at for run in runs[card.name]]
    for other in cards:
        if other.kind == jobs.DRILL and places & {place.partition("@")[0] for place in other.places}:
            times += [run.proved_at for run in runs.get(other.name, ())]
    return max((dt.datetime.fromisoformat(time) for time in times if time), default=None)
