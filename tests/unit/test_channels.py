"""Channels as the config writes them, secrets, and what can be said of a channel without a server."""

from __future__ import annotations

import email
import email.policy
import tomllib
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped, unused-ignore]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backhaul.formats.channel_settings import (
    CHANNEL_HELP,
    CHANNEL_SETTINGS,
    channel_schema,
    parse_address,
    read_channel,
)
from backhaul.formats.secret import describe_secret, read_secret
from backhaul.jobs.channel_base import Masks, clean_message, cut
from backhaul.jobs.channel_http import SLACK_LIMIT, slack_text
from backhaul.jobs.channel_mail import build_mail
from backhaul.model.channel import CHANNEL_KINDS, Channel
from backhaul.model.secret import Secret
from backhaul.model.verdict import Message
from backhaul.operations.secrets import exposure

pytestmark = pytest.mark.unit

GOOD = {
    "mail": """
kind = "mail"
host = "smtp.example.com"
user = "backhaul"
password = { file = "/etc/backhaul/smtp" }
from = "Backhaul <backup@example.com>"
to = ["dba@example.com", "root"]
""",
    "webhook": """
kind = "webhook"
url = "https://example.com/hook"
method = "PUT"
headers = { X-Team = "db", Authorization = { env = "HOOK" } }
timeout = "1m"
""",
    "slack": """
kind = "slack"
url = { credential = "slack" }
""",
    "ntfy": """
kind = "ntfy"
topic = "backups"
token = { command = ["pass", "ntfy"] }
ca_file = "/etc/ssl/own.pem"
""",
    "healthchecks": """
kind = "healthchecks"
url = "https://hc-ping.com/0d338dcc-a054-11ec-b909-0242ac120002"
""",
    "command": """
kind = "command"
command = ["/usr/local/bin/tell", "db"]
""",
    "apprise": """
kind = "apprise"
url = ["json://127.0.0.1:1", { file = "~/apprise" }]
""",
}


def read(text: str, name: str = "ops") -> tuple[Channel | None, dict[str, str]]:
    problems: list[tuple[str, str]] = []
    channel = read_channel(name, tomllib.loads(text), lambda key, reason: problems.append((key, reason)))
    assert (channel is None) == bool(problems)
    return channel, dict(problems)


def good(text: str) -> Channel:
    channel, problems = read(text)
    assert problems == {}
    assert channel is not None
    return channel


@pytest.mark.parametrize("kind", CHANNEL_KINDS)
def test_each_kind_is_read_and_fits_its_schema(kind: str) -> None:
    channel = good(GOOD[kind])
    assert channel.kind == kind
    assert channel.number("timeout") == (60.0 if kind == "webhook" else 20.0)
    jsonschema.validate(tomllib.loads(GOOD[kind]), channel_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**tomllib.loads(GOOD[kind]), "colour": "red"}, channel_schema())
    for key, setting in CHANNEL_SETTINGS[kind].items():
        assert setting.words and setting.type.words
        if setting.required:
            table = {name: value for name, value in tomllib.loads(GOOD[kind]).items() if name != key}
            problems: list[str] = []
            assert read_channel("ops", table, lambda key, reason, p=problems: p.append(key)) is None  # type: ignore[misc]
            assert problems == [key]
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(table, channel_schema())
    assert set(CHANNEL_HELP) == set(CHANNEL_SETTINGS) == set(CHANNEL_KINDS)


def test_values_arrive_as_they_were_meant() -> None:
    mail = good(GOOD["mail"])
    assert mail.settings["password"] == Secret("file", ("/etc/backhaul/smtp",))
    assert (mail.settings["port"], mail.settings["tls"]) == (587, "starttls")
    assert mail.settings["to"] == ("dba@example.com", "root")
    assert good(GOOD["webhook"]).pairs("headers") == (("X-Team", "db"), ("Authorization", Secret("env", ("HOOK",))))
    assert good(GOOD["ntfy"]).text("ca-file") == "/etc/ssl/own.pem"
    assert good(GOOD["ntfy"]).hidden("server") == "https://ntfy.sh"
    assert good(GOOD["apprise"]).several("url") == ("json://127.0.0.1:1", Secret("file", ("~/apprise",)))


@pytest.mark.parametrize(
    ("lines", "port", "tls"),
    [
        ("", 25, "none"),
        ("port = 465", 465, "implicit"),
        ("port = 587", 587, "starttls"),
        ("port = 2525", 2525, "none"),
        ('tls = "implicit"', 465, "implicit"),
        ('tls = "starttls"', 587, "starttls"),
        ('tls = "none"\nport = 587', 587, "none"),
    ],
)
def test_port_and_tls_of_mail_follow_each_other(lines: str, port: int, tls: str) -> None:
    mail = good(f'kind = "mail"\nhost = "h"\nfrom = "a@b.c"\nto = "d@e.f"\n{lines}')
    assert (mail.settings["port"], mail.settings["tls"]) == (port, tls)


def test_a_password_crosses_the_network_readable_only_where_that_was_said() -> None:
    mail = 'kind = "mail"\nfrom = "a@b.c"\nto = "d@e.f"\nuser = "u"\npassword = { env = "P" }\nport = 25\n'
    assert set(read(mail + 'host = "relay"')[1]) == {"tls"}
    good(mail + 'host = "relay"\ntls = "none"')
    good(mail + 'host = "localhost"')


def test_every_problem_is_told_at_once() -> None:
    channel, problems = read("""
kind = "mail"
hsot = "smtp.example.com"
port = "587"
tls = "ssl"
from = "nobody at all"
to = ["a@b.c", "x y"]
timeout = 20
ca_file = "own.pem"
ca-file = "/own.pem"
topic = "x"
password = "hunter2hunter2"
""")
    assert channel is None
    assert set(problems) == {
        "hsot", "host", "port", "tls", "from", "to", "timeout", "ca_file", "ca-file", "topic", "password", "user",
    }  # fmt: skip
    assert "did you mean host?" in problems["hsot"]
    assert "'x y'" in problems["to"]
    assert "twice" in problems["ca-file"]
    assert "ntfy" in problems["topic"]
    assert "file" in problems["password"] and "hunter2" not in str(problems)


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("", "kind", "missing"),
        ('kind = "slakc"', "kind", "did you mean slack?"),
        ('kind = "pager"', "kind", "known are mail"),
        ("kind = 3", "kind", "not known"),
        ('kind = "webhook"\nurl = "example.com/x"', "url", "http"),
        ('kind = "webhook"\nurl = "ftp://example.com/x"', "url", "http"),
        ('kind = "webhook"\nurl = "https://example.com:99999/x"', "url", "http"),
        ('kind = "webhook"\nurl = "https://exämple.com/x y"', "url", "ASCII"),
        ('kind = "webhook"\nurl = "https://u:hunter2@example.com/x"', "url", "password"),
        ('kind = "webhook"\nurl = ["https://example.com"]', "url", "kept"),
        ('kind = "webhook"\nurl = "https://a.b"\nheaders = { Authorization = "Bearer hunter2" }', "headers", "belong"),
        ('kind = "webhook"\nurl = "https://a.b"\nheaders = { "X Y" = "a" }', "headers", "'X Y'"),
        ('kind = "webhook"\nurl = "https://a.b"\nheaders = { X-Y = "a\\nZ: b" }', "headers", "one line"),
        ('kind = "webhook"\nurl = "https://a.b"\nheaders = { Host = "a" }', "headers", "'Host'"),
        ('kind = "ntfy"\ntopic = "a b"', "topic", "letters"),
        ('kind = "ntfy"\ntopic = "a"\ntoken = "tk_hunter2"', "token", "belong"),
        ('kind = "command"\ncommand = "tell db"', "command", "no shell"),
        ('kind = "command"\ncommand = []', "command", "no shell"),
        ('kind = "apprise"\nurl = "nothing"', "url", "SERVICE://"),
        ('kind = "apprise"\nurl = []', "url", "at least one"),
        ('kind = "apprise"\nurl = "mailto://u:hunter2@example.com"', "url", "password"),
        ('kind = "slack"\nurl = "https://a.b"\ntimeout = "0s"', "timeout", "more than 0s"),
        ('kind = "slack"\nurl = "https://a.b"\ntimeout = "1h"', "timeout", "at most"),
        ('kind = "mail"\nfrom = "a@b"\nto = "c@d"\nsendmail = "/x"\nhost = "h"', "host", "sendmail"),
        ('kind = "mail"\nfrom = "a@b\\nBcc: x@y"\nto = "c@d"\nhost = "h"', "from", "one line"),
        ('kind = "mail"\nfrom = "a@b"\nto = "c@d"\nhost = "h:25"', "host", "port"),
    ],
)
def test_mistakes_are_named(text: str, key: str, words: str) -> None:
    channel, problems = read(text)
    assert channel is None
    assert list(problems) == [key]
    assert words in problems[key]
    assert "hunter2" not in problems[key]


def test_names_and_tables_are_checked() -> None:
    assert read(GOOD["slack"], "a b")[1].keys() == {""}
    told: list[tuple[str, str]] = []
    assert read_channel("ops", "https://example.com", lambda *problem: told.append(problem)) is None
    assert [key for key, _ in told] == [""]


@given(st.dictionaries(st.text(max_size=8), st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2), max_leaves=4), max_size=3), st.sampled_from(CHANNEL_KINDS))  # fmt: skip
def test_no_mistake_raises(extra: dict[str, Any], kind: str) -> None:
    for key in CHANNEL_SETTINGS[kind]:
        for value in extra.values():
            problems: list[str] = []
            channel = read_channel("n", {**extra, key: value, "kind": kind}, lambda k, r, p=problems: p.append(k))  # type: ignore[misc]
            assert (channel is None) == bool(problems)


@pytest.mark.parametrize("text", ["a@b.c", "Backhaul <a@b.c>", "Jörg <a@b.c>", "root", "a.b+c@d", "<a@b.c>"])
def test_mail_addresses(text: str) -> None:
    assert parse_address(text) is not None


@pytest.mark.parametrize(
    "text", ["", "a@", "@b", "a b@c", "a@b, c@d", "<a@b", "a@b@c", "a@b\nBcc: x@y", "x <y", "a@b>"]
)
def test_what_is_no_mail_address(text: str) -> None:
    assert parse_address(text) is None


# -- secrets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("hunter2", "belong"),
        (7, "where"),
        ({}, "one place"),
        ({"file": "/a", "env": "B"}, "one place"),
        ({"flie": "/a"}, "did you mean file?"),
        ({"file": "a"}, "whole path"),
        ({"file": ["/a"]}, "text"),
        ({"env": "A B"}, "variable"),
        ({"command": "pass smtp"}, '["pass", ...]'),
        ({"command": []}, "list"),
        ({"credential": "../smtp"}, "not a path"),
    ],
)
def test_what_is_no_reference_to_a_secret(value: Any, words: str) -> None:
    told: list[str] = []
    assert read_secret(value, told.append) is None
    assert len(told) == 1 and words in told[0] and "hunter2" not in told[0]


def test_who_else_can_read_a_secret(tmp_path: Path) -> None:
    file = tmp_path / "smtp"
    file.write_text("x")
    file.chmod(0o640)
    assert exposure(Secret("file", (str(file),))) == ""
    file.chmod(0o644)
    assert "every account" in exposure(Secret("file", (str(file),)))
    assert exposure(Secret("file", ("/does/not/exist",))) == exposure(Secret("env", ("X",))) == ""


def test_a_commands_own_secrets_are_not_described() -> None:
    assert describe_secret(Secret("command", ("fetch", "--token", "hunter2"))) == "the command fetch --token '***'"


# -- messages --------------------------------------------------------------------------------------------


def test_masks_know_the_shapes_of_a_secret() -> None:
    masks = Masks()
    masks.add("pa ss/wörd")
    masks.add_url("https://us%40er:geheim99@h.example/services/T000000/B000000/abcdefgh?key=topsecret1")
    shown = masks(
        "pa ss/wörd pa%20ss/w%C3%B6rd pa+ss%2Fw%C3%B6rd cGEgc3Mvd8O2cmQ= geheim99 us@er abcdefgh "
        "/services/T000000/B000000/abcdefgh topsecret1 https://h.example"
    )
    assert shown.replace("***", "").split() == ["/", "https://h.example"]


def test_messages_are_made_fit_for_every_channel() -> None:
    clean = clean_message(
        Message(subject="failed:\r\nBcc: x@y\u2028 db7\udcff\0", text="a\0b\udcffc\n", job="a\nb", state="never\nrun")
    )
    assert clean.subject == "failed: Bcc: x@y db7\\udcff\\x00"
    assert clean.text == "a\\x00b\\udcffc\n"
    assert (clean.job, clean.state) == ("a b", "never run")
    assert clean_message(Message(subject="\n", text="")).subject
    assert len(clean_message(Message(subject="x" * 5000, text="")).subject) == 1000


@given(st.text(max_size=300), st.integers(20, 200), st.booleans())
def test_cut_texts_fit(text: str, limit: int, keep_end: bool) -> None:
    text = text.encode(errors="replace").decode()
    shown = cut(text, limit, keep_end=keep_end)
    assert len(shown.encode()) <= limit
    assert (shown == text) == (len(text.encode()) <= limit)


@given(st.text(alphabet="a&<>`\n*é", max_size=9000), st.text(alphabet="a&*", max_size=900))
def test_slacks_limit_holds_and_no_entity_is_cut(text: str, subject: str) -> None:
    import html

    shown = slack_text(subject, text)
    assert len(shown) <= SLACK_LIMIT
    assert "<" not in shown and ">" not in shown
    assert html.escape(html.unescape(shown), quote=False) == shown
    assert shown.count("```") in (0, 2)


@given(st.text(max_size=1200), st.text(max_size=3000))
def test_any_message_becomes_a_mail_of_short_ascii_lines(subject: str, text: str) -> None:
    message = clean_message(Message(subject=subject, text=text, html=f"<p>{text}"))
    content = build_mail(message, "Jörg <a@b.c>", ("d@e.f", "root")).as_bytes()
    assert content.isascii()
    assert max(len(line) for line in content.split(b"\r\n")) <= 78
    assert content.count(b"\n") == content.count(b"\r\n") == content.count(b"\r")
    mail = email.message_from_bytes(content, policy=email.policy.default)
    assert mail.keys()[:7] == ["Subject", "From", "To", "Date", "Message-ID", "Auto-Submitted", "X-Backhaul-State"]
    assert mail["To"] == "d@e.f, root"
    assert not [key for key in mail if key.lower() in ("bcc", "cc")]
