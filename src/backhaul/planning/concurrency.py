"""How many parts to send at once: more while that helps, half as many when the store asks for less.

A state machine without a clock: whoever sends tells it what happened and when. It climbs one step at a time and
keeps a step only if the rate of acknowledged bytes rose with it, so that a link that is full, or a store that
is busy, is not given more connections than help.
"""

from __future__ import annotations

START = 4
# A step has helped when the rate rose by this share; less is noise.
_GAIN = 1.05
# A rate is judged over at least so many seconds and so many parts for each that is under way.
_WINDOW = 2.0
_PARTS = 2
# Seconds to stay after a step that did not help, and after the store asked for less.
_SETTLED = 30.0
_CHASTENED = 15.0


class UploadConcurrency:
    """See the module. ``limit`` is how many parts may be under way, from 1 to ``most``."""

    def __init__(self, most: int, start: int = START) -> None:
        self.limit = max(1, min(start, most))
        self._most = most
        self._window_start: float | None = None
        self._bytes = 0
        self._count = 0
        self._waited = False
        self._rate_before: float | None = None
        self._quiet_until = 0.0
        self._cut_at = -1e9

    def waited(self) -> None:
        """Note that a part had to wait for its turn: more at once might help."""
        self._waited = True

    def acknowledged(self, now: float, size: int) -> None:
        """Note an acknowledged part; ``now`` in seconds, ``size`` in bytes."""
        if self._window_start is None:
            # The first acknowledgement after a change belongs to the time before it.
            self._window_start = now
            return
        self._bytes += size
        self._count += 1
        elapsed = now - self._window_start
        if elapsed < _WINDOW or self._count < _PARTS * self.limit:
            return
        rate, waited = self._bytes / elapsed, self._waited
        self._begin_window()
        if not waited:
            # The stream, not the store, sets the pace: this window says nothing about the limit.
            self._rate_before = None
            return
        if self._rate_before is not None and rate < self._rate_before * _GAIN:
            self.limit = max(1, self.limit - 1)
            self._rate_before = None
            self._quiet_until = now + _SETTLED
            return
        if now >= self._quiet_until and self.limit < self._most:
            self._rate_before = rate
            self.limit += 1

    def throttled(self, now: float) -> None:
        """Note that the store asked for fewer requests. One burst of such answers counts once."""
        if now - self._cut_at < _WINDOW:
            return
        self._cut_at = now
        self.limit = max(1, self.limit // 2)
        self._rate_before = None
        self._quiet_until = now + _CHASTENED
        self._begin_window()

    def _begin_window(self) -> None:
        self._window_start = None
        self._bytes = self._count = 0
        self._waited = False
