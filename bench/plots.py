"""Plots of benchmark results, as SVG: the same bytes for the same results.

Bars show each way's median and the spread of its rounds, lines what bounds all of them. A comparison over numbers of
receivers becomes two panels of curves instead. Text stays text; the ground is white, on dark pages too.
"""

from __future__ import annotations

import io
import statistics
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib as mpl
import msgspec
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bench.report import picture, seconds
from bench.results import Comparison, Line, Results

_OURS, _PEER, _INK, _FAINT = "#2563eb", "#9aa5b1", "#1f2933", "#d9dee4"
_MARKS = ("#b45309", "#7c3aed", "#be123c", "#0f766e")  # limits, and curves of peers
_DASHES = ("--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
_STYLE: dict[Any, object] = {
    "svg.hashsalt": "backhaul",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "figure.facecolor": "white",
}
_WIDTH = 8.0  # inches; a pixel is a 96th of one
_LETTER = 0.077  # of a label, on average and with room to spare
_LABEL = 33  # letters in a line of a label
_BAR, _GAP = 0.4, 0.16
_TOP, _AXIS, _LEGEND_ROW = 0.45, 0.55, 0.2
_CURVES = 3.75
_BEYOND = 2.0  # a limit that is more times as much as the largest bar is only named


def draw(results: Results) -> dict[str, bytes]:
    """Return the plots of an area, by file name."""
    drawn = {}
    for comparison in results.comparisons:
        if comparison.plot:
            # rc_context also brings back what was set before: this process may have other plots to draw.
            with mpl.rc_context(_STYLE):
                figure = _curves(comparison) if _counts(comparison) else _bars(comparison)
                drawn[picture(results, comparison)] = _svg(figure)
    return drawn


def _svg(figure: Figure) -> bytes:
    FigureCanvasSVG(figure)
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    # (An editor that strips the ends of lines would change the file otherwise.)
    return b"\n".join(line.rstrip() for line in out.getvalue().splitlines()) + b"\n"


def _counts(comparison: Comparison) -> bool:
    """Tell whether it is over several numbers of receivers."""
    return len({line.receivers for line in comparison.lines if line.receivers and not line.limit}) > 1


class Measure(msgspec.Struct, frozen=True):
    """What bars are about: how it is read from a way's runs, its unit, and what is good."""

    of: Callable[[Line], list[float]]
    unit: str
    axis: str

    def figures(self, line: Line) -> tuple[float, float, float]:
        """Return the median, the least and the most."""
        found = self.of(line)
        return statistics.median(found), min(found), max(found)

    def written(self, value: float) -> str:
        """Write a value in a few digits."""
        return seconds(value) if self.unit == "s" else f"{value:,.0f} {self.unit}"


MEASURES = {
    "rate": Measure(lambda line: [rate / 1e6 for rate in line.rates], "MB/s", "MB/s of payload (more is better)"),
    "wall": Measure(lambda line: [run.wall for run in line.runs], "s", "seconds (less is better)"),
    "sent": Measure(lambda line: [sent / 1e6 for sent in line.sent], "MB", "MB sent (less is better)"),
}


def _bars(comparison: Comparison) -> Figure:
    measure = MEASURES[comparison.shows]
    ways = [line for line in comparison.lines if not line.limit]
    limits = [line for line in comparison.lines if line.limit and line.runs]
    labels = [textwrap.fill(line.name, _LABEL) for line in ways]
    heights = [max(_BAR, 0.19 * (1 + label.count("\n"))) for label in labels]
    left = 0.15 + _LETTER * max(len(part) for label in labels for part in label.split("\n"))
    body = sum(heights) + _GAP * (len(ways) + 1)
    rows = len(limits) + 1
    height = _TOP + body + _AXIS + _LEGEND_ROW * rows + 0.1
    figure = Figure(figsize=(_WIDTH, height))
    axes = figure.add_axes((left / _WIDTH, 1 - (_TOP + body) / height, (_WIDTH - left - 0.2) / _WIDTH, body / height))

    longest = max((measure.figures(line)[2] for line in ways if line.runs), default=1.0)
    bounds = {line.name: measure.figures(line)[0] for line in limits}
    shown = [bound for bound in bounds.values() if bound <= _BEYOND * longest]
    end = max(1.17 * longest, 1.05 * max(shown, default=0.0))
    axes.set_xlim(0, end)
    at, places = _GAP, []
    for line, thick in zip(ways, heights, strict=True):
        middle = at + thick / 2
        places.append(middle)
        at += thick + _GAP
        if not line.runs:
            _beside(axes, 0, middle, "failed")
            continue
        median, least, most = measure.figures(line)
        axes.barh(middle, median, height=_BAR * 0.8, color=_OURS if line.name.startswith("backhaul") else _PEER)
        if most > least:
            axes.errorbar(median, middle, xerr=[[median - least], [most - median]], color=_INK, capsize=3, lw=1.2)
        _beside(axes, most, middle, measure.written(median))
    several = any(len(line.runs) > 1 for line in ways)
    spread = "the median, from the least to the most of the rounds" if several else "one round"
    handles: list[Artist] = [Patch(color=_OURS, label=spread)]
    for (name, bound), mark, dashes in zip(bounds.items(), _MARKS, _DASHES, strict=False):
        label = f"{name}: {measure.written(bound)}{'' if bound <= end else ' (beyond the plot)'}"
        handles.append(Line2D([], [], color=mark, ls=dashes, lw=1.5, label=label))
        if bound <= end:
            axes.axvline(bound, color=mark, ls=dashes, lw=1.5, zorder=1.5)
    axes.set_ylim(body, 0)
    axes.set_yticks(places, labels)
    axes.set_xlabel(measure.axis)
    _plain(axes)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=_FAINT, lw=0.7)
    figure.text(0.15 / _WIDTH, 1 - 0.28 / height, comparison.title, weight="bold", size=10.5, va="center")
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.08 / _WIDTH, 0.04 / height),
        frameon=False,
        borderpad=0,
        labelspacing=0.35,
    )
    return figure


def _beside(axes: Axes, x: float, y: float, words: str) -> None:
    axes.annotate(
        words,
        (x, y),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
    )


def _curves(comparison: Comparison) -> Figure:
    names = list(dict.fromkeys(line.name for line in comparison.lines if line.runs))
    height = _CURVES + _AXIS + _LEGEND_ROW * len(names) + 0.1
    figure = Figure(figsize=(_WIDTH, height))
    panel = (_WIDTH - 1.6) / 2 / _WIDTH
    bottom = 1 - (_CURVES) / height
    rate = figure.add_axes((0.7 / _WIDTH, bottom, panel, 3.0 / height))
    cpu = figure.add_axes((1.4 / _WIDTH + panel, bottom, panel, 3.0 / height))
    counts = sorted({line.receivers for line in comparison.lines if line.receivers})
    handles = []
    for name, (color, dashes) in zip(names, _looks(comparison, names), strict=True):
        lines = [line for line in comparison.lines if line.name == name and line.runs]
        x = [line.receivers or 0 for line in lines]
        marks = {"color": color, "ls": dashes, "marker": "" if lines[0].limit else "o", "ms": 4.5, "lw": 1.7}
        middle = [MEASURES["rate"].figures(line) for line in lines]
        if len(x) == 1 and lines[0].limit:
            # One figure that holds for any number: a line across.
            handles.append(rate.axhline(middle[0][0], color=color, ls=dashes, lw=1.5))
        else:
            handles += rate.plot(x, [m for m, _, _ in middle], **marks)  # type: ignore[arg-type]
            for count, (median, least, most) in zip(x, middle, strict=True):
                if most > least:
                    spread = [[median - least], [most - median]]
                    rate.errorbar(count, median, yerr=spread, fmt="none", color=color, capsize=3, lw=1.2)
            used = [(line.median("cpu") or 0.0) / (line.size or 1) * 1e9 for line in lines]
            cpu.plot(x, used, **marks)  # type: ignore[arg-type]
        handles[-1].set_label(name)
    for axes, what in (
        (rate, "MB/s of payload (more is better)"),
        (cpu, "CPU seconds a GB, all hosts (less is better)"),
    ):
        axes.set_xlabel("receivers")
        axes.set_title(what, size=9.5)
        axes.set_xticks(counts)
        axes.set_xlim(min(counts) - 0.4, max(counts) + 0.4)
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
        axes.grid(color=_FAINT, lw=0.7)
        _plain(axes)
    figure.text(0.15 / _WIDTH, 1 - 0.28 / height, comparison.title, weight="bold", size=10.5, va="center")
    figure.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0.08 / _WIDTH, 0.04 / height), frameon=False, borderpad=0
    )
    return figure


def _looks(comparison: Comparison, names: list[str]) -> Iterator[tuple[str, object]]:
    """Yield a colour and a line style for each name: ours in one colour, peers and limits in others."""
    ours = iter(("-", "--", ":"))
    others = iter(_MARKS)
    dashes = iter(_DASHES)
    limits = {line.name for line in comparison.lines if line.limit}
    for name in names:
        if name.startswith("backhaul"):
            yield _OURS, next(ours)
        elif name in limits:
            yield next(others), next(dashes)
        else:
            yield next(others), "-"


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)
