"""A channel: one way by which people, or the programs that watch for them, are told of jobs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import msgspec

from backhaul.model.secret import Secret

MAIL, WEBHOOK, SLACK, NTFY, HEALTHCHECKS, COMMAND, APPRISE = (
    "mail",
    "webhook",
    "slack",
    "ntfy",
    "healthchecks",
    "command",
    "apprise",
)
CHANNEL_KINDS = (MAIL, WEBHOOK, SLACK, NTFY, HEALTHCHECKS, COMMAND, APPRISE)
# Those that hear of each beginning and end, not only of what people must know.
PING_KINDS = (HEALTHCHECKS,)

Text: TypeAlias = str | Secret
Value: TypeAlias = str | int | float | bool | Secret | tuple[Text, ...] | tuple[tuple[str, Text], ...]


class Channel(msgspec.Struct, frozen=True, kw_only=True):
    """A channel of the config.

    Attributes:
        name: what jobs call it.
        kind: one of ``CHANNEL_KINDS``.
        settings: by their keys in the config (with ``-``), checked, the defaults filled in; seconds are floats,
            headers pairs. What is not there was not set.
    """

    name: str
    kind: str
    settings: Mapping[str, Value] = {}

    def text(self, key: str) -> str:
        """Return a setting that is text; empty where it is not set."""
        value = self.settings.get(key, "")
        assert isinstance(value, str), key
        return value

    def number(self, key: str) -> float:
        """Return a setting that is a number, or seconds."""
        value = self.settings[key]
        assert isinstance(value, int | float), key
        return value

    def hidden(self, key: str) -> Text | None:
        """Return a setting that may be kept elsewhere; None where it is not set."""
        value = self.settings.get(key)
        assert value is None or isinstance(value, str | Secret), key
        return value

    def several(self, key: str) -> tuple[Text, ...]:
        """Return a setting that is a list; empty where it is not set."""
        value = self.settings.get(key, ())
        assert isinstance(value, tuple), key
        return tuple(item for item in value if isinstance(item, str | Secret))

    def pairs(self, key: str) -> tuple[tuple[str, Text], ...]:
        """Return a setting that is a table; empty where it is not set."""
        value = self.settings.get(key, ())
        assert isinstance(value, tuple), key
        return tuple(item for item in value if isinstance(item, tuple))
