"""Who is told of verdicts, by which channels, and what became of it."""

from __future__ import annotations

import contextlib
import datetime as dt
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec

from backhaul.errors import BackhaulError, LockBusyError
from backhaul.formats import run_record
from backhaul.formats.config import Config
from backhaul.formats.redaction import redact_text
from backhaul.jobs.channels import OpenChannel, open_channel
from backhaul.jobs.history import History, undelivered
from backhaul.model import job as jobs
from backhaul.model.channel import Channel
from backhaul.model.job import RunRecord
from backhaul.model.verdict import FAILED, OK, Delivery, Message, Overview
from backhaul.operations.locks import locked
from backhaul.planning.alerts import SIGN_OF_LIFE, Told, decide, is_due_again, life_is_due
from backhaul.reporting import messages

# What is told of no job in particular.
_ALL = ""
# What was told of the host as a whole. (No job can be called so.)
_HOST = "-host"
Opener = Callable[[Channel], OpenChannel]


class Alerts:
    """Tells people. Each delivery is recorded, and what was told only once it was delivered.

    Args:
        config: the channels, and which job has which.
        history: where it is recorded.
        now: the clock (aware).
        opener: opens a channel. (Simulations put another one in its place.)
    """

    def __init__(
        self,
        config: Config,
        history: History,
        now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
        *,
        opener: Opener = open_channel,
    ) -> None:
        self._config = config
        self._history = history
        self._now = now
        self._opener = opener

    def tell(self, overview: Overview) -> list[Delivery]:
        """Tell what there is to tell of each job; return what became of it."""
        with self._one_at_a_time():
            return self._tell(overview)

    def _tell(self, overview: Overview) -> list[Delivery]:
        found: list[Delivery] = []
        now = self._now()
        unheard = {each.job for each in undelivered(self._history.deliveries(200))}
        for verdict in overview.verdicts:
            name = verdict.card.name
            channels, everyone = self._channels_of(name)
            reason = decide(self._history.told(name), verdict, now, unheard=name in unheard)
            if reason is None or not channels:
                continue
            deliveries = self.deliver(messages.alert(overview, verdict, reason), channels, everyone=everyone)
            found += deliveries
            if any(not each.error for each in deliveries):
                run = verdict.last.id if verdict.last is not None else ""
                self._history.note_told(name, Told(verdict.state, run, _iso(now)))
        return found

    def tell_problem(self, overview: Overview, problem: str) -> list[Delivery]:
        """Tell all channels of something that is wrong with the host's jobs as a whole; once, daily, and its end.

        Args:
            overview: of now.
            problem: what is wrong; empty for nothing.
        """
        told = self._history.told(_HOST)
        now = self._now()
        if not problem and (told is None or told.state == OK):
            return []
        if problem and told is not None and told.state != OK and told.run == problem and not is_due_again(told, now):
            return []
        words = f"PROBLEM: {problem}" if problem else "RECOVERED: the config is right again"
        message = msgspec.structs.replace(
            messages.report(overview, "problem"), subject=f"{words} - {overview.host}", failure=bool(problem)
        )
        found = self.deliver(message, self.all_channels(), everyone=True)
        if any(not each.error for each in found):
            self._history.note_told(_HOST, Told(FAILED if problem else OK, problem, _iso(now)))
        return found

    @contextlib.contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Keep others from telling the same meanwhile: a run that ends, and a tick that looks. For a minute at most."""
        path = self._history.directory / "alerts.lock"
        with contextlib.ExitStack() as stack:
            for _ in range(60):
                try:
                    stack.enter_context(locked(str(path)))
                    break
                except LockBusyError:
                    time.sleep(1.0)
                except BackhaulError:
                    break  # a state disk that takes no lock: better told twice than not at all
            yield

    def sign_of_life(self, overview: Overview) -> list[Delivery]:
        """Send the report of all jobs where the last one is a week old; return what became of it."""
        channels = self.all_channels()
        now = self._now()
        if not channels or not overview.verdicts or not life_is_due(self._history.told(_ALL), now):
            return []
        deliveries = self.deliver(messages.report(overview, SIGN_OF_LIFE), channels, everyone=True)
        if any(not each.error for each in deliveries):
            self._history.note_told(_ALL, Told(overview.state, "", _iso(now)))
        return deliveries

    def deliver(self, message: Message, channels: Sequence[str], *, everyone: bool) -> list[Delivery]:
        """Send a message by channels in their order; return and record what became of each.

        Args:
            message: what is said.
            channels: by their names.
            everyone: by all of them; else by the first that takes it.
        """
        found = []
        at = _iso(self._now())
        for name in channels:
            error = self._send(name, message)
            delivery = Delivery(
                channel=name, at=at, subject=redact_text(message.subject), job=message.job, error=redact_text(error)
            )
            self._history.note_delivery(delivery)
            found.append(delivery)
            if not error and not everyone:
                break
        return found

    def ping(self, name: str, record: RunRecord) -> list[str]:
        """Tell those that hear of each beginning and end of a job; return what went wrong."""
        settings = self._config.jobs.get(name)
        found = []
        for channel in settings.values.get("pings", ()) if settings is not None else ():
            state: str | int = "start"
            if record.state != jobs.RUNNING:
                state = "ok" if record.state == jobs.OK else record.exit_status or 1
            text = "\n".join(part for part in (f"{record.state} {record.why}".strip(), record.last_words) if part)
            try:
                self._opener(self._config.channels[channel]).ping(state, text)  # type: ignore[arg-type]
            except BackhaulError as error:
                found.append(f"{channel}: {error.what}: {error.why}")
        return found

    def all_channels(self) -> tuple[str, ...]:
        """Return the channels that any job has, each once."""
        defaults = [self._channels_of(name)[0] for name in self._config.jobs]
        return tuple(dict.fromkeys(channel for channels in defaults for channel in channels))

    def _channels_of(self, job: str) -> tuple[tuple[str, ...], bool]:
        settings = self._config.jobs.get(job)
        if settings is None:
            return (), True
        values = settings.values
        return values.get("notify", ()), values.get("notify_mode", "all") == "all"

    def _send(self, name: str, message: Message) -> str:
        channel = self._config.channels.get(name)
        if channel is None:
            return f"there is no channel {name}"
        try:
            self._opener(channel).deliver(message)
        except BackhaulError as error:
            return f"{error.what}: {error.why}" if error.why else error.what
        except Exception as error:  # noqa: BLE001 - the next channel must be tried, whatever is wrong with this one
            return f"{type(error).__name__}: {error}"
        return ""


def pretended_failure(host: str, now: dt.datetime) -> Overview:
    """Return an overview with one job that failed, for trying the channels; no such job exists."""
    from backhaul.model.job import Expectations, JobCard
    from backhaul.planning.verdicts import judge

    card = JobCard(
        name="a-test", host=host, kind=jobs.COMMAND, what="a test of the alerts", expectations=Expectations()
    )
    start = now - dt.timedelta(minutes=7)
    run = RunRecord(
        format="backhaul-run",
        version="1.0",
        id=run_record.run_id(start, 0),
        job=card.name,
        kind=card.kind,
        host=host,
        trigger=jobs.BY_HAND,
        started=start.isoformat(timespec="seconds"),
        finished=now.isoformat(timespec="seconds"),
        seconds=420.0,
        state=jobs.FAILED,
        why="this is a test: nothing is wrong",
        exit_status=1,
        last_words="If you can read this, alerts reach you.",
    )
    verdict = judge(card, [run], (), now)
    return Overview(host=host, at=now.astimezone().isoformat(timespec="seconds"), verdicts=(verdict,))


def _iso(time: dt.datetime) -> str:
    return time.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
