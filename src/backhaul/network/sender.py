"""The sender's part of a session: its chunks, what receivers say of them, and what becomes of each.

The sender seals each chunk once and keeps it in its log. From there it goes to the first of the chain, to the group by
multicast, and to those that the sender has to feed by itself. What each receiver says of its place comes in over its
control connection; ``route`` and ``group`` decide of it, again and again, who gets what from whom.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from backhaul import version
from backhaul.errors import BackhaulError
from backhaul.formats import fan_out_messages as messages
from backhaul.formats.fan_out_messages import LinkDown, Ready, Received, Refusal, Status
from backhaul.model.fan_out import (
    COMPLETE,
    DROPPED,
    FAILED,
    LOST,
    READY,
    RECEIVING,
    WAITING,
    Abort,
    Receipt,
    ReceivedStream,
    ReceiverFate,
    SessionEnd,
    Start,
    StreamEnd,
)
from backhaul.network.control import BEAT, SILENCE, ConnectionLostError
from backhaul.network.gathering import Arrival
from backhaul.network.group import Group
from backhaul.network.participants import Participants, Receiver, SessionOptions
from backhaul.network.route import Route
from backhaul.pipeline.chunk_log import ChunkLog, LogClosedError, Reader
from backhaul.pipeline.recycler import Recycler
from backhaul.transforms.seal import Sealer, SessionKeys

_TICK = 0.1
_DROP_AFTER = 5.0
# Chunks by which one may be behind the others without being slow.
_FEW = 8
_BYE_PATIENCE = 5.0


class NobodyLeftError(Exception):
    """No receiver takes part any more."""


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
        self.store_reference: str | None = None
        self.store_expected = False
        self.started = False
        self.ended = False
        self.payload = 0
        self.on_left: Callable[[str], None] = lambda name: None
        self._who = Participants(on_news)
        self.condition = self._who.condition
        self.receivers = self._who.receivers
        self._route = Route(
            self._who, log, self.keys, sender, on_unreached=self._fail_receiver, on_gone=self._give_up_on
        )
        self._group = Group(self._who, log, self.keys, options, self._to_chain)
        self._whole = False
        self._names: tuple[str, ...] = ()
        self._sealer = Sealer(self.keys, signer, recycler.take)
        self._seal_lock = threading.Lock()
        self._chunks: dict[int, int] = {}
        self._ends: list[StreamEnd] = []
        self._sender = sender
        self._options = options
        self._closed = threading.Event()
        self._forgiven = 0.0
        self._keeper: Reader | None = None
        threading.Thread(target=self._watch, name="fan-out", daemon=True).start()

    # -- who takes part ----------------------------------------------------------------------------------

    @property
    def ready(self) -> int:
        """How many are ready to receive."""
        return self._who.ready

    @property
    def living(self) -> int:
        """How many take part, or are complete."""
        return self._who.living

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
            receiver = Receiver(len(self.receivers), arrival, late=late)
            receiver.transport = "chain" if late else self._options.transport
            self.receivers.append(receiver)
        threading.Thread(target=self._listen, args=(receiver,), name=f"hear-{receiver.name}", daemon=True).start()
        self._who.say(
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
                probe=self._group.probe,
            ),
        )
        return ""

    def probe_group(self) -> None:
        """Find out whom the multicast reaches, if it is sent by that. Raises as ``Group.probe_all`` does."""
        self._group.probe_all()

    def begin(self, start: Start) -> None:
        """Send START: who is ready takes part."""
        self._names = tuple(stream.name for stream in start.streams)
        with self.condition:
            self.started = self._route.begun = True
            for receiver in self.receivers:
                if receiver.state == READY:
                    # (One that came after the group was probed was not asked.)
                    if not self._group.reaches(receiver) or not receiver.udp_port:
                        receiver.transport = "chain"
                    self._enter(receiver)
            by_group = {r.index: (r.control.address, r.udp_port) for r in self.receivers if r.in_group}
        self._group.start(by_group)
        self._keeper = self.log.reader("receivers", self.log.start)
        self._append_signed(start)
        self._route.plan()

    def _advance_keeper(self) -> None:
        """Keep what a receiver lacks still: should those before it die, or the multicast fail, it comes from here.

        (The condition is held.)
        """
        if self._keeper is not None:
            self._keeper.advance(min((receiver.status.next for receiver in self._fed()), default=self.log.end))

    def _fed(self) -> list[Receiver]:
        """Who gets the stream as it is made. (The condition is held.)"""
        return [
            receiver
            for receiver in self.receivers
            if receiver.state == RECEIVING and not receiver.from_store and not self._route.is_apart(receiver)
        ]

    def _enter(self, receiver: Receiver) -> None:
        receiver.state = RECEIVING
        receiver.moved_at = receiver.advanced_at = time.monotonic()
        if receiver.late and self.log.start > 0:
            if not self.store_expected:
                self._fail_receiver(receiver, "it came too late, and the backup did not get into the store")
                return
            receiver.from_store = True
            self._who.tell(f"{receiver.name} came late: it gets the backup from the store once that is whole")
            if self.store_reference is not None:
                self._send_to_store(receiver, self.store_reference)
        elif receiver.transport == "chain":
            tail = self._route.tail()
            self._route.join(receiver)
            if receiver.late:
                if tail is not None and tail.status.start > 0:
                    self._route.set_apart(receiver)
                self._who.tell(f"{receiver.name} came late, and catches up")

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
        self._group.end(self.log.end)

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
            self._who.say(receiver, messages.Signed(chunk=chunk) if begun else messages.Bye(reason=reason))
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

    def _listen(self, receiver: Receiver) -> None:
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

    def _heard(self, receiver: Receiver, message: messages.Message) -> None:
        if isinstance(message, Status):
            before, receiver.status = receiver.status, message
            if message.received != before.received or message.next != before.next or message.blocked:
                receiver.moved_at = time.monotonic()
            if message.next != before.next or message.next >= self.log.end or message.blocked:
                receiver.advanced_at = time.monotonic()
            if message.received > receiver.unreached_at:
                receiver.unreached_since = None
            self._advance_keeper()
            self._group.report(receiver, message)
        elif isinstance(message, Ready):
            receiver.probes, receiver.udp_port = message.probes, message.udp_port
            receiver.remark = message.remark
            if receiver.state == WAITING:
                if self.started:
                    receiver.late = True
                    self._enter(receiver)
                    self._route.due = 0.0
                else:
                    receiver.state = READY
        elif isinstance(message, Refusal):
            receiver.state, receiver.reason = FAILED, message.reason
            self._who.tell(f"{receiver.name} does not take part: {message.reason}")
        elif isinstance(message, LinkDown):
            if 0 <= message.index < len(self.receivers):
                self._route.link_down(receiver.index, message.index, message.reason, gone=message.gone)
        elif isinstance(message, Received):
            receiver.receipt = message.receipt
            receiver.rejected = wrong = self._is_wrong(receiver, message.receipt)
            if receiver.state != RECEIVING:
                return  # it was dropped: what it says of that is no news
            receiver.state = COMPLETE if message.receipt.outcome == "complete" and not wrong else FAILED
            receiver.reason = receiver.reason or message.receipt.reason or wrong
            if receiver.state == FAILED:
                self._who.tell(f"{receiver.name} failed: {receiver.reason}")

    def _is_wrong(self, receiver: Receiver, receipt: Receipt) -> str:
        """Return what a receipt for the whole has other than what was sent, or an empty text."""
        if receipt.outcome != "complete":
            return ""
        if not self._whole:
            return "it says that it has everything, before everything was sent"
        return "" if set(receipt.streams) == set(self._sent_streams()) else "its receipt is not for what was sent"

    def _sent_streams(self) -> tuple[ReceivedStream, ...]:
        """Return what each receiver should have of the streams that have ended."""
        return tuple(
            ReceivedStream(name=self._names[end.stream], size=end.size, blake3=end.blake3) for end in self._ends
        )

    def _send_to_store(self, receiver: Receiver, reference: str) -> None:
        self._who.say(receiver, messages.FromStore(reference=reference, streams=self._sent_streams()))

    def _lose(self, receiver: Receiver, state: str, reason: str) -> None:
        with self.condition:
            if receiver.state in (WAITING, READY, RECEIVING):
                receiver.state, receiver.reason = state, reason
                self._who.tell(f"{receiver.name} is {state}: {reason}")
            self._route.leave(receiver)
            self._group.remove(receiver)
            self._route.due = 0.0
            self.condition.notify_all()
        receiver.control.close()
        self.on_left(receiver.name)

    def _fail_receiver(self, receiver: Receiver, reason: str) -> None:
        """Take a receiver out of the session. (The condition is held.)"""
        self._route.leave(receiver)
        receiver.state, receiver.reason = FAILED, reason
        self._who.tell(f"{receiver.name} failed: {reason}")
        self._who.say(receiver, messages.Bye(reason=reason))
        self._route.due = 0.0

    def _give_up_on(self, receiver: Receiver) -> None:
        """Nobody has any more what a receiver wants. (The condition is held.)"""
        self._route.leave(receiver)
        if self.store_expected:
            receiver.from_store = True
            self._who.tell(f"{receiver.name} is far behind: it gets the backup from the store once that is whole")
            if self.store_reference is not None:
                self._send_to_store(receiver, self.store_reference)
            return
        self._fail_receiver(receiver, "it wants what nobody keeps any more (send --spool DIR keeps all)")

    @property
    def fed(self) -> int:
        """Bytes that the sender's links have carried."""
        return self._route.fed + self._group.mended

    @property
    def sent(self) -> int:
        """Bytes that this host has put on the network: over links, to the group, and in messages."""
        return self.fed + self._group.sent + sum(receiver.control.sent for receiver in self.receivers)

    def _to_chain(self, receiver: Receiver, remark: str) -> None:
        """Have a receiver fed by the chain from now on. (The condition is held.)"""
        receiver.transport, receiver.remark = "chain", remark
        receiver.moved_at = time.monotonic()
        # (In this order: what it lacks is kept by the one before the other lets go of it.)
        self._route.join(receiver)
        self._group.remove(receiver)
        self._who.tell(f"{receiver.name}: {remark}")
        self._route.due = 0.0

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
                    if receiver.state in (WAITING, READY, RECEIVING) or self._route.holds(receiver):
                        self._who.say(receiver, messages.Alive(highest=self.log.end - 1))

    def _look(self, now: float) -> None:
        with self.condition:
            for receiver in self.receivers:
                if receiver.state == RECEIVING and receiver.control.silent_for > SILENCE:
                    receiver.control.close()  # its own thread finds out
            self._route.look(now)
            self._group.mend()
            self._advance_keeper()
            self._group.look()
            self._look_for_slow()
            due = self._route.due is not None and self._route.due <= now
        if due:
            self._route.plan()
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
        self._who.tell(f"{slowest.name} is dropped: {why}")
        self._who.say(slowest, messages.Bye(reason=why))
        self._route.leave(slowest)
        self._group.remove(slowest)
        self._route.due = 0.0

    def _slowest(self) -> Receiver | None:
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
                needed = behind & set(self._route.successors(receiver))
                if receiver.receipt is not None and not receiver.dismissed and not needed:
                    receiver.dismissed = True
                    todo.append(receiver)
        for receiver in todo:
            self._who.say(receiver, messages.Bye(reason=receiver.rejected, rejected=bool(receiver.rejected)))

    def send_to_store_readers(self, reference: str) -> None:
        """Tell those that came too late that the backup is there now."""
        with self.condition:
            self.store_reference = reference
            todo = [receiver for receiver in self.receivers if receiver.from_store and receiver.state == RECEIVING]
        for receiver in todo:
            self._send_to_store(receiver, reference)

    def no_store(self, reason: str) -> None:
        """Tell those that wait for the backup in the store that there will be none."""
        with self.condition:
            self.store_expected = False
            todo = [receiver for receiver in self.receivers if receiver.from_store and receiver.state == RECEIVING]
            for receiver in todo:
                receiver.state, receiver.reason = FAILED, reason
        for receiver in todo:
            self._who.say(receiver, messages.Bye(reason=reason))

    def wait_for_receipts(self, check: Callable[[], None], patience: float | None = None) -> None:
        """Wait until each one that takes part has said what became of it.

        Args:
            check: called now and then; what it raises ends the waiting.
            patience: seconds to wait at most; who has not said by then has failed. None for as long as they are there.
        """
        deadline = time.monotonic() + patience if patience is not None else math.inf
        while True:
            with self.condition:
                waiting = [receiver for receiver in self.receivers if receiver.state == RECEIVING]
                if not waiting:
                    break
                if time.monotonic() >= deadline:
                    for receiver in waiting:
                        self._fail_receiver(receiver, f"no receipt for {patience:.0f} s after the end (--receipt-wait)")
                    break
                self.condition.wait(0.2)
            check()
        self._dismiss()

    def close(self) -> None:
        """End every link and connection."""
        self._dismiss()  # (Whoever was interrupted has not waited for that.)
        deadline = time.monotonic() + _BYE_PATIENCE
        for receiver in self.receivers:
            # Whoever was told goodbye closes, once it has heard it; what it has to say until then is heard.
            done = receiver.state == COMPLETE or receiver.rejected
            while receiver.dismissed and done and not receiver.control.closed:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.01)
        self._closed.set()
        self._group.close()
        self._route.close()
        self.log.close()
        for receiver in self.receivers:
            receiver.control.close()
        self._who.close()

    def overview(self) -> list[tuple[str, str, str]]:
        """Return each receiver's name, its state, and what it waits for, or how far it is behind."""
        return self._who.overview(self.log.end)

    def fates(self) -> tuple[ReceiverFate, ...]:
        """Return what became of each, in the order in which they came."""
        with self.condition:
            return tuple(
                ReceiverFate(
                    name=receiver.name,
                    state=receiver.state if receiver.state != RECEIVING else LOST,
                    transport=receiver.transport,
                    late=receiver.late,
                    caught_up=self._route.caught_up(receiver),
                    fed_by=tuple(receiver.fed_by),
                    reason=receiver.reason or receiver.remark,
                    receipt=receiver.receipt,
                )
                for receiver in self.receivers
            )
