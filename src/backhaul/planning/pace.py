"""How fast a multicast goes.

Pure: what became of a stretch of fresh pieces in, a rate out. Loss alone says little: a bad cable loses one in a
hundred at any rate, a full queue loses what is above its line's rate. So the rate grows while the loss is no more than
it has been at its least, goes back to what arrived when it is, and if going slower did not help, twice, then it is the
line's own loss and the rate is as before. A queue that fills up shows as delay before it shows as loss.
"""

from __future__ import annotations

import math
from collections import deque

# The rate grows fast until it causes a loss or a queue. Then it grows by steps, which double after so many without: the
# line may have become much faster, or was never as slow as something made it seem.
_MOST_STEP = 0.5
_STEP = 0.05
_EVEN_STEPS = 8
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
_UNHELPED_TIMES = 2
_SLOWER = 0.85
# Seconds of queue at which the rate grows no more, and at which it goes down; less is what reports may be late. It goes
# down no further than this share of the last rate without a queue: the delay may have another cause.
_QUEUE, _LONG_QUEUE = 0.02, 0.03
_DRAIN = 0.93
_MOST_DRAIN = 0.85
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
        self._even = 0.0
        # The rate and the loss that made it go back, and how often going slower has not helped since.
        self._suspect: tuple[float, float] | None = None
        self._unhelped = 0

    @property
    def floor(self) -> float:
        """The share of pieces that the line loses at any rate, as far as it is known."""
        return min(min(self._losses, default=0.0), _LARGEST_FLOOR)

    def observe(self, pieces: int, lost: int, rate: float, queue: float = 0.0) -> None:
        """Take what became of so many pieces, all sent since the last call.

        Args:
            pieces, lost: how many, and how many of them did not come.
            rate: bytes a second at which they were sent.
            queue: seconds that they were longer on their way than others were at best.
        """
        loss = min(1.0, lost / pieces)
        if self._suspect is not None and self._suspect[1] * _UNHELPED < loss <= _LARGEST_FLOOR:
            self._unhelped += 1
            if self._unhelped < _UNHELPED_TIMES:
                self.rate = max(self._least, self.rate * _SLOWER)
                return
            self._losses.clear()
            self._losses.append(loss)
            self.rate = self._suspect[0]
            self._suspect = None
            return
        self._suspect = None
        self._losses.append(loss)
        floor = self.floor
        chance = _CHANCES * math.sqrt(max(floor, 1 / pieces) / pieces)
        if loss > floor + chance + _TOLERANCE:
            self._suspect, self._unhelped = (self.rate, loss), 0
            self._begin_again()
            arrived = rate * (1 - loss) / (1 - floor)
            self._even = self.rate = max(self._least, min(self.rate, arrived) * _BACK)
        elif rate > 0.7 * self.rate:
            # (A sender that has nothing to send, or waits for a receiver, learns nothing about faster rates.)
            self._grow(queue)

    def _grow(self, queue: float) -> None:
        if queue > _QUEUE:
            self._begin_again()
            if queue > _LONG_QUEUE:
                lowest = max(self._least, self._even * _MOST_DRAIN)
                self.rate = min(self.rate, max(lowest, self.rate * _DRAIN))
            return
        self._even = self.rate
        self.rate = min(self._limit, self.rate * (1 + self._step))
        self._clean += 1
        if self._clean >= _EVEN_STEPS:
            self._step = min(_MOST_STEP, 2 * self._step)

    def _begin_again(self) -> None:
        self._step, self._clean = _STEP, 0
