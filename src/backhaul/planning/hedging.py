"""When to send a part a second time because the first try takes suspiciously long.

Pure: durations in, a verdict out. A part is slow only in comparison with its neighbours: where all are slow, the
link or the store is, and a second try would add to the load.
"""

from __future__ import annotations

from collections import deque

# Seconds a byte of this many parts are remembered, and so many are needed for a judgement.
_REMEMBERED = 32
_NEEDED = 6
# A try counts as slow beyond this multiple of what its neighbours took, and not before these seconds.
_FACTOR = 4.0
_LEAST = 5.0
# At most one part in twenty is sent twice, so that hedging never becomes a load of its own.
_SHARE = 20


class HedgePolicy:
    """Learns how long parts take; tells which one is worth a second try."""

    def __init__(self, least: float = _LEAST) -> None:
        self._least = least
        self._paces: deque[float] = deque(maxlen=_REMEMBERED)
        self._parts = 0
        self._hedges = 0

    def finished(self, size: int, seconds: float) -> None:
        """Note how long a part took."""
        self._paces.append(seconds / max(1, size))
        self._parts += 1

    def is_slow(self, size: int, seconds: float) -> bool:
        """Tell whether a part of that size, under way for so long, should be tried once more."""
        if len(self._paces) < _NEEDED or self._hedges * _SHARE > self._parts:
            return False
        return seconds > max(self._least, _FACTOR * self._usual_pace() * size)

    def hedged(self) -> None:
        """Note that a second try was made."""
        self._hedges += 1

    def _usual_pace(self) -> float:
        return sorted(self._paces)[len(self._paces) // 2]
