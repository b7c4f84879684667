"""Channels against real servers of the loopback: mail, HTTP, programs; and what each says when it fails."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest

from backhaul.errors import BackhaulError, ConfigurationError, NotifyError
from backhaul.formats.channel_settings import read_channel
from backhaul.jobs.channels import OpenChannel, open_channel
from backhaul.model.secret import Secret
from backhaul.model.verdict import Message
from backhaul.operations.secrets import resolve
from backhaul.testing.notify_servers import BareServer, Certificate, HttpSink, MailServer, Reply

SECRET = "hunter2-geheim-0815"
SUBJECT = "failed: db7 – Sicherung über Nacht €"
MESSAGE = Message(
    subject=SUBJECT,
    text="db7 failed\n.\nFrom here: ü\n" + "x" * 3000 + "\n",
    html="<h1>db7 failed – ü</h1>" + "<p>long</p>" * 500,
    job="db7",
    state="failed",
    failure=True,
    document={"format": "backhaul.report", "verdicts": [{"job": "db7", "state": "failed"}], "subject": "not this"},
)
# Well above the timeouts of these tests, well below what a server that says nothing would take.
IN_TIME = 15.0


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("THE_SECRET", SECRET)


@pytest.fixture(autouse=True)
def nothing_printed(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return Certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def sink() -> Iterator[HttpSink]:
    with HttpSink() as server:
        yield server


def channel(kind: str, **settings: Any) -> OpenChannel:
    problems: list[tuple[str, str]] = []
    read = read_channel("ops", {"kind": kind, **settings}, lambda *problem: problems.append(problem))
    assert problems == []
    assert read is not None
    return open_channel(read)


def mail_channel(server: MailServer | BareServer, **settings: Any) -> OpenChannel:
    defaults = {"host": "127.0.0.1", "port": server.port, "from": "Jörg <backup@example.com>", "to": ["a@example.com"]}
    return channel("mail", **{**defaults, **settings})


def refusal(work: Callable[[], None], kind: type[BackhaulError] = NotifyError) -> BackhaulError:
    """Return the error, which has three parts and no secret, whatever is looked at."""
    with pytest.raises(kind) as caught:
        work()
    error = caught.value
    assert error.what and error.why and error.todo
    assert "[notify.ops]" in error.what
    chain: list[BaseException | None] = [error, error.__cause__, error.__context__]
    for link in chain:
        if link is None or (link is error.__context__ and error.__suppress_context__):
            continue
        assert SECRET not in f"{link} {link!r} {getattr(link, 'todo', '')} {vars(link)}"
    return error


def in_time(work: Callable[[], Any]) -> Any:
    began = time.monotonic()
    result = work()
    assert time.monotonic() - began < IN_TIME
    return result


def bodies(mail: EmailMessage) -> tuple[str, str]:
    text, html = mail.get_body(("plain",)), mail.get_body(("html",))
    assert text is not None and html is not None
    return text.get_content().replace("\r\n", "\n"), html.get_content().replace("\r\n", "\n")


# -- mail ------------------------------------------------------------------------------------------------


def test_a_mail_arrives_as_it_was_meant() -> None:
    with MailServer() as server:
        mail_channel(server, to=["a@example.com", "Bö <b@example.com>"]).deliver(MESSAGE)
    (received,) = server.mails
    assert received.sender == "backup@example.com"
    assert received.recipients == ("a@example.com", "b@example.com")
    assert not received.tls and not received.authenticated
    mail = received.message
    assert mail["Subject"] == SUBJECT
    assert mail["From"] == "Jörg <backup@example.com>"
    assert mail["Auto-Submitted"] == "auto-generated"
    assert mail["X-Backhaul-State"] == "failed"
    assert re.fullmatch(r"<\S+@example\.com>", mail["Message-ID"])
    assert abs(mail["Date"].datetime.timestamp() - time.time()) < 60
    assert mail.get_content_type() == "multipart/alternative"
    assert bodies(mail) == (MESSAGE.text, MESSAGE.html + "\n")
    assert max(len(line) for line in received.content.split(b"\r\n")) <= 998


def test_a_subject_can_inject_no_header() -> None:
    with MailServer() as server:
        mail_channel(server).deliver(Message(subject="down\r\nBcc: evil@example.com\n\nbody", text="plain"))
    (received,) = server.mails
    assert received.recipients == ("a@example.com",)
    assert received.message["Subject"] == "down Bcc: evil@example.com body"
    assert received.message["Bcc"] is None
    assert received.message.get_content_type() == "text/plain"
    assert received.message.get_content() == "plain\r\n"


def test_names_of_other_scripts_are_sent_where_the_server_takes_them() -> None:
    with MailServer() as server:
        mail_channel(server, to=["jörg@example.com"]).deliver(MESSAGE)
    (received,) = server.mails
    assert received.recipients == ("jörg@example.com",)
    assert bodies(received.message)[0] == MESSAGE.text


def test_a_long_subject_is_folded() -> None:
    subject = "failed: " + ", ".join(f"datenbank-{number} größer" for number in range(40))
    with MailServer() as server:
        mail_channel(server).deliver(Message(subject=subject, text="x"))
    head = server.mails[0].content.partition(b"\r\n\r\n")[0]
    assert max(len(line) for line in head.split(b"\r\n")) <= 78
    assert server.mails[0].message["Subject"] == subject


@pytest.mark.parametrize("tls", ["starttls", "implicit"])
def test_tls_and_a_login(certificate: Certificate, tls: str) -> None:
    settings = {"tls": tls, "user": "u", "password": {"env": "THE_SECRET"}, "ca-file": str(certificate.file)}
    with MailServer(certificate=certificate, implicit=tls == "implicit", login=("u", SECRET)) as server:
        mail_channel(server, **settings).deliver(MESSAGE)
        (received,) = server.mails
        assert received.tls and received.authenticated
        server.login = ("u", "another")
        error = refusal(lambda: mail_channel(server, **settings).deliver(MESSAGE))
        assert "535" in error.why and "password" in error.todo
        without = {key: value for key, value in settings.items() if key not in ("user", "password")}
        assert "530" in refusal(lambda: mail_channel(server, **without).deliver(MESSAGE)).why
    assert len(server.mails) == 1


@pytest.mark.parametrize("tls", ["starttls", "implicit"])
def test_a_certificate_that_nobody_trusts(certificate: Certificate, tls: str) -> None:
    settings = {"tls": tls, "user": "u", "password": {"env": "THE_SECRET"}}
    with MailServer(certificate=certificate, implicit=tls == "implicit", login=("u", SECRET)) as server:
        error = refusal(lambda: mail_channel(server, **settings).deliver(MESSAGE))
    assert "not trusted" in error.why and "ca-file" in error.todo
    assert server.mails == []


def test_starttls_is_never_given_up() -> None:
    with MailServer(login=("u", SECRET)) as server:
        settings = {"tls": "starttls", "user": "u", "password": {"env": "THE_SECRET"}}
        error = refusal(lambda: mail_channel(server, **settings).deliver(MESSAGE))
    assert "STARTTLS" in error.why
    assert server.mails == []


def test_a_login_where_none_is_offered() -> None:
    with MailServer() as server:
        settings = {"tls": "none", "user": "u", "password": {"env": "THE_SECRET"}}
        error = refusal(lambda: mail_channel(server, **settings).deliver(MESSAGE))
    assert "auth" in error.why.lower()
    assert server.mails == []


def test_a_file_of_certificates_that_is_not_there() -> None:
    with MailServer() as server:
        work = mail_channel(server, tls="starttls", **{"ca-file": "/does/not/exist"})
        with pytest.raises(ConfigurationError) as caught:
            work.deliver(MESSAGE)
    assert "/does/not/exist" in caught.value.why


def test_one_refused_recipient_is_named_and_the_others_have_it() -> None:
    with MailServer(refused={"b@example.com": "550 5.1.1 nobody of that name"}) as server:
        work = mail_channel(server, to=["a@example.com", "B <b@example.com>", "c@example.com"])
        error = refusal(lambda: work.deliver(MESSAGE))
    assert [mail.recipients for mail in server.mails] == [("a@example.com", "c@example.com")]
    assert "1 of 3" in error.why and "b@example.com: it answered 550 5.1.1 nobody of that name" in error.why
    assert error.details == {"refused": ["b@example.com"], "delivered": ["a@example.com", "c@example.com"]}


def test_all_refused() -> None:
    with MailServer(refused={"a@example.com": "450 4.2.1 mailbox busy"}) as server:
        error = refusal(lambda: mail_channel(server).deliver(MESSAGE))
    assert server.mails == []
    assert "450 4.2.1 mailbox busy" in error.why
    assert error.details == {"refused": ["a@example.com"], "delivered": []}


def test_a_server_that_takes_it_later() -> None:
    with MailServer(reply=f"451 4.3.0 try again later {SECRET}", login=("u", SECRET)) as server:
        settings = {"tls": "none", "user": "u", "password": {"env": "THE_SECRET"}}
        error = refusal(lambda: mail_channel(server, **settings).deliver(MESSAGE))
    assert "451 4.3.0 try again later ***" in error.why
    assert "later" in error.todo


@pytest.mark.parametrize("tls", ["none", "starttls", "implicit"])
@pytest.mark.parametrize("drip", [b"", b"2"])
def test_a_mail_server_that_never_answers(tls: str, drip: bytes) -> None:
    with BareServer(drip) as server:
        work = mail_channel(server, tls=tls, timeout="0.5s")
        error = in_time(lambda: refusal(lambda: work.deliver(MESSAGE)))
        # Nothing of it goes on behind the caller's back.
        assert server.left.wait(IN_TIME)
    # What is no TLS at all is seen at once.
    assert "0.5 s" in error.why or (tls == "implicit" and drip and "TLS" in error.why)
    assert server.connections == 1


def test_a_mail_server_that_hangs_up_and_one_that_is_not_there() -> None:
    with BareServer(hang_up=True) as server:
        assert "broke the connection off" in refusal(lambda: mail_channel(server).deliver(MESSAGE)).why
        port = server.port
    assert "refused" in refusal(lambda: mail_channel(server, port=port).deliver(MESSAGE)).why
    assert (
        "lost.invalid:25" in refusal(lambda: mail_channel(server, host="lost.invalid", port=25).deliver(MESSAGE)).what
    )


def join_what_was_left_behind() -> None:
    for thread in threading.enumerate():
        if thread.name == "backhaul-notify":
            thread.join(IN_TIME)
            assert not thread.is_alive()


def test_a_name_that_takes_for_ever_to_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    look_up = socket.getaddrinfo

    def wait(*arguments: Any, **options: Any) -> Any:
        over.wait()
        return look_up(*arguments, **options)

    with MailServer() as server:
        monkeypatch.setattr("socket.getaddrinfo", wait)
        work = mail_channel(server, timeout="0.3s")
        error = in_time(lambda: refusal(lambda: work.deliver(MESSAGE)))
        assert "0.3 s" in error.why
        # What was said to have failed isn't sent later.
        over.set()
        join_what_was_left_behind()
        assert server.mails == []
        work.deliver(MESSAGE)
        assert len(server.mails) == 1


def test_sendmail_is_given_the_mail(tmp_path: Path) -> None:
    program = tmp_path / "sendmail"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\ncat > {tmp_path}/mail\n')
    program.chmod(0o755)
    work = channel("mail", sendmail=str(program), to=["root", "a@example.com"], **{"from": "backup@example.com"})
    work.deliver(MESSAGE)
    assert (tmp_path / "arguments").read_text() == "-t -oi\n"
    content = (tmp_path / "mail").read_bytes()
    assert b"\r" not in content
    import email.policy

    mail = email.message_from_bytes(content, policy=email.policy.default)
    assert isinstance(mail, EmailMessage)
    assert (mail["To"], mail["Subject"]) == ("root, a@example.com", SUBJECT)
    assert bodies(mail) == (MESSAGE.text, MESSAGE.html + "\n")
    program.write_text("#!/bin/sh\necho queue is full >&2\nexit 75\n")
    error = refusal(lambda: work.deliver(MESSAGE))
    assert "status 75" in error.why and "queue is full" in error.why and str(program) in error.what


# -- HTTP ------------------------------------------------------------------------------------------------


def test_a_webhook_gets_the_message_as_json(sink: HttpSink) -> None:
    headers = {"X-Team": "db", "Authorization": {"env": "THE_SECRET"}}
    channel("webhook", url=f"{sink.url}/hook?a=b", method="PUT", headers=headers).deliver(MESSAGE)
    (request,) = sink.requests
    assert (request.method, request.path) == ("PUT", "/hook?a=b")
    assert (request.headers["authorization"], request.headers["x-team"]) == (SECRET, "db")
    assert request.headers["content-type"] == "application/json"
    assert request.json == {
        "schema": "backhaul.alert/1",
        "subject": SUBJECT,
        "state": "failed",
        "failure": True,
        "job": "db7",
        "text": MESSAGE.text,
        "format": "backhaul.report",
        "verdicts": [{"job": "db7", "state": "failed"}],
    }


def test_bytes_that_are_no_text_reach_a_webhook(sink: HttpSink) -> None:
    channel("webhook", url=sink.url).deliver(Message(subject="a", text="\udcff\0", document={"name": "\udcff"}))
    assert sink.requests[0].json["text"] == "\\udcff\\x00"
    assert sink.requests[0].json["name"] == "?"


def test_a_url_out_of_a_file_with_a_login_in_it(sink: HttpSink, tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text(f"http://us%40er:{SECRET}@127.0.0.1:{sink.port}/{SECRET}\n")
    work = channel("webhook", url={"file": str(file)})
    work.deliver(MESSAGE)
    import base64

    assert sink.requests[0].path == f"/{SECRET}"
    assert sink.requests[0].headers["authorization"] == "Basic " + base64.b64encode(f"us@er:{SECRET}".encode()).decode()
    sink.replies.append(Reply(403, f"go away /{SECRET} {SECRET[:-1]}".encode()))
    error = refusal(lambda: work.deliver(MESSAGE))
    assert f"(http://127.0.0.1:{sink.port})" in error.what
    assert "403 Forbidden: go away" in error.why
    file.write_text(f"https://{SECRET} example.com/{SECRET}")
    refusal(lambda: work.deliver(MESSAGE), ConfigurationError)


@pytest.mark.parametrize("status", [300, 400, 401, 404, 429, 500, 503])
def test_a_refusal_is_shown_in_the_servers_words(sink: HttpSink, status: int) -> None:
    sink.replies.append(Reply(status, b"because \xff" + b"y" * 5000))
    error = refusal(lambda: channel("webhook", url=sink.url).deliver(MESSAGE))
    assert f"it answered {status}" in error.why and "because" in error.why
    assert len(error.why) < 300


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(sink: HttpSink, status: int) -> None:
    with HttpSink() as elsewhere:
        sink.replies.append(Reply(status, b"", (("Location", f"{elsewhere.url}/{SECRET}"),)))
        work = channel("webhook", url=sink.url, headers={"Authorization": {"env": "THE_SECRET"}})
        error = refusal(lambda: work.deliver(MESSAGE))
    assert elsewhere.requests == []
    assert elsewhere.url in error.why and "Redirects" in error.todo


def test_tls_for_http(certificate: Certificate) -> None:
    with HttpSink(certificate=certificate) as server:
        assert "not trusted" in refusal(lambda: channel("webhook", url=server.url).deliver(MESSAGE)).why
        assert server.requests == []
        channel("webhook", url=server.url, ca_file=str(certificate.file)).deliver(MESSAGE)
        assert len(server.requests) == 1


@pytest.mark.parametrize("reply", [Reply(silent=True), Reply(trickle="headers"), Reply(500, trickle="body")])
def test_an_http_server_that_never_ends(sink: HttpSink, reply: Reply) -> None:
    sink.replies.append(reply)
    work = channel("webhook", url=f"{sink.url}/{SECRET}", timeout="0.5s")
    error = in_time(lambda: refusal(lambda: work.deliver(MESSAGE)))
    assert "0.5 s" in error.why or "500" in error.why


def test_what_was_taken_counts_however_slowly_the_rest_comes(sink: HttpSink) -> None:
    sink.replies.append(Reply(200, trickle="body"))
    channel("webhook", url=sink.url, timeout="5s").deliver(MESSAGE)
    assert len(sink.requests) == 1


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("drip", [b"", b"H"])
def test_a_server_that_speaks_no_http(scheme: str, drip: bytes) -> None:
    with BareServer(drip) as server:
        work = channel("webhook", url=f"{scheme}://127.0.0.1:{server.port}", timeout="0.5s")
        error = in_time(lambda: refusal(lambda: work.deliver(MESSAGE)))
        assert server.left.wait(IN_TIME)
    assert "0.5 s" in error.why or (drip and ("TLS" in error.why or "HTTP" in error.why))


def test_a_webhook_that_is_not_there() -> None:
    with BareServer(hang_up=True) as server:
        url = f"http://127.0.0.1:{server.port}/{SECRET}"
        assert refusal(lambda: channel("webhook", url=url).deliver(MESSAGE)).why
    assert "refused" in refusal(lambda: channel("webhook", url=url).deliver(MESSAGE)).why
    refusal(lambda: channel("webhook", url=f"http://lost.invalid/{SECRET}").deliver(MESSAGE))


def test_a_secret_with_a_line_break_is_not_sent(sink: HttpSink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_SECRET", f"{SECRET}\r\nX-Evil: 1")
    work = channel("webhook", url=sink.url, headers={"Authorization": {"env": "THE_SECRET"}})
    assert "more than one line" in refusal(lambda: work.deliver(MESSAGE), ConfigurationError).why
    assert sink.requests == []


def test_slack(sink: HttpSink) -> None:
    work = channel("slack", url=f"{sink.url}/services/T0/B0/{SECRET}")
    work.deliver(Message(subject="failed: a <b> & c", text="1 < 2 && ```x```\n", failure=True))
    assert sink.requests[0].json == {"text": "*failed: a &lt;b&gt; &amp; c*\n```\n1 &lt; 2 &amp;&amp; '''x'''\n```"}
    work.deliver(Message(subject="s", text="&" * 20_000))
    text = sink.requests[1].json["text"]
    assert 3900 < len(text) <= 4000 and "[... cut ...]" in text and "&amp;&amp;" in text
    sink.replies.append(Reply(404, b"no_team"))
    assert "no_team" in refusal(lambda: work.deliver(MESSAGE)).why


def test_ntfy(sink: HttpSink) -> None:
    work = channel("ntfy", server=sink.url, topic="backups", token={"env": "THE_SECRET"})
    work.deliver(MESSAGE)
    work.deliver(Message(subject="ok", text="ü" * 10_000))
    first, second = sink.requests
    assert (first.path, first.headers["authorization"]) == ("/", f"Bearer {SECRET}")
    assert first.json == {
        "topic": "backups",
        "title": SUBJECT,
        "message": MESSAGE.text,
        "priority": 5,
        "tags": ["rotating_light"],
    }
    assert second.json["priority"] < 3
    assert 4000 < len(second.json["message"].encode()) <= 4096


def test_healthchecks_hears_beginnings_and_ends(sink: HttpSink) -> None:
    work = channel("healthchecks", url=f"{sink.url}/ping/0d338dcc?create=1")
    work.ping("start")
    work.ping("ok", "fine\n")
    work.ping("failed", "ü" * 100_000)
    work.ping(0)
    work.ping(3, "three")
    work.ping(-15)
    work.deliver(MESSAGE)
    work.deliver(Message(subject="all well", text="yes"))
    base = "/ping/0d338dcc"
    assert [request.path.removesuffix("?create=1") for request in sink.requests] == [
        f"{base}/start", base, f"{base}/fail", f"{base}/0", f"{base}/3", f"{base}/fail", f"{base}/fail", base,
    ]  # fmt: skip
    assert all(request.path.endswith("?create=1") for request in sink.requests)
    texts = [request.body.decode() for request in sink.requests]
    assert texts[1] == "fine\n"
    assert 99_900 < len(sink.requests[2].body) <= 100_000 and texts[2].endswith("ü")
    assert texts[6].startswith(f"{SUBJECT}\n\ndb7 failed")


def test_healthchecks_that_knows_no_such_check(sink: HttpSink) -> None:
    sink.replies.append(Reply(200, b"OK (not found)"))
    assert "OK (not found)" in refusal(lambda: channel("healthchecks", url=sink.url).ping("start")).why


def test_other_kinds_hear_no_pings(sink: HttpSink) -> None:
    error = refusal(lambda: channel("slack", url=sink.url).ping("start"), ConfigurationError)
    assert "healthchecks" in error.todo
    assert sink.requests == []


# -- programs and Apprise --------------------------------------------------------------------------------


def test_a_program_is_told(tmp_path: Path) -> None:
    code = (
        "import json, os, sys; "
        f"json.dump([sys.stdin.read(), *(os.environ['BACKHAUL_' + n] for n in ('SUBJECT', 'STATE', 'JOB', 'FAILURE'))], "
        f"open({str(tmp_path / 'told')!r}, 'w')); print('not shown')"
    )
    channel("command", command=[sys.executable, "-W", "error", "-c", code, "$HOME;"]).deliver(MESSAGE)
    assert json.loads((tmp_path / "told").read_text()) == [MESSAGE.text, SUBJECT, "failed", "db7", "true"]


def test_a_program_that_fails() -> None:
    error = refusal(
        lambda: channel("command", command=["sh", "-c", "echo the pager is off >&2; exit 4"]).deliver(MESSAGE)
    )
    assert "status 4" in error.why and "the pager is off" in error.why
    error = refusal(lambda: channel("command", command=["sh", "-c", "echo only here; exit 1"]).deliver(MESSAGE))
    assert "only here" in error.why
    error = refusal(lambda: channel("command", command=["/does/not/exist"]).deliver(MESSAGE))
    assert "could not be started" in error.why


def test_a_program_that_takes_no_input_may_still_do_its_work() -> None:
    channel("command", command=["true"]).deliver(Message(subject="s", text="x" * 1_000_000))


def test_a_program_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    script = f"sleep 300 & echo $$ $! > {file}; trap '' TERM; sleep 300; sleep 300"
    work = channel("command", command=["sh", "-c", script], timeout="1s")
    error = in_time(lambda: refusal(lambda: work.deliver(MESSAGE)))
    assert "1 s" in error.why
    pids = [int(word) for word in file.read_text().split()]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_apprise(sink: HttpSink) -> None:
    work = channel("apprise", url=[f"json://127.0.0.1:{sink.port}/{SECRET}", f"json://127.0.0.1:{sink.port}/two"])
    work.deliver(MESSAGE)
    assert [request.path.rstrip("/") for request in sink.requests] == [f"/{SECRET}", "/two"]
    assert sink.requests[0].json["title"] == SUBJECT
    assert sink.requests[0].json["message"].startswith("db7 failed")
    assert sink.requests[0].json["type"] == "failure"


def test_apprise_says_which_service_failed(sink: HttpSink) -> None:
    sink.replies.append(Reply(500))
    url = [f"json://127.0.0.1:{sink.port}/{SECRET}", f"form://127.0.0.1:{sink.port}/", f"nothing://{SECRET}/x"]
    error = refusal(lambda: channel("apprise", url=url).deliver(MESSAGE))
    assert "500" in error.why and "nothing://" in error.why
    assert error.details == {"refused": ["json://", "nothing://"], "delivered": ["form://"]}


def test_apprise_in_bounded_time(sink: HttpSink) -> None:
    with HttpSink() as slow:
        slow.replies.append(Reply(trickle="headers"))
        url = [f"json://127.0.0.1:{slow.port}/one", f"json://127.0.0.1:{sink.port}/two"]
        error = in_time(lambda: refusal(lambda: channel("apprise", url=url, timeout="0.5s").deliver(MESSAGE)))
        assert "0.5 s" in error.why
        assert len(slow.requests) == 1
    join_what_was_left_behind()
    assert sink.requests == []


def test_no_channel_keeps_a_process_from_its_end(sink: HttpSink) -> None:
    code = """
import sys
from backhaul.errors import NotifyError
from backhaul.jobs.channels import open_channel
from backhaul.model.channel import Channel
from backhaul.model.verdict import Message
for kind, url in (("apprise", (f"json://127.0.0.1:{sys.argv[1]}",)), ("webhook", f"http://127.0.0.1:{sys.argv[1]}")):
    channel = Channel(name="ops", kind=kind, settings={"url": url, "timeout": 3.0, "method": "POST"})
    try:
        open_channel(channel).deliver(Message(subject="s", text="t"))
    except NotifyError as error:
        print(error.why)
"""
    sink.replies += [Reply(trickle="headers"), Reply(trickle="headers")]
    command = [sys.executable, "-W", "error", "-c", code, str(sink.port)]
    done = in_time(lambda: subprocess.run(command, capture_output=True, text=True, timeout=60, check=True))
    assert done.stdout.count("3 s") == 2
    assert done.stderr == ""
    assert len(sink.requests) == 2


def test_apprise_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apprise", None)
    error = refusal(lambda: channel("apprise", url="json://127.0.0.1").deliver(MESSAGE), ConfigurationError)
    assert "pip install 'backhaul[apprise]'" in error.todo


# -- secrets ---------------------------------------------------------------------------------------------


def test_secrets_are_fetched_from_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "smtp"
    file.write_text(" pä ss \r\n")
    monkeypatch.setenv("SMTP_SECRET", "from env")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(Secret("file", (str(file),)), "it") == " pä ss "
    assert resolve(Secret("file", ("~/smtp",)), "it") == " pä ss "
    assert resolve(Secret("credential", ("smtp",)), "it") == " pä ss "
    assert resolve(Secret("env", ("SMTP_SECRET",)), "it") == "from env"
    assert resolve(Secret("command", ("echo", "said")), "it") == "said"
    # It is asked without anybody's stdin.
    assert resolve(Secret("command", ("sh", "-c", "cat; echo done")), "it") == "done"


def test_secrets_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    monkeypatch.setenv("EMPTY", "\n")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "long").write_bytes(b"x" * 70_000)
    os.mkfifo(tmp_path / "pipe")
    cases = [
        (Secret("file", (str(tmp_path / "none"),)), "No such file"),
        (Secret("file", (str(tmp_path / "empty"),)), "empty"),
        (Secret("file", (str(tmp_path / "binary"),)), "no text"),
        (Secret("file", (str(tmp_path / "long"),)), "longer"),
        (Secret("file", (str(tmp_path / "pipe"),)), "plain file"),
        (Secret("file", (str(tmp_path),)), "directory"),
        (Secret("env", ("NOT_SET_ANYWHERE",)), "not set"),
        (Secret("env", ("EMPTY",)), "empty"),
        (Secret("credential", ("smtp",)), "systemd"),
        (Secret("command", ("sh", "-c", "printf hunter%d 2; echo locked >&2; exit 3")), "locked"),
        (Secret("command", ("/does/not/exist",)), "could not be started"),
        (Secret("command", ("true",)), "empty"),
        (Secret("command", ("sleep", "60")), "longer than"),
    ]
    for secret, words in cases:
        with pytest.raises(ConfigurationError) as caught:
            resolve(secret, "the password of [notify.ops]", command_timeout=0.5 if "sleep" in secret.reference else 10)
        error = caught.value
        assert error.what == "The password of [notify.ops] can't be had"
        assert words in error.why and error.todo
        assert "hunter2" not in f"{error} {error.todo}"
