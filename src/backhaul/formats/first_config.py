"""The first config of a host, made from what ``backhaul init`` was answered; and recognised when init comes again.

What is written is read back by ``formats.config``. This module knows neither files nor hosts: paths, the host's name
and what its databases need are given to it.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import msgspec

from backhaul.errors import UsageError
from backhaul.formats.channel_settings import parse_address, split_url
from backhaul.model.channel import HEALTHCHECKS, MAIL, NTFY, SLACK, WEBHOOK
from backhaul.model.job import ALL_JOBS

NOBODY = "nobody"
DEFAULT_NAME = "backups"
DEFAULT_START = "02:00"
# What stays of a series: its newest, and one of each day, week and month.
KEPT = {"keep_last": 7, "keep_daily": 14, "keep_weekly": 8, "keep_monthly": 12}
_LENGTH = "6h"
# Hours after the opening of the window: what has failed by then is not pruned nor drilled as if it were there.
_PRUNE_AFTER, _DRILL_AFTER = 7, 8
# Minutes over which beginnings are spread: each further database gets some more.
_JITTER, _JITTER_EACH, _JITTER_MOST = 15, 5, 120
_LONGEST_NAME = 48
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*", re.ASCII)
_TIME = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)", re.ASCII)
_MARK = re.compile(
    r"# Made by: backhaul init --name ([A-Za-z][A-Za-z0-9_-]*) --schedule ([a-z]+)$", re.ASCII | re.MULTILINE
)
_TAKEN = (ALL_JOBS, "with", "tick")
_PING = re.compile(r"/ping/[^/]+(/[^/]+)?/?")


class FirstSource(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to back up.

    Attributes:
        url: as for ``push --from``.
        job: the name of its job, and of its series below the store.
        drilled: whether this host can drill it.
        environment: variables that its backups need, and that a timer has not.
        secrets: such variables that are secret: the files that hold them.
    """

    url: str
    job: str
    drilled: bool
    environment: Mapping[str, str] = {}
    secrets: Mapping[str, str] = {}


class FirstChannel(msgspec.Struct, frozen=True, kw_only=True):
    """Whom to tell: a ``[notify.NAME]`` table; ``hidden`` is the key of it that is kept in a file, and its text."""

    kind: str
    settings: Mapping[str, str | int] = {}
    hidden: tuple[str, str] | None = None


class FirstConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All that the config is made from.

    Attributes:
        name: of this set-up.
        store_name: what the store is called.
        store: the store's URL, or ``NAME:path`` in a store that a config names already.
        settings: what the store needs besides its URL.
        sources: what is backed up.
        channels: by name; the file that holds what is hidden, for those that hide something.
        start: when the nightly window opens, HH:MM; ``timezone``: by which clock, empty for the host's.
        how: what was chosen to begin jobs: init goes by it when it goes on.
        environment: variables that all jobs need.
    """

    name: str
    store_name: str
    store: str
    settings: Mapping[str, str] = {}
    sources: tuple[FirstSource, ...]
    channels: Mapping[str, tuple[FirstChannel, str]] = {}
    start: str = DEFAULT_START
    timezone: str = ""
    how: str = "auto"
    environment: Mapping[str, str] = {}


class Mark(msgspec.Struct, frozen=True):
    """What a config says of its making: the name of the set-up, and what was to begin its jobs."""

    name: str
    how: str


def first_config(config: FirstConfig) -> str:
    """Return the config as TOML, commented so that a person can go on from it.

    Raises:
        UsageError: a name has bytes that no text has.
    """
    text = "\n".join(_lines(config))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            "A name can't be written into a config",
            f"{error.object[error.start : error.end]!r} is no text",
            "Rename it.",
        ) from error
    return text


def made_by_init(text: str) -> Mark | None:
    """Return the mark of a config that init made; None for a config that somebody else wrote."""
    found = _MARK.match(text)
    return Mark(found[1], found[2]) if found is not None else None


def jobs_of(text: str) -> dict[str, str]:
    """Return the jobs of a config's text and their kinds.

    Raises:
        UsageError: it is no TOML.
    """
    return {name: str(job.get("kind", "")) for name, job in _tables(text).get("jobs", {}).items()}


def differences(text: str, *, sources: Sequence[str], store: str, start: str) -> list[str]:
    """Say in what a config that init made differs from what it is asked for now; empty parts ask for nothing.

    Raises:
        UsageError: it is no TOML.
    """
    tables = _tables(text)
    jobs = [job for job in tables.get("jobs", {}).values() if job.get("kind") == "push"]
    there = {job.get("from") for job in jobs}
    found = [f"it does not back up {url}" for url in sources if url not in there]
    stores = [table.get("url") for table in tables.get("stores", {}).values()]
    known = [*stores, *(place.rpartition("/")[0] for job in jobs for place in [str(job.get("to", ""))])]
    if store and store not in known:
        found.append(f"its store is {stores[0] if stores else 'another'}, not {store}")
    starts = {str(job.get("window", {}).get("start", "")) for job in jobs}
    if start and starts != {start}:
        found.append(f"its window opens at {', '.join(sorted(starts))}, not at {start}")
    return found


def parse_start(text: str) -> str:
    """Read the beginning of the window, and return it as HH:MM.

    Raises:
        UsageError: it is no time of the day.
    """
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a time of the day", "it is HH:MM, by this host's clock", "Write e.g. 02:00.")
    return f"{int(match[1]):02}:{match[2]}"


def parse_name(text: str) -> str:
    """Read the name of a set-up.

    Raises:
        UsageError: it can't be one.
    """
    if not _NAME.fullmatch(text) or len(text) > _LONGEST_NAME:
        raise UsageError(
            f"{text!r} can't be a name here",
            f"names have letters, digits, - and _, begin with a letter, and have at most {_LONGEST_NAME} of them",
            f"Choose another, e.g. --name {DEFAULT_NAME}",
        )
    return text


def job_names(labels: Sequence[str], taken: Collection[str] = ()) -> list[str]:
    """Return a job's name for each label: readable, no two alike, and leaving room for its prune and drill jobs.

    Args:
        labels: of any characters.
        taken: names of jobs that there are.
    """
    used = {name.lower() for name in (*taken, *_TAKEN)}
    found = []
    for label in labels:
        plain = re.sub(r"[^A-Za-z0-9_-]+", "-", label, flags=re.ASCII).strip("-")[:_LONGEST_NAME].rstrip("-")
        plain = plain if re.match(r"[A-Za-z]", plain) else f"db-{plain}".rstrip("-")
        name, number = plain, 2
        while {name.lower(), f"prune-{name}".lower(), f"drill-{name}".lower()} & used:
            name, number = f"{plain}-{number}", number + 1
        used |= {name.lower(), f"prune-{name}".lower(), f"drill-{name}".lower()}
        found.append(name)
    return found


def channel_of(text: str, *, host: str, sendmail: str, smtp_host: str) -> FirstChannel:
    """Read whom to tell: a mail address, or an http(s) URL, whose service is recognised.

    Args:
        text: as it was answered.
        host: this host's name, for the sender.
        sendmail: the local program that takes mail; empty for none.
        smtp_host: the mail server, ``HOST[:PORT]``; empty for sendmail, or else this host's port 25.

    Raises:
        UsageError: it is neither.
    """
    if "://" in text:
        url = split_url(text)
        if url is None or url.username or url.password:
            raise UsageError(
                "The URL of whom to tell can't be used",
                "it is no whole http or https URL" if url is None else "it holds a user's name or a password",
                "Write https://..., in ASCII; headers and tokens can be written into the config later.",
            )
        return _web_channel(text)
    if not _is_address(text):
        raise UsageError(
            f"{text!r} is nobody who can be told",
            "it is neither a mail address nor an http(s) URL",
            f"Write dba@example.com, https://..., or {NOBODY}.",
        )
    sender = f"backhaul@{host}" if _is_address(f"backhaul@{host}") else "backhaul@localhost"
    settings: dict[str, str | int] = {"from": sender, "to": text}
    if smtp_host:
        name, colon, port = smtp_host.rpartition(":")
        if not colon or not port.isdigit() or (":" in name and not name.endswith("]")):
            name, port = smtp_host, ""
        settings["host"] = name.strip("[]")
        if port:
            settings["port"] = int(port)
    elif sendmail:
        settings["sendmail"] = sendmail
    else:
        settings |= {"host": "localhost", "port": 25}
    return FirstChannel(kind=MAIL, settings=settings)


def _is_address(text: str) -> bool:
    return text.isprintable() and parse_address(text) is not None


def _web_channel(text: str) -> FirstChannel:
    url = urlsplit(text)
    host, path = (url.hostname or "").lower(), url.path
    if host == "hooks.slack.com" or path.startswith("/hooks/"):  # Slack; Mattermost and Rocket.Chat
        return FirstChannel(kind=SLACK, hidden=("url", text))
    if host == "hc-ping.com" or "healthchecks" in host or _PING.fullmatch(path):
        return FirstChannel(kind=HEALTHCHECKS, hidden=("url", text))
    topic = path.strip("/")
    if (host == "ntfy.sh" or host.startswith("ntfy.")) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", topic):
        server = urlunsplit((url.scheme, url.netloc, "", "", ""))
        return FirstChannel(kind=NTFY, settings={"server": server}, hidden=("topic", topic))
    return FirstChannel(kind=WEBHOOK, hidden=("url", text))


# -- the text --------------------------------------------------------------------------------------------


def _lines(config: FirstConfig) -> Iterator[str]:
    yield f"# Made by: backhaul init --name {config.name} --schedule {config.how}"
    yield "# It is yours from here on: init never changes it again. All settings: backhaul config schema; what holds:"
    yield "# backhaul config show. After a change: backhaul config check, and backhaul schedule install."
    yield ""
    named = re.match(r"([A-Za-z][A-Za-z0-9_-]*):(?!//)", config.store)
    base = config.store.rstrip("/") + ("" if config.store.endswith(":") else "/") if named else f"{config.store_name}:"
    if not named:
        yield f"# Where backups go: {config.store_name}:NAME is NAME below this place, here and on the command line."
        yield f"[stores.{config.store_name}]"
        yield f"url = {_text(config.store)}"
        for key, value in config.settings.items():
            if key == "credentials-file":
                yield "# The keys of the shell that init ran in, which timers have not. Only the file's owner reads it."
            yield f"{key} = {_text(value)}"
        yield ""
    if config.channels:
        yield "# Who is told when something fails, is late, or is well again. To try it: backhaul notify test"
    for name, (channel, file) in config.channels.items():
        yield f"[notify.{name}]"
        yield f'kind = "{channel.kind}"'
        for key, setting in channel.settings.items():
            yield f"{key} = {setting if isinstance(setting, int) else _text(setting)}"
        if channel.hidden is not None:
            yield "# (Who knows it can post: it is kept in a file that only its owner reads.)"
            yield f"{channel.hidden[0]} = {{ file = {_text(file)} }}"
        yield ""
    if not config.channels:
        yield "# Nobody is told when something fails: that was asked for. To change it write [notify.NAME], and into"
        yield '# each job notify = ["NAME"]; see docs/commands/notify.md.'
    for source in config.sources:
        yield ""
        yield from _jobs(config, source, f"{base}{source.job}")
    yield ""


def _jobs(config: FirstConfig, source: FirstSource, series: str) -> Iterator[str]:
    jitter = min(max(_JITTER, _JITTER_EACH * len(config.sources)), _JITTER_MOST)
    # In each job, not in [defaults]: those would hold for the jobs of other files, too.
    common = [f"notify = [{', '.join(_text(name) for name in config.channels)}]"] if config.channels else []
    window = {"length": _LENGTH, "jitter": f"{jitter}m"}
    if config.timezone:
        window["timezone"] = config.timezone
    yield f"[jobs.{source.job}]"
    yield 'kind = "push"'
    yield f"from = {_text(source.url)}"
    yield f"to = {_text(series)}"
    yield f"window = {_table({'start': config.start, **window})}"
    yield 'max_age = "26h"            # older than a night and two hours: it is overdue, and people are told'
    yield from common
    environment = {**config.environment, **source.environment}
    if environment or source.secrets:
        yield "# What the shell had in which init ran, and timers have not. (Secrets: in files of their owner alone.)"
        items = [f"{name} = {_text(value)}" for name, value in environment.items()]
        items += [f"{name} = {{ file = {_text(path)} }}" for name, path in source.secrets.items()]
        yield f"environment = {{ {', '.join(items)} }}"
    yield ""
    yield "# Removes old backups, some hours after. The last that is proved to restore is never removed."
    yield f"[jobs.prune-{source.job}]"
    yield 'kind = "prune"'
    yield f"series = {_text(series)}"
    yield from (f"{key} = {count}" for key, count in KEPT.items())
    yield f"window = {_table({'start': _later(config.start, _PRUNE_AFTER), **window})}"
    yield 'max_age = "26h"'
    yield from common
    if config.environment:
        yield f"environment = {_table(config.environment)}"
    yield ""
    if source.drilled:
        yield "# Proves once a week that the newest backup restores, in a scratch server on this host."
        yield f"[jobs.drill-{source.job}]"
        yield 'kind = "drill"'
        yield f"series = {_text(series)}"
        yield f"window = {_table({'start': _later(config.start, _DRILL_AFTER), 'days': 'sun', **window})}"
        yield 'max_age = "8d"'
        yield from common
        if config.environment:
            yield f"environment = {_table(config.environment)}"
    else:
        yield "# It can't be drilled on this host (backhaul doctor says why): drill it on another."


def _later(start: str, hours: int) -> str:
    hour, _, minute = start.partition(":")
    return f"{(int(hour) + hours) % 24:02}:{minute}"


def _table(values: Mapping[str, str]) -> str:
    return "{ " + ", ".join(f"{key} = {_text(value)}" for key, value in values.items()) + " }"


def _text(value: str) -> str:
    """Write a basic string of TOML 1.0: JSON's but for DEL, which must be escaped, too."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _tables(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError("The config is no TOML", str(error), "Correct it, and try: backhaul config check") from error
