"""One run of a job that begins: its attempts, its forecast, its end, and the records of it."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import queue
import secrets
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import msgspec

from backhaul.errors import BackhaulError, ConfigurationError, InterruptedByUserError
from backhaul.formats import run_record
from backhaul.formats.quantities import format_duration
from backhaul.formats.redaction import redact_text
from backhaul.jobs.history import HEARTBEAT
from backhaul.jobs.log import RunLog
from backhaul.jobs.programs import CLOSED, LIMIT, Attempt, figures
from backhaul.jobs.stages import described, exit_status
from backhaul.model import job as jobs
from backhaul.model.job import Job, JobCard, RunRecord
from backhaul.model.schedule import ABORT, STOP_NEW, Occurrence
from backhaul.operations import handover
from backhaul.planning.dispatch import held_words, hold_on
from backhaul.planning.forecast import forecast_end, late_by, usual_seconds, usual_size
from backhaul.planning.verdicts import past_window
from backhaul.processes.identity import this_process

if TYPE_CHECKING:
    from backhaul.jobs.runner import Runner

JOB_VARIABLE = "BACKHAUL_JOB"
_LOOK_AT_HOLDS = 5.0
# A forecast is said again when it has moved by so many seconds.
_MOVED = 600.0
# The record that a run began is for others; its own work does not wait for it.
PATIENCE_BEGIN, PATIENCE_END, _PATIENCE_ALL = 10.0, 60.0, 180.0
_COMPLETE, _INCOMPLETE, _SKIPPED, _INTERRUPTED = 0, 3, 75, 130


class Run:
    """A run that begins. ``log``, ``job`` and ``record`` are for whoever runs its programs."""

    def __init__(
        self,
        runner: Runner,
        job: Job,
        runs: list[RunRecord],
        occurrence: Occurrence | None,
        trigger: str,
        *,
        inherit_input: bool,
    ) -> None:
        self.runner = runner
        self.job = job
        self.inherit_input = inherit_input
        self.occurrence = occurrence
        self._runs = runs
        self._began = runner.clock()
        start = runner.now()
        pid, boot = this_process()
        self.record = msgspec.structs.replace(
            new_record(job.card, trigger, start, occurrence),
            watched=job.watched,
            state=jobs.RUNNING,
            closes=occurrence.closes.isoformat() if occurrence is not None else "",
            pid=pid,
            boot=boot,
        )
        self._said_forecast: dt.datetime | None = None
        self._remarks: list[str] = []
        self.log: RunLog | None = None
        self.secrets: list[str] = []
        self.problem: ConfigurationError | None = None
        self.overridden: frozenset[str] = frozenset()
        self._publisher = _Publisher(runner, job.card)

    def go(self, attempt: Callable[[Run, Mapping[str, str]], Attempt]) -> RunRecord:
        """Run it to its end."""
        runner, job = self.runner, self.job
        runner.history.save(self.record)
        path = runner.history.log_path(job.card.name, self.record.id)
        interrupt: KeyboardInterrupt | None = None
        try:
            self._publisher.put(self.record, PATIENCE_BEGIN)
            runner.ping(job, self.record)
            if self.problem is not None:
                raise self.problem
            self.log = RunLog(
                path, job.log_size, echo=runner.echo, secrets=self.secrets, now=lambda: zoned(runner.now())
            )
            self._say_forecast(self.forecast(0, 0), "before")
            final = self._judged(self._attempts(attempt, {**os.environ, JOB_VARIABLE: job.card.name}))
        except KeyboardInterrupt as error:
            interrupt = error
            name = str(error) or "SIGINT"
            final = {"state": jobs.INTERRUPTED, "why": f"it was ended by {name}", "exit_status": _INTERRUPTED}
        except BackhaulError as error:
            final = {"state": jobs.FAILED, "why": f"{error.what}: {error.why}", "exit_status": error.exit_code}
        except Exception as error:  # noqa: BLE001 - a fault of Backhaul's own is recorded, and told, like any other
            why = f"a fault of Backhaul: {type(error).__name__}: {redact_text(str(error))}"
            final = {"state": jobs.FAILED, "why": why, "exit_status": 1}
        try:
            self._ended(final)
            runner.conclude(job, self.record)
        except KeyboardInterrupt:
            # Whoever can't wait for the rest may have it so: the end is recorded here.
            if self.record.state == jobs.RUNNING:
                words = {name: final[name] for name in ("state", "why", "exit_status")}
                self.record = msgspec.structs.replace(self.record, **words, finished=local(runner.now()))
            self._save()
        if interrupt is not None:
            raise InterruptedByUserError(
                f"The job {job.card.name} was interrupted", self.record.why, f"See: backhaul log {job.card.name}"
            ) from interrupt
        return self.record

    # -- its programs ----------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Write a line of Backhaul's own into the log."""
        if self.log is not None:
            self.log.say(text)

    def elapsed(self) -> float:
        """Return seconds since it began."""
        return self.runner.clock() - self._began

    def closes_in(self) -> float | None:
        """Return seconds until its window closes; None without one."""
        if self.occurrence is None:
            return None
        return (self.occurrence.closes - self.runner.now()).total_seconds()

    def stop_words(self) -> str:
        """Say why it should end after its part now; empty for no reason."""
        closes = self.closes_in()
        if closes is not None and closes <= 0 and self._at_end() == STOP_NEW:
            return "its window closed"
        new = [hold for hold in self.runner.holds.in_force() if hold.id not in self.overridden]
        hold = hold_on(self.job.card.name, new, self.runner.now())
        return held_words(hold, self.job.card) if hold is not None else ""

    def must_end(self) -> str:
        """Say what ends it now, if something does."""
        if self.job.time_limit is not None and self.elapsed() >= self.job.time_limit:
            return LIMIT
        closes = self.closes_in()
        return CLOSED if closes is not None and closes <= 0 and self._at_end() == ABORT else ""

    def progress(self, done: int, total: int) -> None:
        """Note how far it is, and say when it will have ended if that is past the window."""
        end = self.forecast(done, total)
        self._say_forecast(end, "during")
        self.record = msgspec.structs.replace(
            self.record,
            done=done,
            total=total,
            seconds=self.elapsed(),
            forecast=end.isoformat(timespec="seconds") if end is not None else "",
            seen=self.runner.now().astimezone(dt.UTC).isoformat(timespec="seconds"),
        )
        self.runner.history.note_progress(self.record)
        self._publisher.beat(self.record, self.runner.clock())

    def forecast(self, done: int, total: float) -> dt.datetime | None:
        """Return when it will have ended, for all that is known; None where nothing is."""
        if done and not total:
            total = usual_size(self._runs) or 0.0
        return forecast_end(self.runner.now(), self.elapsed(), done=done, total=total, usual=usual_seconds(self._runs))

    def _at_end(self) -> str:
        return self.job.card.window.at_end if self.job.card.window is not None else ""

    def _say_forecast(self, end: dt.datetime | None, when: str) -> None:
        if end is None or self.occurrence is None:
            return
        late = late_by(end, self.occurrence.closes)
        moved = self._said_forecast is None or abs((end - self._said_forecast).total_seconds()) > _MOVED
        if late and moved:
            words = "with what it usually takes it will end" if when == "before" else "at this rate it ends"
            self.say(f"forecast: {past_window(self._clock(end), late, words)}")
            self._said_forecast = end

    def _clock(self, time_: dt.datetime) -> str:
        zone = ZoneInfo(self.job.card.window.timezone) if self.job.card.window is not None else None
        return f"{time_.astimezone(zone):%H:%M}"

    def _attempts(self, attempt: Callable[[Run, Mapping[str, str]], Attempt], environment: dict[str, str]) -> Attempt:
        number = 0
        while True:
            number += 1
            self.record = msgspec.structs.replace(self.record, attempts=number)
            if number > 1:
                self.say(f"attempt {number} of {self.job.retries + 1}")
            last = attempt(self, environment)
            state = self._judged(last)["state"]
            if state != jobs.FAILED or last.ended_by or number > self.job.retries:
                return last
            pause = self.job.backoff * 2 ** (number - 1)
            self.say(f"{self._judged(last)['why']}; it is tried again in {format_duration(pause)}")
            if not self._pause(pause):
                self.say("it is not tried again: its time is over, or it is held")
                return last

    def _pause(self, seconds: float) -> bool:
        """Wait; tell whether it may be tried again then."""
        end = self.runner.clock() + seconds
        while True:
            closes = self.closes_in()
            if self.stop_words() or self.must_end() or (closes is not None and closes <= 0):
                return False
            left = end - self.runner.clock()
            if left <= 0:
                return True
            self.runner.sleep(min(left, _LOOK_AT_HOLDS))

    # -- its end ---------------------------------------------------------------------------------------

    def _judged(self, last: Attempt) -> dict[str, Any]:
        """Return what an attempt amounts to, as fields of the record."""
        status = exit_status(last.stages)
        error = next((line.document for line in reversed(last.handed) if line.kind == handover.ERROR), None)
        why = described(last.stages)
        if error is not None and self.job.own:
            first = str(error.get("why", "")).splitlines()
            why = f"{error.get('what', '')}" + (f": {first[0]}" if first else "")
        fields: dict[str, Any] = {"stages": last.stages, "exit_status": status, **figures(last.handed)}
        mirror = self.job.card.kind == jobs.MIRROR
        if last.ended_by == LIMIT:
            allowed = format_duration(self.job.time_limit or 0.0)
            return {
                **fields,
                "state": jobs.FAILED,
                "why": f"it took longer than {allowed} and was ended",
                "exit_status": 1,
            }
        if last.ended_by == CLOSED:
            state = jobs.STOPPED if mirror else jobs.FAILED
            return {**fields, "state": state, "why": "its window closed, and it was ended", "exit_status": 1}
        if status == _COMPLETE:
            return {**fields, "state": jobs.OK, "why": ""}
        if self.job.own and status == _INCOMPLETE:
            return {**fields, "state": jobs.INCOMPLETE, "why": why}
        if self.job.own and status == _SKIPPED:
            left = str(error.get("why", "")).splitlines()[0] if error is not None and error.get("why") else ""
            words = "; ".join(part for part in (last.stop_words, left) if part) if last.stop_words else why
            return {**fields, "state": jobs.STOPPED, "why": words}
        return {**fields, "state": jobs.FAILED, "why": why}

    def _ended(self, final: dict[str, Any]) -> None:
        runner = self.runner
        if final["state"] != jobs.OK:
            self.say(f"{final['state']}: {final['why']}")
        if self.log is not None:
            self.log.close()
            final = {
                **final,
                "lines": self.log.lines,
                "log_size": self.log.bytes,
                "cut": self.log.cut,
                "last_words": redact_text(self.log.last_words),
            }
            if self.log.problem:
                self._remarks.append(self.log.problem)
        if self.log is not None:
            final["why"] = self.log.masked(str(final["why"]))
        self.record = msgspec.structs.replace(
            self.record,
            **final,
            finished=local(runner.now()),
            seconds=round(self.elapsed(), 3),
            forecast="",
            seen="",
            remarks=tuple(self._remarks),
        )
        # Here first: a signal, or the end of all patience, finds it recorded. Then beside the backups, and what came
        # of that here again.
        kept = self._save()
        # People first: a store that is away keeps its record waiting, and may be what they must hear of.
        runner.tell(self.job, self.record)
        if self._wants_proof() and self.record.state in (jobs.OK, jobs.INCOMPLETE):
            self.record = msgspec.structs.replace(self.record, proved_at=_newest_proof(self.job.card.places) or "")
        good = self.record.state in (jobs.OK, jobs.INCOMPLETE, jobs.STOPPED)
        problems = self._publisher.finish(self.record, PATIENCE_END if good else PATIENCE_BEGIN)
        if not kept:
            problems.append("it could not be recorded on this host's disk")
            runner.problems.append(f"the run {self.record.id} of {self.record.job} could not be recorded on disk")
        self.record = msgspec.structs.replace(self.record, remarks=(*self._remarks, *problems))
        self._save()

    def _save(self) -> bool:
        return self.runner.history.save(self.record)

    def _wants_proof(self) -> bool:
        return self.job.card.kind == jobs.PUSH and self.job.card.expectations.max_drill_age is not None


class _Publisher:
    """Puts the records of one run beside the backups, in their order: an end is never overtaken by its beginning."""

    def __init__(self, runner: Runner, card: JobCard) -> None:
        self._runner = runner
        self._card = card
        self._queue: queue.SimpleQueue[tuple[RunRecord, float] | None] = queue.SimpleQueue()
        self._problems: list[str] = []
        self._beaten = runner.clock()
        self._thread = threading.Thread(target=self._work, name="backhaul-publish", daemon=True)

    def put(self, record: RunRecord, patience: float) -> None:
        """Have a record put, and don't wait for it."""
        self._queue.put((record, patience))
        if not self._thread.ident:
            self._thread.start()

    def beat(self, record: RunRecord, clock: float) -> None:
        """Say now and then that the run goes on."""
        if clock - self._beaten >= HEARTBEAT:
            self._beaten = clock
            self.put(record, PATIENCE_BEGIN)

    def finish(self, record: RunRecord, patience: float) -> list[str]:
        """Put the last record, wait for it, and return what went wrong with that one."""
        self.put(record, patience)
        self._queue.put(None)
        self._thread.join(_PATIENCE_ALL)
        if self._thread.is_alive():
            return ["its record could not be put beside the backups in time"]
        return self._problems

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            record, patience = item
            try:
                self._problems = self._runner.publish(self._card, record, patience)
            except Exception as error:  # noqa: BLE001 - said with the run; it must not be the run's own end
                self._problems = [f"its record could not be put beside the backups: {redact_text(str(error))}"]


def new_record(card: JobCard, trigger: str, start: dt.datetime, occurrence: Occurrence | None) -> RunRecord:
    """Return the record of what is begun, or skipped, now."""
    return RunRecord(
        format=run_record.FORMAT,
        version=run_record.VERSION,
        id=run_record.run_id(start, secrets.randbits(16)),
        job=card.name,
        kind=card.kind,
        host=card.host,
        trigger=trigger,
        started=local(start),
        state=jobs.SKIPPED,
        occurrence=occurrence.id if occurrence is not None else "",
    )


def local(time_: dt.datetime) -> str:
    """Write a time as records have it: ISO, to the second, with the zone of this host."""
    return zoned(time_).isoformat(timespec="seconds")


def zoned(time_: dt.datetime) -> dt.datetime:
    """Return a time in the zone of this host."""
    return time_.astimezone()


def _newest_proof(places: tuple[str, ...]) -> str | None:
    """Return when a backup in one of these series was last proved (ISO, UTC); None for never, or not known."""
    from backhaul.operations.inspect import list_backups

    found = []
    for place in places:
        with contextlib.suppress(BackhaulError):
            found += [each.drilled for each in list_backups(place).backups if each.drill == "proved" and each.drilled]
    return max(found, default=None)
