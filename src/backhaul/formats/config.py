"""The config as TOML: stores, jobs, channels, and what holds for every job. ``operations.places`` finds the files.

::

    [stores.offsite]
    url = "s3://acme/backups"
    endpoint = "https://s3.example.com"
    tags = { team = "db" }

    [notify.ops]
    kind = "mail"
    host = "smtp.example.com"
    from = "backhaul@db7.example.com"
    to = "ops@example.com"

    [defaults]
    notify = "ops"

    [jobs.orders]
    kind = "push"
    from = "postgresql:///orders"
    to = "offsite:db7/orders"
    max_age = "26h"
    window = { start = "22:00", length = "330m", days = "mon-sat" }

``offsite:db7/orders`` is then ``s3://acme/backups/db7/orders`` with that store's settings, which are those of a URL
(``formats.store_settings``). The settings of jobs are those of ``formats.job_settings``, those of channels of
``formats.channel_settings``. Everything that is wrong is said at once, with its file and key.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import msgspec

from backhaul.errors import BackhaulError, ConfigurationError, UsageError
from backhaul.formats.location import parse_location, parse_series
from backhaul.formats.roster import SCHEME, parse_destination, parse_hosts
from backhaul.formats.store_settings import SETTING_HELP, read_settings
from backhaul.model.job import ALL_JOBS, COMMAND, DRILL, KINDS, MIRROR, PRUNE, PUSH
from backhaul.model.location import Location

if TYPE_CHECKING:
    from backhaul.model.channel import Channel

TABLES = ("stores", "defaults", "notify", "jobs")
_SETTINGS = tuple(name for name, _ in SETTING_HELP)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*", re.ASCII)
# What `backhaul hold` and `backhaul run` say of themselves.
TAKEN_NAMES = (ALL_JOBS, "with", "tick")


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong: in which file, under which key, why."""

    file: str
    key: str
    reason: str


class JobSettings(msgspec.Struct, frozen=True, kw_only=True):
    """A job's table with the defaults below it, checked.

    Attributes:
        name: the job's.
        kind: one of ``model.job.KINDS``.
        values: by key, as ``formats.job_settings`` reads them.
        origins: where each comes from, for people: ``FILE [defaults]`` and the like.
    """

    name: str
    kind: str
    values: Mapping[str, Any]
    origins: Mapping[str, str]


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """All that the config files say.

    Attributes:
        stores, jobs, channels: by name (``Location``, ``JobSettings``, ``Channel``).
        tables: all of it as it was written, later files over earlier ones; ``origins`` says by dotted key which file.
        files: those that were read.
    """

    stores: Mapping[str, Location] = {}
    jobs: Mapping[str, JobSettings] = {}
    channels: Mapping[str, Any] = {}
    tables: Mapping[str, Any] = {}
    origins: Mapping[str, str] = {}
    files: tuple[str, ...] = ()


class ConfigError(ConfigurationError):
    """The config is not right; ``problems`` has everything that is wrong."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        files = ", ".join(dict.fromkeys(problem.file for problem in problems))
        lines = [f"{_shown(problem.key)}{problem.reason}" for problem in problems]
        if len({problem.file for problem in problems}) > 1:
            lines = [f"{problem.file}: {line}" for problem, line in zip(problems, lines, strict=True)]
        super().__init__(f"{files} is not right", "\n".join(lines), "Correct it, and try: backhaul config check")
        self.details = {"problems": msgspec.to_builtins(self.problems)}


def _shown(key: str) -> str:
    """Write a key as it stands in a file: ``[jobs.orders] compress: ``."""
    parts = key.split(".") if key else []
    rest = ".".join(parts[2:])
    table = f"[{'.'.join(parts[:2])}]" if len(parts) > 1 else key
    return f"{table} {rest}: " if rest else f"{table}: " if table else ""


def read_stores(text: str, where: str) -> dict[str, Location]:
    """Return the stores of a config file by name; what else it holds is not looked at.

    Args:
        text: TOML.
        where: the file's name, for messages.

    Raises:
        ConfigurationError: with everything that is wrong, not only the first.
    """
    reader = _Reader()
    reader.load(text, where)
    stores = reader.stores()
    if reader.problems:
        raise ConfigError(reader.problems)
    return stores


def read_config(documents: Sequence[tuple[str, str]], zone: str) -> Config:
    """Read all of the config.

    Args:
        documents: the files, each its name and its text; later ones win by store, channel and job, and in [defaults]
            by key.
        zone: the IANA name of this host's time zone.

    Raises:
        ConfigurationError: with everything that is wrong in all of them.
    """
    reader = _Reader()
    for where, text in documents:
        reader.load(text, where)
    stores = reader.stores()
    channels = reader.channels()
    jobs = reader.jobs(stores, channels, zone)
    if reader.problems:
        raise ConfigError(reader.problems)
    return Config(
        stores=stores,
        jobs=jobs,
        channels=channels,
        tables=reader.tables,
        origins=reader.origins,
        files=tuple(where for where, _ in documents),
    )


class _Reader:
    """Merges documents, and reads what came of it."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.tables: dict[str, dict[str, Any]] = {name: {} for name in TABLES}
        self.origins: dict[str, str] = {}

    def problem(self, key: str, reason: str) -> None:
        """Note what is wrong with a dotted key."""
        parts = key.split(".")
        file = next(
            (self.origins[at] for n in range(len(parts), 0, -1) if (at := ".".join(parts[:n])) in self.origins), ""
        )
        self.problems.append(Problem(file, key, reason))

    def load(self, text: str, where: str) -> None:
        """Take one document in."""
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            self.problems.append(Problem(where, "", f"it is no TOML: {error}"))
            return
        for table, content in document.items():
            if table not in TABLES:
                self.problems.append(Problem(where, table, "not known" + _meant(table, TABLES)))
            elif not isinstance(content, Mapping):
                self.problems.append(Problem(where, table, f"it must be a table: [{table}]"))
            else:
                for key, value in content.items():
                    self.tables[table][key] = value
                    self.origins[f"{table}.{key}"] = where

    def stores(self) -> dict[str, Location]:
        """Return the stores."""
        found = {}
        for name, table in self.tables["stores"].items():
            try:
                found[name] = _read_store(name, table)
            except UsageError as error:
                what = error.what.removeprefix(f"[stores.{name}]").lstrip(": ")
                self.problem(f"stores.{name}", f"{what}: {error.why}; {error.todo.rstrip('.')}")
        return found

    def channels(self) -> dict[str, Channel]:
        """Return the channels."""
        from backhaul.formats.channel_settings import read_channel

        found = {}
        for name, table in self.tables["notify"].items():
            at = f"notify.{name}"
            if not self._is_name(at, name) or not self._is_table(at, table):
                continue

            def problem(key: str, reason: str, at: str = at) -> None:
                self.problem(f"{at}.{key}" if key else at, reason)

            channel = read_channel(name, table, problem)
            if channel is not None:
                found[name] = channel
        return found

    def jobs(self, stores: Mapping[str, Location], channels: Mapping[str, Any], zone: str) -> dict[str, JobSettings]:
        """Return the jobs."""
        shared, shared_origins = self._values("defaults", self.tables["defaults"], "")
        if "start" in shared.get("window", {}):
            self.problem("defaults.window.start", "a start belongs to a job: it would begin all of them at once")
        self._check_references("defaults", shared, stores, channels)
        found = {}
        for name, table in self.tables["jobs"].items():
            at = f"jobs.{name}"
            if not self._is_name(at, name) or not self._is_table(at, table):
                continue
            kind = table.get("kind")
            if kind not in KINDS:
                words = "there is none" if kind is None else f"{kind!r} is not known" + _meant(str(kind), KINDS)
                self.problem(f"{at}.kind", f"{words}; it is one of {', '.join(KINDS)}")
                continue
            before = len(self.problems)
            own, own_origins = self._values(at, {key: value for key, value in table.items() if key != "kind"}, kind)
            values = {**shared, **own}
            origins = {**shared_origins, **own_origins}
            for merged in ("window", "environment"):
                if merged in shared and merged in own:
                    values[merged] = {**shared[merged], **own[merged]}
            if "window" not in own:
                values.pop("window", None)
            readable = len(self.problems) == before
            self._check_references(at, own, stores, channels)
            if readable:
                self._check_job(at, kind, values)
            if "window" in values:
                values["window"] = {"timezone": zone, **values["window"]}
            found[name] = JobSettings(name=name, kind=kind, values=values, origins=origins)
        return found

    def _values(self, at: str, table: Mapping[str, Any], kind: str) -> tuple[dict[str, Any], dict[str, str]]:
        from backhaul.formats.job_settings import settings_of  # (a push with a named store does not need it)

        known = settings_of(kind)
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for raw, value in table.items():
            key = raw.replace("-", "_")
            setting = known.get(key)
            if setting is None:
                other = [name for name in KINDS if key in settings_of(name)]
                where = f"; a {' or '.join(other)} job has it" if other and kind else ""
                self.problem(f"{at}.{raw}", "not known" + _meant(key, tuple(known)) + where)
                continue
            if key in values:
                self.problem(f"{at}.{raw}", f"it is there twice, as {key} and {key.replace('_', '-')}")
            try:
                values[key] = setting.form.read(value)
            except UsageError as error:
                words = ": ".join(part for part in (error.what, error.why) if part)
                self.problem(f"{at}.{raw}", words + (f"; {error.todo.rstrip('.')}" if error.todo else ""))
                continue
            file = self.origins.get(f"{at}.{raw}") or self.origins.get(at, "")
            origins[key] = f"{file} [{at}]"
        return values, origins

    def _check_job(self, at: str, kind: str, values: Mapping[str, Any]) -> None:
        """Look at what only several settings together can tell."""
        for keys in _NEEDED[kind]:
            given = [key for key in keys if key in values]
            if not given:
                self.problem(at, f"a {kind} job needs {' or '.join(keys)}")
            elif len(given) > 1:
                self.problem(f"{at}.{given[1]}", f"it has {given[0]} already: leave one of them out")
        if kind in (MIRROR, DRILL):
            key = "to" if kind == MIRROR else "series"
            if len(values.get(key, ())) > 1:
                self.problem(f"{at}.{key}", f"a {kind} job has one")
        if kind == PRUNE and not any(key.startswith("keep_") and key != "keep_runs" for key in values):
            self.problem(at, "a prune job needs to know what to keep: keep_last, keep_daily, keep_within and so on")
        window = values.get("window")
        if window is not None:
            if "start" not in window:
                self.problem(f"{at}.window", 'it has no start, e.g. start = "22:00"')
            if window.get("jitter", 0.0) >= window.get("length", DEFAULT_LENGTH):
                self.problem(f"{at}.window.jitter", "it is as long as the window: nothing would be left of it")
            if window.get("length", DEFAULT_LENGTH) < 60:
                self.problem(f"{at}.window.length", "a window is open for a minute at least")

    def _check_references(
        self, at: str, values: Mapping[str, Any], stores: Mapping[str, Location], channels: Mapping[str, Any]
    ) -> None:
        """Look whether what is named is there."""
        for key in ("to", "series", "records"):
            for place in values.get(key, ()):
                try:
                    if key == "to" and place.startswith(SCHEME):
                        self._check_roster(at, place)
                    elif key == "records":
                        parse_location(place, stores, whole_bucket=True)
                    else:
                        series = parse_series(place, stores)
                        if series.kind == "local" and not series.path.startswith("/"):
                            self.problem(f"{at}.{key}", f"{place!r} begins nowhere: a timer runs it elsewhere than you")
                except BackhaulError as error:
                    self.problem(f"{at}.{key}", f"{error.what}: {error.why}; {error.todo.rstrip('.')}")
        for key in ("notify", "pings"):
            for name in values.get(key, ()):
                if name not in channels and name not in self.tables["notify"]:
                    words = _meant(name, tuple(self.tables["notify"])) or f"; write [notify.{name}]"
                    self.problem(f"{at}.{key}", f"there is no channel {name}{words}")

    def _check_roster(self, at: str, place: str) -> None:
        """Look at a push's receivers; raises as ``parse_destination`` and ``parse_hosts`` do."""
        job = self.tables["jobs"].get(at.partition(".")[2], {})
        if job.get("kind", PUSH) != PUSH:
            self.problem(f"{at}.to", f"{place!r} is for pushes: a mirror goes to a store")
        roster, _ = parse_destination(place)
        if not roster.isdecimal():
            parse_hosts(roster)

    def _is_name(self, at: str, name: str) -> bool:
        if not _NAME.fullmatch(name) or name in TAKEN_NAMES:
            taken = f"{name} means something to the command line" if name in TAKEN_NAMES else ""
            self.problem(at, taken or "names have letters, digits, - and _, and begin with a letter")
            return False
        return True

    def _is_table(self, at: str, table: Any) -> bool:
        if not isinstance(table, Mapping):
            self.problem(at, f"it must be a table: [{at}]")
            return False
        return True


# For each kind: of each group exactly one.
_NEEDED: dict[str, tuple[tuple[str, ...], ...]] = {
    PUSH: (("from", "command"), ("to",)),
    MIRROR: (("directory",), ("to",)),
    DRILL: (("series",),),
    PRUNE: (("series",),),
    COMMAND: (("command", "pipeline"),),
}
# Seconds that a window stays open when nothing is said.
DEFAULT_LENGTH = 6 * 3600.0


def _meant(word: str, known: Sequence[str]) -> str:
    close = get_close_matches(word, known, 1)
    return f": did you mean {close[0]}?" if close else ""


def _read_store(name: str, table: Any) -> Location:
    if not _NAME.fullmatch(name):
        raise UsageError("its name can't be used", "names have letters, digits, - and _", "Choose another")
    if not isinstance(table, Mapping) or not isinstance(table.get("url"), str):
        raise UsageError("it has no url", "a store is a table with a url", 'Write url = "s3://bucket/path".')
    location = parse_location(table["url"], whole_bucket=True)
    given: dict[str, str] = {}
    for raw_key, value in table.items():
        key = raw_key.replace("_", "-")
        if key == "url":
            continue
        if key not in _SETTINGS:
            close = get_close_matches(key, _SETTINGS, 1)
            raise UsageError(
                f"{raw_key} is not a setting of a store",
                f"did you mean {close[0]}" if close else "known are url, " + ", ".join(_SETTINGS),
                "Correct or remove it",
            )
        given[key] = _as_text(key, value)
    if location.kind != "s3":
        if given:
            raise UsageError(f"a directory has no {', '.join(given)}", "these are settings of S3", "Remove them")
        return location
    fields = read_settings({**_settings_of(table["url"]), **given}, f"[stores.{name}]")
    return Location(text=location.text, kind="s3", bucket=location.bucket, path=location.path, **fields)


def _settings_of(url: str) -> dict[str, str]:
    from urllib.parse import parse_qsl

    return dict(parse_qsl(url.partition("?")[2], keep_blank_values=True))


def _as_text(key: str, value: Any) -> str:
    if key == "tags" and isinstance(value, Mapping):
        return ",".join(f"{name}:{text}" for name, text in value.items())
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value)
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    raise UsageError(f"{key} is {value!r}", "it must be text", f'Write {key} = "..."')
