"""A push in miniature: a source, workers, parts that share a line; frames cost and save what recorded ones did.

Time goes in steps. Parts keep their memory until their last byte has arrived, and those that leave together arrive
together: room comes in bursts, and so do frames. Sockets take bytes before the line does. What is left out: hashing, the
other threads, the way back of acknowledgements.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from backhaul.planning.compression_level import LevelController, Line
from backhaul.transforms import compress

FRAME = compress.FRAME_SIZE
PART = 8 << 20
PARTS = 4
QUEUE = 16 << 20
ROOM = QUEUE + (PARTS + 1) * PART
# What a connection's sockets hold.
SOCKETS = 3 << 20
# CPU seconds and stored bytes of each rung for four frames of each kind of data, and of level 1.
TRACES = json.loads((Path(__file__).parent / "compression_traces.json").read_text())
KINDS = sorted(TRACES)
_STEP = 0.004
_TICK = 0.05


class Frame(msgspec.Struct, frozen=True):
    """What one frame would cost at each rung, and be stored as. One rung: data that is passed on as it is."""

    rungs: tuple[tuple[float, int], ...]


def frames(kind: str, raw: int) -> Iterator[Frame]:
    """Yield frames of one kind, as many as hold ``raw`` bytes."""
    table = TRACES[kind]["rungs"]
    made = [Frame(tuple((cpu, size) for cpu, size in column)) for column in zip(*table, strict=True)]
    yield from itertools.islice(itertools.cycle(made), math.ceil(raw / FRAME))


def at_level_one(kind: str, raw: int) -> Iterator[Frame]:
    """Yield the frames that level 1 makes."""
    made = [Frame(((cpu, size),)) for cpu, size in TRACES[kind]["level 1"]]
    yield from itertools.islice(itertools.cycle(made), math.ceil(raw / FRAME))


def incompressible(raw: int) -> Iterator[Frame]:
    """Yield frames that are passed on."""
    yield from itertools.repeat(Frame(((0.0015, FRAME + 100),)), math.ceil(raw / FRAME))


class _Part(msgspec.Struct):
    """Bytes that the sockets have not taken yet, and bytes that have not arrived."""

    unsent: int
    due: float


class _Uplink:
    """A queue, a part that fills, and parts under way that share a line."""

    def __init__(self, sockets: int) -> None:
        self._sockets = sockets
        self._queued = 0
        self._filled = 0
        self._parts: list[_Part] = []
        self.gone = 0

    @property
    def held(self) -> int:
        return self._queued + self._filled + sum(part.unsent for part in self._parts)

    @property
    def empty(self) -> bool:
        return not self._queued and not self._filled and not self._parts

    def put(self, size: int) -> bool:
        """Take a frame, if there is room in the queue."""
        if self._queued and self._queued + size > QUEUE:
            return False
        self._queued += size
        return True

    def step(self, share: float, *, ended: bool) -> None:
        """Let a line carry so many bytes; after the end of the stream the last part is a short one."""
        while True:
            moved = min(self._queued, PART - self._filled)
            self._queued -= moved
            self._filled += moved
            whole = self._filled == PART or (ended and self._filled and not self._queued)
            if not whole or len(self._parts) == PARTS:
                break
            self._parts.append(_Part(self._filled, self._filled))
            self._filled = 0
            if math.isinf(share):
                self._carry(share)
        self._carry(share)

    def _carry(self, share: float) -> None:
        for part in self._parts:
            part.due = 0.0 if math.isinf(share) else part.due - share / len(self._parts)
            taken = min(part.unsent, max(0, part.unsent - max(0, math.ceil(part.due) - self._sockets)))
            part.unsent -= taken
            self.gone += taken
        self._parts = [part for part in self._parts if part.due > 0]


class Outcome(msgspec.Struct):
    """How long it took, the CPU seconds of compression, frames by rung, and each frame's rung in order."""

    seconds: float
    cpu: float
    used: Counter[int]
    order: list[int]
    begun: list[float]


def simulate(
    stream: Iterator[Frame],
    rung: Callable[[], int] | LevelController,
    *,
    workers: int = 2,
    line: float | Callable[[float], float] = math.inf,
    source: float = 2e9,
    cores: float | None = None,
    noise: float = 0.0,
    sockets: int = SOCKETS,
    idle_known: bool = True,
    until: float = math.inf,
) -> Outcome:
    """Push a stream; ``line`` and ``source`` are bytes a second, ``sockets`` what those of a connection hold.

    It ends with the last byte, or at ``until``.
    """
    controller = rung if isinstance(rung, LevelController) else None
    rng = random.Random(1)
    cores = float(workers) if cores is None else cores
    window = 2 * workers + 1
    now = spent = idle = looked = 0.0
    finished: list[float] = []
    drawn = taken = next_out = 0
    read = 0.0
    uplink = _Uplink(sockets)
    todo: list[tuple[int, Frame]] = []
    running: dict[int, list[float]] = {}  # number: seconds of work left, all of it, begun, rung, stored
    done: dict[int, int] = {}
    used: Counter[int] = Counter()
    chosen: dict[int, int] = {}
    begun: dict[int, float] = {}
    current = next(stream, None)
    while now < until and (current is not None or todo or running or done or not uplink.empty):
        now += _STEP
        rate = line(now) if callable(line) else line
        # the source
        if current is not None and drawn - taken < window:
            read += source * _STEP
            while current is not None and read >= FRAME and drawn - taken < window:
                read -= FRAME
                todo.append((drawn, current))
                drawn += 1
                current = next(stream, None)
        read = min(read, FRAME)
        # the workers: as many as there are cores at full speed
        credits = finished
        finished = []
        while todo and len(running) < workers:
            number, frame = todo.pop(0)
            if len(frame.rungs) == 1:
                choice, (cpu, stored) = -1, frame.rungs[0]
            else:
                if controller is not None and now - looked >= _TICK:
                    looked = now
                    controller.observe(
                        now,
                        {"line": Line(gone=uplink.gone, held=uplink.held, room=ROOM)},
                        spent=spent,
                        idle=idle if idle_known else None,
                        source=source,
                    )
                choice = controller.next() if controller is not None else rung()  # type: ignore[operator]
                cpu, stored = frame.rungs[choice]
            cpu *= 1 + noise * rng.uniform(-1, 1)
            used[choice] += 1
            chosen[number], begun[number] = choice, now
            # What was left of the step when the former frame was done goes to this one.
            head = credits.pop() if credits else 0.0
            running[number] = [cpu - head, cpu, now - head, choice, stored]
        speed = min(1.0, cores / len(running)) if running else 1.0
        busy = 0.0
        for number in list(running):
            work = running[number]
            took = min(work[0], _STEP * speed)
            work[0] -= took
            spent += took
            busy += took
            if work[0] <= 1e-9:
                del running[number]
                finished.append(_STEP - took / speed if speed else 0.0)
                done[number] = int(work[4])
                if controller is not None:
                    if work[3] < 0:
                        controller.passed()
                    else:
                        wall = max(work[1], now - work[2])
                        controller.made(int(work[3]), FRAME, int(work[4]), work[1], wall)
        idle += max(0.0, cores * _STEP - busy)
        # the assembly
        while next_out in done and uplink.put(done[next_out]):
            del done[next_out]
            next_out += 1
            taken += 1
        uplink.step(rate * _STEP, ended=current is None and not todo and not running and not done)
        assert now < 10_000, "it never ends"
    order = [chosen[number] for number in sorted(chosen)]
    return Outcome(now, spent, used, order, [begun[number] for number in sorted(begun)])
