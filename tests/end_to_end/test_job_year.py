"""A year of nights by a clock that is set, not waited for: holds, crashes, reboots, failures, a week away."""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from backhaul.formats.config import Config, read_config
from backhaul.jobs import run as run_module
from backhaul.jobs.alerts import Alerts
from backhaul.jobs.config import job_of
from backhaul.jobs.history import History
from backhaul.jobs.holds import Holds
from backhaul.jobs.overview import overview
from backhaul.jobs.programs import Attempt
from backhaul.jobs.run import Run
from backhaul.jobs.runner import Runner
from backhaul.model import job as jobs
from backhaul.model.channel import Channel
from backhaul.model.job import Hold, Job, StageRecord
from backhaul.model.verdict import Message
from backhaul.planning import windows
from backhaul.planning.dispatch import decide

UTC = dt.UTC
TICK = dt.timedelta(minutes=10)
HOUR = dt.timedelta(hours=1)
# So many runs the host keeps; the year's account is taken before they are forgotten.
KEPT = 20


class Crash(BaseException):
    """The runner is killed, or the host goes down: nobody writes an end."""


class Inbox:
    """A channel that keeps what it is given."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def __call__(self, channel: Channel) -> Inbox:
        return self

    def deliver(self, message: Message) -> None:
        self.messages.append(message)


class Year:
    """A host with one job. Time passes only here."""

    def __init__(self, directory: Path, window: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        text = (
            '[notify.ops]\nkind = "command"\ncommand = ["true"]\n[jobs.night]\nkind = "command"\ncommand = ["true"]\n'
            f'notify = "ops"\nretries = 1\nbackoff = "5m"\nkeep_runs = {KEPT}\nwindow = {window}\n'
        )
        self.config: Config = read_config([("config", text)], "UTC")
        self.chance = random.Random(seed)
        self.time = dt.datetime(2026, 1, 1, tzinfo=UTC)
        self.boot = 0
        self.host_is_up = True
        self.history = History(directory, alive=lambda pid, boot: pid == self.boot, now=lambda: self.time)
        self.holds = Holds(directory, alive=lambda pid, boot: True, now=lambda: self.time)
        self.inbox = Inbox()
        self.alerts = Alerts(self.config, self.history, lambda: self.time, opener=self.inbox)  # type: ignore[arg-type]
        self.checks: list[tuple[dt.datetime, str]] = []
        self.known: Job | None = None
        self.every_hold: list[Hold] = []
        self.every_run: dict[str, jobs.RunRecord] = {}
        monkeypatch.setattr(run_module, "this_process", lambda: (self.boot, "a boot"))

    def job(self) -> Job:
        if self.known is None:
            settings = self.config.jobs["night"]
            self.known = job_of(settings, known_since=self.history.note_job(job_of(settings).card))
        return self.known

    def runner(self) -> Runner:
        def tell(job: Job, record: jobs.RunRecord) -> None:
            self.alerts.tell(self.judged())

        return Runner(
            self.history,
            self.holds,
            tell=tell,
            publishes=False,
            now=lambda: self.time,
            clock=self.seconds,
            sleep=self.wait,
            attempt=self.attempt,
        )

    def seconds(self) -> float:
        return self.time.timestamp()

    def judged(self) -> Any:
        return overview(self.config, self.history, self.holds, self.time)

    def wait(self, seconds: float) -> None:
        self.time += dt.timedelta(seconds=seconds)

    def attempt(self, run: Run, environment: Mapping[str, str]) -> Attempt:
        fate = self.chance.random()
        self.wait(self.chance.choice([60, 1800, 3600]))
        if fate < 0.04:
            assert run.log is not None
            run.log.close()
            raise Crash
        failed = fate < 0.3
        return Attempt(stages=(StageRecord(command=("true",), exit_status=1 if failed else 0),))

    def tick(self) -> None:
        """What a timer's call does: begin what is due."""
        card = self.job().card
        assert card.window is not None
        if windows.open_at(card.window, card.jitter_of, self.time) is None:
            return
        runs = self.history.runs("night", 50)
        decision = decide(card, runs, self.holds.all(), self.time, trigger=jobs.SCHEDULED)
        if not decision.begin and decision.hold is None:
            return
        try:
            self.runner().run(self.job(), trigger=jobs.SCHEDULED)
        except Crash:
            self.boot += 1  # whatever ran is gone

    def note_runs(self) -> None:
        """Take down what the host knows of its runs; nothing may have been forgotten that was not taken down."""
        runs = self.history.runs("night", 10_000)
        assert len(runs) < KEPT or any(run.id in self.every_run for run in runs)
        self.every_run.update((run.id, run) for run in runs)

    def look(self) -> None:
        """What is asked every hour."""
        found = self.judged()
        self.checks.append((self.time, found.verdicts[0].state))
        self.alerts.tell(found)

    def live(self, until: dt.datetime, away: tuple[dt.datetime, dt.datetime]) -> None:
        next_look = self.time
        while self.time < until:
            if away[0] <= self.time < away[1]:
                self.time = away[1]
                self.boot += 1
            if self.chance.random() < 0.0005:  # a reboot takes a while, and may fall into a window
                self.boot += 1
                self.time += dt.timedelta(minutes=self.chance.choice([5, 50, 200]))
            if self.chance.random() < 0.0008:
                length = self.chance.choice([0.5, 2, 5, 20])
                self.every_hold.append(self.holds.add("night", self.time + length * HOUR, "a groom"))
            if self.time >= next_look:
                if self.time.hour == 12:  # no window is open then
                    self.note_runs()
                self.look()
                next_look = self.time + HOUR
            self.tick()
            self.time += TICK


def openings(window: Mapping[str, Any], until: dt.datetime) -> list[dt.datetime]:
    """When the window opens in the year, by looking at the clock on the wall every minute."""
    zone = ZoneInfo(window["timezone"])
    found = []
    time = dt.datetime(2026, 1, 1, tzinfo=UTC)
    seen: set[dt.date] = set()
    while time < until:
        wall = time.astimezone(zone)
        if wall.hour * 60 + wall.minute >= window["start"][0] and wall.date() not in seen:
            seen.add(wall.date())
            if wall.weekday() in window["days"] and f"{wall:%m-%d}" not in window.get("excluded", ()):
                found.append(time)
        time += dt.timedelta(minutes=1)
    return found


@pytest.mark.first
@pytest.mark.parametrize(
    ("window", "seed"),
    [
        (
            '{ start = "22:00", length = "330m", days = "mon-sat", jitter = "20m", timezone = "Europe/Berlin" }',
            1,
        ),
        (
            '{ start = "02:30", length = "3h", days = "daily", excluded = "12-24", timezone = "America/New_York" }',
            2,
        ),
    ],
)
def test_each_run_happened_once_or_its_absence_was_reported(
    window: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    year = Year(tmp_path, window, seed, monkeypatch)
    until = dt.datetime(2027, 1, 1, tzinfo=UTC)
    away = (dt.datetime(2026, 7, 6, 12, tzinfo=UTC), dt.datetime(2026, 7, 13, 9, tzinfo=UTC))
    year.live(until, away)
    year.note_runs()
    year.history.close()

    settings = year.config.jobs["night"].values["window"]
    # Not the one that was under way when this host first knew of the job, nor those that the year cuts off.
    every = openings(settings, until + dt.timedelta(days=3))
    expected = [time for time in every[1:] if time < until - dt.timedelta(days=1)]
    runs: dict[str, list[jobs.RunRecord]] = {}
    for run in year.every_run.values():
        if run.state != jobs.SKIPPED:
            runs.setdefault(run.occurrence, []).append(run)
    length = dt.timedelta(seconds=settings["length"])
    states = {"ok": 0, "absent": 0, "bad": 0}
    for opens in expected:
        closes = opens + length
        mine = runs.pop(opens.strftime("%Y-%m-%dT%H:%M:%SZ"), [])
        for run in mine:
            assert opens <= dt.datetime.fromisoformat(run.started) < closes
        ended = [run for run in mine if run.state in (jobs.OK, jobs.FAILED)]
        assert len(ended) <= 1, "more than once"
        if ended and ended[0].state == jobs.OK:
            states["ok"] += 1
            continue
        states["bad" if mine else "absent"] += 1
        # It was said by an hour after the window, or it was held to the window's end, which was said too. (Where nobody
        # could ask, since the host was down, the first who asked afterwards was told.)
        said = {state for time, state in year.checks if opens <= time < closes + HOUR}
        said.add(next((state for time, state in year.checks if time >= closes), "nobody asked"))
        held = any(
            dt.datetime.fromisoformat(hold.since) <= opens + 2 * HOUR
            and dt.datetime.fromisoformat(hold.until) >= closes
            for hold in year.every_hold
        )
        assert {"failed", "overdue"} & said or (held and "held" in said), (opens, said)
    runs.pop("", None)
    unexpected = set(runs) - {time.strftime("%Y-%m-%dT%H:%M:%SZ") for time in every} - {_first_of_all(settings)}
    assert not unexpected, "a run that nobody expected"
    # The year had what it is about: most nights were good, some were not, and some did not come about.
    assert states["ok"] > 250
    assert states["bad"] > 5
    assert states["absent"] >= 6

    # People were told: of each bad stretch, and of its end; and never of the same more than daily.
    told = [message.subject.split()[0] for message in year.inbox.messages]
    assert {"FAILED", "OVERDUE", "RECOVERED"} <= set(told)
    assert len(told) < 3 * (states["bad"] + states["absent"]) + 40


def _first_of_all(window: Mapping[str, Any]) -> str:
    """The opening that was under way when the year began."""
    zone = ZoneInfo(window["timezone"])
    start = dt.datetime(2025, 12, 31, window["start"][0] // 60, window["start"][0] % 60, tzinfo=zone)
    return start.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
