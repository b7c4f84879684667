"""Values of the fan-out: who takes part, what is sent, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from backhaul.model.manifest import ProducerRecord, SourceRecord, StreamPart
from backhaul.model.memory import MemoryBound

Count = Annotated[int, msgspec.Meta(ge=0)]

SENDER = -1
"""The sender's place among the members, whose places are 0 and up."""

Transport = Literal["chain", "multicast"]

# What becomes of a receiver, as people and programs read it.
WAITING, READY, RECEIVING, COMPLETE, FAILED, LOST, DROPPED = (
    "waiting",
    "ready",
    "receiving",
    "complete",
    "failed",
    "lost",
    "dropped",
)


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One receiver of a session.

    Attributes:
        index: its place in the roster, from 0.
        name: as its key, or the roster, has it.
        address: where its predecessor finds it.
        port: the TCP port on which it takes links.
    """

    index: Count
    name: str
    address: str
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)]


class FanOutStream(msgspec.Struct, frozen=True, kw_only=True):
    """A stream of a session; its number is its place among them. ``part`` says what of the whole it is."""

    name: str
    part: StreamPart | None = None


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """The body of START: what is to come.

    Attributes:
        version: of the format, ``1``.
        id: of the backup, or of the session's start, as a backup's id is written.
        sender: the sending host's name.
        tool: the program that sends, with its version.
        codec: ``zstd`` (each DATA chunk is one frame) or ``none``.
        streams: all of them.
        roster: the receivers' names, in the order of their places.
        source: what is backed up, as far as it is known before it was read, or None.
    """

    version: int
    id: str
    sender: str
    tool: str
    codec: Literal["zstd", "none"]
    streams: tuple[FanOutStream, ...]
    roster: tuple[str, ...]
    source: SourceRecord | None = None


class StreamEnd(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a stream's END: the stream was whole at its producer.

    Attributes:
        stream: its number.
        chunks: how many DATA chunks it had.
        size: its bytes, decoded.
        blake3: of these bytes, in hex.
        producer: how its producer ended.
    """

    stream: Count
    chunks: Count
    size: Count
    blake3: str
    producer: ProducerRecord


class SessionEnd(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a session's END: every stream was whole, and all were of one state.

    Attributes:
        chunks: how many chunks came before this one, of every kind.
        streams: the ends of all streams, by number.
        source: what was backed up, or None.
    """

    chunks: Count
    streams: tuple[StreamEnd, ...]
    source: SourceRecord | None = None


class Abort(msgspec.Struct, frozen=True, kw_only=True):
    """The body of ABORT: there is no whole stream, and there will be none."""

    reason: str


class ReceivedStream(msgspec.Struct, frozen=True, kw_only=True):
    """What one receiver had of a stream: its decoded bytes and their BLAKE3 in hex."""

    name: str
    size: Count
    blake3: str


class Receipt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a receiver says at the end.

    Attributes:
        outcome: ``complete``, or ``failed``: not everything that it was asked to do is done.
        streams: what it has received, whole.
        file: where it was kept, or empty.
        consumer: the command that read it, without secrets, or the database, or empty.
        exit_status: the command's; None where there is none, or it never ended.
        seconds: from START to the consumer's end.
        spooled: the most bytes that waited on its disk.
        rows: rows by ``database/table`` after the restore, where they were asked for.
        reason: what failed and why, or empty.
        remarks: what its operator may want to know.
    """

    outcome: Literal["complete", "failed"]
    streams: tuple[ReceivedStream, ...] = ()
    file: str = ""
    consumer: str = ""
    exit_status: int | None = None
    seconds: float = 0.0
    spooled: Count = 0
    rows: Mapping[str, int] = {}
    reason: str = ""
    remarks: tuple[str, ...] = ()


class ReceiverFate(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of one receiver, as the sender knows it.

    Attributes:
        name: as in the roster.
        state: ``complete``, ``failed``, ``lost`` (no more heard of), ``dropped`` (it held up the others) or
            ``waiting`` (it never came).
        transport: how it got the stream.
        late: whether it came after the start.
        caught_up: bytes that it got from the sender's spool, or from the store, since it came late.
        fed_by: names of those that passed the stream to it, in the order of time.
        reason: why, in words, where it is not complete.
        receipt: what it said, or None.
    """

    name: str
    state: str
    transport: Transport = "chain"
    late: bool = False
    caught_up: Count = 0
    fed_by: tuple[str, ...] = ()
    reason: str = ""
    receipt: Receipt | None = None


class ReceiveResult(msgspec.Struct, frozen=True, kw_only=True):
    """A reception that was whole, though perhaps not everything that was asked for could be done with it.

    Attributes:
        id: of the backup, or of the session's start.
        sender: the sending host's name.
        session: in hex.
        streams: what was received.
        raw_size: bytes over all streams, decoded.
        received: bytes that came over links and by multicast.
        passed_on: bytes that were passed on to other receivers.
        seconds: from START to the consumer's end.
        spooled: the most bytes that waited on the disk.
        from_store: the backup that it was read from, since this host came too late; or None.
        file: where it was kept, or empty.
        consumer: what read it, or empty.
        exit_status: the command's, or None.
        rows: rows by ``database/table`` after the restore, where they were asked for.
        receipt_taken: whether the sender knows.
        failed: what could not be done with it, in words.
        remarks: what its operator may want to know.
        memory: the bound in bytes that this receiver kept, by parts.
        peak_memory: the most bytes that the process had.
    """

    id: str
    sender: str
    session: str
    streams: tuple[ReceivedStream, ...]
    raw_size: Count
    received: Count
    passed_on: Count
    seconds: float
    spooled: Count
    from_store: str | None = None
    file: str = ""
    consumer: str = ""
    exit_status: int | None = None
    rows: Mapping[str, int] = {}
    receipt_taken: bool = True
    failed: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    memory: MemoryBound
    peak_memory: Count


class FanOutResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a fan-out.

    Attributes:
        session: in hex.
        roster: as it was asked for.
        transport: as it was asked for.
        payload: bytes of the streams, encoded as they were sent.
        sent: bytes that this host has put on the network for them: over links, to the group, and in messages.
        held_seconds: how long the dump had to wait for receivers.
        spooled: the most bytes that waited on the disk here.
        required: how many receivers had to be complete.
        receivers: the fate of each.
        reason: why fewer are, or empty.
    """

    session: str
    roster: str
    transport: Transport
    payload: Count
    sent: Count
    held_seconds: float
    spooled: Count
    required: Count
    receivers: tuple[ReceiverFate, ...]
    reason: str = ""

    @property
    def complete(self) -> bool:
        """Whether every receiver has everything."""
        return not self.reason and all(receiver.state == COMPLETE for receiver in self.receivers)
