"""A receiver's part of a session: chunks come in, are kept, passed on and consumed, and the sender is told.

What has come is checked before it is kept: whatever is in the log is as the sender has sealed it. It is passed on
before it is consumed, and it goes on being passed on when the consumer has failed.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

from backhaul.errors import BackhaulError, ConfigurationError, IntegrityError
from backhaul.formats import chunk
from backhaul.formats import fan_out_messages as messages
from backhaul.formats.chunk import Header
from backhaul.formats.fan_out_messages import Bye, FromStore, LinkDown, Offer, Probed, Ready, Route, Signed, Status
from backhaul.model.fan_out import Abort, Member, Receipt, ReceivedStream
from backhaul.network.control import ConnectionLostError, Control
from backhaul.network.links import Feeder, Intake
from backhaul.network.multicast_receiver import MulticastReceiver
from backhaul.pipeline.chunk_log import ChunkLog, LogClosedError
from backhaul.pipeline.recycler import Recycler
from backhaul.pipeline.supervisor import StoppedError, Supervisor
from backhaul.transforms.seal import Opener, SessionKeys

_TICK = 0.05
# Seconds between two reports of one who receives by multicast, at least.
_SHORTEST = 0.005
_PROBES_LATE = 0.5
# Seconds for which a receiver whose sender is gone goes on waiting for what others may still pass on to it.
_ORPHAN_PATIENCE = 6.0


class SessionLostError(Exception):
    """The stream will not be whole here; the text says why."""


class FromStoreError(Exception):
    """The stream is to be had from a store.

    Args:
        reference: of the backup: SERIES@ID.
        streams: what was sent, and what the backup has to be.
    """

    def __init__(self, reference: str, streams: tuple[ReceivedStream, ...]) -> None:
        super().__init__(reference)
        self.reference = reference
        self.streams = streams


class ReceiverSession:
    """See the module.

    Args:
        control: the connection to the sender; released at the end. Its own address is where a group is joined.
        offer: what the sender has said.
        listener: where links are taken; closed by ``close``.
        log: for the session's chunks; closed by ``close``.
        recycler: where byte arrays come from; the log's too.
    """

    def __init__(
        self, control: Control, offer: Offer, listener: socket.socket, log: ChunkLog, recycler: Recycler
    ) -> None:
        self.keys = SessionKeys(offer.session, offer.key, offer.signer)
        self.log = log
        self.offer = offer
        self.failure: str | None = None
        # Why the sender did not take the receipt for one of what it sent, or empty.
        self.rejected = ""
        self._control = control
        self._opener = Opener(self.keys, recycler.take)
        self._reader = log.reader("consumer", 0)
        self._feeders: dict[int, Feeder] = {}
        self._lock = threading.Lock()
        self._passed_on = 0
        self._lost: str | None = None
        self._lost_at = 0.0
        self._stored: FromStore | None = None
        self._goodbye = False
        self._whole = False
        self._dismissed = threading.Event()
        self._closed = threading.Event()
        self._changed = threading.Event()
        # One chunk is taken at a time, whichever way it came.
        self._order = threading.Lock()
        self._early: dict[int, tuple[Header, bytearray, memoryview]] = {}
        self._multicast: MulticastReceiver | None = None
        self._multicast_group: Supervisor | None = None
        self._remark = ""
        self._intake = Intake(listener, self.keys, lambda: self.log.end, self._take, self._upstream_changed, recycler)

    def start(self) -> None:
        """Begin: listen to the sender, take links, join the group, and say that this receiver is ready."""
        self._intake.start()
        if self.offer.transport == "multicast":
            self._join()
        threading.Thread(target=self._listen, name="hear-sender", daemon=True).start()
        threading.Thread(target=self._report, name="report", daemon=True).start()
        self._say(self._ready())

    def _ready(self, probes: int = -1) -> Ready:
        port = self._multicast.own_port if self._multicast is not None else 0
        return Ready(udp_port=port, probes=probes, remark=self._remark)

    # -- by multicast ------------------------------------------------------------------------------------

    def _join(self) -> None:
        try:
            self._multicast = MulticastReceiver(
                self.keys,
                interface=self._control.own_address,
                group=self.offer.group,
                port=self.offer.group_port,
                on_chunk=self._take_whole,
                parity=self.offer.parity,
            )
        except ConfigurationError as error:
            self._remark = f"{error.what}: {error.why}"
            return
        threading.Thread(target=self._receive_group, args=(self._multicast,), name="group", daemon=True).start()

    def _count_probes(self, sent: int) -> int:
        """Return how many probes have come; what was sent before this was asked may come a moment after it."""
        deadline = time.monotonic() + _PROBES_LATE
        while self._multicast is not None:
            count = self._multicast.probes(self.offer.probe)
            if count >= sent or time.monotonic() > deadline:
                return count
            time.sleep(_SHORTEST)
        return 0

    def _receive_group(self, multicast: MulticastReceiver) -> None:
        try:
            with Supervisor("multicast") as group:
                self._multicast_group = group
                if self._closed.is_set():
                    return
                multicast.run(group)
        except (LogClosedError, StoppedError):
            pass
        except OSError as error:
            self.fail(f"the spool, or the multicast, failed: {error.strerror or error}")
        finally:
            multicast.close()

    def _take_whole(self, number: int, data: bytearray) -> None:
        """Take a chunk that was put together from datagrams: in any order."""
        assert self._multicast is not None
        try:
            header = self._opener.header(data)
            if header.number != number or header.size != len(data):
                raise IntegrityError("A chunk is damaged", "it is another one than its pieces said", "")
            body = self._opener.open(header, data)
        except IntegrityError:
            self._multicast.refetch(number)
            self._changed.set()
            return
        with self._order:
            if number >= self.log.end:
                self._early[number] = (header, data, body)
            self._append_early()

    def _append_early(self) -> None:
        """Keep what has come before its turn, as far as that is there now. (The order's lock is held.)"""
        while (early := self._early.pop(self.log.end, None)) is not None:
            self._append(*early)

    # -- what comes in -----------------------------------------------------------------------------------

    def _take(self, header: Header, data: bytearray, body: memoryview) -> None:
        with self._order:
            if header.number < self.log.end:
                return  # it comes twice when a link is replaced, or by multicast too
            if header.number > self.log.end:
                raise IntegrityError("The link skips chunks", f"{header.number} came, {self.log.end} is next", "")
            self._append(header, data, body)
            self._append_early()

    def _append(self, header: Header, data: bytearray, body: memoryview) -> None:
        try:
            self.log.append(data, body)
        except OSError as error:
            # (It would be no link's fault, and no other link would help.)
            self.fail(f"the spool failed: {error.strerror or error}")
            raise LogClosedError from error
        if header.kind == chunk.SESSION_END:
            self._whole = True
        if self._multicast is not None:
            self._multicast.set_next(self.log.end)
            self._changed.set()

    def _upstream_changed(self, index: int | None, reason: str) -> None:
        """(Whoever feeds, or the sender, has seen it too; what is missing is told by each report.)"""

    def _listen(self) -> None:
        try:
            while True:
                self._heard(self._control.receive())
        except ConnectionLostError as error:
            self._note_loss(f"the connection to the sender is lost: {error}")
        except BackhaulError as error:
            self._note_loss(f"{error.what}: {error.why}")
        except Exception as error:  # noqa: BLE001 - nobody would hear of the end then
            self._note_loss(f"what the sender said could not be done: {type(error).__name__}: {error}")
        finally:
            self._dismissed.set()
            self._control.release()

    def _note_loss(self, reason: str) -> None:
        with self.log.condition:
            if self._lost is None:
                self._lost, self._lost_at = reason, time.monotonic()
            self.log.condition.notify_all()

    def _heard(self, message: messages.Message) -> None:
        if isinstance(message, Route):
            self._feed(message.feeds)
        elif isinstance(message, Signed):
            header = self._opener.header(message.chunk)
            body = self._opener.open(header, message.chunk)
            if header.kind == chunk.ABORT:
                self.fail(f"the sender has given up: {chunk.decode_body(bytes(body), Abort).reason}")
        elif isinstance(message, FromStore):
            with self.log.condition:
                self._stored = message
                self.log.condition.notify_all()
        elif isinstance(message, Probed):
            self._say(self._ready(self._count_probes(message.count)))
        elif isinstance(message, Bye):
            if message.rejected:
                self.rejected = message.reason
            elif message.reason:
                self.fail(f"the sender has let go of this host: {message.reason}")
            self._goodbye = not message.reason
            self._dismissed.set()

    def fail(self, reason: str) -> None:
        """End the stream here: it will not be whole."""
        with self.log.condition:
            if self.failure is None and not self._whole:
                self.failure = reason
            self.log.condition.notify_all()

    # -- passing on --------------------------------------------------------------------------------------

    def _feed(self, members: tuple[Member, ...]) -> None:
        with self._lock:
            if self._closed.is_set():
                return
            wanted = {member.index: member for member in members}
            for index in [index for index in self._feeders if index not in wanted]:
                feeder = self._feeders.pop(index)
                self._passed_on += feeder.sent
                feeder.stop()
            for index, member in wanted.items():
                if index not in self._feeders:
                    feeder = Feeder(self.log, member, self.keys, self.offer.index, self._feeder_down)
                    self._feeders[index] = feeder
                    feeder.start()

    def _feeder_down(self, feeder: Feeder, reason: str, gone: bool) -> None:
        with self._lock:
            if self._feeders.get(feeder.member.index) is not feeder:
                return
            self._passed_on += self._feeders.pop(feeder.member.index).sent
        self._say(LinkDown(index=feeder.member.index, reason=reason, gone=gone))

    # -- reports -----------------------------------------------------------------------------------------

    def _report(self) -> None:
        while not self._closed.is_set():
            # By multicast the sender goes no further ahead than it is told that all have come.
            self._changed.wait(_TICK)
            self._changed.clear()
            self._say(self.status())
            self._closed.wait(_SHORTEST if self._multicast is not None else _TICK)

    @property
    def received(self) -> int:
        """Bytes that have come, over links and by multicast."""
        return self._intake.received + (self._multicast.taken.bytes if self._multicast is not None else 0)

    @property
    def passed_on(self) -> int:
        """Bytes that were passed on."""
        with self._lock:
            return self._passed_on + sum(feeder.sent for feeder in self._feeders.values())

    def status(self) -> Status:
        """Return where this receiver is."""
        seconds, readers = self.log.blocked
        waits_for = "" if not seconds else "consumer" if "consumer" in readers else "receiver"
        return Status(
            next=self.log.end,
            start=self.log.start,
            received=self.received,
            taken=self._reader.position,
            blocked=waits_for,
            blocked_for=round(seconds, 2),
            upstream=self._intake.upstream,
            spooled=self.log.spooled,
            reception=self._multicast.reception() if self._multicast is not None else None,
        )

    def _say(self, message: messages.FromReceiver) -> None:
        with contextlib.suppress(ConnectionLostError):  # whoever listens finds out
            self._control.send(message)

    # -- consuming ---------------------------------------------------------------------------------------

    def chunks(self, check: Callable[[], None]) -> Iterator[tuple[Header, memoryview]]:
        """Yield every chunk with its opened body, from START to the END of the session.

        Args:
            check: called now and then while it waits; what it raises ends the waiting.

        Raises:
            SessionLostError: the stream will not be whole.
            FromStoreError: it is to be had from a store.
            OSError: the spool failed.
        """
        number = 0
        while True:
            try:
                while not self.log.wait(number, _TICK):
                    check()
                    self._check()
                if self.failure is not None:
                    raise SessionLostError(self.failure)
                body = self.log.take_opened(number)
                data = self.log.get(number)
                header = self._opener.header(data)
                if body is None:
                    body = self._opener.open(header, data)
            except LogClosedError as error:
                raise SessionLostError("the session was closed") from error
            yield header, body
            number += 1
            self._reader.advance(number)
            if header.kind in (chunk.SESSION_END, chunk.ABORT):
                return

    def _check(self) -> None:
        """Raise if nothing more is to be hoped for."""
        if self.failure is not None:
            raise SessionLostError(self.failure)
        if self._stored is not None:
            raise FromStoreError(self._stored.reference, self._stored.streams)
        if self._lost is not None and not self._whole:
            # Others may have all of it, and still pass it on; but nobody mends the chain any more.
            alone = self._intake.upstream is None
            if alone or time.monotonic() - self._lost_at > _ORPHAN_PATIENCE:
                raise SessionLostError(self._lost)

    def watch(self, done: threading.Event) -> None:
        """Wait until ``done``, for one whose consumer may stand still.

        Raises:
            SessionLostError: the stream will not be whole.
        """
        came, since = -1, time.monotonic()
        while not done.wait(_TICK):
            now = time.monotonic()
            if self.received != came:
                came, since = self.received, now
            if self.failure is not None:
                raise SessionLostError(self.failure)
            if self._lost is None or self._whole:
                continue
            # The sender is gone. What others may still pass on counts as long as it comes.
            if self._intake.upstream is None or now - max(since, self._lost_at) > _ORPHAN_PATIENCE:
                raise SessionLostError(self._lost)

    def stop_consuming(self) -> None:
        """Keep nothing for the consumer any more; go on passing on."""
        self._reader.close()

    def pass_on_to_the_end(self) -> None:
        """Wait until all of the stream has come, or can't come; for one whose consumer failed."""
        while not self._whole and self.failure is None and not self._dismissed.is_set():
            try:
                self._check()
            except (SessionLostError, FromStoreError):
                return
            time.sleep(_TICK / 2)

    def send_receipt(self, receipt: Receipt, patience: float | None = None) -> bool:
        """Tell the sender the end, and wait until nobody needs this receiver any more.

        Args:
            receipt: what to say.
            patience: seconds to wait at most; None for as long as the sender is there.

        Returns:
            Whether the sender has it.
        """
        self._say(messages.Received(receipt=receipt))
        self._dismissed.wait(patience)
        return self._goodbye

    def close(self) -> None:
        """End every link and connection, and give memory and disk back."""
        self._closed.set()
        with self._lock:
            for feeder in self._feeders.values():
                feeder.stop()
            self._feeders.clear()
        self._intake.stop()
        if self._multicast_group is not None:
            self._multicast_group.stop()
        self._control.close()
        self.log.close()
