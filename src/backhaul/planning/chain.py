"""The chain's route: who passes the stream on to whom, when some are gone and some links don't work.

Pure: positions, times and broken links come in, a route comes out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import msgspec

from backhaul.model.fan_out import SENDER

LINK_PATIENCE = 5.0
"""Seconds without a byte after which a link is broken whose two ends live, and have what to pass and room for it."""

Route = Mapping[int, tuple[int, ...]]
"""Whom each one feeds, by their places; ``SENDER`` is the sender's. Only the sender feeds more than one."""


class Position(msgspec.Struct, frozen=True):
    """Where a receiver is.

    Attributes:
        next: the chunk it waits for.
        start: the lowest one that it could pass on.
        idle: seconds since a byte of the stream came to it.
        blocked: whether it has no room for more.
    """

    next: int
    start: int
    idle: float
    blocked: bool


def route(order: Sequence[int], broken: Collection[tuple[int, int]], apart: Collection[int] = ()) -> Route:
    """Return a route through all of ``order``, near to it, along links that are not broken where that is possible.

    Args:
        order: the receivers' places, in the order of the present route.
        broken: links (from, to) that were seen not to work.
        apart: receivers that the sender feeds by itself, since they are far behind; nobody is fed by them.

    Whom no other one can reach the sender feeds, if it can; whom nobody can reach is last in the chain, where it is
    tried again.
    """
    path: list[int] = []
    left: list[int] = []
    for node in order:
        if node in apart:
            continue
        if (path[-1] if path else SENDER, node) in broken:
            left.append(node)
        else:
            path.append(node)
    alone: list[int] = []
    for node in left:
        place = _place(node, path, broken)
        if place is not None:
            path.insert(place, node)
        elif (SENDER, node) not in broken:
            alone.append(node)
        else:
            path.append(node)
    feeds: dict[int, tuple[int, ...]] = {SENDER: ()}
    previous = SENDER
    for node in path:
        feeds[previous] = (node,)
        feeds[node] = ()
        previous = node
    for node in (*alone, *(node for node in order if node in apart)):
        feeds[SENDER] = (*feeds[SENDER], node)
        feeds[node] = ()
    return feeds


def _place(node: int, path: Sequence[int], broken: Collection[tuple[int, int]]) -> int | None:
    """Return where in the path a node can be put, as late as possible, so that its links work; None if nowhere."""
    for place in range(len(path), -1, -1):
        before = path[place - 1] if place else SENDER
        after = path[place] if place < len(path) else None
        if (before, node) not in broken and (after is None or (node, after) not in broken):
            return place
    return None


def stalled(feeds: Route, positions: Mapping[int, Position], end: int) -> list[tuple[int, int]]:
    """Return the links over which nothing comes although there is something to pass and room for it.

    Args:
        feeds: the route.
        positions: of every receiver in it.
        end: how many chunks the sender has made.
    """
    found = []
    for node, successors in feeds.items():
        have = end if node == SENDER else positions[node].next
        for successor in successors:
            position = positions[successor]
            if have > position.next and not position.blocked and position.idle >= LINK_PATIENCE:
                found.append((node, successor))
    return found


def may_join(position: Position, tail: Position) -> bool:
    """Tell whether a late receiver has caught up enough for the last one of the chain to go on feeding it."""
    return position.next >= tail.start + (tail.next - tail.start) // 4 or position.next >= tail.next
