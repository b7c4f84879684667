"""A rate limit shared by many threads, whose rate may change as time goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class TokenBucket:
    """Bytes a second over all who ask, with at most ``burst`` seconds of arrears saved up.

    The rate is asked for at every take, so that a timetable is followed as it changes; None lets all pass.

    A caller reserves its bytes under the lock and sleeps outside it, so that callers are served in
    the order they asked and none holds up the clock.

    Args:
        rate: bytes a second now, or None.
        burst: seconds' worth of bytes that may pass at once after a pause.
        clock, sleep: replaced in tests.
    """

    def __init__(
        self,
        rate: Callable[[], float | None],
        *,
        burst: float = 0.1,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._next_free = clock()

    def take(self, count: int) -> None:
        """Wait until that many bytes may pass."""
        with self._lock:
            now = self._clock()
            rate = self._rate()
            start = max(self._next_free, now - self._burst)
            if rate is None:
                self._next_free = now
                return
            self._next_free = start + count / rate
            delay = self._next_free - now
        if delay > 0:
            self._sleep(delay)
