"""What all channels have in common: messages that can be sent anywhere, and errors that give no secret away."""

from __future__ import annotations

import base64
import ssl
from abc import ABC, abstractmethod
from http.client import HTTPException
from typing import Literal, TypeAlias
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

import msgspec

from backhaul.errors import ConfigurationError, NotifyError
from backhaul.formats.redaction import MASK, redact_text
from backhaul.model.channel import PING_KINDS, Channel, Text
from backhaul.model.secret import Secret
from backhaul.model.verdict import Message
from backhaul.operations.secrets import resolve

PingState: TypeAlias = Literal["start", "ok", "failed"] | int
_LONGEST_SUBJECT = 1000
# Shorter parts of a URL are words like "hooks"; a shorter secret protects nothing, and would blank out the text.
_LEAST_PART = 8
_LEAST_SECRET = 3


class Masks:
    """The secrets of one delivery, in the shapes in which a server's words might show them."""

    def __init__(self) -> None:
        self._values: set[str] = set()

    def add(self, value: str) -> str:
        """Hide a secret from now on, and return it."""
        if len(value) >= _LEAST_SECRET:
            encoded = base64.b64encode(value.encode(errors="replace")).decode()
            self._values |= {value, quote(value), quote(value, safe=""), quote_plus(value), encoded, repr(value)[1:-1]}
        return value

    def add_url(self, url: str) -> str:
        """Hide all of a URL but its scheme and host, and return it."""
        try:
            parts = urlsplit(url)
        except ValueError:
            return self.add(url)
        path = parts.path.strip("/")
        pieces = [piece for piece in path.split("/") if len(piece) >= _LEAST_PART]
        pieces += [path, parts.query, parts.fragment, parts.netloc.rpartition("@")[0]]
        pieces += [parts.username or "", parts.password or "", *(value for _, value in parse_qsl(parts.query))]
        for piece in pieces:
            self.add(piece)
            self.add(unquote(piece))
        return url

    def __call__(self, text: str) -> str:
        """Return the text without them, and without what looks like a secret by itself."""
        for value in sorted(self._values, key=len, reverse=True):
            text = text.replace(value, MASK)
        return redact_text(text)


class OpenChannel(ABC):
    """A channel that messages can be given to. Threads may share it: it keeps nothing between deliveries."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.timeout = channel.number("timeout")

    @property
    def name(self) -> str:
        """What jobs call it."""
        return self.channel.name

    def deliver(self, message: Message) -> None:
        """Deliver a message; return when the other side has taken it.

        It takes at most the channel's ``timeout`` (for programs 3 s of grace more), and 30 s for each secret
        that a command must be asked for.

        Raises:
            NotifyError: it was not delivered, or not to everybody; without any secret.
            ConfigurationError: a secret, certificate or library is not there.
        """
        self._deliver(clean_message(message), Masks())

    def ping(self, state: PingState, text: str = "") -> None:
        """Tell that a run began, or how it ended.

        Args:
            state: an int is an exit status.
            text: the last of the log, for whoever looks there.

        Raises:
            NotifyError: it was not taken.
            ConfigurationError: as for ``deliver``; or this kind of channel hears no pings.
        """
        raise ConfigurationError(
            f"[notify.{self.name}] can't be pinged",
            f"it is a channel of kind {self.channel.kind}",
            f"Name a channel of kind {' or '.join(PING_KINDS)}.",
        )

    @abstractmethod
    def _deliver(self, message: Message, masks: Masks) -> None: ...

    # -- for the kinds -------------------------------------------------------------------------------------

    def _get(self, value: Text, key: str, masks: Masks) -> str:
        """Return a setting's text, fetched from where it is kept, and hidden if it is kept anywhere."""
        if isinstance(value, str):
            return value
        text = masks.add(resolve(value, f"{key} of [notify.{self.name}]"))
        if not text.isprintable():
            raise ConfigurationError(
                f"{key} of [notify.{self.name}] can't be used",
                "what is kept there has more than one line, or control characters",
                "Keep there the secret alone.",
            )
        return text

    def _hidden(self, key: str, masks: Masks) -> str:
        value = self.channel.hidden(key)
        return self._get(value, key, masks) if isinstance(value, str | Secret) else ""

    def _failed(self, place: str, why: str, todo: str, masks: Masks) -> NotifyError:
        via = f" ({place})" if place else ""
        return NotifyError(f"The message was not delivered by [notify.{self.name}]{via}", masks(why), todo)

    def _context(self) -> ssl.SSLContext:
        """Return what TLS trusts.

        Raises:
            ConfigurationError: the file of certificates can't be read.
        """
        file = self.channel.text("ca-file")
        try:
            return ssl.create_default_context(cafile=file or None)
        except OSError as error:  # ssl.SSLError is one
            raise ConfigurationError(
                f"ca-file of [notify.{self.name}] can't be used",
                f"{file}: {error.strerror or error}",
                "Name a file of certificates in PEM.",
            ) from error


def clean_message(message: Message) -> Message:
    """Return the message as every channel can take it: a subject of one line, no bytes that are no text, no NUL."""
    subject = _as_line(message.subject)
    if len(subject) > _LONGEST_SUBJECT:
        subject = subject[: _LONGEST_SUBJECT - 1] + "…"
    return msgspec.structs.replace(
        message,
        subject=subject or "Backhaul",
        text=_as_text(message.text),
        html=_as_text(message.html),
        job=_as_line(message.job),
        state=_as_line(message.state),
    )


def _as_line(text: str) -> str:
    return " ".join("".join(one if one.isprintable() else " " for one in _as_text(text)).split())


def _as_text(text: str) -> str:
    return text.encode(errors="backslashreplace").decode().replace("\0", "\\x00")


def cut(text: str, limit: int, *, keep_end: bool = False) -> str:
    """Return the beginning of a text, or its end, in at most that many bytes of UTF-8; it says that it was cut."""
    encoded = text.encode()
    if len(encoded) <= limit:
        return text
    mark = "[... cut ...]"
    room = max(0, limit - len(mark) - 1)
    if keep_end:
        return f"{mark}\n{encoded[len(encoded) - room :].decode(errors='ignore')}"
    return f"{encoded[:room].decode(errors='ignore')}\n{mark}"


def network_words(error: Exception, seconds: float) -> tuple[str, str]:
    """Return why a connection failed, and what to do about it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        why = f"its certificate is not trusted: {error.verify_message}"
        return why, "Name the certificates to trust by ca-file, or correct the host's name."
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or error}", "Check the port, and whether TLS is spoken there."
    if isinstance(error, TimeoutError):
        return f"it was not done within {seconds:g} s", "Look whether that server answers from this host."
    if isinstance(error, HTTPException):
        return f"the answer is no HTTP, or broke off ({type(error).__name__})", "Check the URL and that server."
    if isinstance(error, ValueError):
        return f"what is to be sent can't be written ({type(error).__name__})", "Check the channel's settings."
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return words, "Check the name and port, and whether this host reaches that server."
