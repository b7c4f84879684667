"""Push over lines of many rates: ``--compress auto`` against every fixed level that might be the best one there.

The line is a sink that takes no more than so many bytes a second over all connections; what sockets hold before that is
kept small. It runs in the same machine, and takes next to no time of its cores. A source of dump text is read from the
page cache by ``cat``, so that neither is what everything waits for.

    python -m bench.uplink SINK_PORT RATE [SECONDS RATE]...     (0 is no limit; what the benchmark itself starts)
"""

from __future__ import annotations

import contextlib
import functools
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from backhaul.formats.quantities import format_size
from backhaul.testing.servers import free_ports
from bench import data, null_s3
from bench.results import Comparison, Line, Results, Run
from bench.runs import Measure, alternate, machine, measured, today, versions
from bench.stores import BACKHAUL, BUCKET, s3_environment, serving

AUTO = "backhaul"
# Levels that were the best one, or next to it, on some machine, by the line's rate; 0 is no limit.
LEVELS: dict[int, tuple[int, ...]] = {
    10_000_000: (1, 6, 8, 9, 10, 12),
    25_000_000: (1, 6, 7, 8, 9),
    100_000_000: (1, 2, 3, 5),
    0: (1, 2, 3),
}
# The same of a web server's log, of which denser levels save more: seconds at level 1, and the levels. (Backups over
# slow lines take long: the seconds in which a line is learnt should be few of them.)
LOG_LEVELS: dict[int, tuple[float, tuple[int, ...]]] = {
    10_000_000: (40.0, (1, 6, 8, 9, 10)),
    25_000_000: (15.0, (1, 3, 5, 6)),
}
# A line that is ten times as fast from so many seconds on.
CHANGE = (10_000_000, 10, 100_000_000)
_CHANGE_LEVELS = (1, 6, 8)
# A run of dump text takes about so many seconds at level 1, where the size does not end it sooner.
_SECONDS = 15.0
_RATIO = 4.3
_LOG_RATIO = 10.9
_RECEIVE_BUFFER = 128 << 10
_PIECE = 64 << 10
_COLUMNS = ["wall", "from - to", "CPU", "rate", "peak memory", "time against ours"]


class Throttle:
    """Lets so many bytes a second through, over all threads. The time begins with the first byte."""

    def __init__(self, rates: list[tuple[float, float]]) -> None:
        self._rates = rates
        self._lock = threading.Lock()
        self._began: float | None = None
        self._free_at = 0.0

    def take(self, count: int) -> None:
        """Wait until so many bytes are due."""
        with self._lock:
            now = time.monotonic()
            if self._began is None:
                self._began = now
            rate = next(rate for since, rate in reversed(self._rates) if now - self._began >= since)
            if not rate:
                return
            self._free_at = max(now - 0.005, self._free_at) + count / rate
            wait = self._free_at - now
        if wait > 0:
            time.sleep(wait)


class Handler(null_s3.Handler):
    """A connection of the sink, with bodies that come no faster than the line lets them."""

    throttle: Throttle

    def skip_paced(self, length: int) -> None:
        """Throw away that many bytes, as they are due."""
        while length:
            piece = min(length, _PIECE)
            self.throttle.take(piece)
            super().move(piece, None)
            length -= piece

    def move(self, length: int, file: object) -> None:
        """See ``null_s3``; nothing is kept here."""
        self.skip_paced(length)


def serve(port: int, rates: list[tuple[float, float]]) -> None:
    """Serve until killed."""
    Handler.throttle = Throttle(rates)
    with null_s3.Server(("127.0.0.1", port), Handler, bind_and_activate=False) as server:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        server.server_bind()
        server.server_activate()
        server.serve_forever()


@contextlib.contextmanager
def line(*rates: float) -> Iterator[str]:
    """Run the sink behind a line: a rate, and then seconds and the rate from there on, as often as it changes."""
    port = free_ports(1)[0]
    command = [sys.executable, "-m", "bench.uplink", str(port), *map(str, rates)]
    with serving(command, port) as endpoint:
        yield endpoint


def pushed(text: Path, size: int, setting: str, rates: tuple[float, ...]) -> Run:
    """Measure one push of the file's first ``size`` bytes."""
    with line(*rates) as endpoint:
        command = f"head -c {size} {text} | {BACKHAUL} push -q s3://{BUCKET}/uplink --compress {setting}"
        return measured(command, s3_environment(endpoint))


def compared(text: Path, size: int, levels: tuple[int, ...], rates: tuple[float, ...], rounds: int) -> list[Line]:
    """Measure auto and every level over one line."""
    ways: dict[str, Measure] = {AUTO: functools.partial(pushed, text, size, "auto", rates)}
    for level in levels:
        ways[f"backhaul, level {level}"] = functools.partial(pushed, text, size, str(level), rates)
    lines = alternate(ways, rounds)
    for each in lines:
        each.size = size
    return lines


def uplink(directory: Path, size: int, rounds: int, only: tuple[int, ...] | None = None) -> Results:
    """Measure pushes over each line, of at most ``size`` bytes of text and five times as much of a log.

    ``only`` names rates, -1 the one that changes.
    """
    text = data.text(directory / "text", size)
    comparisons = []
    for rate, levels in LEVELS.items():
        if only is not None and rate not in only:
            continue
        payload = min(size, int(rate * _SECONDS * _RATIO) or size)
        name = f"{format_size(rate)}/s" if rate else "no limit"
        print(f"push over a line of {name}", file=sys.stderr)
        title = f"Push of {format_size(payload)} of dump text over a line of {name}"
        found = compared(text, payload, levels, (float(rate),), rounds)
        comparisons.append(Comparison(f"{rate // 1_000_000}", title, _COLUMNS, found, shows="wall"))
    for rate, (seconds, levels) in LOG_LEVELS.items():
        if only is not None and rate not in only:
            continue
        payload = min(5 * size, int(rate * seconds * _LOG_RATIO))
        name = f"{format_size(rate)}/s"
        print(f"push of a log over a line of {name}", file=sys.stderr)
        title = f"Push of {format_size(payload)} of a web server's log over a line of {name}"
        logs = data.log(directory / "log", payload)
        found = compared(logs, payload, levels, (float(rate),), rounds)
        comparisons.append(Comparison(f"log-{rate // 1_000_000}", title, _COLUMNS, found, shows="wall"))
        logs.unlink()
    if only is None or -1 in only:
        before, seconds, after = CHANGE
        payload = min(size, int((before * seconds + after * 5) * _RATIO))
        words = f"{format_size(before)}/s for {seconds} s, and {format_size(after)}/s from then on"
        print(f"push over a line of {words}", file=sys.stderr)
        title = f"Push of {format_size(payload)} of dump text over a line of {words}"
        found = compared(text, payload, _CHANGE_LEVELS, CHANGE, rounds)
        comparisons.append(Comparison("change", title, _COLUMNS, found, shows="wall"))
    return Results(
        area="uplink",
        date=today(),
        machine=machine(),
        conditions=f"text and a log to a sink behind a line of limited rate, medians of {rounds} rounds, alternating",
        comparisons=comparisons,
        versions=versions(),
    )


if __name__ == "__main__":
    numbers = [float(word) for word in sys.argv[2:]]
    serve(int(sys.argv[1]), [(0.0, numbers[0]), *zip(numbers[1::2], numbers[2::2], strict=True)])
