"""Channels as the config writes them: ``[notify.NAME]`` tables. A pure reader.

::

    [notify.ops]
    kind = "mail"
    host = "smtp.example.com"
    user = "backhaul"
    password = { file = "/etc/backhaul/smtp-password" }
    from = "Backhaul <backup@example.com>"
    to = ["dba@example.com"]

One table of settings for each kind, for the reader, the JSON Schema and the documentation. Keys may be written
with ``-`` or ``_``. Every problem is told, not only the first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from typing import Any
from urllib.parse import SplitResult, urlsplit

import msgspec

from backhaul.errors import UsageError
from backhaul.formats.quantities import parse_duration
from backhaul.formats.secret import read_secret, secret_schema
from backhaul.model.channel import (
    APPRISE,
    CHANNEL_KINDS,
    COMMAND,
    HEALTHCHECKS,
    MAIL,
    NTFY,
    SLACK,
    WEBHOOK,
    Channel,
    Text,
    Value,
)

IMPLICIT, STARTTLS, NO_TLS = "implicit", "starttls", "none"
_SUBMISSION, _SUBMISSIONS, _RELAY = 587, 465, 25
_LONGEST_TIMEOUT = 600.0
_SECRET_HEADER = re.compile(r"(?i)authorization|cookie|token|secret|passw|api-?key|signature")
_OUR_HEADERS = ("host", "content-length", "transfer-encoding", "connection")
# What isn't printable ASCII, and the space: never part of a URL.
_NOT_OF_A_URL = re.compile(r"[^!-~]")

Problem = Callable[[str], None]


class ValueType(msgspec.Struct, frozen=True):
    """What a setting's value must be.

    Attributes:
        words: for people.
        read: returns the value, or None after it told each problem.
        schema: JSON Schema.
    """

    words: str
    read: Callable[[Any, Problem], Value | None]
    schema: Mapping[str, Any]


class Setting(msgspec.Struct, frozen=True):
    """One setting of a kind of channel.

    Attributes:
        words: what it means to people.
        type: what its value must be.
        required: whether a channel is nothing without it.
        secret: whether its value must be kept elsewhere; URLs may be.
        default: where it is not set; None for none, or one that depends on other settings (``words`` say so).
    """

    words: str
    type: ValueType
    required: bool = False
    secret: bool = False
    default: Value | None = None


# -- what values must be ---------------------------------------------------------------------------------


def _line(value: Any, problem: Problem) -> str | None:
    if not isinstance(value, str) or not value:
        problem("it must be text")
    elif not value.isprintable():
        problem("it must be one line, without control characters")
    else:
        return value
    return None


def _absolute_path(value: Any, problem: Problem) -> str | None:
    text = _line(value, problem)
    if text is not None and not text.startswith("/"):
        problem("it must be a whole path, beginning with /")
        return None
    return text


def _port(value: Any, problem: Problem) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65535:
        problem("it must be a port: a number from 1 to 65535")
        return None
    return value


def _host(value: Any, problem: Problem) -> str | None:
    text = _line(value, problem)
    if text is not None and not re.fullmatch(r"[\w.:-]+", text):
        problem("it must be a host's name or address alone; the port is a setting of its own")
        return None
    # smtplib would take what follows a single colon for a port.
    if text is not None and text.count(":") == 1:
        problem(f"it must be the host alone: write host = {text.partition(':')[0]!r} and port = ...")
        return None
    return text


def _timeout(value: Any, problem: Problem) -> float | None:
    if not isinstance(value, str):
        problem('it must be a duration with its unit: "20s"')
        return None
    try:
        seconds = parse_duration(value)
    except UsageError as error:
        problem(f"{error.why}: write e.g. 20s")
        return None
    if not 0 < seconds <= _LONGEST_TIMEOUT:
        problem("it must be more than 0s and at most 10m: a message that takes longer keeps the others waiting")
        return None
    return seconds


def _choice(*known: str) -> ValueType:
    def read(value: Any, problem: Problem) -> str | None:
        if value in known:
            return str(value)
        close = get_close_matches(value, known, 1) if isinstance(value, str) else []
        problem(f"known are {', '.join(known)}" + (f": did you mean {close[0]}?" if close else ""))
        return None

    return ValueType("one of " + ", ".join(known), read, {"enum": list(known)})


def _address(value: Any, problem: Problem) -> str | None:
    text = _line(value, problem)
    if text is None or parse_address(text) is not None:
        return text
    problem(f"{text!r} is no mail address: write dba@example.com, or 'Name <dba@example.com>'")
    return None


def _addresses(value: Any, problem: Problem) -> tuple[str, ...] | None:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple) or not value:
        problem('it must be a list of mail addresses: ["dba@example.com"]')
        return None
    found = [_address(item, problem) for item in value]
    return None if None in found else tuple(item for item in found if item is not None)


def parse_address(text: str) -> Address | None:
    """Return the one mail address that a text is, with or without a name before it; None if it isn't one.

    A local name without a host (``root``) is one: the mail server knows what to do with it.
    """
    message = EmailMessage(policy=SMTP)
    try:
        message["To"] = text
        found: tuple[Address, ...] = message["To"].addresses
    except (ValueError, IndexError):  # the parser runs off the end of "a@"
        return None
    whole = re.fullmatch(r"[^\s@<>,;:\"]+(?:@[^\s@<>,;:\"]+)?", found[0].addr_spec) if len(found) == 1 else None
    if whole is None or ("<" in text) != text.endswith(">"):
        return None
    return found[0]


def _secret(what: str) -> ValueType:
    def read(value: Any, problem: Problem) -> Value | None:
        return read_secret(value, problem, what)

    return ValueType("a secret", read, secret_schema())


def _text_or_secret(what: str, check: Callable[[str, Problem], bool], words: str) -> ValueType:
    def read(value: Any, problem: Problem) -> Text | None:
        if not isinstance(value, str):
            return read_secret(value, problem, what)
        return value if check(value, problem) else None

    return ValueType(words, read, {"anyOf": [{"type": "string", "minLength": 1}, secret_schema()]})


def _is_http_url(text: str, problem: Problem) -> bool:
    # The text is never repeated: the path of such a URL is often all that protects it.
    found = split_url(text)
    if found is None:
        problem("it must be a whole http or https URL; other characters than ASCII are written with %")
        return False
    if found.password:
        problem('a password in a URL doesn\'t belong into the config: keep the URL in a file, url = { file = "/path" }')
        return False
    return True


def split_url(text: str) -> SplitResult | None:
    """Return the parts of an http or https URL; None if it isn't one."""
    try:
        found = urlsplit(text)
        whole = bool(found.hostname) and found.scheme in ("http", "https") and found.port != 0
    except ValueError:
        return None
    return found if whole and not _NOT_OF_A_URL.search(text) else None


def _is_topic(text: str, problem: Problem) -> bool:
    if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text):
        return True
    problem("it must be letters, digits, - and _, at most 64")
    return False


def _apprise_urls(value: Any, problem: Problem) -> tuple[Text, ...] | None:
    items = value if isinstance(value, list | tuple) else [value]
    found: list[Text] = []
    for item in items:
        if not isinstance(item, str):
            secret = read_secret(item, problem, "a URL of Apprise")
            found += [secret] if secret is not None else []
        elif not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\0-\x1f]+", item):
            problem("it must be a URL of Apprise, SERVICE://..., or a list of them")
        elif re.match(r"[^:]+://[^/@]*:[^/@]+@", item):
            problem('a password in a URL doesn\'t belong into the config: keep the URL in a file, { file = "/path" }')
        else:
            found.append(item)
    if not items:
        problem("it must name at least one URL")
    return tuple(found) if found and len(found) == len(items) else None


def _headers(value: Any, problem: Problem) -> tuple[tuple[str, Text], ...] | None:
    if not isinstance(value, Mapping):
        problem('it must be a table: { X-Team = "db", Authorization = { file = "/path" } }')
        return None
    found: list[tuple[str, Text]] = []
    for name, content in value.items():
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or name.lower() in _OUR_HEADERS:
            problem(f"{name!r} can't be set as a header")
        elif isinstance(content, str) and not _SECRET_HEADER.search(name):
            if content.isprintable() and content.isascii():
                found.append((name, content))
            else:
                problem(f"{name}: it must be one line of ASCII")
        elif (secret := read_secret(content, lambda words, name=name: problem(f"{name}: {words}"), "it")) is not None:  # type: ignore[misc]
            found.append((name, secret))
    return tuple(found) if len(found) == len(value) else None


def _command(value: Any, problem: Problem) -> tuple[str, ...] | None:
    good = isinstance(value, list | tuple) and bool(value) and all(isinstance(word, str) for word in value)
    if not good or not value[0] or any("\0" in word for word in value):
        problem('it must be a list, the program and its arguments; there is no shell: ["/usr/local/bin/tell", "db"]')
        return None
    return tuple(value)


_TEXT = {"type": "string", "minLength": 1}
_LINE = ValueType("text", _line, _TEXT)
_PATH = ValueType("a path", _absolute_path, {"type": "string", "pattern": "^/"})
_PORT = ValueType("a port", _port, {"type": "integer", "minimum": 1, "maximum": 65535})
_HOST = ValueType("a host", _host, _TEXT)
_ADDRESS = ValueType("a mail address", _address, _TEXT)
_ADDRESSES = ValueType(
    "mail addresses", _addresses, {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "minItems": 1}]}
)
_HIDDEN = {"anyOf": [_TEXT, secret_schema()]}
_URL = _text_or_secret("the URL", _is_http_url, "a URL, or where it is kept")
_TOPIC = _text_or_secret("the topic", _is_topic, "text, or where it is kept")
_APPRISE_URLS = ValueType(
    "URLs, or where they are kept",
    _apprise_urls,
    {"anyOf": [_TEXT, secret_schema(), {"type": "array", "items": _HIDDEN, "minItems": 1}]},
)
_HEADERS = ValueType("a table of text or secrets", _headers, {"type": "object", "additionalProperties": _HIDDEN})
_COMMAND = ValueType(
    "a program and its arguments", _command, {"type": "array", "items": {"type": "string"}, "minItems": 1}
)

_TIMEOUT = Setting(
    "the longest that a delivery may take, all in all",
    ValueType("a duration", _timeout, {"type": "string"}),
    default=20.0,
)
_CA_FILE = Setting("certificates (PEM) that are trusted instead of the system's", _PATH)

CHANNEL_HELP: Mapping[str, str] = {
    MAIL: "mail, by a server (host) or this host's own sendmail",
    WEBHOOK: "JSON, posted to a URL",
    SLACK: "an incoming webhook of Slack, Mattermost or Rocket.Chat",
    NTFY: "a topic of ntfy",
    HEALTHCHECKS: "a check of Healthchecks: pings at beginning and end, or alerts",
    COMMAND: "a program of this host: the text on its stdin, the rest in BACKHAUL_SUBJECT, _STATE, _JOB, _FAILURE",
    APPRISE: "any service that Apprise knows (pip install 'backhaul[apprise]')",
}
CHANNEL_SETTINGS: Mapping[str, Mapping[str, Setting]] = {
    MAIL: {
        "host": Setting("the mail server", _HOST),
        "port": Setting("its port: by tls 465 or 587, else 587 with a user and 25 without", _PORT),
        "tls": Setting(
            "implicit (the default at port 465), starttls (at 587) or none; never less than is said",
            _choice(STARTTLS, IMPLICIT, NO_TLS),
        ),
        "user": Setting("whom to log in as", _LINE),
        "password": Setting("the user's", _secret("a password"), secret=True),
        "from": Setting("the sender", _ADDRESS, required=True),
        "to": Setting("who gets it", _ADDRESSES, required=True),
        "ca-file": _CA_FILE,
        "sendmail": Setting("instead of host: a program that takes mail as sendmail does, with -t -oi", _PATH),
        "timeout": _TIMEOUT,
    },
    WEBHOOK: {
        "url": Setting("where to", _URL, required=True),
        "method": Setting("how", _choice("POST", "PUT", "PATCH"), default="POST"),
        "headers": Setting("more headers; those that authorize must be secrets", _HEADERS),
        "ca-file": _CA_FILE,
        "timeout": _TIMEOUT,
    },
    SLACK: {
        "url": Setting("the incoming webhook; who knows it can post", _URL, required=True),
        "ca-file": _CA_FILE,
        "timeout": _TIMEOUT,
    },
    NTFY: {
        "topic": Setting("the topic; on a public server who knows it can read", _TOPIC, required=True),
        "server": Setting("the server's URL", _URL, default="https://ntfy.sh"),
        "token": Setting("an access token", _secret("a token"), secret=True),
        "ca-file": _CA_FILE,
        "timeout": _TIMEOUT,
    },
    HEALTHCHECKS: {
        "url": Setting("the check's ping URL, without /start or /fail", _URL, required=True),
        "ca-file": _CA_FILE,
        "timeout": _TIMEOUT,
    },
    COMMAND: {"command": Setting("what runs; no shell", _COMMAND, required=True), "timeout": _TIMEOUT},
    APPRISE: {
        "url": Setting("one URL of Apprise, or a list", _APPRISE_URLS, required=True),
        "timeout": _TIMEOUT,
    },
}


# -- reading ---------------------------------------------------------------------------------------------


def read_channel(name: str, table: Any, problems: Callable[[str, str], None]) -> Channel | None:
    """Read one ``[notify.NAME]`` table.

    Args:
        name: the channel's.
        table: what TOML made of it.
        problems: told each thing that is wrong, as (key, reason); the key is empty for the table as a whole.

    Returns:
        The channel; None where there was any problem.
    """
    found: list[str] = []

    def problem(key: str, reason: str) -> None:
        found.append(key)
        problems(key, reason)

    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        problem("", f"{name!r} can't be a channel's name: names have letters, digits, - and _")
    if not isinstance(table, Mapping):
        problem("", "it must be a table: [notify.NAME]")
        return None
    kind = _kind(table, problem)
    if kind is None:
        return None
    known = CHANNEL_SETTINGS[kind]
    settings: dict[str, Value] = {}
    given = set()
    for raw_key, value in table.items():
        key = raw_key.replace("_", "-")
        if key == "kind":
            continue
        setting = known.get(key)
        if setting is None:
            problem(raw_key, _unknown(key, kind))
        elif key in given:
            problem(raw_key, "it is there twice, with - and with _")
        else:
            read = setting.type.read(value, lambda reason, key=raw_key: problem(key, reason))  # type: ignore[misc]
            if read is not None:
                settings[key] = read
        given.add(key)
    for key, setting in known.items():
        if key not in given and setting.required:
            problem(key, f"it is missing: {setting.words}")
        elif key not in given and setting.default is not None:
            settings[key] = setting.default
    if kind == MAIL:
        _complete_mail(settings, given, problem)
    return None if found else Channel(name=name, kind=kind, settings=settings)


def _kind(table: Mapping[str, Any], problem: Callable[[str, str], None]) -> str | None:
    kind = table.get("kind")
    if kind in CHANNEL_KINDS:
        return str(kind)
    known = "known are " + ", ".join(CHANNEL_KINDS)
    if kind is None:
        problem("kind", f"it is missing: {known}")
    else:
        close = get_close_matches(kind.lower(), CHANNEL_KINDS, 1) if isinstance(kind, str) else []
        problem("kind", f"{kind!r} is not known: " + (f"did you mean {close[0]}?" if close else known))
    return None


def _unknown(key: str, kind: str) -> str:
    known = tuple(CHANNEL_SETTINGS[kind])
    close = get_close_matches(key, known, 1)
    if close:
        return f"it is not known: did you mean {close[0]}?"
    others = [other for other, settings in CHANNEL_SETTINGS.items() if key in settings]
    belongs = f" (it is one of {', '.join(others)})" if others else ""
    return f"it is no setting of {kind}{belongs}; known are {', '.join(known)}"


def _complete_mail(settings: dict[str, Value], given: set[str], problem: Callable[[str, str], None]) -> None:
    """Settle what depends on other settings."""
    if "sendmail" in given:
        for key in ("host", "port", "tls", "user", "password", "ca-file"):
            if key in given:
                problem(key, "it says nothing beside sendmail: that program knows its own server")
        return
    if "host" not in given:
        problem("host", 'it is missing: name the mail server, or a program by sendmail = "/usr/sbin/sendmail"')
    for key, other in (("user", "password"), ("password", "user")):
        if key in given and other not in given:
            problem(other, f"it is missing: there is a {key}")
    if "port" not in given:
        by_tls = {IMPLICIT: _SUBMISSIONS, STARTTLS: _SUBMISSION}.get(str(settings.get("tls")))
        settings["port"] = by_tls or (_SUBMISSION if "user" in given else _RELAY)
    if "tls" not in given:
        settings["tls"] = {_SUBMISSIONS: IMPLICIT, _SUBMISSION: STARTTLS}.get(_as_port(settings), NO_TLS)
        host = settings.get("host")
        if settings["tls"] == NO_TLS and "password" in given and isinstance(host, str) and not _is_this_host(host):
            problem(
                "tls",
                'it is missing: at this port the password would cross the network readable; write tls = "starttls", '
                'or tls = "none" where that is right',
            )


def _as_port(settings: Mapping[str, Value]) -> int:
    port = settings.get("port")
    return port if isinstance(port, int) else 0


def _is_this_host(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


# -- JSON Schema -----------------------------------------------------------------------------------------


def channel_schema() -> dict[str, Any]:
    """Return the JSON Schema of a ``[notify.NAME]`` table."""
    return {"oneOf": [_kind_schema(kind) for kind in CHANNEL_KINDS]}


def _kind_schema(kind: str) -> dict[str, Any]:
    properties: dict[str, Any] = {"kind": {"const": kind}}
    for key, setting in CHANNEL_SETTINGS[kind].items():
        schema = {"description": setting.words, **setting.type.schema}
        properties[key] = schema
        properties[key.replace("-", "_")] = schema
    return {
        "type": "object",
        "description": CHANNEL_HELP[kind],
        "properties": properties,
        "required": ["kind", *(key for key, setting in CHANNEL_SETTINGS[kind].items() if setting.required)],
        "additionalProperties": False,
    }
