"""The programs of a run, started once and watched; and what Backhaul's own among them say that they did."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from backhaul.jobs.stages import Stages
from backhaul.model import job as jobs
from backhaul.model.job import Job, StageRecord
from backhaul.operations import handover
from backhaul.operations.handover import Handed

if TYPE_CHECKING:
    from backhaul.jobs.run import Run

# What ended a run that did not end by itself.
LIMIT, CLOSED = "limit", "closed"
_LOOK = 1.0
_LOOK_AT_HOLDS = 5.0
_NOTE_EVERY = 10.0


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """What came of starting a job's programs once.

    Attributes:
        stages: how each ended.
        handed: what Backhaul's own among them said.
        ended_by: what ended them, if they did not end by themselves.
        stop_words: why they were asked to end after their part; empty if they were not.
    """

    stages: tuple[StageRecord, ...] = ()
    handed: tuple[Handed, ...] = ()
    ended_by: str = ""
    stop_words: str = ""


def run_programs(run: Run, environment: Mapping[str, str]) -> Attempt:
    """Start a run's programs once, watch them, and return how they ended.

    Raises:
        ConfigurationError: this host can start no process at all.
        KeyboardInterrupt: a signal came; the programs were ended.
    """
    assert run.log is not None
    # In memory: a disk that is full must not keep a job from telling, or from running at all.
    with os.fdopen(os.memfd_create("backhaul-run", os.MFD_CLOEXEC), "rb") as file:
        told = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        stages = Stages(
            run.job.stages,
            {**environment, handover.VARIABLE: told},
            run.log.write,
            ready=run.runner.ready,
            inherit_input=run.inherit_input,
        )
        ended_by = stop_words = ""
        looked = noted = run.runner.clock()
        try:
            while not stages.poll(_LOOK):
                if ended_by := run.must_end():
                    run.say("its time is over: it is ended" if ended_by == LIMIT else "its window closed: it is ended")
                    stages.end()
                    break
                now = run.runner.clock()
                if now - looked >= _LOOK_AT_HOLDS and not stop_words:
                    looked = now
                    stop_words = run.stop_words()
                    if stop_words:
                        run.say(f"{stop_words}: {_stops(run.job)}")
                        if run.job.own and run.job.card.kind == jobs.MIRROR:
                            stages.send_signal(handover.STOP_SIGNAL)
                if now - noted >= _NOTE_EVERY:
                    noted = now
                    done, total = _latest_progress(told)
                    run.progress(done, total)
            ended = stages.finish()
        except BaseException:
            _end_in_peace(stages)
            raise
        return Attempt(stages=ended, handed=tuple(_handed(told)), ended_by=ended_by, stop_words=stop_words)


def _stops(job: Job) -> str:
    if job.own and job.card.kind == jobs.MIRROR:
        return "what was begun is finished, and nothing more is begun"
    return "it can't stop halfway, and goes on to its end"


def _end_in_peace(stages: Stages) -> None:
    """End the programs though signals keep coming: the second one of a terminal's must not leave them alone."""
    old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    main = threading.current_thread() is threading.main_thread()
    with contextlib.suppress(KeyboardInterrupt):
        if main:
            for number in old:
                signal.signal(number, signal.SIG_IGN)
        stages.end()
    stages.kill()
    if main:
        for number, handler in old.items():
            signal.signal(number, handler)


def _handed(path: str) -> list[Handed]:
    try:
        return list(handover.read_handed(Path(path).read_bytes()))
    except OSError:
        return []


def _latest_progress(path: str) -> tuple[int, int]:
    latest = next((line for line in reversed(_handed(path)) if line.kind == handover.PROGRESS), None)
    return (latest.done, latest.total) if latest is not None else (0, 0)


def figures(handed: tuple[Handed, ...]) -> dict[str, Any]:
    """Return what the commands of a run said they did, as fields of its record."""
    backups: list[str] = []
    raw = stored = removed = 0
    proved: bool | None = None
    proved_at = ""
    for line in handed:
        document = line.document
        if line.kind != handover.RESULT:
            continue
        if line.verb == "push":
            backups.append(str(document.get("id", "")))
            raw += _number(document, "raw_size")
            stored += _number(document, "stored_size")
        elif line.verb == "sync":
            raw += sum(_number(document.get(part), "bytes") for part in ("kept", "sent", "renamed", "composed"))
            stored += _number(document, "sent_bytes")
        elif line.verb == "drill":
            found = document.get("record", {})
            proved = found.get("result") == "proved"
            raw += _number(found, "raw_size")
            proved_at = str(found.get("started", "")) if proved else proved_at
        elif line.verb == "prune":
            removed += sum(len(series.get("removed", ())) for series in document.get("series", ()))
    return {
        "backups": tuple(backups),
        "raw_size": raw,
        "stored_size": stored,
        "removed": removed,
        "proved": proved,
        "proved_at": proved_at,
    }


def _number(document: Any, key: str) -> int:
    value = document.get(key) if isinstance(document, dict) else None
    return value if isinstance(value, int) else 0
