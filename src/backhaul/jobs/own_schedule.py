"""The schedule of this host's own jobs: its config, and the state that its runs must find again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from backhaul.errors import ConfigurationError
from backhaul.jobs.host import JobHost
from backhaul.jobs.schedule import SchedulePlan, ScheduleState, installed, own_command, plan_schedule, this_host
from backhaul.model.secret import CREDENTIAL, Secret
from backhaul.operations.journal import STATE_VARIABLE
from backhaul.operations.places import CONFIG_VARIABLE

# Where systemd's credentials lie, by their names (systemd.exec(5)).
_CREDENTIALS = "/etc/credstore"
# Of cron's runs: that of whoever installs it may be anything. A job that needs more says so in its environment.
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def plan_of(host: JobHost, how: str) -> SchedulePlan:
    """Say what must be installed for the jobs of a host.

    Args:
        host: its jobs.
        how: ``systemd``, ``cron`` or ``auto``.

    Raises:
        ConfigurationError: no job has a window; or as ``jobs.schedule.plan_schedule`` does.
    """
    cards = [host.job(name).card for name in host.config.jobs]
    if not any(card.window is not None for card in cards):
        raise ConfigurationError(
            "There is nothing to schedule",
            "no job of the config has a window",
            'Give one: window = { start = "22:00", length = "330m" }',
        )
    return plan_schedule(cards, how, _command(), this_host(), **_surroundings(host))


def state_of(host: JobHost) -> ScheduleState:
    """Return how it is with the schedule. Raises as ``jobs.schedule.installed`` does."""
    cards = [host.job(name).card for name in host.config.jobs]
    return installed(cards, _command(), this_host(), host.now(), **_surroundings(host))


def _command() -> tuple[str, ...]:
    return own_command(os.environ.get(CONFIG_VARIABLE))


def _state() -> dict[str, str]:
    """Return what the runs must know of where this host keeps its state, if that is not the usual place."""
    named = os.environ.get(STATE_VARIABLE)
    return {STATE_VARIABLE: str(Path(named).absolute())} if named else {}


def _surroundings(host: JobHost) -> dict[str, Any]:
    """Return what timers and cron don't have by themselves: where the state is, where programs are, credentials."""
    return {
        "environment": _state(),
        "path": _PATH,
        "credentials": {name: f"{_CREDENTIALS}/{name}" for name in _credentials(host)},
    }


def _credentials(host: JobHost) -> list[str]:
    """Return the credentials that the config refers to."""
    values = [value for channel in host.config.channels.values() for value in channel.settings.values()]
    values += [value for job in host.config.jobs.values() for value in job.values.get("environment", {}).values()]
    return sorted({value.reference[0] for value in values if isinstance(value, Secret) and value.source == CREDENTIAL})
