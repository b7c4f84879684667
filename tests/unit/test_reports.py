"""The reports of a good night, a bad night and a first night, as people get them; none says other than the rest."""

from __future__ import annotations

import datetime as dt
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest

from backhaul.model import job as jobs
from backhaul.model.job import Expectations, Hold, JobCard, RunRecord
from backhaul.model.schedule import Window
from backhaul.model.verdict import Delivery, Overview, Verdict
from backhaul.planning.alerts import CHANGED, RECOVERED
from backhaul.planning.verdicts import judge
from backhaul.reporting import check, messages
from backhaul.reporting.html import report_html
from backhaul.reporting.metrics import metrics_text
from backhaul.reporting.text import report_text
from backhaul.reporting.why import why_text
from backhaul.reporting.words import subject

pytestmark = pytest.mark.unit

GOLDEN = Path(__file__).with_name("reports")
ZONE = "Europe/Berlin"
MORNING = dt.datetime.fromisoformat("2026-11-21T08:00:00+01:00")
ORDERS = JobCard(
    name="orders",
    host="db7",
    kind=jobs.PUSH,
    what="push postgresql:///orders to offsite:db7/orders",
    window=Window(starts=(1320,), length=5.5 * 3600, days=(0, 1, 2, 3, 4, 5), jitter=900, timezone=ZONE),
    expectations=Expectations(max_age=26 * 3600, least=0.5, most=2.0),
    known_since="2026-01-01T00:00:00Z",
    places=("offsite:db7/orders",),
    jitter_of="db7 orders",
)
MIRROR = JobCard(
    name="chunks",
    host="db7",
    kind=jobs.MIRROR,
    what="mirror /backups to offsite:chunks",
    window=Window(starts=(1380,), length=5.5 * 3600, at_end="stop-new", timezone=ZONE),
    known_since="2026-01-01T00:00:00Z",
    places=("offsite:chunks",),
    jitter_of="db7 chunks",
)
DRILL = JobCard(
    name="drill-orders",
    host="db7",
    kind=jobs.DRILL,
    what="drill offsite:db7/orders",
    window=Window(starts=(360,), length=3600, days=(5,), timezone=ZONE),
    known_since="2026-01-01T00:00:00Z",
    places=("offsite:db7/orders",),
    jitter_of="db7 drill-orders",
)
KEEP = JobCard(
    name="keep-orders",
    host="db7",
    kind=jobs.PRUNE,
    what="prune offsite:db7/orders",
    window=Window(starts=(420,), length=3600, timezone=ZONE),
    known_since="2026-01-01T00:00:00Z",
    places=("offsite:db7/orders",),
    jitter_of="db7 keep-orders",
)
CARDS = (ORDERS, MIRROR, DRILL, KEEP)


def run(card: JobCard, start: str, seconds: float, state: str = jobs.OK, **fields: Any) -> RunRecord:
    began = dt.datetime.fromisoformat(start)
    given: dict[str, Any] = {
        "format": "backhaul-run",
        "version": "1.0",
        "id": f"{began.astimezone(dt.UTC):%Y%m%dT%H%M%SZ}-1a2b",
        "job": card.name,
        "kind": card.kind,
        "host": "db7",
        "trigger": jobs.SCHEDULED,
        "started": start,
        "finished": (began + dt.timedelta(seconds=seconds)).isoformat() if state != jobs.RUNNING else "",
        "seconds": seconds,
        "state": state,
        "attempts": 1,
        **fields,
    }
    return RunRecord(**given)


def push(start: str, size: int = 43_200_000_000, **fields: Any) -> RunRecord:
    backup = start.replace("-", "").replace(":", "")[:15] + "Z"
    return run(ORDERS, start, 723, backups=(backup,), raw_size=size, stored_size=size // 4, **fields)


FRIDAY_PUSH = push("2026-11-20T22:06:00+01:00")
FRIDAY_MIRROR = run(MIRROR, "2026-11-20T23:00:00+01:00", 5412, raw_size=102_000_000_000, stored_size=18_700_000_000)
DRILLED = run(DRILL, "2026-11-21T06:00:00+01:00", 1260, proved=True, proved_at="2026-11-21T05:21:00Z")
KEPT = run(KEEP, "2026-11-21T07:00:00+01:00", 4, removed=2)


def night(runs: dict[str, list[RunRecord]], holds: tuple[Hold, ...] = (), **fields: Any) -> Overview:
    verdicts = [judge(card, runs.get(card.name, []), holds, MORNING) for card in CARDS]
    return overview(verdicts, **fields)


def overview(verdicts: list[Verdict], **fields: Any) -> Overview:
    from backhaul.model.verdict import STATES

    verdicts.sort(key=lambda verdict: (STATES.index(verdict.state), verdict.card.name))
    return Overview(host="db7", at=MORNING.isoformat(), verdicts=tuple(verdicts), **fields)


def good_night() -> Overview:
    return night({"orders": [FRIDAY_PUSH], "chunks": [FRIDAY_MIRROR], "drill-orders": [DRILLED], "keep-orders": [KEPT]})


def bad_night() -> Overview:
    failed = run(
        ORDERS,
        "2026-11-20T22:06:00+01:00",
        31,
        jobs.FAILED,
        why="The producer of the stream failed: it exited with status 1",
        exit_status=1,
        attempts=3,
        last_words='pg_dump: error: connection to server on socket "/run/postgresql/.s.PGSQL.5432" failed: FATAL:  '
        "the database system is in recovery mode",
    )
    stopped = run(
        MIRROR,
        "2026-11-20T23:00:00+01:00",
        19_800,
        jobs.STOPPED,
        why="The window ended before the mirror was complete: 41.0 GB left in 68 files, about 2 more nights like this",
        raw_size=102_000_000_000,
        stored_size=61_000_000_000,
    )
    verdicts = night(
        {
            "orders": [failed, push("2026-11-19T22:06:00+01:00")],
            "chunks": [stopped, run(MIRROR, "2026-11-18T23:00:00+01:00", 19_000)],
            "drill-orders": [run(DRILL, "2026-11-14T06:00:00+01:00", 1200, proved=True)],
            "keep-orders": [KEPT],
        }
    ).verdicts
    return overview(
        list(verdicts),
        undelivered=(
            Delivery(channel="ops", at="2026-11-20T21:07:00Z", subject="FAILED orders", job="orders", error="no route"),
        ),
    )


def first_night() -> Overview:
    cards = [msgspec.structs.replace(card, known_since="2026-11-21T06:59:00Z") for card in CARDS]
    return overview([judge(card, [], (), MORNING) for card in cards])


NIGHTS = {"good": good_night, "bad": bad_night, "first": first_night}


@pytest.mark.parametrize("name", NIGHTS)
def test_the_report_of_a_night(name: str) -> None:
    text = report_text(NIGHTS[name]())
    assert text == (GOLDEN / f"{name}-night.txt").read_text()
    lines = text.splitlines()
    assert lines[0] == subject(NIGHTS[name]())
    assert len(lines) <= 40, "one screen"
    assert all(len(line) <= 100 for line in lines[1:])


@pytest.mark.parametrize("name", NIGHTS)
def test_the_page_of_a_night(name: str) -> None:
    page = report_html(NIGHTS[name]())
    assert page == (GOLDEN / f"{name}-night.html").read_text()

    class Checker(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag not in ("meta", "br"):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert "http" not in page
    assert "<script" not in page


def test_what_a_program_says_can_not_write_into_the_page() -> None:
    evil = run(ORDERS, "2026-11-20T22:06:00+01:00", 1, jobs.FAILED, why="<b>&", last_words="</pre><script>alert(1)")
    page = report_html(overview([judge(ORDERS, [evil], (), MORNING)]))
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_all_reports_say_the_same() -> None:
    for make in NIGHTS.values():
        found = make()
        states = {verdict.card.name: verdict.state for verdict in found.verdicts}
        text, page, metrics = report_text(found), report_html(found), metrics_text(found)
        document = json.loads(msgspec.json.encode(messages.report_document(found)))
        for name, state in states.items():
            assert re.search(rf"^  {state}\s+{name}\b", text, re.MULTILINE | re.IGNORECASE)
            assert re.search(rf">{state}</td><td[^>]*><strong>{name}</strong>", page)
            assert f'backhaul_job_state{{job="{name}",' in metrics
            assert re.search(rf'backhaul_job_state{{job="{name}",.*state="{state}"}} 1$', metrics, re.MULTILINE)
        assert {each["card"]["name"]: each["state"] for each in document["verdicts"]} == states
        assert document["subject"] == text.splitlines()[0]
        # check, nagios and the report come of one value.
        bad = {"failed", "overdue"} & set(states.values())
        assert check.exit_status(found) == (
            1 if bad else 3 if {"incomplete", "never run"} & set(states.values()) else 0
        )
        assert check.nagios_text(found).split(" - ")[1].startswith(subject(found).split(" - ")[0][:40])


def test_nagios() -> None:
    assert check.nagios_status(good_night()) == 0
    assert check.nagios_text(good_night()).startswith("BACKHAUL OK - ")
    assert check.nagios_status(bad_night()) == 2
    assert check.nagios_status(first_night()) == 1
    assert check.nagios_status(Overview(host="db7", at=MORNING.isoformat(), verdicts=())) == 3
    line = check.nagios_text(bad_night()).splitlines()[0]
    assert line.count("|") == 1
    assert "'failed'=1" in line


def test_the_metrics_can_be_read() -> None:
    for line in metrics_text(bad_night()).splitlines():
        assert re.fullmatch(
            r'# (HELP|TYPE) \w+ .+|backhaul_\w+(\{(\w+="([^"\\\n]|\\.)*",?)*\})? -?\d+(\.\d+)?(e[+-]?\d+)?', line
        ), line


def test_why() -> None:
    verdict = next(each for each in bad_night().verdicts if each.card.name == "orders")
    text = why_text(verdict, MORNING, ["What begins it (systemd) is installed.", "Its lock is free."])
    assert text == (GOLDEN / "why.txt").read_text()


def test_an_alert_and_its_recovery() -> None:
    found = bad_night()
    verdict = found.verdicts[0]
    message = messages.alert(found, verdict, CHANGED)
    assert message.subject.startswith("FAILED orders: ")
    assert message.failure
    assert "recovery mode" in message.text
    assert "chunks" not in message.text
    good = judge(ORDERS, [FRIDAY_PUSH], (), MORNING)
    recovered = messages.alert(good_night(), good, RECOVERED)
    assert recovered.subject == "RECOVERED orders: ok - db7"
    assert not recovered.failure
