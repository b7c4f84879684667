"""What a sender and a receiver say to each other over their control connection.

Each message is four bytes of its length, big-endian, and as many of a JSON object whose ``type`` names it. The
receiver speaks first, whoever has called whom. Unknown keys are ignored, an unknown type is an error: the version in
``Hello`` and ``Offer`` says whether both mean the same.
"""

from __future__ import annotations

import re
import struct
from typing import Any

import msgspec

from backhaul.errors import FormatError
from backhaul.model.fan_out import Member, Receipt, ReceivedStream
from backhaul.model.reception import Reception

VERSION = 1
LENGTH = struct.Struct(">I")
LARGEST = 64 << 20
"""The largest message, in bytes: a START with a source of a hundred thousand tables fits."""


class _Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type", tag=str.lower):
    pass


# -- from the receiver ---------------------------------------------------------------------------------------


class Hello(_Message, frozen=True, kw_only=True, omit_defaults=True):
    """Who is there.

    Attributes:
        version: of these messages.
        name: the host's, as it says itself; a certificate's counts more.
        tool: the program with its version.
        clock: seconds since 1970 at the moment of writing.
        port: TCP port for links.
        free: bytes free where it keeps what it gets, or -1 where it keeps nothing.
        spool: bytes that may wait on its disk.
        wants: what it does with the stream, in words.
        busy: what keeps it from taking part, or empty.
        expires: when its key does (ISO), or empty.
    """

    version: int
    name: str
    tool: str
    clock: float
    port: int
    free: int = -1
    spool: int = 0
    wants: str = ""
    busy: str = ""
    expires: str = ""


class Ready(_Message, frozen=True, kw_only=True, omit_defaults=True):
    """It takes part.

    Attributes:
        udp_port: for what is sent to it alone by UDP; 0 if it has not joined the group.
        probes: how many of the sender's probes have come by multicast; -1 if it was not asked yet.
        remark: why it has not joined, or empty.
    """

    udp_port: int = 0
    probes: int = -1
    remark: str = ""


class Refusal(_Message, frozen=True, kw_only=True, omit_defaults=True):
    """It does not take part, and why."""

    reason: str


class Status(_Message, frozen=True, kw_only=True, omit_defaults=True):
    """Where it is; sent several times a second, also as the sign of life.

    Attributes:
        next: the chunk that it waits for: all below have come, and are as they were sealed.
        start: the lowest number that it could pass on.
        received: bytes that have come over links.
        taken: chunks that its consumer has taken.
        blocked: what it waits for with its memory and spool full: ``consumer``, ``receiver`` (the next one), or empty.
        blocked_for: seconds.
        upstream: the place of the one who feeds it; None for nobody.
        spooled: bytes that wait on its disk.
        reception: what is here and missing by multicast; None without one.
    """

    next: int
    start: int = 0
    received: int = 0
    taken: int = 0
    blocked: str = ""
    blocked_for: float = 0.0
    upstream: int | None = None
    spooled: int = 0
    reception: Reception | None = None


class LinkDown(_Message, frozen=True, kw_only=True, omit_defaults=True):
    """A link to a successor does not work, and why. ``gone``: it wants what is not here any more."""

    index: int
    reason: str
    gone: bool = False


class Received(_Message, frozen=True, kw_only=True, omit_defaults=True):
    """The end of its part."""

    receipt: Receipt


# -- from the sender -----------------------------------------------------------------------------------------


class Offer(_Message, frozen=True, kw_only=True, omit_defaults=True):
    """A session: its secrets, and how it is sent. ``group``, ``group_port`` and ``parity`` are the multicast's."""

    version: int
    sender: str
    tool: str
    session: bytes
    key: bytes
    signer: bytes
    index: int
    transport: str = "chain"
    group: str = ""
    group_port: int = 0
    parity: int = 0
    probe: bytes = b""


class Probed(_Message, frozen=True, kw_only=True, omit_defaults=True):
    """So many probes were sent to the group: how many have come is to be said, by another ``Ready``."""

    count: int


class Route(_Message, frozen=True, kw_only=True, omit_defaults=True):
    """Whom to pass the stream on to."""

    feeds: tuple[Member, ...]


class Signed(_Message, frozen=True, kw_only=True, omit_defaults=True):
    """ABORT: the chunk itself, ahead of those that are on their way."""

    chunk: bytes


class FromStore(_Message, frozen=True, kw_only=True, omit_defaults=True):
    """The stream is to be had as a backup: SERIES@ID. It came too late to get it from anybody else.

    ``streams`` are those of the session: a backup that has others is another one, whatever its name.
    """

    reference: str
    streams: tuple[ReceivedStream, ...]


class Alive(_Message, frozen=True, kw_only=True, omit_defaults=True):
    """The sender lives. ``highest`` is the number of the last chunk that was made."""

    highest: int = -1


class Bye(_Message, frozen=True, kw_only=True, omit_defaults=True):
    """The session is over for this receiver; with a reason, before it was whole.

    ``rejected``: it says that it has everything, and it is not what was sent.
    """

    reason: str = ""
    rejected: bool = False


FromReceiver = Hello | Ready | Refusal | Status | LinkDown | Received
FromSender = Offer | Probed | Route | Signed | FromStore | Alive | Bye
Message = FromReceiver | FromSender

# (Made at import: msgspec may fail when several threads decode a type for the first time.)
# What a message says may be shown on a terminal: nothing in it may be an order to that. (Line ends are left.)
_CONTROLS = re.compile(rb"\\u00(?:[01][0-9A-Fa-f]|7[Ff]|[89][0-9A-Fa-f])|\xc2[\x80-\x9f]|\x7f|\\[bf]")
_DECODER: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Message)


def encode(message: Message) -> bytes:
    """Return the message with its length."""
    text = msgspec.json.encode(message)
    return LENGTH.pack(len(text)) + text


def decode(text: bytes | bytearray) -> Message:
    """Return the message without its length.

    Raises:
        FormatError: it is none.
    """
    try:
        message: Message = _DECODER.decode(_CONTROLS.sub(b"?", text))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FormatError("A message can't be read", str(error), "See that both hosts run the same version.") from error
    return message
