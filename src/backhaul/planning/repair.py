"""Which pieces of a multicast are sent again, and to whom.

Pure: times are passed in. What two or more receivers miss goes to the group, once; what one misses goes to that one. A
piece is not sent again before a report could show that the earlier repair did not arrive, and a chunk's repair waits a
moment for the reports of those that haven't judged it yet, so that one repair serves all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from backhaul.model.reception import Gap, Reception
from backhaul.planning.assembly import places


class Repair(msgspec.Struct, frozen=True):
    """Pieces of a chunk to send again: to one member, or (None) to the group."""

    number: int
    pieces: tuple[int, ...]
    member: int | None


class _Sent(msgspec.Struct, frozen=True):
    time: float
    member: int | None
    bits: int


class _Member:
    def __init__(self) -> None:
        self.heard = 0.0
        self.judged = 0
        self.missing: dict[int, int] = {}


class RepairPlanner:
    """Knows what every member misses; places of pieces are the bits of integers, so that members compare at once.

    Args:
        pieces: tells into how many pieces a chunk was cut; 0 for one that was not sent yet.
        patience: seconds that a repair waits for the reports of other members.
    """

    def __init__(self, members: Iterable[int], pieces: Callable[[int], int], *, patience: float = 0.05) -> None:
        self._members = {member: _Member() for member in members}
        self._pieces = pieces
        self._patience = patience
        self._sent: dict[int, list[_Sent]] = {}
        self._since: dict[int, float] = {}

    def add(self, member: int) -> None:
        """Take in a member."""
        self._members.setdefault(member, _Member())

    def remove(self, member: int) -> None:
        """Forget a member."""
        self._members.pop(member, None)

    def report(self, index: int, reception: Reception, now: float) -> None:
        """Take a member's report, which came just now, in place of its last one."""
        member = self._members.get(index)
        if member is None:
            return
        member.heard = now
        member.judged = reception.judged
        member.missing = {}
        for gap in reception.missing:
            bits = self._bits(gap)
            if bits and gap.number >= reception.next:
                member.missing[gap.number] = bits
                self._since.setdefault(gap.number, now)

    def plan(self, now: float, settle: float, most: int) -> list[Repair]:
        """Return what is to be sent again now, the lowest chunk first, and take it as sent.

        Args:
            now: the time, in seconds of any clock, the same as the reports'.
            settle: seconds from a repair's sending until a report shows it.
            most: the most pieces in all.
        """
        repairs: list[Repair] = []
        for number in sorted(set().union(*(member.missing for member in self._members.values()))):
            if not self._is_ripe(number, now):
                continue
            wanted = self._wanted(number, settle)
            once = twice = 0
            for bits in wanted.values():
                twice |= once & bits
                once |= bits
            for index, bits in ((None, twice), *((index, bits & ~twice) for index, bits in wanted.items())):
                chosen = _lowest(bits, most)
                if chosen:
                    most -= len(chosen)
                    repairs.append(Repair(number, chosen, index))
                    self._sent.setdefault(number, []).append(_Sent(now, index, sum(1 << place for place in chosen)))
            if most <= 0:
                break
        return repairs

    def forget(self, below: int) -> None:
        """Forget the chunks below a number: every member has them."""
        for kept in (self._sent, self._since):
            for number in [number for number in kept if number < below]:
                del kept[number]

    def _is_ripe(self, number: int, now: float) -> bool:
        return now - self._since.get(number, now) >= self._patience or all(
            member.judged > number for member in self._members.values()
        )

    def _wanted(self, number: int, settle: float) -> dict[int, int]:
        wanted = {}
        for index, member in self._members.items():
            bits = member.missing.get(number, 0)
            for sent in self._sent.get(number, ()) if bits else ():
                if sent.member in {None, index} and sent.time + settle > member.heard:
                    bits &= ~sent.bits
            if bits:
                wanted[index] = bits
        # What was sent so long ago that all reports are newer holds nothing back any more.
        oldest = min((member.heard for member in self._members.values()), default=0.0)
        if number in self._sent:
            self._sent[number] = [sent for sent in self._sent[number] if sent.time + settle > oldest]
        return wanted

    def _bits(self, gap: Gap) -> int:
        pieces = self._pieces(gap.number)
        return places(gap.ranges, pieces) if pieces else 0


def _lowest(bits: int, most: int) -> tuple[int, ...]:
    """Return the places of the lowest bits, at most so many."""
    found: list[int] = []
    while bits and len(found) < most:
        low = bits & -bits
        found.append(low.bit_length() - 1)
        bits ^= low
    return tuple(found)
