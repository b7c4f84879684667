"""Whether a job runs now, and how it is run: under its lock, in its environment, recorded.

The order: the lock of the job; whether it may begin now; the record that it began; its programs, watched (``run``,
``programs``); the record of how it ended, here and beside the backups; who is told. What can't be recorded is said, and
never stops the job: the backup is what counts.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from backhaul.errors import BackhaulError, ConfigurationError
from backhaul.formats.redaction import redact_text
from backhaul.jobs import published
from backhaul.jobs.history import History, volatile_directory
from backhaul.jobs.holds import Holds
from backhaul.jobs.programs import Attempt, run_programs
from backhaul.jobs.run import PATIENCE_BEGIN, Run, new_record
from backhaul.model import job as jobs
from backhaul.model.job import Job, JobCard, RunRecord
from backhaul.model.secret import Secret
from backhaul.operations.locks import is_locked, locked
from backhaul.operations.secrets import resolve
from backhaul.planning.dispatch import Decision, decide, held_words, hold_on

_SKIPPED = 75

Echo = Callable[[bytes, bytes], None]
Tell = Callable[[Job, RunRecord], None]


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
            if job.alone:
                stack.enter_context(self._job_lock(card.name))
            # The stores that the records go to are found, and opened, as the job's own programs do.
            problem: ConfigurationError | None = None
            hidden: list[str] = []
            try:
                hidden = stack.enter_context(_environment_of(job))
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
            run.secrets = hidden
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

    def tell(self, job: Job, record: RunRecord) -> None:
        """Tell people, and those that hear of each end, what became of a run."""
        self.ping(job, record)
        with self._never_in_the_way("an alert"):
            self._tell(job, record)

    def conclude(self, job: Job, record: RunRecord) -> None:
        """Do what follows the end of a run: old records go."""
        self.history.forget_old(job.card.name, job.keep_runs)
        if self._publishes and record.state in (jobs.OK, jobs.INCOMPLETE):
            for place in job.card.places:
                with contextlib.suppress(BackhaulError):
                    published.forget_old(place, job.card, patience=PATIENCE_BEGIN)

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
                    self.history.take_in(published.read_own(place, card, patience=PATIENCE_BEGIN))
            runs = self.history.runs(card.name)
        return runs

    def _skipped(
        self, card: JobCard, decision: Decision, runs: list[RunRecord], trigger: str, *, save: bool = True
    ) -> RunRecord:
        record = msgspec.structs.replace(
            new_record(card, trigger, self.now(), decision.occurrence),
            finished=decision.hold.until if decision.hold is not None else "",
            why=decision.why,
            exit_status=_SKIPPED,
        )
        # Kept once for each opening and hold: it tells that nobody forgot this run.
        same = (record.occurrence, record.finished)
        known = any(run.state == jobs.SKIPPED and (run.occurrence, run.finished) == same for run in runs)
        wanted = save and trigger == jobs.SCHEDULED and decision.hold is not None and decision.occurrence is not None
        if wanted and not known:
            self.history.save(record)
            self.publish(card, record, PATIENCE_BEGIN)
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


def is_running(history: History, job: str) -> bool:
    """Tell whether a run of a job is at work: whether its lock is held."""
    return is_locked(str(lock_path(history, job))) or is_locked(str(volatile_directory() / f"{job}.lock"))


def running_now(history: History, job: str) -> RunRecord | None:
    """Return the run of a job that is at work; None for none."""
    return next((run for run in history.runs(job, 5) if run.state == jobs.RUNNING), None)
