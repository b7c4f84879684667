"""The group of a session, if it is sent by multicast: whom that reaches, and what has to go over TCP all the same."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from backhaul.formats import fan_out_messages as messages
from backhaul.formats.fan_out_messages import Status
from backhaul.model.fan_out import READY, RECEIVING, SENDER
from backhaul.network.links import Feeder
from backhaul.network.multicast import Multicast
from backhaul.network.participants import Participants, Receiver, SessionOptions
from backhaul.pipeline.chunk_log import ChunkLog
from backhaul.transforms.seal import SessionKeys

_PROBES = 50
_PROBE_PATIENCE = 3.0
# Seconds for which one receiver may hold up a multicast without being short of room.
_GROUP_PATIENCE = 5.0


class Group:
    """See the module.

    Args:
        who: who takes part; its condition is held by whoever calls, where that is said.
        log: the session's chunks.
        keys: of the session.
        options: which group, and how.
        on_unreached: told of a receiver that multicast does not reach any more, and why. (The condition is held.)
    """

    def __init__(
        self,
        who: Participants,
        log: ChunkLog,
        keys: SessionKeys,
        options: SessionOptions,
        on_unreached: Callable[[Receiver, str], None],
    ) -> None:
        self.probe = os.urandom(16)
        self._who = who
        self._log = log
        self._keys = keys
        self._options = options
        self._on_unreached = on_unreached
        self._multicast: Multicast | None = None
        self._failed = ""
        self._damaged: dict[int, int] = {}
        self._menders: dict[int, Feeder] = {}
        self._carried = 0

    def probe_all(self) -> None:
        """Find out whom the multicast reaches; those that it does not get the chain.

        Raises:
            ConfigurationError: this host can't multicast there.
        """
        if self._options.transport != "multicast":
            return
        condition = self._who.condition
        with condition:
            asked = [receiver for receiver in self._who.receivers if receiver.state == READY]
        if not asked:
            return
        self._multicast = Multicast(
            self._keys,
            interface=self._options.interface or asked[0].control.own_address,
            group=self._options.group,
            port=self._options.group_port,
            rate=self._options.rate,
            parity=self._options.parity,
            on_damaged=self._send_again,
            on_failure=self._ended,
        )
        self._multicast.probe(self.probe, _PROBES)
        for receiver in asked:
            self._who.say(receiver, messages.Probed(count=_PROBES))
        deadline = time.monotonic() + _PROBE_PATIENCE
        with condition:
            while any(r.probes < 0 and r.state == READY for r in asked) and time.monotonic() < deadline:
                condition.wait(0.05)
            for receiver in asked:
                if not self.reaches(receiver):
                    receiver.transport = "chain"
                    receiver.remark = receiver.remark or (
                        f"multicast did not reach it ({max(0, receiver.probes)} of {_PROBES} probes came): by the chain"
                    )
                    self._who.tell(f"{receiver.name}: {receiver.remark}")

    @staticmethod
    def reaches(receiver: Receiver) -> bool:
        """Whether enough of the probes have reached it."""
        return receiver.probes >= _PROBES // 2

    def start(self, receivers: dict[int, tuple[str, int]]) -> None:
        """Begin to send what is in the log to these: the address and port of each, by its place."""
        if receivers and self._multicast is not None:
            self._multicast.start(self._log, receivers)

    def report(self, receiver: Receiver, status: Status) -> None:
        """Take what a receiver says that it has."""
        if self._multicast is not None and receiver.transport == "multicast" and status.reception is not None:
            self._multicast.report(receiver.index, status.reception)

    def remove(self, receiver: Receiver) -> None:
        """Go on without a receiver."""
        if self._multicast is not None:
            self._multicast.remove(receiver.index)

    def end(self, number: int) -> None:
        """Say that there are so many chunks, and no more."""
        if self._multicast is not None:
            self._multicast.end(number)

    def _send_again(self, index: int, number: int) -> None:
        """Note that a chunk came to a receiver damaged: it is to have it over TCP."""
        with self._who.condition:
            self._damaged[index] = max(number, self._damaged.get(index, -1))

    def mend(self) -> None:
        """Send over TCP what came damaged: up to the last such chunk, and no further. (The condition is held.)"""
        for index, number in list(self._damaged.items()):
            receiver, mender = self._who.receivers[index], self._menders.get(index)
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
                    self._log, receiver.member, self._keys, SENDER, lambda feeder, reason, gone: None, until=number
                )
                self._menders[index] = mender
                mender.start()

    def look(self) -> None:
        """Say whom the multicast does not reach any more. (The condition is held.)"""
        now = time.monotonic()
        for receiver in self._who.receivers:
            if receiver.in_group and (self._failed or now - receiver.advanced_at > _GROUP_PATIENCE):
                why = self._failed or f"multicast did not reach it for {_GROUP_PATIENCE:.0f} s"
                self._on_unreached(receiver, f"{why}: by the chain from then on")

    def _ended(self, reason: str) -> None:
        """The multicast can't go on: its receivers get the rest by the chain."""
        with self._who.condition:
            self._failed = f"multicast failed ({reason})"

    @property
    def mended(self) -> int:
        """Bytes that went over TCP to mend what came damaged."""
        return self._carried + sum(mender.sent for mender in list(self._menders.values()))

    @property
    def sent(self) -> int:
        """Bytes that went to the group, and to one receiver each as datagrams."""
        return self._multicast.sent if self._multicast is not None else 0

    def close(self) -> None:
        """End the multicast."""
        if self._multicast is not None:
            self._multicast.close()
