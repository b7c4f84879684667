"""The sender's part of a session: its chunks, who takes part, who feeds whom, and what becomes of each.

The sender seals each chunk once and keeps it in its log. From there it goes to the first of the chain, to the group by
multicast, and to those that the sender has to feed by itself. What each receiver says of its place comes in over its
control connection; the route is decided here, again and again, and told to those whom it changes.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from backhaul import version
from backhaul.errors import BackhaulError
from backhaul.formats import fan_out_messages as messages
from backhaul.formats.fan_out_messages import Hello, LinkDown, Ready, Received, Refusal, Status
from backhaul.model.fan_out import (
    COMPLETE,
    DROPPED,
    FAILED,
    LOST,
    READY,
    RECEIVING,
    SENDER,
    WAITING,
    Abort,
    Member,
    Receipt,
    ReceiverFate,
    SessionEnd,
    Start,
    StreamEnd,
    Transport,
)
from backhaul.network.control import BEAT, SILENCE, ConnectionLostError, Control
from backhaul.network.gathering import Arrival
from backhaul.network.links import Feeder
from backhaul.network.multicast import Multicast
from backhaul.pipeline.chunk_log import ChunkLog, LogClosedError, Reader
from backhaul.pipeline.recycler import Recycler
from backhaul.planning import chain
from backhaul.planning.chain import Position
from backhaul.transforms.seal import Sealer, SessionKeys

_TICK = 0.1
# Seconds between two tries of a link that does not work when there is no other way.
_RETRY = 1.0
# Seconds after which a link that was broken may be tried again: cables are plugged in again.
_FORGIVEN = 60.0
_DROP_AFTER = 5.0
# Chunks by which one may be behind the others without being slow.
_FEW = 8
# Seconds after which a receiver to which no link can be opened is given up.
_UNREACHED = 30.0
_BYE_PATIENCE = 5.0
_PROBES = 50
_PROBE_PATIENCE = 3.0
# Seconds for which one receiver may hold up a multicast without being short of room.
_GROUP_PATIENCE = 5.0


class NobodyLeftError(Exception):
    """No receiver takes part any more."""


class _Receiver:
    def __init__(self, index: int, arrival: Arrival, *, late: bool) -> None:
        self.index = index
        self.name = arrival.name
        self.control: Control = arrival.control
        self.hello: Hello = arrival.hello
        self.state = WAITING
        self.transport: Transport = "chain"
        self.late = late
        self.from_store = False
        self.status = Status(next=0)
        self.moved_at = self.advanced_at = time.monotonic()
        self.probes = -1
        self.receipt: Receipt | None = None
        self.reason = ""
        self.remark = ""
        self.fed_by: list[str] = []
        self.caught_up = 0
        self.dismissed = False
        self.told: tuple[int, ...] | None = None
        self.udp_port = 0
        self.unreached_since: float | None = None
        self.unreached_at = 0

    @property
    def taking_part(self) -> bool:
        return self.state == RECEIVING

    @property
    def member(self) -> Member:
        return Member(
            index=self.index,
            name=self.name,
            address=self.control.address,
            port=self.hello.port,
        )

    def position(self, now: float) -> Position:
        status = self.status
        return Position(status.next, status.start, now - self.moved_at, bool(status.blocked))


class SessionOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a session treats its receivers.

    Attributes:
        slow: ``throttle``, or ``drop`` whoever holds up the others for more than a few seconds.
        max_hold: seconds in all for which the dump may wait for slow receivers; then the slowest is dropped.
        transport: how it is sent.
        group: the multicast group's address, and its port.
        group_port: see ``group``.
        interface: this host's address on the network of the group; empty for the one that the way there has.
        rate: bytes a second of multicast at most; None to find out.
        parity: pieces for each one of parity; 0 for none.
    """

    slow: str = "throttle"
    max_hold: float = 600.0
    transport: Transport = "chain"
    group: str = ""
    group_port: int = 0
    interface: str = ""
    rate: float | None = None
    parity: int = 0


class SenderSession:
    """See the module. ``condition`` is notified at each change of a receiver's state.

    Args:
        sender: this host's name.
        log: for the session's chunks; closed by ``close``.
        options: how to treat the receivers.
        recycler: where byte arrays come from; the log's too.
        on_news: told what people may want to know, as it happens.
    """

    def __init__(
        self,
        sender: str,
        log: ChunkLog,
        options: SessionOptions,
        recycler: Recycler,
        on_news: Callable[[str], None] = lambda text: None,
    ) -> None:
        signer = Ed25519PrivateKey.generate()
        self.keys = SessionKeys(os.urandom(16), os.urandom(32), signer.public_key().public_bytes_raw())
        self.log = log
        self.condition = threading.Condition()
        self.store_reference: str | None = None
        self.store_expected = False
        self.receivers: list[_Receiver] = []
        self.started = False
        self.ended = False
        self._whole = False
        self._names: tuple[str, ...] = ()
        self.probe = os.urandom(16)
        self.payload = 0
        self._sealer = Sealer(self.keys, signer, recycler.take)
        self._seal_lock = threading.Lock()
        self._route_lock = threading.Lock()
        self._chunks: dict[int, int] = {}
        self._ends: list[StreamEnd] = []
        self._sender = sender
        self._options = options
        # (Told by a thread that holds no lock: whoever shows it may be asking for the overview meanwhile.)
        self._news: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._teller = threading.Thread(target=self._tell, args=(on_news,), name="news", daemon=True)
        self._teller.start()
        self.on_left: Callable[[str], None] = lambda name: None
        self._feeders: dict[int, Feeder] = {}
        self._carried = 0
        self._broken: dict[tuple[int, int], float] = {}
        self._apart: set[int] = set()
        self._order: list[int] = []
        self._route: chain.Route = {SENDER: ()}
        self._route_due: float | None = None
        self._closed = threading.Event()
        self._forgiven = 0.0
        self._keeper: Reader | None = None
        self._multicast: Multicast | None = None
        self._group_failed = ""
        self._damaged: dict[int, int] = {}
        self._menders: dict[int, Feeder] = {}
        threading.Thread(target=self._watch, name="fan-out", daemon=True).start()

    def _tell(self, on_news: Callable[[str], None]) -> None:
        while (text := self._news.get()) is not None:
            on_news(text)

    def _on_news(self, text: str) -> None:
        self._news.put(text)

    # -- who takes part ----------------------------------------------------------------------------------

    @property
    def ready(self) -> int:
        """How many are ready to receive."""
        with self.condition:
            return sum(receiver.state == READY for receiver in self.receivers)

    @property
    def living(self) -> int:
        """How many take part, or are complete."""
        with self.condition:
            return sum(receiver.state in (READY, RECEIVING, COMPLETE) for receiver in self.receivers)

    def admit(self, arrival: Arrival) -> str:
        """Take a receiver in; return the reason why not, or an empty text."""
        if arrival.hello.busy:
            return arrival.hello.busy
        with self.condition:
            if self._closed.is_set() or self.ended:
                return "the session is over"
            late = self.started
            if late and self.log.start > 0 and not self.store_expected:
                return (
                    f"{arrival.name} came too late: what was sent first is not here any more. "
                    "(send --spool DIR keeps it.)"
                )
            receiver = _Receiver(len(self.receivers), arrival, late=late)
            receiver.transport = "chain" if late else self._options.transport
            self.receivers.append(receiver)
        threading.Thread(target=self._listen, args=(receiver,), name=f"hear-{receiver.name}", daemon=True).start()
        self._say(
            receiver,
            messages.Offer(
                version=messages.VERSION,
                sender=self._sender,
                tool=f"backhaul {version.VERSION}",
                session=self.keys.session,
                key=self.keys.key,
                signer=self.keys.signer,
                index=receiver.index,
                transport=receiver.transport,
                group=self._options.group,
                group_port=self._options.group_port,
                parity=self._options.parity,
                probe=self.probe,
            ),
        )
        return ""

    def begin(self, start: Start) -> None:
        """Send START: who is ready takes part."""
        self._names = tuple(stream.name for stream in start.streams)
        with self.condition:
            self.started = True
            for receiver in self.receivers:
                if receiver.state == READY:
                    # (One that came after the group was probed was not asked.)
                    if receiver.probes < _PROBES // 2 or not receiver.udp_port:
                        receiver.transport = "chain"
                    self._enter(receiver)
            by_group = {r.index: (r.control.address, r.udp_port) for r in self.receivers if self._in_group(r)}
        if by_group and self._multicast is not None:
            self._multicast.start(self.log, by_group)
        self._keeper = self.log.reader("receivers", self.log.start)
        self._append_signed(start)
        self._plan_route()

    def _advance_keeper(self) -> None:
        """Keep what a receiver lacks still: should those before it die, or the multicast fail, it comes from here.

        (The condition is held.)
        """
        if self._keeper is not None:
            self._keeper.advance(min((receiver.status.next for receiver in self._fed()), default=self.log.end))

    def _fed(self) -> list[_Receiver]:
        """Who gets the stream as it is made. (The condition is held.)"""
        return [
            receiver
            for receiver in self.receivers
            if receiver.state == RECEIVING and not receiver.from_store and receiver.index not in self._apart
        ]

    def _in_group(self, receiver: _Receiver) -> bool:
        return receiver.state == RECEIVING and receiver.transport == "multicast"

    def _enter(self, receiver: _Receiver) -> None:
        receiver.state = RECEIVING
        receiver.moved_at = receiver.advanced_at = time.monotonic()
        if receiver.late and self.log.start > 0:
            receiver.from_store = True
            self._on_news(f"{receiver.name} came late: it gets the backup from the store once that is whole")
            if self.store_reference is not None:
                self._say(receiver, messages.FromStore(reference=self.store_reference))
        elif receiver.transport == "chain":
            self._order.append(receiver.index)
            if receiver.late:
                tail = self._tail()
                if tail is not None and tail.status.start > 0:
                    self._apart.add(receiver.index)
                self._on_news(f"{receiver.name} came late, and catches up")

    def _tail(self) -> _Receiver | None:
        chained = [node for node in self._order if node not in self._apart and self.receivers[node].taking_part]
        return self.receivers[chained[-1]] if chained else None

    # -- what is sent ------------------------------------------------------------------------------------

    def put(self, stream: int, body: bytes | memoryview, raw: int, check: Callable[[], None]) -> None:
        """Seal a piece of a stream, and have it sent. Waits while there is no room.

        Args:
            stream: its number.
            body: the piece, encoded.
            raw: its bytes, decoded.
            check: called now and then while it waits; what it raises ends the waiting.

        Raises:
            NobodyLeftError: no receiver takes part any more.
            LogClosedError: the session was closed.
            OSError: the spool failed.
        """
        with self._seal_lock:
            self._append(self._sealer.data(stream, body, raw), check)
            self.payload += len(body)
            self._chunks[stream] = self._chunks.get(stream, 0) + 1

    def chunks_of(self, stream: int) -> int:
        """Return how many chunks a stream had so far."""
        return self._chunks.get(stream, 0)

    def end_stream(self, end: StreamEnd, check: Callable[[], None]) -> None:
        """Say that a stream was whole. Raises as ``put`` does."""
        self._ends.append(end)
        self._append_signed(end, check)

    def end(self, make: Callable[[int, tuple[StreamEnd, ...]], SessionEnd], check: Callable[[], None]) -> None:
        """Say that all was whole. Raises as ``put`` does.

        Args:
            make: given the number of chunks so far, and the streams' ends.
            check: see ``put``.
        """
        ends = tuple(sorted(self._ends, key=lambda end: end.stream))
        self._whole = True  # before it is said: a receipt may be here before this call has ended
        self._append_signed(make(self._sealer.number, ends), check)
        with self.condition:
            self.ended = True
            self.condition.notify_all()
        if self._multicast is not None:
            self._multicast.end(self.log.end)

    def abort(self, reason: str) -> None:
        """Tell all that there will be no whole stream. Harmless after the end."""
        with self.condition:
            if self.ended or self._closed.is_set():
                return
            self.ended = True
            receivers = [receiver for receiver in self.receivers if receiver.state in (WAITING, READY, RECEIVING)]
        # Whoever seals has stopped by now, or does so when it next looks. (A number is never used twice.)
        with self._seal_lock:
            chunk = bytes(self._sealer.signed(Abort(reason=reason)))
        for receiver in receivers:
            begun = receiver.state == RECEIVING
            self._say(receiver, messages.Signed(chunk=chunk) if begun else messages.Bye(reason=reason))
            with self.condition:
                receiver.reason = receiver.reason or reason
                if begun:
                    receiver.state = FAILED

    def _append_signed(self, body: Start | StreamEnd | SessionEnd, check: Callable[[], None] = lambda: None) -> None:
        with self._seal_lock:
            self._append(self._sealer.signed(body), check)

    def _append(self, chunk: bytearray, check: Callable[[], None]) -> None:
        def look() -> None:
            check()
            if not self.living:
                raise NobodyLeftError

        if not self.living:
            raise NobodyLeftError
        self.log.append(chunk, check=look)

    # -- what receivers say ------------------------------------------------------------------------------

    def _listen(self, receiver: _Receiver) -> None:
        try:
            while True:
                message = receiver.control.receive()
                with self.condition:
                    self._heard(receiver, message)
                    self.condition.notify_all()
        except ConnectionLostError as error:
            if not receiver.dismissed:
                self._lose(receiver, LOST, str(error))
        except BackhaulError as error:
            self._lose(receiver, FAILED, f"{error.what}: {error.why}")
        finally:
            receiver.control.release()

    def _heard(self, receiver: _Receiver, message: messages.Message) -> None:
        if isinstance(message, Status):
            before, receiver.status = receiver.status, message
            if message.received != before.received or message.next != before.next or message.blocked:
                receiver.moved_at = time.monotonic()
            if message.next != before.next or message.next >= self.log.end or message.blocked:
                receiver.advanced_at = time.monotonic()
            if message.received > receiver.unreached_at:
                receiver.unreached_since = None
            self._advance_keeper()
            self._on_status(receiver, message)
        elif isinstance(message, Ready):
            receiver.probes, receiver.udp_port = message.probes, message.udp_port
            receiver.remark = message.remark
            if receiver.state == WAITING:
                if self.started:
                    receiver.late = True
                    self._enter(receiver)
                    self._route_due = 0.0
                else:
                    receiver.state = READY
        elif isinstance(message, Refusal):
            receiver.state, receiver.reason = FAILED, message.reason
            self._on_news(f"{receiver.name} does not take part: {message.reason}")
        elif isinstance(message, LinkDown):
            if 0 <= message.index < len(self.receivers):
                self._link_down(receiver.index, message.index, message.reason, gone=message.gone)
        elif isinstance(message, Received):
            receiver.receipt = message.receipt
            if receiver.state != RECEIVING:
                return  # it was dropped: what it says of that is no news
            wrong = self._is_wrong(receiver, message.receipt)
            receiver.state = COMPLETE if message.receipt.outcome == "complete" and not wrong else FAILED
            receiver.reason = receiver.reason or message.receipt.reason or wrong
            if receiver.state == FAILED:
                self._on_news(f"{receiver.name} failed: {receiver.reason}")

    def _is_wrong(self, receiver: _Receiver, receipt: Receipt) -> str:
        """Return what a receipt for the whole has other than what was sent, or an empty text."""
        if receipt.outcome != "complete":
            return ""
        if not self._whole:
            return "it says that it has everything, before everything was sent"
        sent = {self._names[end.stream]: (end.size, end.blake3) for end in self._ends}
        if receiver.from_store:
            # (What was read from a store was compared with the backup's own record, which has its hash.)
            sizes = sorted(size for size, _ in sent.values())
            read = sorted(stream.size for stream in receipt.streams)
            return "" if read in ([], sizes) else "its receipt is not for what was sent"
        got = {stream.name: (stream.size, stream.blake3) for stream in receipt.streams}
        return "" if got == sent else "its receipt is not for what was sent"

    def _on_status(self, receiver: _Receiver, status: Status) -> None:
        if self._multicast is not None and receiver.transport == "multicast" and status.reception is not None:
            self._multicast.report(receiver.index, status.reception)

    def _lose(self, receiver: _Receiver, state: str, reason: str) -> None:
        with self.condition:
            if receiver.state in (WAITING, READY, RECEIVING):
                receiver.state, receiver.reason = state, reason
                self._on_news(f"{receiver.name} is {state}: {reason}")
            self._apart.discard(receiver.index)
            if receiver.index in self._order:
                self._order.remove(receiver.index)
            if self._multicast is not None:
                self._multicast.remove(receiver.index)
            self._route_due = 0.0
            self.condition.notify_all()
        receiver.control.close()
        self.on_left(receiver.name)

    # -- the route ---------------------------------------------------------------------------------------

    def _link_down(self, source: int, target: int, reason: str, *, gone: bool) -> None:
        """Note that a link does not work. (The condition is held.)"""
        receiver = self.receivers[target]
        who = self._sender if source == SENDER else self.receivers[source].name
        if target not in self._order or receiver.dismissed:
            return
        if gone:
            if source == SENDER:
                self._give_up_on(receiver)
            else:
                self._apart.add(target)
                self._on_news(f"{receiver.name} is far behind {who}: it is fed from here until it has caught up")
        else:
            now = time.monotonic()
            self._broken[source, target] = now
            if receiver.unreached_since is None:
                receiver.unreached_since, receiver.unreached_at = now, receiver.status.received
            if now - receiver.unreached_since > _UNREACHED and self._only_way(source, target):
                address = f"{receiver.control.address}:{receiver.hello.port}"
                self._fail_receiver(receiver, f"nobody reaches it at {address} (--data-port): {reason}")
                return
            self._on_news(f"the link from {who} to {receiver.name} is broken: {reason}")
        if source != SENDER:
            self.receivers[source].told = None
        self._route_due = time.monotonic() + (_RETRY if not gone and self._only_way(source, target) else 0.0)

    def _cut(self, source: int, target: int) -> None:
        """End a link over which nothing comes, so that it is opened anew if there is no other. (Condition held.)"""
        if source == SENDER:
            feeder = self._feeders.pop(target, None)
            if feeder is not None:
                self._settle(target, feeder)
                feeder.stop()
        else:
            self._say(self.receivers[source], messages.Route(feeds=()))
            self.receivers[source].told = ()

    def _only_way(self, source: int, target: int) -> bool:
        return target in chain.route(self._order, self._broken, self._apart).get(source, ())

    def _fail_receiver(self, receiver: _Receiver, reason: str) -> None:
        """Take a receiver out of the session. (The condition is held.)"""
        if receiver.index in self._order:
            self._order.remove(receiver.index)
        self._apart.discard(receiver.index)
        receiver.state, receiver.reason = FAILED, reason
        self._on_news(f"{receiver.name} failed: {reason}")
        self._say(receiver, messages.Bye(reason=reason))
        self._route_due = 0.0

    def _give_up_on(self, receiver: _Receiver) -> None:
        """Nobody has any more what a receiver wants. (The condition is held.)"""
        self._order.remove(receiver.index)
        self._apart.discard(receiver.index)
        if self.store_expected:
            receiver.from_store = True
            self._on_news(f"{receiver.name} is far behind: it gets the backup from the store once that is whole")
            if self.store_reference is not None:
                self._say(receiver, messages.FromStore(reference=self.store_reference))
            return
        self._fail_receiver(receiver, "it wants what nobody keeps any more (send --spool DIR keeps all)")

    def _plan_route(self) -> None:
        """Decide who feeds whom, and tell those whom it changes."""
        with self._route_lock:  # the watch, and who begins, may both come here
            with self.condition:
                if not self.started or self._closed.is_set():
                    return
                self._route_due = None
                now = time.monotonic()
                self._broken = {link: when for link, when in self._broken.items() if now - when < _FORGIVEN}
                self._order = [node for node in self._order if self._fed_still(self.receivers[node])]
                self._apart &= set(self._order)
                self._route = chain.route(self._order, self._broken, self._apart)
                for node, successors in self._route.items():
                    for successor in successors:
                        self._note_feeder(node, self.receivers[successor])
                todo = [
                    (self.receivers[node], successors)
                    for node, successors in self._route.items()
                    if node != SENDER and self.receivers[node].told != successors
                ]
                for receiver, successors in todo:
                    receiver.told = successors
                wanted = {node: self.receivers[node].member for node in self._route[SENDER]}
            self._feed(wanted)
            for receiver, successors in todo:
                self._say(receiver, messages.Route(feeds=tuple(self.receivers[node].member for node in successors)))

    def _fed_still(self, receiver: _Receiver) -> bool:
        """Whether it is in the route: also when its consumer has failed, as long as it passes on."""
        return receiver.state in (RECEIVING, COMPLETE, FAILED) and not receiver.dismissed

    def _note_feeder(self, node: int, receiver: _Receiver) -> None:
        name = self._sender if node == SENDER else self.receivers[node].name
        if not receiver.fed_by or receiver.fed_by[-1] != name:
            receiver.fed_by.append(name)

    def _feed(self, wanted: dict[int, Member]) -> None:
        """Have the sender's own links lead to these, and to no others."""
        for index in [index for index in self._feeders if index not in wanted]:
            feeder = self._feeders.pop(index)
            self._settle(index, feeder)
            feeder.stop()
        for index, member in wanted.items():
            if index not in self._feeders:
                feeder = Feeder(self.log, member, self.keys, SENDER, self._feeder_down)
                self._feeders[index] = feeder
                feeder.start()

    def _settle(self, index: int, feeder: Feeder) -> None:
        self._carried += feeder.sent
        if self.receivers[index].late:
            self.receivers[index].caught_up += feeder.sent

    def _feeder_down(self, feeder: Feeder, reason: str, gone: bool) -> None:
        with self.condition:
            index = feeder.member.index
            if self._feeders.get(index) is feeder:
                self._settle(index, self._feeders.pop(index))
                self._link_down(SENDER, index, reason, gone=gone)
                if self._route_due is None:
                    self._route_due = time.monotonic() + _RETRY

    @property
    def fed(self) -> int:
        """Bytes that the sender's links have carried."""
        feeders = (*self._feeders.values(), *self._menders.values())
        return self._carried + sum(feeder.sent for feeder in feeders)

    @property
    def sent(self) -> int:
        """Bytes that this host has put on the network: over links, to the group, and in messages."""
        multicast = self._multicast.sent if self._multicast is not None else 0
        return self.fed + multicast + sum(receiver.control.sent for receiver in self.receivers)

    def probe_group(self) -> None:
        """Find out whom the multicast reaches; those that it does not get the chain.

        Raises:
            ConfigurationError: this host can't multicast there.
        """
        if self._options.transport != "multicast":
            return
        with self.condition:
            asked = [receiver for receiver in self.receivers if receiver.state == READY]
        if not asked:
            return
        self._multicast = Multicast(
            self.keys,
            interface=self._options.interface or asked[0].control.own_address,
            group=self._options.group,
            port=self._options.group_port,
            rate=self._options.rate,
            parity=self._options.parity,
            on_damaged=self._send_again,
            on_failure=self._group_ended,
        )
        self._multicast.probe(self.probe, _PROBES)
        for receiver in asked:
            self._say(receiver, messages.Probed(count=_PROBES))
        deadline = time.monotonic() + _PROBE_PATIENCE
        with self.condition:
            while any(r.probes < 0 and r.state == READY for r in asked) and time.monotonic() < deadline:
                self.condition.wait(0.05)
            for receiver in asked:
                if receiver.probes < _PROBES // 2:
                    receiver.transport = "chain"
                    receiver.remark = receiver.remark or (
                        f"multicast did not reach it ({max(0, receiver.probes)} of {_PROBES} probes came): by the chain"
                    )
                    self._on_news(f"{receiver.name}: {receiver.remark}")

    def _send_again(self, index: int, number: int) -> None:
        """Note that a chunk came to a receiver damaged: it is to have it over TCP."""
        with self.condition:
            self._damaged[index] = max(number, self._damaged.get(index, -1))

    def _mend(self) -> None:
        """Send over TCP what came damaged: up to the last such chunk, and no further. (The condition is held.)"""
        for index, number in list(self._damaged.items()):
            receiver, mender = self.receivers[index], self._menders.get(index)
            over = receiver.state != RECEIVING or receiver.status.next > number or receiver.transport == "chain"
            if over or (mender is not None and mender.ended):
                if mender is not None:
                    self._carried += mender.sent
                    mender.stop()
                    del self._menders[index]
                if over:
                    del self._damaged[index]
            elif mender is None:
                mender = Feeder(
                    self.log, receiver.member, self.keys, SENDER, lambda feeder, reason, gone: None, until=number
                )
                self._menders[index] = mender
                mender.start()

    def _look_at_group(self) -> None:
        """Move whoever the multicast does not reach any more to the chain. (The condition is held.)"""
        now = time.monotonic()
        for receiver in self.receivers:
            if self._in_group(receiver) and (self._group_failed or now - receiver.advanced_at > _GROUP_PATIENCE):
                why = self._group_failed or f"multicast did not reach it for {_GROUP_PATIENCE:.0f} s"
                self._to_chain(receiver, f"{why}: by the chain from then on")

    def _to_chain(self, receiver: _Receiver, remark: str) -> None:
        """Have a receiver fed by the chain from now on. (The condition is held.)"""
        receiver.transport, receiver.remark = "chain", remark
        receiver.moved_at = time.monotonic()
        # (In this order: what it lacks is kept by the one before the other lets go of it.)
        self._order.append(receiver.index)
        if self._multicast is not None:
            self._multicast.remove(receiver.index)
        self._on_news(f"{receiver.name}: {remark}")
        self._route_due = 0.0

    def _group_ended(self, reason: str) -> None:
        """The multicast can't go on: its receivers get the rest by the chain."""
        with self.condition:
            self._group_failed = f"multicast failed ({reason})"

    # -- the watch ---------------------------------------------------------------------------------------

    def _watch(self) -> None:
        beat = 0.0
        while not self._closed.wait(_TICK):
            now = time.monotonic()
            try:
                self._look(now)
            except LogClosedError:
                return
            except Exception as error:  # noqa: BLE001 - nobody would be told anything any more
                self.abort(f"a fault of Backhaul: {type(error).__name__}: {error}")
                return
            if now - beat >= BEAT:
                beat = now
                for receiver in list(self.receivers):
                    if receiver.state in (WAITING, READY, RECEIVING) or self._fed_still(receiver):
                        self._say(receiver, messages.Alive(highest=self.log.end - 1))

    def _look(self, now: float) -> None:
        with self.condition:
            for receiver in self.receivers:
                if receiver.state == RECEIVING and receiver.control.silent_for > SILENCE:
                    receiver.control.close()  # its own thread finds out
            positions = {node: self.receivers[node].position(now) for node in self._order}
            route = {node: successors for node, successors in self._route.items() if node in (*positions, SENDER)}
            route = {node: tuple(s for s in successors if s in positions) for node, successors in route.items()}
            # What has nothing to wait for does not stall: a dump may say nothing for an hour.
            for node, successors in route.items():
                have = self.log.end if node == SENDER else positions[node].next
                for successor in successors:
                    if have <= positions[successor].next:
                        self.receivers[successor].moved_at = now
                        positions[successor] = self.receivers[successor].position(now)
            for source, target in chain.stalled(route, positions, self.log.end):
                self.receivers[target].moved_at = now  # the new link has its time too
                self._cut(source, target)
                self._link_down(source, target, f"nothing came over it for {chain.LINK_PATIENCE:.0f} s", gone=False)
            tail = self._tail()
            for node in self._apart & set(positions):
                if tail is not None and chain.may_join(positions[node], positions[tail.index]):
                    self._apart.discard(node)
                    self._order.remove(node)
                    self._order.append(node)
                    self._on_news(f"{self.receivers[node].name} has caught up")
                    self._route_due = 0.0
            self._mend()
            self._advance_keeper()
            self._look_at_group()
            self._look_for_slow()
            due = self._route_due is not None and self._route_due <= now
        if due:
            self._plan_route()
        self._dismiss()

    def _look_for_slow(self) -> None:
        """Drop whoever holds up the dump for longer than it may. (The condition is held.)"""
        held, _ = self.log.blocked
        slowest = self._slowest() if held else None
        if slowest is None:
            return
        total, blocked_for = self.log.held_seconds + held, slowest.status.blocked_for
        if total - self._forgiven > self._options.max_hold:
            why = f"the dump has waited for slow receivers for {self._options.max_hold:.0f} s (--max-hold)"
        elif self._options.slow == "drop" and slowest.status.blocked == "consumer" and blocked_for > _DROP_AFTER:
            why = f"its consumer held up the others for {blocked_for:.0f} s (--slow drop)"
        else:
            return
        self._forgiven = total  # the others have not been the slowest: they have their own time
        slowest.state, slowest.reason, slowest.dismissed = DROPPED, why, True
        self._on_news(f"{slowest.name} is dropped: {why}")
        self._say(slowest, messages.Bye(reason=why))
        if slowest.index in self._order:
            self._order.remove(slowest.index)
        self._apart.discard(slowest.index)
        if self._multicast is not None:
            self._multicast.remove(slowest.index)
        self._route_due = 0.0

    def _slowest(self) -> _Receiver | None:
        """Return the receiver that holds up the others: by its consumer, or by a line that is slower than theirs.

        Where all are as slow as each other it is the network, and nobody's fault. (The condition is held.)
        """
        fed = self._fed()
        stuck = [receiver for receiver in fed if receiver.status.blocked == "consumer"]
        if stuck:
            return min(stuck, key=lambda receiver: receiver.status.next)
        if len(fed) < 2:
            return None
        last = min(fed, key=lambda receiver: receiver.status.next)
        ahead = max(receiver.status.next for receiver in fed) - last.status.next
        return last if ahead > _FEW and 2 * ahead > self.log.end - self.log.start else None

    def _dismiss(self) -> None:
        """Let those go that are done, once nobody needs them to pass on any more."""
        with self.condition:
            if not self.ended:
                return
            todo = []
            behind = {r.index for r in self.receivers if r.state == RECEIVING and r.status.next < self.log.end}
            for receiver in self.receivers:
                needed = behind & set(self._route.get(receiver.index, ()))
                if receiver.receipt is not None and not receiver.dismissed and not needed:
                    receiver.dismissed = True
                    todo.append(receiver)
        for receiver in todo:
            self._say(receiver, messages.Bye())

    def send_to_store_readers(self, reference: str) -> None:
        """Tell those that came too late that the backup is there now."""
        with self.condition:
            self.store_reference = reference
            todo = [receiver for receiver in self.receivers if receiver.from_store and receiver.state == RECEIVING]
        for receiver in todo:
            self._say(receiver, messages.FromStore(reference=reference))

    def no_store(self, reason: str) -> None:
        """Tell those that wait for the backup in the store that there will be none."""
        with self.condition:
            self.store_expected = False
            todo = [receiver for receiver in self.receivers if receiver.from_store and receiver.state == RECEIVING]
            for receiver in todo:
                receiver.state, receiver.reason = FAILED, reason
        for receiver in todo:
            self._say(receiver, messages.Bye(reason=reason))

    def wait_for_receipts(self, check: Callable[[], None]) -> None:
        """Wait until each one that takes part has said what became of it; ``check`` is called now and then."""
        while True:
            with self.condition:
                if not any(receiver.state == RECEIVING for receiver in self.receivers):
                    break
                self.condition.wait(0.2)
            check()
        self._dismiss()

    def close(self) -> None:
        """End every link and connection."""
        deadline = time.monotonic() + _BYE_PATIENCE
        for receiver in self.receivers:
            # Whoever was told goodbye closes; what it has to say until then is heard.
            while receiver.dismissed and receiver.state == COMPLETE and not receiver.control.closed:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.01)
        self._closed.set()
        if self._multicast is not None:
            self._multicast.close()
        self._feed({})
        self.log.close()
        for receiver in self.receivers:
            receiver.control.close()
        self._news.put(None)
        self._teller.join(1.0)

    def overview(self) -> list[tuple[str, str, str]]:
        """Return each receiver's name, its state, and what it waits for, or how far it is behind."""
        with self.condition:
            result = []
            for receiver in self.receivers:
                behind, status = self.log.end - receiver.status.next, receiver.status
                if receiver.state != RECEIVING:
                    where = ""
                elif status.blocked == "consumer":
                    where = f"its consumer holds it up for {status.blocked_for:.0f} s"
                elif behind > 0:
                    where = f"{behind} chunks behind"
                else:
                    waiting = status.next - status.taken
                    where = f"{waiting} chunks wait for its consumer" if waiting > 1 else "up to date"
                result.append((receiver.name, receiver.state, where))
            return result

    def fates(self) -> tuple[ReceiverFate, ...]:
        """Return what became of each, in the order in which they came."""
        with self.condition:
            return tuple(
                ReceiverFate(
                    name=receiver.name,
                    state=receiver.state if receiver.state != RECEIVING else LOST,
                    transport=receiver.transport,
                    late=receiver.late,
                    caught_up=receiver.caught_up + self._catching_up(receiver),
                    fed_by=tuple(receiver.fed_by),
                    reason=receiver.reason or receiver.remark,
                    receipt=receiver.receipt,
                )
                for receiver in self.receivers
            )

    def _catching_up(self, receiver: _Receiver) -> int:
        """Return what a late one has had over the sender's own link, if that goes on still."""
        feeder = self._feeders.get(receiver.index)
        return feeder.sent if receiver.late and feeder is not None else 0

    def _say(self, receiver: _Receiver, message: messages.FromSender) -> None:
        with contextlib.suppress(ConnectionLostError):  # its own thread finds out
            receiver.control.send(message)
