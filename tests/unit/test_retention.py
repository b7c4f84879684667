"""Which backups stay: rules, what protects, the guard, room; and the record of a hold."""

from __future__ import annotations

import datetime as dt
import random
import zoneinfo
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backhaul.errors import FormatError
from backhaul.formats import hold as hold_format
from backhaul.formats.names import ObjectName, backup_id, parse_backup_id, parse_key
from backhaul.model.backup_hold import BackupHold
from backhaul.planning.guard import MaxDelete
from backhaul.planning.retention import (
    BackupFacts,
    KeepRules,
    RetentionPlan,
    choose_for_room,
    hold_in_words,
    judge_retention,
    plan_retention,
    removal_limit,
)

pytestmark = pytest.mark.unit

NOW = dt.datetime(2026, 11, 21, 12, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)


def a_hold(until: str | None = None) -> BackupHold:
    return BackupHold(
        format=hold_format.FORMAT, version=hold_format.VERSION, id="x", since="2026-01-01T00:00:00Z", until=until
    )


HOLDS = st.sampled_from([None, a_hold(), a_hold("2026-11-21T12:00:01Z"), a_hold("2026-11-21T12:00:00Z")])
RULES = st.builds(
    KeepRules,
    last=st.none() | st.integers(1, 6),
    daily=st.none() | st.integers(1, 6),
    weekly=st.none() | st.integers(1, 4),
    monthly=st.none() | st.integers(1, 4),
    yearly=st.none() | st.integers(1, 3),
    within=st.none() | st.floats(1, 100 * 86400),
)


@st.composite
def series(draw: st.DrawFn, *, future: bool = True) -> list[BackupFacts]:
    """Backups at any distance: of one minute and of years, some of them damaged, drilled, held, locked."""
    ages = draw(
        st.lists(
            st.one_of(
                st.integers(-(10**6) if future else 0, 10**6),
                st.integers(0, 10**8),
                st.integers(0, 40).map(lambda d: d * 86400),
            ),
            unique=True,
            max_size=25,
        )
    )
    return [
        BackupFacts(
            id=backup_id(NOW - dt.timedelta(seconds=age)),
            size=draw(st.integers(0, 100)),
            unreadable=draw(st.sampled_from(["", "", "", "", "cut"])),
            damage=draw(st.sampled_from(["", "", "", "gone"])),
            drill=draw(st.sampled_from(["", "", "proved", "failed"])),
            holds=draw(st.lists(HOLDS, max_size=2).map(tuple)) if draw(st.integers(0, 5)) == 0 else (),
            lock=draw(st.sampled_from(["", "", "", "", "", "locked"])),
        )
        for age in ages
    ]


def ids(plan: RetentionPlan) -> set[str]:
    return {backup.id for backup in plan.removed}


def started(facts: BackupFacts) -> dt.datetime:
    start = parse_backup_id(facts.id)
    assert start is not None
    return start


def known(backups: list[BackupFacts]) -> list[BackupFacts]:
    """Those that count, newest first."""
    return sorted((facts for facts in backups if started(facts) <= NOW), key=lambda facts: facts.id, reverse=True)


@given(series(), RULES)
def test_never_the_last_good_backup(backups: list[BackupFacts], rules: KeepRules) -> None:
    """Whatever the rules: the newest good one stays, and where there is none the guard lets nothing go."""
    plan = plan_retention(backups, rules, now=NOW)
    good = [facts for facts in known(backups) if not facts.problem]
    if good:
        assert good[0].id not in ids(plan)
    all_may = MaxDelete(percent=100.0)
    if not any(not facts.problem for facts in backups) and plan.removed:
        (refusal,) = judge_retention("s", plan, plan.removed, all_may)
        assert "no good backup" in refusal.what
        assert len(refusal.deletes) == len(plan.removed)
    else:
        assert judge_retention("s", plan, plan.removed, all_may) == ()


@given(series(), RULES, st.booleans())
def test_what_protects_outweighs_everything(backups: list[BackupFacts], rules: KeepRules, unproved_ok: bool) -> None:
    plan = plan_retention(backups, rules, now=NOW, unproved_ok=unproved_ok)
    room = {backup.id for backup in choose_for_room(plan, 10**9)}
    for facts in backups:
        held = any(hold is None or hold.until in (None, "2026-11-21T12:00:01Z") for hold in facts.holds)
        if held or facts.lock or facts.unreadable or started(facts) > NOW:
            assert facts.id not in ids(plan) | room
    proved = [facts.id for facts in known(backups) if not facts.problem and facts.drill == "proved"]
    if proved and not unproved_ok:
        assert proved[0] not in ids(plan) | room
    good = [facts.id for facts in known(backups) if not facts.problem]
    assert not set(good[:1]) & (ids(plan) | room)


@given(series(), RULES, st.randoms(use_true_random=False))
def test_the_order_of_what_is_known_does_not_matter(
    backups: list[BackupFacts], rules: KeepRules, rng: random.Random
) -> None:
    shuffled = backups[:]
    rng.shuffle(shuffled)
    plan = plan_retention(backups, rules, now=NOW)
    assert plan_retention(shuffled, rules, now=NOW) == plan
    assert [backup.id for backup in plan.backups] == sorted(facts.id for facts in backups)
    assert all(backup.reasons for backup in plan.backups)


@given(series(), RULES)
def test_pruning_twice_removes_nothing_more(backups: list[BackupFacts], rules: KeepRules) -> None:
    gone = ids(plan_retention(backups, rules, now=NOW))
    left = [facts for facts in backups if facts.id not in gone]
    assert plan_retention(left, rules, now=NOW).removed == ()


@given(series(), RULES, st.integers(1, 30))
def test_keep_last(backups: list[BackupFacts], rules: KeepRules, count: int) -> None:
    """The newest so many, those that are not good among them; and as many good ones."""
    newest = [facts.id for facts in known(backups)][:count]
    good = [facts.id for facts in known(backups) if not facts.problem][:count]
    kept = {facts.id for facts in backups} - ids(
        plan_retention(backups, msgspec.structs.replace(rules, last=count), now=NOW)
    )
    assert kept.issuperset(newest)
    assert kept.issuperset(good)


@given(st.sets(st.integers(0, 10**8), max_size=30), st.integers(1, 30))
def test_keep_last_keeps_no_more(ages: set[int], count: int) -> None:
    backups = [BackupFacts(id=backup_id(NOW - dt.timedelta(seconds=age))) for age in ages]
    plan = plan_retention(backups, KeepRules(last=count), now=NOW)
    assert [backup.id for backup in plan.kept] == sorted(facts.id for facts in backups)[-count:]


@given(series(), RULES, RULES)
def test_adding_a_rule_never_removes_more(backups: list[BackupFacts], rules: KeepRules, more: KeepRules) -> None:
    both = msgspec.structs.replace(
        rules,
        **{
            name: max(
                (value for value in (getattr(rules, name), getattr(more, name)) if value is not None), default=None
            )
            for name in ("last", "daily", "weekly", "monthly", "yearly", "within")
        },
    )
    assert ids(plan_retention(backups, both, now=NOW)) <= ids(plan_retention(backups, rules, now=NOW))


PERIODS: dict[str, Callable[[dt.datetime], object]] = {
    "daily": lambda time: time.date(),
    "weekly": lambda time: time.isocalendar()[:2],
    "monthly": lambda time: (time.year, time.month),
    "yearly": lambda time: time.year,
}


@given(
    series(),
    st.sampled_from(sorted(PERIODS)),
    st.integers(1, 8),
    st.sampled_from(["UTC", "Europe/Berlin", "Pacific/Kiritimati", "America/Caracas"]),
)
def test_each_period_keeps_its_newest_good_backup(
    backups: list[BackupFacts], rule: str, count: int, zone_name: str
) -> None:
    """Counted with other means: of the newest so many periods that have a good backup, its newest one, and no other."""
    zone = zoneinfo.ZoneInfo(zone_name)
    newest: dict[object, str] = {}
    for facts in known(backups):
        if not facts.problem:
            newest.setdefault(PERIODS[rule](started(facts).astimezone(zone)), facts.id)
    expected = list(newest.values())[:count]
    plan = plan_retention(backups, msgspec.structs.replace(KeepRules(), **{rule: count}), now=NOW, zone=zone)
    assert not set(expected) & ids(plan)
    by_rule = [b.id for b in plan.kept if any("newest good one of the" in reason for reason in b.reasons)]
    assert sorted(by_rule) == sorted(expected)
    for backup in plan.kept:
        assert backup.id in expected or backup.protected


@given(st.integers(60, 120), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_a_daily_becomes_a_weekly(days: int, daily: int, weekly: int, monthly: int) -> None:
    """Pruned every day, a series has at its end what a prune of all of it would have left."""
    rules = KeepRules(daily=daily, weekly=weekly, monthly=monthly)
    every = [BackupFacts(id=backup_id(NOW - DAY * age)) for age in reversed(range(days))]
    left: list[BackupFacts] = []
    for number, facts in enumerate(every):
        left.append(facts)
        gone = ids(plan_retention(left, rules, now=NOW - DAY * (days - 1 - number)))
        left = [each for each in left if each.id not in gone]
    at_once = plan_retention(every, rules, now=NOW)
    assert [facts.id for facts in left] == [backup.id for backup in at_once.kept]


@given(series(), RULES, st.integers(-10, 3000))
def test_room_is_made_with_the_oldest(backups: list[BackupFacts], rules: KeepRules, needed: int) -> None:
    plan = plan_retention(backups, rules, now=NOW)
    chosen = choose_for_room(plan, needed)
    may_go = [backup for backup in plan.kept if not backup.protected]
    assert list(chosen) == may_go[: len(chosen)]
    freed = sum(backup.size for backup in chosen)
    assert freed >= needed or len(chosen) == len(may_go)
    assert not chosen or freed - chosen[-1].size < needed, "one more than was needed"


# -- by hand -------------------------------------------------------------------------------------------------


def backups_of(*days: int, damage: str = "", drill: str = "") -> list[BackupFacts]:
    return [BackupFacts(id=backup_id(NOW - DAY * day), size=10, damage=damage, drill=drill) for day in days]


def kept_days(plan: RetentionPlan) -> list[int]:
    return sorted((NOW - started(BackupFacts(id=backup.id))).days for backup in plan.kept)


def test_a_usual_policy() -> None:
    plan = plan_retention(backups_of(*range(400)), KeepRules(daily=7, weekly=4, monthly=12), now=NOW)
    # 2026-11-21 is a Saturday: weeks end 6, 13 and 20 days ago; months on the days below.
    months = [21, 52, 82, 113, 144, 174, 205, 235, 266, 294, 325]
    assert kept_days(plan) == sorted({*range(7), 6, 13, 20, *months})
    newest = plan.backups[-1]
    assert newest.reasons[0] == "the newest good backup"
    assert "the newest good one of the week 2026-W47" in newest.reasons
    assert "the newest good one of the month 2026-11" in newest.reasons
    assert plan.removed[0].reasons == ("no rule keeps it",)


def test_newest_backups_that_are_not_good() -> None:
    """The representative of a day is not one that does not restore."""
    bad = backups_of(0, drill="failed") + backups_of(1, damage="data.zst is missing")
    plan = plan_retention(bad + backups_of(2, 3, 4), KeepRules(daily=1), now=NOW)
    assert kept_days(plan) == [2]
    assert plan.removed[-1].reasons == ("no rule keeps it", "its last drill failed")
    assert "the newest 2 of the series can't be relied on" in plan.remarks[0]
    plan = plan_retention(bad + backups_of(2, 3, 4), KeepRules(last=2), now=NOW)
    assert kept_days(plan) == [0, 1, 2, 3]


def test_an_older_proved_backup() -> None:
    proved = backups_of(5, 9, drill="proved")
    plan = plan_retention([*backups_of(0, 1, 2), *proved], KeepRules(last=1), now=NOW)
    assert kept_days(plan) == [0, 5]
    assert plan.kept[0].reasons == ("the newest backup that a drill proved",)
    plan = plan_retention([*backups_of(0, 1, 2), *proved], KeepRules(last=1), now=NOW, unproved_ok=True)
    assert kept_days(plan) == [0]


def test_a_clock_that_was_set_back() -> None:
    """What is dated in the future takes nobody's place, and it is said."""
    future = backup_id(NOW + dt.timedelta(hours=1))
    plan = plan_retention([BackupFacts(id=future), *backups_of(0, 1, 2, 3)], KeepRules(last=2), now=NOW)
    assert [backup.id for backup in plan.kept][-1] == future
    assert len(plan.kept) == 3
    assert future in plan.remarks[0]
    assert "future" in plan.kept[-1].reasons[0]
    years_back = plan_retention(backups_of(0, 1, 2, 3), KeepRules(last=1), now=NOW - 365 * DAY)
    assert years_back.removed == ()
    assert len(years_back.remarks) == 4


def test_within_is_by_age() -> None:
    plan = plan_retention(backups_of(0, 1, 2, 3, 4), KeepRules(within=2 * 86400.0), now=NOW)
    assert kept_days(plan) == [0, 1]


def test_the_zone_decides_what_a_day_is() -> None:
    """23:30 and 00:30 in Berlin are two days there, and one in UTC."""
    night = [BackupFacts(id="20261119T223000Z"), BackupFacts(id="20261119T233000Z"), BackupFacts(id="20261120T223000Z")]
    assert len(plan_retention(night, KeepRules(daily=2), now=NOW).kept) == 2
    berlin = plan_retention(night, KeepRules(daily=3), now=NOW, zone=zoneinfo.ZoneInfo("Europe/Berlin"))
    assert [backup.id for backup in berlin.kept] == ["20261119T223000Z", "20261120T223000Z"]
    assert [backup.id for backup in plan_retention(night, KeepRules(daily=3), now=NOW).kept] == [
        "20261119T233000Z",
        "20261120T223000Z",
    ]


def test_the_guard_of_a_series() -> None:
    assert removal_limit(MaxDelete(), 4) == 3
    assert removal_limit(MaxDelete(), 6) == 3
    assert removal_limit(MaxDelete(), 100) == 50
    assert removal_limit(MaxDelete(files=7), 100) == 7
    assert removal_limit(MaxDelete(percent=20.0), 100) == 20
    plan = plan_retention(backups_of(*range(10)), KeepRules(last=4), now=NOW)
    (refusal,) = judge_retention("s3://b/s", plan, plan.removed, MaxDelete())
    assert "6 backups" in refusal.what
    assert "--max-delete 6" in refusal.todo
    assert [name.partition(" ")[0] for name in refusal.deletes] == [backup.id for backup in plan.removed]
    assert judge_retention("s3://b/s", plan, plan.removed, MaxDelete(files=6)) == ()
    nothing = plan_retention(backups_of(0, damage="gone"), KeepRules(last=1), now=NOW)
    assert judge_retention("s", nothing, nothing.removed, MaxDelete()) == (), "nothing would go: no reason to refuse"


def test_holds_in_words() -> None:
    assert hold_in_words(None, NOW).startswith("on hold")
    assert "without end" in hold_in_words(a_hold(), NOW)
    assert "until 2026-11-22" in hold_in_words(a_hold("2026-11-22T00:00:00+02:00"), NOW)
    assert hold_in_words(a_hold("2026-11-21T13:00:00+02:00"), NOW) == ""
    assert hold_in_words(a_hold("2026-11-21T12:00:00Z"), NOW) == "", "its end is not part of it"
    audit = msgspec.structs.replace(a_hold(), by="eve", reason="audit")
    assert hold_in_words(audit, NOW) == "on hold without end by eve: audit"


def test_the_record_of_a_hold() -> None:
    record = msgspec.structs.replace(a_hold("2026-12-01T00:00:00Z"), reason="Prüfung", by="root", host="db7")
    assert hold_format.decode(hold_format.encode(record), where="x") == record
    assert hold_format.decode(hold_format.encode(a_hold()), where="x").until is None
    newer = hold_format.encode(record).replace(b'"1.0"', b'"1.7"').replace(b"{", b'{"later": [1],', 1)
    assert hold_format.decode(newer, where="x").reason == "Prüfung"
    for wrong in (
        b"",
        b"{}",
        b"[" * 100_000,
        hold_format.encode(record)[:-9],
        hold_format.encode(record).replace(b'"1.0"', b'"2.0"'),
        hold_format.encode(record).replace(b"backhaul-hold", b"other"),
        hold_format.encode(a_hold("tomorrow")),
        hold_format.encode(a_hold("2026-12-01T00:00:00")),
    ):
        with pytest.raises(FormatError, match="x is not the record of a hold"):
            hold_format.decode(wrong, where="x")
    key = hold_format.hold_key("20261121T020000Z", NOW)
    assert key == "20261121T020000Z/hold-20261121T120000Z.json"
    assert parse_key(key) == ObjectName("record", "20261121T020000Z", record="hold")
    assert parse_key(key.replace("hold", "drill")) == ObjectName("record", "20261121T020000Z", record="drill")
    assert parse_key("20261121T020000Z/hold-x.json") is None
