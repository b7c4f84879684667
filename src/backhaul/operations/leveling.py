"""What ``planning.compression_level`` is told of a running push, and what it decides: the rung of each frame.

The lines are asked now and then, by whichever worker is about to begin a frame: no thread of its own.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable

from backhaul.model.results import CompressionUse
from backhaul.planning.compression_level import IDLE_EVERY, LevelController, Line
from backhaul.transforms import compress

# Seconds between two looks at the lines.
_TICK = 0.05
# Weight of the newest block of a source.
_NEW_BLOCK = 0.1
# What can be gone on with later is compressed again then, at the same rungs: so many times faster than it was sent.
RESUMABLE_RESERVE = 4.0


class IdleCores:
    """What the cores that this process may use could have done besides: core seconds that nobody has used."""

    def __init__(self, path: str = "/proc/stat", clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._cores = (
            {f"cpu{number}" for number in os.sched_getaffinity(0)} if hasattr(os, "sched_getaffinity") else {""}
        )
        self._tick = os.sysconf("SC_CLK_TCK")
        self._looked = -math.inf
        self._before: int | None = None
        self.seconds: float | None = None

    def look(self) -> float | None:
        """Return how many there were since the first look; None where the kernel does not say."""
        now = self._clock()
        if now - self._looked < IDLE_EVERY:
            return self.seconds
        idle = 0
        try:
            with open(self._path) as file:
                for line in file:
                    name, *counters = line.split()
                    if name in self._cores:
                        idle += int(counters[3]) + int(counters[4])
        except (OSError, ValueError, IndexError):
            return self.seconds
        # (The kernel's counters go back now and then, by a little.)
        before = idle if self._before is None else self._before
        self.seconds = (self.seconds or 0.0) + max(0, idle - before) / self._tick
        self._looked, self._before = now, max(before, idle)
        return self.seconds


class Leveling:
    """The rungs of all streams of a push. Called from many threads.

    Args:
        workers: how many frames are made at once.
        window: most frames of a stream in flight.
        resumable: whether the push can be gone on with after an interruption.
        clock: monotonic seconds.
    """

    def __init__(
        self, workers: int, window: int, *, resumable: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._controller = LevelController(
            [rung.prior for rung in compress.LADDER],
            workers,
            frame=compress.FRAME_SIZE,
            window=window,
            reserve=RESUMABLE_RESERVE if resumable else 1.0,
        )
        self._clock = clock
        self._idle = IdleCores()
        self._lock = threading.Lock()
        self._lines: dict[object, list[_Meter]] = {}
        self._gone: Counter[object] = Counter()
        self._sources: dict[object, float] = {}
        self._clocks: dict[int, float] = {}
        self._spent = 0.0
        self._looked = -math.inf
        self._used: Counter[int] = Counter()
        self._passed = 0

    def attach(self, destination: object, look: Callable[[], Line]) -> Callable[[], None]:
        """Have a line to a destination count, until the returned function is called."""
        meter = _Meter(look)
        with self._lock:
            self._lines.setdefault(destination, []).append(meter)

        def detach() -> None:
            with self._lock:
                self._lines[destination].remove(meter)

        return detach

    def worker(self) -> None:
        """Note that this thread makes frames: its CPU time is theirs."""
        if hasattr(time, "pthread_getcpuclockid"):
            with self._lock, contextlib.suppress(OSError):
                self._clocks[time.pthread_getcpuclockid(threading.get_ident())] = 0.0

    def gave(self, stream: object, rate: float | None) -> None:
        """Note how many bytes a second a stream's source gives; None at its end."""
        with self._lock:
            if rate is None:
                self._sources.pop(stream, None)
            else:
                self._sources[stream] = rate

    def choose(self) -> int:
        """Return the rung for the next frame."""
        with self._lock:
            now = self._clock()
            if now - self._looked >= _TICK:
                self._looked = now
                self._look(now)
            return self._controller.next()

    def made(self, rung: int | None, raw: int, stored: int, cpu: float, wall: float) -> None:
        """Note a frame; no rung for one that was passed on as it was."""
        with self._lock:
            if rung is None:
                self._passed += 1
                self._controller.passed()
            else:
                self._used[rung] += 1
                self._controller.made(rung, raw, stored, cpu, wall)

    def used(self) -> CompressionUse:
        """Return what was used so far."""
        with self._lock:
            return CompressionUse(
                setting=compress.AUTO,
                rungs=tuple(self._used[rung] for rung in range(len(compress.LADDER))),
                passed=self._passed,
            )

    def _look(self, now: float) -> None:
        lines: dict[object, Line] = {}
        for destination, meters in self._lines.items():
            held = room = 0
            for meter in meters:
                line = meter.look()
                self._gone[destination] += max(0, line.gone - meter.gone)
                meter.gone = max(meter.gone, line.gone)
                held, room = held + line.held, room + line.room
            lines[destination] = Line(gone=self._gone[destination], held=held, room=room)
        source = sum(self._sources.values()) if self._sources else math.inf
        self._controller.observe(now, lines, spent=self._cpu_time(), idle=self._idle.look(), source=source)

    def _cpu_time(self) -> float | None:
        """Return the CPU seconds that the workers have used; None where that can't be told."""
        for identity, before in list(self._clocks.items()):
            try:
                after = time.clock_gettime(identity)
            except OSError:  # the thread has ended
                del self._clocks[identity]
                continue
            self._spent += max(0.0, after - before)
            self._clocks[identity] = after
        return self._spent if hasattr(time, "pthread_getcpuclockid") else None


class StreamLevels:
    """The rungs of one stream's frames.

    Args:
        leveling: who decides.
        recorded: rungs that an interrupted run has made frames at, by the frame's number, plus one, or 0: they are
            made so again.
        record: told each frame's rung before the frame is made.
    """

    def __init__(
        self,
        leveling: Leveling,
        recorded: bytes | bytearray = b"",
        record: Callable[[int, int], None] = lambda frame, rung: None,
    ) -> None:
        self.leveling = leveling
        self._recorded = recorded
        self._record = record
        self._seconds = self._bytes = 0.0

    def choose(self, frame: int) -> int:
        """Return the rung of a frame."""
        known = self._recorded[frame] if frame < len(self._recorded) else 0
        rung = known - 1 if known else self.leveling.choose()
        self._record(frame, rung)
        return rung

    def read(self, count: int, seconds: float) -> None:
        """Note that the source gave so many bytes in so many seconds; from one thread."""
        self._bytes += (count - self._bytes) * _NEW_BLOCK if self._bytes else count
        self._seconds += (seconds - self._seconds) * _NEW_BLOCK if self._seconds else seconds
        if self._seconds > 0 and self._bytes > 0:
            self.leveling.gave(self, self._bytes / self._seconds)

    def ended(self) -> None:
        """Note that the source has ended."""
        self.leveling.gave(self, None)


class _Meter:
    def __init__(self, look: Callable[[], Line]) -> None:
        self.look = look
        self.gone = 0
