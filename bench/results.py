"""What a benchmark found, as data: docs/benchmarks/AREA.json, from which tables and plots are made."""

from __future__ import annotations

import statistics
from pathlib import Path

import msgspec


class Run(msgspec.Struct, frozen=True, omit_defaults=True):
    """One measured run: seconds and bytes. What was not looked at, or could not be told, is None.

    ``cpu`` is user and system time of the way's own processes, ``machine`` that of the whole machine meanwhile.
    ``memory`` is the peak of the largest process, ``sent`` what left the sender, ``staged`` the most that lay on disk.
    """

    wall: float
    cpu: float
    memory: int | None = None
    sent: int | None = None
    machine: float | None = None
    staged: int | None = None


class Line(msgspec.Struct, omit_defaults=True):
    """One way in a comparison: its good runs, and what went wrong in the others."""

    name: str
    runs: list[Run] = []
    failure: str = ""  # the last failure's first line
    failed: int = 0
    limit: bool = False  # not a way to do the whole, but what bounds all ways
    size: int | None = None  # bytes of payload
    stored: int | None = None  # bytes in the store
    receivers: int | None = None
    base: str = ""  # with which this one is compared, if not with the comparison's

    @property
    def label(self) -> str:
        """The name, and to how many receivers."""
        return f"{self.name} to {self.receivers}" if self.receivers else self.name

    @property
    def wall(self) -> float:
        """The median, in seconds."""
        return statistics.median(run.wall for run in self.runs)

    @property
    def rates(self) -> list[float]:
        """Payload bytes a second, of each run."""
        return [(self.size or 0) / run.wall for run in self.runs]

    @property
    def rate(self) -> float:
        """Payload bytes a second, of the median run."""
        return (self.size or 0) / self.wall

    @property
    def sent(self) -> list[int]:
        """Bytes that left the sender, of each run."""
        return [run.sent or 0 for run in self.runs]

    def median(self, figure: str) -> float | None:
        """Return the median of one figure of the runs that have it."""
        found = [value for run in self.runs if (value := getattr(run, figure)) is not None]
        return statistics.median(found) if found else None


class Comparison(msgspec.Struct, omit_defaults=True):
    """Ways to do the same, measured in the same run: one table, and one plot unless ``plot`` is off.

    ``columns`` are names of ``bench.report.COLUMNS``; ``base`` is the way that the others are compared with. ``shows``
    is what the plot is about: ``rate``, ``wall`` or ``sent``.
    """

    name: str  # of the plot's file
    title: str
    columns: list[str]
    lines: list[Line]
    base: str = "backhaul"
    note: str = ""
    plot: bool = True
    shows: str = "rate"

    def line(self, name: str) -> Line | None:
        """Return the way of that name that has runs."""
        return next((line for line in self.lines if line.name == name and line.runs), None)


class Sheet(msgspec.Struct):
    """A table of other figures, as text."""

    title: str
    head: list[str]
    rows: list[list[str]]


class Results(msgspec.Struct, omit_defaults=True):
    """All of one area, and the conditions: data and rounds, machine, day, and the versions of what was run."""

    area: str
    date: str
    machine: str
    conditions: str
    comparisons: list[Comparison]
    sheets: list[Sheet] = []
    versions: dict[str, str] = {}

    @property
    def failures(self) -> list[str]:
        """What of our own failed."""
        return [
            f"{self.area}, {comparison.title}, {line.label}: {line.failure}"
            for comparison in self.comparisons
            for line in comparison.lines
            if line.failed and line.name.startswith("backhaul")
        ]


def save(results: Results, directory: Path) -> Path:
    """Write an area's results; return the file."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{results.area}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
    return path


def load(path: Path) -> Results:
    """Read an area's results.

    Raises:
        msgspec.ValidationError: it is something else.
    """
    return msgspec.json.decode(path.read_bytes(), type=Results)
