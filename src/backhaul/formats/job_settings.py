"""The settings of a job in the config: one table for reading, for the JSON Schema and for the docs.

A setting that belongs to one of Backhaul's own verbs is that verb's option under its own name; it is checked here and
handed on as it was written.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from backhaul.errors import UsageError
from backhaul.formats.quantities import parse_duration, parse_size
from backhaul.formats.redaction import is_secret_name
from backhaul.formats.secret import read_secret, secret_schema
from backhaul.formats.source_url import parse_source_url
from backhaul.formats.timetable import parse_timetable
from backhaul.formats.window import parse_date, parse_days, parse_starts
from backhaul.model.job import COMMAND, DRILL, MIRROR, PRUNE, PUSH
from backhaul.model.schedule import AT_END

_SHELL = re.compile(r"[|<>;&`]|\$\(|\*|\?")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)%", re.ASCII)
_MAX_DELETE = re.compile(r"\d+|\d+(?:\.\d+)?%", re.ASCII)


class Form(msgspec.Struct, frozen=True):
    """How a value is written: its reader, its JSON Schema, and a word for the docs."""

    word: str
    read: Callable[[Any], Any]
    schema: Mapping[str, Any]


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One key of a job's table.

    Attributes:
        key: as it is written (``-`` may stand for ``_``).
        help: what it means.
        form: how its value is written.
        kinds: the kinds of job that have it; empty for all.
        option: the option of the verb that it is handed to; empty for what the runner itself goes by.
        default: what holds without it, for people.
    """

    key: str
    help: str
    form: Form
    kinds: tuple[str, ...] = ()
    option: str = ""
    default: str = ""


def _wrong(value: Any, why: str, todo: str) -> UsageError:
    return UsageError(f"{value!r} can't be its value", why, todo)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _wrong(value, "it must be text", 'Write it in quotes: "..."')
    return value


def _words(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (_text(value),)
    if not isinstance(value, list) or not value:
        raise _wrong(value, "it must be text, or a list of texts", 'Write ["...", "..."]')
    return tuple(_text(item) for item in value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(value, "it must be true or false", "Write true or false, without quotes")
    return value


def _count(least: int, most: int = 1 << 31) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise _wrong(value, f"it must be a whole number from {least}", "Write it without quotes")
        return value

    return read


def _checked(parse: Callable[[str], Any], *, parsed: bool) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        found = parse(_text(value))
        return found if parsed else value

    return read


def _choice(*words: str) -> Form:
    def read(value: Any) -> str:
        if value not in words:
            raise _wrong(value, f"it is one of {', '.join(words)}", f'Write e.g. "{words[0]}"')
        return str(value)

    return Form(" or ".join(f"`{word}`" for word in words), read, {"enum": list(words)})


def _share(value: Any) -> float:
    match = _PERCENT.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise _wrong(value, "it is a share of the usual size", 'Write e.g. "50%"')
    return float(match[1]) / 100


def _log_size(value: Any) -> int:
    size = parse_size(_text(value))
    if size < 64 << 10:
        raise _wrong(value, "hardly a line would be kept", 'Write at least "64Ki"')
    return size


def _absolute(value: Any) -> str:
    text = _text(value)
    if not text.startswith("/"):
        raise _wrong(value, "a timer runs it elsewhere than you", "Write the whole path, from /")
    return text


def _max_delete(value: Any) -> str:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not _MAX_DELETE.fullmatch(text):
        raise _wrong(value, "it is a number or a percentage", 'Write e.g. 50 or "20%"')
    return text


def _command(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        if _SHELL.search(value):
            raise _wrong(value, "no shell reads it, and it has what only a shell knows", _SHELL_TODO)
        try:
            words = tuple(shlex.split(value))
        except ValueError as error:
            raise _wrong(value, str(error), "Write it as a list of words") from error
        if not words:
            raise _wrong(value, "there is no command", 'Write e.g. ["pg_dump", "-Fc", "app"]')
        return words
    if not isinstance(value, list) or not value or not all(isinstance(word, str) and word for word in value[:1]):
        raise _wrong(value, "it must be a command: a list of words", 'Write e.g. ["pg_dump", "-Fc", "app"]')
    if not all(isinstance(word, str) for word in value):
        raise _wrong(value, "each word must be text", "For several programs write pipeline = [[...], [...]]")
    return tuple(value)


_SHELL_TODO = 'For programs that feed each other write pipeline = [[...], [...]]; for a shell ["sh", "-c", "..."]'


def _pipeline(value: Any) -> tuple[tuple[str, ...], ...]:
    if not isinstance(value, list) or not value:
        raise _wrong(value, "it must be a list of commands", 'Write [["pg_dump", "app"], ["gzip"]]')
    return tuple(_command(item) for item in value)


def _zone(value: Any) -> str:
    text = _text(value)
    try:
        ZoneInfo(text)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise _wrong(value, "no such time zone is known here", 'Write its IANA name, e.g. "Europe/Berlin"') from error
    return text


def _questions(value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not all(
        isinstance(item, list) and len(item) == 2 and all(isinstance(part, str) for part in item) for item in value
    ):
        raise _wrong(value, "it is a list of statements and their answers", 'Write [["SELECT count(*) FROM t", "3"]]')
    return tuple((item[0], item[1]) for item in value)


def _environment(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(value, "it must be a table", 'Write { PGHOST = "db7" }')
    found: dict[str, Any] = {}
    for name, item in value.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise _wrong(name, "it is no name of a variable", "Letters, digits and _")
        if isinstance(item, str) and not is_secret_name(name):
            found[name] = item
        elif isinstance(item, str):
            raise _wrong(
                "***",
                f"{name} looks like a secret, and a config is no place for one",
                f'Write {name} = {{ file = "/etc/backhaul/..." }}',
            )
        else:
            problems: list[str] = []
            secret = read_secret(item, problems.append, f"the value of {name}")
            if secret is None:
                raise UsageError(problems[0], "; ".join(problems[1:]), "")
            found[name] = secret
    return found


def _window(value: Any) -> dict[str, Any]:
    """Read a window's table, as far as it goes: the defaults may say the rest."""
    from difflib import get_close_matches

    if not isinstance(value, Mapping):
        raise _wrong(value, "it must be a table", 'Write { start = "22:00", length = "330m" }')
    found: dict[str, Any] = {}
    problems = []
    for raw, item in value.items():
        key = raw.replace("-", "_")
        known = WINDOW_FORMS.get(key)
        if known is None:
            close = get_close_matches(key, WINDOW_FORMS, 1)
            problems.append(f"{raw} is not known" + (f": did you mean {close[0]}?" if close else ""))
            continue
        try:
            found[key] = known[1].read(item)
        except UsageError as error:
            problems.append(f"{raw}: {error.what}: {error.why}; {error.todo.rstrip('.')}")
    if problems:
        raise UsageError(problems[0], "; ".join(problems[1:]), "")
    return found


def _duration(value: Any) -> float:
    return parse_duration(_text(value))


TEXT = Form("text", _text, {"type": "string", "minLength": 1})
PATH = Form("path", _absolute, {"type": "string", "pattern": "^/"})
WORDS = Form(
    "text, or a list",
    _words,
    {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]},
)
FLAG = Form("true or false", _flag, {"type": "boolean"})
_DURATION_SCHEMA = {"type": "string", "pattern": r"^(\d+(\.\d+)?[smhdwSMHDW])+$"}
DURATION = Form("duration", _duration, _DURATION_SCHEMA)
DURATION_TEXT = Form("duration", _checked(parse_duration, parsed=False), _DURATION_SCHEMA)
_SIZE_SCHEMA = {"type": "string", "pattern": r"^\d+(\.\d+)?\s*([kmgtKMGT]?[iI]?)[bB]?$"}
SIZE = Form("size", _checked(parse_size, parsed=True), _SIZE_SCHEMA)
LOG_SIZE = Form("size", _log_size, _SIZE_SCHEMA)
SIZE_TEXT = Form("size", _checked(parse_size, parsed=False), _SIZE_SCHEMA)
RATE = Form("rate", _checked(parse_timetable, parsed=False), {"type": "string"})
SHARE = Form("share", _share, {"type": "string", "pattern": r"^\d+(\.\d+)?%$"})
NUMBER = Form("number", _count(1), {"type": "integer", "minimum": 1})
NUMBER_OR_NONE = Form("number", _count(0), {"type": "integer", "minimum": 0})
MAX_DELETE = Form("number or share", _max_delete, {"type": ["integer", "string"]})
_COMMAND_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
COMMAND_FORM = Form("command", _command, _COMMAND_SCHEMA)
PIPELINE = Form("list of commands", _pipeline, {"type": "array", "items": _COMMAND_SCHEMA, "minItems": 1})
ZONE = Form("time zone", _zone, {"type": "string"})
URL = Form("URL", _checked(parse_source_url, parsed=False), {"type": "string", "minLength": 1})
QUESTIONS = Form(
    "list of pairs",
    _questions,
    {"type": "array", "items": {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 2}},
)
ENVIRONMENT = Form(
    "table", _environment, {"type": "object", "additionalProperties": {"anyOf": [{"type": "string"}, secret_schema()]}}
)

# The keys of a window: what they mean, and how they are written.
WINDOW_FORMS: dict[str, tuple[str, Form]] = {
    "start": (
        'when it opens by the clock on the wall: `"22:00"`, several times, or `"*:15"` for each hour',
        Form("time, or a list", lambda value: parse_starts(_words(value)), WORDS.schema),
    ),
    "length": ("how long it stays open, e.g. `330m`", DURATION),
    "days": (
        "the days on which it opens: `mon-sat`, `mon,thu`, `weekdays`, `weekend`, `daily`",
        Form("days, or a list", lambda value: parse_days(_words(value)), WORDS.schema),
    ),
    "at_end": (
        "at its end: `stop-new` begins nothing new (a mirror; other jobs end by themselves), `finish`, or `abort`",
        _choice(*AT_END),
    ),
    "jitter": ("begin up to so much later, the same for this job each time: hosts don't all begin at once", DURATION),
    "excluded": (
        "dates on which it does not open: `2026-12-24`, or each year `12-24`",
        Form("date, or a list", lambda value: tuple(parse_date(text) for text in _words(value)), WORDS.schema),
    ),
    "timezone": ("the zone of that clock; without it this host's", ZONE),
}
_WINDOW_FORM = Form(
    "table",
    _window,
    {
        "type": "object",
        "properties": {key: form.schema for key, (_, form) in WINDOW_FORMS.items()},
        "additionalProperties": False,
    },
)

# What every job may have, and [defaults] too.
COMMON: tuple[Setting, ...] = (
    Setting(key="window", help="when it runs; without one it is begun by hand only", form=_WINDOW_FORM),
    Setting(key="max_age", help="how old the last good run may be", form=DURATION),
    Setting(key="max_duration", help="how long a run may take", form=DURATION),
    Setting(key="min_size", help="least share of the usual size that a backup must have", form=SHARE),
    Setting(key="max_size", help="most of it that it may have", form=SHARE),
    Setting(key="max_drill_age", help="how old the last proof may be that a backup restores", form=DURATION),
    Setting(key="grace", help="a run that has not begun after so long is missing", form=DURATION, default="1h"),
    Setting(key="time_limit", help="a run is ended after so long", form=DURATION),
    Setting(key="retries", help="how often a failed run is tried again", form=NUMBER_OR_NONE, default="0"),
    Setting(key="backoff", help="the pause before that; it doubles each time", form=DURATION, default="1m"),
    Setting(key="lock", help="a file that is locked while it runs (flock), shared with other programs", form=PATH),
    Setting(key="notify", help="the channels that are told when something is wrong, in order", form=WORDS),
    Setting(
        key="notify_mode",
        help="tell `all` of them, or the `first` that can be told",
        form=_choice("all", "first"),
        default="all",
    ),
    Setting(key="pings", help="the channels that hear of every beginning and end", form=WORDS),
    Setting(
        key="environment",
        help='variables for its programs; secrets as `{ file = "..." }`, `{ env = "..." }`, `{ command = [...] }` or '
        '`{ credential = "..." }`',
        form=ENVIRONMENT,
    ),
    Setting(key="records", help="stores that get the records of its runs, besides where its backups go", form=WORDS),
    Setting(key="keep_runs", help="how many runs' logs are kept here", form=NUMBER, default="100"),
    Setting(key="log_size", help="most of what its programs say that is kept of a run", form=LOG_SIZE, default="16Mi"),
)


def _option(key: str, form: Form, help_text: str, *kinds: str, option: str = "") -> Setting:
    return Setting(
        key=key, help=help_text, form=form, kinds=kinds, option=option or f"--{key.replace('_', '-')}", default=""
    )


# What a kind of job has of its own.
OWN: tuple[Setting, ...] = (
    Setting(key="from", help="the database, directory or file", form=URL, kinds=(PUSH,)),
    Setting(
        key="command",
        help="the program whose output is the backup; or for a command job, what runs",
        form=COMMAND_FORM,
        kinds=(PUSH, COMMAND),
    ),
    Setting(key="pipeline", help="several programs, each feeding the next", form=PIPELINE, kinds=(COMMAND,)),
    Setting(key="directory", help="what is mirrored", form=PATH, kinds=(MIRROR,)),
    Setting(key="to", help="the SERIES, and `send:ROSTER`; or the MIRROR", form=WORDS, kinds=(PUSH, MIRROR)),
    Setting(key="series", help="the SERIES; for prune one or several", form=WORDS, kinds=(DRILL, PRUNE)),
    _option("name", TEXT, "the stream's name", PUSH),
    _option("compress", TEXT, "auto, none or 1 to 19", PUSH),
    _option("encrypt_to", WORDS, "age recipients", PUSH),
    _option("encrypt_to_file", WORDS, "files of age recipients", PUSH),
    _option("require", TEXT, "how many SERIES must hold it: all, any or a number", PUSH),
    _option("expect", WORDS, "text that the stream's end must hold", PUSH),
    _option("streams", NUMBER, "dumps at once; connections of a mirror", PUSH, MIRROR),
    _option("no_counts", FLAG, "don't count rows", PUSH),
    _option("allow_empty", FLAG, "accept an empty stream or directory", PUSH, MIRROR),
    _option("limit", RATE, "bytes a second, e.g. 40M, or 08:00-18:00=5M,40M", PUSH, MIRROR),
    _option("stall_timeout", DURATION_TEXT, "how long a SERIES may take nothing", PUSH),
    _option("spool", PATH, "a directory for what a slow SERIES has not taken yet", PUSH),
    _option("spool_size", SIZE_TEXT, "most bytes in the spool", PUSH),
    _option("workers", NUMBER, "compressing threads", PUSH),
    _option("retry_for", DURATION_TEXT, "how long an ill store is tried again", PUSH, MIRROR, DRILL),
    _option("compare", _choice("size", "mtime", "md5"), "what tells a changed file", MIRROR),
    _option("recycle_after", DURATION_TEXT, "delete for good what is gone for so long", MIRROR),
    _option("max_delete", MAX_DELETE, "how much may be deleted in a run before the guard refuses", MIRROR, PRUNE),
    _option("exclude", WORDS, "names that are left alone", MIRROR),
    _option("sentinel", TEXT, "a file that must be in the directory", MIRROR),
    _option("first", _choice("biggest", "oldest", "name"), "which files go first", MIRROR),
    _option("check", QUESTIONS, "statements and what they must answer", DRILL),
    _option("database", TEXT, "which database is asked", DRILL),
    _option("scratch", PATH, "where the scratch server lies", DRILL),
    _option("jobs", NUMBER, "streams, indexes and checks at once", DRILL),
    _option("identity", WORDS, "key files that open an encrypted backup", DRILL),
    _option("keep_last", NUMBER, "keep the newest so many", PRUNE),
    _option("keep_daily", NUMBER, "keep one a day for so many days", PRUNE),
    _option("keep_weekly", NUMBER, "keep one a week", PRUNE),
    _option("keep_monthly", NUMBER, "keep one a month", PRUNE),
    _option("keep_yearly", NUMBER, "keep one a year", PRUNE),
    _option("keep_within", DURATION_TEXT, "keep all that are younger", PRUNE),
    _option("keep_free", SIZE_TEXT, "on a disk: remove the oldest until so much is free", PRUNE),
    _option("unproved_ok", FLAG, "an older proved backup may go while newer ones are unproved", PRUNE),
)


def settings_of(kind: str) -> dict[str, Setting]:
    """Return the settings of a kind of job, by key; of ``""`` those of [defaults]."""
    own = {setting.key: setting for setting in OWN if kind in setting.kinds} if kind else {}
    return {**own, **{setting.key: setting for setting in COMMON}}
