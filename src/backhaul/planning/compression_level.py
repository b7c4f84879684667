"""How much to spend on the next frame: as fast as possible, or dense, as the slowest part of the way asks for.

A stream of S raw bytes a second, cores that make frames at a cost of so many CPU seconds a byte, and lines that
carry L stored bytes a second: what arrives is ``min(S, budget / cost, L / share)`` raw bytes a second, where ``share``
is stored by raw. Each rung of the ladder has another cost and share. The best is a mixture of two rungs that keeps
cores and line busy alike, or the fastest rung where the line is not what everything waits for.

Costs and shares are measured on the frames that are made; a rung that was not tried yet is thought to differ from the
others as it did on the data that the ladder was made with. The line is measured while enough waits for it to keep it
busy. What waits also trims the mixture, frame by frame: errors of the estimates do not add up.

No clock and no threads: whoever makes frames says what happened, and when.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Mapping, Sequence

import msgspec

# The line is measured over as long as it takes for what can wait, within these bounds in seconds: parts leave in
# bursts, several at once and then none, and over less than that a line seems to be half or twice as fast as it is. One
# of which nothing is known is not measured for a while: sockets take a lot at once, which says nothing of it.
_WINDOW, _LONGEST = 1.5, 6.0
_FIRST = 0.8
_SOONEST = 0.2
# What the cores do is averaged over so many seconds, at least.
_CORES_WINDOW = 4.0
# Seconds between two looks at what is idle: so often whoever observes asks the kernel.
IDLE_EVERY = 0.25
# A line of which it is known that what waits lasts for so many seconds does not run dry.
_AHEAD = 0.6
# For so many seconds it may take from what waits while all frames wait for one of a dense rung.
_PATIENCE = 0.1
# Shares of the room: with less than that many seconds' bytes a line may run dry, and with less than the first share
# in any case, but with the second in none (of a line that was not measured yet: with less than the second). So much
# more is aimed at.
_LEAST, _LOW = 0.08, 0.25
_MORE = 0.2
# Weight of a new frame in the estimates of all rungs, which the data moves alike, and how much more in its own rung's
# at least: what a rung costs and saves against the others changes slowly, also where each frame is unlike the last.
_DATA = 0.12
_OWN = 0.03
# Weight of a new frame in averages.
_NEW = 0.2
# So often a frame of another rung than those in use, one that was not seen for so many frames; only if it costs no
# more than so many times as much, or with this share of the cores idle.
_PROBE_EVERY = 12
_PROBE_AGAIN = 60
_PROBE_COST = 2.5
_SPARE = 0.25
# While nothing is known of a line frames cost no more than so many times the least.
_UNKNOWN_COST = 8.0
# A denser rung has to save so much to be worth any CPU time at all.
_WORTH = 0.995
# How much faster than measured a source may be: it is measured while it competes for the same cores.
_SOURCE_MARGIN = 1.15
# Of what the scheduler gives it beside others it may use so much, though nothing is idle.
_SHARE = 0.25
# With a quarter of the cores idle what waits may lead a whole rung further than the estimates.
_IDLE_ALLOWS = 4.0
_GOLDEN = (math.sqrt(5) - 1) / 2
_MOST_CONTENTION = 8.0


class Prior(msgspec.Struct, frozen=True):
    """What a rung costs and saves, against the fastest one: CPU time by its, stored bytes by its."""

    cost: float
    share: float


class Line(msgspec.Struct, frozen=True):
    """The way to one destination.

    Attributes:
        gone: bytes that have left so far, in all.
        held: bytes that wait to leave.
        room: most bytes that can wait before the stream has to. 0 for a destination that is not waited for.
    """

    gone: int
    held: int
    room: int


class _Rung:
    def __init__(self, prior: Prior) -> None:
        self.cost = prior.cost
        self.share = prior.share
        self.frames = 0
        self.seen_at = -_PROBE_AGAIN


class _LineRate:
    """Bytes a second that a line carries, as far as that shows; None until then."""

    def __init__(self) -> None:
        self.rate: float | None = None
        self.fill = 0.0
        self.room = 0
        self._samples: deque[tuple[float, int]] = deque()
        self._busy_since: float | None = None
        self._waits_since = self._dry_since = math.inf

    def observe(self, now: float, line: Line) -> None:
        self.fill = min(1.0, max(0, line.held) / line.room) if line.room > 0 else 0.0
        self.room = max(0, line.room)
        samples = self._samples
        if samples and (now < samples[-1][0] or line.gone < samples[-1][1]):
            samples.clear()  # the clock or the counter went back: begin anew
            self._busy_since = None
            self._waits_since = self._dry_since = math.inf
        if samples and now == samples[-1][0]:
            return
        samples.append((now, line.gone))
        while len(samples) > 2 and samples[1][0] <= now - self._window:
            samples.popleft()
        if self.fill < self.low:
            self._busy_since = None
            self._dry_since = min(self._dry_since, now)
            if now - self._dry_since > _FIRST:
                self._waits_since = math.inf  # what comes after such a pause is a beginning once more
            # (Over less than that it would be what sockets take.)
            measured = self._measured(-math.inf) if now - samples[0][0] >= _WINDOW else None
            if self.rate is not None and measured is not None:
                self.rate = max(self.rate, measured)
            return
        self._dry_since = math.inf
        self._waits_since = min(self._waits_since, now)
        if self._busy_since is None:
            self._busy_since = now
        elif now - self._busy_since >= (_FIRST if self.rate is None else _SOONEST):
            # (Nothing at all is a pause: replies that are waited for, a packet that was lost.)
            self.rate = self._measured(self._busy_since) or self.rate

    @property
    def _window(self) -> float:
        """The seconds over which the line is measured."""
        return min(_LONGEST, max(_WINDOW, self.room / self.rate)) if self.rate else _WINDOW

    @property
    def new(self) -> bool:
        """Whether nothing is known of the line yet, and that is no wonder."""
        return self.rate is None and len(self._samples) > 0 and self._samples[-1][0] - self._waits_since < 2 * _FIRST

    @property
    def low(self) -> float:
        """The share of the room below which the line may run dry."""
        if self.rate is None or not self.room:
            return _LOW
        return min(_LOW, max(_LEAST, self.rate * _AHEAD / self.room))

    def _measured(self, since: float) -> float | None:
        first = next((sample for sample in self._samples if sample[0] >= since), None)
        if first is None:
            return None
        (began, before), (now, gone) = first, self._samples[-1]
        return (gone - before) / (now - began) if now - began >= _SOONEST else None


class LevelController:
    """See the module.

    Args:
        ladder: the rungs, the fastest one first; each next one costs more.
        workers: how many frames are made at once.
        frame: raw bytes of one.
        window: most frames between the source and the lines, those that wait for a slow one included.
        reserve: how many times faster than the line the cores have to stay. 1 to spend all that is idle; more for a
            stream that may have to be made once more.
    """

    def __init__(self, ladder: Sequence[Prior], workers: int, *, frame: int, window: int, reserve: float = 1.0) -> None:
        self._frame = frame
        self._window = max(1, window)
        self._rungs = [_Rung(prior) for prior in ladder]
        self._workers = max(1, workers)
        self._reserve = max(1.0, reserve)
        self._lines: dict[object, _LineRate] = {}
        self._contention = 1.0
        self._passed = 0.0
        self._frames = 0
        self._source = math.inf
        self._cores: deque[tuple[float, float, float]] = deque()
        self._phase = 0.0
        self._chosen = 0

    # -- what happened -----------------------------------------------------------------------------------

    def made(self, rung: int, raw: int, stored: int, cpu: float, wall: float) -> None:
        """Note a frame.

        Args:
            rung: which one it was made at.
            raw: its bytes.
            stored: what became of them.
            cpu: seconds of CPU time that it took, of its own thread.
            wall: seconds from its beginning to its end.
        """
        if not (0 <= rung < len(self._rungs) and raw > 0 and stored > 0 and 0 < cpu < math.inf):
            return
        self._passed *= 1 - _NEW
        if wall < math.inf:
            contention = min(_MOST_CONTENTION, max(1.0, wall / cpu))
            self._contention += (contention - self._contention) * _NEW
        own = self._rungs[rung]
        cost, share = cpu / raw, stored / raw
        by_cost, by_share = cost / own.cost, share / own.share
        # The first frames count as much as each other.
        data = max(_DATA, 1.0 / (self._frames + 1))
        alone = (1.0 - data) * max(_OWN, 0.5 / (own.frames + 1))
        for each in self._rungs:
            weight = data + alone if each is own else data
            each.cost *= by_cost**weight
            each.share = min(1.01, each.share * by_share**weight)
        self._frames += 1
        own.frames += 1
        own.seen_at = self._chosen

    def passed(self) -> None:
        """Note a frame of data that did not compress, and was passed on as it was."""
        self._passed += (1 - self._passed) * _NEW

    def observe(
        self,
        now: float,
        lines: Mapping[object, Line],
        *,
        spent: float | None = None,
        idle: float | None = None,
        source: float = math.inf,
    ) -> None:
        """Note how things stand.

        Args:
            now: monotonic seconds.
            lines: the way to each destination.
            spent: CPU seconds that making frames has taken so far.
            idle: core seconds of this host that nobody has used so far; None if that is not known.
            source: raw bytes a second that the source gives when it is asked.
        """
        for gone in self._lines.keys() - lines.keys():
            del self._lines[gone]
        for key, line in lines.items():
            self._lines.setdefault(key, _LineRate()).observe(now, line)
        self._source = source * _SOURCE_MARGIN if source > 0 else math.inf
        cores = self._cores
        if spent is None or idle is None:
            cores.clear()
            return
        if cores and idle == cores[-1][2] and now - cores[-1][0] < IDLE_EVERY:
            return  # what is idle was not looked at again: both have to be of the same time
        if cores and (now <= cores[-1][0] or spent < cores[-1][1] or idle < cores[-1][2]):
            cores.clear()
        cores.append((now, spent, idle))
        while len(cores) > 2 and cores[1][0] <= now - _CORES_WINDOW:
            cores.popleft()

    # -- what follows ------------------------------------------------------------------------------------

    def next(self) -> int:
        """Return the rung for the next frame."""
        self._chosen += 1
        known = [line for line in self._lines.values() if line.rate is not None or line.new]
        fuller = max(known, key=lambda line: line.fill - line.low, default=None)
        if fuller is None or fuller.fill < fuller.low:
            return 0
        rungs, position, most = self._plan()
        fill, aim = fuller.fill, fuller.low + _MORE
        if not fuller.new:
            position = min(position + (fill - aim) / (1 - aim), max(position, most + self._allowance()))
        self._phase = (self._phase + _GOLDEN) % 1.0
        place = min(len(rungs) - 1, max(0, math.floor(position + self._phase)))
        return self._probe(rungs[place]) if fill >= aim else rungs[place]

    @property
    def budget(self) -> float:
        """Cores that making frames may keep busy: what it uses now, and what nobody does; some of its share at least.

        Without a share of its own it would use less and less beside others that take all they get.
        """
        most = self._workers / self._contention
        used = self._of_late()
        return most if used is None else max(_SHARE * most, min(most, sum(used)))

    def _of_late(self) -> tuple[float, float] | None:
        """Return the cores that making frames has used, and those that nobody has, over the same time; None if unknown.

        Room comes in bursts, when several parts have arrived at once: over less than the time between two of them
        everything looks busy, or idle.
        """
        if len(self._cores) < 2:
            return None
        (began, spent_before, idle_before), (now, spent, idle) = self._cores[0], self._cores[-1]
        if now - began < _SOONEST:
            return None
        return (spent - spent_before) / (now - began), (idle - idle_before) / (now - began)

    def _allowance(self) -> float:
        """Return how far what waits may lead beyond what the cores can do by all estimates: while some are idle."""
        if self._reserve > 1:
            return 0.0
        used = self._of_late()
        return 1.0 if used is None else min(1.0, _IDLE_ALLOWS * used[1] / self._workers)

    def _plan(self) -> tuple[list[int], float, float]:
        """Return the rungs worth using, from fast to dense, the best place between them, and the last one that the
        cores can do.
        """
        rungs = self._frontier()
        measured = self._measured_lines()
        if not measured:
            # Something waits, and nothing is known yet: not as fast as possible, and not slowly.
            return [rung for rung in rungs[:2] if self._cost(rung) <= _UNKNOWN_COST * self._cost(0)], 1.0, 1.0
        slowest = min(measured, key=lambda line: line.rate or 0.0)
        rate = max(1.0, slowest.rate or 0.0)
        rungs = [rung for rung in rungs if rung == 0 or self._stall(rung, rate) <= _PATIENCE * rate]
        by_cores = self._crossing(rungs, rate, self.budget / self._reserve, math.inf)
        by_source = self._crossing(rungs, rate, math.inf, self._source)
        return rungs, min(by_cores, by_source), by_cores

    def _measured_lines(self) -> list[_LineRate]:
        """Return the lines that are busy, and whose rate is known."""
        return [line for line in self._lines.values() if line.fill >= line.low and line.rate is not None]

    def _crossing(self, rungs: list[int], rate: float, budget: float, source: float) -> float:
        """Return the place from which on the line is not the slowest: the cores are, or the source is."""
        for place, (fast, dense) in enumerate(itertools.pairwise(rungs)):
            cost, share = self._cost(fast), self._share(fast)
            if min(source, budget / cost) * share <= rate:
                return float(place)
            more, less = max(1e-15, self._cost(dense) - cost), max(1e-9, share - self._share(dense))
            if source < math.inf:
                part = (share - rate / source) / less
            elif budget < math.inf:
                part = (budget * share - rate * cost) / (rate * more + budget * less)
            else:
                continue
            if part < 1.0:
                return place + max(0.0, part)
        return float(len(rungs) - 1)

    def _stall(self, rung: int, rate: float) -> float:
        """Return how many bytes the line takes while all the others have to wait for one frame of that rung."""
        seconds = self._rungs[rung].cost * self._frame * self._contention
        return seconds * rate - (self._window - 1) * self._frame * self._share(rung)

    def _cost(self, rung: int) -> float:
        return max(1e-15, (1 - self._passed) * self._rungs[rung].cost)

    def _share(self, rung: int) -> float:
        return self._passed + (1 - self._passed) * self._rungs[rung].share

    def _frontier(self) -> list[int]:
        """Return the rungs that no mixture of others beats: the lower convex hull from the fastest one on."""
        hull = [0]
        for rung in range(1, len(self._rungs)):
            one = self._rungs[rung]
            while len(hull) > 1 and self._rungs[hull[-1]].cost >= one.cost and self._rungs[hull[-1]].share >= one.share:
                hull.pop()
            last = self._rungs[hull[-1]]
            if one.share > last.share * _WORTH or one.cost <= last.cost:
                continue
            while len(hull) > 1 and self._slope(hull[-2], hull[-1]) <= self._slope(hull[-2], rung):
                hull.pop()
            hull.append(rung)
        return hull

    def _slope(self, fast: int, dense: int) -> float:
        """Bytes saved for each CPU second, from one rung to a denser one."""
        a, b = self._rungs[fast], self._rungs[dense]
        return (a.share - b.share) / max(1e-18, b.cost - a.cost)

    def _probe(self, rung: int) -> int:
        """Return the rung, or now and then another that was not seen for long, while there is time for it.

        Data differs: what a rung saves on it is known for certain only of the rungs in use.
        """
        if self._chosen % _PROBE_EVERY:
            return rung
        rate = max((line.rate or 0.0 for line in self._measured_lines()), default=math.inf)
        used = self._of_late()
        spare = used is None or used[1] >= _SPARE * self._workers
        dearest = math.inf if spare and self._reserve == 1 else _PROBE_COST * self._rungs[rung].cost
        others = [
            other
            for other in range(1, len(self._rungs))
            if other != rung
            and self._rungs[other].cost <= dearest
            and self._chosen - self._rungs[other].seen_at > _PROBE_AGAIN
            and self._stall(other, rate) <= 0
        ]
        return min(others, key=lambda other: self._rungs[other].seen_at, default=rung)
