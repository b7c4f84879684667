"""A push in miniature: a source, workers, a line that sends whole parts; frames cost and save what recorded ones did.

Time goes in steps. What is left out: hashing, the other threads, the way back of acknowledgements.
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
ROOM = 56 << 20
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
    room: int = ROOM,
    part: int = PART,
    noise: float = 0.0,
    swallow: int = 1 << 20,
    idle_known: bool = True,
    until: float = math.inf,
) -> Outcome:
    """Push a stream; ``line`` and ``source`` are bytes a second, ``swallow`` what sockets take at once.

    It ends with the last byte, or at ``until``.
    """
    controller = rung if isinstance(rung, LevelController) else None
    rng = random.Random(1)
    cores = float(workers) if cores is None else cores
    window = 2 * workers + 1
    now = since_tick = spent = 0.0
    finished: list[float] = []
    drawn = taken = next_out = put = gone = 0
    read = fractional = 0.0
    todo: list[tuple[int, Frame]] = []
    running: dict[int, list[float]] = {}  # number: seconds of work left, all of it, begun, rung, stored
    done: dict[int, int] = {}
    used: Counter[int] = Counter()
    chosen: dict[int, int] = {}
    begun: dict[int, float] = {}
    idle_average = 0.0
    current = next(stream, None)
    while now < until and (current is not None or todo or running or done or gone < put):
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
        idle_average += (max(0.0, cores - busy / _STEP) - idle_average) * (_STEP / 0.5)
        # the assembly
        while next_out in done and (put == gone or put - gone + done[next_out] <= room):
            put += done.pop(next_out)
            next_out += 1
            taken += 1
        # the line: whole parts until the end
        ended = current is None and not todo and not running and not done
        ready = put if ended else put // part * part
        fractional = min(fractional + rate * _STEP, max(float(ready - gone), rate * _STEP))
        if gone == 0 and ready:
            fractional += swallow
        leave = min(ready - gone, int(fractional) if fractional < 1e18 else ready)
        gone += leave
        fractional = 0.0 if math.isinf(fractional) else fractional - leave
        since_tick += _STEP
        if controller is not None and since_tick >= _TICK:
            since_tick = 0.0
            controller.observe(
                now,
                {"line": Line(gone=gone, held=put - gone, room=room)},
                spent=spent,
                idle=idle_average if idle_known else None,
                source=source,
            )
        assert now < 10_000, "it never ends"
    order = [chosen[number] for number in sorted(chosen)]
    return Outcome(now, spent, used, order, [begun[number] for number in sorted(begun)])
