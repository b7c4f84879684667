"""Channels that post to a server by HTTP: webhooks, Slack, ntfy, Healthchecks.

Redirects are never followed: they would take secrets to where nobody sent them.
"""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import urllib.request
from collections.abc import Mapping
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, unquote, urlsplit

import msgspec

from backhaul.errors import ConfigurationError
from backhaul.formats.channel_settings import split_url
from backhaul.jobs.channel_base import Masks, OpenChannel, PingState, cut, network_words
from backhaul.jobs.deadline import Deadline
from backhaul.model import verdict
from backhaul.model.verdict import Message
from backhaul.version import VERSION

ALERT_SCHEMA = "backhaul.alert/1"
_SHOWN_OF_REPLY = 200
_READ_OF_REPLY = 4096
# Slack breaks longer texts in several messages, which breaks the block of code too; Mattermost takes four times that.
SLACK_LIMIT = 4000
# ntfy makes an attachment of what is longer, or refuses it.
NTFY_LIMIT = 4096
_NTFY_TITLE = 250
HEALTHCHECKS_LIMIT = 100_000

_NTFY: Mapping[str, tuple[int, str]] = {
    verdict.FAILED: (5, "rotating_light"),
    verdict.OVERDUE: (5, "alarm_clock"),
    verdict.INCOMPLETE: (4, "warning"),
    verdict.NEVER_RUN: (4, "warning"),
    verdict.RUNNING: (3, "hourglass_flowing_sand"),
    verdict.HELD: (3, "pause_button"),
    verdict.OK: (2, "white_check_mark"),
}


class _Connection(http.client.HTTPConnection):
    deadline: Deadline

    def connect(self) -> None:
        super().connect()
        self.deadline.hold(self.sock)


class _TLSConnection(http.client.HTTPSConnection, _Connection):
    """Its own ``connect`` calls the one above, before TLS begins: a handshake can be broken off too."""


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def __init__(self, deadline: Deadline, context: ssl.SSLContext) -> None:
        super().__init__()
        self._deadline = deadline
        self._trusts = context

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._tls_connection, req)

    def _connection(self, host: str, **options: Any) -> _Connection:
        connection = _Connection(host, **options)
        connection.deadline = self._deadline
        return connection

    def _tls_connection(self, host: str, **options: Any) -> _TLSConnection:
        connection = _TLSConnection(host, context=self._trusts, **options)
        connection.deadline = self._deadline
        return connection


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        return None


class HttpChannel(OpenChannel):
    """A channel that posts."""

    def _url(self, key: str, masks: Masks) -> SplitResult:
        """Return a URL's parts; all but scheme and host are hidden."""
        text = masks.add_url(self._hidden(key, masks))
        parts = split_url(text)
        if parts is None:
            raise ConfigurationError(
                f"{key} of [notify.{self.name}] can't be used",
                "what is kept there is no http or https URL",
                "Keep there the whole URL, alone.",
            )
        return parts

    def _post(
        self,
        url: SplitResult,
        body: bytes,
        masks: Masks,
        *,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
        method: str = "POST",
        read_reply: bool = False,
    ) -> bytes:
        """Send a body; return the beginning of the reply, if it is to be read.

        Without that a message counts as delivered once the status says so, however slowly the rest comes.

        Raises:
            NotifyError: it was not taken.
        """
        place = f"{url.scheme}://{url.netloc.rpartition('@')[2]}"
        deadline = Deadline(self.timeout)
        sent = {"Content-Type": content_type, "User-Agent": f"backhaul/{VERSION}"}
        if url.username is not None:
            login = f"{unquote(url.username)}:{unquote(url.password or '')}"
            sent["Authorization"] = "Basic " + masks.add(base64.b64encode(login.encode()).decode())
        sent |= headers or {}
        bare = url._replace(netloc=url.netloc.rpartition("@")[2], fragment="").geturl()
        request = urllib.request.Request(bare, data=body, headers=sent, method=method)  # noqa: S310 - http or https
        opener = urllib.request.build_opener(_Handler(deadline, self._context()), _NoRedirects)
        try:
            status, reply, location = deadline.run(lambda: _exchange(opener, request, deadline, read_reply))
        except (OSError, http.client.HTTPException, ValueError) as error:
            # Not chained: the original may hold the URL, or a header.
            raise self._failed(place, *network_words(error, self.timeout), masks) from None
        if status >= 300:
            words = masks(reply.decode(errors="replace"))[:_SHOWN_OF_REPLY].strip()
            why = f"it answered {status} {http.client.responses.get(status, '')}".rstrip()
            why += f" (to {_place_of(location)})" if location else ""
            raise self._failed(place, why + (f": {words}" if words else ""), self._todo(status), masks)
        return reply

    def _todo(self, status: int) -> str:
        if status < 400:
            return "Redirects are not followed: write the address that it names, if it is the right one."
        if status in (401, 403, 404, 407, 410):
            return f"Check the URL and the secrets of [notify.{self.name}]."
        if status == 429:
            return "It was told too much, too often: send it less, or look at its limits."
        if status < 500:
            return f"It doesn't take such messages: check the kind and URL of [notify.{self.name}]."
        return "The server is in trouble: look there."


def _exchange(
    opener: urllib.request.OpenerDirector, request: urllib.request.Request, deadline: Deadline, read_reply: bool
) -> tuple[int, bytes, str]:
    """Return the status, the beginning of the reply, and where it redirects to."""
    try:
        with opener.open(request, timeout=deadline.patience) as response:
            return int(response.status), response.read(_READ_OF_REPLY) if read_reply else b"", ""
    except HTTPError as error:
        with error:
            location = error.headers.get("Location", "") if 300 <= error.code < 400 else ""
            try:
                reply = error.read(_READ_OF_REPLY)
            except (OSError, http.client.HTTPException):
                reply = b""
            return error.code, reply, location
    except URLError as error:
        # Its own text holds no more than its reason, and its traceback the whole request.
        if isinstance(error.reason, Exception):
            raise error.reason from None
        raise OSError(str(error.reason)) from None


def _place_of(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        return "another place"
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}" if host else "another path"


def _json(document: Mapping[str, object]) -> bytes:
    """Return JSON that every reader takes: bytes that are no text come out as ``?``."""
    return json.dumps(msgspec.to_builtins(document), ensure_ascii=False).encode(errors="replace")


class Webhook(HttpChannel):
    """The whole message as JSON. Its own fields can be relied on: those of the document don't replace them."""

    def _deliver(self, message: Message, masks: Masks) -> None:
        fields = {
            "schema": ALERT_SCHEMA,
            "subject": message.subject,
            "state": message.state,
            "failure": message.failure,
            "job": message.job,
            "text": message.text,
        }
        headers = {name: self._get(value, name, masks) for name, value in self.channel.pairs("headers")}
        for name, value in headers.items():
            if not value.isascii():
                raise ConfigurationError(
                    f"{name} of [notify.{self.name}] can't be sent", "a header is ASCII", "Look at what is kept there."
                )
        rest = {key: value for key, value in message.document.items() if key not in fields}
        body = _json({**fields, **rest})
        self._post(self._url("url", masks), body, masks, headers=headers, method=self.channel.text("method"))


class Slack(HttpChannel):
    """The subject in bold and the text as it is, cut to what is shown as one message."""

    def _deliver(self, message: Message, masks: Masks) -> None:
        self._post(self._url("url", masks), _json({"text": slack_text(message.subject, message.text)}), masks)


def slack_text(subject: str, text: str) -> str:
    """Return a message in Slack's own marks, of at most ``SLACK_LIMIT`` characters."""
    head = f"*{_slack_escape(subject[: SLACK_LIMIT // 10])}*"
    # Three back-ticks would end the block.
    text = text.replace("```", "'''").strip("\n")
    block = "\n```\n{}\n```"
    room = SLACK_LIMIT - len(head) - len(block)
    shown = _slack_escape(text)
    if len(shown) > room:
        mark = "\n[... cut ...]"
        shown = ""
        for character in text:
            piece = _slack_escape(character)
            if len(shown) + len(piece) + len(mark) > room:
                break
            shown += piece
        shown += mark
    return head + (block.format(shown) if shown else "")


def _slack_escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


class Ntfy(HttpChannel):
    """A notification; the topic stands in the body, where no log of a proxy shows it."""

    def _deliver(self, message: Message, masks: Masks) -> None:
        priority, tag = _NTFY.get(message.state, (3, "grey_question"))
        document = {
            "topic": masks.add(self._hidden("topic", masks)),
            "title": cut(message.subject, _NTFY_TITLE).replace("\n", " "),
            "message": cut(message.text, NTFY_LIMIT),
            "priority": priority,
            "tags": [tag],
        }
        token = self._hidden("token", masks)
        if not token.isascii():
            raise ConfigurationError(
                f"token of [notify.{self.name}] can't be sent", "a header is ASCII", "Look at what is kept there."
            )
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._post(self._url("server", masks), _json(document), masks, headers=headers)


class Healthchecks(HttpChannel):
    """Pings; or alerts, which make the check fail until one says that all is well."""

    def ping(self, state: PingState, text: str = "") -> None:
        """Tell that a run began, or how it ended; of a long text the end is sent."""
        if isinstance(state, int):
            # What ended by a signal has no exit status that the service knows.
            suffix = str(state) if 0 <= state <= 255 else "fail"
        else:
            suffix = {"start": "start", "ok": "", "failed": "fail"}[state]
        text = text.encode(errors="backslashreplace").decode()
        self._signal(suffix, cut(text, HEALTHCHECKS_LIMIT, keep_end=True), Masks())

    def _deliver(self, message: Message, masks: Masks) -> None:
        text = cut(f"{message.subject}\n\n{message.text}", HEALTHCHECKS_LIMIT)
        self._signal("fail" if message.failure else "", text, masks)

    def _signal(self, suffix: str, text: str, masks: Masks) -> None:
        url = self._url("url", masks)
        if suffix:
            url = url._replace(path=f"{url.path.rstrip('/')}/{suffix}")
        reply = self._post(url, text.encode(), masks, content_type="text/plain; charset=utf-8", read_reply=True)
        # "OK (not found)" and "OK (rate limited)": by status 200 it says that nobody heard it.
        words = reply[:_SHOWN_OF_REPLY].decode(errors="replace").strip()
        if words.startswith("OK (") and words.endswith(")"):
            raise self._failed(
                f"{url.scheme}://{url.netloc.rpartition('@')[2]}",
                f"it answered {words!r}: nobody was told",
                f"Check whether the check of [notify.{self.name}] exists, and how often it is pinged.",
                masks,
            )
