"""``python -m bench.report``: docs/BENCHMARKS.md and its plots anew from docs/benchmarks/AREA.json, without measuring.

What stands between an area's two markers on the page is made here, and nothing else of it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from backhaul.formats.quantities import format_size
from bench.results import Comparison, Line, Results, load

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "BENCHMARKS.md"
RESULTS = ROOT / "docs" / "benchmarks"
_FEW_SECONDS = 10.0


def seconds(value: float | None) -> str:
    """Write a time as people compare it: milliseconds below a second."""
    if not value:  # a bound on something else takes no time
        return ""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    return f"{value:.2f} s" if value < _FEW_SECONDS else f"{value:.1f} s"


def _bytes(value: float | None) -> str:
    return "" if value is None else format_size(int(value))


def _rate(value: float) -> str:
    return f"{value / 1e6:.0f} MB/s"


def _spread(line: Line) -> str:
    walls = [run.wall for run in line.runs]
    return f"{seconds(min(walls))} - {seconds(max(walls))}" if len(walls) > 1 else ""


def _base(comparison: Comparison, line: Line) -> Line | None:
    return comparison.line(line.base or comparison.base)


def _time_against(comparison: Comparison, line: Line) -> str:
    base = _base(comparison, line)
    return f"{line.wall / base.wall:.2f}" if base and line.wall else ""


def _rate_against(comparison: Comparison, line: Line) -> str:
    base = _base(comparison, line)
    return f"{line.rate / base.rate:.2f}" if base else ""


def _sent(comparison: Comparison, line: Line) -> str:
    sent = line.median("sent")
    if sent is None or not line.size:
        return _bytes(sent)
    return f"{_bytes(sent)} ({sent / line.size:.2f}x)"


def _sent_share(comparison: Comparison, line: Line) -> str:
    sent = line.median("sent")
    return f"{sent / line.size:.3f}x" if sent is not None and line.size else ""


def _cpu_a_gb(comparison: Comparison, line: Line) -> str:
    cpu = line.median("cpu")
    return f"{cpu / line.size * 1e9:.2f} s" if cpu is not None and line.size else ""


# What a table can have, by its heading; {base} is the name of the way that the others are compared with.
COLUMNS: dict[str, Callable[[Comparison, Line], str]] = {
    "receivers": lambda _, line: str(line.receivers or ""),
    "good runs": lambda _, line: str(len(line.runs)),
    "payload": lambda _, line: _bytes(line.size),
    "rate": lambda _, line: _rate(line.rate) if line.size else "",
    "wall": lambda _, line: seconds(line.wall),
    "from - to": lambda _, line: _spread(line),
    "CPU": lambda _, line: seconds(line.median("cpu")),
    "its CPU": lambda _, line: seconds(line.median("cpu")),
    "CPU of the machine": lambda _, line: seconds(line.median("machine")),
    "peak memory": lambda _, line: _bytes(line.median("memory")),
    "staged on disk": lambda _, line: _bytes(line.median("staged")),
    "ratio": lambda _, line: f"{line.size / line.stored:.2f}" if line.size and line.stored else "",
    "bytes sent": _sent,
    "sent by the sender": _sent_share,
    "CPU a GB": _cpu_a_gb,
    "time against ours": _time_against,
    "rate against {base}": _rate_against,
}


def picture(results: Results, comparison: Comparison) -> str:
    """Return the name of a comparison's plot."""
    return f"{results.area}-{comparison.name}.svg"


def table(comparison: Comparison) -> list[str]:
    """Return a comparison as a Markdown table, and what failed below it."""
    heads = [column.format(base=comparison.base) for column in comparison.columns]
    lines = [f"| way | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(heads)]
    failures = []
    for line in comparison.lines:
        name = f"*{line.name}*" if line.limit else line.name
        if line.failed:
            every = line.failed + len(line.runs)
            name += " (failed)" if not line.runs else f" ({line.failed} of {every} failed)"
            failures.append(f"*{line.label}* failed in {line.failed} of {every} runs: {_said(line.failure)}")
        cells = [""] * len(heads)
        if line.runs:
            cells = [COLUMNS[column](comparison, line) for column in comparison.columns]
        elif "receivers" in comparison.columns:
            cells[comparison.columns.index("receivers")] = str(line.receivers or "")
        lines.append(f"| {' | '.join([name, *cells])} |")
    return [*lines, "", *(line for failure in failures for line in (failure, ""))]


def _said(words: str) -> str:
    """Return a program's words without paths and whatever Markdown would make something of."""
    return re.sub(r"[|<>*_`\[\]]", " ", re.sub(r"/[\w./-]+", "...", words)).strip()


def section(results: Results) -> str:
    """Return what stands between an area's markers."""
    lines = [f"Measured on {results.date} on {results.machine}: {results.conditions}.", ""]
    if results.versions:
        lines += [f"With {', '.join(f'{name} {version}' for name, version in results.versions.items())}.", ""]
    for comparison in results.comparisons:
        lines += [f"### {comparison.title}", ""]
        if comparison.note:
            lines += [comparison.note, ""]
        if comparison.plot:
            lines += [f"![{comparison.title}](benchmarks/{picture(results, comparison)})", ""]
        lines += table(comparison)
    for sheet in results.sheets:
        lines += [f"### {sheet.title}", "", f"| {' | '.join(sheet.head)} |"]
        lines.append("| " + " | ".join(["---", *["---:"] * (len(sheet.head) - 1)]) + " |")
        lines += [f"| {' | '.join(row)} |" for row in sheet.rows]
        lines.append("")
    return "\n".join(lines)


def placed(page: str, results: Results) -> str:
    """Return the page with an area's section between its markers; with a place for it at the end if there was none."""
    begin, end = f"<!-- {results.area} -->\n", f"<!-- end of {results.area} -->\n"
    if begin not in page or end not in page:
        page = f"{page.rstrip()}\n\n## {results.area.capitalize()}\n\n{begin}{end}"
    head, _, rest = page.partition(begin)
    tail = rest.partition(end)[2]
    return f"{head}{begin}\n{section(results)}\n{end}{tail}"


def kept(page: str) -> list[Path]:
    """Return the files of the areas that have a place on the page; other figures beside them are other pages'."""
    return [RESULTS / f"{area}.json" for area in re.findall(r"^<!-- end of (.+) -->$", page, re.MULTILINE)]


def write_plots(results: Results, directory: Path) -> list[Path]:
    """Draw an area's plots into a directory; drop those that it has no more."""
    from bench.plots import draw

    drawn = draw(results)
    paths = [directory / name for name in drawn]
    for path in directory.glob(f"{results.area}-*.svg"):
        if path not in paths:
            path.unlink()
    for name, content in drawn.items():
        (directory / name).write_bytes(content)
    return paths


def main() -> None:
    """Render all areas that the page has."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    for path in kept(PAGE.read_text()):
        results = load(path)
        write_plots(results, RESULTS)
        PAGE.write_text(placed(PAGE.read_text(), results))


if __name__ == "__main__":
    main()
