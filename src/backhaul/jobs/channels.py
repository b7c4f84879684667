"""Channels, opened: what the alerts, reports and pings of jobs go out by."""

from __future__ import annotations

from collections.abc import Mapping

from backhaul.jobs.channel_base import OpenChannel, PingState
from backhaul.jobs.channel_http import Healthchecks, Ntfy, Slack, Webhook
from backhaul.jobs.channel_mail import Mail
from backhaul.jobs.channel_programs import Apprise, Program
from backhaul.model.channel import APPRISE, COMMAND, HEALTHCHECKS, MAIL, NTFY, SLACK, WEBHOOK, Channel

__all__ = ["OpenChannel", "PingState", "open_channel"]

_KINDS: Mapping[str, type[OpenChannel]] = {
    MAIL: Mail,
    WEBHOOK: Webhook,
    SLACK: Slack,
    NTFY: Ntfy,
    HEALTHCHECKS: Healthchecks,
    COMMAND: Program,
    APPRISE: Apprise,
}


def open_channel(channel: Channel) -> OpenChannel:
    """Return what messages can be given to. Nothing is sent, and no secret fetched, before there is a message.

    Raises:
        ConfigurationError: the channel needs Apprise, which is not installed.
    """
    return _KINDS[channel.kind](channel)
