"""Counters that a running operation keeps and whoever shows progress reads, at its own pace."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backhaul.operations.fan_out import FanOut


class TableProgress:
    """How many tables of ``total`` were begun, and the latest one's name; ``phase`` is what goes on now."""

    def __init__(self) -> None:
        self.total = 0
        self.begun = 0
        self.latest = ""
        self.phase = ""
        self._lock = threading.Lock()

    def begin(self, name: str) -> None:
        """Count a table; called from many threads."""
        with self._lock:
            self.begun += 1
            self.latest = name


class DestinationProgress:
    """How far one destination is.

    ``sent`` bytes acknowledged by the store in this run, ``reused`` that it had from an earlier one, ``spooled``
    bytes that wait on the disk, and its ``state`` in a word or two.
    """

    def __init__(self, series: str) -> None:
        self.series = series
        self.sent = 0
        self.reused = 0
        self.spooled = 0
        self.state = "waiting"
        self._lock = threading.Lock()

    def add(self, count: int, reused: bool) -> None:
        """Count bytes that the store has; called from many threads."""
        with self._lock:
            if reused:
                self.reused += count
            else:
                self.sent += count


class StreamProgress:
    """Bytes in (``raw``) and bytes out (``stored``) of one stream. Each counter has one writer."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.raw = 0
        self.stored = 0


class PushProgress:
    """Each stream, each destination, the receivers, and the tables that the producers are at."""

    def __init__(self) -> None:
        self.streams: list[StreamProgress] = []
        self.destinations: list[DestinationProgress] = []
        self.tables = TableProgress()
        self.fan_out: FanOut | None = None

    @property
    def receivers(self) -> list[tuple[str, str, str]]:
        """Each receiver's name, its state, and what else is to be said of it."""
        return self.fan_out.overview() if self.fan_out is not None else []

    @property
    def raw(self) -> int:
        """Bytes in, over all streams."""
        return sum(stream.raw for stream in self.streams)

    @property
    def stored(self) -> int:
        """Bytes out, over all streams."""
        return sum(stream.stored for stream in self.streams)


class PullProgress:
    """Bytes delivered out of ``total`` (0 until known); ``stored`` bytes fetched."""

    def __init__(self) -> None:
        self.raw = 0
        self.total = 0
        self.stored = 0
        self.requests = 0
        self.tables = TableProgress()
        self._lock = threading.Lock()

    def delivered(self, count: int) -> None:
        """Count bytes that a target took; called from many threads."""
        with self._lock:
            self.raw += count

    def fetched(self, count: int) -> None:
        """Count one request and its bytes; called from many threads."""
        with self._lock:
            self.stored += count
            self.requests += 1


class MirrorProgress:
    """How far a mirror run is: ``looked`` names compared; ``done`` of ``files``, ``sent`` of ``total`` bytes."""

    def __init__(self) -> None:
        self.phase = "comparing"
        self.looked = 0
        self.files = 0
        self.done = 0
        self.total = 0
        self.sent = 0
        self.read = 0
        self._lock = threading.Lock()

    def add_sent(self, count: int) -> None:
        """Count bytes of the plan that are in the store; called from many threads."""
        with self._lock:
            self.sent += count

    def add_done(self) -> None:
        """Count a file; called from many threads."""
        with self._lock:
            self.done += 1
