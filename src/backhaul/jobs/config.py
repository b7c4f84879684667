"""From the config's files to jobs that can run, and the cards by which they are judged."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from zoneinfo import available_timezones

from backhaul.errors import ConfigurationError, UsageError
from backhaul.formats.config import DEFAULT_LENGTH, Config, JobSettings, read_config
from backhaul.formats.job_settings import COMMON, DURATION, OWN
from backhaul.formats.redaction import redact_command, redact_text
from backhaul.formats.roster import SCHEME
from backhaul.formats.window import format_days, format_starts
from backhaul.model.channel import PING_KINDS
from backhaul.model.job import COMMAND, DRILL, MIRROR, PUSH, Expectations, Job, JobCard
from backhaul.model.schedule import Window
from backhaul.model.secret import COMMAND as SECRET_COMMAND
from backhaul.model.secret import Secret
from backhaul.operations.places import config_files, read_text
from backhaul.operations.secrets import exposure

# What a host is set to when nobody set it.
_NO_ZONES = ("", "UTC", "Etc/UTC")


def system_zone() -> str:
    """Return the IANA name of this host's time zone; UTC where nobody can say.

    ``TZ`` counts only where the host has no zone of its own, as in containers: a shell that sets it must not move the
    windows that timers go by.
    """
    from backhaul.jobs.schedule import host_timezone

    zone = host_timezone()
    named = os.environ.get("TZ", "").lstrip(":")
    return named if zone in _NO_ZONES and named in available_timezones() else zone or "UTC"


def load_config() -> Config:
    """Read all config files that count.

    Raises:
        ConfigurationError: with everything that is wrong in all of them.
    """
    return read_config([(str(path), read_text(path)) for path in config_files()], system_zone())


def settings_of_job(config: Config, name: str) -> JobSettings:
    """Return a job's settings.

    Raises:
        UsageError: the config has no such job.
    """
    settings = config.jobs.get(name)
    if settings is None:
        from difflib import get_close_matches

        close = get_close_matches(name, config.jobs, 1)
        there = ", ".join(config.jobs) or "none"
        raise UsageError(
            f"There is no job {name}",
            f"did you mean {close[0]}?" if close else f"the config has {there}",
            "backhaul config show lists them." if config.jobs else "Write one: backhaul init, or [jobs.NAME].",
        )
    return settings


def job_of(settings: JobSettings, *, known_since: str = "") -> Job:
    """Return a job, ready to run.

    Args:
        settings: its own, with the defaults below.
        known_since: when it was first seen as it is (ISO, UTC).
    """
    values = settings.values
    own = settings.kind != COMMAND
    stages = (_own_command(settings),) if own else _stages(values)
    return Job(
        card=card_of(settings, known_since=known_since),
        stages=stages,
        environment=values.get("environment", {}),
        time_limit=values.get("time_limit"),
        retries=values.get("retries", 0),
        backoff=values.get("backoff", 60.0),
        # (A mirror takes the lock itself: its plan is then made under it, too. For the others the runner does.)
        lock=values.get("lock"),
        notify=values.get("notify", ()),
        notify_all=values.get("notify_mode", "all") == "all",
        pings=values.get("pings", ()),
        keep_runs=values.get("keep_runs", 100),
        log_size=values.get("log_size", 16 << 20),
        own=own,
    )


def card_of(settings: JobSettings, *, known_since: str = "") -> JobCard:
    """Return what others must know of a job to judge it. See ``job_of``."""
    values = settings.values
    host = socket.gethostname()
    # (Receivers keep no series: what is known of them is in the run's records.)
    places = [text for text in values.get("to") or values.get("series") or () if not text.startswith(SCHEME)]
    return JobCard(
        name=settings.name,
        host=host,
        kind=settings.kind,
        what=_what(settings),
        window=_window(values["window"]) if "window" in values else None,
        expectations=Expectations(
            max_age=values.get("max_age"),
            max_duration=values.get("max_duration"),
            least=values.get("min_size"),
            most=values.get("max_size"),
            max_drill_age=values.get("max_drill_age"),
            grace=values.get("grace", 3600.0),
        ),
        known_since=known_since,
        places=(*places, *values.get("records", ())),
        jitter_of=f"{host} {settings.name}",
    )


def warnings_of(config: Config) -> list[str]:
    """Return what is allowed and probably not meant: secrets that others can read, jobs nobody hears of."""
    found = []
    secrets = [
        (f"[notify.{channel.name}] {key}", value)
        for channel in config.channels.values()
        for key, value in channel.settings.items()
    ]
    secrets += [
        (f"[jobs.{job.name}] {key}", value)
        for job in config.jobs.values()
        for key, value in job.values.get("environment", {}).items()
    ]
    for where, value in secrets:
        if isinstance(value, Secret) and (words := exposure(value)):
            found.append(f"{where}: {words}")
    found += [
        f"[jobs.{job.name}] has no notify: nobody hears of it when it fails"
        for job in config.jobs.values()
        if not job.values.get("notify")
    ]
    found += [
        f"[jobs.{job.name}] pings: {name} is no channel of pings (healthchecks)"
        for job in config.jobs.values()
        for name in job.values.get("pings", ())
        if name in config.channels and config.channels[name].kind not in PING_KINDS
    ]
    return found


def shown_settings(settings: JobSettings) -> dict[str, tuple[str, str]]:
    """Return a job's settings as TOML, each with where it comes from; secrets as where they are kept."""
    found = {"kind": (_as_toml(settings.kind), "")}
    for key, value in settings.values.items():
        found[key] = (_shown(key, value), settings.origins.get(key, ""))
    return found


def _shown(key: str, value: Any) -> str:
    if key == "window":
        words = {
            "start": tuple(format_starts(value["start"]).split(", ")) if "start" in value else None,
            "length": f"{value['length']:.0f}s" if "length" in value else None,
            "days": format_days(value["days"]) if "days" in value else None,
            "jitter": f"{value['jitter']:.0f}s" if "jitter" in value else None,
        }
        rest = {name: item for name, item in value.items() if name not in words}
        return _as_toml({name: item for name, item in {**words, **rest}.items() if item is not None})
    if key in _IN_SECONDS:
        return _as_toml(f"{value:.0f}s")
    if key in ("min_size", "max_size"):
        return _as_toml(f"{value * 100:g}%")
    if key == "environment":
        return _as_toml(
            {name: _SecretShown(item) if isinstance(item, Secret) else item for name, item in value.items()}
        )
    return _as_toml(value)


_IN_SECONDS = tuple(setting.key for setting in COMMON if setting.form is DURATION)


class _SecretShown:
    """A reference to a secret, as the config writes it."""

    def __init__(self, secret: Secret) -> None:
        self.table = {secret.source: secret.reference if secret.source == SECRET_COMMAND else secret.reference[0]}


def _as_toml(value: Any) -> str:
    if isinstance(value, _SecretShown):
        return _as_toml(value.table)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(redact_text(value), ensure_ascii=False)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_as_toml(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{name} = {_as_toml(item)}" for name, item in value.items()) + " }"
    return str(value)


def backhaul_command() -> tuple[str, ...]:
    """Return how this very Backhaul is called."""
    return (sys.executable, "-m", "backhaul")


def described_command(stages: Sequence[Sequence[str]]) -> str:
    """Return a pipeline in a line, its secrets masked."""
    return " | ".join(shlex.join(redact_command(stage)) for stage in stages)


def _window(values: Mapping[str, Any]) -> Window:
    return Window(
        starts=values["start"],
        length=values.get("length", DEFAULT_LENGTH),
        days=values.get("days", (0, 1, 2, 3, 4, 5, 6)),
        at_end=values.get("at_end", "finish"),
        jitter=values.get("jitter", 0.0),
        excluded=values.get("excluded", ()),
        timezone=values["timezone"],
    )


def _stages(values: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    return values["pipeline"] if "pipeline" in values else (values["command"],)


def _own_command(settings: JobSettings) -> tuple[str, ...]:
    values = settings.values
    words: list[str] = [*backhaul_command(), _VERBS[settings.kind]]
    if settings.kind == MIRROR:
        words += [values["directory"], *values["to"]]
    else:
        words += [*(values.get("to") or values["series"])]
    for setting in OWN:
        if settings.kind in setting.kinds and setting.option and setting.key in values:
            words += _as_option(setting.option, values[setting.key])
    if "from" in values:
        words += ["--from", values["from"]]
    if "command" in values:
        words += ["--", *values["command"]]
    return tuple(words)


_VERBS = {PUSH: "push", MIRROR: "sync", DRILL: "drill", "prune": "prune"}


def _as_option(option: str, value: Any) -> list[str]:
    if value is True:
        return [option]
    if value is False:
        return []
    if isinstance(value, tuple):
        return [word for item in value for word in (option, *(item if isinstance(item, tuple) else (item,)))]
    return [option, str(value)]


def _what(settings: JobSettings) -> str:
    values = settings.values
    places = ", ".join(redact_text(place) for place in values.get("to") or values.get("series") or ())
    if settings.kind == PUSH:
        source = values.get("from") or shlex.join(redact_command(values.get("command", ())))
        return f"push {redact_text(source)} to {places}"
    if settings.kind == MIRROR:
        return f"mirror {values['directory']} to {places}"
    if settings.kind == COMMAND:
        return described_command(_stages(values))
    return f"{settings.kind} {places}"


def check_config() -> Config:
    """Read the config, and look at what only this host can tell.

    Raises:
        ConfigurationError: with everything that is wrong, or there is no config at all.
    """
    config = load_config()
    if not config.files:
        raise ConfigurationError(
            "There is no config",
            "neither /etc/backhaul/config.toml nor conf.d nor ~/.config/backhaul/config.toml is there",
            "Make one: backhaul init; or name one: backhaul --config FILE ...",
        )
    return config
