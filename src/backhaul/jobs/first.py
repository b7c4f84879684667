"""``init``: from nothing to a first good backup, an alert that was tried and a schedule.

What is asked for is looked at first, all of it, and nothing is written while anything of it is wrong. Then the files
of secrets are written, and the config that refers to them: it is there whole, or not at all. What follows can be done
again by doing it all again: a config that init made is used as it is.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import msgspec

from backhaul.errors import BackhaulError, ConfigurationError, FailedError, IncompleteError, LockBusyError, UsageError
from backhaul.formats import first_config
from backhaul.formats.config import Config, read_config
from backhaul.formats.first_config import NOBODY, FirstChannel, FirstConfig, FirstSource
from backhaul.formats.location import parse_location
from backhaul.formats.quantities import format_duration, format_size
from backhaul.formats.redaction import redact_text
from backhaul.formats.source_url import is_source_url, parse_source_url
from backhaul.jobs import own_schedule, schedule
from backhaul.jobs.alerts import pretended_failure
from backhaul.jobs.config import system_zone
from backhaul.jobs.host import JobHost
from backhaul.jobs.runner import Echo
from backhaul.model import job as jobs
from backhaul.model.channel import HEALTHCHECKS
from backhaul.model.job import DRILL, PRUNE, PUSH, RunRecord
from backhaul.model.location import Location
from backhaul.model.results import Diagnosis
from backhaul.model.source_url import SourceUrl
from backhaul.model.verdict import Overview
from backhaul.operations import places
from backhaul.operations.atomic_file import write_atomically
from backhaul.operations.doctor import doctor
from backhaul.operations.doctor_source import doctor_source
from backhaul.planning.alerts import CHANGED, RECOVERED
from backhaul.reporting import messages
from backhaul.targets.file import sync_directory

OK, NOTE, PROBLEM = "ok", "note", "problem"
NO_SCHEDULE = "none"
# A first drill of so many bytes is a matter of seconds; a larger one waits for its window.
QUICK = 1 << 30
_SQLITE = b"SQLite format 3\0"
# What the doctor found when a backup of a kind can be drilled on this host; None needs nothing.
_DRILLED_BY: Mapping[str, str | None] = {
    "postgresql": "drills",
    "mariadb": "mariadbd",
    "redis": "redis-server",
    "sqlite": None,
    "dir": None,
}
# Variables of this shell that a backup goes by, by the kind of its source: timers have none of them.
_PLAIN: Mapping[str, tuple[str, ...]] = {
    "postgresql": (
        *("PGHOST", "PGHOSTADDR", "PGPORT", "PGUSER", "PGSERVICE"),
        *("PGSERVICEFILE", "PGPASSFILE", "PGSSLMODE", "PGSSLROOTCERT", "PGSSLCERT", "PGSSLKEY"),
    ),
    "mariadb": ("MYSQL_UNIX_PORT", "MYSQL_TCP_PORT"),
}
_SECRET: Mapping[str, tuple[str, ...]] = {
    "postgresql": ("PGPASSWORD",),
    "mariadb": ("MYSQL_PWD",),
    "redis": ("REDISCLI_AUTH",),
}
_PATHS = ("PGSERVICEFILE", "PGPASSFILE", "PGSSLROOTCERT", "PGSSLCERT", "PGSSLKEY", "AWS_CA_BUNDLE", "AWS_CONFIG_FILE")
_SHELLS_OWN = ("AWS_", "PG", "MYSQL_", "REDISCLI_")
_HARMLESS = ("AWS_EC2_METADATA_DISABLED",)
_KEY_ID, _KEY, _TOKEN = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"


class Answers(msgspec.Struct, frozen=True, kw_only=True):
    """What init is asked for.

    Attributes:
        sources: URLs or paths.
        store: STORE.
        tell: mail addresses, http(s) URLs, or only ``nobody``.
        start: HH:MM.
        name: of this set-up; None for whichever there is, or the usual one.
        how: ``auto``, ``systemd``, ``cron`` or ``none``: what is to begin jobs; empty for what was chosen before, or
            else ``auto``.
        smtp_host: the mail server, ``HOST[:PORT]``; empty for the local sendmail.
    """

    sources: tuple[str, ...] = ()
    store: str = ""
    tell: tuple[str, ...] = ()
    start: str = ""
    name: str | None = None
    how: str = ""
    smtp_host: str = ""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that init did or found: ``ok``, ``note`` or ``problem``, and what to do where there is something."""

    name: str
    state: str
    detail: str
    todo: str = ""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where the config lies or will.

    Attributes:
        path: of the file.
        name: of the set-up.
        text: what init wrote there before; None for no such file.
        how: what was chosen then to begin jobs.
    """

    path: Path
    name: str
    text: str | None = None
    how: str = schedule.AUTO


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be written: the config, and by path the files of secrets that it refers to."""

    path: Path
    text: str
    secrets: Mapping[str, str] = {}


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it all; ``error`` is what to end with, or None."""

    overview: Overview
    error: BackhaulError | None = None


Say = Callable[[Step], None]


# -- where -----------------------------------------------------------------------------------------------


def place_of_config(name: str | None) -> Place:
    """Return where the config of this host goes, or lies if init made it before.

    Args:
        name: of the set-up; None for whichever there is.

    Raises:
        UsageError: a name that can't be one.
        ConfigurationError: somebody else's config is in the way, or it can't be read.
    """
    wanted = first_config.parse_name(name) if name is not None else first_config.DEFAULT_NAME
    named = os.environ.get(places.CONFIG_VARIABLE)
    system = not named and os.geteuid() == 0
    candidates = [Path(named).absolute() if named else places.user_config()]
    if system:
        candidates = [places.SYSTEM / "config.toml", places.SYSTEM / "conf.d" / f"{wanted}.toml"]
    made: first_config.Mark | None = None
    for path in candidates:
        if not os.path.lexists(path):
            return Place(path=path, name=wanted)
        text = places.read_text(path)
        made = first_config.made_by_init(text)
        if made is not None and name in (None, made.name):
            return Place(path=path, name=made.name, text=text, how=made.how)
    raise ConfigurationError(
        f"{candidates[-1]} was not touched",
        "it is there already, and init never changes what it has not made"
        if made is None
        else f"it is there already, made by init --name {made.name}",
        "Choose another name: backhaul init --name NAME"
        if system
        else "Write into it by hand (backhaul init --dry-run --config NEW shows what), or name another: --config FILE",
    )


def check_unchanged(place: Place, answers: Answers) -> None:
    """See that the config which init made before is the one that is asked for now.

    Raises:
        ConfigurationError: it is another.
    """
    assert place.text is not None
    found = first_config.differences(
        place.text,
        sources=[source_of(text) for text in answers.sources],
        store=store_of(answers.store) if answers.store else "",
        start=first_config.parse_start(answers.start) if answers.start else "",
    )
    if found:
        raise ConfigurationError(
            f"{place.path} was made by init, and is not what is asked for now",
            "\n".join(found),
            "Change it by hand, or go on with it as it is: backhaul init --yes. A second one: --name OTHER (as root),"
            " or --config FILE.",
        )


# -- what is looked at, before anything is written -------------------------------------------------------


def draft_of(answers: Answers, place: Place, say: Say, *, try_store: bool = True) -> Draft:
    """Look at each source and the store, and return what is to be written.

    Args:
        answers: what is asked for; of sources, store and whom to tell each at least one.
        place: where the config goes.
        say: told each step.
        try_store: whether the store is tried, which writes into it and removes that again.

    Raises:
        UsageError: an answer makes no sense.
        ConfigurationError: something of it can't be backed up, or written to; with everything that is wrong.
    """
    start = first_config.parse_start(answers.start or first_config.DEFAULT_START)
    channels = [] if answers.tell == (NOBODY,) else [_channel(text, answers) for text in answers.tell]
    urls = [parse_source_url(source_of(text)) for text in dict.fromkeys(answers.sources)]
    store = store_of(answers.store)
    location = _location(store)
    others = [path for path in places.config_files() if path != place.path and path.is_file()]
    documents = [(str(path), places.read_text(path)) for path in others]
    there = read_config(documents, system_zone())
    if answers.how not in ("", schedule.AUTO, NO_SCHEDULE):
        schedule.choose(answers.how, schedule.this_host())

    problems: list[tuple[str, Sequence[tuple[str, str]]]] = []
    looks = [_look(url, say, problems) for url in urls]
    if try_store:
        _look_at_store(store, say, problems)
    if problems:
        raise ConfigurationError(
            "Nothing was written: " + ", ".join(what for what, _ in problems) + " would fail",
            "\n".join(dict.fromkeys(why for _, found in problems for why, _ in found)),
            "\n".join(dict.fromkeys(todo for _, found in problems for _, todo in found if todo)),
        )

    secrets: dict[str, str] = {}
    directory = place.path.parent / f"{place.path.stem}.secrets"

    def keep(name: str, text: str) -> str:
        secrets[str(directory / name)] = text
        return str(directory / name)

    settings, environment = _store_settings(location, keep, say)
    config = FirstConfig(
        name=place.name,
        timezone=system_zone(),
        store_name=_free(place.name, there.stores),
        store=store,
        settings=settings,
        sources=tuple(
            _source(url, job, drilled=drilled, keep=keep)
            for url, drilled, job in zip(
                urls, looks, first_config.job_names([_label(url) for url in urls], there.jobs), strict=True
            )
        ),
        channels=_named_channels(channels, there, keep),
        start=start,
        how=answers.how or place.how,
        environment=environment,
    )
    text = first_config.first_config(config)
    read_config([*documents, (str(place.path), text)], system_zone())
    if not channels:
        say(
            Step(
                name="alerts",
                state=NOTE,
                detail="nobody is told when a backup fails, as was asked for",
                todo="Somebody should: write [notify.NAME] into the config later.",
            )
        )
    return Draft(path=place.path, text=text, secrets=secrets)


def source_of(text: str) -> str:
    """Return what is to be backed up as a URL that means the same from everywhere.

    Raises:
        UsageError: it is no source.
    """
    if is_source_url(text) or not text:
        return parse_source_url(text).text if text else text
    path = Path(text).expanduser().absolute()
    if "://" in text:
        parse_source_url(text)  # says what is wrong with it
    if path.is_dir():
        return f"dir://{quote(str(path))}"
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(len(_SQLITE)) == _SQLITE:
            return f"sqlite://{quote(str(path))}"
    return str(path)


def store_of(text: str) -> str:
    """Return STORE so that it means the same from everywhere.

    Raises:
        UsageError: it is malformed.
        ConfigurationError: it names a store that no config defines.
    """
    location = _location(text)
    # (Of a named store, and of file://, the path is another than what was written.)
    return text if location.path != text else str(Path(text).expanduser().absolute())


def _location(text: str) -> Location:
    """Read STORE; the config that was named need not be there yet."""
    files = [path for path in places.config_files() if path.is_file()]
    return places.store_at(text) if files else parse_location(text, whole_bucket=True)


def _channel(text: str, answers: Answers) -> FirstChannel:
    if text == NOBODY:
        raise UsageError(
            f"{NOBODY} stands beside somebody", "either somebody is told, or nobody", f"Leave out --notify {NOBODY}."
        )
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/lib"])
    host = socket.gethostname()
    return first_config.channel_of(
        text,
        host=host if "." in host else socket.getfqdn(),
        sendmail=str(Path(found).absolute()) if (found := shutil.which("sendmail", path=path)) else "",
        smtp_host=answers.smtp_host,
    )


def _look(url: SourceUrl, say: Say, problems: list[tuple[str, Sequence[tuple[str, str]]]]) -> bool:
    """Look whether a source can be backed up; return whether it can be drilled here."""
    shown = redact_text(url.text)
    try:
        found = doctor_source(url.text).diagnoses
    except BackhaulError as error:
        problems.append((shown, [(f"{error.what}: {error.why}", error.todo)]))
        say(Step(name=f"doctor {shown}", state=PROBLEM, detail=error.why or error.what, todo=error.todo))
        return False
    _judge(shown, found, say, problems, f"see backhaul doctor {shown}")
    drills = _DRILLED_BY.get(url.kind.partition("+")[0], "")
    return drills is None or any(each.name == drills and each.state == OK for each in found)


def _look_at_store(store: str, say: Say, problems: list[tuple[str, Sequence[tuple[str, str]]]]) -> None:
    shown = redact_text(store)
    try:
        found = doctor(store)
    except BackhaulError as error:
        problems.append((shown, [(f"{error.what}: {error.why}", error.todo)]))
        say(Step(name=f"doctor {shown}", state=PROBLEM, detail=error.why or error.what, todo=error.todo))
        return
    _judge(shown, found.diagnoses, say, problems, f"{found.title}; see backhaul doctor {shown}")


def _judge(
    shown: str,
    found: Sequence[Diagnosis],
    say: Say,
    problems: list[tuple[str, Sequence[tuple[str, str]]]],
    see: str,
) -> None:
    wrong = [each for each in found if each.state == PROBLEM]
    notes = [each for each in found if each.state == NOTE]
    if wrong:
        problems.append((shown, [(f"{each.name}: {each.detail}", each.todo) for each in wrong]))
        detail = "; ".join(f"{each.name}: {each.detail}" for each in wrong)
        say(Step(name=f"doctor {shown}", state=PROBLEM, detail=detail, todo="\n".join(each.todo for each in wrong)))
        return
    good = sum(each.state == OK for each in found)
    noted = f", {len(notes)} to know ({', '.join(each.name for each in notes)})" if notes else ""
    say(Step(name=f"doctor {shown}", state=OK, detail=f"{good} good{noted}; {see}"))


def _store_settings(
    location: Location, keep: Callable[[str, str], str], say: Say
) -> tuple[dict[str, str], dict[str, str]]:
    """Return what the store, and what all jobs, must be told that only this shell knows."""
    settings: dict[str, str] = {}
    environment: dict[str, str] = {}
    if location.kind != "s3":
        return settings, environment
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint and location.endpoint is None:
        settings["endpoint"] = endpoint
    if region and location.region is None:
        settings["region"] = region
    own = location.profile is None and location.credentials_file is None
    if own and os.environ.get(_KEY_ID) and os.environ.get(_KEY):
        if os.environ.get(_TOKEN):
            raise ConfigurationError(
                "The S3 keys of this shell can't be given to timers",
                f"{_TOKEN} is set: they expire, and the backups would fail from then on",
                "Give the host keys that last, a profile (AWS_PROFILE), or a role of its own, and unset these.",
            )
        lines = [f"aws_access_key_id = {os.environ[_KEY_ID]}", f"aws_secret_access_key = {os.environ[_KEY]}"]
        file = keep("aws-credentials", "\n".join(["[default]", *lines, ""]))
        settings["credentials-file"] = file
        say(
            Step(
                name="keys",
                state=NOTE,
                detail=f"timers have nothing of this shell's environment: its S3 keys are kept in {file}",
            )
        )
    elif own:
        if os.environ.get("AWS_PROFILE"):
            settings["profile"] = os.environ["AWS_PROFILE"]
        if os.environ.get("AWS_SHARED_CREDENTIALS_FILE"):
            settings["credentials-file"] = str(Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"]).expanduser().absolute())
        environment |= _carried(("AWS_CONFIG_FILE",))
    return settings, environment | _carried(("AWS_CA_BUNDLE",))


def _carried(names: Sequence[str]) -> dict[str, str]:
    found = {name: os.environ[name] for name in names if os.environ.get(name)}
    return {
        name: str(Path(value).expanduser().absolute()) if name in _PATHS else value for name, value in found.items()
    }


def _source(url: SourceUrl, job: str, *, drilled: bool, keep: Callable[[str, str], str]) -> FirstSource:
    kind = url.kind.partition("+")[0]
    hidden = [name for name in _SECRET.get(kind, ()) if os.environ.get(name) and not url.password_file]
    environment = _carried(_PLAIN.get(kind, ()))
    if kind == "mariadb" and not url.user and os.environ.get("USER"):
        environment["USER"] = os.environ["USER"]
    return FirstSource(
        url=url.text,
        job=job,
        drilled=drilled,
        environment=environment,
        secrets={name: keep(name, os.environ[name] + "\n") for name in hidden},
    )


def _label(url: SourceUrl) -> str:
    if url.kind in ("sqlite", "file", "dir"):
        return Path(url.path).stem
    return url.database or url.kind.partition("+")[0]


def _named_channels(
    channels: Sequence[FirstChannel], there: Config, keep: Callable[[str, str], str]
) -> dict[str, tuple[FirstChannel, str]]:
    found: dict[str, tuple[FirstChannel, str]] = {}
    for channel in channels:
        name = _free(channel.kind, {**there.channels, **found})
        found[name] = (channel, keep(name, channel.hidden[1] + "\n") if channel.hidden is not None else "")
    return found


def _free(name: str, taken: Mapping[str, object]) -> str:
    number, free = 2, name
    while free in taken:
        number, free = number + 1, f"{name}-{number}"
    return free


# -- what is written -------------------------------------------------------------------------------------


def write(draft: Draft, say: Say) -> None:
    """Write the secrets, and then the config that refers to them.

    Raises:
        ConfigurationError: the disk refuses, or another made a config meanwhile.
    """
    own = draft.path.parent
    try:
        own.mkdir(mode=0o755 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
        for name, text in draft.secrets.items():
            path = Path(name)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            write_atomically(path, text.encode())
        if draft.secrets:
            sync_directory(own)
        _write_new(draft.path, draft.text.encode())
    except FileExistsError as error:
        raise ConfigurationError(
            f"{draft.path} was not touched", "another made it meanwhile", "Look at it, and run init again."
        ) from error
    except OSError as error:
        raise ConfigurationError(
            f"{error.filename or draft.path} can't be written",
            error.strerror or str(error),
            "Make it writable, or name another: backhaul --config FILE init",
        ) from error
    say(Step(name="config", state=OK, detail=f"{draft.path} written; {len(draft.secrets)} secrets beside it"))


def _write_new(path: Path, data: bytes) -> None:
    """Write a file that was not there: whole, or not at all, and never over another."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        write_atomically(temporary, data)
        os.link(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    sync_directory(path.parent)


# -- what is done ----------------------------------------------------------------------------------------


def carry_out(text: str, how: str, say: Say, echo: Echo | None) -> Outcome:
    """Make the first backups of a config, try its alerts, and install the schedule; what was done is not done again.

    Args:
        text: of the config that init made.
        how: what is to begin jobs.
        say: told each step.
        echo: given what the jobs print.

    Raises:
        ConfigurationError: the config is not right any more, or the state of jobs can't be kept.
        InterruptedByUserError: a signal ended a run.
    """
    wrong: list[Step] = []

    def tell(step: Step) -> None:
        say(step)
        if step.state == PROBLEM:
            wrong.append(step)

    with _as_timers_are(), JobHost() as host:
        mine = {name: kind for name, kind in first_config.jobs_of(text).items() if name in host.config.jobs}
        pushes = [name for name, kind in mine.items() if kind == PUSH]
        for name in pushes:
            _run_first(host, name, tell, echo)
        failed = list(wrong)
        for name, kind in mine.items():
            if kind in (PRUNE, DRILL) and not failed:
                _follow(host, name, kind, pushes, tell, echo)
        _try_alerts(host, mine, tell)
        _install(host, how, tell)
        found = host.overview()
    return Outcome(overview=found, error=_error(wrong, failed))


@contextlib.contextmanager
def _as_timers_are() -> Iterator[None]:
    """Take away what this shell has and timers have not: a first run that only works here would prove nothing."""
    before = {
        name: value for name, value in os.environ.items() if name.startswith(_SHELLS_OWN) and name not in _HARMLESS
    }
    for name in before:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)


def _run_first(host: JobHost, name: str, tell: Say, echo: Echo | None) -> None:
    """Run a job, unless its last run is good."""
    last = next((run for run in host.history.runs(name) if run.state != jobs.SKIPPED), None)
    card = host.history.card(name)
    # (A run of this name for another config, with other places, is none of this one's.)
    same = card is not None and (card.what, card.places) == (host.job(name).card.what, host.job(name).card.places)
    if last is not None and last.state == jobs.OK and same:
        tell(Step(name=f"run {name}", state=OK, detail=f"done before, at {last.started}"))
        return
    runner = host.runner(echo)
    try:
        record = runner.run(host.job(name), at_once=True)
    except (LockBusyError, ConfigurationError) as error:
        tell(Step(name=f"run {name}", state=PROBLEM, detail=f"{error.what}: {error.why}", todo=error.todo))
        return
    if record.state == jobs.OK:
        tell(Step(name=f"run {name}", state=OK, detail=_described(record)))
    else:
        detail = f"{record.state}: {record.why}"
        tell(Step(name=f"run {name}", state=PROBLEM, detail=detail, todo=f"See: backhaul log {name}"))
    for words in (*record.remarks, *runner.problems):
        tell(Step(name=f"run {name}", state=NOTE, detail=words))


def _described(record: RunRecord) -> str:
    took = f"in {format_duration(record.seconds)}"
    if record.kind == PUSH:
        sizes = f"{format_size(record.raw_size)}, stored as {format_size(record.stored_size)}"
        return f"backup {', '.join(record.backups)}: {sizes}, {took}"
    if record.kind == DRILL:
        return f"the backup restores: proved {took}"
    return f"done {took}, {record.removed} removed"


def _follow(host: JobHost, name: str, kind: str, pushes: Sequence[str], tell: Say, echo: Echo | None) -> None:
    """Run what follows a backup, if that is quick and can do no harm; else say when it runs."""
    from backhaul.operations.inspect import list_backups

    settings = host.config.jobs[name].values
    places_of = tuple(settings["series"])
    if kind == PRUNE:
        try:
            count = max(len(list_backups(place).backups) for place in places_of)
        except BackhaulError as error:
            tell(Step(name=f"run {name}", state=PROBLEM, detail=f"{error.what}: {error.why}", todo=error.todo))
            return
        # Where the newest so many stay there is nothing to remove, whatever else holds.
        now = count <= settings.get("keep_last", 0)
    else:
        sources = [host.config.jobs[push] for push in pushes]
        backed = [job.name for job in sources if set(job.values["to"]) & set(places_of)]
        sizes = [run.raw_size for push in backed for run in host.history.runs(push, 5) if run.state == jobs.OK]
        now = bool(sizes) and max(sizes) <= QUICK
    if now:
        _run_first(host, name, tell, echo)
        return
    verdict = next(iter(host.overview(name).verdicts))
    begins = f"{dt.datetime.fromisoformat(verdict.next_begins).astimezone():%a %Y-%m-%d %H:%M %Z}"
    tell(Step(name=f"run {name}", state=NOTE, detail=f"left to the schedule: first at {begins}"))


def _try_alerts(host: JobHost, mine: Mapping[str, str], tell: Say) -> None:
    """Tell of a failure that is none, on the very way that alerts go."""
    channels = tuple(
        dict.fromkeys(channel for name in mine for channel in host.config.jobs[name].values.get("notify", ()))
    )
    if not channels:
        tell(Step(name="alert", state=NOTE, detail="not tried: nobody is told"))
        return
    pretended = pretended_failure(socket.gethostname(), host.now())
    verdict = pretended.verdicts[0]
    for each in host.alerts.deliver(messages.alert(pretended, verdict, CHANGED), channels, everyone=True):
        if each.error:
            todo = f"Correct [notify.{each.channel}] in the config; then: backhaul notify test, and backhaul init --yes"
            tell(Step(name=f"alert by {each.channel}", state=PROBLEM, detail=each.error, todo=todo))
        else:
            detail = "a test of a failure was delivered: see that it arrived"
            tell(Step(name=f"alert by {each.channel}", state=OK, detail=detail))
            if host.config.channels[each.channel].kind == HEALTHCHECKS:
                # There it is a state, not a message: it would stay "down" until something fails and recovers.
                well = msgspec.structs.replace(verdict, state="ok", reasons=())
                again = msgspec.structs.replace(pretended, verdicts=(well,))
                host.alerts.deliver(messages.alert(again, well, RECOVERED), (each.channel,), everyone=True)


def _install(host: JobHost, how: str, tell: Say) -> None:
    if how == NO_SCHEDULE:
        todo = "Begin jobs yourself (backhaul run JOB), or in a container: backhaul schedule run"
        tell(Step(name="schedule", state=NOTE, detail="none, as was asked for", todo=todo))
        return
    try:
        plan = own_schedule.plan_of(host, how)
        schedule.install(plan, schedule.this_host())
    except BackhaulError as error:
        tell(Step(name="schedule", state=PROBLEM, detail=f"{error.what}: {error.why}", todo=error.todo))
        return
    # It looks for the first time within ten minutes: until then nothing is wrong.
    host.looked()
    tell(Step(name="schedule", state=OK, detail=f"installed, by {plan.how}; see backhaul schedule show"))
    for remark in plan.remarks:
        tell(Step(name="schedule", state=NOTE, detail=remark))


def _error(wrong: Sequence[Step], failed: Sequence[Step]) -> BackhaulError | None:
    if not wrong:
        return None
    why = "\n".join(f"{step.name}: {step.detail}" for step in wrong)
    todo = "\n".join(dict.fromkeys([*(step.todo for step in wrong if step.todo), "Then go on: backhaul init --yes"]))
    if failed:
        return FailedError("The first backup is not complete; the config stays", why, todo)
    return IncompleteError("The backup is there; not all the rest is", why, todo)
