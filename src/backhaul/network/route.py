"""The sender's chain: who feeds whom, the links that the sender has itself, and what is known of all others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from backhaul.formats import fan_out_messages as messages
from backhaul.model.fan_out import COMPLETE, FAILED, RECEIVING, SENDER, Member
from backhaul.network.links import Feeder
from backhaul.network.participants import Participants, Receiver
from backhaul.pipeline.chunk_log import ChunkLog
from backhaul.planning import chain
from backhaul.transforms.seal import SessionKeys

# Seconds between two tries of a link that does not work when there is no other way.
_RETRY = 1.0
# Seconds after which a link that was broken may be tried again: cables are plugged in again.
_FORGIVEN = 60.0
# Seconds after which a receiver to which no link can be opened is given up.
_UNREACHED = 30.0


class Route:
    """See the module.

    Args:
        who: who takes part; its condition is held by whoever calls, where that is said.
        log: the session's chunks.
        keys: of the session.
        sender: this host's name.
        on_unreached: told of a receiver that nobody reaches, and why. (The condition is held.)
        on_gone: told of a receiver that wants what nobody has any more. (The condition is held.)
    """

    def __init__(
        self,
        who: Participants,
        log: ChunkLog,
        keys: SessionKeys,
        sender: str,
        *,
        on_unreached: Callable[[Receiver, str], None],
        on_gone: Callable[[Receiver], None],
    ) -> None:
        self.due: float | None = None
        self.begun = False
        self._who = who
        self._log = log
        self._keys = keys
        self._sender = sender
        self._on_unreached = on_unreached
        self._on_gone = on_gone
        self._lock = threading.Lock()
        self._feeders: dict[int, Feeder] = {}
        self._carried = 0
        self._broken: dict[tuple[int, int], float] = {}
        self._apart: set[int] = set()
        self._order: list[int] = []
        self._route: chain.Route = {SENDER: ()}
        self._closed = False

    # -- who is in it ------------------------------------------------------------------------------------

    def join(self, receiver: Receiver) -> None:
        """Put a receiver at the chain's end. (The condition is held.)"""
        self._order.append(receiver.index)

    def set_apart(self, receiver: Receiver) -> None:
        """Have the sender feed it by itself until it has caught up. (The condition is held.)"""
        self._apart.add(receiver.index)

    def leave(self, receiver: Receiver) -> None:
        """Take a receiver out. (The condition is held.)"""
        self._apart.discard(receiver.index)
        if receiver.index in self._order:
            self._order.remove(receiver.index)

    def is_apart(self, receiver: Receiver) -> bool:
        """Whether the sender feeds it by itself. (The condition is held.)"""
        return receiver.index in self._apart

    def successors(self, receiver: Receiver) -> tuple[int, ...]:
        """Return the places of those whom it feeds. (The condition is held.)"""
        return self._route.get(receiver.index, ())

    def tail(self) -> Receiver | None:
        """Return the last one of the chain. (The condition is held.)"""
        receivers = self._who.receivers
        chained = [node for node in self._order if node not in self._apart and receivers[node].taking_part]
        return receivers[chained[-1]] if chained else None

    @staticmethod
    def holds(receiver: Receiver) -> bool:
        """Whether it may be in the route: also when its consumer has failed, as long as it passes on."""
        return receiver.state in (RECEIVING, COMPLETE, FAILED) and not receiver.dismissed

    # -- links that do not work --------------------------------------------------------------------------

    def link_down(self, source: int, target: int, reason: str, *, gone: bool) -> None:
        """Note that a link does not work. (The condition is held.)"""
        receivers = self._who.receivers
        receiver = receivers[target]
        who = self._sender if source == SENDER else receivers[source].name
        if target not in self._order or receiver.dismissed:
            return
        if gone:
            if source == SENDER:
                self._on_gone(receiver)
            else:
                self._apart.add(target)
                self._who.tell(f"{receiver.name} is far behind {who}: it is fed from here until it has caught up")
        else:
            now = time.monotonic()
            self._broken[source, target] = now
            if receiver.unreached_since is None:
                receiver.unreached_since, receiver.unreached_at = now, receiver.status.received
            if now - receiver.unreached_since > _UNREACHED and self._only_way(source, target):
                address = f"{receiver.control.address}:{receiver.hello.port}"
                self._on_unreached(receiver, f"nobody reaches it at {address} (--data-port): {reason}")
                return
            self._who.tell(f"the link from {who} to {receiver.name} is broken: {reason}")
        if source != SENDER:
            receivers[source].told = None
        self.due = time.monotonic() + (_RETRY if not gone and self._only_way(source, target) else 0.0)

    def _cut(self, source: int, target: int) -> None:
        """End a link over which nothing comes, so that it is opened anew if there is no other. (Condition held.)"""
        if source == SENDER:
            feeder = self._feeders.pop(target, None)
            if feeder is not None:
                self._settle(target, feeder)
                feeder.stop()
        else:
            self._who.say(self._who.receivers[source], messages.Route(feeds=()))
            self._who.receivers[source].told = ()

    def _only_way(self, source: int, target: int) -> bool:
        return target in chain.route(self._order, self._broken, self._apart).get(source, ())

    def look(self, now: float) -> None:
        """End links over which nothing comes, and have those join that have caught up. (The condition is held.)"""
        receivers = self._who.receivers
        positions = {node: receivers[node].position(now) for node in self._order}
        route = {node: successors for node, successors in self._route.items() if node in (*positions, SENDER)}
        route = {node: tuple(s for s in successors if s in positions) for node, successors in route.items()}
        # What has nothing to wait for does not stall: a dump may say nothing for an hour.
        for node, successors in route.items():
            have = self._log.end if node == SENDER else positions[node].next
            for successor in successors:
                if have <= positions[successor].next:
                    receivers[successor].moved_at = now
                    positions[successor] = receivers[successor].position(now)
        for source, target in chain.stalled(route, positions, self._log.end):
            receivers[target].moved_at = now  # the new link has its time too
            self._cut(source, target)
            self.link_down(source, target, f"nothing came over it for {chain.LINK_PATIENCE:.0f} s", gone=False)
        tail = self.tail()
        for node in self._apart & set(positions):
            if tail is not None and chain.may_join(positions[node], positions[tail.index]):
                self._apart.discard(node)
                self._order.remove(node)
                self._order.append(node)
                self._who.tell(f"{receivers[node].name} has caught up")
                self.due = 0.0

    # -- the plan ----------------------------------------------------------------------------------------

    def plan(self) -> None:
        """Decide who feeds whom, and tell those whom it changes."""
        with self._lock:  # the watch, and who begins, may both come here
            receivers = self._who.receivers
            with self._who.condition:
                if not self.begun or self._closed:
                    return
                self.due = None
                now = time.monotonic()
                self._broken = {link: when for link, when in self._broken.items() if now - when < _FORGIVEN}
                self._order = [node for node in self._order if self.holds(receivers[node])]
                self._apart &= set(self._order)
                self._route = chain.route(self._order, self._broken, self._apart)
                for node, successors in self._route.items():
                    for successor in successors:
                        self._note_feeder(node, receivers[successor])
                todo = [
                    (receivers[node], successors)
                    for node, successors in self._route.items()
                    if node != SENDER and receivers[node].told != successors
                ]
                for receiver, successors in todo:
                    receiver.told = successors
                wanted = {node: receivers[node].member for node in self._route[SENDER]}
            self._feed(wanted)
            for receiver, successors in todo:
                feeds = tuple(receivers[node].member for node in successors)
                self._who.say(receiver, messages.Route(feeds=feeds))

    def _note_feeder(self, node: int, receiver: Receiver) -> None:
        name = self._sender if node == SENDER else self._who.receivers[node].name
        if not receiver.fed_by or receiver.fed_by[-1] != name:
            receiver.fed_by.append(name)

    # -- the sender's own links --------------------------------------------------------------------------

    def _feed(self, wanted: dict[int, Member]) -> None:
        """Have the sender's own links lead to these, and to no others."""
        for index in [index for index in self._feeders if index not in wanted]:
            feeder = self._feeders.pop(index)
            self._settle(index, feeder)
            feeder.stop()
        for index, member in wanted.items():
            if index not in self._feeders:
                feeder = Feeder(self._log, member, self._keys, SENDER, self._feeder_down)
                self._feeders[index] = feeder
                feeder.start()

    def _settle(self, index: int, feeder: Feeder) -> None:
        self._carried += feeder.sent
        if self._who.receivers[index].late:
            self._who.receivers[index].caught_up += feeder.sent

    def _feeder_down(self, feeder: Feeder, reason: str, gone: bool) -> None:
        with self._who.condition:
            index = feeder.member.index
            if self._feeders.get(index) is feeder:
                self._settle(index, self._feeders.pop(index))
                self.link_down(SENDER, index, reason, gone=gone)
                if self.due is None:
                    self.due = time.monotonic() + _RETRY

    @property
    def fed(self) -> int:
        """Bytes that the sender's links have carried."""
        return self._carried + sum(feeder.sent for feeder in list(self._feeders.values()))

    def caught_up(self, receiver: Receiver) -> int:
        """Return what a late one has had over the sender's own links."""
        feeder = self._feeders.get(receiver.index)
        return receiver.caught_up + (feeder.sent if receiver.late and feeder is not None else 0)

    def close(self) -> None:
        """End the sender's links."""
        self._closed = True
        self._feed({})
