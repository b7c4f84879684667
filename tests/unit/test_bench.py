"""The benchmarks' page is what its figures say, and the runner keeps going."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from bench.bench import areas
from bench.results import Comparison, Line, Results, Run, load, save
from bench.runs import FailedError, alternate

from bench import data, plots, report

pytestmark = pytest.mark.unit

PAGE = report.PAGE.read_text()
FILES = report.kept(PAGE)


def results(*lines: Line, columns: tuple[str, ...] = ("rate", "wall", "time against ours")) -> Results:
    comparison = Comparison("push", "Push of something", list(columns), list(lines))
    return Results("area", "2026-01-02", "a machine", "3 rounds", [comparison], versions={"zstd": "1.5"})


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_the_page_has_what_the_figures_say(path: Path) -> None:
    found = load(path)
    assert found.area == path.stem
    between = re.search(rf"<!-- {found.area} -->\n\n(.*?)\n<!-- end of {found.area} -->\n", PAGE, re.DOTALL)
    assert between is not None
    assert between[1] == report.section(found)


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_the_plots_are_what_the_figures_say(path: Path) -> None:
    drawn = plots.draw(load(path))
    assert drawn
    assert {name: (report.RESULTS / name).read_bytes() for name in drawn} == drawn


def test_every_plot_is_on_the_page_and_is_there() -> None:
    named = re.findall(r"!\[[^\]]*\]\(benchmarks/([^)]+)\)", PAGE)
    assert sorted(named) == sorted(path.name for path in report.RESULTS.glob("*.svg"))


def test_every_place_on_the_page_belongs_to_an_area_that_can_be_measured_again() -> None:
    assert {path.stem for path in FILES} <= set(areas())
    assert {"pipelines", "encryption", "mirror", "databases", "fan-out"} <= {path.stem for path in FILES}


def test_ways_alternate_and_slow_ones_run_once() -> None:
    ran: list[str] = []

    def way(name: str) -> Callable[[], Run]:
        def measure() -> Run:
            ran.append(name)
            return Run(1.0, 1.0)

        return measure

    lines = alternate({name: way(name) for name in ("ours", "theirs", "slow")}, 3, once=["slow"], limits=["slow"])
    assert ran == ["ours", "theirs", "slow", "ours", "theirs", "ours", "theirs"]
    assert [(line.name, len(line.runs), line.limit) for line in lines] == [
        ("ours", 3, False),
        ("theirs", 3, False),
        ("slow", 1, True),
    ]


def test_a_peer_that_fails_is_tried_again_and_the_others_go_on() -> None:
    times = itertools.count()

    def broken() -> Run:
        if next(times) != 1:
            raise FailedError("status 7: no such | bucket at /tmp/secret-place/x\nthe command")
        return Run(4.0, 1.0)

    ours, theirs = alternate({"backhaul": lambda: Run(2.0, 1.0), "theirs": broken}, 3)
    for line in (ours, theirs):
        line.size = 800_000_000
    assert len(ours.runs) == 3
    assert (len(theirs.runs), theirs.failed) == (1, 2)
    found = results(ours, theirs)
    assert found.failures == []
    text = report.section(found)
    assert "| backhaul | 400 MB/s | 2.00 s | 1.00 |" in text
    assert "| theirs (2 of 3 failed) | 200 MB/s | 4.00 s | 2.00 |" in text
    assert "*theirs* failed in 2 of 3 runs: status 7: no such   bucket at ...\n" in text


def test_a_way_without_a_good_run_has_no_figures_and_our_own_failure_is_said() -> None:
    found = results(Line("backhaul", [], failure="status 1", failed=2), Line("theirs", [Run(4.0, 1.0)], size=10**9))
    assert found.failures == ["area, Push of something, backhaul: status 1"]
    text = report.section(found)
    assert "| backhaul (failed) |  |  |  |" in text
    assert "| theirs | 250 MB/s | 4.00 s |  |" in text, "there is nothing to compare with"
    (plot,) = plots.draw(found).values()
    assert b"failed" in plot


def test_medians_and_spread() -> None:
    line = Line("backhaul", [Run(3.0, 1.0, memory=10**8), Run(1.0, 5.0), Run(2.0, 3.0, memory=3 * 10**8)], size=10**9)
    found = results(line, columns=("rate", "wall", "from - to", "CPU", "peak memory", "ratio"))
    assert "| backhaul | 500 MB/s | 2.00 s | 1.00 s - 3.00 s | 3.00 s | 200 MB |  |" in report.section(found)
    line.stored = 250_000_000
    assert "| 4.00 |" in report.section(found)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "12 ms"), (0.9, "900 ms"), (1.0, "1.00 s"), (9.99, "9.99 s"), (12.34, "12.3 s"), (None, "")],
)
def test_times_are_written_with_three_digits(value: float | None, text: str) -> None:
    assert report.seconds(value) == text


def test_each_way_is_compared_with_its_own_base() -> None:
    lines = [
        Line("backhaul", [Run(10.0, 1.0)]),
        Line("backhaul, physical", [Run(5.0, 1.0)]),
        Line("theirs", [Run(20.0, 1.0)]),
        Line("theirs, physical", [Run(4.0, 1.0)], base="backhaul, physical"),
    ]
    table = report.table(Comparison("push", "Push", ["time against ours"], lines))
    assert table[4:6] == ["| theirs | 2.00 |", "| theirs, physical | 0.80 |"]


def test_a_limit_far_away_does_not_squeeze_the_bars() -> None:
    ways = [Line("backhaul", [Run(10.0, 1.0)], size=10**9), Line("theirs", [Run(20.0, 1.0)], size=10**9)]
    near = Line("zstd alone", [Run(8.0, 1.0)], size=10**9, limit=True)
    far = Line("a pipe alone", [Run(0.5, 1.0)], size=10**9, limit=True)
    (plot,) = plots.draw(results(*ways, near, far)).values()
    assert b"zstd alone: 125 MB/s<" in plot
    assert b"a pipe alone: 2,000 MB/s (beyond the plot)<" in plot


def test_over_receivers_there_are_two_panels_of_curves() -> None:
    lines = [
        Line("backhaul, chain", [Run(float(count), 2.0 * count)], size=10**9, receivers=count) for count in (1, 2, 4)
    ]
    lines.append(Line("plain TCP", [Run(0.5, 1.0)], size=10**9, receivers=1, limit=True))
    (plot,) = plots.draw(results(*lines)).values()
    assert b"MB/s of payload (more is better)" in plot
    assert b"CPU seconds a GB, all hosts (less is better)" in plot


def test_plots_are_the_same_every_time() -> None:
    found = results(Line("backhaul", [Run(1.0, 1.0), Run(2.0, 1.0)], size=10**9))
    assert plots.draw(found) == plots.draw(found)


def test_results_come_back_from_their_file(tmp_path: Path) -> None:
    found = results(Line("backhaul", [Run(1.0, 1.0, sent=3)], size=5, receivers=2, stored=4))
    assert load(save(found, tmp_path)) == found


def test_a_section_goes_between_its_markers_and_nowhere_else() -> None:
    found = results(Line("backhaul", [Run(1.0, 1.0)], size=10**9))
    page = "before\n<!-- area -->\n\nold\n<!-- end of area -->\nafter\n"
    placed = report.placed(page, found)
    assert placed.startswith(
        "before\n<!-- area -->\n\nMeasured on 2026-01-02 on a machine: 3 rounds.\n\nWith zstd 1.5.\n"
    )
    assert placed.endswith("\n<!-- end of area -->\nafter\n")
    assert "old" not in placed
    assert report.placed(placed, found) == placed
    added = report.placed("another area\n", found)
    assert added.startswith("another area\n\n## Area\n\n<!-- area -->\n\nMeasured on 2026-01-02")
    assert report.placed(added, found) == added


def test_plots_that_are_no_more_go(tmp_path: Path) -> None:
    (tmp_path / "area-gone.svg").write_text("old")
    (tmp_path / "other-push.svg").write_text("another area's")
    report.write_plots(results(Line("backhaul", [Run(1.0, 1.0)], size=10**9)), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["area-push.svg", "other-push.svg"]


@pytest.mark.parametrize("size", [1, 3_000_000, 40_000_000])
def test_the_mixture_has_its_size_and_both_kinds(size: int) -> None:
    content = b"".join(data.mixture(size))
    assert len(content) == size
    assert content == b"".join(data.mixture(size)), "the same every time"
    if size == 40_000_000:
        assert b"COPY public.orders" in content
        assert any(b"\n" not in content[at : at + 500_000] for at in range(0, size, 250_000)), "an attachment as base64"
        assert len({*content}) == 256, "an attachment as bytes"
