"""All jobs at one moment, from what this host recorded, or from what lies beside the backups."""

from __future__ import annotations

import datetime as dt
import socket
from collections.abc import Iterable, Sequence

import msgspec

from backhaul.formats.config import Config
from backhaul.formats.quantities import format_duration
from backhaul.jobs import published
from backhaul.jobs.config import card_of
from backhaul.jobs.history import History, died, is_stale, undelivered
from backhaul.jobs.holds import Holds
from backhaul.model import job as jobs
from backhaul.model.job import Hold, JobCard, RunRecord
from backhaul.model.verdict import BAD, STATES, Overview, Verdict
from backhaul.planning.verdicts import judge

# What was run by ``exec`` is shown for so long after its last run.
_EXEC_SHOWN = dt.timedelta(days=30)
# Somebody waits for the answer, or a monitor that gives up after ten seconds.
PATIENCE = 6.0
# The mark of when a timer's call last looked, and how long ago that may be: they do so every ten minutes.
LOOKED = "looked"
UNATTENDED = dt.timedelta(hours=2)


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
        msgspec.structs.replace(card, known_since=history.known_since(card))
        for card in map(card_of, config.jobs.values())
    ]
    # (What ``exec`` once ran under the name of a job that came later is not that job's.)
    runs = {card.name: [run for run in history.runs(card.name) if run.trigger != jobs.EXEC] for card in cards}
    for name in history.names():
        # Of what a config no longer has nothing is expected; what ``exec`` ran lately has nothing but its records.
        if name not in runs and (card := _exec_card(name, history, now)) is not None:
            cards.append(card)
            runs[name] = history.runs(name)
    problems: list[str] = []
    verdicts = []
    for card in cards:
        if not names or card.name in names:
            verdicts += _judged(card, runs[card.name], held, now, _proved(card, cards, runs), problems)
    bad = {verdict.card.name for verdict in verdicts if verdict.state in BAD}
    return Overview(
        host=socket.gethostname(),
        at=now.astimezone().isoformat(timespec="seconds"),
        verdicts=_sorted(verdicts),
        problems=(*_unattended(cards, history, now), *history.problems, *holds.problems, *problems),
        looked=history.mark(LOOKED),
        # Of a job that is well again, or no more, there is nothing to hear of any more.
        undelivered=tuple(each for each in undelivered(history.deliveries(200)) if not each.job or each.job in bad),
    )


def _unattended(cards: Sequence[JobCard], history: History, now: dt.datetime) -> list[str]:
    """Say that nothing begins the jobs here, if nothing has looked for long."""
    scheduled = [card.name for card in cards if card.window is not None]
    looked = history.mark(LOOKED)
    if not scheduled or (looked and now - dt.datetime.fromisoformat(looked) < UNATTENDED):
        return []
    since = f"for {format_duration((now - dt.datetime.fromisoformat(looked)).total_seconds())}" if looked else "yet"
    return [f"nothing on this host has looked {since} what is to begin: backhaul schedule show, schedule install"]


def _judged(
    card: JobCard,
    runs: Sequence[RunRecord],
    holds: Sequence[Hold],
    now: dt.datetime,
    proved: dt.datetime | None,
    problems: list[str],
) -> list[Verdict]:
    """Judge one job; what can't be judged is a problem, and no reason to say nothing of the others."""
    try:
        return [judge(card, runs, holds, now, proved=proved)]
    except Exception as error:  # noqa: BLE001 - a record that leads to a fault must not silence all jobs
        problems.append(f"{card.name} can't be judged: {type(error).__name__}: {error}")
        return []


def overview_of_store(place: str, now: dt.datetime) -> Overview:
    """Judge the jobs whose records lie in a store, of whatever host.

    Raises:
        BackhaulError: the store could not be asked.
    """
    problems: list[str] = []
    found = published.read_published(place, patience=PATIENCE, on_problem=problems.append)
    # A job with several places has records in each: what is missing in one, since it was away, another has.
    cards: dict[tuple[str, str], tuple[float, JobCard]] = {}
    runs: dict[tuple[str, str], dict[str, RunRecord]] = {}
    for each in found:
        key = (each.card.host, each.card.name)
        newest = max((dt.datetime.fromisoformat(run.started).timestamp() for run in each.runs), default=0.0)
        if key not in cards or newest >= cards[key][0]:
            cards[key] = (newest, each.card)
        for run in each.runs:
            known = runs.setdefault(key, {}).get(run.id)
            if known is None or known.state == jobs.RUNNING:
                runs[key][run.id] = run
    verdicts = []
    for (host, name), (_, card) in cards.items():
        if card.retired:
            continue
        own = [other for (of, _), (_, other) in cards.items() if of == host]
        by_name = {of: _settled(records.values(), now) for (at, of), records in runs.items() if at == host}
        verdicts += _judged(card, by_name.get(name, []), (), now, _proved(card, own, by_name), problems)
    return Overview(
        host=place,
        at=now.astimezone().isoformat(timespec="seconds"),
        verdicts=_sorted(verdicts),
        problems=tuple(problems),
    )


def _settled(runs: Iterable[RunRecord], now: dt.datetime) -> list[RunRecord]:
    """Return runs of another host: one that has not said for long that it goes on has died."""
    return [died(run) if run.state == jobs.RUNNING and is_stale(run, now) else run for run in runs]


def _sorted(verdicts: Iterable[Verdict]) -> tuple[Verdict, ...]:
    # Of the same state those first of which something is expected.
    return tuple(
        sorted(
            verdicts,
            key=lambda verdict: (STATES.index(verdict.state), not verdict.card.known_since, verdict.card.name),
        )
    )


def _exec_card(name: str, history: History, now: dt.datetime) -> JobCard | None:
    """Return the card of what ``exec`` ran lately under a name that was given to it; None for what nobody named."""
    last = next(iter(history.runs(name, 1)), None)
    if last is None or not last.watched or now - dt.datetime.fromisoformat(last.started) > _EXEC_SHOWN:
        return None
    return history.card(name) or JobCard(name=name, host=last.host, kind=last.kind, what=name)


def _proved(card: JobCard, cards: Sequence[JobCard], runs: dict[str, list[RunRecord]]) -> dt.datetime | None:
    """Return when a backup of a job was last proved: by its own record, or by a drill of one of its places."""
    places = {place.partition("@")[0] for place in card.places}
    times = [run.proved_at for run in runs.get(card.name, ())]
    for other in cards:
        if other.kind == jobs.DRILL and places & {place.partition("@")[0] for place in other.places}:
            times += [run.proved_at for run in runs.get(other.name, ())]
    return max((dt.datetime.fromisoformat(time) for time in times if time), default=None)
