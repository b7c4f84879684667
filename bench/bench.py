"""``make bench``: each area against the tools that a person would pick for it, in the same run, beside what bounds all.

The ways alternate, round by round, so that a noisy neighbour hits all of them; what counts is each way's median and
the ratios. Each area's results are kept as soon as it is done: as JSON, plots and tables, in ``.bench`` or, with
``--write``, in docs.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from backhaul.formats.quantities import format_duration, format_size
from bench.report import PAGE, RESULTS, ROOT, placed, section, write_plots
from bench.results import Results, save

KEPT = ROOT / ".bench"


class Area(msgspec.Struct, frozen=True):
    """One area: ``function(directory, size, rounds)`` of a module measures it, in a directory of its own.

    ``rounds`` and ``size`` (bytes) are what it takes if nothing else is asked for: all areas together are done in
    three quarters of an hour on two cores.
    """

    module: str
    function: str
    what: str
    rounds: int
    size: int

    def measure(self, directory: Path, size: int | None, rounds: int | None) -> Results:
        """Measure it."""
        function: Callable[[Path, int, int], Results]
        function = getattr(importlib.import_module(self.module), self.function)
        return function(directory, size or self.size, rounds or self.rounds)


def areas() -> dict[str, Area]:
    """Return the areas that there are, by name."""
    known = {
        "pipelines": Area("bench.pipelines", "pipelines", "push and pull of one stream", 3, 2_000_000_000),
        "encryption": Area("bench.encryption", "encryption", "push and pull, encrypted", 3, 2_000_000_000),
        "mirror": Area("bench.mirror", "mirror", "directories of files and chunks", 2, 4_000_000_000),
        "databases": Area("bench.databases", "databases", "a PostgreSQL database, there and back", 1, 5_000_000_000),
        "fan-out": Area("bench.fan_out", "fan_out", "one sender, many receivers", 2, 2_000_000_000),
        "latency": Area("bench.latency", "latency", "small things and long listings", 11, 1_000),
        "uplink": Area("bench.uplink", "uplink", "push over lines of many rates", 1, 1_000_000_000),
    }
    return {name: area for name, area in known.items() if importlib.util.find_spec(area.module)}


def run(name: str, area: Area, size: int | None, rounds: int | None) -> Results:
    """Measure an area in a directory that is gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="backhaul-bench-"))
    print(f"{name}: {area.what}", file=sys.stderr)
    start = time.monotonic()
    try:
        return area.measure(directory, size, rounds)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        print(f"{name}: took {format_duration(time.monotonic() - start)}", file=sys.stderr)


def keep(results: Results, *, write: bool) -> Path:
    """Write down what was found; return the file of the figures."""
    place = RESULTS if write else KEPT
    path = save(results, place)
    write_plots(results, place)
    if write:
        PAGE.write_text(placed(PAGE.read_text(), results))
    return path


def main() -> int:
    """Run the benchmark; 1 if a run of Backhaul's own failed, or a whole area."""
    known = areas()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=known, action="append", help="one area; may be given several times")
    parser.add_argument("--rounds", type=int, help="instead of each area's own number")
    parser.add_argument("--size", type=int, help="bytes of data, instead of each area's own size")
    parser.add_argument("--write", action="store_true", help=f"renew docs/{RESULTS.name} and {PAGE.name}")
    parser.add_argument("--list", action="store_true", help="say what there is, and measure nothing")
    options = parser.parse_args()
    if options.list:
        for name, area in known.items():
            print(f"{name:11} {area.what}; rounds: {area.rounds}, size: {format_size(area.size)}")
        return 0
    failures: list[str] = []
    for name, area in known.items():
        if options.only and name not in options.only:
            continue
        try:
            results = run(name, area, options.size, options.rounds)
        except Exception as error:  # noqa: BLE001  other areas still have something to tell
            failures.append(f"{name}: {type(error).__name__}: {error}")
            print(f"bench: {failures[-1]}", file=sys.stderr)
            continue
        path = keep(results, write=options.write)
        failures += results.failures
        print(section(results))
        print(f"The figures and plots of {name} are in {path.parent}.", file=sys.stderr)
    for failure in failures:
        print(f"bench: failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
