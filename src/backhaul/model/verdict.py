"""What a job's record amounts to, and what is said of it."""

from __future__ import annotations

import msgspec

from backhaul.model.job import Hold, JobCard, RunRecord

FAILED, OVERDUE, INCOMPLETE, NEVER_RUN, RUNNING, HELD, OK = (
    "failed",
    "overdue",
    "incomplete",
    "never run",
    "running",
    "held",
    "ok",
)
# The worst first.
STATES = (FAILED, OVERDUE, INCOMPLETE, NEVER_RUN, RUNNING, HELD, OK)
BAD = (FAILED, OVERDUE, INCOMPLETE, NEVER_RUN)


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """One job's.

    Attributes:
        state: the worst that holds, of ``STATES``.
        reasons: each as (state, words), the worst first; empty where all is well.
        last: the newest run; ``last_good``: the newest that ended well; None where there is none.
        hold: the hold that is in force, or None.
        next_begins, next_closes: the opening of its window in which it begins next, the present one while it has not
            begun in it; ISO in UTC, empty for none.
        warnings: what would be wrong soon: forecasts past the window, holds that would break the age.
    """

    state: str
    card: JobCard
    reasons: tuple[tuple[str, str], ...] = ()
    last: RunRecord | None = None
    last_good: RunRecord | None = None
    hold: Hold | None = None
    next_begins: str = ""
    next_closes: str = ""
    warnings: tuple[str, ...] = ()


class Delivery(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of a message on one channel: ``error`` is empty where it was delivered."""

    channel: str
    at: str
    subject: str
    job: str = ""
    error: str = ""


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """All jobs at one moment: what reports, checks, metrics and alerts are made from.

    Attributes:
        host: whose jobs they are, or the store that was asked.
        at: the moment, ISO with the zone of whoever asks.
        verdicts: the worst first.
        problems: of the records themselves: a state file that can't be read, a clock that was set back.
        undelivered: alerts that reached nobody.
        looked: when a timer's call last looked what is to begin (ISO, UTC); empty for never, or for another host.
    """

    host: str
    at: str
    verdicts: tuple[Verdict, ...]
    problems: tuple[str, ...] = ()
    undelivered: tuple[Delivery, ...] = ()
    looked: str = ""

    @property
    def state(self) -> str:
        """The worst state of all jobs; ``incomplete`` at least where the records have problems."""
        states = [verdict.state for verdict in self.verdicts]
        if self.problems or self.undelivered:
            states.append(INCOMPLETE)
        return min(states, key=STATES.index, default=OK)


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """What a person is told.

    Attributes:
        subject: what is wrong first, in one line.
        text: the whole, plain.
        html: the same as a page; empty for none.
        job: which one it is about; empty for all.
        state: of ``STATES``: what channels with colours and priorities go by.
        failure: whether somebody has to do something.
        document: the same for programs.
    """

    subject: str
    text: str
    html: str = ""
    job: str = ""
    state: str = OK
    failure: bool = False
    document: dict[str, object] = {}
