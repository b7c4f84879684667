"""How fast a multicast goes.

Pure: what became of a stretch of fresh pieces in, a rate out. Loss alone says little: a bad cable loses one in a
hundred at any rate, a full queue loses what is above its line's rate. So the rate grows while the loss is no more than
it has been at its least, goes back to what arrived when it is, and if going slower did not help, then it is the line's
own loss and the rate is as before.
"""

from __future__ import annotations

import math
from collections import deque

# The rate doubles until the first loss that it caused. Then it grows by steps, which double after so many without
# such a loss: the line may have become much faster, or was never as slow as something made it seem.
_MOST_STEP = 1.0
_STEP = 0.05
_EVEN_STEPS = 4
# So many stretches back the least loss is remembered.
_REMEMBERED = 64
# A loss above this is never taken as the line's own.
_LARGEST_FLOOR = 0.25
# A loss above the floor by less than this, and what chance may bring, is none.
_TOLERANCE = 0.005
_CHANCES = 3.0
# Below what arrived, to let a queue drain.
_BACK = 0.9
# A slower stretch that loses at least so much of what the faster one lost tells that the rate was not to blame.
_UNHELPED = 0.7
_LEAST_RATE = 256 * 1024


class Pace:
    """The rate of a multicast.

    Args:
        start: bytes a second to begin with.
        limit: bytes a second that are never exceeded, or None.
        least: bytes a second below which it never goes.
    """

    def __init__(self, start: float, limit: float | None = None, *, least: float = _LEAST_RATE) -> None:
        self._limit = math.inf if limit is None else limit
        self._least = min(least, self._limit)
        self.rate = min(max(start, self._least), self._limit)
        self._step = _MOST_STEP
        self._clean = 0
        self._losses: deque[float] = deque(maxlen=_REMEMBERED)
        self._suspect: tuple[float, float] | None = None

    @property
    def floor(self) -> float:
        """The share of pieces that the line loses at any rate, as far as it is known."""
        return min(min(self._losses, default=0.0), _LARGEST_FLOOR)

    def observe(self, pieces: int, lost: int, rate: float) -> None:
        """Take what became of so many pieces, all sent since the last call, at so many bytes a second."""
        loss = min(1.0, lost / pieces)
        suspect, self._suspect = self._suspect, None
        if suspect is not None and suspect[1] * _UNHELPED < loss <= _LARGEST_FLOOR:
            self._losses.clear()
            self._losses.append(loss)
            self.rate = suspect[0]
            return
        self._losses.append(loss)
        floor = self.floor
        chance = _CHANCES * math.sqrt(max(floor, 1 / pieces) / pieces)
        if loss > floor + chance + _TOLERANCE:
            self._suspect = (self.rate, loss)
            self._step, self._clean = _STEP, 0
            arrived = rate * (1 - loss) / (1 - floor)
            self.rate = max(self._least, min(self.rate, arrived) * _BACK)
        elif rate > 0.7 * self.rate:
            # (A sender that has nothing to send, or waits for a receiver, learns nothing about faster rates.)
            self.rate = min(self._limit, self.rate * (1 + self._step))
            self._clean += 1
            if self._clean >= _EVEN_STEPS:
                self._step = min(_MOST_STEP, 2 * self._step)
