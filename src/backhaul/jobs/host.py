"""All that belongs to the jobs of this host, in one place: commands open it, ask it, and close it."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import msgspec

from backhaul.errors import BackhaulError, ConfigurationError
from backhaul.formats.config import Config, ConfigError, read_config
from backhaul.jobs import published
from backhaul.jobs.alerts import Alerts
from backhaul.jobs.config import job_of, load_config, settings_of_job, system_zone
from backhaul.jobs.history import History
from backhaul.jobs.holds import Holds
from backhaul.jobs.overview import LOOKED, overview
from backhaul.jobs.runner import Echo, Runner
from backhaul.model.job import Job, RunRecord
from backhaul.model.verdict import Overview
from backhaul.operations.places import read_text
from backhaul.planning import windows
from backhaul.planning.dispatch import decide
from backhaul.planning.verdicts import judge

# The mark that has the texts of the last config that was right.
_CONFIG = "config"


class JobHost:
    """The config, the history, the holds and the alerts of this host.

    Args:
        config: read already; None reads it.
        last_config: keep the texts of a config that is right; and of one that is not, or is gone, use the last that
            was: a mistake of a moment must not silence all jobs. ``config_problem`` says so.
        now: the clock (aware).

    Raises:
        ConfigurationError: the config is not right, or the state of jobs can't be kept anywhere.
    """

    def __init__(
        self,
        config: Config | None = None,
        *,
        last_config: bool = False,
        now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
    ) -> None:
        self.now = now
        self.config_problem = ""
        given = config
        problem: ConfigurationError | None = None
        if given is None:
            try:
                given = load_config()
            except ConfigurationError as error:
                if not last_config:
                    raise
                problem = error
        self.history = History(now=now)
        if given is None or (last_config and not given.files):
            given = self._last_config(given, problem)
        elif last_config:
            self._keep_config(given)
        self.config = given
        self.holds = Holds(now=now)
        self.alerts = Alerts(self.config, self.history, now)

    def __enter__(self) -> JobHost:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.history.close()

    def looked(self) -> None:
        """Note that a timer's call was here: something on this host begins jobs."""
        self.history.note_mark(LOOKED, self.now().astimezone(dt.UTC).isoformat(timespec="seconds"))

    def _keep_config(self, config: Config) -> None:
        documents = []
        for path in config.files:
            with contextlib.suppress(ConfigurationError):
                documents.append((path, read_text(Path(path))))
        kept = msgspec.json.encode(documents).decode()
        if self.history.mark(_CONFIG) != kept:
            self.history.note_mark(_CONFIG, kept)

    def _last_config(self, given: Config | None, problem: ConfigurationError | None) -> Config:
        """Return the last config that was right.

        Raises:
            ConfigurationError: there was none; what is wrong with the present one.
        """
        kept = self.history.mark(_CONFIG)
        if not kept:
            if problem is not None:
                self.history.close()
                raise problem
            assert given is not None
            return given
        why = "there is none any more"
        if problem is not None:
            why = problem.why if isinstance(problem, ConfigError) else f"{problem.what}: {problem.why}"
        why = " ".join(why.split())
        self.config_problem = f"the config is not right, and the last one that was goes on: {why}"
        documents = [(str(where), str(text)) for where, text in msgspec.json.decode(kept)]
        return read_config(documents, system_zone())

    def job(self, name: str, *, note: bool = False) -> Job:
        """Return a job of the config, ready to run.

        Args:
            name: the job's.
            note: note it as it is configured now; who only asks changes nothing.

        Raises:
            UsageError: there is none of that name.
        """
        settings = settings_of_job(self.config, name)
        job = job_of(settings)
        return job_of(settings, known_since=self.history.note_job(job.card, write=note))

    def overview(self, *names: str) -> Overview:
        """Judge all jobs, or those that are named."""
        found = overview(self.config, self.history, self.holds, self.now(), names=names)
        if self.config_problem:
            found = msgspec.structs.replace(found, problems=(self.config_problem, *found.problems))
        return found

    def runner(self, echo: Echo | None = None, ready: Callable[[], bool] = lambda: True) -> Runner:
        """Return what runs jobs here; it tells people what became of them."""
        return Runner(self.history, self.holds, echo=echo, ready=ready, ping=self._ping, tell=self._tell, now=self.now)

    def due(self) -> list[str]:
        """Return the jobs that the schedule is to begin now; also those whose being held is not recorded yet."""
        from backhaul.model.job import SCHEDULED, SKIPPED

        found = []
        holds = self.holds.all()
        for name, settings in self.config.jobs.items():
            if "window" not in settings.values:
                continue
            card = self.job(name, note=True).card
            if card.window is None or windows.open_at(card.window, card.jitter_of, self.now()) is None:
                continue
            runs = self.history.runs(name, 50)
            decision = decide(card, runs, holds, self.now(), trigger=SCHEDULED)
            occurrence = decision.occurrence
            said = occurrence is not None and any(
                run.state == SKIPPED and run.occurrence == occurrence.id for run in runs
            )
            if decision.begin or (decision.hold is not None and not said):
                found.append(name)
        return found

    def watch(self) -> Overview:
        """Judge all jobs and tell people what there is to tell; return what was found."""
        self.looked()
        if not self.config_problem:
            self._retire()
        found = self.overview()
        self.alerts.tell(found)
        self.alerts.tell_problem(found, self.config_problem)
        self.alerts.sign_of_life(found)
        return found

    def _retire(self) -> None:
        """Say beside the backups that jobs which the config has no more are not expected: others would miss them."""
        for card in self.history.gone_jobs(self.config.jobs):
            if card.places:
                with contextlib.suppress(BackhaulError):
                    published.retire(card, patience=5.0)
                    self.history.forget_job(card.name)

    def _ping(self, job: Job, record: RunRecord) -> None:
        for problem in self.alerts.ping(job.card.name, record):
            self.history.problems.append(f"a ping was not delivered: {problem}")

    def _tell(self, job: Job, record: RunRecord) -> None:
        if job.card.name in self.config.jobs:
            found = self.overview(job.card.name)
            if not any(verdict.last is not None and verdict.last.id == record.id for verdict in found.verdicts):
                # It could not be recorded here: people are told of it all the same.
                verdict = judge(job.card, [record], self.holds.all(), self.now())
                found = Overview(host=found.host, at=found.at, verdicts=(verdict,), problems=found.problems)
            self.alerts.tell(found)
