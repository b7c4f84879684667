"""The first config: whatever it is made of, it is read back as it was meant."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backhaul.errors import UsageError
from backhaul.formats.config import Config, read_config
from backhaul.formats.first_config import (
    KEPT,
    FirstChannel,
    FirstConfig,
    FirstSource,
    Mark,
    channel_of,
    differences,
    first_config,
    job_names,
    jobs_of,
    made_by_init,
    parse_name,
    parse_start,
)
from backhaul.model.secret import FILE, Secret

pytestmark = pytest.mark.unit

AWKWARD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40)
NAMES = st.sampled_from(
    ["plain", "two words", "q\"uo'te", "back\\slash", "tab\tnewline\n[jobs.x]", "ünï 数", "\x7f\x1b", "#", "all"]
)
TEXTS = AWKWARD | NAMES


def a_config(**changes: Any) -> FirstConfig:
    source = FirstSource(url="postgresql:///orders", job="orders", drilled=True)
    values: dict[str, Any] = {"name": "n", "store_name": "n", "store": "s3://b/p", "sources": (source,), **changes}
    return FirstConfig(**values)


def read(text: str) -> Config:
    return read_config([("first.toml", text)], "Europe/Berlin")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(TEXTS, min_size=1, max_size=4), TEXTS, st.dictionaries(st.sampled_from(["PGHOST", "PGUSER"]), TEXTS), TEXTS
)
def test_it_is_read_back_as_it_was_meant(labels: list[str], place: str, environment: dict[str, str], file: str) -> None:
    urls = [f"/{label}" for label in labels]
    names = job_names(labels)
    store = f"/{place}".replace("://", ":/")
    config = a_config(
        store=store,
        sources=tuple(
            FirstSource(
                url=url, job=name, drilled=number % 2 == 0, environment=environment, secrets={"PGPASSWORD": f"/{file}"}
            )
            for number, (url, name) in enumerate(zip(urls, names, strict=True))
        ),
        channels={"slack": (FirstChannel(kind="slack", hidden=("url", "https://x/y")), f"/{file}")},
        start="22:30",
        environment={"AWS_CA_BUNDLE": f"/{place}"},
    )
    text = first_config(config)
    found = read(text)
    assert found.stores["n"].path == store
    pushes = [job for job in found.jobs.values() if job.kind == "push"]
    assert [job.values["from"] for job in pushes] == urls
    for job in pushes:
        assert job.values["to"] == (f"n:{job.name}",)
        assert job.values["environment"] == {
            "AWS_CA_BUNDLE": f"/{place}",
            **environment,
            "PGPASSWORD": Secret(FILE, (f"/{file}",)),
        }
        assert job.values["window"]["start"] == (22 * 60 + 30,)
        assert job.values["max_age"] == 26 * 3600
        pruned = found.jobs[f"prune-{job.name}"].values
        assert {key: pruned[key] for key in KEPT} == KEPT
        assert pruned["window"]["start"] == (5 * 60 + 30,)
    assert all(job.values["notify"] == ("slack",) for job in found.jobs.values())
    assert found.channels["slack"].settings["url"] == Secret(FILE, (f"/{file}",))
    drills = names[::2]
    assert {job.name for job in found.jobs.values() if job.kind == "drill"} == {f"drill-{name}" for name in drills}
    assert jobs_of(text) == {job.name: job.kind for job in found.jobs.values()}
    assert made_by_init(text) == Mark("n", "auto")
    assert "https://x/y" not in text


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS, max_size=6), st.lists(st.sampled_from(["a", "A", "prune-a", "drill-b", "db"]), max_size=3))
def test_names_of_jobs_are_names_and_no_two_alike(labels: list[str], taken: list[str]) -> None:
    names = job_names(labels, taken)
    whole = [each for name in names for each in (name, f"prune-{name}", f"drill-{name}")]
    assert len({name.lower() for name in (*whole, *taken)}) == len(whole) + len({name.lower() for name in taken})
    for name in names:
        assert parse_name(name[:48]) and name not in ("all", "with", "tick")


def test_names_say_what_they_are_of() -> None:
    assert job_names(["orders", "my shop", "2024", "all", "ORDERS", "prune-orders", "数"]) == [
        "orders",
        "my-shop",
        "db-2024",
        "all-2",
        "ORDERS-2",
        "prune-orders-3",
        "db",
    ]


def test_a_store_of_the_config_is_used_as_it_is() -> None:
    for store, expected in (("offsite:", "offsite:orders"), ("offsite:db7", "offsite:db7/orders")):
        text = first_config(a_config(store=store))
        found = read_config([("there", '[stores.offsite]\nurl = "s3://b/p"\n'), ("first", text)], "UTC")
        assert found.jobs["orders"].values["to"] == (expected,)
        assert set(found.stores) == {"offsite"}


def test_settings_of_the_store_come_from_the_shell() -> None:
    known = {"endpoint": "http://127.0.0.1:1", "region": "x", "credentials-file": '/etc/b "q"/keys'}
    store = read(first_config(a_config(settings=known))).stores["n"]
    assert (store.endpoint, store.region, store.credentials_file) == tuple(known.values())


def test_what_others_have_as_defaults_stays_theirs() -> None:
    text = first_config(a_config(channels={"mail": (FirstChannel(kind="webhook", hidden=("url", "x")), "/f")}))
    assert set(tomllib.loads(text)) == {"stores", "notify", "jobs"}


def test_nobody_is_told_only_where_that_was_said() -> None:
    text = first_config(a_config())
    assert "notify" not in read(text).jobs["orders"].values
    assert "Nobody is told" in text


def test_many_databases_do_not_begin_at_once() -> None:
    def jitter(count: int) -> float:
        names = job_names(["d"] * count)
        text = first_config(
            a_config(sources=tuple(FirstSource(url="dir:///d", job=name, drilled=False) for name in names))
        )
        return float(read(text).jobs[names[0]].values["window"]["jitter"])

    assert [jitter(count) / 60 for count in (1, 3, 8, 40)] == [15, 15, 40, 120]


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(UsageError) as caught:
        first_config(a_config(store="/\udcff"))
    assert caught.value.why and caught.value.todo


def test_what_is_asked_for_is_compared_with_what_is_there() -> None:
    text = first_config(a_config())
    assert differences(text, sources=[], store="", start="") == []
    assert differences(text, sources=["postgresql:///orders"], store="s3://b/p", start="02:00") == []
    assert len(differences(text, sources=["postgresql:///other"], store="s3://b/other", start="03:00")) == 3
    named = first_config(a_config(store="offsite:db7"))
    assert differences(named, sources=[], store="offsite:db7", start="") == []


@pytest.mark.parametrize(
    "text", ["", "# Made by: somebody", "[jobs]\n# Made by: backhaul init --name x --schedule auto"]
)
def test_configs_of_others_are_not_ours(text: str) -> None:
    assert made_by_init(text) is None


@pytest.mark.parametrize(
    ("text", "kind", "settings", "hidden"),
    [
        ("dba@example.com", "mail", {"sendmail": "/usr/sbin/sendmail"}, None),
        ("https://hooks.slack.com/services/T/B/x", "slack", {}, "url"),
        ("https://chat.example.com/hooks/abc", "slack", {}, "url"),
        ("https://ntfy.sh/db7", "ntfy", {"server": "https://ntfy.sh"}, "topic"),
        ("http://ntfy.example.com:81/db7", "ntfy", {"server": "http://ntfy.example.com:81"}, "topic"),
        ("https://ntfy.sh/a/b", "webhook", {}, "url"),
        ("https://hc-ping.com/2f7c", "healthchecks", {}, "url"),
        ("https://hc.example.com/ping/2f7c", "healthchecks", {}, "url"),
        ("https://example.com/any?x=1", "webhook", {}, "url"),
    ],
)
def test_services_are_known_by_their_urls(text: str, kind: str, settings: dict[str, str], hidden: str | None) -> None:
    channel = channel_of(text, host="db7.example.com", sendmail="/usr/sbin/sendmail", smtp_host="")
    assert channel.kind == kind
    assert settings.items() <= dict(channel.settings).items()
    assert (channel.hidden[0] if channel.hidden else None) == hidden
    found = read(first_config(a_config(channels={"c": (channel, "/file")})))
    assert found.channels["c"].kind == kind


@pytest.mark.parametrize(
    ("smtp_host", "host", "port"),
    [
        ("mail", "mail", 25),
        ("mail:2525", "mail", 2525),
        ("[::1]:26", "::1", 26),
        ("::1", "::1", 25),
        ("", "localhost", 25),
    ],
)
def test_mail_goes_by_the_server_that_is_named(smtp_host: str, host: str, port: int) -> None:
    sendmail = "/usr/sbin/sendmail" if smtp_host else ""
    channel = channel_of("a@b.c", host="h\n", sendmail=sendmail, smtp_host=smtp_host)
    found = read(first_config(a_config(channels={"c": (channel, "")}))).channels["c"].settings
    assert (found["host"], found["port"], found["from"]) == (host, port, "backhaul@localhost")


@pytest.mark.parametrize("text", ["nobody at all", "https://", "https://u:p@h/x", "ftp://h/x", "a@b, c@d"])
def test_who_can_not_be_told_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        channel_of(text, host="h", sendmail="", smtp_host="")
    assert caught.value.why and caught.value.todo and ":p@" not in str(caught.value)


@pytest.mark.parametrize(("text", "expected"), [("2:05", "02:05"), ("23:59", "23:59"), (" 00:00 ", "00:00")])
def test_times(text: str, expected: str) -> None:
    assert parse_start(text) == expected


@pytest.mark.parametrize("text", ["24:00", "2", "*:15", "2:5", ""])
def test_no_times(text: str) -> None:
    with pytest.raises(UsageError):
        parse_start(text)
