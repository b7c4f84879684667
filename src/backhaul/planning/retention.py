"""Which backups of a series stay and which go. Pure: it is told what each backup is like, and gives a plan, a value.

Two kinds of reasons keep a backup. Rules count: the newest so many, the newest of so many days. What protects does not
count, and nothing outweighs it: the newest good backup, a hold, an object lock, the newest one that a drill proved,
what can't be judged. A backup that nothing keeps goes.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from backhaul.formats.hold import end_of
from backhaul.formats.names import parse_backup_id
from backhaul.formats.quantities import format_duration, format_size
from backhaul.model.backup_hold import BackupHold
from backhaul.model.drill import FAILED, PROVED
from backhaul.model.mirror import Refusal
from backhaul.planning.guard import MaxDelete

# A run may remove half of the backups; of a short series always these many.
DEFAULT_BACKUPS, DEFAULT_SHARE = 3, 2

NO_RULE, IT_FITS = "no rule keeps it", "it fits"


class KeepRules(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be kept; None where a rule was not given.

    Attributes:
        last: the newest so many.
        daily, weekly, monthly, yearly: the newest good one of each of so many days, ISO weeks, months, years that have
            one.
        within: everything younger, in seconds.
        everything: all of it; for a series of which only the room that it takes is bounded.
    """

    last: int | None = None
    daily: int | None = None
    weekly: int | None = None
    monthly: int | None = None
    yearly: int | None = None
    within: float | None = None
    everything: bool = False


class BackupFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a committed backup.

    Attributes:
        id: which one.
        size: stored bytes, of all its objects.
        unreadable: why its manifest can't be read; empty if it can.
        damage: what is missing or shortened of its streams; empty if nothing.
        drill: the result of the last drill that said something of the backup: ``proved``, ``failed``, or empty.
        holds: the holds beside it; None for one that can't be read.
        lock: the object lock that keeps it, in words; empty for none.
    """

    id: str
    size: int = 0
    unreadable: str = ""
    damage: str = ""
    drill: str = ""
    holds: tuple[BackupHold | None, ...] = ()
    lock: str = ""

    @property
    def problem(self) -> str:
        """Why it is not a good backup; empty for a good one."""
        if self.unreadable:
            return f"its manifest can't be read: {self.unreadable}"
        return self.damage or ("its last drill failed" if self.drill == FAILED else "")


class PlannedBackup(msgspec.Struct, frozen=True, kw_only=True):
    """What is to become of a backup, and all reasons for it.

    ``protected`` says that it stays whatever is short of room; ``problem`` why it is not a good one.
    """

    id: str
    size: int
    keep: bool
    reasons: tuple[str, ...]
    protected: bool = False
    problem: str = ""


class RetentionPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What is to become of every backup of a series, oldest first, and what there is to say."""

    backups: tuple[PlannedBackup, ...]
    remarks: tuple[str, ...] = ()

    @property
    def removed(self) -> tuple[PlannedBackup, ...]:
        """Those that go, oldest first."""
        return tuple(backup for backup in self.backups if not backup.keep)

    @property
    def kept(self) -> tuple[PlannedBackup, ...]:
        """Those that stay, oldest first."""
        return tuple(backup for backup in self.backups if backup.keep)


def hold_in_words(hold: BackupHold | None, now: dt.datetime) -> str:
    """Return how a hold protects now; empty if it is over.

    Args:
        hold: what its record says; None if that can't be read, which protects too.
        now: the present (aware).
    """
    if hold is None:
        return "on hold: a record of a hold is there that can't be read"
    end = end_of(hold)
    if end is not None and end <= now:
        return ""
    words = f"on hold {f'until {hold.until}' if hold.until else 'without end'}"
    words += f" by {hold.by}" if hold.by else ""
    return words + (f": {hold.reason}" if hold.reason else "")


def plan_retention(
    backups: Iterable[BackupFacts],
    rules: KeepRules,
    *,
    now: dt.datetime,
    zone: dt.tzinfo = dt.UTC,
    unproved_ok: bool = False,
) -> RetentionPlan:
    """Decide what becomes of each backup.

    A backup that is dated in the future stays and is not counted, since nobody knows when it was made: the clock was
    wrong then, or is now.

    Args:
        backups: what is known of each, in any order.
        rules: what is to be kept.
        now: the present (aware).
        zone: whose days, weeks, months and years count.
        unproved_ok: the newest proved backup may go although all newer ones are unproved.
    """
    found = sorted(backups, key=lambda facts: facts.id, reverse=True)
    future = [facts for facts in found if _start(facts) > now]
    counted = [facts for facts in found if _start(facts) <= now]
    good = [facts for facts in counted if not facts.problem]
    wanted: dict[str, list[str]] = {facts.id: [] for facts in found}
    protected: dict[str, list[str]] = {facts.id: [] for facts in found}

    for backup, reason in _wanted_by_rules(counted, good, rules, now, zone):
        wanted[backup].append(reason)
    for facts in future:
        protected[facts.id].append("dated in the future: the clock was wrong then, or is now; it is not counted")
    if good:
        protected[good[0].id].append("the newest good backup")
    proved = [facts for facts in good if facts.drill == PROVED]
    if proved and not unproved_ok:
        protected[proved[0].id].append("the newest backup that a drill proved")
    for facts in found:
        if facts.unreadable:
            protected[facts.id].append(facts.problem)
        protected[facts.id] += [words for hold in facts.holds if (words := hold_in_words(hold, now))]
        if facts.lock:
            protected[facts.id].append(facts.lock)

    planned = []
    for facts in reversed(found):
        reasons = protected[facts.id] + wanted[facts.id]
        gone = [NO_RULE] + ([facts.problem] if facts.problem else [])
        planned.append(
            PlannedBackup(
                id=facts.id,
                size=facts.size,
                keep=bool(reasons),
                reasons=tuple(reasons or gone),
                protected=bool(protected[facts.id]),
                problem=facts.problem,
            )
        )
    here = f"{now.astimezone(dt.UTC):%Y-%m-%dT%H:%M:%SZ}"
    remarks = [
        f"{facts.id} is dated in the future (it is {here} here): it stays, and is not counted"
        for facts in reversed(future)
    ]
    if good and counted[0] is not good[0]:
        newer = sum(facts.id > good[0].id for facts in counted)
        remarks.append(f"the newest {newer} of the series can't be relied on; the newest good backup is {good[0].id}")
    return RetentionPlan(backups=tuple(planned), remarks=tuple(remarks))


def choose_for_room(plan: RetentionPlan, needed: int) -> tuple[PlannedBackup, ...]:
    """Return what must go, oldest first, that so many more bytes are free; all that may go where that is not enough.

    Args:
        plan: what the rules remove is gone already; of the rest all may go but what is protected.
        needed: bytes that are missing; none or less where there is room.
    """
    chosen = []
    for backup in plan.kept:
        if needed <= 0:
            break
        if not backup.protected:
            chosen.append(backup)
            needed -= backup.size
    return tuple(chosen)


def removal_limit(max_delete: MaxDelete, backups: int) -> int:
    """Return how many of a series' backups a run may remove."""
    if max_delete == MaxDelete():
        return max(DEFAULT_BACKUPS, backups // DEFAULT_SHARE)
    return max_delete.limit(backups)


def judge_retention(
    series: str, plan: RetentionPlan, removed: Sequence[PlannedBackup], max_delete: MaxDelete
) -> tuple[Refusal, ...]:
    """Return why the plan must not be applied; nothing if it may be.

    Args:
        series: for messages.
        plan: what becomes of each backup.
        removed: all that would go, for the rules and for room.
        max_delete: what the operator allows.
    """
    if not removed:
        return ()
    names = tuple(f"{backup.id} ({format_size(backup.size)}): {'; '.join(backup.reasons)}" for backup in removed)
    refusals = []
    gone = {backup.id for backup in removed}
    if not any(not backup.problem for backup in plan.backups if backup.id not in gone):
        newest = plan.backups[-1]
        refusals.append(
            Refusal(
                f"Nothing of {series} may go: no good backup would be left",
                f"none of its {len(plan.backups)} backups is known to be good; {newest.id}: {newest.problem}"
                if all(backup.problem for backup in plan.backups)
                else "every good one would go",
                f"Look at them (backhaul verify {series}), push a new one, and prune then.",
                names,
            )
        )
    limit = removal_limit(max_delete, len(plan.backups))
    if len(removed) > limit:
        refusals.append(
            Refusal(
                f"Too much of {series} would be removed: {len(removed)} backups",
                f"at most {limit} of {len(plan.backups)} may go in one run (--max-delete)",
                f"Look at the names. If that is right: --max-delete {len(removed)}, for this once.",
                names,
            )
        )
    return tuple(refusals)


# -- inside ------------------------------------------------------------------------------------------------


def _start(facts: BackupFacts) -> dt.datetime:
    start = parse_backup_id(facts.id)
    assert start is not None
    return start


def _wanted_by_rules(
    counted: Sequence[BackupFacts],
    good: Sequence[BackupFacts],
    rules: KeepRules,
    now: dt.datetime,
    zone: dt.tzinfo,
) -> Iterator[tuple[str, str]]:
    """Yield what rules keep, with the reason. Both sequences are newest first."""
    if rules.everything:
        yield from ((facts.id, IT_FITS) for facts in counted)
    if rules.last is not None:
        # Where some of the newest are not good, as many good ones stay as were meant to.
        newest = counted[: rules.last]
        yield from ((facts.id, f"one of the newest {rules.last}") for facts in newest)
        ids = {facts.id for facts in newest}
        yield from ((f.id, f"one of the newest {rules.last} good ones") for f in good[: rules.last] if f.id not in ids)
    for count, name, period in (
        (rules.daily, "day", _day),
        (rules.weekly, "week", _week),
        (rules.monthly, "month", _month),
        (rules.yearly, "year", _year),
    ):
        if count is not None:
            yield from _newest_of_periods(good, count, name, period, zone)
    if rules.within is not None:
        words = f"younger than {format_duration(rules.within)}"
        yield from ((f.id, words) for f in counted if (now - _start(f)).total_seconds() < rules.within)


def _newest_of_periods(
    good: Sequence[BackupFacts], count: int, name: str, period: Callable[[dt.datetime], str], zone: dt.tzinfo
) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for facts in good:
        label = period(_start(facts).astimezone(zone))
        if label not in seen:
            if len(seen) == count:
                return
            seen.add(label)
            yield facts.id, f"the newest good one of the {name} {label}"


def _day(time: dt.datetime) -> str:
    return f"{time:%Y-%m-%d}"


def _week(time: dt.datetime) -> str:
    year, week, _ = time.isocalendar()
    return f"{year:04d}-W{week:02d}"


def _month(time: dt.datetime) -> str:
    return f"{time:%Y-%m}"


def _year(time: dt.datetime) -> str:
    return f"{time:%Y}"
