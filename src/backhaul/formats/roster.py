"""The roster of a fan-out as people write it: ``a,b:7500,[2001:db8::1]``; and as a push's destination: ``send:a,b``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from urllib.parse import parse_qsl

import msgspec

from backhaul.errors import UsageError

SCHEME = "send:"
SENDER_PORT = 7410
"""Where a sender is called by receivers, unless said otherwise."""
RECEIVER_PORT = 7411
"""Where a receiver that listens is called by senders, unless said otherwise."""
SETTINGS = (
    "min-wait",
    "max-wait",
    "require",
    "listen",
    "key",
    "insecure-plain",
    "transport",
    "group",
    "interface",
    "rate",
    "parity",
    "slow",
    "max-hold",
    "receipt-wait",
    "spool",
    "spool-size",
    "memory",
)
"""What ``send:ROSTER?SETTING=VALUE&...`` takes: the options of ``backhaul send`` of the same names."""


class Host(msgspec.Struct, frozen=True):
    """A host: its name or address, and a port."""

    name: str
    port: int

    def text(self, usual: int) -> str:
        """Return the host as people write it; without the port, if it is the usual one."""
        name = f"[{self.name}]" if ":" in self.name else self.name
        return name if self.port == usual else f"{name}:{self.port}"


def parse_host(text: str, port: int) -> Host:
    """Read ``HOST``, ``HOST:PORT`` or ``[ADDRESS]:PORT``; without a port it is ``port``.

    Raises:
        UsageError: it is none.
    """
    name, number = text, ""
    if text.startswith("["):
        name, bracket, number = text[1:].partition("]")
        if not bracket or (number and not number.startswith(":")):
            raise _no_host(text, "a bracket is not closed, or something else than :PORT follows it")
        number = number[1:]
    elif text.count(":") == 1:
        name, _, number = text.partition(":")
        if not number:
            raise _no_host(text, "there is no port after the colon")
    if not name or any(letter.isspace() or letter in "/@,?&" for letter in name) or name.startswith("-"):
        raise _no_host(text, "it is no host's name and no address")
    if number and (not number.isascii() or not number.isdecimal() or not 0 < int(number) < 65536):
        raise _no_host(text, f"{number!r} is no port")
    return Host(name, int(number) if number else port)


def parse_hosts(text: str) -> tuple[Host, ...]:
    """Read a roster: hosts with commas between.

    Raises:
        UsageError: one is none, or is named twice.
    """
    hosts = tuple(parse_host(part.strip(), RECEIVER_PORT) for part in text.split(","))
    names = [host.name.lower() for host in hosts]
    twice = next((host for host in hosts if names.count(host.name.lower()) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice.name} is in the roster twice", text, "Name each host once.")
    return hosts


def parse_listen(text: str, port: int) -> Host:
    """Read where to listen: ``PORT``, ``:PORT``, ``ADDRESS`` or ``ADDRESS:PORT``; the name is empty for everywhere.

    Raises:
        UsageError: it is none of them.
    """
    bare = text.removeprefix(":")
    if bare.isascii() and bare.isdecimal():
        if int(bare) > 65535:
            raise _no_host(text, f"{bare} is no port")
        return Host("", int(bare))
    return parse_host(text, port)


def parse_destination(text: str) -> tuple[str, Mapping[str, str]]:
    """Return the roster and the settings of ``send:ROSTER?SETTING=VALUE&...``.

    Raises:
        UsageError: a setting is unknown, or stands there twice.
    """
    roster, _, query = text.removeprefix(SCHEME).partition("?")
    settings: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in SETTINGS:
            close = difflib.get_close_matches(name, SETTINGS, 1)
            raise UsageError(
                f"{text} has a setting {name!r}",
                f"there is none of that name{f'; did you mean {close[0]}?' if close else ''}",
                f"It takes {', '.join(SETTINGS)}.",
            )
        if name in settings:
            raise UsageError(f"{text} has {name} twice", "only one of them can count", "Leave one out.")
        settings[name] = value
    if not roster:
        raise UsageError(f"{text} names no host", "nothing follows send:", "Write send:db2,db3 or send:2")
    return roster, settings


def _no_host(text: str, why: str) -> UsageError:
    return UsageError(f"{text!r} is no host", why, "Write NAME, NAME:PORT, ADDRESS or [IPV6]:PORT.")
