"""Counters that a running operation keeps and whoever shows progress reads, at its own pace."""

from __future__ import annotations

import threading


class DestinationProgress:
    """How far one destination is: ``sent`` bytes acknowledged, and its ``state`` in one word."""

    def __init__(self, series: str) -> None:
        self.series = series
        self.sent = 0
        self.state = "waiting"
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Count acknowledged bytes; called from many threads."""
        with self._lock:
            self.sent += count


class PushProgress:
    """Bytes in (``raw``), bytes out (``stored``), and each destination. Each counter has one writer."""

    def __init__(self) -> None:
        self.raw = 0
        self.stored = 0
        self.destinations: list[DestinationProgress] = []


class PullProgress:
    """Bytes delivered out of ``total`` (0 until known); ``stored`` bytes fetched."""

    def __init__(self) -> None:
        self.raw = 0
        self.total = 0
        self.stored = 0
        self.requests = 0
        self._lock = threading.Lock()

    def fetched(self, count: int) -> None:
        """Count one request and its bytes; called from many threads."""
        with self._lock:
            self.stored += count
            self.requests += 1
