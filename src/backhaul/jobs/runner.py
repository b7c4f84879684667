"""One run of a job, from the decision to begin to the record of its end.

The order: the lock of the job; whether it may begin now; the record that it began; its programs, watched; the record
of how it ended, here and beside the backups; who is told. What can't be recorded is said, and never stops the job: the
backup is what counts.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import queue
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import msgspec

from backhaul.errors import BackhaulError, ConfigurationError, InterruptedByUserError
from backhaul.formats import run_record
from backhaul.formats.quantities import format_duration
from backhaul.formats.redaction import redact_text
from backhaul.jobs import published
from backhaul.jobs.history import HEARTBEAT, History, volatile_directory
from backhaul.jobs.holds import Holds
from backhaul.jobs.log import RunLog
from backhaul.jobs.stages import Stages, described, exit_status
from backhaul.model import job as jobs
from backhaul.model.job import Job, JobCard, RunRecord, StageRecord
from backhaul.model.schedule import ABORT, STOP_NEW, Occurrence
from backhaul.model.secret import Secret
from backhaul.operations import handover
from backhaul.operations.handover import Handed
from backhaul.operations.locks import is_locked, locked
from backhaul.operations.secrets import resolve
from backhaul.planning.dispatch import Decision, decide, held_words, hold_on
from backhaul.planning.forecast import forecast_end, late_by, usual_seconds, usual_size
from backhaul.planning.verdicts import past_window
from backhaul.processes.identity import this_process

JOB_VARIABLE = "BACKHAUL_JOB"
_LOOK = 1.0
_LOOK_AT_HOLDS = 5.0
_NOTE_EVERY = 10.0
# A forecast is said again when it has moved by so many seconds.
_MOVED = 600.0
# The record that a run began is for others; its own work does not wait for it.
_PATIENCE_BEGIN, _PATIENCE_END, _PATIENCE_ALL = 10.0, 60.0, 180.0
_COMPLETE, _INCOMPLETE, _SKIPPED, _INTERRUPTED = 0, 3, 75, 130
# What ended a run that did not end by itself.
_LIMIT, _CLOSED, _USER = "limit", "closed", "user"

Echo = Callable[[bytes, bytes], None]
Tell = Callable[[Job, RunRecord], None]


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


class Runner:
    """Runs jobs on this host.

    Args:
        history, holds: of this host.
        echo: given each stamped line of the log, and its tag; None for nothing.
        ready: tells whether ``echo`` can take more.
        ping: told of each beginning and end: the job and its record.
        tell: told of each end, after all is recorded: alerts come of it.
        publishes: whether records go to the stores, too.
        now: the clock of records and windows (aware).
        clock: monotonic seconds.
        sleep: waits so many seconds.
        attempt: starts the programs once, and waits for them. (Simulations put another one in its place.)
    """

    def __init__(
        self,
        history: History,
        holds: Holds,
        *,
        echo: Echo | None = None,
        ready: Callable[[], bool] = lambda: True,
        ping: Tell = lambda job, record: None,
        tell: Tell = lambda job, record: None,
        publishes: bool = True,
        now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        attempt: Callable[[Run, Mapping[str, str]], Attempt] | None = None,
    ) -> None:
        self.history = history
        self.holds = holds
        self.echo = echo
        self.ready = ready
        self.now = now
        self.clock = clock
        self.sleep = sleep
        self.problems: list[str] = []
        self._ping = ping
        self._tell = tell
        self._publishes = publishes
        self._attempt = attempt or run_programs

    def run(
        self,
        job: Job,
        *,
        trigger: str = jobs.BY_HAND,
        at_once: bool = False,
        despite_hold: bool = False,
        inherit_input: bool = False,
    ) -> RunRecord:
        """Run a job, if it may begin now; return the record of how it ended, or that it was skipped.

        Args:
            job: what to run.
            trigger: ``scheduled`` runs once in each opening of its window.
            at_once: also outside the window.
            despite_hold: also while it is held.
            inherit_input: whether its first program reads this process's stdin.

        Raises:
            LockBusyError: another run of it is at work, or another program holds its lock.
            ConfigurationError: no lock can be taken at all.
            InterruptedByUserError: a signal ended it; that is recorded.
        """
        card = job.card
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._job_lock(card.name))
            # The stores that the records go to are found, and opened, as the job's own programs do.
            problem: ConfigurationError | None = None
            secrets: list[str] = []
            try:
                secrets = stack.enter_context(_environment_of(job))
            except ConfigurationError as error:
                problem = error  # a run that fails, and is recorded and told like any other
            runs = self._runs(card)
            holds = self.holds.all()
            decision = decide(
                card, runs, holds, self.now(), trigger=trigger, at_once=at_once, despite_hold=despite_hold
            )
            if not decision.begin:
                return self._skipped(card, decision, runs, trigger)
            if job.lock is not None:
                stack.enter_context(locked(job.lock, "Correct its lock in the config."))
            overridden = {hold.id for hold in self.holds.in_force()} if despite_hold else set()
            run = Run(self, job, runs, decision.occurrence, trigger, inherit_input=inherit_input)
            run.secrets = secrets
            run.problem = problem
            run.overridden = frozenset(overridden)
            # Looked at again, now that everybody can see that it runs: a hold that was set meanwhile waits for it, or
            # it gives way.
            self.history.save(run.record)
            late = None if despite_hold else hold_on(card.name, self.holds.in_force(), self.now())
            if late is not None:
                gone = Decision(False, decision.occurrence, held_words(late, card), late)
                record = msgspec.structs.replace(
                    self._skipped(card, gone, runs, trigger, save=False), id=run.record.id, started=run.record.started
                )
                self.history.save(record)
                return record
            return run.go(self._attempt)

    def publish(self, card: JobCard, record: RunRecord, patience: float) -> list[str]:
        """Put a record beside the backups; return what went wrong."""
        found = []
        for place in card.places if self._publishes else ():
            try:
                published.publish(place, card, record, patience=patience)
            except BackhaulError as error:
                why = (error.why or error.what).splitlines()[0]
                found.append(f"its record could not be put into {redact_text(place)}: {why}")
        return found

    def ping(self, job: Job, record: RunRecord) -> None:
        """Tell those that hear of each beginning and end."""
        with self._never_in_the_way("a ping"):
            self._ping(job, record)

    def conclude(self, job: Job, record: RunRecord) -> None:
        """Do what follows the end of a run: old records go, and people are told."""
        self.history.forget_old(job.card.name, job.keep_runs)
        if self._publishes:
            for place in job.card.places:
                with contextlib.suppress(BackhaulError):
                    published.forget_old(place, job.card, patience=_PATIENCE_BEGIN)
        self.ping(job, record)
        with self._never_in_the_way("an alert"):
            self._tell(job, record)

    @contextlib.contextmanager
    def _never_in_the_way(self, what: str) -> Iterator[None]:
        try:
            yield
        except BackhaulError as error:
            self.problems.append(f"{what}: {error.what}: {error.why}")
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a channel, the run is over and recorded
            self.problems.append(f"{what}: {type(error).__name__}: {redact_text(str(error))}")

    def _runs(self, card: JobCard) -> list[RunRecord]:
        """Return the job's records; a host that lost its own takes those that lie beside the backups."""
        runs = self.history.runs(card.name)
        if not runs and self._publishes:
            for place in card.places:
                with contextlib.suppress(BackhaulError):
                    self.history.take_in(published.read_own(place, card, patience=_PATIENCE_BEGIN))
            runs = self.history.runs(card.name)
        return runs

    def _skipped(
        self, card: JobCard, decision: Decision, runs: list[RunRecord], trigger: str, *, save: bool = True
    ) -> RunRecord:
        now = self.now()
        record = RunRecord(
            format=run_record.FORMAT,
            version=run_record.VERSION,
            id=run_record.run_id(now, secrets.randbits(16)),
            job=card.name,
            kind=card.kind,
            host=card.host,
            trigger=trigger,
            started=local(now),
            finished=decision.hold.until if decision.hold is not None else "",
            state=jobs.SKIPPED,
            occurrence=decision.occurrence.id if decision.occurrence is not None else "",
            why=decision.why,
            exit_status=_SKIPPED,
        )
        # Kept once for each opening and hold: it tells that nobody forgot this run.
        same = (record.occurrence, record.finished)
        known = any(run.state == jobs.SKIPPED and (run.occurrence, run.finished) == same for run in runs)
        wanted = save and trigger == jobs.SCHEDULED and decision.hold is not None and decision.occurrence is not None
        if wanted and not known:
            self.history.save(record)
            self.publish(card, record, _PATIENCE_BEGIN)
        return record

    @contextlib.contextmanager
    def _job_lock(self, name: str) -> Iterator[None]:
        """Hold the lock of a job; where its file can't be made, one that needs no disk."""
        path = lock_path(self.history, name)
        what = f"The job {name}"
        with contextlib.ExitStack() as stack:
            try:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                stack.enter_context(locked(str(path), what=what))
            except (OSError, ConfigurationError) as error:
                self.problems.append(f"the lock of {name} can't be kept in {path.parent}: {error}")
                there = volatile_directory()
                with contextlib.suppress(OSError):
                    there.mkdir(mode=0o700, parents=True, exist_ok=True)
                stack.enter_context(locked(str(there / f"{name}.lock"), what=what))
            yield


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
        card = job.card
        self.record = RunRecord(
            format=run_record.FORMAT,
            version=run_record.VERSION,
            id=run_record.run_id(start, secrets.randbits(16)),
            job=card.name,
            kind=card.kind,
            host=card.host,
            trigger=trigger,
            occurrence=occurrence.id if occurrence is not None else "",
            started=local(start),
            state=jobs.RUNNING,
            closes=occurrence.closes.isoformat() if occurrence is not None else "",
            pid=pid,
            boot=boot,
        )
        self._start = start
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
            self._publisher.put(self.record, _PATIENCE_BEGIN)
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
            # The end is recorded here by now, or nearly: whoever can't wait for the rest may have it so.
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
            return _LIMIT
        closes = self.closes_in()
        return _CLOSED if closes is not None and closes <= 0 and self._at_end() == ABORT else ""

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
        fields: dict[str, Any] = {"stages": last.stages, "exit_status": status, **_figures(last.handed)}
        mirror = self.job.card.kind == jobs.MIRROR
        if last.ended_by == _LIMIT:
            allowed = format_duration(self.job.time_limit or 0.0)
            return {
                **fields,
                "state": jobs.FAILED,
                "why": f"it took longer than {allowed} and was ended",
                "exit_status": 1,
            }
        if last.ended_by == _CLOSED:
            state = jobs.STOPPED if mirror else jobs.FAILED
            return {**fields, "state": state, "why": "its window closed, and it was ended", "exit_status": 1}
        if status == _COMPLETE:
            return {**fields, "state": jobs.OK, "why": ""}
        if self.job.own and status == _INCOMPLETE:
            return {**fields, "state": jobs.INCOMPLETE, "why": why}
        if self.job.own and status == _SKIPPED:
            words = f"{last.stop_words}: {why}" if last.stop_words else why
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
        if self._wants_proof() and self.record.state in (jobs.OK, jobs.INCOMPLETE):
            self.record = msgspec.structs.replace(self.record, proved_at=_newest_proof(self.job.card.places) or "")
        problems = self._publisher.finish(self.record)
        if not kept:
            problems.append("it could not be recorded on this host's disk")
            runner.problems.append(f"the run {self.record.id} of {self.record.job} could not be recorded on disk")
        self.record = msgspec.structs.replace(self.record, remarks=(*self._remarks, *problems))
        self._save()

    def _save(self) -> bool:
        return self.runner.history.save(self.record)

    def _wants_proof(self) -> bool:
        return self.job.card.kind == jobs.PUSH and self.job.card.expectations.max_drill_age is not None


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
                    run.say("its time is over: it is ended" if ended_by == _LIMIT else "its window closed: it is ended")
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


class _Publisher:
    """Puts the records of one run beside the backups, in their order: an end is never overtaken by its beginning."""

    def __init__(self, runner: Runner, card: JobCard) -> None:
        self._runner = runner
        self._card = card
        self._queue: queue.SimpleQueue[tuple[RunRecord, float] | None] = queue.SimpleQueue()
        self._problems: list[str] = []
        self._beaten = runner.clock()
        self._thread = threading.Thread(target=self._work, name="backhaul-publish", daemon=True)
        self._thread.start()

    def put(self, record: RunRecord, patience: float) -> None:
        """Have a record put, and don't wait for it."""
        self._queue.put((record, patience))

    def beat(self, record: RunRecord, clock: float) -> None:
        """Say now and then that the run goes on."""
        if clock - self._beaten >= HEARTBEAT:
            self._beaten = clock
            self.put(record, _PATIENCE_BEGIN)

    def finish(self, record: RunRecord) -> list[str]:
        """Put the last record, wait for it, and return what went wrong with that one."""
        self.put(record, _PATIENCE_END)
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


@contextlib.contextmanager
def _environment_of(job: Job) -> Iterator[list[str]]:
    """Have the job's variables in this process's environment for the block; yield those that are secret.

    Raises:
        ConfigurationError: a secret can't be had.
    """
    before: dict[str, str | None] = {name: os.environ.get(name) for name in job.environment}
    secrets_ = []
    try:
        for name, value in job.environment.items():
            text = str(value)
            if isinstance(value, Secret):
                text = resolve(value, f"the variable {name} of the job {job.card.name}")
                secrets_.append(text)
            os.environ[name] = text
        yield secrets_
    finally:
        for name, old in before.items():
            if old is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = old


def lock_path(history: History, job: str) -> Path:
    """Return the file that is locked while a job runs."""
    return history.directory / "locks" / f"{job}.lock"


def local(time_: dt.datetime) -> str:
    """Write a time as records have it: ISO, to the second, with the zone of this host."""
    return zoned(time_).isoformat(timespec="seconds")


def zoned(time_: dt.datetime) -> dt.datetime:
    """Return a time in the zone of this host."""
    return time_.astimezone()


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


def _figures(handed: tuple[Handed, ...]) -> dict[str, Any]:
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


def _newest_proof(places: tuple[str, ...]) -> str | None:
    """Return when a backup in one of these series was last proved (ISO, UTC); None for never, or not known."""
    from backhaul.operations.inspect import list_backups

    found = []
    for place in places:
        with contextlib.suppress(BackhaulError):
            found += [each.drilled for each in list_backups(place).backups if each.drill == "proved" and each.drilled]
    return max(found, default=None)


def is_running(history: History, job: str) -> bool:
    """Tell whether a run of a job is at work: whether its lock is held."""
    return is_locked(str(lock_path(history, job))) or is_locked(str(volatile_directory() / f"{job}.lock"))


def running_now(history: History, job: str) -> RunRecord | None:
    """Return the run of a job that is at work; None for none."""
    return next((run for run in history.runs(job, 5) if run.state == jobs.RUNNING), None)
