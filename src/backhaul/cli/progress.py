"""Progress: bars on a terminal, else a line a minute. Reads the operations' counters, five times a second."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from backhaul.cli.output import console
from backhaul.formats.quantities import format_duration, format_size
from backhaul.model.fan_out import COMPLETE, DROPPED, FAILED, LOST
from backhaul.operations.progress import (
    DestinationProgress,
    MirrorProgress,
    PullProgress,
    PushProgress,
    TableProgress,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

LINE_EVERY = 60.0
_REFRESH = 0.2
_RATE_WINDOW = 10.0
_SETTLED = 5.0

ErrorLine = Callable[[bytes], None]


class Rate:
    """Bytes a second over the last ten seconds."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque()

    def update(self, now: float, total: int) -> float:
        """Take a counter's reading and return the rate."""
        self._points.append((now, total))
        while now - self._points[0][0] > _RATE_WINDOW and len(self._points) > 2:
            self._points.popleft()
        first_time, first_total = self._points[0]
        return (total - first_total) / (now - first_time) if now > first_time else 0.0


class _PushView:
    def __init__(self, progress: PushProgress) -> None:
        self._progress = progress
        self._rate_in = Rate()
        self._rates: dict[str, Rate] = {}
        self._start = time.monotonic()

    def amounts(self) -> tuple[int, int]:
        return self._progress.raw, 0

    def line(self) -> str:
        now = time.monotonic()
        p = self._progress
        ratio = p.raw / p.stored if p.stored else 1.0
        rate = self._rate_in.update(now, p.raw)
        parts = [
            f"{format_size(p.raw)} in, {format_size(p.stored)} out, ratio {ratio:.2f}, {format_size(rate)}/s"
            f" in {format_duration(now - self._start)}"
        ]
        parts += _tables(p.tables)
        for destination in p.destinations:
            sent = self._rates.setdefault(destination.series, Rate()).update(now, destination.sent)
            parts.append(
                f"{destination.series}: {destination.state}, {format_size(destination.sent)} sent,"
                f" {format_size(sent)}/s{_besides(destination)}"
            )
        parts += [f"{name}: {state}{f', {behind}' if behind else ''}" for name, state, behind in p.receivers]
        return "; ".join(parts)

    def render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now = time.monotonic()
        p = self._progress
        ratio = f"{p.raw / p.stored:.2f}" if p.stored else "-"
        summary = Text(
            f"in {format_size(p.raw)} at {format_size(self._rate_in.update(now, p.raw))}/s, ratio {ratio}, "
            f"{format_duration(now - self._start)}",
            no_wrap=True,
        )
        if tables := _tables(p.tables):
            summary.append(f"\n{tables[0]}", "dim")
        table = Table.grid(padding=(0, 1))
        for _ in range(4):
            table.add_column(no_wrap=True)
        for destination in p.destinations:
            rate = self._rates.setdefault(destination.series, Rate()).update(now, destination.sent)
            done = destination.state in ("committed", "failed")
            style = {"committed": "green", "failed": "red"}.get(destination.state, "")
            bar = ProgressBar(
                total=1 if done else None, completed=1 if done else 0, width=10, pulse=not done, animation_time=now
            )
            table.add_row(
                bar,
                Text(_shortened(destination.series), style="bold"),
                f"out {format_size(destination.sent)} at {format_size(rate)}/s{_besides(destination)}",
                Text(destination.state, style=style),
            )
        for name, state, behind in p.receivers:
            done = state in (COMPLETE, FAILED, LOST, DROPPED)
            style = {COMPLETE: "green", FAILED: "red", LOST: "red", DROPPED: "red"}.get(state, "")
            bar = ProgressBar(
                total=1 if done else None, completed=1 if done else 0, width=10, pulse=not done, animation_time=now
            )
            table.add_row(bar, Text(_shortened(name), style="bold"), behind, Text(state, style=style))
        return Group(summary, table)


class _PullView:
    def __init__(self, progress: PullProgress, verb: str) -> None:
        self._progress = progress
        self._verb = verb
        self._rate = Rate()
        self._start = time.monotonic()

    def amounts(self) -> tuple[int, int]:
        return self._progress.raw, self._progress.total

    def line(self) -> str:
        now = time.monotonic()
        p = self._progress
        share = f" of {format_size(p.total)} ({p.raw / p.total:.0%})" if p.total else ""
        return (
            f"{self._verb} {format_size(p.raw)}{share}, {format_size(self._rate.update(now, p.raw))}/s"
            f" in {format_duration(now - self._start)}" + "".join(f"; {text}" for text in _tables(p.tables))
        )

    def render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now = time.monotonic()
        p = self._progress
        rate = self._rate.update(now, p.raw)
        settled = now - self._start > _SETTLED  # before that it would be days, or nothing
        left = format_duration((p.total - p.raw) / rate) + " left" if settled and rate > 0 and p.total else ""
        table = Table.grid(padding=(0, 1))
        table.add_row(
            ProgressBar(total=p.total or None, completed=p.raw, width=30, pulse=not p.total, animation_time=now),
            f"{format_size(p.raw)} of {format_size(p.total)}" if p.total else format_size(p.raw),
            f"fetched {format_size(p.stored)}" if p.stored else "",
            f"{format_size(rate)}/s",
            left,
        )
        tables = _tables(p.tables)
        return Group(table, Text(tables[0], "dim", no_wrap=True)) if tables else table


@contextmanager
def push_progress(progress: PushProgress, *, quiet: bool) -> Iterator[ErrorLine]:
    """Show a push; yields where the producer's stderr lines go, so that they don't tear the bars."""
    with _shown(_PushView(progress), quiet=quiet) as on_error_line:
        yield on_error_line


class _MirrorView:
    def __init__(self, progress: MirrorProgress) -> None:
        self._progress = progress
        self._rate = Rate()
        self._start = time.monotonic()

    def amounts(self) -> tuple[int, int]:
        return self._progress.sent, self._progress.total

    def line(self) -> str:
        now = time.monotonic()
        p = self._progress
        took = format_duration(now - self._start)
        if not p.total:
            return f"{p.phase}, {took}"
        rate = self._rate.update(now, p.sent)
        left = f", {format_duration((p.total - p.sent) / rate)} left" if rate > 0 else ""
        sent = f"{format_size(p.sent)} of {format_size(p.total)}"
        return f"{p.phase} {p.done} of {p.files} files, {sent}, {format_size(rate)}/s{left or ', ' + took}"

    def render(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table.grid(padding=(0, 1))
        p = self._progress
        bar = ProgressBar(
            total=p.total or None, completed=p.sent, width=12, pulse=not p.total, animation_time=time.monotonic()
        )
        table.add_row(bar, self.line())
        return table


@contextmanager
def mirror_progress(progress: MirrorProgress, *, quiet: bool) -> Iterator[None]:
    """Show a mirror run."""
    with _shown(_MirrorView(progress), quiet=quiet):
        yield


@contextmanager
def pull_progress(progress: PullProgress, verb: str, *, quiet: bool) -> Iterator[ErrorLine]:
    """Show a pull or a deep verify; yields where the consumer's stderr lines go."""
    with _shown(_PullView(progress, verb), quiet=quiet) as on_error_line:
        yield on_error_line


@contextmanager
def _shown(view: _PushView | _PullView | _MirrorView, *, quiet: bool) -> Iterator[ErrorLine]:
    from backhaul.operations.handover import reporting

    with reporting(view.amounts), _on_terminal(view, quiet=quiet) as on_error_line:
        yield on_error_line


@contextmanager
def _on_terminal(view: _PushView | _PullView | _MirrorView, *, quiet: bool) -> Iterator[ErrorLine]:
    stop = threading.Event()
    if quiet:
        yield _plain_line
        return
    if sys.stderr.isatty():
        from rich.live import Live
        from rich.text import Text

        out = console()
        with Live(
            console=out, get_renderable=view.render, refresh_per_second=1 / _REFRESH, redirect_stderr=False
        ) as live:
            try:
                yield lambda line: out.print(Text(line.decode(errors="replace")))
            except BaseException:
                live.transient = True  # no bars of what failed above the error
                raise
        return

    def lines() -> None:
        while not stop.wait(LINE_EVERY):
            print(f"backhaul: {view.line()}", file=sys.stderr, flush=True)  # noqa: T201

    thread = threading.Thread(target=lines, name="backhaul-progress", daemon=True)
    thread.start()
    try:
        yield _plain_line
    finally:
        stop.set()
        thread.join()


def _tables(progress: TableProgress) -> list[str]:
    """Say what goes on, and which table of how many was begun last; nothing where there are none."""
    parts = [progress.phase] if progress.phase else []
    if progress.begun:
        of = f" of {progress.total}" if progress.total >= progress.begun else ""
        parts.append(f"table {progress.begun}{of}: {progress.latest}")
    return [", ".join(parts)] if parts else []


def _besides(destination: DestinationProgress) -> str:
    """Say what was there before, and what waits on the disk."""
    there = f", {format_size(destination.reused)} were there" if destination.reused else ""
    return there + (f", {format_size(destination.spooled)} in the spool" if destination.spooled else "")


def _plain_line(line: bytes) -> None:
    os.write(2, line + b"\n")


def _shortened(series: str, width: int = 30) -> str:
    return series if len(series) <= width else "…" + series[-width + 1 :]
