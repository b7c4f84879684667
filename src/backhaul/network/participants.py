"""Who takes part in a session, as its sender knows it: each receiver's state, and what it has said last.

Whoever changes what is known of a receiver holds ``condition``, and notifies it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable

import msgspec

from backhaul.formats import fan_out_messages as messages
from backhaul.formats.fan_out_messages import Hello, Status
from backhaul.model.fan_out import COMPLETE, READY, RECEIVING, WAITING, Member, Receipt, Transport
from backhaul.network.control import ConnectionLostError, Control
from backhaul.network.gathering import Arrival
from backhaul.planning.chain import Position


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


class Receiver:
    """One that was taken in.

    Args:
        index: its place.
        arrival: how it came.
        late: whether the session had started by then.
    """

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
        # Why its receipt for everything was not taken for one, or empty.
        self.rejected = ""
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
        """Whether it is at it."""
        return self.state == RECEIVING

    @property
    def in_group(self) -> bool:
        """Whether it gets what is sent by multicast."""
        return self.state == RECEIVING and self.transport == "multicast"

    @property
    def member(self) -> Member:
        """What others have to know of it."""
        return Member(
            index=self.index,
            name=self.name,
            address=self.control.address,
            port=self.hello.port,
        )

    def position(self, now: float) -> Position:
        """Return where it is in the stream."""
        status = self.status
        return Position(status.next, status.start, now - self.moved_at, bool(status.blocked))


class Participants:
    """See the module.

    Args:
        on_news: told what people may want to know, as it happens.
    """

    def __init__(self, on_news: Callable[[str], None]) -> None:
        self.condition = threading.Condition()
        self.receivers: list[Receiver] = []
        # (Told by a thread that holds no lock: whoever shows it may be asking for the overview meanwhile.)
        self._news: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._teller = threading.Thread(target=self._tell, args=(on_news,), name="news", daemon=True)
        self._teller.start()

    def _tell(self, on_news: Callable[[str], None]) -> None:
        while (text := self._news.get()) is not None:
            on_news(text)

    def tell(self, text: str) -> None:
        """Tell people."""
        self._news.put(text)

    def say(self, receiver: Receiver, message: messages.FromSender) -> None:
        """Tell a receiver, if it is there."""
        with contextlib.suppress(ConnectionLostError):  # its own thread finds out
            receiver.control.send(message)

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

    def overview(self, end: int) -> list[tuple[str, str, str]]:
        """Return each receiver's name, its state, and what it waits for, or how far it is behind.

        Args:
            end: how many chunks there are so far.
        """
        with self.condition:
            result = []
            for receiver in self.receivers:
                behind, status = end - receiver.status.next, receiver.status
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

    def close(self) -> None:
        """Tell people what there is to tell still, and no more."""
        self._news.put(None)
        self._teller.join(1.0)
